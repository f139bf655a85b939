# SPDX-License-Identifier: MIT
"""Layers trained as products of low rank."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tolerances import tolerance  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import dlnfast.torch as dt  # noqa: E402
from dlnfast.torch.low_rank import products  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batch_of(n=40, width=12, n_classes=5, dtype=torch.float64):
    return torch.randn(n, width, dtype=dtype), torch.randint(n_classes, (n,))


def network(activation=nn.Tanh, dtype=torch.float64):
    return nn.Sequential(nn.Linear(12, 10), activation(), nn.Linear(10, 9), activation(), nn.Linear(9, 5)).to(
        dtype
    )


def convolutions(**options):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, **options), nn.Tanh(), nn.Conv2d(8, 6, 3, stride=2), nn.Flatten()
    ).double()


#: Layers, and the shape of their inputs.
LAYERS = {
    "linear": (lambda: nn.Linear(9, 7), (4, 9)),
    "linear without bias": (lambda: nn.Linear(9, 7, bias=False), (2, 3, 9)),
    "linear, one row": (lambda: nn.Linear(9, 7), (9,)),
    "linear, no row": (lambda: nn.Linear(9, 7), (0, 9)),
    "conv1d": (lambda: nn.Conv1d(5, 6, 3, stride=2, padding=1), (2, 5, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 0), dilation=2), (2, 4, 9, 8)),
    "conv2d, same": (lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False), (4, 9, 8)),
    "conv2d, circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (1, 4, 5, 5)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (1, 2, 4, 3, 5)),
}


class TestForward:
    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("rest", ["drop", "freeze", "scale"])
    @pytest.mark.parametrize("depth", [2, 3, 4])
    def test_factors_give_the_outputs_and_gradients_of_their_product(self, kind, rest, depth):
        make, shape = LAYERS[kind]
        layer = make().double()
        plain = copy.deepcopy(layer)
        dt.factorize(nn.Sequential(layer), "0", rank=2, depth=depth, init="random", rest=rest)
        x = torch.randn(shape, dtype=torch.float64)
        output = layer(x)
        weight = layer.weight
        expected = torch.func.functional_call(plain, {"weight": weight}, (x,))
        close = {"rtol": 0, "atol": tolerance(float, 30)}
        torch.testing.assert_close(output, expected, **close)
        cotangent = torch.randn_like(output)
        parameters = list(layer.parametrizations.weight.parameters())
        found = torch.autograd.grad(output, parameters, cotangent)
        wanted = torch.autograd.grad(expected, parameters, cotangent)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance(float, 1000))

    @pytest.mark.parametrize(
        "kind", [kind for kind in LAYERS if "groups" not in kind and "no row" not in kind]
    )
    def test_low_ranks_need_fewer_flops_than_the_weight(self, kind):
        make, _ = LAYERS[kind]
        shape = {"conv1d": (4, 5, 80), "conv3d": (1, 2, 9, 9, 9)}.get(kind, LAYERS[kind][1])
        layer = make()
        x = torch.randn(shape)
        with FlopCounterMode(display=False) as whole:
            layer(x)
        dt.factorize(nn.Sequential(layer), "0", rank=1, init="random", depth=2)
        with FlopCounterMode(display=False) as low:
            layer(x)
        assert 0 < low.get_total_flops() < 0.6 * whole.get_total_flops()

    def test_wide_factors_are_multiplied_for_large_batches_only(self):
        layer = dt.overparameterize(nn.Linear(16, 16), 3)
        for n_rows, flops in ((4, 2 * 3 * 4 * 256), (100, 2 * (2 * 16**3 + 100 * 256))):
            with FlopCounterMode(display=False) as counter:
                layer(torch.randn(n_rows, 16))
            assert counter.get_total_flops() == flops
        with FlopCounterMode(display=False) as counter, nn.utils.parametrize.cached():
            for _ in range(5):
                layer(torch.randn(4, 16))
        assert counter.get_total_flops() == 2 * (2 * 16**3 + 5 * 4 * 256)

    def test_layers_with_a_forward_pass_of_their_own_keep_it(self):
        class Doubled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        layer = Doubled(6, 6)
        dt.factorize(nn.Sequential(layer), "0", rank=2, init="random")
        x = torch.randn(3, 6)
        torch.testing.assert_close(layer(x), 2 * F.linear(x, layer.weight, layer.bias))

    def test_attention_reads_the_product(self):
        attention = nn.MultiheadAttention(8, 2, batch_first=True)
        dt.factorize(attention, "out_proj", rank=2, init="random")
        x = torch.randn(2, 3, 8)
        assert torch.isfinite(attention(x, x, x)[0]).all()
        attention(x, x, x)[0].sum().backward()
        assert attention.out_proj.parametrizations.weight.original0.grad is not None


class TestStarts:
    @pytest.mark.parametrize("n_batches", [1, 3])
    @pytest.mark.parametrize("make", ["mlp", "convolutions", "circular"])
    def test_frames_are_singular_vectors_of_the_gradient(self, n_batches, make):
        if make == "mlp":
            model, names, shape = network(), ["0", "2"], (12,)
        else:
            options = {"padding_mode": "circular"} if make == "circular" else {}
            model, names, shape = convolutions(**options), ["0", "2"], (3, 7, 7)
        batches = [
            (torch.randn(20, *shape, dtype=torch.float64), torch.randint(5, (20,))) for _ in range(n_batches)
        ]
        weights = {name: model.get_submodule(name).weight for name in names}
        total = sum(cross_entropy(model, batch) for batch in batches)
        gradients = dict(zip(names, torch.autograd.grad(total, weights.values()), strict=True))
        norms = {name: float(weight.detach().norm()) for name, weight in weights.items()}
        handle = dt.factorize(model, names, rank=3, batches=batches, loss=cross_entropy, gradient_memory=0)
        for name in names:
            gradient = gradients[name].reshape(len(gradients[name]), -1)
            u, _, vt = torch.linalg.svd(gradient)
            right, core, left = handle.factors(name)
            close = {"rtol": 0, "atol": 1e-5}  # the error of a vector is the root of that of its value
            torch.testing.assert_close((left.T @ u[:, :3]).abs(), torch.eye(3).double(), **close)
            torch.testing.assert_close((right @ vt[:3].T).abs(), torch.eye(3).double(), **close)
            torch.testing.assert_close(
                core @ core.T, norms[name] ** 2 / 3 * torch.eye(3).double(), rtol=1e-12, atol=1e-12
            )
            np.testing.assert_allclose(handle.singular_values(name), norms[name] / math.sqrt(3), rtol=1e-12)

    def test_directions_beyond_the_rank_of_the_gradient_are_random(self):
        model = network()
        x, y = batch_of(2)  # a gradient of rank 2
        handle = dt.factorize(model, "0", rank=5, batches=(x, y), loss=cross_entropy)
        right = handle.factors("0")[0]
        torch.testing.assert_close(right @ right.T, torch.eye(5).double(), rtol=0, atol=1e-12)
        projected = x @ right.T @ right
        torch.testing.assert_close(projected, x, rtol=0, atol=1e-5)

    def test_the_surrogate_holds_the_images_of_the_singular_vectors(self):
        model = network()
        batch = batch_of()
        weight = model[2].weight.detach().clone()
        gradient = torch.autograd.grad(cross_entropy(model, batch), model[2].weight)[0]
        u, _, vt = torch.linalg.svd(gradient)
        handle = dt.factorize(model, "2", rank=4, init="surrogate", batches=batch, loss=cross_entropy)
        right, _, left = handle.factors("2")
        for frame, vectors in (
            (right.T, [vt[:2].T, weight.T @ u[:, :2]]),
            (left, [u[:, :2], weight @ vt[:2].T]),
        ):
            for block in vectors:
                torch.testing.assert_close(frame @ (frame.T @ block), block, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("depth", [2, 3, 5])
    def test_the_start_from_the_weight_is_its_truncation(self, depth):
        model = network()
        u, s, vt = torch.linalg.svd(model[0].weight.detach())
        handle = dt.factorize(model, "0", rank=3, depth=depth, init="weight")
        torch.testing.assert_close(model[0].weight, (u[:, :3] * s[:3]) @ vt[:3], rtol=0, atol=1e-12)
        for one, other in zip(handle.factors("0")[:-1], handle.factors("0")[1:], strict=True):
            torch.testing.assert_close(other.T @ other, one @ one.T, rtol=0, atol=1e-12)  # balanced

    @pytest.mark.parametrize("rest", ["freeze", "scale"])
    @pytest.mark.parametrize("init", ["gradient", "surrogate", "random", "weight"])
    def test_with_the_rest_the_function_does_not_change(self, rest, init):
        model, batch = network(), batch_of()
        before = model(batch[0])
        data = {"batches": batch, "loss": cross_entropy} if init in ("gradient", "surrogate") else {}
        handle = dt.factorize(model, ["0", "2"], rank=2, init=init, rest=rest, **data)
        torch.testing.assert_close(model(batch[0]), before, rtol=0, atol=1e-13)
        assert handle.n_parameters == 2 * (12 + 10 + 10 + 9) + 8 + (2 if rest == "scale" else 0)
        torch.testing.assert_close(handle.collapse()(batch[0]), before, rtol=0, atol=1e-13)

    def test_starts_depend_on_the_seed_and_the_name_only(self):
        def start(seed, layers):
            torch.manual_seed(0)
            return dt.factorize(network(), layers, rank=2, init="random", seed=seed).factors("2")[0]

        assert torch.equal(start(1, ["0", "2"]), start(1, "2"))
        assert not torch.equal(start(1, "2"), start(2, "2"))

    def test_by_default_all_layers_that_get_smaller_are_chosen(self):
        model = nn.Sequential(
            nn.Linear(12, 10), nn.MultiheadAttention(10, 2), nn.Linear(10, 9), nn.Linear(9, 2)
        )
        assert dt.factorize(model, rank=2, init="random").ranks == {"0": 2, "2": 2}
        assert dt.factorize(network(), rank={"0": 3, "2": 1}, init="random").ranks == {"0": 3, "2": 1}


class TestTraining:
    def test_at_full_rank_it_trains_like_overparameterize(self):
        models = [network() for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        dt.overparameterize(models[0], 3, layers=["0", "2"])
        dt.factorize(models[1], ["0", "2"], rank={"0": 10, "2": 9}, init="weight")
        batch = batch_of()
        losses = []
        for model in models:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            for _ in range(50):
                optimizer.zero_grad()
                loss = cross_entropy(model, batch)
                loss.backward()
                optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[1] == pytest.approx(losses[0], rel=1e-10)
        for name in ("0", "2"):
            one, other = (model.get_submodule(name).weight for model in models)
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)

    @pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
    def test_collapse_is_exact(self, dtype, error):
        model, batch = network(dtype=dtype), batch_of(dtype=dtype)
        keys = list(model.state_dict())
        handle = dt.factorize(model, ["0", "2"], rank=3, batches=batch, loss=cross_entropy)
        optimizer = torch.optim.Adam(handle.param_groups(1e-2))
        for _ in range(5):
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            optimizer.step()
        before, weight = model(batch[0]).detach(), model[0].weight.detach().clone()
        assert handle.collapse() is model
        assert torch.equal(model[0].weight, weight)
        assert list(model.state_dict()) == keys
        assert type(model[0]).forward is nn.Linear.forward
        difference = (model(batch[0]).detach() - before).abs().max() / before.abs().max()
        assert float(difference) < error
        with pytest.raises(RuntimeError, match="collapsed"):
            handle.factors("0")
        with pytest.raises(RuntimeError, match="collapsed"):
            handle.param_groups(1e-3)
        assert repr(handle) == "Factorization(collapsed)"

    def test_learning_rates_match_the_steps_on_the_weight(self):
        model = network()
        handle = dt.factorize(model, ["0", "2"], rank=2, depth=4, init="random", rest="scale")
        groups = handle.param_groups(1e-3, outer=0.5, weight_decay=0.1)
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        assert len(rates) == len(list(model.parameters()))
        assert all(group["weight_decay"] == 0.1 for group in groups)
        steps = model[0].parametrizations.weight
        expected = [0.5 * 1e-3 * math.sqrt(120 / 24), 1e-3 * math.sqrt(120 / 4), 1e-3 * math.sqrt(120 / 4)]
        expected.append(0.5 * 1e-3 * math.sqrt(120 / 20))
        for number, rate in enumerate(expected):
            assert rates[id(getattr(steps, f"original{number}"))] == pytest.approx(rate)
        assert rates[id(model[4].weight)] == 1e-3
        assert rates[id(steps[0].rest_scale)] == pytest.approx(
            1e-3 * math.sqrt(120) / float(steps[0].rest.norm())
        )
        flat = handle.param_groups(1e-3, match_updates=False)
        assert [group["lr"] for group in flat] == [1e-3]
        model[4].weight.requires_grad_(False)
        assert sum(len(group["params"]) for group in handle.param_groups(1e-3)) == len(rates) - 1
        with pytest.raises(TypeError, match="lr is set by param_groups"):
            handle.param_groups(1e-3, lr=1.0)

    def test_an_adam_step_moves_factors_as_far_as_the_weight(self):
        model, batch = network(), batch_of()
        handle = dt.factorize(model, "0", rank=2, batches=batch, loss=cross_entropy)
        optimizer = torch.optim.Adam(handle.param_groups(1e-3), eps=1e-16)
        before = handle.factors("0")
        before = [factor.clone() for factor in before]
        cross_entropy(model, batch).backward()
        optimizer.step()
        for old, new in zip(before, handle.factors("0"), strict=True):
            assert float((new - old).norm()) == pytest.approx(1e-3 * math.sqrt(120), rel=1e-3)

    def test_compiled_models_and_autocast_train(self):
        model, batch = network(dtype=torch.float32), batch_of(dtype=torch.float32)
        handle = dt.factorize(model, ["0", "2"], rank=2, batches=batch, loss=cross_entropy)
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(batch[0]), model(batch[0]))
        with torch.autocast("cpu", torch.bfloat16):
            cross_entropy(model, batch).backward()
        gradients = [parameter.grad.clone() for parameter in handle.parameters()]
        model.zero_grad()
        cross_entropy(compiled, batch).backward()
        for low, parameter in zip(gradients, handle.parameters(), strict=True):
            assert float((low - parameter.grad).norm()) < 0.1 * float(parameter.grad.norm())

    def test_models_are_tracked_copied_and_saved(self):
        model, batch = network(), batch_of()
        handle = dt.factorize(model, ["0", "2"], rank=3, batches=batch, loss=cross_entropy)
        optimizer = torch.optim.SGD(handle.param_groups(0.1, match_updates=False), lr=0.1)
        with dt.track(model, ["0", "0.factors.2"], k=3, every=1, change=False) as tracked:
            for _ in range(2):
                optimizer.zero_grad()
                cross_entropy(model, batch).backward()
                optimizer.step()
        run = tracked.trajectory()
        np.testing.assert_allclose(run.singular_values("0")[-1], handle.singular_values("0"), rtol=1e-9)
        replica = copy.deepcopy(model)
        torch.testing.assert_close(replica(batch[0]), model(batch[0]), rtol=0, atol=tolerance(float, 12))
        with torch.no_grad():
            next(iter(replica.parameters())).zero_()
        assert float(next(iter(model.parameters())).detach().abs().sum()) > 0
        other = network()
        dt.factorize(other, ["0", "2"], rank=3, init="random")
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other(batch[0]), model(batch[0]), rtol=0, atol=tolerance(float, 12))

    def test_assigned_weights_are_approximated_at_the_rank_of_the_layer(self):
        model = network()
        handle = dt.factorize(model, "0", rank=3, init="random")
        wanted = torch.randn(10, 12, dtype=torch.float64)
        model[0].weight = wanted
        u, s, vt = torch.linalg.svd(wanted)
        torch.testing.assert_close(model[0].weight, (u[:, :3] * s[:3]) @ vt[:3], rtol=0, atol=1e-12)
        assert handle.ranks == {"0": 3}


class TestTruncation:
    def test_products_are_truncated_with_the_least_error(self):
        model = network()
        handle = dt.factorize(model, ["0", "2"], rank=5, init="weight", depth=3)
        weight = model[0].weight.detach().clone()
        u, s, vt = torch.linalg.svd(weight)
        found = handle.truncate(2)
        torch.testing.assert_close(model[0].weight, (u[:, :2] * s[:2]) @ vt[:2], rtol=0, atol=1e-12)
        assert handle.ranks == {"0": 2, "2": 2}
        assert found["0"].rank == 2
        assert found["0"].error == pytest.approx(float(s[2:].norm()), rel=1e-10)
        assert found["0"].relative_error == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-10)
        assert "12 -> 2 -> 2 -> 10" in repr(model[0])

    def test_a_tolerance_chooses_the_lowest_rank(self):
        model = network()
        handle = dt.factorize(model, ["0", "2"], rank=5, init="weight")
        values = {name: handle.singular_values(name) for name in ("0", "2")}
        found = handle.truncate(tolerance=0.6)
        for name, s in values.items():
            rank = found[name].rank
            assert np.linalg.norm(s[rank:]) <= 0.6 * np.linalg.norm(s) < np.linalg.norm(s[rank - 1 :])

    def test_layers_that_keep_their_rank_keep_their_optimizer_state(self):
        model, batch = network(), batch_of()
        handle = dt.factorize(model, rank={"0": 4, "2": 2}, batches=batch, loss=cross_entropy)
        optimizer = torch.optim.Adam(handle.param_groups(1e-3))
        cross_entropy(model, batch).backward()
        optimizer.step()
        kept = handle.factors("2")
        handle.truncate(2, optimizer=optimizer)
        for one, other in zip(kept, handle.factors("2"), strict=True):
            assert one.data_ptr() == other.data_ptr()
        assert sum(parameter in optimizer.state for parameter in model.parameters()) == 10 - 3
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()

    def test_ranks_fall_while_training(self):
        model, batch = network(), batch_of(100)
        handle = dt.factorize(model, ["0", "2"], rank=8, init="weight")
        optimizer = torch.optim.Adam(handle.param_groups(1e-2))
        hook = handle.truncate_during(optimizer, every=5, tolerance=0.3)
        with dt.track(model, ["0", "2"], k="all", every=5, change=False) as tracked:
            for _ in range(20):
                optimizer.zero_grad()
                cross_entropy(model, batch).backward()
                optimizer.step()
        hook.remove()
        run = tracked.trajectory()
        steps, ranks = handle.rank_history
        assert steps.tolist() == [0, 5, 10, 15, 20]
        assert ranks["0"][0] == 8 > ranks["0"][-1] == handle.ranks["0"]
        assert all(np.all(np.diff(values) <= 0) for values in ranks.values())
        # A tracked trajectory has the ranks, too.
        assert run.steps.tolist() == steps.tolist()
        for name, values in ranks.items():
            found = [run.ranks(1e-10, step=int(step), relative_to="layer")[name] for step in steps]
            assert found == values.tolist()

    def test_states_of_other_ranks_are_loaded(self):
        model, batch = network(), batch_of()
        handle = dt.factorize(model, ["0", "2"], rank=5, init="random", rest="scale")
        handle.truncate(2)
        state = {name: tensor.clone() for name, tensor in handle.state_dict().items()}
        other = network()
        fresh = dt.factorize(other, ["0", "2"], rank=4, init="random", seed=1, rest="scale")
        fresh.load_state_dict(state)
        other.load_state_dict(model.state_dict())
        assert fresh.ranks == handle.ranks
        torch.testing.assert_close(other(batch[0]), model(batch[0]), rtol=0, atol=tolerance(float, 12))

    def test_bad_states_change_nothing(self):
        model = network()
        handle = dt.factorize(model, ["0", "2"], rank=2, init="random")
        state = handle.state_dict()
        before = {name: tensor.clone() for name, tensor in state.items()}
        for change, error in (
            ({"0.factors.1": torch.ones(2, 11).double()}, dln_shape_error()),
            ({"0.factors.2": torch.ones(3, 3).double()}, dln_shape_error()),
            ({"2.factors.3": state["2.factors.3"] * math.nan}, ValueError),
            ({"2.factors.3": torch.ones(9, 2, dtype=torch.int64)}, TypeError),
            ({"extra": torch.ones(1)}, ValueError),
        ):
            with pytest.raises(error, match="state"):
                handle.load_state_dict(state | change)
        for name, tensor in handle.state_dict().items():
            assert torch.equal(tensor, before[name])


def dln_shape_error():
    from dlnfast import ShapeError

    return ShapeError


def relu_network_that_is_off():
    model = network(nn.ReLU)
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
    return model


def network_with(change):
    model = network()
    with torch.no_grad():
        change(model)
    return model


def unused():
    model = network()
    model.add_module("spare", nn.Linear(8, 8).double())
    model.forward = lambda x: nn.Sequential(*list(model.children())[:5])(x)
    return model


def shared():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    model[1].weight = model[0].weight
    return model


def test_shared_weights_are_left_out_of_the_default_choice():
    model = nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 12), nn.Linear(12, 30, bias=False)).double()
    model[2].weight = model[0].weight
    assert dt.factorize(model, rank=2, init="random").layer_names == ["1"]


def test_a_state_is_loaded_with_the_ranks_of_the_factorization():
    model = network()
    factors = dt.factorize(model, rank=4, init="random")
    factors.truncate(tolerance=0.7)
    other = network()
    loaded = dt.factorize(other, rank=factors.ranks, init="random")
    other.load_state_dict(model.state_dict())
    x = batch_of()[0]
    assert loaded.ranks == factors.ranks
    assert torch.equal(other(x), model(x))


def test_an_optimizer_made_before_the_factors_is_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    factors = dt.factorize(model, rank=4, init="random")
    for call in (
        lambda made: factors.truncate(2, optimizer=made),
        lambda made: factors.truncate_during(made, every=1, rank=2),
    ):
        with pytest.raises(ValueError, match="optimizer has none of the factors"):
            call(optimizer)
        with pytest.raises(TypeError, match="optimizer is int"):
            call(3)
    assert set(factors.ranks.values()) == {4}
    assert len(factors.rank_history[0]) == 0
    assert not optimizer._optimizer_step_post_hooks


GRADIENT = {"batches": "default", "loss": cross_entropy}


@pytest.mark.parametrize(
    ("make", "layers", "options", "error", "text"),
    [
        (network, "0", {"rank": 11, "init": "random"}, ValueError, r"rank is 11; wanted at most 10.*'0'"),
        (network, "0", {"rank": 0, "init": "random"}, ValueError, "rank"),
        (network, "0", {"rank": 2.5, "init": "random"}, TypeError, "rank"),
        (network, "0", {"rank": {"0": 2, "7": 1}, "init": "random"}, ValueError, "rank: '7' fits none"),
        (network, "0", {"rank": 2, "depth": 1, "init": "random"}, ValueError, "depth"),
        (network, "0", {"rank": 2, "init": "svd"}, ValueError, "init"),
        (network, "0", {"rank": 2, "init": "random", "rest": "keep"}, ValueError, "rest"),
        (network, "0", {"rank": 2, "init": "weight", "scale": 2.0}, ValueError, "scale is 2.0"),
        (network, "0", {"rank": 2, "init": "random", "scale": 0.0}, ValueError, "scale"),
        (network, "0", {"rank": 2, "init": "random", "batches": 3}, ValueError, "batches and loss are for"),
        (network, ["0", "2"], {"rank": {"0": 2}, "init": "random"}, ValueError, "no entry for layer '2'"),
        (network, "0", {"rank": 2}, ValueError, "batches are needed"),
        (network, "0", {"rank": 2, "batches": "default"}, TypeError, "loss is None, and a batch is tuple"),
        *(
            (network, "0", {"rank": 2, "batches": "default", "loss": loss}, TypeError, "of the model and a")
            for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss, F.cross_entropy, "mean")
        ),
        (network, "1", {"rank": 2, "init": "random"}, ValueError, "'1' fits none"),
        (network, None, {"rank": 9, "init": "random"}, ValueError, "no linear or convolutional layer"),
        (unused, "spare", {"rank": 2, **GRADIENT}, ValueError, "depends on none of the chosen layers"),
        (unused, ["0", "spare"], {"rank": 2, **GRADIENT}, ValueError, "does not depend on layer 'spare'"),
        (relu_network_that_is_off, "0", {"rank": 2, **GRADIENT}, ValueError, "gradient vanishes"),
        (
            lambda: network_with(lambda model: model[0].weight.fill_(math.nan)),
            "0",
            {"rank": 2, "init": "random"},
            ValueError,
            "weight of '0' is not finite",
        ),
        (
            lambda: network_with(lambda model: model[2].weight.zero_()),
            "2",
            {"rank": 2, "init": "random"},
            ValueError,
            "weight of '2' is zero",
        ),
        (
            lambda: network_with(lambda model: model[4].bias.fill_(math.inf)),
            "0",
            {"rank": 2, **GRADIENT},
            ValueError,
            "the loss is",
        ),
        (shared, "0", {"rank": 2, "init": "random"}, ValueError, "shared with '1'"),
        (
            lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))),
            "0",
            {"rank": 2, "init": "random"},
            ValueError,
            "parametrization",
        ),
        (
            lambda: nn.Sequential(nn.Embedding(6, 6)),
            "0",
            {"rank": 2, "init": "random"},
            TypeError,
            "Embedding",
        ),
        (
            lambda: nn.Sequential(nn.Linear(6, 6, device="meta")),
            "0",
            {"rank": 2, "init": "random"},
            ValueError,
            "meta device",
        ),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(make, layers, options, error, text):
    model = make()
    if options.get("batches") == "default":
        options = options | {"batches": batch_of()}
    before = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(error, match=text):
        dt.factorize(model, layers, **options)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, (parameter, _) in before.items())
    assert all(after[name].requires_grad == flag for name, (_, flag) in before.items())
    assert [type(module) for module in model.modules()] == kinds
    assert not any(module._forward_hooks for module in model.modules())


def test_quantised_layers_are_refused():
    model = nn.Sequential(nn.Linear(6, 6))
    model[0].weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="int8"):
        dt.factorize(model, "0", rank=2, init="random")


def test_a_failed_installation_restores_all_layers(monkeypatch):
    model = network()
    before = dict(model.named_parameters())
    original, calls = products.install, []

    def fails_at_the_second(layer, product):
        calls.append(layer)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        original(layer, product)

    monkeypatch.setattr(products, "install", fails_at_the_second)
    with pytest.raises(RuntimeError, match="no memory"):
        dt.factorize(model, ["0", "2"], rank=2, init="random")
    assert all(after is before[name] for name, after in model.named_parameters())
    assert type(model[0]) is nn.Linear or type(model[0]).forward is nn.Linear.forward


def test_data_parallel_training_finds_the_factors(tmp_path):
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, batch = network(), batch_of()
        handle = dt.factorize(model, ["0", "2"], rank=2, batches=batch, loss=cross_entropy)
        parallel = nn.parallel.DistributedDataParallel(model)
        cross_entropy(parallel, batch).backward()
        assert all(parameter.grad is not None for parameter in handle.parameters())
    finally:
        dist.destroy_process_group()
