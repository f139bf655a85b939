# SPDX-License-Identifier: MIT
"""Displays show the values of the run, with bounded numbers of lines."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers.matrices import draw_orthonormal
from matplotlib.figure import Figure
from tolerances import tolerance

import dlnfast as dln
from dlnfast import measures
from dlnfast.plots import (
    AngleDisplay,
    BifurcationDisplay,
    FeatureCompressionDisplay,
    FeatureDiscriminationDisplay,
    LineDisplay,
    LossDisplay,
    RankDisplay,
    SingularValueDisplay,
    linear_fit,
    log_linear_fit,
)

DIM, RANK, DEPTH, STEPS = 12, 2, 3, 20


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def run():
    problem = dln.low_rank_recovery(DIM, RANK)
    return dln.train(problem, dln.orthogonal([DIM] * (DEPTH + 1)), learning_rate=1.0, steps=STEPS)


@pytest.fixture(scope="module")
def classifier():
    problem = dln.classification(3, 4)
    widths = [problem.dim_in] * 4 + [3]
    return dln.train(
        problem,
        dln.orthogonal(widths, 0.5),
        learning_rate=5.0,
        steps=3000,
        tolerance=1e-12,
        record=dln.Record(every=3000),
    )


def render(figure):
    """Render the figure, so that errors of the backend are raised."""
    figure.canvas.draw()


# Figures show the data of the run.


def test_loss_is_drawn_at_every_step(run):
    display = LossDisplay.from_trajectory(run).plot()
    np.testing.assert_array_equal(display.ax_.lines[0].get_ydata(), run.loss)
    assert display.ax_.get_yscale() == "log"
    assert display.figure_ is display.ax_.figure
    assert display.numbers()["loss"] == run.loss.tolist()
    render(display.figure_)


def test_a_loss_floor_at_rounding_level_is_not_drawn():
    problem = dln.classification(5, 10)
    assert 0 < problem.loss_floor < 1e-15
    run = dln.train(problem, dln.orthogonal([50, 50, 5]), learning_rate=1.0, steps=5)
    display = LossDisplay.from_trajectory(run).plot()
    assert len(display.ax_.lines) == 1
    assert display.ax_.get_ylim()[0] > 1e-3 * run.loss.min()
    assert display.numbers()["loss_floor"] == problem.loss_floor


def test_loss_leaves_gaps_for_zeros_and_shows_the_floor():
    display = LossDisplay([1.0, 0.0, 0.5], loss_floor=0.25).plot(color="red")
    assert np.isnan(display.ax_.lines[0].get_ydata()[1])
    assert display.ax_.lines[0].get_color() == "red"
    np.testing.assert_array_equal(display.ax_.lines[1].get_ydata(), [0.25, 0.25])
    render(display.figure_)


@pytest.mark.parametrize("layer", [1, 3])
def test_the_numbers_of_singular_values_equal_the_run(run, layer):
    display = SingularValueDisplay.from_trajectory(run, layer)
    values, numbers = run.singular_values(layer), display.numbers()
    assert display.multiplicity == DIM - 2 * RANK == numbers["middle"]["multiplicity"]
    assert numbers["steps"] == list(range(STEPS + 1))
    np.testing.assert_array_equal(np.transpose(numbers["top"]["values"]), values[:, :RANK])
    np.testing.assert_array_equal(np.transpose(numbers["bottom"]["values"]), values[:, -RANK:])
    assert numbers["bottom"]["indices"] == [DIM - 1, DIM]
    bound = tolerance(np.float64, DIM, STEPS)
    np.testing.assert_allclose(numbers["middle"]["low"], run.rho(layer), rtol=bound)
    np.testing.assert_allclose(numbers["middle"]["high"], run.rho(layer), rtol=bound)
    assert "values" not in numbers["middle"]  # equal values are written once


def test_flat_drawing_has_a_line_per_outer_value_and_one_for_the_block(run):
    display = SingularValueDisplay.from_trajectory(run).plot()
    assert len(display.ax_.lines) == 2 * RANK + 1
    labels = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert labels == ["top 2", "middle 8, equal", "bottom 2"]
    assert r"\sigma_i(t)" in display.ax_.get_ylabel()
    render(display.figure_)


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_a_gradient_flow_is_drawn_over_its_times(engine):
    problem = dln.low_rank_recovery(DIM, RANK)
    times = np.array([0.0, 0.02, 0.1, 0.5])
    weights = dln.orthogonal([DIM] * (DEPTH + 1))
    run = dln.flow(problem, weights, times=times, engine=engine, record=dln.Record(vectors=True))
    loss = LossDisplay.from_trajectory(run).plot()
    np.testing.assert_array_equal(loss.ax_.lines[0].get_xdata(), times)
    assert loss.ax_.get_xlim() == (0.0, 0.5)
    assert loss.numbers()["times"] == times.tolist()
    for kind in (SingularValueDisplay, AngleDisplay):
        for style in ("flat", "waterfall"):
            display = kind.from_trajectory(run).plot(style=style)
            line = display.ax_.lines[0]
            x = line.get_data_3d()[0] if style == "waterfall" else line.get_xdata()
            np.testing.assert_array_equal(x, times[run.steps])
            assert display.ax_.get_xlabel() == loss.ax_.get_xlabel() == "time $t$"
            render(display.figure_)
        numbers = display.numbers()
        assert (numbers["steps"], numbers["times"]) == (run.steps.tolist(), times[run.steps].tolist())
    first = AngleDisplay.from_trajectory(run, reference="first_step").plot()
    assert "v_i(t_1)" in first.ax_.get_ylabel()


def test_steps_stay_the_axis_of_gradient_descent(run):
    for display in (LossDisplay, SingularValueDisplay, AngleDisplay):
        drawn = display.from_trajectory(run).plot()
        assert drawn.ax_.get_xlabel() == "iteration $t$"
        assert drawn.ax_.get_xlim() == (0, STEPS)
        assert "times" not in drawn.numbers()


def test_waterfall_has_a_line_per_value(run):
    display = SingularValueDisplay.from_trajectory(run).plot(style="waterfall", legend=False)
    assert len(display.ax_.lines) == DIM
    assert display.ax_.name == "3d"
    render(display.figure_)


@pytest.mark.parametrize("style", ["flat", "waterfall"])
def test_ten_thousand_values_need_few_lines(style):
    values = np.full((5, 10_000), 0.9)
    values[:, :3], values[:, -3:] = 1.5, 0.5
    display = SingularValueDisplay(range(5), values, rank=3).plot(style=style)
    assert display.multiplicity == 9_994
    assert len(display.ax_.lines) == (7 if style == "flat" else 30)
    assert len(str(display.numbers())) < 2_000
    render(display.figure_)


def test_spread_values_become_a_band():
    values = np.tile(np.linspace(2, 1, 60), (4, 1))
    display = SingularValueDisplay(range(4), values, rank=5).plot()
    assert len(display.ax_.collections) == 1
    np.testing.assert_array_equal(display.numbers()["middle"]["low"], values[:, 54])
    np.testing.assert_array_equal(display.numbers()["middle"]["high"], values[:, 5])
    assert len(display.numbers()["middle"]["values"]) == 24
    render(display.figure_)


@pytest.mark.parametrize(
    ("n_values", "rank", "multiplicity"),
    [
        (5, None, 0),
        (5, 3, 0),
        (5, 0, 5),
        (6, 3, 0),
        (7, 3, 1),
        (200, None, 180),
        (200, 90, 160),
        (1, 1, 0),
    ],
)
def test_every_value_belongs_to_one_group(n_values, rank, multiplicity):
    values = np.linspace(2, 1, n_values)[None, :].repeat(3, axis=0)
    display = SingularValueDisplay(range(3), values, rank=rank)
    numbers = display.numbers()
    outer = sum(len(numbers[group]["indices"]) for group in ("top", "bottom") if group in numbers)
    assert display.multiplicity == multiplicity
    assert outer + multiplicity == n_values
    for style in ("flat", "waterfall"):
        render(display.plot(style=style).figure_)


def test_partial_spectra_are_not_split():
    problem = dln.low_rank_recovery(DIM, RANK)
    run = dln.train(
        problem,
        dln.gaussian([DIM] * 3, 0.5),
        learning_rate=0.1,
        steps=3,
        record=dln.Record(singular_values=6),
    )
    display = SingularValueDisplay.from_trajectory(run)
    assert list(display.numbers()) == ["steps", "top", "errors"]
    assert [handle.get_label() for handle in display.handles()] == ["all 6"]


def test_spectra_without_a_known_rank_are_not_split():
    problem = dln.low_rank_completion(8, 1, observed=0.6, seed=7)
    run = dln.train(
        problem,
        dln.gaussian([8, 3, 8], 0.3),
        learning_rate=0.1,
        steps=3,
        record=dln.Record(singular_values="all"),
    )
    display = SingularValueDisplay.from_trajectory(run)
    assert [handle.get_label() for handle in display.handles()] == ["all 3"]


def test_errors_and_refreshes_are_drawn():
    steps, values = [0, 1, 2], np.array([[3.0, 1.0], [3.0, 1.2], [3.1, 1.0]])
    errors = np.array([[0.0, 0.5], [0.1, 0.5], [1e-9, np.inf]])
    display = SingularValueDisplay(steps, values, errors=errors, refreshes=[0, 2])
    assert display.numbers()["errors"] == errors.tolist()
    assert display.numbers()["refreshes"] == [0, 2]
    ax = display.plot().ax_
    assert len(ax.collections) == 2  # a band around each line
    assert ax.get_ylim()[1] < 4  # an infinite error does not flatten the curves
    plain = SingularValueDisplay(steps, values, errors=np.full((3, 2), 1e-12))
    assert len(plain.plot().ax_.collections) == 0
    render(display.figure_)


@pytest.mark.parametrize(("side", "symbol"), [("right", "v_i"), ("left", "u_i")])
@pytest.mark.parametrize(("reference", "origin"), [("limit", "0^+"), ("first_step", "1")])
def test_angles_are_drawn(run, side, symbol, reference, origin):
    display = AngleDisplay.from_trajectory(run, 1, side, reference).plot()
    angles = run.angles(1, side=side, reference=reference)
    np.testing.assert_array_equal(np.transpose(display.numbers()["top"]["values"]), angles[:, :RANK])
    assert display.numbers()["side"] == side
    assert display.ax_.get_ylabel() == rf"$\angle({symbol}(t),\,{symbol}({origin}))$ [rad]"
    render(display.figure_)


def test_angles_from_reference_vectors_are_drawn(run):
    reference = draw_orthonormal(0, DIM, DIM)
    display = AngleDisplay.from_trajectory(run, 1, "right", reference).plot(style="waterfall")
    assert display.numbers()["reference"] == "custom"
    assert "ref" in display.ax_.get_zlabel()
    render(display.figure_)


def test_compression_is_measured_on_the_features(classifier):
    display = FeatureCompressionDisplay.from_trajectory(classifier)
    labels = classifier.problem.labels
    wanted = [measures.feature_compression(classifier.features(layer), labels) for layer in range(4)]
    # C_l is a ratio of sums of squares; its smallest values lose what the within-class sums cancel.
    np.testing.assert_allclose(display.compression, wanted, rtol=1e-9)
    inputs = classifier.problem.inputs
    at_start = FeatureCompressionDisplay.from_trajectory(classifier, X=inputs, labels=labels, step=0)
    # Orthogonal layers change no distances; 10 for the products of three layers and two sums.
    np.testing.assert_allclose(
        at_start.compression, at_start.compression[0], rtol=tolerance(np.float64, 12) * 10
    )
    display.plot()
    assert display.ax_.get_yscale() == "log"
    assert display.numbers()["fit"]["ratio"] == display.fit.ratio < 1
    render(display.figure_)


def test_compression_needs_labels(run):
    with pytest.raises(ValueError, match="labels is None"):
        FeatureCompressionDisplay.from_trajectory(run)


def test_compression_omits_values_that_a_log_axis_cannot_show():
    display = FeatureCompressionDisplay(
        [0, 1, 2, 3], [8.0, np.inf, 2.0, 0.0], theory=[8.0, 4.0, 2.0, 1.0]
    ).plot()
    assert display.fit.ratio == pytest.approx(0.5)
    assert np.isnan(display.ax_.lines[0].get_ydata()[[1, 3]]).all()
    render(display.figure_)


def test_without_positive_values_the_axis_is_linear():
    for display in (FeatureCompressionDisplay([0, 1], [0.0, 0.0]), LossDisplay([0.0, 0.0])):
        render(display.plot().figure_)
        assert display.ax_.get_yscale() == "linear"


def test_fit_recovers_a_geometric_law():
    layers = np.arange(8)
    fit = log_linear_fit(layers, 11.25 * 0.1875**layers)
    assert fit.ratio == pytest.approx(0.1875, rel=tolerance(np.float64, 8) * 10)
    assert fit.start == pytest.approx(11.25, rel=tolerance(np.float64, 8) * 10)
    assert log_linear_fit([0, 1], [1.0, 0.0]) is None


def test_discrimination_is_measured_on_the_features(classifier):
    display = FeatureDiscriminationDisplay.from_trajectory(classifier, theory=[np.nan, 0.9, 1.0, 1.0])
    labels = classifier.problem.labels
    wanted = [measures.feature_discrimination(classifier.features(layer), labels) for layer in range(4)]
    np.testing.assert_allclose(display.discrimination, wanted, rtol=1e-9)
    display.plot()
    np.testing.assert_array_equal(display.ax_.lines[0].get_ydata(), display.discrimination)
    assert len(display.ax_.lines) == 3
    assert display.numbers()["fit"]["slope"] == display.fit.slope
    render(display.figure_)
    with pytest.raises(ValueError, match="labels is None"):
        FeatureDiscriminationDisplay.from_trajectory(
            dln.train(dln.Problem(np.eye(2)), dln.orthogonal([2, 2]), learning_rate=0.1, steps=0)
        )


def test_fit_recovers_a_line():
    fit = linear_fit([0, 1, 2, 3], [1.0, 0.75, np.nan, 0.25])
    assert fit == pytest.approx((-0.25, 1.0, 1.0))
    assert linear_fit([0, 1, 2], [5.0, 5.0, 5.0]).r_squared == pytest.approx(1.0)
    assert linear_fit([0, 1, 2], [1.0, 0.0, 1.0]).r_squared == pytest.approx(0.0)
    assert linear_fit([0, 1], [1.0, np.inf]) is None


# Lines and cycles.


def test_lines_are_drawn_with_theory_and_levels():
    display = LineDisplay(
        [1, 2, 3],
        {"a": [1.0, np.nan, 3.0], "b": [0.0, 1.0, 2.0]},
        x_label="$t$",
        y_label="$s$",
        theory={"b": [0.5, 1.0, 2.5]},
        levels={"threshold": 2.0},
    ).plot(marker="o")
    assert [line.get_linestyle() for line in display.ax_.lines] == ["-", "-", "--", ":"]
    colours = [line.get_color() for line in display.ax_.lines]
    assert colours[1] == colours[2] != colours[0]
    labels = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert labels == ["a", "b", "threshold"]
    assert (display.ax_.get_xlabel(), display.ax_.get_ylabel()) == ("$t$", "$s$")
    numbers = display.numbers()
    assert numbers["x"] == [1.0, 2.0, 3.0]
    assert numbers["theory"] == {"b": [0.5, 1.0, 2.5]}
    assert numbers["levels"] == {"threshold": 2.0}
    render(display.figure_)


def test_lines_with_error_bars_on_a_logarithmic_axis():
    display = LineDisplay(
        [1, 2],
        {"a": [1.0, 10.0], "b": [2.0, 20.0]},
        x_label="$t$",
        y_label="$s$",
        spread={"b": [0.5, 5.0]},
        log_y=True,
    ).plot()
    assert display.ax_.get_yscale() == "log"
    (bars,) = display.ax_.containers
    assert bars.has_yerr
    np.testing.assert_allclose(bars[2][0].get_segments()[1][:, 1], [15.0, 25.0])
    assert display.numbers()["spread"] == {"b": [0.5, 5.0]}
    with pytest.raises(ValueError, match="spread has 'c'; wanted labels of curves: a"):
        LineDisplay([1], {"a": [1]}, x_label="", y_label="", spread={"c": [1]})


def test_a_loss_that_was_not_recorded_at_every_step_is_drawn():
    display = LossDisplay([1.0, 0.5, 0.1], steps=[0, 10, 20]).plot()
    assert display.ax_.lines[0].get_xdata().tolist() == [0.0, 10.0, 20.0]
    assert display.ax_.get_xlim() == (0.0, 20.0)
    assert display.numbers()["steps"] == [0, 10, 20]
    assert "steps" not in LossDisplay([1.0, 0.5]).numbers()


def test_repeated_values_are_drawn_once():
    visited = {"s": [[1.0, 1.0 + 1e-9, 1.0], [0.8, 1.2, 0.8]], "r": [[2.0, 2.0, 2.0], [3.0, 4.0, 5.0]]}
    display = BifurcationDisplay(
        [0.1, 0.2], visited, x_label="step", y_label="value", thresholds={"s": 0.15}
    ).plot()
    assert display.periods() == {"s": [1, 2], "r": [1, 3]}
    assert display.numbers()["visited"]["s"] == [[1.0], [0.8, 1.2]]
    np.testing.assert_array_equal(display.ax_.lines[0].get_xdata(), [0.1, 0.2, 0.2])
    np.testing.assert_array_equal(display.ax_.lines[1].get_xdata(), [0.15, 0.15])
    render(display.figure_)
    render(BifurcationDisplay([0.1], {"s": [[1.0]]}, x_label="step", y_label="s").plot(legend=False).figure_)


# Axes.


def test_plotting_into_axes_does_not_change_the_state_of_pyplot(run):
    figure = Figure()
    flat, space = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2, projection="3d")
    display = SingularValueDisplay.from_trajectory(run)
    assert display.plot(flat) is display
    assert display.ax_ is flat
    assert display.figure_ is figure
    AngleDisplay.from_trajectory(run).plot(space, style="waterfall")
    LossDisplay.from_trajectory(run).plot(flat)
    assert plt.get_fignums() == []


def test_subfigures_are_drawn_into(run):
    figure = Figure()
    display = LossDisplay.from_trajectory(run).plot(figure.subfigures(1, 2)[0].subplots())
    assert display.figure_ is figure


@pytest.mark.parametrize(("style", "projection"), [("flat", "3d"), ("waterfall", "rectilinear")])
def test_an_error_names_a_wrong_projection(run, style, projection):
    ax = Figure().add_subplot(projection=projection)
    with pytest.raises(ValueError, match="ax has projection"):
        SingularValueDisplay.from_trajectory(run).plot(ax, style=style)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SingularValueDisplay([0], [[1.0]]).plot(style="bars"), ValueError, "style is 'bars'"),
        (lambda: AngleDisplay([0], [[1.0]], side="up"), ValueError, "side is 'up'"),
        (lambda: SingularValueDisplay([0, 1], [[1.0]]), dln.ShapeError, "steps"),
        (lambda: SingularValueDisplay([0], [[np.nan]]), ValueError, "singular_values"),
        (lambda: SingularValueDisplay([0], [[1.0]], rank=-1), ValueError, "rank"),
        (lambda: FeatureCompressionDisplay([0, 1], [1.0]), dln.ShapeError, "compression"),
        (lambda: LossDisplay([]), dln.ShapeError, "loss"),
        (lambda: LossDisplay([1.0, 0.5], times=[0.0]), dln.ShapeError, "times"),
        (lambda: SingularValueDisplay([0], [[1.0]], times=[0.0, 1.0]), dln.ShapeError, "times"),
        (lambda: FeatureDiscriminationDisplay([0], [np.nan]), ValueError, "discrimination"),
        (lambda: LineDisplay([0], {"a": [1, 2]}, x_label="", y_label=""), dln.ShapeError, "curves"),
        (
            lambda: LineDisplay([0], {"a": [1]}, x_label="", y_label="", theory={"b": [1]}),
            ValueError,
            "theory has 'b'; wanted labels of curves: a",
        ),
        (
            lambda: BifurcationDisplay([0], {"a": [[1], [2]]}, x_label="", y_label=""),
            dln.ShapeError,
            "visited",
        ),
    ],
)
def test_errors_name_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_ranks_are_counted_and_drawn():
    display = RankDisplay({"a": [0, 2, 2], "b": [1]}).plot()
    assert display.numbers()["counts"] == {"a": [1, 0, 2], "b": [0, 1, 0]}
    assert [bar.get_height() for bar in display.ax_.patches] == [1, 0, 2, 0, 1, 0]
    assert [text.get_text() for text in display.ax_.get_legend().get_texts()] == ["a", "b"]
    render(display.figure_)


def test_ranks_of_a_run_are_those_above_a_share_of_the_largest_value(run):
    (label, ranks), *_ = RankDisplay.from_trajectory(run, 0.5).ranks.items()
    assert label == "above 0.5 of the largest"
    top = max(run.singular_values(layer)[-1, 0] for layer in range(1, DEPTH + 1))
    assert ranks == [int(np.sum(run.singular_values(i)[-1] > 0.5 * top)) for i in range(1, DEPTH + 1)]


def test_errors_name_bad_ranks():
    with pytest.raises(ValueError, match="ranks is empty"):
        RankDisplay({})
    with pytest.raises(ValueError, match=r"ranks\['a'\] is -1"):
        RankDisplay({"a": [-1]})


def test_an_envelope_has_both_values_of_a_cycle_of_two():
    values = [1.0, 1.0, 3.0, 1.0, 3.0, 1.0]
    for display in (LineDisplay(range(6), {"s": values}, x_label="t", y_label="s"), LossDisplay(values)):
        display.plot(envelope=2)
        high, low = display.ax_.get_lines()[:2]
        np.testing.assert_array_equal(high.get_xdata(), range(5))
        np.testing.assert_array_equal(high.get_ydata(), [1, 3, 3, 3, 3])
        np.testing.assert_array_equal(low.get_ydata(), [1, 1, 1, 1, 1])
        assert len(display.ax_.collections) == 1
        with pytest.raises(ValueError, match="envelope is 0"):
            display.plot(envelope=0)
