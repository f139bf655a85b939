# SPDX-License-Identifier: MIT
"""Import of optional packages, where they are used."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["import_optional"]


def import_optional(package: str, user: str, extra: str | None = None, *, install: str | None = None) -> Any:
    """Import an optional package, or raise an error that says how to install it.

    Parameters
    ----------
    package : str
        Name of a package or module.
    user : str
        Name of the feature that needs the package, for the message.
    extra : str, optional
        Extra of dlnfast that installs the package. Default: the message names the package itself.
    install : str, optional
        Name of the package for pip, if that is another one.

    Raises
    ------
    ModuleNotFoundError
        If the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package.partition(".")[0]:
            raise  # a dependency of the package is missing
        wanted = install or (package.partition(".")[0] if extra is None else f'"dlnfast[{extra}]"')
        raise ModuleNotFoundError(
            f"{user} needs {package}, which is not installed: pip install {wanted}", name=package
        ) from error
