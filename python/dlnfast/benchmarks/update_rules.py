# SPDX-License-Identifier: MIT
"""Times of schedules and of update rules on the reduced engine."""

from __future__ import annotations

import time
from typing import Any

from .. import optimizers
from .._problem.standard import low_rank_recovery
from .._support.schedule import Schedule
from .._training.options import Record
from .._training.train import train
from .._weights.initial import orthogonal
from . import record
from .cases import Options


def update_rules(options: Options) -> dict[str, Any]:
    """Time a reduced step by each rule, r = 3, L = 3, one core; a cosine; Muon at d = 10^6, r = 10."""
    n = 2_000 if options.quick else 100_000
    problem, weights = low_rank_recovery(100, 3, seed=0), orthogonal([100] * 4)
    rate = 1e-3 / problem.loss_scale
    constant: dict[str, Any] = {"learning_rate": rate}
    small = {"learning_rate": 1e-6}
    # Name -> options, and the divisor of the number of steps.
    variants: dict[str, tuple[dict[str, Any], int]] = {
        "gd": (constant, 1),
        "gd, momentum": (constant | {"momentum": 0.9}, 1),
        "nesterov": (constant | {"optimizer": "nesterov"}, 4),
        "muon": (small | {"optimizer": "muon"}, 8),
        "muon, polar": (small | {"optimizer": optimizers.Muon(method="polar")}, 40),
        "shampoo": (small | {"optimizer": "shampoo"}, 40),
    }

    def run(n_steps: int, chosen: dict[str, Any]) -> None:
        train(
            problem, weights, steps=n_steps, engine="reduced", n_threads=1,
            record=Record(every=n_steps, singular_values=None), **chosen,
        )  # fmt: skip

    rows = []
    for name, (chosen, divisor) in variants.items():
        count = n // divisor
        jobs = {
            "short": lambda count=count, chosen=chosen: run(count, chosen),
            "long": lambda count=count, chosen=chosen: run(3 * count, chosen),
        }
        timed = record.time_interleaved(options.repeats, **jobs)
        step = (timed["long"]["median"] - timed["short"]["median"]) / (2 * count)
        rows.append({"rule": name, "nanoseconds_per_step": step * 1e9, "seconds": timed})
        print(f"reduced step by {name:<13} r = 3, L = 3: {step * 1e9:7.0f} ns")

    rates: dict[str, float | Schedule] = {
        "constant": rate,
        "cosine": Schedule.cosine(rate, 3 * n, warmup=100),
    }

    def run_at(rate: float | Schedule) -> None:
        run(3 * n, {"learning_rate": rate, "momentum": 0.9})

    timed = record.time_interleaved(
        options.repeats,
        constant=lambda: run_at(rates["constant"]),
        cosine=lambda: run_at(rates["cosine"]),
    )
    ratio = timed["cosine"]["median"] / timed["constant"]["median"]
    print(f"{3 * n} steps with momentum and a cosine: {ratio:.3f} times those with a constant rate")

    dim, steps = (10**4, 200) if options.quick else (10**6, 10_000)
    wide, start = low_rank_recovery(dim, 10, seed=0), orthogonal([dim] * 4, implicit=True)
    begin = time.perf_counter()
    train(wide, start, learning_rate=1e-3, steps=steps, optimizer="muon", record=Record(every=steps // 100))
    seconds = time.perf_counter() - begin
    print(f"{steps} steps of Muon at d = {dim}, r = 10, L = 3: {seconds:.2f} s with the closure")
    return {
        "case": "update-rules",
        "rows": rows,
        "cosine": timed | {"ratio": ratio},
        "wide": {"dim": dim, "steps": steps, "seconds": seconds},
    }
