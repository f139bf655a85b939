# SPDX-License-Identifier: MIT
"""The options that all benchmark cases take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Options of a benchmark.

    Attributes
    ----------
    repeats : int
        Rounds in which everything is timed once.
    quick : bool
        Whether to take smaller sizes and shorter turns.
    peers : tuple of str
        Keys of `benchmarks.peers.PEERS` to compare; all of them where it is empty.
    """

    repeats: int = 5
    quick: bool = False
    peers: tuple[str, ...] = ()

    @property
    def turn(self) -> float:
        """Seconds that a peer steps in each round, at least."""
        return 0.02 if self.quick else 0.25
