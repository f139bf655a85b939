# SPDX-License-Identifier: MIT
"""A failed allocation raises MemoryError, and the process continues."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.matrices import draw_orthonormal

import dlnfast as dln
from dlnfast._support.dispatch import core
from dlnfast._tracking.svd_tracker import DEFAULTS as TRACKER_DEFAULTS

WIDE = 10**7  # a layer of so many rows and columns would take 800 terabytes


def everything_works():
    problem = dln.low_rank_recovery(dim=6, rank=2, seed=0)
    run = dln.train(problem, dln.orthogonal([6, 6, 6]), learning_rate=0.5, steps=5)
    assert np.all(np.isfinite(run.loss))
    assert len(run.loss) == 6
    W = np.arange(12.0).reshape(3, 4)
    np.testing.assert_allclose(
        dln.SVDTracker(k=3).update(W).singular_values, np.linalg.svd(W)[1], atol=1e-12 * np.linalg.norm(W)
    )


class WideOperator:
    """The zero matrix."""

    shape = (10**12, 10**12)
    dtype = np.dtype(np.float64)

    def matmat(self, x):
        return np.zeros((self.shape[0], x.shape[1]))

    rmatmat = matmat


def small_run(**settings):
    problem = dln.low_rank_recovery(dim=6, rank=2, seed=0)
    return dln.train(problem, dln.orthogonal([6, 6, 6]), learning_rate=0.5, **settings)


def small_batch(**settings):
    problem = dln.low_rank_recovery(dim=6, rank=2, seed=0)
    return dln.train_batch(problem, [dln.orthogonal([6, 6, 6])], learning_rate=0.5, **settings)


TOO_LARGE = {
    "orthogonal": lambda: dln.orthogonal([WIDE] * 3),
    "gaussian": lambda: dln.gaussian([WIDE] * 3),
    "uniform": lambda: dln.uniform([WIDE] * 3),
    "train, dense": lambda: small_run(steps=10**14, engine="dense"),
    "train, reduced": lambda: small_run(steps=10**14, engine="reduced"),
    "train_batch": lambda: small_batch(steps=10**14),
    "SVDTracker": lambda: dln.SVDTracker(k=16).update(WideOperator()),
    "tracker of the core": lambda: core.SvdTracker64(
        10**12, 10**12, TRACKER_DEFAULTS | {"n_values": 16}
    ).update_operator(WideOperator().matmat, WideOperator().rmatmat, 0.0, np.inf),
    "best_assignment": lambda: core.best_assignment(np.empty((2**55, 0))),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_sizes_beyond_memory_raise_memory_errors(name):
    with pytest.raises(MemoryError):
        TOO_LARGE[name]()
    everything_works()


# With a small address space, allocations of medium size fail anywhere in a call.

LITTLE_MEMORY = """
import resource, sys
import numpy as np
import dlnfast as dln
from dlnfast._support.dispatch import core

rng = np.random.default_rng(0)
n = 400
dense = dln.low_rank_recovery(dim=n, rank=2, seed=0)
completion = dln.low_rank_completion(dim=n, rank=2, observed=0.2, seed=0)
weights = [rng.standard_normal((n, n)) / 30 for _ in range(3)]
big = rng.standard_normal((3000, 300))
seen = rng.random((1000, 1000)) < 0.5
values = rng.standard_normal(np.count_nonzero(seen))
settings = dict(learning_rate=1e-3, steps=1, n_threads=1)
two = dln.Record(singular_values=2)

CALLS = {
    "dense": lambda: dln.train(dense, weights, engine="dense", record=two, **settings).loss,
    "completion": lambda: dln.train(completion, weights, record=two, **settings).loss,
    "gradients": lambda: dln.gradients(dense, weights, n_threads=1)[0],
    "orthogonal": lambda: dln.orthogonal([n] * 4)[0],
    "tracker": lambda: dln.SVDTracker(k=32, n_threads=1).update(big).singular_values,
    "full tracker": lambda: dln.SVDTracker(k=4, mode="full", n_threads=1).update(big).singular_values,
    "entries": lambda: np.array([dln.Completion(*np.nonzero(seen), values, seen.shape).density]),
}

def address_space():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

call = CALLS[sys.argv[1]]
wanted = call()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
failed = 0
for megabytes in (1, 2, 4, 8, 16, 512):
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + megabytes * 2**20, hard))
    try:
        got = call()
    except MemoryError:
        got = None
        failed += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    np.testing.assert_array_equal(call(), wanted)
    if got is not None:
        np.testing.assert_array_equal(got, wanted)
