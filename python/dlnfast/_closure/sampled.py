# SPDX-License-Identifier: MIT
"""Bases of the active subspaces of lazily sampled weights, sampled when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from .._support.arrays import FloatArray
from .._weights.implicit import ImplicitWeights


class SampledBases(Sequence[FloatArray]):
    """Bases of implicit layers, drawn when they are asked for."""

    def __init__(self, law: ImplicitWeights, dims: Sequence[int]) -> None:
        self.law = law
        self.dims = tuple(dims)

    def __len__(self) -> int:
        return len(self.dims)

    @overload
    def __getitem__(self, node: int) -> FloatArray: ...

    @overload
    def __getitem__(self, node: slice) -> Sequence[FloatArray]: ...

    def __getitem__(self, node: int | slice) -> FloatArray | Sequence[FloatArray]:
        if isinstance(node, slice):
            return [self[i] for i in range(*node.indices(len(self)))]
        index = range(len(self))[node]
        return self.law.basis(index, self.dims[index])


def resample(
    law: dict[str, Any], U: FloatArray, V: FloatArray
) -> tuple[ImplicitWeights, Sequence[FloatArray]]:
    """Return implicit layers and their bases as a run that was saved had them: same seed, same questions."""
    weights = ImplicitWeights(law["widths"], law["scales"], law["seed"], dtype=law["dtype"])
    found = weights.close(V, U, max(weights.widths))
    return weights, SampledBases(weights, found.dims)
