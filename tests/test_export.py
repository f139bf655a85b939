# SPDX-License-Identifier: MIT
"""Exports to xarray, zarr and HDF5 have the same content, and are written part by part in bounded memory."""

from __future__ import annotations

import errno
import functools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers.memory import peak_bytes
from helpers.optional_packages import import_pandas, import_torch
from helpers.records import merge_options

import dlnfast as dln
from dlnfast import Checkpoint
from dlnfast._trajectory import export, export_stores
from dlnfast.cli import main


@pytest.fixture
def xarray():
    return pytest.importorskip("xarray", reason="xarray is optional")


@pytest.fixture(params=["zarr", "h5"])
def store(request, xarray):
    """Return a file ending, and a function that opens such files."""
    pytest.importorskip({"zarr": "zarr", "h5": "h5netcdf"}[request.param], reason="stores are optional")
    if request.param == "zarr":
        return request.param, lambda path: xarray.open_zarr(path).load()
    return request.param, lambda path: xarray.load_dataset(path, engine="h5netcdf")


def square(**options):
    options = merge_options(
        {"learning_rate": 0.5, "steps": 60, "record": dln.Record(every=4), "n_threads": 1}, options
    )
    dtype = options.pop("dtype", "float64")
    return dln.train(dln.low_rank_recovery(12, 2), dln.orthogonal([12] * 4, dtype=dtype), **options)


def uneven(**options):
    options = merge_options(
        {
            "learning_rate": 0.1,
            "steps": 60,
            "record": dln.Record(every=4),
            "engine": "dense",
            "n_threads": 1,
        },
        options,
    )
    problem = dln.Problem.from_data(np.eye(6), np.diag([3.0, 2, 1, 0, 0, 0])[:4], whiten=None)
    return dln.train(problem, dln.gaussian([6, 5, 4], 0.3), **options)


def train_completion(**options):
    problem = dln.low_rank_completion(12, 1, observed=0.6)
    options = merge_options(
        {
            "learning_rate": "adaptive",
            "steps": 40,
            "record": dln.Record(every=5, singular_values=3),
        },
        options,
    )
    options |= {"n_threads": 1}
    return dln.train(problem, dln.gaussian([12, 4, 12], 0.3), **options)


