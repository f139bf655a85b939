# SPDX-License-Identifier: MIT
"""Specifications of runs: TOML files with the sections [problem], [weights], [train] and [output].

Reading a specification checks every key and every type before any data are read, so that a spelling mistake
costs no training time. An example is ``examples/fashion_mnist.toml``.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .._datasets.images import load_fashion_mnist
from .._problem import data
from .._problem.problem import REDUCTIONS, Problem
from .._problem.standard import classification, low_rank_recovery
from .._support.arrays import FloatArray
from .._support.files import ARCHIVE_ERRORS, read_arrays
from .._support.keys import Key, boolean, choice, integer, is_integer, is_list_of, number, per_layer, string
from .._training.options import Options, only_keys_to_hash, spec_keys
from .._training.registry import split_engine
from .._weights import initial
from .._weights.implicit import ImplicitWeights
from .schema import SpecError, check_names, check_section, describe_keys, join_names, read_toml

__all__ = [
    "Samples",
    "Spec",
    "SpecError",
    "accuracy",
    "check_spec",
    "describe_settings",
    "make_problem",
    "make_weights",
    "read_spec",
    "settings_to_hash",
    "train_options",
]

#: Samples transformed at a time when accuracies are measured.
_CHUNK: Final = 8192


_REDUCTION: Final = choice("mean", *REDUCTIONS).explained(
    'Loss c/2 ||W X - Y||_F^2 with c = 1 / (d_y N) for "mean", which takes large learning rates, or c = 1'
)
_LAYOUT: Final = choice("columns", *data.LAYOUTS).explained("Whether samples are columns or rows")
_INPUTS: Final = string("X").explained("Name of the array of inputs in the file")
_OUTPUTS: Final = string("Y").explained("Name of the array of outputs, or of integer labels")
_WHITENING: Final = {
    "whiten": choice("none", "none", *data.WHITENING_METHODS).explained(
        "Method that makes X X^T the identity, as the reduced engine requires"
    ),
    "center": boolean(False).explained("Whether the mean of the inputs is subtracted first"),
    "rank_tolerance": number().explained(
        "Largest singular value of X, relative to the first one, that whitening treats as zero"
    ),
    "reduction": _REDUCTION,
}
_PROBLEMS: Final[dict[str, dict[str, Key]]] = {
    "low-rank-recovery": {
        "dim": integer(required=True).explained("Width d of inputs and outputs; the inputs are white"),
        "rank": integer(required=True).explained("Rank r of the random target"),
        "seed": integer(0),
        "reduction": _REDUCTION,
    },
    "classification": {
        "n_classes": integer(required=True),
        "samples_per_class": integer(required=True),
        "dim": integer().explained("Number d_x of features; default n_classes * samples_per_class"),
        "seed": integer(0),
        "reduction": _REDUCTION,
    },
    "fashion-mnist": {
        "path": string().explained(
            "File or folder of the data; default: the environment variable DLNFAST_DATA"
        ),
        **_WHITENING,
    },
    "npz": {
        "path": string(required=True).explained("File; a relative path starts from the folder of SPEC.toml"),
        "inputs": _INPUTS,
        "outputs": _OUTPUTS,
        "test_inputs": string().explained("Name of the array of test inputs, for the accuracy"),
        "test_outputs": string().explained("Name of the array of test labels"),
        "layout": _LAYOUT,
        **_WHITENING,
    },
    "npz-shards": {
        "path": string(required=True).explained("Pattern of the files, such as shards/*.npz"),
        "inputs": _INPUTS,
        "outputs": _OUTPUTS,
        "layout": _LAYOUT,
        **_WHITENING,
    },
}
_EXAMPLE: Final = """\
A complete SPEC.toml:

  [problem]
  kind = "low-rank-recovery"
  dim = 30
  rank = 3
  [weights]
  depth = 3
  [train]
  learning_rate = 1.0
  steps = 50"""
_KIND: Final = choice("", *_PROBLEMS)
_SECTIONS: Final[dict[str, dict[str, Key]]] = {
    "weights": {
        "init": choice("orthogonal", *initial.DISTRIBUTIONS, "aligned"),
        "depth": integer().explained("Number L of layers; all hidden layers are as wide as the inputs"),
        "widths": Key(is_list_of(is_integer), "a list of integers, d_0 .. d_L").explained(
            "Widths of all nodes, from the inputs to the outputs"
        ),
        "scale": per_layer(1.0).explained(
            "Scale eps: every layer has the norm of eps times a matrix with orthonormal columns or rows"
        ),
        "seed": integer(0),
        "dtype": choice("float64", "float64", "float32"),
        "implicit": boolean(False).explained(
            'Whether layers are sampled lazily, for "orthogonal" and widths that do not fit into memory'
        ),
    },
    # `device` is the older way to write engine = "torch:DEVICE"; specifications hold both apart.
    "train": {**spec_keys(), "device": string().explained('Device of engine = "torch", such as "cuda:1"')},
    "output": {
        "directory": string().explained("Folder of the results; the option --out replaces it"),
        "weights": boolean(True).explained("Whether run.npz contains whole weight matrices"),
    },
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
        """Return all sections in JSON-compatible values."""
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
        ``"section.key=value"`` with a TOML value. Other text counts as a string, in case the shell has
        removed the quotes. Relative paths start from the current folder.

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
    return check_spec(read_toml(path, changes, paths=["problem.path"]))


def describe_settings() -> str:
    """Return the help text of specifications: sections, keys, allowed values and defaults."""
    lines = [*_EXAMPLE.splitlines(), "", "The sections of SPEC.toml, their keys and the allowed values:"]
    for kind, keys in _PROBLEMS.items():
        lines += ["", f'[problem]  kind = "{kind}"', *describe_keys(keys)]
    for name, keys in _SECTIONS.items():
        note = "  one of depth and widths is required" if name == "weights" else ""
        lines += ["", f"[{name}]{note}", *describe_keys(keys)]
    return "\n".join(lines)


def check_spec(raw: Mapping[str, Any]) -> Spec:
    """Return the checked specification of the sections of a file, or raise `SpecError`."""
    check_names(raw, ("problem", *_SECTIONS))
    problem = dict(raw.get("problem", {}))
    kind = problem.pop("kind", None)
    if kind is None or not _KIND.accepts(kind):
        came = "is missing" if kind is None else f"is {kind!r}"
        raise SpecError(f"problem.kind {came}; wanted {_KIND.wanted}")
    sections = {name: check_section(name, raw.get(name, {}), keys) for name, keys in _SECTIONS.items()}
    _check_sizes(sections["weights"])
    sections["train"] = _split_device(sections["train"])
    settings = check_section("problem", problem, _PROBLEMS[kind], f" of kind {kind!r}")
    return Spec({"kind": kind, **settings}, **sections)


def _split_device(train: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section [train] with ``engine = "torch:DEVICE"`` as engine and device."""
    engine, device = split_engine(train["engine"])
    if train["device"] is not None and (engine != "torch" or device):
        raise SpecError(
            f'train.device is {train["device"]!r} but train.engine is {train["engine"]!r}; wanted "torch"'
        )
    return {**train, "engine": engine, "device": train["device"] or device or None}


