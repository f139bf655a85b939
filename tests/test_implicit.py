# SPDX-License-Identifier: MIT
"""Lazily sampled weights: the same matrices for all queries, and closures of any width."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.matrices import draw_orthonormal, gram_error
from helpers.memory import measure_peak
from helpers.problems import draw_low_rank_target
from helpers.records import with_record
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast._weights import implicit
from dlnfast._weights.implicit import ImplicitWeights

F64 = np.float64
PRECISIONS = [np.float32, F64]
SIZES = st.sampled_from([1, 2, 3, 5, 8, 13])
WIDTHS = st.lists(SIZES, min_size=2, max_size=5)
SEEDS = st.integers(0, 2**64 - 1)

# All kinds of layers: square, tall, wide, width 1, primes, narrowing and bulging chains.
SHAPES = [[1, 1], [5, 5], [7, 1], [1, 7], [7, 3], [3, 7], [6, 6, 6, 6], [4, 9, 9, 3], [11, 5, 13], [3, 8, 2]]

#: Chance of a false alarm in one Kolmogorov-Smirnov test. There are fewer than 200 of them, so that the
#: chance of any, had the seeds been drawn, is below 2e-2; they are fixed, and a passing test always passes.
LEVEL = 1e-4
#: Seeds of the two samples; the cheaper distribution is sampled more often where one sample is small.
N_SEEDS = 500
FEW_SEEDS, MANY_SEEDS = 250, 1000


def frame(dim, rank, *, seed=0):
    return draw_orthonormal(np.random.default_rng([seed, dim]), dim, rank)


# ------------------------------------------------------------------------------------ identities


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("widths", SHAPES, ids=str)
def test_all_queries_are_consistent(widths, dtype):
    """The results of dense, apply, apply_transpose, row, column and entry agree in any order of calls."""
    rng = np.random.default_rng(0)
    scales = 0.5 + np.arange(len(widths) - 1) / 4
    weights = ImplicitWeights(widths, scales, 3, dtype=dtype)
    error = 8 * tolerance(dtype, max(widths))  # a chain of some ten thin products behind each number
    for layer in reversed(range(1, len(widths))):
        cols, rows = widths[layer - 1 : layer + 1]
        X, Y = (rng.standard_normal((dim, 2)).astype(dtype) for dim in (cols, rows))
        i, j = rows // 2, cols // 2
        column = weights.column(layer, j)
        row = weights.row(layer, i)
        WX, WY = weights.apply(layer, X), weights.apply_transpose(layer, Y)
        entry = weights.entry(layer, i, j)
        dense = weights.dense(layer)
        assert all(array.dtype == dtype for array in (column, row, WX, WY, dense))
        assert (column.shape, row.shape, dense.shape) == ((rows,), (cols,), (rows, cols))
        assert np.abs(gram_error(dense.astype(F64) / scales[layer - 1])).max() <= error
        np.testing.assert_allclose(column, dense[:, j], rtol=0, atol=error)
        np.testing.assert_allclose(row, dense[i], rtol=0, atol=error)
        assert abs(entry - dense[i, j]) <= error
        assert abs(column[i] - row[j]) <= error
        for got, wanted, size in ((WX, dense @ X, X), (WY, dense.T @ Y, Y)):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=error * np.linalg.norm(size))
        # Again, from the sampled directions.
        np.testing.assert_allclose(weights.apply(layer, X), WX, rtol=0, atol=error * np.linalg.norm(X))


@settings(deadline=None, max_examples=40)
@given(widths=WIDTHS, seed=SEEDS, data=st.data())
def test_any_sequence_of_queries_is_consistent_with_the_matrices(widths, seed, data):
    weights = ImplicitWeights(widths, seed=seed)
    n_layers = len(widths) - 1
    rng = np.random.default_rng(1)
    asked = []
    for _ in range(data.draw(st.integers(1, 5))):
        kind = data.draw(st.sampled_from(["close", "apply", "transpose", "basis"]))
        layer = data.draw(st.integers(1, n_layers))
        if kind == "close":
            rank = data.draw(st.integers(0, min(widths[0], widths[-1], 4)))
            right = data.draw(st.sampled_from([rank, frame(widths[0], rank)]))
            asked.append((kind, 0, right, weights.close(right, frame(widths[-1], rank), limit=100)))
        elif kind == "basis":
            weights.basis(layer)
        else:
            dim = widths[layer - 1] if kind == "apply" else widths[layer]
            # The second column nearly repeats the first, the third does.
            X = rng.standard_normal((dim, 1)) * [[1.0, 1.0, 2.0]] + rng.standard_normal((dim, 1)) * [
                [0, 1e-9, 0]
            ]
            call = weights.apply if kind == "apply" else weights.apply_transpose
            asked.append((kind, layer, X, call(layer, X)))
    error = 1e-12
    matrices = [weights.dense(layer) for layer in range(1, n_layers + 1)]
    assert max(np.abs(gram_error(matrix)).max() for matrix in matrices) <= error
    for kind, layer, question, answer in asked:
        if kind == "close":
            check_closure(weights, matrices, question, frame(widths[-1], answer.left.shape[1]), answer, error)
        else:
            matrix = matrices[layer - 1] if kind == "apply" else matrices[layer - 1].T
            assert np.abs(matrix @ question - answer).max() <= error * max(1, np.linalg.norm(question))
    for node, width in enumerate(widths):
        basis = weights.basis(node)
        assert basis.shape[1] <= width
        assert np.abs(basis.T @ basis - np.eye(basis.shape[1])).max(initial=0.0) <= error


def check_closure(weights, matrices, right, left, closure, error):
    """Compare cores, inclusions and coordinates of a closure with the explicit matrices."""
    assert closure.closed
    bases = [weights.basis(node, dim) for node, dim in enumerate(closure.dims)]
    for basis in bases:
        assert np.abs(basis.T @ basis - np.eye(basis.shape[1])).max(initial=0.0) <= error
    for layer, core in enumerate(closure.cores):
        matrix, before, after = matrices[layer], bases[layer], bases[layer + 1]
        assert core.shape == (after.shape[1], before.shape[1])
        for got, wanted in (
            (core, after.T @ matrix @ before),
            (after @ core, matrix @ before),
            (before @ core.T, matrix.T @ after),
        ):
            assert np.abs(got - wanted).max(initial=0.0) <= error
    for coordinates, basis, given_frame in (
        (closure.right, bases[0], right),
        (closure.left, bases[-1], left),
    ):
        assert np.abs(coordinates.T @ coordinates - np.eye(coordinates.shape[1])).max(initial=0.0) <= error
        if not isinstance(given_frame, int):
            assert np.abs(basis @ coordinates - given_frame).max(initial=0.0) <= error


# ------------------------------------------------------------------------------------ the closure

# widths, rank, dimensions of the closure.
CLOSURES = [
    ([40, 40, 40, 40], 3, (6, 6, 6, 6)),
    ([23, 23], 2, (4, 4)),
    ([20, 40, 40, 40], 3, (6, 9, 9, 9)),
    ([60, 40, 40, 40], 3, (9, 6, 6, 6)),
    ([40, 40, 40, 60], 3, (6, 6, 6, 9)),
    ([40, 40, 40, 3], 3, (6, 6, 6, 3)),
    ([40, 40, 40, 20], 3, (9, 9, 9, 6)),
    ([20, 40, 40, 3], 3, (6, 9, 9, 3)),
    ([60, 40, 40, 3], 3, (9, 6, 6, 3)),
    ([40, 20, 40], 3, (9, 6, 9)),
    ([40, 40, 40], 0, (0, 0, 0)),
    ([13, 13, 13], 13, (13, 13, 13)),  # the frames fill their nodes
    ([5, 5, 5, 5], 3, (5, 5, 5, 5)),  # d < 2r
    ([7, 7, 7], 1, (2, 2, 2)),
    ([1, 1, 1], 1, (1, 1, 1)),
    ([7, 1, 5], 1, (2, 1, 2)),
    ([3, 4, 2, 4], 2, (3, 4, 2, 4)),
    ([10, 20, 10], 1, (10, 20, 10)),  # a bulge fills the whole space
]


@pytest.mark.parametrize("abstract", [False, True], ids=["frames", "ranks"])
@pytest.mark.parametrize(("widths", "rank", "dims"), CLOSURES, ids=str)
def test_closures_are_exact_and_of_the_known_dimensions(widths, rank, dims, abstract):
    scale = 0.3
    weights = ImplicitWeights(widths, scale, seed=5)
    right, left = (rank, rank) if abstract else (frame(widths[0], rank), frame(widths[-1], rank, seed=1))
    closure = weights.close(right, left, limit=max(widths))
    assert closure.dims == dims
    assert (closure.right.shape, closure.left.shape) == ((dims[0], rank), (dims[-1], rank))
    matrices = [weights.dense(layer) / scale for layer in range(1, len(widths))]
    check_closure(weights, matrices, right, left, closure, 1e-12)
    again = weights.close(
        None, None, limit=max(widths)
    )  # the whole space, where all directions have been sampled
    check_closure(weights, matrices, 0, 0, again, 1e-12)


@pytest.mark.parametrize("widths", SHAPES, ids=str)
def test_closures_after_other_queries_contain_all_sampled_directions(widths):
    weights = ImplicitWeights(widths, seed=6)
    rank = min(2, widths[0], widths[-1])
    right, left = frame(widths[0], rank), frame(widths[-1], rank, seed=1)
    weights.apply(1, right[:, :1] + frame(widths[0], 1, seed=2))  # not orthogonal to V
    weights.apply_transpose(len(weights), frame(widths[-1], 1, seed=2))
    closure = weights.close(right, left, limit=max(widths))
    random = weights.close(rank, rank, limit=max(widths))
    matrices = [weights.dense(layer) for layer in range(1, len(widths))]
    check_closure(weights, matrices, right, left, closure, 1e-12)
    check_closure(weights, matrices, rank, rank, random, 1e-12)


def test_closures_accept_float32_vectors():
    widths, rank = [30, 50, 50, 50], 4
    weights = ImplicitWeights(widths, seed=2, dtype=np.float32)
    right, left = (frame(dim, rank).astype(np.float32) for dim in (30, 50))
    closure = weights.close(right, left, limit=50)
    assert closure.dims == (8, 12, 12, 12)
    bases = [weights.basis(node) for node in range(4)]
    assert all(basis.dtype == np.float32 for basis in bases)
    matrices = [weights.dense(layer) for layer in (1, 2, 3)]
    check_closure(weights, matrices, right, left, closure, 4 * tolerance(np.float32, 50))


def test_frames_may_have_another_precision_than_the_vectors():
    for dtype, other in ((np.float32, F64), (F64, np.float32)):
        weights = ImplicitWeights([9, 9, 9], seed=2, dtype=dtype)
        right = frame(9, 2).astype(other)
        closure = weights.close(right, 2, limit=9)
        assert closure.dims == (4, 4, 4)
        assert {weights.basis(0, k).dtype for k in (0, 2, 4)} == {np.dtype(dtype)}
        error = 4 * tolerance(np.float32, 9)
        check_closure(weights, [weights.dense(1), weights.dense(2)], right, 2, closure, error)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_long_vectors_lose_no_digits(dtype):
    dim = 100_000
    weights = ImplicitWeights([dim, dim, dim], seed=1, dtype=dtype)
    weights.close(2, 2, limit=4)
    x = np.random.default_rng(0).standard_normal((dim, 1)).astype(dtype)
    y = weights.apply(1, x)
    back = weights.apply_transpose(1, y)
    assert np.linalg.norm((back - x).astype(F64)) <= 16 * np.finfo(dtype).eps * np.linalg.norm(x)
    assert [weights.basis(node).shape[1] for node in range(3)] == [5, 5, 4]  # nothing but x was new
    basis = weights.basis(1).astype(F64)
    assert np.abs(basis.T @ basis - np.eye(5)).max() <= 16 * np.finfo(dtype).eps


def test_a_closure_stops_at_its_limit():
    bulge = [20, 40, 20]
    closure = ImplicitWeights(bulge).close(2, 2, limit=[10, 12, 10])
    assert not closure.closed
    assert closure.cores == ()
    assert max(closure.dims[0] - 10, closure.dims[1] - 12, closure.dims[2] - 10) > 0
    assert max(closure.dims) < 20
    assert closure.right.shape == (closure.dims[0], 2)


def test_a_closure_of_exactly_its_limit_is_accepted():
    # This closure needs four directions at each node, exactly the limit.
    for limit in (4, [4, 4, 4], lambda node: 4 + node):
        assert ImplicitWeights([9, 9, 9]).close(2, 2, limit).closed
    for limit in ([4, 3, 4], [3, 4, 4], lambda node: 4 - (node == 2), 1, 0):
        assert not ImplicitWeights([9, 9, 9]).close(2, 2, limit).closed
    assert ImplicitWeights([9, 9, 9]).close(None, None, 0).closed


def test_a_closure_that_stopped_at_its_limit_can_continue():
    weights = ImplicitWeights([12, 12, 12], seed=1)
    right, left = frame(12, 2), frame(12, 2, seed=1)
    assert not weights.close(right, left, limit=2).closed
    closure = weights.close(right, left, limit=4)
    check_closure(weights, [weights.dense(1), weights.dense(2)], right, left, closure, 1e-12)


@pytest.mark.parametrize(
    ("widths", "dims"),
    [
        ([10**9] * 4, (20, 20, 20, 20)),
        ([10**9, 2 * 10**9, 2 * 10**9, 10], (20, 30, 30, 10)),
        ([3 * 10**9, 10**9, 10**9], (30, 20, 20)),
    ],
)
def test_the_memory_of_a_closure_does_not_depend_on_the_width(widths, dims):
    with measure_peak() as peak:
        closure = ImplicitWeights(widths, seed=1).close(10, 10, limit=100)
    assert closure.dims == dims
    assert peak.bytes < 2**20
    for core in closure.cores:  # a square layer is an isometry
        rows, cols = core.shape
        if rows == cols:
            assert np.abs(gram_error(core)).max() <= 1e-13


def test_frames_are_not_copied_and_bases_are_read_only():
    right, left = frame(50, 3), frame(50, 3, seed=1)
    weights = ImplicitWeights([50, 50, 50])
    closure = weights.close(right, left, limit=10)
    assert np.shares_memory(weights.basis(0, 3), right)
    assert np.shares_memory(weights.basis(2, 3), left)
    first = weights.basis(1, closure.dims[1])
    weights.column(2, 7)
    assert np.shares_memory(weights.basis(1, closure.dims[1]), first)
    np.testing.assert_array_equal(weights.basis(0)[:, :3], right)
    np.testing.assert_array_equal(weights.basis(0, 5), weights.basis(0)[:, :5])
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1.0
    right[0, 0] += 0.0  # the user's own array stays writeable


def test_reduced_descent_in_a_closure_is_descent_of_the_layers():
    """Thirty steps on the cores are thirty steps on the layers, seen from the closure's bases."""
    widths, rank, eps, step = [12, 20, 20, 20], 2, 0.5, 0.1
    V, U, s = frame(12, rank), frame(20, rank, seed=1), np.array([2.0, 1.0])
    weights = ImplicitWeights(widths, eps, seed=4)
    closure = weights.close(V, U, limit=20)
    layers = [weights.dense(layer) for layer in (1, 2, 3)]
    cores = [eps * core for core in closure.cores]
    targets = (U * s) @ V.T, (closure.left * s) @ closure.right.T

    def descend(matrices, target):
        for _ in range(30):
            one, two, three = matrices
            error = three @ two @ one - target
            gradients = (three @ two).T @ error, three.T @ error @ one.T, error @ (two @ one).T
            matrices = [m - step * g for m, g in zip(matrices, gradients, strict=True)]
        return matrices

    bases = [weights.basis(node, dim) for node, dim in enumerate(closure.dims)]
    for full, core, before, after in zip(
        descend(layers, targets[0]), descend(cores, targets[1]), bases, bases[1:], strict=False
    ):
        np.testing.assert_allclose(after.T @ full @ before, core, rtol=0, atol=1e-13)
        np.testing.assert_allclose(full @ before, after @ core, rtol=0, atol=1e-13)


