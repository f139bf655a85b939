# SPDX-License-Identifier: MIT
"""An MLP and a network whose last layers are linear: separable first, compressed after, in both.

Wang, Li, Yaras, Zhu, Balzano, Hu, Qu, "Understanding Deep Representation Learning via Layerwise Feature
Compression and Discrimination" (arXiv 2311.02960): a 7-layer MLP, and 3 nonlinear layers followed by 4 linear
ones, on CIFAR-10. Needs PyTorch.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from .._support.arrays import check_count
from ..plots import COLOURS, LineDisplay
from . import Result, setting
from ._captions import set_title
from ._claims import Claim, as_numbers, falls_geometrically, rises_then_saturates
from ._images import images_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Name -> values read off the published plots, layers 1 to 7, for comparison with the full setting.
PUBLISHED: Final[Mapping[str, Mapping[str, Sequence[float]]]] = {
    "MLP": {
        "probe_train": (0.78, 0.94, 0.98, 0.99, 1.0, 1.0, 1.0),
        "compression": (23.5, 12.8, 3.95, 1.28, 0.66, 0.96, 0.17),
        "discrimination": (0.015, 0.035, 0.12, 0.34, 0.50, 0.55, 0.50),
    },
    "hybrid": {
        "probe_train": (0.89, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
        "compression": (17.5, 9.3, 2.35, 0.85, 0.142, 0.0255, 0.0103),
        "discrimination": (0.013, 0.018, 0.09, 0.24, 0.45, 0.67, 0.85),
    },
}

#: 10,000 images, 40 epochs: rates, and the hybrid's initial scale, are larger to get as far in fewer steps.
QUICK: Final = {
    "per_class": 1000,
    "test_per_class": 200,
    "width": 512,
    "epochs": 40,
    "mlp_learning_rate": 1e-2,
    "hybrid_learning_rate": 1e-3,
    "hybrid_scale": 0.2,
}
QUICK_TAKES: Final = "in some minutes"


@dataclass(frozen=True)
class Settings:
    """The published setting: no bias, SGD with momentum, cosine to eta / 100, sum((a f(x) - e_y)^2) / batch.

    The published probes are measured on training images only, and how they were fitted is not said.
    """

    n_hidden: int = setting(7, "hidden layers")
    n_nonlinear: int = setting(3, "nonlinear layers of the hybrid: linear map, batch norm, ReLU")
    width: int = setting(1024, "width of the hidden layers")
    per_class: int = setting(5000, "training images of each class")
    test_per_class: int = setting(1000, "test images of each class")
    epochs: int = setting(400, "passes over the images")
    batch_size: int = setting(128, "images of a step")
    mlp_learning_rate: float = setting(1e-4, "eta of the MLP")
    hybrid_learning_rate: float = setting(1e-4, "eta of the hybrid")
    momentum: float = setting(0.9, "mu")
    weight_decay: float = setting(1e-4, "lambda")
    mlp_scale: float = setting(0.1, "eps of the MLP's orthogonal weights")
    hybrid_scale: float = setting(0.1, "eps of the hybrid's")
    mlp_output_scale: float = setting(1.0, "a in the loss of the MLP")
    hybrid_output_scale: float = setting(100.0, "a in the loss of the hybrid")
    probe: str = setting("ridge", "linear probes: closed form, or descent", choices=("ridge", "sgd"))
    seed: int = setting(0, "seed of the weights and the order of the images")
    device: str = setting("cpu", "where PyTorch trains, cuda for a GPU")
    data: str = setting("", "folder of CIFAR-10; default: the environment variable DLNFAST_DATA")


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Train both networks, and measure the features of every hidden layer in evaluation mode."""
    check_count(settings.epochs, "epochs")
    n_hidden = check_count(settings.n_hidden, "n_hidden", minimum=3)
    n_nonlinear = check_count(settings.n_nonlinear, "n_nonlinear", minimum=1, maximum=n_hidden - 2)
    data = images_for(settings, "cifar10")
    records = {
        "MLP": _train(settings, data, n_hidden, progress),
        "hybrid": _train(settings, data, n_nonlinear, progress),
    }
    claims = _check_claims(settings, records)
    displays = _displays(settings, records)
    numbers = {
        "networks": records,
        "published": PUBLISHED,
        "claims": as_numbers(claims),
        "panels": {name: display.numbers() for name, display in displays.items()},
    }
    return Result({**displays, "claims": claims}, numbers, [*_table(records), *map(str, claims)])


