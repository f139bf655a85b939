# SPDX-License-Identifier: MIT
"""`train`: checks the request, chooses the engine, runs it, and returns a `Trajectory`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy.typing as npt

from .._closure.certificate import Certificate
from .._problem.observations import Observations
from .._problem.problem import Problem
from .._support.arrays import check_choice
from .._support.checkpoint import Checkpoint, RunFolder
from .._support.errors import AssumptionError
from .._support.progress import ProgressBar
from .._trajectory.load import load
from .._trajectory.trajectory import Trajectory
from .._weights.checks import check_initial
from .._weights.implicit import ImplicitWeights
from .checkpointed import run_checkpointed, steps_between_flushes
from .engines import ADAPTIVE_RATE, choose_engine, with_caution
from .jobs import DenseJob, ReducedJob, ResumableJob, run_job
from .rates import Adaptive, PerLayer
from .request import Callback, Request, check_optimizer
from .stopping import Plateau

logger = logging.getLogger("dlnfast")


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
    job: ResumableJob
    if engine == "torch":
        if kept is not None:
            request = replace(request, drain_every=kept.every or steps_between_flushes(request, None))
        request, job, certificate = _on_device(request, device)
    else:
        if request.adaptive is not None and engine == "auto" and not isinstance(initial, ImplicitWeights):
            certificate, space = Certificate("dense", "learning_rate is adaptive", None), None
        else:
            certificate, space = choose_engine(engine, problem, initial)
        if request.adaptive is not None and space is not None:
            raise ValueError(ADAPTIVE_RATE)
        if kept is not None:
            request = replace(request, drain_every=kept.every or steps_between_flushes(request, space))
        job = DenseJob(request) if space is None else ReducedJob(request, space)
    certificate = with_caution(certificate, request)
    logger.info("%s", certificate)
    with ProgressBar(request.steps, progress) as bar:
        if kept is not None:
            return run_checkpointed(job, request, certificate, bar, kept)
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
        begun.states.initial_weights(),
        **settings,
        checkpoint=Checkpoint(directory, **about["checkpoint"]),
        progress=progress,
        callback=callback,
    )


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
        raise ValueError(ADAPTIVE_RATE)
    from ..torch.descent import TorchJob, find_device

    place = find_device(device, request.dtype)
    request = replace(request, device=str(place))
    certificate = Certificate("torch", f"engine='torch' was asked for, on {place}", None)
    return request, TorchJob(request, place), certificate
