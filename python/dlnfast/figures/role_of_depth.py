# SPDX-License-Identifier: MIT
"""The role of depth: linear or nonlinear layers added to a small network, on two image data sets.

Wang, Li, Yaras, Zhu, Balzano, Hu, Qu, "Understanding Deep Representation Learning via Layerwise Feature
Compression and Discrimination" (JMLR 26(220), arXiv 2311.02960): networks of 5, 7 and 9 layers from PyTorch's
initialisation compress features layer by layer, and deeper ones generalise better. How many of the published
layers are nonlinear, the loss, the rate and the number of images are not stated. Here both kinds of depth
start from the same network. Needs PyTorch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from .._support.arrays import check_count
from ..plots import COLOURS, LineDisplay
from . import Result, setting
from ._captions import set_title
from ._claims import Claim, as_numbers, compare_pairs
from ._hybrid_training import train_hybrid
from ._images import read_images
from ._stored import StoredRuns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..torch import ImageData

#: Data set -> L -> C of layers 1 to L - 1, read off the published plot.
PUBLISHED: Final[Mapping[str, Mapping[int, Sequence[float]]]] = {
    "fashion-mnist": {
        5: (2.5, 1.1, 0.92, 0.44),
        7: (2.4, 1.05, 0.80, 0.24, 0.083, 0.039),
        9: (2.4, 1.05, 0.78, 0.21, 0.062, 0.030, 0.022, 0.020),
    },
    "cifar10": {
        5: (15.0, 8.5, 5.1, 2.8),
        7: (17.0, 9.0, 4.6, 1.75, 1.0, 0.80),
        9: (18.0, 9.3, 4.0, 1.25, 0.61, 0.41, 0.34, 0.31),
    },
}
_TITLES: Final = {"fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
_LOSSES: Final = {"cross_entropy": "cross-entropy", "squared": "squared loss"}
#: Both ways to add layers.
_KINDS: Final = ("linear", "nonlinear")
#: Lines of the losses.
_STYLES: Final = {"cross_entropy": "-", "squared": "--"}
_NONLINEAR: Final = "all nonlinear"
#: Colours of curves that are neither the linear layers' nor the nonlinear layers'.
_OTHERS: Final = COLOURS[2:6]

QUICK: Final = {
    "depths": (5, 9),
    "others": (1,),
    "width": 64,
    "images": 1000,
    "validation": 500,
    "epochs": 10,
    "learning_rates": (0.03, 0.1),
    "runs": 2,
}
QUICK_TAKES: Final = "in some minutes"


@dataclass(frozen=True)
class Settings:
    """Bias-free networks from PyTorch's initialisation, SGD with momentum, cosine to eta / 100.

    A network of depth L has L weight matrices: first k nonlinear layers (linear map, batch norm, ReLU), then
    linear ones, the last of which is the head. Both kinds of depth start at ``L = added_to + 1``, without
    linear hidden layers. A seed draws training and validation images, weights and the order of the images,
    the same for all networks. A training keeps the weights of the epoch with the best validation accuracy;
    each network has its own rate, the best on the validation images of `rate_seed` at which no seed diverges.
    Results of the default settings come with the package; others are trained.
    """

    datasets: tuple[str, ...] = setting(
        ("fashion-mnist", "cifar10"), "data sets, one row each", choices=tuple(_TITLES)
    )
    losses: tuple[str, ...] = setting(("cross_entropy", "squared"), "loss functions", choices=tuple(_LOSSES))
    depths: tuple[int, ...] = setting((5, 7, 9), "L, the number of weight matrices")
    added_to: int = setting(2, "k, the nonlinear layers to which linear or nonlinear ones are added")
    others: tuple[int, ...] = setting((1, 3, 4), "k of further hybrids, for their C only")
    other_runs: int = setting(1, "seeds of these, at the rates of the hybrids of equal depth")
    width: int = setting(256, "width of the hidden layers")
    images: int = setting(10000, "training images, drawn by the seed")
    validation: int = setting(5000, "other training images, for the early stop and the choice of rates")
    epochs: int = setting(20, "passes over the images")
    batch_size: int = setting(128, "images of a step")
    learning_rates: tuple[float, ...] = setting((0.01, 0.03, 0.1), "eta, for every network to choose from")
    momentum: float = setting(0.9, "mu")
    weight_decay: float = setting(5e-4, "lambda")
    runs: int = setting(5, "seeds of the reported trainings")
    seed: int = setting(0, "first of these seeds")
    rate_seed: int = setting(1000, "seed on whose images learning rates are chosen")
    results: str = setting("", "file of results: those in it are reused, new ones are added")
    device: str = setting("cpu", "where PyTorch trains, cuda for a GPU")
    data: str = setting("", "folder of the data sets; default: the environment variable DLNFAST_DATA")


class _Network(NamedTuple):
    """A network of `depth` weight matrices, whose first hidden layers are nonlinear."""

    nonlinear: int
    depth: int


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Train the networks that the stored results lack, and compare depths and layers."""
    _check_settings(settings)
    stored = StoredRuns("role_of_depth", settings.results)
    with _Trainings(settings, stored, progress) as trainings:
        networks = _train_all(settings, trainings)
    return _summarise(settings, networks)


