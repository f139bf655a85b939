# SPDX-License-Identifier: MIT
"""``dlnfast export``: a run as named arrays for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from .._trajectory.export import export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description and the arguments of the command."""
    parser.description = (
        "Write the records of a run, also during the run, as a zarr group of format 3 or\n"
        "as HDF5 that xarray and netCDF 4 read. Memory does not grow with the length of a run in a folder."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "source", metavar="RUN", type=Path, help="run.npz, or the folder of train --checkpoint"
    )
    parser.add_argument("path", metavar="OUT", type=Path, help="ends in .zarr, .h5, .hdf5 or .nc")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="every N-th record only, and the last"
    )
    parser.add_argument(
        "--variables", nargs="+", metavar="NAME", help="which variables (default: all that the run has)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")


def run(arguments: argparse.Namespace) -> int:
    """Run the command, and return its exit status."""
    export(
        arguments.source,
        arguments.path,
        every=arguments.every,
        variables=arguments.variables,
        overwrite=arguments.overwrite,
    )
    print(f"written:  {arguments.path}")
    return 0
