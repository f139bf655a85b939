# SPDX-License-Identifier: MIT
"""An adaptive integrator of ordinary differential equations y' = f(y): Dormand-Prince, order 8(5,3).

Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I (1993), Sections II.4 (initial step), II.5
(error estimate and step size) and II.10 (coefficients, interpolant).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from .dormand_prince import ERRORS, INTERPOLANT, STAGES

Vector = npt.NDArray[np.float64]
#: Writes f(y), the first argument, to the second one.
Slope = Callable[[Vector, Vector], None]

_N_STAGES: Final = 12
_SAFETY: Final = 0.9
#: Bounds on the ratio of two successive step sizes.
_SMALLEST_RATIO: Final = 1 / 3
_LARGEST_RATIO: Final = 6.0
#: Share of the largest entry of a segment that rounding may reach; smaller tolerances have no effect.
_ROUNDING: Final = 32 * float(np.finfo(np.float64).eps)


class StepSizeError(ArithmeticError):
    """No step size above rounding meets the tolerances: the solution, or its slope, is not finite.

    Attributes
    ----------
    time : float
        Time that the integration reached.
    """

    def __init__(self, time: float) -> None:
        super().__init__(f"the step size became too small at t = {time:g}")
        self.time = time


class StepLimitError(RuntimeError):
    """The largest number of steps does not reach the last time.

    Attributes
    ----------
    time : float
        Time that the integration reached.
    """

    def __init__(self, time: float) -> None:
        super().__init__(f"the largest number of steps reaches t = {time:g}")
        self.time = time


@dataclass(frozen=True)
class Tolerance:
    """Largest error of a step in each entry: ``absolute + relative |y_i|``, but never below rounding.

    Attributes
    ----------
    relative, absolute : float
        The two tolerances.
    segments : sequence of int
        First index of each segment of y, from 0 on, increasing. Rounding errors of an entry are measured
        relative to the largest entry of its segment.
    """

    relative: float
    absolute: float
    segments: Sequence[int] = field(default=(0,))

    def sizes(self, magnitudes: Vector) -> Vector:
        """Return the largest allowed errors of entries with these magnitudes."""
        starts = np.asarray(self.segments)
        largest = np.maximum.reduceat(magnitudes, starts)
        floor = np.repeat(_ROUNDING * largest, np.diff(starts, append=len(magnitudes)))
        sizes = self.absolute + self.relative * magnitudes
        # An entry of a segment of zeros has no scale; any positive size does.
        found: Vector = np.maximum(np.maximum(sizes, floor), np.finfo(np.float64).tiny)
        return found


def integrate(
    slope: Slope, start: Vector, times: Vector, tolerance: Tolerance, max_steps: int
) -> Iterator[tuple[float, Vector]]:
    """Yield the time and the solution of y' = f(y), y(times[0]) = start, at each of the times.

    Steps are chosen by the error estimate alone; times between two steps are interpolated to order 7. Memory:
    20 vectors.

    Parameters
    ----------
    slope : callable
        Function that writes f(y), for its first argument y, to its second one.
    start : ndarray, shape (n,)
        Initial state, which is not changed.
    times : ndarray, shape (m,)
        Increasing times.
    tolerance : Tolerance
        Largest error of a step.
    max_steps : int
        Largest number of steps.

    Yields
    ------
    time : float
    state : ndarray, shape (n,)
        Solution at that time; the caller may keep the array.

    Raises
    ------
    StepSizeError
        If the solution stops being finite before the last time.
    StepLimitError
        If `max_steps` steps do not reach the last time.

    Notes
    -----
    Cost: 12 evaluations of `slope` per step, 3 more for a step that contains some of the times.
    """
    now, state = float(times[0]), np.array(start, dtype=np.float64)
    yield now, state.copy()
    if state.size == 0 or len(times) == 1:
        yield from ((float(time), state.copy()) for time in times[1:])
        return
    stages = np.empty((len(STAGES), state.size))
    with np.errstate(all="ignore"):  # trial steps may overflow; they are refused
        slope(state, stages[0])
        size = _first_step(slope, state, stages, tolerance)
    position, end, n_steps = 1, float(times[-1]), 0
    while position < len(times):
        if n_steps == max_steps:
            raise StepLimitError(now)
        n_steps += 1
        with np.errstate(all="ignore"):
            size, ratio, new = _take_step(slope, state, stages, tolerance, now, size)
        # The last step ends beyond the last time, so that no step has to be cut to it.
        reached = now + size
        if times[position] <= reached:
            with np.errstate(all="ignore"):
                terms = _interpolant(slope, state, new, stages, size)
            while position < len(times) and times[position] <= reached:
                time = float(times[position])
                yield time, _interpolate(terms, state, (time - now) / size)
                position += 1
        if reached > end:
            return
        now, state = reached, new
        stages[0] = stages[_N_STAGES]
        size *= ratio


def _first_step(slope: Slope, state: Vector, stages: Vector, tolerance: Tolerance) -> float:
    """Return the size of the first step (Hairer, Norsett, Wanner, Section II.4); 1 where nothing moves."""
    allowed = tolerance.sizes(np.abs(state))
    moved = float(np.max(np.abs(state) / allowed))
    rate = float(np.max(np.abs(stages[0]) / allowed))
    if not np.isfinite(rate):
        raise StepSizeError(0.0)
    if rate == 0.0:
        return 1.0
    guess = 0.01 * moved / rate if moved > 1e-5 else 1e-6
    slope(state + guess * stages[0], stages[1])
    change = float(np.max(np.abs(stages[1] - stages[0]) / allowed)) / guess
    largest = max(rate, change)
    if not np.isfinite(largest):
        return guess
    return float(min(100 * guess, (0.01 / largest) ** (1 / 8)))


def _take_step(
    slope: Slope, state: Vector, stages: Vector, tolerance: Tolerance, now: float, size: float
) -> tuple[float, float, Vector]:
    """Return the size of an accepted step, the ratio of the next size to it, and the new state."""
    is_repeated = False
    while True:
        if not size > 4 * np.spacing(now):
            raise StepSizeError(now)
        for stage in range(1, _N_STAGES):
            slope(state + size * (STAGES[stage, :stage] @ stages[:stage]), stages[stage])
        new: Vector = state + size * (STAGES[_N_STAGES, :_N_STAGES] @ stages[:_N_STAGES])
        slope(new, stages[_N_STAGES])
        allowed = tolerance.sizes(np.maximum(np.abs(state), np.abs(new)))
        fifth, third = np.max(np.abs(ERRORS @ stages[: _N_STAGES + 1]) / allowed, axis=1)
        # The estimate of order 8 from those of orders 5 and 3.
        weight = np.hypot(fifth, 0.1 * third)
        error = size * fifth * (fifth / weight) if weight > 0 else 0.0
        if np.isfinite(weight) and np.isfinite(new).all() and error <= 1:
            ratio = _LARGEST_RATIO if error == 0 else _SAFETY * error ** (-1 / 8)
            return size, float(np.clip(ratio, _SMALLEST_RATIO, 1.0 if is_repeated else _LARGEST_RATIO)), new
        is_repeated = True
        is_finite = np.isfinite(error) and error > 0
        size *= max(_SMALLEST_RATIO, _SAFETY * float(error) ** (-1 / 8)) if is_finite else 0.1


def _interpolant(slope: Slope, state: Vector, new: Vector, stages: Vector, size: float) -> Vector:
    """Return the seven terms of the interpolant of a step."""
    for stage in range(_N_STAGES + 1, len(STAGES)):
        slope(state + size * (STAGES[stage, :stage] @ stages[:stage]), stages[stage])
    change = new - state
    terms = np.empty((3 + len(INTERPOLANT), state.size))
    terms[0] = change
    terms[1] = size * stages[0] - change
    terms[2] = 2 * change - size * (stages[_N_STAGES] + stages[0])
    terms[3:] = size * (INTERPOLANT @ stages)
    return terms


def _interpolate(terms: Vector, state: Vector, share: float) -> Vector:
    """Return the solution at a share of a step: share, 1 - share, share, .. times nested terms."""
    found = np.zeros_like(state)
    for i, term in enumerate(terms[::-1]):
        found += term
        found *= share if i % 2 == 0 else 1 - share
    found += state
    return found
