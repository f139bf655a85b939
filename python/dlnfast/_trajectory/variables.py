# SPDX-License-Identifier: MIT
"""Variables of an export: their dimensions, descriptions and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
#: Dimensions that grow during a run. Each has a coordinate of its own name.
STEP, LOSS_STEP, RATE_STEP, WEIGHT_STEP = ("step", "loss_step", "rate_step", "weight_step")
GROWING: Final = {
    STEP: "steps t of the records",
    LOSS_STEP: "steps t of the loss",
    RATE_STEP: "steps t of the learning rate factors",
    WEIGHT_STEP: "steps t of the weights",
}
#: Dimensions of one number per layer, of one per singular value, and of one per active singular value.
OF_LAYERS: Final = (STEP, "layer")
OF_VALUES: Final = (*OF_LAYERS, "index")
OF_ACTIVE_VALUES: Final = (*OF_LAYERS, "active_index")
#: Reads the array of one layer, counted from 0.
ReadLayer = Callable[[int], Array]


@dataclass(frozen=True)
class Variable:
    """A variable of an export.

    Attributes
    ----------
    dims : tuple of str
        Names of its dimensions.
    text : str
        Description.
    read : callable
        Returns the values.
    units : str
        Physical unit, "1" for none.
    """

    dims: tuple[str, ...]
    text: str
    read: Callable[[], Array]
    units: str = "1"

    @property
    def attributes(self) -> dict[str, str]:
        return {"long_name": self.text, "units": self.units}


class LayerVariables(dict[str, Variable]):
    """Variables that stack one array per layer, by name."""

    def __init__(self, n_layers: int) -> None:
        super().__init__()
        self._n_layers = n_layers

    def add(self, name: str, dims: tuple[str, ...], text: str, read: ReadLayer, units: str = "1") -> None:
        self[name] = Variable(dims, text, partial(_read_layers, read, self._n_layers), units)


def _read_layers(read: ReadLayer, n_layers: int) -> Array:
    return _stack_layers([read(index) for index in range(n_layers)])


def _stack_layers(arrays: Sequence[Array]) -> Array:
    """Stack the arrays of the layers along a new second axis; pad them with NaN, or -1 for integers."""
    shape = tuple(max(sizes) for sizes in zip(*(a.shape[1:] for a in arrays), strict=True))
    dtype = np.result_type(*arrays)
    padding = np.nan if dtype.kind == "f" else -1
    result = np.full((len(arrays[0]), len(arrays), *shape), padding, dtype=dtype)
    for i, array in enumerate(arrays):
        position: tuple[Any, ...] = (slice(None), i, *(slice(size) for size in array.shape[1:]))
        result[position] = array
    return result
