# SPDX-License-Identifier: MIT
"""Change files of every format at random, read them, and count the outcomes.

    python bench/mutate_files.py [--count 10000] [--seed 0] [--formats trajectory folder ..] [--processes 2]

A file is truncated, its bits are flipped, its members are exchanged, its sizes and headers are forged, its
numbers are changed, or it gets a member of 300 MB after decompression. Reading the file must then return the
values that were written, or raise a `ValueError`. It may use at most three times the size of the file, or
64 MB. Every other outcome counts as wrong, untyped, memory or crash, and is printed; the exit status is 1 if
there was any.

Formats that users write themselves (specifications, data sets) have no expected values, so only errors and
memory are checked. Arrays that a specification names may be compressed by any factor. The same seed gives
the same changes on every machine.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import io
import itertools
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import dlnfast as dln
from dlnfast._config import finetuning, spec
from dlnfast._config import sweep_worker as _sweep_worker
from dlnfast.benchmarks import cases

FREE_BYTES = 2**26
BOMB_BYTES = 300 * 2**20
GOOD = ("right", "refused", "not read")


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes
    ----------
    make : callable
        Function that writes the original to a folder and returns the files that may be changed.
    load : callable
        Function that reads the folder and returns values to compare.
    kind : str
        A key of `SUITED`, which lists changes for this format in addition to those of bytes, or "open zip",
        an archive whose requested arrays may have any size.
    is_own : bool
        Whether the package wrote the file, so that the expected values are known.
    """

    make: Callable[[Path], list[Path]]
    load: Callable[[Path], Any]
    kind: str
    is_own: bool = True


# --------------------------------------------------------------------------------------------------
# Formats
# --------------------------------------------------------------------------------------------------


def _weights(width: int = 6, depth: int = 2, scale: float = 0.5) -> list[np.ndarray]:
    return dln.gaussian([width] * (depth + 1), scale, seed=1)


def _runs() -> dict[str, Callable[[], dln.Trajectory]]:
    def train(problem: Any, weights: Any, **options: Any) -> dln.Trajectory:
        return dln.train(problem, weights, **{"learning_rate": 0.1, "steps": 12, "n_threads": 1} | options)

    recovery = dln.low_rank_recovery(6, 1)
    return {
        "reduced": lambda: train(recovery, dln.orthogonal([6] * 3, 0.5)),
        "dense": lambda: train(
            recovery, _weights(), engine="dense", record=dln.Record(vectors=True, weights_every=4)
        ),
        "tracking": lambda: train(recovery, _weights(), engine="dense", record=dln.Record(singular_values=2)),
        "auto": lambda: train(recovery, dln.orthogonal([6] * 3, 0.5), learning_rate="auto"),
        "completion": lambda: train(dln.low_rank_completion(6, 1, 0.7, seed=0), _weights()),
        "lazily-sampled": lambda: train(
            dln.low_rank_recovery(40, 1),
            dln.orthogonal([40] * 3, 0.5, implicit=True),
            record=dln.Record(singular_values=3),
        ),
        "whitened": lambda: train(
            dln.Problem.from_data(
                np.random.default_rng(0).standard_normal((5, 30)), np.arange(30) % 3, whiten="zca"
            ),
            dln.gaussian([5, 4, 3], 0.5, seed=2),
        ),
    }


def content(run: dln.Trajectory) -> Any:
    """Return the content of a run in a form that can be compared."""
    metadata, arrays = run.to_arrays()
    values = {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in arrays.items()}
    return json.dumps(metadata, sort_keys=True), values


def _trajectory(name: str) -> Format:
    def make(folder: Path) -> list[Path]:
        _runs()[name]().save(folder / "run.npz")
        return [folder / "run.npz"]

    return Format(make, lambda folder: content(dln.load(folder / "run.npz")), "zip")


def _folder(engine: str) -> Format:
    def make(folder: Path) -> list[Path]:
        checkpoint = dln.Checkpoint(folder / "run", every=20, seconds=0)
        weights = dln.orthogonal([6] * 3, 0.5) if engine == "reduced" else _weights()
        dln.train(
            dln.low_rank_recovery(6, 1),
            weights,
            learning_rate=0.1,
            steps=50,
            engine=engine,
            checkpoint=checkpoint,
            n_threads=1,
        )
        return sorted(path for path in (folder / "run").iterdir() if path.suffix in (".npz", ".json"))

    return Format(make, lambda folder: content(dln.load(folder / "run")), "zip")


