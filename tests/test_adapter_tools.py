# SPDX-License-Identifier: MIT
"""Adapters in files: audit, resize and extract, also as commands, and the files that PEFT loads."""

from __future__ import annotations

import csv
import importlib.util
import json
import math

import numpy as np
import pytest
from tolerances import tolerance

import dlnfast as dln
from dlnfast.cli import main

torch = pytest.importorskip("torch", reason="PyTorch is optional")
safetensors = pytest.importorskip("safetensors", reason="safetensors is optional")

from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

import dlnfast.torch as dt  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("fixed_torch_seed"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*lora_B.bias"),
]
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is optional")

#: Factors are written in float32; inner sizes of the products are at most 64.
ROUNDING = tolerance(np.float32, 64)


def make_pair(d_out, d_in, values, dtype=torch.float32):
    """Return B (d_out, r) and A (r, d_in) with the given singular values of B A."""
    rank = len(values)
    u = torch.linalg.qr(torch.randn(d_out, rank, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(d_in, rank, dtype=torch.float64))[0]
    mix = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64))[0]
    scales = torch.tensor(values, dtype=torch.float64)
    return (u * scales @ mix).to(dtype), (mix.T @ v.T).to(dtype)


def write_adapter(folder, pairs, config=None, *, others=None, binary=False):
    """Write a folder as PEFT does; `pairs` has (B, A) by layer."""
    folder.mkdir()
    tensors = dict(others or {})
    for name, (above, below) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = below.contiguous().clone()
        tensors[f"base_model.model.{name}.lora_B.weight"] = above.contiguous().clone()
    if binary:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    ranks = [below.shape[0] for _, below in pairs.values()]
    entries = {"peft_type": "LORA", "r": ranks[0] if ranks else 8, "lora_alpha": ranks[0] if ranks else 8}
    entries |= {"target_modules": list(pairs), **(config or {})}
    (folder / "adapter_config.json").write_text(json.dumps(entries))
    return folder


