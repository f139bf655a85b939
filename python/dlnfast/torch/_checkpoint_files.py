# SPDX-License-Identifier: MIT
"""Checkpoints as named tensors that are read one by one: files, sharded files, state dicts and folders."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from .._support.arrays import check_count
from .._support.files import parse_object, read_text, translate_read_errors
from ._safetensors import SafetensorsFile, TensorInfo, allocate
from ._state_files import describe_load_error

#: Endings of the files of checkpoints.
_ENDINGS: Final = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_INDEX_ENDING: Final = ".index.json"
#: Configuration of an adapter in the format of PEFT.
ADAPTER_CONFIG: Final = "adapter_config.json"
#: Factors of an adapter in the format of PEFT.
ADAPTER_MODEL: Final = "adapter_model.safetensors"
_ADAPTER_FILES: Final = (ADAPTER_MODEL, "adapter_model.bin")
#: Files of a model in a folder of its own, the first one that exists.
_MODEL_FILES: Final = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
)
#: Keys under which training programs store the weights of a model beside other states.
_MODEL_KEYS: Final = ("state_dict", "model_state_dict", "model", "module", "net", "weights", "params")
#: Name of a shard, which is no checkpoint of its own.
_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}\.\w+$")
#: Words before the step in a name, from the most to the least specific.
_STEP_WORDS: Final = (r"steps?", r"iter(?:ation)?s?", r"(?:checkpoint|ckpt)", r"epochs?")

#: A checkpoint of the caller: a path or the state dict itself.
CheckpointLike = str | os.PathLike[str] | Mapping[str, Any]


class Checkpoint(Protocol):
    """Named tensors, read one by one.

    Attributes
    ----------
    label : str
        Name of the checkpoint for messages.
    tensors : mapping of str to TensorInfo
        Shapes and types.
    """

    label: str

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shapes and types of all tensors by name."""
        ...

    @property
    def makes_copies(self) -> bool:
        """Whether `read` returns new tensors."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor."""
        ...

    def release(self) -> None:
        """Unmap the parts of files that were read."""
        ...


class StateDict:
    """A state dict in memory as a checkpoint; its tensors are not copied."""

    makes_copies = False

    def __init__(self, content: object, label: str, key: str | None = None) -> None:
        self.label = label
        self._content = find_state_dict(content, label, key)
        self.tensors = describe_tensors(self._content)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor of the state dict."""
        tensor: torch.Tensor = self._content[name]
        return tensor.detach()

    def release(self) -> None:
        """Do nothing: nothing is read."""


class TorchFile:
    """A file of `torch.save`, mapped into memory, so that only the tensors that are read take memory.

    Files in the format before PyTorch 1.6 cannot be mapped: they are loaded as a whole.
    """

    def __init__(self, path: Path, key: str | None = None) -> None:
        self.label = os.fspath(path)
        self._path, self._key = path, key
        self.makes_copies = self._is_mapped = zipfile.is_zipfile(path)
        self._content: Mapping[str, Any] | None = self._load()
        self.tensors = describe_tensors(self._content)
        self.release()

    def _load(self) -> Mapping[str, Any]:
        return find_state_dict(_load_tensors(self._path, self._is_mapped), self.label, self._key)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor of the file, as a new one if the file is mapped."""
        if self._content is None:
            self._content = self._load()
        tensor: torch.Tensor = self._content[name].detach()
        if not self._is_mapped:
            return tensor
        copied = allocate(tensor.nbytes).view(tensor.dtype).reshape(tensor.shape)
        return copied.copy_(tensor)

    def release(self) -> None:
        """Unmap the file; the next read maps it again."""
        if self._is_mapped:
            self._content = None


def _load_tensors(path: Path, is_mapped: bool) -> Any:
    """Return the content of a file of `torch.save`.

    Raises
    ------
    DamagedFileError
        If the file is damaged, or holds other objects than tensors and plain values.
    """
    with translate_read_errors(path, "checkpoint of torch.save"):
        try:
            return torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=is_mapped)
        except pickle.UnpicklingError as error:
            raise ValueError(describe_load_error(error)) from error


