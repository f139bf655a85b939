# SPDX-License-Identifier: MIT
"""Every public function with unusual arguments gives a typed error or a finite result.

helpers/public_calls.py has a valid call of each function; every example replaces one or two of its
arguments by a value of another type, shape, precision or memory layout, or by an empty, infinite or huge one.
"""

from __future__ import annotations

import dataclasses
import decimal
import fractions
import inspect
import linecache
import os
import signal
import threading
import types
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from helpers.executors import InlineExecutor
from helpers.public_calls import CALLS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dlnfast as dln
from dlnfast._weights.implicit import ImplicitWeights

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")

PACKAGE = str(Path(dln.__file__).parent)
#: Errors that are allowed. DivergedError and FileNotFoundError report a failure, not a bad argument.
TYPED = (TypeError, ValueError, MemoryError, OverflowError, OSError, dln.DivergedError)
#: Errors that indicate a bug in the package.
MISTAKES = (AttributeError, IndexError, KeyError, ZeroDivisionError, AssertionError, RecursionError)

# ------------------------------------------------------------------------------------------ unusual arguments


class Subclass(np.ndarray):
    """A subclass of ndarray."""


SCALARS = [
    None, "text", "auto", "", b"bytes", object(), {}, {1, 2}, [], (), [1, [2, 3]], [[1.0], [2.0, 3.0]],
    True, False, 3 + 4j, range(3), len, slice(2), Ellipsis, NotImplemented, np.nan, np.inf, -np.inf, 1e308,
    -1e308, 5e-324, -1, 0, 1, 2, 7, 2**40, 2**63, 2**100, -(2**63), 0.5, -0.5, 1.0, 3.7, "3", "nan",
    fractions.Fraction(1, 3), decimal.Decimal("0.1"), np.int8(3), np.uint64(2**63), np.float16(0.5),
    np.longdouble(0.5), np.datetime64("2020-01-01"), np.bool_(True), np.str_("x"), np.array(3),
    np.array(0.5), np.array(None), np.zeros(0), np.zeros((0, 3)), np.zeros((2, 2, 2)), np.ones(3),
    np.ones(3, dtype=np.int8), [0.1, 0.2, 0.3], [np.nan] * 3, ["a", "b", "c"], [None] * 3,
    memoryview(b"abc"), Path("nowhere"), ValueError, np.array([1, 2], dtype=object),
    np.array([(1, 2.0)], dtype="i4,f8"), np.zeros(3, dtype="M8[s]"),
]  # fmt: skip

CHANGES = {
    "complex": lambda a: a + 1j,
    "objects": lambda a: a.astype(object),
    "booleans": lambda a: a > 0,
    "int8": lambda a: a.astype(np.int8),
    "uint64": lambda a: np.abs(a).astype(np.uint64),
    "float16": lambda a: a.astype(np.float16),
    "float32": lambda a: a.astype(np.float32),
    "longdouble": lambda a: a.astype(np.longdouble),
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "read-only": lambda a: _read_only(a),
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "backwards": lambda a: a[::-1],
    "Fortran": lambda a: np.asfortranarray(a),
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "transposed": lambda a: a.T,
    "misaligned": lambda a: _misaligned(a),
    "one axis more": lambda a: a[np.newaxis],
    "one axis less": lambda a: a.reshape(-1),
    "no rows": lambda a: a[:0],
    "no columns": lambda a: a[..., :0],
    "one row less": lambda a: a[1:],
    "one column less": lambda a: a[..., 1:],
    "NaN": lambda a: _with(a, np.nan),
    "infinity": lambda a: _with(a, np.inf),
    "huge": lambda a: a * 1e300,
    "tiny": lambda a: a * 1e-310,
    "zeros": lambda a: a * 0,
    "negative": lambda a: -a,
    "masked": lambda a: np.ma.masked_greater(a, 0),
    "matrix": lambda a: a.view(np.matrix) if a.ndim == 2 else a,
    "subclass": lambda a: a.view(Subclass),
    "lists": lambda a: a.tolist(),
    "text": lambda a: a.astype(str),
    "generator": lambda a: (x for x in a),
    "bytes": lambda a: a.tobytes(),
}
LISTS = {
    "first missing": lambda x: x[1:],
    "last missing": lambda x: x[:-1],
    "twice": lambda x: [*x, *x],
    "none": lambda x: [],
    "nested": lambda x: [x],
    "tuple": tuple,
    "generator": lambda x: (item for item in x),
    "with None": lambda x: [*x[:-1], None],
    "with text": lambda x: [*x[:-1], "text"],
    "with NaN": lambda x: [*x[:-1], np.nan],
    "with huge": lambda x: [*x[:-1], 2**63],
    "with zero": lambda x: [*x[:-1], 0],
    "negative": lambda x: [*x[:-1], -3],
    "reversed": lambda x: list(reversed(x)),
    "dictionary": lambda x: dict(enumerate(x)),
}