def _train(settings: Settings, data: Any, n_nonlinear: int, progress: bool) -> dict[str, Any]:
    from ..torch import Batches, HybridMLP, LossOptions, OptimizerOptions, Trainer, measure_layers
    from ..torch._cuda_graphs import capture_passes

    start = time.perf_counter()
    hybrid = n_nonlinear < settings.n_hidden
    model = HybridMLP(
        data.train.inputs[0].numel(),
        settings.width,
        data.n_classes,
        n_nonlinear=n_nonlinear,
        n_linear=settings.n_hidden - n_nonlinear,
        initial="orthogonal",
        scale=settings.hybrid_scale if hybrid else settings.mlp_scale,
        seed=settings.seed,
        device=settings.device,
    )
    capture_passes(model, data.train.inputs[: settings.batch_size])
    trainer = Trainer(
        model,
        loss=LossOptions("squared", settings.hybrid_output_scale if hybrid else settings.mlp_output_scale),
        learning_rate=settings.hybrid_learning_rate if hybrid else settings.mlp_learning_rate,
        optimizer=OptimizerOptions(momentum=settings.momentum, weight_decay=settings.weight_decay),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=settings.seed,
        progress=progress,
    )
    history = trainer.fit(*data.train, test=data.test)
    seconds = time.perf_counter() - start
    found = measure_layers(
        model,
        Batches(data.train.inputs, data.train.labels, 512),
        model.hidden_layers,
        test_batches=Batches(data.test.inputs, data.test.labels, 512),
        n_classes=data.n_classes,
        probe="ridge" if settings.probe == "ridge" else "sgd",
    )
    return {
        "n_nonlinear": n_nonlinear,
        "compression": [layer.compression for layer in found],
        "discrimination": [layer.discrimination for layer in found],
        "probe_train": [layer.probe_train for layer in found],
        "probe_test": [layer.probe_test for layer in found],
        "ranks": {kind: [(layer.ranks or {})[kind] for layer in found] for kind in found[0].ranks or {}},
        "simplex_deviation": [layer.geometry.mean_deviation for layer in found],
        "loss": history.loss,
        "train_accuracy": history.accuracy[-1] if history.accuracy else None,
        "test_accuracy": history.test_accuracy[-1] if history.test_accuracy else None,
        "training_seconds": seconds,
        "seconds": time.perf_counter() - start,
    }


def _check_claims(settings: Settings, records: Mapping[str, Mapping[str, Any]]) -> list[Claim]:
    n, first = settings.n_hidden, settings.n_nonlinear
    claims = []
    for name, record in records.items():
        shown, text = rises_then_saturates(record["probe_train"], first, 0.01)
        claims.append(
            Claim(f"{name}: probe accuracy rises through the first layers, then saturates", shown, text)
        )
    layers = list(range(first, n + 1))
    values = records["hybrid"]["compression"][first - 1 :]
    shown, ratio, text = falls_geometrically(layers, values)
    claims.append(Claim("the hybrid's linear layers compress at a near-geometric rate", shown, text))
    rising = records["hybrid"]["discrimination"][first - 1 :]
    shown = all(later > earlier for earlier, later in itertools.pairwise(rising))
    text = f"D from {rising[0]:.3g} to {rising[-1]:.3g}"
    claims.append(Claim("D rises through the hybrid's linear layers", shown, text))
    deep = records["MLP"]["compression"][first - 1 :]
    like = (deep[-1] / deep[0]) ** (1 / max(len(deep) - 1, 1))
    text = f"factor {like:.3g} a layer from layer {first} on, hybrid {ratio:.3g}"
    claims.append(Claim("the MLP's deep layers compress, too", 0.0 < like < 1.0, text))
    return claims


