# SPDX-License-Identifier: MIT
"""MLPs of low rank from three starts, and the subspace in which the updates of the full network stay.

Xu, Yaras, Balzano, Asato, Qu, "Emergent Low-Rank Training Dynamics in MLPs with Smooth Activations" (arXiv
2602.06208): with smooth activations, updates stay near a subspace of 2K dimensions that the start and the
first gradient fix, and an MLP of that rank, started in it, learns as well as the full one. Needs PyTorch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .._support.arrays import check_count
from ..plots import COLOURS, LineDisplay
from . import Result, setting
from ._captions import set_title
from ._claims import Claim, as_numbers
from ._images import images_for
from ._mlp_training import (
    HIDDEN,
    Method,
    Split,
    count_turns,
    cross_entropy,
    read_records,
    split_images,
    train_methods,
)

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .._support.arrays import FloatArray as Array

_SMOOTH: Final = ("gelu", "tanh", "silu", "elu")
_NAMES: Final = {"relu": "ReLU", "gelu": "GELU", "tanh": "tanh", "silu": "SiLU", "elu": "ELU"}
_KINDS: Final = {
    "white": "white inputs, squared loss",
    "images": "images, cross-entropy",
}
_STARTS: Final = ("gradient", "surrogate", "random")
#: Claims: largest loss of accuracy, least gain over a random start, share of parameters, share of energy.
_CLOSE: Final = 0.010
_GAIN: Final = 0.007
_SHARE: Final = 0.1
_ENERGY: Final = 0.95

QUICK: Final = {
    "per_class": 1000,
    "epochs": 10,
    "learning_rates": (5e-4, 1e-3, 2e-3),
    "rate_runs": 1,
    "runs": 3,
}
QUICK_TAKES: Final = "in some minutes"


@dataclass(frozen=True)
class Settings:
    """Our setting: Fashion-MNIST, two hidden layers; Adam, cosine to 0, rates chosen on held-out images.

    Energy is measured for full-batch gradient descent from small orthogonal hidden layers, once with white
    inputs and the squared loss, as the published theorem assumes, and once on the images. That theorem is for
    one hidden layer and a fixed head; here there are two, and the head is trained.
    """

    activations: tuple[str, ...] = setting(("gelu", "relu"), "panels of accuracy", choices=tuple(_NAMES))
    ranks: tuple[int, ...] = setting((5, 10, 20, 40, 80), "r of both hidden layers")
    starts: tuple[str, ...] = setting(_STARTS, "starts of the products", choices=_STARTS)
    width: int = setting(512, "width of the hidden layers")
    depth: int = setting(3, "factors of every product")
    per_class: int = setting(5000, "training images of each class")
    test_per_class: int = setting(1000, "test images of each class")
    epochs: int = setting(20, "passes over the images")
    batch_size: int = setting(128, "images of a step")
    learning_rates: tuple[float, ...] = setting(
        (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
        "of which every network gets the best on a fifth of the training images",
    )
    rate_runs: int = setting(2, "seeds of the choice of rates")
    runs: int = setting(5, "seeds per network: means are drawn, bars are standard deviations")
    energy_activations: tuple[str, ...] = setting(
        ("gelu", "tanh", "relu"), "networks of the panels of energy", choices=tuple(_NAMES)
    )
    energy_per_class: int = setting(200, "images of each class for the energy; more than inputs: whitened")
    energy_steps: int = setting(100, "full-batch steps")
    energy_rate: float = setting(0.5, "eta of these steps on white inputs and the squared loss")
    energy_image_rate: float = setting(0.1, "eta of these steps on the images and cross-entropy")
    energy_scale: float = setting(0.1, "eps of the orthogonal hidden layers; the head has scale 1")
    seed: int = setting(0, "first seed of the runs")
    device: str = setting("cpu", "where PyTorch trains, cuda for a GPU")
    data: str = setting("", "folder of the data set; default: the environment variable DLNFAST_DATA")
    results: str = setting("", "JSON file of an earlier call: its numbers are drawn, nothing is trained")


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Train all networks and follow the updates, or read the results of an earlier call."""
    for name in ("width", "epochs", "batch_size", "rate_runs", "runs", "energy_per_class", "energy_steps"):
        check_count(getattr(settings, name), name)
    check_count(settings.depth, "depth", minimum=2)
    for i, rank in enumerate(settings.ranks):
        check_count(rank, f"ranks[{i}]", maximum=settings.width)
    if settings.results:
        networks = read_records(settings.results, "networks")
        energy = read_records(settings.results, "energy")
    else:
        split = split_images(images_for(settings, "fashion-mnist"), settings.seed)
        networks = {name: _train(settings, name, split, progress) for name in settings.activations}
        energy = {
            kind: [_follow_updates(settings, kind, name) for name in settings.energy_activations]
            for kind in _KINDS
        }
    displays = _displays(networks, energy)
    claims = [claim for name, found in networks.items() for claim in _check_accuracy(name, found)]
    claims += _check_energy(energy)
    numbers = {
        "networks": networks,
        "energy": energy,
        "claims": as_numbers(claims),
        "panels": {name: display.numbers() for name, display in displays.items()},
    }
    return Result({**displays, "claims": claims}, numbers, [*_table(networks, energy), *map(str, claims)])


