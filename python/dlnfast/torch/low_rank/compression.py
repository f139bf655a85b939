# SPDX-License-Identifier: MIT
"""Compression of trained networks: layers replaced by pairs of low rank, with measured errors."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn

from ..._support.arrays import check_choice, check_count, check_flag, check_scale
from .._names import match_every_name, strip_wrapper_parts
from .._running import call_model, disable_compilation, find_device, preserve_model
from .._weight_use import find_weight_use
from ..layers import PENULTIMATE, LayerChoice, WeightMatrix, find_weights
from .moments import Moment, collect_moments
from .passes import Group, iterate_inputs, list_batches, order_layers, run_watched
from .replacements import (
    SHAPES,
    Form,
    Swap,
    build_pair,
    find_obstacle,
    list_forms,
    read_bias,
    read_tensor,
)
from .truncate import (
    Approximation,
    balance_factors,
    get_double_device,
    refit_left,
    squared_difference,
    sum_of_squares,
)

#: Characters of a glob.
_GLOB: Final = "*?["


@dataclass(frozen=True)
class CompressedLayer:
    """Report on one layer that `compress` replaced.

    Attributes
    ----------
    kind : str
        Class of the replaced layer.
    shape : str or None
        Shape of the two convolutions; None for other layers.
    rank : int
        Rank r, the width between the two new layers.
    parameters_before, parameters_after : int
        Numbers of parameters, with biases.
    weight_error : float
        Relative error of the weight, ``||W - W_r||_F / ||W||_F``.
    truncation_error : float or None
        Part of the output error on `data` that is due to the rank: the distance of the output from that of
        the best layer of full rank for the same inputs, relative to ``||y||_F``. None without `data`.
    output_error, held_out_error : float or None
        Relative error of the layer's output, ``||y_r - y||_F / ||y||_F``, on `data` and on `held_out`. y_r is
        the output in the compressed model, and y that in the original one, so that the errors contain those
        of earlier layers. None without these batches, and if the calls in both models do not correspond.
    """

    kind: str
    shape: str | None
    rank: int
    parameters_before: int
    parameters_after: int
    weight_error: float
    truncation_error: float | None
    output_error: float | None
    held_out_error: float | None


@dataclass(frozen=True)
class Compression:
    """Report of `compress`; ``print`` shows it as a table.

    Attributes
    ----------
    layers : dict of str to CompressedLayer
        Replaced layers by name.
    unchanged : dict of str to str
        Layers that were left alone by name, and the reason.
    parameters_before, parameters_after : int
        Numbers of parameters of the whole model; shared ones count once.
    function_error : float or None
        Relative error of the model's output, ``||f_r - f||_F / ||f||_F``, summed over the batches of
        `measured_on` in evaluation mode. None without batches.
    measured_on : {"held_out", "data"} or None
        Argument with the batches of `function_error` and of the timings.
    seconds_before, seconds_after : float or None
        Time of a forward pass on the first of these batches: medians over repetitions in which the original
        and the compressed model take turns. None without batches.
    """

    layers: dict[str, CompressedLayer]
    unchanged: dict[str, str]
    parameters_before: int
    parameters_after: int
    function_error: float | None
    measured_on: str | None
    seconds_before: float | None
    seconds_after: float | None

    def __str__(self) -> str:
        head = "layer kind rank parameters weight-error truncation-error output-error held-out-error"
        rows = [tuple(title.replace("-error", " error") for title in head.split())]
        for name, layer in self.layers.items():
            kind = layer.kind if layer.shape is None else f"{layer.kind}, {layer.shape}"
            count = f"{layer.parameters_before} -> {layer.parameters_after}"
            errors = (
                layer.weight_error,
                layer.truncation_error,
                layer.output_error,
                layer.held_out_error,
            )
            rows.append(
                (name, kind, str(layer.rank), count, *("-" if e is None else f"{e:.4g}" for e in errors))
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        share = self.parameters_after / max(self.parameters_before, 1)
        lines.append(f"parameters: {self.parameters_before} -> {self.parameters_after} ({share:.1%})")
        if self.function_error is not None:
            lines.append(f"error of the model's output on {self.measured_on}: {self.function_error:.4g}")
        if self.seconds_before is not None and self.seconds_after is not None:
            lines.append(
                f"forward pass: {1e3 * self.seconds_before:.3g} ms -> {1e3 * self.seconds_after:.3g} ms"
            )
        lines += [f"unchanged: {name} ({reason})" for name, reason in self.unchanged.items()]
        return "\n".join(lines)


def compress(
    model: nn.Module,
    layers: LayerChoice = None,
    *,
    rank: int | Mapping[str, int] | None = None,
    tolerance: float | None = None,
    data: Any = None,
    held_out: Any = None,
    sequential: bool = True,
    shape: str = "auto",
    repeats: int = 5,
) -> Compression:
    r"""Replace layers of a trained model by pairs of low rank, in place, and measure the errors.

    A layer with weight W becomes two plain PyTorch layers with r features between them, whose product is the
    best approximation of W. Without `data` it minimises the error of the weight, with `data` the error of the
    layer's output in the compressed model. The model gets new parameters: make an optimiser after this call.

    Parameters
    ----------
    model : Module
        Model with the layers.
    layers : LayerChoice
        Choice of layers as for `weight_matrices`. None: all linear and convolutional layers that can be
        replaced. Embeddings are chosen by name only. Layers that would not lose parameters are left alone,
        unless they are chosen by name or in `rank`.
    rank : int or mapping of str to int, optional
        Rank r of all chosen layers, or of the layers with these names; `layers` is then None.
    tolerance : float, optional
        Largest relative error of each layer, between 0 and 1: of its weight, or the truncation error of its
        output on `data`. Each layer gets the smallest rank that fits. Either `rank` or `tolerance` is needed.
    data : batch or iterable of batches, optional
        Inputs of the model for which the layers' outputs are to be kept. A batch is a tensor, a mapping of
        keywords, or a pair (inputs, labels), whose labels are not used; inputs may be a tuple of arguments.
    held_out : batch or iterable of batches, optional
        Other inputs, on which errors and times are measured. Default: `data`.
    sequential : bool
        Whether, with `data`, the layers are compressed in the order of execution, each for the inputs that it
        has after the compression of the earlier ones. False: all layers are fitted to their inputs in the
        original model, which needs one pass over the data, but lets the errors add up.
    shape : {"auto", "kernel-first", "kernel-last", "horizontal-first", "vertical-first"}
        Pair that replaces a convolution with weight (out, in, kh, kw). "kernel-first": kh x kw to r channels,
        then 1 x 1; the weight is the matrix (out, in kh kw). "kernel-last": 1 x 1, then kh x kw;
        (out kh kw, in). "horizontal-first": 1 x kw, then kh x 1; (out kh, in kw). "vertical-first": kh x 1,
        then 1 x kw; (out kw, in kh); the last two are for Conv2d. "auto": the one with the least error for
        the parameters that "kernel-first" has with rank r, or the one with the fewest parameters for the
        tolerance.
    repeats : int
        Number of timed forward passes of each model, 0 for none.

    Returns
    -------
    Compression
        Errors, parameters and times.

    Raises
    ------
    TypeError
        For a chosen layer without a low-rank form (MultiheadAttention, groups, a forward pass of its own),
        one whose weight is quantised or read by another module, and arguments of another type.
    ValueError
        For a chosen layer whose weight is shared, computed or not finite, a rank above its smaller side, a
        layer that `data` does not reach, data that are not finite or empty, no layer at all, and settings out
        of their range. On any error the model is as it was, with the same modules.

    Notes
    -----
    With the inputs x of a layer as the columns of X, and :math:`S = X X^T`,

    .. math:: \min_{\operatorname{rank} W_r \le r} \|(W - W_r) X\|_F

    has the solution :math:`W_r = U_r U_r^T W` with the r leading left singular vectors of
    :math:`W S^{1/2}` (Eckart and Young; `data` None is S = I). Directions without inputs keep the projected
    weight. If the layer has a bias, S is centred, and the bias becomes
    :math:`b + (W - W_r) \bar x`, which is optimal.

    With `sequential`, x are the inputs in the compressed model, and the layer is to have the outputs Y of the
    original one: :math:`\|Y - W_r X\|_F` is least for the same :math:`W_r` with
    :math:`W + (Y - W X) X^T S^{-1}` in the place of W (reduced-rank regression), so that a layer corrects
    errors of earlier ones. In the inverse, S gets a ridge of 0.01 times its mean diagonal, because few
    samples do not determine all directions.

    The inputs of a convolution are its patches, those of an
    embedding its tokens. For the other three shapes of a convolution, the first factor comes from the moment
    of its own inputs, summed over the other axes, and the second is fitted by least squares to the layer's
    output.

    The error of a weight says little about the model: a trained layer that sees few directions of inputs can
    lose 0.9 of its norm and nothing of its function.

    Cost: without `data`, a decomposition of each weight (a block Lanczos iteration if both sides are above
    1024). With `data`, for a layer with n inputs and m outputs at N positions (n = in kh kw for a
    convolution), N n (n + m) flops for the sums, O(n^2 (n + m)) for the fit, and 16 n^2 + 8 m n bytes, which
    are released before the next layer. `sequential` runs the original and the compressed model up to the
    layer once for each layer and batch: half as many passes over `data` as there are layers, of each model.
    Layers with the same input (queries, keys and values) share them. Without it, one pass is enough, but the
    memory of all layers is needed at the same time. The errors of the outputs take a pass of both models, and
    the memory of the outputs of all layers on one batch.

    Examples
    --------
    >>> import torch
    >>> import dlnfast as dln
    >>> model = torch.nn.Sequential(torch.nn.Linear(50, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3))
    >>> report = dln.torch.compress(model, rank=5)
    >>> model[0]
    Sequential(
      (0): Linear(in_features=50, out_features=5, bias=False)
      (1): Linear(in_features=5, out_features=40, bias=True)
    )
    >>> report.layers["0"].parameters_before, report.layers["0"].parameters_after
    (2040, 490)
    >>> report.unchanged
    {'2': 'rank 5 is above its smaller side 3'}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; wanted a torch.nn.Module")
    request = _Request(rank, tolerance, shape, layers)
    n_repeats = check_count(repeats, "repeats", minimum=0)
    batches = {
        name: list_batches(value, name)
        for name, value in (("data", data), ("held_out", held_out))
        if value is not None
    }
    is_sequential = check_flag(sequential, "sequential")
    targets, unchanged = _find_targets(model, request)
    pairs: list[_Pair] = []
    for target, found in _fit_targets(model, targets, request, batches.get("data"), is_sequential):
        if isinstance(found, _Pair):
            pairs.append(found)
        else:
            unchanged[target.name] = found
    swap = Swap(model, {id(pair.target.module): pair.module for pair in pairs})
    before = _count_parameters(model)
    measured_on = "held_out" if "held_out" in batches else "data" if "data" in batches else None
    errors = {name: _measure_errors(model, swap, pairs, each, name) for name, each in batches.items()}
    seconds: tuple[float, float] | None = None
    if measured_on is not None and n_repeats:
        seconds = _time_forward(model, swap, batches[measured_on], measured_on, n_repeats)
    swap.apply()
    return Compression(
        layers={pair.target.name: _add_errors(pair, errors) for pair in pairs},
        unchanged=unchanged,
        parameters_before=before,
        parameters_after=_count_parameters(model),
        function_error=None if measured_on is None else errors[measured_on].model,
        measured_on=measured_on,
        seconds_before=None if seconds is None else seconds[0],
        seconds_after=None if seconds is None else seconds[1],
    )


