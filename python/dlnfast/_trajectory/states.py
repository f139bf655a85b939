# SPDX-License-Identifier: MIT
"""Records of the engines: reduced states, dense states and the tracking of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .._closure.certificate import Family
from .._closure.operators import Layers
from .._support.arrays import FloatArray, IntArray
from .._support.dispatch import core
from .._tracking.svd_tracker import COMPLETENESS, TIERS, TrackerRecord

#: Outcomes of finished runs; all others were cut short.
COMPLETE = ("finished", "converged", "stopped")
#: What `LayerTracking.columns` holds.
COLUMNS: tuple[str, ...] = tuple(core.TRACKING_COLUMNS)


@dataclass(frozen=True)
class ReducedStates:
    """Records of the reduced engine: cores inside the active subspaces, scalars outside.

    Attributes
    ----------
    bases : sequence of ndarray
        A_0 .. A_L, orthonormal columns.
    cores : tuple of ndarray, shape (n_records, a_l, a_{l-1})
        C_l at the records.
    families : tuple of Family
        The directions outside, with their scalars at step 0.
    rho : ndarray, shape (n_records, n_scalars)
        Scalars at the records, those of one family after the other.
    target, input_gram : ndarray
        ``A_L^T Phi A_0`` and ``A_0^T S A_0`` (None where S = I).
    layers : Layers or None
        W_l(0); None where they were not saved.
    n_values : int or None
        How many singular values `Trajectory.singular_values` shows; None for all.
    loss_scale : float
        c.
    """

    bases: Sequence[FloatArray]
    cores: tuple[FloatArray, ...]
    families: tuple[Family, ...]
    rho: npt.NDArray[np.float64]
    target: FloatArray
    input_gram: FloatArray | None
    layers: Layers | None
    n_values: int | None
    loss_scale: float

    def scalars_of(self, layer: int) -> dict[int, int]:
        """Return which column of `rho` holds the scalar of this layer, for each family that has one."""
        columns, start = {}, 0
        for i, family in enumerate(self.families):
            if family.first <= layer <= family.last:
                columns[i] = start + layer - family.first
            start += len(family.rho)
        return columns

    def complement_of(self, layer: int) -> int:
        """Return how many singular values of this layer belong to families."""
        return sum(self.families[i].multiplicity for i in self.scalars_of(layer))


@dataclass(frozen=True)
class LayerTracking:
    """What the dense engine recorded of a layer beside its k singular values.

    Attributes
    ----------
    errors : ndarray, shape (n_records, k)
        ``|sigma_i - values_i| <= errors_i``.
    signs : ndarray, shape (n_records, k)
        1; -1 where a followed branch is negative.
    branches, clusters : ndarray of int64, shape (n_records, k)
        Identities (-1: not followed), and runs of values within each other's errors.
    columns : ndarray, shape (n_records, n_columns)
        One number each, named in `COLUMNS`.
    angles : ndarray, shape (n_records, 2, k), or None
        Of left and right vectors to those of the reference, by index; None where vectors were recorded.
    block_angles : ndarray, shape (n_records, 2), or None
        The largest principal angle between the spans of all k.
    """

    errors: npt.NDArray[np.float64]
    signs: npt.NDArray[np.float64]
    branches: IntArray
    clusters: IntArray
    columns: npt.NDArray[np.float64]
    angles: npt.NDArray[np.float64] | None = None
    block_angles: npt.NDArray[np.float64] | None = None

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """Return one of the `COLUMNS` at the records."""
        result: npt.NDArray[np.float64] = self.columns[:, COLUMNS.index(name)]
        return result


def tracking_columns(found: TrackerRecord) -> npt.NDArray[np.float64]:
    """Return the numbers of a tracker's record in the order of `COLUMNS`."""
    named = {"tier": TIERS, "completeness": COMPLETENESS}
    values = ((name, getattr(found, name)) for name in COLUMNS)
    return np.array([named[name].index(v) if name in named else v for name, v in values], dtype=np.float64)


def tracking_rows(found: TrackerRecord) -> dict[str, npt.NDArray[Any]]:
    """Return a tracker's record as one row of each array of a `LayerTracking` without angles."""
    return {
        "errors": found.errors,
        "signs": np.where(np.signbit(found.singular_values), -1.0, 1.0),
        "branches": found.branches,
        "clusters": found.clusters,
        "columns": tracking_columns(found),
    }


@dataclass(frozen=True)
class DenseStates:
    """Records of the dense engine; empty tuples where nothing was asked for.

    Attributes
    ----------
    values : tuple of ndarray, shape (n_records, k)
        Singular values, one array per layer.
    left, right : tuple of ndarray, shape (n_records, d_l, k) and (n_records, d_{l-1}, k)
        Singular vectors as columns.
    snapshots : tuple of ndarray, shape (n_snapshots, d_l, d_{l-1})
        Whole weights at `snapshot_steps`.
    initial, final : tuple of ndarray or None
        W_l at the first and last step; None where not kept.
    tracking : tuple of LayerTracking
        Errors, branches and clusters of `values`, one for each layer.
    """

    values: tuple[FloatArray, ...]
    left: tuple[FloatArray, ...]
    right: tuple[FloatArray, ...]
    snapshots: tuple[FloatArray, ...]
    snapshot_steps: IntArray
    initial: tuple[FloatArray, ...] | None
    final: tuple[FloatArray, ...] | None
    tracking: tuple[LayerTracking, ...] = ()
