# SPDX-License-Identifier: MIT
"""`checkpoint_spectra`: singular values of the matrices in saved checkpoints, in bounded memory."""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from .._support.arrays import FloatArray, check_count, check_flag, check_path, check_scale
from .._support.text import format_count, format_table
from .._support.threads import MAX_THREADS
from .._tracking.svd_tracker import SVDTracker, TrackerRecord, is_decomposed
from .._trajectory.trajectory import Trajectory
from ._checkpoint_files import (
    CheckpointLike,
    list_checkpoints,
    order_checkpoints,
)
from ._checkpoint_matrices import (
    CheckpointMatrix,
    Dequantize,
    NameChoice,
    Of,
    Source,
    Sources,
    find_matrices,
    open_sources,
)
from ._checkpoint_report import summarise, write_files
from ._matrix_records import (
    MatrixRecords,
    MatrixSpectra,
    build_trajectory,
    check_number_of_values,
    has_own_vectors,
    make_tracker,
)
from ._names import format_names
from .operators import ProductMatrix, frobenius_norm

_KINDS: Final[tuple[Of, ...]] = ("weights", "change", "step")
_DESCRIPTIONS: Final[Mapping[Of, str]] = {
    "weights": "weights",
    "change": "changes since the first checkpoint, or the base,",
    "step": "changes since the previous checkpoint",
}
#: Number of entries from which a tracker copies a matrix to measure an unknown drift.
_MEASURED: Final = 2**20
#: A finite bound, for a first matrix, on the distance to a previous one: no copy is made for the next update.
_FAR: Final = 1e30
#: Largest number of further updates by the same matrix, if errors exceed the tolerance.
_REPEATS: Final = 3
#: Number of entries of the blocks in which distances are summed.
_BLOCK: Final = 2**20
#: Bytes that are read from mapped files before all are unmapped.
_MAPPED_BYTES: Final = 2**27


