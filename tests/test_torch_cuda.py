# SPDX-License-Identifier: MIT
"""Runs, tracking and adapters on a CUDA device agree with those on the CPU; skipped without a device."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.interruption import StopTraining, stop_at
from helpers.records import with_record
from tolerances import tolerance

import dlnfast as dln

torch = pytest.importorskip("torch", reason="PyTorch is optional")
if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)

from torch import nn  # noqa: E402

from dlnfast.torch import MLP, DeepLinear, DeepLoRA, Trainer, track  # noqa: E402
from dlnfast.torch._cuda_graphs import capture_passes  # noqa: E402

STEPS = 60


def network(dim, dtype, seed=0):
    return dln.low_rank_recovery(dim, 3, seed=seed), dln.orthogonal([dim] * 4, 0.5, seed, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("dim", [1, 7, 64, 301])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.6, "weight_decay": 1e-3},
        {"record": dln.Record(singular_values=1, every=7, weights_every=20)},
        {"record": dln.Record(singular_values="all", vectors=True, every=20)},
    ],
)
def test_the_device_takes_the_same_steps_as_the_dense_engine(dim, dtype, options):
    problem, weights = network(dim, dtype) if dim > 3 else one_number(dtype)
    defaults = {"learning_rate": 0.5, "steps": STEPS, "record": dln.Record(singular_values=None)}
    options = defaults | options
    wanted = dln.train(problem, weights, engine="dense", **options)
    run = dln.train(problem, weights, engine="torch:cuda", **options)
    assert run.config["device"] == "cuda:0"
    np.testing.assert_array_equal(run.steps, wanted.steps)
    # Products on the device are summed in another order: twice the usual tolerance. The error of a product
    # in TF32 would be 1e-3.
    allowed = 2 * tolerance(dtype, dim, STEPS)
    np.testing.assert_allclose(run.loss, wanted.loss, rtol=0, atol=2 * allowed * wanted.loss[0])
    for step in [*run.states.snapshot_steps.tolist(), -1]:
        for layer in range(1, run.n_layers + 1):
            error = np.linalg.norm(run.weights(layer, step) - wanted.weights(layer, step))
            assert error <= allowed * np.linalg.norm(wanted.weights(layer, 0))
    if options["record"].singular_values:
        for layer in range(1, run.n_layers + 1):
            gap = np.abs(run.singular_values(layer) - wanted.singular_values(layer))
            bound = run.singular_value_errors(layer) + wanted.singular_value_errors(layer)
            assert np.all(gap <= bound + allowed * wanted.singular_values(layer)[:, :1])


def one_number(dtype):
    return dln.Problem(np.full((1, 1), 0.7)), [np.full((1, 1), 0.9, dtype=dtype)] * 2


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_checkpointed_runs_resume_bit_for_bit(momentum, tmp_path):
    problem, weights = network(64, "float64")
    options = {"learning_rate": 0.5, "momentum": momentum, "steps": STEPS, "engine": "torch:cuda"}
    options |= {"record": dln.Record(singular_values=2, every=5)}
    plain = dln.train(problem, weights, **options)
    checkpoint = dln.Checkpoint(tmp_path / "run", every=10, seconds=0)
    with pytest.raises(StopTraining):
        dln.train(problem, weights, **with_record(options, callback=stop_at(30)), checkpoint=checkpoint)
    run = dln.resume(checkpoint.directory)
    np.testing.assert_array_equal(run.loss, plain.loss)
    for one, other in zip(run.all_weights(), plain.all_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_divergence_is_an_error():
    problem, weights = network(20, "float64")
    with pytest.raises(dln.DivergedError, match="the loss is not finite at step") as caught:
        dln.train(problem, weights, engine="torch:cuda", learning_rate=1e6, steps=100)
    with pytest.raises(dln.DivergedError) as wanted:
        dln.train(problem, weights, engine="dense", learning_rate=1e6, steps=100)
    assert caught.value.step == wanted.value.step


def samples(device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator)
    return x.to(device), (x[:, :3].argmax(dim=1)).to(device)


def test_training_and_tracking_agree_with_the_cpu():
    runs, values = [], []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 3)).to(device)
        with track(model, k=3, every=5) as tracked:
            trainer = Trainer(model, learning_rate=0.1, batch_size=50, epochs=5, device=device)
            history = trainer.fit(*samples(device))
        runs.append(tracked.trajectory())
        values.append(history.loss)
        exact = torch.linalg.svdvals(model[0].weight.detach().double()).cpu().numpy()[:3]
        last = runs[-1].singular_values("0")[-1]
        assert np.all(np.abs(last - exact) <= runs[-1].singular_value_errors("0")[-1] + 1e-5)
    np.testing.assert_allclose(values[0], values[1], rtol=1e-3)  # 20 steps in float32 (TF32 is off there)
    np.testing.assert_array_equal(runs[0].steps, runs[1].steps)
    np.testing.assert_allclose(runs[0].singular_values("2"), runs[1].singular_values("2"), rtol=1e-3)


def test_weights_of_deep_linear_are_on_the_device():
    model = DeepLinear([9] * 4, scale=0.5, dtype=torch.float64).to("cuda")
    x = torch.randn(5, 9, dtype=torch.float64)
    product = np.linalg.multi_dot(model.to_weights()[::-1])
    found = model(x.cuda()).detach().cpu().numpy()
    np.testing.assert_allclose(found, x.numpy() @ product.T, atol=tolerance(np.float64, 9, 3))


def test_adapters_can_be_trained_and_merged_on_the_device():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 3)).to("cuda")
    x, y = samples("cuda")
    loss = nn.CrossEntropyLoss()
    adapted = DeepLoRA(model, "0", rank=4, batches=(x, y), loss=lambda net, pair: loss(net(pair[0]), pair[1]))
    optimizer = torch.optim.Adam(adapted.param_groups(1e-2))
    first = loss(model(x), y)
    for _ in range(30):
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
    assert value < first
    before = model(x).detach()
    adapted.merge()
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-4, atol=1e-4)


def test_captured_passes_train_like_uncaptured_ones():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(70, 12, generator=generator).cuda()
    labels = torch.randint(3, (70,), generator=generator).cuda()
    models = [MLP([12, 16, 16, 3], seed=0, device="cuda") for _ in range(2)]
    capture_passes(models[0], inputs[:32])
    found = []
    for model in models:
        history = Trainer(model, learning_rate=0.05, epochs=5, batch_size=32).fit(
            inputs, labels, test=(inputs, labels)
        )
        found.append((history, model.state_dict()))
    np.testing.assert_allclose(found[0][0].loss, found[1][0].loss, rtol=tolerance("float32", 16, 15))
    for name, tensor in found[0][1].items():
        np.testing.assert_allclose(
            tensor.cpu(), found[1][1][name].cpu(), rtol=1e-3, atol=tolerance("float32", 16, 15)
        )


def test_images_of_figures_are_on_the_device(tmp_path):
    from dlnfast.figures import _images, role_of_depth

    rows = np.zeros((10, 3073), dtype=np.uint8)
    rows[:, 0] = np.arange(10)
    (tmp_path / "cifar-10-batches-bin").mkdir()
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        (tmp_path / "cifar-10-batches-bin" / f"{name}.bin").write_bytes(rows.tobytes())
    settings = role_of_depth.Settings(device="cuda", data=str(tmp_path))
    data = _images.read_images(settings, "cifar10")
    assert all(tensor.is_cuda for tensor in (*data.train, *data.test))
