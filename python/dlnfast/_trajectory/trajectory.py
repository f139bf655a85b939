# SPDX-License-Identifier: MIT
"""`Trajectory`: the records of a run, with weights, features, files and tables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, overload

import numpy as np
import numpy.typing as npt

from .. import measures
from .._closure.certificate import Certificate
from .._closure.operators import LayerOperator
from .._problem.kinds import AnyProblem
from .._problem.problem import Problem
from .._problem.samples import SampleProblem
from .._support.arrays import (
    FloatArray,
    as_matrix,
    check_choice,
    check_count,
    check_flag,
    check_path,
    check_scale,
)
from .._support.errors import ShapeError
from .._support.file_checks import translate_part_errors
from .._support.files import Arrays, write_whole
from .._support.products import multiply
from ..theory.kernel import NeuralTangentKernel, neural_tangent_kernel
from .checks import check_run
from .dataset import to_xarray
from .dense import DenseStates
from .problem_packing import check_problem_metadata, pack_problem, unpack_problem
from .reduced import ReducedStates
from .samples import SampleStates
from .states import States, Table, find_record
from .tables import to_dataframe
from .tracked import TrackedStates
from .trajectory_base import TrajectoryBase
from .trajectory_theory import TheoryMethods
from .truncated_spectra import bound_unrecorded

if TYPE_CHECKING:
    import pandas
    import polars
    import xarray


FORMAT_VERSION = 1
FORMAT = "dlnfast trajectory"
#: The classes of states, by the name of their layout in files, or of the engine where layouts are shared.
STATES: Final[Mapping[str, type[States]]] = {
    "reduced": ReducedStates,
    "dense": DenseStates,
    "samples": SampleStates,
    "tracked": TrackedStates,
}


def find_states_class(layout: str, engine: str) -> type[States]:
    """Return the class that unpacks the states of a file.

    Parameters
    ----------
    layout : str
        Name of the layout, ``metadata["states"]["engine"]`` in the file.
    engine : str
        Engine of the run.

    Raises
    ------
    KeyError
        For an unknown layout.
    """
    found = STATES.get(engine)
    return found if found is not None and found.layout == layout else STATES[layout]


class Trajectory(TrajectoryBase, TheoryMethods):
    """The records of a run of `train` or `flow`. Layers are counted from 1, as in the mathematics.

    Or the records of `dlnfast.torch.track`, of a model that another program trained. Its layers have names,
    which all methods take instead of numbers, and need not form a chain.

    Attributes
    ----------
    steps : ndarray of int64, shape (n_records,)
        The steps t of the records.
    loss : ndarray, shape (T + 1,)
        The loss of W(t) for every t = 0, .., T: for a `SampleProblem` that of the mini-batch of step t with
        its label noise, see `full_loss`. Tracked: the losses that were reported.
    loss_steps : ndarray of int64
        The steps of these losses.
    engine : str
        "reduced", "dense", "torch" or "sharded"; "tracked" where another program trained.
    certificate : Certificate
        The reason for this engine, with its measured assumptions.
    config : dict
        Every setting of the run, in JSON values.
    problem : Problem, Completion, Sensing, SampleProblem or None
        The training problem.
    states : ReducedStates, DenseStates or TrackedStates
        The raw records.
    wall_time : float
        Seconds that `train` took.
    rates : ndarray, shape (T,), or None
        Factors of the layers' learning rates at each step, where these adapt.
    times : ndarray, shape (T + 1,), or None
        Times of a gradient flow (`dlnfast.flow`), one for each loss; its steps are indices into them, and
        ``times[steps]`` are the times of the records. None for gradient descent.
    """

    def _gradients(self, weights: Sequence[FloatArray]) -> list[FloatArray]:
        from .._weights.gradients import gradients

        if self.problem is None:
            raise ValueError(self.states.missing_problem)
        if isinstance(self.problem, SampleProblem):
            raise ValueError("gradients are computed from S and Phi, which a SampleProblem does not have")
        return gradients(self.problem, weights)

    def _require_problem(self, method: str) -> Problem:
        if isinstance(self.problem, Problem):
            return self.problem
        if self.problem is None:
            raise ValueError(f"{method} needs the training problem: {self.states.missing_problem}")
        raise ValueError(
            f"{method} needs a Problem with the sums S and Phi; the problem is {type(self.problem).__name__}"
        )

    @property
    def _inputs_and_target(self) -> tuple[FloatArray, FloatArray | None, FloatArray] | None:
        if not isinstance(self.problem, Problem):
            return None
        factor = self.problem.input_factor
        inputs = np.eye(self.problem.dim_in) if factor is None else factor
        return inputs, self.problem.input_gram, self.problem.dense_target()

    # ----------------------------------------------------------------------------- losses and biases

    def full_loss(self) -> Table:
        """Return the loss of all samples, without label noise, at the records.

        Returns
        -------
        ndarray of float64, shape (n_records,)
            ``loss[steps]`` for other problems than a `SampleProblem`, whose `loss` is always the full one.

        Raises
        ------
        ValueError
            For a tracked model.
        """
        return self.states.full_loss(self)

    def biases(self, layer: int) -> FloatArray:
        """Return the biases b_l at the records, for a `SampleProblem` with biases.

        Parameters
        ----------
        layer : int
            1 .. L.

        Returns
        -------
        ndarray, shape (n_records, d_l)
            Biases, zero at step 0.

        Raises
        ------
        ValueError
            For a layer out of range, or a run without biases.
        """
        return self.states.biases_of(self._index(layer))

    # --------------------------------------------------------------------------- subspaces and ranks

    def subspace_cosines(
        self, layer: int | str, rank: int | None = None, side: str = "left", step: int = -1
    ) -> dict[str, Table]:
        """Return the cosines between the leading singular subspaces at the records and at one record.

        Parameters
        ----------
        layer : int or str
            1 .. L, or the name of a layer.
        rank : int, optional
            Dimension of the subspaces; by default the number of recorded vectors.
        side : {"left", "right"}
            Subspaces of the u_i or of the v_i.
        step : int
            The record to compare with, or -1 for the last.

        Returns
        -------
        dict of str to ndarray, shape (n_records,)
            ``minimum``, ``mean``, ``maximum``, ``overlap`` and ``baseline`` of `measures.subspace_cosine`.

        Raises
        ------
        ValueError
            If no vectors, or fewer than `rank`, were recorded.

        Notes
        -----
        Cost: O(n_records d rank^2).
        """
        last = self.singular_vectors(layer, side, step)
        count = last.shape[1] if rank is None else check_count(rank, "rank", maximum=last.shape[1])
        vectors = (self.singular_vectors(layer, side, int(at)) for at in self.steps)
        return _tabulate_cosines([(each[:, :count], last[:, :count]) for each in vectors])

    def layer_alignment(self, lower: int | str, upper: int | str, k: int | None = None) -> dict[str, Table]:
        """Return how far the leading outputs of one layer are the leading inputs of another, at the records.

        Compares the span of the k leading left singular vectors of the lower layer with that of the k leading
        right singular vectors of the upper one. For what was learned, use the trajectory of the changes,
        ``tracked.trajectory(of="change")``.

        Parameters
        ----------
        lower, upper : int or str
            1 .. L, or the names of layers.
        k : int, optional
            Dimension of the subspaces; by default the smaller number of recorded vectors.

        Returns
        -------
        dict of str to ndarray, shape (n_records,)
            ``minimum``, ``mean``, ``maximum``, ``overlap`` and ``baseline`` of `measures.subspace_cosine`;
            the baseline is the expected overlap of random subspaces.

        Raises
        ------
        ShapeError
            If the upper layer has another number of columns than the lower one has rows.
        ValueError
            If no vectors, or fewer than k, were recorded.

        Notes
        -----
        Cost: O(n_records d k^2). Vectors of a change that is still zero are arbitrary.
        """
        outputs = [self.singular_vectors(lower, "left", int(at)) for at in self.steps]
        inputs = [self.singular_vectors(upper, "right", int(at)) for at in self.steps]
        most = min(outputs[0].shape[1], inputs[0].shape[1])
        count = most if k is None else check_count(k, "k", maximum=most)
        if len(outputs[0]) != len(inputs[0]):
            raise ShapeError(
                f"upper, {upper!r}, has {len(inputs[0])} columns; wanted {len(outputs[0])}, the rows of lower"
            )
        return _tabulate_cosines([(a[:, :count], b[:, :count]) for a, b in zip(outputs, inputs, strict=True)])

    def intruder_directions(
        self, layer: int | str, threshold: float = 0.5, *, side: str = "left", step: int | None = None
    ) -> npt.NDArray[np.bool_]:
        """Return which singular vectors of W_l resemble none of those at a base record.

        Parameters
        ----------
        layer : int or str
            1 .. L, or the name of a layer.
        threshold : float
            Cosine in (0, 1]; a vector counts if its cosines with all base vectors are below.
        side : {"left", "right"}
            The u_i or the v_i.
        step : int, optional
            Step of the base record. Default: the first record.

        Returns
        -------
        ndarray of bool, shape (n_records, k)
            True for the vectors that `measures.intruder_directions` finds.

        Raises
        ------
        ValueError
            If no vectors were recorded, for a step without a record, and a threshold out of range.

        Notes
        -----
        Only recorded vectors are compared, so that a vector which was not among the leading ones before is
        found, too. Cost: O(n_records d k^2).
        """
        base = self.singular_vectors(layer, side, int(self.steps[0]) if step is None else step)
        found = np.zeros((len(self.steps), base.shape[1]), dtype=np.bool_)
        for row, at in zip(found, self.steps, strict=True):
            vectors = self.singular_vectors(layer, side, int(at))
            row[measures.intruder_directions(vectors, base, threshold=threshold)] = True
        return found

    def ranks(
        self, threshold: float = 0.01, *, step: int = -1, relative_to: Literal["all", "layer"] = "all"
    ) -> dict[str, int]:
        """Return how many singular values of each layer are above a threshold, at a record.

        Parameters
        ----------
        threshold : float
            Relative to the largest singular value.
        step : int
            A recorded step, or -1 for the last.
        relative_to : {"all", "layer"}
            The largest of all layers, so that one that hardly moved has rank 0, or of each layer.

        Returns
        -------
        dict of str to int
            Ranks, by the names of the layers.

        Raises
        ------
        ValueError
            If more values may be above the threshold than were recorded.
        """
        level = check_scale(threshold, "threshold")
        check_choice(relative_to, "relative_to", ("all", "layer"))
        record = find_record(self.steps, step)
        names = self.layer_names
        values = [self.singular_values(i + 1)[record] for i in range(len(names))]
        largest = max(float(v[0]) for v in values)
        found = {}
        for i, (name, v) in enumerate(zip(names, values, strict=True)):
            least = level * (largest if relative_to == "all" else float(v[0]))
            found[name] = int(np.sum(v.astype(np.float64) > least))
            if found[name] == len(v) < min(self.shapes[i]):
                norm = self.tracking(i + 1).get("norm")
                if bound_unrecorded(v, None if norm is None else float(norm[record])) > least:
                    raise ValueError(
                        f"layer {name} may have more than the {len(v)} recorded singular values above "
                        f"{threshold:g} of the largest: record more (k)"
                    )
        return found

    # -------------------------------------------------------------------------- weights and features

    def weights(self, layer: int, step: int = -1) -> FloatArray:
        r"""Return W_l at a recorded step.

        Parameters
        ----------
        layer : int
            1 .. L.
        step : int
            Reduced engine: any recorded step. Dense engine: the first, the last, and those of
            ``weights_every``, by default all records of small networks (`Record`). -1 is the last.

        Returns
        -------
        ndarray, shape (d_l, d_{l-1})
            Reduced engine: ``A_l C_l A_{l-1}^T`` plus the scaled complement of W_l(0); O(d^2 a), or O(L d^3)
            for a layer with several families whose scalars differ. See `layer` for products without the
            array.

        Raises
        ------
        ValueError
            If the weights of that step were not recorded.
        """
        return self.states.weights(self._index(layer), step, self)

    def all_weights(self, step: int = -1) -> list[FloatArray]:
        """Return ``W_1 .. W_L`` at a recorded step.

        Parameters
        ----------
        step : int
            Step with a record or a snapshot, as in `weights`; -1 for the last.

        Returns
        -------
        list of ndarray
            As `train` takes them; each costs as much as `weights`.

        Raises
        ------
        ValueError
            If the weights of that step were not recorded.
        """
        return [self.weights(layer, step) for layer in range(1, self.n_layers + 1)]

    def layer(self, layer: int, step: int = -1) -> LayerOperator:
        """Return W_l at a recorded step as an operator (reduced engine): products, columns, rows, entries.

        Parameters
        ----------
        layer : int
            1 .. L.
        step : int
            A recorded step, or -1 for the last.

        Returns
        -------
        LayerOperator
            ``run.layer(2) @ X``, ``.apply_transpose(Y)``, ``.column(j)``, ``.row(i)``, ``.entry(i, j)``. No
            d x d array is formed.

        Raises
        ------
        ValueError
            For other engines, whose `weights` are arrays, or if that step was not recorded.
        """
        return self.states.layer(self._index(layer), step, self)

    def end_to_end(self, step: int = -1) -> FloatArray:
        """Return ``W_{L:1} = W_L .. W_1`` at a recorded step; O(L d^3), or O(L K d^2) for a thin end.

        Parameters
        ----------
        step : int
            Step with a record or a snapshot, as in `weights`; -1 for the last.

        Returns
        -------
        ndarray, shape (d_L, d_0)
        """
        chain = self.all_weights(step)
        if self.widths[-1] <= self.widths[0]:
            result = chain[-1]
            for weight in reversed(chain[:-1]):
                result = multiply(result, weight)
            return result
        result = chain[0]
        for weight in chain[1:]:
            result = multiply(weight, result)
        return result

    def neural_tangent_kernel(self, step: int = -1) -> NeuralTangentKernel:
        """Return the neural tangent kernel of ``W_{L:1}`` at a recorded step.

        It does not depend on the data, and evaluates on any samples. Use `train_kernel` for the largest
        eigenvalues and the trace over the training outputs, at all records and at any width.

        Parameters
        ----------
        step : int
            Step with a record or a snapshot, as in `weights`; -1 for the last.

        Returns
        -------
        NeuralTangentKernel
            `theory.neural_tangent_kernel` of ``all_weights(step)``, as factors: whole matrices, also of a
            reduced run.

        Raises
        ------
        ValueError
            If the weights of that step were not recorded.

        Notes
        -----
        Cost: O(L d^3), and L (d_0^2 + d_L^2) entries. Dense runs have the same factors in `train_kernel`.
        """
        return neural_tangent_kernel(self.all_weights(step))

    def features(self, layer: int, X: npt.ArrayLike | None = None, step: int = -1) -> FloatArray:
        """Return ``Z_l = W_l .. W_1 X`` at a recorded step, with the biases if there are any.

        Parameters
        ----------
        layer : int
            0 .. L; 0 is X itself.
        X : array_like, shape (d_0, N), optional
            Inputs in the problem's coordinates; by default the problem's own.
        step : int
            Step with a record or a snapshot, as in `weights`; -1 for the last.

        Returns
        -------
        ndarray, shape (d_l, N)
            Costs as much as `weights` for each layer, and a product with it: O(d^2 N).

        Raises
        ------
        ShapeError
            For an X of another shape.
        ValueError
            For a layer outside 0 .. L, a step that was not recorded, and no X where the problem holds none.
        """
        depth = check_count(layer, "layer", minimum=0)
        if X is None:
            X = None if self.problem is None else self.problem.inputs
            if X is None:
                raise ValueError(
                    "X is needed: the problem holds no inputs (files store no samples; pass new ones through "
                    "problem.transform)"
                )
        dtype = np.dtype(self.config["dtype"])
        result = as_matrix(X, "X", shape=(self.widths[0], None), dtype=dtype)
        for i in range(1, depth + 1):
            result = self.states.apply_layer(self._index(i), result, step, self)
        return result

    # ------------------------------------------------------------------------------ files and tables

    def save(self, path: str | os.PathLike[str], *, weights: bool = True) -> None:
        """Write the run to one .npz file (arrays and JSON, no pickle); the file appears whole or not at all.

        Parameters
        ----------
        path : path
            Name of the file; no extension is added.
        weights : bool
            Keep whole weight matrices. Without them a reduced run still has everything but `weights`,
            `layer`, `end_to_end` and `features`.

        Raises
        ------
        FileNotFoundError
            If the folder does not exist.
        """
        target = check_path(path, "path")
        metadata, arrays = self.to_arrays(weights=check_flag(weights, "weights"))
        write_whole(target, FORMAT, FORMAT_VERSION, metadata, arrays)

    def to_arrays(self, *, weights: bool = True) -> tuple[dict[str, Any], Arrays]:
        """Return the content of the file that `save` writes.

        Parameters
        ----------
        weights : bool
            Keep whole weight matrices.

        Returns
        -------
        metadata : dict
            Metadata, in JSON values.
        arrays : dict of str to ndarray
            The arrays, by name.
        """
        arrays: Arrays = {"steps": self.steps, "loss": self.loss}
        if self.rates is not None:
            arrays["rates"] = self.rates
        if self.times is not None:
            arrays["times"] = self.times
        if not self.states.has_every_loss:
            arrays["loss_steps"] = self.loss_steps
        metadata = {
            "config": self.config,
            "certificate": self.certificate.to_dict(),
            "wall_time": self.wall_time,
            "problem": pack_problem(self.problem, arrays),
            "states": self.states.pack(arrays, weights),
        }
        return metadata, arrays

    @classmethod
    def from_arrays(
        cls, metadata: Mapping[str, Any], arrays: Arrays, problem: AnyProblem | None = None
    ) -> Trajectory:
        """Return the run of which `to_arrays` returned the content.

        Parameters
        ----------
        metadata, arrays : mapping
            Metadata and arrays, from `to_arrays`.
        problem : Problem, Completion, Sensing or SampleProblem, optional
            The training problem, instead of the one in the arrays.

        Returns
        -------
        Trajectory

        Raises
        ------
        ValueError
            If an array or an entry is missing, or does not fit the others; the message names it.
        """
        with translate_part_errors("it"):
            config, meta = metadata["config"], metadata["states"]
            if problem is None and metadata["problem"] is not None:
                check_problem_metadata(metadata["problem"], config, arrays)
                problem = unpack_problem(metadata["problem"], arrays, config.get("problem", {}))
            certificate = Certificate.from_dict(metadata["certificate"])
            states_class = find_states_class(meta["engine"], certificate.engine)
            run = cls(
                steps=arrays["steps"],
                loss=arrays["loss"],
                states=states_class.unpack(meta, arrays, config),
                certificate=certificate,
                problem=problem,
                config=config,
                wall_time=metadata["wall_time"],
                rates=arrays.get("rates"),
                loss_steps=arrays.get("loss_steps"),
                times=arrays.get("times"),
            )
        check_run(run, run.problem)
        return run

    def to_xarray(self, variables: Sequence[str] | None = None) -> xarray.Dataset:
        """Return the records as an xarray.Dataset, with named dimensions, coordinates and attributes.

        Parameters
        ----------
        variables : sequence of str, optional
            Names of the variables; by default all that the run has. `export` lists them.

        Returns
        -------
        xarray.Dataset

        Raises
        ------
        ModuleNotFoundError
            Without xarray.
        ValueError
            For a variable that the run does not have.
        """
        return to_xarray(self, variables)

    @overload
    def to_dataframe(
        self,
        variables: Sequence[str] | None = None,
        *,
        form: Literal["long", "wide"] = "long",
        library: Literal["pandas"] = "pandas",
    ) -> pandas.DataFrame: ...

    @overload
    def to_dataframe(
        self,
        variables: Sequence[str] | None = None,
        *,
        form: Literal["long", "wide"] = "long",
        library: Literal["polars"],
    ) -> polars.DataFrame: ...

    def to_dataframe(
        self,
        variables: Sequence[str] | None = None,
        *,
        form: Literal["long", "wide"] = "long",
        library: Literal["pandas", "polars"] = "pandas",
    ) -> pandas.DataFrame | polars.DataFrame:
        """Return the records as a table of pandas or polars.

        Parameters
        ----------
        variables : sequence of str, optional
            Names of variables of `to_xarray`; by default all with at most one number per singular value, so
            no vectors and weights.
        form : {"long", "wide"}
            "long": a row for every number, with the name of its quantity, as plotting libraries expect.
            "wide": a row for every singular value of every layer and record, and a column for every quantity.
        library : {"pandas", "polars"}
            Package of the table.

        Returns
        -------
        pandas.DataFrame or polars.DataFrame
            Long: columns ``step``, ``layer`` (from 1; 0 for quantities of the whole network, such as the
            loss), ``layer_name``, ``index`` (of the singular value or the family, from 0), ``quantity``,
            ``value`` and ``bound`` (on the error of a singular value, NaN for all else). Values that do not
            exist, such as the padding of smaller layers, have no row.

            Wide: columns ``step``, ``layer``, ``layer_name``, ``index`` and the variables that belong to a
            value or to a layer. ``loss``, ``rates`` and ``times`` are those of the record's step, NaN where
            none is known. A run without singular values has a row for every layer and record.

        Raises
        ------
        ModuleNotFoundError
            Without the package; the message has the command to install it.
        ValueError
            For another form or library, a variable that the run does not have, and vectors or weights in the
            long form.

        Notes
        -----
        ``to_xarray().to_dataframe()``, xarray's own, has a row for every combination of all dimensions, so
        that losses of every step, vectors or weights multiply the rows of all else. Memory: about 60 bytes
        and two names for each row of the long form.

        Examples
        --------
        >>> import dlnfast as dln
        >>> problem, weights = dln.low_rank_recovery(6, 1), dln.orthogonal([6, 6, 6])
        >>> run = dln.train(problem, weights, learning_rate=0.1, steps=2)
        >>> table = run.to_dataframe(["singular_values"])  # doctest: +SKIP
        >>> table.groupby(["layer", "step"]).value.max()  # doctest: +SKIP
        """
        return to_dataframe(self, variables, form, library)


def _tabulate_cosines(pairs: Sequence[tuple[FloatArray, FloatArray]]) -> dict[str, Table]:
    """Return the fields of `measures.subspace_cosine` for pairs of subspaces, one for each record."""
    found = [measures.subspace_cosine(*pair) for pair in pairs]
    return {
        name: np.array([getattr(cosine, name) for cosine in found])
        for name in measures.SubspaceCosine._fields
    }
