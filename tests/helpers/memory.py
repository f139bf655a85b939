# SPDX-License-Identifier: MIT
"""Memory use of an action."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Peak:
    """Largest number of bytes that Python and NumPy allocated; set at the end of `measure_peak`."""

    bytes: int


@contextmanager
def measure_peak() -> Iterator[Peak]:
    """Measure the largest number of bytes that Python and NumPy have allocated in the block."""
    peak = Peak()
    tracemalloc.start()
    try:
        yield peak
        peak.bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def peak_bytes(action: Callable[[], Any]) -> int:
    """Return the largest number of bytes that Python and NumPy have allocated during an action."""
    with measure_peak() as peak:
        action()
    return peak.bytes
