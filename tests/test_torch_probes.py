# SPDX-License-Identifier: MIT
"""Linear probes compared with NumPy's least squares, scikit-learn's ridge, and separable data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

torch = pytest.importorskip("torch", reason="PyTorch is optional")

from dlnfast._support.errors import DivergedError, ShapeError  # noqa: E402
from dlnfast.torch import ClassStatistics, RidgeProbes, SGDProbes  # noqa: E402


def draw_features(n_samples, dim, n_classes, seed, dtype=torch.float64, offset=1.0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n_samples, dim, generator=generator, dtype=torch.float64) + offset
    labels = torch.cat(
        [torch.arange(n_classes), torch.randint(0, n_classes, (n_samples - n_classes,), generator=generator)]
    )
    return features.to(dtype), labels


def batched(features, labels, size=16):
    return [
        ({"x": rows}, which) for rows, which in zip(features.split(size), labels.split(size), strict=True)
    ]


def one_hot(labels, n_classes):
    return np.eye(n_classes)[labels.numpy()]


def brute_ridge(features, labels, n_classes, ridge, standardise):
    """Solve the stacked least squares of the definition; return weights (d, K) and intercept."""
    x, y = features.double().numpy(), one_hot(labels, n_classes)
    centred = x - x.mean(axis=0)
    spread = centred.std(axis=0)
    factors = np.where(spread > 0, 1 / np.where(spread > 0, spread, 1), 0) if standardise else 1.0
    scaled = centred * factors
    penalty = ridge * np.sum(scaled**2) / x.shape[1]
    stacked = np.vstack([scaled, math.sqrt(penalty) * np.eye(x.shape[1])])
    targets = np.vstack([y - y.mean(axis=0), np.zeros((x.shape[1], n_classes))])
    weights = np.linalg.lstsq(stacked, targets, rcond=None)[0] * np.reshape(factors, (-1, 1))
    return weights, y.mean(axis=0) - x.mean(axis=0) @ weights


# ---------------------------------------------------------------------------------------------------- ridge


@settings(deadline=None, max_examples=60)
@given(
    n_samples=st.sampled_from([3, 10, 31, 128]),
    dim=st.sampled_from([1, 2, 13, 30, 40]),
    size=st.sampled_from([1, 7, 128]),
    ridge=st.sampled_from([1e-6, 1e-3, 1.0]),
    standardise=st.booleans(),
    seed=st.integers(0, 100),
)
def test_ridge_agrees_with_its_definition(n_samples, dim, size, ridge, standardise, seed):
    # More features than samples, and fewer.
    features, labels = draw_features(n_samples, dim, 3, seed)
    probes = RidgeProbes(3, ridge=ridge, standardise=standardise).fit(batched(features, labels, size))
    weights, intercept = brute_ridge(features, labels, 3, ridge, standardise)
    # The condition number of the stacked features, and once more for the residual of least squares; random
    # features that are standardised have one of order 1 over the root of the strength.
    bound = 100 * tolerance(np.float64, n_samples + dim) / ridge
    assert np.linalg.norm(probes.weights["x"].numpy().T - weights) <= bound * np.linalg.norm(weights)
    assert np.linalg.norm(probes.intercepts["x"].numpy() - intercept) <= bound * (1 + np.linalg.norm(weights))


@pytest.mark.parametrize(("n_samples", "dim"), [(60, 20), (20, 60)])
def test_ridge_agrees_with_scikit_learn(n_samples, dim):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is optional")
    features, labels = draw_features(n_samples, dim, 4, 0)
    centred = features - features.mean(dim=0)
    for ridge in (1e-3, 0.1):
        probes = RidgeProbes(4, ridge=ridge, standardise=False).fit(batched(features, labels))
        alpha = ridge * float(centred.square().sum()) / dim
        reference = linear_model.Ridge(alpha=alpha).fit(features.numpy(), one_hot(labels, 4))
        # scikit-learn solves the normal equations.
        bound = 10 * tolerance(np.float64, n_samples) / ridge
        np.testing.assert_allclose(probes.weights["x"], reference.coef_, rtol=0, atol=bound)
        np.testing.assert_allclose(probes.intercepts["x"], reference.intercept_, rtol=0, atol=bound)


@pytest.mark.parametrize(("n_samples", "dim"), [(50, 12), (12, 50), (30, 30)])
@pytest.mark.parametrize("standardise", [False, True])
def test_ridge_without_penalty_is_least_squares(n_samples, dim, standardise):
    features, labels = draw_features(n_samples, dim, 3, 1)
    probes = RidgeProbes(3, ridge=0.0, standardise=standardise).fit(batched(features, labels))
    weights, intercept = brute_ridge(features, labels, 3, 0.0, standardise)
    bound = 1e4 * tolerance(np.float64, n_samples)  # the condition number of square random features
    np.testing.assert_allclose(probes.weights["x"], weights.T, rtol=0, atol=bound)
    np.testing.assert_allclose(probes.intercepts["x"], intercept, rtol=0, atol=bound)
    if n_samples <= dim:  # as many unknowns as samples: all labels are fitted exactly
        assert probes.accuracy(batched(features, labels)) == {"x": 1.0}


def test_ridge_is_accurate_for_ill_conditioned_features_in_float32():
    # With singular values down to 1e-5, the normal equations in float32 lose everything at this strength.
    generator = torch.Generator().manual_seed(2)
    left = torch.linalg.qr(torch.randn(400, 30, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64)).Q
    features = ((left * torch.logspace(0, -5, 30, dtype=torch.float64)) @ right).float()
    labels = torch.randint(0, 3, (400,), generator=generator)
    probes = RidgeProbes(3, ridge=1e-8, standardise=False).fit(batched(features, labels))
    weights, _ = brute_ridge(features, labels, 3, 1e-8, False)
    error = np.linalg.norm(probes.weights["x"].numpy().T - weights) / np.linalg.norm(weights)
    assert error < 1e4 * tolerance(np.float64, 400)  # the condition number of the stacked features


def test_constant_features_get_weight_zero():
    features, labels = draw_features(50, 4, 2, 3, torch.float32)
    features[:, 1] = 0.1  # has no exact value in any precision
    features[:, 2] = 0.0
    for probes in (RidgeProbes(2), SGDProbes(2, epochs=2)):
        weights = probes.fit(batched(features, labels, 7)).weights["x"]
        assert weights[:, [1, 2]].abs().max() == 0.0
        assert weights[:, [0, 3]].abs().min() > 0.0
    # For constant features the most frequent class is predicted.
    constant, labels = torch.ones(9, 3), torch.tensor([0, 1, 1, 1, 1, 1, 0, 1, 0])
    for probes in (RidgeProbes(2), RidgeProbes(2, ridge=0.0, standardise=False), SGDProbes(2, epochs=5)):
        assert probes.fit(batched(constant, labels)).accuracy(batched(constant, labels)) == {"x": 6 / 9}


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_probes_do_not_depend_on_the_scale(factor):
    features, labels = draw_features(60, 5, 3, 4)
    for make in (RidgeProbes, SGDProbes):
        for standardise in (False, True):
            plain = make(3, standardise=standardise).fit(batched(features, labels)).weights["x"]
            scaled = make(3, standardise=standardise).fit(batched(factor * features, labels)).weights["x"]
            # 1e12 is no power of two, so the steps of descent round differently.
            np.testing.assert_allclose(factor * scaled, plain, rtol=0, atol=1e-9 * float(plain.abs().max()))


def test_probes_can_be_fitted_from_statistics():
    features, labels = draw_features(60, 5, 3, 5)
    batches = batched(features, labels)
    statistics = ClassStatistics(5, 3)
    for rows, which in batches:
        statistics.update(rows["x"], which)
    fitted = RidgeProbes(3).fit(batches)
    taken = RidgeProbes(3).fit_statistics({"layer": statistics})
    assert torch.equal(taken.weights["layer"], fitted.weights["x"])
    with pytest.raises(ValueError, match="statistics of 'layer' have n_classes 3; wanted 4"):
        RidgeProbes(4).fit_statistics({"layer": statistics})
    with pytest.raises(ValueError, match="spectrum is False"):
        RidgeProbes(3).fit_statistics({"layer": ClassStatistics(5, 3, spectrum=False)})


# ------------------------------------------------------------------------------------------------------ SGD


def separable(n_samples, dim, n_classes, seed, dtype=torch.float32):
    """Return samples around distant class means that are not centred."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n_samples) % n_classes
    means = 6 * torch.linalg.qr(torch.randn(dim, n_classes, generator=generator)).Q.T
    features = means[labels] + 0.5 * torch.randn(n_samples, dim, generator=generator) + 3
    return features.to(dtype), labels


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("standardise", [False, True])
def test_sgd_reaches_a_separable_solution(shuffle, standardise):
    features, labels = separable(300, 20, 5, 0)
    probes = SGDProbes(5, epochs=20, shuffle=shuffle, standardise=standardise).fit(
        batched(features, labels, 50)
    )
    assert probes.accuracy(batched(features, labels)) == {"x": 1.0}
    other_features, other_labels = separable(300, 20, 5, 0)
    assert probes.accuracy(batched(other_features + 0.1, other_labels)) == {"x": 1.0}


