# SPDX-License-Identifier: MIT
"""Files of adapters: written atomically, and checked completely before the model changes."""

from __future__ import annotations

import copy
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers.torch_networks import add_adapter, make_two_layers
from tolerances import tolerance

import dlnfast as dln

torch = pytest.importorskip("torch", reason="PyTorch is optional")
safetensors = pytest.importorskip("safetensors", reason="safetensors is optional")

from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

import dlnfast.torch as dt  # noqa: E402
from dlnfast.torch.deep_lora import adapter as adapter_module  # noqa: E402
from dlnfast.torch.deep_lora import files  # noqa: E402

pytestmark = pytest.mark.usefixtures("fixed_torch_seed")

RELEASED = Path(__file__).parent / "data" / "deep-lora-1.safetensors"
KEY = "dlnfast.deep_lora"


def network():
    return make_two_layers(6, 5, 4, seed=7)


@pytest.fixture
def saved(tmp_path):
    """Return a file, its tensors and its metadata."""
    path = tmp_path / "adapter.safetensors"
    add_adapter(network()).save(path)
    with safetensors.safe_open(path, "pt") as file:
        return path, load_file(path), file.metadata()


def assert_unchanged_by(model, call, error, match=None):
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=match):
        call(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(name.startswith("_frozen") for name in vars(model))


# -------------------------------------------------------------------------------- reading


def test_a_changed_byte_is_detected_or_has_no_effect(saved, tmp_path):
    path, tensors, _ = saved
    content = path.read_bytes()
    file_path = tmp_path / "changed.safetensors"
    settings, _ = files.read(path)
    refused = 0
    for i in range(len(content)):
        file_path.write_bytes(content[:i] + bytes([content[i] ^ (1 << i % 8)]) + content[i + 1 :])
        try:
            found, layers = files.read(file_path)
        except ValueError as error:
            assert str(file_path) in str(error)
            refused += 1
            continue
        assert found == settings
        for name, layer in layers.items():
            for key, factor in layer.factors.by_name().items():
                assert torch.equal(factor, tensors[f"{name}.{key}"])
    # Accepted changes are in the name of the format; a renamed checksum is an unknown entry.
    assert refused >= len(content) - 40


def test_truncated_and_extended_files_are_refused(saved, tmp_path):
    content = saved[0].read_bytes()
    file_path = tmp_path / "changed.safetensors"
    sizes = [*range(0, len(content), 37), len(content) - 1]
    forged = [size.to_bytes(8, "little") + content[8:] for size in (0, 1, 2**40, 2**63, len(content))]
    for wrong in (*(content[:n] for n in sizes), content + b"\0", *forged):
        file_path.write_bytes(wrong)
        assert_unchanged_by(
            network(), lambda model: dt.DeepLoRA.load(model, file_path), ValueError, "changed.saf"
        )


def without(tensors, part):
    return {key: tensor for key, tensor in tensors.items() if part not in key}


CHANGES = {
    "no cores": lambda t: without(t, "cores"),
    "no left": lambda t: without(t, "2.left"),
    "no tensor": lambda t: {"other": torch.ones(1)},
    "one more": lambda t: {**t, "4.right": t["0.right"].clone()},
    "right too narrow": lambda t: {**t, "0.right": t["0.right"][:, :5].contiguous()},
    "cores of another rank": lambda t: {**t, "0.cores": torch.ones(1, 3, 3)},
    "more cores": lambda t: {**t, "0.cores": torch.ones(2, 2, 2)},
    "rank 0": lambda t: {
        **t, "0.right": torch.ones(0, 6), "0.cores": torch.ones(1, 0, 0), "0.left": torch.ones(5, 0)
    },
    "a rank above the width": lambda t: {
        **t, "0.right": torch.ones(6, 6), "0.cores": torch.ones(1, 6, 6), "0.left": torch.ones(5, 6)
    },
    "a vector": lambda t: {**t, "0.right": t["0.right"][0]},
    "a number": lambda t: {**t, "0.right": torch.ones(())},
    "integers": lambda t: {**t, "0.left": t["0.left"].to(torch.int32)},
    "not finite": lambda t: {**t, "2.left": t["2.left"] * torch.inf},
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("checksum", [False, True])
def test_invalid_tensors_leave_the_model_unchanged(kind, checksum, saved):
    path, tensors, metadata = saved
    if not checksum:  # as dlnfast 0.1.0 wrote it
        del metadata["dlnfast.sha256"]
    save_file(CHANGES[kind](tensors), path, metadata)
    assert_unchanged_by(network(), lambda model: dt.DeepLoRA.load(model, path), ValueError, path.name)


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 1},
        {"depth": 4},
        {"depth": "3"},
        {"scale": float("nan")},
        {"init": "svd"},
        {"layers": {}},
        {"layers": []},
        {"version": None},
        {"layers": {"0": {"kind": "linear", "shape": [5, 6], "framed": False}}},
        {"layers": {"0": {"kind": "conv", "shape": [5, 6], "framed": False}}},
        {"layers": {"0": {"kind": "linear", "shape": [5], "framed": False}}},
        {"layers": {"0": {"kind": "linear", "shape": [5, 6], "framed": 1}}},
    ],
)
def test_invalid_metadata_leave_the_model_unchanged(change, saved):
    path, tensors, metadata = saved
    del metadata["dlnfast.sha256"]
    save_file(tensors, path, {**metadata, KEY: json.dumps(json.loads(metadata[KEY]) | change)})
    assert_unchanged_by(network(), lambda model: dt.DeepLoRA.load(model, path), ValueError, path.name)


