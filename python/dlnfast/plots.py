# SPDX-License-Identifier: MIT
"""Displays of a trajectory, on matplotlib, which is imported when something is drawn.

A display holds the numbers that it draws. `from_trajectory` takes them from a run, `plot` draws them on
an axes of yours or on a new one, and afterwards `ax_` and `figure_` say where. `numbers` returns all of
them as plain lists.

Many equal singular values are drawn as one band that says how many they are, so that a layer of width
10^4 is as readable as one of width 30.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from . import measures
from ._arrays import as_matrix, as_vector, check_choice, check_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .trajectory import Trajectory

__all__ = [
    "AngleDisplay",
    "BifurcationDisplay",
    "CompressionDisplay",
    "DiscriminationDisplay",
    "LineDisplay",
    "LossDisplay",
    "PathDisplay",
    "RankDisplay",
    "SeriesDisplay",
    "SingularValueDisplay",
    "linear_fit",
    "log_linear_fit",
]

Style = Literal["flat", "waterfall"]
Side = Literal["right", "left"]
_Array = npt.NDArray[np.float64]

#: Okabe and Ito's colours, told apart with every kind of colour vision; yellow left out.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: First and last shade of each group of singular values: rising, staying, falling.
_SHADES: Final = {
    "top": ("#8F3200", "#F5923E"),
    "middle": ("#7A7A7A", "#7A7A7A"),
    "bottom": ("#7CBDEB", "#003F7D"),
}
#: Above so many curves, only the outermost ones are drawn one by one.
_MOST_LINES: Final = 40
#: So many curves of the middle block are drawn in a waterfall.
_MOST_MIDDLE: Final = 24
#: Spread of the middle block, relative to its values, below which they count as one repeated value.
_EQUAL: Final = 1e-9
#: Spread, relative to the range of all curves, below which the block is drawn as a line.
_NARROW: Final = 0.01
#: Errors below this share of the axis cannot be seen.
_VISIBLE: Final = 2e-3
#: A least loss below this share of the first loss is rounding.
_ROUNDING: Final = 1e-13


# --------------------------------------------------------------------------------------------------
# Curves of one layer
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Neighbouring curves that share a colour: their indices i, counted from 1, and values over the steps."""

    name: Literal["top", "middle", "bottom"]
    indices: npt.NDArray[np.int64]
    values: _Array


