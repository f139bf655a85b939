# SPDX-License-Identifier: MIT
"""Ratings from files: every public layout, damaged files, and the real data set where it is available."""

from __future__ import annotations

import io

import numpy as np
import pytest
from helpers.data_folder import find_data_folder

import dlnfast as dln

# user, item, rating, time; ids with gaps and out of order
ROWS = [(7, 30, 4.0, 100), (2, 10, 3.5, 101), (7, 10, 0.5, 102), (9, 31, 5.0, 103)]
USERS, ITEMS, STARS = [1, 0, 1, 2], [1, 0, 0, 2], [4.0, 3.5, 0.5, 5.0]
USER_IDS, ITEM_IDS = [2, 7, 9], [10, 30, 31]


def assert_small_ratings(ratings, stars=STARS):
    assert isinstance(ratings, dln.Ratings)
    for name, expected in zip(ratings._fields, (USERS, ITEMS, stars, USER_IDS, ITEM_IDS), strict=True):
        array = getattr(ratings, name)
        assert array.dtype == (np.float64 if name == "ratings" else np.int64)
        assert array.tolist() == expected


def arrays(**changes):
    known = {
        "users": np.array(USERS, np.int32),
        "items": np.array(ITEMS, np.int32),
        "ratings_x2": np.array([8, 7, 1, 10], np.int8),
        "user_ids": np.array(USER_IDS, np.int32),
        "movie_ids": np.array(ITEM_IDS, np.int32),
    }
    return {name: array for name, array in (known | changes).items() if array is not None}


def csv(end="\n", header="userId,movieId,rating,timestamp"):
    return end.join([header, *(f"{u},{i},{r},{t}" for u, i, r, t in ROWS)]) + end


def lines(separator, rows=ROWS):
    return "".join(separator.join(map(str, row)) + "\n" for row in rows)


def test_ratings_are_loaded_from_a_file_a_folder_or_the_default(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "movielens_latest_small.npz", **arrays())
    assert_small_ratings(dln.load_movielens(tmp_path))
    assert_small_ratings(dln.load_movielens(str(tmp_path / "movielens_latest_small.npz")))
    monkeypatch.setenv("DLNFAST_DATA", str(tmp_path))
    assert_small_ratings(dln.load_movielens())


@pytest.mark.parametrize("folder", [".", "ml-latest-small", "ml-25m"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_ratings_are_loaded_from_csv(tmp_path, folder, end):
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "ratings.csv").write_bytes(csv(end).encode())
    assert_small_ratings(dln.load_movielens(tmp_path))
    assert_small_ratings(dln.load_movielens(tmp_path / folder / "ratings.csv"))


def test_ratings_are_loaded_from_csv_with_a_byte_order_mark_and_no_final_newline(tmp_path):
    (tmp_path / "ratings.csv").write_text("\ufeff" + csv().rstrip("\n"), encoding="utf-8")
    assert_small_ratings(dln.load_movielens(tmp_path))


@pytest.mark.parametrize(
    ("folder", "name", "separator"),
    [
        (".", "u.data", "\t"),
        ("ml-100k", "u.data", "\t"),
        (".", "ratings.dat", "::"),
        ("ml-1m", "ratings.dat", "::"),
        ("ml-10M100K", "ratings.dat", "::"),
    ],
)
def test_ratings_are_loaded_from_older_layouts(tmp_path, folder, name, separator):
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / name).write_text(lines(separator))
    assert_small_ratings(dln.load_movielens(tmp_path))
    assert_small_ratings(dln.load_movielens(tmp_path / folder / name))


