# SPDX-License-Identifier: MIT
"""States of the dense engines: recorded spectra, and whole weights at some steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from .._support.arrays import FloatArray, IntArray, as_matrix, check_count
from .._support.file_checks import check_array
from .._support.files import Arrays
from .angles import compute_limit, is_limit, is_scaled_isometry, measure_block_angles
from .layer_spectra import COLUMNS, LayerTracking, RecordedSpectra
from .packing import check_matrices, check_steps, pack_list, unpack_list
from .states import Run, Table, find_record, shorten_steps
from .variables import WEIGHT_STEP, Array, LayerVariables


@dataclass(frozen=True, kw_only=True)
class DenseStates(RecordedSpectra):
    """Records of an engine that holds whole layers; empty tuples where nothing was asked for.

    Attributes
    ----------
    values, left, right, tracking : tuple
        See `RecordedSpectra`.
    snapshots : tuple of ndarray, shape (n_snapshots, d_l, d_{l-1})
        Whole weights at `snapshot_steps`.
    snapshot_steps : ndarray of int64
        Steps of the snapshots.
    initial, final : tuple of ndarray or None
        W_l at the first and last step; None where they were not recorded.
    """

    has_final_weights: ClassVar[bool] = True

    snapshots: tuple[FloatArray, ...]
    snapshot_steps: IntArray = field()
    initial: tuple[FloatArray, ...] | None
    final: tuple[FloatArray, ...] | None
    #: Gradients at `initial`, once they were needed. `replace` starts with none.
    _initial_gradients: list[FloatArray] = field(default_factory=list, init=False, repr=False, compare=False)

    def angles(self, index: int, side: str, reference: str | npt.ArrayLike, run: Run) -> Table:
        vectors = self.vectors(side)[index].astype(np.float64)
        _, dim, k = vectors.shape
        start = 0
        if not isinstance(reference, str):
            chosen = as_matrix(reference, "reference", shape=(dim, k), dtype=np.float64)
        elif reference == "first_step":
            chosen, start = vectors[find_record(run.steps, 1)], 1
        elif is_limit(reference) and self.initial is not None and is_scaled_isometry(self.initial[index]):
            if not self._initial_gradients:
                self._initial_gradients.extend(run._gradients(self.initial))
            gradient = self._initial_gradients[index].astype(np.float64)
            chosen = compute_limit(self.initial[index].astype(np.float64), gradient, side)[:, :k]
            start = 1
        else:
            chosen = vectors[0]
        n_top = min(run.rank, k)
        # Below the middle: as many as rise, but with a wide last layer all K of its rows pull some down.
        n_falling = run.widths[-1] if run.widths[-1] < run.widths[0] else run.rank
        n_bottom = min(n_falling, k - n_top) if k == min(run.shapes[index]) else 0
        return measure_block_angles(vectors, chosen, start, n_top, n_bottom)

    # -------------------------------------------------------------------------------------- weights

    def weights(self, index: int, step: int, run: Run) -> FloatArray:
        if not len(run.loss) and step:
            raise ValueError("the run has recorded nothing yet; step 0 has the weights that it starts from")
        last = len(run.loss) - 1
        wanted = last if check_count(step, "step", minimum=-1) == -1 else step
        if wanted == last and self.final is not None:
            return self.final[index]
        if wanted == 0 and self.initial is not None:
            return self.initial[index]
        position = int(np.searchsorted(self.snapshot_steps, wanted))
        if position < len(self.snapshot_steps) and self.snapshot_steps[position] == wanted:
            snapshot: FloatArray = self.snapshots[index][position]
            return snapshot
        known = {int(s) for s in self.snapshot_steps}
        known |= {0} if self.initial is not None else set()
        known |= {last} if self.final is not None else set()
        raise ValueError(
            f"step is {wanted}, but the weights were recorded at {shorten_steps(sorted(known))} only: "
            "record=dln.Record(weights_every=...)"
        )

    def initial_weights(self) -> Any:
        return self.initial

    def replace_initial_weights(self, weights: Any) -> Self:
        return replace(self, initial=tuple(weights))

    def enclose(self, first: FloatArray, last: FloatArray, run: Run) -> Self:
        n_values = self.values[0].shape[1] if self.values else 0
        n_records, n_snapshots = len(run.steps), len(self.snapshot_steps)
        outer = [_record_still_layer(layer, n_records, n_snapshots, n_values) for layer in (first, last)]
        changes: dict[str, Any] = {}
        for name in ("values", "left", "right", "snapshots", "tracking"):
            inner = getattr(self, name)
            changes[name] = (outer[0][name], *inner, outer[1][name]) if inner else ()
        for name in ("initial", "final"):
            weights = getattr(self, name)
            changes[name] = None if weights is None else (first, *weights, last)
        return replace(self, **changes)

    # ------------------------------------------------------------------------------ files and tables

    def record_arrays(self) -> Arrays:
        arrays: Arrays = {}
        replace(self, initial=None, final=None).pack(arrays, True)
        return arrays

    def pack(self, arrays: Arrays, weights: bool) -> dict[str, Any]:
        meta = super().pack(arrays, weights)
        meta["snapshots"] = pack_list("snapshots", self.snapshots if weights else (), arrays)
        meta["initial"] = pack_list("initial", self.initial if weights else None, arrays)
        meta["final"] = pack_list("final", self.final if weights else None, arrays)
        return meta

    @classmethod
    def unpack(cls, meta: Mapping[str, Any], arrays: Arrays, config: Mapping[str, Any]) -> Self:
        weights = {name: unpack_list(name, meta[name], arrays) for name in ("snapshots", "initial", "final")}
        spectra = cls.unpack_spectra(meta, arrays)
        return cls(snapshot_steps=arrays["snapshot_steps"], **spectra, **weights)

    @classmethod
    def add_final_weights(cls, meta: dict[str, Any], arrays: Arrays, final: Arrays) -> None:
        weights = [final[f"weight_{i}"] for i in range(len(meta["initial"]))]
        meta["final"] = pack_list("final", weights, arrays)

    def check(self, run: Run) -> None:
        super().check(run)
        shapes = run.shapes
        self.check_layers("snapshots", len(shapes))
        check_steps(self.snapshot_steps, "snapshot_steps", len(run.loss) - 1)
        for i, snapshots in enumerate(self.snapshots):
            check_array(snapshots, f"snapshots_{i}", (len(self.snapshot_steps), *shapes[i]))
        for name in ("initial", "final"):
            if getattr(self, name) is not None:
                check_matrices(getattr(self, name), name, shapes)

    def add_variables(self, found: LayerVariables, run: Run) -> None:
        super().add_variables(found, run)
        if self.snapshots:
            dims = (WEIGHT_STEP, "layer", "row", "column")
            found.add("weights", dims, "W_l, the weights", self.snapshots.__getitem__)


def _record_still_layer(layer: FloatArray, n_records: int, n_snapshots: int, n_values: int) -> dict[str, Any]:
    """Return the records of a layer that does not move, under the names of the fields of `DenseStates`."""
    u, s, vt = np.linalg.svd(layer, full_matrices=False)
    k = min(n_values, len(s))

    def repeat(x: Array, count: int = n_records) -> Array:
        return np.broadcast_to(x, (count, *x.shape))

    error = 16 * float(np.finfo(layer.dtype).eps) * s[:k]
    return {
        "values": repeat(s[:k]),
        "left": repeat(u[:, :k]),
        "right": repeat(vt[:k].T),
        "snapshots": repeat(layer, n_snapshots),
        "tracking": LayerTracking(
            repeat(error.astype(np.float64)),
            repeat(np.ones(k)),
            repeat(np.arange(k)),
            repeat(np.zeros(k, dtype=np.int64)),
            repeat(np.zeros(len(COLUMNS))),
        ),
    }
