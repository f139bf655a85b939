# SPDX-License-Identifier: MIT
"""Gradient flow: the integrator, both engines against plain NumPy and closed forms, records and files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers.interruption import StopTraining, stop_at
from helpers.matrices import draw_low_rank, draw_orthonormal
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast import reference, theory
from dlnfast._support.dormand_prince import ERRORS, INTERPOLANT, STAGES
from dlnfast._support.ode import StepLimitError, StepSizeError, Tolerance, integrate

Array = npt.NDArray[np.float64]


# ------------------------------------------------------------------------------------------- the integrator


def test_coefficients_satisfy_the_order_conditions_of_quadrature() -> None:
    nodes = STAGES.sum(axis=1)
    np.testing.assert_allclose(nodes[[11, 12]], 1.0, rtol=1e-14)
    weights = STAGES[12]
    for power in range(8):
        assert weights @ nodes**power == pytest.approx(1 / (power + 1), rel=1e-13)
        # The embedded methods have orders 5 and 3, and their stage 12 is the slope at the new state.
        if power < 5:
            assert abs(ERRORS[0] @ nodes[:13] ** power) < 1e-14
        if power < 3:
            assert abs(ERRORS[1] @ nodes[:13] ** power) < 1e-14
    # The interpolant is exact for constant slopes: all its correction terms vanish.
    np.testing.assert_allclose(INTERPOLANT.sum(axis=1), 0.0, atol=1e-12)


def oscillate(state: Array, out: Array) -> None:
    """Write the slope of a pendulum of two masses, which has no closed form."""
    out[:2] = state[2:]
    out[2:] = -np.sin(state[:2]) - 0.3 * (state[:2] - state[1::-1])


def solve(slope: Any, start: Any, times: Array, relative: float = 1e-11, **options: Any) -> Array:
    limit = options.pop("max_steps", 10**5)
    allowed = Tolerance(relative, 1e-3 * relative, **options)
    found = list(integrate(slope, np.array(start, dtype=float), times, allowed, limit))
    np.testing.assert_array_equal([time for time, _ in found], times)
    return np.array([state for _, state in found])


def test_integrator_agrees_with_scipy() -> None:
    integrators = pytest.importorskip("scipy.integrate", reason="SciPy is optional")
    times = np.linspace(0.0, 20.0, 301)
    start = [1.0, -0.5, 0.0, 0.3]

    def slope(time: float, state: Array) -> Array:
        del time
        out = np.empty(4)
        oscillate(state, out)
        return out

    wanted = integrators.solve_ivp(
        slope, (0.0, 20.0), start, method="DOP853", t_eval=times, rtol=1e-12, atol=1e-14
    ).y.T
    np.testing.assert_allclose(solve(oscillate, start, times), wanted, rtol=0, atol=1e-9)


def test_errors_decrease_with_the_tolerance_to_order_eight() -> None:
    def grow(state: Array, out: Array) -> None:
        counts[-1] += 1
        out[:] = 2.0 * state * (1.0 - state)

    times = np.linspace(0.0, 12.0, 200)
    exact = 1 / (1 + (1e5 - 1) * np.exp(-2 * times))
    errors, counts = [], []
    for relative in (1e-6, 1e-8, 1e-10, 1e-12):
        counts.append(0)
        found = solve(grow, [1e-5], times, relative)[:, 0]
        errors.append(float(np.max(np.abs(found - exact))))
    for i, relative in enumerate((1e-6, 1e-8, 1e-10, 1e-12)):
        assert errors[i] < 20 * relative
    # A method of order 8 needs 10^(6/8) = 5.6 times as many steps for six more digits.
    assert counts[-1] < 8 * counts[0]


def test_integrator_meets_single_times_and_empty_states() -> None:
    assert solve(oscillate, [1.0, 0.0, 0.0, 0.0], np.array([0.0])).shape == (1, 4)
    states = solve(lambda state, out: None, [], np.array([0.0, 1.0]), segments=())
    assert states.shape == (2, 0)
    still = solve(lambda state, out: out.fill(0.0), [0.0, 2.0], np.array([0.0, 1.0, 1e9]))
    np.testing.assert_array_equal(still, [[0.0, 2.0]] * 3)


def test_blow_up_and_step_limit_are_errors_with_the_time_reached() -> None:
    def explode(state: Array, out: Array) -> None:
        out[:] = state**2

    with pytest.raises(StepSizeError, match="too small at t = 1") as blown:
        solve(explode, [1.0], np.array([0.0, 0.5, 2.0]))
    assert blown.value.time == pytest.approx(1.0, abs=1e-9)
    with pytest.raises(StepSizeError):
        solve(lambda state, out: out.fill(np.nan), [1.0], np.array([0.0, 1.0]))
    with pytest.raises(StepLimitError, match="largest number of steps") as limited:
        solve(oscillate, [1.0, 0.0, 0.0, 0.0], np.array([0.0, 1e6]), max_steps=5)
    assert 0.0 < limited.value.time < 100.0


def test_allowed_errors_are_relative_to_entries_but_not_below_rounding_of_their_segment() -> None:
    allowed = Tolerance(1e-10, 1e-14, segments=[0, 2, 3]).sizes(np.array([1.0, 1e-9, 1e-9, 0.0]))
    eps = np.finfo(float).eps
    assert allowed[0] == pytest.approx(1e-10, rel=1e-3)
    assert allowed[1] == 1e-14 + 1e-19 or allowed[1] == 32 * eps
    assert allowed[2] == pytest.approx(1e-14 + 1e-19)
    assert allowed[3] == 1e-14


# ------------------------------------------------------------------------------------------- both engines


def weights_at(run: dln.Trajectory) -> list[list[Array]]:
    return [run.all_weights(int(step)) for step in run.steps]


def largest_difference(found: list[list[Array]], wanted: list[list[Array]]) -> float:
    return max(
        float(np.max(np.abs(one - other)))
        for layers, others in zip(found, wanted, strict=True)
        for one, other in zip(layers, others, strict=True)
    )


@settings(max_examples=15, deadline=None)
@given(
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    white=st.booleans(),
    decay=st.booleans(),
    seed=st.integers(0, 99),
)
def test_whole_layers_follow_plain_runge_kutta(
    widths: list[int], white: bool, decay: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    target = generator.standard_normal((widths[-1], widths[0]))
    root = generator.standard_normal((widths[0], widths[0] + 1))
    problem = dln.Problem(target, None if white else root @ root.T / len(root), 0.4)
    weights = dln.gaussian(widths, 0.8, seed=seed)
    decays = [0.1 * (i + 1) * decay for i in range(len(weights))]
    times = [0.0, 0.3, 1.0]
    run = dln.flow(
        problem, weights, times, weight_decay=decays, engine="dense", record=dln.Record(weights_every=1)
    )
    wanted = list(
        reference.gradient_flow(
            weights, target, input_gram=problem.input_gram, loss_scale=0.4, weight_decay=decays,
            times=times, steps=400,
        )
    )  # fmt: skip
    # The plain method has an error of about (0.7 / 400)^4.
    assert largest_difference(weights_at(run), wanted) < 1e-8
    losses = [problem.loss(reference.end_to_end(layers)) for layers in weights_at(run)]
    np.testing.assert_allclose(run.loss, losses, rtol=tolerance(np.float64, 36), atol=1e-14)


SETTINGS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "square": ([12] * 4, {}),
    "square with decay": ([12] * 4, {"weight_decay": [0.0, 0.02, 0.1]}),
    "narrow first layer": ([8, 14, 14, 14], {"weight_decay": [0.01, 0.0, 0.05]}),
    "wide last layer": ([15, 15, 15, 3], {"weight_decay": 0.03}),
    "two layers": ([10, 10, 10], {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_cores_and_scalars_are_the_flow_of_whole_layers(name: str) -> None:
    widths, options = SETTINGS[name]
    problem = dln.Problem(draw_low_rank(0, widths[-1], widths[0], [2.0, 1.0]), loss_scale=0.7)
    weights = dln.orthogonal(widths, 0.4, seed=2)
    times = np.linspace(0.0, 15.0, 16)
    small, whole = (
        dln.flow(problem, weights, times, engine=engine, record=dln.Record(weights_every=1), **options)
        for engine in ("reduced", "dense")
    )
    assert small.engine == "reduced"
    assert whole.engine == "dense"
    assert len(small.families()) > 0
    assert largest_difference(weights_at(small), weights_at(whole)) < 2e-10
    np.testing.assert_allclose(small.loss, whole.loss, rtol=0, atol=2e-10 * whole.loss[0])
    for layer in range(1, small.n_layers + 1):
        np.testing.assert_allclose(
            small.singular_values(layer), whole.singular_values(layer), rtol=0, atol=2e-10
        )


def test_scalars_of_square_layers_follow_their_closed_form() -> None:
    problem = dln.low_rank_recovery(30, 3, seed=0)
    times = np.linspace(0.0, 300.0, 31)
    run = dln.flow(problem, dln.orthogonal([30] * 4), times)
    wanted = theory.rho_flow(times, 1.0, 3, problem.loss_scale, 1.0)
    for layer in (1, 2, 3):
        np.testing.assert_allclose(run.rho(layer), wanted, rtol=1e-12)
    # A wide last layer has decay only.
    run = dln.flow(dln.classification(3, 6), dln.orthogonal([18, 18, 3], 0.5), times, weight_decay=0.01)
    np.testing.assert_allclose(run.rho(1), 0.5 * np.exp(-0.01 * times), rtol=1e-12)


@pytest.mark.parametrize("engine", ["reduced", "dense"])
@pytest.mark.parametrize(("n_layers", "scale", "last"), [(2, 1e-3, 14.0), (3, 0.05, 70.0), (4, 0.2, 60.0)])
def test_flow_is_within_1e9_of_the_closed_form_over_the_whole_sigmoid(
    engine: str, n_layers: int, scale: float, last: float
) -> None:
    sigma = np.array([3.0, 2.0, 1.0])
    problem = dln.Problem(draw_low_rank(1, 20, 20, sigma))
    weights = dln.aligned(problem, [20] * (n_layers + 1), scale=scale)
    times = np.linspace(0.0, last, 101)
    run = dln.flow(problem, weights, times, engine=engine, record=dln.Record(weights_every=1))
    factors = problem.target_factors()
    modes = np.array([np.diag(factors.U.T @ run.end_to_end(int(i)) @ factors.V) for i in run.steps])
    for i, value in enumerate(sigma):
        exact = theory.mode_strength(times, value, scale**n_layers, n_layers=n_layers)
        assert exact[0] < 0.01 * value
        assert exact[-1] > 0.99 * value
        assert np.max(np.abs(modes[:, i] - exact)) < 1e-9


def test_gradient_descent_converges_to_the_flow_at_first_order() -> None:
    problem = dln.Problem(draw_low_rank(3, 10, 10, [2.0, 1.0]))
    weights = dln.orthogonal([10] * 4, 0.5, seed=4)
    last = 4.0
    exact = dln.flow(problem, weights, [0.0, last]).end_to_end()
    rates = [0.04, 0.02, 0.01, 0.005]
    errors = []
    for rate in rates:
        run = dln.train(problem, weights, learning_rate=rate, steps=round(last / rate))
        errors.append(float(np.linalg.norm(run.end_to_end() - exact)))
    slopes = [np.log2(large / small) for large, small in pairwise(errors)]
    assert errors[0] < 0.2
    # The slopes tend to 1, with a deviation of O(rate).
    assert abs(slopes[-1] - 1) < 0.02
    assert abs(slopes[0] - 1) < 0.15


def test_a_million_dimensions_take_seconds() -> None:
    dim = 10**6
    problem = dln.low_rank_recovery(dim, 3, seed=0)
    weights = dln.orthogonal([dim] * 4, 0.1, implicit=True)
    times = np.linspace(0.0, 2e10, 21)
    run = dln.flow(problem, weights, times)
    assert run.engine == "reduced"
    wanted = theory.rho_flow(times, 0.1, 3, problem.loss_scale, 1.0)
    np.testing.assert_allclose(run.rho(2), wanted, rtol=1e-12)
    # All three modes are learned: only the complement remains.
    floor = problem.loss_scale / 2 * (dim - 6) * wanted[-1] ** 6
    assert run.loss[-1] == pytest.approx(floor, rel=1e-3)
    assert run.wall_time < 30.0
    assert run.layer(1).entry(5, 7) == pytest.approx(run.layer(1).column(7)[5], abs=1e-12)


# ------------------------------------------------------------------------------------------- records


def small_problem() -> dln.Problem:
    return dln.Problem(draw_low_rank(5, 8, 8, [2.0, 1.0]))


def small_flow(**options: Any) -> dln.Trajectory:
    arguments: dict[str, Any] = {"times": np.linspace(0.0, 3.0, 13)} | options
    return dln.flow(small_problem(), dln.orthogonal([8] * 3, 0.5), **arguments)


def test_records_of_whole_layers_hold_values_vectors_and_angles() -> None:
    run = small_flow(engine="dense", record=dln.Record(vectors=True, weights_every=4))
    assert run.outcome == "finished"
    np.testing.assert_array_equal(run.states.snapshot_steps, [0, 4, 8, 12])
    for step in (0, 4, 12):
        weight = run.weights(2, step)
        np.testing.assert_allclose(
            run.singular_values(2)[step], np.linalg.svd(weight, compute_uv=False), atol=1e-13
        )
        left, right = (run.singular_vectors(2, side, step) for side in ("left", "right"))
        np.testing.assert_allclose(left * run.singular_values(2)[step] @ right.T, weight, atol=1e-13)
    assert set(run.branches(1)[-1]) == set(range(8))
    reduced = small_flow(engine="reduced")
    np.testing.assert_allclose(run.angles(1)[:, :2], reduced.angles(1)[:, :2], atol=1e-6)
    few = small_flow(engine="dense", record=dln.Record(singular_values=3))
    np.testing.assert_allclose(few.singular_values(1), run.singular_values(1)[:, :3], atol=1e-14)
    assert np.all(few.branches(1) == -1)
    assert few.ranks(0.9) == run.ranks(0.9)
    with pytest.raises(ValueError, match="no singular values"):
        small_flow(engine="dense", record=dln.Record(singular_values=None)).singular_values(1)


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_files_keep_the_times(engine: str, tmp_path: Path) -> None:
    run = small_flow(engine=engine)
    np.testing.assert_array_equal(run.steps, np.arange(13))
    assert run.times is not None
    run.save(tmp_path / "run.npz")
    again = dln.load(tmp_path / "run.npz")
    np.testing.assert_array_equal(again.times, run.times)
    np.testing.assert_array_equal(again.loss, run.loss)
    np.testing.assert_array_equal(again.end_to_end(), run.end_to_end())
    assert again.config == run.config
    assert again.config["method"] == "flow"
    # Thinned records keep the losses of all times.
    thin = dln.load(tmp_path / "run.npz", every=5)
    np.testing.assert_array_equal(thin.steps, [0, 5, 10, 12])
    np.testing.assert_array_equal(thin.times, run.times)
    assert dln.train(small_problem(), dln.orthogonal([8] * 3), learning_rate=0.1, steps=2).times is None


def test_damaged_times_are_refused() -> None:
    metadata, arrays = small_flow().to_arrays()
    for damaged, message in (
        (arrays["times"][:-1], "times has shape"),
        (arrays["times"][::-1], "times does not increase"),
        (np.where(arrays["times"] > 2.0, np.nan, arrays["times"]), "times has values that are not finite"),
        (arrays["times"].astype(np.float32), "times has dtype float32"),
    ):
        with pytest.raises(ValueError, match=message):
            dln.Trajectory.from_arrays(metadata, {**arrays, "times": damaged})


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_exports_hold_the_times(engine: str, tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray", reason="xarray is optional")
    pytest.importorskip("zarr", reason="zarr is optional")
    run = small_flow(engine=engine)
    data = run.to_xarray()
    np.testing.assert_array_equal(data["times"], run.times)
    assert data["times"].dims == ("loss_step",)
    dln.export(run, tmp_path / "run.zarr", every=3)
    stored = xarray.open_zarr(tmp_path / "run.zarr").load()
    np.testing.assert_array_equal(stored["times"], run.times)
    np.testing.assert_array_equal(stored["step"], run.steps[::3])
    np.testing.assert_array_equal(stored["singular_values"], data["singular_values"][::3])


def test_tables_hold_the_times() -> None:
    pytest.importorskip("pandas", reason="pandas is optional")
    run = small_flow()
    table = run.to_dataframe(form="wide")
    assert run.times is not None
    np.testing.assert_array_equal(table.times, run.times[table.step])


# ------------------------------------------------------------------------------- interruptions and errors


def test_a_callback_ends_the_run_or_raises_with_the_records_so_far() -> None:
    run = small_flow(record=dln.Record(callback=lambda step, loss: step == 4))
    assert run.outcome == "stopped"
    np.testing.assert_array_equal(run.times, np.linspace(0.0, 3.0, 13)[:5])
    for engine in ("reduced", "dense"):
        with pytest.raises(StopTraining) as stopped:
            small_flow(engine=engine, record=dln.Record(callback=stop_at(6)))
        partial = stopped.value.trajectory  # type: ignore[attr-defined]
        assert partial.outcome == "interrupted"
        assert len(partial.steps) == len(partial.times) == len(partial.loss) == 7


def test_ctrl_c_carries_the_records_so_far() -> None:
    def press(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as pressed:
        small_flow(record=dln.Record(callback=press))
    assert len(pressed.value.trajectory.steps) == 4  # type: ignore[attr-defined]


def test_too_few_steps_are_an_error_with_the_records_so_far() -> None:
    with pytest.raises(ValueError, match=r"max_steps is 9, which reaches t = .*; wanted more") as limited:
        small_flow(times=[0.0, 0.1, 1e6], max_steps=9)
    partial = limited.value.trajectory  # type: ignore[attr-defined]
    np.testing.assert_array_equal(partial.times, [0.0, 0.1])


@pytest.mark.filterwarnings("ignore:overflow")
def test_overflow_is_a_divergence() -> None:
    huge = [np.eye(2) * 1e160] * 2
    with pytest.raises(dln.DivergedError, match="not finite at t = 0") as start:
        dln.flow(dln.Problem(np.eye(2)), huge, [0.0, 1.0])
    assert start.value.step == 0
    assert start.value.trajectory is None
    # The loss is finite, its gradient is not.
    with pytest.raises(dln.DivergedError, match="no step size meets rtol after t = 0") as later:
        dln.flow(
            dln.Problem(np.eye(1)), [np.eye(1) * scale for scale in (1e100, 1e100, 1e100, 1e-290)], [0, 1]
        )
    assert later.value.step == 1
    assert later.value.trajectory.outcome == "diverged"


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "decreasing": ({"times": [0.0, 2.0, 1.0]}, ValueError, r"times\[2\] is 1 after 2"),
    "equal": ({"times": [0.0, 1.0, 1.0]}, ValueError, r"times\[2\] is 1 after 1"),
    "late": ({"times": [1.0, 2.0]}, ValueError, "times begins with 1; wanted 0"),
    "no times": ({"times": []}, dln.ShapeError, "times .* is empty"),
    "NaN": ({"times": [0.0, np.nan]}, ValueError, "times .* not finite"),
    "table": ({"times": [[0.0, 1.0]]}, dln.ShapeError, "times .* wanted a vector"),
    "negative rtol": ({"rtol": -1e-6}, ValueError, "rtol is -1e-06"),
    "rtol 0": ({"rtol": 0.0}, ValueError, "rtol is 0"),
    "negative atol": ({"atol": -1.0}, ValueError, "atol is -1"),
    "decay": ({"weight_decay": [0.1, 0.2, 0.3]}, dln.ShapeError, "weight_decay"),
    "engine": ({"engine": "torch"}, ValueError, "engine is 'torch'"),
    "record": ({"record": "all"}, TypeError, "record is str"),
    "every": ({"record": dln.Record(every=2)}, ValueError, "record.every is 2; wanted 1"),
    "tracking": ({"record": dln.Record(tracking="dense")}, ValueError, "record.tracking is 'dense'"),
    "max_steps": ({"max_steps": 0}, ValueError, "max_steps is 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_bad_arguments(name: str) -> None:
    options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        small_flow(**options)


def test_problems_and_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TypeError, match=r"problem is Completion; wanted a dlnfast\.Problem"):
        dln.flow(dln.low_rank_completion(8, 2, 0.5), dln.orthogonal([8] * 3), [0.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weights have dtype float32; wanted float64"):
        dln.flow(small_problem(), dln.orthogonal([8] * 3, dtype=np.float32), [0.0])
    with pytest.raises(dln.ShapeError, match="wanted 8"):
        dln.flow(small_problem(), dln.orthogonal([8, 8, 7]), [0.0])
    with pytest.raises(dln.AssumptionError, match="reduced"):
        dln.flow(small_problem(), dln.gaussian([8] * 3), [0.0], engine="reduced")
    with pytest.raises(dln.AssumptionError, match="lazily sampled"):
        dln.flow(small_problem(), dln.orthogonal([8] * 3, implicit=True), [0.0], engine="dense")


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_targets_and_layers_of_zeros_are_allowed(engine: str) -> None:
    times = [0.0, 1.0, 4.0]
    run = dln.flow(dln.Problem(np.zeros((4, 4))), dln.orthogonal([4] * 3, 0.5), times, engine=engine)
    # All of W is one scalar: W_{2:1} = rho^2 Q.
    rho = theory.rho_flow(times, 0.5, 2, 1.0, 1.0)
    np.testing.assert_allclose(run.loss, 2 * rho**4, rtol=1e-10)
    still = dln.flow(dln.Problem(np.eye(4)), [np.zeros((4, 4))] * 2, times, engine=engine)
    np.testing.assert_array_equal(still.loss, [2.0, 2.0, 2.0])


def test_huge_weights_shrink_to_the_minimum() -> None:
    times = [0.0, 1e-100, 1e-10, 1.0]
    run = dln.flow(dln.Problem(np.eye(1)), [np.eye(1) * 1e75] * 2, times, record=dln.Record(weights_every=1))
    found = [float(run.end_to_end(step)[0, 0]) for step in range(4)]
    np.testing.assert_allclose(found, theory.mode_strength(times, 1.0, 1e150), rtol=1e-9)


def test_weights_of_the_caller_do_not_change() -> None:
    weights = [draw_orthonormal(i, 8, 8) for i in range(2)]
    before = [weight.copy() for weight in weights]
    run = dln.flow(small_problem(), weights, [0.0, 1.0], engine="dense")
    np.testing.assert_array_equal(weights, before)
    assert not np.array_equal(run.weights(1), before[0])


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_callbacks_may_read_the_state(engine):
    problem, weights = dln.low_rank_recovery(12, 2, seed=0), dln.orthogonal([12] * 3, 0.5)
    seen = []

    def stop(state):
        seen.append((state.step, state.weights(), state.singular_values(1), len(state.losses)))
        return state.step == 3

    run = dln.flow(problem, weights, np.linspace(0, 5, 9), engine=engine, record=dln.Record(callback=stop))
    assert run.outcome == "stopped"
    assert [step for step, *_ in seen] == [0, 1, 2, 3]
    for step, layers, values, n_losses in seen:
        np.testing.assert_allclose(values, np.linalg.svd(layers[0], compute_uv=False), atol=1e-12)
        np.testing.assert_allclose(values, run.singular_values(1)[step], atol=1e-12)
        assert n_losses == step + 1
