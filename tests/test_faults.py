# SPDX-License-Identifier: MIT
"""No fault of a file operation loses earlier content, changes a bit of a result, or leaves a file behind."""

from __future__ import annotations

import errno
import os

import pytest
from fault_cases import KINDS, every_case, run_case
from faults import Faults, Killed, count

CASES = {case.name: case for case in every_case()}


@pytest.mark.parametrize("name", CASES)
def test_no_fault_loses_data(name, tmp_path):
    # A fixed sample of the operations; bench/fault_injection.py tries all of them.
    case = CASES[name]
    tally = run_case(case, tmp_path, singles=15 if case.cost == 1 else 3, doubles=4, kills=2)
    assert tally.losses == []
    assert tally.singles >= 3
    assert case.cost > 1 or tally.doubles >= 1 or not case.locks


@pytest.mark.parametrize("name", ["train, dense, resumed", "train, reduced, resumed"])
def test_no_failed_write_of_a_state_destroys_the_run(name, tmp_path):
    """Faults at every fourth write of a resumed run; in version 0.1.0 they destroyed the folder."""
    tally = run_case(CASES[name], tmp_path, kinds=["full", "interrupt after"], every=4)
    assert tally.losses == []
    assert tally.singles >= 40


class TestFaults:
    def test_operations_below_the_folder_are_counted(self, tmp_path):
        def work():
            with open(tmp_path / "a", "w") as file:
                file.write("text")
            os.replace(tmp_path / "a", tmp_path / "b")
            with open(os.devnull, "rb") as file:
                file.read()

        operations = count(tmp_path, work)
        assert operations == [("create", "a"), ("write", "a"), ("close written", "a"), ("replace", "b")]
        assert (tmp_path / "b").read_text() == "text"

    def test_a_write_that_fails_has_written_half(self, tmp_path):
        with (
            Faults(tmp_path, "ENOSPC", (1,)),
            pytest.raises(OSError, match="No space") as caught,
            open(tmp_path / "a", "wb", buffering=0) as file,
        ):
            file.write(b"0123456789")
        assert caught.value.errno == errno.ENOSPC
        assert (tmp_path / "a").read_bytes() == b"01234"

    def test_no_operation_follows_a_kill(self, tmp_path):
        def work():
            try:
                (tmp_path / "a").write_text("0123456789")
            finally:
                (tmp_path / "a").unlink()

        with pytest.raises(Killed), Faults(tmp_path, "kill", (1,)):
            work()
        assert (tmp_path / "a").read_text() == "01234"

    def test_a_full_disk_stays_full(self, tmp_path):
        with Faults(tmp_path, "full", (0,)) as faults:
            for name in "ab":
                with pytest.raises(OSError, match="No space"):
                    (tmp_path / name).write_text("text")
        assert faults.fired == 2
        assert os.listdir(tmp_path) == []

    def test_there_are_seven_kinds_of_faults(self):
        assert len(KINDS) == len(set(KINDS)) == 7
