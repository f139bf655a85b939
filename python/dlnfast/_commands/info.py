# SPDX-License-Identifier: MIT
"""``dlnfast info``: version, build, threads and packages."""

from __future__ import annotations

import argparse
import platform
from typing import Final

from .._support.environment import PACKAGES, version
from .._support.threads import build_info
from ..benchmarks import record

_OPTIONAL: Final = ("torch", "threadpoolctl", "pyarrow", "pillow", "xarray", "zarr", "h5netcdf", "h5py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description and the arguments of the command."""


def run(arguments: argparse.Namespace) -> int:
    """Run the command, and return its exit status."""
    rows = [(key, ", ".join(v) if isinstance(v, list) else v) for key, v in build_info().items()]
    rows.append(("python", platform.python_version()))
    rows += [(package, version(package) or "not installed") for package in (*PACKAGES, *_OPTIONAL)]
    pools = record.thread_pools() or []
    rows += [("thread pool", f"{p['internal_api']}, {p['num_threads']} threads") for p in pools]
    for name, value in rows:
        print(f"{name + ':':<14} {value}")
    return 0
