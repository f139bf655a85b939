# SPDX-License-Identifier: MIT
"""Tracking and measuring of PyTorch models; needs PyTorch, which is an optional dependency."""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "dlnfast.torch needs PyTorch, which is not installed: pip install torch", name="torch"
    ) from error

from ._truncation import Truncation
from .balance import balance
from .checkpoints import CheckpointSpectra, checkpoint_spectra
from .deep_lora import DeepLoRA
from .features import LayerMeasures, LayerOutputs, layer_outputs, measure_layers
from .full_batch import Descent, descend
from .images import Batches, ImageData, Samples, load_images
from .initial import initialize_, orthogonal_
from .layers import WeightMatrix, select_modules, weight_matrices
from .low_rank.factorize import Factorization, factorize
from .models import MLP, VGG, DeepLinear, HybridMLP, ViT
from .operators import DeviceMatrix
from .overparameterize import collapse, overparameterize
from .probes import RidgeProbes, SGDProbes
from .sharded import RowSharded
from .sharded_descent import train_sharded
from .statistics import ClassGeometry, ClassStatistics
from .track import SpectralTracker, track
from .trainer import (
    CheckpointFile,
    Evaluation,
    History,
    LossOptions,
    OptimizerOptions,
    ScheduleOptions,
    Trainer,
)
from .updates import UpdateMatrix, adapter_updates

__all__ = [
    "MLP",
    "VGG",
    "Batches",
    "CheckpointFile",
    "CheckpointSpectra",
    "ClassGeometry",
    "ClassStatistics",
    "DeepLinear",
    "DeepLoRA",
    "Descent",
    "DeviceMatrix",
    "Evaluation",
    "Factorization",
    "History",
    "HybridMLP",
    "ImageData",
    "LayerMeasures",
    "LayerOutputs",
    "LossOptions",
    "OptimizerOptions",
    "RidgeProbes",
    "RowSharded",
    "SGDProbes",
    "Samples",
    "ScheduleOptions",
    "SpectralTracker",
    "Trainer",
    "Truncation",
    "UpdateMatrix",
    "ViT",
    "WeightMatrix",
    "adapter_updates",
    "balance",
    "checkpoint_spectra",
    "collapse",
    "descend",
    "factorize",
    "initialize_",
    "layer_outputs",
    "load_images",
    "measure_layers",
    "orthogonal_",
    "overparameterize",
    "select_modules",
    "track",
    "train_sharded",
    "weight_matrices",
]
