# SPDX-License-Identifier: MIT
"""`SVDTracker`: the leading singular values and vectors of a matrix that drifts, with error bounds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import numpy as np
import numpy.typing as npt

from ._arrays import (
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
from ._dispatch import core
from ._errors import ShapeError
from ._stored import check_array, naming_parts
from ._threads import MAX_THREADS

if TYPE_CHECKING:
    from ._core import TrackerMode, TrackerSettings

#: Names of the numbers that the core writes as tier and completeness.
TIERS, COMPLETENESS = core.TIERS, core.COMPLETENESS
_STATE_VERSION = 1
#: Frames of the factored form hold at most so many vectors.
_FRAME_LIMIT = 64
#: How far W_0 may be from an isometry for the factored form, in units of the precision's epsilon.
_ISOMETRY = 2.0**26

#: Defaults of the tracker's settings.
DEFAULTS: Final = core.TRACKER_DEFAULTS


class Operator(Protocol):
    """What `SVDTracker.update` takes in place of an array; SciPy's ``LinearOperator`` is one."""

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
    """Between the span of the k leading vectors and the reference's.

    Attributes
    ----------
    largest : float
        The largest principal angle, radians.
    frobenius : float
        ``||sin Theta||_F``.
    """

    largest: float
    frobenius: float


@dataclass(frozen=True)
class TrackerRecord:
    """What one event of a `SVDTracker` found.

    Attributes
    ----------
    event : int
        0, 1, ..
    tier : str
        "factored", "dense" or "full": what the values were computed from.
    completeness : str
        Whether the bounds rule out that a larger value was missed: "rigorous"; "probabilistic", but for the
        tracker's `failure`; "none" where some error exceeds `tolerance` times the largest value. The errors
        hold in each case.
    refreshed : bool
        Whether the event built its bounds anew, or its vectors.
    singular_values : ndarray, shape (k,)
        Descending; with ``signed=True`` negative where an analytic branch went through zero.
    errors : ndarray, shape (k,)
        ``|sigma_i - |singular_values_i|| <= errors_i``, sigma the exact ones of W in descending order.
    gaps : ndarray, shape (k,)
        Distance to the nearest other value that is tracked.
    clusters : ndarray of int64, shape (k,)
        Values whose gaps are within the errors share an id; of these only the common subspace means anything.
    branches : ndarray of int64, shape (k,)
        Identity from event to event, by the overlaps of the vectors, whatever the order; -1: not followed.
    left_angles, right_angles : ndarray, shape (k,)
        Radians between the vectors and the reference vectors of the same branch; NaN where the reference has
        none.
    left_block, right_block : BlockAngle
        The same for the spans of all k.
    norm : float
        ``||W||_F``; NaN where only products are known.
    tail : float
        Bound on every singular value that is not reported.
    drift : float
        Bound on how far W has moved since the last certificate; infinity where unknown.
    vector_error : float
        Bound on ``sqrt(||sin U||_F^2 + ||sin V||_F^2)`` of the k leading vectors together (Wedin); NaN where
        they do not stand clear of the rest.
    truncated : float
        Bound on what the factored form left out of W.
    orthogonality : float
        Largest entry of ``|U^T U - 1|`` and ``|V^T V - 1|``.
    overlap : float
        Least overlap of a reported pair of vectors with the event before.
    rho, rho_spread, multiplicity : float, float, int
        The value that most directions share, where it is known, its spread, and their number.
    seconds : float
        Time that the event took.
    n_columns : int
        How many vectors were multiplied by W or W^T.
    """

    event: int
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
        """Return the singular value of one branch; NaN where it is not among the k largest.

        Parameters
        ----------
        number : int
            As in `branches`.

        Returns
        -------
        float

        Raises
        ------
        TypeError
            For what is no integer.
        """
        found = np.flatnonzero(self.branches == check_count(number, "number", minimum=-LARGEST_COUNT))
        return float(self.singular_values[found[0]]) if len(found) else float("nan")


