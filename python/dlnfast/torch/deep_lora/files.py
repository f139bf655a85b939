# SPDX-License-Identifier: MIT
"""Files of adapters: their own, and plain LoRA for PEFT."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from ..._optional import imported
from .layers import Factors, Target

_KEY: Final = "dlnfast.deep_lora"
_VERSION: Final = 1
#: Entries of PEFT's configuration that change nothing of the function.
_FREE: Final = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping")


def write(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write tensors and what they are to a safetensors file."""
    contents = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    _safetensors().save_file(
        contents, os.fspath(path), metadata={"format": "pt", _KEY: json.dumps({"version": _VERSION, **about})}
    )


def read(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of a file, and what they are."""
    _safetensors()
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"path is {os.fspath(path)!r}, which is no file")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r} is no safetensors file: {error}") from None
    if _KEY not in metadata:
        raise ValueError(f"{os.fspath(path)!r} holds no Deep LoRA adapter of DeepLoRA.save")
    about: dict[str, Any] = json.loads(metadata[_KEY])
    if about["version"] > _VERSION:
        raise ValueError(
            f"{os.fspath(path)!r} has format {about['version']}; this version of dlnfast "
            f"reads up to {_VERSION}"
        )
    return tensors, about


def write_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    layers: Mapping[str, tuple[Target, Factors]],
    modules: Sequence[str],
    settings: Mapping[str, Any],
) -> None:
    """Write a folder as PEFT does for LoRA."""
    for key in settings:
        if key not in _FREE:
            raise TypeError(f"{key} follows from the adapter; wanted {', '.join(_FREE)}")
    tensors: dict[str, torch.Tensor] = {}
    for name, (target, factors) in layers.items():
        key = f"base_model.model.{name}"
        ends = ("lora_embedding_A", "lora_embedding_B")
        a, b = ends if target.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        tensors[f"{key}.{a}"] = factors.right
        tensors[f"{key}.{b}"] = factors.map_above()
    if isinstance(modules, str):
        raise TypeError(f"modules_to_save is {modules!r}; wanted a sequence of names")
    own = dict(model.named_modules())
    for name in modules:
        if name not in own:
            raise ValueError(f"modules_to_save: the model has no module {name!r}")
        for part, tensor in own[name].state_dict().items():
            tensors[f"base_model.model.{name}.{part}"] = tensor
    ranks = {name: len(factors.right) for name, (_, factors) in layers.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    linear = [target.kind for target, _ in layers.values() if target.kind != "embedding"]
    config = {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": _names(model, list(layers)),
        "modules_to_save": list(modules) or None,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": bool(linear) and all(kind == "inputs first" for kind in linear),
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        **settings,
    }
    safetensors = _safetensors()
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    safetensors.save_file(
        {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()},
        os.fspath(folder / "adapter_model.safetensors"),
        metadata={"format": "pt"},
    )


def _names(model: nn.Module, names: list[str]) -> list[str] | str:
    """Return what PEFT's target_modules has to be: names, which fit ends of others too, or an expression."""
    wanted = set(names)
    others = [other for other, _ in model.named_modules() if other not in wanted]
    if any(other.endswith(f".{name}") for other in others for name in wanted):
        return "|".join(re.escape(name) for name in names)
    return names


def _safetensors() -> Any:
    return imported("safetensors.torch", "files of adapters", install="safetensors")