def read_updates(folder):
    """Return the dense updates of a folder of plain LoRA with alpha = r, by layer."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert not config["use_rslora"]
    prefix, end = "base_model.model.", ".lora_A.weight"
    names = [key[len(prefix) : -len(end)] for key in tensors if key.endswith(end)]
    return {
        name: tensors[f"{prefix}{name}.lora_B.weight"].double()
        @ tensors[f"{prefix}{name}.lora_A.weight"].double()
        for name in names
    }


def truncate_densely(matrix, rank):
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank], float(torch.linalg.vector_norm(s[rank:]))


def assert_close(found, wanted, factor=ROUNDING):
    difference = float((found - wanted).detach().norm())
    assert difference <= factor * float(wanted.detach().norm())


# -------------------------------------------------------------------------------- audit


def test_an_audit_measures_the_scaled_update(tmp_path):
    values = [4.0, 3.0, 1e-12, 0.0]
    pair = make_pair(9, 7, values)
    folder = write_adapter(tmp_path / "a", {"fc": pair}, {"lora_alpha": 8})
    (layer,) = dt.audit_adapter(folder, tolerance=0.5).layers
    assert (layer.layer, layer.shape, layer.rank, layer.used_rank) == ("fc", (9, 7), 4, 2)
    assert layer.energy == 1.0
    assert layer.frobenius_norm == pytest.approx(10.0, rel=ROUNDING)
    assert layer.spectral_norm == pytest.approx(8.0, rel=ROUNDING)
    assert layer.stable_rank == pytest.approx(25 / 16, rel=ROUNDING)
    assert layer.suggested_rank == 2
    assert dt.audit_adapter(folder, tolerance=0.7).layers[0].suggested_rank == 1
    dense = torch.linalg.svdvals(2 * pair[0].double() @ pair[1].double())[:4]
    np.testing.assert_allclose(layer.singular_values, dense, atol=8 * tolerance(np.float64, 9))


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"lora_alpha": 6}, 2.0),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(3)),
        ({"lora_alpha": 1, "alpha_pattern": {"nothing": 9, r"layers\.\d+\.fc": 12, "fc": 1}}, 4.0),
        ({"r": 5, "rank_pattern": {"fc": 3}, "lora_alpha": 6}, 2.0),
    ],
)
def test_scalings_and_patterns_are_honoured(tmp_path, config, scaling):
    pair = make_pair(6, 5, [1.0, 0.5, 0.25])
    folder = write_adapter(tmp_path / "a", {"layers.0.fc": pair}, config)
    (layer,) = dt.audit_adapter(folder).layers
    assert layer.spectral_norm == pytest.approx(scaling, rel=ROUNDING)
    dt.resize_adapter(folder, tmp_path / "b", rank=2)
    wanted, _ = truncate_densely(scaling * pair[0].double() @ pair[1].double(), 2)
    assert_close(read_updates(tmp_path / "b")["layers.0.fc"], wanted)


def test_energies_are_shares_of_all_layers(tmp_path):
    pairs = {"a": make_pair(5, 4, [3.0, 0.0]), "b": make_pair(5, 4, [4.0, 0.0])}
    audit = dt.audit_adapter(write_adapter(tmp_path / "x", pairs))
    assert [layer.energy for layer in audit.layers] == pytest.approx([9 / 25, 16 / 25], rel=ROUNDING)


def test_angles_between_two_adapters(tmp_path):
    e = torch.eye(6)
    turned = math.cos(0.3) * e[0] + math.sin(0.3) * e[3]
    first = {"fc": (e[:, :1], e[:1]), "only": (e[:, :1], e[:1]), "zero": (0 * e[:, :1], e[:1])}
    second = {"fc": (turned[:, None], e[1:2]), "zero": (e[:, :1], e[:1])}
    one, two = write_adapter(tmp_path / "1", first), write_adapter(tmp_path / "2", second)
    layers = {layer.layer: layer for layer in dt.audit_adapter(one, two).layers}
    assert layers["fc"].output_angle == pytest.approx(0.3, rel=ROUNDING)
    assert layers["fc"].input_angle == pytest.approx(math.pi / 2)
    assert layers["only"].output_angle is None
    assert layers["zero"].output_angle is None
    same = dt.audit_adapter(one, one).layers[0]
    assert same.output_angle == same.input_angle == pytest.approx(0.0, abs=ROUNDING)
    other = write_adapter(tmp_path / "3", {"fc": make_pair(5, 6, [1.0])})
    with pytest.raises(dln.ShapeError, match="'fc' of other"):
        dt.audit_adapter(one, other)
    with pytest.raises(ValueError, match="no layer of"):
        dt.audit_adapter(one, write_adapter(tmp_path / "4", {"gc": make_pair(5, 6, [1.0])}))


def test_half_precision_factors_are_audited_at_their_precision(tmp_path):
    pair = make_pair(64, 64, [1.0, 0.5, 0.0, 0.0], torch.bfloat16)
    (layer,) = dt.audit_adapter(write_adapter(tmp_path / "a", {"fc": pair})).layers
    assert layer.used_rank == 2  # the other two singular values are rounding of the factors
    assert layer.singular_values[2] > 0


def test_the_audit_command_writes_tables(tmp_path, capsys):
    folder = write_adapter(
        tmp_path / "a", {"fc": make_pair(6, 5, [2.0, 1.0]), "head": make_pair(1, 5, [3.0])}
    )
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": 2,
                "lora_alpha": 2,
                "rank_pattern": {"head": 1},
                "alpha_pattern": {"head": 1},
            }
        )
    )
    assert main(["adapter", "audit", str(folder), "--out", str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:4] == ["layer", "shape", "rank", "used"]
    assert "angle" not in printed[0]
    assert printed[2].split()[:6] == ["head", "1", "x", "5", "1", "1"]
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["layers"][0]["singular_values"] == pytest.approx([2.0, 1.0], rel=ROUNDING)
    assert main(["adapter", "audit", str(folder), str(folder), "--out", str(tmp_path / "a.csv")]) == 0
    assert "angle in" in capsys.readouterr().out
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["fc", "head"]
    assert rows[0]["shape"] == "6x5"
    assert float(rows[0]["output_angle"]) < ROUNDING
    assert main(["adapter", "audit", str(folder), "--out", str(tmp_path / "a.txt")]) == 2
    assert ".json or .csv" in capsys.readouterr().err


# -------------------------------------------------------------------------------- resize


def test_resizing_is_the_truncation_of_the_dense_update(tmp_path):
    pairs = {
        "a": make_pair(40, 30, [1 / (k + 1) for k in range(16)]),
        "b": make_pair(12, 50, [math.exp(-k) for k in range(12)]),
    }
    config = {"rank_pattern": {"b": 12}, "alpha_pattern": {"b": 12}}
    folder = write_adapter(
        tmp_path / "x", pairs, config, others={"base_model.model.head.weight": torch.ones(3)}
    )
    found = dt.resize_adapter(folder, tmp_path / "y", tolerance=0.2)
    updates = read_updates(tmp_path / "y")
    for name, (above, below) in pairs.items():
        dense = above.double() @ below.double()
        layer = found[name]
        wanted, error = truncate_densely(dense, layer.rank)
        assert error <= 0.2 * float(dense.norm()) < truncate_densely(dense, layer.rank - 1)[1]
        assert layer.error == pytest.approx(error, rel=1e-9)
        assert layer.relative_error == pytest.approx(error / float(dense.norm()), rel=1e-9)
        assert_close(updates[name], wanted)
        actual = float((updates[name] - wanted).norm() / dense.norm())
        assert actual <= layer.rounding <= ROUNDING
    assert found["a"].rank != found["b"].rank
    assert "base_model.model.head.weight" in load_file(tmp_path / "y" / "adapter_model.safetensors")


def test_the_stated_rounding_bounds_that_of_half_precisions(tmp_path):
    pair = make_pair(30, 20, [1.0, 0.5, 0.1], torch.bfloat16)
    folder = write_adapter(tmp_path / "x", {"fc": pair})
    layer = dt.resize_adapter(folder, tmp_path / "y", rank=2)["fc"]
    dense = pair[0].double() @ pair[1].double()
    actual = float((read_updates(tmp_path / "y")["fc"] - truncate_densely(dense, 2)[0]).norm() / dense.norm())
    assert 0 < actual <= layer.rounding < 8 * torch.finfo(torch.bfloat16).eps
    assert load_file(tmp_path / "y" / "adapter_model.safetensors").popitem()[1].dtype == torch.bfloat16


def test_a_uniform_rank_is_padded_with_zeros(tmp_path):
    pairs = {"a": make_pair(8, 8, [1.0, 0.9, 0.8]), "b": make_pair(8, 8, [1.0, 1e-3, 0.0])}
    folder = write_adapter(tmp_path / "x", pairs)
    found = dt.resize_adapter(folder, tmp_path / "y", tolerance=0.01, uniform=True)
    assert [layer.rank for layer in found.values()] == [3, 1]
    config = json.loads((tmp_path / "y" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (3, {})
    tensors = load_file(tmp_path / "y" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in tensors.values()} == {3}
    assert not tensors["base_model.model.b.lora_A.weight"][1:].any()


def test_a_rank_above_the_sides_and_a_single_output(tmp_path):
    torch.manual_seed(0)
    pairs = {"wide": (torch.randn(3, 8), torch.randn(8, 5)), "one": (torch.randn(1, 8), torch.randn(8, 5))}
    folder = write_adapter(tmp_path / "x", pairs)
    audit = dt.audit_adapter(folder)
    assert {layer.layer: len(layer.singular_values) for layer in audit.layers} == {"wide": 3, "one": 1}
    found = dt.resize_adapter(folder, tmp_path / "y", rank=100)
    assert {name: layer.rank for name, layer in found.items()} == {"wide": 3, "one": 1}
    for name, (above, below) in pairs.items():
        assert_close(read_updates(tmp_path / "y")[name], above.double() @ below.double())


def test_a_zero_update_keeps_rank_one(tmp_path):
    folder = write_adapter(tmp_path / "x", {"fc": (torch.zeros(6, 4), torch.randn(4, 5))})
    (layer,) = dt.audit_adapter(folder).layers
    assert (layer.used_rank, layer.suggested_rank, layer.stable_rank, layer.energy) == (0, 1, 0.0, 0.0)
    found = dt.resize_adapter(folder, tmp_path / "y", tolerance=0.0)["fc"]
    assert (found.rank, found.error, found.relative_error, found.rounding) == (1, 0.0, 0.0, 0.0)
    assert not read_updates(tmp_path / "y")["fc"].any()


@pytest.mark.parametrize(("values", "limit", "rank"), [([4.0, 3.0], 0.6, 1), ([2.0] * 4, 0.5, 3)])
def test_an_error_exactly_at_the_tolerance_is_within_it(tmp_path, values, limit, rank):
    above, below = torch.zeros(6, len(values)), torch.zeros(len(values), 7)
    above[: len(values)], below[:, : len(values)] = torch.diag(torch.tensor(values)), torch.eye(len(values))
    turn = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))[0]
    pair = (above.double() @ turn, turn.T @ below.double())
    folder = write_adapter(tmp_path / "x", {"fc": pair})
    assert dt.audit_adapter(folder, tolerance=limit).layers[0].suggested_rank == rank
    assert dt.resize_adapter(folder, tmp_path / "y", tolerance=limit)["fc"].rank == rank
    below_limit = limit * (1 - 1e-9)
    assert dt.audit_adapter(folder, tolerance=below_limit).layers[0].suggested_rank == rank + 1


def test_a_tolerance_of_zero_removes_unused_directions_only(tmp_path):
    above = torch.randn(6, 2, dtype=torch.float64)
    pair = (torch.cat([above, above], dim=1), torch.randn(4, 5, dtype=torch.float64))
    folder = write_adapter(tmp_path / "x", {"fc": pair})
    assert dt.resize_adapter(folder, tmp_path / "y", tolerance=0)["fc"].rank == 2
    assert_close(read_updates(tmp_path / "y")["fc"], pair[0] @ pair[1], tolerance(np.float64, 8))


def test_adapters_in_torch_files_are_read(tmp_path):
    pair = make_pair(6, 5, [2.0, 1.0])
    folder = write_adapter(tmp_path / "x", {"fc": pair}, binary=True)
    assert dt.audit_adapter(folder).layers[0].spectral_norm == pytest.approx(2.0, rel=ROUNDING)
    dt.resize_adapter(folder, tmp_path / "y", rank=2)
    assert_close(read_updates(tmp_path / "y")["fc"], pair[0].double() @ pair[1].double())


def test_the_resize_command(tmp_path, capsys):
    folder = write_adapter(tmp_path / "x", {"fc": make_pair(6, 5, [2.0, 1.0])})
    command = ["adapter", "resize", str(folder), "--out", str(tmp_path / "y")]
    assert main(command) == 2
    assert "needs a rank or a tolerance" in capsys.readouterr().err
    assert main([*command, "--rank", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["fc", "1", "1"]
    assert main([*command, "--rank", "2"]) == 2
    assert "not empty" in capsys.readouterr().err
    (tmp_path / "y" / "README.md").write_text("mine")
    assert main([*command, "--rank", "2", "--overwrite"]) == 0
    assert (tmp_path / "y" / "README.md").read_text() == "mine"
    assert json.loads((tmp_path / "y" / "adapter_config.json").read_text())["r"] == 2
    assert main(["adapter"]) == 2


def test_an_existing_output_is_kept(tmp_path):
    folder = write_adapter(tmp_path / "x", {"fc": make_pair(6, 5, [2.0, 1.0])})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="a file"):
        dt.resize_adapter(folder, tmp_path / "file", rank=1, overwrite=True)
    with pytest.raises(FileExistsError, match="not empty"):
        dt.resize_adapter(folder, folder, rank=1)
    (tmp_path / "empty").mkdir()
    dt.resize_adapter(folder, tmp_path / "empty", rank=1)
    dt.resize_adapter(folder, folder, rank=1, overwrite=True)
    assert dt.audit_adapter(folder).layers[0].rank == 1


# -------------------------------------------------------------------------------- refused files


def refused(folder, error, match, tmp_path):
    with pytest.raises(error, match=match):
        dt.audit_adapter(folder)
    with pytest.raises(error, match=match):
        dt.resize_adapter(folder, tmp_path / "refused", rank=1)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"use_dora": True}, "use_dora: DoRA"),
        ({"peft_type": "ADALORA"}, "ADALORA.*wanted LORA"),
        ({"peft_type": "LOHA"}, "LOHA.*entrywise product"),
        ({"peft_type": "NEW"}, "of type NEW; wanted"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"peft_type": None}, "of type None"),
        ({"rank_pattern": {"(": 3}}, "not a complete file"),
        ({"rank_pattern": 3}, "not a complete file"),
        ({"lora_alpha": "much"}, "lora_alpha of layer 'fc'"),
        ({"r": 3}, "rank 2; wanted 3"),
    ],
)
def test_other_methods_and_wrong_settings_are_refused(tmp_path, config, match):
    refused(
        write_adapter(tmp_path / "x", {"fc": make_pair(6, 5, [2.0, 1.0])}, config),
        ValueError,
        match,
        tmp_path,
    )


def test_an_initialization_that_changes_the_base_model_is_not_resized(tmp_path):
    folder = write_adapter(
        tmp_path / "x", {"fc": make_pair(6, 5, [2.0])}, {"init_lora_weights": "pissa_niter_4"}
    )
    assert dt.audit_adapter(folder).layers[0].used_rank == 1
    with pytest.raises(ValueError, match="pissa_niter_4"):
        dt.resize_adapter(folder, tmp_path / "y", rank=1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_factors_that_are_not_finite_are_refused_by_layer(tmp_path, bad, side):
    pair = make_pair(6, 5, [2.0, 1.0])
    pair[side][1, 1] = bad
    pairs = {"fine": make_pair(6, 5, [2.0, 1.0]), "encoder.fc": pair}
    refused(write_adapter(tmp_path / "x", pairs), ValueError, "lora_.*'encoder.fc' is not finite", tmp_path)


@pytest.mark.parametrize("end", ["lora_A", "lora_B"])
def test_a_missing_factor_is_refused(tmp_path, end):
    folder = write_adapter(tmp_path / "x", {"fc": make_pair(6, 5, [2.0, 1.0])})
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[f"base_model.model.fc.{end}.weight"]
    save_file(tensors, path)
    refused(folder, ValueError, f"layer 'fc' has lora_.; wanted lora_A and lora_B \\(see {end}", tmp_path)


def test_factors_that_do_not_fit_are_refused(tmp_path):
    folder = write_adapter(tmp_path / "x", {"fc": (torch.ones(6, 3), torch.ones(2, 5))})
    refused(folder, dln.ShapeError, "'fc' have shapes \\(2, 5\\) and \\(6, 3\\)", tmp_path)
    grouped = {"conv": (torch.ones(6, 1, 1, 1), torch.ones(2, 4, 3, 3))}
    refused(write_adapter(tmp_path / "z", grouped), ValueError, "'conv' is a convolution in groups", tmp_path)


def test_damaged_and_missing_files_are_refused(tmp_path):
    folder = write_adapter(tmp_path / "x", {"fc": make_pair(6, 5, [2.0, 1.0])})
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    refused(folder, ValueError, "adapter_model.safetensors is not a complete file", tmp_path)
    path.write_bytes(b"")
    refused(folder, ValueError, "adapter_model.safetensors is not a complete file", tmp_path)
    path.unlink()
    refused(folder, FileNotFoundError, "neither", tmp_path)
    (folder / "adapter_model.bin").write_bytes(content)
    refused(folder, ValueError, "adapter_model.bin cannot be read", tmp_path)
    path.write_bytes(content)
    (folder / "adapter_config.json").write_text("{")
    refused(folder, ValueError, "adapter_config.json is not a complete file", tmp_path)
    (folder / "adapter_config.json").unlink()
    refused(folder, FileNotFoundError, "without adapter_config.json", tmp_path)
    refused(tmp_path / "nothing", FileNotFoundError, "no folder and no file", tmp_path)
    empty = write_adapter(tmp_path / "z", {}, others={"head.weight": torch.ones(2)})
    refused(empty, ValueError, "no factors lora_A and lora_B", tmp_path)
    dora = write_adapter(
        tmp_path / "w",
        {"fc": make_pair(6, 5, [2.0])},
        others={"base_model.model.fc.lora_magnitude_vector": torch.ones(6)},
    )
    refused(dora, ValueError, "DoRA", tmp_path)


@pytest.mark.parametrize("arguments", [{}, {"rank": 0}, {"tolerance": 1.0}, {"tolerance": float("nan")}])
def test_wrong_ranks_and_tolerances_are_refused(tmp_path, arguments):
    folder = write_adapter(tmp_path / "x", {"fc": make_pair(6, 5, [2.0])})
    with pytest.raises(ValueError, match=r"rank|tolerance"):
        dt.resize_adapter(folder, tmp_path / "y", **arguments)
    assert not (tmp_path / "y").exists()


# -------------------------------------------------------------------------------- Deep LoRA


def make_deep_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def test_a_file_of_deep_lora_is_audited_and_becomes_lora(tmp_path):
    model = make_deep_model()
    adapter = dt.DeepLoRA(model, ["0", "1"], rank=4, init="random", scale=0.5)
    adapter.save(tmp_path / "deep.safetensors")
    dense = {name: adapter.delta_weight(name).double() for name in ("0", "1")}
    audit = {layer.layer: layer for layer in dt.audit_adapter(tmp_path / "deep.safetensors").layers}
    assert audit["0"].shape == (8, 11)
    assert audit["1"].frobenius_norm == pytest.approx(float(dense["1"].norm()), rel=ROUNDING)
    dt.resize_adapter(tmp_path / "deep.safetensors", tmp_path / "lora", rank=4)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    stem = "base_model.model.0.lora_embedding_"
    assert_close((tensors[stem + "B"] @ tensors[stem + "A"]).double().T, dense["0"])
    if importlib.util.find_spec("peft") is None:
        return
    import peft

    tokens = torch.arange(11)
    wanted = model(tokens)
    loaded = peft.PeftModel.from_pretrained(make_deep_model(), tmp_path / "lora")
    assert_close(loaded(tokens), wanted)


@needs_peft
def test_deep_lora_of_the_integration_stays_deep_lora(tmp_path):
    import peft

    from dlnfast.integrations import peft as integration

    config = integration.DeepLoraConfig(r=4, init="random", scale=0.5, target_modules=["0", "1", "3"])
    model = peft.get_peft_model(make_deep_model(), config)
    with torch.no_grad():  # at the start, all singular values of an update are equal
        for name, parameter in model.named_parameters():
            if "deep_lora_factors" in name:
                parameter.normal_(0, 0.4)
    model.save_pretrained(tmp_path / "deep")
    tokens = torch.arange(11)
    audit = dt.audit_adapter(tmp_path / "deep")
    assert [layer.rank for layer in audit.layers] == [4, 4, 4]
    for uniform in (False, True):
        found = dt.resize_adapter(
            tmp_path / "deep", tmp_path / f"small{uniform}", tolerance=0.6, uniform=uniform
        )
        assert min(layer.rank for layer in found.values()) < 4
        loaded = peft.PeftModel.from_pretrained(make_deep_model(), tmp_path / f"small{uniform}")
        for name, layer in found.items():
            before, after = (
                m.base_model.model.get_submodule(name).deep_lora_factors["default"].delta_weight().double()
                for m in (model, loaded)
            )
            assert_close(after, truncate_densely(before, layer.rank)[0], 4 * ROUNDING)
            assert float((after - before).norm()) == pytest.approx(layer.error, rel=1e-4)
    dt.resize_adapter(tmp_path / "deep", tmp_path / "same", rank=4)
    loaded = peft.PeftModel.from_pretrained(make_deep_model(), tmp_path / "same")
    assert_close(loaded(tokens), model(tokens))


# -------------------------------------------------------------------------------- PEFT


class Mixed(nn.Module):
    """Embedding, convolution, linear layers, and Conv1D with inputs first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embed_tokens = nn.Embedding(12, 8)
        self.conv = nn.Conv2d(2, 5, 3, padding=1)
        self.fc = nn.Linear(20, 6)
        self.head = nn.Linear(6, 1)

    def forward(self, tokens):
        x = self.embed_tokens(tokens).view(-1, 2, 2, 2)
        x = self.conv(x).flatten(1)
        return self.head(torch.tanh(self.fc(x)))


