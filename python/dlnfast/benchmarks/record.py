# SPDX-License-Identifier: MIT
"""Timing in turns, fresh processes, and the record of the machine that belongs to every number."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from .._support.environment import version
from .._support.threads import available_cores, build_info

__all__ = [
    "CAPS",
    "PAUSE",
    "describe_machine",
    "in_process",
    "machine",
    "processor",
    "restart_without_caps",
    "run_program",
    "summarise_times",
    "thread_pools",
    "time_interleaved",
]

#: Settings that cap NumPy's BLAS at half of its speed where they are set.
CAPS: Final = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
#: Seconds between the turns of two libraries: threads of the one that keep spinning would slow the other.
PAUSE: Final = 0.1
#: Variables that change how many threads a library takes and how they wait.
_THREAD_VARIABLES: Final = (
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_WAIT_POLICY",
    "OPENBLAS_NUM_THREADS",
    "XLA_FLAGS",
)
_LIMITS: Final = ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_PACKAGES: Final = ("numpy", "torch", "jax", "jaxlib", "threadpoolctl")
#: Precedes the result in the output of a fresh process, because libraries print, too.
_MARK: Final = "result of the fresh process: "
#: Start of every such program: exits with the parent process.
_WATCHER: Final = """
def _watch():
    import os, sys, threading
    descriptor = int(sys.argv.pop(1))
    def wait():
        os.read(descriptor, 1)
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()
_watch()
"""
_PROGRAM: Final = """
import importlib, json, os, sys
request = json.load(sys.stdin)
if request["n_threads"] and hasattr(os, "sched_setaffinity"):
    # Before any library counts the cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: request["n_threads"]])
module, _, function = request["function"].partition(":")
result = getattr(importlib.import_module(f"dlnfast.benchmarks.{module}"), function)(**request["arguments"])
print("\\n" + request["mark"] + json.dumps(result))
"""


def restart_without_caps(module: str) -> None:
    """Restart this program without the variables in `CAPS`, which slow a peer down; BLAS reads them once.

    Parameters
    ----------
    module : str
        Module to start, as for ``python -m``.
    """
    if any(name in os.environ for name in CAPS):
        sys.stdout.flush()
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        if sys.platform == "win32":  # a shell would not wait for a program that replaces this one
            sys.exit(subprocess.call(command, env=_remove_caps()))
        os.execve(sys.executable, command, _remove_caps())


def _remove_caps() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in CAPS}


def run_program(
    program: str, *arguments: object, text: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh process, which exits when this one exits or is killed (not on Windows).

    Parameters
    ----------
    program : str
        Source code.
    arguments : object
        Its ``sys.argv[1:]``, as strings.
    text : str, optional
        Standard input.
    environment : mapping, optional
        Its environment; by default that of this process.

    Returns
    -------
    CompletedProcess
        The status, and the output as text.
    """
    run = partial(subprocess.run, input=text, capture_output=True, text=True, env=environment, check=False)
    if sys.platform == "win32":  # hands no descriptor over: the program runs to its end
        return run([sys.executable, "-c", program, *map(str, arguments)])
    # The writing end is closed with this process, by its death too; the watcher then reads the end.
    reader, writer = os.pipe()
    try:
        command = [sys.executable, "-c", _WATCHER + program, str(reader), *map(str, arguments)]
        return run(command, pass_fds=(reader,))
    finally:
        os.close(reader)
        os.close(writer)


