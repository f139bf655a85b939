# SPDX-License-Identifier: MIT
"""`SpectralCallback`: `dlnfast.torch.track` as a callback of the Hugging Face Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "dlnfast.integrations.transformers needs transformers, which is not installed: "
        "pip install transformers",
        name="transformers",
    ) from error

import torch

from ._spectra import Spectra

__all__ = ["SpectralCallback"]

#: Name of the tracker's file in a checkpoint's folder.
FILE_NAME = "dlnfast_tracker.pt"


class SpectralCallback(Spectra, TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Follow the singular values of a model's weights during ``Trainer.train``.

    Its state is written into every checkpoint's folder, and read when training is resumed from it.

    Parameters
    ----------
    layers, k, every
        As for `dlnfast.torch.track`.
    settings
        Further ones of `dlnfast.torch.track`.

    Attributes
    ----------
    tracker : SpectralTracker or None
        Present from the start of the training on, in the process of rank 0.

    Notes
    -----
    The losses kept are those that the Trainer logs, means over its ``logging_steps``.

    Examples
    --------
    >>> from dlnfast.integrations.transformers import SpectralCallback  # doctest: +SKIP
    >>> spectra = SpectralCallback("*.attention.self.query", k=8)  # doctest: +SKIP
    >>> Trainer(model, arguments, train_dataset=data, callbacks=[spectra]).train()  # doctest: +SKIP
    >>> spectra.trajectory(of="change").singular_values(1)  # doctest: +SKIP
    """

    _starter = "Trainer.train"

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """Take the record of step 0, or go on where a checkpoint was."""
        del control, rest
        if not state.is_world_process_zero:
            return
        tracker = self._begin(model)
        kept = _place(args, state)
        if state.global_step > 0 and kept.is_file():
            tracker.load_state_dict(torch.load(kept, weights_only=True))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        """Keep the loss that the Trainer logs."""
        del args, control, rest
        if self.tracker is not None and logs and "loss" in logs:
            self.tracker.log_loss(float(logs["loss"]), state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Write the state beside the checkpoint's weights."""
        del control, rest
        place = _place(args, state)
        if self.tracker is not None and place.parent.is_dir():
            torch.save(self.tracker.state_dict(), place)

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Take the last record."""
        del args, state, control, rest
        self._end()


def _place(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE_NAME
