# SPDX-License-Identifier: MIT
"""Update rules and the invariant subspaces: Nesterov, Muon and Shampoo keep them, Adam does not.

The weights of a whole network are trained by each rule. Two questions: which share of them leaves the
invariant subspaces of the start, and how many singular values of the first layer move. The setting is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import optimizers
from .._closure.closure import closure
from .._problem.standard import low_rank_recovery
from .._support.arrays import FloatArray
from .._training.options import Record
from .._training.train import train
from .._trajectory.trajectory import Trajectory
from .._weights.initial import orthogonal
from ..plots import LineDisplay
from . import Result, setting
from ._captions import set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Array = npt.NDArray[np.float64]

#: Smaller shares are rounding errors.
_LEAST_SHARE = 1e-17
#: A singular value has moved where it differs by more from the value that most directions share.
_MOVED = 1e-6


@dataclass(frozen=True)
class Settings:
    """The target of rank 3 of the figure svd-evolution, whole layers, learning rates that suit each rule."""

    dim: int = setting(30, "d, width of the network")
    rank: int = setting(3, "r, rank of the target")
    depth: int = setting(3, "L, number of layers")
    scale: float = setting(0.7, "epsilon, scale of the orthogonal start")
    steps: int = setting(300, "iterations")
    seed: int = setting(0, "seed of target and weights")
    gd_rate: float = setting(1.0, "eta of gradient descent")
    nesterov_rate: float = setting(0.2, "eta of Nesterov's gradient, with momentum 0.9")
    muon_rate: float = setting(0.01, "eta of Muon, with momentum 0.95 and five Newton-Schulz iterations")
    shampoo_rate: float = setting(0.1, "eta of Shampoo, with epsilon 0.01")
    adam_rate: float = setting(0.005, "eta of Adam")


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Train by every rule; measure the share of the weights that leaves the invariant subspaces."""
    problem = low_rank_recovery(settings.dim, settings.rank, seed=settings.seed)
    weights = orthogonal([settings.dim] * (settings.depth + 1), settings.scale, settings.seed)
    space = closure(problem, weights)
    rules: dict[str, tuple[str | optimizers.Optimizer, float, str]] = {
        "gradient descent": ("gd", settings.gd_rate, "dense"),
        "Nesterov": (optimizers.Nesterov(), settings.nesterov_rate, "dense"),
        "Muon": (optimizers.Muon(), settings.muon_rate, "dense"),
        "Shampoo": (optimizers.Shampoo(epsilon=1e-2), settings.shampoo_rate, "dense"),
        "Adam": (optimizers.Adam(), settings.adam_rate, "torch:cpu"),
    }
    runs: dict[str, Trajectory] = {}
    missing: list[str] = []
    for label, (rule, rate, engine) in rules.items():
        record = Record(weights_every=1, progress=progress)
        try:
            runs[label] = train(
                problem, weights, learning_rate=rate, steps=settings.steps, optimizer=rule, engine=engine,
                record=record,
            )  # fmt: skip
        except ModuleNotFoundError:  # Adam needs PyTorch
            missing.append(label)
    steps = np.arange(settings.steps + 1)
    shares = {label: _shares_outside(space.bases, run) for label, run in runs.items()}
    last = {label: run.singular_values(1)[-1] for label, run in runs.items()}
    moved = {label: _count_moved(values) for label, values in last.items()}
    displays = {
        "loss": LineDisplay(
            steps,
            {label: run.loss for label, run in runs.items()},
            x_label="iteration t",
            y_label="loss",
            log_y=True,
        ),
        "share": LineDisplay(
            steps,
            {label: np.maximum(share, _LEAST_SHARE) for label, share in shares.items()},
            x_label="iteration t",
            y_label="share of the weights outside\nthe invariant subspaces",
            log_y=True,
        ),
        "values": LineDisplay(
            np.arange(1, settings.dim + 1),
            last,
            x_label="index i",
            y_label=r"$\sigma_i$ of layer 1 at the end",
        ),
    }
    numbers: dict[str, Any] = {
        "problem": problem.describe(),
        "loss": displays["loss"].numbers(),
        "share": displays["share"].numbers(),
        "values": displays["values"].numbers(),
        "final_share": {label: float(share[-1]) for label, share in shares.items()},
        "moved_values": moved,
        "without_pytorch": missing,
    }
    highlights = [
        f"{label:<17}loss {runs[label].loss[-1]:.2e}, share outside {shares[label][-1]:.1e}, "
        f"{moved[label]} of {settings.dim} singular values of layer 1 differ from the common one"
        for label in runs
    ]
    highlights += [f"{label} was left out: it needs PyTorch" for label in missing]
    return Result(displays, numbers, highlights)


def _shares_outside(bases: Sequence[FloatArray], run: Trajectory) -> _Array:
    """Return the largest share of a layer that maps active directions to others, or the reverse."""
    shares = []
    for step in run.steps:
        worst = 0.0
        for layer, weight in enumerate(run.all_weights(int(step))):
            below, above = bases[layer], bases[layer + 1]
            inside = weight @ below
            leaving = inside - above @ (above.T @ inside)
            entering = above.T @ weight
            entering = entering - (entering @ below) @ below.T
            worst = max(
                worst, np.hypot(np.linalg.norm(leaving), np.linalg.norm(entering)) / np.linalg.norm(weight)
            )
        shares.append(worst)
    return np.array(shares)


def _count_moved(values: FloatArray) -> int:
    """Return the number of singular values that differ from the median, which most of them share."""
    return int(np.sum(np.abs(values - np.median(values)) > _MOVED * np.median(values)))


def draw(settings: Settings, result: Result) -> Figure:
    """Draw loss, share outside the subspaces, and the singular values at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for ax, name in zip(axes, ("loss", "share", "values"), strict=True):
        style = {"marker": "o", "markersize": 3, "linewidth": 0.8} if name == "values" else {"linewidth": 1.2}
        result.displays[name].plot(ax, legend=False, **style)
    axes[1].set_ylim(_LEAST_SHARE, 2.0)
    axes[1].legend(frameon=False, loc="center right")
    set_title(figure, f"Update rules and the invariant subspaces, $d = {settings.dim}$")
    return figure


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    del result
    return (
        f"$r = {settings.rank}$, $L = {settings.depth}$, scale {settings.scale:g}; "
        "the learning rates are from this package"
    )
