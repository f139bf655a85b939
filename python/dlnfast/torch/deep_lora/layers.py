# SPDX-License-Identifier: MIT
"""Layers that can be adapted, and the low-rank branches that adapt them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from .._names import match_every_name
from .._reading import describe_computation, explain_unreadable
from .._weight_use import WeightUse, find_weight_use
from ..layers import LayerChoice, WeightMatrix, find_weights

Kind = Literal["linear", "inputs first", "embedding"]

INITS: Final = ("gradient", "random", "full")
#: Name of the submodule with the adapters of a layer.
CHILD: Final = "deep_lora"


@dataclass(frozen=True, eq=False)
class Target:
    """A layer that can be adapted, as a map from d_in to d_out features.

    Attributes
    ----------
    name : str
        Name of the layer.
    module : Module
        The layer.
    kind : {"linear", "inputs first", "embedding"}
        Layout of the weight: (d_out, d_in), (d_in, d_out) as in GPT-2, or (d_in, d_out) with token inputs.
    d_out, d_in : int
        Numbers of outputs and inputs.
    """

    name: str
    module: nn.Module
    kind: Kind
    d_out: int
    d_in: int

    def check_rank(self, rank: int, init: str, name: str = "rank") -> None:
        """Raise ValueError for a rank that an adapter of this layer cannot have."""
        narrow = min(self.d_out, self.d_in)
        if init == "gradient" and rank < min(2, narrow):
            raise ValueError(
                f'{name} is {rank}; wanted at least 2 for init="gradient", one direction on each side'
            )
        if rank > narrow:
            raise ValueError(
                f"{name} is {rank}; wanted at most {narrow}, the smaller side of layer {self.name!r} "
                f"({self.d_out} x {self.d_in}); choose a lower rank, or layers without this one"
            )

    @property
    def weight(self) -> torch.Tensor:
        """Weight of the layer."""
        weight: torch.Tensor = self.module.weight  # type: ignore[assignment]
        return weight

    @property
    def dtype(self) -> torch.dtype:
        """Precision of factors for this layer: float64 for a float64 weight, else float32."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32


def find_targets(model: nn.Module, layers: LayerChoice) -> list[Target]:
    """Return the chosen layers; None chooses every linear layer that can be adapted.

    Raises
    ------
    TypeError
        For a chosen layer of another type, or one that is not called.
    ValueError
        If nothing is chosen, and for a weight that is shared or computed.
    """
    chosen = find_weights(model, layers, with_unreadable=True)
    # A glob such as "encoder.*" also fits the factors of adapters that the layers have already.
    outside = [matrix for matrix in chosen if not isinstance(matrix.module, DeepFactors)]
    chosen = outside or chosen
    use = find_weight_use(model)
    if layers is None:
        chosen = [
            m for m in chosen if m.attribute == "weight" and find_obstacle(m.name, m.module, use) is None
        ]
        if not chosen:
            raise ValueError("model has no linear layer to adapt")
    return [_make_target_of(matrix, use) for matrix in chosen]


def find_named_targets(model: nn.Module, names: Sequence[str]) -> list[Target]:
    """Return the layers of these names, without globs; see `find_targets` for the errors."""
    available = {matrix.name: matrix for matrix in find_weights(model, lambda *_: True, with_unreadable=True)}
    found = match_every_name(names, available, "layers")
    if len(set(found.values())) < len(found):
        raise ValueError(f"layers: {', '.join(map(repr, names))} name one layer twice")
    use = find_weight_use(model)
    return [_make_target_of(available[found[name]], use) for name in names]


def make_target(name: str, module: nn.Module, use: WeightUse) -> Target:
    """Return a layer as a target of adaptation, or raise the error of `find_obstacle`."""
    error = find_obstacle(name, module, use)
    if error is not None:
        raise error
    kind = _find_kind(module)
    assert kind is not None
    if isinstance(module, nn.Linear):
        return Target(name, module, kind, module.out_features, module.in_features)
    d_in, d_out = module.get_parameter("weight").shape
    return Target(name, module, kind, d_out, d_in)


