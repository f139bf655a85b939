# SPDX-License-Identifier: MIT
"""Options of a run, and their checks: scalars only, without a problem or weights.

The fields of `Options` and `Record` are the one list of options. The signature and the docstring of `train`,
the section [train] of specifications, its ``--help`` text, the axes of sweeps and the settings in run folders
are made from them. To add an option: a field with a `Key` and a paragraph in the class docstring, an entry in
`TrainOptions` for the type checkers, its check in `Options.checked`, and the engine that reads it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, Final, NamedTuple, Required, TypedDict, TypeVar

import numpy as np

from .._support import keys
from .._support.arrays import check_choice, check_count, check_flag, check_scale
from .._support.keys import Key
from .._support.moved import check_keywords
from .._support.schedule import PerLayer, Schedule, read_rate
from .._support.threads import MAX_THREADS
from ..optimizers import NAMES, Optimizer, optimizer_from, refuse_entrywise
from .callbacks import Callback, RecordCallback, takes_state
from .registry import ENGINES, check_engine_name, is_engine_name

__all__ = ["Adaptive", "Callback", "Options", "PerLayer", "Rate", "Record", "TrainOptions"]

Rate = PerLayer | Schedule
Function = TypeVar("Function", bound=Callable[..., Any])

#: Number of singular values that asks the core for all of them.
ALL_VALUES: Final = 2**62

# Files of version 0.1.0 hold these keys for every run. All later options are written only where they differ
# from their default, so that an unchanged run keeps its settings, its hash and its folder.
_FOLDER_KEYS: Final = frozenset(
    {"steps", "record_every", "singular_values", "vectors", "tracking", "weights_every", "tolerance"}
    | {"n_threads"}
)
_SPEC_KEYS: Final = _FOLDER_KEYS | {
    *("learning_rate", "weight_decay", "momentum", "engine", "device", "optimizer")
}

#: Keywords of 0.1.0, with messages that say where these options are now.
MOVED_OPTIONS: Final = {
    "record_every": "record_every is an option of dln.Record now: record=dln.Record(every=...)",
    **{
        name: f"{name} is an option of dln.Record now: record=dln.Record({name}=...)"
        for name in ("singular_values", "vectors", "tracking", "weights_every", "callback", "progress")
    },
    "device": 'device is part of engine now: engine="torch:cuda:1"',
}


def _key(key: Key, name: str | None = None) -> dict[str, Any]:
    """Return the metadata of a field that specifications may set; `name` is its key if not the field's."""
    return {"key": key, "name": name}


@dataclass(frozen=True)
class Adaptive:
    r"""A learning rate that follows the weights: the stability threshold, measured at every step.

    .. math:: \eta = \frac{\text{safety}}{c \sum_l m_l q_l s_l^2 + c \max_l \sum_{k \ne l} \sqrt{m_l m_k}
        s_{lk} e + \lambda},

    with s_l (s_lk) the product of the largest singular values of all layers but l (and k), e the norm of the
    residual and q_l the share of a change that the observations see. The denominator bounds the Hessian in
    the metric of the rates; descent is stable for safety below 2. Where small weights leave a plateau the
    rate is larger by orders of magnitude than any constant one that is stable in the end.

    Parameters
    ----------
    safety : float
        Multiple of the measured threshold, above 0.
    ratios : sequence of float, optional
        m_l: the layers' rates are m_l eta. All 1 by default.
    curvature : sequence of float, optional
        q_l. Measured by default; 1 for white inputs.

    Notes
    -----
    Costs two products of each layer with a vector at every step. `Trajectory.rates` keeps eta.
    """

    safety: float = 1.5
    ratios: Sequence[float] | None = None
    curvature: Sequence[float] | None = None


