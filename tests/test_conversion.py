# SPDX-License-Identifier: MIT
"""Every array argument of every public function as every kind of array: the same result, or a typed error.

The calls are those of helpers/public_calls.py, so that a new public function is tested here, too.
"""

from __future__ import annotations

import array
import dataclasses
import decimal
import fractions
import warnings
from collections.abc import Mapping

import numpy as np
import pytest
from helpers.optional_packages import import_pandas, import_sparse, import_torch
from helpers.public_calls import CALLS
from tolerances import tolerance

import dlnfast as dln

# ------------------------------------------------------------------------------------------------ kinds


class Protocol:
    """An object that NumPy reads only through `__array__`, as JAX's arrays."""

    def __init__(self, values):
        self._values = values

    def __array__(self, dtype=None, copy=None):
        return self._values if dtype is None else self._values.astype(dtype)


class Masked(Protocol):
    """An object whose `__array__` is a masked array."""

    def __array__(self, dtype=None, copy=None):
        return masked(self._values)


def masked(a):
    result = np.ma.array(a, copy=True)
    result[(-1,) * a.ndim] = np.ma.masked
    return result


def tensor(a, **options):
    return import_torch().tensor(a, **options)


def table(a):
    return import_pandas().DataFrame(a) if a.ndim == 2 else import_pandas().Series(a)


def nullable(a):
    return table(a).astype("Float64" if a.dtype.kind == "f" else "Int64")


def arrow(a):
    pytest.importorskip("pyarrow")
    return table(a).astype("double[pyarrow]" if a.dtype.kind == "f" else "int64[pyarrow]")


def with_na(a):
    return nullable(a).mask(np.ma.getmaskarray(masked(a)))


def negated(a):
    """Return a tensor whose sign is a bit of its view."""
    return import_torch()._neg_view(-tensor(a))


#: Kinds that give the result of the plain array; a kind is left out where an array has no such form.
SAME = {
    "masked array without masked entries": lambda a: np.ma.array(a),
    "list of masked rows": lambda a: [np.ma.array(row) for row in a] if a.ndim == 2 else None,
    "np.matrix": lambda a: a.view(np.matrix) if a.ndim == 2 else None,
    "other byte order": lambda a: a.astype(a.dtype.newbyteorder()),
    "memoryview": lambda a: memoryview(np.ascontiguousarray(a)),
    "array.array": lambda a: array.array("d" if a.dtype.kind == "f" else "q", a) if a.ndim == 1 else None,
    "read only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "protocol": lambda a: Protocol(a),
    "tensor": lambda a: tensor(a),
    "tensor with gradient": lambda a: tensor(a, requires_grad=True) if a.dtype.kind == "f" else None,
    "part of a graph": lambda a: tensor(a, requires_grad=True) * 1 if a.dtype.kind == "f" else None,
    "negated tensor": lambda a: negated(a) if a.dtype.kind == "f" else None,
    "list of tensors": lambda a: list(tensor(a, requires_grad=a.dtype.kind == "f")),
    "table": lambda a: table(a) if a.ndim < 3 else None,
    "table of nullable type": lambda a: nullable(a) if a.ndim < 3 else None,
    "table of pyarrow type": lambda a: arrow(a) if a.ndim < 3 else None,
}

#: Values that are not arrays of real numbers: refused with the name of the argument.
REFUSED = {
    "complex": lambda a: a + 1j,
    "complex tensor": lambda a: tensor(a + 1j),
    "Decimal": lambda a: np.vectorize(lambda x: decimal.Decimal(float(x)), otypes=[object])(a),
    "Fraction": lambda a: np.vectorize(lambda x: fractions.Fraction(float(x)), otypes=[object])(a),
    "text": lambda a: a.astype(str),
    "dates": lambda a: np.zeros(a.shape, "M8[s]"),
    "durations": lambda a: np.zeros(a.shape, "m8[s]"),
    "records": lambda a: np.zeros(a.shape, "i4,f8"),
    "no axis": lambda a: np.array(0.5),
    "tensor without values": lambda a: tensor(a).to("meta"),
    "sparse": lambda a: import_sparse().csr_array(a) if a.ndim == 2 else import_sparse().coo_array(a),
    "sparse matrix": lambda a: import_sparse().csc_matrix(a) if a.ndim == 2 else None,
    "sparse tensor": lambda a: tensor(a).to_sparse(),
    "table of text": lambda a: table(a).astype(str).astype(object) if a.ndim < 3 else None,
}

