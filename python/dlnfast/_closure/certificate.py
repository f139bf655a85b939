# SPDX-License-Identifier: MIT
"""The certificate of a run: its engine, the reason for it, and the measured conditions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from .._support.arrays import FloatArray

#: Relative error of the weights of a reduced run, divided by the relative departure from its assumptions
#: (measured: 0.57 for noise on the layers, the same for noise on S).
ERROR_PER_DEPARTURE = 0.6
#: Relative error of the weights of a reduced run, divided by the relative noise on the target (measured).
ERROR_PER_NOISE = 1.4


@dataclass(frozen=True)
class Check:
    """One measured condition of a reduced run.

    Attributes
    ----------
    name : str
        Name of the condition.
    measured, limit : float
        The condition holds if measured <= limit.
    text : str
        The finding in words, with its numbers.
    remedy : str
        Advice to the user if the condition does not hold.
    expected_error : float
        Relative error of the weights of a reduced run due to this departure alone, about
        `ERROR_PER_DEPARTURE` times the departure.
    """

    name: str
    measured: float
    limit: float
    text: str
    remedy: str
    expected_error: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether the condition is met."""
        return self.measured <= self.limit


@dataclass(frozen=True)
class Assumptions:
    """All conditions of a reduced run for one problem and its initial weights.

    Attributes
    ----------
    checks : tuple of Check
        The conditions, in the order of their importance.
    dims : tuple of int
        Dimensions a_0 .. a_L of the active subspaces; if they did not close, those at which growth stopped.
    widths : tuple of int
        d_0 .. d_L.
    """

    checks: tuple[Check, ...]
    dims: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def hold(self) -> bool:
        """Whether every condition is met."""
        return all(check.holds for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The conditions that are not met."""
        return tuple(check for check in self.checks if not check.holds)

    @property
    def share(self) -> float:
        """Ratio of the largest active dimension to the largest width."""
        return max(self.dims) / max(self.widths)

    @property
    def expected_error(self) -> float:
        """Relative error of the weights of a reduced run due to all departures."""
        return sum(check.expected_error for check in self.checks)

    def describe_dims(self) -> str:
        """Return "6 of 30 dimensions are active", or all numbers if they differ between nodes."""
        if len(set(self.dims)) == 1 and len(set(self.widths)) == 1:
            return f"{self.dims[0]} of {self.widths[0]} dimensions are active"
        return f"{shorten(self.dims)} of {shorten(self.widths)} dimensions are active"


@dataclass(frozen=True)
class Certificate:
    """The engine of a run, and the reason for it.

    Attributes
    ----------
    engine : str
        "reduced", "dense", "torch" or "sharded"; "tracked" if another program trained.
    reason : str
        The reason in one line.
    assumptions : Assumptions or None
        The measured conditions; None if none were needed (``engine="dense"``).
    """

    engine: str
    reason: str
    assumptions: Assumptions | None = None

    @property
    def expected_error(self) -> float:
        """Relative error of the weights due to departures from the assumptions; 0 for other engines."""
        return self.assumptions.expected_error if self.engine == "reduced" and self.assumptions else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the certificate as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Certificate:
        """Return the certificate for values of `to_dict`.

        Parameters
        ----------
        values : dict
            Values of `to_dict`.

        Returns
        -------
        Certificate
        """
        found = values["assumptions"]
        if found is not None:
            checks = tuple(Check(**check) for check in found["checks"])
            found = Assumptions(checks, tuple(found["dims"]), tuple(found["widths"]))
        return cls(values["engine"], values["reason"], found)

    def __str__(self) -> str:
        """Return the engine, the reason and the expected error in one line."""
        error = f" (expected error {self.expected_error:.0e})" if self.engine == "reduced" else ""
        return f"{self.engine} engine: {self.reason}{error}"


def step_flops(cores: Iterable[FloatArray]) -> float:
    """Return the approximate number of operations of a step with these cores: three products with each."""
    return 6.0 * float(sum(core.shape[0] * core.size for core in cores))


class Residuals(NamedTuple):
    """Relative residual of each inclusion of active subspaces; near rounding error if they are closed."""

    #: ``W_l A_{l-1} in A_l``, the largest over the layers.
    forward: float
    #: ``W_l^T A_l in A_{l-1}``.
    backward: float
    #: ``Phi A_0 in A_L``.
    target: float
    #: ``Phi^T A_L in A_0``.
    target_transposed: float
    #: ``S A_0 in A_0``.
    input_gram: float


def shorten(numbers: Sequence[Any]) -> str:
    """Return a list as text, with its middle left out if it is long."""
    if len(numbers) <= 8:
        return str(list(numbers))
    return f"[{numbers[0]}, {numbers[1]}, .., {numbers[-2]}, {numbers[-1]}] ({len(numbers) - 1} layers)"