@dataclass(frozen=True)
class Record:
    """The records of a run, with the callback and the progress bar.

    Parameters
    ----------
    every : int
        Number of steps between two records. Step 0 and the last step are always recorded.
    singular_values : {"all", None} or int
        Number of singular values of each layer in a record. The reduced engine has all of them at no extra
        cost. The dense engine updates them from record to record (`SVDTracker`), with error bounds in
        `Trajectory.singular_value_errors`: k of them by a few products with thin blocks, O(d^2 k); "all" of
        them by a decomposition of every layer at every record, O(d^3).
    vectors : bool
        Whether the dense engine records singular vectors too; `Trajectory.angles` needs them. The reduced
        engine always has them.
    tracking : {"auto", "dense", "full"}
        Method by which the dense engine computes singular values. "auto": in factored form,
        O(d (k + K)^2), for layers that start as a scaled isometry and have thin updates; by decomposition for
        layers up to 128 wide or where a third of the values is wanted; otherwise by iteration from the last
        record. "dense": always by iteration. "full": always by decomposition. The torch engine never uses the
        factored form; on an accelerator it computes k values by iteration, which moves thin blocks only, and
        all of them on the host.
    weights_every : int, optional
        Number of steps between two snapshots of all weights, for the dense engines. They always keep the
        first and the last weights, and by default those of every record if these need at most 64 MB and
        singular values are recorded. The reduced engine gives the weights at any record.
    callback : callable, optional
        Function that is called as ``callback(step, loss)`` at every record; the run ends if it returns True.
        A function of one parameter gets a `CallbackState` instead, with losses, weights and singular values.
        A resumed run first calls it for all saved records, so that a stopping rule recovers its state.
    progress : bool
        Whether to show a progress bar on a terminal, after the first second of a run.

    Examples
    --------
    >>> import dlnfast as dln
    >>> problem, weights = dln.low_rank_recovery(dim=30, rank=3), dln.orthogonal([30] * 4)
    >>> record = dln.Record(every=10, singular_values=5)
    >>> run = dln.train(problem, weights, learning_rate=1.0, steps=50, record=record)
    >>> run.steps
    array([ 0, 10, 20, 30, 40, 50])
    """

    every: int = field(default=1, metadata=_key(keys.integer(), "record_every"))
    singular_values: str | int | None = field(
        default="all",
        metadata=_key(
            Key(lambda v: v in ("all", "none") or keys.is_integer(v), '"all", "none" or an integer')
        ),
    )
    vectors: bool = field(default=False, metadata=_key(keys.boolean(False)))
    tracking: str = field(default="auto", metadata=_key(keys.choice("auto", "auto", "dense", "full")))
    weights_every: int | None = field(default=None, metadata=_key(keys.integer()))
    callback: RecordCallback | None = None
    progress: bool = False

    @property
    def n_values(self) -> int | None:
        """Number of singular values of each layer; None for all of them."""
        if self.singular_values == "all":
            return None
        return self.singular_values or 0  # type: ignore[return-value]

    def checked(self, steps: int) -> Record:
        """Return the record options with every value in its type, or raise.

        Parameters
        ----------
        steps : int
            Number of steps of the run. Longer intervals are cut to it, as they all mean the same.

        Returns
        -------
        Record

        Raises
        ------
        TypeError, ValueError
            For a value that is not allowed; the message names it.
        """
        if self.callback is not None and not callable(self.callback):
            raise TypeError(
                f"record.callback is {type(self.callback).__name__}; wanted a callable of (step, loss)"
            )
        if self.callback is not None:
            takes_state(self.callback)  # raises for a callable of neither kind
        longest = max(check_count(steps, "steps", minimum=0), 1)
        weights_every = self.weights_every
        if weights_every is not None:
            weights_every = min(check_count(weights_every, "record.weights_every", maximum=None), longest)
        checked = replace(
            self,
            every=min(check_count(self.every, "record.every", maximum=None), longest),
            singular_values=_check_singular_values(self.singular_values),
            vectors=check_flag(self.vectors, "record.vectors"),
            weights_every=weights_every,
            progress=check_flag(self.progress, "record.progress"),
        )
        if checked.vectors and checked.n_values == 0:
            raise ValueError("vectors is True but singular_values asks for none")
        check_choice(self.tracking, "record.tracking", ("auto", "dense", "full"))
        return checked


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a run that need neither a problem nor weights.

    Parameters
    ----------
    learning_rate : float or sequence of float, Schedule, "auto", "adaptive" or Adaptive
        Learning rate ``eta``, for all layers or one per layer; a `Schedule` has a rate for every step. "auto"
        takes `theory.default_learning_rate` for these weights; weight decay adds lambda to the sharpness, and
        momentum multiplies the rate by 1 - mu. ``run.config`` shows the value. It is for "gd" and "nesterov";
        other rules rescale the gradient, and need numbers. "adaptive" measures the
        stability threshold at every step, on the dense engine: see `Adaptive`; ``run.rates`` keeps it.
    steps : int
        Number of updates, 0 or more.
    weight_decay : float, sequence of float or Schedule
        Weight decay ``lambda``, for all layers or one per layer.
    momentum : float, sequence of float or Schedule
        Heavy-ball momentum ``mu``, 0 <= mu < 1, for all layers or one per layer. For another rule given by
        its name it replaces the momentum of its settings.
    optimizer : {"gd", "nesterov", "muon", "spectral-sign", "shampoo", "adam", "adamw"} or Optimizer
        Update rule, by its name or as settings of `dlnfast.optimizers`. Gradient descent ("gd"), Nesterov's
        gradient, Muon, its exact form "spectral-sign" and Shampoo keep the invariant subspaces: the reduced
        and the dense engine run them. "adam" and "adamw" act on each entry by itself and do not keep them:
        they need ``engine="torch"``.
    engine : {"auto", "reduced", "dense", "torch", "torch:DEVICE"}
        Program that takes the steps, with the device of the torch engine after a colon. "reduced" trains the
        invariant subspaces only, exactly, at a cost independent of the width; "dense" trains whole matrices.
        "auto" takes the reduced engine where its conditions hold and it is smaller than the network;
        ``run.certificate`` gives the choice and its reasons. "torch" is the dense engine on a PyTorch device,
        such as "torch:cuda:1": the same recursion, for a `Problem`; and the only engine of a `SampleProblem`,
        for which "auto" means "torch". Without a device it uses PyTorch's default.
    record : Record
        The records of the run: steps, singular values, vectors, weights, and the callback.
    tolerance : float, optional
        Loss at which the run ends; with mini-batches that of one mini-batch.
    n_threads : int
        Number of threads. 0: as many as OpenMP allows, one for small work, fewer while other programs use
        the cores; with the torch engine as many as PyTorch is set to. A positive number is taken literally.
    """

    learning_rate: Rate | str | Adaptive = field(metadata=_key(keys.rate(auto=True)))
    steps: int = field(metadata=_key(keys.integer()))
    weight_decay: Rate = field(default=0.0, metadata=_key(keys.rate()))
    momentum: Rate = field(default=0.0, metadata=_key(keys.rate()))
    optimizer: str | Optimizer = field(default="gd", metadata=_key(keys.named_table(*NAMES)))
    engine: str = field(
        default="auto",
        metadata=_key(Key(is_engine_name, "one of " + ", ".join(f'"{name}"' for name in ENGINES))),
    )
    record: Record = Record()
    tolerance: float | None = field(default=None, metadata=_key(keys.number()))
    n_threads: int = field(default=0, metadata=_key(keys.integer()))

    @property
    def adaptive(self) -> Adaptive | None:
        """The rule of an adaptive learning rate; None for constant rates."""
        if isinstance(self.learning_rate, Adaptive):
            return self.learning_rate
        is_word = isinstance(self.learning_rate, str) and self.learning_rate == "adaptive"
        return Adaptive() if is_word else None

    def checked(self, n_layers: int | None = None) -> Options:
        """Return the options with every scalar in its type, or raise.

        Parameters
        ----------
        n_layers : int, optional
            Number of layers, where it is known: lists of rates must have this length.

        Returns
        -------
        Options

        Raises
        ------
        TypeError, ValueError
            For a value that is not allowed; the message names it.
        AssumptionError
            For an optimizer that acts entry by entry, on an engine other than "torch".
        """
        check_engine_name(self.engine)
        if not isinstance(self.record, Record):
            raise TypeError(f"record is {type(self.record).__name__}; wanted a dlnfast.Record")
        steps = check_count(self.steps, "steps", minimum=0)
        optimizer, momentum = self._checked_optimizer(n_layers, steps)
        record = self.record.checked(steps)
        return replace(
            self,
            learning_rate=self._checked_learning_rate(n_layers, steps),
            weight_decay=_checked_rate(self.weight_decay, "weight_decay (lambda)", n_layers, steps),
            momentum=momentum,
            optimizer=optimizer,
            steps=steps,
            record=record,
            tolerance=None if self.tolerance is None else check_scale(self.tolerance, "tolerance"),
            n_threads=check_count(self.n_threads, "n_threads", minimum=0, maximum=MAX_THREADS),
        )

    def refuse_schedules(self, function: str) -> None:
        """Raise where a rate is a `Schedule`, for a function with constant rates only.

        Parameters
        ----------
        function : str
            Name for the message.

        Raises
        ------
        TypeError
            For a schedule.
        """
        for name in ("learning_rate", "weight_decay", "momentum"):
            if isinstance(getattr(self, name), Schedule):
                raise TypeError(
                    f"{name} is {getattr(self, name)!r}; wanted one number, or one per layer, for all steps: "
                    f"{function} has constant rates"
                )

    def _checked_learning_rate(self, n_layers: int | None, steps: int) -> Rate | str | Adaptive:
        rate = self.learning_rate
        if isinstance(rate, Adaptive):
            check_scale(rate.safety, "safety", strict=True)
            return rate
        if not isinstance(rate, str):
            return _checked_rate(rate, "learning_rate (eta)", n_layers, steps)
        if rate not in ("auto", "adaptive"):
            raise TypeError(
                f'learning_rate (eta) is {rate!r}; wanted numbers, a dlnfast.Schedule, "auto" or "adaptive"'
            )
        return rate

    def _checked_optimizer(self, n_layers: int | None, steps: int) -> tuple[str | Optimizer, Rate]:
        """Return the rule, "gd" for gradient descent, and the momentum that counts."""
        momentum = _checked_rate(self.momentum, "momentum (mu)", n_layers, steps, below=1.0)
        rule = optimizer_from(self.optimizer)
        if rule.name == "gd":
            return "gd", momentum
        if self.engine.partition(":")[0] != "torch":
            refuse_entrywise(rule)
        if self.adaptive is not None:
            raise ValueError(
                f"learning_rate is adaptive and optimizer is {rule.name!r}; wanted numbers or a Schedule: "
                'the stability threshold holds for "gd" only'
            )
        if isinstance(self.learning_rate, str) and rule.name != "nesterov":
            raise ValueError(
                f'learning_rate is "auto" and optimizer is {rule.name!r}; wanted numbers or a Schedule: '
                '"auto" is the stability threshold of "gd", and this rule rescales the gradient'
            )
        own: Rate | None = getattr(rule, "momentum", None)
        is_set = isinstance(momentum, Schedule) or bool(np.any(momentum))
        if own is None:
            if is_set:
                raise ValueError(f"momentum is set, but optimizer {rule.name!r} has none; wanted 0")
            return rule, 0.0
        if not is_set:
            momentum = _checked_rate(own, "momentum (mu)", n_layers, steps, below=1.0)
        elif isinstance(self.optimizer, Optimizer) and momentum != own:
            raise ValueError(
                f"momentum is {momentum!r}, but the settings {self.optimizer!r} have a momentum of their "
                "own; wanted only one of them"
            )
        return replace(rule, momentum=momentum), momentum  # type: ignore[call-arg]

    # ------------------------------------------------------------------------------- flat representation

    @classmethod
    def from_keywords(cls, arguments: Mapping[str, Any], function: str = "train") -> Options:
        """Return the options that keyword arguments set, or raise as Python does for a wrong call.

        Parameters
        ----------
        arguments : mapping
            Fields of this class and their values.
        function : str
            Name for the messages.

        Returns
        -------
        Options

        Raises
        ------
        TypeError
            For an unknown name and for one that is missing. For a name of version 0.1.0 the message says
            where that option is now.
        """
        check_keywords(arguments, MOVED_OPTIONS)
        for name in arguments:
            if name not in _FIELDS:
                raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        missing = [
            name for name, each in _FIELDS.items() if each.default is MISSING and name not in arguments
        ]
        if missing:
            raise TypeError(f"{function}() missing required keyword arguments: {', '.join(missing)}")
        return cls(**arguments)

    def keywords(self) -> dict[str, Any]:
        """Return the options as keyword arguments of `train`."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> Options:
        """Return the options from the keys and values of a specification or of a run folder.

        Parameters
        ----------
        flat : mapping
            Keys of `spec_keys` and their values; what is missing has its default.

        Returns
        -------
        Options
        """
        own: dict[str, Any] = {}
        recorded: dict[str, Any] = {}
        for each in _FLAT:
            if each.key in flat:
                value = _from_table(each.key, flat[each.key])
                of = recorded if each.owner is Record else own
                of[each.name] = None if each.key == "singular_values" and value == "none" else value
        return cls(**own, record=Record(**recorded))

    def to_flat(self) -> dict[str, Any]:
        """Return the value of every key of `spec_keys`."""
        return {each.key: _to_table(self._value(each)) for each in _FLAT}

    def added(self) -> set[str]:
        """Return the keys of options added after version 0.1.0 that differ from their default."""
        return {each.key for each in _ADDED if self._value(each) != each.default}

    def stored(self) -> dict[str, Any]:
        """Return the scalars that a run folder holds, without rates and engine, which `Request` adds."""
        return {
            each.key: _to_table(self._value(each))
            for each in _FLAT
            if each.key in _FOLDER_KEYS or (each.key not in _DECIDED and self._value(each) != each.default)
        }

    def _value(self, each: _Flat) -> Any:
        return getattr(self.record if each.owner is Record else self, each.name)


