# SPDX-License-Identifier: MIT
"""SVDTracker: error bounds, branches, and all kinds of updates."""

from __future__ import annotations

import signal
import threading

import numpy as np
import pytest
from helpers.matrices import Products, draw_matrix, draw_orthonormal
from helpers.records import with_record
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast._tracking.svd_tracker import DEFAULTS


def exact(W):
    return np.linalg.svd(np.asarray(W, dtype=np.float64), compute_uv=False)


def assert_within_bounds(record, W):
    sigma = exact(W)
    k = len(record.singular_values)
    apart = np.abs(np.abs(record.singular_values) - sigma[:k])
    assert np.all(apart <= record.errors), (apart, record.errors)
    if len(sigma) > k:
        assert sigma[k] <= record.tail + tolerance(W.dtype, max(W.shape)) * sigma[0]


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    k=st.integers(1, 45),
    rank=st.integers(0, 40),
    mode=st.sampled_from(["auto", "dense", "full"]),
    single=st.booleans(),
    level=st.sampled_from([1e-30, 1.0, 1e30]),
    seed=st.integers(0, 2**31),
)
def test_small_matrices_of_any_shape_and_rank_are_within_the_bounds(m, n, k, rank, mode, single, level, seed):
    rng = np.random.default_rng(seed)
    dtype = np.float32 if single else np.float64
    if single and level != 1.0:
        level = 1.0
    tracker = dln.SVDTracker(k, mode=mode, n_threads=1)
    for _ in range(3):
        factors = rng.standard_normal((m, rank)), rng.standard_normal((rank, n))
        W = (level * factors[0] @ factors[1]).astype(dtype)
        record = tracker.update(W)
        assert record.singular_values.shape == (min(k, m, n),)
        assert_within_bounds(record, W)


@pytest.mark.parametrize("mode", ["auto", "dense", "full"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("next_value", [0.0, 1e-14, 1e-9, 1e-4, 0.3])
def test_the_tail_bounds_the_next_value_of_a_matrix_of_nearly_rank_k(mode, dtype, next_value):
    # A scaled Hadamard matrix times a diagonal one: the columns are exact, and so are the singular values.
    hadamard = np.ones((1, 1))
    while len(hadamard) < 256:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    for dim, k in [(4, 3), (64, 3), (64, 63), (256, 3)]:
        sigma = np.zeros(dim)
        sigma[:k], sigma[k] = np.linspace(1.0, 0.5, k).astype(dtype), dtype(next_value)
        W = hadamard[:dim, :dim] / np.sqrt(dim) * sigma
        assert np.array_equal(W.astype(dtype), W)
        tracker = dln.SVDTracker(k, mode=mode, n_threads=1)
        for _ in range(2):
            record = tracker.update(W.astype(dtype))
            assert record.tail >= sigma[k]
            assert np.all(np.abs(record.singular_values - sigma[:k]) <= record.errors)


@pytest.mark.parametrize("n_threads", [1, 2, 7])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_every_level_and_number_of_threads_gives_the_same(core, n_threads, dtype):
    rng = np.random.default_rng(1)
    made = core.SvdTracker32 if dtype == np.float32 else core.SvdTracker64
    tracker = made(150, 180, DEFAULTS | {"n_values": 5}, n_threads)
    W = (rng.standard_normal((150, 180)) / 20).astype(dtype)
    W += draw_matrix(0, 180, 180, [3, 2, 1]).astype(dtype)[:150]
    for _ in range(4):
        W += (1e-2 * np.outer(rng.standard_normal(150), rng.standard_normal(180)) / 180).astype(dtype)
        raw = tracker.update(W, np.inf)
        assert np.all(np.abs(raw["values"] - exact(W)[:5]) <= raw["errors"])
    for left in (True, False):
        vectors = tracker.vectors(left)
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(5), atol=tolerance(dtype, 180))
    # W^T u = s v
    np.testing.assert_allclose(
        W.T @ tracker.vectors(True), tracker.vectors(False) * raw["values"], atol=5 * tolerance(dtype, 180)
    )


@pytest.mark.parametrize("k", [1, 4, 16])
def test_a_decaying_spectrum_is_certified(k):
    W = draw_matrix(0, 200, 200, 0.5 ** np.arange(60))
    record = dln.SVDTracker(k, mode="dense").update(W)
    assert record.tier == "dense"
    assert record.completeness != "none"
    assert_within_bounds(record, W)
    assert record.errors.max() < 0.05


@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [(np.float64, (-300, -160, -90, 0, 80, 150)), (np.float32, (-36, -30, -15, 0, 12, 18, 36))],
)
def test_bounds_hold_at_any_scale(dtype, exponents):
    """Squares of squares neither overflow nor vanish, also where one tracker sees all scales."""
    W = draw_matrix(0, 200, 200, 0.8 ** np.arange(60))
    through = dln.SVDTracker(5)
    for exponent in exponents:
        level = 10.0**exponent
        alone = dln.SVDTracker(5)
        for update in range(2):
            scaled = (level * (1 + 0.1 * update) * W).astype(dtype)
            sigma = exact(scaled.astype(np.float64) / level)[:5]
            for tracker in (alone, through):
                record = tracker.update(scaled, drift=None if update == 0 else 0.11 * level)
                assert record.completeness != "none"
                assert np.all(np.abs(record.singular_values / level - sigma) <= record.errors / level)


