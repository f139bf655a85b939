"""Run benchmark cases: ``python -m bench.run [--case NAME] [--out FILE.json]``.

Each case checks that the peers compute the same thing before it times them. A case whose peer is not
installed is skipped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.record import describe_threads, interleaved, machine, restart_without_caps


def reduced_step(repeats: int) -> dict[str, Any]:
    """Time one reduced step, r = 3, L = 3, on one core: it must not depend on the width."""
    import dlnfast as dln

    steps = 400_000
    rows = []
    for rank, dims in ((3, (30, 300, 1000)), (10, (60, 1000))):
        for dim in dims:
            problem = dln.low_rank_recovery(dim=dim, rank=rank, seed=0)
            weights = dln.orthogonal([dim] * 4)

            def run(n: int, problem: Any = problem, weights: Any = weights) -> None:
                rate = 1e-3 / problem.loss_scale
                dln.train(
                    problem,
                    weights,
                    learning_rate=rate,
                    steps=n,
                    record_every=n,
                    engine="reduced",
                    n_threads=1,
                )

            n = steps if rank == 3 else steps // 10
            # What is left of the difference is steps alone: no set-up, no Python.
            timed = interleaved(repeats, short=lambda n=n: run(n), long=lambda n=n: run(3 * n))  # type: ignore[misc]
            step = (timed["long"]["median"] - timed["short"]["median"]) / (2 * n)
            rows.append({"rank": rank, "dim": dim, "nanoseconds_per_step": step * 1e9})
            print(f"reduced step, r = {rank}, L = 3, d = {dim:5d}: {step * 1e9:7.0f} ns")
    return {"case": "reduced-step", "rows": rows}


def thin_step(repeats: int) -> dict[str, Any]:
    """Time a dense step with d = 2048, K = 10, L = 3, N = d beside PyTorch autograd on the same data."""
    import numpy as np
    import torch

    import dlnfast as dln

    dim, n_classes, n_layers = 2048, 10, 3
    rng = np.random.default_rng(0)
    X = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    Y = np.repeat(np.eye(n_classes), -(-dim // n_classes), axis=1)[:, :dim]
    problem = dln.Problem.from_data(X, Y)
    weights = dln.orthogonal([dim] * n_layers + [n_classes], scale=0.5)
    rate = 0.1 / problem.loss_scale / 50
    dense_steps = 20

    inputs, outputs = torch.from_numpy(X), torch.from_numpy(np.ascontiguousarray(Y))
    parameters = [torch.from_numpy(w.copy()).requires_grad_() for w in weights]
    optimizer = torch.optim.SGD(parameters, lr=rate)
    torch_losses = []

    def torch_step() -> None:
        optimizer.zero_grad()
        prediction = inputs
        for w in parameters:
            prediction = w @ prediction
        loss = problem.loss_scale / 2 * ((prediction - outputs) ** 2).sum()
        loss.backward()
        optimizer.step()
        torch_losses.append(loss.item())

    step_seconds = []

    def dense_run() -> None:
        # Set-up (copies of the weights) is measured apart and taken off.
        start = time.perf_counter()
        dln.train(problem, weights, learning_rate=rate, steps=0, engine="dense", singular_values=None)
        middle = time.perf_counter()
        run = dln.train(
            problem,
            weights,
            learning_rate=rate,
            steps=dense_steps,
            engine="dense",
            singular_values=None,
            record_every=dense_steps,
        )
        step_seconds.append((time.perf_counter() - middle - (middle - start)) / dense_steps)
        losses.extend(run.loss[: repeats + 1].tolist() if not losses else [])

    losses: list[float] = []
    timed = interleaved(repeats, torch=torch_step, dense=dense_run)
    np.testing.assert_allclose(torch_losses, losses[: len(torch_losses)], rtol=1e-9)
    dense = float(np.median(step_seconds))
    ratio = timed["torch"]["median"] / dense
    floor_bytes = 24 * (n_layers - 1) * dim**2
    print(
        f"thin step, d = {dim}, K = {n_classes}, L = {n_layers}: dense {dense * 1e3:.1f} ms "
        f"({floor_bytes / dense / 1e9:.1f} GB/s), torch autograd {timed['torch']['median'] * 1e3:.0f} ms, "
        f"ratio {ratio:.0f}"
    )
    return {
        "case": "thin-step",
        "dim": dim,
        "n_classes": n_classes,
        "n_layers": n_layers,
        "dense_seconds": dense,
        "torch_seconds": timed["torch"],
        "ratio": ratio,
        "torch": {"version": torch.__version__, "threads": torch.get_num_threads()},
    }


#: A run a million wide, in a process of its own, for its peak memory.
WIDE_RUN = """
import json, resource, time
start = time.perf_counter()
import dlnfast as dln
imported = time.perf_counter()
dim, rank, steps = 10**6, 10, 100_000
problem = dln.low_rank_recovery(dim, rank)
weights = dln.orthogonal([dim] * 4, scale=0.1, implicit=True)
made = time.perf_counter()
run = dln.train(problem, weights, learning_rate="auto", steps=steps, record_every=steps // 200)
trained = time.perf_counter()
tables = [(run.active_singular_values(layer), run.active_angles(layer, side), run.rho(layer))
          for layer in (1, 2, 3) for side in ("left", "right")]
done = time.perf_counter()
assert all(len(t) == 201 for table in tables for t in table) and run.loss[-1] < 1e-3 * run.loss[0]
print(json.dumps({
    "import": imported - start, "problem": made - imported, "train": trained - made,
    "singular values and angles": done - trained, "seconds": done - imported,
    "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def wide_run(repeats: int) -> dict[str, Any]:
    """Set up and run 100,000 steps at d = 10^6, r = 10, L = 3, with 200 records of values and angles."""
    rows = []
    for _ in range(max(1, repeats // 2)):
        done = subprocess.run([sys.executable, "-c", WIDE_RUN], check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout))
    median = sorted(rows, key=lambda row: row["seconds"])[len(rows) // 2]
    parts = ", ".join(
        f"{name} {median[name]:.2f} s" for name in ("problem", "train", "singular values and angles")
    )
    print(
        f"d = 1e6, r = 10, L = 3, 100,000 steps: {median['seconds']:.2f} s ({parts}), "
        f"peak memory {median['peak_bytes'] / 1e9:.2f} GB"
    )
    return {"case": "wide-run", "rows": rows}


def batch(repeats: int) -> dict[str, Any]:
    """Time `train_batch` of 1,000 runs, r = 3, L = 3, beside a loop of 1,000 calls of `train`.

    Everything is timed: Python, and the closures, which take most of the time where every run has its own
    problem and weights. `bench_batch_descent` times the steps alone.
    """
    import numpy as np

    import dlnfast as dln

    n_runs, steps = 1000, 2000
    problems = [dln.low_rank_recovery(30, 3, seed) for seed in range(n_runs)]
    starts = [dln.orthogonal([30] * 4, 0.5, seed) for seed in range(n_runs)]
    common: dict[str, Any] = {"steps": steps, "record_every": steps}
    studies = {
        "seeds": (problems, starts, [1.0] * n_runs),
        "rates": (problems[0], starts[0], np.linspace(0.5, 1.5, n_runs).tolist()),
    }
    rows = []
    losses: dict[str, Any] = {}
    for name, (problem, start, rates) in studies.items():
        each_problem = problem if isinstance(problem, list) else [problem] * n_runs
        each_start = start if name == "seeds" else [start] * n_runs

        def together(problem: Any = problem, start: Any = start, rates: Any = rates) -> None:
            losses["batch"] = dln.train_batch(problem, start, learning_rate=rates, **common).loss

        def one_by_one(problems: Any = each_problem, starts: Any = each_start, rates: Any = rates) -> None:
            losses["loop"] = np.stack(
                [
                    dln.train(p, w, engine="reduced", learning_rate=rate, **common).loss
                    for p, w, rate in zip(problems, starts, rates, strict=True)
                ]
            )

        timed = interleaved(repeats, batch=together, loop=one_by_one)
        np.testing.assert_allclose(losses["batch"], losses["loop"], rtol=1e-10)
        ratio = timed["loop"]["median"] / timed["batch"]["median"]
        print(
            f"{n_runs} {name}, {steps} steps, r = 3, L = 3, with Python and the closures: "
            f"batch {timed['batch']['median']:.2f} s, loop {timed['loop']['median']:.2f} s, ratio {ratio:.1f}"
        )
        rows.append({"study": name, "seconds": timed, "ratio": ratio})
    return {"case": "batch", "n_runs": n_runs, "steps": steps, "rows": rows}


CASES = {"batch": batch, "reduced-step": reduced_step, "thin-step": thin_step, "wide-run": wide_run}
#: What the cases need beside the package and NumPy, and how to get it.
PEERS = {"torch": "pip install torch"}


def run_case(name: str, repeats: int) -> dict[str, Any]:
    """Run one case, or say which peer it lacks."""
    try:
        return CASES[name](repeats)
    except ModuleNotFoundError as error:
        if error.name not in PEERS:
            raise
        reason = f"{error.name} is not installed: {PEERS[error.name]}"
        print(f"{name}: skipped, {reason}")
        return {"case": name, "skipped": reason}


def main() -> int:
    """Run the chosen cases and write their numbers with the machine's record."""
    restart_without_caps("bench.run")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=sorted(CASES), action="append", help="default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the results")
    arguments = parser.parse_args()
    results = [run_case(name, arguments.repeats) for name in arguments.case or sorted(CASES)]
    print(describe_threads())  # after the cases, which load the peers and their pools
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
