# SPDX-License-Identifier: MIT
"""`Trajectory`: what a run recorded, and everything that follows from it."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from . import measures
from . import reference as plain
from ._arrays import (
    FloatArray,
    IntArray,
    as_matrix,
    check_choice,
    check_count,
    check_flag,
    check_path,
    check_scale,
    frobenius_norm,
)
from ._dispatch import core
from ._errors import ShapeError
from ._gradients import gradients
from ._stored import check_problem_metadata, check_run, naming_parts
from .checkpoint import RunFolder
from .closure import Certificate, Family, drawn_again, multiply
from .completion import Completion, Observations, Sensing
from .files import Arrays, naming_damage, read_whole, write_whole
from .implicit import ImplicitWeights
from .operators import Complement, ExplicitLayers, LayerOperator, Layers
from .problem import LowRank, Problem
from .svd_tracker import COMPLETENESS, TIERS, TrackerRecord

if TYPE_CHECKING:
    import pandas
    import xarray

FORMAT_VERSION = 1
_FORMAT = "dlnfast trajectory"
#: What grows by the step, not by the record.
SERIES = ("loss", "loss_steps", "rates")
#: Outcomes of runs that came to an end of their own.
COMPLETE = ("finished", "converged", "stopped")

#: What `LayerTracking.columns` holds.
COLUMNS: tuple[str, ...] = core.TRACKING_COLUMNS

#: Values of a reduced run that differ by less, relative to the largest, count as one cluster.
_CLUSTER_TOLERANCE = 1e-8

_NO_VALUES = "no singular values were recorded: train(..., singular_values=...)"

#: Left vectors (n, d_l, k), values (n, k) and right vectors (n, d_{l-1}, k), per record.
Spectra = tuple[FloatArray, FloatArray, FloatArray]


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


class Trajectory:
    """What a run of `train` recorded. Layers count from 1, as in the mathematics.

    Or what `dlnfast.torch.track` recorded of a model that another program trained. Its layers have names,
    which all methods take in place of numbers, and need not follow each other.

    Attributes
    ----------
    steps : ndarray of int64, shape (n_records,)
        The steps t of the records.
    loss : ndarray, shape (T + 1,)
        The loss of W(t) for every t = 0, .., T. Tracked: the losses that were reported.
    loss_steps : ndarray of int64
        The steps that they belong to.
    engine : str
        "reduced", "dense", "torch" or "sharded"; "tracked" where another program trained.
    certificate : Certificate
        Why this engine, and what was measured of its assumptions.
    config : dict
        Every setting of the run, in values that JSON knows.
    problem : Problem, Completion, Sensing or None
        What was learned.
    states : ReducedStates or DenseStates
        The raw records.
    wall_time : float
        Seconds that `train` took.
    rates : ndarray, shape (T,), or None
        What the layers' learning rates were multiplied by at each step, where they adapt.
    """

    def __init__(
        self,
        *,
        steps: IntArray,
        loss: npt.NDArray[np.float64],
        states: ReducedStates | DenseStates,
        certificate: Certificate,
        problem: Problem | Observations | None,
        config: Mapping[str, Any],
        wall_time: float,
        rates: npt.NDArray[np.float64] | None = None,
        loss_steps: IntArray | None = None,
    ) -> None:
        self.steps = steps
        self.loss = loss
        self.loss_steps = np.arange(len(loss), dtype=np.int64) if loss_steps is None else loss_steps
        self.states = states
        self.certificate = certificate
        self.problem = problem
        self.config = dict(config)
        self.wall_time = wall_time
        self.rates = rates
        self._spectra: dict[int, Spectra] = {}

    @property
    def engine(self) -> str:
        """The engine that ran."""
        return self.certificate.engine

    @property
    def widths(self) -> list[int]:
        """d_0, .., d_L."""
        if "widths" not in self.config:
            raise ValueError("the layers of a tracked model are no chain and have no widths: run.shapes")
        return list(self.config["widths"])

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of each layer's matrix."""
        if "shapes" in self.config:
            return [(int(rows), int(columns)) for rows, columns in self.config["shapes"]]
        return [(rows, columns) for columns, rows in itertools.pairwise(self.widths)]

    @property
    def layer_names(self) -> list[str]:
        """What the layers are called: names in the model, or W_1 .. W_L."""
        named: list[str] | None = self.config.get("layers")
        return list(named) if named is not None else [f"W_{i + 1}" for i in range(self.n_layers)]

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.shapes)

    @property
    def rank(self) -> int:
        """Numerical rank r of the target."""
        if self.is_tracked:
            raise ValueError("what a tracked model learns has no target whose rank is known")
        if self.problem is None:
            raise ValueError("the trajectory was saved without its problem")
        if isinstance(self.problem, Observations):
            raise ValueError("the rank of a matrix that is known in part is not known")
        return self.problem.target_factors().rank

    @property
    def is_tracked(self) -> bool:
        """Whether another program trained, and only singular values were followed."""
        return self.engine == "tracked"

    def __repr__(self) -> str:
        """Return the engine, the sizes and the extent of the run."""
        if self.is_tracked:
            last = int(self.steps[-1]) if len(self.steps) else 0
            return f"Trajectory(tracked, {self.n_layers} layers, {last} steps, {len(self.steps)} records)"
        if not len(self.loss):
            return f"Trajectory({self.engine}, widths {self.widths}, nothing recorded yet)"
        return (
            f"Trajectory({self.engine}, widths {self.widths}, {len(self.loss) - 1} steps, "
            f"{len(self.steps)} records, loss {self.loss[0]:.4g} -> {self.loss[-1]:.4g})"
        )

    # ------------------------------------------------------------------------------ singular values

    def singular_values(self, layer: int | str) -> FloatArray:
        """Return the singular values of W_l at the records, descending, with their multiplicities.

        Parameters
        ----------
        layer : int
            1 .. L.

        Returns
        -------
        ndarray, shape (n_records, k)
            k is what `train` was asked for, at most min(d_l, d_{l-1}).

        Raises
        ------
        ValueError
            For a layer out of range, or if none were recorded.

        Notes
        -----
        Reduced engine: O(n_records (r^3 + d)); for very wide layers prefer `active_singular_values` and
        `rho`, whose size does not grow with d.
        """
        index = self._index(layer)
        if isinstance(self.states, DenseStates):
            if not self.states.values:
                raise ValueError(_NO_VALUES)
            return self.states.values[index]
        if self.states.n_values == 0:
            raise ValueError(_NO_VALUES)
        active = self.active_singular_values(index + 1)
        n_all = min(self.shapes[index])
        n_wanted = n_all if self.states.n_values is None else min(self.states.n_values, n_all)
        parts = [active]
        for family, column in self.states.scalars_of(index + 1).items():
            rest = np.abs(self.states.rho[:, column : column + 1]).astype(active.dtype)
            # No more copies than can be among those that are shown.
            parts.append(np.repeat(rest, min(self.states.families[family].multiplicity, n_wanted), axis=1))
        # What neither moves nor is in a family is zero.
        missing = n_all - active.shape[1] - self.states.complement_of(index + 1)
        parts.append(np.zeros((len(active), min(max(missing, 0), n_wanted)), dtype=active.dtype))
        values = -np.sort(-np.hstack(parts), axis=1)
        return values[:, :n_wanted]

    def singular_value_errors(self, layer: int | str) -> npt.NDArray[np.float64]:
        """Return how far the recorded singular values can be from the exact ones of W_l.

        Parameters
        ----------
        layer : int
            1 .. L.

        Returns
        -------
        ndarray, shape (n_records, k)
            ``|sigma_i - values_i| <= errors_i``, in the order of `singular_values`. Reduced engine: what
            rounding the decomposition of the core may leave.

        Raises
        ------
        ValueError
            For a layer out of range, or if no singular values were recorded.
        """
        index = self._index(layer)
        if isinstance(self.states, DenseStates):
            return self._tracked(index).errors
        values = self.singular_values(layer).astype(np.float64)
        size = max(self.states.cores[index].shape[1:], default=1)
        eps = float(np.finfo(self.states.cores[index].dtype).eps)
        return np.broadcast_to(16 * eps * np.sqrt(size) * values[:, :1], values.shape).copy()

    def branches(self, layer: int | str) -> IntArray:
        """Return the identity of each singular value of W_l at each record.

        Sorted values swap places where they cross; a branch keeps its number. It is followed from record to
        record by the overlaps ``|<u_i, u'_j>| |<v_i, v'_j>|`` of the singular vectors.

        Parameters
        ----------
        layer : int
            1 .. L.

        Returns
        -------
        ndarray of int64, shape (n_records, k)
            In the order of `singular_values`; of `active_singular_values` for the reduced engine, whose other
            values share one scalar. -1 where the vectors were not followed: the dense engine does so for
            ``singular_values=k``, or with ``vectors=True``.

        Raises
        ------
        ValueError
            For a layer out of range, or if no singular values were recorded.
        """
        index = self._index(layer)
        if isinstance(self.states, DenseStates):
            return self._tracked(index).branches
        return self._followed(index)[0]

    def clusters(self, layer: int | str) -> IntArray:
        """Return which singular values of W_l cannot be told apart at each record.

        Parameters
        ----------
        layer : int
            1 .. L.

        Returns
        -------
        ndarray of int64, shape (n_records, k)
            As for `branches`. Values of one cluster share a number, 0 for the largest: the gaps between them
            are below four times their errors, or 1e-8 of the largest value. Of these only the subspace that
            their vectors span means anything.

        Raises
        ------
        ValueError
            For a layer out of range, or if no singular values were recorded.
        """
        index = self._index(layer)
        if isinstance(self.states, DenseStates):
            return self._tracked(index).clusters
        return self._followed(index)[1]

    def branch_values(self, layer: int | str) -> npt.NDArray[np.float64]:
        """Return the singular values of W_l by branch instead of by size.

        Parameters
        ----------
        layer : int
            1 .. L.

        Returns
        -------
        ndarray, shape (n_records, n_branches)
            Column b is the branch of number b in `branches`; NaN at records where it is not among those kept.

        Raises
        ------
        ValueError
            For a layer out of range, or if branches were not followed.
        """
        ids = self.branches(layer)
        if ids.size and ids.min() < 0:
            raise ValueError(
                "branches were not followed: train(..., singular_values=k), or vectors=True with all of them"
            )
        dense = isinstance(self.states, DenseStates)
        values = self.singular_values(layer) if dense else self.active_singular_values(self._index(layer) + 1)
        result = np.full((len(ids), int(ids.max(initial=-1)) + 1), np.nan)
        np.put_along_axis(result, ids, values.astype(np.float64), axis=1)
        return result

    def tracking(self, layer: int | str) -> dict[str, npt.NDArray[Any]]:
        """Return how the singular values of W_l were found at each record.

        Parameters
        ----------
        layer : int
            1 .. L.

        Returns
        -------
        dict of ndarray, shape (n_records,)
            ``tier`` ("reduced", "factored", "dense", "full"), ``completeness`` ("rigorous",
            "probabilistic", "none"), ``refreshed``, and the numbers that `TrackerRecord` explains: ``norm``,
            ``tail``, ``drift``, ``vector_error``, ``truncated``, ``orthogonality``, ``overlap``, ``rho``,
            ``rho_spread``, ``multiplicity``, ``seconds``. For the reduced engine the first three.

        Raises
        ------
        ValueError
            For a layer out of range, or if no singular values were recorded.
        """
        index = self._index(layer)
        n = len(self.steps)
        if isinstance(self.states, ReducedStates):
            return {
                "tier": np.full(n, TIERS[0]),
                "completeness": np.full(n, COMPLETENESS[2]),
                "refreshed": np.zeros(n, dtype=bool),
            }
        found = self._tracked(index)
        columns: dict[str, npt.NDArray[Any]] = {name: found.column(name) for name in COLUMNS}
        columns["tier"] = np.array(TIERS)[columns["tier"].astype(int)]
        columns["completeness"] = np.array(COMPLETENESS)[columns["completeness"].astype(int)]
        columns["refreshed"] = columns["refreshed"] != 0
        return columns

    def _tracked(self, index: int) -> LayerTracking:
        assert isinstance(self.states, DenseStates)
        if not self.states.values:
            raise ValueError(_NO_VALUES)
        if not self.states.tracking:
            raise ValueError("the trajectory was saved by a version that recorded no errors and branches")
        return self.states.tracking[index]

    def _followed(self, index: int) -> tuple[IntArray, IntArray]:
        """Return branches and clusters of the core's singular values (reduced engine)."""
        left, values, right = self._core_spectra(index)
        ids = np.empty(values.shape, dtype=np.int64)
        clusters = np.empty(values.shape, dtype=np.int64)
        # Rotated and flipped in place: copies.
        rows_left, rows_right = (
            np.array(np.swapaxes(x, 1, 2), dtype=np.float64, order="C") for x in (left, right)
        )
        core.follow_branches(
            np.ascontiguousarray(values, dtype=np.float64),
            rows_left,
            rows_right,
            0.0,
            _CLUSTER_TOLERANCE,
            ids,
            clusters,
        )
        return ids, clusters

    def energy_share(self, layer: int | str, k: int | None = None) -> npt.NDArray[np.float64]:
        r"""Return the share of ``||W_l||_F^2`` in the k largest singular values at the records.

        Of a matrix with independent entries it is about ``4 k / n``, so what is far above that is a small
        subspace. For the change of a tracked model, ``tracked.trajectory(of="change")``, it says whether
        training moved the weight in few directions.

        Parameters
        ----------
        layer : int or str
            1 .. L, or a name.
        k : int, optional
            By default all that were recorded.

        Returns
        -------
        ndarray, shape (n_records,)
            In [0, 1]; 0 for a matrix of zeros.

        Raises
        ------
        ValueError
            For a layer out of range, if fewer than k were recorded, and where the norm is not known.
        """
        values = self.singular_values(layer).astype(np.float64)
        count = values.shape[1] if k is None else check_count(k, "k", maximum=values.shape[1])
        complete = values.shape[1] == min(self.shapes[self._index(layer)])
        # In units of the largest: squares of values far from 1 may overflow or vanish.
        unit = np.where(values[:, 0] > 0, values[:, 0], 1.0)
        values = values / unit[:, None]
        norm = np.linalg.norm(values, axis=1) if complete else self.tracking(layer).get("norm")
        if norm is None or np.isnan(norm).any():
            raise ValueError("the norm of the layer was not recorded: wanted all its singular values")
        norm = norm if complete else norm / unit
        top = np.linalg.norm(values[:, :count], axis=1)
        share = np.divide(top, norm, out=np.zeros_like(top), where=norm > 0)
        result: npt.NDArray[np.float64] = np.minimum(share, 1.0) ** 2
        return result

    def active_singular_values(self, layer: int) -> FloatArray:
        """Return the singular values of W_l that belong to the active subspace (reduced engine).

        Parameters
        ----------
        layer : int
            1 .. L.

        Returns
        -------
        ndarray, shape (n_records, a)
            Descending; a is at most 2r in square networks, up to 3r in others.
        """
        self._reduced("active_singular_values")
        return self._core_spectra(self._index(layer))[1]

    def rho(self, layer: int, family: int | None = None) -> npt.NDArray[np.float64]:
        """Return the scalar of what layer l does outside the active subspaces, at the records.

        All singular values outside equal ``|rho_l|`` where the layer has one family, the usual case; see
        `families` and `multiplicity`.

        Parameters
        ----------
        layer : int
            1 .. L.
        family : int, optional
            Which of `families`. By default the first that runs through this layer: the one that sees the
            gradient, if there is one.

        Returns
        -------
        ndarray, shape (n_records,)

        Raises
        ------
        ValueError
            For the dense engine, and for a layer that is active as a whole.
        """
        states = self._reduced("rho")
        self._index(layer)
        columns = states.scalars_of(layer)
        active = states.cores[layer - 1].shape[1:]
        if not columns and active[0] < self.widths[layer] and active[1] < self.widths[layer - 1]:
            return np.zeros(len(self.steps))  # a layer that is zero there
        if not columns:
            raise ValueError(
                f"layer {layer} ({self.widths[layer]} x {self.widths[layer - 1]}) is active as a whole: "
                "there is no rho"
            )
        chosen = next(iter(columns)) if family is None else check_count(family, "family", minimum=0)
        if chosen not in columns:
            raise ValueError(f"family is {family}; those in layer {layer} are {list(columns)}")
        return states.rho[:, columns[chosen]]

    @property
    def families(self) -> tuple[Family, ...]:
        """What is outside the active subspaces (reduced engine): which layers, how often, how coupled."""
        return self._reduced("families").families

    def multiplicity(self, layer: int) -> int:
        """Return how many singular values of layer l are scalars of families (reduced engine).

        Parameters
        ----------
        layer : int
            1 .. L.

        Returns
        -------
        int
        """
        self._index(layer)
        return self._reduced("multiplicity").complement_of(layer)

    def singular_vectors(self, layer: int | str, side: str = "right", step: int = -1) -> FloatArray:
        """Return singular vectors of W_l at a record, as columns.

        Parameters
        ----------
        layer : int
            1 .. L.
        side : {"right", "left"}
            Which of them.
        step : int
            A recorded step, or -1 for the last.

        Returns
        -------
        ndarray, shape (d, k)
            Dense engine: all that were recorded. Reduced engine: those of the active subspace, in the
            order of `active_singular_values`; O(d r^2).
        """
        index, record, part = self._index(layer), self._record(step), _side(side)
        if isinstance(self.states, DenseStates):
            recorded: FloatArray = self._recorded_vectors(side)[index][record]
            return recorded
        basis = self.states.bases[index + 1 if part == 0 else index]
        return np.asarray(basis @ self._core_spectra(index)[part][record])

    # --------------------------------------------------------------------------------------- angles

    def angles(
        self, layer: int | str, side: str = "right", reference: str | npt.ArrayLike = "limit"
    ) -> npt.NDArray[np.float64]:
        r"""Return the angles between the singular vectors of W_l and reference vectors.

        The first r and the last r vectors (the last K, where the last layer is wide with K rows) are compared
        one by one; those between, which share a singular value, get the largest principal angle of their
        block, repeated. With the reduced engine they are ordered within the active subspace, the block in
        the middle.

        Parameters
        ----------
        layer : int
            1 .. L.
        side : {"right", "left"}
            Angles of the v_i or of the u_i.
        reference : {"limit", "first_step"} or array_like, shape (d, k)
            "limit": the singular vectors for t -> 0+, which exist although those of a scaled rotation W(0)
            are arbitrary (for any other W(0): its own singular vectors). "first_step": those after one
            step, with the angle 0 at step 0, as the authors of arXiv 2306.01154 plot them. Or given ones.

        Returns
        -------
        ndarray, shape (n_records, k)
            Radians, in [0, pi/2], accurate to rounding at both ends.

        Raises
        ------
        ValueError
            If the dense engine recorded no vectors (``train(..., vectors=True)``), or step 1 is not among
            the records for "first_step".
        """
        index = self._index(layer)
        part = _side(side)
        if isinstance(self.states, ReducedStates):
            return self._reduced_angles(self.states, index, part, reference)
        return self._dense_angles(self.states, index, side, reference)

    def active_angles(
        self, layer: int, side: str = "right", reference: str = "limit"
    ) -> npt.NDArray[np.float64]:
        """Return the angles of the active subspace's singular vectors alone (reduced engine).

        What `angles` returns without its middle block, whose vectors never move: a table whose size does not
        grow with d.

        Parameters
        ----------
        layer, side : int, str
            As for `angles`.
        reference : {"limit", "first_step"}
            As for `angles`.

        Returns
        -------
        ndarray, shape (n_records, a)
            Radians, in the order of `active_singular_values`.
        """
        states = self._reduced("active_angles")
        return self._active_angles(states, self._index(layer), _side(side), reference)

    def _active_angles(
        self, states: ReducedStates, index: int, part: int, reference: str
    ) -> npt.NDArray[np.float64]:
        vectors = self._core_spectra(index)[part].astype(np.float64)
        start = 0
        if isinstance(reference, str) and reference == "first_step":
            chosen, start = vectors[self._record(1)], 1
        elif _named(reference) and self._is_isometry(states.cores[index][0]):
            chosen, start = self._limit_in_core(states, index)[part], 1
        else:
            chosen = vectors[0]
        result = np.zeros((len(vectors), vectors.shape[2]))
        for i in range(start, len(vectors)):
            result[i] = plain.angle(vectors[i], chosen)
        return result

    def _reduced_angles(
        self, states: ReducedStates, index: int, part: int, reference: str | npt.ArrayLike
    ) -> npt.NDArray[np.float64]:
        vectors = self._core_spectra(index)[part].astype(np.float64)
        n_records, _, n_active = vectors.shape
        n_top = min(self.rank, n_active)
        n_middle = states.complement_of(index + 1)
        result = np.zeros((n_records, n_active + n_middle))
        outer = np.r_[:n_top, n_top + n_middle : n_active + n_middle]
        if isinstance(reference, str):
            result[:, outer] = self._active_angles(states, index, part, reference)
            return result
        frame = states.bases[index + 1 if part == 0 else index].astype(np.float64)
        given = as_matrix(reference, "reference", shape=(len(frame), n_active + n_middle), dtype=np.float64)
        for i, inner in enumerate(vectors):
            result[i, outer] = plain.angle(frame @ inner, given[:, outer])
        if n_middle:
            # The block is the complement of the active subspace, whatever the step.
            result[:, n_top : n_top + n_middle] = plain.principal_angles(frame, given[:, outer])[-1]
        return result

    def _dense_angles(
        self, states: DenseStates, index: int, side: str, reference: str | npt.ArrayLike
    ) -> npt.NDArray[np.float64]:
        if self.is_tracked:
            return self._tracked_angles(index, _side(side) == 2, reference)
        vectors = self._recorded_vectors(side)[index].astype(np.float64)
        n_records, dim, k = vectors.shape
        start = 0
        if not isinstance(reference, str):
            chosen = as_matrix(reference, "reference", shape=(dim, k), dtype=np.float64)
        elif reference == "first_step":
            chosen, start = vectors[self._record(1)], 1
        elif _named(reference) and states.initial is not None and self._is_isometry(states.initial[index]):
            chosen, start = self._limit_of_weights(states, index, side)[:, :k], 1
        else:
            chosen = vectors[0]
        n_top = min(self.rank, k)
        # Below the middle: as many as rise, but with a wide last layer all K of its rows pull some down.
        falling = self.widths[-1] if self.widths[-1] < self.widths[0] else self.rank
        n_bottom = min(falling, k - n_top) if k == min(self.shapes[index]) else 0
        result = np.zeros((n_records, k))
        for i in range(start, n_records):
            result[i] = _block_angles(vectors[i], chosen, n_top, n_bottom)
        return result

    def _tracked_angles(
        self, index: int, right: bool, reference: str | npt.ArrayLike
    ) -> npt.NDArray[np.float64]:
        found = self._tracked(index).angles
        if not (isinstance(reference, str) and reference == "limit") or found is None:
            raise ValueError('a tracked run has angles to its own reference only: reference="limit"')
        angles: npt.NDArray[np.float64] = found[:, int(right)]
        return angles

    def block_angles(self, layer: int | str, side: str = "right") -> npt.NDArray[np.float64]:
        """Return the angle between the span of the k leading vectors and the reference's (tracked models).

        Parameters
        ----------
        layer : int or str
            1 .. L, or a name.
        side : {"right", "left"}
            The span of the v_i or of the u_i.

        Returns
        -------
        ndarray, shape (n_records,)
            The largest principal angle, radians, to the first record whose values are not one cluster.

        Raises
        ------
        ValueError
            For a run of `train`, whose vectors are recorded.
        """
        found = self._tracked(self._index(layer)).block_angles if self.is_tracked else None
        if found is None:
            raise ValueError("block_angles belongs to tracked models; this run has angles(layer, side)")
        angles: npt.NDArray[np.float64] = found[:, int(_side(side) == 2)]
        return angles

    def subspace_cosines(
        self, layer: int | str, rank: int | None = None, side: str = "left", step: int = -1
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Return how well the leading singular subspaces at the records agree with that of one record.

        Parameters
        ----------
        layer : int or str
            1 .. L, or a name.
        rank : int, optional
            Dimension of the subspaces; by default all vectors that were recorded.
        side : {"left", "right"}
            Of the u_i or of the v_i.
        step : int
            The record to compare with, or -1 for the last.

        Returns
        -------
        dict of str to ndarray, shape (n_records,)
            ``minimum``, ``mean``, ``maximum``, ``overlap`` and ``baseline`` of `measures.subspace_cosine`.

        Raises
        ------
        ValueError
            If no vectors, or fewer than `rank`, were recorded.

        Notes
        -----
        Cost: O(n_records d rank^2).
        """
        last = self.singular_vectors(layer, side, step)
        count = last.shape[1] if rank is None else check_count(rank, "rank", maximum=last.shape[1])
        found = [
            measures.subspace_cosine(self.singular_vectors(layer, side, int(at))[:, :count], last[:, :count])
            for at in self.steps
        ]
        return {
            name: np.array([getattr(cosine, name) for cosine in found])
            for name in measures.SubspaceCosine._fields
        }

    def ranks(
        self, threshold: float = 0.01, *, step: int = -1, relative_to: Literal["all", "layer"] = "all"
    ) -> dict[str, int]:
        """Return how many singular values of each layer are above a threshold, at a record.

        Parameters
        ----------
        threshold : float
            Relative to the largest singular value.
        step : int
            A recorded step, or -1 for the last.
        relative_to : {"all", "layer"}
            The largest of all layers, so that one that hardly moved has rank 0, or of each layer.

        Returns
        -------
        dict of str to int
            By the names of the layers.

        Raises
        ------
        ValueError
            If more values may be above the threshold than were recorded.
        """
        level = check_scale(threshold, "threshold")
        check_choice(relative_to, "relative_to", ("all", "layer"))
        record = self._record(step)
        names = self.layer_names
        values = [self.singular_values(i + 1)[record].astype(np.float64) for i in range(len(names))]
        largest = max(float(v[0]) for v in values)
        found = {}
        for i, (name, v) in enumerate(zip(names, values, strict=True)):
            least = level * (largest if relative_to == "all" else float(v[0]))
            found[name] = int(np.sum(v > least))
            if found[name] == len(v) < min(self.shapes[i]) and self._rest(i, record, v) > least:
                raise ValueError(
                    f"layer {name} may have more than the {len(v)} recorded singular values above "
                    f"{threshold:g} of the largest: record more (k)"
                )
        return found

    def _rest(self, index: int, record: int, values: npt.NDArray[np.float64]) -> float:
        """Return a bound on the singular values that were not recorded."""
        norm = self.tracking(index + 1).get("norm")
        if norm is None or not np.isfinite(norm[record]):
            return math.inf
        rounding = len(values) * float(np.finfo(self.singular_values(index + 1).dtype).eps)
        whole = float(norm[record])
        if whole == 0.0:
            return 0.0
        share = float(np.sum((values / whole) ** 2))
        return whole * math.sqrt(max(1.0 - share - rounding, 0.0))

    def _limit_in_core(self, states: ReducedStates, index: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        cores = [core[0].astype(np.float64) for core in states.cores]
        gram = None if states.input_gram is None else states.input_gram.astype(np.float64)
        gradient = plain.gradients(cores, states.target.astype(np.float64), gram, states.loss_scale)[index]
        left, right = plain.limit_vectors(cores[index], gradient, _scale(cores[index]))
        return left, np.empty(0), right

    def _limit_of_weights(self, states: DenseStates, index: int, side: str) -> FloatArray:
        assert self.problem is not None
        assert states.initial is not None
        gradient = gradients(self.problem, states.initial)[index].astype(np.float64)
        weight = states.initial[index].astype(np.float64)
        return plain.limit_vectors(weight, gradient, _scale(weight))[0 if side == "left" else 1]

    @staticmethod
    def _is_isometry(weight: FloatArray) -> bool:
        scale = _scale(weight)
        if scale == 0.0:
            return False
        small = weight if weight.shape[0] <= weight.shape[1] else weight.T
        departure = multiply(small, small, transpose_b=True) / scale**2 - np.eye(len(small))
        return bool(np.abs(departure).max() < 1024 * np.finfo(weight.dtype).eps)

    # -------------------------------------------------------------------------------------- weights

    def weights(self, layer: int, step: int = -1) -> FloatArray:
        r"""Return W_l at a recorded step.

        Parameters
        ----------
        layer : int
            1 .. L.
        step : int
            The reduced engine has every recorded step; the dense one has the first, the last and what
            ``weights_every`` kept. -1 is the last.

        Returns
        -------
        ndarray, shape (d_l, d_{l-1})
            Reduced engine: ``A_l C_l A_{l-1}^T`` plus the scaled rest of W_l(0); O(d^2 a), or O(L d^3) for a
            layer with several families whose scalars differ. See `layer` for products without the array.

        Raises
        ------
        ValueError
            If that step was not kept.
        """
        index = self._index(layer)
        if isinstance(self.states, DenseStates):
            return self._kept_weights(self.states, index, step)
        return self._operator(self.states, layer, step).dense()

    def all_weights(self, step: int = -1) -> list[FloatArray]:
        """Return ``W_1 .. W_L`` at a recorded step.

        Parameters
        ----------
        step : int
            As for `weights`.

        Returns
        -------
        list of ndarray
            As `train` takes them; each costs what `weights` costs.

        Raises
        ------
        ValueError
            If that step was not kept.
        """
        return [self.weights(layer, step) for layer in range(1, self.n_layers + 1)]

    def layer(self, layer: int, step: int = -1) -> LayerOperator:
        """Return W_l at a recorded step as an operator (reduced engine): products, columns, rows, entries.

        Parameters
        ----------
        layer : int
            1 .. L.
        step : int
            A recorded step, or -1 for the last.

        Returns
        -------
        LayerOperator
            ``run.layer(2) @ X``, ``.apply_transpose(Y)``, ``.column(j)``, ``.row(i)``, ``.entry(i, j)``. No
            d x d array is formed.

        Raises
        ------
        ValueError
            For the dense engine, whose `weights` are arrays, or if that step was not recorded.
        """
        self._index(layer)
        return self._operator(self._reduced("layer"), layer, step)

    def _operator(self, states: ReducedStates, layer: int, step: int) -> LayerOperator:
        record = self._record(step)
        if states.layers is None:
            raise ValueError("the trajectory was saved without its initial weights: save(path, weights=True)")
        rho = {i: float(states.rho[record, column]) for i, column in states.scalars_of(layer).items()}
        cores = states.cores[layer - 1]
        return LayerOperator(self._complement(states), layer, cores[record], cores[0], rho)

    def _complement(self, states: ReducedStates) -> Complement:
        assert states.layers is not None
        eigen = None if self.problem is None else self.problem.gram_eigen
        return Complement(states.layers, states.bases, states.families, eigen)

    def end_to_end(self, step: int = -1) -> FloatArray:
        """Return ``W_{L:1} = W_L .. W_1`` at a recorded step; O(L d^3), or O(L K d^2) for a thin end.

        Parameters
        ----------
        step : int
            As for `weights`; -1 is the last.

        Returns
        -------
        ndarray, shape (d_L, d_0)
        """
        chain = self.all_weights(step)
        if self.widths[-1] <= self.widths[0]:
            result = chain[-1]
            for weight in reversed(chain[:-1]):
                result = multiply(result, weight)
            return result
        result = chain[0]
        for weight in chain[1:]:
            result = multiply(weight, result)
        return result

    def features(self, layer: int, X: npt.ArrayLike | None = None, step: int = -1) -> FloatArray:
        """Return ``Z_l = W_l .. W_1 X`` at a recorded step.

        Parameters
        ----------
        layer : int
            0 .. L; 0 is X itself.
        X : array_like, shape (d_0, N), optional
            Inputs in the problem's coordinates; by default the problem's own.
        step : int
            As for `weights`.

        Returns
        -------
        ndarray, shape (d_l, N)
            Costs what `weights` costs for each layer, and a product with it: O(d^2 N).

        Raises
        ------
        ShapeError
            For an X that does not fit.
        ValueError
            For a layer outside 0 .. L, a step that was not recorded, and no X where the problem holds none.
        """
        depth = check_count(layer, "layer", minimum=0)
        if X is None:
            X = None if self.problem is None else self.problem.inputs
            if X is None:
                raise ValueError(
                    "X is needed: the problem holds no inputs (a file keeps no samples; new ones go through "
                    "problem.transform)"
                )
        dtype = np.dtype(self.config["dtype"])
        result = as_matrix(X, "X", shape=(self.widths[0], None), dtype=dtype)
        for i in range(1, depth + 1):
            if isinstance(self.states, ReducedStates) and isinstance(self.states.layers, ImplicitWeights):
                result = self.layer(i, step) @ result
            else:
                result = multiply(self.weights(i, step), result)
        return result

    def _kept_weights(self, states: DenseStates, index: int, step: int) -> FloatArray:
        if self.is_tracked:
            raise ValueError("a tracked run keeps no weights: the model has them")
        if not len(self.loss) and step:
            raise ValueError("the run has recorded nothing yet; step 0 has the weights that it starts from")
        last = len(self.loss) - 1
        wanted = last if check_count(step, "step", minimum=-1) == -1 else step
        if wanted == last and states.final is not None:
            return states.final[index]
        if wanted == 0 and states.initial is not None:
            return states.initial[index]
        place = int(np.searchsorted(states.snapshot_steps, wanted))
        if place < len(states.snapshot_steps) and states.snapshot_steps[place] == wanted:
            snapshot: FloatArray = states.snapshots[index][place]
            return snapshot
        kept = {int(s) for s in states.snapshot_steps}
        kept |= {0} if states.initial is not None else set()
        kept |= {last} if states.final is not None else set()
        raise ValueError(
            f"step is {wanted}, but the weights were kept at {_listed(sorted(kept))} only: "
            "train(..., weights_every=...)"
        )

    # ----------------------------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str], *, weights: bool = True) -> None:
        """Write the run to one .npz file (arrays and JSON, no pickle); the file appears whole or not at all.

        Parameters
        ----------
        path : path
            Written as it is; no ending is added.
        weights : bool
            Keep whole weight matrices. Without them a reduced run still has everything but `weights`,
            `layer`, `end_to_end` and `features`.

        Raises
        ------
        FileNotFoundError
            If the folder does not exist.
        """
        place = check_path(path, "path")
        about, arrays = self.to_arrays(weights=check_flag(weights, "weights"))
        write_whole(place, _FORMAT, FORMAT_VERSION, about, arrays)

    def to_arrays(self, *, weights: bool = True) -> tuple[dict[str, Any], Arrays]:
        """Return the run as values that JSON knows, and arrays: what `save` writes.

        Parameters
        ----------
        weights : bool
            Whether with whole weights.

        Returns
        -------
        about : dict
            What JSON can hold.
        arrays : dict of str to ndarray
            The rest.
        """
        arrays: Arrays = {"steps": self.steps, "loss": self.loss}
        if self.rates is not None:
            arrays["rates"] = self.rates
        if self.is_tracked:
            arrays["loss_steps"] = self.loss_steps
        about = {
            "config": self.config,
            "certificate": self.certificate.to_dict(),
            "wall_time": self.wall_time,
            "problem": pack_problem(self.problem, arrays),
        }
        if isinstance(self.states, ReducedStates):
            about["states"] = _pack_reduced(self.states, arrays, weights)
        else:
            about["states"] = _pack_dense(self.states, arrays, weights)
        return about, arrays

    @classmethod
    def from_arrays(
        cls, about: Mapping[str, Any], arrays: Arrays, problem: Problem | Observations | None = None
    ) -> Trajectory:
        """Return the run that `to_arrays` took apart; with the problem that is given, or the one it has.

        Parameters
        ----------
        about, arrays : mapping
            What `to_arrays` returned.
        problem : Problem, Completion or Sensing, optional
            What was learned.

        Returns
        -------
        Trajectory

        Raises
        ------
        ValueError
            If an array or an entry is missing, or does not fit the others; the message names it.
        """
        readers: dict[str, Callable[..., ReducedStates | DenseStates]]
        readers = {"reduced": _unpack_reduced, "dense": _unpack_dense}
        with naming_parts("it"):
            if problem is None and about["problem"] is not None:
                config = about["config"]
                check_problem_metadata(about["problem"], config, arrays)
                problem = _unpack_problem(about["problem"], arrays, config.get("problem", {}))
            law = about["states"].get("law")
            if law is not None and law["widths"] != about["config"]["widths"]:
                raise ShapeError("the widths of lazily sampled weights are not those of the run")
            run = cls(
                steps=arrays["steps"],
                loss=arrays["loss"],
                states=readers[about["states"]["engine"]](about["states"], arrays),
                certificate=Certificate.from_dict(about["certificate"]),
                problem=problem,
                config=about["config"],
                wall_time=about["wall_time"],
                rates=arrays.get("rates"),
                loss_steps=arrays.get("loss_steps"),
            )
        check_run(run)
        return run

    def to_xarray(self, variables: Sequence[str] | None = None) -> xarray.Dataset:
        """Return what was recorded as an xarray.Dataset, with named dimensions, coordinates and attributes.

        Parameters
        ----------
        variables : sequence of str, optional
            Which of the variables; by default all that the run has.

        Returns
        -------
        xarray.Dataset
            `export` says what is in it.

        Raises
        ------
        ModuleNotFoundError
            Without xarray.
        ValueError
            For a variable that the run does not have.
        """
        from .export import to_xarray

        return to_xarray(self, variables)

    def to_dataframe(self) -> pandas.DataFrame:
        """Return the records as a pandas.DataFrame, a row for every singular value of every layer and record.

        Returns
        -------
        pandas.DataFrame
            Columns ``step``, ``layer`` (from 1), ``layer_name``, ``index`` (of the value, from 0) and those
            variables of `to_xarray` that belong to a value or to a layer: ``singular_values``,
            ``singular_value_errors``, angles, branches, what the tracker measured. ``loss`` and ``rates`` are
            those of the record's step, NaN where none is known; the losses of all steps are in `loss`. A run
            without singular values has a row for every layer and record.

        Raises
        ------
        ModuleNotFoundError
            Without pandas.

        Notes
        -----
        ``to_xarray().to_dataframe()``, xarray's own, has a row for every combination of all dimensions, so
        that losses of every step, vectors or weights multiply the rows of all else.
        """
        from .export import to_dataframe

        return to_dataframe(self)

    # --------------------------------------------------------------------------------------- helpers

    def _index(self, layer: int | str) -> int:
        if isinstance(layer, str) and self.is_tracked:
            names = self.layer_names
            if layer not in names:
                raise ValueError(f"layer is {layer!r}; wanted 1 to {self.n_layers} or one of {names}")
            return names.index(layer)
        number = check_count(layer, "layer")
        if number > self.n_layers:
            raise ValueError(f"layer is {number}; wanted 1 to {self.n_layers}")
        return number - 1

    def _record(self, step: int) -> int:
        if not len(self.steps):
            raise ValueError("the run has recorded nothing yet")
        if check_count(step, "step", minimum=-1) == -1:
            return len(self.steps) - 1
        found = int(np.searchsorted(self.steps, step))
        if found == len(self.steps) or self.steps[found] != step:
            raise ValueError(
                f"step is {step}, which is not among the recorded steps {_listed(list(self.steps))}"
            )
        return found

    def _reduced(self, what: str) -> ReducedStates:
        if isinstance(self.states, ReducedStates):
            return self.states
        every = "; every engine has singular_values(layer)"
        raise ValueError(f"{what} belongs to the reduced engine{every}. This run: {self.certificate}")

    def _recorded_vectors(self, side: str) -> tuple[FloatArray, ...]:
        assert isinstance(self.states, DenseStates)
        vectors = self.states.left if _side(side) == 0 else self.states.right
        if not vectors:
            raise ValueError("no singular vectors were recorded: train or track with vectors=True")
        return vectors

    def _core_spectra(self, index: int) -> Spectra:
        """Return the singular vectors and values of a layer's cores at all records; computed once."""
        assert isinstance(self.states, ReducedStates)
        if index not in self._spectra:
            left, values, right_t = np.linalg.svd(self.states.cores[index], full_matrices=False)
            self._spectra[index] = left, values, np.swapaxes(right_t, 1, 2)
        return self._spectra[index]


def load(path: str | os.PathLike[str], *, every: int = 1) -> Trajectory:
    """Read a run that `Trajectory.save` wrote, or what a run has written to its checkpoint's folder so far.

    Parameters
    ----------
    path : path
        The file, or the folder.
    every : int
        Hold every so-many-th record and snapshot of the weights only, from the first, and the last of both.
        The loss is held at every step.

    Returns
    -------
    Trajectory
        With its problem: its whitening, layout, classes and numbers, but without the samples that it was made
        from. ``problem.transform`` takes new inputs as before; ``problem.inputs``, ``outputs`` and ``labels``
        are None.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is not such a run, is damaged, or was written by a newer version.

    Notes
    -----
    Memory, for a folder: what the run was asked for (problem and W(0)), 8 bytes per step (16 where the
    learning rate adapts), the records that are held, and one of its files. `export` holds no more than the
    first and the last of these.
    """
    interval = check_count(every, "every")
    place = check_path(path, "path")
    if place.is_dir():
        return load_folder(RunFolder(place), every=interval)
    run = _from_file(place, *read_whole(place, _FORMAT, FORMAT_VERSION))
    return run if interval == 1 else with_records(run, joined(list(thinned([grown_arrays(run)], interval))))


def load_folder(
    folder: RunFolder, problem: Problem | Observations | None = None, every: int = 1
) -> Trajectory:
    """Return what a run has written to its folder so far, with every so-many-th record."""
    run = begun(folder, problem)
    parts = list(thinned(folder.records(), every))
    if not parts:
        return run
    with naming_damage(folder.path, _FORMAT):
        run = with_records(run, joined(parts))
        check_run(run)
    return run


def begun(folder: RunFolder, problem: Problem | Observations | None = None) -> Trajectory:
    """Return the run of a folder without its records."""
    about, arrays = folder.request()
    run, states = dict(about["run"]), dict(about["run"]["states"])
    ending = folder.ending()  # before the records are looked for: then all of them are there
    run["config"] = run["config"] | {"outcome": "unfinished" if ending is None else ending["outcome"]}
    if ending is not None:
        run["wall_time"] = ending["seconds"]
    if states["engine"] == "dense" and ending is not None and ending["outcome"] in COMPLETE:
        state = folder.newest()
        if state is None or state.step != ending["step"]:
            raise ValueError(
                f"{folder.path} has no state of its last step, {ending['step']}, that can be read; without "
                "end.json the run goes on from what there is"
            )
        final = state.arrays
        n_layers = len(states["initial"])
        arrays |= {f"final_{i}": final[f"weight_{i}"] for i in range(n_layers)}
        states["final"] = [True] * n_layers
    return _from_file(folder.path, run | {"states": states}, arrays, problem)


def grown_arrays(run: Trajectory) -> Arrays:
    """Return all that grows while a run goes on, under the names that it has in files."""
    series = {"loss": run.loss, "loss_steps": run.loss_steps, "rates": run.rates}
    found = {name: array for name, array in series.items() if array is not None}
    return record_arrays(run.states) | {"steps": run.steps} | found


def with_records(run: Trajectory, arrays: Arrays) -> Trajectory:
    """Return a run with other `grown_arrays`; what is not among them is empty."""
    states: ReducedStates | DenseStates
    if isinstance(run.states, ReducedStates):
        cores = tuple(arrays[f"core_{i}"] for i in range(run.n_layers))
        states = replace(run.states, cores=cores, rho=arrays["rho"])
    else:
        held: Arrays = {}
        about = _pack_dense(run.states, held, True)
        states = _unpack_dense(about, held | arrays)
    return Trajectory(
        steps=arrays["steps"],
        loss=arrays["loss"],
        states=states,
        certificate=run.certificate,
        problem=run.problem,
        config=run.config,
        wall_time=run.wall_time,
        rates=arrays.get("rates"),
        loss_steps=arrays.get("loss_steps"),
    )


def thinned(parts: Iterable[Arrays], every: int) -> Iterator[Arrays]:
    """Yield the parts with every so-many-th record and snapshot, from the first, and the last of both.

    The parts are emptied: two of them need not fit the memory.
    """
    if every == 1:
        yield from parts
        return
    seen: dict[str, int] = {}
    last: Arrays = {}
    for part in parts:
        kept = {}
        for name, array in part.items():
            if name in SERIES:
                kept[name], last[name] = array, array[:0].copy()
                continue
            place = seen.get(name, 0)
            seen[name] = place + len(array)
            kept[name] = array[-place % every :: every].copy()  # a view would hold the part
            if len(array):
                last[name] = array[-1:].copy() if (seen[name] - 1) % every else array[:0].copy()
            else:
                last.setdefault(name, array)
        part.clear()
        array = np.empty(0)  # the last one goes, too
        yield kept
    if any(map(len, last.values())):
        yield last


def joined(parts: Sequence[Arrays]) -> Arrays:
    """Return the arrays of all parts, one after the other, and empty the parts: nothing is held twice."""
    return {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}


def _from_file(
    path: Path, about: Mapping[str, Any], arrays: Arrays, problem: Problem | Observations | None = None
) -> Trajectory:
    with naming_damage(path, _FORMAT):
        return Trajectory.from_arrays(about, arrays, problem)


def record_arrays(states: ReducedStates | DenseStates) -> Arrays:
    """Return what grows while a run goes on, under the names that it has in files."""
    arrays: Arrays = {}
    if isinstance(states, ReducedStates):
        arrays["rho"] = states.rho
        _pack_list("core", states.cores, arrays)
        return arrays
    _pack_dense(replace(states, initial=None, final=None), arrays, True)
    return arrays


def _pack_list(
    name: str, items: Sequence[FloatArray | None] | None, arrays: dict[str, npt.NDArray[Any]]
) -> list[bool] | None:
    """Put the items beside the others, and return which of them are there."""
    if items is None:
        return None
    for i, item in enumerate(items):
        if item is not None:
            arrays[f"{name}_{i}"] = item
    return [item is not None for item in items]


def _unpack_list(name: str, present: list[bool] | None, arrays: dict[str, npt.NDArray[Any]]) -> Any:
    if present is None:
        return None
    return tuple(arrays[f"{name}_{i}"] if there else None for i, there in enumerate(present))


def _pack_reduced(
    states: ReducedStates, arrays: dict[str, npt.NDArray[Any]], weights: bool
) -> dict[str, Any]:
    arrays["rho"] = states.rho
    arrays["core_target"] = states.target
    if states.input_gram is not None:
        arrays["core_gram"] = states.input_gram
    held = states.layers.weights if isinstance(states.layers, ExplicitLayers) and weights else None
    law = states.layers.describe() if isinstance(states.layers, ImplicitWeights) else None
    return {
        "engine": "reduced",
        "law": law,
        "bases": _pack_list("basis", None if law else states.bases, arrays),
        "cores": _pack_list("core", states.cores, arrays),
        "initial": _pack_list("initial", held, arrays),
        "families": [asdict(family) for family in states.families],
        "n_values": states.n_values,
        "loss_scale": states.loss_scale,
    }


def _unpack_reduced(meta: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> ReducedStates:
    initial = _unpack_list("initial", meta["initial"], arrays)
    layers: Layers | None = None if initial is None else ExplicitLayers(initial)
    bases = _unpack_list("basis", meta["bases"], arrays)
    if meta["law"] is not None:
        layers, bases = drawn_again(meta["law"], arrays["target_U"], arrays["target_V"])
    return ReducedStates(
        bases=bases,
        cores=_unpack_list("core", meta["cores"], arrays),
        families=tuple(Family(**{**f, "rho": tuple(f["rho"])}) for f in meta["families"]),
        rho=arrays["rho"],
        target=arrays["core_target"],
        input_gram=arrays.get("core_gram"),
        layers=layers,
        n_values=meta["n_values"],
        loss_scale=meta["loss_scale"],
    )


_DENSE_LISTS = ("values", "left", "right")
_TRACKING_ARRAYS = ("errors", "signs", "branches", "clusters", "columns")
_TRACKED_ANGLES = ("angles", "block_angles")


def _pack_dense(states: DenseStates, arrays: dict[str, npt.NDArray[Any]], weights: bool) -> dict[str, Any]:
    arrays["snapshot_steps"] = states.snapshot_steps if weights else states.snapshot_steps[:0]
    meta: dict[str, Any] = {"engine": "dense"}
    for name in _DENSE_LISTS:
        meta[name] = _pack_list(name, getattr(states, name), arrays)
    meta["tracking"] = len(states.tracking)
    for i, layer in enumerate(states.tracking):
        for name in (*_TRACKING_ARRAYS, *_TRACKED_ANGLES):
            array = getattr(layer, name)
            if array is not None:
                arrays[f"tracking_{name}_{i}"] = array
    meta["snapshots"] = _pack_list("snapshots", states.snapshots if weights else (), arrays)
    meta["initial"] = _pack_list("initial", states.initial if weights else None, arrays)
    meta["final"] = _pack_list("final", states.final if weights else None, arrays)
    return meta


def _unpack_dense(meta: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> DenseStates:
    lists = {
        name: _unpack_list(name, meta[name], arrays)
        for name in (*_DENSE_LISTS, "snapshots", "initial", "final")
    }
    tracking = tuple(
        LayerTracking(
            *(arrays[f"tracking_{name}_{i}"] for name in _TRACKING_ARRAYS),
            *(arrays.get(f"tracking_{name}_{i}") for name in _TRACKED_ANGLES),
        )
        for i in range(meta.get("tracking", 0))
    )
    return DenseStates(snapshot_steps=arrays["snapshot_steps"], tracking=tracking, **lists)


def _pack_target(target: LowRank | FloatArray, arrays: dict[str, npt.NDArray[Any]]) -> None:
    if isinstance(target, LowRank):
        arrays["target_U"], arrays["target_s"], arrays["target_V"] = target.U, target.s, target.V
    else:
        arrays["target"] = target


def _unpack_target(arrays: dict[str, npt.NDArray[Any]]) -> Any:
    if "target_U" in arrays:
        return LowRank(arrays["target_U"], arrays["target_s"], arrays["target_V"])
    return arrays.get("target")


def _pack_observations(problem: Observations, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    if problem.truth is not None:
        _pack_target(problem.truth, arrays)
    arrays |= problem.to_arrays()
    return {"loss_scale": problem.loss_scale, "kind": type(problem).__name__, "shape": problem.shape}


def _unpack_observations(
    meta: dict[str, Any], arrays: dict[str, npt.NDArray[Any]], description: Mapping[str, Any]
) -> Observations:
    kinds: dict[str, type[Completion | Sensing]] = {"Completion": Completion, "Sensing": Sensing}
    problem: Observations = kinds[meta["kind"]].from_arrays(
        arrays, tuple(meta["shape"]), loss_scale=meta["loss_scale"], truth=_unpack_target(arrays)
    )
    problem._restore(description)
    return problem


def pack_problem(
    problem: Problem | Observations | None, arrays: dict[str, npt.NDArray[Any]]
) -> dict[str, Any] | None:
    """Put what the problem holds beside the other arrays, and return what else defines it."""
    if problem is None:
        return None
    if isinstance(problem, Observations):
        return _pack_observations(problem, arrays)
    _pack_target(problem.target, arrays)
    if problem.input_gram is not None:
        arrays["input_gram"] = problem.input_gram
    if problem.whitening is not None and problem.whitening.matrix is not None:
        arrays["whitening"] = problem.whitening.matrix
    if problem.input_mean is not None:
        arrays["input_mean"] = problem.input_mean
    if problem.classes is not None:
        arrays["classes"] = problem.classes
    return {
        "loss_scale": problem.loss_scale,
        "output_norm_squared": problem.output_norm_squared,
        "loss_floor": problem.loss_floor,
    }


def _unpack_problem(
    meta: dict[str, Any], arrays: dict[str, npt.NDArray[Any]], description: Mapping[str, Any]
) -> Problem | Observations:
    if "kind" in meta:
        return _unpack_observations(meta, arrays, description)
    problem = Problem(
        _unpack_target(arrays),
        arrays.get("input_gram"),
        meta["loss_scale"],
        output_norm_squared=meta["output_norm_squared"],
    )
    problem._restore(description, meta.get("loss_floor"), arrays)
    return problem


def _side(side: str) -> int:
    """Return where the vectors of a side stand in a decomposition (U, values, V)."""
    check_choice(side, "side", ("left", "right"))
    return 0 if side == "left" else 2


def _named(reference: str) -> bool:
    if not isinstance(reference, str) or reference != "limit":
        raise ValueError(f'reference is {reference!r}; wanted "limit", "first_step" or an array')
    return True


def _scale(weight: FloatArray) -> float:
    return frobenius_norm(weight) / float(np.sqrt(max(min(weight.shape), 1)))


def _block_angles(vectors: FloatArray, chosen: FloatArray, n_top: int, n_bottom: int) -> FloatArray:
    """Return vector-by-vector angles at both ends and the middle block's largest principal angle."""
    if vectors.shape != chosen.shape:
        raise ShapeError(f"reference has shape {chosen.shape}; wanted {vectors.shape}")
    k = vectors.shape[1]
    angles = plain.angle(vectors, chosen)
    if n_top + n_bottom < k:
        middle = slice(n_top, k - n_bottom)
        angles[middle] = plain.principal_angles(vectors[:, middle], chosen[:, middle])[-1]
    return angles


def _listed(values: Sequence[Any]) -> str:
    numbers = [int(v) for v in values]
    if len(numbers) <= 8:
        return str(numbers)
    return f"[{numbers[0]}, {numbers[1]}, {numbers[2]}, .., {numbers[-1]}]"
