# SPDX-License-Identifier: MIT
"""`factorize`: training of layers as products of factors of low rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..._support.arrays import (
    FloatArray,
    check_choice,
    check_count,
    check_scale,
    random_generator,
    widths_of,
)
from ..._support.errors import ShapeError
from ..._support.text import format_count
from .._factor_rates import FactorRates, make_groups
from .._gradients import Loss, find_leading_gradients
from .._names import match_every_name
from .._truncation import Truncation, TruncationRule
from .._weight_use import find_weight_use
from ..deep_lora.files import check_factor
from ..layers import LayerChoice, WeightMatrix
from ..updates import compute_thin_svd
from .products import (
    DeepProduct,
    check_product_is_finite,
    choose_weights,
    install_all,
    is_product,
    uninstall,
)
from .starts import (
    INITS,
    draw_random_frames,
    frames_of_gradient,
    frames_of_surrogate,
    multiply_factors,
    start_from_frames,
    start_from_weight,
)

_RESTS: Final = ("drop", "freeze", "scale")
_OF_GRADIENT: Final = ("gradient", "surrogate")


def factorize(
    model: nn.Module,
    layers: LayerChoice = None,
    *,
    rank: int | Mapping[str, int],
    depth: int = 3,
    init: str = "gradient",
    batches: Any = None,
    loss: Loss | None = None,
    rest: str = "drop",
    scale: float | None = None,
    seed: int = 0,
    gradient_memory: int = 2**28,
) -> Factorization:
    r"""Replace weights in place by products of low rank, whose factors are then trained.

    A weight becomes ``W = left C .. C right``. Layers of n inputs and m outputs then have ``(m + n) r``
    parameters and those of the cores C, instead of ``m n``, and
    their training is faster accordingly. Started in the subspace of the first gradient, such a network
    learns about as well as the whole one; from a random start of the same rank it learns less.

    The model gets new parameters: make the optimiser after this call, with `Factorization.param_groups`. A
    trained model keeps its function only with ``init="weight"``, approximately, or with `rest` "freeze" or
    "scale"; otherwise the start replaces the trained weights.

    Parameters
    ----------
    model : Module
        Model to change in place.
    layers : LayerChoice
        Linear and convolutional layers, chosen as by `weight_matrices`. None: all that get fewer parameters
        and whose weight no other module shares or reads.
    rank : int or mapping of str to int
        Rank r, for all layers or by layer; at most the smaller side of each weight.
    depth : int
        Number of factors, 2 or more: two outer factors, and depth - 2 cores of r x r between them.
    init : {"gradient", "surrogate", "random", "weight"}
        Start. "gradient": the outer factors are the leading r singular vectors of the loss's gradient with
        respect to the weight, on both sides. "surrogate": half of their directions are singular vectors U_g,
        V_g of the gradient and the others the images ``W V_g`` and ``W^T U_g`` under the weight at the start;
        for networks with smooth activations, updates stay near this subspace. "random": random frames.
        "weight": the best approximation of rank r of the weight, for a model that is trained already.
    batches : batch, or list of batches
        Data for the gradient, as for `DeepLoRA`.
    loss : callable ``(model, batch) -> Tensor``, optional
        Loss function for the gradient. Default: ``model(**batch).loss``.
    rest : {"drop", "freeze", "scale"}
        Treatment of the rest of the weight, ``W(0) - left C .. C right``. "drop": it is removed, and the
        layer becomes smaller. "freeze": it is added as a constant, so that the function of the model does
        not change at first. "scale": the same, times one trained number, as the rest of a deep linear
        network is one scalar times an isometry.
    scale : float, optional
        Frobenius norm of the product at the start, as a multiple of that of the weight. Default 1. Not for
        "weight".
    seed : int
        Seed of random frames and rotations. Those of a layer depend on the seed and the layer's name only.
    gradient_memory : int
        Maximal bytes of dense gradients in memory with several batches; a smaller number takes more passes.

    Returns
    -------
    Factorization
        Handle of the factors.

    Raises
    ------
    TypeError
        For layers that are neither linear nor convolutions, packed or integer weights, and arguments of a
        wrong type.
    ValueError
        For weights that are shared, computed, zero or not finite; a rank above the smaller side; gradients
        that vanish, such as those of a layer that is never called or whose ReLU units are all off, or that
        are not finite; settings out of their range. The model is then unchanged.

    Notes
    -----
    With frames ``left`` and ``right`` the start is ``g left Q right`` with a random rotation Q and the g that
    keeps the Frobenius norm of the weight. Factor l is the parameter
    ``layer.parametrizations.weight.original{l-1}``, as after `overparameterize`; reading ``layer.weight``
    multiplies the factors. A layer applies the factors to its inputs one after the other where that needs
    fewer flops than the product: for low ranks always, except for convolutions with groups. The weight
    (out, in, kh, kw) of a convolution is the matrix (out, in kh kw): a convolution to r channels, and
    convolutions with kernels of one position.

    Models are saved by their state_dict. `torch.compile`, autocast and data parallelism work as for other
    parametrizations.

    Cost of "gradient" and "surrogate": a forward and backward pass, and at most 80 products of each gradient
    with 2 r + 8 vectors; of "weight": as many products of the weight.

    Kwon et al., arXiv 2311.05061 (compressed products); Yaras et al., arXiv 2406.04112 (frames from the
    first gradient); arXiv 2602.06208 (the subspace of smooth activations).

    Examples
    --------
    >>> import torch
    >>> import dlnfast as dln
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> generator = torch.Generator().manual_seed(0)
    >>> batch = torch.randn(32, 16, generator=generator), torch.randint(4, (32,), generator=generator)
    >>> loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    >>> factors = dln.torch.factorize(model, "0", rank=4, batches=batch, loss=loss)
    >>> optimizer = torch.optim.AdamW(factors.param_groups(1e-3))
    >>> factors.ranks, factors.n_parameters
    ({'0': 4}, 144)
    >>> type(factors.collapse()[0]).__name__, model[0].weight.shape
    ('Linear', torch.Size([16, 16]))
    """
    check_choice(init, "init", INITS)
    check_choice(rest, "rest", _RESTS)
    n_factors = check_count(depth, "depth", minimum=2)
    memory = check_count(gradient_memory, "gradient_memory", minimum=0)
    if init == "weight" and scale is not None:
        raise ValueError(f'scale is {scale}, but init="weight" takes it from the weight')
    size = 1.0 if scale is None else check_scale(scale, "scale", strict=True)
    if init not in _OF_GRADIENT and (batches is not None or loss is not None):
        raise ValueError(f'batches and loss are for init="gradient" and "surrogate"; init is {init!r}')
    chosen = choose_weights(model, layers, skip_shared=True)
    if isinstance(rank, Mapping):
        names = match_every_name(rank, [matrix.name for matrix in chosen], "rank")
        rank = {name: rank[given] for given, name in names.items()}
    if layers is None:
        chosen = _keep_smaller(model, chosen, rank)
    ranks = _ranks_of(chosen, rank)
    norms = [_norm_of(matrix) for matrix in chosen]
    generators = [random_generator(seed, ("factorize", matrix.name)) for matrix in chosen]
    gradients: list[Any] = [None] * len(chosen)
    if init in _OF_GRADIENT:
        watched = [_Watched(matrix) for matrix in chosen]
        wanted = [r if init == "gradient" else (r + 1) // 2 for r in ranks]
        gradients = list(find_leading_gradients(model, watched, batches, loss, wanted, memory))
    products = []
    for matrix, r, norm, gradient, generator in zip(chosen, ranks, norms, gradients, generators, strict=True):
        if init == "weight":
            factors = start_from_weight(matrix.matrix(), r, n_factors)
        else:
            if init == "gradient":
                left, right = frames_of_gradient(gradient, r, generator)
            elif init == "surrogate":
                left, right = frames_of_surrogate(gradient, matrix.matrix(), r, generator)
            else:
                left, right = draw_random_frames(matrix, r, generator)
            factors = start_from_frames(left, right, size * norm, n_factors, generator)
        products.append(_make_product(matrix, factors, rest))
    install_all([matrix.module for matrix in chosen], products)
    return Factorization(model, {matrix.name: matrix.module for matrix in chosen}, init)


@dataclass(frozen=True, eq=False)
class _Watched:
    """A layer whose gradient is wanted."""

    matrix: WeightMatrix

    @property
    def name(self) -> str:
        return self.matrix.name

    @property
    def module(self) -> nn.Module:
        return self.matrix.module

    @property
    def kind(self) -> str:
        return "linear" if isinstance(self.module, nn.Linear) else "convolution"

    @property
    def d_out(self) -> int:
        return self.matrix.shape[0]

    @property
    def d_in(self) -> int:
        return self.matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        weight = self.module.get_parameter("weight")
        return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _ranks_of(chosen: list[WeightMatrix], rank: int | Mapping[str, int]) -> list[int]:
    """Return the rank of each weight, checked."""
    ranks = []
    for matrix in chosen:
        if isinstance(rank, Mapping) and matrix.name not in rank:
            raise ValueError(f"rank has no entry for layer {matrix.name!r}, which is among the layers")
        wanted = rank[matrix.name] if isinstance(rank, Mapping) else rank
        name = f"rank of {matrix.name!r}" if isinstance(rank, Mapping) else "rank"
        count, narrow = check_count(wanted, name), min(matrix.shape)
        if count > narrow:
            raise ValueError(
                f"{name} is {count}; wanted at most {narrow}, the smaller side of layer {matrix.name!r} "
                f"({matrix.shape[0]} x {matrix.shape[1]})"
            )
        ranks.append(count)
    return ranks


def _keep_smaller(
    model: nn.Module, chosen: list[WeightMatrix], rank: int | Mapping[str, int]
) -> list[WeightMatrix]:
    """Return the weights that get fewer parameters, of layers that are called."""
    if isinstance(rank, Mapping):
        return [matrix for matrix in chosen if matrix.name in rank]
    count, readers = check_count(rank, "rank"), find_weight_use(model).readers
    smaller = [
        matrix
        for matrix in chosen
        if count * sum(matrix.shape) < math.prod(matrix.shape) and id(matrix.module) not in readers
    ]
    if not smaller:
        raise ValueError(
            f"rank is {count}, with which no linear or convolutional layer of the model gets fewer "
            "parameters; wanted a lower rank, or layers by name"
        )
    return smaller


def _norm_of(matrix: WeightMatrix) -> float:
    weight = matrix.matrix()
    if weight.is_meta:
        raise ValueError(f"layers: {matrix.name!r} is on the meta device, where weights have no values")
    norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    if not math.isfinite(norm):
        raise ValueError(f"layers: the weight of {matrix.name!r} is not finite")
    if norm == 0.0:
        raise ValueError(
            f"layers: the weight of {matrix.name!r} is zero, so that no factor would ever move; initialise it"
        )
    return norm


def _make_product(matrix: WeightMatrix, factors: list[FloatArray], rest: str) -> DeepProduct:
    weight = matrix.module.get_parameter("weight")
    difference = None
    if rest != "drop":
        product = torch.as_tensor(multiply_factors(factors), device=weight.device)
        difference = (matrix.matrix().double() - product).to(weight.dtype)
    return DeepProduct(weight.shape, factors, _factor_assigned, difference, is_rest_scaled=rest == "scale")


def _factor_assigned(weight: torch.Tensor, widths: Any) -> list[FloatArray]:
    """Return factors of a weight that is assigned to a layer; its best approximation at the layer's rank."""
    return start_from_weight(weight, min(widths[1:-1]), len(widths) - 1)


