# SPDX-License-Identifier: MIT
"""Displays of one run: loss, singular values, angles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from .._support.arrays import as_matrix, as_vector, check_choice, check_count
from ._base import (
    COLOURS,
    MOST_LINES,
    ROUNDING,
    VISIBLE,
    Array,
    CurvesDisplay,
    Display,
    RunAxis,
    Side,
    Style,
    draw_envelope,
    drawn_rank,
    layer_label,
    make_axes,
    make_shades,
    tidy_axes,
    times_of_records,
)

if TYPE_CHECKING:
    from typing import Self

    from matplotlib.axes import Axes

    from .._trajectory.trajectory import Trajectory


class LossDisplay(Display):
    """The loss l(W(t)) at every step, or time of a gradient flow, on a logarithmic axis.

    Parameters
    ----------
    loss : array_like, shape (T + 1,)
        l(W(0)), .., l(W(T)). Zeros cannot be drawn and leave a gap.
    loss_floor : float
        Smallest loss that any weights reach; drawn where it is above 1e-13 of the first loss.
    steps : array_like, shape (T + 1,), optional
        Steps of the losses; 0 .. T by default.
    times : array_like, shape (T + 1,), optional
        Times of the losses of a gradient flow, drawn instead of the steps.

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
        self,
        loss: npt.ArrayLike,
        loss_floor: float = 0.0,
        *,
        steps: npt.ArrayLike | None = None,
        times: npt.ArrayLike | None = None,
    ) -> None:
        self.loss = as_vector(loss, "loss", dtype=np.float64)
        n = self.loss.size
        self._axis = RunAxis(np.arange(n) if steps is None else steps, times, n)
        self.steps, self.times = self._axis.steps, self._axis.times
        self.loss_floor = float(loss_floor)

    @classmethod
    def from_trajectory(cls, run: Trajectory) -> LossDisplay:
        """Take the loss of a run, and the floor of its problem where the run knows it.

        Parameters
        ----------
        run : Trajectory
            Run from `train`, `track` or a file.

        Returns
        -------
        LossDisplay

        Raises
        ------
        ValueError
            If the run has no losses.
        """
        if not run.loss.size:
            raise ValueError(f"run has no losses: {run.states.missing_losses}")
        floor = 0.0 if run.problem is None else run.problem.loss_floor
        return cls(run.loss, floor, steps=run.loss_steps, times=run.times)

    def plot(self, ax: Axes | None = None, *, envelope: int | None = None, **line: Any) -> Self:
        """Draw the loss over the steps or times, and the smallest possible loss.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Axes to draw on; a new figure by default.
        envelope : int, optional
            Number of neighbouring losses whose smallest and largest are drawn instead of each loss.
        **line
            Keywords of ``ax.plot``.

        Returns
        -------
        LossDisplay
            Itself, with `ax_` and `figure_`.

        Raises
        ------
        TypeError, ValueError
            If `envelope` is not a count.
        """
        ax = make_axes(ax)
        values = np.where(self.loss > 0, self.loss, np.nan)
        style: dict[str, Any] = {"color": COLOURS[0], "linewidth": 1.8}
        if envelope is None:
            ax.plot(self._axis.x, values, **(style | line))
        else:
            draw_envelope(ax, self._axis.x, values, envelope, **(style | line))
        if self.loss_floor > ROUNDING * self.loss[0]:
            label = f"least possible: {self.loss_floor:.4g}"
            ax.axhline(self.loss_floor, color="#555555", linestyle=":", linewidth=1.2, label=label)
            ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
        if np.any(self.loss > 0):
            ax.set_yscale("log")
        self._axis.finish(ax)
        ax.set_ylabel(r"loss $\ell(t)$")
        tidy_axes(ax)
        self._store_axes(ax)
        return self

    def numbers(self) -> dict[str, Any]:
        axis = self._axis.numbers()
        if axis["steps"] == list(range(self.loss.size)):
            del axis["steps"]
        return {"loss": self.loss.tolist(), "loss_floor": self.loss_floor, **axis}


