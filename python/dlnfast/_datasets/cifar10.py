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
from .folder import data_root, missing_data, npz_file, read_npz
from .images import (
    ImageArray,
    check_images,
    check_labels,
    check_split,
    decode_images,
    find_parquet,
    first_of_each_class,
    read_parquet,
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

    The order of the images is that of the files, and some files are sorted by class: shuffle before making
    batches.

    Parameters
    ----------
    path : path, optional
        File or folder. Default: the environment variable ``DLNFAST_DATA``. Looked for, in this order:

        * ``cifar10_jpeg.npz``, or an .npz file itself: ``jpeg_train``, the bytes of all JPEG files one after
          the other, ``offsets_train``, N + 1 numbers, where each begins, ``y_train``, and the same for
          ``test`` (needs Pillow). Sorted by class; JPEG has altered the pixels a little;
        * the original pickles ``data_batch_1`` .. ``data_batch_5`` and ``test_batch``, in
          ``cifar-10-batches-py`` (where their archive and torchvision put them) or in the folder itself;
        * the original binary files ``data_batch_1.bin`` and so on, in ``cifar-10-batches-bin`` or in the
          folder itself;
        * the parquet files of the Hugging Face data set, ``train-*.parquet`` and ``test-*.parquet``, in
          ``plain_text``, ``cifar10/plain_text``, ``cifar10`` or the folder itself (needs pyarrow and Pillow).
    split : {"train", "test"}
        50,000 or 10,000 images.
    per_class : int, optional
        Read only the first so many images of each class, in the order of the files. Default: all.

    Returns
    -------
    images : ndarray of uint8, shape (N, 3072)
        One image a row, values 0..255: all of red, row by row of the image, then green, then blue.
        ``images.reshape(-1, 3, 32, 32)`` gives (channel, row, column).
    labels : ndarray of int64, shape (N,)
        0 airplane, 1 automobile, 2 bird, 3 cat, 4 deer, 5 dog, 6 frog, 7 horse, 8 ship, 9 truck.

    Raises
    ------
    FileNotFoundError
        Naming every place that was looked at, and where the files are to be had; or those that are missing
        beside others.
    ValueError
        For a damaged file, saying what is wrong with it, and where a class has fewer than `per_class` images.
    ImportError
        Where Pillow or pyarrow is needed and missing.

    Notes
    -----
    A pickle may hold a program. These are read by an unpickler that knows only dictionaries, lists, numbers,
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
    places = [str(npz)]
    for folders, ending, reader in readers:
        for folder in folders:
            files = [root / folder / (name + ending) for name in _CIFAR_BATCHES[split]]
            lacking = [file.name for file in files if not file.is_file()]
            if not lacking:
                parts = [check_images(*reader(file), file, _CIFAR_SHAPE) for file in files]
                images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
                kept = first_of_each_class(labels, count, root / folder)
                return (images, labels) if count is None else (images[kept], labels[kept])
            if len(lacking) < len(files):
                raise FileNotFoundError(
                    f"{root / folder} lacks {', '.join(lacking)} beside other files of CIFAR-10 ({split})"
                )
            first, last = files[0].name, files[-1].name
            places.append(f"{first if first == last else f'{first} .. {last}'} in {root / folder}")
    parquet = find_parquet(root, _CIFAR_PARQUET, split)
    if parquet:
        images, labels = read_parquet(parquet, "img", count)
        return check_images(_channels_first(images), labels, parquet[0], _CIFAR_SHAPE)
    places += [str(root / folder / f"{split}-*.parquet") for folder in _CIFAR_PARQUET]
    raise missing_data("CIFAR-10", root, split, places, _CIFAR_SOURCE)


_Arrays = tuple[npt.NDArray[Any], npt.NDArray[Any]]


def _channels_first(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return (N, rows, columns, channels) as (N, channels, rows, columns); other shapes as they are."""
    return np.ascontiguousarray(np.moveaxis(images, 3, 1)) if images.ndim == 4 else images


def _read_cifar_jpeg(path: Path, split: str, per_class: int | None) -> tuple[ImageArray, IntArray]:
    content, offsets, labels = read_npz(path, f"jpeg_{split}", f"offsets_{split}", f"y_{split}")
    if content.dtype != np.uint8 or content.ndim != 1:
        raise ValueError(
            f"{path} holds jpeg_{split} of shape {content.shape}, {content.dtype}; wanted (n,), uint8"
        )
    in_order = offsets.ndim == 1 and offsets.size > 1 and offsets.dtype.kind in "iu"
    begins = offsets.astype(np.int64) if in_order else np.zeros(0, np.int64)
    if not in_order or begins[0] < 0 or begins[-1] > content.size or np.any(np.diff(begins) < 0):
        raise ValueError(
            f"{path} holds offsets_{split} that are no ascending vector of integers from 0 to {content.size}"
        )
    check_labels(labels, begins.size - 1, path)
    kept = first_of_each_class(labels, per_class, path)
    encoded = [content[begins[i] : begins[i + 1]].tobytes() for i in kept]
    return check_images(_channels_first(decode_images(encoded, path)), labels[kept], path, _CIFAR_SHAPE)


def _read_cifar_binary(path: Path) -> _Arrays:
    """Read records of one byte for the label and one for each value."""
    content = np.fromfile(path, dtype=np.uint8)
    size = 1 + math.prod(_CIFAR_SHAPE)
    if content.size == 0 or content.size % size:
        raise ValueError(f"{path} has {content.size} bytes; wanted a multiple of {size}")
    records = content.reshape(-1, size)
    return records[:, 1:].reshape(-1, *_CIFAR_SHAPE), records[:, 0]


def _read_cifar_pickle(path: Path) -> _Arrays:
    try:
        with path.open("rb") as stream:
            # Strings of Python 2, which wrote the originals, are bytes.
            held = _CifarUnpickler(stream, encoding="bytes").load()
        named = {key.decode() if isinstance(key, bytes) else key: value for key, value in held.items()}
        images, labels = named["data"].array(), np.array(named["labels"])
    except Exception as error:  # damaged pickles raise nearly anything
        raise ValueError(f"{path} cannot be read as a pickle of CIFAR-10: {error}") from error
    if images.ndim != 2 or images.shape[1] != math.prod(_CIFAR_SHAPE):
        raise ValueError(f"{path} holds data of shape {images.shape}; wanted (N, {math.prod(_CIFAR_SHAPE)})")
    return images.reshape(-1, *_CIFAR_SHAPE), labels


class _CifarUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists, numbers, strings and arrays of bytes; runs nothing that a file names.

    NumPy's own reconstruction is not run either: it trusts what a pickle says of the memory of an array.
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
    """Shape, type and bytes of an array, as they come."""

    state: tuple[Any, ...] = ()

    def __init__(self, *arguments: object) -> None:
        """Take what NumPy's function would be called with: the class, a shape and a type, all empty."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def array(self) -> ImageArray:
        """Return the array, of bytes in C order."""
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
        """Leave out byte order and alignment, which bytes do not have."""


class _PickledBytes(bytes):
    """Bytes that were written as text, one character for each."""

    def __new__(cls, text: str, encoding: str) -> _PickledBytes:
        """Undo what pickles of early protocols do to bytes."""
        return super().__new__(cls, text.encode("latin1"))

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("bytes have no state")
