# SPDX-License-Identifier: MIT
"""What a fit has found so far, and the interface of the methods of `MatrixCompletion`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np

from .._problem.factors import entries_of_product
from .._support.arrays import FloatArray, random_generator
from .._support.checkpoint import Checkpoint, RunFolder
from .._support.checksums import compute_identity
from .._training.resumable import ResumableWork, own_folder, run_resumable
from .._trajectory.trajectory import Trajectory
from .entries import Biases, Entries, fit_biases
from .fold_in import FoldIn
from .options import Settings

Factors = tuple[FloatArray, FloatArray, FloatArray]
#: Sweeps over the biases before the method begins.
_FIRST_SWEEPS: Final = 5
#: Minimum number of held-out entries.
_FEWEST_HELD_OUT: Final = 10
#: Hexadecimal digits of a fit's identity that name its folder.
_NAME_LENGTH: Final = 16


class Trial(NamedTuple):
    """A run on held-out entries.

    Attributes
    ----------
    settings : dict
        What was tried: ``rank`` and ``noise``, or ``weight_decay``.
    n_steps : int
        Number of sweeps or steps with the smallest error.
    rmse : float
        Error there on the held-out entries.
    """

    settings: dict[str, Any]
    n_steps: int
    rmse: float


@dataclass(frozen=True)
class Fitted:
    """A consistent state of a fit: everything that predictions depend on.

    Attributes
    ----------
    stage : {"mean", "biases", "search", "last run"}
        Last part of the work that it has results of.
    fold_in : FoldIn or None
        The learned priors; None where the method has none.
    """

    biases: Biases
    factors: Factors
    kind: str | None = "both"
    n_steps: int = 0
    weight_decay: float | None = None
    noise_variance: float | None = None
    trajectories: tuple[Trajectory, ...] = ()
    stage: str = "biases"
    fold_in: FoldIn | None = None

    @classmethod
    def of_biases(cls, biases: Biases) -> Fitted:
        """Return the fit of biases alone."""
        n_rows, n_columns = len(biases.rows), len(biases.columns)
        return cls(biases, (np.zeros((n_rows, 1)), np.zeros((n_columns, 1)), np.zeros(1)))

    def means(self) -> tuple[FloatArray, FloatArray]:
        """Return the factors of rows and columns, each with the bias as last column."""
        left, right = (
            np.column_stack([factor, bias])
            for factor, bias in zip(self.factors[:2], self.biases[1:], strict=True)
        )
        return left, right

    def find_priors(self, entries: Entries, trials: list[Trial]) -> FoldIn:
        """Return the learned priors, or estimates from the factors and the error on held-out entries."""
        if self.fold_in is not None:
            return self.fold_in
        means = self.means()
        predicted = self.biases.at(entries.rows, entries.columns)
        predicted += entries_of_product(self.factors[:2], entries.rows, entries.columns)
        noise = entries.mean(np.square(predicted - entries.values))
        held_out = min((trial.rmse for trial in trials), default=math.inf)
        if self.n_steps > 0 and math.isfinite(held_out):
            noise = max(noise, held_out**2)
        has_biases = self.kind in ("both", "rows"), self.kind in ("both", "columns")
        return FoldIn.of_factors(means, entries, has_biases, noise)


class CheckpointedFit:
    """The folder of one fit, which has a folder for each of its runs."""

    def __init__(self, checkpoint: Any, settings: Settings, entries: Entries) -> None:
        target = Checkpoint.of(checkpoint)
        self._every, self.seconds = target.every, target.seconds
        known = {field.name: repr(getattr(settings, field.name)) for field in fields(settings)}
        arrays = {"rows": entries.rows, "columns": entries.columns, "values": entries.values}
        if entries.weights is not None:
            arrays["weights"] = entries.weights
        self._identity = compute_identity(known | {"shape": entries.shape}, arrays)
        self._path = Path(target.directory) / self._identity[:_NAME_LENGTH]

    def owned(self) -> AbstractContextManager[None]:
        """Own the folder of the fit within the block."""
        return own_folder(self._path)

    def held_out_run(self, number: int) -> RunFolder:
        """Return the folder of a run with held-out entries."""
        kind = "dlnfast run on held-out entries"
        return RunFolder(self._path / f"held-out-{number}", self._identity, kind)

    def final_run(self, number: int) -> Checkpoint:
        """Return the checkpoint of a run on all entries."""
        return Checkpoint(self._path / f"run-{number}", self._every, self.seconds)


@dataclass
class Fit(ABC):
    """A method, applied to some entries.

    Parameters
    ----------
    settings : Settings
    entries : Entries
        All entries.
    clip : callable
        Bounds predictions.
    progress : bool
        Whether to show a progress bar.

    Attributes
    ----------
    parts : (Entries, Entries) or None
        Entries to learn from and held-out ones; None before `prepare`, and where these would be too few.
    checkpoint : CheckpointedFit or None
    fitted : Fitted
        The state so far. It is replaced as a whole, so that an interrupted fit leaves a consistent one.
    trials : list of Trial
    """

    #: What updates are called.
    unit: ClassVar[str] = "step"

    settings: Settings
    entries: Entries
    clip: Callable[[FloatArray], FloatArray]
    progress: bool
    fitted: Fitted = field(init=False)
    parts: tuple[Entries, Entries] | None = None
    checkpoint: CheckpointedFit | None = None
    trials: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start with the mean alone, so that there is something to predict with whenever Ctrl-C comes."""
        kind = None if self.settings.biases is None else "mean"
        mean = 0.0 if kind is None else self.entries.mean(self.entries.values)
        nothing = Biases(mean, *(np.zeros(n) for n in self.entries.shape))
        self.fitted = replace(Fitted.of_biases(nothing), kind=kind, stage="mean")

    def prepare(self, checkpoint: Any) -> None:
        """Fit the biases, hold entries out, and choose the folder."""
        kind = "both" if self.settings.biases == "auto" else self.settings.biases
        biases = fit_biases(self.entries, kind, self.settings.penalty, _FIRST_SWEEPS)
        self.fitted = replace(Fitted.of_biases(biases), kind=kind)
        self.parts = split_entries(self.settings, self.entries)
        if checkpoint is not None:
            self.checkpoint = CheckpointedFit(checkpoint, self.settings, self.entries)

    @abstractmethod
    def run(self) -> None:
        """Fit, and update `fitted` and `trials`."""

    def perform(self, work: ResumableWork, number: int) -> None:
        """Do a part of the work, or continue it where a fit with the same folder was stopped."""
        if self.checkpoint is None:
            run_resumable(None, work)
        else:
            run_resumable(self.checkpoint.held_out_run(number), work, seconds=self.checkpoint.seconds)


