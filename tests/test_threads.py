# SPDX-License-Identifier: MIT
"""Threads, signals and forks during long calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.core_calls import common_arguments, dense_arguments, family
from tolerances import tolerance

import dlnfast as dln
from dlnfast._support.dispatch import core as chosen_core

#: For programs with more threads at work than cores: waiting threads release their core.
PATIENT = {"OMP_WAIT_POLICY": "passive"}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


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


PROGRAM = """
import json
import numpy as np
import dlnfast as dln
from dlnfast._support.dispatch import core
problem = dln.low_rank_recovery(150, 3, seed=0)
weights = dln.orthogonal([150] * 3, scale=0.5, seed=1)
found = {"threads": core.max_threads()}
record = dln.Record(singular_values=2)
run = dln.train(problem, weights, learning_rate=0.1, steps=5, engine="dense", record=record)
found["loss"] = run.loss.tolist()
found["values"] = run.singular_values(1)[-1].tolist()
found["reduced"] = dln.train(problem, weights, learning_rate=0.1, steps=5).end_to_end().tolist()[0][:3]
found["gradient"] = float(np.abs(dln.gradients(problem, weights)[0]).sum())
completion = dln.low_rank_completion(60, 2, 0.5)
start = dln.gaussian([60] * 3, scale=0.5)
found["completion"] = dln.train(completion, start, learning_rate=0.1, steps=3).loss.tolist()
found["tracker"] = dln.SVDTracker(3).update(weights[0] + np.arange(150) / 1000).singular_values.tolist()
runs = dln.train_batch([problem] * 3, [weights] * 3, learning_rate=0.1, steps=3)
found["batch"] = [run.loss.tolist() for run in runs]
print(json.dumps(found))
"""


def computed(**environment):
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(finished.stdout)


@pytest.fixture(scope="module")
def expected_results():
    return computed(OMP_NUM_THREADS="2")


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": str(2**31)},
        {"OMP_NUM_THREADS": str(2**32)},
        {"OMP_NUM_THREADS": "3000000000"},
        {"OMP_NUM_THREADS": "100000"},
        {"OMP_NUM_THREADS": "0"},
        {"OMP_NUM_THREADS": "-4"},
        {"OMP_NUM_THREADS": "2,4"},
        {"OMP_NUM_THREADS": "4", "OMP_THREAD_LIMIT": "2"},
        {"OMP_NUM_THREADS": "4", "OMP_DYNAMIC": "true"},
    ],
    ids=lambda environment: " ".join(f"{name}={value}" for name, value in environment.items()),
)
def test_openmp_settings_do_not_change_the_results(environment, expected_results):
    found = computed(**environment)
    assert 1 <= found.pop("threads") <= 4096
    for name, value in found.items():
        np.testing.assert_allclose(value, expected_results[name], rtol=1e-9, atol=1e-12, err_msg=name)
    assert np.all(np.array(found["values"]) > 0.1)


def test_set_num_threads_sets_the_default():
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


def test_openmp_settings_limit_the_number_of_threads(run_python):
    if not chosen_core.build_info()["openmp"]:
        pytest.skip("built without OpenMP")
    program = "from dlnfast._support.dispatch import core; print(core.max_threads())"
    for n in (1, 3):
        assert int(run_python(program, OMP_NUM_THREADS=str(n))) == n


def test_threadpoolctl_limits_the_number_of_threads():
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
record = dln.Record(singular_values=None)
dln.train(problem, weights, learning_rate=0.1, steps=2, record=record, n_threads=int(sys.argv[1]))
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
@pytest.mark.parametrize(
    ("n_threads", "default", "variable", "started"),
    [(0, 0, "1", 0), (0, 0, "3", 2), (4, 0, "1", 3), (1, 0, "3", 0), (0, 2, "4", 1), (3, 2, "1", 2)],
)
def test_the_requested_number_of_threads_is_used(run_python, n_threads, default, variable, started):
    """The argument overrides the default, which overrides OMP_NUM_THREADS; the caller is one of them."""
    if not chosen_core.build_info()["openmp"]:
        pytest.skip("built without OpenMP")
    how = ("default", default) if default else ("environment", 0)
    printed = run_python(TEAM, n_threads, *how, OMP_NUM_THREADS=variable, OPENBLAS_NUM_THREADS="1")
    assert int(printed) == started


def long_dense_run():
    problem, weights = dense_problem([200] * 4)
    return dln.train(
        problem,
        weights,
        learning_rate=1e-3,
        steps=300,
        record=dln.Record(singular_values=None, every=300),
        n_threads=1,
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
    # If the GIL were held, this thread would have run a few times at most.
    assert turns > 20


def test_two_threads_can_train_at_the_same_time():
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


class Product:
    """The operator A B, whose products run in Python."""

    def __init__(self, A, B):
        self.A, self.B = A, B
        self.shape, self.dtype = (A.shape[0], B.shape[1]), A.dtype

    def matmat(self, X):
        return self.A @ (self.B @ X)

    def rmatmat(self, Y):
        return self.B.T @ (self.A.T @ Y)


def kinds_of_calls():
    """Return {name: call}; a call returns arrays. Calls share problems, which cache derived data."""
    rng = np.random.default_rng(1)
    problem, weights = dense_problem([60, 60, 60, 5])
    recovery, orthogonal = dln.low_rank_recovery(30, 3), dln.orthogonal([30] * 4)
    completion = dln.low_rank_completion(40, 2, observed=0.4)
    sensing = dln.low_rank_sensing(12, 1, 80)
    matrix, step = rng.standard_normal((150, 200)), rng.standard_normal((150, 200))
    left, right = rng.standard_normal((300, 6)), rng.standard_normal((6, 200))

    def train(problem, weights, **settings):
        run = dln.train(problem, weights, **settings)
        return [run.loss, run.singular_values(1), *run.all_weights()]

    def dense(dtype, n_threads):
        return lambda: train(
            problem,
            [w.astype(dtype) for w in weights],
            learning_rate=0.5,
            momentum=0.3,
            steps=20,
            engine="dense",
            n_threads=n_threads,
        )

    def batch():
        rates = [0.5, 0.7, 0.9, 1.1, 1.3]
        runs = dln.train_batch(
            recovery, orthogonal, learning_rate=rates, steps=60, weight_decay=1e-3, n_threads=2
        )
        return [runs.loss, *(run.singular_values(1) for run in runs)]

    def track(matrices, **arguments):
        tracker = dln.SVDTracker(k=4, n_threads=1)
        records = [tracker.update(W, **arguments) for W in matrices]
        return [part for r in records for part in (r.singular_values, r.errors, r.branches)]

    def listen():
        heard = []
        run = dln.train(
            problem,
            weights,
            learning_rate=0.5,
            steps=20,
            record=dln.Record(every=2, callback=lambda step, loss: heard.append(loss)),
            engine="dense",
            n_threads=1,
        )
        return [run.loss, np.array(heard)]

    return {
        "float64": dense(np.float64, 1),
        "float32, two threads": dense(np.float32, 2),
        "reduced": lambda: train(recovery, orthogonal, learning_rate=1.0, steps=100, weight_decay=1e-3),
        "batch": batch,
        "completion": lambda: train(
            completion, dln.gaussian([40] * 3, scale=0.5), learning_rate=1.0, steps=20, n_threads=2
        ),
        "sensing": lambda: train(
            sensing, dln.gaussian([12] * 3, scale=0.5), learning_rate=1e-3, steps=20, n_threads=1
        ),
        "tracker": lambda: track([matrix + 1e-3 * i * step for i in range(4)]),
        "tracker of an operator": lambda: track([Product(left * (1 + 0.01 * i), right) for i in range(3)]),
        "callback": listen,
    }


@pytest.fixture(scope="module")
def results_alone():
    return {name: call() for name, call in kinds_of_calls().items()}


@pytest.mark.parametrize("n", [2, 4, 8])
def test_calls_from_many_threads_give_the_same_bits(n, results_alone):
    """Every thread makes all calls, each in another order, on new problems."""
    calls = kinds_of_calls()
    names = list(calls)
    begin = threading.Barrier(n)

    def work(i):
        begin.wait(timeout=60)
        return {name: calls[name]() for name in names[i:] + names[:i]}

    with ThreadPoolExecutor(n) as pool:
        found = list(pool.map(work, range(n)))
    for of_thread in found:
        for name, alone in results_alone.items():
            assert len(of_thread[name]) == len(alone)
            for one, other in zip(of_thread[name], alone, strict=True):
                np.testing.assert_array_equal(one, other, err_msg=name)


INTERRUPTED = """
import os, signal, threading, time, sys
import numpy as np
import dlnfast as dln
rng = np.random.default_rng(0)
case = sys.argv[1]
if case == "reduced":
    args = dln.low_rank_recovery(30, 3), dln.orthogonal([30] * 4)
    kwargs = dict(learning_rate=1e-6, steps=10**9, record=dln.Record(every=10**7))