def checkpoint_spectra(
    paths: CheckpointLike | Sequence[CheckpointLike],
    *,
    base: CheckpointLike | None = None,
    layers: NameChoice = None,
    k: int | Literal["all"] = 16,
    steps: Sequence[int] | None = None,
    of: Of | Sequence[Of] | None = None,
    dequantize: Dequantize | None = None,
    key: str | None = None,
    vectors: bool = False,
    tolerance: float | None = None,
    seed: int = 0,
    n_threads: int = 0,
) -> CheckpointSpectra:
    """Compute the leading singular values, with error bounds, of all matrices in a series of checkpoints.

    No model is built. The matrices are read one after the other, each from all checkpoints, so that memory is
    needed for one matrix only, and each decomposition starts from the one of the checkpoint before.

    Parameters
    ----------
    paths : path, state dict, or sequence of them
        Checkpoints: safetensors files, files of `torch.save`, state dicts in memory, sharded files by their
        ``*.index.json``, folders of a model with one of these, and folders of LoRA adapters in the format of
        PEFT. A folder of checkpoints stands for those in it; of a folder with subfolders such as
        ``checkpoint-500``, only these are read.
    base : path or state dict, optional
        Checkpoint from which changes are measured, instead of the first one; for adapters the weights to
        which they are added.
    layers : str, regular expression, or sequence of them, optional
        Names or globs of matrices; None: all. Names are those of the state dict without ".weight".
    k : int or "all"
        Number of singular values of each matrix, at most all.
    steps : sequence of int, optional
        Step of each checkpoint, ascending. Default: the numbers in the names, as in ``checkpoint-500``,
        ``step_1000.pt`` or ``epoch3.safetensors``, by which the checkpoints are ordered; if a name has none,
        0, 1, .. in the order given.
    of : {"weights", "change", "step"} or sequence of them, optional
        Matrices to decompose: the weights W(t), their change W(t) - W(0) or W(t) - W(base), and the change
        from each checkpoint to the next. Default: all that are defined.
    dequantize : callable, optional
        Function ``(name, tensors)`` for matrices of other types than float64, float32, bfloat16 and float16.
        It returns tensor `name` of the mapping `tensors`, which reads a tensor when it is accessed, as real
        numbers, or None to skip it. Default: such matrices are skipped.
    key : str, optional
        Key of the state dict in files of `torch.save` with several; by default it is found.
    vectors : bool
        Whether to record the singular vectors for `Trajectory.singular_vectors` and
        `Trajectory.subspace_cosines`, with k (m + n) numbers for each record and matrix.
    tolerance : float, optional
        Largest allowed error, relative to the largest value, above which `SVDTracker` computes new bounds.
        Default: 1e-3 for matrices with a side of at most 4096, otherwise 0.05.
    seed : int
        Seed of the random test vectors used for the error bounds.
    n_threads : int
        Number of threads; 0: that of PyTorch.

    Returns
    -------
    CheckpointSpectra
        Result with ``.trajectory(of="weights")``, on which all plots and measures work.

    Raises
    ------
    FileNotFoundError
        For a missing file or folder, and a folder without checkpoints.
    ShapeError
        If a matrix has another shape in another checkpoint.
    TypeError, ValueError
        For a damaged file, a choice that matches no matrix, checkpoints with other names, a tensor with
        values that are not finite, and settings out of their range. The messages name the checkpoint and the
        tensor.

    Warns
    -----
    UserWarning
        If matrices of integers or other types are skipped.

    Notes
    -----
    A tensor with more than two axes is reshaped to (first, product of the others), as a convolution to (out,
    in kh kw); tensors with fewer axes are skipped. Some modules, such as the Conv1D of GPT-2, store the
    transpose of their matrix: it has the same singular values, and left and right vectors swap. bfloat16 and
    float16 are converted to float32. The errors include the rounding of differences in the precision of the
    checkpoints.

    A LoRA adapter is W = base + alpha / r B A. Its change is tracked as a product of thin factors and has r
    singular values; no m x n matrix is computed unless a side is at most 128, and no `base` is needed.
    Weights that an adapter stores as a whole (``modules_to_save``) are not read.

    Cost per matrix and checkpoint as for `track`. Memory: the largest matrix twice, three times with
    ``of="change"``, and the results. Files of `torch.save` from before PyTorch 1.6 are loaded as a whole.

    Angles are those to the vectors of the first record in which they are defined, within
    ``tracking(layer)["vector_error"]``.

    Examples
    --------
    >>> import torch
    >>> import dlnfast as dln
    >>> W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> found = dln.torch.checkpoint_spectra([{"fc.weight": W}, {"fc.weight": 2 * W}], k=2)
    >>> found.trajectory().singular_values("fc").round(3).tolist()
    [[3.0, 2.0], [6.0, 4.0]]
    >>> found.trajectory("change").singular_values("fc")[-1].round(3).tolist()
    [3.0, 2.0]
    """
    start = time.perf_counter()
    settings: dict[str, Any] = {
        "tolerance": None if tolerance is None else check_scale(tolerance, "tolerance"),
        "seed": check_count(seed, "seed", minimum=0),
        "n_threads": check_count(n_threads, "n_threads", minimum=0, maximum=MAX_THREADS),
    }
    k = check_number_of_values(k)
    with_vectors = check_flag(vectors, "vectors")
    chosen_kinds = _check_kinds(of)
    entries, numbers = order_checkpoints(list_checkpoints(paths), steps)
    sources = open_sources(entries, base, key, dequantize)
    kinds = _choose_kinds(chosen_kinds, sources)
    matrices, skipped = find_matrices(sources, layers, kinds)
    if skipped:
        warnings.warn(
            "matrices that are no float64, float32, bfloat16 or float16 are skipped: "
            f"{format_names(skipped)}; pass dequantize= to read them",
            UserWarning,
            stacklevel=2,
        )
    threads = settings["n_threads"] or torch.get_num_threads()
    found: list[dict[Of, MatrixSpectra]] = []
    for matrix in matrices:
        trackers = {
            each: make_tracker(
                matrix.shape,
                k,
                matrix.find_highest_rank(each),
                is_array=not matrix.is_product(each),
                **(settings | {"n_threads": threads}),
            )
            for each in kinds
        }
        found.append(_MatrixPass(matrix, sources, numbers, trackers, with_vectors).run())
    return CheckpointSpectra(
        layers=tuple(matrix.name for matrix in matrices),
        shapes=tuple(matrix.shape for matrix in matrices),
        steps=tuple(numbers),
        checkpoints=tuple(source.label for source in sources.all),
        base=None if sources.base is None else sources.base.label,
        kinds=kinds,
        skipped=tuple(skipped),
        seconds=time.perf_counter() - start,
        _spectra={each: tuple(spectra[each] for spectra in found) for each in kinds},
        _settings={"k": k, "vectors": with_vectors, **settings},
    )


