# SPDX-License-Identifier: MIT
"""Bases of the active subspaces of lazily sampled weights, which are sampled on first access."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from .._support.arrays import FloatArray
from .._weights.implicit import ImplicitWeights


class SampledBases(Sequence[FloatArray]):
    """The bases A_0 .. A_L, with ``bases[node]`` sampled on first access."""

    def __init__(self, weights: ImplicitWeights, dims: Sequence[int]) -> None:
        self.weights = weights
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
        return self.weights.basis(index, self.dims[index])


def resample(
    distribution: dict[str, Any], U: FloatArray, V: FloatArray
) -> tuple[ImplicitWeights, Sequence[FloatArray]]:
    """Sample the layers and the bases of a saved run again, by the same seed and the same queries.

    `distribution` is the description of `ImplicitWeights.describe`.
    """
    widths, scales, seed = (distribution[key] for key in ("widths", "scales", "seed"))
    weights = ImplicitWeights(widths, scales, seed, dtype=distribution["dtype"])
    found = weights.close(V, U, max(weights.widths))
    return weights, SampledBases(weights, found.dims)
