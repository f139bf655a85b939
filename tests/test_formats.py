# SPDX-License-Identifier: MIT
"""Files of every format load; errors name damaged, foreign and newer files; no file contains a pickle."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile

import numpy as np
import pytest
import released_formats
from helpers.files import file_names, without_digest
from helpers.records import with_record
from helpers.runs import run_content
from hypothesis import given, settings
from hypothesis import strategies as st
from released_formats import DATA, FOLDERS, RUNS
from tolerances import tolerance

import dlnfast as dln
from dlnfast import Checkpoint
from dlnfast._support.checksums import add_state_checksum, compute_identity

RELEASED = sorted(DATA.glob("format-*"))


def released_files(pattern):
    return [
        pytest.param(path, id=f"{path.parent.name}/{path.name}") for d in RELEASED for path in d.glob(pattern)
    ]


def but_for_rounding(described):
    return json.loads(json.dumps(described), parse_float=lambda _: "a number")


def agree(run, again):
    """Compare the content of a file with a result computed now."""
    assert run.engine == again.engine
    assert run.widths == again.widths
    assert run.outcome == again.outcome
    np.testing.assert_array_equal(run.steps, again.steps)
    # The files are of one instruction set, the runs of another.
    near = 4 * tolerance(np.float64, max(run.widths), len(run.loss))
    np.testing.assert_allclose(run.loss, again.loss, rtol=near, atol=near * again.loss[0])
    for layer in range(1, run.n_layers + 1):
        values = again.singular_values(layer)
        room = again.singular_value_errors(layer) + run.singular_value_errors(layer) + near * values[:, :1]
        assert np.all(np.abs(run.singular_values(layer) - values) <= room)
        weight = again.weights(layer)
        np.testing.assert_allclose(run.weights(layer), weight, rtol=0, atol=near * np.linalg.norm(weight))
    assert but_for_rounding(run.problem.describe()) == but_for_rounding(again.problem.describe())
    if run.rates is not None:
        np.testing.assert_allclose(run.rates, again.rates, rtol=1e-6)  # of a power iteration that stops early


def test_every_kind_of_file_has_an_example():
    names = {path.stem for path in (DATA / "format-1").iterdir()}
    assert names == {
        *RUNS,
        "statistics",
        *(f"{name}-{end}" for name in FOLDERS for end in ("ended", "stopped")),
    }


@pytest.mark.parametrize("path", [p for name in RUNS for p in released_files(f"{name}.npz")])
def test_saved_runs_load(path):
    agree(dln.load(path), RUNS[path.stem]())


def test_saved_problems_are_complete():
    for folder in RELEASED:
        for path in folder.glob("whitened.npz"):
            inputs, _ = released_formats.draw_samples()
            found, wanted = dln.load(path).problem, RUNS["whitened"]().problem
            np.testing.assert_allclose(found.transform(inputs), wanted.transform(inputs), rtol=1e-12)
            np.testing.assert_array_equal(found.classes, wanted.classes)


@pytest.mark.parametrize("path", released_files("statistics.npz"))
def test_saved_statistics_load(path):
    found, wanted = dln.SufficientStatistics.load(path), released_formats.statistics()
    assert (found.n_samples, found.layout) == (wanted.n_samples, wanted.layout)
    a, b = (statistics.problem(whiten=None) for statistics in (found, wanted))
    np.testing.assert_allclose(a.target, b.target, rtol=1e-14)
    np.testing.assert_allclose(a.input_gram, b.input_gram, rtol=1e-14)


@pytest.mark.parametrize("path", released_files("*-ended"))
def test_folders_of_finished_runs_load(path):
    agree(dln.load(path), FOLDERS[path.name.partition("-")[0]]())


@pytest.mark.parametrize("path", released_files("*-stopped"))
def test_folders_of_stopped_runs_load_and_resume(path, tmp_path):
    whole = FOLDERS[path.name.partition("-")[0]]()
    run = dln.load(path)
    assert run.outcome == "unfinished"
    count = len(run.loss)
    assert count > released_formats.STOPPED_AT - 10
    near = 4 * tolerance(np.float64, max(run.widths), count)
    np.testing.assert_allclose(run.loss, whole.loss[:count], rtol=near)
    shutil.copytree(path, tmp_path / "run")
    agree(dln.resume(tmp_path / "run"), whole)


def test_no_file_contains_a_pickle():
    for path in DATA.rglob("*.npz"):
        with zipfile.ZipFile(path) as file:
            for name in file.namelist():
                assert file.read(name)[:6] == b"\x93NUMPY"
                assert b"'|O'" not in file.read(name)[:200]


# ------------------------------------------------------------------------------------------- damage


def read(folder):
    """Return the content of a folder, or the text of the error that loading it raises."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = run_content(dln.load(folder))
        except ValueError as error:
            return None, str(error)
    assert all(w.category is RuntimeWarning and str(folder) in str(w.message) for w in caught)
    return found, ""


