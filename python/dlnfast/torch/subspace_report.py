# SPDX-License-Identifier: MIT
"""`subspace_report`: whether the layers of a trained network learned in small subspaces."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import nn

from .. import measures
from .._problem.factors import leading_factors
from .._problem.low_rank import LowRank
from .._support.arrays import FloatArray, check_count, check_scale, random_generator
from .._support.haar import signed_q
from ._gradients import TensorMap
from ._running import preserve_model
from .layers import LayerChoice, WeightMatrix, weight_matrices
from .track import SpectralTracker

if TYPE_CHECKING:
    from ..plots import LineDisplay

#: Function of the model that returns a score, larger for a better one, or the scores of the samples.
Evaluate = Callable[[nn.Module], float | Sequence[float] | FloatArray | torch.Tensor]

#: Error of the singular values of a change relative to the largest.
_TOLERANCE: Final = 1e-8
#: Random directions outside of the leading ones whose images are compared.
_N_DIRECTIONS: Final = 64
#: If the rest of a change keeps this share of the gain too, each of both parts is enough.
_REDUNDANT: Final = 0.5
#: Largest part of a change outside of 2K directions, relative to that with shuffled labels, for a verdict.
_CONTRAST: Final = 0.5
#: Number of standard errors by which the mean over samples of a difference has to differ from zero.
_N_ERRORS: Final = 2.0


@dataclass(frozen=True)
class LayerSubspace:
    """What `subspace_report` measured for one layer.

    Attributes
    ----------
    name : str
        Name of the layer.
    shape : tuple of int
        Rows m and columns n of its matrix.
    relative_change : float
        ``||W(T) - W(0)||_F / ||W(0)||_F``.
    share, random_share : dict of int to float
        Share of ``||W(T) - W(0)||_F^2`` in the k leading singular values, by k, and that of a random matrix
        of the same shape with independent Gaussian entries.
    shuffled_share : dict of int to float, or None
        Share of the change by training on shuffled labels in its own k leading singular values.
    turn, random_turn : float
        Median angle between the images of 64 random vectors under W(T) and W(0), in radians, for vectors
        orthogonal to the 2K leading right singular vectors of the change; and the same for a random change of
        equal norm.
    coupling, random_coupling : float or None
        ``||U^T V||_F^2 / 2K`` for the 2K leading left singular vectors U of the change, and the leading right
        singular vectors V of the change of the next layer; and its mean for random subspaces, ``2K / m``.
        None if the next layer has other inputs than these outputs.
    scores : dict of int to float
        Score of the model with the change of this layer cut to its k leading singular values; 0: this layer
        is at its start.
    scores_without : dict of int to float
        Score of the model without the k leading singular values of this layer's change.
    verdict : str
        One sentence, with the numbers that carry it.
    learns_in_subspace : bool or None
        Whether 2K directions keep the score; None if that was not tested, or shows nothing.
    margin, margin_error : float or None
        Score with 2K directions minus the least one for a verdict of a small subspace, and the standard error
        of this difference; None without scores of samples.
    """

    name: str
    shape: tuple[int, int]
    relative_change: float
    share: dict[int, float]
    random_share: dict[int, float]
    shuffled_share: dict[int, float] | None
    turn: float
    random_turn: float
    coupling: float | None
    random_coupling: float | None
    scores: dict[int, float] = field(default_factory=dict)
    scores_without: dict[int, float] = field(default_factory=dict)
    verdict: str = ""
    learns_in_subspace: bool | None = None
    margin: float | None = None
    margin_error: float | None = None


@dataclass(frozen=True)
class SubspaceReport:
    """Result of `subspace_report`.

    Attributes
    ----------
    rank : int
        K.
    layers : dict of str to LayerSubspace
        Measurements by layer.
    score : float or None
        Score of the trained model.
    joint_scores : dict of int to float
        Score with the changes of all these layers cut to their k leading singular values.
    """

    rank: int
    layers: dict[str, LayerSubspace]
    score: float | None
    joint_scores: dict[int, float]

    def __str__(self) -> str:
        """Return the verdicts, one line per layer, and the joint test."""
        lines = [layer.verdict for layer in self.layers.values()]
        if len(self.layers) > 1 and 2 * self.rank in self.joint_scores and self.score is not None:
            first, cut = self.joint_scores[0], self.joint_scores[2 * self.rank]
            text = f"all {len(self.layers)} layers together: at their start the score is {first:.4g}, with "
            text += f"{2 * self.rank} directions of each change {cut:.4g}, of {self.score:.4g}"
            lines.append(text)
        return "\n".join(lines)

    def table(self) -> list[dict[str, Any]]:
        """Return one dict of numbers per layer."""
        return [asdict(layer) for layer in self.layers.values()]

    def display(self) -> LineDisplay:
        """Return a plot of the scores over k, one curve per layer; ``.plot()`` draws it.

        Raises
        ------
        ValueError
            If no scores were measured.
        """
        from ..plots import LineDisplay

        curves = {name: layer.scores for name, layer in self.layers.items() if layer.scores}
        if not curves or self.score is None:
            raise ValueError("evaluate was not given, so that there are no scores to plot")
        ks = sorted({k for scores in curves.values() for k in scores})  # narrow layers have fewer
        lines = {name: [scores.get(k, math.nan) for k in ks] for name, scores in curves.items()}
        if len(lines) > 1:
            lines["all of them"] = [self.joint_scores.get(k, math.nan) for k in ks]
        return LineDisplay(
            ks,
            lines,
            x_label="rank $k$ of the change",
            y_label="score",
            levels={"whole change": self.score},
        )


def subspace_report(
    trained: nn.Module | SpectralTracker,
    start: nn.Module | Mapping[str, torch.Tensor] | None = None,
    *,
    rank: int,
    layers: LayerChoice = None,
    evaluate: Evaluate | None = None,
    ranks: Sequence[int] | None = None,
    shuffled: nn.Module | SpectralTracker | None = None,
    kept: float = 0.95,
    least_gain: float = 0.05,
    largest_part: float = 0.25,
    seed: int = 0,
) -> SubspaceReport:
    r"""Report for each layer whether it learned in a subspace of about 2K directions.

    The change ``W(T) - W(0)`` of a layer is decomposed, and compared with a random matrix and, if given, with
    the change by training on shuffled labels. A large share of the change in few directions does not show
    that the others are unimportant, and occurs with shuffled labels too. So the verdict rests on a
    functional test: the score of the model with the change of the layer cut to its k leading singular values,
    beside the score without these.

    Parameters
    ----------
    trained : Module or SpectralTracker
        Trained model, or the tracker of its training with ``change=True``, which knows the start.
    start : Module, or mapping of str to Tensor, optional
        The model at the start, or its state_dict. Not for a tracker.
    rank : int
        K, the expected rank of what is learned: the number of classes for a classifier.
    layers : LayerChoice
        Choice of weights as for `weight_matrices`; None: all. For a tracker: its own.
    evaluate : callable ``(model) -> float or scores of the samples``, optional
        Score of the model in evaluation mode, larger for a better one, such as its accuracy on held-out
        data, or minus its loss. Or an array with the score of each sample, such as 1 if it is classified
        correctly and else 0, whose mean is the score: then verdicts allow for the statistical error. It
        must not change the model. Without it no verdict is possible.
    ranks : sequence of int, optional
        Numbers k of the functional test. Default: 1, K / 2, K, 2 K, 4 K and 8 K. 2 K is always among them.
    shuffled : Module or SpectralTracker, optional
        Equal network, trained in the same way from the same start on shuffled labels. A layer whose change is
        nearly as concentrated there gets no verdict of a small subspace.
    kept : float
        Share of what the layer gained that has to remain for a verdict of a small subspace.
    least_gain : float
        Smallest gain of a layer that is tested, as a share of the score. If `evaluate` returns one number, it
        should be well above the statistical error of the score.
    largest_part : float
        Largest part of the smaller side that 2K may be. Beyond it the question is refused for the layer.
    seed : int
        Seed of the random matrices and directions.

    Returns
    -------
    SubspaceReport

    Raises
    ------
    TypeError, ValueError
        For a start that does not fit the model, no start, a tracker without changes, weights that are not
        finite, scores that are no numbers, and settings out of their range. The model is then unchanged, as
        it is afterwards.

    Notes
    -----
    What a layer gained is the score of the trained model minus the score with this layer at its start. If
    that is small, because the other layers do without its change, the test of this layer says nothing; see
    the joint test of all layers. A layer learned in a small subspace if the 2K leading directions of its
    change keep the gain, and the rest of the change does not keep half of it.

    Two controls can refuse a verdict. With scores of the samples, the margin is the mean of
    ``c - s - kept (f - s)``, where c is the score of a sample with the cut change, s with the layer at its
    start, and f with the whole change. Below two standard errors in size, the samples are too few. With
    `shuffled`, the part of the change outside of 2K directions has to be at most half of that by training on
    shuffled labels; otherwise the small subspace need not be an effect of what there is to learn.

    Cost per layer: two leading decompositions of min(8 K, smaller side) values, and
    ``2 len(ranks) + 1`` evaluations of the model; memory: two copies of the weight. Yaras et al.,
    arXiv 2306.01154, section 4.

    Examples
    --------
    >>> import torch
    >>> import dlnfast as dln
    >>> model = torch.nn.Sequential(torch.nn.Linear(30, 30))
    >>> start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    >>> with torch.no_grad():
    ...     _ = model[0].weight.add_(torch.outer(torch.ones(30), torch.ones(30)))
    >>> x = torch.ones(1, 30)
    >>> score = lambda model: float(model(x).mean())
    >>> report = dln.torch.subspace_report(model, start, rank=1, evaluate=score)
    >>> report.layers["0"].learns_in_subspace
    True
    """
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"evaluate is {type(evaluate).__name__}; wanted a function of the model, or None")
    count = check_count(rank, "rank")
    share = check_scale(kept, "kept", strict=True, at_most=1.0)
    least = check_scale(least_gain, "least_gain")
    part = check_scale(largest_part, "largest_part", strict=True, at_most=1.0)
    model, matrices, starts = _find_starts(trained, start, layers)
    wanted = _check_ranks(ranks, count)
    nulls = None if shuffled is None else _find_changes(shuffled, matrices, starts)
    changes = [
        matrix.matrix().double() - before.double() for matrix, before in zip(matrices, starts, strict=True)
    ]
    for matrix, change in zip(matrices, changes, strict=True):
        if not bool(torch.isfinite(change).all()):
            raise ValueError(f"the change of layer {matrix.name!r} is not finite")
    most = [min(max(*wanted, 2 * count), *matrix.shape) for matrix in matrices]
    found = [_decompose(change, k) for change, k in zip(changes, most, strict=True)]
    tests = _Tests(model, evaluate, matrices, starts, found, changes)
    full = tests.score()
    score = None if full is None else float(full.mean())
    reports: dict[str, LayerSubspace] = {}
    for i, (matrix, before, change) in enumerate(zip(matrices, starts, changes, strict=True)):
        generator = random_generator(seed, ("subspace report", matrix.name))
        measured = _measure(matrix, before, change, found[i], generator, 2 * count, most[i])
        ks = [k for k in wanted if k <= most[i]]
        shuffled_share = None if nulls is None else _shares(nulls[i], _decompose(nulls[i], most[i]), ks)
        coupling = _couple(found[i], found[i + 1], 2 * count) if i + 1 < len(found) else None
        scores = tests.scores_of(i, ks)
        margin, margin_error = _compare(full, scores, 2 * count, share)
        layer = LayerSubspace(
            name=matrix.name,
            shape=matrix.shape,
            share=_shares(change, found[i], ks),
            random_share=_shares(measured.noise, _decompose(measured.noise, most[i]), ks),
            shuffled_share=shuffled_share,
            relative_change=measured.relative_change,
            turn=measured.turn,
            random_turn=measured.random_turn,
            coupling=coupling,
            random_coupling=None if coupling is None else min(1.0, 2 * count / matrix.shape[0]),
            scores=_average(scores),
            scores_without=_average(tests.scores_without(i, ks)),
            margin=margin,
            margin_error=margin_error,
        )
        learns, text = _judge(layer, count, score, share, least, part)
        reports[matrix.name] = replace(layer, learns_in_subspace=learns, verdict=text)
    joint = _average(tests.joint_scores(wanted))  # layers of fewer singular values keep all of them
    return SubspaceReport(count, reports, score, joint)


# --------------------------------------------------------------------------------------------- the start


def _find_starts(
    trained: nn.Module | SpectralTracker,
    start: nn.Module | Mapping[str, torch.Tensor] | None,
    layers: LayerChoice,
) -> tuple[nn.Module, list[WeightMatrix], list[torch.Tensor]]:
    """Return the model, its chosen weights, and these weights at the start."""
    if isinstance(trained, SpectralTracker):
        if start is not None or layers is not None:
            raise ValueError("start and layers are those of the tracker; wanted none")
        return trained.model, trained.matrices, trained.start_matrices()
    if not isinstance(trained, nn.Module):
        raise TypeError(f"trained is {type(trained).__name__}; wanted a torch.nn.Module or a SpectralTracker")
    if start is None:
        raise ValueError("start is needed: the model at its start, or its state_dict")
    matrices = weight_matrices(trained, layers)
    before = start if isinstance(start, nn.Module) else _load_copy(trained, start)
    return trained, matrices, _match(before, matrices, "start")


def _load_copy(model: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    if not isinstance(state, Mapping):
        raise TypeError(f"start is {type(state).__name__}; wanted a torch.nn.Module or a state_dict")
    replica = copy.deepcopy(model)
    try:
        replica.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"start does not fit the model: {error}") from error
    return replica


def _match(model: nn.Module, matrices: list[WeightMatrix], name: str) -> list[torch.Tensor]:
    """Return the weights of another model under the names of these."""
    known = {matrix.name: matrix for matrix in weight_matrices(model, lambda *_: True)}
    found = []
    for matrix in matrices:
        other = known.get(matrix.name)
        if other is None or other.shape != matrix.shape:
            shape = "missing" if other is None else f"{other.shape[0]} x {other.shape[1]}"
            raise ValueError(
                f"{name}: layer {matrix.name!r} is {shape}; wanted {matrix.shape[0]} x {matrix.shape[1]}, as "
                "in the trained model"
            )
        found.append(other.matrix().to(matrix.device).clone())
    return found


def _find_changes(
    shuffled: nn.Module | SpectralTracker, matrices: list[WeightMatrix], starts: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the changes of the same layers by training on shuffled labels."""
    model = shuffled.model if isinstance(shuffled, SpectralTracker) else shuffled
    if not isinstance(model, nn.Module):
        raise TypeError(f"shuffled is {type(model).__name__}; wanted a torch.nn.Module or a SpectralTracker")
    ends = _match(model, matrices, "shuffled")
    return [end.double() - before.double() for end, before in zip(ends, starts, strict=True)]


