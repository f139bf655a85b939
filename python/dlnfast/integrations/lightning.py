"""`SpectralCallback`: `dlnfast.torch.track` as a callback of Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError as error:
    if error.name not in ("lightning", "lightning.pytorch"):
        raise
    raise ModuleNotFoundError(
        "dlnfast.integrations.lightning needs Lightning, which is not installed: pip install lightning",
        name="lightning",
    ) from error

from ..torch.layers import LayerChoice
from ..torch.track import Of, SpectralTracker, track
from ..trajectory import Trajectory

__all__ = ["SpectralCallback"]


class SpectralCallback(Callback):  # type: ignore[misc, unused-ignore]
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
    The loss that ``training_step`` returned is kept for every record. Where a model has several optimizers,
    steps of the first one that holds a chosen weight count.

    Examples
    --------
    >>> from dlnfast.integrations.lightning import SpectralCallback  # doctest: +SKIP
    >>> spectra = SpectralCallback("penultimate", k=8, every=10)  # doctest: +SKIP
    >>> lightning.Trainer(callbacks=[spectra]).fit(model, loader)  # doctest: +SKIP
    >>> spectra.trajectory().singular_values(1)  # doctest: +SKIP
    """

    def __init__(
        self,
        layers: LayerChoice = None,
        *,
        k: int | Literal["all"] = 8,
        every: int = 10,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.tracker: SpectralTracker | None = None
        self._settings = {"layers": layers, "k": k, "every": every, **settings}
        self._restored: Mapping[str, Any] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the record of step 0, or go on where a checkpoint was."""
        if not trainer.is_global_zero:
            return
        if self.tracker is not None:
            self.tracker.close()
        self.tracker = track(pl_module, **self._settings)
        if self._restored is not None:
            self.tracker.load_state_dict(self._restored)
            self._restored = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss that belongs to the weights before this step, once per record."""
        del trainer, pl_module, batch, batch_idx
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        tracker = self.tracker
        if loss is not None and tracker is not None and tracker.is_recorded(tracker.step - 1):
            tracker.log_loss(loss, tracker.step - 1)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the last record."""
        del trainer, pl_module
        if self.tracker is not None:
            self.tracker.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {} if self.tracker is None else self.tracker.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what a checkpoint kept; the tracker goes on from it when the fit starts."""
        self._restored = state_dict or None

    def trajectory(self, of: Of = "weights") -> Trajectory:
        """Return the records so far, as `SpectralTracker.trajectory` does.

        Raises
        ------
        RuntimeError
            Before the first fit, and in processes other than that of rank 0.
        """
        if self.tracker is None:
            raise RuntimeError("there are no records: trainer.fit was not called, or this is not rank 0")
        return self.tracker.trajectory(of)
