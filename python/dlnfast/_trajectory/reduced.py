# SPDX-License-Identifier: MIT
"""States of the reduced engine: cores inside the active subspaces, and scalars outside of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from .. import reference as plain
from .._closure.family import Family
from .._closure.operators import Complement, ExplicitLayers, LayerOperator, Layers, check_sampled_size
from .._closure.sampled import resample
from .._support.arrays import FloatArray, IntArray, as_matrix, check_count, check_scale
from .._support.dispatch import core
from .._support.errors import ShapeError
from .._support.file_checks import check_array
from .._support.files import Arrays
from .._tracking.svd_tracker import COMPLETENESS, TIERS
from .._weights.implicit import ImplicitWeights
from .angles import compute_limit, is_limit, is_scaled_isometry, measure_angles
from .chains import Chain, DecoupledNetwork
from .packing import check_matrices, pack_list, unpack_list
from .states import NO_VALUES, ActiveChain, Run, States, Table, find_record
from .variables import OF_ACTIVE_VALUES, OF_LAYERS, OF_VALUES, Array, LayerVariables

#: Largest number of entries of the cores that `decouple` takes at once.
_SLICE_ENTRIES = 2**18
#: Values that differ by less, relative to the largest, belong to one cluster.
_CLUSTER_TOLERANCE = 1e-8


class _Spectrum(NamedTuple):
    """The singular value decompositions of a layer's cores at all records, vectors as columns."""

    left: FloatArray
    values: FloatArray
    right: FloatArray

    def vectors(self, side: str) -> FloatArray:
        return self.left if side == "left" else self.right


