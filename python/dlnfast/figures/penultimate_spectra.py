# SPDX-License-Identifier: MIT
"""Directions in the change of the penultimate weight of a linear network, an MLP, a VGG and a ViT.

The claim, of the talk behind arXiv 2306.01154 and 2406.04112: training changes weights within a subspace of
about K to 2K dimensions, K classes, whatever the network. The setting is unpublished, this one is ours. Needs
PyTorch.

Every network is trained from one start by mini-batches, by mini-batches on shuffled labels, and by full-batch
descent until its training loss is that of the mini-batches.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .. import measures
from .._support.arrays import check_count, check_scale
from ..plots import COLOURS, LineDisplay
from . import Result, setting
from ._captions import set_title
from ._claims import Claim, as_numbers, compare_pairs
from ._images import images_for
from ._mlp_training import read_records

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..torch import ImageData, LayerSubspace, Samples, Trainer

    Array = np.ndarray[Any, np.dtype[np.float64]]

#: Name -> title and data set.
_FAMILIES: Final = {
    "linear": ("deep linear network, squared loss", "fashion-mnist"),
    "mlp": ("MLP, cross-entropy", "fashion-mnist"),
    "vgg": ("VGG, cross-entropy", "cifar10"),
    "vit": ("ViT, cross-entropy", "cifar10"),
}
#: Name of a training -> label in the panels.
_TRAININGS: Final = {
    "mini": "mini-batches",
    "full": "full batch",
    "shuffled": "shuffled labels",
}
_RANDOM: Final = "random matrix"
_COLOURS: Final = (*COLOURS[:3], "#777777")
_OPTIMIZERS: Final = ("sgd", "adamw")
#: Share of the layer's gain that the change of rank 2K has to keep, as in `subspace_report`.
_KEPT: Final = 0.95
#: Largest tail of full-batch descent, and largest turn, relative to what they are compared with.
_TAIL: Final = 0.5
_TURN: Final = 0.25
#: Ratio of the ends of a logarithmic axis below which it has numbers between the powers of ten.
_DECADES: Final = 100
#: Least range of the axis of accuracies in percentage points, so that small differences look small.
_LEAST_RANGE: Final = 6.0
#: Samples of a batch of the tests, and significant digits of stored spectra.
_BATCH: Final = 500
_DIGITS: Final = 6

QUICK: Final = {
    "per_class": 50,
    "test_per_class": 200,
    "width": 256,
    "vgg": "vgg11",
    "vgg_width": 0.25,
    "vit_dim": 128,
    "vit_depth": 4,
    "vit_heads": 4,
    "vit_learning_rate": 1e-3,
    "epochs": 20,
    "batch_size": 25,
    "full_steps": 400,
    "runs": 2,
}
QUICK_TAKES: Final = "in some minutes"


@dataclass(frozen=True)
class Settings:
    """Our setting: VGG-16 and a ViT of the size of ViT-B, with patches of 8 for images of 32, for a GPU.

    No weight decay, which would change all directions equally. A step of full-batch descent keeps the
    activations of all images in memory.
    """

    families: tuple[str, ...] = setting(tuple(_FAMILIES), "networks, one row each", choices=tuple(_FAMILIES))
    per_class: int = setting(1000, "training images of each class")
    test_per_class: int = setting(1000, "test images of each class")
    width: int = setting(512, "width of the hidden layers of linear network and MLP")
    depth: int = setting(4, "weight matrices of linear network and MLP")
    scale: float = setting(0.5, "eps of the linear network's orthogonal weights; others: PyTorch's own")
    vgg: str = setting("vgg16", "which VGG, with batch norm", choices=("vgg11", "vgg13", "vgg16", "vgg19"))
    vgg_width: float = setting(1.0, "its channels, relative to the published ones")
    vit_dim: int = setting(768, "width of the ViT")
    vit_depth: int = setting(12, "its blocks")
    vit_heads: int = setting(12, "its attention heads")
    vit_patch: int = setting(8, "its patches' side")
    vit_optimizer: str = setting("adamw", "how the ViT is trained; others: sgd", choices=_OPTIMIZERS)
    linear_learning_rate: float = setting(0.01, "eta of the linear network")
    mlp_learning_rate: float = setting(0.05, "eta of the MLP")
    vgg_learning_rate: float = setting(0.05, "eta of the VGG")
    vit_learning_rate: float = setting(3e-4, "eta of the ViT")
    momentum: float = setting(0.9, "mu of sgd")
    epochs: int = setting(50, "passes over the images with mini-batches, cosine to eta / 100")
    batch_size: int = setting(64, "images of a mini-batch")
    full_steps: int = setting(3000, "most steps of full-batch descent to the loss of the mini-batches")
    full_rate: float = setting(1.0, "its constant eta, relative to the first one of the mini-batches")
    full_every: int = setting(5, "its steps between two measurements of the loss")
    runs: int = setting(5, "seeds")
    seed: int = setting(0, "first seed of the weights, the shuffled labels and the order of the images")
    device: str = setting("cpu", "where PyTorch trains, cuda for a GPU")
    data: str = setting("", "folder of the data sets; default: the environment variable DLNFAST_DATA")
    results: str = setting("", "JSON file of an earlier call: its numbers are drawn, nothing is trained")


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Train every network three times with every seed, or read the results of an earlier call."""
    check_count(settings.depth, "depth", minimum=3)
    for name in ("epochs", "full_steps", "full_every"):
        check_count(getattr(settings, name), name)
    check_scale(settings.full_rate, "full_rate", strict=True)
    check_count(settings.runs, "runs", minimum=2)
    if settings.results:
        families = read_records(settings.results, "families")
    else:
        families = _train_all(settings, progress)
    displays = {family: _displays(record) for family, record in families.items()}
    claims = [claim for family, record in families.items() for claim in _check_claims(family, record)]
    numbers = {
        "families": families,
        "claims": as_numbers(claims),
        "panels": {
            family: {name: display.numbers() for name, display in panels.items()}
            for family, panels in displays.items()
        },
    }
    lines = [line for family, record in families.items() for line in _table(family, record)]
    return Result({**displays, "claims": claims}, numbers, [*lines, *map(str, claims)])


