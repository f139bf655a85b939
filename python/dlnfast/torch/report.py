# SPDX-License-Identifier: MIT
"""Reports of a tracker during training: metrics for sinks, alarms, and the end of a training."""

from __future__ import annotations

import fnmatch
import math
import operator
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from .. import measures
from .._support.arrays import as_list, check_choice
from .._trajectory.truncated_spectra import measure_energy_share
from ._names import format_names

__all__ = ["Alarm", "LayerRecord", "Report", "Sink", "StopTraining"]

#: Quantities of a `LayerRecord`: the metrics of sinks, and the names in the expressions of alarms.
QUANTITIES: Final = ("largest_singular_value", "stable_rank", "effective_rank", "energy_share")
_COMPARISONS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_EXPRESSION: Final = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*(\S+)\s*")


@runtime_checkable
class Sink(Protocol):
    """Receiver of metrics during training: an object with one method, ``log``.

    `dlnfast.integrations.sinks` has sinks for files and for experiment trackers. A class need not inherit
    from this one.

    Raises
    ------
    TypeError
        For ``Sink()``: the protocol describes objects, and makes none.

    Examples
    --------
    >>> class Printer:
    ...     def log(self, metrics, step):
    ...         print(step, metrics)
    """

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Store the metrics of a record.

        Parameters
        ----------
        metrics : mapping of str to float
            Finite numbers, named ``"weights/LAYER/QUANTITY"`` and ``"change/LAYER/QUANTITY"``.
        step : int
            Number of training steps at the record.
        """


class StopTraining(Exception):
    """An alarm with the action "stop" ends the training.

    Raised before the next step changes the weights. All records are complete.

    Attributes
    ----------
    step : int
        Step of the record.
    layer : str
        Name of the layer.
    """

    def __init__(self, message: str, *, step: int, layer: str) -> None:
        super().__init__(message)
        self.step = step
        self.layer = layer

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickling, which by default leaves out the keyword arguments."""
        return partial(type(self), step=self.step, layer=self.layer), self.args, self.__dict__


@dataclass(frozen=True)
class LayerRecord:
    """The record of one layer at one step, for sinks and for conditions of alarms.

    Attributes
    ----------
    layer : str
        Name of the layer.
    of : {"weights", "change"}
        Matrix: W(t), or W(t) - W(0).
    step : int
        Number of training steps.
    singular_values : (k,) ndarray of float64
        The k largest singular values, descending.
    norm : float
        Frobenius norm of the whole matrix.
    """

    layer: str
    of: str
    step: int
    singular_values: npt.NDArray[np.float64]
    norm: float

    @property
    def largest_singular_value(self) -> float:
        """Spectral norm."""
        return float(self.singular_values[0])

    @property
    def stable_rank(self) -> float:
        """Squared Frobenius norm over the squared spectral norm; 0 for a matrix of zeros."""
        largest = self.largest_singular_value
        return (self.norm / largest) ** 2 if largest > 0 else 0.0

    @property
    def effective_rank(self) -> float:
        """`measures.effective_rank` of the k recorded values: at most k, and exact for ``k="all"``."""
        return measures.effective_rank(self.singular_values)

    @property
    def energy_share(self) -> float:
        """Share of the squared Frobenius norm in the k recorded values; 0 for a matrix of zeros."""
        shares = measure_energy_share(
            self.singular_values[np.newaxis], len(self.singular_values), np.array([self.norm])
        )
        return float(shares[0])

    def metrics(self) -> dict[str, float]:
        """Return the metrics of this record by name, as sinks receive them.

        Returns
        -------
        dict of str to float
            ``"OF/LAYER/QUANTITY"`` for largest_singular_value, stable_rank, effective_rank and energy_share.

        Notes
        -----
        Cost: O(k), about 20 microseconds.
        """
        return {f"{self.of}/{self.layer}/{name}": getattr(self, name) for name in QUANTITIES}


