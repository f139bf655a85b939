# SPDX-License-Identifier: MIT
"""A folder has one owner: a second one gets an error that names it, and a dead one is replaced."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from helpers.optional_packages import import_torch

import dlnfast as dln
from dlnfast import Checkpoint, FolderInUseError
from dlnfast._support import locks as _locks
from dlnfast._support.checkpoint import RunFolder, State
from dlnfast._support.locks import LOCK, FolderLock

HOLD = """
import sys, time
from pathlib import Path
from dlnfast._support.locks import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Return a process that owns the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


class WindowsLocks:
    """Stands for the module msvcrt: the lock of a byte is the lock of the whole file."""

    LK_NBLCK, LK_UNLCK = 2, 0

    @staticmethod
    def locking(descriptor, mode, n_bytes):
        import fcntl

        assert os.lseek(descriptor, 0, os.SEEK_CUR) >= 2**20  # behind the name of the owner
        assert n_bytes == 1
        operation = fcntl.LOCK_UN if mode == WindowsLocks.LK_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB
        try:
            fcntl.flock(descriptor, operation)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None


@pytest.fixture(params=["flock", "files", "windows"])
def system(request, monkeypatch):
    """Locks of the file system, none, and locks of single bytes as on Windows."""
    if request.param == "files":
        monkeypatch.setattr(_locks, "_flock", lambda file: None)
    elif request.param == "windows":
        monkeypatch.setattr(_locks, "_flock", lambda file: _locks._lock_byte(file, WindowsLocks))
    return request.param


def test_a_byte_can_be_locked_again_after_it_was_unlocked(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with path.open("r+b", buffering=0) as first, path.open("r+b", buffering=0) as second:
        assert _locks._lock_byte(first, WindowsLocks)
        assert not _locks._lock_byte(second, WindowsLocks)
        _locks._unlock_byte(first, WindowsLocks)
        assert _locks._lock_byte(second, WindowsLocks)


def test_an_error_names_the_process_that_owns_the_folder(holder, tmp_path, system):
    with pytest.raises(FolderInUseError, match=f"process {holder.pid} on {socket.gethostname()}") as caught:
        FolderLock(tmp_path).__enter__()
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.directory, error.pid, error.host) == (tmp_path, holder.pid, socket.gethostname())
    assert str(tmp_path) in str(error)
    # With locks of the file system a dead owner's file is no obstacle, and that of a living one must stay.
    assert ("remove" in str(error)) == (system == "files")
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK).exists()  # a kill removes nothing
    with FolderLock(tmp_path) as lock:
        assert lock.is_held
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_a_second_owner_in_the_same_process_is_refused(tmp_path, system):
    with FolderLock(tmp_path), pytest.raises(FolderInUseError, match="another run of this process"):
        FolderLock(tmp_path).__enter__()
    with FolderLock(tmp_path):
        pass


@pytest.mark.parametrize(
    ("changes", "is_free"),
    [
        ({"started": 1}, True),  # the number of the process has gone to another one
        ({"boot": "another"}, True),
        ({"host": "elsewhere"}, False),
        ({}, False),
    ],
)
def test_errors_name_the_owner_without_file_system_locks(changes, is_free, tmp_path, monkeypatch):
    monkeypatch.setattr(_locks, "_flock", lambda file: None)
    (tmp_path / LOCK).write_text(json.dumps(_locks._describe_process() | changes))
    if is_free:
        with FolderLock(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text()) == _locks._describe_process()
    else:
        with pytest.raises(FolderInUseError, match=rf"remove .*{LOCK}"):
            FolderLock(tmp_path).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ([] if is_free else [LOCK])


def test_a_forked_child_owns_no_folder(tmp_path):
    lock = FolderLock(tmp_path)
    with lock:
        reader, writer = multiprocessing.Pipe(duplex=False)
        child = os.fork()
        if child == 0:
            writer.send(lock.is_held)
            lock.__exit__()
            signal.pause()
        assert reader.poll(30)
        assert reader.recv() is False
        assert lock.is_held
        assert (tmp_path / LOCK).exists()
    try:
        with FolderLock(tmp_path):  # the child lives
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


