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
from .images import Batches, Samples, seed_of_pass
from .statistics import check_labels, exact_device
from .track import SpectralTracker

__all__ = ["Evaluation", "History", "Trainer"]

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_OPTIMIZERS: Final = ("sgd", "adamw")
_SCHEDULES: Final = ("cosine", "constant")
_LOSSES: Final = ("cross_entropy", "squared")
#: A stream of random numbers apart from that of the order of samples.
_DROPOUT: Final = 1


@dataclass
class History:
    """What a training recorded after every epoch.

    Attributes
    ----------
    loss, accuracy : list of float
        Means over the training samples of the epoch, as they were met, in training mode.
    learning_rate : list of float
        Of the epoch; of the first group of parameters.
    test_accuracy : list of float
        Of the epochs with a test, in evaluation mode; see `test_epochs`.
    test_epochs : list of int
        Epochs taken when they were measured.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    test_epochs: list[int] = field(default_factory=list)


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
        Maps a batch of inputs to K outputs each. Moved to `device`.
    loss : {"cross_entropy", "squared"} or callable
        "squared": ``sum((a f(x) - e_y)^2) / batch``, one-hot targets e_y. A callable takes a f(x) and labels
        and returns a mean over the batch.
    output_scale : float
        a, by which outputs are multiplied before any loss.
    optimizer : {"sgd", "adamw"} or callable
        A callable takes the parameters and returns an optimizer, whose rates are scheduled as they are; it
        sees none of the next three.
    learning_rate : float
        Of "sgd" and "adamw", which need one.
    momentum, weight_decay : float
        Of "sgd" and "adamw"; momentum is for "sgd".
    schedule : {"cosine", "constant"}
        The rate of epoch e of E: constant, or from `learning_rate` at e = 0 along half a cosine to
        ``final_rate * learning_rate`` at e = E.
    final_rate : float
        Share of the rate that is left at the end of the cosine.
    epochs : int
        Passes over the samples.
    batch_size : int
        The last batch of an epoch is smaller where it has to be. A single last sample joins the batch before,
        as batch normalisation has no variance of one sample.
    seed : int
        Of the order of samples and of dropout. Weights come with the model; PyTorch's generators keep their
        state.
    device : device, optional
        Default: where the model is.
    tracker : SpectralTracker, optional
        What `track` returned for this model: gets the loss of every record, and is part of checkpoints.
    checkpoint : path, optional
        File that is written after every `checkpoint_every` epochs and at the end, whole or not at all; its
        folder is made where there is none. `fit` goes on from it where it exists.
    checkpoint_every : int
    progress : bool
        A bar over the epochs on a terminal, once training has taken a second.

    Attributes
    ----------
    history : History
    optimizer : Optimizer

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
            raise TypeError(f"tracker is {type(tracker).__name__}; wanted what dlnfast.torch.track returned")
        if tracker is not None and not tracker.follows(model):
            raise ValueError("tracker follows none of this model's weights, or was closed")
        where = None if device is None else find_device(device, np.float32)
        self.model = model if where is None else model.to(where)
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
        self.optimizer = _optimizer(
            model.parameters(),
            optimizer,
            learning_rate,
            momentum,
            check_scale(weight_decay, "weight_decay"),
        )
        # What an optimizer starts with, but for the parameters: rates, momentum, decay.
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
        """Train for what is left of the epochs.

        Parameters
        ----------
        inputs, labels : Tensor
            Samples along the first axis, and their classes 0 .. K - 1.
        test : Samples, optional
            Inputs and labels whose accuracy is measured at the end, and after every `test_every` epochs.
        test_every : int
            0: at the end only.
        after_epoch : callable, optional
            ``after_epoch(epochs_taken)``; returning True ends the training. A further `fit` goes on.

        Returns
        -------
        History
            Of all epochs, those before a resumption too.

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
            _as_classes(inputs, labels),
            self.batch_size,
            shuffle=True,
            seed=self._seed,
            device=self.device,
            join_single=True,
        )
        samples = "" if self._checkpoint is None else _digest(inputs, labels)
        if self._checkpoint is not None and self._checkpoint.is_file():
            self._resume(self._checkpoint, samples)
        taken = len(self.history.loss)
        with self._own_random_numbers(), self._bar(taken) as bar:
            for epoch in range(taken, self.epochs):
                self._seed_dropout(epoch)
                batches.epoch = epoch
                self._epoch(batches, epoch)
                bar.set_postfix_str(f"loss {self.history.loss[-1]:.3e}", refresh=False)
                bar.update(1)
                done = epoch + 1
                last = done == self.epochs
                if test is not None and (last or (test_every and done % test_every == 0)):
                    self._test(test, done)
                if self._checkpoint is not None and (last or done % self._checkpoint_every == 0):
                    self._save(self._checkpoint, samples)
                stop = after_epoch is not None and after_epoch(done) is True
                if stop and test is not None and self.history.test_epochs[-1:] != [done]:
                    self._test(test, done)
                if self._checkpoint is not None and stop:
                    self._save(self._checkpoint, samples)
                if stop:
                    break
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
        labels = _as_classes(inputs, labels)
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        loss, right = 0.0, 0
        try:
            with torch.no_grad():
                for number, (x, y) in enumerate(Batches(inputs, labels, batch_size, device=self.device)):
                    outputs = self.model(x) if number else self._outputs(x, labels)
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
            From 0.

        Returns
        -------
        float
            1 at the start.
        """
        if self._schedule == "constant" or self.epochs == 0:
            return 1.0
        share = 0.5 * (1.0 + math.cos(math.pi * epoch / self.epochs))
        return self._final_rate + (1.0 - self._final_rate) * share

    # ------------------------------------------------------------------------------------- helpers

    def _outputs(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the outputs, of which there must be one for each class of all labels."""
        outputs: torch.Tensor = self.model(x)
        check_labels(labels, len(labels), outputs.shape[1])
        return outputs

    def _value(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scaled = outputs * self._output_scale if self._output_scale != 1.0 else outputs
        if callable(self._loss):
            return self._loss(scaled, labels)
        if self._loss == "cross_entropy":
            return nn.functional.cross_entropy(scaled, labels)
        targets = nn.functional.one_hot(labels, outputs.shape[1]).to(scaled.dtype)
        return (scaled - targets).square().sum() / len(labels)

    def _epoch(self, batches: Batches, epoch: int) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.rate(epoch)
        self.model.train()
        total = torch.zeros((), dtype=torch.float64, device=exact_device(next(self.model.parameters())))
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for number, (x, y) in enumerate(batches):
            self.optimizer.zero_grad(set_to_none=True)
            outputs = self.model(x) if number else self._outputs(x, batches.labels)
            loss = self._value(outputs, y)
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            if self._tracker is not None and self._tracker.is_recorded(self._tracker.step):
                if not math.isfinite(value := float(loss.detach())):
                    raise self._diverged(f"a loss of epoch {epoch + 1} is {value}", epoch, batches)
                self._tracker.log_loss(value)
            try:
                self.optimizer.step()
                if self._tracker is not None:
                    self._tracker.finish_step()
            except ValueError as error:  # a record of the tracker
                if self._is_finite():
                    raise
                raise self._diverged(f"weights are not finite ({error})", epoch, batches) from error
            total += loss.detach().to(total.device) * len(y)
            right += (outputs.detach().argmax(dim=1) == y).sum()
        mean = float(total) / len(batches.labels)
        if not math.isfinite(mean):
            raise self._diverged(f"the mean loss of epoch {epoch + 1} is {mean}", epoch, batches)
        self.history.loss.append(mean)
        self.history.accuracy.append(int(right) / len(batches.labels))
        self.history.learning_rate.append(self._rates[0] * self.rate(epoch))

    def _test(self, test: Samples, done: int) -> None:
        self.history.test_accuracy.append(self.evaluate(*test).accuracy)
        self.history.test_epochs.append(done)

    def _is_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.model.parameters())

    def _diverged(self, what: str, epoch: int, batches: Batches) -> DivergedError:
        text = f"{what}: lower the learning rate (eta), now {self._rates[0] * self.rate(epoch):g}"
        return DivergedError(text, step=(epoch + 1) * len(batches), layer=0)

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Put back the states of PyTorch's generators at the end."""
        kind = self.device.type
        if kind == "cpu":
            with torch.random.fork_rng(devices=[]):
                yield
        else:
            with torch.random.fork_rng(devices=[self.device], device_type=kind):
                yield

    def _seed_dropout(self, epoch: int) -> None:
        number = seed_of_pass(self._seed, epoch, _DROPOUT)
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(number)
        elif self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(number)

    def _describe(self, samples: str) -> dict[str, Any]:
        """Return what must be the same for a checkpoint to be gone on from."""
        described = {
            "parameters": [[name, list(p.shape)] for name, p in self.model.named_parameters()],
            "loss": _name(self._loss),
            "output_scale": self._output_scale,
            "optimizer": type(self.optimizer).__name__,
            "samples": samples,
            "batch_size": self.batch_size,
            "schedule": self._schedule,
            "seed": self._seed,
            "tracker": "none" if self._tracker is None else "present",
        }
        if self._schedule == "cosine":  # at a constant rate nothing depends on the end
            described |= {"epochs": self.epochs, "final_rate": self._final_rate}
        for name in dict.fromkeys(name for group in self._settings for name in group):
            # As text: an optimizer may keep anything.
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
            theirs = state.get("description") if isinstance(state, dict) else None
            if not isinstance(theirs, dict):
                raise TypeError("it holds something else")
            check_state_checksum(state)
        except (
            RuntimeError,
            OSError,
            EOFError,
            pickle.UnpicklingError,
            TypeError,
            KeyError,
            ValueError,
        ) as error:
            if is_machine_error(error):
                raise
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path} cannot be read as a checkpoint of a Trainer: {reason}") from error
        mine = self._describe(samples)
        if "parameters" in theirs:  # a wrapper around the model changes no parameter
            same = match_names(*([name for name, _ in told["parameters"]] for told in (theirs, mine)))
            theirs["parameters"] = [[same.get(name, name), shape] for name, shape in theirs["parameters"]]
        for name, here in mine.items():
            there = theirs.get(name, here)  # other versions of PyTorch keep other settings
            if here != there:
                if name == "parameters":
                    here, there = _first_difference(here, there)
                raise ValueError(f"{path} belongs to a training with {name} {there}; this one has {here}")
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


