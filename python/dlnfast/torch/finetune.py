# SPDX-License-Identifier: MIT
"""Fine-tuning of pretrained transformers on text tasks, for comparisons of Deep LoRA with other adapters.

A `Run` holds the settings of one training; `FineTuning` holds the pretrained model and the tokenised task,
and trains runs. Needs transformers, and peft for all methods except Deep LoRA.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .._config.finetuning import Grid, Outcome, Results, Run, split_halves
from .._datasets.text import TextTask, load_task
from .._support.arrays import check_count
from .._support.errors import DivergedError
from .._support.locks import FolderLock
from .._support.optional import import_optional
from .._support.progress import ProgressBar
from ._factor_rates import FactorRates, make_groups
from .deep_lora import DeepLoRA
from .layers import LayerChoice, weight_matrices
from .updates import adapter_updates, compute_thin_svd

__all__ = ["FineTuning", "Outcome", "Run", "find_model", "run_grid"]

#: Number of samples in a batch of predictions.
_EVALUATION_BATCH: Final = 64
#: Numerator of the factor alpha / sqrt(r) of rsLoRA; PEFT's default alpha.
_RSLORA_ALPHA: Final = 8


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
        Name of the pretrained model, as for `find_model`. It is loaded for sequence classification, with one
        output for tasks with scores, and one per class otherwise.
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
        transformers = import_optional("transformers", "fine-tuning", "transformers")
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

    def fresh_model(
        self, seed: int, *, dropout: bool = False, attention: str | None = None
    ) -> tuple[nn.Module, list[str]]:
        """Return the pretrained model with a head drawn from the seed, and the names of its parameters.

        Parameters
        ----------
        seed : int
            Seed of the head.
        dropout : bool
            Whether the model keeps its own dropout.
        attention : str, optional
            Implementation of attention, as in transformers. Default: that of transformers.
        """
        transformers = import_optional("transformers", "fine-tuning", "transformers")
        classes = self.train.classes
        with torch.random.fork_rng(devices=[]), _silence_logging(transformers):
            torch.manual_seed(seed)
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                self._path,
                num_labels=1 if classes is None else len(classes),
                problem_type="regression" if classes is None else "single_label_classification",
                output_loading_info=True,
                **({} if dropout else self._no_dropout),
                **({} if attention is None else {"attn_implementation": attention}),
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
            each step. The adapter is None for methods of PEFT.
        progress : bool
            Show a progress bar on a terminal, after the first second.

        Raises
        ------
        DivergedError
            If a loss is not finite.
        """
        start = time.perf_counter()
        low = run.precision == "bfloat16"
        # On a CPU the fused attention of short sequences is slow: its backward pass in bfloat16 takes 40 % of
        # a step with 16 sentence pairs.
        attention = "eager" if low and self._device.type == "cpu" else None
        model, head = self.fresh_model(run.seed, dropout=run.dropout, attention=attention)
        if self.train.classes is None:
            mean = float(self.train.targets[self.examples(run)].mean())
            for name, parameter in model.named_parameters():
                if name in head and parameter.ndim == 1:
                    nn.init.constant_(parameter, mean)
        names = [m.name for m in weight_matrices(model, self._layers or _select_encoder_layers(head))]
        model, groups, adapter = self._add_adapter(run, model, names)
        starts = {} if adapter is not None else _copy_starts(model)
        trained = [p for name, p in model.named_parameters() if _is_head_parameter(name, head)]
        if run.train_head:
            for parameter in trained:
                parameter.requires_grad_(True)
            groups += make_groups(_rates_of(run).rates_of_tensors(trained), {})
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=run.epsilon, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1.0 - (1.0 - run.final_rate) * min(step / run.steps, 1.0)
        )
        if after_step is not None:
            after_step(0, model, adapter)
        losses: list[float] = []
        if low:
            _store_frozen_weights(model, names, torch.bfloat16)
        model.train(run.dropout)  # nothing but dropout depends on the mode
        with ProgressBar(run.steps, progress) as bar, self._seed_dropout(run):
            for step, batch in enumerate(self.batches(run), 1):
                optimizer.zero_grad(set_to_none=True)
                with self._autocast(run.precision):
                    loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    text = f"the loss is {losses[-1]} at step {step}: lower eta, now "
                    raise DivergedError(text + f"{run.eta:g}", step=step, layer=0)
                if bar.listener is not None:
                    bar.listener(step, losses[-1])
                if after_step is not None:
                    after_step(step, model, adapter)
        model.eval()
        updates = _compute_update_values(model, adapter, starts)
        return Outcome(
            scores={name: self.score(model, name, precision=run.precision) for name in self.parts},
            loss=losses,
            n_parameters=sum(p.numel() for group in groups for p in group["params"]),
            ranks=_count_ranks(updates),
            update_norm=float(np.sqrt(sum(np.sum(values**2) for values in updates.values()))),
            seconds=time.perf_counter() - start,
        )

    def score(self, model: nn.Module, part: str, *, precision: str = "float32") -> float:
        """Return the metric of the task on one of the parts, with the forward pass in that precision."""
        task = self.parts[part]
        tokens = self._tokens[part]
        order = sorted(range(len(task)), key=lambda i: len(tokens[i]["input_ids"]))
        outputs = []
        with torch.no_grad(), self._autocast(precision):
            for start in range(0, len(order), _EVALUATION_BATCH):
                batch = self._batch(part, order[start : start + _EVALUATION_BATCH])
                del batch["labels"]
                outputs.append(model(**batch).logits.float().cpu())
        logits = torch.cat(outputs).numpy()
        found = logits[:, 0] if task.classes is None else logits.argmax(axis=1)
        predictions = np.empty(len(task), dtype=found.dtype)
        predictions[order] = found
        return task.score(predictions)

    def _autocast(self, precision: str) -> AbstractContextManager[Any]:
        low = precision == "bfloat16"
        return torch.autocast(self._device.type, torch.bfloat16) if low else nullcontext()

    @contextmanager
    def _seed_dropout(self, run: Run) -> Iterator[None]:
        """Draw dropout from the run's seed, and leave the generators of the caller as they were."""
        cuda = self._device.type == "cuda"
        with torch.random.fork_rng(devices=[self._device] if cuda else []):
            torch.manual_seed(run.seed)
            yield

    def _add_adapter(
        self, run: Run, model: nn.Module, names: list[str]
    ) -> tuple[nn.Module, list[dict[str, Any]], DeepLoRA | None]:
        if run.method != "deep-lora":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(run.seed)
                wrapped = self._wrap_by_peft(run, model, names)
            factors = [p for name, p in wrapped.named_parameters() if ".lora_" in name]
            return wrapped, make_groups(_rates_of(run).rates_of_tensors(factors), {}), None
        settings: dict[str, Any] = {name: getattr(run, name) for name in ("depth", "scale", "init", "seed")}
        if run.init != "full":
            settings["rank"] = run.rank
        if run.init == "gradient":
            settings["batches"] = next(self.batches(run))
        adapter = DeepLoRA(model, names, **settings)
        groups = adapter.param_groups(run.eta, outer=run.outer, match_updates=run.match_updates)
        return model, groups, adapter

    def _wrap_by_peft(self, run: Run, model: nn.Module, names: list[str]) -> nn.Module:
        """Return the model with an adapter of PEFT."""
        peft = import_optional("peft", f"method {run.method!r}", "peft")
        settings: dict[str, Any] = {"r": run.rank, "lora_alpha": run.rank}
        if run.method == "rslora":
            settings |= {"lora_alpha": _RSLORA_ALPHA, "use_rslora": True}
        elif run.method == "eva":
            settings |= {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=1.0)}
        elif run.method == "lora-ga":
            _check_gradient_rank(run.rank, model, names)
            settings |= {"init_lora_weights": "lora_ga", "lora_ga_config": peft.LoraGAConfig()}
        config = peft.LoraConfig(**settings, lora_dropout=0.0, target_modules=names, bias="none")
        if run.method == "lora-ga":
            loraga = import_optional("peft.tuners.lora.loraga", "method 'lora-ga'", "peft")
            batch = next(self.batches(run))
            with warnings.catch_warnings():
                # The first adapted layer has inputs without gradients, which PEFT's hooks do not need.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                loraga.preprocess_loraga(model, config, lambda: model(**batch).loss.backward())
        states = self._find_eva_states(run, model, config) if run.method == "eva" else None
        wrapped: nn.Module = peft.get_peft_model(model, config)
        if states is not None:
            with warnings.catch_warnings():
                # Layers with too few inputs keep the random start of LoRA.
                warnings.filterwarnings("ignore", message=".*were initialized with init_lora_weights=True")
                peft.initialize_lora_eva_weights(wrapped, eva_state_dict=states)
        return wrapped

    def _find_eva_states(self, run: Run, model: nn.Module, config: Any) -> dict[str, torch.Tensor]:
        """Return the start of A by EVA, from the run's examples, for layers with enough inputs.

        PEFT repeats the examples until the singular vectors of all layers stay the same. They never do if a
        layer has fewer inputs than the rank, such as a pooler, which has one for each example.
        """
        peft = import_optional("peft", "method 'eva'", "peft")
        batch = self._batch("", self.examples(run).tolist())
        del batch["labels"]
        chosen = [
            name
            for name, count in _count_inputs(model, sorted(config.target_modules), batch).items()
            if count >= 2 * run.rank
        ]
        if not chosen:
            raise ValueError(
                f"rank is {run.rank}; wanted at most half of the number of tokens of all examples for 'eva'"
            )
        found = peft.get_eva_state_dict(
            model,
            [batch],
            peft_config=peft.LoraConfig(r=run.rank, target_modules=chosen, eva_config=config.eva_config),
            prepare_layer_inputs_fn=_select_tokens,
            show_progress_bar=False,
        )
        return {f"base_model.model.{name}": start for name, start in found.items()}

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


