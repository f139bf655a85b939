# SPDX-License-Identifier: MIT
"""Cases of `SVDTracker`: whether its bounds hold, and the cost of an update compared with other libraries."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from .._problem.problem import Problem
from .._problem.standard import classification, low_rank_recovery
from .._support.arrays import FloatArray
from .._tracking.svd_tracker import SVDTracker
from .._training.options import Record
from .._training.train import train
from .._weights.initial import aligned, gaussian, orthogonal
from ..theory import stability_threshold
from . import record
from .options import Options

if TYPE_CHECKING:
    from .._trajectory.trajectory import Trajectory

_Array = npt.NDArray[np.float64]


def _random_orthogonal(dim: int, rng: np.random.Generator) -> _Array:
    return np.linalg.qr(rng.standard_normal((dim, dim)))[0]


# --------------------------------------------------------------------------------------------------
# Whether the bounds hold
# --------------------------------------------------------------------------------------------------


def _runs(dim: int, steps: int, seed: int) -> Iterator[tuple[str, Callable[[], Trajectory]]]:
    """Yield networks whose singular values cross, coincide and vanish."""
    rng = np.random.default_rng(seed)
    square = low_rank_recovery(dim, 5, seed=seed)
    thin = classification(n_classes=5, samples_per_class=dim // 4, dim=dim, seed=seed)
    gram = rng.standard_normal((dim, 2 * dim))
    skewed = Problem(square.target, gram @ gram.T / (2 * dim), square.loss_scale)
    record = Record(singular_values=16, weights_every=1)
    common: dict[str, Any] = {"steps": steps, "engine": "dense", "record": record, "learning_rate": "auto"}

    def run(problem: Problem, weights: list[FloatArray], **changes: Any) -> Callable[[], Trajectory]:
        return lambda: train(problem, weights, **(common | changes))

    three, narrow = [dim] * 4, [dim] * 3 + [5]
    yield "orthogonal", run(square, orthogonal(three, 0.5, seed))
    yield (
        "orthogonal, by iteration alone",
        run(square, orthogonal(three, 0.5, seed), record=replace(record, tracking="dense")),
    )
    yield "orthogonal, weight decay", run(square, orthogonal(three, 0.5, seed), weight_decay=1e-3)
    yield "orthogonal, momentum", run(square, orthogonal(three, 0.5, seed), momentum=0.9)
    yield "Gaussian", run(square, gaussian(three, 0.5, seed))
    yield "Gaussian, momentum", run(square, gaussian(three, 0.5, seed), momentum=0.9)
    yield "not whitened", run(skewed, orthogonal(three, 0.5, seed))
    yield "thin, orthogonal", run(thin, orthogonal(narrow, 0.5, seed))
    yield "thin, orthogonal, momentum", run(thin, orthogonal(narrow, 0.5, seed), momentum=0.9)
    yield "thin, Gaussian", run(thin, gaussian(narrow, 0.5, seed))
    yield (
        "every tenth step",
        run(square, orthogonal(three, 0.5, seed), steps=3 * steps, record=replace(record, every=10)),
    )
    single = [w.astype(np.float32) for w in orthogonal(three, 0.5, seed)]
    yield "float32", run(square, single)
    with_zeros = orthogonal(three, 0.5, seed)
    with_zeros[1] = np.zeros_like(with_zeros[1])
    yield "a layer of zeros", run(square, with_zeros)
    sigma = float(square.target_factors().s[0])
    edge = stability_threshold(sigma, 3, square.loss_scale)
    yield (
        "past the edge of stability",
        run(square, aligned(square, three, 0.9 * sigma ** (1 / 3), seed), learning_rate=1.05 * edge),
    )


def _matrices(dim: int, steps: int, seed: int) -> Iterator[tuple[str, Callable[[int], _Array]]]:
    """Yield matrices by the number of their update: values that cross, that are equal, that vanish."""
    rng = np.random.default_rng(seed)
    U, V = _random_orthogonal(dim, rng), _random_orthogonal(dim, rng)
    turn, _ = np.linalg.qr(np.eye(dim) + 0.01 * rng.standard_normal((dim, dim)))
    state = {"U": U}

    def rotate_left_vectors(values: _Array) -> _Array:
        state["U"] = turn @ state["U"]
        return np.asarray((state["U"][:, : len(values)] * values) @ V[:, : len(values)].T)

    ramp = np.linspace(2.0, 0.1, dim)
    yield (
        "values cross",
        lambda t: rotate_left_vectors(
            np.r_[3 + np.sin(0.1 * t), 3 - np.sin(0.1 * t), 2.5 + np.cos(0.07 * t), ramp[3:]]
        ),
    )
    yield "equal values", lambda t: rotate_left_vectors(np.repeat(np.r_[3.0, 2.0, 1.0, 0.5], dim // 4))
    yield "rank 7", lambda t: rotate_left_vectors(np.linspace(2, 1, 7) * (1 + 0.1 * np.sin(0.2 * t)))
    yield "zero and back", lambda t: rotate_left_vectors(np.linspace(2, 1, 20) * (t % 7 != 3))
    yield "jumps", lambda t: (1 + t % 5) * rng.standard_normal((dim, dim)) / np.sqrt(dim)
    yield "decaying", lambda t: rotate_left_vectors(0.8 ** np.arange(dim) * (1 + 0.05 * np.sin(t)))


class _Count:
    """Records, values beyond their bounds, and how wide the bounds were."""

    def __init__(self, name: str, dim: int) -> None:
        self.name, self.dim = name, dim
        self.records = self.violations = 0
        self.errors: list[float] = []
        self.true: list[float] = []
        self.promises: dict[str, int] = {}
        self.tiers: dict[str, int] = {}

    def add(self, values: _Array, errors: _Array, exact: _Array, promise: str, tier: str) -> None:
        top = max(float(exact[0]), 1e-300)
        apart = np.abs(np.abs(values) - exact[: len(values)])
        self.records += 1
        self.violations += int(np.count_nonzero(~(apart <= errors)))
        self.errors.append(float(errors.max()) / top)
        self.true.append(float(apart.max()) / top)
        self.promises[promise] = self.promises.get(promise, 0) + 1
        self.tiers[tier] = self.tiers.get(tier, 0) + 1

    def row(self) -> dict[str, Any]:
        row = {
            "what": self.name,
            "dim": self.dim,
            "records": self.records,
            "violations": self.violations,
            "median_error": median(self.true),
            "median_bound": median(self.errors),
            "completeness": self.promises,
            "tiers": self.tiers,
        }
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.promises.items())
        tiers = ", ".join(f"{n} {tier}" for tier, n in self.tiers.items())
        print(
            f"{self.name:<32} d = {self.dim:<5} {self.records:6d} records {self.violations:3d} violations  "
            f"median error {row['median_error']:.1e}, bound {row['median_bound']:.1e}  ({kinds}; {tiers})",
            flush=True,
        )
        return row


def _compute_exactly(W: npt.NDArray[Any]) -> _Array:
    return np.asarray(np.linalg.svd(W.astype(np.float64), compute_uv=False), np.float64)


def _count_run(name: str, run: Trajectory, every: int) -> dict[str, Any]:
    count = _Count(name, run.widths[0])
    for layer in range(1, run.n_layers + 1):
        values, errors = run.singular_values(layer), run.singular_value_errors(layer)
        found = run.tracking(layer)
        for i in range(0, len(run.steps), every):
            exact = _compute_exactly(run.weights(layer, int(run.steps[i])))
            count.add(values[i], errors[i], exact, str(found["completeness"][i]), str(found["tier"][i]))
    return count.row()


def bounds(options: Options) -> dict[str, Any]:
    """Count the values of `SVDTracker` that lie beyond their bounds, against LAPACK, record by record."""
    sizes = ((140, 20, 1, 1),) if options.quick else ((256, 200, 1, 1), (512, 60, 1, 1), (1024, 20, 2, 1))
    rows = []
    for dim, steps, every, n_seeds in sizes:
        for seed in range(n_seeds):
            for name, run in _runs(dim, steps, seed):
                rows.append(_count_run(name, run(), every))
            for name, matrix in _matrices(dim, steps, seed):
                count = _Count(name, dim)
                tracker = SVDTracker(k=16)
                for t in range(steps):
                    W = matrix(t)
                    found = tracker.update(W)
                    count.add(
                        found.singular_values,
                        found.errors,
                        _compute_exactly(W),
                        found.completeness,
                        found.tier,
                    )
                rows.append(count.row())
    total = {key: sum(row[key] for row in rows) for key in ("records", "violations")}
    print(f"{total['records']} records, {total['violations']} values beyond their bounds")
    return {"case": "tracking-bounds", "rows": rows} | total


# --------------------------------------------------------------------------------------------------
# Comparison with other libraries
# --------------------------------------------------------------------------------------------------


def _make_changing_matrix(dim: int, k: int) -> tuple[_Array, Callable[[_Array, int], None]]:
    """Return a matrix with k values above noise, and a function that adds a small rank-1 update."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((dim, dim))
    W *= 0.25 / np.sqrt(dim)
    U = np.linalg.qr(rng.standard_normal((dim, k)))[0]
    V = np.linalg.qr(rng.standard_normal((dim, k)))[0]
    W += (U * np.linspace(3, 1, k)) @ V.T
    moves = np.linalg.qr(rng.standard_normal((dim, 40)))[0]

    def move(W: _Array, t: int) -> None:
        left, right = moves[:, t % 20], V[:, t % k]
        for block in range(0, dim, 512):  # no second matrix
            W[block : block + 512] += 1e-3 * left[block : block + 512, None] * right

    return W, move