def _check_settings(settings: Settings) -> None:
    base = check_count(settings.added_to, "added_to", minimum=1)
    for i, depth in enumerate(settings.depths):
        check_count(depth, f"depths[{i}]", minimum=base + 2)
    for i, nonlinear in enumerate(settings.others):
        check_count(nonlinear, f"others[{i}]", minimum=1)
    for name in ("images", "validation", "epochs"):
        check_count(getattr(settings, name), name)
    # The comparison of pairs needs two seeds.
    check_count(settings.runs, "runs", minimum=2)
    check_count(settings.other_runs, "other_runs", maximum=settings.runs)
    own = range(settings.seed, settings.seed + settings.runs)
    if settings.rate_seed in own:
        raise ValueError(
            f"rate_seed is {settings.rate_seed}, a seed of the reported trainings ({own[0]} to {own[-1]}); "
            "wanted another one"
        )


def _compared_networks(settings: Settings) -> list[_Network]:
    """Return the common start, then the hybrids and the nonlinear networks of all depths."""
    start = _Network(settings.added_to, settings.added_to + 1)
    hybrids = [_Network(settings.added_to, depth) for depth in settings.depths]
    return list(dict.fromkeys([start, *hybrids, *(_Network(depth - 1, depth) for depth in settings.depths)]))


def _other_networks(settings: Settings) -> list[_Network]:
    """Return the further hybrids, of which C alone is compared."""
    known = _compared_networks(settings)
    found = [_Network(k, depth) for depth in settings.depths for k in settings.others if k < depth]
    return [network for network in dict.fromkeys(found) if network not in known]


