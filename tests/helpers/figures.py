# SPDX-License-Identifier: MIT
"""Figures made through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dlnfast.cli import main

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def run_figure(folder: Path, name: str, *options: str) -> Any:
    """Make a figure with ``dlnfast figure``, and return the numbers that it wrote."""
    assert main(["figure", name, "--out", str(folder), *options]) == 0
    assert (folder / f"{name}.png").read_bytes().startswith(PNG_SIGNATURE)
    return json.loads((folder / f"{name}.json").read_text(), parse_constant=pytest.fail)
