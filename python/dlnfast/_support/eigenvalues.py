# SPDX-License-Identifier: MIT
"""`largest_eigenvalues`: Lanczos iteration for symmetric operators, also for multiple eigenvalues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from .arrays import FloatArray, random_generator

#: Largest number of Lanczos steps from one start.
MAX_ITERATIONS: Final = 300
#: Least number of steps between two tests for convergence, and their share of the steps so far: a test
#: decomposes a matrix of as many rows as there were steps.
_STEPS_PER_TEST: Final = 4
_TEST_SHARE: Final = 6

Product = Callable[[FloatArray], FloatArray]


def largest_eigenvalues(
    product: Product, size: int, k: int, tolerance: float, stream: str, max_iterations: int = MAX_ITERATIONS
) -> FloatArray:
    """Return the k largest eigenvalues of a symmetric operator, with their multiplicities, descending.

    Parameters
    ----------
    product : callable
        Product of the operator with a vector of shape (size,).
    size : int
        Dimension of the operator.
    k : int
        Number of eigenvalues, 1 .. size.
    tolerance : float
        Bound on the error of each value relative to the largest magnitude of an eigenvalue; at least about
        1e-12 because of rounding.
    stream : str
        Name of the stream of random numbers for the starts.
    max_iterations : int
        Largest number of Lanczos steps from one start.

    Returns
    -------
    ndarray of float64, shape (k,)

    Raises
    ------
    ValueError
        If the steps from one start do not reach the tolerance.

    Notes
    -----
    Lanczos iteration with full reorthogonalisation. From one start it finds each eigenvalue once. So it
    starts again, orthogonal to all vectors found, until no eigenvalue above the k-th is left; for k = 1 one
    start is enough. The error of a value is at most the norm of its residual.
    """
    generator = random_generator(0, (stream,))
    found = np.empty(0)
    vectors = np.empty((0, size))
    while len(found) < size:
        values, rows = _iterate(
            product, generator.standard_normal(size), vectors, min(k, size), tolerance, max_iterations
        )
        if len(found) >= k and values[0] <= np.sort(found)[-k]:
            break
        found, vectors = np.concatenate([found, values]), np.concatenate([vectors, rows])
        if k == 1:
            break
    return np.sort(found)[::-1][:k]


def _iterate(
    product: Product,
    start: FloatArray,
    excluded: FloatArray,
    k: int,
    tolerance: float,
    max_iterations: int,
) -> tuple[FloatArray, FloatArray]:
    """Return up to k largest eigenvalues, descending, and vectors as rows, orthogonal to some rows."""
    n_excluded, size = excluded.shape
    n_steps = min(size - n_excluded, max_iterations)
    basis = np.empty((n_excluded + min(n_steps, 32), size))
    basis[:n_excluded] = excluded
    diagonal: list[float] = []
    below: list[float] = []
    vector = start
    for _ in range(2):
        vector = vector - excluded.T @ (excluded @ vector)
    length = float(np.linalg.norm(vector))
    next_test = max(k, _STEPS_PER_TEST)
    for step in range(n_steps):
        end = n_excluded + step + 1
        if end > len(basis):
            basis = np.concatenate([basis, np.empty((min(len(basis), n_steps), size))])
        basis[end - 1] = vector / length
        vector = product(basis[end - 1])
        diagonal.append(float(basis[end - 1] @ vector))
        vector = vector - diagonal[-1] * basis[end - 1]
        if step:
            vector -= below[-1] * basis[end - 2]
        before, length = np.inf, float(np.linalg.norm(vector))
        while length < 0.7 * before:  # repeated where much cancelled, until the vector is orthogonal
            vector -= basis[:end].T @ (basis[:end] @ vector)
            before, length = length, float(np.linalg.norm(vector))
        size_so_far = max(map(abs, diagonal + below))
        is_invariant = length <= 1e-14 * size_so_far or step + 1 == size - n_excluded
        if is_invariant or step + 1 in (next_test, n_steps):
            next_test = step + 1 + max(_STEPS_PER_TEST, (step + 1) // _TEST_SHARE)
            values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(below, -1) + np.diag(below, 1))
            scale = max(abs(float(values[0])), abs(float(values[-1])))
            residuals = length * np.abs(vectors[-1, -k:])
            if is_invariant or residuals.max() <= tolerance * scale:
                rows = vectors[:, -k:][:, ::-1].T @ basis[n_excluded:end]
                return values[-k:][::-1], rows
        below.append(length)
    raise ValueError(f"tolerance is {tolerance:g}: not reached after {n_steps} iterations")
