# SPDX-License-Identifier: MIT
"""The closed forms of gradient flow against runs of `flow`, and against plain NumPy."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers.matrices import draw_orthonormal
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast import reference, theory

Array = npt.NDArray[np.float64]


# ------------------------------------------------------------------------------------------------- modes


def flow_of_mode(times: Array, sigma: float, initial: float, n_layers: int, loss_scale: float) -> Array:
    """Return W_{L:1} of scalar layers under gradient flow."""
    weights = [np.array([[initial ** (1 / n_layers)]])] * n_layers
    run = dln.flow(
        dln.Problem(np.array([[sigma]]), loss_scale=loss_scale),
        weights,
        times,
        engine="dense",
        record=dln.Record(weights_every=1),
    )
    return np.array([run.end_to_end(int(step))[0, 0] for step in run.steps])


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    ("sigma", "initial"), [(2.0, 1e-4), (0.5, 0.3), (1.0, 3.0), (1.0, 100.0), (1.0, 1.0), (0.0, 0.5)]
)
def test_modes_are_those_of_the_flow(n_layers: int, sigma: float, initial: float) -> None:
    loss_scale, last = 0.7, 10.0
    if initial < sigma:
        last = 1.5 * float(
            theory.escape_time(sigma, initial, fraction=0.9, n_layers=n_layers, loss_scale=loss_scale)
        )
    times = np.concatenate([[0.0, 1e-6 * last], np.linspace(0.01 * last, last, 25)])
    found = flow_of_mode(times, sigma, initial, n_layers, loss_scale)
    exact = theory.mode_strength(times, sigma, initial, n_layers=n_layers, loss_scale=loss_scale)
    assert exact[0] == initial
    np.testing.assert_allclose(found, exact, rtol=2e-9)


@pytest.mark.parametrize("n_layers", [1, 2, 3, 5])
def test_a_mode_reaches_each_fraction_after_its_escape_time(n_layers: int) -> None:
    fractions = np.array([1e-3, 0.1, 0.5, 0.9, 0.999])
    durations = theory.escape_time(2.0, 1e-4, fraction=fractions, n_layers=n_layers, loss_scale=0.3)
    assert np.all(np.diff(durations) > 0)
    found = flow_of_mode(np.concatenate([[0.0], durations]), 2.0, 1e-4, n_layers, 0.3)
    np.testing.assert_allclose(found[1:], 2.0 * fractions, rtol=2e-9)


@settings(max_examples=50, deadline=None)
@given(
    n_layers=st.integers(1, 30),
    sigma=st.floats(1e-3, 1e3),
    ratio=st.floats(1e-8, 0.9),
    share=st.floats(0.01, 0.99),
)
def test_strength_inverts_the_escape_time(n_layers: int, sigma: float, ratio: float, share: float) -> None:
    fraction = ratio + (1 - ratio) * share
    duration = theory.escape_time(sigma, ratio * sigma, fraction=fraction, n_layers=n_layers)
    found = theory.mode_strength(duration, sigma, ratio * sigma, n_layers=n_layers)
    # Rounding of t, relative to the plateau of (a_0 / sigma)^{2/L - 1}, shifts the sigmoid.
    shift = n_layers * ratio ** min(2 / n_layers - 1, 0)
    assert found == pytest.approx(fraction * sigma, rel=1e-14 * (10 + shift))


def test_escape_times_of_small_scales_are_plateaus() -> None:
    for n_layers in (3, 4, 6):
        scale = 1e-4
        duration = theory.escape_time(2.0, scale**n_layers, n_layers=n_layers, loss_scale=0.5)
        shortest = theory.plateau_bounds(2.0, scale, n_layers, 0.5, 1.0).shortest
        assert duration == pytest.approx(shortest, rel=1e-3)
    # Two layers: the logarithm of the scale.
    first, second = (theory.escape_time(2.0, initial) for initial in (1e-8, 1e-10))
    assert second - first == pytest.approx(np.log(100) / 4, rel=1e-7)


def test_modes_neither_overflow_nor_leave_their_minimum() -> None:
    for n_layers in (1, 2, 3, 10):
        for initial in (1e-8, 1.0, 1e8):
            found = theory.mode_strength([1e-300, 1e100, 1e300], 2.0, initial, n_layers=n_layers)
            assert found[0] == pytest.approx(initial, rel=1e-12)
            np.testing.assert_allclose(found[1:], 2.0, rtol=1e-14)
    times = np.array([0.0, 1.0, 50.0])
    for n_layers in (1, 2, 4):
        power = theory.rho_flow(times, 0.5, n_layers, 0.3, 1.0) ** n_layers
        found = theory.mode_strength(times, 0.0, 0.5**n_layers, n_layers=n_layers, loss_scale=0.3)
        np.testing.assert_allclose(found, power, rtol=1e-14)
    assert theory.mode_strength(1.0, 2.0, 0.5).shape == ()
    assert theory.mode_strength([[1.0, 2.0]], 2.0, 0.5).shape == (1, 2)


def test_errors_of_modes_name_bad_arguments() -> None:
    for time in (-1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match=r"time \(t\) has a value that is negative or not finite"):
            theory.mode_strength(time, 1.0, 0.1)
    with pytest.raises(TypeError, match="wanted numbers"):
        theory.mode_strength("now", 1.0, 0.1)
    with pytest.raises(ValueError, match="initial is 0"):
        theory.mode_strength(1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="sigma is -1"):
        theory.mode_strength(1.0, -1.0, 0.1)
    for fraction in (0.05, 1.0, 1.5, np.nan):
        with pytest.raises(ValueError, match="fraction has a value outside"):
            theory.escape_time(1.0, 0.1, fraction=fraction)
    with pytest.raises(ValueError, match="sigma is 0"):
        theory.escape_time(0.0, 0.1)
    with pytest.raises(ValueError, match="overflows"):
        theory.escape_time(1.0, 1e-300, n_layers=1000, loss_scale=1e-300)


# -------------------------------------------------------------------------------------- balanced networks


def draw_balanced(dims: tuple[int, int, int], balance: float, seed: int) -> list[Array]:
    """Return W_1 and W_2 with W_2^T W_2 - W_1 W_1^T = lambda I, for widths d_0, h, d_2."""
    dim_in, hidden, dim_out = dims
    generator = np.random.default_rng(seed)
    most = min(dims)
    squares = np.zeros(hidden)
    squares[:most] = generator.uniform(0.05, 0.5, most)
    # The squares of the singular values of W_1 and of W_2, on the same hidden directions.
    first, last = squares + max(-balance, 0.0), squares + max(balance, 0.0)
    frame = draw_orthonormal(generator, hidden, hidden)

    def layer(values: Array, dim: int) -> Array:
        count = min(hidden, dim)
        assert np.all(values[count:] == 0)
        return draw_orthonormal(generator, dim, dim)[:, :count] * np.sqrt(values[:count]) @ frame[:, :count].T

    return [layer(first, dim_in).T, layer(last, dim_out)]


CASES: dict[str, tuple[tuple[int, int, int], float]] = {
    "square": ((4, 4, 4), 0.3),
    "square, negative": ((4, 4, 4), -0.3),
    "square, zero": ((4, 4, 4), 0.0),
    "bottleneck": ((6, 2, 5), 0.4),
    "bottleneck, zero": ((6, 2, 5), 0.0),
    "wide, zero": ((3, 9, 4), 0.0),
    "one unit": ((3, 1, 2), 0.7),
    "to more outputs": ((2, 4, 6), 0.5),
    "to fewer outputs": ((6, 4, 2), -0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_balanced_networks_follow_their_exact_solution(name: str) -> None:
    dims, balance = CASES[name]
    weights = draw_balanced(dims, balance, seed=1)
    generator = np.random.default_rng(2)
    problem = dln.Problem(generator.standard_normal((dims[2], dims[0])), loss_scale=0.4)
    times = np.linspace(0.0, 20.0, 21)
    exact = theory.balanced_flow(problem, weights, times)
    assert exact.balance == pytest.approx(balance, abs=1e-14)
    run = dln.flow(problem, weights, times, engine="dense", record=dln.Record(weights_every=1))
    for step in range(len(times)):
        first, last = run.all_weights(step)
        np.testing.assert_allclose(exact.end_to_end[step], last @ first, rtol=0, atol=1e-9)
        np.testing.assert_allclose(exact.first_gram[step], first.T @ first, rtol=0, atol=1e-9)
        np.testing.assert_allclose(exact.last_gram[step], last @ last.T, rtol=0, atol=1e-9)
        kernel, wanted = exact.kernel(step), run.neural_tangent_kernel(step)
        np.testing.assert_allclose(kernel.dense(), wanted.dense(), rtol=0, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(CASES)),
    time=st.floats(0.0, 1.0),
    loss_scale=st.floats(0.1, 1.0),
    seed=st.integers(0, 99),
)
def test_exact_solution_is_the_formula_of_the_papers(
    name: str, time: float, loss_scale: float, seed: int
) -> None:
    dims, balance = CASES[name]
    weights = draw_balanced(dims, balance, seed)
    target = np.random.default_rng(seed).standard_normal((dims[2], dims[0]))
    exact = theory.balanced_flow(dln.Problem(target, loss_scale=loss_scale), weights, [time])
    wanted = reference.balanced_flow(weights, target, time, loss_scale=loss_scale)
    found = exact.end_to_end[0], exact.first_gram[0], exact.last_gram[0]
    exponent = 2 * loss_scale * time * (np.linalg.norm(target, 2) + abs(balance))
    for one, other in zip(found, wanted, strict=True):
        # The plain formula inverts a matrix of about the condition of its exponentials, at most e^12 here.
        room = tolerance(np.float64, sum(dims)) * (1 + np.exp(exponent))
        np.testing.assert_allclose(one, other, rtol=0, atol=room * np.linalg.norm(other) + 1e-300)


def test_exact_solution_grows_from_tiny_weights_and_holds_for_long_times() -> None:
    sigma = np.array([3.0, 1.0, 0.5])
    left, right = (draw_orthonormal(i, 3, 3) for i in range(2))
    problem = dln.Problem(left * sigma @ right.T)
    scale = 1e-10
    # Aligned layers: each mode has its own sigmoid, from 1e-20.
    weights = [scale * right.T, scale * left]
    times = np.array([0.0, 5.0, 7.6, 10.0, 23.0, 24.0, 45.0, 47.0, 60.0, 1e4])
    exact = theory.balanced_flow(problem, weights, times)
    modes = np.array([np.diag(left.T @ matrix @ right) for matrix in exact.end_to_end])
    wanted = np.stack([theory.mode_strength(times, value, scale**2) for value in sigma], axis=1)
    np.testing.assert_allclose(modes, wanted, rtol=0, atol=1e-12)
    np.testing.assert_allclose(exact.end_to_end[-1], problem.dense_target(), rtol=0, atol=1e-13)
    # Doubling the number of times does not change the values at any of them.
    more = theory.balanced_flow(problem, weights, np.sort(np.concatenate([times, times[1:] - 0.3])))
    np.testing.assert_allclose(
        more.end_to_end[[0, *range(2, 2 * len(times), 2)]], exact.end_to_end, rtol=0, atol=1e-12
    )


def test_rank_of_a_bottleneck_is_that_of_the_limit() -> None:
    generator = np.random.default_rng(4)
    target = generator.standard_normal((5, 6))
    exact = theory.balanced_flow(dln.Problem(target), draw_balanced((6, 2, 5), 0.2, seed=5), [500.0])
    left, values, right_t = np.linalg.svd(target)
    np.testing.assert_allclose(
        exact.end_to_end[0], left[:, :2] * values[:2] @ right_t[:2], rtol=0, atol=1e-12
    )


def test_errors_of_balanced_networks_name_bad_arguments() -> None:
    problem = dln.Problem(np.eye(3))
    weights = draw_balanced((3, 3, 3), 0.2, seed=0)
    with pytest.raises(dln.AssumptionError, match="weights are not balanced"):
        theory.balanced_flow(problem, dln.gaussian([3, 3, 3]), [1.0])
    with pytest.raises(dln.AssumptionError, match="wanted white inputs"):
        theory.balanced_flow(dln.Problem(np.eye(3), 2 * np.eye(3)), weights, [1.0])
    with pytest.raises(dln.ShapeError, match="weights has 3 layers; wanted two"):
        theory.balanced_flow(problem, dln.orthogonal([3] * 4), [1.0])
    with pytest.raises(dln.ShapeError, match="weights map 3 to 3 dimensions; wanted 2 to 2"):
        theory.balanced_flow(dln.Problem(np.eye(2)), weights, [1.0])
    for times in ([-1.0], [1.0, 0.5]):
        with pytest.raises(ValueError, match="times has a value that is negative, or below"):
            theory.balanced_flow(problem, weights, times)
    with pytest.raises(ValueError, match=r"times\[1\] is 1e\+09, at which exponentials"):
        theory.balanced_flow(problem, weights, [0.0, 1e9])
    with pytest.raises(ValueError, match="index is 1"):
        theory.balanced_flow(problem, weights, [0.0]).kernel(1)


# ------------------------------------------------------------------------------- neural tangent kernel


@settings(max_examples=30, deadline=None)
@given(widths=st.lists(st.integers(1, 5), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_kernel_is_the_gram_matrix_of_the_derivatives(widths: list[int], seed: int) -> None:
    weights = dln.gaussian(widths, seed=seed)
    kernel = theory.neural_tangent_kernel(weights)
    wanted = reference.neural_tangent_kernel(weights)
    near = {"rtol": 0, "atol": tolerance(np.float64, 5**3) * max(np.linalg.norm(wanted), 1e-300)}
    assert kernel.shape == (widths[-1], widths[0])
    np.testing.assert_allclose(kernel.dense(), wanted, **near)
    generator = np.random.default_rng(seed)
    direction = generator.standard_normal(kernel.shape)
    room = {"rtol": 0, "atol": near["atol"] * np.linalg.norm(direction)}
    np.testing.assert_allclose(kernel.apply(direction).ravel(), wanted @ direction.ravel(), **room)
    assert kernel.trace() == pytest.approx(np.trace(wanted))
    assert kernel.inner(kernel) == pytest.approx(np.sum(wanted**2))
    # Between samples: the derivatives of the outputs W x.
    first, second = generator.standard_normal((widths[0], 2)), generator.standard_normal((widths[0], 3))
    tensor = wanted.reshape(*kernel.shape, *kernel.shape)
    np.testing.assert_allclose(
        kernel.at(first, second),
        np.einsum("aibj,im,jn->mnab", tensor, first, second),
        rtol=0,
        atol=near["atol"] * np.linalg.norm(first) * np.linalg.norm(second),
    )


@pytest.mark.parametrize("white", [True, False])
def test_flow_moves_the_end_to_end_map_by_the_kernel(white: bool) -> None:
    generator = np.random.default_rng(7)
    root = generator.standard_normal((5, 8))
    problem = dln.Problem(generator.standard_normal((3, 5)), None if white else root @ root.T / 8, 0.6)
    width = 1e-3
    times = np.array([0.0, *(t + shift for t in (0.5, 2.0, 5.0) for shift in (-width, 0.0, width))])
    run = dln.flow(
        problem, dln.gaussian([5, 6, 4, 3], 0.7, seed=8), times, record=dln.Record(weights_every=1)
    )
    gram = np.eye(5) if problem.input_gram is None else problem.input_gram
    for middle in (2, 5, 8):
        before, now, after = (run.end_to_end(middle + shift) for shift in (-1, 0, 1))
        velocity = (after - before) / (2 * width)
        gradient = problem.loss_scale * (now @ gram - problem.dense_target())
        wanted = -run.neural_tangent_kernel(middle).apply(gradient)
        # The difference quotient is wrong by width^2, and by 1e-10 / width.
        assert np.linalg.norm(velocity - wanted) < 1e-5 * np.linalg.norm(wanted) + 1e-6
        assert np.linalg.norm(wanted) > 1e-3


def test_kernels_rotate_less_where_training_is_lazy() -> None:
    problem = dln.Problem(np.random.default_rng(9).standard_normal((4, 4)))
    alignments = []
    for last_scale in (0.1, 1.0, 10.0):
        weights = dln.orthogonal([4, 4], 0.1) + dln.orthogonal([4, 4], last_scale, seed=1)
        exact = theory.balanced_flow(problem, weights, [0.0, 200.0])
        np.testing.assert_allclose(exact.end_to_end[1], problem.dense_target(), atol=1e-9)
        alignments.append(exact.kernel(0).alignment(exact.kernel(1)))
    # lambda = 0, 1, 100: from rich to lazy (Domine et al.).
    assert all(rich < lazy for rich, lazy in pairwise(alignments))
    assert alignments[-1] > 0.9999
    assert alignments[0] < 0.99


def test_errors_of_kernels_name_bad_arguments() -> None:
    kernel = theory.neural_tangent_kernel(dln.orthogonal([4, 3]))
    bad: list[tuple[Any, type[Exception], str]] = [
        (lambda: kernel.apply(np.eye(4)), dln.ShapeError, "direction"),
        (lambda: kernel.at(np.eye(3), np.eye(4)), dln.ShapeError, "x has shape"),
        (lambda: kernel.inner(np.eye(12)), TypeError, "other is ndarray"),
        (
            lambda: kernel.alignment(theory.neural_tangent_kernel([np.eye(3)])),
            ValueError,
            r"other has shape \(3, 3\); wanted \(3, 4\)",
        ),
        (
            lambda: theory.neural_tangent_kernel([np.zeros((3, 4))] + [np.zeros((3, 3))] * 2).alignment(
                kernel
            ),
            ValueError,
            "a kernel is zero",
        ),
        (lambda: theory.neural_tangent_kernel([np.eye(3), np.eye(4)]), dln.ShapeError, r"weights\[1\]"),
        (lambda: theory.neural_tangent_kernel([np.eye(3) * 1e200] * 2), ValueError, "products overflow"),
    ]
    for call, error, message in bad:
        with pytest.raises(error, match=message):
            call()