else:
    d = 1500
    args = dln.Problem(rng.standard_normal((d, d)), loss_scale=1e-6), [
        rng.standard_normal((d, d)) / d**0.5 for _ in range(2)]
    values = "all" if case == "singular values" else None
    kwargs = dict(learning_rate=1e-3, steps=1000, engine="dense", record=dln.Record(singular_values=values))
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
    trajectory = getattr(error, "trajectory", None)
    finite = trajectory is None or bool(np.isfinite(trajectory.loss).all())
    again = dln.train(dln.low_rank_recovery(12, 2), dln.orthogonal([12] * 3), learning_rate=1.0, steps=5)
    print(late, trajectory is not None, finite, len(again.loss))
"""


def longest_silence(call):
    """Return the longest computing time, in seconds of this thread, between two polls for interrupts."""
    times = [time.thread_time()]
    call(lambda step, loss: times.append(time.thread_time()))
    return float(np.max(np.diff([*times, time.thread_time()])))


def test_large_products_poll_for_interrupts(core):
    """Whatever the level, on one thread: a product of 1.6e10 flops is 0.8 s of a core without AVX."""
    dim = 2000
    weights = [np.eye(dim) for _ in range(2)]
    arguments = dense_arguments(steps=1) | {
        "target": np.eye(dim),
        "snapshot_every": 0,
        "values": [],
        "left": [],
        "right": [],
        "snapshots": [],
    }
    assert longest_silence(lambda hear: core.dense_descent(weights, arguments | {"on_progress": hear})) < 0.5


def test_deep_reduced_runs_poll_for_interrupts(core):
    """Four hundred cores of the largest fixed size: 8e7 flops a step."""
    n_layers, size, steps = 400, 32, 300
    cores = [0.9 * np.eye(size) for _ in range(n_layers)]
    arguments = common_arguments(steps=steps, n_layers=n_layers) | {
        "target": np.eye(size),
        "record_every": steps,
        "families": [family(multiplicity=1.0, rho=[0.5] * n_layers)],
        "scalars": None,
        "core_records": [np.zeros((2, size, size)) for _ in cores],
        "rho_records": np.zeros((2, n_layers)),
    }
    assert longest_silence(lambda hear: core.reduced_descent(cores, arguments | {"on_progress": hear})) < 0.5


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("case", ["reduced", "dense", "singular values"])
def test_ctrl_c_stops_a_run_within_half_a_second(run_python, case):
    late, has_trajectory, finite, again = run_python(INTERRUPTED, case).split()
    assert float(late) < 0.5
    # Before the first decomposition is done there is no record yet.
    assert has_trajectory == "True" or case == "singular values"
    assert (finite, again) == ("True", "6")


INTERRUPTED_BESIDE_WORKERS = """
import os, signal, threading, time
from dataclasses import replace
import numpy as np
import dlnfast as dln
rng = np.random.default_rng(0)
problem = dln.Problem(rng.standard_normal((80, 80)), loss_scale=1e-3)
weights = dln.gaussian([80] * 3)
record = dln.Record(every=5, singular_values=None)
settings = dict(learning_rate=0.1, engine="dense", n_threads=1)
alone = dln.train(problem, weights, steps=200, record=record, **settings).loss
caught, runs = threading.Event(), [None, None]
main = time.pthread_getcpuclockid(threading.get_ident())
def work(i):
    # At its record of step 100, whatever that takes: it is at work when Ctrl-C comes.
    wait = replace(record, callback=lambda step, loss: step == 100 and caught.wait(100) and None)
    runs[i] = dln.train(problem, weights, steps=200, record=wait, **settings).loss
