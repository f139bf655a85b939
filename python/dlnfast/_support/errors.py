# SPDX-License-Identifier: MIT
"""The exceptions and warnings of dlnfast."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any


class ShapeError(ValueError):
    """An array has the wrong number of axes or the wrong sizes."""


class AssumptionError(ValueError):
    """The reduced engine was requested where its theorem does not apply."""


class DivergedError(ArithmeticError):
    """The loss or the weights of a run became infinite or NaN.

    Attributes
    ----------
    step : int
        First step at which the loss was not finite.
    layer : int
        Layer, counted from 1, with the largest growth of its weights until then; 0 if unknown.
    trajectory : Trajectory or None
        Records before that step.
    """

    def __init__(self, message: str, *, step: int, layer: int, trajectory: Any = None) -> None:
        super().__init__(message)
        self.step = step
        self.layer = layer
        self.trajectory = trajectory

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickling, which by default leaves out the keyword arguments."""
        return partial(type(self), step=self.step, layer=self.layer), self.args, self.__dict__


class FolderInUseError(RuntimeError):
    """Another process, or another object of this process, writes to the folder.

    Attributes
    ----------
    directory : Path
        The folder.
    pid : int or None
        Id of the process that owns the folder; None if the lock file does not name it.
    host : str or None
        Host name of the machine on which that process runs.
    """

    def __init__(
        self, message: str, *, directory: Path, pid: int | None = None, host: str | None = None
    ) -> None:
        super().__init__(message)
        self.directory = directory
        self.pid = pid
        self.host = host

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickling, as for `DivergedError`."""
        rebuild = partial(type(self), directory=self.directory, pid=self.pid, host=self.host)
        return rebuild, self.args, self.__dict__


class CopyWarning(UserWarning):
    """A large array was copied to change its layout or its precision."""
