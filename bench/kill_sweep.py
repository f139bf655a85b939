# SPDX-License-Identifier: MIT
"""Kill a sweep at random times, restart it until it is finished, and compare with an uninterrupted one.

    python bench/kill_sweep.py --kills 50

The sweep runs as ``dlnfast sweep`` in its own process group, and the whole group gets a SIGKILL. One kill in
five occurs at any time after the start, the others after the first new run has started. After every kill,
the summaries of finished runs must be unchanged: the same bytes, inode and modification time. At the end
every run exists once, and its numbers equal those of the uninterrupted sweep bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SPEC = """
[problem]
kind = "low-rank-recovery"
dim = 24
rank = 2
[weights]
depth = 3
[train]
learning_rate = 1.0
steps = 3000
record_every = 100
[sweep]
"weights.seed" = {seeds}
"weights.scale" = [0.2, 0.5]
"train.engine" = ["auto", "dense"]
"train.learning_rate" = [0.5, 1e9]
"""
#: Entries of a summary that differ between identical runs.
VARYING = ("seconds", "training_seconds", "preparation_seconds", "checksum")


def start(spec: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dlnfast", "sweep", str(spec), "--out", str(folder), "--keep-runs"]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def wait_for_runs(process: subprocess.Popen[bytes], folder: Path) -> float:
    """Wait for one more run or the exit of the sweep, and return the time."""
    before = len(list(folder.glob("*/*")))
    while process.poll() is None and len(list(folder.glob("*/*"))) == before:
        time.sleep(0.002)
    return time.perf_counter()


def finished(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return inode, modification time and content of all summaries; raise if one is incomplete."""
    found = {}
    for path in folder.glob("*/summary.json"):
        content, status = path.read_bytes(), path.stat()
        json.loads(content)
        found[path.parent.name] = (status.st_ino, status.st_mtime_ns, content)
    return found


def numbers(folder: Path) -> dict[str, tuple[dict, dict]]:
    """Return the summary and losses of every run, without times."""
    import dlnfast as dln

    found = {}
    for name, (_, _, content) in finished(folder).items():
        summary = json.loads(content)
        fixed = {key: value for key, value in summary.items() if key not in VARYING}
        losses = dln.load(folder / name / summary["file"]).loss.tolist()
        found[name] = (fixed, losses)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=12, help="the grid has eight times as many runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills")
    settings = parser.parse_args()
    generator = random.Random(settings.seed)
    with tempfile.TemporaryDirectory() as scratch:
        spec, reference, folder = (Path(scratch, name) for name in ("spec.toml", "reference", "killed"))
        spec.write_text(SPEC.format(seeds=list(range(settings.seeds))))
        begin = time.perf_counter()
        process = start(spec, reference)
        starting = wait_for_runs(process, reference)
        assert process.wait() == 0
        seconds, running = (time.perf_counter() - start_time for start_time in (begin, starting))
        wanted = numbers(reference)
        assert len(wanted) == 8 * settings.seeds
        kills = sweeps = partial = 0
        before: dict[str, tuple[int, int, bytes]] = {}
        while kills < settings.kills or before:
            process = start(spec, folder)
            if kills < settings.kills:
                whole = generator.random() < 0.2
                if not whole:
                    wait_for_runs(process, folder)
                try:
                    process.wait(generator.uniform(0.0, seconds if whole else running / 2))
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    kills += 1
            done = process.wait() == 0
            after = finished(folder)
            assert before.items() <= after.items(), "a finished run was lost or repeated"
            partial += len(before) < len(after) < len(wanted)
            before = after
            if done:
                found = numbers(folder)
                assert found.keys() == wanted.keys(), "the runs differ from those of the uninterrupted sweep"
                for name, values in wanted.items():
                    assert found[name] == values, f"{found[name][0]} instead of {values[0]}"
                shutil.rmtree(folder)
                before = {}
                sweeps += 1
    print(
        f"{kills} kills, {partial} of them in partial sweeps, in {sweeps} sweeps of {len(wanted)} runs: "
        f"no finished run lost, none repeated, all numbers equal bit for bit "
        f"({seconds:.1f} s for the uninterrupted sweep)"
    )


if __name__ == "__main__":
    main()
