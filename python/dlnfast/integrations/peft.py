# SPDX-License-Identifier: MIT
"""Deep LoRA as a method of PEFT: `DeepLoraConfig` for ``peft.get_peft_model``.

Importing this module adds the type DEEP_LORA to PEFT, which has no interface for new types. Adapters are
saved with that type, so that PEFT without this module refuses them, instead of loading two of the three
factors as LoRA. For files that PEFT loads without this module, use `dlnfast.torch.DeepLoRA.export_lora`, or
PEFT's ``save_as_lora``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

try:
    import peft
except ModuleNotFoundError as error:
    if error.name != "peft":
        raise
    raise ModuleNotFoundError(
        "dlnfast.integrations.peft needs PEFT, which is not installed: pip install peft", name="peft"
    ) from error

import torch
from packaging.version import Version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, PeftType, register_peft_method
from peft.utils.other import get_pattern_key
from torch import nn

from .._support.arrays import check_choice, check_count, check_scale, random_generator
from .._support.moved import refuse_moved
from ..torch._factor_rates import MOVED_RATE, FactorRates, make_groups
from ..torch._gradients import Loss, find_leading_gradients
from ..torch._names import named_layers, strip_wrapper_parts
from ..torch._weight_use import WeightUse, find_weight_use
from ..torch.deep_lora.files import make_target_expression
from ..torch.deep_lora.gradient import draw_frames, make_first_factors
from ..torch.deep_lora.layers import DeepFactors, MergedWeight, find_obstacle, make_target

__all__ = ["DeepLoraConfig", "DeepLoraModel", "initialize_from_gradients", "param_groups"]

#: Release of PEFT with which this module was tested.
TESTED: Final = (0, 21)
_NAME: Final = "DEEP_LORA"
_INITS: Final = ("gradient", "random")


@dataclass
class DeepLoraConfig(peft.PeftConfig):  # type: ignore[misc]
    """Settings of Deep LoRA, for ``peft.get_peft_model``.

    Parameters
    ----------
    r : int
        Rank of the adapters.
    depth : int
        Depth L, from 2 to 5.
    scale : float
        Scale eps of the cores.
    init : {"gradient", "random"}
        Initial factors as for `dlnfast.torch.DeepLoRA`. "gradient" needs a call of
        `initialize_from_gradients` before the first training step.
    seed : int
        Seed of the random frames. Those of a layer depend on the seed and the layer's name only.
    target_modules, exclude_modules, layers_to_transform, layers_pattern, rank_pattern, modules_to_save
        Settings of ``peft.LoraConfig``. "all-linear" leaves out layers that cannot be adapted; naming such a
        layer is an error. The rules are those of `dlnfast.torch.DeepLoRA`.

    Examples
    --------
    >>> from dlnfast.integrations import peft as deep  # doctest: +SKIP
    >>> config = deep.DeepLoraConfig(r=8, target_modules=["query"])  # doctest: +SKIP
    >>> model = peft.get_peft_model(model, config)  # doctest: +SKIP
    >>> deep.initialize_from_gradients(model, batch)  # doctest: +SKIP
    >>> optimizer = torch.optim.AdamW(deep.param_groups(model, 0.03))  # doctest: +SKIP
    """

    r: int = 8
    depth: int = 3
    scale: float = 1e-2
    init: str = "gradient"
    seed: int = 0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        self.peft_type = getattr(PeftType, _NAME)
        self.r = check_count(self.r, "r")
        self.depth = check_count(self.depth, "depth", minimum=2, maximum=5)
        self.scale = check_scale(self.scale, "scale (eps)", strict=True)
        check_choice(self.init, "init", _INITS)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs a list of target_modules, not an expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform, which is None")


class DeepLoraLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A layer of PEFT with Deep LoRA adapters."""

    adapter_layer_names = ("deep_lora_factors",)
    other_param_names = ("deep_lora_needs_gradient",)
    # Members of BaseTunerLayer, which has no types.
    get_base_layer: Any
    set_adapter: Any
    active_adapters: Any

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, name: str, config: DeepLoraConfig, use: WeightUse
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.deep_lora_factors = nn.ModuleDict()
        #: Whether an adapter still needs `initialize_from_gradients`, by name.
        self.deep_lora_needs_gradient: dict[str, bool] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.target = make_target(name, self.get_base_layer(), use)
        self.merged_weight = MergedWeight(name)
        self.register_load_state_dict_post_hook(_merge_after_load)  # type: ignore[no-untyped-call]
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: DeepLoraConfig) -> None:
        """Add an adapter, or replace the one of this name."""
        name = self.target.name
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
        self.target.check_rank(rank, config.init, "r")
        needs_gradient = config.init == "gradient"
        generator = random_generator(config.seed, ("deep lora", name))
        frames = draw_frames(None, self.target, rank, generator) if needs_gradient else None
        factors = make_first_factors(self.target, frames, rank, config.depth, config.scale, generator)
        self.deep_lora_factors[adapter_name] = DeepFactors(self.target, factors)
        self.deep_lora_needs_gradient[adapter_name] = needs_gradient
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return the update of the weight, in the layout of the weight."""
        return self._get_factors(adapter).delta_weight()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of adapters to the weight, and store a copy of the original weight for `unmerge`.

        Parameters
        ----------
        safe_merge : bool
            No effect: the sum is always checked before it is written.
        adapter_names : list of str, optional
            Adapters to merge. Default: the active ones.

        Raises
        ------
        TypeError
            For a weight that is no matrix of floating-point numbers.
        ValueError
            If a factor or the sum is not finite. The weight is then unchanged.
        RuntimeError
            If something else changed the weight while adapters were merged into it.
        """
        del safe_merge
        self._write(self._list_merged(check_adapters_to_merge(self, adapter_names)))

    def unmerge(self) -> None:
        """Restore the weight from before `merge`, bit for bit; see `merge` for the errors."""
        if not self.merged:
            warnings.warn("no adapter is merged", stacklevel=2)
        self._write([])

    def check_merge(self, adapter_names: list[str] | None) -> None:
        """Raise the errors of `merge`, without merging."""
        names = self._list_merged(self.active_adapters if adapter_names is None else adapter_names)
        self.merged_weight.check_unchanged(self.target.module)
        if names:
            self.merged_weight.sum(self.target.module, self._select_branches(names))

    def _list_merged(self, names: list[str]) -> list[str]:
        """Return the adapters of this layer that are merged, or are to be."""
        added = [n for n in names if n in self.deep_lora_factors and n not in self.merged_adapters]
        return [*self.merged_adapters, *added]

    def _write(self, names: list[str]) -> None:
        self.merged_weight.write(self.target.module, self._select_branches(names))
        self.merged_adapters = names

    def _select_branches(self, names: list[str]) -> dict[str, DeepFactors]:
        return {name: self._get_factors(name) for name in names}

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output plus the branches of the active adapters."""
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names: Deep LoRA has no batches of several adapters; save_as_lora has")
        if self.disable_adapters and self.merged:
            self.unmerge()
        output: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return output
        for name in self.active_adapters:
            if name not in self.deep_lora_factors or name in self.merged_adapters:
                continue
            if self.training and self.deep_lora_needs_gradient[name]:
                raise RuntimeError(
                    f"adapter {name!r} has no gradient to start from: call initialize_from_gradients(model, "
                    'batches) before training, or use init="random"'
                )
            output = self._get_factors(name)(x, output)
        return output

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether PEFT can convert this adapter to LoRA, which is true for linear layers."""
        del adapter_name
        return self.target.kind != "embedding"

    def _get_factors(self, adapter: str) -> DeepFactors:
        if adapter not in self.deep_lora_factors:
            raise ValueError(f"layer {self.target.name!r} has no adapter {adapter!r}")
        factors = self.deep_lora_factors[adapter]
        assert isinstance(factors, DeepFactors)
        return factors

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; raise ValueError for a merged one, as PEFT does for models."""
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter_name is {adapter_name!r}, which is merged; unmerge it first")
        super().delete_adapter(adapter_name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the layer's state with the original weight."""
        state = super().state_dict(*args, **kwargs)
        self.merged_weight.put_original(state, self._weight_key(kwargs.get("prefix", "")))
        return state

    def _weight_key(self, prefix: str) -> str:
        """Return the key of the weight in a state_dict; other tuners' layers may wrap the layer."""
        layer: Any = self
        while layer is not self.target.module:
            prefix, layer = f"{prefix}base_layer.", layer.base_layer
        return f"{prefix}weight"

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *others: Any
    ) -> None:
        # A state_dict contains the weight without updates. They are merged again after loading.
        if self._weight_key(prefix) not in state_dict:
            self.merged_weight.check_unchanged(self.target.module)
        self.merged_weight.restore(self.target.module)
        for name in self.deep_lora_factors:
            if f"{prefix}deep_lora_factors.{name}.right" in state_dict:
                self.deep_lora_needs_gradient[name] = False
        super()._load_from_state_dict(state_dict, prefix, *others)


