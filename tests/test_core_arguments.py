# SPDX-License-Identifier: MIT
"""Functions of the compiled core with bad arguments: they raise, they never crash."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from helpers.core_calls import (
    ARGUMENTS,
    ENTRIES,
    call_batch_descent,
    call_descent,
    family,
    freeze,
    identity_layers,
)
from helpers.matrices import draw_orthonormal
from hypothesis import given, settings
from hypothesis import strategies as st

from dlnfast._support.dispatch import core as core_of_package

F64 = np.float64


# Products.

A, B, OUT = np.ones((3, 4)), np.ones((4, 5)), np.zeros((3, 5))

BAD_PRODUCTS = {
    "inner sizes": ((A, False, A, False, OUT), ValueError, "inner size"),
    "result": ((A, False, B, False, np.zeros((5, 3))), ValueError, "result of a product has shape"),
    "transposed": ((A, True, B, False, OUT), ValueError, "inner size"),
    "one axis": ((np.ones(3), False, B, False, OUT), ValueError, "a has 1 axes"),
    "no axis": ((np.array(1.0), False, B, False, OUT), ValueError, "a has 0 axes"),
    "three axes": ((A, False, B, False, np.zeros((1, 3, 5))), ValueError, "out has 3 axes"),
    "mixed precisions": (
        (A, False, B.astype(np.float32), False, OUT),
        TypeError,
        "b has dtype float32; wanted float64",
    ),
    "float16": ((A.astype(np.float16), False, B, False, OUT), TypeError, "a has dtype float16"),
    "integers": ((A, False, B.astype(int), False, OUT), TypeError, "b has dtype int64"),
    "complex": ((A + 0j, False, B, False, OUT), TypeError, "a has dtype complex128"),
    "objects": ((A.astype(object), False, B, False, OUT), TypeError, "a has dtype object"),
    "big-endian": ((A, False, B.astype(">f8"), False, OUT), TypeError, "b has dtype >f8"),
    "Fortran order": ((np.asfortranarray(A), False, B, False, OUT), TypeError, "a is not C-contiguous"),
    "strided": ((A, False, np.ones((8, 5))[::2], False, OUT), TypeError, "b is not C-contiguous"),
    "Fortran result": ((A, False, B, False, np.asfortranarray(OUT)), TypeError, "out is not C-contiguous"),
    "read-only result": ((A, False, B, False, freeze(np.zeros((3, 5)))), ValueError, "out is read-only"),
    "a list": ((A.tolist(), False, B, False, OUT), TypeError, "a is not a NumPy array"),
    "None": ((A, False, None, False, OUT), TypeError, "b is not a NumPy array"),
    "no result": ((A, False, B, False, None), ValueError, r"result of a product has shape \(0, 0\)"),
    "a flag": ((A, "no", B, False, OUT), TypeError, "transpose_a is of type str; wanted bool"),
    "too few": ((A, False, B), TypeError, "incompatible function arguments"),
    "threads": (
        (A, False, B, False, OUT, 2**40),
        TypeError,
        "n_threads is 1099511627776; wanted an integer of 32 bits",
    ),
}


@pytest.mark.parametrize("name", BAD_PRODUCTS)
def test_errors_of_multiply_name_bad_arguments(core, name):
    arguments, error, text = BAD_PRODUCTS[name]
    with pytest.raises(error, match=text):
        core.multiply(*arguments)


X, W = np.ones((2, 4)), np.ones((4, 6))

BAD_THIN_PRODUCTS = {
    "inner sizes": ((np.ones((2, 6)), W, False, np.zeros((2, 6))), ValueError, "thin block"),
    "inner sizes, transposed": ((X, W, True, np.zeros((2, 4))), ValueError, "thin block"),
    "result": ((X, W, False, np.zeros((2, 4))), ValueError, "result of a thin product"),
    "too thick": ((np.ones((65, 4)), W, False, np.zeros((65, 6))), ValueError, "65 rows; wanted at most 64"),
    "mixed precisions": (
        (X.astype(np.float32), W, False, np.zeros((2, 6))),
        TypeError,
        "w has dtype float64",
    ),
    "Fortran order": ((X, np.asfortranarray(W), False, np.zeros((2, 6))), TypeError, "w is not C-contiguous"),
    "read-only result": ((X, W, False, freeze(np.zeros((2, 6)))), ValueError, "out is read-only"),
    "one axis": ((X, np.ones(4), False, np.zeros((2, 6))), ValueError, "w has 1 axes"),
}


@pytest.mark.parametrize("name", BAD_THIN_PRODUCTS)
def test_errors_of_thin_multiply_name_bad_arguments(core, name):
    arguments, error, text = BAD_THIN_PRODUCTS[name]
    with pytest.raises(error, match=text):
        core.thin_multiply(*arguments)


def thin_descend(core, entry="thin_times_transpose_and_descend", **changes):
    descent = {
        "scale": 1.0,
        "learning_rate": 0.1,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "velocity": None,
    }
    arguments = {
        "left": np.ones((2, 4)),
        "right": np.ones((2, 6)),
        "w": np.ones((4, 6)),
        "out": np.zeros((2, 4)),
        "descent": {key: changes.pop(key, value) for key, value in descent.items()},
    }
    return getattr(core, entry)(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"left": np.ones((3, 4))}, ValueError, "right block"),
        ({"left": np.ones((2, 5))}, ValueError, "left block"),
        ({"right": np.ones((2, 5))}, ValueError, "right block"),
        ({"out": np.zeros((2, 6))}, ValueError, "result of a thin product"),
        ({"entry": "thin_times_and_descend"}, ValueError, "result of a thin product"),
        ({"out": None}, ValueError, r"result of a thin product has shape \(0, 0\); wanted \(2, 4\)"),
        ({"out": [[0.0]]}, TypeError, "out is not a NumPy array"),
        ({"velocity": np.ones((6, 4))}, ValueError, "velocity"),
        ({"velocity": np.ones((4, 6), np.float32)}, TypeError, "velocity has dtype float32"),
        ({"velocity": freeze(np.ones((4, 6)))}, ValueError, "velocity is read-only"),
        ({"w": freeze(np.ones((4, 6)))}, ValueError, "w is read-only"),
        ({"w": np.ones((6, 4)).T}, TypeError, "w is not C-contiguous"),
        ({"left": np.ones((65, 4)), "right": np.ones((65, 6))}, ValueError, "65 rows"),
        ({"scale": None}, TypeError, "scale is of type NoneType; wanted float"),
        ({"descent": None}, TypeError, "descent is of type NoneType; wanted dict"),
        ({"descent": {"scale": 1.0}}, KeyError, "learning_rate"),
    ],
)
def test_errors_of_thin_descend_name_bad_arguments(core, changes, error, text):
    with pytest.raises(error, match=text):
        thin_descend(core, **changes)


# Decompositions.


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((np.ones((3, 4)), np.zeros((1, 4)), None, None), ValueError, "singular values has shape"),
        ((np.ones((3, 4)), np.zeros((2, 3)), None, None), ValueError, "singular values has shape"),
        ((np.ones((3, 4)), np.zeros(3), None, None), ValueError, "values has 1 axes"),
        ((np.ones((3, 4)), np.zeros((1, 3), np.float32), None, None), TypeError, "values has dtype float32"),
        ((np.ones((3, 4)), np.zeros((1, 3)), np.zeros((4, 3)), None), ValueError, "left singular vectors"),
        ((np.ones((3, 4)), np.zeros((1, 3)), None, np.zeros((3, 3))), ValueError, "right singular vectors"),
        ((np.ones((3, 4)), np.zeros((1, 2)), np.zeros((3, 3)), None), ValueError, "left singular vectors"),
        ((np.ones((3, 4)), freeze(np.zeros((1, 3))), None, None), ValueError, "values is read-only"),
        ((np.ones((3, 4)).T, np.zeros((1, 3)), None, None), TypeError, "w is not C-contiguous"),
        ((np.ones((3, 4), int), np.zeros((1, 3)), None, None), TypeError, "w has dtype int64"),
        (("w", np.zeros((1, 3)), None, None), TypeError, "w is not a NumPy array"),
    ],
)
def test_errors_of_singular_values_name_bad_arguments(core, arguments, error, text):
    with pytest.raises(error, match=text):
        core.singular_values(*arguments)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("n", [3, 40])
def test_singular_values_of_matrices_that_are_not_finite_are_refused(core, bad, n):
    w = np.ones((n, n))
    w[1, 1] = bad
    with pytest.raises(ValueError, match="not finite"):
        core.singular_values(w, np.zeros((1, n)), np.zeros((n, n)), np.zeros((n, n)))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((np.ones(4), np.ones(4), 2), ValueError, "superdiagonal has 4 values; wanted 3"),
        ((np.ones(4), np.ones(2), 2), ValueError, "superdiagonal has 2 values; wanted 3"),
        ((np.ones(4), np.ones(3), 5), ValueError, "k is 5; wanted 0 to 4"),
        ((np.ones(4), np.ones(3), -1), ValueError, "k is -1; wanted 0 to 4"),
        ((np.ones(4), np.ones(3), 2**62), ValueError, "k is 4611686018427387904"),
        ((np.ones(4), np.ones(3), 2**80), TypeError, "wanted an integer of 64 bits"),
        ((np.ones(4, np.float32), np.ones(3), 1), TypeError, "diagonal has dtype float32"),
        ((np.ones((2, 2)), np.ones(3), 1), ValueError, "diagonal has 2 axes"),
        ((np.ones(8)[::2], np.ones(3), 1), TypeError, "diagonal is not C-contiguous"),
    ],
)
def test_errors_of_bidiagonal_singular_values_name_bad_arguments(core, arguments, error, text):
    with pytest.raises(error, match=text):
        core.bidiagonal_singular_values(*arguments)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bidiagonal_matrices_that_are_not_finite_are_refused(core, bad):
    for diagonal, superdiagonal in (([1.0, bad, 1.0], [1.0, 1.0]), ([1.0, 1.0, 1.0], [bad, 1.0])):
        with pytest.raises(ValueError, match="not finite"):
            core.bidiagonal_singular_values(np.array(diagonal), np.array(superdiagonal), 3)


# Widths and threads.


@pytest.mark.parametrize("widths", [[], [3]])
def test_widths_without_a_layer_are_refused(core, widths):
    with pytest.raises(ValueError, match="widths"):
        core.best_pivot(widths)
    with pytest.raises(ValueError, match="widths"):
        core.step_flops(widths, 0)


@pytest.mark.parametrize("pivot", [-1, 3, 2**60])
def test_pivots_out_of_range_are_refused(core, pivot):
    with pytest.raises(ValueError, match="pivot"):
        core.step_flops([3, 3, 3], pivot)


def test_bad_thread_counts_are_refused(core):
    for value in (2**40, "2", None, 1.5):
        with pytest.raises(TypeError):
            core.set_num_threads(value)


# Both engines.


@pytest.mark.parametrize("dtype", [np.float32, F64])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_valid_call_finishes(core, entry, dtype):
    arguments = ARGUMENTS[entry](dtype=dtype)
    assert getattr(core, entry)(identity_layers(dtype), arguments) == ("finished", 3, 0)
    assert arguments["counts"][:2].tolist() == [4, 4]
    assert arguments["record_steps"].tolist() == [0, 1, 2, 3]
    assert np.all(arguments["loss"] > 0)


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_argument_is_needed(core, entry):
    for name in ARGUMENTS[entry]():
        arguments = ARGUMENTS[entry]()
        del arguments[name]
        with pytest.raises(KeyError, match=name):
            getattr(core, entry)(identity_layers(), arguments)


COMMON_CHANGES = [
    ({"target": np.ones((2, 3))}, ValueError, "target has shape"),
    ({"target": np.ones(2)}, ValueError, "target has 1 axes"),
    ({"target": np.ones((2, 2), np.float32)}, TypeError, "target has dtype float32"),
    ({"target": np.ones((2, 4))[:, ::2]}, TypeError, "target is not C-contiguous"),
    ({"target": None}, ValueError, "target has shape"),
    ({"target": [[1.0]]}, TypeError, "target is not a NumPy array"),
    ({"input_gram": np.eye(3), "input_factor": np.eye(2)}, ValueError, "input_gram has shape"),
    ({"input_gram": np.eye(2), "input_factor": np.eye(3)}, ValueError, "input_factor has shape"),
    ({"input_gram": np.eye(2)}, ValueError, "input_factor has shape"),
    ({"input_gram": np.eye(2), "input_factor": np.eye(2)}, ValueError, "factor_target has shape"),
    ({"input_gram": np.eye(2), "input_factor": np.ones((2, 3))}, ValueError, "input_factor has shape"),
    (
        {"input_gram": np.eye(2), "input_factor": np.ones((2, 1)), "factor_target": np.eye(2)},
        ValueError,
        "factor_target has shape",
    ),
    ({"input_factor": np.eye(2)[:, :1]}, TypeError, "input_factor is not C-contiguous"),
    ({"learning_rate": [0.1]}, ValueError, "learning_rate has 1 values; wanted 2"),
    ({"weight_decay": [0.1] * 3}, ValueError, "weight_decay has 3 values; wanted 2"),
    ({"momentum": []}, ValueError, "momentum has 0 values; wanted 2"),
    ({"steps": -1}, ValueError, "steps"),
    ({"record_every": 0}, ValueError, "record_every"),
    ({"record_every": -5}, ValueError, "record_every"),
    (
        {"steps": 4},
        ValueError,
        r"record_steps has the wrong shape, \(4\); wanted \(5\), or more along the first axis",
    ),
    ({"loss": np.zeros(3)}, ValueError, "loss"),
    ({"loss": np.zeros(4, np.float32)}, TypeError, "loss has dtype float32"),
    ({"loss": np.zeros(8)[::2]}, TypeError, "loss is not C-contiguous"),
    ({"loss": freeze(np.zeros(4))}, ValueError, "loss is read-only"),
    ({"record_steps": np.zeros(3, np.int64)}, ValueError, "record_steps"),
    ({"record_steps": np.zeros(4, np.int32)}, TypeError, "record_steps has dtype int32"),
    ({"counts": np.zeros(4, np.int64)}, ValueError, "counts"),
    ({"first": -1}, ValueError, "the first step is negative"),
    ({"first": 4}, ValueError, "beyond the last one"),
    ({"flush_every": -1}, ValueError, "flush_every is negative"),
    ({"velocity": [np.zeros((2, 2))]}, ValueError, "velocity"),
    ({"velocity": [np.zeros((2, 2)), np.zeros((2, 3))]}, ValueError, r"velocity\[1\] has shape"),
    ({"compensation": [np.zeros((2, 2))] * 3}, ValueError, "compensation"),
    ({"compensation": [np.zeros((2, 2), np.float32)] * 2}, TypeError, r"compensation\[0\] has dtype float32"),
    ({"compensation": [freeze(np.zeros((2, 2)))] * 2}, ValueError, r"compensation\[0\] is read-only"),
    ({"left_factors": [np.eye(2)]}, ValueError, "left_factors has 1 values; wanted 2"),
    ({"right_factors": [np.eye(2), np.eye(3)]}, ValueError, r"right_factors\[1\] has shape"),
    ({"power_vectors": [np.zeros(2)]}, ValueError, "power_vectors"),
    ({"power_vectors": [np.zeros(3), np.zeros(2)]}, ValueError, r"power_vectors\[0\] has 3 values; wanted 2"),
    ({"counts": freeze(np.zeros(5, np.int64))}, ValueError, "counts is read-only"),
]


def two(array):
    return [array, array.copy()]


def failing(core, entry, changes, error, text):
    with pytest.raises(error, match=text):
        call_descent(core, entry, **changes)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("changes", "error", "text"), COMMON_CHANGES)
def test_errors_of_descent_name_bad_arguments(core, entry, changes, error, text):
    failing(core, entry, changes, error, text)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.1},
        {"learning_rate": ["a", "b"]},
        {"learning_rate": None},
        {"steps": "3"},
        {"steps": 2**70},
        {"record_every": None},
        {"n_threads": 2**40},
        {"tolerance": "low"},
        {"loss_scale": None},
        {"loss": 3},
        {"loss": None},
        {"on_record": 3},
    ],
)
def test_descent_refuses_other_types(core, entry, changes):
    """Any of the errors that conversions raise."""
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        call_descent(core, entry, **changes)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("weights", "error", "text"),
    [
        ([], ValueError, "is empty|wrong shape|initial has"),
        ([np.eye(2)], ValueError, "2 values; wanted 1|wrong shape"),
        ([np.eye(2), np.eye(3)], ValueError, r"\[1\] has (the wrong )?shape"),
        ([np.eye(2), np.ones((3, 2))], ValueError, r"target has shape|\[1\] has the wrong shape"),
        ([np.eye(2), np.eye(2, dtype=np.float32)], TypeError, r"\[1\] has dtype float32"),
        ([np.eye(2, dtype=np.float32), np.eye(2)], TypeError, r"\[1\] has dtype float64"),
        ([np.eye(2), freeze(np.eye(2))], ValueError, r"\[1\] is read-only"),
        ([np.eye(2), np.ones((2, 4))[:, ::2]], TypeError, r"\[1\] is not C-contiguous"),
        ([np.eye(2), np.ones(2)], ValueError, r"\[1\] has 1 axes"),
        ([np.eye(2), None], TypeError, r"\[1\] is not a NumPy array"),
        ([np.eye(2, dtype=int), np.eye(2)], TypeError, r"\[0\] has dtype int64"),
        ({0: np.eye(2), 1: np.eye(2)}, TypeError, "is not a list or tuple"),
        (np.ones((2, 2, 2)), TypeError, "is not a list or tuple"),
        (None, TypeError, "is not a list or tuple"),
    ],
)
def test_errors_of_descent_name_bad_weights(core, entry, weights, error, text):
    with pytest.raises(error, match=text):
        getattr(core, entry)(weights, ARGUMENTS[entry]())


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"values": [np.zeros((4, 2))]}, (ValueError, IndexError), None),
        ({"values": [np.zeros((4, 2)), np.zeros((4, 1))]}, ValueError, r"errors\[1\] .* wanted \(4, 1\)"),
        ({"values": two(np.zeros((4, 3)))}, ValueError, r"values\[0\] has the wrong shape, \(4, 3\)"),
        ({"values": [np.zeros((4, 2)), np.zeros((3, 2))]}, ValueError, r"values\[1\] has the wrong shape"),
        ({"values": [np.zeros((4, 2), np.float32)] * 2}, TypeError, r"values\[0\] has dtype float32"),
        ({"values": [np.zeros((4, 2)), None]}, TypeError, r"values\[1\] is not a NumPy array"),
        ({"errors": [np.zeros((4, 2))]}, (ValueError, IndexError), None),
        ({"errors": two(np.zeros((4, 1)))}, ValueError, r"errors\[0\] has the wrong shape"),
        ({"signs": [np.zeros((4, 2), np.float32)] * 2}, TypeError, r"signs\[0\] has dtype float32"),
        ({"branches": [np.zeros((4, 2))] * 2}, TypeError, r"branches\[0\] has dtype float64"),
        ({"clusters": two(np.zeros((2, 2), np.int64))}, ValueError, r"clusters\[0\] has the wrong shape"),
        ({"tracking": two(np.zeros((4, 3)))}, ValueError, r"tracking\[0\] has the wrong shape"),
        ({"tracker": {}}, KeyError, None),
        ({"tracker": core_of_package.TRACKER_DEFAULTS | {"mode": "none"}}, ValueError, "mode is 'none'"),
        ({"initial": [np.ones((2, 2))]}, ValueError, "initial has 1 values; wanted 2"),
        ({"initial": [np.ones((3, 2))] * 2}, ValueError, "origin"),
        ({"initial": [np.ones((2, 2), np.float32)] * 2}, TypeError, r"initial\[0\] has dtype float32"),
        ({"left": [np.zeros((4, 2, 2))]}, (ValueError, IndexError), None),
        ({"left": two(np.zeros((4, 2, 1)))}, ValueError, r"left\[0\] has the wrong shape"),
        ({"right": []}, (ValueError, IndexError), None),
        ({"right": two(np.zeros((4, 2)))}, ValueError, r"right\[0\] has 2 axes"),
        ({"snapshots": []}, (ValueError, IndexError), None),
        ({"snapshots": two(np.zeros((3, 2, 2)))}, ValueError, r"snapshots\[0\] has the wrong shape"),
        ({"values": None}, TypeError, None),
    ],
)
def test_errors_name_bad_records_of_the_dense_engine(core, changes, error, text):
    failing(core, "dense_descent", changes, error, text)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"families": [family(coupling=0.0, rho=[0.5])]}, ValueError, "rho_records has the wrong shape"),
        (
            {"families": [family(rho=[0.5])], "rho_records": np.zeros((4, 1))},
            ValueError,
            "does not run through all layers",
        ),
        (
            {"families": [family(1, coupling=0.0)]},
            ValueError,
            r"begins with layer \[1\] and runs through 2 of",
        ),
        ({"families": [family(-1, coupling=0.0)]}, ValueError, r"begins with layer \[-1\]"),
        ({"families": [family(2**62, coupling=0.0)]}, ValueError, "there are 2"),
        ({"families": [family(2**63 - 1, coupling=0.0)]}, ValueError, "there are 2"),
        ({"families": [(0, 3.0)]}, TypeError, r"families\[0\] is of type tuple; wanted dict"),
        ({"families": [{"first": 0}]}, KeyError, "multiplicity"),
        (
            {"observed": ((np.zeros(3, int), np.zeros(0, np.int32), np.zeros(0)),) * 2},
            ValueError,
            "not on observations",
        ),
        ({"families": None}, TypeError, None),
        ({"core_records": [np.zeros((4, 2, 2))]}, (ValueError, IndexError), None),
        ({"core_records": two(np.zeros((3, 2, 2)))}, ValueError, r"core_records\[0\] has the wrong shape"),
        ({"core_records": two(np.zeros((4, 2, 3)))}, ValueError, r"core_records\[0\] has the wrong shape"),
        ({"core_records": [np.zeros((4, 2, 2), np.float32)] * 2}, TypeError, r"core_records\[0\] has dtype"),
        ({"rho_records": np.zeros((4, 1))}, ValueError, "rho_records has the wrong shape"),
        ({"rho_records": np.zeros((2, 4))}, ValueError, "rho_records has the wrong shape"),
        ({"rho_records": np.zeros((4, 2), np.float32)}, TypeError, "rho_records has dtype float32"),
        ({"rho_records": freeze(np.zeros((4, 2)))}, ValueError, "rho_records is read-only"),
    ],
)
def test_errors_name_bad_records_of_the_reduced_engine(core, changes, error, text):
    failing(core, "reduced_descent", changes, error, text)


# Batches.


def test_a_valid_batch_finishes(core):
    assert call_batch_descent(core) == [("finished", 4, 0)] * 3


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"target": np.ones((3, 2, 3))}, ValueError, "target has shape"),
        ({"target": np.ones((2, 2, 2))}, ValueError, "target has shape"),
        ({"target": np.ones((3, 2, 2), np.float32)}, TypeError, "target has dtype float32"),
        ({"target": np.ones((2, 2))}, ValueError, "target has 2 axes"),
        ({"input_gram": np.ones((3, 2, 2))}, ValueError, "input_factor"),
        ({"input_gram": np.ones((2, 2, 2))}, ValueError, "input_gram"),
        ({"input_gram": np.ones((3, 2, 2)), "input_factor": np.ones((3, 2, 3))}, ValueError, "input_factor"),
        ({"input_gram": np.ones((3, 2, 2)), "input_factor": np.ones((3, 2, 1))}, ValueError, "factor_target"),
        ({"families": [{"first": 0, "length": 3}]}, ValueError, "famil"),
        ({"families": [{"first": -1, "length": 2}]}, ValueError, "famil"),
        ({"families": [{"first": 2**62, "length": 2}]}, ValueError, "famil"),
        ({"families": [{"first": 2**63 - 1, "length": 2}]}, ValueError, "begins with layer"),
        ({"families": [{"first": 0, "length": 1}]}, ValueError, "rho"),
        ({"families": []}, ValueError, "rho"),
        ({"families": 3}, TypeError, None),
        ({"rho": np.ones((3, 3))}, ValueError, "rho has shape"),
        ({"multiplicity": np.ones((3, 2))}, ValueError, "multiplicity has shape"),
        ({"coupling": np.ones((2, 1))}, ValueError, "coupling has shape"),
        ({"learning_rate": np.ones((3, 1))}, ValueError, "learning_rate has shape"),
        ({"weight_decay": np.ones((1, 2))}, ValueError, "weight_decay has shape"),
        ({"momentum": np.ones((3, 3))}, ValueError, "momentum has shape"),
        ({"loss_scale": np.ones((3, 2))}, ValueError, "loss_scale has shape"),
        ({"loss_floor": np.ones((2, 1))}, ValueError, "loss_floor has shape"),
        ({"steps": -1}, ValueError, "steps"),
        ({"steps": 2**62}, ValueError, None),
        ({"record_every": 0}, ValueError, "record_every"),
        ({"record_every": 1}, ValueError, "core_records"),
        ({"loss": np.zeros((3, 4))}, ValueError, "loss has shape"),
        ({"loss": freeze(np.zeros((3, 5)))}, ValueError, "loss is read-only"),
        ({"core_records": [np.zeros((3, 3, 2, 2))]}, ValueError, "core_records"),
        ({"core_records": [np.zeros((3, 2, 2, 2))] * 2}, ValueError, "core_records"),
        ({"core_records": [np.zeros((3, 3, 2, 3))] * 2}, ValueError, "core_records"),
        ({"rho_records": np.zeros((3, 2, 2))}, ValueError, "rho_records has shape"),
        ({"counts": np.zeros((3, 1), np.int64)}, ValueError, "counts has shape"),
        ({"counts": np.zeros((3, 2), np.int32)}, TypeError, "counts has dtype int32"),
        ({"cores": []}, ValueError, None),
        ({"cores": [np.ones((3, 2, 2)), np.ones((2, 2, 2))]}, ValueError, r"cores\[1\] has shape"),
        ({"cores": [np.ones((3, 2, 2)), np.ones((3, 2, 3))]}, ValueError, r"cores\[1\] has shape"),
        ({"cores": [np.ones((3, 2, 2)), np.ones((3, 2, 2), np.float32)]}, TypeError, "float32"),
    ],
)
def test_errors_of_batch_descent_name_bad_arguments(core, changes, error, text):
    with pytest.raises(error, match=text):
        call_batch_descent(core, **changes)


# Growing bases.


@pytest.mark.parametrize(
    ("basis", "n_basis", "block", "lengths", "error", "text"),
    [
        (np.ones((2, 5)), 1, np.ones((2, 5)), np.ones(2), ValueError, r"the basis has 2 rows; wanted 1 \+ 2"),
        (np.ones((4, 5)), -1, np.ones((2, 5)), np.ones(2), ValueError, "the basis has 4 rows"),
        (np.ones((4, 5)), 2**62, np.ones((2, 5)), np.ones(2), ValueError, "the basis has 4 rows"),
        (np.ones((4, 6)), 1, np.ones((2, 5)), np.ones(2), ValueError, "the basis has shape"),
        (np.ones((4, 5)), 1, np.ones((2, 5)), np.ones(1), ValueError, "lengths"),
        (np.ones((4, 5)), 1, np.ones((2, 5), np.float32), np.ones(2), TypeError, "block has dtype float32"),
        (freeze(np.ones((4, 5))), 1, np.ones((2, 5)), np.ones(2), ValueError, "basis is read-only"),
    ],
)
def test_errors_of_extend_basis_name_bad_arguments(core, basis, n_basis, block, lengths, error, text):
    with pytest.raises(error, match=text):
        core.extend_basis(basis, n_basis, block, 1e-10, lengths)


@settings(deadline=None, max_examples=60)
@given(
    dim=st.integers(1, 20),
    n_basis=st.integers(0, 6),
    k=st.integers(0, 9),
    rank=st.integers(0, 9),
    dtype=st.sampled_from([np.float32, F64]),
    n_threads=st.sampled_from([1, 2, 7]),
    seed=st.integers(0, 99),
)
def test_extend_basis_adds_the_new_directions(core, dim, n_basis, k, rank, dtype, n_threads, seed):
    """Against a singular value decomposition: as many rows as the rank grows, orthonormal, the same span."""
    rng = np.random.default_rng(seed)
    n_basis = min(n_basis, dim)
    start = draw_orthonormal(rng, dim, n_basis).T
    block = rng.standard_normal((k, min(rank, k))) @ rng.standard_normal((min(rank, k), dim))
    block /= max(np.abs(block).max(initial=0.0), 1.0)
    basis = np.zeros((n_basis + k, dim), dtype)
    basis[:n_basis] = start
    eps = np.finfo(dtype).eps
    lengths = np.zeros(k)
    added = core.extend_basis(basis, n_basis, block.astype(dtype), 1e3 * eps, lengths, n_threads)
    rows = basis[: n_basis + added].astype(F64)
    assert np.abs(rows @ rows.T - np.eye(len(rows))).max(initial=0.0) <= 32 * eps
    outside = block - (block @ start.T) @ start
    size = np.linalg.svd(outside, compute_uv=False)
    # Directions within rounding of the tolerance may count or not.
    assert np.sum(size > 1e4 * eps) <= added <= np.sum(size > 1e2 * eps)
    assert np.abs(outside - (outside @ rows.T) @ rows).max(initial=0.0) <= 1e4 * eps


# Calls that could crash the interpreter: each in its own process.

NASTY = """
import sys
import numpy as np
sys.path.insert(0, {tests!r})
from helpers.core_calls import ARGUMENTS, ENTRIES, identity_layers
from helpers.core_modules import MODULES

