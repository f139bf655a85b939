# SPDX-License-Identifier: MIT
"""Time per step against width, depth, outputs, samples and threads, and memory against width.

Every library takes the same steps on the same numbers, in turns on one machine: `dlnfast.benchmarks`. Layers
are square but for the last one, which has K outputs; inputs are white.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .._support.arrays import LARGEST_COUNT, check_count
from ..benchmarks import cases
from ..benchmarks.peers import LABELS, PEERS
from ..benchmarks.record import format_seconds
from . import Result, setting
from ._captions import set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The command line starts again where a variable caps a library.
TIMED = True


@dataclass(frozen=True)
class Settings:
    """d = 1024, K = 10, L = 3, N = d where they do not change; as `dlnfast bench --case scaling`."""

    results: str = setting(
        "", "file that dlnfast bench --case scaling --out wrote; without it all is measured"
    )
    dim: int = setting(1024, "d, where it is fixed")
    n_outputs: int = setting(10, "K, where it is fixed")
    depth: int = setting(3, "L, where it is fixed")
    widths: tuple[int, ...] = setting(
        tuple(cases.SWEEPS["width"][0]), "d; beyond 8192 the reduced engine only"
    )
    depths: tuple[int, ...] = setting(tuple(cases.SWEEPS["depth"][0]), "L")
    outputs: tuple[int, ...] = setting(tuple(cases.SWEEPS["outputs"][0]), "K, at most d")
    samples: tuple[int, ...] = setting(tuple(cases.SWEEPS["samples"][0]), "N, at least d")
    memory_widths: tuple[int, ...] = setting(tuple(cases.SWEEPS["memory"][0]), "d, for memory")
    peers: tuple[str, ...] = setting(tuple(PEERS), "implementations to time", choices=tuple(PEERS))
    repeats: int = setting(5, "rounds of turns")


#: Tiny sizes, where nothing is gained: to see that everything runs.
QUICK: Final[dict[str, Any]] = {
    "dim": 64,
    "widths": (32, 64, 10000),
    "depths": (2, 3),
    "outputs": (2, 8),
    "samples": (64, 128),
    "memory_widths": (256, 10000),
    "peers": (
        "dlnfast-reduced",
        "dlnfast-dense",
        "numpy-thin",
        "torch-thin",
        "torch-autograd",
        "numpy-naive",
    ),
    "repeats": 2,
}


class _Style(NamedTuple):
    """Line style of a peer: colour by library, dashes by whether it moves the samples through the network."""

    colour: str
    line: str
    marker: str


_STYLES: Final = {
    "dlnfast-reduced": _Style("#0072B2", "-", "s"),
    "dlnfast-dense": _Style("#0072B2", "-", "o"),
    "numpy-thin": _Style("#B8860B", "-", "o"),
    "torch-thin": _Style("#D55E00", "-", "o"),
    "torch-compile": _Style("#D55E00", ":", "^"),
    "jax-thin": _Style("#009E73", "-", "o"),
    "torch-autograd-statistics": _Style("#D55E00", "-.", "v"),
    "torch-autograd": _Style("#D55E00", "--", "D"),
    "jax-autodiff": _Style("#009E73", "--", "D"),
    "numpy-naive": _Style("#B8860B", "--", "D"),
}


class _Panel(NamedTuple):
    title: str
    x_label: str


_PANELS: Final = {
    "width": _Panel("width", "width $d = N$"),
    "depth": _Panel("depth", "layers $L$"),
    "outputs": _Panel("outputs", "outputs $K$"),
    "samples": _Panel("samples", "samples $N$"),
    "threads": _Panel("threads", "threads and cores"),
    "memory": _Panel("memory", "width $d = N$"),
}
#: Inches: the figure; in a column what is left and right of the axes, for labels; in a row above and below;
#: the head.
_SIZE: Final = (17.0, 10.6)
_LEFT, _RIGHT, _ABOVE, _BELOW, _HEAD = 0.8, 2.0, 0.45, 0.65, 1.0
#: Points between the labels of two lines.
_SPACING: Final = 11.0


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Measure, or read earlier measurements."""
    del progress  # every case prints what it found
    if settings.results:
        results = cases.read_results(Path(settings.results))
        sweeps = {
            sweep["over"]: sweep
            for result in results["results"]
            for sweep in (result["sweeps"].values() if "sweeps" in result else [result])
            if "over" in sweep
        }
        if not sweeps:
            raise ValueError(f"{settings.results} has no sweep; wanted that of dlnfast bench --case scaling")
    else:
        sweeps = _measure(settings)
    return Result(sweeps, {"sweeps": sweeps}, _highlights(sweeps))


