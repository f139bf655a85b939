"""`Trainer`: a plain training loop for classifiers, reproducible by seed and resumable."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from .._arrays import check_count, check_scale
from .._errors import DivergedError
from .images import Batches, Samples, _mixed
from .track import SpectralTracker

__all__ = ["Evaluation", "History", "Trainer"]

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_OPTIMIZERS: Final = ("sgd", "adamw")
_SCHEDULES: Final = ("cosine", "constant")
_LOSSES: Final = ("cross_entropy", "squared")


@dataclass
class History:
    """What a training recorded after every epoch.

    Attributes
    ----------
    loss, accuracy : list of float
        Means over the training samples of the epoch, as they were met, in training mode.
    learning_rate : list of float
        Of the epoch.
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
    """Mean loss and share of samples classified right, in evaluation mode."""

    loss: float
    accuracy: float


class Trainer:
    r"""Train a classifier on samples in memory.

    Parameters
    ----------
    model : Module
        Maps a batch of inputs to K outputs each. Moved to `device`.
    loss : {"cross_entropy", "squared"} or callable
        "squared": ``sum((a f(x) - e_y)^2) / batch``, one-hot targets e_y. A callable takes a f(x) and labels.
    output_scale : float
        a, by which outputs are multiplied before any loss.
    optimizer : {"sgd", "adamw"} or callable
        A callable takes the parameters and returns an optimizer; its rates are scheduled as they are.
    learning_rate, momentum, weight_decay : float
        Of the optimizer; momentum is for "sgd".
    schedule : {"cosine", "constant"}
        The rate of epoch e of E: constant, or from `learning_rate` at e = 0 along half a cosine to
        ``final_rate * learning_rate`` at e = E.
    final_rate : float
        Share of the rate that is left at the end of the cosine.
    epochs : int
        Passes over the samples.
    batch_size : int
    seed : int
        Of the order of samples and of dropout. Weights come with the model.
    device : device, optional
        Default: where the model is.
    tracker : SpectralTracker, optional
        What `track` returned for this model: gets the loss of every record, and is part of checkpoints.
    checkpoint : path, optional
        File that is written after every `checkpoint_every` epochs, whole or not at all. `fit` goes on from it
        where it exists.
    checkpoint_every : int
    progress : bool
        A bar over the epochs on a terminal, once training has taken a second.

    Attributes
    ----------
    history : History

    Notes
    -----
    Every epoch has seeds of its own, derived from `seed`: a resumed training takes the same steps as one that
    was not interrupted. Losses are added up on the device and read once per epoch.

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
        learning_rate: float,
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
            if not (value in known or (callable(value) and name != "schedule")):
                also = "" if name == "schedule" else ", or a callable"
                raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(known)}{also}")
        self.model = model if device is None else model.to(device)
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        self.epochs = check_count(epochs, "epochs", minimum=0)
        self.batch_size = check_count(batch_size, "batch_size")
        self.learning_rate = check_scale(learning_rate, "learning_rate (eta)")
        self.history = History()
        self._loss = loss
        self._output_scale = check_scale(output_scale, "output_scale (a)", strict=True)
        self._schedule, self._final_rate = schedule, check_scale(final_rate, "final_rate")
        self._seed = check_count(seed, "seed", minimum=0)
        self._tracker = tracker
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        self._checkpoint_every = check_count(checkpoint_every, "checkpoint_every")
        self._progress = progress
        inertia, decay = check_scale(momentum, "momentum"), check_scale(weight_decay, "weight_decay")
        if callable(optimizer):
            self.optimizer = optimizer(model.parameters())
        elif optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                model.parameters(), lr=self.learning_rate, momentum=inertia, weight_decay=decay
            )
        else:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate, weight_decay=decay)
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]

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
            Whose accuracy is measured at the end, and after every `test_every` epochs.
        test_every : int
            0: at the end only.
        after_epoch : callable, optional
            ``after_epoch(epochs_taken)``; returning True ends the training.

        Returns
        -------
        History
            Of all epochs, those before a resumption too.

        Raises
        ------
        DivergedError
            If the mean loss of an epoch is not finite.
        ValueError
            If a checkpoint belongs to another training.
        """
        batches = Batches(inputs, labels, self.batch_size, shuffle=True, seed=self._seed, device=self.device)
        if self._checkpoint is not None and self._checkpoint.is_file():
            self._resume(self._checkpoint)
        taken = len(self.history.loss)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self._bar(taken) as bar:
            for epoch in range(taken, self.epochs):
                torch.manual_seed(_mixed(self._seed, epoch))  # of dropout
                batches.epoch = epoch
                self._epoch(batches, epoch)
                bar.set_postfix_str(f"loss {self.history.loss[-1]:.3e}", refresh=False)
                bar.update(1)
                done = epoch + 1
                last = done == self.epochs
                if test is not None and (last or (test_every and done % test_every == 0)):
                    self.history.test_accuracy.append(self.evaluate(*test).accuracy)
                    self.history.test_epochs.append(done)
                stop = after_epoch is not None and after_epoch(done) is True
                if self._checkpoint is not None and (stop or last or done % self._checkpoint_every == 0):
                    self._save(self._checkpoint)
                if stop:
                    break
        return self.history

    def evaluate(self, inputs: torch.Tensor, labels: torch.Tensor, batch_size: int = 512) -> Evaluation:
        """Return mean loss and accuracy in evaluation mode; the model's mode is as before afterwards."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        loss, right = 0.0, 0
        try:
            with torch.no_grad():
                for x, y in Batches(inputs, labels, batch_size, device=self.device):
                    outputs = self.model(x)
                    loss += float(self._value(outputs, y)) * len(y)
                    right += int((outputs.argmax(dim=1) == y).sum())
        finally:
            for module, training in modes:
                module.training = training
        return Evaluation(loss / len(labels), right / len(labels))

    def rate(self, epoch: int) -> float:
        """Return the share of the learning rate at an epoch, counted from 0."""
        if self._schedule == "constant" or self.epochs == 0:
            return 1.0
        share = 0.5 * (1.0 + math.cos(math.pi * epoch / self.epochs))
        return self._final_rate + (1.0 - self._final_rate) * share

    # ------------------------------------------------------------------------------------- helpers

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
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for x, y in batches:
            self.optimizer.zero_grad(set_to_none=True)
            outputs = self.model(x)
            loss = self._value(outputs, y)
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            if self._tracker is not None and self._tracker.is_recorded(self._tracker.step):
                self._tracker.log_loss(loss)
            self.optimizer.step()
            total += loss.detach() * len(y)
            right += (outputs.detach().argmax(dim=1) == y).sum()
        mean = float(total) / len(batches.labels)
        if not math.isfinite(mean):
            text = f"the mean loss of epoch {epoch + 1} is {mean}: lower learning_rate (eta), now "
            text += f"{self.learning_rate:g}"
            raise DivergedError(text, step=(epoch + 1) * len(batches), layer=0)
        self.history.loss.append(mean)
        self.history.accuracy.append(int(right) / len(batches.labels))
        self.history.learning_rate.append(self.learning_rate * self.rate(epoch))

    def _describe(self) -> dict[str, Any]:
        """Return what must be the same for a checkpoint to be gone on from."""
        return {
            "parameters": [[name, list(p.shape)] for name, p in self.model.named_parameters()],
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "schedule": self._schedule,
            "seed": self._seed,
        }

    def _save(self, path: Path) -> None:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        state = {
            "description": self._describe(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": asdict(self.history),
            "tracker": None if self._tracker is None else self._tracker.state_dict(),
        }
        try:
            torch.save(state, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _resume(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        mine = self._describe()
        for name, value in state["description"].items():
            if mine[name] != value:
                raise ValueError(
                    f"{path} belongs to a training with {name} {value}; this one has {mine[name]}"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = History(**state["history"])
        if self._tracker is not None and state["tracker"] is not None:
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