def _merge_after_load(layer: nn.Module, incompatible: Any) -> None:
    """Merge the loaded factors into the loaded weight."""
    del incompatible
    assert isinstance(layer, DeepLoraLayer)
    try:
        layer._write(layer.merged_adapters)
    except BaseException:
        layer.merged_adapters = []
        raise


class DeepLoraModel(BaseTuner):  # type: ignore[misc]
    """Tuner of PEFT for a model and a `DeepLoraConfig`."""

    prefix = "deep_lora_"
    tuner_layer_cls = DeepLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        peft_config: DeepLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **unused: Any,
    ) -> None:
        del unused
        if isinstance(target, DeepLoraLayer):
            target.update_layer(adapter_name, peft_config)
            return
        self._check_registration(current_key, target)
        name = self._names.get(id(target), current_key)
        layer = DeepLoraLayer(target, adapter_name, name, peft_config, self._use)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        if isinstance(parent, nn.TransformerEncoderLayer):
            layer.register_forward_hook(_prevent_fast_path)
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to all chosen layers, or after an error to none.

        Parameters
        ----------
        model : Module
            Model to adapt.
        adapter_name : str
            Name of the adapter.
        *args, **kwargs
            Further arguments of PEFT's tuners.

        Raises
        ------
        TypeError, ValueError
            For layers that cannot be adapted (see `dlnfast.torch.DeepLoRA`), and for names of adapters that
            PEFT cannot tell apart from other parts of keys in its files.
        """
        _check_adapter_name(model, adapter_name)
        self._use = find_weight_use(model)
        self._names = {id(layer): name for name, _, layer in named_layers(model)}
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        existing = {layer for layer in self._list_layers() if adapter_name in layer.deep_lora_factors}
        config = self.peft_config[adapter_name]
        try:
            self._leave_out_obstacles(model, config)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            self._remove_partial_adapter(model, adapter_name, existing)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            raise

    def _leave_out_obstacles(self, model: nn.Module, config: DeepLoraConfig) -> None:
        """Replace "all-linear" by a choice of the linear layers that can be adapted."""
        choice = config.target_modules
        if not isinstance(choice, str) or choice.lower() != "all-linear":
            return
        linear = _maybe_include_all_linear_layers(config, model).target_modules
        chosen = []
        for name, layer in model.named_modules():
            if isinstance(layer, DeepLoraLayer):
                is_chosen = layer.target.kind != "embedding"
            else:
                is_chosen = name in linear and self._can_adapt(name, layer)
            if is_chosen:
                chosen.append(name)
        if not chosen:
            raise ValueError("target_modules is 'all-linear', but the model has no linear layer to adapt")
        config.target_modules = make_target_expression(model, chosen)

    def _can_adapt(self, name: str, layer: nn.Module) -> bool:
        try:
            self._check_registration(name, layer)
        except ValueError:
            return False
        return find_obstacle(name, layer, self._use) is None

    def _check_registration(self, name: str, layer: nn.Module) -> None:
        """Raise ValueError for a layer that PEFT cannot replace everywhere, or cannot restore."""
        parent_names = self._use.parent_names.get(id(layer), ())
        if len(parent_names) > 1:
            raise ValueError(
                f"layers: {name!r} is registered as {' and '.join(map(repr, parent_names))}, and PEFT "
                "replaces one of them only; dlnfast.torch.DeepLoRA adapts them together"
            )
        if self.prefix in name:
            raise ValueError(
                f"layers: {name!r} has {self.prefix!r} in its name, by which PEFT recognizes adapters; "
                "dlnfast.torch.DeepLoRA adapts it"
            )

    def _remove_partial_adapter(
        self, model: nn.Module, adapter_name: str, existing: set[DeepLoraLayer]
    ) -> None:
        """Remove an adapter that could not be added to all layers, except from the `existing` layers."""
        for parent in list(model.modules()):
            for name, layer in list(parent._modules.items()):
                if not isinstance(layer, DeepLoraLayer) or layer in existing:
                    continue
                if adapter_name in layer.deep_lora_factors:
                    del layer.deep_lora_factors[adapter_name], layer.deep_lora_needs_gradient[adapter_name]
                    if not layer.deep_lora_factors:
                        parent._modules[name] = layer.base_layer

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters in all layers, or after an error in none.

        Parameters
        ----------
        adapter_names : list of str, optional
            Adapters to merge. Default: the active ones.
        safe_merge : bool
            No effect: sums are always checked before they are written.

        Raises
        ------
        TypeError
            For a weight that is no matrix of floating-point numbers.
        ValueError
            If a factor, or the sum of a weight and its updates, is not finite; the message names the layer.
        RuntimeError
            If something else changed a weight while adapters were merged into it.

        Notes
        -----
        Memory: a copy of each adapted weight, until ``unmerge_adapter`` restores it bit for bit.
        """
        self._check_merge(adapter_names)
        before = {layer: layer.merged_adapters for layer in self._list_layers()}
        try:
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        except BaseException:
            for layer, names in before.items():
                layer.merged_weight.restore(layer.target.module)
                layer._write(names)
            raise

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names)
        else:
            for layer in self._list_layers():
                layer._write([])
        result: nn.Module = super()._unload_and_optionally_merge(
            merge, progressbar, safe_merge, adapter_names
        )
        return result

    def _check_merge(self, adapter_names: list[str] | None) -> None:
        for layer in self._list_layers():
            layer.check_merge(adapter_names)

    def _list_layers(self) -> list[DeepLoraLayer]:
        return [module for module in self.model.modules() if isinstance(module, DeepLoraLayer)]

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: DeepLoraConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        found = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        keys = _list_factor_keys(model, adapter_name)
        own = {key: tensor for key, tensor in found.items() if strip_wrapper_parts(key) in keys}
        _check_complete(own, keys, adapter_name)
        return own

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: DeepLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        keys = _list_factor_keys(model, adapter_name)
        _check_complete(remapped, keys, adapter_name)
        for key, tensor in remapped.items():
            if strip_wrapper_parts(key) in keys and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"the file of adapter {adapter_name!r} is not finite: see {key}")
        return remapped


