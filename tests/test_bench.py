# SPDX-License-Identifier: MIT
"""Peers compute the same results before they are timed, and results are saved with a machine record."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.optional_packages import import_torch

from dlnfast.benchmarks import cases, checkpoints, peers, record, tables
from dlnfast.cli import main

ROOT = Path(__file__).parent.parent
OWN = ["dlnfast-reduced", "dlnfast-dense", "numpy-thin", "numpy-naive"]
MACHINE = {
    "date",
    "processor",
    "cores",
    "system",
    "load",
    "python",
    "packages",
    "dlnfast",
    "thread_pools",
    "variables",
    "caps",
}


def check_losses(setting, name, tune=False):
    built, skipped = peers.build(setting, [name], tune=tune)
    assert not skipped
    return peers.check_agreement(built, skipped)["losses"]


# Peers


def test_all_peers_agree():
    # In a separate process, because the libraries emit warnings and start threads that they do not stop.
    result = record.in_process(
        "cases:measure",
        {
            "settings": [
                {"dim": 24, "n_outputs": 3, "n_samples": 40},
                {"dim": 12, "n_outputs": 12, "depth": 4},
            ],
            "names": [list(peers.PEERS), [name for name in peers.PEERS if name != "torch-compile"]],
            "repeats": 2,
            "turn": 0.001,
        },
    )
    assert set(result["machine"]) == MACHINE
    for row in result["rows"]:
        assert row["agreement"]["largest_relative_difference"] < 1e-12
        assert len(row["agreement"]["losses"]) == 3
        assert set(OWN) <= set(row["seconds"])
        for times in row["seconds"].values():
            assert times["least"] <= times["median"] <= times["largest"]
            assert times["rounds"] == 2
            assert times["steps_per_turn"] >= 1
        assert all(reason for reason in row["skipped"].values())
    compared = {*result["rows"][0]["seconds"], *result["rows"][0]["skipped"]}
    assert compared == set(peers.PEERS) == set(peers.LABELS) - set(peers.FURTHER)
    assert result["rows"][0]["setting"] == {
        "dim": 24,
        "n_outputs": 3,
        "depth": 3,
        "n_samples": 40,
        "rank": 3,
    }


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_peers_agree_at_every_depth(depth):
    setting = peers.Setting(20, 4, depth)
    expected = check_losses(setting, "dlnfast-dense")
    for name in ("numpy-thin", "numpy-naive"):
        np.testing.assert_allclose(check_losses(setting, name), expected, rtol=1e-12)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("block", [0, 1, 7, 16])
@pytest.mark.parametrize("depth", [1, 4])
def test_both_forms_of_the_thin_step_agree(block, order, depth):
    setting = peers.Setting(40, 3, depth)
    step = peers._numpy_step(setting, peers._Form(block, order, 0))
    expected = check_losses(setting, "dlnfast-dense")
    np.testing.assert_allclose(np.array([step() for _ in range(4)])[[0, 1, 3]], expected, rtol=1e-12)


def test_the_chosen_form_is_recorded(monkeypatch):
    chosen, _ = peers.build(peers.Setting(40, 3), ["numpy-thin"])
    assert chosen["numpy-thin"].note.startswith("update in ")
    peers._blas_controller.cache_clear()
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    chosen, _ = peers.build(peers.Setting(40, 3), ["numpy-thin"])
    peers._blas_controller.cache_clear()
    assert "thread" not in chosen["numpy-thin"].note


def test_settings_build_the_described_problem():
    setting = peers.Setting(30, 4, 2, n_samples=50)
    X, Y = setting.samples()
    np.testing.assert_allclose(X @ X.T, np.eye(30), atol=1e-13)
    np.testing.assert_allclose(Y @ X.T, setting.target, atol=1e-13)
    first, last = setting.weights()
    np.testing.assert_allclose(first @ first.T, setting.scale**2 * np.eye(30), atol=1e-13)
    np.testing.assert_allclose(last @ last.T, setting.scale**2 * np.eye(4), atol=1e-13)
    with pytest.raises(ValueError, match="n_samples is 29; wanted at least dim = 30"):
        peers.Setting(30, 4, n_samples=29).samples()


def test_a_peer_that_differs_is_an_error():
    built, skipped = peers.build(peers.Setting(16, 2), ["dlnfast-dense", "numpy-thin"], tune=False)
    step = built["dlnfast-dense"].advance
    built["dlnfast-dense"].advance = lambda n: step(n) * (1 + 1e-8)
    with pytest.raises(RuntimeError, match=r"dlnfast-dense has losses .* 1\.0e-08 apart"):
        peers.check_agreement(built, skipped)


@pytest.mark.parametrize("module", ["torch", "jax"])
def test_a_peer_that_is_not_installed_is_skipped(monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)
    names = [name for name in peers.PEERS if name.startswith(module)]
    result = cases.measure([{"dim": 12, "n_outputs": 2}], [["numpy-thin", *names]], 1, 0.001)
    reason = f"{module} is not installed: pip install {module}"
    assert result["rows"][0]["skipped"] == dict.fromkeys(names, reason)
    assert list(result["rows"][0]["seconds"]) == ["numpy-thin"]
    table = tables.markdown({"results": [{"case": "small", **result}]})
    assert f"({reason})." in table
    assert f"| {peers.LABELS[names[0]]} | - |" in table


def test_other_missing_modules_are_errors(monkeypatch):
    def missing(setting, tune):
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setitem(peers.PEERS, "torch-thin", missing)
    with pytest.raises(ModuleNotFoundError):
        peers.build(peers.Setting(12, 2), ["torch-thin"])


def test_a_peer_that_does_not_compile_is_skipped_and_other_failures_are_errors(monkeypatch):
    def failing(setting, tune):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setitem(peers.PEERS, "torch-compile", failing)
    monkeypatch.setitem(peers.PEERS, "torch-thin", failing)
    assert peers.build(peers.Setting(12, 2), ["torch-compile"]) == (
        {},
        {"torch-compile": "RuntimeError: no compiler"},
    )
    with pytest.raises(RuntimeError, match="no compiler"):
        peers.build(peers.Setting(12, 2), ["torch-thin"])
    late = peers.Peer("torch-compile", lambda n: failing(None, None))
    skipped = {}
    peers.check_agreement({"torch-compile": late}, skipped)
    assert skipped == {"torch-compile": "RuntimeError: no compiler"}


def test_the_reduced_engine_is_skipped_where_no_closure_exists(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(peers.Setting, "weights", lambda self: list(rng.standard_normal((2, 12, 12))))
    built, skipped = peers.build(peers.Setting(12, 12, 2), ["dlnfast-reduced"], tune=False)
    assert not built
    assert skipped["dlnfast-reduced"]


# The machine


def test_the_machine_record_without_threadpoolctl(monkeypatch):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    found = record.machine()
    assert found["thread_pools"] is None
    assert "pip install threadpoolctl" in record.describe_machine(found)


def test_thread_limits_are_reported(monkeypatch):
    monkeypatch.delenv("OPENBLAS_L2_SIZE", raising=False)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    found = record.machine()
    assert found["caps"] == {"OPENBLAS_CORETYPE": "Haswell"}
    assert "CAPPED by OPENBLAS_CORETYPE=Haswell" in record.describe_machine(found)


@pytest.mark.parametrize("program", [("dlnfast", "bench"), ("bench.run",)])
def test_programs_restart_without_thread_limits(program, tmp_path):
    path = tmp_path / "results" / "small.json"
    options = [
        "--case",
        "small",
        "--quick",
        "--repeats",
        "1",
        "--peers",
        "numpy-thin",
        "--out",
        str(path),
    ]
    done = subprocess.run(
        [sys.executable, "-m", *program, *options],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_L2_SIZE": "1"},
    )
    results = json.loads(path.read_text())
    assert results["machine"]["caps"] == results["results"][0]["machine"]["caps"] == {}
    assert "CAPPED" not in done.stdout


def test_a_failed_child_process_reports_its_error():
    with pytest.raises(RuntimeError, match=r"memory failed .*no-such-peer"):
        record.in_process("cases:memory", {"setting": {"dim": 8, "n_outputs": 2}, "name": "no-such-peer"})


STARTER = """
import sys
from dlnfast.benchmarks import record
record.run_program("import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(120)",
                   sys.argv[1])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_a_child_process_exits_with_its_parent(number, tmp_path):
    pid_path = tmp_path / "pid"
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(pid_path)])
    deadline = time.monotonic() + 100
    while not (pid_path.exists() and pid_path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(pid_path.read_text())
    starter.send_signal(number)
    starter.wait()
    while time.monotonic() < deadline:
        status = Path(f"/proc/{child}/stat")
        try:
            os.kill(child, 0)
            if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
                break  # it has finished; its new parent has not waited for it yet
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the child continues without its parent")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234e-7, "123 ns"), (9.996e-7, "1.00 us"), (0.0123, "12.3 ms"), (123.4, "123 s"), (2e-10, "0.20 ns")],
)
def test_seconds_are_formatted(seconds, text):
    assert record.format_seconds(seconds) == text


