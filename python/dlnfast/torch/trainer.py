# SPDX-License-Identifier: MIT
"""`Trainer`: a plain training loop for classifiers, reproducible by seed and resumable."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from .._support.arrays import check_choice, check_count, check_path, check_scale
from .._support.checkpoint import State
from .._support.checksums import add_state_checksum
from .._support.errors import DivergedError
from .._support.files import Arrays, atomic_file
from .._support.moved import refuse_moved
from .._training.resumable import ResumableWork, run_resumable
from ._devices import find_device
from ._names import match_names
from ._state_files import read_state_file
from .images import Batches, Samples, derive_pass_seed
from .statistics import check_labels, find_float64_device
from .track import SpectralTracker

__all__ = [
    "CheckpointFile",
    "Evaluation",
    "History",
    "LossOptions",
    "OptimizerOptions",
    "ScheduleOptions",
    "Trainer",
]

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_OPTIMIZERS: Final = ("sgd", "adamw")
_SCHEDULES: Final = ("cosine", "constant")
_LOSSES: Final = ("cross_entropy", "squared")
#: Stream of random numbers for dropout, independent of the order of samples.
_DROPOUT: Final = 1
#: Keywords of version 0.1.0, and the code that replaces them.
_MOVED: Final = {
    "output_scale": "loss=LossOptions(output_scale=...)",
    "momentum": "optimizer=OptimizerOptions(momentum=...)",
    "weight_decay": "optimizer=OptimizerOptions(weight_decay=...)",
    "final_rate": "schedule=ScheduleOptions(final_rate=...)",
    "checkpoint_every": "checkpoint=CheckpointFile(path, every=...)",
}


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
class LossOptions:
    """The loss of a `Trainer`.

    Parameters
    ----------
    name : {"cross_entropy", "squared"} or callable
        "squared": ``sum((a f(x) - e_y)^2) / batch`` with one-hot targets e_y. A callable takes a f(x) and the
        labels, and returns a mean over the batch.
    output_scale : float
        Factor a of the outputs in every loss.
    """

    name: str | LossFunction = "cross_entropy"
    output_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        if not callable(self.name):
            check_choice(self.name, "loss", _LOSSES, also="a callable")
        check_scale(self.output_scale, "output_scale (a)", strict=True)


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer of a `Trainer`.

    Parameters
    ----------
    name : {"sgd", "adamw"}
        Update rule.
    momentum : float
        Momentum of "sgd".
    weight_decay : float
        Weight decay: added to the gradient in "sgd", decoupled in "adamw".
    """

    name: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice(self.name, "optimizer", _OPTIMIZERS, also="a callable")
        check_scale(self.momentum, "momentum (mu)", below=1.0)
        check_scale(self.weight_decay, "weight_decay")


@dataclass(frozen=True)
class ScheduleOptions:
    """The learning rate of a `Trainer` over the epochs.

    Parameters
    ----------
    name : {"cosine", "constant"}
        Rate of epoch e of E: constant, or from `learning_rate` at e = 0 along half a cosine to
        ``final_rate * learning_rate`` at e = E.
    final_rate : float
        Share of the rate that is left at the end of the cosine.
    """

    name: str = "cosine"
    final_rate: float = 0.01

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice(self.name, "schedule", _SCHEDULES)
        check_scale(self.final_rate, "final_rate", at_most=1.0)