class _Request:
    """Checked settings of `compress`."""

    def __init__(
        self,
        rank: int | Mapping[str, int] | None,
        tolerance: float | None,
        shape: str,
        layers: LayerChoice,
    ) -> None:
        if (rank is None) == (tolerance is None):
            raise ValueError(f"rank is {rank} and tolerance is {tolerance}; wanted exactly one of them")
        self.layers = layers
        self.rank: int | None = None
        self.ranks: dict[str, int] = {}
        self.tolerance: float | None = None
        if tolerance is not None:
            self.tolerance = check_scale(tolerance, "tolerance", strict=True, below=1.0)
        elif isinstance(rank, Mapping):
            if layers is not None:
                raise ValueError("rank names the layers; wanted layers=None, or one rank for all layers")
            if not rank:
                raise ValueError("rank is empty; wanted names of layers and their ranks")
            self.ranks = {name: check_count(r, f"rank[{name!r}]") for name, r in rank.items()}
            self.layers = list(self.ranks)
        else:
            self.rank = check_count(rank, "rank")
        self.shape = check_choice(shape, "shape", ("auto", *SHAPES))

    def choose(self, model: nn.Module) -> list[tuple[WeightMatrix, int | None, bool]]:
        """Return the chosen weights with their ranks, and whether they are chosen by name."""
        if self.ranks:
            everything = find_weights(model, lambda *_: True, with_unreadable=True)
            known = {name: matrix for matrix in everything for name in (matrix.name, *matrix.aliases)}
            found = match_every_name(self.ranks, known, "rank")
            ranks = {known[found[name]]: rank for name, rank in self.ranks.items()}
            return [(matrix, ranks[matrix], True) for matrix in everything if matrix in ranks]
        matrices = find_weights(model, self.layers, with_unreadable=True)
        return [(matrix, self.rank, self._is_named(matrix)) for matrix in matrices]

    def _is_named(self, matrix: WeightMatrix) -> bool:
        listed: Iterable[object] = (self.layers,) if isinstance(self.layers, str) else ()
        if isinstance(self.layers, Sequence) and not isinstance(self.layers, str):
            listed = self.layers
        names = {strip_wrapper_parts(name) for name in (matrix.name, *matrix.aliases)}
        for choice in listed:
            if isinstance(choice, WeightMatrix) and choice.name == matrix.name:
                return True
            if isinstance(choice, str) and (choice == PENULTIMATE or strip_wrapper_parts(choice) in names):
                return True
        return False


