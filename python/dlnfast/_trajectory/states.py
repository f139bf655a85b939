# SPDX-License-Identifier: MIT
"""`States`: the records of an engine, and the answers that depend on how the engine records layers.

Layers are counted from 0 here (`index`), and from 1 in the methods of `Trajectory`, which document the
answers. A new engine with records of its own is a new subclass, listed in `trajectory.STATES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, Protocol, Self

import numpy as np
import numpy.typing as npt

from .._closure.certificate import Certificate
from .._closure.family import Family
from .._support.arrays import FloatArray, IntArray, check_count
from .._support.files import Arrays
from .._support.products import multiply
from .chains import Chain, DecoupledNetwork
from .variables import Array, LayerVariables

if TYPE_CHECKING:
    from .._closure.operators import LayerOperator

#: Outcomes of complete runs: no divergence, no interruption.
COMPLETE = ("finished", "converged", "stopped")
#: Error message for states without singular values.
NO_VALUES = "no singular values were recorded: train(..., record=dln.Record(singular_values=...))"
Table = npt.NDArray[np.float64]


class Run(Protocol):
    """The facts of a run that its states, the checks and the tables read. `Trajectory` has them."""

    steps: IntArray
    loss: Table
    loss_steps: IntArray
    rates: Table | None
    times: Table | None
    config: dict[str, Any]
    certificate: Certificate
    wall_time: float
    states: States

    @property
    def engine(self) -> str: ...

    @property
    def widths(self) -> list[int]: ...

    @property
    def shapes(self) -> list[tuple[int, int]]: ...

    @property
    def n_layers(self) -> int: ...

    @property
    def layer_names(self) -> list[str]: ...

    @property
    def rank(self) -> int: ...

    @property
    def is_rank_known(self) -> bool: ...

    @property
    def _inputs_and_target(self) -> tuple[FloatArray, FloatArray | None, FloatArray] | None:
        """F, S (None for the identity) and Phi as arrays; None without a problem that has them."""
        ...

    @property
    def _gram_eigen(self) -> tuple[FloatArray, FloatArray] | None:
        """Eigenvalues and eigenvectors of S; None where S = I, or without a problem."""
        ...

    def _gradients(self, weights: Sequence[FloatArray]) -> list[FloatArray]:
        """Return the gradients of the loss at these weights, one per layer."""
        ...


class ActiveChain(NamedTuple):
    """The layers at the last record as cores between orthonormal bases, and scalars outside of these."""

    cores: list[FloatArray]
    #: A_0 .. A_L.
    bases: Sequence[FloatArray]
    #: Multiplicity and singular value in W_{L:1} of each family that runs through all layers.
    through: list[tuple[int, float]]
    #: Frobenius norm of each layer outside the bases.
    norms_outside: list[float]


class States(ABC):
    """Records of an engine."""

    #: Name of the layout of arrays and metadata in files.
    layout: ClassVar[str]
    #: Whether the loss of every step from 0 on is known, as it is where `train` computes it.
    has_every_loss: ClassVar[bool] = True
    #: Whether files of finished runs hold the last weights.
    has_final_weights: ClassVar[bool] = False
    #: Whether the singular values have error bounds and refreshes of an `SVDTracker`.
    has_tracker_records: ClassVar[bool] = False
    #: Steps of the recorded whole weights.
    snapshot_steps: IntArray = np.empty(0, dtype=np.int64)
    #: Error messages for a run without problem, and for one without losses.
    missing_problem: ClassVar[str] = "the trajectory was saved without its problem"
    missing_losses: ClassVar[str] = "nothing is recorded yet"

    # ------------------------------------------------------------------------------ singular values

    @abstractmethod
    def singular_values(self, index: int, run: Run) -> FloatArray:
        """Answer `Trajectory.singular_values`."""

    @abstractmethod
    def singular_value_errors(self, index: int, run: Run) -> Table:
        """Answer `Trajectory.singular_value_errors`."""

    @abstractmethod
    def branches(self, index: int) -> IntArray:
        """Answer `Trajectory.branches`."""

    @abstractmethod
    def clusters(self, index: int) -> IntArray:
        """Answer `Trajectory.clusters`."""

    @abstractmethod
    def followed_values(self, index: int, run: Run) -> FloatArray:
        """Return the singular values that `branches` and `clusters` refer to, in their order."""

    @abstractmethod
    def tracking_of(self, index: int, run: Run) -> dict[str, Array]:
        """Answer `Trajectory.tracking`."""

    def active_singular_values(self, index: int, run: Run) -> FloatArray:
        """Answer `Trajectory.active_singular_values`."""
        self._refuse("active_singular_values", run)

    def rho_of(self, index: int, family: int | None, run: Run) -> Table:
        """Answer `Trajectory.rho`."""
        self._refuse("rho", run)

    def list_families(self, run: Run) -> tuple[Family, ...]:
        """Answer `Trajectory.families`."""
        self._refuse("families", run)

    def multiplicity(self, index: int, run: Run) -> int:
        """Answer `Trajectory.multiplicity`."""
        self._refuse("multiplicity", run)

    # --------------------------------------------------------------------------- vectors and angles

    @abstractmethod
    def singular_vectors(self, index: int, side: str, record: int) -> FloatArray:
        """Answer `Trajectory.singular_vectors`."""

    @abstractmethod
    def angles(self, index: int, side: str, reference: str | npt.ArrayLike, run: Run) -> Table:
        """Answer `Trajectory.angles`."""

    def active_angles(self, index: int, side: str, reference: str, run: Run) -> Table:
        """Answer `Trajectory.active_angles`."""
        self._refuse("active_angles", run)

    def block_angles(self, index: int, side: str) -> Table:
        """Answer `Trajectory.block_angles`."""
        raise ValueError("block_angles belongs to tracked models; this run has angles(layer, side)")

    # ------------------------------------------------------------------------------ losses and biases

    def full_loss(self, run: Run) -> Table:
        """Answer `Trajectory.full_loss`."""
        if not self.has_every_loss:
            raise ValueError("full_loss belongs to runs of train; this run has the losses that were reported")
        return run.loss[run.steps]

    def biases_of(self, index: int) -> FloatArray:
        """Answer `Trajectory.biases`."""
        raise ValueError("the run has no biases: dln.SampleProblem(..., biases=True) trains them")

    # -------------------------------------------------------------------------------------- weights

    @abstractmethod
    def weights(self, index: int, step: int, run: Run) -> FloatArray:
        """Answer `Trajectory.weights`."""

    def layer(self, index: int, step: int, run: Run) -> LayerOperator:
        """Answer `Trajectory.layer`."""
        self._refuse("layer", run)

    def apply_layer(self, index: int, X: FloatArray, step: int, run: Run) -> FloatArray:
        """Return the product of a layer and a matrix."""
        return multiply(self.weights(index, step, run), X)

    def decouple(self, run: Run, *, with_inputs: bool) -> Iterator[DecoupledNetwork]:
        """Yield the network as a sum of chains, for consecutive slices of the records.

        Parameters
        ----------
        run : Run
        with_inputs : bool
            Whether the chains must split S and Phi too. Otherwise they may have no residuals.
        """
        facts = run._inputs_and_target if with_inputs else None
        for step in run.steps:
            layers = [self.weights(i, int(step), run).astype(np.float64) for i in range(run.n_layers)]
            yield decouple_whole_layers(layers, facts)

    def project(self, U: FloatArray, V: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return columns of outputs and of inputs in the bases of the first chain of `decouple`."""
        return U, V

    def initial_weights(self) -> Any:
        """Return W(0) as `train` takes it; None where it is not known."""
        return None

    def replace_initial_weights(self, weights: Any) -> States:
        """Return the states with W(0) of the caller, for files that do not hold it."""
        raise TypeError(f"{type(self).__name__} has no initial weights")

    def active_chain(self) -> ActiveChain | None:
        """Return the last layers in small bases; None where only the layers themselves are known."""
        return None

    def enclose(self, first: FloatArray, last: FloatArray, run: Run) -> States:
        """Return the states of a network with two more layers around these, which do not move."""
        raise TypeError(f"{type(self).__name__} cannot be enclosed by layers that do not move")

    # ------------------------------------------------------------------------------ files and tables

    @abstractmethod
    def record_arrays(self) -> Arrays:
        """Return all arrays that grow during a run, under their names in files."""

    @abstractmethod
    def replace_records(self, arrays: Arrays) -> Self:
        """Return the states with other `record_arrays`."""

    @abstractmethod
    def pack(self, arrays: Arrays, weights: bool) -> dict[str, Any]:
        """Add the arrays of a file, with or without whole weights; return the metadata, in JSON values."""

    @classmethod
    @abstractmethod
    def unpack(cls, meta: Mapping[str, Any], arrays: Arrays, config: Mapping[str, Any]) -> Self:
        """Return the states that `pack` described."""

    @classmethod
    def add_final_weights(cls, meta: dict[str, Any], arrays: Arrays, final: Arrays) -> None:
        """Add the last weights, from the last state of a checkpointed run, to the result of `pack`."""
        raise TypeError(f"{cls.__name__} holds no final weights")

    @abstractmethod
    def check(self, run: Run) -> None:
        """Raise unless the arrays fit each other and the run.

        Raises
        ------
        ValueError
            The message names the array, its shape or dtype, and the wanted one.
        """

    @abstractmethod
    def add_variables(self, found: LayerVariables, run: Run) -> None:
        """Add the variables for `Trajectory.to_xarray` and `export`."""

    def coordinates(self) -> dict[str, tuple[str, Array]]:
        """Return coordinates that do not grow, with their dimension, beyond those of the layers."""
        return {}

    def describe(self, run: Run) -> str:
        """Return the text of ``repr(run)``."""
        if not len(run.loss):
            return f"{run.engine}, widths {run.widths}, nothing recorded yet"
        extent = f"{len(run.loss) - 1} steps"
        if run.times is not None:  # of a gradient flow, whose steps are indices of its times
            extent = f"gradient flow to time {float(run.times[-1]):g}"
        return (
            f"{run.engine}, widths {run.widths}, {extent}, {len(run.steps)} records, "
            f"loss {run.loss[0]:.4g} -> {run.loss[-1]:.4g}"
        )

    def _refuse(self, name: str, run: Run) -> NoReturn:
        raise ValueError(
            f"{name} belongs to the reduced engine; every engine has singular_values(layer). This run: "
            f"{run.certificate}"
        )


