# SPDX-License-Identifier: MIT
"""Utilisation of the cores by `dlnfast.sweep`."""

from __future__ import annotations

import tempfile
from typing import Any, Final

from .._config.sweep import SweepGrid, sweep
from .._support.threads import available_cores
from .options import Options

__all__ = ["usage"]

#: Name of a study -> entries of [train]: runs side by side, and runs alone of some and some ten milliseconds.
_STUDIES: Final[dict[str, dict[str, Any]]] = {
    "reduced, together": {"steps": 2000},
    "dense, alone, short": {"steps": 200, "engine": "dense"},
    "dense, alone": {"steps": 2000, "engine": "dense"},
}


def usage(options: Options) -> dict[str, Any]:
    """Sweep over 1,000 runs, d = 30, r = 3, L = 3, on all cores: utilisation and overhead.

    The default executor, with folders. Utilisation: CPU time of the workers' processes, their imports
    included, over wall time and cores. Overhead: the share of the workers' time, from when the first of them
    is ready, that is not in chunks (of scheduling), and that is not in runs (of writing, too).
    """
    n_seeds = 5 if options.quick else 250
    rows = []
    for name, train in _STUDIES.items():
        base = {
            "problem": {"kind": "low-rank-recovery", "dim": 30, "rank": 3},
            "weights": {"depth": 3},
            "train": {"learning_rate": 1.0, "record_every": 1000, "singular_values": "none", **train},
        }
        axes = {"weights.seed": range(n_seeds), "train.learning_rate": [0.5, 1.0, 2.0, 4.0]}
        with tempfile.TemporaryDirectory() as folder:
            results = sweep(SweepGrid(base, axes), directory=folder)
        used, cores = results.usage, available_cores()
        whole = (used["wall"] - used["start"]) * used["workers"]
        row = {
            "study": name,
            "runs": len(results),
            "cores": cores,
            "utilisation": used["cpu"] / (used["wall"] * cores),
            "scheduling": 1 - used["jobs"] / whole,
            "overhead": 1 - used["runs"] / whole,
            "usage": used,
        }
        print(
            f"{name}: {len(results)} runs in {used['wall']:.2f} s ({used['start']:.2f} s to start, "
            f"{1e3 * used['runs'] / len(results):.2f} ms a run): utilisation of {cores} cores "
            f"{100 * row['utilisation']:.0f} %, scheduling {100 * row['scheduling']:.1f} %, with writing "
            f"{100 * row['overhead']:.1f} %"
        )
        rows.append(row)
    return {"case": "sweep-usage", "rows": rows}
