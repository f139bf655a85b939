# SPDX-License-Identifier: MIT
"""Modes of a deep linear network that do not settle: learning rates around and beyond the threshold.

Ghosh, Kwon, Wang, Ravishankar, Qu, "Learning Dynamics of Deep Linear Networks Beyond the Edge of Stability"
(arXiv 2502.20531): a mode of the target oscillates, in a cycle of two steps at first, where the learning rate
is above two over its sharpness; larger rates double the period, and then there is none.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import measures, theory
from .._problem.problem import Problem
from .._support.arrays import check_count
from .._training.options import Record
from .._training.train import train
from .._trajectory.trajectory import Trajectory
from ..plots import COLOURS, BifurcationDisplay, LineDisplay, LossDisplay
from . import Result, setting
from ._captions import set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Array = npt.NDArray[np.float64]

#: Settings for --quick.
QUICK = {"sweep_points": 70, "sweep_steps": 6000, "sharpness_every": 15}
#: Losses below are not shown, so that those that oscillate can be seen.
_LEAST_LOSS = 1e-6
#: Strengths that differ by less, relative to the largest singular value, are the same.
_SAME = 1e-5
#: A mode that visits more values than this in the recorded iterations counts as chaotic.
_LONGEST_PERIOD = 16
#: Both values of a cycle of two are drawn, not the jumps between them.
_STYLES: dict[str, dict[str, Any]] = {
    "modes": {"legend": False, "linewidth": 1.1, "envelope": 2},
    "loss": {"color": "#333333", "linewidth": 1.1, "envelope": 2},
    "sharpness": {"legend": False, "linewidth": 1.1, "colors": ("#333333",), "envelope": 2},
}


@dataclass(frozen=True)
class Settings:
    """L = 3, target diag(10, 9.5, 9, 0, 0), W_3(0) = 0 and the others 0.01 I, on the sum of squares.

    The published rates lie between 0.0305 and 0.0363. Which of them are drawn, one for each number of modes
    that oscillate, is our choice; so is the reach of the sweep, beyond that interval to where the period
    doubles.
    """

    singular_values: tuple[float, ...] = setting((10.0, 9.5, 9.0), "sigma_i of the target")
    dim: int = setting(5, "d, width of the network")
    depth: int = setting(3, "L, number of layers")
    scale: float = setting(0.01, "alpha; W_l(0) = alpha I, and 0 for the last layer")
    learning_rates: tuple[float, ...] = setting((0.0305, 0.032, 0.0335, 0.0363), "eta, one column each")
    steps: int = setting(1200, "iterations")
    sharpness_every: int = setting(5, "iterations between two measurements of the sharpness; odd")
    sweep_from: float = setting(0.0297, "lowest eta of the sweep")
    sweep_to: float = setting(0.048, "highest eta of the sweep")
    sweep_points: int = setting(280, "number of eta in the sweep")
    sweep_steps: int = setting(20_000, "iterations before the recorded ones")
    late: int = setting(64, "recorded iterations, in which a mode counts as oscillating")


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Train at a few rates, recording everything, and at many, recording the end."""
    depth = check_count(settings.depth, "depth")
    check_count(settings.late, "late", minimum=2)
    check_count(settings.sharpness_every, "sharpness_every")
    check_count(settings.sweep_points, "sweep_points")
    values = np.array(settings.singular_values)
    if values.size > settings.dim or np.any(np.diff(values) > 0):
        raise ValueError(
            f"singular_values is {values.tolist()}; wanted at most dim = {settings.dim}, descending"
        )
    problem = Problem(np.diag(np.pad(values, (0, settings.dim - values.size))))
    thresholds = {
        label: theory.stability_threshold(sigma, depth)
        for label, sigma in zip(_labels(settings), values, strict=True)
    }
    columns = [_column(settings, problem, eta, thresholds, progress) for eta in settings.learning_rates]
    start = time.perf_counter()
    sweep = _sweep(settings, problem, thresholds)
    displays = {"columns": [display for display, _ in columns], "sweep": sweep}
    records = [record for _, record in columns]
    numbers: dict[str, Any] = {
        "problem": problem.describe(),
        "thresholds": thresholds,
        "columns": records,
        "sweep": sweep.numbers(),
        "onsets": _onsets(sweep, period=1),
        "period_doublings": _onsets(sweep, period=2),
        "chaos": _onsets(sweep, period=_LONGEST_PERIOD),
        "sweep_seconds": time.perf_counter() - start,
    }
    highlights = [_line(record) for record in records]
    for sigma, (label, threshold) in zip(values, thresholds.items(), strict=True):
        onset, doubling, chaos = (
            _describe_interval(numbers[name][label]) for name in ("onsets", "period_doublings", "chaos")
        )
        highlights.append(
            f"sigma = {sigma:<4g} starts to oscillate {onset} (theory {threshold:.5f}), and its cycle of two "
            f"{doubling}; more than {_LONGEST_PERIOD} values, chaos, {chaos}"
        )
    return Result(displays, numbers, highlights)