class ShardedFiles:
    """A checkpoint in several files, which a JSON index lists.

    Parameters
    ----------
    index : Path
        File whose ``weight_map`` maps names to files of its folder.
    key : str, optional
        Key of the state dict in a file.

    Raises
    ------
    FileNotFoundError
        If a file of the index is missing.
    DamagedFileError
        If the index has another form, or a file lacks a tensor.
    """

    def __init__(self, index: Path, key: str | None = None) -> None:
        self.label = os.fspath(index)
        with translate_read_errors(index, "sharded checkpoint"):
            files = {
                str(name): str(file) for name, file in parse_object(read_text(index))["weight_map"].items()
            }
            for file in files.values():
                if Path(file).name != file:
                    raise ValueError(f"it names the file {file!r}, which is not in its folder")
        self._shards = {file: open_file(index.parent / file, key) for file in sorted(set(files.values()))}
        self._files = files
        self.makes_copies = all(shard.makes_copies for shard in self._shards.values())
        with translate_read_errors(index, "sharded checkpoint"):
            self.tensors = {name: self._shards[file].tensors[name] for name, file in files.items()}

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor of one of the files."""
        return self._shards[self._files[name]].read(name)

    def release(self) -> None:
        """Unmap all files."""
        for shard in self._shards.values():
            shard.release()


class LazyTensors(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint as a mapping that reads each one when it is accessed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        if name not in self._checkpoint.tensors:
            raise KeyError(name)
        return self._checkpoint.read(name)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._checkpoint.tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._checkpoint.tensors)


def describe_tensors(content: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Return shapes and types of the tensors in a state dict; other entries are left out."""
    return {
        name: TensorInfo(tuple(value.shape), value.dtype)
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }


def find_state_dict(content: object, label: str, key: str | None) -> Mapping[str, Any]:
    """Return the state dict of the model in the content of a checkpoint.

    Parameters
    ----------
    content : object
        State dict, or a dict with the state dict under a key.
    label : str
        Name of the checkpoint for messages.
    key : str or None
        Key of the state dict; None: it is found.

    Raises
    ------
    TypeError
        If the content is not a dict.
    ValueError
        If there is no such key, or the state dict cannot be told apart from others.
    """
    if not isinstance(content, Mapping):
        raise TypeError(f"checkpoint {label} is {type(content).__name__}; wanted a state dict")
    if key is not None:
        if not isinstance(content.get(key), Mapping):
            raise ValueError(f"checkpoint {label} has no state dict {key!r}; it has {_format_keys(content)}")
        return find_state_dict(content[key], label, None)
    known = [name for name in _MODEL_KEYS if _has_tensors(content.get(name))]
    if known:
        return find_state_dict(content[known[0]], label, None)
    if describe_tensors(content):
        return content
    others = [name for name, value in content.items() if _has_tensors(value)]
    if len(others) != 1:
        raise ValueError(
            f"checkpoint {label} has {len(others)} state dicts, and the keys {_format_keys(content)}; "
            "wanted one state dict, or key= with the one to use"
        )
    return find_state_dict(content[others[0]], label, None)


def _has_tensors(content: object) -> bool:
    """Return whether a mapping with tensors is in this object, at any depth."""
    if not isinstance(content, Mapping):
        return False
    values = content.values()
    return any(isinstance(value, torch.Tensor) or _has_tensors(value) for value in values)


def _format_keys(content: Mapping[Any, Any]) -> str:
    return ", ".join(map(repr, list(content)[:8])) or "none"


def open_file(path: Path, key: str | None = None) -> Checkpoint:
    """Open a file, or a folder with one model, as a checkpoint.

    Raises
    ------
    FileNotFoundError
        If there is no such file, or no file of a model in the folder.
    DamagedFileError, TypeError, ValueError
        If it cannot be read.
    """
    if path.is_dir():
        found = find_model_file(path)
        if found is None:
            raise FileNotFoundError(f"checkpoint {path} holds none of {', '.join(_MODEL_FILES)}")
        return open_file(found, key)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file or folder")
    if path.name.endswith(_INDEX_ENDING):
        return ShardedFiles(path, key)
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path, key)


def find_adapter_file(folder: Path) -> Path:
    """Return the file with the factors of an adapter in the format of PEFT.

    Raises
    ------
    FileNotFoundError
        If the folder has none.
    """
    for name in _ADAPTER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"adapter {folder} holds none of {', '.join(_ADAPTER_FILES)}")


def find_model_file(folder: Path) -> Path | None:
    """Return the file or the index of the model in a folder; None if there is none."""
    return next((folder / name for name in _MODEL_FILES if (folder / name).is_file()), None)


def is_adapter(path: Path) -> bool:
    """Return whether a folder holds an adapter in the format of PEFT."""
    return (path / ADAPTER_CONFIG).is_file()


def find_adapter_folder(path: Path) -> Path:
    """Return the folder of an adapter for its file of factors; any other path unchanged."""
    return path.parent if path.name in _ADAPTER_FILES and is_adapter(path.parent) else path


def _is_checkpoint(path: Path) -> bool:
    """Return whether a path looks like one checkpoint: a file, or a folder of a model or an adapter."""
    if path.is_dir():
        return is_adapter(path) or find_model_file(path) is not None
    is_file = path.name.endswith((*_ENDINGS, _INDEX_ENDING)) and path.is_file()
    return is_file and _SHARD.search(path.name) is None


