# SPDX-License-Identifier: MIT
"""Any argument gives a correct result or a typed error that names the argument."""

from __future__ import annotations

import contextlib
import decimal
import fractions
import pickle
import warnings

import numpy as np
import pytest
from helpers.matrices import draw_matrix, entry_setter
from helpers.optional_packages import import_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast._support import arrays as _arrays

F64 = np.float64
DIM = 6
ENGINES = ["auto", "reduced", "dense"]


def make_problem_of_dim(**options):
    return dln.Problem(draw_matrix(0, DIM, DIM, [1.5, 1.0]), **options)


def make_weights_of_dim(**options):
    return dln.orthogonal([DIM] * 4, 0.7, seed=1, **options)


def train_small(problem=None, weights=None, **options):
    return dln.train(
        make_problem_of_dim() if problem is None else problem,
        make_weights_of_dim() if weights is None else weights,
        **{"learning_rate": 0.05, "steps": 5} | options,
    )


def option(name, value):
    """Return the keyword that gives one option, of the run or of its records."""
    return {"record": dln.Record(**{name: value})} if hasattr(dln.Record, name) else {name: value}


def assert_no_nan(run):
    assert np.isfinite(run.loss).all()
    for layer in range(1, run.n_layers + 1):
        assert np.isfinite(run.weights(layer)).all()
        assert np.isfinite(run.singular_values(layer)).all()
        if run.engine == "reduced" and run.multiplicity(layer):
            assert np.isfinite(run.rho(layer)).all()


# Weights.


def test_an_error_names_the_whitening_that_reduced_the_inputs():
    X = np.vstack([np.random.default_rng(0).standard_normal((4, 50)), np.zeros((2, 50))])
    problem = dln.Problem.from_data(X, np.arange(50) % 3, whiten="zca")
    with pytest.raises(dln.ShapeError, match=r"wanted 4 columns, .*whitening reduced 6 dimensions to 4"):
        dln.train(problem, dln.orthogonal([6, 6, 3]), learning_rate=1.0, steps=1)


def test_tensors_that_require_grad_are_read():
    torch = import_torch()
    weights = [torch.from_numpy(w) for w in make_weights_of_dim()]
    wanted = train_small(weights=weights).loss
    for made in (
        [torch.nn.Parameter(w) for w in weights],
        [torch.nn.Parameter(w) * 1 for w in weights],
        [torch.nn.Parameter(w).detach() for w in weights],
    ):
        np.testing.assert_array_equal(train_small(weights=made).loss, wanted)
    problem = dln.Problem.from_data(torch.eye(3, requires_grad=True), np.eye(3))
    np.testing.assert_array_equal(problem.target, np.eye(3))


def with_layer(index, replacement):
    weights = make_weights_of_dim()
    weights[index] = replacement(weights[index]) if callable(replacement) else replacement
    return weights