def _labels(settings: Settings) -> list[str]:
    return [rf"$\sigma_{i} = {sigma:g}$" for i, sigma in enumerate(settings.singular_values, start=1)]


def _make_initial(settings: Settings) -> tuple[list[float], list[_Array]]:
    """Return alpha, .., alpha, 0 and the layers of those scales."""
    scales = [settings.scale] * (settings.depth - 1) + [0.0]
    return scales, [alpha * np.eye(settings.dim) for alpha in scales]


def _strengths(problem: Problem, run: Trajectory, steps: range) -> _Array:
    """Return the strength of every mode at recorded steps, shape (n, r)."""
    found = [measures.mode_strengths(problem, run.end_to_end(int(step))) for step in steps]
    return np.array(found, dtype=np.float64)


def _column(
    settings: Settings, problem: Problem, eta: float, thresholds: dict[str, float], progress: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train at one rate; return the panels and the numbers of its column."""
    start = time.perf_counter()
    scales, weights = _make_initial(settings)
    run = train(
        problem,
        weights,
        learning_rate=eta,
        steps=settings.steps,
        record=Record(weights_every=1, singular_values=None, progress=progress),
    )
    labels, sigma = list(thresholds), np.array(settings.singular_values)
    found = _strengths(problem, run, range(settings.steps + 1))
    recursion = theory.aligned_modes(
        sigma, settings.depth, steps=settings.steps, scale=scales, learning_rate=eta
    ).prod(axis=1)
    spread = np.ptp(found[-settings.late :], axis=0)
    times = np.arange(0, settings.steps + 1, settings.sharpness_every)
    layers = range(1, settings.depth + 1)
    sharp = [
        measures.sharpness(problem, [run.weights(layer, int(t)) for layer in layers], tolerance=1e-4)
        for t in times
    ]
    last = np.array(sharp)[times > settings.steps - settings.late - 1]
    levels = {
        r"$2/\eta$": 2 / eta,
        r"$L\,\sigma_1^{2-2/L}$, balanced minimum": 2 / thresholds[labels[0]],
    }
    panels: dict[str, Any] = {
        "modes": LineDisplay(
            np.arange(settings.steps + 1),
            dict(zip(labels, found.T, strict=True)),
            x_label="iteration $t$",
            y_label=r"mode $u_i^\top W_{L:1}(t)\, v_i$",
        ),
        "loss": LossDisplay.from_trajectory(run),
        "sharpness": LineDisplay(
            times,
            {"largest eigenvalue of the Hessian": sharp},
            x_label="iteration $t$",
            y_label="sharpness",
            levels=levels,
        ),
    }
    record = {
        "learning_rate": eta,
        "oscillating": int(np.sum(spread > _SAME * sigma[0])),
        "oscillating_in_theory": sum(eta > threshold for threshold in thresholds.values()),
        "late_low": found[-settings.late :].min(axis=0),
        "late_high": found[-settings.late :].max(axis=0),
        "late_sharpness_low": float(last.min()) if last.size else None,
        "late_sharpness_high": float(last.max()) if last.size else None,
        "difference_from_recursion": float(np.max(np.abs(found - recursion))),
        "engine": run.engine,
        "why": str(run.certificate),
        **{name: panel.numbers() for name, panel in panels.items()},
        "seconds": time.perf_counter() - start,
    }
    return panels, record


def _sweep(settings: Settings, problem: Problem, thresholds: dict[str, float]) -> BifurcationDisplay:
    """Train at many rates and keep the strengths of the modes at the end."""
    rates = np.linspace(settings.sweep_from, settings.sweep_to, settings.sweep_points)
    late = []
    for eta in rates:
        run = train(
            problem,
            _make_initial(settings)[1],
            learning_rate=float(eta),
            steps=settings.sweep_steps,
            record=Record(every=max(settings.sweep_steps, 1), singular_values=None),
        )
        # Without momentum the weights are the whole state: the next run continues from the last weights.
        end = [run.weights(layer) for layer in range(1, settings.depth + 1)]
        record = Record(singular_values=None, weights_every=1)
        run = train(problem, end, learning_rate=float(eta), steps=settings.late - 1, record=record)
        late.append(_strengths(problem, run, range(settings.late)))
    visited = np.array(late)
    return BifurcationDisplay(
        rates,
        {label: visited[:, :, i] for i, label in enumerate(thresholds)},
        x_label=r"learning rate $\eta$",
        y_label=f"modes at the last {settings.late} iterations",
        thresholds=thresholds,
        resolution=_SAME * settings.singular_values[0],
    )


def _onsets(sweep: BifurcationDisplay, period: int) -> dict[str, tuple[float, float] | None]:
    """Return, mode by mode, between which neighbouring rates more than `period` values are first visited."""
    result: dict[str, tuple[float, float] | None] = {}
    for label, periods in sweep.periods().items():
        longer = np.array(periods) > period
        index = int(np.argmax(longer))
        pair = sweep.parameter[index - 1 : index + 1]
        result[label] = (float(pair[0]), float(pair[1])) if index > 0 else None
    return result


def _describe_interval(pair: tuple[float, float] | None) -> str:
    return "nowhere in the sweep" if pair is None else f"between eta = {pair[0]:.5f} and {pair[1]:.5f}"


def _line(record: dict[str, Any]) -> str:
    low, high = record["late_sharpness_low"], record["late_sharpness_high"]
    balanced = list(record["sharpness"]["levels"].values())[1]
    return (
        f"eta = {record['learning_rate']:<7g} {record['oscillating']} modes oscillate (theory "
        f"{record['oscillating_in_theory']}), at last between "
        + ", ".join(
            f"{a:.4g} and {b:.4g}" for a, b in zip(record["late_low"], record["late_high"], strict=True)
        )
        + ("" if low is None else f"; sharpness {low:.4g} to {high:.4g}")
        + f" (2/eta {2 / record['learning_rate']:.4g}, minimum {balanced:.4g})"
        + f"; off the recursion by {record['difference_from_recursion']:.0e}"
    )


def draw(settings: Settings, result: Result) -> Figure:
    """Draw a column for each rate, and the sweep below."""
    from matplotlib.figure import Figure

    n_columns = len(settings.learning_rates)
    figure = Figure(figsize=(13.5, 12.5), layout="constrained")
    grid = figure.add_gridspec(4, n_columns, height_ratios=(1.0, 0.8, 0.9, 1.5))
    first: dict[str, Any] = {}
    for index, (panels, record) in enumerate(
        zip(result.displays["columns"], result.numbers["columns"], strict=True)
    ):
        for row, (name, display) in enumerate(panels.items()):
            ax = figure.add_subplot(grid[row, index], sharey=first.get(name))
            first.setdefault(name, ax)
            display.plot(ax, **_STYLES[name])
            ax.set_xlim(0, max(settings.steps, 1))
            if row == 0:
                count, modes = record["oscillating"], len(settings.singular_values)
                ax.set_title(f"$\\eta = {record['learning_rate']:g}$: {count} of {modes} modes oscillate")
            if row < 2:
                ax.set_xlabel("")
            if index > 0:
                ax.set_ylabel("")
    first["modes"].legend(frameon=False, fontsize=8, loc="lower right")
    first["sharpness"].legend(frameon=False, fontsize=8, loc="upper left")
    first["loss"].set_ylim(bottom=_LEAST_LOSS)
    wide = figure.add_subplot(grid[3, :])
    result.displays["sweep"].plot(wide)
    _name_regions(wide, result)
    drawn = settings.learning_rates
    wide.axvspan(min(drawn), max(drawn), color="#ECECEC", zorder=0, label="from the first column to the last")
    wide.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.49, 0.0), markerscale=4)
    wide.set_title(
        "many rates; dashed: the threshold $2/(L\\,\\sigma_i^{2-2/L})$ of each mode; "
        "beyond the grey range: ours; top: the largest mode",
        fontsize=11,
    )
    set_title(figure, f"At and beyond the edge of stability, $L = {settings.depth}$")
    return figure


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    del result
    return (
        rf"$\sigma = {', '.join(f'{s:g}' for s in settings.singular_values)}$, $W_L(0) = 0$, the others "
        rf"${settings.scale:g}\,I$, sum of squares, width {settings.dim}. The columns show the smallest and "
        "the largest of each two neighbouring records, the two values of a cycle of two"
    )


def _name_regions(ax: Axes, result: Result) -> None:
    """Write above the sweep how the largest mode behaves, from one change of its period to the next."""
    sweep = result.displays["sweep"]
    counts = np.array(next(iter(sweep.periods().values())))
    left, right = ax.get_xlim()
    names = ["fixed point", "cycle of two", "cycles of 4, 8, ..", "chaos, with periodic windows"]
    edges = [left]
    for period in (1, 2, _LONGEST_PERIOD):
        longer = np.flatnonzero(counts > period)
        first = longer[0] if longer.size else counts.size
        pair = sweep.parameter[max(first - 1, 0) : first + 1]
        edges.append(left if first == 0 else right if first == counts.size else float(pair.mean()))
    edges.append(right)
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top + 0.1 * (top - bottom))
    for name, start, end in zip(names, edges[:-1], edges[1:], strict=True):
        if end - start <= 0:
            continue
        if start > left:
            ax.axvline(start, color="#777777", linewidth=0.8, linestyle=":", zorder=1)
        ax.text(
            (start + end) / 2,
            top + 0.05 * (top - bottom),
            name,
            ha="center",
            va="center",
            fontsize=9.5,
            color=COLOURS[0],
        )
