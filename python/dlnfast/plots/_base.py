# SPDX-License-Identifier: MIT
"""Curves, axes and the base classes of all displays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from .._support.arrays import as_matrix, as_vector, check_choice, check_count

if TYPE_CHECKING:
    from typing import Self

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .._trajectory.trajectory import Trajectory


Style = Literal["flat", "waterfall"]
Side = Literal["right", "left"]
Array = npt.NDArray[np.float64]
#: Okabe and Ito's colours, distinct for every kind of colour vision, without yellow.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: First and last shade of each group of singular values: rising, staying, falling.
SHADES: Final = {
    "top": ("#8F3200", "#F5923E"),
    "middle": ("#7A7A7A", "#7A7A7A"),
    "bottom": ("#7CBDEB", "#003F7D"),
}
#: Above so many curves, only the outermost ones are drawn one by one.
MOST_LINES: Final = 40
#: So many curves of the middle block are drawn in a waterfall.
MOST_MIDDLE: Final = 24
#: Spread of the middle block, relative to its values, below which they count as one repeated value.
EQUAL: Final = 1e-9
#: Spread, relative to the range of all curves, below which the block is drawn as a line.
NARROW: Final = 0.01
#: Errors below this share of the axis cannot be seen.
VISIBLE: Final = 2e-3
#: A least loss below this share of the first loss is rounding.
ROUNDING: Final = 1e-13


class RunAxis:
    """Horizontal axis of a display of a run: its steps, or the times of a gradient flow."""

    def __init__(self, steps: npt.ArrayLike, times: npt.ArrayLike | None, n_records: int) -> None:
        self.steps = as_vector(steps, "steps", length=n_records, dtype=np.float64)
        self.times = None if times is None else as_vector(times, "times", length=n_records, dtype=np.float64)
        #: Positions of the records on the axis.
        self.x: Array = self.steps if self.times is None else self.times
        self.label = "iteration $t$" if self.times is None else "time $t$"

    def locate(self, steps: npt.ArrayLike) -> Array:
        """Return the positions of steps, between records by linear interpolation of the times."""
        positions = np.asarray(steps, dtype=np.float64)
        return positions if self.times is None else np.interp(positions, self.steps, self.times)

    def finish(self, ax: Axes) -> None:
        """Set the limits and the label of axes of two dimensions."""
        ax.set_xlim(self.x[0], self.x[-1] if self.x[-1] > self.x[0] else self.x[0] + 1)
        ax.set_xlabel(self.label)

    def numbers(self) -> dict[str, Any]:
        """Return the steps, and the times where they are drawn instead."""
        times = {} if self.times is None else {"times": self.times.tolist()}
        return {"steps": self.steps.astype(np.int64).tolist(), **times}


def times_of_records(run: Trajectory) -> Array | None:
    """Return the times of the records of a gradient flow; None for other runs."""
    return None if run.times is None else run.times[run.steps]


@dataclass(frozen=True)
class Group:
    """Neighbouring curves that share a colour: their indices i, counted from 1, and values over the steps."""

    name: Literal["top", "middle", "bottom"]
    indices: npt.NDArray[np.int64]
    values: Array


class Curves:
    """The k curves of a layer, split into top r, middle block and bottom r."""

    def __init__(
        self,
        steps: npt.ArrayLike,
        values: npt.ArrayLike,
        name: str,
        rank: int | None,
        times: npt.ArrayLike | None,
    ) -> None:
        matrix: Array = np.asarray(as_matrix(values, name), dtype=np.float64)
        self.axis = RunAxis(steps, times, matrix.shape[0])
        self.n_curves = matrix.shape[1]
        n_top, n_bottom = count_ends(self.n_curves, rank)
        middle = matrix[:, n_top : self.n_curves - n_bottom]
        self.multiplicity = middle.shape[1]
        self.low = middle.min(axis=1) if self.multiplicity else np.empty(0)
        self.high = middle.max(axis=1) if self.multiplicity else np.empty(0)
        spread = self.high - self.low
        self.equal = bool(np.all(spread <= EQUAL * np.maximum(np.abs(self.high), 1e-3)))
        self.narrow = self.equal or bool(spread.max() <= NARROW * (matrix.max() - matrix.min()))
        shown = n_top + np.linspace(0, self.multiplicity - 1, min(MOST_MIDDLE, self.multiplicity))
        parts: list[tuple[Literal["top", "middle", "bottom"], npt.NDArray[np.int64]]] = [
            ("top", np.arange(n_top)),
            ("middle", shown.round().astype(np.int64)),
            ("bottom", np.arange(self.n_curves - n_bottom, self.n_curves)),
        ]
        self.groups = [Group(part, i + 1, matrix[:, i]) for part, i in parts if i.size]

    def numbers(self) -> dict[str, Any]:
        """Return every number drawn; equal curves of the middle block once."""
        result = self.axis.numbers()
        for group in self.groups:
            if group.name == "middle":
                entry: dict[str, Any] = {"multiplicity": self.multiplicity, "low": self.low.tolist()}
                entry["high"] = self.high.tolist()
                if not self.equal:
                    entry |= {"indices": group.indices.tolist(), "values": group.values.T.tolist()}
                result["middle"] = entry
            else:
                result[group.name] = {"indices": group.indices.tolist(), "values": group.values.T.tolist()}
        return result

    def draw_flat(self, ax: Axes) -> None:
        for group in self.groups:
            if group.name == "middle":
                self._draw_band(ax, group)
                continue
            for column, colour in zip(group.values.T, make_shades(group), strict=True):
                ax.plot(self.axis.x, column, color=colour, linewidth=1.8, zorder=3)
        self.axis.finish(ax)
        tidy_axes(ax)

    def _draw_band(self, ax: Axes, group: Group) -> None:
        colour = SHADES["middle"][0]
        if self.narrow:
            ax.plot(
                self.axis.x, (self.low + self.high) / 2, color=colour, linewidth=4.0, alpha=0.85, zorder=2
            )
            return
        ax.fill_between(self.axis.x, self.low, self.high, color=colour, alpha=0.3, linewidth=0, zorder=1)
        for column in group.values.T:
            ax.plot(self.axis.x, column, color=colour, linewidth=0.5, alpha=0.8, zorder=2)

    def draw_waterfall(self, ax: Any) -> None:
        start, all_drawn = 1, sum(g.indices.size for g in self.groups) == self.n_curves
        ticks, labels = [], []
        for group in self.groups:
            positions = group.indices if all_drawn else np.arange(start, start + group.indices.size)
            start += group.indices.size
            ticks.append(float(positions.mean()))
            labels.append(self._range_label(group))
            thin = group.name == "middle"
            for position, column, colour in zip(positions, group.values.T, make_shades(group), strict=True):
                ax.plot(
                    self.axis.x,
                    np.full(self.axis.x.size, position),
                    column,
                    color=colour,
                    linewidth=0.9 if thin else 1.7,
                    alpha=0.9 if thin else 1.0,
                )
        if all_drawn:
            stride = max(1, self.n_curves // 5)
            ax.set_yticks([1, *range(1 + stride, self.n_curves - stride // 2, stride), self.n_curves])
        else:
            ax.set_yticks(ticks, labels)
        ax.patch.set_visible(False)  # it would cover the labels of a neighbour
        ax.invert_yaxis()  # the largest values at the back, where they hide nothing
        ax.set_xlabel(self.axis.label, labelpad=2)
        ax.set_ylabel("index $i$", labelpad=4 if all_drawn else 14)
        ax.view_init(elev=22, azim=-56)
        ax.set_box_aspect((1.25, 1.15, 0.9), zoom=0.94)
        ax.locator_params(axis="x", nbins=5)
        ax.locator_params(axis="z", nbins=5)
        ax.tick_params(pad=0, labelsize=8)
        for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
            axis.set_pane_color((0.975, 0.975, 0.975, 1.0))
            # No public way to a lighter grid; without it the default one is drawn.
            getattr(axis, "_axinfo", {}).get("grid", {}).update(color="#DDDDDD", linewidth=0.5)

    def _range_label(self, group: Group) -> str:
        first, last = int(group.indices[0]), int(group.indices[-1])
        return f"{first}" if first == last else f"{first}-{last}"

    def handles(self) -> list[Any]:
        """Return legend entries, one per group."""
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        entries: list[Any] = []
        for group in self.groups:
            if group.name != "middle":
                shades = make_shades(group)
                name = group.name if len(self.groups) > 1 else "all"
                label = f"{name} {group.indices.size}"
                colour = shades[len(shades) // 2]
                entries.append(Line2D([], [], color=colour, linewidth=1.8, label=label))
            elif self.narrow:
                equal = ", equal" if self.equal and self.multiplicity > 1 else ""
                label = f"middle {self.multiplicity}{equal}"
                entries.append(Line2D([], [], color=SHADES["middle"][0], linewidth=4.0, label=label))
            else:
                label = f"middle {self.multiplicity} (range)"
                entries.append(Patch(color=SHADES["middle"][0], alpha=0.45, label=label))
        return entries


def count_ends(n_curves: int, rank: int | None) -> tuple[int, int]:
    """Return how many curves at the top and at the bottom are drawn one by one."""
    if rank is None or 2 * rank >= n_curves:
        n_top = n_curves if rank is None else min(rank, n_curves)
        n_bottom = n_curves - n_top
    else:
        n_top = n_bottom = rank
    if n_top + n_bottom <= MOST_LINES:
        return n_top, n_bottom
    if n_bottom == 0:
        return MOST_LINES // 2, 0
    return min(n_top, MOST_LINES // 2), min(n_bottom, MOST_LINES // 2)


def make_shades(group: Group) -> list[tuple[float, float, float]]:
    from matplotlib.colors import to_rgb

    first, last = (np.array(to_rgb(colour)) for colour in SHADES[group.name])
    mixtures = np.linspace(0, 1, group.indices.size) if group.indices.size > 1 else [0.5]
    rows = [(1 - mixture) * first + mixture * last for mixture in mixtures]
    return [(float(red), float(green), float(blue)) for red, green, blue in rows]


def tidy_axes(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#E4E4E4", linewidth=0.6)
    ax.set_axisbelow(True)


def make_axes(ax: Axes | None, style: str = "flat") -> Axes:
    """Return these axes, or new ones in a new figure, with the projection that the style needs."""
    check_choice(style, "style", ("flat", "waterfall"))
    if ax is None:
        import matplotlib.pyplot as plt

        if style == "flat":
            return plt.figure(layout="constrained").add_subplot()
        new: Axes = plt.figure().add_subplot(projection="3d")  # older matplotlibs cannot measure its labels
        return new
    if (ax.name == "3d") != (style == "waterfall"):
        wanted = "projection='3d'" if style == "waterfall" else "two dimensions"
        raise ValueError(f"ax has projection {ax.name!r}; style {style!r} wanted an axes with {wanted}")
    return ax


class Display(ABC):
    """Base class of all displays: numbers that were computed before, and the axes that they were drawn on.

    Attributes
    ----------
    ax_ : matplotlib axes
        Axes that the last call of `plot` drew on.
    figure_ : matplotlib figure
        Figure of these axes.
    """

    ax_: Axes
    figure_: Figure

    @abstractmethod
    def plot(self, ax: Axes | None = None) -> Self:
        """Draw the numbers; displays have further options of their own.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Axes to draw on; a new figure by default.

        Returns
        -------
        Display
            Itself, with `ax_` and `figure_`.

        Raises
        ------
        ValueError
            If `ax` has two dimensions where three are drawn, or the other way round.
        """

    @abstractmethod
    def numbers(self) -> dict[str, Any]:
        """Return every number drawn, in plain lists."""

    def _store_axes(self, ax: Axes) -> None:
        self.ax_ = ax
        self.figure_ = ax.figure.figure  # the root, where ax stands in a subfigure


class CurvesDisplay(Display):
    """Base class of displays of k curves of one layer: singular values or angles."""

    def __init__(
        self,
        steps: npt.ArrayLike,
        values: npt.ArrayLike,
        name: str,
        rank: int | None,
        layer: int | str | None,
        times: npt.ArrayLike | None,
    ) -> None:
        if rank is not None:
            rank = check_count(rank, "rank", minimum=0)
        self._curves = Curves(steps, values, name, rank, times)
        self.layer = layer
        self.multiplicity = self._curves.multiplicity

    @abstractmethod
    def _axis_label(self) -> str:
        """Return the name of the plotted quantity, with its unit."""

    @abstractmethod
    def _draw_details(self, ax: Any, style: Style) -> None:
        """Draw what the kind of curve needs besides the curves."""

    def plot(self, ax: Axes | None = None, *, style: Style = "flat", legend: bool = True) -> Self:
        """Draw the curves over the steps or times, in two or three dimensions.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Axes to draw on, with ``projection="3d"`` for a waterfall; a new figure by default.
        style : {"flat", "waterfall"}
            "flat": curves and a band. "waterfall": one line per index i over the steps or times, in three
            dimensions; up to 24 of the curves that the band stands for.
        legend : bool
            Whether to draw a legend above the axes.

        Returns
        -------
        CurvesDisplay
            Itself, with `ax_` and `figure_`.

        Raises
        ------
        ValueError
            For an unknown style, and if `ax` has not the projection that it needs.
        """
        ax = make_axes(ax, style)
        if style == "waterfall":
            self._curves.draw_waterfall(ax)
            ax.set_zlabel(self._axis_label(), labelpad=2)  # type: ignore[attr-defined]
        else:
            self._curves.draw_flat(ax)
            ax.set_ylabel(self._axis_label())
        if legend:
            # Above the axes: inside, a band leaves no room.
            ax.legend(
                handles=self.handles(),
                frameon=False,
                fontsize="small",
                ncols=3,
                loc="lower center",
                bbox_to_anchor=(0.5, 1.0),
                title=layer_title(self.layer),
            )
        self._store_axes(ax)
        self._draw_details(ax, style)
        return self

    def handles(self) -> list[Any]:
        """Return matplotlib legend entries, for a legend shared by several axes."""
        return self._curves.handles()

    def numbers(self) -> dict[str, Any]:
        """Return every number drawn: "top" and "bottom" line by line, "middle" from "low" to "high"."""
        return self._curves.numbers()


def layer_title(layer: int | str | None) -> str | None:
    return None if layer is None else layer if isinstance(layer, str) else f"layer {layer}"


def layer_label(run: Trajectory, layer: int | str) -> int | str:
    """Return what legends call a layer: its number, or in a model its name, and what of it is followed."""
    if not run.has_named_layers:
        return layer
    name = layer if isinstance(layer, str) else run.layer_names[layer - 1]
    return f"change of {name}" if run.config.get("of") == "change" else f"layer {name!r}"


def drawn_rank(run: Trajectory, layer: int | str, n_curves: int) -> int | None:
    """Return the rank that splits a layer's curves; None where the bottom of the spectrum is missing."""
    if not run.is_rank_known:
        return None
    number = run.layer_names.index(layer) + 1 if isinstance(layer, str) else layer
    complete = n_curves == min(run.shapes[number - 1])
    return run.rank if complete else None


