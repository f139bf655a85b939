# SPDX-License-Identifier: MIT
"""`SVDTracker`: the leading singular values and vectors of a slowly changing matrix, with error bounds.

The core computes; this module checks arguments, converts records, and saves and restores the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import numpy as np
import numpy.typing as npt

from .._support.arrays import (
    LARGEST_COUNT,
    FloatArray,
    as_array,
    as_matrix,
    check_choice,
    check_count,
    check_flag,
    check_precision,
    check_scale,
    frobenius_norm,
)
from .._support.checksums import add_state_checksum, check_state_checksum
from .._support.dispatch import core
from .._support.errors import ShapeError
from .._support.file_checks import check_array, translate_part_errors
from .._support.threads import MAX_THREADS

if TYPE_CHECKING:
    from .._core import TrackerMode, TrackerSettings

#: Names of the numbers for tier and completeness in the core.
TIERS, COMPLETENESS = core.TIERS, core.COMPLETENESS
_STATE_VERSION = 1
#: Largest number of vectors in the frames of the factored form.
_FRAME_LIMIT = 64
#: Largest departure of W_0 from an isometry for the factored form, in units of eps.
_ISOMETRY = 2.0**26

#: Defaults of the tracker's settings.
DEFAULTS: Final = core.TRACKER_DEFAULTS


class Operator(Protocol):
    """A matrix that `SVDTracker.update` accesses by products, such as SciPy's ``LinearOperator``."""

    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        ...

    def matmat(self, X: Any, /) -> Any:
        """Return W X for X (n, p)."""
        ...

    def rmatmat(self, Y: Any, /) -> Any:
        """Return W^T Y for Y (m, p)."""
        ...


@dataclass(frozen=True)
class BlockAngle:
    """Principal angles between the span of the k leading vectors and that of the reference.

    Attributes
    ----------
    largest : float
        The largest principal angle, in radians.
    frobenius : float
        ``||sin Theta||_F``.
    """

    largest: float
    frobenius: float


@dataclass(frozen=True)
class TrackerRecord:
    """Results of one update of an `SVDTracker`.

    Attributes
    ----------
    update : int
        Number of the update, from 0.
    tier : str
        Method that computed the values: "factored" form, "dense" iteration, or "full" decomposition.
    completeness : str
        Whether a larger value can have been missed. "rigorous": no; "probabilistic": only with the tracker's
        probability `failure`; "none": possible, because some error exceeds `tolerance` times the largest
        value. The errors are valid bounds in each case.
    refreshed : bool
        Whether the update computed its bounds, or its vectors, from scratch.
    singular_values : ndarray, shape (k,)
        Singular values, descending; with ``signed=True``, negative after an analytic branch passed through
        zero.
    errors : ndarray, shape (k,)
        Error bounds: ``|sigma_i - |singular_values_i|| <= errors_i``, where sigma are the exact values of W
        in descending order.
    gaps : ndarray, shape (k,)
        Distance of each value to the nearest other tracked value.
    clusters : ndarray of int64, shape (k,)
        Cluster of each value: values whose gaps are within the errors share a number. Only the common
        subspace of their vectors is meaningful.
    branches : ndarray of int64, shape (k,)
        Number of the branch of each value, assigned by the overlaps of the vectors from update to update; -1
        if it is not tracked.
    left_angles, right_angles : ndarray, shape (k,)
        Angles in radians between the vectors and the reference vectors of the same branch; NaN if the
        reference has no such branch.
    left_block, right_block : BlockAngle
        Angles between the spans of all k vectors and those of the reference.
    norm : float
        ``||W||_F``; NaN if W is an operator of unknown norm.
    tail : float
        Bound on every singular value that is not reported.
    drift : float
        Bound on the change of W since the last certificate; infinity if unknown.
    vector_error : float
        Bound on ``sqrt(||sin U||_F^2 + ||sin V||_F^2)`` of the spans of the k leading vectors (Wedin); NaN if
        there is no gap between their values and the others.
    truncated : float
        Bound on the part of W that the factored form omits.
    orthogonality : float
        Largest entry of ``|U^T U - 1|`` and ``|V^T V - 1|``.
    overlap : float
        Smallest overlap of a reported pair of vectors with the previous update.
    rho, rho_spread, multiplicity : float, float, int
        Value that most directions share, if it is known, its spread, and the number of these directions.
    seconds : float
        Run time of the update.
    n_columns : int
        Number of vectors that were multiplied by W or W^T.
    """

    update: int
    tier: str
    completeness: str
    refreshed: bool
    singular_values: npt.NDArray[np.float64]
    errors: npt.NDArray[np.float64]
    gaps: npt.NDArray[np.float64]
    clusters: npt.NDArray[np.int64]
    branches: npt.NDArray[np.int64]
    left_angles: npt.NDArray[np.float64]
    right_angles: npt.NDArray[np.float64]
    left_block: BlockAngle
    right_block: BlockAngle
    norm: float
    tail: float
    drift: float
    vector_error: float
    truncated: float
    orthogonality: float
    overlap: float
    rho: float
    rho_spread: float
    multiplicity: int
    seconds: float
    n_columns: int

    @property
    def stable_rank(self) -> float:
        """``||W||_F^2 / sigma_1^2``; 0 for a matrix of zeros."""
        top = float(np.abs(self.singular_values[:1]).max(initial=0.0))
        return (self.norm / top) ** 2 if top > 0 else 0.0

    def branch(self, number: int) -> float:
        """Return the singular value of one branch; NaN if it is not among the k largest.

        Parameters
        ----------
        number : int
            Number of the branch, as in `branches`.

        Returns
        -------
        float

        Raises
        ------
        TypeError
            If `number` is not an integer.
        """
        found = np.flatnonzero(self.branches == check_count(number, "number", minimum=-LARGEST_COUNT))
        return float(self.singular_values[found[0]]) if len(found) else float("nan")


