# SPDX-License-Identifier: MIT
"""Files of adapters whose updates are products of thin factors: LoRA of PEFT, and Deep LoRA."""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from ..._support.arrays import check_path
from ..._support.errors import ShapeError
from ..._support.files import translate_read_errors
from ..._support.optional import import_optional
from .._checkpoint_adapters import (
    KIND,
    OTHER_UPDATES,
    PREFIX,
    find_rank_and_scale,
    read_config,
)
from .._checkpoint_files import ADAPTER_CONFIG, ADAPTER_MODEL, find_adapter_folder
from .._state_files import read_state_file
from .._truncation import Truncation
from ..deep_lora import files
from ..deep_lora.layers import Factors

#: U (d_out, r), s (r,) and V^T (r, d_in) in float64.
ThinSvd = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_TORCH_MODEL: Final = "adapter_model.bin"
_DEEP: Final = "deep_lora_factors"
#: Parts of a key of LoRA: layer, factor. Linear and convolutional layers have the ending "weight".
_LORA_KEY: Final = re.compile(
    r"(?P<layer>.+)\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?P<end>(\.weight)?)"
)
_DEEP_KEY: Final = re.compile(rf"(?P<layer>.+)\.{_DEEP}\.(?P<factor>right|cores|left)")
#: Initializations that change the weights of the base model when PEFT loads the adapter.
_CHANGES_WEIGHTS: Final = ("pissa", "olora", "corda", "loftq", "lora_ga", "lorafa_ga")


@dataclass(frozen=True)
class WrittenUpdate(Truncation):
    """Rank and error of the update of one layer in a file.

    Attributes
    ----------
    rank : int
        Rank of the update.
    error : float
        Error ``||P - P_rank||_F`` of the truncation.
    relative_error : float
        Error divided by ``||P||_F``; 0 for P = 0.
    rounding : float
        Bound of the additional error by the rounding of the factors to the precision of the file, divided by
        ``||P||_F``; 0 for P = 0.
    """

    rounding: float = 0.0


