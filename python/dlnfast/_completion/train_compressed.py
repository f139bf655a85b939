# SPDX-License-Identifier: MIT
"""Compressed factorisations: narrow networks that start in the directions which wide ones learn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .._closure.closure import find_closure
from .._problem.factors import leading_factors
from .._problem.low_rank import LowRank
from .._problem.observations import Observations
from .._problem.problem import Problem
from .._support.arrays import FloatArray, check_choice, check_count, check_scale, scale_of
from .._support.errors import AssumptionError, ShapeError
from .._support.moved import refuse_keywords
from .._support.schedule import Schedule, read_rate, read_stored_rate
from .._training.options import MOVED_OPTIONS, Adaptive, Record
from .._training.rates import automatic_rates, rate_caution
from .._training.stopping import Plateau
from .._training.train import train
from .._trajectory.trajectory import Trajectory
from .._weights.checks import check_initial
from .._weights.implicit import ImplicitWeights
from .projected import project, train_in_turns, train_projected

BASES: Final = ("gradient", "surrogate")

#: Observations are projected onto frozen bases as long as that takes no more flops.
_PROJECTION_FLOPS: Final = 5e10


def compressed_weights(
    problem: Observations | Problem,
    weights: Sequence[npt.ArrayLike] | ImplicitWeights | None = None,
    *,
    rank: int | str = "auto",
    basis: str = "gradient",
    depth: int = 3,
    scale: float = 1e-3,
) -> list[FloatArray]:
    r"""Return the layers of a narrow network, in the directions that a wide one learns.

    Parameters
    ----------
    problem : Completion, Sensing or Problem
        Matrix to be learned; a `Problem` with white inputs.
    weights : list of ndarray, or ImplicitWeights
        Layers W_1(0) .. W_L(0) of the wide network, orthogonal up to their scales, for "gradient"; or lazily
        sampled weights, so that nothing of the size d x d is formed.
    rank : int or "auto"
        r_hat. "gradient": at least the target's rank; the network is 2 r_hat wide. "surrogate": the width of
        the network; 2 r is a good choice. "auto" takes r, for "surrogate" 2 r, from the spectrum of the
        observations: `Completion.suggested_rank`.
    basis : {"gradient", "surrogate"}
        "gradient": ``[V_1^T, C_1 .. C_L, U_L]``, L + 2 layers, with V_1 = A_0 an orthonormal basis of
        span[V_g, Q_{L:1}^T U_g] for the leading r_hat singular vectors of the gradient at W(0), U_L = A_L its
        image and C_l = A_l^T W_l(0) A_{l-1}, all of them scaled isometries. "surrogate": ``[eps V_s^T, eps I,
        .., eps U_s]``, L layers, with the leading singular vectors of the surrogate: ``Omega * Phi / p`` for
        observed entries, ``sum_i y_i A_i`` for measurements, Phi itself where it is known.
    depth, scale : int, float
        Number of layers L and initial scale eps, for "surrogate".

    Returns
    -------
    list of ndarray
        Initial layers for `train`, which needs a smaller learning rate for the first and the last of them;
        `train_compressed` does both.

    Raises
    ------
    ValueError
        For a rank above the dimensions, or an unknown basis.
    AssumptionError
        For "gradient" with layers that are not scaled isometries.

    Notes
    -----
    One truncated SVD by products with the observations, and the thin products of `closure`.

    Yaras et al. 2024, arXiv 2406.04112, and Kwon et al. 2024, arXiv 2311.05061. The authors of the first take
    three full d x d decompositions to the same space.

    Cost: the leading singular vectors of the gradient at the start, or of the surrogate, by thin products;
    no d x d decomposition.

    Examples
    --------
    >>> import dlnfast as dln
    >>> problem = dln.low_rank_completion(dim=100, rank=2)
    >>> narrow = dln.compressed_weights(problem, dln.orthogonal([100] * 4, scale=1e-3), rank=2)
    >>> [w.shape for w in narrow]
    [(4, 100), (4, 4), (4, 4), (4, 4), (100, 4)]
    """
    _check_kind(problem)
    if problem.input_gram is not None:
        raise AssumptionError("compressed factorisations need white inputs: Problem.from_data(whiten=...)")
    check_choice(basis, "basis", BASES)
    smaller = min(problem.dim_out, problem.dim_in)
    if isinstance(rank, str):
        count = _automatic_rank(rank, problem, basis)
    else:
        count = check_count(rank, "rank (r_hat)")
    if count > smaller:
        raise ValueError(
            f"rank (r_hat) is {count}; wanted at most {smaller}, the smaller side of the "
            f"{problem.dim_out} x {problem.dim_in} matrix"
        )
    if basis == "gradient":
        if weights is None:
            raise ValueError(
                'weights are needed for basis="gradient": dln.orthogonal([d] * (L + 1), scale=...)'
            )
        return _gradient_basis(problem, check_initial(weights, problem), count)
    if weights is not None:
        raise ValueError('basis="surrogate" takes depth and scale, not weights')
    n_layers = check_count(depth, "depth", minimum=2)
    eps = check_scale(scale, "scale", strict=True)
    factors = _surrogate(problem, count)
    inner = [eps * np.eye(count) for _ in range(n_layers - 2)]
    return [np.ascontiguousarray(eps * factors.V.T), *inner, np.ascontiguousarray(eps * factors.U)]


def _refuse_schedules(learning_rate: Any, options: dict[str, Any]) -> None:
    """Raise for rates that change from step to step."""
    for name, rate in {"learning_rate": learning_rate, **options}.items():
        if isinstance(rate, Schedule):
            raise TypeError(
                f"{name} is {rate!r}; wanted a number, or outer_every=1: a step of the outer layers replaces "
                "several at a constant rate"
            )


def _refuse_rules(options: dict[str, Any]) -> None:
    """Raise for other rules than gradient descent."""
    if options.get("optimizer", "gd") != "gd":
        raise ValueError(f'optimizer is {options["optimizer"]!r}; train_compressed runs "gd" only')


def _check_kind(problem: object) -> None:
    if not isinstance(problem, (Observations, Problem)):
        raise TypeError(f"problem is {type(problem).__name__}; wanted a Completion, Sensing or Problem")


def _automatic_rank(rank: str, problem: Observations | Problem, basis: str) -> int:
    if rank != "auto":
        raise ValueError(f'rank (r_hat) is {rank!r}; wanted an integer or "auto"')
    if isinstance(problem, Problem):
        found = max(problem.target_factors().rank, 1)
    else:
        found = problem.suggested_rank()
    return min(2 * found if basis == "surrogate" else found, problem.dim_out, problem.dim_in)


def _surrogate(problem: Observations | Problem, rank: int) -> LowRank:
    if isinstance(problem, Problem):
        return _pad(problem.target_factors(), rank)
    return leading_factors(problem.backprojection(), rank)


def _pad(factors: LowRank, rank: int) -> LowRank:
    """Return exactly `rank` singular vectors, of which those beyond the rank of a matrix are arbitrary."""
    missing = rank - factors.rank
    if missing <= 0:
        return factors.truncated(rank)
    left, right = (
        np.linalg.qr(np.hstack([x, np.random.default_rng(0).standard_normal((len(x), missing))]))[0]
        for x in (factors.U, factors.V)
    )
    left[:, : factors.rank], right[:, : factors.rank] = factors.U, factors.V
    return LowRank(left, np.concatenate([factors.s, np.zeros(missing)]), right)


def _gradient_basis(
    problem: Observations | Problem, weights: list[FloatArray] | ImplicitWeights, rank: int
) -> list[FloatArray]:
    if isinstance(problem, Problem):
        # The gradient at the start differs from -Phi by a multiple of a rotation, which turns no vector
        # out of the subspaces: with the whole of Phi known they are invariant whatever its share.
        factors = _pad(problem.target_factors(), rank)
    else:
        # Lazily sampled layers are not revealed before the subspaces are known. Their product, of the order
        # of eps^L, is far below the learned matrix.
        explicit = None if isinstance(weights, ImplicitWeights) else weights
        factors = leading_factors(problem.backprojection(explicit), rank)
    if not factors.s.all():  # zeros would have no directions to keep
        factors = LowRank(factors.U, np.maximum(factors.s, np.finfo(np.float64).tiny), factors.V)
    space = find_closure(Problem(factors), weights, largest_share=1.0)
    if not space.holds:
        raise AssumptionError(
            "the subspaces of the gradient do not close with these weights; wanted scaled isometries "
            f"(dln.orthogonal):\n{space.report()}"
        )
    dtype = space.cores[0].dtype
    first, last = np.asarray(space.bases[0]), np.asarray(space.bases[-1])
    layers = [first.T, *space.cores, last]
    return [np.ascontiguousarray(layer, dtype=dtype) for layer in layers]


@refuse_keywords(MOVED_OPTIONS)
def train_compressed(
    problem: Observations | Problem,
    weights: Sequence[npt.ArrayLike] | ImplicitWeights | None = None,
    *,
    rank: int | str = "auto",
    steps: int | None = None,
    outer: float = 0.01,
    outer_every: int = 1,
    basis: str = "gradient",
    depth: int = 3,
    scale: float = 1e-3,
    learning_rate: float | str | Schedule | Adaptive = "adaptive",
    record: Record | None = None,
    **options: Any,
) -> Trajectory:
    r"""Train a compressed factorisation: the layers of `compressed_weights`, the outer two at another rate.

    Parameters
    ----------
    problem : Completion, Sensing or Problem
        Matrix to be learned.
    weights, rank, basis, depth, scale
        Parameters of `compressed_weights`.
    steps : int, optional
        Maximum number of updates. By default, which needs adaptive rates because others stay long on
        plateaus, training stops when the loss is 1e-14 of its initial value, when its relative decrease in
        the last fifth of all steps (at least 500) is below 1e-5, or after 200,000 steps.
    outer : float
        gamma (or alpha): the first and last layer learn at ``outer * learning_rate``. 0 freezes them: the
        observations are then projected onto them once, and a step costs O(r_hat^4) whatever their number.
        For `basis` "surrogate" 1 to 10 is usual.
    outer_every : int
        Number of steps between two updates of the outer layers, which are as large as the sum of those that
        they replace. In between the observations are projected onto the outer layers. That is many times
        faster for measurements, each of which costs as much as the whole matrix, and as accurate as the outer
        layers are slow. Records are taken at multiples of it. Ignored where the inner layers
        have as many entries as there are observations.
    learning_rate : float, Schedule, "adaptive", "auto" or Adaptive
        eta of the inner layers. A `Schedule` has one rate for each step. "adaptive" follows the weights;
        "auto" is constant: see `train`.
    record : Record, optional
        The records of the run. By default no singular values; with ``steps=None`` every 100th step, with
        `outer_every` above 1 the first and the last step.
    **options
        Other options of `train`: weight_decay, momentum, tolerance, n_threads, checkpoint. With `outer_every`
        above 1 no rate may be a `Schedule`.

    Returns
    -------
    Trajectory
        Trajectory of the narrow network, whose first and last layers are ``V_1^T`` and ``U_L``.
        `Trajectory.end_to_end` gives the matrix; ``problem.recovery_error(run)`` needs no d x d array.

    Raises
    ------
    ValueError, AssumptionError
        As `compressed_weights` and `train`.

    Notes
    -----
    If Phi is known in part, no subspace is exactly invariant; with gamma > 0 the bases follow the subspaces
    of the wide network. 12 r_hat flops per observed entry and step.

    Examples
    --------
    >>> import dlnfast as dln
    >>> problem = dln.low_rank_completion(dim=200, rank=3, observed=0.3)
    >>> run = dln.train_compressed(
    ...     problem, dln.orthogonal([200] * 4, scale=1e-3), rank=3, steps=3000, tolerance=1e-16
    ... )
    >>> problem.recovery_error(run) < 1e-5
    True
    """
    start = time.perf_counter()
    _check_kind(problem)
    _refuse_rules(options)
    ratio = check_scale(outer, "outer (gamma)")
    turn = check_count(outer_every, "outer_every")
    if turn > 1 and ratio > 0:
        _refuse_schedules(learning_rate, options)
    if turn > 1 and ratio > 0 and isinstance(problem, Problem):
        raise TypeError(
            "outer_every is for a Completion or Sensing: the bases of a known target do not change"
        )
    if record is None:
        every = 1
        if steps is None:
            every = 100
        elif turn > 1:
            every = max(check_count(steps, "steps", minimum=0), 1)
        record = Record(every=every, singular_values=None)
    if steps is None:
        steps = _set_default_tolerance(problem, learning_rate, options)
        record = replace(record, callback=Plateau(record.callback))
    steps = check_count(steps, "steps", minimum=0)
    if isinstance(learning_rate, Schedule):
        _read_schedule(learning_rate, steps)  # wrong ones are errors before the bases are computed
    narrow = compressed_weights(problem, weights, rank=rank, basis=basis, depth=depth, scale=scale)
    settings: dict[str, Any] = {"steps": steps, "record": record, **options}
    inside = len(narrow) - 2
    if isinstance(problem, Observations) and ratio == 0 and inside > 0 and _may_project(problem, narrow):
        run = train_projected(problem, narrow, learning_rate, settings)
    elif isinstance(problem, Observations) and turn > 1 and ratio > 0 and _is_worthwhile(problem, narrow):
        run = train_in_turns(problem, narrow, learning_rate, ratio, turn, settings)
    else:
        run = train(
            problem,
            narrow,
            learning_rate=_rates(problem, narrow, learning_rate, ratio, steps),
            engine="dense",
            **settings,
        )
    text = (
        f"compressed to {narrow[0].shape[0]} dimensions by the {basis}, outer layers at {ratio:g} times eta"
    )
    if (
        not isinstance(learning_rate, (str, Adaptive)) and steps > 1
    ):  # "auto" stays below the stability threshold
        largest, momentum = (
            read_stored_rate(run.config[name], len(narrow), steps).max(axis=0)
            for name in ("learning_rate", "momentum")
        )
        text += rate_caution(problem, [scale_of(w) for w in narrow], largest, momentum)
    run.certificate = replace(run.certificate, reason=text)
    run.config["compressed"] = {
        "rank": narrow[0].shape[0] // (2 if basis == "gradient" else 1),
        "basis": basis,
        "outer": ratio,
        "outer_every": turn,
    }
    run.wall_time = time.perf_counter() - start
    return run


#: Maximum number of steps, and relative loss at which training stops, for `steps=None`.
_MOST_STEPS: Final = 200_000
_ENOUGH: Final = 1e-14


def _set_default_tolerance(
    problem: Observations | Problem,
    learning_rate: float | str | Schedule | Adaptive,
    options: dict[str, Any],
) -> int:
    """Set the default tolerance among the options, and return the largest number of steps."""
    if not isinstance(learning_rate, Adaptive) and not _is_word(learning_rate, "adaptive"):
        raise ValueError(
            "steps is None; wanted a number unless learning_rate is adaptive: at other rates the loss may "
            "stay flat long before the end"
        )
    known = problem.output_norm_squared if isinstance(problem, Problem) else float(np.sum(problem.values**2))
    start = problem.loss_scale / 2 * known
    options.setdefault("tolerance", _ENOUGH * start)
    return _MOST_STEPS


def _rates(
    problem: Observations | Problem,
    narrow: Sequence[FloatArray],
    learning_rate: float | str | Schedule | Adaptive,
    outer: float,
    steps: int,
) -> Sequence[float] | Schedule | Adaptive:
    ratios = [outer, *[1.0] * (len(narrow) - 2), outer]
    if isinstance(learning_rate, Adaptive):
        return replace(learning_rate, ratios=ratios)
    if _is_word(learning_rate, "adaptive"):
        return Adaptive(ratios=ratios)
    if _is_word(learning_rate, "auto") and isinstance(problem, Observations):
        none = np.zeros(len(ratios))
        return list(automatic_rates(problem, list(narrow), np.array(ratios), none, none))
    if isinstance(learning_rate, Schedule):
        return Schedule.from_values(_read_schedule(learning_rate, steps) * ratios)
    if isinstance(learning_rate, str):
        raise ValueError(f'learning_rate (eta) is {learning_rate!r}; wanted a number, "adaptive" or "auto"')
    eta = check_scale(learning_rate, "learning_rate (eta)")
    return [eta * ratio for ratio in ratios]


def _read_schedule(schedule: Schedule, steps: int) -> FloatArray:
    """Return the learning rate of every step, (steps, 1); of the first step for a run without any."""
    values = read_rate(schedule, "learning_rate (eta)", steps=max(steps, 1))
    if values.shape[1] > 1:
        raise ShapeError(
            f"learning_rate (eta) has rates of {values.shape[1]} layers; wanted one rate for each step: "
            "outer is the ratio of the outer layers"
        )
    return values


def _is_word(x: object, word: str) -> bool:
    return isinstance(x, str) and x == word


def _is_worthwhile(problem: Observations, narrow: Sequence[FloatArray]) -> bool:
    """Return whether fewer numbers are left after a projection than were observed."""
    return _may_project(problem, narrow) and narrow[-1].shape[1] * narrow[0].shape[0] < problem.n_observations


def _may_project(problem: Observations, narrow: Sequence[FloatArray]) -> bool:
    size = narrow[-1].shape[1] * narrow[0].shape[0]
    return bool(2.0 * problem.n_observations * size**2 <= _PROJECTION_FLOPS)


__all__ = ["compressed_weights", "project", "train_compressed"]
