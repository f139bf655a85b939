# SPDX-License-Identifier: MIT
"""Recorded spectra of whole layers: the common part of the dense and the tracked states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from .._support.arrays import FloatArray, IntArray
from .._support.dispatch import core
from .._support.errors import ShapeError
from .._support.file_checks import check_array
from .._support.files import Arrays
from .._tracking.svd_tracker import COMPLETENESS, TIERS, TrackerRecord
from .packing import pack_list, unpack_list
from .states import NO_VALUES, Run, States, Table
from .variables import OF_LAYERS, OF_VALUES, Array, LayerVariables

#: Names of the columns of `LayerTracking.columns`.
COLUMNS: tuple[str, ...] = tuple(core.TRACKING_COLUMNS)
_ARRAYS = ("errors", "signs", "branches", "clusters", "columns")
_ANGLES = ("angles", "block_angles")
_LISTS = ("values", "left", "right")


@dataclass(frozen=True)
class LayerTracking:
    """Records of a layer's `SVDTracker` beside its k singular values.

    Attributes
    ----------
    errors : ndarray, shape (n_records, k)
        ``|sigma_i - values_i| <= errors_i``.
    signs : ndarray, shape (n_records, k)
        1; -1 where a followed branch is negative.
    branches, clusters : ndarray of int64, shape (n_records, k)
        Identities (-1: not followed), and numbers of runs of values within each other's errors.
    columns : ndarray, shape (n_records, n_columns)
        One number each, named in `COLUMNS`.
    angles : ndarray, shape (n_records, 2, k), or None
        Angles of left and right vectors to those of the reference, by index; None where vectors were
        recorded.
    block_angles : ndarray, shape (n_records, 2), or None
        Largest principal angle between the spans of all k.
    """

    errors: Table
    signs: Table
    branches: IntArray
    clusters: IntArray
    columns: Table
    angles: Table | None = None
    block_angles: Table | None = None

    def column(self, name: str) -> Table:
        """Return one of the `COLUMNS` at the records."""
        result: Table = self.columns[:, COLUMNS.index(name)]
        return result

    def check(self, i: int, n_records: int, k: int) -> None:
        """Raise unless the arrays of layer i fit the number of records and of singular values.

        Raises
        ------
        ValueError
            The message names the array.
        """
        for name in ("errors", "signs", "branches", "clusters"):
            kinds = "i" if name in ("branches", "clusters") else "f"
            check_array(getattr(self, name), f"tracking_{name}_{i}", (n_records, k), kinds, finite=False)
        if np.any(self.branches < -1) or np.any(self.clusters < -1):
            raise ValueError(f"tracking_branches_{i} or tracking_clusters_{i} is below -1")
        if not np.all(self.errors >= 0):
            raise ValueError(f"tracking_errors_{i} has values that are no bounds")
        if not np.all(np.abs(self.signs) == 1):
            raise ValueError(f"tracking_signs_{i} has other values than 1 and -1")
        check_array(self.columns, f"tracking_columns_{i}", (n_records, None), finite=False)
        if self.angles is not None:
            check_array(self.angles, f"tracking_angles_{i}", (n_records, 2, k), finite=False)
        if self.block_angles is not None:
            check_array(self.block_angles, f"tracking_block_angles_{i}", (n_records, 2), finite=False)


def list_tracking_numbers(found: TrackerRecord) -> Table:
    """Return the numbers of a tracker's record in the order of `COLUMNS`."""
    named = {"tier": TIERS, "completeness": COMPLETENESS}
    values = ((name, getattr(found, name)) for name in COLUMNS)
    return np.array([named[name].index(v) if name in named else v for name, v in values], dtype=np.float64)