def _record(raw: dict[str, Any]) -> TrackerRecord:
    values = raw.pop("values") * raw.pop("signs")
    for side in ("left_block", "right_block"):
        raw[side] = BlockAngle(*raw[side])
    return TrackerRecord(singular_values=values, **raw)


#: Smaller sides up to which mode "auto" decomposes a matrix as a whole, whatever k is.
_DECOMPOSED: Final = 128


def is_decomposed(shape: tuple[int, ...], k: int) -> bool:
    """Tell whether a tracker of k values decomposes such a matrix as a whole, unless told otherwise.

    It does where a side is as short as the blocks that it would work with.
    """
    return bool(min(shape) <= max(_DECOMPOSED, 3 * (k + DEFAULTS["n_guards"])))


class SVDTracker:
    r"""Follow the k largest singular values of a matrix from event to event, each with an error bound.

    The vectors of one event start the next: one sweep of block iteration, 4 m n p flops for p = k + guards,
    instead of a decomposition. How large anything can be that is not tracked is bounded apart from that: by
    the Frobenius norm, by Krylov spaces from random vectors, and by how far W has moved.

    Parameters
    ----------
    k : int
        How many singular values; at most all of them.
    mode : {"auto", "dense", "full"}
        "auto" decomposes matrices whose smaller side is at most 128, or at most 3 (k + guards), as a whole,
        and iterates on the others. "dense" always iterates, "full" always decomposes.
    tolerance : float
        Relative to the largest value: where an error exceeds this, the bounds (and, if something was missed,
        the vectors) are built anew.
    signed : bool
        Follow analytic branches through zero: a value is negative after it, and its vectors do not turn.
    guards : int
        Further vectors that are kept but not reported; more of them converge faster.
    refresh_every : int, optional
        Build the bounds anew after so many events in any case.
    failure : float
        Probability with which one of the random certificates may be wrong.
    cluster_tolerance : float
        Relative to the largest value: values closer than this count as equal.
    max_sweeps : int
        Sweeps per event at most.
    seed : int
        Of the random vectors.
    n_threads : int
        0: as many as OpenMP allows.

    Raises
    ------
    ValueError, TypeError
        For settings out of their range.

    Notes
    -----
    Errors are bounds, not estimates; with "probabilistic" completeness they may fail with probability
    `failure` per certificate. The theory stands in ``cpp/include/dlnfast/svd_tracker.hpp``: Li and Li (Linear
    Algebra Appl. 395, 2005) for values from residuals, Kuczynski and Wozniakowski (SIAM J. Matrix Anal. Appl.
    13, 1992) for the norm of the rest, Weyl for drift, Wedin for the vectors.

    Memory: about 5 (k + guards) + 300 vectors of the lengths of W's sides; no array of W's size, but for a
    copy of it where `update_low_rank` adds to one, or where W is decomposed.

    W may be of any size that its precision can hold, subnormal numbers included: an event is computed in
    units in which W is of size 1, powers of two, which are exact.

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
        self._last: FloatArray | None = None  # W at the last event, for the factored form
        self._factored = False
        self._sum: _LowRankSum | None = None
        self.record: TrackerRecord | None = None
        self._before = 0  # events of the tracker that this one goes on from
        self._names: _Names | None = None
        self._next_branch = 0  # what no branch has been called

    def __repr__(self) -> str:
        """Return what is tracked, and the last event."""
        what = "nothing yet" if self._shape is None else f"shape {self._shape}, {self._dtype}"
        return f"SVDTracker(k={self.k}, {what}, {self.n_events} events)"

    # ------------------------------------------------------------------------------------- events

    def update(
        self, W: npt.ArrayLike | Operator, *, drift: float | None = None, squared_norm: float | None = None
    ) -> TrackerRecord:
        """Find the singular values of W, starting from those of the event before.

        Parameters
        ----------
        W : array_like, shape (m, n), or an operator
            float64 or float32, of one shape and precision from event to event; a C-contiguous array or CPU
            tensor is not copied. Or anything with ``matmat``, ``rmatmat``, ``shape`` and ``dtype``.
        drift : float, optional
            A bound on ``||W - W_before||_2`` (the Frobenius norm is one). With it the certificate of an
            earlier event stays good for as long as the sum of drifts is small; without it each event needs
            its own.
        squared_norm : float, optional
            ``||W||_F^2`` of an operator, where it is known; that of an array is computed.

        Returns
        -------
        TrackerRecord

        Raises
        ------
        ShapeError
            If W is no matrix, or its shape changes.
        TypeError
            For another precision than before, or a W that is neither an array nor an operator.
        ValueError
            If W is not finite, or ``||W||_F`` is beyond the largest number.
        """
        moved = float("inf") if drift is None else check_scale(drift, "drift")
        if hasattr(W, "matmat") and hasattr(W, "rmatmat"):
            operator = cast(Operator, W)
            self._begin(_shape_of(W), _precision(W))
            norm = -1.0 if squared_norm is None else check_scale(squared_norm, "squared_norm")
            m, n = _shape_of(W)
            raw = self._tracker.update_operator(
                _checked(operator.matmat, "matmat", m), _checked(operator.rmatmat, "rmatmat", n), norm, moved
            )
            self._last = None
        else:
            if squared_norm is not None:
                raise TypeError("squared_norm is for operators; that of an array is computed")
            matrix = as_matrix(W, "W", finite=False)
            self._begin((matrix.shape[0], matrix.shape[1]), matrix.dtype)
            raw = self._update_array(matrix, moved)
            self._last = matrix
        self._factored, self._sum = False, None
        return self._finish(raw)

    def update_low_rank(
        self, A: npt.ArrayLike, B: npt.ArrayLike, *, scale: float = 1.0, factor: float = 1.0
    ) -> TrackerRecord:
        """Find the singular values of ``factor W + scale A B^T``, W that of the event before.

        If the W of the last `update` was a scaled isometry (orthonormal columns or rows), it is then followed
        in factored form: O((m + n) (k + a)^2) for frames of a <= 64 vectors, of which b new directions take
        2 b, without reading W again, and ``k = min(m, n)`` gives all singular values. Otherwise, or where the
        frames outgrow 64, the update is added to a copy of W, 2 m n b flops, which `update` then takes.

        Parameters
        ----------
        A, B : array_like, shape (m, b) and (n, b)
            Factors of the update. A vector counts as one column.
        scale, factor : float
            ``factor = 1 - learning_rate * weight_decay`` for weight decay.

        Returns
        -------
        TrackerRecord

        Raises
        ------
        ShapeError
            If the factors do not fit W or each other.
        ValueError
            If there was no `update` with an array before.

        Notes
        -----
        The tracker refers to the array of the last `update`, which must not change meanwhile; `current`
        returns the W that is meant, and a record is never less exact than `update` of that.
        """
        if self._last is None or self._shape is None or self._dtype is None:
            raise ValueError("update_low_rank needs an earlier update(W) with an array")
        left, right = (
            self._factor(x, name, size) for x, name, size in zip((A, B), "AB", self._shape, strict=True)
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
            self._factored = departure <= _ISOMETRY * np.finfo(self._dtype).eps
        self._sum.add(shrink, multiplier, left, right)
        if self._factored:
            raw = self._tracker.append(shrink, multiplier, left, right)
            if raw is not None:
                return self._finish(raw)
            self._factored = False
        before = self.record.norm if self.record is not None else float("inf")
        added = abs(multiplier) * frobenius_norm(left) * frobenius_norm(right)
        # Adding them rounds, too.
        rounding = 4 * float(np.finfo(self._dtype).eps) * (abs(shrink) * before + added)
        moved = added + abs(1.0 - shrink) * before + rounding
        return self._finish(self._update_array(self._sum.collect(), moved))

    def _update_array(self, matrix: FloatArray, moved: float) -> dict[str, Any]:
        try:
            raw: dict[str, Any] = self._tracker.update(matrix, moved)
        except ValueError:
            as_matrix(matrix, "W")  # says where W is not finite, if that is it
            raise
        return raw

    def current(self) -> FloatArray:
        """Return W as it is after the events so far, a new array; O(m n (columns of the updates)).

        Raises
        ------
        ValueError
            If the last `update` was not with an array.
        """
        if self._last is None:
            raise ValueError("the last update was not with an array")
        return self._last.copy() if self._sum is None else self._sum.dense()

    # ------------------------------------------------------------------------------ what was found

    @property
    def n_events(self) -> int:
        """Events so far."""
        return 0 if self.record is None else self.record.event + 1

    @property
    def n_refreshes(self) -> int:
        """How often the bounds were built anew."""
        return 0 if self._tracker is None else int(self._tracker.n_refreshes)

    @property
    def left_vectors(self) -> FloatArray:
        """Left singular vectors of the last event as columns, shape (m, k)."""
        return self._vectors(left=True)

    @property
    def right_vectors(self) -> FloatArray:
        """Right singular vectors of the last event as columns, shape (n, k)."""
        return self._vectors(left=False)

    # ------------------------------------------------------------------------------------ settings

    def seed(self, right: npt.ArrayLike) -> None:
        """Start the next event from these right vectors.

        After the first gradient of a layer that started as a scaled rotation, its right singular vectors and
        ``W(0)^T`` times its left ones span what will move (arXiv 2306.01154).

        Parameters
        ----------
        right : array_like, shape (n, any)
            Not necessarily orthonormal.

        Raises
        ------
        ValueError
            Before the first event, when the shape is not known.
        """
        if self._shape is None or self._dtype is None:
            raise ValueError("seed needs an earlier event, which tells the shape")
        rows = as_matrix(right, "right", shape=(self._shape[1], None), dtype=self._dtype)
        self._tracker.seed(np.ascontiguousarray(rows.T))

    def set_reference(self, left: npt.ArrayLike | None = None, right: npt.ArrayLike | None = None) -> None:
        """Measure angles to given vectors, or to those of the last event.

        By default the reference is the first event whose values are not one cluster.

        Parameters
        ----------
        left, right : array_like, shape (m, any) and (n, any), optional
            Both or neither; columns.

        Raises
        ------
        ValueError
            Before the first event, or if only one of the two is given.
        """
        if self._shape is None or self._dtype is None:
            raise ValueError("set_reference needs an earlier event")
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
        """Return what another tracker needs to go on from the last event: arrays and plain values.

        Returns
        -------
        dict
            For `from_state_dict`. k values and vectors; W is not kept, nor are bounds: the next event builds
            its own.

        Raises
        ------
        ValueError
            Before the first event.
        """
        if self.record is None or self._shape is None or self._dtype is None:
            raise ValueError("state_dict needs an earlier event")
        state = {
            "version": _STATE_VERSION,
            "settings": dict(self._settings),
            "n_threads": self._n_threads,
            "shape": list(self._shape),
            "dtype": self._dtype.name,
            "events": self.n_events,
            "values": np.array(self.record.singular_values),
            "branches": np.array(self.record.branches, dtype=np.int64),
            "next_branch": self._next_branch,
            "left": np.array(self.left_vectors),
            "right": np.array(self.right_vectors),
        }
        return with_state_checksum(state)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], *, n_threads: int | None = None) -> SVDTracker:
        """Return a tracker that goes on where another one was.

        The next event starts from its vectors; branches keep their numbers, by the overlaps of the vectors.

        Parameters
        ----------
        state : dict
            What `state_dict` returned.
        n_threads : int, optional
            By default what the other one had.

        Returns
        -------
        SVDTracker

        Raises
        ------
        TypeError, ValueError
            If it is no such state, was changed, or a newer version wrote it.
        """
        check_state(state, "right", _STATE_VERSION)
        with naming_parts("state"):
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
        tracker._begin((int(rows), int(columns)), np.dtype(state["dtype"]))
        right = as_matrix(state["right"], "state['right']", shape=(int(columns), None), dtype=tracker._dtype)
        tracker._tracker.seed(np.ascontiguousarray(right.T))
        tracker._before = int(state["events"])
        tracker._names = _Names(state)
        return tracker

    # ------------------------------------------------------------------------------------- helpers

    def _begin(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        if self._shape is None:
            made = core.SvdTracker32 if dtype == np.float32 else core.SvdTracker64
            self._tracker = made(*shape, self._settings, self._n_threads)
            self._shape, self._dtype = shape, dtype
        if shape != self._shape:
            raise ShapeError(f"W has shape {shape}; wanted {self._shape}, as before")
        if dtype != self._dtype:
            raise TypeError(f"W is {dtype}; wanted {self._dtype}, as before")

    def _finish(self, raw: dict[str, Any]) -> TrackerRecord:
        found = _record(raw)
        if self._names is not None:
            tolerance = self._settings["cluster_tolerance"]
            branches = self._names.of(found, self.left_vectors, self.right_vectors, tolerance)
            found = replace(found, event=found.event + self._before, branches=branches)
        self.record = found
        self._next_branch = max(self._next_branch, int(found.branches.max(initial=-1)) + 1)
        return found

    def _vectors(self, left: bool) -> FloatArray:
        found = None if self._tracker is None else self._tracker.vectors(left)
        if found is None:
            raise ValueError("there are no singular vectors before the first event")
        vectors: FloatArray = found
        return vectors

    def _factor(self, x: npt.ArrayLike, name: str, size: int) -> FloatArray:
        """Return a factor with its columns as rows."""
        array = as_array(x, name)
        columns = array[:, None] if array.ndim == 1 else array
        matrix = as_matrix(columns, name, shape=(size, None), dtype=self._dtype, empty=True)
        return np.ascontiguousarray(matrix.T)


class _Names:
    """What the branches of a tracker are called that goes on from another one."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.next = int(state["next_branch"])
        self._last: Mapping[str, Any] | None = state
        self._known: dict[int, int] = {}

    def of(
        self, found: TrackerRecord, left: FloatArray, right: FloatArray, cluster_tolerance: float
    ) -> npt.NDArray[np.int64]:
        """Return the branches of a record under the names that they had before, or new ones."""
        if self._last is not None:
            self._join(found, left, right, cluster_tolerance)
            self._last = None
        return np.array([self._name(int(branch)) for branch in found.branches], dtype=np.int64)

    def _join(
        self, found: TrackerRecord, left: FloatArray, right: FloatArray, cluster_tolerance: float
    ) -> None:
        """Find out which branch of the first record is which of the last one before."""
        assert self._last is not None
        last = self._last
        # Two records, one after the other: in the first the branches are 0, 1, .. in their order.
        pairs = ((np.asarray(last["left"]), left), (np.asarray(last["right"]), right))
        before, now = (
            np.ascontiguousarray(np.stack([then.T, here.T]), dtype=np.float64) for then, here in pairs
        )
        values = np.abs([last["values"], found.singular_values]).astype(np.float64)
        ids, clusters = (np.empty(values.shape, dtype=np.int64) for _ in range(2))
        core.follow_branches(values, before, now, 0.0, cluster_tolerance, ids, clusters)
        for here, there in zip(found.branches, ids[1], strict=True):
            if there < len(last["branches"]) and last["branches"][there] >= 0:
                self._known[int(here)] = int(last["branches"][there])

    def _name(self, branch: int) -> int:
        if branch < 0:
            return branch
        if branch not in self._known:
            self._known[branch] = self.next
            self.next += 1
        return self._known[branch]