TOKENS = torch.arange(12).view(-1, 1)
LAYERS = ["embed_tokens", "conv", "fc", "head"]


def adapt(model=None, **settings):
    """Return a model of PEFT with random factors."""
    import peft

    model = Mixed() if model is None else model
    model = peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": LAYERS, **settings}))
    torch.manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    return model.eval()


@needs_peft
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 7, "lora_alpha": 3, "use_rslora": True},
        {"r": 3, "rank_pattern": {"fc": 5}, "alpha_pattern": {"head": 1}, "bias": "all"},
        {"r": 3, "lora_alpha": 6, "lora_bias": True, "target_modules": ["fc", "head"]},
        {"r": 2, "modules_to_save": ["head"], "target_modules": ["fc", "conv"]},
    ],
)
def test_peft_loads_a_resized_adapter_with_the_same_outputs(tmp_path, settings, uniform):
    import peft

    model = adapt(**settings)
    model.save_pretrained(tmp_path / "x")
    dt.resize_adapter(tmp_path / "x", tmp_path / "y", tolerance=0.0, uniform=uniform)
    loaded = peft.PeftModel.from_pretrained(Mixed(), tmp_path / "y").eval()
    assert_close(loaded(TOKENS), model(TOKENS))
    assert not torch.allclose(loaded(TOKENS), Mixed()(TOKENS), rtol=1e-2)


