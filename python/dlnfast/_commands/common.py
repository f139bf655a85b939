# SPDX-License-Identifier: MIT
"""Parts that several commands share: lazily filled parsers, messages, and output folders."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from .._problem.samples import SampleProblem
from .._trajectory.trajectory import Trajectory

DEFAULT_FOLDER: Final = "out"
INTERRUPTED: Final = "interrupted"


class LazyParser(argparse.ArgumentParser):
    """A parser that adds its arguments when it is used, so that only the command in use is imported."""

    #: Adds the arguments; None when they are there.
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None

    def fill(self) -> None:
        """Add the arguments, once."""
        add, self.add_arguments = self.add_arguments, None
        if add is not None:
            add(self)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Add the arguments, then parse."""
        self.fill()
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        """Return the help text of all arguments."""
        self.fill()
        return super().format_help()


def complain(text: str, status: int) -> int:
    """Print a message to the error stream, and return the exit status."""
    print("dlnfast: " + " ".join(text.split()), file=sys.stderr)
    return status


def add_specification(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a command that reads a specification."""
    parser.add_argument("spec", metavar="SPEC.toml", type=Path)
    parser.add_argument(
        "--set",
        dest="changes",
        metavar="SECTION.KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change entries of the file",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"where to write (default: {DEFAULT_FOLDER}/<name of SPEC>)"
    )


def make_folder(arguments: argparse.Namespace, directory: str | None) -> Path:
    """Return the output folder, and make it if it is missing."""
    folder = Path(arguments.out or directory or f"{DEFAULT_FOLDER}/{arguments.spec.stem}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def print_run(run: Trajectory) -> None:
    """Print the engine, the time and the loss of a run."""
    steps = len(run.loss) - 1
    floor = ""
    if run.problem is not None and not isinstance(run.problem, SampleProblem):
        floor = f" (least possible: {run.problem.loss_floor:.6g})"
    per_step = f", {1e6 * run.wall_time / steps:.3g} us a step" if steps else ""
    print(f"engine:   {run.engine}: {run.certificate.reason}")
    print(f"training: {steps} steps in {run.wall_time:.3g} s{per_step}")
    print(f"loss:     {run.loss[0]:.6g} -> {run.loss[-1]:.6g}{floor}")
