# SPDX-License-Identifier: MIT
"""Cases of `dlnfast.torch`: the cost of tracking relative to training."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

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
        for _ in range(_EVERY):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            optimizer.step()

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
