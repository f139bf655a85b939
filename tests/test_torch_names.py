# SPDX-License-Identifier: MIT
"""Names of layers are the same with and without wrappers around layers or models."""

from __future__ import annotations

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is optional")
from torch import nn  # noqa: E402
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper  # noqa: E402
from torch.optim.swa_utils import AveragedModel  # noqa: E402

import dlnfast.torch as dt  # noqa: E402
from dlnfast.torch._names import match_names, named_layers, strip_wrapper_parts, unwrap_model  # noqa: E402

NAMES = ["0", "1.fc", "1.out", "2"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x):
        return x + self.out(torch.relu(self.fc(x)))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Block(), nn.Linear(8, 2))


def compiled(module):
    return torch.compile(module, backend="eager")


def inside(wrap, *children):
    """Wrap layers within the model."""

    def change(model):
        for path in children:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, wrap(model.get_submodule(path)))
        return model

    return change


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.FileStore(str(tmp_path / "store"), 1)
    )
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "average": AveragedModel,
    "compiled twice": lambda model: nn.DataParallel(compiled(model)),
    "checkpointed block": inside(checkpoint_wrapper, "1"),
    "compiled layer in a checkpointed block": inside(lambda m: compiled(m), "1.fc", "1"),
    "all layers": lambda model: compiled(inside(checkpoint_wrapper, "0", "1.out", "1", "2")(model)),
}


@pytest.fixture(params=WRAPPERS)
def wrapped(request):
    return WRAPPERS[request.param](net())


def test_names_are_those_of_the_plain_model(wrapped):
    assert [m.name for m in dt.weight_matrices(wrapped)] == NAMES
    assert [name for name, _, _ in named_layers(wrapped)] == [name for name, _ in net().named_modules()]
    assert list(dt.select_modules(wrapped, None)) == NAMES
    assert list(dt.balance(wrapped, ["1.fc", "1.out"])) == [("1.fc", "1.out")]


@pytest.mark.parametrize(
    "choice",
    [
        "1.fc",
        "1.*",
        "*mod*",
        ["0", "1.out"],
        re.compile("^[02]$"),
        re.compile("mod|wrapped"),
        "penultimate",
        lambda name, module: name.startswith("1") and isinstance(module, nn.Linear),
    ],
)
def test_every_choice_selects_the_same_layers(wrapped, choice):
    def chosen(find, model):
        try:
            return [getattr(entry, "name", entry) for entry in find(model, choice)]
        except ValueError as error:
            assert "fits none" in str(error)
            return None

    for find in (dt.weight_matrices, dt.select_modules):
        plain, found = chosen(find, net()), chosen(find, wrapped)
        # A choice without a match in the plain model may match names with the parts of wrappers.
        assert found == plain or plain is None


def test_names_with_the_parts_of_wrappers_are_found(wrapped):
    paths = [path for path, module in wrapped.named_modules() if isinstance(module, nn.Linear)]
    assert [m.name for m in dt.weight_matrices(wrapped, paths)] == NAMES
    assert [m.name for m in dt.weight_matrices(net(), paths)] == NAMES
    assert list(dt.select_modules(net(), paths)) == NAMES
    assert [m.name for m in dt.weight_matrices(compiled(net()), paths)] == NAMES


def with_layers(state, layers):
    """Return a tracker's state with other names of layers, without a checksum as in 0.1.0."""
    return {name: value for name, value in state.items() if name != "checksum"} | {"layers": layers}


def test_tracker_states_match_layers_with_and_without_wrappers(wrapped):
    for source, target in ((net(), wrapped), (wrapped, net())):
        state = dt.track(source, k=2).state_dict()
        assert state["layers"] == NAMES
        tracked = dt.track(target, k=2)
        tracked.load_state_dict(state)
        assert tracked.trajectory().layer_names == NAMES
    # The format of 0.1.0.
    old = with_layers(state, [f"module._orig_mod.{name}" for name in state["layers"]])
    dt.track(net(), k=2).load_state_dict(old)
    with pytest.raises(ValueError, match=r"layers \['0', '1.fc', '1.out', '3'\]; this tracker has"):
        dt.track(net(), k=2).load_state_dict(with_layers(state, ["0", "1.fc", "1.out", "3"]))


def test_adapter_seeds_and_files_match_layers_with_and_without_wrappers(wrapped, tmp_path):
    adapter = dt.DeepLoRA(wrapped, ["0", "1.fc"], rank=2, init="random", seed=3)
    plain = dt.DeepLoRA(net(), ["0", "1.fc"], rank=2, init="random", seed=3)
    assert adapter.layer_names == ["0", "1.fc"]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(adapter.state_dict()[name], tensor)
    adapter.save(tmp_path / "adapter.safetensors")
    loaded = dt.DeepLoRA.load(net(), tmp_path / "adapter.safetensors")
    again = dt.DeepLoRA.load(nn.DataParallel(net()), tmp_path / "adapter.safetensors")
    for other in (loaded, again):
        assert other.layer_names == ["0", "1.fc"]
        assert all(torch.equal(other.state_dict()[name], t) for name, t in plain.state_dict().items())