@dataclass(frozen=True)
class CheckpointFile:
    """The file to which a `Trainer` writes its state.

    Parameters
    ----------
    path : path
        Replaced as a whole by every new state. Its folder is created if missing.
    every : int
        Number of epochs between two states. There is also one at the end.
    """

    path: str | os.PathLike[str]
    every: int = 1

    def __post_init__(self) -> None:
        """Check the options."""
        check_path(self.path, "checkpoint")
        check_count(self.every, "checkpoint.every")


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and share of samples classified right, in evaluation mode.

    Attributes
    ----------
    loss : float
        Mean over the samples.
    accuracy : float
        Share classified right, 0 to 1.
    """

    loss: float
    accuracy: float


class Trainer:
    r"""Train a classifier on samples in memory.

    Parameters
    ----------
    model : Module
        Classifier, which maps a batch of inputs to K outputs each. It is moved to `device`.
    loss : {"cross_entropy", "squared"}, callable or LossOptions
        Loss function. A callable takes outputs and labels, and returns the mean over the batch.
    optimizer : {"sgd", "adamw"}, callable or OptimizerOptions
        Optimizer. A callable takes the parameters and returns an optimizer with its own settings; the
        schedule applies to its learning rates.
    learning_rate : float
        Learning rate of "sgd" and "adamw"; not for a callable.
    schedule : {"cosine", "constant"} or ScheduleOptions
        Learning rate over the epochs.
    epochs : int
        Passes over the samples.
    batch_size : int
        Number of samples in a batch; the last batch of an epoch may be smaller. A single last sample is
        added to the batch before, because batch normalisation has no variance of one sample.
    seed : int
        Seed of the order of samples and of dropout. It does not affect the initial weights, and the state of
        PyTorch's generators is preserved.
    device : device, optional
        Device of the training. Default: that of the model.
    tracker : SpectralTracker, optional
        Tracker from a call of `track` for this model. It gets the loss of every record, and is saved in
        checkpoints.
    checkpoint : path or CheckpointFile, optional
        File with the state of the training, written after every epoch, or every ``checkpoint.every`` epochs,
        and at the end. If the file exists, `fit` resumes from it. Ctrl-C, SIGTERM and other exceptions
        between two epochs write it, too; a note on the exception names the last epoch in it.
    progress : bool
        A bar over the epochs on a terminal, once training has taken a second.

    Attributes
    ----------
    history : History
        Losses, accuracies and learning rates of the epochs.
    optimizer : Optimizer
        PyTorch optimizer with its state.

    Raises
    ------
    TypeError, ValueError
        For settings out of their range, and a model without parameters.

    Notes
    -----
    Every epoch has seeds of its own, derived from `seed`: a resumed training takes the same steps, bit for
    bit on the same machine with as many threads, as one that was not interrupted. Losses are added up on the
    device and read once per epoch.

    Examples
    --------
    >>> import torch
    >>> from dlnfast.torch import MLP, Trainer
    >>> inputs, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    >>> trainer = Trainer(MLP([4, 8, 2], seed=0), learning_rate=0.5, epochs=20, batch_size=4)
    >>> trainer.fit(inputs, labels).accuracy[-1]
    1.0
    """

    @refuse_moved("Trainer", _MOVED)
    def __init__(
        self,
        model: nn.Module,
        *,
        loss: str | LossFunction | LossOptions = "cross_entropy",
        optimizer: str | Callable[..., torch.optim.Optimizer] | OptimizerOptions = "sgd",
        learning_rate: float | None = None,
        schedule: str | ScheduleOptions = "cosine",
        epochs: int,
        batch_size: int = 128,
        seed: int = 0,
        device: torch.device | str | None = None,
        tracker: SpectralTracker | None = None,
        checkpoint: str | os.PathLike[str] | CheckpointFile | None = None,
        progress: bool = False,
    ) -> None:
        self._loss = loss if isinstance(loss, LossOptions) else LossOptions(loss)
        self._schedule = schedule if isinstance(schedule, ScheduleOptions) else ScheduleOptions(schedule)
        if not (isinstance(optimizer, OptimizerOptions) or callable(optimizer)):
            optimizer = OptimizerOptions(optimizer)
        if not (checkpoint is None or isinstance(checkpoint, CheckpointFile)):
            checkpoint = CheckpointFile(checkpoint)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}; wanted a torch.nn.Module")
        if next(model.parameters(), None) is None:
            raise ValueError(f"model ({type(model).__name__}) has no parameters; wanted some to train")
        if tracker is not None and not isinstance(tracker, SpectralTracker):
            raise TypeError(f"tracker is {type(tracker).__name__}; wanted the result of dlnfast.torch.track")
        if tracker is not None and not tracker.follows(model):
            raise ValueError("tracker follows none of this model's weights, or was closed")
        where = None if device is None else find_device(device, np.float32)
        self.model = model if where is None else model.to(where)
        self.device = next(model.parameters()).device
        self.epochs = check_count(epochs, "epochs", minimum=0)
        self.batch_size = check_count(batch_size, "batch_size")
        self.history = History()
        #: Digest of the samples of a checkpointed training.
        self._samples = ""
        self._seed = check_count(seed, "seed", minimum=0)
        self._tracker = tracker
        self._checkpoint = checkpoint
        self._progress = progress
        self.optimizer = _make_optimizer(model.parameters(), optimizer, learning_rate)
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
            Inputs and labels whose accuracy is measured at the end, and after every `test_every` epochs.
        test_every : int
            0: at the end only.
        after_epoch : callable, optional
            Function ``after_epoch(epochs_taken)``. If it returns True, the training stops; another call of
            `fit` continues it.

        Returns
        -------
        History
            History of all epochs, including those before the training was resumed.

        Raises
        ------
        DivergedError
            If the mean loss of an epoch is not finite, or a loss or weight at a record of the tracker.
        TypeError, ShapeError
            If labels are no integers, one for each sample.
        ValueError
            For labels that are no classes; if the checkpoint belongs to another training, naming the setting,
            or is none.
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
        storage = None
        if self._checkpoint is not None:
            storage = _StateFile(Path(self._checkpoint.path), self.device)
            self._samples = _fingerprint_samples(inputs, labels)
        work = _Training(self, batches, test, test_every, after_epoch)
        run_resumable(storage, work, every=1 if self._checkpoint is None else self._checkpoint.every)
        return self.history

    def evaluate(self, inputs: torch.Tensor, labels: torch.Tensor, batch_size: int = 512) -> Evaluation:
        """Return mean loss and accuracy in evaluation mode; the model's mode is as before afterwards.

        Parameters
        ----------
        inputs : Tensor, shape (N, ..)
            One sample along the first axis.
        labels : Tensor of int, shape (N,)
            Classes.
        batch_size : int
            Samples at a time.

        Returns
        -------
        Evaluation

        Raises
        ------
        TypeError, ShapeError, ValueError
            As for `fit`.
        """
        labels = _convert_labels(inputs, labels)
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        loss, right = 0.0, 0
        try:
            with torch.no_grad():
                for number, (x, y) in enumerate(Batches(inputs, labels, batch_size, device=self.device)):
                    outputs = self.model(x) if number else self._compute_outputs(x, labels)
                    loss += float(self._value(outputs, y)) * len(y)
                    right += int((outputs.argmax(dim=1) == y).sum())
        finally:
            for module, training in modes:
                module.training = training
        return Evaluation(loss / len(labels), right / len(labels))

    def rate(self, epoch: int) -> float:
        """Return the share of the learning rate at an epoch, counted from 0.

        Parameters
        ----------
        epoch : int
            Number of the epoch, from 0.

        Returns
        -------
        float
            1 at the start.
        """
        if self._schedule.name == "constant" or self.epochs == 0:
            return 1.0
        share = 0.5 * (1.0 + math.cos(math.pi * epoch / self.epochs))
        return self._schedule.final_rate + (1.0 - self._schedule.final_rate) * share

    # ------------------------------------------------------------------------------------- helpers

    def _compute_outputs(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the model, after a check that their number covers all labels."""
        outputs: torch.Tensor = self.model(x)
        check_labels(labels, len(labels), outputs.shape[1])
        return outputs

    def _value(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scaled = outputs * self._loss.output_scale if self._loss.output_scale != 1.0 else outputs
        if callable(self._loss.name):
            return self._loss.name(scaled, labels)
        if self._loss.name == "cross_entropy":
            return nn.functional.cross_entropy(scaled, labels)
        targets = nn.functional.one_hot(labels, outputs.shape[1]).to(scaled.dtype)
        return (scaled - targets).square().sum() / len(labels)

    def _epoch(self, batches: Batches, epoch: int) -> None:
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
            loss = self._value(outputs, y)
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            if self._tracker is not None and self._tracker.is_recorded(self._tracker.step):
                if not math.isfinite(value := float(loss.detach())):
                    raise self._make_divergence(f"a loss of epoch {epoch + 1} is {value}", epoch, batches)
                self._tracker.log_loss(value)
            try:
                self.optimizer.step()
                if self._tracker is not None:
                    self._tracker.finish_step()
            except ValueError as error:  # a record of the tracker
                if self._is_finite():
                    raise
                raise self._make_divergence(f"weights are not finite ({error})", epoch, batches) from error
            total += loss.detach().to(total.device) * len(y)
            right += (outputs.detach().argmax(dim=1) == y).sum()
        mean = float(total) / len(batches.labels)
        if not math.isfinite(mean):
            raise self._make_divergence(f"the mean loss of epoch {epoch + 1} is {mean}", epoch, batches)
        self.history.loss.append(mean)
        self.history.accuracy.append(int(right) / len(batches.labels))
        self.history.learning_rate.append(self._rates[0] * self.rate(epoch))

    def _test(self, test: Samples, done: int) -> None:
        self.history.test_accuracy.append(self.evaluate(*test).accuracy)
        self.history.test_epochs.append(done)

    def _is_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.model.parameters())

    def _make_divergence(self, what: str, epoch: int, batches: Batches) -> DivergedError:
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

    def _describe(self) -> dict[str, Any]:
        """Return the settings that must equal those of a checkpoint to resume from."""
        described = {
            "parameters": [[name, list(p.shape)] for name, p in self.model.named_parameters()],
            "loss": _name(self._loss.name),
            "output_scale": self._loss.output_scale,
            "optimizer": type(self.optimizer).__name__,
            "samples": self._samples,
            "batch_size": self.batch_size,
            "schedule": self._schedule.name,
            "seed": self._seed,
            "tracker": "none" if self._tracker is None else "present",
        }
        if self._schedule.name == "cosine":  # a constant schedule does not depend on it
            described |= {"epochs": self.epochs, "final_rate": self._schedule.final_rate}
        for name in dict.fromkeys(name for group in self._settings for name in group):
            # As text: an optimizer may keep anything.
            text = ", ".join(str(group.get(name)) for group in self._settings)
            described["learning_rate" if name == "lr" else name] = text
        return described

    def _state(self) -> dict[str, Any]:
        """Return everything that changes from epoch to epoch, and the description of the training."""
        return {
            "description": self._describe(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": asdict(self.history),
            "tracker": None if self._tracker is None else self._tracker.state_dict(),
        }

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        """Continue from a state, or raise a ValueError that names the setting that differs."""
        saved, own = state["description"], self._describe()
        if "parameters" in saved:  # names in a wrapped model match those in the plain one
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
        same = match_names(weights, self.model.state_dict())
        self.model.load_state_dict({same.get(name, name): tensor for name, tensor in weights.items()})
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = History(**state["history"])
        if self._tracker is not None:
            self._tracker.load_state_dict(state["tracker"])

    def _bar(self, taken: int) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=self.epochs,
            initial=taken,
            unit="epoch",
            delay=1.0,
            disable=None if self._progress else True,
            leave=False,
        )


