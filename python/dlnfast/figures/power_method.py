# SPDX-License-Identifier: MIT
"""The first steps of a deep linear network, beside a power iteration on the target.

Kwon, Zhang, Song, Balzano, Qu, "Efficient Low-Dimensional Compression of Overparameterized Models" (arXiv
2311.05061): the leading singular vectors of the first and last layer turn to those of the target, also where
the target is known in part. Ours: the step and the iteration that explain it. The first gradient step of each
layer has the target's singular subspaces, up to eps^L / sigma_r. Two small layers follow a block power
iteration; three do so only while the inner layer has its initial size, and are faster after that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .. import measures, theory
from .._problem.low_rank import LowRank
from .._problem.observations import Completion
from .._problem.problem import Problem
from .._problem.standard import low_rank_recovery
from .._support.arrays import FloatArray, check_count, check_scale, random_generator
from .._training.options import Record
from .._training.train import train
from .._trajectory.trajectory import Trajectory
from .._weights.gradients import gradients
from .._weights.initial import orthogonal
from ..plots import COLOURS, LineDisplay, SeriesDisplay
from . import Result, setting
from ._captions import set_title
from ._targets import spaced_target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ITERATION: Final = "power iteration"
#: Settings for --quick.
QUICK: Final = {"steps": 25_000}

#: Share of the first loss that may be lost while the residual counts as constant.
_SHARE: Final = 0.01


@dataclass(frozen=True)
class Settings:
    """Last panel: the published setting, d = 100, r = 10, L = 3, eps = 0.01, step 3. The others are ours."""

    dim: int = setting(100, "d")
    rank: int = setting(3, "r of the first three panels")
    depths: tuple[int, ...] = setting((2, 3, 4), "L in the first panel")
    scales: tuple[float, ...] = setting((0.03, 0.1, 0.3, 1.0), "eps in the first panel")
    shallow_scale: float = setting(1e-4, "eps of two layers")
    deep_scale: float = setting(1e-2, "eps of three layers")
    fraction: float = setting(0.05, "eta of two layers, as a share of the stability threshold of sigma_1")
    deep_fraction: float = setting(0.5, "eta of three layers, likewise")
    published_rank: int = setting(10, "r of the last panel: every fifth singular value of a Gaussian")
    observed: float = setting(0.3, "share of observed entries in the last panel")
    scale: float = setting(1e-2, "eps of the last panel")
    learning_rate: float = setting(3.0, "eta of the last panel, on the mean over the known entries")
    steps: int = setting(100_000, "iterations of the last panel")
    every: int = setting(200, "iterations between two records of the last panel")
    seed: int = setting(0, "seed of the targets, the observed entries and the weights")


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Take first steps, train two and three layers beside the iteration, and follow leading vectors."""
    for name in ("rank", "published_rank", "steps", "every"):
        check_count(getattr(settings, name), name)
    for name in ("fraction", "deep_fraction", "shallow_scale", "deep_scale"):
        check_scale(getattr(settings, name), name, strict=True)
    target = spaced_target(settings.dim, settings.published_rank, settings.seed, "published_rank")
    problem = low_rank_recovery(settings.dim, settings.rank, settings.seed)
    first = _take_first_steps(settings, problem)
    shallow = _compare(settings, problem, 2, settings.shallow_scale, settings.fraction, progress)
    deep = _compare(settings, problem, 3, settings.deep_scale, settings.deep_fraction, progress)
    similarities = _follow_vectors(settings, target, progress)
    displays: dict[str, Any] = {
        "first step": SeriesDisplay(
            {label: (settings.scales, values) for label, values in first["angles"].items()},
            x_label=r"initial scale $\epsilon$",
            y_label="sine of the largest angle to the target's subspaces",
            log_x=True,
        ),
        "two layers": _plot_sines(shallow),
        "three layers": _plot_sines(deep),
        "similarity": LineDisplay(
            similarities["steps"],
            similarities["curves"],
            x_label="iteration $t$",
            y_label="similarity of leading vectors",
        ),
    }
    numbers: dict[str, Any] = {
        "problem": problem.describe(),
        "first_step": first,
        "two_layers": shallow,
        "three_layers": deep,
        "similarity": similarities,
        "displays": {name: display.numbers() for name, display in displays.items()},
    }
    return Result(displays, numbers, _highlights(settings, numbers))


