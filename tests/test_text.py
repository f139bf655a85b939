# SPDX-License-Identifier: MIT
"""Tables and counts for the terminal."""

from __future__ import annotations

from dlnfast._support.text import format_count, format_table


def test_lines_of_a_cell_are_aligned_at_the_last_one():
    table = format_table([["layer", "W\nstep 0", "bound"], ["fc", "1.5", "1e-08"]])
    assert table.splitlines() == [
        "            W",
        "layer  step 0  bound",
        "fc        1.5  1e-08",
    ]


def test_counts_have_the_number_of_their_noun():
    assert [format_count(n, "matrix", "matrices") for n in (0, 1, 2)] == [
        "0 matrices",
        "1 matrix",
        "2 matrices",
    ]
