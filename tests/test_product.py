# SPDX-License-Identifier: MIT
"""Every product and decomposition of the core against NumPy, at every level and any thread count."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.matrices import draw_orthonormal
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

SIZES = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 13, 16, 17, 31, 37, 64, 67, 97])
THIN = st.sampled_from([0, 1, 2, 3, 5, 6, 7, 10, 13, 31, 64])
DTYPES = st.sampled_from([np.float32, np.float64])
THREADS = st.sampled_from([0, 1, 2, 7])
SEEDS = st.integers(0, 10**6)
FLAGS = st.booleans()


def draw_matrices(seed, *shapes, dtype):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def double(*arrays):
    return [array.astype(np.float64) for array in arrays]


def assert_product(got, a, b):
    """Compare got with a b relative to ||a|| ||b||, the scale of the rounding errors of a product."""
    wide_a, wide_b = double(a, b)
    size = np.linalg.norm(wide_a) * np.linalg.norm(wide_b)
    error = np.linalg.norm(got.astype(np.float64) - wide_a @ wide_b)
    assert error <= tolerance(got.dtype, max(a.shape[1], 1)) * size


@settings(deadline=None, max_examples=40)
@given(
    m=SIZES,
    k=SIZES,
    n=SIZES,
    dtype=DTYPES,
    n_threads=THREADS,
    seed=SEEDS,
    transpose_a=FLAGS,
    transpose_b=FLAGS,
)
def test_multiply_equals_numpy(core, m, k, n, dtype, n_threads, seed, transpose_a, transpose_b):
    a, b = draw_matrices(
        seed, (k, m) if transpose_a else (m, k), (n, k) if transpose_b else (k, n), dtype=dtype
    )
    # The previous content of the output must not matter, not even a NaN.
    out = np.full((m, n), np.nan, dtype)
    core.multiply(a, transpose_a, b, transpose_b, out, n_threads)
    assert_product(out, a.T if transpose_a else a, b.T if transpose_b else b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "shape", [(523, 311, 409), (16, 1031, 700), (700, 1031, 16), (1, 2000, 1), (2000, 1, 64)]
)
@pytest.mark.parametrize("n_threads", [1, 2, 7])
def test_multiply_on_several_threads_equals_numpy(core, shape, dtype, n_threads):
    m, k, n = shape
    a, b = draw_matrices(1, (m, k), (k, n), dtype=dtype)
    out = np.full((m, n), np.nan, dtype)
    core.multiply(a, False, b, False, out, n_threads)
    assert_product(out, a, b)


@settings(deadline=None, max_examples=40)
@given(k=THIN, m=SIZES, n=SIZES, dtype=DTYPES, n_threads=THREADS, seed=SEEDS, transpose=FLAGS)
def test_thin_multiply_equals_numpy(core, k, m, n, dtype, n_threads, seed, transpose):
    x, w = draw_matrices(seed, (k, n if transpose else m), (m, n), dtype=dtype)
    out = np.full((k, m if transpose else n), np.nan, dtype)
    core.thin_multiply(x, w, transpose, out, n_threads)
    assert_product(out, x, w.T if transpose else w)


# Calls of the descents with a thin gradient, by what they write to `out`.
DESCENTS = {
    "rows": lambda core, left, right, w, out, *rest: core.thin_times_transpose_and_descend(
        left, right, w, out, *rest
    ),
    "columns": lambda core, left, right, w, out, *rest: core.thin_times_and_descend(
        left, right, w, out, *rest
    ),
    "none": lambda core, left, right, w, out, *rest: core.thin_descend(left, right, w, *rest),
}


def describe_descent(scale, learning_rate, weight_decay, momentum, velocity):
    return {
        "scale": scale,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "velocity": velocity,
    }


@settings(deadline=None, max_examples=50)
@given(
    k=THIN,
    m=SIZES,
    n=SIZES,
    dtype=DTYPES,
    n_threads=THREADS,
    seed=SEEDS,
    result=st.sampled_from(["rows", "columns", "none"]),
    momentum=st.sampled_from([None, 0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.3]),
)
def test_thin_descend_equals_numpy(core, k, m, n, dtype, n_threads, seed, result, momentum, weight_decay):
    left, right, w, v = draw_matrices(seed, (k, m), (k, n), (m, n), (m, n), dtype=dtype)
    scale, rate = 0.7, 0.2
    wide_left, wide_right, old, speed = double(left, right, w, v)
    wanted_speed = scale * wide_left.T @ wide_right + weight_decay * old
    if momentum is not None:
        wanted_speed += momentum * speed
    wanted = old - rate * wanted_speed

    velocity = None if momentum is None else v
    out = {"rows": np.full((k, m), np.nan, dtype), "columns": np.full((k, n), np.nan, dtype), "none": None}[
        result
    ]
    descent = describe_descent(scale, rate, weight_decay, momentum or 0.0, velocity)
    DESCENTS[result](core, left, right, w, out, descent, n_threads)

    if result == "rows":
        assert_product(out, right, old.astype(dtype).T)
    elif result == "columns":
        assert_product(out, left, old.astype(dtype))
    allowed = tolerance(dtype, k + 2)
    size = (
        np.linalg.norm(wide_left) * np.linalg.norm(wide_right) + np.linalg.norm(old) + np.linalg.norm(speed)
    )
    assert np.linalg.norm(w - wanted) <= allowed * size
    if velocity is not None:
        assert np.linalg.norm(velocity - wanted_speed) <= allowed * size


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_threads", [1, 2, 7])
@pytest.mark.parametrize("result", ["rows", "columns", "none"])
def test_thin_descend_on_several_threads_equals_numpy(core, dtype, n_threads, result):
    k, m, n = 10, 613, 1229
    left, right, w, v = draw_matrices(2, (k, m), (k, n), (m, n), (m, n), dtype=dtype)
    old = w.copy()
    wanted_speed = 0.9 * v.astype(np.float64) + 0.5 * left.astype(np.float64).T @ right + 0.1 * old
    wanted = old - 0.3 * wanted_speed
    out = {"rows": np.empty((k, m), dtype), "columns": np.empty((k, n), dtype), "none": None}[result]
    descent = describe_descent(0.5, 0.3, 0.1, 0.9, v)
    DESCENTS[result](core, left, right, w, out, descent, n_threads)
    if out is not None:
        assert_product(out, *((right, old.T) if result == "rows" else (left, old)))
    assert np.linalg.norm(w - wanted) <= tolerance(dtype, k) * np.linalg.norm(wanted)


def decompose(core, w, n_values=None, vectors=True):
    m, n = w.shape
    k = min(m, n) if n_values is None else n_values
    values = np.full((1, k), np.nan, w.dtype)
    left, right = (np.full((rows, k), np.nan, w.dtype) for rows in (m, n))
    core.singular_values(w, values, left if vectors else None, right if vectors else None)
    return left, values[0], right


@settings(deadline=None, max_examples=30)
@given(m=SIZES, n=SIZES, dtype=DTYPES, seed=SEEDS, data=st.data())
def test_singular_values_equal_numpy(core, m, n, dtype, seed, data):
    (w,) = draw_matrices(seed, (m, n), dtype=dtype)
    k = data.draw(st.integers(0, min(m, n)))
    wanted = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    left, values, right = decompose(core, w, k)
    allowed = tolerance(dtype, max(m, n, 1))
    size = wanted[0] if len(wanted) else 0.0
    assert np.all(np.abs(values - wanted[:k]) <= allowed * size)
    assert np.all(values[1:] <= values[:-1])
    assert np.all(values >= 0)
    # Each pair belongs together: W v = s u and W^T u = s v, with orthonormal columns.
    assert np.linalg.norm(w @ right - left * values) <= allowed * size * k
    assert np.linalg.norm(w.T @ left - right * values) <= allowed * size * k
    for vectors in (left, right):
        assert np.linalg.norm(vectors.T @ vectors - np.eye(k)) <= allowed * max(k, 1)
    assert np.array_equal(decompose(core, w, k, vectors=False)[1].shape, values.shape)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["zero", "rank 2", "identity", "repeated", "tiny", "huge"])
def test_singular_values_of_special_matrices(core, dtype, kind):
    rng = np.random.default_rng(0)
    n = 24
    w = {
        "zero": np.zeros((n, n)),
        "rank 2": rng.standard_normal((n, 2)) @ rng.standard_normal((2, n)),
        "identity": np.eye(n),
        "repeated": draw_orthonormal(rng, n, n) * np.repeat([2.0, 1.0, 0.5], n // 3),
        "tiny": rng.standard_normal((n, n)) * 1e-30,
        "huge": rng.standard_normal((n, n)) * 1e30,
    }[kind].astype(dtype)
    wanted = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    left, values, right = decompose(core, w)
    assert np.all(np.abs(values - wanted) <= tolerance(dtype, n) * wanted[0])
    for vectors in (left, right):
        assert np.linalg.norm(vectors.T @ vectors - np.eye(n)) <= tolerance(dtype, n) * n


def test_singular_values_of_a_large_matrix(core):
    """A matrix of this size is decomposed on a separate thread."""
    (w,) = draw_matrices(3, (420, 400), dtype=np.float64)
    wanted = np.linalg.svd(w, compute_uv=False)
    left, values, right = decompose(core, w, 5)
    assert np.all(np.abs(values - wanted[:5]) <= tolerance(np.float64, 420) * wanted[0])
    assert np.linalg.norm(w @ right - left * values) <= tolerance(np.float64, 420) * wanted[0] * 5


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 40), seed=SEEDS, data=st.data(), scale=st.sampled_from([1.0, 1e-8, 1e8]))
def test_bidiagonal_singular_values_equal_numpy(core, n, seed, data, scale):
    rng = np.random.default_rng(seed)
    diagonal, superdiagonal = scale * rng.standard_normal(n), scale * rng.standard_normal(n - 1)
    k = data.draw(st.integers(0, n))
    wanted = np.linalg.svd(np.diag(diagonal) + np.diag(superdiagonal, 1), compute_uv=False)
    got = core.bidiagonal_singular_values(diagonal, superdiagonal, k)
    assert got.shape == (k,)
    # Bisection is on the squares: a small value has the accuracy of its square relative to the largest. Twice
    # the tolerance, because the squares of NumPy's values have an error of 2 sigma times that of the values.
    assert np.all(np.abs(got**2 - wanted[:k] ** 2) <= 2 * tolerance(np.float64, n) * wanted[0] ** 2)
    assert np.all(got[1:] <= got[:-1])


def test_bidiagonal_singular_values_of_simple_matrices(core):
    nothing = np.empty(0)
    assert core.bidiagonal_singular_values(nothing, nothing, 0).shape == (0,)
    assert core.bidiagonal_singular_values(np.zeros(3), np.zeros(2), 3).tolist() == [0.0, 0.0, 0.0]
    got = core.bidiagonal_singular_values(np.array([2.0, -3.0, 1.0, 3.0]), np.zeros(3), 4)
    np.testing.assert_allclose(got, [3, 3, 2, 1], rtol=tolerance(np.float64, 4))


# Where the chain of products is split.


def test_the_best_pivot_is_the_cheapest(core):
    rng = np.random.default_rng(0)
    for _ in range(50):
        widths = rng.integers(1, 60, rng.integers(2, 8)).tolist()
        flops = [core.step_flops(widths, pivot) for pivot in range(len(widths))]
        assert flops[core.best_pivot(widths)] == min(flops)


@pytest.mark.parametrize(
    ("widths", "pivot"),
    [([9, 9, 9, 9], 3), ([50, 50, 50, 4], 3), ([4, 50, 50, 50, 50], 0), ([50, 50, 3, 50, 50], 2)],
)
def test_the_pivot_is_at_the_bottleneck(core, widths, pivot):
    assert core.best_pivot(widths) == pivot


def test_flops_of_square_and_thin_layers(core):
    assert core.step_flops([8, 8, 8, 8], 3) == 6 * 2 * 8**3  # 6 (L - 1) d^3
    assert core.step_flops([8, 8, 8, 2], 3) == 6 * 2 * 2 * 8**2  # 6 (L - 1) K d^2