def _measure(settings: Settings) -> dict[str, Any]:
    options = cases.Options(
        repeats=check_count(settings.repeats, "repeats"),
        quick=settings.dim <= QUICK["dim"],  # short turns
        peers=settings.peers,
    )
    values = {
        "width": settings.widths,
        "depth": settings.depths,
        "outputs": settings.outputs,
        "samples": settings.samples,
        "threads": cases.thread_counts(),
        "memory": settings.memory_widths,
    }
    sizes = {"dim": settings.dim, "n_outputs": settings.n_outputs, "depth": settings.depth}
    for name, size in sizes.items():
        check_count(size, name)
    for name, minimum, maximum in (
        ("widths", settings.n_outputs, LARGEST_COUNT),
        ("memory_widths", settings.n_outputs, LARGEST_COUNT),
        ("depths", 2, LARGEST_COUNT),
        ("outputs", 1, settings.dim),
        ("samples", settings.dim, LARGEST_COUNT),
    ):
        for index, value in enumerate(getattr(settings, name)):
            check_count(value, f"{name}[{index}]", minimum=minimum, maximum=maximum)
    return {over: cases.sweep(over, values[over], **sizes, options=options) for over in _PANELS}


def _curves(sweep: Mapping[str, Any]) -> dict[str, list[tuple[float, float, float, float]]]:
    """Return for each peer where it was measured: x, median, least and largest."""
    curves: dict[str, list[tuple[float, float, float, float]]] = {}
    for x, row in zip(sweep["values"], sweep["rows"], strict=True):
        for name, value in row.get("bytes", {}).items():
            curves.setdefault(name, []).append((x, value, value, value))
        for name, times in row.get("seconds", {}).items():
            curves.setdefault(name, []).append((x, times["median"], times["least"], times["largest"]))
    return curves


def _highlights(sweeps: Mapping[str, Any]) -> list[str]:
    lines = []
    for over, sweep in sweeps.items():
        if over == "memory":
            continue
        parts = []
        for name in ("dlnfast-reduced", "dlnfast-dense", "numpy-thin", "torch-autograd"):
            points = _curves(sweep).get(name)
            if points:
                first, last = points[0], points[-1]
                parts.append(
                    f"{LABELS[name]} {format_seconds(first[1])} at {first[0]}, "
                    f"{format_seconds(last[1])} at {last[0]}"
                )
        lines.append(f"{over}: {'; '.join(parts)}")
    skipped = {
        name: reason
        for sweep in sweeps.values()
        for row in sweep["rows"]
        for name, reason in row["skipped"].items()
        if not any(name in other.get("seconds", other.get("bytes")) for other in sweep["rows"])
    }
    return [*lines, *(f"{LABELS[name]}: skipped, {reason}" for name, reason in skipped.items())]


def draw(settings: Settings, result: Result) -> Figure:
    """Draw six panels; every line is named at its end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE)
    columns, rows = 3, 2
    width, height = _SIZE[0] / columns, (_SIZE[1] - _HEAD) / rows
    for index, over in enumerate(_PANELS):
        column, row = index % columns, index // columns
        box = (
            column * width + _LEFT,
            (rows - 1 - row) * height + _BELOW,
            width - _LEFT - _RIGHT,
            height - _ABOVE - _BELOW,
        )
        across, up = _SIZE
        ax = figure.add_axes((box[0] / across, box[1] / up, box[2] / across, box[3] / up))
        _draw_panel(ax, over, result.displays.get(over))
    set_title(figure, "Time and memory of gradient descent on deep linear networks")
    return figure


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    del settings
    machine = next(iter(result.displays.values()))["machine"]
    packages = ", ".join(
        f"{name} {version}"
        for name, version in machine["packages"].items()
        if version and name not in ("jaxlib", "threadpoolctl")
    )
    return (
        f"Times are medians, bars go from the least to the largest. {machine['processor']}, "
        f"{machine['cores']} cores; dlnfast {machine['dlnfast']['version']} ({machine['dlnfast']['level']}), "
        f"{packages}; float64"
    )


def _draw_panel(ax: Axes, over: str, sweep: Mapping[str, Any] | None) -> None:
    panel = _PANELS[over]
    ax.set_xlabel(panel.x_label)
    ax.set_ylabel("memory of a run [MB]" if over == "memory" else "seconds per step")
    ax.spines[["top", "right"]].set_visible(False)
    if sweep is None:
        ax.set_title(panel.title, loc="left", fontsize=11)
        ax.text(0.5, 0.5, "not measured", ha="center", transform=ax.transAxes)
        return
    ax.set_title(f"{panel.title}   ({_describe_fixed(over, sweep)})", loc="left", fontsize=11)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.grid(True, color="#E4E4E4", linewidth=0.6)
    ax.set_axisbelow(True)
    unit = 1e-6 if over == "memory" else 1.0
    ends: list[tuple[str, float, float]] = []
    for name, curve in _curves(sweep).items():
        points = [point for point in curve if point[1] > 0]  # noise may exceed tiny values
        if not points:
            continue
        style = _STYLES[name]
        x, y, low, high = ([point[i] * (unit if i else 1) for point in points] for i in range(4))
        own = name.startswith("dlnfast")
        ax.vlines(x, low, high, color=style.colour, linewidth=3.0, alpha=0.25, zorder=2)
        ax.plot(
            x,
            y,
            color=style.colour,
            linestyle=style.line,
            marker=style.marker,
            markersize=5 if own else 3.5,
            linewidth=2.4 if own else 1.3,
            zorder=4 if own else 3,
        )
        ends.append((name, x[-1], y[-1]))
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top * (top / bottom) ** 0.05)  # room for the names of the topmost lines
    _tick(ax, sweep["values"])
    if over in ("width", "memory") and any(1.5 * end[1] < max(sweep["values"]) for end in ends):
        # Lines that stop early are named beside their ends, where there is room.
        early = [end for end in ends if end[1] < max(sweep["values"])]
        late = [end for end in ends if end[1] == max(sweep["values"])]
        _name(ax, early, 1.6 * max((end[1] for end in early), default=1.0))
        _name(ax, late, None)
    else:
        _name(ax, ends, None)


def _tick(ax: Axes, values: list[int]) -> None:
    """Put ticks at round numbers: at the values themselves where they are few and within two decades."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    low, high = min(values), max(values)
    ax.set_xlim(low / 1.15, high * 1.15)
    if high <= 100 * low:
        ax.xaxis.set_major_locator(FixedLocator(values))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())