def _build_record(raw: dict[str, Any]) -> TrackerRecord:
    values = raw.pop("values") * raw.pop("signs")
    for side in ("left_block", "right_block"):
        raw[side] = BlockAngle(*raw[side])
    return TrackerRecord(singular_values=values, **raw)


def is_decomposed(shape: tuple[int, ...], k: int) -> bool:
    """Return whether a tracker of k values in mode "auto" decomposes matrices of this shape completely.

    It does if a side is not longer than the blocks of the iteration, or short enough for a Gram matrix.
    """
    return bool(min(shape) <= max(core.LARGEST_FULL_SIZE, 3 * (k + DEFAULTS["n_guards"])))


def is_certified(shape: tuple[int, ...]) -> bool:
    """Return whether a tracker with a small tolerance certifies arrays of this shape by a Gram matrix."""
    return bool(min(shape) <= core.LARGEST_CERTIFIED_SIZE)


class SVDTracker:
    r"""Track the k largest singular values of a slowly changing matrix, each with an error bound.

    Each update starts from the vectors of the previous one: one sweep of block iteration, 4 m n p flops for
    p = k + guards, instead of a decomposition. The singular values that are not tracked are bounded by the
    Frobenius norm, by Krylov spaces of random vectors, and by the change of W since the last such bound.

    Parameters
    ----------
    k : int
        Number of singular values; limited to that of all values.
    mode : {"auto", "dense", "full"}
        "auto" decomposes matrices whose smaller side is at most 128, or at most 3 (k + guards), or at most
        320 if `drift` is not passed, and iterates on larger ones. For few values it decomposes a Gram matrix,
        with errors of at most 1e-10 (single precision: 2e-6) of the largest value. "dense" always iterates,
        "full" always computes an SVD.
    tolerance : float
        Largest allowed error, relative to the largest value. If an error exceeds it, the bounds are computed
        again, and, if a value was missed, the vectors too. Random vectors cannot prove errors below 2 % at
        the edge of a bulk of values: for a smaller tolerance, matrices with a smaller side of at most 4096
        are certified by a Cholesky factorisation of their Gram matrix.
    signed : bool
        Whether to track analytic branches through zero: the value then becomes negative, and its vectors do
        not change their signs.
    guards : int
        Number of additional vectors, which are not reported; more of them make the iteration converge faster.
    refresh_every : int, optional
        Number of updates after which the bounds are computed again in any case.
    failure : float
        Probability with which a random certificate may be wrong.
    cluster_tolerance : float
        Distance, relative to the largest value, up to which values count as equal.
    max_sweeps : int
        Largest number of sweeps per update.
    seed : int
        Seed of the random vectors used for the bounds.
    n_threads : int
        Number of threads; 0 means as many as OpenMP allows.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of range or of a wrong type.

    Notes
    -----
    Errors are bounds, not estimates; with "probabilistic" completeness they may fail with probability
    `failure` per certificate. ``cpp/include/dlnfast/svd_tracker.hpp`` has the theory: Li and Li (Linear
    Algebra Appl. 395, 2005) for values from residuals, Kuczynski and Wozniakowski (SIAM J. Matrix Anal. Appl.
    13, 1992) for the norm of the complement, Weyl for drift, Wedin for the vectors.

    Cost: 4 m n (k + guards) flops for a sweep; up to five times as much more with a random certificate. For
    sides s <= l, a Gram matrix takes s^2 l flops in double precision, its Cholesky factorisation s^3 / 3.

    Memory: about 5 (k + guards) + 300 vectors of the lengths of the sides of W. There is no array of the size
    of W, except a copy to which `update_low_rank` adds, and, during an update, those of a complete
    decomposition, or a Gram matrix of 8 s^2 bytes with a tolerance below 2 %; and the copy that measures
    an unknown `drift`.

    W may have entries of any magnitude in its precision, including subnormal numbers: each update scales W to
    size 1 by a power of two, which is exact.

    Examples
    --------
    >>> import numpy as np
    >>> import dlnfast as dln
    >>> rng = np.random.default_rng(0)
    >>> W = rng.standard_normal((300, 200))
    >>> tracker = dln.SVDTracker(k=3)
    >>> record = tracker.update(W)
    >>> bool(np.all(np.abs(record.singular_values - np.linalg.svd(W)[1][:3]) <= record.errors))
    True
    """

    def __init__(
        self,
        k: int = 16,
        *,
        mode: str = "auto",
        tolerance: float = DEFAULTS["tolerance"],
        signed: bool = False,
        guards: int = DEFAULTS["n_guards"],
        refresh_every: int | None = None,
        failure: float = DEFAULTS["failure"],
        cluster_tolerance: float = DEFAULTS["cluster_tolerance"],
        max_sweeps: int = DEFAULTS["max_sweeps"],
        seed: int = 0,
        n_threads: int = 0,
    ) -> None:
        check_choice(mode, "mode", core.TRACKER_MODES)
        self.k = check_count(k, "k")
        probability = check_scale(failure, "failure", strict=True, below=1.0)
        self._settings: TrackerSettings = {
            "n_values": self.k,
            "n_guards": check_count(guards, "guards", minimum=0),
            "mode": cast("TrackerMode", mode),
            "tolerance": check_scale(tolerance, "tolerance"),
            "failure": probability,
            "max_sweeps": check_count(max_sweeps, "max_sweeps"),
            "refresh_every": 0 if refresh_every is None else check_count(refresh_every, "refresh_every"),
            "seed": check_count(seed, "seed", minimum=0),
            "cluster_tolerance": check_scale(cluster_tolerance, "cluster_tolerance"),
            "signed_values": check_flag(signed, "signed"),
        }
        self._n_threads = check_count(n_threads, "n_threads", minimum=0, maximum=MAX_THREADS)
        self._tracker: Any = None
        self._shape: tuple[int, int] | None = None
        self._dtype: np.dtype[Any] | None = None
        self._last: FloatArray | None = None  # array of the last `update`, for the factored form
        self._is_factored = False
        self._sum: _LowRankSum | None = None
        self.record: TrackerRecord | None = None
        self._n_earlier = 0  # number of updates before the state from which this tracker was restored
        self._branch_numbers: _BranchNumbers | None = None
        self._next_branch = 0  # smallest unused number of a branch

    def __repr__(self) -> str:
        """Return the number of values, the shape and precision of W, and the number of updates."""
        matrix = "no matrix yet" if self._shape is None else f"shape {self._shape}, {self._dtype}"
        return f"SVDTracker(k={self.k}, {matrix}, {self.n_updates} updates)"

    # ------------------------------------------------------------------------------------- updates

    def update(
        self, W: npt.ArrayLike | Operator, *, drift: float | None = None, squared_norm: float | None = None
    ) -> TrackerRecord:
        """Compute the singular values of W, starting from the vectors of the previous update.

        Parameters
        ----------
        W : array_like, shape (m, n), or an operator
            Matrix of float64 or float32, whose shape and precision are the same in all updates; a
            C-contiguous array or CPU tensor is not copied. Or an object with ``matmat``, ``rmatmat``,
            ``shape`` and ``dtype``.
        drift : float, optional
            Bound on ``||W - W_previous||_2``, such as the Frobenius norm. With it, the certificate of an
            earlier update stays valid as long as the sum of drifts is small; without it, each update computes
            its own. Of matrices with 2^20 entries or more, in at most 256 MiB, the tracker copies W to
            measure it, as long as that helps.
        squared_norm : float, optional
            ``||W||_F^2`` of an operator, if known; that of an array is computed.

        Returns
        -------
        TrackerRecord

        Raises
        ------
        ShapeError
            If W does not have two axes, or its shape changes.
        TypeError
            If the precision changes, or W is neither an array nor an operator.
        ValueError
            If W is not finite, or ``||W||_F`` overflows.
        """
        change = float("inf") if drift is None else check_scale(drift, "drift")
        if hasattr(W, "matmat") and hasattr(W, "rmatmat"):
            operator = cast(Operator, W)
            self._prepare(_read_shape(W), _read_dtype(W))
            norm = -1.0 if squared_norm is None else check_scale(squared_norm, "squared_norm")
            m, n = _read_shape(W)
            apply = _check_product(operator.matmat, "matmat", m)
            apply_transpose = _check_product(operator.rmatmat, "rmatmat", n)
            raw = self._tracker.update_operator(apply, apply_transpose, norm, change)
            self._last = None
        else:
            if squared_norm is not None:
                raise TypeError("squared_norm is for operators; that of an array is computed")
            matrix = as_matrix(W, "W", finite=False)
            self._prepare((matrix.shape[0], matrix.shape[1]), matrix.dtype)
            raw = self._update_array(matrix, change)
            self._last = matrix
        self._is_factored, self._sum = False, None
        return self._finish_update(raw)

    def update_low_rank(
        self, A: npt.ArrayLike, B: npt.ArrayLike, *, scale: float = 1.0, factor: float = 1.0
    ) -> TrackerRecord:
        """Compute the singular values of ``factor W + scale A B^T``, where W is that of the previous update.

        If the W of the last `update` was a scaled isometry (orthonormal columns or rows), it is tracked in
        factored form, without reading W again: O((m + n) (k + a)^2) for frames of a <= 64 vectors, to which
        an update of b new directions adds 2 b. With ``k = min(m, n)`` this gives all singular values.
        Otherwise, or if the frames exceed 64 vectors, the product is added to a copy of W, 2 m n b flops, and
        the copy is processed as by `update`.

        Parameters
        ----------
        A, B : array_like, shape (m, b) and (n, b)
            Factors of the product. A vector counts as one column.
        scale : float
            Factor of the product.
        factor : float
            Factor of W: ``1 - learning_rate * weight_decay`` for weight decay.

        Returns
        -------
        TrackerRecord

        Raises
        ------
        ShapeError
            If the factors do not fit W or each other.
        ValueError
            If there was no earlier `update` with an array.

        Notes
        -----
        The tracker refers to the array of the last `update`, which must not change in the meantime. `current`
        returns the present W. A record is at least as accurate as that of `update` with that W.
        """
        if self._last is None or self._shape is None or self._dtype is None:
            raise ValueError("update_low_rank needs an earlier update(W) with an array")
        left, right = (
            self._read_factor(x, name, size) for x, name, size in zip((A, B), "AB", self._shape, strict=True)
        )
        if len(left) != len(right):
            raise ShapeError(f"A has {len(left)} columns and B has {len(right)}; wanted equally many")
        multiplier, shrink = (
            check_scale(x, name, minimum=-np.inf) for x, name in ((scale, "scale"), (factor, "factor"))
        )
        if self._sum is None:
            self._sum = _LowRankSum(self._last)
            limit = min(_FRAME_LIMIT, *self._shape)
            _, departure, _ = self._tracker.begin_factored(self._last, limit)
            self._is_factored = departure <= _ISOMETRY * np.finfo(self._dtype).eps
        self._sum.add(shrink, multiplier, left, right)
        if self._is_factored:
            raw = self._tracker.append(shrink, multiplier, left, right)
            if raw is not None:
                return self._finish_update(raw)
            self._is_factored = False
        previous = self.record.norm if self.record is not None else float("inf")
        added = abs(multiplier) * frobenius_norm(left) * frobenius_norm(right)
        # The sum is rounded, too.
        rounding = 4 * float(np.finfo(self._dtype).eps) * (abs(shrink) * previous + added)
        change = added + abs(1.0 - shrink) * previous + rounding
        return self._finish_update(self._update_array(self._sum.collect(), change))

    def _update_array(self, matrix: FloatArray, change: float) -> dict[str, Any]:
        try:
            raw: dict[str, Any] = self._tracker.update(matrix, change)
        except ValueError:
            as_matrix(matrix, "W")  # raises with the index if an entry is not finite
            raise
        return raw

    def current(self) -> FloatArray:
        """Return the present W as a new array, in O(m n b) for b columns of low-rank updates.

        Raises
        ------
        ValueError
            If the last `update` was not with an array.
        """
        if self._last is None:
            raise ValueError("the last update was not with an array")
        return self._last.copy() if self._sum is None else self._sum.dense()

    # ------------------------------------------------------------------------------------- results

    @property
    def n_updates(self) -> int:
        """Number of updates."""
        return 0 if self.record is None else self.record.update + 1

    @property
    def n_refreshes(self) -> int:
        """Number of times that the bounds were computed again."""
        return 0 if self._tracker is None else int(self._tracker.n_refreshes)

    @property
    def left_vectors(self) -> FloatArray:
        """Left singular vectors of the last update as columns, shape (m, k)."""
        return self._vectors(left=True)

    @property
    def right_vectors(self) -> FloatArray:
        """Right singular vectors of the last update as columns, shape (n, k)."""
        return self._vectors(left=False)

    # ------------------------------------------------------------------------------------ settings

    def seed(self, right: npt.ArrayLike) -> None:
        """Start the next update from these right vectors.

        After the first gradient of a layer that was initialised as a scaled isometry, the right singular
        vectors of the gradient and ``W(0)^T`` times its left ones span the subspace that changes (arXiv
        2306.01154).

        Parameters
        ----------
        right : array_like, shape (n, any)
            Vectors as columns; they need not be orthonormal.

        Raises
        ------
        ValueError
            If there was no update yet, so that the shape is unknown.
        """
        if self._shape is None or self._dtype is None:
            raise ValueError("seed needs an earlier update, from which the shape is known")
        rows = as_matrix(right, "right", shape=(self._shape[1], None), dtype=self._dtype)
        self._tracker.seed(np.ascontiguousarray(rows.T))

    def set_reference(self, left: npt.ArrayLike | None = None, right: npt.ArrayLike | None = None) -> None:
        """Set the reference vectors of angles: these vectors, or those of the last update.

        Without this call the reference is the first update whose values are not one cluster.

        Parameters
        ----------
        left, right : array_like, shape (m, any) and (n, any), optional
            Reference vectors as columns, both or neither. Default: the vectors of the last update.

        Raises
        ------
        ValueError
            If there was no update yet, or only one of the two is passed.
        """
        if self._shape is None or self._dtype is None:
            raise ValueError("set_reference needs an earlier update")
        if (left is None) != (right is None):
            raise ValueError("set_reference needs both left and right vectors, or neither")
        if left is None or right is None:
            self._tracker.set_reference(None, None)
            return
        u = as_matrix(left, "left", shape=(self._shape[0], None), dtype=self._dtype)
        v = as_matrix(right, "right", shape=(self._shape[1], u.shape[1]), dtype=self._dtype)
        self._tracker.set_reference(np.ascontiguousarray(u.T), np.ascontiguousarray(v.T))

    # --------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which another tracker can resume: arrays and plain values.

        Returns
        -------
        dict
            State for `from_state_dict`: settings, k values and vectors. It contains neither W nor bounds; the
            next update computes new bounds.

        Raises
        ------
        ValueError
            If there was no update yet.
        """
        if self.record is None or self._shape is None or self._dtype is None:
            raise ValueError("state_dict needs an earlier update")
        state = {
            "version": _STATE_VERSION,
            "settings": dict(self._settings),
            "n_threads": self._n_threads,
            "shape": list(self._shape),
            "dtype": self._dtype.name,
            "events": self.n_updates,
            "values": np.array(self.record.singular_values),
            "branches": np.array(self.record.branches, dtype=np.int64),
            "next_branch": self._next_branch,
            "left": np.array(self.left_vectors),
            "right": np.array(self.right_vectors),
        }
        return add_state_checksum(state)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], *, n_threads: int | None = None) -> SVDTracker:
        """Return a tracker that resumes from a state.

        The next update starts from the vectors of the state. Branches keep their numbers, which are assigned
        by the overlaps of the vectors.

        Parameters
        ----------
        state : dict
            State of `state_dict`.
        n_threads : int, optional
            Number of threads. Default: that of the saved tracker.

        Returns
        -------
        SVDTracker

        Raises
        ------
        TypeError, ValueError
            If it is not a state of a tracker, was changed, or was written by a newer version.
        """
        check_state(state, "right", _STATE_VERSION)
        with translate_part_errors("state"):
            _check_parts(state)
            settings = dict(state["settings"])
            tracker = cls(
                settings["n_values"],
                mode=settings["mode"],
                tolerance=settings["tolerance"],
                signed=settings["signed_values"],
                guards=settings["n_guards"],
                refresh_every=settings["refresh_every"] or None,
                failure=settings["failure"],
                cluster_tolerance=settings["cluster_tolerance"],
                max_sweeps=settings["max_sweeps"],
                seed=settings["seed"],
                n_threads=state["n_threads"] if n_threads is None else n_threads,
            )
            if settings != tracker._settings:
                raise ValueError(f"state['settings'] is {settings}; wanted {sorted(tracker._settings)}")
        rows, columns = state["shape"]
        tracker._prepare((int(rows), int(columns)), np.dtype(state["dtype"]))
        right = as_matrix(state["right"], "state['right']", shape=(int(columns), None), dtype=tracker._dtype)
        tracker._tracker.seed(np.ascontiguousarray(right.T))
        tracker._n_earlier = int(state["events"])
        tracker._branch_numbers = _BranchNumbers(state)
        return tracker

    # ------------------------------------------------------------------------------------- helpers

    def _prepare(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        if self._shape is None:
            tracker_class = core.SvdTracker32 if dtype == np.float32 else core.SvdTracker64
            self._tracker = tracker_class(*shape, self._settings, self._n_threads)
            self._shape, self._dtype = shape, dtype
        if shape != self._shape:
            raise ShapeError(f"W has shape {shape}; wanted {self._shape}, as before")
        if dtype != self._dtype:
            raise TypeError(f"W is {dtype}; wanted {self._dtype}, as before")

    def _finish_update(self, raw: dict[str, Any]) -> TrackerRecord:
        found = _build_record(raw)
        if self._branch_numbers is not None:
            tolerance = self._settings["cluster_tolerance"]
            branches = self._branch_numbers.renumber(found, self.left_vectors, self.right_vectors, tolerance)
            found = replace(found, update=found.update + self._n_earlier, branches=branches)
        self.record = found
        self._next_branch = max(self._next_branch, int(found.branches.max(initial=-1)) + 1)
        return found

    def _vectors(self, left: bool) -> FloatArray:
        found = None if self._tracker is None else self._tracker.vectors(left)
        if found is None:
            raise ValueError("there are no singular vectors before the first update")
        vectors: FloatArray = found
        return vectors

    def _read_factor(self, x: npt.ArrayLike, name: str, size: int) -> FloatArray:
        """Convert a factor of a low-rank update; its columns become rows."""
        array = as_array(x, name)
        columns = array[:, None] if array.ndim == 1 else array
        matrix = as_matrix(columns, name, shape=(size, None), dtype=self._dtype, empty=True)
        return np.ascontiguousarray(matrix.T)


class _BranchNumbers:
    """Numbers of the branches of a restored tracker, which are those of the saved one where they continue."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.next = int(state["next_branch"])
        self._last: Mapping[str, Any] | None = state
        self._known: dict[int, int] = {}

    def renumber(
        self, found: TrackerRecord, left: FloatArray, right: FloatArray, cluster_tolerance: float
    ) -> npt.NDArray[np.int64]:
        """Return the branches of a record with the numbers of the saved tracker, or new ones."""
        if self._last is not None:
            self._match_branches(found, left, right, cluster_tolerance)
            self._last = None
        return np.array([self._number(int(branch)) for branch in found.branches], dtype=np.int64)

    def _match_branches(
        self, found: TrackerRecord, left: FloatArray, right: FloatArray, cluster_tolerance: float
    ) -> None:
        """Match the branches of the first record with those of the saved state."""
        assert self._last is not None
        last = self._last
        # A run of two records, saved and new: the core numbers the branches of the first 0, 1, .. in order.
        pairs = ((np.asarray(last["left"]), left), (np.asarray(last["right"]), right))
        lefts, rights = (
            np.ascontiguousarray(np.stack([saved.T, new.T]), dtype=np.float64) for saved, new in pairs
        )
        values = np.abs([last["values"], found.singular_values]).astype(np.float64)
        ids, clusters = (np.empty(values.shape, dtype=np.int64) for _ in range(2))
        core.follow_branches(values, lefts, rights, 0.0, cluster_tolerance, ids, clusters, n_threads=1)
        for branch, saved_index in zip(found.branches, ids[1], strict=True):
            if saved_index < len(last["branches"]) and last["branches"][saved_index] >= 0:
                self._known[int(branch)] = int(last["branches"][saved_index])

    def _number(self, branch: int) -> int:
        """Return the number of a branch of the core; new branches get the next free one."""
        if branch < 0:
            return branch
        if branch not in self._known:
            self._known[branch] = self.next
            self.next += 1
        return self._known[branch]


