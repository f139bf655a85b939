# SPDX-License-Identifier: MIT
"""Train the runs of a fine-tuning grid that its results do not hold yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .._datasets.text import load_task
from .._support.errors import DivergedError
from .._support.locks import FolderLock
from .finetuning import Grid, Results, halves

if TYPE_CHECKING:
    from ..torch.finetune import FineTuning


def prepare(grid: Grid) -> FineTuning:
    """Load the model and the task of a grid, with the development split in two halves."""
    from ..torch.finetune import FineTuning  # PyTorch and transformers are optional

    model, task = grid.sections["model"], grid.sections["task"]
    train, dev = (load_task(task["name"], task["path"], split) for split in ("train", "dev"))
    return FineTuning(
        model["path"],
        train,
        halves(dev, task["evaluated"]),
        layers=model["layers"],
        max_length=model["max_length"],
        device=model["device"],
    )


def run_grid(
    grid: Grid, results: Results, *, progress: bool = False, report: Callable[[str], None] | None = None
) -> None:
    """Train what is not done yet.

    Parameters
    ----------
    grid : Grid
    results : Results
        Where outcomes go; runs that it holds are skipped.
    progress : bool
        A bar over the runs on a terminal.
    report : callable, optional
        Gets a line for every run that ends.

    Raises
    ------
    ModuleNotFoundError
        Where transformers, or peft for LoRA, is missing.
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
                    f"{run.method}, r = {run.rank}, {run.n_examples} examples, seed {run.seed}, rate "
                    f"{run.learning_rate:g}: {text}"
                )
