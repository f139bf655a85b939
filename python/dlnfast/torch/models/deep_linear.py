# SPDX-License-Identifier: MIT
"""Deep linear networks as PyTorch modules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..._support.arrays import FloatArray, as_layers, widths_of
from ..._trajectory.trajectory import Trajectory
from ..._weights.widths import Scale, check_widths
from ..operators import get_torch_dtype
from ._construction import Device, construct, flatten_inputs


class DeepLinear(nn.Module):
    """Deep linear network x -> W_{L:1} x: linear layers without biases or activations.

    Parameters
    ----------
    widths : sequence of int
        Widths ``d_0, .., d_L``; layer l is ``d_l x d_{l-1}``.
    scale : float or sequence of float
        Scale ``eps`` of all layers, or one per layer.
    initial : {"orthogonal", "gaussian", "uniform", "torch"}
        Distribution of the weights, which equal those of the function of `dlnfast` of the same name with the
        same seed. "torch": PyTorch's default weights, times `scale`.
    seed : int
        Seed of the weights. PyTorch's generators are not used.
    dtype : torch.dtype, optional
        Precision. Default: PyTorch's default.
    device : device, optional
        Device. Default: PyTorch's default.

    Attributes
    ----------
    layers : Sequential
        Layers ``layers.0`` .. ``layers.{L-1}`` with the outputs Z_1 .. Z_L.
    widths : list of int
        Widths ``d_0, .., d_L``.
    hidden_layers : list of str
        Names of the layers with the outputs Z_1 .. Z_{L-1}, for `select_modules`.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For invalid widths, scales, distributions or seeds.

    Notes
    -----
    Samples are rows here, and columns in `dlnfast.Problem`. For data X (d_0, N) and Y (d_L, N) of a problem,
    the loss is ``problem.loss_scale / 2 * (model(X.T) - Y.T).square().sum()``. ``torch.optim.SGD`` on that
    loss (learning rate, momentum and weight decay, dampening 0, no Nesterov) takes the steps of
    `dlnfast.train`.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> import dlnfast as dln
    >>> model = dln.torch.DeepLinear([4, 4, 2], scale=0.5, dtype=torch.float64)
    >>> bool(np.all(model.to_weights()[0] == dln.orthogonal([4, 4, 2], scale=0.5)[0]))
    True
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        scale: Scale = 1.0,
        initial: str = "orthogonal",
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: Device = None,
    ) -> None:
        super().__init__()
        self.widths = check_widths(widths)
        with construct(self, initial, scale, seed, dtype, device):
            self.layers = nn.Sequential(
                *(nn.Linear(a, b, bias=False) for a, b in zip(self.widths[:-1], self.widths[1:], strict=True))
            )
        self.hidden_layers = [f"layers.{i}" for i in range(len(self.layers) - 1)]

    @classmethod
    def from_weights(cls, weights: Sequence[npt.ArrayLike], *, device: Device = None) -> DeepLinear:
        """Make a network with copies of the weights.

        Parameters
        ----------
        weights : sequence of array_like
            Weights ``W_1 .. W_L``, all float64 or all float32, which is the precision of the network.
        device : device, optional
            Device. Default: PyTorch's default.

        Returns
        -------
        DeepLinear

        Raises
        ------
        TypeError, ShapeError, ValueError
            For matrices that cannot be multiplied as ``W_L .. W_1``, or are not finite.
        """
        arrays = as_layers(weights)
        dtype = torch.float64 if arrays[0].dtype == np.float64 else torch.float32
        model = cls(widths_of(arrays), dtype=dtype, device="meta")
        model.to_empty(device=torch.empty(0, device=device).device)
        with torch.no_grad():
            for layer, array in zip(model._linear_layers(), arrays, strict=True):
                layer.weight.copy_(torch.tensor(array))
        return model

    @classmethod
    def from_trajectory(cls, run: Trajectory, step: int = -1, *, device: Device = None) -> DeepLinear:
        """Make a network with the weights of a run of `dlnfast.train` at a recorded step.

        Parameters
        ----------
        run : Trajectory
            Run with the weights.
        step : int
            Step as for `Trajectory.weights`; -1 is the last.
        device : device, optional
            Device. Default: PyTorch's default.

        Returns
        -------
        DeepLinear

        Raises
        ------
        TypeError
            If `run` is no trajectory.
        ValueError
            If the run has no weights of that step.
        """
        if not isinstance(run, Trajectory):
            raise TypeError(f"run is {type(run).__name__}; wanted a dlnfast.Trajectory")
        return cls.from_weights(run.all_weights(step), device=device)

    def to_weights(self) -> list[FloatArray]:
        """Return copies of ``W_1 .. W_L`` for `dlnfast.train`; half precisions as float32."""
        return [
            np.array(layer.weight.detach().cpu().to(get_torch_dtype(layer.weight.dtype)).numpy(), order="C")
            for layer in self._linear_layers()
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``W_L .. W_1 x`` for the rows x of shape (B, d_0); inputs with more axes are flattened."""
        result: torch.Tensor = self.layers(flatten_inputs(x, self.widths[0]))
        return result

    def _linear_layers(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]
