# SPDX-License-Identifier: MIT
"""Accuracy over the parameters of compressed networks: low rank with and without data, and pruning.

Our setting. Trained networks are compressed without further training: by the best approximations of their
weights, by those of their layers' outputs on training images (`dlnfast.torch.compress` with `data`), and by
removing the smallest weights of all layers until equally many parameters are left. Needs PyTorch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .._support.arrays import check_count
from ..plots import COLOURS
from . import Result, setting
from ._captions import set_title
from ._claims import Claim, as_numbers
from ._images import images_for
from ._mlp_training import read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Family -> title, data set, optimizer and learning rate.
_FAMILIES: Final[Mapping[str, tuple[str, str, str, float]]] = {
    "mlp": ("MLP, Fashion-MNIST", "fashion-mnist", "adamw", 1e-3),
    "vgg": ("VGG-11, CIFAR-10", "cifar10", "sgd", 5e-2),
    "vit": ("ViT, CIFAR-10", "cifar10", "adamw", 1e-3),
}
_METHODS: Final = {
    "weights": "low rank, weights only",
    "data": "low rank, with data",
    "pruning": "smallest weights removed",
}

QUICK: Final = {"per_class": 500, "test_per_class": 200, "epochs": 6, "runs": 2, "ranks": (4, 8, 16, 32, 64)}
QUICK_TAKES: Final = "in some minutes"


@dataclass(frozen=True)
class Settings:
    """Networks that are trained here, and their compression."""

    families: tuple[str, ...] = setting(
        tuple(_FAMILIES), "networks, one panel each", choices=tuple(_FAMILIES)
    )
    ranks: tuple[int, ...] = setting((4, 8, 16, 32, 64, 96), "r of all compressed layers")
    per_class: int = setting(5000, "training images of each class")
    test_per_class: int = setting(1000, "test images of each class")
    epochs: int = setting(20, "passes over the images")
    batch_size: int = setting(64, "images of a step")
    n_data: int = setting(1000, "training images for the moments of the layers' inputs")
    width: int = setting(256, "width of the MLP's two hidden layers")
    vgg_width: float = setting(0.25, "factor of the VGG's channels")
    vit_dim: int = setting(96, "width of the ViT")
    vit_depth: int = setting(4, "blocks of the ViT")
    runs: int = setting(5, "seeds per network: means and standard deviations are drawn")
    seed: int = setting(0, "first seed of the runs")
    device: str = setting("cpu", "where PyTorch trains, cuda for a GPU")
    data: str = setting("", "folder of the data sets; default: the environment variable DLNFAST_DATA")
    results: str = setting("", "JSON file of an earlier call: its numbers are drawn, nothing is trained")


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Train and compress every network with every seed, or read the results of an earlier call."""
    for name in ("epochs", "batch_size", "n_data", "runs"):
        check_count(getattr(settings, name), name)
    for i, rank in enumerate(settings.ranks):
        check_count(rank, f"ranks[{i}]")
    if settings.results:
        records = read_records(settings.results, "networks")
    else:
        records = _train_and_compress(settings, progress)
    claims = [claim for name, record in records.items() for claim in _check_claims(name, record)]
    numbers = {"networks": records, "claims": as_numbers(claims)}
    return Result({"records": records, "claims": claims}, numbers, [*_table(records), *map(str, claims)])


def _train_and_compress(settings: Settings, progress: bool) -> dict[str, dict[str, Any]]:
    from tqdm import tqdm

    images = {name: images_for(settings, name) for name in {_FAMILIES[f][1] for f in settings.families}}
    records = {}
    with tqdm(
        total=len(settings.families) * settings.runs,
        unit="network",
        disable=None if progress else True,
        leave=False,
    ) as bar:
        for family in settings.families:
            runs = []
            for seed in range(settings.seed, settings.seed + settings.runs):
                runs.append(_run(settings, family, images[_FAMILIES[family][1]], seed))
                bar.update(1)
            records[family] = _summarise(settings, runs)
    return records