class _Training(ResumableWork):
    """The epochs of a `Trainer` as resumable work."""

    is_locked = False
    unit = "epoch"
    how_to_resume = "`fit` with the same checkpoint"

    def __init__(
        self,
        trainer: Trainer,
        batches: Batches,
        test: Samples | None,
        test_every: int,
        after_epoch: Callable[[int], bool | None] | None,
    ) -> None:
        self._trainer, self._batches = trainer, batches
        self._test, self._test_every, self._after_epoch = test, test_every, after_epoch
        self._is_between_epochs = True
        self._is_stopped = False

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done, or `after_epoch` has stopped the training."""
        return self._is_stopped or len(self._trainer.history.loss) >= self._trainer.epochs

    def state(self) -> State | None:
        """Return the state of the trainer; None within an epoch."""
        if not self._is_between_epochs:
            return None
        return State(len(self._trainer.history.loss), 0.0, {}, self._trainer._state())

    def restore(self, storage: _StateFile) -> State | None:
        """Continue from a file, if it belongs to this training."""
        state = storage.newest()
        if state is not None:
            self._trainer._restore(storage.path, state.metadata)
        return state

    def advance(self, flush: Callable[[], None]) -> None:
        """Take the remaining epochs, and flush after each."""
        trainer, test = self._trainer, self._test
        taken, epochs = len(trainer.history.loss), trainer.epochs
        with trainer._preserve_random_state(), trainer._bar(taken) as bar:
            for epoch in range(taken, epochs):
                self._is_between_epochs = False
                trainer._seed_dropout(epoch)
                self._batches.epoch = epoch
                trainer._epoch(self._batches, epoch)
                bar.set_postfix_str(f"loss {trainer.history.loss[-1]:.3e}", refresh=False)
                bar.update(1)
                done = epoch + 1
                is_last = done == epochs
                if test is not None and (is_last or (self._test_every and done % self._test_every == 0)):
                    trainer._test(test, done)
                self._is_between_epochs = True
                flush()
                if self._after_epoch is not None and self._after_epoch(done) is True:
                    if test is not None and trainer.history.test_epochs[-1:] != [done]:
                        trainer._test(test, done)
                    self._is_stopped = True
                    return


class _StateFile:
    """One file with the newest state, as the storage of resumable work."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self._device = path, device

    @property
    def exists(self) -> bool:
        return self.path.is_file()

    def newest(self) -> State | None:
        if not self.exists:
            return None
        content = read_state_file(self.path, "a checkpoint of a Trainer", device=self._device)
        if not isinstance(content.get("description"), dict):
            raise ValueError(f"{self.path} cannot be read as a checkpoint of a Trainer: it has other content")
        return State(len(content["history"]["loss"]), 0.0, {}, content)

    def write_state(self, state: State) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as file:
            torch.save(add_state_checksum(state.metadata), file)

    # One file needs no lock, no request, no records and no end: it is replaced as a whole.

    def owned(self) -> AbstractContextManager[None]:
        return nullcontext()

    def check_request(self) -> None: ...
    def begin(self, metadata: Mapping[str, Any], arrays: Arrays) -> None: ...
    def go_back_to(self, step: int) -> None: ...
    def ending(self) -> dict[str, Any] | None: ...
    def end(self, outcome: Mapping[str, Any]) -> None: ...
    def tidy(self) -> None: ...
    def write_records(self, step: int, arrays: Arrays, metadata: Mapping[str, Any] | None = None) -> None: ...


