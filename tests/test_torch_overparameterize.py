# SPDX-License-Identifier: MIT
"""Overparameterised weights: the same function, the engine's steps, and an exact `collapse`."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln

torch = pytest.importorskip("torch", reason="PyTorch is optional")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations  # noqa: E402

import dlnfast.torch as dt  # noqa: E402

pytestmark = pytest.mark.usefixtures("fixed_torch_seed")

F64 = np.float64
SIZES = st.sampled_from([1, 2, 3, 5, 8, 13])
LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 2), (3, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2, bias=False), (4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 4, 4, 4)),
}


def factors_of(layer):
    products = layer.parametrizations.weight
    return [getattr(products, f"original{i}").detach().numpy() for i in range(products.ntensors)]


def linear(n_out, n_in, dtype=torch.float64, bias=False):
    return nn.Linear(n_in, n_out, bias=bias, dtype=dtype)


@settings(max_examples=40, deadline=None)
@given(
    rows=SIZES,
    columns=SIZES,
    depth=st.integers(2, 5),
    extra=st.integers(0, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_balanced_factors_have_the_product_and_equal_spectra(rows, columns, depth, extra, dtype):
    layer = linear(rows, columns, dtype)
    before = layer.weight.detach().numpy().copy()
    narrow = min(rows, columns)
    width = None if extra == 0 else narrow + extra
    assert dt.overparameterize(layer, depth, width) is layer
    factors = factors_of(layer)
    inner = width or narrow
    assert [f.shape for f in factors] == [
        (b, a) for a, b in itertools.pairwise([columns, *[inner] * (depth - 1), rows])
    ]
    bound = tolerance(before.dtype, max(rows, columns), depth) * np.linalg.norm(before)
    assert np.linalg.norm(layer.weight.detach().numpy() - before) <= bound
    for below, above in itertools.pairwise(factors):
        gap = np.linalg.norm(above.T @ above - below @ below.T)
        assert gap <= tolerance(before.dtype, max(rows, columns)) * np.linalg.norm(below) ** 2
    # Directions beyond the rank are zero in all factors.
    assert not factors[0][narrow:].any()
    assert not factors[-1][:, narrow:].any()


@settings(max_examples=30, deadline=None)
@given(
    rows=SIZES,
    columns=SIZES,
    width=SIZES,
    depth=st.integers(2, 4),
    initial=st.sampled_from(["balanced", "orthogonal"]),
    momentum=st.sampled_from([0.0, 0.8]),
    weight_decay=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 99),
)
def test_descent_on_the_factors_equals_the_engine(
    rows, columns, width, depth, initial, momentum, weight_decay, seed
):
    rng = np.random.default_rng(seed)
    X, Y = rng.standard_normal((columns, 9)) / 3, rng.standard_normal((rows, 9))
    problem = dln.Problem.from_data(X, Y)
    layer = linear(rows, columns)
    if initial == "balanced":
        width = None
    dt.overparameterize(layer, depth, width, initial=initial, seed=seed)
    steps = 5
    run = dln.train(
        problem,
        [f.copy() for f in factors_of(layer)],
        learning_rate="auto",
        steps=steps,
        momentum=momentum,
        weight_decay=weight_decay,
        engine="dense",
        record=dln.Record(weights_every=1, singular_values=None),
    )
    rate = run.config["learning_rate"][0]
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=momentum, weight_decay=weight_decay)
    for step in range(steps + 1):
        for ours, theirs in zip(run.all_weights(step), factors_of(layer), strict=True):
            assert np.linalg.norm(ours - theirs) <= 1e-12 * np.linalg.norm(ours)
        optimizer.zero_grad()
        loss = (layer(torch.from_numpy(X.T)) - torch.from_numpy(Y.T)).square().sum()
        (problem.loss_scale / 2 * loss).backward()
        optimizer.step()


def test_orthogonal_factors_equal_those_of_the_package():
    model = dt.MLP([6, 5, 4, 3], dtype=torch.float64)
    dt.overparameterize(model, 3, 7, initial="orthogonal", scale=[0.1, 0.2, 0.3], seed=4)
    layers = [model.layers[0].linear, model.layers[1].linear, model.head]
    for number, layer in enumerate(layers):
        rows, columns = layer.weight.shape
        wanted = dln.orthogonal(
            [1] * 3 * number + [columns, 7, 7, rows], [1.0] * 3 * number + [0.1, 0.2, 0.3], 4
        )
        for ours, theirs in zip(factors_of(layer), wanted[-3:], strict=True):
            np.testing.assert_array_equal(ours, theirs)
        product = theirs @ wanted[-2] @ wanted[-3]
        np.testing.assert_allclose(layer.weight.detach().numpy(), product, atol=tolerance(F64, 7))
    plain = dt.overparameterize(linear(4, 4), initial="orthogonal")
    np.testing.assert_array_equal(factors_of(plain)[0], dln.orthogonal([4, 4])[0])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("initial", ["balanced", "orthogonal"])
def test_collapse_is_exact(kind, initial):
    make, shape = LAYERS[kind]
    layer = make()
    x = torch.randn(2, *shape)
    keys, before = list(layer.state_dict()), layer(x)
    size = layer.weight.shape
    bias = None if layer.bias is None else layer.bias.detach().clone()
    names = [name for name, _ in layer.named_parameters()]
    dt.overparameterize(layer, 3, initial=initial)
    assert list(layer.parametrizations.weight.state_dict()) == ["original0", "original1", "original2"]
    if initial == "balanced":
        torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    # Also after training.
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    layer(x).square().sum().backward()
    optimizer.step()
    output, weight = layer(x), layer.weight.detach().clone()
    assert not torch.equal(output, before)
    if bias is not None:
        assert not torch.equal(layer.bias, bias)
    assert dt.collapse(layer) is layer
    assert list(layer.state_dict()) == keys
    assert [name for name, _ in layer.named_parameters()] == names
    assert type(layer) is type(make())
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.requires_grad
    assert layer.weight.is_leaf
    assert layer.weight.shape == size
    assert torch.equal(layer.weight, weight)
    torch.testing.assert_close(layer(x), output)  # the factors are applied one after the other
    make().load_state_dict(layer.state_dict())


def test_models_and_chosen_layers_can_be_overparameterized():
    model = dt.VGG("vgg11", 4, width=0.07).eval()
    x = torch.randn(2, 3, 32, 32)
    keys, before = list(model.state_dict()), model(x)
    dt.overparameterize(model, 2)
    assert len(dt.weight_matrices(model, "*.factors.*")) == 2 * 10
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    deep = model(x)
    dt.collapse(model)
    torch.testing.assert_close(model(x), deep, rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == keys

    vit = dt.ViT(dim=8, depth=2, n_heads=2, patch_size=16).eval()
    before = vit(x)
    dt.overparameterize(vit, 3, layers=["blocks.*.attention.q", "blocks.1.mlp.up"])
    shapes = {m.name: m.shape for m in dt.weight_matrices(vit, "blocks.1.*.factors.*")}
    assert shapes == {
        "blocks.1.attention.q.factors.1": (8, 8),
        "blocks.1.attention.q.factors.2": (8, 8),
        "blocks.1.attention.q.factors.3": (8, 8),
        "blocks.1.mlp.up.factors.1": (8, 8),
        "blocks.1.mlp.up.factors.2": (8, 8),
        "blocks.1.mlp.up.factors.3": (32, 8),
    }
    # The products have replaced the weights.
    assert len(dt.weight_matrices(vit)) == 14
    assert [m.name for m in dt.weight_matrices(vit, "penultimate")] == ["blocks.1.mlp.down"]
    torch.testing.assert_close(vit(x), before, rtol=1e-4, atol=1e-5)
    deep = vit(x)
    # A single layer of a model.
    dt.collapse(vit.blocks[0].attention.q)
    assert len(dt.weight_matrices(vit, "*.factors.*")) == 6
    dt.collapse(vit)
    torch.testing.assert_close(vit(x), deep, rtol=1e-5, atol=1e-6)


def test_factors_are_ordered_from_the_input():
    model = nn.Sequential(dt.overparameterize(linear(3, 5), 3, 4, initial="orthogonal"))
    first, second, third = (m.matrix() for m in dt.weight_matrices(model, "0.factors.*"))
    assert [tuple(m.shape) for m in (first, second, third)] == [(4, 5), (4, 4), (3, 4)]
    torch.testing.assert_close(model[0].weight, third @ second @ first)


def test_overparameterized_models_can_be_copied_saved_and_moved():
    model = dt.overparameterize(dt.MLP([6, 5, 3], bias=True), 3).eval()
    x = torch.randn(4, 6)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin.head.parametrizations.weight.original0.zero_()
    assert not torch.equal(twin(x), model(x))
    # Other values of the factors, in a model with the same products.
    other = dt.overparameterize(dt.MLP([6, 5, 3], bias=True, seed=1), 3, initial="orthogonal").eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    wide = copy.deepcopy(model).to(torch.float64)
    assert wide.head.weight.dtype == torch.float64
    torch.testing.assert_close(wide(x.double()).float(), model(x))
    # A copy can be collapsed without changing the model.
    assert dt.collapse(wide).head.weight.dtype == torch.float64
    assert len(dt.weight_matrices(model, "*.factors.*")) == 6
    assert torch.equal(other(x), model(x))
    assert dt.collapse(copy.deepcopy(model).to("meta")).head.weight.is_meta


def test_assigning_a_weight_assigns_balanced_factors():
    layer = dt.overparameterize(linear(4, 6), 3, initial="orthogonal")
    wanted = torch.randn(4, 6, dtype=torch.float64)
    layer.weight = wanted
    torch.testing.assert_close(layer.weight, wanted)
    singular = [np.linalg.svd(factor, compute_uv=False)[:4] for factor in factors_of(layer)]
    np.testing.assert_allclose(singular[0], singular[1], rtol=1e-12)
    np.testing.assert_allclose(singular[0], singular[2], rtol=1e-12)


def test_frozen_weights_stay_frozen():
    layer = nn.Linear(4, 3)
    layer.weight.requires_grad_(False)
    dt.overparameterize(layer)
    assert not any(p.requires_grad for p in layer.parametrizations.weight.parameters())
    dt.collapse(layer)
    assert isinstance(layer.weight, nn.Parameter)
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad


def test_half_precision_is_supported():
    layer = nn.Linear(6, 4, dtype=torch.bfloat16)
    before = layer.weight.detach().clone()
    dt.overparameterize(layer, 3)
    assert layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer.weight, before, rtol=0.05, atol=0.02)


def test_the_width_can_be_between_the_rank_and_the_size():
    """A weight of rank 2 is a product of width 2, but not of width 1."""
    layer = linear(6, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(6, 2, dtype=torch.float64) @ torch.randn(2, 5, dtype=torch.float64))
    before = layer.weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"width is 1, below the numerical rank 2 of weight matrix .* \(6 x 5\)"
    ):
        dt.overparameterize(layer, 3, 1)
    assert type(layer) is nn.Linear
    dt.overparameterize(layer, 3, 2)
    torch.testing.assert_close(layer.weight, before, rtol=1e-12, atol=1e-12)


def test_balanced_factors_of_zero_are_a_saddle_and_orthogonal_ones_are_not():
    """Weights that start at zero, as documented."""
    for initial, moves in (("balanced", False), ("orthogonal", True)):
        layer = linear(3, 3)
        nn.init.zeros_(layer.weight)
        dt.overparameterize(layer, 3, initial=initial, scale=None if initial == "balanced" else 0.1)
        (layer(torch.eye(3, dtype=torch.float64)) - 1.0).square().sum().backward()
        gradients = [p.grad for p in layer.parameters()]
        assert any(bool(g.any()) for g in gradients) is moves


# Invalid arguments.


def tied():
    model = dt.MLP([4, 4, 4, 2])
    model.layers[1].linear.weight = model.layers[0].linear.weight
    return model


def with_nan():
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[1, 0] = torch.nan
    return layer


@pytest.mark.parametrize(
    ("make", "options", "error", "text"),
    [
        (lambda: nn.Linear(3, 3), {"depth": 1}, ValueError, "depth is 1; wanted an integer of at least 2"),
        (lambda: nn.Linear(3, 3), {"depth": 2.0}, TypeError, "depth is 2.0"),
        (lambda: nn.Linear(3, 3), {"width": 0}, ValueError, "width is 0"),
        (lambda: nn.Linear(3, 3), {"width": 2}, ValueError, "width is 2, below the numerical rank 3"),
        (lambda: nn.Linear(3, 3), {"initial": "torch"}, ValueError, "initial is 'torch'"),
        (lambda: nn.Linear(3, 3), {"scale": 0.1}, ValueError, "scale is 0.1, but initial is"),
        (
            lambda: nn.Linear(3, 3),
            {"initial": "orthogonal", "scale": [1.0]},
            dln.ShapeError,
            "scale .* has 1 values",
        ),
        (lambda: nn.Linear(3, 3), {"initial": "orthogonal", "seed": -1}, ValueError, "seed is -1"),
        (with_nan, {}, ValueError, r"weight matrix 'weight' has a value that is not finite: nan at \(1, 0\)"),
        (lambda: nn.ReLU(), {}, ValueError, "none of the model's weight matrices"),
        (lambda: nn.ConvTranspose2d(3, 3, 2), {}, ValueError, r"\(ConvTranspose2d\) has no linear or conv"),
        (
            lambda: nn.Sequential(nn.Linear(2, 2), nn.Bilinear(2, 2, 2)),
            {"layers": "1"},
            TypeError,
            "layers: '1' is of a Bilinear",
        ),
        (tied, {}, ValueError, "'layers.0.linear' is shared with 'layers.1.linear'"),
        (lambda: np.eye(3), {}, TypeError, "module is ndarray"),
        (
            lambda: dt.overparameterize(nn.Linear(3, 3)),
            {},
            ValueError,
            "weight matrix 'weight' is a product of factors already",
        ),
        (
            lambda: nn.Sequential(dt.overparameterize(nn.Linear(3, 3)), nn.Linear(3, 3)),
            {"layers": ["1", "0"]},
            ValueError,
            "weight matrix '0' is a product of factors already",
        ),
        (
            lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
            {},
            ValueError,
            "has another parametrization",
        ),
    ],
)
def test_invalid_arguments_leave_the_model_unchanged(make, options, error, text):
    module = make()
    before = copy.deepcopy(module.state_dict()) if isinstance(module, nn.Module) else {}
    with pytest.raises(error, match=text):
        dt.overparameterize(module, **options)
    if before:
        after = module.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key].nan_to_num(7.0), before[key].nan_to_num(7.0)) for key in before)


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(2, 2), lambda: parametrizations.weight_norm(nn.Linear(2, 2))]
)
def test_collapse_without_products_is_an_error(make):
    with pytest.raises(ValueError, match="no weight that is a product of factors"):
        dt.collapse(make())
    with pytest.raises(TypeError, match="module is str"):
        dt.collapse("fc")
