# SPDX-License-Identifier: MIT
"""Data sets from local files, one-hot targets, whitening."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import sys
import time

import numpy as np
import pytest
from helpers.data_folder import find_data_folder
from helpers.optional_packages import import_parquet
from hypothesis import given, settings
from hypothesis import strategies as st

from dlnfast._datasets.cifar10 import load_cifar10
from dlnfast._datasets.images import load_fashion_mnist
from dlnfast._problem.data import one_hot
from dlnfast._problem.problem import Problem
from dlnfast._support.errors import ShapeError

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


def test_one_hot_refuses_labels_that_are_not_integers():
    with pytest.raises(TypeError, match="labels has dtype float64; wanted integers"):
        one_hot([0.0, 1.0])
    with pytest.raises(TypeError, match="labels"):
        one_hot(["cat"])


def test_one_hot_refuses_other_shapes():
    for bad in ([], [[0, 1]], 3):
        with pytest.raises(ShapeError, match="labels has shape"):
            one_hot(bad)


def test_one_hot_refuses_unknown_labels_and_repeated_classes():
    with pytest.raises(ValueError, match=r"labels\[2\] is 4; wanted one of classes \[0, 1\]"):
        one_hot([0, 1, 4], range(2))
    with pytest.raises(ValueError, match="twice"):
        one_hot([0], [0, 0])


# ------------------------------------------------------------------------------ loading synthetic copies


def draw_fashion_images(n_images, *, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n_images, 28, 28), np.uint8), rng.integers(0, 10, n_images, np.uint8)


TRAIN, TEST = draw_fashion_images(7, seed=0), draw_fashion_images(3, seed=1)
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


def assert_loads_small_set(path):
    for split, (images, labels) in BOTH.items():
        got_images, got_labels = load_fashion_mnist(path, split)
        assert got_images.dtype == np.uint8
        assert got_labels.dtype == np.int64
        np.testing.assert_array_equal(got_images, images.reshape(len(images), 784))
        np.testing.assert_array_equal(got_labels, labels)


def test_fashion_mnist_is_loaded_from_an_npz_file_or_its_folder(tmp_path):
    write_npz(tmp_path / "fashion_mnist_full.npz")
    assert_loads_small_set(tmp_path)
    assert_loads_small_set(str(tmp_path / "fashion_mnist_full.npz"))


def test_the_environment_variable_is_the_default_folder(tmp_path, monkeypatch):
    write_npz(tmp_path / "fashion_mnist_full.npz")
    monkeypatch.setenv("DLNFAST_DATA", str(tmp_path))
    assert_loads_small_set(None)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("folder", ["FashionMNIST/raw", "raw", "."])
def test_fashion_mnist_is_loaded_from_idx_folders(tmp_path, folder, compressed):
    write_idx(tmp_path / folder, compressed)
    assert_loads_small_set(tmp_path)


def png(image):
    stream = io.BytesIO()
    pytest.importorskip("PIL.Image", reason="Pillow encodes the images").fromarray(image).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


@pytest.mark.parametrize("folder", [".", "fashion_mnist", "data"])
def test_fashion_mnist_is_loaded_from_parquet_folders(tmp_path, folder):
    pyarrow, parquet = import_parquet()
    (tmp_path / folder).mkdir(exist_ok=True)
    for split, (images, labels) in BOTH.items():
        for part, rows in enumerate((slice(0, 2), slice(2, None))):
            table = {"image": [png(image) for image in images[rows]], "label": labels[rows].astype(np.int64)}
            file = tmp_path / folder / f"{split}-{part:05d}-of-00002.parquet"
            parquet.write_table(pyarrow.table(table), file)
    assert_loads_small_set(tmp_path)


def test_parquet_without_pyarrow_raises_an_error_that_names_the_package(tmp_path, monkeypatch):
    (tmp_path / "train-00000-of-00001.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"train-00000-of-00001.parquet needs pyarrow.*pip install"):
        load_fashion_mnist(tmp_path)


def test_missing_data_name_every_path_that_was_tried(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as caught:
        load_fashion_mnist(tmp_path, "test")
    for text in (
        "fashion_mnist_full.npz",
        "t10k-images-idx3-ubyte(.gz)",
        "t10k-labels-idx1-ubyte(.gz)",
        str(tmp_path / "FashionMNIST/raw"),
        str(tmp_path / "raw"),
        str(tmp_path / "fashion_mnist"),
        "test-*.parquet",
        "https://github.com/zalandoresearch/fashion-mnist",
    ):
        assert text in str(caught.value)
    monkeypatch.delenv("DLNFAST_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="DLNFAST_DATA is not set"):
        load_fashion_mnist()


def test_split_is_checked(tmp_path):
    with pytest.raises(ValueError, match="split is 'validation'; wanted one of 'train', 'test'"):
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
def test_errors_name_damaged_idx_files(tmp_path, name, content, message):
    write_idx(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_fashion_mnist(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:40], lambda b: b"no gzip" + b, lambda b: b[:30] + b"\xff" * 40 + b[70:]]
)
def test_errors_name_damaged_gzip_files(tmp_path, damage):
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
def test_errors_name_damaged_npz_files(tmp_path, kind):
    file = tmp_path / "fashion_mnist_full.npz"
    file.write_bytes(damaged_npz(kind))
    with pytest.raises(ValueError, match=r"fashion_mnist_full\.npz cannot be read .* x_train and y_train"):
        load_fashion_mnist(tmp_path)


# ------------------------------------------------------------------------------------ CIFAR-10, synthetic


def small_cifar(n_images, *, seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n_images) % 10).astype(np.uint8)
    return rng.integers(0, 256, (n_images, 3072), np.uint8), labels


CIFAR = {"train": small_cifar(65, seed=2), "test": small_cifar(21, seed=3)}


def cifar_batches():
    """Yield name, images and labels of each of the original files."""
    images, labels = CIFAR["train"]
    for n in range(5):
        rows = slice(13 * n, 13 * n + 13)
        yield f"data_batch_{n + 1}", images[rows], labels[rows]
    yield "test_batch", *CIFAR["test"]


def python2_pickle(images, labels):
    """Return a pickle of Python 2: protocol 2, all strings as bytes, the array by NumPy's old name."""

    def text(content):
        return b"T" + struct.pack("<i", len(content)) + content

    def number(n):
        return b"J" + struct.pack("<i", n)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\0K\1\x87R(K\3" + text(b"|") + b"NNN"
    dtype += number(-1) + number(-1) + b"K\0tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
    array += b"(K\1" + number(images.shape[0]) + number(images.shape[1]) + b"\x86" + dtype + b"\x89"
    array += text(images.tobytes()) + b"tb"
    listed = b"](" + b"".join(number(int(label)) for label in labels) + b"e"
    return b"\x80\2}(" + text(b"data") + array + text(b"labels") + listed + b"u."


def python3_pickle(protocol):
    return lambda images, labels: pickle.dumps(
        {"batch_label": "batch", "labels": labels.tolist(), "data": images, "filenames": ["a.png"]}, protocol
    )


def write_pickles(folder, dump=python2_pickle):
    folder.mkdir(parents=True, exist_ok=True)
    for name, images, labels in cifar_batches():
        (folder / name).write_bytes(dump(images, labels))


def write_binaries(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, images, labels in cifar_batches():
        (folder / f"{name}.bin").write_bytes(np.column_stack([labels, images]).tobytes())


def encoded_cifar(image, kind="PNG"):
    stream = io.BytesIO()
    pillow = pytest.importorskip("PIL.Image", reason="Pillow encodes the images")
    pillow.fromarray(image.reshape(3, 32, 32).transpose(1, 2, 0).copy()).save(stream, kind)
    return stream.getvalue()


def cifar_arrays():
    """Return the arrays of the compact file. (PNG instead of JPEG, which would alter the pixels.)"""
    arrays = {"class_names": np.array(["airplane"])}
    for split, (images, labels) in CIFAR.items():
        parts = [encoded_cifar(image) for image in images]
        arrays[f"jpeg_{split}"] = np.frombuffer(b"".join(parts), np.uint8)
        arrays[f"offsets_{split}"] = np.cumsum([0, *map(len, parts)]).astype(np.int32)
        arrays[f"y_{split}"] = labels
    return arrays


def write_cifar_parquet(folder):
    pyarrow, parquet = import_parquet()
    folder.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in CIFAR.items():
        for part, rows in enumerate((slice(0, 9), slice(9, None))):
            cells = [{"bytes": encoded_cifar(image), "path": None} for image in images[rows]]
            table = pyarrow.table({"img": cells, "label": labels[rows].astype(np.int64)})
            parquet.write_table(table, folder / f"{split}-{part:05d}-of-00002.parquet")


def first_of_each_class(labels, count):
    seen = [0] * 10
    rows = []
    for row, label in enumerate(labels):
        seen[label] += 1
        if seen[label] <= count:
            rows.append(row)
    return rows


def assert_is_small_cifar(path):
    for split, (images, labels) in CIFAR.items():
        for count in (None, 1, 2):
            rows = slice(None) if count is None else first_of_each_class(labels, count)
            got_images, got_labels = load_cifar10(path, split, per_class=count)
            assert got_images.dtype == np.uint8
            assert got_labels.dtype == np.int64
            assert got_images.flags.c_contiguous
            np.testing.assert_array_equal(got_images, images[rows])
            np.testing.assert_array_equal(got_labels, labels[rows])


@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "."])
@pytest.mark.parametrize("dump", [python2_pickle, *map(python3_pickle, range(5))])
def test_cifar10_is_loaded_from_pickles(tmp_path, folder, dump):
    write_pickles(tmp_path / folder, dump)
    assert_is_small_cifar(tmp_path)