# ---------------------------------------------------------------------------------------------- training


def _train_all(settings: Settings, progress: bool) -> dict[str, dict[str, Any]]:
    from tqdm import tqdm

    data: dict[str, ImageData] = {}
    families: dict[str, dict[str, Any]] = {}
    total = settings.runs * len(settings.families)
    with tqdm(total=total, unit="seed", disable=None if progress else True, leave=False) as bar:
        for family in settings.families:
            dataset = _FAMILIES[family][1]
            if dataset not in data:
                data[dataset] = images_for(settings, dataset)
            bar.set_description(family)
            runs = []
            for seed in range(settings.seed, settings.seed + settings.runs):
                found = _train(settings, family, data[dataset], seed)
                runs.append(found.pop("run"))
                families[family] = {**found, "runs": runs}
                bar.update()
    return families


def _make_network(settings: Settings, family: str, data: ImageData, seed: int) -> torch.nn.Module:
    from ..torch import MLP, VGG, DeepLinear, ViT

    n_in = data.train.inputs[0].numel()
    widths = [n_in, *[settings.width] * (settings.depth - 1), data.n_classes]
    channels, _, size = data.train.inputs[0].shape
    makers: dict[str, Callable[[], torch.nn.Module]] = {
        "linear": lambda: DeepLinear(widths, scale=settings.scale, seed=seed),
        "mlp": lambda: MLP(widths, batch_norm=False, seed=seed),
        "vgg": lambda: VGG(
            settings.vgg,
            data.n_classes,
            width=settings.vgg_width,
            image_size=size,
            in_channels=channels,
            seed=seed,
        ),
        "vit": lambda: ViT(
            dim=settings.vit_dim,
            depth=settings.vit_depth,
            n_heads=settings.vit_heads,
            patch_size=settings.vit_patch,
            image_size=size,
            in_channels=channels,
            n_classes=data.n_classes,
            seed=seed,
        ),
    }
    return makers[family]().to(settings.device)


@dataclass(frozen=True)
class _Case:
    """A network at its start, its images and its seed."""

    family: str
    start: torch.nn.Module
    train: Samples
    test: Samples
    n_classes: int
    seed: int


