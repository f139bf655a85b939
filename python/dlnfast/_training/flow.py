# SPDX-License-Identifier: MIT
"""`flow`: gradient flow of a deep linear network, the limit of gradient descent for small learning rates."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from .._closure.certificate import Certificate
from .._closure.subspaces import Closure
from .._problem.low_rank import LowRank
from .._problem.problem import Problem, check_problem
from .._support.arrays import (
    FloatArray,
    as_vector,
    check_choice,
    check_count,
    check_scale,
    frobenius_norm,
    per_layer,
    scale_of,
    widths_of,
)
from .._support.dispatch import core
from .._support.errors import DivergedError
from .._support.ode import StepLimitError, StepSizeError, Tolerance, Vector, integrate
from .._support.progress import ProgressBar
from .._support.threads import MAX_THREADS
from .._tracking.svd_tracker import COMPLETENESS, TIERS
from .._trajectory.dense import DenseStates
from .._trajectory.layer_spectra import COLUMNS, LayerTracking
from .._trajectory.reduced import ReducedStates
from .._trajectory.states import States
from .._trajectory.trajectory import Trajectory
from .._weights.checks import check_initial, require_arrays
from .._weights.implicit import ImplicitWeights
from .callbacks import CallbackState, bind_state
from .choice import choose_engine
from .jobs import reduced_objective, reduced_states
from .options import PerLayer, Record
from .request import Weights

if TYPE_CHECKING:
    from .. import _core as types

_ENGINES: Final = ("auto", "reduced", "dense")
#: Share of the tolerances that one step may use. The errors of steps add up, and near a minimum, where
#: stability limits the steps, they stay at about 100 times the tolerance of one step.
_STEP_SHARE: Final = 0.01
#: Default absolute tolerance, relative to `rtol` times `_smallest_scale`.
_ABSOLUTE_SHARE: Final = 1e-3
#: Singular values that differ by less, relative to the largest, belong to one cluster.
_CLUSTER_TOLERANCE: Final = 1e-8


def flow(
    problem: Problem,
    weights: Sequence[npt.ArrayLike] | ImplicitWeights,
    times: npt.ArrayLike,
    *,
    rtol: float = 1e-10,
    atol: float | None = None,
    weight_decay: PerLayer = 0.0,
    engine: str = "auto",
    record: Record | None = None,
    max_steps: int = 10**6,
    n_threads: int = 0,
) -> Trajectory:
    r"""Integrate the gradient flow ``dW_l/dt = -(G_l + lambda_l W_l)`` of ``l = c/2 ||W_{L:1} X - Y||_F^2``.

    ``G_l = c W_{L:l+1}^T (W_{L:1} S - Phi) W_{l-1:1}^T`` is the gradient. Gradient descent with the learning
    rate eta, for all layers, approaches the flow at t = eta n after n steps, with an error of O(eta).

    Parameters
    ----------
    problem : Problem
        Problem with the sums S and Phi and the scale c of the loss, which multiplies the speed of the flow.
    weights : sequence of array_like, or ImplicitWeights
        Layers ``W_1(0), .., W_L(0)`` in float64, W_l of shape (d_l, d_{l-1}). They are never changed; the
        trajectory refers to them. Lazily sampled weights (``orthogonal(..., implicit=True)``) work at any
        width.
    times : array_like, shape (T + 1,)
        Increasing times of the records; the first one is 0, the time of `weights`. In the unit of
        (learning rate) x (steps).
    rtol : float
        Relative error of the weights to aim for, above 0. A step may have a hundredth of it in each entry.
        The errors of all steps add up, and grow where the flow leaves a saddle: at 1e-10, to 2e-10 over the
        growth of a mode from 1e-6 to its final value.
    atol : float, optional
        Absolute error of the weights to aim for, in the same sense. By default ``1e-3 rtol`` times the
        smallest scale of a layer, ``||W_l(0)||_F / sqrt(min(d_l, d_{l-1}))``, or ``||M||_F^{1/L}`` of the
        least-squares solution M if that is smaller. So small weights are as exact as large ones. Errors below
        rounding, 32 eps times the largest entry of a layer, are never refused.
    weight_decay : float or sequence of float
        lambda_l, one for all layers or one per layer.
    engine : {"auto", "reduced", "dense"}
        "reduced": integrate cores and scalars of families only, exact where `closure` holds. "dense": whole
        layers. "auto": the reduced one where it is exact and smaller.
    record : Record, optional
        Options of the records. There is one for each of the `times`, so ``every`` must be 1;
        ``weights_every`` counts times. The dense engine decomposes every layer at every record, unless
        ``singular_values=None``. The callback is called as ``callback(index, loss)``, or with a
        `CallbackState` whose step is the index, and ends the run by returning True.
    max_steps : int
        Largest number of steps of the integrator; a run that needs more is an error.
    n_threads : int
        Number of threads of the gradients of whole layers, as for `train`.

    Returns
    -------
    Trajectory
        Records and losses at the times; its ``steps`` are indices into its ``times``.

    Raises
    ------
    ShapeError
        Weights that do not fit each other or the problem, or times that are not a vector.
    AssumptionError
        ``engine="reduced"`` where the theorem does not hold, or lazily sampled weights for whole layers.
    DivergedError
        If the weights are so large that the gradient overflows, or no step size meets the tolerances. The
        exception holds the trajectory up to there; its step is the index of the first missing time.
    TypeError, ValueError
        For any other argument out of its range, for weights in float32, and for a `Completion` or `Sensing`;
        the message names it. If `max_steps` does not reach the last time, the error has the trajectory up
        to there as its attribute ``trajectory``.

    Notes
    -----
    Explicit Dormand-Prince method of order 8(5,3) with dense output (Hairer, Norsett, Wanner, Solving
    Ordinary Differential Equations I, Section II.10). The number of steps is about the final time times the
    sharpness, c L sigma_1^{2 - 2/L} for white inputs, over 6, plus some tens for each mode that is learned.
    Cost: 12 gradients per step, 3 more in steps that contain times: O(L r^3) each for the reduced engine,
    O(L d^3) for whole layers. Memory: 25 copies of the integrated weights.

    Reduced engine: the cores C_l follow the flow of the small problem, and the scalars of a family
    ``d rho_l/dt = -(c s rho_l prod_{k != l} rho_k^2 + lambda_l rho_l)``, s being its coupling; see
    `Family`. Theorems 1 and 2 of the theory page hold for the flow, the limit of small rates. Ctrl-C carries
    the trajectory so far as the attribute ``trajectory`` of the KeyboardInterrupt.

    Examples
    --------
    >>> import numpy as np
    >>> import dlnfast as dln
    >>> problem = dln.low_rank_recovery(dim=30, rank=3, seed=0)
    >>> run = dln.flow(problem, dln.orthogonal([30] * 4), times=[0.0, 25.0, 50.0])
    >>> run.engine, round(float(run.rho(1)[-1]), 4)
    ('reduced', 0.9511)
    """
    start = time.perf_counter()
    check_problem(problem)
    moments = _check_times(times)
    choice = check_choice(engine, "engine", _ENGINES)
    records = _check_record(Record() if record is None else record, len(moments) - 1)
    relative = check_scale(rtol, "rtol", strict=True)
    limit = check_count(max_steps, "max_steps")
    threads = check_count(n_threads, "n_threads", minimum=0, maximum=MAX_THREADS)
    initial = check_initial(weights, problem)
    dtype = initial.dtype if isinstance(initial, ImplicitWeights) else initial[0].dtype
    if dtype != np.float64:
        raise TypeError(f"weights have dtype {dtype}; wanted float64, in which the flow is integrated")
    decay = per_layer(weight_decay, "weight_decay (lambda)", len(initial))
    if atol is None:
        absolute = _ABSOLUTE_SHARE * relative * _smallest_scale(problem, initial)
    else:
        absolute = check_scale(atol, "atol")
    certificate, space = choose_engine(choice, problem, initial)
    model: _Model
    if space is None:
        model = _WholeLayers(problem, require_arrays(initial), decay, records, threads, len(moments))
    else:
        model = _SmallModel(problem, initial, space, decay, records, len(moments))
    run = _Run(model, problem, certificate, moments, start)
    run.config = {
        "method": "flow",
        "rtol": relative,
        "atol": absolute,
        "weight_decay": decay.tolist(),
        "engine": certificate.engine,
        "problem": problem.describe(),
        "dtype": "float64",
        "widths": list(initial.widths) if isinstance(initial, ImplicitWeights) else widths_of(initial),
    }
    with ProgressBar(len(moments) - 1, records.progress) as bar:
        tolerance = Tolerance(_STEP_SHARE * relative, _STEP_SHARE * absolute, model.segments)
        return run.integrate(tolerance, limit, records, bar)


def _check_times(times: npt.ArrayLike) -> Vector:
    """Return the times as a vector of increasing numbers from 0 on."""
    found = np.array(as_vector(times, "times", dtype=np.float64, symbol="t"))
    if found[0] != 0.0:
        raise ValueError(f"times begins with {found[0]:g}; wanted 0, the time of the initial weights")
    late = np.flatnonzero(found[1:] <= found[:-1])
    if late.size:
        i = int(late[0])
        raise ValueError(f"times[{i + 1}] is {found[i + 1]:g} after {found[i]:g}; wanted times that increase")
    return found


def _check_record(record: Record, n_steps: int) -> Record:
    """Return the checked options of the records, or raise for one that the flow does not have."""
    if not isinstance(record, Record):
        raise TypeError(f"record is {type(record).__name__}; wanted a dlnfast.Record")
    if record.every != 1:
        raise ValueError(f"record.every is {record.every!r}; wanted 1: there is a record for each of times")
    if record.tracking == "dense":
        raise ValueError("record.tracking is 'dense'; wanted 'auto' or 'full': every record decomposes")
    return record.checked(n_steps)


def _smallest_scale(problem: Problem, weights: Weights) -> float:
    """Return the smallest scale of an initial layer or of the layers of a balanced minimum; none is zero."""
    scales = list(weights.scales) if isinstance(weights, ImplicitWeights) else [scale_of(w) for w in weights]
    best = problem.least_squares
    norm = float(np.linalg.norm(best.s)) if isinstance(best, LowRank) else frobenius_norm(best)
    return min((float(scale) for scale in (*scales, norm ** (1 / len(scales))) if scale > 0), default=1.0)


class _Model(ABC):
    """The integrated weights as one vector, and their records.

    Attributes
    ----------
    initial : ndarray, shape (n,)
        The vector at time 0.
    segments : list of int
        First index of each layer in the vector.
    n_records : int
        Number of records so far.
    """

    def __init__(
        self,
        layers: Sequence[FloatArray],
        decay: Vector,
        objective: types.Objective,
        n_threads: int,
        scalars: Vector | None = None,
        scalar_decay: Vector | None = None,
    ) -> None:
        self.shapes = [layer.shape for layer in layers]
        sizes = [layer.size for layer in layers]
        others = np.empty(0) if scalars is None else scalars
        parts = [np.ravel(layer) for layer in layers]
        self.initial = np.concatenate([*parts, others], dtype=np.float64)
        bounds = np.cumsum([0, *sizes]).tolist()
        self._bounds: list[int] = bounds
        begins = [begin for begin, size in zip(bounds, sizes, strict=False) if size]
        # Each scalar is a layer of its own.
        self.segments = begins + list(range(bounds[-1], len(self.initial)))
        rates = [np.full(size, rate) for size, rate in zip(sizes, decay, strict=True)]
        if scalar_decay is not None:
            rates.append(scalar_decay)
        self._decay = np.concatenate(rates) if decay.any() else None
        self._objective = objective
        self._n_threads = n_threads
        self._scratch = np.empty_like(self.initial)
        self.n_records = 0

    def split(self, vector: Vector) -> list[FloatArray]:
        """Return the layers as views of the vector."""
        return [
            vector[begin : begin + rows * columns].reshape(rows, columns)
            for begin, (rows, columns) in zip(self._bounds, self.shapes, strict=False)
        ]

    def scalars(self, vector: Vector) -> Vector:
        """Return the entries behind those of the layers, as a view."""
        return vector[self._bounds[-1] :]

    def slope(self, vector: Vector, out: Vector) -> None:
        """Write the right-hand side of the flow."""
        self._gradients(vector, out)
        if self._decay is not None:
            out += self._decay * vector
        np.negative(out, out=out)

    def _gradients(self, vector: Vector, out: Vector) -> float:
        """Write the gradients, and return the loss."""
        found: float = core.gradients(
            self.split(vector), self._objective, self.split(out), n_threads=self._n_threads
        )
        return found

    def loss(self, vector: Vector) -> float:
        """Return the loss."""
        return self._gradients(vector, self._scratch)

    def largest_layer(self, vector: Vector) -> int:
        """Return the number of the layer that has grown most since time 0, counted from 1."""
        growth = [
            frobenius_norm(new) / max(frobenius_norm(old), 1e-300)
            for new, old in zip(self.split(vector), self.split(self.initial), strict=True)
        ]
        return 1 + int(np.argmax(growth))

    @abstractmethod
    def record(self, vector: Vector) -> None:
        """Record the weights."""

    @abstractmethod
    def states(self, vector: Vector, complete: bool) -> States:
        """Return the records so far; `vector` is the last one."""


class _SmallModel(_Model):
    """Cores inside the invariant subspaces, and the scalars of the families outside."""

    def __init__(
        self,
        problem: Problem,
        weights: Weights,
        space: Closure,
        decay: Vector,
        record: Record,
        n_times: int,
    ) -> None:
        scalars = [rho for family in space.families for rho in family.rho]
        layers = [layer for family in space.families for layer in range(family.first - 1, family.last)]
        objective = reduced_objective(space, problem)
        super().__init__(space.cores, decay, objective, 1, np.array(scalars, dtype=np.float64), decay[layers])
        self._problem, self._weights, self._space, self._n_values = problem, weights, space, record.n_values
        self._records = np.empty((n_times, len(self.initial)))

    def _gradients(self, vector: Vector, out: Vector) -> float:
        loss = super()._gradients(vector, out)
        rho, slopes = self.scalars(vector), self.scalars(out)
        begin = 0
        for family in self._space.families:
            end = begin + len(family.rho)
            factor = self._problem.loss_scale * family.coupling
            if factor == 0.0:  # only weight decay changes the scalars
                slopes[begin:end] = 0.0
            else:
                squares = rho[begin:end] ** 2
                others = np.ones_like(squares)
                others[1:] = np.cumprod(squares[:-1])
                others[:-1] *= np.cumprod(squares[:0:-1])[::-1]
                slopes[begin:end] = factor * rho[begin:end] * others
                loss += factor / 2 * family.multiplicity * float(np.prod(squares))
            begin = end
        return loss

    def record(self, vector: Vector) -> None:
        self._records[self.n_records] = vector
        self.n_records += 1

    def states(self, vector: Vector, complete: bool) -> ReducedStates:
        records = self._records[: self.n_records]
        cores = tuple(
            records[:, begin : begin + rows * columns].reshape(len(records), rows, columns).copy()
            for begin, (rows, columns) in zip(self._bounds, self.shapes, strict=False)
        )
        return reduced_states(
            self._space,
            self._weights,
            self._problem,
            self._n_values,
            cores=cores,
            rho=records[:, self._bounds[-1] :].copy(),
        )


@dataclass
class _Spectra:
    """Singular values of one layer, and its vectors where they are recorded, at the records so far."""

    values: list[FloatArray]
    left: list[FloatArray]
    right: list[FloatArray]
    norms: list[float]


class _WholeLayers(_Model):
    """Whole layers, their singular values at the records, and snapshots."""

    def __init__(
        self,
        problem: Problem,
        weights: list[FloatArray],
        decay: Vector,
        record: Record,
        n_threads: int,
        n_times: int,
    ) -> None:
        super().__init__(weights, decay, problem.engine_arguments(np.float64), n_threads)
        del n_times
        self._weights, self._options = tuple(weights), record
        n_all = [min(shape) for shape in self.shapes]
        n_wanted = record.n_values
        self._counts = [count if n_wanted is None else min(count, n_wanted) for count in n_all]
        self._spectra = [_Spectra([], [], [], []) for _ in weights] if n_wanted != 0 else []
        self._snapshots: list[list[FloatArray]] = [[] for _ in weights] if record.weights_every else []
        self._snapshot_steps: list[int] = []

    def record(self, vector: Vector) -> None:
        layers = self.split(vector)
        for layer, count, spectra in zip(layers, self._counts, self._spectra, strict=False):
            spectra.norms.append(frobenius_norm(layer))
            if self._options.vectors:
                left, values, right = np.linalg.svd(layer, full_matrices=False)
                spectra.left.append(left[:, :count].copy())
                spectra.right.append(right[:count].T.copy())
            else:
                values = np.linalg.svd(layer, compute_uv=False)
            spectra.values.append(values[:count].copy())
        every = self._options.weights_every
        if every and self.n_records % every == 0:
            for snapshots, layer in zip(self._snapshots, layers, strict=True):
                snapshots.append(layer.copy())
            self._snapshot_steps.append(self.n_records)
        self.n_records += 1

    def states(self, vector: Vector, complete: bool) -> DenseStates:
        has_vectors = self._options.vectors
        return DenseStates(
            values=tuple(np.stack(s.values) for s in self._spectra),
            left=tuple(np.stack(s.left) for s in self._spectra) if has_vectors else (),
            right=tuple(np.stack(s.right) for s in self._spectra) if has_vectors else (),
            tracking=tuple(_describe_spectra(s) for s in self._spectra),
            snapshots=tuple(np.stack(s) for s in self._snapshots),
            snapshot_steps=np.array(self._snapshot_steps, dtype=np.int64),
            initial=self._weights,
            final=tuple(layer.copy() for layer in self.split(vector)) if complete else None,
        )


def _describe_spectra(spectra: _Spectra) -> LayerTracking:
    """Return error bounds of decompositions, and branches where vectors were recorded."""
    values = np.array(spectra.values, dtype=np.float64)
    errors = 16 * float(np.finfo(np.float64).eps) * values[:, :1] * np.sqrt(values.shape[1])
    branches, clusters = (np.full(values.shape, -1, dtype=np.int64) for _ in range(2))
    if spectra.left:
        # Copies, as the core rotates and flips the vectors in place.
        left, right = (
            np.array([v.T for v in side], dtype=np.float64, order="C")
            for side in (spectra.left, spectra.right)
        )
        core.follow_branches(values, left, right, 0.0, _CLUSTER_TOLERANCE, branches, clusters, n_threads=1)
    columns = np.zeros((len(values), len(COLUMNS)))
    columns[:, COLUMNS.index("tier")] = TIERS.index("full")
    columns[:, COLUMNS.index("completeness")] = COMPLETENESS.index("rigorous")
    columns[:, COLUMNS.index("norm")] = spectra.norms
    return LayerTracking(
        np.broadcast_to(errors, values.shape).copy(), np.ones_like(values), branches, clusters, columns
    )


class _Run:
    """One run: the integration, the losses, and the trajectory of the records so far."""

    def __init__(
        self, model: _Model, problem: Problem, certificate: Certificate, times: Vector, start: float
    ) -> None:
        self.config: dict[str, Any] = {}
        self._model, self._problem, self._certificate = model, problem, certificate
        self._times, self._start = times, start
        self._loss = np.empty(len(times))
        self._last = model.initial

    def integrate(self, tolerance: Tolerance, max_steps: int, record: Record, bar: ProgressBar) -> Trajectory:
        """Integrate, and return the trajectory; an error gets the partial one as an attribute."""
        model, outcome = self._model, "finished"
        callback = None if record.callback is None else bind_state(record.callback, self._state)
        try:
            for index, (_, vector) in enumerate(
                integrate(model.slope, model.initial, self._times, tolerance, max_steps)
            ):
                loss = model.loss(vector)
                if not np.isfinite(loss):
                    raise self._diverged(index, vector)
                self._loss[index] = loss
                self._last = vector
                model.record(vector)
                if bar.listener is not None:
                    bar.listener(index, loss)
                if callback is not None and callback(index, loss):
                    outcome = "stopped"
                    break
        except StepSizeError as error:
            raise self._diverged(model.n_records, self._last, error.time) from None
        except DivergedError:
            raise
        except StepLimitError as error:
            limited = ValueError(
                f"max_steps is {max_steps}, which reaches t = {error.time:.6g}; wanted more for "
                f"t = {self._times[-1]:.6g}"
            )
            limited.trajectory = self._trajectory("interrupted")  # type: ignore[attr-defined]
            raise limited from None
        except BaseException as error:
            if model.n_records > 0:
                error.trajectory = self._trajectory("interrupted")  # type: ignore[attr-defined]
                error.add_note(f"the trajectory of {model.n_records} times is in the attribute trajectory")
            raise
        return self._trajectory(outcome)

    def _state(self, index: int, loss: float) -> CallbackState:
        """Return the state of a record, for a callback with one parameter."""
        return CallbackState(index, loss, lambda: self._loss, lambda: (self._trajectory("stopped"), index))

    def _diverged(self, index: int, vector: Vector, time: float | None = None) -> DivergedError:
        """Return the error for a time that the integration does not reach."""
        if time is None:
            where = f"the loss is not finite at t = {self._times[index]:g}"
        else:
            where = f"no step size meets rtol after t = {time:g}"
        layer = self._model.largest_layer(vector)
        return DivergedError(
            f"{where} (layer {layer} has grown most): start from smaller weights, lower loss_scale, or raise "
            "rtol",
            step=index,
            layer=layer,
            trajectory=self._trajectory("diverged") if self._model.n_records else None,
        )

    def _trajectory(self, outcome: str) -> Trajectory:
        count = self._model.n_records
        return Trajectory(
            steps=np.arange(count, dtype=np.int64),
            loss=self._loss[:count].copy(),
            states=self._model.states(self._last, outcome in ("finished", "stopped")),
            certificate=self._certificate,
            problem=self._problem,
            config=self.config | {"outcome": outcome},
            wall_time=time.perf_counter() - self._start,
            times=self._times[:count].copy(),
        )
