# SPDX-License-Identifier: MIT
"""Exact and fast training dynamics of deep linear networks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import measures, optimizers, reference, theory
from ._closure.certificate import Certificate
from ._closure.closure import closure
from ._closure.family import Family
from ._closure.subspaces import Closure
from ._problem.data import one_hot
from ._problem.low_rank import LowRank
from ._problem.observations import Completion, Sensing
from ._problem.problem import Problem
from ._problem.samples import SampleProblem
from ._problem.standard import classification, low_rank_completion, low_rank_recovery, low_rank_sensing
from ._problem.statistics import SufficientStatistics
from ._support.checkpoint import Checkpoint
from ._support.errors import AssumptionError, CopyWarning, DivergedError, FolderInUseError, ShapeError
from ._support.schedule import Schedule
from ._support.threads import build_info, set_num_threads
from ._tracking.svd_tracker import SVDTracker, TrackerRecord
from ._training.callbacks import CallbackState
from ._training.options import Adaptive, Record
from ._training.train import resume, train
from ._trajectory.load import load
from ._trajectory.tangent_kernel import TrainKernel
from ._trajectory.trajectory import Trajectory
from ._version import __version__
from ._weights.gradients import gradients
from ._weights.implicit import ImplicitWeights
from ._weights.initial import aligned, gaussian, orthogonal, uniform

if TYPE_CHECKING:
    from . import figures, plots, torch
    from ._completion.compress import CompressedNetwork, compress
    from ._completion.estimator import MatrixCompletion
    from ._completion.options import BiasOptions, EntryOptions, LayerOptions, StoppingOptions
    from ._completion.train_compressed import compressed_weights, train_compressed
    from ._config.sweep import SweepGrid, SweepResults, sweep
    from ._datasets.cifar10 import load_cifar10
    from ._datasets.images import load_fashion_mnist
    from ._datasets.ratings import Ratings, load_movielens
    from ._training.batch import Batch, train_batch
    from ._training.flow import flow
    from ._trajectory.export import export

__all__ = [
    "Adaptive",
    "AssumptionError",
    "Batch",
    "BiasOptions",
    "CallbackState",
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
    "SampleProblem",
    "Schedule",
    "Sensing",
    "ShapeError",
    "StoppingOptions",
    "SufficientStatistics",
    "SweepGrid",
    "SweepResults",
    "TrackerRecord",
    "TrainKernel",
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
    "flow",
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
    "optimizers",
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

# Imported at first use, because not every program needs them: {module: its public names}.
_LAZY_MODULES = ("plots", "figures", "torch")
_LAZY_NAMES = {
    "_completion.compress": ("CompressedNetwork", "compress"),
    "_completion.estimator": ("MatrixCompletion",),
    "_completion.options": ("BiasOptions", "EntryOptions", "LayerOptions", "StoppingOptions"),
    "_completion.train_compressed": ("compressed_weights", "train_compressed"),
    "_config.sweep": ("SweepGrid", "SweepResults", "sweep"),
    "_datasets.cifar10": ("load_cifar10",),
    "_datasets.images": ("load_fashion_mnist",),
    "_datasets.ratings": ("Ratings", "load_movielens"),
    "_training.batch": ("Batch", "train_batch"),
    "_training.flow": ("flow",),
    "_trajectory.export": ("export",),
}
_MODULE_OF_NAME = {name: module for module, names in _LAZY_NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import the module of a name that is used for the first time."""
    if name in _LAZY_MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _MODULE_OF_NAME:
        value = getattr(importlib.import_module(f".{_MODULE_OF_NAME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
