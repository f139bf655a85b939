"""Threads, signals, forks: what a long call may not do to the rest of the process."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import test_core_arguments as core_arguments
from tolerances import tolerance

import dlnfast as dln
from dlnfast._dispatch import core as chosen_core


def dense_problem(widths, seed=0):
    rng = np.random.default_rng(seed)
    problem = dln.Problem(rng.standard_normal((widths[-1], widths[0])), loss_scale=1e-2)
    return problem, dln.gaussian(widths, scale=0.8, seed=seed)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "widths", [[40] * 4, [150, 150, 150, 7], [7, 150, 150], [90, 90, 90], [64, 5, 64], [1, 1, 1]]
)
def test_any_number_of_threads_gives_the_same(widths, dtype):
    problem, weights = dense_problem(widths)
    weights = [w.astype(dtype) for w in weights]
    runs = [
        dln.train(problem, weights, learning_rate=1.0, momentum=0.3, steps=30, engine="dense", n_threads=n)
        for n in (1, 2, 7)
    ]
    limit = 2 * tolerance(dtype, max(widths), 30)
    for run in runs[1:]:
        np.testing.assert_allclose(run.loss, runs[0].loss, rtol=limit)
        for layer in range(1, len(widths)):
            difference = np.linalg.norm(run.weights(layer) - runs[0].weights(layer))
            assert difference <= limit * np.linalg.norm(runs[0].weights(layer))


def test_set_num_threads():
    before = chosen_core.max_threads()
    try:
        dln.set_num_threads(3)
        assert chosen_core.max_threads() == (3 if chosen_core.build_info()["openmp"] else 1)
    finally:
        dln.set_num_threads(0)
    assert chosen_core.max_threads() == before
    with pytest.raises(ValueError, match="n is -1"):
        dln.set_num_threads(-1)
    with pytest.raises(TypeError, match=r"n is 1\.5"):
        dln.set_num_threads(1.5)


def test_openmp_settings_are_obeyed(run_python):
    if not chosen_core.build_info()["openmp"]:
        pytest.skip("built without OpenMP")
    program = "from dlnfast._dispatch import core; print(core.max_threads())"
    for n in (1, 3):
        assert int(run_python(program, OMP_NUM_THREADS=str(n))) == n


def test_threadpoolctl_is_obeyed():
    threadpoolctl = pytest.importorskip("threadpoolctl", reason="threadpoolctl limits thread pools")
    if not chosen_core.build_info()["openmp"]:
        pytest.skip("built without OpenMP")
    with threadpoolctl.threadpool_limits(1, user_api="openmp"):
        assert chosen_core.max_threads() == 1


TEAM = """
import os, sys
import numpy as np
import dlnfast as dln
if sys.argv[2] == "default":
    dln.set_num_threads(int(sys.argv[3]))
weights = dln.gaussian([300] * 3)
before = len(os.listdir("/proc/self/task"))
problem = dln.Problem(np.eye(300), loss_scale=1e-3)
dln.train(problem, weights, learning_rate=0.1, steps=2, singular_values=None, n_threads=int(sys.argv[1]))
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
@pytest.mark.parametrize(
    ("n_threads", "default", "variable", "started"),
    [(0, 0, "1", 0), (0, 0, "3", 2), (4, 0, "1", 3), (1, 0, "3", 0), (0, 2, "4", 1), (3, 2, "1", 2)],
)
def test_as_many_threads_run_as_were_asked_for(run_python, n_threads, default, variable, started):
    """An argument above the default above OMP_NUM_THREADS; one of them is the caller."""
    if not chosen_core.build_info()["openmp"]:
        pytest.skip("built without OpenMP")
    how = ("default", default) if default else ("environment", 0)
    printed = run_python(TEAM, n_threads, *how, OMP_NUM_THREADS=variable, OPENBLAS_NUM_THREADS="1")
    assert int(printed) == started


def long_dense_run():
    problem, weights = dense_problem([200] * 4)
    return dln.train(
        problem, weights, learning_rate=1e-3, steps=300, singular_values=None, record_every=300, n_threads=1
    )


def test_the_gil_is_released():
    done = threading.Event()

    def work():
        long_dense_run()
        done.set()

    thread = threading.Thread(target=work)
    turns = 0
    thread.start()
    while not done.is_set():
        turns += 1
        time.sleep(0.001)
    thread.join()
    # With the GIL held, this thread would have had its turn a handful of times at most.
    assert turns > 20


def test_two_threads_may_train_at_once():
    cases = [(dense_problem([60, 60, 60, 5], seed=s), {"learning_rate": 0.5, "steps": 200}) for s in range(3)]
    small = dln.low_rank_recovery(30, 3)
    cases.append(((small, dln.orthogonal([30] * 4)), {"learning_rate": 1.0, "steps": 500}))
    alone = [dln.train(*data, **settings).loss for data, settings in cases]
    together: dict[int, np.ndarray] = {}

    def work(i):
        data, settings = cases[i]
        together[i] = dln.train(*data, **settings).loss

    for _ in range(3):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, losses in enumerate(alone):
            np.testing.assert_array_equal(together[i], losses)


