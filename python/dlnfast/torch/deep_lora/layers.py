# SPDX-License-Identifier: MIT
"""Layers that can be adapted, and the thin branch beside each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.nn import functional as F

from .._names import named_layers
from .._reading import computed_by
from ..layers import LayerChoice, WeightMatrix, find_weights

Kind = Literal["linear", "inputs first", "embedding"]

#: Under this name the adapters of a layer are its submodule.
CHILD: Final = "deep_lora"


@dataclass(frozen=True, eq=False)
class Target:
    """A layer that can be adapted, as the map from d_in to d_out features that it is.

    Attributes
    ----------
    name : str
    module : Module
    kind : {"linear", "inputs first", "embedding"}
        The weight is (d_out, d_in), (d_in, d_out) as in GPT-2, or (d_in, d_out) with tokens for inputs.
    d_out, d_in : int
    """

    name: str
    module: nn.Module
    kind: Kind
    d_out: int
    d_in: int

    def check_rank(self, rank: int, init: str, name: str = "rank") -> None:
        """Refuse a rank that an adapter of this layer cannot have."""
        narrow = min(self.d_out, self.d_in)
        if init == "gradient" and rank < min(2, narrow):
            raise ValueError(
                f'{name} is {rank}; wanted at least 2 for init="gradient", a direction on either side'
            )
        if rank > narrow:
            raise ValueError(
                f"{name} is {rank}; wanted at most {narrow}, the smaller side of layer {self.name!r} "
                f"({self.d_out} x {self.d_in})"
            )

    @property
    def weight(self) -> torch.Tensor:
        """The layer's own weight."""
        weight: torch.Tensor = self.module.weight  # type: ignore[assignment]
        return weight

    @property
    def dtype(self) -> torch.dtype:
        """Precision of factors for this layer: float64 where the weight is, else float32."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32


def find_targets(model: nn.Module, layers: LayerChoice) -> list[Target]:
    """Return the chosen layers; None: every linear one that shares its weight with no other.

    Raises
    ------
    TypeError
        For a chosen layer of another kind.
    ValueError
        If nothing is chosen; for a weight that is shared or computed.
    """
    attention = {
        f"{path}.out_proj".lstrip(".")
        for path, _, module in named_layers(model)
        if isinstance(module, nn.MultiheadAttention)
    }
    chosen = find_weights(model, layers, with_unreadable=True)
    if layers is None:
        chosen = [
            m
            for m in chosen
            if m.attribute == "weight"
            and m.part is None
            and not m.aliases
            and m.name not in attention
            and _kind(m.module) in ("linear", "inputs first")
            and computed_by(m.module) is None
        ]
        if not chosen:
            raise ValueError("model has no linear layer to adapt")
    return [_target(matrix, attention) for matrix in chosen]


def as_target(name: str, module: nn.Module) -> Target:
    """Return a layer as what can be adapted; see `find_targets` for the errors."""
    kind = _kind(module)
    if kind is None:
        raise TypeError(
            f"layers: {name!r} is a {type(module).__name__}; wanted Linear, Embedding, or Conv1D as in GPT-2"
        )
    if (how := computed_by(module)) is not None:
        raise ValueError(f"layers: the weight of {name!r} is computed by {how}")
    if getattr(module, "max_norm", None) is not None:
        raise ValueError(f"layers: {name!r} has max_norm, which renews its weight at every use")
    if isinstance(module, nn.Linear):
        return Target(name, module, kind, module.out_features, module.in_features)
    d_in, d_out = module.get_parameter("weight").shape
    return Target(name, module, kind, d_out, d_in)


def _kind(module: nn.Module) -> Kind | None:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "inputs first" if type(module).__name__ == "Conv1D" else None


def _target(matrix: WeightMatrix, attention: set[str]) -> Target:
    if isinstance(matrix.module, nn.MultiheadAttention) or matrix.name in attention:
        raise TypeError(
            f"layers: {matrix.name!r} is read by a MultiheadAttention, which calls no layer for it; wanted a "
            "layer that is called"
        )
    target = as_target(matrix.name, matrix.module)
    if matrix.aliases:
        raise ValueError(
            f"layers: {matrix.name!r} shares its weight with {', '.join(map(repr, matrix.aliases))}; an "
            "adapter of one of them would part them"
        )
    return target


class DeepFactors(nn.Module):
    r"""The branch ``x -> left C_k .. C_1 right x`` beside a layer.

    Attributes
    ----------
    right : Parameter, shape (r, d_in)
    cores : Parameter, shape (k, r, r), or None
        ``C_1 .. C_k`` in one tensor, which costs an optimiser as little as one factor.
    left : Parameter, shape (d_out, r)
    framed : bool
        Whether left and right are frames of unit scale, which learn at another rate.
    enabled, merged : bool
        Neither a branch that is switched off nor one that the weight contains is computed.
    """

    right: nn.Parameter
    left: nn.Parameter
    cores: nn.Parameter | None

    def __init__(self, target: Target, factors: Factors) -> None:
        super().__init__()
        self.kind = target.kind
        self.enabled = True
        self.merged = False
        self.padding_idx = getattr(target.module, "padding_idx", None)
        self.by_frequency = bool(getattr(target.module, "scale_grad_by_freq", False))
        #: Some embeddings multiply what they look up by a number.
        self.embedding_scale = float(getattr(target.module, "embed_scale", 1.0))
        self.set_factors(factors, target.dtype, target.weight.device)

    def set_factors(
        self, factors: Factors, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> None:
        """Make other tensors the parameters."""
        self.framed = factors.framed
        for name, tensor in (("right", factors.right), ("cores", factors.cores), ("left", factors.left)):
            kept = None if tensor is None else nn.Parameter(tensor.detach().to(device, dtype).contiguous())
            self.register_parameter(name, kept)

    @property
    def rank(self) -> int:
        """r, the width."""
        return int(self.right.shape[0])

    @property
    def active(self) -> bool:
        """Whether the branch adds to the layer's output."""
        return self.enabled and not self.merged

    def factors(self) -> Factors:
        """Return the factors as they are now, detached."""
        cores = None if self.cores is None else self.cores.detach()
        return Factors(self.right.detach(), cores, self.left.detach(), self.framed)

    def forward(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Return the layer's output with that of the branch, in the precision of the output."""
        if self.kind == "embedding":
            inner = F.embedding(x, self.right.T, self.padding_idx, None, 2.0, self.by_frequency)
            if self.embedding_scale != 1.0:
                inner = inner * self.embedding_scale
            return self._expand(inner, output, None)
        device = x.device.type
        low = _autocast_dtype(device)
        if low is None:
            return self._expand(F.linear(x.to(self.right.dtype), self.right), output, None)
        # Products of cores, and the gradients behind them, are far below what float16 holds.
        with torch.autocast(device, enabled=False):
            thin = self.right.dtype if low == torch.float16 else low
            inner = F.linear(x.to(thin), self.right.to(thin)).to(self.right.dtype)
            return self._expand(inner, output, thin)

    def _expand(self, inner: torch.Tensor, output: torch.Tensor, low: torch.dtype | None) -> torch.Tensor:
        left: torch.Tensor = self.left
        inner = inner.reshape(-1, inner.shape[-1])
        if self.cores is not None:
            k, rank, _ = self.cores.shape
            cores = self.cores.unbind(0)
            if (k - 1) * rank + len(left) <= k * len(inner):
                left = left @ _product(cores)
            else:
                for core in cores:
                    inner = inner @ core.T
        if low is not None and low == output.dtype:
            inner, left = inner.to(low), left.to(low)
        rows = output.reshape(-1, output.shape[-1])
        if rows.dtype == left.dtype:
            return torch.addmm(rows, inner, left.T).view(output.shape)
        return output + F.linear(inner, left).to(output.dtype).view(output.shape)

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two factors as they are now, whose product is the update, one row per output."""
        return self.factors().as_pair()

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """Return what the branch stands for as a change of the weight, in the weight's layout."""
        above, right = self.pair()
        product = above @ right
        return product if self.kind == "linear" else product.T

    def extra_repr(self) -> str:
        """Return the widths."""
        n_cores = 0 if self.cores is None else len(self.cores)
        return f"{self.right.shape[1]} -> {self.rank} (x {n_cores}) -> {len(self.left)}"


@dataclass(frozen=True, eq=False)
class Factors:
    """``left C_k .. C_1 right``; cores of shape (k, r, r), None where k = 0."""

    right: torch.Tensor
    cores: torch.Tensor | None
    left: torch.Tensor
    framed: bool

    def map_above(self) -> torch.Tensor:
        """Return ``left C_k .. C_1``."""
        return self.left if self.cores is None else self.left @ _product(self.cores.unbind(0))

    def double(self) -> Factors:
        """Return them in float64."""
        cores = None if self.cores is None else self.cores.double()
        return Factors(self.right.double(), cores, self.left.double(), self.framed)

    def as_pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``left C_k .. C_1`` and right, whose product is the update, one row per output."""
        return self.map_above(), self.right

    def as_parameters(self) -> list[torch.Tensor]:
        """Return them in the order in which a `DeepFactors` has its parameters."""
        return [self.right, *([] if self.cores is None else [self.cores]), self.left]

    def as_list(self) -> list[torch.Tensor]:
        """Return ``right, C_1, .., C_k, left``."""
        return [self.right, *([] if self.cores is None else self.cores), self.left]


def _product(cores: Sequence[torch.Tensor]) -> torch.Tensor:
    product = cores[0]
    for core in cores[1:]:
        product = core @ product
    return product


class Adapters(nn.ModuleDict):
    """The adapters of a layer, by their names, as its submodule."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.hook = layer.register_forward_hook(_add_branches, with_kwargs=True)
        #: The layer's own weight, while adapters are merged into it.
        self.kept: torch.Tensor | None = None

    @torch.no_grad()
    def put_weight(self, weight: torch.Tensor) -> None:
        """Write the layer's own weight with the merged adapters' into `weight`."""
        merged = [adapter for adapter in self.values() if isinstance(adapter, DeepFactors) and adapter.merged]
        if self.kept is None and merged:
            self.kept = weight.detach().clone()
        if self.kept is None:
            return
        weight.copy_(self.kept)
        for adapter in merged:
            add_to(weight, adapter.delta_weight())
        if not merged:
            self.kept = None


@torch.no_grad()
def add_to(weight: torch.Tensor, delta: torch.Tensor) -> None:
    """Add to a weight, rounding once."""
    weight.copy_(weight.to(delta.dtype) + delta)


def attach(target: Target, name: str, factors: Factors) -> DeepFactors:
    """Put a branch beside a layer."""
    branch = DeepFactors(target, factors)
    if CHILD not in target.module._modules:
        target.module.add_module(CHILD, Adapters(target.module))
    adapters_of(target.module)[name] = branch
    return branch


def detach(module: nn.Module, name: str) -> None:
    """Take a branch away, and with the last one everything that was added."""
    adapters = adapters_of(module)
    del adapters[name]
    if not adapters:
        adapters.hook.remove()
        del module._modules[CHILD]


def adapters_of(module: nn.Module) -> Adapters:
    """Return the adapters of a layer that has some."""
    adapters = module._modules[CHILD]
    assert isinstance(adapters, Adapters)
    return adapters


def names_at(module: nn.Module) -> Sequence[str]:
    """Return the names of a layer's adapters."""
    return list(adapters_of(module)) if CHILD in module._modules else []


def _add_branches(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    # The layer is an argument, so that copies of a model find their own adapters.
    x = args[0] if args else next(iter(kwargs.values()))
    for adapter in adapters_of(module).values():
        if adapter.active:
            output = adapter(x, output)
    return output


def _autocast_dtype(device: str) -> torch.dtype | None:
    """Return the precision of autocast on a kind of device, where it is on."""
    try:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    except (AttributeError, TypeError):  # before PyTorch 2.4
        if device == "cpu":
            return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