@pytest.fixture(scope="module")
def checkpointed_runs(tmp_path_factory):
    """Return folders of two engines, with more losses than zip reads at once."""
    folder = tmp_path_factory.mktemp("checkpointed")
    problem, weights = dln.low_rank_recovery(6, 1), dln.orthogonal([6] * 3)
    options = {"learning_rate": 0.3, "steps": 2000, "record": dln.Record(every=100), "n_threads": 1}
    for engine in ("reduced", "dense"):
        checkpoint = Checkpoint(folder / engine, every=700, seconds=0)
        dln.train(problem, weights, **options, engine=engine, checkpoint=checkpoint)
        checkpoint = Checkpoint(folder / f"other {engine}", every=700, seconds=0)
        dln.train(problem, weights, **options | {"learning_rate": 0.31}, engine=engine, checkpoint=checkpoint)
    return folder


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_folder_is_an_error_or_loads_the_same_run(data, checkpointed_runs, tmp_path_factory):
    engine = data.draw(st.sampled_from(["reduced", "dense"]))
    folder = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(checkpointed_runs / engine, folder)
    path = folder / data.draw(st.sampled_from(file_names(folder)))
    content = bytearray(path.read_bytes())
    # Change headers and directories as often as numbers, although most bytes of large files are numbers.
    position = data.draw(
        st.one_of(st.integers(0, len(content) - 1), st.integers(0, min(400, len(content) - 1)))
    )
    if data.draw(st.booleans()):
        content = content[:position]
    else:
        content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    found, error = read(folder)
    if found is None:
        assert str(folder) in error
    else:
        assert found == run_content(dln.load(checkpointed_runs / engine))


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_shortened_headers_are_detected(engine, checkpointed_runs, tmp_path):
    # numpy.load reads only as far as the header says, and never reaches the checksum.
    shutil.copytree(checkpointed_runs / engine, tmp_path / "run")
    path = sorted((tmp_path / "run").glob("records-*.npz"))[0]
    content = path.read_bytes()
    assert content.count(b"(701,)") == 1
    path.write_bytes(content.replace(b"(701,)", b"(601,)"))
    with pytest.raises(ValueError, match=r"records-\d+.npz is not a complete file"):
        dln.load(tmp_path / "run")


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_files_of_another_run_are_detected(engine, checkpointed_runs, tmp_path):
    for i, name in enumerate(file_names(checkpointed_runs / engine)):
        folder = tmp_path / str(i)
        shutil.copytree(checkpointed_runs / engine, folder)
        shutil.copy(checkpointed_runs / f"other {engine}" / name, folder / name)
        found, error = read(folder)
        if name.startswith("state") and found is not None:
            assert found == run_content(dln.load(checkpointed_runs / engine))  # not needed
        else:
            assert "another run" in error or "no state of its last step" in error, (name, error)


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_missing_files_are_detected(engine, checkpointed_runs, tmp_path):
    for i, name in enumerate(n for n in file_names(checkpointed_runs / engine) if n.startswith("records")):
        folder = tmp_path / str(i)
        shutil.copytree(checkpointed_runs / engine, folder)
        (folder / name).unlink()
        with pytest.raises(ValueError, match=r"is missing|lacks the last"):
            dln.load(folder)


