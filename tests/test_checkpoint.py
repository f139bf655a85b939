# SPDX-License-Identifier: MIT
"""Checkpointed runs resume bit for bit, however they were stopped and whatever happened to the files."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from helpers.files import file_names
from helpers.interruption import StopTraining, stop_at
from helpers.optional_packages import import_torch
from helpers.records import with_record
from hypothesis import given, settings
from hypothesis import strategies as st

import dlnfast as dln
from dlnfast import Checkpoint
from dlnfast._completion import gradient_descent, variational
from dlnfast._support import checkpoint as checkpoint_module
from dlnfast._support import files
from dlnfast._support.checkpoint import RunFolder
from dlnfast._training import batch as batch_module
from dlnfast._training.jobs import Outputs
from dlnfast.cli import main


def assert_same_training(a, b):
    """Compare two runs bit for bit, except for times; singular values of the tracker within their errors."""
    assert a.engine == b.engine
    np.testing.assert_array_equal(a.loss, b.loss)
    np.testing.assert_array_equal(a.steps, b.steps)
    if a.rates is not None:
        np.testing.assert_array_equal(a.rates, b.rates)
    if a.engine == "reduced":
        for x, y in zip(a.states.cores, b.states.cores, strict=True):
            np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(a.states.rho, b.states.rho)
        return
    for name in ("final", "snapshots", "snapshot_steps", "initial"):
        left, right = getattr(a.states, name), getattr(b.states, name)
        assert (left is None) == (right is None)
        for x, y in zip(left, right, strict=True) if left is not None else ():
            np.testing.assert_array_equal(x, y)
    for layer in range(1, a.n_layers + 1) if a.states.values else ():
        gap = np.abs(a.singular_values(layer).astype(float) - b.singular_values(layer))
        bound = a.singular_value_errors(layer) + b.singular_value_errors(layer)
        assert np.all(gap <= bound + 1e-5 * a.singular_values(layer)[:, :1])


CASES = {
    "reduced": (30, {"learning_rate": 1.0}),
    "reduced, momentum, decay": (
        30,
        {
            "learning_rate": [0.5, 0.4, 0.3],
            "momentum": 0.5,
            "weight_decay": 1e-3,
            "record": dln.Record(every=3),
        },
    ),
    "reduced, wide core": (90, {"learning_rate": 0.5, "momentum": 0.9, "rank": 20}),
    "small dense": (
        20,
        {"engine": "dense", "learning_rate": 1.0, "record": dln.Record(every=4), "momentum": 0.3},
    ),
    "dense": (
        50,
        {
            "engine": "dense",
            "learning_rate": 0.5,
            "momentum": 0.6,
            "record": dln.Record(weights_every=5, singular_values=4, vectors=True),
        },
    ),
    "dense, all values": (40, {"engine": "dense", "learning_rate": 0.5, "record": dln.Record(every=10)}),
    "adaptive": (50, {"learning_rate": "adaptive", "record": dln.Record(singular_values=None, every=7)}),
    "float32": (
        40,
        {
            "engine": "dense",
            "learning_rate": 0.5,
            "dtype": "float32",
            "record": dln.Record(singular_values=2),
        },
    ),
}


def make_case(name):
    dim, options = CASES[name]
    options = dict(options)
    problem = dln.low_rank_recovery(dim, options.pop("rank", 3))
    weights = dln.orthogonal([dim] * 4, dtype=options.pop("dtype", "float64"))
    return problem, weights, {"steps": 60, "n_threads": 1, **options}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_uninterrupted_run(name, tmp_path):
    problem, weights, options = make_case(name)
    plain = dln.train(problem, weights, **options)
    for cut in (0, 17, 60):
        checkpoint = Checkpoint(tmp_path / f"run{cut}", every=7, seconds=0)
        with pytest.raises(StopTraining) as caught:
            dln.train(problem, weights, **with_record(options, callback=stop_at(cut)), checkpoint=checkpoint)
        partial = caught.value.trajectory
        n = len(partial.loss)
        assert n - 1 >= cut
        np.testing.assert_array_equal(partial.loss, plain.loss[:n])
        assert partial.outcome == "unfinished"
        run = dln.resume(checkpoint.directory)
        assert_same_training(plain, run)
        assert run.outcome == "finished"
        assert_same_training(
            plain, dln.train(problem, weights, **options, checkpoint=checkpoint)
        )  # it is finished: loaded
        assert_same_training(plain, dln.load(checkpoint.directory))
    uninterrupted = dln.train(problem, weights, **options, checkpoint=tmp_path / "whole")
    assert_same_training(plain, uninterrupted)
    assert uninterrupted.problem is problem


@settings(max_examples=15, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    every=st.integers(1, 50),
    record_every=st.integers(1, 50),
    weights_every=st.one_of(st.none(), st.integers(1, 50)),
)
def test_runs_stopped_at_any_step_resume_bit_for_bit(
    cuts, every, record_every, weights_every, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("runs") / "run"
    problem = dln.low_rank_recovery(9, 2)
    weights = dln.orthogonal([9] * 3)
    record = dln.Record(every=record_every, weights_every=weights_every)
    options = {"learning_rate": 0.8, "momentum": 0.4, "steps": 41, "record": record}
    options |= {"engine": "dense", "n_threads": 1}
    plain = dln.train(problem, weights, **options)
    checkpoint = Checkpoint(folder, every=every, seconds=0)
    for cut in cuts:
        with contextlib.suppress(StopTraining):
            dln.train(problem, weights, **with_record(options, callback=stop_at(cut)), checkpoint=checkpoint)
    assert_same_training(plain, dln.train(problem, weights, **options, checkpoint=checkpoint))


class Patience:
    """A stopping rule that depends on the previous records."""

    def __init__(self, count, cut=None):
        self.count, self.cut, self.seen = count, cut, []

    def __call__(self, step, loss):
        self.seen.append((step, loss))
        if step == self.cut:
            raise StopTraining
        return len(self.seen) >= self.count


@pytest.mark.parametrize("engine", ["reduced", "dense"])
@pytest.mark.parametrize("record_every", [1, 3])
@pytest.mark.parametrize("cut", [0, 6, 12])
def test_saved_records_are_replayed_to_stopping_rules(engine, record_every, cut, tmp_path):
    problem, weights = dln.low_rank_recovery(9, 2), dln.orthogonal([9] * 3)
    options = {"learning_rate": 0.5, "steps": 60, "record": dln.Record(every=record_every), "engine": engine}
    options["n_threads"] = 1
    plain_rule = Patience(13)
    plain = dln.train(problem, weights, **with_record(options, callback=plain_rule))
    assert plain.outcome == "stopped"
    checkpoint = Checkpoint(tmp_path / "run", every=5, seconds=0)
    with pytest.raises(StopTraining):
        dln.train(problem, weights, **with_record(options, callback=Patience(13, cut)), checkpoint=checkpoint)
    rule = Patience(13)
    assert_same_training(
        plain, dln.train(problem, weights, **with_record(options, callback=rule), checkpoint=checkpoint)
    )
    assert rule.seen == plain_rule.seen


class TestOuterSteps:
    """Runs whose outer layers are updated once in several steps."""

    RECORD: ClassVar = dln.Record(every=10, singular_values=None, weights_every=20)
    OPTIONS: ClassVar = {"outer_every": 5, "steps": 100, "record": RECORD}

    def train(self, **more):
        problem = dln.low_rank_completion(60, 2, observed=0.4)
        lazy_weights = dln.orthogonal([60] * 4, scale=1e-2, implicit=True)
        return dln.train_compressed(problem, lazy_weights, rank=2, **self.OPTIONS | more, n_threads=1)

    @pytest.mark.parametrize("rate", ["adaptive", 0.05])
    @pytest.mark.parametrize("cut", [0, 30, 90])
    def test_runs_with_projected_outer_steps_resume(self, cut, rate, tmp_path):
        plain_rule = Patience(100)
        plain = self.train(learning_rate=rate, record=replace(self.RECORD, callback=plain_rule))
        checkpoint = Checkpoint(tmp_path / "run", seconds=0)
        with pytest.raises(StopTraining):
            self.train(
                learning_rate=rate, checkpoint=checkpoint, record=replace(self.RECORD, callback=stop_at(cut))
            )
        rule = Patience(100)
        run = self.train(
            learning_rate=rate, checkpoint=checkpoint, record=replace(self.RECORD, callback=rule)
        )
        assert_same_training(plain, run)
        assert rule.seen == plain_rule.seen
        assert_same_training(plain, self.train(learning_rate=rate, checkpoint=checkpoint))  # it is loaded
        assert plain.config == run.config
        with pytest.raises(ValueError, match="holds another run"):
            self.train(learning_rate=0.01, checkpoint=checkpoint)
        with pytest.raises(ValueError, match="its format is 'dlnfast run in turns'"):
            dln.load(checkpoint.directory)

    def test_runs_with_outer_steps_that_converged_or_stopped_are_loaded(self, tmp_path):
        for name, more, outcome in (
            ("a", {"tolerance": 1e-3}, "converged"),
            ("b", {"record": replace(self.RECORD, callback=lambda step, loss: step >= 50)}, "stopped"),
        ):
            first = self.train(checkpoint=tmp_path / name, **more)
            assert first.outcome == outcome
            assert_same_training(first, self.train(checkpoint=tmp_path / name, **more))


def test_compressed_runs_resume(tmp_path):
    problem = dln.low_rank_completion(60, 2, observed=0.5)
    lazy_weights = dln.orthogonal([60] * 4, scale=1e-2, implicit=True)
    for outer in (0.0, 0.01):  # projected, and with outer layers that learn
        options = {
            "rank": 2,
            "outer": outer,
            "n_threads": 1,
            "record": dln.Record(every=10, singular_values=None),
        }
        plain = dln.train_compressed(problem, lazy_weights, **options)
        checkpoint = Checkpoint(tmp_path / f"outer {outer}", every=40, seconds=0)
        with pytest.raises(StopTraining):
            dln.train_compressed(
                problem,
                lazy_weights,
                **with_record(options, callback=stop_at(100), singular_values=None),
                checkpoint=checkpoint,
            )
        other = tmp_path / f"copy {outer}"
        shutil.copytree(checkpoint.directory, other)
        assert_same_training(
            plain, dln.train_compressed(problem, lazy_weights, **options, checkpoint=checkpoint)
        )
        # The command line applies the rule that stops such runs.
        np.testing.assert_array_equal(dln.resume(other).loss, plain.loss)


def test_batches_resume(tmp_path, monkeypatch):
    problem = dln.low_rank_recovery(12, 2)
    lazy_weights = dln.orthogonal([12] * 3, scale=0.5, implicit=True)
    starts = [dln.orthogonal([12] * n, scale=0.5, seed=n) for n in (3, 4, 3, 4, 3)] + [lazy_weights]
    rates = [0.5, 0.5, 1e6, 0.4, 0.3, 0.2]  # one diverges
    options = {"learning_rate": rates, "steps": 40, "record": dln.Record(every=10), "n_threads": 1}
    plain = dln.train_batch(problem, starts, **options)
    assert "diverged" in plain.outcomes
    calls = []
    whole = batch_module.descend_together

    def counted(plans, limit):
        if len(calls) == limit:
            raise StopTraining
        calls.append(len(plans))
        return whole(plans)

    checkpoint = Checkpoint(tmp_path / "batch", every=2)
    monkeypatch.setattr(batch_module, "descend_together", lambda plans: counted(plans, 2))
    with pytest.raises(StopTraining):
        dln.train_batch(problem, starts, **options, checkpoint=checkpoint)
    monkeypatch.setattr(batch_module, "descend_together", lambda plans: counted(plans, 99))
    batch = dln.train_batch(problem, starts, **options, checkpoint=checkpoint)
    assert sum(calls) == len(starts)  # none ran twice
    again = dln.train_batch(problem, starts, **options, checkpoint=checkpoint)
    assert sum(calls) == len(starts)
    for other in (batch, again):
        assert other.outcomes == plain.outcomes
        np.testing.assert_array_equal(other.loss[:-1], plain.loss[:-1])
        # Lazily sampled weights that are not loaded are resampled, up to rounding.
        np.testing.assert_allclose(other.loss[-1], plain.loss[-1], rtol=1e-12)
        for a, b in zip(plain[:-1], other[:-1], strict=True):
            assert a.problem is b.problem
            np.testing.assert_array_equal(a.singular_values(2), b.singular_values(2))
            np.testing.assert_array_equal(a.weights(1), b.weights(1))
    np.testing.assert_array_equal(again[-1].loss, batch[-1].loss)
    np.testing.assert_array_equal(again[-1].singular_values(1), batch[-1].singular_values(1))
    with pytest.raises(ValueError, match="holds another run"):
        dln.train_batch(dln.Problem(problem.target, loss_scale=2.0), starts, **options, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="holds another run"):
        dln.train_batch(problem, starts, **options | {"steps": 41}, checkpoint=checkpoint)


def draw_ratings():
    rng = np.random.default_rng(0)
    pairs = np.unique(rng.integers(0, [40, 30], (500, 2)), axis=0)
    left, right = rng.standard_normal((40, 2)), rng.standard_normal((30, 2))
    known = np.sum(left[pairs[:, 0]] * right[pairs[:, 1]], axis=1)
    return pairs, known + 0.1 * rng.standard_normal(len(pairs))


@pytest.mark.parametrize("cut", [1, 7, 23, 40, -1])
def test_fits_of_the_estimator_resume(cut, tmp_path, monkeypatch):
    pairs, known = draw_ratings()
    layers = dln.LayerOptions(keep_trajectories=True)
    options = {"method": "gradient", "steps": 200, "n_threads": 1, "rank": 4, "layers": layers}
    plain = dln.MatrixCompletion(**options).fit(pairs, known)
    whole, calls = gradient_descent.train, []

    def counted(*arguments, **settings):
        calls.append(settings["steps"])
        if len(calls) == cut or (cut == -1 and settings["steps"] > 10):
            settings["record"] = replace(settings["record"], callback=stop_at(5))
        return whole(*arguments, **settings)

    model = dln.MatrixCompletion(**options, checkpoint=Checkpoint(tmp_path, every=3, seconds=0))
    monkeypatch.setattr(gradient_descent, "train", counted)
    with pytest.raises(StopTraining):
        model.fit(pairs, known)
    before = len(calls)
    monkeypatch.setattr(gradient_descent, "train", whole)
    again = dln.MatrixCompletion(**options, checkpoint=tmp_path)
    repeated = []
    monkeypatch.setattr(
        gradient_descent, "train", lambda *a, **k: (repeated.append(k["steps"]), whole(*a, **k))[1]
    )
    again.fit(pairs, known)
    assert again.validation_ == plain.validation_
    assert (again.n_steps_, again.weight_decay_) == (plain.n_steps_, plain.weight_decay_)
    for name in ("row_factors_", "column_factors_", "singular_values_", "row_bias_"):
        np.testing.assert_array_equal(getattr(again, name), getattr(plain, name))
    for one, other in zip(plain.trajectories_, again.trajectories_, strict=True):
        assert_same_training(one, other)
    # Finished runs were not repeated.
    rerun, once = len(repeated), []
    monkeypatch.setattr(gradient_descent, "train", lambda *a, **k: (once.append(1), whole(*a, **k))[1])
    dln.MatrixCompletion(**options).fit(pairs, known)
    assert before - 1 + rerun <= len(once) + 1
    # Another fit has its own folder.
    dln.MatrixCompletion(**options | {"rank": 3}, checkpoint=tmp_path).fit(pairs, known)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("cut", [3, 9, 30, 55, -1])
def test_sweeps_of_the_estimator_resume(cut, tmp_path, monkeypatch):
    pairs, known = draw_ratings()
    options = {"n_threads": 1, "rank": 4, "steps": 12}
    sweep, n_sweeps = variational.Posterior.sweep, []
    monkeypatch.setattr(variational.Posterior, "sweep", lambda self: (n_sweeps.append(1), sweep(self)))
    plain = dln.MatrixCompletion(**options).fit(pairs, known)
    whole = len(n_sweeps)
    stop_after = min(cut, whole - 2) if cut > 0 else whole
    n_sweeps.clear()

    def stopped(self):
        n_sweeps.append(1)
        if len(n_sweeps) == stop_after:
            raise StopTraining
        sweep(self)

    monkeypatch.setattr(variational.Posterior, "sweep", stopped)
    checkpoint = Checkpoint(tmp_path, seconds=0)
    with pytest.raises(StopTraining):
        dln.MatrixCompletion(**options, checkpoint=checkpoint).fit(pairs, known)
    done = len(n_sweeps) - 1
    n_sweeps.clear()
    monkeypatch.setattr(variational.Posterior, "sweep", lambda self: (n_sweeps.append(1), sweep(self)))
    again = dln.MatrixCompletion(**options, checkpoint=tmp_path).fit(pairs, known)
    assert done + len(n_sweeps) == whole  # no sweep was repeated
    assert again.validation_ == plain.validation_
    assert (again.n_steps_, again.noise_variance_) == (plain.n_steps_, plain.noise_variance_)
    for name in ("row_factors_", "column_factors_", "singular_values_", "row_bias_"):
        np.testing.assert_array_equal(getattr(again, name), getattr(plain, name))


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.5, "record": dln.Record(weights_every=4, singular_values=2)}]
)
def test_runs_of_the_torch_engine_resume(options, tmp_path):
    import_torch()
    problem = dln.low_rank_recovery(20, 2)
    weights = dln.orthogonal([20] * 3)
    options = {"engine": "torch", "learning_rate": 0.5, "steps": 40, "n_threads": 1} | options
    plain = dln.train(problem, weights, **options)
    checkpoint = Checkpoint(tmp_path / "run", every=6, seconds=0)
    with pytest.raises(StopTraining):
        dln.train(problem, weights, **with_record(options, callback=stop_at(20)), checkpoint=checkpoint)
    assert_same_training(plain, dln.resume(tmp_path / "run"))


def test_completion_runs_resume(tmp_path):
    problem = dln.low_rank_completion(40, 2, observed=0.5)
    weights = dln.gaussian([40, 30, 40], 0.1)
    options = {"learning_rate": 0.1, "steps": 40, "n_threads": 1, "record": dln.Record(singular_values=2)}
    plain = dln.train(problem, weights, **options)
    checkpoint = Checkpoint(tmp_path / "run", every=6, seconds=0)
    with pytest.raises(StopTraining):
        dln.train(problem, weights, **with_record(options, callback=stop_at(20)), checkpoint=checkpoint)
    assert_same_training(plain, dln.resume(tmp_path / "run"))


def test_runs_from_lazily_sampled_weights_resume(tmp_path):
    problem = dln.low_rank_recovery(400, 12)
    lazy_weights = dln.orthogonal([400] * 4, implicit=True)
    options = {"learning_rate": 0.5, "momentum": 0.6, "steps": 40, "n_threads": 1}
    checkpoint = Checkpoint(tmp_path / "run", every=6, seconds=0)
    with pytest.raises(StopTraining):
        dln.train(problem, lazy_weights, **with_record(options, callback=stop_at(20)), checkpoint=checkpoint)
    # Two processes sample the same weights up to rounding; the run stays in the subspaces of the first.
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "run" / "run.npz", tmp_path / "other" / "run.npz")
    assert_same_training(dln.resume(tmp_path / "run"), dln.resume(tmp_path / "other"))


def test_outcomes_are_saved(tmp_path):
    problem, weights, options = make_case("reduced")
    run = dln.train(problem, weights, **options, tolerance=0.1, checkpoint=tmp_path / "a")
    assert run.outcome == dln.load(tmp_path / "a").outcome == "converged"
    stopped = dln.train(
        problem,
        weights,
        **with_record(options, callback=lambda step, loss: step == 5),
        checkpoint=tmp_path / "b",
    )
    assert (stopped.outcome, len(stopped.loss)) == ("stopped", 6)
    options["learning_rate"] = 1e6
    for _ in range(2):  # the second time it is loaded
        with pytest.raises(dln.DivergedError, match="the loss is not finite at step") as caught:
            dln.train(problem, weights, **options, checkpoint=tmp_path / "c")
        assert caught.value.trajectory is not None
        assert caught.value.step == len(caught.value.trajectory.loss)


def test_the_command_line_resumes_a_run(tmp_path, capsys):
    problem, weights, options = make_case("reduced")
    checkpoint = Checkpoint(tmp_path / "run", every=5, seconds=0)
    with pytest.raises(StopTraining):
        dln.train(problem, weights, **with_record(options, callback=stop_at(20)), checkpoint=checkpoint)
    assert main(["resume", str(checkpoint.directory)]) == 0
    assert "training: 60 steps" in capsys.readouterr().out
    assert_same_training(dln.train(problem, weights, **options), dln.load(checkpoint.directory))


def test_the_command_line_names_a_folder_without_a_run(tmp_path, capsys):
    assert main(["resume", str(tmp_path / "nothing")]) == 2
    assert "holds no run" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- damage


@pytest.fixture
def cut_short(tmp_path):
    problem, weights, options = make_case("small dense")
    checkpoint = Checkpoint(tmp_path / "run", every=5, seconds=0)
    with pytest.raises(StopTraining):
        dln.train(problem, weights, **with_record(options, callback=stop_at(32)), checkpoint=checkpoint)
    return checkpoint, problem, weights, options


def test_a_damaged_state_is_replaced_by_the_previous_one(cut_short):
    checkpoint, problem, weights, options = cut_short
    states = sorted(checkpoint.directory.glob("state-*.npz"))
    assert [path.stem[-2:] for path in states] == ["30", "32"]
    states[-1].write_bytes(states[-1].read_bytes()[:300])
    plain = dln.train(problem, weights, **options)
    with pytest.warns(RuntimeWarning, match=r"complete file of a dlnfast state.*resuming"):
        run = dln.train(problem, weights, **options, checkpoint=checkpoint)
    assert_same_training(plain, run)


def test_without_a_state_the_run_starts_again(cut_short):
    checkpoint, problem, weights, options = cut_short
    for path in checkpoint.directory.glob("state-*.npz"):
        path.unlink()
    assert_same_training(
        dln.train(problem, weights, **options), dln.train(problem, weights, **options, checkpoint=checkpoint)
    )


def test_folders_of_other_runs_are_refused(cut_short):
    checkpoint, problem, weights, options = cut_short
    for changed in ({"learning_rate": 0.9}, {"steps": 61}, {"record": dln.Record(every=5)}):
        with pytest.raises(ValueError, match="holds another run"):
            dln.train(problem, weights, **options | changed, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="holds another run"):
        dln.train(problem, dln.orthogonal([20] * 4, seed=1), **options, checkpoint=checkpoint)
    rescaled = dln.Problem(problem.target, loss_scale=0.5)
    with pytest.raises(ValueError, match="holds another run"):
        dln.train(rescaled, weights, **options, checkpoint=checkpoint)


def test_a_folder_without_its_first_file_is_refused(cut_short):
    checkpoint, problem, weights, options = cut_short
    (checkpoint.directory / "run.npz").unlink()
    with pytest.raises(ValueError, match=r"has (state|records)-\d+.npz but no run.npz"):
        dln.train(problem, weights, **options, checkpoint=checkpoint)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        dln.resume(checkpoint.directory)


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        dln.load(tmp_path / "nothing")


def test_errors_name_bad_checkpoints(cut_short):
    _, problem, weights, options = cut_short
    with pytest.raises(TypeError, match="checkpoint is int; wanted a path or a Checkpoint"):
        dln.train(problem, weights, **options, checkpoint=3)
    with pytest.raises(ValueError, match=r"checkpoint.every is 0"):
        Checkpoint("x", every=0)


def test_errors_name_files_of_other_programs_and_newer_versions(cut_short):
    checkpoint, *_ = cut_short
    path = checkpoint.directory / "run.npz"
    content = path.read_bytes()
    for damage, text in (
        (b"no zip", "it is not an .npz file"),
        (content[: len(content) // 2], "is not a complete file of a dlnfast run"),
    ):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=text):
            dln.resume(checkpoint.directory)
    np.savez(path, a=np.zeros(3))
    with pytest.raises(ValueError, match="other arrays"):
        dln.resume(checkpoint.directory)
    np.savez(path, meta=np.array('{"format": "dlnfast run", "format_version": 99, "version": "9.9"}'))
    with pytest.raises(ValueError, match=r"has format 99, written by dlnfast 9.9"):
        dln.resume(checkpoint.directory)


def test_no_file_contains_a_pickle(cut_short):
    checkpoint, *_ = cut_short
    for path in checkpoint.directory.glob("*.npz"):
        with zipfile.ZipFile(path) as file:
            for name in file.namelist():
                assert file.read(name)[:6] == b"\x93NUMPY"
                assert b"'|O'" not in file.read(name)[:200]


# ------------------------------------------------------------------- temporary errors and full disks


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE, errno.ENOMEM])
@pytest.mark.parametrize("what", ["open", "read", "list"])
def test_temporarily_unreadable_states_are_not_deleted(code, what, cut_short, monkeypatch):
    checkpoint, problem, weights, options = cut_short
    before = file_names(checkpoint.directory)

    def failing(*arguments, **settings):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        if what == "open":
            patch.setattr(checkpoint_module, "read_whole", failing)
        elif what == "read":
            # zipfile reports an OSError while it reads the directory of the archive as "not a zip file".
            patch.setattr(zipfile, "_EndRecData", failing)
        else:
            patch.setattr(os, "listdir", failing)
        with pytest.raises(OSError, match=re.escape(os.strerror(code))) as caught:
            dln.train(problem, weights, **options, checkpoint=checkpoint)
        assert caught.value.errno == code
    assert file_names(checkpoint.directory) == before
    assert_same_training(
        dln.train(problem, weights, **options), dln.train(problem, weights, **options, checkpoint=checkpoint)
    )


def test_too_little_memory_for_a_state_is_not_reported_as_damage(cut_short, monkeypatch):
    checkpoint, problem, weights, options = cut_short
    before = file_names(checkpoint.directory)

    def failing(*arguments, **settings):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(files, "open_archive", failing)
        with pytest.raises(MemoryError):
            dln.train(problem, weights, **options, checkpoint=checkpoint)
    assert file_names(checkpoint.directory) == before


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("engine", ["dense", "reduced"])
def test_a_resumed_run_that_cannot_write_keeps_its_states(engine, error, tmp_path, monkeypatch):
    problem, weights = dln.low_rank_recovery(9, 2), dln.orthogonal([9] * 3)
    options = {"learning_rate": 0.5, "steps": 30, "engine": engine, "n_threads": 1}
    options["record"] = dln.Record(singular_values=None)
    plain = dln.train(problem, weights, **options)
    checkpoint = Checkpoint(tmp_path / "run", every=4, seconds=0)
    with pytest.raises(StopTraining):
        dln.train(problem, weights, **with_record(options, callback=stop_at(10)), checkpoint=checkpoint)

    def failing(self, state):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_state", failing)
        with pytest.raises(type(error)) as caught:
            dln.train(problem, weights, **options, checkpoint=checkpoint)
    if isinstance(error, OSError):
        assert "is lost" in caught.value.__notes__[-1]
    so_far = dln.load(checkpoint.directory)
    assert len(so_far.loss) > 11
    np.testing.assert_array_equal(so_far.loss, plain.loss[: len(so_far.loss)])
    assert_same_training(plain, dln.resume(checkpoint.directory))


def test_a_signal_between_two_flushes_counts_no_step_twice():
    outputs = Outputs.__new__(Outputs)
    outputs._numbers = np.array([3, 5, 2, 1, 5, 1])
    outputs.counts = outputs._numbers[1:]
    assert outputs.last_step == 7
    outputs.empty()
    assert (outputs.begin, outputs.last_step, outputs.n_losses) == (8, 7, 0)
    assert outputs.between_steps


# -------------------------------------------------------------------------------- signals and kills


def test_signal_handlers_not_installed_by_python_are_not_replaced(tmp_path, monkeypatch):
    problem, weights, options = make_case("reduced")
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *arguments: pytest.fail("another handler was installed"))
    run = dln.train(problem, weights, **options, checkpoint=tmp_path / "run")
    assert run.outcome == "finished"


PROGRAM = """
import sys
import dlnfast as dln
problem = dln.low_rank_recovery(60, 3)
dln.train(problem, dln.orthogonal([60] * 4), learning_rate=0.2, momentum=0.5, steps=%d, n_threads=1,
          engine="dense", record=dln.Record(every=50, singular_values=2),
          checkpoint=dln.Checkpoint(sys.argv[1], every=50, seconds=0.02))
