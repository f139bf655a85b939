# SPDX-License-Identifier: MIT
"""Networks of linear maps with more and more between them."""

from __future__ import annotations

from .deep_linear import DeepLinear
from .mlp import MLP, HybridMLP
from .vgg import VGG
from .vit import ViT

__all__ = ["MLP", "VGG", "DeepLinear", "HybridMLP", "ViT"]