# ------------------------------------------------------------------------------------ determinism


def test_the_same_queries_give_the_same_numbers():
    def ask(seed):
        weights = ImplicitWeights([9, 14, 14], 0.5, seed)
        closure = weights.close(frame(9, 2), frame(14, 2), limit=14)
        return [*closure.cores, weights.column(1, 3), weights.basis(1), weights.row(2, 5)]

    for one, two, other in zip(ask(7), ask(7), ask(8), strict=True):
        np.testing.assert_array_equal(one, two)
        assert np.linalg.norm(one - other) > 0.1


def test_each_stream_of_random_numbers_is_used_once(monkeypatch):
    opened = []

    class Recorded(implicit._Streams):
        def __getitem__(self, number):
            generator = super().__getitem__(number)
            state = generator.bit_generator.state["state"]
            opened.append((*state["key"], *state["counter"]))
            return generator

    monkeypatch.setattr(implicit, "_Streams", Recorded)
    weights = ImplicitWeights([6, 9, 9, 9], seed=2)
    for rank in (2, 1, 1):
        weights.close(rank, rank, limit=9)
    for layer in (1, 2, 3):
        weights.dense(layer)
    weights.close(2, 2, limit=9)  # frames in the full space, of which no direction is new
    weights.close(2, 2, limit=9)
    assert len(opened) > 30
    assert len(set(opened)) == len(opened)


