# SPDX-License-Identifier: MIT
"""CIFAR-10 from .npz, binary, pickle and parquet files."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .._support.arrays import IntArray, check_count
from .folder import data_root, missing_data_error, npz_file, read_npz
from .images import (
    ImageArray,
    check_images,
    check_labels,
    check_split,
    decode_images,
    find_parquet,
    read_parquet,
    select_per_class,
)

_CIFAR_SHAPE: Final = (3, 32, 32)
_CIFAR_NPZ: Final = "cifar10_jpeg.npz"
#: Folders of the two archives of the original files: pickles, and plain bytes.
_CIFAR_PICKLES: Final = ("cifar-10-batches-py", ".")
_CIFAR_BINARIES: Final = ("cifar-10-batches-bin", ".")
_CIFAR_PARQUET: Final = ("plain_text", "cifar10/plain_text", "cifar10", ".")
_CIFAR_BATCHES: Final = {"train": tuple(f"data_batch_{n}" for n in range(1, 6)), "test": ("test_batch",)}
_CIFAR_SOURCE: Final = (
    "cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it in this folder"
)


def load_cifar10(
    path: str | os.PathLike[str] | None = None, split: str = "train", *, per_class: int | None = None
) -> tuple[ImageArray, IntArray]:
    """Read CIFAR-10 from a local copy; nothing is downloaded.

    The images have the order of the files, some of which are sorted by class: shuffle them before you split
    them into batches.

    Parameters
    ----------
    path : path, optional
        File or folder. Default: the environment variable ``DLNFAST_DATA``. The first of these that exists is
        read:

        * ``cifar10_jpeg.npz``, or an .npz file itself, with the arrays ``jpeg_train`` (the concatenated JPEG
          files), ``offsets_train`` (the N + 1 offsets of their starts and of the end), ``y_train``, and the
          same for ``test`` (needs Pillow). It is sorted by class, and JPEG compression has changed the
          pixels slightly;
        * the original pickles ``data_batch_1`` .. ``data_batch_5`` and ``test_batch``, in
          ``cifar-10-batches-py`` (where their archive and torchvision put them) or in the folder itself;
        * the original binary files ``data_batch_1.bin`` and so on, in ``cifar-10-batches-bin`` or in the
          folder itself;
        * the parquet files of the Hugging Face data set, ``train-*.parquet`` and ``test-*.parquet``, in
          ``plain_text``, ``cifar10/plain_text``, ``cifar10`` or the folder itself (needs pyarrow and Pillow).
    split : {"train", "test"}
        50,000 or 10,000 images.
    per_class : int, optional
        Number of images per class; the first ones in the order of the files. Default: all.

    Returns
    -------
    images : ndarray of uint8, shape (N, 3072)
        One image per row, values 0..255: the red channel, row by row, then green, then blue.
        ``images.reshape(-1, 3, 32, 32)`` has the axes (image, channel, row, column).
    labels : ndarray of int64, shape (N,)
        0 airplane, 1 automobile, 2 bird, 3 cat, 4 deer, 5 dog, 6 frog, 7 horse, 8 ship, 9 truck.

    Raises
    ------
    FileNotFoundError
        If there are no such files, or only some of a set. The message lists the searched paths and a source
        for download, or the missing files.
    ValueError
        If a file is damaged, or a class has fewer than `per_class` images.
    ImportError
        If Pillow or pyarrow is needed and not installed.

    Notes
    -----
    A pickle can execute code. These are read by an unpickler that allows only dictionaries, lists, numbers,
    strings and arrays of bytes, and refuses everything else.

    Krizhevsky, "Learning multiple layers of features from tiny images" (2009).

    Cost: 154 MB of memory for all training images; JPEG copies are decoded, which takes seconds.

    Examples
    --------
    >>> from dlnfast import load_cifar10
    >>> images, labels = load_cifar10("data", per_class=100)  # doctest: +SKIP
    >>> images.shape  # doctest: +SKIP
    (1000, 3072)
    """
    check_split(split)
    count = None if per_class is None else check_count(per_class, "per_class")
    root = data_root(path, f"{_CIFAR_NPZ}, cifar-10-batches-py or the parquet files of CIFAR-10")
    npz = npz_file(root, _CIFAR_NPZ)
    if npz.is_file():
        return _read_cifar_jpeg(npz, split, count)
    readers: tuple[tuple[tuple[str, ...], str, Callable[[Path], _Arrays]], ...] = (
        (_CIFAR_PICKLES, "", _read_cifar_pickle),
        (_CIFAR_BINARIES, ".bin", _read_cifar_binary),
    )
    searched = [str(npz)]
    for folders, ending, reader in readers:
        for folder in folders:
            files = [root / folder / (name + ending) for name in _CIFAR_BATCHES[split]]
            lacking = [file.name for file in files if not file.is_file()]
            if not lacking:
                parts = [check_images(*reader(file), file, _CIFAR_SHAPE) for file in files]
                images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
                chosen = select_per_class(labels, count, root / folder)
                return (images, labels) if count is None else (images[chosen], labels[chosen])
            if len(lacking) < len(files):
                raise FileNotFoundError(
                    f"{root / folder} lacks {', '.join(lacking)} among other files of CIFAR-10 ({split})"
                )
            first, last = files[0].name, files[-1].name
            searched.append(f"{first if first == last else f'{first} .. {last}'} in {root / folder}")
    parquet = find_parquet(root, _CIFAR_PARQUET, split)
    if parquet:
        images, labels = read_parquet(parquet, "img", count)
        return check_images(_move_channels_first(images), labels, parquet[0], _CIFAR_SHAPE)
    searched += [str(root / folder / f"{split}-*.parquet") for folder in _CIFAR_PARQUET]
    raise missing_data_error("CIFAR-10", root, split, searched, _CIFAR_SOURCE)


_Arrays = tuple[npt.NDArray[Any], npt.NDArray[Any]]


def _move_channels_first(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Transpose (N, rows, columns, channels) to (N, channels, rows, columns), if there are four axes."""
    return np.ascontiguousarray(np.moveaxis(images, 3, 1)) if images.ndim == 4 else images


