# SPDX-License-Identifier: MIT
"""Data derived from a run: angles, features, reconstruction, files."""

from __future__ import annotations

import gc
import io
import json
import weakref
import zipfile

import numpy as np
import pytest
from helpers.files import without_digest
from helpers.matrices import draw_orthonormal
from helpers.records import with_record
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln
from dlnfast import reference
from dlnfast._trajectory.trajectory import FORMAT_VERSION

F64 = np.float64
DIM, RANK, CLASSES = 12, 3, 4


def square_problem():
    target = dln.low_rank_recovery(DIM, RANK, seed=3).target
    return dln.Problem(dln.LowRank(target.U, [2.0, 1.5, 1.0], target.V))


def wide_problem():
    return dln.classification(CLASSES, 5, seed=3)


def square_weights(scale=0.6, **options):
    return dln.orthogonal([DIM] * 4, scale, seed=4, **options)


def wide_weights(scale=0.6):
    return dln.orthogonal([20, 20, 20, CLASSES], scale, seed=4)


MAKERS = {"square": (square_problem, square_weights, 0.05), "wide": (wide_problem, wide_weights, 3.0)}


def both_engines(kind, steps=60, **options):
    make_problem, make_weights, rate = MAKERS[kind]
    options = {"learning_rate": rate, "steps": steps} | options
    problem, weights = make_problem(), make_weights()
    return (
        dln.train(problem, weights, engine="reduced", **options),
        dln.train(problem, weights, engine="dense", **with_record(options, vectors=True, weights_every=1)),
    )


# Angles.


def separation(run, layer, step):
    """Return the smallest gap between different singular values, relative to the largest."""
    distinct = np.unique(np.round(run.singular_values(layer)[step], 9))
    return np.diff(distinct).min() / distinct[-1] if len(distinct) > 1 else 1.0