@dataclass(frozen=True, eq=False)
class _Target:
    """A layer to replace, with its weight in the layout of `read_tensor`."""

    name: str
    module: nn.Module
    forms: list[Form]
    rank: int | None
    #: Whether the layer is replaced even if it does not lose parameters.
    is_named: bool
    #: Whether the layer is among chosen ones, not among those of ``layers=None``.
    is_chosen: bool

    def read(self) -> torch.Tensor:
        weight = read_tensor(self.module)
        return weight.to(get_double_device(weight.device))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(read_tensor(self.module).shape)


@dataclass(frozen=True, eq=False)
class _Pair:
    """The replacement of a layer."""

    target: _Target
    module: nn.Module
    report: CompressedLayer


def _find_targets(model: nn.Module, request: _Request) -> tuple[list[_Target], dict[str, str]]:
    """Return the layers to replace, and the reasons for leaving the others of ``layers=None``."""
    targets: list[_Target] = []
    unchanged: dict[str, str] = {}
    use = find_weight_use(model)
    for matrix, rank, is_named in request.choose(model):
        name, module = matrix.name, matrix.module
        obstacle = find_obstacle(module, matrix.attribute, use, model)
        if obstacle is not None:
            if request.layers is not None or obstacle.reason.endswith("not finite"):
                obstacle.raise_for(name)
            unchanged[name] = obstacle.reason
            continue
        forms = list_forms(module)
        if request.shape != "auto" and forms[0].shape is not None:
            forms = [form for form in forms if form.shape == request.shape]
        if not forms:
            reason = f"is a {type(module).__name__}, which has no shape {request.shape!r}"
            if is_named:
                raise ValueError(f"layers: {name!r} {reason}")
            unchanged[name] = reason
            continue
        target = _Target(name, module, forms, rank, is_named, request.layers is not None)
        highest = min(forms[0].to_matrix(read_tensor(module)).shape)
        if rank is not None and rank > highest:
            reason = f"rank {rank} is above its smaller side {highest}"
            if is_named:
                raise ValueError(
                    f"rank: {name!r} has no rank {rank}; wanted at most {highest}, its smaller side"
                )
            unchanged[name] = reason
        elif rank is not None and not is_named and not _is_saving(target, forms[0], rank):
            unchanged[name] = f"rank {rank} does not save parameters"
        else:
            targets.append(target)
    if not targets and request.rank is not None and all("above its" in r for r in unchanged.values()):
        raise ValueError(f"rank is {request.rank}, above the smaller side of every chosen layer")
    return targets, unchanged


