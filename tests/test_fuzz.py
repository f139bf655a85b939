# SPDX-License-Identifier: MIT
"""A short run of the fuzzer of the bindings, and tests of its findings."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.core_calls import ARGUMENTS, call_batch_descent, call_descent, identity_layers
from helpers.matrices import Products, draw_orthonormal

import dlnfast as dln
from dlnfast._tracking.svd_tracker import DEFAULTS as TRACKER_DEFAULTS

PROGRAM = Path(__file__).parents[1] / "fuzz" / "bindings.py"
DRIVER = SimpleNamespace(**run_path(str(PROGRAM)))


@pytest.mark.skipif(not hasattr(DRIVER.signal, "SIGALRM"), reason="no alarms on this system")
def test_some_random_calls_have_no_finding(tmp_path):
    limit = ["--memory", "2"] if sys.platform.startswith("linux") else []
    command = [sys.executable, str(PROGRAM), "--calls", "400", "--unguided", *limit]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "no finding" in done.stdout.splitlines()[-1]


def test_every_binding_is_called(core):
    def public(owner):
        return {name for name in vars(owner) if not name.startswith("_")}

    there = {name for name in public(core) if callable(getattr(core, name))} - {"Count"}
    there |= {f"{name}.{entry}" for name in DRIVER.TRACKERS for entry in public(getattr(core, name))}
    assert there == DRIVER.every_binding()


# Findings.


def misaligned(array):
    """Return a copy that starts at an odd address."""
    space = np.zeros(array.nbytes + 1, np.uint8)
    copy = space[1:].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def test_misaligned_arrays_are_refused(core):
    a, b = np.ones((3, 4)), np.ones((4, 5))
    with pytest.raises(TypeError, match="a is not aligned"):
        core.multiply(misaligned(a), False, b, False, np.zeros((3, 5)))
    with pytest.raises(TypeError, match="out is not aligned"):
        core.multiply(a, False, b, False, misaligned(np.zeros((3, 5))))
    with pytest.raises(TypeError, match="target is not aligned"):
        call_descent(core, "dense_descent", target=misaligned(np.ones((2, 2))))


def test_misaligned_products_of_operators_are_refused(core):
    w = np.random.default_rng(0).standard_normal((30, 20))
    settings = TRACKER_DEFAULTS | {"n_values": 2}
    tracker = core.SvdTracker64(30, 20, settings)
    record = tracker.update_operator(
        lambda x: misaligned(w @ x), lambda x: misaligned(w.T @ x), np.sum(w**2), np.inf
    )
    np.testing.assert_array_equal(
        record["values"],
        core.SvdTracker64(30, 20, settings).update_operator(
            w.__matmul__, w.T.__matmul__, np.sum(w**2), np.inf
        )["values"],
    )


@pytest.mark.parametrize("n_threads", [4097, 2**31 - 1])
def test_too_many_threads_are_refused(core, n_threads):
    """OpenMP would abort the process."""
    a = np.ones((3, 3))
    with pytest.raises(ValueError, match=f"{n_threads} threads are requested; wanted at most 4096"):
        core.multiply(a, False, a, False, np.empty((3, 3)), n_threads)
    with pytest.raises(ValueError, match="wanted at most 4096"):
        core.set_num_threads(n_threads)


def test_the_smallest_integer_means_the_default_number_of_threads(core):
    a, out = np.ones((3, 3)), np.empty((3, 3))
    core.multiply(a, False, a, False, out, -(2**31))
    np.testing.assert_array_equal(out, 3.0 * a)


@pytest.mark.parametrize("entry", ARGUMENTS)
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"steps": "3"}, "steps is of type str; wanted int"),
        ({"loss_scale": None}, "loss_scale is of type NoneType; wanted float"),
        ({"learning_rate": ["a"]}, r"learning_rate is of type list; wanted Sequence\[float\]"),
        ({"n_threads": 2**40}, "n_threads is 1099511627776; wanted an integer of 32 bits"),
    ],
)
def test_values_of_another_type_are_refused(core, entry, changes, text):
    with pytest.raises(TypeError, match=text):
        call_descent(core, entry, **changes)


def test_settings_of_another_type_are_refused(core):
    with pytest.raises(TypeError, match="n_values is of type NoneType; wanted int"):
        core.SvdTracker64(3, 3, TRACKER_DEFAULTS | {"n_values": None})


@pytest.mark.parametrize("entry", ARGUMENTS)
def test_a_run_outlives_lists_that_a_callback_empties(core, entry):
    """A run holds references to its output arrays."""
    arguments, weights = ARGUMENTS[entry](), identity_layers()
    arrays = [*weights, *(a for value in arguments.values() if isinstance(value, list) for a in value)]
    references = [weakref.ref(a) for a in arrays if isinstance(a, np.ndarray)]
    assert len(references) > 3
    del arrays
    seen = []

    def forget(step, loss):
        for value in [weights, *arguments.values()]:
            if isinstance(value, list):
                value.clear()
        arguments.clear()
        seen.append([reference() is None for reference in references])

    arguments["on_record"] = forget
    assert getattr(core, entry)(weights, arguments) == ("finished", 3, 0)
    assert len(seen) == 4
    assert not np.any(seen)
    assert all(reference() is None for reference in references)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_costs_that_are_nan_or_infinite_are_refused(core, bad):
    """With such costs the iteration would never stop."""
    with pytest.raises(ValueError, match="gains of an assignment are not finite"):
        core.best_assignment(np.full((3, 3), bad))


def test_pairs_of_infinite_cost_are_not_assigned(core):
    """A gain of minus infinity marks an impossible pair."""
    gain = np.where(np.eye(3) > 0, -np.inf, 1.0)
    assert sorted(core.best_assignment(gain)) == [0, 1, 2]


def test_tall_matrices_of_few_columns_are_decomposed(core):
    """They are decomposed through their QR factors, at any scale."""
    rng = np.random.default_rng(0)
    for m, n in [(40, 3), (3, 40), (17, 15), (2, 1), (40, 16)]:
        for scale in (1.0, 1e300, 1e-300, 0.0):
            w = scale * rng.standard_normal((m, n))
            k = min(m, n)
            values, left, right = np.empty((1, k)), np.empty((m, k)), np.empty((n, k))
            core.singular_values(w, values, left, right)
            size = scale * np.sqrt(m * n) + (scale == 0.0)
            eps = 64 * np.finfo(np.float64).eps
            assert np.abs(values[0] - np.linalg.svd(w / size)[1] * size).max() <= eps * size
            assert np.abs((left * (values / size)) @ right.T - w / size).max() <= eps
            assert np.abs(left.T @ left - np.eye(k)).max() <= eps
            assert np.abs(right.T @ right - np.eye(k)).max() <= eps


# Indices and counts are checked once, so outputs must not overlap them in memory.


def test_outputs_that_overlap_the_indices_are_refused(core):
    row, col, value = np.array([16, 10, 11, 15]), np.array([1, 2, 2, 0]), np.ones(4)
    start, values = np.zeros(18, np.int64), np.zeros(4)
    with pytest.raises(ValueError, match="row and index share memory"):
        core.sort_entries(row, col, value, 17, 3, start, row.view(np.int32)[:4], values)
    with pytest.raises(ValueError, match="share memory"):
        core.sort_entries(row, col, value, 17, 3, start, start.view(np.int32)[4:8], values)
    np.testing.assert_array_equal(row, [16, 10, 11, 15])


@pytest.mark.parametrize("entry", ARGUMENTS)
def test_runs_with_overlapping_outputs_are_refused(core, entry):
    shared = np.zeros(9)
    with pytest.raises(ValueError, match=r"counts and loss|loss and counts"):
        call_descent(core, entry, loss=shared[:4], counts=shared.view(np.int64)[3:8])
    with pytest.raises(ValueError, match="share memory"):
        call_descent(core, entry, weights=[shared[:4].reshape(2, 2), shared[2:6].reshape(2, 2)])


def test_batches_with_overlapping_outputs_are_refused(core):
    shared = np.zeros(15)
    with pytest.raises(ValueError, match="share memory"):
        call_batch_descent(core, loss=shared.reshape(3, 5), counts=shared.view(np.int64)[:6].reshape(3, 2))


def test_products_into_a_factor_are_refused(core):
    a = np.eye(3)
    with pytest.raises(ValueError, match="share memory; wanted arrays apart from those written"):
        core.multiply(a, False, np.eye(3), False, a)
    core.multiply(a, False, a, False, np.empty((3, 3)))


@pytest.mark.parametrize("entry", ARGUMENTS)
def test_a_huge_flush_interval_still_needs_room_for_the_losses(core, entry):
    """The interval plus one overflowed 64 bits, and any array seemed large enough for the losses."""
    changes = {"flush_every": 2**63 - 1, "record_every": 100}
    if entry == "dense_descent":
        changes |= {"snapshot_every": 0, "snapshots": []}
    with pytest.raises(ValueError, match="loss has the wrong shape"):
        call_descent(core, entry, loss=np.zeros(0), **changes)
    call_descent(core, entry, on_flush=None, **changes)


@pytest.mark.parametrize("shape", [(7, 65), (65, 7), (40, 60)])
def test_trackers_work_without_guards(core, shape):
    """All tracked values may be above the value shared by a closed Krylov space."""
    rng = np.random.default_rng(0)
    w = np.eye(*shape) if shape[0] == 40 else rng.standard_normal(shape)
    w[:2, :2] += 5.0 * np.eye(2)
    settings = TRACKER_DEFAULTS | {"n_values": 2, "n_guards": 0, "mode": "dense"}
    tracker = core.SvdTracker64(*shape, settings)
    for _ in range(3):
        record = tracker.update_operator(w.__matmul__, w.T.__matmul__, np.sum(w**2), np.inf)
        assert np.all(np.abs(record["values"] - np.linalg.svd(w)[1][:2]) <= record["errors"])


def test_vectors_stay_when_the_factored_form_restarts(core):
    """The vectors of the last update use the frames of that time."""
    rng = np.random.default_rng(0)
    w = draw_orthonormal(rng, 40, 40)
    a, b = rng.standard_normal((2, 40)), rng.standard_normal((2, 40))
    moved = w + a.T @ b
    for bad in (np.full((40, 40), np.nan), np.ones((40, 41)), w[::2], None):
        tracker = core.SvdTracker64(40, 40, TRACKER_DEFAULTS | {"n_values": 2, "mode": "dense"})
        tracker.update(w, np.inf)
        tracker.begin_factored(w, 8)
        record = tracker.append(1.0, 1.0, a, b)
        with pytest.raises((TypeError, ValueError)):
            tracker.begin_factored(w if bad is None else bad, -1)
        tracker.begin_factored(w.copy(), 8)
        left, right = tracker.vectors(True), tracker.vectors(False)
        np.testing.assert_allclose(left.T @ moved @ right, np.diag(record["values"]), atol=1e-9)


def test_a_refused_update_keeps_the_previous_vectors(core):
    """The update is refused, and the vectors are those of the previous update."""
    rng = np.random.default_rng(0)
    n = 280
    w = draw_orthonormal(rng, n, n)
    tracker = core.SvdTracker64(n, n, TRACKER_DEFAULTS | {"n_values": 2, "mode": "dense"})
    tracker.update(w, np.inf)
    tracker.begin_factored(w, n)
    with pytest.raises(ValueError, match=r"frames of .* vectors; wanted at most"):  # noqa: PT012
        for _ in range(100):
            a, b = rng.standard_normal((4, n)), rng.standard_normal((4, n))
            record = tracker.append(1.0, 0.1, a, b)
            assert record is not None
            w = w + 0.1 * a.T @ b
    left, right = tracker.vectors(True), tracker.vectors(False)
    np.testing.assert_allclose(left.T @ w @ right, np.diag(record["values"]), atol=1e-6)


def test_more_guards_take_effect_at_the_next_update():
    """More guard vectors apply to the next update: the current vectors were rotated without them."""
    rng = np.random.default_rng(4)
    widths = [4, 160, 150, 3]
    problem = dln.Problem(target=rng.standard_normal((3, 4)), loss_scale=0.3)
    weights = dln.orthogonal(widths, 0.5, seed=4)
    run = dln.train(
        problem,
        weights,
        learning_rate=0.3,
        steps=40,
        engine="dense",
        record=dln.Record(singular_values=0, weights_every=1),
    )
    for layer, start in enumerate(weights):
        tracker, before, drift = dln.SVDTracker(k=3, n_threads=1), start, 0.0
        for step in range(41):
            matrix = run.states.snapshots[layer][step]
            drift += 2.0 * float(np.linalg.norm(matrix - before))
            before = matrix
            if step % 10:
                continue
            record = tracker.update(
                Products(matrix), drift=None if step == 0 else drift, squared_norm=float(np.sum(matrix**2))
            )
            drift = 0.0
            off = np.abs(record.singular_values - np.linalg.svd(matrix)[1][:3])
            assert np.all(off <= record.errors)
            assert not record.vector_error < 0.0


def test_refused_updates_change_nothing(core):
    rng = np.random.default_rng(0)
    w = draw_orthonormal(rng, 40, 40)
    a, b = rng.standard_normal((2, 2, 40)) / 7
    tracker = core.SvdTracker64(40, 40, TRACKER_DEFAULTS | {"n_values": 2, "mode": "dense"})
    tracker.update(w, np.inf)
    tracker.begin_factored(w, 8)
    with pytest.raises(ValueError, match="block of an update"):
        tracker.append(0.5, 1.0, a, b[:1])
    record = tracker.append(1.0, 1.0, a, b)
    off = np.abs(record["values"] - np.linalg.svd(w + a.T @ b)[1][:2])
    assert np.all(off <= record["errors"])
