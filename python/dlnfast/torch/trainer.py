# SPDX-License-Identifier: MIT
"""`Trainer`: a plain training loop for classifiers, reproducible by seed and resumable."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from .._support.arrays import check_choice, check_count, check_scale
from .._support.errors import DivergedError
from .._support.files import atomic_file, is_machine_error
from .._tracking.svd_tracker import check_state_checksum, with_state_checksum
from ._names import match_names
from .descent import find_device
from .images import Batches, Samples, derive_pass_seed
from .statistics import check_labels, find_float64_device
from .track import SpectralTracker

__all__ = ["Evaluation", "History", "Trainer"]

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_OPTIMIZERS: Final = ("sgd", "adamw")
_SCHEDULES: Final = ("cosine", "constant")
_LOSSES: Final = ("cross_entropy", "squared")
#: Stream of random numbers for dropout, independent of the order of samples.
_DROPOUT: Final = 1


@dataclass
class History:
    """Losses, accuracies and learning rates of the epochs of a training.

    Attributes
    ----------
    loss, accuracy : list of float
        Means over the training samples of each epoch, in training mode, with the weights at each batch.
    learning_rate : list of float
        Learning rate of the first parameter group in each epoch.
    test_accuracy : list of float
        Accuracies on the test samples, in evaluation mode, after the epochs in `test_epochs`.
    test_epochs : list of int
        Numbers of epochs at which the test accuracy was measured.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    test_epochs: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy in evaluation mode.

    Attributes
    ----------
    loss : float
        Mean loss over the samples.
    accuracy : float
        Share of correctly classified samples, 0 to 1.
    """

    loss: float
    accuracy: float


class Trainer:
    r"""Training of a classifier on samples in memory.

    Parameters
    ----------
    model : Module
        Classifier, which maps a batch of inputs to K outputs each. It is moved to `device`.
    loss : {"cross_entropy", "squared"} or callable
        Loss function. "squared" is ``sum((a f(x) - e_y)^2) / batch`` with one-hot targets e_y. A callable
        takes a f(x) and labels, and returns the mean over the batch.
    output_scale : float
        Factor a of the outputs f(x) in the loss.
    optimizer : {"sgd", "adamw"} or callable
        Optimizer. A callable takes the parameters and returns an optimizer with its own settings; the
        schedule applies to its learning rates.
    learning_rate : float
        Learning rate of "sgd" and "adamw"; not for a callable.
    momentum, weight_decay : float
        Momentum of "sgd", and weight decay of "sgd" and "adamw".
    schedule : {"cosine", "constant"}
        Learning rate of epoch e of E: constant, or along half a cosine from `learning_rate` at e = 0 to
        ``final_rate * learning_rate`` at e = E.
    final_rate : float
        Factor of the learning rate at the end of the cosine.
    epochs : int
        Number of passes over the samples.
    batch_size : int
        Number of samples in a batch; the last batch of an epoch may be smaller. A single last sample is
        joined to the batch before, because batch normalisation has no variance of one sample.
    seed : int
        Seed of the order of samples and of dropout. It does not affect the initial weights, and the state of
        PyTorch's generators is preserved.
    device : device, optional
        Device of the training. Default: that of the model.
    tracker : SpectralTracker, optional
        Tracker from a call of `track` for this model. It gets the loss of every record, and is saved in
        checkpoints.
    checkpoint : path, optional
        Checkpoint file, written atomically after every `checkpoint_every` epochs and at the end. Its folder
        is created if missing. `fit` resumes from the file if it exists.
    checkpoint_every : int
        Number of epochs between two checkpoints.
    progress : bool
        Show a progress bar over the epochs on a terminal, after the first second.

    Attributes
    ----------
    history : History
        Losses and accuracies so far.
    optimizer : Optimizer
        Optimizer of the model's parameters.

    Raises
    ------
    TypeError, ValueError
        For settings out of their range, and a model without parameters.

    Notes
    -----
    Every epoch has its own seeds, derived from `seed`. So a resumed training takes the same steps as an
    uninterrupted one, bit for bit on the same machine with the same number of threads. Losses are summed on
    the device and read once per epoch.

    Examples
    --------
    >>> import torch
    >>> from dlnfast.torch import MLP, Trainer
    >>> inputs, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    >>> trainer = Trainer(MLP([4, 8, 2], seed=0), learning_rate=0.5, epochs=20, batch_size=4)
    >>> trainer.fit(inputs, labels).accuracy[-1]
    1.0
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: str | LossFunction = "cross_entropy",
        output_scale: float = 1.0,
        optimizer: str | Callable[..., torch.optim.Optimizer] = "sgd",
        learning_rate: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        schedule: str = "cosine",
        final_rate: float = 0.01,
        epochs: int,
        batch_size: int = 128,
        seed: int = 0,
        device: torch.device | str | None = None,
        tracker: SpectralTracker | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 1,
        progress: bool = False,
    ) -> None:
        for name, value, known in (
            ("loss", loss, _LOSSES),
            ("optimizer", optimizer, _OPTIMIZERS),
            ("schedule", schedule, _SCHEDULES),
        ):
            takes_callables = name != "schedule"
            if not (takes_callables and callable(value)):
                check_choice(value, name, known, also="a callable" if takes_callables else None)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}; wanted a torch.nn.Module")
        if next(model.parameters(), None) is None:
            raise ValueError(f"model ({type(model).__name__}) has no parameters; wanted some to train")
        if tracker is not None and not isinstance(tracker, SpectralTracker):
            raise TypeError(f"tracker is {type(tracker).__name__}; wanted a result of dlnfast.torch.track")
        if tracker is not None and not tracker.follows(model):
            raise ValueError("tracker follows none of this model's weights, or was closed")
        self.model = model if device is None else model.to(find_device(device, np.float32))
        self.device = next(model.parameters()).device
        self.epochs = check_count(epochs, "epochs", minimum=0)
        self.batch_size = check_count(batch_size, "batch_size")
        self.history = History()
        self._loss = loss
        self._output_scale = check_scale(output_scale, "output_scale (a)", strict=True)
        self._schedule = schedule
        self._final_rate = check_scale(final_rate, "final_rate", at_most=1.0)
        check_scale(momentum, "momentum (mu)", below=1.0)
        self._seed = check_count(seed, "seed", minimum=0)
        self._tracker = tracker
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        self._checkpoint_every = check_count(checkpoint_every, "checkpoint_every")
        self._progress = progress
        self.optimizer = _make_optimizer(
            model.parameters(),
            optimizer,
            learning_rate,
            momentum,
            check_scale(weight_decay, "weight_decay"),
        )
        # Initial settings of the optimizer without the parameters: learning rates, momentum, decay.
        self._settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.state_dict()["param_groups"]
        ]
        self._rates = [float(group["lr"]) for group in self._settings]

    def fit(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        *,
        test: Samples | None = None,
        test_every: int = 0,
        after_epoch: Callable[[int], bool | None] | None = None,
    ) -> History:
        """Train for the remaining epochs.

        Parameters
        ----------
        inputs, labels : Tensor
            Samples along the first axis, and their classes 0 .. K - 1.
        test : Samples, optional
            Test inputs and labels, for the accuracy at the end and after every `test_every` epochs.
        test_every : int
            Number of epochs between two measurements of the test accuracy; 0: at the end only.
        after_epoch : callable, optional
            Function ``after_epoch(epochs_taken)``. If it returns True, the training stops; another call of
            `fit` continues it.

        Returns
        -------
        History
            History of all epochs, including those before a checkpoint.

        Raises
        ------
        DivergedError
            If the mean loss of an epoch, or a loss or weight at a record of the tracker, is not finite.
        TypeError, ShapeError
            If labels are not one integer per sample.
        ValueError
            For labels that are no classes; for a checkpoint with other settings, which the message names; for
            a file that is no checkpoint.
        """
        check_count(test_every, "test_every", minimum=0)
        if test is None and test_every:
            raise ValueError(f"test_every is {test_every}, but there is no test")
        if test is not None and not (isinstance(test, (tuple, list)) and len(test) == 2):
            raise TypeError(f"test is {type(test).__name__}; wanted a pair (inputs, labels)")
        if after_epoch is not None and not callable(after_epoch):
            raise TypeError(f"after_epoch is {type(after_epoch).__name__}; wanted a callable")
        batches = Batches(
            inputs,
            _convert_labels(inputs, labels),
            self.batch_size,
            shuffle=True,
            seed=self._seed,
            device=self.device,
            join_single=True,
        )
        samples = "" if self._checkpoint is None else _fingerprint_samples(inputs, labels)
        if self._checkpoint is not None and self._checkpoint.is_file():
            self._resume(self._checkpoint, samples)
        taken = len(self.history.loss)
        with self._preserve_random_state(), self._make_progress_bar(taken) as bar:
            for epoch in range(taken, self.epochs):
                self._seed_dropout(epoch)
                batches.epoch = epoch
                self._train_epoch(batches, epoch)
                bar.set_postfix_str(f"loss {self.history.loss[-1]:.3e}", refresh=False)
                bar.update(1)
                done = epoch + 1
                last = done == self.epochs
                if test is not None and (last or (test_every and done % test_every == 0)):
                    self._measure_test_accuracy(test, done)
                if self._checkpoint is not None and (last or done % self._checkpoint_every == 0):
                    self._save(self._checkpoint, samples)
                stop = after_epoch is not None and after_epoch(done) is True
                if stop and test is not None and self.history.test_epochs[-1:] != [done]:
                    self._measure_test_accuracy(test, done)
                if self._checkpoint is not None and stop:
                    self._save(self._checkpoint, samples)
                if stop:
                    break
        return self.history

    def evaluate(self, inputs: torch.Tensor, labels: torch.Tensor, batch_size: int = 512) -> Evaluation:
        """Return mean loss and accuracy in evaluation mode, and restore the model's mode.

        Parameters
        ----------
        inputs : Tensor, shape (N, ..)
            Samples along the first axis.
        labels : Tensor of int, shape (N,)
            Classes of the samples.
        batch_size : int
            Number of samples in a batch.

        Returns
        -------
        Evaluation

        Raises
        ------
        TypeError, ShapeError, ValueError
            For labels that `fit` refuses.
        """
        labels = _convert_labels(inputs, labels)
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        loss, right = 0.0, 0
        try:
            with torch.no_grad():
                for number, (x, y) in enumerate(Batches(inputs, labels, batch_size, device=self.device)):
                    outputs = self.model(x) if number else self._compute_outputs(x, labels)
                    loss += float(self._compute_loss(outputs, y)) * len(y)
                    right += int((outputs.argmax(dim=1) == y).sum())
        finally:
            for module, training in modes:
                module.training = training
        return Evaluation(loss / len(labels), right / len(labels))

    def rate(self, epoch: int) -> float:
        """Return the factor of the learning rate in an epoch.

        Parameters
        ----------
        epoch : int
            Index of the epoch, from 0.

        Returns
        -------
        float
            Factor between `final_rate` and 1, which is 1 for epoch 0.
        """
        if self._schedule == "constant" or self.epochs == 0:
            return 1.0
        share = 0.5 * (1.0 + math.cos(math.pi * epoch / self.epochs))
        return self._final_rate + (1.0 - self._final_rate) * share

    # ------------------------------------------------------------------------------------- helpers

    def _compute_outputs(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the model, after a check that their number covers all labels."""
        outputs: torch.Tensor = self.model(x)
        check_labels(labels, len(labels), outputs.shape[1])
        return outputs

    def _compute_loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scaled = outputs * self._output_scale if self._output_scale != 1.0 else outputs
        if callable(self._loss):
            return self._loss(scaled, labels)
        if self._loss == "cross_entropy":
            return nn.functional.cross_entropy(scaled, labels)
        targets = nn.functional.one_hot(labels, outputs.shape[1]).to(scaled.dtype)
        return (scaled - targets).square().sum() / len(labels)

    def _train_epoch(self, batches: Batches, epoch: int) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.rate(epoch)
        self.model.train()
        total = torch.zeros(
            (), dtype=torch.float64, device=find_float64_device(next(self.model.parameters()))
        )
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for number, (x, y) in enumerate(batches):
            self.optimizer.zero_grad(set_to_none=True)
            outputs = self.model(x) if number else self._compute_outputs(x, batches.labels)
            loss = self._compute_loss(outputs, y)
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            if self._tracker is not None and self._tracker.is_recorded(self._tracker.step):
                if not math.isfinite(value := float(loss.detach())):
                    raise self._make_divergence_error(
                        f"a loss of epoch {epoch + 1} is {value}", epoch, batches
                    )
                self._tracker.log_loss(value)
            try:
                self.optimizer.step()
                if self._tracker is not None:
                    self._tracker.finish_step()
            except ValueError as error:  # from a record of the tracker
                if self._is_finite():
                    raise
                raise self._make_divergence_error(
                    f"weights are not finite ({error})", epoch, batches
                ) from error
            total += loss.detach().to(total.device) * len(y)
            right += (outputs.detach().argmax(dim=1) == y).sum()
        mean = float(total) / len(batches.labels)
        if not math.isfinite(mean):
            raise self._make_divergence_error(f"the mean loss of epoch {epoch + 1} is {mean}", epoch, batches)
        self.history.loss.append(mean)
        self.history.accuracy.append(int(right) / len(batches.labels))
        self.history.learning_rate.append(self._rates[0] * self.rate(epoch))

    def _measure_test_accuracy(self, test: Samples, done: int) -> None:
        self.history.test_accuracy.append(self.evaluate(*test).accuracy)
        self.history.test_epochs.append(done)

    def _is_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.model.parameters())

    def _make_divergence_error(self, what: str, epoch: int, batches: Batches) -> DivergedError:
        text = f"{what}: lower the learning rate (eta), now {self._rates[0] * self.rate(epoch):g}"
        return DivergedError(text, step=(epoch + 1) * len(batches), layer=0)

    @contextmanager
    def _preserve_random_state(self) -> Iterator[None]:
        """Restore the states of PyTorch's generators at the end of the block."""
        kind = self.device.type
        if kind == "cpu":
            with torch.random.fork_rng(devices=[]):
                yield
        else:
            with torch.random.fork_rng(devices=[self.device], device_type=kind):
                yield

    def _seed_dropout(self, epoch: int) -> None:
        number = derive_pass_seed(self._seed, epoch, _DROPOUT)
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(number)
        elif self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(number)

    def _describe(self, samples: str) -> dict[str, Any]:
        """Return the settings that must equal those of a checkpoint to resume from."""
        described = {
            "parameters": [[name, list(p.shape)] for name, p in self.model.named_parameters()],
            "loss": _name_loss(self._loss),
            "output_scale": self._output_scale,
            "optimizer": type(self.optimizer).__name__,
            "samples": samples,
            "batch_size": self.batch_size,
            "schedule": self._schedule,
            "seed": self._seed,
            "tracker": "none" if self._tracker is None else "present",
        }
        if self._schedule == "cosine":  # a constant schedule does not depend on the number of epochs
            described |= {"epochs": self.epochs, "final_rate": self._final_rate}
        for name in dict.fromkeys(name for group in self._settings for name in group):
            # As text, because settings of an optimizer can be of any type.
            text = ", ".join(str(group.get(name)) for group in self._settings)
            described["learning_rate" if name == "lr" else name] = text
        return described

    def _save(self, path: Path, samples: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "description": self._describe(samples),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": asdict(self.history),
            "tracker": None if self._tracker is None else self._tracker.state_dict(),
        }
        with atomic_file(path) as file:
            torch.save(with_state_checksum(state), file)

    def _resume(self, path: Path, samples: str) -> None:
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            saved = state.get("description") if isinstance(state, dict) else None
            if not isinstance(saved, dict):
                raise TypeError("it has other content")
            check_state_checksum(state)
        except _UNREADABLE as error:
            if is_machine_error(error):
                raise
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path} cannot be read as a checkpoint of a Trainer: {reason}") from error
        own = self._describe(samples)
        if "parameters" in saved:  # parameter names in a wrapped model match those in the plain one
            renamed = match_names(*([name for name, _ in each["parameters"]] for each in (saved, own)))
            saved["parameters"] = [[renamed.get(name, name), shape] for name, shape in saved["parameters"]]
        for name, value in own.items():
            saved_value = saved.get(name, value)  # other versions of PyTorch have other settings
            if value != saved_value:
                if name == "parameters":
                    value, saved_value = _find_first_difference(value, saved_value)
                raise ValueError(
                    f"{path} belongs to a training with {name} {saved_value}; this one has {value}"
                )
        taken = len(state["history"]["loss"])
        if taken > self.epochs:
            raise ValueError(f"{path} has taken {taken} epochs; epochs is {self.epochs}")
        weights = state["model"]
        renamed = match_names(weights, self.model.state_dict())
        self.model.load_state_dict({renamed.get(name, name): tensor for name, tensor in weights.items()})
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = History(**state["history"])
        if self._tracker is not None:
            self._tracker.load_state_dict(state["tracker"])

    def _make_progress_bar(self, taken: int) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=self.epochs,
            initial=taken,
            unit="epoch",
            delay=1.0,
            disable=None if self._progress else True,
            leave=False,
        )