def _run(settings: Settings, family: str, data: Any, seed: int) -> dict[str, Any]:
    """Train one network, and compress it by all methods and ranks."""
    from ..torch import OptimizerOptions, Trainer, compress

    _, _, optimizer, rate = _FAMILIES[family]
    model = _make_network(settings, family, data, seed)
    trainer = Trainer(
        model,
        optimizer=OptimizerOptions(optimizer),
        learning_rate=rate,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=seed,
    )
    trainer.fit(*data.train)
    model.eval()
    order = np.random.default_rng(seed).permutation(len(data.train.labels))[: settings.n_data]
    batches = [(part,) for part in data.train.inputs[order].split(250)]
    held_out = [(part,) for part in data.test.inputs[:500].split(250)]
    accuracy = _measure_accuracy(model, data.test)
    found: dict[str, Any] = {"accuracy": accuracy, "methods": {name: [] for name in _METHODS}}
    for rank in settings.ranks:
        parameters = 0
        for method, given in (("weights", None), ("data", batches)):
            small = copy.deepcopy(model)
            report = compress(small, rank=rank, data=given, held_out=held_out, repeats=0)
            found["parameters"] = report.parameters_before
            parameters = report.parameters_after
            point = {
                "parameters": parameters,
                "accuracy": _measure_accuracy(small, data.test),
                "error": report.function_error,
            }
            found["methods"][method].append(point)
        pruned = _prune(model, list(report.layers), parameters)
        point = {"parameters": parameters, "accuracy": _measure_accuracy(pruned, data.test), "error": None}
        found["methods"]["pruning"].append(point)
    return found


def _make_network(settings: Settings, family: str, data: Any, seed: int) -> Any:
    from ..torch import MLP, VGG, ViT

    channels, _, size = data.train.inputs[0].shape
    if family == "mlp":
        widths = [data.train.inputs[0].numel(), settings.width, settings.width, data.n_classes]
        return MLP(widths, batch_norm=False, bias=True, seed=seed, device=settings.device)
    common: dict[str, Any] = {"image_size": size, "in_channels": channels, "seed": seed}
    if family == "vgg":
        model: Any = VGG("vgg11", data.n_classes, width=settings.vgg_width, **common)
    else:
        sizes: dict[str, Any] = {
            "dim": settings.vit_dim,
            "depth": settings.vit_depth,
            "n_heads": 4,
            "patch_size": 4,
        }
        model = ViT(**sizes, n_classes=data.n_classes, **common)
    return model.to(settings.device)


def _measure_accuracy(model: Any, test: Any) -> float:
    import torch

    device = next(model.parameters()).device
    with torch.no_grad():
        parts = [model(part.to(device)).argmax(1).cpu() for part in test.inputs.split(250)]
    return float((torch.cat(parts) == test.labels.cpu()).double().mean())


def _prune(model: Any, layers: Sequence[str], parameters: int) -> Any:
    """Return a copy without the smallest weights of these layers, with this number of parameters left."""
    from torch.nn.utils import prune

    pruned = copy.deepcopy(model)
    chosen = [(pruned.get_submodule(name), "weight") for name in layers]
    total = sum(p.numel() for p in pruned.parameters())
    n_removed = total - parameters
    n_weights = sum(getattr(module, name).numel() for module, name in chosen)
    if 0 < n_removed < n_weights:
        prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=n_removed)
    return pruned