def _scipy(k: int) -> dict[str, Callable[[_Array], _Array]]:
    from scipy.sparse.linalg import svds

    def values(W: _Array, tolerance: float) -> _Array:
        found = svds(W, k=k, tol=tolerance)  # pyright: ignore[reportArgumentType]
        return np.asarray(np.sort(found[1])[::-1])

    return {f"scipy svds, tol={t:g}": partial(values, tolerance=t) for t in (1e-2, 1e-4)}


def _sklearn(k: int) -> dict[str, Callable[[_Array], _Array]]:
    from sklearn.utils.extmath import randomized_svd

    def values(W: _Array, n_iter: int) -> _Array:
        found = randomized_svd(
            W,
            k,
            n_iter=n_iter,  # pyright: ignore[reportArgumentType]
            n_oversamples=8,
            random_state=0,
        )
        return np.asarray(found[1])

    return {f"sklearn randomized_svd, n_iter={n}": partial(values, n_iter=n) for n in (2, 4, 8)}


def _torch(k: int) -> dict[str, Callable[[_Array], _Array]]:
    import torch

    def values(W: _Array, n_iter: int) -> _Array:
        return np.asarray(torch.svd_lowrank(torch.from_numpy(W), q=k + 8, niter=n_iter)[1][:k])

    return {f"torch svd_lowrank, niter={n}": partial(values, n_iter=n) for n in (2, 4, 8)}