INTERRUPTED = """
import os, signal, threading, time, sys
import numpy as np
import dlnfast as dln
rng = np.random.default_rng(0)
case = sys.argv[1]
if case == "reduced":
    args = dln.low_rank_recovery(30, 3), dln.orthogonal([30] * 4)
    kwargs = dict(learning_rate=1e-6, steps=10**9, record_every=10**7)
else:
    d = 1500
    args = dln.Problem(rng.standard_normal((d, d)), loss_scale=1e-6), [
        rng.standard_normal((d, d)) / d**0.5 for _ in range(2)]
    values = "all" if case == "singular values" else None
    kwargs = dict(learning_rate=1e-3, steps=1000, engine="dense", singular_values=values)
sent = []
def interrupt():
    time.sleep(1.5)
    sent.append(time.perf_counter())
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
try:
    dln.train(*args, **kwargs)
    print("was not interrupted")
except KeyboardInterrupt as error:
    late = time.perf_counter() - sent[0]
    kept = getattr(error, "trajectory", None)
    finite = kept is None or bool(np.isfinite(kept.loss).all())
    again = dln.train(dln.low_rank_recovery(12, 2), dln.orthogonal([12] * 3), learning_rate=1.0, steps=5)
    print(late, kept is not None, finite, len(again.loss))
"""


def longest_silence(call):
    """Return the most computing time, in seconds of this thread, between two words to the caller."""
    times = [time.thread_time()]
    call(lambda step, loss: times.append(time.thread_time()))
    return float(np.max(np.diff([*times, time.thread_time()])))


def test_large_products_listen_in_between(core):
    """Whatever the level, on one thread: a product of 1.6e10 flops is 0.8 s of a core without AVX."""
    dim = 2000
    weights = [np.eye(dim) for _ in range(2)]
    arguments = core_arguments.dense_arguments(steps=1) | {
        "target": np.eye(dim),
        "snapshot_every": 0,
        "values": [],
        "left": [],
        "right": [],
        "snapshots": [],
    }
    assert longest_silence(lambda hear: core.dense_descent(weights, arguments | {"on_progress": hear})) < 0.5


def test_deep_reduced_runs_listen_in_between(core):
    """Four hundred cores of the largest fixed size: 8e7 flops a step."""
    n_layers, size, steps = 400, 32, 300
    cores = [0.9 * np.eye(size) for _ in range(n_layers)]
    arguments = core_arguments.common(steps=steps, n_layers=n_layers) | {
        "target": np.eye(size),
        "record_every": steps,
        "families": [(0, 1.0, 1.0, [0.5] * n_layers)],
        "scalars": None,
        "core_records": [np.zeros((2, size, size)) for _ in cores],
        "rho_records": np.zeros((2, n_layers)),
    }
    assert longest_silence(lambda hear: core.reduced_descent(cores, arguments | {"on_progress": hear})) < 0.5


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("case", ["reduced", "dense", "singular values"])
def test_ctrl_c_ends_a_run_within_half_a_second(run_python, case):
    late, kept, finite, again = run_python(INTERRUPTED, case).split()
    assert float(late) < 0.5
    # Before the first decomposition is done there is no record yet.
    assert kept == "True" or case == "singular values"
    assert (finite, again) == ("True", "6")


def test_an_exception_of_the_callback_travels_out_with_the_trajectory():
    problem, weights = dln.low_rank_recovery(30, 3), dln.orthogonal([30] * 4)

    def callback(step, loss):
        if step == 30:
            raise RuntimeError("enough")

    for engine in ("reduced", "dense"):
        with pytest.raises(RuntimeError, match="enough") as caught:
            dln.train(
                problem,
                weights,
                learning_rate=1.0,
                steps=100,
                record_every=10,
                engine=engine,
                callback=callback,
            )
        kept = caught.value.trajectory
        assert kept.steps.tolist() == [0, 10, 20, 30]
        assert len(kept.loss) == 31


def test_a_callback_may_stop_a_run():
    problem, weights = dln.low_rank_recovery(30, 3), dln.orthogonal([30] * 4)
    seen = []

    def callback(step, loss):
        seen.append((step, loss))
        return step >= 20

    for engine in ("reduced", "dense"):
        seen.clear()
        run = dln.train(
            problem, weights, learning_rate=1.0, steps=100, record_every=10, engine=engine, callback=callback
        )
        assert [step for step, _ in seen] == [0, 10, 20]
        assert [loss for _, loss in seen] == [run.loss[0], run.loss[10], run.loss[20]]
        assert len(run.loss) == 21
        assert run.config["outcome"] == "stopped"
        assert run.weights(1).shape == (30, 30)


FORK = """
import os, signal, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks with threads
import numpy as np
import dlnfast as dln
rng = np.random.default_rng(0)
problem = dln.Problem(rng.standard_normal((150, 150)), loss_scale=1e-3)
weights = dln.gaussian([150] * 4)
run = dln.train(problem, weights, learning_rate=0.1, steps=20, n_threads=2)
child = os.fork()
if child == 0:
    signal.alarm(30)
    again = dln.train(problem, weights, learning_rate=0.1, steps=20, n_threads=2)
    os._exit(0 if np.allclose(again.loss, run.loss, rtol=1e-10) else 3)
print(os.waitpid(child, 0)[1])
after = dln.train(problem, weights, learning_rate=0.1, steps=20, n_threads=2)
print(bool(np.array_equal(after.loss, run.loss)))
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this system")
def test_a_fork_after_use_does_not_hang(run_python):
    assert run_python(FORK).split() == ["0", "True"]
