# SPDX-License-Identifier: MIT
"""Sufficient statistics of data that come in batches, on one machine or on many."""

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
    """Sums over samples that a `Problem` is made from: ``S = X X^T``, ``Phi = Y X^T``, ``||Y||_F^2``.

    Beside them N and the sums of X and Y, for centring. Batches are added and dropped; sums made elsewhere
    are merged. Nothing grows with the number of samples.

    Parameters
    ----------
    layout : {"columns", "rows"}
        Of the batches, as in `Problem.from_data`.

    Attributes
    ----------
    n_samples : int
        N so far.
    layout : {"columns", "rows"}

    Raises
    ------
    ValueError, TypeError
        For settings that are not among those named.

    Notes
    -----
    **Accuracy.** All sums are pairs of float64 numbers, value and correction. Products are split so that
    their leading part is exact, and added with an error-free transformation. S_ij is that
    of the data as given to about 1e-22 N max|x_i| max|x_j|, Phi and ||Y||^2 likewise; read as float64 they
    are rounded once. The order of batches, their sizes and the way they are merged show in no more than
    that. Sums of integers of up to 21 bits (images) are exact as long as they stay below 2^53.

    An S in float64 whitens to about cond(S) eps: 3e-8 and 8e-7 for real data with cond(S) = 1e10 and 9e10.
    Here ``T S T^T - I`` is evaluated from the pairs and corrected for, as `Problem.from_data` does with a
    second pass over the data: 5e-12 and 1e-11. Both whiten to about sqrt(cond(S)) eps and find the same rank,
    with the same default tolerance; `Whitening.error` is measured on S as it is held. Phi agrees with that of
    `from_data` to 3e-12 and 9e-12 of ||Y||. Centring subtracts N m m^T from S, which is harmless up to a mean
    of some 6e4 standard deviations; beyond, `problem` raises.

    **Cost.** For real data about 4 times the products of a plain sum, less than the passes with which
    `from_data` whitens; for integers once. A batch also costs O(d_x^2) whatever its size: join tiny ones.
    Memory: some 6 arrays of the size of S and of Phi, and of a chunk of at most 2048 samples and 32 MB.

    Examples
    --------
    Two halves of a data set, summed apart:

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
            As in `Problem.from_data`, applied to the sums: S becomes T (S - N m m^T) T^T.

        Returns
        -------
        Problem
            Without `inputs`, `outputs` and `labels`; its `transform` takes new inputs as ever.

        Raises
        ------
        ValueError
            For unknown settings, no samples, X = 0 where it is to be whitened, a `rank_tolerance` that keeps
            noise, or a mean so far beyond the spread of X that the sums do not resolve the latter.

        Notes
        -----
        O(d_x^3).
        """
        check_settings(whiten, center, reduction, rank_tolerance)
        return Problem._from_sums(self, whiten, center, reduction, rank_tolerance)

    def __repr__(self) -> str:
        """Return the dimensions, the number of samples and the layout."""
        sizes = f"{self.dim_in} -> {self.dim_out}, " if self._sums else ""
        return f"SufficientStatistics({sizes}{self.n_samples} samples, layout={self.layout!r})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything, corrections included, as an .npz file without pickle, whole or not at all.

        Parameters
        ----------
        path : path
            Of the file.

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
        about = {
            "layout": self.layout,
            "n_samples": self.n_samples,
            "labelled": self._labelled,
        }
        write_whole(check_path(path, "path"), _FORMAT, _FORMAT_VERSION, about, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Parameters
        ----------
        path : path
            Of the file.

        Returns
        -------
        SufficientStatistics

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is not one of these, is damaged, or was written by a newer version.
        """
        place = check_path(path, "path")
        meta, arrays = read_whole(place, _FORMAT, _FORMAT_VERSION)
        with translate_read_errors(place, _FORMAT):
            return cls._unpack(meta, arrays)