def test_sgd_reaches_the_minimum_of_the_loss():
    """With weight decay on normalised features the minimum is unique: its gradient vanishes."""
    features, labels = draw_features(64, 3, 3, 6, offset=0.0)
    decay = 0.01
    probes = SGDProbes(
        3, epochs=3000, batch_size=64, learning_rate=2.0, weight_decay=decay, standardise=False
    ).fit(batched(features, labels))
    centred = features - features.mean(dim=0)
    length = float(centred.square().sum(dim=1).mean().sqrt())
    errors = torch.softmax(probes.scores("x", features), dim=1) - torch.from_numpy(one_hot(labels, 3))
    weights = probes.weights["x"] * length
    gradient = errors.T @ (centred / length) / 64 + decay * weights
    assert float(gradient.norm()) < 1e-10 * float(weights.norm())
    assert float(errors.mean(dim=0).norm()) < 1e-10


@settings(deadline=None, max_examples=15)
@given(n_samples=st.integers(4, 40), dim=st.sampled_from([1, 2, 11]), size=st.sampled_from([1, 3, 64]))
def test_sgd_reduces_the_loss_for_any_shape(n_samples, dim, size):
    features, labels = draw_features(n_samples, dim, 3, 7)
    start = math.log(3)
    probes = SGDProbes(3, epochs=10, learning_rate=0.1, batch_size=size).fit(batched(features, labels, 5))
    assert probes.weights["x"].shape == (3, dim)
    loss = float(torch.nn.functional.cross_entropy(probes.scores("x", features), labels))
    assert loss < start + 0.05  # a step of one sample is noisy


