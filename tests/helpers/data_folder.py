# SPDX-License-Identifier: MIT
"""Real data sets, beside the checkout or in the folder that DLNFAST_DATA names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_BESIDE_CHECKOUT = Path(__file__).resolve().parents[3] / "shared" / "data"


def find_data_folder(file: str) -> Path:
    """Return the folder that contains this file; skip the test if there is none."""
    folder = Path(os.environ.get("DLNFAST_DATA", _BESIDE_CHECKOUT))
    if not (folder / file).is_file():
        pytest.skip(f"no {file} in {folder}; DLNFAST_DATA may name another folder")
    return folder
