# SPDX-License-Identifier: MIT
"""The compiled core, `core`, in the build for this processor.

The core is compiled for one or more instruction-set levels, each a module of its own (`_core`, `_core_v3`,
`_core_v4`). The highest level that the processor supports is imported; the environment variable
``DLNFAST_LEVEL`` selects another. Modules of higher levels are never loaded, because loading one already runs
instructions that the processor lacks.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn

from .. import _cpu

if TYPE_CHECKING:
    from .. import _core as core

__all__ = ["MODULE_OF_LEVEL", "ProcessorError", "available_levels", "core", "is_forked"]

_PROCESS = os.getpid()
#: {level: module compiled for it}, lowest first.
MODULE_OF_LEVEL: Final = {"baseline": "_core", "v3": "_core_v3", "v4": "_core_v4"}
_INSTRUCTION_SETS: Final = {
    "baseline": "every processor of this architecture",
    "v3": "x86-64-v3 (AVX2)",
    "v4": "x86-64-v4 (AVX-512)",
}
_REBUILD: Final = "pip install --force-reinstall --no-deps --no-cache-dir ."


class ProcessorError(ImportError):
    """The compiled core needs instructions that this processor does not have.

    Raised by ``import dlnfast``, before any of these instructions runs.

    Attributes
    ----------
    level : str
        Lowest level that was built, for example "v4".
    missing : list of str
        Features of that level that this processor lacks, for example "avx512f".
    """

    def __init__(self, message: str, *, level: str, missing: list[str]) -> None:
        super().__init__(message)
        self.level = level
        self.missing = missing

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickling, which by default leaves out the keyword arguments."""
        return partial(type(self), level=self.level, missing=self.missing), self.args, self.__dict__


def _import_level(level: str) -> Any:
    return importlib.import_module(f"..{MODULE_OF_LEVEL[level]}", __package__)


def _built_levels() -> list[str]:
    """Return the levels that were built, lowest first, without loading their modules."""
    return [
        level
        for level, module in MODULE_OF_LEVEL.items()
        if importlib.util.find_spec(f"..{module}", __package__) is not None
    ]


def available_levels() -> list[str]:
    """Return the levels that were built and that this processor supports, lowest first."""
    supported = _cpu.supported_levels()
    return [level for level in _built_levels() if level in supported]


def is_forked() -> bool:
    """Return whether this process was forked after the import."""
    return os.getpid() != _PROCESS


def _refuse_processor(level: str) -> NoReturn:
    missing = _cpu.missing_features(level)
    raise ProcessorError(
        f"dlnfast was built for {_INSTRUCTION_SETS[level]}; this processor lacks {', '.join(missing)}. "
        f"Build it on this machine: '{_REBUILD}' in the folder of the source. With DLNFAST_SIMD=dispatch in "
        f"the environment, the same command builds it for all processors",
        level=level,
        missing=missing,
    )


def _load() -> Any:
    wanted = os.environ.get("DLNFAST_LEVEL")
    built = _built_levels()
    supported = _cpu.supported_levels()
    if not built:
        raise ImportError("no compiled core of dlnfast was found; reinstall the package")
    if wanted is None:
        usable = [level for level in built if level in supported]
        return _import_level(usable[-1]) if usable else _refuse_processor(built[0])
    if wanted not in MODULE_OF_LEVEL:
        raise ImportError(f"DLNFAST_LEVEL is {wanted!r}; wanted one of {', '.join(MODULE_OF_LEVEL)}")
    if wanted not in supported:
        raise ImportError(f"DLNFAST_LEVEL is {wanted!r}; this processor runs {', '.join(supported)}")
    if wanted not in built:
        raise ImportError(
            f"DLNFAST_LEVEL is {wanted!r}; this build has {', '.join(built)}. For all levels: "
            f"'DLNFAST_SIMD=dispatch {_REBUILD}' in the folder of the source"
        )
    return _import_level(wanted)


if not TYPE_CHECKING:
    core = _load()

# OpenMP's threads do not exist in the child of a fork: the child computes with one thread.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=core.forbid_threads)
