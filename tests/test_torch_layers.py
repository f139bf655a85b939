# SPDX-License-Identifier: MIT
"""Choice of weights of a model, and their matrices."""

from __future__ import annotations

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is optional")
from torch import nn  # noqa: E402

import dlnfast as dln  # noqa: E402
from dlnfast.torch import select_modules, weight_matrices  # noqa: E402


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Linear(4, 5),
        nn.TransformerEncoderLayer(8, 2, 16),
        nn.Conv2d(3, 4, (2, 5)),
        nn.ConvTranspose2d(3, 4, (3, 2)),
        nn.Embedding(10, 4),
        nn.BatchNorm1d(4),
        nn.Linear(4, 10),
    )
    made.append(nn.Linear(4, 10))
    made[7].weight = made[6].weight
    return made


def names(found):
    return [matrix.name for matrix in found]


def test_all_weights_are_matrices_with_a_row_per_output(model):
    shapes = {matrix.name: matrix.shape for matrix in weight_matrices(model)}
    assert shapes == {
        "0": (5, 4),
        "1.self_attn.q": (8, 8),
        "1.self_attn.k": (8, 8),
        "1.self_attn.v": (8, 8),
        "1.self_attn.out_proj": (8, 8),
        "1.linear1": (16, 8),
        "1.linear2": (8, 16),
        "2": (4, 30),
        "3": (4, 18),
        "6": (10, 4),
    }


def test_a_matrix_computes_the_map_of_its_module(model):
    image = torch.randn(2, 3, 2, 5)
    (conv,) = weight_matrices(model, "2")
    expected = model[2](image)[:, :, 0, 0] - model[2].bias
    assert torch.allclose(image.flatten(1) @ conv.matrix().T, expected, atol=1e-6)
    (linear,) = weight_matrices(model, "0")
    assert linear.matrix().data_ptr() == model[0].weight.data_ptr()
    parts = weight_matrices(model, "1.self_attn")
    joint = torch.cat([part.matrix() for part in parts])
    assert torch.equal(joint, model[1].self_attn.in_proj_weight)
    # The rows of a transposed convolution are its outputs, too.
    (back,) = weight_matrices(model, "3")
    point = torch.randn(1, 3, 1, 1)
    output = (model[3](point) - model[3].bias[:, None, None])[0]
    kernel = back.matrix().reshape(4, 3, 3, 2)
    assert torch.allclose(torch.einsum("oikl,i->okl", kernel, point[0, :, 0, 0]), output, atol=1e-6)


CONVOLUTIONS = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), (6, 12)),
    "Conv1d, groups": (lambda: nn.Conv1d(4, 6, 3, groups=2), (6, 6)),
    "Conv2d, groups": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2), (6, 12)),
    "Conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 9)),
    "Conv2d, two outputs a channel": (lambda: nn.Conv2d(4, 8, 3, groups=4), (8, 9)),
    "Conv3d, groups": (lambda: nn.Conv3d(6, 4, (2, 1, 2), groups=2), (4, 12)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (6, 12)),
    "ConvTranspose1d, groups": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (6, 6)),
    "ConvTranspose2d, groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (6, 18)),
    "ConvTranspose2d, depthwise": (lambda: nn.ConvTranspose2d(4, 4, (3, 2), groups=4), (4, 6)),
    "ConvTranspose3d, groups": (lambda: nn.ConvTranspose3d(4, 6, (2, 1, 2), groups=2), (6, 8)),
}


def maps_of_groups(layer):
    """Return the map of each group, from the outputs for unit inputs: one row per output.

    Of a convolution: from a patch of the size of the kernel to a point; of a transposed one, from a point to
    a patch, whose positions belong to the input dimension.
    """
    is_transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    size = [1] * len(layer.kernel_size) if is_transposed else list(layer.kernel_size)
    n_inputs = layer.in_channels * int(np.prod(size))
    units = torch.eye(n_inputs).reshape(n_inputs, layer.in_channels, *size)
    with torch.no_grad():
        outputs = layer(units) - layer(torch.zeros_like(units[:1]))
    outputs = outputs.reshape(layer.in_channels, -1, layer.out_channels, int(np.prod(outputs.shape[2:])))
    whole = outputs.permute(2, 0, 1, 3).reshape(layer.out_channels, layer.in_channels, -1)
    rows, columns = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    blocks = [
        whole[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns].reshape(rows, -1)
        for g in range(layer.groups)
    ]
    assert float(whole.square().sum()) == pytest.approx(float(sum(b.square().sum() for b in blocks)))
    return blocks


