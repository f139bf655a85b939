# SPDX-License-Identifier: MIT
"""`TrajectoryBase`: steps, losses and settings of a run, and the spectra of its layers, from `States`."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .._closure.certificate import Certificate
from .._closure.family import Family
from .._noise import edge as noise
from .._problem.kinds import AnyProblem
from .._problem.observations import Observations
from .._problem.problem import Problem
from .._problem.samples import SampleProblem
from .._support.arrays import FloatArray, IntArray, check_choice, check_count
from .states import States, Table, find_record
from .truncated_spectra import measure_energy_share


class TrajectoryBase(ABC):
    """Steps, losses and settings of a run, and singular values, vectors and angles of its layers.

    The base class of `Trajectory`, which documents the attributes.
    """

    def __init__(
        self,
        *,
        steps: IntArray,
        loss: Table,
        states: States,
        certificate: Certificate,
        problem: AnyProblem | None,
        config: Mapping[str, Any],
        wall_time: float,
        rates: Table | None = None,
        loss_steps: IntArray | None = None,
        times: Table | None = None,
    ) -> None:
        self.steps = steps
        self.loss = loss
        self.loss_steps = np.arange(len(loss), dtype=np.int64) if loss_steps is None else loss_steps
        self.states = states
        self.certificate = certificate
        self.problem = problem
        self.config = dict(config)
        self.wall_time = wall_time
        self.rates = rates
        self.times = times

    @property
    def engine(self) -> str:
        """The engine that ran."""
        return self.certificate.engine

    @property
    def outcome(self) -> str | None:
        """Outcome of the run; None for a tracked model, which another program trains.

        "finished" (all steps), "converged" (the tolerance was reached), "stopped" (by a callback),
        "diverged", "interrupted" (by an exception, Ctrl-C for example), or "unfinished" (a checkpointed run
        that was loaded before its end).
        """
        found: str | None = self.config.get("outcome")
        return found

    @property
    def widths(self) -> list[int]:
        """d_0, .., d_L."""
        if "widths" not in self.config:
            raise ValueError("the layers of a tracked model are no chain and have no widths: run.shapes")
        return list(self.config["widths"])

    @cached_property  # read for each layer of a loop over layers
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of each layer's matrix."""
        if "shapes" in self.config:
            return [(int(rows), int(columns)) for rows, columns in self.config["shapes"]]
        return [(rows, columns) for columns, rows in itertools.pairwise(self.widths)]

    @property
    def has_named_layers(self) -> bool:
        """Whether the layers have names of their own, from the model."""
        return "layers" in self.config

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers in the model, or W_1 .. W_L."""
        named: list[str] | None = self.config.get("layers")
        return list(named) if named is not None else [f"W_{i + 1}" for i in range(self.n_layers)]

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.shapes)

    @property
    def rank(self) -> int:
        """Numerical rank r of the target."""
        if self.problem is None:
            raise ValueError(self.states.missing_problem)
        if isinstance(self.problem, Observations):
            raise ValueError("the rank of a matrix that is known in part is not known")
        if isinstance(self.problem, SampleProblem):
            raise ValueError("a SampleProblem has no target matrix, and no rank")
        return self.problem.target_factors().rank

    @property
    def is_rank_known(self) -> bool:
        """Whether the run has a target, whose `rank` is known."""
        return isinstance(self.problem, Problem)

    @property
    def is_tracked(self) -> bool:
        """Whether another program trained, and only singular values were followed."""
        return self.engine == "tracked"

    @property
    def _gram_eigen(self) -> tuple[FloatArray, FloatArray] | None:
        return None if self.problem is None else self.problem.gram_eigen

    @property
    @abstractmethod
    def _inputs_and_target(self) -> tuple[FloatArray, FloatArray | None, FloatArray] | None: ...

    @abstractmethod
    def _gradients(self, weights: Sequence[FloatArray]) -> list[FloatArray]: ...

    def __repr__(self) -> str:
        """Return the engine, the sizes and the extent of the run."""
        return f"{type(self).__name__}({self.states.describe(self)})"

    # ------------------------------------------------------------------------------ singular values

    def singular_values(self, layer: int | str) -> FloatArray:
        """Return the singular values of W_l at the records, descending, with their multiplicities.

        Parameters
        ----------
        layer : int or str
            1 .. L, or the name of a layer.

        Returns
        -------
        ndarray, shape (n_records, k)
            k is the number that `train` was asked for, at most min(d_l, d_{l-1}).

        Raises
        ------
        ValueError
            For a layer out of range, or if none were recorded.

        Notes
        -----
        Reduced engine: O(n_records (r^3 + d)); for very wide layers prefer `active_singular_values` and
        `rho`, whose size does not grow with d.
        """
        return self.states.singular_values(self._index(layer), self)

    def singular_value_errors(self, layer: int | str) -> Table:
        """Return bounds on the errors of the recorded singular values of W_l.

        Parameters
        ----------
        layer : int or str
            1 .. L, or the name of a layer.

        Returns
        -------
        ndarray, shape (n_records, k)
            ``|sigma_i - values_i| <= errors_i``, in the order of `singular_values`. Reduced engine: the
            rounding errors of the decomposition of the core.

        Raises
        ------
        ValueError
            For a layer out of range, or if no singular values were recorded.
        """
        return self.states.singular_value_errors(self._index(layer), self)

    def branches(self, layer: int | str) -> IntArray:
        """Return the identity of each singular value of W_l at each record.

        Sorted values exchange positions where they cross; a branch keeps its number. It is followed from
        record to record by the overlaps ``|<u_i, u'_j>| |<v_i, v'_j>|`` of the singular vectors.

        Parameters
        ----------
        layer : int or str
            1 .. L, or the name of a layer.

        Returns
        -------
        ndarray of int64, shape (n_records, k)
            In the order of `singular_values`; of `active_singular_values` for the reduced engine, whose other
            values share one scalar. -1 where the vectors were not followed: the dense engine follows them
            with ``singular_values=k`` or ``vectors=True``.

        Raises
        ------
        ValueError
            For a layer out of range, or if no singular values were recorded.
        """
        return self.states.branches(self._index(layer))

    def clusters(self, layer: int | str) -> IntArray:
        """Return the cluster of each singular value of W_l at each record.

        The values of one cluster cannot be distinguished: the gaps between them are below four times their
        errors, or 1e-8 of the largest value. Only the subspace that their vectors span is determined.

        Parameters
        ----------
        layer : int or str
            1 .. L, or the name of a layer.

        Returns
        -------
        ndarray of int64, shape (n_records, k)
            Numbers of the clusters, 0 for the largest values, in the order of `branches`.

        Raises
        ------
        ValueError
            For a layer out of range, or if no singular values were recorded.
        """
        return self.states.clusters(self._index(layer))

    def branch_values(self, layer: int | str) -> Table:
        """Return the singular values of W_l by branch instead of by size.

        Parameters
        ----------
        layer : int or str
            1 .. L, or the name of a layer.

        Returns
        -------
        ndarray, shape (n_records, n_branches)
            Column b is branch b of `branches`; NaN at records that do not hold it.

        Raises
        ------
        ValueError
            For a layer out of range, or if branches were not followed.
        """
        ids = self.branches(layer)
        if ids.size and ids.min() < 0:
            raise ValueError(
                "branches were not followed: train(..., singular_values=k), or vectors=True with all of them"
            )
        values = self.states.followed_values(self._index(layer), self)
        result = np.full((len(ids), int(ids.max(initial=-1)) + 1), np.nan)
        np.put_along_axis(result, ids, values.astype(np.float64), axis=1)
        return result

    def tracking(self, layer: int | str) -> dict[str, npt.NDArray[Any]]:
        """Return how the singular values of W_l were computed at each record.

        Parameters
        ----------
        layer : int or str
            1 .. L, or the name of a layer.

        Returns
        -------
        dict of ndarray, shape (n_records,)
            ``tier`` ("reduced", "factored", "dense", "full"), ``completeness`` ("rigorous",
            "probabilistic", "none"), ``refreshed``, and the numbers that `TrackerRecord` explains: ``norm``,
            ``tail``, ``drift``, ``vector_error``, ``truncated``, ``orthogonality``, ``overlap``, ``rho``,
            ``rho_spread``, ``multiplicity``, ``seconds``. Reduced engine: the first three.

        Raises
        ------
        ValueError
            For a layer out of range, or if no singular values were recorded.
        """
        return self.states.tracking_of(self._index(layer), self)

    def energy_share(self, layer: int | str, k: int | None = None) -> Table:
        r"""Return the share of ``||W_l||_F^2`` in the k largest singular values at the records.

        For a matrix with independent entries it is about ``4 k / n``; a share far above that shows a small
        subspace. For the change of a tracked model, ``tracked.trajectory(of="change")``, it shows whether
        training changed the weight in few directions.

        Parameters
        ----------
        layer : int or str
            1 .. L, or the name of a layer.
        k : int, optional
            Number of values; by default all that were recorded.

        Returns
        -------
        ndarray, shape (n_records,)
            In [0, 1]; 0 for a matrix of zeros.

        Raises
        ------
        ValueError
            For a layer out of range, if fewer than k were recorded, and where the norm is not known.
        """
        values = self.singular_values(layer).astype(np.float64)
        count = values.shape[1] if k is None else check_count(k, "k", maximum=values.shape[1])
        return measure_energy_share(values, count, self._norms(layer))

    def _norms(self, layer: int | str) -> Table | None:
        """Return the Frobenius norms of W_l at the records; None if all singular values were recorded."""
        index = self._index(layer)
        if self.singular_values(layer).shape[1] == min(self.shapes[index]):
            return None
        norm: Table | None = self.tracking(layer).get("norm")
        if norm is None or np.isnan(norm).any():
            raise ValueError("the norm of the layer was not recorded: wanted all its singular values")
        return norm

    def noise_variance(self, layer: int | str) -> Table:
        r"""Return estimates of the variance of the entries of the noise in W_l at the records.

        Parameters
        ----------
        layer : int or str
            1 .. L, or the name of a layer.

        Returns
        -------
        ndarray, shape (n_records,)
            `measures.noise_variance` of the recorded singular values, with the norm if these are not all.

        Raises
        ------
        ValueError
            For a layer out of range, and where the norm is not known.

        Notes
        -----
        If all recorded values are beyond the edge of the noise, there may be more: then the estimate is an
        upper bound. For the noise of a training, look at the change of the weights,
        ``tracked.trajectory(of="change")``. Cost: O(n_records k).
        """
        return np.array(
            [
                noise.noise_variance(values, shape=self.shapes[self._index(layer)], norm=norm)
                for values, norm in self._list_spectra(layer)
            ]
        )

    def noise_edge(self, layer: int | str, entry_variance: float | None = None, level: float = 0.01) -> Table:
        """Return the edge that singular values of noise of the shape of W_l rarely exceed, at the records.

        Parameters
        ----------
        layer : int or str
            1 .. L, or the name of a layer.
        entry_variance : float, optional
            Variance of the noise. Default: `noise_variance` of each record.
        level : float
            Probability that noise has a larger value.

        Returns
        -------
        ndarray, shape (n_records,)
            `measures.noise_edge`, in the unit of `singular_values`.

        Raises
        ------
        ValueError
            For a layer out of range, where the norm is not known, and for a level out of range.

        Notes
        -----
        Cost: O(n_records k).
        """
        shape = self.shapes[self._index(layer)]
        if entry_variance is not None:
            return np.full(len(self.steps), noise.noise_edge(shape, entry_variance, level=level))
        return np.array([noise.noise_edge(shape, v, level=level) for v in self.noise_variance(layer)])

    def rank_above_noise(
        self, layer: int | str, entry_variance: float | None = None, level: float = 0.01
    ) -> IntArray:
        """Return the number of singular values of W_l beyond the edge of noise at the records.

        Parameters
        ----------
        layer : int or str
            1 .. L, or the name of a layer.
        entry_variance : float, optional
            Variance of the noise, such as that of the initial weights. Default: an estimate at each record.
        level : float
            Probability that a matrix of noise has any value beyond the edge.

        Returns
        -------
        ndarray of int64, shape (n_records,)
            `measures.rank_above_noise`; at most the number of recorded values.

        Raises
        ------
        ValueError
            For a layer out of range, where the norm is not known, and for a level out of range.

        Notes
        -----
        Cost: O(n_records k).
        """
        shape = self.shapes[self._index(layer)]
        found = [
            noise.rank_above_noise(values, entry_variance, shape=shape, norm=norm, level=level)
            for values, norm in self._list_spectra(layer)
        ]
        return np.array(found, dtype=np.int64)

    def _list_spectra(self, layer: int | str) -> list[tuple[FloatArray, float | None]]:
        """Return the singular values and the norm of W_l at each record; None for the norm of all values."""
        values, norms = self.singular_values(layer), self._norms(layer)
        if norms is None:
            return [(row, None) for row in values]
        # Rounding may make the norm smaller than that of the values.
        own = np.linalg.norm(values.astype(np.float64), axis=1)
        return [(row, float(norm)) for row, norm in zip(values, np.maximum(norms, own), strict=True)]

    def active_singular_values(self, layer: int) -> FloatArray:
        """Return the singular values of W_l in the active subspace (reduced engine).

        Parameters
        ----------
        layer : int
            1 .. L.

        Returns
        -------
        ndarray, shape (n_records, a)
            Descending; a is at most 2r in square networks, up to 3r in others.
        """
        return self.states.active_singular_values(self._index(layer), self)

    def families(self) -> tuple[Family, ...]:
        """Return the families of directions outside the active subspaces (reduced engine).

        Returns
        -------
        tuple of Family
            Their layers, multiplicities, couplings to the loss, and scalars at step 0.
        """
        return self.states.list_families(self)

    def rho(self, layer: int, family: int | None = None) -> Table:
        """Return the scalar of a family in layer l at the records (reduced engine).

        All singular values outside the active subspaces equal ``|rho_l|`` where the layer has one family,
        the usual case; see `families` and `multiplicity`.

        Parameters
        ----------
        layer : int
            1 .. L.
        family : int, optional
            Index in `families`. By default the first that runs through this layer: the one that sees the
            gradient, if there is one.

        Returns
        -------
        ndarray, shape (n_records,)

        Raises
        ------
        ValueError
            For other engines, and for a layer that is active as a whole.
        """
        return self.states.rho_of(self._index(layer), family, self)

    def multiplicity(self, layer: int) -> int:
        """Return how many singular values of layer l are scalars of families (reduced engine).

        Parameters
        ----------
        layer : int
            1 .. L.

        Returns
        -------
        int
        """
        return self.states.multiplicity(self._index(layer), self)

    # --------------------------------------------------------------------------- vectors and angles

    def singular_vectors(self, layer: int | str, side: str = "right", step: int = -1) -> FloatArray:
        """Return singular vectors of W_l at a record, as columns.

        Parameters
        ----------
        layer : int or str
            1 .. L, or the name of a layer.
        side : {"right", "left"}
            The v_i or the u_i.
        step : int
            A recorded step, or -1 for the last.

        Returns
        -------
        ndarray, shape (d, k)
            Dense engine: all recorded vectors. Reduced engine: those of the active subspace, in the order of
            `active_singular_values`; O(d r^2).
        """
        index, record = self._index(layer), find_record(self.steps, step)
        return self.states.singular_vectors(index, _check_side(side), record)

    def angles(
        self, layer: int | str, side: str = "right", reference: str | npt.ArrayLike = "limit"
    ) -> Table:
        r"""Return the angles between the singular vectors of W_l and reference vectors.

        The first r and the last r vectors (the last K, where the last layer is wide with K rows) are compared
        one by one; those between, which share a singular value, get the largest principal angle of their
        block, repeated. With the reduced engine they are ordered within the active subspace, the block in
        the middle.

        Parameters
        ----------
        layer : int or str
            1 .. L, or the name of a layer.
        side : {"right", "left"}
            Angles of the v_i or of the u_i.
        reference : {"limit", "first_step"} or array_like, shape (d, k)
            "limit": the singular vectors for t -> 0+, which exist although those of a scaled isometry W(0)
            are arbitrary (for any other W(0): its own singular vectors). "first_step": the vectors after one
            step, with the angle 0 at step 0, as the authors of arXiv 2306.01154 plot them. Or an array of
            vectors.

        Returns
        -------
        ndarray, shape (n_records, k)
            Radians, in [0, pi/2], accurate to rounding at both ends.

        Raises
        ------
        ValueError
            If the dense engine recorded no vectors (``train(..., vectors=True)``), or step 1 is not among
            the records for "first_step".
        """
        return self.states.angles(self._index(layer), _check_side(side), reference, self)

    def active_angles(self, layer: int, side: str = "right", reference: str = "limit") -> Table:
        """Return the angles of the active subspace's singular vectors alone (reduced engine).

        These are the columns of `angles` without the block in the middle, whose vectors never move: a table
        whose size does not grow with d.

        Parameters
        ----------
        layer, side : int, str
            Layer and side, as in `angles`.
        reference : {"limit", "first_step"}
            Vectors from which the angles are measured, as in `angles`.

        Returns
        -------
        ndarray, shape (n_records, a)
            Radians, in the order of `active_singular_values`.
        """
        return self.states.active_angles(self._index(layer), _check_side(side), reference, self)

    def block_angles(self, layer: int | str, side: str = "right") -> Table:
        """Return the angle between the span of the k leading vectors and the reference's (tracked models).

        Parameters
        ----------
        layer : int or str
            1 .. L, or the name of a layer.
        side : {"right", "left"}
            The span of the v_i or of the u_i.

        Returns
        -------
        ndarray, shape (n_records,)
            The largest principal angle, radians, to the first record whose values are not one cluster.

        Raises
        ------
        ValueError
            For a run of `train`, whose vectors are recorded.
        """
        return self.states.block_angles(self._index(layer), _check_side(side))

    # --------------------------------------------------------------------------------------- helpers

    def _index(self, layer: int | str) -> int:
        """Return the index from 0 of a layer from its number from 1, or its name."""
        if isinstance(layer, str) and self.has_named_layers:
            names = self.layer_names
            if layer not in names:
                raise ValueError(f"layer is {layer!r}; wanted 1 to {self.n_layers} or one of {names}")
            return names.index(layer)
        number = check_count(layer, "layer")
        if number > self.n_layers:
            raise ValueError(f"layer is {number}; wanted 1 to {self.n_layers}")
        return number - 1


def _check_side(side: str) -> str:
    check_choice(side, "side", ("left", "right"))
    return side