def interrupt():
    global sent
    time.sleep(0.5)
    sent = time.clock_gettime(main)
    os.kill(os.getpid(), signal.SIGINT)
workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
for thread in [*workers, threading.Thread(target=interrupt)]:
    thread.start()
try:
    dln.train(problem, weights, steps=10**9, record=replace(record, every=10**8), **settings)
    print("was not interrupted")
except KeyboardInterrupt:
    late = time.clock_gettime(main) - sent
    at_work = all(thread.is_alive() for thread in workers)
    caught.set()
    for thread in workers:
        thread.join()
    print(late, at_work, all(np.array_equal(loss, alone) for loss in runs))
"""


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no clocks of single threads")
def test_ctrl_c_stops_the_run_of_the_main_thread_only(run_python):
    """Measured in computing time of the main thread: it has to share the cores."""
    late, at_work, as_alone = run_python(INTERRUPTED_BESIDE_WORKERS, timeout=120).split()
    assert float(late) < 0.5
    assert (at_work, as_alone) == ("True", "True")


def test_an_exception_of_a_callback_carries_the_trajectory():
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
                record=dln.Record(every=10, callback=callback),
                engine=engine,
            )
        partial = caught.value.trajectory
        assert partial.steps.tolist() == [0, 10, 20, 30]
        assert len(partial.loss) == 31


def test_a_callback_may_stop_a_run():
    problem, weights = dln.low_rank_recovery(30, 3), dln.orthogonal([30] * 4)
    seen = []

    def callback(step, loss):
        seen.append((step, loss))
        return step >= 20

    for engine in ("reduced", "dense"):
        seen.clear()
        run = dln.train(
            problem,
            weights,
            learning_rate=1.0,
            steps=100,
            record=dln.Record(every=10, callback=callback),
            engine=engine,
        )
        assert [step for step, _ in seen] == [0, 10, 20]
        assert [loss for _, loss in seen] == [run.loss[0], run.loss[10], run.loss[20]]
        assert len(run.loss) == 21
        assert run.outcome == "stopped"
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


@needs_fork
def test_a_fork_after_use_does_not_hang(run_python):
    assert run_python(FORK).split() == ["0", "True"]


FORKS = """
import multiprocessing, os, signal, sys, threading, warnings
from concurrent.futures import ProcessPoolExecutor
warnings.simplefilter("ignore", DeprecationWarning)
import numpy as np
import dlnfast as dln
rng = np.random.default_rng(0)
problem = dln.Problem(rng.standard_normal((100, 100)), loss_scale=1e-3)
weights = dln.gaussian([100] * 3)