#: Errors of torch.load for files that are damaged, or have other content.
_UNREADABLE = (RuntimeError, OSError, EOFError, pickle.UnpicklingError, TypeError, KeyError, ValueError)


def _make_optimizer(
    parameters: Iterator[nn.Parameter],
    optimizer: str | Callable[..., torch.optim.Optimizer],
    learning_rate: float | None,
    momentum: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    if callable(optimizer):
        if learning_rate is not None:
            raise ValueError(
                f"learning_rate (eta) is {learning_rate}, but optimizer is a callable, which sets its own"
            )
        result = optimizer(parameters)
        if not isinstance(result, torch.optim.Optimizer):
            raise TypeError(f"optimizer returned {type(result).__name__}; wanted a torch.optim.Optimizer")
        return result
    if learning_rate is None:
        raise TypeError(f"learning_rate (eta) is missing; {optimizer!r} needs one")
    rate = check_scale(learning_rate, "learning_rate (eta)")
    if optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=momentum, weight_decay=weight_decay)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay)


def _fingerprint_samples(inputs: torch.Tensor, labels: torch.Tensor) -> str:
    """Return the shape of the inputs, and checksums of a subset of the inputs and labels."""
    parts = [str(tuple(inputs.shape))]
    for tensor in (inputs, labels):
        flat = tensor.detach().reshape(-1)
        subset = flat[:: max(len(flat) // 2**16, 1)].cpu().to(torch.float64)
        parts.append(hashlib.sha256(subset.numpy().tobytes()).hexdigest()[:16])
    return " ".join(parts)


def _convert_labels(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Check labels, and return them in int64, as losses need them."""
    for name, value in (("inputs", inputs), ("labels", labels)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is {type(value).__name__}; wanted a tensor")
    check_labels(labels, len(inputs))
    return labels.to(torch.int64)


def _name_loss(loss: str | LossFunction) -> str:
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)


def _find_first_difference(first: list[Any], second: list[Any]) -> tuple[Any, Any]:
    return next((a, b) for a, b in zip_longest(first, second) if a != b)
