# SPDX-License-Identifier: MIT
"""`dlnfast finetune`: a resumable grid of fine-tuning runs from a TOML file, and a table of its results."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from .._datasets.text import TASKS, TextTask
from .._support.arrays import check_choice, check_count, check_flag, check_scale
from .._support.errors import DivergedError
from .._support.files import with_checksum, write_text_whole
from .._support.json_lines import append_line, read_lines
from .._support.keys import Key, boolean, choice, integer, is_integer, is_list_of, is_number, number, string
from .schema import SpecError, check_names, check_section, describe_keys, read_toml

__all__ = [
    "METHODS",
    "Grid",
    "Results",
    "Row",
    "compare_methods",
    "describe_settings",
    "make_grid",
    "read_grid",
    "summarise",
    "table",
]

#: Methods of fine-tuning; all but the last are adapters of PEFT.
METHODS: Final = ("lora", "rslora", "eva", "lora-ga", "deep-lora")
#: Initialisations of Deep LoRA: leading directions of the first gradient, random frames, full rank.
INITS: Final = ("gradient", "random", "full")
#: Precisions of the forward and backward passes; adapters and optimiser states are always float32.
PRECISIONS: Final = ("float32", "bfloat16")
#: Halves of the development split: one to choose learning rates, one to report scores.
PARTS: Final = ("selection", "report")

_SECTIONS: Final[dict[str, dict[str, Key]]] = {
    "model": {
        "path": string(required=True),
        "layers": Key(is_list_of(lambda v: isinstance(v, str)), "a list of names or globs"),
        "max_length": integer(128),
        "device": string("cpu"),
    },
    "task": {
        "name": choice("stsb", *TASKS),
        "path": string(),
        "evaluated": integer(),
    },
    "grid": {
        "methods": Key(
            is_list_of(lambda v: v in METHODS), "a list of " + ", ".join(METHODS), ["lora", "deep-lora"]
        ),
        "ranks": Key(is_list_of(is_integer), "a list of integers", [8]),
        "examples": Key(is_list_of(is_integer), "a list of integers", required=True),
        "seeds": Key(is_list_of(is_integer), "a list of integers", required=True),
        "etas": Key(
            is_list_of(is_number),
            "a list of numbers",
            required=True,
            help="Norms of a step of Adam on a factor, from which each method gets the best: an a x b factor "
            "has the learning rate eta / sqrt(a b).",
        ),
    },
    "training": {
        "steps": integer(required=True),
        "batch_size": integer(16),
        "final_rate": number(0.1),
        "epsilon": number(1e-8),
        "train_head": boolean(True),
        "match_updates": boolean(True).explained(
            "Whether learning rates follow the shapes of the factors; false: eta is the rate of all."
        ),
        "dropout": boolean(False).explained("Whether the pretrained model trains with its own dropout."),
        "precision": Key(
            lambda v: v in PRECISIONS,
            " or ".join(PRECISIONS),
            PRECISIONS[0],
            help="Of the model's forward and backward passes; bfloat16 is faster where the processor has "
            "instructions for it. Factors, head and optimiser are float32.",
        ),
    },
    "deep-lora": {
        "depth": integer(3),
        "scale": number(1e-2),
        "init": choice(INITS[0], *INITS),
        "outer": number(1.0),
        "etas": Key(is_list_of(is_number), "a list of numbers that replaces the grid's"),
    },
    "output": {"directory": string()},
}

#: Keys of version 0.1.0 -> what to write instead.
_MOVED: Final = {
    f"{section}.learning_rates": f"{section}.etas, the norms of a step on a factor, or {section}.etas with "
    "the same numbers and training.match_updates = false"
    for section in ("grid", "deep-lora")
}


@dataclass(frozen=True)
class Run:
    """Settings of one training.

    Attributes
    ----------
    method : {"lora", "rslora", "eva", "lora-ga", "deep-lora"}
        Method of adaptation. "lora" is that of PEFT with alpha = r: Deep LoRA has no factor alpha / r either.
        "rslora" has the factor 8 / sqrt(r) (arXiv 2312.03732). "eva" starts A at the leading right singular
        vectors of the layer's inputs, with equal ranks (arXiv 2410.07170). "lora-ga" starts A and B at
        singular vectors of the first gradient (arXiv 2407.05000).
    rank : int
        Rank r of the adapters; ignored by Deep LoRA with ``init="full"``.
    n_examples : int
        Number of training samples, drawn without replacement. Runs with the same seed share the samples,
        their order and the new head.
    seed : int
        Seed of samples, their order, the head and the adapters.
    eta : float
        Norm of a step of AdamW on each factor at the start: an a x b factor has the learning rate
        ``eta / sqrt(a b)``, and other tensors of n entries ``eta / sqrt(n)``. It falls linearly to
        ``final_rate * eta``.
    steps, batch_size : int
        Number of steps, and of samples in each.
    final_rate : float
        Factor of the learning rates at the end.
    epsilon : float
        Epsilon of AdamW. The first gradients of Deep LoRA's cores are ``scale^(L - 1)`` times those of the
        weight; if that is far below epsilon, the cores start to move late.
    depth, scale, init, outer
        Depth L, scale eps, initialisation and factor gamma of Deep LoRA.
    train_head : bool
        Whether the new head is trained as well.
    match_updates : bool
        Whether learning rates follow the shapes of the factors; False: eta is the rate of all parameters.
    dropout : bool
        Whether the pretrained model trains with its own dropout, drawn from the seed; evaluation is without.
    precision : {"float32", "bfloat16"}
        Precision of the model's forward and backward passes, by autocast. Factors, head and optimiser states
        are float32.
    """

    method: str
    rank: int
    n_examples: int
    seed: int
    eta: float
    steps: int
    batch_size: int = 16
    final_rate: float = 0.1
    epsilon: float = 1e-8
    depth: int = 3
    scale: float = 1e-2
    init: str = "gradient"
    outer: float = 1.0
    train_head: bool = True
    match_updates: bool = True
    dropout: bool = False
    precision: str = PRECISIONS[0]

    def __post_init__(self) -> None:
        """Check the settings here, where error messages can name them."""
        check_choice(self.method, "method", METHODS)
        for name in ("rank", "n_examples", "steps", "batch_size"):
            check_count(getattr(self, name), name)
        check_count(self.seed, "seed", minimum=0)
        check_count(self.depth, "depth", minimum=2, maximum=5)
        check_choice(self.init, "init", INITS)
        for name in ("eta", "final_rate", "epsilon", "scale", "outer"):
            check_scale(getattr(self, name), name)
        check_choice(self.precision, "precision", PRECISIONS)
        for name in ("train_head", "match_updates", "dropout"):
            check_flag(getattr(self, name), name)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dict; settings of Deep LoRA are left out for other methods."""
        values = asdict(self)
        if self.method != "deep-lora":
            for name in ("depth", "scale", "init", "outer"):
                del values[name]
        return values


