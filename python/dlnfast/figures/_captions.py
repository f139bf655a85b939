# SPDX-License-Identifier: MIT
"""Titles of one line, and captions with the rest: settings, how to read the panels, and the claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Points: the size of titles, and the smallest size to which a long title shrinks.
_TITLE_SIZE: Final = 13.0
_SMALLEST_SIZE: Final = 8.0
#: Share of the picture's width that a title may take.
_TITLE_WIDTH: Final = 0.96
_POINTS_PER_INCH: Final = 72.0


def set_title(figure: Figure, title: str) -> None:
    """Write a title of one line above the panels, in a font that lets it fit into the picture.

    Parameters
    ----------
    figure : Figure
        The picture.
    title : str
        The title, without a line break.
    """
    from matplotlib.textpath import TextPath

    width = TextPath((0, 0), title, size=_TITLE_SIZE).get_extents().width
    available = _TITLE_WIDTH * _POINTS_PER_INCH * figure.get_figwidth()
    size = max(min(_TITLE_SIZE, _TITLE_SIZE * available / max(width, 1.0)), _SMALLEST_SIZE)
    figure.suptitle(title, fontsize=size)


def mark_quick(figure: Figure) -> None:
    """Add to the title that the settings are smaller than the defaults."""
    set_title(figure, f"{figure.get_suptitle()} (quick setting)")


def write_caption(
    title: str, details: str, quick: Mapping[str, Any], claims: Sequence[Mapping[str, Any]]
) -> str:
    """Return the caption of a figure: one paragraph, and one line for each claim.

    Parameters
    ----------
    title, details : str
        The title, and sentences on the settings and the panels.
    quick : dict
        Settings that ``--quick`` made smaller than the defaults, with their values.
    claims : sequence of dict
        The claims as `_claims.as_numbers` returns them.
    """
    sentences = [_end(title)]
    if details:
        sentences.append(_end(details))
    if quick:
        changed = (
            f"{name.replace('_', ' ')} {', '.join(map(str, value if isinstance(value, tuple) else (value,)))}"
            for name, value in quick.items()
        )
        sentences.append(f"Quick setting, smaller than the default: {'; '.join(changed)}.")
    lines = [f"{claim['text']}: {claim['measured']} ({claim['verdict']})." for claim in claims]
    return "\n".join([" ".join(sentences), *lines])


def _end(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text}."
