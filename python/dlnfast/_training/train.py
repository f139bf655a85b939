# SPDX-License-Identifier: MIT
"""`train` and `resume`: check the options, choose the engine, run it, and return a `Trajectory`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

import numpy.typing as npt

from .._problem.kinds import AnyProblem
from .._problem.observations import Observations
from .._problem.problem import Problem
from .._problem.samples import SampleProblem
from .._support.checkpoint import Checkpoint, RunFolder
from .._support.progress import ProgressBar
from .._trajectory.load import load
from .._trajectory.trajectory import Trajectory
from .._weights.checks import check_initial
from .._weights.implicit import ImplicitWeights
from .callbacks import RecordCallback
from .checkpointed import run_checkpointed, steps_between_flushes
from .engines import resolve
from .jobs import refuse_unread_options, run_job
from .options import Adaptive, Options, TrainOptions, takes_options
from .stopping import Plateau


@takes_options
def train(
    problem: AnyProblem,
    weights: Sequence[npt.ArrayLike] | ImplicitWeights,
    *,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    **options: Unpack[TrainOptions],
) -> Trajectory:
    r"""Run gradient descent on ``l = c/2 ||W_{L:1} X - Y||_F^2``, or on the loss of a `SampleProblem`.

    All layers move at once, with heavy-ball momentum where it is asked for:
    ``V_l <- mu_l V_l + G_l + lambda_l W_l`` and ``W_l <- W_l - eta_l V_l``, where
    ``G_l = c W_{L:l+1}^T (W_{L:1} S - Phi) W_{l-1:1}^T`` and V_l(0) = 0.

    Parameters
    ----------
    problem : Problem, Completion, Sensing or SampleProblem
        The sums S and Phi and the scale c of the loss. Note that c (``problem.loss_scale``) multiplies every
        learning rate. For a matrix known by some entries or linear measurements the dense engine descends on
        their loss. A `SampleProblem` has mini-batches, label noise, other losses and biases, and needs
        PyTorch: ``engine="auto"`` is then "torch".
    weights : sequence of array_like, or ImplicitWeights
        Initial layers ``W_1(0), .., W_L(0)``, W_l of shape (d_l, d_{l-1}), all float64 or all float32. They
        are never changed; the trajectory refers to them, so do not change them either. Lazily sampled
        weights (``orthogonal(..., implicit=True)``) train with the reduced engine at any width.
    **options
        Options of the run: the fields of `Options`.
    checkpoint : path or Checkpoint, optional
        Folder of this run alone. Records are written there during the run, so that they need no memory, and
        the state about every ten seconds. The same call, or `resume`, resumes the run bit for bit with the
        same number of threads, or returns a finished run. A crash loses the steps after the last state;
        Ctrl-C and SIGTERM lose nothing, except that Ctrl-C with the torch engine goes back to the last state.
        The tracker of singular values restarts, so that branches get new numbers.

    Returns
    -------
    Trajectory
        The loss at every step, and the records.

    Raises
    ------
    ShapeError
        Weights that do not fit each other or the problem.
    AssumptionError
        ``engine="reduced"`` where the theorem does not hold, lazily sampled weights for an engine that needs
        whole layers, or an optimizer that acts entry by entry.
    DivergedError
        The loss stopped being finite; the exception holds the trajectory up to there.
    ModuleNotFoundError
        ``engine="torch"``, or a `SampleProblem`, without PyTorch.
    FolderInUseError
        If another run, of this process or another one, writes to the folder of `checkpoint`.
    OSError
        If that folder cannot be read or written; its contents stay, and the same call resumes from them.
    TypeError, ValueError
        For any other argument out of its range; the message names it. Keywords of version 0.1.0, such as
        ``record_every``, get a message that names the new ones.

    Notes
    -----
    Reduced: O(L r^3) per step, O(L d^2 r) once. Dense: 6 (L - 1) d^3 flops per step for square layers; with
    d_L = K << d no d^3 at all, 6 (L - 1) K d^2 flops and one read and one read-and-write of each weight
    matrix. Neither depends on the number of samples. Torch: the flops of the dense engine in 3 L + 2 or so
    calls of PyTorch, up to three more for each layer with weight decay or momentum. On an accelerator the
    losses are read at records, or every 64 steps (every step with `tolerance`), and the weights are held
    twice to find the step of a divergence, three times where k singular values are recorded. float32 is
    not rounded to TF32 or bfloat16, whatever PyTorch is set to. A `SampleProblem`: 6 n sum_l d_l d_{l-1}
    flops per step for n samples, and a forward pass of all samples at each record of a stochastic run.

    At rates above two over the sharpness of the minimum both engines are still exact to rounding at every
    step, but gradient descent may amplify rounding errors, so that the trajectories of both engines, or of
    one engine on two machines, can separate after some hundred steps. ``run.certificate.reason`` warns of
    this with the bound; the expected error in the certificate holds while that growth is small. The bound is
    that of the balanced minimum (`dlnfast.theory.stability_threshold` for white inputs); for a matrix known
    in part it is estimated from the observations. If the smaller side of a dense target is above 512, only
    the reduced engine computes it.

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
    chosen = Options.from_keywords(options)
    if not isinstance(problem, (Problem, Observations, SampleProblem)):
        raise TypeError(
            f"problem is {type(problem).__name__}; wanted a dlnfast.Problem, Completion, Sensing or "
            "SampleProblem"
        )
    if isinstance(problem, SampleProblem) and chosen.engine == "auto":
        chosen = replace(chosen, engine="torch")  # before the checks: it has more optimizers
    chosen = chosen.checked()
    initial = check_initial(weights, problem)
    folder = None if checkpoint is None else Checkpoint.of(checkpoint)
    engine, request, certificate = resolve(chosen, problem, initial)
    if engine.space is None:
        request = request.with_small_snapshots()
    if folder is not None:
        interval = folder.every or steps_between_flushes(request, engine.space)
        request = replace(request, flush_every=interval)
    job = engine.prepare(request)
    refuse_unread_options(job, chosen)
    import logging  # not needed by programs that do not train

    logging.getLogger("dlnfast").info("%s", certificate)
    with ProgressBar(request.steps, chosen.record.progress) as bar:
        if folder is not None:
            return run_checkpointed(job, request, certificate, bar, folder)
        return run_job(job, request, certificate, bar, start)


