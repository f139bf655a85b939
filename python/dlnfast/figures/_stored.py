# SPDX-License-Identifier: MIT
"""Results of long trainings: shipped with the package, or in a file to which new ones are appended."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from .._support.json_lines import append_line, read_lines

#: Folder of the shipped results, one file for each figure that has some.
SHIPPED: Final = Path(__file__).parent / "_results"


class StoredRuns:
    """Outcomes of finished runs, found by all settings that determine them.

    Parameters
    ----------
    figure : str
        Name of the figure. Its shipped results are in ``_results/NAME.jsonl``.
    path : str
        File with further results, to which new ones are appended, one line of JSON for each run; it is
        created if missing. Empty: new results are kept in memory only.

    Raises
    ------
    ValueError
        If a line is damaged, or is no result of a run, naming the file and the line.
    """

    def __init__(self, figure: str, path: str = "") -> None:
        self._path = Path(path) if path else None
        self._outcomes: dict[str, dict[str, Any]] = {}
        for file in (SHIPPED / f"{figure}.jsonl", self._path):
            for record in [] if file is None else read_lines(file, _check_record):
                self._outcomes[_key(record["run"])] = record["outcome"]

    def find(self, run: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the outcome of a run with these settings; None if there is none."""
        return self._outcomes.get(_key(run))

    def get(self, run: Mapping[str, Any], train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the outcome of a run with these settings; where there is none, call `train` and store it."""
        outcome = self.find(run)
        if outcome is None:
            outcome = train()
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                append_line(self._path, {"run": dict(run), "outcome": outcome})
            self._outcomes[_key(run)] = outcome
        return outcome


def _key(run: Mapping[str, Any]) -> str:
    return json.dumps(run, sort_keys=True)


def _check_record(record: dict[str, Any]) -> dict[str, Any]:
    for name in ("run", "outcome"):
        if not isinstance(record.get(name), dict):
            raise ValueError(f"its {name} is {type(record.get(name)).__name__}; wanted an object")
    return record
