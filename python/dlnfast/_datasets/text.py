# SPDX-License-Identifier: MIT
"""Text tasks from local files: the sentence pairs of STS-B and the layout of GLUE; nothing is downloaded."""

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
from .folder import data_root, missing_data

__all__ = ["TASKS", "TextTask", "load_task"]


@dataclass(frozen=True)
class TextTask:
    """Sentences, or pairs of them, and what is to be said of them.

    Attributes
    ----------
    name : str
    first : tuple of str
    second : tuple of str or None
        None for tasks of single sentences.
    targets : ndarray, shape (N,)
        float64 for scores, int64 for classes.
    classes : tuple of str or None
        What the classes are called; None for scores.
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
        """What GLUE reports: "pearson", "matthews" or "accuracy"."""
        return _LAYOUTS[self.name].metric

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> TextTask:
        """Return some of the samples, in the order given."""
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

        Pearson's correlation for scores; Matthews' for CoLA, which is Pearson's of the two binary vectors; 0
        where predictions are all the same. Otherwise the share of samples classified right.
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
    """Where a task's files keep what: columns by header, or by place where there is none."""

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
#: What `load_task` knows.
TASKS: Final = tuple(_LAYOUTS)

_OPEN_STSB: Final = "stsb_open.tsv"
_SPLITS: Final = ("train", "dev", "test")


def load_task(name: str, path: str | os.PathLike[str] | None = None, split: str = "train") -> TextTask:
    """Read one split of a text task from a local copy.

    Parameters
    ----------
    name : {"stsb", "cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2"}
    path : path, optional
        File or folder. Default: the environment variable ``DLNFAST_DATA``. Looked for, in this order:

        * for "stsb" ``stsb_open.tsv``, one file with a column ``split``;
        * the files of GLUE, ``train.tsv`` and ``dev.tsv`` (MNLI: ``dev_matched.tsv``), in the folder that its
          archive calls after the task (``STS-B``, ``CoLA``, ..), or in the folder itself.
    split : {"train", "dev", "test"}
        GLUE's own test files hold no targets and are not read.

    Returns
    -------
    TextTask
        In the order of the file.

    Raises
    ------
    FileNotFoundError
        Naming every place that was looked at.
    ValueError
        For another task or split, and for a damaged file, naming its line.

    Notes
    -----
    Fields are separated by tabs and not quoted. GLUE: Wang et al., arXiv 1804.07461; STS-B: Cer et al.,
    SemEval-2017 task 1.
    """
    check_choice(name, "name", TASKS)
    check_choice(split, "split", _SPLITS)
    layout = _LAYOUTS[name]
    root = data_root(path, f"{_OPEN_STSB} or GLUE's folder {layout.folder}")
    places: list[Path] = []
    if name == "stsb":
        places.append(root if root.suffix == ".tsv" else root / _OPEN_STSB)
        if places[0].is_file():
            return _read(places[0], name, layout, split)
    if split != "test":
        file = layout.dev if split == "dev" else "train.tsv"
        places += [root / layout.folder / file, root / file]
        for place in places[-2:]:
            if place.is_file():
                return _read(place, name, layout, None)
    source = "the archive of https://gluebenchmark.com/tasks and unpack it in this folder"
    raise missing_data(name, root, split, [str(place) for place in places], source)


def _read(path: Path, name: str, layout: _Layout, split: str | None) -> TextTask:
    first: list[str] = []
    second: list[str] = []
    targets: list[float] = []
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = _numbered_rows(stream, path)
        header = next(rows, (1, []))[1] if isinstance(layout.first, str) else []
        places = [
            None if column is None else _place(column, header, path)
            for column in (layout.first, layout.second, layout.target)
        ]
        of_split = None if split is None else _place("split", header, path)
        for number, row in rows:
            try:
                if of_split is not None and row[of_split] != split:
                    continue
                fields = [None if place is None else row[place] for place in places]
                targets.append(_target(fields[2], layout))
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
    """Yield the fields of each line, and its number."""
    rows = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
    while True:
        try:
            row = next(rows, None)
        except (csv.Error, UnicodeDecodeError) as error:  # fields without end, text that is not UTF-8
            raise ValueError(f"line {rows.line_num + 1} of {path} is damaged: {error}") from error
        if row is None:
            return
        yield rows.line_num, row


def _place(column: str | int, header: list[str], path: Path) -> int:
    if isinstance(column, int):
        return column
    if column not in header:
        raise ValueError(f"{path} has no column {column!r}; its header is {header}")
    return header.index(column)


def _target(text: str | None, layout: _Layout) -> float:
    assert text is not None
    if layout.classes is None:
        score = float(text)
        if not np.isfinite(score):
            raise ValueError(f"score {text!r}; wanted a number")
        return score
    if text not in layout.classes:
        raise ValueError(f"class {text!r}; wanted one of {', '.join(layout.classes)}")
    return float(layout.classes.index(text))
