# SPDX-License-Identifier: MIT
"""The command line: ``dlnfast figure``, ``train``, ``resume``, ``export``, ``sweep`` and others."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import platform
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from . import figures
from ._config import finetuning, runs, spec
from ._config.runs import PACKAGES, environment, version, write_json
from ._config.sweep import SweepGrid, sweep
from ._support.arrays import check_count
from ._support.errors import DivergedError, FolderInUseError
from ._support.files import naming_damage, placing, write_text_whole
from ._support.threads import build_info
from ._training.train import resume, train
from ._trajectory.export import export
from ._trajectory.trajectory import Trajectory
from ._version import __version__
from .benchmarks import cases, record, tables
from .benchmarks.peers import PEERS

__all__ = ["main"]

_DEFAULT_FOLDER: Final = "out"
_INTERRUPTED: Final = "interrupted"
_DIVERGED: Final = "diverged"
#: Keeps the names of settings apart from the command line's own.
_SETTING: Final = "setting "
_OPTIONAL: Final = ("torch", "threadpoolctl", "pyarrow", "pillow", "xarray", "zarr", "h5netcdf", "h5py")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0; 1 for a run that diverged, or failed in a sweep, and where the output cannot be written, to a full disk
    for example; 2 for a wrong request, 130 after Ctrl-C, 143 after SIGTERM. A reader of the output that goes
    away, as ``head`` does, changes nothing: the command does what it was asked to.
    """
    output, errors = _SteadyStream(sys.stdout), _SteadyStream(sys.stderr)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            status = _run(argv)
        finally:
            output.finish()
        if output.error is not None and not isinstance(output.error, BrokenPipeError):
            status = _complain(f"the output could not be written: {output.error}", status or 1)
        errors.finish()
    return status


class _SteadyStream:
    """A stream of text that goes on where it cannot be written: results matter more than text about them.

    Parameters
    ----------
    stream : TextIO or None
        None, as Python has it where the descriptor was closed, takes no text.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        """Return what else the stream has."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text as far as that can be done; characters that the encoding lacks are escaped."""
        if self._stream is not None and self.error is None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except OSError as error:
                self.error = error
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        if self._stream is not None and self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self.error = error

    def finish(self) -> None:
        """Write what is buffered; where that failed, let Python's end find a place for it."""
        self.flush()
        if self.error is not None:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if argv is None and arguments.timed:
        record.restart_without_caps("dlnfast")
    try:
        return int(arguments.run(arguments))
    except DivergedError as error:
        return _complain(str(error), 1)
    except FileNotFoundError as error:
        return _complain(f"{error.filename}: no such file" if error.filename else str(error), 2)
    except (ValueError, TypeError, OSError, ImportError, FolderInUseError) as error:
        return _complain(str(error), 2)
    except KeyboardInterrupt:
        return _complain(_INTERRUPTED, 130)


def _complain(text: str, status: int) -> int:
    print("dlnfast: " + " ".join(text.split()), file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dlnfast", description="Exact gradient descent on deep linear networks, from data to figure."
    )
    parser.add_argument("--version", action="version", version=f"dlnfast {__version__}")
    parser.set_defaults(timed=False, run=lambda _: _complain_of_no_command(parser))
    commands = parser.add_subparsers(metavar="COMMAND")
    for add in (
        _add_figures,
        _add_train,
        _add_resume,
        _add_export,
        _add_sweep,
        _add_finetune,
        _add_bench,
        _add_info,
    ):
        add(commands)
    return parser


def _complain_of_no_command(parser: argparse.ArgumentParser) -> int:
    parser.print_help(sys.stderr)
    return 2


