# SPDX-License-Identifier: MIT
"""The benchmark cases: programs, sizes and measurements.

A case is a function of `Options` that prints its measurements and returns plain values for JSON. Peers are
compared in processes of their own, one for each setting (in ``memory`` for each peer too), so that none
inherits another's memory or threads.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .._problem.standard import low_rank_recovery
from .._support.files import parse_object, read_text
from .._support.threads import available_cores
from .._training import batch as batches
from .._training.options import Record
from .._training.train import train
from .._weights.initial import orthogonal
from . import record
from .options import Options
from .peers import ON_SAMPLES, PEERS, Setting, build, check_agreement

__all__ = [
    "CASES",
    "Options",
    "load_case",
    "measure",
    "memory",
    "read_results",
    "run_case",
    "sweep",
]

#: A step that takes longer is repeated three times only.
_LONG: Final = 2.0
_FEW: Final = 3
#: Largest width in the sweeps for peers that send N = d samples through the network: a step costs d^3.
_LARGEST_ON_SAMPLES: Final = 2048
#: Numbers in each of the three arrays of the triad: beyond the caches.
_TRIAD: Final = 2**24
#: Numbers that one thread takes at a time: within the caches.
_CHUNK: Final = 2**15
#: Its memory is not measured: the process holds the compiler's too.
_WITHOUT_MEMORY: Final = "torch-compile"


# --------------------------------------------------------------------------------------------------
# Peers in turns
# --------------------------------------------------------------------------------------------------


def measure(
    settings: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
    repeats: int,
    turn: float,
    rate: str = "",
) -> dict[str, Any]:
    """Compare peers at each setting: check that they agree, then time their steps in turns.

    Parameters
    ----------
    settings : sequence of mapping
        Keywords of `Setting`.
    names : sequence of sequence of str
        Peers of each setting, keys of `PEERS`.
    repeats : int
        Rounds. A peer whose step takes more than 2 s stops after the third.
    turn : float
        Seconds that a peer steps in each round, at least. The pause between turns is 0.1 s, or as long.
    rate : {"", "triad", "matmul"}
        Rate of the machine that is measured in the same rounds: bytes or operations per second.

    Returns
    -------
    dict
        ``rows``, one per setting, and the ``machine`` with the pools of all libraries loaded.
    """
    rows = []
    for setting, chosen in zip(settings, names, strict=True):
        rows.append(_measure_setting(Setting(**setting), chosen, repeats, turn, rate))
        gc.collect()
    return {"rows": rows, "machine": record.machine()}


def _measure_setting(
    setting: Setting, names: Sequence[str], repeats: int, turn: float, rate: str
) -> dict[str, Any]:
    pause = min(record.PAUSE, turn)
    peers, skipped = build(setting, names, pause=pause)
    agreement = check_agreement(peers, skipped)
    jobs: dict[str, tuple[int, Callable[[int], float]]] = {}
    few = set()
    for name, peer in peers.items():
        time.sleep(pause)
        if peer.calibrate(turn) > _LONG:
            few.add(name)
        jobs[name] = (peer.steps, peer.seconds)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    machine_rate = _RATES[rate](setting.dim) if rate else None
    rates: list[float] = []
    for turns in range(repeats):
        for name, (steps, run) in jobs.items():
            if name in few and turns >= _FEW:
                continue
            time.sleep(pause)
            seconds[name].append(run(steps) / steps)
        if machine_rate is not None:
            time.sleep(pause)
            rates.append(machine_rate())
    row: dict[str, Any] = {
        "setting": setting.describe(),
        "agreement": agreement,
        "seconds": {
            name: record.summarise_times(times) | {"rounds": len(times), "steps_per_turn": jobs[name][0]}
            for name, times in seconds.items()
        },
        "notes": {name: peer.note for name, peer in peers.items() if peer.note},
        "skipped": skipped,
    }
    if rates:
        row["rate"] = _rate_record(rate, setting, row["seconds"], rates)
    return row


def _rate_record(
    rate: str, setting: Setting, seconds: Mapping[str, Any], rates: list[float]
) -> dict[str, Any]:
    """Return the rates of the machine, and of each peer for the minimum work of a step."""
    d, layers = setting.dim, setting.depth - 1
    work, text = {
        "triad": (24 * layers * d**2, "24 (L - 1) d^2 bytes: each wide layer read twice and written once"),
        "matmul": (6 * layers * d**3, "6 (L - 1) d^3 operations: 3 (L - 1) products of square matrices"),
    }[rate]
    return {
        "kind": rate,
        "machine_per_second": record.summarise_times(rates),
        "work_per_step": work,
        "work": text,
        "per_second": {
            name: work / times["median"] for name, times in seconds.items() if name != "dlnfast-reduced"
        },
    }


def _triad(dim: int) -> Callable[[], float]:
    """Return a job that runs a = b + s c over arrays beyond the caches, and returns bytes per second.

    NumPy on all cores, 24 bytes per entry; what a processor reads before it writes is not counted.
    """
    del dim  # the arrays are beyond the caches whatever the layers are
    n_threads = available_cores()
    a, b, c = np.zeros(_TRIAD), np.ones(_TRIAD), np.ones(_TRIAD)
    pool = ThreadPoolExecutor(n_threads)
    ends = np.linspace(0, _TRIAD, n_threads + 1).astype(int).tolist()

    def part(index: int) -> None:
        scaled = np.empty(_CHUNK)
        for first in range(ends[index], ends[index + 1], _CHUNK):
            rows = slice(first, min(first + _CHUNK, ends[index + 1]))
            product = np.multiply(c[rows], 3.0, out=scaled[: rows.stop - rows.start])
            np.add(b[rows], product, out=a[rows])

    def job() -> float:
        best = float("inf")
        for _ in range(_FEW):
            start = time.perf_counter()
            list(pool.map(part, range(n_threads)))
            best = min(best, time.perf_counter() - start)
        return 24 * _TRIAD / best

    return job


def _matmul(dim: int) -> Callable[[], float]:
    """Return a job that multiplies two d x d matrices by NumPy, and returns operations per second."""
    one, other, out = np.ones((dim, dim)), np.ones((dim, dim)), np.empty((dim, dim))

    def job() -> float:
        best = float("inf")
        for _ in range(_FEW):
            start = time.perf_counter()
            np.matmul(one, other, out=out)
            best = min(best, time.perf_counter() - start)
        return 2 * dim**3 / best

    return job


_RATES: Final = {"triad": _triad, "matmul": _matmul}


def _compare(
    case: str,
    settings: Sequence[Setting],
    options: Options,
    *,
    rate: str = "",
    n_threads: int = 0,
    names: Callable[[Setting, Sequence[str]], Iterable[str]] = lambda _, names: names,
) -> dict[str, Any]:
    """Measure each setting in a fresh process, and print the result."""
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for setting in settings:
        arguments = {
            "settings": [asdict(setting)],
            "names": [list(names(setting, options.peers or tuple(PEERS)))],
            "repeats": options.repeats,
            "turn": options.turn,
            "rate": rate,
        }
        result = record.in_process("cases:measure", arguments, n_threads)
        rows += result["rows"]
        _print_row(case, rows[-1])
    return {"case": case, "rows": rows, "machine": result["machine"]}


def _print_row(case: str, row: Mapping[str, Any]) -> None:
    s = row["setting"]
    print(f"{case}: d = {s['dim']}, K = {s['n_outputs']}, L = {s['depth']}, N = {s['n_samples']}")
    for name, times in row["seconds"].items():
        note = f"  ({row['notes'][name]})" if name in row["notes"] else ""
        print(
            f"  {name:<26} {record.format_seconds(times['median']):>9}  "
            f"({record.format_seconds(times['least'])} .. {record.format_seconds(times['largest'])}){note}"
        )
    for name, reason in row["skipped"].items():
        print(f"  {name:<26} skipped, {reason}")
    if "rate" in row:
        rate = row["rate"]
        unit, of = ("GB/s", "triad") if rate["kind"] == "triad" else ("GF/s", "numpy.matmul")
        dense = rate["per_second"].get("dlnfast-dense", float("nan")) / 1e9
        machine = rate["machine_per_second"]["median"] / 1e9
        print(f"  dlnfast dense {dense:.1f} {unit}; {of} {machine:.1f} {unit}")
    sys.stdout.flush()  # the next row may take minutes


# --------------------------------------------------------------------------------------------------
# Regimes
# --------------------------------------------------------------------------------------------------


def thin(options: Options) -> dict[str, Any]:
    """Compare steps with K = 10 outputs, L = 3 and 4, d = 2048 and 4096, N = d samples."""
    dims = (64,) if options.quick else (2048, 4096)
    settings = [Setting(dim, 10, depth) for dim in dims for depth in (3, 4)]
    return _compare("thin", settings, options, rate="triad")


def square(options: Options) -> dict[str, Any]:
    """Compare steps of square layers, L = 3, d = 512, 1024 and 2048, N = d samples."""
    dims = (48,) if options.quick else (512, 1024, 2048)
    return _compare("square", [Setting(dim, dim) for dim in dims], options, rate="matmul")


def small(options: Options) -> dict[str, Any]:
    """Compare steps of small square layers: d = 10, 30, 64, 100 and 256, L = 3, target of rank 3."""
    dims = (10, 30) if options.quick else (10, 30, 64, 100, 256)
    return _compare("small", [Setting(dim, dim, rank=3) for dim in dims], options)


# --------------------------------------------------------------------------------------------------
# Sweeps
# --------------------------------------------------------------------------------------------------


def sweep(
    over: str,
    values: Sequence[int],
    *,
    dim: int = 1024,
    n_outputs: int = 10,
    depth: int = 3,
    options: Options | None = None,
) -> dict[str, Any]:
    """Compare peers while one of the sizes changes.

    Parameters
    ----------
    over : {"width", "depth", "outputs", "samples", "threads", "memory"}
        "threads" limits cores and threads of every library; "memory" measures memory over the width.
    values : sequence of int
        Values of d, L, K, N, the number of threads, or d, in the order of `over`.
    dim, n_outputs, depth : int
        d, K and L where they do not change. N = d unless it changes.
    options : Options, optional

    Returns
    -------
    dict
        Plain values: ``case``, ``over``, ``values``, ``rows`` and ``machine``.
    """
    options = options or Options()
    if over == "memory":
        return _memory_over_width(values, n_outputs, depth, options.peers or tuple(PEERS))
    if over == "threads":
        return _sweep_threads(values, Setting(dim, n_outputs, depth), options)
    setting: Callable[[int], Setting] = {
        "width": lambda value: Setting(value, n_outputs, depth),
        "depth": lambda value: Setting(dim, n_outputs, value),
        "outputs": lambda value: Setting(dim, value, depth),
        "samples": lambda value: Setting(dim, n_outputs, depth, value),
    }[over]
    result = _compare(over, [setting(value) for value in values], options, names=_select_affordable)
    return result | {"over": over, "values": list(values)}


def _select_affordable(setting: Setting, names: Sequence[str]) -> list[str]:
    """Return the peers without those that would take minutes for a point of a sweep."""
    if not setting.explicit:
        return [name for name in names if name == "dlnfast-reduced"]
    return [name for name in names if setting.dim <= _LARGEST_ON_SAMPLES or name not in ON_SAMPLES]


def _sweep_threads(values: Sequence[int], setting: Setting, options: Options) -> dict[str, Any]:
    rows, machines = [], []
    for n_threads in values:
        part = _compare(f"threads {n_threads}", [setting], options, n_threads=n_threads)
        rows += [row | {"n_threads": n_threads} for row in part["rows"]]
        machines.append(part["machine"])
    return {
        "case": "threads",
        "over": "threads",
        "values": list(values),
        "rows": rows,
        "machine": machines[-1],
        "machines": machines,
    }


def memory(setting: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Measure by how much one peer's run raises the peak memory of this process.

    Parameters
    ----------
    setting : mapping
        Keywords of `Setting`.
    name : str
        A key of `PEERS`.

    Returns
    -------
    dict
        ``peak_bytes`` beyond the process with its libraries loaded and used, or the reason in ``skipped``;
        the ``machine``.

    Notes
    -----
    Weights, target, samples and set-up count; two steps are taken.
    """
    chosen = Setting(**setting)
    warm, skipped = build(
        replace(chosen, dim=max(16, chosen.n_outputs), n_samples=0), [name], tune=False, pause=0.0
    )
    if name in warm:
        warm[name].advance(2)
        del warm
        gc.collect()
        before = record.resident_bytes() or record.peak_bytes()
        record.forget_peak()
        peers, skipped = build(chosen, [name], tune=False, pause=0.0)
        if name in peers:
            peers[name].advance(2)
            return {"peak_bytes": max(record.peak_bytes() - before, 0), "machine": record.machine()}
    return {"skipped": skipped[name], "machine": record.machine()}


