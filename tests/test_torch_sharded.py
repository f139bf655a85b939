# SPDX-License-Identifier: MIT
"""Row-sharded layers: results equal those of one process, on all processes, and no process waits forever.

All cases run in one start of two processes and one of three. Each test reads the result of one case.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest
from helpers.records import with_record

torch = pytest.importorskip("torch", reason="PyTorch is optional")
import torch.distributed as dist  # noqa: E402
from helpers.matrices import draw_orthonormal  # noqa: E402
from helpers.problems import draw_problem  # noqa: E402
from tolerances import tolerance  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import dlnfast as dln  # noqa: E402
from dlnfast import Checkpoint  # noqa: E402
from dlnfast._training.options import Options  # noqa: E402
from dlnfast._trajectory.layer_spectra import COLUMNS  # noqa: E402
from dlnfast.torch import RowSharded, sharded_descent, train_sharded  # noqa: E402
from dlnfast.torch.sharded import Peers  # noqa: E402

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("PyTorch has no Gloo here", allow_module_level=True)

F32, F64 = np.float32, np.float64
#: Seconds that a message may take before the processes give up.
PATIENCE = 120

# Functions that the processes run.


def cut(matrix, counts=None, seed=0):
    """Return the rows of this process: an equal share, or a random number of rows, possibly none."""
    if counts is None:
        boundaries = np.random.default_rng(seed).integers(0, len(matrix) + 1, dist.get_world_size() - 1)
        counts = np.diff([0, *sorted(boundaries), len(matrix)])
    start = int(np.sum(counts[: dist.get_rank()]))
    return RowSharded(torch.tensor(matrix[start : start + int(counts[dist.get_rank()])]))


def whole(shard):
    """Return the matrix, on every process."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, shard.rows.numpy())
    return np.concatenate(parts)


def assert_same_bits(*arrays):
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    assert len(set(digests)) == 1


def recorded(run):
    arrays = [run.loss, run.steps, *run.states.values, *run.states.left, *run.states.right]
    seconds = COLUMNS.index("seconds")
    for layer in run.states.tracking:
        arrays += [layer.errors, layer.signs, layer.branches, layer.clusters]
        arrays.append(np.delete(layer.columns, seconds, axis=1))
    return arrays


def assert_same_run(widths, seed, white, dtype=F64, steps=6, even=False):
    """Train in one process and in all, with different rates per layer, and compare all results."""
    rng = np.random.default_rng([seed, *widths])
    n_layers = len(widths) - 1
    problem = draw_problem(widths, seed=seed, white=white)
    weights = dln.gaussian(widths, 0.7, seed, dtype=dtype)
    rate = dln.train(problem, weights, learning_rate="auto", steps=0).config["learning_rate"][0]
    momentum = rng.choice([0.0, 0.5], n_layers)
    options = {
        "learning_rate": rate * rng.choice([0.0, 0.3, 1.0, 1.0], n_layers) * (1 - momentum.max()),
        "weight_decay": rng.choice([0.0, 0.01], n_layers),
        "momentum": momentum,
        "steps": steps,
        "record": dln.Record(every=4),
    }
    wanted = dln.train(problem, weights, engine="dense", **with_record(options, singular_values=2))
    shards = [RowSharded.from_rows(w) if even else cut(w, seed=[seed, i]) for i, w in enumerate(weights)]
    run = train_sharded(problem, shards, **with_record(options, singular_values=2))
    assert_same_bits(*recorded(run))
    assert run.steps.tolist() == wanted.steps.tolist()
    limit = tolerance(dtype, max(widths), steps)
    scale = wanted.loss[0] + problem.loss_scale * np.sum(problem.dense_target() ** 2)
    # Losses are squares: their roots have the accuracy of the end-to-end matrix.
    assert np.abs(np.sqrt(run.loss) - np.sqrt(wanted.loss)).max() <= limit * np.sqrt(scale)
    for layer, shard in enumerate(shards, 1):
        expected, size = wanted.weights(layer), np.linalg.norm(weights[layer - 1])
        assert shard.shape == expected.shape
        assert np.linalg.norm(whole(shard) - expected) <= limit * size
        values = run.singular_values(layer)
        assert values.dtype == dtype
        off = np.abs(values - wanted.singular_values(layer))
        assert np.all(off <= run.singular_value_errors(layer) + limit * size)
    return run


def case_runs_of_all_shapes():
    rng = np.random.default_rng(7)
    for seed in range(8):
        widths = rng.choice([1, 2, 3, 5, 7, 11, 13, 16], 1 + seed % 4 + 1).tolist()
        assert_same_run(widths, seed, white=seed % 3 != 0)