#: Missing values: refused, unless the argument is in `MISSING`.
INCOMPLETE = {
    "masked": masked,
    "list of masked rows": lambda a: [masked(row) for row in a] if a.ndim == 2 else None,
    "masked by protocol": lambda a: Masked(a),
    "table with NA": lambda a: with_na(a) if a.ndim < 3 else None,
    "masked tensor": lambda a: masked_tensor(a),
}


def masked_tensor(a):
    maker = pytest.importorskip("torch.masked")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return maker.masked_tensor(tensor(a), tensor(~np.ma.getmaskarray(masked(a))))


# ------------------------------------------------------------------------------------------- the arguments

#: Lists that are read number by number, none of them an array.
SCALARS = {"shape", "widths", "axes", "steps"}


def plain(value):
    """Return an argument as an array, None where it is not an array."""
    if isinstance(value, np.ndarray) and value.ndim and value.dtype.kind in "fiu":
        return value
    if isinstance(value, (list, range)) and len(value) and not isinstance(value[0], (np.ndarray, str, tuple)):
        found = np.asarray(value)
        return found if found.ndim and found.dtype.kind in "fiu" else None
    return None


def slots():
    """Yield every array argument of the table: function, argument, index in a list or None."""
    for name, make in CALLS.items():
        try:
            _, arguments = make()
        except (ModuleNotFoundError, pytest.skip.Exception):
            continue
        for key, value in arguments.items():
            if key in SCALARS:
                continue
            if plain(value) is not None:
                yield name, key, None
            elif isinstance(value, list) and value and plain(value[0]) is not None:
                yield name, key, 0
                yield name, key, len(value) - 1


SLOTS = list(slots())


def call_with_change(name, key, index, change):
    """Make a call with one argument changed; return its numbers, None if the array has no such form."""
    function, arguments = CALLS[name]()
    value = arguments[key]
    plain_value = plain(value if index is None else value[index])
    changed = change(plain_value)
    if changed is None:
        return None
    arguments[key] = changed if index is None else [changed if i == index else x for i, x in enumerate(value)]
    return flat(function(**arguments))


#: Attributes that differ from run to run.
TIMES = ("seconds", "wall_time", "fit_seconds_")


def flat(result, depth=0):
    """Return all numbers of a result as a list of arrays."""
    if isinstance(result, (bool, int, float, np.generic)):
        return [np.asarray(result)]
    if isinstance(result, np.ndarray):
        return [result]
    if isinstance(result, dln.Trajectory):
        return [result.loss, *result.all_weights()]
    if result is None or isinstance(result, (str, bytes, type, np.dtype)) or callable(result) or depth > 4:
        return []
    if isinstance(result, Mapping):
        return [x for key in sorted(result, key=str) for x in flat(result[key], depth + 1)]
    if isinstance(result, (list, tuple)):
        return [x for item in result for x in flat(item, depth + 1)]
    if dataclasses.is_dataclass(result):
        attributes = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    else:
        attributes = getattr(result, "__dict__", {})
    return [x for key in sorted(attributes) if key not in TIMES for x in flat(attributes[key], depth + 1)]


def assert_same_results(found, wanted):
    """Compare results of the same values; other memory layouts may sum in another order."""
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        if one.dtype.kind in "fc":
            # At least 1, the order of the arguments: some numbers are rounding errors, as of whitening.
            scale = np.max(np.abs(other), initial=1.0, where=np.isfinite(other))
            np.testing.assert_allclose(one, other, rtol=0, atol=tolerance(np.float64, 40) * scale)
        else:
            np.testing.assert_array_equal(one, other)


# ------------------------------------------------------------------------------------------- the table

#: Arguments that may be a single number as well.
NUMBERS = {
    ("Adaptive", "ratios"),
    ("Adaptive", "curvature"),
    ("theory.escape_time", "fraction"),
    ("theory.mode_strength", "time"),
    ("theory.rho_flow", "time"),
    ("train_batch", "learning_rate"),
}
#: Arguments in which missing values have a meaning: they are not known. Their values: see below.
MISSING = {
    ("Completion", "values"),
    ("Completion.from_dense", "matrix"),
    ("MatrixCompletion.fit", "y"),
    ("MatrixCompletion.fold_in", "y"),
    ("MatrixCompletion.partial_fit", "y"),
    ("MatrixCompletion.rmse", "y"),
    ("MatrixCompletion.score", "y"),
}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def assert_refused_or_same(name, key, index, change, wanted=None):
    """Assert that a call raises a typed error that names the argument, or returns the wanted result."""
    try:
        found = call_with_change(name, key, index, change)
    except (TypeError, ValueError) as error:
        assert key in str(error)
    else:
        if found is not None:
            assert wanted is not None, "it is accepted"
            assert_same_results(found, wanted)