BAD_WEIGHTS = {
    "no list": (None, TypeError, "weights is NoneType"),
    "a number": (3.0, TypeError, "weights is float"),
    "one matrix": (np.eye(DIM), dln.ShapeError, "weights is one matrix"),
    "no layers": ([], dln.ShapeError, "weights is empty"),
    "a string": ("abc", TypeError, r"weights\[0\] \(W_1\)"),
    "a dictionary": ({"W": np.eye(DIM)}, TypeError, r"weights\[0\] \(W_1\)"),
    "numbers": ([1.0, 2.0], dln.ShapeError, r"weights\[0\] \(W_1\) has shape \(\)"),
    "a vector": (with_layer(1, np.ones(DIM)), dln.ShapeError, r"weights\[1\] \(W_2\) has shape \(6,\)"),
    "three axes": (with_layer(1, np.ones((1, DIM, DIM))), dln.ShapeError, r"weights\[1\] \(W_2\)"),
    "empty": (with_layer(2, np.empty((DIM, 0))), dln.ShapeError, r"weights\[2\] \(W_3\) is empty"),
    "no rows": (with_layer(2, np.empty((0, DIM))), dln.ShapeError, r"weights\[2\] \(W_3\) is empty"),
    "ragged": (
        with_layer(0, [[1.0, 2.0], [3.0]]),
        dln.ShapeError,
        r"weights\[0\] \(W_1\) is not a rectangular",
    ),
    "wrong input width": (
        with_layer(0, np.ones((DIM, 5))),
        dln.ShapeError,
        r"weights\[0\] \(W_1\).*6 columns, problem.dim_in",
    ),
    "wrong inner width": (
        with_layer(1, np.ones((DIM, 5))),
        dln.ShapeError,
        r"weights\[1\] \(W_2\).*6 columns, the rows of weights\[0\]",
    ),
    "wrong output width": (
        with_layer(2, np.ones((5, DIM))),
        dln.ShapeError,
        r"weights\[2\] \(W_3\) has 5 rows.*problem.dim_out",
    ),
    "NaN": (
        with_layer(1, entry_setter(np.nan, (2, 3))),
        ValueError,
        r"weights\[1\] \(W_2\).*nan at \(2, 3\)",
    ),
    "infinity": (
        with_layer(1, entry_setter(-np.inf, (2, 3))),
        ValueError,
        r"weights\[1\] \(W_2\).*-inf at \(2, 3\)",
    ),
    "float16": (
        with_layer(0, lambda w: w.astype(np.float16)),
        TypeError,
        r"weights\[0\] \(W_1\) has dtype float16",
    ),
    "long double": (
        with_layer(0, lambda w: w.astype(np.longdouble)),
        TypeError,
        r"weights\[0\] \(W_1\) has dtype",
    ),
    "complex": (with_layer(0, lambda w: w + 0j), TypeError, r"weights\[0\] \(W_1\) has dtype complex128"),
    "objects": (with_layer(0, lambda w: w.astype(object)), TypeError, r"weights\[0\] \(W_1\)"),
    "strings": (with_layer(0, lambda w: w.astype(str)), TypeError, r"weights\[0\] \(W_1\)"),
    "mixed precisions": (
        with_layer(1, lambda w: w.astype(np.float32)),
        TypeError,
        r"weights\[1\] \(W_2\) is float32 but weights\[0\] is float64",
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_errors_name_bad_weights(name, engine):
    weights, error, text = BAD_WEIGHTS[name]
    with pytest.raises(error, match=text):
        dln.train(make_problem_of_dim(), weights, learning_rate=0.1, steps=3, engine=engine)
    with pytest.raises(error, match=text):
        dln.gradients(make_problem_of_dim(), weights)


def unaligned(matrix):
    """Return the same numbers at addresses that are not multiples of their size."""
    memory = np.empty(matrix.nbytes + 1, np.uint8)
    result = memory[1:].view(matrix.dtype).reshape(matrix.shape)
    result[...] = matrix
    assert not result.flags.aligned
    return result


def read_only(matrix):
    matrix = matrix.copy()
    matrix.flags.writeable = False
    return matrix


LAYOUTS = {
    "Fortran order": np.asfortranarray,
    "read-only": read_only,
    "every other column": lambda w: np.repeat(w, 2, axis=1)[:, ::2],
    "backwards": lambda w: w[::-1, ::-1].copy()[::-1, ::-1],
    "transposed": lambda w: w.T.copy().T,
    "big-endian": lambda w: w.astype(w.dtype.newbyteorder(">")),
    "unaligned": unaligned,
    "part of a larger array": lambda w: np.pad(w, 2)[2:-2, 2:-2],
    "a subclass": lambda w: w.view(np.matrix),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [np.float32, F64])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_any_layout_gives_the_same_run(name, dtype, engine):
    weights = make_weights_of_dim(dtype=dtype)
    wanted = train_small(weights=weights, engine=engine)
    given_as = [LAYOUTS[name](w) for w in weights]
    run = train_small(weights=given_as, engine=engine)
    np.testing.assert_array_equal(run.loss, wanted.loss)
    np.testing.assert_array_equal(run.weights(2), wanted.weights(2))
    assert run.weights(2).dtype == dtype
    for array, weight in zip(given_as, weights, strict=True):
        np.testing.assert_array_equal(np.asarray(array, dtype), weight)
    target = make_problem_of_dim().target
    if dtype == F64:
        run = train_small(dln.Problem(LAYOUTS[name](target)), weights, engine=engine)
        np.testing.assert_array_equal(run.loss, wanted.loss)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "convert",
    [lambda w: w.tolist(), lambda w: tuple(map(tuple, w)), lambda w: w.astype(int), lambda w: w.astype(bool)],
)
def test_lists_and_integers_are_numbers(convert, engine):
    rotations = [np.eye(DIM)[::-1].copy(), np.eye(DIM), np.eye(DIM)[:, ::-1].copy()]
    run = train_small(weights=[convert(w) for w in rotations], engine=engine)
    wanted = train_small(weights=rotations, engine=engine)
    np.testing.assert_array_equal(run.loss, wanted.loss)
    assert run.weights(1).dtype == F64
    # Other containers than a list.
    for container in (tuple, iter, np.array):
        np.testing.assert_array_equal(
            train_small(weights=container(rotations), engine=engine).loss, wanted.loss
        )


# Large arrays.


@contextlib.contextmanager
def no_copy_of_large_arrays(monkeypatch, limit):
    monkeypatch.setattr(_arrays, "LARGE_COPY_BYTES", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error", dln.CopyWarning)
        yield


@pytest.mark.parametrize("engine", ENGINES)
def test_large_arrays_are_copied_with_a_warning_or_not_at_all(engine, monkeypatch):
    with no_copy_of_large_arrays(monkeypatch, limit=100):
        weights = make_weights_of_dim()
        run = train_small(weights=weights, engine=engine)
        stored = run.states.layers.weights if engine == "reduced" else run.states.initial
        assert all(np.shares_memory(a, b) for a, b in zip(stored, weights, strict=True))
        for layout in ("Fortran order", "big-endian", "every other column"):
            with pytest.raises(dln.CopyWarning, match=r"weights\[1\] \(W_2\): 0 MB copied"):
                train_small(weights=with_layer(1, LAYOUTS[layout]), engine=engine)
        target = make_problem_of_dim().target
        with pytest.raises(dln.CopyWarning, match=r"target \(Phi\)"):
            dln.Problem(np.asfortranarray(target))
        with pytest.raises(dln.CopyWarning, match=r"input_gram \(S\)"):
            dln.Problem(target, np.eye(DIM, dtype=np.float32))
        with pytest.raises(dln.CopyWarning, match="X"):
            run.features(1, np.ones((40, DIM)).T)


def test_small_arrays_are_copied_without_a_warning():
    train_small(weights=[np.asfortranarray(w) for w in make_weights_of_dim()])  # warnings are errors here
    assert _arrays.LARGE_COPY_BYTES == 64 * 2**20


# Numbers.

NOT_NUMBERS = ["0.1", None, True, 1j, np.ones(3, complex), {"eta": 1.0}, object()]


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "momentum"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        *((value, TypeError) for value in NOT_NUMBERS),
        (-0.1, ValueError),
        (np.nan, ValueError),
        (np.inf, ValueError),
        pytest.param(10**400, ValueError, id="10**400"),
        ([0.1, 0.1], dln.ShapeError),
        ([], dln.ShapeError),
        ([0.1, -0.1, 0.1], ValueError),
        ([0.1, np.nan, 0.1], ValueError),
        ([0.1, None, 0.1], TypeError),
        ([0.1, True, 0.1], TypeError),
        ([[0.1], [0.1], [0.1]], (TypeError, ValueError)),
        ([0.1, [0.1], 0.1], (TypeError, ValueError)),
        (np.full((3, 1), 0.1), (TypeError, ValueError)),
    ],
)
def test_invalid_rates_are_refused(name, value, error):
    with pytest.raises(error, match=name):
        train_small(**{name: value})


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "momentum"])
@pytest.mark.parametrize(
    "value",
    [
        0,
        0.125,
        np.float32(0.125),
        np.array(0.125),
        fractions.Fraction(1, 8),
        decimal.Decimal("0.125"),
        (0.125, 0.0, 0.25),
        np.array([0.125, 0.0, 0.25], np.float32),
        [np.float64(0.125), 0, 0.25],
    ],
)
def test_rates_are_accepted_in_any_form(name, value):
    try:
        numbers = [float(v) for v in value]
    except TypeError:
        numbers = [float(value)] * 3
    run = train_small(**{name: value})
    np.testing.assert_array_equal(run.loss, train_small(**{name: numbers}).loss)
    assert run.config[name] == numbers