def _train_all(settings: Settings, trainings: _Trainings) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Train the networks of every data set and loss, and return their records."""
    return {
        dataset: {loss: _train_pair(settings, trainings, dataset, loss) for loss in settings.losses}
        for dataset in settings.datasets
    }


def _train_pair(settings: Settings, trainings: _Trainings, dataset: str, loss: str) -> list[dict[str, Any]]:
    """Choose the rates of all compared networks, and train these, then the further hybrids."""
    tried: dict[_Network, dict[float, float]] = {}
    records = []
    for network in _compared_networks(settings):
        tried[network] = {
            rate: trainings.validate(dataset, loss, network, rate) for rate in settings.learning_rates
        }
    for network in [*tried, *_other_networks(settings)]:
        accuracies = tried.get(network) or tried[_Network(settings.added_to, network.depth)]
        n_runs = settings.runs if network in tried else settings.other_runs
        rate, runs = _report_seeds(settings, trainings, (dataset, loss, network), accuracies, n_runs)
        chosen = {f"{key:g}": value for key, value in accuracies.items()} if network in tried else None
        records.append(
            {
                "nonlinear": network.nonlinear,
                "depth": network.depth,
                "learning_rate": rate,
                "validation_accuracy": chosen,
                "runs": runs,
            }
        )
    return records


def _report_seeds(
    settings: Settings,
    trainings: _Trainings,
    key: tuple[str, str, _Network],
    accuracies: Mapping[float, float],
    n_runs: int,
) -> tuple[float, list[dict[str, Any]]]:
    """Train a network with all seeds at its best rate; where one of them diverges, at its next best."""
    for rate in sorted(accuracies, key=lambda rate: -accuracies[rate]):
        runs = []
        for seed in range(settings.seed, settings.seed + n_runs):
            outcome = trainings.report(*key, rate, seed)
            if outcome is None:
                break
            runs.append(outcome)
        if len(runs) == n_runs:
            return rate, runs
    dataset, loss, network = key
    raise ValueError(
        f"learning_rates: trainings of L = {network.depth} with {network.nonlinear} nonlinear layers diverge "
        f"at all of {', '.join(f'{rate:g}' for rate in accuracies)} ({_TITLES[dataset]}, {_LOSSES[loss]}); "
        "wanted smaller ones"
    )


class _Trainings:
    """The trainings of the figure: each is looked up in the stored results, and trained where it is missing.

    Data sets are read at the first training that needs them.
    """

    def __init__(self, settings: Settings, stored: StoredRuns, progress: bool) -> None:
        from tqdm import tqdm

        pairs = len(settings.datasets) * len(settings.losses)
        compared = len(_compared_networks(settings)) * (len(settings.learning_rates) + settings.runs)
        total = pairs * (compared + len(_other_networks(settings)) * settings.other_runs)
        self._settings, self._stored = settings, stored
        self._data: dict[str, ImageData] = {}
        self._bar = tqdm(
            total=total, unit="network", delay=1.0, disable=None if progress else True, leave=False
        )

    def __enter__(self) -> _Trainings:
        return self

    def __exit__(self, *unused: object) -> None:
        self._bar.close()

    def validate(self, dataset: str, loss: str, network: _Network, rate: float) -> float:
        """Return the best validation accuracy of a training on `rate_seed`; 0 if it diverges."""
        outcome = self._find(dataset, loss, network, rate, self._settings.rate_seed, "rate")
        return float(outcome["validation_accuracy"])

    def report(
        self, dataset: str, loss: str, network: _Network, rate: float, seed: int
    ) -> dict[str, Any] | None:
        """Return the test accuracy and the measures of a training; None if it diverges."""
        outcome = self._find(dataset, loss, network, rate, seed, "report")
        return {"seed": seed, **outcome} if "test_accuracy" in outcome else None

    def _find(
        self, dataset: str, loss: str, network: _Network, rate: float, seed: int, purpose: str
    ) -> dict[str, Any]:
        settings = self._settings
        run = {
            "purpose": purpose,
            "dataset": dataset,
            "loss": loss,
            "nonlinear": network.nonlinear,
            "depth": network.depth,
            "learning_rate": rate,
            "seed": seed,
        }
        shared = ("width", "images", "validation", "epochs", "batch_size", "momentum", "weight_decay")
        run |= {name: getattr(settings, name) for name in shared}

        def train() -> dict[str, Any]:
            if dataset not in self._data:
                self._data[dataset] = read_images(settings, dataset)
            return train_hybrid(run, self._data[dataset])

        outcome = self._stored.get(run, train)
        self._bar.update()
        return outcome


def _summarise(settings: Settings, networks: dict[str, dict[str, list[dict[str, Any]]]]) -> Result:
    """Add means, intervals and distances to the records, and return the panels and the claims."""
    claims: list[Claim] = []
    panels: dict[str, _Panels] = {}
    for dataset, by_loss in networks.items():
        for loss, records in by_loss.items():
            for record in records:
                _add_means(record, PUBLISHED[dataset].get(record["depth"]))
            claims += _compare_depths(settings, f"{_TITLES[dataset]}, {_LOSSES[loss]}", records)
        panels[dataset] = _make_panels(settings, by_loss)
    numbers = {
        "networks": networks,
        "published": PUBLISHED,
        "claims": as_numbers(claims),
        "panels": {dataset: _numbers(displays) for dataset, displays in panels.items()},
    }
    lines = [line for found in networks.items() for line in _table(*found)]
    return Result(panels, numbers, [*lines, *map(str, claims)])


def _add_means(record: dict[str, Any], published: Sequence[float] | None) -> None:
    """Add the test accuracy, C and the log distance to the published curve, each over the seeds."""
    runs = record["runs"]
    ddof = min(len(runs) - 1, 1)
    accuracy = np.array([run["test_accuracy"] for run in runs])
    logs = np.log10([run["last_compression"] for run in runs])
    record["test_accuracy"] = {"mean": accuracy.mean(), "deviation": accuracy.std(ddof=ddof)}
    record["compression"] = 10 ** logs.mean(axis=0)
    record["distances"] = None
    if published is not None:
        record["distances"] = np.abs(logs - np.log10(published)).mean(axis=1)


def _compare_depths(settings: Settings, name: str, records: list[dict[str, Any]]) -> list[Claim]:
    """Add the paired differences to the common start to the records, and return the claims."""
    start, deepest = _find_record(records, _compared_networks(settings)[0]), max(settings.depths)
    accuracy = _of_runs(start, lambda run: run["test_accuracy"])
    last = _of_runs(start, lambda run: np.log10(run["last_compression"][-1]))
    claims = []
    for kind in _KINDS:
        for depth in settings.depths:
            record = _find_record(records, _network_of(settings, kind, depth))
            claim = compare_pairs(
                f"{name}: {kind} layers from L = {start['depth']} to {depth} improve generalisation",
                _of_runs(record, lambda run: run["test_accuracy"]) - accuracy,
                unit=100.0,
            )
            record["gain"] = claim.interval
            if depth == deepest:
                claims.append(claim)
                claims.append(
                    compare_pairs(
                        f"{name}: {kind} layers from L = {start['depth']} to {depth} improve the "
                        "compression of the last layer, in decades",
                        last - _of_runs(record, lambda run: np.log10(run["last_compression"][-1])),
                    )
                )
    hybrid = _find_record(records, _network_of(settings, "linear", deepest))
    falls = _of_runs(
        hybrid, lambda run: -np.diff(np.log10(run["last_compression"][settings.added_to - 1 :])).max()
    )
    text = f"{name}: each linear layer compresses at L = {deepest}; decades of the weakest one"
    claims.append(compare_pairs(text, falls, digits=3))
    compared = [
        [_find_record(records, _network_of(settings, kind, depth))["distances"] for kind in _KINDS]
        for depth in settings.depths
    ]
    gaps = [nonlinear - linear for linear, nonlinear in compared if linear is not None]
    if gaps:
        text = f"{name}: C of hybrids is nearer to the published curves than C of nonlinear networks, "
        claims.append(compare_pairs(f"{text}in decades a layer", np.mean(gaps, axis=0)))
    return claims


def _of_runs(record: Mapping[str, Any], value: Callable[[Mapping[str, Any]], Any]) -> Any:
    return np.array([value(run) for run in record["runs"]])


def _network_of(settings: Settings, kind: str, depth: int) -> _Network:
    return _Network(settings.added_to if kind == "linear" else depth - 1, depth)


def _find_record(records: list[dict[str, Any]], network: _Network) -> dict[str, Any]:
    return next(r for r in records if (r["nonlinear"], r["depth"]) == network)


#: Panels of a data set: name -> loss or L -> label -> display.
_Panels = dict[str, dict[str, LineDisplay]]


def _make_panels(settings: Settings, by_loss: Mapping[str, list[dict[str, Any]]]) -> _Panels:
    panels: _Panels = {}
    for depth in settings.depths:
        layers = list(range(1, depth))
        panels[f"C, L = {depth}"] = {
            loss: LineDisplay(
                layers,
                {_label(r): r["compression"] for r in _of_depth(records, depth)},
                x_label="layer $l$",
                y_label="$C_l$",
                log_y=True,
            )
            for loss, records in by_loss.items()
        }
    panels["distance"] = {
        f"{loss}, L = {depth}": LineDisplay(
            [r["nonlinear"] for r in found],
            {f"L = {depth}": [np.mean(r["distances"]) for r in found]},
            x_label="nonlinear hidden layers $k$",
            y_label="mean of $|\\log_{10} C_l / C_l^{published}|$",
        )
        for loss, records in by_loss.items()
        for depth in settings.depths
        if (found := [r for r in _of_depth(records, depth) if r["distances"] is not None])
    }
    depths = [settings.added_to + 1, *settings.depths]
    start = _compared_networks(settings)[0]
    for name, y_label in (("accuracy", "test accuracy, %"), ("gain", "difference, percentage points")):
        panels[name] = {}
        for loss, records in by_loss.items():
            curves, spread = {}, {}
            for kind in _KINDS:
                own = [_network_of(settings, kind, depth) for depth in settings.depths]
                rows = [_find_record(records, network) for network in [start, *own]]
                values = [_accuracy(r) if name == "accuracy" else _gain(r) for r in rows]
                curves[f"{kind} layers"], spread[f"{kind} layers"] = np.array(values).T
            panels[name][loss] = LineDisplay(
                depths, curves, spread=spread, x_label="depth $L$", y_label=y_label
            )
    return panels


def _of_depth(records: list[dict[str, Any]], depth: int) -> list[dict[str, Any]]:
    return sorted((r for r in records if r["depth"] == depth), key=lambda r: int(r["nonlinear"]))


def _label(record: Mapping[str, Any]) -> str:
    return _NONLINEAR if record["nonlinear"] == record["depth"] - 1 else f"k = {record['nonlinear']}"


def _accuracy(record: Mapping[str, Any]) -> tuple[float, float]:
    accuracy = record["test_accuracy"]
    return 100 * accuracy["mean"], 100 * accuracy["deviation"]


def _gain(record: Mapping[str, Any]) -> tuple[float, float]:
    low, high = record.get("gain", (0.0, 0.0))
    return 50 * (low + high), 50 * (high - low)


def _numbers(panels: _Panels) -> dict[str, Any]:
    return {
        name: {label: display.numbers() for label, display in displays.items()}
        for name, displays in panels.items()
    }


def _table(dataset: str, by_loss: Mapping[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Yield a line for every network, then the curves beside the published ones."""
    for loss, records in by_loss.items():
        for r in sorted(records, key=lambda r: (r["depth"], r["nonlinear"])):
            mean, deviation = _accuracy(r)
            line = f"{_TITLES[dataset]}, {_LOSSES[loss]}, L = {r['depth']}, {r['nonlinear']} nonlinear: test "
            line += f"{mean:.2f} {f'+- {deviation:.2f} ' if len(r['runs']) > 1 else ''}%, "
            line += f"eta {r['learning_rate']:g}, C "
            line += " ".join(f"{value:.3g}" for value in r["compression"])
            if r["distances"] is not None:
                line += f", {np.mean(r['distances']):.2f} decades a layer from the published"
            yield line
    for depth, values in PUBLISHED[dataset].items():
        yield f"{_TITLES[dataset]}, published, L = {depth}: C {' '.join(f'{value:.3g}' for value in values)}"


