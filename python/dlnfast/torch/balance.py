# SPDX-License-Identifier: MIT
"""`balance`: distance of neighbouring layers of a model from balance."""

from __future__ import annotations

import itertools

from torch import nn

from .. import measures
from .._support.errors import ShapeError
from .layers import LayerChoice, weight_matrices
from .operators import matrix_to_host

__all__ = ["balance"]


def balance(model: nn.Module, layers: LayerChoice = None) -> dict[tuple[str, str], float]:
    r"""Return ``||W_{l+1}^T W_{l+1} - W_l W_l^T||_F`` of neighbouring weights of a model.

    Gradient flow conserves ``W_{l+1}^T W_{l+1} - W_l W_l^T`` for linear layers with nothing between them, and
    its diagonal for layers with a ReLU between them. Normalisation, skip connections, weight decay and finite
    learning rates break the conservation.

    Parameters
    ----------
    model : Module
        Model with the weights.
    layers : str, regular expression, callable, sequence of them, or None
        Weights to compare, each with the next one in the order of registration; chosen as for
        `weight_matrices`.

    Returns
    -------
    dict of (str, str) to float
        Norms, by the names of the two layers.

    Raises
    ------
    ShapeError
        If the columns of a weight differ in number from the rows of the weight before it: choose layers that
        follow each other.
    TypeError, ValueError
        For the choices that `weight_matrices` refuses, convolutions with groups, and weights on the meta
        device.

    Notes
    -----
    `dlnfast.measures.balancedness` of each pair, in float64 on the host.

    Cost: O(d^3) for each pair of neighbours.

    Examples
    --------
    >>> from dlnfast.torch import DeepLinear, balance
    >>> found = balance(DeepLinear([8, 8, 8], scale=0.5))
    >>> list(found), max(found.values()) < 1e-6
    ([('layers.0', 'layers.1')], True)
    """
    found: dict[tuple[str, str], float] = {}
    chosen = weight_matrices(model, layers)
    for matrix in chosen:
        if matrix.groups > 1:
            raise ValueError(
                f"layers: {matrix.name!r} is a convolution with {matrix.groups} groups, whose map is not one "
                "matrix; wanted other layers"
            )
        if matrix.device.type == "meta":
            raise ValueError(f"layers: {matrix.name!r} is on the meta device, where weights have no values")
    for below, above in itertools.pairwise(chosen):
        if above.shape[1] != below.shape[0]:
            raise ShapeError(
                f"layers: {above.name!r} has shape {above.shape}, but {below.name!r} before it has "
                f"{below.shape[0]} rows; wanted layers that follow each other"
            )
        pair = [matrix_to_host(below.matrix()), matrix_to_host(above.matrix())]
        found[below.name, above.name] = float(measures.balancedness(pair)[0])
    return found
