# SPDX-License-Identifier: MIT
"""Callbacks of records: with step and loss, or with the state of the running engine."""

from __future__ import annotations

import numpy as np
import pytest

import dlnfast as dln
from dlnfast import reference
from dlnfast._training import request
from dlnfast._training.stopping import Plateau

DIM = 20
STEPS = 60
EVERY = 7


def draw(kind):
    """Return weights up to 32 wide, which the core copies, or wider ones, which it updates in place."""
    if kind == "implicit":
        return dln.orthogonal([DIM] * 4, 0.7, seed=1, implicit=True)
    widths = [DIM, 40, 40, DIM] if kind == "wide" else [DIM] * 4
    return dln.gaussian(widths, 0.7, seed=1) if kind == "wide" else dln.orthogonal(widths, 0.7, seed=1)


PROBLEM = dln.low_rank_recovery(DIM, 2, seed=0)
ENGINES = [("reduced", "square"), ("reduced", "implicit"), ("dense", "square"), ("dense", "wide")]


def train(engine, kind, callback, checkpoint=None, **record):
    options = {"every": EVERY, **record}
    return dln.train(
        PROBLEM,
        draw(kind),
        learning_rate=0.5,
        momentum=0.3,
        steps=STEPS,
        engine=engine,
        record=dln.Record(callback=callback, **options),
        checkpoint=checkpoint,
    )


class Reader:
    """Keeps everything that a state has, and stops the run at a step."""

    def __init__(self, stop_at=10**9):
        self.stop_at = stop_at
        self.seen = {}

    def __call__(self, state):
        self.seen[state.step] = (
            state.loss,
            state.losses,
            state.weights(),
            [state.singular_values(layer) for layer in (1, 2, 3)],
            state.end_to_end(),
        )
        return state.step >= self.stop_at


def assert_seen(seen, run):
    """Assert that a state had at every record what the finished run has there, bit for bit."""
    assert list(seen) == run.steps.tolist()
    for record, (step, (loss, losses, weights, values, product)) in enumerate(seen.items()):
        assert loss == run.loss[step]
        np.testing.assert_array_equal(losses, run.loss[: step + 1])
        for layer in (1, 2, 3):
            np.testing.assert_array_equal(weights[layer - 1], run.weights(layer, step))
            np.testing.assert_array_equal(values[layer - 1], run.singular_values(layer)[record])
        np.testing.assert_array_equal(product, run.end_to_end(step))


@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize(("engine", "kind"), ENGINES)
def test_the_state_has_what_the_run_records(engine, kind, is_saved, tmp_path):
    reader = Reader()
    folder = dln.Checkpoint(tmp_path / "run", every=10) if is_saved else None
    run = train(engine, kind, reader, folder, weights_every=1)
    assert run.outcome == "finished"
    assert_seen(reader.seen, run)


@pytest.mark.parametrize("is_moved", [False, True])
def test_the_state_of_the_torch_engine(is_moved, monkeypatch):
    """Also where the device does not share the memory of the host."""
    pytest.importorskip("torch", reason="PyTorch is optional")
    from dlnfast.torch import descent

    if is_moved:
        monkeypatch.setattr(descent, "_move_to_device", lambda host, device: host.clone())
    reader = Reader()
    run = train("torch", "square", reader, weights_every=1)
    assert_seen(reader.seen, run)


@pytest.mark.parametrize(("engine", "kind"), ENGINES)
def test_a_rule_on_validation_loss_stops_the_run(engine, kind):
    inputs = np.random.default_rng(0).standard_normal((DIM, 50))
    outputs = PROBLEM.target_factors().dense() @ inputs
    measured = []

    def is_good_enough(state):
        measured.append(reference.loss_from_data(state.weights(), inputs, outputs, 1.0))
        return np.bool_(measured[-1] < 0.98 * measured[0])

    run = train(engine, kind, is_good_enough, every=1)
    assert run.outcome == "stopped"
    assert measured[-1] < 0.98 * measured[0] <= min(measured[:-1])
    assert len(measured) == len(run.steps)


