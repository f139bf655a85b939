# SPDX-License-Identifier: MIT
"""Kill checkpointed runs at random times, resume them, and compare the results bit for bit.

    python bench/kill_runs.py [--kills 100] [--engine reduced|dense|torch]

Every run has its own process, which gets a SIGKILL. The folder must then contain the first part of an
uninterrupted run. `dlnfast resume` finishes the run in another process, and the result must equal that of
the uninterrupted run bit for bit.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import dlnfast as dln

PROGRAM = """
import sys
import dlnfast as dln
engine = sys.argv[2]
problem = dln.low_rank_recovery(60, 3)
dln.train(problem, dln.orthogonal([60] * 4), engine=engine, learning_rate=0.2, momentum=0.5, n_threads=1,
          steps={"reduced": 400_000, "dense": 20_000, "torch": 4_000}[engine],
          record=dln.Record(every=100, singular_values=2),
          checkpoint=dln.Checkpoint(sys.argv[1], every=100, seconds=0.05))
"""


def start(folder: Path, engine: str) -> subprocess.Popen[bytes]:
    """Start the program in a new process."""
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), engine])


def wait_for_first_file(folder: Path) -> None:
    """Wait until a run has written the file with its settings."""
    while not (folder / "run.npz").exists():
        time.sleep(0.002)


def final_arrays(run: dln.Trajectory) -> list[np.ndarray]:
    """Return the arrays at the end of a run."""
    if run.engine == "reduced":
        return [core[-1] for core in run.states.cores] + [run.states.rho[-1]]
    return list(run.states.final)


def main() -> int:
    """Kill, read, resume and compare runs, and print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--engine", default="dense", choices=["reduced", "dense", "torch"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = np.random.default_rng(arguments.seed)
    kills = unread = 0
    start_time = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        whole_folder = Path(scratch) / "whole"
        process = start(whole_folder, arguments.engine)
        wait_for_first_file(whole_folder)
        took = time.perf_counter()
        process.wait()
        took = time.perf_counter() - took
        whole = dln.load(whole_folder)
        parts: list[float] = []
        while kills < arguments.kills:
            folder = Path(scratch) / f"run{kills}"
            process = start(folder, arguments.engine)
            wait_for_first_file(folder)
            try:
                process.wait(generator.uniform(0.0, 0.8 * took))
                continue  # it has finished already
            except subprocess.TimeoutExpired:
                os.kill(process.pid, 9)
                process.wait()
            kills += 1
            try:
                part = dln.load(folder)
            except ValueError as error:
                unread += 1
                print(f"kill {kills}: {error}")
                continue
            np.testing.assert_array_equal(part.loss, whole.loss[: len(part.loss)])
            parts.append(len(part.loss) / len(whole.loss))
            subprocess.run([sys.executable, "-m", "dlnfast", "resume", str(folder)], check=True, stdout=-3)
            run = dln.load(folder)
            np.testing.assert_array_equal(run.loss, whole.loss)
            np.testing.assert_array_equal(run.steps, whole.steps)
            for x, y in zip(final_arrays(run), final_arrays(whole), strict=True):
                np.testing.assert_array_equal(x, y)
    print(
        f"{arguments.engine}: {kills} kills, {unread} folders that could not be read, {kills - unread} runs "
        f"that resumed bit for bit; killed at {min(parts):.0%} to {max(parts):.0%} of the run, "
        f"median {np.median(parts):.0%}; {time.perf_counter() - start_time:.0f} s"
    )
    return 1 if unread else 0


if __name__ == "__main__":
    sys.exit(main())
