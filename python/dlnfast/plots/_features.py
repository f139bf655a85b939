# SPDX-License-Identifier: MIT
"""Displays of features: compression and discrimination of layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import measures
from .._support.arrays import as_vector
from ._base import COLOURS, Display, make_axes, measured, tidy_axes
from ._fits import linear_fit, log_linear_fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .._trajectory.trajectory import Trajectory


class CompressionDisplay(Display):
    r"""The compression C_l of the features over the layers, with its log-linear fit.

    Parameters
    ----------
    layers : array_like of int, shape (n,)
        l; 0 stands for the inputs.
    compression : array_like, shape (n,)
        ``C_l = tr Sigma_W / tr Sigma_B``; see `dlnfast.measures.compression`. Values of 0 and infinity are
        not drawn and not fitted.
    theory : array_like, shape (n,), optional
        What theory says, drawn dashed; see `dlnfast.theory.compression_law`.

    Attributes
    ----------
    ax_, figure_
        Where it was drawn.
    fit : LogLinearFit or None
        ``C_l ~ start * ratio^l``.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For arrays that do not fit each other, or hold no real numbers.

    Examples
    --------
    >>> from dlnfast.plots import CompressionDisplay
    >>> display = CompressionDisplay([0, 1, 2], [11.0, 1.1, 0.11])
    >>> round(display.fit.ratio, 12)
    0.1
    """

    def __init__(
        self, layers: npt.ArrayLike, compression: npt.ArrayLike, *, theory: npt.ArrayLike | None = None
    ) -> None:
        self.layers = as_vector(layers, "layers", dtype=np.float64)
        length = self.layers.size
        self.compression = as_vector(
            compression, "compression", length=length, dtype=np.float64, finite=False, symbol="C_l"
        )
        self.theory = None
        if theory is not None:
            self.theory = as_vector(theory, "theory", length=length, dtype=np.float64)
        self.fit = log_linear_fit(self.layers, self.compression)

    @classmethod
    def from_trajectory(
        cls,
        run: Trajectory,
        *,
        step: int = -1,
        X: npt.ArrayLike | None = None,
        labels: npt.ArrayLike | None = None,
        theory: npt.ArrayLike | None = None,
    ) -> CompressionDisplay:
        """Measure the features of layers 0 (the inputs) to L - 1 at a recorded step.

        Parameters
        ----------
        run : Trajectory
        step : int
            A recorded step; -1 for the last.
        X : array_like, shape (d_x, N), optional
            Inputs in problem coordinates. Default: those of the problem.
        labels : array_like, shape (N,), optional
            Default: those of the problem.
        theory : array_like, shape (L,), optional
            Drawn beside them.

        Returns
        -------
        CompressionDisplay
        """
        values = measured(run, measures.compression, step, X, labels)
        return cls(range(run.n_layers), values, theory=theory)

    def plot(self, ax: Axes | None = None, *, label: str | None = None, **line: Any) -> CompressionDisplay:
        """Draw on `ax`, or on a new figure; `label` names the markers, keywords go to ``ax.plot``.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Where to draw; by default on a new figure.
        label : str, optional
            Of the markers.
        **line
            Keywords of ``ax.plot``.

        Returns
        -------
        CompressionDisplay
            Itself, with `ax_` and `figure_`.
        """
        ax = make_axes(ax)
        style: dict[str, Any] = {"color": COLOURS[0], "marker": "o", "markersize": 5.5, **line}
        style["linestyle"] = "none"
        if label is None and self.fit is not None:
            label = f"$C_l$; fit: ratio {self.fit.ratio:.4f}"
        drawn = np.where(np.isfinite(self.compression) & (self.compression > 0), self.compression, np.nan)
        ax.plot(self.layers, drawn, label=label, zorder=3, **style)
        if self.fit is not None:
            fitted = self.fit.start * self.fit.ratio**self.layers
            ax.plot(self.layers, fitted, color=style["color"], linewidth=1.5, zorder=2)
        if self.theory is not None:
            ax.plot(self.layers, self.theory, color=style["color"], linewidth=1.0, linestyle="--", zorder=1)
        if not np.isnan(drawn).all():
            ax.set_yscale("log")
        ax.set_xticks(self.layers.astype(int))
        ax.set_xlabel("layer $l$")
        ax.set_ylabel(r"compression $C_l = \mathrm{tr}\,\Sigma_W / \mathrm{tr}\,\Sigma_B$")
        if label is not None:
            ax.legend(frameon=False)
        tidy_axes(ax)
        self._drawn_on(ax)
        return self

    def numbers(self) -> dict[str, Any]:
        """Return every number drawn."""
        return {
            "layers": self.layers.astype(int).tolist(),
            "compression": self.compression.tolist(),
            "fit": None if self.fit is None else self.fit._asdict(),
            "theory": None if self.theory is None else self.theory.tolist(),
        }


class DiscriminationDisplay(Display):
    r"""The discrimination D_l of the features over the layers, with its linear fit.

    Parameters
    ----------
    layers : array_like of int, shape (n,)
        l; 0 stands for the inputs.
    discrimination : array_like, shape (n,)
        ``D_l = 1 - max cos(mu_k, mu_k')``; see `dlnfast.measures.discrimination`.
    theory : array_like, shape (n,), optional
        What theory says, drawn dashed; see `dlnfast.theory.discrimination_law`. NaN where it says nothing.

    Attributes
    ----------
    ax_, figure_
        Where it was drawn.
    fit : LinearFit or None
        ``D_l ~ start + slope l``.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For arrays that do not fit each other, or hold no real numbers.

    Examples
    --------
    >>> from dlnfast.plots import DiscriminationDisplay
    >>> display = DiscriminationDisplay([0, 1, 2], [0.9, 0.95, 1.0])
    >>> round(display.fit.slope, 12)
    0.05
    """

    def __init__(
        self, layers: npt.ArrayLike, discrimination: npt.ArrayLike, *, theory: npt.ArrayLike | None = None
    ) -> None:
        self.layers = as_vector(layers, "layers", dtype=np.float64)
        length = self.layers.size
        self.discrimination = as_vector(
            discrimination, "discrimination", length=length, dtype=np.float64, symbol="D_l"
        )
        self.theory = None
        if theory is not None:
            self.theory = as_vector(theory, "theory", length=length, dtype=np.float64, finite=False)
        self.fit = linear_fit(self.layers, self.discrimination)

    @classmethod
    def from_trajectory(
        cls,
        run: Trajectory,
        *,
        step: int = -1,
        X: npt.ArrayLike | None = None,
        labels: npt.ArrayLike | None = None,
        theory: npt.ArrayLike | None = None,
    ) -> DiscriminationDisplay:
        """Measure the features of layers 0 (the inputs) to L - 1; parameters as for `CompressionDisplay`.

        Parameters
        ----------
        run : Trajectory
            Of `train`, `track` or a file.
        step : int
            A recorded step; -1 for the last.
        X : array_like, shape (d_x, N), optional
            Inputs in problem coordinates. Default: those of the problem.
        labels : array_like, shape (N,), optional
            Default: those of the problem.
        theory : array_like, shape (L,), optional
            Drawn beside them.

        Returns
        -------
        DiscriminationDisplay
        """
        values = measured(run, measures.discrimination, step, X, labels)
        return cls(range(run.n_layers), values, theory=theory)

    def plot(self, ax: Axes | None = None, *, label: str | None = None, **line: Any) -> DiscriminationDisplay:
        """Draw on `ax`, or on a new figure; `label` names the markers, keywords go to ``ax.plot``.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Where to draw; by default on a new figure.
        label : str, optional
            Of the markers.
        **line
            Keywords of ``ax.plot``.

        Returns
        -------
        DiscriminationDisplay
            Itself, with `ax_` and `figure_`.
        """
        ax = make_axes(ax)
        style: dict[str, Any] = {"color": COLOURS[0], "marker": "o", "markersize": 5.5, **line}
        style["linestyle"] = "none"
        if label is None and self.fit is not None:
            label = f"$D_l$; fit: slope {self.fit.slope:.4g}"
        ax.plot(self.layers, self.discrimination, label=label, zorder=3, **style)
        if self.fit is not None:
            fitted = self.fit.start + self.fit.slope * self.layers
            ax.plot(self.layers, fitted, color=style["color"], linewidth=1.5, zorder=2)
        if self.theory is not None:
            ax.plot(self.layers, self.theory, color=style["color"], linewidth=1.0, linestyle="--", zorder=1)
        ax.set_xticks(self.layers.astype(int))
        ax.set_xlabel("layer $l$")
        ax.set_ylabel(r"discrimination $D_l = 1 - \max_{k \ne k'} \cos(\mu_k, \mu_{k'})$")
        if label is not None:
            ax.legend(frameon=False)
        tidy_axes(ax)
        self._drawn_on(ax)
        return self

    def numbers(self) -> dict[str, Any]:
        """Return every number drawn."""
        return {
            "layers": self.layers.astype(int).tolist(),
            "discrimination": self.discrimination.tolist(),
            "fit": None if self.fit is None else self.fit._asdict(),
            "theory": None if self.theory is None else self.theory.tolist(),
        }