CASES = {
    "reduced": (square, {}),
    "reduced, few values": (square, {"record": dln.Record(singular_values=2)}),
    "reduced, no values": (square, {"record": dln.Record(singular_values=None)}),
    "dense": (square, {"engine": "dense"}),
    "vectors, weights": (
        square,
        {"engine": "dense", "record": dln.Record(vectors=True, singular_values=3, weights_every=7)},
    ),
    "uneven": (uneven, {"record": dln.Record(vectors=True, weights_every=7)}),
    "float32": (square, {"dtype": "float32", "engine": "dense", "record": dln.Record(singular_values=2)}),
    "nothing but the loss": (uneven, {"record": dln.Record(singular_values=None)}),
    "completion": (train_completion, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_folders_files_and_runs_export_to_the_same(name, store, tmp_path, xarray, monkeypatch):
    ending, opened = store
    make, options = CASES[name]
    run = make(**options, steps=30, checkpoint=Checkpoint(tmp_path / "run", every=13, seconds=0))
    run.save(tmp_path / "run.npz")
    wanted = run.to_xarray()
    path = tmp_path / f"a.{ending}"
    for source, block in ((run, 2**24), (tmp_path / "run.npz", 10_000), (tmp_path / "run", 1)):
        monkeypatch.setattr(export, "_BLOCK_BYTES", block)  # at the end one record at a time
        dln.export(source, path, overwrite=True)
        xarray.testing.assert_identical(opened(path), wanted)
    assert not list(tmp_path.glob("*.part"))


def test_the_dataset_has_the_values_of_the_run(xarray):
    run = square()
    found = run.to_xarray()
    np.testing.assert_array_equal(found.loss, run.loss)
    np.testing.assert_array_equal(found.step, run.steps)
    np.testing.assert_array_equal(found.layer_name, ["W_1", "W_2", "W_3"])
    for layer in (1, 2, 3):
        of_layer = found.sel(layer=layer)
        np.testing.assert_array_equal(of_layer.singular_values, run.singular_values(layer))
        np.testing.assert_array_equal(of_layer.singular_value_errors, run.singular_value_errors(layer))
        np.testing.assert_array_equal(of_layer.active_singular_values, run.active_singular_values(layer))
        np.testing.assert_array_equal(of_layer.active_right_angles, run.active_angles(layer))
        np.testing.assert_array_equal(of_layer.active_left_angles, run.active_angles(layer, "left"))
        np.testing.assert_array_equal(of_layer.rho.isel(family=0), run.rho(layer))
        assert int(found.family_multiplicity[0]) == run.multiplicity(layer)


def test_the_dataset_has_the_metadata_of_the_run(xarray):
    run = square()
    found = run.to_xarray()
    assert found.active_right_angles.attrs["units"] == "rad"
    assert json.loads(found.attrs["config"]) == json.loads(json.dumps(run.config))
    assert json.loads(found.attrs["certificate"])["engine"] == found.attrs["engine"] == "reduced"
    assert found.attrs["dlnfast_version"] == dln.__version__
    assert found.attrs["format_version"] == 1


def test_the_dataset_has_only_the_requested_variables(xarray):
    assert set(square().to_xarray(["loss"]).sizes) == {"loss_step"}


def test_layers_of_different_widths_are_padded(xarray):
    run = uneven(record=dln.Record(vectors=True, weights_every=20))
    found = run.to_xarray()
    assert found.singular_values.shape == (16, 2, 5)
    np.testing.assert_array_equal(found.singular_values[:, 1, :4], run.singular_values(2))
    assert np.isnan(found.singular_values[:, 1, 4]).all()
    assert (found.clusters[:, 1, 4] == -1).all()
    np.testing.assert_array_equal(found.branches[:, 1, :4], run.branches(2))
    np.testing.assert_array_equal(found.right_angles[:, 1, :4], run.angles(2))
    np.testing.assert_array_equal(found.left_vectors[-1, 0, :5, :5], run.singular_vectors(1, "left"))
    assert found.weights.dims == ("weight_step", "layer", "row", "column")
    np.testing.assert_array_equal(found.weight_step, [0, 20, 40, 60])
    np.testing.assert_array_equal(found.weights.sel(weight_step=20)[1, :4, :5], run.weights(2, 20))
    assert np.isnan(found.weights[:, 1, 4]).all()
    np.testing.assert_array_equal(found.tracking_norm[:, 0], run.tracking(1)["norm"])


def test_rates_have_their_own_steps(xarray):
    run = train_completion()
    found = run.to_xarray()
    np.testing.assert_array_equal(found.rates, run.rates)
    assert found.rates.dims == ("rate_step",)
    assert "right_angles" not in found  # their order depends on the rank, which is unknown


def test_tracked_models_keep_their_names(xarray):
    torch = import_torch()
    from dlnfast.torch import track

    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracked = track(model, k=2, optimizer=optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(torch.eye(6)).square().mean()
        loss.backward()
        tracked.log_loss(loss)
        optimizer.step()
    run = tracked.trajectory()
    found = run.to_xarray()
    assert list(found.layer_name.values) == run.layer_names
    np.testing.assert_array_equal(found.singular_values[:, 0], run.singular_values(1))
    np.testing.assert_array_equal(found.right_angles[:, 1], run.angles(2))
    np.testing.assert_array_equal(found.left_block_angles[:, 1], run.block_angles(2, "left"))
    np.testing.assert_array_equal(found.loss_step, run.loss_steps)


# --------------------------------------------------------------------------------------- long runs


def test_unfinished_runs_can_be_exported(store, tmp_path):
    ending, opened = store

    def stop(step, loss):
        if step == 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        square(checkpoint=Checkpoint(tmp_path / "run", every=13, seconds=0), record=dln.Record(callback=stop))
    dln.export(tmp_path / "run", tmp_path / f"a.{ending}")
    found = opened(tmp_path / f"a.{ending}")
    assert json.loads(found.attrs["config"])["outcome"] == "unfinished"
    np.testing.assert_array_equal(found.loss, dln.load(tmp_path / "run").loss)
    for path in (tmp_path / "run").glob("records-*.npz"):
        path.unlink()
    dln.export(tmp_path / "run", tmp_path / f"b.{ending}")
    assert opened(tmp_path / f"b.{ending}").sizes["step"] == 0


@pytest.mark.parametrize("name", ["reduced", "vectors, weights", "completion"])
@pytest.mark.parametrize("every", [2, 3, 7, 1000])
def test_every_n_th_record_is_loaded(name, every, tmp_path):
    make, options = CASES[name]
    run = make(**options, checkpoint=Checkpoint(tmp_path / "run", every=13, seconds=0))
    run.save(tmp_path / "run.npz")
    last = len(run.steps) - 1
    selected = [i for i in range(last + 1) if i % every == 0 or i == last]
    for path in (tmp_path / "run", tmp_path / "run.npz"):
        found = dln.load(path, every=every)
        np.testing.assert_array_equal(found.steps, run.steps[selected])
        np.testing.assert_array_equal(found.loss, run.loss)
        np.testing.assert_array_equal(found.singular_values(2), run.singular_values(2)[selected])
        np.testing.assert_array_equal(found.weights(1), run.weights(1))
        if run.engine == "dense" and run.states.snapshots:
            steps = run.states.snapshot_steps
            wanted = steps[[i for i in range(len(steps)) if i % every == 0 or i == len(steps) - 1]]
            np.testing.assert_array_equal(found.states.snapshot_steps, wanted)
            np.testing.assert_array_equal(found.weights(2, int(wanted[-1])), run.weights(2, int(wanted[-1])))
    with pytest.raises(ValueError, match="every is 0"):
        dln.load(tmp_path / "run", every=0)


def test_every_n_th_record_is_exported(store, tmp_path):
    ending, opened = store
    run = square(checkpoint=Checkpoint(tmp_path / "run", every=13, seconds=0))
    dln.export(tmp_path / "run", tmp_path / f"a.{ending}", every=4, variables=["loss", "rho"])
    found = opened(tmp_path / f"a.{ending}")
    assert set(found.data_vars) == {"loss", "rho"}
    np.testing.assert_array_equal(found.step, [0, 16, 32, 48, 60])
    np.testing.assert_array_equal(found.rho[:, 1, 0], run.rho(2)[[0, 4, 8, 12, 15]])
    np.testing.assert_array_equal(found.loss, run.loss)


def test_memory_of_an_export_does_not_grow_with_the_run(tmp_path, monkeypatch):
    pytest.importorskip("h5netcdf", reason="stores are optional")
    monkeypatch.setattr(export, "_BLOCK_BYTES", 2**18)
    problem, weights = dln.low_rank_recovery(32, 1), dln.orthogonal([32] * 3)
    chosen = ["loss", "singular_values", "left_vectors", "right_vectors"]
    loaded, exported, every_60th = [], [], []
    for steps in (60, 480):
        folder = tmp_path / str(steps)
        checkpoint = Checkpoint(folder, every=30, seconds=60)
        options = {
            "engine": "dense",
            "record": dln.Record(vectors=True),
            "n_threads": 1,
            "learning_rate": 0.1,
        }
        dln.train(problem, weights, steps=steps, **options, checkpoint=checkpoint)
        loaded.append(peak_bytes(lambda folder=folder: dln.load(folder)))
        out = folder.with_suffix(".h5")
        exported.append(peak_bytes(lambda folder=folder, out=out: dln.export(folder, out, variables=chosen)))
        every_60th.append(peak_bytes(lambda folder=folder: dln.load(folder, every=60)))
    assert loaded[1] > 5 * loaded[0]
    assert exported[1] < 1.2 * exported[0]
    assert every_60th[1] < 1.3 * every_60th[0]
    assert exported[1] < loaded[1] / 2


# ------------------------------------------------------------------------------------------- errors


def test_an_existing_export_is_not_overwritten(store, tmp_path):
    ending, opened = store
    run, path = square(), tmp_path / f"a.{ending}"
    dln.export(run, path, variables=["loss"])
    with pytest.raises(FileExistsError, match="is there already; wanted a new name, or overwrite=True"):
        dln.export(run, path)
    with pytest.raises(ValueError, match=r"variables has 'weights'; this run has loss, singular_values"):
        dln.export(run, path, variables=["weights"], overwrite=True)
    assert set(opened(path).data_vars) == {"loss"}
    dln.export(run, path, variables=["rho"], overwrite=True)
    assert set(opened(path).data_vars) == {"rho"}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_folders_that_are_not_exports_are_not_overwritten(tmp_path):
    for name in ("a.zarr", "b.h5"):
        (tmp_path / name).mkdir()
        with pytest.raises(FileExistsError, match="is a folder, but no zarr group"):
            dln.export(square(), tmp_path / name, overwrite=True)


def test_errors_name_unknown_file_endings(tmp_path, xarray):
    run = square()
    with pytest.raises(ValueError, match=r"path is .*a.csv; wanted an ending of .zarr, .h5, .hdf5, .nc"):
        dln.export(run, tmp_path / "a.csv")


def test_errors_name_sources_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError):
        dln.export(tmp_path / "nothing", tmp_path / "a.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no run"):
        dln.export(tmp_path / "folder", tmp_path / "a.zarr")


def test_errors_name_a_missing_target_folder(tmp_path, xarray):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        dln.export(square(), tmp_path / "none" / "a.zarr")


def test_errors_name_bad_options_of_an_export(tmp_path, xarray):
    run = square()
    with pytest.raises(ValueError, match="every is 0"):
        dln.export(run, tmp_path / "a.zarr", every=0)
    with pytest.raises(TypeError, match="variables is 'loss'; wanted a list of names"):
        run.to_xarray("loss")


FULL_DISK = """
import importlib, json, resource, signal, sys
from pathlib import Path
import numpy as np
import dlnfast as dln
folder, ending, limit = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
run = dln.load(folder.parent / "run.npz")
importlib.import_module("dlnfast._trajectory.export_stores")._CHUNK_BYTES = 2**12
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    dln.export(run, folder / f"a.{ending}", overwrite=True)
    print("written")
except OSError as error:
    print(error.errno)
"""


@pytest.fixture(scope="module")
def folder_of_a_run(tmp_path_factory):
    """Return a folder with the file of a run whose export takes a few hundred kilobytes."""
    folder = tmp_path_factory.mktemp("recorded")
    weights = dln.gaussian([24] * 3, 0.5)
    options = {
        "learning_rate": 0.3,
        "steps": 60,
        "engine": "dense",
        "record": dln.Record(vectors=True),
        "n_threads": 1,
    }
    dln.train(dln.low_rank_recovery(24, 2), weights, **options).save(folder / "run.npz")
    return folder


@pytest.mark.parametrize("limit", [0, 300, 3_000, 10_000, 40_000, 160_000])
def test_a_full_disk_leaves_the_previous_export_and_no_other_file(limit, store, folder_of_a_run):
    resource = pytest.importorskip("resource", reason="limits of processes are POSIX's")
    del resource
    ending, opened = store
    folder = folder_of_a_run / f"{ending} {limit}"
    folder.mkdir()
    path = folder / f"a.{ending}"
    dln.export(dln.load(folder_of_a_run / "run.npz"), path, variables=["loss"])
    # In a separate process, because a failed write can make the HDF5 library abort.
    finished = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder), ending, str(limit)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    written = finished.stdout == "written\n"
    assert written or finished.stdout == f"{errno.EFBIG}\n"
    assert not written or limit >= 40_000
    assert ("singular_values" in opened(path).data_vars) == written
    assert "loss" in opened(path).data_vars
    assert [p.name for p in folder.iterdir()] == [path.name]


@pytest.mark.parametrize("nth", [1, 2, 5, 20, 60, 150])
def test_any_write_of_hdf5_may_fail(nth, xarray, folder_of_a_run, tmp_path, monkeypatch):
    """Ctrl-C while the library writes is tested, too."""
    pytest.importorskip("h5netcdf", reason="stores are optional")

    def opened(path):
        return xarray.load_dataset(path, engine="h5netcdf")

    run, path = dln.load(folder_of_a_run / "run.npz"), tmp_path / "a.h5"
    dln.export(run, path, variables=["loss"])
    write, count = export_stores._Sink.write, 0

    class Interrupted:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            nonlocal count
            count += 1
            if count >= nth:
                raise KeyboardInterrupt
            return self.file.write(data)

    def interrupted(self, data):
        if not isinstance(self._file, Interrupted):
            self._file = Interrupted(self._file)
        return write(self, data)

    monkeypatch.setattr(export_stores._Sink, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dln.export(run, path, overwrite=True)
    assert set(opened(path).data_vars) == {"loss"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("package", "ending", "extra"),
    [("zarr", "a.zarr", "zarr"), ("h5netcdf", "a.h5", "hdf5"), ("xarray", None, "xarray")],
)
def test_errors_name_missing_packages(package, ending, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    run = square()
    with pytest.raises(ModuleNotFoundError, match=rf'needs {package}, .*: pip install "dlnfast\[{extra}\]"'):
        run.to_xarray() if ending is None else dln.export(run, tmp_path / ending)
    assert not list(tmp_path.iterdir())


def test_a_damaged_run_leaves_no_partial_export(store, tmp_path):
    ending, _ = store
    square(checkpoint=Checkpoint(tmp_path / "run", every=13, seconds=0))
    path = sorted((tmp_path / "run").glob("records-*.npz"))[2]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"{path.name} is not a complete file"):
        dln.export(tmp_path / "run", tmp_path / f"a.{ending}")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_command_line_exports(store, tmp_path, capsys):
    ending, opened = store
    run = square(checkpoint=tmp_path / "run")
    out = tmp_path / f"a.{ending}"
    request = ["export", str(tmp_path / "run"), str(out), "--every", "5", "--variables", "loss", "rho"]
    assert main(request) == 0
    assert f"written:  {out}" in capsys.readouterr().out
    np.testing.assert_array_equal(opened(out).loss, run.loss)
    assert main(request) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*request, "--overwrite"]) == 0
    shutil.rmtree(tmp_path / "run")
    assert main([*request, "--overwrite"]) == 2


