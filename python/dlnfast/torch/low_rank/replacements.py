# SPDX-License-Identifier: MIT
"""Low-rank forms of layers as plain PyTorch modules, and the layers that have one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import torch
from torch import nn

from .._reading import describe_computation, explain_unreadable
from .._weight_use import WeightUse
from .products import is_product

#: Names of the shapes of a convolution's two factors.
SHAPES: Final = ("kernel-first", "kernel-last", "horizontal-first", "vertical-first")

_CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Attributes of modules in which PyTorch stores hooks of users.
_HOOKS: Final = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass(frozen=True)
class Form:
    """A matricisation of a weight with the outputs on axis 0 and the inputs on axis 1.

    Attributes
    ----------
    shape : str or None
        Name of the shape for a convolution.
    left, right : tuple of int
        Axes of the rows, which belong to the second layer of the pair, and of the columns, which belong to
        the first.
    """

    shape: str | None
    left: tuple[int, ...]
    right: tuple[int, ...]

    def to_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the matricisation, shape (m, n)."""
        rows = math.prod(weight.shape[axis] for axis in self.left)
        return weight.permute(*self.left, *self.right).reshape(rows, -1)

    def to_weight(self, matrix: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Return the weight of these sizes of which `matrix` is the matricisation."""
        order = [*self.left, *self.right]
        inverse = [order.index(axis) for axis in range(len(order))]
        return matrix.reshape([sizes[axis] for axis in order]).permute(inverse)

    def count_parameters(self, sizes: Sequence[int]) -> int:
        """Return the number of parameters per unit of rank."""
        return sum(math.prod(sizes[axis] for axis in axes) for axes in (self.left, self.right))


def list_forms(module: nn.Module) -> list[Form]:
    """Return the low-rank forms of a layer, the basic one first, each matrix once."""
    if not isinstance(module, _CONVOLUTIONS):
        return [Form(None, (0,), (1,))]
    kernel = tuple(range(2, 2 + len(module.kernel_size)))
    forms = [Form(SHAPES[0], (0,), (1, *kernel))]
    if math.prod(module.kernel_size) > 1:
        forms.append(Form(SHAPES[1], (0, *kernel), (1,)))
    if isinstance(module, nn.Conv2d) and min(module.kernel_size) > 1:
        forms += [Form(SHAPES[2], (0, 2), (1, 3)), Form(SHAPES[3], (0, 3), (1, 2))]
    return forms


def read_tensor(module: nn.Module) -> torch.Tensor:
    """Return the weight with the outputs on axis 0, detached; a view."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    is_transposed = isinstance(module, nn.Embedding) or _is_inputs_first(module)
    return weight.detach().T if is_transposed else weight.detach()


def read_bias(module: nn.Module) -> torch.Tensor | None:
    """Return the bias of a layer, detached; None without one."""
    bias = module._parameters.get("bias")
    return None if bias is None else bias.detach()


def build_pair(
    module: nn.Module, form: Form, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None
) -> nn.Sequential:
    """Return two plain layers in the place of one.

    Parameters
    ----------
    module : Module
        Layer to replace.
    form : Form
        Matricisation M of its weight.
    left, right : Tensor, shapes (m, r) and (r, n)
        Factors of the approximation of M.
    bias : Tensor, shape (out,), or None
        Bias of the second layer.

    Returns
    -------
    Sequential
        Layers in the precision, on the device and with the training flags of `module`.
    """
    rank = left.shape[1]
    first: nn.Module
    second: nn.Module
    if isinstance(module, nn.Embedding):
        first = nn.Embedding(
            module.num_embeddings,
            rank,
            module.padding_idx,
            scale_grad_by_freq=module.scale_grad_by_freq,
            sparse=module.sparse,
            device="meta",
        )
        second = nn.Linear(rank, module.embedding_dim, bias=False, device="meta")
        weights = right.T, left
    elif isinstance(module, _CONVOLUTIONS):
        first, second, weights = _build_convolutions(module, form, left, right, bias is not None)
    else:
        first = nn.Linear(right.shape[1], rank, bias=False, device="meta")
        second = nn.Linear(rank, left.shape[0], bias=bias is not None, device="meta")
        weights = right, left
    old: nn.Parameter = module.weight  # type: ignore[assignment]
    for layer, weight in zip((first, second), weights, strict=True):
        layer.weight = _make_parameter(weight, old, old.requires_grad)
    if bias is not None:
        second.bias = _make_parameter(bias, old, module.bias.requires_grad)  # type: ignore[arg-type]
    return nn.Sequential(first, second).train(module.training)


def _make_parameter(values: torch.Tensor, like: torch.Tensor, requires_grad: bool) -> nn.Parameter:
    tensor = torch.empty(values.shape, dtype=like.dtype, device=like.device)
    return nn.Parameter(tensor.copy_(values), requires_grad)


def _build_convolutions(
    conv: Any, form: Form, left: torch.Tensor, right: torch.Tensor, has_bias: bool
) -> tuple[nn.Module, nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Return two convolutions, and their weights.

    Each axis of the kernel belongs to one of them, with its stride, padding and dilation. The first has no
    bias, so that padding commutes with the other axes.
    """
    rank = left.shape[1]
    sizes = [conv.out_channels, conv.in_channels, *conv.kernel_size]
    layers = []
    for axes, channels, bias in (
        (form.right, (conv.in_channels, rank), False),
        (form.left, (rank, conv.out_channels), has_bias),
    ):
        settings: dict[str, Any] = {}
        for name, neutral in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            value = getattr(conv, name)
            if not isinstance(value, str):  # padding by name acts on each axis by itself
                value = tuple(v if 2 + i in axes else neutral for i, v in enumerate(value))
            settings[name] = value
        layers.append(
            type(conv)(*channels, **settings, bias=bias, padding_mode=conv.padding_mode, device="meta")
        )
    first, second = layers
    first_weight = right.reshape(rank, *(sizes[axis] for axis in form.right))
    # Rows (out, kernel axes), then the rank: the rank becomes the axis of the input channels.
    second_weight = left.reshape(*(sizes[axis] for axis in form.left), rank).movedim(-1, 1)
    return (
        first,
        second,
        (first_weight.reshape(first.weight.shape), second_weight.reshape(second.weight.shape)),
    )


class Swap(AbstractContextManager[None]):
    """Exchange of modules in all their places in a model; as a context, for the time of a block.

    Parameters
    ----------
    model : Module
        Model with the original modules.
    new : mapping of int to Module
        Replacements by the id of the original module.
    """

    def __init__(self, model: nn.Module, new: Mapping[int, nn.Module]) -> None:
        self._places = [
            (parent, key, child, new[id(child)])
            for parent in model.modules()
            for key, child in parent._modules.items()
            if child is not None and id(child) in new
        ]

    def apply(self) -> None:
        """Put the replacements in."""
        for parent, key, _, replacement in self._places:
            parent._modules[key] = replacement

    def revert(self) -> None:
        """Put the original modules back."""
        for parent, key, original, _ in self._places:
            parent._modules[key] = original

    def __enter__(self) -> None:
        """Put the replacements in."""
        self.apply()

    def __exit__(self, *_: object) -> None:
        """Put the original modules back."""
        self.revert()


@dataclass(frozen=True)
class Obstacle:
    """Reason why a layer has no low-rank form.

    Attributes
    ----------
    error : type
        TypeError or ValueError.
    reason : str
        Text that continues a sentence with the layer as its subject.
    """

    error: type[TypeError] | type[ValueError]
    reason: str

    def raise_for(self, name: str) -> NoReturn:
        """Raise the error for a layer of this name."""
        raise self.error(f"layers: {name!r} {self.reason}")


def find_obstacle(module: nn.Module, attribute: str, use: WeightUse, model: nn.Module) -> Obstacle | None:
    """Return the reason why a layer has no low-rank form, or None if it has one.

    Parameters
    ----------
    module : Module
        Module that owns the weight.
    attribute : str
        Name of the weight in the module.
    use : WeightUse
        Weight use of the whole model.
    model : Module
        The model.
    """
    reader = use.readers.get(id(module)) or _find_silent_reader(module, model)
    if isinstance(module, nn.MultiheadAttention) or isinstance(reader, nn.MultiheadAttention):
        return Obstacle(
            TypeError,
            "is a weight (in_proj or out_proj) of a MultiheadAttention, which reads it without calling a "
            "layer; wanted an attention of Linear layers",
        )
    if (computation := describe_computation(module, attribute)) is not None:
        remedy = ", as it is after collapse" if is_product(module) else ""
        return Obstacle(
            ValueError, f"has a weight that is computed by {computation}; wanted a parameter{remedy}"
        )
    if (reason := explain_unreadable(module, attribute)) is not None:
        return Obstacle(TypeError, f"has a weight that {reason}; wanted real floating-point numbers")
    if (obstacle := _find_unsuitable_kind(module, attribute)) is not None:
        return obstacle
    if reader is not None:
        return Obstacle(
            TypeError,
            f"has a weight that is read by a {type(reader).__name__}, past the layer's own forward pass; "
            "wanted a layer that is used by calling it only",
        )
    if (sharing := use.sharing.get(id(module))) is not None:
        others = ", ".join(map(repr, sharing))
        return Obstacle(ValueError, f"shares its weight with {others}; compression would separate them")
    if (attribute_reader := use.attribute_readers.get(id(module))) is not None:
        parent, name = attribute_reader
        return Obstacle(
            TypeError,
            f"has an attribute {name!r} that the forward pass of a {type(parent).__name__} reads; the pair "
            "of layers in its place has none",
        )
    return _find_unsuitable_state(module, model)


def _find_unsuitable_kind(module: nn.Module, attribute: str) -> Obstacle | None:
    kind = type(module).__name__
    base = next((k for k in (nn.Linear, nn.Embedding, *_CONVOLUTIONS) if isinstance(module, k)), None)
    if attribute != "weight" or (base is None and not _is_inputs_first(module)):
        return Obstacle(
            TypeError,
            f"is a weight of a {kind}; wanted a Linear, Conv1d, Conv2d, Conv3d, Embedding, or Conv1D as in "
            "GPT-2",
        )
    if base is not None and (
        type(module).forward is not base.forward
        or getattr(type(module), "_conv_forward", None) is not getattr(base, "_conv_forward", None)
    ):
        return Obstacle(TypeError, f"is a {kind}, whose forward pass is its own; wanted {base.__name__}")
    if isinstance(module, _CONVOLUTIONS) and module.groups != 1:
        return Obstacle(TypeError, f"is a convolution of {module.groups} groups; wanted groups=1")
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return Obstacle(ValueError, "has max_norm, which renews its weight at every use")
    return None


def _find_unsuitable_state(module: nn.Module, model: nn.Module) -> Obstacle | None:
    weight, bias = module.get_parameter("weight"), read_bias(module)
    if module is model:
        return Obstacle(
            ValueError,
            "is the model itself, which cannot be replaced in place; wanted a module that contains it, "
            "such as Sequential(layer)",
        )
    if weight.device.type == "meta":
        return Obstacle(ValueError, "is on the meta device, where weights have no values")
    if type(weight.data) is not torch.Tensor:
        return Obstacle(TypeError, f"has a weight that is a {type(weight.data).__name__}; wanted a Tensor")
    if module._modules:
        return Obstacle(TypeError, "contains other modules, such as adapters; wanted a plain layer")
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return Obstacle(ValueError, "has hooks, which would be lost; remove them first")
    if not _is_finite(weight.detach()):
        return Obstacle(ValueError, "has a weight that is not finite")
    if bias is not None and not _is_finite(bias):
        return Obstacle(ValueError, "has a bias that is not finite")
    return None


def _is_finite(tensor: torch.Tensor) -> bool:
    return math.isfinite(
        float(torch.linalg.vector_norm(tensor, math.inf))
    )  # several times faster than isfinite


def _find_silent_reader(module: nn.Module, model: nn.Module) -> nn.Module | None:
    """Return a module that reads a layer's weight where the code of `find_weight_use` does not look."""
    for parent in model.modules():
        if isinstance(parent, nn.MultiheadAttention) and module is parent.out_proj:
            return parent
        if isinstance(parent, nn.TransformerEncoderLayer) and module in (parent.linear1, parent.linear2):
            return parent
    return None


def _is_inputs_first(module: nn.Module) -> bool:
    """Return whether a module is the linear layer of GPT-2 in transformers, with weight (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
