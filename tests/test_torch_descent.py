# SPDX-License-Identifier: MIT
"""The torch engine compared with the dense engine: numbers, records, outcomes and errors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.problems import draw_problem
from helpers.records import with_record
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast import reference
from dlnfast._support.progress import ProgressBar
from dlnfast._training.options import Options
from dlnfast._training.rates import make_request
from dlnfast._trajectory.layer_spectra import COLUMNS

torch = pytest.importorskip("torch", reason="PyTorch is optional")

from dlnfast.torch import _devices  # noqa: E402
from dlnfast.torch import descent as torch_descent  # noqa: E402

DIM = 10

F32, F64 = np.float32, np.float64
#: Largest difference between the two engines in float64, relative to the size of each quantity: nine times
#: tolerance(float64, 16, 200), for runs in which gradients of many layers feed on each other's rounding.
EXACT = 1e-12


def stable_rate(problem, weights):
    return float(dln.train(problem, weights, learning_rate="auto", steps=0).config["learning_rate"][0])


def both(problem, weights, **options):
    return [dln.train(problem, weights, engine=engine, **options) for engine in ("dense", "torch")]


def differences(wanted, run):
    """Return the largest differences of residuals, singular values and weights, each relative to its size.

    Layers may pass through zero: their size is that of the start where it is larger.
    """
    layers = range(1, run.n_layers + 1)
    sizes = [np.linalg.norm(wanted.weights(layer, 0)) for layer in layers]
    scale = max(wanted.loss[0], run.problem.loss_scale * np.sum(run.problem.dense_target() ** 2))
    # By rounding a loss of zero may be negative.
    assert min(run.loss.min(), wanted.loss.min()) >= -1e-5 * scale * np.finfo(np.float32).eps
    roots = [np.sqrt(np.maximum(each.loss, 0.0)) for each in (run, wanted)]
    found = {"loss": np.abs(roots[0] - roots[1]).max() / np.sqrt(scale)}
    found["values"] = found["weights"] = 0.0
    for layer, size in zip(layers, sizes, strict=True):
        a, b = wanted.singular_values(layer), run.singular_values(layer)
        found["values"] = max(found["values"], np.max(np.abs(a - b) / np.maximum(a[:, :1], size)))
        for step in [*run.states.snapshot_steps.tolist(), -1]:
            a, b = wanted.weights(layer, step), run.weights(layer, step)
            found["weights"] = max(found["weights"], np.linalg.norm(a - b) / max(np.linalg.norm(a), size))
    return found


def assert_same_run(wanted, run, limit=0.0):
    assert run.steps.tolist() == wanted.steps.tolist()
    assert len(run.loss) == len(wanted.loss)
    assert run.states.snapshot_steps.tolist() == wanted.states.snapshot_steps.tolist()
    assert run.outcome == wanted.outcome
    found = differences(wanted, run)
    assert max(found.values()) <= limit, found


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Use one thread: a second team of threads slows small work down on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 7], ids=["host", "accelerator"])
def apart(request, monkeypatch):
    """Let the CPU act as a separate device with a queue of 7 steps, or as the host."""
    if request.param > 1:
        begin = torch_descent.TorchJob.__init__

        def begin_apart(self, *arguments):
            begin(self, *arguments)
            if self.request.tolerance is None:
                self.steps_ahead = request.param

        monkeypatch.setattr(torch_descent.TorchJob, "__init__", begin_apart)
        monkeypatch.setattr(torch_descent, "_move_to_device", lambda host, device: host.clone())
    return request.param > 1


# The same numbers.


@settings(deadline=None, max_examples=60)
@given(
    widths=st.lists(st.sampled_from([1, 2, 3, 5, 7, 11, 13, 16]), min_size=2, max_size=6),
    white=st.booleans(),
    dtype=st.sampled_from([F64, F64, F32]),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_a_run_equals_that_of_the_dense_engine(widths, white, dtype, seed, data):
    n_layers = len(widths) - 1

    def each(*choices):
        return data.draw(st.lists(st.sampled_from(choices), min_size=n_layers, max_size=n_layers))

    problem = draw_problem(widths, seed=seed, white=white)
    weights = dln.gaussian(widths, 0.7, seed, dtype=dtype)
    rate = stable_rate(problem, weights)
    momentum = each(0.0, 0.5, 0.9)
    rates = [rate * share * (1 - max(momentum)) for share in each(0.0, 0.3, 1.0)]
    steps = data.draw(st.sampled_from([0, 1, 40, 200]))
    options = {
        "learning_rate": rates,
        "weight_decay": each(0.0, 0.01),
        "momentum": momentum,
        "steps": steps,
        "record": dln.Record(every=data.draw(st.sampled_from([1, 9])), weights_every=10),
    }
    wanted, run = both(problem, weights, **options)
    # Near a saddle point, and at the edge of stability, rounding errors grow in any engine. An oscillation
    # ends at an amplitude of its own, so that a small difference shows what a larger one does not.
    rng = np.random.default_rng(seed)
    for small in (1e-7, 1e-12) if dtype == F64 else (1e-3,):
        nearby = [w * (1 + small * rng.standard_normal(w.shape)).astype(dtype) for w in weights]
        perturbed = dln.train(problem, nearby, engine="dense", **options)
        assume(max(differences(wanted, perturbed).values()) <= 50 * small)
    # In float32 the error of losses near a minimum is relative to their first value, and momentum 0.9 sums
    # the errors of ten steps.
    assert_same_run(wanted, run, EXACT if dtype == F64 else 10 * tolerance(F32, 16, max(steps, 1)))
    assert run.loss.dtype == F64
    assert run.weights(1).dtype == run.singular_values(1).dtype == dtype


@pytest.mark.parametrize("white", [True, False])
@pytest.mark.parametrize("widths", [[7, 4], [4, 7], [6, 6, 6, 6], [11, 3, 11], [8, 8, 8, 2], [2, 8, 8, 8]])
def test_a_run_equals_that_of_the_reference(widths, white):
    problem, weights = draw_problem(widths, white=white), dln.gaussian(widths, 0.8, 1)
    n_layers = len(weights)
    rates = {"learning_rate": 0.1, "weight_decay": 0.02, "momentum": 0.3}
    run = dln.train(problem, weights, steps=50, engine="torch", **with_record(rates, weights_every=1))
    states = reference.train_dense(
        weights,
        problem.dense_target(),
        input_gram=problem.input_gram,
        loss_scale=problem.loss_scale,
        steps=50,
        **{name: [value] * n_layers for name, value in rates.items()},
    )
    for step, (loss, matrices) in enumerate(states):
        assert abs(run.loss[step] - loss) <= EXACT * run.loss[0]
        for layer, matrix in enumerate(matrices, start=1):
            assert np.linalg.norm(run.weights(layer, step) - matrix) <= EXACT * np.linalg.norm(matrix)


def test_layers_around_a_bottleneck_equal_the_dense_engine():
    widths = [70, 90, 20, 130, 75]
    problem, weights = draw_problem(widths), dln.gaussian(widths, 0.7)
    rate = stable_rate(problem, weights)
    wanted, run = both(
        problem,
        weights,
        learning_rate=rate,
        weight_decay=0.01,
        steps=100,
        record=dln.Record(every=50, weights_every=50),
    )
    assert_same_run(wanted, run, EXACT)


def test_low_rank_targets_and_a_loss_floor_equal_the_dense_engine():
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((6, 40)), rng.standard_normal((3, 40))
    recovery = dln.low_rank_recovery(12, 3)
    for problem, widths in (
        (recovery, [12] * 4),
        (dln.Problem.from_data(X, Y), [6, 6, 3]),
        (dln.Problem.from_data(X, Y, whiten="zca"), [6, 6, 3]),
    ):
        weights = dln.orthogonal(widths)
        wanted, run = both(
            problem, weights, learning_rate="auto", steps=60, record=dln.Record(weights_every=20)
        )
        assert_same_run(wanted, run, EXACT)
        assert run.config["learning_rate"] == wanted.config["learning_rate"]


@pytest.mark.parametrize("widths", [[5, 4], [5, 4, 6], [3, 9, 9, 9], [9, 9, 9, 3]])
def test_decay_that_cancels_the_weight_does_not_affect_the_gradient(widths):
    problem, weights = draw_problem(widths), dln.gaussian(widths, 1e-3)
    run = dln.train(problem, weights, learning_rate=0.5, weight_decay=2.0, steps=1, engine="torch")
    slopes = reference.gradients(weights, problem.dense_target(), None, problem.loss_scale)
    for layer, slope in enumerate(slopes, start=1):
        # Relative to the gradient, which is much smaller than the weights: it was not lost by rounding.
        allowed = tolerance(F64, 9) * 0.5 * np.linalg.norm(slope)
        assert np.linalg.norm(run.weights(layer) + 0.5 * slope) <= allowed


def test_arguments_are_not_changed():
    widths = [5, 6, 4]
    target = np.random.default_rng(0).standard_normal((4, 5))
    weights = dln.gaussian(widths)
    before = [array.copy() for array in (target, *weights)]
    for array in (target, *weights):
        array.flags.writeable = False
    run = dln.train(dln.Problem(target), weights, learning_rate=0.05, momentum=0.5, steps=9, engine="torch")
    assert run.loss[-1] < run.loss[0]
    for array, copy in zip((target, *weights), before, strict=True):
        np.testing.assert_array_equal(array, copy)
    np.testing.assert_array_equal(run.weights(1, 0), before[1])


# Records and outcomes, on the host and on a device with queued steps.


def test_a_separate_device_gives_the_same_run(apart, problem, weights):
    for steps, every, weights_every in (
        (0, 1, 1),
        (23, 5, 4),
        (50, 50, 50),
        (21, 1, None),
        (60, 30, None),
        (20, 7, 3),
    ):
        wanted, run = both(
            problem,
            weights,
            learning_rate=0.5,
            momentum=0.3,
            weight_decay=1e-3,
            steps=steps,
            record=dln.Record(every=every, weights_every=weights_every, vectors=True),
        )
        assert_same_run(wanted, run, EXACT)


def test_a_run_stops_at_the_first_loss_below_the_tolerance(apart, problem, weights):
    whole = dln.train(problem, weights, learning_rate=0.5, steps=200, engine="torch")
    limit = float(np.sqrt(whole.loss[0] * whole.loss.min()))
    for bound in (limit, 1e9, 0.0):
        wanted, run = both(
            problem,
            weights,
            learning_rate=0.5,
            steps=200,
            record=dln.Record(every=9, weights_every=200),
            tolerance=bound,
        )
        assert_same_run(wanted, run, EXACT)


def test_a_callback_is_called_at_every_record_and_can_stop_the_run(apart, problem, weights):
    seen = []
    rates = {"learning_rate": 0.1, "steps": 50, "record": dln.Record(every=8), "engine": "torch"}
    run = dln.train(problem, weights, **with_record(rates, callback=lambda *args: seen.append(args)))
    assert [step for step, _ in seen] == run.steps.tolist() == [0, 8, 16, 24, 32, 40, 48, 50]
    assert [loss for _, loss in seen] == run.loss[run.steps].tolist()
    assert all(type(step) is int and type(loss) is float for step, loss in seen)
    for answer in (True, np.bool_(True)):
        run = dln.train(
            problem,
            weights,
            **with_record(rates, callback=lambda step, loss, a=answer: a if step >= 20 else 1),
        )
        assert (run.steps.tolist(), len(run.loss)) == ([0, 8, 16, 24], 25)
        assert run.outcome == "stopped"
        np.testing.assert_array_equal(run.weights(3), run.weights(3, 24))
    # At the last step the run is finished in any case.
    run = dln.train(problem, weights, **with_record(rates, callback=lambda step, loss: step == 50))
    assert run.outcome == "finished"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("at", [0, 16])
def test_an_interrupt_contains_the_trajectory(apart, error, at, problem, weights):
    def fail(step, loss):
        if step == at:
            raise error

    with pytest.raises(error) as caught:
        dln.train(
            problem,
            weights,
            learning_rate=0.1,
            steps=50,
            record=dln.Record(every=8, weights_every=5, callback=fail),
            engine="torch",
        )
    run = caught.value.trajectory
    assert run.outcome == "interrupted"
    assert run.steps.tolist() == list(range(0, at + 1, 8))
    assert len(run.loss) == at + 1
    assert run.states.snapshot_steps.tolist() == list(range(0, at + 1, 5))
    assert np.isfinite(run.singular_values(3)).all()


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("grown", [None, 1, 3])
@pytest.mark.parametrize("every", [2, 50])
def test_a_divergence_error_names_the_step_and_the_layer(apart, dtype, momentum, grown, every, problem):
    weights = dln.gaussian([10] * 4, 0.9, 3, dtype=dtype)
    rates = [20.0] * 3 if grown is None else [300.0 if layer == grown else 3.0 for layer in (1, 2, 3)]
    caught = []
    for engine in ("dense", "torch"):
        with pytest.raises(dln.DivergedError, match="lower learning_rate") as error:
            dln.train(
                problem,
                weights,
                learning_rate=rates,
                momentum=momentum,
                steps=500,
                engine=engine,
                record=dln.Record(every=every, singular_values=3),
            )
        caught.append(error.value)
    wanted, found = caught
    assert (found.step, found.layer) == (wanted.step, wanted.layer)
    assert found.step >= 3
    run = found.trajectory
    assert run.outcome == "diverged"
    assert run.steps.tolist() == wanted.trajectory.steps.tolist()
    assert len(run.loss) == found.step
    assert np.isfinite(run.loss).all()
    # Errors grow with the weights, faster at every step.
    np.testing.assert_allclose(run.loss[:3], wanted.trajectory.loss[:3], rtol=1e2 * tolerance(dtype, 10, 3))


def test_a_run_without_a_finite_first_loss_has_no_trajectory(apart, problem):
    weights = [np.full((10, 10), 1e200) for _ in range(3)]
    with pytest.raises(dln.DivergedError, match="at step 0") as caught:
        dln.train(problem, weights, learning_rate=0.1, steps=5, engine="torch")
    assert (caught.value.step, caught.value.layer, caught.value.trajectory) == (0, 1, None)


def test_progress_is_reported_at_intervals(apart, problem, weights, monkeypatch):
    reports = []
    monkeypatch.setattr(torch_descent, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(ProgressBar, "_update", lambda self, step, loss: reports.append((step, loss)))
    run = dln.train(
        problem,
        weights,
        learning_rate=0.1,
        steps=20,
        record=dln.Record(every=20, progress=True),
        engine="torch",
    )
    assert [step for step, _ in reports] == ([0, 7, 14] if apart else list(range(20)))
    assert [loss for _, loss in reports] == [run.loss[step] for step, _ in reports]


# Singular values.


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("tracking", ["auto", "dense", "full"])
@pytest.mark.parametrize("k", [4, "all"])
def test_records_equal_those_of_the_dense_engine(apart, dtype, tracking, k):
    widths = [20, 30, 25, 6]
    problem, weights = draw_problem(widths), dln.gaussian(widths, 0.7, dtype=dtype)
    options = {"record": dln.Record(singular_values=k, tracking=tracking, vectors=True, weights_every=4)}
    wanted, run = both(problem, weights, learning_rate=0.2, steps=12, **with_record(options, every=4))
    for layer in (1, 2, 3):
        names = run.tracking(layer)
        assert set(names) == set(wanted.tracking(layer)) == set(COLUMNS)
        np.testing.assert_allclose(names["norm"], wanted.tracking(layer)["norm"], rtol=tolerance(dtype, 900))
        size = run.singular_values(layer).shape
        assert size == wanted.singular_values(layer).shape
        assert size == run.branches(layer).shape == run.clusters(layer).shape
        np.testing.assert_array_equal(run.states.tracking[layer - 1].signs, 1.0)
        if not apart or tracking != "auto" or k == "all":
            assert names["tier"].tolist() == wanted.tracking(layer)["tier"].tolist()
        for record, step in enumerate(run.steps):
            weight = run.weights(layer, step).astype(F64)
            exact = np.linalg.svd(weight, compute_uv=False)[: size[1]]
            errors = run.singular_value_errors(layer)[record]
            rounding = tolerance(dtype, 30) * exact[0]
            assert np.all(np.abs(run.singular_values(layer)[record] - exact) <= errors + rounding)
            left, right = (run.singular_vectors(layer, side, step) for side in ("left", "right"))
            assert np.linalg.norm(left.T @ left - np.eye(size[1])) <= tolerance(dtype, 30) * size[1]
            if names["tier"][record] == "full":  # iteration bounds its values, not single vectors
                images = weight @ right - left * run.singular_values(layer)[record]
                assert np.linalg.norm(images) <= size[1] * rounding


def test_the_tracker_gets_a_bound_on_the_change_of_the_weights(apart):
    """Layers that are too large to be decomposed are tracked by products with thin blocks."""
    widths = [150, 160, 140]
    problem, weights = draw_problem(widths), dln.gaussian(widths, 0.7)
    run = dln.train(
        problem,
        weights,
        learning_rate=1e-3,
        steps=6,
        record=dln.Record(every=2, weights_every=2, singular_values=3),
        engine="torch",
    )
    for layer in (1, 2):
        found = run.tracking(layer)
        assert found["tier"].tolist() == ["dense"] * 4
        for record, step in enumerate(run.steps):
            exact = np.linalg.svd(run.weights(layer, step), compute_uv=False)
            values, errors = run.singular_values(layer)[record], run.singular_value_errors(layer)[record]
            assert np.all(np.abs(values - exact[:3]) <= errors + tolerance(F64, 160) * exact[0])
        # Later bounds are those of the first record plus the distance.
        assert found["refreshed"].tolist() == [True, False, False, False]
        weights = [run.weights(layer, step) for step in run.steps]
        moved = np.cumsum([np.linalg.norm(b - a) for a, b in itertools.pairwise(weights)])
        np.testing.assert_allclose(found["drift"][1:], moved, rtol=1e-5)
        assert np.all(found["drift"][1:] >= moved)


def test_singular_values_can_be_left_out(apart, problem, weights):
    run = dln.train(
        problem, weights, learning_rate=0.1, steps=4, record=dln.Record(singular_values=None), engine="torch"
    )
    with pytest.raises(ValueError, match="no singular values were recorded"):
        run.singular_values(1)


# Settings of PyTorch during and after a run.


def test_the_number_of_threads_is_set_and_restored(problem, weights):
    seen = []
    before = torch.get_num_threads()
    for n_threads in (0, 1, 2):
        dln.train(
            problem,
            weights,
            learning_rate=0.1,
            steps=1,
            engine="torch",
            n_threads=n_threads,
            record=dln.Record(callback=lambda *_: seen.append(torch.get_num_threads())),
        )
        assert torch.get_num_threads() == before
    assert seen == [before] * 2 + [1] * 2 + [2] * 2


def test_products_are_computed_in_full_precision(problem):
    weights = dln.gaussian([10] * 4, 0.7, dtype=F32)
    options = {"learning_rate": 0.5, "steps": 20, "engine": "torch", "n_threads": 1}
    wanted = dln.train(problem, weights, **options)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run = dln.train(problem, weights, **options)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(run.loss, wanted.loss)


def test_settings_of_pytorch_are_restored_after_an_error(problem, weights):
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_grad_enabled()

    def fail(step, loss):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        dln.train(
            problem,
            weights,
            learning_rate=0.1,
            steps=1,
            engine="torch",
            n_threads=3,
            record=dln.Record(callback=fail),
        )
    assert before == (
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("white", [True, False])
@pytest.mark.parametrize("widths", [[6, 4], [6, 6, 6], [9, 3, 7, 8], [4, 9, 9]])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_step_allocates_no_tensor(widths, white, decay, momentum):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            result = function(*args, **kwargs)
            calls.append((str(function), result.data_ptr() in {t.data_ptr() for t in known(args, kwargs)}))
            return result

    def known(args, kwargs):
        return [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]

    calls = []
    problem = draw_problem(widths, white=white)
    weights = [w.copy() for w in dln.gaussian(widths)]
    n = len(weights)
    arguments = problem.engine_arguments(F64) | {
        "loss_scale": 1.0,
        "learning_rate": [0.01] * n,
        "weight_decay": [decay] * n,
        "momentum": [momentum] * n,
    }
    options = Options(learning_rate=0.01, steps=1, weight_decay=decay, momentum=momentum).checked()
    request = make_request(options, problem, weights)
    steps = torch_descent.StatisticsDescent(weights, arguments, torch.device("cpu"), request, [])
    square = torch.zeros((), dtype=torch.float64)
    with Watch():
        steps.evaluate(square, 0)
        steps.update(0)
    assert calls
    assert all(reused for _, reused in calls), calls


# Choice of devices, and missing devices.


def test_the_trajectory_contains_the_device(problem, weights, tmp_path, caplog):
    with caplog.at_level("INFO", "dlnfast"):
        run = dln.train(
            problem, weights, learning_rate=0.5, steps=20, engine="torch", record=dln.Record(vectors=True)
        )
    assert run.engine == "torch"
    assert run.certificate.reason == "engine='torch' was asked for, on cpu"
    assert run.certificate.reason in caplog.text
    assert (run.config["engine"], run.config["device"]) == ("torch", "cpu")
    assert repr(run).startswith("Trajectory(torch, widths [10, 10, 10, 10], 20 steps, 21 records")
    with pytest.raises(ValueError, match="rho belongs to the reduced engine"):
        run.rho(1)
    run.save(tmp_path / "run.npz")
    again = dln.load(tmp_path / "run.npz")
    assert (again.engine, again.config["device"]) == ("torch", "cpu")
    assert_same_run(run, again)
    for layer in (1, 2, 3):
        np.testing.assert_array_equal(again.angles(layer), run.angles(layer))
        np.testing.assert_array_equal(again.branches(layer), run.branches(layer))
        np.testing.assert_array_equal(again.weights(layer), run.weights(layer))
    assert "device" not in dln.train(problem, weights, learning_rate=0.5, steps=1).config


def test_warnings_name_learning_rates_above_the_threshold(problem, weights):
    bound = dln.theory.stability_threshold(problem.target.s[0], 3, problem.loss_scale)
    run = dln.train(problem, weights, learning_rate=1.01 * bound, steps=2, engine="torch")
    assert "trajectories can part" in run.certificate.reason


@pytest.mark.parametrize("engine", ["torch", "torch:cpu", f"torch:{torch.device('cpu')}"])
def test_the_default_device_is_that_of_pytorch(engine, problem, weights):
    run = dln.train(problem, weights, learning_rate=0.5, steps=1, engine=engine)
    assert run.config["device"] == "cpu"


@pytest.mark.parametrize("engine", ["auto", "dense", "reduced"])
def test_other_engines_refuse_a_device(engine, problem, weights):
    with pytest.raises(
        ValueError, match=rf"engine is '{engine}:cpu'; wanted '{engine}', as only 'torch' takes a device"
    ):
        dln.train(problem, weights, learning_rate=0.5, steps=1, engine=f"{engine}:cpu")


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_missing_devices_are_refused(device, problem, weights):
    with pytest.raises(
        ValueError, match=rf"device is '{device}', on which PyTorch cannot hold float64.*\"cpu\""
    ):
        dln.train(problem, weights, learning_rate=0.5, steps=1, engine=f"torch:{device}")


@pytest.mark.parametrize("device", [0, ["cpu"], True])
def test_invalid_devices_are_refused(device, problem, weights):
    with pytest.raises(TypeError, match=r"device is .*; wanted a torch.device or its name"):
        _devices.find_device(device, "float64")
    with pytest.raises(ValueError, match="on which PyTorch cannot hold float64"):
        dln.train(problem, weights, learning_rate=0.5, steps=1, engine=f"torch:{device}")


def test_a_device_without_a_name(problem, weights):
    with pytest.raises(ValueError, match=r"engine is 'torch:'; wanted one of .*, or 'torch:DEVICE'"):
        dln.train(problem, weights, learning_rate=0.5, steps=1, engine="torch:")


def test_errors_name_the_engines_that_support_a_setting(problem, weights):
    options = {"learning_rate": 0.5, "steps": 1, "engine": "torch"}
    completion = dln.Completion([0, 1], [2, 3], [1.0, 2.0], (10, 10))
    with pytest.raises(TypeError, match=r"problem is Completion; engine='torch' wants .*engine='dense'"):
        dln.train(completion, weights, **options)
    sampled_weights = dln.orthogonal([10] * 4, implicit=True)
    with pytest.raises(
        dln.AssumptionError, match=r"weights are lazily sampled: engine='reduced' trains them"
    ):
        dln.train(problem, sampled_weights, **options)
    for rate in ("adaptive", dln.Adaptive()):
        with pytest.raises(ValueError, match=r"learning_rate is adaptive, which is for the dense engine"):
            dln.train(problem, weights, **options | {"learning_rate": rate})


def test_only_the_torch_engine_needs_pytorch(run_python):
    program = """
import sys
sys.modules["torch"] = None
import dlnfast as dln
problem, weights = dln.low_rank_recovery(8, 1), dln.orthogonal([8] * 3)
dln.train(problem, weights, learning_rate=1.0, steps=3, engine="dense")
try:
    dln.train(problem, weights, learning_rate=1.0, steps=3, engine="torch")
except ModuleNotFoundError as error:
    print(error.name, error)
"""
    assert run_python(program).strip() == (
        "torch dlnfast.torch needs PyTorch, which is not installed: pip install torch"
    )


def test_a_spec_file_can_choose_the_torch_engine(tmp_path, capsys):
    from dlnfast.cli import main

    file_path = tmp_path / "spec.toml"
    file_path.write_text(
        '[problem]\nkind = "low-rank-recovery"\ndim = 8\nrank = 1\n[weights]\ndepth = 2\n'
        '[train]\nlearning_rate = 1.0\nsteps = 3\nengine = "torch"\ndevice = "cpu"\n'
    )
    assert main(["train", str(file_path), "--out", str(tmp_path / "out")]) == 0
    assert "engine='torch' was asked for, on cpu" in capsys.readouterr().out