def case_runs_split_at_either_end_and_inside():
    chains = [[3, 17, 17, 17], [17, 17, 17, 3], [17, 17, 2, 17, 17], [5, 3, 5], [1, 1, 1], [8, 8]]
    for number, widths in enumerate(chains):
        assert_same_run(widths, 1, white=number % 2 == 0, even=True)


def case_runs_in_single_precision():
    for widths in ([3, 17, 13], [13, 17, 2, 17, 7]):
        assert_same_run(widths, 2, False, dtype=F32)


def case_automatic_rates():
    widths = [6, 19, 19, 4]
    problem, weights = draw_problem(widths, seed=3), dln.orthogonal(widths, 0.5, seed=3)
    options = {"learning_rate": "auto", "steps": 30, "weight_decay": 0.01, "tolerance": 0.6}
    wanted = dln.train(problem, weights, engine="dense", **options)
    run = train_sharded(problem, [cut(w) for w in weights], **options)
    assert np.allclose(run.config["learning_rate"], wanted.config["learning_rate"], rtol=1e-12)
    assert run.outcome == wanted.outcome
    assert len(run.loss) == len(wanted.loss)


def case_products_and_values_of_a_matrix():
    rng = np.random.default_rng(5)
    shapes = [(1, 1), (1, 9), (9, 1), (2, 200), (150, 140), (140, 150)]
    for number, (m, n) in enumerate(shapes):
        for dtype in (F64, F32):
            W = rng.standard_normal((m, n)).astype(dtype)
            shard = cut(W, seed=number)
            assert shard.shape == (m, n)
            assert shard.dtype == dtype
            assert sum(shard.counts) == m
            X, Y = rng.standard_normal((n, 3)).astype(dtype), rng.standard_normal((m, 3)).astype(dtype)
            limit = tolerance(dtype, max(m, n))
            size = np.linalg.norm(W)
            for got, expected, block in ((shard.matmat(X), W @ X, X), (shard.rmatmat(Y), W.T @ Y, Y)):
                assert_same_bits(got)
                assert got.dtype == dtype
                assert np.linalg.norm(got - expected) <= limit * size * np.linalg.norm(block)
            assert shard.squared_norm() == pytest.approx(size**2, rel=limit)


def case_tracker_of_a_slowly_changing_matrix():
    rng = np.random.default_rng(6)
    for dtype in (F64, F32):
        W = draw_orthonormal(rng, 180, 150).astype(dtype)
        shard = cut(W, counts=[len(W) - 7] + [0] * (dist.get_world_size() - 2) + [7])
        tracker = dln.SVDTracker(k=4)
        for number in range(3):
            move = np.outer(rng.standard_normal(180), rng.standard_normal(150)).astype(dtype) / 150
            W += move
            shard.rows.add_(torch.tensor(move[shard.start : shard.stop]))
            drift = None if number == 0 else float(np.linalg.norm(move)) * (1 + 1e-5)
            found = tracker.update(shard, drift=drift, squared_norm=shard.squared_norm())
            exact = np.linalg.svd(W.astype(F64), compute_uv=False)[:4]
            assert_same_bits(found.singular_values, found.errors, tracker.left_vectors, tracker.right_vectors)
            off = np.abs(found.singular_values - exact)
            assert np.all(off <= found.errors + tolerance(dtype, 180) * exact[0])
            assert dtype == F32 or found.completeness == "probabilistic"


def case_records_contain_correct_values():
    """With bounds from the steps only, error bounds hold and values are accurate during a whole run."""
    widths = [4, 160, 150, 3]
    problem = draw_problem(widths, seed=4)
    for momentum, decay, dtype in ((0.0, 0.0, F64), (0.6, 0.02, F64), (0.0, 0.02, F32)):
        weights = dln.orthogonal(widths, 0.5, seed=4, dtype=dtype)
        options = {"learning_rate": 0.3, "momentum": momentum, "weight_decay": decay, "steps": 40}
        options |= {"record": dln.Record(singular_values=3, vectors=True, every=10)}
        wanted = dln.train(problem, weights, engine="dense", **with_record(options, tracking="full"))
        run = train_sharded(problem, [cut(w) for w in weights], **options)
        for layer in (1, 2, 3):
            expected, errors = wanted.singular_values(layer), run.singular_value_errors(layer)
            off = np.abs(run.singular_values(layer) - expected)
            assert np.all(off <= errors + tolerance(dtype, 160, 40) * expected[:, :1])
            # The tracker of the middle layer iterates, with a tolerance of 5 % of the largest value.
            assert np.all(off <= 0.05 * expected[:, :1])
        tracking = run.tracking(2)
        if decay == 0:  # decay moves all of W: bounds are renewed at each record
            assert not tracking["refreshed"][1:].all()
            assert np.any(tracking["drift"] > 0)
        vectors = run.singular_vectors(2, "left", -1)
        lengths = np.linalg.norm(wanted.weights(2).T @ vectors, axis=0)
        assert np.abs(lengths - run.singular_values(2)[-1]).max() <= 0.01 * lengths[0]


