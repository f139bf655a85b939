# SPDX-License-Identifier: MIT
"""The invariant subspaces of gradient descent: found, certified, and what is left outside them.

The active subspaces A_0 .. A_L are the smallest with

    W_l(0) A_{l-1} in A_l,  W_l(0)^T A_l in A_{l-1},  Phi A_0 in A_L,  Phi^T A_L in A_0,  S A_0 in A_0 .

Gradient descent and heavy ball keep them for ever. They are useful where they are small and where nothing
but scalars happens outside: every layer acts on the rest as a multiple of an isometry, and these multiples
follow scalar recursions. Cases 1 and 2 of Yaras et al., arXiv 2306.01154 (square layers with a target of
rank r, or with a wide last layer) are two of the settings in which this holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from ._arrays import FloatArray, check_scale, frobenius_norm, random_generator, scale_of, widths_of
from ._dispatch import core
from ._weight_checks import check_initial
from .data import distance_from_identity, gram_resolution
from .implicit import ImplicitWeights
from .problem import LowRank, Problem, check_problem

#: Random directions on which a layer is found to be a multiple of an isometry.
N_PROBES = 8
#: Relative error of the weights in a reduced run per unit of a relative departure from its assumptions
#: (measured: 0.57 for noise on the layers, the same for noise on S).
ERROR_PER_DEPARTURE = 0.6
#: Likewise per unit of noise on the target, relative to its norm (measured: 1.4).
ERROR_PER_NOISE = 1.4
#: ``engine="auto"`` takes the reduced engine when the active dimensions are at most this share of the width.
LARGEST_SHARE = 0.5
#: Growth is given up beyond this many times the dimension of the seeds (the settings known to close need at
#: most twice that), or `_LEAST_LIMIT` if that is more.
_LARGEST_GROWTH = 6
_LEAST_LIMIT = 64


@dataclass(frozen=True)
class Check:
    """One condition of a reduced run, measured.

    Attributes
    ----------
    name : str
        What was checked.
    measured, limit : float
        The condition holds when measured <= limit.
    text : str
        The finding in words, with its numbers.
    remedy : str
        What a user can do where it does not hold.
    expected_error : float
        Relative error of the weights that a reduced run would have from this departure alone, about
        `ERROR_PER_DEPARTURE` times the departure.
    """

    name: str
    measured: float
    limit: float
    text: str
    remedy: str
    expected_error: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether the condition is met."""
        return self.measured <= self.limit