@pytest.mark.parametrize(("engine", "kind"), ENGINES)
def test_a_resumed_run_replays_saved_states(engine, kind, tmp_path):
    class StopError(Exception):
        pass

    first = Reader()

    def interrupt(state):
        first(state)
        if state.step == 4 * EVERY:
            raise StopError

    folder = dln.Checkpoint(tmp_path / "run", every=5, seconds=0)
    with pytest.raises(StopError):
        train(engine, kind, interrupt, folder, weights_every=1)
    flags = []
    second = Reader()

    def read_again(state):
        flags.append(state.is_replayed)
        return second(state)

    run = train(engine, kind, read_again, folder, weights_every=1)
    assert_seen(second.seen, run)
    assert flags == sorted(flags, reverse=True)
    assert flags.count(True) == sum(step <= 4 * EVERY for step in run.steps) - (not flags[4])
    for step, (loss, losses, weights, _, _) in first.seen.items():
        again = second.seen[step]
        assert loss == again[0]
        np.testing.assert_array_equal(losses, again[1])
        if engine == "dense":
            for layer in (0, 1, 2):
                np.testing.assert_array_equal(weights[layer], again[2][layer])


def test_replayed_weights_that_were_not_saved_are_an_error(tmp_path):
    def interrupt(state):
        if state.step == 3 * EVERY:
            raise KeyboardInterrupt

    folder = dln.Checkpoint(tmp_path / "run", every=5, seconds=0)
    with pytest.raises(KeyboardInterrupt):
        train("dense", "square", interrupt, folder, singular_values=None)
    with pytest.raises(ValueError, match=r"step is 7, but the weights were recorded at .*weights_every"):
        train("dense", "square", lambda state: state.weights() and None, folder, singular_values=None)
    steps = []

    def count_losses(state):
        steps.append((state.step, len(state.losses)))

    train("dense", "square", count_losses, folder, singular_values=None)
    assert steps == [(step, step + 1) for step in [*range(0, STEPS, EVERY), STEPS]]


@pytest.mark.parametrize(
    "read",
    [lambda s: s.weights(), lambda s: s.end_to_end(), lambda s: s.singular_values(1), lambda s: s.losses],
)
def test_a_state_is_read_inside_its_callback_only(read):
    kept = []
    train("dense", "square", kept.append)  # a method of one parameter
    assert [state.step for state in kept] == [*range(0, STEPS, EVERY), STEPS]
    with pytest.raises(RuntimeError, match="the state of step 7 was read after its callback had returned"):
        read(kept[1])


def test_values_that_are_not_recorded_are_an_error():
    with pytest.raises(ValueError, match="no singular values were recorded"):
        train("dense", "square", lambda state: state.singular_values(1) is None, singular_values=None)
    with pytest.raises(ValueError, match="layer is 4; wanted 1 to 3"):
        train("reduced", "square", lambda state: state.singular_values(4) is None)


def test_what_a_callback_takes_decides_what_it_gets():
    class Method:
        def of_two(self, step, loss):
            seen.append((step, loss))

        def of_one(self, state):
            seen.append((state.step, state.loss))

    def optional(step, loss=None):
        seen.append((step, loss))

    def gather(*arguments):
        seen.append(arguments)

    results = []
    seen = []
    for callback in (Method().of_two, Method().of_one, optional, gather):
        seen.clear()
        run = train("reduced", "square", callback)
        assert seen == list(zip(run.steps.tolist(), run.loss[run.steps].tolist(), strict=True))
        results.append(list(seen))
    assert all(each == results[0] for each in results)


@pytest.mark.parametrize("callback", [lambda: None, lambda a, b, c: None, lambda *, state: None])
def test_callbacks_with_other_parameters_are_refused_before_the_run(callback):
    with pytest.raises(TypeError, match=r"record.callback takes \(.*wanted a callable of \(step, loss\)"):
        train("reduced", "square", callback)