@pytest.mark.parametrize("layout", [torch.contiguous_format, "channels last"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_matrices_of_convolutions_contain_the_maps_of_the_groups(kind, layout):
    torch.manual_seed(0)
    make, shape = CONVOLUTIONS[kind]
    layer = make()
    if layout == "channels last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        layer = layer.to(memory_format=formats.get(layer.weight.ndim, torch.contiguous_format))
    (found,) = weight_matrices(nn.Sequential(layer))
    assert found.shape == shape == tuple(found.matrix().shape)
    assert found.groups == layer.groups
    torch.testing.assert_close(found.matrix(), torch.cat(maps_of_groups(layer)), atol=1e-6, rtol=0)

    strides = layer.weight.stride()
    dln.torch.orthogonal_(layer, 0.5, seed=1)
    for block in maps_of_groups(layer):
        values = torch.linalg.svdvals(block)
        torch.testing.assert_close(values, torch.full_like(values, 0.5), atol=1e-6, rtol=0)
    assert layer.weight.stride() == strides
    start = found.copy()
    values = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    found.write(values)
    assert torch.equal(found.matrix(), values)
    torch.testing.assert_close(torch.cat(maps_of_groups(layer)), values, atol=1e-6, rtol=0)
    change = found.operator(start).matmat(np.eye(shape[1]))
    np.testing.assert_allclose(change, values - found.start_matrix(start), atol=1e-6)
    recorded = dln.torch.track(layer, k="all").trajectory().singular_values(1)[0]
    np.testing.assert_allclose(recorded, torch.linalg.svdvals(values), rtol=1e-5)


@pytest.mark.parametrize("initial", ["orthogonal", "gaussian", "uniform"])
def test_groups_are_drawn_independently_and_the_first_from_the_seed(initial):
    layer = dln.torch.initialize_(nn.Conv2d(4, 6, 3, groups=2), initial, 0.5, seed=4)
    first, second = weight_matrices(layer)[0].matrix().double().split(3)
    wanted = getattr(dln, initial)([18, 3], 0.5, seed=4)[0]
    np.testing.assert_allclose(first, wanted, atol=1e-7)
    assert float((first - second).abs().max()) > 0.01
    for block in (first, second):
        assert float(block.norm()) == pytest.approx(0.5 * 3**0.5, rel=1e-6)


def test_balance_of_convolutions_with_groups_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match=r"'1' is a convolution with 2 groups"):
        dln.torch.balance(model)
    assert list(dln.torch.balance(model, ["0", "2"])) == [("0", "2")]


def test_only_parameters_can_be_written():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    with pytest.raises(
        TypeError, match=r"the weight of layer weight is computed by a parametrization \(WeightNorm"
    ):
        weight_matrices(layer)[0].write(torch.eye(3))
    attention = nn.MultiheadAttention(4, 2)
    weight_matrices(attention, "k")[0].write(torch.eye(4))
    assert torch.equal(attention.in_proj_weight[4:8], torch.eye(4))


def test_attention_with_other_key_widths_has_three_matrices():
    attention = nn.MultiheadAttention(8, 2, kdim=5, vdim=3)
    found = weight_matrices(nn.ModuleDict({"attention": attention}))
    assert {m.name: m.shape for m in found} == {
        "attention.q": (8, 8),
        "attention.k": (8, 5),
        "attention.v": (8, 3),
        "attention.out_proj": (8, 8),
    }


def test_weights_with_inputs_first_are_transposed():
    class Conv1D(nn.Module):  # as GPT-2 has it
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 7))

    assert weight_matrices(nn.Sequential(Conv1D()))[0].shape == (7, 3)


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ("2", ["2"]),
        ("1.self_attn.?", ["1.self_attn.q", "1.self_attn.k", "1.self_attn.v"]),
        ("1.self_attn.v", ["1.self_attn.v"]),
        ("1.self_attn", ["1.self_attn.q", "1.self_attn.k", "1.self_attn.v"]),
        (re.compile("linear[12]$"), ["1.linear1", "1.linear2"]),
        (["3", re.compile("^0")], ["0", "3"]),
        (("1.linear*", "0", "1.linear1"), ["0", "1.linear1", "1.linear2"]),
        (lambda name, module: isinstance(module, nn.Conv2d), ["2"]),
        ("penultimate", ["3"]),
        ("4", ["4"]),  # embeddings, if requested
        ("7", ["6"]),  # a weight that two modules share has two names
    ],
)
def test_layers_can_be_chosen_in_every_documented_way(model, choice, wanted):
    assert names(weight_matrices(model, choice)) == wanted