class TrainOptions(TypedDict, total=False):
    """The fields of `Options` as keyword arguments, for type checkers."""

    learning_rate: Required[Rate | str | Adaptive]
    steps: Required[int]
    weight_decay: Rate
    momentum: Rate
    optimizer: str | Optimizer
    engine: str
    record: Record
    tolerance: float | None
    n_threads: int


_FIELDS: Final[dict[str, Field[Any]]] = {each.name: each for each in fields(Options)}


class _Flat(NamedTuple):
    """An option that specifications may set."""

    key: str
    owner: type
    name: str
    default: Any
    rule: Key


#: The options of `Options` and `Record` by the keys of specifications.
_FLAT: Final = tuple(
    _Flat(each.metadata["name"] or each.name, owner, each.name, each.default, each.metadata["key"])
    for owner in (Options, Record)
    for each in fields(owner)
    if "key" in each.metadata
)
#: Options that version 0.1.0 does not have.
_ADDED: Final = tuple(each for each in _FLAT if each.key not in _SPEC_KEYS)
#: Options whose values depend on the weights; `Request.settings` writes them.
_DECIDED: Final = ("learning_rate", "weight_decay", "momentum", "engine")


def _from_table(key: str, value: Any) -> Any:
    """Return the schedule or the update rule of a table; other values as they are."""
    if not isinstance(value, Mapping):
        return value
    return optimizer_from(value) if key == "optimizer" else Schedule.from_dict(value)