class _LowRankSum:
    """``f W + sum_i c_i A_i B_i^T``: factors beside a W that is not changed, or collected in a copy of it."""

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
        """Return the sum, in an array that goes on to be the W of later ones."""
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
        """Bring the update to its numerical rank, exactly to rounding."""
        q_left, r_left = np.linalg.qr(self._left.T)
        q_right, r_right = np.linalg.qr(self._right.T)
        u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
        kept = s > np.finfo(s.dtype).eps * s[0] if len(s) else np.zeros(0, dtype=bool)
        self._left = np.ascontiguousarray((q_left @ (u[:, kept] * s[kept])).T)
        self._right = np.ascontiguousarray((q_right @ vt[kept].T).T)


def _check_parts(state: Mapping[str, Any]) -> None:
    """Raise unless the parts of a tracker's state fit each other."""
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


def with_state_checksum(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with a checksum of everything in it, for `check_state`."""
    return state | {"checksum": _state_checksum(state)}


def check_state_checksum(state: Mapping[str, Any]) -> None:
    """Raise if a state is not what `with_state_checksum` returned. States of 0.1.0 have no checksum."""
    if "checksum" in state and state["checksum"] != _state_checksum(state):
        raise ValueError("state is not what was written: its checksum does not match")


def _state_checksum(state: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            digest.update(f"mapping of {len(value)}".encode())
            for key in sorted(value, key=str):
                digest.update(f"{key}:".encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            digest.update(f"list of {len(value)}".encode())
            for item in value:
                add(item)
        elif hasattr(value, "detach"):  # a tensor counts as the array that it may be loaded as
            tensor = value.detach().cpu()
            add((tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy())
        elif isinstance(value, np.ndarray):
            digest.update(f"{value.dtype} {value.shape}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        else:
            digest.update(repr(value).encode())

    add({name: value for name, value in state.items() if name != "checksum"})
    return digest.hexdigest()


def check_state(state: object, key: str, version: int) -> None:
    """Raise if this is not what `state_dict` returned, with such a key, or of a newer version."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state is {type(state).__name__}; wanted what state_dict returned")
    if "version" not in state or key not in state:
        raise ValueError(f"state has the keys {sorted(map(str, state))}; wanted what state_dict returned")
    with naming_parts("state"):
        is_newer = check_count(state["version"], "state['version']") > version
    if is_newer:
        raise ValueError(f"state has version {state['version']}; this dlnfast reads up to {version}")
    check_state_checksum(state)


def _checked(product: Callable[[FloatArray], Any], name: str, length: int) -> Callable[[FloatArray], Any]:
    """Return the product, which then says what is wrong with its result."""

    def call(X: FloatArray) -> FloatArray:
        result = as_array(product(X), f"W.{name}(X)")
        if result.dtype.kind not in "biuf":
            raise TypeError(f"W.{name}(X) has dtype {result.dtype}; wanted real numbers")
        if result.shape != (length, X.shape[1]):
            raise ShapeError(f"W.{name} returned shape {result.shape}; wanted ({length}, {X.shape[1]})")
        return result

    return call


def _shape_of(operator: Any) -> tuple[int, int]:
    try:
        shape = tuple(int(n) for n in operator.shape)
    except (AttributeError, TypeError, ValueError):
        raise TypeError(f"W is {type(operator).__name__} without a shape; wanted (m, n)") from None
    if len(shape) != 2 or min(shape) < 1:
        raise ShapeError(f"W has shape {shape}; wanted a matrix (2 axes) with entries")
    return shape[0], shape[1]


def _precision(operator: Any) -> np.dtype[Any]:
    return check_precision(getattr(operator, "dtype", None), "W.dtype")