@dataclass(frozen=True)
class Assumptions:
    """All conditions of a reduced run for one problem and its initial weights.

    Attributes
    ----------
    checks : tuple of Check
        In the order in which they matter.
    dims : tuple of int
        Dimensions a_0 .. a_L of the active subspaces; where they did not close, those reached.
    widths : tuple of int
        d_0 .. d_L.
    """

    checks: tuple[Check, ...]
    dims: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def hold(self) -> bool:
        """Whether every condition is met."""
        return all(check.holds for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The conditions that are not met."""
        return tuple(check for check in self.checks if not check.holds)

    @property
    def share(self) -> float:
        """The largest active dimension as a share of the largest width."""
        return max(self.dims) / max(self.widths)

    @property
    def expected_error(self) -> float:
        """Relative error of the weights of a reduced run, from all departures together."""
        return sum(check.expected_error for check in self.checks)

    def describe_dims(self) -> str:
        """Return "6 of 30 dimensions are active", or all numbers where they differ."""
        if len(set(self.dims)) == 1 and len(set(self.widths)) == 1:
            return f"{self.dims[0]} of {self.widths[0]} dimensions are active"
        return f"{_short(self.dims)} of {_short(self.widths)} dimensions are active"


@dataclass(frozen=True)
class Certificate:
    """Which engine ran, and why.

    Attributes
    ----------
    engine : str
        "reduced", "dense", "torch" or "sharded"; "tracked" where another program trained.
    reason : str
        One line.
    assumptions : Assumptions or None
        What was measured; None where nothing had to be (``engine="dense"``).
    """

    engine: str
    reason: str
    assumptions: Assumptions | None = None

    @property
    def expected_error(self) -> float:
        """Relative error of the weights that the assumptions leave (0 for the dense engine)."""
        return self.assumptions.expected_error if self.engine == "reduced" and self.assumptions else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the certificate in values that JSON knows."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Certificate:
        """Return the certificate that `to_dict` described.

        Parameters
        ----------
        values : dict
            What `to_dict` returned.

        Returns
        -------
        Certificate
        """
        found = values["assumptions"]
        if found is not None:
            checks = tuple(Check(**check) for check in found["checks"])
            found = Assumptions(checks, tuple(found["dims"]), tuple(found["widths"]))
        return cls(values["engine"], values["reason"], found)

    def __str__(self) -> str:
        """Return the engine, the reason and the expected error in one line."""
        error = f" (expected error {self.expected_error:.0e})" if self.engine == "reduced" else ""
        return f"{self.engine} engine: {self.reason}{error}"


def step_flops(cores: Iterable[FloatArray]) -> float:
    """Return about how many operations a step of these cores takes: three products with each."""
    return 6.0 * float(sum(core.shape[0] * core.size for core in cores))


@dataclass(frozen=True)
class Family:
    """Directions outside the active subspaces on which each layer acts as one scalar times an isometry.

    Attributes
    ----------
    first, last : int
        The layers, counted from 1, that they run through.
    multiplicity : int
        How many directions there are.
    coupling : float
        The eigenvalue s of S on them where they run through all layers: their scalars follow
        ``rho_l <- rho_l (1 - eta_l lambda_l - c s eta_l prod_{k != l} rho_k^2)``. 0 otherwise: they see no
        gradient, only weight decay.
    rho : tuple of float
        rho_l(0) for l = first .. last.
    """

    first: int
    last: int
    multiplicity: int
    coupling: float
    rho: tuple[float, ...]


class Residuals(NamedTuple):
    """How far each inclusion is from holding, relative to the norm of its map; rounding if they close."""

    #: ``W_l A_{l-1} in A_l``, the largest over the layers.
    forward: float
    #: ``W_l^T A_l in A_{l-1}``.
    backward: float
    #: ``Phi A_0 in A_L``.
    target: float
    #: ``Phi^T A_L in A_0``.
    target_transposed: float
    #: ``S A_0 in A_0``.
    input_gram: float


@dataclass(frozen=True, repr=False)
class Closure:
    """The active subspaces of a problem and its initial weights, and what is left outside them.

    Attributes
    ----------
    dims : tuple of int
        a_0 .. a_L.
    bases : sequence of ndarray
        A_l, d_l x a_l, orthonormal columns. Empty where the subspaces did not close.
    cores : tuple of ndarray
        ``A_l^T W_l(0) A_{l-1}``.
    target : ndarray, shape (a_L, a_0)
        ``A_L^T Phi A_0``.
    input_gram : ndarray or None
        ``A_0^T S A_0``; None where S = I.
    input_factor, factor_target : ndarray or None
        F and G with ``F F^T = A_0^T S A_0`` and ``G F^T = A_L^T Phi A_0``, of at most a_0 columns; None where
        S = I.
    families : tuple of Family
        All of the rest.
    residuals : Residuals or None
        The certificate: what each of the five inclusions misses.
    assumptions : Assumptions
        The conditions, measured.
    """

    dims: tuple[int, ...]
    bases: Sequence[FloatArray]
    cores: tuple[FloatArray, ...]
    target: FloatArray
    input_gram: FloatArray | None
    input_factor: FloatArray | None
    factor_target: FloatArray | None
    families: tuple[Family, ...]
    residuals: Residuals | None
    assumptions: Assumptions = field(repr=False)

    @property
    def holds(self) -> bool:
        """Whether a run inside these subspaces is exact."""
        return self.assumptions.hold

    def __repr__(self) -> str:
        """Return the dimensions and whether they may be used."""
        return f"Closure(dims={self.dims}, widths={self.assumptions.widths}, holds={self.holds})"

    def report(self) -> str:
        """Return in words which condition holds, by how much, and what to do where one does not."""
        found = self.assumptions
        if found.hold:
            lines = [found.describe_dims()]
        elif self.residuals is None:
            lines = ["no small invariant subspaces were found"]
        else:
            lines = [f"subspaces of dimensions {_short(self.dims)} were found, but a condition fails"]
        for check in found.checks:
            lines.append(f"{'holds' if check.holds else 'FAILS'}  {check.text}")
            if not check.holds:
                lines.append(f"       -> {check.remedy}")
        if self.residuals is not None:
            pairs = zip(Residuals._fields, self.residuals, strict=True)
            lines.append("residuals: " + ", ".join(f"{name} {value:.1e}" for name, value in pairs))
        for family in self.families:
            law = f"coupled, s = {family.coupling:g}" if family.coupling else "weight decay only"
            span = f"layers {family.first} to {family.last}"
            lines.append(f"outside: multiplicity {family.multiplicity} in {span}, {law}")
        if found.hold and found.expected_error > 0:
            lines.append(f"expected relative error of a reduced run: {found.expected_error:.1e}")
        return "\n".join(lines)


def closure(
    problem: Problem,
    weights: Sequence[npt.ArrayLike] | ImplicitWeights,
    *,
    largest_share: float = LARGEST_SHARE,
) -> Closure:
    """Find the active subspaces of a problem and its initial weights.

    Parameters
    ----------
    problem : Problem
        Its target and input_gram.
    weights : list of ndarray, or ImplicitWeights
        ``W_1(0), .., W_L(0)``, all float64 or all float32; or their law, of which just what the closure
        needs is revealed.
    largest_share : float
        Growth ends when an active dimension exceeds this share of the largest width. (``train`` with
        ``engine="reduced"`` takes any share where only the rank of the target makes it large.)

    Returns
    -------
    Closure
        With ``holds`` False, and the reasons in ``report()``, where there is no small closure.

    Raises
    ------
    ShapeError, TypeError
        For layers that do not fit each other or the problem, and of two precisions.
    ValueError
        For a share that is not above 0.

    Notes
    -----
    The seeds are the row and column spaces of Phi; every new direction is sent through the layer above, the
    layer below (transposed) and S, and what is new in the images is added by a rank-revealing
    orthogonalisation. A wide last layer, or a narrow first one, that is no multiple of an isometry is taken
    in as a whole. 8 L d^2 a flops for active dimension a, no d x d temporary, no d x d decomposition.

    Yaras et al., arXiv 2306.01154, Theorem 1; arXiv 2406.04112.

    Examples
    --------
    >>> import dlnfast as dln
    >>> problem = dln.low_rank_recovery(dim=30, rank=3)
    >>> space = dln.closure(problem, dln.orthogonal([30] * 4))
    >>> space.dims, space.holds
    ((6, 6, 6, 6), True)
    """
    check_problem(problem)
    share = check_scale(largest_share, "largest_share", strict=True)
    return find_closure(problem, check_initial(weights, problem), largest_share=min(share, 1.0))


@np.errstate(over="ignore", invalid="ignore")
def find_closure(
    problem: Problem,
    weights: Sequence[FloatArray] | ImplicitWeights,
    *,
    largest_share: float = LARGEST_SHARE,
) -> Closure:
    """Return what `closure` does, of weights that were checked."""
    if isinstance(weights, ImplicitWeights):
        return _closure_of_law(problem, weights, largest_share)
    widths = tuple(widths_of(weights))
    limit = int(largest_share * max(widths))
    if problem.rank_exceeds(limit):
        return _not_closed(problem, weights, (0,) * len(widths), limit, rank_exceeds=True)
    space = _attempt(problem, weights, limit, ())
    if not space.holds and problem.gram_eigen is not None:
        # Few samples: whatever S is, nothing leaves its range. To take all of it in is more than is needed
        # where S has few eigenvalues, and less subject to rounding where it has many.
        values, vectors = problem.gram_eigen
        inputs = vectors[:, values > gram_resolution(problem.dim_in) * values[-1]]
        if inputs.shape[1] <= limit:
            second = _attempt(problem, weights, limit, inputs)
            space = second if second.holds else space
    return space


def _attempt(problem: Problem, weights: Sequence[FloatArray], limit: int, inputs: npt.ArrayLike) -> Closure:
    """Grow the subspaces from the target, and from `inputs` at the input, and see what is outside."""
    growth = _Growth(problem, weights, limit, np.asarray(inputs))
    if not growth.closes():
        return _not_closed(problem, weights, growth.dims, limit)
    rest = _Rest(problem, weights, growth)
    for end in rest.ends_to_capture():
        # A wide last layer, or a narrow first one, may be anything if it is active as a whole.
        growth.capture(end)
        if not growth.closes():
            return _not_closed(problem, weights, growth.dims, limit)
        rest = _Rest(problem, weights, growth)
    return _closed(problem, weights, growth.bases(), rest)


class _DrawnBases(Sequence[FloatArray]):
    """Bases of implicit layers, drawn when they are asked for."""

    def __init__(self, law: ImplicitWeights, dims: Sequence[int]) -> None:
        self.law = law
        self.dims = tuple(dims)

    def __len__(self) -> int:
        return len(self.dims)

    @overload
    def __getitem__(self, node: int) -> FloatArray: ...

    @overload
    def __getitem__(self, node: slice) -> Sequence[FloatArray]: ...

    def __getitem__(self, node: int | slice) -> FloatArray | Sequence[FloatArray]:
        if isinstance(node, slice):
            return [self[i] for i in range(*node.indices(len(self)))]
        index = range(len(self))[node]
        return self.law.basis(index, self.dims[index])


def drawn_again(
    law: dict[str, Any], U: FloatArray, V: FloatArray
) -> tuple[ImplicitWeights, Sequence[FloatArray]]:
    """Return implicit layers and their bases as a run that was saved had them: same seed, same questions."""
    weights = ImplicitWeights(law["widths"], law["scales"], law["seed"], dtype=law["dtype"])
    found = weights.close(V, U, max(weights.widths))
    return weights, _DrawnBases(weights, found.dims)


def _closure_of_law(problem: Problem, law: ImplicitWeights, largest_share: float) -> Closure:
    """Return the closure of layers that are revealed just as far as it needs: O(L r^3), at any width."""
    widths = law.widths
    checks = [_check_widths(widths), _check_white(problem)]
    # Without a bulge only a high rank makes a closure large, and there is no dense engine to fall back to.
    limit = int((1.0 if checks[0].holds else largest_share) * max(widths))
    nothing = np.empty((0, 0), dtype=law.dtype)
    dims: tuple[int, ...] = (0,) * len(widths)
    if problem.input_gram is None and not problem.rank_exceeds(limit):
        factors = problem.target_factors()
        seeds = 2 * factors.rank
        bound = min(limit, max(_LARGEST_GROWTH * seeds, _LEAST_LIMIT))
        ends = [min(max(bound, d), max(bound, limit)) if d <= limit else bound for d in widths]
        found = law.close(factors.V, factors.U, ends)
        dims = found.dims
        spans = spans_outside([d - a for d, a in zip(widths, dims, strict=True)], law.scales)
        if found.closed and spans is not None:
            last = len(law.scales)
            families = tuple(
                Family(first, end, m, float((first, end) == (1, last)), law.scales[first - 1 : end])
                for first, end, m in spans
            )
            text = f"the layers are multiples of isometries by their law; {_short(dims)} of {_short(widths)}"
            checks[0] = Check("shapes", 0.0, 0.0, f"widths {_short(widths)}: no obstacle", _SHAPE_REMEDY)
            checks.append(_check_target(problem, max(dims)))
            checks.append(Check("closure", 0.0, 0.0, f"{text} dimensions are active", ""))
            target = (found.left * factors.s) @ found.right.T
            return Closure(
                dims=dims,
                bases=_DrawnBases(law, dims),
                cores=tuple(
                    np.ascontiguousarray(eps * core_, dtype=law.dtype)
                    for eps, core_ in zip(law.scales, found.cores, strict=True)
                ),
                target=np.ascontiguousarray(target, dtype=law.dtype),
                input_gram=None,
                input_factor=None,
                factor_target=None,
                families=families,
                residuals=None,
                assumptions=Assumptions(tuple(checks), dims, widths),
            )
    checks.append(
        Check(
            name="closure",
            measured=float(limit + 1),
            limit=float(limit),
            text=f"the active subspaces of widths {_short(widths)} do not close within {limit} dimensions",
            remedy="implicit layers need white inputs, a target of low rank and widths without a bulge: mend "
            "what fails above, or draw the layers (implicit=False)",
        )
    )
    measured = Assumptions(tuple(checks), dims, widths)
    return Closure(dims, (), (), nothing, None, None, None, (), None, measured)


def breaks_no_assumption(problem: Problem, weights: Sequence[FloatArray]) -> bool:
    """Return whether inputs, shapes and layers are such that only a high rank can make a closure large."""
    widths = tuple(widths_of(weights))
    checks = [_check_widths(widths), _check_white(problem)]
    layers = list(enumerate(weights, start=1))
    if widths[-1] < widths[-2]:
        layers.pop()  # a wide last layer may be anything
    checks += [_check_rotation(weight, layer) for layer, weight in layers]
    return all(check.holds for check in checks)


def multiply(
    a: FloatArray, b: FloatArray, *, transpose_a: bool = False, transpose_b: bool = False, n_threads: int = 0
) -> FloatArray:
    """Return ``op(a) op(b)`` by the project's own multi-threaded products; equal precisions."""
    rows = a.shape[1] if transpose_a else a.shape[0]
    cols = b.shape[0] if transpose_b else b.shape[1]
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    out = np.empty((rows, cols), dtype=a.dtype)
    core.multiply(a, transpose_a, b, transpose_b, out, n_threads)
    return out


def _tolerance(dtype: npt.DTypeLike) -> float:
    """Return the relative size below which a direction, or a departure, is rounding.

    Householder QR leaves layers a few eps from orthogonal, products of width d add sqrt(d) eps.
    """
    return 1024.0 * float(np.finfo(dtype).eps)


class _Growth:
    """Subspaces that grow until they are closed. Vectors are rows here, as in the core."""

    def __init__(
        self, problem: Problem, weights: Sequence[FloatArray], limit: int, inputs: FloatArray
    ) -> None:
        self.problem = problem
        self.weights = weights
        self.dtype = weights[0].dtype
        self.tolerance = _tolerance(self.dtype)
        self.widths = widths_of(weights)
        self.rows = [np.empty((0, d), dtype=self.dtype) for d in self.widths]
        # How uncertain each direction is: rounding, divided by the length of what it was made from.
        self.noise = [np.empty(0) for _ in self.widths]
        self.sent = [0] * len(self.widths)  # how many rows of each node have gone to its neighbours
        self.norms = [scale_of(w) for w in weights]
        self.gram = None if problem.input_gram is None else problem.input_gram.astype(self.dtype, copy=False)
        eigen = problem.gram_eigen
        self.gram_norm = 1.0 if eigen is None else max(float(eigen[0][-1]), np.finfo(np.float64).tiny)
        factors = problem.target_factors()
        self._add(0, np.asarray(factors.V.T, dtype=self.dtype))
        self._add(len(self.widths) - 1, np.asarray(factors.U.T, dtype=self.dtype))
        if inputs.size:
            self._add(0, np.asarray(inputs.T, dtype=self.dtype))
        seeds = len(self.rows[0]) + len(self.rows[-1])
        self.limit = min(limit, max(_LARGEST_GROWTH * seeds, _LEAST_LIMIT))

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(len(rows) for rows in self.rows)

    def bases(self) -> list[FloatArray]:
        """Return A_l with orthonormal columns; the identity where A_l is everything.

        A_l is turned within its span so that W_l(0) carries A_{l-1} to its first columns, where the layer is
        a multiple of an isometry: then the cores are nearly diagonal, and rounded less.
        """
        bases = [_polished(rows.T) for rows in self.rows]
        for node, d in enumerate(self.widths):
            if bases[node].shape[1] == d:
                bases[node] = np.eye(d, dtype=self.dtype)
            elif node > 0 and 0 < bases[node - 1].shape[1] <= bases[node].shape[1]:
                image = bases[node].T @ multiply(self.weights[node - 1], bases[node - 1])
                left, right = np.linalg.qr(image, mode="complete")
                sizes = np.abs(np.diagonal(right))
                if sizes.min() > 0.5 * sizes.max():
                    signs = np.ones(left.shape[1], dtype=self.dtype)
                    signs[: len(sizes)] = np.where(np.diagonal(right) < 0, -1.0, 1.0)
                    bases[node] = _polished(bases[node] @ (left * signs))
        return bases

    def closes(self) -> bool:
        """Send new directions on until there are none; False if a subspace outgrows the limit."""
        last = len(self.widths) - 1
        order = [*range(last + 1), *range(last - 1, 0, -1)]
        while any(sent < len(rows) for sent, rows in zip(self.sent, self.rows, strict=True)):
            for node in order:
                self._send(node)
                if any(self._too_large(grown) for grown in range(last + 1)):
                    return False
        return True

    def capture(self, node: int) -> None:
        """Take the whole space of a node into its active subspace."""
        self._add(node, np.eye(self.widths[node], dtype=self.dtype))

    def _too_large(self, node: int) -> bool:
        # An end that is active as a whole is no obstacle: nothing of it is left to reduce.
        size, hidden = len(self.rows[node]), 0 < node < len(self.widths) - 1
        return size > self.limit and (hidden or size < self.widths[node] or size == max(self.widths))

    def _send(self, node: int) -> None:
        begin, end = self.sent[node], len(self.rows[node])
        if begin == end:
            return
        self.sent[node] = end
        fresh, noise = self.rows[node][begin:end], self.noise[node][begin:end]
        if node < len(self.weights):
            image = multiply(fresh, self.weights[node], transpose_b=True)
            self._add_image(node + 1, image, node, noise)
        if node > 0:
            image = multiply(fresh, self.weights[node - 1])
            self._add_image(node - 1, image, node - 1, noise)
        if node == 0 and self.gram is not None:
            self._add(0, multiply(fresh, self.gram) / self.dtype.type(self.gram_norm), noise)

    def _add_image(self, node: int, image: FloatArray, layer: int, noise: npt.NDArray[np.float64]) -> None:
        unit = self.norms[layer]
        if unit == 0 or not image.size:
            return
        longest = float(np.linalg.norm(image / self.dtype.type(unit), axis=1).max())
        self.norms[layer] = unit * max(longest, 1.0)
        self._add(node, image / self.dtype.type(self.norms[layer]), noise)

    def _add(self, node: int, block: FloatArray, noise: npt.NDArray[np.float64] | None = None) -> None:
        rows, k = self.rows[node], len(block)
        if k == 0 or len(rows) == rows.shape[1]:
            return
        eps = float(np.finfo(self.dtype).eps)
        uncertain = np.full(k, eps) if noise is None else np.maximum(noise, eps)
        # An image is known no better than its origin: what may be noise is pressed below the tolerance.
        trust = np.minimum(1.0, self.tolerance / (64.0 * uncertain))
        block = np.ascontiguousarray(block * trust[:, None], dtype=self.dtype)
        basis = np.empty((len(rows) + k, rows.shape[1]), dtype=self.dtype)
        basis[: len(rows)] = rows
        found = np.zeros(k)
        n_new = core.extend_basis(basis, len(rows), block, self.tolerance, found)
        self.rows[node] = basis[: len(rows) + n_new]
        fresh = float((trust * uncertain).max()) / found[:n_new]
        self.noise[node] = np.concatenate([self.noise[node], fresh])


class _Rest:
    """What is outside the active subspaces: which families there are, and how well they are families."""

    def __init__(self, problem: Problem, weights: Sequence[FloatArray], growth: _Growth) -> None:
        self.problem = problem
        self.weights = weights
        self.growth = growth
        self.widths = growth.widths
        self.dims = [d - a for d, a in zip(self.widths, growth.dims, strict=True)]
        self.rho: list[float] = []
        self.departures: list[float] = []
        for layer in range(len(weights)):
            rho, departure = self._isometry(layer)
            self.rho.append(rho)
            self.departures.append(departure)

    def ends_to_capture(self) -> list[int]:
        """Return the ends whose layers are no isometries outside and that are small enough to take in."""
        last = len(self.weights)
        ends = []
        for node, layer in ((0, 0), (last, last - 1)):
            fails = self.departures[layer] > _tolerance(self.growth.dtype)
            hidden = self.widths[1] if node == 0 else self.widths[last - 1]
            if fails and 0 < self.widths[node] < hidden and self.dims[node] > 0:
                ends.append(node)
        return ends

    def families(self) -> tuple[Family, ...]:
        """Return the families, those through all layers first; none where they do not exist."""
        spans = self.spans()
        if spans is None or self.gram_mixes:
            return ()
        last = len(self.weights)
        found: list[tuple[int, int, int, float]] = []
        for first, end, multiplicity in spans:
            if (first, end) == (1, last):
                found = [(first, end, m, s) for s, m in self._couplings(multiplicity)] + found
            else:
                found.append((first, end, multiplicity, 0.0))
        return tuple(Family(*family, tuple(self.rho[family[0] - 1 : family[1]])) for family in found)

    def spans(self) -> list[tuple[int, int, int]] | None:
        """Return the spans of the rest; see `spans_outside`."""
        return spans_outside(self.dims, self.rho)

    @property
    def gram_mixes(self) -> bool:
        """Whether S splits directions that run through the network together with others that end there."""
        spans = self.spans() or []
        last = len(self.weights)
        through = sum(m for first, end, m in spans if (first, end) == (1, last))
        return 0 < through < self.dims[0] and len(self._couplings(self.dims[0])) > 1

    def _couplings(self, through: int) -> list[tuple[float, int]]:
        """Return the eigenvalues of S outside A_0 with their multiplicities, for `through` directions."""
        eigen = self.problem.gram_eigen
        if through == 0:
            return []
        if eigen is None:
            return [(1.0, through)]
        values = eigen[0]
        rows = self.growth.rows[0].astype(np.float64)
        inside = np.linalg.eigvalsh(multiply(multiply(rows, self._gram()), rows, transpose_b=True))
        clusters = np.array(_gram_clusters(values))
        middles = clusters.mean(axis=1)
        # Each of those inside is one of S, to the precision of the rows.
        taken = np.argmin(np.abs(inside[:, None] - middles), axis=1)
        found = []
        for i, (low, high) in enumerate(clusters.tolist()):
            count = int(np.sum((values >= low) & (values <= high)) - np.sum(taken == i))
            if count > 0:
                counts = middles[i] > gram_resolution(self.problem.dim_in) * values[-1]
                found.append((float(middles[i]) if counts else 0.0, count))
        if len(found) == 1:
            return [(found[0][0], through)]
        return sorted(found, reverse=True)

    def _gram(self) -> FloatArray:
        assert self.problem.input_gram is not None
        return self.problem.input_gram

    def _isometry(self, layer: int) -> tuple[float, float]:
        """Return rho and ``||D^T D / rho^2 - I||_F / sqrt(m)`` of a layer D outside the active subspaces."""
        small = min(self.dims[layer], self.dims[layer + 1])
        if small == 0:
            return 0.0, 0.0
        weight, tall = self.weights[layer], self.dims[layer + 1] >= self.dims[layer]
        node = layer if tall else layer + 1
        return measure_isometry(weight, layer + 1, tall, self.growth.rows[node], self.growth.norms[layer])


def spans_outside(dims: Sequence[int], rho: Sequence[float]) -> list[tuple[int, int, int]] | None:
    """Return (first layer, last layer, multiplicity) of the rest; None where it has no such parts.

    A layer that is zero out there ends everything and begins anew. A tall layer begins a part of its own. A
    wide one ends as many directions as it is short of: all of them, or some of a single part. To end some
    of several parts at once would mix them (a bulge).

    Parameters
    ----------
    dims : sequence of int
        m_0 .. m_L, what the active subspaces leave of each node.
    rho : sequence of float
        The scalar of each layer out there.
    """
    parts, ended = [(1, dims[0])], []
    for layer in range(1, len(dims)):
        size, step = dims[layer], dims[layer] - dims[layer - 1]
        if rho[layer - 1] == 0.0:
            # Nothing comes through, and by symmetry nothing comes back.
            ended += [(first, layer - 1, m) for first, m in parts]
            parts = [(layer + 1, size)]
        elif step > 0:
            parts.append((layer + 1, step))
        elif step < 0 and (size == 0 or len(parts) == 1):
            ended += [(first, layer - 1, m if size == 0 else -step) for first, m in parts]
            parts = [] if size == 0 else [(parts[0][0], size)]
        elif step < 0:
            return None
    ended += [(first, len(rho), m) for first, m in parts]
    return sorted(
        ((first, end, m) for first, end, m in ended if m > 0 and first <= end),
        key=lambda span: span[:2] != (1, len(rho)),
    )


def measure_isometry(
    weight: FloatArray, layer: int, tall: bool, inside: FloatArray, norm: float
) -> tuple[float, float]:
    """Return rho and the departure of W (or of W^T, if not `tall`) from rho times an isometry.

    Measured on `N_PROBES` random directions x orthogonal to the rows of `inside`: the mean of
    ``||W^T W x - rho^2 x||^2`` is an unbiased estimate of ``||W^T W - rho^2 I||_F^2``, and a departure in a
    single direction is seen by each of them. 0 for both where the layer is zero out there.
    """
    dim = weight.shape[1] if tall else weight.shape[0]
    probes = random_generator(0, ("probe", layer)).standard_normal((dim, N_PROBES)).astype(weight.dtype)
    for _ in range(2):
        probes -= inside.T @ (inside @ probes)
    image = multiply(weight, probes, transpose_a=not tall)
    rho = frobenius_norm(image) / float(np.linalg.norm(probes))
    if rho <= _tolerance(weight.dtype) * norm:
        return 0.0, 0.0
    unit = weight.dtype.type(rho)
    back = multiply(weight, image / unit, transpose_a=tall) / unit  # its square may be no number
    return rho, float(np.linalg.norm(back - probes)) / float(np.linalg.norm(probes))


def _gram_clusters(values: FloatArray) -> list[tuple[float, float]]:
    """Return intervals that hold the eigenvalues of S, one for each number that they are equal to."""
    width = 1e-9 * float(values[-1])
    clusters: list[tuple[float, float]] = []
    for value in values.tolist():
        if clusters and value - clusters[-1][0] <= width:
            clusters[-1] = clusters[-1][0], value
        else:
            clusters.append((value, value))
    return clusters


def _closed(problem: Problem, weights: Sequence[FloatArray], bases: list[FloatArray], rest: _Rest) -> Closure:
    growth = rest.growth
    checks = [_check_rest_shapes(rest), _check_gram(problem, rest)]
    checks += [_check_rest_rotation(rest, layer) for layer in range(len(weights))]
    cores = []
    forward = backward = 0.0
    for layer, weight in enumerate(weights):
        below, above, norm = bases[layer], bases[layer + 1], growth.norms[layer] or 1.0
        image = multiply(weight, below)
        inside = above.T @ image
        cores.append(np.ascontiguousarray(inside))
        forward = max(forward, _outside(image, above, inside) / norm)
        back = multiply(weight, above, transpose_a=True)
        backward = max(backward, _outside(back, below, below.T @ back) / norm)
    first, last = bases[0], bases[-1]
    image, back = _times_target(problem, first), _times_target(problem, last, transpose=True)
    target, size = last.T @ image, max(float(np.linalg.norm(image)), np.finfo(np.float64).tiny)
    residuals = [_outside(image, last, target) / size, _outside(back, first, first.T @ back) / size]
    gram = None
    outside_gram = 0.0
    if growth.gram is not None:
        image = multiply(growth.gram, first)
        gram = first.T @ image
        outside_gram = _outside(image, first, gram) / growth.gram_norm
        gram = np.ascontiguousarray((gram + gram.T) / 2)
    found = Residuals(forward, backward, residuals[0], residuals[1], outside_gram)
    dims, widths = growth.dims, tuple(growth.widths)
    checks.append(_check_target(problem, max(dims)))
    checks.append(_check_inclusions(found, growth.tolerance, dims, widths))
    factor, factor_target = factors_within(problem, first, last)
    return Closure(
        dims=dims,
        bases=tuple(bases),
        cores=tuple(cores),
        target=np.ascontiguousarray(target),
        input_gram=gram,
        input_factor=factor,
        factor_target=factor_target,
        families=rest.families(),
        residuals=found,
        assumptions=Assumptions(tuple(checks), dims, widths),
    )


def factors_within(
    problem: Problem, first: FloatArray, last: FloatArray
) -> tuple[FloatArray, FloatArray] | tuple[None, None]:
    """Return what `Closure` calls input_factor and factor_target, of the bases A_0 and A_L."""
    if problem.input_factor is None or problem.factor_target is None:
        return None, None
    factor, target = first.T @ problem.input_factor, last.T @ problem.factor_target
    if factor.shape[1] > len(factor):
        # W F - G has the norm of (W F - G) Q, but for what no W removes.
        frame, triangle = np.linalg.qr(factor.T)
        factor, target = triangle.T, target @ frame
    dtype = first.dtype
    return np.ascontiguousarray(factor, dtype=dtype), np.ascontiguousarray(target, dtype=dtype)


def _not_closed(
    problem: Problem,
    weights: Sequence[FloatArray],
    dims: tuple[int, ...],
    limit: int,
    rank_exceeds: bool = False,
) -> Closure:
    """Return a closure without bases, with every condition that is broken."""
    widths = tuple(widths_of(weights))
    checks = [_check_widths(widths), _check_white(problem)]
    checks += [_check_rotation(weight, layer) for layer, weight in enumerate(weights, start=1)]
    checks.append(_check_target(problem, limit, rank_exceeds))
    reached = "the target's rank alone is beyond that" if rank_exceeds else f"{_short(dims)} had been reached"
    checks.append(
        Check(
            name="closure",
            measured=float(max(*dims, limit + 1)),
            limit=float(limit),
            text=f"the active subspaces of widths {_short(widths)} do not close within {limit} dimensions "
            f"({reached})",
            remedy='mend what fails above, if anything, take a target of lower rank, or use engine="dense"',
        )
    )
    nothing = np.empty((0, 0), dtype=weights[0].dtype)
    measured = Assumptions(tuple(checks), dims, widths)
    return Closure(dims, (), (), nothing, None, None, None, (), None, measured)


def _outside(image: FloatArray, basis: FloatArray, inside: FloatArray) -> float:
    """Return the largest norm of a column's part outside the span of the basis."""
    rest = image - basis @ inside
    unit = float(np.abs(rest).max(initial=0.0)) or 1.0
    return unit * float(np.linalg.norm(rest / unit, axis=0).max(initial=0.0))


def _times_target(problem: Problem, block: FloatArray, *, transpose: bool = False) -> FloatArray:
    """Return Phi (or Phi^T) times a thin block."""
    if isinstance(problem.target, LowRank):
        factors = problem.target
        left, s, right = (np.asarray(part, dtype=block.dtype) for part in (factors.U, factors.s, factors.V))
        if transpose:
            left, right = right, left
        return np.asarray((left * s) @ (right.T @ block))
    return multiply(np.asarray(problem.target, dtype=block.dtype), block, transpose_a=transpose)


def _polished(basis: FloatArray) -> FloatArray:
    """Return the basis after a Newton step towards orthonormal columns, 1e-15 -> 1e-16."""
    return np.ascontiguousarray(1.5 * basis - 0.5 * (basis @ (basis.T @ basis)))


# ------------------------------------------------------------------------------------- what is said of it


def _check_rest_shapes(rest: _Rest) -> Check:
    bulge = rest.spans() is None
    return Check(
        name="shapes",
        measured=float(bulge),
        limit=0.0,
        text=f"widths {_short(rest.widths)}: "
        + (
            "outside the active subspaces the layers widen and narrow again"
            if bulge
            else "the layers outside the active subspaces fit into each other"
        ),
        remedy=_SHAPE_REMEDY,
    )


_SHAPE_REMEDY = (
    "give hidden layers the width of the input or of the output, without a bulge between them; "
    'or use engine="dense"'
)


def _check_widths(widths: Sequence[int]) -> Check:
    steps = np.diff(widths)
    rising, falling = np.flatnonzero(steps > 0), np.flatnonzero(steps < 0)
    bulge = bool(len(rising) and len(falling) and rising[0] < falling[-1])
    finding = "a bulge: they widen and narrow again" if bulge else "no bulge"
    return Check("shapes", float(bulge), 0.0, f"widths {_short(widths)}: {finding}", _SHAPE_REMEDY)


def _check_gram(problem: Problem, rest: _Rest) -> Check:
    if problem.input_gram is None:
        return _check_white(problem)
    mixes = rest.gram_mixes
    text = (
        "input_gram (S) may differ from the identity here: its part that leaves the subspace is given below"
    )
    if mixes:
        text = "input_gram (S) is not the identity, and mixes directions that end in different layers"
    return Check("whitened inputs", float(mixes), 0.0, text, _WHITE_REMEDY)


_WHITE_REMEDY = 'whiten the inputs: Problem.from_data(..., whiten="zca"); or use engine="dense"'


def _check_white(problem: Problem) -> Check:
    if problem.input_gram is None:
        error = 0.0 if problem.whitening is None else problem.whitening.error
        text = f"input_gram (S) is the identity (error {error:.1e})"
        return Check("whitened inputs", 0.0, 0.0, text, "", ERROR_PER_DEPARTURE * error)
    distance = distance_from_identity(problem.input_gram)
    return Check(
        name="whitened inputs",
        measured=distance,
        limit=0.0,
        text=f"input_gram (S) is not the identity: ||S - I||_F / sqrt(d_x) = {distance:.2e}",
        remedy=_WHITE_REMEDY,
        expected_error=min(1.0, ERROR_PER_DEPARTURE * distance),
    )


def _check_rest_rotation(rest: _Rest, layer: int) -> Check:
    if min(rest.dims[layer], rest.dims[layer + 1]) == 0:
        text = f"weights[{layer}] (W_{layer + 1}) is active as a whole"
        return Check(f"rotation of layer {layer + 1}", 0.0, 0.0, text, "")
    return _rotation(layer + 1, rest.rho[layer], rest.departures[layer], rest.growth.dtype)


def _check_rotation(weight: FloatArray, layer: int) -> Check:
    tall = weight.shape[0] >= weight.shape[1]
    nothing = np.empty((0, weight.shape[1] if tall else weight.shape[0]), dtype=weight.dtype)
    rho, departure = measure_isometry(weight, layer, tall, nothing, 0.0)
    return _rotation(layer, rho, departure, weight.dtype)


def _rotation(layer: int, rho: float, departure: float, dtype: npt.DTypeLike) -> Check:
    # What a departure does to a run is linear in it.
    limit = _tolerance(dtype)
    finding = "is" if departure <= limit else "is not"
    return Check(
        name=f"rotation of layer {layer}",
        measured=departure,
        limit=limit,
        text=f"weights[{layer - 1}] (W_{layer}) {finding} a scaled rotation: "
        + (f"||W^T W / eps^2 - I||_F / sqrt(d) = {departure:.1e}" if rho > 0 else "it is zero"),
        remedy='start from dln.orthogonal(...); or use engine="dense"',
        expected_error=min(1.0, ERROR_PER_DEPARTURE * departure),
    )


def _check_target(problem: Problem, limit: int, rank_exceeds: bool = False) -> Check:
    name, smaller = "rank of the target", min(problem.target.shape)
    remedy = (
        "train on a truncated target, Problem(dln.LowRank(U, s, V)): the weights move by about "
        f'{ERROR_PER_NOISE} times the norm of what is cut off; or use engine="dense"'
    )
    if rank_exceeds:
        text = f"target (Phi) has rank above {limit} of {smaller}"
        return Check(name, 1.0, 0.0, text, remedy)
    rank, cut = problem.target_factors().rank, problem.target_cut
    gap = "exactly" if cut is None else f"the next singular value is {cut:.1e} of the first"
    text = f"target (Phi) has rank {rank} of {smaller}, {gap}"
    return Check(name, 0.0, 0.0, text, remedy, ERROR_PER_NOISE * (cut or 0.0))


def _check_inclusions(
    found: Residuals, tolerance: float, dims: Sequence[int], widths: Sequence[int]
) -> Check:
    worst = max(found)
    return Check(
        name="closure",
        measured=worst,
        limit=64 * tolerance,
        text=f"the active subspaces end at {_short(dims)} of {_short(widths)} dimensions: the largest "
        f"residual of an inclusion is {worst:.1e}",
        remedy="the subspaces grow by directions that rounding hides: whiten the inputs, or use "
        'engine="dense"',
        expected_error=0.0 if worst <= tolerance else min(1.0, ERROR_PER_DEPARTURE * worst),
    )


def _short(numbers: Sequence[Any]) -> str:
    if len(numbers) <= 8:
        return str(list(numbers))
    return f"[{numbers[0]}, {numbers[1]}, .., {numbers[-2]}, {numbers[-1]}] ({len(numbers) - 1} layers)"
