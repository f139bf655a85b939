# SPDX-License-Identifier: MIT
"""`SpectralCallback`: `dlnfast.torch.track` as a callback of the Hugging Face Trainer."""

from __future__ import annotations

import os
import sys
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
from ..torch._state_files import read_state_file
from ..torch.layers import LayerChoice
from ..torch.report import Sink
from ._spectra import Spectra
from .sinks import MLflowSink, TensorBoardSink, TrackioSink, WandbSink

__all__ = ["SpectralCallback"]

#: Name of the tracker's file in a checkpoint folder.
FILE_NAME = "dlnfast_tracker.pt"
#: Name of the entry in the Trainer's state with the folder of the tracker's file.
_ENTRY = "dlnfast_tracker"


class SpectralCallback(Spectra, TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Track the singular values of a model's weights during ``Trainer.train``.

    The state is saved in every checkpoint folder. It is loaded when training is resumed from the checkpoint,
    also if the new ``output_dir`` is another one.

    Parameters
    ----------
    layers, k, every
        Arguments of `dlnfast.torch.track`.
    resume_from : path, optional
        Checkpoint folder with the tracker's state. Needed only if the folder was moved after it was written;
        otherwise it is found from the Trainer's state.
    settings
        Further arguments of `dlnfast.torch.track`. Without sinks in its `report`, the metrics go where
        ``report_to`` sends those of the Trainer: the running run of wandb, MLflow or trackio, and for
        TensorBoard the folder ``output_dir/runs/spectra``.

    Attributes
    ----------
    tracker : SpectralTracker or None
        Tracker in the process of rank 0, after the start of the training.
    stopped : str or None
        Message of the alarm that stopped the training through ``control.should_training_stop``.

    Raises
    ------
    TypeError
        For a `resume_from` that is no path.

    Warns
    -----
    RuntimeWarning
        If a training is resumed without the tracker's state, and for a loss that is not finite.

    Notes
    -----
    Recorded losses are those that the Trainer logs: means over its ``logging_steps``. Each is stored at the
    step before the one at which it is logged, which is the last step with weights in the mean. If the
    tracker's state of a resumed training is not found, new records start at the Trainer's step, with a
    warning.

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

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
        """Take the record of step 0, or resume from a checkpoint."""
        del control, unused
        if not state.is_world_process_zero:
            return
        self._start_tracker(model, list(_find_loggers(args)))
        if state.global_step > 0:
            self._resume(args, state)

    def _resume(self, args: Any, state: Any) -> None:
        assert self.tracker is not None
        reasons = []
        for path in self._list_candidates(args, state):
            if not path.is_file():
                reasons.append(f"{path} is not there")
                continue
            try:
                self.tracker.load_state_dict(read_state_file(path, "the records of a tracker"))
            except ValueError as error:
                if path.parent == self._resume_from:  # the user has chosen this file
                    raise
                reasons.append(f"{path}: {error}")
                continue
            return
        self.tracker.start_at(state.global_step)
        warnings.warn(
            f"training is resumed at step {state.global_step}, but the records before it were not found: "
            f"{'; '.join(reasons)}. New ones start here; pass resume_from=FOLDER to continue the old ones",
            RuntimeWarning,
            stacklevel=2,
        )

    def _list_candidates(self, args: Any, state: Any) -> Iterator[Path]:
        """Yield possible paths of the tracker's state, the most likely first."""
        if self._resume_from is not None:
            yield self._resume_from / FILE_NAME
            return
        entry = (state.stateful_callbacks or {}).get(_ENTRY)
        written = entry.get("attributes", {}).get("folder") if isinstance(entry, dict) else None
        folders = [written, args.resume_from_checkpoint, _get_checkpoint_folder(args, state)]
        paths = (Path(folder) / FILE_NAME for folder in folders if isinstance(folder, (str, Path)))
        yield from dict.fromkeys(paths)

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Take a due record, stop after an alarm, and store the folder of the next checkpoint."""
        del unused
        if self._finish_step(is_last=False):
            control.should_training_stop = True
        if self.tracker is not None and isinstance(state.stateful_callbacks, dict):
            folder = os.fspath(_get_checkpoint_folder(args, state).absolute())
            state.stateful_callbacks[_ENTRY] = {"args": {}, "attributes": {"folder": folder}}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **unused: Any) -> None:
        """Store a loss that the Trainer logs; take the last record at the end of the training loop."""
        del args, control, unused
        if logs and "loss" in logs:
            self._log_loss(float(logs["loss"]), state.global_step - 1)
        if logs and "train_loss" in logs:  # this summary is logged before a best model is loaded
            self._finish_step(is_last=True)

    def on_save(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Write the tracker's state into the checkpoint folder."""
        del control, unused
        folder = _get_checkpoint_folder(args, state)
        if self.tracker is not None and folder.is_dir():
            with atomic_file(folder / FILE_NAME) as file:
                torch.save(self.tracker.state_dict(), file)

    def on_train_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Take the last record."""
        del args, state, control, unused
        self._close_tracker()


def _get_checkpoint_folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _find_loggers(args: Any) -> Iterator[Sink]:
    """Yield sinks for the loggers of `report_to` that the Trainer has started."""
    names = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to or ())
    loaded = {name: sys.modules[name] for name in names if name in sys.modules}
    if "tensorboard" in names:
        folder = os.getenv("TENSORBOARD_LOGGING_DIR") or os.path.join(args.output_dir, "runs")
        yield TensorBoardSink(os.path.join(folder, "spectra"))
    if "wandb" in loaded and loaded["wandb"].run is not None:
        yield WandbSink(loaded["wandb"].run)
    if "mlflow" in loaded and loaded["mlflow"].active_run() is not None:
        yield MLflowSink()
    if "trackio" in loaded:
        run = loaded["trackio"].context_vars.current_run.get()
        if run is not None:
            yield TrackioSink(run)