def _read_only(a):
    a = a.copy()
    a.setflags(write=False)
    return a


def _misaligned(a):
    raw = np.zeros(a.nbytes + 1, dtype=np.uint8)
    result = raw[1:].view(a.dtype).reshape(a.shape) if a.size else a
    result[...] = a
    return result


def _with(a, value):
    a = np.array(a, dtype=np.float64)
    if a.size:
        a.flat[a.size // 2] = value
    return a


def unusual_values(value):
    """Return {name: a value to replace this one by}."""
    found = {f"scalar {i} ({type(x).__name__})": (lambda x=x: x) for i, x in enumerate(SCALARS)}
    if isinstance(value, InlineExecutor):
        del found["scalar 0 (NoneType)"]
    if isinstance(value, np.ndarray):
        found |= {name: (lambda change=change: change(value)) for name, change in CHANGES.items()}
    if isinstance(value, (list, tuple)) and len(value):
        items = list(value)
        found |= {name: (lambda change=change: change(items)) for name, change in LISTS.items()}
        if isinstance(items[0], np.ndarray):
            for name, change in CHANGES.items():
                found[f"first {name}"] = lambda change=change: [change(items[0]), *items[1:]]
            found["all float32"] = lambda: [x.astype(np.float32) for x in items]
            found["stacked"] = lambda: np.stack(items) if len({x.shape for x in items}) == 1 else items
    return found


#: Results that may hold NaN or infinity, and why.
MAY_BE_INFINITE = {
    "Problem.loss": "that of a W whose squares overflow",
    "measures.balancedness": "that of layers whose squares overflow",
    "TrackerRecord.branch": "a branch that is gone is NaN",
    "SVDTracker": "gaps of the last value, and angles without a reference, are not known",
    "SVDTracker.update": "as above",
    "SVDTracker.update_low_rank": "as above",
    "Trajectory.branch_values": "a branch that was not there yet is NaN",
    "Trajectory.tracking": "as SVDTracker",
    "theory.stability_threshold": "nothing oscillates where there is nothing to learn",
    "theory.aligned_modes": "its modes may diverge",
    "theory.plateau_bounds": "a plateau of layers of zeros never ends",
    "theory.default_learning_rate": "as stability_threshold",
    "MatrixCompletion.score": "R^2 has no lower bound",
    "measures.feature_discrimination": "classes of which some have no mean to compare",
}


def is_finite(result, depth=0):
    """Return whether all numbers in a result are finite."""
    if isinstance(result, (float, np.floating)):
        return bool(np.isfinite(result))
    if isinstance(result, np.ndarray):
        return result.dtype.kind not in "fc" or bool(np.isfinite(result).all())
    if isinstance(result, dln.Trajectory):
        return is_finite(result.loss) and (not len(result.steps) or is_finite(recorded_values(result)))
    if depth > 3 or isinstance(result, (str, bytes, type, types.FunctionType, types.MethodType)):
        return True
    if isinstance(result, dln.Batch):
        # The loss of a run that diverged is infinite; its trajectory ends before.
        return all(is_finite(result[i]) for i, end in enumerate(result.outcomes) if end != "diverged")
    if isinstance(result, Mapping):
        return all(is_finite(item, depth + 1) for item in result.values())
    if isinstance(result, (list, tuple)):
        return all(is_finite(item, depth + 1) for item in result)
    if dataclasses.is_dataclass(result):
        names = [field.name for field in dataclasses.fields(result)]
        return all(is_finite(getattr(result, name), depth + 1) for name in names)
    return True


def recorded_values(trajectory):
    try:
        return [trajectory.singular_values(layer) for layer in range(1, trajectory.n_layers + 1)]
    except ValueError:  # none were requested
        return []


def largest(arguments):
    """Return the size of the largest number among some arguments."""
    sizes = [0.0]
    for value in arguments.values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            try:
                sizes.append(
                    float(np.max(np.nan_to_num(np.abs(np.asarray(item, dtype=np.float64)), posinf=np.inf)))
                )
            except (TypeError, ValueError, OverflowError):
                continue
    return max(sizes)


class TooLongError(Exception):
    pass


@contextmanager
def time_limit(seconds):
    """Interrupt a call that takes too long; in the main thread, which receives signals."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def raise_too_long(number, at):
        raise TooLongError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, raise_too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def find_problem(name, call, arguments):
    """Make the call; return a description of an invalid result or error, else None."""
    try:
        with time_limit(10), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            warnings.simplefilter("ignore", dln.CopyWarning)
            result = call(**arguments)
    except MISTAKES as error:
        if isinstance(error, TYPED):  # NotFittedError is an AttributeError too
            return None
        return f"{type(error).__name__}: {error}"
    except TYPED as error:
        return None if is_raised_on_purpose(error) else f"raw {type(error).__name__}: {error}"
    except ModuleNotFoundError:
        return None  # an extra that is not installed
    except RuntimeWarning as warning:  # of NumPy; numbers beyond 1e154 have squares that overflow
        return None if "overflow" in str(warning) and largest(arguments) > 1e150 else f"warning: {warning}"
    except (Exception, TooLongError) as error:
        return f"{type(error).__name__}: {error}"
    if name not in MAY_BE_INFINITE and not is_finite(result):
        return "a result that is not finite"
    return None


def is_raised_on_purpose(error):
    """Return whether a `raise` statement of the package raised the error, or the system for a file."""
    if isinstance(error, (OSError, MemoryError)):
        return True
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    code, line = trace.tb_frame.f_code, trace.tb_lineno
    if not code.co_filename.startswith(PACKAGE):
        return False
    source = linecache.getline(code.co_filename, line).strip()
    # Errors raised by the core, or by a callback of the user, count as well.
    return source.startswith("raise") or any(
        part in source for part in ("core.", "_tracker.", "return function(state)")
    )


# -------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", CALLS)
def test_the_valid_calls_succeed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, arguments = CALLS[name]()
    if "nowhere" in str(arguments):
        return  # it is about a missing folder
    try:
        call(**arguments)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@settings(
    max_examples=int(os.environ.get("DLNFAST_FUZZ_EXAMPLES", "1500")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_unusual_arguments_raise_an_error_that_names_them_or_give_a_finite_result(data, tmp_path_factory):
    name = data.draw(st.sampled_from(sorted(CALLS)), label="function")
    before = Path.cwd()
    os.chdir(tmp_path_factory.getbasetemp())
    try:
        call, arguments = CALLS[name]()
        count = data.draw(st.integers(1, min(2, len(arguments))), label="count")
        keys = st.lists(st.sampled_from(sorted(arguments)), min_size=count, max_size=count, unique=True)
        for key in data.draw(keys, label="arguments"):
            odd = unusual_values(arguments[key])
            choice = data.draw(st.sampled_from(sorted(odd)), label="oddity")
            try:
                replaced = odd[choice]()
            except (TypeError, ValueError, RuntimeWarning):  # not every array has this form
                continue
            # So many steps are valid: the run lasts until Ctrl-C.
            takes_time = replaced is None or isinstance(replaced, int)
            if (name, key) != ("train_compressed", "steps") or not takes_time:
                arguments[key] = replaced
        assert find_problem(name, call, arguments) is None
    finally:
        os.chdir(before)


#: Public names without a call, and the reason.
NOT_CALLED = {
    "reference": "formulas as they stand in the papers, for those who compare with them: they check nothing",
    "figures": "see test_figures.py",
    "torch": "see the tests of its modules",
}
HOLDERS = {  # made by the package, not by its users
    "Batch", "Certificate", "Closure", "CompressedNetwork", "Family", "ImplicitWeights", "Ratings",
    "SweepResults", "TrackerRecord", "Trajectory", "theory.NeuralTangentKernel",
}  # fmt: skip
OTHERS = {
    "AssumptionError", "CopyWarning", "DivergedError", "FolderInUseError", "ShapeError",  # errors
    "build_info", "set_num_threads",  # see test_threads.py
    # Of what other methods return, or for the modules of the package.
    "ImplicitWeights.basis", "ImplicitWeights.close", "ImplicitWeights.is_determined_by", "LowRank.astype",
    "Problem.engine_arguments", "Problem.rank_exceeds", "Problem.dense_target",
    "Completion.engine_arguments", "Completion.entries",
    "Completion.from_arrays", "Completion.replaced", "Completion.target_values", "Sensing.engine_arguments",
    "Sensing.from_arrays", "Sensing.target_values", "SVDTracker.from_state_dict", "Certificate.from_dict",
    "Trajectory.from_arrays", "Trajectory.to_arrays", "MatrixCompletion.get_params", "Checkpoint.of",
    "SampleProblem.from_arrays",
    "Trajectory.biases",  # of runs that need PyTorch: test_torch_samples.py
    "Trajectory.block_angles",  # of tracked models: test_torch_track.py
    "MatrixCompletion.set_params", "optimizers.Optimizer",  # the base class of the rules
    "optimizers.GradientDescent",  # has no settings
    "CallbackState", "CallbackState.singular_values", "TrainKernel",  # results
}  # fmt: skip


def public_names():
    """Yield the names of all that users call with arguments."""
    for name in dln.__all__:
        if name in NOT_CALLED:
            continue
        thing = getattr(dln, name)
        if isinstance(thing, types.ModuleType):
            for inner in thing.__all__:
                if name != "plots" or not inspect.isclass(getattr(thing, inner)):  # see test_plots.py
                    found = getattr(thing, inner)
                    if not callable(found) or (inspect.isclass(found) and issubclass(found, tuple)):
                        continue
                    if f"{name}.{inner}" not in HOLDERS:
                        yield f"{name}.{inner}"
                    if inspect.isclass(found):
                        yield from methods(f"{name}.{inner}", found)
            continue
        if name.startswith("__"):
            continue
        if name not in HOLDERS:
            yield name
        if inspect.isclass(thing) and not issubclass(thing, (Exception, Warning)):
            yield from methods(name, thing)
    yield from methods("ImplicitWeights", ImplicitWeights)


def methods(name, thing):
    for inner, call in inspect.getmembers(thing, callable):
        if inner.startswith("_") or inner in ("index", "count"):
            continue
        if set(inspect.signature(call).parameters) - {"self"}:
            yield f"{name}.{inner}"


def test_every_public_function_has_a_valid_call():
    names = set(public_names())
    assert names - set(CALLS) - OTHERS == set()
    assert {name.partition(",")[0] for name in CALLS} - names == set()
    assert OTHERS - names == set()
