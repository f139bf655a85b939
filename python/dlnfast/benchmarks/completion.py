# SPDX-License-Identifier: MIT
"""Cases of low-rank training: factorisation, completion and sensing, compressed and full."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from .._completion import train_compressed as compressed
from .._problem.observations import Observations
from .._problem.standard import low_rank_completion, low_rank_recovery, low_rank_sensing
from .._training.options import Record
from .._training.train import train
from .._weights.initial import orthogonal
from . import record
from .options import Options

if TYPE_CHECKING:
    from .._trajectory.trajectory import Trajectory


def _measure_distance(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def _time_runs(job: Callable[[], Trajectory], repeats: int = 1) -> tuple[Trajectory, float]:
    """Return the run, and the median of its times."""
    run: Trajectory | None = None
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run = job()
        seconds.append(time.perf_counter() - start)
    assert run is not None
    return run, float(np.median(seconds))


def factorisation(options: Options) -> dict[str, Any]:
    """Time the published factorisation, and compare the reduced run with a full one of the same seed."""
    dim, full_dim, steps = (100, 30, 2000) if options.quick else (1000, 200, 40_000)
    rank = 10
    wide = low_rank_recovery(dim, rank, seed=0)
    weights = orthogonal([dim] * 4, 1e-3, 0)
    rate = 1e3 * (dim / 1000) ** 2  # c eta is that of d = 1000
    settings: dict[str, Any] = {"learning_rate": rate, "steps": steps, "record": Record(every=steps // 200)}
    run, seconds = _time_runs(lambda: train(wide, weights, **settings), options.repeats)
    fallen = int(np.argmax(run.loss < 1e-12 * run.loss[0])) if run.loss[-1] < 1e-12 * run.loss[0] else -1
    print(
        f"d = {dim}, r = {rank}, L = 3, eps = 1e-3, step {rate:g}: {steps} steps by the {run.engine} engine "
        f"with its set-up {seconds:.3f} s; loss {run.loss[0]:.3e} to {run.loss[-1]:.3e}"
        + (f", below 1e-12 of itself at {fallen}" if fallen >= 0 else "")
    )
    narrow = low_rank_recovery(full_dim, rank, seed=0)
    start = orthogonal([full_dim] * 4, 1e-3, 0)
    # From the plateau to the end: with this power of d the number of steps stays alike.
    steps = 500 if options.quick else 25_000
    settings = {
        "learning_rate": 1e3 * (full_dim / 1000) ** 1.5,
        "steps": steps,
        "record": Record(every=steps // 20),
    }
    reduced = train(narrow, start, engine="reduced", **settings)
    full, full_seconds = _time_runs(
        lambda: train(
            narrow,
            start,
            engine="dense",
            **settings
            | {"record": Record(every=steps // 20, singular_values=None, weights_every=steps // 20)},
        )
    )
    worst = max(
        _measure_distance(full.weights(layer, s), reduced.weights(layer, s))
        for layer in (1, 2, 3)
        for s in full.states.snapshot_steps.tolist()
    )
    print(
        f"d = {full_dim}, {steps} steps of a full run ({full_seconds:.1f} s) of the same seed: largest "
        f"||W_l - W_l'|| / ||W_l|| over layers and records {worst:.1e}; loss {full.loss[-1]:.3e}"
    )
    return {
        "case": "factorisation",
        "dim": dim,
        "seconds": seconds,
        "loss": [float(run.loss[0]), float(run.loss[-1])],
        "full_dim": full_dim,
        "full_steps": steps,
        "largest_difference": worst,
    }


def _find_step_below(problem: Any, run: Trajectory, level: float) -> int | None:
    """Return the first snapshot's step at which the recovery error is below a level."""
    for step in run.states.snapshot_steps.tolist():
        if problem.recovery_error(run.all_weights(step), "unobserved") < level:
            return int(step)
    return None


