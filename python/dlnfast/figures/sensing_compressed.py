# SPDX-License-Identifier: MIT
"""Matrix sensing by a network as narrow as the learned matrix, and by the whole one.

Yaras, Wang, Balzano, Qu, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation"
(arXiv 2406.04112): where the outer layers stay, every measurement is projected onto them once, and a step no
longer depends on their size; where they move, the projections are renewed now and then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from .._completion.train_compressed import train_compressed
from .._problem.standard import low_rank_sensing
from .._support.arrays import check_count
from .._support.errors import DivergedError
from .._training.options import Record
from .._training.train import train
from .._weights.initial import orthogonal
from ..benchmarks.record import format_seconds
from ..plots import COLOURS, SeriesDisplay
from . import Clock, Result, errors_at_records, run_until, setting
from ._captions import set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The command line starts again where a variable caps a library.
TIMED = True

#: Settings for --quick.
QUICK: Final[dict[str, Any]] = {
    "dim": 40,
    "measurements": 800,
    "rank": 3,
    "learning_rate": 4.0,
    "outer": (0.0, 0.1),
    "outer_every": 1,
    "steps": 3500,
    "every": 100,
}

_FULL: Final = "full"


@dataclass(frozen=True)
class Settings:
    """The published setting; nonzero gamma, steps between updates of the outer layers, and length: ours.

    The target is the rank-r truncation of a Gaussian, with singular values of about 2 sqrt(d): with them, and
    operators of N(0, 1) / m entries, the published rate is stable.
    """

    dim: int = setting(200, "d; the operators take 8 m d^2 bytes")
    rank: int = setting(5, "r, and r_hat; target: truncated Gaussian, singular values about 2 sqrt(d)")
    measurements: int = setting(4000, "m; operators with independent N(0, 1) / m entries")
    depth: int = setting(3, "L")
    scale: float = setting(1e-2, "eps, of orthogonal layers")
    learning_rate: float = setting(20.0, "eta, on the sum over the measurements")
    outer: tuple[float, ...] = setting((0.0, 0.02), "gamma: outer layers learn at gamma eta; 0.02: ours")
    outer_every: int = setting(10, "iterations between two steps of the outer layers (ours)")
    steps: int = setting(3000, "iterations, at most (ours)")
    tolerance: float = setting(1e-11, "share of the first loss at which a run stops (ours)")
    every: int = setting(20, "iterations between two records")
    seed: int = setting(0, "seed of the matrix, the measurements and the weights")


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Train whole layers, and compressed ones for every gamma."""
    for name in ("steps", "every", "outer_every", "rank"):
        check_count(getattr(settings, name), name)
    problem = low_rank_sensing(settings.dim, settings.rank, settings.measurements, seed=settings.seed)
    widths = [settings.dim] * (check_count(settings.depth, "depth", minimum=2) + 1)
    options: dict[str, Any] = {
        "learning_rate": settings.learning_rate,
        "steps": settings.steps,
        "tolerance": settings.tolerance * problem.loss_scale / 2 * float(problem.values @ problem.values),
    }
    records: dict[str, dict[str, Any]] = {}
    for gamma in (None, *settings.outer):
        clock, diverged = Clock(), None
        record = Record(
            every=settings.every,
            singular_values=None,
            weights_every=settings.every,
            callback=clock,
            progress=progress,
        )
        try:
            weights = orthogonal(widths, settings.scale, settings.seed)
            if gamma is None:
                run = train(problem, weights, record=record, **options)
            else:
                turn = settings.outer_every if gamma > 0 else 1
                run = train_compressed(
                    problem,
                    weights,
                    rank=settings.rank,
                    outer=gamma,
                    outer_every=turn,
                    record=record,
                    **options,
                )
        except DivergedError as error:
            run, diverged = run_until(error), error.step
        steps, seconds, errors = errors_at_records(problem, clock, run, "relative")
        taken = len(run.loss) - 1
        records[_FULL if gamma is None else rf"$\gamma = {gamma:g}$"] = {
            "steps": steps,
            "seconds": seconds,
            "errors": errors,
            "diverged_at": diverged,
            "seconds_to_first_step": seconds[0],
            "seconds_per_step": (seconds[-1] - seconds[0]) / max(taken, 1),
            "final_loss": float(run.loss[-1]),
        }
    displays = {
        "iterations": _plot_errors(records, "steps", "iteration $t$", log_x=False),
        "seconds": _plot_errors(records, "seconds", "seconds, set-up included", log_x=True),
    }
    numbers = {"problem": problem.describe(), "runs": records}
    numbers |= {name: display.numbers() for name, display in displays.items()}
    return Result(displays, numbers, _highlights(records))


