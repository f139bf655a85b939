# SPDX-License-Identifier: MIT
"""Fashion-MNIST from .npz, idx and parquet files, and the checks of images that CIFAR-10 shares."""

from __future__ import annotations

import gzip
import io
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from .._support.arrays import IntArray, check_choice, check_count
from .._support.files import max_content
from .._support.optional import import_optional
from .folder import data_root, missing_data_error, npz_file, read_npz

ImageArray = npt.NDArray[np.uint8]
_FASHION_NPZ: Final = "fashion_mnist_full.npz"
_FASHION_FILES: Final = f"{_FASHION_NPZ}, FashionMNIST/raw/*-ubyte(.gz) or the parquet files of Fashion-MNIST"
_FASHION_SHAPE: Final = (28, 28)
_N_CLASSES: Final = 10
#: Largest number of pixels that is decoded; images of these data sets have 28 x 28 or 32 x 32.
_MAX_PIXELS: Final = 2**16
_BLOCK_BYTES: Final = 2**20
_IDX_FOLDERS: Final = ("FashionMNIST/raw", "raw", ".")
_PARQUET_FOLDERS: Final = (".", "fashion_mnist", "data")
_IDX_PREFIX: Final = {"train": "train", "test": "t10k"}
_FASHION_SOURCE: Final = (
    "the four *-ubyte.gz files of https://github.com/zalandoresearch/fashion-mnist, into this folder"
)


def load_fashion_mnist(
    path: str | os.PathLike[str] | None = None, split: str = "train", *, per_class: int | None = None
) -> tuple[ImageArray, IntArray]:
    """Read Fashion-MNIST from a local copy; nothing is downloaded.

    Parameters
    ----------
    path : path, optional
        File or folder. Default: the environment variable ``DLNFAST_DATA``. The first of these that exists is
        read:

        * ``fashion_mnist_full.npz``, or an .npz file itself, with the arrays ``x_train``, ``y_train``,
          ``x_test``, ``y_test``;
        * the original files ``train-images-idx3-ubyte`` and so on, plain or ``.gz``, in
          ``FashionMNIST/raw`` (where torchvision puts them), in ``raw`` or in the folder itself;
        * the parquet files of the Hugging Face data set, ``train-*.parquet`` and ``test-*.parquet``,
          in the folder itself, in ``fashion_mnist`` or in ``data`` (needs pyarrow and Pillow).
    split : {"train", "test"}
        60,000 or 10,000 images.
    per_class : int, optional
        Number of images per class; the first ones in the order of the files. Default: all.

    Returns
    -------
    images : ndarray of uint8, shape (N, 784)
        One image per row, pixels 0..255.
    labels : ndarray of int64, shape (N,)
        0 T-shirt/top, 1 trouser, 2 pullover, 3 dress, 4 coat, 5 sandal, 6 shirt, 7 sneaker, 8 bag,
        9 ankle boot.

    Raises
    ------
    FileNotFoundError
        If there are no such files. The message lists the searched paths and a source for download.
    ValueError
        If a file is damaged.
    ImportError
        If there are only parquet files, and pyarrow or Pillow is not installed.

    Notes
    -----
    Xiao, Rasul, Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine learning
    algorithms" (arXiv 1708.07747).

    Cost: 47 MB of memory for all training images.

    Examples
    --------
    >>> from dlnfast import load_fashion_mnist
    >>> images, labels = load_fashion_mnist("data", split="test")  # doctest: +SKIP
    >>> images.shape, labels[:5]  # doctest: +SKIP
    ((10000, 784), array([9, 2, 1, 1, 6]))
    """
    check_split(split)
    count = None if per_class is None else check_count(per_class, "per_class")
    root = data_root(path, _FASHION_FILES)
    npz = npz_file(root, _FASHION_NPZ)
    if npz.is_file():
        images, labels = read_npz(npz, f"x_{split}", f"y_{split}")
        return _select_images(images, labels, count, npz)
    for folder in _IDX_FOLDERS:
        found = _find_idx(root / folder, split)
        if found is not None:
            return _select_images(_read_idx(found[0], 3), _read_idx(found[1], 1), count, found[0])
    files = find_parquet(root, _PARQUET_FOLDERS, split)
    if files:
        images, labels = read_parquet(files, "image", count)
        return check_images(images, labels, files[0], _FASHION_SHAPE)
    raise missing_data_error("Fashion-MNIST", root, split, _list_searched_paths(root, split), _FASHION_SOURCE)


def _select_images(
    images: npt.NDArray[Any], labels: npt.NDArray[Any], per_class: int | None, source: Path
) -> tuple[ImageArray, IntArray]:
    """Check images and labels of all classes, and return the first `per_class` of each."""
    images, labels = check_images(images, labels, source, _FASHION_SHAPE)
    rows = select_per_class(labels, per_class, source)
    return images[rows], labels[rows]


def check_split(split: str) -> None:
    """Raise ValueError unless the split is "train" or "test"."""
    check_choice(split, "split", ("train", "test"))


def _find_idx(folder: Path, split: str) -> tuple[Path, Path] | None:
    images = _find_plain_or_gzip(folder / f"{_IDX_PREFIX[split]}-images-idx3-ubyte")
    labels = _find_plain_or_gzip(folder / f"{_IDX_PREFIX[split]}-labels-idx1-ubyte")
    return None if images is None or labels is None else (images, labels)


def _find_plain_or_gzip(path: Path) -> Path | None:
    compressed = path.with_name(path.name + ".gz")
    return next((p for p in (path, compressed) if p.is_file()), None)