@pytest.mark.parametrize(("name", "key", "index"), SLOTS)
def test_every_kind_of_array_has_the_same_values(name, key, index, elsewhere):
    wanted = call_with_change(name, key, index, lambda a: a)
    for kind, change in SAME.items():
        found = call_with_change(name, key, index, change)
        if found is not None:
            try:
                assert_same_results(found, wanted) if wanted else None
            except AssertionError as error:
                raise AssertionError(f"as {kind}: {error}") from error


@pytest.mark.parametrize(("name", "key", "index"), SLOTS)
def test_values_that_are_not_arrays_of_real_numbers_are_refused_by_name(name, key, index, elsewhere):
    wanted = call_with_change(name, key, index, lambda a: a)
    for kind, change in REFUSED.items():
        if kind == "no axis" and (name, key) in NUMBERS:
            continue
        # Text in pairs is ids; tests/test_recommendations.py has what they mean.
        if "text" in kind and key == "X" and name in ("MatrixCompletion.fit", "MatrixCompletion.partial_fit"):
            continue
        # Single numbers may have Python's own types, and labels may be strings.
        harmless = (name, key) in NUMBERS or key == "labels"
        try:
            assert_refused_or_same(name, key, index, change, wanted if harmless else None)
        except AssertionError as error:
            raise AssertionError(f"as {kind}: {error}") from error


@pytest.mark.parametrize(("name", "key", "index"), [s for s in SLOTS if s[:2] not in MISSING])
def test_missing_values_are_refused_by_name(name, key, index, elsewhere):
    for kind, change in INCOMPLETE.items():
        try:
            assert_refused_or_same(name, key, index, change)
        except AssertionError as error:
            raise AssertionError(f"as {kind}: {error}") from error


def test_half_precision_tensors_are_read_as_float32(elsewhere):
    for name, key, index in SLOTS:
        for cast in ("bfloat16", "half"):
            if plain_of(name, key, index).dtype.kind != "f" or key in ("times", "time"):
                continue

            def rounded(a, cast=cast):
                return getattr(tensor(a), cast)()

            def exact(a, rounded=rounded):
                return rounded(a).float().numpy()

            try:
                wanted = call_with_change(name, key, index, exact)
            except (TypeError, ValueError) as error:  # of rounded frames and layers of mixed precision
                with pytest.raises(type(error)):
                    call_with_change(name, key, index, rounded)
                continue
            assert_same_results(call_with_change(name, key, index, rounded), wanted) if wanted else None


def plain_of(name, key, index):
    value = CALLS[name]()[1][key]
    return plain(value if index is None else value[index])


# ------------------------------------------------------------------------------- where values may be missing

PHI = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
KNOWN = np.array([[True, False, True], [True, True, False]])
NAN = np.where(KNOWN, PHI, np.nan)


def incomplete_matrices():
    mask = np.ma.array(np.where(KNOWN, PHI, 1e9), mask=~KNOWN)
    yield "masked", mask
    yield "masked integers", mask.astype(np.int64)
    yield "list of masked rows", [mask[0], mask[1]]
    yield "rows of masked numbers", [list(row) for row in mask]
    yield "NaN", NAN
    yield (
        "NaN and mask",
        np.ma.array(np.where([[1, 1, 1], [1, 1, 0]], PHI, np.nan), mask=[[0, 1, 0], [0, 0, 0]]),
    )
    try:
        import import_pandas as pd
    except ModuleNotFoundError:
        return
    yield "table", pd.DataFrame(NAN)
    yield "table with NA", pd.DataFrame(PHI).astype("Float64").mask(~KNOWN)
    yield "table of integers with NA", pd.DataFrame(PHI).astype("Int64").mask(~KNOWN)
    yield "one column of a nullable type", pd.DataFrame(NAN).astype({1: "Float32"})


@pytest.mark.parametrize(("kind", "matrix"), list(incomplete_matrices()))
def test_missing_values_of_a_matrix_are_unobserved_entries(kind, matrix):
    wanted = dln.Completion(*np.nonzero(KNOWN), PHI[KNOWN], PHI.shape)
    problem = dln.Completion.from_dense(matrix)
    assert_same_results(flat(problem.to_arrays()), flat(wanted.to_arrays()))
    assert problem.shape == (2, 3)
    estimators = [dln.MatrixCompletion(steps=5, rank=1).fit(X) for X in (matrix, NAN)]
    assert_same_results([estimators[0].predict()], [estimators[1].predict()])
    for measure in ("score", "rmse"):
        assert getattr(estimators[0], measure)(matrix) == getattr(estimators[0], measure)(NAN)