def test_sgd_is_repeatable_and_depends_on_the_seed():
    features, labels = draw_features(70, 4, 3, 8, torch.float32)

    def weights(seed, size):
        state = torch.random.get_rng_state()
        fitted = SGDProbes(3, epochs=3, batch_size=16, seed=seed).fit(batched(features, labels, size))
        assert torch.equal(torch.random.get_rng_state(), state)
        return fitted.weights["x"]

    assert torch.equal(weights(1, 16), weights(1, 16))
    assert not torch.equal(weights(1, 16), weights(2, 16))
    # With shuffling, the division into batches affects only the rounding of means.
    assert torch.allclose(weights(1, 16), weights(1, 7), rtol=1e-3)


def test_probes_of_layers_are_independent():
    features, labels = draw_features(70, 4, 3, 9, torch.float32)
    both = [({"a": rows["x"], "b": rows["x"][:, :2]}, which) for rows, which in batched(features, labels)]
    for make in (RidgeProbes, SGDProbes):
        together = make(3).fit(both)
        alone = make(3).fit([({"b": rows["b"]}, which) for rows, which in both])
        assert torch.equal(together.weights["b"], alone.weights["b"])
        assert list(together.accuracy(both)) == ["a", "b"]


def test_half_precision_features_are_supported():
    features, labels = separable(100, 6, 3, 1, torch.bfloat16)
    for make in (RidgeProbes, SGDProbes):
        assert make(3).fit(batched(features, labels)).accuracy(batched(features, labels)) == {"x": 1.0}


