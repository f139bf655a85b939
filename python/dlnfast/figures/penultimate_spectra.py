# SPDX-License-Identifier: MIT
"""The penultimate weight matrix of a linear network, an MLP, a VGG and a ViT: few directions change.

The claim, of the talk behind arXiv 2306.01154 and 2406.04112: training changes weights within a subspace of
about K to 2K dimensions, K classes, whatever the network. The setting is unpublished, this one is ours. Needs
PyTorch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .. import measures
from .._support.arrays import check_count
from ..plots import COLOURS, LineDisplay, SingularValueDisplay
from . import Result, setting
from ._claims import Claim, as_numbers
from ._images import images_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Name -> title and data set.
_FAMILIES: Final = {
    "linear": ("deep linear network, squared loss", "fashion-mnist"),
    "mlp": ("MLP, cross-entropy", "fashion-mnist"),
    "vgg": ("VGG, cross-entropy", "cifar10"),
    "vit": ("ViT, cross-entropy", "cifar10"),
}
_OPTIMIZERS: Final = ("sgd", "adamw")
#: Singular values of the change above this share of its largest are counted.
_THRESHOLD: Final = 0.05

QUICK: Final = {
    "per_class": 200,
    "test_per_class": 200,
    "width": 256,
    "vgg": "vgg11",
    "vgg_width": 0.25,
    "vit_dim": 128,
    "vit_depth": 6,
    "vit_heads": 4,
    "vit_patch": 8,
    "vit_learning_rate": 1e-3,
    "epochs": 15,
}
QUICK_TAKES: Final = "in some minutes"


@dataclass(frozen=True)
class Settings:
    """Our setting: VGG-16 and ViT-B (with patches of 4 for images of 32) at full size.

    No weight decay, which would change all directions equally.
    """

    families: tuple[str, ...] = setting(tuple(_FAMILIES), "networks, one row each", choices=tuple(_FAMILIES))
    per_class: int = setting(5000, "training images of each class")
    test_per_class: int = setting(1000, "test images of each class")
    width: int = setting(512, "width of the hidden layers of linear network and MLP")
    depth: int = setting(4, "weight matrices of linear network and MLP")
    scale: float = setting(0.5, "eps of the linear network's orthogonal weights; others: PyTorch's own")
    vgg: str = setting("vgg16", "which VGG, with batch norm", choices=("vgg11", "vgg13", "vgg16", "vgg19"))
    vgg_width: float = setting(1.0, "its channels, relative to the published ones")
    vit_dim: int = setting(768, "width of the ViT")
    vit_depth: int = setting(12, "its blocks")
    vit_heads: int = setting(12, "its attention heads")
    vit_patch: int = setting(4, "its patches' side")
    vit_optimizer: str = setting("adamw", "how the ViT is trained; others: sgd", choices=_OPTIMIZERS)
    linear_learning_rate: float = setting(0.01, "eta of the linear network")
    mlp_learning_rate: float = setting(0.05, "eta of the MLP")
    vgg_learning_rate: float = setting(0.05, "eta of the VGG")
    vit_learning_rate: float = setting(3e-4, "eta of the ViT")
    momentum: float = setting(0.9, "mu of sgd")
    epochs: int = setting(50, "passes over the images, cosine to eta / 100")
    batch_size: int = setting(64, "images of a step")
    records: int = setting(30, "how often all singular values are recorded")
    seed: int = setting(0, "seed of the weights and the order of the images")
    device: str = setting("cpu", "where PyTorch trains, cuda for a GPU")
    data: str = setting("", "folder of the data sets; default: the environment variable DLNFAST_DATA")


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Train one network of every family, and follow its penultimate weight and that weight's change."""
    check_count(settings.depth, "depth", minimum=3)
    check_count(settings.records, "records")
    data: dict[str, Any] = {}
    displays: dict[str, dict[str, Any]] = {}
    records: dict[str, dict[str, Any]] = {}
    for family in settings.families:
        dataset = _FAMILIES[family][1]
        if dataset not in data:
            data[dataset] = images_for(settings, dataset)
        displays[family], records[family] = _train(settings, family, data[dataset], progress)
    claims = [claim for family, record in records.items() for claim in _check_claims(family, record)]
    numbers = {
        "families": records,
        "claims": as_numbers(claims),
        "panels": {
            family: {name: display.numbers() for name, display in panels.items()}
            for family, panels in displays.items()
        },
    }
    highlights = [_line(family, record) for family, record in records.items()]
    return Result({**displays, "claims": claims}, numbers, [*highlights, *map(str, claims)])


