# SPDX-License-Identifier: MIT
"""Schedules and update rules: reduced engine, dense engine and plain NumPy take the same steps."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from helpers.interruption import StopTraining, stop_at
from helpers.problems import draw_low_rank_target
from tolerances import tolerance

import dlnfast as dln
from dlnfast import reference
from dlnfast._config import spec
from dlnfast._support.progress import ProgressBar
from dlnfast._training.engines import resolve
from dlnfast._training.jobs import Outputs, core_arguments
from dlnfast._training.options import Options
from dlnfast._training.rules import direction_scales, rank_tolerance
from dlnfast.optimizers import (
    Muon,
    Nesterov,
    Optimizer,
    Shampoo,
    SpectralSign,
    optimizer_from,
)

F64 = np.dtype(np.float64)
STEPS = 500
COEFFICIENTS = (3.4445, -4.775, 2.0315)


def square(depth):
    return dln.low_rank_recovery(12, 2, seed=1), dln.orthogonal([12] * (depth + 1), 0.7, seed=2)


def wide(depth):
    return dln.classification(3, 4), dln.orthogonal([12] * depth + [3], 0.7, seed=2)


def spiked(depth):
    spike = np.random.default_rng(1).standard_normal((12, 1)) / 3
    gram = np.eye(12) + spike @ spike.T
    target = draw_low_rank_target(12, 12, rank=2).dense() @ gram
    return dln.Problem(target, gram, loss_scale=0.05), dln.orthogonal([12] * (depth + 1), 0.7, seed=2)


def narrow_inputs(depth):
    target = draw_low_rank_target(14, 9, rank=2).dense()
    return dln.Problem(target, loss_scale=0.05), dln.orthogonal([9] + [14] * depth, 0.7, seed=2)


def aligned(depth):
    problem = dln.low_rank_recovery(12, 2, seed=1)
    return problem, dln.aligned(problem, [12] * (depth + 1), 0.7, seed=2)


SETTINGS = {each.__name__: each for each in (square, wide, spiked, narrow_inputs, aligned)}
#: Rules, with a learning rate at which they descend.
RULES: dict[str, tuple[Optimizer, float]] = {
    "nesterov": (Nesterov(0.8), 0.05),
    "muon": (Muon(), 0.003),
    "muon-polar": (Muon(method="polar", scale="match_rms_adamw"), 0.003),
    "muon-plain": (Muon(nesterov=False, scale=None), 0.003),
    "shampoo": (Shampoo(epsilon=1e-2), 0.02),
    "shampoo-forgets": (Shampoo(epsilon=1e-2, decay=0.95, momentum=0.5), 0.003),
}


def rule_in_numpy(optimizer, widths):
    """Return the rule of each layer in plain NumPy."""
    if isinstance(optimizer, Nesterov):
        return [reference.nesterov] * (len(widths) - 1)
    if isinstance(optimizer, Shampoo):
        rule = reference.shampoo(epsilon=optimizer.epsilon, decay_of_factors=optimizer.decay)
        return [rule] * (len(widths) - 1)

    def orthogonalize(matrix):
        if optimizer.method == "polar":
            return reference.polar_factor(matrix, rank_tolerance(optimizer, F64))
        return reference.newton_schulz(matrix, COEFFICIENTS, 5, optimizer.epsilon)

    return [
        reference.muon(orthogonalize, looks_ahead=optimizer.nesterov, scale=scale)
        for scale in direction_scales(optimizer, widths)
    ]


def run_in_numpy(problem, weights, optimizer, rates, decays, momenta, steps):
    """Return losses and the weights at the end, layer by layer as `reference.train_dense`."""
    widths = [weights[0].shape[1], *(w.shape[0] for w in weights)]
    rules = iter(itertools.cycle(rule_in_numpy(optimizer, widths)))

    def rule(*arguments):
        return next(rules)(*arguments)

    runs = list(
        reference.train_dense(
            weights,
            np.asarray(problem.target if isinstance(problem.target, np.ndarray) else problem.target.dense()),
            input_gram=problem.input_gram,
            loss_scale=problem.loss_scale,
            learning_rate=rates,
            steps=steps,
            weight_decay=decays,
            momentum=momenta,
            rule=rule,
        )
    )
    return np.array([loss for loss, _ in runs]), runs[-1][1]


def relative_difference(weights, others):
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(weights, others, strict=True))


def run_everywhere(setting, depth, optimizer, peak, steps):
    """Return the final weights of both engines and of NumPy, and the losses of all three."""
    problem, weights = SETTINGS[setting](depth)
    rate = dln.Schedule(dln.Schedule.cosine(peak, STEPS, warmup=20, final=peak / 100).values(steps))
    decay = dln.Schedule.piecewise({0: 0.0, 100: 0.02})
    options = {"learning_rate": rate, "weight_decay": decay, "optimizer": optimizer, "steps": steps}
    record = dln.Record(every=50, singular_values=None)
    runs = [dln.train(problem, weights, engine=e, record=record, **options) for e in ("reduced", "dense")]
    table = [rate.values(steps), decay.values(steps), np.full(steps, optimizer.momentum)]
    losses, end = run_in_numpy(
        problem, weights, optimizer, *(np.tile(t[:, None], depth) for t in table), steps=steps
    )
    return runs, losses, end


@pytest.mark.parametrize("depth", [2, 3, 4, 5])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", [name for name in RULES if name != "muon-polar"])
def test_engines_and_numpy_take_the_same_steps(name, setting, depth):
    optimizer, peak = RULES[name]
    runs, losses, end = run_everywhere(setting, depth, optimizer, peak, STEPS)
    assert losses[-1] < 0.9 * losses[0]  # it learned something
    allowed = 1e-12 * conditioning(optimizer)
    for run in runs:
        assert relative_difference(run.all_weights(), end) <= allowed
        np.testing.assert_allclose(run.loss, losses, rtol=0, atol=allowed * losses[0])


@pytest.mark.parametrize("depth", [2, 3, 4, 5])
@pytest.mark.parametrize("setting", SETTINGS)
def test_exact_polar_factors_agree_as_far_as_their_conditioning_allows(setting, depth, monkeypatch):
    """A polar factor divides rounding errors by its smallest singular value, here at every step anew."""
    optimizer, peak = RULES["muon-polar"]
    smallest = []
    exact = reference.polar_factor

    def measure(matrix, tolerance_of_rank):
        values = np.linalg.svd(matrix, compute_uv=False)
        smallest.append(values[values > tolerance_of_rank * values[0]].min() / values[0])
        return exact(matrix, tolerance_of_rank)

    monkeypatch.setattr(reference, "polar_factor", measure)
    steps = 12
    runs, _, end = run_everywhere(setting, depth, optimizer, peak, steps)
    allowed = tolerance(F64, 14, steps) / min(smallest)
    for run in runs:
        assert relative_difference(run.all_weights(), end) <= allowed


def conditioning(optimizer):
    """Return how much a rule may amplify rounding errors, beyond those of gradient descent.

    Shampoo that forgets has factors that become as small as the squares of recent gradients, and divides by
    their square roots.
    """
    return 100.0 if isinstance(optimizer, Shampoo) and optimizer.decay < 1 else 1.0


@pytest.mark.parametrize("engine", ["reduced", "dense"])
@pytest.mark.parametrize("depth", [2, 3])
def test_scheduled_gradient_descent_is_that_of_numpy(engine, depth):
    problem, weights = square(depth)
    steps = 200
    rates = np.random.default_rng(0).uniform(0.0, 0.5, (steps, depth))
    momenta = np.linspace(0.0, 0.9, steps)
    decays = 0.01 * np.arange(steps) / steps
    run = dln.train(
        problem,
        weights,
        learning_rate=dln.Schedule(rates),
        weight_decay=dln.Schedule(decays),
        momentum=dln.Schedule(momenta),
        steps=steps,
        engine=engine,
    )
    wanted = list(
        reference.train_dense(
            weights,
            problem.target.dense(),
            loss_scale=problem.loss_scale,
            learning_rate=rates,
            steps=steps,
            weight_decay=np.tile(decays[:, None], depth),
            momentum=np.tile(momenta[:, None], depth),
        )
    )
    allowed = tolerance(F64, 12, steps)
    assert relative_difference(run.all_weights(), wanted[-1][1]) <= allowed
    np.testing.assert_allclose(run.loss, [loss for loss, _ in wanted], rtol=0, atol=allowed * run.loss[0])


@pytest.mark.parametrize("dim", [12, 40, 150])
def test_layers_of_rate_zero_at_some_steps_keep_their_velocity(dim):
    """With rate 0 the velocity still changes; with rate 0 at all steps a layer is never written."""
    problem = dln.low_rank_recovery(dim, 2, seed=0)
    weights = dln.orthogonal([dim] * 3, 0.9, seed=0)
    rates = np.tile([[0.1, 0.0], [0.0, 0.0]], (5, 1))
    run = dln.train(
        problem, weights, learning_rate=dln.Schedule(rates), momentum=0.9, steps=10, engine="dense"
    )
    wanted = list(
        reference.train_dense(
            weights,
            problem.target.dense(),
            loss_scale=problem.loss_scale,
            learning_rate=rates,
            steps=10,
            weight_decay=[0.0, 0.0],
            momentum=[0.9, 0.9],
        )
    )[-1][1]
    assert relative_difference(run.all_weights(), wanted) <= tolerance(F64, dim, 10)
    np.testing.assert_array_equal(run.all_weights()[1], weights[1])


@pytest.mark.parametrize("dim", [12, 40])
@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_a_cosine_equals_a_loop_of_single_steps_bit_for_bit(engine, dim):
    """Each step of the loop is a call of the core of its own, with one constant rate."""
    problem = dln.low_rank_recovery(dim, 2, seed=1)
    weights = dln.orthogonal([dim] * 4, 0.7, seed=2)
    rate = dln.Schedule.cosine(0.5, 50, warmup=5)
    record = dln.Record(singular_values=None)
    options = {"momentum": 0.9, "engine": engine, "steps": 50, "n_threads": 1, "record": record}
    whole = dln.train(problem, weights, learning_rate=rate, **options)

    chosen = Options(learning_rate=0.0, **options).checked()
    chosen_engine, request, _ = resolve(chosen, problem, weights)
    request = replace(request, flush_every=1)  # the state is kept between calls
    job, losses = chosen_engine.prepare(request), []
    for step, eta in enumerate(rate.values(50)):
        outputs = Outputs(request)
        arguments = core_arguments(request, outputs, ProgressBar(0, False), None, lambda step: None)
        job.run({**arguments, "learning_rate": [eta] * 3, "first": step, "steps": step + 1})
        losses.append(outputs.loss[0])
    np.testing.assert_array_equal(whole.loss[:-1], losses)
    last = job.cores if engine == "reduced" else job.weights
    wanted = whole.states.cores if engine == "reduced" else None
    for i, end in enumerate(last):
        np.testing.assert_array_equal(end, wanted[i][-1] if wanted else whole.all_weights()[i])


@pytest.mark.parametrize("engine", ["reduced", "dense"])
@pytest.mark.parametrize("name", [*RULES, "gd"])
def test_interrupted_runs_resume_bit_for_bit(name, engine, tmp_path):
    problem, weights = square(3)
    optimizer, rate = RULES.get(name, ("gd", 0.3))
    rates = {"learning_rate": dln.Schedule.cosine(rate, 40), "weight_decay": 0.01}
    options = {**rates, "optimizer": optimizer, "engine": engine}
    whole = dln.train(problem, weights, steps=40, n_threads=1, **options)

    folder = dln.Checkpoint(tmp_path / "run", every=5)
    with pytest.raises(StopTraining):
        dln.train(
            problem, weights, steps=40, n_threads=1, **options, checkpoint=folder,
            record=dln.Record(callback=stop_at(17)),
        )  # fmt: skip
    resumed = dln.resume(tmp_path / "run")
    np.testing.assert_array_equal(whole.loss, resumed.loss)
    for a, b in zip(whole.all_weights(), resumed.all_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", RULES)
def test_float32_follows_float64(name):
    problem, weights = square(3)
    optimizer, rate = RULES[name]
    runs = [
        dln.train(problem, w, learning_rate=rate, steps=30, optimizer=optimizer, engine="dense")
        for w in (weights, [w.astype(np.float32) for w in weights])
    ]
    # A polar factor divides rounding errors by its smallest singular value, 3.5e-4 of the largest at least.
    is_polar = isinstance(optimizer, Muon) and optimizer.method == "polar"
    allowed = tolerance(np.float32, 12, 30) * conditioning(optimizer) / (3.5e-4 if is_polar else 1.0)
    assert relative_difference(runs[1].all_weights(), runs[0].all_weights()) <= allowed


@pytest.mark.parametrize("dim", [1, 2, 7, 33, 64])
def test_muon_of_odd_sizes(dim):
    problem = dln.low_rank_recovery(dim, 1, seed=0)
    weights = dln.orthogonal([dim] * 3, 0.5, seed=0)
    for optimizer in (Muon(), Muon(method="polar")):
        run = dln.train(problem, weights, learning_rate=0.01, steps=20, optimizer=optimizer, engine="dense")
        _, end = run_in_numpy(problem, weights, optimizer, [0.01] * 2, [0.0] * 2, [0.95] * 2, 20)
        assert relative_difference(run.all_weights(), end) <= 1e-9


def test_spectral_sign_moves_every_singular_value_that_counts_by_the_rate():
    """From zero gradient on the complement nothing moves there; elsewhere by exactly eta per step."""
    problem, weights = wide(2)
    run = dln.train(problem, weights, learning_rate=0.01, steps=1, optimizer="spectral-sign", engine="dense")
    for w0, w1 in zip(weights, run.all_weights(), strict=True):
        moved = np.linalg.svd(w1 - w0, compute_uv=False) / 0.01
        assert np.all((np.abs(moved - 1) < 1e-9) | (moved < 1e-9))
        assert 0 < np.sum(moved > 0.5) <= 3


def test_the_complement_of_a_wide_network_has_no_gradient():
    """Directions that end at a hidden layer only decay, whatever the rule does to the others."""
    problem, weights = wide(3)
    run = dln.train(
        problem, weights, learning_rate=0.01, weight_decay=0.1, steps=50, optimizer=Muon(), engine="reduced"
    )
    np.testing.assert_allclose(run.rho(1)[-1], 0.7 * (1 - 0.01 * 0.1) ** 50, rtol=1e-12)


def test_muon_is_the_one_of_pytorch():
    torch = pytest.importorskip("torch")
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    problem, weights = square(2)
    layers = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
    optimizer = torch.optim.Muon(layers, lr=0.02, weight_decay=0.1, momentum=0.95)
    target = torch.tensor(problem.target.dense())
    for _ in range(10):
        optimizer.zero_grad()
        loss = problem.loss_scale / 2 * (layers[1] @ layers[0] - target).square().sum()
        loss.backward()
        optimizer.step()
    run = dln.train(problem, weights, learning_rate=0.02, weight_decay=0.1, steps=10, optimizer="muon")
    moved = [w - w0 for w, w0 in zip(run.all_weights(), weights, strict=True)]
    other = [p.detach().numpy() - w0 for p, w0 in zip(layers, weights, strict=True)]
    # PyTorch iterates in bfloat16, with 8 bits: relative errors of 2^-8 in each of 5 iterations.
    assert relative_difference(moved, other) < 0.05


def test_nesterov_is_the_one_of_pytorch():
    torch = pytest.importorskip("torch")
    problem, weights = square(2)
    layers = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
    optimizer = torch.optim.SGD(layers, lr=0.1, weight_decay=0.01, momentum=0.9, nesterov=True)
    target = torch.tensor(problem.target.dense())
    for _ in range(50):
        optimizer.zero_grad()
        (problem.loss_scale / 2 * (layers[1] @ layers[0] - target).square().sum()).backward()
        optimizer.step()
    run = dln.train(problem, weights, learning_rate=0.1, weight_decay=0.01, steps=50, optimizer="nesterov")
    others = [p.detach().numpy() for p in layers]
    assert relative_difference(run.all_weights(), others) < tolerance(F64, 12, 50)


def test_muon_at_width_one_million():
    problem = dln.low_rank_recovery(10**6, 3, seed=0)
    weights = dln.orthogonal([10**6] * 4, implicit=True)
    run = dln.train(problem, weights, learning_rate=1e-3, steps=100, optimizer="muon")
    small = dln.low_rank_recovery(10**6, 3, seed=0)
    again = dln.train(small, weights, learning_rate=1e-3, steps=100, optimizer=Muon(0.95))
    np.testing.assert_allclose(run.loss, again.loss, rtol=1e-12)
    assert run.loss[-1] < run.loss[0]


# Schedules by themselves.


def test_the_values_of_a_cosine():
    rate = dln.Schedule.cosine([1.0, 2.0], 100, warmup=10, final=0.5)
    values = rate.values(120)
    np.testing.assert_allclose(values[:10], np.outer(np.arange(1, 11) / 10, [1.0, 2.0]))
    t = np.arange(10, 100)
    wave = (1 + np.cos(np.pi * (t - 10) / 90)) / 2
    np.testing.assert_allclose(values[10:100], 0.5 + np.outer(wave, [0.5, 1.5]), rtol=1e-14)
    np.testing.assert_array_equal(values[100:], 0.5)
    for n in (1, 9, 10, 37, 100, 119):
        np.testing.assert_array_equal(rate.values(n), values[:n])


def test_piecewise_values():
    np.testing.assert_array_equal(
        dln.Schedule.piecewise({0: 1.0, 3: [2.0, 3.0]}).values(5), [[1, 1], [1, 1], [1, 1], [2, 3], [2, 3]]
    )


def test_functions_are_called_once_for_every_step():
    calls = []

    def rate(t):
        calls.append(t)
        return 0.1

    problem, weights = square(2)
    dln.train(problem, weights, learning_rate=dln.Schedule(rate), steps=7)
    assert calls == list(range(7))


@pytest.mark.parametrize(
    "schedule",
    [
        dln.Schedule.cosine(0.1, 10, warmup=2),
        dln.Schedule.piecewise({0: 0.1, 5: 0.01}),
        dln.Schedule([0.1, 0.2]),
        dln.Schedule([[0.1, 0.2], [0.3, 0.4]]),
    ],
)
def test_schedules_survive_a_dictionary(schedule):
    assert dln.Schedule.from_dict(schedule.to_dict()) == schedule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dln.Schedule([]), "rule is empty"),
        (lambda: dln.Schedule([[[0.1]]]), "3 axes"),
        (lambda: dln.Schedule([0.1, np.nan]), "not finite"),
        (lambda: dln.Schedule.cosine(0.1, 10, warmup=10), "warmup is 10; wanted fewer"),
        (lambda: dln.Schedule.piecewise({3: 0.1}), "have no 0"),
        (lambda: dln.Schedule.from_dict({"schedule": "linear"}), "schedule is 'linear'"),
        (lambda: dln.Schedule(lambda t: 0.1).to_dict(), "resolve"),
    ],
)
def test_bad_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("optimizer", [each for each, _ in RULES.values()] + [SpectralSign(0.5)])
def test_optimizers_survive_a_dictionary(optimizer):
    assert optimizer_from(optimizer.to_dict()) == optimizer


@pytest.mark.parametrize("engine", ["reduced", "dense"])
@pytest.mark.parametrize("schedule", [dln.Schedule.cosine(0.1, 5), dln.Schedule(lambda t: [0.1] * 3)])
def test_a_run_of_no_steps_may_have_a_schedule(engine, schedule):
    problem, weights = square(3)
    rates = {"learning_rate": schedule, "weight_decay": schedule, "momentum": schedule}
    run = dln.train(problem, weights, steps=0, engine=engine, **rates)
    assert len(run.loss) == 1


# Other functions that train.


def test_batches_have_schedules_and_rules():
    problem, weights = square(3)
    rate = dln.Schedule.cosine(0.01, 30)
    for options in ({"momentum": 0.5}, {"optimizer": Muon()}):
        batch = dln.train_batch(problem, weights, learning_rate=[rate, 0.01, rate], steps=30, **options)
        for run, eta in zip(batch, (rate, 0.01, rate), strict=True):
            single = dln.train(problem, weights, learning_rate=eta, steps=30, engine="reduced", **options)
            np.testing.assert_array_equal(run.loss, single.loss)


def test_compressed_training_refuses_rules():
    problem = dln.low_rank_completion(20, 2, 0.5)
    weights = dln.orthogonal([20] * 4, scale=1e-2)
    with pytest.raises(ValueError, match="optimizer is 'muon'; train_compressed"):
        dln.train_compressed(problem, weights, rank=2, learning_rate=0.1, steps=1, optimizer="muon")


def test_specifications_have_schedules_and_rules(tmp_path):
    path = tmp_path / "spec.toml"
    path.write_text(
        """
        [problem]
        kind = "low-rank-recovery"
        dim = 12
        rank = 2
        [weights]
        depth = 2
        [train]
        learning_rate = {schedule = "cosine", peak = 0.01, steps = 20, warmup = 3}
        weight_decay = {schedule = "piecewise", values = {0 = 0.0, 10 = 0.1}}
        optimizer = {name = "muon", method = "polar", momentum = 0.5}
        steps = 20
        """
    )
    chosen = spec.read_spec(path)
    options = spec.train_options(chosen)
    assert options.learning_rate == dln.Schedule.cosine(0.01, 20, warmup=3)
    assert options.weight_decay == dln.Schedule.piecewise({0: 0.0, 10: 0.1})
    assert options.optimizer == Muon(0.5, method="polar")
    problem, _ = spec.make_problem(chosen)
    run = dln.train(problem, spec.make_weights(chosen, problem), **options.keywords())
    assert run.config["learning_rate"] == {
        "schedule": "cosine",
        "peak": 0.01,
        "steps": 20,
        "warmup": 3,
        "final": 0.0,
    }
    assert run.config["optimizer"]["method"] == "polar"
    run.save(tmp_path / "run.npz")
    assert dln.load(tmp_path / "run.npz").config["optimizer"] == run.config["optimizer"]


@pytest.mark.parametrize("steps", [2**40, 2**62])
def test_a_function_is_not_called_for_more_steps_than_memory_holds(steps):
    calls = []
    with pytest.raises(MemoryError, match=f"steps is {steps}"):
        dln.Schedule(lambda step: calls.append(step) or 0.1).resolve(steps)
    assert not calls
