# SPDX-License-Identifier: MIT
"""Features of layers: the model is restored, and statistics of batches equal those of all data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.torch_networks import assert_same_state, copy_state
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

torch = pytest.importorskip("torch", reason="PyTorch is optional")

from torch import nn  # noqa: E402

from dlnfast import measures  # noqa: E402
from dlnfast._support.errors import ShapeError  # noqa: E402
from dlnfast.torch import ClassStatistics, RidgeProbes, SGDProbes, layer_outputs, measure_layers  # noqa: E402

# ------------------------------------------------------------------------------------------ layer outputs


def batches_of(*shape, n_batches=3, seed=0, n_classes=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(*shape, generator=generator, dtype=dtype),
            torch.randint(0, n_classes, (shape[0],), generator=generator),
        )
        for _ in range(n_batches)
    ]


def normalised_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 4),
        nn.BatchNorm1d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(4, 3),
    )


def hooks_of(model):
    return [hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks) if hooks]


def test_features_are_the_outputs_of_the_layers():
    model, batches = normalised_network().eval(), batches_of(7, 5)
    outputs = layer_outputs(model, batches, ["input", "0", "1", "2", "4"])
    assert outputs.names == ("input", "0", "1", "2", "4")
    for _ in range(2):  # it can be iterated again
        for (features, labels), (inputs, wanted) in zip(outputs, batches, strict=True):
            assert tuple(features) == outputs.names
            first = model[0](inputs)
            second = model[1](first)
            assert torch.equal(features["input"], inputs)
            assert torch.equal(features["0"], first)
            assert torch.equal(features["1"], second)  # although the next layer works in place
            assert torch.equal(features["2"], second.clamp(min=0))
            assert torch.equal(features["4"], model(inputs))
            assert torch.equal(labels, wanted)
            assert not features["0"].requires_grad


def test_features_can_be_the_inputs_of_layers():
    model, batches = normalised_network().eval(), batches_of(7, 5)
    [(features, _), *_] = layer_outputs(model, batches, ["2", "4"], of="input")
    second = model[1](model[0](batches[0][0]))
    assert torch.equal(features["2"], second)  # the input before the layer changed it in place
    assert torch.equal(features["4"], second.clamp(min=0))


def test_default_layers_are_those_with_weights():
    assert layer_outputs(normalised_network(), [], None).names == ("0", "4")


def test_the_input_alone_does_not_run_the_model():
    class Refuses(nn.Module):
        def forward(self, inputs):
            raise AssertionError("the model was run")

    batches = batches_of(2, 3, 4)
    [(features, _), *_] = layer_outputs(Refuses(), batches, "input")
    assert torch.equal(features["input"], batches[0][0].reshape(2, 12))


def test_a_module_named_input_takes_precedence():
    model = nn.ModuleDict({"input": nn.Linear(3, 2)})
    model.forward = lambda inputs: model["input"](inputs)
    batches = batches_of(4, 3)
    [(features, _), *_] = layer_outputs(model, batches, "input")
    assert torch.equal(features["input"], model["input"](batches[0][0]).detach())


@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
def test_measuring_restores_the_model(mode):
    model = normalised_network().train()
    model[1].eval()  # frozen, as in fine-tuning
    flags = [module.training for module in model.modules()]
    before = copy_state(model)
    identities = {name: id(buffer) for name, buffer in model.named_buffers()}
    random_state = torch.random.get_rng_state()
    for _ in layer_outputs(model, batches_of(6, 5), None, mode=mode):
        # Between two batches, too.
        assert [module.training for module in model.modules()] == flags
        assert hooks_of(model) == []
    assert_same_state(copy_state(model), before)
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == identities
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_batch_normalisation_uses_the_statistics_of_the_mode():
    model, batches = normalised_network().eval(), batches_of(50, 5)
    model[1].running_mean.fill_(3.0)

    def outputs(mode):
        [(features, _), *_] = layer_outputs(model, batches, "1", mode=mode)
        return features["1"]

    assert torch.allclose(outputs("train").mean(dim=0), torch.zeros(4), atol=1e-6)
    expected = model[1](model[0](batches[0][0])).detach()
    assert torch.equal(outputs("eval"), expected)
    assert torch.equal(outputs("keep"), expected)  # the model is in eval mode
    model.train()
    assert torch.equal(outputs("eval"), expected)
    assert torch.equal(outputs("keep"), outputs("train"))


def test_dropout_is_active_in_train_mode_only():
    model, batches = normalised_network(), batches_of(50, 5)
    [(features, _), *_] = layer_outputs(model, batches, ["2", "3"], mode="eval")
    assert torch.equal(features["2"], features["3"])
    [(dropped, _), *_] = layer_outputs(model, batches, ["2", "3"], mode="train")
    assert not torch.equal(dropped["2"], dropped["3"])


def test_the_train_method_of_a_model_is_called():
    class Merging(nn.Linear):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(5, 3)).train()
    for _ in layer_outputs(model, batches_of(2, 5)):
        pass
    assert model[0].training
    assert not model[0].merged


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_model_is_restored_after_an_error(mode):
    model = normalised_network().train()
    before = copy_state(model)
    with pytest.raises(RuntimeError):
        list(layer_outputs(model, [*batches_of(6, 5, n_batches=1), *batches_of(6, 4)], mode=mode))
    assert hooks_of(model) == []
    assert all(module.training for module in model.modules())
    assert_same_state(copy_state(model), before)


def test_the_model_is_restored_after_an_incomplete_loop():
    model = normalised_network().train()
    iterator = iter(layer_outputs(model, batches_of(6, 5)))
    next(iterator)
    assert hooks_of(model) == []
    assert all(module.training for module in model.modules())


def test_gradients_can_be_computed_afterwards():
    model, batches = normalised_network(), batches_of(6, 5)
    for features, _ in layer_outputs(model, batches):
        assert not features["4"].requires_grad
        assert torch.is_grad_enabled()
    assert model(batches[0][0]).requires_grad


def test_pooling_of_images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 4 * 5, 6))
    batches = batches_of(4, 2, 6, 7)
    maps = model[0](batches[0][0]).detach()
    for pool, expected in (
        ("flatten", maps.reshape(4, -1)),
        ("mean", maps.mean(dim=(2, 3))),
        (lambda values: values.amax(dim=tuple(range(2, values.ndim))) if values.ndim > 2 else values, None),
    ):
        [(features, _), *_] = layer_outputs(model, batches, ["0", "2"], pool=pool)
        assert torch.allclose(features["0"], maps.amax(dim=(2, 3)) if expected is None else expected)
        assert features["2"].shape == (4, 6)


def test_pooling_of_tokens_and_tuples():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    tokens = torch.randn(3, 5, 4)
    whole = nn.ModuleDict({"attention": model})
    whole.forward = lambda query, key, value: whole["attention"](query, key, value)
    batches = [((tokens, tokens, tokens), torch.tensor([0, 1, 1]))]
    [(features, _)] = layer_outputs(whole, batches, "attention", pool="mean")
    with torch.no_grad():
        assert torch.allclose(features["attention"], model.eval()(tokens, tokens, tokens)[0].mean(dim=1))
    [(features, _)] = layer_outputs(
        whole, [({"query": tokens, "key": tokens, "value": tokens}, [0, 1, 1])], "attention"
    )
    assert features["attention"].shape == (3, 20)


def test_the_last_output_of_a_repeated_module_counts():
    model = nn.ModuleDict({"same": nn.Linear(3, 3)})
    model.forward = lambda inputs: model["same"](model["same"](inputs))
    batches = batches_of(4, 3)
    [(features, _), *_] = layer_outputs(model, batches, "same")
    assert torch.equal(features["same"], model(batches[0][0]).detach())


def test_layer_outputs_refuses_invalid_arguments():
    model, batches = normalised_network(), batches_of(6, 5)
    for name, value in (("mode", "test"), ("of", "weight"), ("pool", "max")):
        with pytest.raises(ValueError, match=f"{name} is '{value}'; wanted"):
            layer_outputs(model, batches, **{name: value})
    with pytest.raises(TypeError, match=r"model is function; wanted a torch\.nn\.Module"):
        layer_outputs(lambda x: x, batches, "input")
    with pytest.raises(ValueError, match="'9' fits none of the model's modules"):
        layer_outputs(model, batches, ["input", "9"])

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, inputs):
            return self.used(inputs)

    with pytest.raises(ValueError, match="layers: 'idle' was not called when the model ran"):
        list(layer_outputs(Idle(), batches))

    def outcome(bad_batches, **settings):
        return list(layer_outputs(model, bad_batches, **settings))

    inputs, labels = batches[0]
    with pytest.raises(ValueError, match="batches is empty"):
        outcome([])
    once = iter(batches)
    outcome(once)
    with pytest.raises(ValueError, match="an iterator yields its batches only once"):
        outcome(once)
    with pytest.raises(TypeError, match=r"batches yields Tensor; wanted pairs"):
        outcome([inputs])
    with pytest.raises(TypeError, match=r"batches yields tuple of 3; wanted pairs"):
        outcome([(inputs, labels, labels)])
    with pytest.raises(TypeError, match=r"labels has dtype torch\.float32; wanted integers"):
        outcome([(inputs, labels.float())])
    with pytest.raises(ShapeError, match=r"labels has shape \(6, 1\)"):
        outcome([(inputs, labels[:, None])])
    with pytest.raises(ShapeError, match=r"layer '0' returns features of shape \(6, 4\) for 5 labels"):
        outcome([(inputs, labels[:5])])
    with pytest.raises(ShapeError, match=r"layer '0': pool returns shape \(6,\); wanted \(B, d\)"):
        outcome(batches, pool=lambda values: values[:, 0])
    with pytest.raises(TypeError, match="layer 'input' returns str; wanted a tensor"):
        list(layer_outputs(model, [("text", labels)], "input"))


# --------------------------------------------------------------------------------------- class statistics


def clouds(n_samples, dim, n_classes, spread, seed, dtype=torch.float64, offset=0.0):
    """Return samples around class means of order 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat(
        [torch.arange(n_classes), torch.randint(0, n_classes, (n_samples - n_classes,), generator=generator)]
    )
    means = torch.randn(n_classes, dim, generator=generator, dtype=torch.float64) + offset
    noise = torch.randn(n_samples, dim, generator=generator, dtype=torch.float64)
    order = torch.randperm(n_samples, generator=generator)
    return (means[labels] + spread * noise)[order].to(dtype), labels[order]


