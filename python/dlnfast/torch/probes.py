# SPDX-License-Identifier: MIT
"""Linear probes: linear classifiers of the features of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from .._support.arrays import check_count, check_scale
from .._support.errors import DivergedError, ShapeError
from .statistics import ClassStatistics, check_labels, find_float64_device

#: Batches of features by layer, and labels, as `layer_outputs` yields them.
FeatureBatches = Iterable[tuple[Mapping[str, torch.Tensor], torch.Tensor]]


class _LinearProbes:
    """One linear classifier for each layer; subclasses fit them.

    Attributes
    ----------
    n_classes : int
        Number of classes K.
    weights : dict of str to Tensor, shape (K, d)
        Weights by layer, float64, for features without normalisation; empty before `fit`.
    intercepts : dict of str to Tensor, shape (K,)
        Intercepts by layer.
    """

    def __init__(self, n_classes: int) -> None:
        self.n_classes = check_count(n_classes, "n_classes", minimum=2)
        self.weights: dict[str, torch.Tensor] = {}
        self.intercepts: dict[str, torch.Tensor] = {}

    def _set_map(self, name: str, scaled: torch.Tensor, mean: torch.Tensor, intercept: torch.Tensor) -> None:
        """Set the map of a layer to ``(x - mean) scaled + intercept``, with `scaled` of shape (d, K)."""
        self.weights[name] = scaled.T.contiguous()
        self.intercepts[name] = intercept - mean @ scaled

    def scores(self, name: str, features: torch.Tensor) -> torch.Tensor:
        """Return the scores of all classes, float64; the largest is the prediction.

        Parameters
        ----------
        name : str
            Name of the layer.
        features : Tensor, shape (B, d)
            Features of B samples.

        Returns
        -------
        Tensor, shape (B, K)

        Raises
        ------
        ValueError
            For a layer without a fitted probe.
        ShapeError
            If d differs from the fitted features.
        """
        if name not in self.weights:
            raise ValueError(
                f"no probe was fitted to {name!r}; there are {', '.join(self.weights) or 'none'}"
            )
        weight = self.weights[name]
        if features.ndim != 2 or features.shape[1] != weight.shape[1]:
            raise ShapeError(
                f"features of {name!r} has shape {tuple(features.shape)}; wanted (B, {weight.shape[1]})"
            )
        rows = features.detach().to(weight.device).to(torch.float64)
        return rows @ weight.T + self.intercepts[name]

    def accuracy(self, batches: FeatureBatches) -> dict[str, float]:
        """Return the classification accuracy of each layer's probe, from one pass.

        Parameters
        ----------
        batches : iterable of (dict of str to Tensor (B, d), Tensor (B,))
            Features and labels as `layer_outputs` yields them, of all or some fitted layers.

        Returns
        -------
        dict of str to float
            Shares of correctly classified samples, in [0, 1], by layer.

        Raises
        ------
        ValueError, ShapeError
            For layers and feature sizes other than the fitted ones, and without any batch.
        """
        right: dict[str, int] = {}
        n_samples = 0
        for features, labels in batches:
            for name, rows in _check_features(features).items():
                check_labels(labels, len(rows))
                scores = self.scores(name, rows)
                hits = int((scores.argmax(dim=1) == labels.to(scores.device)).sum())
                right[name] = right.get(name, 0) + hits
            n_samples += len(labels)
        if n_samples == 0:
            raise ValueError("batches yields no samples")
        return {name: hits / n_samples for name, hits in right.items()}


class RidgeProbes(_LinearProbes):
    r"""Ridge regression of the one-hot labels on the features of each layer, with an intercept.

    Minimises :math:`\|X_c W - Y_c\|_F^2 + \lambda \|W\|_F^2` over the centred features X_c (N, d) and one-hot
    labels Y_c, with :math:`\lambda = \mathrm{ridge} \cdot \|X_c\|_F^2 / d`. This is relative to the mean
    eigenvalue of X_c^T X_c, so that one value of `ridge` suits layers of any scale.

    Parameters
    ----------
    n_classes : int
        Number of classes K; labels are 0 .. K - 1.
    ridge : float
        Regularisation strength, 0 or more. Default 1e-3. With 0 it is least squares, with the solution of
        least norm.
    standardise : bool
        Whether to divide each feature by its standard deviation first. Features that are constant in their
        own precision get weight zero. Default true.

    Attributes
    ----------
    n_classes : int
        Number of classes K.
    weights : dict of str to Tensor, shape (K, d)
        Weights by layer, float64, for features without normalisation; empty before `fit`.
    intercepts : dict of str to Tensor, shape (K,)
        Intercepts by layer.

    Raises
    ------
    TypeError, ValueError
        For settings out of their range.

    Notes
    -----
    The solution comes from a QR decomposition of the triangular factor in `ClassStatistics`, not from the
    normal equations, so the error grows with the condition number of the features, not with its square. For
    fewer samples than features the equivalent least-norm problem in the samples is solved. Cost: one pass,
    3 N (d + K)^2 flops, and about 4 d^3 for each layer.

    Examples
    --------
    >>> import torch
    >>> from dlnfast.torch import RidgeProbes
    >>> batch = {"one": torch.tensor([[0.0], [1.0], [4.0], [5.0]])}, torch.tensor([0, 0, 1, 1])
    >>> RidgeProbes(2).fit([batch]).accuracy([batch])
    {'one': 1.0}
    """

    def __init__(self, n_classes: int, *, ridge: float = 1e-3, standardise: bool = True) -> None:
        super().__init__(n_classes)
        self.ridge = check_scale(ridge, "ridge")
        self.standardise = bool(standardise)

    def fit(self, batches: FeatureBatches) -> Self:
        """Fit the probes in one pass over the batches.

        Parameters
        ----------
        batches : iterable of (dict of str to Tensor, Tensor)
            Features by layer, and labels, as `layer_outputs` yields them.

        Returns
        -------
        RidgeProbes
            The object itself.

        Raises
        ------
        ShapeError, TypeError, ValueError
            The errors of `ClassStatistics.update`, and without any batch.
        """
        return self.fit_statistics(gather_statistics(batches, self.n_classes))

    def fit_statistics(self, statistics: Mapping[str, ClassStatistics]) -> Self:
        """Fit the probes from statistics of the features.

        Parameters
        ----------
        statistics : mapping of str to ClassStatistics
            Statistics by layer.

        Returns
        -------
        RidgeProbes
            The object itself.

        Raises
        ------
        ValueError
            For statistics of another number of classes, without samples or without spectrum.
        """
        self.weights, self.intercepts = {}, {}
        for name, gathered in statistics.items():
            if gathered.n_classes != self.n_classes:
                raise ValueError(
                    f"statistics of {name!r} have n_classes {gathered.n_classes}; wanted {self.n_classes}"
                )
            inputs, outputs, mean, shares = gathered.regression()
            factors = torch.ones_like(mean)
            if self.standardise:
                spread = torch.linalg.vector_norm(inputs, dim=0)
                size = torch.sqrt(spread.square() + gathered.n_samples * mean.square())
                varies = spread > 10 * gathered.resolution() * size
                factors = torch.where(varies, math.sqrt(gathered.n_samples) / spread, 0.0)
            scaled = inputs * factors
            penalty = self.ridge * float(scaled.square().sum()) / gathered.dim
            solution = factors[:, None] * _solve_ridge(scaled, outputs, penalty)
            self._set_map(name, solution, mean, shares)
        return self


def gather_statistics(
    batches: FeatureBatches, n_classes: int, *, spectrum: bool = True
) -> dict[str, ClassStatistics]:
    """Compute the statistics of each layer in one pass over the batches.

    Raises
    ------
    ShapeError, TypeError, ValueError
        The errors of `ClassStatistics.update` with the name of the layer, and without any batch.
    """
    statistics: dict[str, ClassStatistics] = {}
    for features, labels in batches:
        for name, rows in _check_features(features).items():
            if name not in statistics and (rows.ndim != 2 or rows.shape[1] == 0):
                raise ShapeError(f"layer {name!r}: features has shape {tuple(rows.shape)}; wanted (B, d)")
            try:
                if name not in statistics:
                    statistics[name] = ClassStatistics(rows.shape[1], n_classes, spectrum=spectrum)
                statistics[name].update(rows, labels)
            except (ShapeError, TypeError, ValueError) as error:
                raise type(error)(f"layer {name!r}: {error}") from error
    if not statistics:
        raise ValueError("batches yields no samples")
    return statistics


def _check_features(features: object) -> Mapping[str, torch.Tensor]:
    if not isinstance(features, Mapping):
        raise TypeError(
            f"batches yields features of type {type(features).__name__}; wanted a dict of tensors by layer"
        )
    return features


def _solve_ridge(inputs: torch.Tensor, outputs: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return the W that minimises ||A W - B||^2 + penalty ||W||^2; for penalty 0 that of least norm."""
    rows, dim = inputs.shape
    solution: torch.Tensor
    if penalty == 0.0:
        # "gelsd" solves rank-deficient problems, and exists for the CPU only.
        solution = torch.linalg.lstsq(inputs.cpu(), outputs.cpu(), driver="gelsd").solution
        return solution.to(inputs.device)
    root = math.sqrt(penalty)
    if rows >= dim:
        below = torch.cat([root * torch.eye(dim).to(inputs), outputs.new_zeros((dim, outputs.shape[1]))], 1)
        triangle = torch.linalg.qr(torch.cat([torch.cat([inputs, outputs], 1), below]), mode="r").R
        solution = torch.linalg.solve_triangular(triangle[:dim, :dim], triangle[:dim, dim:], upper=True)
        return solution
    # W is the upper part of the least-norm solution of [A, root I] [W; V] = B.
    q, triangle = torch.linalg.qr(torch.cat([inputs.T, root * torch.eye(rows).to(inputs)]))
    solution = q[:dim] @ torch.linalg.solve_triangular(triangle.T, outputs, upper=False)
    return solution


