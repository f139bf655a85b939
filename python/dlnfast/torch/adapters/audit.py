# SPDX-License-Identifier: MIT
"""Spectra of the updates of an adapter, layer by layer, from its files."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from ..._config.runs import write_json
from ..._support.arrays import check_path
from ..._support.errors import ShapeError
from ..._support.files import write_text_whole
from ..._support.text import format_table
from ...measures import subspace_angles
from .._names import match_names
from .._truncation import TruncationRule
from ..updates import compute_thin_svd
from .sources import AdapterFile, LayerUpdate, ThinSvd, read_adapter

#: Heading of the terminal's table -> attribute and format.
_COLUMNS: Final = {
    "layer": ("layer", ""),
    "shape": ("shape", ""),
    "rank": ("rank", "d"),
    "used": ("used_rank", "d"),
    "energy": ("energy", ".2%"),
    "Frobenius": ("frobenius_norm", ".4g"),
    "spectral": ("spectral_norm", ".4g"),
    "stable": ("stable_rank", ".2f"),
    "suggested": ("suggested_rank", "d"),
    "angle out": ("output_angle", ".3f"),
    "angle in": ("input_angle", ".3f"),
}


@dataclass(frozen=True)
class LayerAudit:
    """Spectrum of the update dW of one layer.

    Attributes
    ----------
    layer : str
        Name of the layer.
    shape : tuple of int
        Numbers of outputs and inputs; the inputs of a convolution are its channels times its kernel.
    rank : int
        Nominal rank r, the inner size of the factors.
    used_rank : int
        Numerical rank: number of singular values above the effect of rounding the stored factors B and A,
        ``u s (||B||_F ||A||_2 + ||B||_2 ||A||_F)`` with the unit roundoff u of their precision and the
        scaling s.
    energy : float
        Share of ``||dW||_F^2`` in its sum over all layers; 0 if all updates are zero.
    frobenius_norm, spectral_norm : float
        Norms ``||dW||_F`` and ``||dW||_2``, with the scaling of LoRA.
    stable_rank : float
        Ratio ``||dW||_F^2 / ||dW||_2^2``; 0 for dW = 0.
    suggested_rank : int
        Lowest rank with ``||dW - dW_rank||_F <= tolerance ||dW||_F``; 1 for dW = 0.
    relative_error : float
        Error at that rank, divided by ``||dW||_F``.
    singular_values : tuple of float
        Singular values, descending; as many as the smallest of r and the sides.
    output_angle, input_angle : float or None
        Largest principal angle, in radians, between the leading left (right) singular subspaces of this
        adapter and the other one. Their dimension is the smaller one of the two suggested ranks, at most the
        used ranks. None without another adapter, and for layers that it does not have or does not change.
    """

    layer: str
    shape: tuple[int, int]
    rank: int
    used_rank: int
    energy: float
    frobenius_norm: float
    spectral_norm: float
    stable_rank: float
    suggested_rank: int
    relative_error: float
    singular_values: tuple[float, ...]
    output_angle: float | None = None
    input_angle: float | None = None


@dataclass(frozen=True)
class AdapterAudit:
    """Spectra of all updates of an adapter.

    Attributes
    ----------
    path : str
        Folder or file of the adapter.
    other : str or None
        Folder or file of the adapter it was compared with.
    tolerance : float
        Relative error of the suggested ranks.
    layers : tuple of LayerAudit
        Layers in the order of the file.
    """

    path: str
    other: str | None
    tolerance: float
    layers: tuple[LayerAudit, ...]

    def to_text(self) -> str:
        """Return a table with a row for every layer."""
        columns = {
            head: column
            for head, column in _COLUMNS.items()
            if self.other is not None or not head.startswith("angle")
        }
        rows = [list(columns)]
        for layer in self.layers:
            rows.append([_format(getattr(layer, name), form) for name, form in columns.values()])
        return format_table(rows)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the audit to a file, completely or not at all.

        Parameters
        ----------
        path : path-like
            Path that ends in ``.json`` (everything) or ``.csv`` (a row for every layer, without the singular
            values).

        Raises
        ------
        ValueError
            For another ending.
        """
        target = check_output_name(path)
        if target.suffix == ".json":
            write_json(target, asdict(self))
        else:
            write_text_whole(target, self._to_csv())

    def _to_csv(self) -> str:
        names = [field.name for field in fields(LayerAudit) if field.name != "singular_values"]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        for layer in self.layers:
            row = {**vars(layer), "shape": "x".join(map(str, layer.shape))}
            writer.writerow([row[name] for name in names])
        return text.getvalue()


def check_output_name(path: str | os.PathLike[str]) -> Path:
    """Return the path of an audit, or raise ValueError if it does not end in .json or .csv."""
    target = check_path(path, "path")
    if target.suffix not in (".json", ".csv"):
        raise ValueError(f"path is {os.fspath(path)!r}; wanted a name that ends in .json or .csv")
    return target


def _format(value: Any, form: str) -> str:
    if value is None:
        return "-"
    return " x ".join(map(str, value)) if isinstance(value, tuple) else format(value, form)