print("done")
"""


def start_training_process(folder, steps):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM % steps, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(pattern, folder, process):
    for _ in range(1500):
        if list(folder.glob(pattern)) or process.poll() is not None:
            return
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_write_a_state(number, tmp_path):
    steps = 10**6
    process = start_training_process(tmp_path / "run", steps)
    wait_for("state-*.npz", tmp_path / "run", process)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT), error
    so_far = dln.load(tmp_path / "run")
    state = RunFolder(tmp_path / "run").newest()
    assert state is not None
    assert state.step == len(so_far.loss) - 1 < steps
    assert not list((tmp_path / "run").glob("*.part"))


def test_killed_runs_resume_bit_for_bit(tmp_path):
    steps = 6000
    process = start_training_process(tmp_path / "whole", steps)
    assert process.communicate(timeout=120)[0] == "done\n"
    whole = dln.load(tmp_path / "whole")
    generator = np.random.default_rng(0)
    kills = 0
    for _ in range(200):
        process = start_training_process(tmp_path / "run", steps)
        wait_for("run.npz", tmp_path / "run", process)
        try:
            process.wait(generator.uniform(0.0, 0.3) if kills < 5 else 120)
        except subprocess.TimeoutExpired:
            # A reader finds a part of the run at any moment.
            part = dln.load(tmp_path / "run").loss
            np.testing.assert_array_equal(part, whole.loss[: len(part)])
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        if process.returncode == 0:
            break
    assert kills >= 3
    assert_same_training(whole, dln.load(tmp_path / "run"))


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_a_run_that_has_just_started_can_be_loaded(tmp_path, engine):
    problem, weights = dln.low_rank_recovery(6, 1), dln.orthogonal([6] * 3)
    dln.train(problem, weights, learning_rate=0.1, steps=3, engine=engine, checkpoint=tmp_path)
    for path in tmp_path.iterdir():
        if path.name != "run.npz":
            path.unlink()
    run = dln.load(tmp_path)
    assert repr(run) == f"Trajectory({engine}, widths [6, 6, 6], nothing recorded yet)"
    with pytest.raises(ValueError, match="recorded nothing yet"):
        run.weights(1)
    with pytest.raises(ValueError, match="run has no losses: nothing is recorded yet"):
        dln.plots.LossDisplay.from_trajectory(run)
