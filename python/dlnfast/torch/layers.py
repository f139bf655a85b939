# SPDX-License-Identifier: MIT
"""Choice of layers of a model, and their weights as matrices."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ._names import format_names, is_glob, is_match, named_layers, strip_wrapper_parts
from ._reading import (
    PACKED_ATTRIBUTES,
    describe_computation,
    explain_unreadable,
    find_shape_tensor,
    is_hook_input,
    list_computed_attributes,
    read_weight,
)
from .operators import DeviceMatrix, ProductMatrix

#: Names, globs, a regular expression, a predicate, "penultimate", weight matrices, or None for all.
LayerChoice = (
    str
    | re.Pattern[str]
    | Callable[[str, nn.Module], bool]
    | Sequence["str | re.Pattern[str]"]
    | Sequence["WeightMatrix"]
    | None
)

#: Choice of the weight before the last one.
PENULTIMATE = "penultimate"

_T = TypeVar("_T")
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: Modules of other packages whose weight is (inputs, outputs), by the name of their class.
_INPUTS_FIRST = ("Conv1D",)
_ATTENTION_PARTS = ("q", "k", "v")
#: Attributes of weights that are listed under the name of their module.
_KNOWN = (
    "weight",
    "in_proj_weight",
    *(f"{letter}_proj_weight" for letter in _ATTENTION_PARTS),
    *PACKED_ATTRIBUTES,
)
#: Layers that always have a weight matrix, even if it is sharded or not initialised.
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear)


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """One weight of a model as a matrix with one row per output.

    Attributes
    ----------
    name : str
        Name of the module, with ``.q``, ``.k``, ``.v`` for the parts of an attention's joint projection, and
        ``.factors.1`` .. for the factors that `overparameterize` made.
    module : Module
        Module that owns the weight.
    attribute : str
        Name of the weight in the module.
    part : int or None
        Index of the third of a joint projection's rows.
    aliases : tuple of str
        Names of other modules that share this weight.
    """

    name: str
    module: nn.Module
    attribute: str = "weight"
    part: int | None = None
    aliases: tuple[str, ...] = ()

    def matrix(self) -> torch.Tensor:
        """Return the current weight, shape (m, n), detached; a view if the layout allows.

        A weight that is computed from other tensors is recomputed, without changing the model. The table "The
        matrix of a layer" in the guide to networks shows the matrix of each kind of layer.
        """
        return self._put_outputs_first(read_weight(self.module, self.attribute)).reshape(self.shape)

    @torch.no_grad()
    def write(self, values: torch.Tensor) -> None:
        """Write a matrix into the weight, in place.

        Parameters
        ----------
        values : Tensor, shape (m, n)
            New values in the layout of `matrix`, in any precision and on any device.

        Raises
        ------
        TypeError
            For a weight that is computed from other tensors, or is packed.
        """
        reason = explain_unreadable(self.module, self.attribute)
        if reason is None and (computation := describe_computation(self.module, self.attribute)) is not None:
            reason = f"is computed by {computation}"
        if reason is not None:
            raise TypeError(
                f"the weight of layer {self.name} {reason}; wanted a parameter that can be written"
            )
        view = self._put_outputs_first(read_weight(self.module, self.attribute))
        view.copy_(values.reshape(view.shape))

    def _put_outputs_first(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a view of a tensor in the layout of the weight, with the outputs first.

        The outputs are one axis, or two for a transposed convolution with groups: the groups, and the outputs
        of each group.
        """
        if self.part is not None:
            rows = weight.shape[0] // len(_ATTENTION_PARTS)
            return weight[self.part * rows : (self.part + 1) * rows]
        if isinstance(self.module, _TRANSPOSED):
            if self.groups == 1:
                return weight.transpose(0, 1)
            # (in, out / groups, ..), where the inputs of a group are contiguous.
            return weight.view(self.groups, -1, *weight.shape[1:]).transpose(1, 2)
        return weight.T if type(self.module).__name__ in _INPUTS_FIRST else weight

    @property
    def groups(self) -> int:
        """Groups of a convolution, which are blocks of equally many rows with separate inputs; else 1."""
        convolution = isinstance(self.module, nn.modules.conv._ConvNd) and self.attribute == "weight"
        return int(self.module.groups) if convolution else 1  # type: ignore[arg-type]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        tensor = find_shape_tensor(self.module, self.attribute)
        first, *others = self._computed_shape if tensor is None else tensor.shape
        if self.part is not None:
            return first // len(_ATTENTION_PARTS), math.prod(others)
        if isinstance(self.module, _TRANSPOSED):
            return others[0] * self.groups, first // self.groups * math.prod(others[1:])
        rows, columns = first, math.prod(others)
        return (columns, rows) if type(self.module).__name__ in _INPUTS_FIRST else (rows, columns)

    @cached_property
    def _computed_shape(self) -> torch.Size:
        return read_weight(self.module, self.attribute).shape

    @property
    def highest_rank(self) -> int:
        """Largest possible rank of the matrix."""
        return min(self.shape)

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        tensor = self.module._parameters.get(self.attribute)
        if tensor is None:  # a computed weight: its inputs have moved, the result of a hook may not
            tensor = next(self.module.parameters(), None)
        return self.matrix().device if tensor is None else tensor.device

    @property
    def is_product(self) -> bool:
        """Whether the matrix is a product of factors, and computed by `matrix` only."""
        return False

    def _read(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors that make up the current matrix, as `copy` does; views where possible."""
        return (self.matrix(),)

    def copy(self) -> tuple[torch.Tensor, ...]:
        """Copy the current matrix, for `operator` to subtract later."""
        return tuple(tensor.clone() for tensor in self._read())

    def start_matrix(self, start: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return a result of `copy` as a dense matrix.

        Parameters
        ----------
        start : tuple of Tensor
            Result of `copy`.

        Returns
        -------
        Tensor, shape (m, n)
        """
        return start[0]

    def operator(self, start: tuple[torch.Tensor, ...] | None = None) -> DeviceMatrix | ProductMatrix:
        """Return the matrix, or its change since a copy, as an operator on blocks of vectors.

        Parameters
        ----------
        start : tuple of Tensor, optional
            Result of `copy` to subtract.

        Returns
        -------
        DeviceMatrix or ProductMatrix
        """
        return self._operator_of(self._read(), start)

    def _operator_of(
        self, now: tuple[torch.Tensor, ...], start: tuple[torch.Tensor, ...] | None
    ) -> DeviceMatrix | ProductMatrix:
        """Return `operator` for a matrix that was read or copied."""
        return DeviceMatrix(now[0], None if start is None else start[0])


class CopiedMatrix:
    """The matrix of a layer as it was when it was copied, for work that goes on while the layer changes."""

    def __init__(self, source: WeightMatrix) -> None:
        self._source = source
        self._tensors = source.copy()
        self.name, self.shape, self.is_product = source.name, source.shape, source.is_product
        self.device = self._tensors[0].device

    def matrix(self) -> torch.Tensor:
        """Return the matrix, shape (m, n)."""
        return self._source.start_matrix(self._tensors)

    def start_matrix(self, start: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return a result of `WeightMatrix.copy` as a dense matrix."""
        return self._source.start_matrix(start)

    def operator(self, start: tuple[torch.Tensor, ...] | None = None) -> DeviceMatrix | ProductMatrix:
        """Return the matrix, or its change since a copy, as an operator on blocks of vectors."""
        return self._source._operator_of(self._tensors, start)


def weight_matrices(model: nn.Module, layers: LayerChoice = None) -> list[WeightMatrix]:
    """Return the weights of the chosen layers, each once.

    Parameters
    ----------
    model : Module
        Model whose layers are listed.
    layers : str, regular expression, callable, sequence of them, or None
        Choice of layers, one of:

        * a name as in ``model.named_modules()``, with or without the parts that wrappers add (``module.``,
          ``_orig_mod.``, ``_fsdp_wrapped_module.``, ``_checkpoint_wrapped_module.``);
        * a glob (``"encoder.*.query"``);
        * a compiled regular expression, which may match any part of a name;
        * a predicate ``(name, module) -> bool``;
        * a sequence of names, globs and expressions;
        * "penultimate", the weight before the last one in the order of registration (`track` and
          `layer_outputs` use the order of the forward pass);
        * weight matrices that were returned before, or updates of adapters (`DeepLoRA.updates`);
        * None: the weights with two axes or more of linear, convolutional, attention and recurrent layers.

        Embeddings, and parameters with two axes that are no layer's weight, are chosen by name only.

    Returns
    -------
    list of WeightMatrix
        Weights in the order of registration, named without the parts of wrappers. A weight that several
        modules share is listed once, for the first of these modules that is no embedding.

    Raises
    ------
    TypeError
        For a model or a choice of another type. For a named weight, or if all weights that a pattern matches,
        are no matrices of real floating-point numbers: packed, integer, complex, sparse, empty, not
        initialised, or computed by code of the layer's own.
    ValueError
        If nothing is chosen, or a name or pattern matches no weight; the message lists the available names.
        If a name matches several layers.

    Notes
    -----
    Weights that are no such matrices are skipped with one UserWarning for all, unless they are chosen by
    name.

    The table "The matrix of a layer" in the guide to networks shows the matrix of each kind of layer. Weights
    that parametrizations or hooks compute are listed as the layer's weight; reading them does not change the
    model.

    Cost: O(number of modules); no weight is copied, but computed ones are computed.
    """
    return find_weights(model, layers)


def find_weights(
    model: nn.Module, layers: LayerChoice = None, *, with_unreadable: bool = False
) -> list[WeightMatrix]:
    """Return the weights as `weight_matrices` does, optionally with the unreadable ones."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; wanted a torch.nn.Module")
    if isinstance(layers, Sequence) and any(isinstance(entry, WeightMatrix) for entry in layers):
        return _check_matrices(model, layers)
    everything = list(_find_named_matrices(model))
    if layers is None or (isinstance(layers, str) and layers == PENULTIMATE):
        chosen = [m for m, _ in everything if _is_default(m)]
        chosen = chosen if with_unreadable else _skip_unreadable(chosen, ())
        if layers is not None:
            if len(chosen) < 2:
                raise ValueError(f"layers is 'penultimate', but the model has {len(chosen)} weight matrices")
            return [chosen[-2]]
    else:
        candidates = [
            _Candidate((m.name, _get_module_path(m), *m.aliases), raw, m.module, m) for m, raw in everything
        ]
        chosen, named = _choose(candidates, layers, "weight matrices")
        chosen = chosen if with_unreadable else _skip_unreadable(chosen, named)
    if not chosen:
        available = format_names([m.name for m, _ in everything]) or "it has none"
        raise ValueError(f"layers ({layers!r}) chooses none of the model's weight matrices: {available}")
    return chosen


def _check_matrices(model: nn.Module, layers: Sequence[object]) -> list[WeightMatrix]:
    """Check a choice of weight matrices, and return them."""
    modules = set(model.modules())
    found: dict[str, WeightMatrix] = {}
    for entry in layers:
        if not isinstance(entry, WeightMatrix):
            raise TypeError(f"layers holds a WeightMatrix and {type(entry).__name__}; wanted one kind")
        if entry.module not in modules:
            raise ValueError(f"layers: {entry.name!r} is no weight of this model")
        if entry.name in found:
            raise ValueError(f"layers holds {entry.name!r} twice")
        found[entry.name] = entry
    return _skip_unreadable(list(found.values()), list(found.values()))


def _skip_unreadable(matrices: list[WeightMatrix], named: Sequence[WeightMatrix]) -> list[WeightMatrix]:
    """Return the readable matrices, and warn about the others.

    An unreadable matrix that was chosen by name is an error, and so is a choice of unreadable ones only.
    """
    reasons = {
        matrix: reason
        for matrix in matrices
        if not matrix.is_product
        and (reason := explain_unreadable(matrix.module, matrix.attribute)) is not None
    }
    for matrix in named if len(reasons) < len(matrices) else matrices:
        if matrix in reasons:
            raise TypeError(
                f"layers: the weight of layer {matrix.name} {reasons[matrix]}; wanted a matrix of real "
                "floating-point numbers"
            )
    if reasons:
        skipped = [f"{matrix.name} {reason}" for matrix, reason in reasons.items()]
        warnings.warn(
            f"layers whose weights are no matrices of real floating-point numbers are skipped: "
            f"{format_names(skipped)}",
            UserWarning,
            stacklevel=4,
        )
    return [matrix for matrix in matrices if matrix not in reasons]


def find_penultimate(matrices: list[WeightMatrix], gradient_order: list[int]) -> WeightMatrix | None:
    """Return the weight before the last one in the order of the forward pass; None if that is unknown.

    A backward pass computes the gradients of the last layer first. A weight that layers share gets its
    gradient late, when all of them have contributed. If the last weight by registration is shared, such as
    the head of a language model with its embedding, it is taken for the last one.

    Parameters
    ----------
    matrices : list of WeightMatrix
        Weights in the order of registration.
    gradient_order : list of int
        Ids of parameters in the order of their first gradients.

    Returns
    -------
    WeightMatrix or None
    """
    arrival = {number: i for i, number in enumerate(gradient_order)}
    is_last_shared = bool(matrices[-1].aliases)
    found = []
    for i, matrix in enumerate(matrices[:-1] if is_last_shared else matrices):
        arrivals = [arrival[number] for number in _find_parameters(matrix) if number in arrival]
        if arrivals:
            found.append((min(arrivals), -i))  # parts of one parameter: the last one first
    if len(found) < 2 - is_last_shared:
        return None
    return matrices[-sorted(found)[1 - is_last_shared][1]]


def _find_parameters(matrix: WeightMatrix) -> list[int]:
    """Return the ids of the parameters that store a weight, or from which it is computed."""
    own = matrix.module._parameters.get(matrix.attribute)
    if own is None and parametrize.is_parametrized(matrix.module, matrix.attribute):
        lists: nn.ModuleDict = matrix.module.parametrizations  # type: ignore[assignment, unused-ignore]
        return [id(parameter) for parameter in lists[matrix.attribute].parameters()]
    if own is None and not matrix.is_product:  # computed by a hook
        raw = [name for name in matrix.module._parameters if is_hook_input(matrix.module, name)]
        return [id(matrix.module._parameters[name]) for name in raw]
    return [] if own is None else [id(own)]


def select_modules(model: nn.Module, layers: LayerChoice) -> dict[str, nn.Module]:
    """Return the chosen modules by name, in the order of registration.

    The output projection of a MultiheadAttention is never called as a module, so the default choice contains
    the attention instead.

    Parameters
    ----------
    model : Module
        Model whose layers are listed.
    layers : str, regular expression, callable, or sequence of them
        Choice as for `weight_matrices`, but of modules of any kind; None: modules with a weight matrix.

    Returns
    -------
    dict of str to Module

    Raises
    ------
    TypeError, ValueError
        The errors of `weight_matrices`.

    Notes
    -----
    Cost: O(number of modules).
    """
    if layers is None or (isinstance(layers, str) and layers == PENULTIMATE):
        uncalled = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        # Layers with packed weights have outputs, too.
        found = find_weights(model, layers, with_unreadable=True)
        return {_get_module_path(m): m.module for m in found if id(m.module) not in uncalled}
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; wanted a torch.nn.Module")
    candidates = [
        _Candidate((name,), (path,), module, (name, module))
        for name, path, module in named_layers(model)
        if name
    ]
    return dict(_choose(candidates, layers, "modules")[0])


@dataclass(frozen=True)
class _Candidate(Generic[_T]):
    """An item that can be chosen by any of its names; the raw names contain the parts of wrappers."""

    names: tuple[str, ...]
    raw_names: tuple[str, ...]
    module: nn.Module
    item: _T


def _choose(candidates: list[_Candidate[_T]], layers: LayerChoice, what: str) -> tuple[list[_T], list[_T]]:
    """Return all chosen items, and those among them that are chosen by a name (not a glob or predicate)."""
    if isinstance(layers, (str, re.Pattern)):
        choices: Iterable[object] = (layers,)
    elif callable(layers):
        return [c.item for c in candidates if layers(c.names[0], c.module)], []
    elif isinstance(layers, Sequence):
        choices = layers
    else:
        raise TypeError(
            f"layers is {type(layers).__name__}; wanted a name, a glob, a compiled regular expression, a "
            "callable (name, module) -> bool, or a sequence of names"
        )
    chosen: set[int] = set()
    named: set[int] = set()
    for choice in choices:
        found = _find_matches(candidates, choice)
        if not found:
            wanted = choice.pattern if isinstance(choice, re.Pattern) else choice
            available = [c.names[0] for c in candidates]
            raise ValueError(
                f"layers: {wanted!r} fits none of the model's {what}, by their "
                f"names in model.named_modules(): {format_names(available)}"
            )
        chosen |= found
        if isinstance(choice, str) and not is_glob(choice):
            named |= found
    return [candidates[i].item for i in sorted(chosen)], [candidates[i].item for i in sorted(named)]


def _find_matches(candidates: list[_Candidate[_T]], choice: object) -> set[int]:
    """Return the indices of the candidates that match a choice.

    Names without the parts of wrappers are compared first, then those with them. Finally these parts are
    removed from the choice and the names, so that names from a wrapped model match in the plain model.
    """
    found = {i for i, c in enumerate(candidates) if any(is_match(name, choice) for name in c.names)}
    if not found:
        found = {i for i, c in enumerate(candidates) if any(is_match(name, choice) for name in c.raw_names)}
    if found or not isinstance(choice, str):
        return found
    stripped = strip_wrapper_parts(choice)
    found = {
        i
        for i, c in enumerate(candidates)
        if any(is_match(strip_wrapper_parts(name), stripped) for name in c.names)
    }
    if not is_glob(choice) and len({id(candidates[i].module) for i in found}) > 1:
        names = " or ".join(repr(candidates[i].names[0]) for i in sorted(found))
        raise ValueError(f"layers: {choice!r} can be {names}; wanted one of these")
    return found


def _get_module_path(matrix: WeightMatrix) -> str:
    """Return the name of the module, without the name of the part or the parameter."""
    has_module_name = matrix.part is None and matrix.attribute in _KNOWN
    return matrix.name if has_module_name else matrix.name.rpartition(".")[0]


def _is_default(matrix: WeightMatrix) -> bool:
    if ".parametrizations." in f".{matrix.name}":  # a layer that computes a weight of another one
        return False
    if matrix.attribute not in _KNOWN:
        return isinstance(matrix.module, (nn.RNNBase, nn.RNNCellBase))
    return not isinstance(matrix.module, (nn.Embedding, nn.EmbeddingBag, parametrize.ParametrizationList))


def list_matrices(model: nn.Module) -> Iterator[WeightMatrix]:
    """Yield every weight with two axes or more; shared weights once."""
    yield from (matrix for matrix, _ in _find_named_matrices(model))


def _find_named_matrices(model: nn.Module) -> Iterator[tuple[WeightMatrix, tuple[str, ...]]]:
    """Yield each weight of `list_matrices` with all its raw names, which contain the parts of wrappers."""
    raw_names: dict[WeightMatrix, str] = {}
    for name, path, module in named_layers(model):
        for matrix in _find_matrices(name, module):
            raw_names[matrix] = path + matrix.name[len(name) :] if name else _join_path(path, matrix.name)
    groups: dict[tuple[int, int | None], list[WeightMatrix]] = {}
    for matrix in raw_names:
        parameter = matrix.module._parameters.get(matrix.attribute)
        # A computed weight is never shared.
        groups.setdefault((id(matrix if parameter is None else parameter), matrix.part), []).append(matrix)
    # A weight that a head shares with an embedding is listed for the head.
    owners = {
        next((m for m in sharing if _is_default(m)), sharing[0]): sharing for sharing in groups.values()
    }
    for matrix in raw_names:
        if matrix in owners:
            sharing = owners[matrix]
            aliases = tuple(m.name for m in sharing if m is not matrix)
            listed = WeightMatrix(matrix.name, matrix.module, matrix.attribute, matrix.part, aliases)
            yield listed, tuple(raw_names[m] for m in sharing)


def _find_matrices(path: str, module: nn.Module) -> Iterator[WeightMatrix]:
    if isinstance(module, parametrize.ParametrizationList):
        # The factors of "fc.parametrizations.weight" are named after the layer "fc".
        layer, _, attribute = f".{path}".rpartition(".parametrizations.")
        if attribute != "weight" or not hasattr(module[0], "is_deep_product"):
            return
        for number in range(module.ntensors):
            name = f"{layer}.factors.{number + 1}".lstrip(".")
            yield WeightMatrix(name, module, f"original{number}")
        return
    for attribute in ("weight", *PACKED_ATTRIBUTES):
        if _is_matrix(module, attribute):
            yield WeightMatrix(path or "weight", module, attribute)
    if _is_matrix(module, "in_proj_weight"):
        for part, letter in enumerate(_ATTENTION_PARTS):
            yield WeightMatrix(_join_path(path, letter), module, "in_proj_weight", part)
    for letter in _ATTENTION_PARTS:
        # Attention with keys or values of other widths than its queries has separate projections.
        if _is_matrix(module, f"{letter}_proj_weight"):
            yield WeightMatrix(_join_path(path, letter), module, f"{letter}_proj_weight")
    for attribute in dict.fromkeys([*module._parameters, *list_computed_attributes(module)]):
        # Recurrent layers, and parameters of no layer.
        known = attribute in _KNOWN or is_hook_input(module, attribute)
        if not known and len(_get_shape(module, attribute)) == 2:
            yield WeightMatrix(_join_path(path, attribute), module, attribute)


def _join_path(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_matrix(module: nn.Module, attribute: str) -> bool:
    """Return whether a module has a weight matrix of this name, also if it is packed or not initialised."""
    if attribute in PACKED_ATTRIBUTES:
        return any(attribute in names for names in (module._parameters, module._buffers, module._modules))
    is_layer = attribute == "weight" and isinstance(module, _LAYERS)
    parameter = module._parameters.get(attribute)
    if parameter is None and attribute not in list_computed_attributes(module):
        return is_layer and describe_computation(module, attribute) is not None
    # Shards and parameters that are not initialised have other shapes than the weight.
    return is_layer or len(_get_shape(module, attribute)) >= 2


def _get_shape(module: nn.Module, attribute: str) -> tuple[int, ...]:
    """Return the shape of a tensor of a module; () if it is missing or not initialised."""
    tensor = find_shape_tensor(module, attribute)
    if tensor is not None:
        return () if is_lazy(tensor) else tuple(tensor.shape)
    computed = attribute in list_computed_attributes(module)
    return tuple(read_weight(module, attribute).shape) if computed else ()
