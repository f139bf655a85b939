# SPDX-License-Identifier: MIT
"""LoRA and Deep LoRA over the rank on a task with a known update: one rate for all ranks.

The target network differs from the pretrained one by an update of low rank in one layer. Each method takes
its rate at one rank, on networks of other seeds, and keeps it for all ranks. The setting is ours. Needs
PyTorch, and peft for LoRA.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .._support.arrays import check_count
from .._support.optional import import_optional
from ..plots import COLOURS, LineDisplay
from . import Result, setting
from ._captions import set_title
from ._claims import Claim, as_numbers, compare_pairs

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

#: Method -> label. Rates of the last three are learning rates, those of the others norms eta of a step.
LABELS: Final = {
    "deep-lora": "Deep LoRA, eta",
    "deep-lora-gradient": 'Deep LoRA, eta, "gradient"',
    "lora-eta": "LoRA, eta",
    "lora": "LoRA, one learning rate",
    "rslora": "rsLoRA, one learning rate",
    "deep-lora-raw": "Deep LoRA, defaults of 0.1.0",
}
#: Layer of the network that the teacher changed.
_ADAPTED: Final = "2"
#: Alpha of rsLoRA; PEFT's default.
_RSLORA_ALPHA: Final = 8
#: Seed of the first network on which rates are compared.
_VALIDATION_SEED: Final = 1000
#: Claims: largest ratio of the errors of two ranks, and least ratio of the errors of LoRA and Deep LoRA.
_FLAT: Final = 2.0
_BELOW: Final = 5.0

QUICK: Final = {
    "methods": ("deep-lora", "lora"),
    "ranks": (4, 32),
    "seeds": 2,
    "rate_seeds": 1,
    "etas": (0.1, 0.3),
    "learning_rates": (3e-3, 1e-2),
}


@dataclass(frozen=True)
class Settings:
    """A network with two hidden layers of ReLU units; AdamW with full batches, rates falling linearly.

    Errors are mean squared differences from the target network on new inputs, relative to those of the
    pretrained network: 1 is no adaptation. Training labels have noise, in units of the standard deviation of
    the difference between the two networks.
    """

    methods: tuple[str, ...] = setting(tuple(LABELS), "curves", choices=tuple(LABELS))
    ranks: tuple[int, ...] = setting((4, 8, 16, 32, 64), "r of the adapters")
    rate_rank: int = setting(8, "rank at which the rate of each method is chosen")
    width: int = setting(64, "inputs, and units of each hidden layer")
    teacher_rank: int = setting(2, "rank of the teacher's update")
    samples: int = setting(512, "training samples with a scalar label")
    noise: float = setting(0.1, "standard deviation of the noise of the labels")
    test_samples: int = setting(4096, "new inputs for the errors")
    steps: int = setting(600, "steps of AdamW")
    final_rate: float = setting(0.1, "share of the first rate at the end, as in dlnfast finetune")
    seeds: int = setting(12, "networks, teachers and samples")
    rate_seeds: int = setting(4, "other networks for the choice of the rate")
    etas: tuple[float, ...] = setting((0.03, 0.1, 0.3, 1.0), "norms of a step to choose from")
    learning_rates: tuple[float, ...] = setting((1e-3, 3e-3, 1e-2, 3e-2), "of LoRA and rsLoRA to choose from")
    raw_rates: tuple[float, ...] = setting((1e-2, 3e-2, 1e-1, 3e-1), "of the old defaults to choose from")


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Choose the rate of each method, train all ranks at it, and compare errors and norms."""
    for name in ("width", "samples", "test_samples", "steps", "seeds", "rate_seeds"):
        check_count(getattr(settings, name), name)
    check_count(settings.teacher_rank, "teacher_rank", maximum=settings.width)
    if not 0 <= settings.final_rate <= 1:
        raise ValueError(f"final_rate is {settings.final_rate:g}; wanted a number from 0 to 1")
    named = {f"ranks[{i}]": rank for i, rank in enumerate(settings.ranks)}
    for name, rank in {"rate_rank": settings.rate_rank, **named}.items():
        check_count(rank, name, minimum=2, maximum=settings.width)
    methods = _train(settings, progress)
    displays = {
        "error": _plot(settings, methods, "errors", "relative test error (1: no adaptation)"),
        "norm": _plot(settings, methods, "norms", "norm of the update / that of the teacher"),
    }
    claims = _check_claims(settings, methods)
    numbers = {
        "methods": methods,
        "claims": as_numbers(claims),
        "panels": {name: display.numbers() for name, display in displays.items()},
    }
    return Result({**displays, "claims": claims}, numbers, [*_table(settings, methods), *map(str, claims)])


