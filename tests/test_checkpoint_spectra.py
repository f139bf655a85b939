# SPDX-License-Identifier: MIT
"""`checkpoint_spectra`: correct singular values of checkpoints in all formats, and errors that name them."""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is optional")
from tolerances import tolerance  # noqa: E402

import dlnfast as dln  # noqa: E402
from dlnfast import cli  # noqa: E402
from dlnfast.torch import _checkpoint_report, checkpoint_spectra  # noqa: E402

#: Matrices that are decomposed, that are iterated on, and that a convolution stores with four axes.
SHAPES = {"small.weight": (20, 30), "wide.weight": (140, 300), "conv.weight": (135, 16, 3, 3)}


def state_dict(step, dtype=torch.float32, shapes=SHAPES):
    """Slowly changing matrices with leading values that stand out, a bias and a buffer of integers."""
    state = {}
    for i, (name, shape) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(i)
        weight = torch.randn(shape, generator=generator)
        weight.flatten(1)[:, :5] += torch.randn(shape[0], 5, generator=generator) * 3
        direction = torch.randn(shape, generator=generator)
        state[name] = (weight + 0.01 * step * direction).to(dtype)
    return state | {"small.bias": torch.ones(20, dtype=dtype)}


def exact_matrices(states, name, of, base=None):
    weights = [state[f"{name}.weight"].double().flatten(1) for state in states]
    first = weights[0] if base is None else base[f"{name}.weight"].double().flatten(1)
    return {
        "weights": weights,
        "change": [weight - first for weight in weights],
        "step": [after - before for before, after in itertools.pairwise(weights)],
    }[of]


def singular_values(matrices, k):
    return np.array([torch.linalg.svdvals(matrix)[:k].numpy() for matrix in matrices])


def check_bounds(values, errors, exact, size):
    """Every value is within its bound of the exact one, and the bounds are small."""
    rounding = tolerance(np.float64, size) * exact[:, :1]
    assert np.all(np.abs(values - exact) <= errors + rounding)
    assert np.all(errors[exact[:, 0] > 0] <= 5e-3 * exact[exact[:, 0] > 0, :1])


def check_values(found, states, of, base=None, names=("small", "wide", "conv")):
    run = found.trajectory(of)
    assert sorted(run.layer_names) == sorted(names)  # safetensors sorts the names
    for name in names:
        values, errors = run.singular_values(name), run.singular_value_errors(name)
        exact = singular_values(exact_matrices(states, name, of, base), values.shape[1])
        check_bounds(values, errors, exact, 300)


def save(state, path):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch", reason="safetensors is optional").save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("of", ["weights", "change", "step"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_are_within_their_bounds(dtype, of):
    states = [state_dict(step, dtype) for step in range(4)]
    copies = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
    found = checkpoint_spectra(states, k=6)
    assert found.steps == (0, 1, 2, 3)
    assert found.shapes == ((20, 30), (140, 300), (135, 144))
    check_values(found, states, of)
    for state, copy in zip(states, copies, strict=True):  # the tensors of the caller do not change
        assert all(torch.equal(state[name], copy[name]) for name in state)


def test_distances_are_passed_for_large_matrices(monkeypatch):
    """The bounds of an earlier checkpoint stay valid while the distance to it is small."""
    monkeypatch.setattr(sys.modules["dlnfast.torch.checkpoints"], "_MEASURED", 1)
    states = [state_dict(0.001 * step) for step in range(4)]
    found = checkpoint_spectra(states, k=4, tolerance=0.005)
    for of in ("weights", "change", "step"):
        check_values(found, states, of)
    assert found.trajectory().tracking("wide")["refreshed"].tolist() == [True, False, False, False]


@pytest.mark.parametrize(("with_base", "n_updates"), [(False, 7), (True, 8)])
def test_the_first_step_is_not_decomposed_twice(monkeypatch, with_base, n_updates):
    """Without a base it is the change of the second checkpoint, too."""
    calls = []
    update = dln.SVDTracker.update
    monkeypatch.setattr(
        dln.SVDTracker, "update", lambda self, *a, **k: calls.append(self) or update(self, *a, **k)
    )
    states, base = [state_dict(step) for step in range(3)], state_dict(7) if with_base else None
    found = checkpoint_spectra(states, layers="wide", k=4, base=base)
    assert len(calls) == n_updates
    for of in ("weights", "change", "step"):
        check_values(found, states, of, base, names=["wide"])


