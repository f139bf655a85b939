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
    """Follow the singular values of a LightningModule's weights during ``trainer.fit``.

    Its state is part of Lightning's checkpoints, so that a resumed fit goes on with the same records.

    Parameters
    ----------
    layers, k, every
        As for `dlnfast.torch.track`.
    settings
        Further ones of `dlnfast.torch.track`.

    Attributes
    ----------
    tracker : SpectralTracker or None
        Present from the start of the fit on, in the process of rank 0.

    Notes
    -----
    For every record the loss that ``training_step`` returned for these weights is kept, as it was returned:
    the mean over the batches whose gradients are accumulated. Records are taken at the ends of batches,
    before other callbacks can replace the weights by averages when the fit ends. Steps of several optimizers
    count as in `dlnfast.torch.track`.

    Examples
    --------
    >>> from dlnfast.integrations.lightning import SpectralCallback  # doctest: +SKIP
    >>> spectra = SpectralCallback("penultimate", k=8, every=10)  # doctest: +SKIP
    >>> lightning.Trainer(callbacks=[spectra]).fit(model, loader)  # doctest: +SKIP
    >>> spectra.trajectory().singular_values(1)  # doctest: +SKIP
    """

    _starter = "trainer.fit"
    #: What a checkpoint kept, until the fit starts.
    _restored: Mapping[str, Any] | None = None
    #: The steps that were taken before the batch under way, and the losses of all batches at these weights.
    _step = 0
    _losses: tuple[int, list[float]] = (-1, [])

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the record of step 0, or go on where a checkpoint was."""
        if not trainer.is_global_zero:
            return
        tracker = self._start_tracker(pl_module)
        if self._restored is not None:
            tracker.load_state_dict(self._restored)
            self._restored = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note which weights this batch meets."""
        del trainer, pl_module, batch, batch_idx
        if self.tracker is not None:
            self._step = self.tracker.step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss of the weights before this batch, where they are recorded; take records."""
        del batch, batch_idx
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        tracker = self.tracker
        if tracker is None:
            return
        if loss is not None and tracker.is_recorded(self._step):
            # Lightning divides what training_step returned, where it steps the optimizers itself.
            scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            if self._losses[0] != self._step:
                self._losses = (self._step, [])
            self._losses[1].append(scale * float(loss))
            self._log_loss(sum(self._losses[1]) / len(self._losses[1]), self._step)
        self._finish_step(is_last=trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the last record where this epoch is the last."""
        del pl_module
        is_last = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
        self._finish_step(is_last=is_last or trainer.should_stop)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the last record."""
        del trainer, pl_module
        self._close_tracker()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {} if self.tracker is None else self.tracker.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what a checkpoint kept; the tracker goes on from it when the fit starts."""
        self._restored = state_dict or None
