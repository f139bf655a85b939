# SPDX-License-Identifier: MIT
"""Plateau and escape over the initial scale: how long deep linear networks wait before they learn.

Small initial layers stay on a plateau near zero, the longer the smaller the scale eps, and leave it quickly.
`dlnfast.theory.plateau_bounds` gives the steps until a mode is learned, for three or more layers and small
eps: T = eps^(2 - L) / ((L - 2) c eta sigma) to 2 T. The setting is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .. import measures, theory
from .._problem.problem import Problem
from .._problem.standard import low_rank_recovery
from .._support.arrays import check_count, check_scale
from .._training.options import Record
from .._training.train import train
from .._weights.initial import orthogonal
from ..plots import COLOURS, LineDisplay, SeriesDisplay
from . import Result, setting
from ._captions import set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Settings for --quick.
QUICK: Final[dict[str, Any]] = {"depths": (2, 3), "runs": 2}

#: Records of a run on its plateau: the resolution of the times of escape.
_RECORDS: Final = 400
#: Scales above this multiple of sigma_1^(1 / L) are not small: the bounds are not drawn for them.
_SMALL: Final = 0.2
_SHALLOWEST: Final = 3


@dataclass(frozen=True)
class Settings:
    """All settings are ours: white inputs, square layers, a target of rank 3."""

    dim: int = setting(100, "d")
    rank: int = setting(3, "r")
    depths: tuple[int, ...] = setting((2, 3, 4), "L; one column each")
    scales: tuple[float, ...] = setting(
        (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0), "alpha, the initial scale of all layers"
    )
    drawn: tuple[float, ...] = setting((1e-3, 1e-2, 0.1, 1.0), "alpha of the loss curves")
    fraction: float = setting(0.25, "eta, as a share of the stability threshold of sigma_1")
    tolerance: float = setting(1e-6, "share of the loss of W = 0 at which the target counts as learned")
    runs: int = setting(5, "seeds; medians and ranges are drawn")
    steps: int = setting(3_000_000, "iterations, at most; scales with T above it are not trained")
    seed: int = setting(0, "the first seed of targets and weights")


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Train with every depth, scale and seed, and find the steps of escape."""
    for name in ("dim", "rank", "runs", "steps"):
        check_count(getattr(settings, name), name)
    check_scale(settings.fraction, "fraction", strict=True)
    check_scale(settings.tolerance, "tolerance", strict=True)
    missing = [scale for scale in settings.drawn if scale not in settings.scales]
    if missing:
        raise ValueError(f"drawn has {missing[0]:g}, which is not among scales")
    columns = [
        _column(settings, check_count(depth, "depths", minimum=2), progress) for depth in settings.depths
    ]
    displays = {"columns": [_displays(column) for column in columns]}
    highlights = [line for column in columns for line in _lines(settings, column)]
    return Result(displays, {"columns": columns}, highlights)


def _column(settings: Settings, depth: int, progress: bool) -> dict[str, Any]:
    """Return curves and times of all scales and seeds at one depth."""
    column: dict[str, Any] = {"depth": depth, "scales": [], "curves": {}}
    for scale in settings.scales:
        check_scale(scale, "scales", strict=True)
        runs = []
        for seed in range(settings.seed, settings.seed + settings.runs):
            problem = low_rank_recovery(settings.dim, settings.rank, seed)
            runs.append(_run(settings, problem, depth, scale, seed, progress))
        column["scales"].append({"scale": scale, **_summary(runs)})
        if scale in settings.drawn and "curve" in runs[0]:
            column["curves"][_label(scale)] = runs[0]["curve"]
    return column


def _label(scale: float) -> str:
    return rf"$\alpha = {scale:g}$"