# The command line


def test_the_command_line_writes_results_and_prints_tables(tmp_path, capsys):
    results_path = tmp_path / "results.json"
    options = ["--peers", "dlnfast-dense", "numpy-thin", "--quick", "--repeats", "1", "--table"]
    assert main(["bench", "--case", "thin", "square", *options, "--out", str(results_path)]) == 0
    printed = capsys.readouterr().out
    results = json.loads(results_path.read_text(), parse_constant=pytest.fail)
    assert set(results["machine"]) == MACHINE
    assert [results[key] for key in ("quick", "repeats")] == [True, 1]
    assert [result["case"] for result in results["results"]] == ["thin", "square"]
    for result, kind, work in zip(
        results["results"], ("triad", "matmul"), (24 * 2 * 64**2, 6 * 2 * 48**3), strict=True
    ):
        assert set(result["machine"]) == MACHINE
        rate = result["rows"][0]["rate"]
        assert rate["kind"] == kind
        assert rate["work_per_step"] == work
        assert set(rate["per_second"]) == {"dlnfast-dense", "numpy-thin"}
        assert rate["machine_per_second"]["median"] > 0
    assert "**thin**, d = 64, K = 10, N = d: time of a step" in printed
    assert "| | L = 3 | L = 4 |\n|---|---|---|\n| dlnfast dense | " in printed
    assert "**square**, d = 48, K = d, L = 3, N = d" in printed
    assert "| numpy.matmul, same run |" in printed
    assert main(["bench", "--read", str(results_path)]) == 0
    assert capsys.readouterr().out.strip() in printed