# -------------------------------------------------------------------------------------------------- refusals


def test_accuracy_is_the_share_of_correct_predictions():
    probes = RidgeProbes(2, standardise=False)
    probes.weights, probes.intercepts = (
        {"x": torch.tensor([[1.0], [-1.0]]).double()},
        {"x": torch.zeros(2).double()},
    )
    rows = torch.tensor([[2.0], [1.0], [-3.0], [4.0]])
    batches = [({"x": rows}, torch.tensor([0, 1, 1, 0])), ({"x": rows[:1]}, torch.tensor([1]))]
    assert probes.accuracy(batches) == {"x": 3 / 5}


@pytest.mark.parametrize("make", [RidgeProbes, SGDProbes])
def test_probes_refuse_invalid_batches(make):
    features, labels = draw_features(20, 4, 3, 0)
    batches = batched(features, labels)
    with pytest.raises(ValueError, match="n_classes is 1; wanted an integer of at least 2"):
        make(1)
    with pytest.raises(ValueError, match="batches yields no samples"):
        make(3).fit([])
    with pytest.raises(TypeError, match="batches yields features of type Tensor; wanted a dict"):
        make(3).fit([(features, labels)])
    with pytest.raises(ValueError, match=r"layer 'x': labels are 0\.\.2; wanted 0\.\.1"):
        make(2).fit(batches)
    with pytest.raises(ValueError, match="layer 'x': features has a value that is not finite"):
        make(3).fit([({"x": features * math.inf}, labels)])
    with pytest.raises(ShapeError, match=r"layer 'x': features has shape \(2, 2, 2\)"):
        make(3).fit([({"x": torch.ones(2, 2, 2)}, labels[:2])])
    with pytest.raises(ShapeError, match=r"layer 'x': features has shape \(20, 3\); wanted \(B, "):
        make(3).fit([({"x": features}, labels), ({"x": features[:, :3]}, labels)])
    with pytest.raises(ShapeError, match=r"layer 'x': labels has shape \(5,\)"):
        make(3).fit([({"x": features}, labels[:5])])
    with pytest.raises(ValueError, match="no probe was fitted to 'x'; there are none"):
        make(3).accuracy(batches)
    probes = make(3).fit(batches)
    with pytest.raises(ValueError, match="no probe was fitted to 'y'; there are x"):
        probes.accuracy([({"y": features}, labels)])
    with pytest.raises(ShapeError, match=r"features of 'x' has shape \(20, 3\); wanted \(B, 4\)"):
        probes.accuracy([({"x": features[:, :3]}, labels)])
    with pytest.raises(ValueError, match="batches yields no samples"):
        probes.accuracy([])


def test_probes_refuse_invalid_settings():
    with pytest.raises(ValueError, match="ridge is -1; wanted a finite number of at least 0"):
        RidgeProbes(2, ridge=-1.0)
    for name, value in (
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("weight_decay", -1.0),
        ("seed", -1),
    ):
        with pytest.raises(ValueError, match=f"{name} is"):
            SGDProbes(2, **{name: value})
    features, labels = draw_features(20, 4, 3, 0)
    with pytest.raises(TypeError, match="batches is an iterator"):
        SGDProbes(3, shuffle=False).fit(iter(batched(features, labels)))


def test_divergence_is_an_error():
    features, labels = draw_features(20, 4, 3, 0, torch.float32)
    with pytest.raises(DivergedError, match="the probe of 'x' is not finite; lower learning_rate") as caught:
        SGDProbes(3, learning_rate=1e38, weight_decay=1.0).fit(batched(features, labels))
    assert caught.value.layer == 1
