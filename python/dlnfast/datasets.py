# SPDX-License-Identifier: MIT
"""Loaders of real data sets from local copies: Fashion-MNIST, CIFAR-10, MovieLens. Nothing is downloaded."""

from __future__ import annotations

import gzip
import io
import math
import os
import pickle
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ._arrays import (
    IntArray,
    check_choice,
    check_count,
    check_path,
)
from ._optional import imported
from .files import ARCHIVE_ERRORS, max_content, read_arrays

ImageArray = npt.NDArray[np.uint8]


# --------------------------------------------------------------------------------------------------
# Fashion-MNIST
# --------------------------------------------------------------------------------------------------

_FASHION_SHAPE: Final = (28, 28)
_N_CLASSES: Final = 10
#: Images of these data sets have 28 x 28 or 32 x 32 pixels.
_MOST_PIXELS: Final = 2**16
_BLOCK_BYTES: Final = 2**20
_NPZ_NAME: Final = "fashion_mnist_full.npz"
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
        File or folder. Default: the environment variable ``DLNFAST_DATA``. Looked for, in this order:

        * ``fashion_mnist_full.npz``, or an .npz file itself, with the arrays ``x_train``, ``y_train``,
          ``x_test``, ``y_test``;
        * the original files ``train-images-idx3-ubyte`` and so on, plain or ``.gz``, in
          ``FashionMNIST/raw`` (where torchvision puts them), in ``raw`` or in the folder itself;
        * the parquet files of the Hugging Face data set, ``train-*.parquet`` and ``test-*.parquet``,
          in the folder itself, in ``fashion_mnist`` or in ``data`` (needs pyarrow and Pillow).
    split : {"train", "test"}
        60,000 or 10,000 images.
    per_class : int, optional
        Only the first so many images of every class.

    Returns
    -------
    images : ndarray of uint8, shape (N, 784)
        One image a row, pixels 0..255.
    labels : ndarray of int64, shape (N,)
        0 T-shirt/top, 1 trouser, 2 pullover, 3 dress, 4 coat, 5 sandal, 6 shirt, 7 sneaker, 8 bag,
        9 ankle boot.

    Raises
    ------
    FileNotFoundError
        Naming every place that was looked at, and where the files are to be had.
    ValueError
        For a damaged file, saying what is wrong with it.
    ImportError
        Where only parquet files are there and pyarrow is not.

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
    _check_split(split)
    count = None if per_class is None else check_count(per_class, "per_class")
    root = data_root(path)
    npz = _npz_file(root, _NPZ_NAME)
    if npz.is_file():
        images, labels = _read_npz(npz, f"x_{split}", f"y_{split}")
        return _some_images(images, labels, count, npz)
    for folder in _IDX_FOLDERS:
        found = _find_idx(root / folder, split)
        if found is not None:
            return _some_images(_read_idx(found[0], 3), _read_idx(found[1], 1), count, found[0])
    files = _find_parquet(root, _PARQUET_FOLDERS, split)
    if files:
        images, labels = _read_parquet(files, "image", count)
        return _checked_images(images, labels, files[0], _FASHION_SHAPE)
    raise missing_data("Fashion-MNIST", root, split, _places(root, split), _FASHION_SOURCE)


def _some_images(
    images: npt.NDArray[Any], labels: npt.NDArray[Any], per_class: int | None, source: Path
) -> tuple[ImageArray, IntArray]:
    checked, known = _checked_images(images, labels, source, _FASHION_SHAPE)
    rows = _first_of_each_class(known, per_class, source)
    return checked[rows], known[rows]


def _check_split(split: str) -> None:
    check_choice(split, "split", ("train", "test"))


def _npz_file(root: Path, name: str) -> Path:
    return root if root.suffix == ".npz" else root / name


def missing_data(title: str, root: Path, split: str, places: Sequence[str], source: str) -> FileNotFoundError:
    """Return the error that says where files were looked for, and where they are to be had."""
    return FileNotFoundError(
        f"no {title} ({split}) at {root}; looked for {'; '.join(places)}. Download {source}"
    )


_FASHION_FILES: Final = f"{_NPZ_NAME}, FashionMNIST/raw/*-ubyte(.gz) or the parquet files of Fashion-MNIST"


