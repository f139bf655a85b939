# SPDX-License-Identifier: MIT
"""`SpectralCallback`: `dlnfast.torch.track` as a callback of the Hugging Face Trainer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

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

from .._support.arrays import check_path
from .._support.files import atomic_file
from ..torch.layers import LayerChoice
from ._spectra import Spectra

__all__ = ["SpectralCallback"]

#: Name of the tracker's file in a checkpoint's folder.
FILE_NAME = "dlnfast_tracker.pt"
#: Name of the entry in the Trainer's state that says where the tracker's file was written.
_ENTRY = "dlnfast_tracker"


class SpectralCallback(Spectra, TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Follow the singular values of a model's weights during ``Trainer.train``.

    Its state is written into every checkpoint's folder, and read when training is resumed from it, also into
    another ``output_dir``.

    Parameters
    ----------
    layers, k, every
        As for `dlnfast.torch.track`.
    resume_from : path, optional
        Checkpoint folder with the tracker's state, where it was moved since it was written. By default the
        folder is known to the Trainer's state.
    settings
        Further ones of `dlnfast.torch.track`.

    Attributes
    ----------
    tracker : SpectralTracker or None
        Present from the start of the training on, in the process of rank 0.

    Raises
    ------
    TypeError
        For a `resume_from` that is no path.

    Warns
    -----
    RuntimeWarning
        Where a training is resumed without the tracker's state; for a loss that is not finite.

    Notes
    -----
    The losses kept are those that the Trainer logs: means over its ``logging_steps``, each kept at the last
    step whose weights are part of the mean, that before the step at which it is logged. A resumed training
    whose tracker's state is not found begins with new records, numbered by the Trainer's step, and says so.

    Examples
    --------
    >>> from dlnfast.integrations.transformers import SpectralCallback  # doctest: +SKIP
    >>> spectra = SpectralCallback("*.attention.self.query", k=8)  # doctest: +SKIP
    >>> Trainer(model, arguments, train_dataset=data, callbacks=[spectra]).train()  # doctest: +SKIP
    >>> spectra.trajectory(of="change").singular_values(1)  # doctest: +SKIP
    """

    _starter = "Trainer.train"

    def __init__(
        self,
        layers: LayerChoice = None,
        *,
        k: int | Literal["all"] = 8,
        every: int = 10,
        resume_from: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(layers, k=k, every=every, **settings)
        self._resume_from = None if resume_from is None else check_path(resume_from, "resume_from")

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """Take the record of step 0, or go on where a checkpoint was."""
        del control, rest
        if not state.is_world_process_zero:
            return
        self._begin(model)
        if state.global_step > 0:
            self._resume(args, state)

    def _resume(self, args: Any, state: Any) -> None:
        assert self.tracker is not None
        reasons = []
        for path in self._candidates(args, state):
            if not path.is_file():
                reasons.append(f"{path} is not there")
                continue
            try:
                self.tracker.load_state_dict(torch.load(path, weights_only=True))
            except ValueError as error:
                if path.parent == self._resume_from:  # this one was asked for
                    raise
                reasons.append(f"{path}: {error}")
                continue
            return
        self.tracker.start_at(state.global_step)
        warnings.warn(
            f"training is resumed at step {state.global_step}, but the records before it were not found: "
            f"{'; '.join(reasons)}. New ones begin; pass resume_from=FOLDER to go on with the old ones",
            RuntimeWarning,
            stacklevel=2,
        )

    def _candidates(self, args: Any, state: Any) -> Iterator[Path]:
        """Yield where the tracker's state may be, the likeliest first, each path once."""
        if self._resume_from is not None:
            yield self._resume_from / FILE_NAME
            return
        entry = (state.stateful_callbacks or {}).get(_ENTRY)
        written = entry.get("attributes", {}).get("folder") if isinstance(entry, dict) else None
        folders = [written, args.resume_from_checkpoint, _folder(args, state)]
        paths = (Path(folder) / FILE_NAME for folder in folders if isinstance(folder, (str, Path)))
        yield from dict.fromkeys(paths)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Take a record that is due; name the folder of a checkpoint that is about to be written."""
        del rest
        self._finish_step(is_last=False)
        if self.tracker is not None and isinstance(state.stateful_callbacks, dict):
            folder = os.fspath(_folder(args, state).absolute())
            state.stateful_callbacks[_ENTRY] = {"args": {}, "attributes": {"folder": folder}}
        del control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        """Keep the loss that the Trainer logs; take the last record when the training loop is over."""
        del args, control, rest
        if logs and "loss" in logs:
            self._log_loss(float(logs["loss"]), state.global_step - 1)
        if logs and "train_loss" in logs:  # the summary, logged before a best model is loaded
            self._finish_step(is_last=True)

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Write the state beside the checkpoint's weights."""
        del control, rest
        folder = _folder(args, state)
        if self.tracker is not None and folder.is_dir():
            with atomic_file(folder / FILE_NAME) as file:
                torch.save(self.tracker.state_dict(), file)

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Take the last record."""
        del args, state, control, rest
        self._end()


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
