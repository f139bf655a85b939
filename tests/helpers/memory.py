# SPDX-License-Identifier: MIT
"""Memory that an action takes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Peak:
    """The largest number of bytes that Python and NumPy held; set at the end of `measure_peak`."""

    bytes: int


@contextmanager
def measure_peak() -> Iterator[Peak]:
    """Measure the largest number of bytes that Python and NumPy hold at once in the block."""
    peak = Peak()
    tracemalloc.start()
    try:
        yield peak
        peak.bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def peak_bytes(action: Callable[[], Any]) -> int:
    """Return the largest number of bytes that Python and NumPy hold at once during an action."""
    with measure_peak() as peak:
        action()
    return peak.bytes