def _prevent_fast_path(module: nn.Module, args: Any, output: Any) -> None:
    """Do nothing. TransformerEncoderLayer calls its layers, instead of reading weights, if one has a hook."""


def _check_adapter_name(model: nn.Module, name: object) -> None:
    """Raise an error for an adapter name with which PEFT's files would lose or exchange factors.

    PEFT identifies adapters by parts of keys: when it saves an adapter, it drops all keys that contain the
    name of another adapter as a part. It saves each adapter except "default" in a folder of its name.
    """
    if not isinstance(name, str):
        raise TypeError(f"adapter_name is {type(name).__name__}; wanted a str")
    if not name or any(sign in name for sign in "./\\\0") or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"adapter_name is {name!r}; wanted a word without dots and slashes that no ModuleDict uses itself"
        )
    taken = {
        "right",
        "cores",
        "left",
        "base_layer",
        "deep_lora_factors",
        "modules_to_save",
        "original_module",
    }
    adapters = {n for m in model.modules() if isinstance(m, DeepLoraLayer) for n in m.deep_lora_factors}
    paths = [path for path, _ in model.named_modules()] + [path for path, _ in model.named_parameters()]
    taken.update(part for path in [*paths, *dict(model.named_buffers())] for part in path.split("."))
    if name in {*taken, "base_model", "model"} - adapters:
        raise ValueError(
            f"adapter_name is {name!r}, which is also a part of the names of the model's parameters; PEFT "
            "identifies adapters by such parts and would lose some when it saves them: wanted another name"
        )


