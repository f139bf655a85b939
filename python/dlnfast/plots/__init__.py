# SPDX-License-Identifier: MIT
"""Displays of a trajectory, on matplotlib, which is imported when something is drawn.

A display stores the numbers that it draws. `from_trajectory` takes them from a run, `plot` draws them on
your axes or on new ones, which it stores as `ax_` and `figure_`, and `numbers` returns them as plain lists.

Many equal singular values are drawn as one band that says how many they are, so that a layer of width
10^4 is as readable as one of width 30.
"""

from __future__ import annotations

from ._base import COLOURS, Display
from ._features import FeatureCompressionDisplay, FeatureDiscriminationDisplay
from ._fits import linear_fit, log_linear_fit
from ._lines import BifurcationDisplay, LineDisplay, PathDisplay, SeriesDisplay
from ._runs import AngleDisplay, LossDisplay, RankDisplay, SingularValueDisplay

__all__ = [
    "COLOURS",
    "AngleDisplay",
    "BifurcationDisplay",
    "Display",
    "FeatureCompressionDisplay",
    "FeatureDiscriminationDisplay",
    "LineDisplay",
    "LossDisplay",
    "PathDisplay",
    "RankDisplay",
    "SeriesDisplay",
    "SingularValueDisplay",
    "linear_fit",
    "log_linear_fit",
]