@dataclass
class _ProbeState:
    """State of one classifier in training: normalised features times `weight`, plus `intercept`."""

    mean: torch.Tensor
    factors: torch.Tensor
    weight: torch.Tensor
    intercept: torch.Tensor
    weight_velocity: torch.Tensor
    intercept_velocity: torch.Tensor

    def normalise(self, features: torch.Tensor) -> torch.Tensor:
        return (features.to(self.weight) - self.mean.to(self.weight)) * self.factors.to(self.weight)


class SGDProbes(_LinearProbes):
    """Softmax regression on the features of each layer, by stochastic gradient descent with momentum.

    All layers are trained in the same passes. Features are centred and divided by the root of their mean
    squared length, so that one learning rate suits layers of any scale: the curvature of the loss is then at
    most 1/2, and full-batch descent is stable below ``4 (1 + momentum)``. The learning rate falls to zero
    along half a cosine, epoch by epoch. Weights start at zero, because the loss is convex.

    Parameters
    ----------
    n_classes : int
        Number of classes K; labels are 0 .. K - 1.
    epochs : int
        Passes over the data. Default 30.
    batch_size : int
        Samples of a step if `shuffle` is true. Default 128.
    learning_rate : float
        Learning rate of the first epoch. Default 1.
    momentum : float
        Momentum in [0, 1). Default 0.9.
    weight_decay : float
        Weight decay of the weights for normalised features. Default 0.
    standardise : bool
        Whether to divide each feature by its own standard deviation first. Default true.
    shuffle : bool
        Whether to store the features of all layers in memory and draw mini-batches from them, without
        repetition within an epoch. Otherwise `fit` takes one pass over the batches for the scales and one for
        each epoch, in the order of the batches, and stores one batch at a time. Default true.
    seed : int
        Seed of the order of the samples.

    Attributes
    ----------
    n_classes : int
        Number of classes K.
    weights : dict of str to Tensor, shape (K, d)
        Weights by layer, float64, for features without normalisation; empty before `fit`.
    intercepts : dict of str to Tensor, shape (K,)
        Intercepts by layer.

    Raises
    ------
    TypeError, ValueError
        For arguments out of their range.

    Notes
    -----
    Steps are computed in the precision of the features, float32 for half precisions. Cost: O(d K) for each
    sample, layer and epoch; with `shuffle` the memory of the features of all samples.
    """

    def __init__(
        self,
        n_classes: int,
        *,
        epochs: int = 30,
        batch_size: int = 128,
        learning_rate: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        standardise: bool = True,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(n_classes)
        self.epochs = check_count(epochs, "epochs")
        self.batch_size = check_count(batch_size, "batch_size")
        self.learning_rate = check_scale(learning_rate, "learning_rate", strict=True)
        self.momentum = check_scale(momentum, "momentum", below=1.0)
        self.weight_decay = check_scale(weight_decay, "weight_decay")
        self.standardise = bool(standardise)
        self.shuffle = bool(shuffle)
        self.seed = check_count(seed, "seed", minimum=0, maximum=2**63 - 1)

    def fit(self, batches: FeatureBatches) -> Self:
        """Train the probes on batches.

        Parameters
        ----------
        batches : iterable of (dict of str to Tensor, Tensor)
            Features by layer, and labels, as `layer_outputs` yields them.

        Returns
        -------
        SGDProbes
            The object itself.

        Raises
        ------
        TypeError
            For an iterator if `shuffle` is false, which needs several passes.
        ShapeError, ValueError
            For features and labels of wrong shapes, features that are not finite, and without any batch.
        DivergedError
            If the weights overflow because the learning rate is too large.
        """
        if not self.shuffle:
            check_repeatable(batches, "batches")
        self.weights, self.intercepts = {}, {}
        stored: dict[str, list[torch.Tensor]] = {}
        stored_labels: list[torch.Tensor] = []
        training = self._prepare(batches, stored, stored_labels)
        features: dict[str, torch.Tensor] = {}
        labels = torch.empty(0, dtype=torch.int64)
        if self.shuffle:
            # Layer by layer, so that at most one layer's features are in memory twice.
            features = {
                name: probe.normalise(torch.cat(stored.pop(name))) for name, probe in training.items()
            }
            labels = torch.cat(stored_labels)
        generator = torch.Generator().manual_seed(self.seed)
        step = 0
        for epoch in range(self.epochs):
            rate = self.learning_rate * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
            if self.shuffle:
                parts = self._draw_batches(features, labels, generator)
            else:
                parts = (
                    ({name: training[name].normalise(rows) for name, rows in part.items()}, which)
                    for part, which in batches
                )
            for part, which in parts:
                for name, rows in part.items():
                    self._step(training[name], rows, which.to(rows.device), rate)
                step += 1
        for number, (name, probe) in enumerate(training.items(), start=1):
            if not bool(torch.isfinite(probe.weight).all()):
                raise DivergedError(
                    f"the probe of {name!r} is not finite; lower learning_rate ({self.learning_rate:g})",
                    step=step,
                    layer=number,
                )
            scaled = probe.factors[:, None] * probe.weight.to(torch.float64)
            self._set_map(name, scaled, probe.mean, probe.intercept.to(torch.float64))
        return self

    def _draw_batches(
        self, features: Mapping[str, torch.Tensor], labels: torch.Tensor, generator: torch.Generator
    ) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yield the mini-batches of an epoch."""
        for rows in torch.split(torch.randperm(len(labels), generator=generator), self.batch_size):
            yield (
                {name: values[rows.to(values.device)] for name, values in features.items()},
                labels[rows.to(labels.device)],
            )

    def _step(self, probe: _ProbeState, rows: torch.Tensor, labels: torch.Tensor, rate: float) -> None:
        # The gradient of the mean cross-entropy is (softmax - one-hot) / B.
        errors = torch.softmax(rows @ probe.weight + probe.intercept, dim=1)
        errors[torch.arange(len(rows), device=rows.device), labels] -= 1
        errors /= len(rows)
        probe.weight_velocity.mul_(self.momentum).addmm_(rows.T, errors)
        if self.weight_decay:
            probe.weight_velocity.add_(probe.weight, alpha=self.weight_decay)
        probe.intercept_velocity.mul_(self.momentum).add_(errors.sum(dim=0))
        probe.weight.sub_(probe.weight_velocity, alpha=rate)
        probe.intercept.sub_(probe.intercept_velocity, alpha=rate)

    def _prepare(
        self,
        batches: FeatureBatches,
        stored: dict[str, list[torch.Tensor]],
        stored_labels: list[torch.Tensor],
    ) -> dict[str, _ProbeState]:
        """Return classifiers of weight zero with the features' scales; with `shuffle` store the batches."""
        moments: dict[str, _Moments] = {}
        for features, labels in batches:
            for name, rows in _check_features(features).items():
                try:
                    check_labels(labels, len(rows), self.n_classes)
                    moments.setdefault(name, _Moments(rows)).add(rows)
                except (ShapeError, TypeError, ValueError) as error:
                    raise type(error)(f"layer {name!r}: {error}") from error
                if self.shuffle:
                    stored.setdefault(name, []).append(rows.detach())
            if self.shuffle:
                stored_labels.append(labels)
        if not moments:
            raise ValueError("batches yields no samples")
        training = {}
        for name, moment in moments.items():
            mean, factors = moment.compute_normalisation(self.standardise)
            zeros = torch.zeros((len(mean), self.n_classes), dtype=moment.dtype, device=mean.device)
            start = (zeros.clone(), zeros[0].clone(), zeros.clone(), zeros[0].clone())
            training[name] = _ProbeState(mean, factors, *start)
        return training


class _Moments:
    """Mean and spread of each feature, merged batch by batch in float64."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        self._count = 0
        self._mean = torch.zeros(rows.shape[1:], dtype=torch.float64, device=find_float64_device(rows))
        self._scatter = torch.zeros_like(self._mean)

    def add(self, rows: torch.Tensor) -> None:
        if rows.ndim != 2 or rows.shape[1:] != self._mean.shape:
            raise ShapeError(f"features has shape {tuple(rows.shape)}; wanted (B, d), with one d for all")
        if len(rows) == 0:
            return
        values = rows.detach().to(self._mean.device).to(torch.float64)
        mean = values.mean(dim=0)
        scatter = (values - mean).square().sum(dim=0)
        if not bool(torch.isfinite(scatter).all()):
            raise ValueError("features has a value that is not finite, or whose square is not")
        total = self._count + len(rows)
        change = mean - self._mean
        self._scatter += scatter + change.square() * (self._count * len(rows) / total)
        self._mean += change * (len(rows) / total)
        self._count = total

    def compute_normalisation(self, standardise: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean, and factors by which the centred features get a mean squared length of 1."""
        spread = torch.sqrt(self._scatter / max(self._count, 1))
        varies = spread > 10 * torch.finfo(self.dtype).eps * torch.hypot(spread, self._mean)
        n_varying = max(int(varies.sum()), 1)
        if standardise:
            return self._mean, torch.where(varies, 1 / (spread * math.sqrt(n_varying)), 0.0)
        length = float(torch.linalg.vector_norm(spread))
        return self._mean, torch.full_like(spread, 1 / length if length else 0.0)


def check_repeatable(batches: Iterable[Any], name: str) -> None:
    """Raise TypeError for an iterator, which ends after one pass."""
    if iter(batches) is batches:
        raise TypeError(f"{name} is an iterator, which ends after one pass; wanted a list or a DataLoader")