def _primme(k: int) -> dict[str, Callable[[_Array], _Array]]:
    import primme

    return {"PRIMME, tol=1e-4": lambda W: np.asarray(np.sort(primme.svds(W, k, tol=1e-4)[1])[::-1])}


def _other_libraries(k: int) -> dict[str, Callable[[_Array], _Array]]:
    """Return name -> k singular values, for the installed libraries, at several accuracies."""
    found: dict[str, Callable[[_Array], _Array]] = {}
    for make in (_scipy, _sklearn, _torch, _primme):
        try:
            found |= make(k)
        except ImportError as error:
            print(f"  skipped: {error}")
    return found


def peers(options: Options) -> dict[str, Any]:
    """Time an update of `SVDTracker` and decompositions, and compare with LAPACK; d = 4096, k = 16."""
    dim, k = (200, 4) if options.quick else (4096, 16)
    W, move = _make_changing_matrix(dim, k)
    known, alone = SVDTracker(k, mode="dense"), SVDTracker(k, mode="dense")
    others = _other_libraries(k)
    seconds: dict[str, list[float]] = {}
    values: dict[str, _Array] = {}

    def time_one(name: str, job: Callable[[], _Array]) -> None:
        start = time.perf_counter()
        values[name] = np.asarray(job())
        seconds.setdefault(name, []).append(time.perf_counter() - start)

    known.update(W)
    alone.update(W)
    bound: dict[str, float] = {}
    for t in range(options.repeats):
        move(W, t)
        time_one("dlnfast, change known", lambda: known.update(W, drift=1.01e-3).singular_values)
        time.sleep(record.PAUSE)
        time_one("dlnfast, nothing known", lambda: alone.update(W).singular_values)
        for name, job in others.items():
            time.sleep(record.PAUSE)
            time_one(name, partial(job, W))
    for name, tracker in (("dlnfast, change known", known), ("dlnfast, nothing known", alone)):
        assert tracker.record is not None
        bound[name] = float(tracker.record.errors.max())
    start = time.perf_counter()
    exact = np.linalg.svd(W)[1]
    full = time.perf_counter() - start
    rows = []
    best = median(seconds["dlnfast, change known"])
    print(f"d = {dim}, k = {k}: LAPACK gesdd {full:.2f} s, {full / best:.0f} times an update")
    for name, spent in seconds.items():
        error = float(np.abs(values[name] - exact[:k]).max() / exact[0])
        rows.append(
            {"name": name, "seconds": record.summarise_times(spent), "error": error, "bound": bound.get(name)}
        )
        print(
            f"  {name:<36} {1e3 * median(spent):9.2f} ms  largest error {error:.1e}"
            + (f", bound {bound[name] / exact[0]:.1e}" if name in bound else "")
        )
    return {"case": "tracking-peers", "dim": dim, "k": k, "gesdd_seconds": full, "rows": rows}


