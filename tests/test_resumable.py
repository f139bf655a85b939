# SPDX-License-Identifier: MIT
"""The driver of resumable work: the order of its writes, and the state after an exception."""

from __future__ import annotations

import errno
import os
import signal

import numpy as np
import pytest

from dlnfast._support.checkpoint import RunFolder, State
from dlnfast._support.errors import FolderInUseError
from dlnfast._support.locks import LOCK
from dlnfast._support.moved import refuse_moved
from dlnfast._training.resumable import (
    Records,
    ResumableRun,
    ResumableWork,
    replay_records,
    run_resumable,
)


class Stop(Exception):
    pass


class Counting(ResumableWork):
    """Work that adds up the numbers of its steps; it flushes after each step, and can be stopped at one."""

    def __init__(self, n_steps=6, stop_at=None, error=Stop):
        self.n_steps, self.stop_at, self.error = n_steps, stop_at, error
        self.step, self.total, self.taken = 0, 0, []
        self.is_whole = True

    @property
    def is_finished(self):
        return self.step == self.n_steps

    def advance(self, flush):
        while not self.is_finished:
            if self.step == self.stop_at:
                raise self.error()
            self.step += 1
            self.total += self.step
            self.taken.append(self.step)
            flush()

    def state(self):
        return State(self.step, 0.0, {"total": np.array(self.total)}) if self.is_whole else None

    def restore_state(self, state):
        self.step, self.total = state.step, int(state.arrays["total"])

    def partial_result(self):
        return self.total


class Recording(Counting):
    """Counting with records and an end file, as in `train`."""

    has_end_file = True

    def records_since(self, step):
        new = [taken for taken in self.taken if taken > step]
        return Records(new[-1], {"loss": np.array(new)}) if new else None

    def advance(self, flush):
        super().advance(flush)
        return {"outcome": "finished", "step": self.step, "layer": 0}


def folder(tmp_path):
    return RunFolder(tmp_path / "work", "identity", "counting")


def files(tmp_path):
    return sorted(os.listdir(tmp_path / "work"))


def test_without_storage_the_work_is_done_and_nothing_is_written():
    work = Counting()
    run_resumable(None, work)
    assert work.total == 21


@pytest.mark.parametrize("kind", [Counting, Recording])
@pytest.mark.parametrize("cut", range(6))
def test_work_resumes_at_the_saved_step(kind, cut, tmp_path):
    with pytest.raises(Stop):
        run_resumable(folder(tmp_path), kind(stop_at=cut))
    work = kind()
    run_resumable(folder(tmp_path), work)
    assert (work.total, work.taken) == (21, list(range(cut + 1, 7)))
    again = kind()
    run_resumable(folder(tmp_path), again)
    assert again.taken == []


def test_records_are_written_before_the_state(tmp_path, monkeypatch):
    written = []
    for name in ("write_records", "write_state", "end"):
        whole = getattr(RunFolder, name)

        def noted(self, *arguments, name=name, whole=whole):
            written.append(name)
            return whole(self, *arguments)

        monkeypatch.setattr(RunFolder, name, noted)
    run_resumable(folder(tmp_path), Recording(n_steps=2))
    assert written == ["write_records", "write_state"] * 2 + ["end"]
    assert files(tmp_path) == [
        "end.json",
        *(f"records-{step:015d}.npz" for step in (1, 2)),
        "run.npz",
        *(f"state-{step:015d}.npz" for step in (1, 2)),
    ]


