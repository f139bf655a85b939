# SPDX-License-Identifier: MIT
"""``dlnfast figure``: published figures, each computed and drawn by a module of `figures`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any, Final

from .. import figures
from .._config.runs import write_json
from .._support.environment import environment
from .._support.files import atomic_path
from ..figures._captions import mark_quick, write_caption
from .common import DEFAULT_FOLDER, LazyParser, complain

#: Keeps the names of settings apart from the command line's own.
_SETTING: Final = "setting "
#: Formats of pictures, the first of which is the default, and the metadata field of each for the caption.
_CAPTION_KEYS: Final = {"png": "Description", "pdf": "Subject", "svg": "Description"}
_FORMATS: Final = tuple(_CAPTION_KEYS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description and the arguments of the command."""
    parser.epilog = "dlnfast figure NAME --help lists the settings of a figure."
    parser.add_argument("--list", action="store_true", help="name all figures and exit")
    names = parser.add_subparsers(metavar="NAME", parser_class=LazyParser)
    for name, summary in figures.FIGURES.items():
        _add_figure(names, name, summary)


def run(arguments: argparse.Namespace) -> int:
    """Run the command, and return its exit status."""
    return _draw(arguments) if hasattr(arguments, "figure") else _list_figures(arguments)


def _add_figure(names: Any, name: str, summary: str) -> None:
    parser = names.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path(DEFAULT_FOLDER), help="where to write"
    )
    parser.add_argument(
        "--format",
        dest="formats",
        nargs="+",
        choices=_FORMATS,
        default=argparse.SUPPRESS,
        metavar="FORMAT",
        help=f"formats of the picture: {', '.join(_FORMATS)}, one or several (default: {_FORMATS[0]})",
    )
    parser.set_defaults(figure=name)
    parser.add_arguments = functools.partial(_add_settings, name=name)


def _add_settings(parser: argparse.ArgumentParser, name: str) -> None:
    module = figures.load(name)
    duration = figures.quick_takes(module)
    quick = (
        f"a smaller setting, {duration}"
        if figures.quick_settings(module)
        else "no effect: this figure takes seconds"
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
            default=argparse.SUPPRESS,  # a setting that is not passed may get its quick value
            choices=option.choices,
            metavar=None if option.choices else option.kind.__name__.upper(),
            help=f"{option.help} (default: {default})",
        )
    parser.set_defaults(timed=figures.is_timed(module))


def _list_figures(arguments: argparse.Namespace) -> int:
    if not arguments.list:
        return complain("figure needs a NAME; dlnfast figure --list names them", 2)
    width = max(map(len, figures.FIGURES))
    for name, summary in figures.FIGURES.items():
        print(f"{name:<{width}}  {summary}")
    return 0


def _draw(arguments: argparse.Namespace) -> int:
    if arguments.list:
        print(f"dlnfast: --list only names the figures; {arguments.figure} is not drawn", file=sys.stderr)
        return _list_figures(arguments)
    start = time.perf_counter()
    module = figures.load(arguments.figure)
    prefix = _SETTING
    passed = {key.removeprefix(prefix): v for key, v in vars(arguments).items() if key.startswith(prefix)}
    quick = figures.quick_settings(module) if getattr(arguments, "quick", False) else {}
    changed = {key: value for key, value in quick.items() if key not in passed}
    settings = figures.make_settings(module.Settings, {**changed, **passed})
    result = module.compute(settings, progress=True)
    computed = time.perf_counter()
    picture = module.draw(settings, result)
    if changed:
        mark_quick(picture)
    caption = write_caption(
        picture.get_suptitle(),
        figures.describe(module, settings, result),
        changed,
        result.numbers.get("claims", ()),
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    images = []
    for kind in dict.fromkeys(getattr(arguments, "formats", _FORMATS[:1])):
        images.append(arguments.out / f"{arguments.figure}.{kind}")
        with atomic_path(images[-1]) as temporary:
            picture.savefig(
                temporary, dpi=150, facecolor="white", format=kind, metadata={_CAPTION_KEYS[kind]: caption}
            )
    notes = arguments.out / f"{arguments.figure}.json"
    write_json(
        notes,
        {
            "figure": arguments.figure,
            "quick": bool(changed),
            "caption": caption,
            "settings": dataclasses.asdict(settings),
            "numbers": result.numbers,
            "seconds": {"computing": computed - start, "all": time.perf_counter() - start},
            "environment": environment(),
        },
    )
    print("\n".join([*result.highlights, f"written: {', '.join(map(str, [*images, notes]))}"]))
    return 0