def run(n_threads=2, steps=20, **settings):
    return dln.train(problem, weights, learning_rate=0.1, steps=steps, engine="dense", n_threads=n_threads,
                     record=dln.Record(singular_values=2, **settings)).loss

alone = run(1)

def right():
    tracked = dln.SVDTracker(k=2).update(weights[0]).singular_values
    exact = np.linalg.svd(weights[0], compute_uv=False)[:2]
    # On one thread, whatever was asked for.
    return bool(np.array_equal(run(), alone) and np.allclose(tracked, exact, rtol=1e-6))

def status(body):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs is killed, and the signal is its exit status
        os._exit(0 if body() else 3)
    return os.waitpid(child, 0)[1]

run()  # the parent is warm
stop, agreements = threading.Event(), []
def train_on():
    while not stop.is_set():
        agreements.append(np.allclose(run(), alone, rtol=1e-10))
trainer = threading.Thread(target=train_on)
trainer.start()
found = [status(right) for _ in range(3)]  # while another thread trains
forker = threading.Thread(target=lambda: found.append(status(right)))  # and from a thread
forker.start()
forker.join()
found.append(status(lambda: status(right) == 0))  # a fork of a fork
context = multiprocessing.get_context("fork")
process = context.Process(target=lambda: signal.alarm(60) or sys.exit(0 if right() else 3))
process.start()
process.join()
found.append(process.exitcode)
with ProcessPoolExecutor(2, mp_context=context, initializer=signal.alarm, initargs=(60,)) as pool:
    found += [0 if f.result(60) else 3 for f in [pool.submit(right) for _ in range(2)]]