def list_checkpoints(paths: CheckpointLike | Sequence[CheckpointLike]) -> list[CheckpointLike]:
    """Return the checkpoints that were passed; a folder of checkpoints is replaced by those in it.

    Raises
    ------
    TypeError
        For another object than paths and state dicts.
    FileNotFoundError
        For a path that does not exist, and a folder without checkpoints.
    ValueError
        If there is none.
    """
    if isinstance(paths, (str, os.PathLike, Mapping)):
        paths = [paths]
    if not isinstance(paths, Sequence):
        raise TypeError(f"paths is {type(paths).__name__}; wanted paths, state dicts, or a sequence of them")
    found: list[CheckpointLike] = []
    for entry in paths:
        if isinstance(entry, Mapping):
            found.append(entry)
        elif isinstance(entry, (str, os.PathLike)):
            found.extend(_list_folder(Path(entry)))
        else:
            raise TypeError(
                f"paths holds {type(entry).__name__}; wanted a path or a state dict, as of model.state_dict()"
            )
    if not found:
        raise ValueError("paths is empty; wanted at least one checkpoint")
    return found


def _list_folder(path: Path) -> list[Path]:
    """Return the path itself if it is one checkpoint, or else the checkpoints in the folder."""
    if not path.is_dir():
        return [find_adapter_folder(path)]
    inside = sorted((entry for entry in path.iterdir() if _is_checkpoint(entry)), key=_natural_key)
    # The folder of a training may hold the final model beside the folders of its checkpoints.
    folders = [entry for entry in inside if entry.is_dir() and find_step(entry) is not None]
    if _is_checkpoint(path):
        return folders or [path]
    indexed = {
        entry.name.removesuffix(_INDEX_ENDING) for entry in inside if entry.name.endswith(_INDEX_ENDING)
    }
    inside = [entry for entry in inside if entry.name not in indexed]
    if not inside:
        raise FileNotFoundError(
            f"folder {path} holds no checkpoints: files {', '.join(_ENDINGS)}, or folders"
        )
    return inside


def _natural_key(path: Path) -> list[tuple[int, str]]:
    """Return a key that sorts numbers within names by their size."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def find_step(path: Path) -> int | None:
    """Return the step in the name of a checkpoint, or else in that of its folder; None if there is none.

    The number after "step" is preferred to those after "iter", "checkpoint" and "epoch", and these to the
    last number of the name.
    """
    name = path.name.removesuffix(_INDEX_ENDING)
    stem = name.removesuffix(Path(name).suffix) if Path(name).suffix in _ENDINGS else name
    for word in _STEP_WORDS:
        found = re.search(rf"{word}[-_=.]?(\d+)", stem, re.IGNORECASE)
        if found is not None:
            return int(found[1])
    numbers = re.findall(r"\d+", stem)
    if numbers:
        return int(numbers[-1])
    is_generic = name in _MODEL_FILES or name in _ADAPTER_FILES or f"{name}{_INDEX_ENDING}" in _MODEL_FILES
    return find_step(path.parent) if is_generic and path.parent.name else None


def order_checkpoints(
    entries: list[CheckpointLike], steps: Sequence[int] | None
) -> tuple[list[CheckpointLike], list[int]]:
    """Return the checkpoints in the order of their steps, with the steps.

    Parameters
    ----------
    entries : list
        Result of `list_checkpoints`.
    steps : sequence of int, optional
        Steps of the entries, ascending. Default: those in the names, if every name has one; else 0, 1, ..

    Raises
    ------
    TypeError, ValueError
        If the steps given are too few or too many, or not ascending, or two names have the same step.
    """
    if steps is not None:
        given = [check_count(step, "steps", minimum=0) for step in steps]
        if len(given) != len(entries):
            raise ValueError(f"steps has {len(given)} numbers for {len(entries)} checkpoints")
        if any(b <= a for a, b in pairwise(given)):
            raise ValueError(f"steps is {given}; wanted ascending numbers, in the order of the checkpoints")
        return entries, given
    found = [None if isinstance(entry, Mapping) else find_step(Path(entry)) for entry in entries]
    known = [step for step in found if step is not None]
    if len(known) < len(entries):
        return entries, list(range(len(entries)))
    order = sorted(range(len(entries)), key=known.__getitem__)
    ordered = [known[i] for i in order]
    for i, j in pairwise(order):
        if known[i] == known[j]:
            raise ValueError(
                f"checkpoints {entries[i]} and {entries[j]} both have step {known[i]} in their names; "
                "wanted different ones, or steps="
            )
    return [entries[i] for i in order], ordered
