# SPDX-License-Identifier: MIT
"""Inject a fault at every file operation of reads and writes, and count the losses.

    python bench/fault_injection.py [--case NAME ...] [--every 1] [--doubles 100] [--kills 50]

Each case (a checkpointed run, a sweep, a file that replaces an older one, ..) runs once without faults, and
then once for every file operation and kind of fault: a full disk for one operation or from then on, an
input/output error, missing permissions, a signal before or after the operation, and a simulated kill, after
which all operations fail. Random pairs of faults, in a call and in the call that resumes it, and random real
kills (SIGKILL) follow. After each fault the earlier content must be readable, the same call must return the
result of the case without faults bit for bit, and no other files may remain. tests/fault_cases.py defines
the cases and their conditions.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from fault_cases import every_case, run_case


def main() -> int:
    """Try all cases, and print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", help="parts of the names of the cases to try (default: all)")
    parser.add_argument("--every", type=int, default=1, help="try every n-th operation (default: 1, all)")
    parser.add_argument("--doubles", type=int, default=100, help="pairs of faults for each case")
    parser.add_argument("--kills", type=int, default=50, help="real kills for each case")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    total = {"singles": 0, "doubles": 0, "kills": 0, "losses": 0}
    print(f"{'case':40} {'operations':>10} {'single':>8} {'double':>8} {'killed':>8} {'losses':>8}")
    for case in every_case(zarr=True):
        if arguments.case and not any(part in case.name for part in arguments.case):
            continue
        scratch = Path(tempfile.mkdtemp())
        start = time.perf_counter()
        try:
            tally = run_case(
                case,
                scratch,
                every=arguments.every,
                doubles=arguments.doubles,
                kills=arguments.kills,
                seed=arguments.seed,
            )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        counts = (tally.singles, tally.doubles, tally.kills, len(tally.losses))
        for name, count in zip(total, counts, strict=True):
            total[name] += count
        numbers = " ".join(f"{count:8}" for count in counts)
        print(
            f"{case.name:40} {tally.n_operations:10} {numbers}   {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        for loss in tally.losses[:20]:
            print(f"    {loss}")
    tried = total["singles"] + total["doubles"] + total["kills"]
    print(
        f"{tried} faults tried: {total['singles']} single (operation, fault) and {total['doubles']} pairs of "
        f"them, {total['kills']} processes killed; {total['losses']} losses"
    )
    return 1 if total["losses"] else 0


if __name__ == "__main__":
    sys.exit(main())