def draw(settings: Settings, result: Result) -> Figure:
    """Draw two rows for each data set: C for each L, then distances, accuracies and differences."""
    from matplotlib.figure import Figure

    n = max(len(settings.depths), 3)
    figure = Figure(figsize=(4.7 * n, 7.6 * len(result.displays)), layout="constrained")
    rows = figure.subplots(2 * len(result.displays), n, squeeze=False)
    for number, (dataset, panels) in enumerate(result.displays.items()):
        upper, lower = rows[2 * number], rows[2 * number + 1]
        for ax in [*upper[len(settings.depths) :], *lower[3:]]:
            ax.axis("off")
        for ax, depth in zip(upper, settings.depths, strict=False):
            _draw_compression(ax, settings, panels[f"C, L = {depth}"], PUBLISHED[dataset].get(depth))
            ax.set_title(f"{_TITLES[dataset]}, L = {depth}", fontsize=11)
        _draw_distances(lower[0], settings, panels["distance"])
        for ax, name, title in (
            (lower[1], "accuracy", "test accuracy, standard deviation"),
            (lower[2], "gain", "paired differences, 95 % intervals"),
        ):
            _draw_depths(ax, panels[name])
            ax.set_title(f"{_TITLES[dataset]}: {title}", fontsize=11)
        lower[0].set_title(f"{_TITLES[dataset]}: distance to the published $C_l$", fontsize=11)
        lower[2].axhline(0.0, color="#333333", linewidth=0.8)
    set_title(figure, "The role of depth: linear or nonlinear layers added to a small network")
    return figure