def _memory_over_width(
    values: Sequence[int], n_outputs: int, depth: int, peers: Sequence[str]
) -> dict[str, Any]:
    rows = []
    last: dict[str, Any] = {}
    for dim in values:
        setting = Setting(dim, n_outputs, depth)
        row: dict[str, Any] = {"setting": setting.describe(), "bytes": {}, "skipped": {}}
        for name in peers:
            if name == _WITHOUT_MEMORY or (not setting.explicit and name != "dlnfast-reduced"):
                continue
            # The reduced engine needs no layers as arrays, so it gets none.
            own = replace(setting, implicit=name == "dlnfast-reduced")
            last = record.in_process("cases:memory", {"setting": asdict(own), "name": name})
            if "skipped" in last:
                row["skipped"][name] = last["skipped"]
            else:
                row["bytes"][name] = last["peak_bytes"]
        row["weight_bytes"] = 8 * sum(
            m * n for m, n in zip(setting.widths[1:], setting.widths[:-1], strict=True)
        )
        rows.append(row)
        print(f"memory: d = {dim}, K = {n_outputs}, L = {depth}, N = {setting.samples_used}")
        for name, n_bytes in row["bytes"].items():
            print(f"  {name:<26} {n_bytes / 1e6:10.1f} MB")
        for name, reason in row["skipped"].items():
            print(f"  {name:<26} skipped, {reason}")
    return {
        "case": "memory",
        "over": "memory",
        "measured": "peak resident memory of a process of its own, beyond its libraries, with all arrays; "
        "the reduced engine on lazily sampled weights",
        "values": list(values),
        "rows": rows,
        "machine": last.get("machine", {}),
    }


