# SPDX-License-Identifier: MIT
"""Projection heads of one to five layers: collapse of the features before the head, and transfer.

The claim, of a talk by the group behind arXiv 2306.01154 and 2311.02960: the more layers the projection head
of the pretraining has, the less collapsed are the features before it, and the better do they transfer to
other classes. Code and setting are unpublished, this setting is ours. Needs PyTorch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .._support.arrays import check_count
from ..plots import COLOURS, LineDisplay
from . import Result, setting
from ._captions import set_title
from ._claims import Claim, as_numbers, compare_pairs
from ._images import images_for
from ._mlp_training import read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import nn

    from ..torch import Samples

#: Values read off the published figure, for heads of one to five layers.
PUBLISHED: Final[Mapping[str, Sequence[float]]] = {
    "layers": (1, 2, 3, 4, 5),
    "transfer": (0.601, 0.646, 0.656, 0.663, 0.671),
    "compression": (0.0085, 0.029, 0.047, 0.082, 0.125),
}
#: Trunk -> title and data set.
_TRUNKS: Final = {"vgg": ("VGG", "cifar10"), "mlp": ("MLP", "fashion-mnist")}
#: Pixels of an image of Fashion-MNIST.
_N_PIXELS: Final = 28 * 28
#: Samples of a batch of the measurements.
_BATCH: Final = 500

QUICK: Final = {
    "layers": (1, 3, 5),
    "vgg_width": 0.125,
    "per_class": 500,
    "test_per_class": 500,
    "epochs": 20,
    "runs": 2,
}
QUICK_TAKES: Final = "in some minutes"


@dataclass(frozen=True)
class Settings:
    """Our setting: a VGG on some classes of CIFAR-10, or an MLP on Fashion-MNIST; probes on the others.

    A head of h layers has h - 1 hidden linear layers with ReLU, as wide as the features, and the classifier,
    which are all dropped after the pretraining. Those of the MLP have batch norm, like its trunk. Each seed
    draws the classes, the weights and the order of the images; heads of all sizes share them.
    """

    layers: tuple[int, ...] = setting((1, 2, 3, 4, 5), "linear layers of the head, the classifier included")
    trunk: str = setting("vgg", "vgg on CIFAR-10 or mlp on Fashion-MNIST", choices=tuple(_TRUNKS))
    vgg: str = setting("vgg11", "which VGG's convolutions, with batch norm", choices=("vgg11", "vgg16"))
    vgg_width: float = setting(1.0, "their channels, relative to the published ones")
    width: int = setting(256, "width of the MLP")
    depth: int = setting(3, "hidden layers of the MLP's trunk")
    source_classes: int = setting(5, "classes of the pretraining; the probes get the others")
    per_class: int = setting(5000, "training images of each class, for the pretraining and for the probes")
    test_per_class: int = setting(1000, "test images of each class")
    epochs: int = setting(100, "passes over the images of the pretraining, cosine to eta / 100")
    batch_size: int = setting(50, "images of a step")
    learning_rate: float = setting(0.05, "eta of SGD")
    momentum: float = setting(0.9, "mu of SGD")
    weight_decay: float = setting(5e-4, "weight decay")
    probe: str = setting("sgd", "linear probe: softmax regression (sgd) or ridge", choices=("sgd", "ridge"))
    runs: int = setting(5, "seeds")
    seed: int = setting(0, "first seed of the runs")
    device: str = setting("cpu", "where PyTorch trains, cuda for a GPU")
    data: str = setting("", "folder of the data set; default: the environment variable DLNFAST_DATA")
    results: str = setting("", "JSON file of an earlier call: its numbers are drawn, nothing is trained")


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Pretrain with every head and every seed, or read the results of an earlier call."""
    for i, count in enumerate(settings.layers):
        check_count(count, f"layers[{i}]")
    for name in ("width", "depth", "epochs", "batch_size"):
        check_count(getattr(settings, name), name)
    check_count(settings.source_classes, "source_classes", minimum=2, maximum=8)
    check_count(settings.runs, "runs", minimum=2)
    runs = read_records(settings.results, "runs") if settings.results else _train_all(settings, progress)
    layers = [row["layers"] for row in runs[0]["heads"]]
    claims = _check_claims(layers, runs)
    displays = _displays(layers, runs, claims[len(layers) - 1 :])
    numbers = {
        "runs": runs,
        "published": PUBLISHED,
        "claims": as_numbers(claims),
        "panels": {name: display.numbers() for name, display in displays.items()},
    }
    return Result({**displays, "claims": claims}, numbers, [*_table(layers, runs), *map(str, claims)])


