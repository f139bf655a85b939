# SPDX-License-Identifier: MIT
"""Does depth help? Nonlinear layers in a deep network, and linear ones added to a shallow one.

The claim, of Wang, Li, Yaras, Zhu, Balzano, Hu, Qu (arXiv 2311.02960) and the talk: more layers, linear ones
too, compress features further and generalise better. The setting is unpublished, this one is ours. Needs
PyTorch.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .._support.arrays import check_count
from ..plots import LineDisplay, linear_fit
from . import Result, setting
from ._claims import Claim, as_numbers
from ._images import images_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: C_l of layers 1 to 8 of 9-layer networks with PyTorch's initialisation, read off a published plot that does
#: not say how many of them are linear.
PUBLISHED: Final[Mapping[str, Sequence[float]]] = {
    "fashion-mnist": (2.4, 1.05, 0.78, 0.20, 0.061, 0.030, 0.022, 0.0195),
    "cifar10": (19.0, 9.3, 4.0, 1.25, 0.61, 0.42, 0.35, 0.31),
}
_TITLES: Final = {"fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}

QUICK: Final = {
    "nonlinear": (1, 2, 4, 8),
    "totals": (2, 3, 5, 7, 9),
    "per_class": 200,
    "width": 256,
    "epochs": 30,
}
QUICK_TAKES: Final = "in some minutes"


@dataclass(frozen=True)
class Settings:
    """Our setting: bias-free hybrids from PyTorch's initialisation, squared loss, SGD with cosine to eta/100.

    A network of depth L has L weight matrices: the first layers nonlinear (linear map, batch norm, ReLU), the
    others linear, the last one the head.
    """

    datasets: tuple[str, ...] = setting(
        ("fashion-mnist", "cifar10"), "data sets, one row each", choices=tuple(_TITLES)
    )
    depth: int = setting(9, "L in the first two columns")
    nonlinear: tuple[int, ...] = setting((1, 2, 3, 5, 8), "nonlinear layers in the first two columns")
    totals: tuple[int, ...] = setting((2, 3, 4, 5, 6, 7, 8, 9), "L in the last two columns")
    added_to: tuple[int, ...] = setting((1, 2), "nonlinear layers in the last two columns")
    width: int = setting(512, "width of the hidden layers")
    per_class: int = setting(5000, "training images of each class")
    test_per_class: int = setting(1000, "test images of each class")
    epochs: int = setting(100, "passes over the images")
    batch_size: int = setting(64, "images of a step")
    learning_rate: float = setting(0.02, "eta")
    momentum: float = setting(0.9, "mu")
    weight_decay: float = setting(5e-4, "lambda")
    runs: int = setting(3, "seeds per network: means are drawn, bars are standard deviations")
    seed: int = setting(0, "first seed of the runs")
    device: str = setting("cpu", "where PyTorch trains, cuda for a GPU")
    data: str = setting("", "folder of the data sets; default: the environment variable DLNFAST_DATA")


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Train every network with every seed, and measure its hidden layers in evaluation mode."""
    check_count(settings.depth, "depth", minimum=2)
    check_count(settings.runs, "runs")
    for name in ("nonlinear", "totals", "added_to"):
        for i, value in enumerate(getattr(settings, name)):
            check_count(value, f"{name}[{i}]", minimum=2 if name == "totals" else 1)
    networks = _networks(settings)
    records: dict[str, list[dict[str, Any]]] = {}
    start = time.perf_counter()
    for dataset in settings.datasets:
        data = images_for(settings, dataset)
        records[dataset] = []
        for nonlinear, depth in _show_progress(networks, progress, dataset):
            runs = [
                _train(settings, data, nonlinear, depth, seed)
                for seed in range(settings.seed, settings.seed + settings.runs)
            ]
            records[dataset].append({"nonlinear": nonlinear, "depth": depth, **_summary(runs)})
    displays: dict[str, dict[str, LineDisplay]] = {}
    claims: list[Claim] = []
    for dataset, found in records.items():
        displays[dataset] = _displays(settings, dataset, found)
        claims += _check_claims(settings, dataset, found)
    numbers = {
        "networks": records,
        "published": PUBLISHED,
        "claims": as_numbers(claims),
        "panels": {
            dataset: {name: display.numbers() for name, display in panels.items()}
            for dataset, panels in displays.items()
        },
        "seconds": time.perf_counter() - start,
    }
    return Result({**displays, "claims": claims}, numbers, [*_table(records), *map(str, claims)])


