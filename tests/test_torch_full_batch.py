# SPDX-License-Identifier: MIT
"""`descend` takes the steps of `train`, and stops at the tolerance."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import tolerance

torch = pytest.importorskip("torch", reason="PyTorch is optional")
import dlnfast as dln  # noqa: E402
from dlnfast.torch import DeepLinear, descend  # noqa: E402

STEPS = 60


@pytest.fixture
def recovery():
    return dln.low_rank_recovery(10, 2, seed=1)


def loss_of(recovery, model):
    target = torch.from_numpy(np.array(recovery.target_factors().dense()))

    def loss():
        product = torch.eye(recovery.dim_in, dtype=torch.float64)
        for weight in model.parameters():
            product = weight @ product
        return recovery.loss_scale / 2 * (product - target).square().sum()

    return loss


def test_linear_networks_take_the_same_steps(recovery):
    weights = dln.orthogonal([10] * 4, 0.5, seed=2)
    run = dln.train(recovery, weights, learning_rate=1.0, steps=STEPS, engine="dense")
    model = DeepLinear.from_weights(weights)
    found = descend(model, loss_of(recovery, model), learning_rate=1.0, steps=STEPS)
    assert found.steps == STEPS
    assert not found.converged
    bound = tolerance(np.float64, 10, STEPS)
    np.testing.assert_allclose(found.loss, run.loss, atol=bound * run.loss[0])
    for found, expected in zip(model.to_weights(), run.all_weights(), strict=True):
        np.testing.assert_allclose(found, expected, atol=bound * np.linalg.norm(expected))


def test_descend_stops_at_the_tolerance(recovery):
    model = DeepLinear([10] * 3, scale=0.5, dtype=torch.float64)
    loss = loss_of(recovery, model)
    level = loss().item() / 2
    found = descend(model, loss, learning_rate=1.0, steps=1000, tolerance=level)
    assert found.converged
    assert found.loss[-1] <= level < found.loss[-2]
    again = descend(model, loss, learning_rate=1.0, steps=1000, tolerance=level)
    assert again.steps == 0
    assert again.loss[0] == found.loss[-1]


def test_frozen_parameters_do_not_change(recovery):
    model = DeepLinear([10] * 3, scale=0.5, dtype=torch.float64)
    first = model.layers[0].weight.requires_grad_(False).clone()
    descend(model, loss_of(recovery, model), learning_rate=1.0, steps=3)
    assert torch.equal(model.layers[0].weight, first)


def test_errors_name_invalid_settings_and_divergence(recovery):
    model = DeepLinear([10] * 3, scale=0.5, dtype=torch.float64)
    loss = loss_of(recovery, model)
    with pytest.raises(dln.DivergedError, match="the loss is not finite at step") as caught:
        descend(model, loss, learning_rate=1e6, steps=100)
    assert caught.value.step > 0
    for keywords, text in (
        ({"learning_rate": -1.0, "steps": 1}, "learning_rate"),
        ({"learning_rate": 1.0, "steps": -1}, "steps is -1"),
        ({"learning_rate": 1.0, "steps": 1, "tolerance": -1.0}, "tolerance is -1"),
    ):
        with pytest.raises(ValueError, match=text):
            descend(model, loss, **keywords)
