# SPDX-License-Identifier: MIT
"""Matrix completion by networks as narrow as the learned matrix: savings, and errors of frozen outer layers.

Yaras, Wang, Balzano, Qu, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation"
(arXiv 2406.04112): the bases of the gradient at the start, which turn slowly (gamma), follow the wide one.
Kwon, Zhang, Song, Balzano, Qu, "Efficient Low-Dimensional Compression of Overparameterized Models"
(arXiv 2311.05061): the leading singular vectors of the observed matrix, outer layers faster (alpha).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .._completion.train_compressed import train_compressed
from .._problem.observations import Completion
from .._problem.standard import low_rank_completion
from .._support.arrays import FloatArray, check_count
from .._support.errors import DivergedError
from .._training.options import Record
from .._training.train import train
from .._trajectory.trajectory import Trajectory
from .._weights.initial import orthogonal
from ..plots import COLOURS, LineDisplay, SeriesDisplay
from . import Clock, Result, alike_rate, errors_at_records, run_until, setting
from ._captions import set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The command line starts again where a variable caps a library.
TIMED = True

#: Settings for --quick.
QUICK: Final[dict[str, Any]] = {
    "dim": 200,
    "full_dim": 100,
    "scale": 1e-2,
    "steps": 4000,
    "every": 50,
    "narrow_ranks": (5, 10),
    "narrow_steps": 15_000,
    "deep_widths": (20, 50),
    "deep_steps": 40_000,
    "alpha_steps": 30_000,
}

#: The error that counts as recovered.
_RECOVERED: Final = 1e-12
#: Loss of the observed entries at which training stops: the recovery error is then below the level above.
_ENOUGH: Final = 1e-15
_FULL: Final = "full"
_ERROR_LABEL: Final = "recovery error, unobserved"


@dataclass(frozen=True)
class Settings:
    """The published settings, except the width of the uncompressed network: ours."""

    dim: int = setting(1000, "d of the compressed networks")
    full_dim: int = setting(300, "d at which whole layers are trained too; published: 1000 (20 minutes)")
    rank: int = setting(5, "r, and r_hat")
    observed: float = setting(0.2, "share of the entries that is observed")
    depth: int = setting(3, "L")
    scale: float = setting(1e-3, "eps, of orthogonal layers")
    learning_rate: float = setting(
        5e3, "eta, on the mean over d^2, at d = 1000; eta (d / 1000)^1.5 at others"
    )
    outer: tuple[float, ...] = setting(
        (0.0, 0.01, 0.1, 1.0), "gamma: outer layers learn at gamma eta; 0.1: ours"
    )
    steps: int = setting(22_000, "iterations")
    every: int = setting(100, "iterations between two records")
    narrow_ranks: tuple[int, ...] = setting(
        (5, 10, 20), "r_hat, for networks 2 r_hat wide; published: 5 8 .. 20"
    )
    narrow_outer: float = setting(0.01, "gamma of those")
    narrow_steps: int = setting(70_000, "iterations of those, at most")
    deep_dim: int = setting(100, "d of the comparison of depths")
    deep_rank: int = setting(10, "r of the comparison of depths")
    deep_observed: float = setting(0.3, "share of observed entries there")
    deep_widths: tuple[int, ...] = setting((10, 20, 30, 50, 100), "inner widths there (ours)")
    deep_scale: float = setting(1e-2, "eps there (ours)")
    deep_learning_rate: float = setting(20.0, "eta there (ours)")
    deep_steps: int = setting(100_000, "iterations there, at most (ours)")
    alpha_dim: int = setting(100, "d of the comparison of alpha")
    alpha_rank: int = setting(5, "r of the comparison of alpha; compressed to 2 r")
    alpha_observed: float = setting(0.3, "share of observed entries there")
    alpha_scale: float = setting(1e-2, "eps there")
    alpha_learning_rate: float = setting(10.0, "eta there")
    alphas: tuple[float, ...] = setting((1.0, 5.0), "alpha: outer layers learn at alpha eta; published: 5")
    alpha_steps: int = setting(60_000, "iterations there, at most")
    seed: int = setting(0, "seed of the matrices, the observed entries and the weights")


@dataclass
class _Curve:
    """The recovery error of one run at its records, with their steps and times."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    #: Distances of the end-to-end matrices of other runs, relative to the norm of the truth.
    distances: dict[str, list[float]] = field(default_factory=dict)
    #: The step at which the loss stopped being finite.
    diverged_at: int | None = None

    def record(self) -> dict[str, Any]:
        """Return all records and the last step."""
        points = zip(self.steps, self.seconds, self.errors, strict=True)
        reached = [(step, seconds) for step, seconds, error in points if error <= _RECOVERED]
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "errors": self.errors,
            "distances": self.distances,
            "diverged_at": self.diverged_at,
            "recovered_at": reached[0][0] if reached else None,
            "recovered_after": reached[0][1] if reached else None,
        }


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Complete matrices: compressed and whole, narrow and compressed, shallow and deep."""
    for name in ("steps", "every", "narrow_steps", "deep_steps", "alpha_steps", "rank"):
        check_count(getattr(settings, name), name)
    check_count(settings.depth, "depth", minimum=2)
    large = _train_compressed(settings, settings.dim, progress, lazily=True)
    small = _compare_with_full(settings, progress)
    narrow = _train_narrow(settings, progress)
    deep = _train_deep(settings, progress)
    alphas = _alphas(settings, progress)

    seconds, iteration = "seconds, set-up included", "iteration $t$"
    curves = {label: curve for label, (curve, _) in large.items()}
    gammas = {label: curve for label, curve in small.items() if label != _FULL}
    displays: dict[str, Any] = {
        "iterations": _plot_errors(curves, iteration),
        "seconds": _plot_errors(curves, seconds, in_seconds=True),
        "full": _plot_errors(small, seconds, in_seconds=True, log_x=True),
        "distance": SeriesDisplay(
            {label: (small[_FULL].steps, small[_FULL].distances[label]) for label in gammas},
            x_label=iteration,
            y_label=r"$\|W_{L:1} - W^{\mathrm{full}}_{L:1}\|_F \,/\, \|\Phi\|_F$",
        ),
        "narrow iterations": _plot_over_ranks(narrow, "steps", r"iterations to $10^{-12}$"),
        "narrow seconds": _plot_over_ranks(narrow, "seconds", r"seconds to $10^{-12}$"),
        "depth": _plot_over_widths(settings, deep),
        "alpha": _plot_errors(alphas, seconds, in_seconds=True, log_x=True),
    }
    numbers: dict[str, Any] = {
        "compressed": {label: curve.record() for label, curve in curves.items()},
        "beside_full": {label: curve.record() for label, curve in small.items()},
        "narrow": narrow,
        "depth": deep,
        "alpha": {label: curve.record() for label, curve in alphas.items()},
        "displays": {name: display.numbers() for name, display in displays.items()},
    }
    return Result(displays, numbers, _highlights(settings, numbers))


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


def _gamma_label(gamma: float) -> str:
    return rf"$\gamma = {gamma:g}$"


def _measure_errors(problem: Completion, clock: Clock, run: Trajectory) -> _Curve:
    """Return the recovery error at the snapshots of a run."""
    return _Curve(*errors_at_records(problem, clock, run, "unobserved"))


def _train_compressed(
    settings: Settings, dim: int, progress: bool, *, lazily: bool
) -> dict[str, tuple[_Curve, Trajectory]]:
    """Train compressed networks for every gamma, from lazily sampled weights or from drawn ones."""
    problem = low_rank_completion(dim, settings.rank, settings.observed, seed=settings.seed)
    widths = [dim] * (settings.depth + 1)
    result = {}
    for gamma in settings.outer:
        clock, diverged = Clock(), None
        try:
            run = train_compressed(
                problem,
                orthogonal(widths, settings.scale, settings.seed, implicit=True)
                if lazily
                else orthogonal(widths, settings.scale, settings.seed),
                rank=settings.rank,
                steps=settings.steps,
                outer=gamma,
                learning_rate=alike_rate(settings.learning_rate, dim),
                record=Record(
                    weights_every=settings.every,
                    every=settings.every,
                    callback=clock,
                    progress=progress,
                    singular_values=None,
                ),
                tolerance=_ENOUGH,
            )
        except DivergedError as error:
            run, diverged = run_until(error), error.step
        curve = _measure_errors(problem, clock, run)
        curve.diverged_at = diverged
        result[_gamma_label(gamma)] = curve, run
    return result


def _compare_with_full(settings: Settings, progress: bool) -> dict[str, _Curve]:
    """Train whole and compressed layers from the same start, and measure their distance."""
    dim = settings.full_dim
    narrow = _train_compressed(settings, dim, progress, lazily=False)
    problem = low_rank_completion(dim, settings.rank, settings.observed, seed=settings.seed)
    clock = Clock()
    weights = orthogonal([dim] * (settings.depth + 1), settings.scale, settings.seed)
    clock(0, 0.0)
    others = {label: run for label, (_, run) in narrow.items()}
    full = _train_full(
        problem,
        weights,
        clock.seconds[0],
        others,
        rate=alike_rate(settings.learning_rate, dim),
        steps=settings.steps,
        every=settings.every,
        progress=progress,
    )
    return {_FULL: full} | {label: curve for label, (curve, _) in narrow.items()}


def _train_full(
    problem: Completion,
    weights: list[FloatArray],
    start: float,
    others: Mapping[str, Trajectory],
    *,
    rate: float,
    steps: int,
    every: int,
    progress: bool,
) -> _Curve:
    """Train whole layers in segments, so that no more than one product is held."""
    curve = _Curve(distances={label: [] for label in others})
    step, seconds, loss = 0, start, math.inf
    size = float(np.linalg.norm(problem.truth.s))  # type: ignore[union-attr]
    while True:
        product = weights[0]
        for layer in weights[1:]:
            product = layer @ product
        curve.steps.append(step)
        curve.seconds.append(seconds)
        curve.errors.append(problem.recovery_error(product, "unobserved"))
        for label, run in others.items():
            # A finished run keeps its last value; a diverged run has none.
            finished = step >= run.steps[-1]
            known = not finished or run.outcome != "diverged"
            other = run.end_to_end(-1 if finished else step) if known else None
            far = math.nan if other is None else float(np.linalg.norm(other - product)) / size
            curve.distances[label].append(far)
        if step >= steps or loss <= _ENOUGH:
            return curve
        # Without momentum a run resumes from the last weights of another.
        run = train(
            problem,
            weights,
            learning_rate=rate,
            steps=min(every, steps - step),
            record=Record(every=every, singular_values=None, progress=progress),
        )
        weights, loss = run.all_weights(), float(run.loss[-1])
        step, seconds = step + len(run.loss) - 1, seconds + run.wall_time


def _train_narrow(settings: Settings, progress: bool) -> dict[str, list[dict[str, Any]]]:
    """Train random networks 2 r_hat wide, and compressed ones, until they have recovered the matrix."""
    problem = low_rank_completion(settings.dim, settings.rank, settings.observed, seed=settings.seed)
    rate = alike_rate(settings.learning_rate, settings.dim)
    options: dict[str, Any] = {"steps": settings.narrow_steps, "tolerance": _ENOUGH}
    result: dict[str, list[dict[str, Any]]] = {"narrow, random": [], "compressed": []}
    for rank in settings.narrow_ranks:
        for label, entries in result.items():
            clock = Clock()
            record = Record(
                every=settings.every,
                singular_values=None,
                weights_every=settings.every,
                callback=clock,
                progress=progress,
            )
            if label == "compressed":
                run = train_compressed(
                    problem,
                    orthogonal(
                        [settings.dim] * (settings.depth + 1), settings.scale, settings.seed, implicit=True
                    ),
                    rank=rank,
                    outer=settings.narrow_outer,
                    learning_rate=rate,
                    record=record,
                    **options,
                )
            else:
                widths = [settings.dim, *[2 * rank] * (settings.depth - 1), settings.dim]
                run = train(
                    problem,
                    orthogonal(widths, settings.scale, settings.seed),
                    learning_rate=rate,
                    engine="dense",
                    record=record,
                    **options,
                )
            step = _find_recovery(problem, run)
            entries.append(
                {
                    "rank": rank,
                    "steps": step,
                    "seconds": None if step is None else clock.seconds[step],
                    "final_error": problem.recovery_error(run.all_weights(), "unobserved"),
                    "taken": len(run.loss) - 1,
                }
            )
    return result


def _find_recovery(problem: Completion, run: Trajectory) -> int | None:
    """Return the first record at which the matrix is recovered, for errors that fall."""
    steps = [int(step) for step in run.steps]
    position = bisect.bisect_left(
        steps,
        True,
        key=lambda step: problem.recovery_error(run.all_weights(step), "unobserved") <= _RECOVERED,
    )
    return steps[position] if position < len(steps) else None


def _train_deep(settings: Settings, progress: bool) -> dict[str, list[dict[str, Any]]]:
    """Train two and three layers of several inner widths."""
    dim = settings.deep_dim
    problem = low_rank_completion(dim, settings.deep_rank, settings.deep_observed, seed=settings.seed)
    result: dict[str, list[dict[str, Any]]] = {}
    for depth in (2, 3):
        entries = result.setdefault(f"$L = {depth}$", [])
        for width in settings.deep_widths:
            run = train(
                problem,
                orthogonal([dim, *[width] * (depth - 1), dim], settings.deep_scale, settings.seed),
                learning_rate=settings.deep_learning_rate,
                steps=settings.deep_steps,
                tolerance=_ENOUGH,
                record=Record(every=settings.deep_steps, singular_values=None, progress=progress),
            )
            entries.append(
                {
                    "width": width,
                    "steps": len(run.loss) - 1,
                    "loss": float(run.loss[-1]),
                    "error": problem.recovery_error(run.all_weights(), "unobserved"),
                }
            )
    return result


def _alphas(settings: Settings, progress: bool) -> dict[str, _Curve]:
    """Train whole layers, and those of the surrogate with outer layers at several rates."""
    dim, rank = settings.alpha_dim, settings.alpha_rank
    problem = low_rank_completion(dim, rank, settings.alpha_observed, seed=settings.seed)
    every = max(settings.every // 2, 1)
    clock = Clock()
    weights = orthogonal([dim] * (settings.depth + 1), settings.alpha_scale, settings.seed)
    clock(0, 0.0)
    rate = settings.alpha_learning_rate
    steps = settings.alpha_steps
    full = _train_full(
        problem, weights, clock.seconds[0], {}, rate=rate, steps=steps, every=every, progress=progress
    )
    result = {_FULL: full}
    for alpha in settings.alphas:
        clock = Clock()
        run = train_compressed(
            problem,
            rank=min(2 * rank, dim),
            basis="surrogate",
            depth=settings.depth,
            scale=settings.alpha_scale,
            outer=alpha,
            learning_rate=rate,
            tolerance=_ENOUGH,
            steps=steps,
            record=Record(
                every=every, singular_values=None, weights_every=every, callback=clock, progress=progress
            ),
        )
        result[rf"$\alpha = {alpha:g}$"] = _measure_errors(problem, clock, run)
    return result


# --------------------------------------------------------------------------------------------------
# Displays and numbers
# --------------------------------------------------------------------------------------------------


def _plot_errors(
    curves: Mapping[str, _Curve], x_label: str, *, in_seconds: bool = False, log_x: bool = False
) -> SeriesDisplay:
    series = {label: (c.seconds if in_seconds else c.steps, c.errors) for label, c in curves.items()}
    return SeriesDisplay(series, x_label=x_label, y_label=_ERROR_LABEL, log_x=log_x)


def _plot_over_ranks(
    narrow: Mapping[str, Sequence[Mapping[str, Any]]], name: str, y_label: str
) -> LineDisplay:
    ranks = [entry["rank"] for entry in narrow["compressed"]]
    curves = {
        label: [math.nan if entry[name] is None else entry[name] for entry in entries]
        for label, entries in narrow.items()
    }
    return LineDisplay(ranks, curves, x_label=r"$\hat r$ (width $2 \hat r$)", y_label=y_label)


def _plot_over_widths(settings: Settings, deep: Mapping[str, Sequence[Mapping[str, Any]]]) -> SeriesDisplay:
    series = {
        label: ([entry["width"] for entry in entries], [entry["error"] for entry in entries])
        for label, entries in deep.items()
    }
    return SeriesDisplay(series, x_label="inner width", y_label=_ERROR_LABEL)


def _highlights(settings: Settings, numbers: Mapping[str, Any]) -> list[str]:
    lines = [
        *(
            f"d = {settings.dim}, {label}: {_describe_ending(r)}"
            for label, r in numbers["compressed"].items()
        ),
        *(
            f"d = {settings.full_dim}, {label}: {_describe_ending(r)}"
            for label, r in numbers["beside_full"].items()
        ),
    ]
    for label, far in numbers["beside_full"][_FULL]["distances"].items():
        known = [value for value in far if math.isfinite(value)]
        lines.append(
            f"d = {settings.full_dim}, {label} and full: {max(known):.2g} of the norm of the matrix apart at "
            f"most, {known[-1]:.2g} at the last record of both"
        )
    for label, entries in numbers["narrow"].items():
        parts = [
            f"r_hat {entry['rank']}: "
            + (
                f"not in {entry['taken']} ({entry['final_error']:.1e})"
                if entry["steps"] is None
                else f"{entry['steps']}, {entry['seconds']:.3g} s"
            )
            for entry in entries
        ]
        lines.append(f"{label}, iterations to {_RECOVERED:g}: {'; '.join(parts)}")
    for label, entries in numbers["depth"].items():
        parts = [f"{entry['error']:.1e} at width {entry['width']}" for entry in entries]
        lines.append(f"d = {settings.deep_dim}, {label}: {', '.join(parts)}")
    lines += [f"surrogate, {label}: {_describe_ending(record)}" for label, record in numbers["alpha"].items()]
    return [line.replace("$", "").replace("\\", "") for line in lines]


def _describe_ending(record: Mapping[str, Any]) -> str:
    if record["diverged_at"] is not None:
        return f"DIVERGES at iteration {record['diverged_at']}"
    if record["recovered_at"] is not None:
        seconds = record["recovered_after"]
        return f"{_RECOVERED:g} at iteration {record['recovered_at']}, after {seconds:.3g} s"
    error, step, seconds = (record[name][-1] for name in ("errors", "steps", "seconds"))
    return f"error {error:.3g} after {step} iterations, {seconds:.3g} s"


# --------------------------------------------------------------------------------------------------
# Drawing
# --------------------------------------------------------------------------------------------------


def draw(settings: Settings, result: Result) -> Figure:
    """Draw eight panels: gammas, comparison with the full network, narrow networks, depths and alphas."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18.0, 9.4), layout="constrained")
    axes = figure.subplots(2, 4)
    shades = [COLOURS[3], COLOURS[0], COLOURS[2], COLOURS[4], COLOURS[5]]
    gammas = [_gamma_label(gamma) for gamma in settings.outer]
    styles: dict[str, dict[str, Any]] = {
        label: {"color": shades[i % len(shades)], "linewidth": 1.8} for i, label in enumerate(gammas)
    }
    styles[_FULL] = {"color": COLOURS[1], "linewidth": 4.0, "alpha": 0.45}
    styles |= {
        rf"$\alpha = {alpha:g}$": {"color": shades[(i + 1) % len(shades)]}
        for i, alpha in enumerate(settings.alphas)
    }
    displays = result.displays
    titles = {
        "iterations": f"compressed, $d = {settings.dim}$",
        "seconds": f"compressed, $d = {settings.dim}$",
        "full": f"beside the full network, $d = {settings.full_dim}$",
        "distance": f"distance from the full network, $d = {settings.full_dim}$",
        "narrow iterations": rf"random and narrow, or compressed ($\gamma = {settings.narrow_outer:g}$)",
        "narrow seconds": "the same: seconds, set-up included",
        "depth": f"depth: $d = {settings.deep_dim}$, $r = {settings.deep_rank}$, "
        rf"{100 * settings.deep_observed:g} %, $\epsilon = {settings.deep_scale:g}$",
        "alpha": f"surrogate: $d = {settings.alpha_dim}$, $r = {settings.alpha_rank}$, "
        f"{100 * settings.alpha_observed:g} %, step {settings.alpha_learning_rate:g}",
    }
    for ax, (name, display) in zip(axes.flat, displays.items(), strict=True):
        if name.startswith("narrow"):
            display.plot(ax, colors=(COLOURS[1], COLOURS[0]), marker="o", legend=False)
            ax.set_ylim(0, 1.2 * ax.get_ylim()[1])
            ax.set_xticks(display.x)
        elif name == "depth":
            display.plot(ax, marker="o", legend=False)
        else:
            display.plot(ax, styles=styles, legend=False)
        ax.set_title(titles[name], fontsize=11)
        ax.legend(frameon=False, fontsize=9.5, loc="best")
    for name, records in (("iterations", "compressed"), ("full", "beside_full")):
        _name_ends(axes.flat[list(displays).index(name)], result.numbers[records])
    set_title(figure, f"Deep matrix completion and its compression, $L = {settings.depth}$")
    return figure


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    del result
    text = (
        f"$r = {settings.rank}$, {100 * settings.observed:g} % observed, "
        rf"$\epsilon = {settings.scale:g}$, "
        f"step {alike_rate(settings.learning_rate, settings.dim):.4g} on the mean over $d^2$ at "
        f"$d = {settings.dim}$. The error is half the sum of squares over the unobserved entries, over $d^2$"
    )
    if settings.full_dim < settings.dim:
        text += (
            f". The full network has $d = {settings.full_dim}$ and the "
            f"step {alike_rate(settings.learning_rate, settings.full_dim):.3g} (our setting)"
        )
    return text


def _name_ends(ax: Axes, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Mark in the legend the runs that diverged or stalled."""
    handles, labels = ax.get_legend_handles_labels()
    for position, label in enumerate(labels):
        if records[label]["diverged_at"] is not None:
            labels[position] = f"{label}: diverges"
        elif records[label]["recovered_at"] is None:
            labels[position] = f"{label}: stops at {records[label]['errors'][-1]:.1e}"
    ax.legend(handles, labels, frameon=False, fontsize=9.5, loc="lower left")
