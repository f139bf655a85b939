# SPDX-License-Identifier: MIT
"""A deep factorisation of a low-rank matrix, whole and compressed: the same descent, step by step.

Yaras, Wang, Balzano, Qu, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation"
(arXiv 2406.04112): with the whole target known nothing is approximated. The reduced engine is that
compression, and has the layers of the wide network too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .._problem.problem import Problem
from .._problem.standard import low_rank_recovery
from .._support.arrays import FloatArray, check_count
from .._training.options import Record
from .._training.train import train
from .._trajectory.trajectory import Trajectory
from .._weights.implicit import ImplicitWeights
from .._weights.initial import orthogonal
from ..benchmarks.record import format_seconds
from ..plots import PathDisplay, SeriesDisplay
from . import Clock, Result, alike_rate, setting
from ._captions import set_title
from ._targets import spaced_target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The command line starts again where a variable caps a library.
TIMED = True

#: Settings for --quick.
QUICK: Final[dict[str, Any]] = {
    "dim": 300,
    "full_dim": 100,
    "rank": 5,
    "spaced_dim": 60,
    "spaced_steps": 30_000,
}

_FULL, _REDUCED, _LARGE = "full", "compressed", "compressed, published width"
_STYLES: Final[dict[str, dict[str, Any]]] = {
    _FULL: {"color": "#D55E00", "linewidth": 4.5, "alpha": 0.45},
    _REDUCED: {"color": "#0072B2", "linewidth": 1.6},
    _LARGE: {"color": "#009E73", "linewidth": 1.6},
}
#: Losses below this share of the first one are rounding.
_ROUNDING: Final = 1e-20


@dataclass(frozen=True)
class Settings:
    """The published settings, except the width of the uncompressed network: ours."""

    dim: int = setting(1000, "d, width of the compressed network")
    full_dim: int = setting(200, "d at which whole layers are trained too; published: 1000")
    rank: int = setting(10, "r, rank of the truncated Gaussian")
    depth: int = setting(3, "L, number of layers")
    scale: float = setting(1e-3, "eps, scale of the orthogonal initialisation")
    learning_rate: float = setting(1e3, "eta, on the mean loss, at d = 1000; eta (d / 1000)^1.5 at others")
    steps: int = setting(25_000, "iterations (ours: as many as it takes)")
    records: int = setting(250, "times at which loss and seconds are recorded")
    compared: int = setting(125, "steps at which all layers are compared: 24 d^2 bytes each")
    spaced_dim: int = setting(100, "d of the second setting")
    spaced_rank: int = setting(10, "r of the second setting: every fifth singular value of a Gaussian")
    spaced_scale: float = setting(1e-2, "eps of the second setting")
    spaced_learning_rate: float = setting(1.0, "eta of the second setting")
    spaced_steps: int = setting(100_000, "iterations of the second setting")
    seed: int = setting(0, "seed of the targets and of the weights")


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Train whole layers and the invariant subspace, at one width and at a large one."""
    for name in ("records", "compared", "steps", "spaced_steps"):
        check_count(getattr(settings, name), name)
    # Records that are compared are a part of all records.
    compared = min(settings.compared, settings.records, settings.steps)
    stride = max(min(settings.records, settings.steps) // compared, 1)
    every = max(settings.steps // (compared * stride), 1)
    runs: dict[str, tuple[Clock, Trajectory]] = {}
    problem = low_rank_recovery(settings.full_dim, settings.rank, settings.seed)
    for label, engine in ((_FULL, "dense"), (_REDUCED, "reduced")):
        rate = alike_rate(settings.learning_rate, settings.full_dim)
        keep = every * stride if engine == "dense" else None
        runs[label] = _run(settings, problem, engine, rate, every, keep, progress)
    large = low_rank_recovery(settings.dim, settings.rank, settings.seed)
    rate = alike_rate(settings.learning_rate, settings.dim)
    runs[_LARGE] = _run(settings, large, "lazy", rate, every, None, progress)

    full, reduced = runs[_FULL][1], runs[_REDUCED][1]
    shared = [int(t) for t in full.steps[:-1] if t % (every * stride) == 0 and t in set(reduced.steps)]
    difference = _largest_difference(full, reduced, shared)
    spaced = _train_spaced(settings, progress)
    displays: dict[str, Any] = {
        "iterations": _plot_losses(runs, "iteration $t$"),
        "seconds": _plot_losses(runs, "seconds, set-up included", in_seconds=True),
        "path": PathDisplay.from_trajectories({_FULL: full, _REDUCED: reduced}, shared),
        "spaced": _plot_losses(spaced, "seconds, set-up included", in_seconds=True),
    }
    numbers: dict[str, Any] = {name: display.numbers() for name, display in displays.items()}
    numbers["runs"] = {label: _record(*run) for label, run in runs.items()}
    numbers["spaced_runs"] = {label: _record(*run) for label, run in spaced.items()}
    numbers["difference"] = difference
    numbers["compared_steps"] = shared
    highlights = [
        f"d = {settings.full_dim}: {_ratio(numbers['runs'])}",
        f"all W_l of both at {len(shared)} iterations differ by {difference:.1e} of themselves at most",
        f"d = {settings.dim}, compressed: {_seconds(numbers['runs'][_LARGE])} "
        "(published, on a GPU: 4.3 to 6 s; full 45 s)",
        f"spaced singular values, d = {settings.spaced_dim}: {_ratio(numbers['spaced_runs'])} "
        "(published, on a GPU: 72 s and 8.6 s)",
    ]
    return Result(displays, numbers, highlights)


def _run(
    settings: Settings,
    problem: Problem,
    engine: str,
    rate: float,
    every: int,
    weights_every: int | None,
    progress: bool,
    *,
    scale: float | None = None,
    steps: int | None = None,
) -> tuple[Clock, Trajectory]:
    """Draw weights and train: whole layers, their invariant subspace, or that of lazily sampled layers."""
    clock = Clock()
    widths = [problem.dim_in] * (settings.depth + 1)
    eps = settings.scale if scale is None else scale
    weights: list[FloatArray] | ImplicitWeights
    if engine == "lazy":
        weights = orthogonal(widths, eps, settings.seed, implicit=True)
    else:
        weights = orthogonal(widths, eps, settings.seed)
    run = train(
        problem,
        weights,
        learning_rate=rate,
        steps=settings.steps if steps is None else steps,
        engine="reduced" if engine == "lazy" else engine,
        record=Record(
            every=every, weights_every=weights_every, singular_values=None, callback=clock, progress=progress
        ),
        tolerance=_ROUNDING * problem.loss_scale * problem.output_norm_squared / 2,
    )
    return clock, run


def _train_spaced(settings: Settings, progress: bool) -> dict[str, tuple[Clock, Trajectory]]:
    """Train towards every fifth singular value of a Gaussian."""
    dim = settings.spaced_dim
    target = spaced_target(dim, settings.spaced_rank, settings.seed, "spaced_rank")
    problem = Problem(target, loss_scale=1 / dim**2)
    rate, scale, steps = settings.spaced_learning_rate, settings.spaced_scale, settings.spaced_steps
    every = max(steps // settings.records, 1)
    return {
        label: _run(settings, problem, engine, rate, every, None, progress, scale=scale, steps=steps)
        for label, engine in ((_FULL, "dense"), (_REDUCED, "reduced"))
    }


def _largest_difference(full: Trajectory, reduced: Trajectory, steps: list[int]) -> float:
    """Return the largest ``||W_l - W_l'||_F / ||W_l||_F`` of all layers and steps."""
    return max(
        float(np.linalg.norm(here - there) / np.linalg.norm(here))
        for step in steps
        for here, there in zip(full.all_weights(step), reduced.all_weights(step), strict=True)
    )


def _plot_losses(
    runs: dict[str, tuple[Clock, Trajectory]], x_label: str, *, in_seconds: bool = False
) -> SeriesDisplay:
    series = {}
    for label, (clock, run) in runs.items():
        positions = [clock.seconds[int(t)] for t in run.steps] if in_seconds else run.steps
        series[label] = positions, run.loss[run.steps]
    return SeriesDisplay(series, x_label=x_label, y_label=r"loss $\ell(t)$", log_x=in_seconds)


def _record(clock: Clock, run: Trajectory) -> dict[str, Any]:
    return {
        "engine": run.engine,
        "why": str(run.certificate),
        "problem": run.problem.describe() if run.problem is not None else None,
        "learning_rate": run.config["learning_rate"][0],
        "steps": len(run.loss) - 1,
        "seconds": max(clock.seconds.values()),
        "final_loss": float(run.loss[-1]),
    }


def _seconds(record: dict[str, Any]) -> str:
    return f"{record['steps']} steps in {record['seconds']:.3g} s to a loss of {record['final_loss']:.1e}"


def _ratio(records: dict[str, Any]) -> str:
    full, reduced = records[_FULL], records[_REDUCED]
    return (
        f"full {_seconds(full)}; compressed {_seconds(reduced)}, "
        f"{full['seconds'] / reduced['seconds']:.0f} times as fast"
    )


def draw(settings: Settings, result: Result) -> Figure:
    """Draw loss against iterations and seconds, the trajectory of the product, and the second setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.0, 9.4))
    grid = figure.add_gridspec(
        2, 2, left=0.065, right=0.985, bottom=0.06, top=0.915, hspace=0.27, wspace=0.18
    )
    widths = {_FULL: settings.full_dim, _REDUCED: settings.full_dim, _LARGE: settings.dim}
    names = {_FULL: "full", _REDUCED: "compressed", _LARGE: "compressed"}
    records, spaced = result.numbers["runs"], result.numbers["spaced_runs"]
    titles = {
        "iterations": "loss against iterations",
        "seconds": "loss against time",
        "path": f"way of $W_{{L:1}}$, $d = {settings.full_dim}$; "
        f"all layers differ by {result.numbers['difference']:.0e} at most",
        "spaced": rf"$d = {settings.spaced_dim}$, $\epsilon = {settings.spaced_scale:g}$, step "
        f"{settings.spaced_learning_rate:g}: every fifth singular value of a Gaussian",
    }
    for index, (name, display) in enumerate(result.displays.items()):
        projection = {"projection": "3d"} if name == "path" else {}
        ax = figure.add_subplot(grid[index // 2, index % 2], **projection)
        display.plot(ax, styles=_STYLES, legend=False)
        ax.set_title(titles[name], fontsize=11)
        if name == "path":
            _turn(ax, display.coordinates[_REDUCED])
        elif name == "iterations":
            labels = [f"{names[label]}, $d = {widths[label]}$" for label in display.series]
            ax.legend(labels, frameon=False, loc="lower left")
        else:
            taken = records if name == "seconds" else spaced
            texts = []
            for label in display.series:
                width = f", $d = {widths[label]}$" if name == "seconds" else ""
                texts.append(f"{names[label]}{width}: {format_seconds(taken[label]['seconds'])}")
            # The whole network takes so much longer that there is room between the curves.
            middle = (taken[_FULL]["seconds"] * taken[_REDUCED]["seconds"]) ** 0.5
            anchor = ax.transAxes.inverted().transform(ax.transData.transform((middle, 1.0)))
            ax.legend(texts, frameon=False, loc="center", bbox_to_anchor=(anchor[0], 0.5))
    set_title(figure, f"A deep factorisation and its compression, $L = {settings.depth}$")
    return figure


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    records = result.numbers["runs"]
    text = (
        f"$r = {settings.rank}$, "
        rf"$\epsilon = {settings.scale:g}$, step {records[_LARGE]['learning_rate']:.4g} on the mean loss at "
        f"$d = {settings.dim}$. The full layers have $d = {settings.full_dim}$ and the step "
        f"{records[_FULL]['learning_rate']:.3g}"
    )
    if settings.full_dim < settings.dim:
        text += " (our setting: as many iterations, each a fraction of the work)"
    return text


def _turn(ax: Any, points: FloatArray) -> None:
    """Rotate the view of the trajectory to make room for its axes, and mark its ends."""
    ax.view_init(elev=24, azim=-52)
    ax.set_box_aspect((1.5, 1.2, 0.8), zoom=1.12)
    for point, text, side in ((points[0], "  start", "left"), (points[-1], "end  ", "right")):
        ax.text(*point, text, fontsize=9, ha=side)