def find_obstacle(name: str, module: nn.Module, use: WeightUse) -> TypeError | ValueError | None:
    """Return an error with the reason why a layer cannot be adapted, or None if it can.

    `DeepLoRA` and the integration with PEFT share these rules, and so adapt the same layers.

    Parameters
    ----------
    name : str
        Name of the layer, for the message.
    module : Module
        The layer.
    use : WeightUse
        Weight use of the whole model.
    """
    if _find_kind(module) is None:
        return TypeError(
            f"layers: {name!r} is a {type(module).__name__}; wanted Linear, Embedding, or Conv1D as in GPT-2"
        )
    if (computation := describe_computation(module)) is not None:
        return ValueError(f"layers: the weight of {name!r} is computed by {computation}; wanted a parameter")
    weight = module._parameters.get("weight")
    if weight is None or is_lazy(weight):
        return ValueError(f"layers: {name!r} has no parameter 'weight', or none before its first call")
    if getattr(module, "max_norm", None) is not None:
        return ValueError(f"layers: {name!r} has max_norm, which renews its weight at every use")
    reader = use.readers.get(id(module))
    if reader is not None:
        return TypeError(
            f"layers: the weight of {name!r} is read by a {type(reader).__name__}, past the layer's own "
            "forward pass, which alone has the update; wanted a layer that is used by calling it only"
        )
    sharing = use.sharing.get(id(module))
    if sharing is not None:
        return ValueError(
            f"layers: {name!r} shares its weight with {', '.join(map(repr, sharing))}; an adapter of one of "
            "them would separate them"
        )
    if CHILD in module._modules and not isinstance(module._modules[CHILD], Adapters):
        return ValueError(f"layers: {name!r} has a submodule {CHILD!r} of its own, the name of its adapters")
    return None


def _find_kind(module: nn.Module) -> Kind | None:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "inputs first" if type(module).__name__ == "Conv1D" else None


def _make_target_of(matrix: WeightMatrix, use: WeightUse) -> Target:
    if isinstance(matrix.module, nn.MultiheadAttention):
        raise TypeError(
            f"layers: {matrix.name!r} is read by a MultiheadAttention, which calls no layer for it; wanted a "
            "layer that is called"
        )
    return make_target(matrix.name, matrix.module, use)


