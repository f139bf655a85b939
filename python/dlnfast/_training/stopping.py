# SPDX-License-Identifier: MIT
"""Stopping rules: callbacks of `train` that return True to end a run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Final

__all__ = ["Plateau"]

_LEAST_WINDOW: Final = 500
_STALLED: Final = 1e-5


class Plateau:
    """End a run whose loss fell by less than 1e-5 of itself in the last fifth of the steps, at least 500.

    Parameters
    ----------
    callback : callable, optional
        Another callback, which is called first; of (step, loss), or of a `CallbackState`.
    """

    def __init__(self, callback: Callable[..., bool | None] | None = None) -> None:
        self.callback = callback
        self._steps: list[int] = []
        self._losses: list[float] = []

    def __call__(self, step: int, loss: float) -> bool:
        """Call the other callback of (step, loss), and store the loss; return whether to stop the run."""
        is_stopped = self.callback is not None and self.callback(step, loss) is True
        return self.add(step, loss) or is_stopped

    def add(self, step: int, loss: float) -> bool:
        """Store the loss of a record; return whether to stop the run."""
        self._steps.append(step)
        self._losses.append(loss)
        before = bisect_right(self._steps, step - max(_LEAST_WINDOW, step // 5)) - 1
        return before >= 0 and loss > (1 - _STALLED) * self._losses[before]
