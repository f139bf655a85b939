# SPDX-License-Identifier: MIT
"""Which layers of a model are meant, and their weights as matrices."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from .operators import DeviceMatrix, ProductMatrix

#: Names, globs, a regular expression, a rule, "penultimate", matrices that were found, or None for all.
LayerChoice = (
    str
    | re.Pattern[str]
    | Callable[[str, nn.Module], bool]
    | Sequence["str | re.Pattern[str]"]
    | Sequence["WeightMatrix"]
    | None
)

_T = TypeVar("_T")
_GLOB = re.compile(r"[*?\[]")
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: Modules of other packages whose weight is (inputs, outputs), by the name of their class.
_INPUTS_FIRST = ("Conv1D",)
_ATTENTION_PARTS = ("q", "k", "v")
#: Parameters that are listed under the name of their module.
_KNOWN = ("weight", "in_proj_weight", *(f"{letter}_proj_weight" for letter in _ATTENTION_PARTS))


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """One weight of a model, seen as a matrix with one row per output.

    Attributes
    ----------
    name : str
        Of the module; with ``.q``, ``.k``, ``.v`` for the parts of an attention's joint projection, and
        ``.factors.1`` .. for the factors of a layer that `overparameterize` made deep.
    module : Module
        Whose weight it is.
    attribute : str
        What the module calls it.
    part : int or None
        Which third of a joint projection's rows.
    aliases : tuple of str
        Names of other modules that share this weight.
    """

    name: str
    module: nn.Module
    attribute: str = "weight"
    part: int | None = None
    aliases: tuple[str, ...] = ()

    def matrix(self) -> torch.Tensor:
        """Return the weight as it is now, shape (outputs, rest), detached; a view where the layout allows.

        A convolution's (out, in, kh, kw) becomes (out, in kh kw).
        """
        weight: torch.Tensor = getattr(self.module, self.attribute).detach()
        if self.part is not None:
            rows = weight.shape[0] // len(_ATTENTION_PARTS)
            weight = weight[self.part * rows : (self.part + 1) * rows]
        elif isinstance(self.module, _TRANSPOSED):
            weight = weight.transpose(0, 1)
        elif type(self.module).__name__ in _INPUTS_FIRST:
            weight = weight.T
        return weight.reshape(weight.shape[0], -1)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.matrix().shape
        return int(rows), int(columns)

    @property
    def highest_rank(self) -> int:
        """How many singular values can differ from zero."""
        return min(self.shape)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.matrix().device

    @property
    def is_product(self) -> bool:
        """Whether the matrix is made of others, and formed by `matrix` only."""
        return False

    def copy(self) -> tuple[torch.Tensor, ...]:
        """Return the matrix as it is now, for `operator` to subtract later."""
        return (self.matrix().clone(),)

    def start_matrix(self, start: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return what `copy` returned as a matrix.

        Parameters
        ----------
        start : tuple of Tensor
            What `copy` returned.

        Returns
        -------
        Tensor, shape (m, n)
        """
        return start[0]

    def operator(self, start: tuple[torch.Tensor, ...] | None = None) -> DeviceMatrix | ProductMatrix:
        """Return the matrix, less what `copy` returned, by its products with blocks of vectors.

        Parameters
        ----------
        start : tuple of Tensor, optional
            What `copy` returned.

        Returns
        -------
        DeviceMatrix or ProductMatrix
        """
        return DeviceMatrix(self.matrix(), None if start is None else start[0])