@pytest.mark.parametrize("folder", ["cifar-10-batches-bin", "."])
def test_cifar10_is_loaded_from_binary_files(tmp_path, folder):
    write_binaries(tmp_path / folder)
    assert_is_small_cifar(tmp_path)


@pytest.mark.parametrize("folder", ["plain_text", "cifar10/plain_text", "cifar10", "."])
def test_cifar10_is_loaded_from_parquet(tmp_path, folder):
    write_cifar_parquet(tmp_path / folder)
    assert_is_small_cifar(tmp_path)


def test_cifar10_is_loaded_from_an_npz_file(tmp_path, monkeypatch):
    file = tmp_path / "cifar10_jpeg.npz"
    np.savez(file, **cifar_arrays())
    assert_is_small_cifar(tmp_path)
    assert_is_small_cifar(file)
    monkeypatch.setenv("DLNFAST_DATA", str(tmp_path))
    assert_is_small_cifar(None)


def test_missing_cifar10_names_every_path_that_was_tried(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as caught:
        load_cifar10(tmp_path)
    for text in (
        "no CIFAR-10 (train)",
        str(tmp_path / "cifar10_jpeg.npz"),
        f"data_batch_1 .. data_batch_5 in {tmp_path / 'cifar-10-batches-py'}",
        f"data_batch_1.bin .. data_batch_5.bin in {tmp_path / 'cifar-10-batches-bin'}",
        str(tmp_path / "plain_text" / "train-*.parquet"),
        "cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
    ):
        assert text in str(caught.value)
    write_pickles(tmp_path)
    for name in ("data_batch_2", "data_batch_5"):
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks data_batch_2, data_batch_5 among other files"):
        load_cifar10(tmp_path)
    assert len(load_cifar10(tmp_path, "test")[0]) == 21
    monkeypatch.delenv("DLNFAST_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"DLNFAST_DATA is not set.*cifar10_jpeg\.npz"):
        load_cifar10()


def test_arguments_of_load_cifar10_are_checked(tmp_path):
    write_binaries(tmp_path)
    with pytest.raises(ValueError, match="split is 'valid'; wanted one of 'train', 'test'"):
        load_cifar10(tmp_path, "valid")
    with pytest.raises(ValueError, match="per_class is 0; wanted an integer of at least 1"):
        load_cifar10(tmp_path, per_class=0)
    with pytest.raises(TypeError, match="per_class"):
        load_cifar10(tmp_path, per_class=1.5)
    with pytest.raises(ValueError, match=r"per_class is 3, but .* holds 2 of class 1"):
        load_cifar10(tmp_path, "test", per_class=3)


class RunsCode:
    """A pickle of this sets an environment variable when an unsafe unpickler reads it."""

    def __reduce__(self):
        return exec, ("import os; os.environ['DLNFAST_TEST_OF_PICKLES'] = 'ran'",)


def numbers_as_objects():
    """Return a pickled array whose bytes would be read as addresses of objects."""
    return python2_pickle(*CIFAR["test"]).replace(b"u1", b"O8")


IMAGES_32, LABELS_32 = CIFAR["test"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"data": RunsCode(), "labels": []}), "it names builtins.exec; wanted nothing but"),
        (pickle.dumps(RunsCode(), 0), r"it names \w+\.exec"),
        (b"cos\nsystem\n(S'true'\ntR.", "posix.system|os.system"),
        (b"cnumpy\nload\n.", "numpy.load"),
        (b"c_codecs\nencode\n}b.", "cannot be read as a pickle"),
        (numbers_as_objects(), "no array of uint8"),
        (pickle.dumps({"data": IMAGES_32.astype(np.int32), "labels": LABELS_32.tolist()}, 2), "of uint8"),
        (pickle.dumps({"data": np.asfortranarray(IMAGES_32), "labels": []}, 2), "in C order"),
        (pickle.dumps({"data": [1, 2], "labels": []}), "no attribute 'to_array'"),
        (pickle.dumps({"labels": []}), "'data'"),
        (pickle.dumps([1, 2]), "cannot be read as a pickle"),
        (b"", "cannot be read as a pickle"),
        (b"garbage", "cannot be read as a pickle"),
        (python2_pickle(IMAGES_32, LABELS_32)[:-500], "cannot be read as a pickle"),
        (python2_pickle(IMAGES_32[:, :-1], LABELS_32), r"data of shape \(21, 3071\); wanted \(N, 3072\)"),
        (python2_pickle(IMAGES_32, LABELS_32[1:]), r"21 images, but labels of shape \(20,\)"),
        (python2_pickle(IMAGES_32, LABELS_32 + 1), r"labels 1\.\.10; wanted 0\.\.9"),
    ],
)
def test_unsafe_cifar10_pickles_are_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.delenv("DLNFAST_TEST_OF_PICKLES", raising=False)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_cifar10(tmp_path, "test")
    assert str(tmp_path / "test_batch") in str(caught.value)
    assert "DLNFAST_TEST_OF_PICKLES" not in os.environ


