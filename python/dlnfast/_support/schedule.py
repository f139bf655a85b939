# SPDX-License-Identifier: MIT
"""Learning rates, weight decays and momenta that change from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .arrays import as_matrix, as_vector, check_count, check_scale, count_axes, per_layer
from .errors import ShapeError

__all__ = ["PerLayer", "Schedule", "read_rate", "read_stored_rate"]

PerLayer = float | Sequence[float]

_KINDS: Final = ("cosine", "piecewise", "values")


class Schedule:
    r"""A rate for every step, and optionally for every layer.

    `train` accepts it as ``learning_rate``, ``weight_decay`` and ``momentum``. Step t uses the value of t:
    ``W_l(t + 1) = W_l(t) - eta_l(t) V_l(t)``. Values are computed once, before the first step.

    Parameters
    ----------
    rule : callable or array_like
        A function of the step t = 0, 1, .. that returns one number or one per layer, or the values
        themselves, as `Schedule.from_values`.

    Raises
    ------
    TypeError, ValueError
        For values that are not numbers, not finite, or out of range; the message names them.

    Notes
    -----
    `Adaptive` is a rate that follows the weights. Cost: a table of 8 bytes for each step, and for each layer
    where layers have rates of their own.

    Examples
    --------
    >>> import dlnfast as dln
    >>> rates = dln.Schedule.cosine(0.1, steps=100, warmup=10, final=0.001)
    >>> rates.values(100)[[0, 9, 10, 99]].round(4).tolist()
    [0.01, 0.1, 0.1, 0.001]
    >>> dln.Schedule(lambda t: 0.1 / (1 + t)).values(3).round(4).tolist()
    [0.1, 0.05, 0.0333]
    """

    def __init__(self, rule: Callable[[int], PerLayer] | npt.ArrayLike) -> None:
        self._function: Callable[[int], PerLayer] | None = None
        self._definition: dict[str, Any] = {}
        #: Values of the last call, because a run asks for them twice.
        self._cached: npt.NDArray[np.float64] | None = None
        if callable(rule):
            self._function = rule
        else:
            self._definition = {"schedule": "values", "values": _read_values(rule, "rule").tolist()}

    @classmethod
    def from_values(cls, values: npt.ArrayLike) -> Schedule:
        """Return the schedule with these values.

        Parameters
        ----------
        values : array_like, shape (T,) or (T, L)
            Rates of steps 0 .. T - 1, for all layers or for each. A run may have at most T steps.

        Returns
        -------
        Schedule

        Raises
        ------
        ShapeError
            For an array with other axes, or an empty one.
        ValueError
            For values that are not finite.
        """
        if callable(values):
            raise TypeError("values is a callable; wanted an array: Schedule(function) takes a function")
        return cls._of({"schedule": "values", "values": _read_values(values, "values").tolist()})

    @classmethod
    def cosine(cls, peak: PerLayer, steps: int, *, warmup: int = 0, final: PerLayer = 0.0) -> Schedule:
        r"""Return a linear warm-up followed by half a period of a cosine.

        With the peak p, the final value f, T steps and w of warm-up, the rate is p (t + 1) / w for t < w,
        then f + (p - f) (1 + cos(pi (t - w) / (T - w))) / 2, and f for t >= T.

        Parameters
        ----------
        peak : float or sequence of float
            Largest rate, for all layers or one per layer.
        steps : int
            Number of steps T until the final value, more than `warmup`.
        warmup : int
            Number of steps w of linear growth.
        final : float or sequence of float
            Rate at the end.

        Returns
        -------
        Schedule

        Raises
        ------
        TypeError, ValueError
            For an argument out of its range; the message names it.
        """
        last = check_count(steps, "steps", minimum=1)
        first = check_count(warmup, "warmup", minimum=0)
        if first >= last:
            raise ValueError(f"warmup is {first}; wanted fewer than the {last} steps of the schedule")
        return cls._of(
            {
                "schedule": "cosine",
                "peak": _plain(peak, "peak"),
                "steps": last,
                "warmup": first,
                "final": _plain(final, "final"),
            }
        )

    @classmethod
    def piecewise(cls, values: Mapping[int, PerLayer]) -> Schedule:
        """Return a piecewise constant rate.

        Parameters
        ----------
        values : mapping of int to float or sequence of float
            The rate from each of these steps on; one of the steps is 0.

        Returns
        -------
        Schedule

        Raises
        ------
        TypeError, ValueError
            For a step that is not a number of 0 or more, or for rates that are not numbers.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"values is {type(values).__name__}; wanted a mapping from steps to rates")
        at = {
            check_count(_integer(step), "a step of piecewise", minimum=0): rate
            for step, rate in values.items()
        }
        if 0 not in at:
            raise ValueError("the steps of piecewise have no 0; wanted the rate of the first step too")
        pieces = {str(step): _plain(at[step], f"values[{step}]") for step in sorted(at)}
        return cls._of({"schedule": "piecewise", "values": pieces})

    @classmethod
    def from_dict(cls, definition: Mapping[str, Any]) -> Schedule:
        """Return the schedule of a table of a specification.

        Parameters
        ----------
        definition : mapping
            ``schedule`` is "cosine", "piecewise" or "values"; the other keys are the arguments of the method
            of that name.

        Returns
        -------
        Schedule

        Raises
        ------
        TypeError, ValueError
            For an unknown kind of schedule, and for arguments that do not fit it.
        """
        if not isinstance(definition, Mapping):
            raise TypeError(f"definition is {type(definition).__name__}; wanted a mapping")
        arguments = dict(definition)
        kind = arguments.pop("schedule", None)
        if kind not in _KINDS:
            raise ValueError(f"schedule is {kind!r}; wanted one of {', '.join(map(repr, _KINDS))}")
        makers: dict[str, Callable[..., Schedule]] = {
            "cosine": cls.cosine,
            "piecewise": cls.piecewise,
            "values": cls.from_values,
        }
        try:
            return makers[kind](**arguments)
        except TypeError as error:
            raise TypeError(f"schedule {kind!r}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the definition, in values that JSON and TOML know: `from_dict` reads it.

        Returns
        -------
        dict

        Raises
        ------
        ValueError
            For a schedule made from a function; ``resolve(steps)`` has values.
        """
        if self._function is not None:
            raise ValueError("a schedule from a function has no definition; wanted resolve(steps) first")
        return dict(self._definition)

    def resolve(self, steps: int) -> Schedule:
        """Return a schedule without a function, by calling the function once for every step.

        Parameters
        ----------
        steps : int
            Number of steps.

        Returns
        -------
        Schedule

        Raises
        ------
        TypeError, ValueError
            For a function that does not return numbers, or a wrong number of steps.
        MemoryError
            If there is no memory for the values of so many steps; the function is not called then.
        """
        count = check_count(steps, "steps", minimum=0)
        if self._function is None:
            return self
        function = self._function
        try:
            np.empty(count)
        except (MemoryError, ValueError):  # NumPy's errors of sizes beyond the memory, and beyond 2^63 bytes
            raise MemoryError(
                f"steps is {count}: there is no memory for the values of the function at so many steps; "
                "wanted fewer, or a schedule that is no function"
            ) from None
        return Schedule([function(t) for t in range(count)] if count else [0.0])

    def values(self, steps: int, n_layers: int | None = None) -> npt.NDArray[np.float64]:
        """Return the rates of the first steps.

        Parameters
        ----------
        steps : int
            Number of steps T.
        n_layers : int, optional
            Number of layers L that values per layer must have.

        Returns
        -------
        ndarray, shape (T,) or (T, L)

        Raises
        ------
        ShapeError
            If the schedule has too few values, or another number of layers.
        """
        steps = check_count(steps, "steps", minimum=0)
        if self._cached is not None and len(self._cached) == steps:
            rates = self._cached
        else:
            rates = self._cached = self._compute(steps)
        if rates.ndim == 2 and n_layers is not None and rates.shape[1] != n_layers:
            raise ShapeError(
                f"the schedule has values for {rates.shape[1]} layers; the network has {n_layers}"
            )
        return rates

    def _compute(self, steps: int) -> npt.NDArray[np.float64]:
        definition = self.resolve(steps)._definition
        kind = definition["schedule"]
        if kind == "cosine":
            rates = _cosine_values(definition, steps)
        elif kind == "piecewise":
            rates = _piecewise_values(definition["values"], steps)
        else:
            rates = np.asarray(definition["values"], dtype=np.float64)
            if len(rates) < steps:
                raise ShapeError(
                    f"the schedule has {len(rates)} values; wanted one for each of {steps} steps"
                )
            rates = rates[:steps]
        rates.flags.writeable = False
        return rates

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return self._function is other._function and self._definition == other._definition

    def __hash__(self) -> int:
        return hash((self._function, repr(self._definition)))

    def __repr__(self) -> str:
        if self._function is not None:
            return f"Schedule({self._function!r})"
        parts = [f"{name}={value!r}" for name, value in self._definition.items() if name != "schedule"]
        text = ", ".join(parts)
        shown = text if len(text) <= 80 else text[:80] + " .."
        return f"Schedule.{self._definition['schedule']}({shown})"

    @classmethod
    def _of(cls, definition: dict[str, Any]) -> Schedule:
        schedule = cls.__new__(cls)
        schedule._function, schedule._definition = None, definition
        schedule._cached = None
        return schedule


def _integer(step: Any) -> Any:
    """Return the integer of a key of a TOML table, which is a string."""
    return int(step) if isinstance(step, str) and step.isdecimal() else step


def _plain(rate: PerLayer, name: str) -> float | list[float]:
    """Return a number, or a list of numbers."""
    values: list[float] = per_layer(rate, name, None, minimum=-math.inf).tolist()
    return values[0] if np.ndim(rate) == 0 else values


def _read_values(values: npt.ArrayLike, name: str) -> npt.NDArray[np.float64]:
    n_axes = count_axes(values, name)
    if n_axes not in (1, 2):
        raise ShapeError(f"{name} has {n_axes} axes; wanted (steps,) or (steps, layers)")
    read = as_vector if n_axes == 1 else as_matrix
    return np.asarray(read(values, name, dtype=np.float64), dtype=np.float64)


def _cosine_values(definition: Mapping[str, Any], steps: int) -> npt.NDArray[np.float64]:
    last, first = definition["steps"], definition["warmup"]
    peak, final = np.asarray(definition["peak"]), np.asarray(definition["final"])

    shares = np.arange(-first, steps - first, dtype=np.float64)
    warmup, wave = shares[:first], shares[first:]
    warmup += first + 1
    warmup /= max(first, 1)
    wave *= np.pi / (last - first)
    np.cos(wave, out=wave)
    wave += 1.0
    wave *= 0.5
    shares[last:] = 0.0
    if peak.ndim or final.ndim:
        shares = shares[:, None]
    rates: npt.NDArray[np.float64] = shares * (peak - final)
    rates[first:] += final
    rates[:first] = shares[:first] * peak
    return rates


def _piecewise_values(pieces: Mapping[str, Any], steps: int) -> npt.NDArray[np.float64]:
    n_layers = max(np.ndim(v) and len(v) for v in pieces.values())
    rates = np.empty((steps, n_layers) if n_layers else steps)
    for step, rate in pieces.items():
        rates[int(step) :] = rate
    return rates


def read_rate(
    rate: PerLayer | Schedule,
    name: str,
    n_layers: int | None = None,
    *,
    steps: int = 1,
    below: float | None = None,
) -> npt.NDArray[np.float64]:
    """Return the rates of a run, (L,) for constant ones and (steps, 1) or (steps, L) for a schedule.

    Parameters
    ----------
    rate : float, sequence of float or Schedule
        The rates.
    name : str
        Name of the argument, for messages.
    n_layers : int, optional
        Number of layers L; without it constant rates have as many as they come with.
    steps : int
        Number of steps of the run.
    below : float, optional
        Bound that all rates must be below.

    Returns
    -------
    ndarray

    Raises
    ------
    ShapeError
        For another number of layers, too few values of a schedule, or an array with several axes.
    TypeError, ValueError
        For a rate that is negative, not finite or not below the bound.
    """
    if not isinstance(rate, Schedule):
        if not isinstance(rate, (int, float, str)) and count_axes(rate, name) > 1:
            raise ShapeError(
                f"{name} has {count_axes(rate, name)} axes; wanted one number or one per layer: rates that "
                "change from step to step are a dlnfast.Schedule"
            )
        try:
            return per_layer(rate, name, n_layers, below=below)
        except ShapeError as error:
            raise ShapeError(
                f"{error}; for one rate per step: dlnfast.Schedule.from_values(values)"
            ) from None
    try:
        values = rate.values(steps, n_layers)
    except ShapeError as error:
        raise ShapeError(f"{name}: {error}") from None
    for value in (values.min(initial=0.0), values.max(initial=0.0)):
        check_scale(float(value), f"{name} of a step", below=below)
    return values if values.ndim == 2 else values[:, np.newaxis]


def read_stored_rate(
    stored: Sequence[float] | Mapping[str, Any], n_layers: int, steps: int
) -> npt.NDArray[np.float64]:
    """Return the rates of every step and layer, (steps, L), from the settings of a run.

    Parameters
    ----------
    stored : sequence of float or mapping
        One rate per layer, or the definition of a `Schedule`.
    n_layers : int
        Number of layers L.
    steps : int
        Number of steps.

    Returns
    -------
    ndarray, shape (steps, n_layers)
    """
    rate = Schedule.from_dict(stored) if isinstance(stored, Mapping) else stored
    return np.broadcast_to(read_rate(rate, "rate", n_layers, steps=steps), (steps, n_layers))
