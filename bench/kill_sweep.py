# SPDX-License-Identifier: MIT
"""Kill a sweep at random moments, start it again until it is done, and compare with one left alone.

    python bench/kill_sweep.py --kills 50

The sweep runs as ``dlnfast sweep`` in a process group of its own, and all of the group is killed (SIGKILL):
one time in five at any moment from its start on, else at one after its first new run has begun. After every
kill, runs that are finished must stay as they are: the same bytes, in the same file, written at the same
time. In the end every run is there once, with the numbers of the sweep left alone, to the last bit.
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
#: What a summary says of a machine's mood rather than of a run.
MOODS = ("seconds", "training_seconds", "preparation_seconds", "checksum")


def start(spec: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dlnfast", "sweep", str(spec), "--out", str(folder), "--keep-runs"]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def wait_for_runs(process: subprocess.Popen[bytes], folder: Path) -> float:
    """Return when there was a run more, or the sweep had ended."""
    before = len(list(folder.glob("*/*")))
    while process.poll() is None and len(list(folder.glob("*/*"))) == before:
        time.sleep(0.002)
    return time.perf_counter()


def finished(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return inode, time and content of all summaries; fail for one that is not whole."""
    found = {}
    for path in folder.glob("*/summary.json"):
        content, status = path.read_bytes(), path.stat()
        json.loads(content)
        found[path.parent.name] = (status.st_ino, status.st_mtime_ns, content)
    return found


def numbers(folder: Path) -> dict[str, tuple[dict, dict]]:
    """Return every run's summary and losses, without times."""
    import dlnfast as dln

    found = {}
    for name, (_, _, content) in finished(folder).items():
        summary = json.loads(content)
        kept = {key: value for key, value in summary.items() if key not in MOODS}
        losses = dln.load(folder / name / summary["file"]).loss.tolist()
        found[name] = (kept, losses)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=12, help="the grid has eight times as many runs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    settings = parser.parse_args()
    moments = random.Random(settings.seed)
    with tempfile.TemporaryDirectory() as scratch:
        spec, alone, folder = (Path(scratch, name) for name in ("spec.toml", "alone", "killed"))
        spec.write_text(SPEC.format(seeds=list(range(settings.seeds))))
        begin = time.perf_counter()
        process = start(spec, alone)
        starting = wait_for_runs(process, alone)
        assert process.wait() == 0
        seconds, running = (time.perf_counter() - moment for moment in (begin, starting))
        wanted = numbers(alone)
        assert len(wanted) == 8 * settings.seeds
        kills = sweeps = partial = 0
        before: dict[str, tuple[int, int, bytes]] = {}
        while kills < settings.kills or before:
            process = start(spec, folder)
            if kills < settings.kills:
                whole = moments.random() < 0.2
                if not whole:
                    wait_for_runs(process, folder)
                try:
                    process.wait(moments.uniform(0.0, seconds if whole else running / 2))
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    kills += 1
            done = process.wait() == 0
            after = finished(folder)
            assert before.items() <= after.items(), "a finished run was lost or done again"
            partial += len(before) < len(after) < len(wanted)
            before = after
            if done:
                found = numbers(folder)
                assert found.keys() == wanted.keys(), "not the runs of the sweep left alone"
                for name, values in wanted.items():
                    assert found[name] == values, f"other numbers: {found[name][0]} instead of {values[0]}"
                shutil.rmtree(folder)
                before = {}
                sweeps += 1
    print(
        f"{kills} kills, {partial} of them in the midst of runs, over {sweeps} sweeps of {len(wanted)} runs: "
        f"no finished run lost, none done again, all numbers equal to the last bit "
        f"({seconds:.1f} s for the sweep left alone)"
    )


if __name__ == "__main__":
    main()
