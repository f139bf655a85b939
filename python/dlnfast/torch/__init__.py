"""PyTorch models under the same lens as deep linear networks; needs PyTorch, which is optional."""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "dlnfast.torch needs PyTorch, which is not installed: pip install torch", name="torch"
    ) from error

from .layers import WeightMatrix, select_modules, weight_matrices
from .operators import DeviceMatrix
from .track import SpectralTracker, track

__all__ = [
    "DeviceMatrix",
    "SpectralTracker",
    "WeightMatrix",
    "select_modules",
    "track",
    "weight_matrices",
]
