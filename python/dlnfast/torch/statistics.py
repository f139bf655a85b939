# SPDX-License-Identifier: MIT
"""Class statistics and spectra of features, from one pass over them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .. import measures
from .._arrays import check_count
from .._errors import ShapeError
from .operators import get_numpy_dtype

#: Rows that are collected at least before they are merged into the factor.
_LEAST_ROWS = 1024


class ClassGeometry(NamedTuple):
    """How far the centred class means are from a simplex: equal lengths, all cosines -1 / (K - 1)."""

    #: Standard deviation of the lengths relative to their mean.
    norm_variation: float
    #: Mean of ``|cos + 1 / (K - 1)|`` over all pairs of classes.
    mean_deviation: float
    #: Largest ``|cos + 1 / (K - 1)|``.
    largest_deviation: float


class ClassStatistics:
    r"""Statistics of labelled features that are shown batch by batch; their memory does not grow.

    Everything is summed in float64, whatever the precision of the features.

    Parameters
    ----------
    dim : int
        d, features of a sample.
    n_classes : int
        Labels are 0 .. n_classes - 1. Classes without samples are left out of all measures; K below is the
        number of the others.
    spectrum : bool
        Keep what singular values and ridge regression need. Default true; without it an update costs O(B d)
        time, and memory is 2 n_classes d numbers.

    Attributes
    ----------
    dim, n_classes : int
    n_samples : int
        N, samples shown so far.

    Raises
    ------
    TypeError, ValueError
        For numbers that are none, or below 1.

    Notes
    -----
    Means and scatter are merged as in Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for
    computing sample variances" (1979), class by class, relative to the first sample of each class: what all
    its samples share cancels exactly, so that the scatter of collapsed classes is accurate, too.

    Of the features, the triangular factor R of [1, X, Y] = Q R is kept, with Y the one-hot labels, merged
    with new rows by a QR decomposition. Its singular values are those of the data to about eps64 sigma_1, as
    nothing is squared: X^T X would hide those below 1e-8 sigma_1. Cost: about 3 N (d + K)^2 operations, three
    times those of X^T X, and memory of 3 (d + K)^2 numbers.

    The device is that of the first features, or the CPU where that has no float64.
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
            One row per sample.
        labels : Tensor of int, shape (B,)

        Raises
        ------
        ShapeError
            If the shapes do not fit.
        TypeError
            For labels that are not integers.
        ValueError
            For features that are not finite or whose squares are not, and for a label that is no class.
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
        which = labels.to(self._device, torch.int64)
        if not bool(torch.isfinite(rows.square().sum())):
            what = (
                "squares that overflow" if bool(torch.isfinite(rows).all()) else "a value that is not finite"
            )
            raise ValueError(f"features has {what}")
        members = torch.nn.functional.one_hot(which, self.n_classes).to(torch.float64)
        self._add_moments(rows, which, members)
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

    def _add_moments(self, rows: torch.Tensor, which: torch.Tensor, members: torch.Tensor) -> None:
        counts = members.sum(dim=0)
        fresh = (self._counts == 0) & (counts > 0)
        if bool(fresh.any()):
            # Of equal ones, argmax returns the first: the first sample of each class.
            self._origins[fresh] = rows[members.argmax(dim=0)[fresh]]
        rows = rows - self._origins[which]
        means = (members.T @ rows) / counts.clamp(min=1)[:, None]
        scatter = members.T @ (rows - means[which]).square().sum(dim=1)
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
        """Return C_l = tr Sigma_W / tr Sigma_B; see `dlnfast.measures.compression`.

        Raises
        ------
        ValueError
            For a single class, and for features that do not vary at all.
        """
        present = self._find_present_classes()
        # Relative to those of one class, so that what all means share cancels first.
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
        """Return D_l = 1 - max cos(mu_k, mu_k'); see `dlnfast.measures.discrimination`.

        Raises
        ------
        ValueError
            For a single class, and for a class whose mean is zero.
        """
        present = self._find_present_classes().cpu().numpy()
        return measures.discrimination(self.means()[present].T, present)

    def geometry(self) -> ClassGeometry:
        """Return how far the class means are from a simplex around their own mean.

        Raises
        ------
        ValueError
            For a single class, and where a class mean lies at the mean of all of them.

        Notes
        -----
        Papyan, Han, Donoho, "Prevalence of neural collapse during the terminal phase of deep learning
        training", PNAS 117 (2020): equinorm and equiangular class means. The means are centred at their
        unweighted mean, which is that of all samples for classes of one size.
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
        """Return the singular values of the (N, d) features, not centred, descending: min(N, d) numbers.

        Raises
        ------
        ValueError
            Without samples, or where `spectrum` is false.
        """
        features = self._triangle()[:, 1 : 1 + self.dim]
        values: npt.NDArray[np.float64] = torch.linalg.svdvals(features).cpu().numpy()
        return values[: min(self.n_samples, self.dim)]

    def ranks(self) -> dict[str, int]:
        """Return the numerical ranks of the (N, d) features: "machine", "nuclear" and "threshold".

        The kinds and their levels are those of `dlnfast.measures.numerical_rank`; "machine" means the
        precision that the features came in, float32 for half ones.

        Raises
        ------
        ValueError
            Without samples, or where `spectrum` is false.
        """
        values, shape = self.singular_values().astype(self._dtype), (self.n_samples, self.dim)
        return {
            "machine": measures.numerical_rank(values, "machine", shape=shape),
            "nuclear": measures.numerical_rank(values, "nuclear"),
            "threshold": measures.numerical_rank(values, "threshold"),
        }

    def regression(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return all that a linear regression of the one-hot labels on the features needs.

        Returns
        -------
        inputs : Tensor, shape (r, d)
            A with A^T A = X_c^T X_c, the centred features; r is at most d + n_classes, and below N.
        outputs : Tensor, shape (r, n_classes)
            B with A^T B = X_c^T Y_c.
        mean : Tensor, shape (d,)
            Of the features.
        shares : Tensor, shape (n_classes,)
            Of the classes: the mean of Y.

        Raises
        ------
        ValueError
            Without samples, or where `spectrum` is false.
        """
        triangle = self._triangle()
        # The first row belongs to the column of ones: what is below it has been centred.
        means = triangle[0, 1:] / triangle[0, 0]
        inputs, outputs = triangle[1:, 1 : 1 + self.dim], triangle[1:, 1 + self.dim :]
        return inputs, outputs, means[: self.dim], means[self.dim :]

    def resolution(self) -> float:
        """Return the machine eps of the features as they came."""
        return float(np.finfo(self._dtype or np.float64).eps)

    def _find_present_classes(self) -> torch.Tensor:
        """Return the classes that have samples."""
        present = torch.arange(0) if self._device is None else torch.nonzero(self._counts)[:, 0]
        if len(present) < 2:
            raise ValueError(f"samples of {len(present)} classes were shown; wanted at least two")
        return present

    def _triangle(self) -> torch.Tensor:
        if self._factor is None:
            raise ValueError(
                "spectrum is False: singular values and regressions need ClassStatistics with it"
            )
        if self.n_samples == 0:
            raise ValueError("no samples were shown yet")
        return self._factor.triangle()


