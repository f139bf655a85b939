# SPDX-License-Identifier: MIT
"""What lies in folders and in .npz files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def file_names(folder: Path) -> list[str]:
    """Return the sorted names of all that lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def without_digest(members: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays of a file as 0.1.0 wrote them: without a digest."""
    metadata = json.loads(str(members["meta"]))
    metadata.pop("digest", None)
    return {**members, "meta": np.array(json.dumps(metadata))}
