# SPDX-License-Identifier: MIT
"""A progress bar over the steps of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ProgressBar:
    """A tqdm bar, which appears on a terminal after a second; without effect unless it is enabled."""

    def __init__(self, steps: int, enabled: bool) -> None:
        #: Function of step and loss, which the core calls from time to time; None if the bar is disabled.
        self.listener: Callable[[int, float], bool | None] | None = None
        self._bar: Any = None
        if enabled:
            from tqdm import tqdm

            self._bar = tqdm(total=steps, unit="step", delay=1.0, disable=None, leave=False)
            self.listener = self._update

    def _update(self, step: int, loss: float) -> None:
        self._bar.set_postfix_str(f"loss {loss:.3e}", refresh=False)
        self._bar.update(step - self._bar.n)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