def split_tracker_record(found: TrackerRecord, dtype: npt.DTypeLike) -> dict[str, npt.NDArray[Any]]:
    """Return a tracker's record as one row of each array of a `LayerTracking` without angles.

    The errors are those of singular values that are stored in this precision.
    """
    stored = found.singular_values.astype(dtype)
    return {
        "errors": found.errors + np.abs(stored - found.singular_values),
        "signs": np.where(np.signbit(found.singular_values), -1.0, 1.0),
        "branches": found.branches,
        "clusters": found.clusters,
        "columns": list_tracking_numbers(found),
    }


@dataclass(frozen=True, kw_only=True)
class RecordedSpectra(States):
    """Singular values and vectors of whole layers; empty tuples where they were not recorded.

    Attributes
    ----------
    values : tuple of ndarray, shape (n_records, k)
        Singular values, one array per layer.
    left, right : tuple of ndarray, shape (n_records, d_l, k) and (n_records, d_{l-1}, k)
        Singular vectors as columns.
    tracking : tuple of LayerTracking
        Errors, branches and clusters of `values`, one per layer.
    """

    layout: ClassVar[str] = "dense"
    has_tracker_records: ClassVar[bool] = True

    values: tuple[FloatArray, ...]
    left: tuple[FloatArray, ...]
    right: tuple[FloatArray, ...]
    tracking: tuple[LayerTracking, ...] = ()

    def singular_values(self, index: int, run: Run) -> FloatArray:
        if not self.values:
            raise ValueError(NO_VALUES)
        return self.values[index]

    def singular_value_errors(self, index: int, run: Run) -> Table:
        return self._find_tracking(index).errors

    def branches(self, index: int) -> IntArray:
        return self._find_tracking(index).branches

    def clusters(self, index: int) -> IntArray:
        return self._find_tracking(index).clusters

    def followed_values(self, index: int, run: Run) -> FloatArray:
        return self.singular_values(index, run)

    def tracking_of(self, index: int, run: Run) -> dict[str, Array]:
        found = self._find_tracking(index)
        columns: dict[str, Array] = {name: found.column(name) for name in COLUMNS}
        columns["tier"] = np.array(TIERS)[columns["tier"].astype(int)]
        columns["completeness"] = np.array(COMPLETENESS)[columns["completeness"].astype(int)]
        columns["refreshed"] = columns["refreshed"] != 0
        return columns

    def _find_tracking(self, index: int) -> LayerTracking:
        if not self.values:
            raise ValueError(NO_VALUES)
        if not self.tracking:
            raise ValueError("the trajectory was saved by a version that recorded no errors and branches")
        return self.tracking[index]

    def singular_vectors(self, index: int, side: str, record: int) -> FloatArray:
        found: FloatArray = self.vectors(side)[index][record]
        return found

    def vectors(self, side: str) -> tuple[FloatArray, ...]:
        """Return the recorded vectors of a side, one array per layer.

        Raises
        ------
        ValueError
            If there are none.
        """
        found = self.left if side == "left" else self.right
        if not found:
            raise ValueError(
                "no singular vectors were recorded: train with record=dln.Record(vectors=True), "
                "or track with vectors=True"
            )
        return found

    # ------------------------------------------------------------------------------ files and tables

    def record_arrays(self) -> Arrays:
        arrays: Arrays = {}
        self.pack(arrays, True)
        return arrays

    def replace_records(self, arrays: Arrays) -> Self:
        held: Arrays = {}
        meta = self.pack(held, True)
        found: Self = self.unpack(meta, held | arrays, {})
        return found

    def pack(self, arrays: Arrays, weights: bool) -> dict[str, Any]:
        arrays["snapshot_steps"] = self.snapshot_steps if weights else self.snapshot_steps[:0]
        meta: dict[str, Any] = {"engine": self.layout}
        for name in _LISTS:
            meta[name] = pack_list(name, getattr(self, name), arrays)
        meta["tracking"] = len(self.tracking)
        for i, layer in enumerate(self.tracking):
            for name in (*_ARRAYS, *_ANGLES):
                array = getattr(layer, name)
                if array is not None:
                    arrays[f"tracking_{name}_{i}"] = array
        return meta | {"snapshots": [], "initial": None, "final": None}

    @staticmethod
    def unpack_spectra(meta: Mapping[str, Any], arrays: Arrays) -> dict[str, Any]:
        """Return the attributes of this class, as `pack` described them."""
        tracking = tuple(
            LayerTracking(
                *(arrays[f"tracking_{name}_{i}"] for name in _ARRAYS),
                *(arrays.get(f"tracking_{name}_{i}") for name in _ANGLES),
            )
            for i in range(meta.get("tracking", 0))
        )
        return {name: unpack_list(name, meta[name], arrays) for name in _LISTS} | {"tracking": tracking}

    def check(self, run: Run) -> None:
        n_records, shapes = len(run.steps), run.shapes
        for name in (*_LISTS, "tracking"):
            self.check_layers(name, len(shapes))
        counts = []
        for i, (values, shape) in enumerate(zip(self.values, shapes, strict=False)):
            check_array(values, f"values_{i}", (n_records, None))
            counts.append(values.shape[1])
            if counts[i] > min(shape):
                raise ShapeError(f"values_{i} has {counts[i]} columns; wanted at most {min(shape)}")
        for name, axis in (("left", 0), ("right", 1)):
            for i, vectors in enumerate(getattr(self, name)):
                check_array(vectors, f"{name}_{i}", (n_records, shapes[i][axis], counts[i]))
        for i, layer in enumerate(self.tracking):
            layer.check(i, n_records, counts[i])

    def check_layers(self, name: str, n_layers: int) -> None:
        """Raise unless a list has an entry for each layer, or none.

        Raises
        ------
        ShapeError
            The message names the list.
        """
        found = getattr(self, name)
        if len(found) not in (0, n_layers):
            raise ShapeError(f"{name} holds {len(found)} layers; wanted {n_layers}, or none")

    def add_variables(self, found: LayerVariables, run: Run) -> None:
        if self.values:
            found.add(
                "singular_values", OF_VALUES, "singular values of W_l, descending", self.values.__getitem__
            )
        if self.values and self.tracking:
            self._add_tracking(found)
        if len(run.steps) and self.has_angles(run):
            self.add_angles(found, run)
        for side, unit, vectors in (("left", "row", self.left), ("right", "column", self.right)):
            if vectors:
                dims = (*OF_LAYERS, unit, "index")
                found.add(f"{side}_vectors", dims, f"{side} singular vectors", vectors.__getitem__)

    def has_angles(self, run: Run) -> bool:
        """Return whether the angles to the limit are known."""
        return bool(self.left) and run.is_rank_known

    def add_angles(self, found: LayerVariables, run: Run) -> None:
        for side in ("left", "right"):
            text = f"angles of the {side} singular vectors to the reference"
            read = partial(self.angles, side=side, reference="limit", run=run)
            found.add(f"{side}_angles", OF_VALUES, text, read, "rad")

    def _add_tracking(self, found: LayerVariables) -> None:
        layers = self.tracking
        text = "bounds on the errors of singular_values"
        found.add("singular_value_errors", OF_VALUES, text, lambda i: layers[i].errors)
        text = "identities of singular_values; -1: none"
        found.add("branches", OF_VALUES, text, lambda i: layers[i].branches)
        text = "values of one cluster share a number; -1: none"
        found.add("clusters", OF_VALUES, text, lambda i: layers[i].clusters)
        text = "-1 where a followed branch is negative"
        found.add("signs", OF_VALUES, text, lambda i: layers[i].signs)
        for name in COLUMNS:
            codes = {"tier": TIERS, "completeness": COMPLETENESS}.get(name, ())
            text = ", ".join([f"the tracker's {name}", *(f"{i}: {code}" for i, code in enumerate(codes))])
            read = partial(self._column, name=name)
            found.add(f"tracking_{name}", OF_LAYERS, text, read, "s" if name == "seconds" else "1")

    def _column(self, index: int, name: str) -> Table:
        return self.tracking[index].column(name)
