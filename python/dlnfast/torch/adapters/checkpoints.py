# SPDX-License-Identifier: MIT
"""Checkpoints of whole models by the names of their tensors, with their configuration."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from ..._support.arrays import check_path
from ..._support.files import parse_object, read_text, translate_read_errors
from .. import _checkpoint_files as files
from .._names import strip_wrapper_parts

_CONFIG: Final = "config.json"


class Checkpoint:
    """The tensors of a model in files, by their names without the parts of wrappers.

    Parameters
    ----------
    path : path-like
        File of safetensors or `torch.save`, or a folder with one, in parts or whole.
    name : str
        Name of the argument, for messages.

    Notes
    -----
    Tensors are read one by one.
    """

    def __init__(self, path: str | os.PathLike[str], name: str) -> None:
        self.path = check_path(path, name)
        self.config = self._read_config()
        self._places: dict[str, tuple[files.Checkpoint, str]] = {}
        for source in self._open_sources(name):
            for key in source.tensors:
                short = strip_wrapper_parts(key)
                if short in self._places:
                    raise ValueError(f"{self.path} has two tensors {short!r}, in {source.label} and before")
                self._places[short] = source, key

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._places)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU."""
        source, key = self._places[name]
        return source.read(key)

    def _read_config(self) -> dict[str, Any]:
        path = (self.path if self.path.is_dir() else self.path.parent) / _CONFIG
        if not path.is_file():
            return {}
        with translate_read_errors(path, "model configuration"):
            return parse_object(read_text(path))

    def _open_sources(self, name: str) -> Iterator[files.Checkpoint]:
        """Yield the file of the model, or all files of a folder whose names are not those of a model."""
        if self.path.is_dir():
            found = files.find_model_file(self.path)
            others = sorted(self.path.glob("*.safetensors")) or sorted(self.path.glob("*.bin"))
            if found is None and not others:
                raise FileNotFoundError(
                    f"{name} is {os.fspath(self.path)!r}, a folder without model.safetensors and "
                    "pytorch_model.bin"
                )
            chosen: list[Path] = others if found is None else [found]
        elif self.path.is_file():
            chosen = [self.path]
        else:
            raise FileNotFoundError(f"{name} is {os.fspath(self.path)!r}, which is no file and no folder")
        yield from map(files.open_file, chosen)
