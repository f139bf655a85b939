# SPDX-License-Identifier: MIT
"""PyTorch models: steps of the C++ engine, published sizes, names of features, seeds."""

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

import dlnfast.torch as dt  # noqa: E402

F64 = np.float64
WIDTHS = st.lists(st.sampled_from([1, 2, 3, 5, 8, 13]), min_size=2, max_size=6)
DISTRIBUTIONS = {"orthogonal": dln.orthogonal, "gaussian": dln.gaussian, "uniform": dln.uniform}
#: {family: function that makes a small model from the settings that all families accept}.
FAMILIES = {
    "linear": lambda **settings: dt.DeepLinear([48, 6, 5, 4], **settings),
    "mlp": lambda **settings: dt.MLP([48, 6, 5, 4], bias=True, **settings),
    "hybrid": lambda **settings: dt.HybridMLP(48, 6, 4, n_nonlinear=2, n_linear=2, **settings),
    "vgg": lambda **settings: dt.VGG("vgg11", 4, width=0.07, **settings),
    "vit": lambda **settings: dt.ViT(dim=8, depth=2, n_heads=2, patch_size=16, n_classes=4, **settings),
}
INPUTS = {"linear": (48,), "mlp": (3, 4, 4), "hybrid": (3, 4, 4), "vgg": (3, 32, 32), "vit": (3, 32, 32)}

families = pytest.mark.parametrize("family", FAMILIES)


def count(model):
    return sum(p.numel() for p in model.parameters())


def batch(family, n_samples=3, dtype=torch.float32):
    return torch.randn(n_samples, *INPUTS[family], generator=torch.Generator().manual_seed(0), dtype=dtype)


def outputs_of(model, names, x):
    """Return the outputs of the named modules and of the model for x."""
    found = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: found.__setitem__(name, out.detach()))
        for name, module in dt.select_modules(model, names).items()
    ]
    result = model(x)
    for handle in handles:
        handle.remove()
    return found, result


# Deep linear networks.


@settings(max_examples=30, deadline=None)
@given(
    widths=WIDTHS,
    n_samples=st.sampled_from([1, 4, 17]),
    reduction=st.sampled_from(["mean", "sum"]),
    momentum=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.03]),
    seed=st.integers(0, 99),
)
def test_autograd_takes_the_steps_of_the_engine(widths, n_samples, reduction, momentum, weight_decay, seed):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((widths[0], n_samples)) / np.sqrt(n_samples)
    Y = rng.standard_normal((widths[-1], n_samples))
    # Bounded away from zero, because rounding errors of the statistics are relative to |W| |X|.
    Y += np.copysign(1.0, Y)
    problem = dln.Problem.from_data(X, Y, reduction=reduction)
    model = dt.DeepLinear(widths, seed=seed, dtype=torch.float64)
    steps = 12
    run = dln.train(
        problem,
        model.to_weights(),
        learning_rate="auto",
        steps=steps,
        momentum=momentum,
        weight_decay=weight_decay,
        engine="dense",
        record=dln.Record(weights_every=1, singular_values=None),
    )
    rate = run.config["learning_rate"][0]
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=weight_decay)
    x, y = torch.from_numpy(X.T), torch.from_numpy(Y.T)
    for step in range(steps + 1):
        for ours, theirs in zip(run.all_weights(step), model.to_weights(), strict=True):
            assert np.linalg.norm(ours - theirs) <= 1e-12 * np.linalg.norm(ours)
        outputs = model(x)
        loss = problem.loss_scale / 2 * (outputs - y).square().sum()
        # The engine computes the loss from statistics, which cancel for a good fit.
        size = problem.loss_scale / 2 * float((outputs.detach().norm() + y.norm()) ** 2)
        assert float(loss.detach()) == pytest.approx(run.loss[step], abs=1e-12 * size)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@settings(max_examples=25, deadline=None)