@needs_peft
def test_peft_loads_a_truncated_adapter_of_different_ranks(tmp_path):
    import peft

    model = adapt(r=6, lora_alpha=3)
    model.save_pretrained(tmp_path / "x")
    found = dt.resize_adapter(tmp_path / "x", tmp_path / "y", tolerance=0.4)
    assert len({layer.rank for layer in found.values()}) > 1
    loaded = peft.PeftModel.from_pretrained(Mixed(), tmp_path / "y")
    for name, layer in found.items():
        before, after = (
            m.base_model.model.get_submodule(name).get_delta_weight("default").detach().double()
            for m in (model, loaded)
        )
        assert float((after - before).norm()) == pytest.approx(layer.error, rel=1e-4, abs=1e-6)
        assert_close(after.flatten(1), truncate_densely(before.flatten(1), layer.rank)[0], 4 * ROUNDING)


@needs_peft
def test_an_orthogonal_initialization_allows_odd_ranks_after_resizing(tmp_path):
    import peft

    adapt(r=6, init_lora_weights="orthogonal", target_modules=["fc"]).save_pretrained(tmp_path / "x")
    dt.resize_adapter(tmp_path / "x", tmp_path / "y", rank=3)
    loaded = peft.PeftModel.from_pretrained(Mixed(), tmp_path / "y")
    assert loaded.base_model.model.fc.r["default"] == 3


