# SPDX-License-Identifier: MIT
"""`balance` of neighbouring layers: equal to the measure of arrays, and conserved by small steps."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import tolerance

torch = pytest.importorskip("torch", reason="PyTorch is optional")
import dlnfast as dln  # noqa: E402
from dlnfast.torch import MLP, VGG, DeepLinear, balance, descend  # noqa: E402


def test_balance_equals_the_measure_of_the_weights_as_arrays():
    model = DeepLinear([5, 7, 3, 2], initial="gaussian", dtype=torch.float64)
    found = balance(model)
    assert list(found) == [("layers.0", "layers.1"), ("layers.1", "layers.2")]
    wanted = dln.measures.balancedness(model.to_weights())
    np.testing.assert_allclose(list(found.values()), wanted, rtol=tolerance(np.float64, 7))


def test_half_precision_and_choices_of_layers_are_supported():
    model = MLP([6, 6, 6, 2], batch_norm=False, initial="orthogonal", scale=0.5)
    exact = balance(model, "layers.*")
    half = balance(model.to(torch.bfloat16), "layers.*")
    assert list(exact) == list(half) == [("layers.0.linear", "layers.1.linear")]
    assert exact["layers.0.linear", "layers.1.linear"] < 1e-6
    # Weights of bfloat16 have three digits.
    assert half["layers.0.linear", "layers.1.linear"] < 6 * 2**-8


def test_descent_changes_balance_by_the_squared_rate_times_the_steps():
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changes = []
    for rate, steps in ((0.02, 50), (0.01, 100)):
        model = DeepLinear([6, 6, 6], initial="gaussian", seed=3, dtype=torch.float64)
        before = next(iter(balance(model).values()))
        descend(
            model, lambda model=model: (model(inputs) - 1).square().mean(), learning_rate=rate, steps=steps
        )
        changes.append(abs(next(iter(balance(model).values())) - before) / before)
    assert changes[0] < 1e-2
    assert changes[1] == pytest.approx(changes[0] / 2, rel=0.2)


def test_layers_that_do_not_follow_each_other_are_refused():
    with pytest.raises(dln.ShapeError, match="wanted layers that follow each other"):
        balance(VGG("vgg11", width=0.1))
    assert len(balance(VGG("vgg11", width=0.1), ["classifier.0.linear", "head"])) == 1