def _read_idx(path: Path, n_axes: int) -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes: magic number, big-endian sizes, values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            return _read_idx_values(stream, path, n_axes)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _read_idx_values(stream: IO[bytes] | gzip.GzipFile, path: Path, n_axes: int) -> npt.NDArray[np.uint8]:
    header = 4 + 4 * n_axes
    start = stream.read(header)
    if len(start) < header:
        raise ValueError(f"{path} is truncated: {len(start)} bytes, shorter than its header of {header}")
    magic = bytes((0, 0, 8, n_axes))
    if start[:4] != magic:
        raise ValueError(
            f"{path} is not an IDX file of unsigned bytes with {n_axes} axes: it starts with "
            f"0x{start[:4].hex()}; wanted 0x{magic.hex()}"
        )
    sizes = [int(n) for n in np.frombuffer(start, dtype=">u4", offset=4)]
    wanted = math.prod(sizes)
    # A damaged header may declare any size: allocate no more than a file of this size may contain.
    limit = min(wanted, max_content(path.stat().st_size))
    content = stream.read(limit)
    got = len(content)
    while part := stream.read(_BLOCK_BYTES):
        got += len(part)
    if got != wanted:
        raise ValueError(
            f"{path} is {'truncated' if got < wanted else 'too long'}: {got} bytes of values; its header "
            f"says {' x '.join(map(str, sizes))} = {wanted}"
        )
    if limit < wanted:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, too few for {wanted} values")
    return np.frombuffer(content, dtype=np.uint8).reshape(sizes)


def find_parquet(root: Path, folders: Sequence[str], split: str) -> list[Path]:
    """Return the parquet files of a split from the first folder that has any; an empty list if none has."""
    found = (sorted((root / folder).glob(f"{split}-*.parquet")) for folder in folders)
    return next((files for files in found if files), [])


def read_parquet(
    files: Sequence[Path], column: str, per_class: int | None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Read labels and encoded images, and return the decoded images and labels, `per_class` of each class."""
    parquet = import_optional("pyarrow.parquet", f"reading {files[0]}", install="pyarrow pillow")
    import_optional("PIL.Image", f"reading {files[0]}", install="pillow")
    cells: list[bytes] = []
    labels: list[int] = []
    for file in files:
        try:
            table = parquet.read_table(file, columns=[column, "label"]).to_pydict()
            cells += [cell["bytes"] for cell in table[column]]
            labels += table["label"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(
                f"{file} cannot be read as a parquet file with columns {column} and label: {error}"
            ) from error
    classes = np.array(labels)
    chosen = select_per_class(classes, per_class, files[0])
    return decode_images([cells[i] for i in chosen], files[0]), classes[chosen]


def decode_images(encoded: Sequence[bytes], source: Path) -> npt.NDArray[Any]:
    """Decode PNG or JPEG images of one size, (N, rows, columns) or (N, rows, columns, 3)."""
    pillow = import_optional("PIL.Image", f"reading {source}", install="pillow")
    images: list[npt.NDArray[Any]] = []
    for number, content in enumerate(encoded):
        try:
            image = pillow.open(io.BytesIO(content))
            if image.width * image.height > _MAX_PIXELS:  # before memory is allocated for the pixels
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            images.append(np.asarray(image))
        except Exception as error:  # damaged bytes make decoders raise errors of any type
            raise ValueError(f"{source}: image {number} cannot be decoded: {error}") from error
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"{source}: image {number} has shape {images[-1].shape}; wanted {images[0].shape}, that of "
                "image 0"
            )
    return np.array(images)


def select_per_class(labels: npt.NDArray[Any], per_class: int | None, source: Path) -> IntArray:
    """Return the rows of the first `per_class` samples of each class, ascending; all rows for None."""
    if per_class is None:
        return np.arange(len(labels))
    check_labels(labels, len(labels), source)
    chosen = []
    for label in range(_N_CLASSES):
        rows = np.flatnonzero(labels == label)
        if len(rows) < per_class:
            raise ValueError(f"per_class is {per_class}, but {source} holds {len(rows)} of class {label}")
        chosen.append(rows[:per_class])
    return np.sort(np.concatenate(chosen))


def check_images(
    images: npt.NDArray[Any], labels: npt.NDArray[Any], source: Path, shape: tuple[int, ...]
) -> tuple[ImageArray, IntArray]:
    """Check types and shapes, and return the images as rows and the labels as int64."""
    n_images = len(images)
    if images.dtype != np.uint8 or images.shape[1:] != shape or n_images == 0:
        wanted = ", ".join(map(str, shape))
        raise ValueError(
            f"{source} holds images of shape {images.shape}, {images.dtype}; wanted (N, {wanted}), uint8"
        )
    check_labels(labels, n_images, source)
    return images.reshape(n_images, -1), labels.astype(np.int64)


def check_labels(labels: npt.NDArray[Any], n_images: int, source: Path) -> None:
    """Raise ValueError unless there is one label, 0..9, for each image."""
    if labels.shape != (n_images,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{source} holds {n_images} images, but labels of shape {labels.shape}, {labels.dtype}; "
            f"wanted ({n_images},), integers"
        )
    if n_images and (labels.min() < 0 or labels.max() >= _N_CLASSES):
        raise ValueError(f"{source} holds labels {labels.min()}..{labels.max()}; wanted 0..{_N_CLASSES - 1}")


def _list_searched_paths(root: Path, split: str) -> list[str]:
    prefix = _IDX_PREFIX[split]
    pair = f"{prefix}-images-idx3-ubyte(.gz) with {prefix}-labels-idx1-ubyte(.gz)"
    searched = [str(npz_file(root, _FASHION_NPZ))]
    searched += [f"{pair} in {root / folder}" for folder in _IDX_FOLDERS]
    searched += [str(root / folder / f"{split}-*.parquet") for folder in _PARQUET_FOLDERS]
    return searched