def test_directions_do_not_depend_on_the_order_of_queries():
    together, apart = (ImplicitWeights([30, 30, 30], seed=3) for _ in range(2))
    for weights in (together, apart):
        weights.close(4, 4, limit=30)
    apart.basis(1, 3)
    np.testing.assert_allclose(together.basis(1), apart.basis(1), rtol=0, atol=1e-14)


def test_attributes_describe_the_weights():
    weights = ImplicitWeights([3, 4, 5], [0.5, 2], 9, dtype=np.float32)
    assert (weights.widths, weights.scales, weights.seed) == ((3, 4, 5), (0.5, 2.0), 9)
    assert (weights.dtype, weights.n_layers, len(weights)) == (np.float32, 2, 2)
    assert "[3, 4, 5]" in repr(weights)
    np.testing.assert_array_equal(ImplicitWeights([3, 3], 0.0).dense(1), np.zeros((3, 3)))


def test_queries_without_columns_and_with_zero_vectors():
    weights = ImplicitWeights([3, 5])
    assert weights.apply(1, np.zeros((3, 0))).shape == (5, 0)
    assert weights.basis(0).shape == (3, 0)
    np.testing.assert_array_equal(weights.apply(1, np.zeros((3, 2))), np.zeros((5, 2)))
    assert weights.basis(0).shape == (3, 0)
    # Sizes whose squares leave the floating-point numbers.
    huge, tiny = weights.apply(1, np.diag([1e200, 1e-200, 1.0])[:, :2]).T
    np.testing.assert_allclose([np.linalg.norm(huge / 1e200), np.linalg.norm(tiny * 1e200)], 1.0)


