# SPDX-License-Identifier: MIT
"""Deep linear networks as PyTorch modules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..._arrays import FloatArray, as_layers, widths_of
from ...initial import check_widths
from ...trajectory import Trajectory
from ..initial import Scale
from ..operators import get_torch_dtype
from ._construction import Device, construct, flatten_inputs


class DeepLinear(nn.Module):
    """The map of x to W_{L:1} x: linear layers without biases and with nothing between them.

    Parameters
    ----------
    widths : sequence of int
        ``d_0, .., d_L``; layer l is ``d_l x d_{l-1}``.
    scale : float or sequence of float
        ``eps``, for all layers or one per layer.
    initial : {"orthogonal", "gaussian", "uniform", "torch"}
        The weights are those of the function of `dlnfast` of the same name, with the same seed; "torch":
        PyTorch's own ones, times `scale`.
    seed : int
        PyTorch's generators are not touched.
    dtype : torch.dtype, optional
        PyTorch's default by default.
    device : device, optional
        PyTorch's default by default.

    Attributes
    ----------
    layers : Sequential
        ``layers.0`` .. ``layers.{L-1}``, of which the outputs are Z_1 .. Z_L.
    widths : list of int
    hidden_layers : list of str
        Names of the modules whose outputs are Z_1 .. Z_{L-1}, as `select_modules` takes them.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For widths, scales, laws or seeds that are none.

    Notes
    -----
    Samples are rows here: for data X (d_0, N) and Y (d_L, N) as `dlnfast.Problem` has them in columns, its
    loss is ``problem.loss_scale / 2 * (model(X.T) - Y.T).square().sum()``. ``torch.optim.SGD`` on that loss
    (learning rate, momentum and weight decay, dampening 0, no Nesterov) takes the steps of `dlnfast.train`.

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
        """Return the network with these weights, which are copied.

        Parameters
        ----------
        weights : sequence of array_like
            ``W_1 .. W_L``, all float64 or all float32: the precision of the network.
        device : device, optional

        Returns
        -------
        DeepLinear

        Raises
        ------
        TypeError, ShapeError, ValueError
            For what are no weights that follow on each other.
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
        """Return the network of a run of `dlnfast.train` at a recorded step.

        Parameters
        ----------
        run : Trajectory
        step : int
            As for `Trajectory.weights`; -1 is the last.
        device : device, optional

        Returns
        -------
        DeepLinear

        Raises
        ------
        TypeError
            For what is no trajectory.
        ValueError
            If that step was not kept.
        """
        if not isinstance(run, Trajectory):
            raise TypeError(f"run is {type(run).__name__}; wanted a dlnfast.Trajectory")
        return cls.from_weights(run.all_weights(step), device=device)

    def to_weights(self) -> list[FloatArray]:
        """Return copies of ``W_1 .. W_L``, as `dlnfast.train` takes them; half precisions as float32."""
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