def test_large_files_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("dlnfast._datasets.ratings._TEXT_BYTES", 10)
    (tmp_path / "ratings.csv").write_text(csv())
    assert_small_ratings(dln.load_movielens(tmp_path))
    (tmp_path / "ratings.csv").write_text(csv() + "1,2\n")
    with pytest.raises(ValueError, match=r"line 6 of .*ratings\.csv is '1,2'"):
        dln.load_movielens(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ratings.csv", "", "starts with ''; wanted userId,movieId,rating"),
        ("ratings.csv", "movieId,title,genres\n", "starts with 'movieId,title,genres'"),
        ("ratings.csv", csv().split("\n")[0] + "\n", "holds no ratings"),
        (
            "ratings.csv",
            csv() + "1,2,five,3\n",
            r"line 6 of .* is '1,2,five,3'; wanted user, item and rating",
        ),
        ("ratings.csv", csv() + "1,2,nan,3\n", "line 6"),
        ("ratings.csv", csv() + "\n", "line 6 of .* is ''"),
        ("ratings.csv", csv() + "1.5,2,3,3\n", "users that are no integers"),
        ("ratings.csv", csv() + "1,-2,3,3\n", "items that are no integers from 0"),
        ("ratings.csv", csv() + "1,2,9,3\n", r"ratings 0\.5 \.\. 9; wanted 0 to 5 stars"),
        ("u.data", "1 2 3 4\n", "line 1 of .*u.data"),
        ("ratings.dat", "1::2\n", r"line 1 of .*separated by '::'"),
    ],
)
def test_an_error_names_damaged_text(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        dln.load_movielens(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": None}, "cannot be read as an .npz file with users, items"),
        ({"users": np.array([None] * 4)}, "cannot be read"),
        ({"users": np.array(USERS[:3])}, "holds 4 ratings, but 3 users"),
        ({"items": np.array([0, 1, 2, 3])}, r"holds items 0 \.\. 3; wanted 0\.\.2"),
        ({"users": np.array([0, 1, -1, 2])}, r"holds users -1 \.\. 2"),
        ({"user_ids": np.ones(3)}, r"user_ids of shape \(3,\), float64; wanted a vector of integers"),
        ({"ratings_x2": np.array([8, 7, 1, 11])}, r"ratings 0\.5 \.\. 5\.5"),
    ],
)
def test_errors_name_damaged_arrays(tmp_path, changes, message):
    np.savez(tmp_path / "movielens_latest_small.npz", **arrays(**changes))
    with pytest.raises(ValueError, match=message):
        dln.load_movielens(tmp_path)


@pytest.mark.parametrize("kind", ["empty", "garbage", "truncated", "array"])
def test_errors_name_damaged_npz_files(tmp_path, kind):
    stream = io.BytesIO()
    if kind == "array":
        np.save(stream, np.arange(5))
    else:
        np.savez(stream, **arrays())
    content = stream.getvalue()
    content = {"empty": b"", "garbage": b"garbage" * 9, "truncated": content[:-40]}.get(kind, content)
    (tmp_path / "movielens_latest_small.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"movielens_latest_small\.npz cannot be read"):
        dln.load_movielens(tmp_path)


def test_missing_data_name_every_path_that_was_tried(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as caught:
        dln.load_movielens(tmp_path)
    for path in (
        "movielens_latest_small.npz",
        "ml-latest-small/ratings.csv",
        "ml-100k/u.data",
        "ml-1m/ratings.dat",
    ):
        assert str(tmp_path / path) in str(caught.value)
    monkeypatch.delenv("DLNFAST_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"DLNFAST_DATA is not set.*ratings\.csv, u\.data"):
        dln.load_movielens()


def test_the_real_movielens_set_has_its_published_counts():
    folder = find_data_folder("movielens_latest_small.npz")
    users, items, stars, user_ids, item_ids = dln.load_movielens(folder)
    # The counts of its README.
    assert (users.size, user_ids.size, item_ids.size) == (100_836, 610, 9724)
    assert np.unique(users * item_ids.size + items).size == users.size
    assert np.unique(stars).tolist() == (np.arange(1, 11) / 2).tolist()
    assert np.bincount(users).min() >= 20  # "all selected users had rated at least 20 movies"
    assert user_ids.tolist() == list(range(1, 611))
