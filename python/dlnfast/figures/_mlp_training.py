# SPDX-License-Identifier: MIT
"""Training of MLPs with plain layers or products: data, rates chosen on held-out images, and times."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from .._support.errors import DivergedError

if TYPE_CHECKING:
    import torch

    from ..torch import MLP, ImageData, Samples

#: Layers of an `MLP` with two hidden layers; the head stays as it is.
HIDDEN: Final = ("layers.0.linear", "layers.1.linear")
#: Images whose gradient gives the frames of the low-rank starts.
_GRADIENT_IMAGES: Final = 2000
#: Share of the training images on which learning rates are compared.
_VALIDATION_SHARE: Final = 0.2


class TrainingSettings(Protocol):
    """The common settings of figures that train MLPs."""

    @property
    def width(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def learning_rates(self) -> tuple[float, ...]: ...
    @property
    def rate_runs(self) -> int: ...
    @property
    def runs(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def device(self) -> str: ...


@dataclass(frozen=True)
class Method:
    """What the trained layers of an MLP are.

    Attributes
    ----------
    label : str
        Name in tables and legends.
    layers : tuple of str
        Layers that are products; the others are plain.
    init : str
        Start of the products: one of `factorize`, or "balanced" and "orthogonal" for products of full width
        by `overparameterize`. Empty for plain layers.
    rank : int
        Rank of products by `factorize`.
    depth : int
        Factors of a product.
    """

    label: str
    layers: tuple[str, ...] = ()
    init: str = ""
    rank: int = 0
    depth: int = 3


@dataclass(frozen=True)
class Split:
    """Training images in random order, their two parts for the choice of rates, and the test images."""

    train: Samples
    part: Samples
    validation: Samples
    test: Samples
    n_classes: int


def split_images(data: ImageData, seed: int) -> Split:
    """Shuffle the training images, which are sorted by class, and hold out a share for the rates."""
    from ..torch import Samples

    order = np.random.default_rng(seed).permutation(len(data.train.labels))
    train = Samples(data.train.inputs[order], data.train.labels[order])
    n_held = max(round(_VALIDATION_SHARE * len(order)), 1)
    held, part = (Samples(*(tensor[s] for tensor in train)) for s in (slice(n_held), slice(n_held, None)))
    return Split(train, part, held, data.test, data.n_classes)


def make_network(
    settings: TrainingSettings, n_inputs: int, n_classes: int, activation: str, seed: int
) -> MLP:
    """Return an MLP with two hidden layers from PyTorch's initialisation, with biases."""
    from ..torch import MLP

    widths = [n_inputs, settings.width, settings.width, n_classes]
    return MLP(widths, activation=activation, batch_norm=False, bias=True, seed=seed, device=settings.device)


