# SPDX-License-Identifier: MIT
"""Tables, files and the report of the spectra of checkpoints."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from .._config.runs import write_json
from .._support.environment import environment
from .._support.files import write_text_whole
from .._support.optional import import_optional
from .._trajectory.trajectory import Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMAT: Final = "dlnfast checkpoint spectra"
_VERSION: Final = 1
#: Prefixes of the quantities of each kind in tables.
_PREFIXES: Final[Mapping[str, str]] = {"weights": "", "change": "change_", "step": "step_"}
_TITLES: Final[Mapping[str, str]] = {
    "weights": "Weights",
    "change": "Change since the first checkpoint or the base",
    "step": "Change from each checkpoint to the next",
}
#: Largest number of layers that are drawn one by one, and with a legend.
_N_DRAWN: Final = 12
#: Largest number of characters of a name in a picture.
_LENGTH: Final = 46
_COLUMNS: Final = 3
_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .2em .8em; text-align: right; vertical-align: bottom; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; height: auto }
"""


#: Function of a run, the name of a layer and axes that draws the layer's singular values.
DrawLayer = Callable[[Trajectory, str, Any], object]


@dataclass(frozen=True)
class Row:
    """One number of the long-form table; the bound is None where the number is rounded only."""

    step: int
    layer: str
    index: int | None
    quantity: str
    value: float
    bound: float | None


def list_rows(runs: Mapping[str, Trajectory]) -> Iterator[Row]:
    """Yield all numbers: singular values with their bounds, Frobenius norms and stable ranks.

    Parameters
    ----------
    runs : mapping of str to Trajectory
        Trajectories by the name of their kind.
    """
    for kind, run in runs.items():
        prefix = _PREFIXES[kind]
        for name in run.layer_names:
            values, errors = run.singular_values(name), run.singular_value_errors(name)
            norms = run.tracking(name)["norm"]
            for i, step in enumerate(run.steps.tolist()):
                for j, (value, error) in enumerate(zip(values[i], errors[i], strict=True), 1):
                    yield Row(step, name, j, f"{prefix}singular_value", float(value), float(error))
                yield Row(step, name, None, f"{prefix}norm", float(norms[i]), None)
                rank, bound = _stable_rank(float(norms[i]), float(values[i, 0]), float(errors[i, 0]))
                yield Row(step, name, None, f"{prefix}stable_rank", rank, bound)


def _stable_rank(norm: float, top: float, error: float) -> tuple[float, float]:
    """Return ``||W||_F^2 / sigma_1^2``, and its bound from that of sigma_1; 0 for a matrix of zeros."""
    if not top > 0:
        return 0.0, 0.0
    rank = (norm / top) ** 2
    return rank, (norm / (top - error)) ** 2 - rank if error < top else float("inf")


