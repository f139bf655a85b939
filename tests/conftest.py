# SPDX-License-Identifier: MIT
"""Report header, and fixtures that several test modules share."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Before the first import of a helper, so that pytest explains failed assertions in helpers too.
pytest.register_assert_rewrite("helpers")
from helpers.core_modules import MODULES  # noqa: E402

import dlnfast  # noqa: E402


def pytest_report_header(config):
    info = dlnfast.build_info()
    return "dlnfast: " + ", ".join(f"{name} {value}" for name, value in info.items())


@pytest.fixture(scope="session")
def core_modules():
    """Return {level: module} of all modules that were built and that this processor runs."""
    return dict(MODULES)


@pytest.fixture(scope="session", params=MODULES.values(), ids=MODULES.keys())
def core(request):
    """Return one compiled module; the test runs once for each."""
    return request.param


@pytest.fixture
def problem(request):
    """Return a rank-2 problem of the module's width DIM; rates near 1 are stable."""
    return dlnfast.Problem(dlnfast.low_rank_recovery(request.module.DIM, 2, seed=1).target, loss_scale=0.01)


@pytest.fixture
def weights(request):
    """Return three orthogonal layers of the module's width DIM."""
    return dlnfast.orthogonal([request.module.DIM] * 4, 0.7, seed=2)


@pytest.fixture
def fixed_torch_seed():
    """Seed PyTorch with 0 for the test, and restore the state of its generator afterwards."""
    torch = pytest.importorskip("torch", reason="PyTorch is optional")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def lightning():
    """Return PyTorch Lightning."""
    return pytest.importorskip("lightning.pytorch", reason="Lightning is optional")


@pytest.fixture
def transformers(monkeypatch):
    """Return transformers without network access; skip if a package that its Trainer needs is missing."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("accelerate", reason="accelerate is optional")
    return pytest.importorskip("transformers", reason="transformers is optional")


@pytest.fixture
def run_python():
    """Return a function that runs a program in a fresh interpreter and returns its output."""

    def run(program, *arguments, timeout=60, check=True, **variables):
        environment = {**os.environ, **variables}
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={name: value for name, value in environment.items() if value is not None},
        )
        if not check:
            return done
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