def thread_counts() -> list[int]:
    """Return 1, 2, 4, .. and all the cores that this process may use."""
    cores = available_cores()
    return [2**power for power in range(cores.bit_length()) if 2**power < cores] + [cores]


#: Changing size -> its values, and the values of ``--quick``. No counts of threads: 1, 2, 4, .. all.
SWEEPS: Final[dict[str, tuple[Sequence[int], Sequence[int]]]] = {
    "width": ((64, 128, 256, 512, 1024, 2048, 4096, 10**4, 10**5, 10**6), (32, 64, 10**4)),
    "depth": ((2, 3, 4, 6, 8), (2, 3)),
    "outputs": ((1, 3, 10, 30, 100, 300, 1024), (2, 8)),
    "samples": ((1024, 2048, 4096, 8192, 16384), (64, 128)),
    "threads": ((), ()),
    "memory": ((256, 512, 1024, 2048, 4096, 10**4, 10**5, 10**6), (64, 10**4)),
}


def _sweep_case(over: str) -> Callable[[Options], dict[str, Any]]:
    def case(options: Options) -> dict[str, Any]:
        values = SWEEPS[over][options.quick] or thread_counts()
        return sweep(over, values, dim=64 if options.quick else 1024, options=options)

    names = {"outputs": "the outputs K", "samples": "the samples N", "memory": "the width: memory"}
    case.__doc__ = (
        f"Sweep over {names.get(over, 'the ' + over)}; L = 3, K = 10, d = 1024 where they are fixed."
    )
    return case