def gathered(features, labels, n_classes, batch_size, **settings):
    statistics = ClassStatistics(features.shape[1], n_classes, **settings)
    for rows, which in zip(features.split(batch_size), labels.split(batch_size), strict=True):
        statistics.update(rows, which)
    return statistics


@settings(deadline=None, max_examples=60)
@given(
    n_samples=st.integers(5, 97),
    dim=st.sampled_from([1, 2, 7, 31]),
    n_classes=st.integers(2, 5),
    batch_size=st.sampled_from([1, 2, 13, 97]),
    spread=st.sampled_from([1e-6, 1e-2, 1.0]),
    offset=st.sampled_from([0.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_statistics_of_batches_equal_those_of_all_data(
    n_samples, dim, n_classes, batch_size, spread, offset, dtype, seed
):
    features, labels = clouds(n_samples, dim, n_classes, spread, seed, dtype, offset)
    statistics = gathered(features, labels, n_classes, batch_size, spectrum=False)
    columns = features.double().numpy().T
    # The documented accuracy, for means that are not close to each other.
    expected = measures.feature_compression(columns, labels.numpy())
    assert statistics.compression() == pytest.approx(expected, rel=1e-10)
    assert statistics.discrimination() == pytest.approx(
        measures.feature_discrimination(columns, labels.numpy()),
        rel=1e-10,
        abs=tolerance(np.float64, n_samples),
    )
    assert statistics.n_samples == n_samples
    assert statistics.counts().tolist() == torch.bincount(labels, minlength=n_classes).tolist()
    means = torch.stack([features[labels == k].double().mean(dim=0) for k in range(n_classes)]).numpy()
    np.testing.assert_allclose(statistics.means(), means, rtol=0, atol=1e-13 * (1 + offset))


@pytest.mark.parametrize("batch_size", [1, 7, 64, 500])
def test_compression_of_collapsed_classes(batch_size):
    # C_l of 1e-12: squares of the features agree in their first 12 digits.
    features, labels = clouds(500, 40, 5, 1e-6, 1)
    value = gathered(features, labels, 5, batch_size).compression()
    assert 1e-13 < value < 1e-11
    assert value == pytest.approx(measures.feature_compression(features.numpy().T, labels.numpy()), rel=1e-10)


def test_scatter_is_exact_for_a_large_common_offset():
    # Steps of 2^-40 around 1 are numbers of float64, and their mean and scatter are known.
    step = 2.0**-40
    values = torch.tensor([[1 - step], [1.0], [1 + step], [3.0], [3.0], [3.0]], dtype=torch.float64)
    statistics = gathered(values, torch.tensor([0, 0, 0, 1, 1, 1]), 2, 1)
    # tr Sigma_W = 2 step^2 / 6, tr Sigma_B = 1
    assert statistics.compression() == pytest.approx(step**2 / 3, rel=tolerance(np.float64, 6))


def test_classes_without_samples_are_left_out():
    features, labels = clouds(60, 6, 4, 1.0, 2)
    apart = gathered(features, 2 * labels + 1, 9, 16)
    together = gathered(features, labels, 4, 16)
    assert apart.compression() == together.compression()
    assert apart.discrimination() == together.discrimination()
    assert apart.geometry() == together.geometry()
    assert apart.means()[0].tolist() == [0.0] * 6


def test_classes_can_first_occur_in_later_batches():
    features, labels = clouds(80, 6, 4, 0.3, 3)
    order = torch.argsort(labels)  # one class after the other, as files are sorted
    sorted_value = gathered(features[order], labels[order], 4, 9).compression()
    assert sorted_value == pytest.approx(gathered(features, labels, 4, 80).compression(), rel=1e-12)


def test_statistics_without_variation_or_classes():
    pair = torch.tensor([0, 1])
    one_each = gathered(torch.tensor([[1.0], [2.0]]), pair, 2, 1)
    assert one_each.compression() == 0.0
    equal_means = gathered(torch.tensor([[1.0], [2.0], [2.0], [1.0]]), torch.tensor([0, 0, 1, 1]), 2, 4)
    assert equal_means.compression() == math.inf
    with pytest.raises(ValueError, match="mean of class 0 is that of all classes"):
        equal_means.geometry()
    with pytest.raises(ValueError, match="features are the same for all samples"):
        gathered(torch.ones(2, 3), pair, 2, 1).compression()
    with pytest.raises(ValueError, match="mean of class 0 is zero"):
        gathered(torch.tensor([[0.0], [1.0]]), pair, 2, 1).discrimination()
    for statistics, count in ((gathered(torch.ones(2, 1), pair * 0, 2, 1), 1), (ClassStatistics(3, 2), 0)):
        for measure in (statistics.compression, statistics.discrimination, statistics.geometry):
            with pytest.raises(
                ValueError, match=f"there are samples of {count} classes; wanted at least two"
            ):
                measure()
    assert ClassStatistics(3, 2).counts().tolist() == [0, 0]
    assert ClassStatistics(3, 2).means().shape == (2, 3)
    with pytest.raises(ValueError, match="there are no samples yet; wanted a call of update first"):
        ClassStatistics(3, 2).ranks()
    with pytest.raises(ValueError, match="spectrum is False"):
        gathered(torch.ones(2, 1), pair, 2, 1, spectrum=False).ranks()


def test_update_refuses_invalid_arguments():
    statistics = ClassStatistics(2, 3)
    labels = torch.tensor([0, 2])
    with pytest.raises(ShapeError, match=r"features has shape \(2, 3\); wanted \(B, 2\)"):
        statistics.update(torch.ones(2, 3), labels)
    with pytest.raises(ShapeError, match=r"labels has shape \(2,\); wanted one per sample, \(4,\)"):
        statistics.update(torch.ones(4, 2), labels)
    with pytest.raises(ValueError, match=r"labels are 0\.\.3; wanted 0\.\.2"):
        statistics.update(torch.ones(2, 2), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"labels are -1\.\.0"):
        statistics.update(torch.ones(2, 2), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="features has a value that is not finite"):
        statistics.update(torch.tensor([[1.0, math.nan], [0.0, 1.0]]), labels)
    with pytest.raises(ValueError, match="features has squares that overflow"):
        statistics.update(torch.full((2, 2), 1e200, dtype=torch.float64), labels)
    for dim, classes in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match="wanted an integer of at least 1"):
            ClassStatistics(dim, classes)
    statistics.update(torch.ones(0, 2), torch.zeros(0, dtype=torch.int64))
    assert statistics.n_samples == 0  # nothing of the above has been counted


def test_a_simplex_has_no_deviation():
    simplex = torch.eye(5, dtype=torch.float64) - 1 / 5
    rotated = simplex @ torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q + 7.0
    features, labels = rotated.repeat(4, 1), torch.arange(5).repeat(4)
    geometry = gathered(features, labels, 5, 3).geometry()
    # The offset of 7 costs a digit.
    assert max(geometry) < 10 * tolerance(np.float64, 20)


def test_geometry_of_a_known_example():
    # Centred means (2, 0), (-1, 1), (-1, -1): lengths 2, sqrt 2, sqrt 2; cosines -1/sqrt 2 twice and 0.
    features = torch.tensor([[5.0, 1.0], [2.0, 2.0], [2.0, 0.0]], dtype=torch.float64)
    geometry = gathered(features, torch.arange(3), 3, 3).geometry()
    lengths = np.array([2, math.sqrt(2), math.sqrt(2)])
    deviations = np.array([1 / math.sqrt(2) - 0.5, 1 / math.sqrt(2) - 0.5, 0.5])
    assert geometry.norm_variation == pytest.approx(lengths.std() / lengths.mean(), rel=1e-12)
    assert geometry.mean_deviation == pytest.approx(deviations.mean(), rel=1e-12)
    assert geometry.largest_deviation == pytest.approx(0.5, rel=1e-12)


def graded(n_samples, dim, lowest, seed=0):
    """Return features with singular values 1 .. `lowest`."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(rows, columns):
        return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q

    count = min(n_samples, dim)
    values = torch.logspace(0, math.log10(lowest), count, dtype=torch.float64)
    return (orthonormal(n_samples, count) * values) @ orthonormal(dim, count).T


@settings(deadline=None, max_examples=30)
@given(
    n_samples=st.sampled_from([1, 2, 17, 40, 131]),
    dim=st.sampled_from([1, 3, 23, 64]),
    batch_size=st.sampled_from([1, 19, 131]),
)
def test_small_singular_values_are_accurate(n_samples, dim, batch_size):
    features = graded(n_samples, dim, 1e-12)
    labels = torch.arange(n_samples) % 2
    statistics = gathered(features, labels, 2, batch_size)
    expected = np.linalg.svd(features.numpy(), compute_uv=False)
    found = statistics.singular_values()
    assert found.shape == expected.shape
    assert np.max(np.abs(found - expected)) < tolerance(np.float64, n_samples + dim)


def test_singular_values_after_many_merges():
    # Several times more rows than the buffer of a narrow layer has.
    features = graded(5000, 20, 1e-12, seed=1)
    labels = torch.arange(5000) % 3
    for batch_size in (100, 2500):
        statistics = gathered(features, labels, 3, batch_size)
        expected = np.linalg.svd(features.numpy(), compute_uv=False)
        assert np.max(np.abs(statistics.singular_values() - expected)) < tolerance(np.float64, 5000)
        assert statistics.ranks() == {
            kind: measures.numerical_rank(features.numpy(), kind)
            for kind in ("machine", "nuclear", "threshold")
        }
    # Reading results between batches has no effect.
    statistics = ClassStatistics(20, 3)
    for rows, which in zip(features.split(700), labels.split(700), strict=True):
        statistics.update(rows, which)
        statistics.ranks()
    assert np.max(np.abs(statistics.singular_values() - expected)) < tolerance(np.float64, 5000)


def test_the_machine_rank_depends_on_the_precision():
    features, labels = graded(300, 10, 1e-9), torch.arange(300) % 2
    assert gathered(features, labels, 2, 100).ranks()["machine"] == 10
    single = gathered(features.float(), labels, 2, 100).ranks()
    assert single["machine"] == measures.numerical_rank(features.float().numpy())
    assert 1 < single["machine"] < 10
    half = gathered(features.bfloat16(), labels, 2, 100)
    assert half.ranks()["machine"] == measures.numerical_rank(features.bfloat16().float().numpy())


def test_the_memory_of_statistics_does_not_grow():
    statistics = ClassStatistics(6, 3)
    sizes = set()
    for rows, labels in batches_of(300, 6, n_batches=20):
        statistics.update(rows, labels)
        sizes.add(sum(t.numel() for t in vars(statistics._factor).values() if isinstance(t, torch.Tensor)))
    assert len(sizes) == 1


# ------------------------------------------------------------------------------------------- measure_layers


def labelled_batches(features, labels, size):
    return list(zip(features.split(size), labels.split(size), strict=True))


def test_measure_layers_agrees_with_the_measures_of_all_features():
    torch.manual_seed(1)
    features, labels = clouds(230, 8, 4, 1.0, 4, torch.float32)
    test_features, test_labels = clouds(90, 8, 4, 1.0, 4, torch.float32)
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 4))
    batches = labelled_batches(features, labels, 50)
    found = measure_layers(
        model, batches, ["input", "2", "3"], test_batches=labelled_batches(test_features, test_labels, 31)
    )
    assert [layer.layer for layer in found] == ["input", "2", "3"]
    model.eval()
    with torch.no_grad():
        whole = {"input": features, "2": model[:3](features), "3": model(features)}
        tested = {"input": test_features, "2": model[:3](test_features), "3": model(test_features)}
    for layer in found:
        columns = whole[layer.layer].numpy().T
        # Batches of other sizes are multiplied in another order, in float32.
        bound = 100 * tolerance(np.float32, 12)
        assert layer.compression == pytest.approx(measures.feature_compression(columns, labels), rel=bound)
        assert layer.discrimination == pytest.approx(
            measures.feature_discrimination(columns, labels), rel=bound
        )
        assert layer.dim == len(columns)
        assert layer.n_samples == 230
        for kind in ("nuclear", "threshold", "machine"):
            assert layer.ranks[kind] == measures.numerical_rank(columns, kind)
        probe = RidgeProbes(4).fit([({"x": whole[layer.layer]}, labels)])
        assert layer.probe_train == pytest.approx(
            probe.accuracy([({"x": whole[layer.layer]}, labels)])["x"], abs=0.01
        )
        assert layer.probe_test == pytest.approx(
            probe.accuracy([({"x": tested[layer.layer]}, test_labels)])["x"], abs=0.02
        )


def test_measure_layers_with_and_without_probes():
    torch.manual_seed(0)
    features, labels = clouds(200, 6, 3, 0.05, 5, torch.float32)
    batches = labelled_batches(features, labels, 40)
    model = nn.Linear(6, 4)
    [bare] = measure_layers(model, batches, "input", ranks=False, probe=None)
    assert (bare.ranks, bare.probe_train, bare.probe_test) == (None, None, None)
    assert bare.compression == pytest.approx(
        measures.feature_compression(features.numpy().T, labels), rel=1e-10
    )
    for probe in ("ridge", "sgd", SGDProbes(3, epochs=10, seed=3), RidgeProbes(3, ridge=0.0)):
        [found] = measure_layers(
            model, batches, "input", test_batches=batches[:2], ranks=False, probe=probe, n_classes=3
        )
        assert found.probe_train == found.probe_test == 1.0


def test_measuring_a_training_run_does_not_change_it():
    def trained(measured):
        torch.manual_seed(3)
        model = normalised_network()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for inputs, labels in batches_of(20, 5, n_batches=6):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimiser.step()
            if measured:
                measure_layers(model, batches_of(20, 5, seed=9), mode="train", probe="sgd")
        return copy_state(model)

    measured = trained(True)
    for name, value in trained(False).items():
        assert torch.equal(value, measured[name]), name


def test_measure_layers_refuses_invalid_arguments():
    model, batches = normalised_network(), batches_of(6, 5)
    with pytest.raises(TypeError, match=r"^batches is an iterator"):
        measure_layers(model, iter(batches))
    with pytest.raises(TypeError, match="test_batches is an iterator"):
        measure_layers(model, batches, test_batches=iter(batches))
    with pytest.raises(ValueError, match="probe is 'svm'; wanted 'ridge', 'sgd'"):
        measure_layers(model, batches, probe="svm")
    with pytest.raises(ValueError, match="probe has n_classes 7; wanted 3"):
        measure_layers(model, batches, probe=RidgeProbes(7))
    with pytest.raises(ValueError, match=r"layer '0': labels are \d\.\.2; wanted 0\.\.1"):
        measure_layers(model, batches, n_classes=2)
    with pytest.raises(ValueError, match="labels up to 0 only; wanted at least two classes"):
        measure_layers(model, [(inputs, labels * 0) for inputs, labels in batches])
    with pytest.raises(ValueError, match="layer '0': features has a value that is not finite"):
        measure_layers(model, [(inputs * math.nan, labels) for inputs, labels in batches])
    dead = nn.Sequential(nn.Linear(5, 4), nn.ReLU())
    nn.init.constant_(dead[0].bias, -1e6)
    with pytest.raises(ValueError, match="layer '1': features are the same for all samples"):
        measure_layers(dead, batches, "1")