def _check_sizes(weights: Mapping[str, Any]) -> None:
    present = [key for key in ("depth", "widths") if weights[key] is not None]
    if len(present) != 1:
        came = "both" if present else "neither"
        raise SpecError(
            f"weights has {came} of depth and widths; wanted one: the number of layers L, or d_0 .. d_L"
        )
    if weights["depth"] is not None and weights["depth"] < 1:
        raise SpecError(f"weights.depth is {weights['depth']}; wanted an integer of at least 1")
    if weights["implicit"] and weights["init"] != "orthogonal":
        raise SpecError(
            f'weights.implicit is true but weights.init is {weights["init"]!r}; wanted "orthogonal"'
        )


# --------------------------------------------------------------------------------------------------
# Problems, weights and options of a specification
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Labelled samples in their original coordinates, for accuracies.

    Attributes
    ----------
    inputs : ndarray
        Raw inputs in the layout of the problem, or inputs in its own coordinates where `transformed`.
    labels : ndarray of int64, shape (n,)
        Class of every sample.
    layout : {"columns", "rows"}
        Layout of `inputs`.
    transformed : bool
        Whether `inputs` are in the coordinates of the problem already.
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
    if kind == "npz-shards":
        return _npz_shards(settings), {}
    return _fashion_mnist(settings) if kind == "fashion-mnist" else _npz(settings)


