# SPDX-License-Identifier: MIT
"""Engines are found by name; a new engine needs a class and an entry in the registry."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from helpers.records import with_record
from tolerances import tolerance

import dlnfast as dln
from dlnfast import reference
from dlnfast._closure.certificate import Certificate
from dlnfast._support.dispatch import core
from dlnfast._training import choice
from dlnfast._training.core_engines import DenseEngine
from dlnfast._training.engines import load_engine
from dlnfast._training.jobs import DenseJob
from dlnfast._training.registry import ENGINES


class NumpyJob(DenseJob):
    """The steps of the dense engine in plain NumPy."""

    def run(self, arguments):
        request, counts = self.request, arguments["counts"]
        target = request.problem.target_factors().dense()
        rule = list(zip(request.learning_rate, request.weight_decay, request.momentum, strict=True))
        velocity = [np.zeros_like(w) for w in self.weights]
        for step in range(request.steps + 1):
            arguments["loss"][step] = request.problem.loss(reference.end_to_end(self.weights))
            counts[core.Count.losses] += 1
            if step % request.record_every == 0 or step == request.steps:
                record = counts[core.Count.records]
                arguments["record_steps"][record] = step
                for values, w in zip(
                    self.values, self.weights, strict=False
                ):  # empty if no values are recorded
                    values[record] = np.linalg.svd(w, compute_uv=False)[: values.shape[1]]
                counts[core.Count.records] += 1
            if step == request.steps:
                return "finished", step, 0
            gradients = reference.gradients(self.weights, target, None, request.problem.loss_scale)
            for w, v, g, (eta, decay, mu) in zip(self.weights, velocity, gradients, rule, strict=True):
                v[...] = mu * v + g + decay * w
                w -= eta * v


class NumpyEngine(DenseEngine):
    name = "numpy"

    def check(self, options, problem, weights):
        return Certificate("numpy", "engine='numpy' was asked for")

    def prepare(self, request):
        return NumpyJob(request)


@pytest.fixture
def numpy_engine(monkeypatch):
    monkeypatch.setitem(ENGINES, "numpy", f"{__name__}:NumpyEngine")


def case():
    problem, weights = dln.low_rank_recovery(12, 2, seed=0), dln.gaussian([12, 9, 12], 0.5, seed=1)
    record = dln.Record(every=7, singular_values=3)
    options = {"learning_rate": [0.3, 0.4], "weight_decay": 0.01, "momentum": [0.5, 0.0], "record": record}
    return problem, weights, options | {"steps": 40}


@pytest.mark.usefixtures("numpy_engine")
def test_a_new_engine_trains_like_the_dense_one():
    problem, weights, options = case()
    run = dln.train(problem, weights, engine="numpy", **options)
    dense = dln.train(problem, weights, engine="dense", **options)
    assert run.engine == run.config["engine"] == "numpy"
    allowed = tolerance(np.float64, 12, 40)
    np.testing.assert_array_equal(run.steps, dense.steps)
    np.testing.assert_allclose(run.loss, dense.loss, rtol=0, atol=allowed * dense.loss[0])
    for layer in (1, 2):
        size = np.linalg.norm(dense.weights(layer))
        assert np.linalg.norm(run.weights(layer) - dense.weights(layer)) <= allowed * size
        values = dense.singular_values(layer)
        bound = dense.singular_value_errors(layer) + allowed * values[:, :1]
        assert np.all(np.abs(run.singular_values(layer) - values) <= bound)


@pytest.mark.usefixtures("numpy_engine")
def test_a_new_engine_is_saved_and_specified_like_others(tmp_path):
    problem, weights, options = case()
    run = dln.train(problem, weights, engine="numpy", **with_record(options, singular_values=None))
    run.save(tmp_path / "run.npz")
    again = dln.load(tmp_path / "run.npz")
    assert again.engine == "numpy"
    np.testing.assert_array_equal(again.loss, run.loss)
    sections = {
        "problem": {"kind": "low-rank-recovery", "dim": 6, "rank": 1},
        "weights": {"depth": 2},
        "train": {"learning_rate": 0.1, "steps": 3, "engine": "numpy"},
    }
    assert dln.SweepGrid(sections).items[0].sections["train"]["engine"] == "numpy"


@pytest.mark.parametrize("name", ["auto", "reduced", "dense"])
def test_engines_of_the_core_have_no_device(name):
    with pytest.raises(ValueError, match=f"engine is '{name}:cuda'; wanted '{name}'"):
        load_engine(f"{name}:cuda")


def test_engines_are_imported_when_a_run_asks_for_them(run_python):
    program = """
import sys
import dlnfast as dln
dln.train(dln.low_rank_recovery(6, 1), dln.orthogonal([6] * 3), learning_rate=0.1, steps=2)
print("torch" in sys.modules, "dlnfast.torch" in sys.modules)
"""
    assert run_python(program).split() == ["False", "False"]
    assert "torch" in ENGINES
    assert sys.modules  # it is in the registry nevertheless


def test_the_device_of_the_torch_engine_is_part_of_its_name():
    pytest.importorskip("torch", reason="PyTorch is optional")
    problem, weights, options = case()
    run = dln.train(problem, weights, engine="torch:cpu", **with_record(options, singular_values=None))
    assert (run.engine, run.config["device"]) == ("torch", "cpu")
    with pytest.raises(ValueError, match="device is 'nowhere'"):
        dln.train(problem, weights, engine="torch:nowhere", **options)


def test_the_reduced_engine_refuses_adaptive_rates_before_it_finds_the_closure(monkeypatch):
    def find_closure(*arguments, **keywords):
        raise AssertionError("the closure was found")

    problem, weights, _ = case()
    monkeypatch.setattr(choice, "find_closure", find_closure)
    with pytest.raises(ValueError, match="learning_rate is adaptive, which is for the dense engine"):
        dln.train(problem, weights, engine="reduced", learning_rate="adaptive", steps=2)