def cross_entropy(model: torch.nn.Module, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the loss of a batch of inputs and labels."""
    from torch.nn import functional

    inputs, labels = batch
    device = next(model.parameters()).device
    return functional.cross_entropy(model(inputs.to(device)), labels.to(device))


def train_once(
    settings: TrainingSettings,
    method: Method,
    activation: str,
    train: Samples,
    test: Samples,
    *,
    n_classes: int,
    rate: float,
    seed: int,
    every: int = 0,
) -> dict[str, Any]:
    """Train one network; test it after every `every` epochs (0: at the end), which its times leave out.

    A training that diverges has the accuracy 0 from then on.
    """
    from ..torch import ScheduleOptions, Trainer, factorize, overparameterize

    model = make_network(settings, train.inputs[0].numel(), n_classes, activation, seed)
    start = time.perf_counter()
    groups: list[dict[str, Any]] = []
    if method.init in ("balanced", "orthogonal"):
        overparameterize(model, method.depth, layers=method.layers, initial=method.init, seed=seed)
    elif method.init:
        options: dict[str, Any] = {}
        if method.init != "random":
            some = slice(_GRADIENT_IMAGES)
            options = {"batches": (train.inputs[some], train.labels[some]), "loss": cross_entropy}
        factors = factorize(
            model,
            method.layers,
            rank=method.rank,
            depth=method.depth,
            init=method.init,
            seed=seed,
            **options,
        )
        groups = factors.param_groups(rate)
    setup = time.perf_counter() - start
    trainer = Trainer(
        model,
        optimizer=lambda parameters: _make_adam(groups or [{"params": list(parameters), "lr": rate}]),
        schedule=ScheduleOptions(final_rate=0.0),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=seed,
    )
    interval = every or settings.epochs
    seconds: list[float] = []
    tested: dict[int, float] = {}
    started = time.perf_counter()

    def after_epoch(done: int) -> None:
        nonlocal started
        seconds.append(time.perf_counter() - started)
        if done % interval == 0 or done == settings.epochs:
            tested[done] = trainer.evaluate(*test).accuracy
        started = time.perf_counter()

    try:
        trainer.fit(*train, after_epoch=after_epoch)
    except DivergedError:
        epochs = range(1, settings.epochs + 1)
        tested |= {done: 0.0 for done in epochs if done not in tested and done % interval == 0}
        tested.setdefault(settings.epochs, 0.0)
        seconds += [0.0] * (settings.epochs - len(seconds))
    return {
        "seed": seed,
        "n_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "setup_seconds": setup,
        "epoch_seconds": seconds,
        "n_steps_per_epoch": -(-len(train.labels) // settings.batch_size),
        "epochs": list(tested),
        "test_accuracy": list(tested.values()),
    }


def _make_adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return Adam in its fastest form: fused, where this version of PyTorch has it for the device."""
    import torch

    try:
        return torch.optim.Adam(groups, fused=True)
    except RuntimeError:
        return torch.optim.Adam(groups)


def choose_rate(
    settings: TrainingSettings, method: Method, activation: str, split: Split
) -> tuple[float, dict[str, float]]:
    """Return the rate of the grid with the highest accuracy on held-out training images, and the accuracies.

    The other training images are trained on; accuracies are means over `rate_runs` seeds.
    """
    found: dict[float, float] = {}
    for rate in settings.learning_rates:
        runs = [
            train_once(
                settings,
                method,
                activation,
                split.part,
                split.validation,
                n_classes=split.n_classes,
                rate=rate,
                seed=seed,
            )
            for seed in range(settings.seed, settings.seed + settings.rate_runs)
        ]
        found[rate] = statistics.fmean(run["test_accuracy"][-1] for run in runs)
    best = max(found, key=lambda rate: found[rate])
    return best, {f"{rate:g}": accuracy for rate, accuracy in found.items()}


def train_methods(
    settings: TrainingSettings,
    methods: Sequence[Method],
    activation: str,
    split: Split,
    *,
    every: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Choose the rate of every method, then train all of them seed by seed, and summarise the runs.

    Methods take turns, so that a machine that becomes slower does so for all of them.
    """
    rates = []
    for method in methods:
        rates.append(choose_rate(settings, method, activation, split))
        advance()
    runs: list[list[dict[str, Any]]] = [[] for _ in methods]
    for seed in range(settings.seed, settings.seed + settings.runs):
        for own, method, (rate, _) in zip(runs, methods, rates, strict=True):
            own.append(
                train_once(
                    settings,
                    method,
                    activation,
                    split.train,
                    split.test,
                    n_classes=split.n_classes,
                    rate=rate,
                    seed=seed,
                    every=every,
                )
            )
            advance()
    return [
        {
            "label": method.label,
            "layers": list(method.layers),
            "init": method.init,
            "rank": method.rank,
            "n_images": len(split.train.labels),
            "width": settings.width,
            "learning_rate": rate,
            "validation_accuracy": tried,
            **summarise(own),
        }
        for own, method, (rate, tried) in zip(runs, methods, rates, strict=True)
    ]


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return means and standard deviations of the accuracies over the seeds, and medians of the times.

    Times are medians over the seeds, epoch by epoch, because other programs disturb single runs; the time at
    an epoch is the sum up to it, with the time for the start of the factors.
    """
    accuracies = np.array([run["test_accuracy"] for run in runs])
    setup = statistics.median(run["setup_seconds"] for run in runs)
    epoch_seconds = np.median([run["epoch_seconds"] for run in runs], axis=0)
    at_epochs = setup + np.cumsum(epoch_seconds)[np.array(runs[0]["epochs"]) - 1]
    return {
        "n_parameters": runs[0]["n_parameters"],
        "epochs": runs[0]["epochs"],
        "mean": accuracies.mean(axis=0).tolist(),
        "deviation": accuracies.std(axis=0, ddof=min(len(runs) - 1, 1)).tolist(),
        "setup_seconds": setup,
        "seconds": at_epochs.tolist(),
        "milliseconds_per_step": float(1e3 * np.median(epoch_seconds) / runs[0]["n_steps_per_epoch"]),
        "runs": list(runs),
    }


def count_turns(settings: TrainingSettings, n_methods: int) -> int:
    """Return the number of calls of `advance` in `train_methods`."""
    return n_methods * (1 + settings.runs)


def read_records(path: str, name: str) -> Any:
    """Return an entry of the numbers that an earlier call of the figure wrote.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or it lacks the entry.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    numbers = content.get("numbers") if isinstance(content, dict) else None
    if not isinstance(numbers, dict) or name not in numbers:
        raise ValueError(f"results: {path} has no {name!r}; wanted the JSON file of this figure")
    return numbers[name]
