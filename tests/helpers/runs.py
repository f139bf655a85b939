# SPDX-License-Identifier: MIT
"""Content of a run in a form that can be compared."""

from __future__ import annotations

import json
from typing import Any

import dlnfast as dln

#: Entries that contain durations.
_TIMES = ("wall_time", "seconds", "training_seconds", "preparation_seconds", "fit_seconds_")


def array_content(arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the precision, shape and bytes of each array."""
    return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()}


def without_times(metadata: Any) -> Any:
    """Return a JSON value without the entries that contain durations."""
    if isinstance(metadata, dict):
        return {name: without_times(value) for name, value in metadata.items() if name not in _TIMES}
    if isinstance(metadata, list):
        return [without_times(value) for value in metadata]
    return metadata


def run_content(run: dln.Trajectory, *, with_times: bool = True) -> tuple[str, dict[str, Any]]:
    """Return the whole content of a run, with or without durations."""
    metadata, arrays = run.to_arrays()
    if not with_times:
        metadata = without_times(metadata)
        # The columns of the tracker contain seconds.
        arrays = {name: array for name, array in arrays.items() if not name.startswith("tracking_columns")}
    return json.dumps(metadata, sort_keys=True), array_content(arrays)
