# SPDX-License-Identifier: MIT
"""Detection of weights that are shared, read by other modules, or computed, and errors for them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from helpers.torch_networks import add_adapter
from tolerances import tolerance

torch = pytest.importorskip("torch", reason="PyTorch is optional")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn import utils  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402

import dlnfast.torch as dt  # noqa: E402
from dlnfast.torch._weight_use import find_weight_use  # noqa: E402

pytestmark = pytest.mark.usefixtures("fixed_torch_seed")

BOUND = tolerance(np.float32, 32, 8)


def names(model, found):
    by_id = {id(module): name for name, module in model.named_modules()}
    return {by_id[key]: value for key, value in found.items()}


def adapt(model, layers=None):
    return dt.DeepLoRA(model, layers, rank=2, init="random", scale=0.5)


def assert_refused(model, layers, error, match, change=adapt):
    """Assert that `change` raises, and does not change the model."""
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(error, match=match):
        change(model, layers)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(
        torch.equal(after[key], before[key]) for key in before if not hasattr(before[key], "cls_to_become")
    )
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


# ------------------------------------------------------------------------------------ shared


class Sharing(nn.Module):
    """An embedding, a head, and layers whose weights share memory in several ways."""

    def __init__(self, how):
        super().__init__()
        self.emb = nn.Embedding(9, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 9, bias=False)
        weight = self.emb.weight
        if how == "one parameter":
            self.head.weight = weight
        elif how == "one memory":
            self.head.weight = nn.Parameter(weight.data)
        elif how == "transposed":
            self.head = nn.Linear(9, 8, bias=False)
            self.head.weight = nn.Parameter(weight.data.T)
        elif how == "a slice":
            self.head.weight = nn.Parameter(torch.randn(12, 8)[2:11])
            self.emb.weight = nn.Parameter(self.head.weight.data)
        elif how == "a buffer":
            self.register_buffer("table", self.head.weight.data[3:])
        elif how == "an attribute":
            self.head.copies = self.head.weight.data
        elif how == "a parameter of the model":
            self.table = self.head.weight
        else:
            flat = torch.randn(2, 9, 8)
            self.emb.weight, self.head.weight = nn.Parameter(flat[0]), nn.Parameter(flat[1])

    def forward(self, tokens):
        return self.head(self.inner(self.emb(tokens)))


@pytest.mark.parametrize(
    ("how", "other"),
    [
        ("one parameter", "emb"),
        ("one memory", "emb"),
        ("transposed", "emb"),
        ("a slice", "emb"),
        ("a buffer", "table"),
        ("an attribute", "head.copies"),
        ("a parameter of the model", "table"),
    ],
)
def test_weights_that_share_memory_are_refused(how, other):
    model = Sharing(how)
    assert names(model, find_weight_use(model).sharing)["head"] == (other,)
    assert_refused(model, "head", ValueError, f"'head' shares its weight with '{other}'")
    if other == "emb":
        assert_refused(model, "emb", ValueError, "shares its weight with")
    assert_refused(
        model,
        "head",
        ValueError,
        f"'head' is shared with '{other}'",
        lambda m, layers: dt.overparameterize(m, layers=layers),
    )
    assert add_adapter(model).layer_names == ["inner"]


def test_tensors_of_one_storage_without_overlap_are_not_shared():
    model = Sharing("two parts of one tensor")
    before = model.emb.weight.detach().clone()
    assert names(model, find_weight_use(model).sharing) == {}
    assert (
        names(copy.deepcopy(model).to("meta"), find_weight_use(copy.deepcopy(model).to("meta")).sharing) == {}
    )
    adapter = add_adapter(model, ["emb", "head"])
    output = model(torch.arange(9))
    adapter.remove(merge=True)
    assert (model(torch.arange(9)) - output).norm() <= BOUND * output.norm()
    assert not torch.equal(model.emb.weight, before)


def test_tied_parameters_on_the_meta_device_are_found():
    model = Sharing("one parameter").to("meta")
    model.head.weight = model.emb.weight
    assert names(model, find_weight_use(model).sharing) == {"emb": ("head",), "head": ("emb",)}


# -------------------------------------------------------------------------------------- read


class Reading(nn.Module):
    """Modules that use the weight of a layer in several ways in their forward pass."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(9, 8)
        self.bypassed = nn.Linear(8, 8)
        self.block = nn.Module()
        self.block.deep = nn.Linear(8, 8)
        self.listed = nn.Linear(8, 8)
        self.typed = nn.Linear(8, 8)
        self.free = nn.Linear(8, 8)
        self.reset()

    def reset(self):
        nn.init.normal_(self.free.weight)

    def forward(self, tokens):
        h = self.emb(tokens)
        h = F.linear(h, self.bypassed.weight, self.bypassed.bias)
        h = h @ self.block.deep.weight.T
        h = sum(h * self.listed.weight[i] for i in range(8))
        if isinstance(self.typed.weight, torch.Tensor) and self.typed.weight.dtype != torch.int8:
            h = self.typed(h.to(self.typed.weight.dtype))
        return self.out(self.free(h))

    def out(self, h):
        """The embedding is used as the head, so its weight has no second name."""
        return h @ self.emb.weight.T