# ------------------------------------------------------------------------------------ the distribution


def kolmogorov_smirnov(one, two):
    """Return the asymptotic p-value for two samples of one distribution."""
    one, two = np.sort(one), np.sort(two)
    points = np.concatenate([one, two])
    below = [np.searchsorted(sample, points, side="right") / sample.size for sample in (one, two)]
    distance = np.abs(below[0] - below[1]).max()
    x = distance * np.sqrt(one.size * two.size / (one.size + two.size))
    k = np.arange(1, 101)
    return float(np.clip(2 * np.sum((-1.0) ** (k - 1) * np.exp(-2 * (k * x) ** 2)), 0, 1)) if x > 0.2 else 1.0


def test_the_two_sample_test_distinguishes_distributions():
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((3, N_SEEDS))
    assert kolmogorov_smirnov(normal[0], normal[1]) > 0.01
    assert kolmogorov_smirnov(normal[0], normal[2] + 0.4) < LEVEL
    assert kolmogorov_smirnov(normal[0], 1.6 * normal[2]) < LEVEL
    # 1.358 is the 5 % point of Kolmogorov's distribution.
    shift = np.arange(1000.0)
    assert kolmogorov_smirnov(shift, shift + 60.5) == pytest.approx(2 * np.exp(-2 * 0.061**2 * 500), rel=1e-2)


def p_values(one, two):
    """Return one p-value per column; what is constant but for rounding counts as equal."""
    return [kolmogorov_smirnov(*pair) for pair in zip(np.round(one, 9).T, np.round(two, 9).T, strict=True)]


class Explicit:
    """The same queries, answered by explicit layers."""

    def __init__(self, widths, seed):
        self.layers = dln.orthogonal(widths, seed=seed)

    def apply(self, layer, X):
        return self.layers[layer - 1] @ X

    def apply_transpose(self, layer, Y):
        return self.layers[layer - 1].T @ Y

    def entry(self, layer, i, j):
        return self.layers[layer - 1][i, j]

    def dense(self, layer):
        return self.layers[layer - 1]

    def overlap(self, right, left):
        for layer in reversed(self.layers):
            left = layer.T @ left
        return right.T @ left, left