def scaling(options: Options) -> dict[str, Any]:
    """Run all sweeps, for `dlnfast figure scaling`."""
    return {"case": "scaling", "sweeps": {over: _sweep_case(over)(options) for over in SWEEPS}}


# --------------------------------------------------------------------------------------------------
# Other cases
# --------------------------------------------------------------------------------------------------


def thin_step(options: Options) -> dict[str, Any]:
    """Time a dense step with d = 2048, K = 10, L = 3, N = d and PyTorch autograd on the same data."""
    setting = Setting(64 if options.quick else 2048, 10)
    result = _compare(
        "thin-step", [setting], options, rate="triad", names=lambda *_: ("dlnfast-dense", "torch-autograd")
    )
    row = result["rows"][0]
    if "torch-autograd" in row["skipped"]:
        return result | {"skipped": row["skipped"]["torch-autograd"]}
    ratio = row["seconds"]["torch-autograd"]["median"] / row["seconds"]["dlnfast-dense"]["median"]
    print(f"  ratio {ratio:.1f}")
    return result | {"ratio": ratio}


def torch_engine(options: Options) -> dict[str, Any]:
    """Compare a step of the torch engine with the dense one and autograd: d = 512, K = 10; d = K = 256."""
    sizes = ((64, 10), (48, 48)) if options.quick else ((512, 10), (256, 256))
    names = ("dlnfast-dense", "dlnfast-torch", "torch-autograd-statistics", "torch-autograd")
    settings = [Setting(dim, n_outputs) for dim, n_outputs in sizes]
    return _compare("torch-engine", settings, options, names=lambda *_: names)


