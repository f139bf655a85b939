# SPDX-License-Identifier: MIT
"""Fuzzer of the bindings: calls each of them with invalid arguments, and checks that it returns or raises.

An input is a string of bytes that determines a call: a binding, valid arguments, and changes to these
(sizes, precisions, strides, values, types, callbacks). After the call, the bytes around each array and
all read-only arrays must be unchanged.

In a build with ``DLNFAST_FUZZ``, libFuzzer generates the inputs (through atheris), guided by coverage
counters in the core. Under AddressSanitizer, reads around arrays are errors as well. Other builds use
random inputs. ``nox -s fuzz -- --calls 100000`` builds and runs the fuzzer. If the process crashes, the
file ``last-input`` has the input of that call, and `python fuzz/bindings.py last-input` repeats it.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from dlnfast._support.dispatch import core

# Exceptions that a call may raise: LookupError if a list is too short or a named argument is missing.
KNOWN_ERRORS = (TypeError, ValueError, MemoryError, ArithmeticError, LookupError)
# Messages of allowed RuntimeErrors: states of a tracker, and a flush callback that does not flush.
KNOWN_STATES = (
    "already at work in another thread",
    "no factored form to append to",
    "did not empty the record buffers",
)

SIZES = (3, 1, 2, 4, 5, 7, 8, 16, 17, 31, 33, 64, 65, 0)
FLOATS = (np.nan, np.inf, -np.inf, 0.0, -0.0, 5e-324, 1e-45, 1e-310, 1e308, -1e308, 3e38, 1e19, 1.0)
INTEGERS = (0, -1, 1, 2, 64, 65, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**62, 2**63 - 1, -(2**63))
ODD_VALUES = (None, "x", b"x", [], (), {}, True, 1j, 2**63, 2**64, 10**30, -(10**30), object(), np.ones(1))
DTYPES = ("f4", "f8", "f2", "g", "i8", "i4", "u8", "?", "c16", "O", ">f8", ">i8", "S8", "M8[s]", "f8,i8")
LAYOUTS = ("F", "gaps", "reversed", "misaligned", "read-only", "broadcast")
HUGE = (2**31 - 1, 2**31, 2**32, 2**58)

LAST_INPUT = Path("last-input")
GUARD = 64  # bytes before and after each array
SOFT_LIMIT = 1.0  # seconds until a signal interrupts the call, like Ctrl-C
HARD_LIMIT = 20.0  # seconds until the process exits with a traceback


class RaisedByCallbackError(Exception):
    """Raised by callbacks; must propagate unchanged."""


class TakesLongError(Exception):
    """Raised by the signal at the soft limit."""


class Finding(Exception):
    """A call violated the rules of this file."""


class Draw:
    """Choices determined by the bytes of an input, in order; the first option when no bytes are left."""

    def __init__(self, data: bytes) -> None:
        self._bytes = iter(data)

    def below(self, n):
        return next(self._bytes, 0) % n

    def choose(self, options):
        return options[self.below(len(options))]

    def size(self, most=65):
        return min(self.choose(SIZES), most)

    def dtype(self):
        return self.choose((np.float64, np.float32))

    def rng(self):
        return np.random.default_rng(self.below(256))

    def array(self, *shape, dtype=np.float64):
        """Return an array, usually standard normal; also constant, identity, and at the ends of the range."""
        kind = self.choose(("normal", "normal", "normal", "zero", "one", "large", "small", "basis"))
        if kind == "zero":
            return np.zeros(shape, dtype)
        if kind == "one":
            return np.ones(shape, dtype)
        if kind == "basis":
            end = np.eye(*shape[-2:]) if len(shape) > 1 else np.eye(1, *shape)[0]
            return np.array(np.broadcast_to(end, shape), dtype, order="C")
        half = np.log2(float(np.finfo(dtype).max)) / 2 - 4
        scale = {"normal": 1.0, "large": 2.0**half, "small": 2.0**-half}[kind]
        return (scale * self.rng().standard_normal(shape)).astype(dtype)


class WithLayout:
    """An array with a memory layout other than contiguous rows."""

    def __init__(self, array, layout):
        self.array, self.layout = array, layout


class Alias:
    """An array in the memory of another argument."""

    def __init__(self, array, of, shift):
        self.array, self.of, self.shift = array, of, shift


class Callback:
    """A callback of some kind; it may change the arguments of the call that it is passed to."""

    KINDS = ("nothing", "stop", "raise", "clear", "again", "text", "infinite", "shape", "dtype", "read-only")

    def __init__(self, kind, matrix=None):
        self.kind, self.matrix = kind, matrix

    def bind(self, call, arguments, memory):
        def callback(*args):
            kind = self.kind
            if kind == "product":
                return self.matrix @ args[0]
            if kind == "flush":
                arguments["arguments"]["counts"][:4] = 0
            elif kind == "raise":
                raise RaisedByCallbackError
            elif kind == "clear":
                for _, value in list(walk(arguments)):
                    if isinstance(value, list | dict):
                        value.clear()
                memory.release()
            elif kind == "again":
                self.kind = "nothing"
                call(**arguments)
            elif kind == "infinite":
                return np.full_like(args[0], np.inf)
            elif kind == "shape":
                return np.ones((1, 1, 1))
            elif kind == "dtype":
                return np.ones((len(args[0]), 1), np.int8).astype(object)
            return {"stop": True, "text": "x", "read-only": np.broadcast_to(0.0, (3, 3))}.get(kind)

        return callback


# Valid arguments of each binding. FUNCTIONS below names the arguments that a call may write.


def multiply(draw):
    dtype, m, k, n = draw.dtype(), draw.size(), draw.size(), draw.size()
    flags = draw.choose((False, True)), draw.choose((False, True))
    a, b = draw.array(m, k, dtype=dtype), draw.array(k, n, dtype=dtype)
    return {
        "a": np.ascontiguousarray(a.T) if flags[0] else a,
        "transpose_a": flags[0],
        "b": np.ascontiguousarray(b.T) if flags[1] else b,
        "transpose_b": flags[1],
        "out": np.zeros((m, n), dtype),
        "n_threads": draw.choose((1, 2, 3, 0, -1)),
    }


def thin_multiply(draw):
    dtype, r, k, n = draw.dtype(), draw.size(64), draw.size(), draw.size()
    transpose = draw.choose((False, True))
    w = draw.array(*((n, k) if transpose else (k, n)), dtype=dtype)
    return {
        "x": draw.array(r, k, dtype=dtype),
        "w": w,
        "transpose": transpose,
        "out": np.zeros((r, n), dtype),
        "n_threads": draw.choose((1, 2, 3, 0)),
    }


def thin_descend(draw, result=None):
    dtype, r, m, n = draw.dtype(), draw.size(64), draw.size(), draw.size()
    outputs = {"rows": np.zeros((r, m), dtype), "columns": np.zeros((r, n), dtype)}
    return {
        "left": draw.array(r, m, dtype=dtype),
        "right": draw.array(r, n, dtype=dtype),
        "w": draw.array(m, n, dtype=dtype),
        **({"out": outputs[result]} if result else {}),
        "descent": {
            "scale": draw.choose((1.0, -2.0, 0.0)),
            "learning_rate": 0.1,
            "weight_decay": draw.choose((0.0, 0.1)),
            "momentum": draw.choose((0.0, 0.9)),
            "velocity": draw.choose((None, np.zeros((m, n), dtype))),
        },
        "n_threads": draw.choose((1, 2, 3, 0)),
    }


def extend_basis(draw):
    dtype, n_basis, k, dim = draw.dtype(), draw.size(8), draw.size(8), draw.size()
    basis = np.zeros((n_basis + k, dim), dtype)
    basis[:n_basis] = np.eye(n_basis, dim)
    return {
        "basis": basis,
        "n_basis": n_basis,
        "block": draw.array(k, dim, dtype=dtype),
        "tolerance": draw.choose((1e-6, 0.0, 1.0)),
        "lengths": np.zeros(k),
        "n_threads": draw.choose((1, 2, 0)),
    }


def singular_values(draw):
    dtype, m, n = draw.dtype(), draw.size(), draw.size()
    k = min(m, n, draw.size())
    return {
        "w": draw.array(m, n, dtype=dtype),
        "values": np.zeros((1, k), dtype),
        "left": draw.choose((None, np.zeros((m, k), dtype))),
        "right": draw.choose((None, np.zeros((n, k), dtype))),
    }


def bidiagonal_singular_values(draw):
    n = draw.size()
    return {"diagonal": draw.array(n), "superdiagonal": draw.array(max(n - 1, 0)), "k": min(n, draw.size())}


def follow_branches(draw):
    n, p, a, b = draw.size(8), draw.size(8), draw.size(17), draw.size(17)
    return {
        "values": -np.sort(-np.abs(draw.array(n, p)), axis=1),
        "left": draw.array(n, p, a),
        "right": draw.array(n, p, b),
        "error": draw.choose((1e-12, 0.0, 1.0)),
        "cluster_tolerance": draw.choose((1e-8, 0.0, 10.0)),
        "ids": np.zeros((n, p), np.int64),
        "clusters": np.zeros((n, p), np.int64),
    }


def best_assignment(draw):
    return {"gain": draw.array(draw.size(17), draw.size(17))}


def sparse_rows(draw, dtype):
    """Return entries by rows and the shape of their matrix."""
    rows, cols = draw.size(17), draw.size(17)
    present = draw.rng().random((rows, cols)) < draw.choose((0.5, 0.1, 1.0, 0.0))
    return by_rows(present, dtype), rows, cols


def by_rows(present, dtype):
    start = np.concatenate([[0], np.cumsum(present.sum(axis=1))]).astype(np.int64)
    index = np.nonzero(present)[1].astype(np.int32)
    return start, index, np.sin(np.arange(len(index))).astype(dtype)


def observed(draw, rows, cols, dtype):
    present = draw.rng().random((rows, cols)) < draw.choose((0.5, 0.1, 1.0, 0.0))
    return by_rows(present, dtype), by_rows(present.T, dtype)


def sort_entries(draw):
    dtype, n, rows, cols = draw.dtype(), draw.size(), draw.size(17), draw.size(17)
    rng = draw.rng()
    return {
        "row": rng.integers(0, max(rows, 1), n),
        "col": rng.integers(0, max(cols, 1), n),
        "value": draw.array(n, dtype=dtype),
        "rows": rows,
        "cols": cols,
        "start": np.zeros(rows + 1, np.int64),
        "index": np.zeros(n, np.int32),
        "values": np.zeros(n, dtype),
    }


def transpose_entries(draw):
    dtype = draw.dtype()
    entries, _, cols = sparse_rows(draw, dtype)
    n = len(entries[1])
    return {
        "by_rows": entries,
        "cols": cols,
        "start": np.zeros(cols + 1, np.int64),
        "index": np.zeros(n, np.int32),
        "values": np.zeros(n, dtype),
    }


def residual_products(draw):
    dtype, rows, cols, k = draw.dtype(), draw.size(17), draw.size(17), draw.size()
    return {
        "observed": observed(draw, rows, cols, dtype),
        "x": draw.array(k, rows, dtype=dtype),
        "y": draw.array(k, cols, dtype=dtype),
        "left": draw.choose((None, np.zeros((k, rows), dtype))),
        "right": draw.choose((None, np.zeros((k, cols), dtype))),
        "n_threads": draw.choose((1, 2, 3, 0)),
    }


def row_posteriors(draw):
    dtype, rows, cols, k = draw.dtype(), draw.size(17), draw.size(17), draw.size()
    length = ((k + 2) * (k + 3) // 2 + 15) // 16 * 16
    by_rows, _ = observed(draw, rows, cols, dtype)
    return {
        "entries": by_rows,
        "others": draw.array(cols, length, dtype=dtype),
        "weights": draw.array(cols, dtype=dtype),
        "entry_weights": draw.choose((None, draw.array(len(by_rows[1]), dtype=dtype))),
        "precisions": draw.array(rows, dtype=dtype),
        "prior": (draw.array(k + 1, k + 1, dtype=dtype), draw.array(rows, k + 1, dtype=dtype)),
        "uncertain": draw.choose((False, True)),
        "moments": np.zeros((rows, length), dtype),
        "errors": np.zeros(rows),
        "n_threads": draw.choose((1, 2, 3, 0)),
    }


def masked_residual(draw):
    dtype, rows, cols = draw.dtype(), draw.size(17), draw.size(17)
    return {
        "observed": observed(draw, rows, cols, dtype),
        "m": draw.array(rows, cols, dtype=dtype),
        "error": np.zeros((rows, cols), dtype),
        "n_threads": draw.choose((1, 2, 3, 0)),
    }


def measurements(draw, rows, cols, dtype):
    n = draw.size(17)
    return draw.array(n, rows * cols, dtype=dtype), draw.array(n, dtype=dtype)


def measured_residual(draw):
    dtype, rows, cols = draw.dtype(), draw.size(17), draw.size(17)
    return {
        "measurements": measurements(draw, rows, cols, dtype),
        "m": draw.array(rows, cols, dtype=dtype),
        "error": np.zeros((rows, cols), dtype),
        "n_threads": draw.choose((1, 2, 3, 0)),
    }


def widths(draw, n_layers):
    return [draw.size(17) for _ in range(n_layers + 1)]


def optimizer(draw, n_layers):
    return {
        "rule": draw.choose(("nesterov", "muon", "shampoo")),
        "nesterov": draw.choose((False, True)),
        "method": draw.choose(("polar", "newton-schulz")),
        "iterations": draw.choose((0, 5)),
        "coefficients": [3.4445, -4.775, 2.0315],
        "epsilon": draw.choose((1e-7, 1e-2)),
        "decay": 1.0,
        "direction_scale": [1.0] * n_layers,
        "rank_tolerance": 1e-8,
    }


def engine(draw, dtype, chain):
    """Return the arguments shared by both engines, for layers of the widths in `chain`."""
    n_layers, d_in, d_out = len(chain) - 1, chain[0], chain[-1]
    steps, flush_every = draw.choose((3, 0, 1, 2, 7, 40)), draw.choose((0, 0, 0, 1, 2))
    n = steps + flush_every + 4
    shapes = list(zip(chain[1:], chain, strict=False))

    def per_layer(*options):
        return [draw.choose(options) for _ in range(n_layers)]

    def maybe(make):
        return [make(s) for s in shapes] if draw.choose((False, True)) else []

    arguments = {
        "target": draw.array(d_out, d_in, dtype=dtype),
        "input_gram": None,
        "input_factor": None,
        "factor_target": None,
        "loss_scale": draw.choose((0.5, 1.0)),
        "loss_floor": draw.choose((0.0, -1.0)),
        "learning_rate": per_layer(0.01, 0.1, 1e3),
        "weight_decay": per_layer(0.0, 0.1),
        "momentum": per_layer(0.0, 0.9),
        "steps": steps,
        "record_every": draw.choose((1, 2, 3, 100)),
        "tolerance": draw.choose((-1.0, 1.0)),
        "n_threads": draw.choose((1, 2, 3, 0)),
        "loss": np.zeros(n),
        "record_steps": np.zeros(n, np.int64),
        "counts": np.zeros(5, np.int64),
        "first": draw.choose((0, 0, 0, 1)),
        "flush_every": flush_every,
        "on_flush": Callback("flush") if flush_every > 0 else None,
        "velocity": maybe(lambda s: np.zeros(s, dtype)),
        "compensation": maybe(lambda s: np.zeros(s, dtype)),
        "power_vectors": maybe(lambda s: np.ones(s[1], dtype)),
        "learning_rate_table": draw.choose((None, None, np.full((steps, 1), 0.1))),
        "weight_decay_table": None,
        "momentum_table": draw.choose((None, None, np.full((steps, n_layers), 0.5))),
        "optimizer": draw.choose((None, optimizer(draw, n_layers))),
        "left_factors": maybe(lambda s: np.eye(s[0])),
        "right_factors": maybe(lambda s: np.eye(s[1])),
        "on_record": draw.choose((None, Callback("nothing"))),
        "on_progress": draw.choose((None, Callback("nothing"))),
        "safety": draw.choose((0.0, 0.0, 0.5)),
        "curvature": [1.0] * n_layers,
        "error_scale": 1.0,
        "rate": np.zeros(n),
    }
    if draw.choose((False, True)):
        rank = draw.choose((d_in, max(d_in - 1, 0), d_in + 1))
        arguments["input_gram"] = np.eye(d_in, dtype=dtype)
        arguments["input_factor"] = draw.array(d_in, rank, dtype=dtype)
        arguments["factor_target"] = draw.array(d_out, rank, dtype=dtype)
    return arguments, [draw.array(*s, dtype=dtype) for s in shapes], n


def dense_descent(draw):
    dtype = draw.dtype()
    chain = widths(draw, draw.choose((2, 1, 3, 4)))
    arguments, weights, n = engine(draw, dtype, chain)
    n_values = draw.choose((2, 0, 2**62))
    n_recorded = [min(n_values, *w.shape) for w in weights]
    following, vectors, every = draw.choose((True, False)), draw.choose((True, False)), draw.choose((0, 1, 2))

    def records(dtype, *axes):
        return [
            np.zeros((n, *(axis(w, k) for axis in axes)), dtype)
            for w, k in zip(weights, n_recorded, strict=True)
        ]

    def values(w, k):
        return k

    tracked = {name: [] for name in ("values", "errors", "signs", "branches", "clusters", "tracking")}
    if following:
        tracked["values"] = records(dtype, values)
        tracked["errors"], tracked["signs"] = records(np.float64, values), records(np.float64, values)
        tracked["branches"], tracked["clusters"] = records(np.int64, values), records(np.int64, values)
        tracked["tracking"] = records(np.float64, lambda w, k: len(core.TRACKING_COLUMNS))
    seen = draw.choose(("target", "target", "observed", "measurements"))
    if seen != "target":
        arguments |= dict.fromkeys(("target", "input_gram", "input_factor", "factor_target"))
    arguments |= tracked | {
        "observed": observed(draw, chain[-1], chain[0], dtype) if seen == "observed" else None,
        "measurements": measurements(draw, chain[-1], chain[0], dtype) if seen == "measurements" else None,
        "snapshot_every": every,
        "tracker": core.TRACKER_DEFAULTS | {"n_values": 1, "mode": draw.choose(("auto", "dense", "full"))},
        "factored": draw.choose((True, False)),
        "velocity_norms": draw.choose(([], [0.0] * len(weights))),
        "initial": draw.choose(([w.copy() for w in weights], [])),
        "left": records(dtype, lambda w, k: w.shape[0], values) if vectors else [],
        "right": records(dtype, lambda w, k: w.shape[1], values) if vectors else [],
        "snapshots": records(dtype, lambda w, k: w.shape[0], lambda w, k: w.shape[1]) if every else [],
    }
    return {"weights": weights, "arguments": arguments}


def gradients(draw):
    dtype = draw.dtype()
    chain = widths(draw, draw.choose((2, 1, 3, 4)))
    d_out, d_in = chain[-1], chain[0]
    arguments, weights, _ = engine(draw, dtype, chain)
    statistics = ("target", "input_gram", "input_factor", "factor_target")
    objective = {name: arguments[name] for name in (*statistics, "loss_scale", "loss_floor")}
    seen = draw.choose(("target", "target", "observed", "measurements"))
    if seen != "target":
        objective |= dict.fromkeys(statistics)
    objective |= {
        "observed": observed(draw, d_out, d_in, dtype) if seen == "observed" else None,
        "measurements": measurements(draw, d_out, d_in, dtype) if seen == "measurements" else None,
    }
    return {
        "weights": weights,
        "objective": objective,
        "gradients": [np.zeros_like(w) for w in weights],
        "n_threads": draw.choose((1, 2, 3, 0)),
    }


def reduced_descent(draw):
    dtype = draw.dtype()
    chain = widths(draw, draw.choose((2, 1, 3, 4)))
    arguments, cores, n = engine(draw, dtype, chain)
    n_scalars = len(cores)
    arguments |= {
        "observed": None,
        "measurements": None,
        "families": [
            {
                "first": 0,
                "multiplicity": draw.choose((3.0, 0.0, 1e300)),
                "coupling": draw.choose((1.0, 0.0)),
                "rho": [0.5] * n_scalars,
            }
        ],
        "scalars": draw.choose((None, np.zeros((3, n_scalars)))),
        "core_records": [np.zeros((n, *c.shape), dtype) for c in cores],
        "rho_records": np.zeros((n, n_scalars)),
    }
    return {"cores": cores, "arguments": arguments}


def batch_descent(draw):
    dtype, n_runs, n_layers = draw.dtype(), draw.size(33), draw.choose((2, 1, 3))
    chain = [draw.size(8) for _ in range(n_layers + 1)]
    steps, every = draw.choose((3, 0, 1, 4, 20)), draw.choose((1, 2, 100))
    n_records = steps // every + 1 + (steps % every != 0)
    shapes = list(zip(chain[1:], chain, strict=False))
    gram = draw.choose((False, True))
    return {
        "cores": [draw.array(n_runs, *s, dtype=dtype) for s in shapes],
        "arguments": {
            "target": draw.array(n_runs, chain[-1], chain[0], dtype=dtype),
            "input_gram": np.ones((n_runs, chain[0], chain[0]), dtype) if gram else None,
            "input_factor": np.ones((n_runs, chain[0], chain[0]), dtype) if gram else None,
            "factor_target": np.ones((n_runs, chain[-1], chain[0]), dtype) if gram else None,
            "families": [{"first": 0, "length": n_layers}],
            "rho": np.full((n_runs, n_layers), 0.5),
            "multiplicity": np.full((n_runs, 1), 3.0),
            "coupling": np.ones((n_runs, 1)),
            "learning_rate": np.full((n_runs, n_layers), draw.choose((0.1, 1e3))),
            "weight_decay": np.zeros((n_runs, n_layers)),
            "momentum": np.full((n_runs, n_layers), draw.choose((0.0, 0.9))),
            "loss_scale": np.ones((n_runs, 1)),
            "loss_floor": np.zeros((n_runs, 1)),
            "steps": steps,
            "record_every": every,
            "tolerance": draw.choose((-1.0, 1.0)),
            "n_threads": draw.choose((1, 2, 3, 0)),
            "loss": np.zeros((n_runs, steps + 1)),
            "core_records": [np.zeros((n_runs, n_records, *s), dtype) for s in shapes],
            "rho_records": np.zeros((n_runs, n_records, n_layers)),
            "counts": np.zeros((n_runs, 2), np.int64),
        },
    }


FUNCTIONS = {
    "multiply": (multiply, {"out"}),
    "thin_multiply": (thin_multiply, {"out"}),
    "thin_descend": (thin_descend, {"w", "velocity"}),
    "thin_times_and_descend": (lambda draw: thin_descend(draw, "columns"), {"w", "out", "velocity"}),
    "thin_times_transpose_and_descend": (lambda draw: thin_descend(draw, "rows"), {"w", "out", "velocity"}),
    "extend_basis": (extend_basis, {"basis", "block", "lengths"}),
    "singular_values": (singular_values, {"values", "left", "right"}),
    "bidiagonal_singular_values": (bidiagonal_singular_values, set()),
    "follow_branches": (follow_branches, {"left", "right", "ids", "clusters"}),
    "best_assignment": (best_assignment, set()),
    "sort_entries": (sort_entries, {"start", "index", "values"}),
    "transpose_entries": (transpose_entries, {"start", "index", "values"}),
    "residual_products": (residual_products, {"left", "right"}),
    "row_posteriors": (row_posteriors, {"moments", "errors"}),
    "masked_residual": (masked_residual, {"error"}),
    "measured_residual": (measured_residual, {"error"}),
    "dense_descent": (
        dense_descent,
        {
            "weights",
            "loss",
            "record_steps",
            "counts",
            "rate",
            "velocity",
            "compensation",
            "power_vectors",
            "left_factors",
            "right_factors",
            "values",
            "errors",
        }
        | {"signs", "branches", "clusters", "tracking", "left", "right", "snapshots"},
    ),
    "reduced_descent": (
        reduced_descent,
        {"cores", "loss", "record_steps", "counts", "rate", "velocity", "compensation", "power_vectors"}
        | {"left_factors", "right_factors"}
        | {"scalars", "core_records", "rho_records"},
    ),
    "gradients": (gradients, {"gradients"}),
    "batch_descent": (batch_descent, {"loss", "core_records", "rho_records", "counts"}),
    "best_pivot": (lambda draw: {"widths": widths(draw, 1 + draw.below(5))}, set()),
    "step_flops": (lambda draw: {"widths": widths(draw, 1 + draw.below(5)), "pivot": draw.below(2)}, set()),
    "set_num_threads": (lambda draw: {"n": draw.choose((0, 1, 2, 7))}, set()),
    "max_threads": (lambda draw: {}, set()),
    "build_info": (lambda draw: {}, set()),
    "describe_tables": (lambda draw: {}, set()),
    # Cannot be undone, so the argument is invalid; `Fuzzer.finish` makes the valid call.
    "forbid_threads": (lambda draw: {"n": 1}, set()),
}


def constructor(draw, rows, cols):
    return {
        "rows": rows,
        "cols": cols,
        "settings": core.TRACKER_DEFAULTS
        | {
            "n_values": draw.choose((2, 1, 5, 64)),
            "n_guards": draw.choose((8, 0, 2)),
            "mode": draw.choose(("auto", "dense", "full")),
            "refresh_every": draw.choose((0, 1, 2)),
            "signed_values": draw.choose((False, True)),
        },
        "n_threads": draw.choose((1, 2, 3, 0)),
    }


def operator(draw, rows, cols, dtype):
    w = draw.array(rows, cols, dtype=dtype)
    return {
        "matmat": Callback("product", w),
        "rmatmat": Callback("product", np.ascontiguousarray(w.T)),
        "squared_norm": float(np.sum(w.astype(np.float64) ** 2)),
        "drift": draw.choose((np.inf, 0.0, 1.0)),
    }


def factors(draw, rows, cols, dtype):
    k = draw.size(4)
    return {
        "factor": draw.choose((1.0, 0.5)),
        "scale": draw.choose((0.1, 0.0)),
        "left": draw.array(k, rows, dtype=dtype),
        "right": draw.array(k, cols, dtype=dtype),
    }


def references(draw, rows, cols, dtype):
    if draw.choose((False, True)):
        return {"left": None, "right": None}
    k = draw.size(4)
    return {"left": draw.array(k, rows, dtype=dtype), "right": draw.array(k, cols, dtype=dtype)}


METHODS = {
    "update": lambda draw, m, n, t: {
        "w": draw.array(m, n, dtype=t),
        "drift": draw.choose((np.inf, 0.0, 1.0)),
    },
    "update_operator": operator,
    "begin_factored": lambda draw, m, n, t: {
        "w": draw.array(m, n, dtype=t),
        "limit": draw.choose((8, 0, 64)),
    },
    "append": factors,
    "vectors": lambda draw, m, n, t: {"left": draw.choose((True, False))},
    "seed": lambda draw, m, n, t: {"right": draw.array(draw.size(4), n, dtype=t)},
    "set_reference": references,
}
PROPERTIES = ("n_values", "n_refreshes", "n_certificates")
TRACKERS = {"SvdTracker64": np.float64, "SvdTracker32": np.float32}

BINDINGS = (*FUNCTIONS, *TRACKERS)

# Eigen's JacobiSVD frees its QR factors twice if their allocation fails. Inside BDCSVD these have at most
# 17 x 16 numbers; larger allocations are made by the core itself.
WITH_SVD = {"singular_values", "dense_descent", "follow_branches", *TRACKERS}
LEAST_WITH_SVD = 4096


def every_binding():
    """Return the names of all bindings, methods and properties as ``class.name``."""
    methods = (*METHODS, *PROPERTIES)
    return {*BINDINGS, *(f"{tracker}.{name}" for tracker in TRACKERS for name in methods)}


# Mutations of arguments.


def walk(tree, path=()):
    """Yield (path, value) of all values in a tree of arguments, containers included."""
    if path:
        yield path, tree
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from walk(value, (*path, key))
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from walk(value, (*path, i))


def replace_at(tree, path, value):
    """Return a copy of the tree with another value at the path."""
    if not path:
        return value
    head, *tail = path
    if isinstance(tree, dict):
        return {k: replace_at(v, tail, value) if k == head else v for k, v in tree.items()}
    return type(tree)(replace_at(v, tail, value) if i == head else v for i, v in enumerate(tree))


def mutate_shape(draw, array):
    shape = list(array.shape)
    kind = draw.choose(("axis", "axis", "swap", "drop", "add", "empty", "huge", "huge view"))
    if kind == "axis" and shape:
        i = draw.below(len(shape))
        shape[i] = max(0, draw.choose((shape[i] + 1, shape[i] - 1, 0, 1, 2 * shape[i])))
    elif kind == "swap":
        shape.reverse()
    elif kind == "drop":
        shape = shape[1:]
    elif kind == "add":
        shape = [1, *shape]
    elif kind == "empty":
        shape = [0] * len(shape)
    elif kind == "huge" and len(shape) > 1:
        # An array with an empty axis takes no memory.
        shape = [0] * len(shape)
        shape[draw.below(len(shape))] = draw.choose(HUGE)
        return np.empty(shape, array.dtype)
    elif kind == "huge view" and shape:
        return np.broadcast_to(np.ones((), array.dtype), [*shape[:-1], draw.choose(HUGE[:3])])
    return np.resize(array, shape)


def mutate_values(draw, array):
    array = array.copy()
    flat = array.reshape(-1)
    if flat.size == 0:
        return array
    at = slice(None) if draw.below(4) == 3 else (draw.below(256) * 7919) % flat.size
    with np.errstate(all="ignore"):
        if array.dtype.kind == "f":
            flat[at] = draw.choose(FLOATS)
        elif array.dtype.kind == "i":
            least, most = np.iinfo(array.dtype).min, np.iinfo(array.dtype).max
            flat[at] = min(max(draw.choose(INTEGERS), least), most)
    return array


def mutate_dtype(draw, array):
    dtype = np.dtype(draw.choose(DTYPES))
    try:
        with np.errstate(all="ignore"):
            return array.astype(dtype)
    except (TypeError, ValueError):
        return np.zeros(array.shape, dtype)


def mutate_list(draw, value):
    kind = draw.choose(("shorter", "longer", "none", "empty", "other"))
    items = list(value)
    if kind == "other":
        return tuple(items) if isinstance(value, list) else items
    if kind == "shorter":
        items = items[:-1]
    elif kind == "longer":
        items += items[-1:] or [None]
    elif kind == "none":
        items = [None] * len(items)
    else:
        items = []
    return type(value)(items)


def mutate(draw, tree):
    """Return the tree of arguments with one change."""
    nodes = list(walk(tree))
    if not nodes:
        return {"n": draw.choose(INTEGERS)}
    path, value = nodes[(draw.below(256) * 256 + draw.below(256)) % len(nodes)]
    huge = isinstance(value, np.ndarray) and max(value.shape, default=0) >= min(HUGE)
    if huge or draw.below(16) == 15:
        return replace_at(tree, path, draw.choose(ODD_VALUES))
    if isinstance(value, np.ndarray):
        kind = draw.choose(("values", "layout", "shape", "dtype", "alias"))
        if kind == "alias":
            others = [other for _, other in nodes if isinstance(other, np.ndarray)]
            new = Alias(value, draw.choose(others), draw.choose((0, 8)))
        elif kind == "layout":
            new = WithLayout(value, draw.choose(LAYOUTS))
        else:
            new = {"values": mutate_values, "shape": mutate_shape, "dtype": mutate_dtype}[kind](draw, value)
    elif isinstance(value, bool):
        new = draw.choose((not value, *ODD_VALUES))
    elif path[-1] in ("n_threads", "n"):
        # No values from 8 to 4096: so many threads would start.
        new = draw.choose((0, -1, 7, 4097, 2**31 - 1, 2**31, -(2**31), *ODD_VALUES))
    elif isinstance(value, int | float):
        near = (value + 1, value - 1, -value)
        new = draw.choose((*near, *INTEGERS, *FLOATS, *ODD_VALUES))
    elif isinstance(value, str):
        new = draw.choose(
            ("none", "rows", "columns", "auto", "dense", "full", "", "\0", "x" * 5000, *ODD_VALUES)
        )
    elif isinstance(value, list | tuple):
        new = mutate_list(draw, value)
    elif isinstance(value, dict):
        missing = draw.below(max(len(value), 1))
        new = {k: v for i, (k, v) in enumerate(value.items()) if i != missing}
    elif value is None or isinstance(value, Callback):
        new = Callback(draw.choose(Callback.KINDS))
    else:
        new = None
    return replace_at(tree, path, new)


# Memory.


def _exported(name, library=None):
    try:
        return getattr(ctypes.CDLL(library), name)
    except AttributeError:
        return None


_poison = _exported("__asan_poison_memory_region")
_unpoison = _exported("__asan_unpoison_memory_region")
for _function in (_poison, _unpoison):
    if _function is not None:
        _function.argtypes, _function.restype = (ctypes.c_void_p, ctypes.c_size_t), None


class Guarded:
    """An array in a separate buffer, between guard bytes."""

    def __init__(self, array, layout="C"):
        shape, item = array.shape, array.itemsize
        strides = list(np.empty(shape, array.dtype).strides)
        if layout == "F":
            strides = list(np.empty(shape, array.dtype, order="F").strides)
        elif layout == "gaps":
            strides = [2 * s for s in strides]
        elif layout == "reversed":
            strides = [-s for s in strides]
        elif layout == "broadcast" and shape:
            strides[0] = 0
        reach = [s * (n - 1) for s, n in zip(strides, shape, strict=True)]
        span = sum(map(abs, reach)) + item if array.size else 0
        # At least 1025 bytes: NumPy caches small buffers instead of freeing them.
        self.bytes = np.full(max(span + 2 * GUARD + 65, 1025), 0xA5, np.uint8)
        self.begin = GUARD + (-self.bytes.ctypes.data) % 64 + (layout == "misaligned")
        self.end = self.begin + span
        lowest = sum(min(r, 0) for r in reach)
        self.array = np.ndarray(shape, array.dtype, self.bytes, self.begin - (lowest if span else 0), strides)
        self.array[...] = array
        self.array.flags.writeable = layout != "read-only"
        self.before = self.bytes.tobytes()

    def alias(self, array, shift):
        """Return an array like `array` in this buffer, if it fits."""
        if array.nbytes + shift > self.end - self.begin:
            shift = 0
        if array.nbytes > self.end - self.begin:
            return self.array
        return np.ndarray(array.shape, array.dtype, self.bytes, self.begin + shift)

    def protect(self):
        """Poison the bytes around the array."""
        if _poison is not None:
            address = self.bytes.ctypes.data
            _poison(address, self.begin)
            _poison(address + self.end, len(self.bytes) - self.end)

    def unprotect(self):
        if _unpoison is not None:
            _unpoison(self.bytes.ctypes.data, len(self.bytes))

    def is_unchanged(self, whole):
        now = self.bytes.tobytes()
        if whole:
            return now == self.before
        return now[: self.begin] == self.before[: self.begin] and now[self.end :] == self.before[self.end :]


class Memory:
    """The guarded arrays of a call; an array that is passed repeatedly is guarded once."""

    def __init__(self):
        self._guarded = {}
        self._paths = defaultdict(list)
        self.aliased = False

    def guard_arrays(self, tree, path=()):
        """Return the tree of arguments with its arrays in guarded buffers."""
        if isinstance(tree, dict):
            return {key: self.guard_arrays(value, (*path, key)) for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(self.guard_arrays(value, (*path, i)) for i, value in enumerate(tree))
        if isinstance(tree, Alias):
            self.aliased = True
            guarded = self._guard(tree.of, "C", path)
            return tree.array if guarded is None else guarded.alias(tree.array, tree.shift)
        array, layout = (tree.array, tree.layout) if isinstance(tree, WithLayout) else (tree, "C")
        if not isinstance(array, np.ndarray):
            return tree
        guarded = self._guard(array, layout, path)
        return array if guarded is None else guarded.array

    def _guard(self, array, layout, path):
        # Arrays of objects hold pointers only, and broadcast views may be huge.
        if array.dtype.hasobject or array.nbytes > 1 << 24:
            return None
        key = id(array), layout
        if key not in self._guarded:
            self._guarded[key] = Guarded(array, layout), array
        self._paths[key].append(path)
        return self._guarded[key][0]

    def release(self):
        """Drop the references to all arrays."""
        self.unprotect()
        self._guarded.clear()

    def protect(self):
        for guarded, _ in self._guarded.values():
            guarded.protect()

    def unprotect(self):
        for guarded, _ in self._guarded.values():
            guarded.unprotect()

    def check(self, outputs):
        for key, (guarded, _) in self._guarded.items():
            paths = self._paths[key]
            is_output = self.aliased or any(part in outputs for path in paths for part in path)
            if not guarded.is_unchanged(whole=not is_output):
                where = "around" if is_output else "in"
                raise Finding(f"the call wrote {where} the array at {paths[0]}")


# Calls.


def bind_callbacks(arguments, function, memory):
    """Replace each Callback by its function."""
    for value in [arguments, *(value for _, value in walk(arguments))]:
        for key, entry in value.items() if isinstance(value, dict) else ():
            if isinstance(entry, Callback):
                value[key] = entry.bind(function, arguments, memory)


def _too_long(*_):
    raise TakesLongError


class Fuzzer:
    """Makes, checks and counts calls."""

    def __init__(self) -> None:
        self.counts = {name: Counter() for name in sorted(every_binding())}
        self.n_calls = 0
        self._began = time.monotonic()
        self._n_reached = _exported("dlnfast_n_reached", core.__file__)
        self._fail_allocation = _exported("dlnfast_fail_allocation", core.__file__)
        if self._fail_allocation is not None:
            self._fail_allocation.argtypes = ctypes.c_long, ctypes.c_size_t
            self._fail_allocation.restype = ctypes.c_long
        signal.signal(signal.SIGALRM, _too_long)
        self._last = os.open(LAST_INPUT, os.O_RDWR | os.O_CREAT, 0o644)

    def run(self, data: bytes) -> None:
        """Make the calls of one input."""
        os.pwrite(self._last, len(data).to_bytes(4, "little") + data, 0)
        draw = Draw(data)
        name = draw.choose(BINDINGS)
        faulthandler.dump_traceback_later(HARD_LIMIT, exit=True)
        if name in FUNCTIONS:
            make, outputs = FUNCTIONS[name]
            self.call(name, getattr(core, name), make(draw), outputs, draw)
            if name == "set_num_threads":
                core.set_num_threads(0)
        else:
            self._track(name, draw)
        faulthandler.cancel_dump_traceback_later()

    def _track(self, name, draw):
        rows, cols, dtype = draw.size(), draw.size(), TRACKERS[name]
        tracker_object = self.call(name, getattr(core, name), constructor(draw, rows, cols), set(), draw)
        if tracker_object is None:
            return
        # Valid calls first, half of the time, for methods that need a state.
        methods = draw.choose(((), ("update", "begin_factored", "append")))
        n_valid = len(methods)
        methods += tuple(draw.choose(tuple(METHODS)) for _ in range(1 + draw.below(6)))
        for i, method in enumerate(methods):
            arguments = METHODS[method](draw, rows, cols, dtype)
            changes = Draw(b"") if i < n_valid else draw
            self.call(f"{name}.{method}", getattr(tracker_object, method), arguments, set(), changes)
        which = draw.choose(PROPERTIES)
        self.call(f"{name}.{which}", lambda: getattr(tracker_object, which), {}, set(), Draw(b""))

    def call(self, name, function, arguments, outputs, draw):
        """Return the result of a call with mutated arguments; None if it raises."""
        for _ in range(draw.choose((0, 1, 1, 1, 1, 2, 2, 3))):
            arguments = mutate(draw, arguments)
        memory = Memory()
        arguments = memory.guard_arrays(arguments)
        bind_callbacks(arguments, function, memory)
        n_successes = draw.choose((-1, -1, -1, -1, draw.below(64)))
        self.n_calls += 1
        result, error = None, None
        memory.protect()
        signal.setitimer(signal.ITIMER_REAL, SOFT_LIMIT)
        if self._fail_allocation is not None:
            small = name.split(".")[0] not in WITH_SVD
            self._fail_allocation(n_successes, 0 if small else LEAST_WITH_SVD)
        try:
            result = function(**arguments)
        except (*KNOWN_ERRORS, RaisedByCallbackError, TakesLongError) as raised:
            error = raised
        except RuntimeError as raised:
            if not any(text in str(raised) for text in KNOWN_STATES):
                raise
            error = raised
        finally:
            n_left = self._fail_allocation(-1, 0) if self._fail_allocation is not None else -1
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            memory.unprotect()
        memory.check(outputs)
        count = self.counts[name]
        count["returned" if error is None else type(error).__name__] += 1
        if n_successes >= 0 > n_left and self._fail_allocation is not None:
            count["allocation failed"] += 1
        return result

    def finish(self) -> str:
        """Return a summary of all calls."""
        os.close(self._last)
        LAST_INPUT.unlink()
        core.forbid_threads()
        self.counts["forbid_threads"]["returned"] += 1
        self.n_calls += 1
        total = sum(self.counts.values(), Counter())
        failed = total.pop("allocation failed", 0)
        lines = [f"{'':38}{'calls':>8}  outcomes"]
        for name, count in self.counts.items():
            shown = {kind: n for kind, n in count.most_common() if kind != "allocation failed"}
            lines.append(
                f"{name:38}{sum(shown.values()):8}  " + ", ".join(f"{k} {n}" for k, n in shown.items())
            )
        lines.append(", ".join(f"{kind} {n}" for kind, n in total.most_common()))
        blocks = "none (not a build for fuzzing)" if self._n_reached is None else str(self._n_reached())
        lines.append(f"allocations made to fail: {failed}; basic blocks of the core reached: {blocks}")
        lines.append(f"{self.n_calls} calls in {time.monotonic() - self._began:.0f} seconds, no finding")
        return "\n".join(lines)


def inputs(seed: int):
    """Yield endless inputs: each binding in turn, first with valid arguments."""
    rng = np.random.default_rng(seed)
    for i in range(len(BINDINGS)):
        yield bytes([i])
    while True:
        for i in range(len(BINDINGS)):
            yield bytes([i]) + rng.bytes(int(rng.integers(8, 256)))


def run_guided(fuzzer: Fuzzer, calls: int, seed: int, register) -> None:
    """Run libFuzzer; does not return."""
    import atheris
    from atheris import core_with_libfuzzer as engine

    def one(data):
        fuzzer.run(data)
        if fuzzer.n_calls >= calls:
            print(fuzzer.finish(), flush=True)
            os._exit(0)  # the only way to stop libFuzzer

    with tempfile.TemporaryDirectory() as folder:
        for i, data in zip(range(8 * len(BINDINGS)), inputs(seed), strict=False):
            (Path(folder) / f"{i:04}").write_bytes(data)
        flags = {"seed": seed, "max_len": 512, "len_control": 0, "timeout": 0, "rss_limit_mb": 0}
        atheris.Setup([sys.argv[0], *(f"-{name}={value}" for name, value in flags.items()), folder], one)
        library = ctypes.CDLL(engine.__file__)
        names = "__sanitizer_cov_8bit_counters_init", "__sanitizer_cov_pcs_init"
        register(*(ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in names))
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--unguided", action="store_true", help="use random inputs in any build")
    parser.add_argument("--memory", type=float, help="GB of address space in addition to the current use")
    parser.add_argument("files", nargs="*", type=Path, help="inputs to repeat")
    options = parser.parse_args()
    faulthandler.enable()
    if options.memory is not None:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = in_use + int(options.memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    fuzzer = Fuzzer()
    register = _exported("dlnfast_register_counters", core.__file__)
    if options.files:
        for file in options.files:
            data = file.read_bytes()
            fuzzer.run(data[4 : 4 + int.from_bytes(data[:4], "little")])
    elif register is not None and not options.unguided:
        run_guided(fuzzer, options.calls, options.seed, register)
    else:
        for data in inputs(options.seed):
            fuzzer.run(data)
            if fuzzer.n_calls >= options.calls:
                break
    print(fuzzer.finish())


if __name__ == "__main__":
    main()
