# SPDX-License-Identifier: MIT
"""All instruction-set levels give the same results, and each contains only its own instructions."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
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
from dlnfast._support import dispatch, products
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


# Stands for the processor: `_cpu` answers like one that has only these levels.
OTHER_PROCESSOR = """
import sys, types
probe = types.ModuleType("dlnfast._cpu")
probe.supported_levels = lambda: {supported}
probe.missing_features = lambda level: ["avx512f", "avx512bw"]
sys.modules["dlnfast._cpu"] = probe
"""


def test_a_level_that_the_processor_lacks_is_an_import_error(run_python):
    program = OTHER_PROCESSOR.format(supported=["baseline"]) + "import dlnfast"
    done = run_python(program, DLNFAST_LEVEL="v4", check=False)
    assert "ImportError: DLNFAST_LEVEL is 'v4'; this processor runs baseline" in done.stderr


def test_a_level_that_was_not_built_is_an_import_error_with_the_command_to_build_it(run_python):
    absent = sorted(set(_cpu.supported_levels()) - set(MODULES))
    if not absent:
        pytest.skip("this build has all levels that this processor runs")
    done = run_python("import dlnfast", DLNFAST_LEVEL=absent[0], check=False)
    assert f"DLNFAST_LEVEL is '{absent[0]}'; this build has {', '.join(MODULES)}" in done.stderr
    assert "DLNFAST_SIMD=dispatch pip install" in done.stderr


REFUSED = """
try:
    import dlnfast
except ImportError as error:
    refusal = error
loaded = [name for name in sys.modules if name.startswith("dlnfast._core")]
print(json.dumps([type(refusal).__name__, str(refusal), refusal.level, refusal.missing, loaded]))
"""


def test_a_build_for_another_processor_is_refused_before_its_module_is_loaded(run_python):
    program = "import json\n" + OTHER_PROCESSOR.format(supported=[]) + REFUSED
    name, message, level, missing, loaded = json.loads(run_python(program, DLNFAST_LEVEL=None))
    assert name == "ProcessorError"
    assert message.startswith("dlnfast was built for ")
    assert "this processor lacks avx512f, avx512bw. Build it on this machine: 'pip install " in message
    assert (level, missing) == (built_levels()[0], ["avx512f", "avx512bw"])
    assert loaded == []


def test_the_processor_lacks_no_feature_of_a_level_that_it_runs():
    for level in ("baseline", "v3", "v4"):
        assert (_cpu.missing_features(level) == []) == (level in _cpu.supported_levels())


def built_levels():
    """Return the levels that were built, lowest first, also those that this processor does not run."""
    return [
        level
        for level, module in dispatch.MODULE_OF_LEVEL.items()
        if importlib.util.find_spec(f"dlnfast.{module}") is not None
    ]


def test_a_build_with_dispatch_has_all_levels():
    if os.environ.get("DLNFAST_SIMD") != "dispatch":
        pytest.skip("DLNFAST_SIMD is not dispatch, as it is in CI")
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    assert built_levels() == (["baseline", "v3", "v4"] if is_x86 else ["baseline"])


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
    if level not in MODULES:
        pytest.skip(f"this build, or this processor, does not have {level}")
    assert re.search(forbidden, disassembly(MODULES[level])) is None


def test_the_highest_level_uses_its_registers():
    if "v4" not in MODULES:
        pytest.skip("this build, or this processor, does not have v4")
    assert len(re.findall(r"%zmm\d", disassembly(MODULES["v4"]))) > 100
