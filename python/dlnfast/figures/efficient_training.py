# SPDX-License-Identifier: MIT
"""Test accuracy over the time of training, for plain layers, deep products and products of low rank.

Kwon, Zhang, Song, Balzano, Qu, "Efficient Low-Dimensional Compression of Overparameterized Models" (arXiv
2311.05061): as a product of three matrices of full width, the penultimate weight of an MLP generalises
better; a compressed product is as good, and faster. Needs PyTorch.
"""

from __future__ import annotations

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
from ._mlp_training import HIDDEN, Method, count_turns, read_records, split_images, train_methods

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The command line starts again where a variable caps a library.
TIMED = True

_TITLES: Final = {"fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
#: Test accuracy and seconds of the published networks on Fashion-MNIST, on the authors' machine.
PUBLISHED: Final[Mapping[str, tuple[float, float]]] = {
    "original": (0.893, 152.0),
    "deep product": (0.902, 260.0),
    "compressed product": (0.901, 115.0),
}
#: Differences of accuracy that count as none; the standard error of 10,000 test images is 0.003.
_NO_WORSE: Final = 0.003
_CLOSE: Final = 0.010
_FASTER: Final = 2.5

QUICK: Final = {
    "per_class": 1000,
    "epochs": 10,
    "learning_rates": (5e-4, 1e-3, 2e-3),
    "rate_runs": 1,
    "runs": 3,
    "every": 2,
}
QUICK_TAKES: Final = "in some minutes"


@dataclass(frozen=True)
class Settings:
    """Our setting of the published experiment: Adam, cosine to 0, rates chosen on held-out training images.

    The MLP has two hidden layers with ReLU and biases, and PyTorch's initialisation.
    """

    datasets: tuple[str, ...] = setting(
        ("fashion-mnist", "cifar10"), "data sets, one panel each", choices=tuple(_TITLES)
    )
    width: int = setting(512, "width of the hidden layers")
    rank: int = setting(20, "r of the compressed products; 2K for K classes")
    depth: int = setting(3, "factors of every product")
    deep_initial: str = setting(
        "balanced", "start of the product of full width", choices=("balanced", "orthogonal")
    )
    per_class: int = setting(5000, "training images of each class")
    test_per_class: int = setting(1000, "test images of each class")
    epochs: int = setting(20, "passes over the images")
    batch_size: int = setting(128, "images of a step")
    learning_rates: tuple[float, ...] = setting(
        (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
        "learning rates, of which every method gets the best one on a fifth of the training images",
    )
    rate_runs: int = setting(2, "seeds of the choice of rates")
    runs: int = setting(5, "seeds per network: means are drawn, bands are standard deviations")
    every: int = setting(1, "epochs between two tests")
    seed: int = setting(0, "first seed of the runs")
    device: str = setting("cpu", "where PyTorch trains, cuda for a GPU")
    data: str = setting("", "folder of the data sets; default: the environment variable DLNFAST_DATA")
    results: str = setting("", "JSON file of an earlier call: its numbers are drawn, nothing is trained")


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Train every network with every seed, or read the results of an earlier call."""
    for name in ("width", "rank", "epochs", "batch_size", "rate_runs", "runs", "every"):
        check_count(getattr(settings, name), name)
    check_count(settings.depth, "depth", minimum=2)
    if settings.results:
        records = read_records(settings.results, "networks")
    else:
        records = {name: _train(settings, name, progress) for name in settings.datasets}
    claims = [claim for name, found in records.items() for claim in _check_claims(_TITLES[name], found)]
    numbers = {"networks": records, "published": PUBLISHED, "claims": as_numbers(claims)}
    return Result({"records": records, "claims": claims}, numbers, [*_table(records), *map(str, claims)])


def list_methods(settings: Settings) -> list[Method]:
    """Return the four networks."""
    last, rank, depth = HIDDEN[-1:], settings.rank, settings.depth
    return [
        Method("original"),
        Method("deep product", last, settings.deep_initial, depth=depth),
        Method("compressed product", last, "gradient", rank, depth),
        Method("all hidden layers of low rank", HIDDEN, "gradient", rank, depth),
    ]


def _train(settings: Settings, dataset: str, progress: bool) -> list[dict[str, Any]]:
    from tqdm import tqdm

    split = split_images(images_for(settings, dataset), settings.seed)
    methods = list_methods(settings)
    with tqdm(
        total=count_turns(settings, len(methods)),
        desc=_TITLES[dataset],
        unit="network",
        disable=None if progress else True,
        leave=False,
    ) as bar:
        return train_methods(settings, methods, "relu", split, every=settings.every, advance=bar.update)


def _check_claims(title: str, records: Sequence[Mapping[str, Any]]) -> list[Claim]:
    original, deep, compressed, whole = records
    gain, error = _compare(deep, original)
    claims = [
        Claim(
            f"{title}: the deep product generalises better than the original",
            gain > 2 * error,
            _describe(deep, original),
        )
    ]
    gain, _ = _compare(compressed, original)
    claims.append(
        Claim(
            f"{title}: the compressed product is no worse than the original, within "
            f"{100 * _NO_WORSE:.1f} points, with fewer parameters and faster steps",
            gain >= -_NO_WORSE and _is_smaller(compressed, original, 1.0, 1.0),
            _describe(compressed, original),
        )
    )
    gain, _ = _compare(compressed, deep)
    claims.append(
        Claim(
            f"{title}: it is no worse than the deep product, within {100 * _NO_WORSE:.1f} points, and faster",
            gain >= -_NO_WORSE and _is_smaller(compressed, deep, 1.0, 1.0),
            _describe(compressed, deep),
        )
    )
    gain, _ = _compare(whole, original)
    claims.append(
        Claim(
            f"{title}: all hidden layers of low rank are within {100 * _CLOSE:.1f} points of the original, "
            f"with a tenth of its parameters and steps {_FASTER:g} times as fast",
            gain >= -_CLOSE and _is_smaller(whole, original, 0.1, 1 / _FASTER),
            _describe(whole, original),
        )
    )
    return claims


def _compare(record: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """Return the difference of the mean accuracies at the end, and its standard error over the seeds."""
    gain = record["mean"][-1] - other["mean"][-1]
    n = len(record["runs"])
    variance = record["deviation"][-1] ** 2 + other["deviation"][-1] ** 2
    return float(gain), float(np.sqrt(variance / n)) if n > 1 else float("inf")


def _is_smaller(
    record: Mapping[str, Any], other: Mapping[str, Any], parameters: float, step_time: float
) -> bool:
    """Return whether parameters and time of a step are at most these shares of another network's."""
    fewer = record["n_parameters"] <= parameters * other["n_parameters"]
    return bool(fewer and record["milliseconds_per_step"] <= step_time * other["milliseconds_per_step"])


def _describe(record: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    gain, error = _compare(record, other)
    spread = f" +- {100 * error:.2f}" if np.isfinite(error) else ""
    speed = other["milliseconds_per_step"] / record["milliseconds_per_step"]
    share = record["n_parameters"] / other["n_parameters"]
    return f"{100 * gain:+.2f}{spread} points, {share:.2g} of the parameters, steps {speed:.2g} times as fast"


def _table(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    lines = []
    for dataset, found in records.items():
        for record in found:
            lines.append(
                f"{_TITLES[dataset]:<13} {record['label']:<30} {100 * record['mean'][-1]:.2f} +- "
                f"{100 * record['deviation'][-1]:.2f} % at rate {record['learning_rate']:g}, "
                f"{record['n_parameters']:,} parameters, {record['milliseconds_per_step']:.2f} ms a step, "
                f"{record['seconds'][-1]:.1f} s"
            )
    published = [f"{label} {value:g} in {seconds:g} s" for label, (value, seconds) in PUBLISHED.items()]
    return [*lines, f"published, Fashion-MNIST, on their machine: {', '.join(published)}"]


def draw(settings: Settings, result: Result) -> Figure:
    """Draw a panel per data set: mean test accuracy over the time of training, with bands."""
    del settings  # results of an earlier call have others
    from matplotlib.figure import Figure

    records = result.displays["records"]
    figure = Figure(figsize=(7.6 * len(records), 7.4), layout="constrained")
    axes = figure.subplots(1, len(records), squeeze=False)[0]
    for ax, (dataset, found) in zip(axes, records.items(), strict=True):
        _draw_panel(ax, found)
        ax.set_title(f"{_TITLES[dataset]}, {found[0]['n_images']:,} images", fontsize=12)
    some = next(iter(records.values()))[0]
    set_title(figure, f"Efficient training of an MLP of width {some['width']}")
    return figure


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    del settings
    some = next(iter(result.numbers["networks"].values()))[0]
    return f"{some['epochs'][-1]} epochs; mean and standard deviation of {len(some['runs'])} seeds"


def _draw_panel(ax: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    for colour, record in zip(COLOURS, records, strict=False):
        mean, deviation = (100 * np.array(record[name]) for name in ("mean", "deviation"))
        rank = f" (r = {record['rank']})" if record["rank"] else ""
        label = (
            f"{record['label']}{rank}\n{mean[-1]:.2f} $\\pm$ {deviation[-1]:.2f} %, "
            f"{record['n_parameters']:,} parameters, {record['milliseconds_per_step']:.2g} ms a step"
        )
        ax.plot(record["seconds"], mean, "o-", color=colour, markersize=4, linewidth=1.6, label=label)
        ax.fill_between(
            record["seconds"], mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0
        )
    ax.set_xlim(left=0)
    ax.set_xlabel("seconds of training, with the start of the factors, without tests")
    ax.set_ylabel("test accuracy [%]")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1)
