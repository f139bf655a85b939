# SPDX-License-Identifier: MIT
"""The figures, one module each: settings -> numbers -> picture.

A module has a frozen dataclass `Settings`, whose fields are made by `setting` and whose defaults are the
published values, and the functions `compute` and `draw` of `FigureModule`. `draw` writes the title with
`_captions.set_title`. The module calls the package and has no mathematics of its own. ``numbers["claims"]``
of its result holds the claims of the source, as `_claims.as_numbers` returns them. Optional names:

* `details(settings, result)` returns the sentences of the caption that the title leaves out.
* `QUICK`, where the defaults take long, is a dictionary of smaller settings for ``--quick``, and
  `QUICK_TAKES` states their time where it is more than a minute.
* `TIMED` is True where the figure takes times: the command line then restarts without the variables of
  `benchmarks.record.CAPS`, which slow NumPy down.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from .._support.arrays import check_choice, check_count, check_scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .._problem.observations import Observations
    from .._support.errors import DivergedError
    from .._trajectory.trajectory import Trajectory

__all__ = [
    "FIGURES",
    "Clock",
    "FigureModule",
    "Option",
    "Result",
    "alike_rate",
    "describe",
    "errors_at_records",
    "is_timed",
    "load",
    "make_settings",
    "options",
    "quick_settings",
    "quick_takes",
    "run_until",
    "setting",
]

#: Name on the command line -> one-line summary. The module has the same name, with underscores.
FIGURES: Final = {
    "svd-evolution": "singular values and vectors of one layer while it learns a low-rank matrix",
    "progressive-collapse": "features collapse by the same factor in every linear layer of a classifier",
    "feature-compression-theory": "compression, discrimination and balance of a trained linear classifier",
    "power-method": "first steps of training beside a power iteration on the target",
    "init-scale": "plateau and escape over the initial scale, with the bounds of the theory",
    "depth-width": "iterations to a fixed loss over width, for two to five layers",
    "edge-of-stability": "modes, loss and sharpness at learning rates around and beyond the threshold",
    "optimizers": "update rules that keep the invariant subspaces, and Adam, which does not",
    "factorisation-compressed": "a deep factorisation and its exact compression: loss, time and path",
    "completion-compressed": "matrix completion by narrow networks: recovery, time, rank, width and depth",
    "burer-monteiro": "two and three layers on a matrix known in few entries: recovery over width",
    "sensing-compressed": "matrix sensing by narrow networks: relative error against iterations and time",
    "mlp-vs-hybrid": "features of an MLP and of a network with linear deep layers, on CIFAR-10",
    "role-of-depth": "probes, compression and test accuracy of networks with more and more layers",
    "projection-heads": "collapse and transfer of features pretrained with heads of one to five layers",
    "penultimate-spectra": "the change of the penultimate weight in the training of four kinds of networks",
    "efficient-training": "accuracy over training time of an MLP with plain, deep and compressed layers",
    "compression": "accuracy over parameters of networks compressed to low rank, or pruned",
    "low-rank-mlp": "MLPs of low rank from three starts, and the subspace of the updates of the full one",
    "bert-subspaces": "updates of full width of a pretrained BERT: spectra, subspaces on the way, loss",
    "deep-lora-fewshot": "LoRA beside Deep LoRA: few examples, too large a rank, rank of the update",
    "deep-lora-teacher": "LoRA beside Deep LoRA on a known update, over the rank, at one rate",
    "scaling": "time per step and memory against all sizes, beside NumPy, PyTorch and JAX",
}


@dataclass(frozen=True)
class Result:
    """The result of a figure's computation.

    Attributes
    ----------
    displays : dict
        Displays of the panels for `draw`, by name.
    numbers : dict
        All drawn values and further results, as plain Python values.
    highlights : list of str
        The few numbers worth printing, one line each.
    """

    displays: Mapping[str, Any]
    numbers: Mapping[str, Any]
    highlights: list[str]


class FigureModule(Protocol):
    """The interface of every module in this folder."""

    Settings: type[Any]

    def compute(self, settings: Any, *, progress: bool = False) -> Result:
        """Compute the results that the figure shows."""
        ...

    def draw(self, settings: Any, result: Result) -> Figure:
        """Return the picture, with its title."""
        ...


class Clock:
    """Times of the records of a run: its `callback`, made before the weights are drawn.

    Attributes
    ----------
    seconds : dict of int to float
        Step of a record -> seconds since the clock was made.
    """

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self._start = time.perf_counter()

    def __call__(self, step: int, loss: float) -> None:
        """Note the time of a record."""
        del loss
        self.seconds[step] = time.perf_counter() - self._start


def errors_at_records(
    problem: Observations, clock: Clock, run: Trajectory, normalization: str
) -> tuple[list[int], list[float], list[float]]:
    """Return steps, seconds and recovery errors at the records of a run with snapshots of its weights."""
    steps = [int(step) for step in run.steps if int(step) in clock.seconds]
    if run.outcome == "diverged":
        steps = [step for step in steps if step % run.config["record_every"] == 0]
    errors = [problem.recovery_error(run.all_weights(step), normalization) for step in steps]
    return steps, [clock.seconds[step] for step in steps], errors


def run_until(error: DivergedError) -> Trajectory:
    """Return the run up to its divergence, or raise the error where nothing was recorded."""
    if error.trajectory is None:
        raise error
    run: Trajectory = error.trajectory
    return run


def alike_rate(rate: float, dim: int, published: int = 1000) -> float:
    """Rescale the published rate (on the mean loss, at width `published`) to width `dim`.

    Training then takes equally many steps: their number depends on ``eta c sigma_1``, where c = 1 / d^2 and
    sigma_1 of a Gaussian matrix is about ``2 sqrt(d)``; rates proportional to d^1.5 leave it unchanged.
    """
    return rate * float((dim / published) ** 1.5)


def setting(default: Any, text: str, *, choices: tuple[str, ...] | None = None) -> Any:
    """Return a field of `Settings`: its default, one line of help, and the choices, if any."""
    return field(default=default, metadata={"help": text, "choices": choices})


def load(name: str) -> FigureModule:
    """Return the module of a figure.

    Raises
    ------
    ValueError
        For a name that is not in `FIGURES`.
    """
    check_choice(name, "figure", FIGURES)
    return cast(FigureModule, importlib.import_module(f".{name.replace('-', '_')}", __package__))


@dataclass(frozen=True)
class Option:
    """A setting as the command line sees it."""

    name: str
    kind: type
    many: bool
    default: Any
    help: str
    choices: tuple[str, ...] | None


def options(settings: type[Any]) -> Iterator[Option]:
    """Yield the settings of a figure, in their order."""
    hints = typing.get_type_hints(settings)
    for entry in dataclasses.fields(settings):
        hint = hints[entry.name]
        many = typing.get_origin(hint) is tuple
        kind = typing.get_args(hint)[0] if many else hint
        meta = entry.metadata
        yield Option(entry.name, kind, many, entry.default, meta["help"], meta["choices"])


def make_settings(settings: type[Any], values: Mapping[str, Any]) -> Any:
    """Return the settings with some values changed, all of them checked.

    Raises
    ------
    TypeError, ValueError
        Naming the setting.
    """
    known = {option.name: option for option in options(settings)}
    checked = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{name} is not a setting of this figure; wanted one of {', '.join(known)}")
        option = known[name]
        if option.many:
            checked[name] = tuple(_check(v, f"{name}[{i}]", option) for i, v in enumerate(value))
            if not checked[name]:
                raise ValueError(f"{name} is empty; wanted at least one value")
        else:
            checked[name] = _check(value, name, option)
    return settings(**checked)


def quick_settings(module: FigureModule) -> Mapping[str, Any]:
    """Return the settings that ``--quick`` changes; none where the figure is quick anyway."""
    return cast(Mapping[str, Any], getattr(module, "QUICK", {}))


def quick_takes(module: FigureModule) -> str:
    """Return the time that ``--quick`` takes."""
    return str(getattr(module, "QUICK_TAKES", "in under a minute"))


def describe(module: FigureModule, settings: Any, result: Result) -> str:
    """Return the sentences of the caption that the title leaves out."""
    details = getattr(module, "details", None)
    return str(details(settings, result)) if details is not None else ""


def is_timed(module: FigureModule) -> bool:
    """Return whether the figure takes times."""
    return bool(getattr(module, "TIMED", False))


def _check(value: Any, name: str, option: Option) -> Any:
    if option.choices is not None:
        return check_choice(value, name, option.choices)
    if option.kind is str:
        if not isinstance(value, str):
            raise TypeError(f"{name} is {type(value).__name__}; wanted a str")
        return value
    if option.kind is int:
        return check_count(value, name, minimum=0)
    return check_scale(value, name)
