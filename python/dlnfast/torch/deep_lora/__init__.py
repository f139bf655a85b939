# SPDX-License-Identifier: MIT
"""Deep LoRA: low-rank adaptation by products of more than two factors (arXiv 2406.04112)."""

from __future__ import annotations

from .._truncation import Truncation
from .adapter import DeepLoRA

__all__ = ["DeepLoRA", "Truncation"]
