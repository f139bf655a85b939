# SPDX-License-Identifier: MIT
"""Optional packages; the test is skipped where one is not installed."""

from __future__ import annotations

from typing import Any

import pytest


def import_pandas() -> Any:
    """Return pandas."""
    return pytest.importorskip("pandas", reason="pandas is optional")


def import_parquet() -> tuple[Any, Any]:
    """Return pyarrow and its module for Parquet files."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is optional")
    return pyarrow, pytest.importorskip("pyarrow.parquet", reason="pyarrow is optional")


def import_sparse() -> Any:
    """Return scipy.sparse."""
    return pytest.importorskip("scipy.sparse", reason="SciPy is optional")


def import_torch() -> Any:
    """Return PyTorch."""
    return pytest.importorskip("torch", reason="PyTorch is optional")
