# SPDX-License-Identifier: MIT
"""The exceptions and warnings of dlnfast."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any


class ShapeError(ValueError):
    """An array has the wrong number of axes or the wrong sizes."""


class AssumptionError(ValueError):
    """The reduced engine was asked for where its theorem does not hold."""


class DivergedError(ArithmeticError):
    """Gradient descent left the finite numbers.

    Attributes
    ----------
    step : int
        First step at which the loss was no longer finite.
    layer : int
        Layer, counted from 1, whose weights had grown most by then; 0 where that is not known.
    trajectory : Trajectory or None
        Everything recorded before that step.
    """

    def __init__(self, message: str, *, step: int, layer: int, trajectory: Any = None) -> None:
        super().__init__(message)
        self.step = step
        self.layer = layer
        self.trajectory = trajectory

    def __reduce__(self) -> tuple[Any, ...]:
        """Let other processes hand the error back: its arguments are keywords, which pickle leaves out."""
        return partial(type(self), step=self.step, layer=self.layer), self.args, self.__dict__


class FolderInUseError(RuntimeError):
    """Another process, or another object of this one, writes to the folder.

    Attributes
    ----------
    directory : Path
        The folder.
    pid : int or None
        Id of the process that owns the folder; None where the lock does not say.
    host : str or None
        Name of the machine on which that process runs.
    """

    def __init__(
        self, message: str, *, directory: Path, pid: int | None = None, host: str | None = None
    ) -> None:
        super().__init__(message)
        self.directory = directory
        self.pid = pid
        self.host = host

    def __reduce__(self) -> tuple[Any, ...]:
        """Let other processes hand the error back, as for `DivergedError`."""
        rebuild = partial(type(self), directory=self.directory, pid=self.pid, host=self.host)
        return rebuild, self.args, self.__dict__


class CopyWarning(UserWarning):
    """A large array had to be copied to change its layout or its precision."""
