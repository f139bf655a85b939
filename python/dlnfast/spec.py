"""Specifications of runs: TOML files with the sections [problem], [weights], [train] and [output].

Reading a specification checks every key and every type before any data are touched, so that a spelling
mistake costs no training time. An example is ``examples/fashion_mnist.toml``.
"""

from __future__ import annotations

import json
import os
import tomllib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from . import data, initial
from ._arrays import FloatArray
from .problem import REDUCTIONS, LowRank, Problem, classification, low_rank_recovery

__all__ = [
    "Samples",
    "Spec",
    "SpecError",
    "accuracy",
    "dense_least_squares",
    "describe_settings",
    "make_problem",
    "make_weights",
    "read_spec",
    "train_arguments",
]

#: Samples transformed at a time when accuracies are measured.
_CHUNK: Final = 8192


class SpecError(ValueError):
    """A specification has an unknown, missing or wrong entry; the message names section.key."""


# --------------------------------------------------------------------------------------------------
# What may stand in a specification
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Key:
    """One entry: whether it must be there, what it stands for if it is not, and what it may be."""

    accepts: Callable[[Any], bool]
    wanted: str
    default: Any = None
    required: bool = False


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or isinstance(value, float)


def _is_list_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) > 0 and all(accepts(v) for v in value)


def _integer(default: int | None = None, *, required: bool = False) -> _Key:
    return _Key(_is_integer, "an integer", default, required)


def _number(default: float | None = None) -> _Key:
    return _Key(_is_number, "a number", default)


def _per_layer(default: float | None = None, *, required: bool = False, auto: bool = False) -> _Key:
    many = _is_list_of(_is_number)
    wanted = "a number, or a list with one per layer" + (', or "auto"' if auto else "")
    return _Key(lambda v: _is_number(v) or many(v) or (auto and v == "auto"), wanted, default, required)


def _string(default: str | None = None, *, required: bool = False) -> _Key:
    return _Key(lambda v: isinstance(v, str), "a string", default, required)


def _boolean(default: bool) -> _Key:
    return _Key(lambda v: isinstance(v, bool), "true or false", default)


def _choice(default: str, *names: str) -> _Key:
    return _Key(lambda v: v in names, "one of " + ", ".join(f'"{name}"' for name in names), default)


