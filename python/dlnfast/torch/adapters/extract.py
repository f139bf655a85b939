# SPDX-License-Identifier: MIT
"""LoRA adapters from the difference of two checkpoints."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

import numpy as np
import torch

from ..._problem.factors import DenseMap, leading_factors
from ..._problem.low_rank import LowRank
from ..._support.arrays import FloatArray, as_list, check_flag, frobenius_norm
from .._names import format_names
from .._truncation import Truncation, TruncationRule
from ..deep_lora import files
from .checkpoints import Checkpoint
from .resize import check_output, describe_update, pad_to_one_rank
from .sources import ThinSvd, WrittenUpdate, name_factors, split_svd

#: Names of embeddings, matched against the last part of the name of a layer.
EMBEDDINGS: Final = (
    "*embedding",
    "*embeddings",
    "embed_tokens",
    "embed_positions",
    "tok_embeddings",
    "wte",
    "wpe",
    "shared",
)
#: Model types of transformers whose linear layers are Conv1D, with weights of shape (inputs, outputs).
_INPUTS_FIRST: Final = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
#: Number of singular values that are computed first if only a tolerance is given.
_FIRST_COUNT: Final = 8
#: Accuracy of the singular values, relative to the largest. The stated errors hold at any accuracy.
_ACCURACY: Final = 1e-6
#: Share of the squared norm below which the squared error is computed from the residual, not by subtraction.
_CANCELS: Final = 1e-8


@dataclass(frozen=True)
class Extraction:
    """Layers of an adapter that was extracted from two checkpoints.

    Attributes
    ----------
    layers : dict of str to WrittenUpdate
        Ranks and errors by layer of the adapter. The errors are exact to rounding: they are computed from
        ``||D||_F^2`` and the singular values of the approximation, not estimated.
    unchanged : tuple of str
        Tensors that are equal in both checkpoints.
    left_out : dict of str to str
        Tensors that differ and are not in the adapter, with the reason.
    """

    layers: dict[str, WrittenUpdate]
    unchanged: tuple[str, ...]
    left_out: dict[str, str]


def extract_adapter(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    layers: Sequence[str] | None = None,
    embeddings: Sequence[str] = EMBEDDINGS,
    fan_in_fan_out: bool | None = None,
    uniform: bool = False,
    overwrite: bool = False,
) -> Extraction:
    r"""Write the difference of two checkpoints of a model as a LoRA adapter for PEFT.

    Parameters
    ----------
    base, tuned : path-like
        Checkpoints of the same model before and after training: files of safetensors or `torch.save`, or
        folders with them as written by ``save_pretrained``, also in parts.
    out : path-like
        Folder for the adapter, new or empty.
    rank : int, optional
        Maximal rank of every layer.
    tolerance : float, optional
        Maximal relative error of every layer, ``||D - D_rank||_F <= tolerance ||D||_F`` for the difference D
        of its weights. At least one of `rank` and `tolerance` is required; with both, the lower rank is used.
    layers : sequence of str, optional
        Names of the layers to extract, or patterns such as ``"*.self_attn.*"``. Default: all layers whose
        weight differs and is a matrix or a convolution.
    embeddings : sequence of str
        Names of the layers that are embeddings, or patterns, matched against the whole name and its last
        part. A checkpoint does not tell them apart from linear layers, and PEFT stores them under other keys.
    fan_in_fan_out : bool, optional
        Whether the weights of linear layers have shape (inputs, outputs), as Conv1D of GPT-2. Default: the
        model type in ``config.json`` decides; False without one.
    uniform : bool
        Whether to pad all factors with zeros to one rank, for programs that do not support ``rank_pattern``.
    overwrite : bool
        Whether to replace an adapter in an existing folder. Other files in it do not change.

    Returns
    -------
    Extraction

    Raises
    ------
    FileExistsError
        If `out` exists and is not empty, without `overwrite`.
    FileNotFoundError
        If a file does not exist.
    ModuleNotFoundError
        If the package safetensors is not installed.
    ValueError
        For arguments out of their range, checkpoints without a common tensor, without a difference that can
        be extracted, or with values that are not finite (the message names the tensor), and damaged files.
        Nothing is written then.

    Notes
    -----
    For every weight, the leading singular vectors U of ``D = W_tuned - W_base`` are computed by block
    subspace iteration in float64. With ``S V^T = U^T D``, the error is :math:`\|D - U S V^T\|_F^2 = \|D\|_F^2
    - \sum_i s_i^2` for any orthonormal U, so that the stated error holds even if the iteration has not
    converged. The factors are written in float32. Layers that do not differ are left out. Biases,
    normalizations and tensors of other shapes cannot be part of LoRA; `Extraction.left_out` lists those that
    differ. Convolutions are taken to have one group. If a model ties a weight (``lm_head`` to the embedding),
    safetensors stores one of the two names only, and the adapter changes that layer only. Cost: O(m n k) time
    for every m x n weight of rank k, until convergence; memory for four copies of the largest weight in
    float64, and for the adapter.

    Examples
    --------
    >>> import dlnfast as dln
    >>> found = dln.torch.extract_adapter("base", "tuned", "adapter", tolerance=0.1)  # doctest: +SKIP
    >>> {name: layer.rank for name, layer in found.layers.items()}  # doctest: +SKIP
    """
    rule = TruncationRule.checked(rank, tolerance, "extract_adapter")
    chosen = None if layers is None else as_list(layers, "layers", "a sequence of names")
    patterns = as_list(embeddings, "embeddings", "a sequence of names")
    is_uniform = check_flag(uniform, "uniform")
    target = check_output(out, check_flag(overwrite, "overwrite"))
    checkpoints = Checkpoint(base, "base"), Checkpoint(tuned, "tuned")
    if fan_in_fan_out is None:
        inputs_first = checkpoints[0].config.get("model_type") in _INPUTS_FIRST
    else:
        inputs_first = check_flag(fan_in_fan_out, "fan_in_fan_out")
    differences = _Differences(checkpoints, chosen, patterns, inputs_first)
    truncations: dict[str, Truncation] = {}
    svds: dict[str, ThinSvd] = {}
    for name in differences.names():
        matrix = differences.read(name)
        if matrix is not None:
            truncations[name], svds[name] = _approximate(matrix, rule)
    if not svds:
        raise ValueError(
            f"{checkpoints[0].path} and {checkpoints[1].path} differ in no weight that can be extracted"
        )
    roundings = _write(target, pad_to_one_rank(svds) if is_uniform else svds, differences)
    written = {
        name: describe_update(truncation, svds[name][1], roundings[name])
        for name, truncation in truncations.items()
    }
    return Extraction(written, tuple(differences.unchanged), differences.left_out)


class _Differences:
    """Differences of the weights of two checkpoints, as matrices with a row for every output.

    Attributes
    ----------
    unchanged : list of str
        Tensors that are equal.
    left_out : dict of str to str
        Other tensors that are not extracted, with the reason.
    kernels : dict of str to tuple of int
        Shape of the weight of a convolutional layer, without the outputs.
    embeddings : set of str
        Layers that are embeddings.
    """

    def __init__(
        self,
        checkpoints: tuple[Checkpoint, Checkpoint],
        layers: Sequence[str] | None,
        embeddings: Sequence[str],
        inputs_first: bool,
    ) -> None:
        self.checkpoints = checkpoints
        self.inputs_first = inputs_first
        self.unchanged: list[str] = []
        self.left_out: dict[str, str] = {}
        self.kernels: dict[str, tuple[int, ...]] = {}
        self.embeddings: set[str] = set()
        self._layers = layers
        self._patterns = embeddings
        base, tuned = (checkpoint.names() for checkpoint in checkpoints)
        common = set(base) & set(tuned)
        if not common:
            raise ValueError(f"{checkpoints[1].path} has no tensor of {checkpoints[0].path}")
        self._keys = [key for key in base if key in common]
        self.left_out.update((key, "only in base") for key in base if key not in common)
        self.left_out.update((key, "only in tuned") for key in tuned if key not in common)
        unmatched = [
            pattern
            for pattern in layers or ()
            if not any(fnmatchcase(key.removesuffix(".weight"), pattern) for key in self._keys)
        ]
        if unmatched:
            weights = [key.removesuffix(".weight") for key in self._keys if key.endswith(".weight")]
            raise ValueError(
                f"layers: {unmatched[0]!r} fits no layer of {checkpoints[0].path}: {format_names(weights)}"
            )

    def names(self) -> list[str]:
        """Return the names of all tensors in both checkpoints, without the ending ".weight"."""
        return [key.removesuffix(".weight") for key in self._keys]

    def modules(self) -> list[str]:
        """Return the names of all modules with tensors, and of the modules that contain them."""
        found: dict[str, None] = {}
        for checkpoint in self.checkpoints:
            for key in checkpoint.names():
                parts = key.split(".")[:-1]
                found.update((".".join(parts[: i + 1]), None) for i in range(len(parts)))
        return list(found)

    def read(self, name: str) -> FloatArray | None:
        """Return the difference of a weight in float64; None if it is zero or cannot be extracted."""
        key = f"{name}.weight"
        is_weight = key in self._keys
        key = key if is_weight else name
        base, tuned = (checkpoint.read(key) for checkpoint in self.checkpoints)
        if base.shape != tuned.shape:
            self.left_out[key] = f"its shape changes from {tuple(base.shape)} to {tuple(tuned.shape)}"
            return None
        if not (base.is_floating_point() and tuned.is_floating_point()):
            if not torch.equal(base, tuned):
                self.left_out[key] = "no tensor of real floating-point numbers"
            else:
                self.unchanged.append(key)
            return None
        change = tuned.double() - base.double()
        if not bool(torch.isfinite(change).all()):
            raise ValueError(f"{key!r} is not finite in {self._find_not_finite(base)}")
        if not bool(change.any()):
            self.unchanged.append(key)
            return None
        if not is_weight or change.ndim not in (2, 4):
            self.left_out[key] = "no matrix and no two-dimensional convolution"
            return None
        if f"{name.removesuffix('.out_proj')}.in_proj_weight" in self._keys:
            self.left_out[key] = "read by a MultiheadAttention, past the layer that an adapter changes"
            return None
        if self._layers is not None and not _fits(name, self._layers):
            self.left_out[key] = "not among the layers to extract"
            return None
        return self._as_matrix(name, change)

    def _find_not_finite(self, base: torch.Tensor) -> str:
        return str(self.checkpoints[0 if not bool(torch.isfinite(base).all()) else 1].path)

    def _as_matrix(self, name: str, change: torch.Tensor) -> FloatArray:
        if change.ndim == 4:
            self.kernels[name] = tuple(change.shape[1:])
            change = change.reshape(len(change), -1)
        elif _fits(name, self._patterns) or _fits(name.rpartition(".")[2], self._patterns):
            self.embeddings.add(name)
            change = change.T
        elif self.inputs_first:
            change = change.T
        result: FloatArray = np.ascontiguousarray(change.numpy())
        return result


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _approximate(matrix: FloatArray, rule: TruncationRule) -> tuple[Truncation, ThinSvd]:
    """Return the truncation of a matrix, and its leading singular vectors and values.

    With a tolerance, the number of singular values doubles until they suffice.
    """
    narrow = min(matrix.shape)
    limit = narrow if rule.rank is None else min(rule.rank, narrow)
    count = limit if rule.tolerance is None else min(_FIRST_COUNT, limit)
    total = frobenius_norm(matrix) ** 2
    while True:
        found = leading_factors(DenseMap(matrix), count, _ACCURACY)
        complement = _square_error(matrix, found, total)
        if count == limit or rule.tolerance is None or complement <= rule.tolerance**2 * total:
            break
        # From half of the smaller side on, all values are as cheap.
        count = limit if 8 * count >= narrow else min(2 * count, limit)
    truncation = rule.choose(torch.from_numpy(np.ascontiguousarray(found.s)), complement)
    u, s, vt = found.U[:, : truncation.rank], found.s[: truncation.rank], found.V[:, : truncation.rank].T
    return truncation, (_as_tensor(u), _as_tensor(s), _as_tensor(vt))


def _square_error(matrix: FloatArray, found: LowRank, total: float) -> float:
    """Return ``||D - U S V^T||_F^2``."""
    difference = total - math.fsum(found.s**2)
    if difference > _CANCELS * total:
        return difference
    return frobenius_norm(matrix - (found.U * found.s) @ found.V.T) ** 2


def _as_tensor(array: FloatArray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _write(target: Path, svds: dict[str, ThinSvd], differences: _Differences) -> dict[str, float]:
    tensors: dict[str, torch.Tensor] = {}
    roundings = {}
    for name, svd in svds.items():
        (left, right), roundings[name] = split_svd(svd, torch.float32, name)
        if name in differences.kernels:
            right = right.reshape(len(right), *differences.kernels[name])
            left = left[:, :, None, None]
        tensors |= name_factors(name, (left, right), is_embedding=name in differences.embeddings)
    linear = set(svds) - set(differences.kernels) - differences.embeddings
    config = {
        **files.make_lora_config({name: len(svd[1]) for name, svd in svds.items()}),
        "target_modules": files.make_target_setting(differences.modules(), list(svds)),
        "fan_in_fan_out": differences.inputs_first and bool(linear),
        "base_model_name_or_path": differences.checkpoints[0].config.get("_name_or_path") or None,
    }
    files.write_folder(target, tensors, config)
    return roundings
