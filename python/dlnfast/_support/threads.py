# SPDX-License-Identifier: MIT
"""Thread counts, cores and build information."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from .arrays import check_count
from .dispatch import available_levels, core

#: More threads than this are taken for a mistake.
MAX_THREADS = 4096


def set_num_threads(n: int) -> None:
    """Set the number of threads for all calls with ``n_threads=0``.

    Parameters
    ----------
    n : int
        Number of threads, 0 to 4096; 0 restores OpenMP's own maximum, which follows OMP_NUM_THREADS and
        threadpoolctl.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        If `n` is not between 0 and 4096.

    Notes
    -----
    The settings of OpenMP and of NumPy's BLAS stay as they are.

    Cost: O(1).
    """
    core.set_num_threads(check_count(n, "n", minimum=0, maximum=MAX_THREADS))


def build_info() -> dict[str, Any]:
    """Return facts on the compiled core: its version, its build and its limits.

    Returns
    -------
    dict
        version, level (instruction set in use), levels (all that are available), compiler, eigen, openmp,
        vector_bytes and max_threads.

    Notes
    -----
    Cost: O(1).
    """
    return {**core.build_info(), "levels": available_levels()}


def available_cores() -> int:
    """Return the number of cores for this process: the smaller of its affinity and its container's quota."""
    if hasattr(os, "process_cpu_count"):
        cores = int(os.process_cpu_count() or 1)  # pyright: ignore[reportAttributeAccessIssue]
    elif hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores
