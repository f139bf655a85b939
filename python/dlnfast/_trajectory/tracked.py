# SPDX-License-Identifier: MIT
"""States of a tracked model: spectra and angles that a tracker recorded while another program trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import numpy.typing as npt

from .._support.arrays import FloatArray
from .._support.files import Arrays
from .layer_spectra import RecordedSpectra
from .states import Run, Table
from .variables import OF_LAYERS, OF_VALUES, LayerVariables


@dataclass(frozen=True, kw_only=True)
class TrackedStates(RecordedSpectra):
    """Records of `dlnfast.torch.track`: no weights, and angles to a reference of the tracker's own.

    The attributes are those of `RecordedSpectra`.
    """

    has_every_loss: ClassVar[bool] = False
    missing_problem: ClassVar[str] = "a tracked model has no target whose rank is known"
    missing_losses: ClassVar[str] = "none were passed to the tracker's log_loss"

    def angles(self, index: int, side: str, reference: str | npt.ArrayLike, run: Run) -> Table:
        found = self._find_tracking(index).angles
        if not (isinstance(reference, str) and reference == "limit") or found is None:
            raise ValueError('a tracked run has angles to its own reference only: reference="limit"')
        angles: Table = found[:, int(side == "right")]
        return angles

    def block_angles(self, index: int, side: str) -> Table:
        found = self._find_tracking(index).block_angles
        if found is None:
            return super().block_angles(index, side)
        angles: Table = found[:, int(side == "right")]
        return angles

    def weights(self, index: int, step: int, run: Run) -> FloatArray:
        raise ValueError("a tracked run records no weights: the model has them")

    @classmethod
    def unpack(cls, meta: Mapping[str, Any], arrays: Arrays, config: Mapping[str, Any]) -> Self:
        return cls(**cls.unpack_spectra(meta, arrays))

    def has_angles(self, run: Run) -> bool:
        return bool(self.tracking) and self.tracking[0].angles is not None

    def add_angles(self, found: LayerVariables, run: Run) -> None:
        for side in ("left", "right"):
            text = f"angles of the {side} singular vectors to the reference"
            read = partial(self.angles, side=side, reference="limit", run=run)
            found.add(f"{side}_angles", OF_VALUES, text, read, "rad")
            text = f"largest angle between the span of the {side} singular vectors and the reference's"
            found.add(f"{side}_block_angles", OF_LAYERS, text, partial(self.block_angles, side=side), "rad")

    def describe(self, run: Run) -> str:
        last = int(run.steps[-1]) if len(run.steps) else 0
        return f"tracked, {run.n_layers} layers, {last} steps, {len(run.steps)} records"
