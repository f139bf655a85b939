# SPDX-License-Identifier: MIT
"""Sinks: receivers of the metrics of `dlnfast.torch.track` during training.

A sink is any object with a method ``log(metrics, step)``, see `dlnfast.torch.Sink`. The ones here write to a
CSV file, TensorBoard, Weights & Biases, MLflow and trackio. A package is imported when its sink is made.
"""

from __future__ import annotations

import csv
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from .._support.arrays import check_path
from .._support.optional import import_optional

__all__ = ["CSVSink", "MLflowSink", "TensorBoardSink", "TrackioSink", "WandbSink"]

_HEADER = ["step", "metric", "value"]
#: Name of the metric with the number of training steps, for runs of wandb that have steps of their own.
_STEP = "dlnfast/step"


class _ClosableSink(ABC):
    """A sink with a file or a run, which it closes if it has opened it.

    A sink is a context manager, which closes it at the end of the block.
    """

    #: Whether this sink has opened its file or run.
    _is_own = True
    _is_closed = False

    @abstractmethod
    def _write(self, metrics: Mapping[str, float], step: int) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Store the metrics of a record.

        Parameters
        ----------
        metrics : mapping of str to float
            Numbers by name.
        step : int
            Number of training steps at the record.

        Raises
        ------
        ValueError
            After `close`.
        """
        if self._is_closed:
            raise ValueError(f"this {type(self).__name__} is closed; wanted one that is open")
        self._write(metrics, step)

    def close(self) -> None:
        """Close the file or run, if this sink has opened it. A second call does nothing."""
        if self._is_own and not self._is_closed:
            self._finish()
        self._is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CSVSink(_ClosableSink):
    """Append metrics to a CSV file with the columns step, metric and value.

    Parameters
    ----------
    path : path
        File; created if it does not exist. Rows are added to an existing file of this sink, as for a training
        that is resumed.

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If the file has other columns.

    Notes
    -----
    Every record is written to the file at once, so that other programs can read it during the training.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from dlnfast.integrations.sinks import CSVSink
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with CSVSink(pathlib.Path(folder) / "metrics.csv") as sink:
    ...         sink.log({"weights/head/stable_rank": 1.5}, step=10)
    ...     print((pathlib.Path(folder) / "metrics.csv").read_text().split())
    ['step,metric,value', '10,weights/head/stable_rank,1.5']
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        target = check_path(path, "path")
        is_new = not target.exists() or target.stat().st_size == 0
        if not is_new:
            with target.open(newline="", encoding="utf-8") as file:
                header = next(csv.reader(file), [])
            if header != _HEADER:
                raise ValueError(f"path is {target}, whose columns are {header}; wanted {_HEADER}")
        self._file = target.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        if is_new:
            self._writer.writerow(_HEADER)

    def _write(self, metrics: Mapping[str, float], step: int) -> None:
        self._writer.writerows((step, name, repr(float(value))) for name, value in metrics.items())
        self._file.flush()

    def _finish(self) -> None:
        self._file.close()


