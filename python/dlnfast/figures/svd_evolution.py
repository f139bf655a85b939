# SPDX-License-Identifier: MIT
"""Singular values and vectors of one layer while a deep linear network learns.

The main figure of Yaras, Wang, Hu, Zhu, Balzano, Qu, "The Law of Parsimony in Gradient Descent for Learning
Deep Linear Networks" (arXiv 2306.01154): of the d singular values of a layer, r rise, r fall and d - 2r
stay equal; the vectors of those do not move at all. Also its variant with inputs that are not white.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from .. import theory
from .._problem.problem import Problem
from .._problem.standard import low_rank_recovery
from .._support.arrays import check_count, random_generator
from .._training.options import Record
from .._training.train import train
from .._trajectory.trajectory import Trajectory
from .._weights.initial import orthogonal
from ..plots import AngleDisplay, SingularValueDisplay
from . import Result, setting
from ._captions import set_title
from ._targets import fixed_modes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {
    "singular values": "singular values",
    "right vectors": "right singular vectors",
    "left vectors": "left singular vectors",
}
#: Standard Gaussian inputs are divided by this, so that 300 of them are nearly white.
_INPUT_DIVISOR = 15.0
#: From this width on layers are not drawn, and the target has the modes of the published width: with those
#: of its own, and c = 1 / d^2, nothing would move within the iterations shown.
_LARGE = 1025


@dataclass(frozen=True)
class Settings:
    """The published setting: d = 30, L = 3, r = 3, eps = 1, step 1 on the mean loss, 50 iterations."""

    dim: int = setting(
        30, "d, width of the network; beyond 1024 with the target's singular values and c = 1 / 900 of d = 30"
    )
    depth: int = setting(3, "L, number of layers")
    rank: int = setting(3, "r, rank of the target (number of outputs for gaussian inputs)")
    scale: float = setting(1.0, "eps, scale of the orthogonal initialisation")
    learning_rate: float = setting(1.0, "eta, on the mean loss, with c = 1 / d^2 for white inputs")
    steps: int = setting(50, "iterations")
    momentum: float = setting(0.0, "mu, heavy ball")
    seed: int = setting(0, "seed of the target and of the weights")
    layer: int = setting(1, "layer to show, 1 .. L")
    inputs: str = setting(
        "white",
        "white, or Gaussian samples divided by 15 (then the target has r rows)",
        choices=("white", "gaussian"),
    )
    samples: int = setting(300, "N, number of Gaussian samples")
    reference: str = setting(
        "limit",
        "angles from the vectors at t -> 0+, or from those after the first step, as published",
        choices=("limit", "first_step"),
    )
    engine: str = setting("auto", "engine that trains", choices=("auto", "reduced", "dense"))


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Train once, and read one layer."""
    check_count(settings.depth, "depth")
    if not 1 <= settings.layer <= settings.depth:
        raise ValueError(f"layer is {settings.layer}; wanted 1 .. {settings.depth}, the depth")
    if settings.inputs != "white":
        problem = _gaussian_inputs(settings)
    elif _is_large(settings):
        problem = fixed_modes(settings.dim, settings.rank, settings.seed, Settings().dim)
    else:
        problem = low_rank_recovery(settings.dim, settings.rank, settings.seed)
    widths = [settings.dim] * settings.depth + [problem.dim_out]
    run = train(
        problem,
        orthogonal(widths, settings.scale, settings.seed, implicit=True)
        if _is_large(settings)
        else orthogonal(widths, settings.scale, settings.seed),
        learning_rate=settings.learning_rate,
        steps=settings.steps,
        momentum=settings.momentum,
        engine=settings.engine,
        record=Record(vectors=True, progress=progress),
    )
    layer, reference = settings.layer, cast(Literal["limit", "first_step"], settings.reference)
    displays: dict[str, Any] = {
        "singular values": SingularValueDisplay.from_trajectory(run, layer),
        "right vectors": AngleDisplay.from_trajectory(run, layer, "right", reference),
        "left vectors": AngleDisplay.from_trajectory(run, layer, "left", reference),
    }
    numbers: dict[str, Any] = {name: display.numbers() for name, display in displays.items()}
    numbers |= {"loss": run.loss.tolist(), "engine": run.engine, "training_seconds": run.wall_time}
    numbers |= {"problem": problem.describe(), "why": str(run.certificate)}
    highlights = [str(run.certificate)]
    if run.engine == "reduced":
        rho = run.rho(layer)
        numbers["rho"] = rho.tolist()
        highlights.append(f"rho({run.steps[-1]}) = {rho[-1]:.4f}, {run.multiplicity(layer)} times")
        flow = _flow(settings, run)
        if flow is not None:
            numbers["rho_flow"] = flow.tolist()
            highlights[-1] += f"; gradient flow: {flow[-1]:.4f}"
    for name, display in displays.items():
        highlights.append(f"{name} at the end: {_ends_text(display.numbers())}")
    return Result(displays, numbers, highlights)