class SingularValueDisplay(CurvesDisplay):
    r"""The singular values sigma_i(t) of one layer over the steps, or times of a gradient flow.

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
        Error bound of each value, drawn as a band around its line where it is wide enough to be seen.
    refreshes : array_like, optional
        Steps at which the tracker recomputed its bounds, marked at the lower edge.
    times : array_like, shape (n,), optional
        Times of the records of a gradient flow, drawn instead of the steps.

    Attributes
    ----------
    multiplicity : int
        Number of singular values in the band.

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
        times: npt.ArrayLike | None = None,
    ) -> None:
        super().__init__(steps, singular_values, "singular_values", rank, layer, times)
        shape = np.shape(singular_values)
        self.errors: Array | None = None
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
            Run from `train`, `track` or a file.
        layer : int or str
            Layer number from 1, or layer name.

        Returns
        -------
        SingularValueDisplay
        """
        values = run.singular_values(layer)
        tracked: dict[str, Array] = {}
        if run.states.has_tracker_records:
            tracked["refreshes"] = run.steps[run.tracking(layer)["refreshed"]]
            tracked["errors"] = run.singular_value_errors(layer)
        return cls(
            run.steps,
            values,
            rank=drawn_rank(run, layer, values.shape[1]),
            layer=layer_label(run, layer),
            times=times_of_records(run),
            **tracked,
        )

    def _axis_label(self) -> str:
        return r"$\sigma_i(t)$"

    def _draw_details(self, ax: Any, style: Style) -> None:
        if style != "waterfall":
            self._draw_errors(ax)

    def _draw_errors(self, ax: Axes) -> None:
        limits = ax.get_ylim()  # a bound that says little must not flatten the curves
        for group in self._curves.groups if self.errors is not None else ():
            assert self.errors is not None
            for index, column, colour in zip(group.indices, group.values.T, make_shades(group), strict=True):
                error = self.errors[:, index - 1]
                if np.max(error) > VISIBLE * (limits[1] - limits[0]):
                    low = np.maximum(column - error, 0.0)
                    ax.fill_between(
                        self._curves.axis.x, low, column + error, color=colour, alpha=0.12, linewidth=0
                    )
        ax.set_ylim(*limits)
        if self.refreshes.size:
            ax.plot(
                self._curves.axis.locate(self.refreshes),
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


class AngleDisplay(CurvesDisplay):
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
    reference : {"limit", "first_step", "custom"}
        Vectors from which the angles are measured: those at t -> 0+, those after the first step, or others.
    times : array_like, shape (n,), optional
        Times of the records of a gradient flow, drawn instead of the steps.

    Attributes
    ----------
    multiplicity : int
        Number of vectors in the band, which shows the largest principal angle of the subspace that they
        span.

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
        times: npt.ArrayLike | None = None,
    ) -> None:
        check_choice(side, "side", ("right", "left"))
        super().__init__(steps, angles, "angles", rank, layer, times)
        self.side, self.reference = side, reference

    @classmethod
    def from_trajectory(
        cls, run: Trajectory, layer: int | str = 1, side: Side = "right", reference: Any = "limit"
    ) -> AngleDisplay:
        """Take the angles of a layer, by number or name; `reference` as in `Trajectory.angles`.

        Parameters
        ----------
        run : Trajectory
            Run from `train`, `track` or a file.
        layer : int or str
            Layer number from 1, or layer name.
        side : {"left", "right"}
            Right or left singular vectors.
        reference : str, int or array_like
            Vectors from which the angles are measured; see `Trajectory.angles`.

        Returns
        -------
        AngleDisplay
        """
        angles = run.angles(layer, side=side, reference=reference)
        return cls(
            run.steps,
            angles,
            rank=drawn_rank(run, layer, angles.shape[1]),
            layer=layer_label(run, layer),
            side=side,
            reference=reference if isinstance(reference, str) else "custom",
            times=times_of_records(run),
        )

    def _axis_label(self) -> str:
        vector = "v" if self.side == "right" else "u"
        start = _REFERENCES.get(self.reference)
        if self.reference == "first_step" and self._curves.axis.times is not None:
            start = "t_1"
        origin = rf"{vector}_i^{{\mathrm{{ref}}}}" if start is None else f"{vector}_i({start})"
        return rf"$\angle({vector}_i(t),\,{origin})$ [rad]"

    def _draw_details(self, ax: Any, style: Style) -> None:
        # Angles of 1e-15 are zeros, not a pattern to be magnified.
        largest = max(*(float(group.values.max()) for group in self._curves.groups), 0.1)
        if style == "waterfall":
            ax.set_zlim(0.0, 1.05 * largest)
        else:
            ax.set_ylim(-0.03 * largest, 1.05 * largest)

    def numbers(self) -> dict[str, Any]:
        """Return every number drawn: "top" and "bottom" line by line, "middle" from "low" to "high"."""
        return {"side": self.side, "reference": self.reference, **super().numbers()}


class RankDisplay(Display):
    """How many layers have which rank: a histogram, with bars side by side for several runs.

    Parameters
    ----------
    ranks : mapping of str to sequence of int
        Label -> one rank for each layer.

    Attributes
    ----------
    counts : dict of str to list of int
        Label -> how many layers have rank 0, 1, 2, ..

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
            Run from `train`, `track` or a file.
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
    ) -> Self:
        """Draw one group of bars for each rank.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Axes to draw on; a new figure by default.
        colors : sequence of str
            Colours of the curves, in order; they repeat after the last.
        legend : bool
            Whether to draw a legend.
        **bar
            Keywords of ``ax.bar``.

        Returns
        -------
        RankDisplay
            Itself, with `ax_` and `figure_`.
        """
        ax = make_axes(ax)
        width = 0.8 / len(self.counts)
        style: dict[str, Any] = {"width": width} | bar
        for position, (label, counts) in enumerate(self.counts.items()):
            shift = (position - (len(self.counts) - 1) / 2) * width
            x = np.arange(len(counts)) + shift
            ax.bar(x, counts, color=colors[position % len(colors)], label=label, **style)
        n_ranks = len(next(iter(self.counts.values())))
        if n_ranks <= MOST_LINES:
            ax.set_xticks(range(n_ranks))
        ax.set_xlabel("rank")
        ax.set_ylabel("layers")
        if legend:
            ax.legend(frameon=False)
        tidy_axes(ax)
        self._store_axes(ax)
        return self

    def numbers(self) -> dict[str, Any]:
        return {"ranks": self.ranks, "counts": self.counts}