def case_the_sum_of_steps_bounds_the_change():
    """The bound on a layer's change is above the true one, for all rates."""
    widths = [3, 14, 12, 5]
    problem, weights = draw_problem(widths, seed=8), dln.gaussian(widths, 0.7, 8)
    for dtype in (F64, F32):
        options = {
            "learning_rate": [0.1, 0.0, 0.2],
            "weight_decay": [0.02, 0.0, 5.0],  # the last one cancels all of W
            "momentum": [0.5, 0.0, 0.0],
        }
        for change in ({}, {"momentum": 0.0, "weight_decay": 0.03, "learning_rate": 0.1}):
            shards = [cut(w.astype(dtype)) for w in weights]
            record = dln.Record(singular_values=1)
            changed = Options(steps=1, record=record, n_threads=1, **options | change)
            request = sharded_descent._make_request(changed.checked(), problem, shards)
            descent = sharded_descent._Descent(shards, request)
            before = [whole(shard) for shard in shards]
            for layer in descent.layers:
                layer.measure_path()
            for _ in range(4):
                descent.evaluate()
                descent.update()
            for layer, shard, start in zip(descent.layers, shards, before, strict=True):
                squared_norm, bound = layer.measure_movement()
                now = whole(shard)
                moved = np.linalg.norm(now.astype(F64) - start.astype(F64))
                assert squared_norm == pytest.approx(np.linalg.norm(now) ** 2, rel=1e-5)
                assert moved <= bound
                if layer.rule.weight_factor:  # otherwise W changes its direction at every step
                    assert bound <= 4 * moved + 1e-6  # or it would be of no use


def case_messages_of_a_step():
    """For each l except the split there is one message of (d_l, k) numbers forward and one backward."""
    size = dist.get_world_size()
    sent = []
    originals = dist.all_reduce, dist.all_gather

    def all_reduce(tensor, *args, **kwargs):
        sent.append(("sum", tuple(tensor.shape)))
        return originals[0](tensor, *args, **kwargs)

    def all_gather(parts, tensor, *args, **kwargs):
        sent.append(("rows", (sum(len(p) for p in parts), tensor.shape[1])))
        return originals[1](parts, tensor, *args, **kwargs)

    d = 6 * size  # even shards, so that gathers are not padded
    loss, summed, gathered = ("sum", ()), ("sum", (d, 2)), ("rows", (d, 2))
    for widths, wanted in (
        # The split at the inputs: forward P_1, P_2; back B_2, B_1.
        ([2, d, d, d], [gathered, gathered, loss, summed, summed]),
        # Inside: W_2 = T_1^T and T_0, P_3; F_0, B_3, F_1.
        (
            [d, d, 2, d, d],
            [("rows", (2, d)), summed, gathered, loss, summed, summed, gathered],
        ),
        # At the outputs: W_3 = T_2^T, T_1, T_0; F_1, F_2.
        (
            [d, d, d, 2],
            [("rows", (2, d)), summed, summed, loss, gathered, gathered],
        ),
    ):
        problem, weights = draw_problem(widths, seed=1), dln.gaussian(widths, 0.5, 1)
        counts = []
        for steps in (0, 3, 5):
            shards = [RowSharded.from_rows(w) for w in weights]
            sent.clear()
            dist.all_reduce, dist.all_gather = all_reduce, all_gather
            try:
                train_sharded(
                    problem,
                    shards,
                    learning_rate=0.01,
                    steps=steps,
                    record=dln.Record(every=9, singular_values=None),
                )
            finally:
                dist.all_reduce, dist.all_gather = originals
            counts.append(list(sent))
        # Two rows are fewer than three processes: that gather is padded.
        wanted = [("rows", (size, d)) if each == ("rows", (2, d)) else each for each in wanted]
        step = counts[2][len(counts[1]) :]
        assert len(step) == 2 * len(wanted)
        # After a loss: the backward pass of a step, and the forward pass of the next.
        begin = wanted.index(loss) + 1
        assert step == 2 * (wanted[begin:] + wanted[:begin])
        n_layers = len(widths) - 1
        assert len(wanted) == 2 * n_layers - (widths[-1] > 2)