@pytest.mark.parametrize("momentum", [1.0, 1.5, [0.5, 0.5, 1.0]])
def test_momentum_is_below_one(momentum):
    with pytest.raises(ValueError, match=r"momentum \(mu\).* is 1.*\[0, 1\)"):
        train_small(momentum=momentum)


@pytest.mark.parametrize("name", ["steps", "every", "weights_every", "n_threads", "singular_values"])
@pytest.mark.parametrize(
    "value", [2.0, 2.5, "3", True, np.bool_(1), [2], np.array([1, 2]), 1j, np.float64(2)]
)
def test_invalid_counts_are_refused(name, value):
    with pytest.raises((TypeError, ValueError), match=name) as caught:
        train_small(**option(name, value))
    assert caught.type is (ValueError if name == "singular_values" and isinstance(value, str) else TypeError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", -1),
        ("every", 0),
        ("every", -3),
        ("weights_every", 0),
        ("n_threads", -1),
        ("singular_values", -1),
        ("singular_values", "most"),
    ],
)
def test_counts_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is"):
        train_small(**option(name, value))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [
        {"record": dln.Record(every=10**9)},
        {"record": dln.Record(every=2**40)},
        {"record": dln.Record(every=2**70)},
        {"record": dln.Record(weights_every=2**40)},
        {"record": dln.Record(weights_every=2**70)},
        {"record": dln.Record(singular_values=2**40)},
        {"record": dln.Record(singular_values=2**70)},
        {"record": dln.Record(singular_values=np.int64(3))},
        {"steps": np.uint8(5)},
        {"n_threads": np.int32(1)},
    ],
)
def test_huge_counts_are_valid_limits(options, engine):
    run = train_small(engine=engine, **options)
    wanted = train_small(engine=engine)
    np.testing.assert_array_equal(run.loss, wanted.loss)
    np.testing.assert_array_equal(run.weights(1), wanted.weights(1))