def reduced_step(options: Options) -> dict[str, Any]:
    """Time one reduced step, r = 3, L = 3, on one core: it must not depend on the width."""
    steps = 40_000 if options.quick else 400_000
    rows = []
    widths = ((3, (30, 60)), (10, (60,))) if options.quick else ((3, (30, 300, 1000)), (10, (60, 1000)))
    for rank, dims in widths:
        for dim in dims:
            problem = low_rank_recovery(dim, rank, seed=0)
            weights = orthogonal([dim] * 4)

            def run(n: int, problem: Any = problem, weights: Any = weights) -> None:
                rate = 1e-3 / problem.loss_scale
                train(
                    problem,
                    weights,
                    learning_rate=rate,
                    steps=n,
                    record=Record(every=n),
                    engine="reduced",
                    n_threads=1,
                )

            n = steps if rank == 3 else steps // 10
            # The difference is the time of steps alone: no set-up, no Python.
            jobs = {"short": lambda n=n: run(n), "long": lambda n=n: run(3 * n)}
            timed = record.time_interleaved(options.repeats, **jobs)
            step = (timed["long"]["median"] - timed["short"]["median"]) / (2 * n)
            rows.append({"rank": rank, "dim": dim, "nanoseconds_per_step": step * 1e9, "seconds": timed})
            shown = f"{step * 1e9:7.0f} ns" if step > 0 else "not measurable: other programs used the cores"
            print(f"reduced step, r = {rank}, L = 3, d = {dim:5d}: {shown}")
    return {"case": "reduced-step", "rows": rows}


#: A wide run in a process of its own, for its peak memory.
_WIDE_RUN: Final = """
import json, sys, time
start = time.perf_counter()
import dlnfast as dln
from dlnfast.benchmarks import record
imported = time.perf_counter()
dim, steps = map(int, sys.argv[1:])
rank = 10
problem = dln.low_rank_recovery(dim, rank)
weights = dln.orthogonal([dim] * 4, scale=0.1, implicit=True)
made = time.perf_counter()
run = dln.train(problem, weights, learning_rate="auto", steps=steps, record=dln.Record(every=steps // 200))
trained = time.perf_counter()
tables = [(run.active_singular_values(layer), run.active_angles(layer, side), run.rho(layer))
          for layer in (1, 2, 3) for side in ("left", "right")]
done = time.perf_counter()
assert all(len(t) == 201 for table in tables for t in table) and run.loss[-1] < run.loss[0]
print(json.dumps({
    "import": imported - start, "problem": made - imported, "train": trained - made,
    "singular values and angles": done - trained, "seconds": done - imported,
    "peak_bytes": record.peak_bytes()}))
"""