@pytest.fixture
def pandas():
    return import_pandas()


def test_a_table_has_a_row_for_every_value(pandas):
    run = uneven(record=dln.Record(singular_values=3, vectors=True))
    table = run.to_dataframe(form="wide")
    counts = [run.singular_values(layer).shape[1] for layer in (1, 2)]
    assert len(table) == len(run.steps) * sum(counts)
    assert not table.singular_values.isna().any()
    for layer, count in zip((1, 2), counts, strict=True):
        part = table[table.layer == layer].set_index(["step", "index"]).sort_index()
        for name, read in {
            "singular_values": run.singular_values,
            "singular_value_errors": run.singular_value_errors,
            "branches": run.branches,
        }.items():
            np.testing.assert_array_equal(part[name].to_numpy().reshape(-1, count), read(layer))
        norms = part["tracking_norm"].to_numpy().reshape(-1, count)
        np.testing.assert_array_equal(norms, np.repeat(run.tracking(layer)["norm"][:, None], count, axis=1))
        assert set(part.layer_name) == {run.layer_names[layer - 1]}
    np.testing.assert_array_equal(table.groupby("step").loss.first(), run.loss[run.steps])
    assert (table.groupby("step").loss.nunique() == 1).all()


def test_a_table_of_a_layer_with_fewer_values_has_fewer_rows(pandas):
    problem = dln.Problem(np.ones((2, 7)))
    run = dln.train(
        problem, dln.gaussian([7, 5, 2], 0.3), learning_rate=0.01, steps=4, record=dln.Record(every=2)
    )
    table = run.to_dataframe(form="wide")
    assert table.groupby("layer").size().tolist() == [3 * 5, 3 * 2]
    assert table[table.layer == 2]["index"].max() == 1


