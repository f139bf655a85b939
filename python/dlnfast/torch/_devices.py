# SPDX-License-Identifier: MIT
"""PyTorch devices by name, and products on them in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_DTYPES = {"float64": torch.float64, "float32": torch.float32}


def find_device(device: object, dtype: npt.DTypeLike) -> torch.device:
    """Return a device with its index, after a test that it can store numbers of a precision.

    Parameters
    ----------
    device : str, torch.device or None
        Device or its name; None: PyTorch's default device.
    dtype : dtype
        Precision that the device must support.

    Raises
    ------
    TypeError
        If `device` is neither a device nor a string.
    ValueError
        For a device that does not exist, stores no values (meta), or does not support the precision.
    """
    if device is not None and not isinstance(device, (str, torch.device)):
        raise TypeError(f'device is {device!r}; wanted a torch.device or its name, such as "cpu" or "cuda"')
    precision = np.dtype(dtype).name
    try:
        probe = torch.zeros(1, dtype=_DTYPES[precision], device=device)
        probe.item()
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device is {device!r}, on which PyTorch cannot hold {precision} numbers here ({reason}); wanted "
            'another one, such as "cpu"'
        ) from error
    return probe.device


@contextmanager
def use_exact_products(device: torch.device) -> Iterator[None]:
    """Multiply in the full precision of the matrices in the block, without autocast or TF32."""
    settings: Any = torch.backends
    with torch.autocast(device.type, enabled=False):
        if hasattr(settings.cuda.matmul, "fp32_precision"):
            backends = (settings.cuda.matmul, settings.mkldnn.matmul)
            before = [backend.fp32_precision for backend in backends]
            try:
                for backend in backends:
                    backend.fp32_precision = "ieee"
                yield
            finally:
                for backend, precision in zip(backends, before, strict=True):
                    backend.fp32_precision = precision
        else:  # before PyTorch 2.9
            wanted = torch.get_float32_matmul_precision()
            try:
                torch.set_float32_matmul_precision("highest")
                yield
            finally:
                torch.set_float32_matmul_precision(wanted)