def wide_run(options: Options) -> dict[str, Any]:
    """Set up and run 100,000 steps at d = 10^6, r = 10, L = 3, with 200 records of values and angles."""
    dim, steps = (10**4, 2000) if options.quick else (10**6, 100_000)
    rows = []
    for _ in range(max(1, options.repeats // 2)):
        done = record.run_program(_WIDE_RUN, dim, steps)
        done.check_returncode()
        rows.append(json.loads(done.stdout))
    median = sorted(rows, key=lambda row: row["seconds"])[len(rows) // 2]
    parts = ", ".join(
        f"{name} {median[name]:.2f} s" for name in ("problem", "train", "singular values and angles")
    )
    print(
        f"d = {dim}, r = 10, L = 3, {steps} steps: {median['seconds']:.2f} s ({parts}), "
        f"peak memory {median['peak_bytes'] / 1e9:.2f} GB"
    )
    return {"case": "wide-run", "dim": dim, "steps": steps, "rows": rows}


def batch(options: Options) -> dict[str, Any]:
    """Time `train_batch` of 1,000 runs, r = 3, L = 3, and a loop of 1,000 calls of `train`.

    Everything is timed: Python, and the closures, which take most of the time where every run has its own
    problem and weights. `bench_batch_descent` times the steps alone.
    """
    n_runs, steps = (20, 50) if options.quick else (1000, 2000)
    problems = [low_rank_recovery(30, 3, seed) for seed in range(n_runs)]
    starts = [orthogonal([30] * 4, 0.5, seed) for seed in range(n_runs)]
    common: dict[str, Any] = {"steps": steps, "record": Record(every=steps)}
    studies = {
        "seeds": (problems, starts, [1.0] * n_runs),
        "rates": (problems[0], starts[0], np.linspace(0.5, 1.5, n_runs).tolist()),
    }
    rows = []
    losses: dict[str, npt.NDArray[np.float64]] = {}
    for name, (problem, start, rates) in studies.items():
        each_problem = problem if isinstance(problem, list) else [problem] * n_runs
        each_start = start if name == "seeds" else [start] * n_runs

        def run_batch(problem: Any = problem, start: Any = start, rates: Any = rates) -> None:
            losses["batch"] = batches.train_batch(problem, start, learning_rate=rates, **common).loss

        def run_one_by_one(
            problems: Any = each_problem, starts: Any = each_start, rates: Any = rates
        ) -> None:
            losses["loop"] = np.stack(
                [
                    train(p, w, engine="reduced", learning_rate=rate, **common).loss
                    for p, w, rate in zip(problems, starts, rates, strict=True)
                ]
            )

        timed = record.time_interleaved(options.repeats, batch=run_batch, loop=run_one_by_one)
        np.testing.assert_allclose(losses["batch"], losses["loop"], rtol=1e-10)
        ratio = timed["loop"]["median"] / timed["batch"]["median"]
        print(
            f"{n_runs} {name}, {steps} steps, r = 3, L = 3, with Python and the closures: "
            f"batch {timed['batch']['median']:.2f} s, loop {timed['loop']['median']:.2f} s, ratio {ratio:.1f}"
        )
        rows.append({"study": name, "seconds": timed, "ratio": ratio})
    return {"case": "batch", "n_runs": n_runs, "steps": steps, "rows": rows}


#: Name on the command line -> the case.
#: Name of a case -> module of this package and function in it, which are loaded when the case is asked for.
CASES: Final[dict[str, str]] = {
    "thin": "cases:thin",
    "square": "cases:square",
    "small": "cases:small",
    "scaling": "cases:scaling",
    **dict.fromkeys(SWEEPS, "cases:"),
    "thin-step": "cases:thin_step",
    "reduced-step": "cases:reduced_step",
    "wide-run": "cases:wide_run",
    "batch": "cases:batch",
    "update-rules": "update_rules:update_rules",
    "sweep-usage": "sweeps:usage",
    "tracking-bounds": "tracking:bounds",
    "tracking-peers": "tracking:peers",
    "tracking-share": "tracking:share",
    "tracking-memory": "tracking:memory",
    "checkpoint-spectra": "checkpoints:spectra",
    "track-share": "networks:track_share",
    "track-record": "networks:track_record",
    "subspace-report": "subspaces:subspace_report",
    "torch-engine": "cases:torch_engine",
    "deep-lora": "adapters:deep_lora",
    "low-rank-step": "low_rank:low_rank_step",
    "factorisation": "completion:factorisation",
    "completion": "completion:completion",
    "sensing": "completion:sensing",
    "completion-memory": "completion:memory",
    "ratings": "ratings:ratings",
    "ratings-large": "ratings:large",
}


def load_case(name: str) -> Callable[[Options], dict[str, Any]]:
    """Return the function that runs a case; its summary is the first line of its docstring."""
    if name in SWEEPS:
        return _sweep_case(name)
    module, _, function = CASES[name].partition(":")
    case: Callable[[Options], dict[str, Any]] = getattr(
        importlib.import_module(f".{module}", __package__), function
    )
    return case


#: Cases that are measured by default.
DEFAULT: Final = ("thin", "square", "small")


def run_case(name: str, options: Options) -> dict[str, Any]:
    """Run one case; the result holds the machine's record."""
    result = load_case(name)(options)
    return result if "machine" in result or "sweeps" in result else result | {"machine": record.machine()}


def read_results(path: Path) -> dict[str, Any]:
    """Return the content of a file from ``dlnfast bench --out``.

    Raises
    ------
    ValueError
        For a file of another kind.
    """
    try:
        results = parse_object(read_text(path))
        found = {result["case"] for result in results["results"]}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no result; wanted a file that dlnfast bench --out wrote") from None
    unknown = found - set(CASES)
    if unknown:
        raise ValueError(f"{path} has the case {sorted(unknown)[0]!r}; wanted {', '.join(CASES)}")
    return results
