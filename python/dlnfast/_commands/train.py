# SPDX-License-Identifier: MIT
"""``dlnfast train``: one run of a specification."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from .._config import runs, spec
from .._config.runs import write_json
from .._support.errors import DivergedError
from .._training.train import train
from .._trajectory.trajectory import Trajectory
from .common import INTERRUPTED, add_specification, make_folder, print_run

_DIVERGED: Final = "diverged"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description and the arguments of the command."""
    parser.description = (
        "Train a network as specified in a TOML file. Writes run.npz, which dlnfast.load reads in\n"
        "Python, and summary.json. A run that did not finish writes diverged.npz and diverged.json,\n"
        "or interrupted.npz and interrupted.json."
    )
    parser.epilog = spec.describe_settings()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_specification(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="folder of a checkpointed run; the same command, or dlnfast resume, resumes it",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command, and return its exit status."""
    chosen = spec.read_spec(arguments.spec, arguments.changes)
    folder = make_folder(arguments, chosen.output["directory"])
    prepared = runs.prepare(chosen)
    problem, seconds = prepared.problem, prepared.seconds
    summary: dict[str, Any] = {"spec": chosen.to_dict(), "problem": problem.describe(), "seconds": seconds}
    print(f"problem:  {problem!r}, {_white_text(problem)}; made in {seconds['problem']:.2f} s")
    try:
        options = spec.train_options(chosen)
        options = replace(options, record=replace(options.record, progress=True))
        run = train(problem, prepared.weights, checkpoint=arguments.checkpoint, **options.keywords())
    except (DivergedError, KeyboardInterrupt) as error:
        partial = getattr(error, "trajectory", None)
        if partial is not None:
            # Under another name, so that a run that was completed before stays.
            name = _DIVERGED if isinstance(error, DivergedError) else INTERRUPTED
            said = summary | {"error": str(error) or INTERRUPTED}
            print(f"written:  {_write_run(folder, partial, chosen, said, name)}")
        raise
    accuracies = runs.accuracies(prepared, run)
    if accuracies:
        summary["accuracy"] = accuracies
    written = _write_run(folder, run, chosen, summary)
    print_run(run)
    for split, found in accuracies.items():
        label = f"accuracy ({split}):"
        print(f"{label:<18}{found['network']:.4f} (least squares {found['least squares']:.4f})")
    print(f"written:  {written}")
    return 0


def _white_text(problem: Any) -> str:
    white = problem.whitening
    if white is None or white.method is None:
        return f"N = {problem.n_samples}"
    return f"N = {problem.n_samples}, {white.method} to {white.error:.1e}, rank {white.rank}"


def _write_run(
    folder: Path, run: Trajectory, chosen: spec.Spec, summary: Mapping[str, Any], ending: str | None = None
) -> str:
    """Write the run and its summary; return their paths. `ending` names the files of an unfinished run."""
    paths = [folder / f"{ending or 'run'}.npz", folder / f"{ending or 'summary'}.json"]
    run.save(paths[0], weights=chosen.output["weights"])
    write_json(paths[1], {**summary, **runs.summarise(run)})
    return f"{paths[0]}, {paths[1]}"