@pytest.mark.parametrize("value", [2**31, 2**40, 2**70])
def test_thread_counts_beyond_an_int_are_refused(value):
    with pytest.raises(ValueError, match="n_threads"):
        train_small(n_threads=value)
    with pytest.raises(ValueError, match="n is"):
        dln.set_num_threads(value)


@pytest.mark.parametrize("value", [2**62, 2**63, 2**70])
def test_more_steps_than_fit_in_memory_are_refused(value):
    with pytest.raises((MemoryError, ValueError, OverflowError)):
        train_small(steps=value)


def test_records_that_do_not_fit_in_memory_are_refused():
    with pytest.raises(MemoryError, match=r"raise record\.every"):
        train_small(steps=10**15, engine="dense")


@pytest.mark.parametrize("value", ["1", True, [1.0], 1j])
def test_a_tolerance_has_to_be_a_number(value):
    with pytest.raises(TypeError, match="tolerance is"):
        train_small(tolerance=value)


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_a_negative_tolerance_is_refused(value):
    with pytest.raises(ValueError, match="tolerance is"):
        train_small(tolerance=value)


# Names and objects.


@pytest.mark.parametrize("engine", ["fast", "Dense", "", None, 1])
def test_unknown_engines_are_refused(engine):
    with pytest.raises(ValueError, match=r"engine is .*; wanted one of 'auto', 'reduced', 'dense', 'torch'"):
        train_small(engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["adam", "Adam", "AdamW", "RMSprop", "adagrad", "Lion", "rprop", "signsgd"])