def _store_frozen_weights(model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> None:
    """Store the frozen weights of the adapted linear layers in a precision, in which autocast reads them.

    The values in a forward pass are those that autocast would compute from the weights at each step.
    """
    weights = set(names)
    for name, module in model.named_modules():
        plain = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        if plain in weights and isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(dtype)


def _is_head_parameter(name: str, head: Sequence[str]) -> bool:
    """Return whether a parameter belongs to the head, also in a wrapped model."""
    return any(name == key or name.endswith("." + key) for key in head)


def _select_encoder_layers(head: Sequence[str]) -> Callable[[str, nn.Module], bool]:
    def choose(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and f"{name}.weight" not in head

    return choose


def _rates_of(run: Run) -> FactorRates:
    return FactorRates(run.eta, match_updates=run.match_updates)


def _check_gradient_rank(rank: int, model: nn.Module, names: Sequence[str]) -> None:
    """Refuse ranks for which LoRA-GA has too few singular vectors: it takes 2 r."""
    for name in names:
        narrow = min(model.get_parameter(f"{name}.weight").shape)
        if 2 * rank > narrow:
            raise ValueError(
                f"rank is {rank}; wanted at most {narrow // 2} for 'lora-ga', half of the smaller side of "
                f"layer {name!r}"
            )


def _count_inputs(
    model: nn.Module, names: Sequence[str], batch: Mapping[str, torch.Tensor]
) -> dict[str, int]:
    """Return the number of input vectors of each layer, without padding."""
    counts: dict[str, int] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: counts.update(
                {name: int(batch["attention_mask"].sum()) if args[0].ndim == 3 else len(args[0])}
            )
        )
        for name in names
    ]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def _select_tokens(inputs: Any, tokens: torch.Tensor, name: str) -> torch.Tensor:
    """Return the inputs of a layer as rows, without padding, for EVA; `tokens` are indices of the others."""
    del name
    rows: torch.Tensor = inputs if isinstance(inputs, torch.Tensor) else inputs[0]
    return rows[tokens.T.unbind()] if rows.ndim == 3 else rows.contiguous()