@pytest.mark.parametrize("content", [b"", bytes(3072), bytes(3073)[:-1], bytes(3074)])
def test_errors_name_damaged_cifar10_binary_files(tmp_path, content):
    (tmp_path / "test_batch.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"test_batch\.bin has {len(content)} bytes; .* multiple of 3073"):
        load_cifar10(tmp_path, "test")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"jpeg_test": None}, "cannot be read .* jpeg_test, offsets_test and y_test"),
        ({"jpeg_test": np.zeros(9)}, r"jpeg_test of shape \(9,\), float64"),
        ({"jpeg_test": np.zeros(9, np.uint8)}, "offsets_test .* from 0 to 9"),
        ({"offsets_test": np.zeros(22)}, "offsets_test that are no ascending vector of integers"),
        ({"offsets_test": np.arange(22)[::-1]}, "no ascending vector"),
        ({"offsets_test": np.arange(-1, 21)}, "no ascending vector"),
        ({"offsets_test": np.arange(22)}, "image 0 cannot be decoded"),
        ({"y_test": np.zeros(20, np.uint8)}, r"21 images, but labels of shape \(20,\)"),
        ({"y_test": np.full(21, 10)}, r"labels 10\.\.10"),
    ],
)
def test_errors_name_damaged_cifar10_npz_files(tmp_path, changed, message):
    arrays = {name: array for name, array in {**cifar_arrays(), **changed}.items() if array is not None}
    np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        load_cifar10(tmp_path, "test")
    assert "cifar10_jpeg.npz" in str(caught.value)


