# SPDX-License-Identifier: MIT
"""Deep LoRA: low-rank adaptation by products of more than two factors (arXiv 2406.04112)."""

from __future__ import annotations

from .adapter import DeepLoRA, Truncation

__all__ = ["DeepLoRA", "Truncation"]
