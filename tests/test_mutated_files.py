# SPDX-License-Identifier: MIT
"""Randomly mutated files of every format are read correctly or refused, in bounded memory.

``python bench/mutate_files.py`` mutates ten thousand.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "bench" / "mutate_files.py"
#: Formats that are slow to read; only the program tests them.
OMITTED = {"estimator", "batch"}


@pytest.fixture(scope="module")
def program():
    specification = importlib.util.spec_from_file_location("mutate_files", PROGRAM)
    module = importlib.util.module_from_spec(specification)
    sys.modules["mutate_files"] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["mutate_files"]


@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_read_correctly_or_refused(program, tmp_path):
    names = [name for name in program.formats() if name not in OMITTED]
    tally = program.run(seed=1, first=0, count=12 * len(names), names=names, folder=tmp_path)
    assert tally.n_bad == 0, "\n".join(tally.examples)
    for name in names:
        found = {outcome: tally.counts[name, outcome] for outcome in program.GOOD}
        assert sum(found.values()) == 12
        assert found["refused"] > 0


def test_the_program_counts_failures(program, tmp_path):
    def make(folder):
        (folder / "a").write_bytes(b"content")
        return [folder / "a"]

    def load(folder):
        content = (folder / "a").read_bytes()
        if len(content) < 7:
            raise KeyError("untyped")
        if b"\0" in content:
            return bytearray(2**27) and content
        return content

    mutator = program.Mutator(tmp_path, [])
    mutator.formats = {"a": program.Format(make, load, "bytes")}
    (tmp_path / "a").mkdir()
    make(tmp_path / "a")
    mutator.files, mutator.wanted = {"a": [Path("a")]}, {"a": b"content"}
    outcomes = {mutator.attempt(0, number)[1] for number in range(60)}
    assert {"wrong", "untyped"} <= outcomes
    (tmp_path / "a" / "a").write_bytes(b"con\0ent")
    mutator.wanted["a"] = b"con\0ent"
    assert mutator._read("a", mutator.formats["a"], tmp_path / "a")[2] > 2**27


def test_mutations_change_the_file(program):
    rng, data = random.Random(0), bytes(range(200)) * 3
    for change in program.BYTES:
        assert any(change(rng, data) != data for _ in range(20)), change.__name__