@dataclass(frozen=True)
class Alarm:
    """A condition on the records of layers, and the action when it becomes true.

    Parameters
    ----------
    when : str or callable
        Condition: a comparison of a quantity with a number, such as ``"effective_rank < 5"``, or a function
        of a `LayerRecord` that returns whether the alarm goes off. Quantities: largest_singular_value,
        stable_rank, effective_rank, energy_share; comparisons: <, <=, >, >=.
    layers : str, sequence of str, or None
        Names or globs of tracked layers; None: all.
    action : {"warn", "stop"}
        "warn": a RuntimeWarning when the condition becomes true for a layer. "stop": a `StopTraining`
        exception before the next step; in callbacks the trainer's own flag.
    of : {"weights", "change"}
        Matrices to test: W(t), or W(t) - W(0).

    Raises
    ------
    TypeError, ValueError
        For another condition, layers, action or matrix. The message lists the quantities.

    Notes
    -----
    The record at which tracking starts is not tested: no step was taken, and its change is zero. The text of
    a condition is parsed, not evaluated.

    Examples
    --------
    >>> import dlnfast as dln
    >>> collapse = dln.torch.Alarm("stable_rank < 1.5", layers="encoder.*", action="stop")
    >>> growth = dln.torch.Alarm(lambda record: record.singular_values[0] > 100)
    """

    when: str | Callable[[LayerRecord], bool]
    layers: str | Sequence[str] | None = None
    action: Literal["warn", "stop"] = "warn"
    of: Literal["weights", "change"] = "weights"

    def __post_init__(self) -> None:
        check_choice(self.action, "action", ("warn", "stop"))
        check_choice(self.of, "of", ("weights", "change"))
        if self.layers is not None and not isinstance(self.layers, str):
            for name in as_list(self.layers, "layers", "names of layers"):
                if not isinstance(name, str):
                    raise TypeError(f"layers has {name!r}; wanted names or globs")
        if isinstance(self.when, str):
            _parse_condition(self.when)
        elif not callable(self.when):
            raise TypeError(f'when is {self.when!r}; wanted a text like "effective_rank < 5", or a function')

    def covers(self, record: LayerRecord) -> bool:
        """Return whether this alarm tests a record's layer and matrix.

        Parameters
        ----------
        record : LayerRecord
            Record of a layer.

        Returns
        -------
        bool
        """
        if record.of != self.of:
            return False
        patterns = [self.layers] if isinstance(self.layers, str) else self.layers
        return patterns is None or any(fnmatch.fnmatchcase(record.layer, pattern) for pattern in patterns)

    def is_on(self, record: LayerRecord) -> bool:
        """Return whether the condition is true for a record.

        Parameters
        ----------
        record : LayerRecord
            Record of a layer.

        Returns
        -------
        bool
        """
        if not isinstance(self.when, str):
            return bool(self.when(record))
        name, compare, number = _parse_condition(self.when)
        return compare(getattr(record, name), number)

    def describe(self, record: LayerRecord) -> str:
        """Return a message about a record for which the condition is true.

        Parameters
        ----------
        record : LayerRecord
            Record of a layer.

        Returns
        -------
        str
        """
        matrix = f"layer {record.layer}" if self.of == "weights" else f"the change of layer {record.layer}"
        if isinstance(self.when, str):
            name = _parse_condition(self.when)[0]
            return f"{matrix} at step {record.step}: {self.when} ({name} is {getattr(record, name):.6g})"
        condition = getattr(self.when, "__name__", type(self.when).__name__)
        return f"{matrix} at step {record.step}: {condition} is true"


def _parse_condition(text: str) -> tuple[str, Callable[[float, float], bool], float]:
    """Return the quantity, the comparison and the number of a condition such as "stable_rank < 2".

    Raises
    ------
    ValueError
        For another text; the message lists the quantities and comparisons.
    """
    found = _EXPRESSION.fullmatch(text)
    number = math.nan
    if found is not None:
        try:
            number = float(found[3])
        except ValueError:
            found = None
    if found is None or found[1] not in QUANTITIES or not math.isfinite(number):
        raise ValueError(
            f"when is {text!r}; wanted one of {', '.join(QUANTITIES)}, one of {', '.join(_COMPARISONS)}, and "
            "a number"
        )
    return found[1], _COMPARISONS[found[2]], number