def data_root(path: str | os.PathLike[str] | None, holds: str = _FASHION_FILES) -> Path:
    """Return the folder or file that is meant: the environment variable ``DLNFAST_DATA`` by default."""
    chosen = os.environ.get("DLNFAST_DATA") if path is None else path
    if chosen is None or (isinstance(chosen, str) and not chosen):
        raise FileNotFoundError(
            "path is not given and the environment variable DLNFAST_DATA is not set: name the folder that "
            f"holds {holds}"
        )
    return check_path(chosen, "path")


def _places(root: Path, split: str) -> list[str]:
    prefix = _IDX_PREFIX[split]
    pair = f"{prefix}-images-idx3-ubyte(.gz) with {prefix}-labels-idx1-ubyte(.gz)"
    places = [str(_npz_file(root, _NPZ_NAME))]
    places += [f"{pair} in {root / folder}" for folder in _IDX_FOLDERS]
    places += [str(root / folder / f"{split}-*.parquet") for folder in _PARQUET_FOLDERS]
    return places


def _find_idx(folder: Path, split: str) -> tuple[Path, Path] | None:
    images = _plain_or_gzip(folder / f"{_IDX_PREFIX[split]}-images-idx3-ubyte")
    labels = _plain_or_gzip(folder / f"{_IDX_PREFIX[split]}-labels-idx1-ubyte")
    return None if images is None or labels is None else (images, labels)


def _plain_or_gzip(path: Path) -> Path | None:
    compressed = path.with_name(path.name + ".gz")
    return next((p for p in (path, compressed) if p.is_file()), None)


def _read_npz(path: Path, *keys: str) -> tuple[npt.NDArray[Any], ...]:
    try:
        arrays = read_arrays(path, keys)
    except ARCHIVE_ERRORS as error:
        listed = f"{', '.join(keys[:-1])} and {keys[-1]}"
        raise ValueError(f"{path} cannot be read as an .npz file with {listed}: {error}") from error
    return tuple(arrays[key] for key in keys)


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
    # Of more values than memory is taken for, none are kept.
    most = min(wanted, max_content(path.stat().st_size))
    content = stream.read(most)
    got = len(content)
    while part := stream.read(_BLOCK_BYTES):
        got += len(part)
    if got != wanted:
        raise ValueError(
            f"{path} is {'truncated' if got < wanted else 'too long'}: {got} bytes of values; its header "
            f"says {' x '.join(map(str, sizes))} = {wanted}"
        )
    if most < wanted:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, too few for {wanted} values")
    return np.frombuffer(content, dtype=np.uint8).reshape(sizes)


def _find_parquet(root: Path, folders: Sequence[str], split: str) -> list[Path]:
    """Return the files of the first folder that has any."""
    found = (sorted((root / folder).glob(f"{split}-*.parquet")) for folder in folders)
    return next((files for files in found if files), [])


