"""What a trajectory tells: vectors, angles, weights, features, files."""

from __future__ import annotations

import json
import os
import zipfile

import numpy as np
import pytest

import dlnfast as dln
from dlnfast import reference, trajectory


def recovery():
    return dln.low_rank_recovery(14, 2, seed=4), dln.orthogonal([14] * 4, scale=0.9, seed=4)


def wide():
    return dln.classification(3, 5, seed=4), dln.orthogonal([15, 15, 15, 3], scale=0.6, seed=4)


CASES = {"case 1": recovery, "case 2": wide}
SETTINGS = {"learning_rate": 2.0, "steps": 30}


def both(case, **more):
    problem, weights = CASES[case]()
    settings = {**SETTINGS, **more}
    return (
        dln.train(problem, weights, engine="reduced", **settings),
        dln.train(problem, weights, engine="dense", vectors=True, weights_every=1, **settings),
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reference_name", ["limit", "first_step"])
def test_angles_of_both_engines(case, side, reference_name):
    reduced, dense = both(case)
    for layer in range(1, reduced.n_layers + 1):
        a, b = reduced.angles(layer, side, reference_name), dense.angles(layer, side, reference_name)
        assert a.shape == b.shape == (31, min(reduced.widths[layer - 1 : layer + 1]))
        # The first steps' gaps are about 1e-2, and vectors are determined to eps over the gap.
        np.testing.assert_allclose(a, b, atol=1e-11)
        np.testing.assert_array_equal(a[0], 0)
        assert a.max() <= np.pi / 2


@pytest.mark.parametrize("case", CASES)
def test_angles_to_given_vectors(case):
    reduced, dense = both(case)
    for layer in range(1, reduced.n_layers):
        given = dense.singular_vectors(layer, "right", 12)
        a, b = reduced.angles(layer, "right", given), dense.angles(layer, "right", given)
        np.testing.assert_allclose(a[1:], b[1:], atol=1e-11)
        np.testing.assert_allclose(a[12], 0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_limit_is_where_tiny_steps_lead(case):
    problem, weights = CASES[case]()
    # One step of 1e-7: the split is seen to seven digits, and the next order is as small.
    tiny = dln.train(
        problem, weights, learning_rate=1e-7 / problem.loss_scale, steps=1, engine="dense", vectors=True
    )
    for layer in range(1, len(weights) + 1):
        for side in ("left", "right"):
            assert tiny.angles(layer, side, "limit")[1].max() < 1e-5


def test_without_a_scaled_rotation_the_limit_is_the_start():
    problem, _ = recovery()
    run = dln.train(problem, dln.gaussian([14] * 4), vectors=True, **SETTINGS)
    np.testing.assert_allclose(run.angles(1)[0], 0, atol=1e-12)
    assert run.angles(1)[-1].max() > 0.01


@pytest.mark.parametrize("case", CASES)
def test_values_vectors_and_weights_fit_together(case):
    reduced, dense = both(case)
    for layer in range(1, reduced.n_layers + 1):
        for step in (0, 1, 17, 30):
            exact = dense.weights(layer, step)
            np.testing.assert_allclose(reduced.weights(layer, step), exact, atol=1e-13)
            values = reference.singular_values(exact)
            np.testing.assert_allclose(reduced.singular_values(layer)[step], values, atol=1e-13)
            np.testing.assert_allclose(dense.singular_values(layer)[step], values, atol=1e-13)
            left, right = (reduced.singular_vectors(layer, side, step) for side in ("left", "right"))
            active = reduced.active_singular_values(layer)[step]
            np.testing.assert_allclose(exact @ right, left * active, atol=1e-13)
            left, right = (dense.singular_vectors(layer, side, step) for side in ("left", "right"))
            np.testing.assert_allclose(left * dense.singular_values(layer)[step] @ right.T, exact, atol=1e-13)


def test_rho_of_both_cases():
    reduced, _ = both("case 1", weight_decay=0.01)
    c, eta, decay = reduced.problem.loss_scale, 2.0, 0.01
    rho = np.full(3, 0.9)
    for step in range(31):
        np.testing.assert_allclose([reduced.rho(layer)[step] for layer in (1, 2, 3)], rho, rtol=1e-14)
        rho = rho * (1 - eta * decay - c * eta * (rho.prod() / rho) ** 2)
    assert reduced.multiplicity(1) == 10
    free, _ = both("case 2", weight_decay=0.01)
    np.testing.assert_allclose(free.rho(1), 0.6 * (1 - 2.0 * 0.01) ** np.arange(31), rtol=1e-14)
    with pytest.raises(ValueError, match="there is no rho"):
        free.rho(3)
    assert free.multiplicity(3) == 0


@pytest.mark.parametrize("case", CASES)
def test_features_and_the_end_to_end_matrix(case):
    reduced, dense = both(case)
    X = np.random.default_rng(0).standard_normal((reduced.widths[0], 9))
    np.testing.assert_array_equal(reduced.features(0, X), X)
    for step in (0, 30):
        chain = X
        for layer in range(1, reduced.n_layers + 1):
            chain = dense.weights(layer, step) @ chain
            np.testing.assert_allclose(reduced.features(layer, X, step), chain, atol=1e-12)
        np.testing.assert_allclose(reduced.end_to_end(step) @ X, chain, atol=1e-12)
    if case == "case 2":
        np.testing.assert_allclose(
            reduced.features(1), reduced.weights(1) @ reduced.problem.inputs, atol=1e-13
        )


def saved_runs(tmp_path):
    problem, weights = recovery()
    general = dln.Problem(
        np.diag(np.arange(1.0, 15.0)), np.diag(np.linspace(1, 2, 14)), output_norm_squared=1e4
    )
    yield "reduced", dln.train(problem, weights, **SETTINGS)
    yield "wide", both("case 2")[0]
    yield "dense", both("case 1")[1]
    yield "bare", dln.train(problem, weights, engine="dense", singular_values=None, **SETTINGS)
    yield "general", dln.train(general, weights, learning_rate=1e-3, steps=5)
    yield "single", dln.train(problem, [w.astype(np.float32) for w in weights], **SETTINGS)


@pytest.mark.parametrize("with_weights", [True, False])
def test_files_hold_everything(tmp_path, with_weights):
    for name, run in saved_runs(tmp_path):
        path = tmp_path / f"{name}.npz"
        run.save(path, weights=with_weights)
        back = dln.load(path)
        assert repr(back) == repr(run)
        assert back.certificate == run.certificate
        assert back.config == json.loads(json.dumps(run.config))
        np.testing.assert_array_equal(back.steps, run.steps)
        np.testing.assert_array_equal(back.loss, run.loss)
        assert back.rank == run.rank
        assert back.problem.loss_floor == pytest.approx(run.problem.loss_floor)
        if name != "bare":
            for layer in range(1, run.n_layers + 1):
                np.testing.assert_array_equal(back.singular_values(layer), run.singular_values(layer))
        if name in ("reduced", "wide") or (name == "dense" and with_weights):
            np.testing.assert_array_equal(back.angles(1), run.angles(1))
        if with_weights:
            np.testing.assert_array_equal(back.weights(1), run.weights(1))
        else:
            with pytest.raises(ValueError, match="weights"):
                back.weights(1)


def test_files_hold_no_pickle_and_appear_whole(tmp_path):
    path = tmp_path / "run.npz"
    run = dln.train(*recovery(), **SETTINGS)
    run.save(path)
    with np.load(path, allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)
    before = path.read_bytes()
    run.save(str(path))
    assert os.listdir(tmp_path) == ["run.npz"]
    assert len(path.read_bytes()) == len(before)
    with pytest.raises(FileNotFoundError):
        run.save(tmp_path / "nowhere" / "run.npz")


def test_damaged_and_foreign_files(tmp_path):
    good = tmp_path / "run.npz"
    dln.train(*recovery(), **SETTINGS).save(good)
    content = good.read_bytes()
    damaged = {
        "empty": b"",
        "text": b"not an archive",
        "half": content[: len(content) // 2],
        "flipped": content[:200] + bytes(b ^ 255 for b in content[200:400]) + content[400:],
    }
    for name, data in damaged.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ValueError, match="not a complete file of a dlnfast trajectory"):
            dln.load(path)
    np.savez(tmp_path / "foreign.npz", a=np.ones(3))
    np.savez(tmp_path / "other.npz", meta=np.array(json.dumps({"format": "other"})))
    np.save(tmp_path / "array.npy", np.ones(3))
    for name in ("foreign.npz", "other.npz", "array.npy"):
        with pytest.raises(ValueError, match="not a complete file of a dlnfast trajectory"):
            dln.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        dln.load(tmp_path / "absent.npz")


def test_files_of_a_newer_version(tmp_path, monkeypatch):
    path = tmp_path / "run.npz"
    run = dln.train(*recovery(), **SETTINGS)
    monkeypatch.setattr(trajectory, "FORMAT_VERSION", 99)
    run.save(path)
    monkeypatch.undo()
    assert zipfile.is_zipfile(path)
    with pytest.raises(ValueError, match=r"has format 99, written by dlnfast .* reads formats up to 1"):
        dln.load(path)


def test_a_run_is_freed_without_the_collector():
    import gc
    import weakref

    gc.disable()
    try:
        run = dln.train(*recovery(), **SETTINGS)
        run.singular_values(1)
        seen = weakref.ref(run)
        del run
        assert seen() is None
    finally:
        gc.enable()


def test_the_representation_tells_the_essentials():
    reduced, _ = both("case 1")
    assert repr(reduced).startswith(
        "Trajectory(reduced, widths [14, 14, 14, 14], 30 steps, 31 records, loss "
    )
