# SPDX-License-Identifier: MIT
"""`train`: checks the request, chooses the engine, runs it, and hands back a `Trajectory`."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import numpy as np
import numpy.typing as npt

from ._arrays import (
    LARGEST_COUNT,
    FloatArray,
    aligned_copy,
    check_choice,
    check_count,
    check_flag,
    check_scale,
    per_layer,
    scale_of,
    widths_of,
)
from ._dispatch import core
from ._errors import AssumptionError, DivergedError
from ._threads import MAX_THREADS
from ._weight_checks import check_initial, require_layers
from .checkpoint import Checkpoint, RunFolder, State, identity_of, terminating
from .closure import (
    LARGEST_SHARE,
    Assumptions,
    Certificate,
    Closure,
    breaks_no_assumption,
    factors_within,
    find_closure,
    step_flops,
)
from .completion import Observations
from .curvature import constant_rate, layer_curvatures
from .curvature import minimum_sharpness as minimum_sharpness_of_observed
from .implicit import ImplicitWeights
from .operators import ExplicitLayers
from .problem import LowRank, Problem
from .progress import ProgressBar
from .stopping import Plateau
from .theory import default_learning_rate, minimum_sharpness, stability_threshold
from .trajectory import (
    COMPLETE,
    DenseStates,
    LayerTracking,
    ReducedStates,
    Trajectory,
    load,
    load_folder,
    record_arrays,
)

if TYPE_CHECKING:
    from ._core import DenseArguments, OptimizerState, Outcome, ReducedArguments, Run, TrackerMode

logger = logging.getLogger("dlnfast")

Callback = Callable[[int, float], bool | None]
PerLayer = float | Sequence[float]


@dataclass(frozen=True)
class Adaptive:
    r"""A learning rate that follows the weights: the stability threshold, measured at every step.

    .. math:: \eta = \frac{\text{safety}}{c \sum_l m_l q_l s_l^2 + c \max_l \sum_{k \ne l} \sqrt{m_l m_k}
        s_{lk} e + \lambda},

    with s_l (s_lk) the product of the largest singular values of all layers but l (and k), e the norm of the
    residual and q_l the share of a change that the observations see. The denominator bounds the Hessian in
    the metric of the rates; descent is stable for safety below 2. Where small weights leave a plateau the
    rate is larger by orders of magnitude than any constant one that is stable in the end.

    Parameters
    ----------
    safety : float
        Above 0.
    ratios : sequence of float, optional
        m_l: the layers' rates are m_l eta. All 1 by default.
    curvature : sequence of float, optional
        q_l. Measured by default; 1 for white inputs.

    Notes
    -----
    Costs two products of each layer with a vector at every step. `Trajectory.rates` keeps eta.
    """

    safety: float = 1.5
    ratios: Sequence[float] | None = None
    curvature: Sequence[float] | None = None


@dataclass(frozen=True)
class _AdaptiveRequest:
    """`Adaptive`, checked, with everything measured."""

    safety: float
    curvature: list[float]
    error_scale: float


_ADAPTIVE_RATE = 'learning_rate is adaptive, which is for the dense engine; wanted numbers or "auto"'

#: What may be computed, and held, before a run that is kept writes it.
_DRAIN_FLOPS, _DRAIN_BYTES = 1e10, 2.0**28

#: Smaller side up to which a target is decomposed for a message alone.
_SMALL_TARGET: Final = 512

#: Optimizers whose update acts on each entry by itself.
_ENTRYWISE: Final = (
    "adam", "adamw", "adamax", "nadam", "radam", "adagrad", "adadelta", "rmsprop", "rprop", "lion", "signsgd",
)  # fmt: skip
#: Optimizers whose update is made of gradients by sums, products and functions of singular values.
_KEEPS_SUBSPACES: Final = ("muon", "shampoo", "nesterov")


def train(
    problem: Problem | Observations,
    weights: Sequence[npt.ArrayLike] | ImplicitWeights,
    *,
    learning_rate: PerLayer | str | Adaptive,
    steps: int,
    weight_decay: PerLayer = 0.0,
    momentum: PerLayer = 0.0,
    engine: str = "auto",
    device: object = None,
    record_every: int = 1,
    singular_values: str | int | None = "all",
    vectors: bool = False,
    tracking: str = "auto",
    weights_every: int | None = None,
    tolerance: float | None = None,
    n_threads: int = 0,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    callback: Callback | None = None,
    optimizer: str = "gd",
) -> Trajectory:
    r"""Run full-batch gradient descent on ``l = c/2 ||W_{L:1} X - Y||_F^2``.

    All layers move at once, with heavy-ball momentum where it is asked for:
    ``V_l <- mu_l V_l + G_l + lambda_l W_l`` and ``W_l <- W_l - eta_l V_l``, where
    ``G_l = c W_{L:l+1}^T (W_{L:1} S - Phi) W_{l-1:1}^T`` and V_l(0) = 0.

    Parameters
    ----------
    problem : Problem, Completion or Sensing
        S, Phi and c. Mind c: it rescales every learning rate (``problem.loss_scale``). Or a matrix of which
        some entries or linear measurements are known: the dense engine then descends on their loss.
    weights : sequence of array_like, or ImplicitWeights
        ``W_1(0), .., W_L(0)``, W_l of shape (d_l, d_{l-1}), all float64 or all float32. Never changed;
        the trajectory refers to them, so do not change them either. Or the law of such layers
        (``orthogonal(..., implicit=True)``), for the reduced engine at any width.
    learning_rate : float or sequence of float, "auto", "adaptive" or Adaptive
        ``eta``, for all layers or one per layer. "auto" takes `theory.default_learning_rate` for these
        weights, less with weight decay (lambda is added to the sharpness) and (1 - mu) times that with heavy
        ball; it stands in ``run.config``. "adaptive" measures the threshold at every step, on the dense
        engine: see `Adaptive`; ``run.rates`` keeps it.
    steps : int
        Number of updates, 0 or more.
    weight_decay, momentum : float or sequence of float
        ``lambda`` and ``mu`` (0 <= mu < 1), for all layers or one per layer.
    engine : {"auto", "reduced", "dense", "torch"}
        "reduced" trains the invariant subspace only, exactly, at a cost independent of the width; "dense"
        trains whole matrices. "auto" takes the reduced engine where its conditions are found to hold and
        it is smaller than the network. The choice and its reasons stand in ``run.certificate``. "torch" is
        the dense engine on a PyTorch device: the same recursion, for a `Problem` and constant rates.
    device : str or torch.device, optional
        For ``engine="torch"``: "cpu", "cuda", "cuda:1", ..; by default that of PyTorch. The trajectory holds
        NumPy arrays, as ever.
    record_every : int
        Records at steps 0, record_every, 2 record_every, .. and at the last step.
    singular_values : {"all", None} or int
        How many singular values of each layer a record keeps. The reduced engine has them for nothing. The
        dense one follows them from record to record (`SVDTracker`), with bounds on their errors in
        `Trajectory.singular_value_errors`: k of them by a few products with thin blocks, O(d^2 k); "all" of
        them by a decomposition of every layer at every record, O(d^3).
    vectors : bool
        Keep singular vectors too (the reduced engine always has them): needed for `Trajectory.angles`.
    tracking : {"auto", "dense", "full"}
        How the dense engine finds them. "auto": for layers that start as a scaled rotation and whose updates
        are thin, in factored form, O(d (k + K)^2) for k or for all values at once; for layers up to 128 wide,
        and those of which a third is wanted, by decomposition; otherwise by iteration from the record before.
        "dense": always by iteration. "full": always by decomposition. The torch engine: never in factored
        form; on an accelerator k of them by iteration, which moves thin blocks only, all of them on the host.
    weights_every : int, optional
        Dense and torch engine: keep whole weight matrices at every such step (the first and last are always
        kept). The reduced engine gives the weights at any record.
    tolerance : float, optional
        Stop as soon as the loss is at most this.
    n_threads : int
        0: as many as OpenMP allows, one for small work, fewer while other programs hold the cores (with the
        torch engine: as many as PyTorch is set to). A positive number is taken literally.
    progress : bool
        A bar on a terminal, once the run has taken a second.
    checkpoint : path or Checkpoint, optional
        A folder of this run's own: what is recorded is written there while the run goes on, which then needs
        no memory for it, and every ten seconds or so the state. The same call goes on where the run was, to
        the same bits with the same number of threads, or returns a run that has ended; so does `resume`. A
        crash loses what came after the last writing; Ctrl-C and SIGTERM lose nothing. What follows singular
        values starts anew: branches then have new numbers. With the torch engine Ctrl-C loses what
        came after the last state.
    callback : callable, optional
        ``callback(step, loss)`` at every record; returning True ends the run. Where a run goes on, it first
        hears of the records that are written already, so that a rule for stopping finds what it knew.
    optimizer : {"gd"}
        Gradient descent, with or without momentum. Others are refused with the reason: entry-by-entry rules
        such as Adam do not keep the invariant subspaces; Muon, Shampoo and Nesterov do, but no engine runs
        them yet.

    Returns
    -------
    Trajectory
        The loss at every step, and what the records hold.

    Raises
    ------
    ShapeError
        Weights that do not fit each other or the problem.
    AssumptionError
        ``engine="reduced"`` where the theorem does not hold, a law of weights for an engine that needs whole
        layers, or an optimizer that acts entry by entry.
    DivergedError
        The loss stopped being finite; the exception holds the trajectory up to there.
    ModuleNotFoundError
        ``engine="torch"`` without PyTorch.
    FolderInUseError
        If another run, of this process or another one, writes to the folder of `checkpoint`.
    OSError
        If that folder cannot be read or written; what it holds stays, and the same call goes on from it.
    TypeError, ValueError
        Any other argument out of its range; the message names it.

    Notes
    -----
    Reduced: O(L r^3) per step, O(L d^2 r) once. Dense: 6 (L - 1) d^3 flops per step for square layers; with
    d_L = K << d no d^3 at all, 6 (L - 1) K d^2 flops and one read and one read-and-write of each weight
    matrix. Neither depends on the number of samples. Torch: the flops of the dense engine in 3 L + 2 or so
    calls of PyTorch, up to three more for each layer with weight decay or momentum. On an accelerator the
    losses are read at records, or every 64 steps (every step with `tolerance`), and the weights are held
    twice to find the step of a divergence, three times where k singular values are followed. float32 is
    not rounded to TF32 or bfloat16, whatever PyTorch is set to.

    At rates above two over the sharpness of the minimum both engines still follow the recursion to rounding
    at every step, but descent may amplify rounding at every step too, so that the trajectories of the two, or
    of one on two machines, can part after some hundred steps. ``run.certificate.reason`` says so, with the
    bound; its expected error holds for as long as that growth is small. The bound is that of the balanced
    minimum (`dlnfast.theory.stability_threshold` for white inputs); of a matrix known in part it is
    estimated from the observations. Where the smaller side of a dense target is above 512, it is known to
    the reduced engine alone.

    After Ctrl-C the KeyboardInterrupt carries the trajectory recorded so far as its attribute ``trajectory``.

    Yaras et al., arXiv 2306.01154, Theorem 1.

    Examples
    --------
    >>> import dlnfast as dln
    >>> problem = dln.low_rank_recovery(dim=30, rank=3, seed=0)
    >>> run = dln.train(problem, dln.orthogonal([30] * 4), learning_rate=1.0, steps=50)
    >>> run.engine, round(float(run.rho(1)[-1]), 4)
    ('reduced', 0.951)
    """
    start = time.perf_counter()
    if not isinstance(problem, (Problem, Observations)):
        raise TypeError(
            f"problem is {type(problem).__name__}; wanted a dlnfast.Problem, Completion or Sensing"
        )
    check_optimizer(optimizer)
    check_choice(engine, "engine", ("auto", "reduced", "dense", "torch"))
    if device is not None and engine != "torch":
        raise ValueError(f'device is {device!r} but engine is {engine!r}; wanted engine="torch" beside it')
    initial = check_initial(weights, problem)
    request = Request.checked(
        problem,
        initial,
        learning_rate=learning_rate,
        steps=steps,
        weight_decay=weight_decay,
        momentum=momentum,
        record_every=record_every,
        singular_values=singular_values,
        vectors=vectors,
        tracking=tracking,
        weights_every=weights_every,
        tolerance=tolerance,
        n_threads=n_threads,
        callback=callback,
    )
    kept = None if checkpoint is None else Checkpoint.of(checkpoint)
    job: _KeptJob
    if engine == "torch":
        if kept is not None:
            request = replace(request, drain_every=kept.every or _steps_between_drains(request, None))
        request, job, certificate = _on_device(request, device)
    else:
        if request.adaptive is not None and engine == "auto" and not isinstance(initial, ImplicitWeights):
            certificate, space = Certificate("dense", "learning_rate is adaptive", None), None
        else:
            certificate, space = choose_engine(engine, problem, initial)
        if request.adaptive is not None and space is not None:
            raise ValueError(_ADAPTIVE_RATE)
        if kept is not None:
            request = replace(request, drain_every=kept.every or _steps_between_drains(request, space))
        job = DenseJob(request) if space is None else _ReducedJob(request, space)
    certificate = with_caution(certificate, request)
    logger.info("%s", certificate)
    with ProgressBar(request.steps, progress) as bar:
        if kept is not None:
            return _run_kept(job, request, certificate, bar, kept)
        return run_job(job, request, certificate, bar, start)


def resume(
    directory: str | os.PathLike[str], *, progress: bool = False, callback: Callback | None = None
) -> Trajectory:
    """Go on with a run that `train` has written to a folder, to its end.

    Parameters
    ----------
    directory : path
        What was ``checkpoint`` then.
    progress, callback
        As for `train`.

    Returns
    -------
    Trajectory
        The whole run.

    Raises
    ------
    FileNotFoundError
        If there is no such run.
    ValueError
        If the folder is damaged, or was written by a newer version.
    DivergedError
        As `train`.

    Notes
    -----
    Cost: that of the steps that are left; those since the last state are computed again.
    """
    folder = RunFolder(directory)
    about, _ = folder.request()
    begun = load(folder.path)
    settings = about["settings"]
    adaptive = settings.pop("adaptive")
    if adaptive is not None:
        settings["learning_rate"] = Adaptive(**adaptive)
    if settings.pop("plateau"):
        callback = Plateau(callback)
    assert begun.problem is not None
    return train(
        begun.problem,
        _initial_of(begun.states),
        **settings,
        checkpoint=Checkpoint(directory, **about["checkpoint"]),
        progress=progress,
        callback=callback,
    )


@dataclass(frozen=True)
class Request:
    """The arguments of one run, checked."""

    problem: Problem | Observations
    weights: list[FloatArray] | ImplicitWeights
    learning_rate: npt.NDArray[np.float64]  # where it adapts, the ratios of the layers
    adaptive: _AdaptiveRequest | None
    weight_decay: npt.NDArray[np.float64]
    momentum: npt.NDArray[np.float64]
    steps: int
    record_every: int
    n_values: int | None  # None: all
    vectors: bool
    tracking: str
    weights_every: int | None
    tolerance: float | None
    n_threads: int
    callback: Callback | None
    device: str | None = None  # engine="torch" only
    drain_every: int = 0  # steps between two writings of what was recorded; 0: nothing is written

    @classmethod
    def checked(
        cls,
        problem: Problem | Observations,
        weights: list[FloatArray] | ImplicitWeights,
        *,
        learning_rate: PerLayer | str | Adaptive,
        steps: int,
        weight_decay: PerLayer,
        momentum: PerLayer,
        record_every: int,
        singular_values: str | int | None,
        vectors: bool,
        tracking: str = "auto",
        weights_every: int | None,
        tolerance: float | None,
        n_threads: int,
        callback: Callback | None,
    ) -> Request:
        """Return the request, or raise what `train` promises."""
        n_layers = len(weights)
        inertia = per_layer(momentum, "momentum (mu)", n_layers, below=1.0)
        if callback is not None and not callable(callback):
            raise TypeError(f"callback is {type(callback).__name__}; wanted a callable of (step, loss)")
        decay = per_layer(weight_decay, "weight_decay (lambda)", n_layers)
        n_values = _check_n_values(singular_values)
        n_steps = check_count(steps, "steps", minimum=0)
        kept_every = weights_every
        if weights_every is not None:
            kept_every = min(check_count(weights_every, "weights_every", maximum=None), max(n_steps, 1))
        with_vectors = check_flag(vectors, "vectors")
        if with_vectors and n_values == 0:
            raise ValueError("vectors is True but singular_values asks for none")
        check_choice(tracking, "tracking", ("auto", "dense", "full"))
        adaptive = None
        if isinstance(learning_rate, Adaptive) or (
            isinstance(learning_rate, str) and learning_rate == "adaptive"
        ):
            law = Adaptive() if isinstance(learning_rate, str) else learning_rate
            rates, adaptive = _adaptive_rates(law, problem, weights)
        else:
            rates = _learning_rates(learning_rate, problem, weights, decay, inertia)
        return cls(
            problem=problem,
            weights=weights,
            learning_rate=rates,
            adaptive=adaptive,
            weight_decay=decay,
            momentum=inertia,
            steps=n_steps,
            # Intervals longer than the run are all alike.
            record_every=min(check_count(record_every, "record_every", maximum=None), max(n_steps, 1)),
            n_values=n_values,
            vectors=with_vectors,
            tracking=tracking,
            weights_every=kept_every,
            tolerance=None if tolerance is None else check_scale(tolerance, "tolerance"),
            n_threads=check_count(n_threads, "n_threads", minimum=0, maximum=MAX_THREADS),
            callback=callback,
        )

    # Room, as in cpp/src/descent.cpp: for a run that takes all its steps, or from drain to drain.

    @property
    def n_records(self) -> int:
        """Records: step 0, multiples of record_every, the last step."""
        extra = 2 if self.drain_every else self.steps % self.record_every != 0
        return self._n_multiples(self.record_every) + extra

    @property
    def n_losses(self) -> int:
        """Losses, one for each step."""
        return min(self.drain_every, self.steps) + 1 if self.drain_every else self.steps + 1

    @property
    def n_snapshots(self) -> int:
        """Whole weights, at multiples of weights_every."""
        return self._n_multiples(self.weights_every) if self.weights_every else 0

    def _n_multiples(self, every: int) -> int:
        if self.drain_every:
            return min(self.drain_every, self.steps) // every + 2
        return self.steps // every + 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """Precision of the weights."""
        return self.weights.dtype if isinstance(self.weights, ImplicitWeights) else self.weights[0].dtype

    @property
    def widths(self) -> list[int]:
        """d_0, .., d_L."""
        if isinstance(self.weights, ImplicitWeights):
            return list(self.weights.widths)
        return widths_of(self.weights)

    def settings(self, engine: str) -> dict[str, Any]:
        """Return the keywords of `train` that make this request, in values that JSON knows."""
        law = self.adaptive
        return {
            "learning_rate": self.learning_rate.tolist(),
            "adaptive": None
            if law is None
            else {"safety": law.safety, "ratios": self.learning_rate.tolist(), "curvature": law.curvature},
            "steps": self.steps,
            "weight_decay": self.weight_decay.tolist(),
            "momentum": self.momentum.tolist(),
            "engine": engine,
            "record_every": self.record_every,
            "singular_values": "all" if self.n_values is None else self.n_values or None,
            "vectors": self.vectors,
            "tracking": self.tracking,
            "weights_every": self.weights_every,
            "tolerance": self.tolerance,
            "n_threads": self.n_threads,
            "plateau": isinstance(self.callback, Plateau),
            **({} if self.device is None else {"device": self.device}),
        }

    def describe(self, engine: str, outcome: str) -> dict[str, Any]:
        """Return all settings of the run in values that JSON knows."""
        return {
            "engine": engine,
            "outcome": outcome,
            "problem": self.problem.describe(),
            "learning_rate": self.learning_rate.tolist(),
            "adaptive": None
            if self.adaptive is None
            else {"safety": self.adaptive.safety, "curvature": self.adaptive.curvature},
            "weight_decay": self.weight_decay.tolist(),
            "momentum": self.momentum.tolist(),
            "steps": self.steps,
            "record_every": self.record_every,
            "tolerance": self.tolerance,
            "tracking": self.tracking,
            "n_threads": self.n_threads,
            "dtype": self.dtype.name,
            "widths": self.widths,
            **({} if self.device is None else {"device": self.device}),
        }


class _Outputs:
    """The arrays that the core fills while it runs; readable after any interruption."""

    def __init__(self, request: Request) -> None:
        self.loss = allocate_records((request.n_losses,), np.dtype(np.float64))
        self.record_steps = np.empty(request.n_records, dtype=np.int64)
        # The step of the first loss, then the counts of the core.
        self._numbers = np.zeros(1 + len(core.Count), dtype=np.int64)
        #: Indexed by `core.Count`.
        self.counts = self._numbers[1:]
        n_rates = 0 if request.adaptive is None else request.n_losses
        self.rate = allocate_records((n_rates,), np.dtype(np.float64))

    @property
    def begin(self) -> int:
        """Step of the first loss."""
        return int(self._numbers[0])

    @begin.setter
    def begin(self, step: int) -> None:
        self._numbers[0] = step

    @property
    def n_losses(self) -> int:
        return int(self.counts[core.Count.losses])

    @property
    def n_records(self) -> int:
        return int(self.counts[core.Count.records])

    @property
    def n_snapshots(self) -> int:
        return int(self.counts[core.Count.snapshots])

    @property
    def n_rates(self) -> int:
        return int(self.counts[core.Count.rates])

    @property
    def last_step(self) -> int:
        """Step of the last loss."""
        return self.begin + self.n_losses - 1

    @property
    def between_steps(self) -> bool:
        """Whether the weights belong to the last loss."""
        return bool(self.counts[core.Count.between_steps])

    def empty(self) -> None:
        """Make room for what comes after the last loss."""
        # In one statement, which no signal divides: `last_step` is right at any moment.
        self._numbers[:5] = self.last_step + 1, 0, 0, 0, 0


def allocate_records(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return an array for records, or say what to change if it does not fit the memory."""
    try:
        return np.empty(shape, dtype=dtype)
    except (MemoryError, ValueError, OverflowError) as error:  # the latter for shapes beyond addresses
        raise MemoryError(
            f"records of shape {shape} do not fit the memory ({error}): raise record_every (or "
            "weights_every), keep fewer singular_values or no vectors, or take fewer steps"
        ) from None