def _model(settings: Settings, family: str, data: Any) -> Any:
    from ..torch import MLP, VGG, DeepLinear, ViT

    n_in = data.train.inputs[0].numel()
    widths = [n_in, *[settings.width] * (settings.depth - 1), data.n_classes]
    channels, _, size = data.train.inputs[0].shape
    makers: dict[str, Callable[[], Any]] = {
        "linear": lambda: DeepLinear(widths, scale=settings.scale, seed=settings.seed),
        "mlp": lambda: MLP(widths, batch_norm=False, seed=settings.seed),
        "vgg": lambda: VGG(
            settings.vgg,
            data.n_classes,
            width=settings.vgg_width,
            image_size=size,
            in_channels=channels,
            seed=settings.seed,
        ),
        "vit": lambda: ViT(
            dim=settings.vit_dim,
            depth=settings.vit_depth,
            n_heads=settings.vit_heads,
            patch_size=settings.vit_patch,
            image_size=size,
            in_channels=channels,
            n_classes=data.n_classes,
            seed=settings.seed,
        ),
    }
    return makers[family]().to(settings.device)


def _train(
    settings: Settings, family: str, data: Any, progress: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    from ..torch import OptimizerOptions, Trainer, track

    start = time.perf_counter()
    model = _model(settings, family, data)
    inputs = data.train.inputs
    if family == "linear":
        inputs = inputs.flatten(1)
    steps = -(-len(inputs) // settings.batch_size) * settings.epochs
    trainer = Trainer(
        model,
        loss="squared" if family == "linear" else "cross_entropy",
        optimizer=OptimizerOptions(
            settings.vit_optimizer if family == "vit" else "sgd", momentum=settings.momentum
        ),
        learning_rate=getattr(settings, f"{family}_learning_rate"),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=settings.seed,
        progress=progress,
    )
    test = data.test
    if family == "linear":
        test = type(test)(test.inputs.flatten(1), test.labels)
    with track(model, "penultimate", k="all", every=max(steps // settings.records, 1)) as tracked:
        first = tracked.matrices[0].matrix().double().cpu().numpy().copy()
        history = trainer.fit(inputs, data.train.labels, test=test)
    last = tracked.matrices[0].matrix().double().cpu().numpy()
    n_top = 2 * data.n_classes
    run, change = tracked.trajectory(), tracked.trajectory(of="change")
    found = {"change": _spectrum(first, last - first, n_top)}
    # Independent entries, of the same norm.
    noise = np.random.default_rng(settings.seed).standard_normal(first.shape)
    noise *= np.linalg.norm(last - first) / np.linalg.norm(noise)
    found["control"] = _spectrum(first, noise, n_top)
    share = [measures.energy_share(values, n_top) for values in change.singular_values(1)[1:]]
    panels = _panels(run, change.steps[1:].tolist(), share, found, n_top)
    record = {
        "layer": run.layer_names[0],
        "shape": list(first.shape),
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "n_top": n_top,
        **{f"{name} {key}": value for name, measured in found.items() for key, value in measured.items()},
        "relative_change": float(np.linalg.norm(last - first) / np.linalg.norm(first)),
        "energy_over_time": share,
        "steps": steps,
        "loss": history.loss,
        "train_accuracy": history.accuracy[-1] if history.accuracy else None,
        "test_accuracy": history.test_accuracy[-1] if history.test_accuracy else None,
        "seconds": time.perf_counter() - start,
    }
    return panels, record


def _spectrum(start: Any, change: Any, n_top: int) -> dict[str, Any]:
    """Return singular values of a change, and how far it rotates the images of its right vectors."""
    _, values, right = np.linalg.svd(change, full_matrices=True)
    angles = measures.image_angles(start + change, start, right[: len(values)].T)
    return {
        "values": values,
        "energy": measures.energy_share(values, n_top),
        "count": measures.numerical_rank(values, "threshold", threshold=_THRESHOLD),
        "angles": angles,
        "median_angle_of_the_rest": float(np.median(angles[n_top:])) if len(angles) > n_top else 0.0,
        "largest_angle_of_the_rest": float(np.max(angles[n_top:], initial=0.0)),
    }


def _panels(
    run: Any, steps: list[int], share: list[float], found: Mapping[str, Mapping[str, Any]], n_top: int
) -> dict[str, Any]:
    index = list(range(1, len(found["change"]["values"]) + 1))
    labels = {"change": "change", "control": "random matrix of equal norm"}
    return {
        "singular values of the weight": SingularValueDisplay.from_trajectory(run, 1),
        "singular values of the change": LineDisplay(
            index,
            {labels[name]: f["values"] / max(f["values"][0], 1e-300) for name, f in found.items()},
            x_label="index $i$",
            y_label=r"$\sigma_i / \sigma_1$",
            levels={f"{100 * _THRESHOLD:.0f} %": _THRESHOLD},
            log_y=True,
        ),
        "energy in the largest 2K": LineDisplay(
            steps or [0],
            {labels["change"]: [100 * value for value in share] or [float("nan")]},
            x_label="iteration $t$",
            y_label="% of the squared norm of the change",
            levels={labels["control"]: 100 * found["control"]["energy"]},
        ),
        "how far images turned": LineDisplay(
            index,
            {labels[name]: f["angles"] for name, f in found.items()},
            x_label="index $i$ of the right vector $v_i$ of the change",
            y_label=r"$\angle(W(T) v_i,\, W(0) v_i)$ [rad]",
        ),
    }


def _check_claims(family: str, record: Mapping[str, Any]) -> list[Claim]:
    n_top, title = record["n_top"], _FAMILIES[family][0].split(",")[0]
    energy, control = record["change energy"], record["control energy"]
    text = f"{100 * energy:.1f} % of the energy, control {100 * control:.1f} %"
    claims = [Claim(f"{title}: the change lives in {n_top} directions", energy >= 0.9, text)]
    count, others, of = record["change count"], record["control count"], len(record["change values"])
    text = f"{count} of {of} above {100 * _THRESHOLD:.0f} % of the largest, control {others}"
    claims.append(
        Claim(f"{title}: at most {n_top} singular values of the change count", count <= n_top, text)
    )
    others, other = record["change median_angle_of_the_rest"], record["control median_angle_of_the_rest"]
    text = f"median {others:.2g} rad, control {other:.2g}"
    claims.append(Claim(f"{title}: the other directions hardly turn", others < 0.25 * other, text))
    return claims


def _line(family: str, record: Mapping[str, Any]) -> str:
    accuracy = [
        "-" if share is None else f"{100 * share:.1f} %"
        for share in (record["train_accuracy"], record["test_accuracy"])
    ]
    return (
        f"{family}: {record['layer']} ({record['shape'][0]} x {record['shape'][1]}) of "
        f"{record['n_parameters']:,} parameters, {record['steps']} steps, accuracy {accuracy[0]} on training "
        f"and {accuracy[1]} on test images, |change| / |W(0)| = {record['relative_change']:.2g}, "
        f"{record['seconds']:.0f} s"
    )


def draw(settings: Settings, result: Result) -> Figure:
    """Draw a row per family: spectra of the weight and of its change, energy, and rotation of the vectors."""
    from matplotlib.figure import Figure

    families = [family for family in result.displays if family != "claims"]
    n_claims = len(result.displays["claims"])
    figure = Figure(figsize=(19.0, 3.9 * len(families) + 0.2 * n_claims + 1.0), layout="constrained")
    rows = figure.subplots(len(families), 4, squeeze=False)
    colours = (COLOURS[0], "#777777")
    for row, family in zip(rows, families, strict=True):
        record = result.numbers["families"][family]
        for position, (ax, (title, display)) in enumerate(
            zip(row, result.displays[family].items(), strict=True)
        ):
            if isinstance(display, SingularValueDisplay):
                display.plot(ax, legend=False)
            else:
                display.plot(ax, colors=colours, legend=False)
                ax.legend(frameon=False, fontsize=9)
            if position in (1, 3):
                ax.axvline(record["n_top"] + 0.5, color="#333333", linewidth=0.8, linestyle=":")
            ax.set_title(title, fontsize=11)
        shape = " x ".join(map(str, record["shape"]))
        row[1].set_ylim(bottom=1e-4)
        row[2].set_ylim(0, 102)
        row[0].set_title(
            f"{_FAMILIES[family][0]}\nsingular values of {record['layer']}, {shape}", fontsize=11
        )
    figure.suptitle(
        "Penultimate weight matrices while they are trained (our setting): "
        f"{10 * settings.per_class:,} images, {settings.epochs} epochs; dotted: 2K",
        fontsize=13,
    )
    return figure