class DeepFactors(nn.Module):
    r"""Branch ``x -> left C_k .. C_1 right x``, which is added to the output of a layer.

    Attributes
    ----------
    right : Parameter, shape (r, d_in)
        First factor.
    cores : Parameter, shape (k, r, r), or None
        Cores ``C_1 .. C_k`` in one tensor, so that an optimiser updates them together.
    left : Parameter, shape (d_out, r)
        Last factor.
    framed : bool
        Whether left and right start as frames of unit scale; otherwise all factors start at one scale.
    enabled : bool
        Whether the adapter is in use.
    merged : bool
        Whether the weight of the layer contains the update, so that the branch is not computed.
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
        #: Factor by which some embeddings multiply their output.
        self.embedding_scale = float(getattr(target.module, "embed_scale", 1.0))
        self.set_factors(factors, target.dtype, target.weight.device)

    def set_factors(
        self, factors: Factors, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> None:
        """Replace the parameters by new ones with the values of the factors."""
        self.framed = factors.framed
        for name, tensor in (("right", factors.right), ("cores", factors.cores), ("left", factors.left)):
            new = None if tensor is None else nn.Parameter(tensor.detach().to(device, dtype).contiguous())
            self.register_parameter(name, new)

    @property
    def rank(self) -> int:
        """Rank r of the branch."""
        return int(self.right.shape[0])

    @property
    def active(self) -> bool:
        """Whether the branch adds to the layer's output."""
        return self.enabled and not self.merged

    def check_finite(self, layer: str, name: str) -> None:
        """Raise a ValueError that names the layer and the adapter if a factor is not finite."""
        for key, factor in self.named_parameters():
            if not bool(torch.isfinite(factor.detach()).all()):
                raise ValueError(f"adapter {name!r} of layer {layer!r} is not finite: see {key}")

    def factors(self) -> Factors:
        """Return the current factors, detached."""
        cores = None if self.cores is None else self.cores.detach()
        return Factors(self.right.detach(), cores, self.left.detach(), self.framed)

    def forward(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Return the layer's output plus that of the branch, in the precision of the output."""
        if output.is_nested:  # TransformerEncoder removes the padding of a batch
            rows = [self(*pair) for pair in zip(x.unbind(), output.unbind(), strict=True)]
            return torch.nested.as_nested_tensor(rows, layout=output.layout)
        if self.kind == "embedding":
            inner = F.embedding(x, self.right.T, self.padding_idx, None, 2.0, self.by_frequency)
            if self.embedding_scale != 1.0:
                inner = inner * self.embedding_scale
            return self._expand(inner, output, None)
        device = x.device.type
        low = _get_autocast_dtype(device)
        if low is None:
            return self._expand(F.linear(x.to(self.right.dtype), self.right), output, None)
        # Products of cores and their gradients underflow in float16.
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
                left = left @ _multiply_cores(cores)
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
        """Return two factors with the current update as their product, one row per output."""
        return self.factors().as_pair()

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """Return the update of the weight by this branch, in the layout of the weight."""
        above, right = self.pair()
        product = above @ right
        return product if self.kind == "linear" else product.T

    def extra_repr(self) -> str:
        """Return the widths."""
        n_cores = 0 if self.cores is None else len(self.cores)
        return f"{self.right.shape[1]} -> {self.rank} (x {n_cores}) -> {len(self.left)}"


@dataclass(frozen=True, eq=False)
class Factors:
    """Factors of ``left C_k .. C_1 right``; cores have shape (k, r, r), and are None for k = 0."""

    right: torch.Tensor
    cores: torch.Tensor | None
    left: torch.Tensor
    framed: bool

    def multiply_above(self) -> torch.Tensor:
        """Return ``left C_k .. C_1``."""
        return self.left if self.cores is None else self.left @ _multiply_cores(self.cores.unbind(0))

    def double(self) -> Factors:
        """Return the factors in float64."""
        cores = None if self.cores is None else self.cores.double()
        return Factors(self.right.double(), cores, self.left.double(), self.framed)

    def as_pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``left C_k .. C_1`` and right; their product is the update, one row per output."""
        return self.multiply_above(), self.right

    def by_name(self) -> dict[str, torch.Tensor]:
        """Return the factors by the parameter names of `DeepFactors`."""
        cores = {} if self.cores is None else {"cores": self.cores}
        return {"right": self.right, **cores, "left": self.left}

    def as_parameters(self) -> list[torch.Tensor]:
        """Return the factors in the order of the parameters of `DeepFactors`."""
        return list(self.by_name().values())

    def as_list(self) -> list[torch.Tensor]:
        """Return ``right, C_1, .., C_k, left``."""
        return [self.right, *([] if self.cores is None else self.cores), self.left]


def _multiply_cores(cores: Sequence[torch.Tensor]) -> torch.Tensor:
    product = cores[0]
    for core in cores[1:]:
        product = core @ product
    return product


class MergedWeight:
    """Merging of updates into the weight of a layer, with a copy of the original weight to restore.

    Parameters
    ----------
    name : str
        Name of the layer, for messages.

    Attributes
    ----------
    original : Tensor or None
        Copy of the weight without updates, while updates are merged.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.original: torch.Tensor | None = None
        self._checksum = 0

    @torch.no_grad()
    def write(self, layer: nn.Module, merged: Mapping[str, DeepFactors]) -> None:
        """Write the original weight plus the updates of the adapters `merged` into a layer.

        If this raises an error, the weight has not changed.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            The errors of `sum` and `check_unchanged`.
        """
        self.check_unchanged(layer)
        if not merged:
            self.restore(layer)
            return
        total = self.sum(layer, merged)
        weight = layer.get_parameter("weight")
        if self.original is None:
            self.original = weight.detach().clone()
        self._checksum = _checksum(total)
        weight.copy_(total)

    @torch.no_grad()
    def sum(self, layer: nn.Module, merged: Mapping[str, DeepFactors]) -> torch.Tensor:
        """Return the original weight of a layer plus the updates of adapters, rounded once.

        Raises
        ------
        TypeError
            For a weight that is no matrix of floating-point numbers, such as a quantised one.
        ValueError
            If a factor or the sum is not finite.
        """
        weight = self.get_own_weight(layer)
        if (reason := explain_unreadable(layer)) is not None:
            raise TypeError(
                f"the weight of layer {self.name!r} {reason}; wanted plain floating-point numbers"
            )
        total = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        for adapter, branch in merged.items():
            branch.check_finite(self.name, adapter)
            total = total + branch.delta_weight().to(total)
        total = total.to(weight.dtype)
        if not bool(torch.isfinite(total).all()):
            raise ValueError(
                f"the weight of layer {self.name!r} with the update of {', '.join(map(repr, merged))} is not "
                f"finite in {weight.dtype}"
            )
        return total

    def get_own_weight(self, layer: nn.Module) -> torch.Tensor:
        """Return the weight of a layer without merged updates; the tensor itself, not a copy."""
        return layer.get_parameter("weight") if self.original is None else self.original

    def check_unchanged(self, layer: nn.Module) -> None:
        """Raise RuntimeError if other code has changed the weight since updates were merged."""
        weight = layer.get_parameter("weight")
        # A conversion of the model to another precision is no change.
        if self.original is None or weight.dtype != self.original.dtype:
            return
        if _checksum(weight) != self._checksum:
            raise RuntimeError(
                f"the weight of layer {self.name!r} was changed, by an optimiser or a copy, while updates "
                "were merged into it; to restore the original weight would lose that change"
            )

    @torch.no_grad()
    def restore(self, layer: nn.Module) -> None:
        """Restore the original weight if updates are merged, and drop the copy."""
        if self.original is not None:
            layer.get_parameter("weight").copy_(self.original)
            self.original = None

    def put_original(self, state: dict[str, Any], key: str) -> None:
        """Replace the merged weight in a state_dict by the original one."""
        if self.original is not None and key in state:
            state[key] = self.original.to(state[key].device, state[key].dtype, copy=True)


def _checksum(weight: torch.Tensor) -> int:
    """Return a checksum of a tensor: the sum of its entries with their bits read as integers."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return int(weight.detach().contiguous().view(bits).sum(dtype=torch.int64))


class Adapters(nn.ModuleDict):
    """Submodule of a layer with its adapters by name."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        layer = target.module
        self.merged_weight = MergedWeight(target.name)
        self.handles = [
            layer.register_forward_hook(_add_branches, with_kwargs=True),
            layer._register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
                _unmerge_to_load, with_module=True
            ),
            layer.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
                _merge_after_load
            ),
        ]

    @classmethod
    def is_valid_name(cls, name: str) -> bool:
        """Return whether an adapter can have this name."""
        is_taken = (
            hasattr(nn.ModuleDict(), name) or hasattr(cls, name) or name in ("merged_weight", "handles")
        )
        return bool(name) and "." not in name and not is_taken

    def branches(self) -> dict[str, DeepFactors]:
        """Return the adapters by name."""
        return {name: branch for name, branch in self.items() if isinstance(branch, DeepFactors)}

    def write_weight(self, layer: nn.Module) -> None:
        """Write the updates of merged and enabled adapters into the layer's weight; see `MergedWeight`."""
        self.merged_weight.write(layer, self._select_merged())

    def check_removal(self, name: str, layer: nn.Module, keep_update: bool) -> None:
        """Raise the errors of `take_out`, before anything is changed."""
        if keep_update and list(self._select_merged()) == [name]:
            return
        self.merged_weight.check_unchanged(layer)
        if keep_update:
            self.merged_weight.sum(layer, {name: self.branches()[name]})

    @torch.no_grad()
    def take_out(self, name: str, layer: nn.Module, keep_update: bool) -> None:
        """Remove the update of an adapter from the weight, or with `keep_update` make it permanent."""
        branch = self.branches()[name]
        if keep_update and list(self._select_merged()) == [name]:
            self.merged_weight.original = None
        elif keep_update:
            self.merged_weight.get_own_weight(layer).copy_(self.merged_weight.sum(layer, {name: branch}))
        branch.merged = False
        self.write_weight(layer)

    def _select_merged(self) -> dict[str, DeepFactors]:
        return {name: branch for name, branch in self.branches().items() if branch.merged and branch.enabled}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the factors, and restore the original weight in the layer's own entry."""
        state = super().state_dict(*args, **kwargs)
        prefix = str(kwargs.get("prefix", ""))
        self.merged_weight.put_original(state, f"{prefix.removesuffix(f'{CHILD}.')}weight")
        return state


