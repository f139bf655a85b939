# SPDX-License-Identifier: MIT
"""Grids of fine-tuning runs: running, resuming, selection and reports."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from faults import Faults, count

import dlnfast as dln
from dlnfast._support.locks import FolderLock

torch = pytest.importorskip("torch", reason="PyTorch is optional")
from helpers.figures import run_figure  # noqa: E402

from dlnfast._config import finetuning  # noqa: E402
from dlnfast._config.finetuning import (  # noqa: E402
    METHODS,
    Grid,
    Results,
    Row,
    compare_methods,
    make_grid,
    read_grid,
    summarise,
    table,
)
from dlnfast._config.schema import SpecError  # noqa: E402
from dlnfast.cli import main  # noqa: E402
from dlnfast.torch.finetune import Outcome, Run, find_model, prepare, run_grid  # noqa: E402

WORDS = ["a", "the", "cat", "dog", "tree", "runs", "sleeps", "sees", "green", "old", "house", "not", "two"]
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def transformers_with_peft():
    pytest.importorskip("peft", reason="peft is optional")
    return pytest.importorskip("transformers", reason="transformers is optional")


@pytest.fixture(scope="module")
def folder(transformers_with_peft, tmp_path_factory):
    """A small BERT without a head, its tokenizer, and pairs whose score is the share of common words."""
    path = tmp_path_factory.mktemp("finetuning")
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    torch.manual_seed(0)
    config = transformers_with_peft.BertConfig(vocab_size=len(WORDS) + 5, max_position_embeddings=32, **SMALL)
    transformers_with_peft.BertModel(config).save_pretrained(path / "model")
    transformers_with_peft.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path / "model")
    generator = np.random.default_rng(0)
    lines = ["split\tscore\tsentence1\tsentence2"]
    for i in range(60):
        first, second = (generator.choice(WORDS, 4) for _ in range(2))
        score = 5 * len(set(first) & set(second)) / 4
        lines.append(
            "\t".join(["dev" if i % 3 == 0 else "train", str(score), " ".join(first), " ".join(second)])
        )
    (path / "stsb_open.tsv").write_text("\n".join(lines) + "\n")
    return path


def specification(folder, **grid):
    settings = {"examples": [8], "seeds": [0], "etas": [1e-3], "ranks": [2], **grid}
    return make_grid(
        model={"path": str(folder / "model"), "max_length": 16},
        task={"path": str(folder)},
        grid=settings,
        training={"steps": 3, "batch_size": 4},
    )


@pytest.fixture(scope="module")
def tuning(folder):
    return prepare(specification(folder))


def run_of(method, **settings):
    return Run(
        method, **{"rank": 2, "n_examples": 8, "seed": 0, "eta": 0.1, "steps": 40, "batch_size": 8} | settings
    )


@pytest.mark.filterwarnings("ignore")
def test_all_methods_start_from_the_same_function_and_learn(tuning):
    found = {}
    for method in METHODS:
        run = run_of(method, scale=0.1)
        first, again = (tuning.run(run) for _ in range(2))
        assert first.loss == again.loss
        assert first.scores == again.scores
        assert set(first.scores) == {"selection", "report"}
        assert len(first.loss) == 40
        assert first.loss[-1] < 0.5 * first.loss[0]
        # LoRA-GA changes both factors, from a product of rank 2 to another one.
        assert all(0 <= rank <= (4 if method == "lora-ga" else 2) for rank in first.ranks.values())
        assert first.update_norm > 0
        # Two layers of six maps, and the pooler; the head is trained whole.
        assert len(first.ranks) == 13
        assert not any("classifier" in name for name in first.ranks)
        found[method] = first
    # The same samples, order and head: all start from the same function (but for eps^3).
    for outcome in found.values():
        assert outcome.loss[0] == pytest.approx(found["lora"].loss[0], rel=1e-2)
    assert len({outcome.loss[1] for outcome in found.values()}) == len(METHODS)
    assert tuning.run(run_of("lora", seed=1, steps=1)).loss[0] != found["lora"].loss[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_changes_rounding_only(tuning, method):
    full, low = (tuning.run(run_of(method, scale=0.1, precision=p)) for p in ("float32", "bfloat16"))
    assert full.loss != low.loss
    # Eight bits: the loss of 40 steps, and its changes, are alike to some of them.
    np.testing.assert_allclose(low.loss, full.loss, rtol=0.15, atol=0.05 * full.loss[0])
    assert low.update_norm == pytest.approx(full.update_norm, rel=0.05)
    assert low.n_parameters == full.n_parameters


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "deep-lora"])
def test_bfloat16_is_for_frozen_weights_of_adapted_layers_only(tuning, method):
    types = {}

    def record(step, model, adapter):
        types[step] = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): (p.dtype, p.requires_grad)
            for name, p in model.named_parameters()
        }

    tuning.run(run_of(method, precision="bfloat16", steps=1), after_step=record)
    assert {dtype for dtype, _ in types[0].values()} == {torch.float32}  # before the first step
    low = {name for name, (dtype, trained) in types[1].items() if dtype == torch.bfloat16 and not trained}
    assert len(low) == 13
    assert all(name.endswith(".weight") and "LayerNorm" not in name for name in low)
    assert {dtype for dtype, trained in types[1].values() if trained} == {torch.float32}


@pytest.mark.filterwarnings("ignore")
def test_dropout_is_drawn_from_the_seed_and_off_in_evaluation(tuning):
    run = run_of("deep-lora", scale=0.1, steps=4, dropout=True)
    modes = []
    torch.manual_seed(1)
    first = tuning.run(run, after_step=lambda step, model, _: modes.append(model.training))
    following = torch.rand(3)
    torch.manual_seed(2)
    again = tuning.run(run)
    assert first.loss == again.loss
    assert first.scores == again.scores
    assert modes == [False, True, True, True, True]  # before the first step, and after each
    torch.manual_seed(1)
    assert torch.equal(following, torch.rand(3))  # the caller's generator is unchanged
    without = tuning.run(run_of("deep-lora", scale=0.1, steps=4))
    assert without.loss != first.loss


@pytest.mark.filterwarnings("ignore")
def test_methods_of_peft_have_their_own_starts_and_scales(tuning):
    starts = {}

    def keep(step, model, adapter):
        assert adapter is None
        name = "base_model.model.bert.encoder.layer.0.output.dense"
        if step == 0:
            layer = model.get_submodule(name)
            weights = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            starts[run.method] = [w.detach().clone() for w in weights] + [layer.scaling["default"]]

    for method in METHODS[:-1]:
        run = run_of(method, steps=1, rank=4)
        norm = tuning.run(run, after_step=keep).update_norm
        assert 0 < norm < 2 * 0.1 * 13  # of one step, also where the start is not zero
    one = torch.eye(4)
    for method in ("lora", "rslora", "eva"):
        assert not starts[method][1].any()
    for method, scale in (("lora", 1.0), ("rslora", 4.0), ("eva", 1.0), ("lora-ga", 1.0)):
        assert starts[method][2] == pytest.approx(scale)
    for method in ("eva", "lora-ga"):
        right = starts[method][0]
        assert (right @ right.T - one).norm() <= 1e-5
    assert starts["lora-ga"][1].any()


@pytest.mark.filterwarnings("ignore")
def test_learning_rates_follow_the_shapes_of_all_factors(tuning, monkeypatch):
    seen = []
    optimizer = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda groups, **k: seen.append(groups) or optimizer(groups, **k)
    )
    for method in ("lora", "deep-lora"):
        for matched in (True, False):
            tuning.run(run_of(method, steps=1, eta=0.03, match_updates=matched))
            for group in seen.pop():
                for parameter in group["params"]:
                    n_entries = parameter[0].numel() if parameter.ndim == 3 else parameter.numel()
                    wanted = 0.03 / math.sqrt(n_entries) if matched else 0.03
                    assert group["initial_lr"] == pytest.approx(wanted)


@pytest.mark.filterwarnings("ignore")
def test_eva_and_lora_ga_refuse_ranks_that_they_cannot_start(tuning):
    with pytest.raises(
        ValueError, match="rank is 9; wanted at most 8 for 'lora-ga', half of the smaller side"
    ):
        tuning.run(run_of("lora-ga", rank=9))
    with pytest.raises(ValueError, match="rank is 16; wanted at most half of the number of tokens"):
        tuning.run(run_of("eva", rank=16, n_examples=2))


@pytest.mark.filterwarnings("ignore")
def test_the_head_starts_at_the_mean_and_all_other_parameters_are_frozen(tuning):
    run = Run("deep-lora", rank=2, n_examples=8, seed=0, eta=1e-2, steps=2, batch_size=8)
    before = {name: p.clone() for name, p in tuning.fresh_model(0)[0].named_parameters()}
    seen = []

    def record_state(step, model, adapter):
        seen.append((step, {name: p.detach().clone() for name, p in model.named_parameters()}, adapter))

    tuning.run(run, after_step=record_state)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    mean = float(tuning.train.targets[tuning.examples(run)].mean())
    assert float(seen[0][1]["classifier.bias"]) == pytest.approx(mean)
    last = seen[-1][1]
    for name, value in before.items():
        assert torch.equal(last[name], value) is not name.startswith("classifier"), name
    assert seen[-1][2].layer_names[0].startswith("bert.encoder")


def test_larger_samples_contain_the_smaller_ones(tuning):
    run = Run("lora", rank=2, n_examples=5, seed=3, eta=1e-3, steps=4, batch_size=4)
    rows = tuning.examples(run)
    assert len(set(rows.tolist())) == 5
    larger = tuning.examples(Run("lora", rank=2, n_examples=9, seed=3, eta=1e-3, steps=4))
    assert larger[:5].tolist() == rows.tolist()  # more samples contain the fewer ones


def test_batches_are_the_same_for_both_methods(tuning):
    run = Run("lora", rank=2, n_examples=5, seed=3, eta=1e-3, steps=4, batch_size=4)
    batches = list(tuning.batches(run))
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 4, 4]
    assert batches[0]["input_ids"].shape == batches[0]["attention_mask"].shape
    deep = list(
        tuning.batches(Run("deep-lora", rank=2, n_examples=5, seed=3, eta=1e-2, steps=4, batch_size=4))
    )
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, deep, strict=True))


def test_more_examples_than_there_are_is_an_error(tuning):
    with pytest.raises(ValueError, match="n_examples is 1000; wanted at most the 40 there are"):
        tuning.examples(Run("lora", rank=2, n_examples=1000, seed=0, eta=1e-3, steps=1))


@pytest.mark.filterwarnings("ignore")
def test_the_command_resumes_an_unfinished_grid(folder, tmp_path, capsys):
    spec = tmp_path / "grid.toml"
    spec.write_text(
        f'[model]\npath = "{folder / "model"}"\nmax_length = 16\n[task]\npath = "{folder}"\n'
        "[grid]\nranks = [2]\nexamples = [8]\nseeds = [0, 1]\netas = [1e-3, 1e-2]\n"
        "[training]\nsteps = 2\nbatch_size = 4\n"
    )
    out = tmp_path / "out"
    assert main(["finetune", str(spec), "--set", "grid.seeds=[0]", "--out", str(out)]) == 0
    assert len((out / "results.jsonl").read_text().splitlines()) == 4
    with (out / "results.jsonl").open("a") as file:
        file.write('{"run": {"met')  # cut off
    first = (out / "results.jsonl").read_text().splitlines()[:4]
    capsys.readouterr()
    assert main(["finetune", str(spec), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("seed 1") == 4
    assert "seed 0" not in printed
    lines = (out / "results.jsonl").read_text().splitlines()
    assert lines[:4] == first
    assert len(lines) == 8
    text = (out / "table.md").read_text()
    assert text.strip() in printed
    summary = json.loads((out / "summary.json").read_text())
    assert [row["method"] for row in summary["rows"]] == ["lora", "deep-lora"]
    assert summary["paired"][0]["pairs"] == 2
    assert main(["finetune", str(spec), "--table", "--out", str(out)]) == 0
    assert main(["finetune", str(spec), "--table", "--out", str(tmp_path / "empty")]) == 1
    assert "holds no run of this grid" in capsys.readouterr().err


def record(method, *, seed, rate, selection, report, n=16, rank=8):
    return {
        "run": {"method": method, "rank": rank, "n_examples": n, "seed": seed, "eta": rate},
        "scores": {"selection": selection, "report": report},
        "ranks": {"a": 1, "b": 2 if method == "deep-lora" else 8},
        "update_norm": 10 * report,
    }


def test_rates_are_chosen_on_one_half_and_reported_on_the_other():
    records = [
        record("lora", seed=0, rate=1e-3, selection=0.6, report=0.1),
        record("lora", seed=1, rate=1e-3, selection=0.5, report=0.3),
        record("lora", seed=0, rate=1e-2, selection=0.4, report=0.9),
        record("lora", seed=1, rate=1e-2, selection=0.5, report=0.9),
        record("lora", seed=0, rate=1e-1, selection=0.9, report=0.9),  # tried on one seed only
        record("deep-lora", seed=0, rate=1e-2, selection=0.7, report=0.2),
        record("deep-lora", seed=1, rate=1e-2, selection=0.7, report=0.5),
    ]
    lora, deep = summarise(records)
    assert (lora.method, lora.eta, lora.scores) == ("lora", 1e-3, {0: 0.1, 1: 0.3})
    assert lora.mean == pytest.approx(0.2)
    assert lora.deviation == pytest.approx(np.std([0.1, 0.3], ddof=1))
    assert (lora.mean_rank, deep.mean_rank) == (4.5, 1.5)
    (gap,) = compare_methods([lora, deep])
    assert gap["difference"] == pytest.approx(0.15)
    assert gap["standard_error"] == pytest.approx(np.std([0.1, 0.2], ddof=1) / np.sqrt(2))
    text = table([lora, deep])
    assert "| 16 | 8 | lora | 0.001 | 0.2000 | 0.1414 | 2 | 4.50 | 2 |" in text
    assert "| 16 | 8 | deep-lora - lora | +0.1500 | 0.0500 | 2 |" in text


def test_a_single_seed_has_no_deviation():
    row = Row("lora", 16, 8, 1e-3, {0: 0.5}, 0.4, [8], {0: 1.0})
    assert math.isnan(row.deviation)
    assert "| 0.5000 | - | 1 |" in table([row])
    assert compare_methods([row]) == []


def test_errors_name_wrong_specifications(tmp_path, folder):
    spec = tmp_path / "grid.toml"
    spec.write_text('[model]\npath = "x"\n[grid]\nexamples = [1]\nseeds = [0]\netas = [1]\n')
    with pytest.raises(SpecError, match=r"training\.steps is missing"):
        read_grid(spec)
    for change, message in (
        ("grid.methods=['full']", r"grid\.methods is \['full'\]"),
        ("grid.colour=1", r"grid\.colour is not a setting"),
        ("task.evaluated=2", r"task\.evaluated is 2; wanted an integer of at least 4"),
        ("deep-lora.init='zero'", r"deep-lora\.init is 'zero'"),
        ("house.roof=1", "house is not a section"),
        ("grid.learning_rates=[1]", r"since version 0\.2\.0: write grid\.etas.*match_updates = false"),
        ("deep-lora.learning_rates=[1]", r"since version 0\.2\.0: write deep-lora\.etas"),
    ):
        with pytest.raises(SpecError, match=message):
            read_grid(spec, ["training.steps=1", change])
    assert "[deep-lora]" in finetuning.describe_settings()


def test_results_of_the_first_version_are_kept_and_not_reused(folder, tmp_path):
    grid = specification(folder, methods=["lora"])
    (run,) = grid.runs()
    old = {key: value for key, value in run.to_dict().items() if key not in ("eta", "match_updates")}
    line = json.dumps(
        {"run": old | {"learning_rate": 1e-3}, "about": grid.metadata(), "scores": {}, "ranks": {}}
    )
    (tmp_path / "results.jsonl").write_text(line + "\n")
    results = Results(tmp_path / "results.jsonl")
    assert results.missing(grid) == [run]
    assert results.of(grid) == []
    results.append(grid, run, Outcome({"report": 0.5}, [2.0, 1.0], 10, {"a": 1}, 0.5, 0.1))
    assert (tmp_path / "results.jsonl").read_text().startswith(line)
    assert len(Results(tmp_path / "results.jsonl").of(grid)) == 1


def test_deep_lora_is_compared_with_each_other_method():
    rows = [
        Row(method, 16, 8, 1e-2, {0: 0.1 * i, 1: 0.2}, 0.4, [8], {0: 1.0, 1: 1.1})
        for i, method in enumerate(METHODS)
    ]
    gaps = {gap["other"]: gap["difference"] for gap in compare_methods(rows)}
    assert gaps == {m: pytest.approx(0.05 * (4 - i)) for i, m in enumerate(METHODS[:-1])}
    assert "| 16 | 8 | deep-lora - eva | +0.1000 |" in table(rows)


def test_errors_name_damaged_results(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"run": 1}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2 of"):
        Results(tmp_path / "results.jsonl")


def test_truncated_lines_are_removed_by_the_next_write(folder, tmp_path):
    results_path = tmp_path / "results.jsonl"
    grid = specification(folder, methods=["lora"], seeds=[0, 1])
    first, second = grid.runs()
    outcome = Outcome({"report": 0.5}, [2.0, 1.0], 10, {"a": 1}, 0.5, 0.1)
    Results(results_path).append(grid, first, outcome)
    whole = results_path.read_bytes()
    results_path.write_bytes(whole + whole[:30])
    results = Results(results_path)
    assert results.missing(grid) == [second]
    assert results_path.read_bytes() == whole + whole[:30]  # reading changes nothing
    results.append(grid, second, outcome)
    assert Results(results_path).missing(grid) == []
    assert results_path.read_bytes().startswith(whole)
    assert results_path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("kind", ["ENOSPC", "EIO", "interrupt after"])
def test_a_failed_write_of_a_line_preserves_the_other_lines(kind, folder, tmp_path):
    results_path = tmp_path / "results.jsonl"
    grid = specification(folder, methods=["lora"], seeds=[0, 1])
    first, second = grid.runs()
    outcome = Outcome({"report": 0.5}, [2.0, 1.0], 10, {"a": 1}, 0.5, 0.1)
    results = Results(results_path)
    results.append(grid, first, outcome)
    before = results_path.read_bytes()
    operations = count(tmp_path, lambda: results.append(grid, second, outcome))
    results_path.write_bytes(before)
    results = Results(results_path)
    number = [name for name, _ in operations].index("write")
    with pytest.raises((OSError, KeyboardInterrupt)), Faults(tmp_path, kind, (number,)):
        results.append(grid, second, outcome)
    assert results_path.read_bytes() == before
    results.append(grid, second, outcome)  # by the same object
    assert Results(results_path).missing(grid) == []


def test_a_second_program_on_the_same_grid_is_refused(folder, tmp_path):
    grid = specification(folder, methods=["lora"], seeds=[0])
    with FolderLock(tmp_path), pytest.raises(dln.FolderInUseError, match="is in use by process"):
        run_grid(grid, Results(tmp_path / "results.jsonl"))


def test_results_are_written_at_once_and_found_by_their_settings(folder, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    grid = specification(folder, methods=["lora"], seeds=[0, 1])
    first, second = grid.runs()
    assert results.missing(grid) == [first, second]
    results.append(grid, first, Outcome({"report": 0.5}, [2.0, 1.0], 10, {"a": 1}, 0.5, 0.1))
    again = Results(tmp_path / "results.jsonl")
    assert again.missing(grid) == results.missing(grid) == [second]
    assert [record["run"]["seed"] for record in again.of(grid)] == [0]
    # Runs of another model, length, choice of layers or samples are others.
    for section, key, value in (
        ("model", "path", "other"),
        ("model", "max_length", 17),
        ("model", "layers", ["*.query"]),
        ("task", "evaluated", 8),
    ):
        sections = {name: dict(entries) for name, entries in grid.sections.items()}
        sections[section][key] = value
        assert again.missing(Grid(sections)) == [first, second]
    # Settings of Deep LoRA do not distinguish runs of LoRA.
    sections = {name: dict(entries) for name, entries in grid.sections.items()}
    sections["deep-lora"]["outer"] = 0.5
    assert again.missing(Grid(sections)) == [second]


@pytest.mark.filterwarnings("ignore")
def test_shipped_results_are_read_and_new_ones_written_elsewhere(folder, tmp_path):
    grid = specification(folder, seeds=[0, 1])
    results = Results(tmp_path / "results.jsonl")
    runs = grid.runs()
    outcome = Outcome({"selection": 0.5, "report": 0.4}, [2.0, 1.0], 10, {"a.b": 2, "c": 1}, 3.0, 0.1)
    for run in runs[:2]:  # of the first seed
        results.append(grid, run, outcome)
    results.append_diverged(grid, runs[2], dln.DivergedError("now", step=1, layer=0))
    shipped = tmp_path / "shipped.jsonl"
    results.export(shipped, [grid, grid])
    assert len(shipped.read_text().splitlines()) == 3
    assert b"a.b" not in shipped.read_bytes()
    again = Results(tmp_path / "new" / "results.jsonl", shipped)
    assert summarise(again.of(grid))[0] == summarise(results.of(grid))[0]
    assert again.missing(grid) == runs[3:]
    again.path.parent.mkdir()
    again.append(grid, runs[3], outcome)
    assert len(again.path.read_text().splitlines()) == 1
    assert Results(again.path, shipped).missing(grid) == []
    assert len(Results(again.path).missing(grid)) == 3
    shipped.write_bytes(shipped.read_bytes().replace(b"0.4", b"0.3", 1))
    with pytest.raises(ValueError, match=r"line 1 of .*shipped\.jsonl is damaged"):
        Results(again.path, shipped)


@pytest.mark.filterwarnings("ignore")
def test_diverged_runs_are_recorded_as_diverged(folder, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    grid = specification(folder, methods=["lora"], etas=[1e12, 1e-3])
    said = []
    run_grid(grid, results, report=said.append)
    assert "eta 1e+12: the loss is" in said[0]
    assert Results(tmp_path / "results.jsonl").missing(grid) == []
    (row,) = summarise(results.of(grid))
    assert row.eta == 1e-3
    assert summarise(results.of(grid)[:1]) == []


def test_runs_are_checked():
    for keywords, message in (
        ({"method": "full"}, "method is 'full'"),
        ({"rank": 0}, "rank is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"eta": -1.0}, "eta is -1"),
        ({"depth": 7}, "depth is 7"),
        ({"init": "svd"}, "init is 'svd'"),
        ({"epsilon": -1.0}, "epsilon is -1"),
    ):
        values = {"method": "lora", "rank": 2, "n_examples": 8, "seed": 0, "eta": 1e-3, "steps": 1}
        with pytest.raises(ValueError, match=message):
            Run(**{**values, **keywords})


def test_models_are_loaded_from_folders_and_packages(folder):
    assert find_model(str(folder / "model")) == str(folder / "model")
    assert find_model("nowhere/at-all") == "nowhere/at-all"


def test_errors_name_missing_packages(run_python, tmp_path):
    program = """