def test_tables_of_reduced_runs_have_all_values(pandas):
    reduced = square()
    table = reduced.to_dataframe(form="wide")
    assert len(table) == len(reduced.steps) * 3 * 12
    np.testing.assert_array_equal(
        table[table.layer == 3].singular_values.to_numpy().reshape(-1, 12), reduced.singular_values(3)
    )


def test_tables_of_adaptive_runs_have_the_rates(pandas):
    adaptive = train_completion()
    rates = adaptive.to_dataframe(form="wide").groupby("step").rates.first()
    np.testing.assert_array_equal(rates.iloc[:-1], adaptive.rates[adaptive.steps[:-1]])
    assert np.isnan(rates.iloc[-1])  # no step was taken from the last record


def test_tables_of_runs_without_values_have_a_row_for_every_layer(pandas):
    nothing = square(engine="dense", record=dln.Record(singular_values=None), steps=8).to_dataframe(
        form="wide"
    )
    assert len(nothing) in (3 * 3, 3 * 3 * 12)
    none = square(engine="dense", record=dln.Record(singular_values=0), steps=8).to_dataframe(form="wide")
    assert len(none) == 3 * 3
    assert "index" not in none


@functools.cache
def tracked_model(*, log_loss):
    """Return the run of a tracked model; it is trained once for all tests."""
    torch = import_torch()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with dln.torch.track(model, k=2, every=5) as tracked:
        for _ in range(50):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 20)).square().mean()
            loss.backward()
            if log_loss:
                tracked.log_loss(loss)
            optimizer.step()
    return tracked.trajectory()


