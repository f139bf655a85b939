# SPDX-License-Identifier: MIT
"""Exact and fast training dynamics of deep linear networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import measures, reference, theory
from ._errors import AssumptionError, CopyWarning, DivergedError, FolderInUseError, ShapeError
from ._gradients import gradients
from ._threads import build_info, set_num_threads
from ._version import __version__
from .batch import Batch, train_batch
from .checkpoint import Checkpoint
from .closure import Certificate, Closure, Family, closure
from .completion import Completion, Sensing, low_rank_completion, low_rank_sensing
from .compressed import compressed_weights, train_compressed
from .compression import CompressedNetwork, compress
from .data import one_hot
from .datasets import Ratings, load_cifar10, load_fashion_mnist, load_movielens
from .descent import Adaptive, resume, train
from .estimator import MatrixCompletion
from .export import export
from .initial import aligned, gaussian, orthogonal, uniform
from .problem import LowRank, Problem, classification, low_rank_recovery
from .statistics import SufficientStatistics
from .svd_tracker import SVDTracker, TrackerRecord
from .sweep import SweepGrid, SweepResults, sweep
from .trajectory import Trajectory, load

if TYPE_CHECKING:
    from . import figures, plots, torch

__all__ = [
    "Adaptive",
    "AssumptionError",
    "Batch",
    "Certificate",
    "Checkpoint",
    "Closure",
    "Completion",
    "CompressedNetwork",
    "CopyWarning",
    "DivergedError",
    "Family",
    "FolderInUseError",
    "LowRank",
    "MatrixCompletion",
    "Problem",
    "Ratings",
    "SVDTracker",
    "Sensing",
    "ShapeError",
    "SufficientStatistics",
    "SweepGrid",
    "SweepResults",
    "TrackerRecord",
    "Trajectory",
    "__version__",
    "aligned",
    "build_info",
    "classification",
    "closure",
    "compress",
    "compressed_weights",
    "export",
    "figures",
    "gaussian",
    "gradients",
    "load",
    "load_cifar10",
    "load_fashion_mnist",
    "load_movielens",
    "low_rank_completion",
    "low_rank_recovery",
    "low_rank_sensing",
    "measures",
    "one_hot",
    "orthogonal",
    "plots",
    "reference",
    "resume",
    "set_num_threads",
    "sweep",
    "theory",
    "torch",
    "train",
    "train_batch",
    "train_compressed",
    "uniform",
]

_LAZY = ("plots", "figures", "torch")


def __getattr__(name: str) -> Any:
    """Import the parts that need matplotlib or PyTorch when they are first used."""
    if name in _LAZY:
        import importlib

        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