def _add_figures(commands: Any) -> None:
    parser = commands.add_parser(
        "figure",
        help="compute and draw a published figure",
        epilog="dlnfast figure NAME --help lists the settings of a figure.",
    )
    parser.add_argument("--list", action="store_true", help="name all figures and exit")
    parser.set_defaults(run=_list_figures)
    names = parser.add_subparsers(metavar="NAME", parser_class=_FigureParser)
    for name, summary in figures.FIGURES.items():
        _add_figure(names, name, summary)


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train as a TOML file says",
        description="Train as a TOML file says. Writes run.npz and summary.json, or, where the run ended\n"
        "early, diverged.npz and diverged.json, or interrupted.npz and interrupted.json.",
        epilog=spec.describe_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_specification(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="keep the run there while it goes on; the same command, or dlnfast resume, goes on with it",
    )
    parser.set_defaults(run=_train)


def _add_resume(commands: Any) -> None:
    parser = commands.add_parser(
        "resume",
        help="go on with a run that was kept in a folder",
        description="Go on with a run that train(.., checkpoint=DIR) or dlnfast train --checkpoint DIR has\n"
        "written to a folder, to its end. dlnfast.load(DIR) reads it, also while it goes on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.set_defaults(run=_resume)


def _add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a run as named arrays for other programs: zarr or HDF5",
        description="Write what a run has recorded, also while it goes on, as a zarr group of format 3 or\n"
        "as HDF5 that xarray and netCDF 4 read. Memory does not grow with the length of a run in a folder.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", metavar="RUN", type=Path, help="run.npz, or the folder of train --checkpoint"
    )
    parser.add_argument("path", metavar="OUT", type=Path, help="ends in .zarr, .h5, .hdf5 or .nc")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="every N-th record only, and the last"
    )
    parser.add_argument(
        "--variables", nargs="+", metavar="NAME", help="which variables (default: all that the run has)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.set_defaults(run=_export)


def _add_sweep(commands: Any) -> None:
    parser = commands.add_parser(
        "sweep",
        help="train a grid of specifications on all cores, as a TOML file says",
        description="Train all runs of a grid. SPEC.toml is that of dlnfast train with a section [sweep] of\n"
        '"section.key" = [values], whose product is the grid, or an array of tables [[sweep]] with the\n'
        "changes of one run each. Writes a folder for every run, named by what it runs, with spec.json and\n"
        "summary.json, and results.csv in the end. Runs that are finished are skipped: start it again to go\n"
        "on, after Ctrl-C or worse.",
        epilog=spec.describe_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_specification(parser)
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--keep-runs", action="store_true", help="write run.npz for every run too")
    parser.add_argument("--retry-failed", action="store_true", help="run again what failed or diverged")
    parser.add_argument("--table", action="store_true", help="print a table of all runs")
    parser.set_defaults(run=_sweep)


def _add_finetune(commands: Any) -> None:
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a pretrained transformer by LoRA and Deep LoRA, as a TOML file says",
        description="Train a grid of methods, ranks, numbers of examples, seeds and learning rates. Writes\n"
        "results.jsonl, a line for every run that ends, and table.md. Runs that results.jsonl holds are\n"
        "skipped: start it again to go on. Needs transformers, and peft for LoRA.",
        epilog=finetuning.describe_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_specification(parser)
    parser.add_argument(
        "--table", action="store_true", help="train nothing, print the table of what is there"
    )
    parser.set_defaults(run=_finetune)


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="time dlnfast beside NumPy, PyTorch and JAX",
        description="Time dlnfast beside NumPy and, where they are installed, PyTorch and JAX, in turns.\n"
        "All are checked to compute the same losses before they are timed.",
        epilog="\n".join(["cases:", *_case_lines()]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--case",
        dest="cases",
        choices=list(cases.CASES),
        metavar="CASE",
        nargs="+",
        action="extend",
        help=f"what to measure, from the list below (default: {' '.join(cases.DEFAULT)})",
    )
    parser.add_argument(
        "--peers",
        choices=list(PEERS),
        metavar="PEER",
        nargs="+",
        default=list(PEERS),
        help=f"who takes part: {', '.join(PEERS)} (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that everything runs")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds of turns (default: 5, quick 2)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="where to write results, machine and versions"
    )
    parser.add_argument("--read", type=Path, metavar="FILE.json", help="measure nothing, take such a file")
    parser.add_argument("--table", action="store_true", help="print Markdown tables of the results too")
    parser.set_defaults(run=_bench, timed=True)


def _add_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="print version, build, threads and packages")
    parser.set_defaults(run=_info)