@dataclass(frozen=True)
class Outcome:
    """Results of a run.

    Attributes
    ----------
    scores : dict of str to float
        Metric of the task on each evaluated part of the data.
    loss : list of float
        Training loss at every step, on the batch of that step.
    n_parameters : int
        Number of trained parameters, including the head.
    ranks : dict of str to int
        Rank of each layer's update: the number of singular values above 1 % of the largest of all layers.
    update_norm : float
        Frobenius norm of the updates of all layers together.
    seconds : float
        Time of training and evaluation.
    """

    scores: dict[str, float]
    loss: list[float]
    n_parameters: int
    ranks: dict[str, int]
    update_norm: float
    seconds: float


@dataclass(frozen=True)
class Grid:
    """A checked specification: every section complete, with defaults filled in."""

    sections: dict[str, dict[str, Any]]

    def runs(self) -> list[Run]:
        """Return the runs seed by seed, so that an interrupted grid has complete seeds."""
        grid, training, deep = (dict(self.sections[name]) for name in ("grid", "training", "deep-lora"))
        shared: Sequence[float] = grid["etas"]
        etas = dict.fromkeys(grid["methods"], shared)
        own = deep.pop("etas")
        if own is not None and "deep-lora" in etas:
            etas["deep-lora"] = own
        return [
            Run(
                method=method,
                rank=rank,
                n_examples=n,
                seed=seed,
                eta=float(eta),
                **training,
                **(deep if method == "deep-lora" else {}),
            )
            for seed, n, rank, method in itertools.product(
                grid["seeds"], grid["examples"], grid["ranks"], grid["methods"]
            )
            for eta in etas[method]
        ]

    def metadata(self) -> dict[str, Any]:
        """Return the other settings that a result depends on and that identify a run."""
        model, task = self.sections["model"], self.sections["task"]
        settings = {name: model[name] for name in ("path", "layers", "max_length")}
        return settings | {"task": task["name"], "evaluated": task["evaluated"]}


