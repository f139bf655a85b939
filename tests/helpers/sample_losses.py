# SPDX-License-Identifier: MIT
"""Few samples of a linear map, and the loss of weights on them in extended precision."""

from __future__ import annotations

import numpy as np
from tolerances import tolerance

import dlnfast as dln


def draw_few_samples(dim, *, n_samples, n_outputs, seed=0, orthonormal=False, repeated=False):
    """Return N < d samples of a linear map, which some W fits exactly."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((dim, n_samples))
    if orthonormal:
        X = np.linalg.qr(X)[0]
    if repeated:
        X[:, -1] = X[:, 0]
    return X, rng.standard_normal((n_outputs, dim)) @ X / dim


def true_loss(problem, weights, X, Y):
    """Return the loss of the samples in extended precision, and its resolution in double precision."""
    product = np.eye(len(X), dtype=np.longdouble)
    size = np.linalg.norm(X)
    for W in weights:
        product = W.astype(np.longdouble) @ product
        size *= np.linalg.norm(W, 2)
    residual = product @ X.astype(np.longdouble) - Y.astype(np.longdouble)
    unseen = tolerance(weights[0].dtype, max(len(X), len(Y))) * (size + np.linalg.norm(Y))
    scale = problem.loss_scale / 2
    return float(scale * np.sum(residual**2)), float(scale * unseen**2)


def make_orthogonal_layers(dim, *, n_outputs, depth=3):
    return dln.orthogonal([dim] * depth + [n_outputs], scale=0.5, seed=0)