def test_a_mask_and_missing_values_both_count():
    matrix = np.ma.array(PHI, mask=[[0, 1, 0], [0, 0, 0]])
    problem = dln.Completion.from_dense(matrix, KNOWN)
    np.testing.assert_array_equal(problem.values, PHI[KNOWN])
    with pytest.raises(ValueError, match=r"matrix \(known entries\) has a value that is not finite"):
        dln.Completion.from_dense(matrix, np.ones_like(KNOWN))
    with pytest.raises(ValueError, match="mask has missing values: 1 masked or NA"):
        dln.Completion.from_dense(PHI, np.ma.array(KNOWN, mask=[[0, 0, 0], [0, 0, 1]]))
    np.testing.assert_array_equal(dln.Completion.from_dense(PHI, tensor(KNOWN)).values, PHI[KNOWN])


PAIRS = np.array([[0, 0], [0, 2], [1, 0], [1, 1], [3, 2]])
RATINGS = np.array([1.0, 3.0, 4.0, 5.0, 999.0])


def incomplete_ratings():
    yield np.ma.array(RATINGS, mask=RATINGS > 100)
    yield [*RATINGS[:-1], np.ma.masked]
    try:
        import import_pandas as pd
    except ModuleNotFoundError:
        return
    yield pd.Series([*RATINGS[:-1], None], dtype="Float64")
    yield pd.array([*RATINGS[:-1].astype(int), None], dtype="Int64")


@pytest.mark.parametrize("ratings", list(incomplete_ratings()))
def test_ratings_that_are_missing_are_left_out(ratings):
    problem = dln.Completion(PAIRS[:, 0], PAIRS[:, 1], ratings, (4, 3))
    assert problem.n_observations == 4
    assert problem.empty_rows.tolist() == [2, 3]
    np.testing.assert_array_equal(problem.values, RATINGS[:-1])
    fitted, wanted = (
        dln.MatrixCompletion(steps=5, rank=1, entries=dln.EntryOptions((4, 3))).fit(*arguments)
        for arguments in ((PAIRS, ratings), (PAIRS[:-1], RATINGS[:-1]))
    )
    assert_same_results([fitted.predict()], [wanted.predict()])
    assert fitted.score(PAIRS, ratings) == wanted.score(PAIRS[:-1], RATINGS[:-1])
    assert fitted.rmse(PAIRS, ratings) == wanted.rmse(PAIRS[:-1], RATINGS[:-1])
    # A pair without a rating still counts for the number of rows.
    assert dln.MatrixCompletion(steps=2, rank=1).fit(PAIRS, ratings).shape_ == (4, 3)


def test_pairs_with_a_missing_index_are_refused():
    pairs = np.ma.array(PAIRS, mask=np.arange(10).reshape(5, 2) == 3)
    fitted = dln.MatrixCompletion(steps=2, rank=1).fit(PAIRS, RATINGS)
    for ask in (lambda: fitted.predict(pairs), lambda: fitted.fit(pairs, RATINGS)):
        with pytest.raises(ValueError, match=r"X has missing values: 1 masked or NA, the first at \(1, 1\)"):
            ask()
    with pytest.raises(ValueError, match="rows has missing values"):
        dln.Completion(pairs[:, 1], PAIRS[:, 0], RATINGS, (4, 4))
    with pytest.raises(ValueError, match="values has a value that is not finite"):
        dln.Completion(PAIRS[:, 0], PAIRS[:, 1], np.where(RATINGS > 100, np.nan, RATINGS), (4, 3))


# --------------------------------------------------------------------------------------- sparse matrices

FORMATS = ("csr", "csc", "coo", "dia", "bsr", "lil", "dok")


def stored_zeros(form, kind="array"):
    """Return diag(1, 0, 2) of three rows and four columns, the zero stored."""
    made = getattr(import_sparse(), f"coo_{kind}")(([1.0, 0.0, 2.0], ([0, 1, 2], [0, 1, 2])), shape=(3, 4))
    return made.asformat(form)


@pytest.mark.parametrize("kind", ["array", "matrix"])
@pytest.mark.parametrize("form", FORMATS)
def test_stored_zeros_are_entries_in_every_format(form, kind):
    matrix = stored_zeros(form, kind)
    problem = dln.Completion.from_sparse(matrix)
    assert problem.shape == (3, 4)
    np.testing.assert_array_equal(problem.rows, [0, 1, 2])
    np.testing.assert_array_equal(problem.columns, [0, 1, 2])
    np.testing.assert_array_equal(problem.values, [1.0, 0.0, 2.0])
    fitted, wanted = (dln.MatrixCompletion(steps=3, rank=1).fit(X) for X in (matrix, stored_zeros("coo")))
    assert_same_results([fitted.predict()], [wanted.predict()])