class _Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                self.size = max(self.size, each.numel())
        return result


def case_no_process_computes_a_whole_layer():
    d, k = 240, 3
    widths = [k, d, d, k]
    problem, weights = draw_problem(widths, seed=1), dln.orthogonal(widths, 0.5, seed=1)
    for momentum, values in ((0.0, 2), (0.5, None)):
        shards = [RowSharded.from_rows(w) for w in weights]
        with _Largest() as seen:
            options = {
                "weight_decay": 0.01,
                "momentum": momentum,
                "record": dln.Record(singular_values=values),
            }
            train_sharded(
                problem,
                shards,
                learning_rate=0.1,
                steps=2,
                **with_record(options, every=2),
            )
        own = max(shard.rows.numel() for shard in shards)
        assert own < d * d
        assert seen.size == own


def case_sources_of_rows():
    def row(i):
        return np.random.default_rng([3, i]).standard_normal(11)

    expected = np.stack([row(i) for i in range(17)])
    asked = []

    def rows(start, stop):
        asked.append((start, stop))
        return np.stack([row(i) for i in range(start, stop)])

    class RowSource:
        """Records which rows were read."""

        shape, dtype = expected.shape, expected.dtype

        def __getitem__(self, where):
            assert 0 < where.stop - where.start < 17
            return expected[where]

    for source, shape in (
        (expected, None),
        (RowSource(), None),
        (rows, (17, 11)),
        (torch.tensor(expected), None),
    ):
        shard = RowSharded.from_rows(source, shape)
        assert max(shard.counts) - min(shard.counts) <= 1
        assert np.array_equal(whole(shard), expected)
    assert asked == [(shard.start, shard.stop)]
    before = expected.copy()
    RowSharded.from_rows(expected).rows.zero_()
    assert np.array_equal(expected, before)
    assert RowSharded.from_rows(rows, (17, 11), dtype=F32).dtype == F32
    few = RowSharded.from_rows(rows, (1, 11))
    assert few.shape == (1, 11)
    assert np.array_equal(whole(few), expected[:1])


def case_divergence_is_an_error_on_all():
    widths = [4, 9, 9, 3]
    problem = draw_problem(widths, seed=1)
    shards = [cut(w) for w in dln.gaussian(widths, 1.0, 1)]
    with pytest.raises(dln.DivergedError, match="lower learning_rate") as raised:
        train_sharded(problem, shards, learning_rate=1e3, steps=100, record=dln.Record(singular_values=1))
    run = raised.value.trajectory
    assert run.outcome == "diverged"
    assert len(run.loss) == raised.value.step
    assert np.isfinite(run.loss).all()
    assert_same_bits(run.loss, np.array([raised.value.step, raised.value.layer]))


def case_callbacks_on_some_processes():
    rank = dist.get_rank()
    widths = [4, 9, 3]
    problem = draw_problem(widths, seed=1)

    def shards():
        return [cut(w) for w in dln.gaussian(widths, 0.5, 1)]

    heard = []
    stops = {
        "record": dln.Record(
            callback=(lambda step, loss: heard.append(step) or step == 4) if rank == 1 else None
        )
    }
    run = train_sharded(
        problem, shards(), learning_rate=0.01, steps=20, **with_record(stops, every=2, singular_values=None)
    )
    assert run.outcome == "stopped"
    assert run.steps.tolist() == [0, 2, 4]
    assert heard == ([0, 2, 4] if rank == 1 else [])

    def fails(step, loss):
        if rank == 1 and step == 3:
            raise KeyError("mine")

    kind, text = (KeyError, "mine") if rank == 1 else (RuntimeError, "another process raised at step 3")
    with pytest.raises(kind, match=text) as raised:
        train_sharded(
            problem,
            shards(),
            learning_rate=0.01,
            steps=20,
            record=dln.Record(callback=fails, singular_values=None),
        )
    assert len(raised.value.trajectory.loss) == 4


