from __future__ import annotations

import gzip
import hashlib
import io
import os
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlnfast._errors import ShapeError
from dlnfast.data import load_fashion_mnist, one_hot
from dlnfast.problem import Problem

# ---------------------------------------------------------------------------------------------- one-hot


@settings(deadline=None)
@given(labels=st.lists(st.integers(-3, 12), min_size=1, max_size=30))
def test_one_hot_marks_each_sample_once(labels):
    matrix = one_hot(labels)
    known = sorted(set(labels))
    assert matrix.shape == (len(known), len(labels))
    assert matrix.dtype == np.float64
    assert [[float(label == k) for label in labels] for k in known] == matrix.tolist()


def test_one_hot_keeps_the_order_and_the_gaps_of_given_classes():
    np.testing.assert_array_equal(one_hot(np.array([5, 2], np.uint8), [5, 7, 2]), [[1, 0], [0, 0], [0, 1]])


def test_one_hot_refuses_what_is_not_labels():
    with pytest.raises(TypeError, match="labels has dtype float64; wanted integers"):
        one_hot([0.0, 1.0])
    with pytest.raises(TypeError, match="labels"):
        one_hot(["cat"])
    for bad in ([], [[0, 1]], 3):
        with pytest.raises(ShapeError, match="labels has shape"):
            one_hot(bad)
    with pytest.raises(ValueError, match=r"labels\[2\] is 4; wanted one of classes \[0, 1\]"):
        one_hot([0, 1, 4], range(2))
    with pytest.raises(ValueError, match="twice"):
        one_hot([0], [0, 0])


# ------------------------------------------------------------------------------ loading synthetic copies


def small_set(n_images, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n_images, 28, 28), np.uint8), rng.integers(0, 10, n_images, np.uint8)


TRAIN, TEST = small_set(7, 0), small_set(3, 1)
BOTH = {"train": TRAIN, "test": TEST}


def idx_bytes(array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def write_npz(path):
    arrays = {f"{'xy'[part]}_{split}": pair[part] for split, pair in BOTH.items() for part in (0, 1)}
    np.savez_compressed(path, class_names=np.array(["boot"]), **arrays)


def write_idx(folder, compressed=False):
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, (images, labels) in (("train", TRAIN), ("t10k", TEST)):
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx_bytes(array)
            path = folder / f"{prefix}-{name}-ubyte{'.gz' if compressed else ''}"
            path.write_bytes(gzip.compress(content) if compressed else content)


def assert_is_small_set(path):
    for split, (images, labels) in BOTH.items():
        got_images, got_labels = load_fashion_mnist(path, split)
        assert got_images.dtype == np.uint8
        assert got_labels.dtype == np.int64
        np.testing.assert_array_equal(got_images, images.reshape(len(images), 784))
        np.testing.assert_array_equal(got_labels, labels)


def test_npz_file_or_folder(tmp_path):
    write_npz(tmp_path / "fashion_mnist_full.npz")
    assert_is_small_set(tmp_path)
    assert_is_small_set(str(tmp_path / "fashion_mnist_full.npz"))


def test_environment_variable_is_the_default(tmp_path, monkeypatch):
    write_npz(tmp_path / "fashion_mnist_full.npz")
    monkeypatch.setenv("DLNFAST_DATA", str(tmp_path))
    assert_is_small_set(None)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("folder", ["FashionMNIST/raw", "raw", "."])
def test_idx_folders(tmp_path, folder, compressed):
    write_idx(tmp_path / folder, compressed)
    assert_is_small_set(tmp_path)


def png(image):
    stream = io.BytesIO()
    pytest.importorskip("PIL.Image", reason="Pillow encodes the images").fromarray(image).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


@pytest.mark.parametrize("folder", [".", "fashion_mnist", "data"])
def test_parquet_folders(tmp_path, folder):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads parquet")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow reads parquet")
    (tmp_path / folder).mkdir(exist_ok=True)
    for split, (images, labels) in BOTH.items():
        for part, rows in enumerate((slice(0, 2), slice(2, None))):
            table = {"image": [png(image) for image in images[rows]], "label": labels[rows].astype(np.int64)}
            file = tmp_path / folder / f"{split}-{part:05d}-of-00002.parquet"
            parquet.write_table(pyarrow.table(table), file)
    assert_is_small_set(tmp_path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "train-00000-of-00001.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"train-00000-of-00001.parquet needs pyarrow.*pip install"):
        load_fashion_mnist(tmp_path)


def test_missing_data_names_every_place(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as caught:
        load_fashion_mnist(tmp_path, "test")
    for place in (
        "fashion_mnist_full.npz",
        "t10k-images-idx3-ubyte(.gz)",
        "t10k-labels-idx1-ubyte(.gz)",
        str(tmp_path / "FashionMNIST/raw"),
        str(tmp_path / "raw"),
        str(tmp_path / "fashion_mnist"),
        "test-*.parquet",
    ):
        assert place in str(caught.value)
    monkeypatch.delenv("DLNFAST_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="DLNFAST_DATA is not set"):
        load_fashion_mnist()


def test_split_is_checked(tmp_path):
    with pytest.raises(ValueError, match="split is 'validation'; wanted 'train' or 'test'"):
        load_fashion_mnist(tmp_path, "validation")


IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, b"", "truncated: 0 bytes, shorter than its header of 16"),
        (IMAGES, idx_bytes(TRAIN[0])[:10], "truncated: 10 bytes"),
        (IMAGES, idx_bytes(TRAIN[0])[:-1], r"truncated: 5487 bytes .* says 7 x 28 x 28 = 5488"),
        (IMAGES, idx_bytes(TRAIN[0]) + b"\0", "too long: 5489 bytes"),
        (IMAGES, b"\x89PNG" + bytes(100), "starts with 0x89504e47; wanted 0x00000803"),
        (IMAGES, struct.pack(">BBBB3I", 0, 0, 8, 3, *[2**32 - 1] * 3), "truncated: 0 bytes of values"),
        (IMAGES, idx_bytes(np.zeros((0, 28, 28), np.uint8)), r"images of shape \(0, 28, 28\)"),
        (IMAGES, idx_bytes(np.zeros((7, 32, 32), np.uint8)), r"images of shape \(7, 32, 32\)"),
        (LABELS, idx_bytes(TRAIN[0]), "wanted 0x00000801"),
        (LABELS, idx_bytes(TRAIN[1][:-1]), r"7 images, but labels of shape \(6,\)"),
        (LABELS, idx_bytes(TRAIN[1] + np.uint8(10)), r"labels 1\d..1\d; wanted 0..9"),
    ],
)
def test_damaged_idx_files(tmp_path, name, content, message):
    write_idx(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_fashion_mnist(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:40], lambda b: b"no gzip" + b, lambda b: b[:30] + b"\xff" * 40 + b[70:]]
)
def test_damaged_gzip_files(tmp_path, damage):
    write_idx(tmp_path, compressed=True)
    file = tmp_path / f"{IMAGES}.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"ubyte\.gz is damaged"):
        load_fashion_mnist(tmp_path)