def resume(
    directory: str | os.PathLike[str], *, progress: bool = False, callback: RecordCallback | None = None
) -> Trajectory:
    """Resume a checkpointed run, and return it when it is finished.

    Parameters
    ----------
    directory : path
        Folder that was the argument ``checkpoint`` of `train`.
    progress : bool
        Whether to show a progress bar, as in `Record`.
    callback : callable, optional
        Callback of the records, as in `Record`.

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
    Cost: that of the remaining steps, and of those since the last state.
    """
    folder = RunFolder(directory)
    metadata, _ = folder.request()
    saved = load(folder.path)
    settings = metadata["settings"]
    adaptive, device = settings["adaptive"], settings.get("device")
    options = Options.from_flat(settings)
    if settings["plateau"]:
        callback = Plateau(callback)
    options = replace(
        options,
        learning_rate=options.learning_rate if adaptive is None else Adaptive(**adaptive),
        engine=options.engine if device is None else f"{options.engine}:{device}",
        record=replace(options.record, progress=progress, callback=callback),
    )
    assert saved.problem is not None
    weights = saved.states.initial_weights()
    if weights is None:
        raise ValueError(
            f"directory: {folder.path} does not hold W(0): the weights were lazily sampled, and had answered "
            "other queries before the run; resume it by train(..., checkpoint=...) with the same weights"
        )
    return train(
        saved.problem,
        weights,
        **options.keywords(),
        checkpoint=Checkpoint(directory, **metadata["checkpoint"]),
    )
