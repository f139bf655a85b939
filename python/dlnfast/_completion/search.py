# SPDX-License-Identifier: MIT
"""Variational fits: rank and noise model are chosen on held-out entries, before sweeps over all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from .._support.checkpoint import State
from .._training.resumable import ResumableWork
from .entries import Biases, Entries
from .fitted import Fit, Trial, normalise_factors, root_mean_square
from .fold_in import FoldIn
from .variational import Posterior, Snapshot

#: Ranks that are tried, the next one from the posterior of the one before.
_RANKS: Final = (8, 16, 32, 64)
#: Relative gain of the held-out error for which a larger rank, or learned noise levels, are kept.
_WORTH: Final = 1e-3
#: Relative gain per sweep below which a run waits, and how many such sweeps end it.
_GAIN: Final = 2e-4
_PATIENCE: Final = 2
#: Sweeps over all entries after the search.
_FINAL_SWEEPS: Final = 5
#: Ratio of the energies of two successive directions that separates signal from noise.
_GAP: Final = 5.0
#: Held-out error, relative to the spread of the entries, that needs no further settings.
_EXACT: Final = 1e-6
#: Singular values below this share of the largest are left out of the result.
_NEGLIGIBLE: Final = 1e-9


@dataclass
class Best:
    """The best record of some runs."""

    rmse: float = math.inf
    n_steps: int = 0
    snapshot: Snapshot | None = None


class SweepRun(ResumableWork):
    """Sweeps until the held-out error stops falling, or a number of them.

    Parameters
    ----------
    posterior : Posterior
    most : int
        Maximum number of sweeps.
    measure_error : callable, optional
        Held-out error of the posterior. Default: all sweeps are made.

    Attributes
    ----------
    best : Best
        The record with the smallest held-out error.
    n_steps : int
        Number of sweeps so far.
    """

    unit = "sweep"

    def __init__(
        self, posterior: Posterior, most: int, measure_error: Callable[[], float] | None = None
    ) -> None:
        self._posterior, self._most, self._measure_error = posterior, most, measure_error
        self.best = Best()
        self.n_steps, self._waited, self._before = 0, 0, math.inf

    @property
    def is_finished(self) -> bool:
        """Whether the run is over."""
        return self.n_steps >= self._most or self._waited >= _PATIENCE

    def advance(self, flush: Callable[[], None]) -> None:
        """Sweep until the run is over."""
        posterior = self._posterior
        while not self.is_finished:
            posterior.sweep()
            self.n_steps += 1
            if self._measure_error is not None:
                self._judge(self._measure_error())
            flush()

    def _judge(self, error: float) -> None:
        if error < self.best.rmse:
            self.best = Best(error, self.n_steps, self._posterior.snapshot())
        # While priors are wide, directions grow that are not needed.
        gains = error < self._before * (1.0 - _GAIN)
        self._waited = 0 if gains or self._posterior.is_wide else self._waited + 1
        self._before = error

    def state(self) -> State | None:
        """Return the posterior, and the best one so far."""
        metadata, arrays = self._posterior.snapshot().state()
        metadata |= {"waited": self._waited, "before": self._before, "rmse": self.best.rmse}
        metadata["best_step"] = self.best.n_steps
        if self.best.snapshot is not None:
            best, best_arrays = self.best.snapshot.state()
            metadata["best"] = best
            arrays |= {f"best_{name}": array for name, array in best_arrays.items()}
        return State(self.n_steps, 0.0, arrays, metadata)

    def restore_state(self, state: State) -> None:
        """Continue from a state."""
        metadata, arrays = state.metadata, state.arrays
        self._posterior.restore(Snapshot.from_state(metadata, arrays))
        self.n_steps, self._waited, self._before = state.step, metadata["waited"], metadata["before"]
        self.best = Best(metadata["rmse"], metadata["best_step"])
        if "best" in metadata:
            parts = {
                name.removeprefix("best_"): array for name, array in arrays.items() if name[:5] == "best_"
            }
            self.best = replace(self.best, snapshot=Snapshot.from_state(metadata["best"], parts))


#: Makes a run, or resumes it if it was stopped before.
Perform = Callable[[SweepRun], None]


class Search:
    """Rank and noise model of a posterior, chosen on held-out entries.

    Ranks 8, 16, 32, .. are tried for as long as the held-out error falls by a thousandth, and no gap
    between the energies of the directions shows that some are noise. Each continues from the best posterior
    of the rank before, with new directions from its residuals. With the first rank, noise levels of rows
    and columns are learned, too; they are kept if the error falls by a thousandth.

    Parameters
    ----------
    posterior : Posterior
        Posterior of the other entries, without directions.
    measure_error : callable
        Held-out error of the posterior.
    ranks : sequence of int
        Ranks to try.
    most : int
        Maximum number of sweeps of each run.
    seconds : float
        Time after which no more runs begin.
    perform : callable
        Makes a run.
    trials : list of Trial
        Takes what was tried.
    """

    def __init__(
        self,
        posterior: Posterior,
        measure_error: Callable[[], float],
        ranks: tuple[int, ...],
        most: int,
        seconds: float,
        perform: Perform,
        trials: list[Trial],
    ) -> None:
        self._posterior, self._measure_error = posterior, measure_error
        self._ranks, self._most, self._perform = ranks, most, perform
        self._end = time.perf_counter() + seconds
        self.best = Best()
        self.trials = trials

    def run(self) -> None:
        """Try ranks and noise models."""
        for rank in self._ranks:
            if not self._may_go_on() or self._has_surplus():
                return
            self._continue_from_best()
            self._posterior.add_directions(rank - self._posterior.rank)
            if not self._try():
                return
            if len(self.trials) == 1 and self._may_go_on():
                self._continue_from_best()
                self._posterior.learns_noise = True
                self._try()

    def _may_go_on(self) -> bool:
        if not self.trials:
            return True
        is_exact = self.best.rmse <= _EXACT * math.sqrt(self._posterior.total)
        return not is_exact and time.perf_counter() < self._end

    def _has_surplus(self) -> bool:
        """Return whether some directions of the best posterior, at most half of them, are noise."""
        if self.best.snapshot is None:
            return False
        energies = self.best.snapshot.energies()
        signal = len(energies) // 2
        return bool(np.any(energies[signal:] * _GAP < energies[signal - 1 : -1]))

    def _continue_from_best(self) -> None:
        if self.best.snapshot is not None:
            self._posterior.restore(self.best.snapshot)

    def _try(self) -> bool:
        """Make a run, and return whether it is worth its settings."""
        posterior = self._posterior
        run = SweepRun(posterior, self._most, self._measure_error)
        self._perform(run)
        noise = "learned" if posterior.learns_noise else "equal"
        self.trials.append(Trial({"rank": posterior.rank, "noise": noise}, run.best.n_steps, run.best.rmse))
        is_worth = run.best.rmse < self.best.rmse * (1.0 - _WORTH)
        if is_worth:
            self.best = replace(run.best, n_steps=self.best.n_steps + run.best.n_steps)
        return is_worth


class VariationalFit(Fit):
    """Sweeps of a `Posterior`."""

    unit = "sweep"

    def run(self) -> None:
        """Choose rank and noise model on held-out entries, and sweep over all entries."""
        kind, most = self.fitted.kind, self.settings.steps
        if self.parts is None:
            posterior = self._start(self.entries, kind)
            if posterior.is_exact:
                return
            posterior.add_directions(self._list_ranks(posterior)[0])
        else:
            best = self._search(*self.parts, kind)
            if best.snapshot is None:
                return
            posterior = self._start(self.entries, kind, best.snapshot.mean)
            posterior.restore(best.snapshot)
            most = min(most, _FINAL_SWEEPS)
        run = SweepRun(posterior, most)
        try:
            self.perform(run, len(self.trials))
        finally:
            if run.n_steps > 0:
                self._keep(posterior, self.fitted.n_steps + run.n_steps, "last run")

    def _start(self, entries: Entries, kind: str | None, mean: float | None = None) -> Posterior:
        return Posterior(entries, kind, self.settings.n_threads, self.settings.dtype, mean)

    def _list_ranks(self, posterior: Posterior) -> tuple[int, ...]:
        """Return the ranks to try."""
        limit = posterior.highest_rank
        if self.settings.width is not None:
            return (min(self.settings.width, limit),)
        return (*(rank for rank in _RANKS if rank < limit), limit) if limit <= _RANKS[-1] else _RANKS

    def _search(self, seen: Entries, held_out: Entries, kind: str | None) -> Best:
        posterior = self._start(seen, kind)
        if posterior.is_exact:
            return Best()

        def measure_error() -> float:
            return root_mean_square(self.clip(posterior.predict(held_out.rows, held_out.columns)), held_out)

        def perform(run: SweepRun) -> None:
            try:
                self.perform(run, len(self.trials))
            finally:
                if run.best.snapshot is not None and run.best.rmse < search.best.rmse:
                    posterior.restore(run.best.snapshot)
                    self._keep(posterior, search.best.n_steps + run.best.n_steps, "search")

        search = Search(
            posterior,
            measure_error,
            self._list_ranks(posterior),
            self.settings.steps,
            self.settings.budget,
            perform,
            self.trials,
        )
        search.run()
        return search.best

    def _keep(self, posterior: Posterior, n_steps: int, stage: str) -> None:
        rows, columns = posterior.factors()
        biases = Biases(posterior.mean, *(np.array(side[:, -1], np.float64) for side in (rows, columns)))
        factors = normalise_factors(rows[:, :-1], columns[:, :-1], _NEGLIGIBLE)
        self.fitted = replace(
            self.fitted,
            biases=biases,
            factors=factors,
            n_steps=n_steps,
            noise_variance=posterior.noise,
            stage=stage,
            fold_in=FoldIn.of_posterior(posterior, *factors[:2]),
        )