@given(widths=WIDTHS, seed=st.integers(0, 99), dtype=st.sampled_from([np.float32, F64]))
def test_weights_can_be_set_and_returned(widths, seed, dtype):
    weights = dln.gaussian(widths, seed=seed, dtype=dtype)
    model = dt.DeepLinear.from_weights(weights)
    assert model.widths == widths
    back = model.to_weights()
    for ours, theirs in zip(weights, back, strict=True):
        assert theirs.dtype == dtype
        assert theirs.flags.c_contiguous
        np.testing.assert_array_equal(ours, theirs)
    x = np.random.default_rng(seed).standard_normal((4, widths[0])).astype(dtype)
    wanted = x.astype(F64) @ dln.reference.end_to_end([w.astype(F64) for w in weights]).T
    size = np.linalg.norm(x) * np.prod([np.linalg.norm(w) for w in weights])
    error = np.linalg.norm(model(torch.from_numpy(x)).detach().numpy() - wanted)
    assert error <= tolerance(dtype, max(widths), len(widths)) * size
    # Changes of the model and of the arrays are independent.
    original = weights[0].copy()
    with torch.no_grad():
        model.layers[0].weight.zero_()
    np.testing.assert_array_equal(back[0], original)
    np.testing.assert_array_equal(weights[0], original)


