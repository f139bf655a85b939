# SPDX-License-Identifier: MIT
"""What the callbacks that follow singular values have in common, whichever program calls them."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from ..torch.layers import LayerChoice
from ..torch.track import Of, SpectralTracker, track
from ..trajectory import Trajectory


class Spectra:
    """The settings of a tracker, and the tracker from the start of a training on."""

    #: What starts a training.
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

    def _begin(self, model: nn.Module) -> SpectralTracker:
        """Take the record of step 0."""
        self._end()
        self.tracker = track(model, **self._settings)
        return self.tracker

    def _end(self) -> None:
        """Take the last record."""
        if self.tracker is not None:
            self.tracker.close()

    def trajectory(self, of: Of = "weights") -> Trajectory:
        """Return the records so far, as `SpectralTracker.trajectory` does.

        Raises
        ------
        RuntimeError
            Before the first training, and in processes other than that of rank 0.
        """
        if self.tracker is None:
            raise RuntimeError(f"there are no records: {self._starter} was not called, or this is not rank 0")
        return self.tracker.trajectory(of)
