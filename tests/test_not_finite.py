# SPDX-License-Identifier: MIT
"""NaN and infinity are refused by an error that names them."""

from __future__ import annotations

import numpy as np
import pytest

import dlnfast as dln
from dlnfast import measures

NOT_FINITE = [np.nan, np.inf, -np.inf]


def bad_matrix(value, shape=(4, 3)):
    matrix = np.random.default_rng(0).standard_normal(shape)
    matrix[1, 2] = value
    return matrix


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("kind", [float, np.float32, "tensor", "float16 tensor", "tensor with a gradient"])
def test_a_loss_that_is_not_finite_is_refused_in_any_container(value, kind):
    torch = pytest.importorskip("torch", reason="PyTorch is optional")
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    tracked = dln.torch.track(model, k=1)
    make = {
        "tensor": torch.tensor,
        "float16 tensor": lambda x: torch.tensor(x, dtype=torch.float16),
        "tensor with a gradient": lambda x: torch.tensor(1.0, requires_grad=True) * x,
    }.get(kind, kind)
    with pytest.raises(ValueError, match=r"loss is -?(nan|inf); wanted a finite number"):
        tracked.log_loss(make(value))
    assert len(tracked.trajectory().loss) == 0
    tracked.log_loss(make(2.0))
    assert tracked.trajectory().loss.tolist() == [2.0]
    with pytest.raises(TypeError, match="loss is 'low'; wanted a number"):
        tracked.log_loss("low")


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize(
    "measure",
    [
        measures.stable_rank,
        measures.effective_rank,
        measures.numerical_rank,
        lambda W: measures.schatten_norm(W, 2),
        lambda W: measures.energy_share(W, 1),
        lambda W: measures.feature_compression(W, [0, 0, 1]),
        lambda W: measures.feature_discrimination(W, [0, 0, 1]),
        lambda W: measures.balancedness([W, W.T]),
        lambda W: measures.subspace_angles(W, W),
    ],
)
def test_measures_refuse_values_that_are_not_finite(measure, value):
    with pytest.raises(ValueError, match="not finite"):
        measure(bad_matrix(value))


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("shape", [(4, 3), (160, 150)])
def test_the_tracker_names_the_entry_and_stays_usable(value, shape):
    rng = np.random.default_rng(0)
    good = rng.standard_normal(shape)
    tracker = dln.SVDTracker(2)
    tracker.update(good)
    with pytest.raises(ValueError, match="not finite"):
        tracker.update(bad_matrix(value, shape))
    with pytest.raises(ValueError, match=r"A .*not finite"):
        tracker.update_low_rank(np.full(shape[0], value), np.ones(shape[1]))
    with pytest.raises(ValueError, match="scale is"):
        tracker.update_low_rank(np.ones(shape[0]), np.ones(shape[1]), scale=value)
    record = tracker.update(good)
    assert np.all(np.abs(record.singular_values - np.linalg.svd(good)[1][:2]) <= record.errors)