stop.set()
trainer.join()
print(found, all(agreements))

parent = os.getpid()
def fork_within(step, loss):
    if step == 10 and os.getpid() == parent:
        child = os.fork()
        if child == 0:
            signal.alarm(60)
        else:
            print(os.waitpid(child, 0)[1])
loss = run(callback=fork_within, every=5)
if os.getpid() != parent:
    os._exit(0 if np.allclose(loss, alone, rtol=1e-10) else 3)
print(bool(np.allclose(loss, alone, rtol=1e-10)))
"""


@needs_fork
def test_forks_during_runs_do_not_hang(run_python):
    """NumPy on one thread: a fork while OpenBLAS's threads multiply hangs without dlnfast too."""
    first, within, after = run_python(FORKS, timeout=120, OPENBLAS_NUM_THREADS="1", **PATIENT).splitlines()
    assert first == f"{[0] * 8} True"
    assert (within, after) == ("0", "True")


WORKER = """
import numpy as np
import dlnfast as dln

def run(n_threads):
    rng = np.random.default_rng(0)
    problem = dln.Problem(rng.standard_normal((60, 60)), loss_scale=1e-3)
    weights = dln.gaussian([60] * 3)
    return dln.train(problem, weights, learning_rate=0.1, steps=20, engine="dense", n_threads=n_threads)

def loss(n_threads):
    return run(n_threads).loss
"""

STARTED_AFRESH = """
import multiprocessing, sys, threading
from concurrent.futures import ProcessPoolExecutor
sys.path.insert(0, sys.argv[2])
import numpy as np
import worker

if __name__ == "__main__":
    alone = worker.loss(2)
    context = multiprocessing.get_context(sys.argv[1])
    stop = threading.Event()
    def train_on():
        while not stop.is_set():
            worker.loss(2)
    trainer = threading.Thread(target=train_on)
    trainer.start()
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        for n_threads in (1, 2):
            print(np.array_equal(pool.submit(worker.loss, n_threads).result(100), worker.loss(n_threads)))
    stop.set()
    trainer.join()
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_spawned_processes_have_all_threads_and_the_same_bits(run_python, tmp_path, method):
    """They use all threads and give the same bits as the parent, which trains at the same time."""
    if method == "forkserver" and not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    (tmp_path / "worker.py").write_text(WORKER)
    assert run_python(STARTED_AFRESH, method, tmp_path, timeout=120, **PATIENT).split() == ["True", "True"]


NUMPY_BESIDE = """
import threading
import numpy as np
import dlnfast as dln
rng = np.random.default_rng(0)
problem = dln.Problem(rng.standard_normal((100, 100)), loss_scale=1e-3)
weights = dln.gaussian([100] * 3)
A = rng.standard_normal((200, 200))