def _train(settings: Settings, progress: bool) -> dict[str, dict[str, Any]]:
    """Return, for each method, its rates with their errors, the chosen one, and errors and norms by rank."""
    from tqdm import tqdm

    rates = {method: _list_rates(settings, method) for method in settings.methods}
    n_runs = sum(map(len, rates.values())) * settings.rate_seeds
    n_runs += len(rates) * len(settings.ranks) * settings.seeds
    found = {}
    with tqdm(total=n_runs, unit="network", disable=None if progress else True, leave=False) as bar:

        def errors_and_norms(method: str, rank: int, rate: float, seeds: range) -> tuple[Any, Any]:
            pairs = []
            for seed in seeds:
                pairs.append(_adapt(settings, method, rank, rate, seed))
                bar.update()
            errors, norms = zip(*pairs, strict=True)
            return list(errors), list(norms)

        for method, candidates in rates.items():
            others = range(_VALIDATION_SEED, _VALIDATION_SEED + settings.rate_seeds)
            compared = [
                float(np.mean(errors_and_norms(method, settings.rate_rank, rate, others)[0]))
                for rate in candidates
            ]
            best = candidates[int(np.nanargmin(compared))]
            results = [errors_and_norms(method, rank, best, range(settings.seeds)) for rank in settings.ranks]
            found[method] = {
                "rates": list(candidates),
                "rate_errors": compared,
                "rate": best,
                "ranks": list(settings.ranks),
                "errors": [errors for errors, _ in results],
                "norms": [norms for _, norms in results],
            }
    return found


def _list_rates(settings: Settings, method: str) -> tuple[float, ...]:
    if method == "deep-lora-raw":
        return settings.raw_rates
    return settings.learning_rates if method in ("lora", "rslora") else settings.etas


@dataclass(frozen=True, eq=False)
class _Task:
    """A pretrained network, training samples of the target network, and test samples without noise.

    Attributes
    ----------
    scale : float
        Mean squared difference between the two networks on the test inputs.
    norm : float
        Frobenius norm of the teacher's update.
    """

    model: torch.nn.Sequential
    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    scale: float
    norm: float


def _make_task(settings: Settings, seed: int) -> _Task:
    """Return a network with weights of He's variance, and a teacher that changes its second layer.

    The teacher's update ``sqrt(2) U V^T`` has orthonormal U and V of few columns. Its singular values are
    half as large as the largest one of the weight, which is about ``2 sqrt(2)``.
    """
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed)
    d, k = settings.width, settings.teacher_rank

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator)

    left, right = (torch.linalg.qr(draw(d, k))[0] for _ in range(2))
    update = math.sqrt(2.0) * left @ right.T

    def layer(weight: torch.Tensor) -> nn.Linear:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight
        return linear

    first, second = (math.sqrt(2.0 / d) * draw(d, d) for _ in range(2))
    head = draw(1, d) / math.sqrt(d)
    model, teacher = (
        nn.Sequential(layer(first), nn.ReLU(), layer(weight), nn.ReLU(), layer(head))
        for weight in (second, second + update)
    )
    inputs, test_inputs = draw(settings.samples, d), draw(settings.test_samples, d)
    with torch.no_grad():
        targets = teacher(test_inputs)
        difference = targets - model(test_inputs)
        labels = teacher(inputs) + settings.noise * difference.std() * draw(settings.samples, 1)
    return _Task(
        model,
        (inputs, labels),
        (test_inputs, targets),
        float(difference.square().mean()),
        float(update.norm()),
    )