class _LowRankSum:
    """The matrix ``f W + sum_i c_i A_i B_i^T``: W of the user and factors, or one copy that includes them."""

    def __init__(self, base: FloatArray) -> None:
        self._base = base
        self._is_copy = False
        self._factor = 1.0
        self._clear()

    def _clear(self) -> None:
        m, n = self._base.shape
        self._left = np.empty((0, m), dtype=self._base.dtype)  # rows
        self._right = np.empty((0, n), dtype=self._base.dtype)

    def add(self, factor: float, scale: float, left: FloatArray, right: FloatArray) -> None:
        """Multiply the matrix by `factor`, and add ``scale left^T right``."""
        self._factor *= factor
        dtype = self._base.dtype.type
        self._left = np.vstack([dtype(factor) * self._left, dtype(scale) * left])
        self._right = np.vstack([self._right, right])
        if not self._is_copy and len(self._left) > 2 * min(_FRAME_LIMIT, *self._base.shape):
            self._compress()

    def dense(self) -> FloatArray:
        """Return the sum as a new array."""
        return np.asarray(self._base.dtype.type(self._factor) * self._base + self._left.T @ self._right)

    def collect(self) -> FloatArray:
        """Add the factors to the copy of W, and return the copy; later calls return the same array."""
        if not self._is_copy:
            self._base, self._is_copy = self.dense(), True
        else:
            if self._factor != 1.0:
                self._base *= self._base.dtype.type(self._factor)
            self._base += self._left.T @ self._right
        self._factor = 1.0
        self._clear()
        return self._base

    def _compress(self) -> None:
        """Reduce the factors to their numerical rank."""
        q_left, r_left = np.linalg.qr(self._left.T)
        q_right, r_right = np.linalg.qr(self._right.T)
        u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
        keep = s > np.finfo(s.dtype).eps * s[0] if len(s) else np.zeros(0, dtype=bool)
        self._left = np.ascontiguousarray((q_left @ (u[:, keep] * s[keep])).T)
        self._right = np.ascontiguousarray((q_right @ vt[keep].T).T)


