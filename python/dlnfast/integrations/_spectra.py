# SPDX-License-Identifier: MIT
"""`Spectra`: common base class of the callbacks that track singular values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from .._trajectory.trajectory import Trajectory
from ..torch.layers import LayerChoice
from ..torch.report import Report, Sink, StopTraining
from ..torch.track import Of, SpectralTracker, track


class Spectra:
    """Callback with the settings of a tracker and, after the start of a training, the tracker.

    Subclasses call the methods with an underscore from the hooks of their training library.
    """

    #: Function that starts a training, for messages.
    _starter = ""

    def __init__(
        self,
        layers: LayerChoice = None,
        *,
        k: int | Literal["all"] = 8,
        every: int = 10,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.tracker: SpectralTracker | None = None
        self._settings = {"layers": layers, "k": k, "every": every, **settings}
        self._has_warned = False
        #: Message of the alarm that stopped the training.
        self.stopped: str | None = None

    def _start_tracker(self, model: nn.Module, loggers: Sequence[Sink]) -> SpectralTracker:
        """Start a new tracker, which takes the record of step 0.

        The loggers of the trainer receive its metrics, unless the report has sinks.
        """
        self._close_tracker()
        self.stopped = None
        report = self._settings.get("report") or Report()
        if isinstance(report, Report) and report.sinks is None:
            report = replace(report, sinks=tuple(loggers))
        self.tracker = track(model, **{**self._settings, "report": report})
        return self.tracker

    def _finish_step(self, *, is_last: bool) -> bool:
        """Take a due record after a step; after the last step take a record in any case.

        Returns whether an alarm stops the training.
        """
        if self.tracker is None:
            return False
        try:
            self.tracker.finish_step()
        except StopTraining as stop:
            self.stopped = str(stop)
            warnings.warn(f"training is stopped by an alarm: {stop}", RuntimeWarning, stacklevel=3)
        if is_last or self.stopped is not None:
            self.tracker.record()
        return self.stopped is not None

    def _log_loss(self, loss: float, step: int) -> None:
        """Store a loss. One that is not finite is left out, because a callback must not stop the training."""
        if self.tracker is None or step < 0:
            return
        if math.isfinite(loss):
            self.tracker.log_loss(loss, step)
        elif not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the loss at step {step} is {loss}: losses that are not finite are not recorded",
                RuntimeWarning,
                stacklevel=3,
            )

    def _close_tracker(self) -> None:
        """Take the last record, and stop tracking."""
        if self.tracker is not None:
            self.tracker.close()

    def trajectory(self, of: Of = "weights") -> Trajectory:
        """Return the records so far; see `SpectralTracker.trajectory`.

        Parameters
        ----------
        of : {"weights", "change"}
            Tracked matrices: W(t), or W(t) - W(0).

        Returns
        -------
        Trajectory
            Records of all tracked layers.

        Raises
        ------
        RuntimeError
            Before the first training, and in processes of a rank other than 0.
        """
        if self.tracker is None:
            raise RuntimeError(f"there are no records: {self._starter} was not called, or this is not rank 0")
        return self.tracker.trajectory(of)