def test_a_state_is_written_after_some_seconds_or_steps(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(RunFolder, "write_state", lambda self, state: steps.append(state.step))
    run_resumable(folder(tmp_path), Counting(), seconds=1e6)
    assert steps == [1, 6]  # the first flush, and the end
    steps.clear()
    run_resumable(folder(tmp_path), Counting(), every=4)
    assert steps == [4, 6]


def test_steps_after_the_newest_state_are_computed_again(tmp_path):
    with pytest.raises(Stop):
        run_resumable(folder(tmp_path), Recording(stop_at=4))
    (tmp_path / "work" / "state-000000000000004.npz").unlink()
    work = Recording(stop_at=3)  # at the newest state, before any step
    with pytest.raises(Stop):
        run_resumable(folder(tmp_path), work)
    assert [name for name in files(tmp_path) if name.startswith("records")] == [
        f"records-{step:015d}.npz" for step in (1, 2, 3)
    ]
    work = Recording()
    run_resumable(folder(tmp_path), work)
    assert (work.taken, work.total) == ([4, 5, 6], 21)


def test_finished_work_needs_no_lock_and_unfinished_work_does(tmp_path):
    with pytest.raises(Stop):
        run_resumable(folder(tmp_path), Counting(stop_at=3))
    with RunFolder(tmp_path / "work").owned(), pytest.raises(FolderInUseError):
        run_resumable(folder(tmp_path), Counting())
    run_resumable(folder(tmp_path), Counting())
    with RunFolder(tmp_path / "work").owned():
        work = Counting()
        run_resumable(folder(tmp_path), work)
    assert (work.taken, work.total) == ([], 21)
    assert LOCK not in files(tmp_path)


class TestExceptions:
    """The state is written, and a note says whether that succeeded."""

    @pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit])
    def test_the_state_is_written(self, error, tmp_path):
        storage = folder(tmp_path)
        with pytest.raises(error) as caught:
            run_resumable(storage, Counting(stop_at=5, error=error), seconds=1e6)
        assert caught.value.__notes__ == [
            f"everything up to step 5 is saved in {storage.path}: the same call resumes from there"
        ]
        assert caught.value.trajectory == 15
        assert storage.newest().step == 5

    def test_sigterm_stops_the_work_like_ctrl_c(self, tmp_path):
        class Terminated(Counting):
            def advance(self, flush):
                self.step = self.total = 1
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()

        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as caught:
            run_resumable(folder(tmp_path), Terminated())
        assert caught.value.code == 143
        assert folder(tmp_path).newest().step == 1
        assert signal.getsignal(signal.SIGTERM) is before

    def test_no_state_is_written_in_the_middle_of_a_step(self, tmp_path):
        class Middle(Counting):
            def advance(self, flush):
                try:
                    super().advance(flush)
                finally:
                    self.is_whole = False

        work = Middle(stop_at=5)
        with pytest.raises(Stop) as caught:
            run_resumable(folder(tmp_path), work, seconds=1e6)
        assert "up to step 1 is saved" in caught.value.__notes__[-1]
        assert folder(tmp_path).newest().step == 1

    def test_the_note_reports_a_full_disk(self, tmp_path, monkeypatch):
        def full(self, state):
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(RunFolder, "write_state", full)
        with pytest.raises(OSError, match="full") as caught:
            run_resumable(folder(tmp_path), Counting())
        assert caught.value.__notes__[-1].startswith("all work since the last state")
        monkeypatch.undo()
        work = Counting()
        run_resumable(folder(tmp_path), work)
        assert work.total == 21

    def test_an_existing_state_is_not_written_again(self, tmp_path, monkeypatch):
        with pytest.raises(Stop):
            run_resumable(folder(tmp_path), Counting(stop_at=3))
        monkeypatch.setattr(RunFolder, "write_state", lambda *_: pytest.fail("the state exists"))
        with pytest.raises(Stop) as caught:
            run_resumable(folder(tmp_path), Counting(stop_at=3))
        assert "up to step 3 is saved" in caught.value.__notes__[-1]


def test_time_before_an_interruption_counts(tmp_path):
    storage = folder(tmp_path)
    with pytest.raises(Stop):
        run_resumable(storage, Counting(stop_at=2))
    state = storage.newest()
    with storage.owned():
        storage.write_state(State(state.step, 1000.0, state.arrays))
    run = ResumableRun(storage, Counting())
    run.run()
    assert 1000.0 <= run.seconds < 1100.0


def test_leftovers_of_a_killed_removal_are_deleted(tmp_path):
    storage = folder(tmp_path)
    with pytest.raises(Stop):
        run_resumable(storage, Counting(stop_at=2))
    older = tmp_path / "work" / "state-000000000000000.npz"
    older.write_bytes((tmp_path / "work" / "state-000000000000001.npz").read_bytes())
    with pytest.raises(Stop):
        run_resumable(storage, Counting(stop_at=2))
    assert not older.exists()
    run_resumable(storage, Counting())
    older.write_bytes(b"")
    (tmp_path / "work" / LOCK).write_bytes(b"")  # its owner was killed
    run_resumable(storage, Counting())
    assert [name for name in files(tmp_path) if name.startswith("state")] == [
        f"state-{step:015d}.npz" for step in (5, 6)
    ]


def test_records_are_replayed_in_order():
    seen = []
    assert replay_records(lambda *record: seen.append(record) or True, [(0, 2.0), (5, 1.0)]) == (5, True)
    assert seen == [(0, 2.0), (5, 1.0)]
    assert replay_records(lambda *_: True, []) == (None, None)


def test_the_error_for_a_moved_keyword_names_its_new_option():
    @refuse_moved("work", {"old": "options=Options(old=...)"})
    def work(new=1):
        return new

    assert work(new=3) == 3
    with pytest.raises(TypeError, match=r"^work has no keyword 'old' since version 0.2.0: write options="):
        work(old=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        work(other=1)