class LabelledDisplay(Display):
    """Base class of displays with named axes, constant levels and a legend."""

    def _label(self, x_label: str, y_label: str, levels: Mapping[str, float] | None) -> None:
        self.x_label, self.y_label = x_label, y_label
        self.levels = {label: float(level) for label, level in (levels or {}).items()}

    def _finish(self, ax: Axes, legend: bool) -> None:
        """Draw what goes around the curves."""
        for position, (label, level) in enumerate(self.levels.items()):
            style = (":", "--")[position % 2]
            ax.axhline(level, color="#333333", linestyle=style, linewidth=1.2, label=label)
        ax.set_xlabel(self.x_label)
        ax.set_ylabel(self.y_label)
        if legend:
            ax.legend(frameon=False)
        tidy_axes(ax)
        self._store_axes(ax)


def draw_envelope(ax: Axes, x: Array, values: Array, window: int, **line: Any) -> None:
    """Draw the smallest and largest of each `window` neighbouring values, and shade the range between."""
    length = min(check_count(window, "envelope"), values.size)
    neighbours = np.lib.stride_tricks.sliding_window_view(values, length)
    low, high, x = neighbours.min(axis=1), neighbours.max(axis=1), x[: values.size - length + 1]
    (drawn,) = ax.plot(x, high, **line)
    ax.plot(x, low, **(line | {"color": drawn.get_color(), "label": None}))
    ax.fill_between(x, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)


def mask_nonpositive(values: Array) -> Array:
    """Return the values with NaN for those that a logarithmic axis cannot show."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def drop_repeats(values: Array, resolution: float) -> Array:
    """Return the values in ascending order, without those within `resolution` of the one below them."""
    ordered = np.sort(values)
    keep = np.ones(ordered.size, dtype=bool)
    keep[1:] = np.diff(ordered) > resolution
    return ordered[keep]


def measure_features(
    run: Trajectory,
    measure: Callable[[npt.ArrayLike, npt.ArrayLike], float],
    step: int,
    X: npt.ArrayLike | None,
    labels: npt.ArrayLike | None,
) -> list[float]:
    """Return a measure of the features of layers 0, .., L - 1 at a recorded step."""
    if labels is None:
        labels = None if run.problem is None else run.problem.labels
    if labels is None:
        raise ValueError(
            "labels is None and the run's problem has none (files store no samples: pass X and labels); "
            "wanted one per sample"
        )
    features = run.features(0, X, step)
    values = [measure(features, labels)]
    for layer in range(1, run.n_layers):
        features = run.states.apply_layer(layer - 1, features, step, run)
        values.append(measure(features, labels))
    return values
