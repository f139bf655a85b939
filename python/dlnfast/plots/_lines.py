# SPDX-License-Identifier: MIT
"""Displays of any series: lines, paths and bifurcation diagrams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .._support.arrays import as_matrix, as_vector
from ._base import (
    COLOURS,
    Array,
    Display,
    LabelledDisplay,
    draw_envelope,
    drop_repeats,
    make_axes,
    mask_nonpositive,
    tidy_axes,
)

if TYPE_CHECKING:
    from typing import Self

    from matplotlib.axes import Axes

    from .._trajectory.trajectory import Trajectory


class LineDisplay(LabelledDisplay):
    """Named curves over one variable, with constant levels and, dashed, what theory says of each curve.

    Parameters
    ----------
    x : array_like, shape (n,)
        The variable.
    curves : mapping of str to array_like, shape (n,)
        Label -> values. NaN leaves a gap.
    x_label, y_label : str
        Labels of the axes.
    theory : mapping of str to array_like, shape (n,), optional
        Label -> predicted values, drawn dashed in the colour of the curve.
    spread : mapping of str to array_like, shape (n,), optional
        Label -> half the length of the error bars.
    levels : mapping of str to float, optional
        Label -> height of a horizontal line.
    log_y : bool
        Whether the vertical axis is logarithmic.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For arrays that do not fit each other, or hold no real numbers.

    Examples
    --------
    >>> from dlnfast.plots import LineDisplay
    >>> display = LineDisplay([1, 2], {"measured": [3.0, 4.0]}, x_label="t", y_label="s")
    >>> display.numbers()["curves"]
    {'measured': [3.0, 4.0]}
    """

    def __init__(
        self,
        x: npt.ArrayLike,
        curves: Mapping[str, npt.ArrayLike],
        *,
        x_label: str,
        y_label: str,
        theory: Mapping[str, npt.ArrayLike] | None = None,
        spread: Mapping[str, npt.ArrayLike] | None = None,
        levels: Mapping[str, float] | None = None,
        log_y: bool = False,
    ) -> None:
        self.x = as_vector(x, "x", dtype=np.float64)
        self.curves = self._checked(curves, "curves")
        self.theory, self.spread = (
            self._checked(theory or {}, "theory"),
            self._checked(spread or {}, "spread"),
        )
        for name, lines in (("theory", self.theory), ("spread", self.spread)):
            unknown = [label for label in lines if label not in self.curves]
            if unknown:
                known = ", ".join(self.curves)
                raise ValueError(f"{name} has {unknown[0]!r}; wanted labels of curves: {known}")
        self.log_y = bool(log_y)
        self._label(x_label, y_label, levels)

    def _checked(self, lines: Mapping[str, npt.ArrayLike], name: str) -> dict[str, Array]:
        return {
            label: np.asarray(
                as_vector(y, f"{name}[{label!r}]", length=self.x.size, dtype=np.float64, finite=False)
            )
            for label, y in lines.items()
        }

    def plot(
        self,
        ax: Axes | None = None,
        *,
        colors: Sequence[str] = COLOURS,
        legend: bool = True,
        envelope: int | None = None,
        **line: Any,
    ) -> Self:
        """Draw curve i in colour i, theory dashed, and the levels.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Axes to draw on; a new figure by default.
        colors : sequence of str
            Colours of the curves, in order; they repeat after the last.
        legend : bool
            Whether to draw a legend.
        envelope : int, optional
            Number of neighbouring values whose smallest and largest are drawn instead of each value: 2 shows
            both values of a cycle of two, which would fill the area between them.
        **line
            Keywords of ``ax.plot``.

        Returns
        -------
        LineDisplay
            Itself, with `ax_` and `figure_`.

        Raises
        ------
        TypeError, ValueError
            If `envelope` is not a count.
        """
        ax = make_axes(ax)
        style: dict[str, Any] = {"linewidth": 1.6, "zorder": 3} | line
        for index, (label, values) in enumerate(self.curves.items()):
            colour = colors[index % len(colors)]
            if envelope is None:
                ax.plot(self.x, values, color=colour, label=label, **style)
            else:
                draw_envelope(ax, self.x, values, envelope, color=colour, label=label, **style)
            if label in self.theory:
                ax.plot(self.x, self.theory[label], color=colour, linewidth=1.0, linestyle="--", zorder=2)
            if label in self.spread:
                ax.errorbar(
                    self.x,
                    values,
                    self.spread[label],
                    color=colour,
                    linestyle="none",
                    capsize=3,
                    elinewidth=1.0,
                )
        if self.log_y:
            ax.set_yscale("log")
        self._finish(ax, legend)
        return self

    def numbers(self) -> dict[str, Any]:
        return {
            "x": self.x.tolist(),
            "curves": {label: values.tolist() for label, values in self.curves.items()},
            "theory": {label: values.tolist() for label, values in self.theory.items()},
            "spread": {label: values.tolist() for label, values in self.spread.items()},
            "levels": self.levels,
        }


class SeriesDisplay(LabelledDisplay):
    """Named curves on logarithmic axes, each with its own positions: cost of runs against their error.

    Parameters
    ----------
    series : mapping of str to (array_like, array_like)
        Label -> positions and values, of one length. Values that are not positive leave a gap.
    x_label, y_label : str
        Labels of the axes.
    log_x : bool
        Whether the horizontal axis is logarithmic too.
    levels : mapping of str to float, optional
        Label -> height of a horizontal line.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For arrays that do not fit each other, or hold no real numbers.

    Examples
    --------
    >>> from dlnfast.plots import SeriesDisplay
    >>> series = {"long": ([0, 1, 2], [1.0, 0.5, 0.2]), "short": ([0, 1], [1.0, 0.1])}
    >>> display = SeriesDisplay(series, x_label="seconds", y_label="error")
    >>> display.numbers()["series"]["short"]
    {'x': [0.0, 1.0], 'y': [1.0, 0.1]}
    """

    def __init__(
        self,
        series: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]],
        *,
        x_label: str,
        y_label: str,
        log_x: bool = False,
        levels: Mapping[str, float] | None = None,
    ) -> None:
        self.series: dict[str, tuple[Array, Array]] = {}
        for label, (positions, values) in series.items():
            x = as_vector(positions, f"series[{label!r}][0]", dtype=np.float64)
            y = as_vector(values, f"series[{label!r}][1]", length=x.size, dtype=np.float64, finite=False)
            self.series[label] = np.asarray(x), np.asarray(y)
        self.log_x = bool(log_x)
        self._label(x_label, y_label, levels)

    def plot(
        self,
        ax: Axes | None = None,
        *,
        styles: Mapping[str, Mapping[str, Any]] | None = None,
        legend: bool = True,
        **line: Any,
    ) -> Self:
        """Draw every curve on logarithmic axes.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Axes to draw on; a new figure by default.
        styles : mapping of str to mapping, optional
            Label -> keywords of ``ax.plot`` for this curve.
        legend : bool
            Whether to draw a legend.
        **line
            Keywords of ``ax.plot`` for all of them.

        Returns
        -------
        SeriesDisplay
            Itself, with `ax_` and `figure_`.
        """
        ax = make_axes(ax)
        for index, (label, (x, y)) in enumerate(self.series.items()):
            style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "linewidth": 1.8, "zorder": 3}
            style |= line | dict((styles or {}).get(label, {}))
            ax.plot(mask_nonpositive(x) if self.log_x else x, mask_nonpositive(y), label=label, **style)
        ax.set_yscale("log")
        if self.log_x:
            ax.set_xscale("log")
        self._finish(ax, legend)
        return self

    def numbers(self) -> dict[str, Any]:
        return {
            "series": {label: {"x": x.tolist(), "y": y.tolist()} for label, (x, y) in self.series.items()},
            "levels": self.levels,
        }


class PathDisplay(Display):
    """The ways of matrices through their space, along the three principal components of all of them.

    Parameters
    ----------
    paths : mapping of str to sequence of array_like
        Label -> the matrices of one way, in their order; all of one shape.

    Attributes
    ----------
    coordinates : dict of str to ndarray
        Label -> (n, 3), distances from the mean of all matrices.
    shares : ndarray
        Share of the variance of each component.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For arrays that do not fit each other, or hold no real numbers.

    Notes
    -----
    From the inner products alone: O(n^2 D) for n matrices of D entries, none of which is copied.

    Examples
    --------
    >>> import numpy as np
    >>> from dlnfast.plots import PathDisplay
    >>> display = PathDisplay({"straight": [t * np.eye(2) for t in range(4)]})
    >>> display.shares.round(12).tolist()
    [1.0, 0.0, 0.0]
    """

    def __init__(self, paths: Mapping[str, Sequence[npt.ArrayLike]]) -> None:
        rows = [
            as_matrix(matrix, f"paths[{label!r}][{i}]", dtype=np.float64).reshape(-1)
            for label, path in paths.items()
            for i, matrix in enumerate(path)
        ]
        if len({row.size for row in rows}) != 1:
            raise ValueError("paths has matrices of several sizes, or none; wanted one shape for all")
        gram = np.array([[row @ other for other in rows] for row in rows])
        centre = np.eye(len(rows)) - 1 / len(rows)
        values, vectors = np.linalg.eigh(centre @ gram @ centre)
        found = min(3, len(rows))
        largest = np.maximum(values[::-1][:found], 0.0)
        total = float(np.maximum(values, 0.0).sum())
        positions: Array = np.zeros((len(rows), 3))
        positions[:, :found] = vectors[:, ::-1][:, :found] * np.sqrt(largest)
        self.shares = np.zeros(3)
        self.shares[:found] = largest / total if total > 0 else 0.0
        # Either sign will do; what the first way gains counts as positive.
        length = len(next(iter(paths.values())))
        positions *= np.where(positions[length - 1] < positions[0], -1.0, 1.0)
        ends = np.cumsum([len(path) for path in paths.values()])[:-1]
        self.coordinates = dict(zip(paths, np.split(positions, ends), strict=True))

    @classmethod
    def from_trajectories(cls, runs: Mapping[str, Trajectory], steps: Sequence[int]) -> PathDisplay:
        """Take the end-to-end matrices of runs at steps that all of them recorded.

        Parameters
        ----------
        runs : mapping of str to Trajectory
            Label -> run.
        steps : sequence of int
            Steps at which the end-to-end matrices are compared.

        Returns
        -------
        PathDisplay
        """
        return cls({label: [run.end_to_end(step) for step in steps] for label, run in runs.items()})

    def plot(
        self,
        ax: Axes | None = None,
        *,
        styles: Mapping[str, Mapping[str, Any]] | None = None,
        legend: bool = True,
    ) -> Self:
        """Draw the paths in three dimensions.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Axes to draw on, with ``projection="3d"``; a new figure by default.
        styles : mapping of str to mapping, optional
            Label -> keywords of ``ax.plot`` for this curve.
        legend : bool
            Whether to draw a legend.

        Returns
        -------
        PathDisplay
            Itself, with `ax_` and `figure_`.
        """
        from matplotlib.ticker import MaxNLocator

        ax = make_axes(ax, "waterfall")
        for index, (label, points) in enumerate(self.coordinates.items()):
            style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "linewidth": 1.6}
            ax.plot(*points.T, label=label, **(style | dict((styles or {}).get(label, {}))))
        names = [f"component {i} ({100 * share:.0f} %)" for i, share in enumerate(self.shares, start=1)]
        ax.set_xlabel(names[0], labelpad=2)
        ax.set_ylabel(names[1], labelpad=2)
        ax.set_zlabel(names[2], labelpad=2)  # type: ignore[attr-defined]
        ax.tick_params(pad=0, labelsize=8)
        for axis in (ax.xaxis, ax.yaxis, ax.zaxis):  # type: ignore[attr-defined]
            axis.set_major_locator(MaxNLocator(5))
        if legend:
            ax.legend(frameon=False)
        self._store_axes(ax)
        return self

    def numbers(self) -> dict[str, Any]:
        return {
            "coordinates": {label: points.tolist() for label, points in self.coordinates.items()},
            "shares": self.shares.tolist(),
        }


class BifurcationDisplay(Display):
    """Bifurcation diagram: long-run values against a parameter. A fixed point shows one value, a 2-cycle two.

    Parameters
    ----------
    parameter : array_like, shape (m,)
        Positions on the horizontal axis.
    visited : mapping of str to array_like, shape (m, n)
        Label -> n late values for each parameter. Repeated ones, up to `resolution`, count once.
    x_label, y_label : str
        Labels of the axes.
    thresholds : mapping of str to float, optional
        Label of `visited` -> parameter at which the fixed point loses stability in theory; a vertical line.
    resolution : float
        Values closer than this are one.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For arrays that do not fit each other, or hold no real numbers.

    Examples
    --------
    >>> from dlnfast.plots import BifurcationDisplay
    >>> visited = {"s": [[1.0, 1.0, 1.0, 1.0], [0.9, 1.1, 0.9, 1.1]]}
    >>> display = BifurcationDisplay([0.1, 0.2], visited, x_label="step", y_label="s")
    >>> display.periods()
    {'s': [1, 2]}
    """

    def __init__(
        self,
        parameter: npt.ArrayLike,
        visited: Mapping[str, npt.ArrayLike],
        *,
        x_label: str,
        y_label: str,
        thresholds: Mapping[str, float] | None = None,
        resolution: float = 1e-4,
    ) -> None:
        self.parameter = as_vector(parameter, "parameter", dtype=np.float64)
        self.values: dict[str, list[Array]] = {}
        for label, block in visited.items():
            shape = (self.parameter.size, None)
            rows = as_matrix(block, f"visited[{label!r}]", shape=shape, dtype=np.float64)
            self.values[label] = [drop_repeats(row, resolution) for row in rows]
        self.thresholds = {label: float(value) for label, value in (thresholds or {}).items()}
        self.x_label, self.y_label = x_label, y_label

    def periods(self) -> dict[str, list[int]]:
        """Return how many distinct values were visited, for each label and parameter."""
        return {label: [len(row) for row in rows] for label, rows in self.values.items()}

    def plot(self, ax: Axes | None = None, *, legend: bool = True) -> Self:
        """Draw the values, and a vertical line at every threshold.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Axes to draw on; a new figure by default.
        legend : bool
            Whether to draw a legend.

        Returns
        -------
        BifurcationDisplay
            Itself, with `ax_` and `figure_`.
        """
        ax = make_axes(ax)
        for index, (label, rows) in enumerate(self.values.items()):
            colour = COLOURS[index % len(COLOURS)]
            x = np.repeat(self.parameter, [len(row) for row in rows])
            ax.plot(x, np.concatenate(rows), ".", color=colour, markersize=2.0, label=label, rasterized=True)
            if label in self.thresholds:
                ax.axvline(self.thresholds[label], color=colour, linewidth=1.0, linestyle="--", zorder=1)
        ax.set_xlim(self.parameter.min(), max(self.parameter.max(), self.parameter.min() + 1e-12))
        ax.set_xlabel(self.x_label)
        ax.set_ylabel(self.y_label)
        if legend:
            ax.legend(frameon=False, markerscale=5)
        tidy_axes(ax)
        self._store_axes(ax)
        return self

    def numbers(self) -> dict[str, Any]:
        return {
            "parameter": self.parameter.tolist(),
            "visited": {label: [row.tolist() for row in rows] for label, rows in self.values.items()},
            "thresholds": self.thresholds,
        }
