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

from .._support.arrays import check_count, check_scale
from .._support.files import parse_object, read_text, translate_read_errors
from ._checkpoint_files import ADAPTER_CONFIG, Checkpoint, find_adapter_file, open_file

#: Start of the names of all layers in an adapter.
PREFIX: Final = "base_model.model."
#: Kind of file in errors.
KIND: Final = "PEFT adapter"
#: Endings of the two factors, and whether they belong to an embedding.
_PAIRS: Final = (
    (".lora_A.weight", ".lora_B.weight", False),
    (".lora_embedding_A", ".lora_embedding_B", True),
)

#: Why adapters of other types are refused.
_OTHER_TYPES: Final = {
    "ADALORA": "whose ranks are masked while it trains",
    "LOHA": "whose update is an entrywise product of two matrices of low rank, so that its rank is not thin",
    "LOKR": "whose update is a Kronecker product",
    "OFT": "which multiplies the weights by orthogonal matrices",
    "BOFT": "which multiplies the weights by orthogonal matrices",
    "IA3": "which scales activations",
    "VERA": "whose factors are random and not in the file",
}
#: Entries of a configuration of LoRA that change the update, and how.
OTHER_UPDATES: Final = {
    "use_dora": "DoRA rescales the updated weight, so that its update is not a product of factors",
    "use_qalora": "QA-LoRA averages the inputs in groups",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "arrow_config": "Arrow chooses between adapters for every token",
    "kasa_config": "KaSA changes the weight and has a diagonal factor",
    "monteclora_config": "MonteCLoRA samples its factors",
    "target_parameters": "adapters of parameters, as of stacked experts, have several updates in a tensor",
}


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
        config = read_config(folder, "LORA")
        self.file: Checkpoint = open_file(find_adapter_file(folder))
        with translate_read_errors(folder / ADAPTER_CONFIG, KIND):
            self.updates = _find_updates(folder, self.file, config)

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


def _find_updates(folder: Path, file: Checkpoint, config: Mapping[str, Any]) -> dict[str, LowRankUpdate]:
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
            rank, scale = find_rank_and_scale(folder, name, config)
            sizes = [math.prod(shape[1:]) for shape in shapes]
            if min(len(shape) for shape in shapes) < 2 or not shapes[0][0] == sizes[1] == rank:
                raise ValueError(f"the factors of layer {name} have the shapes {shapes}; wanted rank {rank}")
            is_transposed = is_embedding or bool(config.get("fan_in_fan_out"))
            shape = (sizes[0], shapes[1][0]) if is_transposed else (shapes[1][0], sizes[0])
            updates[name] = LowRankUpdate(inner, outer, rank, shape, scale, is_transposed)
    if not updates:
        raise ValueError("it has no pair of factors lora_A and lora_B")
    return updates


def read_config(folder: Path, *kinds: str) -> dict[str, Any]:
    """Return the configuration of an adapter of PEFT whose updates are products of thin factors.

    Raises
    ------
    ValueError
        For an adapter of another type than `kinds`, with the reason, and a damaged file.
    """
    with translate_read_errors(folder / ADAPTER_CONFIG, KIND):
        config = parse_object(read_text(folder / ADAPTER_CONFIG))
        kind = str(config["peft_type"])
    if kind not in kinds:
        reason = f", {_OTHER_TYPES[kind]}" if kind in _OTHER_TYPES else ""
        raise ValueError(f"{folder} is an adapter of type {kind}{reason}; wanted {' or '.join(kinds)}")
    for key, reason in OTHER_UPDATES.items():
        if config.get(key):
            raise ValueError(f"{folder} has {key}: {reason}; wanted plain LoRA")
    return config


def find_rank_and_scale(folder: Path, name: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """Return the configured rank r of a layer, and the factor alpha / r or alpha / sqrt(r) of its update."""
    with translate_read_errors(folder / ADAPTER_CONFIG, KIND):
        rank = _find_by_pattern(config.get("rank_pattern") or {}, name, config.get("r", 8))
        alpha = _find_by_pattern(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
        rank = check_count(rank, f"rank of layer {name!r}")
        alpha = check_scale(alpha, f"lora_alpha of layer {name!r}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _find_by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a layer's name, as PEFT does."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