class Revealed(ImplicitWeights):
    """Overlaps from the closure."""

    def __init__(self, widths, seed):
        super().__init__(widths, seed=seed)

    def overlap(self, right, left):
        closure = self.close(right, left, limit=10**6)
        pulled = closure.left
        for core in reversed(closure.cores):
            pulled = core.T @ pulled
        return closure.right.T @ pulled, pulled


def linked_statistics(weights, widths, right, left, close_first):
    """Return numbers that depend on the closure, its vectors, and layers applied to other vectors."""
    answers = {}

    def closure():
        overlap, pulled = weights.overlap(right, left)
        answers["overlaps"] = [*overlap.ravel(), *np.linalg.svd(overlap)[1], np.linalg.norm(pulled[:, 0])]

    def vectors():
        u, y, w = (np.linspace(-1, 1.5, dim)[:, None] for dim in (widths[3], widths[1], widths[1]))
        w = np.cos(3 * w)
        back, up = weights.apply_transpose(1, y), weights.apply(3, weights.apply(2, w))
        # An entry between the frames of the target and a vector; |Q_1^T y|; u^T W_3 W_2 w.
        toward_v, toward_u = (right.T @ back).item(0), (left.T @ up).item(0)
        answers["vectors"] = [toward_v, toward_u, np.linalg.norm(back), np.linalg.norm(up), (u.T @ up).item()]
        answers["entries"] = [weights.entry(layer, 0, widths[layer - 1] - 1) for layer in (1, 3)]

    for question in (closure, vectors) if close_first else (vectors, closure):
        question()
    # Products detect a dependence between queries that each have the right distribution.
    first, second, third = answers["overlaps"][0], answers["vectors"][0], answers["vectors"][1]
    products = [
        first * second * third,
        second * third,
        answers["entries"][0] * second,
        answers["entries"][1] * third,
    ]
    return [*answers["overlaps"], *answers["vectors"], *answers["entries"], *products]


@pytest.mark.parametrize(
    ("widths", "close_first", "n_seeds"),
    [
        ([40, 40, 40, 40], True, (N_SEEDS, N_SEEDS)),
        ([40, 40, 40, 40], False, (FEW_SEEDS, MANY_SEEDS)),
        ([20, 40, 40, 40], True, (FEW_SEEDS, MANY_SEEDS)),
        ([60, 40, 40, 5], True, (FEW_SEEDS, MANY_SEEDS)),
        ([3, 4, 2, 4], True, (FEW_SEEDS, MANY_SEEDS)),
    ],
    ids=str,
)
def test_the_distribution_equals_that_of_explicit_orthogonal_layers(widths, close_first, n_seeds):
    right, left = frame(widths[0], 2), frame(widths[-1], 2, seed=1)
    samples = [
        np.array(
            [linked_statistics(sampler(widths, seed), widths, right, left, close_first) for seed in range(n)]
        )
        for sampler, n in zip((Revealed, Explicit), n_seeds, strict=True)
    ]
    values = p_values(*samples)
    assert min(values) > LEVEL, values


@pytest.mark.parametrize(("widths", "rank"), [([5, 9, 9], 2), ([6, 6], 3), ([3, 7], 3)], ids=str)
def test_abstract_frames_are_distributed_as_random_frames(widths, rank):
    """Ranks close to the widths are tested too: they leave few degrees of freedom."""
    samples = []
    for sampler, n_seeds in ((Revealed, FEW_SEEDS), (Explicit, MANY_SEEDS)):
        found = []
        for seed in range(n_seeds):
            weights = sampler(widths, seed)
            frames = (rank, rank)
            if sampler is Explicit:
                frames = [frame(dim, rank, seed=seed) for dim in (widths[0], widths[-1])]
            elif seed % 2:  # a frame at a node with sampled directions is as random
                weights.column(1, 0)
            overlap, pulled = weights.overlap(*frames)
            values = np.linalg.svd(overlap)[1]
            found.append([*overlap.ravel(), *values, values[0] / values[-1], np.linalg.norm(pulled)])
        samples.append(np.array(found))
    values = p_values(*samples)
    assert min(values) > LEVEL, values


@pytest.mark.parametrize("shape", [(4, 4), (7, 4), (4, 7)])
def test_whole_matrices_are_haar_distributed(shape):
    """Traces, fourth moments and determinants of matrices revealed after a closure, column by column."""
    rows, cols = shape
    samples = []
    for sampler, n_seeds in ((Revealed, FEW_SEEDS), (Explicit, MANY_SEEDS)):
        found = []
        for seed in range(n_seeds):
            weights = sampler([cols, rows], seed)
            weights.overlap(frame(cols, 1), frame(rows, 1))
            dense = weights.dense(1)
            corner = dense[:4, :4]
            found.append(
                [
                    np.trace(corner),
                    np.sum(dense**4),
                    np.linalg.det(corner),
                    *dense[-1, :2],
                    np.abs(dense).max(),
                ]
            )
        samples.append(np.array(found))
    values = p_values(*samples)
    if rows == cols:  # the determinant's sign is fair
        assert abs(np.mean(samples[0][:, 2] > 0) - 0.5) <= 4 * 0.5 / np.sqrt(FEW_SEEDS)
        values.pop(2)
    assert min(values) > LEVEL, values