def _train_all(settings: Settings, progress: bool) -> list[dict[str, Any]]:
    from tqdm import tqdm

    data = images_for(settings, _TRUNKS[settings.trunk][1])
    runs = []
    bar = tqdm(
        total=settings.runs * len(settings.layers),
        desc=_TRUNKS[settings.trunk][0],
        unit="network",
        disable=None if progress else True,
        leave=False,
    )
    with bar:
        for seed in range(settings.seed, settings.seed + settings.runs):
            classes = np.random.default_rng(seed).permutation(data.n_classes)
            source = np.sort(classes[: settings.source_classes])
            target = np.sort(classes[settings.source_classes :])
            parts = [
                _choose(samples, kept) for kept in (source, target) for samples in (data.train, data.test)
            ]
            heads = []
            for count in settings.layers:
                heads.append({"layers": count, **_train(settings, count, parts, seed)})
                bar.update()
            untrained = _measure_transfer(settings, _make_network(settings, 1, seed), *parts[2:])
            runs.append(
                {"seed": seed, "source": source.tolist(), "untrained_transfer": untrained, "heads": heads}
            )
    return runs


def _choose(samples: Samples, classes: np.ndarray[Any, Any]) -> Samples:
    """Return the samples of some classes, which are counted from 0 in their order."""
    import torch

    from ..torch import Samples

    kept = torch.isin(samples.labels, torch.from_numpy(classes))
    labels = torch.searchsorted(torch.from_numpy(classes), samples.labels[kept])
    return Samples(samples.inputs[kept], labels)


def _make_network(settings: Settings, count: int, seed: int) -> tuple[nn.Module, str]:
    """Return the trunk with a head of `count` layers, and the name of the trunk's last layer.

    A seed gives equal trunks for all heads.
    """
    from ..torch import MLP, VGG

    n_classes, device = settings.source_classes, settings.device
    if settings.trunk == "mlp":
        widths = [_N_PIXELS, *[settings.width] * (settings.depth + count - 1), n_classes]
        mlp = MLP(widths, seed=seed, device=device)
        return mlp, mlp.hidden_layers[settings.depth - 1]
    n_features = VGG(settings.vgg, width=settings.vgg_width, device="meta").head.in_features
    head = [n_features] * (count - 1)
    vgg = VGG(settings.vgg, n_classes, width=settings.vgg_width, classifier=head, seed=seed, device=device)
    return vgg, "features.pool5"


def _train(settings: Settings, count: int, parts: Sequence[Samples], seed: int) -> dict[str, Any]:
    """Pretrain with a head of `count` layers, and measure the features before it."""
    from ..torch import Batches, OptimizerOptions, Trainer, measure_layers

    start = time.perf_counter()
    source, source_test, target, target_test = parts
    model, layer = _make_network(settings, count, seed)
    trainer = Trainer(
        model,
        learning_rate=settings.learning_rate,
        optimizer=OptimizerOptions(momentum=settings.momentum, weight_decay=settings.weight_decay),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=seed,
    )
    trainer.fit(*source)
    (found,) = measure_layers(
        model, Batches(*source, _BATCH), layer, n_classes=settings.source_classes, ranks=False, probe=None
    )
    return {
        "compression": found.compression,
        "transfer": _measure_transfer(settings, (model, layer), target, target_test),
        "source_train_accuracy": trainer.evaluate(*source).accuracy,
        "source_test_accuracy": trainer.evaluate(*source_test).accuracy,
        "seconds": time.perf_counter() - start,
    }


def _measure_transfer(
    settings: Settings, network: tuple[nn.Module, str], train: Samples, test: Samples
) -> float:
    """Return the test accuracy of a linear probe of the trunk's features on other classes."""
    from ..torch import Batches, measure_layers

    model, layer = network
    (found,) = measure_layers(
        model,
        Batches(*train, _BATCH),
        layer,
        test_batches=Batches(*test, _BATCH),
        n_classes=int(train.labels.max()) + 1,
        ranks=False,
        probe="ridge" if settings.probe == "ridge" else "sgd",
    )
    assert found.probe_test is not None
    return found.probe_test


