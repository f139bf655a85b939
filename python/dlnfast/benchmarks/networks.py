# SPDX-License-Identifier: MIT
"""Cases of `dlnfast.torch`: the cost of tracking relative to training."""

from __future__ import annotations

import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from . import record
from .options import Options

#: Steps of the optimizer from record to record, and singular values of each matrix.
_EVERY: Final = 10
_N_VALUES: Final = 8

#: Models: the class in `dlnfast.torch`, its settings, and the size of a batch.
_MODELS: Final[tuple[tuple[str, str, dict[str, Any], int], ...]] = (
    (
        "ViT, 6 layers, dim 192, patch 4",
        "ViT",
        {"dim": 192, "depth": 6, "n_heads": 3, "patch_size": 4},
        64,
    ),
    (
        "ViT, 6 layers, dim 384, patch 4",
        "ViT",
        {"dim": 384, "depth": 6, "n_heads": 6, "patch_size": 4},
        16,
    ),
    (
        "ViT, 6 layers, dim 128, patch 8",
        "ViT",
        {"dim": 128, "depth": 6, "n_heads": 4, "patch_size": 8},
        64,
    ),
    ("VGG-11, width 0.5", "VGG", {"name": "vgg11", "width": 0.5}, 64),
    ("MLP, 7 layers of 1024", "MLP", {"widths": [3072] + [1024] * 7 + [10]}, 128),
)
_QUICK: Final[tuple[tuple[str, str, dict[str, Any], int], ...]] = (
    ("ViT, 1 layer, dim 16", "ViT", {"dim": 16, "depth": 1, "n_heads": 2, "patch_size": 16}, 2),
    ("MLP, 1 layer of 140", "MLP", {"widths": [3072, 140, 10]}, 4),
)


def track_share(options: Options) -> dict[str, Any]:
    """Time `dlnfast.torch.track`, k = 8 of all weights and changes every 10th step, and training steps."""
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    if importlib.util.find_spec("torch") is None:
        reason = "torch is not installed: pip install torch"
        print(f"track-share: skipped, {reason}")
        return {"case": "track-share", "rows": rows, "skipped": reason}
    for name, kind, settings, batch in _QUICK if options.quick else _MODELS:
        arguments = {"kind": kind, "settings": settings, "batch": batch, "repeats": options.repeats}
        result = record.in_process("networks:tracked_training", arguments)
        row = {"what": name, "batch": batch} | result["row"]
        rows.append(row)
        step, one = row["seconds"]["plain"]["median"] / _EVERY, row["record_seconds"]["median"]
        kinds = ", ".join(f"{n} {promise}" for promise, n in row["completeness"].items())
        print(
            f"{name:<32} batch {batch:>3}: step {1e3 * step:.1f} ms, record of {row['n_matrices']} matrices "
            f"{1e3 * one:.1f} ms: {100 * row['share']:.1f} % of {_EVERY} steps, whole run "
            f"{100 * row['share_of_run']:+.1f} % ({kinds})",
            flush=True,
        )
    return {"case": "track-share", "rows": rows, "machine": result["machine"]}


#: Networks of `track_record`.
_NETWORKS: Final = (
    "MLP 512",
    "LSTM 128",
    "CNN",
    "ViT 128",
    "ViT 192",
    "GPT-2 192",
    "Linear 1024",
    "Linear 4096",
)
_QUICK_NETWORKS: Final = ("ViT 16", "Linear 64")


def track_record(options: Options) -> dict[str, Any]:
    """Time a record of `dlnfast.torch.track`, k = 8 of weights and changes, and LAPACK on the same ones."""
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for name in _QUICK_NETWORKS if options.quick else _NETWORKS:
        if missing := [x for x in _needed(name) if importlib.util.find_spec(x) is None]:
            print(f"{name:<12} skipped, {missing[0]} is not installed: pip install {missing[0]}")
            continue
        arguments = {"name": name, "repeats": options.repeats}
        result = record.in_process("networks:record_cost", arguments)
        rows.append(row := {"what": name} | result["row"])
        seconds = {key: record.format_seconds(times["median"]) for key, times in row["seconds"].items()}
        print(
            f"{name:<12} {row['n_matrices']:>3} matrices: record {seconds['record']}, torch.linalg.svdvals "
            f"of weights and changes {seconds['svdvals']} (ratio {row['ratio']:.2f}); bounds: median "
            f"{row['median_bound']:.1e}, largest {row['largest_bound']:.1e} of the largest value, "
            f"{row['n_outside']} of {row['n_values']} values outside",
            flush=True,
        )
    return {"case": "track-record", "rows": rows, "machine": result.get("machine", {})}


def _needed(name: str) -> tuple[str, ...]:
    return ("torch", "transformers") if name.startswith("GPT-2") else ("torch",)


