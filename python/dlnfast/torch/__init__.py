"""PyTorch models under the same lens as deep linear networks; needs PyTorch, which is optional."""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "dlnfast.torch needs PyTorch, which is not installed: pip install torch", name="torch"
    ) from error

from .features import LayerMeasures, LayerOutputs, layer_outputs, measure_layers
from .layers import WeightMatrix, select_modules, weight_matrices
from .operators import DeviceMatrix
from .probes import RidgeProbes, SGDProbes
from .statistics import ClassGeometry, ClassStatistics

__all__ = [
    "ClassGeometry",
    "ClassStatistics",
    "DeviceMatrix",
    "LayerMeasures",
    "LayerOutputs",
    "RidgeProbes",
    "SGDProbes",
    "WeightMatrix",
    "layer_outputs",
    "measure_layers",
    "select_modules",
    "weight_matrices",
]