def _summarise(settings: Settings, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    accuracies = [run["accuracy"] for run in runs]
    record: dict[str, Any] = {
        "ranks": list(settings.ranks),
        "parameters": runs[0]["parameters"],
        "n_runs": len(runs),
        "mean": float(np.mean(accuracies)),
        "deviation": _deviation(accuracies),
        "methods": {},
    }
    for method in _METHODS:
        points = [[run["methods"][method][i] for run in runs] for i in range(len(settings.ranks))]
        # "auto" may choose other pairs for the convolutions of another seed, with other rounding of ranks.
        record["methods"][method] = {
            "parameters": [float(np.mean([p["parameters"] for p in group])) for group in points],
            "mean": [float(np.mean([p["accuracy"] for p in group])) for group in points],
            "deviation": [_deviation([p["accuracy"] for p in group]) for group in points],
            "error": [
                None if group[0]["error"] is None else float(np.mean([p["error"] for p in group]))
                for group in points
            ],
            "runs": [[p["accuracy"] for p in group] for group in points],
        }
    return record


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _check_claims(family: str, record: Mapping[str, Any]) -> list[Claim]:
    title = _FAMILIES[family][0].split(",")[0]
    methods = record["methods"]
    errors = list(zip(methods["data"]["error"], methods["weights"]["error"], strict=True))
    ratios = [with_data / without for with_data, without in errors if without]
    claims = [
        Claim(
            f"{title}: data make the error of the output smaller at every rank, on held-out images",
            all(ratio < 1 for ratio in ratios),
            f"ratios {', '.join(f'{ratio:.2f}' for ratio in ratios)}",
        )
    ]
    for other in ("weights", "pruning"):
        gains = [100 * (a - b) for a, b in zip(methods["data"]["mean"], methods[other]["mean"], strict=True)]
        claims.append(
            Claim(
                f"{title}: on average over the ranks, low rank with data is more accurate than "
                f"{_METHODS[other]}",
                float(np.mean(gains)) > 0,
                f"points by rank: {', '.join(f'{gain:+.1f}' for gain in gains)}",
            )
        )
    return claims


def _table(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for family, record in records.items():
        head = f"{_FAMILIES[family][0]:<19} accuracy {100 * record['mean']:.1f} +- "
        lines.append(f"{head}{100 * record['deviation']:.1f} %, {record['parameters']:,} parameters")
        for i, rank in enumerate(record["ranks"]):
            found = [
                f"{_METHODS[name]} {100 * method['mean'][i]:.1f} +- {100 * method['deviation'][i]:.1f} %"
                for name, method in record["methods"].items()
            ]
            share = 100 * record["methods"]["data"]["parameters"][i] / record["parameters"]
            lines.append(f"  r = {rank:<3} {share:5.1f} % of the parameters: {'; '.join(found)}")
    return lines


def draw(settings: Settings, result: Result) -> Figure:
    """Draw a panel per network: accuracy over the share of parameters, by method."""
    del settings  # results of an earlier call have others
    from matplotlib.figure import Figure

    records = result.displays["records"]
    figure = Figure(figsize=(5.6 * len(records), 6.4), layout="constrained")
    axes = figure.subplots(1, len(records), squeeze=False)[0]
    for ax, (family, record) in zip(axes, records.items(), strict=True):
        _draw_panel(ax, record)
        ax.set_title(f"{_FAMILIES[family][0]}\n{record['parameters']:,} parameters", fontsize=12)
    axes[0].set_ylabel("test accuracy [%]")
    axes[0].legend(frameon=False, fontsize=9.5, loc="lower right")
    set_title(figure, "Compression of trained networks, without further training")
    return figure


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    del settings
    n_runs = next(iter(result.numbers["networks"].values()))["n_runs"]
    return f"Mean and standard deviation of {n_runs} seeds"


def _draw_panel(ax: Axes, record: Mapping[str, Any]) -> None:
    for colour, (name, method) in zip(COLOURS, record["methods"].items(), strict=False):
        shares = 100 * np.array(method["parameters"]) / record["parameters"]
        mean, deviation = (100 * np.array(method[key]) for key in ("mean", "deviation"))
        ax.errorbar(
            shares,
            mean,
            deviation,
            fmt="o-",
            color=colour,
            markersize=4,
            linewidth=1.5,
            capsize=2,
            label=_METHODS[name],
        )
    ax.axhline(100 * record["mean"], color="#555555", linewidth=1.0, linestyle="--", label="not compressed")
    ax.set_xlabel("parameters left [%]")
    ax.grid(alpha=0.25)