def summarise(runs: Mapping[str, Trajectory]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a table with one row per layer; cells of the head have up to three lines.

    Parameters
    ----------
    runs : mapping of str to Trajectory
        Trajectories by the name of their kind.
    """
    head = ["layer", "shape"]
    some = next(iter(runs.values()))
    rows = [
        [name, f"{m} x {n}"] for name, (m, n) in zip(some.layer_names, some.config["shapes"], strict=True)
    ]
    for kind, run in runs.items():
        first, last = int(run.steps[0]), int(run.steps[-1])
        both = len(run.steps) > 1 and kind == "weights"
        matrix = {"weights": "W", "change": "change", "step": "last change"}[kind]
        head += [f"{matrix}\nsigma_1\nstep {first}"] if both else []
        head += [f"{matrix}\nsigma_1\nstep {last}", "bound", f"{matrix}\nstable\nrank"]
        for row in rows:
            values, errors = run.singular_values(row[0]), run.singular_value_errors(row[0])
            top, error = float(values[-1, 0]), float(errors[-1, 0])
            rank, _ = _stable_rank(float(run.tracking(row[0])["norm"][-1]), top, error)
            row += [f"{float(values[0, 0]):.5g}"] if both else []
            row += [f"{top:.5g}", f"{error:.1e}", f"{rank:.4g}"]
    return head, rows


def write_files(
    folder: Path, metadata: Mapping[str, Any], runs: Mapping[str, Trajectory], draw_layer: DrawLayer
) -> list[Path]:
    """Write ``spectra.csv``, ``spectra.json`` and ``report.html`` into a folder; return their paths.

    Parameters
    ----------
    folder : Path
        Folder, which is made if missing.
    metadata : mapping
        Steps, names of the checkpoints, and settings.
    runs : mapping of str to Trajectory
        Trajectories by the name of their kind.
    draw_layer : callable
        ``draw_layer(run, name, ax)`` draws the singular values of a layer on axes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(field.name for field in fields(Row))
    for row in list_rows(runs):
        writer.writerow("" if cell is None else cell for cell in astuple(row))
    paths = [folder / name for name in ("spectra.csv", "spectra.json", "report.html")]
    write_text_whole(paths[0], table.getvalue())
    write_json(paths[1], _describe(metadata, runs))
    write_text_whole(paths[2], _make_report(metadata, runs, draw_layer))
    return paths


def _describe(metadata: Mapping[str, Any], runs: Mapping[str, Trajectory]) -> dict[str, Any]:
    spectra = {
        kind: {
            "steps": run.steps,
            "layers": {
                name: {
                    "singular_values": run.singular_values(name),
                    "errors": run.singular_value_errors(name),
                    "norm": run.tracking(name)["norm"],
                    "completeness": run.tracking(name)["completeness"],
                }
                for name in run.layer_names
            },
        }
        for kind, run in runs.items()
    }
    about = {"format": _FORMAT, "version": _VERSION}
    return {**about, **metadata, "spectra": spectra, "environment": environment()}


def _make_report(metadata: Mapping[str, Any], runs: Mapping[str, Trajectory], draw_layer: DrawLayer) -> str:
    """Return an HTML page that refers to no other file."""
    head, rows = summarise(runs)
    listed = "".join(
        f"<tr><td>{html.escape(label)}</td><td>{step}</td></tr>"
        for label, step in zip(metadata["checkpoints"], metadata["steps"], strict=True)
    )
    base = f"<p>Base: {html.escape(metadata['base'])}</p>" if metadata["base"] else ""
    parts = [
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>Spectra of checkpoints</title>",
        f"<style>{_STYLE}</style></head><body><h1>Spectra of checkpoints</h1>",
        f"<table><tr><th>checkpoint</th><th>step</th></tr>{listed}</table>{base}",
        "<p>Every singular value is within its bound of the exact one. All values: spectra.csv.</p>",
        _format_html(head, rows),
        *_draw(runs, draw_layer),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _format_html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        escaped = (html.escape(cell).replace("\n", "<br>") for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in escaped) + "</tr>"

    return "<table>\n" + "\n".join([line(head, "th"), *(line(row, "td") for row in rows)]) + "\n</table>"


def _draw(runs: Mapping[str, Trajectory], draw_layer: DrawLayer) -> Iterator[str]:
    """Yield headings and pictures, as SVG within the page."""
    try:
        figures = import_optional("matplotlib.figure", "pictures in reports", "plot")
    except ModuleNotFoundError as error:
        yield f"<p>There are no pictures: {html.escape(str(error))}</p>"
        return
    for kind, run in runs.items():
        yield f"<h2>{_TITLES[kind]}</h2>"
        figure = figures.Figure(figsize=(11, 4), layout="constrained")
        _draw_overview(figure, run)
        yield _to_svg(figure)
        if run.n_layers > _N_DRAWN:
            yield "<p>One line for each layer, from the first (dark) to the last (bright).</p>"
        names = _choose_layers(run)
        if len(run.steps) < 2:
            continue
        if len(names) < run.n_layers:
            yield f"<p>The {len(names)} layers whose values changed most:</p>"
        n_rows = -(-len(names) // _COLUMNS)
        figure = figures.Figure(figsize=(11, 3 * n_rows), layout="constrained")
        axes = figure.subplots(n_rows, _COLUMNS, squeeze=False).ravel()
        for ax, name in zip(axes, names, strict=False):
            draw_layer(run, name, ax)
            ax.set_title(_shorten(name), fontsize="small")
        for ax in axes[len(names) :]:
            ax.set_axis_off()
        yield _to_svg(figure)


def _draw_overview(figure: Figure, run: Trajectory) -> None:
    """Draw the last spectra of all layers, and before them the largest values over several steps."""
    axes = figure.subplots(1, 1 if len(run.steps) == 1 else 2, squeeze=False)[0]
    colour_map = import_optional("matplotlib", "pictures in reports", "plot").colormaps["viridis"]
    marker = "." if len(run.steps) < 30 else None
    for name, place in zip(run.layer_names, np.linspace(0, 0.9, run.n_layers), strict=True):
        values, line = run.singular_values(name), {"linewidth": 1, "color": colour_map(place)}
        relative = values[-1] / values[-1, 0] if values[-1, 0] > 0 else np.full(values.shape[1], np.nan)
        axes[-1].plot(np.arange(1, values.shape[1] + 1), relative, label=_shorten(name), **line)
        if len(run.steps) > 1:
            axes[0].plot(run.steps, values[:, 0], marker=marker, **line)
    axes[0].set(xlabel="step", ylabel=r"$\sigma_1$")
    axes[-1].set(xlabel="$i$", ylabel=rf"$\sigma_i / \sigma_1$ at step {int(run.steps[-1])}")
    if run.n_layers <= _N_DRAWN:
        figure.legend(loc="outside right upper", fontsize="x-small", frameon=False)


def _shorten(name: str) -> str:
    """Return a name without its beginning if it is long: the ends of names tell layers apart."""
    return name if len(name) <= _LENGTH else f"..{name[2 - _LENGTH :]}"


def _choose_layers(run: Trajectory) -> list[str]:
    """Return the layers whose values changed most, relative to the largest one, in their order."""
    changes: dict[str, float] = {}
    for name in run.layer_names:
        values: npt.NDArray[Any] = run.singular_values(name)
        top = float(values.max(initial=0.0))
        changes[name] = float(np.ptp(values, axis=0).max()) / top if top > 0 else 0.0
    chosen = sorted(changes, key=lambda name: -changes[name])[:_N_DRAWN]
    return [name for name in run.layer_names if name in chosen]


def _to_svg(figure: Figure) -> str:
    """Return a picture as an element of a page; the names of its parts stay its own."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(content.getvalue()).decode()
    return f"<img alt='' src='data:image/svg+xml;base64,{encoded}'>"
