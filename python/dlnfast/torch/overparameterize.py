# SPDX-License-Identifier: MIT
"""Replacement of weights by products of trained factors, and back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from .._support.arrays import FloatArray, as_matrix, check_choice, check_count
from .._weights.widths import Scale
from .initial import draw_weights
from .layers import LayerChoice
from .low_rank.products import (
    DeepProduct,
    check_product_is_finite,
    choose_weights,
    install_all,
    list_products,
    uninstall,
)

_Module = TypeVar("_Module", bound=nn.Module)


def overparameterize(
    module: _Module,
    depth: int = 3,
    width: int | None = None,
    *,
    layers: LayerChoice = None,
    initial: str = "balanced",
    scale: Scale | None = None,
    seed: int = 0,
) -> _Module:
    r"""Replace weights by products W_{L:1} in place, and train the factors instead.

    The model gets new parameters: make the optimiser after this call.

    Parameters
    ----------
    module : Module
        Linear or convolutional layer, or model with such layers.
    depth : int
        Number of factors L, 2 or more.
    width : int, optional
        Width of all inner layers. Default: min(m, n) for an m x n weight, with which every matrix is a
        product.
    layers : LayerChoice
        Choice of weights as for `weight_matrices`; None: those of all linear and convolutional layers.
    initial : {"balanced", "orthogonal"}
        Initial factors. "balanced": with ``W = U S V^T``, ``W_1 = S^{1/L} V^T``, ``W_l = S^{1/L}``,
        ``W_L = U S^{1/L}``, so that ``W_{l+1}^T W_{l+1} = W_l W_l^T`` and the function of the model does not
        change, except for rounding. "orthogonal": every factor is eps times a matrix with orthonormal rows or
        columns, drawn as by `dlnfast.orthogonal`; the weight becomes their product.
    scale : float or sequence of float, optional
        Scale eps of "orthogonal", for all factors or one per factor of each weight. Default 1.
    seed : int
        Seed of "orthogonal". The factors of the i-th chosen weight are layers (i - 1) L + 1 .. i L of the
        seed.

    Returns
    -------
    Module
        The same module.

    Raises
    ------
    TypeError
        For a layer that is neither linear nor a convolution, and a weight that is packed or holds integers.
    ValueError
        For a weight that is already computed, by this function, another parametrization or a hook such as
        that of weight_norm; a weight that shares memory with another tensor of the model; a width below the
        numerical rank of a weight with "balanced"; a weight that is not finite; and settings out of their
        range. The model is then unchanged.

    Notes
    -----
    Factor l is the parameter ``module.parametrizations.weight.original{l-1}``; `weight_matrices` calls it
    ``name.factors.l``. A convolution's weight (out, in, kh, kw) is the matrix (out, in kh kw). Biases do not
    change. Where that needs fewer flops, as for batches smaller than the width, the layer applies the factors
    to its inputs one after the other; otherwise, and wherever the weight is read, the factors are multiplied,
    in the order with the fewest flops, and ``torch.nn.utils.parametrize.cached()`` caches the product. Save
    the module by its state_dict: PyTorch can load it into a model with the same `overparameterize` call.

    Balanced factors have equal nonzero singular values. Directions beyond the rank of W, including those of a
    larger inner width, are zero in all factors. There the gradient vanishes (a saddle point), and gradient
    descent does not leave it. Use "orthogonal" for a weight that starts at zero. The numerical rank counts
    singular values above ``max(m, n) eps`` of the largest.

    Cost: O(m n min(m, n)) once per weight, on the host in float64. Arora, Cohen and Hazan, arXiv 1802.06509.

    Examples
    --------
    >>> import torch
    >>> import dlnfast as dln
    >>> layer = dln.torch.overparameterize(torch.nn.Linear(4, 2), depth=3)
    >>> [tuple(factor.shape) for factor in layer.parametrizations.weight.parameters()]
    [(2, 4), (2, 2), (2, 2)]
    >>> list(dln.torch.collapse(layer).state_dict())
    ['weight', 'bias']
    """
    n_factors = check_count(depth, "depth", minimum=2)
    inner = None if width is None else check_count(width, "width")
    check_choice(initial, "initial", ("balanced", "orthogonal"))
    if initial == "balanced" and scale is not None:
        raise ValueError(f'scale is {scale}, but initial is "balanced", which takes it from the weight')
    chosen = choose_weights(module, layers)
    products: list[DeepProduct] = []
    for number, matrix in enumerate(chosen):
        rows, columns = matrix.shape
        widths = [columns, *[inner or min(rows, columns)] * (n_factors - 1), rows]
        if initial == "balanced":
            if matrix.device.type == "meta":
                raise ValueError(
                    f"weight matrix {matrix.name!r} is on the meta device, where weights have no values"
                )
            factors = balance_factors(matrix.matrix(), widths, f"weight matrix {matrix.name!r}")
        else:
            factors = draw_weights(
                "orthogonal", widths, 1.0 if scale is None else scale, seed, number * n_factors
            )
        shape = matrix.module.get_parameter("weight").shape
        products.append(DeepProduct(shape, factors, balance_factors))
    install_all([matrix.module for matrix in chosen], products)
    return module


def collapse(module: _Module) -> _Module:
    """Replace the products of `overparameterize` by plain weights, in place.

    The model gets new parameters: make the optimiser after this call.

    Parameters
    ----------
    module : Module
        Layer or model that `overparameterize` changed.

    Returns
    -------
    Module
        The same module, with the original names in its state_dict. Its weight is bit for bit that of the
        product; its outputs are the same up to rounding.

    Raises
    ------
    TypeError
        If `module` is no module.
    ValueError
        If no weight is a product of factors, or a product is not finite. The model is then unchanged.

    Notes
    -----
    Cost: the products of the factors, O(L d^3) for each layer.
    """
    deep = list_products(module)
    if not deep:
        raise ValueError("module has no weight that is a product of factors: overparameterize makes them")
    for name, layer in deep.items():
        check_product_is_finite(name, layer)
    for layer in deep.values():
        uninstall(layer)
    return module


def balance_factors(
    weight: torch.Tensor, widths: Sequence[int], name: str = "the weight"
) -> list[FloatArray]:
    """Return ``W_1 .. W_L`` with ``W_{l+1}^T W_{l+1} = W_l W_l^T`` and the product `weight`."""
    matrix = as_matrix(weight.to("cpu", torch.float64).numpy(), name)
    left, values, right_t = np.linalg.svd(matrix, full_matrices=False)
    threshold = max(matrix.shape) * torch.finfo(weight.dtype).eps * values[0]
    rank = int(np.count_nonzero(values > threshold))
    narrowest = min(widths[1:-1])
    if narrowest < rank:
        raise ValueError(
            f"width is {narrowest}, below the numerical rank {rank} of {name} ({matrix.shape[0]} x "
            f'{matrix.shape[1]}): no product of that width equals it; wanted {rank} or more, or "orthogonal"'
        )
    n = min(narrowest, len(values))
    roots = values[:n] ** (1 / (len(widths) - 1))
    factors: list[FloatArray] = [np.zeros((rows, columns)) for columns, rows in pairwise(widths)]
    factors[0][:n] = roots[:, np.newaxis] * right_t[:n]
    for factor in factors[1:-1]:
        factor[range(n), range(n)] = roots
    factors[-1][:, :n] = left[:, :n] * roots
    return factors