@dataclass(frozen=True, eq=False)
class LayerUpdate:
    """The update ``scaling above below`` of one layer in a file, one row per output.

    Attributes
    ----------
    above, below : Tensor, shape (d_out, r) and (r, d_in)
        Factors, in the precision of the file.
    keys : tuple of str
        Keys of the factors in the file.
    scaling : float
        Factor of the update in LoRA, alpha / r or alpha / sqrt(r).
    tails : tuple of tuple of int
        Kernel sizes of the factors of a convolutional layer.
    """

    above: torch.Tensor
    below: torch.Tensor
    keys: tuple[str, ...] = ()
    scaling: float = 1.0
    tails: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    @property
    def rank(self) -> int:
        """Nominal rank."""
        return int(self.above.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the factors in the file."""
        return self.below.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of outputs and inputs."""
        return int(self.above.shape[0]), int(self.below.shape[1])

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return left (d_out, r) and right (r, d_in) in float64, with the update as their product."""
        return self.scaling * self.above.double(), self.below.double()


@dataclass(frozen=True, eq=False)
class AdapterFile(ABC):
    """An adapter that was read from files.

    Attributes
    ----------
    path : Path
        Folder or file.
    layers : dict of str to LayerUpdate
        Updates by layer.
    """

    path: Path
    layers: dict[str, LayerUpdate]

    def check_writable(self) -> None:  # noqa: B027
        """Raise ValueError if the adapter cannot be written with other ranks; by default it can."""

    @abstractmethod
    def write(self, out: Path, svds: Mapping[str, ThinSvd]) -> dict[str, float]:
        """Write the adapter with these updates to a folder of PEFT.

        Returns
        -------
        dict of str to float
            Bounds of the rounding errors by layer, in the Frobenius norm.
        """


@dataclass(frozen=True, eq=False)
class LoraFolder(AdapterFile):
    """LoRA of PEFT; `others` are the tensors of the file that are no factors."""

    config: dict[str, Any]
    others: dict[str, torch.Tensor] = field(default_factory=dict)

    def check_writable(self) -> None:
        """Raise ValueError for an initialization that depends on the rank and changes the base model."""
        init = self.config.get("init_lora_weights", True)
        if isinstance(init, str) and init.startswith(_CHANGES_WEIGHTS):
            raise ValueError(
                f"{self.path} has init_lora_weights={init!r}: when PEFT loads it, it changes the weights of "
                "the base model, by the rank; convert it to plain LoRA first, by save_pretrained with "
                "path_initial_model_for_weight_conversion"
            )

    def write(self, out: Path, svds: Mapping[str, ThinSvd]) -> dict[str, float]:
        """Write the adapter; see `AdapterFile.write`."""
        tensors, roundings = dict(self.others), {}
        for name, svd in svds.items():
            layer = self.layers[name]
            (left, right), roundings[name] = split_svd(svd, layer.dtype, name)
            below, above = layer.keys
            tensors[below] = right.reshape(len(right), *(layer.tails[0] or right.shape[1:]))
            tensors[above] = left.reshape(*left.shape, *layer.tails[1])
            bias = f"{above.removesuffix('.weight')}.bias"
            if bias in tensors:
                tensors[bias] = tensors[bias] * layer.scaling
        ranks = {name: len(svd[1]) for name, svd in svds.items()}
        config = {**self.config, **files.make_rank_settings(ranks)}
        if config.get("init_lora_weights") == "orthogonal":  # refuses odd ranks, and is replaced at once
            config["init_lora_weights"] = True
        files.write_folder(out, tensors, config)
        return roundings


@dataclass(frozen=True, eq=False)
class DeepLoraFolder(LoraFolder):
    """Deep LoRA of the integration with PEFT, ``left C_k .. C_1 right``."""

    depths: dict[str, int] = field(default_factory=dict)

    def write(self, out: Path, svds: Mapping[str, ThinSvd]) -> dict[str, float]:
        """Write the adapter with ``left = U``, ``right = V^T`` and cores ``S^{1/k}``."""
        tensors, roundings = dict(self.others), {}
        for name, (u, s, vt) in svds.items():
            dtype, k = self.layers[name].dtype, self.depths[name]
            cores = torch.diag(s ** (1 / k)).repeat(k, 1, 1)
            exact = (u * s, vt)
            factors = Factors(vt.to(dtype), cores.to(dtype), u.to(dtype), framed=True)
            roundings[name] = bound_rounding(exact, factors.double().as_pair(), float(s[0]), 1.0)
            stem = self.layers[name].keys[0]
            tensors |= {f"{stem}.{key}": factor for key, factor in factors.by_name().items()}
        settings = files.make_rank_settings({name: len(svd[1]) for name, svd in svds.items()})
        ranks = {key: settings[key] for key in ("r", "rank_pattern")}
        files.write_folder(out, tensors, {**self.config, **ranks})
        return roundings


@dataclass(frozen=True, eq=False)
class DeepLoraFile(AdapterFile):
    """A file of `DeepLoRA.save`, which is written as LoRA."""

    saved: dict[str, files.SavedLayer]

    def write(self, out: Path, svds: Mapping[str, ThinSvd]) -> dict[str, float]:
        """Write the updates as LoRA; see `AdapterFile.write`."""
        kinds = {name: layer.kind for name, layer in self.saved.items()}
        linear = [kind for kind in kinds.values() if kind != "embedding"]
        tensors: dict[str, torch.Tensor] = {}
        roundings = {}
        for name, svd in svds.items():
            factors, roundings[name] = split_svd(svd, self.layers[name].dtype, name)
            tensors |= name_factors(name, factors, is_embedding=kinds[name] == "embedding")
        config = {
            **files.make_lora_config({name: len(svd[1]) for name, svd in svds.items()}),
            "target_modules": files.join_names(kinds),
            "fan_in_fan_out": bool(linear) and all(kind == "inputs first" for kind in linear),
        }
        files.write_folder(out, tensors, config)
        return roundings


def name_factors(
    layer: str, factors: tuple[torch.Tensor, torch.Tensor], *, is_embedding: bool = False
) -> dict[str, torch.Tensor]:
    """Return left and right under the keys of PEFT's LoRA."""
    stem = f"{PREFIX}{layer}.lora_"
    below, above = ("embedding_A", "embedding_B") if is_embedding else ("A.weight", "B.weight")
    return {stem + below: factors[1], stem + above: factors[0]}


def split_svd(svd: ThinSvd, dtype: torch.dtype, name: str) -> tuple[tuple[torch.Tensor, torch.Tensor], float]:
    """Return ``U s^{1/2}`` and ``s^{1/2} V^T`` in a precision, and a bound of the error by rounding."""
    u, s, vt = svd
    root = s.sqrt()
    exact = u * root, root[:, None] * vt
    left, right = (factor.to(dtype) for factor in exact)
    for factor in (left, right):
        files.check_factor(factor, f"the new factor of layer {name!r}", dtype)
    norm = math.sqrt(float(s[0]))
    return (left, right), bound_rounding(exact, (left.double(), right.double()), norm, norm)


def bound_rounding(
    exact: tuple[torch.Tensor, torch.Tensor],
    rounded: tuple[torch.Tensor, torch.Tensor],
    left_norm: float,
    right_norm: float,
) -> float:
    """Bound ``||L R - L' R'||_F`` by ``||L - L'||_F ||R||_2 + ||L'||_2 ||R - R'||_F``; O((m + n) r)."""
    left, right = (float(torch.linalg.vector_norm(a - b)) for a, b in zip(exact, rounded, strict=True))
    return left * right_norm + (left_norm + left) * right


# -------------------------------------------------------------------------------------------- reading


def read_adapter(path: str | os.PathLike[str], name: str = "path") -> AdapterFile:
    """Read a folder of PEFT with LoRA or Deep LoRA (or its file of factors), or a file of `DeepLoRA.save`.

    Raises
    ------
    FileNotFoundError
        If the file, or a file of the folder, does not exist.
    ShapeError
        If the shapes of the factors of a layer do not fit each other; the message names the layer.
    ValueError
        For adapters of other kinds, a missing factor, a factor that is not finite (the message names the
        layer), a rank that differs from the configuration, and damaged files.
    """
    found = find_adapter_folder(check_path(path, name))
    if found.is_file():
        return _read_deep_file(found)
    if not found.is_dir():
        raise FileNotFoundError(f"{name} is {os.fspath(path)!r}, which is no folder and no file")
    if not (found / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"{name} is {os.fspath(path)!r}, a folder without {ADAPTER_CONFIG}")
    config, tensors = read_config(found, "LORA", "DEEP_LORA"), _read_tensors(found)
    read = _read_lora if config["peft_type"] == "LORA" else _read_deep_lora
    return read(found, config, tensors)


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / ADAPTER_MODEL
    if path.is_file():
        safetensors = import_optional("safetensors.torch", "files of adapters", install="safetensors")
        with translate_read_errors(path, KIND):
            tensors: dict[str, torch.Tensor] = safetensors.load_file(path)
        return tensors
    if not (path := folder / _TORCH_MODEL).is_file():
        raise FileNotFoundError(f"{folder} has neither {ADAPTER_MODEL} nor {_TORCH_MODEL}")
    found = read_state_file(path, f"a {KIND}")
    for key, value in found.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: {key!r} is {type(value).__name__}; wanted a tensor")
    return found


def _read_lora(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> LoraFolder:
    others = dict(tensors)
    pairs: dict[str, dict[str, str]] = {}
    for key in tensors:
        if "lora_magnitude_vector" in key:
            raise ValueError(f"{folder} has {key!r}: {OTHER_UPDATES['use_dora']}; wanted plain LoRA")
        if found := _LORA_KEY.fullmatch(key):
            pairs.setdefault(found["layer"], {})[found["factor"]] = key
            del others[key]
    if not pairs:
        raise ValueError(f"{folder} has no factors lora_A and lora_B")
    layers = {}
    for stem, keys in pairs.items():
        name = stem.removeprefix(PREFIX)
        layers[name] = _make_lora_layer(folder, name, keys, config, tensors)
    return LoraFolder(folder, layers, config, others)


def _make_lora_layer(
    folder: Path,
    name: str,
    keys: Mapping[str, str],
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
) -> LayerUpdate:
    kind = "lora_embedding_" if any("embedding" in factor for factor in keys) else "lora_"
    wanted = (f"{kind}A", f"{kind}B")
    if set(keys) != set(wanted):
        missing = sorted(set(wanted) - set(keys)) or sorted(set(keys) - set(wanted))
        raise ValueError(
            f"{folder}: layer {name!r} has {' and '.join(sorted(keys))}; wanted {' and '.join(wanted)} "
            f"(see {missing[0]})"
        )
    below, above = (tensors[keys[factor]] for factor in wanted)
    for factor, tensor in zip(wanted, (below, above), strict=True):
        files.check_factor(tensor, f"{folder}: {factor} of layer {name!r}", tensor.dtype)
    rank, scaling = find_rank_and_scale(folder, name, config)
    fits = min(below.ndim, above.ndim) >= 2 and math.prod(above.shape[2:]) == 1 and below.numel() > 0
    if fits and len(below) == rank and above.shape[1] != rank and above.ndim > 2:
        raise ValueError(
            f"{folder}: layer {name!r} is a convolution in groups, whose update is not one product of factors"
        )
    if not fits or above.numel() == 0 or len(below) != above.shape[1]:
        raise ShapeError(
            f"{folder}: the factors of layer {name!r} have shapes {tuple(below.shape)} and "
            f"{tuple(above.shape)}; wanted (r, inputs) and (outputs, r)"
        )
    if len(below) != rank:
        raise ShapeError(
            f"{folder}: the factors of layer {name!r} have rank {len(below)}; wanted {rank} as configured"
        )
    return LayerUpdate(
        above.reshape(len(above), rank),
        below.reshape(rank, -1),
        (keys[wanted[0]], keys[wanted[1]]),
        scaling,
        (tuple(below.shape[1:]), tuple(above.shape[2:])),
    )


def _read_deep_lora(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> DeepLoraFolder:
    others = dict(tensors)
    stems: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if found := _DEEP_KEY.fullmatch(key):
            stems.setdefault(found["layer"], {})[found["factor"]] = tensor
            del others[key]
    if not stems:
        raise ValueError(f"{folder} has no factors of Deep LoRA")
    layers, depths = {}, {}
    for stem, parts in stems.items():
        name = stem.removeprefix(PREFIX)
        if missing := {"right", "cores", "left"} - set(parts):
            raise ValueError(f"{folder}: layer {name!r} lacks the factor {min(missing)!r}")
        for key, tensor in parts.items():
            files.check_factor(tensor, f"{folder}: {key} of layer {name!r}", tensor.dtype)
        right, cores, left = (parts[key] for key in ("right", "cores", "left"))
        rank = len(right) if right.ndim == 2 else 0
        if rank == 0 or cores.shape[1:] != (rank, rank) or left.shape[1:] != (rank,):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (right, cores, left))
            raise ShapeError(f"{folder}: the factors of layer {name!r} have shapes {shapes}")
        layers[name] = make_deep_update(Factors(right, cores, left, framed=True), f"{stem}.{_DEEP}")
        depths[name] = len(cores)
    return DeepLoraFolder(folder, layers, config, others, depths)


def _read_deep_file(path: Path) -> DeepLoraFile:
    _, saved = files.read(path)
    layers = {name: make_deep_update(layer.factors) for name, layer in saved.items()}
    return DeepLoraFile(path, layers, saved)


def make_deep_update(factors: Factors, *keys: str) -> LayerUpdate:
    """Return the update of Deep LoRA; the product of the cores is computed in float64."""
    above, _ = factors.double().as_pair()
    return LayerUpdate(above, factors.right, keys)
