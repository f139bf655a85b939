# SPDX-License-Identifier: MIT
"""Reading of weights: correct values of computed weights, no side effects, errors for unreadable ones."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is optional")
from helpers.torch_networks import squared_error  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, parametrize, prune  # noqa: E402

import dlnfast as dln  # noqa: E402
import dlnfast.torch as dt  # noqa: E402


def old(function, layer, *settings):
    """Apply one of PyTorch's deprecated hooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return getattr(nn.utils, function)(layer, *settings)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", amount=0.3)
    prune.random_structured(layer, "weight", amount=1, dim=0)  # makes it a container of two
    return layer


class Noise(nn.Module):
    """Draws from every source of random numbers, and has counters of every type."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8, 8))
        self.count, self.seen, self.generator = 0, [torch.zeros(1)], torch.Generator().manual_seed(1)

    def forward(self, weight):
        self.count += 1
        self.seen[0] += 1
        self.mean.mul_(0.9).add_(weight, alpha=0.1)
        self.extra = weight.detach()
        noise = torch.randn_like(weight) + torch.rand(1, generator=self.generator)
        return weight + 1e-3 * noise + 1e-6 * np.random.standard_normal() + 1e-6 * random.random()


class InPlace(nn.Module):
    """Writes to its input, which is allowed for untrained weights only."""

    def forward(self, weight):
        return weight.detach().clamp_(-0.1, 0.1)


class Nested(nn.Module):
    """Multiplies by the weight of a parametrized layer."""

    def __init__(self):
        super().__init__()
        self.inner = parametrizations.spectral_norm(nn.Linear(8, 8))

    def forward(self, weight):
        return self.inner.weight @ weight


def parametrized(module):
    def change(layer):
        parametrize.register_parametrization(layer, "weight", module())
        return layer

    return change


COMPUTED = {
    "spectral norm": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "noise": parametrized(Noise),
    "in place": parametrized(InPlace),
    "nested": parametrized(Nested),
    "twice": lambda layer: parametrizations.spectral_norm(parametrizations.weight_norm(layer)),
    "old weight norm": lambda layer: old("weight_norm", layer),
    "old spectral norm": lambda layer: old("spectral_norm", layer),
    "pruned": pruned,
    "deep": lambda layer: dt.overparameterize(layer, depth=3),
}


def computed_model(kind):
    torch.manual_seed(0)
    return nn.Sequential(COMPUTED[kind](nn.Linear(8, 8)), nn.Linear(8, 2)).train()


def everything(model, versions=True):
    """Return all state that reading could change, as bytes and plain values, with version counters."""

    def all_of(tensor):
        return id(tensor), tensor._version if versions else None, tensor.detach().numpy().tobytes()

    found = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float)):
                found[path, name] = value
            if isinstance(value, torch.Tensor):
                found[path, name] = all_of(value)
            if isinstance(value, torch.Generator):
                found[path, name] = value.get_state().numpy().tobytes()
            if name == "seen" and versions:
                found[path, name] = value[0].item()
        found[path, "attributes"] = sorted(vars(module))
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                found[path, name] = all_of(value)
    found["torch"] = torch.get_rng_state().numpy().tobytes()
    found["numpy"] = [np.asarray(part).tobytes() for part in np.random.get_state()[1:3]]
    found["python"] = random.getstate()
    return found


def look(model):
    weights = dt.weight_matrices(model)
    for weight in weights:
        assert weight.shape == weight.matrix().shape
        weight.copy(), weight.operator(), weight.device
    with dt.track(model, k=2):
        pass
    dt.select_modules(model, None)
    dt.balance(model)
    with pytest.raises(ValueError, match="computed"):
        dt.DeepLoRA(model, "0", rank=2, init="random")
    with pytest.raises(ValueError, match="computed"):
        dt.orthogonal_(model)


def run(model):
    """Run the model inside of functions that measure it or compute gradients."""
    for mode in ("eval", "train", "keep"):
        list(dt.layer_outputs(model, [(torch.ones(3, 8), torch.tensor([0, 1, 1]))], mode=mode))
    batch = torch.ones(3, 8), torch.ones(3, 2)
    dt.DeepLoRA(model, "1", rank=2, batches=batch, loss=squared_error, freeze=False).remove()


@pytest.mark.parametrize("kind", COMPUTED)
def test_reading_weights_does_not_change_the_model(kind):
    model = computed_model(kind)
    before = everything(model)
    look(model)
    assert everything(model) == before
    before = everything(model, versions=False)
    run(model)
    assert everything(model, versions=False) == before


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_have_the_values_of_the_next_forward_pass(kind):
    model = computed_model(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    model(torch.ones(3, 8)).square().sum().backward()
    optimizer.step()
    read = [matrix.matrix() for matrix in dt.weight_matrices(model, ["0", "1"])]
    model.eval()
    outputs = model[0](torch.eye(8)) - model[0].bias
    assert read[0].shape == (8, 8)
    tolerance = 1e-3 if kind == "noise" else 1e-6  # each call draws from a generator of its own
    torch.testing.assert_close(read[0].T, outputs.detach(), atol=tolerance, rtol=0)
    assert torch.equal(read[1], model[1].weight.detach())


@pytest.mark.parametrize("kind", ["old weight norm", "old spectral norm", "pruned", "spectral norm"])
def test_records_contain_computed_weights_after_the_step(kind):
    model = computed_model(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    wanted = []
    with dt.track(model, "0", k=3, every=1) as tracked:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(3, 8)).square().sum().backward()
            optimizer.step()
            tracked.finish_step()
            copied = {name: value.clone() for name, value in model[0].state_dict().items()}
            fresh = computed_model(kind)[0].eval()
            fresh.load_state_dict(copied)
            wanted.append(torch.linalg.svdvals(fresh(torch.eye(8)) - fresh.bias).detach()[:3].numpy())
    np.testing.assert_allclose(tracked.trajectory().singular_values("0")[1:], wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", COMPUTED)
def test_reading_weights_does_not_change_the_training(kind):
    def train(is_looked_at):
        model = computed_model(kind)
        model.insert(1, nn.Dropout(0.2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        batches = [(torch.ones(3, 8), torch.tensor([0, 1, 1]))]
        torch.manual_seed(1)
        tracked = dt.track(model, k=2, every=1) if is_looked_at else None
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(torch.ones(3, 8)).square().mean()
            if is_looked_at:
                dt.weight_matrices(model), dt.balance(model, "0"), list(dt.layer_outputs(model, batches))
            loss.backward()
            optimizer.step()
        if tracked is not None:
            tracked.close()
        return everything(model, versions=False)

    def bits(found):
        return {
            key: value[2] if isinstance(value, tuple) and len(value) == 3 else value
            for key, value in found.items()
        }

    random.seed(0), np.random.seed(0)
    plain = bits(train(False))
    random.seed(0), np.random.seed(0)
    assert bits(train(True)) == plain


def test_reading_layers_in_parallel_restores_the_random_state():
    model = nn.Sequential(*(parametrized(Noise)(nn.Linear(8, 8)) for _ in range(12)))
    before = everything(model)
    for _ in range(5):
        with dt.track(model, k=2, n_threads=4):
            pass
    assert everything(model) == before


def test_inputs_of_a_weight_hook_are_not_listed_as_matrices():
    model = nn.Sequential(old("weight_norm", nn.Linear(8, 8)), pruned(nn.Conv2d(3, 4, 2)), nn.Linear(4, 2))
    assert [m.name for m in dt.weight_matrices(model)] == ["0", "1", "2"]
    assert [m.name for m in dt.weight_matrices(model, "*")] == ["0", "1", "2"]
    assert dt.weight_matrices(model, "1")[0].shape == (4, 12)
    with pytest.raises(ValueError, match=r"'0\.weight_v' fits none"):
        dt.weight_matrices(model, "0.weight_v")


def test_computed_weights_of_recurrent_layers_and_attention_are_read():
    lstm = old("weight_norm", nn.LSTM(5, 4), "weight_hh_l0")
    parametrizations.orthogonal(lstm, "weight_ih_l0")
    attention = nn.MultiheadAttention(8, 2)
    prune.l1_unstructured(attention, "in_proj_weight", amount=0.5)
    model = nn.ModuleDict({"rnn": lstm, "attention": attention})
    before = everything(model)
    found = {m.name: m for m in dt.weight_matrices(model)}
    assert {name: m.shape for name, m in found.items()} == {
        "rnn.weight_hh_l0": (16, 4),
        "rnn.weight_ih_l0": (16, 5),
        "attention.q": (8, 8),
        "attention.k": (8, 8),
        "attention.v": (8, 8),
        "attention.out_proj": (8, 8),
    }
    columns = found["rnn.weight_ih_l0"].matrix()
    torch.testing.assert_close(columns.T @ columns, torch.eye(5), atol=1e-5, rtol=0)
    joint = torch.cat([found[f"attention.{part}"].matrix() for part in "qkv"])
    assert torch.equal(joint, attention.in_proj_weight_orig * attention.in_proj_weight_mask)
    assert int((joint == 0).sum()) == 96
    assert everything(model) == before


def test_reading_inside_a_parametrize_cache_preserves_gradients():
    model = computed_model("weight norm")
    with parametrize.cached():
        (weight, _) = dt.weight_matrices(model)
        weight.matrix()
        list(dt.layer_outputs(model, [(torch.ones(3, 8), torch.tensor([0, 1, 1]))]))
        model(torch.ones(3, 8)).sum().backward()
    assert model[0].parametrizations.weight.original1.grad is not None


def test_the_model_is_restored_after_an_error_in_a_forward_pass():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.is_broken = False

        def forward(self, weight):
            if self.is_broken and not self.training:
                torch.rand(1)
                raise RuntimeError("broken")
            return weight

    model = computed_model("spectral norm")
    parametrize.register_parametrization(model[0], "weight", Fails())
    model[0].parametrizations.weight[1].is_broken = True
    before = everything(model)
    with pytest.raises(RuntimeError, match="broken"):
        dt.weight_matrices(model)[0].matrix()
    assert everything(model) == before


def test_weights_can_be_read_between_forward_and_backward_pass():
    model = nn.Sequential(old("spectral_norm", nn.Linear(8, 8)), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()
    loss = model(torch.ones(3, 8)).square().sum()
    list(dt.layer_outputs(model, [(torch.ones(3, 8), torch.tensor([0, 1, 1]))], mode="eval"))
    dt.weight_matrices(model)[0].matrix()
    assert model[0].weight.requires_grad
    loss.backward()


def test_autocast_does_not_affect_reading():
    model = computed_model("deep")
    plain = dt.weight_matrices(model)[0].matrix()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (weight, *_) = dt.weight_matrices(model)
        assert torch.equal(weight.matrix(), plain)


def test_measuring_features_restores_state_that_evaluation_changes():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 2)
            self.register_buffer("calls", torch.zeros(()))
            self.n_calls, self.last = 0, None

        def forward(self, x):
            self.n_calls += 1
            self.calls += 1
            self.last = x
            return self.linear(x)

    model = nn.Sequential(Counts()).eval()
    before = everything(model)
    for mode in ("eval", "train", "keep"):
        list(dt.layer_outputs(model, [(torch.ones(3, 8), torch.tensor([0, 1, 1]))], "0", mode=mode))
    after = everything(model)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {("0", "calls")}  # written back: a new version of the same values
    assert after["0", "calls"][2] == before["0", "calls"][2]
    assert model[0].last is None


# ------------------------------------------------------------------------- weights without real values


class Packed(nn.Linear):
    """A layer with another tensor as its weight, as in packages for quantised models."""

    def __init__(self, weight):
        super().__init__(8, 8)
        self.weight = nn.Parameter(weight, requires_grad=False)


def with_quant_state(weight):
    weight.quant_state = "as bitsandbytes keeps it"
    return weight


UNREADABLE = {
    "uint8": (lambda: torch.randint(1, 255, (32, 1)).to(torch.uint8), r"is torch\.uint8"),
    "int8": (lambda: torch.ones(8, 8, dtype=torch.int8), r"is torch\.int8"),
    "bool": (lambda: torch.ones(8, 8, dtype=torch.bool), r"is torch\.bool"),
    "complex": (lambda: torch.ones(8, 8, dtype=torch.complex64), r"is torch\.complex64"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(8, 8), 0.1, 0, torch.qint8),
        r"is torch\.qint8",
    ),
    "float8": (lambda: torch.ones(8, 8).to(torch.float8_e4m3fn), r"is torch\.float8_e4m3fn, whose scale"),
    "sparse": (lambda: torch.eye(8).to_sparse_csr(), r"is sparse \(torch\.sparse_csr\)"),
    "empty": (lambda: torch.empty(0, 8), r"is empty, with shape \(0, 8\)"),
    "shard": (lambda: torch.empty(0), r"has shape \(0,\), as the shards"),
}


def unreadable_model(kind):
    if kind == "lazy":
        odd, text = nn.LazyLinear(8), "is not initialised yet"
    elif kind == "4 bits in bfloat16":
        odd = Packed(torch.ones(32, 1, dtype=torch.bfloat16))
        odd.weight.quant_state, text = "as bitsandbytes has it", r"is packed \(Parameter\)"
    elif kind == "other attribute":
        odd, text = nn.Module(), r"is packed \(Module\.qweight\)"
        odd.register_buffer("qweight", torch.ones(1, 8, dtype=torch.int32))
    elif kind == "own code":
        odd, text = nn.Linear(8, 8), "is a plain tensor, which code of the layer's own computes"
        value = odd.weight.detach()
        del odd.weight
        odd.weight = value
    else:
        tensor, text = UNREADABLE[kind]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # sparse CSR is in beta state
            odd = Packed(tensor())
    return nn.Sequential(nn.Linear(8, 8), odd, nn.Linear(8, 2)), text


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:DeprecationWarning")
@pytest.mark.parametrize("kind", [*UNREADABLE, "lazy", "4 bits in bfloat16", "other attribute", "own code"])
def test_unreadable_weights_are_skipped_with_a_warning_or_refused_by_name(kind):
    model, text = unreadable_model(kind)
    stored = list(model[1].parameters()) + list(model[1].buffers())
    before = [None if nn.parameter.is_lazy(tensor) else (tensor._version, repr(tensor)) for tensor in stored]
    for listing in (dt.weight_matrices, lambda m: dt.track(m, k=2).matrices):
        with pytest.warns(UserWarning, match=rf"are skipped: 1 {text}") as caught:
            assert [m.name for m in listing(model)] == ["0", "2"]
        assert len(caught) == 1
    for look in (dt.weight_matrices, dt.track, dt.orthogonal_, dt.balance):
        with pytest.raises(TypeError, match=rf"layers: the weight of layer 1 {text}.*wanted a matrix"):
            look(model, layers="1")
    with pytest.raises(TypeError, match=f"the weight of layer 1 {text}"):
        dt.weight_matrices(model, ["0", "1"])
    with pytest.raises(TypeError, match=f"the weight of layer 1 {text}"):  # a pattern that fits nothing else
        dt.weight_matrices(model, "1*")
    with pytest.warns(UserWarning, match="are skipped: 1"):
        assert len(dt.weight_matrices(model, "*")) == 2
    with pytest.warns(UserWarning, match="are skipped: 1"):
        dt.orthogonal_(model, 0.5)
    weight = model[0].weight.detach()
    torch.testing.assert_close(weight @ weight.T, 0.25 * torch.eye(8), atol=1e-6, rtol=0)
    assert list(model[1].parameters()) + list(model[1].buffers()) == stored
    after = [None if nn.parameter.is_lazy(tensor) else (tensor._version, repr(tensor)) for tensor in stored]
    assert after == before


def test_unreadable_weights_give_one_warning_or_an_error_without_others():
    model = nn.Sequential(*(Packed(torch.ones(8, 8, dtype=torch.int8)) for _ in range(3)), nn.Linear(8, 2))
    with pytest.warns(UserWarning, match="0 is torch.int8, 1 is torch.int8, 2 is torch.int8") as caught:
        dt.weight_matrices(model)
    assert len(caught) == 1
    with pytest.raises(TypeError, match=r"the weight of layer 0 is torch\.int8"):
        dt.weight_matrices(model[:3])


def test_layers_with_packed_weights_have_features():
    class Unpacks(Packed):
        def forward(self, x):
            return x @ self.weight.to(x.dtype)

    model = nn.Sequential(Unpacks(torch.ones(8, 8, dtype=torch.int8)), nn.Linear(8, 2))
    assert list(dt.select_modules(model, None)) == ["0", "1"]


def test_weights_on_the_meta_device_are_refused_where_values_are_needed():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert [m.shape for m in dt.weight_matrices(model)] == [(8, 8), (8, 8)]
    for look in (dt.track, dt.balance):
        with pytest.raises(ValueError, match=r"layer.* '?0'? is on the meta device"):
            look(model)


def test_computed_biases_are_refused_before_the_model_changes():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), pruned(nn.Linear(8, 8)))
    prune.l1_unstructured(model[1], "bias", amount=2)
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"layers: the bias of '1' is computed .*L1Unstructured"):
        dt.orthogonal_(model, layers=["0", "1"])
    with pytest.raises(ValueError, match=r"layers: '2' is computed .*PruningContainer"):
        dt.orthogonal_(model, layers=["0", "2"])
    assert torch.equal(model[0].weight, before)
    assert dln.torch.weight_matrices(model, "1")[0].shape == (8, 8)