def test_one_pass_decomposes_what_is_chosen():
    states = [state_dict(step) for step in range(3)]
    found = checkpoint_spectra(states, of=["step", "weights"], layers=["wide", re.compile("^sm")], k=2)
    assert found.kinds == ("weights", "step")
    assert found.layers == ("small", "wide")
    assert found.trajectory("step").steps.tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"of is 'change'.*weights, step"):
        found.trajectory("change")
    assert checkpoint_spectra(states[0]).kinds == ("weights",)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_files_of_a_folder_are_ordered_by_their_steps(tmp_path, ending):
    states = {step: state_dict(step / 100) for step in (0, 50, 200, 1000)}
    for step, state in states.items():
        save(state, tmp_path / f"run2-step_{step}{ending}")
    (tmp_path / "log.txt").write_text("")
    found = checkpoint_spectra(tmp_path, k=3)
    assert found.steps == (0, 50, 200, 1000)
    for of in ("weights", "change", "step"):
        check_values(found, list(states.values()), of)
    listed = checkpoint_spectra(sorted(tmp_path.glob(f"*{ending}")), k=3)  # 1000 before 200
    assert listed.steps == found.steps
    renumbered = checkpoint_spectra(tmp_path, k=3, steps=[1, 2, 3, 4])
    assert renumbered.checkpoints == found.checkpoints
    assert renumbered.steps == (1, 2, 3, 4)


def test_folders_of_a_training_are_read(tmp_path):
    states = [state_dict(step) for step in range(3)]
    for step, state in zip((9, 90, 100), states, strict=True):
        (tmp_path / f"checkpoint-{step}").mkdir()
        save(state, tmp_path / f"checkpoint-{step}" / "pytorch_model.bin")
        torch.save({"state": {}}, tmp_path / f"checkpoint-{step}" / "optimizer.pt")
    save(states[-1], tmp_path / "pytorch_model.bin")
    found = checkpoint_spectra(tmp_path, k=2)
    assert found.steps == (9, 90, 100)
    check_values(found, states, "change")
    files = [tmp_path / f"checkpoint-{step}" / "pytorch_model.bin" for step in (100, 9)]
    assert checkpoint_spectra(files, k=2).steps == (9, 100)


