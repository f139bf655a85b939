# SPDX-License-Identifier: MIT
"""Depth against width: iterations until a low-rank target is learned, for two to five layers.

With fixed singular values of the target the number of iterations depends on the depth, and on the width
only through the random orientation of the layers: the invariant subspace has 2 r dimensions at any width
(Yaras et al., arXiv 2306.01154 and 2406.04112). Weights are sampled lazily, so that no layer is ever formed.
The setting is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .. import theory
from .._problem.low_rank import LowRank
from .._problem.problem import Problem
from .._problem.standard import low_rank_recovery
from .._support.arrays import FloatArray, check_count, check_scale, random_generator
from .._support.haar import haar
from .._training.options import Record
from .._training.train import train
from .._weights.initial import orthogonal
from ..plots import COLOURS, LineDisplay, SeriesDisplay
from . import Result, setting
from ._captions import set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Settings for --quick.
QUICK: Final[dict[str, Any]] = {"widths": (30, 300, 3000), "runs": 5}

#: Width whose Gaussian target gives the singular values and c.
_NARROWEST: Final = 30
#: Points of a loss curve.
_POINTS: Final = 300
_SHALLOWEST: Final = 3


@dataclass(frozen=True)
class Settings:
    """All settings are ours: singular values and c are those of a 30 x 30 target at every width."""

    widths: tuple[int, ...] = setting((30, 100, 300, 1000, 3000, 10_000), "d, at least 30")
    depths: tuple[int, ...] = setting((2, 3, 4, 5), "L")
    rank: int = setting(3, "r")
    scale: float = setting(0.03, "eps")
    fraction: float = setting(0.25, "eta, as a share of the stability threshold of sigma_1")
    tolerance: float = setting(1e-3, "share of the loss of W = 0 at which a run ends")
    drawn_width: int = setting(1000, "d of the loss curves; one of the widths")
    runs: int = setting(20, "seeds of the weights and of the target's vectors; medians and ranges are drawn")
    steps: int = setting(5_000_000, "iterations, at most")
    seed: int = setting(0, "the first seed; that of the singular values")


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Train at every depth and width, with every seed."""
    for name in ("rank", "runs", "steps"):
        check_count(getattr(settings, name), name)
    check_scale(settings.tolerance, "tolerance", strict=True)
    for width in settings.widths:
        check_count(width, "widths", minimum=_NARROWEST)
    drawn = settings.drawn_width if settings.drawn_width in settings.widths else settings.widths[-1]
    records: dict[str, list[dict[str, Any]]] = {}
    curves: dict[str, dict[str, list[float]]] = {}
    for depth in settings.depths:
        label = f"$L = {check_count(depth, 'depths', minimum=2)}$"
        records[label] = []
        for width in settings.widths:
            found = [
                _run(settings, depth, width, seed, progress)
                for seed in range(settings.seed, settings.seed + settings.runs)
            ]
            losses = [loss for _, loss in found]
            records[label].append(_summary(settings, width, [record for record, _ in found]))
            if width == drawn:
                curves[label] = _band(losses)
    displays: dict[str, Any] = {
        "loss": SeriesDisplay(
            {label: (curve["steps"], curve["median"]) for label, curve in curves.items()},
            x_label="iteration $t$",
            y_label="loss, share of that of $W = 0$",
            log_x=True,
        ),
        "steps": _plot_over_widths(settings, records),
        "relative": _plot_over_widths(settings, records, relative=True),
    }
    numbers = {
        "drawn_width": drawn,
        "singular_values": _problem(settings, _NARROWEST, settings.seed).target_factors().s.tolist(),
        "runs": records,
        "curves": curves,
        "displays": {name: display.numbers() for name, display in displays.items()},
    }
    lines = [_line(label, entry) for label, entries in records.items() for entry in entries]
    return Result(displays, numbers, lines)


def _problem(settings: Settings, width: int, seed: int) -> Problem:
    """Return a target with the singular values of the first seed, and singular vectors of this one."""
    narrow = low_rank_recovery(_NARROWEST, settings.rank, settings.seed)
    generator = random_generator(seed, ("depth-width", "vectors"))
    left, right = (haar(width, settings.rank, generator) for _ in range(2))
    return Problem(LowRank(left, narrow.target_factors().s, right), loss_scale=narrow.loss_scale)


def _run(
    settings: Settings, depth: int, width: int, seed: int, progress: bool
) -> tuple[dict[str, Any], FloatArray]:
    """Train once; return the number of steps, times, and the losses as a share of that of W = 0."""
    problem = _problem(settings, width, seed)
    sigma = float(problem.target_factors().s[0])
    rate = settings.fraction * theory.stability_threshold(sigma, depth, problem.loss_scale)
    first = problem.loss_scale * problem.output_norm_squared / 2
    run = train(
        problem,
        orthogonal([width] * (depth + 1), settings.scale, seed, implicit=True),
        learning_rate=rate,
        steps=settings.steps,
        tolerance=settings.tolerance * first,
        record=Record(every=settings.steps, progress=progress),
    )
    record: dict[str, Any] = {
        "steps": len(run.loss) - 1 if run.outcome == "converged" else None,
        "seconds": run.wall_time,
        "learning_rate": rate,
        "engine": run.engine,
    }
    if depth >= _SHALLOWEST:
        record["bounds"] = list(theory.plateau_bounds(sigma, settings.scale, depth, problem.loss_scale, rate))
    return record, run.loss / first