# ------------------------------------------------------------------------------------ bad arguments


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (([5],), {}, dln.ShapeError, "widths"),
        (([5, 0, 5],), {}, ValueError, r"widths\[1\] \(d_1\) is 0"),
        (([5, 2.5],), {}, TypeError, r"widths\[1\]"),
        (([5, 5], -1.0), {}, ValueError, r"scale \(eps\)"),
        (([5, 5], [1.0, 1.0]), {}, dln.ShapeError, r"scale \(eps\) has 2 values"),
        (([5, 5], 1.0, -1), {}, ValueError, "seed"),
        (([5, 5], 1.0, 2**64), {}, ValueError, "seed"),
        (([5, 5], 1.0, 0.5), {}, TypeError, "seed"),
        (([5, 5],), {"dtype": np.float16}, TypeError, "dtype is float16"),
    ],
)
def test_errors_name_bad_arguments(arguments, options, error, text):
    with pytest.raises(error, match=text):
        ImplicitWeights(*arguments, **options)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda w: w.apply(0, np.ones((3, 1))), ValueError, "layer is 0"),
        (lambda w: w.apply(3, np.ones((3, 1))), ValueError, "layer is 3"),
        (lambda w: w.apply(1, np.ones((4, 1))), dln.ShapeError, r"X has shape \(4, 1\); wanted \(3, any\)"),
        (lambda w: w.apply(1, np.ones(3)), dln.ShapeError, "X has shape"),
        (lambda w: w.apply(1, np.full((3, 1), np.nan)), ValueError, "X has a value that is not finite"),
        (lambda w: w.apply_transpose(1, np.ones((3, 1))), dln.ShapeError, r"Y .*wanted \(4, any\)"),
        (lambda w: w.column(1, 3), ValueError, "j is 3"),
        (lambda w: w.row(1, -1), ValueError, "i is -1"),
        (lambda w: w.entry(1, 4, 0), ValueError, "i is 4"),
        (lambda w: w.basis(3), ValueError, "node is 3"),
        (lambda w: w.basis(0, 1), ValueError, "k is 1"),
        (lambda w: w.close(4, 2, 9), ValueError, "right is 4"),
        (lambda w: w.close(True, 2, 9), TypeError, "right is True"),
        (lambda w: w.close(1, -1, 9), ValueError, "left is -1"),
        (lambda w: w.close(np.ones((3, 1)), 2, 9), ValueError, "right has columns that are not orthonormal"),
        (lambda w: w.close(2, np.eye(4), 9), dln.ShapeError, "left has shape"),
        (lambda w: w.close(2, 2, [9, 9]), dln.ShapeError, "limit has 2 values; wanted one per node"),
        (lambda w: w.close(2, 2, 2.5), TypeError, r"limit\[0\] is 2.5"),
        (lambda w: w.close(2, 2, [9, -1, 9]), ValueError, r"limit\[1\] is -1"),
    ],
)
def test_errors_name_bad_queries(call, error, text):
    weights = ImplicitWeights([3, 4, 5])
    with pytest.raises(error, match=text):
        call(weights)
    assert all(weights.basis(node).shape[1] == 0 for node in range(3))  # and change nothing


# Runs of implicit layers.


@pytest.mark.parametrize(
    "widths", [[24] * 4, [16, 24, 24, 24], [30, 24, 24, 24], [24, 24, 24, 3], [16, 24, 24, 3], [24, 30]]
)
def test_a_run_equals_a_dense_run_of_its_sampled_layers(widths):
    """The dense engine gives the same run from the layers sampled after the run."""
    problem = dln.Problem(draw_low_rank_target(widths[-1], widths[0], rank=3))
    n_layers = len(widths) - 1
    lazy_weights = dln.orthogonal(widths, 0.6, seed=4, implicit=True)
    rates = {"learning_rate": 0.02, "steps": 100, "weight_decay": 1e-3, "record": dln.Record(every=20)}
    run = dln.train(problem, lazy_weights, **rates)
    assert run.engine == "reduced"
    assert "lazily sampled weights" in run.certificate.reason
    before = [run.layer(layer, 40).column(3) for layer in range(1, n_layers + 1)]
    weights = [lazy_weights.dense(layer) for layer in range(1, n_layers + 1)]
    dense = dln.train(problem, weights, engine="dense", **with_record(rates, weights_every=20))
    np.testing.assert_allclose(run.loss, dense.loss, rtol=0, atol=1e-12 * dense.loss[0])
    for layer in range(1, n_layers + 1):
        for step in run.steps:
            wanted = dense.weights(layer, step)
            size = np.linalg.norm(wanted)
            assert np.linalg.norm(run.weights(layer, step) - wanted) <= 1e-12 * size
        wanted = dense.weights(layer, 40)
        size = np.linalg.norm(wanted, 2)
        np.testing.assert_allclose(before[layer - 1], wanted[:, 3], rtol=0, atol=1e-12 * size)
        operator = run.layer(layer, 40)
        X = np.random.default_rng(layer).standard_normal((widths[layer - 1], 2))
        np.testing.assert_allclose(operator @ X, wanted @ X, rtol=0, atol=1e-11 * size)
        np.testing.assert_allclose(operator.row(1), wanted[1], rtol=0, atol=1e-12 * size)
        np.testing.assert_allclose(operator.entry(1, 2), wanted[1, 2], rtol=0, atol=1e-12 * size)
        np.testing.assert_allclose(
            run.singular_values(layer), dense.singular_values(layer), rtol=0, atol=1e-12 * size
        )