# --------------------------------------------------------------------------------------------------
# dlnfast figure
# --------------------------------------------------------------------------------------------------


class _FigureParser(argparse.ArgumentParser):
    """A parser for the settings of one figure, which imports the figure's module when it parses."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Add the settings as options, then parse."""
        name = self.get_default("name")
        if self.get_default("timed") is None:  # not yet filled
            _add_figure_settings(self, name)
        return super().parse_known_args(args, namespace)


def _add_figure(names: Any, name: str, summary: str) -> None:
    parser = names.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path(_DEFAULT_FOLDER), help="where to write"
    )
    parser.set_defaults(run=_figure, name=name)


def _add_figure_settings(parser: argparse.ArgumentParser, name: str) -> None:
    module = figures.load(name)
    duration = figures.quick_takes(module)
    quick = (
        f"a smaller setting, {duration}" if figures.quick_settings(module) else "the same: it is quick anyway"
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    for option in figures.options(module.Settings):
        default = " ".join(map(str, option.default)) if option.many else option.default
        if default == "":
            default = "none"
        parser.add_argument(
            "--" + option.name.replace("_", "-"),
            dest=_SETTING + option.name,
            type=option.kind,
            nargs="+" if option.many else None,
            default=argparse.SUPPRESS,  # a setting that is not given may be quick
            choices=option.choices,
            metavar=None if option.choices else option.kind.__name__.upper(),
            help=f"{option.help} (default: {default})",
        )
    parser.set_defaults(timed=figures.is_timed(module))


def _list_figures(arguments: argparse.Namespace) -> int:
    if not arguments.list:
        return _complain("figure needs a NAME; dlnfast figure --list names them", 2)
    width = max(map(len, figures.FIGURES))
    for name, summary in figures.FIGURES.items():
        print(f"{name:<{width}}  {summary}")
    return 0


def _figure(arguments: argparse.Namespace) -> int:
    if arguments.list:
        print(f"dlnfast: --list only names the figures; {arguments.name} is not drawn", file=sys.stderr)
        return _list_figures(arguments)
    start = time.perf_counter()
    module = figures.load(arguments.name)
    prefix = _SETTING
    given = {key.removeprefix(prefix): v for key, v in vars(arguments).items() if key.startswith(prefix)}
    quick = figures.quick_settings(module) if getattr(arguments, "quick", False) else {}
    changed = {key: value for key, value in quick.items() if key not in given}
    settings = figures.make_settings(module.Settings, {**changed, **given})
    result = module.compute(settings, progress=True)
    computed = time.perf_counter()
    picture = module.draw(settings, result)
    if changed:
        figures.mark_quick(picture, changed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    image, notes = (arguments.out / f"{arguments.name}{ending}" for ending in (".png", ".json"))
    with placing(image) as temporary:
        picture.savefig(temporary, dpi=150, facecolor="white", format="png")
    write_json(
        notes,
        {
            "figure": arguments.name,
            "quick": bool(changed),
            "settings": dataclasses.asdict(settings),
            "numbers": result.numbers,
            "seconds": {"computing": computed - start, "all": time.perf_counter() - start},
            "environment": environment(),
        },
    )
    print("\n".join([*result.highlights, f"written: {image}, {notes}"]))
    return 0


# --------------------------------------------------------------------------------------------------
# What follows a TOML file
# --------------------------------------------------------------------------------------------------


def _add_specification(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="SPEC.toml", type=Path)
    parser.add_argument(
        "--set",
        dest="changes",
        metavar="SECTION.KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change entries of the file",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"where to write (default: {_DEFAULT_FOLDER}/<name of SPEC>)"
    )


def _folder(arguments: argparse.Namespace, directory: str | None) -> Path:
    """Return the folder to write in, made where there is none."""
    folder = Path(arguments.out or directory or f"{_DEFAULT_FOLDER}/{arguments.spec.stem}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# --------------------------------------------------------------------------------------------------
# dlnfast train
# --------------------------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace) -> int:
    chosen = spec.read_spec(arguments.spec, arguments.changes)
    folder = _folder(arguments, chosen.output["directory"])
    prepared = runs.prepare(chosen)
    problem, seconds = prepared.problem, prepared.seconds
    summary: dict[str, Any] = {"spec": chosen.to_dict(), "problem": problem.describe(), "seconds": seconds}
    print(f"problem:  {problem!r}, {_white_text(problem)}; made in {seconds['problem']:.2f} s")
    try:
        options = spec.train_options(chosen)
        options = dataclasses.replace(options, record=dataclasses.replace(options.record, progress=True))
        run = train(problem, prepared.weights, checkpoint=arguments.checkpoint, **options.keywords())
    except (DivergedError, KeyboardInterrupt) as error:
        partial = getattr(error, "trajectory", None)
        if partial is not None:
            # Under another name, so that a run that was completed before stays.
            name = _DIVERGED if isinstance(error, DivergedError) else _INTERRUPTED
            said = summary | {"error": str(error) or _INTERRUPTED}
            print(f"written:  {_write_run(folder, partial, chosen, said, name)}")
        raise
    accuracies = runs.accuracies(prepared, run)
    if accuracies:
        summary["accuracy"] = accuracies
    written = _write_run(folder, run, chosen, summary)
    _print_run(run)
    for split, found in accuracies.items():
        label = f"accuracy ({split}):"
        print(f"{label:<18}{found['network']:.4f} (least squares {found['least squares']:.4f})")
    print(f"written:  {written}")
    return 0


def _resume(arguments: argparse.Namespace) -> int:
    run = resume(arguments.directory, progress=True)
    _print_run(run)
    print(f"kept in:  {arguments.directory}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    export(
        arguments.source,
        arguments.path,
        every=arguments.every,
        variables=arguments.variables,
        overwrite=arguments.overwrite,
    )
    print(f"written:  {arguments.path}")
    return 0


def _white_text(problem: Any) -> str:
    white = problem.whitening
    if white is None or white.method is None:
        return f"N = {problem.n_samples}"
    return f"N = {problem.n_samples}, {white.method} to {white.error:.1e}, rank {white.rank}"


def _print_run(run: Trajectory) -> None:
    steps = len(run.loss) - 1
    floor = f" (least possible: {run.problem.loss_floor:.6g})" if run.problem else ""
    per_step = f", {1e6 * run.wall_time / steps:.3g} us a step" if steps else ""
    print(f"engine:   {run.engine}: {run.certificate.reason}")
    print(f"training: {steps} steps in {run.wall_time:.3g} s{per_step}")
    print(f"loss:     {run.loss[0]:.6g} -> {run.loss[-1]:.6g}{floor}")


def _write_run(
    folder: Path, run: Trajectory, chosen: spec.Spec, summary: Mapping[str, Any], ending: str | None = None
) -> str:
    """Write the run and its summary, and name them; `ending` names the files of a run that ended early."""
    places = [folder / f"{ending or 'run'}.npz", folder / f"{ending or 'summary'}.json"]
    run.save(places[0], weights=chosen.output["weights"])
    write_json(places[1], {**summary, **runs.summarise(run)})
    return f"{places[0]}, {places[1]}"


# --------------------------------------------------------------------------------------------------
# dlnfast sweep
# --------------------------------------------------------------------------------------------------


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a sweep as Ctrl-C does."""


def _terminate(*_: object) -> None:
    raise _Terminated


def _sweep(arguments: argparse.Namespace) -> int:
    grid = SweepGrid(arguments.spec, changes=arguments.changes)
    folder = _folder(arguments, grid.output["directory"])
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        results = sweep(
            grid,
            directory=folder,
            keep_runs=arguments.keep_runs,
            retry_failed=arguments.retry_failed,
            n_workers=arguments.workers,
            progress=True,
        )
    except KeyboardInterrupt as interrupt:
        status = 143 if isinstance(interrupt, _Terminated) else 130
        return _complain(": ".join([_INTERRUPTED, *getattr(interrupt, "__notes__", [])]), status)
    finally:
        # None stands for a handler that Python did not install, and could not put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
    if arguments.table:
        print(results.to_markdown())
    usage = results.usage
    print(f"sweep:    {results.counted()}")
    print(f"started:  {usage['started']} in {usage['wall']:.3g} s, {usage['workers']} workers")
    print(f"written:  {folder / 'results.csv'}")
    failed = [row for row in results if row["outcome"] == "failed"]
    return _complain(f"{len(failed)} runs failed, one of them: {failed[0]['error']}", 1) if failed else 0


# --------------------------------------------------------------------------------------------------
# dlnfast finetune
# --------------------------------------------------------------------------------------------------


def _finetune(arguments: argparse.Namespace) -> int:
    grid = finetuning.read_grid(arguments.spec, arguments.changes)
    folder = _folder(arguments, grid.sections["output"]["directory"])
    results = finetuning.Results(folder / "results.jsonl")
    if not arguments.table and results.missing(grid):
        from .torch.finetune import run_grid

        run_grid(grid, results, progress=True, report=print)
    rows = finetuning.summarise(results.of(grid))
    if not rows:
        return _complain(f"{results.path} holds no run of this grid", 1)
    text = finetuning.table(rows)
    write_text_whole(folder / "table.md", text + "\n")
    write_json(
        folder / "summary.json",
        {
            "spec": grid.sections,
            "rows": [row.to_dict() for row in rows],
            "paired": finetuning.paired(rows),
            "environment": environment(),
        },
    )
    print(text)
    print(f"written:  {results.path}, {folder / 'table.md'}, {folder / 'summary.json'}")
    return 0


# --------------------------------------------------------------------------------------------------
# dlnfast bench
# --------------------------------------------------------------------------------------------------


def _case_lines() -> list[str]:
    width = max(map(len, cases.CASES))
    lines = []
    for name, case in cases.CASES.items():
        summary = (case.__doc__ or "").splitlines()[0].rstrip(".")
        lines.append(f"  {name:<{width}}  {summary[:1].lower()}{summary[1:]}")
    return lines


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.read is not None:
        if arguments.cases or arguments.out or arguments.quick or arguments.repeats is not None:
            raise ValueError(
                "--read measures nothing; wanted no --case, --quick, --repeats or --out beside it"
            )
        results = cases.read_results(arguments.read)
        with naming_damage(arguments.read, "dlnfast bench"):
            text = tables.markdown(results)
        print(text)
        return 0
    repeats = 2 if arguments.quick else 5
    if arguments.repeats is not None:
        repeats = check_count(arguments.repeats, "repeats")
    options = cases.Options(repeats, arguments.quick, tuple(dict.fromkeys(arguments.peers)))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results = {"quick": arguments.quick, "repeats": repeats, "results": []}
    for name in dict.fromkeys(arguments.cases or cases.DEFAULT):
        results["results"].append(cases.run_case(name, options))
        results["machine"] = record.machine()
        if arguments.out is not None:  # after every case, so that an interruption loses one only
            write_json(arguments.out, results)
    if arguments.table:
        print("\n" + tables.markdown(results) + "\n")
    print(record.describe_machine(results["machine"]))
    if arguments.out is not None:
        print(f"written: {arguments.out}")
    return 0


# --------------------------------------------------------------------------------------------------
# dlnfast info
# --------------------------------------------------------------------------------------------------


def _info(arguments: argparse.Namespace) -> int:
    rows = [(key, ", ".join(v) if isinstance(v, list) else v) for key, v in build_info().items()]
    rows.append(("python", platform.python_version()))
    rows += [(package, version(package) or "not installed") for package in (*PACKAGES, *_OPTIONAL)]
    pools = record.thread_pools() or []
    rows += [("thread pool", f"{p['internal_api']}, {p['num_threads']} threads") for p in pools]
    for name, value in rows:
        print(f"{name + ':':<14} {value}")
    return 0
