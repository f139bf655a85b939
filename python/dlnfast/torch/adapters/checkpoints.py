# SPDX-License-Identifier: MIT
"""Checkpoints of whole models, read tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from ..._support.arrays import check_path
from ..._support.files import parse_object, read_text, translate_read_errors
from ..._support.optional import import_optional
from .._names import strip_wrapper_parts
from .._state_files import read_state_file

_KIND: Final = "model checkpoint"
_CONFIG: Final = "config.json"
#: Files of a model in a folder, in the order of preference; an index lists the files of its parts.
_NAMES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
#: Entries of training checkpoints that hold the state of the model.
_STATES: Final = ("state_dict", "model_state_dict", "model")


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
    Tensors in safetensors files are read one by one. A file of `torch.save` is read as a whole, and kept in
    memory until a tensor of another file is read.
    """

    def __init__(self, path: str | os.PathLike[str], name: str) -> None:
        self.path = check_path(path, name)
        self.config = self._read_config()
        self._open: tuple[Path, Mapping[str, torch.Tensor]] | None = None
        self._places: dict[str, tuple[Path, str]] = {}
        for file in self._list_files(name):
            for key in self._list_keys(file):
                short = strip_wrapper_parts(key)
                if short in self._places:
                    raise ValueError(f"{self.path} has two tensors {short!r}, in {file.name} and before")
                self._places[short] = file, key

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._places)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU."""
        file, key = self._places[name]
        if file.suffix != ".safetensors":
            return self._read_torch_file(file)[key]
        with translate_read_errors(file, _KIND), _open_safetensors(file) as content:
            tensor: torch.Tensor = content.get_tensor(key)
        return tensor

    def _read_config(self) -> dict[str, Any]:
        path = (self.path if self.path.is_dir() else self.path.parent) / _CONFIG
        if not path.is_file():
            return {}
        with translate_read_errors(path, "model configuration"):
            return parse_object(read_text(path))

    def _list_files(self, name: str) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise FileNotFoundError(f"{name} is {os.fspath(self.path)!r}, which is no file and no folder")
        for candidate in _NAMES:
            found = self.path / candidate
            if found.is_file():
                return self._list_parts(found) if found.suffix == ".json" else [found]
        others = sorted(self.path.glob("*.safetensors")) or sorted(self.path.glob("*.bin"))
        if not others:
            raise FileNotFoundError(
                f"{name} is {os.fspath(self.path)!r}, a folder without {_NAMES[0]} and {_NAMES[2]}"
            )
        return others

    def _list_parts(self, index: Path) -> list[Path]:
        with translate_read_errors(index, "index of a model checkpoint"):
            names = sorted(set(parse_object(read_text(index))["weight_map"].values()))
            if any(Path(part).name != part for part in names):
                raise ValueError("it names files in other folders")
        parts = [self.path / part for part in names]
        for part in parts:
            if not part.is_file():
                raise FileNotFoundError(f"{self.path} lacks {part.name}, which {index.name} names")
        return parts

    def _list_keys(self, file: Path) -> list[str]:
        if file.suffix != ".safetensors":
            return list(self._read_torch_file(file))
        with translate_read_errors(file, _KIND), _open_safetensors(file) as content:
            return list(content.keys())

    def _read_torch_file(self, file: Path) -> Mapping[str, torch.Tensor]:
        if self._open is None or self._open[0] != file:
            self._open = None  # free the memory first
            content = read_state_file(file, f"a {_KIND}")
            for key in _STATES:
                if isinstance(content.get(key), dict):
                    content = content[key]
                    break
            tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
            if not tensors:
                raise ValueError(f"{file} cannot be read as a {_KIND}: it has no tensors")
            self._open = file, tensors
        return self._open[1]


def _open_safetensors(file: Path) -> Any:
    safetensors = import_optional("safetensors", "checkpoints in safetensors files")
    return safetensors.safe_open(file, framework="pt")