core = MODULES[sys.argv[1]]
{body}
"""

NASTY_CALLS = {
    # steps + 1 leaves 64 bits, and must not pass for a small number of records.
    "most steps": "call(entry, steps=2**63 - 1)",
    "most steps, few records": "call(entry, steps=2**63 - 1, record_every=2**63 - 1)",
    "many steps": "call(entry, steps=2**40)",
    "snapshots backwards": "call(entry, snapshot_every=-1)",
    "snapshots far apart": "call(entry, snapshot_every=2**63 - 1)",
    "empty everything": "call(entry, weights=[np.empty((0, 0))] * 2, target=np.empty((0, 0)))",
    "no inputs": "call(entry, weights=[np.empty((2, 0)), np.eye(2)], target=np.empty((2, 0)))",
    "nothing inside": "call(entry, weights=[np.empty((0, 2)), np.empty((2, 0))])",
    "one array for all": "call(entry, weights=[shared, shared], target=shared)",
    "NaN": "call(entry, weights=[np.full((2, 2), np.nan)] * 2)",
    "infinite rates": "call(entry, learning_rate=[np.inf, np.nan])",
    "odd records": "call(entry, loss=np.zeros((4, 1)), counts=np.zeros((3, 3), np.int64))",
    "a list that shrinks": "call(entry, on_record=lambda *a: weights.clear(), weights=weights)",
    "arguments that go away": "call(entry, on_record=lambda *a: arguments.clear())",
    "a call within a call": "call(entry, on_record=lambda *a: call(entry) and None)",
}


@pytest.mark.parametrize("name", NASTY_CALLS)
def test_invalid_calls_do_not_crash_the_interpreter(name, core_modules, run_python):
    """They return or raise, and the process does not crash. All levels share this code: test the best."""
    body = f"""