def test_adaptive_optimizers_are_refused_with_the_reason(name, engine):
    with pytest.raises(
        dln.AssumptionError, match=f"(?i)optimizer is '{name}'.*destroy the invariant subspaces.*wanted"
    ):
        train_small(optimizer=name, engine=engine)


@pytest.mark.parametrize("name", ["sgd", "", None, 3])
def test_other_optimizers_are_refused(name):
    with pytest.raises(ValueError, match=r'optimizer is .*; wanted one of "gd", "nesterov"'):
        train_small(optimizer=name)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (dln.optimizers.Muon(method="svd"), "method is 'svd'"),
        (dln.optimizers.Muon(steps=-1), "steps of the iteration is -1"),
        (dln.optimizers.Muon(coefficients=(1.0, 2.0)), "coefficients is .*3 numbers"),
        (dln.optimizers.Muon(momentum=1.0), r"momentum \(mu\) is 1"),
        (dln.optimizers.Muon(scale="rms"), "scale is 'rms'"),
        (dln.optimizers.Shampoo(epsilon=0.0), "epsilon is 0"),
        (dln.optimizers.Shampoo(decay=1.5), "decay is 1.5"),
        ({"name": "muon", "speed": 3}, "optimizer 'muon' has no setting 'speed'"),
        ({"momentum": 0.9}, "optimizer is .*wanted one of"),
    ],
)
def test_bad_settings_of_optimizers_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        train_small(optimizer=rule)


def test_two_different_momenta_are_refused():
    with pytest.raises(ValueError, match="momentum of their own; wanted only one"):
        train_small(optimizer=dln.optimizers.Muon(momentum=0.5), momentum=0.9)


def test_other_rules_have_no_adaptive_rate():
    with pytest.raises(ValueError, match="learning_rate is adaptive and optimizer is 'nesterov'"):
        train_small(optimizer="nesterov", learning_rate="adaptive", engine="dense")


@pytest.mark.parametrize("rule", ["muon", "spectral-sign", "shampoo"])
def test_rules_that_rescale_the_gradient_have_no_automatic_rate(rule):
    with pytest.raises(ValueError, match=f"learning_rate is \"auto\" and optimizer is '{rule}'"):
        train_small(optimizer=rule, learning_rate="auto")
    train_small(optimizer="nesterov", learning_rate="auto", momentum=0.9)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "momentum"])