def test_cifar10_images_of_other_sizes_are_refused(tmp_path):
    pillow = pytest.importorskip("PIL.Image", reason="Pillow encodes the images")
    for size, message in (((28, 28), "wanted"), ((32, 32, 3), "image 1 has shape")):
        parts = []
        for image in (np.zeros(size, np.uint8), np.zeros((28, 28), np.uint8)):
            stream = io.BytesIO()
            pillow.fromarray(image).save(stream, "JPEG")
            parts.append(stream.getvalue())
        offsets = np.cumsum([0, *map(len, parts)])
        arrays = {"jpeg_test": np.frombuffer(b"".join(parts), np.uint8), "offsets_test": offsets}
        np.savez(tmp_path / "cifar10_jpeg.npz", y_test=np.zeros(2, np.uint8), **arrays)
        with pytest.raises(ValueError, match=message):
            load_cifar10(tmp_path, "test")


def test_errors_name_damaged_cifar10_parquet_files(tmp_path):
    pyarrow, parquet = import_parquet()
    file = tmp_path / "test-00000-of-00001.parquet"
    wrong = {"bytes": b"no image", "path": None}
    for table in ({"image": [wrong], "label": [0]}, {"img": [wrong]}, {"img": [None], "label": [0]}):
        parquet.write_table(pyarrow.table(table), file)
        with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet .* columns img and label"):
            load_cifar10(tmp_path, "test")
    parquet.write_table(pyarrow.table({"img": [wrong], "label": [0]}), file)
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet: image 0 cannot be decoded"):
        load_cifar10(tmp_path, "test")
    file.write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet cannot be read"):
        load_cifar10(tmp_path, "test")