def _mean_squared(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = (model(batch[0]) - batch[1]).square().mean()
    return loss


def _adapt(settings: Settings, method: str, rank: int, rate: float, seed: int) -> tuple[float, float]:
    """Train an adapter; return the relative test error and norm of its update, infinite after divergence."""
    import torch

    task = _make_task(settings, seed)
    start = task.model.get_parameter(f"{_ADAPTED}.weight").detach().clone()
    model, groups = _add_adapter(method, task, rank, rate, seed)
    optimizer = torch.optim.AdamW(groups, eps=1e-8, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, settings.final_rate, settings.steps)
    for _ in range(settings.steps):
        optimizer.zero_grad()
        loss = _mean_squared(model, task.train)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        error = float(_mean_squared(model, task.test)) / task.scale
        layer = model.get_submodule(_ADAPTED)
        # The layer's outputs for the unit vectors are the columns of its weight with the update.
        norm = float((layer(torch.eye(settings.width)).T - start).norm()) / task.norm
    return (error, norm) if math.isfinite(error) else (math.inf, math.inf)


def _add_adapter(
    method: str, task: _Task, rank: int, rate: float, seed: int
) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """Add an adapter to the layer that the teacher changed; return the model and groups with their rates."""
    import torch

    from ..torch import DeepLoRA
    from ..torch._factor_rates import FactorRates, make_groups

    if method.startswith("deep-lora"):
        settings: dict[str, Any] = {"init": "random"}
        if method != "deep-lora":
            settings = {"init": "gradient", "batches": task.train, "loss": _mean_squared}
        if method == "deep-lora-raw":
            settings["scale"] = 1e-3
        adapter = DeepLoRA(task.model, _ADAPTED, rank=rank, seed=seed, **settings)
        if method == "deep-lora-raw":
            return task.model, adapter.param_groups(rate, outer=0.01, match_updates=False)
        return task.model, adapter.param_groups(rate)
    peft = import_optional("peft", f"method {method!r}", "peft")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=_RSLORA_ALPHA if method == "rslora" else rank,
        use_rslora=method == "rslora",
        target_modules=[_ADAPTED],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(task.model, config)
    factors = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    rule = FactorRates(rate, match_updates=method == "lora-eta")
    return task.model, make_groups(rule.rates_of_tensors(factors), {})


def _plot(settings: Settings, methods: Mapping[str, Any], name: str, y_label: str) -> LineDisplay:
    values = {LABELS[method]: np.array(found[name]) for method, found in methods.items()}
    return LineDisplay(
        settings.ranks,
        {label: _finite(each.mean(axis=1)) for label, each in values.items()},
        spread={
            label: _finite(each.std(axis=1, ddof=1) / math.sqrt(each.shape[1]))
            for label, each in values.items()
            if each.shape[1] > 1
        },
        x_label="rank r of the adapter",
        y_label=y_label,
        log_y=True,
    )


def _finite(values: Any) -> Any:
    """Return values with NaN, a gap of a curve, for those of runs that diverged."""
    return np.where(np.isfinite(values), values, np.nan)


def _check_claims(settings: Settings, methods: Mapping[str, Any]) -> list[Claim]:
    means = {method: np.mean(found["errors"], axis=1) for method, found in methods.items()}
    claims = []
    if "deep-lora" in means:
        deep = means["deep-lora"]
        ratio = float(deep.max() / deep.min())
        text = ", ".join(f"{value:.4f}" for value in deep)
        claims.append(
            Claim(
                f"with one eta, errors of Deep LoRA at all ranks are within a factor of {_FLAT:g}",
                ratio <= _FLAT,
                f"{text}; factor {ratio:.2f}",
            )
        )
    index = settings.ranks.index(32) if 32 in settings.ranks else len(settings.ranks) - 1
    for method in ("lora", "lora-eta", "rslora"):
        if "deep-lora" in means and method in means:
            text = f"at r = {settings.ranks[index]} Deep LoRA is at least {_BELOW:g} times below "
            text += LABELS[method]
            other, own = (np.asarray(methods[name]["errors"][index]) for name in (method, "deep-lora"))
            measured = f"{own.mean():.4f} and {other.mean():.4f}, factor {other.mean() / own.mean():.1f}"
            excess = other - _BELOW * own
            if len(excess) < 2 or not np.isfinite(excess).all():
                claims.append(Claim(text, bool(excess.mean() > 0), measured))
                continue
            claim = compare_pairs(text, excess, digits=4)
            measured += f"; error minus {_BELOW:g} times that of Deep LoRA: {claim.measured}"
            claims.append(dataclasses.replace(claim, measured=measured))
    return claims


def _table(settings: Settings, methods: Mapping[str, Any]) -> list[str]:
    width = max(len(LABELS[method]) for method in methods)
    lines = [f"{'relative test error':<{width}}  rate    " + "".join(f"{r:>9}" for r in settings.ranks)]
    for method, found in methods.items():
        means = np.mean(found["errors"], axis=1)
        values = "".join(f"{value:>9.3g}" for value in means)
        lines.append(f"{LABELS[method]:<{width}}  {found['rate']:<8g}{values}")
    return lines


def draw(settings: Settings, result: Result) -> Figure:
    """Draw errors and norms of the updates over the rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.0, 6.0), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, name in zip(axes, ("error", "norm"), strict=True):
        display = result.displays[name]
        display.plot(ax, marker="o", colors=COLOURS, legend=name == "error")
        ax.set_xscale("log", base=2)
        ax.set_xticks(display.x, [f"{value:g}" for value in display.x])
    axes[0].axhline(1.0, color="#999999", linewidth=0.8, linestyle=":")
    axes[1].axhline(1.0, color="#999999", linewidth=0.8, linestyle=":")
    set_title(figure, f"Adapters of all ranks learn a known update of rank {settings.teacher_rank}")
    return figure


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    del result
    return (
        f"{settings.samples} noisy labels, {settings.steps} steps; rates chosen at r = {settings.rate_rank}; "
        f"mean and standard error of {settings.seeds} seeds"
    )
