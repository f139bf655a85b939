# SPDX-License-Identifier: MIT
"""The engine of a run and the reasons for it: conditions, measured, and the certificate made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from .._support.arrays import FloatArray

#: Relative error of the weights in a reduced run per unit of a relative departure from its assumptions
#: (measured: 0.57 for noise on the layers, the same for noise on S).
ERROR_PER_DEPARTURE = 0.6
#: Likewise per unit of noise on the target, relative to its norm (measured: 1.4).
ERROR_PER_NOISE = 1.4


@dataclass(frozen=True)
class Check:
    """One condition of a reduced run, measured.

    Attributes
    ----------
    name : str
        What was checked.
    measured, limit : float
        The condition holds when measured <= limit.
    text : str
        The finding in words, with its numbers.
    remedy : str
        What a user can do where it does not hold.
    expected_error : float
        Relative error of the weights that a reduced run would have from this departure alone, about
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
        In the order in which they matter.
    dims : tuple of int
        Dimensions a_0 .. a_L of the active subspaces; where they did not close, those reached.
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
        """The largest active dimension as a share of the largest width."""
        return max(self.dims) / max(self.widths)

    @property
    def expected_error(self) -> float:
        """Relative error of the weights of a reduced run, from all departures together."""
        return sum(check.expected_error for check in self.checks)

    def describe_dims(self) -> str:
        """Return "6 of 30 dimensions are active", or all numbers where they differ."""
        if len(set(self.dims)) == 1 and len(set(self.widths)) == 1:
            return f"{self.dims[0]} of {self.widths[0]} dimensions are active"
        return f"{shorten(self.dims)} of {shorten(self.widths)} dimensions are active"


@dataclass(frozen=True)
class Certificate:
    """Which engine ran, and why.

    Attributes
    ----------
    engine : str
        "reduced", "dense", "torch" or "sharded"; "tracked" where another program trained.
    reason : str
        One line.
    assumptions : Assumptions or None
        What was measured; None where nothing had to be (``engine="dense"``).
    """

    engine: str
    reason: str
    assumptions: Assumptions | None = None

    @property
    def expected_error(self) -> float:
        """Relative error of the weights that the assumptions leave (0 for the dense engine)."""
        return self.assumptions.expected_error if self.engine == "reduced" and self.assumptions else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the certificate in values that JSON knows."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Certificate:
        """Return the certificate that `to_dict` described.

        Parameters
        ----------
        values : dict
            What `to_dict` returned.

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
    """Return about how many operations a step of these cores takes: three products with each."""
    return 6.0 * float(sum(core.shape[0] * core.size for core in cores))


@dataclass(frozen=True)
class Family:
    """Directions outside the active subspaces on which each layer acts as one scalar times an isometry.

    Attributes
    ----------
    first, last : int
        The layers, counted from 1, that they run through.
    multiplicity : int
        How many directions there are.
    coupling : float
        The eigenvalue s of S on them where they run through all layers: their scalars follow
        ``rho_l <- rho_l (1 - eta_l lambda_l - c s eta_l prod_{k != l} rho_k^2)``. 0 otherwise: they see no
        gradient, only weight decay.
    rho : tuple of float
        rho_l(0) for l = first .. last.
    """

    first: int
    last: int
    multiplicity: int
    coupling: float
    rho: tuple[float, ...]


class Residuals(NamedTuple):
    """How far each inclusion is from holding, relative to the norm of its map; rounding if they close."""

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
    if len(numbers) <= 8:
        return str(list(numbers))
    return f"[{numbers[0]}, {numbers[1]}, .., {numbers[-2]}, {numbers[-1]}] ({len(numbers) - 1} layers)"