def _to_table(value: Any) -> Any:
    """Return the table of a schedule or an update rule; other values as they are."""
    return value.to_dict() if isinstance(value, (Schedule, Optimizer)) else value


def spec_keys() -> dict[str, Key]:
    """Return the keys of the section [train] of a specification."""
    texts: dict[type, dict[str, str]] = {owner: _parameter_texts(owner) for owner in (Options, Record)}
    found = {}
    for each in _FLAT:
        required = each.default is MISSING
        found[each.key] = replace(
            each.rule,
            default=None if required else each.default,
            required=required,
            help=_first_sentence(texts[each.owner].get(each.name, "")),
        )
    return found


def only_keys_to_hash(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a section [train] that its hash covers: those of 0.1.0, and changed later ones."""
    unchanged = {each.key: each.default for each in _ADDED}
    return {key: value for key, value in flat.items() if key not in unchanged or value != unchanged[key]}


# ------------------------------------------------------------------------------------------------ checks


def _check_singular_values(number: str | int | None) -> str | int | None:
    """Return "all", a positive number, or None for no singular values."""
    if number is None or number is False:
        return None
    if isinstance(number, str):
        if number == "all":
            return number
        raise ValueError(f'record.singular_values is {number!r}; wanted "all", a number or None')
    count = check_count(number, "record.singular_values", minimum=0, maximum=None)
    return min(count, ALL_VALUES) or None


def _checked_rate(
    rate: Rate, name: str, n_layers: int | None, steps: int, *, below: float | None = None
) -> Rate:
    """Return a rate after its checks; the function of a schedule is called here, once for each step."""
    if isinstance(rate, Schedule):
        rate = rate.resolve(steps)
    read_rate(rate, name, n_layers, steps=steps, below=below)
    return rate


# ------------------------------------------------------------------------------------------ documentation


def takes_options(function: Function) -> Function:
    """Give a function with ``**options`` the signature and the parameter texts of `Options`."""
    signature = inspect.signature(function)
    parameters = []
    for parameter in signature.parameters.values():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            parameters.append(parameter)
    own = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if each.default is MISSING else each.default,
            annotation=each.type,
        )
        for name, each in _FIELDS.items()
    ]
    at = next((i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), len(parameters))
    documented: Any = function
    documented.__signature__ = signature.replace(parameters=[*parameters[:at], *own, *parameters[at:]])
    if function.__doc__ is not None and Options.__doc__ is not None:
        entry = re.compile(r"^    \*\*options\n(?:        .*\n)+", re.MULTILINE)
        documented.__doc__ = entry.sub(lambda _: _parameter_section(Options) + "\n", function.__doc__)
    return function


def _parameter_section(owner: type) -> str:
    """Return the text below "Parameters" of a class, indented as in the source."""
    text = inspect.cleandoc(owner.__doc__ or "")
    section = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[\w ]*\n-+\n|\Z)", text, re.MULTILINE | re.DOTALL)
    body = section[1].rstrip() if section else ""
    return "\n".join(f"    {line}" if line else "" for line in body.splitlines())


def _parameter_texts(owner: type) -> dict[str, str]:
    """Return the text of every parameter of a class, in one line."""
    parts = re.split(r"^    (\w+) : .*\n", _parameter_section(owner) + "\n", flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".").replace("``", "")