@pytest.mark.parametrize("takes", ["two", "one"])
def test_a_plateau_calls_either_kind_of_callback(takes):
    seen = []
    rule = Plateau(
        (lambda step, loss: seen.append(step)) if takes == "two" else (lambda s: seen.append(s.step))
    )
    run = dln.train(
        PROBLEM, draw("square"), learning_rate=1e-9, steps=3000, record=dln.Record(every=100, callback=rule)
    )
    assert run.outcome == "stopped"
    assert seen == run.steps.tolist()
    assert run.steps[-1] == 500


def test_training_without_a_state_to_offer_refuses_its_callbacks():
    problem = dln.low_rank_completion(dim=40, rank=2, observed=0.5)
    weights = dln.orthogonal([40] * 4, 1e-2, seed=1)
    options = {"rank": 2, "learning_rate": "adaptive", "steps": 20}
    record = dln.Record(every=10, singular_values=None, callback=lambda state: False)
    for changes, caller in (
        ({"outer": 0.0}, "frozen outer layers"),
        ({"outer_every": 5}, "outer_every above 1"),
    ):
        with pytest.raises(TypeError, match=f"takes a state, which train_compressed with {caller}"):
            dln.train_compressed(problem, weights, record=record, **options, **changes)
    products = []
    record = dln.Record(
        every=10, singular_values=None, callback=lambda state: products.append(state.end_to_end())
    )
    run = dln.train_compressed(problem, weights, record=record, **options)
    np.testing.assert_array_equal(products[-1], run.end_to_end())


# Weights of every record by default.


@pytest.mark.parametrize("is_saved", [False, True])
def test_small_dense_runs_keep_the_weights_of_every_record(is_saved, tmp_path):
    folder = dln.Checkpoint(tmp_path / "run", every=10) if is_saved else None
    run = train("dense", "square", None, folder)
    explicit = train("dense", "square", None, weights_every=EVERY)
    for step in run.steps:
        np.testing.assert_array_equal(run.weights(2, int(step)), explicit.weights(2, int(step)))
    np.testing.assert_array_equal(run.loss, explicit.loss)
    assert run.balancedness().shape == (len(run.steps), 2)


@pytest.mark.parametrize("change", ["large", "no values", "asked for"])
def test_other_dense_runs_keep_the_weights_that_they_ask_for(change, monkeypatch):
    options = {"no values": {"singular_values": None}, "asked for": {"weights_every": STEPS}}.get(change, {})
    if change == "large":
        n_entries = sum(w.size for w in draw("square"))
        monkeypatch.setattr(request, "SNAPSHOT_BYTES", 9 * n_entries * 8 - 1)  # of 9 snapshots
    run = train("dense", "square", None, **options)
    with pytest.raises(ValueError, match="step is 7, but the weights were recorded at"):
        run.weights(1, 7)


def test_a_folder_without_weights_resumes_without_them(tmp_path, monkeypatch):
    """Earlier versions kept none; the settings, and so the identity of the folder, are the same."""

    def interrupt(step, loss):
        if step == 4 * EVERY:
            raise KeyboardInterrupt

    folder = dln.Checkpoint(tmp_path / "run", every=5, seconds=0)
    with monkeypatch.context() as earlier:
        earlier.setattr(request, "SNAPSHOT_BYTES", 0)
        with pytest.raises(KeyboardInterrupt):
            train("dense", "square", interrupt, folder)
    run = train("dense", "square", None, folder)
    whole = train("dense", "square", None)
    np.testing.assert_array_equal(run.loss, whole.loss)
    np.testing.assert_array_equal(run.weights(1), whole.weights(1))
    assert run.states.snapshots == ()
    with pytest.raises(ValueError, match="step is 7, but the weights were recorded at"):
        run.weights(1, 7)


def test_weights_that_just_fit_are_kept(monkeypatch):
    n_entries = sum(w.size for w in draw("square"))
    monkeypatch.setattr(request, "SNAPSHOT_BYTES", 9 * n_entries * 8)
    assert train("dense", "square", None).weights(1, 7).shape == (DIM, DIM)
