# SPDX-License-Identifier: MIT
"""Deep LoRA as a method of PEFT: `DeepLoraConfig` for ``peft.get_peft_model``.

Importing this module adds the type DEEP_LORA to PEFT, whose own types are a closed list. Adapters are saved
under that type, so that PEFT without this module refuses them, instead of taking two factors of three for
LoRA. For a file that loads anywhere: `dlnfast.torch.DeepLoRA.export_lora`, or PEFT's ``save_as_lora``.
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
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, PeftType, register_peft_method
from peft.utils.other import get_pattern_key
from torch import nn

from .._arrays import check_choice, check_count, check_scale, random_generator
from ..torch.deep_lora.gradient import Loss, draw_frames, first_factors, leading_gradients
from ..torch.deep_lora.layers import DeepFactors, add_to, as_target

__all__ = ["DeepLoraConfig", "DeepLoraModel", "initialize_from_gradients", "param_groups"]

#: Releases of PEFT that the tests ran with.
TESTED: Final = (0, 21)
_NAME: Final = "DEEP_LORA"
_INITS: Final = ("gradient", "random")


@dataclass
class DeepLoraConfig(peft.PeftConfig):  # type: ignore[misc]
    """Settings of Deep LoRA, for ``peft.get_peft_model``.

    Parameters
    ----------
    r : int
        Rank.
    depth : int
        L, from 2 to 5.
    scale : float
        eps.
    init : {"gradient", "random"}
        As for `dlnfast.torch.DeepLoRA`. "gradient" takes a call of `initialize_from_gradients` before the
        first training step.
    seed : int
        Of the random frames; a layer's depend on it and on the layer's name.
    target_modules, exclude_modules, layers_to_transform, layers_pattern, rank_pattern, modules_to_save
        As for ``peft.LoraConfig``.

    Examples
    --------
    >>> from dlnfast.integrations import peft as deep  # doctest: +SKIP
    >>> config = deep.DeepLoraConfig(r=8, target_modules=["query"])  # doctest: +SKIP
    >>> model = peft.get_peft_model(model, config)  # doctest: +SKIP
    >>> deep.initialize_from_gradients(model, batch)  # doctest: +SKIP
    >>> optimizer = torch.optim.AdamW(deep.param_groups(model, 1e-4))  # doctest: +SKIP
    """

    r: int = 8
    depth: int = 3
    scale: float = 1e-3
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
            raise ValueError("layers_to_transform goes with a list of target_modules, not with an expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern goes with layers_to_transform, which is None")


class DeepLoraLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A layer with the branches of its adapters."""

    adapter_layer_names = ("deep_lora_factors",)
    other_param_names = ("deep_lora_drawn",)
    # Of PEFT.
    get_base_layer: Any
    set_adapter: Any
    active_adapters: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, name: str, config: DeepLoraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.deep_lora_factors = nn.ModuleDict()
        #: Whether the frames of an adapter still wait for a gradient.
        self.deep_lora_drawn: dict[str, bool] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.target = as_target(name, self.get_base_layer())
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: DeepLoraConfig) -> None:
        """Make an adapter."""
        name = self.target.name
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
        self.target.check_rank(rank, config.init, "r")
        waits = config.init == "gradient"
        generator = random_generator(config.seed, ("deep lora", name))
        frames = draw_frames(None, self.target, rank, generator) if waits else None
        factors = first_factors(self.target, frames, rank, config.depth, config.scale, generator)
        self.deep_lora_factors[adapter_name] = DeepFactors(self.target, factors)
        self.deep_lora_drawn[adapter_name] = waits
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return the update of the weight, in its layout."""
        return self._factors(adapter).delta_weight()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of the adapters to the weight."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.deep_lora_factors:
                continue
            delta = self.get_delta_weight(name)
            if safe_merge and not torch.isfinite(delta).all():
                raise ValueError(f"the update of adapter {name!r} is not finite")
            add_to(self.get_base_layer().weight, delta)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract them again, to rounding."""
        if not self.merged:
            warnings.warn("no adapter is merged", stacklevel=2)
        while self.merged_adapters:
            add_to(self.get_base_layer().weight, -self.get_delta_weight(self.merged_adapters.pop()))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output with those of the active adapters."""
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names: Deep LoRA has no batches of several adapters; save_as_lora has")
        if self.disable_adapters and self.merged:
            self.unmerge()
        output: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        for name in self.active_adapters:
            if name not in self.deep_lora_factors:
                continue
            if self.training and self.deep_lora_drawn[name]:
                raise RuntimeError(
                    f"adapter {name!r} has no gradient to start from: call initialize_from_gradients(model, "
                    'batches) before training, or take init="random"'
                )
            output = self._factors(name)(x, output)
        return output

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell whether PEFT can convert this to LoRA, which it does for linear layers."""
        del adapter_name
        return self.target.kind != "embedding"

    def _factors(self, adapter: str) -> DeepFactors:
        if adapter not in self.deep_lora_factors:
            raise ValueError(f"layer {self.target.name!r} has no adapter {adapter!r}")
        factors = self.deep_lora_factors[adapter]
        assert isinstance(factors, DeepFactors)
        return factors

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *rest: Any
    ) -> None:
        for name in self.deep_lora_factors:
            if f"{prefix}deep_lora_factors.{name}.right" in state_dict:
                self.deep_lora_drawn[name] = False
        super()._load_from_state_dict(state_dict, prefix, *rest)