def _check_parts(state: Mapping[str, Any]) -> None:
    """Raise unless the parts of a tracker's state are consistent."""
    rows, columns = (check_count(n, "state['shape']") for n in state["shape"])
    dtype = check_precision(state["dtype"], "state['dtype']")
    arrays = {name: np.asarray(state[name]) for name in ("values", "branches", "left", "right")}
    k = arrays["values"].size
    check_array(arrays["values"], "state['values']", (k,))
    check_array(arrays["branches"], "state['branches']", (k,), "i")
    for name, size in (("left", rows), ("right", columns)):
        check_array(arrays[name], f"state[{name!r}]", (size, k), dtype=dtype)
    check_count(state["events"], "state['events']", minimum=0)
    last = int(arrays["branches"].max(initial=-1))
    check_count(state["next_branch"], "state['next_branch']", minimum=last + 1)


def check_state(state: object, key: str, version: int) -> None:
    """Raise unless `state` comes from `state_dict`, has this key, is unchanged and of no newer version."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state is {type(state).__name__}; wanted a dict from state_dict")
    if "version" not in state or key not in state:
        raise ValueError(f"state has the keys {sorted(map(str, state))}; wanted a dict from state_dict")
    with translate_part_errors("state"):
        is_newer = check_count(state["version"], "state['version']") > version
    if is_newer:
        raise ValueError(f"state has version {state['version']}; this dlnfast reads up to {version}")
    check_state_checksum(state)


def _check_product(
    product: Callable[[FloatArray], Any], name: str, length: int
) -> Callable[[FloatArray], Any]:
    """Return a function that calls `product` and checks its result."""

    def multiply(X: FloatArray) -> FloatArray:
        result = as_array(product(X), f"W.{name}(X)")
        if result.dtype.kind not in "biuf":
            raise TypeError(f"W.{name}(X) has dtype {result.dtype}; wanted real numbers")
        if result.shape != (length, X.shape[1]):
            raise ShapeError(f"W.{name} returned shape {result.shape}; wanted ({length}, {X.shape[1]})")
        return result

    return multiply


def _read_shape(operator: Any) -> tuple[int, int]:
    try:
        shape = tuple(int(n) for n in operator.shape)
    except (AttributeError, TypeError, ValueError):
        raise TypeError(f"W is {type(operator).__name__} without a shape; wanted (m, n)") from None
    if len(shape) != 2 or min(shape) < 1:
        raise ShapeError(f"W has shape {shape}; wanted a matrix (2 axes) with entries")
    return shape[0], shape[1]


def _read_dtype(operator: Any) -> np.dtype[Any]:
    return check_precision(getattr(operator, "dtype", None), "W.dtype")
