# SPDX-License-Identifier: MIT
"""``dlnfast adapter``: adapters in files, their spectra, truncation, and extraction from checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .._support.text import format_count, format_table
from .common import LazyParser, complain

if TYPE_CHECKING:
    from ..torch.adapters.sources import WrittenUpdate

_ACTIONS: Final = {
    "audit": "measure rank, norms and energy of the update of every layer",
    "resize": "truncate the update of every layer to a rank or an error",
    "extract": "write the difference of two checkpoints of a model as a LoRA adapter",
}
_ADAPTER: Final = "folder of PEFT with LoRA or Deep LoRA, or a file of DeepLoRA.save"
_AUDIT_COLUMNS: Final = (
    "Columns: rank: that of the factors; used: numerical rank of the update; energy: share of its squared "
    "Frobenius norm in the sum over all layers; Frobenius, spectral: its norms; stable: squared ratio of "
    "these norms; suggested: lowest rank within the tolerance."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description and the arguments of the command."""
    parser.description = "Work with adapters in files. Needs PyTorch and safetensors, but not PEFT."
    parser.epilog = "dlnfast adapter ACTION --help describes the arguments of an action."
    actions = parser.add_subparsers(metavar="ACTION", parser_class=LazyParser)
    for name, summary in _ACTIONS.items():
        actions.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + "."
        ).add_arguments = _FILLERS[name]


def run(arguments: argparse.Namespace) -> int:
    """Run the action, and return its exit status."""
    if not hasattr(arguments, "action"):
        return complain(f"adapter needs an ACTION: {', '.join(_ACTIONS)}", 2)
    return int(arguments.action(arguments))


# -------------------------------------------------------------------------------------------- arguments


def _add_audit(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _AUDIT_COLUMNS
    parser.set_defaults(action=_audit)
    parser.add_argument("path", metavar="DIR", type=Path, help=_ADAPTER)
    parser.add_argument(
        "other",
        metavar="OTHER",
        type=Path,
        nargs="?",
        help="another adapter of the same model: adds the angles (radians) between the leading output and "
        "input subspaces of the updates",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.05,
        metavar="T",
        help="relative error of the suggested ranks (default: 0.05)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write a file: .json or .csv")


def _add_resize(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=_resize)
    parser.add_argument("path", metavar="DIR", type=Path, help=_ADAPTER)
    _add_output(parser)


def _add_extract(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=_extract)
    for name, title in (("base", "before"), ("tuned", "after")):
        parser.add_argument(
            name,
            metavar=name.upper(),
            type=Path,
            help=f"checkpoint {title} training: a file of safetensors or torch.save, or a folder with it",
        )
    _add_output(parser)
    parser.add_argument(
        "--layers",
        nargs="+",
        metavar="NAME",
        help="layers or patterns (default: all that differ)",
    )
    parser.add_argument(
        "--embeddings",
        nargs="+",
        metavar="NAME",
        help="layers that are embeddings, or patterns (default: the usual names)",
    )
    parser.add_argument(
        "--fan-in-fan-out",
        action=argparse.BooleanOptionalAction,
        help="weights have shape (inputs, outputs), as in GPT-2 (default: by the model type in config.json)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="NEW", required=True, help="folder for the adapter")
    parser.add_argument("--rank", type=int, metavar="R", help="largest rank of a layer")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="T",
        help="largest relative error of a layer, in the Frobenius norm; --rank or --tolerance is required",
    )
    parser.add_argument(
        "--uniform",
        action="store_true",
        help="pad with zeros to one rank, for programs without rank_pattern",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter in an existing folder")


_FILLERS: Final[Mapping[str, Callable[[argparse.ArgumentParser], None]]] = {
    "audit": _add_audit,
    "resize": _add_resize,
    "extract": _add_extract,
}

# -------------------------------------------------------------------------------------------- actions


def _audit(arguments: argparse.Namespace) -> int:
    from ..torch.adapters.audit import audit_adapter, check_output_name

    if arguments.out is not None:
        check_output_name(arguments.out)
    audit = audit_adapter(arguments.path, arguments.other, tolerance=arguments.tolerance)
    print(audit.to_text())
    if arguments.out is not None:
        audit.write(arguments.out)
        print(f"written:  {arguments.out}")
    return 0


def _resize(arguments: argparse.Namespace) -> int:
    from ..torch.adapters.resize import resize_adapter

    layers = resize_adapter(
        arguments.path,
        arguments.out,
        rank=arguments.rank,
        tolerance=arguments.tolerance,
        uniform=arguments.uniform,
        overwrite=arguments.overwrite,
    )
    _print_updates(layers)
    print(f"written:  {arguments.out}")
    return 0


def _extract(arguments: argparse.Namespace) -> int:
    from ..torch._names import format_names
    from ..torch.adapters.extract import EMBEDDINGS, extract_adapter

    found = extract_adapter(
        arguments.base,
        arguments.tuned,
        arguments.out,
        rank=arguments.rank,
        tolerance=arguments.tolerance,
        layers=arguments.layers,
        embeddings=EMBEDDINGS if arguments.embeddings is None else arguments.embeddings,
        fan_in_fan_out=arguments.fan_in_fan_out,
        uniform=arguments.uniform,
        overwrite=arguments.overwrite,
    )
    _print_updates(found.layers)
    for reason in dict.fromkeys(found.left_out.values()):
        names = [name for name, why in found.left_out.items() if why == reason]
        print(f"left out: {format_count(len(names), 'tensor', 'tensors')}, {reason}: {format_names(names)}")
    print(f"equal:    {format_count(len(found.unchanged), 'tensor', 'tensors')}")
    print(f"written:  {arguments.out}")
    return 0


def _print_updates(layers: Mapping[str, WrittenUpdate]) -> None:
    rows = [["layer", "rank", "error", "relative", "rounding"]]
    for name, layer in layers.items():
        numbers = (layer.error, layer.relative_error, layer.rounding)
        rows.append([name, str(layer.rank), *(f"{number:.3g}" for number in numbers)])
    print(format_table(rows))