class DeepLoraModel(BaseTuner):  # type: ignore[misc]
    """What PEFT makes of a model and a `DeepLoraConfig`."""

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
        **rest: Any,
    ) -> None:
        del rest
        if isinstance(target, DeepLoraLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = DeepLoraLayer(target, adapter_name, current_key, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def initialize_from_gradients(
    model: nn.Module,
    batches: Any,
    loss: Loss | None = None,
    *,
    adapter_name: str = "default",
    overwrite: bool = False,
    gradient_memory: int = 2**26,
) -> None:
    """Start an adapter with ``init="gradient"`` from the gradient of a loss.

    Parameters
    ----------
    model : PeftModel
        What ``get_peft_model`` returned.
    batches, loss, gradient_memory
        As for `dlnfast.torch.DeepLoRA`. The gradient is that of the model without adapters.
    adapter_name : str
    overwrite : bool
        Start an adapter again that has started, or was loaded.

    Raises
    ------
    ValueError
        If there is no such adapter with ``init="gradient"``, or it has started already; and for gradients
        that vanish or are not finite.
    """
    config = _configs(model).get(adapter_name)
    if not isinstance(config, DeepLoraConfig) or config.init != "gradient":
        raise ValueError(f'adapter_name is {adapter_name!r}, which is no Deep LoRA with init="gradient"')
    adapted = [m for m in model.modules() if isinstance(m, DeepLoraLayer)]
    layers = [layer for layer in adapted if adapter_name in layer.deep_lora_factors]
    if not overwrite and not all(layer.deep_lora_drawn[adapter_name] for layer in layers):
        raise ValueError(
            f"adapter {adapter_name!r} has started already, or was loaded: what it has learned would be lost "
            "(overwrite=True)"
        )
    targets = [layer.target for layer in layers]
    ranks = [(layer._factors(adapter_name).rank + 1) // 2 for layer in layers]
    memory = check_count(gradient_memory, "gradient_memory", minimum=0)
    with _without_adapters(layers):
        found = leading_gradients(model, targets, batches, loss, ranks, memory)
    for layer, gradient in zip(layers, found, strict=True):
        branch = layer._factors(adapter_name)
        generator = random_generator(config.seed, ("deep lora", layer.target.name))
        frames = draw_frames(gradient, layer.target, branch.rank, generator)
        factors = first_factors(layer.target, frames, branch.rank, config.depth, config.scale, generator)
        # In place: an optimiser may hold the parameters.
        with torch.no_grad():
            for parameter, start in zip(branch.parameters(), factors.as_parameters(), strict=True):
                parameter.copy_(start)
        layer.deep_lora_drawn[adapter_name] = False


def param_groups(
    model: nn.Module, learning_rate: float, outer: float = 1e-2, **options: Any
) -> list[dict[str, Any]]:
    """Return all that is trained as groups for an optimiser, frames at ``outer * learning_rate``.

    See `dlnfast.torch.DeepLoRA.param_groups`; what else is trained, such as a new head, learns at
    `learning_rate`.

    Parameters
    ----------
    model : PeftModel
        With Deep LoRA adapters.
    learning_rate : float
        Of cores and other parameters.
    outer : float
        gamma, the frames' share of it.
    **options
        Further settings of each group.

    Returns
    -------
    list of dict

    Raises
    ------
    ValueError
        For rates that are negative or not finite.

    Notes
    -----
    Cost: O(number of parameters' arrays).
    """
    rate = check_scale(learning_rate, "learning_rate")
    ratio = check_scale(outer, "outer (gamma)")
    framed = [m for m in model.modules() if isinstance(m, DeepFactors) and m.framed]
    frames = [p for m in framed for p in (m.right, m.left) if p.requires_grad]
    kept = {id(p) for p in frames}
    inner = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    groups = [{"params": inner, "lr": rate, **options}, {"params": frames, "lr": ratio * rate, **options}]
    return [group for group in groups if group["params"]]


def _configs(model: nn.Module) -> dict[str, Any]:
    found = getattr(model, "peft_config", None)
    return found if isinstance(found, dict) else {}


@contextmanager
def _without_adapters(layers: list[DeepLoraLayer]) -> Iterator[None]:
    before = [(layer, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in before:
            layer._disable_adapters = disabled


def _register() -> None:
    """Add the type to PEFT, whose list of types is an Enum."""
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
        raise ImportError(f"PEFT {peft.__version__} did not take the type {_NAME}")


_register()
