# SPDX-License-Identifier: MIT
"""Contents of folders and of .npz files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def file_names(folder: Path) -> list[str]:
    """Return the sorted names of the entries of a folder."""
    return sorted(path.name for path in folder.iterdir())


def without_digest(members: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays of a file without the digest, as in files of 0.1.0."""
    metadata = json.loads(str(members["meta"]))
    metadata.pop("digest", None)
    return {**members, "meta": np.array(json.dumps(metadata))}
