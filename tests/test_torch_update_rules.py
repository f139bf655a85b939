# SPDX-License-Identifier: MIT
"""Schedules and update rules of the torch engine: steps of the dense engine and of PyTorch's optimizers."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.interruption import StopTraining, stop_at
from tolerances import tolerance

import dlnfast as dln
from dlnfast.optimizers import Adam, AdamW, Muon, Nesterov, Shampoo, SpectralSign

torch = pytest.importorskip("torch")

F64 = np.dtype(np.float64)
RULES = {
    "gd": ("gd", 0.3, 1.0),
    "nesterov": (Nesterov(0.8), 0.05, 1.0),
    "muon": (Muon(), 0.003, 3.4445**5),
    "muon-polar": (Muon(method="polar"), 0.003, 1e6),
    "spectral-sign": (SpectralSign(0.9), 0.003, 1e6),
    "shampoo": (Shampoo(epsilon=1e-2, momentum=0.5), 0.02, 100.0),
}


def network(widths=(9, 12, 7, 5)):
    target = np.random.default_rng(0).standard_normal((widths[-1], widths[0]))
    return dln.Problem(target, loss_scale=0.1), dln.gaussian(widths, 0.5, seed=0)


def relative_difference(weights, others):
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(weights, others, strict=True))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("widths", [(9, 12, 7, 5), (6, 6), (40, 50, 40)])
def test_rules_and_schedules_are_those_of_the_dense_engine(name, widths):
    problem, weights = network(widths)
    rule, rate, factor = RULES[name]
    steps = 30
    options = {
        "learning_rate": dln.Schedule.cosine(rate, steps, warmup=5),
        "weight_decay": dln.Schedule.piecewise({0: 0.0, 10: 0.05}),
        "steps": steps,
        "optimizer": rule,
    }
    runs = [dln.train(problem, weights, engine=engine, **options) for engine in ("torch:cpu", "dense")]
    allowed = tolerance(F64, max(widths), steps) * factor
    assert relative_difference(runs[0].all_weights(), runs[1].all_weights()) <= allowed
    np.testing.assert_allclose(runs[0].loss, runs[1].loss, rtol=0, atol=allowed * runs[0].loss[0])
    for layer in range(1, len(widths)):
        np.testing.assert_allclose(
            runs[0].singular_values(layer), runs[1].singular_values(layer), atol=1e-9 + allowed * 10
        )


def test_momentum_of_a_schedule_is_that_of_the_dense_engine():
    problem, weights = network()
    rates = {"learning_rate": 0.2, "momentum": dln.Schedule(np.linspace(0, 0.9, 40)), "steps": 40}
    runs = [dln.train(problem, weights, engine=engine, **rates) for engine in ("torch:cpu", "dense")]
    allowed = tolerance(F64, 12, 40)
    assert relative_difference(runs[0].all_weights(), runs[1].all_weights()) <= allowed


@pytest.mark.parametrize(
    ("rule", "make"), [("adam", "Adam"), ("adamw", "AdamW"), (Adam((0.8, 0.9), 1e-3), "Adam")]
)
def test_adam_is_the_one_of_pytorch(rule, make):
    problem, weights = network()
    layers = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
    settings = {"betas": rule.betas, "eps": rule.epsilon} if isinstance(rule, Adam) else {}
    optimizer = getattr(torch.optim, make)(layers, lr=0.01, weight_decay=0.1, **settings)
    target = torch.tensor(problem.target)
    for _ in range(40):
        optimizer.zero_grad()
        product = layers[2] @ layers[1] @ layers[0]
        (problem.loss_scale / 2 * (product - target).square().sum()).backward()
        optimizer.step()
    run = dln.train(
        problem, weights, learning_rate=0.01, weight_decay=0.1, steps=40, optimizer=rule, engine="torch:cpu"
    )
    # Where a gradient is nearly zero Adam divides rounding errors by the root of its second moment.
    assert relative_difference(run.all_weights(), [p.detach().numpy() for p in layers]) < 1e-10


@pytest.mark.parametrize("rule", ["adam", AdamW(), "muon", "nesterov", "shampoo", "gd"])
def test_interrupted_runs_resume_bit_for_bit(rule, tmp_path):
    problem, weights = network()
    options = {
        "learning_rate": dln.Schedule.cosine(0.01, 40),
        "weight_decay": 0.01,
        "optimizer": rule,
        "engine": "torch:cpu",
        "steps": 40,
        "n_threads": 1,
    }
    whole = dln.train(problem, weights, **options)

    folder = dln.Checkpoint(tmp_path / "run", every=5)
    with pytest.raises(StopTraining):
        dln.train(problem, weights, **options, checkpoint=folder, record=dln.Record(callback=stop_at(17)))
    resumed = dln.resume(tmp_path / "run")
    np.testing.assert_array_equal(whole.loss, resumed.loss)
    for a, b in zip(whole.all_weights(), resumed.all_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_adam_is_tracked_and_leaves_the_subspaces():
    problem = dln.low_rank_recovery(20, 2, seed=0)
    weights = dln.orthogonal([20] * 4, 0.5, seed=0)
    space = dln.closure(problem, weights)
    run = dln.train(
        problem, weights, learning_rate=0.01, steps=50, optimizer=AdamW(), engine="torch:cpu",
        record=dln.Record(vectors=True),
    )  # fmt: skip
    first = run.all_weights()[0]
    kept = space.bases[1] @ (space.bases[1].T @ first) @ space.bases[0]
    assert np.linalg.norm(first @ space.bases[0] - kept) > 0.05 * np.linalg.norm(first)
    np.testing.assert_allclose(run.singular_values(1)[-1], np.linalg.svd(first, compute_uv=False), atol=1e-12)
    assert run.config["optimizer"]["name"] == "adamw"


def test_sharded_training_has_constant_rates():
    problem, weights = network()
    shards = [dln.torch.RowSharded(torch.tensor(w)) for w in weights]
    for options, message in (
        ({"learning_rate": dln.Schedule([0.1] * 3)}, "learning_rate is Schedule.values.*; wanted one number"),
        ({"learning_rate": 0.1, "momentum": dln.Schedule([0.1] * 3)}, "momentum is Schedule.*constant rates"),
    ):
        with pytest.raises(TypeError, match=message):
            dln.torch.train_sharded(
                problem, shards, steps=3, record=dln.Record(singular_values=None), **options
            )