def test_values_hidden_by_noise_are_certified_from_the_matrix_but_not_from_products():
    """The largest values of a bulk cannot be certified below the resolution of random vectors."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((300, 300)) / 17
    from_products = dln.SVDTracker(16, tolerance=1e-6, mode="dense").update(Products(W))
    assert from_products.completeness == "none"
    assert_within_bounds(from_products, W)
    record = dln.SVDTracker(16, tolerance=1e-6, mode="dense").update(W)
    assert record.completeness == "rigorous"
    assert record.errors.max() <= 1e-6 * record.singular_values[0]
    assert_within_bounds(record, W)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", [(400, 400), (350, 700), (700, 350)])
@pytest.mark.parametrize("level", [1e-12, 1.0, 1e10])
def test_small_tolerances_are_reached_for_a_bulk_of_values(dtype, shape, level):
    rng = np.random.default_rng(0)
    W = level * rng.standard_normal(shape) / np.sqrt(max(shape))
    step = level * rng.standard_normal(shape) / np.sqrt(max(shape))
    tracker = dln.SVDTracker(8, tolerance=1e-3)
    for update in range(4):
        moved = (W + 0.02 * update * step).astype(dtype)
        if update == 3:  # a value that was not followed
            moved += (
                3 * level * np.outer(rng.standard_normal(shape[0]), rng.standard_normal(shape[1]))
            ).astype(dtype) / np.sqrt(np.prod(shape), dtype=dtype)
        record = tracker.update(moved)
        assert record.tier == "dense"
        assert record.completeness == "rigorous"
        assert record.errors.max() <= 1e-3 * record.singular_values[0]
        assert_within_bounds(record, moved)


@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("kind", ["zero", "rank 2", "rotation", "decay"])
def test_small_tolerances_are_reached_for_special_spectra(k, kind):
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((400, 400)))[0]
    P = np.linalg.qr(rng.standard_normal((400, 400)))[0]
    sigma = {
        "zero": np.zeros(400),
        "rank 2": np.r_[1.0, 0.5, np.zeros(398)],
        "rotation": np.ones(400),
        "decay": 0.9 ** np.arange(400),
    }[kind]
    W = (Q * sigma) @ P
    tracker = dln.SVDTracker(k, tolerance=1e-3)
    for scale in (1.0, 1.01, 0.5):
        record = tracker.update(scale * W)
        assert record.completeness == "rigorous"
        assert record.errors.max() <= 1e-3 * record.singular_values[0] + 1e-300
        assert_within_bounds(record, scale * W)


class TestMeasuredDrift:
    """Trackers of large matrices measure how far W has moved if nobody tells them."""

    @staticmethod
    def matrix(dtype=np.float64):
        rng = np.random.default_rng(0)
        return (draw_matrix(0, 1100, 1000, [4, 3, 2]) + 0.1 * rng.standard_normal((1100, 1000)) / 33).astype(
            dtype
        )

    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    def test_small_changes_need_no_certificates(self, dtype):
        rng = np.random.default_rng(1)
        W = self.matrix(dtype)
        tracker = dln.SVDTracker(3)
        tracker.update(W)
        tracker.update(W)
        assert not tracker.update(W).refreshed
        drift = 0.0
        for _ in range(5):
            step = (1e-3 * np.outer(rng.standard_normal(1100), rng.standard_normal(1000)) / 1000).astype(
                dtype
            )
            W = W + step
            record = tracker.update(W)
            drift += np.linalg.norm(step.astype(np.float64))
            assert record.completeness == "probabilistic"
            assert not record.refreshed
            assert_within_bounds(record, W)
        assert record.drift >= drift * (1 - 1e-4)

    def test_large_changes_are_certified(self):
        rng = np.random.default_rng(1)
        W = self.matrix()
        tracker = dln.SVDTracker(3)
        for _ in range(6):
            record = tracker.update(W)
            assert record.refreshed
            assert_within_bounds(record, W)
            W = W + 2 * np.outer(rng.standard_normal(1100), rng.standard_normal(1000)) / 1000

    def test_the_change_of_a_refused_matrix_counts(self):
        W = self.matrix()
        tracker = dln.SVDTracker(3)
        tracker.update(W)
        tracker.update(W)
        moved = W + 3.5 * np.outer(np.ones(1100), np.ones(1000)) / np.sqrt(1100 * 1000)
        for bad in (moved + np.nan, moved * 1e308):
            with pytest.raises(ValueError, match="finite"):
                tracker.update(bad)
        for _ in range(3):
            assert_within_bounds(tracker.update(moved), moved)


def test_a_known_drift_makes_certificates_unnecessary():
    W = draw_matrix(0, 200, 200, [4, 3, 2]) + np.eye(200)
    rng = np.random.default_rng(0)
    known, unknown = dln.SVDTracker(3, mode="dense"), dln.SVDTracker(3, mode="dense")
    for tracker in (known, unknown):
        tracker.update(W)
    for _ in range(10):
        step = 1e-4 * np.outer(rng.standard_normal(200), rng.standard_normal(200)) / 200
        W = W + step
        for tracker, drift in ((known, np.linalg.norm(step)), (unknown, None)):
            record = tracker.update(W, drift=drift)
            assert_within_bounds(record, W)
            assert record.completeness == "probabilistic"
    assert known.n_refreshes < unknown.n_refreshes
    assert known.record.n_columns < unknown.record.n_columns


def test_branches_keep_their_numbers_through_a_crossing():
    rng = np.random.default_rng(3)
    dim = 160
    U, V = (draw_orthonormal(rng, dim, 4) for _ in range(2))
    tracker = dln.SVDTracker(3)
    seen = []
    previous = None
    for t in np.linspace(-1, 1, 41):
        record = tracker.update((U * [5, 3 + t, 3 - t, 0.1]) @ V.T)
        seen.append([record.branch(b) for b in range(3)])
        vectors = tracker.left_vectors
        if previous is not None:
            overlaps = vectors.T @ previous
            assert np.all(overlaps[np.abs(overlaps) > 0.5] > 0)  # no sign turns
        previous = vectors
    seen = np.array(seen)
    np.testing.assert_allclose(seen[:, 0], 5, atol=1e-12)
    # Sorted by size the curves touch; by branch they cross.
    t = np.linspace(-1, 1, 41)
    np.testing.assert_allclose(np.sort(seen[:, 1:], axis=0)[:, 0], np.sort(seen[:, 1]), atol=1e-12)
    slopes = np.diff(seen[:, 1:], axis=0)
    assert np.all(np.abs(slopes - slopes[0]) < 1e-10)
    np.testing.assert_allclose(np.abs(slopes[0]), 0.05, atol=1e-10)
    assert len(t) == len(seen)


def test_with_signs_a_value_that_passes_zero_becomes_negative():
    rng = np.random.default_rng(3)
    U, V = (draw_orthonormal(rng, 40, 40) for _ in range(2))
    signed, unsigned = dln.SVDTracker(3, signed=True), dln.SVDTracker(3)
    for t in np.linspace(0.55, -0.45, 11):
        W = (U[:, :3] * [3, 2, t]) @ V[:, :3].T
        assert signed.update(W).branch(2) == pytest.approx(t, abs=1e-12)
        assert unsigned.update(W).branch(2) == pytest.approx(abs(t), abs=1e-12)
    for tracker in (signed, unsigned):
        u, v = tracker.left_vectors, tracker.right_vectors
        np.testing.assert_allclose(W @ v, u * tracker.record.singular_values, atol=1e-12)


def test_equal_values_are_one_cluster():
    W = draw_matrix(0, 150, 150, [3, 3, 3, 1, 1])
    tracker = dln.SVDTracker(5)
    record = tracker.update(W)
    assert record.clusters.tolist() == [0, 0, 0, 1, 1]
    before = tracker.right_vectors
    record = tracker.update(W)
    # One rotation of u and v together keeps the vectors of a cluster where they were.
    np.testing.assert_allclose(tracker.right_vectors, before, atol=1e-10)
    np.testing.assert_allclose(record.right_angles, 0, atol=1e-7)


def test_angles_refer_to_the_first_separated_record_or_to_reference_vectors():
    rng = np.random.default_rng(0)
    dim = 150
    Q = draw_orthonormal(rng, dim, dim)
    tracker = dln.SVDTracker(2)
    record = tracker.update(Q)
    assert np.isnan(record.right_angles).all()
    U, V = (draw_orthonormal(rng, dim, 2) for _ in range(2))
    low = (U * [3, 2]) @ V.T
    assert np.allclose(tracker.update(0.01 * Q + low).right_angles, 0, atol=1e-12)
    turned = V @ np.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
    record = tracker.update((U * [3, 2]) @ turned.T + 0.01 * Q)
    assert record.right_angles == pytest.approx([0.3, 0.3], abs=0.02)
    assert record.right_block.largest < 0.02  # the plane has not moved
    tracker.set_reference(U, V)
    record = tracker.update(low)
    np.testing.assert_allclose(record.left_angles, 0, atol=1e-7)
    tracker.set_reference()
    np.testing.assert_allclose(tracker.update(low).left_angles, 0, atol=1e-12)


class TestInput:
    def test_arrays_are_not_copied(self):
        W = np.asarray(draw_matrix(0, 140, 140, [2, 1]), order="C")
        tracker = dln.SVDTracker(2)
        tracker.update(W)
        assert tracker._last is W

    def test_torch_tensors_are_read(self):
        torch = pytest.importorskip("torch")
        W = draw_matrix(0, 140, 140, [2, 1])
        tensor = torch.from_numpy(W)
        tracker = dln.SVDTracker(2)
        assert_within_bounds(tracker.update(tensor), W)
        assert np.shares_memory(tracker._last, W)
        assert_within_bounds(tracker.update(tensor.clone().requires_grad_()), W)
        assert_within_bounds(tracker.update(2 * tensor.clone().requires_grad_()), 2 * W)

    @pytest.mark.parametrize("known", [False, True])
    def test_operators(self, known):
        W = draw_matrix(0, 160, 160, 0.7 ** np.arange(40))[:, :130]

        tracker = dln.SVDTracker(4)
        for _ in range(3):
            record = tracker.update(
                Products(W), squared_norm=float(np.linalg.norm(W) ** 2) if known else None
            )
            assert_within_bounds(record, W)
            assert record.completeness in (("probabilistic", "rigorous") if known else ("probabilistic",))

    @pytest.mark.parametrize("bad", ["matmat", "rmatmat"])
    def test_a_failed_update_is_discarded(self, bad):
        W = draw_matrix(0, 150, 150, [3, 2, 1])
        tracker = dln.SVDTracker(2)
        tracker.update(W)

        class Operator:
            shape = (150, 150)
            dtype = np.float64

            def matmat(self, X):
                return W @ X if bad != "matmat" else np.full((150, X.shape[1]), np.nan)

            def rmatmat(self, Y):
                return W.T @ Y if bad != "rmatmat" else np.full((150, Y.shape[1]), np.nan)

        with pytest.raises(ValueError, match="not finite"):
            tracker.update(Operator())
        record = tracker.update(W)
        assert_within_bounds(record, W)
        assert record.completeness != "none"

    def test_invalid_operators_raise_typed_errors(self):
        class Operator:
            shape = (150, 140)
            dtype = np.float64

            def matmat(self, X):
                return np.zeros((3, 3))

            def rmatmat(self, Y):
                raise RuntimeError("no transpose")

        with pytest.raises(dln.ShapeError, match="matmat"):
            dln.SVDTracker(2).update(Operator())
        Operator.matmat = lambda self, X: np.zeros((150, X.shape[1]))
        with pytest.raises(RuntimeError, match="no transpose"):
            dln.SVDTracker(2).update(Operator())
        Operator.rmatmat = lambda self, Y: np.full((140, Y.shape[1]), np.nan)
        Operator.matmat = lambda self, X: np.full((150, X.shape[1]), np.nan)
        with pytest.raises(ValueError, match="not finite"):
            dln.SVDTracker(2).update(Operator())
        Operator.dtype = np.float16
        with pytest.raises(TypeError, match="float16"):
            dln.SVDTracker(2).update(Operator())

    @pytest.mark.parametrize(
        ("arguments", "kind", "text"),
        [
            ({"k": 0}, ValueError, "k is 0"),
            ({"k": 2.5}, TypeError, "k is 2.5"),
            ({"mode": "svd"}, ValueError, "mode is 'svd'"),
            ({"tolerance": -1}, ValueError, "tolerance is -1"),
            ({"failure": 1.0}, ValueError, "failure is 1"),
            ({"failure": 0.0}, ValueError, "failure"),
            ({"max_sweeps": 0}, ValueError, "max_sweeps is 0"),
            ({"guards": -1}, ValueError, "guards is -1"),
        ],
    )
    def test_errors_name_bad_settings(self, arguments, kind, text):
        with pytest.raises(kind, match=text):
            dln.SVDTracker(**arguments)

    def test_errors_name_requests_before_the_first_update(self):
        tracker = dln.SVDTracker(2)
        with pytest.raises(ValueError, match="earlier update"):
            tracker.update_low_rank(np.ones(3), np.ones(3))
        with pytest.raises(ValueError, match="before the first update"):
            _ = tracker.left_vectors

    def test_bad_updates_raise_an_error_that_names_them_and_change_nothing(self):
        tracker = dln.SVDTracker(2)
        with pytest.raises(ValueError, match="finite"):
            tracker.update(np.full((200, 200), np.nan))
        W = draw_matrix(0, 140, 140, [2, 1])
        tracker = dln.SVDTracker(2)
        tracker.update(W)
        with pytest.raises(dln.ShapeError, match=r"shape \(3, 4\); wanted \(140, 140\)"):
            tracker.update(np.ones((3, 4)))
        with pytest.raises(TypeError, match="float32"):
            tracker.update(W.astype(np.float32))
        with pytest.raises(ValueError, match="drift is -1"):
            tracker.update(W, drift=-1)
        with pytest.raises(dln.ShapeError, match="A has 2 columns and B has 1"):
            tracker.update_low_rank(np.ones((140, 2)), np.ones(140))
        with pytest.raises(dln.ShapeError, match="A has shape"):
            tracker.update_low_rank(np.ones((7, 2)), np.ones((140, 2)))
        W[0, 0] = np.inf
        with pytest.raises(ValueError, match="finite"):
            tracker.update(W)
        W[0, 0] = 0.0
        assert_within_bounds(tracker.update(W), W)  # the tracker still works

    def test_only_one_update_runs_at_a_time(self):
        W = np.random.default_rng(0).standard_normal((1200, 1200))
        tracker = dln.SVDTracker(16)
        errors = []

        def work():
            try:
                for _ in range(3):
                    tracker.update(W)
            except RuntimeError as error:
                errors.append(str(error))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all("already at work" in error for error in errors)
        assert_within_bounds(tracker.update(W), W)

    def test_control_c_interrupts_a_long_update(self, run_python):
        program = """