def test_rates_for_steps_are_schedules(name):
    """A list has one number per layer; an array of steps and layers gets an error that names `Schedule`."""
    for value in ([0.1] * 5, np.full((5, 2), 0.1)):
        with pytest.raises(dln.ShapeError, match=f"{name}.*dlnfast.Schedule"):
            train_small(**{name: value})


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "momentum"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.1, 0.2], "the schedule has 2 values; wanted one for each of 5 steps"),
        (np.full((5, 7), 0.1), "values for 7 layers"),
        ([0.1, 0.1, -0.1, 0.1, 0.1], "of a step is -0.1"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(name, values, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        train_small(**{name: dln.Schedule(values)})


@pytest.mark.parametrize("problem", [None, np.eye(DIM), "problem", dln.Problem])
def test_a_problem_has_to_be_a_problem(problem):
    with pytest.raises(TypeError, match=r"problem is .*; wanted a dlnfast\.Problem"):
        dln.train(problem, make_weights_of_dim(), learning_rate=0.1, steps=1)


@pytest.mark.parametrize("callback", ["print", 3, [print]])
def test_a_callback_has_to_be_callable(callback):
    with pytest.raises(TypeError, match="callback is"):
        train_small(record=dln.Record(callback=callback))


@pytest.mark.parametrize("engine", ["reduced", "dense"])
@pytest.mark.parametrize("answer", ["text", [1], {}, object(), np.arange(3)])
def test_only_true_stops_a_run(answer, engine):
    """Other return values of a callback, such as those of a lambda, do not stop the run."""
    run = train_small(engine=engine, record=dln.Record(callback=lambda step, loss: answer))
    assert len(run.loss) == 6


def test_vectors_without_values_are_refused():
    with pytest.raises(ValueError, match="vectors is True but singular_values asks for none"):
        train_small(record=dln.Record(vectors=True, singular_values=None))


# Rates that diverge.


@pytest.mark.parametrize("engine", ["reduced", "dense"])
@pytest.mark.parametrize("dtype", [np.float32, F64])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_diverged_run_keeps_its_records(engine, dtype, momentum):
    weights = make_weights_of_dim(dtype=dtype)
    with pytest.raises(dln.DivergedError) as caught:
        train_small(
            weights=weights,
            learning_rate=20.0,
            momentum=momentum,
            steps=500,
            engine=engine,
            record=dln.Record(every=2),
        )
    error = caught.value
    assert isinstance(error, ArithmeticError)
    assert 1 <= error.step < 500
    assert 1 <= error.layer <= 3
    text = str(error)
    for part in (
        f"not finite at step {error.step}",
        f"layer {error.layer}",
        "lower learning_rate (eta), now 20",
    ):
        assert part in text
    run = error.trajectory
    assert len(run.loss) == error.step
    assert np.isfinite(run.loss).all()
    assert run.loss[-1] > run.loss[0]
    assert run.steps.tolist() == list(range(0, error.step, 2))
    for layer in (1, 2, 3):
        assert np.isfinite(run.singular_values(layer)).all()
    assert run.outcome == "diverged"
    assert run.engine == engine


def test_divergence_names_the_exceeded_bound():
    """The bound of a balanced minimum is 2 / (L c sigma^(2 - 2/L)), here with L = 3 and sigma = 1.5."""
    bound = 2 / (3 * 1.5 ** (4 / 3))
    with pytest.raises(dln.DivergedError, match=f"rates above {bound:.3g} oscillate"):
        train_small(learning_rate=20.0, steps=500)
    with pytest.raises(dln.DivergedError, match="whiten the inputs"):
        train_small(dln.Problem(np.eye(DIM), 4 * np.eye(DIM)), learning_rate=20.0, steps=500)
    with pytest.raises(dln.DivergedError, match=r"learning_rate \* weight_decay is 3, above 2"):
        train_small(learning_rate=1.0, weight_decay=3.0, steps=5000)


@pytest.mark.parametrize("engine", ["reduced", "dense"])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_divergence_names_the_layer_that_grew(engine, layer):
    rates = [0.01] * 3
    rates[layer - 1] = 300.0
    with pytest.raises(dln.DivergedError) as caught:
        train_small(learning_rate=rates, steps=500, engine=engine)
    assert caught.value.layer == layer
    assert "now 0.01 .. 300" in str(caught.value)


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_divergence_outside_the_active_subspaces_is_detected(engine):
    """The target is reached, and the decay makes the inactive directions diverge."""
    problem = dln.Problem(np.zeros((2, DIM)))
    weights = [*dln.orthogonal([DIM] * 3, 0.7), np.zeros((2, DIM))]
    with pytest.raises(dln.DivergedError):
        train_small(
            problem, weights, learning_rate=1.0, weight_decay=[40.0, 40.0, 0.0], steps=1000, engine=engine
        )


@pytest.mark.parametrize("engine", ["auto", "dense"])
def test_divergence_at_the_start_has_no_records(engine):
    """The weights are finite and their product is not: nothing was recorded."""
    with pytest.raises(dln.DivergedError, match="step 0") as caught:
        train_small(weights=[np.full((DIM, DIM), 1e150)] * 3, engine=engine)
    assert caught.value.step == 0
    assert caught.value.trajectory is None


def test_single_precision_diverges_earlier():
    steps = []
    for dtype in (np.float32, F64):
        with pytest.raises(dln.DivergedError) as caught:
            train_small(
                weights=make_weights_of_dim(dtype=dtype), learning_rate=20.0, steps=500, engine="dense"
            )
        steps.append(caught.value.step)
    assert steps[0] <= steps[1]


def test_divergence_can_be_pickled():
    with pytest.raises(dln.DivergedError) as caught:
        train_small(weights=make_weights_of_dim(), learning_rate=20.0, steps=500, record=dln.Record(every=2))
    error = caught.value
    error.add_note("of run 7")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.step, copy.layer) == (str(error), error.step, error.layer)
    assert copy.__notes__ == ["of run 7"]
    np.testing.assert_array_equal(copy.trajectory.loss, error.trajectory.loss)


@settings(deadline=None, max_examples=80)
@given(
    rate=st.floats(1e-3, 1e3),
    decay=st.sampled_from([0.0, 1e-3, 10.0]),
    momentum=st.sampled_from([0.0, 0.9, 0.999]),
    engine=st.sampled_from(["reduced", "dense"]),
    scale=st.sampled_from([1e-8, 0.5, 3.0, 1e8]),
    dtype=st.sampled_from([np.float32, F64]),
)
def test_no_run_with_nan_succeeds(rate, decay, momentum, engine, scale, dtype):
    weights = dln.orthogonal([DIM] * 4, scale, dtype=dtype)
    rates = {"learning_rate": rate, "weight_decay": decay, "momentum": momentum, "engine": engine}
    try:
        run = train_small(weights=weights, steps=60, **rates)
    except dln.DivergedError as error:
        run = error.trajectory
    else:
        assert_no_nan(run)
    assert run is None or np.isfinite(run.loss).all()


# Extreme valid arguments.

CORNERS = {
    "rank 0": ([5] * 4, []),
    "d < 2r": ([5] * 4, [2.0, 1.5, 1.0]),
    "d = r": ([3] * 3, [2.0, 1.5, 1.0]),
    "d = 1": ([1, 1, 1], [1.0]),
    "one layer": ([4, 4], [1.0]),
    "one wide layer": ([4, 2], [1.0]),
    "one output": ([5, 5, 1], [1.0]),
    "one input": ([1, 5, 5], [1.0]),
}


@pytest.mark.parametrize("steps", [0, 1, 20])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CORNERS)
def test_extreme_shapes_train(name, engine, steps):
    widths, values = CORNERS[name]
    problem = dln.Problem(draw_matrix(0, widths[-1], widths[0], values))
    weights = dln.orthogonal(widths, 0.8)
    run = train_small(problem, weights, engine=engine, steps=steps, record=dln.Record(vectors=True))
    assert_no_nan(run)
    wanted = train_small(problem, weights, engine="dense", steps=steps)
    assert abs(run.loss[-1] - wanted.loss[-1]) <= tolerance(F64, 5, max(steps, 1)) * wanted.loss[0]
    for layer in range(1, run.n_layers + 1):
        values = run.singular_values(layer)
        np.testing.assert_allclose(
            values, wanted.singular_values(layer), atol=tolerance(F64, 5, max(steps, 1))
        )
        if run.problem.target_factors().rank:
            assert np.isfinite(run.angles(layer)).all()
    repr(run)


