# SPDX-License-Identifier: MIT
"""Keywords of earlier versions: errors that name the code to write instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def check_keywords(keywords: Iterable[str], messages: Mapping[str, str]) -> None:
    """Raise a TypeError with the message of the first keyword that has one."""
    for keyword in keywords:
        if keyword in messages:
            raise TypeError(messages[keyword])


def refuse_keywords(
    messages: Mapping[str, str],
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Make a function raise a TypeError with these messages for these keywords; it keeps its signature."""

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @wraps(function)
        def check_and_call(*arguments: Parameters.args, **keywords: Parameters.kwargs) -> Result:
            check_keywords(keywords, messages)
            return function(*arguments, **keywords)

        return check_and_call

    return decorate


def refuse_moved(
    name: str, moved: Mapping[str, str]
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Make a function raise a TypeError for keywords that are options of a dataclass now.

    Parameters
    ----------
    name : str
        Name of the function, for the message.
    moved : mapping of str to str
        For each old keyword the new code, such as ``"layers=LayerOptions(scale=...)"``.

    Returns
    -------
    callable
        A decorator, which keeps the signature.
    """
    return refuse_keywords(
        {
            keyword: f"{name} has no keyword {keyword!r} since version 0.2.0: write {code}"
            for keyword, code in moved.items()
        }
    )
