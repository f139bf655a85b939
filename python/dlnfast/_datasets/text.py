# SPDX-License-Identifier: MIT
"""Text tasks in the formats of GLUE and of STS-B, from local files."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .._support.arrays import as_array, as_integers, check_choice
from .folder import data_root, missing_data_error

__all__ = ["TASKS", "TextTask", "load_task"]


@dataclass(frozen=True)
class TextTask:
    """Sentences, or pairs of sentences, and their scores or classes.

    Attributes
    ----------
    name : str
        Name of the task, one of `TASKS`.
    first : tuple of str
        Sentences, or the first sentence of each pair.
    second : tuple of str or None
        Second sentence of each pair; None for tasks of single sentences.
    targets : ndarray, shape (N,)
        Scores as float64, or classes as int64.
    classes : tuple of str or None
        Names of the classes; None for scores.
    """

    name: str
    first: tuple[str, ...]
    second: tuple[str, ...] | None
    targets: npt.NDArray[np.float64] | npt.NDArray[np.int64]
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        """Return N."""
        return len(self.first)

    @property
    def metric(self) -> str:
        """Name of the metric that GLUE reports: "pearson", "matthews" or "accuracy"."""
        return _LAYOUTS[self.name].metric

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> TextTask:
        """Return the samples with these row numbers, in this order."""
        chosen = as_integers(rows, "rows")
        return TextTask(
            self.name,
            tuple(self.first[i] for i in chosen),
            None if self.second is None else tuple(self.second[i] for i in chosen),
            self.targets[chosen],
            self.classes,
        )

    def score(self, predictions: npt.ArrayLike) -> float:
        """Return the metric of predictions: scores (N,), or classes (N,).

        The metric is Pearson's correlation for scores; Matthews' correlation for CoLA, which is Pearson's of
        the two binary vectors; and the fraction of correct classes otherwise. A correlation is 0 if all
        predictions are equal.
        """
        found = as_array(predictions, "predictions")
        if found.shape != self.targets.shape:
            raise ValueError(f"predictions has shape {found.shape}; wanted {self.targets.shape}")
        if self.metric == "accuracy":
            return float(np.mean(found == self.targets))
        if np.ptp(found) == 0 or np.ptp(self.targets) == 0:
            return 0.0
        return float(np.corrcoef(found.astype(np.float64), self.targets.astype(np.float64))[0, 1])


@dataclass(frozen=True)
class _Layout:
    """The format of a task's files: columns by their name in the header, or by number without a header."""

    folder: str
    first: str | int
    second: str | int | None
    target: str | int
    classes: tuple[str, ...] | None
    metric: str
    dev: str = "dev.tsv"


_LAYOUTS: Final = {
    "stsb": _Layout("STS-B", "sentence1", "sentence2", "score", None, "pearson"),
    "cola": _Layout("CoLA", 3, None, 1, ("0", "1"), "matthews"),
    "mnli": _Layout(
        "MNLI",
        "sentence1",
        "sentence2",
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        "dev_matched.tsv",
    ),
    "mrpc": _Layout("MRPC", "#1 String", "#2 String", "Quality", ("0", "1"), "accuracy"),
    "qnli": _Layout("QNLI", "question", "sentence", "label", ("entailment", "not_entailment"), "accuracy"),
    "qqp": _Layout("QQP", "question1", "question2", "is_duplicate", ("0", "1"), "accuracy"),
    "rte": _Layout("RTE", "sentence1", "sentence2", "label", ("entailment", "not_entailment"), "accuracy"),
    "sst2": _Layout("SST-2", "sentence", None, "label", ("0", "1"), "accuracy"),
}
#: Names of the tasks that `load_task` reads.
TASKS: Final = tuple(_LAYOUTS)

_OPEN_STSB: Final = "stsb_open.tsv"
_SPLITS: Final = ("train", "dev", "test")