import sys
sys.modules["transformers"] = None
from dlnfast.torch.finetune import FineTuning
from dlnfast._datasets.text import TextTask
import numpy as np
try:
    FineTuning("x", TextTask("stsb", ("a",), ("b",), np.ones(1), None), {})
except ModuleNotFoundError as error:
    print(error)
"""
    assert 'pip install "dlnfast[transformers]"' in run_python(program)


# ------------------------------------------------------------------------------------------ the figures


@pytest.mark.filterwarnings("ignore")
def test_the_figure_of_few_examples_writes_its_numbers(folder, tmp_path, capsys):
    options = ["--model", str(folder / "model"), "--data", str(folder), "--examples", "4", "8"]
    options += ["--rank", "2", "--ranks", "2", "4", "--rank-examples", "4", "--rate-choice-examples", "6"]
    options += ["--seeds", "2", "--published-seeds", "1", "--rank-seeds", "2", "--old-seeds", "1"]
    options += ["--rate-seeds", "1", "--etas", "1e-2", "1e-1", "--learning-rates", "1e-3"]
    options += ["--steps", "3", "--rank-steps", "2", "--evaluated", "12", "--max-length", "16"]
    options += ["--results", str(tmp_path)]
    numbers = run_figure(tmp_path, "deep-lora-fewshot", *options)["numbers"]
    for protocol, seeds in (("package", {"0", "1"}), ("published", {"0"})):
        rows = numbers["rows"][protocol]
        assert [(row["n_examples"], row["method"]) for row in rows] == [
            (4, "lora"),
            (4, "deep-lora"),
            (8, "lora"),
            (8, "deep-lora"),
        ]
        for row in rows:
            assert set(row["scores"]) == seeds
            assert row["mean"] == pytest.approx(np.mean(list(row["scores"].values())))
        assert [gap["pairs"] for gap in numbers["paired"][protocol]] == [len(seeds)] * 2
    assert {label: list(rows) for label, rows in numbers["ranks"].items()} == {
        "LoRA": ["2", "4"],
        "Deep LoRA": ["2", "4", "full"],
        "Deep LoRA, defaults of 0.1.0": ["2", "4"],
    }
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    # Rates: 2 methods at 2 etas, and at one learning rate. Examples: 2 methods, 2 numbers, 2 seeds and 1.
    # Ranks: 2 methods at 2 ranks and one at the full width, 2 seeds; old defaults at 2 ranks, 1 seed.
    assert len(lines) == numbers["trained_now"] == (4 + 2) + (8 + 4) + (8 + 2) + 2
    assert "| 4 | 2 | deep-lora |" in capsys.readouterr().out
    again = run_figure(tmp_path, "deep-lora-fewshot", *options)["numbers"]  # from the saved results
    assert again["trained_now"] == 0
    assert again["rows"] == numbers["rows"]
    assert (tmp_path / "results.jsonl").read_text().splitlines() == lines


@pytest.mark.filterwarnings("ignore")
def test_the_figure_of_subspaces_writes_its_numbers(folder, tmp_path):
    options = ["--model", str(folder / "model"), "--data", str(folder), "--steps", "6", "--records", "3"]
    options += ["--rank", "2", "--shown", "5", "--max-length", "16", "--evaluated", "12", "--batch-size", "8"]
    options += ["--learning-rate", "1e-2", "--scale", "0.1"]
    numbers = run_figure(tmp_path, "bert-subspaces", *options)["numbers"]
    assert numbers["steps"] == [2, 4, 6]
    assert len(numbers["layers"]) == 13
    assert not any("classifier" in name for name in numbers["layers"])
    for name in numbers["layers"]:
        assert len(numbers["singular_values"][name]) == 5
        cosines = numbers["cosines"][name]
        assert cosines["minimum"][-1] == pytest.approx(1.0)
        assert all(
            a <= b <= c for a, b, c in zip(*(cosines[k] for k in ("minimum", "mean", "maximum")), strict=True)
        )
        assert cosines["baseline"][0] == pytest.approx(2 / (24 if "intermediate" in name else 16))
    assert len(numbers["loss"]) == 6
    assert numbers["loss_averaged"][1] == pytest.approx(0.9 * numbers["loss"][0] + 0.1 * numbers["loss"][1])
    # Thirteen maps with three square-ish factors each, and the head frozen.
    assert numbers["n_parameters"] > 13 * 3 * 16 * 16
