# SPDX-License-Identifier: MIT
"""Checks and conversions of arguments: arrays, numbers, choices."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlnfast._support import arrays as _arrays
from dlnfast._support.arrays import (
    as_matrix,
    as_vector,
    check_count,
    check_scale,
    is_finite,
    per_layer,
    random_generator,
)
from dlnfast._support.errors import CopyWarning, ShapeError

SIZES = st.sampled_from([1, 2, 3, 5, 7, 11, 13])


def test_big_endian_floats_are_converted():
    for dtype in (np.float32, np.float64):
        values = np.arange(6, dtype=dtype).reshape(2, 3)
        result = as_matrix(values.astype(values.dtype.newbyteorder(">")), "W")
        assert result.dtype == dtype
        np.testing.assert_array_equal(result, values)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_contiguous_floats_are_not_copied(dtype):
    matrix = np.ones((3, 5), dtype=dtype)
    assert as_matrix(matrix, "W") is matrix
    assert as_vector(matrix[1], "s").base is matrix
    matrix.flags.writeable = False
    assert as_matrix(matrix, "W") is matrix


@settings(deadline=None)
@given(
    rows=SIZES,
    columns=SIZES,
    seed=st.integers(0, 99),
    dtype=st.sampled_from([np.float32, np.float64, np.uint8, np.int64, np.bool_]),
    layout=st.sampled_from(["C", "F", "strided", "reversed", "read-only", "list"]),
)
def test_any_layout_gives_the_same_c_contiguous_values(rows, columns, seed, dtype, layout):
    values = np.random.default_rng(seed).integers(0, 2, (rows, columns)).astype(dtype)
    given_as = {
        "C": values.copy(),
        "F": np.asfortranarray(values),
        "strided": np.repeat(np.repeat(values, 2, axis=0), 3, axis=1)[::2, ::3],
        "reversed": values[::-1, ::-1].copy()[::-1, ::-1],
        "read-only": values.copy(),
        "list": values.tolist(),
    }[layout]
    if layout == "read-only":
        given_as.flags.writeable = False
    result = as_matrix(given_as, "W", shape=(rows, columns))
    assert result.flags.c_contiguous
    assert result.dtype == (dtype if dtype in (np.float32, np.float64) and layout != "list" else np.float64)
    np.testing.assert_array_equal(result, values)


def test_arrays_are_converted_to_the_requested_dtype():
    assert as_matrix(np.ones((2, 2), np.float32), "W", dtype=np.float64).dtype == np.float64
    assert as_matrix(np.ones((2, 2)), "W", dtype=np.float32).dtype == np.float32


@pytest.mark.parametrize(
    "bad", [np.ones((2, 2), np.float16), np.ones((2, 2), complex), np.full((2, 2), "a"), [[None]], [[1j]]]
)
@pytest.mark.parametrize("dtype", [None, np.float64])
def test_unsupported_dtypes_are_type_errors(bad, dtype):
    with pytest.raises(TypeError, match=r"W \(weights\)"):
        as_matrix(bad, "W", symbol="weights", dtype=dtype)


@pytest.mark.parametrize("bad", [3.0, [1.0], np.ones((2, 2, 2)), np.ones((3, 2)), [[1.0, 2.0], [3.0]], []])
def test_wrong_shapes_are_shape_errors(bad):
    with pytest.raises(ShapeError, match=r"^W "):
        as_matrix(bad, "W", shape=(2, None))


def test_a_shape_error_has_the_actual_and_the_wanted_shape():
    with pytest.raises(ShapeError, match=r"target \(Phi\) has shape \(2, 3\); wanted \(any, 4\)"):
        as_matrix(np.ones((2, 3)), "target", symbol="Phi", shape=(None, 4))
    with pytest.raises(ShapeError, match=r"s has shape \(2,\); wanted \(3,\)"):
        as_vector([1.0, 2.0], "s", length=3)
    with pytest.raises(ShapeError, match=r"s has shape \(1, 2\); wanted a vector"):
        as_vector([[1.0, 2.0]], "s")


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty_arrays_are_accepted(shape):
    with pytest.raises(ShapeError, match="empty"):
        as_matrix(np.ones(shape), "W")
    assert as_matrix(np.ones(shape), "W", empty=True).shape == shape


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_that_are_not_finite_are_located(value, dtype):
    matrix = np.ones((3, 4), dtype)
    matrix[1, 2] = value
    with pytest.raises(ValueError, match=rf"W has a value that is not finite: {value} at \(1, 2\)"):
        as_matrix(matrix, "W")
    assert as_matrix(matrix, "W", finite=False) is matrix


def test_large_finite_values_are_finite_though_their_sum_is_not():
    assert is_finite(np.full(10, np.finfo(np.float64).max))
    assert is_finite(np.full(10, np.finfo(np.float32).max, np.float32))
    assert not is_finite(np.array([np.inf, -np.inf]))


def test_large_copies_warn_the_caller_of_the_public_function(monkeypatch):
    def public(W):
        return as_matrix(W, "W")

    monkeypatch.setattr(_arrays, "LARGE_COPY_BYTES", 100)
    large = np.ones((4, 8))
    with pytest.warns(CopyWarning, match="W: 0 MB copied") as record:
        public(large.T)
    assert record[0].filename == __file__
    assert record[0].lineno > public.__code__.co_firstlineno + 1  # the call of `public`, not its body
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_matrix(large, "W")
        as_matrix(large[:1, :8:2], "W")
        as_matrix(large.tolist(), "W")


def test_check_count_returns_integers():
    assert check_count(np.int32(3), "steps") == 3
    assert check_count(0, "steps", minimum=0) == 0


def test_check_count_refuses_small_integers_and_other_types():
    with pytest.raises(ValueError, match="steps is 0; wanted an integer of at least 1"):
        check_count(0, "steps")
    for bad in (2.0, "3", True, np.True_, None):
        with pytest.raises(TypeError, match="steps is"):
            check_count(bad, "steps")


def test_check_scale_returns_floats():
    assert check_scale(np.float32(0.5), "scale") == 0.5
    assert check_scale(0, "scale") == 0.0


def test_check_scale_refuses_negative_and_infinite_numbers_and_other_types():
    for bad in (np.nan, np.inf, -1.0):
        with pytest.raises(ValueError, match="scale is"):
            check_scale(bad, "scale")
    with pytest.raises(ValueError, match="above 0"):
        check_scale(0.0, "scale", strict=True)
    for bad in ("1", None, True, [1.0, 2.0], 1j):
        with pytest.raises(TypeError, match="scale is"):
            check_scale(bad, "scale")


def test_per_layer_repeats_a_number_and_returns_a_list_as_an_array():
    np.testing.assert_array_equal(per_layer(0.1, "learning_rate", 3), [0.1, 0.1, 0.1])
    np.testing.assert_array_equal(per_layer((1, 2), "learning_rate", 2), [1.0, 2.0])


def test_per_layer_refuses_bad_values_and_lengths():
    with pytest.raises(ShapeError, match=r"learning_rate has 2 values; wanted .* one per layer \(3\)"):
        per_layer([1, 2], "learning_rate", 3)
    with pytest.raises(ValueError, match=r"learning_rate\[1\] is -1"):
        per_layer([1, -1], "learning_rate", 2)
    with pytest.raises(TypeError, match="learning_rate is 'fast'"):
        per_layer("fast", "learning_rate", 2)


def test_random_generator_depends_on_seed_and_stream_only():
    def draw(seed, stream):
        return random_generator(seed, stream).standard_normal(4)

    np.testing.assert_array_equal(draw(0, ("orthogonal", 1)), draw(0, ["orthogonal", 1]))
    uses = [(0, ("orthogonal", 1)), (0, ("orthogonal", 2)), (1, ("orthogonal", 1)), (0, ())]
    uses += [(2**64 - 1, ()), (2**64 - 2, ()), (2**63, ())]  # such seeds are not representable in float64
    assert len({draw(*use).tobytes() for use in uses}) == len(uses)


def test_random_generator_refuses_bad_seeds():
    for bad in (-1, 2**64):
        with pytest.raises(ValueError, match="seed is"):
            random_generator(bad, ("x",))
    for bad in (None, 0.5, True):
        with pytest.raises(TypeError, match="seed is"):
            random_generator(bad, ("x",))