def split_halves(task: TextTask, evaluated: int | None = None) -> dict[str, TextTask]:
    """Return two halves of a task, or of its first samples in a fixed order."""
    order = np.random.default_rng(0).permutation(len(task))[:evaluated]
    return {name: task.take(order[first::2]) for first, name in enumerate(PARTS)}


def read_grid(path: str | os.PathLike[str], changes: Iterable[str] = ()) -> Grid:
    """Read a TOML file, apply changes, and check everything.

    Parameters
    ----------
    path : path
        The file. A relative ``task.path`` in it starts from its folder.
    changes : iterable of str
        ``"section.key=value"``.

    Raises
    ------
    SpecError
        For text that is not TOML, and for unknown, missing and wrong entries.
    OSError
        If the file cannot be read.
    """
    return _check_grid(read_toml(path, changes, paths=["task.path"]))


def make_grid(**sections: Mapping[str, Any]) -> Grid:
    """Return a grid from its sections, checked like those of a file; ``deep_lora`` stands for [deep-lora]."""
    tables = {name.replace("_", "-"): dict(section) for name, section in sections.items()}
    return _check_grid(
        {name: {k: v for k, v in section.items() if v is not None} for name, section in tables.items()}
    )


def _check_grid(raw: Mapping[str, Any]) -> Grid:
    check_names(raw, _SECTIONS)
    for name, new in _MOVED.items():
        section, key = name.split(".")
        if key in raw.get(section, {}):
            raise SpecError(f"{name} is not a setting since version 0.2.0: write {new}")
    sections = {name: check_section(name, raw.get(name, {}), keys) for name, keys in _SECTIONS.items()}
    evaluated = sections["task"]["evaluated"]
    if evaluated is not None and evaluated < 4:
        raise SpecError(f"task.evaluated is {evaluated}; wanted an integer of at least 4, two for each half")
    return Grid(sections)


def describe_settings() -> str:
    """Return the help text of specifications: sections, keys, allowed values and defaults."""
    lines = ["The sections of SPEC.toml, their keys and the allowed values:"]
    for name, keys in _SECTIONS.items():
        lines += ["", f"[{name}]", *describe_keys(keys)]
    return "\n".join(lines)