@dataclass(frozen=True)
class Report:
    """Reports of a tracker during training: sinks for its metrics, and alarms.

    Parameters
    ----------
    sinks : sequence of Sink, optional
        Receivers of the metrics of every record. Default: none; in the callbacks for Lightning and
        transformers the trainer's own loggers.
    alarms : sequence of Alarm
        Conditions that warn or stop the training.

    Raises
    ------
    TypeError
        For a sink without a method ``log``, and an alarm of another type.

    Notes
    -----
    A sink that raises an exception does not stop the training: the first exception of each sink becomes a
    RuntimeWarning.

    Examples
    --------
    >>> import dlnfast as dln
    >>> report = dln.torch.Report(alarms=[dln.torch.Alarm("effective_rank < 5", layers="head")])
    """

    sinks: Sequence[Sink] | None = None
    alarms: Sequence[Alarm] = ()

    def __post_init__(self) -> None:
        for sink in as_list(() if self.sinks is None else self.sinks, "sinks", "a list of sinks"):
            if not isinstance(sink, Sink):
                raise TypeError(
                    f"sinks has a {type(sink).__name__}; wanted an object with log(metrics, step)"
                )
        for alarm in as_list(self.alarms, "alarms", "a list of alarms"):
            if not isinstance(alarm, Alarm):
                raise TypeError(f"alarms has a {type(alarm).__name__}; wanted a dlnfast.torch.Alarm")


class Reporter:
    """Passes the records of a tracker to the sinks and alarms of a `Report`."""

    def __init__(self, report: Report) -> None:
        self._sinks: Sequence[Sink] = () if report.sinks is None else tuple(report.sinks)
        self._alarms = tuple(report.alarms)
        #: Indices of sinks that have failed, and alarms that are on, with their layers.
        self._failed: set[int] = set()
        self._active: set[tuple[int, str]] = set()
        #: Exception of the first alarm that stops the training, until it is raised.
        self._stop: StopTraining | None = None

    def check_alarms(self, layers: Sequence[str], kinds: Collection[str]) -> None:
        """Refuse alarms that no record of these layers and kinds of matrices can set off.

        Raises
        ------
        ValueError
            If the changes of an alarm are not tracked, or a name or glob fits no layer.
        """
        for index, alarm in enumerate(self._alarms):
            if alarm.of not in kinds:
                raise ValueError(f"alarms[{index}] is of {alarm.of!r}, but changes are not tracked")
            patterns = [alarm.layers] if isinstance(alarm.layers, str) else alarm.layers
            for pattern in patterns or ():
                if not any(fnmatch.fnmatchcase(layer, pattern) for layer in layers):
                    raise ValueError(
                        f"alarms[{index}]: {pattern!r} fits none of the tracked layers {format_names(layers)}"
                    )

    @property
    def is_needed(self) -> bool:
        """Whether there is a sink or an alarm."""
        return bool(self._sinks or self._alarms)

    def report(self, records: Sequence[LayerRecord], *, is_first: bool) -> None:
        """Report the records of all layers at one step."""
        if self._sinks:
            step = records[0].step
            metrics = {name: value for record in records for name, value in record.metrics().items()}
            for index, sink in enumerate(self._sinks):
                self._log(index, sink, metrics, step)
        if not is_first:
            for index, record, alarm in self._find_new_alarms(records):
                message = alarm.describe(record)
                if alarm.action == "stop":
                    self._stop = self._stop or StopTraining(message, step=record.step, layer=record.layer)
                else:
                    warnings.warn(message, RuntimeWarning, stacklevel=2)
                self._active.add((index, record.layer))

    def _log(self, index: int, sink: Sink, metrics: Mapping[str, float], step: int) -> None:
        try:
            sink.log(metrics, step)
        except Exception as error:
            if index not in self._failed:
                self._failed.add(index)
                warnings.warn(
                    f"sink {type(sink).__name__} did not store step {step}: {type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def _find_new_alarms(self, records: Sequence[LayerRecord]) -> Iterator[tuple[int, LayerRecord, Alarm]]:
        """Yield the alarms that are on for a layer and were off at the record before."""
        for index, alarm in enumerate(self._alarms):
            for record in records:
                if not alarm.covers(record):
                    continue
                if not alarm.is_on(record):
                    self._active.discard((index, record.layer))
                elif (index, record.layer) not in self._active:
                    yield index, record, alarm

    def raise_stop(self) -> None:
        """Raise the exception of an alarm that stops the training, once.

        Raises
        ------
        StopTraining
            If there is one.
        """
        stop, self._stop = self._stop, None
        if stop is not None:
            raise stop
