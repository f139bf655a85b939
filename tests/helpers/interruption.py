# SPDX-License-Identifier: MIT
"""Callbacks that stop a run with an exception."""

from __future__ import annotations

from collections.abc import Callable


class StopTraining(Exception):
    """Raised by `stop_at`."""


def stop_at(step: int) -> Callable[[int, float], None]:
    """Return a callback that raises at the first record from this step on."""

    def callback(recorded_step: int, loss: float) -> None:
        del loss
        if recorded_step >= step:
            raise StopTraining

    return callback