class Results:
    """The results of the runs of a grid in a file, one line of JSON per finished run.

    Parameters
    ----------
    path : path
        The file. Its lines are read, except for an incomplete last line, which the next write removes.
    shipped : path, optional
        Another such file with finished runs, which is only read.

    Raises
    ------
    ValueError
        If a line is damaged, or was not written by `append`.
    """

    def __init__(self, path: str | os.PathLike[str], shipped: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path)
        self._shipped = [] if shipped is None else read_lines(Path(shipped), _check_record)
        self.records: list[dict[str, Any]] = self._shipped
        self.read()

    def read(self) -> None:
        """Read the file."""
        self.records = [*self._shipped, *read_lines(self.path, _check_record)]

    def missing(self, grid: Grid) -> list[Run]:
        """Return the runs of a grid that are not finished."""
        done = [record["run"] for record in self._select_records(grid)]
        return [run for run in grid.runs() if run.to_dict() not in done]

    def of(self, grid: Grid) -> list[dict[str, Any]]:
        """Return the records of a grid's runs."""
        wanted = [run.to_dict() for run in grid.runs()]
        return [record for record in self._select_records(grid) if record["run"] in wanted]

    def _select_records(self, grid: Grid) -> list[dict[str, Any]]:
        """Return the records of the same model, layers, length and samples."""
        metadata = grid.metadata()
        return [record for record in self.records if record.get("about") == metadata]

    def append_diverged(self, grid: Grid, run: Run, error: DivergedError) -> None:
        """Append a diverged run."""
        self._write({"run": run.to_dict(), "about": grid.metadata(), "diverged": str(error)})

    def append(self, grid: Grid, run: Run, outcome: Outcome) -> None:
        """Append a run; its line is on the disk when this returns."""
        record = {
            "run": run.to_dict(),
            "about": grid.metadata(),
            "scores": outcome.scores,
            "first_loss": outcome.loss[0],
            "final_loss": float(np.mean(outcome.loss[-5:])),
            "n_parameters": outcome.n_parameters,
            "ranks": outcome.ranks,
            "update_norm": outcome.update_norm,
            "seconds": outcome.seconds,
        }
        self._write(record)

    def export(self, path: str | os.PathLike[str], grids: Iterable[Grid]) -> None:
        """Write the records of some grids to a new file, without names of layers, losses and times.

        Such a file can be passed as `shipped`. It has less than half the size.
        """
        kept = ("run", "about", "scores", "n_parameters", "update_norm", "diverged")
        lines: dict[str, None] = {}
        for grid in grids:
            for record in self.of(grid):
                small = {name: record[name] for name in kept if name in record}
                if "ranks" in record:
                    small["ranks"] = list(_ranks_by_layer(record).values())
                lines[json.dumps(with_checksum(small), separators=(",", ":"))] = None
        write_text_whole(Path(path), "".join(line + "\n" for line in lines))

    def _write(self, record: dict[str, Any]) -> None:
        append_line(self.path, record)
        self.records.append(record)


def _check_record(record: dict[str, Any]) -> dict[str, Any]:
    """Return a line of results, or raise if it lacks an entry that tables need."""
    if "about" not in record:  # of no grid
        return record
    run = record["run"]
    if "learning_rate" in run and "eta" not in run:  # version 0.1.0: of no grid of this version
        return record
    check_choice(run["method"], "run.method", METHODS)
    for name in ("rank", "n_examples", "seed"):
        check_count(run[name], f"run.{name}", minimum=0)
    check_scale(run["eta"], "run.eta")
    if "diverged" not in record:
        for part in PARTS:
            if not is_number(record["scores"].get(part, 0.0)):
                raise ValueError(f"scores.{part} is {record['scores'][part]!r}; wanted a number")
        check_scale(record["update_norm"], "update_norm")
        for layer, rank in _ranks_by_layer(record).items():
            check_count(rank, f"ranks.{layer}", minimum=0)
    return record


def _ranks_by_layer(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the ranks of a record's updates by layer; shipped records have lists, without layer names."""
    ranks = record["ranks"]
    return {str(i): rank for i, rank in enumerate(ranks)} if isinstance(ranks, list) else ranks


@dataclass(frozen=True)
class Row:
    """Several seeds of one method, number of examples and rank, at the selected eta.

    Attributes
    ----------
    method, n_examples, rank, eta
    scores : dict of int to float
        Seed -> score on the half that is reported.
    selection : float
        Mean score on the half where eta was chosen.
    ranks : list of int
        Ranks of the updates of all layers, seed by seed.
    norms : dict of int to float
        Seed -> Frobenius norm of the updates of all layers together.
    """

    method: str
    n_examples: int
    rank: int
    eta: float
    scores: dict[int, float]
    selection: float
    ranks: list[int]
    norms: dict[int, float]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(list(self.scores.values())))

    @property
    def mean_rank(self) -> float:
        """Mean rank of the updates."""
        return float(np.mean(self.ranks))

    @property
    def mean_norm(self) -> float:
        """Mean norm of the updates."""
        return float(np.mean(list(self.norms.values())))

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds, n - 1 in the denominator; NaN for a single one."""
        values = list(self.scores.values())
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return all entries as plain values."""
        beside = {
            "mean": self.mean,
            "deviation": self.deviation,
            "mean_rank": self.mean_rank,
            "mean_norm": self.mean_norm,
        }
        return asdict(self) | beside