def test_a_finished_run_without_its_last_state_is_not_loaded(checkpointed_runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(checkpointed_runs / "dense", folder)
    newest = sorted(folder.glob("state-*.npz"))[-1]
    newest.write_bytes(newest.read_bytes()[:500])
    with (
        pytest.warns(RuntimeWarning, match="resuming from the one before"),
        pytest.raises(ValueError, match=r"no state of its last step, 2000.*without end.json the run resumes"),
    ):
        dln.load(folder)
    (folder / "end.json").unlink()
    with pytest.warns(RuntimeWarning, match="resuming from the one before"):
        run = dln.resume(folder)
    np.testing.assert_array_equal(run.weights(1), dln.load(checkpointed_runs / "dense").weights(1))


def test_errors_name_damaged_and_newer_end_files(checkpointed_runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(checkpointed_runs / "reduced", folder)
    end = folder / "end.json"
    content = json.loads(end.read_text())
    for changed, text in (
        (content | {"format_version": 99}, "was written by a newer version"),
        (content | {"step": 1999}, "its checksum does not match"),
        ({"a": 1}, "it lacks"),
        ([1], "is not a complete file of a dlnfast run"),
    ):
        end.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=text) as caught:
            dln.load(folder)
        assert str(end) in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_an_error_or_loads_the_same_content(data, tmp_path_factory):
    source = data.draw(
        st.sampled_from([DATA / "format-1" / f"{n}.npz" for n in ("reduced", "dense", "statistics")])
    )
    loader = dln.SufficientStatistics.load if source.stem == "statistics" else dln.load
    path = tmp_path_factory.mktemp("damaged") / "file.npz"
    content = bytearray(source.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:position]
    else:
        content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found = loader(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    found.save(path.with_name("again.npz"))
    loader(source).save(path.with_name("source.npz"))
    a, b = (dict(np.load(path.with_name(f"{name}.npz"))) for name in ("again", "source"))
    assert a.keys() == b.keys()
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)


# -------------------------------------------------------------------------- arrays that do not fit each other


def reduced_run():
    return dln.train(dln.low_rank_recovery(8, 2), dln.orthogonal([8] * 4, 0.5), learning_rate=0.3, steps=5)


def dense_run():
    options = {
        "learning_rate": 0.1,
        "steps": 6,
        "engine": "dense",
        "record": dln.Record(weights_every=2),
        "n_threads": 1,
    }
    weights = dln.gaussian([6, 5, 6], 0.5)
    return dln.train(
        dln.low_rank_recovery(6, 1), weights, **with_record(options, singular_values=2, vectors=True)
    )


def completion_run():
    problem, weights = dln.low_rank_completion(6, 1, 0.6), dln.gaussian([6] * 3, 0.5)
    return dln.train(problem, weights, learning_rate=0.1, steps=4)


def whitened_run():
    inputs = np.random.default_rng(0).standard_normal((5, 30))
    problem = dln.Problem.from_data(inputs, np.arange(30) % 3, whiten="zca")
    return dln.train(problem, dln.gaussian([5, 4, 3], 0.5), learning_rate=0.1, steps=4)


def lazy_run():
    weights = dln.orthogonal([40] * 3, 0.5, implicit=True)
    return dln.train(dln.low_rank_recovery(40, 1), weights, learning_rate=0.3, steps=4)


def misfit(make, name, change, message):
    changed = name if isinstance(name, str) else name.__name__
    return pytest.param(make, name, change, message, id=f"{make.__name__} {changed} {message}")


def entry(*path):
    """Return a function that changes an entry of the metadata."""

    def change(metadata, value):
        container = metadata
        for key in path[:-1]:
            container = container[key]
        container[path[-1]] = value

    change.__name__ = ".".join(map(str, path))
    return change


MISFITS = [
    misfit(reduced_run, "steps", lambda a: np.tile(a, 2), "steps does not increase"),
    misfit(reduced_run, "steps", lambda a: -a, "steps"),
    misfit(reduced_run, "steps", lambda a: a + 1, "steps ends with 6, but the losses with step 5"),
    misfit(reduced_run, "steps", lambda a: a + 0.5, "steps has dtype float64; wanted integers"),
    misfit(reduced_run, "steps", lambda a: a[:-1], r"core_0 has shape \(6, 4, 4\); wanted \(5, 4, 4\)"),
    misfit(reduced_run, "rho", lambda a: a[:-1], r"rho has shape \(5, 3\); wanted \(6, 3\)"),
    misfit(reduced_run, "rho", lambda a: a[:, :-1], r"rho has shape \(6, 2\); wanted \(6, 3\)"),
    misfit(reduced_run, "core_1", lambda a: a * np.nan, "core_1 has values that are not finite"),
    misfit(reduced_run, "core_1", lambda a: a.astype(np.float32), "core_1 has dtype float32; wanted float64"),
    misfit(reduced_run, "basis_0", lambda a: a[:5], r"basis_0 has shape \(5, 4\); wanted \(8, any\)"),
    misfit(reduced_run, "basis_1", lambda a: a[:, :1], r"core_0 has shape .*; wanted \(6, 1, 4\)"),
    misfit(reduced_run, "basis_2", lambda a: a.astype(str), "basis_2 has dtype <U"),
    misfit(reduced_run, "initial_1", lambda a: a[1:], r"initial_1 has shape \(7, 8\); wanted \(8, 8\)"),
    misfit(reduced_run, "core_target", lambda a: a[:1], "core_target has shape"),
    misfit(reduced_run, "loss", lambda a: a.astype(str), "loss has dtype <U"),
    misfit(reduced_run, "loss", lambda a: a * np.inf, "loss has values that are not finite"),
    misfit(reduced_run, "loss", lambda a: a[:, None], r"loss has shape \(6, 1\); wanted \(any\)"),
    misfit(reduced_run, "loss", None, "lacks 'loss'"),
    misfit(reduced_run, "target_U", lambda a: np.pad(a, ((1, 0), (0, 0))), "maps 8 to 9 dimensions"),
    misfit(dense_run, "values_0", lambda a: a[1:], r"values_0 has shape .*; wanted \(7, any\)"),
    misfit(dense_run, "values_1", lambda a: np.tile(a, 4), "values_1 has 8 columns; wanted at most 5"),
    misfit(dense_run, "left_0", lambda a: a[..., :1], r"left_0 has shape .*; wanted \(7, 5, 2\)"),
    misfit(dense_run, "right_1", lambda a: a.astype(int), "right_1 has dtype int64"),
    misfit(dense_run, "snapshots_1", lambda a: a[1:], "snapshots_1 has shape"),
    misfit(dense_run, "snapshot_steps", lambda a: a[::-1], "snapshot_steps does not increase"),
    misfit(dense_run, "final_0", lambda a: a.T, r"final_0 has shape \(6, 5\); wanted \(5, 6\)"),
    misfit(dense_run, "tracking_errors_0", lambda a: -1 - a, "tracking_errors_0 has values that"),
    misfit(dense_run, "tracking_signs_0", lambda a: 0 * a, "tracking_signs_0 has other values"),
    misfit(dense_run, "tracking_branches_1", lambda a: a - 9, "tracking_branches_1 or"),
    misfit(dense_run, "tracking_clusters_1", lambda a: a * 1.0, "tracking_clusters_1 has dtype float64"),
    misfit(dense_run, "tracking_columns_0", lambda a: a[1:], "tracking_columns_0 has shape"),
    misfit(completion_run, "observed_start", lambda a: a[:-1], "observed_start has shape"),
    misfit(completion_run, "observed_start", lambda a: a + 1, "observed_start does not rise from 0"),
    misfit(completion_run, "observed_index", lambda a: a + 6, "outside the 6 x 6 matrix"),
    misfit(completion_run, "observed_values", lambda a: a[1:], "values"),
    misfit(whitened_run, "whitening", lambda a: a[:-1], r"whitening has shape .*; wanted \(5, any\)"),
    misfit(whitened_run, "classes", lambda a: a[:-1], r"classes has shape \(2,\); wanted \(3\)"),
    misfit(lazy_run, "core_0", lambda a: a[1:], "core_0 has shape"),
    misfit(reduced_run, entry("config", "widths"), [8, 99, 8, 8], r"basis_1 has .* wanted \(99, any\)"),
    misfit(reduced_run, entry("config", "widths"), [8, -8, 8, 8], "config.widths is -8"),
    misfit(reduced_run, entry("config", "widths"), "8888", "config.widths is '8'|another type"),
    misfit(reduced_run, entry("states", "families", 0, "multiplicity"), 2**31, "multiplicity is 2147483648"),
    misfit(reduced_run, entry("states", "families", 0, "multiplicity"), 7, "7 directions run"),
    misfit(reduced_run, entry("states", "families", 0, "last"), 9, r"families\[0\].last is 9"),
    misfit(reduced_run, entry("states", "families", 0, "rho"), [0.5], r"families\[0\].rho has 1 values"),
    misfit(reduced_run, entry("states", "n_values"), -3, "n_values is -3"),
    misfit(reduced_run, entry("states", "loss_scale"), "large", "loss_scale is 'large'|another type"),
    misfit(reduced_run, entry("wall_time"), None, "wall_time is None|another type"),
    misfit(reduced_run, entry("problem", "output_norm_squared"), "x", "output_norm_squared|another type"),
    misfit(dense_run, entry("states", "values"), [True], "lacks|values holds 1 layers"),
    misfit(completion_run, entry("problem", "shape"), [10**12, 6], r"problem.shape is \[1000000000000, 6\]"),
    misfit(lazy_run, entry("states", "law", "widths"), [40, 10**9, 40], "widths of lazily sampled weights"),
]


@pytest.mark.parametrize(("make", "name", "change", "message"), MISFITS)
def test_errors_name_inconsistent_arrays(make, name, change, message):
    run = make()
    metadata, arrays = run.to_arrays()
    metadata = json.loads(json.dumps(metadata))
    assert run_content(dln.Trajectory.from_arrays(metadata, dict(arrays))) == run_content(run)
    if callable(name):
        name(metadata, change)
    elif change is None:
        del arrays[name]
    else:
        arrays[name] = change(arrays[name])
    with pytest.raises(ValueError, match=message):
        dln.Trajectory.from_arrays(metadata, arrays)


def remove_digest(path):
    """Rewrite a file as one of 0.1.0, which had no digest."""
    with np.load(path) as file:
        arrays = without_digest(file)
    with path.open("wb") as file:
        np.savez(file, **arrays)


def test_folders_of_0_1_0_have_to_be_consistent(checkpointed_runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(checkpointed_runs / "reduced", folder)
    for path in folder.glob("*.npz"):
        remove_digest(path)
    assert run_content(dln.load(folder)) == run_content(dln.load(checkpointed_runs / "reduced"))
    path = sorted(folder.glob("records-*.npz"))[1]
    with np.load(path) as file:
        arrays = dict(file)
    arrays["core_0"], arrays["core_1"] = arrays["core_0"] * np.nan, arrays["core_1"]
    with path.open("wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(ValueError, match="core_0 has values that are not finite"):
        dln.load(folder)


def test_exchanged_arrays_of_one_shape_are_detected(tmp_path):
    path = tmp_path / "run.npz"
    reduced_run().save(path)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["core_0"], arrays["core_1"] = arrays["core_1"], arrays["core_0"]
    with path.open("wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(ValueError, match="is not the one that was written"):
        dln.load(path)


@pytest.mark.parametrize("name", ["statistics", "reduced", "dense"])
def test_files_of_0_1_0_can_be_written_again(name, tmp_path):
    source = DATA / "format-1" / f"{name}.npz"
    kind = dln.SufficientStatistics if name == "statistics" else dln
    kind.load(source).save(tmp_path / "again.npz")
    with np.load(source) as before, np.load(tmp_path / "again.npz") as after:
        assert set(before.files) == set(after.files)
        for array in set(before.files) - {"meta"}:
            np.testing.assert_array_equal(before[array], after[array])
        assert "digest" in json.loads(str(after["meta"]))


# ------------------------------------------------------------------------------------ states of trackers


def tracker_state():
    tracker = dln.SVDTracker(2, seed=3)
    tracker.update(np.random.default_rng(0).standard_normal((7, 5)))
    return tracker.state_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": np.zeros(3)}, r"state\['branches'\] has shape \(2,\); wanted \(3\)"),
        ({"values": np.array([np.nan, 1.0])}, r"state\['values'\] has values that are not finite"),
        ({"left": np.zeros((5, 2))}, r"state\['left'\] has shape \(5, 2\); wanted \(7, 2\)"),
        ({"right": np.zeros((5, 2), dtype=np.float32)}, r"state\['right'\] has dtype float32"),
        ({"shape": [7, 10**12]}, r"state\['right'\] has shape .* wanted \(1000000000000, 2\)"),
        ({"shape": [7]}, "expected 2|another type|unpack"),
        ({"dtype": "float16"}, r"state\['dtype'\] is float16"),
        ({"events": -1}, r"state\['events'\] is -1"),
        ({"next_branch": 1}, r"state\['next_branch'\] is 1; wanted an integer of at least 2"),
        ({"branches": np.array([0.0, 1.0])}, r"state\['branches'\] has dtype float64"),
        ({"settings": {}}, "state lacks"),
        ({"version": 99}, "state has version 99"),
        ({"version": "1"}, "state"),
    ],
)
def test_errors_name_inconsistent_states(changes, message):
    state = tracker_state()
    with pytest.raises((ValueError, TypeError), match=r"its checksum does not match|version"):
        dln.SVDTracker.from_state_dict(state | changes)
    del state["checksum"]  # as in 0.1.0
    assert dln.SVDTracker.from_state_dict(state).k == 2
    with pytest.raises((ValueError, TypeError), match=message):
        dln.SVDTracker.from_state_dict(state | changes)


def test_exchanged_vectors_of_a_state_are_detected():
    tracker = dln.SVDTracker(2, seed=3)
    tracker.update(np.random.default_rng(0).standard_normal((6, 6)))
    state = tracker.state_dict()
    assert dln.SVDTracker.from_state_dict(dict(reversed(state.items()))).k == 2
    with pytest.raises(ValueError, match="its checksum does not match"):
        dln.SVDTracker.from_state_dict(state | {"left": state["right"], "right": state["left"]})


def test_the_checksums_in_files_stay_the_same():
    array = np.arange(6.0).reshape(2, 3)
    arrays = {"b": array.T, "a": np.arange(3), "none": np.empty((0, 2))}
    identity = compute_identity({"steps": 3, "rate": 0.1}, arrays)
    assert identity == "db7e323a349d6d689daa1a76e0c7c3b08afdda777325026cf897b5f4bd758756"
    state = {"a": array.T, "list": [1, {"b": 2.5}], "text": "x", "tensor": np.ones(2, dtype=np.float32)}
    checksum = add_state_checksum(state)["checksum"]
    assert checksum == "7c17b6e6a5c528d5e785a42b839737096df392daab05c21af0c7148aa56d37f6"