#: What torch.load raises for files that are damaged, or of something else.
_UNREADABLE = (RuntimeError, OSError, EOFError, pickle.UnpicklingError, TypeError, KeyError, ValueError)


def _optimizer(
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
        made = optimizer(parameters)
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(f"optimizer returned {type(made).__name__}; wanted a torch.optim.Optimizer")
        return made
    if learning_rate is None:
        raise TypeError(f"learning_rate (eta) is missing; {optimizer!r} needs one")
    rate = check_scale(learning_rate, "learning_rate (eta)")
    if optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=momentum, weight_decay=weight_decay)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay)


def _digest(inputs: torch.Tensor, labels: torch.Tensor) -> str:
    """Return what tells samples from others: their shape, and some of their numbers."""
    parts = [str(tuple(inputs.shape))]
    for tensor in (inputs, labels):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(len(flat) // 2**16, 1)].cpu().to(torch.float64)
        parts.append(hashlib.sha256(some.numpy().tobytes()).hexdigest()[:16])
    return " ".join(parts)


def _as_classes(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return labels in the precision that losses want."""
    for name, value in (("inputs", inputs), ("labels", labels)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is {type(value).__name__}; wanted a tensor")
    check_labels(labels, len(inputs))
    return labels.to(torch.int64)


def _name(loss: str | LossFunction) -> str:
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)


def _first_difference(mine: list[Any], theirs: list[Any]) -> tuple[Any, Any]:
    pairs = zip_longest(mine, theirs)
    return next((here, there) for here, there in pairs if here != there)