def decouple_whole_layers(
    layers: Sequence[FloatArray], facts: tuple[FloatArray, FloatArray | None, FloatArray] | None
) -> DecoupledNetwork:
    """Return whole layers, with F, S and Phi, as a network of one chain at one record."""
    widths = [layers[0].shape[1], *(layer.shape[0] for layer in layers)]
    factor = residual = None
    if facts is not None:
        factor, gram, target = facts
        product = layers[0]
        for layer in layers[1:]:
            product = multiply(layer, product)
        residual = ((product if gram is None else multiply(product, gram)) - target)[None]
    chain = Chain(0, len(layers), 1, tuple(widths), [layer[None] for layer in layers], 1, factor, residual)
    return DecoupledNetwork(widths, (chain,), is_whole=True)


def find_record(steps: IntArray, step: int) -> int:
    """Return the index of the record of a step; -1 is the last one.

    Raises
    ------
    ValueError
        If that step was not recorded.
    """
    if not len(steps):
        raise ValueError("the run has recorded nothing yet")
    if check_count(step, "step", minimum=-1) == -1:
        return len(steps) - 1
    found = int(np.searchsorted(steps, step))
    if found == len(steps) or steps[found] != step:
        raise ValueError(f"step is {step}, which is not among the recorded steps {shorten_steps(steps)}")
    return found


def shorten_steps(steps: Sequence[int] | IntArray) -> str:
    """Return a list of steps as text, in the middle cut short."""
    numbers = [int(step) for step in steps]
    if len(numbers) <= 8:
        return str(numbers)
    return f"[{numbers[0]}, {numbers[1]}, {numbers[2]}, .., {numbers[-1]}]"
