# SPDX-License-Identifier: MIT
"""Thread counts and build information."""

from __future__ import annotations

from typing import Any

from ._arrays import check_count
from ._dispatch import available_levels, core

#: More threads than this are taken for a mistake.
MAX_THREADS = 4096


def set_num_threads(n: int) -> None:
    """Set the default number of threads of every call that asks for 0.

    Parameters
    ----------
    n : int
        0 restores OpenMP's own maximum, which obeys OMP_NUM_THREADS and threadpoolctl.

    Raises
    ------
    TypeError, ValueError
        For what is no number of threads: an integer, 0 to 4096.

    Notes
    -----
    Changes nothing outside dlnfast: neither OpenMP's settings nor those of NumPy's BLAS.

    Cost: O(1).
    """
    core.set_num_threads(check_count(n, "n", minimum=0, maximum=MAX_THREADS))


def build_info() -> dict[str, Any]:
    """Return how the compiled core was built and what it can use.

    Returns
    -------
    dict
        version, level (instruction set in use), levels (all that could be), compiler, eigen, openmp,
        vector_bytes and max_threads.

    Notes
    -----
    Cost: O(1).
    """
    return {**core.build_info(), "levels": available_levels()}