def _run(
    settings: Settings, problem: Problem, depth: int, scale: float, seed: int, progress: bool
) -> dict[str, Any]:
    """Train once; return the steps until the first mode is half learned, and until the target is."""
    sigma = float(problem.target_factors().s[0])
    rate = settings.fraction * theory.stability_threshold(sigma, depth, problem.loss_scale)
    weights = orthogonal([settings.dim] * (depth + 1), scale, seed)
    first = problem.loss_scale * problem.output_norm_squared / 2
    options: dict[str, Any] = {
        "learning_rate": rate,
        "tolerance": settings.tolerance * first,
        "steps": settings.steps,
    }
    bounds = None
    if depth >= _SHALLOWEST and scale <= _SMALL * sigma ** (1 / depth):
        bounds = theory.plateau_bounds(sigma, scale, depth, problem.loss_scale, rate)
        if bounds.shortest > settings.steps:
            return {"escape": None, "learned": None, "bounds": list(bounds), "learning_rate": rate}
    run = train(problem, weights, record=Record(every=settings.steps, progress=progress), **options)
    total = len(run.loss) - 1
    loss = run.loss / first
    learned = total if run.outcome == "converged" else None
    # The records around the escape, twice: with few of them for the whole run, then for its part before.
    escape: int | None = None
    until = total
    for _ in range(2):
        record = Record(every=max(until // _RECORDS, 1))
        run = train(problem, weights, record=record, **(options | {"steps": until}))
        modes = np.array([measures.mode_strengths(problem, run.end_to_end(int(t)))[0] for t in run.steps])
        above = np.flatnonzero(modes >= sigma / 2)
        if not above.size:
            break
        escape = until = int(run.steps[above[0]])
    positions = np.unique(np.concatenate([[0], np.geomspace(1, max(total, 1), 400).astype(int)]))
    return {
        "escape": escape,
        "learned": learned,
        "bounds": None if bounds is None else list(bounds),
        "learning_rate": rate,
        "engine": run.engine,
        "curve": {"steps": positions.tolist(), "loss": loss[positions].tolist()},
    }


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians and ranges over the seeds; None where a run did not get there."""
    summary: dict[str, Any] = {"engine": runs[0].get("engine"), "learning_rate": runs[0]["learning_rate"]}
    for name in ("escape", "learned"):
        found = [run[name] for run in runs]
        known = [value for value in found if value is not None]
        complete = len(known) == len(found)
        summary[name] = {
            "steps": found,
            "median": float(np.median(known)) if complete else None,
            "least": min(known) if complete else None,
            "largest": max(known) if complete else None,
        }
    bounds = [run["bounds"] for run in runs]
    summary["bounds"] = None if bounds[0] is None else np.median(bounds, axis=0).tolist()
    if bounds[0] is not None and summary["escape"]["median"] is not None:
        shares = [run["escape"] / run["bounds"][0] for run in runs]
        summary["escape_over_T"] = [min(shares), max(shares)]
    return summary


def _displays(column: dict[str, Any]) -> dict[str, Any]:
    loss = {label: (curve["steps"], curve["loss"]) for label, curve in column["curves"].items()}
    scales = [entry["scale"] for entry in column["scales"]]
    curves = {
        label: [
            np.nan if entry[name]["median"] is None else entry[name]["median"] for entry in column["scales"]
        ]
        for name, label in (
            ("learned", "target learned"),
            ("escape", r"first mode at $\sigma_1 / 2$"),
        )
    }
    return {
        "loss": SeriesDisplay(
            loss, x_label="iteration $t$", y_label="loss, share of that of $W = 0$", log_x=True
        ),
        "steps": LineDisplay(
            scales, curves, x_label=r"initial scale $\alpha$", y_label="iterations", log_y=True
        ),
    }


def _lines(settings: Settings, column: dict[str, Any]) -> list[str]:
    lines = []
    for entry in column["scales"]:
        learned, escape = entry["learned"], entry["escape"]
        text = f"L = {column['depth']}, alpha = {entry['scale']:<6g} "
        if learned["median"] is None:
            text += f"not learned in {settings.steps} steps"
            if entry["engine"] is None:
                text += f", not trained: T = {entry['bounds'][0]:.3g}"
        else:
            text += (
                f"loss {settings.tolerance:g} of that of W = 0 after {learned['median']:.0f} steps "
                f"({learned['least']} to {learned['largest']})"
            )
        if escape["median"] is not None:
            text += f", first mode after {escape['median']:.0f}"
        if "escape_over_T" in entry:
            low, high = entry["escape_over_T"]
            text += f" = {low:.2f} to {high:.2f} T, T = {entry['bounds'][0]:.0f}"
        lines.append(text)
    return lines


def draw(settings: Settings, result: Result) -> Figure:
    """Draw loss curves above, and steps over the scale with bounds below, one column for each depth."""
    from matplotlib.figure import Figure

    n_columns = len(settings.depths)
    figure = Figure(figsize=(max(4.5 * n_columns, 6.0), 8.6), layout="constrained")
    axes = figure.subplots(2, n_columns, sharey="row", squeeze=False)
    styles = {
        _label(scale): {"color": COLOURS[index % len(COLOURS)]} for index, scale in enumerate(settings.drawn)
    }
    for index, (display, column) in enumerate(
        zip(result.displays["columns"], result.numbers["columns"], strict=True)
    ):
        upper, lower = axes[0, index], axes[1, index]
        display["loss"].plot(upper, styles=styles, legend=False)
        upper.set_title(f"$L = {column['depth']}$", fontsize=12)
        upper.legend(frameon=False, fontsize=9.5, loc="lower left")
        display["steps"].plot(lower, marker="o", markersize=4, legend=False)
        _draw_ranges(lower, column)
        lower.set_xscale("log")
        place = "upper left" if column["depth"] < _SHALLOWEST else "lower left"
        lower.legend(frameon=False, fontsize=9.5, loc=place)
        if index > 0:
            upper.set_ylabel("")
            lower.set_ylabel("")
    set_title(figure, f"Plateau and escape over the initial scale, $d = {settings.dim}$")
    return figure


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    del result
    return (
        f"$r = {settings.rank}$, "
        rf"$\eta$ = {settings.fraction:g} of the stability threshold of $\sigma_1$. "
        f"Learned: loss {settings.tolerance:g} of that of $W = 0$; "
        f"medians and ranges of {settings.runs} seeds; "
        r"bounds where $\alpha \leq 0.2\,\sigma_1^{1/L}$ (our setting)"
    )


def _draw_ranges(ax: Axes, column: dict[str, Any]) -> None:
    """Shade the range over the seeds, and the interval of the theory."""
    for colour, name in zip(COLOURS, ("learned", "escape"), strict=False):
        known = [entry for entry in column["scales"] if entry[name]["median"] is not None]
        scales = [entry["scale"] for entry in known]
        least, largest = ([entry[name][end] for entry in known] for end in ("least", "largest"))
        ax.fill_between(scales, least, largest, color=colour, alpha=0.2, linewidth=0)
    bounded = [entry for entry in column["scales"] if entry["bounds"] is not None]
    if bounded:
        shortest, longest = zip(*(entry["bounds"] for entry in bounded), strict=True)
        ax.fill_between(
            [entry["scale"] for entry in bounded],
            shortest,
            longest,
            color="#555555",
            alpha=0.25,
            linewidth=0,
            label=r"$T$ to $2\,T$, theory of the first mode",
            zorder=1,
        )