def normalise_factors(left: FloatArray, right: FloatArray, tolerance: float) -> Factors:
    """Return orthogonal factors of ``left right^T``, scaled by the roots of the singular values, and these.

    Singular values below `tolerance` times the largest are left out, but for one.
    """
    (q_left, r_left), (q_right, r_right) = np.linalg.qr(left), np.linalg.qr(right)
    u, s, vt = np.linalg.svd(r_left @ r_right.T)
    rank = max(1, int(np.sum(s > tolerance * s[:1])))
    root = np.sqrt(s[:rank])
    return q_left @ u[:, :rank] * root, q_right @ vt[:rank].T * root, s[:rank]


def split_entries(settings: Settings, entries: Entries) -> tuple[Entries, Entries] | None:
    """Return the entries to learn from and those held out, None where these would be too few."""
    n_held_out = round(settings.validation_fraction * entries.values.size)
    if n_held_out < _FEWEST_HELD_OUT or n_held_out >= entries.values.size:
        return None
    order = random_generator(settings.seed, ("completion", "validation")).permutation(entries.values.size)
    learned, held_out = (
        entries.take(part) for part in (np.sort(order[n_held_out:]), np.sort(order[:n_held_out]))
    )
    return learned, held_out


def root_mean_square(predicted: FloatArray, entries: Entries) -> float:
    return math.sqrt(entries.mean((predicted - entries.values) ** 2))