def case_errors_of_one_are_errors_of_all():
    rank = dist.get_rank()
    widths = [4, 9, 3]
    problem, weights = draw_problem(widths, seed=1), dln.gaussian(widths, 0.5, 1)

    def raises(mine, text, call):
        """Expect the error itself on process 1, and on the others one that quotes it."""
        with pytest.raises(mine if rank == 1 else RuntimeError, match=text):
            call()

    raises(TypeError, "wanted a tensor", lambda: RowSharded("rows" if rank == 1 else torch.zeros(2, 2)))
    raises(dln.ShapeError, "wanted a matrix", lambda: RowSharded(torch.zeros((2,) if rank == 1 else (2, 2))))

    def unreadable(start, stop):
        if rank == 1:
            raise OSError("no such disk")
        return np.zeros((stop - start, 3))

    raises(OSError, "no such disk", lambda: RowSharded.from_rows(unreadable, (8, 3)))

    shards = [cut(w) for w in weights]
    options = {"learning_rate": 0.01, "steps": 2}
    wrong = options | ({"steps": -1} if rank == 1 else {})
    raises(ValueError, "steps is -1", lambda: train_sharded(problem, shards, **wrong))
    if rank == 1:
        shards[1] = RowSharded(torch.full_like(shards[1].rows, torch.nan))
    else:
        shards[1] = RowSharded(shards[1].rows)
    if min(shards[1].counts) > 0:
        raises(ValueError, r"W_2.* not finite", lambda: train_sharded(problem, shards, **options))

    # Different arguments are an error on all processes.
    with pytest.raises(ValueError, match="steps is"):
        train_sharded(problem, [cut(w) for w in weights], learning_rate=0.01, steps=2 + rank)
    with pytest.raises(dln.ShapeError, match="columns is"):
        RowSharded(torch.zeros(2, 2 + rank))
    with pytest.raises(TypeError, match="dtype is"):
        RowSharded(torch.zeros(2, 2, dtype=torch.float64 if rank else torch.float32))
    with pytest.raises(dln.ShapeError, match="empty on all"):
        RowSharded(torch.zeros(0, 2))


def case_distributed_tensors():
    dtensor = pytest.importorskip("torch.distributed.tensor")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    matrix = torch.arange(35.0, dtype=torch.float64).reshape(7, 5)
    distributed = dtensor.distribute_tensor(matrix, mesh, [dtensor.Shard(0)])
    shard = RowSharded.from_dtensor(distributed)
    assert np.array_equal(whole(shard), matrix.numpy())
    assert shard.rows.data_ptr() == distributed.to_local().data_ptr()
    for placement in (dtensor.Replicate(), dtensor.Shard(1)):
        with pytest.raises(ValueError, match=r"wanted \(Shard"):
            RowSharded.from_dtensor(dtensor.distribute_tensor(matrix, mesh, [placement]))
    with pytest.raises(TypeError, match="wanted a DTensor"):
        RowSharded.from_dtensor(matrix)
    with pytest.raises(TypeError, match="from_dtensor"):
        RowSharded(distributed)