def _draw_compression(
    ax: Axes, settings: Settings, displays: Mapping[str, LineDisplay], published: Sequence[float] | None
) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    labels = list(next(iter(displays.values())).curves)
    own = {f"k = {settings.added_to}": COLOURS[0], _NONLINEAR: COLOURS[1]}
    others = itertools.cycle(_OTHERS)
    colours = [own[label] if label in own else next(others) for label in labels]
    for loss, display in displays.items():
        display.plot(ax, colors=colours, legend=False, linestyle=_STYLES[loss], marker="o", markersize=3.5)
    handles = [_handle(label, colour) for label, colour in zip(labels, colours, strict=True)]
    if published is not None:
        layers = range(1, len(published) + 1)
        handles += ax.plot(
            layers, published, color="black", marker="s", linewidth=2.2, label="published", zorder=4
        )
    ax.set_xticks(next(iter(displays.values())).x)
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    handles += _loss_handles(displays)
    ax.legend(handles=handles, frameon=False, fontsize=9, loc="lower left")


def _draw_distances(ax: Axes, settings: Settings, displays: Mapping[str, LineDisplay]) -> None:
    for number, depth in enumerate(settings.depths):
        for loss in settings.losses:
            display = displays.get(f"{loss}, L = {depth}")
            if display is not None:
                colour = _OTHERS[number % len(_OTHERS)]
                display.plot(ax, colors=(colour,), legend=False, linestyle=_STYLES[loss], marker="o")
    ax.set_ylim(bottom=0.0)
    labels = [_handle(f"L = {depth}", _OTHERS[i % len(_OTHERS)]) for i, depth in enumerate(settings.depths)]
    _add_legend(ax, [*labels, *_loss_handles(settings.losses)])