def _read(runs: Sequence[Mapping[str, Any]], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a number of all runs and heads, (runs, heads)."""
    return np.array([[row[name] for row in run["heads"]] for run in runs], dtype=np.float64)


def _displays(
    layers: Sequence[int], runs: Sequence[Mapping[str, Any]], gains: Sequence[Claim]
) -> dict[str, LineDisplay]:
    compression, transfer = _read(runs, "compression"), 100 * _read(runs, "transfer")
    known = dict(zip(PUBLISHED["layers"], range(len(PUBLISHED["layers"])), strict=True))
    chosen = [known.get(count) for count in layers]

    def published(name: str, factor: float) -> list[float]:
        return [float("nan") if i is None else factor * PUBLISHED[name][i] for i in chosen]

    logs = np.log(compression)
    mean = np.exp(logs.mean(axis=0))
    ends = 100 * np.array([claim.interval for claim in gains], dtype=np.float64).reshape(-1, 2)
    first, *others = published("transfer", 100.0)
    ours = f"ours, {len(runs)} seeds"
    x_label = "layers of the projection head"
    return {
        "compression": LineDisplay(
            layers,
            {ours: mean, "published": published("compression", 1.0)},
            spread={ours: mean * logs.std(axis=0, ddof=1)},
            x_label=x_label,
            y_label="C of the features before the head",
            log_y=True,
        ),
        "transfer": LineDisplay(
            layers,
            {ours: transfer.mean(axis=0), "published": published("transfer", 100.0)},
            spread={ours: transfer.std(axis=0, ddof=1)},
            levels={"untrained trunk": 100 * float(np.mean([run["untrained_transfer"] for run in runs]))},
            x_label=x_label,
            y_label="test accuracy on the other classes [%]",
        ),
        "difference": LineDisplay(
            layers[1:],
            {ours: ends.mean(axis=1), "published": np.subtract(others, first)},
            spread={ours: (ends[:, 1] - ends[:, 0]) / 2},
            x_label=x_label,
            y_label=f"gain in accuracy over a head of {layers[0]} [points]",
        ),
    }


def _check_claims(layers: Sequence[int], runs: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Compare the smallest head with every other, seed by seed."""
    logs, transfer = np.log10(_read(runs, "compression")), _read(runs, "transfer")
    claims = []
    for i, count in enumerate(layers[1:], start=1):
        text = f"log10 C of the features is larger with {count} layers than with {layers[0]}"
        claims.append(compare_pairs(text, logs[:, i] - logs[:, 0]))
    for i, count in enumerate(layers[1:], start=1):
        text = f"features transfer better with {count} layers than with {layers[0]}, percentage points"
        claims.append(compare_pairs(text, transfer[:, i] - transfer[:, 0], unit=100.0))
    return claims


def _table(layers: Sequence[int], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    compression, transfer, source = (
        _read(runs, name) for name in ("compression", "transfer", "source_test_accuracy")
    )
    lines = []
    for i, count in enumerate(layers):
        mean = np.exp(np.log(compression[:, i]).mean())
        lines.append(
            f"{count} layer{'s' if count > 1 else ' '}: C {mean:.3g}, transfer "
            f"{100 * transfer[:, i].mean():.2f} +- {100 * transfer[:, i].std(ddof=1):.2f} %, source test "
            f"{100 * source[:, i].mean():.1f} %"
        )
    return lines


def draw(settings: Settings, result: Result) -> Figure:
    """Draw C, the transfer accuracy and its differences over the layers of the head."""
    from matplotlib.figure import Figure

    del settings
    figure = Figure(figsize=(13.5, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for ax, name in zip(axes, ("compression", "transfer", "difference"), strict=True):
        _draw_panel(ax, result.displays[name])
    axes[2].axhline(0, color="#333333", linewidth=0.8)
    lines, labels = axes[1].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    set_title(figure, "Projection heads: collapse of the features before the head, and transfer")
    return figure


def _draw_panel(ax: Axes, display: LineDisplay) -> None:
    display.plot(ax, colors=(COLOURS[0], "#777777"), marker="o", markersize=5, legend=False)
    ax.set_xticks(display.x)
    ax.margins(x=0.08)


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    n = len(result.numbers["runs"])
    text = f"Means and standard deviations of {n} seeds; right: 95 % intervals of paired differences"
    return f"{text}. Published values are read off, for other data"
