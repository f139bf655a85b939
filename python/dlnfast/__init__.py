# SPDX-License-Identifier: MIT
"""Exact and fast training dynamics of deep linear networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import measures, reference, theory
from ._closure.certificate import Certificate
from ._closure.closure import closure
from ._closure.family import Family
from ._closure.subspaces import Closure
from ._completion.compress import CompressedNetwork, compress
from ._completion.estimator import MatrixCompletion
from ._completion.fitting import BiasOptions, EntryOptions, LayerOptions, StoppingOptions
from ._completion.train_compressed import compressed_weights, train_compressed
from ._config.sweep import SweepGrid, SweepResults, sweep
from ._datasets.cifar10 import load_cifar10
from ._datasets.images import load_fashion_mnist
from ._datasets.ratings import Ratings, load_movielens
from ._problem.data import one_hot
from ._problem.low_rank import LowRank
from ._problem.observations import Completion, Sensing
from ._problem.problem import Problem
from ._problem.standard import classification, low_rank_completion, low_rank_recovery, low_rank_sensing
from ._problem.statistics import SufficientStatistics
from ._support.checkpoint import Checkpoint
from ._support.errors import AssumptionError, CopyWarning, DivergedError, FolderInUseError, ShapeError
from ._support.threads import build_info, set_num_threads
from ._tracking.svd_tracker import SVDTracker, TrackerRecord
from ._training.batch import Batch, train_batch
from ._training.options import Adaptive, Record
from ._training.train import resume, train
from ._trajectory.export import export
from ._trajectory.load import load
from ._trajectory.trajectory import Trajectory
from ._version import __version__
from ._weights.gradients import gradients
from ._weights.implicit import ImplicitWeights
from ._weights.initial import aligned, gaussian, orthogonal, uniform

if TYPE_CHECKING:
    from . import figures, plots, torch

__all__ = [
    "Adaptive",
    "AssumptionError",
    "Batch",
    "BiasOptions",
    "Certificate",
    "Checkpoint",
    "Closure",
    "Completion",
    "CompressedNetwork",
    "CopyWarning",
    "DivergedError",
    "EntryOptions",
    "Family",
    "FolderInUseError",
    "ImplicitWeights",
    "LayerOptions",
    "LowRank",
    "MatrixCompletion",
    "Problem",
    "Ratings",
    "Record",
    "SVDTracker",
    "Sensing",
    "ShapeError",
    "StoppingOptions",
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


def __dir__() -> list[str]:
    """Return the public names, among them modules that are not imported yet."""
    return sorted({*globals(), *__all__})