def _read_parquet(
    files: Sequence[Path], column: str, per_class: int | None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return images, decoded from the bytes in a column, and labels; the first so many of each class."""
    parquet = imported("pyarrow.parquet", f"reading {files[0]}", install="pyarrow pillow")
    imported("PIL.Image", f"reading {files[0]}", install="pillow")
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
    known = np.array(labels)
    kept = _first_of_each_class(known, per_class, files[0])
    return _decode_images([cells[i] for i in kept], files[0]), known[kept]


def _decode_images(encoded: Sequence[bytes], source: Path) -> npt.NDArray[Any]:
    """Decode PNG or JPEG images of one size, (N, rows, columns) or (N, rows, columns, 3)."""
    pillow = imported("PIL.Image", f"reading {source}", install="pillow")
    images: list[npt.NDArray[Any]] = []
    for number, content in enumerate(encoded):
        try:
            image = pillow.open(io.BytesIO(content))
            if image.width * image.height > _MOST_PIXELS:  # which is known before it is decoded
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            images.append(np.asarray(image))
        except Exception as error:  # whatever a decoder makes of damaged bytes
            raise ValueError(f"{source}: image {number} cannot be decoded: {error}") from error
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"{source}: image {number} has shape {images[-1].shape}, those before it {images[0].shape}"
            )
    return np.array(images)


def _first_of_each_class(labels: npt.NDArray[Any], per_class: int | None, source: Path) -> IntArray:
    """Return the rows of the first `per_class` samples of each class, ascending; all rows for None."""
    if per_class is None:
        return np.arange(len(labels))
    _check_labels(labels, len(labels), source)
    chosen = []
    for label in range(_N_CLASSES):
        rows = np.flatnonzero(labels == label)
        if len(rows) < per_class:
            raise ValueError(f"per_class is {per_class}, but {source} holds {len(rows)} of class {label}")
        chosen.append(rows[:per_class])
    return np.sort(np.concatenate(chosen))


def _checked_images(
    images: npt.NDArray[Any], labels: npt.NDArray[Any], source: Path, shape: tuple[int, ...]
) -> tuple[ImageArray, IntArray]:
    n_images = len(images)
    if images.dtype != np.uint8 or images.shape[1:] != shape or n_images == 0:
        wanted = ", ".join(map(str, shape))
        raise ValueError(
            f"{source} holds images of shape {images.shape}, {images.dtype}; wanted (N, {wanted}), uint8"
        )
    _check_labels(labels, n_images, source)
    return images.reshape(n_images, -1), labels.astype(np.int64)


def _check_labels(labels: npt.NDArray[Any], n_images: int, source: Path) -> None:
    if labels.shape != (n_images,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{source} holds {n_images} images, but labels of shape {labels.shape}, {labels.dtype}; "
            f"wanted ({n_images},), integers"
        )
    if n_images and (labels.min() < 0 or labels.max() >= _N_CLASSES):
        raise ValueError(f"{source} holds labels {labels.min()}..{labels.max()}; wanted 0..{_N_CLASSES - 1}")


# --------------------------------------------------------------------------------------------------
# CIFAR-10
# --------------------------------------------------------------------------------------------------

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
    _check_split(split)
    count = None if per_class is None else check_count(per_class, "per_class")
    root = data_root(path, f"{_CIFAR_NPZ}, cifar-10-batches-py or the parquet files of CIFAR-10")
    npz = _npz_file(root, _CIFAR_NPZ)
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
                parts = [_checked_images(*reader(file), file, _CIFAR_SHAPE) for file in files]
                images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
                kept = _first_of_each_class(labels, count, root / folder)
                return (images, labels) if count is None else (images[kept], labels[kept])
            if len(lacking) < len(files):
                raise FileNotFoundError(
                    f"{root / folder} lacks {', '.join(lacking)} beside other files of CIFAR-10 ({split})"
                )
            first, last = files[0].name, files[-1].name
            places.append(f"{first if first == last else f'{first} .. {last}'} in {root / folder}")
    parquet = _find_parquet(root, _CIFAR_PARQUET, split)
    if parquet:
        images, labels = _read_parquet(parquet, "img", count)
        return _checked_images(_channels_first(images), labels, parquet[0], _CIFAR_SHAPE)
    places += [str(root / folder / f"{split}-*.parquet") for folder in _CIFAR_PARQUET]
    raise missing_data("CIFAR-10", root, split, places, _CIFAR_SOURCE)


_Arrays = tuple[npt.NDArray[Any], npt.NDArray[Any]]


def _channels_first(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return (N, rows, columns, channels) as (N, channels, rows, columns); other shapes as they are."""
    return np.ascontiguousarray(np.moveaxis(images, 3, 1)) if images.ndim == 4 else images


def _read_cifar_jpeg(path: Path, split: str, per_class: int | None) -> tuple[ImageArray, IntArray]:
    content, offsets, labels = _read_npz(path, f"jpeg_{split}", f"offsets_{split}", f"y_{split}")
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
    _check_labels(labels, begins.size - 1, path)
    kept = _first_of_each_class(labels, per_class, path)
    encoded = [content[begins[i] : begins[i + 1]].tobytes() for i in kept]
    return _checked_images(_channels_first(_decode_images(encoded, path)), labels[kept], path, _CIFAR_SHAPE)


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


# --------------------------------------------------------------------------------------------------
# MovieLens
# --------------------------------------------------------------------------------------------------

_MOVIELENS_NPZ: Final = "movielens_latest_small.npz"
_MOVIELENS_KEYS: Final = ("users", "items", "ratings_x2", "user_ids", "movie_ids")
_CSV_HEADER: Final = "userId,movieId,rating"
#: Name of a file, what separates its fields, and the folders where its archive puts it.
_MOVIELENS_FILES: Final = (
    ("ratings.csv", ",", (".", "ml-latest-small", "ml-latest", "ml-32m", "ml-25m", "ml-20m")),
    ("u.data", "\t", (".", "ml-100k")),
    ("ratings.dat", "::", (".", "ml-1m", "ml-10M100K")),
)
#: Characters read at a time, so that the text of 25 million ratings is never held at once.
_TEXT_BYTES: Final = 2**22


_LONGEST_LINE: Final = 2**16


class Ratings(NamedTuple):
    """Ratings of items by users: entry n is ``ratings[n]``, by user ``users[n]``, of item ``items[n]``.

    Attributes
    ----------
    users, items : ndarray of int64, shape (n,)
        From 0, without gaps: rows and columns of the matrix of ratings.
    ratings : ndarray of float64, shape (n,)
        Stars.
    user_ids, item_ids : ndarray of int64
        What the data set calls them: user u is ``user_ids[u]``. Ascending.
    """

    users: IntArray
    items: IntArray
    ratings: npt.NDArray[np.float64]
    user_ids: IntArray
    item_ids: IntArray


def load_movielens(path: str | os.PathLike[str] | None = None) -> Ratings:
    """Read MovieLens ratings from a local copy; nothing is downloaded.

    Parameters
    ----------
    path : path, optional
        File or folder. Default: the environment variable ``DLNFAST_DATA``. Looked for, in this order, in the
        folder itself and in that of the archive:

        * ``movielens_latest_small.npz`` with the arrays ``users``, ``items`` (from 0), ``ratings_x2`` (twice
          the stars), ``user_ids`` and ``movie_ids``;
        * ``ratings.csv`` of ml-latest-small, ml-latest, ml-32m, ml-25m or ml-20m;
        * ``u.data`` of MovieLens-100K;
        * ``ratings.dat`` of MovieLens-1M or 10M.

        A file is taken for one of these by its ending: ``.npz``, ``.csv``, ``.data`` or ``.dat``.

    Returns
    -------
    Ratings
        In the order of the file.

    Raises
    ------
    FileNotFoundError
        Naming every place that was looked at.
    ValueError
        For a damaged file, saying what is wrong with it, and in which line.

    Notes
    -----
    O(n log n); 40 bytes a rating. Timestamps are left out.

    Harper, Konstan, "The MovieLens datasets: history and context", ACM Transactions on Interactive
    Intelligent Systems 5 (2015).

    Examples
    --------
    >>> from dlnfast import load_movielens
    >>> ratings = load_movielens("data")  # doctest: +SKIP
    >>> len(ratings.ratings), len(ratings.user_ids), len(ratings.item_ids)  # doctest: +SKIP
    (100836, 610, 9724)
    """
    root = data_root(path, f"{_MOVIELENS_NPZ}, ratings.csv, u.data or ratings.dat")
    if root.is_file():
        for name, separator, _ in _MOVIELENS_FILES:
            if root.suffix == Path(name).suffix:
                return _read_ratings(root, separator)
        return _read_movielens_npz(root)
    npz = root / _MOVIELENS_NPZ
    if npz.is_file():
        return _read_movielens_npz(npz)
    places = [str(npz)]
    for name, separator, folders in _MOVIELENS_FILES:
        for folder in folders:
            file = root / folder / name
            if file.is_file():
                return _read_ratings(file, separator)
            places.append(str(file))
    raise FileNotFoundError(f"no MovieLens ratings at {root}; looked for {'; '.join(places)}")


def _read_movielens_npz(path: Path) -> Ratings:
    users, items, doubled, user_ids, item_ids = _read_npz(path, *_MOVIELENS_KEYS)
    n = doubled.size
    for name, array in zip(_MOVIELENS_KEYS, (users, items, doubled, user_ids, item_ids), strict=True):
        if array.dtype.kind not in "iu" or array.ndim != 1 or array.size == 0:
            raise ValueError(
                f"{path} holds {name} of shape {array.shape}, {array.dtype}; wanted a vector of integers"
            )
    for name, index, ids in (("users", users, user_ids), ("items", items, item_ids)):
        if index.size != n:
            raise ValueError(f"{path} holds {n} ratings, but {index.size} {name}")
        if index.min() < 0 or index.max() >= ids.size:
            raise ValueError(f"{path} holds {name} {index.min()} .. {index.max()}; wanted 0..{ids.size - 1}")
    _check_stars(doubled / 2, path)
    return Ratings(
        users.astype(np.int64),
        items.astype(np.int64),
        doubled / 2,
        user_ids.astype(np.int64),
        item_ids.astype(np.int64),
    )


def _read_ratings(path: Path, separator: str) -> Ratings:
    """Read lines of user, item, rating and, mostly, a time."""
    columns: list[list[npt.NDArray[np.float64]]] = [[], [], []]
    line = 1
    with path.open(encoding="utf-8-sig", errors="replace") as stream:
        if separator == ",":
            header = stream.readline(_LONGEST_LINE).strip()
            if not header.startswith(_CSV_HEADER):
                raise ValueError(f"{path} starts with {header[:60]!r}; wanted {_CSV_HEADER},timestamp")
            line = 2
        while lines := _some_lines(stream, path):
            for column, part in zip(columns, _numbers_of(lines, separator, path, line), strict=True):
                column.append(part)
            line += len(lines)
    if not columns[0]:
        raise ValueError(f"{path} holds no ratings")
    users, items, stars = (np.concatenate(parts) for parts in columns)
    for name, ids in (("users", users), ("items", items)):
        if np.any(ids != np.floor(ids)) or ids.min() < 0:
            raise ValueError(f"{path} holds {name} that are no integers from 0")
    _check_stars(stars, path)
    user_ids, user = np.unique(users.astype(np.int64), return_inverse=True)
    item_ids, item = np.unique(items.astype(np.int64), return_inverse=True)
    return Ratings(user.astype(np.int64), item.astype(np.int64), stars, user_ids, item_ids)


def _some_lines(stream: IO[str], path: Path) -> list[str]:
    """Return the next lines, of about `_TEXT_BYTES` in all."""
    lines: list[str] = []
    count = 0
    while count < _TEXT_BYTES and (line := stream.readline(_LONGEST_LINE)):
        if len(line) == _LONGEST_LINE:
            raise ValueError(f"{path} has a line of more than {_LONGEST_LINE} characters")
        lines.append(line)
        count += len(line)
    return lines


def _numbers_of(
    lines: list[str], separator: str, path: Path, first: int
) -> tuple[npt.NDArray[np.float64], ...]:
    """Return user, item and rating of each line."""
    text = [line.replace("::", "\t") for line in lines] if separator == "::" else lines
    delimiter = "\t" if separator == "::" else separator
    try:
        table = np.loadtxt(
            text, delimiter=delimiter, usecols=(0, 1, 2), dtype=np.float64, ndmin=2, comments=None
        )
        if len(table) == len(lines) and np.isfinite(table).all():
            return table[:, 0], table[:, 1], table[:, 2]
    except ValueError:
        pass
    # Something is wrong; look for the line.
    for n, line in enumerate(lines):
        fields = line.rstrip("\r\n").split(separator)
        try:
            good = all(math.isfinite(float(field)) for field in fields[:3]) and len(fields) >= 3
        except ValueError:
            good = False
        if not good:
            raise ValueError(
                f"line {first + n} of {path} is {line.rstrip()[:60]!r}; wanted user, item and rating, "
                f"separated by {separator!r}"
            )
    raise ValueError(f"{path} cannot be read as numbers separated by {separator!r}")


def _check_stars(stars: npt.NDArray[np.float64], path: Path) -> None:
    if stars.min() < 0 or stars.max() > 5:
        raise ValueError(f"{path} holds ratings {stars.min():g} .. {stars.max():g}; wanted 0 to 5 stars")
