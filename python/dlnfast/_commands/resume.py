# SPDX-License-Identifier: MIT
"""``dlnfast resume``: a checkpointed run, to its end."""

from __future__ import annotations

import argparse
from pathlib import Path

from .._training.train import resume
from .common import print_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description and the arguments of the command."""
    parser.description = (
        "Resume a run that train(.., checkpoint=DIR) or dlnfast train --checkpoint DIR has written\n"
        "to a folder, and finish it. dlnfast.load(DIR) reads the folder, also during the run."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("directory", metavar="DIR", type=Path)


def run(arguments: argparse.Namespace) -> int:
    """Run the command, and return its exit status."""
    run = resume(arguments.directory, progress=True)
    print_run(run)
    print(f"saved in: {arguments.directory}")
    return 0
