# SPDX-License-Identifier: MIT
"""Features of the layers of a model, batch by batch, and measures of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from .._support.arrays import check_choice, check_count
from .._support.errors import ShapeError
from ._names import unwrap_model
from ._running import Mode, call_model, disable_compilation, find_device, move_inputs, preserve_model
from .layers import PENULTIMATE, LayerChoice, select_modules
from .probes import RidgeProbes, SGDProbes, check_repeatable, gather_statistics
from .statistics import ClassGeometry, ClassStatistics, check_labels

Pool = Literal["flatten", "mean"] | Callable[[torch.Tensor], torch.Tensor]

#: Name of the model's input among the features.
INPUT = "input"


class LayerOutputs:
    """Iterable of features and labels, batch by batch, made by `layer_outputs`.

    Each loop is a pass over the batches.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        layers: LayerChoice,
        *,
        mode: Mode,
        device: torch.device | str | None,
        of: Literal["output", "input"],
        pool: Pool,
    ) -> None:
        check_choice(mode, "mode", ("eval", "train", "keep"))
        check_choice(of, "of", ("output", "input"))
        if not callable(pool):
            check_choice(pool, "pool", ("flatten", "mean"), also="a function of a tensor")
        self._takes_input, self._modules = _split_input_choice(model, layers)
        #: For "penultimate", until the model has run: candidate modules.
        self._candidates = (
            select_modules(model, None) if isinstance(layers, str) and layers == PENULTIMATE else {}
        )
        self._model, self._batches = model, batches
        self._mode: Mode = mode
        self._of, self._pool = of, pool
        self._device = find_device(model) if device is None else torch.device(device)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the features, in their order."""
        return (*((INPUT,) if self._takes_input else ()), *self._modules)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yield the features of each batch, (B, d) by name, and its labels, (B,)."""
        empty = True
        for inputs, labels in _iterate_pairs(self._batches):
            empty = False
            moved = move_inputs(inputs, self._device)
            features: dict[str, torch.Tensor] = {}
            if self._takes_input:
                features[INPUT] = self._to_rows(moved, INPUT)
            if self._candidates:
                with torch.no_grad(), preserve_model(self._model, self._mode):
                    self._modules = _find_penultimate(self._model, self._candidates, moved)
                self._candidates = {}
            if self._modules:
                with torch.no_grad(), preserve_model(self._model, self._mode):
                    features |= self._run_with_hooks(moved)
            for name, rows in features.items():
                if len(rows) != len(labels):
                    raise ShapeError(
                        f"layer {name!r} returns features of shape {tuple(rows.shape)} for {len(labels)} "
                        "labels; wanted one row per sample"
                    )
            yield features, labels.to(self._device)
        if empty:
            raise ValueError("batches is empty; an iterator yields its batches only once")

    def _run_with_hooks(self, inputs: Any) -> dict[str, torch.Tensor]:
        """Run the model, and return the features of its modules."""
        found: dict[str, torch.Tensor] = {}
        handles = []
        try:
            for name, module in self._modules.items():
                if self._of == "output":
                    handles.append(module.register_forward_hook(self._output_hook(found, name)))
                else:
                    hook = self._input_hook(found, name)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            with disable_compilation():
                call_model(self._model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        for name in self._modules:
            if name not in found:
                raise ValueError(
                    f"layers: {name!r} was not called when the model ran (a MultiheadAttention does not call "
                    "its out_proj: choose the attention itself)"
                )
        return {name: found[name] for name in self._modules}

    def _output_hook(self, found: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = self._to_rows(output, name)

        return hook

    def _input_hook(self, found: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            found[name] = self._to_rows((*inputs, *named.values()), name)

        return hook

    def _to_rows(self, value: Any, name: str) -> torch.Tensor:
        """Return the output or input of a layer as a matrix (B, d)."""
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        if not isinstance(first, torch.Tensor) or first.ndim == 0:
            raise TypeError(
                f"layer {name!r} returns {type(first).__name__}; wanted a tensor with one row per sample, or "
                "a tuple that starts with one"
            )
        rows = (
            self._pool(first.detach())
            if callable(self._pool)
            else _pool_positions(first.detach(), self._pool)
        )
        if rows.ndim != 2:
            raise ShapeError(f"layer {name!r}: pool returns shape {tuple(rows.shape)}; wanted (B, d)")
        # The next layer may change its input in place.
        return rows.clone()


def layer_outputs(
    model: nn.Module,
    batches: Iterable[Any],
    layers: LayerChoice = None,
    *,
    mode: Mode = "eval",
    device: torch.device | str | None = None,
    of: Literal["output", "input"] = "output",
    pool: Pool = "flatten",
) -> LayerOutputs:
    """Return the features of the chosen layers, batch by batch, without gradients.

    The model is restored after each batch: hooks, train or eval mode of each module, buffers, and the tensors
    and numbers among the modules' attributes. The random states of PyTorch, NumPy and Python are restored,
    too. A compiled model runs uncompiled, because compiled code does not call new hooks.

    Parameters
    ----------
    model : Module
        Model to run on the batches.
    batches : iterable of (inputs, labels)
        Samples and their classes, such as a DataLoader or a list. Inputs are a tensor (B, ..), or a tuple or
        dict with several arguments of the model. Labels are integers (B,).
    layers : str, regular expression, callable, sequence of them, or None
        Choice of layers as for `select_modules`. "input", alone or in a sequence, is the input of the model
        (unless a module has that name). None: all modules that own a weight matrix. "penultimate": the last
        but one of these in the order of the forward pass, which is found by running the first batch twice.
    mode : {"eval", "train", "keep"}
        Mode in which the model runs. "eval": batch normalisation uses its running statistics, dropout does
        nothing. "train": batch normalisation uses the statistics of each batch, and its running ones are
        restored; dropout is active. "keep": each module keeps its mode.
    device : device, optional
        Device to which the inputs are moved. Default: the device of the model's first parameter.
    of : {"output", "input"}
        Side of the layers on which features are read.
    pool : {"flatten", "mean"} or callable
        Reduction of a layer's output to (B, d). "flatten": all numbers of a sample. "mean": the mean over
        positions, which are all axes after the second of maps (B, channels, ..) with 4 axes or more, and the
        second axis of tokens (B, positions, d). A function gets the tensor and returns (B, d); use one for
        the (B, channels, positions) of a Conv1d.

    Returns
    -------
    LayerOutputs
        Iterable of ``(features, labels)``: a dict of tensors (B, d) by layer, in their own precision, and a
        tensor (B,). Each loop runs the model on all batches.

    Raises
    ------
    TypeError, ValueError
        For choices that `select_modules` refuses, and other arguments out of their range. In the loop: for
        batches that are no pairs, labels that are not integers, no batch at all, and a layer that was not
        called or returns no tensor.
    ShapeError
        In the loop, if features and labels differ in number.

    Notes
    -----
    If a module returns a tuple, its first entry is used. If a module is called several times, the last call
    counts. In mode "train", each batch meets the same random numbers. (A DataLoader that shuffles without a
    generator of its own draws from PyTorch's, at the start of each pass.)

    Cost: a forward pass, and memory for the features of one batch.

    Examples
    --------
    >>> import torch
    >>> from dlnfast.torch import layer_outputs
    >>> model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> batches = [(torch.zeros(3, 5), torch.tensor([0, 1, 1]))]
    >>> for features, labels in layer_outputs(model, batches, ["input", "1"]):
    ...     print({name: tuple(rows.shape) for name, rows in features.items()})
    {'input': (3, 5), '1': (3, 4)}
    """
    return LayerOutputs(model, batches, layers, mode=mode, device=device, of=of, pool=pool)


@dataclass(frozen=True)
class LayerMeasures:
    """Measures of the features of one layer, computed by `measure_layers`.

    Attributes
    ----------
    layer : str
        Name of the layer.
    dim : int
        Number of features d of a sample.
    n_samples : int
        Number of samples N in the training batches. All measures except `probe_test` use these samples.
    compression : float
        Within-class compression C_l; see `dlnfast.measures.feature_compression`.
    discrimination : float
        Between-class discrimination D_l; see `dlnfast.measures.feature_discrimination`.
    geometry : ClassGeometry
        Distance of the class means from a simplex.
    ranks : dict of str to int, or None
        Numerical ranks of the (N, d) features: "machine", "nuclear" and "threshold"; see
        `dlnfast.measures.numerical_rank`.
    probe_train, probe_test : float or None
        Accuracies of a linear probe on the training batches, to which it was fitted, and on the test batches.
    """

    layer: str
    dim: int
    n_samples: int
    compression: float
    discrimination: float
    geometry: ClassGeometry
    ranks: dict[str, int] | None
    probe_train: float | None
    probe_test: float | None


def measure_layers(
    model: nn.Module,
    batches: Iterable[Any],
    layers: LayerChoice = None,
    *,
    test_batches: Iterable[Any] | None = None,
    n_classes: int | None = None,
    mode: Mode = "eval",
    device: torch.device | str | None = None,
    of: Literal["output", "input"] = "output",
    pool: Pool = "flatten",
    ranks: bool = True,
    probe: Literal["ridge", "sgd"] | RidgeProbes | SGDProbes | None = "ridge",
) -> list[LayerMeasures]:
    """Return compression, discrimination, ranks and probe accuracy of the chosen layers.

    Parameters
    ----------
    model, batches, layers, mode, device, of, pool
        Arguments of `layer_outputs`. `batches` must allow several passes.
    test_batches : iterable of (inputs, labels), optional
        Samples for the test accuracy of the probes.
    n_classes : int, optional
        Number of classes; labels are 0 .. n_classes - 1. Default: the largest label of the training batches
        plus one, which takes one more pass over the batches, without the model.
    ranks : bool
        Whether to compute numerical ranks, from the singular values of the features.
    probe : {"ridge", "sgd"}, RidgeProbes, SGDProbes or None
        Linear classifier of the features. "ridge": `RidgeProbes` with default settings, fitted in the pass
        that gathers the statistics. "sgd": `SGDProbes` with default settings, which take one more pass and
        store the features of all layers in memory. None: no probes.

    Returns
    -------
    list of LayerMeasures
        One for each layer, in the order of registration; "input" first.

    Raises
    ------
    TypeError
        For batches that allow one pass only, and the errors of `layer_outputs`.
    ValueError, ShapeError
        The errors of `layer_outputs` and `ClassStatistics`, with the name of the layer: features that are not
        finite or the same for all samples, and a single class.

    Notes
    -----
    Cost: one pass of the model for the statistics and ridge probes, one for the accuracy on the training
    batches, one over the test batches. For each layer, time and memory of `ClassStatistics`, about 4 d^3
    flops for the singular values, and as many for a ridge probe.

    Examples
    --------
    >>> import torch
    >>> from dlnfast.torch import measure_layers
    >>> inputs = torch.tensor([[0.0, 1.0], [0.0, 3.0], [1.0, 0.0], [3.0, 0.0]])
    >>> found = measure_layers(torch.nn.Linear(2, 2), [(inputs, torch.tensor([0, 0, 1, 1]))], "input")
    >>> found[0].compression, found[0].discrimination, found[0].probe_train
    (0.5, 1.0, 1.0)
    """
    for name, value in (("batches", batches), ("test_batches", test_batches)):
        if value is not None:
            check_repeatable(value, name)
    outputs = layer_outputs(model, batches, layers, mode=mode, device=device, of=of, pool=pool)
    count = _count_classes(batches) if n_classes is None else check_count(n_classes, "n_classes", minimum=2)
    probes = _make_probes(probe, count)
    statistics = gather_statistics(outputs, count, spectrum=ranks or isinstance(probes, RidgeProbes))
    train: dict[str, float] = {}
    test: dict[str, float] = {}
    if probes is not None:
        if isinstance(probes, RidgeProbes):
            probes.fit_statistics(statistics)
        else:
            probes.fit(outputs)
        train = probes.accuracy(outputs)
        if test_batches is not None:
            test = probes.accuracy(
                layer_outputs(model, test_batches, layers, mode=mode, device=device, of=of, pool=pool)
            )
    return [
        _measure_layer(name, statistics[name], ranks, train.get(name), test.get(name))
        for name in outputs.names
    ]


def _measure_layer(
    name: str, statistics: ClassStatistics, ranks: bool, train: float | None, test: float | None
) -> LayerMeasures:
    try:
        return LayerMeasures(
            layer=name,
            dim=statistics.dim,
            n_samples=statistics.n_samples,
            compression=statistics.compression(),
            discrimination=statistics.discrimination(),
            geometry=statistics.geometry(),
            ranks=statistics.ranks() if ranks else None,
            probe_train=train,
            probe_test=test,
        )
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def _make_probes(probe: object, n_classes: int) -> RidgeProbes | SGDProbes | None:
    if probe == "ridge":
        return RidgeProbes(n_classes)
    if probe == "sgd":
        return SGDProbes(n_classes)
    if probe is not None and not isinstance(probe, (RidgeProbes, SGDProbes)):
        raise ValueError(f"probe is {probe!r}; wanted 'ridge', 'sgd', RidgeProbes, SGDProbes or None")
    if probe is not None and probe.n_classes != n_classes:
        raise ValueError(f"probe has n_classes {probe.n_classes}; wanted {n_classes}, as the labels have")
    return probe


def _count_classes(batches: Iterable[Any]) -> int:
    largest = max((int(labels.max()) for _, labels in _iterate_pairs(batches) if len(labels)), default=-1)
    if largest < 0:
        raise ValueError("batches is empty; wanted pairs (inputs, labels)")
    if largest < 1:
        raise ValueError(f"batches has labels up to {largest} only; wanted at least two classes")
    return largest + 1


def _iterate_pairs(batches: Iterable[Any]) -> Iterator[tuple[Any, torch.Tensor]]:
    """Yield the inputs and the checked labels of each batch."""
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise TypeError(f"batches yields {type(batch).__name__}{size}; wanted pairs (inputs, labels)")
        inputs, raw_labels = batch
        labels = torch.as_tensor(raw_labels)
        if labels.ndim != 1:
            raise ShapeError(f"labels has shape {tuple(labels.shape)}; wanted one per sample, (B,)")
        check_labels(labels, len(labels))
        yield inputs, labels.to(torch.int64)


def _split_input_choice(model: nn.Module, layers: LayerChoice) -> tuple[bool, dict[str, nn.Module]]:
    """Return whether "input" is among the layers, and the chosen modules."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; wanted a torch.nn.Module")
    listed = [layers] if isinstance(layers, str) else layers
    is_child = INPUT in dict(unwrap_model(model).named_children())
    if not isinstance(listed, (list, tuple)) or INPUT not in listed or is_child:
        return False, select_modules(model, layers)
    others = [choice for choice in listed if choice != INPUT]
    return True, select_modules(model, cast(LayerChoice, others)) if others else {}


def _find_penultimate(
    model: nn.Module, modules: Mapping[str, nn.Module], inputs: Any
) -> dict[str, nn.Module]:
    """Run the model, and return the last but one of `modules` in the order of their calls."""
    called: dict[str, nn.Module] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, *unused: Any) -> None:
            called.pop(name, None)  # the last call counts
            called[name] = module

        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        with disable_compilation():
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if len(called) < 2:
        raise ValueError(f"layers is 'penultimate', but the model calls {len(called)} modules with a weight")
    return dict([list(called.items())[-2]])


def _pool_positions(values: torch.Tensor, pool: str) -> torch.Tensor:
    if pool == "mean" and values.ndim > 3:
        return values.flatten(2).mean(dim=2)
    if pool == "mean" and values.ndim == 3:
        return values.mean(dim=1)
    return values.reshape(len(values), -1)