@dataclass(frozen=True)
class ReducedStates(States):
    """Records of the reduced engine: cores inside the active subspaces, scalars outside.

    Attributes
    ----------
    bases : sequence of ndarray
        A_0 .. A_L, orthonormal columns.
    cores : tuple of ndarray, shape (n_records, a_l, a_{l-1})
        C_l at the records.
    families : tuple of Family
        The directions outside, with their scalars at step 0.
    rho : ndarray, shape (n_records, n_scalars)
        Scalars at the records, those of one family after the other.
    target, input_gram : ndarray
        ``A_L^T Phi A_0`` and ``A_0^T S A_0`` (None where S = I).
    layers : Layers or None
        W_l(0); None where they were not saved.
    n_values : int or None
        Number of values that `Trajectory.singular_values` returns; None for all.
    loss_scale : float
        c.
    """

    layout: ClassVar[str] = "reduced"

    bases: Sequence[FloatArray]
    cores: tuple[FloatArray, ...]
    families: tuple[Family, ...]
    rho: Table
    target: FloatArray
    input_gram: FloatArray | None
    layers: Layers | None
    n_values: int | None
    loss_scale: float
    #: Decompositions of the cores, by layer; computed once. `replace` starts with none.
    _spectra: dict[int, _Spectrum] = field(default_factory=dict, init=False, repr=False, compare=False)

    def scalars_of(self, layer: int) -> dict[int, int]:
        """Return the column of `rho` with the scalar of a layer, counted from 1, by index of the family."""
        columns, start = {}, 0
        for i, family in enumerate(self.families):
            if family.first <= layer <= family.last:
                columns[i] = start + layer - family.first
            start += len(family.rho)
        return columns

    def complement_of(self, layer: int) -> int:
        """Return how many singular values of a layer, counted from 1, belong to families."""
        return sum(self.families[i].multiplicity for i in self.scalars_of(layer))

    def _spectrum(self, index: int) -> _Spectrum:
        if index not in self._spectra:
            left, values, right_t = np.linalg.svd(self.cores[index], full_matrices=False)
            self._spectra[index] = _Spectrum(left, values, np.swapaxes(right_t, 1, 2))
        return self._spectra[index]

    # ------------------------------------------------------------------------------ singular values

    def singular_values(self, index: int, run: Run) -> FloatArray:
        if self.n_values == 0:
            raise ValueError(NO_VALUES)
        active = self._spectrum(index).values
        n_all = min(run.shapes[index])
        n_wanted = n_all if self.n_values is None else min(self.n_values, n_all)
        parts = [active]
        for family, column in self.scalars_of(index + 1).items():
            outside = np.abs(self.rho[:, column : column + 1]).astype(active.dtype)
            # No more copies than can be among the returned values.
            parts.append(np.repeat(outside, min(self.families[family].multiplicity, n_wanted), axis=1))
        # All values of directions that are neither active nor in a family are zero.
        n_zeros = n_all - active.shape[1] - self.complement_of(index + 1)
        parts.append(np.zeros((len(active), min(max(n_zeros, 0), n_wanted)), dtype=active.dtype))
        values = -np.sort(-np.hstack(parts), axis=1)
        return values[:, :n_wanted]

    def singular_value_errors(self, index: int, run: Run) -> Table:
        values = self.singular_values(index, run).astype(np.float64)
        size = max(self.cores[index].shape[1:], default=1)
        eps = float(np.finfo(self.cores[index].dtype).eps)
        return np.broadcast_to(16 * eps * np.sqrt(size) * values[:, :1], values.shape).copy()

    def branches(self, index: int) -> IntArray:
        return self._follow(index)[0]

    def clusters(self, index: int) -> IntArray:
        return self._follow(index)[1]

    def followed_values(self, index: int, run: Run) -> FloatArray:
        return self._spectrum(index).values

    def _follow(self, index: int) -> tuple[IntArray, IntArray]:
        """Return branches and clusters of the core's singular values."""
        left, values, right = self._spectrum(index)
        ids = np.empty(values.shape, dtype=np.int64)
        clusters = np.empty(values.shape, dtype=np.int64)
        # Copies, as the core rotates and flips the vectors in place.
        rows_left, rows_right = (
            np.array(np.swapaxes(x, 1, 2), dtype=np.float64, order="C") for x in (left, right)
        )
        core.follow_branches(
            np.ascontiguousarray(values, dtype=np.float64),
            rows_left,
            rows_right,
            0.0,
            _CLUSTER_TOLERANCE,
            ids,
            clusters,
            n_threads=1,
        )
        return ids, clusters

    def tracking_of(self, index: int, run: Run) -> dict[str, Array]:
        n = len(run.steps)
        return {
            "tier": np.full(n, TIERS[0]),
            "completeness": np.full(n, COMPLETENESS[2]),
            "refreshed": np.zeros(n, dtype=bool),
        }

    def active_singular_values(self, index: int, run: Run) -> FloatArray:
        return self._spectrum(index).values

    def rho_of(self, index: int, family: int | None, run: Run) -> Table:
        layer, (rows, columns) = index + 1, run.shapes[index]
        scalars = self.scalars_of(layer)
        active = self.cores[index].shape[1:]
        if not scalars and active[0] < rows and active[1] < columns:
            return np.zeros(len(run.steps))  # a layer that is zero there
        if not scalars:
            raise ValueError(f"layer {layer} ({rows} x {columns}) is active as a whole: there is no rho")
        chosen = next(iter(scalars)) if family is None else check_count(family, "family", minimum=0)
        if chosen not in scalars:
            raise ValueError(f"family is {family}; those in layer {layer} are {list(scalars)}")
        return self.rho[:, scalars[chosen]]

    def list_families(self, run: Run) -> tuple[Family, ...]:
        return self.families

    def multiplicity(self, index: int, run: Run) -> int:
        return self.complement_of(index + 1)

    # --------------------------------------------------------------------------- vectors and angles

    def singular_vectors(self, index: int, side: str, record: int) -> FloatArray:
        return np.asarray(self._basis(index, side) @ self._spectrum(index).vectors(side)[record])

    def _basis(self, index: int, side: str) -> FloatArray:
        """Return the basis of the outputs ("left") or of the inputs ("right") of a layer."""
        return self.bases[index + 1 if side == "left" else index]

    def active_angles(self, index: int, side: str, reference: str, run: Run) -> Table:
        vectors = self._spectrum(index).vectors(side).astype(np.float64)
        start = 0
        if isinstance(reference, str) and reference == "first_step":
            chosen, start = vectors[find_record(run.steps, 1)], 1
        elif is_limit(reference) and is_scaled_isometry(self.cores[index][0]):
            chosen, start = self._limit(index, side), 1
        else:
            chosen = vectors[0]
        return measure_angles(vectors, chosen, start)

    def _limit(self, index: int, side: str) -> FloatArray:
        """Return the singular vectors of a core for t -> 0+."""
        return compute_limit(self.cores[index][0].astype(np.float64), self._initial_gradients[index], side)

    @cached_property
    def _initial_gradients(self) -> list[FloatArray]:
        """Gradients of the loss with respect to the cores at the first record; computed once."""
        cores = [core_[0].astype(np.float64) for core_ in self.cores]
        gram = None if self.input_gram is None else self.input_gram.astype(np.float64)
        return plain.gradients(cores, self.target.astype(np.float64), gram, self.loss_scale)

    def angles(self, index: int, side: str, reference: str | npt.ArrayLike, run: Run) -> Table:
        vectors = self._spectrum(index).vectors(side).astype(np.float64)
        n_records, _, n_active = vectors.shape
        n_top = min(run.rank, n_active)
        n_middle = self.complement_of(index + 1)
        result = np.zeros((n_records, n_active + n_middle))
        outer = np.r_[:n_top, n_top + n_middle : n_active + n_middle]
        if isinstance(reference, str):
            result[:, outer] = self.active_angles(index, side, reference, run)
            return result
        basis = self._basis(index, side).astype(np.float64)
        chosen = as_matrix(reference, "reference", shape=(len(basis), n_active + n_middle), dtype=np.float64)
        for i, inner in enumerate(vectors):
            result[i, outer] = plain.angle(basis @ inner, chosen[:, outer])
        if n_middle:
            # The block is the complement of the active subspace, whatever the step.
            result[:, n_top : n_top + n_middle] = plain.principal_angles(basis, chosen[:, outer])[-1]
        return result

    # -------------------------------------------------------------------------------------- weights

    def weights(self, index: int, step: int, run: Run) -> FloatArray:
        return self.layer(index, step, run).dense()

    def layer(self, index: int, step: int, run: Run) -> LayerOperator:
        record, layer = find_record(run.steps, step), index + 1
        if self.layers is None:
            raise ValueError("the trajectory was saved without its initial weights: save(path, weights=True)")
        rho = {i: float(self.rho[record, column]) for i, column in self.scalars_of(layer).items()}
        complement = Complement(self.layers, self.bases, self.families, run._gram_eigen)
        return LayerOperator(complement, layer, self.cores[index][record], self.cores[index][0], rho)

    def apply_layer(self, index: int, X: FloatArray, step: int, run: Run) -> FloatArray:
        if isinstance(self.layers, ImplicitWeights):
            return self.layer(index, step, run) @ X
        return super().apply_layer(index, X, step, run)

    def initial_weights(self) -> Any:
        return self.layers.weights if isinstance(self.layers, ExplicitLayers) else self.layers

    def replace_initial_weights(self, weights: Any) -> Self:
        layers = weights if isinstance(weights, ImplicitWeights) else ExplicitLayers(weights)
        return replace(self, layers=layers)

    def decouple(self, run: Run, *, with_inputs: bool) -> Iterator[DecoupledNetwork]:
        widths, n_layers = run.widths, len(self.cores)
        dims = (self.cores[0].shape[2], *(core_.shape[1] for core_ in self.cores))
        outside = [d - a for d, a in zip(widths, dims, strict=True)]
        for family in self.families:
            for node in range(family.first - 1, family.last + 1):
                outside[node] -= family.multiplicity
        through = sum(f.multiplicity for f in self.families if (f.first, f.last) == (1, n_layers))
        if with_inputs and self.input_gram is not None and dims[0] + through < widths[0]:
            # S may differ from a multiple of the identity on directions that do not reach the outputs.
            yield from super().decouple(run, with_inputs=True)
            return
        gram = None if self.input_gram is None else self.input_gram.astype(np.float64)
        factor = np.eye(dims[0])
        if gram is not None:
            values, vectors = np.linalg.eigh(gram)
            factor = vectors * np.sqrt(np.maximum(values, 0.0))
        size = max(1, _SLICE_ENTRIES // max(1, sum(core_[0].size for core_ in self.cores)))
        for start in range(0, len(run.steps), size):
            layers = [core_[start : start + size].astype(np.float64) for core_ in self.cores]
            n = len(layers[0])
            active = Chain(0, n_layers, 1, dims, layers, n, factor)
            product = active.product(0, n_layers)
            residual = (product if gram is None else product @ gram) - self.target.astype(np.float64)
            chains = [replace(active, residual=residual)]
            column = 0
            for family in self.families:
                rho = self.rho[start : start + size, column : column + len(family.rho)]
                column += len(family.rho)
                coupling = 1.0 if gram is None else family.coupling
                chains.append(_chain_of_family(family, rho, n_layers, coupling))
            for node, count in enumerate(outside):
                if count > 0:
                    own = np.eye(1) if node == 0 else None
                    chains.append(Chain(node, node, count, (1,), (), n, own))
            yield DecoupledNetwork(widths, tuple(chains))

    def project(self, U: FloatArray, V: FloatArray) -> tuple[FloatArray, FloatArray]:
        return self.bases[-1].astype(np.float64).T @ U, self.bases[0].astype(np.float64).T @ V

    def active_chain(self) -> ActiveChain:
        n_layers = len(self.cores)
        through = []
        for i, family in enumerate(self.families):
            if (family.first, family.last) == (1, n_layers):
                columns = [self.scalars_of(layer)[i] for layer in range(1, n_layers + 1)]
                through.append((family.multiplicity, abs(float(np.prod(self.rho[-1, columns])))))
        norms = []
        for layer in range(1, n_layers + 1):
            outside = [
                self.families[i].multiplicity ** 0.5 * self.rho[-1, column]
                for i, column in self.scalars_of(layer).items()
            ]
            # Roots of sums of squares that neither overflow nor vanish.
            norms.append(float(np.hypot.reduce([0.0, *outside])))
        return ActiveChain([core_[-1] for core_ in self.cores], self.bases, through, norms)

    # ------------------------------------------------------------------------------ files and tables

    def record_arrays(self) -> Arrays:
        arrays: Arrays = {"rho": self.rho}
        pack_list("core", self.cores, arrays)
        return arrays

    def replace_records(self, arrays: Arrays) -> Self:
        cores = tuple(arrays[f"core_{i}"] for i in range(len(self.cores)))
        return replace(self, cores=cores, rho=arrays["rho"])

    def pack(self, arrays: Arrays, weights: bool) -> dict[str, Any]:
        arrays["rho"] = self.rho
        arrays["core_target"] = self.target
        if self.input_gram is not None:
            arrays["core_gram"] = self.input_gram
        sampled = self._describe_distribution(arrays.get("target_U"), arrays.get("target_V"))
        held: tuple[FloatArray, ...] | None = None
        if weights and isinstance(self.layers, ExplicitLayers):
            held = self.layers.weights
        elif weights and isinstance(self.layers, ImplicitWeights) and sampled is None:
            for i, (cols, rows) in enumerate(itertools.pairwise(self.layers.widths), start=1):
                check_sampled_size(i, (rows, cols), "save(path, weights=False) omits the layers")
            held = tuple(self.layers.dense(i + 1) for i in range(len(self.cores)))
        return {
            "engine": self.layout,
            "law": sampled,
            "bases": pack_list("basis", None if sampled else self.bases, arrays),
            "cores": pack_list("core", self.cores, arrays),
            "initial": pack_list("initial", held, arrays),
            "families": [asdict(family) for family in self.families],
            "n_values": self.n_values,
            "loss_scale": self.loss_scale,
        }

    def _describe_distribution(self, U: FloatArray | None, V: FloatArray | None) -> dict[str, Any] | None:
        """Return distribution and seed of lazily sampled layers, if these are enough to draw them again."""
        if not isinstance(self.layers, ImplicitWeights) or U is None or V is None:
            return None
        return self.layers.describe() if self.layers.is_determined_by(V, U) else None

    @classmethod
    def unpack(cls, meta: Mapping[str, Any], arrays: Arrays, config: Mapping[str, Any]) -> Self:
        sampled = meta["law"]
        if sampled is not None and sampled["widths"] != config["widths"]:
            raise ShapeError("the widths of lazily sampled weights are not those of the run")
        initial = unpack_list("initial", meta["initial"], arrays)
        layers: Layers | None = None if initial is None else ExplicitLayers(initial)
        bases = unpack_list("basis", meta["bases"], arrays)
        if sampled is not None:
            layers, bases = resample(sampled, arrays["target_U"], arrays["target_V"])
        return cls(
            bases=bases,
            cores=unpack_list("core", meta["cores"], arrays),
            families=tuple(Family(**{**f, "rho": tuple(f["rho"])}) for f in meta["families"]),
            rho=arrays["rho"],
            target=arrays["core_target"],
            input_gram=arrays.get("core_gram"),
            layers=layers,
            n_values=meta["n_values"],
            loss_scale=meta["loss_scale"],
        )

    def check(self, run: Run) -> None:
        n_records, widths, shapes = len(run.steps), run.widths, run.shapes
        n_layers, precision = len(shapes), np.dtype(run.config["dtype"])
        if len(self.bases) != n_layers + 1 or len(self.cores) != n_layers:
            raise ShapeError(
                f"the run has {len(self.bases)} bases and {len(self.cores)} cores; wanted {n_layers + 1} and "
                f"{n_layers} for {n_layers} layers"
            )
        dims = []
        if isinstance(self.bases, tuple):
            for i, width in enumerate(widths):
                check_array(self.bases[i], f"basis_{i}", (width, None))
                dims.append(self.bases[i].shape[1])
        else:  # bases of lazily sampled weights are computed when they are needed
            dims = [self.cores[0].shape[2], *(core_.shape[1] for core_ in self.cores)]
        for i, core_ in enumerate(self.cores):
            check_array(core_, f"core_{i}", (n_records, dims[i + 1], dims[i]), dtype=precision)
        for i, (dim, width) in enumerate(zip(dims, widths, strict=True)):
            if dim > width:
                raise ShapeError(f"basis_{i} has {dim} columns; wanted at most {width}")
        check_array(self.target, "core_target", (dims[-1], dims[0]))
        if self.input_gram is not None:
            check_array(self.input_gram, "core_gram", (dims[0], dims[0]))
        self._check_families(dims, widths)
        check_array(self.rho, "rho", (n_records, sum(len(f.rho) for f in self.families)), dtype=np.float64)
        if self.n_values is not None:
            check_count(self.n_values, "n_values", minimum=0)
        check_scale(self.loss_scale, "loss_scale")
        held = getattr(self.layers, "weights", None)
        if held is not None:
            check_matrices(held, "initial", shapes)

    def _check_families(self, dims: Sequence[int], widths: Sequence[int]) -> None:
        n_layers = len(widths) - 1
        taken = [0] * n_layers
        for i, family in enumerate(self.families):
            name = f"families[{i}]"
            last = check_count(family.last, f"{name}.last", maximum=n_layers)
            first = check_count(family.first, f"{name}.first", maximum=last)
            check_count(family.multiplicity, f"{name}.multiplicity", maximum=max(widths))
            check_scale(family.coupling, f"{name}.coupling")
            for value in family.rho:
                check_scale(value, f"{name}.rho", minimum=-np.inf)
            if len(family.rho) != last - first + 1:
                raise ShapeError(f"{name}.rho has {len(family.rho)} values; wanted {last - first + 1}")
            for layer in range(first - 1, last):
                taken[layer] += family.multiplicity
        outside = [width - dim for width, dim in zip(widths, dims, strict=True)]
        for layer, (count, room) in enumerate(zip(taken, itertools.pairwise(outside), strict=True)):
            if count > min(room):
                raise ValueError(
                    f"families: {count} directions run through layer {layer + 1}, which has {min(room)} "
                    "outside the active subspaces"
                )

    def add_variables(self, found: LayerVariables, run: Run) -> None:
        if self.n_values != 0:
            text = "singular values of W_l, descending"
            found.add("singular_values", OF_VALUES, text, partial(self.singular_values, run=run))
            text = "bounds on the errors of singular_values"
            found.add("singular_value_errors", OF_VALUES, text, partial(self.singular_value_errors, run=run))
        text = "singular values of W_l in the active subspaces, descending"
        found.add("active_singular_values", OF_ACTIVE_VALUES, text, lambda i: self._spectrum(i).values)
        for side in ("left", "right") if len(run.steps) else ():
            text = f"angles of the active {side} singular vectors to their limit for t -> 0+"
            read = partial(self.active_angles, side=side, reference="limit", run=run)
            found.add(f"active_{side}_angles", OF_ACTIVE_VALUES, text, read, "rad")
        if self.families:
            text = "scalar of W_l outside the active subspaces"
            found.add("rho", (*OF_LAYERS, "family"), text, self._rho_by_family)

    def _rho_by_family(self, index: int) -> Table:
        """Return the scalars of a layer for all families, NaN where one does not run through the layer."""
        result = np.full((len(self.rho), len(self.families)), np.nan)
        for family, column in self.scalars_of(index + 1).items():
            result[:, family] = self.rho[:, column]
        return result

    def coordinates(self) -> dict[str, tuple[str, Array]]:
        names = ("first", "last", "multiplicity") if self.families else ()
        return {
            f"family_{name}": ("family", np.array([getattr(family, name) for family in self.families]))
            for name in names
        }


def _chain_of_family(family: Family, rho: Table, n_layers: int, coupling: float) -> Chain:
    """Return one direction of a family, with its scalars (R, n) at some records, as a chain."""
    first, last = family.first - 1, family.last
    layers = [rho[:, i, None, None] for i in range(last - first)]
    factor = np.full((1, 1), np.sqrt(coupling)) if first == 0 else None
    residual = None
    if first == 0 and last == n_layers:
        residual = coupling * np.prod(rho, axis=1)[:, None, None]
    return Chain(
        first, last, family.multiplicity, (1,) * (last - first + 1), layers, len(rho), factor, residual
    )
