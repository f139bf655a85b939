# SPDX-License-Identifier: MIT
"""Truncation of the updates of an adapter in files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.nn import functional as F

from ..._support.arrays import check_flag, check_path
from .._truncation import Truncation, TruncationRule
from .sources import ThinSvd, WrittenUpdate, read_adapter


def resize_adapter(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    uniform: bool = False,
    overwrite: bool = False,
) -> dict[str, WrittenUpdate]:
    r"""Replace the update of every layer by its best approximation of lower rank, from files to files.

    Parameters
    ----------
    path : path-like
        Folder of PEFT with LoRA or Deep LoRA, or a file of `DeepLoRA.save`.
    out : path-like
        Folder for the result, which PEFT loads: Deep LoRA in a folder of PEFT stays Deep LoRA, everything
        else becomes plain LoRA with scaling 1. The folder has to be new or empty.
    rank : int, optional
        Maximal rank of every layer.
    tolerance : float, optional
        Maximal relative error of every layer: the rank is the lowest one with
        ``||dW - dW_rank||_F <= tolerance ||dW||_F``. At least one of `rank` and `tolerance` is required; with
        both, the lower rank is used.
    uniform : bool
        Whether to pad all factors with zeros to one rank, for programs that do not support ``rank_pattern``.
    overwrite : bool
        Whether to replace an adapter in an existing folder. Other files in it do not change.

    Returns
    -------
    dict of str to WrittenUpdate
        Ranks (without padding) and errors by layer.

    Raises
    ------
    FileExistsError
        If `out` exists and is not empty, without `overwrite`.
    FileNotFoundError
        If a file does not exist.
    ModuleNotFoundError
        If the package safetensors is not installed.
    ShapeError
        If the factors of a layer do not fit each other.
    ValueError
        For arguments out of their range, and adapters that `audit_adapter` refuses. An initialization that
        changes the base model when PEFT loads the adapter (PiSSA, OLoRA, ..) is refused, too. Nothing is
        written then.

    Notes
    -----
    With QR decompositions ``B = Q_B R_B``, ``A^T = Q_A R_A`` and the singular value decomposition
    of the r x r matrix :math:`R_B R_A^T`, the truncation is exact, and the update is never computed. The new
    factors are ``B = U S^{1/2}`` and ``A = S^{1/2} V^T``, in the precision of the file. A layer whose update
    is zero keeps rank 1, as PEFT has no rank 0. Other tensors, such as a new head, are copied. Cost: O((m +
    n) r^2) time for every m x n layer.

    Examples
    --------
    >>> import dlnfast as dln
    >>> layers = dln.torch.resize_adapter("adapter", "smaller", tolerance=0.05)  # doctest: +SKIP
    >>> max(layer.rank for layer in layers.values())  # doctest: +SKIP
    """
    rule = TruncationRule.checked(rank, tolerance, "resize_adapter")
    is_uniform = check_flag(uniform, "uniform")
    target = check_output(out, check_flag(overwrite, "overwrite"))
    adapter = read_adapter(path)
    adapter.check_writable()
    truncations: dict[str, Truncation] = {}
    svds: dict[str, ThinSvd] = {}
    for name, layer in adapter.layers.items():
        truncations[name], svds[name] = rule.truncate(*layer.pair())
    roundings = adapter.write(target, pad_to_one_rank(svds) if is_uniform else svds)
    return {
        name: describe_update(truncation, svds[name][1], roundings[name])
        for name, truncation in truncations.items()
    }


def describe_update(truncation: Truncation, values: torch.Tensor, rounding: float) -> WrittenUpdate:
    """Return rank and errors of an update that was written with these singular values."""
    total = float(torch.linalg.vector_norm(values)) ** 2 + truncation.error**2
    relative = rounding / total**0.5 if total > 0 else 0.0
    return WrittenUpdate(truncation.rank, truncation.error, truncation.relative_error, relative)


def pad_to_one_rank(svds: Mapping[str, ThinSvd]) -> dict[str, ThinSvd]:
    """Return the decompositions with zeros for the missing singular vectors and values."""
    rank = max(len(s) for _, s, _ in svds.values())
    padded = {}
    for name, (u, s, vt) in svds.items():
        extra = rank - len(s)
        padded[name] = F.pad(u, (0, extra)), F.pad(s, (0, extra)), F.pad(vt, (0, 0, 0, extra))
    return padded


def check_output(out: str | os.PathLike[str], overwrite: bool) -> Path:
    """Return the output folder; raise an error if it has content, unless that may be overwritten."""
    target = check_path(out, "out")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"out is {os.fspath(out)!r}, which is a file; wanted a folder")
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(
            f"out is {os.fspath(out)!r}, which is not empty; wanted a new folder, or overwrite=True "
            "(--overwrite)"
        )
    return target