_REDUCTION: Final = _choice("mean", *REDUCTIONS)
_WHITENING: Final = {
    "whiten": _choice("none", "none", *data.WHITENING_METHODS),
    "rank_tolerance": _number(),
    "reduction": _REDUCTION,
}
_PROBLEMS: Final[dict[str, dict[str, _Key]]] = {
    "low-rank-recovery": {
        "dim": _integer(required=True),
        "rank": _integer(required=True),
        "seed": _integer(0),
        "reduction": _REDUCTION,
    },
    "classification": {
        "n_classes": _integer(required=True),
        "samples_per_class": _integer(required=True),
        "dim": _integer(),
        "seed": _integer(0),
        "reduction": _REDUCTION,
    },
    "fashion-mnist": {"path": _string(), **_WHITENING},
    "npz": {
        "path": _string(required=True),
        "inputs": _string("X"),
        "outputs": _string("Y"),
        "test_inputs": _string(),
        "test_outputs": _string(),
        "layout": _choice("columns", *data.LAYOUTS),
        **_WHITENING,
    },
}
_KIND: Final = _choice("", *_PROBLEMS)
_SECTIONS: Final[dict[str, dict[str, _Key]]] = {
    "weights": {
        "init": _choice("orthogonal", "orthogonal", "gaussian", "uniform", "aligned"),
        "depth": _integer(),
        "widths": _Key(_is_list_of(_is_integer), "a list of integers, d_0 .. d_L"),
        "scale": _per_layer(1.0),
        "seed": _integer(0),
        "dtype": _choice("float64", "float64", "float32"),
    },
    "train": {
        "learning_rate": _per_layer(required=True, auto=True),
        "steps": _integer(required=True),
        "weight_decay": _per_layer(0.0),
        "momentum": _per_layer(0.0),
        "engine": _choice("auto", "auto", "reduced", "dense", "torch"),
        "device": _string(),
        "record_every": _integer(1),
        "singular_values": _Key(
            lambda v: v in ("all", "none") or _is_integer(v), '"all", "none" or an integer', "all"
        ),
        "vectors": _boolean(False),
        "tracking": _choice("auto", "auto", "dense", "full"),
        "weights_every": _integer(),
        "tolerance": _number(),
        "n_threads": _integer(0),
        "optimizer": _string("gd"),
    },
    "output": {"directory": _string(), "weights": _boolean(True)},
}


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """A checked specification: every section complete, with defaults filled in."""

    problem: dict[str, Any]
    weights: dict[str, Any]
    train: dict[str, Any]
    output: dict[str, Any]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return all sections in values that JSON knows."""
        return {
            "problem": dict(self.problem),
            "weights": dict(self.weights),
            "train": dict(self.train),
            "output": dict(self.output),
        }


def read_spec(path: str | os.PathLike[str], changes: Iterable[str] = ()) -> Spec:
    """Read a TOML file, apply changes, and check everything.

    Parameters
    ----------
    path : path
        The file. A relative ``problem.path`` in it starts from its folder.
    changes : iterable of str
        ``"section.key=value"`` with a TOML value; what is not TOML counts as a string, so that quotes lost
        to the shell do no harm. Relative paths start from the current folder.

    Returns
    -------
    Spec

    Raises
    ------
    SpecError
        For text that is not TOML, and for unknown, missing and wrong entries.
    OSError
        If the file cannot be read.
    """
    place = Path(path)
    try:
        raw = tomllib.loads(place.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{place} is not a TOML file: {error}") from None
    problem = raw.get("problem")
    if isinstance(problem, dict) and isinstance(problem.get("path"), str):
        problem["path"] = str(place.parent / problem["path"])
    for change in changes:
        _apply(change, raw)
    return _checked(raw)


def describe_settings() -> str:
    """Return the sections and keys of a specification, with what they may be and their defaults."""
    lines = ["The sections of SPEC.toml, their keys and what these may be:"]
    for kind, keys in _PROBLEMS.items():
        lines += ["", f'[problem]  kind = "{kind}"', *_described(keys)]
    for name, keys in _SECTIONS.items():
        note = "  one of depth and widths is required" if name == "weights" else ""
        lines += ["", f"[{name}]{note}", *_described(keys)]
    return "\n".join(lines)


def _described(keys: Mapping[str, _Key]) -> Iterator[str]:
    width = max(map(len, keys))
    for key, rule in keys.items():
        status = f"default {json.dumps(rule.default)}"
        if rule.default is None:
            status = "required" if rule.required else "optional"
        yield f"  {key:<{width}}  {rule.wanted}; {status}"


def _apply(change: str, raw: dict[str, Any]) -> None:
    name, equals, text = change.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise SpecError(f"--set has {change!r}; wanted section.key=value")
    try:
        value = tomllib.loads(f"value = {text.strip()}\n")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = raw.setdefault(section, {})
    if not isinstance(table, dict):
        raise SpecError(f"{section} is {table!r}; wanted a section, [{section}]")
    table[key] = value


def _checked(raw: Mapping[str, Any]) -> Spec:
    names = ("problem", *_SECTIONS)
    for name, table in raw.items():
        if name not in names:
            raise SpecError(f"{name} is not a section; wanted {_listed(f'[{n}]' for n in names)}")
        if not isinstance(table, dict):
            raise SpecError(f"{name} is {table!r}; wanted a section, [{name}]")
    problem = dict(raw.get("problem", {}))
    kind = problem.pop("kind", None)
    if kind is None or not _KIND.accepts(kind):
        came = "is missing" if kind is None else f"is {kind!r}"
        raise SpecError(f"problem.kind {came}; wanted {_KIND.wanted}")
    sections = {name: _section(name, raw.get(name, {}), keys) for name, keys in _SECTIONS.items()}
    _check_sizes(sections["weights"])
    settings = _section("problem", problem, _PROBLEMS[kind], f" of kind {kind!r}")
    return Spec({"kind": kind, **settings}, **sections)


def _section(
    name: str, table: Mapping[str, Any], keys: Mapping[str, _Key], which: str = ""
) -> dict[str, Any]:
    for key in table:
        if key not in keys:
            allowed = _listed(["kind", *keys] if name == "problem" else keys)
            raise SpecError(f"{name}.{key} is not a setting{which}; wanted {allowed}")
    result = {}
    for key, rule in keys.items():
        value = table.get(key)
        if value is None:
            if rule.required:
                raise SpecError(f"{name}.{key} is missing; wanted {rule.wanted}")
            value = rule.default
        elif not rule.accepts(value):
            raise SpecError(f"{name}.{key} is {value!r}; wanted {rule.wanted}")
        result[key] = value
    return result


def _check_sizes(weights: Mapping[str, Any]) -> None:
    given = [key for key in ("depth", "widths") if weights[key] is not None]
    if len(given) != 1:
        came = "both" if given else "neither"
        raise SpecError(
            f"weights has {came} of depth and widths; wanted one: the number of layers L, or d_0 .. d_L"
        )
    if weights["depth"] is not None and weights["depth"] < 1:
        raise SpecError(f"weights.depth is {weights['depth']}; wanted an integer of at least 1")


def _listed(names: Iterable[str]) -> str:
    return "one of " + ", ".join(names)


# --------------------------------------------------------------------------------------------------
# What a specification describes
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Labelled samples in the coordinates they came in, for measuring accuracies.

    Attributes
    ----------
    inputs : ndarray
        Raw inputs in the layout of the problem, or inputs in its own coordinates where `transformed`.
    labels : ndarray of int64, shape (n,)
        The class of every sample.
    layout : {"columns", "rows"}
        Of `inputs`.
    transformed : bool
        Whether `inputs` need no `Problem.transform`.
    """

    inputs: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]
    layout: str = "columns"
    transformed: bool = False


