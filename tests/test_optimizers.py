# SPDX-License-Identifier: MIT
"""Updates made of products and functions of singular values keep the invariant subspaces."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.matrices import draw_orthonormal
from tolerances import tolerance

import dlnfast as dln


def polar(gradient):
    left, values, right_t = np.linalg.svd(gradient, full_matrices=False)
    is_significant = values > 1e-10 * values[0]
    return left[:, is_significant] @ right_t[is_significant]


def newton_schulz(gradient):
    """Return Muon's approximation of the polar factor, a polynomial iteration."""
    X = gradient / np.linalg.norm(gradient)
    for _ in range(5):
        square = X @ X.T
        X = 3.4445 * X - 4.7750 * square @ X + 2.0315 * square @ square @ X
    return X


def root_of(matrix, power):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, 0.0) ** power) @ vectors.T


class Muon:
    def __init__(self, orthogonalise=polar):
        self.momentum, self.orthogonalise = 0.0, orthogonalise

    def update(self, gradient):
        self.momentum = 0.9 * self.momentum + gradient
        return 0.02 * self.orthogonalise(gradient + 0.9 * self.momentum)


class Shampoo:
    def __init__(self):
        self.left = self.right = None

    def update(self, gradient):
        rows, columns = gradient.shape
        if self.left is None:
            self.left, self.right = 1e-4 * np.eye(rows), 1e-4 * np.eye(columns)
        self.left = self.left + gradient @ gradient.T
        self.right = self.right + gradient.T @ gradient
        return 0.02 * root_of(self.left, -0.25) @ gradient @ root_of(self.right, -0.25)


class Nesterov:
    momentum = 0.0

    def update(self, gradient):
        self.momentum = 0.9 * self.momentum + gradient
        return gradient + 0.9 * self.momentum


class Adam:
    first = second = 0.0
    steps = 0

    def update(self, gradient):
        self.steps += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        mean, square = self.first / (1 - 0.9**self.steps), self.second / (1 - 0.999**self.steps)
        return 0.02 * mean / (np.sqrt(square) + 1e-8)


def share_outside(space, weights):
    """Return the largest share of a layer that maps active directions out of the active subspace."""
    return max(
        np.linalg.norm((w - space.bases[i + 1] @ (space.bases[i + 1].T @ w)) @ space.bases[i])
        / np.linalg.norm(w)
        for i, w in enumerate(weights)
    )


KEEPING = {
    "muon": Muon,
    "muon by Newton-Schulz": lambda: Muon(newton_schulz),
    "shampoo": Shampoo,
    "nesterov": Nesterov,
}


def split_problems():
    yield dln.low_rank_recovery(30, 3), [30] * 4
    yield dln.classification(3, 10), [30, 30, 30, 3]
    spiked = np.eye(20) + 3.0 * np.outer(np.eye(20)[0], np.eye(20)[0])
    frame = draw_orthonormal(0, 20, 2)
    yield dln.Problem(dln.LowRank(frame, [3.0, 2.0], frame[::-1]).dense(), spiked, loss_scale=0.01), [20] * 3


def end_of(make, problem, weights, steps=40):
    rules = [make() for _ in weights]
    for _ in range(steps):
        gradients = dln.gradients(problem, weights)
        weights = [w - rule.update(g) for w, rule, g in zip(weights, rules, gradients, strict=True)]
    return weights


@pytest.mark.parametrize(("problem", "widths"), list(split_problems()), ids=["recovery", "wide", "spiked"])
@pytest.mark.parametrize("name", KEEPING)
def test_updates_of_products_and_singular_values_preserve_the_subspaces(name, problem, widths):
    weights = dln.orthogonal(widths, 0.5, seed=1)
    space = dln.closure(problem, weights)
    end = end_of(KEEPING[name], problem, weights)
    assert max(np.abs(a - b).max() for a, b in zip(end, weights, strict=True)) > 1e-3  # they moved
    # Inverse roots and the polar factor raise rounding of the smallest values, cut at 1e-10, to that of 1.
    assert share_outside(space, end) < 100 * tolerance(np.float64, max(widths), 40)


@pytest.mark.parametrize(("problem", "widths"), list(split_problems()), ids=["recovery", "wide", "spiked"])
def test_adam_leaves_the_invariant_subspaces(problem, widths):
    weights = dln.orthogonal(widths, 0.5, seed=1)
    space = dln.closure(problem, weights)
    assert share_outside(space, weights) < tolerance(np.float64, max(widths))
    assert share_outside(space, end_of(Adam, problem, weights)) > 0.05