def _displays(settings: Settings, records: Mapping[str, Mapping[str, Any]]) -> dict[str, LineDisplay]:
    layers = list(range(1, settings.n_hidden + 1))

    def panel(
        name: str, y_label: str, *, log_y: bool = False, percent: bool = False, of: str | None = None
    ) -> LineDisplay:
        factor = 100.0 if percent else 1.0
        curves = {
            label: [factor * value for value in (record[name] if of is None else record[of][name])]
            for label, record in records.items()
        }
        known = {
            label: [factor * value for value in values[name]]
            for label, values in PUBLISHED.items()
            if name in values and len(values[name]) == len(layers)
        }
        return LineDisplay(layers, curves, x_label="layer $l$", y_label=y_label, theory=known, log_y=log_y)

    return {
        "probe accuracy on training images": panel("probe_train", "%", percent=True),
        "probe accuracy on test images": panel("probe_test", "%", percent=True),
        "compression": panel("compression", "$C_l$", log_y=True),
        "discrimination": panel("discrimination", "$D_l$"),
        "numerical rank": panel("nuclear", "singular values with 95 % of the sum", of="ranks"),
    }


def _table(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the measured and the published values."""
    lines = []
    for name, record in records.items():
        trained = f"{name}: loss {record['loss'][-1]:.3g}, " if record["loss"] else f"{name}: "
        lines.append(
            f"{trained}accuracy {_percent(record['train_accuracy'])} on training images, "
            f"{_percent(record['test_accuracy'])} on test images, {record['seconds']:.0f} s"
        )
        for key, label in (("probe_train", "probe"), ("compression", "C"), ("discrimination", "D")):
            measured = " ".join(f"{value:.3g}" for value in record[key])
            published = " ".join(f"{value:.3g}" for value in PUBLISHED[name][key])
            lines.append(f"  {label:<5} {measured}   published ~ {published}")
        lines.append(f"  {'test':<5} {' '.join(f'{value:.3g}' for value in record['probe_test'])}")
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def draw(settings: Settings, result: Result) -> Figure:
    """Draw one panel per measure, both networks in each, the published values dashed."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(15.0, 8.2), layout="constrained")
    axes = list(figure.subplots(2, 3).flat)
    panels = {name: display for name, display in result.displays.items() if name != "claims"}
    for ax, (name, display) in zip(axes, panels.items(), strict=False):
        display.plot(ax, marker="o", legend=False)
        ax.set_title(name, fontsize=11)
        ax.axvspan(settings.n_nonlinear + 0.5, settings.n_hidden + 0.5, color="#000000", alpha=0.04, zorder=0)
        ax.set_xlim(0.5, settings.n_hidden + 0.5)
    n, linear = settings.n_hidden, settings.n_hidden - settings.n_nonlinear
    labels: list[tuple[str, str, tuple[int, ...]]] = [
        (f"MLP: {n} nonlinear layers", COLOURS[0], ()),
        (f"hybrid: {settings.n_nonlinear} nonlinear, {linear} linear (shaded)", COLOURS[1], ()),
    ]
    if any(display.theory for display in panels.values()):
        labels.append(("published, full setting, read off a plot", "#555555", (4, 2)))
    handles = [
        Line2D([], [], color=colour, dashes=dashes, marker="" if dashes else "o", label=label)
        for label, colour, dashes in labels
    ]
    axes[-1].axis("off")
    axes[-1].legend(handles=handles, frameon=False, loc="center left", fontsize=11)
    images = settings.per_class * 10
    set_title(figure, f"Features of an MLP and of a hybrid network on {images:,} CIFAR-10 images")
    return figure


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    del result
    return f"Width {settings.width}, {settings.epochs} epochs; measured in evaluation mode"
