# SPDX-License-Identifier: MIT
"""Fine-tuning of pretrained transformers on text tasks, for comparisons of LoRA and Deep LoRA.

A `Run` holds the settings of one training; `FineTuning` holds the pretrained model and the tokenised task,
and trains runs. Needs transformers, and peft for LoRA.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .._arrays import check_choice, check_count, check_scale
from .._errors import DivergedError
from .._optional import imported
from ..finetuning import METHODS
from ..progress import ProgressBar
from ..tasks import TextTask
from .deep_lora import DeepLoRA
from .deep_lora.layers import INITS
from .layers import LayerChoice, weight_matrices
from .updates import adapter_updates

__all__ = ["FineTuning", "Outcome", "Run", "find_model"]

#: Number of samples in a batch of predictions.
_EVALUATION_BATCH: Final = 64


@dataclass(frozen=True)
class Run:
    """Settings of one training.

    Attributes
    ----------
    method : {"lora", "deep-lora"}
        Method of adaptation. "lora" is that of PEFT with alpha = r: Deep LoRA has no factor alpha / r either.
    rank : int
        Rank r of the adapters; ignored by Deep LoRA with ``init="full"``.
    n_examples : int
        Number of training samples, drawn without replacement. Runs with the same seed share the samples,
        their order and the new head.
    seed : int
        Seed of samples, their order, the head and the adapters.
    learning_rate : float
        Learning rate of AdamW at the start; it falls linearly to ``final_rate * learning_rate``.
    steps, batch_size : int
        Number of steps, and of samples in each.
    final_rate : float
        Factor of the learning rate at the end.
    epsilon : float
        Epsilon of AdamW. The first gradients of Deep LoRA's cores are ``scale^(L - 1)`` times those of the
        weight; if that is far below epsilon, the cores start to move late.
    depth, scale, init, outer
        Depth L, scale eps, initialisation and factor gamma of Deep LoRA.
    train_head : bool
        Whether the new head is trained as well.
    """

    method: str
    rank: int
    n_examples: int
    seed: int
    learning_rate: float
    steps: int
    batch_size: int = 16
    final_rate: float = 0.1
    epsilon: float = 1e-8
    depth: int = 3
    scale: float = 1e-3
    init: str = "gradient"
    outer: float = 1e-2
    train_head: bool = True

    def __post_init__(self) -> None:
        """Check the settings here, where error messages can name them."""
        check_choice(self.method, "method", METHODS)
        for name in ("rank", "n_examples", "steps", "batch_size"):
            check_count(getattr(self, name), name)
        check_count(self.seed, "seed", minimum=0)
        check_count(self.depth, "depth", minimum=2, maximum=5)
        check_choice(self.init, "init", INITS)
        for name in ("learning_rate", "final_rate", "epsilon", "scale", "outer"):
            check_scale(getattr(self, name), name)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dict; settings of Deep LoRA are left out for LoRA."""
        values = asdict(self)
        if self.method == "lora":
            for name in ("depth", "scale", "init", "outer"):
                del values[name]
        return values


@dataclass(frozen=True)
class Outcome:
    """Results of a run.

    Attributes
    ----------
    scores : dict of str to float
        Metric of the task on each evaluated part of the data.
    loss : list of float
        Training loss at every step, on the batch of that step.
    n_parameters : int
        Number of trained parameters, including the head.
    ranks : dict of str to int
        Rank of each layer's update: the number of singular values above 1 % of the largest of all layers.
    seconds : float
        Time of training and evaluation.
    """

    scores: dict[str, float]
    loss: list[float]
    n_parameters: int
    ranks: dict[str, int]
    seconds: float


def find_model(name: str) -> str:
    """Return the folder of a pretrained model, or the name itself for transformers to look up.

    Parameters
    ----------
    name : str
        A folder with ``config.json``, or an installed package with such a folder ``model``. Transformers
        looks up any other name in its cache, and on its hub unless ``HF_HUB_OFFLINE`` is set.
    """
    if (Path(name) / "config.json").is_file():
        return name
    module = name.replace("-", "_")
    if module.isidentifier() and importlib.util.find_spec(module) is not None:
        inside = importlib.resources.files(module) / "model"
        if (inside / "config.json").is_file():
            return str(inside)
    return name