def test_the_other_cases_run_in_quick_mode(capsys):
    assert main(["bench", "--case", "reduced-step", "wide-run", "batch", "--quick", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    for text in ("reduced step, r = 10", "d = 10000, r = 10, L = 3, 2000 steps", "20 rates, 50 steps"):
        assert text in printed


def test_the_share_of_tracking_in_a_step_is_measured(capsys):
    import_torch()
    result = cases.run_case("track-share", cases.Options(repeats=2, quick=True))
    assert set(result["machine"]) == MACHINE
    assert [row["n_matrices"] for row in result["rows"]] == [8, 2]
    assert result["rows"][1]["n_weights"] == 3072 * 140 + 140 * 10
    for row in result["rows"]:
        assert row["share"] == row["record_seconds"]["median"] / row["seconds"]["plain"]["median"] > 0
        assert row["record_seconds"]["largest"] < row["seconds"]["tracked"]["largest"]
        # Of two records: the weights and the change of each matrix.
        assert sum(row["completeness"].values()) == 2 * 2 * row["n_matrices"]
    printed = capsys.readouterr().out
    assert "ViT, 1 layer, dim 16" in printed
    assert "record of 8 matrices" in printed
    assert tables.markdown({"results": [result]}) == ""


def test_the_torch_engine_is_measured_beside_the_others(capsys):
    import_torch()
    result = cases.run_case("torch-engine", cases.Options(repeats=1, quick=True))
    for row, (dim, n_outputs) in zip(result["rows"], ((64, 10), (48, 48)), strict=True):
        assert (row["setting"]["dim"], row["setting"]["n_outputs"]) == (dim, n_outputs)
        assert {"dlnfast-dense", "dlnfast-torch", "torch-autograd"} <= set(row["seconds"])
        assert row["agreement"]["largest_relative_difference"] < 1e-12
    assert "| dlnfast, torch engine |" in tables.markdown({"results": [result]})


def test_deep_lora_is_measured_beside_lora(capsys):
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name, reason=f"{name} is optional")
    result = cases.run_case("deep-lora", cases.Options(repeats=1, quick=True))
    assert set(result["machine"]) == MACHINE
    step, *setups = result["rows"]
    assert step["n_matrices"] == 6
    assert step["ratio"] == step["seconds"]["deep-lora"]["median"] / step["seconds"]["lora"]["median"]
    assert [(row["parts"], row["checkpointing"]) for row in setups] == [(1, False), (1, True), (4, False)]
    for row in setups:
        assert row["n_matrices"] == 6
        assert row["seconds"] > 0
        assert min(row["bytes"], row["pass_bytes"], row["lora_step_bytes"]) >= 0
    printed = capsys.readouterr().out
    assert "Deep LoRA" in printed
    assert "set-up, 6 matrices, 16 x 32 tokens in 4 batches" in printed


def test_cases_that_need_torch_are_skipped_without_it(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *others: None if name == "torch" else find(name, *others)
    )
    result = cases.run_case("track-share", cases.Options(repeats=1, quick=True))
    assert result["rows"] == []
    assert result["skipped"] in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "torch", None)
    built, skipped = peers.build(peers.Setting(12, 2), ["dlnfast-torch"], tune=False)
    assert not built
    assert skipped == {"dlnfast-torch": "torch is not installed: pip install torch"}