def _summary(settings: Settings, width: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"width": width, "engine": found[0]["engine"], "bounds": found[0].get("bounds")}
    summary["learning_rate"] = found[0]["learning_rate"]
    for name in ("steps", "seconds"):
        values = [record[name] for record in found]
        known = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
        summary[name] = {
            "values": values,
            "median": float(np.median(known)) if np.isfinite(known).all() else None,
            "least": float(known.min()) if np.isfinite(known).all() else None,
            "largest": float(known.max()) if np.isfinite(known).all() else None,
        }
    return summary


def _band(losses: list[FloatArray]) -> dict[str, list[float]]:
    """Return median and range of the losses of all seeds; a finished run keeps its last loss."""
    longest = max(len(loss) for loss in losses)
    steps = np.unique(np.geomspace(1, max(longest - 1, 1), _POINTS).astype(int))
    table = np.array([loss[np.minimum(steps, len(loss) - 1)] for loss in losses])
    return {
        "steps": steps.tolist(),
        "median": np.median(table, axis=0).tolist(),
        "least": table.min(axis=0).tolist(),
        "largest": table.max(axis=0).tolist(),
    }


def _plot_over_widths(
    settings: Settings, records: dict[str, list[dict[str, Any]]], *, relative: bool = False
) -> LineDisplay:
    curves = {}
    for label, entries in records.items():
        medians = [entry["steps"]["median"] for entry in entries]
        values = np.array([np.nan if value is None else value for value in medians])
        curves[label] = values / values[-1] if relative else values
    return LineDisplay(
        settings.widths,
        curves,
        x_label="width $d$",
        y_label="iterations, relative" if relative else "iterations",
        log_y=not relative,
    )


def _line(label: str, entry: dict[str, Any]) -> str:
    steps = entry["steps"]
    text = f"{label.strip('$')}, d = {entry['width']:<6} "
    if steps["median"] is None:
        return text + "not all runs ended"
    text += f"{steps['median']:.0f} steps ({steps['least']:.0f} to {steps['largest']:.0f})"
    if entry["bounds"] is not None:
        text += f" = {steps['median'] / entry['bounds'][0]:.2f} T"
    return f"{text}, {entry['seconds']['median']:.2g} s with set-up"


def draw(settings: Settings, result: Result) -> Figure:
    """Draw loss curves, and iterations and time per iteration over the width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15.0, 5.2), layout="constrained")
    loss, steps, relative = figure.subplots(1, 3)
    numbers = result.numbers
    result.displays["loss"].plot(loss, legend=False)
    result.displays["steps"].plot(steps, marker="o", markersize=4, legend=False)
    steps.set_xscale("log")
    style: dict[str, Any] = {"alpha": 0.2, "linewidth": 0}
    for colour, curve in zip(COLOURS, numbers["curves"].values(), strict=False):
        loss.fill_between(curve["steps"], curve["least"], curve["largest"], color=colour, **style)
    for colour, entries in zip(COLOURS, numbers["runs"].values(), strict=False):
        known = [entry for entry in entries if entry["steps"]["median"] is not None]
        least, largest = ([entry["steps"][end] for entry in known] for end in ("least", "largest"))
        widths = [entry["width"] for entry in known]
        steps.fill_between(widths, least, largest, color=colour, **style)
        if known:
            last = known[-1]["steps"]["median"]
            low, high = (np.array(ends) / last for ends in (least, largest))
            relative.fill_between(widths, low, high, color=colour, **style)
        if entries[0]["bounds"] is not None:
            steps.axhline(entries[0]["bounds"][0], color=colour, linestyle="--", linewidth=1.0)
    steps.plot([], [], "--", color="#555555", linewidth=1.0, label="$T$, the least time of the theory")
    loss.set_title(f"width {numbers['drawn_width']}", fontsize=11)
    loss.legend(frameon=False, fontsize=9.5, loc="lower left")
    steps.set_title(f"iterations to a loss of {settings.tolerance:g} of that of $W = 0$", fontsize=11)
    result.displays["relative"].plot(relative, marker="o", markersize=4, legend=False)
    relative.set_title("the same, relative to the median at the largest width", fontsize=11)
    relative.set_xscale("log")
    steps.set_ylim(top=20 * steps.get_ylim()[1])
    steps.legend(frameon=False, fontsize=9.5, loc="upper center", ncols=2)
    set_title(figure, f"Iterations depend on the depth, not on the width, $r = {settings.rank}$")
    return figure


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    del result
    return (
        rf"$\epsilon = {settings.scale:g}$, $\eta$ = {settings.fraction:g} of the stability threshold. The "
        "singular values of the target are the same at all widths; "
        f"medians and ranges of {settings.runs} seeds (our setting)"
    )