class TensorBoardSink(_ClosableSink):
    """Write metrics as scalars of TensorBoard.

    Parameters
    ----------
    target : path or SummaryWriter
        Folder of the event file, or a writer of the program's own, which is not closed.

    Raises
    ------
    ModuleNotFoundError
        Without TensorBoard, if `target` is a folder.
    TypeError
        For another target.

    Examples
    --------
    >>> from dlnfast.integrations.sinks import TensorBoardSink
    >>> sink = TensorBoardSink("runs/spectra")  # doctest: +SKIP
    """

    def __init__(self, target: Any) -> None:
        self._is_own = not callable(getattr(target, "add_scalar", None))
        self._writer = target
        if self._is_own:
            folder = check_path(target, "target")
            import_optional("tensorboard", "TensorBoardSink")
            self._writer = import_optional("torch.utils.tensorboard", "TensorBoardSink").SummaryWriter(
                os.fspath(folder)
            )

    def _write(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def _finish(self) -> None:
        self._writer.close()


class WandbSink(_ClosableSink):
    """Log metrics to a run of Weights & Biases.

    Parameters
    ----------
    run : wandb run, optional
        Run of the program, such as ``wandb.run``. Its metrics are added to the row of the program's next
        ``log``, so that steps of the program are not disturbed; their horizontal axis is "dlnfast/step".
        Default: a new run, which ``close`` finishes.
    settings
        Arguments of ``wandb.init`` for a new run, such as ``project="spectra"`` or ``mode="offline"``.

    Raises
    ------
    ModuleNotFoundError
        Without wandb, for a new run.
    TypeError
        For a run without a method ``log``, and for settings beside a run.

    Examples
    --------
    >>> from dlnfast.integrations.sinks import WandbSink
    >>> sink = WandbSink(project="spectra", mode="offline")  # doctest: +SKIP
    """

    def __init__(self, run: Any = None, **settings: Any) -> None:
        self._is_own = run is None
        if run is None:
            run = import_optional("wandb", "WandbSink").init(**settings)
        elif not callable(getattr(run, "log", None)):
            raise TypeError(f"run is {type(run).__name__}; wanted a run of wandb")
        elif settings:
            raise TypeError(f"settings {sorted(settings)} are for a new run, but run was given")
        else:
            for pattern in ("weights/*", "change/*"):
                run.define_metric(pattern, step_metric=_STEP)
        self._run = run

    def _write(self, metrics: Mapping[str, float], step: int) -> None:
        if self._is_own:
            self._run.log(dict(metrics), step=step, commit=True)
        else:
            self._run.log({**metrics, _STEP: step}, commit=False)

    def _finish(self) -> None:
        self._run.finish()


class MLflowSink(_ClosableSink):
    """Log metrics to a run of MLflow.

    Parameters
    ----------
    run_id : str, optional
        Id of a run. Default: the active run, or else a new one, which ``close`` ends.
    settings
        Arguments of ``mlflow.start_run`` for a new run, such as ``run_name="spectra"``.

    Raises
    ------
    ModuleNotFoundError
        Without mlflow.
    TypeError
        For settings where there is a run already.

    Notes
    -----
    Set the server or folder with ``mlflow.set_tracking_uri`` before. Characters that MLflow does not allow in
    names become underscores. A record needs one request, which a thread of MLflow makes (version 2.8 or
    newer). A request that fails is in MLflow's log only.

    Examples
    --------
    >>> from dlnfast.integrations.sinks import MLflowSink
    >>> sink = MLflowSink(run_name="spectra")  # doctest: +SKIP
    """

    def __init__(self, run_id: str | None = None, **settings: Any) -> None:
        mlflow = self._mlflow = import_optional("mlflow", "MLflowSink")
        self._metric: Any = import_optional("mlflow.entities", "MLflowSink").Metric
        active = mlflow.active_run()
        has_run = run_id is not None or active is not None
        if has_run and settings:
            raise TypeError(f"settings {sorted(settings)} are for a new run, but there is a run already")
        self._is_own = not has_run
        started = mlflow.start_run(**settings) if self._is_own else active
        self.run_id: str = run_id if run_id is not None else started.info.run_id
        self._client = mlflow.MlflowClient()

    def _write(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        found = [self._metric(_clean(name), value, now, step) for name, value in metrics.items()]
        for start in range(0, len(found), 1000):  # at most 1000 in one request
            batch = found[start : start + 1000]
            self._client.log_batch(self.run_id, metrics=batch, synchronous=False)

    def close(self) -> None:
        """Wait for all requests, and end the run, if this sink has started it."""
        if not self._is_closed:
            self._mlflow.flush_async_logging()
        super().close()

    def _finish(self) -> None:
        self._mlflow.end_run()


def _clean(name: str) -> str:
    """Replace the characters that MLflow does not allow in the name of a metric."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)


class TrackioSink(_ClosableSink):
    """Log metrics to a run of trackio.

    Parameters
    ----------
    run : trackio run, optional
        Run of the program, as returned by ``trackio.init``. Default: a new run, which ``close`` finishes.
    settings
        Arguments of ``trackio.init`` for a new run, such as ``project="spectra"``, which it needs.

    Raises
    ------
    ModuleNotFoundError
        Without trackio, for a new run.
    TypeError
        For a run without a method ``log``, and for settings beside a run.

    Examples
    --------
    >>> from dlnfast.integrations.sinks import TrackioSink
    >>> sink = TrackioSink(project="spectra")  # doctest: +SKIP
    """

    def __init__(self, run: Any = None, **settings: Any) -> None:
        self._is_own = run is None
        if run is None:
            run = import_optional("trackio", "TrackioSink").init(**settings)
        elif not callable(getattr(run, "log", None)):
            raise TypeError(f"run is {type(run).__name__}; wanted a run of trackio")
        elif settings:
            raise TypeError(f"settings {sorted(settings)} are for a new run, but run was given")
        self._run = run

    def _write(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def _finish(self) -> None:
        self._run.finish()
