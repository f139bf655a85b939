# SPDX-License-Identifier: MIT
"""Merging of adapters: `unmerge` restores the weight bit for bit, or raises an error."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
from helpers.torch_networks import add_adapter, make_two_layers, relative_error
from tolerances import tolerance

torch = pytest.importorskip("torch", reason="PyTorch is optional")

from torch import nn  # noqa: E402

from dlnfast.torch.deep_lora.layers import DeepFactors  # noqa: E402

pytestmark = pytest.mark.usefixtures("fixed_torch_seed")

BOUND = tolerance(np.float32, 12, 8)


def network(dtype=torch.float32):
    return make_two_layers(12, 10, 7, seed=7, dtype=dtype)


adapt = partial(add_adapter, rank=3, scale=0.7)


def copy_weights(model):
    return [layer.weight.detach().clone() for layer in (model[0], model[2])]


def equal(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_merging_rounds_once_and_unmerging_restores_bit_for_bit(dtype):
    model = network(dtype)
    before = copy_weights(model)
    first, second = adapt(model, name="first"), adapt(model, "0", name="second", seed=1)
    first.merge()
    second.merge()
    high = torch.promote_types(dtype, torch.float32)
    wanted = before[0].to(high) + first.delta_weight("0") + second.delta_weight("0")
    assert torch.equal(model[0].weight, wanted.to(dtype))
    once = copy_weights(model)
    first.merge()
    assert equal(copy_weights(model), once)
    first.unmerge()
    assert torch.equal(model[0].weight, (before[0].to(high) + second.delta_weight("0")).to(dtype))
    assert torch.equal(model[2].weight, before[1])
    second.unmerge()
    second.unmerge()
    assert equal(copy_weights(model), before)


def test_unmerging_works_after_the_factors_have_changed():
    model = network()
    before, x = copy_weights(model), torch.randn(4, 12)
    adapter = adapt(model)
    adapter.merge()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(2)
    adapter.unmerge()
    assert equal(copy_weights(model), before)
    # load_state_dict merges the new factors immediately.
    other = adapt(network(), seed=5)
    adapter.merge()
    adapter.load_state_dict(other.state_dict())
    assert relative_error(model(x), other.model(x)) <= BOUND
    adapter.unmerge()
    assert equal(copy_weights(model), before)
    assert torch.equal(model(x), other.model(x))


def test_the_state_dict_of_a_merged_model_is_the_unmerged_one():
    model, x = network(), torch.randn(4, 12)
    adapter = adapt(model)
    unmerged = copy.deepcopy(model.state_dict())
    output = model(x)
    adapter.merge()
    merged = model.state_dict()
    assert list(merged) == list(unmerged)
    assert all(torch.equal(merged[key], unmerged[key]) for key in merged)
    twin = network()
    adapt(twin, seed=9)
    twin.load_state_dict(merged)
    assert torch.equal(twin(x), output)


@pytest.mark.parametrize("part", ["all", "weights", "factors"])
def test_a_state_dict_loaded_into_a_merged_model_is_merged(part):
    x = torch.randn(4, 12)
    source = network()
    with torch.no_grad():
        source[0].weight.mul_(-1)
    adapt(source, seed=9)
    state = source.state_dict()
    model, wanted = network(), network()
    adapter = adapt(model)
    adapt(wanted)
    chosen = {
        key: t for key, t in state.items() if part == "all" or ("deep_lora" in key) == (part == "factors")
    }
    adapter.merge()
    for each in (model, wanted):
        each.load_state_dict(chosen, strict=part == "all")
    assert adapter.merged
    assert relative_error(model(x), wanted(x)) <= BOUND
    adapter.unmerge()
    assert torch.equal(model(x), wanted(x))
    assert equal(copy_weights(model), copy_weights(wanted))


def test_loaded_factors_that_are_not_finite_leave_the_model_unmerged():
    model = network()
    before = copy_weights(model)
    adapter = adapt(model)
    adapter.merge()
    state = {**model.state_dict(), "0.deep_lora.default.left": torch.full((10, 3), torch.nan)}
    with pytest.raises(ValueError, match="adapter 'default' of layer '0' is not finite: see left"):
        model.load_state_dict(state)
    assert torch.equal(model[0].weight, before[0])
    assert torch.isnan(model(torch.randn(2, 12))).all()


def test_other_changes_of_a_merged_weight_raise_an_error():
    model = network()
    adapter, other = adapt(model, freeze=False), adapt(model, "0", name="other", freeze=False)
    adapter.merge()
    optimizer = torch.optim.SGD([model[0].weight], lr=0.1)
    model(torch.randn(4, 12)).square().sum().backward()
    optimizer.step()
    trained = copy_weights(model)
    for call in (adapter.unmerge, other.merge, lambda: adapter.load_state_dict(adapter.state_dict())):
        with pytest.raises(RuntimeError, match="the weight of layer '0' was changed"):
            call()
    with pytest.raises(RuntimeError, match="the weight of layer '0' was changed"), adapter.disabled():
        pass
    with pytest.raises(RuntimeError, match="was changed"):
        adapter.remove()
    assert adapter.merged
    assert equal(copy_weights(model), trained)
    adapter.remove(merge=True)
    assert equal(copy_weights(model), trained)
    other.remove()
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_merged_model_can_be_moved_and_copied():
    model = network()
    before = copy_weights(model)
    adapter = adapt(model)
    adapter.merge()
    twin = copy.deepcopy(adapter)
    twin.unmerge()
    assert equal(copy_weights(twin.model), before)
    assert not equal(copy_weights(model), before)
    model.to(torch.bfloat16)
    assert all(t.dtype == torch.bfloat16 for t in model.state_dict().values())
    adapter.unmerge()
    assert equal(copy_weights(model), [w.to(torch.bfloat16) for w in before])


def test_a_merged_adapter_can_be_disabled():
    model, x = network(), torch.randn(4, 12)
    plain = model(x)
    adapter = adapt(model)
    output = model(x)
    adapter.merge()
    adapter.enabled = False
    assert torch.equal(model(x), plain)
    with adapter.disabled():
        assert torch.equal(model(x), plain)
    assert not adapter.enabled
    adapter.enabled = True
    assert relative_error(model(x), output) <= BOUND
    with adapter.disabled():
        assert torch.equal(model(x), plain)
    adapter.enabled = False
    adapter.remove(merge=True)
    assert relative_error(model(x), output) <= BOUND


# -------------------------------------------------------------------------------- all or nothing


def breaking(kind, adapter):
    with torch.no_grad():
        if kind == "nan":
            adapter._branches["2"].left[0, 0] = torch.nan
        else:
            adapter._branches["2"].left.mul_(1e30)
            adapter._branches["2"].right.mul_(1e30)
    return (
        "adapter 'default' of layer '2' is not finite: see left"
        if kind == "nan"
        else (r"weight of layer '2' with the update of 'default' is not finite in torch\.float32")
    )


@pytest.mark.parametrize("kind", ["nan", "overflow"])
def test_sums_that_are_not_finite_change_no_weight(kind):
    model = network()
    before = copy_weights(model)
    adapter = adapt(model)
    match = breaking(kind, adapter)
    for call in (adapter.merge, lambda: adapter.remove(merge=True)):
        with pytest.raises(ValueError, match=match):
            call()
        assert not adapter.merged
        assert equal(copy_weights(model), before)
        assert adapter.layer_names == ["0", "2"]
    adapter.remove()
    assert equal(copy_weights(model), before)


def test_half_precision_overflows_in_the_sum():
    model = network(torch.float16)
    before = copy_weights(model)
    adapter = adapt(model, "0", scale=100.0)
    assert torch.isfinite(adapter.delta_weight("0")).all()
    with pytest.raises(ValueError, match=r"layer '0' .* is not finite in torch\.float16"):
        adapter.merge()
    assert equal(copy_weights(model), before)


def test_errors_name_factors_that_are_not_finite():
    model = network()
    adapter = adapt(model)
    state = copy.deepcopy(adapter.state_dict())
    match = breaking("nan", adapter)
    assert adapter.singular_values("0").shape == (3,)
    for call in (
        lambda: adapter.singular_values("2"),
        lambda: adapter.compress(1),
        lambda: adapter.compress(tolerance=0.1),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    # No layer was compressed.
    assert torch.equal(adapter.state_dict()["0.right"], state["0.right"])
    with pytest.raises(ValueError, match=r"state: '2\.left' is not finite"):
        adapter.load_state_dict({**state, "2.left": torch.full((7, 3), torch.inf)})
    with pytest.raises(TypeError, match=r"state: '2\.left' is torch\.int64"):
        adapter.load_state_dict({**state, "2.left": torch.ones(7, 3, dtype=torch.int64)})
    assert torch.isnan(adapter.state_dict()["2.left"][0, 0])
    adapter.load_state_dict(state)
    assert adapter.compress(1)["2"].rank == 1


def test_an_interrupt_while_merging_changes_no_weight(monkeypatch):
    model, x = network(), torch.randn(4, 12)
    before = copy_weights(model)
    adapter = adapt(model)
    output = model(x)
    calls = []
    delta_weight = DeepFactors.delta_weight

    def interrupted(branch):
        calls.append(branch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return delta_weight(branch)

    monkeypatch.setattr(DeepFactors, "delta_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapter.merge()
    assert not adapter.merged
    assert equal(copy_weights(model), before)
    assert torch.equal(model(x), output)
    adapter.merge()
    calls[:] = calls[:1]
    other = adapt(model, name="other")
    with pytest.raises(KeyboardInterrupt):
        other.merge()
    assert relative_error(model(x), adapt(copy.deepcopy(model), name="third", scale=1e-6).model(x)) <= BOUND
    adapter.unmerge()
    assert equal(copy_weights(model), before)


def test_invalid_adapter_names_leave_the_model_unchanged():
    model = network()
    for name in ("training", "handles", "merged_weight", "branches", "_modules", "", "a.b"):
        with pytest.raises(ValueError, match="wanted a word without dots"):
            adapt(model, name=name)
        assert all(p.requires_grad for p in model.parameters())
        assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_packed_weights_get_adapters_but_no_merge():
    model = nn.Sequential(nn.Linear(6, 6))
    model[0].weight = nn.Parameter(torch.ones(6, 6).to(torch.float8_e4m3fn), requires_grad=False)
    adapter = adapt(model, "0")
    for call in (adapter.merge, lambda: adapter.remove(merge=True)):
        with pytest.raises(TypeError, match=r"weight of layer '0' is torch\.float8_e4m3fn"):
            call()
    adapter.remove()
