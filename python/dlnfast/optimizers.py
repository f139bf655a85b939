# SPDX-License-Identifier: MIT
r"""Update rules for `train`: one settings class for each.

A rule that is made of gradients by sums, products and transposes, or by functions of their singular values,
keeps the invariant subspaces: the reduced engine runs it exactly at any width. On a family of directions
outside the active subspaces a gradient is g times an isometry, and a function of singular values acts on g
alone. `GradientDescent`, `Nesterov`, `Muon`, `SpectralSign` and `Shampoo` are of this kind. `Adam` and
`AdamW` change every entry by a rate of its own, which destroys the subspaces: they run on the torch engine.

In the formulas G is the gradient of a layer, eta its learning rate and lambda its weight decay, both options
of `train`, and V(0) = 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Final

from ._support.arrays import (
    check_choice,
    check_count,
    check_flag,
    check_scale,
    count_axes,
    per_layer,
)
from ._support.errors import AssumptionError
from ._support.schedule import PerLayer, Schedule, read_rate

__all__ = [
    "Adam",
    "AdamW",
    "GradientDescent",
    "Muon",
    "Nesterov",
    "Optimizer",
    "Shampoo",
    "SpectralSign",
    "optimizer_from",
]

#: Optimizers of other libraries whose update acts on each entry by itself.
_OTHER_ENTRYWISE: Final = (
    "adamax", "nadam", "radam", "adagrad", "adadelta", "rmsprop", "rprop", "lion", "signsgd",
)  # fmt: skip
#: Coefficients of the iteration in PyTorch's Muon.
_COEFFICIENTS: Final = (3.4445, -4.775, 2.0315)


@dataclass(frozen=True)
class Optimizer:
    """Base class of the update rules."""

    #: Name that selects the rule with its default settings.
    name: ClassVar[str] = ""
    #: Whether the rule acts on each entry by itself.
    is_entrywise: ClassVar[bool] = False

    def checked(self) -> Optimizer:
        """Return the settings with every value in its type, or raise.

        Returns
        -------
        Optimizer

        Raises
        ------
        TypeError, ValueError
            For a setting that is not allowed; the message names it.
        """
        return replace(self, **self._read())

    def _read(self) -> dict[str, Any]:
        """Return the settings with every value in its type, or raise for one out of its range."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Return name and settings, in values that JSON and TOML know.

        Returns
        -------
        dict
        """
        settings = asdict(self)
        for name, value in settings.items():
            if isinstance(value, Schedule):
                settings[name] = value.to_dict()
            elif isinstance(value, tuple):
                settings[name] = list(value)
        if settings.get("scale", "") is None:
            settings["scale"] = "none"  # tables have no None, and a missing entry means the default
        return {"name": self.name} | {key: value for key, value in settings.items() if value is not None}


@dataclass(frozen=True)
class GradientDescent(Optimizer):
    r"""Gradient descent, with heavy-ball momentum if the option ``momentum`` of `train` is set.

    .. math:: V \leftarrow \mu V + G + \lambda W, \qquad W \leftarrow W - \eta V.
    """

    name = "gd"


@dataclass(frozen=True)
class Nesterov(Optimizer):
    r"""Nesterov's accelerated gradient, as ``torch.optim.SGD(nesterov=True)``.

    .. math:: D = G + \lambda W, \qquad V \leftarrow \mu V + D, \qquad W \leftarrow W - \eta (D + \mu V).

    Parameters
    ----------
    momentum : float, sequence of float or Schedule
        mu, below 1, for all layers or one per layer.
    """

    momentum: PerLayer | Schedule = 0.9
    name = "nesterov"

    def _read(self) -> dict[str, Any]:
        return {"momentum": _read_momentum(self.momentum)}


@dataclass(frozen=True)
class Muon(Optimizer):
    r"""Momentum, orthogonalised by Newton-Schulz iteration or exactly, as ``torch.optim.Muon``.

    .. math:: V \leftarrow \mu V + (1 - \mu) G, \qquad D = \mu V + (1 - \mu) G
        \text{ (nesterov) or } V, \qquad W \leftarrow (1 - \eta \lambda) W - \eta q \, p(D).

    The exact p(U S V^T) is U V^T over the singular values above the rank tolerance times the largest one: a
    gradient that is zero on some directions moves nothing there. Newton-Schulz iteration divides by
    the Frobenius norm and applies the polynomial a s + b s^3 + c s^5 to all singular values `steps` times; it
    is in the precision of the weights (PyTorch uses bfloat16).

    Parameters
    ----------
    momentum : float, sequence of float or Schedule
        mu, below 1.
    nesterov : bool
        Whether to look ahead, as Nesterov's gradient.
    method : {"newton-schulz", "polar"}
        Iteration, or exact polar factor by a singular value decomposition.
    steps : int
        Number of iterations.
    coefficients : tuple of three floats
        a, b and c.
    epsilon : float
        Smallest norm to divide by.
    scale : {"original", "match_rms_adamw", None}
        Factor q: sqrt(max(1, m / n)) for a layer of m x n, 0.2 sqrt(max(m, n)), or 1.
    rank_tolerance : float, optional
        Singular values up to this multiple of the largest one count as zero in an exact polar factor. By
        default the root of the unit roundoff, halfway between 1 and the rounding of a gradient: 1.5e-8 in
        float64, 3.5e-4 in float32.

    Notes
    -----
    Errors of the exact polar factor are the rounding error over the rank tolerance at most, 1.5e-8 in
    float64, unless a singular value passes the tolerance: the rule is discontinuous there. Cost: three
    products for each iteration and layer.
    """

    momentum: PerLayer | Schedule = 0.95
    nesterov: bool = True
    method: str = "newton-schulz"
    steps: int = 5
    coefficients: tuple[float, float, float] = _COEFFICIENTS
    epsilon: float = 1e-7
    scale: str | None = "original"
    rank_tolerance: float | None = None
    name = "muon"

    def _read(self) -> dict[str, Any]:
        if self.scale is not None:
            check_choice(self.scale, "scale", ("original", "match_rms_adamw"))
        check_choice(self.method, "method", ("newton-schulz", "polar"))
        return {
            "momentum": _read_momentum(self.momentum),
            "nesterov": check_flag(self.nesterov, "nesterov"),
            "steps": check_count(self.steps, "steps of the iteration", minimum=0),
            "coefficients": _read_numbers(self.coefficients, "coefficients", 3, minimum=-math.inf),
            "epsilon": check_scale(self.epsilon, "epsilon", strict=True),
            "rank_tolerance": _read_rank_tolerance(self.rank_tolerance),
        }


@dataclass(frozen=True)
class SpectralSign(Optimizer):
    r"""The polar factor of the gradient or of its moving average: steepest descent in the spectral norm.

    .. math:: V \leftarrow \mu V + (1 - \mu) G, \qquad W \leftarrow (1 - \eta \lambda) W - \eta \, U V^T
        \text{ of } V.

    It is `Muon` with an exact polar factor, without look-ahead and without a factor of the sides.

    Parameters
    ----------
    momentum : float, sequence of float or Schedule
        mu, below 1.
    rank_tolerance : float, optional
        Singular values up to this multiple of the largest one count as zero; see `Muon`.
    """

    momentum: PerLayer | Schedule = 0.0
    rank_tolerance: float | None = None
    name = "spectral-sign"

    def _read(self) -> dict[str, Any]:
        return {
            "momentum": _read_momentum(self.momentum),
            "rank_tolerance": _read_rank_tolerance(self.rank_tolerance),
        }


@dataclass(frozen=True)
class Shampoo(Optimizer):
    r"""Shampoo for matrices (Gupta, Koren, Singer, arXiv:1802.09568).

    .. math:: P \leftarrow \beta P + G G^T, \qquad Q \leftarrow \beta Q + G^T G, \qquad
        V \leftarrow \mu V + P^{-1/4} G Q^{-1/4}, \qquad W \leftarrow (1 - \eta \lambda) W - \eta V,

    from P(0) = Q(0) = epsilon times the identity.

    Parameters
    ----------
    epsilon : float
        Start of both factors, above 0.
    decay : float
        beta: 1 sums all gradients, below 1 they are forgotten.
    momentum : float, sequence of float or Schedule
        mu, below 1.

    Notes
    -----
    Cost: two eigendecompositions for each layer and step. Small eigenvalues of P make the rule sensitive to
    rounding where G is nearly of deficient rank: errors of the direction are up to epsilon**(-1/2) times
    those of G.
    """

    epsilon: float = 1e-4
    decay: float = 1.0
    momentum: PerLayer | Schedule = 0.0
    name = "shampoo"

    def _read(self) -> dict[str, Any]:
        return {
            "epsilon": check_scale(self.epsilon, "epsilon", strict=True),
            "decay": check_scale(self.decay, "decay", at_most=1.0),
            "momentum": _read_momentum(self.momentum),
        }


@dataclass(frozen=True)
class Adam(Optimizer):
    r"""Adam, as ``torch.optim.Adam``, on the torch engine only.

    Each entry has a learning rate of its own, so the invariant subspaces are not kept.

    Parameters
    ----------
    betas : tuple of two floats
        Averages of the gradient and of its square, below 1.
    epsilon : float
        Summand of the denominator.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    name = "adam"
    is_entrywise = True

    def _read(self) -> dict[str, Any]:
        return {
            "betas": _read_numbers(self.betas, "betas", 2, below=1.0),
            "epsilon": check_scale(self.epsilon, "epsilon"),
        }


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay, as ``torch.optim.AdamW``, on the torch engine only.

    Parameters
    ----------
    betas : tuple of two floats
        Averages of the gradient and of its square, below 1.
    epsilon : float
        Summand of the denominator.
    """

    name = "adamw"


_CLASSES: Final[dict[str, type[Optimizer]]] = {
    each.name: each for each in (GradientDescent, Nesterov, Muon, SpectralSign, Shampoo, Adam, AdamW)
}
NAMES: Final = tuple(_CLASSES)


def optimizer_from(value: str | Optimizer | Mapping[str, Any]) -> Optimizer:
    """Return the settings of a name, of a table with a name and settings, or the settings themselves.

    Parameters
    ----------
    value : str, Optimizer or mapping
        "gd", "nesterov", "muon", "spectral-sign", "shampoo", "adam" or "adamw"; an instance of a class of
        this module; or ``{"name": .., setting: value}``.

    Returns
    -------
    Optimizer

    Raises
    ------
    AssumptionError
        For another rule that acts entry by entry.
    TypeError, ValueError
        For an unknown name or setting.

    Notes
    -----
    Cost: O(1).
    """
    if type(value) is Optimizer:
        raise TypeError(
            "optimizer is an Optimizer, the base class; wanted settings of a rule, such as Muon()"
        )
    if isinstance(value, Optimizer):
        return value.checked()
    settings: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = settings.pop("name", None)
    name = name.lower() if isinstance(name, str) else name
    known = ", ".join(f'"{each}"' for each in _CLASSES)
    if isinstance(name, str) and name in _OTHER_ENTRYWISE:
        raise AssumptionError(
            f"optimizer is {name!r}: rates that differ from entry to entry destroy the invariant subspaces "
            f"(the weights end up 50-70 % away from any reduced run); wanted one of {known}, of which Adam "
            "and AdamW run on the torch engine"
        )
    if not isinstance(name, str) or name not in _CLASSES:
        raise ValueError(f"optimizer is {value!r}; wanted one of {known}, or settings of dlnfast.optimizers")
    rule = _CLASSES[name]
    allowed = [field.name for field in fields(rule)]
    for key in settings:
        if key not in allowed:
            raise ValueError(
                f"optimizer {name!r} has no setting {key!r}; it has {', '.join(allowed) or 'none'}"
            )
    if isinstance(settings.get("momentum"), Mapping):
        settings["momentum"] = Schedule.from_dict(settings["momentum"])
    if settings.get("scale") == "none":
        settings["scale"] = None
    for key in ("betas", "coefficients"):
        if isinstance(settings.get(key), list):
            settings[key] = tuple(settings[key])
    return rule(**settings).checked()


def refuse_entrywise(rule: Optimizer) -> None:
    """Raise for a rule that acts on each entry by itself, which only the torch engine runs."""
    if rule.is_entrywise:
        raise AssumptionError(
            f"optimizer is {rule.name!r}: rates that differ from entry to entry destroy the invariant "
            "subspaces (the weights end up 50-70 % away from any reduced run), so neither the reduced nor "
            'the dense engine offers it; wanted engine="torch", or "gd", "nesterov", "muon", "spectral-sign" '
            'or "shampoo"'
        )


def _read_momentum(momentum: PerLayer | Schedule) -> PerLayer | Schedule:
    if isinstance(momentum, Schedule):
        return momentum
    values: list[float] = read_rate(momentum, "momentum (mu)", below=1.0).tolist()
    return values[0] if count_axes(momentum, "momentum (mu)") == 0 else values


def _read_rank_tolerance(tolerance: float | None) -> float | None:
    return None if tolerance is None else check_scale(tolerance, "rank_tolerance", below=1.0)


def _read_numbers(values: Sequence[float], name: str, count: int, **bounds: Any) -> tuple[float, ...]:
    if not isinstance(values, (tuple, list)) or len(values) != count:
        raise ValueError(f"{name} is {values!r}; wanted a tuple of {count} numbers")
    return tuple(per_layer(list(values), name, None, **bounds).tolist())