def _batch() -> Format:
    def run(folder: Path) -> list[dln.Trajectory]:
        weights = [dln.orthogonal([5] * 3, scale) for scale in (0.3, 0.5)]
        return dln.train_batch(
            [dln.low_rank_recovery(5, 1)] * 2,
            weights,
            learning_rate=0.1,
            steps=10,
            checkpoint=folder / "batch",
            n_threads=1,
        )

    def make(folder: Path) -> list[Path]:
        run(folder)
        return sorted(path for path in (folder / "batch").iterdir() if path.suffix in (".npz", ".json"))

    def load(folder: Path) -> Any:
        # A repeated run has different times.
        return [(r.loss.tobytes(), r.steps.tobytes(), r.weights(1).tobytes()) for r in run(folder)]

    return Format(make, load, "zip")


def _statistics() -> Format:
    def make(folder: Path) -> list[Path]:
        rng = np.random.default_rng(0)
        found = dln.SufficientStatistics()
        found.add(rng.standard_normal((4, 20)), np.arange(20) % 3)
        found.save(folder / "statistics.npz")
        return [folder / "statistics.npz"]

    def load(folder: Path) -> Any:
        found = dln.SufficientStatistics.load(folder / "statistics.npz")
        parts = {name: (s.value.tobytes(), s.round().tobytes()) for name, s in found._sums.items()}
        return found.n_samples, found.layout, found.classes.tobytes(), parts

    return Format(make, load, "zip")


def _estimator() -> Format:
    rows, columns = np.divmod(np.random.default_rng(0).permutation(36)[:20], 6)
    pairs, values = np.stack([rows, columns], axis=1), np.ones(20) + rows

    def fit(folder: Path) -> Any:
        options = {
            "method": "gradient",
            "depth": 2,
            "steps": 30,
            "entries": dln.EntryOptions((6, 6)),
            "n_threads": 1,
        }
        model = dln.MatrixCompletion(checkpoint=folder / "fit", **options)
        return model.fit(pairs, values).predict(pairs).tobytes()

    def make(folder: Path) -> list[Path]:
        fit(folder)
        return sorted(path for path in (folder / "fit").rglob("*") if path.suffix in (".npz", ".json"))

    return Format(make, fit, "zip")


def _results() -> Format:
    def make(folder: Path) -> list[Path]:
        results = finetuning.Results(folder / "results.jsonl")
        for seed in range(3):
            run = {"method": "lora", "rank": 4, "n_examples": 16, "seed": seed, "learning_rate": 1e-3}
            results._write(
                {
                    "run": run,
                    "about": {"model": "a"},
                    "scores": {"selection": 0.5 + seed / 7, "report": 0.25 + seed / 3},
                    "ranks": {"layer": 3},
                    "final_loss": 0.125,
                }
            )
        return [folder / "results.jsonl"]

    def load(folder: Path) -> Any:
        # Fewer lines are valid: they are the file at an earlier time.
        found = finetuning.Results(folder / "results.jsonl").records
        return {json.dumps(record, sort_keys=True) for record in found}

    return Format(make, load, "lines")


def _sweep() -> Format:
    name = "0123456789abcdef"

    def make(folder: Path) -> list[Path]:
        item = _sweep_worker.Item(name, {"problem": {"kind": "npz"}, "weights": {}, "train": {}})
        summary = _sweep_worker.failure(item, "", 0.5) | {
            "outcome": "finished",
            "error": None,
            "final_loss": 0.25,
            "steps": 10,
            "accuracy": {"train": {"network": 0.75, "least squares": 1.0}},
        }
        _sweep_worker.record(str(folder), item, summary)
        return [folder / name / _sweep_worker.SUMMARY]

    def load(folder: Path) -> Any:
        found = _sweep_worker.load_finished(folder, name, keep=False, retry=False)
        if found is None:
            raise ValueError("it has to be run again")
        return json.dumps(found, sort_keys=True)

    return Format(make, load, "json")


def _bench() -> Format:
    def make(folder: Path) -> list[Path]:
        cases_ = [{"case": name, "rows": []} for name in list(cases.CASES)[:2]]
        (folder / "bench.json").write_text(json.dumps({"quick": True, "results": cases_}, indent=1))
        return [folder / "bench.json"]

    return Format(make, lambda folder: cases.read_results(folder / "bench.json"), "json", is_own=False)