class TestOwners:
    """All functions that write to a folder own it."""

    problem = dln.low_rank_recovery(6, 1)
    weights = dln.orthogonal([6] * 3)
    completion = dln.low_rank_completion(12, 1, observed=0.8)

    def train(self, folder, **more):
        return dln.train(
            self.problem, self.weights, learning_rate=0.3, steps=3, n_threads=1, checkpoint=folder, **more
        )

    def batch(self, folder):
        return dln.train_batch(
            self.problem, self.weights, learning_rate=[0.1, 0.2], steps=3, n_threads=1, checkpoint=folder
        )

    def turns(self, folder):
        lazy_weights = dln.orthogonal([12] * 3, scale=1e-2, implicit=True)
        options = {"rank": 1, "steps": 4, "outer_every": 2, "n_threads": 1}
        return dln.train_compressed(self.completion, lazy_weights, **options, checkpoint=folder)

    def torch(self, folder):
        import_torch()
        return self.train(folder, engine="torch")

    @pytest.mark.parametrize("name", ["train", "batch", "turns", "torch"])
    def test_a_second_owner_is_refused(self, name, tmp_path):
        run = getattr(self, name)
        with RunFolder(tmp_path).owned():
            with pytest.raises(FolderInUseError, match=str(os.getpid())):
                run(tmp_path)
            assert [path.name for path in tmp_path.iterdir()] == [LOCK]
        run(tmp_path)
        assert not (tmp_path / LOCK).exists()
        with RunFolder(tmp_path).owned():
            run(tmp_path)  # it is finished, and loaded

    def test_a_second_fit_is_refused(self, tmp_path):
        matrix = np.outer(np.arange(1.0, 9.0), np.arange(1.0, 8.0)) + np.eye(8, 7)
        options = {"rank": 1, "steps": 4, "n_threads": 1, "checkpoint": tmp_path}
        dln.MatrixCompletion(**options).fit(matrix)
        (folder,) = tmp_path.iterdir()
        with RunFolder(folder).owned(), pytest.raises(FolderInUseError):
            dln.MatrixCompletion(**options).fit(matrix)

    def test_a_run_within_a_run_is_refused_and_the_outer_one_continues(self, tmp_path):
        refused = []

        def again(step, loss):
            with pytest.raises(FolderInUseError) as caught:
                self.train(tmp_path)
            refused.append(caught.value)
            assert len(dln.load(tmp_path).loss) <= step + 1  # readers need no lock

        run = self.train(Checkpoint(tmp_path, every=1, seconds=0), record=dln.Record(callback=again))
        assert len(refused) == 4
        np.testing.assert_array_equal(run.loss, self.train(tmp_path / "other").loss)

    def test_nothing_is_written_without_the_lock(self, tmp_path):
        folder = RunFolder(tmp_path, "identity")
        with folder.owned():
            folder.begin({}, {})
        with pytest.raises(FolderInUseError, match="is not owned by this process"):
            folder.write_state(State(0, 0.0, {}))
        with pytest.raises(FolderInUseError):
            folder.go_back_to(-1)


def test_the_next_owner_removes_temporary_files_of_killed_owners(tmp_path):
    own = ["state-000000000000003.npz.17.0a1b2c3d.part", "run.npz.17.0a1b2c3d.part"]
    others = ["picture.png.17.0a1b2c3d.part", "state.npz.part", "notes.part"]
    for name in own + others:
        (tmp_path / name).write_bytes(b"half")
    with RunFolder(tmp_path).owned():
        assert {path.name for path in tmp_path.iterdir()} == {*others, LOCK}
    assert {path.name for path in tmp_path.iterdir()} == set(others)


def test_the_command_line_names_the_owner_of_a_folder(tmp_path, capsys):
    from dlnfast.cli import main

    problem, weights = dln.low_rank_recovery(6, 1), dln.orthogonal([6] * 3)
    dln.train(problem, weights, learning_rate=0.1, steps=3, engine="dense", checkpoint=tmp_path)
    (tmp_path / "end.json").unlink()  # as if it had been killed at the end
    with FolderLock(tmp_path):
        assert main(["resume", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dlnfast: {tmp_path} is in use by process {os.getpid()}")
    assert error.count("\n") == 1