@needs_peft
def test_an_audit_agrees_with_the_updates_of_peft(tmp_path):
    model = adapt(r=4, lora_alpha=10, use_rslora=True)
    model.save_pretrained(tmp_path / "x")
    layers = {layer.layer: layer for layer in dt.audit_adapter(tmp_path / "x").layers}
    for update in dt.adapter_updates(model):
        found = layers[update.name.removeprefix("base_model.model.")]
        dense = update.matrix().double()
        assert found.shape == tuple(dense.shape)
        assert found.frobenius_norm == pytest.approx(float(dense.norm()), rel=ROUNDING)


@needs_peft
def test_adapters_of_other_methods_of_peft_are_refused(tmp_path):
    import peft

    adapt(r=2, use_dora=True, target_modules=["fc"]).save_pretrained(tmp_path / "dora")
    refused(tmp_path / "dora", ValueError, "DoRA", tmp_path)
    configs = {
        "LOHA": peft.LoHaConfig(r=2, target_modules=["fc"]),
        "ADALORA": peft.AdaLoraConfig(init_r=2, total_step=100, target_modules=["fc"]),
        "IA3": peft.IA3Config(target_modules=["fc"], feedforward_modules=[]),
    }
    for name, config in configs.items():
        peft.get_peft_model(Mixed(), config).save_pretrained(tmp_path / name)
        refused(tmp_path / name, ValueError, f"of type {name}, whose|of type {name}, which", tmp_path)