import os, signal, threading, time
import numpy as np
import dlnfast as dln
W = np.random.default_rng(0).standard_normal((3500, 3500))
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    start = time.perf_counter()
    tracker = dln.SVDTracker(16, mode="full")
    tracker.update(W)
    print("finished")
except KeyboardInterrupt:
    print("interrupted", time.perf_counter() - start < 15)
"""
        assert "interrupted True" in run_python(program)
        assert signal.getsignal(signal.SIGINT) is not None


class TestLowRankUpdates:
    @pytest.mark.parametrize("shape", [(150, 150), (190, 140), (140, 190)])
    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    def test_low_rank_updates_of_an_isometry(self, shape, dtype):
        rng = np.random.default_rng(0)
        W = (0.4 * dln.orthogonal([shape[1], shape[0]], 1.0, 0)[0]).astype(dtype)
        few = dln.SVDTracker(6)
        every = dln.SVDTracker(min(shape), guards=0)
        truth = W.astype(np.float64)
        left, right = rng.standard_normal((shape[0], 3)), rng.standard_normal((shape[1], 3))
        for tracker in (few, every):
            tracker.update(W)
        for _ in range(8):
            A = (left @ rng.standard_normal((3, 2))).astype(dtype)
            B = (right @ rng.standard_normal((3, 2))).astype(dtype)
            truth = 0.99 * truth + 0.003 * A.astype(np.float64) @ B.T.astype(np.float64)
            for tracker in (few, every):
                record = tracker.update_low_rank(A, B, scale=0.003, factor=0.99)
                assert record.tier == "factored"
                assert record.completeness == "rigorous"
                assert_within_bounds(record, truth.astype(dtype))
            sigma = exact(truth)
            # All d values, both ends.
            error = np.abs(every.record.singular_values - sigma).max() / sigma[0]
            assert error < 10 * tolerance(dtype, max(shape))
            assert every.record.errors.max() < 1e3 * tolerance(dtype, max(shape))
        np.testing.assert_allclose(few.current(), truth, atol=10 * tolerance(dtype, max(shape)))
        u, v = few.left_vectors, few.right_vectors
        np.testing.assert_allclose(
            truth.T @ u, v * few.record.singular_values, atol=20 * tolerance(dtype, max(shape))
        )

    def test_frames_beyond_their_limit_become_a_dense_copy(self):
        rng = np.random.default_rng(0)
        W = dln.orthogonal([150, 150], 0.4, 0)[0]
        tracker = dln.SVDTracker(4, mode="dense")
        tracker.update(W)
        truth = W.copy()
        tiers = []
        for _ in range(12):
            A, B = rng.standard_normal((2, 150, 4))
            truth = truth + 0.01 * A @ B.T
            record = tracker.update_low_rank(A, B, scale=0.01)
            tiers.append(record.tier)
            assert_within_bounds(record, truth)
        assert tiers[0] == "factored"
        assert tiers[-1] == "dense"
        np.testing.assert_allclose(tracker.current(), truth, atol=tolerance(np.float64, 150, 12))
        # Updates by arrays work again.
        assert_within_bounds(tracker.update(truth), truth)

    def test_low_rank_updates_of_any_matrix(self):
        rng = np.random.default_rng(0)
        W = rng.standard_normal((160, 140)) / 12
        truth = W.copy()
        tracker = dln.SVDTracker(3)
        tracker.update(W)
        for _ in range(40):
            A, B = rng.standard_normal((160, 5)), rng.standard_normal((140, 5))
            truth = 0.999 * truth + 0.002 * A @ B.T
            record = tracker.update_low_rank(A, B, scale=0.002, factor=0.999)
            assert_within_bounds(record, truth)
        np.testing.assert_allclose(tracker.current(), truth, atol=tolerance(np.float64, 140, 40))

    @pytest.mark.parametrize("mode", ["auto", "full"])
    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    @pytest.mark.parametrize(
        ("m", "n", "k"), [(60, 60, 20), (1, 7, 1), (13, 5, 9), (128, 300, 4), (140, 150, 60)]
    )
    def test_decomposed_sizes_are_as_exact_as_update(self, mode, dtype, m, n, k):
        """Small matrices are decomposed by low-rank updates as by `update`, including equal values."""
        tracker, plain = dln.SVDTracker(k, mode=mode), dln.SVDTracker(k, mode=mode)
        W = np.zeros((m, n), dtype=dtype)
        tracker.update(W.copy())  # it must not change
        for i in range(min(m, n, 12)):
            a, b = np.eye(m, dtype=dtype)[i], np.eye(n, dtype=dtype)[i]
            W[i, i] = 1
            record = tracker.update_low_rank(a, b)
            assert (record.tier, record.completeness) == ("full", "rigorous")
            wanted = plain.update(W)
            np.testing.assert_array_equal(record.singular_values, wanted.singular_values)
            np.testing.assert_array_equal(record.errors, wanted.errors)
            assert_within_bounds(record, W)
        np.testing.assert_array_equal(tracker.current(), W)

    def test_the_array_of_the_caller_is_unchanged(self):
        rng = np.random.default_rng(0)
        for n in (20, 150):
            W = rng.standard_normal((n, n))
            before = W.copy()
            tracker = dln.SVDTracker(3)
            tracker.update(W)
            for _ in range(3):
                tracker.update_low_rank(rng.standard_normal(n), rng.standard_normal(n), factor=0.5)
            np.testing.assert_array_equal(W, before)

    def test_decaying_weights_are_tracked_to_their_own_precision(self):
        """The truncation error of the frames is relative to the current W, not to the initial one."""
        rng = np.random.default_rng(0)
        truth = dln.orthogonal([150, 150], 1.0, 0)[0]
        tracker = dln.SVDTracker(4)
        tracker.update(truth)
        for _ in range(12):
            A, B = (np.linalg.norm(truth, 2) * rng.standard_normal((150, 1)) / 150 for _ in range(2))
            B /= np.linalg.norm(truth, 2)
            truth = 0.05 * truth + 0.05 * A @ B.T
            record = tracker.update_low_rank(A, B, scale=0.05, factor=0.05)
            assert_within_bounds(record, truth)
            assert record.errors.max() <= 1e-11 * record.singular_values[0]
        assert record.singular_values[0] < 1e-14


LEVELS = {
    np.float64: [1e-320, 1e-310, 1e-300, 1e-170, 1e-150, 1e-20, 1e100, 1e155, 1e300],
    np.float32: [1e-44, 1e-40, 1e-30, 1e-20, 1e-8, 1e10, 1e19, 1e35],
}
AT_LEVELS = [(dtype, level) for dtype, levels in LEVELS.items() for level in levels]


class TestScales:
    """Bounds hold and norms are accurate at any scale of W."""

    @staticmethod
    def scaled(W, dtype, level):
        """Return a W of this size in the precision, and its values and norm by way of units."""
        held = (W * level).astype(dtype)
        # A power of two scales it to a size at which NumPy has no overflow or underflow.
        exponent = int(np.frexp(level)[1])
        up = np.ldexp(held.astype(np.float64), -exponent)
        return held, np.ldexp(exact(up), exponent), np.ldexp(np.linalg.norm(up), exponent)

    @staticmethod
    def assert_right(record, sigma, norm, dtype, share=None):
        least = np.nextafter(0.0, 1.0)
        k = len(record.singular_values)
        # The comparison rounds, too: subnormal numbers are multiples of the least one.
        rounding = 4 * np.finfo(np.float64).eps * sigma[0] + least
        assert np.all(np.abs(record.singular_values - sigma[:k]) <= record.errors + rounding)
        assert np.all(record.errors > 0)
        assert np.isclose(record.norm, norm, rtol=4 * np.finfo(np.float64).eps * 100, atol=least)
        if k < len(sigma):
            assert record.tail >= sigma[k] * (1 - 1e-6 if dtype == np.float32 else 1 - 1e-13) - least
        if share is not None:
            assert record.errors.max() <= share * sigma[0] + least
        assert record.stable_rank == pytest.approx((norm / sigma[0]) ** 2, rel=1e-4 + 4 * least / sigma[0])

    @pytest.mark.parametrize(("dtype", "level"), AT_LEVELS)
    @pytest.mark.parametrize("mode", ["auto", "dense", "full"])
    @pytest.mark.parametrize(("m", "n", "k"), [(300, 150, 3), (40, 23, 23), (1, 5, 1)])
    def test_arrays_of_any_scale_are_within_the_bounds(self, dtype, level, mode, m, n, k):
        rng = np.random.default_rng(0)
        W = rng.standard_normal((m, n)) / np.sqrt(m)
        W[:, : min(n, 5)] *= 4.0
        tracker = dln.SVDTracker(k, mode=mode, n_threads=1)
        for _ in range(3):
            held, sigma, norm = self.scaled(W, dtype, level)
            self.assert_right(tracker.update(held), sigma, norm, dtype)
            W = W + 1e-4 * rng.standard_normal((m, n)) / np.sqrt(m)

    @pytest.mark.parametrize(("dtype", "level"), AT_LEVELS)
    def test_operators(self, dtype, level):
        rng = np.random.default_rng(0)
        W = draw_matrix(0, 150, 150, [5, 4, 3] + [1] * 60)

        tracker = dln.SVDTracker(3, n_threads=1)
        for _ in range(2):
            held, sigma, _ = self.scaled(W, dtype, level)
            with np.errstate(under="ignore"):
                record = tracker.update(Products(held))
            assert np.isnan(record.norm)
            apart = np.abs(record.singular_values - sigma[:3])
            assert np.all(apart <= record.errors + 4e-16 * sigma[0] + np.nextafter(0.0, 1.0))
            W = W + 1e-4 * rng.standard_normal((150, 150))

    @pytest.mark.parametrize(("dtype", "level"), AT_LEVELS)
    @pytest.mark.parametrize("isometry", [True, False])
    @pytest.mark.parametrize("n", [150, 11])
    def test_low_rank_updates_of_any_scale_are_within_the_bounds(self, dtype, level, isometry, n):
        rng = np.random.default_rng(0)
        W = dln.orthogonal([n, n], 1.0, 0)[0] if isometry else rng.standard_normal((n, n)) / np.sqrt(n)
        W = (W * level).astype(dtype)
        tracker = dln.SVDTracker(3, n_threads=1)
        tracker.update(W)
        for _ in range(25):
            a = (0.02 * level * rng.standard_normal((n, 2)) / np.sqrt(n)).astype(dtype)
            b = rng.standard_normal((n, 2)).astype(dtype)
            record = tracker.update_low_rank(a, b)
            _, sigma, norm = self.scaled(tracker.current().astype(np.float64) / level, np.float64, level)
            # `current` rounds each sum, which the factored form does not.
            grain = (
                25 * np.sqrt(n) * max(np.finfo(dtype).eps * sigma[0], np.finfo(dtype).smallest_subnormal * n)
            )
            assert np.all(np.abs(record.singular_values - sigma[:3]) <= record.errors + grain)
            assert np.isclose(record.norm, norm, atol=grain)

    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    def test_a_matrix_that_changes_its_scale(self, dtype):
        rng = np.random.default_rng(0)
        W = rng.standard_normal((150, 140))
        tracker = dln.SVDTracker(4, n_threads=1)
        levels = (
            [1e-300, 1.0, 1e200, 1e-5, 0.0, 1e-310] if dtype == np.float64 else [1e-42, 1.0, 1e30, 0.0, 1e-20]
        )
        before = np.zeros_like(W, dtype=dtype)
        for level in levels:
            held, sigma, norm = self.scaled(W, dtype, level) if level else (before * 0, np.zeros(140), 0.0)
            moved = (sigma[0] + np.abs(before).max() * 150) * 1.01
            record = tracker.update(held, drift=moved)
            assert np.all(np.abs(record.singular_values - sigma[:4]) <= record.errors + 1e-15 * sigma[0])
            assert record.norm == pytest.approx(norm, rel=1e-12, abs=1e-322)
            before = held

    def test_values_beyond_the_largest_number_are_refused(self):
        W = np.full((200, 200), 1.7e308)
        with pytest.raises(ValueError, match="not finite, or its norm overflows"):
            dln.SVDTracker(2).update(W)
        tracker = dln.SVDTracker(2)
        tracker.update(np.eye(200))
        with pytest.raises(ValueError, match="norm overflows"):
            tracker.update_low_rank(np.full(200, 1e155), np.full(200, 1e152))

    @pytest.mark.parametrize(("dtype", "size"), [(np.float64, 1e200), (np.float32, 1e25)])
    def test_factors_of_very_different_size_lose_no_digits(self, dtype, size):
        """Their product has size 1 and loses no digits."""
        tracker = dln.SVDTracker(3)
        tracker.update(np.eye(150, dtype=dtype))
        a, b = np.zeros((2, 150), dtype=dtype)
        a[:4], b[:4] = size, 1 / size
        for i in range(3):
            record = tracker.update_low_rank(a, b)
            assert record.tier == "factored"
            # I + c 1 1^T on four coordinates.
            apart = abs(record.singular_values[0] - (1 + 4 * (i + 1)))
            assert apart <= record.errors[0] + 8 * tolerance(dtype, 4)

    def test_shares_and_ranks_do_not_depend_on_the_scale(self):
        """Measures of a trajectory do not depend on the scale either."""
        problem = dln.low_rank_recovery(dim=150, rank=2)
        runs = [
            dln.train(problem, dln.gaussian([150] * 2, scale, 0), learning_rate=0.0, steps=1, engine="dense",
                      record=dln.Record(singular_values=5))
            for scale in (1.0, 1e-165)
        ]  # fmt: skip
        shares = [run.energy_share(1, 2) for run in runs]
        np.testing.assert_allclose(shares[0], shares[1], rtol=1e-9)


class TestRuns:
    """The tracker inside `train`."""

    DIM = 150

    def networks(self):
        square = dln.low_rank_recovery(self.DIM, 3, seed=0)
        thin = dln.classification(n_classes=4, samples_per_class=40, dim=self.DIM, seed=0)
        rng = np.random.default_rng(0)
        X = rng.standard_normal((self.DIM, 2 * self.DIM))
        skewed = dln.Problem(square.target, X @ X.T / (2 * self.DIM), square.loss_scale)
        wide, narrow = [self.DIM] * 4, [self.DIM] * 3 + [4]
        return {
            "square": (square, dln.orthogonal(wide, 0.5, 0), {}),
            "square, momentum": (square, dln.orthogonal(wide, 0.5, 0), {"momentum": 0.9}),
            "Gaussian": (square, dln.gaussian(wide, 0.5, 0), {"weight_decay": 1e-3}),
            "not whitened": (skewed, dln.orthogonal(wide, 0.5, 0), {}),
            "thin": (thin, dln.orthogonal(narrow, 0.5, 0), {"weight_decay": 1e-3}),
            "thin, momentum": (thin, dln.orthogonal(narrow, 0.5, 0), {"momentum": 0.9}),
            "thin, Gaussian": (thin, dln.gaussian(narrow, 0.5, 0), {"momentum": 0.5}),
            "thin inputs": (
                dln.Problem(np.asarray(thin.dense_target(np.float64)).T.copy(), None, thin.loss_scale),
                dln.orthogonal([4] + [self.DIM] * 3, 0.5, 0),
                {},
            ),
        }

    @pytest.mark.parametrize(
        "name",
        [
            "square",
            "square, momentum",
            "Gaussian",
            "not whitened",
            "thin",
            "thin, momentum",
            "thin, Gaussian",
            "thin inputs",
        ],
    )
    @pytest.mark.parametrize("tracking", ["auto", "dense", "full"])
    def test_every_value_is_within_its_bound(self, name, tracking):
        problem, weights, changes = self.networks()[name]
        run = dln.train(
            problem,
            weights,
            learning_rate="auto",
            steps=30,
            engine="dense",
            **with_record(changes, singular_values=8, weights_every=1, tracking=tracking),
        )
        for layer in range(1, run.n_layers + 1):
            found = run.tracking(layer)
            values, errors = run.singular_values(layer), run.singular_value_errors(layer)
            for i, step in enumerate(run.steps):
                sigma = exact(run.weights(layer, int(step)))[: values.shape[1]]
                assert np.all(np.abs(values[i] - sigma) <= errors[i]), (layer, step, found["tier"][i])
            if tracking == "full":
                assert set(found["tier"]) == {"full"}
            if name.startswith("thin") and "Gaussian" not in name and tracking == "auto":
                wide = min(run.widths[layer - 1 : layer + 1]) == self.DIM
                assert set(found["tier"]) == {"factored" if wide else "full"}
                if wide:
                    assert errors.max() < 1e-11
                    assert set(found["completeness"]) == {"rigorous"}
            if name.startswith("square") and tracking != "full":
                assert np.all(errors < 0.0501 * values[:, :1])
                assert (
                    np.median(errors) < 1e-4
                )  # W(0) is a rotation: the values that are not tracked are known
                assert set(found["completeness"]) == {"probabilistic"}

    def test_all_values_in_factored_form(self):
        problem, weights, changes = self.networks()["thin"]
        run = dln.train(
            problem,
            weights,
            learning_rate="auto",
            steps=40,
            engine="dense",
            **with_record(changes, weights_every=10),
        )
        assert set(run.tracking(1)["tier"]) == {"factored"}
        for step in (0, 10, 40):
            sigma = exact(run.weights(1, step))
            np.testing.assert_allclose(run.singular_values(1)[step], sigma, atol=1e-12)
        # rho: weight decay alone, (1 - eta lambda)^t eps.
        rate = run.config["learning_rate"][0]
        np.testing.assert_allclose(run.tracking(1)["rho"], 0.5 * (1 - rate * 1e-3) ** run.steps, rtol=1e-12)

    def test_vectors_and_angles_of_the_tracker_equal_the_dense_ones(self):
        problem, weights, changes = self.networks()["thin"]
        arguments = dict(
            learning_rate="auto", steps=20, record=dln.Record(vectors=True, weights_every=20), **changes
        )
        few = dln.train(problem, weights, engine="dense", **with_record(arguments, singular_values=8))
        whole = dln.train(
            problem, weights, engine="dense", **with_record(arguments, singular_values=8, tracking="full")
        )
        assert set(few.tracking(2)["tier"]) == {"factored"}
        W = few.weights(2)
        for run in (few, whole):
            u, v = run.singular_vectors(2, "left"), run.singular_vectors(2, "right")
            np.testing.assert_allclose(W @ v, u * run.singular_values(2)[-1], atol=1e-11)
        # The leading four values are well separated, so their angles do not depend on the method.
        np.testing.assert_allclose(
            few.angles(2, "right", reference="first_step")[1:, :3],
            whole.angles(2, "right", reference="first_step")[1:, :3],
            atol=1e-6,
        )

    def test_both_engines_have_the_same_branches(self):
        problem = dln.low_rank_recovery(self.DIM, 3, seed=1)
        weights = dln.orthogonal([self.DIM] * 4, 0.5, 0)
        arguments = {"learning_rate": "auto", "steps": 60, "momentum": 0.9}
        reduced = dln.train(problem, weights, engine="reduced", **arguments)
        dense = dln.train(problem, weights, engine="dense", **with_record(arguments, singular_values=3))
        assert reduced.branches(1).shape == reduced.active_singular_values(1).shape
        assert reduced.clusters(1).shape == reduced.branches(1).shape
        values = reduced.branch_values(1)
        assert values.shape[0] == 61
        # A branch moves smoothly: by no more than the layer does in a step.
        tracked = dense.branch_values(1)
        for curves in (values[2:, :3], tracked[2:, :3]):
            moves = np.abs(np.diff(curves, axis=0))
            assert np.all(moves[np.isfinite(moves)] < 0.5)
        assert np.all(reduced.singular_value_errors(1) < 1e-12)
        assert set(reduced.tracking(1)["tier"]) == {"reduced"}
        with pytest.raises(ValueError, match="not followed"):
            dln.train(problem, weights, engine="dense", **arguments).branch_values(1)

    def test_files_contain_the_tracked_values(self, tmp_path):
        problem, weights, _ = self.networks()["square"]
        run = dln.train(
            problem,
            weights,
            learning_rate="auto",
            steps=5,
            engine="dense",
            record=dln.Record(singular_values=4),
        )
        run.save(tmp_path / "run.npz")
        again = dln.load(tmp_path / "run.npz")
        for layer in (1, 2, 3):
            np.testing.assert_array_equal(
                again.singular_value_errors(layer), run.singular_value_errors(layer)
            )
            np.testing.assert_array_equal(again.branches(layer), run.branches(layer))
            np.testing.assert_array_equal(again.clusters(layer), run.clusters(layer))
            for name, column in run.tracking(layer).items():
                np.testing.assert_array_equal(again.tracking(layer)[name], column)
        with pytest.raises(ValueError, match="tracking is 'fast'"):
            dln.train(problem, weights, learning_rate=0.1, steps=1, record=dln.Record(tracking="fast"))


# ------------------------------------------------------------------------------------- restoring a state


@pytest.mark.parametrize("mode", ["auto", "dense"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_tracker_continues_from_the_state_of_another(mode, dtype):
    """The same values within the errors, and the same branches through a crossing after the change."""
    rng = np.random.default_rng(3)
    m, n, k = 170, 150, 3
    u, v = (draw_orthonormal(rng, size, k) for size in (m, n))
    noise = 1e-3 * rng.standard_normal((m, n))

    def matrix(t):
        return (((u * [3.0 - t, 2.0, 1.0]) @ v.T) + noise).astype(dtype)

    times = np.linspace(0.0, 1.6, 33)
    whole = dln.SVDTracker(k, mode=mode)
    records = [whole.update(matrix(t)) for t in times]
    first = dln.SVDTracker(k, mode=mode)
    for t in times[:9]:
        first.update(matrix(t))
    state = first.state_dict()
    again = dln.SVDTracker.from_state_dict(state)
    for t, wanted in zip(times[9:], records[9:], strict=True):
        found = again.update(matrix(t))
        assert found.update == wanted.update
        gap = np.abs(found.singular_values - wanted.singular_values)
        assert np.all(gap <= found.errors + wanted.errors)
        assert sorted(found.branches) == [0, 1, 2]
        np.testing.assert_array_equal(found.branches, wanted.branches)
    assert again.n_updates == whole.n_updates == len(times)
    # Again, from a tracker that was itself restored.
    third = dln.SVDTracker.from_state_dict(again.state_dict())
    np.testing.assert_array_equal(third.update(matrix(times[-1])).branches, records[-1].branches)


def test_new_branches_get_new_numbers_after_a_change():
    tracker = dln.SVDTracker(1, guards=2)
    d = np.zeros((200, 200))
    d[0, 0], d[1, 1] = 2.0, 1.0
    assert tracker.update(d).branches.tolist() == [0]
    again = dln.SVDTracker.from_state_dict(tracker.state_dict())
    d[0, 0], d[1, 1] = 0.5, 3.0
    assert again.update(d).branches.tolist() == [1]
    assert again.state_dict()["next_branch"] == 2


def test_errors_name_bad_states_of_a_tracker():
    with pytest.raises(ValueError, match="state_dict needs an earlier update"):
        dln.SVDTracker(2).state_dict()
    with pytest.raises(TypeError, match="state is list; wanted a dict from state_dict"):
        dln.SVDTracker.from_state_dict([])
    with pytest.raises(ValueError, match=r"state has the keys \['a'\]"):
        dln.SVDTracker.from_state_dict({"a": 1})
    tracker = dln.SVDTracker(2)
    tracker.update(np.eye(5))
    with pytest.raises(ValueError, match="state has version 9; this dlnfast reads up to 1"):
        dln.SVDTracker.from_state_dict(tracker.state_dict() | {"version": 9})