def test_networks_can_be_made_from_runs_and_tensors():
    problem = dln.low_rank_recovery(8, 2)
    run = dln.train(problem, dln.orthogonal([8] * 3), learning_rate=1.0, steps=3)
    for step in (0, 2, -1):
        model = dt.DeepLinear.from_trajectory(run, step)
        for ours, theirs in zip(run.all_weights(step), model.to_weights(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    again = dt.DeepLinear.from_weights([layer.weight.detach() for layer in model.layers])
    np.testing.assert_array_equal(again.to_weights()[0], model.to_weights()[0])
    with pytest.raises(TypeError, match=r"run is list; wanted a dlnfast\.Trajectory"):
        dt.DeepLinear.from_trajectory(run.all_weights())
    with pytest.raises(dln.ShapeError, match=r"weights\[1\] \(W_2\) has shape"):
        dt.DeepLinear.from_weights([np.eye(3), np.eye(2)])
    with pytest.raises(TypeError, match="one precision for all"):
        dt.DeepLinear.from_weights([np.eye(3), np.eye(3, dtype=np.float32)])


def test_half_precisions_are_returned_as_float32():
    model = dt.DeepLinear([4, 3], dtype=torch.bfloat16)
    (weight,) = model.to_weights()
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight, model.layers[0].weight.detach().float().numpy())


# Multilayer perceptrons.


@settings(max_examples=20, deadline=None)
@given(widths=WIDTHS, data=st.data())
def test_perceptrons_compute_their_formula(widths, data):
    n_hidden = len(widths) - 2
    n_nonlinear = data.draw(st.integers(0, n_hidden))
    batch_norm, bias = data.draw(st.booleans()), data.draw(st.booleans())
    model = dt.MLP(widths, batch_norm=batch_norm, bias=bias, n_nonlinear=n_nonlinear, activation="tanh")
    x = torch.randn(6, widths[0], generator=torch.Generator().manual_seed(1))
    assert model.hidden_layers == [f"layers.{i}" for i in range(n_hidden)]
    names = [*model.hidden_layers, "head"]
    found, result = outputs_of(model, names, x)
    z = x
    for i, name in enumerate(model.hidden_layers):
        linear = model.layers[i].linear
        z = z @ linear.weight.T + (linear.bias if bias else 0.0)
        if i < n_nonlinear:
            if batch_norm:
                z = (z - z.mean(0)) / torch.sqrt(z.var(0, correction=0) + 1e-5)
            z = torch.tanh(z)
        torch.testing.assert_close(found[name], z.detach(), rtol=1e-4, atol=1e-4)
    z = z @ model.head.weight.T + (model.head.bias if bias else 0.0)
    torch.testing.assert_close(result, z, rtol=1e-4, atol=1e-4)


def test_hybrids_have_the_layers_of_the_paper():
    mlp, hybrid = (dt.HybridMLP(3072, 1024, 10, n_nonlinear=n, n_linear=7 - n, device="meta") for n in (7, 3))
    maps = 3072 * 1024 + 6 * 1024**2 + 1024 * 10
    assert count(mlp) == maps + 7 * 2 * 1024
    assert count(hybrid) == maps + 3 * 2 * 1024
    assert [len(layer) for layer in mlp.layers] == [3] * 7
    assert [len(layer) for layer in hybrid.layers] == [3, 3, 3, 1, 1, 1, 1]
    assert isinstance(hybrid, dt.MLP)
    one, two = (
        kind.state_dict()
        for kind in (
            dt.MLP([12, 4, 4, 4, 3], n_nonlinear=2, seed=5),
            dt.HybridMLP(12, 4, 3, n_nonlinear=2, n_linear=1, seed=5),
        )
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_network_of_progressive_collapse_has_the_weights_of_the_linear_one():
    """Without normalisation and biases it has the weights of `dlnfast.orthogonal` only."""
    widths = [50] * 8 + [5]
    model = dt.MLP(widths, batch_norm=False, initial="orthogonal", scale=0.5, dtype=torch.float64)
    assert len(list(model.parameters())) == 8
    weights = dln.orthogonal(widths, 0.5)
    z = np.random.default_rng(0).standard_normal((50, 7))
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        np.testing.assert_array_equal(parameter.detach().numpy(), weight)
    found, result = outputs_of(model, model.hidden_layers, torch.from_numpy(z.T))
    for name, weight in zip(model.hidden_layers, weights[:-1], strict=True):
        z = np.maximum(weight @ z, 0)
        np.testing.assert_allclose(found[name].numpy().T, z, atol=tolerance(F64, 50, 8))
    np.testing.assert_allclose(result.detach().numpy().T, weights[-1] @ z, atol=tolerance(F64, 50, 8))


# VGG.


def vgg_count(convolutions, n_classes, linear, batch_norm):
    """Return the parameters of a chain of 3 x 3 convolutions from 3 channels, and of linear layers."""
    maps = sum(9 * a * b + b for a, b in itertools.pairwise([3, *convolutions]))
    norms = 2 * sum(convolutions) if batch_norm else 0
    return maps + norms + sum(a * b + b for a, b in itertools.pairwise([*linear, n_classes]))


def test_vgg16_for_small_images_has_the_documented_size():
    channels = [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    for batch_norm in (True, False):
        model = dt.VGG("vgg16", batch_norm=batch_norm, device="meta")
        assert count(model) == vgg_count(channels, 10, [512, 512], batch_norm)
    assert count(dt.VGG("vgg16", device="meta")) == 14_990_922
    (matrix,) = dt.weight_matrices(model, "penultimate")
    assert (matrix.name, matrix.shape) == ("classifier.0.linear", (512, 512))


@pytest.mark.parametrize(
    ("name", "published"),
    [("vgg11", 132_863_336), ("vgg13", 133_047_848), ("vgg16", 138_357_544), ("vgg19", 143_667_240)],
)
def test_vgg_has_the_published_numbers_of_parameters(name, published):
    model = dt.VGG(
        name, 1000, batch_norm=False, image_size=224, classifier=(4096, 4096), dropout=0.5, device="meta"
    )
    assert count(model) == published


def test_vgg_features_have_the_documented_names_and_shapes():
    model = dt.VGG("vgg11", 7, width=0.125, in_channels=1, image_size=64, classifier=[9, 6], dropout=0.1)
    x = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    found, result = outputs_of(model, model.hidden_layers, x)
    shapes = {name: tuple(out.shape[1:]) for name, out in found.items()}
    assert shapes == {
        "features.conv1_1": (8, 64, 64),
        "features.conv2_1": (16, 32, 32),
        "features.conv3_1": (32, 16, 16),
        "features.conv3_2": (32, 16, 16),
        "features.conv4_1": (64, 8, 8),
        "features.conv4_2": (64, 8, 8),
        "features.conv5_1": (64, 4, 4),
        "features.conv5_2": (64, 4, 4),
        "classifier.0": (9,),
        "classifier.1": (6,),
    }
    assert all(out.min() == 0 for out in found.values())
    assert result.shape == (2, 7)
    assert model.classifier[0].linear.in_features == 64 * 2 * 2


# Vision transformers.


@pytest.mark.parametrize(
    ("name", "published"), [("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656)]
)
def test_vit_has_the_published_numbers_of_parameters(name, published):
    model = dt.ViT.preset(name, image_size=224, patch_size=16, n_classes=1000, device="meta")
    assert count(model) == published
    mean = dt.ViT.preset(name, image_size=224, patch_size=16, n_classes=1000, pool="mean", device="meta")
    assert count(mean) == published - 2 * model.head.in_features
    assert dt.ViT.preset(name, depth=3, device="meta").hidden_layers == ["blocks.0", "blocks.1", "blocks.2"]


def torch_block(block, dim, n_heads):
    """Return PyTorch's own layer with the weights of a block."""
    layer = nn.TransformerEncoderLayer(
        dim,
        n_heads,
        block.mlp.up.out_features,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=1e-6,
        batch_first=True,
        norm_first=True,
        dtype=torch.float64,
    )
    attention = block.attention
    parts = {
        "self_attn.in_proj_weight": torch.cat(
            [part.weight for part in (attention.q, attention.k, attention.v)]
        ),
        "self_attn.in_proj_bias": torch.cat([part.bias for part in (attention.q, attention.k, attention.v)]),
    }
    for theirs, ours in (
        ("self_attn.out_proj", attention.out),
        ("linear1", block.mlp.up),
        ("linear2", block.mlp.down),
        ("norm1", block.norm1),
        ("norm2", block.norm2),
    ):
        parts[f"{theirs}.weight"], parts[f"{theirs}.bias"] = ours.weight, ours.bias
    layer.load_state_dict(parts)
    return layer


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_vit_equals_pytorchs_transformer_layers(pool):
    model = dt.ViT(
        dim=12, depth=2, n_heads=3, patch_size=8, image_size=24, in_channels=2, pool=pool, dtype=torch.float64
    )
    x = torch.randn(3, 2, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cut = nn.functional.unfold(x, kernel_size=8, stride=8).transpose(1, 2)
    z = cut @ model.patches.weight.reshape(12, -1).T + model.patches.bias
    if pool == "cls":
        z = torch.cat([model.class_token.expand(3, 1, 12), z], dim=1)
    z = z + model.positions
    found, result = outputs_of(model, model.hidden_layers, x)
    for name, block in zip(model.hidden_layers, model.blocks, strict=True):
        z = torch_block(block, 12, 3)(z)
        torch.testing.assert_close(found[name], z.detach(), rtol=1e-12, atol=1e-12)
    z = nn.functional.layer_norm(z, (12,), model.norm.weight, model.norm.bias, 1e-6)
    wanted = model.head(z[:, 0] if pool == "cls" else z.mean(1))
    torch.testing.assert_close(result, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["vgg", "vit"])
def test_dropout_is_active_in_training_only(family):
    model = FAMILIES[family](dropout=0.5)
    x = batch(family)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


# Common behaviour of all models.


@families
@pytest.mark.parametrize("initial", ["torch", *DISTRIBUTIONS])
def test_weights_depend_on_the_seed_only(family, initial):
    state = torch.get_rng_state()
    one = FAMILIES[family](initial=initial, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(11)
    again = FAMILIES[family](initial=initial, seed=3).state_dict()
    other = FAMILIES[family](initial=initial, seed=4).state_dict()
    torch.set_rng_state(state)
    assert all(torch.equal(one[key], again[key]) for key in one)
    matrices = [key for key in one if one[key].ndim >= 2]
    assert not any(torch.equal(one[key], other[key]) for key in matrices)
    wide = FAMILIES[family](initial=initial, seed=3, dtype=torch.float64).state_dict()
    for key in matrices:
        assert wide[key].dtype == torch.float64
        torch.testing.assert_close(wide[key].float(), one[key], rtol=1e-6, atol=0)


@families
@pytest.mark.parametrize("initial", DISTRIBUTIONS)
def test_initial_weights_of_all_distributions_have_the_same_norm(family, initial):
    model = FAMILIES[family](initial=initial, scale=0.3, dtype=torch.float64)
    for matrix in dt.weight_matrices(model):
        wanted = 0.3 * np.sqrt(min(matrix.shape))
        assert float(torch.linalg.norm(matrix.matrix())) == pytest.approx(wanted, rel=1e-12)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


@families
def test_the_scale_multiplies_pytorchs_default_weights(family):
    matrices = dt.weight_matrices(FAMILIES[family](initial="torch"))
    scales = np.arange(1, len(matrices) + 1)
    scaled = dt.weight_matrices(FAMILIES[family](initial="torch", scale=scales))
    for plain, other, scale in zip(matrices, scaled, scales, strict=True):
        assert torch.equal(other.matrix(), plain.matrix() * int(scale))


@families
def test_models_can_be_trained_and_copied(family):
    model = FAMILIES[family](seed=1)
    x, labels = batch(family, 8), torch.arange(8) % 4
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < 0.9 * losses[0]
    twin = copy.deepcopy(model).eval()
    assert torch.equal(twin(x), model.eval()(x))
    fresh = FAMILIES[family](seed=2).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


@families
def test_device_contexts_and_the_default_precision_are_respected(family):
    with torch.device("meta"):
        model = FAMILIES[family](initial="orthogonal")
    assert all(p.is_meta for p in model.parameters())
    assert not any(p.is_meta for p in FAMILIES[family](device="cpu").parameters())
    torch.set_default_dtype(torch.float64)
    try:
        model = FAMILIES[family]()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(p.dtype == torch.float64 for p in model.parameters())


@families
def test_single_samples_work_and_wrong_shapes_are_refused(family):
    model = FAMILIES[family]().eval()
    assert model(batch(family, 1)).shape == (1, 4)
    with pytest.raises(dln.ShapeError, match=r"x has shape \(2, 7, 5, 5\)"):
        model(torch.zeros(2, 7, 5, 5))


# Weight matrices of models.


def test_layers_of_all_families_have_the_documented_names():
    def seen(model, layers=None):
        return {matrix.name: matrix.shape for matrix in dt.weight_matrices(model, layers)}

    assert seen(FAMILIES["linear"]()) == {"layers.0": (6, 48), "layers.1": (5, 6), "layers.2": (4, 5)}
    assert seen(FAMILIES["linear"](), "penultimate") == {"layers.1": (5, 6)}
    assert seen(FAMILIES["mlp"]()) == {"layers.0.linear": (6, 48), "layers.1.linear": (5, 6), "head": (4, 5)}
    assert seen(FAMILIES["mlp"](), "penultimate") == {"layers.1.linear": (5, 6)}
    assert seen(FAMILIES["hybrid"](), "penultimate") == {"layers.3.linear": (6, 6)}
    convolutions = seen(FAMILIES["vgg"](), "features.*.conv")
    assert list(convolutions.items())[:3] == [
        ("features.conv1_1.conv", (4, 27)),
        ("features.conv2_1.conv", (9, 36)),
        ("features.conv3_1.conv", (18, 81)),
    ]
    assert len(convolutions) == 8
    assert seen(FAMILIES["vgg"](), "penultimate") == {"classifier.0.linear": (36, 36)}
    assert seen(FAMILIES["vit"]()) == {
        "patches": (8, 768),
        **{
            f"blocks.{i}.{name}": shape
            for i in range(2)
            for name, shape in {
                **{f"attention.{part}": (8, 8) for part in ("q", "k", "v", "out")},
                "mlp.up": (32, 8),
                "mlp.down": (8, 32),
            }.items()
        },
        "head": (4, 8),
    }
    assert seen(FAMILIES["vit"](), "penultimate") == {"blocks.1.mlp.down": (8, 32)}


def test_tied_weights_are_one_matrix():
    model = dt.MLP([6, 6, 6, 2])
    model.layers[1].linear.weight = model.layers[0].linear.weight
    first, head = dt.weight_matrices(model)
    assert (first.name, first.aliases, head.name) == ("layers.0.linear", ("layers.1.linear",), "head")
    (tied,) = dt.weight_matrices(model, "layers.1.linear")
    assert tied.name == "layers.0.linear"


# Initialisation in place.


@settings(max_examples=25, deadline=None)
@given(
    widths=WIDTHS,
    distribution=st.sampled_from(sorted(DISTRIBUTIONS)),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_initialize_draws_the_numbers_of_the_package(widths, distribution, seed, data):
    dtype = data.draw(st.sampled_from([np.float32, F64]))
    scales = data.draw(st.lists(st.floats(0, 10), min_size=len(widths) - 1, max_size=len(widths) - 1))
    model = dt.DeepLinear(widths, initial="torch", dtype=torch.float64 if dtype == F64 else torch.float32)
    assert dt.initialize_(model, distribution, scales, seed) is model
    for ours, theirs in zip(
        model.to_weights(), DISTRIBUTIONS[distribution](widths, scales, seed, dtype=dtype), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_initialize_supports_layers_of_any_type():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(5, 3),
            "conv": nn.Conv2d(4, 6, 3),
            "last": nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
            "transposed": nn.ConvTranspose2d(6, 4, 2),
            "attention": nn.MultiheadAttention(4, 2),
            "embedding": nn.Embedding(7, 4),
        }
    )
    embedding = model["embedding"].weight.detach().clone()
    dt.orthogonal_(model, 0.5, seed=2)
    matrices = dt.weight_matrices(model)
    assert len(matrices) == 8
    for number, matrix in enumerate(matrices):
        rows, columns = matrix.shape
        widths = [1] * number + [columns, rows]
        wanted = dln.orthogonal(widths, 0.5, seed=2, dtype=np.float32)[-1]
        np.testing.assert_array_equal(matrix.matrix().numpy(), wanted)
    assert model["last"].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model["embedding"].weight, embedding)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))

    before = copy.deepcopy(model.state_dict())
    dt.orthogonal_(model, 2.0, layers=["conv", "attention.k"])
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"conv.weight", "attention.in_proj_weight"}
    joint = "attention.in_proj_weight"
    assert torch.equal(model.state_dict()[joint][:4], before[joint][:4])
    assert torch.equal(model.state_dict()[joint][8:], before[joint][8:])


def test_initialize_refuses_products_and_draws_factors():
    model = nn.Sequential(dt.overparameterize(nn.Linear(4, 4)), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"'0' is computed from other tensors.*'0\.factors\.\*'"):
        dt.orthogonal_(model)
    dt.orthogonal_(model, 0.5, layers="0.factors.*")
    torch.testing.assert_close(model[0].weight @ model[0].weight.T, 0.5**6 * torch.eye(4))


# Invalid arguments.


@families
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"initial": "xavier"},
            ValueError,
            "initial is 'xavier'; wanted one of 'orthogonal', 'gaussian', 'unif",
        ),
        ({"initial": None}, ValueError, "initial is None"),
        ({"scale": -1.0}, ValueError, "scale"),
        ({"scale": [1.0]}, dln.ShapeError, "scale.* has 1 values"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"seed": 0.5}, TypeError, "seed is 0.5"),
    ],
)
def test_errors_name_invalid_arguments_of_all_models(family, options, error, text):
    state = torch.get_rng_state()
    with pytest.raises(error, match=text):
        FAMILIES[family](**options)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: dt.DeepLinear([3]), dln.ShapeError, "widths has 1 entries"),
        (lambda: dt.MLP([3, 0]), ValueError, r"widths\[1\] \(d_1\) is 0"),
        (
            lambda: dt.MLP([3, 3, 2], activation="sine"),
            ValueError,
            "activation is 'sine'; wanted one of 'relu'",
        ),
        (lambda: dt.MLP([3, 3, 2], activation=torch.relu), ValueError, "activation is <built-in"),
        (lambda: dt.MLP([3, 3, 2], n_nonlinear=2), ValueError, "n_nonlinear is 2; .* at most 1"),
        (lambda: dt.HybridMLP(3, 3, 2, n_nonlinear=-1, n_linear=2), ValueError, "n_nonlinear is -1"),
        (lambda: dt.HybridMLP(3, 0, 2, n_nonlinear=0, n_linear=0), ValueError, "width is 0"),
        (lambda: dt.VGG("vgg12"), ValueError, "name is 'vgg12'; wanted one of 'vgg11', 'vgg13'"),
        (lambda: dt.VGG("vgg11", image_size=28), ValueError, "image_size is 28; .* at least 32"),
        (lambda: dt.VGG("vgg11", width=0), ValueError, "width is 0"),
        (lambda: dt.VGG("vgg11", classifier=[0]), ValueError, r"classifier\[0\] is 0"),
        (lambda: dt.VGG("vgg11", dropout=1.0), ValueError, r"dropout is 1; wanted a number in \[0, 1\)"),
        (lambda: dt.ViT.preset("huge"), ValueError, "name is 'huge'; wanted one of 'tiny', 'small', 'base'"),
        (lambda: dt.ViT(dim=8, depth=1, n_heads=3), ValueError, r"n_heads is 3, .* divide dim \(8\)"),
        (lambda: dt.ViT(dim=8, depth=1, n_heads=2, patch_size=5), ValueError, "patch_size is 5, .* divide"),
        (lambda: dt.ViT(dim=8, depth=1, n_heads=2, pool="max"), ValueError, "pool is 'max'"),
        (lambda: dt.ViT(dim=8, depth=0, n_heads=2), ValueError, "depth is 0"),
        (lambda: dt.orthogonal_(3), TypeError, "model is int"),
        (lambda: dt.orthogonal_(nn.Linear(2, 2), [1.0, 1.0]), dln.ShapeError, "scale .* has 2 values"),
        (lambda: dt.initialize_(nn.Linear(2, 2), "torch"), ValueError, "initial is 'torch'"),
    ],
)
def test_errors_name_the_invalid_argument(make, error, text):
    with pytest.raises(error, match=text):
        make()