@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
def test_sharded_checkpoints_are_read(tmp_path, ending):
    state = state_dict(0)
    shards = {f"model-{i + 1:05d}-of-00002{ending}": dict(list(state.items())[i::2]) for i in range(2)}
    for name, part in shards.items():
        save(part, tmp_path / name)
    stem = "model" if ending == ".safetensors" else "pytorch_model"
    index = tmp_path / f"{stem}{ending}.index.json"
    where = {name: file for file, part in shards.items() for name in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": {name: where[name] for name in state}}))
    for path in (tmp_path, index):
        check_values(checkpoint_spectra(path, k=2), [state], "weights")
    (tmp_path / "model-00002-of-00002").with_suffix(ending).unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        checkpoint_spectra(tmp_path)


@pytest.mark.parametrize("key", ["model", "state_dict", "network"])
def test_state_dicts_beside_other_states_are_found(tmp_path, key):
    state = state_dict(0)
    path = tmp_path / "epoch3.pt"
    torch.save({"epoch": 3, key: state, "note": {"a": 1}}, path)
    found = checkpoint_spectra(path, k=2)
    assert found.steps == (3,)
    check_values(found, [state], "weights")


def test_a_key_chooses_between_state_dicts(tmp_path):
    states = [state_dict(0), state_dict(9)]
    path = save({"student": states[0], "teacher": states[1]}, tmp_path / "both.pt")
    with pytest.raises(ValueError, match=r"2 state dicts.*'student', 'teacher'.*key="):
        checkpoint_spectra(path)
    check_values(checkpoint_spectra(path, key="teacher", k=2), [states[1]], "weights")
    with pytest.raises(ValueError, match="no state dict 'other'"):
        checkpoint_spectra(path, key="other")


def test_files_before_pytorch_1_6_are_read(tmp_path):
    states = [state_dict(step) for step in range(2)]
    for step, state in enumerate(states):
        torch.save(state, tmp_path / f"step{step}.pt", _use_new_zipfile_serialization=False)
    check_values(checkpoint_spectra(tmp_path, k=2), states, "step")


def test_changes_from_a_base():
    states, base = [state_dict(step) for step in (1, 2)], state_dict(0)
    prefixed = {f"encoder.{name}": tensor for name, tensor in base.items()} | {
        "head.weight": torch.ones(3, 3)
    }
    found = checkpoint_spectra(states, base=prefixed, k=3)
    assert found.base == "base"
    check_values(found, states, "change", base)
    assert checkpoint_spectra(states[0], base=base).kinds == ("weights", "change")
    with pytest.raises(ValueError, match="checkpoint base lacks the matrices wide"):
        checkpoint_spectra(
            states, base={"small.weight": base["small.weight"], "conv.weight": base["conv.weight"]}
        )


def test_checkpoints_of_several_precisions_are_compared_in_the_highest():
    states = [state_dict(0, torch.bfloat16), state_dict(1, torch.float64)]
    found = checkpoint_spectra(states, k=2)
    assert found.trajectory().singular_values("wide").dtype == np.float64
    check_values(found, states, "change")


def test_vectors_plots_and_files(tmp_path):
    states = [state_dict(step) for step in range(3)]
    run = checkpoint_spectra(states, k=2, vectors=True).trajectory()
    exact = np.linalg.svd(states[-1]["small.weight"].double().numpy())[2][:2].T
    vectors = run.singular_vectors("small", "right")
    np.testing.assert_allclose(np.abs(vectors.T @ exact), np.eye(2), atol=1e-3)
    assert run.angles("wide").shape == (3, 2)
    run.save(tmp_path / "run.npz")
    loaded = dln.load(tmp_path / "run.npz")
    np.testing.assert_array_equal(loaded.singular_values("conv"), run.singular_values("conv"))


# --------------------------------------------------------------------------------------------------
# Files and the command
# --------------------------------------------------------------------------------------------------


def test_saved_files_hold_all_values(tmp_path):
    found = checkpoint_spectra([state_dict(step) for step in range(3)], k=2)
    paths = found.save(tmp_path / "out")
    assert [path.name for path in paths] == ["spectra.csv", "spectra.json", "report.html"]
    with paths[0].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "layer", "index", "quantity", "value", "bound"]
    for prefix, of in (("", "weights"), ("change_", "change"), ("step_", "step")):
        run = found.trajectory(of)
        chosen = [r for r in rows if r["quantity"] == f"{prefix}singular_value" and r["layer"] == "wide"]
        values = np.array([[float(r["value"]), float(r["bound"])] for r in chosen]).reshape(-1, 2, 2)
        np.testing.assert_array_equal(values[..., 0], run.singular_values("wide"))
        np.testing.assert_array_equal(values[..., 1], run.singular_value_errors("wide"))
    content = json.loads(paths[1].read_text())
    assert content["steps"] == [0, 1, 2]
    assert content["spectra"]["step"]["layers"]["conv"]["completeness"] == ["rigorous"] * 2
    ranks = [float(r["value"]) for r in rows if r["quantity"] == "stable_rank" and r["layer"] == "small"]
    weight = state_dict(0)["small.weight"].double()
    exact = float(weight.square().sum() / torch.linalg.svdvals(weight)[0] ** 2)
    assert ranks[0] == pytest.approx(exact, rel=1e-6)