def _read_cifar_jpeg(path: Path, split: str, per_class: int | None) -> tuple[ImageArray, IntArray]:
    content, offsets, labels = read_npz(path, f"jpeg_{split}", f"offsets_{split}", f"y_{split}")
    if content.dtype != np.uint8 or content.ndim != 1:
        raise ValueError(
            f"{path} holds jpeg_{split} of shape {content.shape}, {content.dtype}; wanted (n,), uint8"
        )
    is_integer_vector = offsets.ndim == 1 and offsets.size > 1 and offsets.dtype.kind in "iu"
    starts = offsets.astype(np.int64) if is_integer_vector else np.zeros(0, np.int64)
    if not is_integer_vector or starts[0] < 0 or starts[-1] > content.size or np.any(np.diff(starts) < 0):
        raise ValueError(
            f"{path} holds offsets_{split} that are no ascending vector of integers from 0 to {content.size}"
        )
    check_labels(labels, starts.size - 1, path)
    chosen = select_per_class(labels, per_class, path)
    images = decode_images([content[starts[i] : starts[i + 1]].tobytes() for i in chosen], path)
    return check_images(_move_channels_first(images), labels[chosen], path, _CIFAR_SHAPE)


def _read_cifar_binary(path: Path) -> _Arrays:
    """Read a file of records: one byte for the label, then one byte for each value."""
    content = np.fromfile(path, dtype=np.uint8)
    size = 1 + math.prod(_CIFAR_SHAPE)
    if content.size == 0 or content.size % size:
        raise ValueError(f"{path} has {content.size} bytes; wanted a multiple of {size}")
    records = content.reshape(-1, size)
    return records[:, 1:].reshape(-1, *_CIFAR_SHAPE), records[:, 0]


def _read_cifar_pickle(path: Path) -> _Arrays:
    try:
        with path.open("rb") as stream:
            # Python 2 wrote the original files: their strings are bytes.
            content = _CifarUnpickler(stream, encoding="bytes").load()
        entries = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        images, labels = entries["data"].to_array(), np.array(entries["labels"])
    except Exception as error:  # damaged pickles raise errors of any type
        raise ValueError(f"{path} cannot be read as a pickle of CIFAR-10: {error}") from error
    if images.ndim != 2 or images.shape[1] != math.prod(_CIFAR_SHAPE):
        raise ValueError(f"{path} holds data of shape {images.shape}; wanted (N, {math.prod(_CIFAR_SHAPE)})")
    return images.reshape(-1, *_CIFAR_SHAPE), labels


class _CifarUnpickler(pickle.Unpickler):
    """An unpickler of dictionaries, lists, numbers, strings and arrays of bytes; it calls no other code.

    It does not call NumPy's reconstruction of arrays either, which trusts the memory layout in the pickle.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for one of the few names that a pickled array needs."""
        known = {
            ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
            ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
            ("numpy", "ndarray"): _PickledArray,
            ("numpy", "dtype"): _PickledType,
            ("_codecs", "encode"): _PickledBytes,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}; wanted nothing but dictionaries, lists, strings and arrays"
            )
        return known[module, name]


class _PickledArray:
    """Shape, type and bytes of a pickled array, unchecked."""

    state: tuple[Any, ...] = ()

    def __init__(self, *arguments: object) -> None:
        """Ignore the arguments of NumPy's function: the class, an empty shape and a type."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def to_array(self) -> ImageArray:
        """Return an array of bytes in C order; raise ValueError for other types and orders."""
        _, shape, kind, columns_first, content = self.state
        if not isinstance(kind, _PickledType) or kind.name not in ("u1", b"u1") or columns_first:
            raise ValueError("its data are no array of uint8 in C order")
        return np.frombuffer(content, dtype=np.uint8).reshape(shape)


class _PickledType:
    """The name of a type of numbers."""

    name: object = None

    def __init__(self, name: object = None, *arguments: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and alignment, which bytes do not have."""


class _PickledBytes(bytes):
    """Bytes that were pickled as text, one character for each."""

    def __new__(cls, text: str, encoding: str) -> _PickledBytes:
        """Convert the text, as which early pickle protocols store bytes, to bytes."""
        return super().__new__(cls, text.encode("latin1"))

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("bytes have no state")