def damaged_npz(kind):
    stream = io.BytesIO()
    if kind == "array":
        np.save(stream, TRAIN[0])
    elif kind == "pickle":
        np.savez(stream, x_train=np.array([None]), y_train=TRAIN[1])
    else:
        np.savez(stream, x_train=TRAIN[0], **({} if kind == "incomplete" else {"y_train": TRAIN[1]}))
    content = stream.getvalue()
    return {"empty": b"", "garbage": b"garbage" * 9, "truncated": content[:-40]}.get(kind, content)


@pytest.mark.parametrize("kind", ["array", "pickle", "incomplete", "empty", "garbage", "truncated"])
def test_damaged_npz_files(tmp_path, kind):
    file = tmp_path / "fashion_mnist_full.npz"
    file.write_bytes(damaged_npz(kind))
    with pytest.raises(ValueError, match=r"fashion_mnist_full\.npz cannot be read .* x_train and y_train"):
        load_fashion_mnist(tmp_path)


# ------------------------------------------------------------------------------------- the real data set


@pytest.fixture(scope="module")
def data_folder():
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("DLNFAST_DATA", default))
    if not (folder / "fashion_mnist_full.npz").is_file():
        pytest.skip(f"no fashion_mnist_full.npz in {folder}; DLNFAST_DATA may name another folder")
    return folder


@pytest.mark.parametrize(
    ("split", "md5"),
    # Digests of the original, uncompressed IDX image files.
    [("train", "f4a8712d7a061bf5bd6d2ca38dc4d50a"), ("test", "8181f5470baa50b63fa0f6fddb340f0a")],
)
def test_fashion_mnist_is_the_original(data_folder, split, md5):
    images, labels = load_fashion_mnist(data_folder, split)
    content = idx_bytes(images.reshape(-1, 28, 28))
    assert hashlib.md5(content).hexdigest() == md5
    assert np.bincount(labels).tolist() == [len(images) // 10] * 10


@pytest.mark.parametrize(("method", "split"), [("zca", "train"), ("pca", "test"), ("cholesky", "test")])
def test_fashion_mnist_whitens(data_folder, record_property, method, split):
    images, labels = load_fashion_mnist(data_folder, split)
    start = time.perf_counter()
    problem = Problem.from_data(images, labels, whiten=method, layout="rows")
    seconds = time.perf_counter() - start
    white = problem.whitening
    for name in ("error", "rank", "condition_number"):
        record_property(name, getattr(white, name))
    record_property("seconds", seconds)
    print(
        f"{method}, {len(images)} images: error {white.error:.1e}, rank {white.rank}, "
        f"condition number {white.condition_number:.2e}, {seconds:.1f} s"
    )
    assert white.rank == 784
    assert 1e8 < white.condition_number < 1e10
    # cond(S)^(1/2) eps = 7e-12 bounds the rounding of T X; over 10,000 samples most of it averages out.
    assert white.error < 1e-12
    assert problem.target.shape == (10, 784)
    assert problem.whitened
    assert problem.loss_scale == 1 / (10 * len(images))


def test_fashion_mnist_least_squares_classifies(data_folder):
    problem = Problem.from_data(*load_fashion_mnist(data_folder), whiten="pca", layout="rows")
    images, labels = load_fashion_mnist(data_folder, "test")
    predicted = problem.classes[np.argmax(problem.least_squares @ problem.transform(images), axis=0)]
    # Linear regression on raw pixels is known to reach about 81 % on this test set.
    assert 0.79 < np.mean(predicted == labels) < 0.83