class FineTuning:
    """Fine-tuning of one pretrained model on one task, with the settings of different runs.

    Parameters
    ----------
    model : str
        Name of the pretrained model, as for `find_model`. It is loaded for sequence classification without
        dropout, with one output for tasks with scores, and one per class otherwise.
    train : TextTask
        Training data, from which each run draws its examples.
    parts : mapping of str to TextTask
        Test data by name, evaluated after every training.
    layers : LayerChoice
        Layers that get adapters; None: all linear ones except the new head.
    max_length : int
        Maximal number of tokens of a sample.
    device : device
        Device of the training.

    Notes
    -----
    The head is not in the checkpoint: it is drawn from the seed of a run, and trained with the adapters. For
    tasks with scores its bias starts at the mean of the examples; otherwise the first gradient would mostly
    point to that mean. All runs start from the same pretrained weights, which are frozen.
    """

    def __init__(
        self,
        model: str,
        train: TextTask,
        parts: Mapping[str, TextTask],
        *,
        layers: LayerChoice = None,
        max_length: int = 128,
        device: torch.device | str = "cpu",
    ) -> None:
        if "" in parts:
            raise ValueError("parts has an empty name")
        transformers = imported("transformers", "fine-tuning", "transformers")
        self._path = find_model(model)
        self._no_dropout = dict.fromkeys(_find_dropout_settings(transformers, self._path), 0.0)
        self._device = torch.device(device)
        self._layers = layers
        self.train, self.parts = train, dict(parts)
        length = check_count(max_length, "max_length", minimum=2)
        tokenizer = transformers.AutoTokenizer.from_pretrained(self._path)
        self._padding = int(tokenizer.pad_token_id or 0)
        self._tokens = {
            name: _tokenise(tokenizer, task, length) for name, task in {"": train, **self.parts}.items()
        }

    def fresh_model(self, seed: int) -> tuple[nn.Module, list[str]]:
        """Return the pretrained model with a head drawn from the seed, and the names of its parameters."""
        transformers = imported("transformers", "fine-tuning", "transformers")
        classes = self.train.classes
        with torch.random.fork_rng(devices=[]), _silence_logging(transformers):
            torch.manual_seed(seed)
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                self._path,
                num_labels=1 if classes is None else len(classes),
                problem_type="regression" if classes is None else "single_label_classification",
                output_loading_info=True,
                **self._no_dropout,
            )
        model = model.to(self._device)
        return model, sorted(info["missing_keys"])

    def batches(self, run: Run) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the batches of a run: passes over its examples, each in a new order."""
        rows = self.examples(run)
        size = min(run.batch_size, len(rows))
        generator = np.random.default_rng([run.seed, 1])
        order: list[int] = []
        for _ in range(run.steps):
            while len(order) < size:
                order += generator.permutation(rows).tolist()
            yield self._batch("", order[:size])
            order = order[size:]

    def examples(self, run: Run) -> npt.NDArray[np.int64]:
        """Return the indices of a run's training samples: the first ones of a permutation of its seed."""
        if run.n_examples > len(self.train):
            raise ValueError(
                f"n_examples is {run.n_examples}; wanted at most the {len(self.train)} there are"
            )
        chosen: npt.NDArray[np.int64] = np.random.default_rng(run.seed).permutation(len(self.train))
        return chosen[: run.n_examples]

    def run(
        self,
        run: Run,
        *,
        after_step: Callable[[int, nn.Module, DeepLoRA | None], None] | None = None,
        progress: bool = False,
    ) -> Outcome:
        """Train a model with the settings of a run, and evaluate it on all parts.

        Parameters
        ----------
        run : Run
            Settings of the training.
        after_step : callable, optional
            Function ``after_step(step, model, adapter)``, called before the first step with step 0, and after
            each step. The adapter is None for "lora".
        progress : bool
            Show a progress bar on a terminal, after the first second.

        Raises
        ------
        DivergedError
            If a loss is not finite.
        """
        start = time.perf_counter()
        model, head = self.fresh_model(run.seed)
        if self.train.classes is None:
            mean = float(self.train.targets[self.examples(run)].mean())
            for name, parameter in model.named_parameters():
                if name in head and parameter.ndim == 1:
                    nn.init.constant_(parameter, mean)
        names = [m.name for m in weight_matrices(model, self._layers or _select_encoder_layers(head))]
        model, groups, adapter = self._add_adapter(run, model, names)
        trained = [p for name, p in model.named_parameters() if _is_head_parameter(name, head)]
        if run.train_head:
            for parameter in trained:
                parameter.requires_grad_(True)
            groups.append({"params": trained, "lr": run.learning_rate})
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=run.epsilon, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1.0 - (1.0 - run.final_rate) * min(step / run.steps, 1.0)
        )
        if after_step is not None:
            after_step(0, model, adapter)
        losses: list[float] = []
        model.eval()  # dropout is off, and nothing else depends on the mode
        with ProgressBar(run.steps, progress) as bar:
            for step, batch in enumerate(self.batches(run), 1):
                optimizer.zero_grad(set_to_none=True)
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    text = f"the loss is {losses[-1]} at step {step}: lower learning_rate, now "
                    raise DivergedError(text + f"{run.learning_rate:g}", step=step, layer=0)
                if bar.listener is not None:
                    bar.listener(step, losses[-1])
                if after_step is not None:
                    after_step(step, model, adapter)
        updates = _compute_update_values(model, adapter)
        return Outcome(
            scores={name: self.score(model, name) for name in self.parts},
            loss=losses,
            n_parameters=sum(p.numel() for group in groups for p in group["params"]),
            ranks=_count_ranks(updates),
            seconds=time.perf_counter() - start,
        )

    def score(self, model: nn.Module, part: str) -> float:
        """Return the metric of the task on one of the parts."""
        task = self.parts[part]
        tokens = self._tokens[part]
        order = sorted(range(len(task)), key=lambda i: len(tokens[i]["input_ids"]))
        outputs = []
        with torch.no_grad():
            for start in range(0, len(order), _EVALUATION_BATCH):
                batch = self._batch(part, order[start : start + _EVALUATION_BATCH])
                del batch["labels"]
                outputs.append(model(**batch).logits.cpu())
        logits = torch.cat(outputs).numpy()
        found = logits[:, 0] if task.classes is None else logits.argmax(axis=1)
        predictions = np.empty(len(task), dtype=found.dtype)
        predictions[order] = found
        return task.score(predictions)

    def _add_adapter(
        self, run: Run, model: nn.Module, names: list[str]
    ) -> tuple[nn.Module, list[dict[str, Any]], DeepLoRA | None]:
        if run.method == "lora":
            peft = imported("peft", "method 'lora'", "peft")
            config = peft.LoraConfig(
                r=run.rank, lora_alpha=run.rank, lora_dropout=0.0, target_modules=names, bias="none"
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(run.seed)
                wrapped = peft.get_peft_model(model, config)
            factors = [p for name, p in wrapped.named_parameters() if ".lora_" in name]
            return wrapped, [{"params": factors, "lr": run.learning_rate}], None
        settings: dict[str, Any] = {name: getattr(run, name) for name in ("depth", "scale", "init", "seed")}
        if run.init != "full":
            settings["rank"] = run.rank
        if run.init == "gradient":
            settings["batches"] = next(self.batches(run))
        adapter = DeepLoRA(model, names, **settings)
        return model, adapter.param_groups(run.learning_rate, outer=run.outer), adapter

    def _batch(self, part: str, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return a batch of samples with their targets, padded to the longest sample."""
        task = self.parts[part] if part else self.train
        tokens = [self._tokens[part][i] for i in rows]
        longest = max(len(t["input_ids"]) for t in tokens)
        batch = {}
        for key in tokens[0]:
            padding = self._padding if key == "input_ids" else 0
            padded = [t[key] + [padding] * (longest - len(t[key])) for t in tokens]
            batch[key] = torch.tensor(padded, device=self._device)
        targets = task.targets[np.asarray(rows)]
        kind = torch.float32 if task.classes is None else torch.int64
        batch["labels"] = torch.tensor(targets, dtype=kind, device=self._device)
        return batch


@contextmanager
def _silence_logging(transformers: Any) -> Iterator[None]:
    """Silence the warning that the checkpoint has no head, which is expected here."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _find_dropout_settings(transformers: Any, path: str) -> list[str]:
    """Return the names of a model's settings that are dropout probabilities."""
    config = transformers.AutoConfig.from_pretrained(path)
    return [
        name
        for name, value in config.to_dict().items()
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop"))
    ]


def _tokenise(tokenizer: Any, task: TextTask, max_length: int) -> list[dict[str, list[int]]]:
    texts = [list(task.first)] + ([] if task.second is None else [list(task.second)])
    found = tokenizer(*texts, truncation=True, max_length=max_length)
    return [{key: list(values[i]) for key, values in found.items()} for i in range(len(task))]


def _is_head_parameter(name: str, head: Sequence[str]) -> bool:
    """Return whether a parameter belongs to the head, also in a wrapped model."""
    return any(name == key or name.endswith("." + key) for key in head)


def _select_encoder_layers(head: Sequence[str]) -> Callable[[str, nn.Module], bool]:
    def choose(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and f"{name}.weight" not in head

    return choose


def _compute_update_values(model: nn.Module, adapter: DeepLoRA | None) -> dict[str, npt.NDArray[np.float64]]:
    """Return the singular values of every layer's update."""
    updates = adapter_updates(model) if adapter is None else adapter.updates()
    return {update.name: update.singular_values() for update in updates}


def _count_ranks(updates: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, int]:
    largest = max((float(values[0]) for values in updates.values() if len(values)), default=0.0)
    if largest == 0.0:
        return dict.fromkeys(updates, 0)
    return {name: int(np.sum(values > 0.01 * largest)) for name, values in updates.items()}