@pytest.mark.parametrize("log_loss", [True, False])
def test_a_table_of_a_tracked_model_has_its_layers(pandas, log_loss):
    run = tracked_model(log_loss=log_loss)
    table = run.to_dataframe(form="wide")
    assert len(table) == 11 * 2 * 2
    assert set(table.layer_name) == {"0", "2"}
    assert ("loss" in table) == log_loss
    if log_loss:
        known = table.groupby("step").loss.first()
        np.testing.assert_array_equal(known.loc[run.loss_steps[::5]], run.loss[::5])
        assert np.isnan(known.loc[50])  # the weights after the last step have none yet


def test_a_tracked_model_without_losses_has_no_empty_axis(xarray, pandas):
    found = tracked_model(log_loss=False).to_xarray()
    assert "loss" not in found
    assert "loss_step" not in found.sizes
    assert len(found.to_dataframe()) == 11 * 2 * 2
    assert set(tracked_model(log_loss=True).to_xarray().loss.dims) == {"loss_step"}


LIBRARIES = ["pandas", "polars"]


@pytest.fixture(params=LIBRARIES)
def library(request):
    pytest.importorskip(request.param, reason=f"{request.param} is optional")
    return request.param


def read_column(table, name):
    return np.array(table[name].to_list())


def test_a_long_table_has_a_row_for_every_number(library):
    run = uneven(record=dln.Record(singular_values=3, vectors=True))
    table = run.to_dataframe(library=library)
    assert list(table.columns) == ["step", "layer", "layer_name", "index", "quantity", "value", "bound"]
    column = {name: read_column(table, name) for name in table.columns}
    for layer in (1, 2):
        values = run.singular_values(layer)
        rows = (column["quantity"] == "singular_values") & (column["layer"] == layer)
        assert rows.sum() == values.size
        np.testing.assert_array_equal(column["value"][rows].reshape(values.shape), values)
        bounds = column["bound"][rows].reshape(values.shape)
        np.testing.assert_array_equal(bounds, run.singular_value_errors(layer))
        assert set(column["layer_name"][rows]) == {run.layer_names[layer - 1]}
        np.testing.assert_array_equal(column["step"][rows][:: values.shape[1]], run.steps)
        np.testing.assert_array_equal(column["index"][rows][: values.shape[1]], range(values.shape[1]))
    losses = column["quantity"] == "loss"
    np.testing.assert_array_equal(column["value"][losses], run.loss)
    assert not column["layer"][losses].any()
    assert np.isnan(column["bound"][losses]).all()
    assert not np.isnan(column["value"]).any()
    assert "singular_value_errors" not in set(column["quantity"])