def _name(ax: Axes, ends: list[tuple[str, float, float]], x: float | None) -> None:
    """Write names at x, or right of the axes, in the order of the lines' ends and clear of each other."""
    if not ends:
        return
    figure = ax.figure
    scale = 72.0 / figure.dpi
    bottom, top = scale * ax.bbox.y0, scale * ax.bbox.y1
    ordered = sorted(ends, key=lambda end: end[2])
    wanted = [scale * float(ax.transData.transform((end[1], end[2]))[1]) for end in ordered]
    positions = _spread_positions(wanted, bottom + _SPACING / 2, top - _SPACING / 2)
    for (name, x_end, y_end), position in zip(ordered, positions, strict=True):
        fraction = (position - bottom) / (top - bottom)
        left = 1.05 if x is None else ax.transAxes.inverted().transform(ax.transData.transform((x, 1.0)))[0]
        ax.annotate(
            LABELS[name],
            xy=(x_end, y_end),
            xycoords="data",
            xytext=(left, fraction),
            textcoords="axes fraction",
            color=_STYLES[name].colour,
            fontsize=8.5,
            fontweight="bold" if name.startswith("dlnfast") else "normal",
            va="center",
            annotation_clip=False,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.0 if x is None else 0.85, "pad": 0.5},
            zorder=5,
            arrowprops={
                "arrowstyle": "-",
                "color": _STYLES[name].colour,
                "linewidth": 0.5,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0.0, 0.5),
            },
        )


def _spread_positions(wanted: list[float], bottom: float, top: float) -> list[float]:
    """Return ascending positions near the wanted ones, `_SPACING` apart and below the top."""
    groups: list[list[float]] = []  # wanted positions of neighbours that stand as one block
    for position in wanted:
        groups.append([position])
        while len(groups) > 1 and _block(groups[-1], bottom, top)[0] < (
            _block(groups[-2], bottom, top)[-1] + _SPACING
        ):
            last = groups.pop()
            groups[-1] += last
    return [position for group in groups for position in _block(group, bottom, top)]


def _block(wanted: list[float], bottom: float, top: float) -> list[float]:
    """Return positions `_SPACING` apart, around the middle of the wanted ones, between bottom and top."""
    length = _SPACING * (len(wanted) - 1)
    first = sum(wanted) / len(wanted) - length / 2
    first = max(min(first, top - length), bottom)
    return [first + _SPACING * position for position in range(len(wanted))]


def _describe_fixed(over: str, sweep: Mapping[str, Any]) -> str:
    """Return the sizes that do not change, in words."""
    first = sweep["rows"][0]["setting"]
    sizes = {"width": ("dim", "$d$"), "outputs": ("n_outputs", "$K$"), "depth": ("depth", "$L$")}
    changing = "width" if over == "memory" else over
    parts = [f"{symbol} = {first[key]}" for name, (key, symbol) in sizes.items() if name != changing]
    if over not in ("width", "memory", "samples"):
        parts.append("$N = d$")
    return ", ".join(parts)
