# SPDX-License-Identifier: MIT
"""README and the documentation have short sentences, and none of the words that the field does not use."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
#: Words of the median sentence of a page, at most.
MEDIAN = 18
#: Words with another, usual name: "checkpointed run", "resume", "polls for interrupts", "tracker state", ...
PRIVATE = re.compile(
    r"\b(kept runs?|runs? that (is|are) kept|goes? on|begins? again|began again|breathes?|deaf|drains?|"
    r"motions?|intruders?|inert|survives?|survived|to the same bits|under the same lens|for nothing|"
    r"matrix that drifts|matrices that drift|builds? for processors)\b",
    re.IGNORECASE,
)


def prose(text):
    """Return the paragraphs and list items of a page, without code, tables, headings and link targets."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`]*`|\$[^$]*\$", "X", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "#", "!", "<"))]
    item = re.compile(r"\s*([*-]|\d+\.)\s+")
    joined = "".join("\n" + item.sub("", x) if item.match(x) or not x.strip() else " " + x for x in lines)
    return [paragraph for paragraph in joined.split("\n") if paragraph.strip()]


def sentences(text):
    parts = (part for p in prose(text) for part in re.split(r"(?<=[.?!:])\s+(?=[A-Z*(])", p))
    return [part for part in parts if len(part.split()) > 2]


def test_sentences_are_counted():
    text = "# Title\n\nOne two three. Four `f. G` five six: Seven\neight nine.\n\n"
    text += "* [A b](c.md) d.\n* E f g h.\n"
    assert [len(sentence.split()) for sentence in sentences(text)] == [3, 4, 3, 3, 4]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_median_sentence_is_short(page):
    found = [len(sentence.split()) for sentence in sentences(page.read_text(encoding="utf-8"))]
    if len(found) >= 5:
        assert statistics.median(found) <= MEDIAN


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_words_are_those_of_the_field(page):
    found = [match.group() for p in prose(page.read_text(encoding="utf-8")) for match in PRIVATE.finditer(p)]
    assert not found
