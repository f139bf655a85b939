# SPDX-License-Identifier: MIT
"""`SufficientStatistics`: sums over batches of samples, on one machine or on several, for a `Problem`."""

from __future__ import annotations

import os
from typing import Final, Self

from .._support.arrays import check_path
from .._support.files import Arrays, read_whole, translate_read_errors, write_whole
from .problem import Problem, check_settings
from .sums import DataSums

_FORMAT: Final = "dlnfast statistics"
_FORMAT_VERSION: Final = 1


class SufficientStatistics(DataSums):
    """Sufficient statistics of a `Problem`, summed over batches.

    They are ``S = X X^T``, ``Phi = Y X^T`` and ``||Y||_F^2``, and, for centring, the number of samples N and
    the sums of X and Y. `add` adds a batch, which is not stored; `merge` adds the sums of another process.
    Memory does not grow with the number of samples.

    Parameters
    ----------
    layout : {"columns", "rows"}
        Layout of the batches, as in `Problem.from_data`.

    Attributes
    ----------
    n_samples : int
        N so far.
    layout : {"columns", "rows"}
        Layout of the batches.

    Raises
    ------
    ValueError, TypeError
        If `layout` is not one of these.

    Notes
    -----
    **Accuracy.** All sums are pairs of float64 numbers, value and correction. Products are split so that
    their leading part is exact, and added with an error-free transformation. The error of S_ij is near
    1e-22 N max|x_i| max|x_j|; those of Phi and ||Y||^2 are similar. Conversion to float64 rounds once. The
    order and the sizes of batches, and the order of merges, change the sums by no more than these errors.
    Sums of integers of up to 21 bits (images) are exact as long as they are below 2^53.

    With S in float64, whitening has an error near cond(S) eps: 3e-8 and 8e-7 for real data with cond(S) =
    1e10 and 9e10. Here ``T S T^T - I`` is computed from the pairs and corrected for, as `Problem.from_data`
    does in a second pass over the data: 5e-12 and 1e-11, or sqrt(cond(S)) eps. The default tolerance and the
    rank are those of `from_data`; `Whitening.error` is computed from the sums. Phi agrees with that of
    `from_data` to 3e-12 and 9e-12 times ||Y||. Centring subtracts N m m^T from S, which is accurate up to a
    mean of about 6e4 standard deviations; beyond that, `problem` raises.

    **Cost.** About 4 times the products of a plain sum for real data, which is less than the passes of
    `from_data` with whitening; the same as a plain sum for integers. Each batch also costs O(d_x^2), whatever
    its size: concatenate tiny batches. Memory: about 6 arrays of the sizes of S, of Phi and of a chunk of at
    most 2048 samples and 32 MB.

    Examples
    --------
    Two halves of a data set, summed separately:

    >>> import numpy as np
    >>> from dlnfast import SufficientStatistics
    >>> X, labels = np.random.default_rng(0).standard_normal((4, 60)), np.arange(60) % 3
    >>> left = SufficientStatistics().add(X[:, :25], labels[:25])
    >>> right = SufficientStatistics().add(X[:, 25:], labels[25:])
    >>> both = left + right
    >>> both
    SufficientStatistics(4 -> 3, 60 samples, layout='columns')
    >>> both.problem(whiten="zca").whitened
    True
    """

    def problem(
        self,
        *,
        whiten: str | None = None,
        center: bool = False,
        reduction: str = "mean",
        rank_tolerance: float | None = None,
    ) -> Problem:
        """Return the `Problem` of the samples so far; later batches do not change it.

        Parameters
        ----------
        whiten, center, reduction, rank_tolerance
            Same meaning as in `Problem.from_data`, applied to the sums: S becomes T (S - N m m^T) T^T.

        Returns
        -------
        Problem
            A problem without `inputs`, `outputs` and `labels`; its `transform` accepts new inputs.

        Raises
        ------
        ValueError
            If a setting is unknown, there are no samples, X = 0 is to be whitened, `rank_tolerance` keeps
            rounding noise, or the mean of X is so large that the sums do not resolve the spread of X.

        Notes
        -----
        Cost: O(d_x^3).
        """
        check_settings(whiten, center, reduction, rank_tolerance)
        return Problem._from_sums(self, whiten, center, reduction, rank_tolerance)

    def __repr__(self) -> str:
        """Return the dimensions, the number of samples and the layout."""
        sizes = f"{self.dim_in} -> {self.dim_out}, " if self._sums else ""
        return f"SufficientStatistics({sizes}{self.n_samples} samples, layout={self.layout!r})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sums with their corrections to an .npz file without pickle, atomically.

        Parameters
        ----------
        path : path
            Path of the file.

        Raises
        ------
        FileNotFoundError
            If the folder does not exist.
        """
        arrays: Arrays = {}
        for name, sums in self._sums.items():
            arrays[name] = sums.value
            if sums.correction is not None:
                arrays[f"{name}_correction"] = sums.correction
        if self._classes is not None:
            arrays["classes"] = self._classes
        metadata = {
            "layout": self.layout,
            "n_samples": self.n_samples,
            "labelled": self._has_labels,
        }
        write_whole(check_path(path, "path"), _FORMAT, _FORMAT_VERSION, metadata, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file of `save`.

        Parameters
        ----------
        path : path
            Path of the file.

        Returns
        -------
        SufficientStatistics

        Raises
        ------
        FileNotFoundError
            If the file does not exist.
        ValueError
            If the file is of another kind, is damaged, or was written by a newer version.
        """
        source = check_path(path, "path")
        meta, arrays = read_whole(source, _FORMAT, _FORMAT_VERSION)
        with translate_read_errors(source, _FORMAT):
            return cls._unpack(meta, arrays)