@pytest.mark.parametrize("offsets", [(0,), (1, -1), (2, 0, -2), (3,), (-2,), (-5, 0), (9, 1)])
def test_whole_diagonals_are_stored(offsets):
    shape = (3, 4)
    data = np.arange(len(offsets) * 4.0).reshape(len(offsets), 4)  # with a zero
    problem = dln.Completion.from_sparse(import_sparse().dia_array((data + 0, offsets), shape=shape))
    wanted = {
        (j - k, j): data[n, j] for n, k in enumerate(offsets) for j in range(4) if 0 <= j - k < shape[0]
    }
    found = zip(problem.rows.tolist(), problem.columns.tolist(), problem.values.tolist(), strict=True)
    assert {(i, j): value for i, j, value in found} == wanted


@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
def test_sparse_tensors_are_read_as_entries(layout):
    matrix = import_torch().sparse_coo_tensor(
        [[0, 1, 2], [0, 1, 2]], [1.0, 0.0, 2.0], (3, 4), dtype=import_torch().float64, check_invariants=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls CSR a beta
        matrix = getattr(matrix, f"to_sparse_{layout}")().requires_grad_()
    problem = dln.Completion.from_sparse(matrix)
    np.testing.assert_array_equal(problem.values, [1.0, 0.0, 2.0])
    np.testing.assert_array_equal(problem.rows, [0, 1, 2])
    assert_same_results(
        [dln.MatrixCompletion(steps=3, rank=1).fit(matrix).predict()],
        [dln.MatrixCompletion(steps=3, rank=1).fit(stored_zeros("csr")).predict()],
    )


def test_sparse_tensors_with_an_entry_twice_are_refused():
    twice = import_torch().sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 2), check_invariants=True)
    with pytest.raises(ValueError, match=r"\(0, 1\) occurs twice: 1 by entry 0 and 2"):
        dln.Completion.from_sparse(twice)
    hybrid = import_torch().sparse_coo_tensor(
        [[0, 1]], import_torch().ones(2, 3), (2, 3), check_invariants=True
    )
    with pytest.raises(TypeError, match="matrix is a hybrid sparse tensor"):
        dln.Completion.from_sparse(hybrid)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: import_sparse().coo_array(np.ones(3)), dln.ShapeError, r"has shape \(3,\); wanted a matrix"),
        (
            lambda: import_sparse().coo_array(np.ones((2, 3, 4))),
            dln.ShapeError,
            r"has shape \(2, 3, 4\); wanted a m",
        ),
        (lambda: import_sparse().csr_array(np.eye(2) * 1j), TypeError, "has dtype complex128"),
        (
            lambda: import_sparse().csr_array([[np.nan, 1.0]]),
            ValueError,
            "has a value that is not finite: nan",
        ),
        (lambda: import_sparse().csr_array((2, 2)), ValueError, "known"),
    ],
)
def test_sparse_matrices_of_another_kind_are_refused_by_name(make, error, text):
    with pytest.raises(error, match=text) as raised:
        dln.Completion.from_sparse(make())
    assert "matrix" in str(raised.value) or "no entry is known" in str(raised.value)
    with pytest.raises(error, match=f"X .*{text}"):
        dln.MatrixCompletion().fit(make())


def test_a_sparse_matrix_is_refused_where_a_dense_one_is_wanted():
    with pytest.raises(TypeError, match=r"matrix is a sparse csr_array; .*Completion\.from_sparse"):
        dln.Completion.from_dense(import_sparse().csr_array(np.eye(3)))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int8, np.bool_])