def completion(options: Options) -> dict[str, Any]:
    """Run the published completion, compressed; compare with full runs where these are affordable."""
    dim, steps = (100, 3000) if options.quick else (1000, 20_000)
    problem = low_rank_completion(dim, 5, 0.2 if dim == 1000 else 0.5, seed=0)
    weights = orthogonal([dim] * 4, 1e-3, 0)
    rate = 5e3 * (dim / 1000) ** 2
    rows: list[dict[str, Any]] = []
    print(f"{problem!r}, r = 5, L = 3, eps = 1e-3")
    for name, outer, learning_rate, tolerance in (
        ("published", 0.0, rate, None),
        ("published", 0.01, rate, None),
        ("default rate", 0.01, "adaptive", 1e-15),
    ):

        def job(
            outer: float = outer, learning_rate: Any = learning_rate, tolerance: float | None = tolerance
        ) -> Trajectory:
            return compressed.train_compressed(
                problem,
                weights,
                rank=5,
                outer=outer,
                learning_rate=learning_rate,
                steps=steps,
                tolerance=tolerance,
                record=Record(every=steps, weights_every=max(steps // 200, 1), singular_values=None),
            )

        run, seconds = _time_runs(job)
        taken = len(run.loss) - 1
        setup, _ = _setup_seconds(problem, weights, outer)
        row: dict[str, Any] = {
            "what": name,
            "outer": outer,
            "seconds": seconds,
            "steps": taken,
            "step_seconds": (seconds - setup) / taken,
            "recovery_error": problem.recovery_error(run, "unobserved"),
            "below_1e-12": _find_step_below(problem, run, 1e-12),
        }
        rows.append(row)
        seconds_per_step = row["step_seconds"]
        step = f"{1e3 * seconds_per_step:.3f} ms a step" if seconds_per_step > 0 else "steps not measurable"
        print(
            f"  {name:<14} gamma = {outer:<5g} {taken:6d} steps {seconds:6.2f} s "
            f"({step}, {setup:.2f} s set-up), "
            f"recovery error {row['recovery_error']:.2e}"
            + (f", below 1e-12 from step {row['below_1e-12']}" if row["below_1e-12"] is not None else ""),
            flush=True,
        )
    return {"case": "completion", "rows": rows, "distance": _distance(options), "alpha": _alpha(options)}


def _setup_seconds(problem: Observations, weights: Sequence[Any], outer: float) -> tuple[float, Any]:
    start = time.perf_counter()
    narrow = compressed.compressed_weights(problem, weights, rank=5)
    if outer == 0:
        compressed.project(problem, narrow[-1], narrow[0].T)
    return time.perf_counter() - start, narrow


def _distance(options: Options) -> list[dict[str, Any]]:
    """Compare the end-to-end matrices of full and compressed runs during training."""
    dim, steps = (60, 400) if options.quick else (200, 20_000)
    problem = low_rank_completion(dim, 5, 0.4 if not options.quick else 0.6, seed=0)
    weights = orthogonal([dim] * 4, 1e-3, 0)
    common: dict[str, Any] = {
        "learning_rate": 5e3 * (dim / 1000) ** 2,
        "steps": steps,
        "record": Record(every=steps, singular_values=None, weights_every=max(steps // 40, 1)),
    }
    full, full_seconds = _time_runs(lambda: train(problem, weights, **common))
    norm = float(np.linalg.norm(problem.truth.s))  # type: ignore[union-attr]
    rows = []
    print(f"d = {dim}, full and compressed, {steps} steps (full: {full_seconds:.1f} s)")
    for outer in (0.0, 0.01, 0.1):
        run, seconds = _time_runs(
            lambda outer=outer: compressed.train_compressed(  # type: ignore[misc]
                problem, weights, rank=5, outer=outer, **common
            )
        )
        apart = [
            float(np.linalg.norm(full.end_to_end(s) - run.end_to_end(s))) / norm
            for s in full.states.snapshot_steps.tolist()
        ]
        rows.append({"outer": outer, "seconds": seconds, "largest": max(apart), "last": apart[-1]})
        print(
            f"  gamma = {outer:<5g} {seconds:6.2f} s; distance over ||Phi||: at most {max(apart):.2e}, "
            f"in the end {apart[-1]:.2e}"
        )
    return rows


def _alpha(options: Options) -> list[dict[str, Any]]:
    """Time the compressed deep network of Kwon et al. and the full one: d = 100, r = 5, 30 %."""
    problem = low_rank_completion(100, 5, 0.3, seed=0)
    weights = orthogonal([100] * 4, 1e-2, 0)
    limit = 1e-13
    most = 2000 if options.quick else 60_000
    common: dict[str, Any] = {
        "learning_rate": 10.0,
        "steps": most,
        "record": Record(every=most, singular_values=None),
        "tolerance": limit,
    }
    rows: list[dict[str, Any]] = []

    def narrow(alpha: float) -> Trajectory:
        return compressed.train_compressed(
            problem, rank=10, basis="surrogate", scale=1e-2, outer=alpha, **common
        )

    jobs: dict[str, Callable[[], Trajectory]] = {
        "full": lambda: train(problem, weights, **common),
        "alpha = 1": lambda: narrow(1.0),
        "alpha = 5": lambda: narrow(5.0),
    }
    print(f"d = 100, r = 5, 30 %, eps = 1e-2, step 10, to a loss of {limit:g}")
    for name, job in jobs.items():
        run, seconds = _time_runs(job, 1 if name == "full" else options.repeats)
        taken = len(run.loss) - 1
        error = problem.recovery_error(run)
        rows.append({"what": name, "seconds": seconds, "steps": taken, "recovery_error": error})
        rows[-1]["ratio"] = rows[0]["seconds"] / seconds
        common["tolerance"] = None
        rows[-1]["floor"] = problem.recovery_error(job())
        common["tolerance"] = limit
        print(
            f"  {name:<10} {taken:7d} steps {seconds:7.3f} s ({1e6 * seconds / taken:.1f} us a step), loss "
            f"{run.loss[-1]:.1e}, relative error {error:.2e}, {rows[-1]['ratio']:.1f} times as fast as "
            f"full; after {most} steps relative error {rows[-1]['floor']:.2e}",
            flush=True,
        )
    return rows


def sensing(options: Options) -> dict[str, Any]:
    """Time the published sensing, full and compressed: d = 200, r = 5, m = 4000, L = 3, eps = 1e-2."""
    dim, count = (40, 800) if options.quick else (200, 4000)
    steps, full_steps = (200, 20) if options.quick else (3000, 60)
    problem = low_rank_sensing(dim, 5, count, seed=0)
    weights = orthogonal([dim] * 4, 1e-2, 0)
    rate = 20.0
    common: dict[str, Any] = {"learning_rate": rate, "record": Record(every=steps, singular_values=None)}
    full, full_seconds = _time_runs(lambda: train(problem, weights, steps=full_steps, **common))
    rows: list[dict[str, Any]] = [{"what": "full", "seconds": full_seconds, "steps": full_steps}]
    for name, changes in (
        ("gamma = 0", {"outer": 0.0}),
        ("gamma = 0.01, every 50th step", {"outer": 0.01, "outer_every": 50}),
    ):
        run, seconds = _time_runs(
            lambda changes=changes: compressed.train_compressed(  # type: ignore[misc]
                problem, weights, rank=5, steps=steps, **changes, **common
            )
        )
        error = problem.recovery_error(run)
        rows.append({"what": name, "seconds": seconds, "steps": steps, "recovery_error": error})
    per_step = full_seconds / full_steps
    print(f"{problem!r}: a full step {1e3 * per_step:.1f} ms, {steps} steps {steps * per_step:.1f} s")
    for row in rows[1:]:
        row["ratio"] = steps * per_step / row["seconds"]
        print(
            f"  {row['what']:<30} {steps} steps with set-up {row['seconds']:.2f} s: {row['ratio']:.1f} times "
            f"as fast as full, relative error {row['recovery_error']:.2e}"
        )
    assert math.isfinite(float(full.loss[-1]))
    return {"case": "sensing", "full_step_seconds": per_step, "rows": rows}


#: A large completion in a process of its own, for its peak memory.
_LARGE: Final = """
import json, sys, time
import numpy as np
import dlnfast as dln
from dlnfast.benchmarks import record
dim, count, rank = int(sys.argv[1]), int(sys.argv[2]), 10
before = record.peak_bytes()
rng = np.random.default_rng(0)
U, V = (rng.standard_normal((dim, rank)) / np.sqrt(dim) for _ in range(2))
# Distinct positions: the same number in each row, from a shuffled stride.
each = count // dim
rows = np.repeat(np.arange(dim), each)
columns = (rng.integers(dim, size=dim)[:, None] + np.arange(each) * 9973) % dim
columns = columns.reshape(-1)
values = np.empty(len(rows))
for begin in range(0, len(rows), 2**20):
    part = slice(begin, begin + 2**20)
    values[part] = dim * np.einsum("ik,ik->i", U[rows[part]], V[columns[part]])
data = record.peak_bytes() - before
start = time.perf_counter()
problem = dln.Completion(rows, columns, values, (dim, dim))
del rows, columns, values
ready = time.perf_counter() - start
start = time.perf_counter()
weights = dln.orthogonal([dim] * 4, scale=0.1, implicit=True)
last = dln.Record(every=30, singular_values=None)
run = dln.train_compressed(problem, weights, rank=rank, steps=30, record=last, outer=0.1)
seconds = time.perf_counter() - start
print(json.dumps({"peak_bytes": record.peak_bytes(), "data_bytes": data, "sort_seconds": ready,
    "seconds": seconds, "loss": [float(run.loss[0]), float(run.loss[-1])], "n": problem.n_observations}))
"""


def memory(options: Options) -> dict[str, Any]:
    """Measure the memory of a completion of 10^5 x 10^5 from 10^7 entries, r_hat = 10, in total."""
    dim, count = (2000, 100_000) if options.quick else (100_000, 10_000_000)
    done = record.run_program(_LARGE, dim, count)
    done.check_returncode()
    row: dict[str, Any] = json.loads(done.stdout)
    print(
        f"{dim} x {dim}, {row['n']} entries, r_hat = 10: peak {row['peak_bytes'] / 1e9:.2f} GB, Python and "
        f"the making of the data included ({row['data_bytes'] / 1e9:.2f} GB); sorted in "
        f"{row['sort_seconds']:.1f} s, 30 steps with set-up {row['seconds']:.1f} s, "
        f"loss {row['loss'][0]:.3g} to {row['loss'][1]:.3g}"
    )
    return {"case": "completion-memory", "dim": dim} | row