def _train(settings: Settings, family: str, data: ImageData, seed: int) -> dict[str, Any]:
    """Train a network by mini-batches, on shuffled labels, and by full batches; measure its changes."""
    import torch

    from ..torch import Samples

    train, test = data.train, data.test
    if family == "linear":
        train, test = (Samples(part.inputs.flatten(1), part.labels) for part in (train, test))
    case = _Case(family, _make_network(settings, family, data, seed), train, test, data.n_classes, seed)
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
    shuffled = replace(case, train=Samples(train.inputs, train.labels[order]))
    found = {
        "mini": _train_once(settings, case),
        "shuffled": _train_once(settings, shuffled),
    }
    found["full"] = _train_once(settings, case, loss=found["mini"][1]["loss"])
    models = {name: model for name, (model, _) in found.items()}
    first = _read_matrix(case.start)
    norm = float(np.linalg.norm(_read_matrix(models["mini"]) - first))
    rows, columns = first.shape
    noise = np.random.default_rng(seed).standard_normal((rows, columns))
    noise *= norm / float(np.linalg.norm(noise))
    reports = {name: _report(case, models[name], models["shuffled"], name) for name in ("mini", "full")}
    return {
        "layer": reports["mini"].name,
        "shape": [rows, columns],
        "n_classes": data.n_classes,
        "n_images": len(train.labels),
        "n_parameters": sum(p.numel() for p in case.start.parameters()),
        "run": {
            "seed": seed,
            "trainings": {name: record for name, (_, record) in found.items()},
            "random": _describe_change(noise, data.n_classes),
            "relative_change": norm / float(np.linalg.norm(first)),
            "reports": {name: _read_report(report) for name, report in reports.items()},
        },
    }