def _spec() -> Format:
    def make(folder: Path) -> list[Path]:
        (folder / "a.toml").write_text(
            '[problem]\nkind = "npz"\npath = "a.npz"\nwhiten = "zca"\n[weights]\nwidths = [4, 5, 3]\n'
            'scale = [0.5, 1.0]\ndtype = "float32"\n[train]\nlearning_rate = 0.25\nsteps = 100\n'
            "momentum = [0.5, 0.0]\n[output]\nweights = false\n"
        )
        return [folder / "a.toml"]

    return Format(make, lambda folder: spec.read_spec(folder / "a.toml").to_dict(), "text", is_own=False)


def _data(compressed: bool) -> Format:
    def make(folder: Path) -> list[Path]:
        rng = np.random.default_rng(0)
        save = np.savez_compressed if compressed else np.savez
        save(folder / "a.npz", X=rng.standard_normal((4, 30)), Y=np.arange(30) % 3)
        return [folder / "a.npz"]

    def load(folder: Path) -> Any:
        return spec._read_arrays(str(folder / "a.npz"), {"inputs": "X", "outputs": "Y"})["inputs"].shape

    return Format(make, load, "open zip", is_own=False)


def _images(ending: str) -> Format:
    def make(folder: Path) -> list[Path]:
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 255, (20, 28, 28)).astype(np.uint8)
        labels = (np.arange(20) % 10).astype(np.uint8)
        if ending == "npz":
            names = {"x_train": pixels, "y_train": labels, "x_test": pixels, "y_test": labels}
            np.savez_compressed(folder / "fashion_mnist_full.npz", **names)
            return [folder / "fashion_mnist_full.npz"]
        paths = []
        for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            paths.append(folder / f"train-{name}-ubyte.gz")
            paths[-1].write_bytes(gzip.compress(header + array.tobytes(), mtime=0))
        return paths

    def load(folder: Path) -> Any:
        return [array.shape for array in dln.load_fashion_mnist(folder)]

    return Format(make, load, "zip" if ending == "npz" else "gzip", is_own=False)


def _ratings(ending: str) -> Format:
    def make(folder: Path) -> list[Path]:
        rng = np.random.default_rng(0)
        users, items, stars = rng.integers(1, 9, 40), rng.integers(1, 9, 40), rng.integers(1, 6, 40)
        if ending == "npz":
            path = folder / "movielens_latest_small.npz"
            ids = np.arange(9)
            np.savez_compressed(
                path, users=users, items=items, ratings_x2=2 * stars, user_ids=ids, movie_ids=ids
            )
            return [path]
        with (folder / "ratings.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["userId", "movieId", "rating", "timestamp"])
            rows.writerows(zip(users, items, stars, range(40), strict=True))
        return [folder / "ratings.csv"]

    def load(folder: Path) -> Any:
        return len(dln.load_movielens(folder).ratings)

    return Format(make, load, "zip" if ending == "npz" else "text", is_own=False)


def _tracker() -> Format:
    """Return the format of a tracker state that a user stores as JSON, with exact arrays."""

    def encode(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return {"array": value.tolist(), "dtype": value.dtype.name}
        if isinstance(value, dict):
            return {name: encode(entry) for name, entry in value.items()}
        return value

    def decode(value: Any) -> Any:
        if isinstance(value, dict) and "array" in value:
            return np.array(value["array"], dtype=value["dtype"])
        if isinstance(value, dict):
            return {name: decode(entry) for name, entry in value.items()}
        return value

    def make(folder: Path) -> list[Path]:
        tracker = dln.SVDTracker(2, seed=3)
        tracker.update(np.random.default_rng(0).standard_normal((7, 7)))
        (folder / "state.json").write_text(json.dumps(encode(tracker.state_dict())))
        return [folder / "state.json"]

    def load(folder: Path) -> Any:
        with marking_errors_of_the_user():
            state = decode(json.loads((folder / "state.json").read_bytes()))
        tracker = dln.SVDTracker.from_state_dict(state)
        record = tracker.update(np.random.default_rng(0).standard_normal((7, 7)))
        return tracker.n_updates, record.singular_values.tobytes(), record.branches.tobytes()

    return Format(make, load, "json")


class _NotReadError(Exception):
    """The user's own code could not read the file, so the package was not called."""


@contextlib.contextmanager
def marking_errors_of_the_user() -> Any:
    """Turn errors of the user's own reader into `_NotReadError`."""
    try:
        yield
    except Exception as error:
        raise _NotReadError from error


def _adapters() -> dict[str, Format]:
    """Return the format of adapters, if PyTorch and safetensors are installed."""
    try:
        import safetensors
        import torch

        from dlnfast.torch import DeepLoRA
    except ImportError:
        return {}
    del safetensors

    def model() -> Any:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))

    def make(folder: Path) -> list[Path]:
        DeepLoRA(model(), rank=2, init="random", seed=1).save(folder / "adapter.safetensors")
        return [folder / "adapter.safetensors"]

    def load(folder: Path) -> Any:
        adapter = DeepLoRA.load(model(), folder / "adapter.safetensors")
        state = {name: tensor.numpy().tobytes() for name, tensor in adapter.state_dict().items()}
        return state, adapter.depth, adapter.scale, adapter.init, adapter.name

    return {"adapter": Format(make, load, "safetensors")}


