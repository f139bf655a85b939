# SPDX-License-Identifier: MIT
"""All instruction-set levels give the same results, and each contains only its own instructions."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from helpers.core_modules import MODULES
from tolerances import tolerance

import dlnfast as dln
from dlnfast import _cpu
from dlnfast._closure import growth
from dlnfast._support import products
from dlnfast._training import jobs

PROGRAM = """
import json
import dlnfast as dln
problem = dln.low_rank_recovery(dim=24, rank=2, seed=1)
weights = dln.orthogonal([24] * 4, scale=0.7, seed=1)
losses = {}
for engine in ("reduced", "dense"):
    run = dln.train(problem, weights, learning_rate=5.0, steps=40, engine=engine)
    losses[engine] = run.loss.tolist()
print(json.dumps([dln.build_info()["level"], losses]))
"""


def test_the_environment_variable_selects_the_level(run_python):
    if list(MODULES) == ["native"]:
        pytest.skip("a build for this machine alone has no levels to select")
    results = {}
    for level in MODULES:
        found, losses = json.loads(run_python(PROGRAM, DLNFAST_LEVEL=level))
        assert found == level
        results[level] = losses
    first = next(iter(results.values()))
    for losses in results.values():
        for engine in ("reduced", "dense"):
            np.testing.assert_allclose(losses[engine], first[engine], rtol=tolerance(np.float64, 24, 40))


def test_without_the_environment_variable_the_best_level_is_used(run_python):
    found, _ = json.loads(run_python(PROGRAM, DLNFAST_LEVEL=None))
    assert found == list(MODULES)[-1]


def test_an_unknown_level_is_an_import_error(run_python):
    done = run_python("import dlnfast", DLNFAST_LEVEL="v9", check=False)
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "DLNFAST_LEVEL is 'v9'; wanted one of baseline, v3, v4" in done.stderr


def test_a_level_that_the_processor_lacks_is_an_import_error(run_python):
    program = """
import sys, types
probe = types.ModuleType("dlnfast._cpu")
probe.supported_levels = lambda: ["baseline"]
sys.modules["dlnfast._cpu"] = probe
import dlnfast
"""
    done = run_python(program, DLNFAST_LEVEL="v4", check=False)
    assert "ImportError: DLNFAST_LEVEL is 'v4'; this processor runs baseline" in done.stderr


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "widths",
    [[30] * 4, [40, 40, 40, 5], [5, 37, 37, 37], [33, 7, 33], [70, 70, 70]],
    ids=["square", "thin output", "thin input", "bottleneck", "above the thin limit"],
)
def test_levels_agree_on_whole_runs(monkeypatch, widths, dtype):
    rng = np.random.default_rng(0)
    problem = dln.Problem(rng.standard_normal((widths[-1], widths[0])), loss_scale=1e-2)
    weights = dln.gaussian(widths, scale=0.8, seed=2, dtype=dtype)
    runs = []
    for module in MODULES.values():
        monkeypatch.setattr(jobs, "core", module)
        runs.append(dln.train(problem, weights, learning_rate=1.0, weight_decay=1e-3, momentum=0.5, steps=50))
    for run in runs[1:]:
        # Both runs have rounding errors, hence twice the tolerance of one.
        limit = 2 * tolerance(dtype, max(widths), 50)
        np.testing.assert_allclose(run.loss, runs[0].loss, rtol=limit)
        for layer in range(1, len(widths)):
            difference = np.linalg.norm(run.weights(layer) - runs[0].weights(layer))
            assert difference <= limit * np.linalg.norm(runs[0].weights(layer))
            np.testing.assert_allclose(
                run.singular_values(layer),
                runs[0].singular_values(layer),
                atol=limit * runs[0].singular_values(layer).max(),
            )


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 18])
def test_levels_agree_on_reduced_runs(monkeypatch, rank):
    problem = dln.low_rank_recovery(dim=80, rank=rank, seed=rank)
    weights = dln.orthogonal([80] * 4, scale=0.9, seed=rank)
    runs = []
    for module in MODULES.values():
        monkeypatch.setattr(jobs, "core", module)
        monkeypatch.setattr(growth, "core", module)
        monkeypatch.setattr(products, "core", module)
        runs.append(dln.train(problem, weights, learning_rate=2.0, steps=60, engine="reduced"))
    for run in runs[1:]:
        np.testing.assert_allclose(run.loss, runs[0].loss, rtol=2 * tolerance(np.float64, 80, 60))


def disassembly(module):
    tool = shutil.which("objdump")
    if tool is None:
        pytest.skip("objdump is not installed")
    return subprocess.run(
        [tool, "-d", "--no-show-raw-insn", module.__file__], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    ("level", "forbidden"), [("baseline", r"%[yz]mm\d"), ("v3", r"%zmm\d")], ids=["baseline", "v3"]
)
def test_a_level_contains_no_instruction_of_a_higher_one(level, forbidden):
    if set(MODULES) != {"baseline", "v3", "v4"} and len(MODULES) < len(_cpu.supported_levels()):
        pytest.skip("this build holds a single level")
    if level not in MODULES:
        pytest.skip(f"this processor does not run {level}")
    assert re.search(forbidden, disassembly(MODULES[level])) is None


def test_the_highest_level_uses_its_registers():
    if "v4" not in MODULES:
        pytest.skip("this processor does not run v4")
    assert len(re.findall(r"%zmm\d", disassembly(MODULES["v4"]))) > 100