def test_the_report_refers_to_no_other_file(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    state = {"<fc> & more.weight": torch.eye(3)}
    page = checkpoint_spectra([state, state], k=2).save(tmp_path)[2].read_text()
    assert "&lt;fc&gt; &amp; more" in page
    assert "<fc>" not in page
    sources = re.findall(r"(?:src|href)='([^']{0,19})", page)
    assert len(sources) >= 5
    assert set(sources) == {"data:image/svg+xml;"}


def test_pictures_show_one_title_for_each_layer(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    figures = []
    monkeypatch.setattr(_checkpoint_report, "_to_svg", lambda figure: figures.append(figure) or "")
    name = f"{'long_name.' * 9}fc"
    states = [{f"{name}.weight": (i + 1) * torch.eye(3)} for i in range(2)]
    checkpoint_spectra(states, k=2).save(tmp_path)
    overview, layers = figures[:2]
    assert [text.get_text() for text in overview.legends[0].get_texts()] == [f"..{name[-44:]}"]
    assert all(ax.get_legend() is None for ax in (*overview.axes, *layers.axes))
    assert layers.axes[0].get_title() == f"..{name[-44:]}"
    figures.clear()
    checkpoint_spectra(states[0], k=2).save(tmp_path)
    assert [len(figure.axes) for figure in figures] == [1]  # no curve over the steps


def test_the_command_prints_or_writes(tmp_path, capsys):
    for step in (0, 10):
        save(state_dict(step / 10), tmp_path / f"step_{step}.pt")
    assert cli.main(["spectra", str(tmp_path), "--k", "2", "--layers", "w*", "small"]) == 0
    printed = capsys.readouterr().out
    assert "140 x 300" in printed
    assert "conv" not in printed
    assert "2 matrices in 2 checkpoints" in printed
    arguments = ["spectra", str(tmp_path / "step_10.pt"), "--base", str(tmp_path / "step_0.pt")]
    assert cli.main([*arguments, "--of", "change", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").is_file()
    assert "report.html" in capsys.readouterr().out
    assert cli.main(["spectra", str(tmp_path / "none.pt")]) == 2
    assert "none.pt: no such file" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Adapters
# --------------------------------------------------------------------------------------------------


def save_adapter(folder, updates, **config):
    """Write updates (A, B) in the format of PEFT; return them as matrices by name."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, (a, b) in updates.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    save(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def factors(seed, shapes, rank=4):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator))
        for name, (m, n) in shapes.items()
    }


def test_the_file_of_an_adapter_stands_for_its_folder(tmp_path):
    folder = save_adapter(tmp_path / "adapter", factors(0, {"fc": (8, 6)}))
    found = [checkpoint_spectra(path) for path in (folder, folder / "adapter_model.safetensors")]
    assert found[0].layers == found[1].layers == ("fc",)
    assert dln.torch.audit_adapter(folder / "adapter_model.safetensors").layers[0].layer == "fc"


@pytest.mark.parametrize("with_base", [True, False])
def test_adapters_over_their_base(tmp_path, with_base):
    pytest.importorskip("safetensors", reason="safetensors is optional")
    shapes = {"model.wide": (140, 300), "model.small": (20, 30)}
    base = state_dict(0)
    updates = [factors(seed, shapes) for seed in range(3)]
    for i, update in enumerate(updates):
        save_adapter(tmp_path / f"checkpoint-{10 * i}", update, alpha_pattern={"small": 2})
    found = checkpoint_spectra(tmp_path, base=base if with_base else None, k=6)
    assert found.kinds == (("weights", "change", "step") if with_base else ("change", "step"))
    assert found.steps == (0, 10, 20)
    for name in shapes:
        scale = 0.5 if name == "model.small" else 2.0
        products = [scale * (u[name][1].double() @ u[name][0].double()) for u in updates]
        original = base[name.removeprefix("model.") + ".weight"].double()
        expected = {
            "weights": [original + product for product in products],
            "change": products,
            "step": [b - a for a, b in itertools.pairwise(products)],
        }
        for of in found.kinds:
            run = found.trajectory(of)
            values, errors = run.singular_values(name), run.singular_value_errors(name)
            assert values.shape[1] == {"weights": 6, "change": 4, "step": 6}[of]
            check_bounds(values, errors, singular_values(expected[of], values.shape[1]), 300)


def test_the_layouts_of_peft_are_read(tmp_path):
    """Inputs first, embeddings, convolutions and the scale alpha / sqrt(r), as PEFT merges them."""
    peft = pytest.importorskip("peft", reason="peft is optional")
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {
            "words": torch.nn.Embedding(40, 12),
            "conv": torch.nn.Conv2d(6, 10, 3),
            "fc": torch.nn.Linear(30, 20),
        }
    )
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["words", "conv", "fc"])
    adapted = peft.PeftModel(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    found = checkpoint_spectra(tmp_path / "adapter", base=base, k=3)
    for name in ("words", "conv", "fc"):
        weight = merged[f"{name}.weight"].double().flatten(1)
        change = weight - base[f"{name}.weight"].double().flatten(1)
        for of, matrix in (("weights", weight), ("change", change)):
            values = found.trajectory(of).singular_values(name)[0]
            exact = np.linalg.svd(matrix.numpy())[1][:3]
            # PEFT merges in single precision.
            np.testing.assert_allclose(values, exact, rtol=tolerance(np.float32, 60))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "has use_dora: DoRA rescales.*wanted plain LoRA"),
        ({"peft_type": "IA3"}, "of type IA3, which scales activations; wanted LORA"),
    ],
)
def test_other_adapters_are_refused(tmp_path, config, message):
    folder = save_adapter(tmp_path / "adapter", factors(0, {"fc": (8, 6)}), **config)
    with pytest.raises(ValueError, match=message):
        checkpoint_spectra(folder)


def test_adapters_are_not_mixed_with_models(tmp_path):
    folder = save_adapter(tmp_path / "adapter", factors(0, {"fc": (8, 6)}))
    with pytest.raises(ValueError, match="holds adapters, and a state dict"):
        checkpoint_spectra([folder, state_dict(0)])
    with pytest.raises(ValueError, match="base is the adapter"):
        checkpoint_spectra(state_dict(0), base=folder)
    with pytest.raises(ValueError, match="weights of an adapter need a base"):
        checkpoint_spectra(folder, of="weights")
    with pytest.raises(dln.ShapeError, match=r"fc has shape \(4, 4\); wanted \(8, 6\)"):
        checkpoint_spectra(folder, base={"fc.weight": torch.ones(4, 4)})


# --------------------------------------------------------------------------------------------------
# Integers and errors
# --------------------------------------------------------------------------------------------------


def test_integers_are_skipped_with_one_warning():
    state = state_dict(0) | {
        "ids": torch.ones(2, 3, dtype=torch.int64),
        "packed": torch.ones(4, 4).to(torch.uint8),
    }
    with pytest.warns(UserWarning, match="skipped: ids, packed; pass dequantize") as caught:
        found = checkpoint_spectra([state, state], k=2)
    assert len(caught) == 1
    assert found.skipped == ("ids", "packed")
    assert checkpoint_spectra(state, layers="wide").skipped == ()


def test_a_function_dequantises():
    weight = torch.arange(12, dtype=torch.int8).reshape(3, 4)
    states = [{"fc.weight": weight, "fc.scale": torch.tensor(scale)} for scale in (1.0, 2.0)]

    def dequantize(name, tensors):
        return tensors[name].float() * tensors[name.replace("weight", "scale")]

    found = checkpoint_spectra(states, dequantize=dequantize, k=1)
    top = np.linalg.svd(weight.double().numpy())[1][0]
    values = found.trajectory().singular_values("fc")[:, 0]
    np.testing.assert_allclose(values, [top, 2 * top], rtol=tolerance(np.float32, 4))
    with pytest.raises(TypeError, match=r"dequantize returned torch.int8 for fc.weight"):
        checkpoint_spectra(states, dequantize=lambda name, tensors: tensors[name])


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.pt: no such file"):
        checkpoint_spectra(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match="holds no checkpoints"):
        checkpoint_spectra(tmp_path)
    with pytest.raises(ValueError, match="paths is empty"):
        checkpoint_spectra([])
    with pytest.raises(TypeError, match=r"paths holds Linear.*state_dict"):
        checkpoint_spectra([torch.nn.Linear(2, 2)])


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_damaged_files(tmp_path, ending):
    path = save(state_dict(0), tmp_path / f"step_1{ending}")
    content = path.read_bytes()
    for damaged in (b"", content[:7], content[:1000], content[: len(content) // 2], b"text" * 99):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="step_1"):
            checkpoint_spectra(path)


def test_other_objects_than_tensors_are_named(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt.*object torch.nn.modules.linear.Linear.*state_dict"):
        checkpoint_spectra(tmp_path / "model.pt")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json.*it has another format$"):
        checkpoint_spectra(tmp_path / "config.json")


def test_other_names_and_shapes_are_named(tmp_path):
    first, other = state_dict(0), state_dict(1)
    lacking = {name: tensor for name, tensor in other.items() if not name.startswith("wide")}
    with pytest.raises(ValueError, match="state dict 1 lacks the matrices wide"):
        checkpoint_spectra([first, lacking])
    with pytest.raises(ValueError, match=r"state dict 1 has matrices that state dict 0 lacks: wide"):
        checkpoint_spectra([lacking, first])
    path = save(other | {"wide.weight": torch.ones(3, 4)}, tmp_path / "other.pt")
    with pytest.raises(dln.ShapeError, match=r"other.pt: wide has shape \(3, 4\); wanted \(140, 300\)"):
        checkpoint_spectra([first, path])
    wrapped = {f"module.{name}": tensor for name, tensor in other.items()}
    check_values(checkpoint_spectra([first, wrapped], k=2), [first, other], "step")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(tmp_path, value):
    bad = state_dict(1)
    bad["wide.weight"][3, 5] = value
    path = save(bad, tmp_path / "step_2.pt")
    with pytest.raises(ValueError, match=r"step_2.pt: tensor wide.weight has values that are not finite"):
        checkpoint_spectra([state_dict(0), path])


def test_choices_and_settings_out_of_range():
    states = [state_dict(0), state_dict(1)]
    for arguments, message in [
        ({"layers": "head"}, "layers: 'head' fits none.*small, wide, conv"),
        ({"layers": []}, "layers is empty"),
        ({"of": "changes"}, "of holds 'changes'; wanted 'weights', 'change', 'step'"),
        ({"steps": [1]}, "steps has 1 numbers for 2 checkpoints"),
        ({"steps": [2, 1]}, "wanted ascending numbers"),
        ({"k": 0}, "k is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            checkpoint_spectra(states, **arguments)
    with pytest.raises(ValueError, match="no matrices of real floating-point numbers"):
        checkpoint_spectra({"bias": torch.ones(3)})
    with pytest.raises(ValueError, match="'step', but a step needs two checkpoints"):
        checkpoint_spectra(states[0], of="step")
