# SPDX-License-Identifier: MIT
"""``dlnfast spectra``: singular values of the matrices in checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

from .._support.text import format_count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description and the arguments of the command."""
    parser.description = (
        "Compute the leading singular values of all matrices in checkpoints, with error bounds, and of\n"
        "their changes. Reads safetensors files, files of torch.save, sharded files by their index,\n"
        "folders of these, ordered by the steps in their names, and LoRA adapters of PEFT. No model is\n"
        "built. Prints a table, or writes report.html, spectra.json and spectra.csv. Needs torch."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help="file or folder")
    parser.add_argument(
        "--base", metavar="PATH", help="checkpoint for changes, or under adapters (default: the first one)"
    )
    parser.add_argument(
        "--layers", metavar="GLOB", nargs="+", help="names of matrices, without .weight (default: all)"
    )
    parser.add_argument(
        "--k", type=int, default=16, metavar="N", help="values of each matrix in the files (default: 16)"
    )
    parser.add_argument(
        "--of",
        nargs="+",
        choices=("weights", "change", "step"),
        help="weights, their change from the base, or from the previous checkpoint (default: all three)",
    )
    parser.add_argument("--steps", type=int, nargs="+", metavar="N", help="step of each checkpoint")
    parser.add_argument("--key", help="key of the state dict in files with several")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write files instead of the table")


def run(arguments: argparse.Namespace) -> int:
    """Run the command, and return its exit status."""
    from ..torch.checkpoints import checkpoint_spectra

    found = checkpoint_spectra(
        arguments.checkpoints,
        base=arguments.base,
        layers=arguments.layers,
        k=arguments.k,
        steps=arguments.steps,
        of=arguments.of,
        key=arguments.key,
    )
    if arguments.out is None:
        print(found.table())
    counts = format_count(len(found.layers), "matrix", "matrices")
    counts += f" in {format_count(len(found.steps), 'checkpoint', 'checkpoints')}"
    print(f"spectra:  {counts} in {found.seconds:.3g} s")
    if arguments.out is not None:
        print(f"written:  {', '.join(map(str, found.save(arguments.out)))}")
    return 0
