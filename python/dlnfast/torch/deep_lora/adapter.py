# SPDX-License-Identifier: MIT
"""`DeepLoRA`: adapters with more than two factors for chosen layers of any model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..._config.finetuning import INITS
from ..._support.arrays import check_choice, check_count, check_scale, random_generator
from ..._support.errors import ShapeError
from ..._support.moved import refuse_moved
from ..._support.text import format_count
from .._factor_rates import MOVED_RATE, FactorRates, make_groups
from .._gradients import Loss, find_leading_gradients
from .._truncation import Truncation, TruncationRule
from ..layers import LayerChoice
from ..updates import UpdateMatrix, compute_thin_svd
from . import files
from .gradient import draw_frames, make_first_factors
from .layers import (
    CHILD,
    Adapters,
    DeepFactors,
    Factors,
    Target,
    attach,
    detach,
    find_named_targets,
    find_targets,
    get_adapters,
    list_adapters,
)

_FROZEN: Final = "_frozen_by_deep_lora"


class DeepLoRA:
    r"""Deep LoRA: adaptation of chosen layers of a model by products of several factors.

    An adapted layer computes ``y = W x + left C_L .. C_1 right x``. At the start, ``right`` (r, d_in) and
    ``left`` (d_out, r) are frames, and the cores (r, r) are ``C_l = eps 1``. This approximates the training
    of L factors of full width, ``dW = W_L .. W_1`` with ``W_l = eps Q_l`` at the start, which change only
    within subspaces of few dimensions. There is no factor alpha / r.

    The model is changed in place: each chosen layer gets a forward hook, and a submodule ``deep_lora`` with
    the factors.

    Parameters
    ----------
    model : Module
        Model to adapt in place.
    layers : LayerChoice
        Linear, Embedding or Conv1D (as in GPT-2) layers, chosen as by `weight_matrices`; None: all linear
        layers that can be adapted (see Raises).
    rank : int, optional
        Rank r, 8 by default; at most the smaller side of each weight, and at least 2 for "gradient". Not for
        "full".
    depth : int
        Depth L, from 2 to 5.
    scale : float
        Scale eps. The first gradients of the cores are about ``eps^(L-1)`` times those of the weight, 1e-4 by
        default, which suits the epsilon of Adam, 1e-8 by default. If they are near epsilon, the layer with
        the largest gradient starts alone, and the others late or never. For the scale 1e-3 use the epsilon
        1e-12, and for L = 4 and 5 a larger scale, such as 0.05, or a smaller epsilon.
    init : {"gradient", "random", "full"}
        Initial factors. "gradient": half of the vectors of the frames are the leading singular vectors of the
        loss's gradient with respect to the weight, the other half their images under a random rotation.
        "random": L factors of width r, each eps times a random frame. "full": the same with the width
        min(d_out, d_in).
    batches : batch, or list of batches
        Data for the gradient of "gradient". A tensor, a mapping or a tuple is one batch; any other iterable
        contains several, and their gradients are summed. The mode of the model is not changed: call
        ``model.eval()`` before for a gradient without dropout.
    loss : callable ``(model, batch) -> Tensor``, optional
        Loss function. Default: ``model(**batch).loss``.
    seed : int
        Seed of the random frames. Those of a layer depend on the seed and the layer's name only.
    name : str
        Name of this adapter. A layer can have several adapters, with the sum of their updates.
    freeze : bool
        Whether to turn off the gradients of all parameters except those of adapters, until `remove`. Turn on
        the gradients of other parameters to train, such as those of a new head, afterwards.
    gradient_memory : int
        Maximal bytes of dense gradients in memory with several batches; a smaller number takes more passes
        over the batches. With one batch there is one gradient in memory at a time.

    Attributes
    ----------
    model : Module
        Adapted model.
    name : str
        Name of the adapter.
    depth : int
        Depth L.
    scale : float
        Scale eps.
    init : str
        Initial factors.
    enabled : bool
        Whether the adapter is in use; can be set.

    Raises
    ------
    TypeError
        For layers of another type, layers with a weight that another module reads instead of calling the
        layer, such as ``out_proj`` of an attention, batches without a loss, and arguments of a wrong type.
    ValueError
        For a choice without a match, weights that are shared (tied embeddings, views of one tensor) or
        computed (parametrizations, weight_norm, spectral_norm, pruning), settings out of their range, a
        name that is taken, and gradients that vanish or are not finite. The model is then unchanged.

    Notes
    -----
    For the loss ``c/2 ||(W + dW) X - Y||^2`` of a square weight, white inputs and ``Y X^T - W`` of rank r/2,
    gradient descent on the cores alone equals that on the full-width factors in exact arithmetic, except for
    their part outside of the subspaces, ``rho^L (E - left right)`` with rho <= eps. In other settings it is
    an approximation. The frames are then trained as well, or the update stays in the span of the first
    gradient: see `param_groups`.

    Layers get a hook and a submodule, and are not wrapped: they keep their class, attributes and names in the
    ``state_dict``, which also contains the factors as ``<layer>.deep_lora.<name>.right`` and so on. For files
    that do not need this package, call ``remove(merge=True)`` first, or `export_lora`. Optimisers, trainers
    and data parallelism find the factors in ``model.parameters()``. Deep copies and checkpoints work. Only
    layers that are called compute the branch.

    While an adapter is merged, each adapted layer stores a copy of its original weight, on the same device
    and in the same precision. The ``state_dict`` contains that copy, so it is the same as without merging.
    When a ``state_dict`` is loaded, its weight is the original one, and the update is merged into it again.

    Factors are float64 for a float64 weight and float32 for others; the output has the layer's precision.
    Under autocast to bfloat16, products with activations are in bfloat16 and those of the cores in float32.
    Under autocast to float16 all products are in float32, because eps^L underflows in float16.

    Cost of "gradient": a forward and backward pass, and at most 80 products of each gradient with r + 8
    vectors. Besides the tensors that autograd saves anyway, the inputs of the adapted layers are saved, as in
    their training; checkpoints recompute them. The only matrices of the size of a weight are the gradients.
    Yaras et al., ICML 2024, arXiv 2406.04112.

    Examples
    --------
    >>> import torch
    >>> import dlnfast as dln
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> batch = torch.ones(2, 16), torch.ones(2, 4)
    >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    >>> adapter = dln.torch.DeepLoRA(model, "0", rank=4, batches=batch, loss=loss)
    >>> optimizer = torch.optim.AdamW(adapter.param_groups(0.03))
    >>> adapter.n_parameters
    176
    """

    def __init__(
        self,
        model: nn.Module,
        layers: LayerChoice = None,
        *,
        rank: int | None = None,
        depth: int = 3,
        scale: float = 1e-2,
        init: str = "gradient",
        batches: Any = None,
        loss: Loss | None = None,
        seed: int = 0,
        name: str = "default",
        freeze: bool = True,
        gradient_memory: int = 2**26,
    ) -> None:
        check_choice(init, "init", INITS)
        if init == "full" and rank is not None:
            raise ValueError(f'rank is {rank}, but init="full" uses the full width')
        if init != "gradient" and (batches is not None or loss is not None):
            raise ValueError(f'batches and loss are for init="gradient"; init is {init!r}')
        self.depth = check_count(depth, "depth", minimum=2, maximum=5)
        self.scale = check_scale(scale, "scale (eps)", strict=True)
        self.init = init
        width = check_count(8 if rank is None else rank, "rank")
        memory = check_count(gradient_memory, "gradient_memory", minimum=0)
        targets = find_targets(model, layers)
        for target in targets if init != "full" else []:
            target.check_rank(width, init)
        self._check_name(name, targets)
        generators = [random_generator(seed, ("deep lora", target.name)) for target in targets]
        frames: list[Any] = [None] * len(targets)
        if init == "gradient":
            ranks = [(width + 1) // 2] * len(targets)
            found = find_leading_gradients(model, targets, batches, loss, ranks, memory)
            frames = [
                draw_frames(gradient, target, width, generator)
                for gradient, target, generator in zip(found, targets, generators, strict=True)
            ]
        factors = [
            make_first_factors(
                target,
                pair,
                min(target.d_out, target.d_in) if init == "full" else width,
                self.depth,
                self.scale,
                generator,
            )
            for target, pair, generator in zip(targets, frames, generators, strict=True)
        ]
        self._attach(model, name, targets, factors, freeze)

    def __repr__(self) -> str:
        """Return the name, and the numbers of layers, ranks, depth and parameters."""
        ranks = sorted({branch.rank for branch in self._branches.values()})
        width = (
            f"rank {ranks[0]}"
            if len(ranks) == 1
            else f"ranks {ranks[0]}..{ranks[-1]}"
            if ranks
            else "removed"
        )
        count = format_count(len(self._branches), "layer", "layers")
        return (
            f"DeepLoRA({self.name!r}, {count}, {width}, depth {self.depth}, {self.n_parameters} parameters)"
        )

    # --------------------------------------------------------------------------------------- parameters

    @property
    def layer_names(self) -> list[str]:
        """Names of the adapted layers."""
        return list(self._targets)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all factors, layer by layer: right, the cores in one tensor, left."""
        for branch in self._branches.values():
            yield from branch.parameters()

    @property
    def n_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.parameters())

    @refuse_moved("DeepLoRA.param_groups", MOVED_RATE)
    def param_groups(
        self, eta: float, outer: float = 1.0, *, match_updates: bool = True, **options: Any
    ) -> list[dict[str, Any]]:
        r"""Return the factors as groups for an optimiser, with the learning rate ``eta / sqrt(a b)``.

        Parameters
        ----------
        eta : float
            Frobenius norm of a step of Adam on each factor: an a x b factor gets the learning rate
            ``eta / sqrt(a b)``. One eta suits all ranks.
        outer : float
            Factor gamma of the rates of the first and last factor, right and left. The theorem of compressed
            training is about a small one, such as 0.01. 0 freezes them.
        match_updates : bool
            Whether rates depend on shapes. False: eta is the learning rate of all factors, for optimisers
            whose steps are proportional to the gradients, such as SGD.
        **options
            Further settings for each group, such as ``weight_decay``.

        Returns
        -------
        list of dict
            Groups for ``torch.optim``, one per rate, with the parameters, ``lr`` and the options.

        Raises
        ------
        TypeError
            For the options ``params`` and ``lr``, and for ``learning_rate``, the keyword of version 0.1.0.
        ValueError
            For an eta or outer that is negative or not finite.
        RuntimeError
            If the adapter was removed.

        Notes
        -----
        A step of Adam changes each entry by about the learning rate, and an a x b factor by about
        ``lr sqrt(a b)``. One learning rate for all ranks therefore is another training at each rank: the
        cores of a large rank overshoot, and those of a small one hardly move.

        Cost: O(number of layers).

        Examples
        --------
        >>> import torch
        >>> import dlnfast as dln
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> adapter = dln.torch.DeepLoRA(model, rank=4, init="random")
        >>> [group["lr"] for group in adapter.param_groups(0.04)]  # 4 x 16 and 16 x 4; 4 x 4
        [0.005, 0.01]
        """
        rule = FactorRates.checked(eta, outer, match_updates, "eta")
        branches = self._require_branches().values()
        return make_groups(
            (pair for branch in branches for pair in rule.rates_of_factors(list(branch.parameters()))),
            options,
        )

    # ------------------------------------------------------------------------------------ on and off

    @property
    def enabled(self) -> bool:
        """Whether the adapter is in use."""
        return all(branch.enabled for branch in self._branches.values())

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._switch("enabled", bool(value))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable this adapter inside a ``with`` block, whether it is merged or not."""
        enabled = self.enabled
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = enabled

    @property
    def merged(self) -> bool:
        """Whether the adapter is merged: the weights contain its update while it is enabled."""
        return any(branch.merged for branch in self._branches.values())

    def merge(self) -> None:
        """Add the update to the weights; `unmerge` restores the original weights bit for bit.

        A merged adapter stays merged. The sum of the weight and the updates of several adapters is rounded
        once to the precision of the weight. For a permanent merge without a copy: ``remove(merge=True)``.

        Raises
        ------
        TypeError
            For weights that hold no floating-point numbers, such as quantised ones.
        ValueError
            If a factor, or the sum of weight and update, is not finite; the message names the layer.
        RuntimeError
            If something else changed a weight while adapters were merged into it.

        Notes
        -----
        After an error no weight has changed. Memory: a copy of each adapted weight, until `unmerge`.
        """
        self._switch("merged", True)

    def unmerge(self) -> None:
        """Remove the update from the weights, bit for bit; other adapters stay merged.

        It does not matter if the factors have changed since `merge`. It has no effect on an adapter that is
        not merged.

        Raises
        ------
        RuntimeError
            If something else, such as an optimiser, changed a weight while adapters were merged into it, and
            that change would be lost. ``remove(merge=True)`` does not change the weights.
        """
        self._switch("merged", False)

    def _switch(self, attribute: str, value: bool) -> None:
        """Set `enabled` or `merged` of all branches and write their weights; after an error undo it."""
        branches = self._require_branches()
        for name in branches:
            self._get_adapters(name).merged_weight.check_unchanged(self._targets[name].module)
        changed = []
        try:
            for name, branch in branches.items():
                if getattr(branch, attribute) != value:
                    changed.append(name)
                    setattr(branch, attribute, value)
                    self._get_adapters(name).write_weight(self._targets[name].module)
        except BaseException:
            for name in changed:
                setattr(branches[name], attribute, not value)
                self._get_adapters(name).merged_weight.restore(self._targets[name].module)
                self._get_adapters(name).write_weight(self._targets[name].module)
            raise

    def _get_adapters(self, layer: str) -> Adapters:
        return get_adapters(self._targets[layer].module)

    def remove(self, merge: bool = False) -> None:
        """Remove the adapter from the model.

        Parameters
        ----------
        merge : bool
            Whether to leave the update in the weights permanently. Default: restore the original weights.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            The errors of `merge` and `unmerge`; the model is then unchanged.

        Notes
        -----
        Parameters that adapters have frozen are thawed when the last adapter is removed.
        """
        branches = self._require_branches()
        for name in branches:
            self._get_adapters(name).check_removal(self.name, self._targets[name].module, merge)
        for name in list(branches):
            target = self._targets[name]
            self._get_adapters(name).take_out(self.name, target.module, merge)
            detach(target.module, self.name)
            del branches[name], self._targets[name]
        _thaw(self.model)

    # ----------------------------------------------------------------------------------- the update

    def factors(self, layer: str) -> list[torch.Tensor]:
        """Return the current factors ``[right, C_1, .., C_k, left]`` of a layer, detached.

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
        return self._get_branch(layer).factors().as_list()

    def delta_weight(self, layer: str) -> torch.Tensor:
        """Return the update of a layer's weight as a dense matrix, in the layout of that weight.

        The layout is (d_out, d_in) for Linear, and (d_in, d_out) for Embedding and Conv1D.

        Parameters
        ----------
        layer : str
            Name of the layer, as in `layer_names`.

        Returns
        -------
        Tensor
        """
        return self._get_branch(layer).delta_weight()

    def singular_values(self, layer: str) -> npt.NDArray[np.float64]:
        """Return the singular values of the update of a layer's weight, descending.

        Parameters
        ----------
        layer : str
            Name of the layer, as in `layer_names`.

        Returns
        -------
        ndarray of float64, shape (r,)

        Raises
        ------
        ValueError
            For an unknown name, and factors that are not finite.

        Notes
        -----
        Cost: O((d_in + d_out) r^2).
        """
        self._get_branch(layer).check_finite(layer, self.name)
        return compute_thin_svd(*self._get_branch(layer).factors().double().as_pair())[1].cpu().numpy()

    def updates(self) -> list[UpdateMatrix]:
        """Return the updates of all adapted weights, for `track`.

        Examples
        --------
        >>> import torch
        >>> import dlnfast as dln
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> adapter = dln.torch.DeepLoRA(model, rank=2, init="random")
        >>> optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
        >>> with dln.torch.track(model, adapter.updates(), every=1, change=False) as tracked:
        ...     model(torch.ones(1, 4)).sum().backward()
        ...     optimizer.step()
        >>> tracked.trajectory().singular_values("0").shape
        (2, 2)
        """
        return [
            UpdateMatrix(
                name,
                branch,
                pair=branch.pair,
                size=(self._targets[name].d_out, self._targets[name].d_in),
            )
            for name, branch in self._require_branches().items()
        ]

    def compress(self, rank: int | None = None, *, tolerance: float | None = None) -> dict[str, Truncation]:
        r"""Replace the update of each layer by its best approximation of lower rank.

        Parameters
        ----------
        rank : int, optional
            Maximal rank of every layer.
        tolerance : float, optional
            Maximal relative error of every layer: the rank is the lowest one with
            ``||dW - dW_rank||_F <= tolerance ||dW||_F``. At least one of `rank` and `tolerance` is required;
            with both, the lower rank is used.

        Returns
        -------
        dict of str to Truncation
            Ranks and errors by layer.

        Raises
        ------
        RuntimeError
            While the adapter is merged.
        ValueError
            For arguments out of their range, and factors that are not finite. The adapter is then unchanged.

        Notes
        -----
        With ``dW = U S V^T`` the factors become ``right = V^T``, ``left = U`` and ``depth`` cores
        ``S^{1/depth}``. They are new parameters: make the optimiser after this call.
        """
        rule = TruncationRule.checked(rank, tolerance, "compress")
        branches = self._require_branches()
        if self.merged:
            raise RuntimeError(f"adapter {self.name!r} is merged; unmerge it before compress")
        for name, branch in branches.items():
            branch.check_finite(name, self.name)
        found = {name: self._truncate(branch, rule) for name, branch in branches.items()}
        for name, (_, factors) in found.items():
            branches[name].set_factors(factors, branches[name].right.dtype, branches[name].right.device)
        return {name: truncation for name, (truncation, _) in found.items()}

    def _truncate(self, branch: DeepFactors, rule: TruncationRule) -> tuple[Truncation, Factors]:
        """Return the truncation of an update, and its factors."""
        truncation, (left, values, right) = rule.truncate(*branch.factors().double().as_pair())
        core = torch.diag(values ** (1 / self.depth))
        return truncation, Factors(right, core.repeat(self.depth, 1, 1), left, framed=True)

    # ---------------------------------------------------------------------------------------- files

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the factors by layer and name, ``"encoder.0.query.right"`` and so on, detached."""
        return {
            f"{name}.{key}": tensor.detach()
            for name, branch in self._branches.items()
            for key, tensor in branch.named_parameters()
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy factors from a `state_dict` into this adapter; names and shapes must be equal.

        Parameters
        ----------
        state : mapping of str to Tensor
            Result of `state_dict`.

        Raises
        ------
        TypeError
            For values that are no tensors of floating-point numbers.
        ValueError
            For other names, and numbers that are not finite. The adapter is then unchanged.
        ShapeError
            For other shapes.

        Notes
        -----
        If the adapter is merged, the weights contain the new update afterwards.
        """
        own = self.state_dict()
        if set(own) != set(state):
            difference = sorted(set(own) ^ set(state))
            raise ValueError(f"state has other factors than this adapter: {', '.join(difference[:6])}")
        for key, tensor in own.items():
            files.check_factor(state[key], f"state: {key!r}", tensor.dtype)
            if tensor.shape != state[key].shape:
                raise ShapeError(
                    f"state: {key!r} has shape {tuple(state[key].shape)}; wanted {tuple(tensor.shape)}"
                )
        for name in self._branches:
            self._get_adapters(name).merged_weight.check_unchanged(self._targets[name].module)
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(state[key])
        for name in self._branches:
            self._get_adapters(name).write_weight(self._targets[name].module)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the adapter to a safetensors file, for `load`.

        Parameters
        ----------
        path : path-like
            Path of the file.

        Raises
        ------
        ModuleNotFoundError
            If the package safetensors is not installed.
        ValueError
            If a factor is not finite; the message names the layer.

        Notes
        -----
        The file is written under a temporary name and then renamed, so an existing file is replaced by a
        complete one or not at all. The file contains a checksum of its content.
        """
        layers = {}
        for name, branch in self._require_branches().items():
            branch.check_finite(name, self.name)
            target = self._targets[name]
            layers[name] = files.SavedLayer(target.kind, target.d_out, target.d_in, branch.factors())
        settings = {"depth": self.depth, "scale": self.scale, "init": self.init, "name": self.name}
        files.write(path, settings, layers)

    @classmethod
    def load(
        cls, model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None, freeze: bool = True
    ) -> DeepLoRA:
        """Add an adapter from a file of `save` to a model.

        Parameters
        ----------
        model : Module
            Model with layers of the same names and shapes.
        path : path-like
            Path of the file.
        name : str, optional
            Name of the adapter. Default: its name in the file.
        freeze : bool
            Whether to freeze other parameters, as for `DeepLoRA`.

        Returns
        -------
        DeepLoRA

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        TypeError
            For layers that cannot be adapted.
        ValueError
            For a file of another format, a damaged file, layers that the model does not have, and a name that
            is taken.
        ShapeError
            For layers of other shapes.

        Notes
        -----
        Everything is checked first, so that the model is unchanged after an error. Files of dlnfast 0.1.0
        have no checksum, and are read without one.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}; wanted a torch.nn.Module")
        settings, layers = files.read(path)
        targets = find_named_targets(model, list(layers))
        factors = []
        for target, saved in zip(targets, layers.values(), strict=True):
            saved.check_fits(target)
            factors.append(saved.factors)
        adapter = cls.__new__(cls)
        adapter.depth, adapter.scale, adapter.init = settings["depth"], settings["scale"], settings["init"]
        chosen = settings["name"] if name is None else name
        cls._check_name(chosen, targets)
        adapter._attach(model, chosen, targets, factors, freeze)
        return adapter

    def export_lora(
        self, path: str | os.PathLike[str], *, modules_to_save: Sequence[str] = (), **settings: Any
    ) -> None:
        """Write a folder that PEFT loads as plain LoRA, without this package.

        The export is exact: ``lora_A = right`` and ``lora_B = left C_k .. C_1``, with alpha = r.

        Parameters
        ----------
        path : path-like
            Path of the folder, which is created if missing.
        modules_to_save : sequence of str
            Names of other trained modules to write, such as a new head. Modules that are not named are not in
            the folder: a head that was trained would be lost.
        **settings
            Further entries of PEFT's ``adapter_config.json``: ``base_model_name_or_path``, ``revision``,
            ``task_type``, ``inference_mode``, ``auto_mapping``. Without ``task_type``, ``auto_mapping`` is
            the class of a model of transformers by default.

        Raises
        ------
        TypeError
            For other settings.
        ValueError
            For names of modules that the model does not have, and factors that are not finite.

        Notes
        -----
        With ``init="full"`` the rank is the full width: call `compress` first. The folder is written
        completely or not at all. An earlier export in it is replaced in one step, and other files do not
        change. If the folder contains folders or links, the two files of the export are replaced one after
        the other.
        """
        for name, branch in self._require_branches().items():
            branch.check_finite(name, self.name)
        layers = {name: (self._targets[name], branch.factors()) for name, branch in self._branches.items()}
        files.write_lora(path, self.model, layers, modules_to_save, settings)

    # -------------------------------------------------------------------------------------- helpers

    @staticmethod
    def _check_name(name: object, targets: list[Target]) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name is {type(name).__name__}; wanted a str")
        if not Adapters.is_valid_name(name):
            raise ValueError(f"name is {name!r}; wanted a word without dots that no ModuleDict uses itself")
        for target in targets:
            if name in list_adapters(target.module):
                raise ValueError(
                    f"name is {name!r}, but layer {target.name!r} has an adapter of this name already"
                )

    def _attach(
        self, model: nn.Module, name: str, targets: list[Target], factors: list[Factors], freeze: bool
    ) -> None:
        self.model = model
        self.name = name
        self._targets = {target.name: target for target in targets}
        self._branches: dict[str, DeepFactors] = {}
        try:
            for target, tensors in zip(targets, factors, strict=True):
                self._branches[target.name] = attach(target, name, tensors)
            if freeze:
                _freeze(model)
        except BaseException:
            for target in targets:
                if name in list_adapters(target.module):
                    detach(target.module, name)
            _thaw(model)
            raise

    def _require_branches(self) -> dict[str, DeepFactors]:
        if not self._branches:
            raise RuntimeError(f"adapter {self.name!r} was removed")
        return self._branches

    def _get_branch(self, layer: str) -> DeepFactors:
        branches = self._require_branches()
        if layer not in branches:
            raise ValueError(f"layer is {layer!r}; wanted one of {', '.join(list(branches)[:12])}")
        return branches[layer]


def _freeze(model: nn.Module) -> None:
    """Turn off all gradients except those of adapters, and store the names of the parameters."""
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and f".{CHILD}." not in f".{name}"
    }
    setattr(model, _FROZEN, [*getattr(model, _FROZEN, []), *trained])
    for parameter in trained.values():
        parameter.requires_grad = False  # lazy parameters have no method requires_grad_


def _thaw(model: nn.Module) -> None:
    """Turn the gradients of frozen parameters on again, unless the model still has adapters."""
    if any(list_adapters(module) for module in model.modules()):
        return
    frozen = set(getattr(model, _FROZEN, []))
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad = True
    if hasattr(model, _FROZEN):
        delattr(model, _FROZEN)
