# SPDX-License-Identifier: MIT
"""Two layers (the Burer-Monteiro factorisation) and three on a matrix known in few entries.

Yaras, Wang, Balzano, Qu, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation"
(arXiv 2406.04112): with three layers the recovery error does not depend on the inner width; with two layers
it does, and wide layers fit the known entries without recovering the others. At the published step size three
layers are beyond their stability threshold for most of the run, and chaotic: changes of the start in the
twelfth digit change the path and the number of iterations, and not the recovered matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .._problem.standard import low_rank_completion
from .._support.arrays import check_count, check_scale, random_generator
from .._training.options import Record
from .._training.train import train
from .._weights.initial import orthogonal
from ..plots import COLOURS, LineDisplay, SeriesDisplay
from . import Result, setting
from ._captions import set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Settings for --quick.
QUICK: Final[dict[str, Any]] = {"widths": (10, 40, 100), "runs": 1}

_DEPTHS: Final = (2, 3)
#: Relative change of the weights in the measurement of sensitivity.
_CHANGE: Final = 1e-12
_ERROR_LABEL: Final = "recovery error, unobserved"


@dataclass(frozen=True)
class Settings:
    """The published setting. Fewer widths (published: 10, 20, .., 100)."""

    dim: int = setting(100, "d")
    rank: int = setting(10, "r")
    observed: float = setting(0.3, "share of the entries that is known")
    widths: tuple[int, ...] = setting((10, 20, 30, 50, 70, 100), "inner widths; loss curves: first and last")
    scale: float = setting(1e-3, "eps")
    shallow_learning_rate: float = setting(1e2, "eta of two layers, on the mean over d^2")
    deep_learning_rate: float = setting(3e2, "eta of three layers, likewise")
    tolerance: float = setting(1e-10, "loss at which a run ends")
    steps: int = setting(60_000, "iterations, at most")
    every: int = setting(200, "iterations between two points of the curves")
    runs: int = setting(5, "seeds; means and standard deviations are drawn")
    seed: int = setting(0, "the first seed of the matrix, the known entries and the weights")


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Complete matrices with two and three layers of several widths."""
    for name in ("rank", "steps", "every", "runs"):
        check_count(getattr(settings, name), name)
    check_scale(settings.tolerance, "tolerance", strict=True)
    records: dict[str, list[dict[str, Any]]] = {}
    curves: dict[str, dict[str, list[float]]] = {}
    shown = dict.fromkeys((settings.widths[0], settings.widths[-1]))
    for depth in _DEPTHS:
        entries = records[f"$L = {depth}$"] = []
        for width in settings.widths:
            check_count(width, "widths")
            found = [
                _run(settings, depth, width, seed, width in shown and seed == settings.seed, progress)
                for seed in range(settings.seed, settings.seed + settings.runs)
            ]
            if "curve" in found[0]:
                curves[f"$L = {depth}$, width {width}"] = found[0].pop("curve")
            entries.append(_summary(width, found))
    displays: dict[str, Any] = {
        "errors": SeriesDisplay(
            {label: (curve["steps"], curve["errors"]) for label, curve in curves.items()},
            x_label="iteration $t$",
            y_label=_ERROR_LABEL,
        ),
        "final": SeriesDisplay(
            {
                label: (settings.widths, [entry["error"]["mean"] for entry in entries])
                for label, entries in records.items()
            },
            x_label="inner width",
            y_label=_ERROR_LABEL,
        ),
        "iterations": LineDisplay(
            settings.widths,
            {label: [entry["steps"]["mean"] for entry in entries] for label, entries in records.items()},
            x_label="inner width",
            y_label=f"iterations, at most {settings.steps}",
        ),
    }
    sensitivity = _measure_sensitivity(settings)
    numbers = {
        "runs": records,
        "curves": curves,
        "sensitivity": sensitivity,
        "displays": {name: display.numbers() for name, display in displays.items()},
    }
    lines = [_line(label, entry) for label, entries in records.items() for entry in entries]
    lines.append(
        f"L = 3, width {settings.widths[0]}: weights changed by {_CHANGE:g} give matrices that differ by up "
        f"to {sensitivity['largest_distance']:.2g} of their norm on the way, and end after "
        f"{' and '.join(map(str, sensitivity['steps']))} steps"
    )
    return Result(displays, numbers, lines)


def _measure_sensitivity(settings: Settings) -> dict[str, Any]:
    """Train three narrow layers from two starts that differ by rounding; return how far they part."""
    problem = low_rank_completion(settings.dim, settings.rank, settings.observed, seed=settings.seed)
    width = settings.widths[0]
    start = orthogonal([settings.dim, width, width, settings.dim], settings.scale, settings.seed)
    generator = random_generator(settings.seed, ("burer-monteiro", "change"))
    moved = [weight * (1 + _CHANGE * generator.standard_normal(weight.shape)) for weight in start]
    runs = [
        train(
            problem,
            weights,
            learning_rate=settings.deep_learning_rate,
            steps=settings.steps,
            tolerance=settings.tolerance,
            engine="dense",
            record=Record(every=settings.every, singular_values=None, weights_every=settings.every),
        )
        for weights in (start, moved)
    ]
    shared = [int(step) for step in runs[0].steps[:-1] if step in set(runs[1].steps[:-1])]
    distances = []
    for step in shared:
        here, there = (run.end_to_end(step) for run in runs)
        distances.append(float(np.linalg.norm(here - there) / np.linalg.norm(here)))
    return {
        "change": _CHANGE,
        "distances": distances,
        "largest_distance": max(distances),
        "steps": [len(run.loss) - 1 for run in runs],
    }