def _take_first_steps(settings: Settings, problem: Problem) -> dict[str, Any]:
    """Return sines of angles between leading singular subspaces of first gradients and the target's.

    The target's subspaces are mapped to each layer by the initial weights: Q_{L:l+1}^T U on the left,
    Q_{l-1:1} V on the right.
    """
    target, rank = problem.target_factors(), settings.rank
    angles: dict[str, list[float]] = {}
    bounds: dict[str, list[float | None]] = {}
    for depth in settings.depths:
        check_count(depth, "depths")
        label = f"$L = {depth}$"
        angles[label], bounds[label] = [], []
        for scale in settings.scales:
            check_scale(scale, "scales", strict=True)
            weights = orthogonal([settings.dim] * (depth + 1), scale, settings.seed)
            sines = []
            below = target.V
            for layer, slope in enumerate(gradients(problem, weights)):
                above = target.U
                for weight in weights[:layer:-1]:
                    above = weight.T @ above
                left, _, right = np.linalg.svd(slope)
                sines += [_largest_sine(left[:, :rank], above), _largest_sine(right[:rank].T, below)]
                below = weights[layer] @ below
            angles[label].append(max(sines))
            gap = float(target.s[-1]) - scale**depth
            bounds[label].append(scale**depth / gap if gap > 0 else None)
    return {"scales": list(settings.scales), "angles": angles, "bounds": bounds}


def _largest_sine(basis: FloatArray, other: FloatArray) -> float:
    frame = np.linalg.qr(other)[0]
    return float(np.sin(measures.subspace_angles(basis, frame).max()))