def test_shared_weights_are_listed_once_with_their_other_names(model):
    (shared,) = weight_matrices(model, "6")
    assert shared.aliases == ("7",)


def test_a_head_that_shares_the_weight_of_an_embedding_is_a_layer():
    tied = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
    tied[2].weight = tied[0].weight
    found = weight_matrices(tied)
    assert [(m.name, m.aliases) for m in found] == [("1", ()), ("2", ("0",))]
    assert names(weight_matrices(tied, "penultimate")) == ["1"]


def test_factors_of_a_single_layer_can_be_chosen():
    layer = dln.torch.overparameterize(nn.Linear(4, 6), depth=2)
    assert [(m.name, m.shape) for m in weight_matrices(layer, "factors.*")] == [
        ("factors.1", (4, 4)),
        ("factors.2", (6, 4)),
    ]
    assert names(weight_matrices(layer)) == ["weight"]


def test_modules_are_chosen_by_the_same_rules(model):
    assert list(select_modules(model, "1.linear?")) == ["1.linear1", "1.linear2"]
    assert list(select_modules(model, ["5", "0"])) == ["0", "5"]
    assert list(select_modules(model, "penultimate")) == ["3"]
    assert "1.self_attn" in select_modules(model, None)
    assert "1.self_attn.out_proj" not in select_modules(model, None)  # which is never called


@pytest.mark.parametrize(
    ("choice", "error", "text"),
    [
        (
            "nothing",
            ValueError,
            "fits none of the model's weight matrices, by their names in model.named_modules(): 0, 1",
        ),
        ("5", ValueError, "'5' fits none"),
        (re.compile("absent"), ValueError, "'absent' fits none"),
        (lambda name, module: False, ValueError, "chooses none"),
        (7, TypeError, "layers is int; wanted a name"),
        ([7], TypeError, "layers holds int"),
    ],
)
def test_errors_name_the_invalid_choice(model, choice, error, text):
    with pytest.raises(error, match=re.escape(text)):
        weight_matrices(model, choice)


def test_matrices_of_recurrent_layers_and_of_plain_parameters():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(5, 4)
            self.mix = nn.Parameter(torch.zeros(6, 5))
            self.head = nn.Linear(4, 2)

    assert {m.name: m.shape for m in weight_matrices(Model())} == {
        "rnn.weight_ih_l0": (16, 5),
        "rnn.weight_hh_l0": (16, 4),
        "head": (2, 4),
    }
    assert weight_matrices(Model(), "mix")[0].shape == (6, 5)
    assert list(select_modules(Model(), None)) == ["rnn", "head"]


def test_errors_name_invalid_models():
    with pytest.raises(TypeError, match="model is ndarray; wanted"):
        weight_matrices(np.eye(3))
    with pytest.raises(ValueError, match="'penultimate', but the model has 1 weight matrices"):
        weight_matrices(nn.Linear(3, 3), "penultimate")
    with pytest.raises(ValueError, match="chooses none"):
        weight_matrices(nn.Sequential(nn.ReLU()))


def test_pytorch_is_imported_on_first_use(run_python):
    program = """
import sys
import dlnfast
assert "torch" not in sys.modules
dlnfast.torch.track
print("torch" in sys.modules)
"""
    assert run_python(program).strip() == "True"


def test_without_pytorch_the_error_names_the_package(run_python):
    program = """
import sys
sys.modules["torch"] = None
import dlnfast
try:
    dlnfast.torch
except ModuleNotFoundError as error:
    print(error.name, "|", error)
"""
    printed = run_python(program).strip()
    assert printed == "torch | dlnfast.torch needs PyTorch, which is not installed: pip install torch"


def test_a_device_matrix_multiplies_with_the_difference():
    generator = torch.Generator().manual_seed(0)
    now, start = (torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    operator = dln.torch.DeviceMatrix(now, start)
    difference = (now - start).numpy()
    X, Y = np.random.default_rng(0).standard_normal((5, 2)), np.eye(7, 3)
    np.testing.assert_allclose(operator.matmat(X), difference @ X, atol=1e-14)
    np.testing.assert_allclose(operator.rmatmat(Y), difference.T @ Y, atol=1e-14)
    assert operator.squared_norm() == pytest.approx(np.sum(difference**2), rel=1e-14)
    assert dln.torch.DeviceMatrix(now.to(torch.bfloat16)).dtype == np.float32