def _run(settings: Settings, depth: int, width: int, seed: int, keep: bool, progress: bool) -> dict[str, Any]:
    """Train once; return the last recovery error, the number of steps and how many raised the loss."""
    problem = low_rank_completion(settings.dim, settings.rank, settings.observed, seed=seed)
    run = train(
        problem,
        orthogonal([settings.dim, *[width] * (depth - 1), settings.dim], settings.scale, seed),
        learning_rate=settings.shallow_learning_rate if depth == 2 else settings.deep_learning_rate,
        steps=settings.steps,
        tolerance=settings.tolerance,
        engine="dense",
        record=Record(
            every=settings.every if keep else settings.steps,
            singular_values=None,
            weights_every=settings.every if keep else None,
            progress=progress,
        ),
    )
    record: dict[str, Any] = {
        "error": problem.recovery_error(run.all_weights(), "unobserved"),
        "steps": len(run.loss) - 1,
        "converged": run.outcome == "converged",
        "rising_steps": int(np.sum(np.diff(run.loss) > 0)),
        "loss": float(run.loss[-1]),
    }
    if keep:
        steps = [int(step) for step in run.steps]
        errors = [problem.recovery_error(run.all_weights(step), "unobserved") for step in steps]
        record["curve"] = {"steps": steps, "errors": errors}
    return record


def _summary(width: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    errors, steps = (np.array([record[name] for record in found]) for name in ("error", "steps"))
    return {
        "width": width,
        "runs": found,
        "converged": all(record["converged"] for record in found),
        "error": {"mean": float(errors.mean()), "deviation": float(errors.std())},
        "steps": {"mean": float(steps.mean()), "deviation": float(steps.std())},
    }


def _line(label: str, entry: dict[str, Any]) -> str:
    rising = np.mean([record["rising_steps"] / max(record["steps"], 1) for record in entry["runs"]])
    text = (
        f"{label.strip('$')}, width {entry['width']:<4} recovery error {entry['error']['mean']:.2e} "
        f"+- {entry['error']['deviation']:.1e} (standard deviation) after {entry['steps']['mean']:.0f} "
        f"+- {entry['steps']['deviation']:.0f} steps; the loss rises in {100 * rising:.0f} % of them"
    )
    return text if entry["converged"] else f"{text}; NOT ALL CONVERGED"


def draw(settings: Settings, result: Result) -> Figure:
    """Draw error curves, and final errors and iterations over the width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15.0, 5.0), layout="constrained")
    errors, *over_widths = figure.subplots(1, 3)
    styles = {}
    for label in result.numbers["curves"]:
        shallow, narrow = label.startswith("$L = 2$"), label.endswith(f" {settings.widths[0]}")
        styles[label] = {"color": COLOURS[0 if shallow else 1], "linestyle": "--" if narrow else "-"}
    result.displays["errors"].plot(errors, styles=styles, legend=False)
    errors.set_title("recovery error, one seed", fontsize=11)
    errors.legend(frameon=False, fontsize=9.5, loc="best")
    errors.locator_params(axis="x", nbins=6)
    for ax, (name, key) in zip(over_widths, (("final", "error"), ("iterations", "steps")), strict=True):
        result.displays[name].plot(ax, marker="o", markersize=4, legend=False)
        for colour, entries in zip(COLOURS, result.numbers["runs"].values(), strict=False):
            means, deviations = (
                np.array([entry[key][part] for entry in entries]) for part in ("mean", "deviation")
            )
            # On a logarithmic axis the range ends at a tenth of the mean.
            lower = np.maximum(means - deviations, 0.1 * means) if key == "error" else means - deviations
            widths = [entry["width"] for entry in entries]
            ax.fill_between(widths, lower, means + deviations, color=colour, alpha=0.2, linewidth=0)
        ax.set_title(
            "last recovery error" if key == "error" else f"iterations to a loss of {settings.tolerance:g}",
            fontsize=11,
        )
        ax.legend(frameon=False, fontsize=9.5, loc="best")
    set_title(figure, f"Matrix completion with two and three layers, $d = {settings.dim}$")
    return figure


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    del result
    return (
        f"Two layers are the Burer-Monteiro factorisation. $r = {settings.rank}$, "
        f"{100 * settings.observed:g} % of the entries, "
        rf"$\epsilon = {settings.scale:g}$, step {settings.shallow_learning_rate:g} and "
        f"{settings.deep_learning_rate:g} on the mean over $d^2$. "
        f"Over the width: mean and standard deviation of {settings.runs} seed{'s'[: settings.runs - 1]}"
    )