def test_features_and_probes_match_layers_with_and_without_wrappers(wrapped):
    inputs = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    batches = [(inputs, torch.arange(12) % 2)]
    with torch.no_grad():
        wrapped(inputs)  # compiled code is there before the hooks
    layers = ["input", "0", "1", "1.fc"]
    (features, _), (plain, _) = (next(iter(dt.layer_outputs(m, batches, layers))) for m in (wrapped, net()))
    assert list(features) == layers
    for name in layers:
        torch.testing.assert_close(features[name], plain[name])
    probes = dt.RidgeProbes(2).fit(dt.layer_outputs(wrapped, batches, layers))
    assert probes.accuracy(dt.layer_outputs(net(), batches, layers)).keys() == set(layers)
    assert [m.layer for m in dt.measure_layers(wrapped, batches, ["1.fc"])] == ["1.fc"]


def test_trainer_checkpoints_match_layers_with_and_without_wrappers(tmp_path):
    inputs, labels = torch.randn(20, 8, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 2

    def train(model, epochs):
        trainer = dt.Trainer(
            model,
            learning_rate=0.1,
            epochs=epochs,
            batch_size=10,
            schedule="constant",
            tracker=dt.track(model, k=2, every=1),
            checkpoint=tmp_path / "checkpoint.pt",
        )
        trainer.fit(inputs, labels)
        return unwrap_model(model).state_dict()

    train(compiled(net()), 2)
    train(net(), 4)
    resumed = train(nn.DataParallel(net()), 6)
    (tmp_path / "checkpoint.pt").unlink()
    straight = train(net(), 6)
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_distributed_data_parallel_does_not_change_names(process_group):
    model = nn.parallel.DistributedDataParallel(net())
    assert [m.name for m in dt.weight_matrices(model)] == NAMES
    assert [m.name for m in dt.weight_matrices(model, "module.1.fc")] == ["1.fc"]


def test_fully_sharded_data_parallel_is_recognized_by_its_class():
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # without devices
    nn.Module.__init__(model)
    model._modules["_fsdp_wrapped_module"] = inside(checkpoint_wrapper, "1")(net())
    found = dt.weight_matrices(model)
    assert [m.name for m in found] == NAMES
    path = "_fsdp_wrapped_module.1._checkpoint_wrapped_module.fc"
    assert [m.name for m in dt.weight_matrices(net(), path)] == ["1.fc"]


def test_a_child_that_is_called_module_keeps_its_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.fc = nn.ModuleDict({"fc": nn.Linear(4, 4)}), nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.module["fc"](x))

    for model in (Model(), compiled(Model()), nn.DataParallel(Model())):
        assert [(m.name, m.shape) for m in dt.weight_matrices(model)] == [
            ("module.fc", (4, 4)),
            ("fc", (3, 4)),
        ]
        assert dt.weight_matrices(model, "fc")[0].shape == (3, 4)
        assert dt.weight_matrices(model, "module.fc")[0].shape == (4, 4)
        adapter = dt.DeepLoRA(model, "module.fc", rank=2, init="random")
        assert adapter.layer_names == ["module.fc"]
    with pytest.raises(ValueError, match=r"'_orig_mod\.fc' can be 'module\.fc' or 'fc'"):
        dt.weight_matrices(Model(), "_orig_mod.fc")
    with pytest.raises(ValueError, match=r"'_orig_mod\.fc' can be 'module\.fc' or 'fc'"):
        dt.select_modules(Model(), "_orig_mod.fc")
    state = dt.track(Model(), k=2).state_dict()
    with pytest.raises(ValueError, match=r"'_orig_mod\.fc' can be 'module\.fc' or 'fc'"):
        dt.track(Model(), k=2).load_state_dict(with_layers(state, ["module.fc", "_orig_mod.fc"]))


def test_an_error_names_both_modules_of_one_name():
    model = nn.DataParallel(net())
    model.add_module("1", nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"two modules named '1': 'module\.1' and '1'"):
        dt.weight_matrices(model)


def test_names_can_be_compared_without_a_model():
    assert strip_wrapper_parts("layers.3._checkpoint_wrapped_module.fc") == "layers.3.fc"
    assert (
        strip_wrapper_parts("module._orig_mod.layers.0.modules.module_list") == "layers.0.modules.module_list"
    )
    assert match_names(["a", "module.b", "c"], ["a", "_orig_mod.b", "d"]) == {
        "a": "a",
        "module.b": "_orig_mod.b",
    }
    assert match_names(["fc"], ["module.fc", "fc"]) == {"fc": "fc"}
    assert unwrap_model(compiled(nn.DataParallel(net())))[0].weight.shape == (8, 8)


# PyTorch's compiler reads gradients of inner tensors under a checkpoint.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_records_of_a_compiled_model_are_correct(wrapped):
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    with dt.track(wrapped, "1.fc", k=3, every=1) as tracked:
        for _ in range(2):
            optimizer.zero_grad()
            wrapped(torch.ones(4, 8)).square().mean().backward()
            optimizer.step()
    weight = unwrap_model(wrapped).get_parameter
    name = next(
        name
        for name, _ in unwrap_model(wrapped).named_parameters()
        if strip_wrapper_parts(name) == "1.fc.weight"
    )
    wanted = torch.linalg.svdvals(weight(name).detach())[:3]
    np.testing.assert_allclose(tracked.trajectory().singular_values("1.fc")[-1], wanted, rtol=1e-5)
