# SPDX-License-Identifier: MIT
"""Weights that are products of trained factors: the parametrization, and the forward pass by factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ..._support.arrays import FloatArray, widths_of
from .._names import named_layers
from .._reading import describe_computation, read_weight
from .._weight_use import find_weight_use
from ..layers import LayerChoice, WeightMatrix, weight_matrices

#: Layers whose weight can become a product.
PLAIN_LAYERS: Final = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

_CONVOLUTIONS: Final[dict[int, Callable[..., torch.Tensor]]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}

#: Function that makes the factors ``W_1 .. W_L`` of a weight that is assigned to a layer.
FactorWeight = Callable[[torch.Tensor, Sequence[int]], Sequence[FloatArray]]


class DeepProduct(nn.Module):
    r"""Parametrization of a layer's weight as the product ``W_L .. W_1`` of factors, optionally plus a rest.

    Parameters
    ----------
    shape : torch.Size
        Shape of the weight.
    factors : sequence of ndarray
        Initial factors W_1 .. W_L, of which the first has the columns and the last the rows of the matrix.
    factor_weight : callable
        ``factor_weight(matrix, widths)`` makes the factors when a weight is assigned to the layer.
    rest : Tensor, optional
        Constant matrix that is added to the product.
    is_rest_scaled : bool
        Whether the rest is multiplied by one trained number, 1 at the start.

    Attributes
    ----------
    shape : torch.Size
        Shape of the weight.
    rest : Tensor or None
        Constant matrix, a buffer.
    rest_scale : Parameter or None
        Number that multiplies the rest.
    """

    #: Marks this class for `weight_matrices`, whose module cannot import it.
    is_deep_product = True

    rest: torch.Tensor | None
    rest_scale: nn.Parameter | None

    def __init__(
        self,
        shape: torch.Size,
        factors: Sequence[FloatArray],
        factor_weight: FactorWeight,
        rest: torch.Tensor | None = None,
        *,
        is_rest_scaled: bool = False,
    ) -> None:
        super().__init__()
        self.shape = shape
        self._factor_weight = factor_weight
        self._start: Sequence[FloatArray] | None = factors
        self._widths = widths_of(factors)
        self.register_buffer("rest", None if rest is None else rest.detach().clone())
        scale = None
        if rest is not None and is_rest_scaled:
            scale = nn.Parameter(torch.ones((), dtype=rest.dtype, device=rest.device))
        self.register_parameter("rest_scale", scale)

    def forward(self, *factors: torch.Tensor) -> torch.Tensor:
        """Return the weight."""
        # multi_dot chooses the order with the fewest flops.
        product: torch.Tensor = torch.linalg.multi_dot(factors[::-1])
        if self.rest is not None:
            product = product + self._scale(self.rest)
        return product.reshape(self.shape)

    def _scale(self, rest: torch.Tensor) -> torch.Tensor:
        return rest if self.rest_scale is None else self.rest_scale * rest

    def right_inverse(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """Return the initial factors at the first call, and factors of `weight` at later calls."""
        factors, self._start = self._start, None
        if factors is None:
            matrix = weight.detach().reshape(weight.shape[0], -1)
            if self.rest is not None:
                matrix = matrix - self._scale(self.rest).detach()
            factors = self._factor_weight(matrix, self._widths)
        self._widths = widths_of(factors)
        return [torch.tensor(factor, dtype=weight.dtype, device=weight.device) for factor in factors]

    def note_factors(self, factors: Sequence[torch.Tensor]) -> None:
        """Note the widths of factors that have got other shapes."""
        self._widths = widths_of(factors)

    def extra_repr(self) -> str:
        """Return the widths."""
        rest = "" if self.rest is None else ", rest frozen" if self.rest_scale is None else ", rest scaled"
        return " -> ".join(map(str, self._widths)) + rest

    def apply_factors(
        self, layer: nn.Module, x: torch.Tensor, factors: Sequence[torch.Tensor]
    ) -> torch.Tensor | None:
        """Return the output of a layer for inputs x, one factor after the other.

        None if the product has fewer flops, or the layer's inputs and outputs are no plain tensors.
        """
        if x.is_nested or bool(getattr(parametrize, "_cache_enabled", False)):
            return None
        if isinstance(layer, nn.Linear):
            if x.ndim == 0 or not is_sequence_cheaper(factors, x.numel() // max(1, x.shape[-1])):
                return None
            inner = x
            for factor in factors[:-1]:
                inner = F.linear(inner, factor)
            output = F.linear(inner, factors[-1], layer.bias)
            return output if self.rest is None else output + self._scale(F.linear(x, self.rest))
        convolution: Any = layer
        if convolution.groups > 1:  # the groups of a product are no product of groups
            return None
        columns = self.shape[1:]
        if not is_sequence_cheaper(factors, _count_outputs(convolution, x)):
            return None
        first, *others = factors
        inner = convolution._conv_forward(x, first.reshape(-1, *columns), None)
        convolve = _CONVOLUTIONS[len(self.shape)]
        ones = (1,) * len(columns[1:])
        for number, factor in enumerate(others, start=1):
            bias = layer.bias if number == len(others) else None
            inner = convolve(inner, factor.reshape(*factor.shape, *ones), bias)
        if self.rest is not None:
            rest = convolution._conv_forward(x, self.rest.reshape(self.shape), None)
            inner = inner + self._scale(rest)
        return inner


def _count_outputs(convolution: Any, x: torch.Tensor) -> int:
    """Return the number of positions at which a convolution is computed, about."""
    strides = math.prod(convolution.stride)
    n_axes = len(convolution.stride)
    positions = math.prod(x.shape[-n_axes:]) // strides
    return int(positions * (x.shape[0] if x.ndim == n_axes + 2 else 1))


def is_sequence_cheaper(factors: Sequence[torch.Tensor], n_rows: int) -> bool:
    """Return whether factors that are applied one after the other need fewer flops than their product.

    For n rows of inputs: ``n sum_l w_l w_{l-1}`` against ``n w_L w_0`` plus the product.
    """
    widths = widths_of(factors)
    sequence = sum(a * b for a, b in pairwise(widths))
    whole = widths[0] * widths[-1]
    return sequence <= whole or n_rows * (sequence - whole) <= _count_product(widths)


def _count_product(widths: Sequence[int]) -> int:
    """Return the multiplications of the cheapest of the two orders from an end."""
    from_first = sum(widths[0] * a * b for a, b in pairwise(widths[1:]))
    from_last = sum(widths[-1] * a * b for a, b in pairwise(widths[:-1]))
    return min(from_first, from_last)


def forward_by_factors(self: Any, input: torch.Tensor) -> torch.Tensor:
    """Forward pass of a layer whose weight is a product."""
    if is_product(self):
        steps = self.parametrizations.weight
        factors = [getattr(steps, f"original{i}") for i in range(steps.ntensors)]
        output: torch.Tensor | None = steps[0].apply_factors(self, input, factors)
        if output is not None:
            return output
    plain: torch.Tensor = _find_plain_class(type(self)).forward(self, input)
    return plain


def _find_plain_class(kind: type) -> Any:
    return next(plain for plain in PLAIN_LAYERS if issubclass(kind, plain))


def is_product(layer: nn.Module) -> bool:
    """Return whether the weight of a layer is a product of factors."""
    if not parametrize.is_parametrized(layer, "weight"):
        return False
    return isinstance(layer.parametrizations["weight"][0], DeepProduct)  # type: ignore[index]


def install_all(layers: Sequence[nn.Module], products: Sequence[DeepProduct]) -> None:
    """Make the weights of layers products; after an error all layers have their own weights."""
    before = [layer.get_parameter("weight") for layer in layers]
    try:
        for layer, product in zip(layers, products, strict=True):
            install(layer, product)
    except BaseException:
        for layer, weight in zip(layers, before, strict=True):
            if is_product(layer):
                uninstall(layer)
                layer._parameters["weight"] = weight
        raise


def install(layer: nn.Module, product: DeepProduct) -> None:
    """Make the weight of a layer a product; its forward pass applies the factors where that is cheaper."""
    has_own_forward = type(layer).forward is not _find_plain_class(type(layer)).forward
    parametrize.register_parametrization(layer, "weight", product)
    if not has_own_forward:
        # PyTorch has given the layer a class of its own.
        type(layer).forward = forward_by_factors


def uninstall(layer: nn.Module) -> None:
    """Replace the product by a plain weight."""
    # PyTorch removes the property "weight" from the class, which copies of the layer share: give this
    # layer a class of its own first.
    kind = type(layer)
    members = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    if members.get("forward") is forward_by_factors:
        del members["forward"]
    own = type(kind.__name__, kind.__bases__, members)
    layer.__class__ = own  # pyright: ignore[reportAttributeAccessIssue]
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    # PyTorch makes a product of frozen factors a buffer. Make it a parameter, and the first one, to
    # restore the original order of the parameters.
    del layer.weight
    others = dict(layer._parameters)
    layer._parameters.clear()
    layer.register_parameter("weight", nn.Parameter(weight, weight.requires_grad))
    layer._parameters.update(others)


def check_product_is_finite(name: str, layer: nn.Module) -> None:
    """Raise a ValueError that names the layer if its weight is not finite."""
    product = read_weight(layer)
    if not product.is_meta and not bool(torch.isfinite(product).all()):
        raise ValueError(f"the product of the factors of layer {name!r} is not finite")


def list_products(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers whose weights are products, by name."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is {type(module).__name__}; wanted a torch.nn.Module")
    return {name: layer for name, _, layer in named_layers(module) if is_product(layer)}


def choose_weights(
    module: nn.Module, layers: LayerChoice, *, skip_shared: bool = False
) -> list[WeightMatrix]:
    """Return the chosen weights, after a check that all of them can become products.

    None chooses those of all linear and convolutional layers, with `skip_shared` except shared weights.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is {type(module).__name__}; wanted a torch.nn.Module")
    chosen = weight_matrices(module, layers)
    use = find_weight_use(module)
    if layers is None:
        left_out = use.sharing if skip_shared else {}
        chosen = [
            matrix
            for matrix in chosen
            if isinstance(matrix.module, PLAIN_LAYERS) and id(matrix.module) not in left_out
        ]
        if not chosen:
            raise ValueError(f"module ({type(module).__name__}) has no linear or convolutional layer")
    for matrix in chosen:
        if not isinstance(matrix.module, PLAIN_LAYERS) or matrix.attribute != "weight":
            kind = type(matrix.module).__name__
            raise TypeError(f"layers: {matrix.name!r} is of a {kind}; wanted a linear or convolutional layer")
        if (computation := describe_computation(matrix.module)) is not None:
            raise ValueError(
                f"weight matrix {matrix.name!r} is a product of factors already: collapse makes it plain"
                if is_product(matrix.module)
                else f"weight matrix {matrix.name!r} has another parametrization: it is computed by "
                f"{computation}; wanted a plain weight"
            )
        if sharing := use.sharing.get(id(matrix.module)):
            raise ValueError(
                f"weight matrix {matrix.name!r} is shared with {', '.join(map(repr, sharing))}; factors "
                "would separate them"
            )
    return chosen