class _Job(Protocol):
    """One engine's preparation for a run, and the reading of what it left."""

    def run(self, arguments: Run) -> tuple[Outcome, int, int]: ...

    def states(self, outputs: _Outputs, complete: bool) -> ReducedStates | DenseStates: ...


class _KeptJob(_Job, Protocol):
    """One whose run can be written to a folder, and go on from there."""

    #: What moves beside the weights.
    motion: _Motion

    def moving(self) -> dict[str, FloatArray]: ...


class _Motion:
    """Velocities, what compensated sums have rounded away, and vectors that a search goes on from.

    Zeros at the start; written by the core where the run is kept.
    """

    def __init__(self, request: Request, weights: Sequence[FloatArray]) -> None:
        kept = request.drain_every > 0
        size = max(max(w.shape) for w in weights)
        self.velocity = [np.zeros_like(w) for w in weights] if kept and request.momentum.any() else []
        self.carry = [np.zeros_like(w) for w in weights] if kept and size <= core.SMALL_LIMIT else []
        adapts = kept and request.adaptive is not None
        self.search = [np.zeros(w.shape[1], dtype=w.dtype) for w in weights] if adapts else []
        #: Whether the run goes on from somewhere.
        self.resumes = False

    def arguments(self) -> OptimizerState:
        return {"velocity": self.velocity, "compensation": self.carry, "power_vectors": self.search}

    def velocity_norms(self) -> list[float]:
        """Return the norms of the velocities that a resumed run starts from; none are zeros."""
        if not self.resumes:
            return []
        return [float(np.linalg.norm(v.astype(np.float64))) for v in self.velocity]

    def arrays(self) -> dict[str, FloatArray]:
        lists = {"velocity": self.velocity, "carry": self.carry, "search": self.search}
        return {f"{name}_{i}": array for name, each in lists.items() for i, array in enumerate(each)}


