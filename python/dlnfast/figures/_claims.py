# SPDX-License-Identifier: MIT
"""Claims of a source, the check whether the numbers of a figure show them, and the text below the picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..plots import linear_fit, log_linear_fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Claim:
    """One claim of the source, and its measured values."""

    text: str
    shown: bool
    measured: str

    def __str__(self) -> str:
        """Return the claim with its verdict and numbers in one line."""
        return f"{'shown' if self.shown else 'NOT SHOWN'}: {self.text} ({self.measured})"


def as_numbers(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """Return the claims in values that JSON knows."""
    return [asdict(claim) for claim in claims]


def write_below(figure: Figure, claims: Sequence[Claim]) -> None:
    """Write the claims and their verdicts under the panels."""
    width = int(12.5 * figure.get_figwidth())
    lines = [line for claim in claims for line in textwrap.wrap(str(claim), width, subsequent_indent="    ")]
    figure.supxlabel("\n".join(lines), fontsize=9.5, x=0.01, ha="left", linespacing=1.4)


def rises_then_saturates(accuracy: Sequence[float], start: int, slack: float) -> tuple[bool, str]:
    """Return whether accuracies rise up to layer `start`, counted from 1, and then stay, and the numbers."""
    first, later = accuracy[0], np.asarray(accuracy[start - 1 :])
    gain, loss = float(later[0] - first), float(later.max() - later.min())
    text = f"{100 * first:.1f} % in layer 1, {100 * later[0]:.1f} % in layer {start}, "
    text += f"then within {100 * loss:.1f} points"
    return gain > slack and loss <= max(slack, gain / 4), text


def falls_geometrically(layers: Sequence[int], values: npt.ArrayLike) -> tuple[bool, float, str]:
    """Return whether values fall at a near-geometric rate, their factor per layer, and the numbers."""
    numbers = np.asarray(values, dtype=np.float64)
    fit, line = log_linear_fit(layers, numbers), linear_fit(layers, np.log(numbers))
    assert fit is not None
    assert line is not None
    good = fit.ratio < 0.8 and line.r_squared >= 0.95  # below that a layer hardly compresses
    return good, fit.ratio, f"factor {fit.ratio:.3g} a layer, R^2 of the logarithms {line.r_squared:.3f}"
