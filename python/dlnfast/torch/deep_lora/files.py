# SPDX-License-Identifier: MIT
"""Files of adapters: the format of dlnfast, and plain LoRA for PEFT."""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

import torch
from torch import nn

from ..._config.finetuning import INITS
from ..._support.arrays import check_choice, check_count, check_scale
from ..._support.checksums import hash_entries
from ..._support.errors import ShapeError
from ..._support.files import atomic_file, atomic_path, translate_read_errors
from ..._support.optional import import_optional
from .._checkpoint_files import ADAPTER_CONFIG, ADAPTER_MODEL
from .._safetensors import METADATA, parse_header
from .layers import Factors, Kind, Target

_KEY: Final = "dlnfast.deep_lora"
_CHECKSUM: Final = "dlnfast.sha256"
_VERSION: Final = 1
_CONTENT: Final = "Deep LoRA adapter"
#: Entries of PEFT's configuration that do not affect the function of the model.
_FREE: Final = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping")


@dataclass(frozen=True, eq=False)
class SavedLayer:
    """The adapter of one layer in a file."""

    kind: Kind
    d_out: int
    d_in: int
    factors: Factors

    def check_fits(self, target: Target) -> None:
        """Raise ShapeError or ValueError if the adapter does not fit the layer `target`."""
        if (target.d_out, target.d_in) != (self.d_out, self.d_in):
            raise ShapeError(
                f"layer {target.name!r} is {target.d_out} x {target.d_in}; the file's is "
                f"{self.d_out} x {self.d_in}"
            )
        if (target.kind == "embedding") != (self.kind == "embedding"):
            raise ValueError(f"layer {target.name!r} is {target.kind}; the file's is {self.kind}")
        for factor in self.factors.as_parameters():
            check_factor(factor, f"the file's factor of layer {target.name!r}", target.dtype)


def check_factor(value: object, name: str, dtype: torch.dtype) -> None:
    """Raise an error unless `value` is a tensor of floating-point numbers that are finite in `dtype`."""
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name} is {kind}; wanted a tensor of floating-point numbers")
    if not bool(torch.isfinite(value.detach().to(dtype)).all()):
        raise ValueError(f"{name} is not finite in {dtype}")


def write(
    path: str | os.PathLike[str], settings: Mapping[str, Any], layers: Mapping[str, SavedLayer]
) -> None:
    """Write an adapter atomically to a safetensors file, with a checksum."""
    description = {
        "version": _VERSION,
        **settings,
        "layers": {
            name: {"kind": layer.kind, "shape": [layer.d_out, layer.d_in], "framed": layer.factors.framed}
            for name, layer in layers.items()
        },
    }
    tensors = {
        f"{name}.{key}": factor.cpu().contiguous()
        for name, layer in layers.items()
        for key, factor in layer.factors.by_name().items()
    }
    text = json.dumps(description)
    metadata = {"format": "pt", _KEY: text, _CHECKSUM: _compute_checksum(text, tensors)}
    content = _safetensors().save(tensors, metadata)
    with atomic_file(Path(path)) as file:
        file.write(content)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, SavedLayer]]:
    """Read a file of `write`; return the settings, and the layers by name.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        For a file of another format, a damaged file, and a file of a newer version.
    """
    path = Path(path)
    safetensors = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"path is {os.fspath(path)!r}, which is no file")
    content = path.read_bytes()
    with translate_read_errors(path, _CONTENT):
        metadata = _read_metadata(content)
        description = json.loads(metadata[_KEY]) if _KEY in metadata else None
        version = 0 if description is None else int(description["version"])
    if description is None:
        raise ValueError(f"{os.fspath(path)!r} holds no {_CONTENT} of DeepLoRA.save")
    if version > _VERSION:
        raise ValueError(
            f"{os.fspath(path)!r} has format {version}; this version of dlnfast reads up to {_VERSION}"
        )
    with translate_read_errors(path, _CONTENT):
        tensors = safetensors.load(content)
        # The format of 0.1.0 has no checksum. A third entry means that the name of the checksum is damaged.
        if unknown := sorted(metadata.keys() - {"format", _KEY, _CHECKSUM}):
            raise ValueError(f"its metadata have an unknown entry {unknown[0]!r}")
        if _CHECKSUM in metadata and metadata[_CHECKSUM] != _compute_checksum(metadata[_KEY], tensors):
            raise ValueError("its checksum does not match")
        return _parse(description, tensors)


