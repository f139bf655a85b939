# SPDX-License-Identifier: MIT
"""What the report starts with, and the compiled modules that the tests share."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers.core_modules import MODULES

import dlnfast


def pytest_report_header(config):
    info = dlnfast.build_info()
    return "dlnfast: " + ", ".join(f"{name} {value}" for name, value in info.items())


@pytest.fixture(scope="session")
def core_modules():
    """Return {level: module} of all modules that were built and that this processor runs."""
    return dict(MODULES)


@pytest.fixture(scope="session", params=MODULES.values(), ids=MODULES.keys())
def core(request):
    """Return one of these modules after the other."""
    return request.param


@pytest.fixture
def run_python():
    """Return a function that runs a program in a fresh interpreter and returns what it printed."""

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
