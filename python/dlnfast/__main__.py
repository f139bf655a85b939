# SPDX-License-Identifier: MIT
"""``python -m dlnfast``: build information and a self-check; with arguments, the command line."""

from __future__ import annotations

import sys

import numpy as np

from . import Record, build_info, low_rank_recovery, orthogonal, train
from .cli import main


def self_check() -> bool:
    """Train a small network with both engines, say how far apart they are, and return whether they agree."""
    problem, weights = low_rank_recovery(dim=24, rank=2), orthogonal([24] * 4, scale=0.7)
    steps = 200
    runs = [
        train(problem, weights, learning_rate=4.0, steps=steps, engine=engine, record=Record(every=steps))
        for engine in ("reduced", "dense")
    ]
    apart = 0.0
    for layer in range(1, 4):
        one, other = (run.weights(layer) for run in runs)
        apart = max(apart, float(np.linalg.norm(one - other) / np.linalg.norm(other)))
    agree = apart < 1e-12  # measured: a few 1e-15
    print(
        f"self-check: reduced and dense engine are {apart:.1e} apart after {steps} steps: "
        + ("passed" if agree else "FAILED")
    )
    return agree


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main())
    for name, value in build_info().items():
        print(f"{name}: {', '.join(value) if isinstance(value, list) else value}")
    sys.exit(0 if self_check() else 1)