def _read_metadata(content: bytes) -> dict[str, str]:
    """Read the metadata of a safetensors file, which starts with the header after its size in 8 bytes."""
    header, _ = parse_header(io.BytesIO(content), len(content))
    metadata: dict[str, str] = header.get(METADATA, {})
    return metadata


def _compute_checksum(description: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a checksum of an adapter's metadata, and of names, types, shapes and values of its tensors."""
    entries = (
        (
            json.dumps([name, str(tensor.dtype), list(tensor.shape)]),
            tensor.reshape(-1).view(torch.uint8).numpy().data,
        )
        for name, tensor in sorted(tensors.items())
    )
    return hash_entries(description, entries)


def _parse(
    description: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, SavedLayer]]:
    """Return settings and layers, after checks against each other and against the tensors."""
    settings = {key: description[key] for key in ("depth", "scale", "init", "name")}
    depth = check_count(settings["depth"], "depth", minimum=2, maximum=5)
    check_scale(settings["scale"], "scale", strict=True)
    check_choice(settings["init"], "init", INITS)
    layers = {}
    for name, entry in description["layers"].items():
        check_choice(entry["kind"], "kind", get_args(Kind))
        if not isinstance(entry["framed"], bool):
            raise ValueError(f"framed of layer {name!r} is {entry['framed']!r}")
        d_out, d_in = (check_count(size, "shape") for size in entry["shape"])
        n_cores = depth if entry["framed"] else depth - 2
        right, left = tensors.pop(f"{name}.right"), tensors.pop(f"{name}.left")
        cores = tensors.pop(f"{name}.cores") if n_cores else None
        rank = len(right) if right.ndim else 0
        wanted = [(rank, d_in), *([(n_cores, rank, rank)] if n_cores else []), (d_out, rank)]
        factors = Factors(right, cores, left, entry["framed"])
        shapes = [tuple(factor.shape) for factor in factors.as_parameters()]
        if shapes != wanted or not 1 <= rank <= min(d_out, d_in):
            raise ValueError(f"the factors of layer {name!r} have the shapes {shapes}; wanted {wanted}")
        for key, factor in factors.by_name().items():
            check_factor(factor, f"{name}.{key}", factor.dtype)
        layers[name] = SavedLayer(entry["kind"], d_out, d_in, factors)
    if tensors or not layers:
        raise ValueError(f"it has tensors that belong to no layer: {', '.join(sorted(tensors)[:6])}")
    return settings, layers


def write_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    layers: Mapping[str, tuple[Target, Factors]],
    modules: Sequence[str],
    settings: Mapping[str, Any],
) -> None:
    """Write a folder in the format of PEFT's LoRA."""
    for key in settings:
        if key not in _FREE:
            raise TypeError(f"{key} is determined by the adapter; wanted {', '.join(_FREE)}")
    tensors: dict[str, torch.Tensor] = {}
    for name, (target, factors) in layers.items():
        key = f"base_model.model.{name}"
        ends = ("lora_embedding_A", "lora_embedding_B")
        a, b = ends if target.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        tensors[f"{key}.{a}"] = factors.right
        tensors[f"{key}.{b}"] = factors.multiply_above()
    if isinstance(modules, str):
        raise TypeError(f"modules_to_save is {modules!r}; wanted a sequence of names")
    own = dict(model.named_modules())
    for name in modules:
        if name not in own:
            raise ValueError(f"modules_to_save: the model has no module {name!r}")
        for part, tensor in own[name].state_dict().items():
            tensors[f"base_model.model.{name}.{part}"] = tensor
    linear = [target.kind for target, _ in layers.values() if target.kind != "embedding"]
    config = {
        **make_lora_config({name: len(factors.right) for name, (_, factors) in layers.items()}),
        "target_modules": make_target_expression(model, list(layers)),
        "modules_to_save": list(modules) or None,
        "auto_mapping": None if settings.get("task_type") else _find_auto_mapping(model),
        "fan_in_fan_out": bool(linear) and all(kind == "inputs first" for kind in linear),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        **settings,
    }
    write_folder(Path(path), tensors, config)