def _unmerge_to_load(module: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Restore the layer's original weight, before values from a state_dict are copied into it."""
    del unused
    merged_weight = get_adapters(module).merged_weight
    if f"{prefix}weight" not in state:
        merged_weight.check_unchanged(module)
    merged_weight.restore(module)


def _merge_after_load(module: nn.Module, incompatible: Any) -> None:
    """Merge the loaded factors into the loaded weight."""
    del incompatible
    adapters = get_adapters(module)
    try:
        adapters.write_weight(module)
    except BaseException:
        for branch in adapters.branches().values():
            branch.merged = False
        raise


def attach(target: Target, name: str, factors: Factors) -> DeepFactors:
    """Add a branch to a layer."""
    branch = DeepFactors(target, factors)
    if CHILD not in target.module._modules:
        target.module.add_module(CHILD, Adapters(target))
    get_adapters(target.module)[name] = branch
    return branch


def detach(module: nn.Module, name: str) -> None:
    """Remove a branch from a layer, and with the last branch all hooks and the submodule."""
    adapters = get_adapters(module)
    del adapters[name]
    if not adapters:
        for handle in adapters.handles:
            handle.remove()
        del module._modules[CHILD]


def get_adapters(module: nn.Module) -> Adapters:
    """Return the adapters of a layer; it must have some."""
    adapters = module._modules[CHILD]
    assert isinstance(adapters, Adapters)
    return adapters


def list_adapters(module: nn.Module) -> Sequence[str]:
    """Return the names of a layer's adapters."""
    return list(get_adapters(module)) if CHILD in module._modules else []


def _add_branches(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    # Copies of a model find their own adapters, because the layer is an argument.
    x = args[0] if args else next(iter(kwargs.values()))
    for adapter in get_adapters(module).values():
        if adapter.active:
            output = adapter(x, output)
    return output


def _get_autocast_dtype(device: str) -> torch.dtype | None:
    """Return the precision of autocast on a type of device, or None if autocast is off."""
    try:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    except (AttributeError, TypeError):  # before PyTorch 2.4
        if device == "cpu":
            return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