def _plot_errors(
    records: Mapping[str, Mapping[str, Any]], name: str, x_label: str, *, log_x: bool
) -> SeriesDisplay:
    return SeriesDisplay(
        {label: (record[name], record["errors"]) for label, record in records.items()},
        x_label=x_label,
        y_label=r"$\|W_{L:1} - \Phi\|_F \,/\, \|\Phi\|_F$",
        log_x=log_x,
    )


def _highlights(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for label, record in records.items():
        name = label.replace("$", "").replace("\\", "")
        if record["diverged_at"] is not None:
            lines.append(f"{name}: DIVERGES at iteration {record['diverged_at']}")
            continue
        lines.append(
            f"{name}: relative error {record['errors'][-1]:.2e} after {record['steps'][-1]} iterations, "
            f"{record['seconds'][-1]:.3g} s; set-up {format_seconds(record['seconds_to_first_step'])}, then "
            f"{format_seconds(record['seconds_per_step'])} a step"
        )
    return [*lines, "published, on a GPU: full 3.8 s, compressed 3.2 s"]


def draw(settings: Settings, result: Result) -> Figure:
    """Draw the error against iterations and against seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.0, 5.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    shades = [COLOURS[3], COLOURS[0], COLOURS[2], COLOURS[4], COLOURS[5]]
    records = result.numbers["runs"]
    styles: dict[str, dict[str, Any]] = {_FULL: {"color": COLOURS[1], "linewidth": 4.0, "alpha": 0.45}}
    gammas = [label for label in records if label != _FULL]
    styles |= {label: {"color": shades[i % len(shades)]} for i, label in enumerate(gammas)}
    for ax, (name, display) in zip(axes, result.displays.items(), strict=True):
        display.plot(ax, styles=styles, legend=False)
        handles, labels = ax.get_legend_handles_labels()
        texts = []
        for label in labels:
            record = records[label]
            text = label if label == _FULL else f"compressed, {label}"
            if label != _FULL and label != r"$\gamma = 0$" and settings.outer_every > 1:
                text += f",\nouter layers every {settings.outer_every} steps"
            if name == "seconds":
                text = f"{format_seconds(record['seconds_per_step'])} a step"
            if record["diverged_at"] is not None:
                text += f": diverges at {record['diverged_at']}"
            texts.append(text)
        # Left, below the bases that stay and right of those that turn; right, below the whole network.
        options: dict[str, Any] = {"frameon": False, "fontsize": 9.5, "loc": "lower left"}
        if name == "iterations":
            options |= {"loc": "upper right", "bbox_to_anchor": (1.0, 0.88)}
        ax.legend(handles, texts, **options)
    axes[1].set_ylabel("")
    axes[0].set_title("relative error against iterations", fontsize=11)
    axes[1].set_title("the same against time", fontsize=11)
    set_title(figure, f"Deep matrix sensing and its compression, $L = {settings.depth}$")
    return figure


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    del result
    return (
        f"$d = {settings.dim}$, $r = {settings.rank}$, $m = {settings.measurements}$, "
        rf"$\epsilon = {settings.scale:g}$, step {settings.learning_rate:g} on the sum. "
        "Target: truncated Gaussian, singular values about $2 \\sqrt{d}$ (our setting)"
    )