def _copy_starts(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return copies of the factors of PEFT's adapters, whose product LoRA-GA takes out of the weights."""
    pairs = ((update.name, update.pair()) for update in adapter_updates(model))
    return {name: (left.clone(), right.clone()) for name, (left, right) in pairs}


def _compute_update_values(
    model: nn.Module,
    adapter: DeepLoRA | None,
    starts: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, npt.NDArray[np.float64]]:
    """Return the singular values of every layer's update since the start."""
    if adapter is not None:
        return {update.name: update.singular_values() for update in adapter.updates()}
    values = {}
    for update in adapter_updates(model):
        (left, right), (left_start, right_start) = update.pair(), starts[update.name]
        factors = torch.cat([left, -left_start], dim=1), torch.cat([right, right_start])
        values[update.name] = compute_thin_svd(*factors)[1].cpu().numpy()
    return values


def _count_ranks(updates: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, int]:
    largest = max((float(values[0]) for values in updates.values() if len(values)), default=0.0)
    if largest == 0.0:
        return dict.fromkeys(updates, 0)
    return {name: int(np.sum(values > 0.01 * largest)) for name, values in updates.items()}


def prepare(grid: Grid) -> FineTuning:
    """Load the model and the task of a grid, with the development split in two halves."""
    model, task = grid.sections["model"], grid.sections["task"]
    train, dev = (load_task(task["name"], task["path"], split) for split in ("train", "dev"))
    return FineTuning(
        model["path"],
        train,
        split_halves(dev, task["evaluated"]),
        layers=model["layers"],
        max_length=model["max_length"],
        device=model["device"],
    )


def run_grid(
    grid: Grid, results: Results, *, progress: bool = False, report: Callable[[str], None] | None = None
) -> None:
    """Train the missing runs of a grid.

    Parameters
    ----------
    grid : Grid
    results : Results
        Destination of the outcomes; runs in it are skipped.
    progress : bool
        A bar over the runs on a terminal.
    report : callable, optional
        Is called with a line of text for every finished run.

    Raises
    ------
    ModuleNotFoundError
        Where transformers, or peft for its methods, is missing.
    FolderInUseError
        If another process trains a grid with results in the same folder.
    """
    from tqdm import tqdm

    if not results.missing(grid):
        return
    with FolderLock(results.path.absolute().parent):
        results.read()  # another owner may have added runs
        todo = results.missing(grid)
        tuning = prepare(grid)
        for run in tqdm(todo, unit="run", disable=None if progress else True, leave=False):
            try:
                outcome = tuning.run(run)
            except DivergedError as error:
                results.append_diverged(grid, run, error)
                text = str(error)
            else:
                results.append(grid, run, outcome)
                scores = ", ".join(f"{name} {value:.4f}" for name, value in outcome.scores.items())
                text = f"{scores}; loss {outcome.loss[-1]:.3g}; {outcome.seconds:.0f} s"
            if report is not None:
                report(
                    f"{run.method}, r = {run.rank}, {run.n_examples} examples, seed {run.seed}, eta "
                    f"{run.eta:g}: {text}"
                )
