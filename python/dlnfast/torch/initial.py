# SPDX-License-Identifier: MIT
"""Initial weights of PyTorch models from the distributions of `dlnfast.initial`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

import numpy as np
import torch
from torch import nn

from .._support.arrays import FloatArray, check_choice, per_layer, random_generator
from .._weights.initial import DISTRIBUTIONS
from .._weights.widths import Scale
from ._reading import describe_computation
from .layers import LayerChoice, WeightMatrix, weight_matrices

_BIASES: Final = ("bias", "in_proj_bias")

_Module = TypeVar("_Module", bound=nn.Module)


def orthogonal_(model: _Module, scale: Scale = 1.0, seed: int = 0, *, layers: LayerChoice = None) -> _Module:
    """Set the chosen weights to eps times matrices with orthonormal rows or columns, in place.

    Parameters
    ----------
    model : Module
        Model to change in place.
    scale, seed, layers
        Arguments of `initialize_`.

    Returns
    -------
    Module
        The same model.

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
    """Redraw the chosen weights in place, and set the biases of their layers to zero.

    Parameters
    ----------
    model : Module
        Model to change in place.
    initial : {"orthogonal", "gaussian", "uniform"}
        Distribution of the weights. "orthogonal": orthonormal columns (rows if the matrix is wide) from the
        Haar distribution; the others have independent entries.
    scale : float or sequence of float
        Scale ``eps`` of all chosen weights, or one per weight. An m x n weight has Frobenius norm
        ``eps sqrt(min(m, n))`` for every distribution.
    seed : int
        Seed of the weights. The l-th chosen weight has the numbers of layer l in `dlnfast.orthogonal`
        (`dlnfast.gaussian`, `dlnfast.uniform`) with this seed. PyTorch's generators are not used.
    layers : LayerChoice
        Choice of weights as for `weight_matrices`; None: all weights with two axes or more except embeddings.

    Returns
    -------
    Module
        The same model.

    Raises
    ------
    ShapeError
        If the number of scales differs from the number of chosen weights.
    TypeError, ValueError
        For an unknown distribution, a choice without a match, weights that `weight_matrices` refuses, and
        a weight, or a bias of its layer, that is computed from other tensors. The model is then unchanged.

    Notes
    -----
    The table "The matrix of a layer" in the guide to networks shows the matrix of each kind of layer. Each
    group of a convolution is an independent map: its rows are drawn separately, with the distribution, scale
    and norm of a weight of that size. Weights are drawn in float64 on the host; an orthogonal one costs
    O(m n min(m, n)). Yaras et al., arXiv 2306.01154, section 2.

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
        if (computation := describe_computation(matrix.module, matrix.attribute)) is not None:
            raise ValueError(
                f"layers: {matrix.name!r} is computed from other tensors (by {computation}); initialise "
                f"it before, or choose those: '{matrix.name}.factors.*' after overparameterize"
            )
        for name in _BIASES:
            if (computation := describe_computation(matrix.module, name)) is not None:
                raise ValueError(
                    f"layers: the {name} of {matrix.name!r} is computed from other tensors (by "
                    f"{computation}) and cannot be set to zero; initialise it before"
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
    """Draw the layers number ``before + 1, before + 2, ..`` of a seed, of these widths."""
    scales = per_layer(scale, "scale (eps)", len(widths) - 1)
    # Layers of a seed are independent of each other, so layers of width 1 can replace the first ones.
    weights: list[FloatArray] = DISTRIBUTIONS[initial](
        [1] * before + list(widths), np.concatenate([np.zeros(before), scales]), seed
    )
    return weights[before:]


def _draw_weight(initial: str, matrix: WeightMatrix, scale: float, seed: int, before: int) -> FloatArray:
    """Draw new values of a weight; the groups of a convolution are drawn independently."""
    rows, columns = matrix.shape
    widths = [columns, rows // matrix.groups]
    blocks = [draw_weights(initial, widths, scale, seed, before)[0]]
    for group in range(1, matrix.groups):
        own_seed = int(random_generator(seed, ("group", before, group)).integers(2**63))
        blocks.append(draw_weights(initial, widths, scale, own_seed, before)[0])
    return np.concatenate(blocks)
