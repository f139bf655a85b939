# SPDX-License-Identifier: MIT
"""States of runs on samples: those of whole layers, with full losses and biases at the records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np

from .._support.arrays import FloatArray
from .._support.file_checks import check_array
from .._support.files import Arrays
from .._support.products import multiply
from .dense import DenseStates
from .packing import pack_list, unpack_list
from .states import Run, Table, find_record
from .variables import STEP, LayerVariables, Variable


@dataclass(frozen=True, kw_only=True)
class SampleStates(DenseStates):
    """Records of a run on a `SampleProblem`.

    Attributes
    ----------
    full_losses : ndarray, shape (n_records,)
        The loss of all samples, without label noise.
    biases : tuple of ndarray, shape (n_records, d_l)
        Biases of the layers; empty without biases.
    """

    layout: ClassVar[str] = "samples"

    full_losses: Table
    biases: tuple[FloatArray, ...]

    @classmethod
    def from_dense(
        cls, states: DenseStates, *, full_losses: Table, biases: tuple[FloatArray, ...]
    ) -> SampleStates:
        """Return the states with the records of whole layers from other states."""
        common = {f.name: getattr(states, f.name) for f in fields(DenseStates) if f.init}
        return cls(**common, full_losses=full_losses, biases=biases)

    def full_loss(self, run: Run) -> Table:
        return self.full_losses

    def biases_of(self, index: int) -> FloatArray:
        if not self.biases:
            return super().biases_of(index)
        return self.biases[index]

    def apply_layer(self, index: int, X: FloatArray, step: int, run: Run) -> FloatArray:
        """Return ``W_l X + b_l 1^T``."""
        product = multiply(self.weights(index, step, run), X)
        if not self.biases:
            return product
        shifted: FloatArray = product + self.biases[index][find_record(run.steps, step)][:, np.newaxis]
        return shifted

    # ------------------------------------------------------------------------------ files and tables

    def pack(self, arrays: Arrays, weights: bool) -> dict[str, Any]:
        meta = super().pack(arrays, weights)
        arrays["full_losses"] = self.full_losses
        meta["biases"] = pack_list("biases", self.biases, arrays)
        return meta

    @classmethod
    def unpack(cls, meta: Mapping[str, Any], arrays: Arrays, config: Mapping[str, Any]) -> Self:
        weights = {name: unpack_list(name, meta[name], arrays) for name in ("snapshots", "initial", "final")}
        return cls(
            snapshot_steps=arrays["snapshot_steps"],
            full_losses=arrays["full_losses"],
            biases=unpack_list("biases", meta["biases"], arrays),
            **cls.unpack_spectra(meta, arrays),
            **weights,
        )

    def check(self, run: Run) -> None:
        super().check(run)
        n_records, shapes = len(run.steps), run.shapes
        check_array(self.full_losses, "full_losses", (n_records,), dtype=np.float64)
        self.check_layers("biases", len(shapes))
        for i, biases in enumerate(self.biases):
            check_array(biases, f"biases_{i}", (n_records, shapes[i][0]))

    def add_variables(self, found: LayerVariables, run: Run) -> None:
        super().add_variables(found, run)
        found["full_loss"] = Variable((STEP,), "loss of all samples at the records", lambda: self.full_losses)
        if self.biases:
            found.add("biases", (STEP, "layer", "row"), "b_l, the biases", self.biases.__getitem__)
