# SPDX-License-Identifier: MIT
"""Class statistics and spectra of features, from one pass over them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .. import measures
from .._support.arrays import check_count
from .._support.errors import ShapeError
from .operators import get_numpy_dtype

#: Minimal number of rows that are collected before they are merged into the triangular factor.
_LEAST_ROWS = 1024


class ClassGeometry(NamedTuple):
    """Distance of the centred class means from a simplex: equal lengths, all cosines -1 / (K - 1)."""

    #: Standard deviation of the lengths relative to their mean.
    norm_variation: float
    #: Mean of ``|cos + 1 / (K - 1)|`` over all pairs of classes.
    mean_deviation: float
    #: Largest ``|cos + 1 / (K - 1)|``.
    largest_deviation: float


class ClassStatistics:
    r"""Class statistics and spectrum of labelled features, accumulated batch by batch in fixed memory.

    All sums are in float64, whatever the precision of the features.

    Parameters
    ----------
    dim : int
        Number of features d of a sample.
    n_classes : int
        Number of classes; labels are 0 .. n_classes - 1. Classes without samples are left out of all
        measures; K below is the number of the other classes.
    spectrum : bool
        Whether to store the data for singular values and ridge regression. Default true. Without it an update
        costs O(B d) time, and the memory is 2 n_classes d numbers.

    Attributes
    ----------
    dim, n_classes : int
        The parameters.
    n_samples : int
        Number of samples N so far.

    Raises
    ------
    TypeError, ValueError
        For counts that are no integers, or below 1.

    Notes
    -----
    Means and scatter are merged as in Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for
    computing sample variances" (1979), class by class, relative to the first sample of each class. The common
    part of a class cancels exactly, so that the scatter of collapsed classes is accurate, too.

    The spectrum is stored as the triangular factor R of [1, X, Y] = Q R, with Y the one-hot labels. New rows
    are merged by a QR decomposition. The singular values of R are those of the data to about eps64 sigma_1,
    because nothing is squared; X^T X would lose those below 1e-8 sigma_1. Cost: about 3 N (d + K)^2 flops,
    three times those of X^T X, and memory of 3 (d + K)^2 numbers.

    The statistics are on the device of the first features, or on the CPU if that device has no float64.
    """

    def __init__(self, dim: int, n_classes: int, *, spectrum: bool = True) -> None:
        self.dim = check_count(dim, "dim")
        self.n_classes = check_count(n_classes, "n_classes")
        self.n_samples = 0
        self._factor = _TriangularFactor(1 + self.dim + self.n_classes) if spectrum else None
        self._dtype: np.dtype[Any] | None = None
        self._device: torch.device | None = None

    def update(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Add samples.

        Parameters
        ----------
        features : Tensor, shape (B, d)
            Features, one row per sample.
        labels : Tensor of int, shape (B,)
            Classes of the samples.

        Raises
        ------
        ShapeError
            For features or labels of another shape.
        TypeError
            For labels that are not integers.
        ValueError
            For features that are not finite or have squares that overflow, and for a label that is no class.
        """
        features, labels = torch.as_tensor(features), torch.as_tensor(labels)
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ShapeError(f"features has shape {tuple(features.shape)}; wanted (B, {self.dim})")
        check_labels(labels, len(features), self.n_classes)
        if len(features) == 0:
            return
        if self._device is None:
            self._allocate(features)
        rows = features.detach().to(self._device).to(torch.float64)
        classes = labels.to(self._device, torch.int64)
        if not bool(torch.isfinite(rows.square().sum())):
            overflows = bool(torch.isfinite(rows).all())
            problem = "squares that overflow" if overflows else "a value that is not finite"
            raise ValueError(f"features has {problem}")
        members = torch.nn.functional.one_hot(classes, self.n_classes).to(torch.float64)
        self._add_moments(rows, classes, members)
        if self._factor is not None:
            self._factor.append(torch.cat([torch.ones_like(members[:, :1]), rows, members], dim=1))
        self.n_samples += len(rows)

    def _allocate(self, features: torch.Tensor) -> None:
        self._device = find_float64_device(features)
        self._dtype = get_numpy_dtype(features.dtype)
        shape = (self.n_classes, self.dim)
        #: The first sample of each class, and the mean of its samples relative to it.
        self._origins = torch.zeros(shape, dtype=torch.float64, device=self._device)
        self._shifts = torch.zeros_like(self._origins)
        self._counts = torch.zeros(self.n_classes, dtype=torch.float64, device=self._device)
        self._scatter = torch.zeros_like(self._counts)

    def _add_moments(self, rows: torch.Tensor, classes: torch.Tensor, members: torch.Tensor) -> None:
        counts = members.sum(dim=0)
        is_new = (self._counts == 0) & (counts > 0)
        if bool(is_new.any()):
            # argmax returns the first of equal entries, which is the first sample of each class.
            self._origins[is_new] = rows[members.argmax(dim=0)[is_new]]
        rows = rows - self._origins[classes]
        means = (members.T @ rows) / counts.clamp(min=1)[:, None]
        scatter = members.T @ (rows - means[classes]).square().sum(dim=1)
        total = (self._counts + counts).clamp(min=1)
        change = means - self._shifts
        self._scatter += scatter + self._counts * counts / total * change.square().sum(dim=1)
        self._shifts += change * (counts / total)[:, None]
        self._counts += counts

    def counts(self) -> npt.NDArray[np.int64]:
        """Return the number of samples of each class, shape (n_classes,)."""
        if self._device is None:
            return np.zeros(self.n_classes, dtype=np.int64)
        result: npt.NDArray[np.int64] = self._counts.cpu().numpy().astype(np.int64)
        return result

    def means(self) -> npt.NDArray[np.float64]:
        """Return the class means, shape (n_classes, d); zeros for classes without samples."""
        if self._device is None:
            return np.zeros((self.n_classes, self.dim))
        result: npt.NDArray[np.float64] = (self._origins + self._shifts).cpu().numpy()
        return result

    def compression(self) -> float:
        """Return C_l = tr Sigma_W / tr Sigma_B; see `dlnfast.measures.feature_compression`.

        Raises
        ------
        ValueError
            For a single class, and for features that are equal for all samples.
        """
        present = self._find_present_classes()
        # Subtract the mean of one class first, so that the common part of all means cancels exactly.
        centres = (self._origins[present] - self._origins[present][:1]) + (
            self._shifts[present] - self._shifts[present][:1]
        )
        weights = self._counts[present] / self.n_samples
        between = float((centres - weights @ centres).square().sum()) / len(present)
        within = float(self._scatter.sum()) / self.n_samples
        if between == 0.0:
            if within == 0.0:
                raise ValueError("features are the same for all samples: compression is 0 / 0")
            return float("inf")
        return within / between

    def discrimination(self) -> float:
        """Return D_l = 1 - max cos(mu_k, mu_k'); see `dlnfast.measures.feature_discrimination`.

        Raises
        ------
        ValueError
            For a single class, and for a class with mean zero.
        """
        present = self._find_present_classes().cpu().numpy()
        return measures.feature_discrimination(self.means()[present].T, present)

    def geometry(self) -> ClassGeometry:
        """Return the distance of the class means from a simplex around their own mean.

        Raises
        ------
        ValueError
            For a single class, and if a class mean equals the mean of all classes.

        Notes
        -----
        Papyan, Han, Donoho, "Prevalence of neural collapse during the terminal phase of deep learning
        training", PNAS 117 (2020): equinorm and equiangular class means. The means are centred at their
        unweighted mean, which equals the mean of all samples for classes of equal size.
        """
        present = self._find_present_classes().cpu().numpy()
        means = self.means()[present]
        means = means - means[:1]
        centred = means - means.mean(axis=0)
        lengths = np.linalg.norm(centred, axis=1)
        if not lengths.all():
            label = int(present[int(np.argmin(lengths))])
            raise ValueError(f"the mean of class {label} is that of all classes and has no direction")
        directions = centred / lengths[:, None]
        pairs = np.triu_indices(len(present), 1)
        deviations = np.abs((directions @ directions.T)[pairs] + 1 / (len(present) - 1))
        return ClassGeometry(
            norm_variation=float(np.std(lengths) / np.mean(lengths)),
            mean_deviation=float(np.mean(deviations)),
            largest_deviation=float(np.max(deviations)),
        )

    def singular_values(self) -> npt.NDArray[np.float64]:
        """Return the min(N, d) singular values of the (N, d) features without centring, descending.

        Raises
        ------
        ValueError
            Without samples, or if `spectrum` is false.
        """
        features = self._triangle()[:, 1 : 1 + self.dim]
        values: npt.NDArray[np.float64] = torch.linalg.svdvals(features).cpu().numpy()
        return values[: min(self.n_samples, self.dim)]

    def ranks(self) -> dict[str, int]:
        """Return the numerical ranks of the (N, d) features: "machine", "nuclear" and "threshold".

        Their definitions are in `dlnfast.measures.numerical_rank`; "machine" refers to the precision of the
        features, float32 for half precisions.

        Raises
        ------
        ValueError
            Without samples, or if `spectrum` is false.
        """
        values, shape = self.singular_values().astype(self._dtype), (self.n_samples, self.dim)
        return {
            "machine": measures.numerical_rank(values, "machine", shape=shape),
            "nuclear": measures.numerical_rank(values, "nuclear"),
            "threshold": measures.numerical_rank(values, "threshold"),
        }

    def regression(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the data for a linear regression of the one-hot labels Y on the features X.

        Returns
        -------
        inputs : Tensor, shape (r, d)
            Matrix A with A^T A = X_c^T X_c for centred features X_c; r is at most d + n_classes, and below N.
        outputs : Tensor, shape (r, n_classes)
            Matrix B with A^T B = X_c^T Y_c.
        mean : Tensor, shape (d,)
            Mean of the features.
        shares : Tensor, shape (n_classes,)
            Share of each class in the samples, the mean of Y.

        Raises
        ------
        ValueError
            Without samples, or if `spectrum` is false.
        """
        triangle = self._triangle()
        # The first row belongs to the column of ones. The rows below it are those of the centred data.
        means = triangle[0, 1:] / triangle[0, 0]
        inputs, outputs = triangle[1:, 1 : 1 + self.dim], triangle[1:, 1 + self.dim :]
        return inputs, outputs, means[: self.dim], means[self.dim :]

    def resolution(self) -> float:
        """Return the machine epsilon of the features' own precision."""
        return float(np.finfo(self._dtype or np.float64).eps)

    def _find_present_classes(self) -> torch.Tensor:
        """Return the indices of the classes with samples, at least two."""
        present = torch.arange(0) if self._device is None else torch.nonzero(self._counts)[:, 0]
        if len(present) < 2:
            raise ValueError(f"there are samples of {len(present)} classes; wanted at least two")
        return present

    def _triangle(self) -> torch.Tensor:
        if self._factor is None:
            raise ValueError(
                "spectrum is False: singular values and regressions need ClassStatistics with it"
            )
        if self.n_samples == 0:
            raise ValueError("there are no samples yet; wanted a call of update first")
        return self._factor.triangle()


class _TriangularFactor:
    """Factor R of the QR decomposition of all rows so far; rows that are not merged yet follow below R."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._rows: torch.Tensor | None = None
        self._filled = 0
        self._merged = 0

    def append(self, rows: torch.Tensor) -> None:
        """Add rows, float64."""
        if self._rows is None:
            # Space for twice as many new rows as R has: with fewer, merging R dominates; more waste memory.
            height = self._width + max(2 * self._width, _LEAST_ROWS)
            self._rows = rows.new_empty((height, self._width))
        while len(rows):
            if self._filled == len(self._rows):
                self._merge(self._rows)
            part = rows[: len(self._rows) - self._filled]
            self._rows[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            rows = rows[len(part) :]

    def triangle(self) -> torch.Tensor:
        """Return a view of R, whose number of rows is at most its width."""
        assert self._rows is not None
        if self._merged < self._filled:
            self._merge(self._rows)
        return self._rows[: self._filled]

    def _merge(self, rows: torch.Tensor) -> None:
        triangle = torch.linalg.qr(rows[: self._filled], mode="r").R
        self._filled = self._merged = len(triangle)
        rows[: self._filled] = triangle


def check_labels(labels: torch.Tensor, n_samples: int, n_classes: int | None = None) -> None:
    """Check that labels are one integer per sample, in 0 .. n_classes - 1 if `n_classes` is passed."""
    if labels.shape != (n_samples,):
        raise ShapeError(f"labels has shape {tuple(labels.shape)}; wanted one per sample, ({n_samples},)")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels has dtype {labels.dtype}; wanted integers")
    if n_classes is not None and n_samples:
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= n_classes:
            raise ValueError(f"labels are {lowest}..{highest}; wanted 0..{n_classes - 1}")


def find_float64_device(tensor: torch.Tensor) -> torch.device:
    """Return the device of a tensor, or the CPU if that device has no float64."""
    return tensor.device if tensor.device.type != "mps" else torch.device("cpu")