def make_problem(spec: Spec) -> tuple[Problem, dict[str, Samples]]:
    """Return the problem of a specification and, where it has labels, its "train" and "test" samples.

    Raises
    ------
    OSError, ValueError, TypeError
        For files that are missing or damaged, and for values out of their range.
    """
    settings = dict(spec.problem)
    kind = settings.pop("kind")
    if kind == "low-rank-recovery":
        return low_rank_recovery(**settings), {}
    if kind == "classification":
        problem = classification(**settings)
        assert problem.inputs is not None
        assert problem.labels is not None
        return problem, {"train": Samples(problem.inputs, problem.labels, transformed=True)}
    return _fashion_mnist(settings) if kind == "fashion-mnist" else _npz(settings)


def _fashion_mnist(settings: Mapping[str, Any]) -> tuple[Problem, dict[str, Samples]]:
    samples = {}
    for split in ("train", "test"):
        images, labels = data.load_fashion_mnist(settings["path"], split)
        samples[split] = Samples(images, labels, "rows")
    return _from_data(settings, samples["train"].inputs, samples["train"].labels, "rows"), samples


def _npz(settings: Mapping[str, Any]) -> tuple[Problem, dict[str, Samples]]:
    layout = settings["layout"]
    if (settings["test_inputs"] is None) != (settings["test_outputs"] is None):
        raise SpecError("problem.test_inputs and problem.test_outputs: wanted both or neither")
    names = {
        key: settings[key]
        for key in ("inputs", "outputs", "test_inputs", "test_outputs")
        if settings[key] is not None
    }
    arrays = _read_arrays(settings["path"], names)
    problem = _from_data(settings, arrays["inputs"], arrays["outputs"], layout)
    samples = {}
    if problem.labels is not None:
        samples["train"] = Samples(arrays["inputs"], problem.labels, layout)
        if "test_inputs" in arrays:
            labels = _labels(arrays["test_outputs"], layout)
            samples["test"] = Samples(arrays["test_inputs"], labels, layout)
    return problem, samples