def test_runs_at_any_width_form_no_wide_array():
    """The tables of a run of width 10^6 need no array of that width but those of the target."""
    dim = 10**6
    problem = dln.Problem(draw_low_rank_target(dim, dim, rank=2))
    with measure_peak() as peak:
        lazy_weights = dln.orthogonal([dim] * 4, 0.5, implicit=True)
        run = dln.train(problem, lazy_weights, learning_rate=0.05, steps=200, record=dln.Record(every=10))
        tables = [run.active_singular_values(2), run.active_angles(1), run.active_angles(3, "left")]
    assert peak.bytes < 8 * dim * 6  # a check of the two frames
    assert all(table.shape == (21, 4) for table in tables)
    assert run.multiplicity(1) == dim - 4
    column = run.layer(2).column(7)
    assert abs(np.linalg.norm(column) - run.rho(2)[-1]) < 1e-3
    with pytest.raises(MemoryError, match=r"run\.layer\(layer, step\)"):
        run.weights(2)


def test_the_same_seed_gives_the_same_run():
    problem = dln.Problem(draw_low_rank_target(40, 40, rank=2))
    rates = {"learning_rate": 0.05, "steps": 50}
    runs = [dln.train(problem, dln.orthogonal([40] * 4, 0.5, 7, implicit=True), **rates) for _ in range(2)]
    np.testing.assert_array_equal(runs[0].loss, runs[1].loss)
    np.testing.assert_array_equal(runs[0].weights(2), runs[1].weights(2))
    other = dln.train(problem, dln.orthogonal([40] * 4, 0.5, 8, implicit=True), **rates)
    assert not np.array_equal(runs[0].loss, other.loss)


def test_runs_can_be_saved(tmp_path):
    problem = dln.Problem(draw_low_rank_target(40, 40, rank=2))
    run = dln.train(
        problem, dln.orthogonal([40] * 4, [0.5, 0.4, 0.3], 7, implicit=True), learning_rate=0.05, steps=50
    )
    run.save(tmp_path / "run.npz")
    again = dln.load(tmp_path / "run.npz")
    np.testing.assert_array_equal(again.active_singular_values(2), run.active_singular_values(2))
    np.testing.assert_array_equal(again.weights(2, 20), run.weights(2, 20))


def test_the_same_frames_give_the_same_closure_after_other_queries():
    weights = ImplicitWeights([9] * 4, 0.5, seed=3)
    right, left = frame(9, 2, seed=1), frame(9, 2, seed=2)
    first = weights.close(right, left, 9)
    assert weights.is_determined_by(right, left)
    weights.dense(2)
    again = weights.close(right.copy(), left.copy(), 9)
    assert again.dims == first.dims == (4, 4, 4, 4)
    for one, other in zip(again.cores, first.cores, strict=True):
        np.testing.assert_array_equal(one, other)
    assert weights.is_determined_by(right, left)
    assert not weights.is_determined_by(left, right)
    # Another closure holds all that is known by then.
    assert weights.close(left, right, 9).dims == (9, 9, 9, 9)


#: Queries before a run, and whether the seed alone gives the layers of the run.
EARLIER_QUERIES = {
    "none": (lambda weights, problem: None, True),
    "the same run": (lambda weights, problem: run_of(problem, weights), True),
    "the same run, read": (lambda weights, problem: run_of(problem, weights).weights(2), True),
    "a product": (lambda weights, problem: weights.apply(2, np.ones((12, 1))), False),
    "another target": (lambda weights, problem: run_of(dln.low_rank_recovery(12, 2, seed=5), weights), False),
}


def run_of(problem, weights, **more):
    return dln.train(problem, weights, learning_rate=0.1, steps=5, n_threads=1, **more)


@pytest.mark.parametrize("queries", EARLIER_QUERIES)
def test_runs_of_weights_with_earlier_queries_are_saved_and_resumed(tmp_path, queries):
    problem = dln.low_rank_recovery(12, 2)
    weights = dln.orthogonal([12] * 4, 0.3, seed=1, implicit=True)
    earlier, is_of_seed = EARLIER_QUERIES[queries]
    earlier(weights, problem)
    first = run_of(problem, weights, checkpoint=tmp_path / "run")
    for run in (first, run_of(problem, weights, checkpoint=tmp_path / "run")):
        np.testing.assert_array_equal(run.loss, first.loss)
        np.testing.assert_allclose(run.weights(2, 0), weights.dense(2), rtol=0, atol=tolerance(float, 12))
    for whole in (True, False):
        first.save(tmp_path / "run.npz", weights=whole)
        loaded = dln.load(tmp_path / "run.npz")
        np.testing.assert_array_equal(loaded.active_singular_values(2), first.active_singular_values(2))
        if whole or is_of_seed:
            np.testing.assert_allclose(loaded.weights(2), first.weights(2), rtol=0, atol=tolerance(float, 12))
    if is_of_seed:
        np.testing.assert_array_equal(dln.resume(tmp_path / "run").loss, first.loss)
    else:
        assert dln.load(tmp_path / "run").states.initial_weights() is None
        with pytest.raises(ValueError, match=r"does not hold W\(0\): the weights were lazily sampled"):
            dln.resume(tmp_path / "run")