class _ReducedJob:
    def __init__(self, request: Request, space: Closure) -> None:
        self.request = request
        self.space = space
        self.cores = [core_.copy() for core_ in space.cores]
        self.core_records = [allocate_records((request.n_records, *c.shape), c.dtype) for c in self.cores]
        n_scalars = sum(len(family.rho) for family in space.families)
        self.motion = _Motion(request, self.cores)
        #: rho, velocities and carries of all families.
        self.scalars = np.zeros((3, n_scalars))
        self.scalars[0] = [rho for family in space.families for rho in family.rho]
        self.rho_records = allocate_records((request.n_records, n_scalars), np.dtype(np.float64))

    def space_arrays(self) -> dict[str, FloatArray]:
        """Return what the core learns from, where it is not among the records anyway."""
        factor, target = self.space.input_factor, self.space.factor_target
        if factor is None or target is None:
            return {}
        return {"core_factor": factor, "core_factor_target": target}

    def within(self, arrays: Mapping[str, npt.NDArray[Any]]) -> _ReducedJob:
        """Return the job inside the subspaces that are written: another process finds others, by rounding."""
        if "basis_0" in arrays:
            bases: Sequence[FloatArray] = [arrays[f"basis_{i}"] for i in range(len(self.space.bases))]
        else:  # they follow from a law
            bases = self.space.bases
        assert isinstance(self.request.problem, Problem)
        factors = arrays.get("core_factor"), arrays.get("core_factor_target")
        if factors[0] is None:  # a run that an earlier version began, or one of white inputs
            factors = factors_within(self.request.problem, bases[0], bases[-1])
        space = replace(
            self.space,
            bases=bases,
            target=arrays["core_target"],
            input_gram=arrays.get("core_gram"),
            input_factor=factors[0],
            factor_target=factors[1],
        )
        return _ReducedJob(self.request, space)

    def run(self, arguments: Run) -> tuple[Outcome, int, int]:
        space = self.space
        whole: ReducedArguments = {
            **arguments,
            **self.motion.arguments(),
            "target": space.target,
            "input_gram": space.input_gram,
            "input_factor": space.input_factor,
            "factor_target": space.factor_target,
            "loss_scale": self.request.problem.loss_scale,
            "loss_floor": self.request.problem.loss_floor,
            "families": [(f.first - 1, f.multiplicity, f.coupling, f.rho) for f in space.families],
            "core_records": self.core_records,
            "rho_records": self.rho_records,
            "scalars": self.scalars if self.request.drain_every else None,
        }
        return core.reduced_descent(self.cores, whole)

    def moving(self) -> dict[str, FloatArray]:
        """Return the arrays that change while the run goes on, its state."""
        cores = {f"weight_{i}": core_ for i, core_ in enumerate(self.cores)}
        return cores | {"scalars": self.scalars} | self.motion.arrays()

    def states(self, outputs: _Outputs, complete: bool) -> ReducedStates:
        n = outputs.n_records
        cores = tuple(records[:n] for records in self.core_records)
        return reduced_states(self.request, self.space, cores, self.rho_records[:n])


