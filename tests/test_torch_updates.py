# SPDX-License-Identifier: MIT
"""Updates of adapters as matrices, and tracking of them."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import tolerance

torch = pytest.importorskip("torch", reason="PyTorch is optional")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

import dlnfast as dln  # noqa: E402
from dlnfast.torch import DeepLoRA, adapter_updates, track, weight_matrices  # noqa: E402
from dlnfast.torch.operators import ProductMatrix  # noqa: E402
from dlnfast.torch.updates import compute_thin_svd  # noqa: E402

sizes = st.sampled_from([1, 2, 3, 7, 13, 40])


def draw(rows, columns, seed, dtype=torch.float64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------------------------- thin products


@settings(max_examples=60, deadline=None)
@given(m=sizes, n=sizes, r=sizes, with_start=st.booleans(), dtype=st.sampled_from(["float32", "float64"]))
def test_a_product_matrix_multiplies_as_the_dense_matrix(m, n, r, with_start, dtype):
    kind = getattr(torch, dtype)
    left, right = draw(m, r, 0, kind), draw(r, n, 1, kind)
    start = (draw(m, 2, 2, kind), draw(2, n, 3, kind)) if with_start else None
    operator = ProductMatrix(left, right, start)
    dense = left.double() @ right.double()
    size = float(left.norm() * right.norm())
    if start is not None:
        dense = dense - start[0].double() @ start[1].double()
        size += float(start[0].norm() * start[1].norm())
    dense = dense.numpy()
    bound = tolerance(dtype, m + n + r) * size
    assert operator.shape == (m, n)
    assert operator.dtype == np.dtype(dtype)
    X, Y = draw(n, 3, 4).numpy(), draw(m, 2, 5).numpy()
    assert np.abs(operator.matmat(X) - dense @ X).max() <= bound * np.abs(X).sum()
    assert np.abs(operator.rmatmat(Y) - dense.T @ Y).max() <= bound * np.abs(Y).sum()
    assert abs(operator.squared_norm() - np.sum(dense**2)) <= tolerance("float64", m + n + r) * size**2


def test_half_precisions_are_read_as_float32():
    operator = ProductMatrix(draw(5, 2, 0).bfloat16(), draw(2, 6, 1).bfloat16())
    assert operator.dtype == np.float32
    assert operator.matmat(np.eye(6)).dtype == np.float32


@settings(max_examples=40, deadline=None)
@given(m=sizes, n=sizes, r=sizes)
def test_the_thin_svd_is_that_of_the_product(m, n, r):
    left, right = draw(m, r, 0), draw(r, n, 1)
    u, s, vt = compute_thin_svd(left, right)
    size = float(left.norm() * right.norm())
    k = min(m, n, r)
    assert s.shape == (k,)
    assert torch.all(s[:-1] >= s[1:])
    bound = tolerance("float64", m + n + r) * size
    assert float((u * s @ vt - left @ right).abs().max()) <= bound
    for frame in (u, vt.T):
        assert float((frame.T @ frame - torch.eye(k, dtype=torch.float64)).abs().max()) <= 1e-12
    np.testing.assert_allclose(s.numpy(), np.linalg.svd((left @ right).numpy())[1][:k], atol=bound)


# ----------------------------------------------------------------------------------------- updates


def adapted(width=150, rank=3, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)).to(dtype)
    return model, DeepLoRA(model, "0", rank=rank, init="random", scale=0.3, **settings)


def test_updates_are_products_of_the_factors():
    model, adapter = adapted()
    (update,) = adapter.updates()
    assert update.name == "0"
    assert update.shape == (150, 150)
    assert update.highest_rank == 3
    assert torch.equal(update.matrix(), adapter.delta_weight("0"))
    np.testing.assert_allclose(update.singular_values(), adapter.singular_values("0"), rtol=1e-12)
    assert weight_matrices(model, adapter.updates())[0].name == "0"


def test_the_update_of_an_embedding_has_one_row_per_feature():
    model = nn.Sequential(nn.Embedding(9, 5))
    adapter = DeepLoRA(model, "0", rank=2, init="random")
    (update,) = adapter.updates()
    assert update.shape == (5, 9)
    assert torch.equal(update.matrix().T, adapter.delta_weight("0"))


@pytest.mark.parametrize("width", [20, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates_can_be_tracked(width, dtype):
    """Up to a side of 128 the update is computed as a matrix; above it is tracked by products."""
    model, adapter = adapted(width, dtype=dtype)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.02)
    x = draw(16, width, 1, dtype)
    exact, changes = [adapter.singular_values("0")], [np.zeros(3)]
    start = adapter.delta_weight("0").double()
    with track(model, adapter.updates(), every=1, vectors=True) as tracked:
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            exact.append(adapter.singular_values("0"))
            moved = adapter.delta_weight("0").double() - start
            changes.append(torch.linalg.svdvals(moved)[:3].numpy())
    run, change = tracked.trajectory(), tracked.trajectory(of="change")
    assert list(run.steps) == [0, 1, 2, 3, 4]
    assert run.layer_names == ["0"]
    assert run.shapes == [(width, width)]
    largest = max(v[0] for v in exact)
    bound = tolerance("float32" if dtype == torch.float32 else "float64", 4 * width) * largest
    for found, wanted in ((run, exact), (change, changes)):
        values = found.singular_values("0").astype(np.float64)
        assert values.shape == (5, 3)
        gap = np.abs(values - np.array(wanted))
        assert np.all(gap <= found.singular_value_errors("0") + bound)
        assert np.all(gap <= 50 * bound)  # and not by large errors
    # The vectors of the last record are those of the update.
    u, s, vt = compute_thin_svd(*adapter.updates()[0].pair())
    left, right = run.singular_vectors("0", "left"), run.singular_vectors("0", "right")
    product = left.astype(np.float64) * s.numpy() @ right.astype(np.float64).T
    assert np.abs(product - (u * s @ vt).numpy()).max() <= 200 * bound


def test_cosines_and_ranks_of_a_tracked_update():
    model, adapter = adapted(150)
    left = draw(150, 3, 7)
    with track(model, adapter.updates(), every=1, change=False, vectors=True) as tracked, torch.no_grad():
        (branch,) = adapter._branches.values()
        branch.left.copy_(torch.linalg.qr(left)[0] * torch.tensor([1.0, 0.1, 1e-5]))
        branch.right.copy_(torch.eye(3, 150, dtype=torch.float64))
        branch.cores.copy_(torch.eye(3, dtype=torch.float64).expand_as(branch.cores))
        tracked.advance()
    run = tracked.trajectory()
    cosines = run.subspace_cosines("0", 2)
    assert set(cosines) == {"minimum", "mean", "maximum", "overlap", "baseline"}
    wanted = dln.measures.subspace_cosine(run.singular_vectors("0", "left", 0)[:, :2], left[:, :2].numpy())
    assert cosines["mean"][0] == pytest.approx(wanted.mean, abs=1e-6)
    assert cosines["minimum"][1] == pytest.approx(1.0)
    assert cosines["baseline"][0] == pytest.approx(2 / 150)
    assert run.ranks(0.5) == {"0": 1}
    assert run.ranks(0.01) == {"0": 2}
    assert run.ranks(1e-6) == {"0": 3}
    assert run.ranks(0.99, step=0) == {"0": 3}
    with pytest.raises(ValueError, match="rank is 4; wanted an integer of at most 3"):
        run.subspace_cosines("0", 4)
    with pytest.raises(ValueError, match="relative_to is 'each'"):
        run.ranks(relative_to="each")


def test_ranks_need_enough_values():
    model = nn.Sequential(nn.Linear(30, 30, bias=False), nn.Linear(30, 30, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([4.0, 3.0] + [0.001] * 28)))
        model[1].weight.mul_(1e-3)
    with track(model, k=2) as tracked:
        pass
    run = tracked.trajectory()
    with pytest.raises(ValueError, match="layer 0 may have more than the 2 recorded singular values above"):
        run.ranks(1e-4)
    assert run.ranks(0.5) == {"0": 2, "1": 0}
    with pytest.raises(ValueError, match="layer 1 may have more"):
        run.ranks(0.5, relative_to="layer")


def test_vectors_are_saved_in_checkpoints_and_files(tmp_path):
    model, adapter = adapted()
    first = track(model, adapter.updates(), every=1, vectors=True)
    state = first.state_dict()
    again = track(model, adapter.updates(), every=1, vectors=True)
    again.load_state_dict(state)
    with torch.no_grad():
        next(adapter.parameters()).mul_(2.0)
    again.advance()
    for of in ("weights", "change"):
        run = again.trajectory(of=of)
        assert run.singular_vectors("0", "left", 0).shape == (150, 3)
        run.save(tmp_path / of)
        loaded = dln.load(tmp_path / of)
        assert np.array_equal(loaded.singular_vectors("0", "left"), run.singular_vectors("0", "left"))
    assert again.trajectory(of="change").singular_values("0")[-1] == pytest.approx(
        adapter.singular_values("0") / 2, rel=1e-9
    )
    other = track(model, adapter.updates())
    with pytest.raises(ValueError, match="state was taken with vectors True; this tracker has False"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="no singular vectors were recorded"):
        other.trajectory().singular_vectors("0")
    with pytest.raises(TypeError, match="vectors is 1; wanted True or False"):
        track(model, vectors=1)


def test_matrices_of_another_model_are_refused():
    model, adapter = adapted()
    other, _ = adapted()
    updates = adapter.updates()
    with pytest.raises(ValueError, match="layers: '0' is no weight of this model"):
        track(other, updates)
    with pytest.raises(ValueError, match="layers holds '0' twice"):
        track(model, [*updates, *updates])
    with pytest.raises(TypeError, match="layers holds a WeightMatrix and str; wanted one kind"):
        track(model, [*updates, "2"])
    both = track(model, [*weight_matrices(model, "2"), *updates], k=2)
    assert both.trajectory().layer_names == ["2", "0"]


# -------------------------------------------------------------------------------------------- PEFT


def test_updates_of_lora_equal_those_of_peft():
    peft = pytest.importorskip("peft", reason="peft is optional")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 8), nn.Conv1d(8, 5, 3))
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1", "2"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    found = {update.name.rpartition(".")[2]: update for update in adapter_updates(wrapped)}
    assert list(found) == ["0", "1", "2"]
    layers = dict(wrapped.named_modules())
    for update in found.values():
        delta = layers[update.name].get_delta_weight("default").detach()
        delta = delta.reshape(delta.shape[0], -1)
        if update.name.endswith("0"):
            delta = delta.T
        assert update.shape == tuple(delta.shape)
        torch.testing.assert_close(update.matrix(), delta)
        assert update.highest_rank == 2
    with pytest.raises(ValueError, match="no LoRA or Deep LoRA layers with an adapter 'other'"):
        adapter_updates(wrapped, "other")
    with pytest.raises(TypeError, match="model is list"):
        adapter_updates([])


def test_updates_of_dora_are_refused():
    peft = pytest.importorskip("peft", reason="peft is optional")
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    wrapped = peft.get_peft_model(nn.Sequential(nn.Linear(6, 6)), config)
    with pytest.raises(ValueError, match=r"the update of layer 'base_model.model.0' is not a product"):
        adapter_updates(wrapped)


def test_updates_of_deep_lora_in_peft():
    pytest.importorskip("peft", reason="peft is optional")
    import peft

    from dlnfast.integrations.peft import DeepLoraConfig

    model = nn.Sequential(nn.Linear(140, 150), nn.ReLU(), nn.Linear(150, 2))
    wrapped = peft.get_peft_model(model, DeepLoraConfig(r=3, init="random", scale=0.4, target_modules=["0"]))
    updates = adapter_updates(wrapped)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    with track(wrapped, updates, every=1, change=False) as tracked:
        wrapped(torch.ones(2, 140)).square().sum().backward()
        optimizer.step()
    assert tracked.step == 1
    delta = dict(wrapped.named_modules())[updates[0].name].get_delta_weight("default").detach()
    exact = torch.linalg.svdvals(delta.double())[:3].numpy()
    np.testing.assert_allclose(tracked.trajectory().singular_values(1)[-1], exact, rtol=1e-4)
