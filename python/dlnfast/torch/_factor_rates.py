# SPDX-License-Identifier: MIT
"""Learning rates of the factors of products: steps of Adam of the same size on factors of every shape."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from .._support.arrays import check_flag, check_scale

#: Keyword of Deep LoRA's `param_groups` in version 0.1.0 -> the code for it now.
MOVED_RATE: Final = {
    "learning_rate": "eta=..., the norm of a step on each factor, or eta=..., outer=0.01, "
    "match_updates=False for the learning rates of 0.1.0"
}


@dataclass(frozen=True)
class FactorRates:
    """Rule for the learning rate of each factor.

    A step of Adam changes every entry by about its learning rate, and a matrix a x b by about
    ``rate sqrt(a b)`` in the Frobenius norm. With ``rate = norm / sqrt(a b)`` the steps on all factors have
    the same norm, whatever the width between the factors.

    Attributes
    ----------
    rate : float
        Norm of a step, in units that the caller passes to `rate_of`; the learning rate without
        `match_updates`.
    outer : float
        Factor gamma of the rates of the first and the last factor.
    match_updates : bool
        Whether rates depend on shapes.
    """

    rate: float
    outer: float = 1.0
    match_updates: bool = True

    @classmethod
    def checked(cls, rate: float, outer: float, match_updates: bool, name: str) -> FactorRates:
        """Return the rule, or raise an error that names the argument; `name` is that of the rate."""
        return cls(
            check_scale(rate, name),
            check_scale(outer, "outer (gamma)"),
            check_flag(match_updates, "match_updates"),
        )

    def rate_of(self, n_entries: int, unit: float = 1.0) -> float:
        """Return the rate of a tensor with so many entries, for steps of norm ``rate * unit``."""
        return self.rate * (unit / math.sqrt(n_entries) if self.match_updates else 1.0)

    def rates_of_factors(
        self, factors: Sequence[nn.Parameter], unit: float = 1.0
    ) -> Iterator[tuple[nn.Parameter, float]]:
        """Yield the factors of a product, from the first to the last, with their rates.

        Factors of equal shape may be in one tensor of shape (k, a, b).
        """
        for number, factor in enumerate(factors):
            ratio = self.outer if number in (0, len(factors) - 1) else 1.0
            yield factor, ratio * self.rate_of(math.prod(factor.shape[-2:]), unit)

    def rates_of_tensors(self, tensors: Iterable[nn.Parameter]) -> Iterator[tuple[nn.Parameter, float]]:
        """Yield parameters that are no factors, such as those of a head, with their rates."""
        for tensor in tensors:
            yield tensor, self.rate_of(max(tensor.numel(), 1))


def make_groups(
    rates: Iterable[tuple[nn.Parameter, float]], options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return groups for ``torch.optim``, one per rate, in the order of their first parameters.

    Raises
    ------
    TypeError
        For the options ``params`` and ``lr``.
    """
    for key in options.keys() & {"params", "lr"}:
        raise TypeError(f"{key} is set by param_groups; wanted other settings of the optimiser")
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, rate in rates:
        groups.setdefault(rate, []).append(parameter)
    return [{"params": members, "lr": rate, **options} for rate, members in groups.items()]
