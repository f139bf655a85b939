# SPDX-License-Identifier: MIT
"""MovieLens ratings from .npz and text files."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import IO, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .._support.arrays import IntArray
from .folder import data_root, read_npz

_MOVIELENS_NPZ: Final = "movielens_latest_small.npz"
_MOVIELENS_KEYS: Final = ("users", "items", "ratings_x2", "user_ids", "movie_ids")
_CSV_HEADER: Final = "userId,movieId,rating"
#: Name of a file, separator of its fields, and folders in which its archives contain it.
_MOVIELENS_FILES: Final = (
    ("ratings.csv", ",", (".", "ml-latest-small", "ml-latest", "ml-32m", "ml-25m", "ml-20m")),
    ("u.data", "\t", (".", "ml-100k")),
    ("ratings.dat", "::", (".", "ml-1m", "ml-10M100K")),
)
#: Number of characters that are parsed at a time; the text of a large file is never in memory as a whole.
_TEXT_BYTES: Final = 2**22
_MAX_LINE_CHARACTERS: Final = 2**16


class Ratings(NamedTuple):
    """Ratings of items by users: entry n is ``ratings[n]``, by user ``users[n]``, of item ``items[n]``.

    Attributes
    ----------
    users, items : ndarray of int64, shape (n,)
        Row and column of each rating in the matrix of ratings, from 0, without gaps.
    ratings : ndarray of float64, shape (n,)
        Number of stars.
    user_ids, item_ids : ndarray of int64
        Ids in the data set, ascending: user u has the id ``user_ids[u]``.
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
        File or folder. Default: the environment variable ``DLNFAST_DATA``. The first of these that exists, in
        the folder itself or in a subfolder named like the archive, is read:

        * ``movielens_latest_small.npz`` with the arrays ``users``, ``items`` (from 0), ``ratings_x2`` (twice
          the stars), ``user_ids`` and ``movie_ids``;
        * ``ratings.csv`` of ml-latest-small, ml-latest, ml-32m, ml-25m or ml-20m;
        * ``u.data`` of MovieLens-100K;
        * ``ratings.dat`` of MovieLens-1M or 10M.

        The suffix of a file, ``.npz``, ``.csv``, ``.data`` or ``.dat``, determines its format.

    Returns
    -------
    Ratings
        The ratings in the order of the file.

    Raises
    ------
    FileNotFoundError
        If there are no such files. The message lists the searched paths.
    ValueError
        If a file is damaged. The message names the line.

    Notes
    -----
    Cost: O(n log n) time, 40 bytes of memory per rating. Timestamps are ignored.

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
    searched = [str(npz)]
    for name, separator, folders in _MOVIELENS_FILES:
        for folder in folders:
            file = root / folder / name
            if file.is_file():
                return _read_ratings(file, separator)
            searched.append(str(file))
    raise FileNotFoundError(f"no MovieLens ratings at {root}; looked for {'; '.join(searched)}")


def _read_movielens_npz(path: Path) -> Ratings:
    users, items, doubled, user_ids, item_ids = read_npz(path, *_MOVIELENS_KEYS)
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
    """Read a text file with user, item and rating in the first three fields of each line."""
    columns: list[list[npt.NDArray[np.float64]]] = [[], [], []]
    line = 1
    with path.open(encoding="utf-8-sig", errors="replace") as stream:
        if separator == ",":
            header = stream.readline(_MAX_LINE_CHARACTERS).strip()
            if not header.startswith(_CSV_HEADER):
                raise ValueError(f"{path} starts with {header[:60]!r}; wanted {_CSV_HEADER},timestamp")
            line = 2
        while lines := _read_lines(stream, path):
            for column, part in zip(columns, _parse_lines(lines, separator, path, line), strict=True):
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


def _read_lines(stream: IO[str], path: Path) -> list[str]:
    """Read the next lines, about `_TEXT_BYTES` characters in total."""
    lines: list[str] = []
    count = 0
    while count < _TEXT_BYTES and (line := stream.readline(_MAX_LINE_CHARACTERS)):
        if len(line) == _MAX_LINE_CHARACTERS:
            raise ValueError(f"{path} has a line of more than {_MAX_LINE_CHARACTERS} characters")
        lines.append(line)
        count += len(line)
    return lines


def _parse_lines(
    lines: list[str], separator: str, path: Path, first: int
) -> tuple[npt.NDArray[np.float64], ...]:
    """Return the user, the item and the rating of each line; `first` is the number of the first line."""
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
    # A line is wrong: find it for the message.
    for n, line in enumerate(lines):
        fields = line.rstrip("\r\n").split(separator)
        try:
            is_valid = all(math.isfinite(float(field)) for field in fields[:3]) and len(fields) >= 3
        except ValueError:
            is_valid = False
        if not is_valid:
            raise ValueError(
                f"line {first + n} of {path} is {line.rstrip()[:60]!r}; wanted user, item and rating, "
                f"separated by {separator!r}"
            )
    raise ValueError(f"{path} cannot be read as numbers separated by {separator!r}")


def _check_stars(stars: npt.NDArray[np.float64], path: Path) -> None:
    if stars.min() < 0 or stars.max() > 5:
        raise ValueError(f"{path} holds ratings {stars.min():g} .. {stars.max():g}; wanted 0 to 5 stars")
