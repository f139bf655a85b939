# SPDX-License-Identifier: MIT
"""Multilayer perceptrons, and hybrid ones with linear layers at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..._support.arrays import check_choice, check_count
from ..._weights.widths import Scale, check_widths
from ._construction import ACTIVATIONS, Device, construct, flatten_inputs, make_hidden_layer


class MLP(nn.Module):
    """Hidden layers ``z_l = activation(norm(W_l z_{l-1}))`` and a linear head.

    Parameters
    ----------
    widths : sequence of int
        Widths ``d_0, .., d_L`` of the inputs, the hidden layers, and the outputs of the head: L linear maps.
    activation : {"relu", "leaky_relu", "gelu", "silu", "elu", "tanh", "sigmoid"}
        Activation of the nonlinear hidden layers.
    batch_norm : bool
        Whether nonlinear layers have batch normalisation between map and activation. Without it and without
        biases, "relu" is the network of progressive collapse.
    bias : bool
        Whether linear maps, including the head, have biases.
    n_nonlinear : int, optional
        Number of nonlinear hidden layers, which come first. The other hidden layers are linear maps. Default:
        all hidden layers.
    initial : {"torch", "orthogonal", "gaussian", "uniform"}
        Distribution of the weights. "torch": PyTorch's default weights and biases, weights times `scale`.
        Otherwise the weights of the function of `dlnfast` of the same name for these widths, with zero
        biases; see `initialize_`.
    scale : float or sequence of float
        Scale of all linear maps, or one per map.
    seed : int
        Seed of the weights. PyTorch's generators are not used.
    dtype : torch.dtype, optional
        Precision. Default: PyTorch's default.
    device : device, optional
        Device. Default: PyTorch's default.

    Attributes
    ----------
    layers : Sequential
        Hidden layers ``layers.0`` .. ``layers.{L-2}``. Their outputs are the features Z_1 .. Z_{L-1} after
        the activation. The map of each layer is called ``linear``.
    head : Linear
        Last linear map.
    widths, hidden_layers
        Attributes of `DeepLinear`.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For settings out of their range.

    Examples
    --------
    >>> import dlnfast as dln
    >>> model = dln.torch.MLP([50] * 8 + [5], batch_norm=False, initial="orthogonal", scale=0.5)
    >>> model.hidden_layers[-1], sum(p.numel() for p in model.parameters())
    ('layers.6', 17750)
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        activation: str = "relu",
        batch_norm: bool = True,
        bias: bool = False,
        n_nonlinear: int | None = None,
        initial: str = "torch",
        scale: Scale = 1.0,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: Device = None,
    ) -> None:
        super().__init__()
        self.widths = check_widths(widths)
        n_hidden = len(self.widths) - 2
        if n_nonlinear is None:
            n_nonlinear = n_hidden
        check_count(n_nonlinear, "n_nonlinear", minimum=0, maximum=n_hidden)
        check_choice(activation, "activation", ACTIVATIONS)
        with construct(self, initial, scale, seed, dtype, device):
            self.layers = nn.Sequential()
            for i in range(n_hidden):
                linear = nn.Linear(self.widths[i], self.widths[i + 1], bias=bias)
                is_nonlinear = i < n_nonlinear
                norm = nn.BatchNorm1d(self.widths[i + 1]) if is_nonlinear and batch_norm else None
                self.layers.append(
                    make_hidden_layer("linear", linear, norm, activation if is_nonlinear else None)
                )
            self.head = nn.Linear(self.widths[-2], self.widths[-1], bias=bias)
        self.hidden_layers = [f"layers.{i}" for i in range(n_hidden)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the head, shape (B, d_L); inputs of any shape (B, ..) are flattened."""
        result: torch.Tensor = self.head(self.layers(flatten_inputs(x, self.widths[0])))
        return result


class HybridMLP(MLP):
    """An `MLP` of constant width with nonlinear layers first and linear layers after them.

    Parameters
    ----------
    dim_in, width, n_classes : int
        Widths of the inputs, of every hidden layer, and of the head.
    n_nonlinear, n_linear : int
        Numbers of nonlinear and linear hidden layers, 0 or more. Only nonlinear ones have batch
        normalisation.
    activation, batch_norm, bias, initial, scale, seed, dtype, device
        Settings of `MLP`.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For settings out of their range.

    Notes
    -----
    Wang, Li, Yaras, Zhu, Balzano, Hu, Qu, arXiv 2311.02960: three nonlinear and four linear layers compress
    features like seven nonlinear ones (``n_linear=0``).

    Examples
    --------
    >>> import dlnfast as dln
    >>> model = dln.torch.HybridMLP(3072, 64, 10, n_nonlinear=3, n_linear=4)
    >>> [name for name, _ in model.layers[2].named_children()], [*dict(model.layers[3].named_children())]
    (['linear', 'norm', 'activation'], ['linear'])
    """

    def __init__(
        self,
        dim_in: int,
        width: int,
        n_classes: int,
        *,
        n_nonlinear: int,
        n_linear: int,
        activation: str = "relu",
        batch_norm: bool = True,
        bias: bool = False,
        initial: str = "torch",
        scale: Scale = 1.0,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: Device = None,
    ) -> None:
        check_count(dim_in, "dim_in")
        check_count(width, "width")
        check_count(n_classes, "n_classes")
        n_hidden = check_count(n_nonlinear, "n_nonlinear", minimum=0) + check_count(
            n_linear, "n_linear", minimum=0
        )
        super().__init__(
            [dim_in, *[width] * n_hidden, n_classes],
            activation=activation,
            batch_norm=batch_norm,
            bias=bias,
            n_nonlinear=n_nonlinear,
            initial=initial,
            scale=scale,
            seed=seed,
            dtype=dtype,
            device=device,
        )