def _find_auto_mapping(model: nn.Module) -> dict[str, str] | None:
    """Return PEFT's entry for the class of a model of transformers, by which ``AutoPeftModel`` makes it."""
    kind = type(model)
    if not kind.__module__.startswith("transformers."):
        return None
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def make_lora_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return a configuration of PEFT's LoRA for the update ``B A`` with these ranks by layer, unscaled."""
    return {
        "peft_type": "LORA",
        **make_rank_settings(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "task_type": None,
    }


def make_rank_settings(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the entries of PEFT's configuration for ranks by layer, with alpha = r in every layer."""
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    return {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "use_rslora": False,
    }


def make_target_expression(model: nn.Module, names: list[str]) -> list[str] | str:
    """Return PEFT's target_modules for these layers of a model; see `make_target_setting`."""
    return make_target_setting([name for name, _ in model.named_modules()], names)


def make_target_setting(modules: Iterable[str], names: list[str]) -> list[str] | str:
    """Return PEFT's target_modules for layers of a model with these modules.

    PEFT also matches names that end with a listed name. If that would match other modules, the result is a
    regular expression instead of a list.
    """
    wanted = set(names)
    others = [other for other in modules if other not in wanted]
    # Ends of a name after a dot: a look-up for each of them, as there can be many names and modules.
    ends = (other[i + 1 :] for other in others for i, sign in enumerate(other) if sign == ".")
    if any(end in wanted for end in ends):
        return join_names(names)
    return names


def join_names(names: Iterable[str]) -> str:
    """Return a regular expression that matches these names only."""
    return "|".join(re.escape(name) for name in names)


def write_folder(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter of PEFT, its tensors and its configuration, completely or not at all."""
    contents = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    model_bytes = _safetensors().save(contents, {"format": "pt"})
    config_bytes = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    _write_export(folder, {ADAPTER_MODEL: model_bytes, ADAPTER_CONFIG: config_bytes})


def _write_export(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files of an export, or none. Other files in the folder do not change."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    existing = list(folder.iterdir()) if folder.is_dir() else []
    others = [entry for entry in existing if entry.name not in files]
    if any(entry.is_symlink() or not entry.is_file() for entry in others):
        _replace_files(folder, files)
        return
    with atomic_path(folder, durable=True) as temporary:
        temporary.mkdir()
        for name, content in files.items():
            with atomic_file(temporary / name) as file:
                file.write(content)
        for entry in others:
            os.link(entry, temporary / entry.name)


def _replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace files of a folder one by one; after an error restore the previous ones."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{ADAPTER_MODEL}.", suffix=".part") as temporary:
        before = Path(temporary)
        for name, content in files.items():
            with atomic_file(before / f"new-{name}") as file:
                file.write(content)
            if (folder / name).exists():
                os.link(folder / name, before / name)
        try:
            for name in files:
                (before / f"new-{name}").replace(folder / name)
        except BaseException:
            for name in files:
                if (before / name).exists():
                    (before / name).replace(folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
            raise


def _safetensors() -> Any:
    return import_optional("safetensors.torch", "files of adapters", install="safetensors")
