# SPDX-License-Identifier: MIT
"""Records of the trackers of several matrices, and the `Trajectory` of these records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from .. import reference as reference_measures
from .._closure.certificate import Certificate
from .._problem.factors import DenseMap, leading_factors
from .._support.arrays import FloatArray, check_count
from .._tracking.svd_tracker import DEFAULTS, SVDTracker, TrackerRecord, is_certified
from .._trajectory.layer_spectra import LayerTracking, split_tracker_record
from .._trajectory.tracked import TrackedStates
from .._trajectory.trajectory import Trajectory

#: Optional parts of a record.
_VECTORS: Final = ("left", "right")
#: Default tolerance where a Gram matrix can certify it.
_TOLERANCE: Final = 1e-3


def check_number_of_values(k: int | Literal["all"]) -> int | Literal["all"]:
    """Return k, the number of singular values of each matrix.

    Raises
    ------
    TypeError, ValueError
        For anything else than a positive integer or "all".
    """
    if k != "all" and not isinstance(k, int):
        raise TypeError(f'k is {k!r}; wanted a number of singular values, or "all"')
    return k if k == "all" else check_count(k, "k")


def make_tracker(
    shape: tuple[int, int],
    k: int | Literal["all"],
    highest_rank: int,
    *,
    is_array: bool,
    tolerance: float | None,
    seed: int,
    n_threads: int,
) -> SVDTracker:
    """Return a tracker for matrices of this shape.

    Parameters
    ----------
    shape : (int, int)
        Rows and columns.
    k : int or "all"
        Number of singular values, at most `highest_rank`.
    highest_rank : int
        Largest possible rank of the matrices.
    is_array : bool
        Whether the matrices are arrays, which a Gram matrix can certify; others are known by products.
    tolerance : float or None
        Largest error relative to the largest value; None: 1e-3 where a Gram matrix can certify it.
    seed, n_threads : int
        Settings of the tracker.
    """
    if tolerance is None:
        tolerance = _TOLERANCE if is_array and is_certified(shape) else DEFAULTS["tolerance"]
    count = highest_rank if isinstance(k, str) else min(k, highest_rank)
    return SVDTracker(count, tolerance=tolerance, seed=seed, n_threads=n_threads)


def has_own_vectors(found: TrackerRecord) -> bool:
    """Return whether singular vectors are defined: the matrix is neither zero nor a scaled isometry."""
    values = np.abs(found.singular_values)
    if not found.norm > 0:
        return False
    spread = float(np.ptp(values)) if len(values) > 1 else float(values[0])
    return bool(spread > 64 * np.sqrt(len(values)) * np.finfo(np.float32).eps * float(values[0]))


@dataclass(frozen=True)
class MatrixSpectra:
    """The records of one matrix, without its tracker.

    Attributes
    ----------
    values : ndarray, shape (n_records, k)
        Singular values.
    tracking : LayerTracking
        Their errors, branches and angles.
    left, right : ndarray, shape (n_records, m, k) and (n_records, n, k), or None
        Singular vectors as columns, if they were recorded.
    reference_step : int
        Step of the reference of the angles; -1: none.
    """

    values: FloatArray
    tracking: LayerTracking
    left: FloatArray | None
    right: FloatArray | None
    reference_step: int


@dataclass
class MatrixRecords:
    """Tracker and records of one matrix."""

    tracker: SVDTracker
    rows: dict[str, list[npt.NDArray[Any]]] = field(
        default_factory=lambda: {
            name: []
            for name in (
                "values",
                "errors",
                "signs",
                "branches",
                "clusters",
                "columns",
                "angles",
                "block_angles",
            )
        }
    )
    #: Left and right singular vectors of the first record in which they are defined, and its step.
    reference: tuple[FloatArray, FloatArray] | None = None
    reference_step: int = -1

    def append(self, found: TrackerRecord, with_vectors: bool) -> None:
        vectors = self.tracker.left_vectors, self.tracker.right_vectors
        k = len(found.singular_values)
        angles, block = np.zeros((2, k)), np.zeros(2)
        if self.reference is not None:
            for side in range(2):
                now, then = (x[side].astype(np.float64) for x in (vectors, self.reference))
                angles[side] = reference_measures.angle(now, then)
                block[side] = reference_measures.principal_angles(now, then)[-1]
        row = {
            "values": np.abs(found.singular_values),
            **split_tracker_record(found, self.dtype),
            "angles": angles,
            "block_angles": block,
        }
        if with_vectors:
            row |= dict(zip(_VECTORS, vectors, strict=True))
        for name, array in row.items():
            self.rows.setdefault(name, []).append(array)

    def drop_last(self, step: int) -> None:
        for rows in self.rows.values():
            rows.pop()
        if self.reference_step == step:
            self.reference, self.reference_step = None, -1

    def set_reference(self, found: TrackerRecord, step: int, matrix: FloatArray | None) -> None:
        """Make the vectors of this record the reference of all angles.

        They are recomputed from the matrix to full accuracy; without a matrix they are those of the tracker.
        """
        self.reference_step = step
        if found.tier == "full" or matrix is None:
            self.reference = self.tracker.left_vectors, self.tracker.right_vectors
            return
        factors = leading_factors(DenseMap(matrix), len(found.singular_values))
        self.reference = factors.U, factors.V

    def spectra(self) -> MatrixSpectra:
        fields = self.rows.keys() - {"values", *_VECTORS}
        left, right = (np.array(self.rows[side]) if side in self.rows else None for side in _VECTORS)
        return MatrixSpectra(
            values=np.array(self.rows["values"], dtype=self.dtype),
            tracking=LayerTracking(**{name: np.array(self.rows[name]) for name in fields}),
            left=left,
            right=right,
            reference_step=self.reference_step,
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        """Precision of the matrix and of its singular values."""
        assert self.tracker._dtype is not None
        return self.tracker._dtype

    def state_dict(self) -> dict[str, Any]:
        def tensor(value: Any) -> Any:
            return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value

        pair = self.reference
        return {
            "rows": {name: tensor(np.array(rows)) for name, rows in self.rows.items()},
            "reference": None if pair is None else [tensor(x) for x in pair],
            "reference_step": self.reference_step,
            "tracker": {name: tensor(value) for name, value in self.tracker.state_dict().items()},
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], n_threads: int, n_records: int) -> MatrixRecords:
        pair = state["reference"]
        for name, rows in state["rows"].items():
            if len(rows) != n_records:
                raise ValueError(f"state has {len(rows)} records of {name}; wanted {n_records}")
        return cls(
            SVDTracker.from_state_dict(state["tracker"], n_threads=n_threads),
            rows={name: list(rows.numpy()) for name, rows in state["rows"].items()},
            reference=None if pair is None else (pair[0].numpy(), pair[1].numpy()),
            reference_step=int(state["reference_step"]),
        )


def build_trajectory(
    spectra: Sequence[MatrixSpectra],
    steps: Sequence[int],
    config: Mapping[str, Any],
    reason: str,
    *,
    seconds: float,
    losses: Mapping[int, float] | None = None,
) -> Trajectory:
    """Return the records of all matrices as a trajectory with named layers.

    Parameters
    ----------
    spectra : sequence of MatrixSpectra
        One for each matrix.
    steps : sequence of int
        Steps of the records.
    config : mapping
        Settings, with the names and shapes of the layers.
    reason : str
        Text of the certificate.
    seconds : float
        Run time.
    losses : mapping of int to float, optional
        Losses by step.
    """
    pairs = sorted((losses or {}).items())
    states = TrackedStates(
        values=tuple(each.values for each in spectra),
        left=tuple(each.left for each in spectra if each.left is not None),
        right=tuple(each.right for each in spectra if each.right is not None),
        tracking=tuple(each.tracking for each in spectra),
    )
    return Trajectory(
        steps=np.array(steps, dtype=np.int64),
        loss=np.array([value for _, value in pairs], dtype=np.float64),
        loss_steps=np.array([step for step, _ in pairs], dtype=np.int64),
        states=states,
        certificate=Certificate("tracked", reason),
        problem=None,
        config={**config, "reference_steps": [each.reference_step for each in spectra]},
        wall_time=seconds,
    )
