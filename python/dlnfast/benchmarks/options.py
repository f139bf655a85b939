# SPDX-License-Identifier: MIT
"""The options that all benchmark cases take."""

from __future__ import annotations

from dataclasses import dataclass

from .peers import PEERS


@dataclass(frozen=True)
class Options:
    """How long to measure and whom: rounds, smaller sizes and shorter turns, keys of `PEERS`."""

    repeats: int = 5
    quick: bool = False
    peers: tuple[str, ...] = tuple(PEERS)

    @property
    def turn(self) -> float:
        """Seconds that a peer steps in each round, at least."""
        return 0.02 if self.quick else 0.25