class Factorization:
    """Handle of the layers that `factorize` changed; it is made by that function.

    Parameters
    ----------
    model : Module
        Model with the layers.
    layers : mapping of str to Module
        Layers whose weights are products, by name.
    init : str
        Start of the factors.

    Attributes
    ----------
    model : Module
        Model with the layers.
    init : str
        Start of the factors.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], init: str) -> None:
        self.model = model
        self.init = init
        self._layers = dict(layers)
        self._history: list[tuple[int, dict[str, int]]] = []

    def __repr__(self) -> str:
        """Return the numbers of layers, ranks and parameters."""
        if not self._layers:
            return "Factorization(collapsed)"
        ranks = sorted(set(self.ranks.values()))
        width = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}..{ranks[-1]}"
        count = format_count(len(self._layers), "layer", "layers")
        return f"Factorization({count}, {width}, {self.n_parameters} parameters)"

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers."""
        return list(self._layers)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each layer: the smallest width of its factors."""
        return {name: min(widths_of(self._factors(name))) for name in self._layers}

    @property
    def n_parameters(self) -> int:
        """Number of trained parameters of the factors, without biases and other layers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the factors, layer by layer from the first, and the number that scales the rest."""
        for name in self._layers:
            yield from self._factors(name)
            rest_scale = self._product(name).rest_scale
            if rest_scale is not None:
                yield rest_scale

    def factors(self, layer: str) -> list[torch.Tensor]:
        """Return the current factors ``[right, C_1, .., left]`` of a layer, detached.

        Parameters
        ----------
        layer : str
            Name of the layer, as in `layer_names`.

        Returns
        -------
        list of Tensor

        Raises
        ------
        ValueError
            For an unknown name.
        """
        return [factor.detach() for factor in self._factors(layer)]

    def singular_values(self, layer: str) -> npt.NDArray[np.float64]:
        """Return the singular values of the product of a layer, descending; without the rest.

        Parameters
        ----------
        layer : str
            Name of the layer, as in `layer_names`.

        Returns
        -------
        ndarray of float64, shape (r,)

        Notes
        -----
        Cost: O((m + n) r^2).
        """
        return compute_thin_svd(*self._pair(layer))[1].cpu().numpy()

    # --------------------------------------------------------------------------------------- training

    def param_groups(
        self, learning_rate: float, outer: float = 1.0, *, match_updates: bool = True, **options: Any
    ) -> list[dict[str, Any]]:
        r"""Return all trained parameters of the model as groups for an optimiser.

        Parameters
        ----------
        learning_rate : float
            Learning rate lambda with which the original model would be trained; that of all parameters
            outside of the factors.
        outer : float
            Factor gamma of the rates of the two outer factors of each layer. 0 freezes them.
        match_updates : bool
            Whether to use the rate ``lambda sqrt(m n / (a b))`` for an a x b factor of an m x n weight. A
            step of Adam on a x b numbers at the rate lambda has a Frobenius norm of about
            ``lambda sqrt(a b)``, so with this rule a step on any factor is as large as one on the weight, at
            every rank. False, one rate for all, is for optimisers whose steps are proportional to the
            gradients, such as SGD.
        **options
            Further settings for each group, such as ``weight_decay``.

        Returns
        -------
        list of dict
            Groups for ``torch.optim``, one per rate.

        Raises
        ------
        TypeError
            For the options ``params`` and ``lr``.
        ValueError
            For learning rates that are negative or not finite.
        RuntimeError
            If the factorization was collapsed.
        """
        rule = FactorRates.checked(learning_rate, outer, match_updates, "learning_rate")
        rates: dict[int, float] = {}
        for name in self._require_layers():
            factors, product = self._factors(name), self._product(name)
            norm = math.sqrt(math.prod(product.shape))
            rates |= {id(factor): rate for factor, rate in rule.rates_of_factors(factors, norm)}
            if product.rest_scale is not None and product.rest is not None:
                # A step on the number that scales the rest R changes the weight by ||R||_F times it.
                size = float(torch.linalg.vector_norm(product.rest.detach(), dtype=torch.float64))
                rates[id(product.rest_scale)] = rule.rate_of(1, norm / size) if size else rule.rate
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return make_groups(((p, rates.get(id(p), rule.rate)) for p in trained), options)

    def truncate(
        self,
        rank: int | None = None,
        *,
        tolerance: float | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> dict[str, Truncation]:
        r"""Replace the product of each layer by its best approximation of lower rank.

        Parameters
        ----------
        rank : int, optional
            Maximal rank of every layer.
        tolerance : float, optional
            Maximal relative error of every layer: the rank is the lowest one with
            ``||P - P_rank||_F <= tolerance ||P||_F``. At least one of `rank` and `tolerance` is required;
            with both, the lower rank is used.
        optimizer : Optimizer, optional
            Optimiser of the factors; its state of the factors that change, such as momentum, is dropped.

        Returns
        -------
        dict of str to Truncation
            Ranks and errors by layer.

        Raises
        ------
        RuntimeError
            If the factorization was collapsed.
        ValueError
            For arguments out of their range, products that are not finite, and an optimiser without factors
            of this model. Nothing is then changed.

        Notes
        -----
        A layer that keeps its rank is not touched. The others get balanced factors in the same parameters,
        which have other shapes afterwards, and the learning rates of their groups. The rest, if there is one,
        does not change. Wrap a model for data parallelism after its ranks are final.

        Truncation by a relative tolerance is the rule of dynamical low-rank training (arXiv 2205.13571).
        """
        rule = TruncationRule.checked(rank, tolerance, "truncate")
        if optimizer is not None:
            self._check_optimizer(optimizer)
        for name, layer in self._require_layers().items():
            check_product_is_finite(name, layer)
        found = {name: rule.truncate(*self._pair(name)) for name in self._layers}
        for name, (truncation, (left, values, right)) in found.items():
            factors = self._factors(name)
            if truncation.rank == min(widths_of(factors)):
                continue
            roots = values ** (1 / len(factors))
            cores = [torch.diag(roots)] * (len(factors) - 2)
            new = [roots[:, None] * right, *cores, left * roots]
            for parameter, value in zip(factors, new, strict=True):
                parameter.data = value.to(parameter.dtype).contiguous()
                parameter.grad = None
                if optimizer is not None:
                    optimizer.state.pop(parameter, None)
            self._product(name).note_factors(factors)
        return {name: truncation for name, (truncation, _) in found.items()}

    def truncate_during(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        every: int,
        tolerance: float | None = None,
        rank: int | None = None,
    ) -> torch.utils.hooks.RemovableHandle:
        """Truncate after every n-th step of an optimiser, and record the ranks in `rank_history`.

        Parameters
        ----------
        optimizer : Optimizer
            Optimiser of the factors.
        every : int
            Number of steps n between truncations.
        tolerance, rank
            Arguments of `truncate`.

        Returns
        -------
        RemovableHandle
            ``handle.remove()`` ends it.

        Raises
        ------
        RuntimeError
            If the factorization was collapsed.
        ValueError
            For arguments out of their range, and an optimiser without factors of this model, such as one
            that was made before `factorize`.
        """
        interval = check_count(every, "every")
        TruncationRule.checked(rank, tolerance, "truncate_during")
        self._check_optimizer(optimizer)
        n_steps = 0
        self._history.append((0, self.ranks))

        def after_step(stepped: torch.optim.Optimizer, *unused: Any) -> None:
            nonlocal n_steps
            del unused
            n_steps += 1
            if n_steps % interval == 0:
                self.truncate(rank, tolerance=tolerance, optimizer=stepped)
                self._history.append((n_steps, self.ranks))

        return optimizer.register_step_post_hook(after_step)

    @property
    def rank_history(self) -> tuple[npt.NDArray[np.int64], dict[str, npt.NDArray[np.int64]]]:
        """Steps of `truncate_during`, from 0, and the ranks of each layer after them."""
        steps = np.array([step for step, _ in self._history], dtype=np.int64)
        names = self._history[0][1] if self._history else {}
        ranks = {
            name: np.array([entry[name] for _, entry in self._history], dtype=np.int64) for name in names
        }
        return steps, ranks

    # ------------------------------------------------------------------------------------ save and end

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return factors, and rests where there are some, by layer: ``"fc1.factors.1"``, detached."""
        state: dict[str, torch.Tensor] = {}
        for name in self._layers:
            for number, factor in enumerate(self._factors(name), start=1):
                state[f"{name}.factors.{number}"] = factor.detach()
            product = self._product(name)
            if product.rest is not None:
                state[f"{name}.rest"] = product.rest.detach()
            if product.rest_scale is not None:
                state[f"{name}.rest_scale"] = product.rest_scale.detach()
        return state

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy the factors of a `state_dict`, also of lower or higher ranks, into this factorization.

        Parameters
        ----------
        state : mapping of str to Tensor
            Result of `state_dict`.

        Raises
        ------
        ValueError
            For other names, and numbers that are not finite.
        ShapeError
            For factors that do not fit each other or the layer. Nothing is then changed.

        Notes
        -----
        Call this before ``model.load_state_dict``, which accepts only factors of equal shapes.
        """
        own = self.state_dict()
        if set(own) != set(state):
            difference = ", ".join(sorted(set(own) ^ set(state))[:6])
            raise ValueError(f"state has other entries than this factorization: {difference}")
        for key, tensor in state.items():
            check_factor(tensor, f"state: {key!r}", own[key].dtype)
        for name in self._layers:
            self._check_state(name, state)
        with torch.no_grad():
            for name in self._layers:
                factors, product = self._factors(name), self._product(name)
                for number, factor in enumerate(factors, start=1):
                    factor.data = state[f"{name}.factors.{number}"].detach().to(factor, copy=True)
                    factor.grad = None
                product.note_factors(factors)
                if product.rest is not None:
                    product.rest.copy_(state[f"{name}.rest"])
                if product.rest_scale is not None:
                    product.rest_scale.copy_(state[f"{name}.rest_scale"])

    def _check_state(self, name: str, state: Mapping[str, torch.Tensor]) -> None:
        own = self._factors(name)
        new = [state[f"{name}.factors.{number}"] for number in range(1, len(own) + 1)]
        inner = [factor.shape[-1] for factor in new[1:]]
        fits = all(factor.ndim == 2 for factor in new)
        fits = fits and [factor.shape[0] for factor in new[:-1]] == inner
        if not fits or new[0].shape[1] != own[0].shape[1] or new[-1].shape[0] != own[-1].shape[0]:
            raise ShapeError(
                f"state: the factors of {name!r} have shapes {[tuple(factor.shape) for factor in new]}; "
                f"wanted a product of {own[-1].shape[0]} x {own[0].shape[1]}"
            )
        rest = self._product(name).rest
        if rest is not None and state[f"{name}.rest"].shape != rest.shape:
            found = tuple(state[f"{name}.rest"].shape)
            raise ShapeError(f"state: '{name}.rest' has shape {found}; wanted {tuple(rest.shape)}")

    def collapse(self) -> nn.Module:
        """Replace the products by plain weights, in place, and return the model.

        The weights are those that the layers had, bit for bit; outputs change by rounding. The layers have
        their original size again: call `compress` with the `ranks` from before for pairs of thin layers. The
        model gets new parameters, and this handle is of no further use.

        Returns
        -------
        Module
            The model.

        Raises
        ------
        ValueError
            If a product is not finite. The model is then unchanged.
        """
        for name, layer in self._require_layers().items():
            check_product_is_finite(name, layer)
        for layer in self._layers.values():
            uninstall(layer)
        self._layers = {}
        return self.model

    # ------------------------------------------------------------------------------------------ helpers

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimiser that trains none of the factors: it was made before them."""
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer is {type(optimizer).__name__}; wanted a torch.optim.Optimizer")
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._require_layers()
        if not any(id(parameter) in trained for parameter in self.parameters()):
            raise ValueError(
                "optimizer has none of the factors; wanted one made after factorize, with param_groups"
            )

    def _require_layers(self) -> dict[str, nn.Module]:
        if not self._layers or not all(map(is_product, self._layers.values())):
            raise RuntimeError("the factorization was collapsed: its layers have plain weights")
        return self._layers

    def _steps(self, layer: str) -> Any:
        layers = self._require_layers()
        if layer not in layers:
            raise ValueError(f"layer is {layer!r}; wanted one of {', '.join(list(layers)[:12])}")
        return layers[layer].parametrizations["weight"]  # type: ignore[index]

    def _factors(self, layer: str) -> list[nn.Parameter]:
        steps = self._steps(layer)
        return [getattr(steps, f"original{i}") for i in range(steps.ntensors)]

    def _product(self, layer: str) -> DeepProduct:
        product: DeepProduct = self._steps(layer)[0]
        return product

    def _pair(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two matrices in float64 whose product is that of the factors."""
        first, *others = (factor.detach().double() for factor in self._factors(layer))
        above = others[0]
        for factor in others[1:]:
            above = factor @ above
        return above, first