def _draw_depths(ax: Axes, displays: Mapping[str, LineDisplay]) -> None:
    """Draw the curves of both losses side by side, so that error bars do not cover each other."""
    shifts = np.linspace(-0.12, 0.12, max(len(displays), 2))
    labels: dict[str, str] = {}
    for shift, (loss, display) in zip(shifts, displays.items(), strict=False):
        for i, (label, values) in enumerate(display.curves.items()):
            labels[label] = COLOURS[i]
            ax.errorbar(
                display.x + shift + 0.06 * (i - 0.5),
                values,
                display.spread[label],
                color=COLOURS[i],
                linestyle=_STYLES[loss],
                marker="o",
                markersize=4,
                linewidth=1.4,
                capsize=3,
            )
        ax.set_xticks(display.x)
        ax.set_xlabel(display.x_label)
        ax.set_ylabel(display.y_label)
    handles = [_handle(label, colour) for label, colour in labels.items()]
    _add_legend(ax, [*handles, *_loss_handles(displays)])


def _add_legend(ax: Axes, handles: Sequence[Any]) -> None:
    """Add a legend of two columns above the curves."""
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.07 * (1 + len(handles) // 2) * (high - low))
    ax.legend(handles=handles, frameon=False, fontsize=9, loc="upper center", ncols=2)


def _loss_handles(losses: Iterable[str]) -> list[Any]:
    return [_handle(_LOSSES[loss], "#555555", _STYLES[loss]) for loss in losses]


def _handle(label: str, colour: str, style: Any = "-") -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=style, label=label)


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    del result
    return (
        f"{settings.images:,} training images, width {settings.width}, {settings.epochs} epochs, "
        f"{settings.runs} seeds; C after the last epoch, test accuracy at the epoch with the best validation "
        f"accuracy; solid: cross-entropy, dashed: squared loss; k of {', '.join(map(str, settings.others))}: "
        f"{settings.other_runs} seed(s); published values are read off a plot"
    )