def test_a_long_table_has_the_chosen_quantities(library):
    run = square()
    table = run.to_dataframe(["active_singular_values", "rho"], library=library)
    assert set(read_column(table, "quantity")) == {"active_singular_values", "rho"}
    n_values = sum(run.active_singular_values(layer).size for layer in (1, 2, 3))
    assert len(table) == n_values + 3 * len(run.steps) * len(run.families())
    bounds = run.to_dataframe(["singular_value_errors"], library=library)
    assert set(read_column(bounds, "quantity")) == {"singular_value_errors"}


def test_wide_tables_are_equal_in_both_libraries():
    pytest.importorskip("pandas", reason="pandas is optional")
    pytest.importorskip("polars", reason="polars is optional")
    run = uneven(record=dln.Record(singular_values=3))
    one, other = (run.to_dataframe(form="wide", library=library) for library in LIBRARIES)
    assert list(one.columns) == list(other.columns)
    for name in one.columns:
        np.testing.assert_array_equal(read_column(one, name), read_column(other, name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"library": "xarray"}, "library is 'xarray'; wanted one of 'pandas', 'polars'"),
        ({"form": "short"}, "form is 'short'; wanted one of 'long', 'wide'"),
        ({"variables": ["left_vectors"]}, "'left_vectors', which has more than one number"),
        ({"variables": ["nothing"]}, "variables has 'nothing'; this run has"),
    ],
)
def test_bad_options_of_tables_are_named(pandas, options, message):
    run = uneven(record=dln.Record(singular_values=3, vectors=True))
    with pytest.raises(ValueError, match=message):
        run.to_dataframe(**options)


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_error_names_the_missing_library(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=rf"to_dataframe needs {library}.*pip install {library}"):
        square().to_dataframe(library=library)