def test_models_of_other_shapes_are_left_unchanged(saved, tmp_path):
    path = saved[0]
    table = nn.Sequential(nn.Embedding(6, 5), nn.ReLU(), nn.Linear(5, 4))
    tied = network()
    tied.other = nn.Linear(5, 4)
    tied.other.weight = tied[2].weight
    for model, error, match in [
        (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), dln.ShapeError, "'2' is 3 x 5"),
        (nn.Sequential(nn.Linear(6, 5)), ValueError, "'2' fits none"),
        (table, ValueError, "layer '0' is embedding; the file's is linear"),
        (tied, ValueError, "'2' shares its weight with 'other'"),
    ]:
        assert_unchanged_by(model, lambda model: dt.DeepLoRA.load(model, path), error, match)
    assert_unchanged_by(network(), lambda model: dt.DeepLoRA.load(model, path, name="a.b"), ValueError, "a.b")
    # A factor that overflows in float32, but not in float64.
    wide = add_adapter(network().double())
    with torch.no_grad():
        wide._branches["2"].left.mul_(1e100)
    wide.save(tmp_path / "wide")
    assert_unchanged_by(
        network(),
        lambda model: dt.DeepLoRA.load(model, tmp_path / "wide"),
        ValueError,
        r"'2' is not finite in torch\.float32",
    )
    assert dt.DeepLoRA.load(network().double(), tmp_path / "wide").layer_names == ["0", "2"]


def test_an_error_during_loading_is_undone(saved, monkeypatch):
    attach, calls = adapter_module.attach, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return attach(*args)

    monkeypatch.setattr(adapter_module, "attach", failing)
    assert_unchanged_by(network(), lambda model: dt.DeepLoRA.load(model, saved[0]), KeyboardInterrupt)


def test_layer_names_in_a_file_are_not_used_as_globs(tmp_path):
    def make():
        torch.manual_seed(7)
        return nn.ModuleDict({"a[b]": nn.Linear(4, 4), "ab": nn.Linear(4, 4), "*": nn.Linear(4, 4)})

    adapter = dt.DeepLoRA(make(), lambda name, _: name != "ab", rank=2, init="random", scale=0.5)
    assert adapter.layer_names == ["a[b]", "*"]
    adapter.save(tmp_path / "file")
    model = make()
    assert dt.DeepLoRA.load(model, tmp_path / "file").layer_names == ["a[b]", "*"]
    assert "deep_lora" not in model["ab"]._modules


def test_a_single_layer_can_be_adapted_saved_and_loaded(tmp_path):
    def make():
        torch.manual_seed(7)
        return nn.Linear(4, 4)

    model, x = make(), torch.ones(2, 4)
    adapter = add_adapter(model)
    output = model(x)
    adapter.save(tmp_path / "file")
    plain = make()
    assert dt.DeepLoRA.load(plain, tmp_path / "file").layer_names == adapter.layer_names == ["weight"]
    assert torch.equal(plain(x), output)


def test_files_of_release_0_1_0_are_read():
    """The file of dlnfast 0.1.0 has no checksum: ``rank=2, init="random", scale=0.5, seed=3``."""
    model = network()
    adapter = dt.DeepLoRA.load(model, RELEASED)
    assert (adapter.name, adapter.depth, adapter.scale, adapter.init) == ("early", 3, 0.5, "random")
    wanted = add_adapter(network(), seed=3)
    for name, factor in adapter.state_dict().items():
        assert (factor - wanted.state_dict()[name]).norm() <= tolerance(np.float32, 6)


