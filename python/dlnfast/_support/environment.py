# SPDX-License-Identifier: MIT
"""The environment of a result: versions of packages, the build and the machine."""

from __future__ import annotations

import functools
import platform
from typing import Any, Final

from .threads import build_info

#: Packages whose versions are part of the environment, if they are installed.
PACKAGES: Final = ("numpy", "matplotlib", "tqdm")


def environment() -> dict[str, Any]:
    """Return the versions, the build and the machine on which results depend besides their settings."""
    return {
        "dlnfast": build_info(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := version(name)) is not None},
        "machine": f"{platform.system()} {platform.machine()}",
    }


@functools.cache
def version(package: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    import importlib.metadata  # slow to import, and not needed by every program

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