def _read_arrays(path: str, names: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
    """Return arrays of an .npz file; `names` says for each key of [problem] what its array is called."""
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise SpecError(f"problem.path is {path}, a single array; wanted an .npz archive")
        with file:
            for key, name in names.items():
                if name not in file.files:
                    raise SpecError(
                        f"problem.{key} is {name!r}, which is not in {path}; wanted {_listed(file.files)}"
                    )
            return {key: file[name] for key, name in names.items()}
    except SpecError:
        raise
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise SpecError(f"problem.path is {path}, not a readable .npz file: {error}") from None


def _labels(outputs: npt.NDArray[Any], layout: str) -> npt.NDArray[np.int64]:
    if outputs.ndim == 1:
        return data.as_labels(outputs, "problem.test_outputs")
    labels: npt.NDArray[np.int64] = outputs.argmax(axis=0 if layout == "columns" else 1)
    return labels


def _from_data(settings: Mapping[str, Any], X: npt.ArrayLike, Y: npt.ArrayLike, layout: str) -> Problem:
    return Problem.from_data(
        X,
        Y,
        whiten=None if settings["whiten"] == "none" else settings["whiten"],
        reduction=settings["reduction"],
        layout=layout,
        rank_tolerance=settings["rank_tolerance"],
    )


def make_weights(spec: Spec, problem: Problem) -> list[FloatArray]:
    """Return the initial weights of a specification; with a depth L, all hidden layers are d_x wide."""
    settings = spec.weights
    widths = settings["widths"]
    if widths is None:
        widths = [problem.dim_in] * settings["depth"] + [problem.dim_out]
    common = {"scale": settings["scale"], "seed": settings["seed"], "dtype": settings["dtype"]}
    if settings["init"] == "aligned":
        return initial.aligned(problem, widths, **common)
    law: dict[str, Callable[..., list[FloatArray]]]
    law = {"orthogonal": initial.orthogonal, "gaussian": initial.gaussian, "uniform": initial.uniform}
    return law[settings["init"]](widths, **common)


def train_arguments(spec: Spec) -> dict[str, Any]:
    """Return the keyword arguments of `dlnfast.train`."""
    arguments = dict(spec.train)
    if arguments["singular_values"] == "none":
        arguments["singular_values"] = None
    return arguments


def accuracy(problem: Problem, matrices: Mapping[str, FloatArray], samples: Samples) -> dict[str, float]:
    """Return the share of samples whose largest output stands for their class, for several maps W.

    Parameters
    ----------
    problem : Problem
        Its `classes` name the outputs, its `transform` takes the samples into its coordinates.
    matrices : mapping of str to ndarray, shape (d_y, d_x)
        End-to-end matrices W.
    samples : Samples

    Notes
    -----
    O(n d_x^2) where the samples are whitened, a few thousand at a time.
    """
    assert problem.classes is not None
    rows = samples.layout == "rows"
    hits = dict.fromkeys(matrices, 0)
    n_samples = samples.labels.size
    for start in range(0, n_samples, _CHUNK):
        part = slice(start, min(start + _CHUNK, n_samples))
        chunk = samples.inputs[part] if rows else samples.inputs[:, part]
        inputs = chunk if samples.transformed else problem.transform(chunk)
        for name, matrix in matrices.items():
            predicted = problem.classes[(matrix @ inputs).argmax(axis=0)]
            hits[name] += int(np.count_nonzero(predicted == samples.labels[part]))
    return {name: count / n_samples for name, count in hits.items()}


def dense_least_squares(problem: Problem) -> FloatArray:
    """Return the problem's least-squares solution as an array."""
    best = problem.least_squares
    return best.dense() if isinstance(best, LowRank) else best
