# SPDX-License-Identifier: MIT
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[np.floating[Any]]

def build_info() -> dict[str, Any]: ...
def set_num_threads(n: int) -> None: ...
def max_threads() -> int: ...
def forbid_threads() -> None: ...
def extend_basis(
    basis: _Array,
    n_basis: int,
    block: _Array,
    tolerance: float,
    lengths: npt.NDArray[np.float64],
    n_threads: int = 0,
) -> int: ...
def multiply(
    a: _Array, transpose_a: bool, b: _Array, transpose_b: bool, out: _Array, n_threads: int = 0
) -> None: ...
def thin_multiply(x: _Array, w: _Array, transpose: bool, out: _Array, n_threads: int = 0) -> None: ...
def thin_descend(
    left: _Array,
    right: _Array,
    w: _Array,
    result: str,
    out: _Array | None,
    velocity: _Array | None,
    scale: float,
    learning_rate: float,
    weight_decay: float,
    momentum: float,
    n_threads: int = 0,
) -> None: ...
def singular_values(w: _Array, values: _Array, left: _Array | None, right: _Array | None) -> None: ...
def bidiagonal_singular_values(
    diagonal: npt.NDArray[np.float64], superdiagonal: npt.NDArray[np.float64], k: int
) -> npt.NDArray[np.float64]: ...

TRACKING_COLUMNS: tuple[str, ...]

class _Tracker:
    def __init__(self, rows: int, cols: int, settings: dict[str, Any], n_threads: int = 0) -> None: ...
    def update(self, w: _Array, drift: float) -> dict[str, Any]: ...
    def update_operator(
        self,
        matmat: Callable[[_Array], Any],
        rmatmat: Callable[[_Array], Any],
        squared_norm: float,
        drift: float,
    ) -> dict[str, Any]: ...
    def begin_factored(self, w: _Array, limit: int) -> tuple[float, float, bool]: ...
    def append(self, factor: float, scale: float, left: _Array, right: _Array) -> dict[str, Any] | None: ...
    def vectors(self, left: bool) -> _Array | None: ...
    def seed(self, right: _Array) -> None: ...
    def set_reference(self, left: _Array | None, right: _Array | None) -> None: ...
    @property
    def n_values(self) -> int: ...
    @property
    def n_refreshes(self) -> int: ...
    @property
    def n_certificates(self) -> int: ...

class SvdTracker32(_Tracker): ...
class SvdTracker64(_Tracker): ...

def follow_branches(
    values: npt.NDArray[np.float64],
    left: npt.NDArray[np.float64],
    right: npt.NDArray[np.float64],
    error: float,
    cluster_tolerance: float,
    ids: npt.NDArray[np.int64],
    clusters: npt.NDArray[np.int64],
) -> None: ...
def best_assignment(gain: npt.NDArray[np.float64]) -> list[int]: ...

_SparseRows = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], _Array]

def sort_entries(
    row: npt.NDArray[np.int64],
    col: npt.NDArray[np.int64],
    value: _Array,
    rows: int,
    cols: int,
    start: npt.NDArray[np.int64],
    index: npt.NDArray[np.int32],
    values: _Array,
) -> int: ...
def transpose_entries(
    by_rows: _SparseRows,
    cols: int,
    start: npt.NDArray[np.int64],
    index: npt.NDArray[np.int32],
    values: _Array,
) -> None: ...
def residual_products(
    observed: tuple[_SparseRows, _SparseRows],
    x: _Array,
    y: _Array,
    left: _Array | None,
    right: _Array | None,
    n_threads: int = 0,
) -> float: ...
def masked_residual(
    observed: tuple[_SparseRows, _SparseRows], m: _Array, error: _Array, n_threads: int = 0
) -> float: ...
def measured_residual(
    measurements: tuple[_Array, _Array], m: _Array, error: _Array, n_threads: int = 0
) -> float: ...
def dense_descent(weights: list[_Array], arguments: dict[str, Any]) -> tuple[str, int, int]: ...
def reduced_descent(cores: list[_Array], arguments: dict[str, Any]) -> tuple[str, int, int]: ...
def batch_descent(cores: list[_Array], arguments: dict[str, Any]) -> list[tuple[str, int, int]]: ...
def gradients(
    weights: list[_Array], objective: dict[str, Any], gradients: list[_Array], n_threads: int = 0
) -> float: ...
def best_pivot(widths: list[int]) -> int: ...
def step_flops(widths: list[int], pivot: int) -> float: ...