@pytest.mark.parametrize("wrap", ["compiled", "parallel", "both"])
def test_adapters_of_wrapped_models_load_into_plain_ones(wrap, tmp_path):
    model = network()
    if wrap != "parallel":
        model = torch.compile(model, backend="eager")
    if wrap != "compiled":
        model = nn.DataParallel(model)
    adapter = add_adapter(model)
    assert adapter.layer_names == ["0", "2"]
    adapter.save(tmp_path / "file")
    plain = network()
    loaded = dt.DeepLoRA.load(plain, tmp_path / "file")
    assert all(torch.equal(loaded.state_dict()[key], factor) for key, factor in adapter.state_dict().items())
    # Random factors depend on the name of the layer without wrappers.
    direct = add_adapter(network())
    assert all(torch.equal(direct.state_dict()[key], factor) for key, factor in adapter.state_dict().items())
    again = dt.DeepLoRA.load(model, tmp_path / "file", name="again")
    assert again.layer_names == ["0", "2"]
    x = torch.randn(3, 6)
    adapter.remove()
    assert torch.equal(plain(x), model(x))


def test_wrapper_names_in_older_files_match_plain_layers(saved):
    path, tensors, metadata = saved
    del metadata["dlnfast.sha256"]
    description = json.loads(metadata[KEY])
    description["layers"] = {f"_orig_mod.{name}": entry for name, entry in description["layers"].items()}
    save_file({f"_orig_mod.{key}": t for key, t in tensors.items()}, path, {KEY: json.dumps(description)})
    assert dt.DeepLoRA.load(network(), path).layer_names == ["0", "2"]


# ----------------------------------------------------------------------------- writing


FAULTS = [
    ("fsync", OSError(errno.ENOSPC, "No space left on device")),
    ("fsync", KeyboardInterrupt()),
    ("replace", OSError(errno.EIO, "Input/output error")),
    ("open", OSError(errno.EMFILE, "Too many open files")),
]


def fail_at(monkeypatch, name, fault, n):
    """Let the n-th call of a file function raise; return a list of the calls."""
    kind = {"fsync": os, "replace": Path, "open": Path}[name]
    call, calls = getattr(kind, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == n:
            raise fault
        return call(*args, **kwargs)

    monkeypatch.setattr(kind, name, failing)
    return calls


@pytest.mark.parametrize(("name", "fault"), FAULTS)
@pytest.mark.parametrize("n", [1, 2])
def test_a_failed_save_leaves_the_previous_file(name, fault, n, saved, monkeypatch):
    path = saved[0]
    before = path.read_bytes()
    other = add_adapter(network(), rank=3)
    with monkeypatch.context() as patch:
        calls = fail_at(patch, name, fault, n)
        try:
            other.save(path)
        except type(fault):
            assert len(calls) >= n
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    done = len(calls) < n or (name, n) == ("fsync", 2)  # of the folder, after the file has its name
    assert (path.read_bytes() == before) != done
    assert dt.DeepLoRA.load(network(), path).factors("0")[0].shape == ((3 if done else 2), 6)


def read_export(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config["r"], {
        len(t) for key, t in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in key
    }


@pytest.mark.parametrize("others", ["nothing", "a file", "a folder"])
@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_failed_export_leaves_the_previous_export(name, fault, others, tmp_path, monkeypatch):
    folder = tmp_path / "lora"
    add_adapter(network()).export_lora(folder)
    if others == "a file":
        (folder / "README.md").write_text("text")
    elif others == "a folder":
        (folder / "logs").mkdir()
    there = sorted(entry.name for entry in folder.iterdir())
    other = add_adapter(network(), rank=3)
    for n in range(1, 12):
        with monkeypatch.context() as patch:
            calls = fail_at(patch, name, fault, n)
            try:
                other.export_lora(folder)
            except type(fault):
                pass
        # Configuration and tensors always belong together.
        rank, ranks = read_export(folder)
        assert ranks == {rank}
        assert rank in (2, 3)
        assert sorted(entry.name for entry in folder.iterdir()) == there
        assert [entry.name for entry in tmp_path.iterdir()] == ["lora"]
    assert len(calls) < n
    assert rank == 3


def test_exports_create_folders_and_contain_the_current_factors(tmp_path):
    adapter = add_adapter(network())
    adapter.export_lora(tmp_path / "a" / "b")
    assert read_export(tmp_path / "a" / "b") == (2, {2})
    with torch.no_grad():
        adapter._branches["2"].left[0, 0] = torch.nan
    for call in (lambda: adapter.export_lora(tmp_path / "a" / "b"), lambda: adapter.save(tmp_path / "file")):
        with pytest.raises(ValueError, match="adapter 'default' of layer '2' is not finite: see left"):
            call()
    assert read_export(tmp_path / "a" / "b") == (2, {2})
    assert not (tmp_path / "file").exists()
    (tmp_path / "text").write_text("text")
    with pytest.raises(OSError, match="text"):
        add_adapter(network()).export_lora(tmp_path / "text")
    assert (tmp_path / "text").read_text() == "text"