def _networks(settings: Settings) -> list[tuple[int, int]]:
    """Return (nonlinear layers, depth) of every network, each once."""
    deep = [(k, settings.depth) for k in settings.nonlinear if k < settings.depth]
    added = [(k, depth) for k in settings.added_to for depth in settings.totals if k < depth]
    return list(dict.fromkeys(deep + added))


def _show_progress(networks: list[tuple[int, int]], progress: bool, dataset: str) -> Any:
    from tqdm import tqdm

    return tqdm(
        networks, desc=_TITLES[dataset], unit="network", disable=None if progress else True, leave=False
    )


def _train(settings: Settings, data: Any, nonlinear: int, depth: int, seed: int) -> dict[str, Any]:
    from ..torch import Batches, HybridMLP, OptimizerOptions, Trainer, measure_layers

    model = HybridMLP(
        data.train.inputs[0].numel(),
        settings.width,
        data.n_classes,
        n_nonlinear=nonlinear,
        n_linear=depth - 1 - nonlinear,
        initial="torch",
        seed=seed,
        device=settings.device,
    )
    trainer = Trainer(
        model,
        loss="squared",
        learning_rate=settings.learning_rate,
        optimizer=OptimizerOptions(momentum=settings.momentum, weight_decay=settings.weight_decay),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=seed,
    )
    history = trainer.fit(*data.train, test=data.test)
    in_full = depth == settings.depth
    found = measure_layers(
        model,
        Batches(data.train.inputs, data.train.labels, 512),
        model.hidden_layers if in_full else model.hidden_layers[-1:],
        test_batches=Batches(data.test.inputs, data.test.labels, 512) if in_full else None,
        n_classes=data.n_classes,
        ranks=False,
        probe="ridge" if in_full else None,
    )
    return {
        "test_accuracy": history.test_accuracy[-1],
        "train_accuracy": history.accuracy[-1],
        "compression": [layer.compression for layer in found],
        "probe_test": [layer.probe_test for layer in found] if in_full else [],
    }


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return means and standard deviations over the seeds; of compression, of its logarithm."""
    summary: dict[str, Any] = {"runs": list(runs)}
    ddof = min(len(runs) - 1, 1)
    for name in ("test_accuracy", "train_accuracy", "probe_test"):
        values = np.array([run[name] for run in runs])
        summary[name] = {"mean": values.mean(axis=0), "deviation": values.std(axis=0, ddof=ddof)}
    logs = np.log([run["compression"] for run in runs])
    mean = np.exp(logs.mean(axis=0))
    summary["compression"] = {"mean": mean, "deviation": mean * logs.std(axis=0, ddof=ddof)}
    return summary


def _displays(settings: Settings, dataset: str, records: list[dict[str, Any]]) -> dict[str, LineDisplay]:
    deep = {
        f"{r['nonlinear']} of {settings.depth - 1} nonlinear": r
        for r in records
        if r["depth"] == settings.depth and r["nonlinear"] in settings.nonlinear
    }
    layers = list(range(1, settings.depth))
    panels = {
        f"probe accuracy on test images, L = {settings.depth}": LineDisplay(
            layers,
            {label: 100 * r["probe_test"]["mean"] for label, r in deep.items()},
            spread={label: 100 * r["probe_test"]["deviation"] for label, r in deep.items()},
            x_label="layer $l$",
            y_label="%",
        ),
        f"compression, L = {settings.depth}": LineDisplay(
            layers,
            {label: r["compression"]["mean"] for label, r in deep.items()},
            spread={label: r["compression"]["deviation"] for label, r in deep.items()},
            x_label="layer $l$",
            y_label="$C_l$",
            log_y=True,
        ),
    }
    over = {
        f"{k} nonlinear, others linear": [_find_record(records, k, depth) for depth in settings.totals]
        for k in settings.added_to
    }

    def column(name: str, part: str, factor: float) -> dict[str, list[float]]:
        return {
            label: [
                float("nan") if r is None else factor * float(np.atleast_1d(r[name][part])[-1]) for r in rows
            ]
            for label, rows in over.items()
        }

    for title, name, factor, y_label in (
        ("test accuracy", "test_accuracy", 100.0, "%"),
        ("compression of the last layer", "compression", 1.0, "$C_{L-1}$"),
    ):
        panels[title] = LineDisplay(
            settings.totals,
            column(name, "mean", factor),
            spread=column(name, "deviation", factor),
            x_label="depth $L$",
            y_label=y_label,
            log_y=name == "compression",
        )
    return panels


def _find_record(records: list[dict[str, Any]], nonlinear: int, depth: int) -> dict[str, Any] | None:
    return next((r for r in records if r["nonlinear"] == nonlinear and r["depth"] == depth), None)


def _check_claims(settings: Settings, dataset: str, records: list[dict[str, Any]]) -> list[Claim]:
    title, claims = _TITLES[dataset], []
    for k in settings.added_to:
        rows = [r for r in records if r["nonlinear"] == k and r["depth"] in settings.totals]
        rows.sort(key=lambda r: r["depth"])
        if len(rows) < 2:
            continue
        claims.append(_claim_generalisation(f"{title}, {k} nonlinear", rows))
        last = [float(r["compression"]["mean"][-1]) for r in rows]
        fit = linear_fit([r["depth"] for r in rows], np.log(last))
        assert fit is not None
        text = f"C from {last[0]:.3g} at L = {rows[0]['depth']} to {last[-1]:.3g} at L = {rows[-1]['depth']}"
        claims.append(Claim(f"{title}, {k} nonlinear: depth improves compression", fit.slope < 0, text))
    for r in records:
        linear = settings.depth - 1 - r["nonlinear"]
        if r["depth"] == settings.depth and r["nonlinear"] in settings.nonlinear and linear > 0:
            values = r["compression"]["mean"][r["nonlinear"] - 1 :]
            shown = all(later < earlier for earlier, later in itertools.pairwise(values))
            text = f"C from {values[0]:.3g} to {values[-1]:.3g} over {linear} linear layers"
            name = f"{title}, L = {settings.depth}, {r['nonlinear']} nonlinear"
            claims.append(Claim(f"{name}: every linear layer compresses", shown, text))
    return claims


def _claim_generalisation(name: str, rows: list[dict[str, Any]]) -> Claim:
    """Compare the shallowest network with the deepest by the spread over the seeds of both."""
    ends = [np.array([run["test_accuracy"] for run in row["runs"]]) for row in (rows[0], rows[-1])]
    gain = float(ends[1].mean() - ends[0].mean())
    n = len(ends[0])
    error = float(np.sqrt(sum(end.var(ddof=1) for end in ends) / n)) if n > 1 else float("inf")
    text = f"test accuracy {100 * ends[0].mean():.1f} % at L = {rows[0]['depth']}, {100 * gain:+.1f} +- "
    text += f"{100 * error:.1f} at L = {rows[-1]['depth']}"
    return Claim(f"{name}: depth improves generalisation", gain > 2 * error, text)


def _table(records: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    lines = []
    for dataset, rows in records.items():
        for r in rows:
            accuracy, last = r["test_accuracy"], r["compression"]
            lines.append(
                f"{_TITLES[dataset]:<13} L = {r['depth']}, {r['nonlinear']} nonlinear: test "
                f"{100 * accuracy['mean']:.2f} +- {100 * accuracy['deviation']:.2f} %, last C "
                f"{last['mean'][-1]:.3g} +- {last['deviation'][-1]:.2g}"
            )
    return lines


def draw(settings: Settings, result: Result) -> Figure:
    """Draw a row per data set: probes and C over the layers, accuracy and C over the depth."""
    from matplotlib.figure import Figure

    names = [dataset for dataset in result.displays if dataset != "claims"]
    figure = Figure(figsize=(19.0, 4.3 * len(names) + 2.2), layout="constrained")
    rows = figure.subplots(len(names), 4, squeeze=False)
    for row, dataset in zip(rows, names, strict=True):
        for index, (ax, (title, display)) in enumerate(
            zip(row, result.displays[dataset].items(), strict=True)
        ):
            display.plot(ax, marker="o", markersize=4, legend=False)
            published = PUBLISHED[dataset]
            if title.startswith("compression, L") and settings.depth == len(published) + 1:
                layers = range(1, settings.depth)
                ax.plot(layers, published, "--", color="#555555", linewidth=1.2, label="published, read off")
            ax.legend(frameon=False, fontsize=9)
            ax.set_title(f"{_TITLES[dataset]}: {title}" if index == 0 else title, fontsize=11)
    figure.suptitle(
        f"The role of depth (our setting): {10 * settings.per_class:,} images, width {settings.width}, "
        f"{settings.epochs} epochs, mean and standard deviation of {settings.runs} seeds",
        fontsize=13,
    )
    return figure