def run():
    found = dln.train(problem, weights, learning_rate=0.1, steps=20, n_threads=2)
    return [found.loss, *found.all_weights()]

def same(one, other):
    return all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))

alone, square = run(), A @ A
stop, products = threading.Event(), []
def multiply():
    while not stop.is_set():
        products.append(np.array_equal(A @ A, square))
threads = [threading.Thread(target=multiply) for _ in range(2)]
for thread in threads:
    thread.start()
runs = [same(run(), alone) for _ in range(2)]
stop.set()
for thread in threads:
    thread.join()
within = []
dln.train(problem, weights, learning_rate=0.1, steps=20, n_threads=2,
          record=dln.Record(every=2, callback=lambda *_: within.append(np.array_equal(A @ A, square))))
print(all(runs), len(products) > 0 and all(products), len(within) == 11 and all(within))
"""


def test_numpy_multiplies_during_runs(run_python):
    assert run_python(NUMPY_BESIDE, timeout=120, OPENBLAS_NUM_THREADS="2", **PATIENT).split() == ["True"] * 3


TORCH_BESIDE = """
import os, signal, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)
if sys.argv[1] == "torch":
    import torch
import numpy as np
import dlnfast as dln
import torch
torch.set_num_threads(2)
rng = np.random.default_rng(0)
problem = dln.Problem(rng.standard_normal((100, 100)), loss_scale=1e-3)
weights = dln.gaussian([100] * 3)
A = torch.from_numpy(rng.standard_normal((200, 200)))

def run(**settings):
    found = dln.train(problem, weights, **dict(learning_rate=0.1, steps=20, n_threads=2) | settings)
    return [found.loss, *found.all_weights()]

def same(one, other):
    return all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))

def gradient():
    W = A.clone().requires_grad_()
    (W @ W).tanh().sum().backward()
    return W.grad

before = run()  # before PyTorch's pool starts
wanted = gradient()
print(same(run(), before))  # after it did

stop, gradients = threading.Event(), []
def differentiate():
    while not stop.is_set():
        gradients.append(torch.equal(gradient(), wanted))
thread = threading.Thread(target=differentiate)
thread.start()
print(all(same(run(), before) for _ in range(2)))  # beside it
stop.set()
thread.join()
print(len(gradients) > 0 and all(gradients))

within = []
run(record=dln.Record(every=5, callback=lambda *_: within.append(torch.equal(gradient(), wanted))))
W = A.clone().requires_grad_()
W.register_hook(lambda grad: within.append(same(run(), before)))  # and training within its backward
(W @ W).tanh().sum().backward()
print(within == [True] * 6)
print(torch.get_num_threads() == 2)

if hasattr(os, "fork"):
    nothing = dln.Record(singular_values=None)
    reference = run(engine="torch", record=nothing)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        good = np.allclose(run()[0], before[0], rtol=1e-10)
        for n_threads in (0, 2):
            again = run(engine="torch", record=nothing, n_threads=n_threads)
            good = good and np.allclose(again[0], reference[0], rtol=1e-10)
        os._exit(0 if good else 3)
    print(os.waitpid(child, 0)[1] == 0)
else:
    print(True)
"""


@pytest.mark.parametrize("first", ["torch", "dlnfast"])
def test_torch_runs_before_and_during_runs(run_python, first):
    """In both orders of import, and after a fork, which breaks PyTorch's pool."""
    pytest.importorskip("torch", reason="PyTorch's pool beside ours")
    assert run_python(TORCH_BESIDE, first, timeout=120, **PATIENT).split() == ["True"] * 6


def test_free_threading_is_not_declared():
    """Free threading is not tested, so an interpreter without the GIL has to enable it on import."""
    for source in (Path(__file__).parents[1] / "cpp" / "bindings").glob("*.cpp"):
        assert "mod_gil_not_used" not in source.read_text(encoding="utf-8")