def _train(settings: Settings, activation: str, split: Split, progress: bool) -> dict[str, Any]:
    """Train the full network and every start at every rank."""
    from tqdm import tqdm

    methods = [
        Method(f"{start}, r = {rank}", HIDDEN, start, rank, settings.depth)
        for start in settings.starts
        for rank in settings.ranks
    ]
    with tqdm(
        total=count_turns(settings, 1 + len(methods)),
        desc=_NAMES[activation],
        unit="network",
        disable=None if progress else True,
        leave=False,
    ) as bar:
        full, *others = train_methods(
            settings, [Method("full"), *methods], activation, split, advance=bar.update
        )
    return {"n_classes": split.n_classes, "full": full, "low rank": others}


def _follow_updates(settings: Settings, kind: str, activation: str) -> dict[str, Any]:
    """Return the shares of the energy of the updates inside the subspace of the start, step by step."""
    from ..torch import MLP, OptimizerOptions, Trainer, load_images

    data = load_images(
        "fashion-mnist", path=settings.data or None, per_class=settings.energy_per_class, test_per_class=1
    )
    inputs, labels = data.train.inputs.flatten(1), data.train.labels
    is_white = kind == "white"
    if is_white:
        inputs = _whiten(inputs, labels)
    model = MLP(
        [inputs.shape[1], settings.width, settings.width, data.n_classes],
        activation=activation,
        batch_norm=False,
        initial="orthogonal",
        scale=[settings.energy_scale, settings.energy_scale, 1.0],
        seed=settings.seed,
        device=settings.device,
    )
    loss = _squared if is_white else cross_entropy
    frames = {
        start: _find_frames(model, (inputs, labels), loss, start, 2 * data.n_classes, settings.seed)
        for start in ("surrogate", "random")
    }
    first = _read_hidden(model)
    shares: dict[str, list[list[float]]] = {start: [] for start in frames}
    trainer = Trainer(
        model,
        loss="squared" if is_white else "cross_entropy",
        optimizer=OptimizerOptions("sgd", momentum=0.0),
        learning_rate=settings.energy_rate if is_white else settings.energy_image_rate,
        schedule="constant",
        epochs=settings.energy_steps,
        batch_size=len(labels),
        seed=settings.seed,
    )

    def after_step(done: int) -> None:
        del done
        changes = [last - start for last, start in zip(_read_hidden(model), first, strict=True)]
        for start, pairs in frames.items():
            shares[start].append(
                [_share_inside(*pair, change) for pair, change in zip(pairs, changes, strict=True)]
            )

    history = trainer.fit(inputs, labels, after_epoch=after_step)
    return {
        "activation": activation,
        "inside": shares["surrogate"],
        "random": shares["random"],
        "loss": history.loss,
        "train_accuracy": history.accuracy,
    }