# -------------------------------------------------------------------------------- extract


def change(model, ranks, scale=0.1):
    """Return a copy of a state with updates of these ranks, by layer, as matrices with outputs first."""
    torch.manual_seed(8)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for name, rank in ranks.items():
        weight = state[f"{name}.weight"]
        rows, columns = weight.flatten(1).shape
        state[f"{name}.weight"] += scale * (torch.randn(rows, rank) @ torch.randn(rank, columns)).view_as(
            weight
        )
    return state


@pytest.mark.parametrize("kind", ["safetensors", "torch", "folder", "parts", "nested"])
def test_an_extracted_adapter_contains_the_difference(tmp_path, kind):
    model = Mixed()
    states = {"base": model.state_dict(), "tuned": change(model, {"fc": 2, "embed_tokens": 3, "conv": 1})}
    paths = {}
    for name, state in states.items():
        folder = tmp_path / name
        folder.mkdir()
        if kind == "torch":
            torch.save(state, folder / "model.pt")
        elif kind == "nested":
            torch.save(
                {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "model.pt"
            )
        elif kind == "parts":
            keys = sorted(state)
            parts = {"1.safetensors": keys[:3], "2.safetensors": keys[3:]}
            for part, own in parts.items():
                save_file({key: state[key] for key in own}, folder / part)
            index = {"weight_map": {key: part for part, own in parts.items() for key in own}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            save_file(state, folder / "model.safetensors")
        paths[name] = folder if kind in ("folder", "parts") else next(folder.iterdir())
    found = dt.extract_adapter(*paths.values(), tmp_path / "lora", tolerance=1e-4)
    assert {name: layer.rank for name, layer in found.layers.items()} == {
        "fc": 2,
        "embed_tokens": 3,
        "conv": 1,
    }
    assert set(found.unchanged) == {"head.weight", "head.bias", "fc.bias", "conv.bias"}
    assert found.left_out == {}
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert tensors["base_model.model.conv.lora_A.weight"].shape == (1, 2, 3, 3)
    assert tensors["base_model.model.embed_tokens.lora_embedding_A"].shape == (3, 12)
    if importlib.util.find_spec("peft") is None:
        return
    import peft

    tuned = Mixed()
    tuned.load_state_dict(states["tuned"])
    loaded = peft.PeftModel.from_pretrained(Mixed(), tmp_path / "lora")
    assert set(loaded.targeted_module_names) == set(found.layers)
    assert_close(loaded(TOKENS), tuned(TOKENS), 1e-4)


@pytest.mark.parametrize("shape", [(30, 20), (400, 300)])  # a direct decomposition, and the iteration
@pytest.mark.parametrize(
    "rule", [{"rank": 5}, {"tolerance": 0.3}, {"tolerance": 0.05}, {"rank": 3, "tolerance": 0.1}]
)
def test_the_error_of_an_extraction_is_certified(tmp_path, shape, rule):
    decay = torch.diag(torch.tensor([1 / (1 + k) for k in range(min(shape))], dtype=torch.float64))
    u, v = (torch.linalg.qr(torch.randn(size, min(shape), dtype=torch.float64))[0] for size in shape)
    difference = u @ decay @ v.T
    base = torch.randn(shape, dtype=torch.float64)
    save_file({"fc.weight": base}, tmp_path / "base.safetensors")
    save_file({"fc.weight": base + difference}, tmp_path / "tuned.safetensors")
    found = dt.extract_adapter(
        tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "y", **rule
    )
    layer = found.layers["fc"]
    written = read_updates(tmp_path / "y")["fc"]
    actual, norm = float((difference - written).norm()), float(difference.norm())
    best = truncate_densely(difference, layer.rank)[1]
    assert actual <= layer.error + layer.rounding * norm
    assert best * (1 - 1e-9) <= layer.error <= best * (1 + 1e-4)
    assert layer.relative_error == pytest.approx(layer.error / norm)
    if "rank" not in rule:
        assert layer.relative_error <= rule["tolerance"]
        assert truncate_densely(difference, layer.rank - 1)[1] > rule["tolerance"] * norm * (1 - 1e-4)
    else:
        assert layer.rank == rule["rank"]


def test_weights_with_inputs_first_are_extracted_transposed(tmp_path):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    difference = torch.outer(torch.arange(5.0), torch.ones(3))
    for folder, weight in ((base, torch.zeros(5, 3)), (tuned, difference)):
        folder.mkdir()
        save_file({"h.c_fc.weight": weight, "wte.weight": torch.ones(7, 5)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "_name_or_path": "gpt2"}))
    dt.extract_adapter(base, tuned, tmp_path / "y", rank=1)
    config = json.loads((tmp_path / "y" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    assert config["base_model_name_or_path"] == "gpt2"
    assert_close(read_updates(tmp_path / "y")["h.c_fc"], difference.T.double())
    dt.extract_adapter(base, tuned, tmp_path / "z", rank=1, fan_in_fan_out=False)
    assert_close(read_updates(tmp_path / "z")["h.c_fc"], difference.double())


def test_tensors_that_lora_cannot_hold_are_listed(tmp_path):
    base = {
        "fc.weight": torch.zeros(4, 3),
        "fc.bias": torch.zeros(4),
        "norm.weight": torch.ones(4),
        "attention.in_proj_weight": torch.zeros(4, 4),
        "attention.out_proj.weight": torch.zeros(4, 4),
        "head.weight": torch.zeros(2, 4),
        "old.weight": torch.zeros(2, 2),
        "other.weight": torch.zeros(3, 3),
        "steps": torch.tensor(3),
    }
    tuned = {key: tensor + 1 for key, tensor in base.items() if key != "old.weight"}
    tuned |= {"head.weight": torch.ones(3, 4), "new.weight": torch.ones(2, 2)}
    torch.save(base, tmp_path / "base.bin")
    torch.save(tuned, tmp_path / "tuned.bin")
    paths = tmp_path / "base.bin", tmp_path / "tuned.bin"
    found = dt.extract_adapter(*paths, tmp_path / "y", rank=2, layers=["f*"])
    assert list(found.layers) == ["fc"]
    assert {key: reason.split(" ")[0] for key, reason in found.left_out.items()} == {
        "fc.bias": "no",
        "norm.weight": "no",
        "attention.in_proj_weight": "no",
        "attention.out_proj.weight": "read",
        "steps": "no",
        "head.weight": "its",
        "old.weight": "only",
        "new.weight": "only",
        "other.weight": "not",
    }
    with pytest.raises(ValueError, match="'g\\*' fits no layer"):
        dt.extract_adapter(*paths, tmp_path / "z", rank=2, layers=["g*"])


def test_wrong_checkpoints_are_refused(tmp_path):
    def save(name, tensors):
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    base = save("base.safetensors", {"fc.weight": torch.zeros(4, 3)})
    nan = save("nan.safetensors", {"fc.weight": torch.full((4, 3), float("nan"))})
    other = save("other.safetensors", {"gc.weight": torch.ones(4, 3)})
    cases = [
        (base, base, "differ in no weight"),
        (base, other, "no tensor of"),
        (base, nan, "'fc.weight' is not finite in .*nan.safetensors"),
        (nan, base, "'fc.weight' is not finite in .*nan.safetensors"),
    ]
    for first, second, match in cases:
        with pytest.raises(ValueError, match=match):
            dt.extract_adapter(first, second, tmp_path / "y", rank=1)
    base.write_bytes(base.read_bytes()[:-4])
    with pytest.raises(ValueError, match="not a complete file"):
        dt.extract_adapter(base, nan, tmp_path / "y", rank=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="a folder without model"):
        dt.extract_adapter(tmp_path / "empty", nan, tmp_path / "y", rank=1)
    with pytest.raises(FileNotFoundError, match="base is"):
        dt.extract_adapter(tmp_path / "nothing", nan, tmp_path / "y", rank=1)
    assert not (tmp_path / "y").exists()


@needs_peft
def test_layers_with_ambiguous_names_are_targeted_exactly(tmp_path):
    import peft

    def build():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))

    model = build()
    torch.save(model.state_dict(), tmp_path / "base.pt")
    torch.save(change(model, {"0": 1}), tmp_path / "tuned.pt")
    dt.extract_adapter(tmp_path / "base.pt", tmp_path / "tuned.pt", tmp_path / "y", tolerance=1e-3)
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path / "y")
    assert loaded.targeted_module_names == ["0"]