def audit_adapter(
    path: str | os.PathLike[str],
    other: str | os.PathLike[str] | None = None,
    *,
    tolerance: float = 0.05,
) -> AdapterAudit:
    r"""Measure the spectrum of the update of every layer of an adapter in files.

    Parameters
    ----------
    path : path-like
        Folder of PEFT with LoRA or Deep LoRA, or a file of `DeepLoRA.save`.
    other : path-like, optional
        Another adapter of the same model. Adds the angles between the leading singular subspaces of the two,
        in the layers that both of them have.
    tolerance : float
        Relative error of the suggested ranks, in the Frobenius norm.

    Returns
    -------
    AdapterAudit

    Raises
    ------
    FileNotFoundError
        If a file does not exist.
    ModuleNotFoundError
        If a file needs the package safetensors, which is not installed.
    ShapeError
        If the factors of a layer do not fit each other, or a layer has other sizes in the other adapter.
    ValueError
        For methods whose update is no product of two thin factors (DoRA, AdaLoRA, LoHa, ..), a missing
        factor, a factor that is not finite, damaged files, and a tolerance outside of [0, 1).

    Notes
    -----
    The update is ``dW = (alpha / r) B A``, or ``(alpha / sqrt(r)) B A`` with rank-stabilized scaling; ranks
    and alphas of single layers (``rank_pattern``, ``alpha_pattern``) are honoured. Its singular values are
    those of the r x r matrix :math:`R_B R_A^T` from the QR decompositions of both factors, in float64: dW is
    never computed. Cost: O((m + n) r^2) time for every m x n layer, and memory for the factors. PEFT need not
    be installed.

    Examples
    --------
    >>> import dlnfast as dln
    >>> audit = dln.torch.audit_adapter("adapter", tolerance=0.01)  # doctest: +SKIP
    >>> print(audit.to_text())  # doctest: +SKIP
    """
    rule = TruncationRule.checked(None, tolerance, "audit_adapter")
    adapter = read_adapter(path)
    second = None if other is None else read_adapter(other, "other")
    counterparts = {} if second is None else _match_layers(adapter, second)
    svds = {name: compute_thin_svd(*layer.pair()) for name, layer in adapter.layers.items()}
    total = math.fsum(float(s.square().sum()) for _, s, _ in svds.values())
    layers = tuple(
        _audit_layer(name, adapter.layers[name], svd, total, rule, counterparts.get(name))
        for name, svd in svds.items()
    )
    assert rule.tolerance is not None
    return AdapterAudit(
        os.fspath(adapter.path), None if second is None else os.fspath(second.path), rule.tolerance, layers
    )


def _match_layers(adapter: AdapterFile, second: AdapterFile) -> dict[str, LayerUpdate]:
    found = match_names(adapter.layers, second.layers)
    if not found:
        raise ValueError(f"{second.path} has no layer of {adapter.path}")
    for name, key in found.items():
        shapes = adapter.layers[name].shape, second.layers[key].shape
        if shapes[0] != shapes[1]:
            raise ShapeError(f"layer {name!r} of other has shape {shapes[1]}; wanted {shapes[0]}")
    return {name: second.layers[key] for name, key in found.items()}


def _audit_layer(
    name: str,
    layer: LayerUpdate,
    svd: ThinSvd,
    total: float,
    rule: TruncationRule,
    counterpart: LayerUpdate | None,
) -> LayerAudit:
    values = svd[1]
    squared = float(values.square().sum())
    largest = float(values[0])
    truncation = rule.choose(values)
    angles: Mapping[str, float] = {}
    if counterpart is not None:
        angles = _measure_angles(svd, layer, counterpart, rule)
    return LayerAudit(
        name,
        layer.shape,
        layer.rank,
        _count_used(values, layer),
        squared / total if total > 0 else 0.0,
        math.sqrt(squared),
        largest,
        squared / largest**2 if largest > 0 else 0.0,
        truncation.rank,
        truncation.relative_error,
        tuple(values.tolist()),
        **angles,
    )


def _count_used(values: torch.Tensor, layer: LayerUpdate) -> int:
    """Return the numerical rank; see `LayerAudit`."""
    norms = []
    for factor in layer.pair():
        tall = factor if factor.shape[0] >= factor.shape[1] else factor.T
        spectrum = torch.linalg.svdvals(torch.linalg.qr(tall, mode="r")[1])
        norms.append((float(torch.linalg.vector_norm(spectrum)), float(spectrum[0])))
    (left, left_norm), (right, right_norm) = norms
    unit = torch.finfo(layer.dtype).eps / 2
    return int((values > unit * (left * right_norm + left_norm * right)).sum())


def _measure_angles(
    svd: ThinSvd, layer: LayerUpdate, counterpart: LayerUpdate, rule: TruncationRule
) -> dict[str, float]:
    """Return the largest principal angles of the leading subspaces; empty if an update is zero."""
    second = compute_thin_svd(*counterpart.pair())
    sizes = [
        min(rule.choose(s).rank, _count_used(s, update))
        for (_, s, _), update in ((svd, layer), (second, counterpart))
    ]
    k = min(sizes)
    if k == 0:
        return {}
    pairs = {"output_angle": (svd[0], second[0]), "input_angle": (svd[2].T, second[2].T)}
    return {
        side: float(np.max(subspace_angles(a[:, :k].numpy(), b[:, :k].numpy())))
        for side, (a, b) in pairs.items()
    }
