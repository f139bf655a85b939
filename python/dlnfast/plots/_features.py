# SPDX-License-Identifier: MIT
"""Displays of features: compression and discrimination of layers."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from .. import measures
from .._support.arrays import as_vector
from ._base import COLOURS, Array, Display, make_axes, mask_nonpositive, measure_features, tidy_axes
from ._fits import LinearFit, LogLinearFit, linear_fit, log_linear_fit

if TYPE_CHECKING:
    from typing import Self

    from matplotlib.axes import Axes

    from .._trajectory.trajectory import Trajectory


class FeatureDisplay(Display):
    """Base class of displays of one measure of the features in every layer, with a fit through its values."""

    _name: ClassVar[str]  # of the attribute with the values, and their key in `numbers`
    _y_label: ClassVar[str]

    layers: Array
    theory: Array | None
    fit: LinearFit | LogLinearFit | None

    @abstractmethod
    def __init__(self, layers: npt.ArrayLike, values: npt.ArrayLike, *, theory: npt.ArrayLike | None) -> None:
        """Check the values of all layers, and fit them."""

    @staticmethod
    @abstractmethod
    def _measure(features: npt.ArrayLike, labels: npt.ArrayLike) -> float:
        """Return the value of one layer."""

    @abstractmethod
    def _fit_label(self) -> str | None:
        """Return the legend entry that states the fit; None without a fit."""

    @abstractmethod
    def _fitted_values(self) -> Array:
        """Return the values of the fit at `layers`."""

    def _drawn_values(self) -> Array:
        return np.asarray(getattr(self, self._name))

    @classmethod
    def from_trajectory(
        cls,
        run: Trajectory,
        *,
        step: int = -1,
        X: npt.ArrayLike | None = None,
        labels: npt.ArrayLike | None = None,
        theory: npt.ArrayLike | None = None,
    ) -> Self:
        """Measure the features of layers 0 (the inputs) to L - 1 at a recorded step.

        Parameters
        ----------
        run : Trajectory
            Run with weights or cores at the step.
        step : int
            Recorded step; -1 for the last.
        X : array_like, shape (d_x, N), optional
            Inputs after `Problem.transform`. Default: those of the problem.
        labels : array_like, shape (N,), optional
            Class of each sample. Default: those of the problem.
        theory : array_like, shape (L,), optional
            Predicted values, drawn beside the measured ones.

        Returns
        -------
        FeatureDisplay
            Display of the class that the method is called on.

        Raises
        ------
        ValueError
            If neither the call nor the problem has labels.
        """
        values = measure_features(run, cls._measure, step, X, labels)
        return cls(range(run.n_layers), values, theory=theory)

    def plot(self, ax: Axes | None = None, *, label: str | None = None, **line: Any) -> Self:
        """Draw markers for the values, a line for the fit and a dashed line for theory.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Axes to draw on; a new figure by default.
        label : str, optional
            Legend entry of the markers. Default: the numbers of the fit.
        **line
            Keywords of ``ax.plot`` for the markers.

        Returns
        -------
        FeatureDisplay
            Itself, with `ax_` and `figure_`.
        """
        ax = make_axes(ax)
        style: dict[str, Any] = {"color": COLOURS[0], "marker": "o", "markersize": 5.5, **line}
        style["linestyle"] = "none"
        if label is None:
            label = self._fit_label()
        ax.plot(self.layers, self._drawn_values(), label=label, zorder=3, **style)
        if self._fit_label() is not None:
            ax.plot(self.layers, self._fitted_values(), color=style["color"], linewidth=1.5, zorder=2)
        if self.theory is not None:
            ax.plot(self.layers, self.theory, color=style["color"], linewidth=1.0, linestyle="--", zorder=1)
        ax.set_xticks(self.layers.astype(int))
        ax.set_xlabel("layer $l$")
        ax.set_ylabel(self._y_label)
        if label is not None:
            ax.legend(frameon=False)
        tidy_axes(ax)
        self._store_axes(ax)
        return self

    def numbers(self) -> dict[str, Any]:
        """Return every number drawn: the layers, their values, the fit and theory."""
        return {
            "layers": self.layers.astype(int).tolist(),
            self._name: getattr(self, self._name).tolist(),
            "fit": None if self.fit is None else self.fit._asdict(),
            "theory": None if self.theory is None else self.theory.tolist(),
        }


class FeatureCompressionDisplay(FeatureDisplay):
    r"""The compression C_l of the features over the layers, with its log-linear fit.

    Parameters
    ----------
    layers : array_like of int, shape (n,)
        Layer numbers l; 0 stands for the inputs.
    compression : array_like, shape (n,)
        ``C_l = tr Sigma_W / tr Sigma_B``; see `dlnfast.measures.feature_compression`. Values of 0 and
        infinity are not drawn and not fitted.
    theory : array_like, shape (n,), optional
        Predicted values, drawn dashed; see `dlnfast.theory.compression_law`.

    Attributes
    ----------
    fit : LogLinearFit or None
        ``C_l ~ start * ratio^l``.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For arrays that do not fit each other, or hold no real numbers.

    Examples
    --------
    >>> from dlnfast.plots import FeatureCompressionDisplay
    >>> display = FeatureCompressionDisplay([0, 1, 2], [11.0, 1.1, 0.11])
    >>> round(display.fit.ratio, 12)
    0.1
    """

    fit: LogLinearFit | None

    _name = "compression"
    _y_label = r"compression $C_l = \mathrm{tr}\,\Sigma_W / \mathrm{tr}\,\Sigma_B$"
    _measure = staticmethod(measures.feature_compression)

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

    def _fit_label(self) -> str | None:
        return None if self.fit is None else f"$C_l$; fit: ratio {self.fit.ratio:.4f}"

    def _fitted_values(self) -> Array:
        assert self.fit is not None
        return np.asarray(self.fit.start * self.fit.ratio**self.layers)

    def _drawn_values(self) -> Array:
        return mask_nonpositive(self.compression)

    def plot(self, ax: Axes | None = None, *, label: str | None = None, **line: Any) -> Self:
        super().plot(ax, label=label, **line)
        if not np.isnan(self._drawn_values()).all():
            self.ax_.set_yscale("log")
        return self


class FeatureDiscriminationDisplay(FeatureDisplay):
    r"""The discrimination D_l of the features over the layers, with its linear fit.

    Parameters
    ----------
    layers : array_like of int, shape (n,)
        Layer numbers l; 0 stands for the inputs.
    discrimination : array_like, shape (n,)
        ``D_l = 1 - max cos(mu_k, mu_k')``; see `dlnfast.measures.feature_discrimination`.
    theory : array_like, shape (n,), optional
        Predicted values, drawn dashed; see `dlnfast.theory.discrimination_law`. NaN leaves a gap.

    Attributes
    ----------
    fit : LinearFit or None
        ``D_l ~ start + slope l``.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For arrays that do not fit each other, or hold no real numbers.

    Examples
    --------
    >>> from dlnfast.plots import FeatureDiscriminationDisplay
    >>> display = FeatureDiscriminationDisplay([0, 1, 2], [0.9, 0.95, 1.0])
    >>> round(display.fit.slope, 12)
    0.05
    """

    fit: LinearFit | None

    _name = "discrimination"
    _y_label = r"discrimination $D_l = 1 - \max_{k \ne k'} \cos(\mu_k, \mu_{k'})$"
    _measure = staticmethod(measures.feature_discrimination)

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

    def _fit_label(self) -> str | None:
        return None if self.fit is None else f"$D_l$; fit: slope {self.fit.slope:.4g}"

    def _fitted_values(self) -> Array:
        assert self.fit is not None
        return np.asarray(self.fit.start + self.fit.slope * self.layers)