def test_the_extract_command(tmp_path, capsys):
    model = Mixed()
    torch.save(model.state_dict(), tmp_path / "base.pt")
    torch.save(change(model, {"fc": 2, "head": 1}), tmp_path / "tuned.pt")
    command = ["adapter", "extract", str(tmp_path / "base.pt"), str(tmp_path / "tuned.pt")]
    assert main([*command, "--out", str(tmp_path / "y"), "--tolerance", "1e-3", "--uniform"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[:2] for line in printed.splitlines()[1:3]] == [["fc", "2"], ["head", "1"]]
    assert "equal:    5 tensors" in printed
    config = json.loads((tmp_path / "y" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["target_modules"]) == (2, {}, ["fc", "head"])
    assert main([*command, "--out", str(tmp_path / "z"), "--rank", "1", "--layers", "head"]) == 0
    assert "left out: 1 tensor, not among the layers to extract: fc.weight" in capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / "x"), "--rank", "1", "--layers", "he"]) == 2
    message = capsys.readouterr().err
    assert "'he' fits no layer of" in message
    assert "fc, " in message


def test_the_commands_need_no_peft(run_python, tmp_path):
    folder = write_adapter(tmp_path / "x", {"fc": make_pair(6, 5, [2.0, 1.0])})
    program = """
import sys
sys.modules["peft"] = None
from dlnfast.cli import main
print(main(["adapter", "audit", sys.argv[1]]))
print(main(["adapter", "resize", sys.argv[1], "--rank", "1", "--out", sys.argv[2]]))
"""
    lines = run_python(program, folder, tmp_path / "y").splitlines()
    assert [line for line in lines if line in "012"] == ["0", "0"]
