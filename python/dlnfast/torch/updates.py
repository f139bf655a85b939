# SPDX-License-Identifier: MIT
"""Updates of weights by adapters, as products of two thin factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ._names import named_layers
from .layers import WeightMatrix
from .operators import DeviceMatrix, ProductMatrix

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class UpdateMatrix(WeightMatrix):
    """The update ``dW = left right`` of a layer's weight by an adapter, one row per output.

    Attributes
    ----------
    name : str
        Name of the layer.
    module : Module
        Module with the factors among its parameters.
    pair : callable
        Function that returns the current left (d_out, r) and right (r, d_in), detached.
    size : (int, int)
        Sizes d_out and d_in.
    attribute, part, aliases
        Attributes of `WeightMatrix`, with their defaults.
    """

    pair: Callable[[], Pair] = field(kw_only=True)
    size: tuple[int, int] = field(kw_only=True)

    def matrix(self) -> torch.Tensor:
        """Return the current update as a dense matrix."""
        left, right = self.pair()
        return left @ right

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.size

    @property
    def highest_rank(self) -> int:
        """Largest possible rank: the smallest of r, d_out and d_in."""
        return min(*self.size, int(self.pair()[0].shape[1]))

    @property
    def device(self) -> torch.device:
        """Device of the factors."""
        return next(self.module.parameters()).device

    @property
    def is_product(self) -> bool:
        """True."""
        return True

    def _read(self) -> tuple[torch.Tensor, ...]:
        return self.pair()

    def start_matrix(self, start: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return a result of `copy` as a dense matrix.

        Parameters
        ----------
        start : tuple of Tensor
            Result of `copy`.

        Returns
        -------
        Tensor, shape (m, n)
        """
        return start[0] @ start[1]

    def _operator_of(
        self, now: tuple[torch.Tensor, ...], start: tuple[torch.Tensor, ...] | None
    ) -> DeviceMatrix | ProductMatrix:
        left, right = now
        rows, columns = self.size
        inner = left.shape[1] + (0 if start is None else start[0].shape[1])
        if 2 * inner * (rows + columns) < rows * columns:
            return ProductMatrix(left, right, None if start is None else (start[0], start[1]))
        return DeviceMatrix(left @ right, None if start is None else self.start_matrix(start))

    def singular_values(self) -> npt.NDArray[np.float64]:
        """Return the singular values without structural zeros, descending, in float64.

        Cost: O((d_out + d_in) r^2).
        """
        values: npt.NDArray[np.float64] = compute_thin_svd(*self.pair())[1].cpu().numpy()
        return values


def compute_thin_svd(
    left: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the thin SVD U, s, V^T of ``left right`` in float64; O((m + n) r^2)."""
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.T.double())
    u, s, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, s, vt @ q_right.T


def adapter_updates(model: nn.Module, adapter_name: str = "default") -> list[UpdateMatrix]:
    """Return the updates of a model that PEFT adapted, by LoRA or Deep LoRA, for `track`.

    Parameters
    ----------
    model : Module
        Model returned by ``peft.get_peft_model``.
    adapter_name : str
        Name of the adapter.

    Returns
    -------
    list of UpdateMatrix
        Updates in the order of registration, named as by `weight_matrices`, with the factor alpha / r of
        LoRA. The adapter may be active, merged or neither.

    Raises
    ------
    ValueError
        If the model has no such adapter, or the update is no product of two factors (DoRA).

    Notes
    -----
    Cost: no copies; O(number of modules).

    Examples
    --------
    >>> import dlnfast as dln
    >>> updates = dln.torch.adapter_updates(peft_model)  # doctest: +SKIP
    >>> with dln.torch.track(peft_model, updates, every=10, change=False) as tracked:  # doctest: +SKIP
    ...     train(peft_model)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; wanted a torch.nn.Module")
    found = list(_find_updates(model, adapter_name))
    if not found:
        raise ValueError(f"model has no LoRA or Deep LoRA layers with an adapter {adapter_name!r}")
    return found


def _find_updates(model: nn.Module, adapter: str) -> Iterator[UpdateMatrix]:
    for name, _, module in named_layers(model):
        pair = _get_deep_factors(module, adapter) or _get_lora_factors(module, adapter, name)
        if pair is not None:
            left, right = pair()
            yield UpdateMatrix(name, module, pair=pair, size=(int(left.shape[0]), int(right.shape[1])))


def _get_deep_factors(module: Any, adapter: str) -> Callable[[], Pair] | None:
    branches = getattr(module, "deep_lora_factors", None)
    if branches is None or adapter not in branches:
        return None
    return lambda: branches[adapter].factors().as_pair()


def _get_lora_factors(module: Any, adapter: str, name: str) -> Callable[[], Pair] | None:
    """Return a function for the factors of the update ``scaling B A`` of PEFT's LoRA, or None."""
    for below, above in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        if adapter not in getattr(module, below, {}):
            continue
        if adapter in getattr(module, "lora_variant", {}):
            raise ValueError(
                f"the update of layer {name!r} is not a product of two factors: "
                f"{type(module.lora_variant[adapter]).__name__}"
            )

        def pair(below: str = below, above: str = above) -> Pair:
            a, b = (getattr(module, key)[adapter] for key in (below, above))
            right, left = (getattr(x, "weight", x).detach() for x in (a, b))
            scale = float(module.scaling[adapter])
            return scale * left.reshape(left.shape[0], -1), right.reshape(right.shape[0], -1)

        return pair
    return None