def test_sparse_measurement_operators_equal_dense_ones(form, dtype):
    operators = (np.random.default_rng(0).integers(-99, 99, (5, 6)) * [[1, 0, 1, 1, 0, 1]]).astype(dtype)
    values = np.arange(5.0)
    found = dln.Sensing(import_sparse().csr_array(operators).asformat(form), values, shape=(2, 3))
    wanted = dln.Sensing(operators.reshape(5, 2, 3), values)
    W = np.random.default_rng(1).standard_normal((2, 3))
    assert_same_results([found.apply(W), found.adjoint(values)], [wanted.apply(W), wanted.adjoint(values)])
    np.testing.assert_allclose(found.density, wanted.density, rtol=tolerance(np.float64, 30))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: import_sparse().csr_array(np.ones((5, 6)) * 1j),
            TypeError,
            "operators .*has dtype complex128",
        ),
        (
            lambda: import_sparse().coo_array(np.ones((5, 2, 3))),
            dln.ShapeError,
            r"operators has shape \(5, 2, 3\)",
        ),
        (lambda: import_sparse().csr_array(np.full((5, 6), np.nan)), ValueError, "operators .*not finite"),
        (
            lambda: np.ma.array(np.ones((5, 2, 3)), mask=np.eye(5, 6).reshape(5, 2, 3)),
            ValueError,
            "operators has",
        ),
        (
            lambda: (np.ma.array(np.ones((5, 2)), mask=np.eye(5, 2)), np.ones((5, 3))),
            ValueError,
            r"operators\[0",
        ),
        (
            lambda: (import_sparse().csr_array(np.ones((5, 2))), np.ones((5, 3))),
            TypeError,
            r"operators\[0\] is a spar",
        ),
    ],
)
def test_measurements_of_another_kind_are_refused_by_name(make, error, text):
    with pytest.raises(error, match=text):
        dln.Sensing(make(), np.arange(5.0), shape=(2, 3))


def test_entries_of_a_sparse_operator_that_are_stored_twice_add_up():
    operators = import_sparse().coo_array(([1.0, 2.0], ([0, 0], [1, 1])), shape=(1, 4))
    problem = dln.Sensing(operators, [1.0], shape=(2, 2))
    np.testing.assert_array_equal(problem.apply([[0.0, 1.0], [0.0, 0.0]]), [3.0])
    assert problem.density == 9.0 / 4


# ------------------------------------------------------------------------------------- integers and labels

HUGE = 2**63 + 5


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: dln.MatrixCompletion().fit(np.stack([x, x], axis=1), [1.0, 2.0]), "X"),
        (lambda x: dln.MatrixCompletion(rank=1).fit([[0, 0]], [1.0]).predict(np.stack([x, x], axis=1)), "X"),
        (lambda x: dln.Completion(x, [0, 1], [1.0, 2.0], (2, 2)), "rows"),
        (lambda x: dln.Completion([0, 1], x, [1.0, 2.0], (2, 2)), "columns"),
        (lambda x: dln.Completion([0], [1], [1.0], (2, 2)).predict(np.eye(2), [0, 1], x), "columns"),
        (lambda x: dln.one_hot(x), "labels"),
        (lambda x: dln.one_hot([0], classes=x), "classes"),
        (lambda x: dln.Problem.from_data(np.eye(2), x), "Y"),
        (lambda x: dln.SufficientStatistics().add(np.eye(2), x), "Y"),
    ],
)
def test_integers_beyond_int64_are_refused_with_their_value(call, name):
    with pytest.raises(
        ValueError, match=rf"{name}.* is {HUGE} at \([01].*; wanted integers of at most 2\*\*63"
    ):
        call(np.array([0, HUGE], dtype=np.uint64))
    with pytest.raises((TypeError, ValueError), match=name):
        call(np.array([0, 2**70], dtype=object))


LABELS = np.array([0, 2, 2, 0])


def labels_of_every_kind():
    yield "unmasked", np.ma.array(LABELS)
    yield "uint64", LABELS.astype(np.uint64)
    yield "other byte order", LABELS.astype(">i2")
    yield "list of numbers", [np.int8(label) for label in LABELS]
    yield "memoryview", memoryview(LABELS)
    yield "protocol", Protocol(LABELS)
    try:
        import import_torch
    except ModuleNotFoundError:
        pass
    else:
        yield "tensor", import_torch.tensor(LABELS)
        yield "tensor of bytes", import_torch.tensor(LABELS).to(import_torch.uint8)
        yield "list of tensors", list(import_torch.tensor(LABELS))
    try:
        import import_pandas as pd
    except ModuleNotFoundError:
        return
    yield "series", pd.Series(LABELS, index=[7, 5, 3, 1])
    yield "nullable series", pd.Series(LABELS, dtype="Int64")
    yield "categorical", pd.Categorical(LABELS)
    yield "series of categories", pd.Series(LABELS, dtype="category")
    yield "index", pd.Index(LABELS)


@pytest.mark.parametrize(("kind", "labels"), list(labels_of_every_kind()))
def test_labels_of_every_kind_are_read(kind, labels):
    X = np.random.default_rng(0).standard_normal((3, 4))
    problem = dln.Problem.from_data(X, labels)
    np.testing.assert_array_equal(problem.labels, LABELS)
    assert problem.classes.tolist() == [0, 2]
    assert_same_results([problem.target], [dln.Problem.from_data(X, LABELS).target])
    assert_same_results([dln.SufficientStatistics().add(X, labels).target], [problem.target])
    np.testing.assert_array_equal(dln.one_hot(labels), dln.one_hot(LABELS))
    assert dln.measures.feature_compression(X, labels) == dln.measures.feature_compression(X, LABELS)