def _is_large(settings: Settings) -> bool:
    return settings.dim >= _LARGE and settings.inputs == "white" and settings.engine != "dense"


def _gaussian_inputs(settings: Settings) -> Problem:
    """Return Gaussian inputs that are not white, and Gaussian targets of r components."""
    generator = random_generator(settings.seed, ("svd-evolution", "data"))
    inputs = generator.standard_normal((settings.dim, settings.samples)) / _INPUT_DIVISOR
    return Problem.from_data(inputs, generator.standard_normal((settings.rank, settings.samples)))


def _flow(settings: Settings, run: Trajectory) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """Return gradient flow's rho where it has a closed form: square layers, no momentum."""
    if settings.inputs != "white" or settings.momentum > 0 or settings.scale == 0:
        return None
    assert run.problem is not None
    return theory.rho_flow(
        run.steps, settings.scale, settings.depth, run.problem.loss_scale, settings.learning_rate
    )


def _ends_text(numbers: dict[str, Any]) -> str:
    parts = []
    for group in ("top", "middle", "bottom"):
        if group in numbers:
            part = numbers[group]
            columns = [part["low"], part["high"]] if group == "middle" else part["values"]
            count = part["multiplicity"] if group == "middle" else len(columns)
            last = [column[-1] for column in columns]
            parts.append(f"{group} {count} from {min(last):.3g} to {max(last):.3g}")
    return ", ".join(parts)


def draw(settings: Settings, result: Result) -> Figure:
    """Draw the three panels twice: as waterfalls, and flat."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(13.0, 8.6))
    # Axes in three dimensions leave wide margins and reach beyond them: no automatic layout suits both rows.
    upper = figure.add_gridspec(1, 3, left=0.0, right=0.955, bottom=0.45, top=0.92, wspace=0.0)
    lower = figure.add_gridspec(1, 3, left=0.055, right=0.985, bottom=0.115, top=0.425, wspace=0.24)
    handles = result.displays["singular values"].handles()
    for column, (name, display) in enumerate(result.displays.items()):
        space = figure.add_subplot(upper[column], projection="3d")
        display.plot(space, style="waterfall", legend=False)
        space.set_title(_TITLES[name], fontsize=12, y=1.0)
        flat = figure.add_subplot(lower[column])
        display.plot(flat, legend=False)
        if name == "singular values" and "rho_flow" in result.numbers:
            line = Line2D(
                display.numbers()["steps"],
                result.numbers["rho_flow"],
                color="black",
                linewidth=1.2,
                linestyle=":",
                zorder=4,
                label=r"gradient flow: $\rho(t)$ in closed form",
            )
            flat.add_line(line)
            handles.append(line)
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False)
    set_title(
        figure,
        f"Layer {settings.layer} of {settings.depth} of a deep linear network, $d = {settings.dim}$",
    )
    return figure


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    del result
    parts = [
        f"$r = {settings.rank}$",
        rf"$\epsilon = {settings.scale:g}$",
        f"step {settings.learning_rate:g} on the mean loss",
    ]
    if settings.momentum > 0:
        parts.append(f"momentum {settings.momentum:g}")
    if settings.inputs == "gaussian":
        parts.append(f"{settings.samples} Gaussian inputs, not white; Gaussian targets")
    if _is_large(settings):
        parts.append("modes and prefactor of $d = 30$")
    return ", ".join(parts)