class _Curves:
    """The k curves of a layer, split into top r, middle block and bottom r."""

    def __init__(self, steps: npt.ArrayLike, values: npt.ArrayLike, name: str, rank: int | None) -> None:
        matrix: _Array = np.asarray(as_matrix(values, name), dtype=np.float64)
        self.steps = as_vector(steps, "steps", length=matrix.shape[0], dtype=np.float64)
        self.n_curves = matrix.shape[1]
        n_top, n_bottom = _ends(self.n_curves, rank)
        middle = matrix[:, n_top : self.n_curves - n_bottom]
        self.multiplicity = middle.shape[1]
        self.low = middle.min(axis=1) if self.multiplicity else np.empty(0)
        self.high = middle.max(axis=1) if self.multiplicity else np.empty(0)
        spread = self.high - self.low
        self.equal = bool(np.all(spread <= _EQUAL * np.maximum(np.abs(self.high), 1e-3)))
        self.narrow = self.equal or bool(spread.max() <= _NARROW * (matrix.max() - matrix.min()))
        shown = n_top + np.linspace(0, self.multiplicity - 1, min(_MOST_MIDDLE, self.multiplicity))
        parts: list[tuple[Literal["top", "middle", "bottom"], npt.NDArray[np.int64]]] = [
            ("top", np.arange(n_top)),
            ("middle", shown.round().astype(np.int64)),
            ("bottom", np.arange(self.n_curves - n_bottom, self.n_curves)),
        ]
        self.groups = [_Group(part, i + 1, matrix[:, i]) for part, i in parts if i.size]

    def numbers(self) -> dict[str, Any]:
        """Return every number drawn; equal curves of the middle block once."""
        result: dict[str, Any] = {"steps": self.steps.astype(np.int64).tolist()}
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
            for column, colour in zip(group.values.T, _shades(group), strict=True):
                ax.plot(self.steps, column, color=colour, linewidth=1.8, zorder=3)
        ax.set_xlabel("iteration $t$")
        ax.set_xlim(self.steps[0], max(self.steps[-1], self.steps[0] + 1))
        _tidy(ax)

    def _draw_band(self, ax: Axes, group: _Group) -> None:
        colour = _SHADES["middle"][0]
        if self.narrow:
            ax.plot(self.steps, (self.low + self.high) / 2, color=colour, linewidth=4.0, alpha=0.85, zorder=2)
            return
        ax.fill_between(self.steps, self.low, self.high, color=colour, alpha=0.3, linewidth=0, zorder=1)
        for column in group.values.T:
            ax.plot(self.steps, column, color=colour, linewidth=0.5, alpha=0.8, zorder=2)

    def draw_waterfall(self, ax: Any) -> None:
        start, all_drawn = 1, sum(g.indices.size for g in self.groups) == self.n_curves
        ticks, labels = [], []
        for group in self.groups:
            places = group.indices if all_drawn else np.arange(start, start + group.indices.size)
            start += group.indices.size
            ticks.append(float(places.mean()))
            labels.append(self._range_label(group))
            thin = group.name == "middle"
            for place, column, colour in zip(places, group.values.T, _shades(group), strict=True):
                ax.plot(
                    self.steps,
                    np.full(self.steps.size, place),
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
        ax.set_xlabel("iteration $t$", labelpad=2)
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

    def _range_label(self, group: _Group) -> str:
        first, last = int(group.indices[0]), int(group.indices[-1])
        return f"{first}" if first == last else f"{first}-{last}"

    def handles(self) -> list[Any]:
        """Return legend entries, one per group."""
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        entries: list[Any] = []
        for group in self.groups:
            if group.name != "middle":
                shades = _shades(group)
                name = group.name if len(self.groups) > 1 else "all"
                label = f"{name} {group.indices.size}"
                colour = shades[len(shades) // 2]
                entries.append(Line2D([], [], color=colour, linewidth=1.8, label=label))
            elif self.narrow:
                equal = ", equal" if self.equal and self.multiplicity > 1 else ""
                label = f"middle {self.multiplicity}{equal}"
                entries.append(Line2D([], [], color=_SHADES["middle"][0], linewidth=4.0, label=label))
            else:
                label = f"middle {self.multiplicity} (range)"
                entries.append(Patch(color=_SHADES["middle"][0], alpha=0.45, label=label))
        return entries


def _ends(n_curves: int, rank: int | None) -> tuple[int, int]:
    """Return how many curves at the top and at the bottom are drawn one by one."""
    if rank is None or 2 * rank >= n_curves:
        n_top = n_curves if rank is None else min(rank, n_curves)
        n_bottom = n_curves - n_top
    else:
        n_top = n_bottom = rank
    if n_top + n_bottom <= _MOST_LINES:
        return n_top, n_bottom
    if n_bottom == 0:
        return _MOST_LINES // 2, 0
    return min(n_top, _MOST_LINES // 2), min(n_bottom, _MOST_LINES // 2)


def _shades(group: _Group) -> list[tuple[float, float, float]]:
    from matplotlib.colors import to_rgb

    first, last = (np.array(to_rgb(colour)) for colour in _SHADES[group.name])
    mixtures = np.linspace(0, 1, group.indices.size) if group.indices.size > 1 else [0.5]
    rows = [(1 - mixture) * first + mixture * last for mixture in mixtures]
    return [(float(red), float(green), float(blue)) for red, green, blue in rows]


# --------------------------------------------------------------------------------------------------
# Axes
# --------------------------------------------------------------------------------------------------


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#E4E4E4", linewidth=0.6)
    ax.set_axisbelow(True)


def _axes(ax: Axes | None, style: str = "flat") -> Axes:
    """Return the axes given, or those of a new figure, with the projection that the style needs."""
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


class _Display:
    #: The axes drawn on; set by `plot`.
    ax_: Axes
    #: Its figure; set by `plot`.
    figure_: Figure

    def _drawn_on(self, ax: Axes) -> None:
        self.ax_ = ax
        self.figure_ = ax.figure.figure  # the root, where ax stands in a subfigure


class _CurvesDisplay(_Display):
    """What singular values and angles have in common: k curves of one layer."""

    def __init__(
        self,
        steps: npt.ArrayLike,
        values: npt.ArrayLike,
        name: str,
        rank: int | None,
        layer: int | str | None,
    ) -> None:
        if rank is not None:
            rank = check_count(rank, "rank", minimum=0)
        self._curves = _Curves(steps, values, name, rank)
        self.layer = layer
        self.multiplicity = self._curves.multiplicity

    def _plot(self, ax: Axes | None, style: Style, legend: bool, quantity: str, unit: str) -> None:
        ax = _axes(ax, style)
        label = f"${quantity}$ {unit}".rstrip()
        if style == "waterfall":
            self._curves.draw_waterfall(ax)
            ax.set_zlabel(label, labelpad=2)  # type: ignore[attr-defined]
        else:
            self._curves.draw_flat(ax)
            ax.set_ylabel(label)
        if legend:
            # Above the axes: inside, a band leaves no room.
            ax.legend(
                handles=self.handles(),
                frameon=False,
                fontsize="small",
                ncols=3,
                loc="lower center",
                bbox_to_anchor=(0.5, 1.0),
                title=_layer_title(self.layer),
            )
        self._drawn_on(ax)

    def handles(self) -> list[Any]:
        """Return matplotlib legend entries, for a legend shared by several axes."""
        return self._curves.handles()

    def numbers(self) -> dict[str, Any]:
        """Return every number drawn: "top" and "bottom" line by line, "middle" from "low" to "high"."""
        return self._curves.numbers()


# --------------------------------------------------------------------------------------------------
# Displays
# --------------------------------------------------------------------------------------------------


class LossDisplay(_Display):
    """The loss l(W(t)) at every step, on a logarithmic axis.

    Parameters
    ----------
    loss : array_like, shape (T + 1,)
        l(W(0)), .., l(W(T)). Zeros cannot be drawn and leave a gap.
    loss_floor : float
        The loss that no weights remove; drawn where it is above rounding, 1e-13 of the first loss.
    steps : array_like, shape (T + 1,), optional
        Where not every step has a loss: the steps of those there are.

    Attributes
    ----------
    ax_, figure_
        Where it was drawn.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For arrays that do not fit each other, or hold no real numbers.

    Examples
    --------
    >>> from dlnfast.plots import LossDisplay
    >>> display = LossDisplay([1.0, 0.1, 0.01])
    >>> display.numbers()["loss"]
    [1.0, 0.1, 0.01]
    """

    def __init__(
        self, loss: npt.ArrayLike, loss_floor: float = 0.0, *, steps: npt.ArrayLike | None = None
    ) -> None:
        self.loss = as_vector(loss, "loss", dtype=np.float64)
        n = self.loss.size
        self.steps = np.arange(n) if steps is None else as_vector(steps, "steps", length=n, dtype=np.float64)
        self.loss_floor = float(loss_floor)

    @classmethod
    def from_trajectory(cls, run: Trajectory) -> LossDisplay:
        """Take the loss of a run, and the floor of its problem where the run knows it.

        Parameters
        ----------
        run : Trajectory
            Of `train`, `track` or a file.

        Returns
        -------
        LossDisplay

        Raises
        ------
        ValueError
            If the run has no losses.
        """
        if not run.loss.size:
            why = "none were given to the tracker's log_loss" if run.is_tracked else "nothing is recorded yet"
            raise ValueError(f"run has no losses: {why}")
        floor = 0.0 if run.problem is None else run.problem.loss_floor
        return cls(run.loss, floor, steps=run.loss_steps)

    def plot(self, ax: Axes | None = None, **line: Any) -> LossDisplay:
        """Draw on `ax`, or on a new figure; further keywords go to ``ax.plot``.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Where to draw; by default on a new figure.
        **line
            Keywords of ``ax.plot``.

        Returns
        -------
        LossDisplay
            Itself, with `ax_` and `figure_`.
        """
        ax = _axes(ax)
        values = np.where(self.loss > 0, self.loss, np.nan)
        style: dict[str, Any] = {"color": COLOURS[0], "linewidth": 1.8}
        ax.plot(self.steps, values, **(style | line))
        if self.loss_floor > _ROUNDING * self.loss[0]:
            label = f"least possible: {self.loss_floor:.4g}"
            ax.axhline(self.loss_floor, color="#555555", linestyle=":", linewidth=1.2, label=label)
            ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
        if np.any(self.loss > 0):
            ax.set_yscale("log")
        ax.set_xlim(0, max(self.steps[-1], 1))
        ax.set_xlabel("iteration $t$")
        ax.set_ylabel(r"loss $\ell(t)$")
        _tidy(ax)
        self._drawn_on(ax)
        return self

    def numbers(self) -> dict[str, Any]:
        """Return every number drawn."""
        every_step = np.array_equal(self.steps, np.arange(self.loss.size))
        steps = {} if every_step else {"steps": self.steps.astype(np.int64).tolist()}
        return {"loss": self.loss.tolist(), "loss_floor": self.loss_floor, **steps}


class SingularValueDisplay(_CurvesDisplay):
    r"""The singular values sigma_i(t) of one layer over the steps.

    Parameters
    ----------
    steps : array_like, shape (n,)
        t of every record.
    singular_values : array_like, shape (n, k)
        Descending in each row.
    rank : int, optional
        r. The first r and the last r are drawn as lines, those between as one band. Default: all as lines,
        up to 40 of them.
    layer : int or str, optional
        l, for the legend.
    errors : array_like, shape (n, k), optional
        How far each value can be from the exact one: a band around its line, where it is wide enough to be
        seen.
    refreshes : array_like, optional
        Steps at which the tracker built its bounds anew, marked at the lower edge.

    Attributes
    ----------
    ax_, figure_
        Where it was drawn.
    multiplicity : int
        How many singular values the band stands for.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For arrays that do not fit each other, or hold no real numbers.

    Notes
    -----
    The waterfall follows Yaras et al. 2023, arXiv:2306.01154, Figure 1.

    Examples
    --------
    >>> from dlnfast.plots import SingularValueDisplay
    >>> display = SingularValueDisplay([0, 1], [[1.0, 1.0, 1.0, 1.0], [1.2, 0.9, 0.9, 0.8]], rank=1)
    >>> display.multiplicity
    2
    """

    def __init__(
        self,
        steps: npt.ArrayLike,
        singular_values: npt.ArrayLike,
        *,
        rank: int | None = None,
        layer: int | str | None = None,
        errors: npt.ArrayLike | None = None,
        refreshes: npt.ArrayLike | None = None,
    ) -> None:
        super().__init__(steps, singular_values, "singular_values", rank, layer)
        shape = np.shape(singular_values)
        self.errors: _Array | None = None
        if errors is not None:
            wanted = (shape[0], shape[1])
            self.errors = np.asarray(
                as_matrix(errors, "errors", shape=wanted, finite=False), dtype=np.float64
            )
        self.refreshes = as_vector([] if refreshes is None else refreshes, "refreshes", empty=True)

    @classmethod
    def from_trajectory(cls, run: Trajectory, layer: int | str = 1) -> SingularValueDisplay:
        """Take the recorded singular values of a layer, by number from 1 or by name, with their errors.

        Parameters
        ----------
        run : Trajectory
            Of `train`, `track` or a file.
        layer : int or str
            From 1, or a name.

        Returns
        -------
        SingularValueDisplay
        """
        values = run.singular_values(layer)
        rank = _drawn_rank(run, layer, values.shape[1])
        if run.engine == "reduced":
            return cls(run.steps, values, rank=rank, layer=_layer_label(run, layer))
        refreshes = run.steps[run.tracking(layer)["refreshed"]]
        errors = run.singular_value_errors(layer)
        label = _layer_label(run, layer)
        return cls(run.steps, values, rank=rank, layer=label, errors=errors, refreshes=refreshes)

    def plot(
        self, ax: Axes | None = None, *, style: Style = "flat", legend: bool = True
    ) -> SingularValueDisplay:
        """Draw on `ax`, or on a new figure.

        Parameters
        ----------
        ax : matplotlib axes, optional
            With ``projection="3d"`` for a waterfall.
        style : {"flat", "waterfall"}
            "waterfall": one line per index i over the iterations, in three dimensions; up to 24 of those
            that the band stands for.
        legend : bool
            Whether to say on the axes which lines are which.

        Returns
        -------
        SingularValueDisplay
            Itself, with `ax_` and `figure_`.
        """
        self._plot(ax, style, legend, r"\sigma_i(t)", "")
        if style != "waterfall":
            self._draw_errors(self.ax_)
        return self

    def _draw_errors(self, ax: Axes) -> None:
        limits = ax.get_ylim()  # a bound that says little must not flatten the curves
        for group in self._curves.groups if self.errors is not None else ():
            assert self.errors is not None
            for index, column, colour in zip(group.indices, group.values.T, _shades(group), strict=True):
                error = self.errors[:, index - 1]
                if np.max(error) > _VISIBLE * (limits[1] - limits[0]):
                    low = np.maximum(column - error, 0.0)
                    ax.fill_between(
                        self._curves.steps, low, column + error, color=colour, alpha=0.12, linewidth=0
                    )
        ax.set_ylim(*limits)
        if self.refreshes.size:
            ax.plot(
                self.refreshes,
                np.zeros(self.refreshes.size),
                linestyle="none",
                marker="|",
                markersize=7,
                color="#555555",
                transform=ax.get_xaxis_transform(),
                clip_on=False,
                zorder=4,
            )

    def numbers(self) -> dict[str, Any]:
        """Return every number drawn: lines and band, and where they are known the errors and refreshes."""
        result = super().numbers()
        if self.errors is not None:
            result["errors"] = self.errors.tolist()
        if self.refreshes.size:
            result["refreshes"] = self.refreshes.astype(np.int64).tolist()
        return result


_REFERENCES: Final = {"limit": "0^+", "first_step": "1"}


class AngleDisplay(_CurvesDisplay):
    """The angles between the singular vectors of one layer and where they started.

    Parameters
    ----------
    steps : array_like, shape (n,)
        t of every record.
    angles : array_like, shape (n, k)
        Radians, in the order of descending singular values.
    rank : int, optional
        r. The first r and the last r are drawn as lines, those between as one band. Default: all as lines.
    layer : int or str, optional
        l, for the legend.
    side : {"right", "left"}
        v_i or u_i.
    reference : {"limit", "first_step", "given"}
        What the angles are measured from: the vectors at t -> 0+, those after the first step, or others.

    Attributes
    ----------
    ax_, figure_
        Where it was drawn.
    multiplicity : int
        How many vectors the band stands for; theirs is the largest principal angle of the subspace that
        they span.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For arrays that do not fit each other, or hold no real numbers.
    """

    def __init__(
        self,
        steps: npt.ArrayLike,
        angles: npt.ArrayLike,
        *,
        rank: int | None = None,
        layer: int | str | None = None,
        side: Side = "right",
        reference: str = "limit",
    ) -> None:
        check_choice(side, "side", ("right", "left"))
        super().__init__(steps, angles, "angles", rank, layer)
        self.side, self.reference = side, reference

    @classmethod
    def from_trajectory(
        cls, run: Trajectory, layer: int | str = 1, side: Side = "right", reference: Any = "limit"
    ) -> AngleDisplay:
        """Take the angles of a layer, by number or name; `reference` as in `Trajectory.angles`.

        Parameters
        ----------
        run : Trajectory
            Of `train`, `track` or a file.
        layer : int or str
            From 1, or a name.
        side : {"left", "right"}
            Of which singular vectors.
        reference : str, int or array_like
            As of `Trajectory.angles`.

        Returns
        -------
        AngleDisplay
        """
        angles = run.angles(layer, side=side, reference=reference)
        return cls(
            run.steps,
            angles,
            rank=_drawn_rank(run, layer, angles.shape[1]),
            layer=_layer_label(run, layer),
            side=side,
            reference=reference if isinstance(reference, str) else "given",
        )

    def plot(self, ax: Axes | None = None, *, style: Style = "flat", legend: bool = True) -> AngleDisplay:
        """Draw on `ax`, or on a new figure; parameters as in `SingularValueDisplay.plot`.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Where to draw; by default on a new figure.
        style : {"flat", "waterfall"}
            As for `SingularValueDisplay.plot`.
        legend : bool
            Whether to name the curves.

        Returns
        -------
        AngleDisplay
            Itself, with `ax_` and `figure_`.
        """
        vector = "v" if self.side == "right" else "u"
        start = _REFERENCES.get(self.reference)
        origin = rf"{vector}_i^{{\mathrm{{ref}}}}" if start is None else f"{vector}_i({start})"
        self._plot(ax, style, legend, rf"\angle({vector}_i(t),\,{origin})", "[rad]")
        # Angles of 1e-15 are zeros, not a pattern to be magnified.
        largest = max(*(float(group.values.max()) for group in self._curves.groups), 0.1)
        if style == "waterfall":
            self.ax_.set_zlim(0.0, 1.05 * largest)  # type: ignore[attr-defined]
        else:
            self.ax_.set_ylim(-0.03 * largest, 1.05 * largest)
        return self

    def numbers(self) -> dict[str, Any]:
        """Return every number drawn: "top" and "bottom" line by line, "middle" from "low" to "high"."""
        return {"side": self.side, "reference": self.reference, **super().numbers()}


def _layer_title(layer: int | str | None) -> str | None:
    return None if layer is None else layer if isinstance(layer, str) else f"layer {layer}"


def _layer_label(run: Trajectory, layer: int | str) -> int | str:
    """Return what legends call a layer: its number, or in a model its name, and what of it is followed."""
    if not run.is_tracked:
        return layer
    name = layer if isinstance(layer, str) else run.layer_names[layer - 1]
    return f"change of {name}" if run.config.get("of") == "change" else f"layer {name!r}"


def _drawn_rank(run: Trajectory, layer: int | str, n_curves: int) -> int | None:
    """Return the rank that splits a layer's curves; None where the bottom of the spectrum is missing."""
    if run.is_tracked:
        return None
    number = run.layer_names.index(layer) + 1 if isinstance(layer, str) else layer
    complete = n_curves == min(run.shapes[number - 1])
    return run.rank if complete else None


class CompressionDisplay(_Display):
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
        values = _measured(run, measures.compression, step, X, labels)
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
        ax = _axes(ax)
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
        _tidy(ax)
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


class DiscriminationDisplay(_Display):
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
        values = _measured(run, measures.discrimination, step, X, labels)
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
        ax = _axes(ax)
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
        _tidy(ax)
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


class _Labelled(_Display):
    """A display with named axes, constant levels and a legend."""

    def _label(self, x_label: str, y_label: str, levels: Mapping[str, float] | None) -> None:
        self.x_label, self.y_label = x_label, y_label
        self.levels = {label: float(level) for label, level in (levels or {}).items()}

    def _finish(self, ax: Axes, legend: bool) -> None:
        """Draw what goes around the curves."""
        for place, (label, level) in enumerate(self.levels.items()):
            ax.axhline(level, color="#333333", linestyle=(":", "--")[place % 2], linewidth=1.2, label=label)
        ax.set_xlabel(self.x_label)
        ax.set_ylabel(self.y_label)
        if legend:
            ax.legend(frameon=False)
        _tidy(ax)
        self._drawn_on(ax)


class LineDisplay(_Labelled):
    """Named curves over one variable, with constant levels and, dashed, what theory says of each curve.

    Parameters
    ----------
    x : array_like, shape (n,)
        The variable.
    curves : mapping of str to array_like, shape (n,)
        Label -> values. NaN leaves a gap.
    x_label, y_label : str
        What the axes say.
    theory : mapping of str to array_like, shape (n,), optional
        For some of the labels, values drawn dashed in the colour of the curve.
    spread : mapping of str to array_like, shape (n,), optional
        For some of the labels, half the length of error bars.
    levels : mapping of str to float, optional
        Label -> where a horizontal line is drawn.
    log_y : bool
        Whether the vertical axis is logarithmic.

    Attributes
    ----------
    ax_, figure_
        Where it was drawn.

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

    def _checked(self, lines: Mapping[str, npt.ArrayLike], name: str) -> dict[str, _Array]:
        return {
            label: np.asarray(
                as_vector(y, f"{name}[{label!r}]", length=self.x.size, dtype=np.float64, finite=False)
            )
            for label, y in lines.items()
        }

    def plot(
        self, ax: Axes | None = None, *, colors: Sequence[str] = COLOURS, legend: bool = True, **line: Any
    ) -> LineDisplay:
        """Draw on `ax`, or on a new figure; curve i in colour i, further keywords go to ``ax.plot``.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Where to draw; by default on a new figure.
        colors : sequence of str
            Of the curves, one after the other.
        legend : bool
            Whether to name the curves.
        **line
            Keywords of ``ax.plot``.

        Returns
        -------
        LineDisplay
            Itself, with `ax_` and `figure_`.
        """
        ax = _axes(ax)
        style: dict[str, Any] = {"linewidth": 1.6, "zorder": 3} | line
        for place, (label, values) in enumerate(self.curves.items()):
            colour = colors[place % len(colors)]
            ax.plot(self.x, values, color=colour, label=label, **style)
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
        """Return every number drawn."""
        return {
            "x": self.x.tolist(),
            "curves": {label: values.tolist() for label, values in self.curves.items()},
            "theory": {label: values.tolist() for label, values in self.theory.items()},
            "spread": {label: values.tolist() for label, values in self.spread.items()},
            "levels": self.levels,
        }


class SeriesDisplay(_Labelled):
    """Named curves, each at places of its own, on logarithmic axes: what several runs took to get where.

    Parameters
    ----------
    series : mapping of str to (array_like, array_like)
        Label -> places and values, of one length. What a logarithm does not have leaves a gap.
    x_label, y_label : str
        What the axes say.
    log_x : bool
        Whether the horizontal axis is logarithmic too.
    levels : mapping of str to float, optional
        Label -> where a horizontal line is drawn.

    Attributes
    ----------
    ax_, figure_
        Where it was drawn.

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
        self.series: dict[str, tuple[_Array, _Array]] = {}
        for label, (places, values) in series.items():
            x = as_vector(places, f"series[{label!r}][0]", dtype=np.float64)
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
    ) -> SeriesDisplay:
        """Draw on `ax`, or on a new figure.

        Parameters
        ----------
        ax : matplotlib axes, optional
        styles : mapping of str to mapping, optional
            Label -> keywords of ``ax.plot`` for this curve.
        legend : bool
            Whether to name the curves on the axes.
        **line
            Keywords of ``ax.plot`` for all of them.

        Returns
        -------
        SeriesDisplay
            Itself, with `ax_` and `figure_`.
        """
        ax = _axes(ax)
        for place, (label, (x, y)) in enumerate(self.series.items()):
            style: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "linewidth": 1.8, "zorder": 3}
            style |= line | dict((styles or {}).get(label, {}))
            ax.plot(np.where(x > 0, x, np.nan) if self.log_x else x, _positive(y), label=label, **style)
        ax.set_yscale("log")
        if self.log_x:
            ax.set_xscale("log")
        self._finish(ax, legend)
        return self

    def numbers(self) -> dict[str, Any]:
        """Return every number drawn."""
        return {
            "series": {label: {"x": x.tolist(), "y": y.tolist()} for label, (x, y) in self.series.items()},
            "levels": self.levels,
        }


def _positive(values: _Array) -> _Array:
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


class RankDisplay(_Display):
    """How many layers have which rank: a histogram, with bars side by side for several runs.

    Parameters
    ----------
    ranks : mapping of str to sequence of int
        Label -> one rank for each layer.

    Attributes
    ----------
    counts : dict of str to list of int
        Label -> how many layers have rank 0, 1, 2, ..
    ax_, figure_
        Where it was drawn.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For arrays that do not fit each other, or hold no real numbers.

    Examples
    --------
    >>> from dlnfast.plots import RankDisplay
    >>> RankDisplay({"LoRA": [2, 2, 2], "Deep LoRA": [0, 1, 1]}).counts
    {'LoRA': [0, 0, 3], 'Deep LoRA': [1, 2, 0]}
    """

    def __init__(self, ranks: Mapping[str, Sequence[int]]) -> None:
        self.ranks = {
            label: [check_count(rank, f"ranks[{label!r}]", minimum=0) for rank in each]
            for label, each in ranks.items()
        }
        if not any(self.ranks.values()):
            raise ValueError("ranks is empty; wanted the ranks of some layers")
        largest = max(max(each, default=0) for each in self.ranks.values())
        self.counts = {
            label: [each.count(rank) for rank in range(largest + 1)] for label, each in self.ranks.items()
        }

    @classmethod
    def from_trajectory(cls, run: Trajectory, threshold: float = 0.01, step: int = -1) -> RankDisplay:
        """Take the ranks of a run's layers at a record, as by `Trajectory.ranks`.

        Parameters
        ----------
        run : Trajectory
            Of `train`, `track` or a file.
        threshold : float
            Share of the largest singular value above which others count.
        step : int
            A recorded step; -1 for the last.

        Returns
        -------
        RankDisplay
        """
        return cls({f"above {threshold:g} of the largest": list(run.ranks(threshold, step=step).values())})

    def plot(
        self, ax: Axes | None = None, *, colors: Sequence[str] = COLOURS, legend: bool = True, **bar: Any
    ) -> RankDisplay:
        """Draw on `ax`, or on a new figure; further keywords go to ``ax.bar``.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Where to draw; by default on a new figure.
        colors : sequence of str
            Of the curves, one after the other.
        legend : bool
            Whether to name the curves.
        **bar
            Keywords of ``ax.bar``.

        Returns
        -------
        RankDisplay
            Itself, with `ax_` and `figure_`.
        """
        ax = _axes(ax)
        width = 0.8 / len(self.counts)
        style: dict[str, Any] = {"width": width} | bar
        for place, (label, counts) in enumerate(self.counts.items()):
            shift = (place - (len(self.counts) - 1) / 2) * width
            x = np.arange(len(counts)) + shift
            ax.bar(x, counts, color=colors[place % len(colors)], label=label, **style)
        n_ranks = len(next(iter(self.counts.values())))
        if n_ranks <= _MOST_LINES:
            ax.set_xticks(range(n_ranks))
        ax.set_xlabel("rank")
        ax.set_ylabel("layers")
        if legend:
            ax.legend(frameon=False)
        _tidy(ax)
        self._drawn_on(ax)
        return self

    def numbers(self) -> dict[str, Any]:
        """Return every number drawn."""
        return {"ranks": self.ranks, "counts": self.counts}


class PathDisplay(_Display):
    """The ways of matrices through their space, along the three principal components of all of them.

    Parameters
    ----------
    paths : mapping of str to sequence of array_like
        Label -> the matrices of one way, in their order; all of one shape.

    Attributes
    ----------
    ax_, figure_
        Where it was drawn.
    coordinates : dict of str to ndarray
        Label -> (n, 3), distances from the mean of all matrices.
    shares : ndarray
        Which share of the variance each component has.

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
        places: _Array = np.zeros((len(rows), 3))
        places[:, :found] = vectors[:, ::-1][:, :found] * np.sqrt(largest)
        self.shares = np.zeros(3)
        self.shares[:found] = largest / total if total > 0 else 0.0
        # Either sign will do; what the first way gains counts as positive.
        length = len(next(iter(paths.values())))
        places *= np.where(places[length - 1] < places[0], -1.0, 1.0)
        ends = np.cumsum([len(path) for path in paths.values()])[:-1]
        self.coordinates = dict(zip(paths, np.split(places, ends), strict=True))

    @classmethod
    def from_trajectories(cls, runs: Mapping[str, Trajectory], steps: Sequence[int]) -> PathDisplay:
        """Take the end-to-end matrices of runs at steps that all of them recorded.

        Parameters
        ----------
        runs : mapping of str to Trajectory
            Label -> run.
        steps : sequence of int
            Those whose end-to-end matrices are taken.

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
    ) -> PathDisplay:
        """Draw on `ax`, which has ``projection="3d"``, or on a new figure; `styles` as `SeriesDisplay`.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Where to draw; by default on a new figure.
        styles : mapping of str to mapping, optional
            Label -> keywords of ``ax.plot`` for this curve.
        legend : bool
            Whether to name the curves.

        Returns
        -------
        PathDisplay
            Itself, with `ax_` and `figure_`.
        """
        from matplotlib.ticker import MaxNLocator

        ax = _axes(ax, "waterfall")
        for place, (label, points) in enumerate(self.coordinates.items()):
            style: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "linewidth": 1.6}
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
        self._drawn_on(ax)
        return self

    def numbers(self) -> dict[str, Any]:
        """Return every number drawn."""
        return {
            "coordinates": {label: points.tolist() for label, points in self.coordinates.items()},
            "shares": self.shares.tolist(),
        }