def summarise(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return a row for every method, number of examples and rank, at the eta with the best selection score.

    That eta is the one whose mean over the seeds is best, among those at which no run diverged; where there
    is none there is no row.
    """
    groups: dict[tuple[int, int, str], dict[float, list[Mapping[str, Any]]]] = {}
    for record in records:
        run = record["run"]
        key = (run["n_examples"], run["rank"], run["method"])
        groups.setdefault(key, {}).setdefault(run["eta"], []).append(record)
    rows = []
    for (n_examples, rank, method), rates in sorted(groups.items(), key=lambda item: _order(item[0])):
        rates = {rate: found for rate, found in rates.items() if not any("diverged" in r for r in found)}
        if not rates:
            continue
        most = max(map(len, rates.values()))
        means = {
            rate: float(np.mean([record["scores"]["selection"] for record in found]))
            for rate, found in rates.items()
            if len(found) == most  # rates that a grid cut short has tried on fewer seeds cannot be compared
        }
        best = max(means, key=lambda rate: means[rate])
        rows.append(
            Row(
                method=method,
                n_examples=n_examples,
                rank=rank,
                eta=best,
                scores={r["run"]["seed"]: float(r["scores"]["report"]) for r in rates[best]},
                selection=means[best],
                norms={r["run"]["seed"]: float(r["update_norm"]) for r in rates[best]},
                ranks=[int(rank) for record in rates[best] for rank in _ranks_by_layer(record).values()],
            )
        )
    return rows


def _order(key: tuple[int, int, str]) -> tuple[int, int, int]:
    return key[0], key[1], METHODS.index(key[2])


def compare_methods(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return Deep LoRA less each other method, seed by seed: mean, standard error and number of pairs."""
    result = []
    for row in (row for row in rows if row.method == "deep-lora"):
        for other in rows:
            if other.method == "deep-lora" or (other.n_examples, other.rank) != (row.n_examples, row.rank):
                continue
            seeds = sorted(set(row.scores) & set(other.scores))
            gaps = [row.scores[seed] - other.scores[seed] for seed in seeds]
            if not gaps:
                continue
            error = float(np.std(gaps, ddof=1) / math.sqrt(len(gaps))) if len(gaps) > 1 else math.nan
            result.append(
                {
                    "n_examples": row.n_examples,
                    "rank": row.rank,
                    "other": other.method,
                    "difference": float(np.mean(gaps)),
                    "standard_error": error,
                    "pairs": len(gaps),
                }
            )
    return result


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table: mean and standard deviation of every row, and the paired differences."""
    lines = [
        "| examples | r | method | eta | score | deviation | seeds | mean rank | norm of the update |",
        "|" + 9 * "---|",
    ]
    for row in rows:
        deviation = "-" if math.isnan(row.deviation) else f"{row.deviation:.4f}"
        lines.append(
            f"| {row.n_examples} | {row.rank} | {row.method} | {row.eta:g} | {row.mean:.4f} | "
            f"{deviation} | {len(row.scores)} | {row.mean_rank:.2f} | {row.mean_norm:.3g} |"
        )
    differences = compare_methods(rows)
    if differences:
        lines += [
            "",
            "| examples | r | difference | value | standard error | pairs |",
            "|---|---|---|---|---|---|",
        ]
    for gap in differences:
        error = "-" if math.isnan(gap["standard_error"]) else f"{gap['standard_error']:.4f}"
        lines.append(
            f"| {gap['n_examples']} | {gap['rank']} | deep-lora - {gap['other']} | "
            f"{gap['difference']:+.4f} | {error} | {gap['pairs']} |"
        )
    return "\n".join(lines)