def in_process(function: str, arguments: Mapping[str, Any], n_threads: int = 0) -> Any:
    """Call a function of this package in a fresh process without caps, and return its result.

    Parameters
    ----------
    function : str
        Module and name, such as "cases:measure".
    arguments : mapping
        Keywords, in values that JSON knows.
    n_threads : int
        Number of cores (Linux) and of OpenMP, OpenBLAS and MKL threads of the process; 0 for no limit.

    Raises
    ------
    RuntimeError
        If the process fails, with the last line of its error output.
    """
    environment = _remove_caps()
    if n_threads:
        environment |= dict.fromkeys(_LIMITS, str(n_threads))
    request = {"function": function, "arguments": arguments, "n_threads": n_threads, "mark": _MARK}
    done = run_program(_PROGRAM, text=json.dumps(request), environment=environment)
    if done.returncode != 0:
        complaint = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(
            f"{function} failed in a process of its own, status {done.returncode}: {complaint}"
        )
    return json.loads(done.stdout.rsplit(_MARK, 1)[1])


def elapsed(job: Callable[[], object]) -> float:
    """Return the seconds that a job takes."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def time_interleaved(repeats: int, **jobs: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Time every job once per round, round after round; return median, least and largest seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            seconds[name].append(elapsed(job))
    return {name: summarise_times(values) for name, values in seconds.items()}


def summarise_times(values: list[float]) -> dict[str, float]:
    """Return median, least and largest of some numbers."""
    return {"median": statistics.median(values), "least": min(values), "largest": max(values)}


def machine() -> dict[str, Any]:
    """Return date, processor, versions, build, thread pools and the variables that change them."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": available_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
        "dlnfast": build_info(),
        "thread_pools": thread_pools(),
        "variables": {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
        "caps": {name: os.environ[name] for name in CAPS if name in os.environ},
    }


def thread_pools() -> list[dict[str, Any]] | None:
    """Return the pools of all libraries that are loaded; None where threadpoolctl is not installed."""
    try:
        import threadpoolctl
    except ModuleNotFoundError:
        return None
    pools: list[dict[str, Any]] = threadpoolctl.threadpool_info()
    # The folders of an installation say nothing about speed.
    return [pool | {"filepath": Path(pool["filepath"]).name} for pool in pools]


def describe_machine(record: Mapping[str, Any]) -> str:
    """Return one line about the processor, the core's build and the pools of the loaded libraries.

    Parameters
    ----------
    record : mapping
        Result of `machine`.
    """
    pools = record["thread_pools"]
    if pools is None:
        text = "not known (pip install threadpoolctl)"
    else:
        text = ", ".join(f"{pool['internal_api']} {pool['num_threads']}" for pool in pools) or "none"
    caps = "".join(f"; CAPPED by {name}={value}" for name, value in record["caps"].items())
    return (
        f"{record['processor']}, {record['cores']} cores; dlnfast {record['dlnfast']['level']}; "
        f"threads of the pools: {text}{caps}"
    )


def processor() -> str:
    """Return the processor's name."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def resident_bytes() -> int | None:
    """Return the present memory of this process; None where the system has no such number."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Return the peak memory of this process, since its start or since `forget_peak`."""
    # getrusage would count the memory of the parent at the start of this process.
    peak = _status("VmHWM")
    if peak is None:
        if sys.platform == "win32":
            return _windows_peak_bytes()
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak


def _windows_peak_bytes() -> int:
    """Return the peak of the working set of this process, as Windows counts it."""
    import ctypes

    class Counters(ctypes.Structure):
        _fields_ = (
            ("size", ctypes.c_uint32),
            ("page_faults", ctypes.c_uint32),
            ("peak", ctypes.c_size_t),
            ("others", ctypes.c_size_t * 7),
        )

    counters = Counters(size=ctypes.sizeof(Counters))
    system: Any = ctypes.CDLL("kernel32")
    system.GetCurrentProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(system.GetCurrentProcess())
    if not system.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.size):
        raise OSError("Windows does not report the memory of this process")
    return int(counters.peak)


def forget_peak() -> None:
    """Reset `peak_bytes`, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status(entry: str) -> int | None:
    try:
        with open("/proc/self/status") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith(entry))
    except (OSError, StopIteration):
        return None


def format_seconds(seconds: float) -> str:
    """Return three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= 0.9995 * size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds / 1e-9)} ns"


def _digits(value: float) -> str:
    return (
        f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"
    )
