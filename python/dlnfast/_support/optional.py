# SPDX-License-Identifier: MIT
"""Packages that only some users need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["imported"]


def imported(package: str, what: str, extra: str | None = None, *, install: str | None = None) -> Any:
    """Return a package, or say what needs it and how to get it.

    Parameters
    ----------
    package : str
        Or a module of one.
    what : str
        What needs it.
    extra : str, optional
        The extra of dlnfast that brings it; by default the package itself is named.
    install : str, optional
        What pip calls it, where that is another name.

    Raises
    ------
    ModuleNotFoundError
        If it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package.partition(".")[0]:
            raise  # something that it needs itself
        wanted = install or (package.partition(".")[0] if extra is None else f'"dlnfast[{extra}]"')
        raise ModuleNotFoundError(
            f"{what} needs {package}, which is not installed: pip install {wanted}", name=package
        ) from error
