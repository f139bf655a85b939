# SPDX-License-Identifier: MIT
"""`SampleProblem`: losses that need the samples at every step, with mini-batches and label noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .._support.arrays import (
    FloatArray,
    IntArray,
    as_array,
    as_layers,
    as_list,
    as_matrix,
    as_vector,
    check_choice,
    check_count,
    check_flag,
    check_scale,
    random_generator,
)
from .._support.errors import ShapeError
from .data import as_labels, one_hot

LOSSES: Final = ("squared", "cross-entropy", "logistic")
#: Number of samples that `SampleProblem.loss` multiplies with the layers at a time.
_CHUNK_SAMPLES: Final = 4096


class SampleProblem:
    r"""A loss over samples, ``l = c sum_j loss(z_j, y_j)``.

    The outputs are ``z_j = W_L .. W_1 x_j``.
    Unlike `Problem`, it keeps the samples, because the gradient of these losses does not follow from
    ``S = X X^T`` and ``Phi = Y X^T``. `train` runs it with
    ``engine="torch"``, on full batches or mini-batches.

    Parameters
    ----------
    X : array_like, shape (d_x, N)
        Inputs, one sample per column. A C-contiguous float32 or float64 array is not copied, and must not
        change as long as the problem exists.
    Y : array_like
        Targets. Squared loss: shape (d_y, N), or integer labels (N,) for their one-hot columns.
        Cross-entropy: integer labels (N,) in 0 .. K - 1, or their one-hot columns (K, N). Logistic: integers
        (N,), -1 and 1, or 0 and 1, for one output.
    loss : {"squared", "cross-entropy", "logistic"}
        Loss of a sample: ``1/2 ||z - y||^2``; ``log sum_k exp(z_k) - z_y``; ``log(1 + exp(-y z))``, y = -1
        or 1.
    loss_scale : float, optional
        c, positive. Default: 1 / (d_y N) for the squared loss, as in `Problem.from_data`, and 1 / N for the
        other losses, their mean. **It rescales every learning rate.**
    batch_size : int, optional
        Number B of samples of a mini-batch, 1 .. N. Default: all samples at every step.
    label_noise : float
        Squared loss: standard deviation of Gaussian noise that is added to every entry of the targets.
        Otherwise: probability in [0, 1] with which a label is replaced by one of the others. The noise is
        drawn afresh at every step.
    seed : int
        Seed of mini-batches and label noise, from 0 to 2**64 - 1.
    biases : bool
        Whether each layer has a bias b_l, which starts at zero: ``z_l = W_l z_{l-1} + b_l``. Biases follow
        the update rule of their layer, weight decay included.
    n_classes : int, optional
        Number K of classes, for labels that lack the last ones. Default: the largest label plus 1.

    Attributes
    ----------
    inputs : ndarray, shape (d_x, N)
        X.
    outputs : ndarray, shape (d_y, N), or None
        Targets of the squared loss; None for labels.
    labels : ndarray of int64, shape (N,), or None
        Classes of the cross-entropy, or signs -1 and 1 of the logistic loss.
    loss_name : str
        Name of the loss.
    dim_in, dim_out, n_samples : int
        d_x, d_y (K for the cross-entropy, 1 for the logistic loss) and N.
    loss_scale, batch_size, label_noise, seed, has_biases
        Values of the parameters.

    Raises
    ------
    TypeError, ShapeError
        If an array has the wrong type or shape, such as labels that are not integers.
    ValueError
        If a value is not finite, a label or a setting is out of range, or columns are not one-hot.

    Notes
    -----
    The samples of every epoch are permuted and cut into ceil(N / B) mini-batches; the last one has fewer
    samples if B does not divide N. The loss of a mini-batch is multiplied by N over its size, so that it
    estimates ``l`` without bias over the choice of the permutation, and a learning rate means the same for
    every batch size. Permutation and noise are functions of the seed and of the step: Philox streams, drawn
    on the host. The same seed gives the same batches on every machine and device, and in a resumed run.

    No closure is known for these runs: see `reason_without_closure`.

    Examples
    --------
    >>> import numpy as np
    >>> from dlnfast import SampleProblem
    >>> X = np.random.default_rng(0).standard_normal((4, 10))
    >>> problem = SampleProblem(X, np.arange(10) % 3, loss="cross-entropy", batch_size=4)
    >>> problem.dim_out, problem.steps_per_epoch, round(problem.loss([np.zeros((3, 4))]), 4)  # log 3
    (3, 3, 1.0986)
    >>> sorted(int(j) for step in range(3) for j in problem.batch(step))
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    #: These attributes have the values of a `Problem` without statistics.
    input_gram: None = None
    gram_eigen: None = None
    whitening: None = None
    classes: None = None
    reduction: None = None
    #: A lower bound of the loss; its minimum is not computed.
    loss_floor: float = 0.0

    def __init__(
        self,
        X: npt.ArrayLike,
        Y: npt.ArrayLike,
        *,
        loss: str = "squared",
        loss_scale: float | None = None,
        batch_size: int | None = None,
        label_noise: float = 0.0,
        seed: int = 0,
        biases: bool = False,
        n_classes: int | None = None,
    ) -> None:
        self.loss_name: str = check_choice(loss, "loss", LOSSES)
        self.inputs: FloatArray = as_matrix(X, "X", symbol="inputs")
        self.dim_in, self.n_samples = self.inputs.shape
        self.outputs: FloatArray | None = None
        self.labels: IntArray | None = None
        if n_classes is not None and loss == "logistic":
            raise ValueError('n_classes is set, but loss is "logistic", which has two classes')
        self._read_targets(Y, None if n_classes is None else check_count(n_classes, "n_classes"))
        n_terms = self.n_samples * (self.dim_out if loss == "squared" else 1)
        self.loss_scale = 1.0 / n_terms
        if loss_scale is not None:
            self.loss_scale = check_scale(loss_scale, "loss_scale", strict=True)
        self.batch_size = batch_size
        if batch_size is not None:
            self.batch_size = check_count(batch_size, "batch_size", maximum=self.n_samples)
        at_most = None if loss == "squared" else 1.0
        self.label_noise = check_scale(label_noise, "label_noise", at_most=at_most)
        self.seed = check_count(seed, "seed", minimum=0, maximum=2**64 - 1)
        self.has_biases = check_flag(biases, "biases")
        #: The epoch whose order of samples was drawn last, with that order.
        self._epoch: tuple[int, IntArray] = (-1, np.empty(0, dtype=np.int64))

    # ----------------------------------------------------------------------------------------- targets

    def _read_targets(self, Y: object, n_classes: int | None) -> None:
        """Set the targets and the number of outputs."""
        array = as_array(Y, "Y")
        if array.ndim == 1 or self.loss_name == "logistic":
            labels = as_labels(array, "Y")
            self._check_n_samples(labels.size)
            if self.loss_name == "logistic":
                self.labels, self.dim_out = _as_signs(labels), 1
                return
            self.labels, self.dim_out = labels, _count_classes(labels, n_classes)
            if self.loss_name == "squared":
                self.outputs, self.labels = one_hot(labels, range(self.dim_out)), None
        else:
            columns = as_matrix(array, "Y", symbol="targets")
            self._check_n_samples(columns.shape[1])
            self.dim_out = columns.shape[0]
            if n_classes is not None and n_classes != self.dim_out:
                raise ShapeError(f"Y has {self.dim_out} rows; wanted {n_classes}, n_classes")
            if self.loss_name == "squared":
                self.outputs = columns
            else:
                self.labels = _read_one_hot(columns)
        if self.loss_name == "cross-entropy" and self.dim_out < 2:
            raise ValueError("Y has one class; wanted at least two for the cross-entropy")

    def _check_n_samples(self, n: int) -> None:
        if n != self.n_samples:
            raise ShapeError(f"X has {self.n_samples} samples and Y has {n}; wanted as many")

    # ----------------------------------------------------------------------------------------- batches

    @property
    def shape(self) -> tuple[int, int]:
        """(d_y, d_x)."""
        return self.dim_out, self.dim_in

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in which every sample is used once: ceil(N / B); 1 for full batches."""
        return 1 if self.batch_size is None else -(-self.n_samples // self.batch_size)

    @property
    def is_stochastic(self) -> bool:
        """Whether the loss of a step differs from the full loss: with mini-batches or label noise."""
        return self.batch_size is not None or self.label_noise > 0

    def batch(self, step: int) -> IntArray:
        """Return the samples of the mini-batch of a step.

        Parameters
        ----------
        step : int
            Step t of a run, from 0.

        Returns
        -------
        ndarray of int64, shape (n,)
            Columns of X, in the order of their use; all in their own order for full batches.

        Raises
        ------
        TypeError, ValueError
            If `step` is not an integer from 0.

        Notes
        -----
        The permutation of epoch ``t // steps_per_epoch`` sorts N random 64-bit integers; O(N log N) once per
        epoch.
        """
        number = check_count(step, "step", minimum=0)
        if self.batch_size is None:
            return np.arange(self.n_samples)
        epoch, position = divmod(number, self.steps_per_epoch)
        known, order = self._epoch
        if known != epoch:
            generator = random_generator(self.seed, ("mini-batches",), epoch)
            numbers = generator.bit_generator.random_raw(self.n_samples)
            order = np.argsort(numbers, kind="stable").astype(np.int64, copy=False)
            self._epoch = epoch, order
        return order[position * self.batch_size : (position + 1) * self.batch_size]

    def targets(self, step: int) -> npt.NDArray[Any]:
        """Return the targets of the mini-batch of a step, with the label noise of that step.

        Parameters
        ----------
        step : int
            Step t of a run, from 0.

        Returns
        -------
        ndarray, shape (d_y, n) or (n,)
            Columns of targets for the squared loss, otherwise labels, in the order of `batch`.

        Raises
        ------
        TypeError, ValueError
            If `step` is not an integer from 0.

        Notes
        -----
        Cost: O(d_y n), and that of `batch`.
        """
        which = self.batch(step)
        generator = random_generator(self.seed, ("label noise",), step)
        if self.outputs is not None:
            clean: npt.NDArray[Any] = self.outputs if self.batch_size is None else self.outputs[:, which]
            if self.label_noise == 0:
                return clean
            return clean + self.label_noise * generator.standard_normal(clean.shape)
        assert self.labels is not None
        labels = self.labels[which]
        if self.label_noise == 0:
            return labels
        flips, others = generator.random((2, labels.size))
        is_flipped = flips < self.label_noise
        if self.loss_name == "logistic":
            return np.where(is_flipped, -labels, labels)
        shift = 1 + (others * (self.dim_out - 1)).astype(np.int64)
        return np.where(is_flipped, (labels + shift) % self.dim_out, labels)

    # -------------------------------------------------------------------------------------------- loss

    def loss(self, weights: Sequence[npt.ArrayLike], biases: Sequence[npt.ArrayLike] | None = None) -> float:
        """Return the full loss: all samples, without label noise.

        Parameters
        ----------
        weights : sequence of array_like
            Layers ``W_1 .. W_L``; a list of one end-to-end matrix is a network of one layer.
        biases : sequence of array_like, shape (d_l,), optional
            Biases ``b_1 .. b_L``. Default: zeros.

        Returns
        -------
        float
            The loss; infinity if it overflows.

        Raises
        ------
        TypeError, ShapeError
            If a layer or a bias has the wrong type or shape.
        ValueError
            If an entry is not finite.

        Notes
        -----
        In float64, a few thousand samples at a time. Cost: O(N sum_l d_l d_{l-1}).
        """
        layers = [w.astype(np.float64) for w in as_layers(weights, columns=(self.dim_in, "the rows of X"))]
        if len(layers[-1]) != self.dim_out:
            raise ShapeError(f"the last of weights has {len(layers[-1])} rows; wanted {self.dim_out}")
        shifts = [np.zeros((len(w), 1)) for w in layers]
        if biases is not None:
            known = as_list(biases, "biases", "one vector per layer")
            if len(known) != len(layers):
                raise ShapeError(f"biases has {len(known)} vectors; wanted {len(layers)}, one per layer")
            shifts = [
                as_vector(b, f"biases[{i}]", length=len(w), dtype=np.float64)[:, np.newaxis]
                for i, (b, w) in enumerate(zip(known, layers, strict=True))
            ]
        total = 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, self.n_samples, _CHUNK_SAMPLES):
                part = slice(start, start + _CHUNK_SAMPLES)
                values = self.inputs[:, part].astype(np.float64)
                for weight, shift in zip(layers, shifts, strict=True):
                    values = weight @ values + shift
                total += self._sum_losses(values, part)
        return self.loss_scale * total if np.isfinite(total) else float("inf")

    def _sum_losses(self, values: FloatArray, part: slice) -> float:
        """Return the sum of the losses of a range of samples with these outputs."""
        if self.outputs is not None:
            return 0.5 * float(np.sum((values - self.outputs[:, part]) ** 2))
        assert self.labels is not None
        labels = self.labels[part]
        if self.loss_name == "logistic":
            return float(np.sum(np.logaddexp(0.0, -labels * values[0])))
        highest = values.max(axis=0)
        log_sums = highest + np.log(np.sum(np.exp(values - highest), axis=0))
        return float(np.sum(log_sums - values[labels, np.arange(labels.size)]))

    # ----------------------------------------------------------------------------------------- engines

    @property
    def reason_without_closure(self) -> str:
        """The reason why no reduced model of the run is known, as in the certificate of the run."""
        if self.loss_name != "squared":
            return (
                f"no closure: the gradient of the {self.loss_name} loss is a nonlinear function of the "
                "outputs, which S and Phi do not determine"
            )
        if self.batch_size is not None:
            return "no closure: every mini-batch has its own S and Phi; this noise leaves the subspaces"
        if self.label_noise > 0:
            return "no closure: label noise changes Phi at every step and leaves the subspaces"
        if self.has_biases:
            return "no closure: the theorem is about layers without biases"
        return (
            "no closure was sought, because every step reads the samples: Problem.from_data(X, Y) has the "
            "same loss, and engines that need S and Phi only"
        )

    # ------------------------------------------------------------------------------------------- files

    def describe(self) -> dict[str, Any]:
        """Return the configuration as JSON values."""
        return {
            "source": {"name": "samples"},
            "kind": "samples",
            "dim_in": self.dim_in,
            "dim_out": self.dim_out,
            "n_samples": self.n_samples,
            "loss_scale": self.loss_scale,
            "reduction": None,
            **self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        return {
            "loss": self.loss_name,
            "batch_size": self.batch_size,
            "label_noise": self.label_noise,
            "seed": self.seed,
            "biases": self.has_biases,
        }

    def to_arrays(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """Return settings and arrays from which `from_arrays` reconstructs the problem.

        Returns
        -------
        settings : dict
            JSON values.
        arrays : dict of str to ndarray
            The samples.
        """
        settings = {**self._settings(), "loss_scale": self.loss_scale, "shape": list(self.shape)}
        targets = self.labels if self.outputs is None else self.outputs
        assert targets is not None
        return settings, {"sample_inputs": self.inputs, "sample_targets": targets}

    @classmethod
    def from_arrays(
        cls, settings: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]
    ) -> SampleProblem:
        """Reconstruct a problem from the result of `to_arrays`.

        Parameters
        ----------
        settings : mapping
            Settings of `to_arrays`; other entries are ignored.
        arrays : mapping of str to ndarray
            Arrays of `to_arrays`.

        Returns
        -------
        SampleProblem
        """
        names = ("loss", "loss_scale", "batch_size", "label_noise", "seed", "biases")
        has_classes = settings["loss"] == "cross-entropy"
        return cls(
            arrays["sample_inputs"],
            arrays["sample_targets"],
            n_classes=settings["shape"][0] if has_classes else None,
            **{name: settings[name] for name in names},
        )

    def __repr__(self) -> str:
        """Return the dimensions, the loss, the batch size and the scale of the loss."""
        batch = "full batches" if self.batch_size is None else f"batch_size={self.batch_size}"
        noise = f", label_noise={self.label_noise:g}" if self.label_noise else ""
        return (
            f"SampleProblem({self.dim_in} -> {self.dim_out}, {self.n_samples} samples, {self.loss_name} "
            f"loss, {batch}{noise}, loss_scale={self.loss_scale:.6g})"
        )


def _count_classes(labels: IntArray, n_classes: int | None) -> int:
    """Return the number of classes, after a check that all labels are below it."""
    count = int(labels.max()) + 1 if n_classes is None else n_classes
    is_outside = (labels < 0) | (labels >= count)
    if is_outside.any():
        sample = int(np.argmax(is_outside))
        wanted = "of at least 0" if n_classes is None else f"in 0 .. {count - 1}"
        raise ValueError(f"Y[{sample}] is {labels[sample]}; wanted labels {wanted}")
    return count


def _as_signs(labels: IntArray) -> IntArray:
    """Convert labels -1 and 1, or 0 and 1, to signs."""
    found = set(np.unique(labels).tolist())
    if not (found <= {-1, 1} or found <= {0, 1}):
        raise ValueError(
            f"Y has the labels {sorted(found)[:5]}; wanted -1 and 1, or 0 and 1, for the logistic loss"
        )
    return np.where(labels == 1, 1, -1)


def _read_one_hot(columns: FloatArray) -> IntArray:
    """Return the row of the single 1 in each column; raise ValueError for other columns."""
    ones = columns == 1
    is_one_hot = ((columns == 0) | ones).all(axis=0) & (ones.sum(axis=0) == 1)
    if not is_one_hot.all():
        sample = int(np.argmin(is_one_hot))
        raise ValueError(
            f"column {sample} of Y is not one-hot; wanted a single 1 and zeros, or integer labels (N,)"
        )
    labels: IntArray = np.argmax(ones, axis=0).astype(np.int64)
    return labels