def _make_optimizer(
    parameters: Iterator[nn.Parameter],
    optimizer: OptimizerOptions | Callable[..., torch.optim.Optimizer],
    learning_rate: float | None,
) -> torch.optim.Optimizer:
    if not isinstance(optimizer, OptimizerOptions):
        if learning_rate is not None:
            raise ValueError(
                f"learning_rate (eta) is {learning_rate}, but optimizer is a callable, which sets its own"
            )
        made = optimizer(parameters)
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(f"optimizer returned {type(made).__name__}; wanted a torch.optim.Optimizer")
        return made
    if learning_rate is None:
        raise TypeError(f"learning_rate (eta) is missing; {optimizer.name!r} needs one")
    rate, decay = check_scale(learning_rate, "learning_rate (eta)"), optimizer.weight_decay
    if optimizer.name == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=optimizer.momentum, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)


def _fingerprint_samples(inputs: torch.Tensor, labels: torch.Tensor) -> str:
    """Return the shape of the inputs, and checksums of a subset of the inputs and labels."""
    parts = [str(tuple(inputs.shape))]
    for tensor in (inputs, labels):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(len(flat) // 2**16, 1)].cpu().to(torch.float64)
        parts.append(hashlib.sha256(some.numpy().tobytes()).hexdigest()[:16])
    return " ".join(parts)


def _convert_labels(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Check labels, and return them in int64, as losses need them."""
    for name, value in (("inputs", inputs), ("labels", labels)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is {type(value).__name__}; wanted a tensor")
    check_labels(labels, len(inputs))
    return labels.to(torch.int64)


def _name(loss: str | LossFunction) -> str:
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)


def _find_first_difference(first: list[Any], second: list[Any]) -> tuple[Any, Any]:
    return next((a, b) for a, b in zip_longest(first, second) if a != b)
