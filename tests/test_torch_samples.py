# SPDX-License-Identifier: MIT
"""Training on a `SampleProblem`: steps, records, files and resumed runs, compared with autograd."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.runs import array_content, run_content
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast import reference
from dlnfast._training.rates import least_squares_of

torch = pytest.importorskip("torch", reason="PyTorch is optional")
from torch.nn import functional  # noqa: E402

from dlnfast.torch import descent as torch_descent  # noqa: E402
from dlnfast.torch.sample_descent import SampleJob  # noqa: E402

LOSSES = ["squared", "cross-entropy", "logistic"]
F32, F64 = np.float32, np.float64
#: Accumulated rounding of fifty steps of a network of widths up to 9, in float64.
EXACT = 10 * tolerance(F64, 16, 50)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Use one thread: a second team of threads slows small work down on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(loss, n=30, dim=6, seed=0, **options):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((dim, n))
    targets = {
        "squared": rng.standard_normal((4, dim)) @ X,
        "cross-entropy": np.arange(n) % 4,
        "logistic": np.where(X[0] > 0, 1, -1),
    }
    return dln.SampleProblem(X, targets[loss], loss=loss, **options)


def start(problem, hidden=(5,), dtype=F64):
    return dln.gaussian([problem.dim_in, *hidden, problem.dim_out], 0.6, 1, dtype=dtype)


def batch_loss(problem, outputs, targets):
    """Return the loss of a mini-batch by functions of PyTorch, scaled to all samples."""
    share = problem.loss_scale * problem.n_samples / outputs.shape[1]
    if problem.loss_name == "squared":
        return share * 0.5 * ((outputs - targets) ** 2).sum()
    if problem.loss_name == "cross-entropy":
        return share * functional.cross_entropy(outputs.T, targets, reduction="sum")
    positive = (targets > 0).to(outputs.dtype)
    return share * functional.binary_cross_entropy_with_logits(outputs[0], positive, reduction="sum")


def train_by_autograd(problem, weights, steps, make_optimizer):
    """Return losses, weights and biases of a plain loop of PyTorch over the batches of the problem."""
    layers = [torch.tensor(w, requires_grad=True) for w in weights]
    biases = [torch.zeros(len(w), 1, dtype=w.dtype, requires_grad=True) for w in layers]
    trained = [*layers, *(biases if problem.has_biases else [])]
    optimizer = make_optimizer(trained)
    losses = []
    for step in range(steps + 1):
        which = problem.batch(step)
        values = torch.tensor(problem.inputs[:, which], dtype=layers[0].dtype)
        targets = torch.tensor(problem.targets(step))
        if problem.loss_name != "cross-entropy":
            targets = targets.to(values.dtype)
        for layer, bias in zip(layers, biases, strict=True):
            values = layer @ values + bias
        loss = batch_loss(problem, values, targets)
        losses.append(loss.item())
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses, [w.detach().numpy() for w in layers], [b.detach().numpy()[:, 0] for b in biases]


def assert_same(run, wanted):
    losses, weights, biases = wanted
    np.testing.assert_allclose(run.loss, losses, rtol=0, atol=EXACT * max(losses))
    for i, weight in enumerate(weights):
        assert np.linalg.norm(run.weights(i + 1) - weight) <= EXACT * np.linalg.norm(weight)
        if run.problem.has_biases:
            size = max(np.linalg.norm(biases[i]), np.linalg.norm(weight))
            assert np.linalg.norm(run.biases(i + 1)[-1] - biases[i]) <= EXACT * size


# The same steps as autograd.


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"biases": True},
        {"batch_size": 7},
        {"batch_size": 30},
        {"batch_size": 8, "label_noise": 0.2, "biases": True, "seed": 5},
        {"label_noise": 0.2, "loss_scale": 0.01},
    ],
    ids=["full", "biases", "batches", "permuted", "noise", "full-noise"],
)
@pytest.mark.parametrize("rule", [{}, {"momentum": 0.9, "weight_decay": 0.02}, {"weight_decay": 0.02}])
def test_gradient_descent_equals_autograd(loss, options, rule):
    problem = make(loss, **options)
    weights = start(problem, (5, 7))
    run = dln.train(problem, weights, learning_rate=0.05, steps=50, **rule)
    wanted = train_by_autograd(problem, weights, 50, lambda p: torch.optim.SGD(p, lr=0.05, **rule))
    assert_same(run, wanted)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["adam", "adamw", "nesterov"])
@pytest.mark.parametrize("options", [{}, {"batch_size": 7, "biases": True}], ids=["full", "batches"])
def test_other_rules_equal_torch_optim(loss, name, options):
    problem = make(loss, **options)
    weights = start(problem)
    make_optimizer = {
        "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.02),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.02),
        "nesterov": lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.02, momentum=0.9, nesterov=True),
    }[name]
    momentum = {"momentum": 0.9} if name == "nesterov" else {}
    run = dln.train(
        problem, weights, learning_rate=0.01, weight_decay=0.02, steps=50, optimizer=name, **momentum
    )
    assert_same(run, train_by_autograd(problem, weights, 50, make_optimizer))


@settings(deadline=None, max_examples=40)
@given(
    loss=st.sampled_from(LOSSES),
    hidden=st.lists(st.sampled_from([1, 2, 5, 8]), max_size=3),
    has_biases=st.booleans(),
    dtype=st.sampled_from([F64, F32]),
    seed=st.integers(0, 99),
)
def test_one_step_follows_the_gradients_of_the_reference(loss, hidden, has_biases, dtype, seed):
    problem = make(loss, seed=seed, biases=has_biases)
    weights = start(problem, hidden, dtype)
    run = dln.train(problem, weights, learning_rate=1.0, steps=1)
    targets = problem.outputs
    if loss == "cross-entropy":
        targets = dln.one_hot(problem.labels)
    elif loss == "logistic":
        targets = problem.labels[np.newaxis]
    wide = [w.astype(F64) for w in weights]
    value, of_weights, of_biases = reference.sample_gradients(
        wide, problem.inputs, targets, loss, problem.loss_scale
    )
    allowed = 10 * tolerance(dtype, 32)
    assert run.loss[0] == pytest.approx(value, rel=allowed)
    for i, (w, g) in enumerate(zip(wide, of_weights, strict=True)):
        assert np.linalg.norm(run.weights(i + 1) - (w - g)) <= allowed * (
            np.linalg.norm(w) + np.linalg.norm(g)
        )
        if has_biases:
            size = np.linalg.norm(g) + np.linalg.norm(of_biases[i])
            assert np.linalg.norm(run.biases(i + 1)[1] + of_biases[i]) <= allowed * size
            assert not run.biases(i + 1)[0].any()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"weight_decay": 0.01}])
def test_full_batches_of_the_squared_loss_equal_the_dense_engine(options):
    problem = make("squared", n=40)
    other = dln.Problem.from_data(problem.inputs, problem.outputs)
    weights = start(problem, (5, 7))
    run = dln.train(problem, weights, learning_rate=0.05, steps=200, **options)
    dense = dln.train(other, weights, learning_rate=0.05, steps=200, engine="dense", **options)
    np.testing.assert_allclose(run.loss, dense.loss, rtol=0, atol=EXACT * dense.loss[0])
    np.testing.assert_array_equal(run.full_loss(), run.loss)
    np.testing.assert_array_equal(dense.full_loss(), dense.loss)
    for layer in (1, 2, 3):
        difference = np.linalg.norm(run.weights(layer) - dense.weights(layer))
        assert difference <= EXACT * np.linalg.norm(dense.weights(layer))
        bounds = run.singular_value_errors(layer) + dense.singular_value_errors(layer)
        bounds += EXACT * dense.singular_values(layer)[:, :1]
        assert np.all(np.abs(run.singular_values(layer) - dense.singular_values(layer)) <= bounds)


def test_the_automatic_rate_is_that_of_the_same_least_squares():
    problem = make("squared", batch_size=7)
    weights = start(problem)
    run = dln.train(problem, weights, learning_rate="auto", steps=1)
    other = dln.train(least_squares_of(problem), weights, learning_rate="auto", steps=1)
    assert run.config["learning_rate"] == other.config["learning_rate"]


@pytest.mark.parametrize("optimizer", ["gd", "adam"])
def test_rates_change_with_a_schedule(optimizer):
    problem = make("cross-entropy", batch_size=7, biases=True)
    weights = start(problem)
    rates = 0.02 / (1 + np.arange(50))
    run = dln.train(
        problem, weights, learning_rate=dln.Schedule.from_values(rates), steps=50, optimizer=optimizer
    )

    def make_optimizer(parameters):
        cls = torch.optim.SGD if optimizer == "gd" else torch.optim.Adam
        inner = cls(parameters, lr=1.0)
        count = itertools.count()
        inner.register_step_pre_hook(lambda o, *_: o.param_groups[0].update(lr=rates[next(count)]))
        return inner

    assert_same(run, train_by_autograd(problem, weights, 50, make_optimizer))


def test_layers_with_rate_zero_do_not_move():
    problem = make("cross-entropy", biases=True)
    weights = start(problem, (5, 7))
    run = dln.train(problem, weights, learning_rate=[0.0, 0.1, 0.0], steps=5)
    for layer, moves in ((1, False), (2, True), (3, False)):
        assert (run.weights(layer) != weights[layer - 1]).any() == moves
        assert run.biases(layer).any() == moves


@pytest.mark.parametrize("optimizer", ["muon", "spectral-sign", "shampoo"])
def test_rules_of_whole_matrices_train_biases_as_one_column(optimizer):
    problem = make("cross-entropy", biases=True, batch_size=10)
    weights = start(problem)
    run = dln.train(problem, weights, learning_rate=0.02, steps=60, optimizer=optimizer)
    assert run.full_loss()[-1] < run.full_loss()[0]
    assert run.biases(1)[-1].any()


# Losses and records.


@pytest.mark.parametrize("loss", LOSSES)
def test_records_contain_the_full_loss(loss):
    problem = make(loss, batch_size=7, label_noise=0.1, biases=True)
    weights = start(problem)
    record = dln.Record(every=5, weights_every=5, singular_values=2, vectors=True)
    run = dln.train(problem, weights, learning_rate=0.05, steps=23, record=record)
    assert run.steps.tolist() == [0, 5, 10, 15, 20, 23]
    assert run.full_loss().shape == (6,)
    for i, step in enumerate(run.steps.tolist()):
        biases = [run.biases(layer)[i] for layer in (1, 2)]
        wanted = problem.loss(run.all_weights(step), biases)
        assert run.full_loss()[i] == pytest.approx(wanted, rel=100 * tolerance(F64, 30))
        exact = np.linalg.svd(run.weights(1, step), compute_uv=False)[:2]
        bounds = run.singular_value_errors(1)[i] + tolerance(F64, 6) * exact[0]
        assert np.all(np.abs(run.singular_values(1)[i] - exact) <= bounds)
    assert run.singular_vectors(1, "left", -1).shape == (5, 2)


def test_the_full_loss_of_many_samples_is_that_of_all(monkeypatch):
    from dlnfast.torch import sample_descent

    monkeypatch.setattr(sample_descent, "_CHUNK_SAMPLES", 4)
    problem = make("cross-entropy", batch_size=7)
    run = dln.train(problem, start(problem), learning_rate=0.05, steps=3)
    assert run.full_loss()[-1] == pytest.approx(problem.loss(run.all_weights()), rel=1e-13)


def test_features_contain_the_biases():
    problem = make("cross-entropy", biases=True)
    run = dln.train(problem, start(problem), learning_rate=0.5, steps=9)
    first = run.weights(1) @ problem.inputs + run.biases(1)[-1][:, np.newaxis]
    np.testing.assert_allclose(run.features(1), first, atol=1e-13)
    outputs = run.weights(2) @ first + run.biases(2)[-1][:, np.newaxis]
    np.testing.assert_allclose(run.features(2), outputs, atol=1e-12)
    display = dln.plots.FeatureCompressionDisplay.from_trajectory(run)
    features = [problem.inputs, first]
    wanted = [dln.measures.feature_compression(z, problem.labels) for z in features]
    np.testing.assert_allclose(display.compression, wanted, rtol=1e-10)


def test_the_certificate_gives_the_reason_for_whole_layers():
    problem = make("cross-entropy")
    run = dln.train(problem, start(problem), learning_rate=0.1, steps=1)
    assert run.engine == run.config["engine"] == "torch"
    assert "no closure: the gradient of the cross-entropy loss is a nonlinear" in run.certificate.reason
    asked = dln.train(problem, start(problem), learning_rate=0.1, steps=1, engine="torch:cpu")
    assert asked.certificate == run.certificate
    assert asked.config["device"] == "cpu"


def test_a_run_without_biases_or_a_target_says_so():
    problem = make("cross-entropy")
    run = dln.train(problem, start(problem), learning_rate=0.1, steps=1, record=dln.Record(vectors=True))
    with pytest.raises(ValueError, match="the run has no biases"):
        run.biases(1)
    with pytest.raises(ValueError, match="no target matrix"):
        _ = run.rank
    with pytest.raises(ValueError, match="layer"):
        run.biases(3)


# The end of a run.


def test_a_run_ends_at_the_tolerance_and_by_a_callback():
    problem = make("cross-entropy", batch_size=7)
    weights = start(problem)
    run = dln.train(problem, weights, learning_rate=0.3, steps=300, tolerance=0.5)
    assert run.outcome == "converged"
    assert run.loss[-1] <= 0.5 < run.loss[:-1].min()
    seen = []

    def stop(step, loss):
        seen.append((step, loss))
        return step == 12

    record = dln.Record(every=4, callback=stop)
    run = dln.train(problem, weights, learning_rate=0.3, steps=300, record=record)
    assert run.outcome == "stopped"
    assert seen == [(int(s), float(run.loss[s])) for s in (0, 4, 8, 12)]


@pytest.mark.parametrize("batch_size", [None, 7])
def test_a_divergence_is_an_error_with_the_finite_records(batch_size):
    problem = make("squared", batch_size=batch_size)
    with pytest.raises(dln.DivergedError, match="the loss is not finite at step") as caught:
        dln.train(problem, start(problem), learning_rate=50.0, steps=300)
    run = caught.value.trajectory
    assert run.outcome == "diverged"
    assert len(run.loss) == caught.value.step
    assert np.isfinite(run.loss).all()
    assert np.isfinite(run.full_loss()).all()


def test_an_infinite_full_loss_is_a_divergence():
    X = np.ones((1, 2))
    X[0, 1] = 1e200  # in the second mini-batch
    seed = next(s for s in range(9) if dln.SampleProblem(X, X, batch_size=1, seed=s).batch(0)[0] == 0)
    problem = dln.SampleProblem(X, X, batch_size=1, seed=seed)
    with pytest.raises(dln.DivergedError) as caught:
        dln.train(problem, [np.zeros((1, 1))], learning_rate=0.1, steps=1)
    assert caught.value.step == 0
    assert caught.value.trajectory is None


# Files.


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("has_biases", [False, True])
def test_a_saved_run_is_loaded_with_its_samples(loss, has_biases, tmp_path):
    problem = make(loss, batch_size=7, label_noise=0.1, biases=has_biases, seed=3)
    record = dln.Record(every=3, weights_every=6)
    run = dln.train(problem, start(problem), learning_rate=0.05, steps=20, record=record)
    run.save(tmp_path / "run.npz")
    again = dln.load(tmp_path / "run.npz")
    assert run_content(again) == run_content(run)
    assert again.problem.describe() == problem.describe()
    np.testing.assert_array_equal(again.problem.targets(4), problem.targets(4))
    thinned = dln.load(tmp_path / "run.npz", every=2)
    np.testing.assert_array_equal(thinned.full_loss(), run.full_loss()[[0, 2, 4, 6, 7]])


def test_a_damaged_file_is_refused():
    problem = make("cross-entropy", biases=True)
    run = dln.train(problem, start(problem), learning_rate=0.05, steps=4)
    metadata, arrays = run.to_arrays()
    for name, value, text in (
        ("full_losses", arrays["full_losses"][:2], "full_losses has shape"),
        ("biases_0", arrays["biases_0"][:, :2], "biases_0 has shape"),
        ("sample_targets", arrays["sample_targets"] + 4, "wanted labels in 0 .. 3"),
        ("sample_inputs", arrays["sample_inputs"][:, :3], "X has 3 samples and Y has 30"),
    ):
        with pytest.raises(ValueError, match=text):
            dln.Trajectory.from_arrays(metadata, arrays | {name: value})
    changed = metadata | {"problem": metadata["problem"] | {"shape": [4, 9]}}
    with pytest.raises(ValueError, match=r"problem\.shape"):
        dln.Trajectory.from_arrays(changed, arrays)
    with pytest.raises(ValueError, match="sample_inputs"):
        dln.Trajectory.from_arrays(metadata, {k: v for k, v in arrays.items() if k != "sample_inputs"})


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"optimizer": "adam"}, {"optimizer": "shampoo"}], ids=str
)
@pytest.mark.parametrize("at", [0, 1, 9, 20])
def test_a_run_resumes_bit_for_bit(options, at, tmp_path):
    problem = make("cross-entropy", batch_size=7, label_noise=0.2, biases=True, seed=2)
    weights = start(problem)
    record = dln.Record(every=2, weights_every=5)
    options = {"learning_rate": 0.05, "steps": 20, "weight_decay": 0.01} | options

    def interrupt(step, loss):
        if step >= at:
            raise KeyboardInterrupt

    whole = dln.train(problem, weights, record=record, **options)
    checkpoint = dln.Checkpoint(tmp_path / "run", every=3, seconds=0)
    recording = dln.Record(every=2, weights_every=5, callback=interrupt)
    with pytest.raises(KeyboardInterrupt):
        dln.train(problem, weights, record=recording, checkpoint=checkpoint, **options)
    resumed = dln.resume(tmp_path / "run")
    np.testing.assert_array_equal(resumed.loss, whole.loss)
    np.testing.assert_array_equal(resumed.full_loss(), whole.full_loss())
    kept = ("initial", "final", "snapshots", "biases", "snapshot_steps", "steps", "sample")
    found, wanted = (
        array_content({k: v for k, v in run.to_arrays()[1].items() if k.startswith(kept)})
        for run in (resumed, whole)
    )
    assert found == wanted
    assert resumed.outcome == "finished"


def test_another_seed_is_another_run(tmp_path):
    weights = start(make("squared"))
    options = {"learning_rate": 0.05, "steps": 3, "checkpoint": tmp_path / "run"}
    dln.train(make("squared", batch_size=7, seed=1), weights, **options)
    with pytest.raises(ValueError, match="another run"):
        dln.train(make("squared", batch_size=7, seed=2), weights, **options)


def test_the_command_line_resumes_and_prints_a_run(tmp_path, capsys):
    from dlnfast.cli import main

    problem = make("cross-entropy", batch_size=7)
    folder = tmp_path / "run"
    run = dln.train(problem, start(problem), learning_rate=0.05, steps=4, checkpoint=folder)
    assert main(["resume", str(folder)]) in (None, 0)
    printed = capsys.readouterr().out
    assert f"-> {run.loss[-1]:.6g}\n" in printed
    assert "least possible" not in printed  # the minimum of this loss is not known


def test_records_are_exported():
    xarray = pytest.importorskip("xarray")
    problem = make("cross-entropy", batch_size=7, biases=True)
    run = dln.train(problem, start(problem), learning_rate=0.05, steps=4)
    data = run.to_xarray()
    assert isinstance(data, xarray.Dataset)
    np.testing.assert_array_equal(data["full_loss"], run.full_loss())
    np.testing.assert_array_equal(data["biases"][:, 0, :5], run.biases(1))


# Devices.


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_a_queue_of_steps_gives_the_same_run(options, fails, monkeypatch):
    problem = make("squared", batch_size=7, label_noise=0.1, biases=True)
    rate = 50.0 if fails else 0.05
    record = dln.Record(every=9)

    def run():
        try:
            return dln.train(problem, start(problem), learning_rate=rate, steps=40, record=record, **options)
        except dln.DivergedError as error:
            assert fails
            return error.trajectory

    wanted = run()
    begin = SampleJob.__init__

    def begin_apart(self, *arguments):
        begin(self, *arguments)
        self.steps_ahead = 7

    monkeypatch.setattr(SampleJob, "__init__", begin_apart)
    monkeypatch.setattr(torch_descent, "_move_to_device", lambda host, device: host.clone())
    found = run()
    assert run_content(found, with_times=False) == run_content(wanted, with_times=False)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_arguments_are_not_changed(dtype):
    problem = make("squared", batch_size=7, label_noise=0.1)
    weights = start(problem, dtype=dtype)
    copies = [w.copy() for w in weights], problem.inputs.copy(), problem.outputs.copy()
    run = dln.train(problem, weights, learning_rate=0.05, steps=4)
    assert run.weights(1).dtype == dtype
    for before, after in zip(copies[0], weights, strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(copies[1], problem.inputs)
    np.testing.assert_array_equal(copies[2], problem.outputs)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"learning_rate": "adaptive"}, ValueError, "learning_rate is adaptive"),
        ({"learning_rate": "auto"}, ValueError, 'learning_rate .eta. is "auto"'),
        ({"learning_rate": [0.1]}, dln.ShapeError, "learning_rate"),
    ],
)
def test_invalid_options_are_named(options, error, text):
    problem = make("logistic")
    with pytest.raises(error, match=text):
        dln.train(problem, start(problem), steps=1, **options)


def test_weights_that_do_not_fit_are_refused():
    problem = make("cross-entropy")
    options = {"learning_rate": 0.1, "steps": 1}
    with pytest.raises(dln.ShapeError, match="wanted 6 columns"):
        dln.train(problem, dln.gaussian([5, 4]), **options)
    with pytest.raises(dln.ShapeError, match="has 3 rows; wanted 4"):
        dln.train(problem, dln.gaussian([6, 3]), **options)
    with pytest.raises(dln.AssumptionError, match="lazily sampled: draw them with"):
        dln.train(make("squared", dim=4), dln.orthogonal([4, 4, 4], implicit=True), **options)