@pytest.mark.parametrize("call", ["train", "train_batch"])
def test_folders_of_other_seeds_and_earlier_queries_are_refused(tmp_path, call):
    problem = dln.low_rank_recovery(12, 2)

    def run(seed, *, query=False):
        weights = dln.orthogonal([12] * 4, 0.3, seed=seed, implicit=True)
        if query:
            weights.apply(2, np.ones((12, 1)))
        options = {"learning_rate": 0.1, "steps": 5, "n_threads": 1, "checkpoint": tmp_path / "run"}
        if call == "train_batch":
            return dln.train_batch(problem, [weights], **options)[0]
        return dln.train(problem, weights, **options)

    loss = run(1).loss
    np.testing.assert_array_equal(run(1).loss, loss)
    for other in (lambda: run(2), lambda: run(1, query=True)):
        with pytest.raises(ValueError, match="holds another"):
            other()


def test_folders_of_version_0_1_0_are_compared_by_their_distribution(tmp_path, monkeypatch):
    from dlnfast._training.checkpointed import CheckpointedRun

    problem = dln.low_rank_recovery(12, 2)
    with monkeypatch.context() as patch:  # identities of 0.1.0 did not depend on the seed
        patch.setattr(CheckpointedRun, "_is_former_folder", lambda self, law: True)
        weights = dln.orthogonal([12] * 4, 0.3, seed=1, implicit=True)
        first = run_of(problem, weights, checkpoint=tmp_path / "run")
    same, other = (dln.orthogonal([12] * 4, 0.3, seed=seed, implicit=True) for seed in (1, 2))
    np.testing.assert_array_equal(run_of(problem, same, checkpoint=tmp_path / "run").loss, first.loss)
    np.testing.assert_array_equal(dln.resume(tmp_path / "run").loss, first.loss)
    with pytest.raises(ValueError, match="holds another run"):
        run_of(problem, other, checkpoint=tmp_path / "run")


def test_a_run_too_wide_to_save_its_layers_says_so(tmp_path):
    problem = dln.low_rank_recovery(20_000, 1)
    weights = dln.orthogonal([20_000] * 3, 0.3, seed=1, implicit=True)
    weights.apply(1, np.ones((20_000, 1)))
    run = dln.train(problem, weights, learning_rate=0.1, steps=2)
    with pytest.raises(MemoryError, match=r"layer 1 is 20000 x 20000 .* save\(path, weights=False\)"):
        run.save(tmp_path / "run.npz", weights=True)
    run.save(tmp_path / "run.npz", weights=False)
    np.testing.assert_array_equal(dln.load(tmp_path / "run.npz").loss, run.loss)


def test_operations_that_need_explicit_layers_are_refused():
    problem = dln.Problem(draw_low_rank_target(40, 40, rank=2))
    lazy_weights = dln.orthogonal([40] * 4, 0.5, implicit=True)
    rates = {"learning_rate": 0.05, "steps": 5}
    with pytest.raises(dln.AssumptionError, match="implicit=False"):
        dln.train(problem, lazy_weights, engine="dense", **rates)
    with pytest.raises(dln.AssumptionError, match=r"input_gram \(S\)"):
        dln.train(dln.Problem(problem.target, np.diag(np.linspace(1, 2, 40))), lazy_weights, **rates)
    with pytest.raises(dln.AssumptionError, match="bulge"):
        dln.train(problem, dln.orthogonal([40, 90, 90, 40], 0.5, implicit=True), **rates)
    with pytest.raises(dln.ShapeError, match="d_y"):
        dln.train(problem, dln.orthogonal([40, 40, 30], 0.5, implicit=True), **rates)
    report = dln.closure(problem, dln.orthogonal([40] * 4, 0.5, implicit=True)).report()
    assert "4 of 40 dimensions are active" in report


def test_runs_are_distributed_as_those_of_explicit_layers():
    """Singular values, angles and loss of trained networks over 500 seeds; level 1e-3 for all together."""
    problem, n_seeds = dln.Problem(draw_low_rank_target(40, 40, rank=2)), 500
    rates = {"learning_rate": 0.05, "steps": 30, "record": dln.Record(every=30)}

    def linked_statistics(implicit, seed):
        run = dln.train(problem, dln.orthogonal([40] * 4, 0.8, seed, implicit=implicit), **rates)
        values = run.active_singular_values(2)[-1]
        # Between layers: overlaps of left vectors of one with right vectors of the next.
        u, v = run.singular_vectors(1, "left")[:, 0], run.singular_vectors(2, "right")[:, 0]
        input_overlap = (run.singular_vectors(1, "right")[:, 0] @ problem.target.V[:, 0]) ** 2
        return [run.loss[-1], *values, run.active_angles(1)[-1, 0], (u @ v) ** 2, input_overlap]

    drawn, lazy = (
        np.array([linked_statistics(implicit, seed) for seed in range(n_seeds)]) for implicit in (False, True)
    )
    level = 1e-3 / drawn.shape[1]
    for one, other in zip(drawn.T, lazy.T, strict=True):
        assert kolmogorov_smirnov(one, other) > level
