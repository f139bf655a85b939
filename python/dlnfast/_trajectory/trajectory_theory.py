# SPDX-License-Identifier: MIT
"""`TheoryMethods`: the end-to-end matrix, balance, curvature and tangent kernel over the records."""

from __future__ import annotations

import logging
from typing import Protocol

import numpy as np

from .._problem.low_rank import LowRank, as_dense
from .._support.arrays import FloatArray, check_count, check_scale
from .hessian import hessian_eigenvalues
from .states import Run, Table
from .tangent_kernel import TrainKernel, find_kernel, join_kernels


class KnownProblem(Protocol):
    """The facts of a `Problem` that the methods read."""

    @property
    def loss_scale(self) -> float: ...

    @property
    def input_gram(self) -> FloatArray | None: ...

    @property
    def least_squares(self) -> FloatArray | LowRank: ...

    def target_factors(self) -> LowRank: ...


class TheoryRun(Run, Protocol):
    """A run with the problem that it descended on."""

    def _require_problem(self, method: str) -> KnownProblem:
        """Return the `Problem` of the run, or raise an error that names the method."""
        ...


class TheoryMethods:
    """Quantities of the theory over the records, from cores and scalars where the run is reduced.

    Every method answers for all records, in float64. Reduced runs need no whole layers, so the cost does not
    grow with the width. Dense runs need the weights at every record (``dlnfast.Record(weights_every=)``).
    """

    def end_to_end_singular_values(self: TheoryRun, k: int | None = None) -> Table:
        r"""Return the singular values of ``W_{L:1}`` at the records, descending, with multiplicities.

        .. math:: W_{L:1} = A_L C_{L:1} A_0^T + \sum_f \Big(\prod_l \rho_{f,l}\Big) D_f

        in a reduced run, with partial isometries D_f for the families that run through all layers.

        Parameters
        ----------
        k : int, optional
            Number of values; by default all min(d_L, d_0).

        Returns
        -------
        ndarray of float64, shape (n_records, k)

        Raises
        ------
        ValueError
            For a k out of range, and for a dense run without the weights of every record.

        Notes
        -----
        Cost: O(L r^3 + k) per record of a reduced run, O(L d^3) otherwise. For very wide networks set k.
        """
        n_all = min(self.widths[0], self.widths[-1])
        count = n_all if k is None else check_count(k, "k", maximum=n_all)
        return _stack(
            [each.end_to_end_singular_values(count) for each in self.states.decouple(self, with_inputs=False)]
        )

    def mode_strengths(self: TheoryRun) -> Table:
        r"""Return the strength :math:`u_i^T W_{L:1} v_i` of every mode of the target at the records.

        Returns
        -------
        ndarray of float64, shape (n_records, r)
            For the singular vectors u_i and v_i of Phi, in the order of descending sigma_i. For inputs that
            are not white, those of the least-squares solution ``Phi S^+``, which the network converges to.

        Raises
        ------
        ValueError
            Without a `Problem`, and for a dense run without the weights of every record.

        Notes
        -----
        For equal sigma_i only the sum of their strengths is defined. Cost: O(d r^2) once and O(L r^3) per
        record of a reduced run, O(L d^3) per record otherwise. `measures.mode_strengths` is the measure of
        one matrix. Saxe, McClelland, Ganguli, arXiv 1312.6120.
        """
        problem = self._require_problem("mode_strengths")
        factors = problem.target_factors()
        left: FloatArray = np.asarray(factors.U, np.float64)
        right: FloatArray = np.asarray(factors.V, np.float64)
        if problem.input_gram is not None:
            u, _, vt = np.linalg.svd(as_dense(problem.least_squares), full_matrices=False)
            left, right = u[:, : factors.rank], vt[: factors.rank].T
        left, right = self.states.project(left, right)
        found: list[Table] = []
        for network in self.states.decouple(self, with_inputs=False):
            product = network.chains[0].product(0, self.n_layers)
            found.append(np.sum(left * (product @ right), axis=1, dtype=np.float64))
        return _stack(found, len(left.T))

    def balancedness(self: TheoryRun) -> Table:
        r"""Return the imbalance of neighbouring layers, :math:`\|W_{l+1}^T W_{l+1} - W_l W_l^T\|_F`.

        Returns
        -------
        ndarray of float64, shape (n_records, L - 1)
            A column for each pair of layers (l, l + 1), l = 1 .. L-1.

        Raises
        ------
        ValueError
            For a dense run without the weights of every record.

        Notes
        -----
        In a reduced run the square is that of the cores plus
        :math:`m_f (\rho_{f,l+1}^2 - \rho_{f,l}^2)^2` for every family f of multiplicity m_f, with 0 for a
        layer that the family does not run through. Cost: O(L r^3) per record, O(L d^3) for dense runs.
        Gradient flow without weight decay conserves each difference. `measures.balancedness` is the measure
        of one list of layers.
        """
        return _stack(
            [network.balancedness() for network in self.states.decouple(self, with_inputs=False)],
            self.n_layers - 1,
        )

    def sharpness(self: TheoryRun, k: int = 1, *, tolerance: float = 1e-10) -> Table:
        r"""Return the k largest eigenvalues of the Hessian of the loss at the records.

        The Hessian is that with respect to all entries of all layers, of the loss without weight decay.
        Gradient descent is stable around a minimum only if its largest eigenvalue is below 2 / eta.

        Parameters
        ----------
        k : int
            Number of eigenvalues.
        tolerance : float
            Error of eigenvalues that are found by Lanczos iteration, relative to the largest magnitude.

        Returns
        -------
        ndarray of float64, shape (n_records, k)
            Descending, with multiplicities.

        Raises
        ------
        ValueError
            Without a `Problem`, for a k out of range, for a dense run without the weights of every record,
            and if the iteration does not reach the tolerance.

        Notes
        -----
        In a reduced run the Hessian is an orthogonal sum of blocks: the Hessian of the cores, one block of at
        most ``2 L a`` unknowns for every family with its multiplicity, and blocks of at most ``2 L`` unknowns
        for pairs of families; see the page on theory. The result is exact to rounding, except for more than
        256 unknowns in the cores, whose Hessian is iterated on. Cost: O(L^3 a^3) per record and family.

        Dense runs, and reduced ones with inputs that are not white and families that do not run through all
        layers, need whole layers: Lanczos iteration on exact Hessian-vector products, O(L d^3) each. The
        logger "dlnfast" says which of both was used.
        """
        problem = self._require_problem("sharpness")
        n_weights = sum(rows * columns for rows, columns in self.shapes)
        count = check_count(k, "k", maximum=n_weights)
        limit = check_scale(tolerance, "tolerance", strict=True)
        found: list[Table] = []
        for network in self.states.decouple(self, with_inputs=True):
            if not found:
                source = "whole layers" if network.is_whole else "cores and scalars"
                logging.getLogger("dlnfast").info("the sharpness is computed from %s", source)
            found.append(hessian_eigenvalues(network, problem.loss_scale, count, limit))
        return _stack(found, count)

    def train_kernel(self: TheoryRun, k: int = 1, *, tolerance: float = 1e-10) -> TrainKernel:
        r"""Return the neural tangent kernel over the training outputs at the records, as factors.

        .. math:: K = \sum_l P_l \otimes X^T Q_l X, \qquad
            P_l = W_{L:l+1} W_{L:l+1}^T, \quad Q_l = W_{l-1:1}^T W_{l-1:1} .

        Under gradient flow the outputs f move by :math:`\dot f = -c K (f - Y)`. For white inputs the
        end-to-end matrix moves by :math:`\dot W = -c \sum_l P_l (W - \Phi) Q_l`, and the eigenvalues of K are
        those of this map. Use `neural_tangent_kernel` for one record without the data: to apply the kernel,
        to evaluate it on other samples, or for the angle between two kernels.

        Parameters
        ----------
        k : int
            Number of eigenvalues, at most d_L d_0.
        tolerance : float
            Error of eigenvalues that are found by iteration, relative to the largest.

        Returns
        -------
        TrainKernel
            Named tuple of the factors ``left`` (P_l) and ``right`` (Q_l), the largest ``eigenvalues`` and the
            ``trace``. Reduced runs have the factors in the bases A_L and A_0, and scalars outside.

        Raises
        ------
        ValueError
            As `sharpness`.

        Notes
        -----
        No array has as many entries as K, whose size is d_L N. Eigenvalues and trace contain S = X X^T, the
        factors do not. Cost: O(L a^3) per record, and the eigenvalues of a block of size a_L a_0: all of them
        up to 256, otherwise by Lanczos iteration. Jacot, Gabriel, Hongler, arXiv 1806.07572.
        """
        self._require_problem("train_kernel")
        count = check_count(k, "k", maximum=self.widths[0] * self.widths[-1])
        limit = check_scale(tolerance, "tolerance", strict=True)
        parts = [
            find_kernel(network, count, limit) for network in self.states.decouple(self, with_inputs=True)
        ]
        if not parts:
            raise ValueError("the run has recorded nothing yet")
        return join_kernels(parts)


def _stack(parts: list[Table], n_columns: int = 0) -> Table:
    return np.concatenate(parts) if parts else np.zeros((0, n_columns))
