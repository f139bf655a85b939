# SPDX-License-Identifier: MIT
"""Runs that are kept in a folder: the same bits, whatever ends them, whatever happens to the files."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from records import with_record

import dlnfast as dln
from dlnfast import Checkpoint
from dlnfast._support import checkpoint, files
from dlnfast._support.checkpoint import RunFolder
from dlnfast._training.jobs import Outputs
from dlnfast.cli import main


class Stop(Exception):
    pass


def stop_at(step):
    def callback(now, loss):
        del loss
        if now >= step:
            raise Stop

    return callback


def same(a, b):
    """Compare what two runs hold, but for times and for what follows singular values."""
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


def setting(name):
    dim, options = CASES[name]
    options = dict(options)
    problem = dln.low_rank_recovery(dim, options.pop("rank", 3))
    weights = dln.orthogonal([dim] * 4, dtype=options.pop("dtype", "float64"))
    return problem, weights, {"steps": 60, "n_threads": 1, **options}


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_goes_on_is_the_run_that_was(name, tmp_path):
    problem, weights, options = setting(name)
    plain = dln.train(problem, weights, **options)
    for cut in (0, 17, 60):
        kept = Checkpoint(tmp_path / f"run{cut}", every=7, seconds=0)
        with pytest.raises(Stop) as caught:
            dln.train(problem, weights, **with_record(options, callback=stop_at(cut)), checkpoint=kept)
        partial = caught.value.trajectory
        n = len(partial.loss)
        assert n - 1 >= cut
        np.testing.assert_array_equal(partial.loss, plain.loss[:n])
        assert partial.config["outcome"] == "unfinished"
        run = dln.resume(kept.directory)
        same(plain, run)
        assert run.config["outcome"] == "finished"
        same(plain, dln.train(problem, weights, **options, checkpoint=kept))  # it has ended: read
        same(plain, dln.load(kept.directory))
    uninterrupted = dln.train(problem, weights, **options, checkpoint=tmp_path / "whole")
    same(plain, uninterrupted)
    assert uninterrupted.problem is problem


@settings(max_examples=15, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    every=st.integers(1, 50),
    record_every=st.integers(1, 50),
    weights_every=st.one_of(st.none(), st.integers(1, 50)),
)
def test_any_cuts_and_intervals(cuts, every, record_every, weights_every, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    problem = dln.low_rank_recovery(9, 2)
    weights = dln.orthogonal([9] * 3)
    record = dln.Record(every=record_every, weights_every=weights_every)
    options = {"learning_rate": 0.8, "momentum": 0.4, "steps": 41, "record": record}
    options |= {"engine": "dense", "n_threads": 1}
    plain = dln.train(problem, weights, **options)
    kept = Checkpoint(folder, every=every, seconds=0)
    for cut in cuts:
        with contextlib.suppress(Stop):
            dln.train(problem, weights, **with_record(options, callback=stop_at(cut)), checkpoint=kept)
    same(plain, dln.train(problem, weights, **options, checkpoint=kept))


class Patience:
    """A rule that needs to know the records before."""

    def __init__(self, count, cut=None):
        self.count, self.cut, self.seen = count, cut, []

    def __call__(self, step, loss):
        self.seen.append((step, loss))
        if step == self.cut:
            raise Stop
        return len(self.seen) >= self.count


@pytest.mark.parametrize("engine", ["reduced", "dense"])
@pytest.mark.parametrize("record_every", [1, 3])
@pytest.mark.parametrize("cut", [0, 6, 12])
def test_rules_for_stopping_find_what_they_knew(engine, record_every, cut, tmp_path):
    problem, weights = dln.low_rank_recovery(9, 2), dln.orthogonal([9] * 3)
    options = {"learning_rate": 0.5, "steps": 60, "record": dln.Record(every=record_every), "engine": engine}
    options["n_threads"] = 1
    plain_rule = Patience(13)
    plain = dln.train(problem, weights, **with_record(options, callback=plain_rule))
    assert plain.config["outcome"] == "stopped"
    kept = Checkpoint(tmp_path / "run", every=5, seconds=0)
    with pytest.raises(Stop):
        dln.train(problem, weights, **with_record(options, callback=Patience(13, cut)), checkpoint=kept)
    rule = Patience(13)
    same(plain, dln.train(problem, weights, **with_record(options, callback=rule), checkpoint=kept))
    assert rule.seen == plain_rule.seen


class TestTurns:
    """Runs whose outer layers move once in some steps."""

    RECORD: ClassVar = dln.Record(every=10, singular_values=None, weights_every=20)
    OPTIONS: ClassVar = {"outer_every": 5, "steps": 100, "record": RECORD}

    def train(self, **more):
        problem = dln.low_rank_completion(60, 2, observed=0.4)
        law = dln.orthogonal([60] * 4, scale=1e-2, implicit=True)
        return dln.train_compressed(problem, law, rank=2, **self.OPTIONS | more, n_threads=1)

    @pytest.mark.parametrize("rate", ["adaptive", 0.05])
    @pytest.mark.parametrize("cut", [0, 30, 90])
    def test_they_go_on(self, cut, rate, tmp_path):
        plain_rule = Patience(100)
        plain = self.train(learning_rate=rate, record=replace(self.RECORD, callback=plain_rule))
        kept = Checkpoint(tmp_path / "run", seconds=0)
        with pytest.raises(Stop):
            self.train(
                learning_rate=rate, checkpoint=kept, record=replace(self.RECORD, callback=stop_at(cut))
            )
        rule = Patience(100)
        run = self.train(learning_rate=rate, checkpoint=kept, record=replace(self.RECORD, callback=rule))
        same(plain, run)
        assert rule.seen == plain_rule.seen
        same(plain, self.train(learning_rate=rate, checkpoint=kept))  # it is read
        assert plain.config == run.config
        with pytest.raises(ValueError, match="holds another run"):
            self.train(learning_rate=0.01, checkpoint=kept)
        with pytest.raises(ValueError, match="its format is 'dlnfast run in turns'"):
            dln.load(kept.directory)

    def test_those_that_converge_or_stop_are_read(self, tmp_path):
        for name, more, outcome in (
            ("a", {"tolerance": 1e-3}, "converged"),
            ("b", {"record": replace(self.RECORD, callback=lambda step, loss: step >= 50)}, "stopped"),
        ):
            first = self.train(checkpoint=tmp_path / name, **more)
            assert first.config["outcome"] == outcome
            same(first, self.train(checkpoint=tmp_path / name, **more))


def test_compressed_runs_go_on(tmp_path):
    problem = dln.low_rank_completion(60, 2, observed=0.5)
    law = dln.orthogonal([60] * 4, scale=1e-2, implicit=True)
    for outer in (0.0, 0.01):  # projected, and with outer layers that learn
        options = {
            "rank": 2,
            "outer": outer,
            "n_threads": 1,
            "record": dln.Record(every=10, singular_values=None),
        }
        plain = dln.train_compressed(problem, law, **options)
        kept = Checkpoint(tmp_path / f"outer {outer}", every=40, seconds=0)
        with pytest.raises(Stop):
            dln.train_compressed(
                problem,
                law,
                **with_record(options, callback=stop_at(100), singular_values=None),
                checkpoint=kept,
            )
        other = tmp_path / f"copy {outer}"
        shutil.copytree(kept.directory, other)
        same(plain, dln.train_compressed(problem, law, **options, checkpoint=kept))
        # The command line knows the rule that ends such runs.
        np.testing.assert_array_equal(dln.resume(other).loss, plain.loss)


def test_batches_go_on(tmp_path, monkeypatch):
    problem = dln.low_rank_recovery(12, 2)
    law = dln.orthogonal([12] * 3, scale=0.5, implicit=True)
    starts = [dln.orthogonal([12] * n, scale=0.5, seed=n) for n in (3, 4, 3, 4, 3)] + [law]
    rates = [0.5, 0.5, 1e6, 0.4, 0.3, 0.2]  # one diverges
    options = {"learning_rate": rates, "steps": 40, "record": dln.Record(every=10), "n_threads": 1}
    plain = dln.train_batch(problem, starts, **options)
    assert "diverged" in plain.outcomes
    calls = []
    whole = dln.batch.descend_together

    def counted(plans, limit):
        if len(calls) == limit:
            raise Stop
        calls.append(len(plans))
        return whole(plans)

    kept = Checkpoint(tmp_path / "batch", every=2)
    monkeypatch.setattr(dln.batch, "descend_together", lambda plans: counted(plans, 2))
    with pytest.raises(Stop):
        dln.train_batch(problem, starts, **options, checkpoint=kept)
    monkeypatch.setattr(dln.batch, "descend_together", lambda plans: counted(plans, 99))
    batch = dln.train_batch(problem, starts, **options, checkpoint=kept)
    assert sum(calls) == len(starts)  # none ran twice
    again = dln.train_batch(problem, starts, **options, checkpoint=kept)
    assert sum(calls) == len(starts)
    for other in (batch, again):
        assert other.outcomes == plain.outcomes
        np.testing.assert_array_equal(other.loss[:-1], plain.loss[:-1])
        # A law is drawn anew, to rounding, where it is not read.
        np.testing.assert_allclose(other.loss[-1], plain.loss[-1], rtol=1e-12)
        for a, b in zip(plain[:-1], other[:-1], strict=True):
            assert a.problem is b.problem
            np.testing.assert_array_equal(a.singular_values(2), b.singular_values(2))
            np.testing.assert_array_equal(a.weights(1), b.weights(1))
    np.testing.assert_array_equal(again[-1].loss, batch[-1].loss)
    np.testing.assert_array_equal(again[-1].singular_values(1), batch[-1].singular_values(1))
    with pytest.raises(ValueError, match="holds another run"):
        dln.train_batch(dln.Problem(problem.target, loss_scale=2.0), starts, **options, checkpoint=kept)
    with pytest.raises(ValueError, match="holds another run"):
        dln.train_batch(problem, starts, **options | {"steps": 41}, checkpoint=kept)


def ratings():
    rng = np.random.default_rng(0)
    pairs = np.unique(rng.integers(0, [40, 30], (500, 2)), axis=0)
    left, right = rng.standard_normal((40, 2)), rng.standard_normal((30, 2))
    known = np.sum(left[pairs[:, 0]] * right[pairs[:, 1]], axis=1)
    return pairs, known + 0.1 * rng.standard_normal(len(pairs))


@pytest.mark.parametrize("cut", [1, 7, 23, 40, -1])
def test_fits_go_on(cut, tmp_path, monkeypatch):
    pairs, known = ratings()
    options = {"steps": 200, "n_threads": 1, "rank": 4}
    plain = dln.MatrixCompletion(**options).fit(pairs, known)
    whole, calls = dln.estimator.train, []

    def counted(*arguments, **settings):
        calls.append(settings["steps"])
        if len(calls) == cut or (cut == -1 and settings["steps"] > 10):
            settings["callback"] = stop_at(5)
        return whole(*arguments, **settings)

    model = dln.MatrixCompletion(**options, checkpoint=Checkpoint(tmp_path, every=3, seconds=0))
    monkeypatch.setattr(dln.estimator, "train", counted)
    with pytest.raises(Stop):
        model.fit(pairs, known)
    before = len(calls)
    monkeypatch.setattr(dln.estimator, "train", whole)
    again = dln.MatrixCompletion(**options, checkpoint=tmp_path)
    repeated = []
    monkeypatch.setattr(
        dln.estimator, "train", lambda *a, **k: (repeated.append(k["steps"]), whole(*a, **k))[1]
    )
    again.fit(pairs, known)
    assert again.validation_ == plain.validation_
    assert (again.n_steps_, again.weight_decay_) == (plain.n_steps_, plain.weight_decay_)
    for name in ("row_factors_", "column_factors_", "singular_values_", "row_bias_"):
        np.testing.assert_array_equal(getattr(again, name), getattr(plain, name))
    for one, other in zip(plain.trajectories_, again.trajectories_, strict=True):
        same(one, other)
    # What had ended was not done again.
    rerun, once = len(repeated), []
    monkeypatch.setattr(dln.estimator, "train", lambda *a, **k: (once.append(1), whole(*a, **k))[1])
    dln.MatrixCompletion(**options).fit(pairs, known)
    assert before - 1 + rerun <= len(once) + 1
    # Another fit has a folder of its own.
    dln.MatrixCompletion(**options | {"rank": 3}, checkpoint=tmp_path).fit(pairs, known)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.5, "record": dln.Record(weights_every=4, singular_values=2)}]
)
def test_runs_of_torch_go_on(options, tmp_path):
    pytest.importorskip("torch", reason="PyTorch is optional")
    problem = dln.low_rank_recovery(20, 2)
    weights = dln.orthogonal([20] * 3)
    options = {"engine": "torch", "learning_rate": 0.5, "steps": 40, "n_threads": 1} | options
    plain = dln.train(problem, weights, **options)
    kept = Checkpoint(tmp_path / "run", every=6, seconds=0)
    with pytest.raises(Stop):
        dln.train(problem, weights, **with_record(options, callback=stop_at(20)), checkpoint=kept)
    same(plain, dln.resume(tmp_path / "run"))


def test_completions_go_on(tmp_path):
    problem = dln.low_rank_completion(40, 2, observed=0.5)
    weights = dln.gaussian([40, 30, 40], 0.1)
    options = {"learning_rate": 0.1, "steps": 40, "n_threads": 1, "record": dln.Record(singular_values=2)}
    plain = dln.train(problem, weights, **options)
    kept = Checkpoint(tmp_path / "run", every=6, seconds=0)
    with pytest.raises(Stop):
        dln.train(problem, weights, **with_record(options, callback=stop_at(20)), checkpoint=kept)
    same(plain, dln.resume(tmp_path / "run"))


def test_laws_go_on(tmp_path):
    problem = dln.low_rank_recovery(400, 12)
    law = dln.orthogonal([400] * 4, implicit=True)
    options = {"learning_rate": 0.5, "momentum": 0.6, "steps": 40, "n_threads": 1}
    kept = Checkpoint(tmp_path / "run", every=6, seconds=0)
    with pytest.raises(Stop):
        dln.train(problem, law, **with_record(options, callback=stop_at(20)), checkpoint=kept)
    # Two processes draw the same law to rounding; the run stays in the subspaces of the first.
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "run" / "run.npz", tmp_path / "other" / "run.npz")
    same(dln.resume(tmp_path / "run"), dln.resume(tmp_path / "other"))


def test_outcomes_are_kept(tmp_path):
    problem, weights, options = setting("reduced")
    run = dln.train(problem, weights, **options, tolerance=0.1, checkpoint=tmp_path / "a")
    assert run.config["outcome"] == dln.load(tmp_path / "a").config["outcome"] == "converged"
    stopped = dln.train(
        problem,
        weights,
        **with_record(options, callback=lambda step, loss: step == 5),
        checkpoint=tmp_path / "b",
    )
    assert (stopped.config["outcome"], len(stopped.loss)) == ("stopped", 6)
    options["learning_rate"] = 1e6
    for _ in range(2):  # the second time it is read
        with pytest.raises(dln.DivergedError, match="the loss is not finite at step") as caught:
            dln.train(problem, weights, **options, checkpoint=tmp_path / "c")
        assert caught.value.trajectory is not None
        assert caught.value.step == len(caught.value.trajectory.loss)


def test_the_command_line_goes_on(tmp_path, capsys):
    problem, weights, options = setting("reduced")
    kept = Checkpoint(tmp_path / "run", every=5, seconds=0)
    with pytest.raises(Stop):
        dln.train(problem, weights, **with_record(options, callback=stop_at(20)), checkpoint=kept)
    assert main(["resume", str(kept.directory)]) == 0
    assert "training: 60 steps" in capsys.readouterr().out
    same(dln.train(problem, weights, **options), dln.load(kept.directory))
    assert main(["resume", str(tmp_path / "nothing")]) == 2
    assert "holds no run" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- damage


@pytest.fixture
def cut_short(tmp_path):
    problem, weights, options = setting("small dense")
    kept = Checkpoint(tmp_path / "run", every=5, seconds=0)
    with pytest.raises(Stop):
        dln.train(problem, weights, **with_record(options, callback=stop_at(32)), checkpoint=kept)
    return kept, problem, weights, options


def test_a_damaged_state_gives_way_to_the_one_before(cut_short):
    kept, problem, weights, options = cut_short
    states = sorted(kept.directory.glob("state-*.npz"))
    assert [path.stem[-2:] for path in states] == ["30", "32"]
    states[-1].write_bytes(states[-1].read_bytes()[:300])
    plain = dln.train(problem, weights, **options)
    with pytest.warns(RuntimeWarning, match=r"complete file of a dlnfast state.*going on"):
        run = dln.train(problem, weights, **options, checkpoint=kept)
    same(plain, run)


def test_without_a_state_the_run_starts_again(cut_short):
    kept, problem, weights, options = cut_short
    for path in kept.directory.glob("state-*.npz"):
        path.unlink()
    same(dln.train(problem, weights, **options), dln.train(problem, weights, **options, checkpoint=kept))


def test_folders_of_other_runs_are_refused(cut_short, tmp_path):
    kept, problem, weights, options = cut_short
    for changed in ({"learning_rate": 0.9}, {"steps": 61}, {"record": dln.Record(every=5)}):
        with pytest.raises(ValueError, match="holds another run"):
            dln.train(problem, weights, **options | changed, checkpoint=kept)
    with pytest.raises(ValueError, match="holds another run"):
        dln.train(problem, dln.orthogonal([20] * 4, seed=1), **options, checkpoint=kept)
    rescaled = dln.Problem(problem.target, loss_scale=0.5)
    with pytest.raises(ValueError, match="holds another run"):
        dln.train(rescaled, weights, **options, checkpoint=kept)
    (kept.directory / "run.npz").unlink()
    with pytest.raises(ValueError, match=r"has (state|records)-\d+.npz but no run.npz"):
        dln.train(problem, weights, **options, checkpoint=kept)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        dln.resume(kept.directory)
    with pytest.raises(FileNotFoundError):
        dln.load(tmp_path / "nothing")
    with pytest.raises(TypeError, match="checkpoint is int; wanted a path or a Checkpoint"):
        dln.train(problem, weights, **options, checkpoint=3)
    with pytest.raises(ValueError, match=r"checkpoint.every is 0"):
        Checkpoint("x", every=0)


def test_foreign_and_newer_files_are_named(cut_short):
    kept, *_ = cut_short
    place = kept.directory / "run.npz"
    content = place.read_bytes()
    for damage, text in (
        (b"no zip", "it is not an .npz file"),
        (content[: len(content) // 2], "is not a complete file of a dlnfast run"),
    ):
        place.write_bytes(damage)
        with pytest.raises(ValueError, match=text):
            dln.resume(kept.directory)
    np.savez(place, a=np.zeros(3))
    with pytest.raises(ValueError, match="other arrays"):
        dln.resume(kept.directory)
    np.savez(place, meta=np.array('{"format": "dlnfast run", "format_version": 99, "version": "9.9"}'))
    with pytest.raises(ValueError, match=r"has format 99, written by dlnfast 9.9"):
        dln.resume(kept.directory)


def test_no_file_holds_a_pickle(cut_short):
    kept, *_ = cut_short
    for path in kept.directory.glob("*.npz"):
        with zipfile.ZipFile(path) as file:
            for name in file.namelist():
                assert file.read(name)[:6] == b"\x93NUMPY"
                assert b"'|O'" not in file.read(name)[:200]


# ------------------------------------------------------------------- errors that pass, and full disks


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE, errno.ENOMEM])
@pytest.mark.parametrize("what", ["open", "read", "list"])
def test_states_that_cannot_be_read_for_a_moment_stay(code, what, cut_short, monkeypatch):
    kept, problem, weights, options = cut_short
    before = names(kept.directory)

    def failing(*arguments, **settings):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        if what == "open":
            patch.setattr(checkpoint, "read_whole", failing)
        elif what == "read":
            # zipfile says of an OSError while it looks for the directory that the file is no zip file.
            patch.setattr(zipfile, "_EndRecData", failing)
        else:
            patch.setattr(os, "listdir", failing)
        with pytest.raises(OSError, match=re.escape(os.strerror(code))) as caught:
            dln.train(problem, weights, **options, checkpoint=kept)
        assert caught.value.errno == code
    assert names(kept.directory) == before
    same(dln.train(problem, weights, **options), dln.train(problem, weights, **options, checkpoint=kept))


def test_too_little_memory_for_a_state_is_no_damage(cut_short, monkeypatch):
    kept, problem, weights, options = cut_short
    before = names(kept.directory)

    def failing(*arguments, **settings):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(files, "open_archive", failing)
        with pytest.raises(MemoryError):
            dln.train(problem, weights, **options, checkpoint=kept)
    assert names(kept.directory) == before


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("engine", ["dense", "reduced"])
def test_a_resumed_run_that_cannot_write_its_first_state(engine, error, tmp_path, monkeypatch):
    problem, weights = dln.low_rank_recovery(9, 2), dln.orthogonal([9] * 3)
    options = {"learning_rate": 0.5, "steps": 30, "engine": engine, "n_threads": 1}
    options["record"] = dln.Record(singular_values=None)
    plain = dln.train(problem, weights, **options)
    kept = Checkpoint(tmp_path / "run", every=4, seconds=0)
    with pytest.raises(Stop):
        dln.train(problem, weights, **with_record(options, callback=stop_at(10)), checkpoint=kept)

    def failing(self, state):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_state", failing)
        with pytest.raises(type(error)) as caught:
            dln.train(problem, weights, **options, checkpoint=kept)
    if isinstance(error, OSError):
        assert "is lost" in caught.value.__notes__[-1]
    so_far = dln.load(kept.directory)
    assert len(so_far.loss) > 11
    np.testing.assert_array_equal(so_far.loss, plain.loss[: len(so_far.loss)])
    same(plain, dln.resume(kept.directory))


def test_a_signal_between_two_drains_counts_no_step_twice():
    outputs = Outputs.__new__(Outputs)
    outputs._numbers = np.array([3, 5, 2, 1, 5, 1])
    outputs.counts = outputs._numbers[1:]
    assert outputs.last_step == 7
    outputs.empty()
    assert (outputs.begin, outputs.last_step, outputs.n_losses) == (8, 7, 0)
    assert outputs.between_steps


# -------------------------------------------------------------------------------- signals and kills


def test_handlers_that_python_did_not_install_stay(tmp_path, monkeypatch):
    problem, weights, options = setting("reduced")
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *arguments: pytest.fail("another handler was installed"))
    run = dln.train(problem, weights, **options, checkpoint=tmp_path / "run")
    assert run.config["outcome"] == "finished"


PROGRAM = """
import sys
import dlnfast as dln
problem = dln.low_rank_recovery(60, 3)
dln.train(problem, dln.orthogonal([60] * 4), learning_rate=0.2, momentum=0.5, steps=%d, n_threads=1,
          engine="dense", record=dln.Record(every=50, singular_values=2),
          checkpoint=dln.Checkpoint(sys.argv[1], every=50, seconds=0.02))
print("done")
"""


def start(folder, steps):
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
    process = start(tmp_path / "run", steps)
    wait_for("state-*.npz", tmp_path / "run", process)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT), error
    so_far = dln.load(tmp_path / "run")
    state = RunFolder(tmp_path / "run").newest()
    assert state is not None
    assert state.step == len(so_far.loss) - 1 < steps
    assert not list((tmp_path / "run").glob("*.part"))


def test_kills_cost_nothing_but_time(tmp_path):
    steps = 6000
    process = start(tmp_path / "whole", steps)
    assert process.communicate(timeout=120)[0] == "done\n"
    whole = dln.load(tmp_path / "whole")
    generator = np.random.default_rng(0)
    kills = 0
    for _ in range(200):
        process = start(tmp_path / "run", steps)
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
    same(whole, dln.load(tmp_path / "run"))


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_a_run_that_has_just_begun_can_be_read(tmp_path, engine):
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