def labels_that_are_missing():
    yield np.ma.array([0, 1, 1, 99], mask=[0, 0, 0, 1])
    yield [0, 1, 1, np.ma.masked]
    try:
        import import_pandas as pd
    except ModuleNotFoundError:
        return
    yield pd.Series([0, 1, 1, None], dtype="Int64")
    yield pd.array([0, 1, 1, None], dtype="Int8")


@pytest.mark.parametrize("labels", list(labels_that_are_missing()))
def test_missing_labels_are_refused(labels):
    X = np.ones((2, 4))
    for ask in (
        lambda: dln.Problem.from_data(X, labels),
        lambda: dln.Problem.from_batches([(X, labels)]),
        lambda: dln.SufficientStatistics().add(X, labels),
        lambda: dln.one_hot(labels),
        lambda: dln.one_hot([0, 1], classes=labels),
        lambda: dln.measures.feature_compression(X, labels),
        lambda: dln.measures.feature_discrimination(X, labels),
    ):
        with pytest.raises(
            ValueError, match=r"(Y|labels|classes).* has missing values: 1 .* first at \(3,\)"
        ):
            ask()


def test_words_in_tables_are_labels_of_measures():
    features = np.random.default_rng(0).standard_normal((3, 4))
    words = import_pandas().Series(["b", "a", "a", "b"])
    for measure in (dln.measures.feature_compression, dln.measures.feature_discrimination):
        assert measure(features, words) == measure(features, ["b", "a", "a", "b"])
        assert measure(features, words.astype("category")) == measure(features, list(words))


# ------------------------------------------------------------------------------------ operators and others


class Operator:
    """A matrix that is defined by its products only."""

    def __init__(self, W, dtype=None, cast=lambda x: x):
        self.W, self.cast, self.shape = W, cast, W.shape
        self.dtype = W.dtype if dtype is None else dtype

    def matmat(self, X):
        return self.cast(self.W @ X)

    def rmatmat(self, Y):
        return self.cast(self.W.T @ Y)


@pytest.mark.parametrize(
    "cast",
    [np.asfortranarray, np.ma.array, lambda x: tensor(x, requires_grad=True), lambda x: table(x), Protocol],
)
def test_operators_may_return_any_kind_of_array(cast):
    W = np.random.default_rng(0).standard_normal((9, 7))
    found = dln.SVDTracker(2).update(Operator(W, cast=cast)).singular_values
    assert_same_results([found], [dln.SVDTracker(2).update(Operator(W)).singular_values])


@pytest.mark.parametrize(
    ("operator", "error", "text"),
    [
        (Operator(np.eye(4) * 1j), TypeError, "W.dtype is complex128; wanted float64 or float32"),
        (Operator(np.eye(4), dtype="int64"), TypeError, "W.dtype is int64"),
        (Operator(np.eye(4), dtype=object()), TypeError, "W.dtype is <object"),
        (Operator(np.eye(4) * 1j, dtype=np.float64), TypeError, r"W\.r?matmat\(X\) has dtype complex128"),
        (Operator(np.eye(4), cast=masked), ValueError, r"W\.r?matmat\(X\) has missing values"),
        (Operator(np.eye(4), cast=lambda x: x.astype(str)), TypeError, r"W\.r?matmat\(X\) has dtype <U"),
        (Operator(np.eye(4), cast=lambda x: None), TypeError, r"W\.r?matmat\(X\) has dtype object"),
    ],
)
def test_operators_of_another_kind_are_refused_by_name(operator, error, text):
    with pytest.raises(error, match=text):
        dln.SVDTracker(2).update(operator)


def test_operators_without_a_type_or_shape_are_refused():
    for missing in ("dtype", "shape"):
        operator = Operator(np.eye(4))
        delattr(operator, missing)
        with pytest.raises(TypeError, match=f"W.* {'without a shape' if missing == 'shape' else 'is None'}"):
            dln.SVDTracker(2).update(operator)


def test_linear_operators_of_scipy_are_read():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    W = np.random.default_rng(0).standard_normal((9, 7))
    found = dln.SVDTracker(2).update(linalg.aslinearoperator(W)).singular_values
    assert_same_results([found], [dln.SVDTracker(2).update(Operator(W)).singular_values])
    with pytest.raises(TypeError, match=r"W\.dtype is complex128"):
        dln.SVDTracker(2).update(linalg.aslinearoperator(W + 1j))


