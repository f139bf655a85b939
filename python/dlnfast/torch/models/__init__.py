# SPDX-License-Identifier: MIT
"""Network models: deep linear networks, perceptrons, convolutional networks, vision transformers."""

from __future__ import annotations

from .deep_linear import DeepLinear
from .mlp import MLP, HybridMLP
from .vgg import VGG
from .vit import ViT

__all__ = ["MLP", "VGG", "DeepLinear", "HybridMLP", "ViT"]