def test_layers_that_start_at_zero_stay_zero():
    """Layers of zeros are a critical point."""
    for engine in ENGINES:
        run = train_small(weights=[np.zeros((DIM, DIM))] * 3, steps=20, engine=engine)
        assert np.all(run.loss == run.loss[0])
        assert not any(run.weights(layer).any() for layer in (1, 2, 3))
        assert not any(run.singular_values(layer).any() for layer in (1, 2, 3))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale", [1e-30, 1e-100])
def test_tiny_layers_train(scale, engine):
    run = train_small(weights=dln.orthogonal([DIM] * 4, scale), steps=3, engine=engine)
    assert_no_nan(run)
    np.testing.assert_allclose(run.singular_values(1)[0], scale, rtol=tolerance(F64, DIM))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale", [1e-10, 1e-20])
def test_tiny_layers_train_in_single_precision(scale, engine):
    run = train_small(weights=dln.orthogonal([DIM] * 4, scale, dtype=np.float32), steps=3, engine=engine)
    assert_no_nan(run)
    np.testing.assert_allclose(run.singular_values(1)[0], scale, rtol=tolerance(np.float32, DIM))


# Threads.


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (1.0, TypeError), ("2", TypeError), (None, TypeError)]
)
def test_thread_counts_are_checked(value, error):
    with pytest.raises(error, match="n is"):
        dln.set_num_threads(value)