def test_help_names_the_cases(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in cases.CASES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], "repeats is 0"),
        (["--read", "no-such-file"], "no-such-file"),
        (["--read", "results.json", "--case", "thin"], "--read measures nothing"),
        (["--read", "other.json"], "other.json is no result"),
        (["--read", "unknown.json"], "unknown.json has the case 'x'"),
    ],
)
def test_errors_name_bad_arguments(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text("[1]")
    Path("unknown.json").write_text('{"results": [{"case": "x"}]}')
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("peer", "package"),
    [(name, peer.package) for name, peer in checkpoints._PEERS.items()],
)
def test_programs_that_decompose_checkpoints(tmp_path, peer, package):
    """All find the same matrices; programs that are not installed are left out of the case."""
    torch = pytest.importorskip("torch", reason="PyTorch is optional")
    paths = []
    for step in range(3):
        state = {
            "fc.weight": torch.randn(20, 30),
            "conv": torch.randn(12, 4, 3, 3),
            "fc.bias": torch.ones(20),
        }
        paths.append(tmp_path / f"step_{step}.pt")
        torch.save(state, paths[-1])
    pytest.importorskip(package, reason=f"{package} is optional")
    found = checkpoints.decompose(peer, [str(path) for path in paths])
    assert found["matrices"] == 6
    assert found["seconds"] > 0
    assert found["peak_bytes"] > 0


def load_gpu_figures():
    spec = importlib.util.spec_from_file_location("gpu_figures", ROOT / "bench" / "gpu_figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_no_figure_is_run(monkeypatch, tmp_path, capsys):
    torch = import_torch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_figures.py", "--out", str(tmp_path / "out")])
    assert load_gpu_figures().main() == 0
    assert capsys.readouterr().out.startswith("not run: no GPU")
    assert not (tmp_path / "out").exists()


def test_parts_of_the_gpu_figures_end_in_their_time(monkeypatch, tmp_path, capsys):
    import_torch()
    module = load_gpu_figures()
    programs = {
        "mlp-vs-hybrid": "pass",
        "spectra": "raise SystemExit(2)",
        "vit": "import time; time.sleep(60)",
    }

    def start(arguments, out, log, environment):
        assert arguments[-2:] == ["--device", "cpu"]
        out.mkdir()
        return subprocess.Popen([sys.executable, "-c", programs[out.name]])

    monkeypatch.setattr(module, "start", start)
    command = ["gpu_figures.py", *programs, "--device", "cpu", "--seconds", "5", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert module.main() == 1
    states = {
        part: found["state"] for part, found in json.loads((tmp_path / "summary.json").read_text()).items()
    }
    assert states == {"mlp-vs-hybrid": "finished", "spectra": "failed", "vit": "out of time"}
    assert "vit: out of time" in capsys.readouterr().out