def weight_matrices(model: nn.Module, layers: LayerChoice = None) -> list[WeightMatrix]:
    """Return the weights of the chosen layers, each once.

    Parameters
    ----------
    model : Module
    layers : str, regular expression, callable, sequence of them, or None
        A name as in ``model.named_modules()``; a glob (``"encoder.*.query"``); a compiled regular expression,
        searched for in the names; a rule ``(name, module) -> bool``; a sequence of names, globs and
        expressions; "penultimate", the weight before the last one, in the order of registration; or matrices
        that were found before, with updates of adapters (`DeepLoRA.updates`) among them. None: the
        weights with two axes or more of linear, convolutional, attention and recurrent layers. Embeddings and
        parameters with two axes that are no layer's weight are followed where they are chosen by name.

    Returns
    -------
    list of WeightMatrix
        In the order of registration; weights that several modules share are listed once: as that of the first
        one that is no embedding.

    Raises
    ------
    TypeError
        For a model or a choice of another kind.
    ValueError
        If nothing is chosen, or a name or pattern fits no weight; the message lists what there is.

    Notes
    -----
    Cost: O(number of modules); no weight is copied.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; wanted a torch.nn.Module")
    if isinstance(layers, Sequence) and any(isinstance(entry, WeightMatrix) for entry in layers):
        return _found_before(model, layers)
    everything = list(every_matrix(model))
    if isinstance(layers, str) and layers == "penultimate":
        plain = [m for m in everything if _by_default(m)]
        if len(plain) < 2:
            raise ValueError(f"layers is 'penultimate', but the model has {len(plain)} weight matrices")
        return [plain[-2]]
    if layers is None:
        chosen = [m for m in everything if _by_default(m)]
    else:
        named = [((m.name, _path(m), *m.aliases), m.module, m) for m in everything]
        chosen = _choose(named, layers, "weight matrices")
    if not chosen:
        there = _listed([m.name for m in everything]) or "it has none"
        raise ValueError(f"layers ({layers!r}) chooses none of the model's weight matrices: {there}")
    return chosen


def _found_before(model: nn.Module, layers: Sequence[object]) -> list[WeightMatrix]:
    """Return matrices that are given as such, checked."""
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
    return list(found.values())


def select_modules(model: nn.Module, layers: LayerChoice) -> dict[str, nn.Module]:
    """Return the chosen modules by name, in the order of registration: whose outputs are meant.

    The output projection of a MultiheadAttention is never called as a module and not among those by default;
    the attention itself is.

    Parameters
    ----------
    model : Module
    layers : str, regular expression, callable, or sequence of them
        As for `weight_matrices`, for modules of any kind; None: those that own a weight matrix.

    Returns
    -------
    dict of str to Module

    Raises
    ------
    TypeError, ValueError
        As for `weight_matrices`.

    Notes
    -----
    Cost: O(number of modules).
    """
    if layers is None or (isinstance(layers, str) and layers == "penultimate"):
        hidden = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        return {_path(m): m.module for m in weight_matrices(model, layers) if id(m.module) not in hidden}
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; wanted a torch.nn.Module")
    modules: list[tuple[tuple[str, ...], nn.Module, tuple[str, nn.Module]]] = [
        ((name,), module, (name, module)) for name, module in model.named_modules() if name
    ]
    return dict(_choose(modules, layers, "modules"))


def _choose(named: list[tuple[tuple[str, ...], nn.Module, _T]], layers: LayerChoice, what: str) -> list[_T]:
    """Return the items of which some name, or the module, is chosen."""
    if isinstance(layers, (str, re.Pattern)):
        choices: Iterable[object] = (layers,)
    elif callable(layers):
        return [item for names, module, item in named if layers(names[0], module)]
    elif isinstance(layers, Sequence):
        choices = layers
    else:
        raise TypeError(
            f"layers is {type(layers).__name__}; wanted a name, a glob, a compiled regular expression, a "
            "callable (name, module) -> bool, or a sequence of names"
        )
    kept = set()
    for choice in choices:
        found = {i for i, (names, _, _) in enumerate(named) if any(_fits(name, choice) for name in names)}
        if not found:
            wanted = choice.pattern if isinstance(choice, re.Pattern) else choice
            there = [names[0] for names, _, _ in named]
            raise ValueError(
                f"layers: {wanted!r} fits none of the model's {what}, by their "
                f"names in model.named_modules(): {_listed(there)}"
            )
        kept |= found
    return [named[i][2] for i in sorted(kept)]


def _fits(name: str, choice: object) -> bool:
    if isinstance(choice, re.Pattern):
        return choice.search(name) is not None
    if not isinstance(choice, str):
        raise TypeError(f"layers holds {type(choice).__name__}; wanted names, globs or regular expressions")
    return fnmatch.fnmatchcase(name, choice) if _GLOB.search(choice) else name == choice


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 12 else ", ".join([*names[:6], "..", *names[-3:]])


def _path(matrix: WeightMatrix) -> str:
    """Return the name of the module, without that of the part or the parameter."""
    whole = matrix.part is None and matrix.attribute in _KNOWN
    return matrix.name if whole else matrix.name.rpartition(".")[0]


def _by_default(matrix: WeightMatrix) -> bool:
    if matrix.attribute not in _KNOWN:
        return isinstance(matrix.module, (nn.RNNBase, nn.RNNCellBase))
    return not isinstance(matrix.module, (nn.Embedding, nn.EmbeddingBag, parametrize.ParametrizationList))


def every_matrix(model: nn.Module) -> Iterator[WeightMatrix]:
    """Yield every weight with two axes or more, those that are shared once."""
    everything = [m for path, module in model.named_modules() for m in _matrices_of(path, module)]
    groups: dict[tuple[int, int | None], list[WeightMatrix]] = {}
    for matrix in everything:
        owned = matrix.module._parameters.get(matrix.attribute)
        # A computed weight is nobody else's.
        groups.setdefault((id(matrix if owned is None else owned), matrix.part), []).append(matrix)
    # Where a head shares the weight of an embedding, it is the head's.
    owners = {
        next((m for m in sharing if _by_default(m)), sharing[0]): sharing for sharing in groups.values()
    }
    for matrix in everything:
        if matrix in owners:
            aliases = tuple(m.name for m in owners[matrix] if m is not matrix)
            yield WeightMatrix(matrix.name, matrix.module, matrix.attribute, matrix.part, aliases)


def _matrices_of(path: str, module: nn.Module) -> Iterator[WeightMatrix]:
    if isinstance(module, parametrize.ParametrizationList):
        # The layer is called what the list belongs to: "fc" for "fc.parametrizations.weight".
        layer, _, attribute = f".{path}".rpartition(".parametrizations.")
        if attribute != "weight" or not hasattr(module[0], "is_deep_product"):
            return
        for number in range(module.ntensors):
            name = f"{layer}.factors.{number + 1}".lstrip(".")
            yield WeightMatrix(name, module, f"original{number}")
        return
    if _is_matrix(module, "weight"):
        yield WeightMatrix(path or "weight", module)
    if _is_matrix(module, "in_proj_weight"):
        for part, letter in enumerate(_ATTENTION_PARTS):
            yield WeightMatrix(_inside(path, letter), module, "in_proj_weight", part)
    for letter in _ATTENTION_PARTS:
        # Attention whose keys or values have other widths than its queries holds them apart.
        if _is_matrix(module, f"{letter}_proj_weight"):
            yield WeightMatrix(_inside(path, letter), module, f"{letter}_proj_weight")
    for attribute, parameter in module._parameters.items():
        # Recurrent layers, and parameters of no layer.
        if parameter is not None and parameter.ndim == 2 and attribute not in _KNOWN:
            yield WeightMatrix(_inside(path, attribute), module, attribute)


def _inside(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_matrix(module: nn.Module, attribute: str) -> bool:
    held = module._parameters.get(attribute)
    if held is None and not parametrize.is_parametrized(module, attribute):
        return False
    tensor = getattr(module, attribute)
    return isinstance(tensor, torch.Tensor) and tensor.ndim >= 2