def reduced_states(
    request: Request, space: Closure, cores: tuple[FloatArray, ...], rho: npt.NDArray[np.float64]
) -> ReducedStates:
    """Return what a reduced run recorded, together with what it started from."""
    given = request.weights
    return ReducedStates(
        bases=space.bases,
        cores=cores,
        families=space.families,
        rho=rho,
        target=space.target,
        input_gram=space.input_gram,
        layers=given if isinstance(given, ImplicitWeights) else ExplicitLayers(given),
        n_values=request.n_values,
        loss_scale=request.problem.loss_scale,
    )


class DenseJob:
    """Working copies of the weights, and room for what the records of whole layers hold."""

    def __init__(self, request: Request) -> None:
        self.request = request
        assert not isinstance(request.weights, ImplicitWeights)
        self.initial = tuple(request.weights)
        # The working copies; W_l(0) stays with the caller.
        self.weights = [aligned_copy(w) for w in self.initial]
        self.motion = _Motion(request, self.weights)
        n, dtype = request.n_records, request.dtype
        shapes = [w.shape for w in self.weights]
        kept = [min(*s, request.n_values if request.n_values is not None else min(s)) for s in shapes]
        tracked = kept if request.n_values != 0 else []
        self.values = [allocate_records((n, k), dtype) for k in tracked]
        self.errors, self.signs = (
            [allocate_records((n, k), np.dtype(np.float64)) for k in tracked] for _ in range(2)
        )
        self.branches, self.clusters = (
            [allocate_records((n, k), np.dtype(np.int64)) for k in tracked] for _ in range(2)
        )
        n_columns = len(core.TRACKING_COLUMNS)
        self.tracking = [allocate_records((n, n_columns), np.dtype(np.float64)) for _ in tracked]
        self.left, self.right = [], []
        if request.vectors:
            self.left = [allocate_records((n, s[0], k), dtype) for s, k in zip(shapes, kept, strict=True)]
            self.right = [allocate_records((n, s[1], k), dtype) for s, k in zip(shapes, kept, strict=True)]
        every = request.weights_every
        self.snapshots = [allocate_records((request.n_snapshots, *s), dtype) for s in shapes] if every else []

    def run(self, arguments: Run) -> tuple[Outcome, int, int]:
        """Descend; return the outcome, the last step, and the layer that grew most where it diverged."""
        whole: DenseArguments = {
            **arguments,
            **self.request.problem.engine_arguments(self.request.dtype),
            **self.motion.arguments(),
            "snapshot_every": self.request.weights_every or 0,
            "n_values": self.request.n_values,
            "values": self.values,
            "errors": self.errors,
            "signs": self.signs,
            "branches": self.branches,
            "clusters": self.clusters,
            "tracking": self.tracking,
            "tracker": {**core.TRACKER_DEFAULTS, "mode": cast("TrackerMode", self.request.tracking)},
            "velocity_norms": self.motion.velocity_norms(),
            # What starts from W(0) cannot go on from other weights.
            "factored": self.request.tracking == "auto" and not self.motion.resumes,
            "initial": [] if self.motion.resumes else [np.ascontiguousarray(w) for w in self.initial],
            "left": self.left,
            "right": self.right,
            "snapshots": self.snapshots,
        }
        return core.dense_descent(self.weights, whole)

    def moving(self) -> dict[str, FloatArray]:
        """Return the arrays that change while the run goes on, its state."""
        return {f"weight_{i}": w for i, w in enumerate(self.weights)} | self.motion.arrays()

    def states(self, outputs: _Outputs, complete: bool) -> DenseStates:
        """Return what was recorded so far, with the weights at the end where the run came to one."""
        n = outputs.n_records
        every = self.request.weights_every or 1
        first = -(-outputs.begin // every)
        return DenseStates(
            values=tuple(v[:n] for v in self.values),
            tracking=tuple(
                LayerTracking(*(a[:n] for a in arrays))
                for arrays in zip(
                    self.errors, self.signs, self.branches, self.clusters, self.tracking, strict=True
                )
            ),
            left=tuple(v[:n] for v in self.left),
            right=tuple(v[:n] for v in self.right),
            snapshots=tuple(s[: outputs.n_snapshots] for s in self.snapshots),
            snapshot_steps=(first + np.arange(outputs.n_snapshots, dtype=np.int64)) * every,
            initial=self.initial,
            final=tuple(self.weights) if complete else None,
        )


def _arguments(
    request: Request, outputs: _Outputs, bar: ProgressBar, on_flush: Callable[[int], None] | None = None
) -> Run:
    """Return what both engines of the core take."""
    return {
        "learning_rate": request.learning_rate.tolist(),
        "weight_decay": request.weight_decay.tolist(),
        "momentum": request.momentum.tolist(),
        "steps": request.steps,
        "record_every": request.record_every,
        "tolerance": -1.0 if request.tolerance is None else request.tolerance,
        "n_threads": request.n_threads,
        "loss": outputs.loss,
        "record_steps": outputs.record_steps,
        "counts": outputs.counts,
        "adaptive": None
        if request.adaptive is None
        else (request.adaptive.safety, request.adaptive.curvature, request.adaptive.error_scale),
        "rate": outputs.rate,
        "on_record": request.callback,
        "on_progress": bar.listener,
        "on_flush": on_flush,
        "first": outputs.begin,
        "flush_every": request.drain_every,
    }


def _trajectory(
    job: _Job, request: Request, certificate: Certificate, outputs: _Outputs, outcome: str, seconds: float
) -> Trajectory:
    """Return what is in the outputs."""
    return Trajectory(
        steps=outputs.record_steps[: outputs.n_records],
        loss=outputs.loss[: outputs.n_losses],
        states=job.states(outputs, complete=outcome in COMPLETE),
        certificate=certificate,
        problem=request.problem,
        config=request.describe(certificate.engine, outcome),
        wall_time=seconds,
        rates=None if request.adaptive is None else outputs.rate[: outputs.n_rates],
    )


def run_job(
    job: _Job, request: Request, certificate: Certificate, bar: ProgressBar, start: float
) -> Trajectory:
    """Let a job run, and return its trajectory or raise the error that holds it."""
    outputs = _Outputs(request)

    def trajectory(outcome: str) -> Trajectory:
        return _trajectory(job, request, certificate, outputs, outcome, time.perf_counter() - start)

    try:
        outcome, step, layer = job.run(_arguments(request, outputs, bar))
    except BaseException as error:
        if outputs.n_records > 0:
            partial = trajectory("interrupted")
            error.trajectory = partial  # type: ignore[attr-defined]
            error.add_note(
                f"the trajectory up to step {partial.steps[-1]} is kept in the attribute trajectory"
            )
        raise
    if outcome == "diverged":
        partial_run = trajectory("diverged") if outputs.n_records > 0 else None
        raise DivergedError(
            divergence_text(request, step, layer), step=step, layer=layer, trajectory=partial_run
        )
    return trajectory(outcome)


def _initial_of(states: ReducedStates | DenseStates) -> Any:
    """Return what a run started from, as `train` takes it."""
    if isinstance(states, DenseStates):
        return states.initial
    return states.layers.weights if isinstance(states.layers, ExplicitLayers) else states.layers


def _run_kept(
    job: _KeptJob, request: Request, certificate: Certificate, bar: ProgressBar, kept: Checkpoint
) -> Trajectory:
    """Run with everything written to a folder, or go on with what is there."""
    outputs = _Outputs(request)
    about, arrays = _trajectory(job, request, certificate, outputs, "unfinished", 0.0).to_arrays()
    settings = request.settings(certificate.engine)
    # Subspaces follow from the rest, to rounding.
    given = {name: array for name, array in arrays.items() if not name.startswith(("basis_", "core_"))}
    folder = RunFolder(kept.directory, identity_of(settings | {"problem": about["problem"]}, given))
    if folder.exists:
        folder.check_request()
        if folder.ending() is not None:  # it is read, which needs no lock
            folder.tidy()
            return _ended(folder, request)
    if isinstance(job, _ReducedJob):
        arrays |= job.space_arrays()
    beside = {"every": kept.every, "seconds": kept.seconds}
    with terminating(), folder.owned():
        folder.begin({"run": about, "settings": settings, "checkpoint": beside}, arrays)
        if folder.ending() is None:
            if isinstance(job, _ReducedJob):
                job = job.within(folder.request()[1])
            _run_owned(job, request, certificate, bar, outputs, folder, kept.seconds)
    return _ended(folder, request)


def _run_owned(
    job: _KeptJob,
    request: Request,
    certificate: Certificate,
    bar: ProgressBar,
    outputs: _Outputs,
    folder: RunFolder,
    seconds: float,
) -> None:
    """Go on from the newest state of a folder that this process owns, to the end of the run."""
    state = folder.newest()
    folder.go_back_to(-1 if state is None else state.step)
    if state is not None:
        outputs.begin = state.step
        job.motion.resumes = True
        for name, array in job.moving().items():
            array[...] = state.arrays[name]
        if request.callback is not None:
            request = replace(request, callback=_told(request.callback, folder, state.step))
    writer = _Writer(job, request, certificate, outputs, folder, state)

    def drain(step: int) -> None:
        writer.write_records()
        if folder.is_due(seconds):
            writer.write_state(step)
        outputs.empty()

    try:
        outcome, step, layer = job.run(_arguments(request, outputs, bar, drain))
        writer.write_records()
        if outcome != "diverged":
            writer.write_state(step)
        folder.end({"outcome": outcome, "step": step, "layer": layer, "seconds": writer.seconds})
    except BaseException as error:
        if outputs.between_steps:
            writer.save(error)
        raise


class _Writer:
    """Writes what a run computes to its folder."""

    def __init__(
        self,
        job: _KeptJob,
        request: Request,
        certificate: Certificate,
        outputs: _Outputs,
        folder: RunFolder,
        state: State | None,
    ) -> None:
        self.job, self.request, self.certificate = job, request, certificate
        self.outputs, self.folder = outputs, folder
        self.start = time.perf_counter() - (0.0 if state is None else state.seconds)
        #: Step of the last loss in the folder. A run that goes on computes the loss of its state once more.
        self.written = -1 if state is None else state.step

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken, those before a resumption included."""
        return time.perf_counter() - self.start

    def write_records(self) -> None:
        """Write what was recorded since the last time; may be called again after any interruption."""
        outputs = self.outputs
        if outputs.last_step > self.written:
            found = _trajectory(self.job, self.request, self.certificate, outputs, "unfinished", 0.0)
            records = _records(found, repeated=outputs.begin <= self.written)
            self.folder.write_records(outputs.last_step, records)
            self.written = outputs.last_step

    def write_state(self, step: int) -> None:
        """Write everything that moves."""
        self.folder.write_state(State(step, self.seconds, self.job.moving()))

    def save(self, error: BaseException) -> None:
        """Write everything up to the last step, and say on the error whether that worked."""
        step = self.outputs.last_step
        try:
            self.write_records()
            self.write_state(step)
            error.trajectory = load_folder(self.folder, self.request.problem)  # type: ignore[attr-defined]
        except Exception as failure:  # what ended the run is the error to raise
            self.folder.note_loss(error, failure)
        else:
            error.add_note(
                f"the run up to step {step} is kept in {self.folder.path}: train(.., checkpoint=..) or "
                "dlnfast resume goes on with it"
            )


def _told(callback: Callback, folder: RunFolder, begin: int) -> Callback:
    """Tell a callback of the records that are written, and return it as the rest of the run calls it."""
    answer: bool | None = None
    known: int | None = None  # the last step that it was told of
    n_before = 0
    for part in folder.records():
        for step in part["steps"].tolist():
            answer = callback(step, float(part["loss"][step - n_before]))
            known = step
        n_before += len(part["loss"])
    ended = answer is True and known == begin

    def rest(step: int, loss: float) -> bool | None:
        # The run begins with the last loss that was written.
        return ended if step == begin else callback(step, loss)

    return rest


def _ended(folder: RunFolder, request: Request) -> Trajectory:
    """Return the run of a folder that has ended, or raise the error that holds it."""
    run = load_folder(folder, request.problem)
    ending = folder.ending()
    assert ending is not None
    if ending["outcome"] == "diverged":
        step, layer = ending["step"], ending["layer"]
        text = divergence_text(request, step, layer)
        raise DivergedError(text, step=step, layer=layer, trajectory=run)
    return run


def _records(run: Trajectory, repeated: bool) -> dict[str, npt.NDArray[Any]]:
    """Return what was recorded, without what a run that goes on has recorded again."""
    first = int(repeated)
    arrays = {
        name: array if name.startswith("snapshot") else array[first:]
        for name, array in record_arrays(run.states).items()
    }
    arrays |= {"steps": run.steps[first:], "loss": run.loss[first:]}
    if run.rates is not None:
        arrays["rates"] = run.rates
    if repeated and "snapshot_steps" in arrays:
        again = int(np.sum(arrays["snapshot_steps"] == run.steps[0]))
        for name in arrays:
            if name.startswith("snapshot"):
                arrays[name] = arrays[name][again:]
    return arrays


def _steps_between_drains(request: Request, space: Closure | None) -> int:
    """Return how many steps take about a second, or fill a quarter of a gigabyte."""
    if space is None:
        widths = request.widths
        flops = core.step_flops(widths, core.best_pivot(widths)) + 4.0 * sum(
            map(math.prod, zip(widths[1:], widths[:-1], strict=True))
        )
        kept = [min(a, b) for a, b in zip(widths[1:], widths[:-1], strict=True)]
        sizes = [k if request.n_values is None else min(k, request.n_values) for k in kept]
        per_record = 8.0 * sum(5 * k + 14 for k in sizes)
        if request.vectors:
            per_record += 8.0 * sum(
                (a + b) * k for a, b, k in zip(widths[1:], widths[:-1], sizes, strict=True)
            )
    else:
        flops = step_flops(space.cores)
        per_record = 8.0 * sum(core_.size for core_ in space.cores)
    per_snapshot = 8.0 * sum(
        math.prod(shape) for shape in zip(request.widths[1:], request.widths[:-1], strict=True)
    )
    per_step = 16.0 + per_record / request.record_every
    per_step += per_snapshot / request.weights_every if request.weights_every else 0.0
    by_time, by_memory = _DRAIN_FLOPS / (flops + 1e3), _DRAIN_BYTES / per_step
    return int(np.clip(min(by_time, by_memory), 1, 2**20))


def divergence_text(request: Request, step: int, layer: int) -> str:
    """Return what an error says of a run whose loss left the finite numbers at this step."""
    text = (
        f"the loss is not finite at step {step} (layer {layer} has grown most): lower learning_rate (eta), "
        f"now {_span(request.learning_rate)}"
    )
    if request.adaptive is not None:
        text = f"the loss is not finite at step {step} (layer {layer} has grown most): lower safety, "
        text += f"now {request.adaptive.safety:g}"
    sigma = _largest_target_value(request.problem)
    if request.problem.input_gram is not None:
        text += ", or whiten the inputs"
    elif sigma > 0:
        bound = stability_threshold(sigma, len(request.weights), request.problem.loss_scale)
        text += f"; at a balanced minimum of this problem rates above {bound:.3g} oscillate"
    if request.weight_decay.max() * request.learning_rate.max() > 2.0:
        product = _span(request.learning_rate * request.weight_decay)
        text += f"; learning_rate * weight_decay is {product}, above 2"
    return text


def _largest_target_value(problem: Problem | Observations) -> float:
    """Return ||Phi||_2, or 0 where it is not known or would take a large decomposition."""
    if isinstance(problem, Observations):
        return 0.0
    if isinstance(problem.target, LowRank):
        return float(problem.target.s[0]) if problem.target.rank else 0.0
    return float(np.linalg.norm(problem.target, 2)) if min(problem.target.shape) <= _SMALL_TARGET else 0.0


def _span(values: npt.NDArray[np.float64]) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:g}" if low == high else f"{low:g} .. {high:g}"


def check_optimizer(optimizer: str) -> None:
    """Raise, with the reason, for all but gradient descent."""
    if isinstance(optimizer, str) and optimizer == "gd":
        return
    if isinstance(optimizer, str) and optimizer.lower() in _ENTRYWISE:
        raise AssumptionError(
            f"optimizer is {optimizer!r}: rates that differ from entry to entry destroy the invariant "
            "subspaces (the weights end up 50-70 % away from any reduced run), so neither engine offers it; "
            'wanted "gd", with momentum=... for heavy ball'
        )
    if isinstance(optimizer, str) and optimizer.lower() in _KEEPS_SUBSPACES:
        raise ValueError(
            f"optimizer is {optimizer!r}, which no engine runs yet. It keeps the invariant subspaces, as "
            "does every update made of gradients by sums, products, transposes and functions of singular "
            'values; wanted "gd", with momentum=... for heavy ball'
        )
    raise ValueError(f'optimizer is {optimizer!r}; wanted "gd" (with momentum=... for heavy ball)')


def _learning_rates(
    learning_rate: PerLayer | str,
    problem: Problem | Observations,
    weights: list[FloatArray] | ImplicitWeights,
    weight_decay: npt.NDArray[np.float64],
    momentum: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    n_layers = len(weights)
    if not isinstance(learning_rate, str):
        return per_layer(learning_rate, "learning_rate (eta)", n_layers)
    if learning_rate != "auto":
        raise TypeError(f'learning_rate (eta) is {learning_rate!r}; wanted numbers, "auto" or "adaptive"')
    if isinstance(problem, Observations):
        return automatic_rates(problem, weights, np.ones(n_layers), weight_decay, momentum)
    scales = weights.scales if isinstance(weights, ImplicitWeights) else [scale_of(w) for w in weights]
    return rates_at(problem, scales, weight_decay, momentum)


def rates_at(
    problem: Problem,
    scales: Sequence[float],
    weight_decay: npt.NDArray[np.float64],
    momentum: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return the learning rates of "auto" for layers of these scales (eps)."""
    n_layers = len(scales)
    # Weight decay makes everything sharper by lambda.
    sharpness = 1.0 / default_learning_rate(problem, n_layers, scale=max(scales)) + float(weight_decay.max())
    return np.full(n_layers, (1.0 - float(momentum.max())) / sharpness)


def automatic_rates(
    problem: Observations,
    weights: list[FloatArray] | ImplicitWeights,
    ratios: npt.NDArray[np.float64],
    weight_decay: npt.NDArray[np.float64],
    momentum: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return constant rates in these ratios: `curvature.constant_rate`."""
    layers = require_layers(weights)
    curvature = layer_curvatures(problem, layers)
    sharpness = 1.0 / constant_rate(problem, layers, ratios.tolist(), curvature)
    sharpness += float((ratios * weight_decay).max())
    rates: npt.NDArray[np.float64] = ratios * ((1.0 - float(momentum.max())) / sharpness)
    return rates


def _adaptive_rates(
    law: Adaptive, problem: Problem | Observations, weights: list[FloatArray] | ImplicitWeights
) -> tuple[npt.NDArray[np.float64], _AdaptiveRequest]:
    layers = require_layers(weights)
    safety = check_scale(law.safety, "safety", strict=True)
    ratios = per_layer(1.0 if law.ratios is None else law.ratios, "ratios", len(layers))
    error_scale = 1.0
    if isinstance(problem, Observations):
        error_scale = problem.error_scale
    elif problem.gram_eigen is not None:
        error_scale = float(np.sqrt(problem.gram_eigen[0][-1]))
    if law.curvature is not None:
        curvature = per_layer(law.curvature, "curvature", len(layers))
    elif isinstance(problem, Observations):
        curvature = np.array(layer_curvatures(problem, layers))
    else:
        curvature = np.full(len(layers), error_scale**2)
    return ratios, _AdaptiveRequest(safety, curvature.tolist(), error_scale)


def _check_n_values(singular_values: str | int | None) -> int | None:
    if singular_values is None or singular_values is False:
        return 0
    if isinstance(singular_values, str):
        if singular_values == "all":
            return None
        raise ValueError(f'singular_values is {singular_values!r}; wanted "all", a number or None')
    return min(check_count(singular_values, "singular_values", minimum=0, maximum=None), LARGEST_COUNT)


def _choose_implicit(engine: str, problem: Problem, law: ImplicitWeights) -> tuple[Certificate, Closure]:
    if engine == "dense":
        raise AssumptionError(
            "engine='dense' needs whole layers, but weights are a law: draw them with "
            "dln.orthogonal(..., implicit=False)"
        )
    space = find_closure(problem, law)
    found = space.assumptions
    if not found.hold:
        raise AssumptionError(_assumption_text(found))
    return Certificate("reduced", f"the closure holds in law, {found.describe_dims()}", found), space


def choose_engine(
    engine: str, problem: Problem | Observations, weights: list[FloatArray] | ImplicitWeights
) -> tuple[Certificate, Closure | None]:
    """Return which engine runs and why, with the active subspaces where it is the reduced one."""
    if isinstance(problem, Observations):
        if engine == "reduced":
            raise AssumptionError(
                "engine='reduced' does not hold here: of a matrix that is known in part no small subspace is "
                "invariant; train_compressed approximates"
            )
        require_layers(weights)
        return Certificate(
            "dense", f"the matrix is known through {problem.n_observations} observations"
        ), None
    if isinstance(weights, ImplicitWeights):
        return _choose_implicit(engine, problem, weights)
    if engine == "dense":
        return Certificate("dense", "engine='dense' was asked for", None), None
    filling = engine == "reduced" and breaks_no_assumption(problem, weights)
    space = find_closure(problem, weights, largest_share=1.0 if filling else LARGEST_SHARE)
    found = space.assumptions
    if engine == "reduced" and not found.hold:
        raise AssumptionError(_assumption_text(found))
    if engine == "auto" and min(found.dims) == 0 < max(found.dims):
        # Not wrong, but a reduced run would have no singular vectors to show in some layers.
        return Certificate(
            "dense", "layers of zeros: nothing reaches all of them from the target", found
        ), None
    if found.hold:
        return Certificate("reduced", f"the closure holds, {found.describe_dims()}", found), space
    failure = found.failures[0].text
    if found.failures[0].name == "closure" and breaks_no_assumption(problem, weights):
        # Exact all the same, but not faster.
        reason = f'little to gain with a target of this rank: {failure}; engine="reduced" takes more'
        return Certificate("dense", reason, found), None
    return Certificate("dense", f"the theorem does not apply: {failure}", found), None


def with_caution(certificate: Certificate, request: Request) -> Certificate:
    """Add to the reason that rounding may grow, where the rate is above what the minimum bears."""
    if request.steps < 2 or request.adaptive is not None:
        return certificate
    weights = request.weights
    caution = rate_caution(
        request.problem,
        weights.scales if isinstance(weights, ImplicitWeights) else [scale_of(w) for w in weights],
        request.learning_rate,
        request.momentum,
        decomposed=certificate.engine == "reduced",  # which has decomposed the target, however large
    )
    return replace(certificate, reason=f"{certificate.reason}{caution}") if caution else certificate


@np.errstate(over="ignore")
def rate_caution(
    problem: Problem | Observations,
    scales: Sequence[float],
    learning_rate: npt.NDArray[np.float64],
    momentum: npt.NDArray[np.float64],
    *,
    decomposed: bool = False,
) -> str:
    """Return what to add to the reason of a run whose rates are above what the minimum bears, else ""."""
    # Layers with rates of their own add up to their mean; heavy ball bears 1 + mu times as much.
    rate, bears = float(learning_rate.mean()), 1 + float(momentum.min())
    if rate == 0:
        return ""
    bound = bears * _largest_stable_rate(problem, scales, learning_rate / rate, rate / bears, decomposed)
    if rate <= bound:
        return ""
    where = "the balanced minimum"
    if isinstance(problem, Observations):
        where = "by an estimate from the observations the minimum"
    return (
        f"; learning_rate (eta) {rate:.3g} is above {bound:.3g}, where {where} is unstable: each step is "
        "exact to rounding, but rounding may grow, so that trajectories can part"
    )


def _largest_stable_rate(
    problem: Problem | Observations,
    scales: Sequence[float],
    ratios: npt.NDArray[np.float64],
    rate: float,
    decomposed: bool,
) -> float:
    """Return the rate above which the minimum is unstable, infinity where it is clear that `rate` is not."""
    n_layers = len(scales)
    if isinstance(problem, Observations):
        return _twice_over(minimum_sharpness_of_observed(problem, scales, ratios.tolist()))
    # A Frobenius norm bounds the largest singular value; where that is enough nothing is decomposed.
    gram = 1.0 if problem.gram_eigen is None else float(problem.gram_eigen[0][-1])
    best = problem.least_squares
    norm = float(np.linalg.norm(best.s if isinstance(best, LowRank) else best))
    scale = problem.loss_scale * gram
    if norm == 0 or scale == 0:
        return math.inf
    if math.isfinite(norm + scale) and rate <= stability_threshold(norm, n_layers, scale):
        return math.inf
    if problem.input_gram is not None:
        few = decomposed or min(problem.target.shape) <= _SMALL_TARGET
        return _twice_over(minimum_sharpness(problem, n_layers)) if few else math.inf
    sigma = float(problem.target_factors().s[0]) if decomposed else _largest_target_value(problem)
    return stability_threshold(sigma, n_layers, problem.loss_scale) if sigma > 0 else math.inf


def _twice_over(sharpness: float) -> float:
    return 2.0 / sharpness if sharpness > 0 else math.inf


def _on_device(request: Request, device: object) -> tuple[Request, DenseJob, Certificate]:
    """Return what runs on a PyTorch device, or say which engine does what this one does not."""
    if isinstance(request.problem, Observations):
        raise TypeError(
            f"problem is {type(request.problem).__name__}; engine='torch' wants a dlnfast.Problem: "
            "engine='dense' descends on observations of a matrix"
        )
    if isinstance(request.weights, ImplicitWeights):
        raise AssumptionError(
            "engine='torch' needs whole layers, but weights are a law: engine='reduced' trains it, or draw "
            "them with dln.orthogonal(..., implicit=False)"
        )
    if request.adaptive is not None:
        raise ValueError(_ADAPTIVE_RATE)
    from .torch.descent import TorchJob, find_device

    place = find_device(device, request.dtype)
    request = replace(request, device=str(place))
    certificate = Certificate("torch", f"engine='torch' was asked for, on {place}", None)
    return request, TorchJob(request, place), certificate


def _assumption_text(assumptions: Assumptions) -> str:
    lines = [
        f"{check.text} (limit {check.limit:.1e}"
        + (
            f"; a reduced run would be wrong by about {check.expected_error:.1e}"
            if check.expected_error
            else ""
        )
        + f"); {check.remedy}"
        for check in assumptions.failures
    ]
    return "engine='reduced' does not hold here. " + " | ".join(lines)
