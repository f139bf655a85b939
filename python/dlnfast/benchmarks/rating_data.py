# SPDX-License-Identifier: MIT
"""Partly known matrices for the case `ratings`: MovieLens, and generated ones of six kinds.

The defaults of `MatrixCompletion` were chosen on MovieLens small, on other generated matrices, and on the
kind "powers". The other kinds were not used.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from .._completion.entries import Entries
from .._datasets.ratings import load_movielens

__all__ = ["KINDS", "SEEN", "large_ratings", "load_ratings", "small_ratings"]

_Array = npt.NDArray[np.float64]
_Positions = npt.NDArray[np.int64]


def load_ratings() -> Entries | None:
    """Return MovieLens small; None if DLNFAST_DATA names no folder that has it."""
    if not os.environ.get("DLNFAST_DATA") or not Path(os.environ["DLNFAST_DATA"]).exists():
        return None
    try:
        users, items, stars, user_ids, item_ids = load_movielens()
    except FileNotFoundError:
        return None
    return Entries(users, items, stars, (user_ids.size, item_ids.size))


def small_ratings() -> Entries:
    """Return ratings of low rank with noise, for a quick test of the case."""
    rng = np.random.default_rng(0)
    shape, n = (70, 90), 1500
    i, j = _draw_uniformly(rng, shape, n)
    left, right = rng.standard_normal((shape[0], 2)), rng.standard_normal((shape[1], 2))
    stars = 3 + np.sum(left[i] * right[j], axis=1) / 2 + 0.3 * rng.standard_normal(n)
    return Entries(i, j, np.clip(np.round(2 * stars) / 2, 0.5, 5.0), shape)


def _draw_uniformly(
    rng: np.random.Generator, shape: tuple[int, int], n: int
) -> tuple[_Positions, _Positions]:
    index = rng.choice(shape[0] * shape[1], n, replace=False)
    return index // shape[1], index % shape[1]


def _draw_popular(
    rng: np.random.Generator, shape: tuple[int, int], n: int, skew: tuple[float, float]
) -> tuple[_Positions, _Positions]:
    """Draw n distinct positions of which rows and columns have counts that fall by power laws."""
    sides = []
    for size, power in zip(shape, skew, strict=True):
        share = (np.arange(size) + 10.0) ** -power
        sides.append(rng.choice(size, 3 * n, p=share / share.sum()))
    index = rng.permutation(np.unique(sides[0] * shape[1] + sides[1]))[:n]
    return index // shape[1], index % shape[1]


def _inner(left: _Array, right: _Array, i: _Positions, j: _Positions) -> _Array:
    return np.asarray(np.einsum("nk,nk->n", left[i], right[j]))


def _stars(rng: np.random.Generator) -> Entries:
    """Return half stars of users who rate popular and good items more; eight tastes of falling weight."""
    shape = 3000, 2000
    i, j = _draw_popular(rng, shape, 150_000, (0.8, 0.9))
    weight = 0.7 ** np.arange(8)
    left, right = rng.standard_normal((shape[0], 8)) * weight, rng.standard_normal((shape[1], 8))
    users = 0.45 * rng.standard_normal(shape[0])
    items = 0.35 * rng.standard_normal(shape[1]) - 0.25 * np.log10(np.arange(shape[1]) + 10.0)
    care = np.exp(0.25 * rng.standard_normal(shape[0]))
    stars = 4.3 + users[i] + items[j] + 0.3 * _inner(left, right, i, j)
    stars += 0.7 * care[i] * rng.standard_normal(i.size)
    return Entries(i, j, np.clip(np.round(2 * stars) / 2, 0.5, 5.0), shape)


def _survey(rng: np.random.Generator) -> Entries:
    """Return answers from 1 to 7 to 40 questions about six correlated traits; questions differ in noise."""
    shape = 2000, 40
    mixing = np.eye(6) + 0.3 * rng.standard_normal((6, 6))
    traits = rng.standard_normal((shape[0], 6)) @ mixing
    loading = np.zeros((shape[1], 6))
    loading[np.arange(40), np.arange(40) % 6] = rng.uniform(0.4, 1.1, 40) * rng.choice([-1.0, 1.0], 40)
    answers = rng.uniform(3.0, 5.0, 40) + traits @ loading.T
    answers += 0.4 * rng.standard_normal((shape[0], 1))  # how much somebody agrees to everything
    answers += rng.uniform(0.6, 1.4, 40) * rng.standard_normal(shape)
    i, j = np.nonzero(rng.random(shape) < 0.8)
    return Entries(i, j, np.clip(np.round(answers[i, j]), 1.0, 7.0), shape)


def _sensors(rng: np.random.Generator) -> Entries:
    """Return smooth signals of 300 sensors over 1500 times, with noise of heavy tails."""
    shape = 300, 1500
    time = np.arange(shape[1]) / shape[1]
    waves = [np.sin(2 * np.pi * (frequency * time + rng.random())) for frequency in (1, 2, 3, 5, 9, 17)]
    signals = rng.standard_normal((shape[0], 6)) @ (
        np.array(waves) * np.array([2, 1.5, 1, 1, 0.6, 0.4])[:, None]
    )
    i, j = _draw_uniformly(rng, shape, 90_000)
    return Entries(i, j, 20.0 + signals[i, j] + 0.4 * rng.standard_t(4, i.size), shape)


def _powers(rng: np.random.Generator) -> Entries:
    """Return a matrix with singular values i^-0.8 up to 60, three fifths of it known, with little noise."""
    shape = 1000, 200
    left, right = rng.standard_normal((shape[0], 60)), rng.standard_normal((shape[1], 60))
    left *= np.arange(1.0, 61.0) ** -0.8
    i, j = _draw_uniformly(rng, shape, 120_000)
    return Entries(i, j, _inner(left, right, i, j) + 0.15 * rng.standard_normal(i.size), shape)


def _traffic(rng: np.random.Generator) -> Entries:
    """Return logarithms of flows on 700 roads in 900 hours: twelve patterns, noise that differs by road."""
    shape = 700, 900
    roads, hours = rng.gamma(0.6, 1.0, (shape[0], 12)), rng.gamma(0.8, 1.0, (shape[1], 12))
    i, j = _draw_popular(rng, shape, 150_000, (0.5, 0.2))
    flows = np.log1p(_inner(roads, hours, i, j))
    noise = np.exp(0.4 * rng.standard_normal(shape[0])) * 0.25
    return Entries(i, j, flows + noise[i] * rng.standard_normal(i.size), shape)


def _deep(rng: np.random.Generator) -> Entries:
    """Return a product of four Gaussian matrices of width 30, known at 8 of 100 positions."""
    shape = 1500, 1000
    product = rng.standard_normal((shape[0], 30))
    for _ in range(2):
        product = product @ rng.standard_normal((30, 30)) / np.sqrt(30)
    i, j = _draw_popular(rng, shape, 120_000, (0.3, 0.3))
    values = _inner(product, rng.standard_normal((shape[1], 30)) / np.sqrt(30), i, j)
    return Entries(i, j, values + 0.6 * rng.standard_normal(i.size), shape)


def large_ratings(rng: np.random.Generator, shape: tuple[int, int], n: int) -> Entries:
    """Return n half stars of rank 10 with biases, of rows and columns with very different counts."""
    i, j = _draw_popular(rng, shape, n, (0.6, 0.8))
    left = rng.standard_normal((shape[0], 10)) * np.sqrt(0.03)
    right = rng.standard_normal((shape[1], 10))
    users, items = 0.4 * rng.standard_normal(shape[0]), 0.5 * rng.standard_normal(shape[1])
    stars = np.empty(i.size)
    for start in range(0, i.size, 2**20):
        part = slice(start, start + 2**20)
        stars[part] = users[i[part]] + items[j[part]] + _inner(left, right, i[part], j[part])
    stars += 3.5 + 0.8 * rng.standard_normal(i.size)
    return Entries(i, j, np.clip(np.round(2 * stars) / 2, 0.5, 5.0), shape)


#: Generated matrices. All but one played no part in the choice of the defaults.
KINDS: Final[dict[str, Callable[[np.random.Generator], Entries]]] = {
    "stars": _stars,
    "survey": _survey,
    "sensors": _sensors,
    "traffic": _traffic,
    "deep": _deep,
    "powers": _powers,
}
#: The one that did: it showed that directions could vanish too early.
SEEN: Final = "powers"
