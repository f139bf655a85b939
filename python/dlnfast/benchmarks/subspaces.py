# SPDX-License-Identifier: MIT
"""Case of `dlnfast.torch.subspace_report`: five kinds of networks, on true and on shuffled labels."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from . import record
from .options import Options

#: Networks, by name: those of which one or two layers are reported.
_NETWORKS: Final = ("MLP", "CNN", "LSTM", "ViT", "GPT-2")
_N_CLASSES: Final = 10
_BATCH: Final = 64
_PER_CLASS, _QUICK_PER_CLASS = 500, 10
_EPOCHS, _QUICK_EPOCHS = 8, 1
_N_SEEDS: Final = 3


def subspace_report(options: Options) -> dict[str, Any]:
    """Report on the subspaces of five networks for Fashion-MNIST, on true and on shuffled labels."""
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for name in _NETWORKS[:1] if options.quick else _NETWORKS:
        if missing := [x for x in _needed(name) if importlib.util.find_spec(x) is None]:
            print(f"{name:<6} skipped, {missing[0]} is not installed: pip install {missing[0]}")
            continue
        for seed in range(1 if options.quick else _N_SEEDS):
            arguments = {"name": name, "seed": seed, "quick": options.quick}
            result = record.in_process("subspaces:report", arguments)
            rows += result["rows"]
            for row in result["rows"]:
                head = f"{name:<6} seed {seed}, {row['labels']:<8} score {row['score']:.3f}"
                print(f"{head}: {row['verdict']}", flush=True)
    return {"case": "subspace-report", "rows": rows, "machine": result.get("machine", {})}


def _needed(name: str) -> tuple[str, ...]:
    return ("torch", "transformers") if name == "GPT-2" else ("torch",)


def report(name: str, seed: int, quick: bool) -> dict[str, Any]:
    """Train one network on true and on shuffled labels, and report on both; return rows."""
    import torch
    from torch.nn import functional as F

    from .._datasets.images import load_fashion_mnist
    from ..torch.subspace_report import subspace_report as make_report

    per_class = _QUICK_PER_CLASS if quick else _PER_CLASS
    train, test = (load_fashion_mnist(split=split, per_class=per_class) for split in ("train", "test"))
    inputs, held_out = (
        torch.from_numpy(np.asarray(x[0], dtype=np.float32)).flatten(1) for x in (train, test)
    )
    labels, held_out_labels = (torch.from_numpy(np.asarray(x[1])).long() for x in (train, test))
    centre, spread = inputs.mean(), inputs.std()
    inputs, held_out = (inputs - centre) / spread, (held_out - centre) / spread
    generator = torch.Generator().manual_seed(seed)
    false = labels[torch.randperm(len(labels), generator=generator)]
    torch.manual_seed(seed)
    first = _build(name)

    def trained(targets: Any) -> Any:
        model = copy.deepcopy(first)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        order = torch.Generator().manual_seed(seed)
        for _ in range(_QUICK_EPOCHS if quick else _EPOCHS):
            for rows in torch.split(torch.randperm(len(inputs), generator=order), _BATCH):
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(model(inputs[rows]), targets[rows]))
                optimizer.step()
        return model.eval()

    def accuracy(x: Any, y: Any) -> Callable[[Any], torch.Tensor]:
        def evaluate(model: Any) -> torch.Tensor:
            with torch.no_grad():
                found = torch.cat([model(part).argmax(1) for part in x.split(500)])
            correct: torch.Tensor = found == y
            return correct

        return evaluate

    start = time.perf_counter()
    models = {"true": trained(labels), "shuffled": trained(false)}
    seconds = time.perf_counter() - start
    scores = {"true": accuracy(held_out, held_out_labels), "shuffled": accuracy(inputs, false)}
    rows = []
    for kind, model in models.items():
        other = models["shuffled"] if kind == "true" else None
        found = make_report(
            model,
            first,
            rank=_N_CLASSES,
            layers=_LAYERS[name],
            evaluate=scores[kind],
            shuffled=other,
        )
        rows += [
            {"what": name, "seed": seed, "labels": kind, "score": found.score, "seconds": seconds} | row
            for row in found.table()
        ]
    return {"rows": rows, "machine": record.machine()}


#: Layers that are reported: inner ones, wide beside 2K.
_LAYERS: Final[dict[str, list[str]]] = {
    "MLP": ["layers.1.linear", "layers.2.linear"],
    "CNN": ["3", "6"],
    "LSTM": ["lstm.weight_hh_l0"],
    "ViT": ["body.blocks.1.attention.q", "body.blocks.1.mlp.up"],
    "GPT-2": ["body.h.1.attn.c_proj", "body.h.1.mlp.c_fc"],
}


def _build(name: str) -> Any:
    """Return a network for flat images of 28 x 28 pixels."""
    import torch
    from torch import nn

    from ..torch import models

    if name == "MLP":
        return models.MLP([784, 256, 256, 256, _N_CLASSES], batch_norm=False)
    if name == "CNN":
        return nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128 * 49, 128),
            nn.ReLU(),
            nn.Linear(128, _N_CLASSES),
        )
    if name == "ViT":

        class Images(nn.Module):
            """A vision transformer for flat images."""

            def __init__(self) -> None:
                super().__init__()
                self.body = models.ViT(
                    dim=96,
                    depth=3,
                    n_heads=4,
                    patch_size=7,
                    image_size=28,
                    in_channels=1,
                    n_classes=_N_CLASSES,
                )

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                found: torch.Tensor = self.body(x.reshape(-1, 1, 28, 28))
                return found

        return Images()
    if name == "LSTM":

        class Rows(nn.Module):
            """Reads an image row by row."""

            def __init__(self) -> None:
                super().__init__()
                self.lstm = nn.LSTM(28, 128, batch_first=True)
                self.head = nn.Linear(128, _N_CLASSES)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                found: torch.Tensor = self.head(self.lstm(x.reshape(-1, 28, 28))[0][:, -1])
                return found

        return Rows()
    from transformers import GPT2Config, GPT2Model

    class Tokens(nn.Module):
        """Reads an image as 16 patches of 7 x 7 pixels."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(49, 96)
            self.body = GPT2Model(
                GPT2Config(
                    n_embd=96,
                    n_layer=3,
                    n_head=4,
                    n_positions=16,
                    vocab_size=1,
                    bos_token_id=0,
                    eos_token_id=0,
                    resid_pdrop=0,
                    embd_pdrop=0,
                    attn_pdrop=0,
                )
            )
            self.head = nn.Linear(96, _N_CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            patches = x.reshape(-1, 4, 7, 4, 7).transpose(2, 3).reshape(-1, 16, 49)
            hidden = self.body(inputs_embeds=self.embed(patches)).last_hidden_state
            found: torch.Tensor = self.head(hidden[:, -1])
            return found

    return Tokens()
