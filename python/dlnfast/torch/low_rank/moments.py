# SPDX-License-Identifier: MIT
"""Second moments of the inputs of layers on data, and of the errors that layers inherit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F

from .._running import find_device
from .passes import iterate_inputs, run_watched
from .replacements import Swap
from .truncate import get_double_device, sum_of_squares

#: Most numbers of unfolded patches in memory at a time: 64 MB in float64.
_CHUNK: Final = 2**23

#: Ridge of the fit of a whole weight, relative to the mean square of an input.
_RIDGE: Final = 0.01


@dataclass(frozen=True, eq=False)
class Moment:
    """Sums over the N input vectors x of a layer; for convolutions these are the unfolded patches.

    x belongs to the model in which earlier layers are compressed, ``W x + b`` is the layer's output on it,
    and y is its output in the original model.

    Attributes
    ----------
    count : int
        Number N.
    total : Tensor of float64, shape (n,)
        Sum of x.
    second : Tensor of float64, shape (n, n) or (n,)
        Sum of ``x x^T``; the diagonal for embeddings, whose inputs are unit vectors.
    output_square : float
        Sum of ``||y||^2``.
    gap_total : Tensor of float64, shape (m,), or None
        Sum of the inherited errors ``e = y - (W x + b)``. None if both models give the layer the same inputs,
        or other numbers of them.
    gap_cross : Tensor of float64, shape (m, n), or None
        Sum of ``e x^T``.
    """

    count: int
    total: torch.Tensor
    second: torch.Tensor
    output_square: float
    gap_total: torch.Tensor | None = None
    gap_cross: torch.Tensor | None = None

    def center(self) -> torch.Tensor:
        """Return the sum of ``(x - mean) (x - mean)^T``; only for a moment that is no diagonal."""
        return self.second - torch.outer(self.total, self.total / self.count)

    def fit_change(self, is_centred: bool) -> torch.Tensor | None:
        r"""Return the change of the weight that corrects inherited errors best, shape (m, n).

        Ridge regression of e on x, :math:`E (S + \lambda I)^{-1}` with :math:`E = \sum e x^T`,
        :math:`S = \sum x x^T` and :math:`\lambda = 0.01 \operatorname{tr} S / n`. None if it is zero.

        Parameters
        ----------
        is_centred : bool
            Whether the means of e and x are subtracted, for layers with a bias.
        """
        if self.gap_cross is None or self.gap_total is None:
            return None
        cross = self.gap_cross
        if is_centred:
            cross = cross - torch.outer(self.gap_total, self.total / self.count)
        second = self.center() if is_centred else self.second.clone()
        second.diagonal().add_(_RIDGE * float(second.diagonal().mean()))
        lower, info = torch.linalg.cholesky_ex(second)
        return None if int(info) else torch.cholesky_solve(cross.T, lower).T


def collect_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    name: str,
    swap: Swap | None = None,
    *,
    stop_early: bool = False,
) -> dict[str, Moment]:
    """Return the moments of the inputs of layers, summed in float64 in one pass over the batches.

    Layers that were not called are left out.

    Parameters
    ----------
    model : Module
        Original model, in evaluation mode during the passes; it is restored afterwards.
    layers : dict of str to Module
        Layers to watch, by name.
    batches : iterable
        Batches as `iterate_inputs` reads them.
    name : str
        Name of the argument with the batches, for messages.
    swap : Swap, optional
        Replacement of earlier layers. Default: the moments are those of the original model.
    stop_early : bool
        Whether each pass stops when all layers have been called once.

    Raises
    ------
    ValueError
        For inputs that are not finite, and if there is no batch.
    """
    sums: dict[str, _Sum] = {}
    n_calls = len(layers) if stop_early else None
    for inputs in iterate_inputs(batches, name, find_device(model)):
        _add_batch(sums, model, inputs, layers, swap, n_calls)
    for key, entry in sums.items():
        if not entry.is_finite():
            raise ValueError(f"{name}: the input of layer {key!r} is not finite")
    return {key: entry.finish() for key, entry in sums.items() if entry.count}


def _add_batch(
    sums: dict[str, _Sum],
    model: nn.Module,
    inputs: Any,
    layers: Mapping[str, nn.Module],
    swap: Swap | None,
    n_calls: int | None,
) -> None:
    """Add the calls of layers on one batch to the sums."""
    outputs: dict[str, list[torch.Tensor]] = {key: [] for key in layers}

    def watch(key: str, x: torch.Tensor, y: torch.Tensor) -> None:
        _find_sum(sums, key, layers[key]).add_output(y)
        if swap is None:
            sums[key].add(x)
        else:
            outputs[key].append(y.clone())  # the model may change it in place

    def compare(key: str, x: torch.Tensor, y: torch.Tensor) -> None:
        wanted = outputs[key].pop(0) if outputs[key] else None
        _find_sum(sums, key, layers[key]).add(x, y, wanted)

    run_watched(model, inputs, layers, watch, n_calls=n_calls)
    if swap is not None:
        with swap:
            run_watched(model, inputs, layers, compare, n_calls=n_calls)
        for key, left in outputs.items():
            if left:
                sums[key].drop_gap()


def _find_sum(sums: dict[str, _Sum], key: str, module: nn.Module) -> _Sum:
    if key not in sums:
        sums[key] = _Sum(module)
    return sums[key]


class _Sum:
    """Running sums of the inputs of one layer."""

    def __init__(self, module: nn.Module) -> None:
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        device = get_double_device(weight.device)
        self._module = module
        self._is_embedding = isinstance(module, nn.Embedding)
        if isinstance(module, nn.modules.conv._ConvNd):
            size = math.prod(weight.shape[1:])
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            size = weight.shape[0 if self._is_embedding else 1]
        else:  # weights with the inputs first
            size = weight.shape[0]
        self.count = 0
        self.total = torch.zeros(size, dtype=torch.float64, device=device)
        self.second = self.total.clone() if self._is_embedding else self.total.new_zeros(size, size)
        self._output_square = 0.0
        self._gap: tuple[torch.Tensor, torch.Tensor] | None = None
        self._has_gap = not self._is_embedding

    def add_output(self, y: torch.Tensor) -> None:
        """Add the output of one call in the original model."""
        self._output_square += sum_of_squares(y)

    def add(self, x: torch.Tensor, y: torch.Tensor | None = None, wanted: torch.Tensor | None = None) -> None:
        """Add the inputs x of one call, its output y, and the corresponding output in the original model."""
        if self._is_embedding:
            counts = torch.bincount(x.flatten().to(self.total.device), minlength=len(self.total)).double()
            self.count += x.numel()
            self.total += counts
            self.second += counts
            return
        errors = None
        if y is not None:
            if wanted is None or wanted.shape != y.shape:
                self.drop_gap()
            elif self._has_gap and not torch.equal(y, wanted):
                errors = self._flatten_output(wanted).to(self.total) - self._flatten_output(y).to(self.total)
        start = 0
        for rows in self._list_rows(x):
            values = rows.to(self.total)
            self.count += len(values)
            self.total += values.sum(0)
            self.second.addmm_(values.T, values)
            if errors is not None:
                self._add_gap(errors[start : start + len(values)], values)
            start += len(values)

    def drop_gap(self) -> None:
        """Ignore inherited errors, because the calls in the two models do not correspond."""
        self._gap, self._has_gap = None, False

    def is_finite(self) -> bool:
        """Return whether all sums are finite."""
        sums = [float(self.second.sum())]
        if self._gap is not None:
            sums.append(float(self._gap[1].sum()))
        return all(map(math.isfinite, sums))

    def finish(self) -> Moment:
        """Return the moment."""
        return Moment(self.count, self.total, self.second, self._output_square, *(self._gap or (None, None)))

    def _add_gap(self, errors: torch.Tensor, values: torch.Tensor) -> None:
        if self._gap is None:
            width = errors.shape[1]
            self._gap = self.total.new_zeros(width), self.total.new_zeros(width, len(self.total))
        self._gap[0].add_(errors.sum(0))
        self._gap[1].addmm_(errors.T, values)

    def _flatten_output(self, y: torch.Tensor) -> torch.Tensor:
        """Return output vectors as rows, in the order of the inputs."""
        if isinstance(self._module, nn.modules.conv._ConvNd):
            y = y.movedim(-len(self._module.kernel_size) - 1, -1)
        return y.reshape(-1, y.shape[-1])

    def _list_rows(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield input vectors as rows (k, n), in chunks that fit into the memory for patches."""
        size = len(self.total)
        if isinstance(self._module, nn.modules.conv._ConvNd):
            n_axes = len(self._module.kernel_size)
            samples = x.reshape(-1, *x.shape[-n_axes - 1 :])
            outputs = max(1, math.prod(x.shape[-n_axes:]) // math.prod(self._module.stride))
            step = max(1, _CHUNK // (size * outputs))
            for start in range(0, len(samples), step):
                yield unfold_patches(self._module, samples[start : start + step])
        else:
            rows = x.reshape(-1, size)
            step = max(1, _CHUNK // size)
            for start in range(0, len(rows), step):
                yield rows[start : start + step]


def unfold_patches(conv: nn.modules.conv._ConvNd, x: torch.Tensor) -> torch.Tensor:
    """Return the patches that a convolution without groups multiplies with its weight.

    Parameters
    ----------
    conv : Module
        Convolution with d axes.
    x : Tensor, shape (B, in, n_1, .., n_d)
        Inputs.

    Returns
    -------
    Tensor, shape (B o_1 .. o_d, in k_1 .. k_d)
        One row per sample and position of the output.
    """
    n_axes = len(conv.kernel_size)
    padding = conv._reversed_padding_repeated_twice
    if conv.padding_mode != "zeros":
        x = F.pad(x, padding, mode=conv.padding_mode)
    elif any(padding):
        x = F.pad(x, padding)
    steps = x.stride()[2:]
    spans = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    outputs = [(n - span) // step + 1 for n, span, step in zip(x.shape[2:], spans, conv.stride, strict=True)]
    view = x.as_strided(
        (len(x), *outputs, x.shape[1], *conv.kernel_size),
        (
            x.stride(0),
            *(s * step for s, step in zip(steps, conv.stride, strict=True)),
            x.stride(1),
            *(s * d for s, d in zip(steps, conv.dilation, strict=True)),
        ),
        x.storage_offset(),
    )
    return view.reshape(len(x) * math.prod(outputs), x.shape[1] * math.prod(conv.kernel_size[:n_axes]))
