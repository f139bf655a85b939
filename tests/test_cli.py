# SPDX-License-Identifier: MIT
"""The command line: runs, specifications, exit statuses, messages and help. Figures: test_figures.py."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import numpy as np
import pytest

import dlnfast as dln
from dlnfast._commands import train as train_command
from dlnfast._config import finetuning, spec
from dlnfast._config.runs import write_json
from dlnfast._problem.low_rank import as_dense
from dlnfast._weights import initial
from dlnfast.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"
RECOVERY = """
[problem]
kind = "low-rank-recovery"
dim = 16
rank = 2
[weights]
depth = 3
scale = 0.5
[train]
learning_rate = 5.0
steps = 40
record_every = 10
"""


@pytest.fixture
def recovery_file(tmp_path):
    spec_path = tmp_path / "recovery.toml"
    spec_path.write_text(RECOVERY)
    return spec_path


def run_train_command(spec_path, folder, *options):
    assert main(["train", str(spec_path), "--out", str(folder), *options]) == 0
    summary = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
    return summary, dln.load(folder / "run.npz")


# Training from a specification file.


def test_train_writes_the_run_of_the_library(recovery_file, tmp_path, capsys):
    summary, run = run_train_command(recovery_file, tmp_path / "out")
    problem, weights = dln.low_rank_recovery(16, 2), dln.orthogonal([16] * 4, 0.5)
    wanted = dln.train(problem, weights, learning_rate=5.0, steps=40, record=dln.Record(every=10))
    np.testing.assert_array_equal(run.loss, wanted.loss)
    assert run.steps.tolist() == [0, 10, 20, 30, 40]
    assert summary["engine"] == "reduced"
    assert summary["steps"] == 40
    assert summary["final_loss"] == run.loss[-1]
    assert summary["spec"]["weights"]["init"] == "orthogonal"
    assert summary["environment"]["dlnfast"]["version"] == dln.__version__
    assert "accuracy" not in summary
    printed = capsys.readouterr().out
    assert "engine:   reduced: the closure holds" in printed
    assert str(tmp_path / "out" / "run.npz") in printed


def test_the_option_set_changes_entries_and_adds_sections(recovery_file, tmp_path):
    summary, run = run_train_command(
        recovery_file,
        tmp_path / "out",
        "--set",
        "train.steps=7",
        "train.engine=dense",
        "weights.dtype='float32'",
        "--set",
        "train.learning_rate=[1, 2, 3.0]",
        "output.weights=false",
    )
    assert (summary["engine"], summary["steps"]) == ("dense", 7)
    assert run.config["learning_rate"] == [1.0, 2.0, 3.0]
    assert run.config["dtype"] == "float32"
    with pytest.raises(ValueError, match="step is 7"):
        run.weights(1)


def test_the_output_folder_comes_from_the_file_or_a_default(recovery_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "recovery.toml"]) == 0
    assert (tmp_path / "out" / "recovery" / "run.npz").is_file()
    assert main(["train", "recovery.toml", "--set", "output.directory=elsewhere"]) == 0
    assert (tmp_path / "elsewhere" / "summary.json").is_file()


def test_classification_reports_train_accuracy(tmp_path, capsys):
    spec_path = tmp_path / "classes.toml"
    spec_path.write_text("""
        problem = {kind = "classification", n_classes = 3, samples_per_class = 5}
        weights = {depth = 2, init = "aligned", scale = 0.3}
        train = {learning_rate = 10.0, steps = 500, singular_values = "none"}
    """)
    summary, _ = run_train_command(spec_path, tmp_path)
    assert summary["accuracy"] == {"train": {"network": 1.0, "least squares": 1.0}}
    assert "accuracy (train): 1.0000 (least squares 1.0000)" in capsys.readouterr().out


def draw_images(rng, n_samples):
    """Return images of ten classes: those of class k are bright in their own rows."""
    labels = rng.permutation(np.arange(n_samples) % 10)
    pixels = rng.integers(0, 60, (n_samples, 784))
    for k in range(10):
        pixels[labels == k, 78 * k : 78 * (k + 1)] += 190
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.uint8)


@pytest.fixture
def small_fashion_mnist(tmp_path, monkeypatch):
    """Return 60 training and 30 test images instead of Fashion-MNIST."""
    rng = np.random.default_rng(0)
    (x, y), (xt, yt) = draw_images(rng, 60), draw_images(rng, 30)
    np.savez(tmp_path / "fashion_mnist_full.npz", x_train=x, y_train=y, x_test=xt, y_test=yt)
    monkeypatch.setenv("DLNFAST_DATA", str(tmp_path))
    return x.reshape(60, -1), y.astype(int), xt.reshape(30, -1), yt.astype(int)


@pytest.mark.parametrize("whiten", ["zca", "none"])
def test_the_fashion_mnist_example_trains(small_fashion_mnist, tmp_path, whiten):
    x, y, xt, yt = small_fashion_mnist
    rate = {"zca": "0.1", "none": "1e-6"}[whiten]
    summary, run = run_train_command(
        EXAMPLES / "fashion_mnist.toml",
        tmp_path / "out",
        "--set",
        f"problem.whiten={whiten}",
        f"train.learning_rate={rate}",
        "train.steps=20",
        "train.singular_values=none",
        "weights.depth=2",
        "train.n_threads=1",  # a team of threads on a busy machine takes ten times as long
    )
    # Without whitening the 60 images span the active subspaces: still less than the half of 784.
    assert summary["engine"] == "reduced"
    assert summary["problem"]["dim_in"] == {"zca": 60, "none": 784}[whiten]
    problem = dln.Problem.from_data(x, y, whiten=None if whiten == "none" else whiten, layout="rows")
    for split, inputs, labels in (("train", x, y), ("test", xt, yt)):
        for name, matrix in (("network", run.end_to_end()), ("least squares", problem.least_squares)):
            wanted = np.mean((matrix @ problem.transform(inputs)).argmax(axis=0) == labels)
            assert summary["accuracy"][split][name] == wanted


@pytest.mark.parametrize("layout", ["columns", "rows"])
def test_a_problem_from_an_npz_file_trains(tmp_path, layout):
    rng = np.random.default_rng(1)
    X, labels = rng.standard_normal((6, 90)), rng.integers(0, 3, 90) + 4
    X[labels - 4, np.arange(90)] += 4
    Y = dln.one_hot(labels)
    turn = np.transpose if layout == "rows" else np.asarray
    (tmp_path / "data").mkdir()
    np.savez(
        tmp_path / "data" / "set.npz",
        R=turn(X[:2, :60]),
        A=turn(X[:, :60]),
        b=labels[:60],
        B=turn(Y[:, :60]),
        C=turn(X[:, 60:]),
        d=labels[60:],
        D=turn(Y[:, 60:]),
    )
    spec_path = tmp_path / "spec.toml"
    spec_path.write_text(f"""
        [problem]
        kind = "npz"
        path = "data/set.npz"          # from the folder of this file
        inputs = "A"
        outputs = "b"
        test_inputs = "C"
        test_outputs = "d"
        layout = "{layout}"
        whiten = "pca"
        reduction = "sum"
        [weights]
        widths = [6, 6, 3]
        scale = [0.5, 0.4]
        [train]
        learning_rate = 0.05
        steps = 400
        tolerance = 1e-9
    """)
    summary, run = run_train_command(spec_path, tmp_path)
    assert summary["problem"]["loss_scale"] == 1
    assert summary["accuracy"]["test"]["network"] > 0.8
    matrices, _ = run_train_command(
        spec_path, tmp_path, "--set", "problem.outputs=B", "problem.test_outputs=D"
    )
    assert matrices["accuracy"] == summary["accuracy"]
    regression, _ = run_train_command(
        spec_path, tmp_path, "--set", "problem.outputs=R", "weights.widths=[6, 6, 2]"
    )
    assert "accuracy" not in regression
    np.testing.assert_array_equal(run.widths, [6, 6, 3])


def test_accuracy_does_not_depend_on_the_chunks(monkeypatch):
    problem = dln.classification(3, 7)
    samples = spec.Samples(problem.inputs, problem.labels, transformed=True)
    best = as_dense(problem.least_squares)
    shifted = np.roll(best, 1, axis=0)
    monkeypatch.setattr(spec, "_CHUNK", 4)
    assert spec.accuracy(problem, {"a": best, "b": shifted}, samples) == {"a": 1.0, "b": 0.0}


# Runs that stop early.


def test_a_diverged_run_is_saved(recovery_file, tmp_path, capsys):
    arguments = [
        "train",
        str(recovery_file),
        "--out",
        str(tmp_path),
        "--set",
        "train.learning_rate=1e5",
        "train.record_every=1",
    ]
    run_train_command(recovery_file, tmp_path)
    before = [(tmp_path / name).read_bytes() for name in ("run.npz", "summary.json")]
    capsys.readouterr()
    assert main(arguments) == 1
    captured = capsys.readouterr()
    error = captured.err
    assert f"written:  {tmp_path / 'diverged.npz'}, {tmp_path / 'diverged.json'}" in captured.out
    assert error.startswith("dlnfast: the loss is not finite at step")
    assert "lower learning_rate" in error
    assert error.count("\n") == 1
    run = dln.load(tmp_path / "diverged.npz")
    assert np.isfinite(run.loss).all()
    summary = json.loads((tmp_path / "diverged.json").read_text(), parse_constant=pytest.fail)
    assert summary["error"] in error
    assert [(tmp_path / name).read_bytes() for name in ("run.npz", "summary.json")] == before


def test_an_interrupted_run_is_saved(recovery_file, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **settings):
        error = KeyboardInterrupt()
        error.trajectory = dln.train(*arguments, **settings)
        raise error

    monkeypatch.setattr(train_command, "train", interrupted)
    assert main(["train", str(recovery_file), "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "dlnfast: interrupted\n"
    assert dln.load(tmp_path / "interrupted.npz").steps[-1] == 40
    assert not (tmp_path / "run.npz").exists()


# Wrong specifications.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.lr=1", "train.lr is not a setting; wanted one of learning_rate, steps"),
        (
            "problem.whiten=zca",
            "problem.whiten is not a setting of kind 'low-rank-recovery'; wanted one of kind",
        ),
        ("problem.kind=ridge", "problem.kind is 'ridge'; wanted one of \"low-rank-recovery\""),
        ("problem.dim=16.5", "problem.dim is 16.5; wanted an integer"),
        ("problem.dim=true", "problem.dim is True; wanted an integer"),
        ("problem.rank=99", "rank is 99"),
        ("problem.reduction=max", 'problem.reduction is \'max\'; wanted one of "sum", "mean"'),
        ("weights.init=magic", "weights.init is 'magic'; wanted one of \"orthogonal\""),
        ("weights.widths=[16, 16]", "weights has both of depth and widths"),
        ("weights.depth=0", "weights.depth is 0; wanted an integer of at least 1"),
        ("weights.implicit=1", "weights.implicit is 1; wanted true or false"),
        ("weights.scale=[]", "weights.scale is []; wanted a number, or a list with one per layer"),
        ("weights.scale=[0.5, 0.5]", "scale (eps) has 2 values"),
        ("train.learning_rate=fast", "train.learning_rate is 'fast'; wanted a number"),
        ("train.learning_rate=nan", "learning_rate (eta)"),
        ("train.steps=-1", "steps is -1"),
        ("train.vectors=1", "train.vectors is 1; wanted true or false"),
        ("train.singular_values=few", "train.singular_values is 'few'"),
        ("train.optimizer=adam", "adam"),
        ("train.momentum=1.5", "momentum (mu) is 1.5"),
        ("extra.key=1", "extra is not a section; wanted one of [problem], [weights], [train], [output]"),
        ("steps=3", "--set has 'steps=3'; wanted section.key=value"),
        ("train.steps", "--set has 'train.steps'; wanted section.key=value"),
    ],
)
def test_errors_name_wrong_entries(recovery_file, tmp_path, capsys, change, message):
    assert main(["train", str(recovery_file), "--out", str(tmp_path / "out"), "--set", change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dlnfast: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "run.npz").exists()


def test_the_reduced_engine_is_refused_where_it_does_not_apply(recovery_file, tmp_path, capsys):
    changes = ["weights.init=gaussian", "train.engine=reduced"]
    assert main(["train", str(recovery_file), "--out", str(tmp_path), "--set", *changes]) == 2
    error = capsys.readouterr().err
    assert "engine='reduced' does not hold here" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "problem.kind is missing; wanted one of"),
        ("problem = 3", "problem is 3; wanted a section, [problem]"),
        ("[problem", "is not a TOML file"),
        ("[problem]\nkind = 'low-rank-recovery'\nrank = 1", "problem.dim is missing; wanted an integer"),
        ("[problem]\nkind = 'npz'", "problem.path is missing; wanted a string"),
        (RECOVERY.replace("depth = 3", ""), "weights has neither of depth and widths"),
        (RECOVERY.replace("steps = 40", ""), "train.steps is missing; wanted an integer"),
    ],
)
def test_errors_name_wrong_files(tmp_path, capsys, text, message):
    spec_path = tmp_path / "spec.toml"
    spec_path.write_text(text)
    # A missing section counts as an empty one, and the sections are checked in their order.
    if "[train]" not in text and "missing" in message:
        spec_path.write_text(text + "\n[weights]\ndepth = 1\n[train]\nsteps = 1\nlearning_rate = 1\n")
    assert main(["train", str(spec_path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path = 'none.npz'"], "no such file"),
        (["path = 'bad.npz'"], "not a readable .npz file"),
        (["path = 'one.npy'"], "a single array; wanted an .npz archive"),
        (["path = 'set.npz'", "inputs = 'Z'"], "problem.inputs is 'Z', which is not in"),
        (["path = 'set.npz'", "test_inputs = 'X'"], "wanted both or neither"),
        (["path = 'set.npz'", "layout = 'rows'"], "X has 2 samples and Y has 3"),
    ],
)
def test_errors_name_wrong_data(tmp_path, capsys, lines, message):
    np.savez(tmp_path / "set.npz", X=np.ones((2, 5)), Y=np.ones((3, 5)))
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "bad.npz").write_text("not an archive")
    spec_path = tmp_path / "spec.toml"
    spec_path.write_text("\n".join(["[problem]", "kind = 'npz'", *lines, RECOVERY.partition("rank = 2")[2]]))
    assert main(["train", str(spec_path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_an_error_names_missing_fashion_mnist(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("DLNFAST_DATA", raising=False)
    assert main(["train", str(EXAMPLES / "fashion_mnist.toml"), "--out", str(tmp_path)]) == 2
    assert "DLNFAST_DATA" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_examples_are_valid(path):
    text = path.read_text()
    if "[grid]" in text:
        assert len(finetuning.read_grid(path).sections["grid"]["seeds"]) >= 5
    elif "[sweep]" in text:
        assert len(dln.SweepGrid(path)) > 50
    else:
        assert spec.read_spec(path).train["steps"] > 0


def test_the_example_writes_only_to_the_folder_out(small_fashion_mnist, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    before = set(tmp_path.iterdir())
    finished = python(str(EXAMPLES / "fashion_mnist.py"))
    assert finished.returncode == 0, finished.stderr
    assert set(tmp_path.iterdir()) - before == {tmp_path / "out"}
    assert (tmp_path / "out" / "fashion_mnist.png").is_file()


# Other commands.


def test_info_describes_the_build(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in ("version:", dln.__version__, "level:", "numpy:", "torch:"):
        assert word in printed


def test_lazily_sampled_weights_train_at_any_width(recovery_file, tmp_path, capsys):
    changes = ["--set", "problem.dim=20_000", "weights.implicit=true"]
    summary, run = run_train_command(recovery_file, tmp_path / "out", *changes)
    weights = dln.orthogonal([20_000] * 4, 0.5, implicit=True)
    record = dln.Record(every=10)
    wanted = dln.train(dln.low_rank_recovery(20_000, 2), weights, learning_rate=5.0, steps=40, record=record)
    np.testing.assert_array_equal(run.loss, wanted.loss)
    assert summary["spec"]["weights"]["implicit"] is True

    command = ["train", str(recovery_file), "--out", str(tmp_path / "no"), *changes, "weights.init=gaussian"]
    assert main(command) == 2
    assert "weights.implicit is true but weights.init is 'gaussian'" in capsys.readouterr().err


def test_layers_that_do_not_fit_into_memory_are_an_error_with_a_remedy(
    recovery_file, tmp_path, capsys, monkeypatch
):
    def allocate(rows, columns, generator):
        raise MemoryError("Unable to allocate 74.5 GiB")

    monkeypatch.setattr(initial, "haar", allocate)
    assert main(["train", str(recovery_file), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "dlnfast: layers of width 16 do not fit into memory (Unable to allocate 74.5 GiB)"
    )
    assert "implicit=True" in error


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    for section in ("problem", "weights", "train", "output"):
        assert f"[{section}]" in printed
    for kind, keys in spec._PROBLEMS.items():
        part = printed.partition(f'[problem]  kind = "{kind}"')[2].partition("\n[")[0]
        for key in keys:
            assert f"\n  {key} " in part
    for section, keys in spec._SECTIONS.items():
        part = printed.partition(f"\n[{section}]")[2].partition("\n[")[0]
        for key, rule in keys.items():
            line = next(text for text in part.splitlines() if text.startswith(f"  {key} "))
            assert rule.wanted in line
            assert ("required" in line) == rule.required
    assert "  steps            an integer; required\n" in printed
    example = textwrap.dedent(printed.partition("A complete SPEC.toml:\n")[2].partition("\nThe sections")[0])
    assert spec.check_spec(tomllib.loads(example)).train["steps"] == 50
    assert '  engine           one of "auto", "reduced", "dense", "torch"; default "auto"\n' in printed


def test_help_of_figure_refers_to_the_help_of_each_figure(capsys):
    with pytest.raises(SystemExit):
        main(["figure", "--help"])
    assert "dlnfast figure NAME --help" in capsys.readouterr().out


def python(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["figure", "--list"],
        ["figure", "svd-evolution", "--help"],
        ["info"],
    ],
)
def test_matplotlib_is_imported_for_figures_only(arguments):
    code = (
        "import sys\nfrom dlnfast.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as leaving:\n    assert leaving.code == 0\n"
        "assert not {'matplotlib', 'tqdm', 'torch'} & set(sys.modules)"
    )
    finished = python("-c", code)
    assert finished.returncode == 0, finished.stderr


def test_plots_and_figures_import_without_matplotlib():
    code = "import sys, dlnfast.plots, dlnfast.figures; assert 'matplotlib' not in sys.modules"
    finished = python("-c", code)
    assert finished.returncode == 0, finished.stderr


def test_the_self_check_passes():
    finished = python("-m", "dlnfast")
    assert finished.returncode == 0, finished.stderr
    assert "self-check: reduced and dense engine are" in finished.stdout
    assert finished.stdout.rstrip().endswith("passed")
    assert python("-m", "dlnfast", "--version").stdout == f"dlnfast {dln.__version__}\n"


def test_the_self_check_fails_when_the_engines_disagree(monkeypatch, capsys):
    from dlnfast import __main__ as module

    honest = module.train

    def different(problem, weights, *, engine, **settings):
        factor = 1 if engine == "dense" else 1 + 1e-9
        return honest(problem, weights, engine=engine, **settings | {"learning_rate": 4.0 * factor})

    monkeypatch.setattr(module, "train", different)
    assert not module.self_check()
    assert "FAILED" in capsys.readouterr().out


# Closed output pipes.


def finetuning_results(folder):
    """Write a specification of fine-tuning and the results of its runs."""
    (folder / "model").mkdir()
    sections = {
        "model": {"path": str(folder / "model")},
        "task": {"path": str(folder)},
        "grid": {
            "methods": ["lora"],
            "ranks": [4],
            "examples": [16],
            "seeds": [0],
            "etas": [1e-3],
        },
        "training": {"steps": 3},
    }
    lines = []
    for name, entries in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in entries.items())]
    (folder / "grid.toml").write_text("\n".join(lines))
    grid = finetuning.read_grid(folder / "grid.toml")
    (folder / "out").mkdir()
    results = finetuning.Results(folder / "out" / "results.jsonl")
    for run in grid.runs():
        scores = {"selection": 0.5, "report": 0.25}
        found = {"scores": scores, "ranks": {"a": 4}, "update_norm": 1.0}
        results._write({"run": run.to_dict(), "about": grid.metadata(), **found})


def commands_that_write(folder):
    """Return commands, and the files that each of them writes."""
    (folder / "a.toml").write_text(RECOVERY)
    (folder / "sweep.toml").write_text(RECOVERY + '[sweep]\n"weights.seed" = [0, 1]\n')
    run = dln.train(dln.low_rank_recovery(4, 1), dln.orthogonal([4] * 3), learning_rate=0.1, steps=2)
    run.save(folder / "run.npz")
    finetuning_results(folder)
    out = folder / "out"
    return {
        "train": (["train", "a.toml", "--out", "out"], [out / "run.npz", out / "summary.json"]),
        "sweep": (
            ["sweep", "sweep.toml", "--out", "out", "--workers", "1", "--table"],
            [out / "results.csv"],
        ),
        "finetune": (
            ["finetune", "grid.toml", "--out", "out", "--table"],
            [out / "table.md", out / "summary.json"],
        ),
        "figure": (
            ["figure", "svd-evolution", "--quick", "--out", "out"],
            [out / "svd-evolution.png", out / "svd-evolution.json"],
        ),
        "export": (["export", "run.npz", "out/run.h5"], [out / "run.h5"]),
        "bench": (
            ["bench", "--case", "small", "--peers", "numpy-thin", "--quick", "--out", "out/bench.json"],
            [out / "bench.json"],
        ),
    }


def without_reader(arguments, folder, stdout):
    """Run a command whose output pipe has no reader, unbuffered as in many containers."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "MPLBACKEND": "agg"}
    return subprocess.run(
        [sys.executable, "-c", "import sys; from dlnfast.cli import main; sys.exit(main())", *arguments],
        cwd=folder,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )


@pytest.mark.skipif(os.name != "posix", reason="pipes and /dev/full are POSIX's")
@pytest.mark.parametrize("name", ["train", "sweep", "finetune", "export"])
def test_results_are_written_when_the_output_pipe_is_closed(name, tmp_path):
    if name == "export":
        pytest.importorskip("h5netcdf", reason="stores are optional")
    arguments, written = commands_that_write(tmp_path)[name]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        finished = without_reader(arguments, tmp_path, writer)
    finally:
        os.close(writer)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert all(path.stat().st_size > 0 for path in written)
    for path in written:
        path.unlink()
    with open("/dev/full", "wb") as full:
        finished = without_reader(arguments, tmp_path, full)
    assert finished.returncode == 1
    assert finished.stderr == (
        "dlnfast: the output could not be written: [Errno 28] No space left on device\n"
    )
    assert all(path.stat().st_size > 0 for path in written)


@pytest.mark.parametrize("name", ["figure", "bench"])
def test_figures_and_measurements_are_written_before_they_are_printed(name, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="figures are optional")
    arguments, written = commands_that_write(tmp_path)[name]

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(arguments) == 0
    assert all(path.stat().st_size > 0 for path in written)


def test_characters_outside_the_encoding_of_the_output_are_escaped(recovery_file, tmp_path, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    folder = tmp_path / "\N{SNOWMAN}"
    assert main(["train", str(recovery_file), "--out", str(folder)]) == 0
    assert (folder / "summary.json").is_file()
    output.flush()
    assert b"\\u2603" in output.buffer.getvalue()


def test_the_command_line_works_without_standard_output(recovery_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as in Python with a closed descriptor
    assert main(["train", str(recovery_file), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "summary.json").is_file()


def test_a_full_disk_leaves_the_previous_files(recovery_file, tmp_path, monkeypatch):
    run_train_command(recovery_file, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert main(["train", str(recovery_file), "--out", str(tmp_path / "out"), "--set", "train.steps=5"]) == 2
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "out" / "summary.json", {})
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_json_files_contain_no_nan(tmp_path):
    record_path = tmp_path / "record.json"
    write_json(
        record_path,
        {
            "a": np.array([1.0, np.nan, np.inf]),
            "b": (np.float32(2.5), np.int64(3), np.bool_(True)),
            "c": {"d": Path("x"), "e": None, "f": range(2)},
            "g": "text",
        },
    )
    assert json.loads(record_path.read_text(), parse_constant=pytest.fail) == {
        "a": [1.0, None, None],
        "b": [2.5, 3, True],
        "c": {"d": "x", "e": None, "f": [0, 1]},
        "g": "text",
    }
