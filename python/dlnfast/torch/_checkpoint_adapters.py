# SPDX-License-Identifier: MIT
"""LoRA adapters in the format of PEFT as low-rank updates of named matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from .._support.arrays import check_scale
from .._support.files import parse_object, read_text, translate_read_errors
from ._checkpoint_files import ADAPTER_CONFIG, Checkpoint, find_adapter_file, open_file

#: Start of the names of all layers in an adapter.
PREFIX: Final = "base_model.model."
#: Endings of the two factors, and whether they belong to an embedding.
_PAIRS: Final = (
    (".lora_A.weight", ".lora_B.weight", False),
    (".lora_embedding_A", ".lora_embedding_B", True),
)


@dataclass(frozen=True)
class LowRankUpdate:
    """The stored factors of one update, ``scale B A``, or its transpose.

    Attributes
    ----------
    inner, outer : str
        Names of the tensors A and B.
    rank : int
        Their common size.
    shape : (int, int)
        Rows and columns of the update.
    scale : float
        Factor alpha / r, or alpha / sqrt(r).
    is_transposed : bool
        Whether the weight is stored with the inputs first, as by an embedding.
    """

    inner: str
    outer: str
    rank: int
    shape: tuple[int, int]
    scale: float
    is_transposed: bool


class LoRAFolder:
    """A folder with a LoRA adapter.

    Parameters
    ----------
    folder : Path
        Folder with ``adapter_config.json`` and the factors.

    Raises
    ------
    FileNotFoundError
        If the file with the factors is missing.
    ValueError
        For an adapter of another kind, and a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.label = str(folder)
        path = folder / ADAPTER_CONFIG
        with translate_read_errors(path, "LoRA adapter"):
            config = parse_object(read_text(path))
            kind = str(config.get("peft_type"))
        if kind != "LORA" or config.get("use_dora"):
            kind = "DoRA" if kind == "LORA" else kind
            raise ValueError(f"adapter {folder} is {kind}; wanted LORA, whose update is alpha / r B A")
        self.file: Checkpoint = open_file(find_adapter_file(folder))
        with translate_read_errors(path, "LoRA adapter"):
            self.updates = _find_updates(self.file, config)

    def read_factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return factors (m, r) and (r, n) of an update in float64; the first one includes the scale.

        Raises
        ------
        ValueError
            If a factor is not finite.
        """
        update = self.updates[name]
        factors = []
        for stored in (update.inner, update.outer):
            tensor = self.file.read(stored).to(torch.float64)
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"checkpoint {self.label}: tensor {stored} has values that are not finite")
            factors.append(tensor.flatten(1))
        inner, outer = factors
        return (update.scale * inner.T, outer.T) if update.is_transposed else (update.scale * outer, inner)


def _find_updates(file: Checkpoint, config: Mapping[str, Any]) -> dict[str, LowRankUpdate]:
    """Return the updates of an adapter by the names of their layers.

    Raises
    ------
    ValueError
        If a factor is missing or does not fit the other.
    """
    updates: dict[str, LowRankUpdate] = {}
    for inner, info in file.tensors.items():
        for end, other_end, is_embedding in _PAIRS:
            if not inner.endswith(end):
                continue
            name = inner.removesuffix(end).removeprefix(PREFIX)
            outer = inner.removesuffix(end) + other_end
            shapes = [info.shape, file.tensors[outer].shape]
            rank = shapes[0][0]
            sizes = [math.prod(shape[1:]) for shape in shapes]
            if min(len(shape) for shape in shapes) < 2 or sizes[1] != rank:
                raise ValueError(f"the factors of layer {name} have the shapes {shapes}")
            is_transposed = is_embedding or bool(config.get("fan_in_fan_out"))
            shape = (sizes[0], shapes[1][0]) if is_transposed else (shapes[1][0], sizes[0])
            patterns = config.get("alpha_pattern") or {}
            alpha = check_scale(float(find_by_pattern(patterns, name, config["lora_alpha"])), "lora_alpha")
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            updates[name] = LowRankUpdate(inner, outer, rank, shape, scale, is_transposed)
    if not updates:
        raise ValueError("it has no pair of factors lora_A and lora_B")
    return updates


def find_by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a layer's name, as PEFT does."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
