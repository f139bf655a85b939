# SPDX-License-Identifier: MIT
"""Files of every format load; damaged, foreign and newer ones are named; there is no pickle."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile

import numpy as np
import pytest
import released_formats
from hypothesis import given, settings
from hypothesis import strategies as st
from released_formats import DATA, FOLDERS, RUNS
from tolerances import tolerance

import dlnfast as dln
from dlnfast import Checkpoint

RELEASED = sorted(DATA.glob("format-*"))


def files(pattern):
    return [
        pytest.param(path, id=f"{path.parent.name}/{path.name}") for d in RELEASED for path in d.glob(pattern)
    ]


def but_for_rounding(described):
    return json.loads(json.dumps(described), parse_float=lambda _: "a number")


def agree(run, again):
    """Compare what a file holds with what is computed now."""
    assert run.engine == again.engine
    assert run.widths == again.widths
    assert run.config["outcome"] == again.config["outcome"]
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
        np.testing.assert_allclose(run.rates, again.rates, rtol=1e-6)  # of a search that ends early


def test_every_kind_of_file_is_among_them():
    names = {path.stem for path in (DATA / "format-1").iterdir()}
    assert names == {
        *RUNS,
        "statistics",
        *(f"{name}-{end}" for name in FOLDERS for end in ("ended", "stopped")),
    }


@pytest.mark.parametrize("path", [p for name in RUNS for p in files(f"{name}.npz")])
def test_saved_runs_load(path):
    agree(dln.load(path), RUNS[path.stem]())


def test_saved_problems_are_whole():
    for folder in RELEASED:
        for path in folder.glob("whitened.npz"):
            inputs, _ = released_formats.samples()
            found, wanted = dln.load(path).problem, RUNS["whitened"]().problem
            np.testing.assert_allclose(found.transform(inputs), wanted.transform(inputs), rtol=1e-12)
            np.testing.assert_array_equal(found.classes, wanted.classes)


@pytest.mark.parametrize("path", files("statistics.npz"))
def test_saved_statistics_load(path):
    found, wanted = dln.SufficientStatistics.load(path), released_formats.statistics()
    assert (found.n_samples, found.layout) == (wanted.n_samples, wanted.layout)
    a, b = (statistics.problem(whiten=None) for statistics in (found, wanted))
    np.testing.assert_allclose(a.target, b.target, rtol=1e-14)
    np.testing.assert_allclose(a.input_gram, b.input_gram, rtol=1e-14)


@pytest.mark.parametrize("path", files("*-ended"))
def test_folders_of_runs_that_ended_load(path):
    agree(dln.load(path), FOLDERS[path.name.partition("-")[0]]())


@pytest.mark.parametrize("path", files("*-stopped"))
def test_folders_of_runs_that_stopped_load_and_go_on(path, tmp_path):
    whole = FOLDERS[path.name.partition("-")[0]]()
    run = dln.load(path)
    assert run.config["outcome"] == "unfinished"
    count = len(run.loss)
    assert count > released_formats.STOPPED_AT - 10
    near = 4 * tolerance(np.float64, max(run.widths), count)
    np.testing.assert_allclose(run.loss, whole.loss[:count], rtol=near)
    shutil.copytree(path, tmp_path / "run")
    agree(dln.resume(tmp_path / "run"), whole)


def test_no_file_holds_a_pickle():
    for path in DATA.rglob("*.npz"):
        with zipfile.ZipFile(path) as file:
            for name in file.namelist():
                assert file.read(name)[:6] == b"\x93NUMPY"
                assert b"'|O'" not in file.read(name)[:200]


# ------------------------------------------------------------------------------------------- damage


def content(run):
    """Return all that a run holds, as one thing to compare."""
    about, arrays = run.to_arrays()
    return json.dumps(about, sort_keys=True), {
        k: (v.dtype.str, v.shape, v.tobytes()) for k, v in arrays.items()
    }


def read(folder):
    """Return the content of a folder, or the text of the error that it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = content(dln.load(folder))
        except ValueError as error:
            return None, str(error)
    assert all(w.category is RuntimeWarning and str(folder) in str(w.message) for w in caught)
    return found, ""


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Return folders of two engines, with more losses than zip reads at once."""
    place = tmp_path_factory.mktemp("kept")
    problem, weights = dln.low_rank_recovery(6, 1), dln.orthogonal([6] * 3)
    options = {"learning_rate": 0.3, "steps": 2000, "record_every": 100, "n_threads": 1}
    for engine in ("reduced", "dense"):
        where = Checkpoint(place / engine, every=700, seconds=0)
        dln.train(problem, weights, **options, engine=engine, checkpoint=where)
        where = Checkpoint(place / f"other {engine}", every=700, seconds=0)
        dln.train(problem, weights, **options | {"learning_rate": 0.31}, engine=engine, checkpoint=where)
    return place


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_folder_is_named_or_the_same(data, kept, tmp_path_factory):
    engine = data.draw(st.sampled_from(["reduced", "dense"]))
    folder = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(kept / engine, folder)
    path = folder / data.draw(st.sampled_from(names(folder)))
    held = bytearray(path.read_bytes())
    # Headers and directories are as likely as numbers: most bytes of large files are numbers.
    place = data.draw(st.one_of(st.integers(0, len(held) - 1), st.integers(0, min(400, len(held) - 1))))
    if data.draw(st.booleans()):
        held = held[:place]
    else:
        held[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(held)
    found, error = read(folder)
    if found is None:
        assert str(folder) in error
    else:
        assert found == content(dln.load(kept / engine))


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_headers_that_say_less_than_there_is_are_noticed(engine, kept, tmp_path):
    # numpy.load reads no further than the header says, and never comes to the checksum.
    shutil.copytree(kept / engine, tmp_path / "run")
    path = sorted((tmp_path / "run").glob("records-*.npz"))[0]
    held = path.read_bytes()
    assert held.count(b"(701,)") == 1
    path.write_bytes(held.replace(b"(701,)", b"(601,)"))
    with pytest.raises(ValueError, match=r"records-\d+.npz is not a complete file"):
        dln.load(tmp_path / "run")


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_files_of_another_run_are_noticed(engine, kept, tmp_path):
    for i, name in enumerate(names(kept / engine)):
        folder = tmp_path / str(i)
        shutil.copytree(kept / engine, folder)
        shutil.copy(kept / f"other {engine}" / name, folder / name)
        found, error = read(folder)
        if name.startswith("state") and found is not None:
            assert found == content(dln.load(kept / engine))  # not needed
        else:
            assert "another run" in error or "no state of its last step" in error, (name, error)


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_missing_files_are_noticed(engine, kept, tmp_path):
    for i, name in enumerate(n for n in names(kept / engine) if n.startswith("records")):
        folder = tmp_path / str(i)
        shutil.copytree(kept / engine, folder)
        (folder / name).unlink()
        with pytest.raises(ValueError, match=r"is missing|lacks the last"):
            dln.load(folder)


def test_the_weights_of_a_run_that_ended_are_those_of_its_end(kept, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(kept / "dense", folder)
    newest = sorted(folder.glob("state-*.npz"))[-1]
    newest.write_bytes(newest.read_bytes()[:500])
    with (
        pytest.warns(RuntimeWarning, match="going on from the one before"),
        pytest.raises(ValueError, match=r"no state of its last step, 2000.*without end.json the run goes on"),
    ):
        dln.load(folder)
    (folder / "end.json").unlink()
    with pytest.warns(RuntimeWarning, match="going on from the one before"):
        run = dln.resume(folder)
    np.testing.assert_array_equal(run.weights(1), dln.load(kept / "dense").weights(1))


def test_newer_and_foreign_endings_are_named(kept, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(kept / "reduced", folder)
    end = folder / "end.json"
    held = json.loads(end.read_text())
    for changed, text in (
        (held | {"format_version": 99}, "was written by a newer version"),
        (held | {"step": 1999}, "its checksum is another"),
        ({"a": 1}, "it lacks"),
        ([1], "is not a complete file of a dlnfast run"),
    ):
        end.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=text) as caught:
            dln.load(folder)
        assert str(end) in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_named_or_the_same(data, tmp_path_factory):
    source = data.draw(
        st.sampled_from([DATA / "format-1" / f"{n}.npz" for n in ("reduced", "dense", "statistics")])
    )
    loader = dln.SufficientStatistics.load if source.stem == "statistics" else dln.load
    path = tmp_path_factory.mktemp("damaged") / "file.npz"
    held = bytearray(source.read_bytes())
    place = data.draw(st.integers(0, len(held) - 1))
    if data.draw(st.booleans()):
        held = held[:place]
    else:
        held[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(held)
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
