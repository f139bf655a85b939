# SPDX-License-Identifier: MIT
"""The command line: output, errors and exit statuses. The commands are modules of `_commands`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

from ._commands.common import INTERRUPTED, LazyParser, complain
from ._support.errors import DivergedError, FolderInUseError
from ._version import __version__
from .benchmarks import record

__all__ = ["main"]

#: Name -> one line about it. The module of a command in `_commands` has the same name.
COMMANDS: Final = {
    "figure": "compute and draw a published figure",
    "train": "train a network as specified in a TOML file",
    "resume": "resume a checkpointed run",
    "export": "write a run as named arrays for other programs: zarr or HDF5",
    "sweep": "train a grid of specifications on all cores",
    "finetune": "fine-tune a pretrained transformer by LoRA and Deep LoRA",
    "adapter": "audit, resize and extract adapters in files",
    "spectra": "singular values of the matrices in checkpoints",
    "bench": "time dlnfast beside NumPy, PyTorch and JAX",
    "info": "print version, build, threads and packages",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    The status is 0 on success; 1 if a run diverged or failed in a sweep, if the memory does not suffice, or
    if the output cannot be written, for example to a full disk; 2 for a wrong request; 130 after Ctrl-C and
    143 after SIGTERM. A closed pipe, as with ``| head``, does not end the command.
    """
    output, errors = _SteadyStream(sys.stdout), _SteadyStream(sys.stderr)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            status = _run(argv)
        finally:
            output.finish()
        if output.error is not None and not isinstance(output.error, BrokenPipeError):
            status = complain(f"the output could not be written: {output.error}", status or 1)
        errors.finish()
    return status


class _SteadyStream:
    """A text stream that ignores write errors until the end: results matter more than messages.

    Parameters
    ----------
    stream : TextIO or None
        None, which Python uses for a closed descriptor, takes no text.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the stream."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text if the stream takes it; characters that the encoding lacks are escaped."""
        if self._stream is not None and self.error is None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except OSError as error:
                self.error = error
        return len(text)

    def flush(self) -> None:
        """Write the buffer."""
        if self._stream is not None and self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self.error = error

    def finish(self) -> None:
        """Write the buffer; after an error, redirect the descriptor so that Python's exit does not fail."""
        self.flush()
        if self.error is not None:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if argv is None and arguments.timed:
        record.restart_without_caps("dlnfast")
    try:
        return int(arguments.run(arguments))
    except DivergedError as error:
        return complain(str(error), 1)
    except FileNotFoundError as error:
        return complain(f"{error.filename}: no such file" if error.filename else str(error), 2)
    except (ValueError, TypeError, OSError, ImportError, FolderInUseError) as error:
        return complain(str(error), 2)
    except MemoryError as error:
        return complain(str(error) or "not enough memory", 1)
    except KeyboardInterrupt:
        return complain(INTERRUPTED, 130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dlnfast", description="Exact gradient descent on deep linear networks, from data to figure."
    )
    parser.add_argument("--version", action="version", version=f"dlnfast {__version__}")
    parser.set_defaults(timed=False, run=lambda _: _complain_of_no_command(parser))
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=LazyParser)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary).add_arguments = _make_filler(name)
    return parser


def _make_filler(name: str) -> Any:
    """Return the function that fills the parser of a command."""

    def fill(parser: argparse.ArgumentParser) -> None:
        command = importlib.import_module(f"._commands.{name}", __package__)
        parser.set_defaults(run=command.run)
        command.add_arguments(parser)

    return fill


def _complain_of_no_command(parser: argparse.ArgumentParser) -> int:
    parser.print_help(sys.stderr)
    return 2