def load_task(name: str, path: str | os.PathLike[str] | None = None, split: str = "train") -> TextTask:
    """Read one split of a text task from a local copy.

    Parameters
    ----------
    name : {"stsb", "cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2"}
        Name of the task.
    path : path, optional
        File or folder. Default: the environment variable ``DLNFAST_DATA``. The first of these that exists is
        read:

        * for "stsb", ``stsb_open.tsv``, one file with a column ``split``;
        * the files of GLUE, ``train.tsv`` and ``dev.tsv`` (MNLI: ``dev_matched.tsv``), in the folder of the
          task in GLUE's archive (``STS-B``, ``CoLA``, ..), or in the folder itself.
    split : {"train", "dev", "test"}
        Name of the split. GLUE's test files have no targets and are not read.

    Returns
    -------
    TextTask
        The samples in the order of the file.

    Raises
    ------
    FileNotFoundError
        If there are no such files. The message lists the searched paths.
    ValueError
        If the task or the split is unknown, or a file is damaged. The message names the line.

    Notes
    -----
    Fields are separated by tabs and not quoted. GLUE: Wang et al., arXiv 1804.07461; STS-B: Cer et al.,
    SemEval-2017 task 1.
    """
    check_choice(name, "name", TASKS)
    check_choice(split, "split", _SPLITS)
    layout = _LAYOUTS[name]
    root = data_root(path, f"{_OPEN_STSB} or GLUE's folder {layout.folder}")
    searched: list[Path] = []
    if name == "stsb":
        searched.append(root if root.suffix == ".tsv" else root / _OPEN_STSB)
        if searched[0].is_file():
            return _read(searched[0], name, layout, split)
    if split != "test":
        file = layout.dev if split == "dev" else "train.tsv"
        searched += [root / layout.folder / file, root / file]
        for candidate in searched[-2:]:
            if candidate.is_file():
                return _read(candidate, name, layout, None)
    source = "the archive of https://gluebenchmark.com/tasks and unpack it in this folder"
    raise missing_data_error(name, root, split, [str(candidate) for candidate in searched], source)


def _read(path: Path, name: str, layout: _Layout, split: str | None) -> TextTask:
    first: list[str] = []
    second: list[str] = []
    targets: list[float] = []
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = _numbered_rows(stream, path)
        header = next(rows, (1, []))[1] if isinstance(layout.first, str) else []
        columns = [
            None if column is None else _find_column(column, header, path)
            for column in (layout.first, layout.second, layout.target)
        ]
        split_column = None if split is None else _find_column("split", header, path)
        for number, row in rows:
            try:
                if split_column is not None and row[split_column] != split:
                    continue
                fields = [None if column is None else row[column] for column in columns]
                targets.append(_parse_target(fields[2], layout))
            except (IndexError, ValueError) as error:
                raise ValueError(f"line {number} of {path} is damaged: {error}") from error
            first.append(str(fields[0]))
            if fields[1] is not None:
                second.append(fields[1])
    if not first:
        raise ValueError(f"{path} holds no samples" + (f" of {split}" if split else ""))
    values: npt.NDArray[Any] = np.array(targets)
    return TextTask(
        name,
        tuple(first),
        tuple(second) if layout.second is not None else None,
        values if layout.classes is None else values.astype(np.int64),
        layout.classes,
    )


def _numbered_rows(stream: Iterable[str], path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the fields of each line."""
    rows = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
    while True:
        try:
            row = next(rows, None)
        except (csv.Error, UnicodeDecodeError) as error:  # overlong fields, text that is not UTF-8
            raise ValueError(f"line {rows.line_num + 1} of {path} is damaged: {error}") from error
        if row is None:
            return
        yield rows.line_num, row


def _find_column(column: str | int, header: list[str], path: Path) -> int:
    if isinstance(column, int):
        return column
    if column not in header:
        raise ValueError(f"{path} has no column {column!r}; its header is {header}")
    return header.index(column)


def _parse_target(text: str | None, layout: _Layout) -> float:
    assert text is not None
    if layout.classes is None:
        score = float(text)
        if not np.isfinite(score):
            raise ValueError(f"score {text!r}; wanted a number")
        return score
    if text not in layout.classes:
        raise ValueError(f"class {text!r}; wanted one of {', '.join(layout.classes)}")
    return float(layout.classes.index(text))