def _compare(
    settings: Settings, problem: Problem, depth: int, scale: float, fraction: float, progress: bool
) -> dict[str, Any]:
    """Train until the target is learned; return the sines of its last layer and of the power iteration."""
    target, dim = problem.target_factors(), settings.dim
    threshold = theory.stability_threshold(float(target.s[0]), depth, problem.loss_scale)
    rate = fraction * threshold
    weights = orthogonal([dim] * (depth + 1), scale, settings.seed)
    options: dict[str, Any] = {
        "learning_rate": rate,
        "steps": 10**6,
        "tolerance": 1e-3 * problem.loss_scale * problem.output_norm_squared / 2,
    }
    total = len(train(problem, weights, record=Record(every=10**6), **options).loss) - 1
    every = max(total // 150, 1)
    run = train(problem, weights, record=Record(every=every, progress=progress), **options)
    steps = [int(step) for step in run.steps[1:]]
    # Inner layers at their start: one orthogonal map of the first layer, and a smaller rate.
    inner = np.eye(dim)
    for weight in weights[1:-1]:
        inner = weight @ inner / scale
    frozen = [inner @ weights[0], weights[-1]]
    iterated = []
    for step in steps:
        layers = theory.power_iteration(
            problem, frozen, steps=step, learning_rate=rate * scale ** (depth - 2)
        )
        iterated.append(_leading_sine(np.linalg.svd(layers[1])[0], target.U))
    trained = [_leading_sine(run.singular_vectors(depth, "left", step), target.U) for step in steps]
    lost = np.flatnonzero(run.loss < (1 - _SHARE) * run.loss[0])
    return {
        "depth": depth,
        "scale": scale,
        "learning_rate": rate,
        "steps": steps,
        "training": trained,
        "iteration": iterated,
        "residual_until": int(lost[0]) if lost.size else total,
        "engine": run.engine,
    }


def _leading_sine(vectors: FloatArray, frame: FloatArray) -> float:
    return _largest_sine(vectors[:, : frame.shape[1]], frame)


def _plot_sines(record: dict[str, Any]) -> SeriesDisplay:
    series = {name: (record["steps"], record[name]) for name in ("training", "iteration")}
    return SeriesDisplay(
        {"training": series["training"], _ITERATION: series["iteration"]},
        x_label="iteration $t$",
        y_label=r"sine of the largest angle, leading $u_i$ of $W_L$ to $U$",
    )


def _follow_vectors(settings: Settings, target: LowRank, progress: bool) -> dict[str, Any]:
    """Return |<u_1(W_L), u_1(Phi)>| and |<v_1(W_1), v_1(Phi)>|, with all entries known and with some."""
    dim = settings.dim
    generator = random_generator(settings.seed, ("power-method", "observed"))
    chosen = generator.permutation(dim**2)[: max(round(settings.observed * dim**2), 1)]
    rows, columns = np.divmod(chosen, dim)
    problems: dict[str, Problem | Completion] = {
        "all entries": Problem(target, loss_scale=1 / dim**2),
        f"{100 * settings.observed:g} % of the entries": Completion(
            rows, columns, target.dense()[rows, columns], (dim, dim), reduction="observed", truth=target
        ),
    }
    weights = orthogonal([dim] * 4, settings.scale, settings.seed)
    curves: dict[str, list[float]] = {}
    steps: list[int] = []
    for name, problem in problems.items():
        run = train(
            problem,
            weights,
            learning_rate=settings.learning_rate,
            steps=settings.steps,
            record=Record(every=settings.every, singular_values=1, vectors=True, progress=progress),
        )
        steps = [int(step) for step in run.steps[1:]]
        curves[f"$u_{{L,1}}$, {name}"] = _similarities(run, 3, "left", target.U[:, 0], steps)
        curves[f"$v_{{1,1}}$, {name}"] = _similarities(run, 1, "right", target.V[:, 0], steps)
    return {"steps": steps, "curves": curves}


def _similarities(
    run: Trajectory, layer: int, side: str, vector: FloatArray, steps: list[int]
) -> list[float]:
    return [float(abs(run.singular_vectors(layer, side, step)[:, 0] @ vector)) for step in steps]


def _highlights(settings: Settings, numbers: dict[str, Any]) -> list[str]:
    lines = []
    for label, values in numbers["first_step"]["angles"].items():
        parts = [
            f"{value:.2e} at eps = {scale:g} (bound {'none' if bound is None else f'{bound:.2e}'})"
            for scale, value, bound in zip(
                settings.scales, values, numbers["first_step"]["bounds"][label], strict=True
            )
        ]
        lines.append(f"first step, {label.strip('$')}: sine {', '.join(parts)}")
    for name in ("two_layers", "three_layers"):
        record = numbers[name]
        until = [i for i, step in enumerate(record["steps"]) if step < record["residual_until"]]
        apart = max((abs(np.log(record["training"][i] / record["iteration"][i])) for i in until), default=0.0)
        lines.append(
            f"{name.replace('_', ' ')}: the sines of training and power iteration differ by a factor of up "
            f"to {np.exp(apart):.3f} until the loss falls by {100 * _SHARE:g} %, at step "
            f"{record['residual_until']}; first {record['training'][0]:.4f} and {record['iteration'][0]:.4f}"
        )
    for label, values in numbers["similarity"]["curves"].items():
        steps = numbers["similarity"]["steps"]
        reached = [step for step, value in zip(steps, values, strict=True) if value >= 0.99]
        lines.append(
            f"similarity, {label.replace('$', '')}: {values[0]:.3f} at iteration {steps[0]}, "
            + (f"0.99 from iteration {reached[0]}" if reached else f"at most {max(values):.3f}")
        )
    return lines


def draw(settings: Settings, result: Result) -> Figure:
    """Draw the first step, two comparisons with the power iteration, and the published similarity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.0, 9.0), layout="constrained")
    axes = figure.subplots(2, 2)
    first, shallow, deep, vectors = axes.flat
    numbers = result.numbers
    result.displays["first step"].plot(first, marker="o", legend=False)
    for index, values in enumerate(numbers["first_step"]["bounds"].values()):
        known = [(e, b) for e, b in zip(settings.scales, values, strict=True) if b is not None]
        first.plot(*zip(*known, strict=True), "--", color=COLOURS[index], linewidth=1.0)
    bound = r"bound $\epsilon^L / (\sigma_r - \epsilon^L)$"
    first.plot([], [], "--", color="#555555", linewidth=1.0, label=bound)
    first.set_title("first gradient step: all layers, both sides", fontsize=11)
    first.legend(frameon=False, fontsize=9.5)
    for ax, name, key in (
        (shallow, "two layers", "two_layers"),
        (deep, "three layers", "three_layers"),
    ):
        record = numbers[key]
        styles: dict[str, dict[str, Any]] = {
            "training": {"color": COLOURS[0]},
            _ITERATION: {"color": COLOURS[1], "linestyle": "--"},
        }
        result.displays[name].plot(ax, styles=styles, legend=False)
        ax.axhline(2**-0.5, color="#555555", linewidth=1.0, linestyle=":", label=r"$1/\sqrt{2}$: wide layers")
        ax.axvline(record["residual_until"], color="#999999", linewidth=1.0, label="loss 1 % lower")
        ax.set_ylim(bottom=min(record["training"]) / 3)
        extra = "" if record["depth"] == 2 else ", its inner layer held"
        ax.set_title(
            rf"$L = {record['depth']}$, $\epsilon = {record['scale']:g}$, and the power iteration{extra}",
            fontsize=11,
        )
        ax.legend(frameon=False, fontsize=9.5, loc="lower left")
    result.displays["similarity"].plot(vectors, legend=False)
    for line, style in zip(vectors.get_lines(), ("-", "--", "-", "--"), strict=False):
        line.set_linestyle(style)
    vectors.set_ylim(0, 1.05)
    vectors.set_title(
        rf"published: $L = 3$, $r = {settings.published_rank}$, $\epsilon = {settings.scale:g}$, "
        f"step {settings.learning_rate:g}",
        fontsize=11,
    )
    vectors.legend(frameon=False, fontsize=9.5, loc="lower right")
    set_title(figure, f"First steps of training as a power iteration, $d = {settings.dim}$")
    return figure


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    del result
    return f"$r = {settings.rank}$ in the first three panels"