def _is_saving(target: _Target, form: Form, rank: int) -> bool:
    return rank * form.count_parameters(target.sizes) < math.prod(target.sizes)


@dataclass(frozen=True, eq=False)
class _Fit:
    """Low-rank factors of one matricisation of a weight, and their squared error, to compare forms."""

    form: Form
    left: torch.Tensor
    right: torch.Tensor
    error: float

    @property
    def rank(self) -> int:
        return self.left.shape[1]


class _Fitter:
    """Fits of one layer."""

    def __init__(self, target: _Target, moment: Moment | None) -> None:
        self.target, self.moment = target, moment
        self.weight = target.read()
        self.bias = read_bias(target.module)
        is_centred = self.bias is not None
        #: Weight that is approximated; with inherited errors it is the best one of full rank.
        self.wanted = self.weight
        self._second: torch.Tensor | None = None
        if moment is not None:
            self._second = moment.center() if is_centred else moment.second
            change = moment.fit_change(is_centred)
            if change is not None:
                self.wanted = self.weight.double() + change.reshape(self.weight.shape)
        self._approximations: dict[Form, Approximation] = {}

    def reference(self) -> float:
        """Return the squared norm of the weight, or of the layer's output on the data."""
        return self.squared_norm() if self.moment is None else self.moment.output_square

    def squared_norm(self) -> float:
        """Return the squared norm of the weight."""
        if self.moment is None and self._approximations:
            return next(iter(self._approximations.values())).total
        return sum_of_squares(self.weight)

    def fit(self, form: Form, rank: int) -> _Fit:
        """Return the best factors for a form and a rank."""
        approximation = self._approximate(form)
        left = approximation.find_basis(rank)
        right = approximation.project(left)
        if len(self.target.forms) == 1 and len(form.left) == 1:
            return _Fit(form, left, right, 0.0)  # nothing to compare it with
        if self.moment is None:
            return _Fit(form, left, right, squared_difference(form.to_matrix(self.wanted), left, right))
        if len(form.left) > 1:
            left = self._refit(form, left, right)
        return _Fit(form, left, right, self.squared_error(form, left, right))

    def squared_error(self, form: Form, left: torch.Tensor, right: torch.Tensor) -> float:
        """Return the squared truncation error of the output, with the best bias if there is one."""
        assert self._second is not None
        difference = self.subtract(form, left, right)
        second = self._second
        weighted = difference * second if second.ndim == 1 else difference @ second
        return max(float((weighted * difference).sum()), 0.0)

    def subtract(self, form: Form, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Return the difference from the wanted weight in float64 as a matrix (out, n)."""
        approximation = form.to_weight(left @ right, self.weight.shape)
        return (self.wanted.double() - approximation).flatten(1)

    def find_rank(self, form: Form, target: float, highest: int) -> _Fit | None:
        """Return the fit of the smallest rank within a squared error; None if that is above `highest`."""
        approximation = self._approximate(form)
        if self.moment is None or len(form.left) == 1:
            rank = approximation.find_rank(target)
            return self.fit(form, rank) if rank <= highest else None
        # The spectrum belongs to the first factor only: bisect by the error after the second one is fitted.
        low, found = 0, None
        high = min(highest, approximation.highest_rank)
        while high > low:
            middle = high if found is None else (low + high) // 2
            fit = self.fit(form, middle)
            if fit.error <= target:
                found, high = fit, middle
                if high == low + 1:
                    break
            elif found is None:
                return None
            else:
                low = middle
                if high == low + 1:
                    break
        return found

    def _approximate(self, form: Form) -> Approximation:
        if form not in self._approximations:
            second = self._second
            if second is not None and second.ndim == 2 and len(form.left) > 1:
                second = self._split_moment(form).diagonal(dim1=0, dim2=2).sum(-1)
            self._approximations[form] = Approximation(form.to_matrix(self.wanted), second)
        return self._approximations[form]

    def _split_moment(self, form: Form) -> torch.Tensor:
        """Return the moment with the axes (left, right, left, right)."""
        assert self._second is not None
        sizes = self.weight.shape[1:]
        order = [axis - 1 for axis in (*form.left[1:], *form.right)]
        n = len(sizes)
        split = self._second.reshape(*sizes, *sizes).permute(*order, *(n + axis for axis in order))
        k = math.prod(self.weight.shape[axis] for axis in form.left[1:])
        return split.reshape(k, -1, k, self._second.shape[0] // k)

    def _refit(self, form: Form, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        out, k = self.weight.shape[0], left.shape[0] // self.weight.shape[0]
        second = self._split_moment(form)
        size = second.shape[0] * second.shape[1]
        weight = form.to_matrix(self.wanted).double().reshape(out, -1)
        fitted = refit_left(weight, second.reshape(size, size), left.reshape(out, k, -1), right)
        return fitted.reshape(left.shape)


def _fit_targets(
    model: nn.Module,
    targets: list[_Target],
    request: _Request,
    data: Iterable[Any] | None,
    is_sequential: bool,
) -> Iterator[tuple[_Target, _Pair | str]]:
    """Yield each layer with its replacement, or with the reason for leaving it alone."""
    if data is None:
        yield from ((target, _compress_target(target, request, None)) for target in targets)
        return
    by_name = {target.name: target for target in targets}
    modules = {target.name: target.module for target in targets}
    groups = [Group(list(modules), is_called_once=False)]
    if is_sequential:
        groups = order_layers(model, modules, data, "data")
    results: dict[str, _Pair | str] = {}
    for group in groups:
        pairs = [result for result in results.values() if isinstance(result, _Pair)]
        swap = Swap(model, {id(pair.target.module): pair.module for pair in pairs}) if pairs else None
        watched = {name: modules[name] for name in group.names}
        moments = collect_moments(model, watched, data, "data", swap, stop_early=group.is_called_once)
        for name in group.names:
            moment = moments.pop(name, None)
            if moment is not None:
                results[name] = _compress_target(by_name[name], request, moment)
            elif by_name[name].is_chosen:
                raise ValueError(f"data does not reach layer {name!r}; wanted batches for which it is called")
            else:
                results[name] = "is not called on data"
    yield from ((target, results[target.name]) for target in targets)


def _compress_target(target: _Target, request: _Request, moment: Moment | None) -> _Pair | str:
    """Return the replacement of a layer, or the reason for leaving it alone."""
    fitter = _Fitter(target, moment)
    fit = _choose_fit(fitter, request.tolerance)
    if fit is None:
        return f"tolerance {request.tolerance:g} does not save parameters"
    return _make_pair(fitter, fit)


def _choose_fit(fitter: _Fitter, tolerance: float | None) -> _Fit | None:
    """Return the best fit among the forms of a layer; None if none of them loses parameters."""
    target = fitter.target
    sizes = target.sizes
    best: _Fit | None = None
    if target.rank is not None:
        budget = target.rank * target.forms[0].count_parameters(sizes)
        for form in target.forms:
            highest = min(form.to_matrix(fitter.weight).shape)
            rank = min(budget // form.count_parameters(sizes), highest)
            if rank > 0:
                fit = fitter.fit(form, rank)
                best = fit if best is None or fit.error < best.error else best
        return best
    assert tolerance is not None
    squared = tolerance**2 * fitter.reference()
    least: int | None = None if target.is_named else math.prod(sizes)
    for form in target.forms:
        cost = form.count_parameters(sizes)
        highest = min(form.to_matrix(fitter.weight).shape)
        if least is not None:
            highest = min(highest, (least - 1) // cost)
        found = fitter.find_rank(form, squared, highest) if highest > 0 else None
        if found is not None:
            best, least = found, found.rank * cost
    return best


def _make_pair(fitter: _Fitter, fit: _Fit) -> _Pair:
    """Build the two layers, and measure their errors with the factors as they are rounded."""
    target, module, moment = fitter.target, fitter.target.module, fitter.moment
    dtype = fitter.weight.dtype
    left, right = (f.to(dtype).double() for f in balance_factors(fit.left, fit.right))
    bias = None if fitter.bias is None else fitter.bias.to(left)
    truncation_error: float | None = None
    if moment is not None:
        squared = fitter.squared_error(fit.form, left, right)
        truncation_error = _divide(squared, moment.output_square)
        if bias is not None:
            shift = fitter.subtract(fit.form, left, right) @ moment.total
            if fitter.wanted is not fitter.weight and moment.gap_total is not None:
                change = (fitter.wanted - fitter.weight.double()).flatten(1)
                shift += moment.gap_total - change @ moment.total
            bias = (bias + shift / moment.count).to(dtype).double()
    new = build_pair(module, fit.form, left, right, bias)
    report = CompressedLayer(
        kind=type(module).__name__,
        shape=fit.form.shape,
        rank=fit.rank,
        parameters_before=_count_parameters(module),
        parameters_after=_count_parameters(new),
        weight_error=_divide(
            squared_difference(fit.form.to_matrix(fitter.weight), left, right), fitter.squared_norm()
        ),
        truncation_error=truncation_error,
        output_error=None,
        held_out_error=None,
    )
    return _Pair(target, new, report)


def _divide(squared: float, reference: float) -> float:
    """Return the root of a ratio of squares; 0 for 0 / 0."""
    if reference == 0.0:
        return 0.0 if squared == 0.0 else math.inf
    return math.sqrt(squared / reference)


@dataclass(frozen=True)
class _OutputErrors:
    """Relative errors of the outputs of a model and of its layers."""

    model: float
    layers: Mapping[str, float]


class _OutputComparison:
    """Differences of outputs in the original and in the compressed model, for one layer or the model."""

    def __init__(self) -> None:
        self._outputs: list[torch.Tensor] = []
        self._difference = self._reference = 0.0
        self.is_complete = True

    def expect(self, output: torch.Tensor) -> None:
        """Add an output of the original model."""
        self._outputs.append(output.detach().clone())  # the model may change it in place

    def compare(self, output: torch.Tensor) -> None:
        """Add the corresponding output of the compressed model."""
        if not self._outputs or self._outputs[0].shape != output.shape:
            self.is_complete = False
            return
        wanted = self._outputs.pop(0)
        self._difference += sum_of_squares(output.detach().double() - wanted.double())
        self._reference += sum_of_squares(wanted)

    def finish_batch(self) -> None:
        """Compare no outputs of different batches."""
        self.is_complete = self.is_complete and not self._outputs
        self._outputs.clear()

    def is_finite(self) -> bool:
        """Return whether the outputs were finite."""
        return math.isfinite(self._difference + self._reference)

    def error(self) -> float:
        """Return the relative error."""
        return _divide(self._difference, self._reference)


def _measure_errors(
    model: nn.Module, swap: Swap, pairs: Sequence[_Pair], batches: Iterable[Any], name: str
) -> _OutputErrors:
    """Return the relative errors of the outputs of the model and of the replaced layers over batches."""
    before = {pair.target.name: pair.target.module for pair in pairs}
    after = {pair.target.name: pair.module for pair in pairs}
    whole, layers = _OutputComparison(), {key: _OutputComparison() for key in before}
    for inputs in iterate_inputs(batches, name, find_device(model)):
        whole.expect(_get_tensor(run_watched(model, inputs, before, lambda key, _, y: layers[key].expect(y))))
        with swap:
            output = run_watched(model, inputs, after, lambda key, _, y: layers[key].compare(y))
        whole.compare(_get_tensor(output))
        for comparison in layers.values():
            comparison.finish_batch()
    if not whole.is_finite():
        raise ValueError(f"{name}: the output of the model is not finite")
    return _OutputErrors(whole.error(), {key: c.error() for key, c in layers.items() if c.is_complete})


def _add_errors(pair: _Pair, errors: Mapping[str, _OutputErrors]) -> CompressedLayer:
    """Return the report on a layer with the errors of its output."""
    found = {name: each.layers.get(pair.target.name) for name, each in errors.items()}
    return replace(pair.report, output_error=found.get("data"), held_out_error=found.get("held_out"))


def _get_tensor(output: Any) -> torch.Tensor:
    """Return the output of a model as a tensor."""
    if isinstance(output, Mapping):
        output = output["logits"] if "logits" in output else list(output.values())
    if isinstance(output, (tuple, list)):
        output = next((part for part in output if isinstance(part, torch.Tensor) and part.ndim), None)
    if not isinstance(output, torch.Tensor):
        raise TypeError(
            f"model returns {type(output).__name__}; wanted a tensor, or a tuple or mapping with one"
        )
    return output


@torch.no_grad()
def _time_forward(
    model: nn.Module, swap: Swap, batches: Iterable[Any], name: str, repeats: int
) -> tuple[float, float]:
    """Return the median seconds of a forward pass of the original and of the compressed model."""
    device = find_device(model)
    inputs = next(iter(iterate_inputs(batches, name, device)))
    seconds: tuple[list[float], list[float]] = [], []
    with preserve_model(model, "eval"), disable_compilation():
        for number in range(repeats + 1):
            contexts: tuple[AbstractContextManager[None], ...] = nullcontext(), swap
            for each, exchange in zip(seconds, contexts, strict=True):
                with exchange:
                    _synchronize(device)
                    start = time.perf_counter()
                    call_model(model, inputs)
                    _synchronize(device)
                    taken = time.perf_counter() - start
                if number:  # the first pass warms up
                    each.append(taken)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _synchronize(device: torch.device) -> None:
    synchronize = getattr(getattr(torch, device.type, None), "synchronize", None)
    if synchronize is not None:
        synchronize()


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