class BifurcationDisplay(_Display):
    """The values that something keeps visiting, over a parameter: one for rest, two for a cycle of two.

    Parameters
    ----------
    parameter : array_like, shape (m,)
        Where on the horizontal axis.
    visited : mapping of str to array_like, shape (m, n)
        Label -> n late values for each parameter. Repeated ones, up to `resolution`, count once.
    x_label, y_label : str
        What the axes say.
    thresholds : mapping of str to float, optional
        Label of `visited` -> parameter at which theory says that it leaves its rest; drawn upright.
    resolution : float
        Values closer than this are one.

    Attributes
    ----------
    ax_, figure_
        Where it was drawn.

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
        self.values: dict[str, list[_Array]] = {}
        for label, block in visited.items():
            shape = (self.parameter.size, None)
            rows = as_matrix(block, f"visited[{label!r}]", shape=shape, dtype=np.float64)
            self.values[label] = [_distinct(row, resolution) for row in rows]
        self.thresholds = {label: float(value) for label, value in (thresholds or {}).items()}
        self.x_label, self.y_label = x_label, y_label

    def periods(self) -> dict[str, list[int]]:
        """Return how many distinct values were visited, for each label and parameter."""
        return {label: [len(row) for row in rows] for label, rows in self.values.items()}

    def plot(self, ax: Axes | None = None, *, legend: bool = True) -> BifurcationDisplay:
        """Draw on `ax`, or on a new figure.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Where to draw; by default on a new figure.
        legend : bool
            Whether to name the curves.

        Returns
        -------
        BifurcationDisplay
            Itself, with `ax_` and `figure_`.
        """
        ax = _axes(ax)
        for place, (label, rows) in enumerate(self.values.items()):
            colour = COLOURS[place % len(COLOURS)]
            x = np.repeat(self.parameter, [len(row) for row in rows])
            ax.plot(x, np.concatenate(rows), ".", color=colour, markersize=2.0, label=label, rasterized=True)
            if label in self.thresholds:
                ax.axvline(self.thresholds[label], color=colour, linewidth=1.0, linestyle="--", zorder=1)
        ax.set_xlim(self.parameter.min(), max(self.parameter.max(), self.parameter.min() + 1e-12))
        ax.set_xlabel(self.x_label)
        ax.set_ylabel(self.y_label)
        if legend:
            ax.legend(frameon=False, markerscale=5)
        _tidy(ax)
        self._drawn_on(ax)
        return self

    def numbers(self) -> dict[str, Any]:
        """Return every number drawn."""
        return {
            "parameter": self.parameter.tolist(),
            "visited": {label: [row.tolist() for row in rows] for label, rows in self.values.items()},
            "thresholds": self.thresholds,
        }


def _distinct(values: _Array, resolution: float) -> _Array:
    """Return the ascending values without those that follow another one closely."""
    ordered = np.sort(values)
    keep = np.ones(ordered.size, dtype=bool)
    keep[1:] = np.diff(ordered) > resolution
    return ordered[keep]


def _measured(
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
            "labels is not given and the run's problem has none (a file keeps no samples: give X and "
            "labels); wanted one per sample"
        )
    features = run.features(0, X, step)
    values = [measure(features, labels)]
    for layer in range(1, run.n_layers):
        features = run.weights(layer, step) @ features
        values.append(measure(features, labels))
    return values


class LinearFit(NamedTuple):
    """D_l ~ start + slope l."""

    slope: float
    start: float
    #: Share of the variance that the line explains; 1 for constant values.
    r_squared: float


def linear_fit(layers: npt.ArrayLike, values: npt.ArrayLike) -> LinearFit | None:
    """Return the straight line through values, by least squares.

    Parameters
    ----------
    layers : array_like, shape (n,)
        l.
    values : array_like, shape (n,)
        D_l. Those that are not finite are left out.

    Returns
    -------
    LinearFit or None
        Named tuple ``(slope, start, r_squared)``; None where fewer than two values are left.

    Raises
    ------
    ShapeError
        For vectors of different lengths.

    Notes
    -----
    Cost: O(n).

    Examples
    --------
    >>> from dlnfast.plots import linear_fit
    >>> fit = linear_fit([0, 1, 2], [8.0, 6.0, 4.0])
    >>> round(fit.slope, 12), round(fit.start, 12), round(fit.r_squared, 12)
    (-2.0, 8.0, 1.0)
    """
    places = as_vector(layers, "layers", dtype=np.float64)
    numbers = as_vector(values, "values", length=places.size, dtype=np.float64, finite=False)
    use = np.isfinite(numbers)
    if np.unique(places[use]).size < 2:
        return None
    slope, start = np.polyfit(places[use], numbers[use], 1)
    missed = float(np.sum((numbers[use] - start - slope * places[use]) ** 2))
    variance = float(np.sum((numbers[use] - np.mean(numbers[use])) ** 2))
    return LinearFit(float(slope), float(start), 1.0 - missed / variance if variance > 0 else 1.0)


class LogLinearFit(NamedTuple):
    """C_l ~ start * ratio^l."""

    ratio: float
    start: float


def log_linear_fit(layers: npt.ArrayLike, values: npt.ArrayLike) -> LogLinearFit | None:
    """Return the geometric law through positive values: least squares of log(value) over the layer.

    Parameters
    ----------
    layers : array_like, shape (n,)
        l.
    values : array_like, shape (n,)
        C_l. Those that are not positive and finite are left out.

    Returns
    -------
    LogLinearFit or None
        Named tuple ``(ratio, start)``; None where fewer than two values are left.

    Raises
    ------
    ShapeError
        For vectors of different lengths.

    Notes
    -----
    Cost: O(n).

    Examples
    --------
    >>> from dlnfast.plots import log_linear_fit
    >>> fit = log_linear_fit([0, 1, 2], [8.0, 4.0, 2.0])
    >>> round(fit.ratio, 12), round(fit.start, 12)
    (0.5, 8.0)
    """
    places = as_vector(layers, "layers", dtype=np.float64)
    numbers = as_vector(values, "values", length=places.size, dtype=np.float64, finite=False)
    use = np.isfinite(numbers) & (numbers > 0)
    if np.unique(places[use]).size < 2:
        return None
    slope, intercept = np.polyfit(places[use], np.log(numbers[use]), 1)
    return LogLinearFit(float(np.exp(slope)), float(np.exp(intercept)))