assert got is not None, "the call fails with half a gigabyte"
print(failed)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of address space are Linux's")
@pytest.mark.parametrize(
    "call", ["dense", "completion", "gradients", "orthogonal", "tracker", "full tracker", "entries"]
)
def test_little_memory(call, run_python):
    """At some limits the call raises MemoryError; after each the call gives the same result as before."""
    variables = {
        # Freed memory is returned at once: the next call has to allocate it again.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        # OpenBLAS aborts the process if it has no memory for the work of several threads.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    assert int(run_python(LITTLE_MEMORY, call, **variables)) > 0


# In a build for fuzzing, every allocation of the core in turn.

DRIVER = SimpleNamespace(**run_path(str(Path(__file__).parents[1] / "fuzz" / "bindings.py")))


def make_valid_call(core, name, seed):
    """Make a valid call, the same for equal seeds."""
    draw = DRIVER.Draw(np.random.default_rng(seed).bytes(64))
    arguments = DRIVER.FUNCTIONS[name][0](draw)
    DRIVER.bind_callbacks(arguments, getattr(core, name), DRIVER.Memory())
    return getattr(core, name)(**arguments)


@pytest.fixture
def fail():
    """Return a function that makes the allocation after n more fail, and returns the remaining count."""
    library = ctypes.CDLL(core.__file__)
    if not hasattr(library, "dlnfast_fail_allocation"):
        pytest.skip("not a build for fuzzing (DLNFAST_FUZZ)")
    fail = library.dlnfast_fail_allocation
    fail.argtypes, fail.restype = (ctypes.c_long, ctypes.c_size_t), ctypes.c_long
    return fail


@pytest.mark.parametrize("name", sorted(DRIVER.FUNCTIONS.keys() - {"forbid_threads"}))
def test_each_failed_allocation_raises_a_memory_error(name, fail):
    least = DRIVER.LEAST_WITH_SVD if name in DRIVER.WITH_SVD else 0
    n_failed = 0
    for seed in range(5):
        wanted = make_valid_call(core, name, seed)
        for n in range(10_000):
            fail(n, least)
            try:
                make_valid_call(core, name, seed)
            except MemoryError:
                n_failed += 1
            if fail(-1, 0) >= 0:  # fewer allocations than that
                break
        np.testing.assert_equal(make_valid_call(core, name, seed), wanted)
    core.set_num_threads(0)
    assert n_failed > 0 or name in ("build_info", "max_threads", "set_num_threads", "follow_branches")


def make_updates(tracker, w, moves):
    """Yield functions that make one update each, with its matrix."""
    total = w.copy()
    for a, b in moves[:3]:
        total = total + a.T @ b
        for drift in (np.inf, float(np.linalg.norm(a.T @ b))):
            yield (
                total,
                lambda m=total, d=drift: tracker.update_operator(
                    m.__matmul__, m.T.__matmul__, float(np.sum(m**2)), d
                ),
            )
    yield w, lambda: tracker.update(w, np.inf)
    yield (
        w,
        lambda: (tracker.begin_factored(w, 40), tracker.append(1.0, 1.0, *(0.0 * x for x in moves[0])))[1],
    )
    total = w.copy()
    for a, b in moves:
        total = total + a.T @ b
        yield total, lambda a=a, b=b: tracker.append(1.0, 1.0, a, b)
        yield total, lambda: (tracker.vectors(True), tracker.vectors(False), None)[2]
    yield w, lambda: tracker.update(w, np.inf)


@pytest.mark.parametrize("mode", ["dense", "full"])
def test_trackers_continue_after_each_failed_allocation(mode, fail):
    """The update is repeated; the factored form, which may have lost an update, reports that instead."""
    rng = np.random.default_rng(0)
    w = draw_orthonormal(rng, 90, 80)
    moves = [(rng.standard_normal((2, 90)) / 9, rng.standard_normal((2, 80)) / 9) for _ in range(4)]
    settings = TRACKER_DEFAULTS | {"n_values": 6, "n_guards": 2, "mode": mode}
    n_failed = before = 0
    for n in range(400):
        tracker = core.SvdTracker64(90, 80, settings, 2)
        for matrix, update in make_updates(tracker, w, moves):
            if mode == "full" and matrix is not w:
                continue
            fail(n, DRIVER.LEAST_WITH_SVD)
            try:
                record = update()
            except MemoryError:
                n_failed += 1
                fail(-1, 0)
                record = update()
            fail(-1, 0)
            if record is not None:
                exact = np.linalg.svd(matrix)[1][:6]
                assert np.all(np.abs(record["values"] - exact) <= record["errors"] + 1e-12)
        if n > 40 and n_failed == before:
            break
        before = n_failed
    assert n_failed > 10