@pytest.mark.parametrize("reference_name", ["limit", "first_step"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", MAKERS)
def test_angles_of_both_engines_agree(kind, side, reference_name):
    reduced, dense = both_engines(kind)
    for layer in (1, 2, 3):
        a, b = (run.angles(layer, side, reference_name) for run in (reduced, dense))
        assert a.shape == b.shape == (61, min(dense.widths[layer - 1 : layer + 1]))
        assert np.all((a >= 0) & (a <= np.pi / 2))
        for step in range(2, 61):
            # Singular vectors are known to rounding over the gap of their values, at both ends of an angle.
            gaps = min(separation(dense, layer, step), separation(dense, layer, 1))
            assert np.abs(a[step] - b[step]).max() <= tolerance(F64, DIM, step) / gaps


@pytest.mark.parametrize("kind", MAKERS)
def test_angles_to_reference_vectors(kind):
    reduced, dense = both_engines(kind, steps=30)
    for layer in (1, 2):
        chosen = dense.singular_vectors(layer, "right", 30)
        a, b = (run.angles(layer, "right", chosen) for run in (reduced, dense))
        for step in (10, 20, 30):
            gaps = min(separation(dense, layer, step), separation(dense, layer, 30))
            # An angle of 0 shows rounding itself, that of a block among d vectors.
            assert np.abs(a[step] - b[step]).max() <= 10 * tolerance(F64, DIM, step) / gaps
        assert b[30].max() <= tolerance(F64, DIM**2)  # the norm of a block of vectors


def test_angles_to_the_first_step_are_zero_at_that_step():
    for run in both_engines("square", steps=5):
        angles = run.angles(2, "right", "first_step")
        assert np.all(angles[0] == 0)  # the row that the authors put first
        # The middle block is rotated to its position at step 0: two products.
        assert angles[1].max() <= tolerance(F64, DIM, 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_limit_is_approached_by_smaller_steps(side):
    """Angles to the limit after one step shrink like the step."""
    problem, weights = square_problem(), square_weights()
    largest = []
    for rate in (1e-3, 1e-4, 1e-5):
        run = dln.train(problem, weights, learning_rate=rate, steps=1, engine="reduced")
        largest.append(max(run.angles(layer, side, "limit")[1].max() for layer in (1, 2, 3)))
    assert largest[0] < 0.05
    np.testing.assert_allclose(np.array(largest[1:]) / largest[:-1], 0.1, rtol=0.05)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_limit_equals_the_result_of_tiny_steps(kind):
    make_problem, make_weights, rate = MAKERS[kind]
    tiny = dln.train(
        make_problem(),
        make_weights(),
        learning_rate=1e-6 * rate,
        steps=1,
        engine="dense",
        record=dln.Record(vectors=True),
    )
    for layer in (1, 2, 3):
        for side in ("left", "right"):
            # First order in the step, and rounding over the gaps that it opens, 1e-16 / 1e-7.
            assert tiny.angles(layer, side, "limit")[1].max() < 1e-5


@pytest.mark.parametrize("engine", ["reduced", "dense"])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_limit_vectors_equal_those_after_a_tiny_step(engine, layer):
    """The limit vectors are the singular vectors after a step of 1e-6, to about 1e-6."""
    problem, weights = square_problem(), square_weights()
    tiny = dln.train(
        problem, weights, learning_rate=1e-6, steps=1, engine="dense", record=dln.Record(vectors=True)
    )
    run = dln.train(
        problem, weights, learning_rate=0.02, steps=20, engine=engine, record=dln.Record(vectors=True)
    )
    for side in ("left", "right"):
        stand_in = tiny.singular_vectors(layer, side, 1)
        difference = run.angles(layer, side, "limit")[1:] - run.angles(layer, side, stand_in)[1:]
        assert np.abs(difference).max() <= 1e-4  # first order in the step, over the gaps that it opens


def test_layers_that_are_not_rotations_have_their_own_starting_vectors():
    problem, weights = square_problem(), dln.gaussian([DIM] * 4, 0.6, seed=4)
    run = dln.train(problem, weights, learning_rate=0.02, steps=5, record=dln.Record(vectors=True))
    angles = run.angles(1)
    assert angles[0].max() <= tolerance(F64, DIM)
    assert angles[5].max() > 1e-4


def test_angles_of_aligned_weights_stay_zero():
    problem = square_problem()
    weights = dln.aligned(problem, [DIM] * 4, 0.5)
    run = dln.train(problem, weights, learning_rate=0.05, steps=50)
    assert run.engine == "reduced"
    for layer in (1, 2, 3):
        # Directions of the core that rounding mixes, over the gaps between the three values.
        assert run.angles(layer, "right").max() <= tolerance(F64, DIM, 50) / separation(run, layer, 50)


def test_singular_vectors_of_the_reduced_engine_decompose_the_weights():
    for kind in MAKERS:
        run, _ = both_engines(kind, steps=20)
        for layer in (1, 2, 3):
            left, right = (run.singular_vectors(layer, side, 20) for side in ("left", "right"))
            values = run.active_singular_values(layer)[20]
            weight = run.weights(layer, 20)
            assert np.linalg.norm(weight @ right - left * values) <= tolerance(F64, DIM, 20) * values[0]
            assert np.linalg.norm(weight.T @ left - right * values) <= tolerance(F64, DIM, 20) * values[0]


# Singular values and the scalars outside the active subspaces.


@pytest.mark.parametrize("kind", MAKERS)
def test_singular_values_have_their_multiplicities(kind):
    reduced, dense = both_engines(kind, weight_decay=1e-3)
    n_active = 2 * RANK if kind == "square" else 2 * CLASSES
    for layer in (1, 2, 3):
        a, b = reduced.singular_values(layer), dense.singular_values(layer)
        assert np.abs(a - b).max() <= tolerance(F64, DIM, 60) * b.max()
        if kind == "wide" and layer == 3:
            assert reduced.multiplicity(layer) == 0
            with pytest.raises(ValueError, match=r"layer 3 \(4 x 20\) is active as a whole"):
                reduced.rho(layer)
            continue
        assert reduced.multiplicity(layer) == dense.widths[0] - n_active
        rho = reduced.rho(layer)
        # At least m values equal rho.
        close = np.abs(b - rho[:, None]) <= tolerance(F64, DIM, 60)
        assert np.all(close.sum(axis=1) >= reduced.multiplicity(layer))


def test_the_scalars_are_coupled_for_square_layers_and_free_under_a_wide_last_one():
    """Coupled where all layers are square, free under a wide last one."""
    run, _ = both_engines("square", weight_decay=1e-2)
    rho, rate = np.full(3, 0.6), 0.05
    for step in range(61):
        np.testing.assert_allclose(
            [run.rho(layer)[step] for layer in (1, 2, 3)], rho, rtol=tolerance(F64, 1, 60)
        )
        rho = rho * (1 - rate * 1e-2 - rate * (rho.prod() / rho) ** 2)
    run, _ = both_engines("wide", weight_decay=1e-2)
    np.testing.assert_allclose(run.rho(2), 0.6 * (1 - 3.0 * 1e-2) ** run.steps, rtol=tolerance(F64, 1, 60))


def test_a_scalar_that_changes_sign_is_recorded_by_its_size():
    """A rate with eta lambda > 1 flips the sign outside the active subspaces in every step."""
    run = dln.train(
        square_problem(), square_weights(), learning_rate=0.1, weight_decay=15.0, steps=3, engine="reduced"
    )
    dense = dln.train(
        square_problem(), square_weights(), learning_rate=0.1, weight_decay=15.0, steps=3, engine="dense"
    )
    assert run.rho(1)[1] < 0 < run.rho(1)[2]
    for layer in (1, 2, 3):
        np.testing.assert_allclose(
            run.singular_values(layer), dense.singular_values(layer), atol=tolerance(F64, DIM, 3)
        )


# Features.


@pytest.mark.parametrize("engine", [0, 1])
@pytest.mark.parametrize("kind", MAKERS)
def test_features_equal_explicit_products(kind, engine):
    run = both_engines(kind, steps=12)[engine]
    rng = np.random.default_rng(0)
    X = rng.standard_normal((run.widths[0], 9))
    for step in (0, 7, 12, -1):
        Z = X
        np.testing.assert_array_equal(run.features(0, X, step), X)
        for layer in (1, 2, 3):
            Z = run.weights(layer, step) @ Z
            got = run.features(layer, X, step)
            assert np.linalg.norm(got - Z) <= tolerance(F64, run.widths[0], 3) * np.linalg.norm(X)
        W = run.end_to_end(step)
        assert np.linalg.norm(W @ X - Z) <= tolerance(F64, run.widths[0], 3) * np.linalg.norm(X)


def test_features_use_the_inputs_of_the_problem_by_default():
    run, _ = both_engines("wide", steps=3)
    X = run.problem.inputs
    np.testing.assert_array_equal(run.features(0), X)
    wanted = run.weights(2) @ run.weights(1) @ X
    assert np.linalg.norm(run.features(2) - wanted) <= tolerance(F64, 20, 3) * np.linalg.norm(wanted)


@pytest.mark.parametrize("widths", [[7, 9, 4], [4, 9, 7], [5, 5], [3, 8, 8, 3]])
def test_end_to_end_of_any_widths(widths):
    problem = dln.Problem(np.random.default_rng(1).standard_normal((widths[-1], widths[0])))
    run = dln.train(
        problem, dln.gaussian(widths, 0.5), learning_rate=0.02, steps=4, record=dln.Record(weights_every=2)
    )
    for step in (0, 2, 4):
        layers = [run.weights(layer, step) for layer in range(1, len(widths))]
        wanted = reference.end_to_end(layers)
        assert np.linalg.norm(run.end_to_end(step) - wanted) <= tolerance(
            F64, max(widths), 3
        ) * np.linalg.norm(wanted)


# Bad requests.


def test_energy_in_the_largest_singular_values():
    problem = dln.low_rank_recovery(40, 2, seed=1)
    weights = dln.gaussian([40] * 3, seed=1)
    settings = {"learning_rate": 1.0, "steps": 3, "engine": "dense"}
    whole = dln.train(problem, weights, **settings)
    some = dln.train(problem, weights, **with_record(settings, singular_values=5))
    for run in (whole, some):
        wanted = [dln.measures.energy_share(values, 5) for values in whole.singular_values(2)]
        np.testing.assert_allclose(run.energy_share(2, 5), wanted, rtol=1e-12)
    np.testing.assert_allclose(whole.energy_share(1), 1.0)
    reduced = dln.train(problem, dln.orthogonal([40] * 3), learning_rate=1.0, steps=3)
    np.testing.assert_allclose(reduced.energy_share(1, 20)[0], 0.5)
    with pytest.raises(ValueError, match="k is 6"):
        some.energy_share(1, 6)


@pytest.mark.parametrize("engine", [0, 1])
def test_errors_name_layers_that_do_not_exist(engine):
    run = both_engines("square", steps=8, record=dln.Record(every=4))[engine]
    for layer in (0, 4, -1):
        with pytest.raises(ValueError, match="layer is"):
            run.singular_values(layer)
        with pytest.raises(ValueError, match="layer is"):
            run.weights(layer)


@pytest.mark.parametrize("engine", [0, 1])
def test_layers_have_to_be_integers(engine):
    run = both_engines("square", steps=8, record=dln.Record(every=4))[engine]
    for layer in (1.0, "1", True, None):
        with pytest.raises(TypeError, match="layer is"):
            run.weights(layer)


@pytest.mark.parametrize("engine", [0, 1])
def test_errors_name_steps_that_were_not_recorded(engine):
    run = both_engines("square", steps=8, record=dln.Record(every=4))[engine]
    with pytest.raises(ValueError, match="step is 3"):
        run.singular_vectors(1, "left", 3)
    with pytest.raises(ValueError, match="step is 9"):
        run.weights(1, 9)
    with pytest.raises(ValueError, match="step is -2"):
        run.end_to_end(-2)


@pytest.mark.parametrize("engine", [0, 1])
def test_sides_and_references_of_angles_are_checked(engine):
    run = both_engines("square", steps=8, record=dln.Record(every=4))[engine]
    with pytest.raises(ValueError, match="side is 'up'"):
        run.angles(1, "up")
    with pytest.raises(ValueError, match="reference is 'last'"):
        run.angles(1, "left", "last")
    with pytest.raises(dln.ShapeError, match="reference"):
        run.angles(1, "left", np.eye(3))
    with pytest.raises(ValueError, match="reference"):
        run.angles(1, "left", np.full((DIM, DIM), np.nan))
    with pytest.raises(ValueError, match="step is 1, which is not among the recorded steps"):
        run.angles(1, "left", "first_step")


@pytest.mark.parametrize("engine", [0, 1])
def test_inputs_of_features_are_checked(engine):
    run = both_engines("square", steps=8, record=dln.Record(every=4))[engine]
    with pytest.raises(ValueError, match="X is needed"):
        run.features(1)
    with pytest.raises(dln.ShapeError, match="X has shape"):
        run.features(1, np.ones((DIM + 1, 2)))
    with pytest.raises(ValueError, match="layer is 4"):
        run.features(4, np.ones((DIM, 2)))


def test_requests_for_data_that_the_engine_does_not_record_are_refused():
    dense = dln.train(square_problem(), square_weights(), learning_rate=0.1, steps=2, engine="dense")
    for ask in (dense.rho, dense.multiplicity, dense.active_singular_values):
        with pytest.raises(ValueError, match="belongs to the reduced engine"):
            ask(1)
    for ask in (dense.angles, dense.singular_vectors):
        with pytest.raises(
            ValueError,
            match=r"no singular vectors .*: train with record=dln\.Record\(vectors=True\), or track",
        ):
            ask(1)


def test_families_contain_the_scalars_of_the_run():
    reduced, dense = both_engines("square", steps=2)
    assert reduced.outcome == dense.outcome == reduced.outcome == "finished"
    (family,) = reduced.families()
    assert (family.first, family.last, family.multiplicity) == (1, 3, DIM - 2 * RANK)
    assert [reduced.rho(layer)[0] for layer in (1, 2, 3)] == list(family.rho)
    with pytest.raises(ValueError, match="families belongs to the reduced engine"):
        dense.families()


# Files.


def save_and_load(run, path, **options):
    run.save(path, **options)
    assert path.exists()
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no partially written files
    return dln.load(path)


def assert_same_content(got, wanted, weights=True):
    np.testing.assert_array_equal(got.steps, wanted.steps)
    np.testing.assert_array_equal(got.loss, wanted.loss)
    assert got.config == wanted.config
    assert got.certificate == wanted.certificate
    assert (got.engine, got.widths, got.wall_time, got.rank) == (
        wanted.engine,
        wanted.widths,
        wanted.wall_time,
        wanted.rank,
    )
    for layer in range(1, wanted.n_layers + 1):
        np.testing.assert_array_equal(got.singular_values(layer), wanted.singular_values(layer))
        for side in ("left", "right"):
            np.testing.assert_array_equal(
                got.singular_vectors(layer, side, 4), wanted.singular_vectors(layer, side, 4)
            )
        if weights:
            for step in (0, 4, -1):
                np.testing.assert_array_equal(got.weights(layer, step), wanted.weights(layer, step))
            np.testing.assert_array_equal(got.angles(layer), wanted.angles(layer))
    if wanted.engine == "reduced":
        np.testing.assert_array_equal(got.rho(1), wanted.rho(1))
        assert got.multiplicity(1) == wanted.multiplicity(1)
    assert got.problem.loss_scale == wanted.problem.loss_scale
    assert got.problem.loss_floor == pytest.approx(wanted.problem.loss_floor, rel=1e-9, abs=1e-12)
    np.testing.assert_array_equal(got.problem.dense_target(), wanted.problem.dense_target())
    if wanted.problem.input_gram is not None:
        np.testing.assert_array_equal(got.problem.input_gram, wanted.problem.input_gram)


@pytest.mark.parametrize("engine", [0, 1])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_saved_run_is_the_same_run(kind, engine, tmp_path):
    run = both_engines(kind, steps=12, record=dln.Record(every=4), weight_decay=1e-3, momentum=0.1)[engine]
    again = save_and_load(run, tmp_path / "run.npz")
    assert_same_content(again, run)
    assert_same_content(save_and_load(again, tmp_path / "run.npz"), run)


@pytest.mark.parametrize("dtype", [np.float32, F64])
def test_a_saved_run_of_a_dense_problem(dtype, tmp_path):
    rng = np.random.default_rng(0)
    problem = dln.Problem.from_data(rng.standard_normal((6, 40)), rng.standard_normal((3, 40)))
    weights = dln.gaussian([6, 8, 3], 0.5, dtype=dtype)
    run = dln.train(
        problem,
        weights,
        learning_rate=0.1,
        steps=8,
        record=dln.Record(weights_every=4, every=4, vectors=True),
    )
    again = save_and_load(run, tmp_path / "run")  # the file name is not changed
    assert_same_content(again, run)
    assert again.weights(1).dtype == dtype


@pytest.mark.parametrize("engine", [0, 1])
def test_a_run_saved_without_weights(engine, tmp_path):
    run = both_engines("square", steps=8, record=dln.Record(every=4))[engine]
    again = save_and_load(run, tmp_path / "run.npz", weights=False)
    assert_same_content(again, run, weights=False)
    for ask in (
        lambda: again.weights(1),
        lambda: again.end_to_end(),
        lambda: again.features(1, np.ones((DIM, 1))),
    ):
        with pytest.raises(ValueError, match="weights"):
            ask()
    # Smaller than the weights that it leaves out.
    size = (tmp_path / "run.npz").stat().st_size
    run.save(tmp_path / "whole.npz")
    assert size < (tmp_path / "whole.npz").stat().st_size - 3 * DIM * DIM * 8


def test_a_run_with_the_fewest_records_is_saved(tmp_path):
    run = dln.train(
        square_problem(),
        square_weights(),
        learning_rate=0.1,
        steps=3,
        engine="dense",
        record=dln.Record(singular_values=None),
    )
    again = save_and_load(run, tmp_path / "run.npz", weights=False)
    np.testing.assert_array_equal(again.loss, run.loss)
    with pytest.raises(ValueError, match="no singular values were recorded"):
        again.singular_values(1)


def data_run(layout, whiten, n_samples=60):
    """Return a short run on inputs that span 5 of 7 dimensions, and new inputs."""
    rng = np.random.default_rng(6)
    frame = draw_orthonormal(rng, 7, 5) if whiten else np.eye(7)
    inputs = frame @ (rng.standard_normal((frame.shape[1], n_samples)) * 3)
    new = frame @ rng.standard_normal((frame.shape[1], 4))
    labels = 4 + 3 * (np.arange(n_samples) % 3)
    turn = np.transpose if layout == "rows" else np.asarray
    problem = dln.Problem.from_data(turn(inputs), labels, layout=layout, whiten=whiten)
    weights = dln.gaussian([problem.dim_in, 6, 3], 0.5)
    return dln.train(problem, weights, learning_rate=1.0, steps=3), turn(new)


@pytest.mark.parametrize("layout", ["columns", "rows"])
@pytest.mark.parametrize("whiten", [None, "zca", "pca", "cholesky"])
def test_a_loaded_run_predicts(layout, whiten, tmp_path):
    run, new = data_run(layout, whiten)
    again = save_and_load(save_and_load(run, tmp_path / "run.npz"), tmp_path / "run.npz")
    got, wanted = again.problem, run.problem
    assert got.describe() == wanted.describe()
    assert (got.n_samples, got.reduction, got.loss_floor) == (60, "mean", wanted.loss_floor)
    np.testing.assert_array_equal(got.transform(new), wanted.transform(new))
    np.testing.assert_array_equal(got.classes, [4, 7, 10])
    if whiten:
        np.testing.assert_array_equal(got.whitening.matrix, wanted.whitening.matrix)
        for name in ("method", "rank", "condition_number", "error", "discarded"):
            assert getattr(got.whitening, name) == getattr(wanted.whitening, name)
    with pytest.raises(dln.ShapeError, match=r"wanted \((7, n|n, 7)\)"):
        got.transform(np.ones((6, 6)))


def test_the_error_of_a_loaded_problem_names_its_missing_samples(tmp_path):
    again = save_and_load(data_run("columns", "zca")[0], tmp_path / "run.npz")
    assert (again.problem.inputs, again.problem.outputs, again.problem.labels) == (None, None, None)
    with pytest.raises(ValueError, match=r"X is needed.*files store no samples"):
        again.features(1)
    with pytest.raises(ValueError, match="files store no samples"):
        dln.plots.FeatureCompressionDisplay.from_trajectory(again)


def test_transform_is_refused_where_the_file_lacks_the_whitening_matrix(tmp_path):
    run, new = data_run("columns", "zca")
    run.save(tmp_path / "run.npz")
    members = without_digest(members_of(tmp_path / "run.npz"))  # as in files of 0.1.0
    del members["whitening"]
    write_members(tmp_path / "run.npz", members)
    with pytest.raises(ValueError, match=r"whitened \(zca\).*does not hold the matrix T"):
        dln.load(tmp_path / "run.npz").problem.transform(new)


def test_a_saved_standard_problem_has_the_same_description(tmp_path):
    for make in (wide_problem, lambda: dln.low_rank_recovery(DIM, RANK)):
        problem = make()
        weights = dln.orthogonal([problem.dim_in, problem.dim_in, problem.dim_out])
        again = save_and_load(dln.train(problem, weights, learning_rate=0.1, steps=2), tmp_path / "run.npz")
        assert again.problem.describe() == problem.describe()
        assert again.problem.loss_floor == problem.loss_floor


def test_special_targets_can_be_saved(tmp_path):
    for rank, dim in ((0, 5), (1, 1)):
        problem = dln.low_rank_recovery(dim, rank)
        run = dln.train(problem, dln.orthogonal([dim] * 3), learning_rate=0.1, steps=4, engine="reduced")
        again = save_and_load(run, tmp_path / "run.npz")
        np.testing.assert_array_equal(again.weights(1), run.weights(1))
        assert again.rank == rank


def test_a_partial_run_can_be_saved(tmp_path):
    with pytest.raises(dln.DivergedError) as caught:
        dln.train(
            square_problem(),
            square_weights(),
            learning_rate=50.0,
            steps=100,
            engine="dense",
            record=dln.Record(vectors=True),
        )
    partial = caught.value.trajectory
    again = save_and_load(partial, tmp_path / "run.npz")
    np.testing.assert_array_equal(again.loss, partial.loss)
    np.testing.assert_array_equal(again.singular_values(2), partial.singular_values(2))


def test_files_contain_no_pickle_and_plain_json(tmp_path):
    run, _ = both_engines("wide", steps=4)
    run.save(tmp_path / "run.npz")
    with np.load(tmp_path / "run.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    assert all(a.dtype.kind in "fiU" for a in arrays.values())
    meta = json.loads(str(arrays["meta"]), parse_constant=pytest.fail)
    assert (meta["format"], meta["format_version"]) == ("dlnfast trajectory", FORMAT_VERSION)


def test_an_existing_file_is_replaced_atomically(tmp_path, monkeypatch):
    run, _ = both_engines("square", steps=4)
    path = tmp_path / "run.npz"
    run.save(path)
    before = path.read_bytes()

    def fail(file, *_, **__):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(np.lib.format, "write_array", fail)
    with pytest.raises(OSError, match="disk full"):
        run.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def file_of_a_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.npz"
    both_engines("wide", steps=8, record=dln.Record(every=4))[0].save(path)
    return path


def write_members(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in members.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.asanyarray(array), allow_pickle=True)
            archive.writestr(f"{name}.npy", content.getvalue())


def members_of(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def changed_meta(members, **changes):
    return members | {"meta": np.array(json.dumps(json.loads(str(members["meta"])) | changes))}


def test_an_error_names_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        dln.load(tmp_path / "nothing.npz")
    run = dln.train(square_problem(), square_weights(), learning_rate=0.1, steps=1)
    with pytest.raises(FileNotFoundError, match=r"there is no such folder: '[^']*nowhere'$"):
        run.save(tmp_path / "nowhere" / "run.npz")


@pytest.mark.parametrize("keep", [0, 1, 3, 100, 0.3, 0.7, 0.99, -1])
def test_truncated_files_are_refused(keep, file_of_a_run, tmp_path):
    content = file_of_a_run.read_bytes()
    size = int(keep * len(content)) if isinstance(keep, float) else keep
    (tmp_path / "run.npz").write_bytes(content[:size])
    with pytest.raises(ValueError, match=r"run\.npz is not a complete file of a dlnfast trajectory"):
        dln.load(tmp_path / "run.npz")


@settings(deadline=None, max_examples=300)
@given(
    fraction=st.floats(0, 1, exclude_max=True), byte=st.integers(1, 255), length=st.sampled_from([1, 8, 200])
)
def test_damaged_files_are_refused_or_load_the_same_run(
    fraction, byte, length, file_of_a_run, tmp_path_factory
):
    """The damage has no effect, or it is a ValueError that names the file."""
    content = bytearray(file_of_a_run.read_bytes())
    start = int(fraction * len(content))
    for i in range(start, min(start + length, len(content))):
        content[i] ^= byte
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(content)
    try:
        run = dln.load(path)
    except ValueError as error:
        complaint = str(error)
    else:
        complaint = "damaged.npz is not a complete file"
        assert np.isfinite(run.loss).all()
        assert np.isfinite(run.weights(1)).all()
    assert "damaged.npz is not a complete file" in complaint


def foreign_files(members):
    broken = json.loads(str(members["meta"]))
    without = {name: array for name, array in without_digest(members).items() if name != "loss"}
    return {
        "text": b"not at all",
        "array": members["loss"],
        "pickle": {"meta": np.array([{"format": "dlnfast trajectory"}], dtype=object)},
        "other arrays": {"weights": np.eye(3)},
        "meta is no JSON": {"meta": np.array("{")},
        "meta is a list": {"meta": np.array("[1, 2]")},
        "meta is a number": {"meta": np.array(7)},
        "other format": changed_meta(members, format="something else"),
        "no version": members | {"meta": np.array(json.dumps({"format": broken["format"]}))},
        "a version in words": changed_meta(members, format_version="two"),
        "an array is missing": without,
        "no states": changed_meta(members, states=None),
        "unknown engine": changed_meta(members, states={"engine": "other"}),
        "no certificate": changed_meta(members, certificate=None),
        "half a problem": changed_meta(members, problem={}),
    }


@pytest.mark.parametrize("kind", list(foreign_files({"meta": '{"format": ""}', "loss": 0})))
def test_files_of_other_programs_are_refused(kind, file_of_a_run, tmp_path):
    content = foreign_files(members_of(file_of_a_run))[kind]
    path = tmp_path / "run.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        write_members(path, content)
    else:
        with path.open("wb") as file:
            np.save(file, content)
    with pytest.raises(ValueError, match=r"run\.npz is not a complete file of a dlnfast trajectory"):
        dln.load(path)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("text", "it is not an .npz file"),
        ("array", "it is not an .npz file"),
        ("other arrays", r"it is an .npz file of other arrays \(weights\)"),
        ("other format", "its format is 'something else'"),
        ("an array is missing", "it lacks 'loss'"),
    ],
)
def test_errors_name_the_kind_of_the_file(kind, reason, file_of_a_run, tmp_path):
    content = foreign_files(members_of(file_of_a_run))[kind]
    path = tmp_path / "run.npz"
    if isinstance(content, dict):
        write_members(path, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with path.open("wb") as file:
            np.save(file, content)
    with pytest.raises(ValueError, match=f"trajectory: {reason}$"):
        dln.load(path)


def test_errors_name_files_of_a_newer_version(file_of_a_run, tmp_path):
    newer = changed_meta(members_of(file_of_a_run), format_version=FORMAT_VERSION + 1, version="99.0")
    write_members(tmp_path / "run.npz", newer)
    with pytest.raises(
        ValueError, match=rf"has format {FORMAT_VERSION + 1}, written by dlnfast 99\.0.*up to"
    ):
        dln.load(tmp_path / "run.npz")


# Memory.


@pytest.mark.parametrize("engine", [0, 1])
def test_a_run_is_freed_after_its_last_reference(engine):
    """No reference cycle keeps the arrays alive."""
    gc.collect()
    gc.disable()
    try:
        runs = list(both_engines("square", steps=5))
        run = runs.pop(engine)
        run.angles(1)
        run.singular_values(2)
        run.features(2, np.ones((DIM, 1)))
        gone = weakref.ref(run)
        del run
        assert gone() is None
    finally:
        gc.enable()


def test_records_do_not_share_memory_with_the_engine():
    """The next run does not change the records of the previous one."""
    run = dln.train(square_problem(), square_weights(), learning_rate=0.05, steps=10, engine="reduced")
    before = [run.weights(layer) for layer in (1, 2, 3)]
    dln.train(square_problem(), square_weights(), learning_rate=0.2, steps=10, engine="reduced")
    for layer in (1, 2, 3):
        np.testing.assert_array_equal(run.weights(layer), before[layer - 1])


def test_the_repr_describes_the_run():
    run = dln.train(
        square_problem(), square_weights(), learning_rate=0.05, steps=10, record=dln.Record(every=4)
    )
    assert repr(run).startswith(f"Trajectory(reduced, widths {[DIM] * 4}, 10 steps, 4 records, loss ")
    flow = dln.flow(square_problem(), square_weights(), times=[0.0, 1.0, 2.5])
    assert ", gradient flow to time 2.5, 3 records, loss " in repr(flow)