class Capsule:
    """An array that is accessible through DLPack only."""

    def __init__(self, values):
        self._values = values

    def __dlpack__(self, **options):
        return self._values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._values.__dlpack_device__()


class Elsewhere(Capsule):
    """An array on a device that NumPy cannot access."""

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, **options):
        raise BufferError("on the device")


def test_arrays_are_read_by_dlpack():
    assert dln.measures.stable_rank(Capsule(np.diag([1.0, 2.0]))) == 1.25
    with pytest.raises(TypeError, match=r"matrix .* is Elsewhere, which NumPy cannot read"):
        dln.measures.stable_rank(Elsewhere(np.eye(2)))


def test_numbers_of_every_kind_are_read():
    base = {"problem": dln.low_rank_recovery(6, 2), "weights": dln.orthogonal([6] * 4, 0.7), "steps": 3}
    wanted = dln.train(**base, learning_rate=0.25).loss
    rates = [np.float32(0.25), np.array(0.25), fractions.Fraction(1, 4), decimal.Decimal("0.25")]
    rates += [tensor(0.25, requires_grad=True), tensor(0.25).half(), np.ma.array(0.25)]
    rates += [tensor([0.25] * 3, requires_grad=True), import_pandas().Series([0.25] * 3, index=list("abc"))]
    rates += [[tensor(0.25, requires_grad=True)] * 3, memoryview(np.full(3, 0.25)), np.ma.array([0.25] * 3)]
    for rate in rates:
        np.testing.assert_array_equal(dln.train(**base, learning_rate=rate).loss, wanted)
    bad = [np.ma.masked, np.ma.array([0.25] * 3, mask=[0, 0, 1]), [0.25, 0.25, np.ma.masked], tensor(0.25j)]
    bad += [
        tensor(0.25).to("meta"),
        import_pandas().NA,
        import_pandas().DataFrame([[0.25] * 3]),
        import_sparse().coo_array([0.25] * 3),
    ]
    for rate in bad:
        with pytest.raises((TypeError, ValueError), match="learning_rate"):
            dln.train(**base, learning_rate=rate)
    for count in (np.ma.masked, np.ma.array(3, mask=True), tensor(3).to("meta"), tensor(3.0)):
        with pytest.raises(TypeError, match="steps is"):
            dln.train(base["problem"], base["weights"], learning_rate=0.25, steps=count)


def test_pairs_of_numbers_of_every_kind_are_read():
    pairs = [
        (0.25, -0.25),
        np.array([0.25, -0.25]),
        tensor([0.25, -0.25]),
        import_pandas().Series([0.25, -0.25]),
    ]
    wanted, *others = [
        dln.MatrixCompletion(steps=3, rank=1, entries=dln.EntryOptions(weighting=pair))
        .fit(PAIRS, RATINGS)
        .predict()
        for pair in pairs
    ]
    for found in others:
        np.testing.assert_array_equal(found, wanted)
    # The items of a table are the names of its columns.
    for odd in (
        import_pandas().DataFrame([[0.25, -0.25]]),
        np.ma.array([0.25, -0.25], mask=[0, 1]),
        np.eye(2),
    ):
        for name in ("entries.weighting", "biases.penalty", "entries.clip"):
            with pytest.raises((TypeError, ValueError), match=name):
                dln.MatrixCompletion().set_params(**{name.replace(".", "__"): odd}).fit(PAIRS, RATINGS)
    with pytest.raises((TypeError, ValueError), match="shape"):
        dln.Completion([0], [0], [1.0], import_pandas().DataFrame([[1, 1]], columns=[4, 3]))


def test_predictions_of_a_task_may_be_any_kind_of_array():
    from dlnfast._datasets.text import TextTask

    task = TextTask("mnli", ("a", "b", "c"), None, np.array([0, 1, 1]), ("no", "yes"))
    for found in ([0, 1, 0], tensor([0, 1, 0]), import_pandas().Series([0, 1, 0]), np.ma.array([0, 1, 0])):
        assert task.score(found) == pytest.approx(2 / 3, abs=0)
    with pytest.raises(ValueError, match="predictions has missing values"):
        task.score(np.ma.array([0, 1, 0], mask=[0, 0, 1]))
    assert task.take(tensor([2, 0])).first == ("c", "a")
    with pytest.raises(TypeError, match="rows has dtype float64; wanted integers"):
        task.take(np.array([0.0, 1.0]))