class _TriangularFactor:
    """R of the QR decomposition of all rows so far, and the rows that are not merged yet below it."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._rows: torch.Tensor | None = None
        self._filled = 0
        self._merged = 0

    def append(self, rows: torch.Tensor) -> None:
        """Add rows, float64."""
        if self._rows is None:
            # Twice as many new rows as R has: fewer would spend more on R, more would only take memory.
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
        """Return R, with as many rows as there are, at most its width; a view."""
        assert self._rows is not None
        if self._merged < self._filled:
            self._merge(self._rows)
        return self._rows[: self._filled]

    def _merge(self, rows: torch.Tensor) -> None:
        triangle = torch.linalg.qr(rows[: self._filled], mode="r").R
        self._filled = self._merged = len(triangle)
        rows[: self._filled] = triangle


def check_labels(labels: torch.Tensor, n_samples: int, n_classes: int | None = None) -> None:
    """Check that there is one integer per sample, in 0 .. n_classes - 1 where that is given."""
    if labels.shape != (n_samples,):
        raise ShapeError(f"labels has shape {tuple(labels.shape)}; wanted one per sample, ({n_samples},)")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels has dtype {labels.dtype}; wanted integers")
    if n_classes is not None and n_samples:
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= n_classes:
            raise ValueError(f"labels are {lowest}..{highest}; wanted 0..{n_classes - 1}")


def find_float64_device(tensor: torch.Tensor) -> torch.device:
    """Return the device of a tensor, or the CPU where that has no float64."""
    return tensor.device if tensor.device.type != "mps" else torch.device("cpu")