# ------------------------------------------------------------------------------------- the real data set


@pytest.fixture(scope="module")
def data_folder():
    return find_data_folder("fashion_mnist_full.npz")


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


def whiten(folder, split, method):
    """Return the problem of a split, and the seconds that it took."""
    images, labels = load_fashion_mnist(folder, split)
    start = time.perf_counter()
    problem = Problem.from_data(images, labels, whiten=method, layout="rows")
    return problem, time.perf_counter() - start


@pytest.fixture(scope="module")
def white_training_images(data_folder):
    return whiten(data_folder, "train", "zca")


def assert_whitened(problem, seconds, n_images, record_property):
    white = problem.whitening
    for name in ("error", "rank", "condition_number"):
        record_property(name, getattr(white, name))
    record_property("seconds", seconds)
    print(
        f"{white.method}, {n_images} images: error {white.error:.1e}, rank {white.rank}, "
        f"condition number {white.condition_number:.2e}, {seconds:.1f} s"
    )
    assert white.rank == 784
    assert 1e8 < white.condition_number < 1e10
    # cond(S)^(1/2) eps = 7e-12 bounds the rounding of T X; over 10,000 samples most of it averages out.
    assert white.error < 1e-12
    assert problem.target.shape == (10, 784)
    assert problem.whitened
    assert problem.loss_scale == 1 / (10 * n_images)


def test_training_images_of_fashion_mnist_can_be_whitened(white_training_images, record_property):
    assert_whitened(*white_training_images, 60_000, record_property)


@pytest.mark.parametrize("method", ["pca", "cholesky"])
def test_test_images_of_fashion_mnist_can_be_whitened(data_folder, record_property, method):
    assert_whitened(*whiten(data_folder, "test", method), 10_000, record_property)


def test_least_squares_classifies_fashion_mnist(data_folder, white_training_images):
    problem, _ = white_training_images
    images, labels = load_fashion_mnist(data_folder, "test")
    predicted = problem.classes[np.argmax(problem.least_squares @ problem.transform(images), axis=0)]
    # Linear regression on raw pixels is known to reach about 81 % on this test set.
    assert 0.79 < np.mean(predicted == labels) < 0.83


def test_cifar10_is_complete():
    data_folder = find_data_folder("cifar10_jpeg.npz")
    images, labels = load_cifar10(data_folder, "test")
    assert images.shape == (10000, 3072)
    assert np.bincount(labels).tolist() == [1000] * 10
    # Published means of red, green and blue over the training set, .4914 .4822 .4465; JPEG keeps them.
    few, few_labels = load_cifar10(data_folder, per_class=300)
    assert np.bincount(few_labels).tolist() == [300] * 10
    means = few.reshape(-1, 3, 1024).mean(axis=(0, 2)) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=0.01)
    # Neighbouring pixels are similar in each colour, so the axes are in the documented order.
    pixels = few.reshape(-1, 3, 32, 32).astype(float)
    for axis in (2, 3):
        assert np.abs(np.diff(pixels, axis=axis)).mean() < 0.3 * pixels.std()
