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
from .adapters.audit import AdapterAudit, LayerAudit, audit_adapter
from .adapters.extract import Extraction, extract_adapter
from .adapters.resize import resize_adapter
from .adapters.sources import WrittenUpdate
from .balance import balance
from .checkpoints import CheckpointSpectra, checkpoint_spectra
from .deep_lora import DeepLoRA
from .features import LayerMeasures, LayerOutputs, layer_outputs, measure_layers
from .full_batch import Descent, descend
from .hub import model_card, push_to_hub
from .images import Batches, ImageData, Samples, load_images
from .initial import initialize_, orthogonal_
from .layers import WeightMatrix, select_modules, weight_matrices
from .low_rank.compression import CompressedLayer, Compression, compress
from .low_rank.factorize import Factorization, factorize
from .models import MLP, VGG, DeepLinear, HybridMLP, ViT
from .operators import DeviceMatrix
from .overparameterize import collapse, overparameterize
from .probes import RidgeProbes, SGDProbes
from .report import Alarm, LayerRecord, Report, Sink, StopTraining
from .sharded import RowSharded
from .sharded_descent import train_sharded
from .statistics import ClassGeometry, ClassStatistics
from .subspace_report import LayerSubspace, SubspaceReport, subspace_report
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
    "AdapterAudit",
    "Alarm",
    "Batches",
    "CheckpointFile",
    "CheckpointSpectra",
    "ClassGeometry",
    "ClassStatistics",
    "CompressedLayer",
    "Compression",
    "DeepLinear",
    "DeepLoRA",
    "Descent",
    "DeviceMatrix",
    "Evaluation",
    "Extraction",
    "Factorization",
    "History",
    "HybridMLP",
    "ImageData",
    "LayerAudit",
    "LayerMeasures",
    "LayerOutputs",
    "LayerRecord",
    "LayerSubspace",
    "LossOptions",
    "OptimizerOptions",
    "Report",
    "RidgeProbes",
    "RowSharded",
    "SGDProbes",
    "Samples",
    "ScheduleOptions",
    "Sink",
    "SpectralTracker",
    "StopTraining",
    "SubspaceReport",
    "Trainer",
    "Truncation",
    "UpdateMatrix",
    "ViT",
    "WeightMatrix",
    "WrittenUpdate",
    "adapter_updates",
    "audit_adapter",
    "balance",
    "checkpoint_spectra",
    "collapse",
    "compress",
    "descend",
    "extract_adapter",
    "factorize",
    "initialize_",
    "layer_outputs",
    "load_images",
    "measure_layers",
    "model_card",
    "orthogonal_",
    "overparameterize",
    "push_to_hub",
    "resize_adapter",
    "select_modules",
    "subspace_report",
    "track",
    "train_sharded",
    "weight_matrices",
]