def share(options: Options) -> dict[str, Any]:
    """Time runs with and without tracking, for the tracker's share of a run."""
    rows = []
    quick = options.quick
    d, wide = (140, 160) if quick else (1024, 4096)
    steps = 20 if quick else 100
    square = low_rank_recovery(d, 10, seed=0)
    thin = classification(n_classes=10, samples_per_class=(wide + 9) // 10, dim=wide, seed=0)
    narrow = [wide] * 3 + [10]
    cases: list[tuple[str, Problem, Any, int, str]] = [
        ("square, orthogonal, every step", square, orthogonal([d] * 4, 0.5, 0), 1, "auto"),
        ("square, Gaussian, every step", square, gaussian([d] * 4, 0.5, 0), 1, "auto"),
        ("thin, orthogonal, every 10th", thin, orthogonal(narrow, 0.5, 0), 10, "auto"),
        (
            "thin, orthogonal, by iteration",
            thin,
            orthogonal(narrow, 0.5, 0),
            10,
            "dense",
        ),
        ("thin, Gaussian, every 10th", thin, gaussian(narrow, 0.5, 0), 10, "auto"),
    ]
    for name, problem, weights, every, tracking in cases:

        def run(
            values: int | None,
            problem: Any = problem,
            weights: Any = weights,
            every: int = every,
            tracking: str = tracking,
        ) -> Trajectory:
            return train(
                problem,
                weights,
                learning_rate="auto",
                steps=steps,
                engine="dense",
                record=Record(every=every, singular_values=values, tracking=tracking),
            )

        inside: list[float] = []
        first: list[float] = []

        def tracked(run: Any = run, inside: list[float] = inside, first: list[float] = first) -> None:
            done = run(16)
            times = [done.tracking(layer)["seconds"] for layer in range(1, done.n_layers + 1)]
            inside.append(float(sum(t.sum() for t in times)))
            first.append(float(sum(t[0] for t in times)))

        timed = record.time_interleaved(options.repeats, plain=partial(run, None), tracked=tracked)
        plain = timed["plain"]["median"]
        row = {
            "what": name,
            "dim": weights[0].shape[1],
            "steps": steps,
            "seconds": timed,
            "share_of_events": median(inside) / plain,
            "share": timed["tracked"]["median"] / plain - 1,
            "first_event_seconds": median(first),
        }
        rows.append(row)
        print(
            f"{name:<32} d = {row['dim']}, {steps} steps: {plain:.2f} s without, updates "
            f"{100 * row['share_of_events']:.1f} % of that ({1e3 * row['first_event_seconds']:.0f} ms the "
            f"first record), whole run {100 * row['share']:+.1f} %",
            flush=True,
        )
    return {"case": "tracking-share", "rows": rows}


#: A tracker over a large matrix in a process of its own, for its peak memory.
_WIDE_LAYER: Final = """
import json, sys, time
import numpy as np
import dlnfast as dln
from dlnfast.benchmarks import record
dim = int(sys.argv[1])
warm = dln.SVDTracker(16)
warm.update(np.eye(300))
del warm
before = record.peak_bytes()
W = np.empty((dim, dim))
rng = np.random.default_rng(0)
for i in range(dim):
    W[i] = rng.standard_normal(dim)
W *= 0.25 / np.sqrt(dim)
W[np.arange(16), np.arange(16)] += np.linspace(3, 2, 16)
tracker = dln.SVDTracker(16, mode="dense")
seconds = []
for _ in range(4):
    start = time.perf_counter()
    found = tracker.update(W, drift=None if not seconds else 1e-6)
    seconds.append(time.perf_counter() - start)
print(json.dumps({
    "matrix_bytes": W.nbytes, "peak_bytes": record.peak_bytes() - before, "first_seconds": seconds[0],
    "event_seconds": min(seconds[1:]), "bound": float(found.errors.max())}))
"""


def memory(options: Options) -> dict[str, Any]:
    """Measure the memory of `SVDTracker` over a matrix of 16384 x 16384, its peak without the matrix."""
    dim = 1024 if options.quick else 16384
    done = record.run_program(_WIDE_LAYER, dim)
    done.check_returncode()
    row: dict[str, Any] = json.loads(done.stdout)
    ratio = row["peak_bytes"] / row["matrix_bytes"]
    print(
        f"d = {dim}, k = 16: matrix {row['matrix_bytes'] / 1e9:.2f} GB, peak with it {ratio:.3f} times that; "
        f"first update {row['first_seconds']:.2f} s, others {row['event_seconds']:.3f} s, "
        f"bound {row['bound']:.1e}"
    )
    return {"case": "tracking-memory", "dim": dim, "ratio": ratio} | row