def case_parameters_under_fsdp():
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        return
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 160), torch.nn.Tanh(), torch.nn.Linear(160, 150)).double()
    fsdp.fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = dln.SVDTracker(k=2)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(4, 6, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        shard = RowSharded.from_dtensor(model[2].weight)
        found = tracker.update(shard, squared_norm=shard.squared_norm())
        exact = np.linalg.svd(whole(shard), compute_uv=False)[:2]
        assert np.all(np.abs(found.singular_values - exact) <= found.errors)
        assert_same_bits(found.singular_values, found.errors)

    # The parameters are trained in place.
    net = torch.nn.Sequential(torch.nn.Linear(3, 20, bias=False), torch.nn.Linear(20, 4, bias=False)).double()
    start = [layer.weight.detach().numpy().copy() for layer in net]
    fsdp.fully_shard(net, mesh=mesh)
    problem = draw_problem([3, 20, 4], seed=1)
    train_sharded(
        problem, [RowSharded.from_dtensor(layer.weight) for layer in net], learning_rate=0.1, steps=9
    )
    expected = dln.train(problem, start, engine="dense", learning_rate=0.1, steps=9)
    for layer, weight in zip(net, expected.all_weights(), strict=True):
        moved = layer.weight.full_tensor().detach().numpy()
        assert np.linalg.norm(moved - weight) <= tolerance(F64, 20, 9) * np.linalg.norm(weight)


def case_groups():
    size, rank = dist.get_world_size(), dist.get_rank()
    group = dist.new_group([size - 2, size - 1])
    alone = dist.new_group([0])
    if rank == 0:
        shard = RowSharded(torch.ones(3, 2), group=alone)
        assert shard.shape == (3, 2)
    if rank >= size - 2:
        W = np.random.default_rng(1).standard_normal((12, 9))
        shard = RowSharded.from_rows(W, group=group)
        assert shard.counts == [6, 6]
        problem = draw_problem([9, 12], seed=1)
        run = train_sharded(problem, [shard], learning_rate=0.1, steps=3)
        wanted = dln.train(problem, [W], engine="dense", learning_rate=0.1, steps=3)
        assert np.abs(run.loss - wanted.loss).max() <= tolerance(F64, 12, 3) * wanted.loss[0]
    else:
        with pytest.raises(ValueError, match="does not hold this process"):
            RowSharded(torch.ones(3, 2), group=group)


def case_a_missing_process_is_detected():
    """Process 0 does not take part: it waits for the others at the end of the case."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=3))
    shard = RowSharded(torch.ones(3, 2))
    shard.peers = Peers(group)
    if dist.get_rank() > 0:
        with pytest.raises(RuntimeError):
            shard.rmatmat(np.ones((shard.shape[0], 1)))


class Stop(Exception):
    """Ends a run at some step, so that it can be resumed."""


def stop_at(step):
    def callback(now, loss):
        if now >= step:
            raise Stop

    return callback


CHECKPOINTED = {
    "learning_rate": [0.05, 0.04, 0.03],
    "weight_decay": 0.01,
    "momentum": [0.5, 0.0, 0.3],
    "steps": 23,
    "record": dln.Record(every=5, singular_values=2, vectors=True),
}


def assert_resumed(run, wanted, shards, finals):
    """Compare with an uninterrupted run: the same bits, but for the tracker, which restarts."""
    assert run.loss.tobytes() == wanted.loss.tobytes()
    assert run.steps.tolist() == wanted.steps.tolist()
    assert run.config == wanted.config
    for shard, final in zip(shards, finals, strict=True):
        assert np.array_equal(shard.rows.numpy(), final)
    for layer in range(1, run.n_layers + 1):
        off = np.abs(run.singular_values(layer) - wanted.singular_values(layer))
        slack = run.singular_value_errors(layer) + wanted.singular_value_errors(layer)
        assert np.all(off <= slack)
        assert run.states.left[layer - 1].shape == wanted.states.left[layer - 1].shape


def case_checkpointed_runs_resume():
    size, rank = dist.get_world_size(), dist.get_rank()
    shared = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(shared)
    widths = [5, 30, 20, 4]
    problem, weights = draw_problem(widths, seed=2, white=False), dln.gaussian(widths, 0.5, 2)

    def train(name, **record):
        shards = [RowSharded.from_rows(w) for w in weights]
        storage = Checkpoint(Path(shared[0]) / name, every=4, seconds=0)
        options = with_record(CHECKPOINTED, **record)
        return train_sharded(problem, shards, checkpoint=storage, **options), shards

    shards = [RowSharded.from_rows(w) for w in weights]
    wanted = train_sharded(problem, shards, **CHECKPOINTED)
    finals = [shard.rows.numpy().copy() for shard in shards]
    own = Path(shared[0]) / "run" / f"process-{rank:05d}"
    with pytest.raises((Stop, RuntimeError)):
        train("run", callback=stop_at(15) if rank == size - 1 else None)
    # As if the last process had been killed before it wrote the newest state.
    states = sorted(own.glob("state-*.npz"))
    assert [path.name[-7:-4] for path in states] == ["008", "012"]
    if rank == size - 1:
        states[-1].unlink()
    run, shards = train("run")
    assert_resumed(run, wanted, shards, finals)
    # The finished run is loaded; a process that could not write its end computes it again with the others.
    modified = (own / "end.json").stat().st_mtime_ns
    run, shards = train("run")
    assert_resumed(run, wanted, shards, finals)
    assert (own / "end.json").stat().st_mtime_ns == modified
    dist.barrier()
    if rank == 0:
        (own / "end.json").unlink()
        sorted(own.glob("state-*.npz"))[-1].unlink()
    dist.barrier()
    run, shards = train("run")
    assert_resumed(run, wanted, shards, finals)
    # An error of one process is an error of all.
    if rank == 0:
        (Path(shared[0]) / "other" / "process-00000").mkdir(parents=True)
        (Path(shared[0]) / "other" / "process-00000" / "state-1.npz").write_bytes(b"")
    dist.barrier()
    with pytest.raises(ValueError if rank == 0 else RuntimeError, match=r"no run\.npz"):
        train("other")
    with pytest.raises(ValueError, match="holds another run") as caught:
        train_sharded(
            problem,
            [RowSharded.from_rows(w) for w in weights],
            **CHECKPOINTED | {"steps": 9},
            checkpoint=own.parent,
        )
    assert "another run" in str(caught.value)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(shared[0])


CASES = {name.removeprefix("case_"): case for name, case in globals().items() if name.startswith("case_")}


def work(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    found = {}
    for name, case in CASES.items():
        try:
            case()
            found[name] = ""
        except pytest.skip.Exception as reason:
            found[name] = f"skipped: {reason}"
        except BaseException:
            found[name] = traceback.format_exc()
        answers = [None] * size
        dist.all_gather_object(answers, found[name])
        if rank == 0:
            with open(folder / "found.json", "w") as file:
                found[name] = next((each for each in answers if each), "")
                json.dump(found, file)
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3], ids=["two", "three"])
def found(request, tmp_path_factory):
    """Return the results of the cases by name: an empty string, or the error of a process."""
    folder = tmp_path_factory.mktemp("processes")
    crash = ""
    try:
        torch.multiprocessing.spawn(work, (request.param, folder), request.param)
    except Exception as error:
        crash = str(error)
    results = json.loads((folder / "found.json").read_text()) if (folder / "found.json").exists() else {}
    return {name: results.get(name, f"not run: {crash}") for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_processes_agree(found, case):
    if found[case].startswith("skipped"):
        pytest.skip(found[case])
    assert not found[case], found[case]


# One process without a process group.


def test_one_process_needs_no_group(tmp_path):
    widths = [5, 30, 20, 4]
    problem, weights = draw_problem(widths, seed=2, white=False), dln.gaussian(widths, 0.5, 2)
    wanted = dln.train(problem, weights, engine="dense", learning_rate=0.05, steps=20, weight_decay=0.01)
    shards = [RowSharded.from_rows(w) for w in weights]
    run = train_sharded(
        problem,
        shards,
        learning_rate=0.05,
        steps=20,
        weight_decay=0.01,
        record=dln.Record(singular_values=2, vectors=True),
    )
    assert np.abs(run.loss - wanted.loss).max() <= tolerance(F64, 30, 20) * wanted.loss[0]
    for shard, weight in zip(shards, wanted.all_weights(), strict=True):
        assert np.linalg.norm(shard.rows.numpy() - weight) <= tolerance(F64, 30, 20) * np.linalg.norm(weight)
    assert run.engine == run.config["engine"] == "sharded"
    assert run.widths == widths
    assert "on one process" in run.certificate.reason
    run.save(tmp_path / "run.npz")
    again = dln.load(tmp_path / "run.npz")
    assert again.engine == "sharded"
    for a, b in zip(recorded(again), recorded(run), strict=True):
        assert np.array_equal(a, b, equal_nan=True)
    with pytest.raises(ValueError, match="the weights were recorded at"):
        run.weights(1)


@pytest.mark.parametrize("cut", [0, 5, 11, 20])
def test_a_checkpointed_run_resumes(cut, tmp_path):
    widths = [5, 30, 20, 4]
    problem, weights = draw_problem(widths, seed=2, white=False), dln.gaussian(widths, 0.5, 2)

    def train(checkpoint=None, **record):
        shards = [RowSharded.from_rows(w) for w in weights]
        options = with_record(CHECKPOINTED, **record)
        run = train_sharded(problem, shards, checkpoint=checkpoint, **options)
        return run, shards

    wanted, shards = train()
    finals = [shard.rows.numpy().copy() for shard in shards]
    storage = Checkpoint(tmp_path / "run", every=3, seconds=0)
    with pytest.raises(Stop) as caught:
        train(checkpoint=storage, callback=stop_at(cut))
    n_losses = len(caught.value.trajectory.loss)
    np.testing.assert_array_equal(caught.value.trajectory.loss, wanted.loss[:n_losses])
    seen = []
    run, shards = train(checkpoint=storage, callback=lambda step, loss: seen.append(step))
    assert_resumed(run, wanted, shards, finals)
    assert seen == wanted.steps.tolist()
    run, shards = train(checkpoint=storage)
    assert_resumed(run, wanted, shards, finals)
    with pytest.raises(ValueError, match="its format is 'dlnfast sharded run'"):
        dln.load(tmp_path / "run" / "process-00000")


def test_a_checkpointed_run_that_diverges_is_read_again(tmp_path):
    problem, weights = draw_problem([5, 6, 4], seed=2), dln.gaussian([5, 6, 4], 0.5, 2)
    steps = []
    for _ in range(2):
        with pytest.raises(dln.DivergedError, match="lower learning_rate") as caught:
            train_sharded(
                problem,
                [RowSharded.from_rows(w) for w in weights],
                learning_rate=1e6,
                steps=50,
                checkpoint=tmp_path,
            )
        steps.append((caught.value.step, len(caught.value.trajectory.loss)))
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"weights": []}, dln.ShapeError, "weights is empty"),
        ({"weights": [np.ones((3, 4))]}, TypeError, r"weights\[0\] .* wanted a RowSharded"),
        ({"problem": "problem"}, TypeError, "wanted a dlnfast.Problem"),
        ({"problem": draw_problem([5, 4])}, dln.ShapeError, "wanted 5 columns, problem.dim_in"),
        ({"problem": draw_problem([4, 5])}, dln.ShapeError, "has 3 rows; wanted 5, problem.dim_out"),
        ({"learning_rate": "adaptive"}, TypeError, "wanted numbers"),
        ({"learning_rate": dln.Adaptive()}, TypeError, "wanted numbers"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate"),
        ({"momentum": 1.0}, ValueError, "momentum"),
        ({"record": dln.Record(singular_values="all")}, TypeError, "wanted a number or None"),
        (
            {"record": dln.Record(vectors=True, singular_values=None)},
            ValueError,
            "singular_values asks for none",
        ),
        ({"record": dln.Record(callback=3)}, TypeError, "callable"),
    ],
)
def test_errors_name_the_invalid_argument(change, error, match):
    shards = [RowSharded.from_rows(w) for w in dln.gaussian([4, 6, 3], 1.0, 0)]
    arguments = {
        "problem": draw_problem([4, 3]),
        "weights": shards,
        "learning_rate": 0.1,
        "steps": 2,
    } | change
    with pytest.raises(error, match=match):
        train_sharded(**arguments)


def test_errors_name_invalid_rows():
    with pytest.raises(TypeError, match="wanted a tensor"):
        RowSharded(np.ones((2, 2)))
    with pytest.raises(TypeError, match=r"torch\.int64"):
        RowSharded(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(dln.ShapeError, match="wanted a matrix"):
        RowSharded(torch.ones(2))
    with pytest.raises(ValueError, match="init_process_group"):
        RowSharded(torch.ones(2, 2), group=object())
    with pytest.raises(TypeError, match="wanted the shape"):
        RowSharded.from_rows(lambda start, stop: np.ones((stop - start, 2)))
    with pytest.raises(dln.ShapeError, match=r"wanted \(4, 2\)"):
        RowSharded.from_rows(lambda start, stop: np.ones((1, 2)), (4, 2))
    with pytest.raises(dln.ShapeError, match="wanted a matrix"):
        RowSharded.from_rows(np.ones(3))


def test_rows_from_a_source_do_not_share_its_memory(tmp_path):
    expected = np.random.default_rng(0).standard_normal((9, 5))
    file = np.memmap(tmp_path / "rows", dtype=F64, mode="w+", shape=(9, 5))
    file[:] = expected
    file.flush()
    read_only = np.memmap(tmp_path / "rows", dtype=F64, mode="r", shape=(9, 5))
    mine, tensor = expected.copy(), torch.tensor(expected)
    flipped = np.ascontiguousarray(expected[::-1])[::-1]
    for source in (read_only, mine, tensor, lambda start, stop: mine[start:stop], flipped, mine.T.copy().T):
        shard = RowSharded.from_rows(source, (9, 5))
        assert np.array_equal(shard.rows.numpy(), expected)
        shard.rows.zero_()
        for untouched in (read_only, mine, tensor.numpy(), flipped):
            assert np.array_equal(untouched, expected)
    fresh = expected.copy()  # made by the function, so not copied
    shard = RowSharded.from_rows(lambda start, stop: fresh, (9, 5))
    assert shard.rows.data_ptr() == fresh.ctypes.data
    assert np.array_equal(RowSharded.from_rows(expected.astype(">f8")).rows.numpy(), expected)


def test_half_precisions_are_read_as_float32():
    W = torch.randn(140, 150, generator=torch.Generator().manual_seed(0)).bfloat16()
    shard = RowSharded(W)
    found = dln.SVDTracker(k=2).update(shard, squared_norm=shard.squared_norm())
    exact = np.linalg.svd(W.float().numpy(), compute_uv=False)[:2]
    assert shard.dtype == F32
    assert np.all(np.abs(found.singular_values - exact) <= found.errors + tolerance(F32, 150) * exact[0])