def _fashion_mnist(settings: Mapping[str, Any]) -> tuple[Problem, dict[str, Samples]]:
    samples = {}
    for split in ("train", "test"):
        images, labels = load_fashion_mnist(settings["path"], split)
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


def _npz_shards(settings: Mapping[str, Any]) -> Problem:
    """Return the problem of several files, each read as a batch."""
    files = sorted(glob.glob(settings["path"]))
    if not files:
        raise SpecError(f"problem.path is {settings['path']}, which no file matches")
    names = {key: settings[key] for key in ("inputs", "outputs")}
    batches = ((arrays["inputs"], arrays["outputs"]) for arrays in (_read_arrays(f, names) for f in files))
    return Problem.from_batches(batches, layout=settings["layout"], **_whitening(settings))


def _read_arrays(path: str, names: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
    """Return arrays of an .npz file; `names` maps keys of [problem] to names of arrays."""
    file = Path(path)
    with file.open("rb") as stream:
        if stream.read(6) == np.lib.format.MAGIC_PREFIX:
            raise SpecError(f"problem.path is {path}, a single array; wanted an .npz archive")
    try:
        # A user's own file may be compressed by any factor.
        arrays = read_arrays(file, list(dict.fromkeys(names.values())), bounded=False)
    except KeyError as error:
        missing, there = error.args
        key = next(key for key, name in names.items() if name == missing)
        raise SpecError(
            f"problem.{key} is {missing!r}, which is not in {path}; wanted {join_names(there)}"
        ) from None
    except ARCHIVE_ERRORS as error:
        raise SpecError(f"problem.path is {path}, not a readable .npz file: {error}") from None
    return {key: arrays[name] for key, name in names.items()}


def _labels(outputs: npt.NDArray[Any], layout: str) -> npt.NDArray[np.int64]:
    if outputs.ndim == 1:
        return data.as_labels(outputs, "problem.test_outputs")
    labels: npt.NDArray[np.int64] = outputs.argmax(axis=0 if layout == "columns" else 1)
    return labels


def _from_data(settings: Mapping[str, Any], X: npt.ArrayLike, Y: npt.ArrayLike, layout: str) -> Problem:
    return Problem.from_data(X, Y, layout=layout, **_whitening(settings))


def _whitening(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `_WHITENING` as arguments."""
    chosen = {key: settings[key] for key in _WHITENING}
    return {**chosen, "whiten": None if chosen["whiten"] == "none" else chosen["whiten"]}


def make_weights(spec: Spec, problem: Problem) -> list[FloatArray] | ImplicitWeights:
    """Return the initial weights of a specification; with a depth L, all hidden layers are d_x wide."""
    settings = spec.weights
    widths = settings["widths"]
    if widths is None:
        widths = [problem.dim_in] * settings["depth"] + [problem.dim_out]
    common = {"scale": settings["scale"], "seed": settings["seed"], "dtype": settings["dtype"]}
    if settings["implicit"]:
        return initial.orthogonal(widths, **common, implicit=True)
    if settings["init"] == "aligned":
        return initial.aligned(problem, widths, **common)
    return initial.DISTRIBUTIONS[settings["init"]](widths, **common)


def train_options(spec: Spec) -> Options:
    """Return the options of `dlnfast.train`."""
    device = spec.train["device"]
    engine = spec.train["engine"] if device is None else f"{spec.train['engine']}:{device}"
    return Options.from_flat({**spec.train, "engine": engine})


def settings_to_hash(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the sections without later options at their default, so that hashes of older versions hold."""
    hashed = {
        name: only_keys_to_hash(table) if name == "train" else dict(table) for name, table in sections.items()
    }
    if not hashed.get("weights", {}).get("implicit", True):
        del hashed["weights"]["implicit"]
    return hashed


def accuracy(problem: Problem, matrices: Mapping[str, FloatArray], samples: Samples) -> dict[str, float]:
    """Return the classification accuracy of several end-to-end matrices W.

    Parameters
    ----------
    problem : Problem
        Problem whose `classes` name the outputs, and whose `transform` maps samples to its coordinates.
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