def test_weights_that_another_module_reads_are_refused():
    model = Reading()
    readers = names(model, find_weight_use(model).readers)
    assert readers == dict.fromkeys(("emb", "bypassed", "block.deep", "listed"), model)
    for name in readers:
        assert_refused(model, name, TypeError, f"the weight of '{name}' is read by a Reading")
    adapter = add_adapter(model)
    assert adapter.layer_names == ["typed", "free"]
    output = model(torch.arange(9))
    output.sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in adapter.parameters())
    adapter.merge()
    assert (model(torch.arange(9)) - output).norm() <= BOUND * output.norm()


class OwnAttention(nn.MultiheadAttention):
    """Reads the weight in the forward pass of its base class."""

    def forward(self, x):
        return super().forward(x, x, x)[0]


class OwnLayer(nn.TransformerEncoderLayer):
    """Calls its layers, as its base class does."""

    def forward(self, x):
        return super().forward(x)


class OwnProperty(nn.Module):
    """Reads a weight through a property."""

    def __init__(self):
        super().__init__()
        self.inner, self.emb = nn.Linear(8, 8), nn.Embedding(9, 8)

    @property
    def table(self):
        return self.emb.weight

    def forward(self, x):
        return self.inner(x) @ self.table.T


def test_reads_are_found_in_bases_and_properties():
    found = {
        kind.__name__: set(names(model, find_weight_use(model).readers))
        for kind in (OwnAttention, OwnLayer, OwnProperty)
        for model in [kind() if kind is OwnProperty else kind(8, 2)]
    }
    assert found == {
        "OwnAttention": {"out_proj"},
        "OwnLayer": {"self_attn.out_proj"},
        "OwnProperty": {"emb"},
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_layers_of_attention_and_transformers():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2).eval()
    for name in ("layers.0.self_attn.out_proj", "layers.1.self_attn.q"):
        assert_refused(model, name, TypeError, f"'{name}' is read by a MultiheadAttention")
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=padding)[~padding]
        adapter = dt.DeepLoRA(model, rank=2, init="random", scale=1.0)
        assert adapter.layer_names == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
        output = model(x, src_key_padding_mask=padding)[~padding]  # of nested tensors, without the padding
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            wanted = model(x, src_key_padding_mask=padding)[~padding]
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert (output - wanted).norm() <= BOUND * wanted.norm()
    assert (output - plain).norm() > 0.01 * plain.norm()


def test_other_readers_of_a_weight_read_the_product():
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    plain = model(x, x, x)[0]
    dt.overparameterize(model, 2, layers="out_proj")
    product = model.out_proj.parametrizations.weight
    assert (model(x, x, x)[0] - plain).norm() <= BOUND * plain.norm()
    with torch.no_grad():
        product.original0.mul_(3)
    changed = model(x, x, x)[0]
    assert (
        changed - model.out_proj.bias - 3 * (plain - model.out_proj.bias)
    ).norm() <= 3 * BOUND * plain.norm()


# ---------------------------------------------------------------------------------- computed


COMPUTED = {
    "weight_norm": (utils.weight_norm, "WeightNorm"),
    "spectral_norm": (utils.spectral_norm, "SpectralNorm"),
    "pruning": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "L1Unstructured"),
    "parametrized weight_norm": (parametrizations.weight_norm, "a parametrization"),
    "orthogonal": (parametrizations.orthogonal, "a parametrization"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_refused(kind):
    make, how = COMPUTED[kind]
    model = nn.Sequential(make(nn.Linear(8, 8)), nn.Linear(8, 8)).eval()
    assert_refused(model, "0", ValueError, f"the weight of '0' is computed by .*{how}")
    assert_refused(
        model,
        "0",
        ValueError,
        f"'0' has another parametrization: .*{how}",
        lambda m, layers: dt.overparameterize(m, layers=layers),
    )
    assert add_adapter(model).layer_names == ["1"]


def test_layers_that_are_not_initialised_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8))
    with pytest.raises(ValueError, match="'1' has no parameter 'weight', or none before its first call"):
        add_adapter(model, "1")
    assert add_adapter(model).layer_names == ["0"]


def test_packed_weights_cannot_be_overparameterized():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"layer 0 is torch\.int8"):
        dt.overparameterize(model, layers="0")
    with pytest.warns(UserWarning, match="skipped"):
        dt.overparameterize(model, 2)
    assert [m.name for m in dt.weight_matrices(model, "*.factors.*")] == ["1.factors.1", "1.factors.2"]
    assert model[0].weight.dtype == torch.int8


def test_products_that_are_not_finite_are_not_collapsed():
    model = dt.overparameterize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 2)
    with torch.no_grad():
        model[1].parametrizations.weight.original1[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the product of the factors of layer '1' is not finite"):
        dt.collapse(model)
    assert len(dt.weight_matrices(model, "*.factors.*")) == 4


def test_a_submodule_with_the_name_of_adapters_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].deep_lora = nn.Linear(2, 2)
    assert_refused(model, "0", ValueError, "'0' has a submodule 'deep_lora' of its own")
