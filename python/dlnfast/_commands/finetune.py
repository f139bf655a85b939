# SPDX-License-Identifier: MIT
"""``dlnfast finetune``: Deep LoRA beside other adapters on a pretrained transformer."""

from __future__ import annotations

import argparse

from .._config import finetuning
from .._config.runs import write_json
from .._support.environment import environment
from .._support.files import write_text_whole
from .common import add_specification, complain, make_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description and the arguments of the command."""
    parser.description = (
        "Train a grid of methods, ranks, numbers of examples, seeds and etas. Writes\n"
        "results.jsonl, a line for every finished run, and table.md. Runs in results.jsonl are skipped:\n"
        "the same command resumes an interrupted grid. Needs transformers, and peft for\n"
        "methods other than Deep LoRA."
    )
    parser.epilog = finetuning.describe_settings()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_specification(parser)
    parser.add_argument(
        "--table", action="store_true", help="print the table of the finished runs, without training"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command, and return its exit status."""
    grid = finetuning.read_grid(arguments.spec, arguments.changes)
    folder = make_folder(arguments, grid.sections["output"]["directory"])
    results = finetuning.Results(folder / "results.jsonl")
    if not arguments.table and results.missing(grid):
        from ..torch.finetune import run_grid

        run_grid(grid, results, progress=True, report=print)
    rows = finetuning.summarise(results.of(grid))
    if not rows:
        return complain(f"{results.path} holds no run of this grid", 1)
    text = finetuning.table(rows)
    write_text_whole(folder / "table.md", text + "\n")
    write_json(
        folder / "summary.json",
        {
            "spec": grid.sections,
            "rows": [row.to_dict() for row in rows],
            "paired": finetuning.compare_methods(rows),
            "environment": environment(),
        },
    )
    print(text)
    print(f"written:  {results.path}, {folder / 'table.md'}, {folder / 'summary.json'}")
    return 0
