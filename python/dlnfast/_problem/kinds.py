# SPDX-License-Identifier: MIT
"""The kinds of problems that `train` takes, as one type."""

from __future__ import annotations

from .observations import Observations
from .problem import Problem
from .samples import SampleProblem

AnyProblem = Problem | Observations | SampleProblem