def _list_factor_keys(model: nn.Module, adapter_name: str) -> set[str]:
    """Return the keys of an adapter's factors in the model's state_dict, without the parts of wrappers."""
    return {
        strip_wrapper_parts(f"{path}.deep_lora_factors.{adapter_name}.{key}").lstrip(".")
        for path, layer in model.named_modules()
        if isinstance(layer, DeepLoraLayer) and adapter_name in layer.deep_lora_factors
        for key, _ in layer.deep_lora_factors[adapter_name].named_parameters()
    }


def _check_complete(state: dict[str, torch.Tensor], keys: set[str], adapter_name: str) -> None:
    missing = sorted(keys - {strip_wrapper_parts(key) for key in state})
    if missing:
        raise ValueError(
            f"adapter {adapter_name!r} is incomplete: {len(missing)} of {len(keys)} factors are missing, the "
            f"first is {missing[0]!r}"
        )


def initialize_from_gradients(
    model: nn.Module,
    batches: Any,
    loss: Loss | None = None,
    *,
    adapter_name: str = "default",
    overwrite: bool = False,
    gradient_memory: int = 2**26,
) -> None:
    """Initialize an adapter with ``init="gradient"`` from the gradient of a loss.

    Parameters
    ----------
    model : PeftModel
        Model returned by ``get_peft_model``.
    batches, loss, gradient_memory
        Arguments of `dlnfast.torch.DeepLoRA`. The gradient is that of the model without adapters.
    adapter_name : str
        Name of the adapter.
    overwrite : bool
        Whether to reinitialize an adapter that was initialized or loaded before.

    Raises
    ------
    ValueError
        If there is no such adapter with ``init="gradient"``, or it was initialized or loaded before; and for
        gradients that vanish or are not finite.
    """
    config = _get_configs(model).get(adapter_name)
    if not isinstance(config, DeepLoraConfig) or config.init != "gradient":
        raise ValueError(f'adapter_name is {adapter_name!r}, which is no Deep LoRA with init="gradient"')
    adapted = [m for m in model.modules() if isinstance(m, DeepLoraLayer)]
    layers = [layer for layer in adapted if adapter_name in layer.deep_lora_factors]
    if not overwrite and not all(layer.deep_lora_needs_gradient[adapter_name] for layer in layers):
        raise ValueError(
            f"adapter {adapter_name!r} was initialized or loaded before, and its values would be lost; "
            "wanted overwrite=True to replace them"
        )
    targets = [layer.target for layer in layers]
    ranks = [(layer._get_factors(adapter_name).rank + 1) // 2 for layer in layers]
    memory = check_count(gradient_memory, "gradient_memory", minimum=0)
    with _disable_adapters_of(layers):
        found = find_leading_gradients(model, targets, batches, loss, ranks, memory)
    for layer, gradient in zip(layers, found, strict=True):
        branch = layer._get_factors(adapter_name)
        generator = random_generator(config.seed, ("deep lora", layer.target.name))
        frames = draw_frames(gradient, layer.target, branch.rank, generator)
        factors = make_first_factors(layer.target, frames, branch.rank, config.depth, config.scale, generator)
        # In place, because an optimiser may already have the parameters.
        with torch.no_grad():
            for parameter, start in zip(branch.parameters(), factors.as_parameters(), strict=True):
                parameter.copy_(start)
        layer.deep_lora_needs_gradient[adapter_name] = False


@refuse_moved("param_groups", MOVED_RATE)
def param_groups(
    model: nn.Module, eta: float, outer: float = 1.0, *, match_updates: bool = True, **options: Any
) -> list[dict[str, Any]]:
    """Return all trained parameters as groups for an optimiser, with the rates ``eta / sqrt(a b)``.

    See `dlnfast.torch.DeepLoRA.param_groups`. Other trained parameters, such as a new head, follow the same
    rule: a tensor of n entries gets the learning rate ``eta / sqrt(n)``.

    Parameters
    ----------
    model : PeftModel
        Model with Deep LoRA adapters.
    eta : float
        Frobenius norm of a step of Adam on each factor and each other parameter.
    outer : float
        Factor gamma of the rates of the first and last factor.
    match_updates : bool
        Whether rates depend on shapes. False: eta is the learning rate of all parameters.
    **options
        Further settings of each group.

    Returns
    -------
    list of dict

    Raises
    ------
    TypeError
        For the options ``params`` and ``lr``, and for ``learning_rate``, the keyword of version 0.1.0.
    ValueError
        For an eta or outer that is negative or not finite.

    Notes
    -----
    Cost: O(number of parameter tensors).
    """
    rule = FactorRates.checked(eta, outer, match_updates, "eta")
    branches = [module for module in model.modules() if isinstance(module, DeepFactors)]
    rates = dict(pair for branch in branches for pair in rule.rates_of_factors(list(branch.parameters())))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    all_rates = dict(rule.rates_of_tensors(trained)) | rates
    return make_groups(((parameter, all_rates[parameter]) for parameter in trained), options)


def _get_configs(model: nn.Module) -> dict[str, Any]:
    found = getattr(model, "peft_config", None)
    return found if isinstance(found, dict) else {}


@contextmanager
def _disable_adapters_of(layers: list[DeepLoraLayer]) -> Iterator[None]:
    before = [(layer, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in before:
            layer._disable_adapters = disabled


def _register() -> None:
    """Add the type DEEP_LORA to PEFT's Enum of types, and register this method."""
    release = Version(peft.__version__).release[:2]
    if release < TESTED:
        raise ImportError(
            f"dlnfast.integrations.peft is for PEFT {TESTED[0]}.{TESTED[1]} or later; {peft.__version__} is "
            "installed"
        )
    if release > TESTED:
        warnings.warn(
            f"dlnfast.integrations.peft was tested with PEFT {TESTED[0]}.{TESTED[1]}; {peft.__version__} is "
            "installed",
            RuntimeWarning,
            stacklevel=3,
        )
    if _NAME in PeftType.__members__:
        raise ImportError(f"PEFT {peft.__version__} has a type {_NAME} already, of another implementation")
    member = str.__new__(PeftType, _NAME)
    member._name_, member._value_ = _NAME, _NAME
    member._sort_order_ = len(PeftType)  # pyright: ignore[reportAttributeAccessIssue]
    type.__setattr__(PeftType, _NAME, member)
    PeftType._member_names_.append(_NAME)
    PeftType._member_map_[_NAME] = member
    PeftType._value2member_map_[_NAME] = member
    register_peft_method(name=_NAME.lower(), config_cls=DeepLoraConfig, model_cls=DeepLoraModel)
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(member) is not DeepLoraConfig:
        raise ImportError(f"PEFT {peft.__version__} did not register the type {_NAME}")


_register()