def formats() -> dict[str, Format]:
    """Return all formats by name."""
    return {
        **{f"trajectory-{name}": _trajectory(name) for name in _runs()},
        "folder-reduced": _folder("reduced"),
        "folder-dense": _folder("dense"),
        "batch": _batch(),
        "statistics": _statistics(),
        "estimator": _estimator(),
        "results": _results(),
        "sweep": _sweep(),
        "tracker": _tracker(),
        "bench": _bench(),
        "spec": _spec(),
        "data": _data(False),
        "data-compressed": _data(True),
        "images-npz": _images("npz"),
        "images-idx": _images("idx"),
        "ratings-npz": _ratings("npz"),
        "ratings-csv": _ratings("csv"),
        **_adapters(),
    }


# --------------------------------------------------------------------------------------------------
# Changes
# --------------------------------------------------------------------------------------------------

Change = Callable[[random.Random, bytes], bytes]


def _pick_position(rng: random.Random, data: bytes) -> int:
    # Positions in headers and directories are as likely as positions in numbers.
    near = min(400, len(data))
    return rng.choice([rng.randrange(len(data)), rng.randrange(near), len(data) - 1 - rng.randrange(near)])


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: _pick_position(rng, data)]


def flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 5, 40])):
        changed[_pick_position(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(rng: random.Random, data: bytes) -> bytes:
    begin, count = _pick_position(rng, data), rng.choice([1, 4, 8, 64])
    filler = rng.choice([b"\0", b"\xff", rng.randbytes(1)]) * count
    return data[:begin] + filler[: len(data) - begin] + data[begin + count :]


def cut_out(rng: random.Random, data: bytes) -> bytes:
    begin = _pick_position(rng, data)
    return data[:begin] + data[begin + rng.choice([1, 3, 16, 500]) :]


def insert(rng: random.Random, data: bytes) -> bytes:
    begin = _pick_position(rng, data)
    added = rng.choice([rng.randbytes(9), data[:200], b"[" * 5000, b"\xef\xbb\xbf"])
    return data[:begin] + added + data[begin:]


def exchange_blocks(rng: random.Random, data: bytes) -> bytes:
    size = rng.choice([1, 8, 64])
    a, b = sorted((_pick_position(rng, data), _pick_position(rng, data)))
    if b < a + size or b + size > len(data):
        return flip(rng, data)
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


BYTES: list[Change] = [truncate, flip, overwrite, cut_out, insert, exchange_blocks]


def _members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def _archive(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # duplicate names
        with zipfile.ZipFile(stream, "w", method) as archive:
            for name, part in members:
                archive.writestr(zipfile.ZipInfo(name), part, compress_type=method)
    return stream.getvalue()


def exchange_members(rng: random.Random, data: bytes) -> bytes:
    """Exchange the contents of two members, with their checksums."""
    members = _members(data)
    a, b = rng.sample(list(members), 2)
    members[a], members[b] = members[b], members[a]
    return _archive(list(members.items()))


def drop_member(rng: random.Random, data: bytes) -> bytes:
    members = list(_members(data).items())
    del members[rng.randrange(len(members))]
    return _archive(members)


def duplicate_member(rng: random.Random, data: bytes) -> bytes:
    members = list(_members(data).items())
    name, _ = rng.choice(members)
    return _archive([*members, (name, rng.choice(members)[1])])


def rename_member(rng: random.Random, data: bytes) -> bytes:
    members = list(_members(data).items())
    i = rng.randrange(len(members))
    members[i] = rng.choice(["x.npy", "../a.npy", "meta", members[i][0] * 2]), members[i][1]
    return _archive(members)


def change_array(rng: random.Random, data: bytes) -> bytes:
    """Change a value, the shape or the type of an array, and write it as numpy does."""
    members = _members(data)
    name = rng.choice([name for name in members if name != "meta.npy"])
    array = np.load(io.BytesIO(members[name]))
    how = rng.randrange(5)
    if how == 0 and array.size and array.dtype.kind == "f":
        array.reshape(-1)[rng.randrange(array.size)] = rng.choice([np.nan, np.inf, -1.0, 1e300, 0.3])
    elif how == 1:
        array = array.reshape(-1) if array.ndim > 1 else array[..., np.newaxis]
    elif how == 2:
        with np.errstate(all="ignore"):
            array = array.astype(rng.choice(["f4", "f2", "i8", "c16", "S9", ">f8", "?"]))
    elif how == 3 and array.ndim:
        array = np.concatenate([array, array])
    elif array.ndim:
        array = array[:-1]
    stream = io.BytesIO()
    np.save(stream, array)
    members[name] = stream.getvalue()
    return _archive(list(members.items()))


def forge_header(rng: random.Random, data: bytes) -> bytes:
    """Declare another shape or type in the header of an array, with valid checksums."""
    members = _members(data)
    name = rng.choice(list(members))
    part = members[name]
    end = 10 + int.from_bytes(part[8:10], "little")
    header = part[10:end].decode("latin1")
    old = header[header.index("'shape': ") + 9 : header.rindex(")") + 1]
    shapes = ["(1099511627776,)", "(-1,)", "(2, -3)", "(0,)", "(65536, 65536)", "(1,) * 9", "[" * 200]
    new = rng.choice(shapes)
    header = header.replace(old, new)
    if rng.random() < 0.3:
        header = header.replace("<f8", rng.choice(["|O", "<U99999999", "|V8", "<M8[s]", "<f4", "<c16"]))
    text = header.rstrip().encode("latin1") + b"\n"
    length = rng.choice([len(text), len(text), 65535])
    members[name] = part[:8] + length.to_bytes(2, "little") + text + part[end:]
    return _archive(list(members.items()))


def forge_sizes(rng: random.Random, data: bytes) -> bytes:
    """Change the sizes and offsets in the directory of an archive."""
    changed = bytearray(data)
    positions = [i for i in range(len(data) - 46) if data[i : i + 4] in (b"PK\x01\x02", b"PK\x03\x04")]
    begin = rng.choice(positions)
    offsets = (8, 10, 16, 20, 24, 28, 30, 32, 42) if data[begin + 2] == 1 else (6, 8, 14, 18, 22, 26, 28)
    offset = begin + rng.choice(offsets)
    changed[offset : offset + 4] = rng.choice(
        [b"\xff\xff\xff\xff", b"\0\0\0\x40", b"\0\0\0\0", rng.randbytes(4), b"\x08\0\0\0"]
    )
    return bytes(changed)


def _bomb() -> bytes:
    """Return an archive with one deflated array of zeros, of `BOMB_BYTES` after decompression."""
    if "bomb" not in _BOMBS:
        stream = io.BytesIO()
        metadata = {"descr": "<f8", "fortran_order": False, "shape": (BOMB_BYTES // 8,)}
        archive = zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED)
        with archive, archive.open("a.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, metadata)
            for _ in range(BOMB_BYTES // 2**20):
                member.write(bytes(2**20))
        _BOMBS["bomb"] = stream.getvalue()
    return _BOMBS["bomb"]


_BOMBS: dict[str, bytes] = {}


def add_bomb(rng: random.Random, data: bytes) -> bytes:
    """Add a member that needs far more memory than the file, or replace one by it."""
    return _with_bomb(data, rng.choice(["zzz.npy", *_members(data)]))


def add_unknown_member(rng: random.Random, data: bytes) -> bytes:
    """Add a member that no reader requests and that needs far more memory than the file."""
    del rng
    return _with_bomb(data, "zzz.npy")


def _with_bomb(data: bytes, name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(stream, "w") as archive:
        for info in source.infolist():
            if info.filename != name:
                archive.writestr(info, source.read(info))
    # The compressed bytes are copied as they are.
    bomb = _bomb()
    with zipfile.ZipFile(io.BytesIO(bomb)) as archive:
        info = archive.infolist()[0]
    begin = info.header_offset + 30 + 5
    begin += int.from_bytes(bomb[info.header_offset + 28 : info.header_offset + 30], "little")
    deflated = bomb[begin : begin + info.compress_size]
    with zipfile.ZipFile(stream, "a") as archive:
        made = zipfile.ZipInfo(name)
        made.compress_type, made.CRC = zipfile.ZIP_DEFLATED, info.CRC
        made.compress_size, made.file_size = len(deflated), info.file_size
        made.header_offset = archive.start_dir
        archive.fp.seek(archive.start_dir)
        archive.fp.write(made.FileHeader(False) + deflated)
        archive.start_dir = archive.fp.tell()
        archive.filelist.append(made)
        archive.NameToInfo[name] = made
        archive._didModify = True
    return stream.getvalue()


def compress(rng: random.Random, data: bytes) -> bytes:
    """Compress the archive with another method; its content stays valid."""
    method = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    members = list(_members(data).items())
    rng.shuffle(members)
    return _archive(members, method)


def change_meta(rng: random.Random, data: bytes) -> bytes:
    """Change the JSON metadata of an archive."""
    members = _members(data)
    if "meta.npy" not in members:
        return change_array(rng, data)
    text = str(np.load(io.BytesIO(members["meta.npy"])))
    stream = io.BytesIO()
    np.save(stream, np.array(change_json(rng, text.encode()).decode("utf-8", "replace")))
    members["meta.npy"] = stream.getvalue()
    return _archive(list(members.items()))


ZIP: list[Change] = [
    exchange_members,
    drop_member,
    duplicate_member,
    rename_member,
    change_array,
    forge_header,
    forge_sizes,
    compress,
    change_meta,
]


def _entries(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        for key, entry in value.items():
            found += _entries(entry, (*path, key))
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            found += _entries(entry, (*path, i))
    return found


def change_json(rng: random.Random, data: bytes) -> bytes:
    """Change, drop or exchange entries of a JSON object."""
    try:
        document = json.loads(data)
    except ValueError:
        return flip(rng, data)
    paths = _entries(document)
    if not paths:
        return flip(rng, data)

    def parent(path: tuple[Any, ...]) -> Any:
        container = document
        for key in path[:-1]:
            container = container[key]
        return container

    path = rng.choice(paths)
    how = rng.randrange(4)
    if how == 0:
        del parent(path)[path[-1]]
    elif how == 1:
        other = rng.choice(paths)
        parent(path)[path[-1]] = json.loads(json.dumps(parent(other)[other[-1]]))
    elif how == 2:
        value = parent(path)[path[-1]]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        parent(path)[path[-1]] = rng.choice([-value, value + 1, value * 1.5]) if number else "other"
    else:
        parent(path)[path[-1]] = rng.choice(
            [None, True, -1, 2**31, 2**63, 10**400, math.nan, 1e308, "text", [], {}, [[[[]]]], "9" * 5000]
        )
    return json.dumps(document).encode()


def change_line(rng: random.Random, data: bytes) -> bytes:
    """Change, drop, duplicate or exchange lines, or change the JSON of one."""
    lines = data.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    how = rng.randrange(5)
    if how == 0:
        lines[i] = change_json(rng, lines[i]) if lines[i] else b"{}"
    elif how == 1:
        del lines[i]
    elif how == 2:
        lines.insert(j, lines[i])
    elif how == 3:
        lines[i], lines[j] = lines[j], lines[i]
    else:
        lines = [line + b"\r" for line in lines]
    return b"\n".join(lines)


def encode(rng: random.Random, data: bytes) -> bytes:
    """Write text in another encoding, or with other line endings."""
    text = data.decode("utf-8", "replace")
    names = ["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp1252"]
    return rng.choice(
        [text.encode(rng.choice(names), "replace"), data.replace(b"\n", b"\r\n"), data.replace(b"\n", b"\r")]
    )


def change_text(rng: random.Random, data: bytes) -> bytes:
    """Replace a number or word."""
    words = data.split(b" ") if b" " in data else data.split(b",")
    separator = b" " if b" " in data else b","
    words[rng.randrange(len(words))] = rng.choice(
        [b"-1", b"1e999", b"nan", b"9" * 5000, b'"', b"[" * 5000, b"{a = 1}", b"true", b"", b"\xff", b"\0"]
    )
    return separator.join(words)


def change_tensors(rng: random.Random, data: bytes) -> bytes:
    """Change the header of a safetensors file, or exchange two of its entries."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.5:
        text = change_json(rng, data[8 : 8 + size])
    else:
        a, b = rng.sample([name for name in header if name != "__metadata__"], 2)
        header[a], header[b] = header[b], header[a]
        text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def bomb_gzip(rng: random.Random, data: bytes) -> bytes:
    """Flip a bit of the header, or return a small file that decompresses to far more images."""
    if "gzip" not in _BOMBS:
        count = BOMB_BYTES // 784
        stream = io.BytesIO()
        with gzip.GzipFile(fileobj=stream, mode="wb", mtime=0) as file:
            file.write(bytes((0, 0, 8, 3)) + np.array((count, 28, 28), ">u4").tobytes())
            for _ in range(count):
                file.write(bytes(784))
        _BOMBS["gzip"] = stream.getvalue()
    if rng.random() < 0.2:
        return _BOMBS["gzip"]
    inner = bytearray(gzip.decompress(data))
    inner[rng.randrange(16)] ^= 1 << rng.randrange(8)
    return gzip.compress(bytes(inner), mtime=0)


SUITED: dict[str, list[Change]] = {
    "zip": ZIP,
    "json": [change_json, change_json, encode],
    "lines": [change_line, change_line, encode],
    "text": [change_text, encode],
    "gzip": [bomb_gzip],
    "safetensors": [change_tensors],
    "bytes": [],
}


def changed(rng: random.Random, data: bytes, path: Path, kind: str) -> tuple[str, bytes]:
    """Return the name of a random change, and the changed content of a file."""
    bomb, kind = (add_unknown_member, "zip") if kind == "open zip" else (add_bomb, kind)
    if kind == "zip" and path.suffix != ".npz":
        kind = "json"
    # Bombs are slow, so few of them are tried.
    if kind == "zip" and rng.random() < 0.02:
        change: Change = bomb
    else:
        suited = SUITED[kind]
        if kind == "zip" and data.count(b"PK\x01\x02") < 2:  # metadata only
            suited = [change_meta, forge_header, forge_sizes, compress]
        change = rng.choice(suited if suited and rng.random() < 0.6 else BYTES)
    return change.__name__, change(rng, data)


# --------------------------------------------------------------------------------------------------
# Counting
# --------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Number of outcomes by format, and some examples of failures."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, name: str, outcome: str, example: str) -> None:
        self.counts[name, outcome] += 1
        if outcome not in GOOD and len(self.examples) < 20:
            self.examples.append(f"{name}: {outcome}: {example}")

    @property
    def n_bad(self) -> int:
        return sum(n for (_, outcome), n in self.counts.items() if outcome not in GOOD)


class Mutator:
    """The original files of all formats, and their expected content.

    Parameters
    ----------
    folder : Path
        A new folder for originals and changed files.
    names : list of str
        Formats.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        known = formats()
        self.formats = {name: known[name] for name in names}
        self.files: dict[str, list[Path]] = {}
        self.wanted: dict[str, Any] = {}
        for name, kind in self.formats.items():
            original = folder / name
            original.mkdir()
            self.files[name] = [path.relative_to(original) for path in kind.make(original)]
            self.wanted[name] = kind.load(original)

    def attempt(self, seed: int, number: int) -> tuple[str, str, str]:
        """Change one file, read it, and return the format, the outcome and a description."""
        rng = random.Random(f"{seed} {number}")
        names = list(self.formats)
        name = names[number % len(names)]
        kind = self.formats[name]
        copy = self.folder / "changed"
        if copy.exists():
            shutil.rmtree(copy)
        shutil.copytree(self.folder / name, copy)
        path = copy / rng.choice(self.files[name])
        before = path.read_bytes()
        how, after = changed(rng, before, path, kind.kind)
        path.write_bytes(after)
        outcome, reason, peak = self._read(name, kind, copy)
        size = sum(file.stat().st_size for file in copy.rglob("*") if file.is_file())
        if outcome in GOOD and peak > max(3 * size, FREE_BYTES):
            outcome, reason = "memory", f"{peak} bytes for {size}"
        return name, outcome, f"change {number}, {how} of {path.name}: {reason}"

    def _read(self, name: str, kind: Format, copy: Path) -> tuple[str, str, int]:
        """Return the outcome, the reason of a failure, and the peak memory."""
        tracemalloc.start()
        outcome, reason = "right", ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = kind.load(copy)
            if kind.is_own and not self._agrees(found, self.wanted[name]):
                outcome = "wrong"
        except _NotReadError:
            outcome = "not read"
        except ValueError as error:
            outcome, reason = ("refused" if str(error) else "untyped"), str(error)
        except (
            FileNotFoundError
        ) as error:  # a user's file names a missing one, or an archive lost its file ending
            outcome, reason = ("untyped" if kind.is_own else "refused"), str(error)
        except Exception as error:
            outcome, reason = "untyped", f"{type(error).__name__}: {error}"
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return outcome, reason, peak

    @staticmethod
    def _agrees(found: Any, wanted: Any) -> bool:
        if isinstance(wanted, set):  # of records; a truncated file has fewer
            return bool(found <= wanted)
        return bool(found == wanted)


def run(seed: int, first: int, count: int, names: list[str], folder: Path) -> Tally:
    """Change and read `count` files in this process."""
    mutator, tally = Mutator(folder, names), Tally()
    for number in range(first, first + count):
        tally.add(*mutator.attempt(seed, number))
    return tally


def _work(seed: int, first: int, last: int, names: list[str]) -> int:
    """Change and read files, and print each outcome for the parent process."""
    with tempfile.TemporaryDirectory() as folder:
        mutator = Mutator(Path(folder), names)
        for number in range(first, last):
            print(json.dumps(mutator.attempt(seed, number)), flush=True)
    return 0


def supervise(seed: int, first: int, last: int, names: list[str], tally: Tally) -> None:
    """Count the outcomes of child processes; one that exits early has crashed at the next file."""
    while first < last:
        numbers = [str(n) for n in (seed, first, last)]
        command = [sys.executable, __file__, "--work", *numbers, "--formats", *names]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert worker.stdout is not None
        for line in worker.stdout:
            tally.add(*json.loads(line))
            first += 1
        status = worker.wait()
        if first < last:
            if status > 0:
                raise RuntimeError(f"this program failed at change {first}")
            tally.add(
                names[first % len(names)], "crash", f"change {first}: exit status {status} of the process"
            )
            first += 1


def main() -> int:
    """Change files, read them and print a table of the outcomes; return 1 if there are failures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = list(formats())
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="+", choices=known, default=known, metavar="NAME")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", nargs=3, type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work is not None:
        return _work(*chosen.work, chosen.formats)
    tally = Tally()
    parts = [chosen.count * i // chosen.processes for i in range(chosen.processes + 1)]
    with ThreadPoolExecutor(chosen.processes) as executor:
        jobs = [
            executor.submit(supervise, chosen.seed, first, last, chosen.formats, tally)
            for first, last in itertools.pairwise(parts)
        ]
        for job in jobs:
            job.result()
    outcomes = [*GOOD, *sorted({outcome for _, outcome in tally.counts} - set(GOOD))]
    print("| format | " + " | ".join(outcomes) + " |")
    print("|---" * (len(outcomes) + 1) + "|")
    for name in chosen.formats:
        print(f"| {name} | " + " | ".join(str(tally.counts[name, outcome]) for outcome in outcomes) + " |")
    total = Counter({outcome: sum(tally.counts[name, outcome] for name in known) for outcome in outcomes})
    print("| all | " + " | ".join(str(total[outcome]) for outcome in outcomes) + " |")
    print("\n".join(tally.examples))
    print(f"{sum(total.values())} changed files, seed {chosen.seed}: {tally.n_bad} failures")
    return int(tally.n_bad > 0)


if __name__ == "__main__":
    sys.exit(main())