def _build(name: str) -> tuple[Any, Callable[[], Any]]:
    """Return a network, and a function that computes its loss on new random data."""
    import torch
    from torch import nn

    from ..torch import models

    generator = torch.Generator().manual_seed(0)
    kind, _, width = name.partition(" ")
    size = int(width or 0)

    def classify(model: Any, *shape: int) -> Callable[[], Any]:
        def loss() -> Any:
            inputs = torch.randn(32, *shape, generator=generator)
            labels = torch.randint(10, (32,), generator=generator)
            return nn.functional.cross_entropy(model(inputs), labels)

        return loss

    if kind == "ViT":
        model: Any = models.ViT(dim=size, depth=6 if size > 16 else 1, n_heads=size // 16, patch_size=8)
        return model, classify(model, 3, 32, 32)
    if kind == "CNN":
        model = models.VGG(name="vgg11", width=0.5)
        return model, classify(model, 3, 32, 32)
    if kind == "MLP":
        model = models.MLP(widths=[784, size, size, size, 10])
        return model, classify(model, 784)
    if kind == "Linear":
        model = nn.Linear(size, size)
        return model, lambda: (model(torch.randn(32, size, generator=generator)) ** 2).mean()
    if kind == "LSTM":
        model = nn.LSTM(size, size, num_layers=3)
        return model, lambda: (model(torch.randn(10, 32, size, generator=generator))[0] ** 2).mean()
    import transformers

    config = transformers.GPT2Config(vocab_size=500, n_positions=64, n_embd=size, n_layer=4, n_head=4)
    model = transformers.GPT2LMHeadModel(config)

    def predict() -> Any:
        tokens = torch.randint(500, (4, 32), generator=generator)
        return model(tokens, labels=tokens).loss

    return model, predict


def _train(optimizer: Any, compute_loss: Callable[[], Any]) -> None:
    """Take the steps between two records."""
    for _ in range(_EVERY):
        optimizer.zero_grad()
        compute_loss().backward()
        optimizer.step()


def record_cost(name: str, repeats: int) -> dict[str, Any]:
    """Train a network, and after every ten steps time a record and LAPACK, in turns.

    Parameters
    ----------
    name : str
        One of the networks.
    repeats : int
        Number of records.

    Returns
    -------
    dict
        ``row`` with the seconds of a record and of ``torch.linalg.svdvals`` of the same weights and changes,
        the bounds relative to the largest values, and the number of values of the last record that differ
        from LAPACK in float64 by more than their bound; the ``machine``.
    """
    import torch

    from ..torch.track import track

    torch.manual_seed(0)
    model, compute_loss = _build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tracker = track(model, k=_N_VALUES, every=10**9, optimizer=optimizer)
    start = [matrix.matrix().detach().clone() for matrix in tracker.matrices]

    def changes() -> list[Any]:
        return [m.matrix().detach() - w for m, w in zip(tracker.matrices, start, strict=True)]

    def decompose() -> None:
        for matrix, change in zip(tracker.matrices, changes(), strict=True):
            torch.linalg.svdvals(matrix.matrix().detach())
            torch.linalg.svdvals(change)

    jobs: dict[str, Callable[[], object]] = {"record": tracker.record, "svdvals": decompose}
    times: dict[str, list[float]] = {key: [] for key in jobs}
    for turn in range(repeats + 1):
        _train(optimizer, compute_loss)
        for key, job in jobs.items():
            time.sleep(record.PAUSE)  # the threads of the last one still spin
            spent = record.elapsed(job)
            if turn > 0:  # the first one is a warm-up
                times[key].append(spent)
    bounds: list[float] = []
    n_outside = 0
    for of in ("weights", "change"):
        run = tracker.trajectory(of)
        last = changes() if of == "change" else [m.matrix().detach() for m in tracker.matrices]
        for layer, matrix in enumerate(last, start=1):
            sigma = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
            values, errors = run.singular_values(layer)[-1], run.singular_value_errors(layer)[-1]
            bounds += (errors / sigma[0]).tolist()
            n_outside += int(np.sum(np.abs(values - sigma[: len(values)]) > errors))
    seconds = {key: record.summarise_times(spent) for key, spent in times.items()}
    row = {
        "n_matrices": len(tracker.matrices),
        "k": _N_VALUES,
        "seconds": seconds,
        "ratio": seconds["record"]["median"] / seconds["svdvals"]["median"],
        "median_bound": float(np.median(bounds)),
        "largest_bound": float(np.max(bounds)),
        "n_outside": n_outside,
        "n_values": len(bounds),
    }
    return {"row": row, "machine": record.machine()}


def tracked_training(kind: str, settings: Mapping[str, Any], batch: int, repeats: int) -> dict[str, Any]:
    """Train a model on random images, ten steps without a record and ten with one in turns.

    Parameters
    ----------
    kind : str
        Class in `dlnfast.torch`.
    settings : mapping
        Keywords of the model.
    batch, repeats : int
        Images of a batch, and rounds.

    Returns
    -------
    dict
        ``row`` with the seconds of ten steps, of a record, its share of the former, and the completeness of
        its bounds; the ``machine``.
    """
    import torch

    from ..torch import models
    from ..torch.track import track

    model = getattr(models, kind)(**settings)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # Its own records are never due, so that both kinds of turns run the same hook.
    tracker = track(model, k=_N_VALUES, every=10**9, optimizer=optimizer)

    def train() -> None:
        _train(optimizer, lambda: torch.nn.functional.cross_entropy(model(images), labels))

    inside: list[float] = []

    def tracked() -> None:
        train()
        before = tracker.seconds
        tracker.record()
        inside.append(tracker.seconds - before)

    tracked()  # warm-up
    inside.clear()
    timed = record.time_interleaved(repeats, plain=train, tracked=tracked)
    plain, spent = timed["plain"]["median"], record.summarise_times(inside)
    promises: Counter[str] = Counter()
    for of in ("weights", "change"):
        run = tracker.trajectory(of)
        for layer in range(1, run.n_layers + 1):
            promises.update(str(promise) for promise in run.tracking(layer)["completeness"][-repeats:])
    row = {
        "n_matrices": len(tracker.matrices),
        "n_weights": sum(rows * columns for rows, columns in (m.shape for m in tracker.matrices)),
        "k": _N_VALUES,
        "every": _EVERY,
        "seconds": timed,
        "record_seconds": spent,
        "share": spent["median"] / plain,
        "share_of_run": timed["tracked"]["median"] / plain - 1,
        "completeness": dict(promises),
    }
    return {"row": row, "machine": record.machine()}
