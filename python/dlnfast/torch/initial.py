# SPDX-License-Identifier: MIT
"""Initial weights of PyTorch models by the laws of `dlnfast.initial`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import nn

from .. import initial as distributions
from .._arrays import FloatArray, check_choice, per_layer, random_generator
from ._reading import describe_computation
from .layers import LayerChoice, WeightMatrix, weight_matrices

Scale = distributions.Scale
DISTRIBUTIONS: Final[dict[str, Any]] = {
    "orthogonal": distributions.orthogonal,
    "gaussian": distributions.gaussian,
    "uniform": distributions.uniform,
}

_BIASES: Final = ("bias", "in_proj_bias")

_Module = TypeVar("_Module", bound=nn.Module)


def orthogonal_(model: _Module, scale: Scale = 1.0, seed: int = 0, *, layers: LayerChoice = None) -> _Module:
    """Make the chosen weights eps times matrices with orthonormal rows or columns; see `initialize_`.

    Parameters
    ----------
    model : Module
        Changed in place.
    scale, seed, layers
        As of `initialize_`.

    Returns
    -------
    Module
        The model.

    Notes
    -----
    Cost: a QR decomposition of each weight, O(d^3).
    """
    return initialize_(model, "orthogonal", scale, seed, layers=layers)


def initialize_(
    model: _Module,
    initial: str = "orthogonal",
    scale: Scale = 1.0,
    seed: int = 0,
    *,
    layers: LayerChoice = None,
) -> _Module:
    """Draw the chosen weights anew, in place, and set the biases of their layers to zero.

    Parameters
    ----------
    model : Module
    initial : {"orthogonal", "gaussian", "uniform"}
        Orthonormal columns, or rows where the matrix is wide, from Haar's law; or independent entries.
    scale : float or sequence of float
        ``eps``, for all chosen weights or one per weight: an m x n weight has Frobenius norm
        ``eps sqrt(min(m, n))`` under every law.
    seed : int
        The l-th chosen weight has the numbers of layer l in `dlnfast.orthogonal` (`dlnfast.gaussian`,
        `dlnfast.uniform`) with this seed. PyTorch's generators are not touched.
    layers : LayerChoice
        As for `weight_matrices`; None: all weights with two axes or more but embeddings.

    Returns
    -------
    Module
        The same.

    Raises
    ------
    ShapeError
        If there is not one scale per chosen weight.
    TypeError, ValueError
        For a law that is not known, a choice that fits nothing, weights that `weight_matrices` refuses, and
        a weight, or a bias of its layer, that is computed from other tensors. Nothing has been written then.

    Notes
    -----
    The table "The matrix of a layer" in the guide to networks says which matrix is drawn for every kind of
    layer. Every group of a convolution is a map of its own: its rows are drawn apart, with the law, the scale
    and the norm of a weight of that size. Drawn in float64 on the host, O(m n min(m, n)) for an orthogonal
    weight. Yaras et al., arXiv 2306.01154, section 2.

    Examples
    --------
    >>> import torch
    >>> import dlnfast as dln
    >>> layer = dln.torch.orthogonal_(torch.nn.Linear(3, 3), scale=0.5)
    >>> torch.allclose(layer.weight @ layer.weight.T, 0.25 * torch.eye(3))
    True
    """
    check_choice(initial, "initial", DISTRIBUTIONS)
    chosen = weight_matrices(model, layers)
    scales = per_layer(scale, "scale (eps)", len(chosen))
    for matrix in chosen:
        if (how := describe_computation(matrix.module, matrix.attribute)) is not None:
            raise ValueError(
                f"layers: {matrix.name!r} is computed from other tensors (by {how}); initialise "
                f"it before, or choose those: '{matrix.name}.factors.*' after overparameterize"
            )
        for name in _BIASES:
            if (how := describe_computation(matrix.module, name)) is not None:
                raise ValueError(
                    f"layers: the {name} of {matrix.name!r} is computed from other tensors (by {how}) and "
                    "cannot be set to zero; initialise it before"
                )
    with torch.no_grad():
        for number, (matrix, eps) in enumerate(zip(chosen, scales, strict=True)):
            if not matrix.module._parameters[matrix.attribute].is_meta:  # type: ignore[union-attr]
                matrix.write(torch.from_numpy(_draw_weight(initial, matrix, float(eps), seed, number)))
            for name in _BIASES:
                bias = matrix.module._parameters.get(name)
                if bias is not None:
                    bias.zero_()
    return model


def draw_weights(
    initial: str, widths: Sequence[int], scale: Scale, seed: int, before: int = 0
) -> list[FloatArray]:
    """Return the layers of a seed between these widths, the first of them with the number before + 1."""
    scales = per_layer(scale, "scale (eps)", len(widths) - 1)
    # No layer of a seed depends on the others, so that thin ones can stand for those before.
    drawn: list[FloatArray] = DISTRIBUTIONS[initial](
        [1] * before + list(widths), np.concatenate([np.zeros(before), scales]), seed
    )
    return drawn[before:]


def _draw_weight(initial: str, matrix: WeightMatrix, scale: float, seed: int, before: int) -> FloatArray:
    """Return new values of a weight; every group of a convolution is a map of its own, and drawn apart."""
    rows, columns = matrix.shape
    widths = [columns, rows // matrix.groups]
    blocks = [draw_weights(initial, widths, scale, seed, before)[0]]
    for group in range(1, matrix.groups):
        own_seed = int(random_generator(seed, ("group", before, group)).integers(2**63))
        blocks.append(draw_weights(initial, widths, scale, own_seed, before)[0])
    return np.concatenate(blocks)