def _check_ranks(ranks: Sequence[int] | None, rank: int) -> list[int]:
    if ranks is None:
        return sorted({1, (rank + 1) // 2, rank, 2 * rank, 4 * rank, 8 * rank})
    wanted = {check_count(k, f"ranks[{i}]") for i, k in enumerate(ranks)}
    return sorted(wanted | {2 * rank})


# ------------------------------------------------------------------------------------------ measurements


def _decompose(change: torch.Tensor, k: int) -> LowRank:
    """Return the k leading singular values and vectors of a change; zeros for no change."""
    size = float(change.abs().max())
    if size == 0.0:
        rows, columns = change.shape
        return LowRank(np.eye(rows, k), np.zeros(k), np.eye(columns, k))
    found = leading_factors(TensorMap(change / size), k, _TOLERANCE)
    return LowRank(found.U, size * found.s, found.V)


def _shares(matrix: torch.Tensor, found: LowRank, ks: Sequence[int]) -> dict[int, float]:
    total = float(torch.linalg.vector_norm(matrix)) ** 2
    return {k: min(1.0, float(np.sum(found.s[:k] ** 2)) / total) if total > 0 else 0.0 for k in ks}


@dataclass(frozen=True)
class _Measured:
    relative_change: float
    turn: float
    random_turn: float
    noise: torch.Tensor


def _measure(
    matrix: WeightMatrix,
    before: torch.Tensor,
    change: torch.Tensor,
    found: LowRank,
    generator: np.random.Generator,
    n_leading: int,
    most: int,
) -> _Measured:
    first = before.double().cpu().numpy()
    norm = float(torch.linalg.vector_norm(change))
    noise = torch.from_numpy(generator.standard_normal(matrix.shape))
    noise *= norm / float(torch.linalg.vector_norm(noise))
    start_norm = float(np.linalg.norm(first))
    leading = found.V[:, : min(n_leading, most)]
    turn = _turn(first, change.cpu().numpy(), leading, generator)
    random_turn = _turn(first, noise.numpy(), signed_q(generator.standard_normal(leading.shape)), generator)
    relative = norm / start_norm if start_norm > 0 else math.inf if norm > 0 else 0.0
    return _Measured(relative, turn, random_turn, noise)


def _turn(
    first: FloatArray, change: FloatArray, leading: FloatArray, generator: np.random.Generator
) -> float:
    """Return the median angle between images of random vectors outside of the leading ones."""
    n_columns = first.shape[1]
    room = n_columns - leading.shape[1]
    if room < 1:
        return 0.0
    vectors = generator.standard_normal((n_columns, min(_N_DIRECTIONS, room)))
    for _ in range(2):
        vectors = vectors - leading @ (leading.T @ vectors)
    return float(np.median(measures.image_angles(first + change, first, vectors)))


def _couple(below: LowRank, above: LowRank, k: int) -> float | None:
    """Return the share of the leading left space of one change inside the right space of the next."""
    if below.U.shape[0] != above.V.shape[0] or not (below.s.any() and above.s.any()):
        return None
    u, v = below.U[:, :k], above.V[:, :k]
    return float(np.linalg.norm(u.T @ v) ** 2 / min(u.shape[1], v.shape[1]))


class _Tests:
    """Scores of the model with changes that are cut, after which it is as it was."""

    def __init__(
        self,
        model: nn.Module,
        evaluate: Evaluate | None,
        matrices: list[WeightMatrix],
        starts: list[torch.Tensor],
        found: list[LowRank],
        changes: list[torch.Tensor],
    ) -> None:
        self._model, self._evaluate = model, evaluate
        self._matrices, self._starts, self._found, self._changes = matrices, starts, found, changes
        self._n_scores = 0

    def score(self) -> FloatArray | None:
        """Return the score of the model, or those of the samples."""
        if self._evaluate is None:
            return None
        with preserve_model(self._model, "eval"), torch.no_grad():
            found: Any = self._evaluate(self._model)
        values = found.detach().cpu().numpy() if isinstance(found, torch.Tensor) else found
        try:
            if values is None:
                raise TypeError
            scores: FloatArray = np.atleast_1d(np.asarray(values, dtype=np.float64))
        except (TypeError, ValueError):
            raise TypeError(
                f"evaluate returned {found!r}; wanted a number, or the scores of the samples"
            ) from None
        if scores.ndim > 1 or not scores.size or not np.all(np.isfinite(scores)):
            shown = found if scores.size == 1 else f"an array of shape {scores.shape}"
            raise ValueError(
                f"evaluate returned {shown}; wanted a finite number, or finite scores of the samples (1 axis)"
            )
        self._n_scores = self._n_scores or len(scores)
        if len(scores) != self._n_scores:
            raise ValueError(
                f"evaluate returned {len(scores)} scores after {self._n_scores}; wanted as many in each call"
            )
        return scores

    def scores_of(self, i: int, ks: Sequence[int]) -> dict[int, FloatArray]:
        """Return scores with the change of one layer cut to k values, and with none of it (0)."""
        return self._scores([i], [0, *ks], without=False)

    def scores_without(self, i: int, ks: Sequence[int]) -> dict[int, FloatArray]:
        """Return scores without the k leading values of the change of one layer."""
        return self._scores([i], ks, without=True)

    def joint_scores(self, ks: Sequence[int]) -> dict[int, FloatArray]:
        """Return scores with all changes cut to k values, and with none of them (0)."""
        return self._scores(range(len(self._matrices)), [0, *ks], without=False)

    def _scores(self, chosen: Sequence[int], ks: Sequence[int], *, without: bool) -> dict[int, FloatArray]:
        if self._evaluate is None:
            return {}
        scores = {}
        for k in ks:
            with self._written({i: self._cut(i, k, without) for i in chosen}):
                score = self.score()
                assert score is not None
                scores[k] = score
        return scores

    def _cut(self, i: int, k: int, without: bool) -> torch.Tensor:
        found = self._found[i]
        leading = torch.from_numpy((found.U[:, :k] * found.s[:k]) @ found.V[:, :k].T)
        leading = leading.to(self._changes[i].device)
        kept = self._changes[i] - leading if without else leading
        return self._starts[i].double() + kept

    @contextmanager
    def _written(self, values: Mapping[int, torch.Tensor]) -> Iterator[None]:
        before = {i: self._matrices[i].matrix().clone() for i in values}
        try:
            for i, value in values.items():
                self._matrices[i].write(value)
            yield
        finally:
            for i, value in before.items():
                self._matrices[i].write(value)


# ----------------------------------------------------------------------------------------------- verdict


def _average(scores: Mapping[int, FloatArray]) -> dict[int, float]:
    """Return the mean over the samples of each score."""
    return {k: float(values.mean()) for k, values in scores.items()}


def _compare(
    full: FloatArray | None, scores: Mapping[int, FloatArray], size: int, kept: float
) -> tuple[float | None, float | None]:
    """Return the mean of ``c - s - kept (f - s)`` over the samples, and its standard error."""
    if full is None or len(full) < 2 or size not in scores:
        return None, None
    margins = scores[size] - scores[0] - kept * (full - scores[0])
    return float(margins.mean()), float(margins.std(ddof=1) / math.sqrt(len(margins)))


def _judge(
    layer: LayerSubspace,
    rank: int,
    score: float | None,
    kept: float,
    least_gain: float,
    largest_part: float,
) -> tuple[bool | None, str]:
    """Return whether a layer learned in a small subspace, and the sentence that says so."""
    size, narrow = 2 * rank, min(layer.shape)
    head = f"{layer.name} ({layer.shape[0]} x {layer.shape[1]})"
    if size > largest_part * narrow:
        return None, (
            f"{head}: not answered. 2K = {size} directions are {100 * size / narrow:.0f} % of the smaller "
            f"side {narrow}; a subspace would have to be small, at most {100 * largest_part:.0f} %"
        )
    if layer.relative_change == 0.0:
        return None, f"{head}: not answered. The weight has not changed"
    shares = f"{size} directions hold {100 * layer.share[size]:.1f} % of the change (random matrix "
    shares += f"{100 * layer.random_share[size]:.1f} %"
    if layer.shuffled_share is not None:
        shares += f", shuffled labels {100 * layer.shuffled_share[size]:.1f} %"
    shares += ")"
    if score is None:
        return None, (
            f"{head}: not answered. {shares}; without evaluate this does not show whether the other "
            "directions matter"
        )
    gain = score - layer.scores[0]
    if gain < -least_gain * abs(score):
        return None, (
            f"{head}: not answered. With this layer at its start the score is {layer.scores[0]:.4g}, above "
            f"the {score:.4g} of the trained model; a score has to be larger for a better model; {shares}"
        )
    if gain <= least_gain * abs(score):
        return None, (
            f"{head}: not answered. With this layer at its start the score is {layer.scores[0]:.4g} of "
            f"{score:.4g}, so that its change alone hardly matters; {shares}"
        )
    remains = {k: (value - layer.scores[0]) / gain for k, value in layer.scores.items() if k}
    without = (layer.scores_without[size] - layer.scores[0]) / gain
    too_few = [k for k, value in remains.items() if value < kept]
    enough = [k for k in remains if k <= size and k > max([0, *(each for each in too_few if each <= size)])]
    needed = [k for k in remains if k > max([0, *too_few])]
    tests = (
        f"{size} directions keep {100 * remains[size]:.0f} % of what it gained, all others together "
        f"{100 * without:.0f} %; {shares}"
    )
    if layer.margin is not None and layer.margin_error is not None:
        error = _N_ERRORS * layer.margin_error
        if abs(layer.margin) < error:
            return None, (
                f"{head}: not answered. The samples are too few: with {size} directions the score is "
                f"{layer.margin:+.2g} from the least one for a small subspace, with an error of {error:.2g} "
                f"({_N_ERRORS:g} standard errors); {tests}"
            )
    if remains[size] < kept:
        most = f"{needed[0]} are needed" if needed else f"more than {max(remains)} are needed"
        return False, f"{head}: did not learn in {size} directions; {most}. {tests}"
    if without >= _REDUNDANT:
        return None, f"{head}: not answered. Each of both parts of the change is enough: {tests}"
    if layer.shuffled_share is None:
        tests += "; not compared with shuffled labels"
    elif 1.0 - layer.share[size] > _CONTRAST * (1.0 - layer.shuffled_share[size]):
        return None, (
            f"{head}: not answered. {enough[0]} directions are enough, but with shuffled labels the change "
            f"is nearly as concentrated, which need not be an effect of what there is to learn: {tests}"
        )
    return True, f"{head}: learned in a small subspace. {enough[0]} directions are enough: {tests}"