arguments = {{}}

def call(entry, weights=None, **changes):
    arguments.update(ARGUMENTS[entry](), **changes)
    return getattr(core, entry)(identity_layers() if weights is None else weights, arguments)

for entry in ENTRIES:
    shared, weights = np.eye(2), identity_layers()
    try:
        {NASTY_CALLS[name]}
    except (ValueError, TypeError, MemoryError, RuntimeError, KeyError) as error:
        print(type(error).__name__, error)
    call(entry)
print('alive')
"""
    level = list(core_modules)[-1]
    program = NASTY.format(tests=str(Path(__file__).parent), body=body)
    assert run_python(program, level).endswith("alive\n")


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_products_of_random_shapes_raise_or_fit(core, data):
    def array():
        shape = data.draw(st.lists(st.integers(0, 3), min_size=0, max_size=3))
        dtype = data.draw(st.sampled_from([np.float32, F64, np.int64]))
        return np.ones(shape, dtype)

    a, b, out = array(), array(), array()
    flags = data.draw(st.tuples(st.booleans(), st.booleans()))
    before = out.copy()
    fits = (
        a.ndim == b.ndim == out.ndim == 2
        and a.dtype == b.dtype == out.dtype != np.int64
        and (a.T if flags[0] else a).shape[1] == (b.T if flags[1] else b).shape[0]
        and out.shape == ((a.T if flags[0] else a).shape[0], (b.T if flags[1] else b).shape[1])
    )
    if fits:
        core.multiply(a, flags[0], b, flags[1], out)
        np.testing.assert_array_equal(out, (a.T if flags[0] else a) @ (b.T if flags[1] else b))
    else:
        with pytest.raises((TypeError, ValueError)):
            core.multiply(a, flags[0], b, flags[1], out)
        np.testing.assert_array_equal(out, before)


def test_messages_contain_the_shapes(core):
    with pytest.raises(ValueError, match=re.escape("target has shape (2, 3); wanted (2, 2)")):
        call_descent(core, "dense_descent", target=np.ones((2, 3)))