def _train_once(
    settings: Settings, case: _Case, *, loss: float | None = None
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Train a copy of a network by mini-batches or, if `loss` is given, by full batches down to this loss."""
    began = time.perf_counter()
    trainer = _make_trainer(settings, case, is_full=loss is not None)
    first = _read_matrix(case.start)
    trace: dict[str, list[float]] = {"epoch": [], "loss": [], "outside": []}

    def after_epoch(done: int) -> bool:
        if loss is not None and done % settings.full_every:
            return False
        current = trainer.evaluate(*case.train, batch_size=_BATCH).loss
        values = np.linalg.svd(_read_matrix(trainer.model) - first, compute_uv=False)
        trace["epoch"].append(done)
        trace["loss"].append(current)
        trace["outside"].append(1 - measures.energy_share(values, 2 * case.n_classes))
        return loss is not None and current <= loss

    history = trainer.fit(*case.train, after_epoch=after_epoch)
    reached = trainer.evaluate(*case.train, batch_size=_BATCH)
    steps_per_epoch = -(-len(case.train.labels) // trainer.batch_size)
    record = {
        **_describe_change(_read_matrix(trainer.model) - first, case.n_classes),
        "loss": reached.loss,
        "is_matched": loss is None or reached.loss <= loss,
        "train_accuracy": reached.accuracy,
        "test_accuracy": trainer.evaluate(*case.test, batch_size=_BATCH).accuracy,
        "steps": len(history.loss) * steps_per_epoch,
        "trace": trace,
        "seconds": time.perf_counter() - began,
    }
    return trainer.model, record


def _make_trainer(settings: Settings, case: _Case, *, is_full: bool) -> Trainer:
    """Return the trainer of a copy of the network."""
    from ..torch import OptimizerOptions, ScheduleOptions, Trainer

    rate: float = getattr(settings, f"{case.family}_learning_rate")
    return Trainer(
        copy.deepcopy(case.start),
        loss="squared" if case.family == "linear" else "cross_entropy",
        optimizer=OptimizerOptions(
            settings.vit_optimizer if case.family == "vit" else "sgd", momentum=settings.momentum
        ),
        learning_rate=rate * (settings.full_rate if is_full else 1.0),
        schedule=ScheduleOptions("constant" if is_full else "cosine"),
        epochs=settings.full_steps if is_full else settings.epochs,
        batch_size=len(case.train.labels) if is_full else settings.batch_size,
        seed=case.seed,
    )


def _report(case: _Case, model: torch.nn.Module, shuffled: torch.nn.Module, training: str) -> LayerSubspace:
    """Return the report on the penultimate layer: at K and 2K, and for mini-batches at further ranks."""
    from ..torch import subspace_report

    few = (case.n_classes, 2 * case.n_classes)
    report = subspace_report(
        model,
        case.start,
        rank=case.n_classes,
        layers="penultimate",
        ranks=few if training == "full" else (1, case.n_classes // 2, *few, 4 * case.n_classes),
        evaluate=lambda trained: _mark_correct(trained, case.test),
        shuffled=shuffled,
        seed=case.seed,
    )
    (layer,) = report.layers.values()
    return layer


def _read_matrix(model: torch.nn.Module) -> Array:
    from ..torch import weight_matrices

    (matrix,) = weight_matrices(model, "penultimate")
    values: Array = matrix.matrix().double().cpu().numpy().copy()
    return values


def _mark_correct(model: torch.nn.Module, test: Samples) -> torch.Tensor:
    """Return for every test image whether it is classified correctly."""
    import torch

    from ..torch import Batches

    device = next(model.parameters()).device
    batches = Batches(*test, _BATCH, device=device)
    return torch.cat([model(inputs).argmax(1) == labels for inputs, labels in batches])


def _describe_change(change: Array, n_classes: int) -> dict[str, Any]:
    """Return the singular values of a change, its energy in K and 2K of them, and those above the noise."""
    values = np.linalg.svd(change, compute_uv=False)
    variance = measures.noise_variance(change)
    return {
        "values": [float(f"{value:.{_DIGITS}g}") for value in values],
        "energy": [measures.energy_share(values, k) for k in (n_classes, 2 * n_classes)],
        "noise_edge": measures.noise_edge(change.shape, variance),
        "above_noise": measures.rank_above_noise(change, variance),
    }


def _read_report(layer: LayerSubspace) -> dict[str, Any]:
    """Return the part of a report that is drawn or judged."""
    return {
        "ranks": list(layer.scores),
        "scores": list(layer.scores.values()),
        "scores_without": [layer.scores_without.get(k) for k in layer.scores],
        "turn": layer.turn,
        "random_turn": layer.random_turn,
        "verdict": layer.verdict,
        "learns_in_subspace": layer.learns_in_subspace,
    }


# ------------------------------------------------------------------------------------ panels and verdicts


def _changes(record: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Return the descriptions of one kind of change, seed by seed."""
    if name == "random":
        return [run["random"] for run in record["runs"]]
    return [run["trainings"][name] for run in record["runs"]]


def _read(record: Mapping[str, Any], name: str, key: str) -> Array:
    return np.array([change[key] for change in _changes(record, name)], dtype=np.float64)


def _read_scores(record: Mapping[str, Any], name: str, key: str, rank: int) -> Array:
    """Return the test accuracy of every seed with a change of this rank; NaN where it was not measured."""
    scores = []
    for run in record["runs"]:
        report = run["reports"][name]
        known = dict(zip(report["ranks"], report[key], strict=True))
        scores.append(known.get(rank))
    return np.array(scores, dtype=np.float64)


def _displays(record: Mapping[str, Any]) -> dict[str, LineDisplay]:
    labels = {**_TRAININGS, "random": _RANDOM}
    values = {name: _read(record, name, "values") for name in labels}
    relative = {labels[name]: (v / v[:, :1]).mean(axis=0) for name, v in values.items()}
    edges = {
        labels[name]: np.full(v.shape[1], (_read(record, name, "noise_edge") / v[:, 0]).mean())
        for name, v in values.items()
        if name != "random"
    }
    n = values["mini"].shape[1]
    outside = {labels[name]: _find_outside(v).mean(axis=0) for name, v in values.items()}
    ranks = record["runs"][0]["reports"]["mini"]["ranks"]
    curves = {
        f"{_TRAININGS[name]}, {text}": [100 * _read_scores(record, name, key, k).mean() for k in ranks]
        for key, text in (("scores", "only the $k$ largest"), ("scores_without", "without these"))
        for name in ("mini", "full")
    }
    return {
        "spectrum": LineDisplay(
            range(1, n + 1),
            relative,
            theory=edges,
            x_label="index $i$",
            y_label=r"$\sigma_i / \sigma_1$ of the change",
            log_y=True,
        ),
        "energy": LineDisplay(
            range(1, n),
            outside,
            x_label="number $k$ of singular values",
            y_label="energy outside of these [%]",
            log_y=True,
        ),
        "accuracy": LineDisplay(
            ranks,
            curves,
            x_label="rank $k$ to which the change is cut",
            y_label="test accuracy [%]",
        ),
    }


def _find_outside(values: Array) -> Array:
    """Return the energy outside of the 1 .. n - 1 largest singular values in per cent, one row per seed."""
    squares = values**2
    smaller = np.cumsum(squares[:, ::-1], axis=1)[:, -2::-1]
    outside: Array = 100 * smaller / squares.sum(axis=1, keepdims=True)
    return outside


def _check_claims(family: str, record: Mapping[str, Any]) -> list[Claim]:
    """Judge the claims by differences, one per seed."""
    title, n_top = _FAMILIES[family][0].split(",")[0], 2 * record["n_classes"]
    tails = {name: 1 - _read(record, name, "energy")[:, 1] for name in _TRAININGS}
    counts = {name: _read(record, name, "above_noise") for name in _TRAININGS}
    start, cut = (_read_scores(record, "mini", "scores", k) for k in (0, n_top))
    gain = _read(record, "mini", "test_accuracy") - start
    reports = [run["reports"]["mini"] for run in record["runs"]]
    turn, random_turn = (np.array([report[key] for report in reports]) for key in ("turn", "random_turn"))
    directions = f"{n_top} directions"
    return [
        compare_pairs(
            f"{title}: {directions} hold more of the change than with shuffled labels, percentage points",
            tails["shuffled"] - tails["mini"],
            unit=100.0,
        ),
        compare_pairs(
            f"{title}: at most {n_top} singular values of the change exceed the noise edge, {n_top} - number",
            n_top - counts["mini"],
            digits=1,
        ),
        compare_pairs(
            f"{title}: {directions} keep {100 * _KEPT:.0f} % of the test accuracy that the layer adds, "
            "percentage points beyond these",
            cut - start - _KEPT * gain,
            unit=100.0,
        ),
        compare_pairs(
            f"{title}: full batches leave less than half the energy outside of {directions}, "
            "percentage points below half",
            _TAIL * tails["mini"] - tails["full"],
            unit=100.0,
        ),
        compare_pairs(
            f"{title}: full batches have fewer singular values above the noise edge, mini-batches less full",
            counts["mini"] - counts["full"],
            digits=1,
        ),
        compare_pairs(
            f"{title}: the other directions turn less than a quarter as far as by a random change, "
            "radians below that",
            _TURN * random_turn - turn,
            digits=3,
        ),
    ]


def _table(family: str, record: Mapping[str, Any]) -> list[str]:
    """Return the numbers of every training, means over the seeds."""
    n_classes, shape = record["n_classes"], record["shape"]
    lines = [
        f"{family}: {record['layer']} ({shape[0]} x {shape[1]}) of {record['n_parameters']:,} parameters, "
        f"{record['n_images']:,} images, K = {n_classes}, {len(record['runs'])} seeds"
    ]
    for name, label in {**_TRAININGS, "random": _RANDOM}.items():
        energy = 100 * _read(record, name, "energy").mean(axis=0)
        count = _read(record, name, "above_noise").mean()
        text = f"  {label:<15} {energy[0]:.1f}, {energy[1]:.1f} % in K, 2K; {count:.1f} above the noise edge"
        if name != "random":
            text += (
                f"; training loss {_read(record, name, 'loss').mean():.3g}, accuracy "
                f"{100 * _read(record, name, 'train_accuracy').mean():.1f} % on training, "
                f"{100 * _read(record, name, 'test_accuracy').mean():.1f} % on test images; "
                f"{_read(record, name, 'steps').mean():.0f} steps"
            )
        if name in ("mini", "full"):
            ranks = (0, n_classes, 2 * n_classes)
            cut = [100 * _read_scores(record, name, "scores", k).mean() for k in ranks]
            text += f"; cut to 0, K, 2K: {cut[0]:.1f}, {cut[1]:.1f}, {cut[2]:.1f} %"
        if name == "full":
            matched = sum(change["is_matched"] for change in _changes(record, name))
            text += f"; {matched} of {len(record['runs'])} reached the loss of the mini-batches"
        lines.append(text)
    return lines


def draw(settings: Settings, result: Result) -> Figure:
    """Draw a row per family: spectra of the changes, energy, accuracy of cut changes, and tails."""
    from matplotlib.figure import Figure

    del settings
    families = result.numbers["families"]
    figure = Figure(figsize=(15.0, 3.1 * len(families) + 0.8), layout="constrained")
    rows = figure.subplots(len(families), 4, squeeze=False)
    for row, (family, record) in zip(rows, families.items(), strict=True):
        panels, n_classes = result.displays[family], record["n_classes"]
        for ax, name in zip(row, ("spectrum", "energy"), strict=False):
            panels[name].plot(ax, colors=_COLOURS, legend=False)
            for k in (n_classes, 2 * n_classes):
                place = k + 0.5 if name == "spectrum" else k
                ax.axvline(place, color="#333333", linewidth=0.8, linestyle=":")
        row[0].set_ylim(1e-4, 2)
        row[1].set_ylim(1e-3, 200)
        _draw_accuracy(row[2], panels["accuracy"], record)
        _draw_traces(row[3], record)
        shape = " x ".join(map(str, record["shape"]))
        row[0].set_title(f"{_FAMILIES[family][0]}: {record['layer']}, {shape}", fontsize=10)
    _add_legend(figure)
    set_title(figure, "Changes of penultimate weights: mini-batches, full batches and controls")
    return figure


def _add_legend(figure: Figure) -> None:
    """Explain colours and the styles of the third column below all panels."""
    from matplotlib.lines import Line2D

    labels = (*_TRAININGS.values(), _RANDOM)
    lines = [Line2D([], [], color=c, label=label) for c, label in zip(_COLOURS, labels, strict=True)]
    lines += [
        Line2D([], [], marker="o", linestyle="-", color="black", label="accuracy: only the $k$ largest"),
        Line2D([], [], marker="o", linestyle="--", color="black", label="without these"),
        Line2D([], [], linestyle=":", color="black", label="whole change"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=10)


def _draw_accuracy(ax: Axes, display: LineDisplay, record: Mapping[str, Any]) -> None:
    """Draw the accuracy over the rank of the change, and that of the whole change."""
    for position, values in enumerate(display.curves.values()):
        style = "o-" if position < 2 else "o--"
        ax.plot(range(len(display.x)), values, style, color=_COLOURS[position % 2], markersize=4)
    for colour, name in zip(_COLOURS, ("mini", "full"), strict=False):
        whole = 100 * _read(record, name, "test_accuracy").mean()
        ax.axhline(whole, color=colour, linewidth=1.0, linestyle=":")
    low, high = ax.get_ylim()
    room = max(_LEAST_RANGE - (high - low), 0.0) / 2
    ax.set_ylim(low - room, high + room)
    ax.set_xticks(range(len(display.x)), [f"{k:.0f}" for k in display.x])
    ax.set_xlabel(display.x_label)
    ax.set_ylabel(display.y_label)
    ax.grid(alpha=0.25)


def _draw_traces(ax: Axes, record: Mapping[str, Any]) -> None:
    """Draw the energy outside of 2K directions over the training loss, one curve per seed."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    for colour, name in zip(_COLOURS, _TRAININGS, strict=False):
        for change in _changes(record, name):
            trace = change["trace"]
            outside = [100 * share for share in trace["outside"]]
            ax.plot(trace["loss"], outside, color=colour, linewidth=1.1)
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        low, high = axis.get_view_interval()
        if high < _DECADES * low:  # powers of ten alone would leave the axis without numbers
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
    ax.invert_xaxis()
    ax.set_xlabel("training loss, falling")
    ax.set_ylabel("energy outside of $2K$ [%]")
    ax.grid(alpha=0.25)


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    some = next(iter(result.numbers["families"].values()))
    return (
        f"{some['n_images']:,} images, means of {len(some['runs'])} seeds. Full-batch descent stops at the "
        "training loss of the mini-batches. Vertical lines: K and 2K. First column, dashed: noise edges. "
        "Third column: accuracy with only the k largest singular values of the change, without these, and "
        "with the whole change. The last column has one curve per seed"
    )