@dataclass(frozen=True, eq=False)
class CheckpointSpectra:
    """Singular values of the matrices in a series of checkpoints; made by `checkpoint_spectra`.

    Attributes
    ----------
    layers : tuple of str
        Names of the matrices, in the order of the first checkpoint.
    shapes : tuple of (int, int)
        Rows and columns of the matrices.
    steps : tuple of int
        Steps of the checkpoints.
    checkpoints : tuple of str
        Paths of the checkpoints, or "state dict" and their number.
    base : str or None
        Path of the checkpoint from which changes are measured, if it is not the first one.
    kinds : tuple of str
        Matrices that were decomposed: "weights", "change" and "step".
    skipped : tuple of str
        Names of matrices that are no real floating-point numbers, and were skipped.
    seconds : float
        Run time.
    """

    layers: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]
    checkpoints: tuple[str, ...]
    base: str | None
    kinds: tuple[Of, ...]
    skipped: tuple[str, ...]
    seconds: float
    #: Records of each kind, one per matrix.
    _spectra: Mapping[Of, tuple[MatrixSpectra, ...]]
    #: Settings for `Trajectory.config`.
    _settings: Mapping[str, Any]

    def __repr__(self) -> str:
        """Return the numbers of matrices and checkpoints, and the kinds."""
        counts = format_count(len(self.layers), "matrix", "matrices")
        counts += f", {format_count(len(self.steps), 'checkpoint', 'checkpoints')}"
        return f"CheckpointSpectra({counts}, {', '.join(self.kinds)})"

    def trajectory(self, of: Of = "weights") -> Trajectory:
        """Return the singular values as records of a trajectory.

        Parameters
        ----------
        of : {"weights", "change", "step"}
            Matrices to return: W(t); W(t) - W(0) or W(t) - W(base); or the change from each checkpoint to the
            next, recorded at the step of the later one.

        Returns
        -------
        Trajectory
            Records at the steps of the checkpoints, with the names in `layers`, as of `SpectralTracker`.

        Raises
        ------
        ValueError
            If these matrices were not decomposed.
        """
        if of not in self.kinds:
            raise ValueError(f"of is {of!r}; of these checkpoints there are {', '.join(self.kinds)}")
        spectra = self._spectra[of]
        config = {
            "engine": "tracked",
            "of": of,
            "aliases": [[] for _ in self.layers],
            "layers": list(self.layers),
            "shapes": [list(shape) for shape in self.shapes],
            "checkpoints": list(self.checkpoints),
            "base": self.base,
            "steps": self.steps[-1],
            **self._settings,
        }
        return build_trajectory(
            spectra,
            self.steps[1:] if of == "step" else self.steps,
            config,
            f"{_DESCRIPTIONS[of]} of {len(spectra)} matrices in {len(self.steps)} checkpoints",
            seconds=self.seconds,
        )

    def table(self) -> str:
        """Return a table with the largest value, its bound and the stable rank of each matrix.

        Returns
        -------
        str
            Lines of a head and one row per matrix.
        """
        head, rows = summarise(self._trajectories())
        return format_table([head, *rows])

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write all values as files.

        Parameters
        ----------
        folder : path
            Folder, which is made if missing; files of these names are replaced.

        Returns
        -------
        list of Path
            ``spectra.csv``: a table with the columns step, layer, index, quantity, value and bound.
            ``spectra.json``: the same by kind and layer. ``report.html``: tables and pictures, which are
            drawn if matplotlib is installed; the page refers to no other file.

        Raises
        ------
        TypeError
            If `folder` is not a path.
        """
        metadata = {
            "steps": self.steps,
            "checkpoints": self.checkpoints,
            "base": self.base,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "settings": self._settings,
        }

        def draw_layer(run: Trajectory, name: str, ax: Any) -> None:
            from ..plots import SingularValueDisplay

            SingularValueDisplay.from_trajectory(run, name).plot(ax, legend=False)

        return write_files(check_path(folder, "folder"), metadata, self._trajectories(), draw_layer)

    def _trajectories(self) -> dict[str, Trajectory]:
        return {of: self.trajectory(of) for of in self.kinds}


def _check_kinds(of: Of | Sequence[Of] | None) -> tuple[Of, ...] | None:
    if of is None:
        return None
    kinds = (of,) if isinstance(of, str) else tuple(of)
    for each in kinds:
        if each not in _KINDS:
            raise ValueError(f"of holds {each!r}; wanted {', '.join(map(repr, _KINDS))}")
    if not kinds:
        raise ValueError("of is empty; wanted 'weights', 'change' or 'step'")
    return tuple(each for each in _KINDS if each in kinds)


def _choose_kinds(of: tuple[Of, ...] | None, sources: Sources) -> tuple[Of, ...]:
    """Return the kinds of matrices to decompose, after a check that they are defined."""
    several = len(sources.all) > 1
    missing: dict[Of, str] = {}
    if sources.adapted and sources.base is None:
        missing["weights"] = "the weights of an adapter need a base"
    if not (several or sources.adapted or sources.base is not None):
        missing["change"] = "the change of one checkpoint needs a base"
    if not several:
        missing["step"] = "a step needs two checkpoints"
    for each in of or ():
        if each in missing:
            raise ValueError(f"of holds {each!r}, but {missing[each]}")
    return of or tuple(each for each in _KINDS if each not in missing)


# --------------------------------------------------------------------------------------------------
# One matrix in all checkpoints
# --------------------------------------------------------------------------------------------------


class _MatrixPass:
    """The trackers of one matrix, on its way through all checkpoints.

    At most three arrays of its size are in memory: the current matrix, the previous one, whose memory is used
    for differences, and the first one, if changes since then are tracked.
    """

    def __init__(
        self,
        matrix: CheckpointMatrix,
        sources: Sources,
        steps: Sequence[int],
        trackers: Mapping[Of, SVDTracker],
        with_vectors: bool,
    ) -> None:
        self._matrix = matrix
        self._sources = sources
        self._steps = steps
        self._with_vectors = with_vectors
        self.records = {of: MatrixRecords(tracker) for of, tracker in trackers.items()}
        self._dense = [of for of in self.records if not matrix.is_product(of)]
        self._n_mapped = 0

    def run(self) -> dict[Of, MatrixSpectra]:
        """Track the matrix through all checkpoints, and return its records without the trackers."""
        if self._matrix.rank is not None:
            self._track_factors()
        if self._dense:
            self._track_arrays()
        return {of: records.spectra() for of, records in self.records.items()}

    def _read(self, source: Source) -> FloatArray:
        values = source.read(self._matrix)
        self._n_mapped += values.nbytes
        if self._n_mapped >= _MAPPED_BYTES:
            self._release()
        return values

    def _release(self) -> None:
        for source in (*self._sources.all, self._sources.base):
            if source is not None:
                source.release()
        self._n_mapped = 0

    def _track_arrays(self) -> None:
        first: FloatArray | None = None
        if "change" in self._dense and self._sources.base is not None:
            first = self._read(self._sources.base)
        previous: FloatArray | None = None
        #: Memory of the previous matrix, if it may be overwritten.
        spare: FloatArray | None = None
        moved = last_moved = 0.0
        step: TrackerRecord | None = None
        for i, source in enumerate(self._sources.all):
            current = self._read(source)
            last_moved, moved = moved, 0.0 if previous is None else _measure_distance(current, previous)
            drift = None if previous is None else moved
            if "weights" in self._dense:
                self._update("weights", i, current, drift, is_rounded=self._matrix.rank is not None)
            if "step" in self._dense and previous is not None:
                spare = np.subtract(current, previous, out=spare)
                distance = None if i == 1 else moved + last_moved
                step = self._update("step", i, spare, distance, is_rounded=True)
            if "change" in self._dense:
                first = current if first is None else first
                if i == 1 and step is not None and previous is first:
                    self._share_first_step(step)
                else:
                    self._update("change", i, np.subtract(current, first, out=spare), drift, is_rounded=True)
            previous = current
            spare = current if source.makes_copies and current is not first else None
        self._release()

    def _update(
        self, of: Of, index: int, values: FloatArray, drift: float | None, *, is_rounded: bool
    ) -> TrackerRecord:
        """Update a tracker by an array, whose Frobenius distance to the previous one is `drift`."""
        records = self.records[of]
        eps, last = float(np.finfo(values.dtype).eps), records.tracker.record
        if drift is not None and last is not None and is_rounded:
            drift = (1 + eps) * drift + eps * last.norm
        if values.size < _MEASURED:
            # Small matrices may be decomposed completely, if no bound on the distance is known.
            known = None if last is None or last.tier == "full" else drift
        else:
            known = _FAR if drift is None else drift
        with _name_tensor(self._sources.all[index].label, self._matrix.name):
            found = _update_until_certified(records.tracker, values, drift=known)
        if is_rounded:
            found = replace(found, errors=found.errors + 0.5 * eps * found.norm)
        self._append(of, index, found)
        return found

    def _share_first_step(self, found: TrackerRecord) -> None:
        """Record the first step as a change, too, instead of decomposing the same matrix again."""
        step, change = self.records["step"], self.records["change"]
        change.tracker = step.tracker
        self._append("change", 1, found)
        step.tracker = SVDTracker.from_state_dict(change.tracker.state_dict())

    def _track_factors(self) -> None:
        """Track updates of adapters as products of thin factors."""
        previous: tuple[torch.Tensor, torch.Tensor] | None = None
        for i, source in enumerate(self._sources.adapted):
            factors = source.read_factors(self._matrix)
            if "change" in self.records:
                self._update_product("change", i, factors, None)
            if "step" in self.records and previous is not None:
                self._update_product("step", i, factors, previous)
            previous = factors

    def _update_product(
        self,
        of: Of,
        index: int,
        factors: tuple[torch.Tensor, torch.Tensor],
        start: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        tracker = self.records[of].tracker
        with _name_tensor(self._sources.all[index].label, self._matrix.name):
            if is_decomposed(self._matrix.shape, tracker.k):
                product = factors[0] @ factors[1]
                values = product if start is None else product - start[0] @ start[1]
                found = tracker.update(values.numpy())
            else:
                operator = ProductMatrix(*factors, start)
                found = _update_until_certified(tracker, operator, squared_norm=operator.squared_norm())
        self._append(of, index, found)

    def _append(self, of: Of, index: int, found: TrackerRecord) -> None:
        records = self.records[of]
        records.append(found, self._with_vectors)
        if records.reference is None and has_own_vectors(found):
            records.set_reference(found, self._steps[index], None)


def _update_until_certified(
    tracker: SVDTracker,
    matrix: FloatArray | ProductMatrix,
    *,
    drift: float | None = None,
    squared_norm: float | None = None,
) -> TrackerRecord:
    """Update a tracker, and repeat that for a matrix that differs too much from the previous one."""
    found = tracker.update(matrix, drift=drift, squared_norm=squared_norm)
    for _ in range(_REPEATS):
        if found.completeness != "none":
            break
        found = tracker.update(matrix, drift=0.0, squared_norm=squared_norm)
    return found


def _measure_distance(a: FloatArray, b: FloatArray) -> float:
    """Return a bound on ``||a - b||_F`` of two contiguous arrays, without a whole difference."""
    x, y = torch.from_numpy(a.reshape(-1)), torch.from_numpy(b.reshape(-1))
    parts = [
        frobenius_norm(x[first : first + _BLOCK] - y[first : first + _BLOCK])
        for first in range(0, len(x), _BLOCK)
    ]
    return (1 + float(np.finfo(a.dtype).eps)) * math.hypot(*parts)


@contextlib.contextmanager
def _name_tensor(label: str, name: str) -> Iterator[None]:
    """Name the checkpoint and the tensor in errors of a tracker."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"checkpoint {label}: tensor {name}: {error}") from error
