# SPDX-License-Identifier: MIT
"""SHA-256 checksums of settings, arrays and states. Files hold them, so they never change."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import hashlib

Buffer = bytes | memoryview


def new_sha256(content: bytes = b"") -> hashlib._Hash:
    """Return a SHA-256 hash object of this content."""
    import hashlib  # loads OpenSSL, which takes a tenth of the time of `import dlnfast`

    return hashlib.sha256(content)


def hash_entries(text: str, entries: Iterable[tuple[str, Buffer]]) -> str:
    """Return the checksum of a text, followed by the description and the bytes of each entry."""
    digest = new_sha256(text.encode())
    for description, content in entries:
        digest.update(description.encode())
        digest.update(content)
    return digest.hexdigest()


def compute_identity(settings: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """Return the checksum of settings and arrays, which identifies the folder of a run."""

    def describe(name: str) -> tuple[str, Buffer]:
        array = np.ascontiguousarray(arrays[name])
        return f"{name} {array.dtype.str} {array.shape}", array.data.cast("B") if array.size else b""

    return hash_entries(json.dumps(settings, sort_keys=True), map(describe, sorted(arrays)))


def add_state_checksum(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with a checksum of its content, for `check_state_checksum`."""
    return state | {"checksum": _compute_state_checksum(state)}


def check_state_checksum(state: Mapping[str, Any]) -> None:
    """Raise if the checksum of a state does not match. States of 0.1.0 have no checksum."""
    if "checksum" in state and state["checksum"] != _compute_state_checksum(state):
        raise ValueError("state was changed after it was written: its checksum does not match")


def _compute_state_checksum(state: Mapping[str, Any]) -> str:
    digest = new_sha256()

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            digest.update(f"mapping of {len(value)}".encode())
            for key in sorted(value, key=str):
                digest.update(f"{key}:".encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            digest.update(f"list of {len(value)}".encode())
            for item in value:
                add(item)
        elif hasattr(value, "detach"):  # a tensor may be loaded as an array: both have the same checksum
            tensor = value.detach().cpu()
            add((tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy())
        elif isinstance(value, np.ndarray):
            digest.update(f"{value.dtype} {value.shape}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        else:
            digest.update(repr(value).encode())

    add({name: value for name, value in state.items() if name != "checksum"})
    return digest.hexdigest()