def _whiten(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return inputs of mean 0 and covariance I."""
    import torch

    from .._problem.problem import Problem

    samples = inputs.numpy().T.astype(np.float64)
    problem = Problem.from_data(samples, labels.numpy(), whiten="zca", center=True)
    white = np.sqrt(len(labels)) * problem.transform(samples)
    return torch.from_numpy(np.ascontiguousarray(white.T, dtype=np.float32))


def _squared(model: torch.nn.Module, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the squared loss of a batch, as in `Trainer`."""
    from torch.nn import functional

    inputs, labels = batch
    device = next(model.parameters()).device
    outputs = model(inputs.to(device))
    targets = functional.one_hot(labels.to(device), outputs.shape[1]).to(outputs.dtype)
    loss: torch.Tensor = (outputs - targets).square().sum() / len(labels)
    return loss


def _find_frames(
    model: torch.nn.Module, batch: Any, loss: Any, start: str, rank: int, seed: int
) -> list[tuple[Array, Array]]:
    """Return the orthonormal columns and rows of the outer factors with which `factorize` starts."""
    from ..torch import factorize

    options = {} if start == "random" else {"batches": batch, "loss": loss}
    state = factorize(
        copy.deepcopy(model), HIDDEN, rank=rank, depth=3, init=start, seed=seed, **options
    ).state_dict()
    pairs = [(state[f"{name}.factors.3"], state[f"{name}.factors.1"]) for name in HIDDEN]
    return [(left.double().cpu().numpy(), right.double().cpu().numpy()) for left, right in pairs]


def _read_hidden(model: torch.nn.Module) -> list[Array]:
    """Return copies of the hidden weights."""
    return [model.get_parameter(f"{name}.weight").detach().double().cpu().numpy().copy() for name in HIDDEN]


def _share_inside(left: Array, right: Array, change: Array) -> float:
    """Return ``||left^T D right^T||_F^2 / ||D||_F^2`` for a change D."""
    energy = float(np.vdot(change, change))
    return float(np.linalg.norm(left.T @ change @ right.T) ** 2) / energy if energy > 0 else 0.0


def _displays(networks: Mapping[str, Any], energy: Mapping[str, Any]) -> dict[str, LineDisplay]:
    panels = {}
    for activation, found in networks.items():
        rows = found["low rank"]
        starts = list(dict.fromkeys(record["init"] for record in rows))
        ranks = list(dict.fromkeys(record["rank"] for record in rows))
        panels[f"accuracy {activation}"] = LineDisplay(
            ranks,
            {start: _select(rows, start, "mean") for start in starts},
            spread={start: _select(rows, start, "deviation") for start in starts},
            x_label="rank $r$ of the hidden layers",
            y_label="test accuracy [%]",
            levels={"full network": 100 * found["full"]["mean"][-1]},
        )
    for kind, records in energy.items():
        curves = {
            f"{_NAMES[record['activation']]}, layer {layer + 1}": [
                100 * shares[layer] for shares in record["inside"]
            ]
            for record in records
            for layer in range(len(HIDDEN))
        }
        random = [share for record in records for shares in record["random"] for share in shares]
        panels[f"energy {kind}"] = LineDisplay(
            list(range(1, 1 + len(records[0]["inside"]))),
            curves,
            x_label="full-batch steps $t$",
            y_label="% of $\\|W(t) - W(0)\\|_F^2$ in the subspace",
            levels={"random subspace": 100 * float(np.mean(random)), f"{100 * _ENERGY:.0f} %": 100 * _ENERGY},
        )
    return panels


def _select(rows: Sequence[Mapping[str, Any]], start: str, name: str) -> list[float]:
    """Return a percentage at the end of the training for a start, over its ranks."""
    return [100 * row[name][-1] for row in rows if row["init"] == start]


def _check_accuracy(activation: str, found: Mapping[str, Any]) -> list[Claim]:
    """Check the claims at the rank 2K, or the nearest one."""
    rank = min(
        (record["rank"] for record in found["low rank"]), key=lambda r: (abs(r - 2 * found["n_classes"]), r)
    )
    at_rank = {record["init"]: record for record in found["low rank"] if record["rank"] == rank}
    full, name = found["full"], f"{_NAMES[activation]}, r = {rank}"
    claims = []
    for start in ("gradient", "surrogate"):
        if start not in at_rank:
            continue
        loss = full["mean"][-1] - at_rank[start]["mean"][-1]
        share = at_rank[start]["n_parameters"] / full["n_parameters"]
        shown = loss <= _CLOSE and (start == "surrogate" or share <= _SHARE)
        small = " at a tenth of its parameters" if start == "gradient" else ""
        text = f"{100 * full['mean'][-1]:.2f} % and {100 * at_rank[start]['mean'][-1]:.2f} %, "
        text += f"{share:.2g} of the parameters"
        claims.append(
            Claim(
                f'{name}: "{start}" is within {100 * _CLOSE:.1f} points of the full network{small}',
                shown,
                text,
            )
        )
        if "random" in at_rank:
            gain = at_rank[start]["mean"][-1] - at_rank["random"]["mean"][-1]
            n = len(full["runs"])
            spread = np.hypot(at_rank[start]["deviation"][-1], at_rank["random"]["deviation"][-1]) / n**0.5
            claims.append(
                Claim(
                    f'{name}: "{start}" is at least {100 * _GAIN:.1f} points above "random"',
                    gain >= _GAIN,
                    f"{100 * gain:+.2f} +- {100 * spread:.2f} points",
                )
            )
    return claims


def _check_energy(energy: Mapping[str, Any]) -> list[Claim]:
    claims = []
    for kind, records in energy.items():
        for record in records:
            is_smooth = record["activation"] in _SMOOTH
            least = [min(shares) for shares in record["inside"]]
            text = f"{100 * least[-1]:.1f} % after {len(least)} steps"
            below = next((step for step, share in enumerate(least, 1) if share < _ENERGY), None)
            if below is not None and below > 1:
                text += f", above until step {below - 1}, where the loss is {record['loss'][below - 2]:.3g}"
            text += f"; the loss falls from {record['loss'][0]:.3g} to {record['loss'][-1]:.3g}"
            if is_smooth:
                claims.append(
                    Claim(
                        f"{_KINDS[kind]}, {_NAMES[record['activation']]}: over {100 * _ENERGY:.0f} % of the "
                        "updates of both layers stay in the 2K-dimensional subspace",
                        least[-1] > _ENERGY,
                        text,
                    )
                )
        claims += _compare_smoothness(kind, records)
    return claims


def _compare_smoothness(kind: str, records: Sequence[Mapping[str, Any]]) -> list[Claim]:
    last = {record["activation"]: min(record["inside"][-1]) for record in records}
    smooth = {name: share for name, share in last.items() if name in _SMOOTH}
    if "relu" not in last or not smooth:
        return []
    text = ", ".join(f"{_NAMES[name]} {100 * share:.1f} %" for name, share in last.items())
    return [
        Claim(
            f"{_KINDS[kind]}: more of the updates stays in it with smooth activations than with ReLU",
            min(smooth.values()) > last["relu"],
            text,
        )
    ]


def _table(networks: Mapping[str, Any], energy: Mapping[str, Any]) -> list[str]:
    lines = []
    for activation, found in networks.items():
        for record in (found["full"], *found["low rank"]):
            lines.append(
                f"{_NAMES[activation]:<5} {record['label']:<18} {100 * record['mean'][-1]:.2f} +- "
                f"{100 * record['deviation'][-1]:.2f} % at rate {record['learning_rate']:g}, "
                f"{record['n_parameters']:,} parameters, {record['milliseconds_per_step']:.2f} ms a step"
            )
    for kind, records in energy.items():
        for record in records:
            inside = ", ".join(f"{100 * share:.1f} %" for share in record["inside"][-1])
            random = ", ".join(f"{100 * share:.2f} %" for share in record["random"][-1])
            lines.append(
                f"{_KINDS[kind]}, {_NAMES[record['activation']]}: {inside} of the updates of layers 1 and 2 "
                f"inside, random subspace {random}, accuracy {100 * record['train_accuracy'][-1]:.1f} % on "
                "these images"
            )
    return lines


def draw(settings: Settings, result: Result) -> Figure:
    """Draw accuracy over rank for each activation, and energy over the steps for both inputs."""
    del settings  # results of an earlier call have others
    from matplotlib.figure import Figure

    panels = {name: display for name, display in result.displays.items() if name != "claims"}
    n_columns = max(sum(name.startswith(kind) for name in panels) for kind in ("accuracy", "energy"))
    figure = Figure(figsize=(7.0 * n_columns, 11.5), layout="constrained")
    axes = figure.subplots(2, n_columns, squeeze=False)
    for row, kind in zip(axes, ("accuracy", "energy"), strict=True):
        own = [name for name in panels if name.startswith(kind)]
        for ax in row[len(own) :]:
            ax.axis("off")
        for ax, name in zip(row, own, strict=False):
            (_draw_accuracy if kind == "accuracy" else _draw_energy)(ax, name, panels[name], result.numbers)
    low, high = (f(ax.get_ylim()[i] for ax in axes[0] if ax.axison) for f, i in ((min, 0), (max, 1)))
    for ax in axes[0]:
        ax.set_ylim(low, high)
    some = next(iter(result.numbers["networks"].values()))["full"]
    set_title(figure, f"MLPs of low rank on {some['n_images']:,} Fashion-MNIST images")
    return figure


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    del settings
    some = next(iter(result.numbers["networks"].values()))["full"]
    return (
        f"Width {some['width']}, {some['epochs'][-1]} epochs; "
        f"mean and standard deviation of {len(some['runs'])} seeds"
    )


def _draw_accuracy(ax: Axes, name: str, display: LineDisplay, numbers: Mapping[str, Any]) -> None:
    activation = name.split()[1]
    found = numbers["networks"][activation]
    display.plot(ax, marker="o", markersize=4, legend=False)
    full = found["full"]
    mean, deviation = 100 * full["mean"][-1], 100 * full["deviation"][-1]
    ax.axhspan(mean - deviation, mean + deviation, color="#555555", alpha=0.15, linewidth=0)
    ax.set_xscale("log")
    ax.set_xticks(display.x, [f"{rank:g}" for rank in display.x])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=10, loc="lower right")
    ax.set_title(f"{_NAMES[activation]}, both hidden layers of rank $r$, by start", fontsize=11)


def _draw_energy(ax: Axes, name: str, display: LineDisplay, numbers: Mapping[str, Any]) -> None:
    kind = name.split()[1]
    colours = [COLOURS[i // len(HIDDEN)] for i in range(len(display.curves))]
    display.plot(ax, colors=colours, legend=False)
    for line, label in zip(ax.lines, display.curves, strict=False):
        if label.endswith("layer 1"):
            line.set_linestyle("--")
    ax.set_ylim(-3, 103)
    ax.legend(frameon=False, fontsize=9, loc="lower left", ncols=2, bbox_to_anchor=(0.0, 0.04))
    ax.set_title(f"updates of the full network: {_KINDS[kind]}", fontsize=11)
