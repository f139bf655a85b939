# SPDX-License-Identifier: MIT
"""Image data sets as tensors, and batches of them."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is optional")
from helpers.data_folder import find_data_folder  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tolerances import tolerance  # noqa: E402

from dlnfast.torch import Batches, load_images  # noqa: E402

# ------------------------------------------------------------------------------------------ images


def small_set(n, shape, seed, low=0, high=256):
    rng = np.random.default_rng(seed)
    return rng.integers(low, high, (n, *shape), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 10


def write_fashion(folder, train, test):
    arrays = dict(zip(("x_train", "y_train", "x_test", "y_test"), (*train, *test), strict=True))
    np.savez(folder / "fashion_mnist_full.npz", **arrays)


def write_cifar(folder, train, test):
    """Write the binary version: a byte for the label, then the pixels."""
    names = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    parts = [*zip(np.array_split(train[0], 5), np.array_split(train[1], 5), strict=True), test]
    for name, (images, labels) in zip(names, parts, strict=True):
        rows = np.concatenate([labels[:, None], images.reshape(len(images), -1)], axis=1)
        rows.astype(np.uint8).tofile(folder / f"{name}.bin")


SETS = {
    # Test images are darker, so that using their own statistics would be detected.
    "fashion-mnist": (write_fashion, (28, 28), (1, 28, 28)),
    "cifar10": (write_cifar, (3, 32, 32), (3, 32, 32)),
}


@pytest.fixture(params=SETS)
def generated(request, tmp_path):
    write, stored, shape = SETS[request.param]
    train, test = small_set(40, stored, 0), small_set(20, stored, 1, high=90)
    write(tmp_path, train, test)
    return request.param, tmp_path, shape, train, test


def channels(images):
    return images.transpose(0, 1).flatten(1).to(torch.float64)


def assert_standardised(data):
    """Every channel of the training images has mean 0 and variance 1."""
    values = channels(data.train.inputs)
    # Single precision: a pixel is off by eps, up to (mean / std) eps where the mean is subtracted.
    slack = tolerance(np.float32, 1) * (1 + max(m / s for m, s in zip(data.mean, data.std, strict=True)))
    assert values.mean(dim=1).abs().max() <= slack
    assert (values.var(dim=1, correction=0) - 1).abs().max() <= slack


def test_training_images_have_mean_0_and_variance_1(generated):
    name, folder, shape, (images, labels), _ = generated
    data = load_images(name, path=folder)
    assert data.train.inputs.shape == (40, *shape)
    assert data.train.inputs.dtype == torch.float32
    assert data.train.inputs.is_contiguous()
    assert data.train.labels.dtype == torch.int64
    assert data.train.labels.tolist() == labels.tolist()
    assert data.n_classes == 10
    assert_standardised(data)
    pixels = images.reshape(-1, *shape).transpose(1, 0, 2, 3).reshape(shape[0], -1) / 255
    np.testing.assert_allclose(data.mean, pixels.mean(axis=1), rtol=tolerance(float, pixels.shape[1]))
    np.testing.assert_allclose(data.std, pixels.std(axis=1), rtol=tolerance(float, pixels.shape[1]))


def test_test_images_use_the_statistics_of_the_training_images(generated):
    name, folder, shape, _, (images, labels) = generated
    data = load_images(name, path=folder)
    assert data.test.labels.tolist() == labels.tolist()
    mean, std = (np.array(x).reshape(-1, 1, 1) for x in (data.mean, data.std))
    wanted = (images.reshape(-1, *shape) / 255 - mean) / std
    np.testing.assert_allclose(data.test.inputs.numpy(), wanted, atol=4 * tolerance(np.float32, 1))
    assert channels(data.test.inputs).mean() < -0.5


def test_statistics_are_those_of_the_chosen_images(generated):
    name, folder, _, (images, _), _ = generated
    data = load_images(name, path=folder, per_class=2, test_per_class=1)
    assert [len(part.labels) for part in (data.train, data.test)] == [20, 10]
    assert torch.bincount(data.train.labels).tolist() == [2] * 10
    assert_standardised(data)
    assert np.mean(data.mean) == pytest.approx(images[:20].mean() / 255, rel=1e-12)


def test_a_channel_without_variance_becomes_zero(tmp_path):
    train, test = small_set(40, (3, 32, 32), 0), small_set(10, (3, 32, 32), 1)
    train[0][:, 1] = 7
    test[0][:, 1] = 7
    write_cifar(tmp_path, train, test)
    data = load_images("cifar10", path=tmp_path)
    assert data.std[1] == 0
    assert not data.train.inputs[:, 1].any()
    assert torch.isfinite(data.test.inputs).all()


def test_errors_for_missing_data_list_the_searched_folders(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"(?s)cifar-10-batches-py.*https://"):
        load_images("cifar10", path=tmp_path)
    monkeypatch.delenv("DLNFAST_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="DLNFAST_DATA"):
        load_images("fashion-mnist")


def test_invalid_arguments_of_load_images_are_refused(generated):
    name, folder, *_ = generated
    with pytest.raises(ValueError, match="name is 'mnist'; wanted one of 'cifar10', 'fashion-mnist'"):
        load_images("mnist")
    with pytest.raises(ValueError, match="per_class is 5, but"):
        load_images(name, path=folder, per_class=5)
    with pytest.raises(ValueError, match="per_class is 0"):
        load_images(name, path=folder, test_per_class=0)


@pytest.mark.parametrize(
    ("name", "file", "mean", "std"),
    [
        # Published values of CIFAR-10: 0.4914, 0.4822, 0.4465 and 0.2470, 0.2435, 0.2616; here after JPEG.
        ("cifar10", "cifar10_jpeg.npz", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("fashion-mnist", "fashion_mnist_full.npz", (0.2860,), (0.3530,)),
    ],
)
def test_real_images_have_known_statistics(name, file, mean, std):
    folder = find_data_folder(file)
    data = load_images(name, path=folder, per_class=300, test_per_class=20)
    assert (len(data.train.inputs), len(data.test.inputs)) == (3000, 200)
    assert_standardised(data)
    # Statistics of 3000 images of 50000 or 60000; the means of images vary by about 0.12.
    np.testing.assert_allclose(data.mean, mean, atol=0.02)
    np.testing.assert_allclose(data.std, std, atol=0.02)
    assert channels(data.test.inputs).mean(dim=1).abs().max() < 0.2


# ----------------------------------------------------------------------------------------- batches


def numbered(n):
    return torch.arange(n)[:, None] * torch.ones(1, 3), torch.arange(n)


@given(
    n=st.integers(1, 40),
    size=st.integers(1, 45),
    shuffle=st.booleans(),
    join=st.booleans(),
    seed=st.integers(0, 9),
)
def test_each_pass_contains_every_sample_once(n, size, shuffle, join, seed):
    batches = Batches(*numbered(n), size, shuffle=shuffle, seed=seed, join_single=join)
    met = list(batches)
    assert len(met) == len(batches)
    for inputs, labels in met:
        assert torch.equal(inputs[:, 0], labels.to(torch.float32))
    order = torch.cat([labels for _, labels in met]).tolist()
    assert sorted(order) == list(range(n))
    if not shuffle:
        assert order == list(range(n))
    sizes = [len(labels) for _, labels in met]
    if join and size > 1 and n > size and n % size == 1:
        assert sizes == [*[size] * (n // size - 1), size + 1]
    else:
        assert sizes == [size] * (n // size) + [n % size] * (n % size > 0)


def order(batches):
    return torch.cat([labels for _, labels in batches]).tolist()


def test_passes_differ_and_are_reproducible():
    batches = Batches(*numbered(50), 7, shuffle=True, seed=3)
    passes = [order(batches) for _ in range(4)]
    assert batches.epoch == 4
    assert len({tuple(p) for p in passes}) == 4
    batches.epoch = 2
    assert [order(batches), order(batches)] == passes[2:]
    again = Batches(*numbered(50), 9, shuffle=True, seed=3)
    assert order(again) == passes[0]  # whatever the batches are
    assert order(Batches(*numbered(50), 7, shuffle=True, seed=4)) != passes[0]
    plain = Batches(*numbered(50), 7)
    assert order(plain) == order(plain) == list(range(50))


def test_shuffling_does_not_use_global_generators():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    order(Batches(*numbered(20), 7, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_are_copied_to_the_device():
    inputs, labels = next(iter(Batches(*numbered(4), 2, device="meta")))
    assert inputs.device.type == labels.device.type == "meta"
    assert next(iter(Batches(*numbered(4), 2))).inputs.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3, 2), torch.zeros(4)), ValueError, "inputs has 3 samples and labels has 4"),
        ((torch.ones(0, 2), torch.zeros(0)), ValueError, "inputs has 0 samples .* at least one"),
        ((np.ones((3, 2)), torch.zeros(3)), TypeError, "inputs is ndarray; wanted a tensor"),
        ((torch.ones(3, 2), [0, 1, 2]), TypeError, "labels is list; wanted a tensor"),
        ((torch.ones(3, 2), torch.tensor(1)), TypeError, "labels is Tensor; wanted a tensor with samples"),
        ((torch.ones(3, 2), torch.zeros(3), 0), ValueError, "batch_size is 0"),
        ((torch.ones(3, 2), torch.zeros(3), 1.5), TypeError, "batch_size is 1.5"),
    ],
)
def test_invalid_arguments_of_batches_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Batches(*arguments)
    with pytest.raises(ValueError, match="seed is -1"):
        Batches(torch.ones(3, 2), torch.zeros(3), seed=-1)
