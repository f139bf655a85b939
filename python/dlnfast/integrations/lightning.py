# SPDX-License-Identifier: MIT
"""`SpectralCallback`: `dlnfast.torch.track` as a callback of Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError as error:
    if error.name not in ("lightning", "lightning.pytorch"):
        raise
    raise ModuleNotFoundError(
        "dlnfast.integrations.lightning needs Lightning, which is not installed: pip install lightning",
        name="lightning",
    ) from error

from ._spectra import Spectra

__all__ = ["SpectralCallback"]


class SpectralCallback(Spectra, Callback):  # type: ignore[misc, unused-ignore]
    """Track the singular values of a LightningModule's weights during ``trainer.fit``.

    The state is saved in Lightning's checkpoints, so that a resumed fit continues the records.

    Parameters
    ----------
    layers, k, every
        Arguments of `dlnfast.torch.track`.
    settings
        Further arguments of `dlnfast.torch.track`. Without sinks in its `report`, the Trainer's own loggers
        receive the metrics.

    Attributes
    ----------
    tracker : SpectralTracker or None
        Tracker in the process of rank 0, after the start of the fit.
    stopped : str or None
        Message of the alarm that stopped the fit through ``trainer.should_stop``.

    Notes
    -----
    Each record has the loss that ``training_step`` returned for its weights; with accumulated gradients it is
    the mean over their batches. Records are taken at the ends of batches, before other callbacks can replace
    the weights by averages at the end of the fit. Steps of several optimizers count as in
    `dlnfast.torch.track`.

    Examples
    --------
    >>> from dlnfast.integrations.lightning import SpectralCallback  # doctest: +SKIP
    >>> spectra = SpectralCallback("penultimate", k=8, every=10)  # doctest: +SKIP
    >>> lightning.Trainer(callbacks=[spectra]).fit(model, loader)  # doctest: +SKIP
    >>> spectra.trajectory().singular_values(1)  # doctest: +SKIP
    """

    _starter = "trainer.fit"
    #: State from a checkpoint, until the fit starts.
    _restored: Mapping[str, Any] | None = None
    #: Number of steps before the current batch; a number of steps, and the losses of all batches after them.
    _step = 0
    _losses: tuple[int, list[float]] = (-1, [])

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the record of step 0, or resume from a checkpoint."""
        if not trainer.is_global_zero:
            return
        tracker = self._start_tracker(pl_module, [_LoggerSink(logger) for logger in trainer.loggers])
        if self._restored is not None:
            tracker.load_state_dict(self._restored)
            self._restored = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Store the number of steps before this batch."""
        del trainer, pl_module, batch, batch_idx
        if self.tracker is not None:
            self._step = self.tracker.step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Store the loss if there is a record of the weights before this batch; take a due record."""
        del batch, batch_idx
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        tracker = self.tracker
        if tracker is None:
            return
        if loss is not None and tracker.is_recorded(self._step):
            # With automatic optimization Lightning has divided the loss by the number of batches.
            scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            if self._losses[0] != self._step:
                self._losses = (self._step, [])
            self._losses[1].append(scale * float(loss))
            self._log_loss(sum(self._losses[1]) / len(self._losses[1]), self._step)
        is_last = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        if self._finish_step(is_last=is_last):
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the last record if this epoch is the last."""
        del pl_module
        is_last = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
        if self._finish_step(is_last=is_last or trainer.should_stop):
            trainer.should_stop = True

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the last record."""
        del trainer, pl_module
        self._close_tracker()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {} if self.tracker is None else self.tracker.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store the state from a checkpoint; the tracker resumes from it when the fit starts."""
        self._restored = state_dict or None


class _LoggerSink:
    """Sink that passes metrics to a logger of Lightning."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._logger.log_metrics(dict(metrics), step=step)
        self._logger.save()
