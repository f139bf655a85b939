# SPDX-License-Identifier: MIT
"""Reading needs memory in proportion to the file; a failed write preserves the previous file."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import stat
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.files import file_names
from helpers.memory import peak_bytes

import dlnfast as dln
from dlnfast._config import finetuning, spec
from dlnfast._datasets import text as tasks
from dlnfast._support.files import (
    DamagedFileError,
    atomic_file,
    atomic_path,
    read_arrays,
    read_text,
    read_whole,
    with_checksum,
    without_checksum,
    write_whole,
)

KIND = "a test's arrays"
ARRAYS = {
    "a": np.arange(12.0).reshape(3, 4),
    "b": np.asfortranarray(np.arange(12.0).reshape(3, 4)[::-1]),
    "c": np.array([[True, False]]),
    "text": np.array(["ä", "bc"]),
    "empty": np.empty((0, 7), dtype=np.float32),
    "scalar": np.array(3),
}
posix = pytest.mark.skipif(os.name != "posix", reason="files of other kinds are POSIX's")


def assert_same_arrays(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "a.npz"
    write_whole(path, KIND, 1, {"x": [1, 2.5], "y": {"z": None}}, ARRAYS)
    return path


def read_members(path):
    with zipfile.ZipFile(path) as file:
        return {info.filename: file.read(info) for info in file.infolist()}


def rewrite(path, parts, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, part in parts.items():
            file.writestr(name, part)


def npy(shape, descr="<f8", content=b""):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue() + content


# ------------------------------------------------------------------------------- valid archives


def test_written_files_are_read(archive):
    meta, arrays = read_whole(archive, KIND, 1)
    assert_same_arrays(arrays, ARRAYS)
    assert (meta["x"], meta["y"]) == ([1, 2.5], {"z": None})
    assert "digest" not in meta


def test_numpy_reads_the_same_arrays(archive):
    with np.load(archive, allow_pickle=False) as file:
        assert_same_arrays({name: file[name] for name in ARRAYS}, ARRAYS)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_recompressed_archives_are_read(archive, method):
    parts = read_members(archive)
    rewrite(archive, dict(reversed(parts.items())), method)
    assert_same_arrays(read_whole(archive, KIND, 1)[1], ARRAYS)


def test_files_without_a_digest_are_read(archive):
    parts = read_members(archive)
    meta = json.loads(str(np.load(io.BytesIO(parts["meta.npy"]))))
    del meta["digest"]
    stream = io.BytesIO()
    np.save(stream, np.array(json.dumps(meta)))
    rewrite(archive, parts | {"meta.npy": stream.getvalue()})
    assert_same_arrays(read_whole(archive, KIND, 1)[1], ARRAYS)


# ----------------------------------------------------------------------------- manipulated archives


def changes():
    def exchanged(parts):
        return parts | {"a.npy": parts["b.npy"], "b.npy": parts["a.npy"]}

    def flipped(parts):
        part = bytearray(parts["a.npy"])
        part[-1] ^= 1
        return parts | {"a.npy": bytes(part)}

    def without(parts):
        return {name: part for name, part in parts.items() if name != "scalar.npy"}

    def renamed(parts):
        return {name.replace("scalar", "number"): part for name, part in parts.items()}

    def more(parts):
        return parts | {"more.npy": parts["scalar.npy"]}

    def meta(parts):
        text = str(np.load(io.BytesIO(parts["meta.npy"]))).replace("2.5", "2.6")
        stream = io.BytesIO()
        np.save(stream, np.array(text))
        return parts | {"meta.npy": stream.getvalue()}

    return [exchanged, flipped, without, renamed, more, meta]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_changes_with_valid_zip_checksums_are_detected(change, archive):
    rewrite(archive, change(read_members(archive)))
    with zipfile.ZipFile(archive) as file:
        assert file.testzip() is None
    with pytest.raises(DamagedFileError, match=r"a\.npz is not .* is not the one that was written"):
        read_whole(archive, KIND, 1)


FORGED = {
    "larger than its bytes": (npy((2**40,)), "declared as float64 of shape"),
    "a product beyond 64 bits": (npy((2**62, 4)), "declared as float64 of shape"),
    "negative": (npy((-2, -3), content=bytes(48)), "declared as float64 of shape"),
    "shorter than its bytes": (npy((2,), content=bytes(24)), "but 24 bytes"),
    "objects": (npy((1,), "|O", bytes(8)), "array of object"),
    "records": (npy((1,), [("x", "<f8")], bytes(8)), "wanted numbers or text"),
    "dates": (npy((1,), "<M8[s]", bytes(8)), "wanted numbers or text"),
    "no size": (npy((10**12,), "|V0"), "wanted numbers or text"),
    "no array": (b"PK\x03\x04" * 9, "no array of numbers or text"),
    "a header of 4 GB": (b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(999), "header takes more than"),
    "nested brackets": (b"\x93NUMPY\1\0\x10\x27" + b"(" * 10_000, "header is damaged"),
    "an open bracket": (b"\x93NUMPY\1\0\x09\0{'descr': ", "header is damaged"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_arrays_are_refused_before_memory_is_allocated(kind, archive):
    part, message = FORGED[kind]
    rewrite(archive, read_members(archive) | {"a.npy": part})

    def read():
        with pytest.raises(DamagedFileError, match=message):
            read_whole(archive, KIND, 1)

    assert peak_bytes(read) < 2**22


def bomb(path, name, size, mode="a"):
    """Write an array of zeros into an archive that compresses it to a thousandth."""
    with zipfile.ZipFile(path, mode, zipfile.ZIP_DEFLATED) as file, file.open(name, "w") as member:
        member.write(npy((size // 8,)))
        for _ in range(size // 2**20):
            member.write(bytes(2**20))


@pytest.mark.parametrize("name", ["zzz.npy", "meta.npy"])
def test_decompression_bombs_are_refused_before_memory_is_allocated(name, tmp_path):
    path = tmp_path / "a.npz"
    write_whole(path, KIND, 1, {}, {"a": np.eye(2)} | ({} if name == "zzz.npy" else {"b": np.eye(2)}))
    parts = read_members(path)
    parts.pop(name, None)
    rewrite(path, parts)
    bomb(path, name, 2**27)

    def read():
        with pytest.raises(
            DamagedFileError, match=r"its content would take 134\d{6} bytes, and the file has"
        ):
            read_whole(path, KIND, 1)

    assert peak_bytes(read) < 2**23


def test_only_the_requested_arrays_of_users_are_read(tmp_path):
    path = tmp_path / "a.npz"
    inputs, outputs = np.eye(3), np.arange(3)
    np.savez_compressed(path, X=inputs, Y=outputs)
    bomb(path, "Z.npy", 2**27)

    def read():
        problem, _ = spec.make_problem(
            spec.check_spec(
                {
                    "problem": {"kind": "npz", "path": str(path)},
                    "weights": {"depth": 2},
                    "train": {"learning_rate": 0.1, "steps": 1},
                }
            )
        )
        assert problem.n_samples == 3

    assert peak_bytes(read) < 2**23
    with pytest.raises(ValueError, match="its content would take"):
        read_arrays(path, ["Z"])
    # Arrays that users compressed strongly can still be read.
    assert read_arrays(path, ["Z"], bounded=False)["Z"].shape == (2**24,)


def test_compressed_arrays_with_too_few_bytes_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    forged = npy((2**25,))
    rewrite(path, {"X.npy": forged + bytes(80)}, zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    for position in [i for i in range(len(content)) if content[i : i + 2] == b"PK"]:
        offset = {b"\3\4": 22, b"\1\2": 24}.get(bytes(content[position + 2 : position + 4]))
        if offset is not None:
            content[position + offset : position + offset + 4] = (len(forged) + 2**28).to_bytes(4, "little")
    path.write_bytes(content)

    def read():
        with pytest.raises((ValueError, EOFError, zipfile.BadZipFile)):
            read_arrays(path, ["X"], bounded=False)

    assert peak_bytes(read) < 2**23


def test_two_members_of_one_name_are_refused(archive):
    parts = list(read_members(archive).items())
    with zipfile.ZipFile(archive, "w") as file:
        for name, part in [*parts, parts[0]]:
            if name in file.NameToInfo:
                with pytest.warns(UserWarning, match="Duplicate"):
                    file.writestr(name, part)
            else:
                file.writestr(name, part)
    with pytest.raises(DamagedFileError, match="two arrays of one name"):
        read_whole(archive, KIND, 1)


def test_a_directory_without_arrays_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    entry = b"PK\x01\x02" + bytes(24) + (1).to_bytes(2, "little") + bytes(16) + b"x"
    entries = entry * 100_000
    end = (
        b"PK\x05\x06" + bytes(4) + b"\xff\xff" * 2 + len(entries).to_bytes(4, "little") + bytes(4) + bytes(2)
    )
    path.write_bytes(b"PK\x03\x04" + entries + end)

    def read():
        with pytest.raises(DamagedFileError, match="its directory takes"):
            read_whole(path, KIND, 1)

    assert peak_bytes(read) < 2**20


def test_errors_of_the_system_are_not_reported_as_damage(archive, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr("dlnfast._support.files._read_header", fail)
    with pytest.raises(OSError, match="input/output error") as caught:
        read_whole(archive, KIND, 1)
    assert not isinstance(caught.value, ValueError)


def test_images_need_memory_in_proportion_to_their_file(tmp_path):
    count = 2**27 // 784
    header = bytes((0, 0, 8, 3)) + np.array((count, 28, 28), ">u4").tobytes()
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(header)
        for _ in range(128):
            file.write(bytes(2**20))
    labels = bytes((0, 0, 8, 1)) + np.array((count,), ">u4").tobytes() + bytes(count)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)

    def read():
        with pytest.raises(ValueError, match=r"idx3-ubyte\.gz (is too long|has \d+ bytes, too few)"):
            dln.load_fashion_mnist(tmp_path)

    assert peak_bytes(read) < 2**26


# ------------------------------------------------------------------------------------------------ text

TOML = '[problem]\nkind = "low-rank-recovery"\ndim = 8\nrank = 2\n[weights]\ndepth = 3\n'
TOML += "[train]\nlearning_rate = 0.1\nsteps = 2\n"


@pytest.mark.parametrize(
    "content", [TOML.encode("utf-8-sig"), TOML.replace("\n", "\r\n").encode(), TOML.encode()]
)
def test_specifications_in_every_common_encoding_are_read(content, tmp_path):
    (tmp_path / "a.toml").write_bytes(content)
    assert spec.read_spec(tmp_path / "a.toml").problem["dim"] == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TOML.encode("utf-16"), "UTF-16 or UTF-32; wanted UTF-8"),
        (TOML.encode("utf-16-le"), "zero bytes, as UTF-16"),
        (TOML.encode("utf-32"), "UTF-16 or UTF-32; wanted UTF-8"),
        (b"# caf\xe9\n" + TOML.encode(), "is not text in UTF-8"),
        (b"a = " + b"[" * 100_000, "nested too deeply|is not a TOML file"),
        (b"a = " + b"9" * 10_000, "is not a TOML file"),
    ],
)
def test_other_text_is_refused_with_its_encoding(content, message, tmp_path):
    (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(spec.SpecError, match=message):
        spec.read_spec(tmp_path / "a.toml")


def test_byte_order_marks_are_skipped(tmp_path):
    (tmp_path / "ratings.csv").write_bytes(b"\xef\xbb\xbfuserId,movieId,rating,timestamp\r\n1,2,3.5,4\r\n")
    assert dln.load_movielens(tmp_path / "ratings.csv").ratings.tolist() == [3.5]
    line = json.dumps({"run": 1}).encode() + b"\n"
    (tmp_path / "results.jsonl").write_bytes(b"\xef\xbb\xbf" + line)
    assert finetuning.Results(tmp_path / "results.jsonl").records == [{"run": 1}]
    (tmp_path / "text").write_bytes("\ufeffä".encode())
    assert read_text(tmp_path / "text") == "ä"


def test_endless_lines_are_refused(tmp_path):
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2,3.5," + "4" * 10**6)
    with pytest.raises(ValueError, match="has a line of more than"):
        dln.load_movielens(tmp_path / "ratings.csv")
    (tmp_path / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\t" + "a" * 200_000)
    with pytest.raises(ValueError, match=r"line \d of .* is damaged"):
        tasks.load_task("rte", tmp_path, "dev")
    (tmp_path / "dev.tsv").write_bytes(b"index\tsentence1\tsentence2\tlabel\n0\tcaf\xe9\tb\tentailment\n")
    with pytest.raises(ValueError, match=r"line \d of .* is damaged"):
        tasks.load_task("rte", tmp_path, "dev")


# --------------------------------------------------------------------------------- JSON with checksums


def test_checksums_detect_changed_numbers():
    content = with_checksum({"a": 1, "b": [0.1, None], "c": "ä"})
    assert without_checksum(json.loads(json.dumps(content))) == {"a": 1, "b": [0.1, None], "c": "ä"}
    assert without_checksum({"a": 1}) == {"a": 1}  # of a file of 0.1.0
    with pytest.raises(ValueError, match="its checksum does not match"):
        without_checksum(content | {"a": 2})


def outcome(*, seed, score):
    run = {"method": "lora", "rank": 2, "n_examples": 8, "seed": seed, "eta": 0.1}
    return {"run": run, "about": {}, "scores": {"report": score}, "ranks": {"a": 1}, "update_norm": 1.0}


@pytest.fixture
def results_file(tmp_path):
    """Return a file with the results of two runs."""
    path = tmp_path / "results.jsonl"
    results = finetuning.Results(path)
    for seed in range(2):
        results._write(outcome(seed=seed, score=0.5))
    return path


def test_results_are_read_in_their_order(results_file):
    assert [record["run"]["seed"] for record in finetuning.Results(results_file).records] == [0, 1]


def test_a_changed_number_in_results_is_noticed(results_file):
    results_file.write_bytes(results_file.read_bytes().replace(b"0.5", b"0.6", 1))
    with pytest.raises(ValueError, match=r"line 1 of .* its checksum does not match"):
        finetuning.Results(results_file)


def test_an_incomplete_line_of_results_is_removed_by_the_next_write_only(results_file):
    """Another process may be writing it."""
    content = results_file.read_bytes()
    results_file.write_bytes(content[:-20])
    again = finetuning.Results(results_file)
    assert len(again.records) == 1
    assert results_file.read_bytes() == content[:-20]
    again._write(outcome(seed=1, score=0.5))
    assert results_file.read_bytes() == content


def test_results_of_0_1_0_have_no_checksum(tmp_path):
    path = tmp_path / "results.jsonl"
    old = outcome(seed=0, score=0.5)
    old["run"]["learning_rate"] = old["run"].pop("eta")
    del old["update_norm"]
    path.write_text(json.dumps(old) + "\n")
    assert finetuning.Results(path).records == [old]


def test_results_have_to_be_numbers(tmp_path):
    path = tmp_path / "results.jsonl"
    whole = outcome(seed=0, score=0.5)
    for changed, message in (
        (whole | {"run": whole["run"] | {"rank": -1}}, "run.rank is -1"),
        (whole | {"run": whole["run"] | {"eta": "fast"}}, "run.eta is 'fast'"),
        (whole | {"update_norm": -1.0}, "update_norm is -1"),
        (whole | {"scores": {"report": "high"}}, "scores.report is 'high'"),
        ({"about": {}}, "'run'"),
    ):
        path.write_text(json.dumps(changed) + "\n")
        with pytest.raises(ValueError, match=f"line 1 of .* is damaged: .*{message}"):
            finetuning.Results(path)


# --------------------------------------------------------------------------------------------- writing


def put(path, content):
    with atomic_file(path) as file:
        file.write(content)


@pytest.fixture
def linked_files(tmp_path):
    """Return a link to a link, the link, and the file in another folder to which both point."""
    (tmp_path / "disk").mkdir()
    target, link, second = tmp_path / "disk" / "run.npz", tmp_path / "link.npz", tmp_path / "second.npz"
    target.write_bytes(b"old")
    link.symlink_to("disk/run.npz")
    second.symlink_to(link)
    return second, link, target


@posix
def test_the_target_of_a_symbolic_link_is_replaced(linked_files):
    second, link, target = linked_files
    put(second, b"new")
    assert link.is_symlink()
    assert second.is_symlink()
    assert target.read_bytes() == b"new"
    assert not target.is_symlink()
    assert file_names(target.parent) == ["run.npz"]


@posix
def test_a_link_may_name_a_file_that_is_not_there_yet(linked_files):
    _, link, target = linked_files
    target.unlink()
    put(link, b"first")
    assert target.read_bytes() == b"first"


@posix
def test_a_failed_write_through_a_link_changes_nothing(linked_files, tmp_path):
    _, link, target = linked_files

    def fail():
        with atomic_file(link) as file:
            file.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert target.read_bytes() == b"old"
    assert file_names(tmp_path) == ["disk", "link.npz", "second.npz"]


@posix
def test_errors_name_broken_links(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "none" / "run.npz")
    with pytest.raises(FileNotFoundError, match="whose folder does not exist"):
        put(tmp_path / "a", b"")
    (tmp_path / "b").symlink_to(tmp_path / "c")
    (tmp_path / "c").symlink_to(tmp_path / "b")
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the system words it
        put(tmp_path / "b", b"")
    assert caught.value.errno == errno.ELOOP


@posix
def test_runs_are_saved_through_links(tmp_path):
    run = dln.train(dln.low_rank_recovery(4, 1), dln.orthogonal([4] * 3), learning_rate=0.1, steps=2)
    (tmp_path / "real.npz").touch()
    (tmp_path / "link.npz").symlink_to("real.npz")
    run.save(tmp_path / "link.npz")
    np.testing.assert_array_equal(dln.load(tmp_path / "real.npz").loss, run.loss)
    assert (tmp_path / "link.npz").is_symlink()
    dln.SufficientStatistics().add(np.eye(3), np.arange(3)).save(tmp_path / "link.npz")
    assert dln.SufficientStatistics.load(tmp_path / "real.npz").n_samples == 3


@posix
@pytest.mark.parametrize("device", ["/dev/null", "/dev/full"])
def test_devices_are_not_replaced(device, tmp_path):
    if not Path(device).exists():
        pytest.skip(f"there is no {device}")
    link = tmp_path / "link"
    link.symlink_to(device)
    run = dln.train(dln.low_rank_recovery(4, 1), dln.orthogonal([4] * 3), learning_rate=0.1, steps=2)
    for path in (Path(device), link):
        if device == "/dev/null":
            run.save(path)
        else:
            with pytest.raises(OSError) as caught:  # noqa: PT011
                run.save(path)
            assert caught.value.errno == errno.ENOSPC
        assert stat.S_ISCHR(path.stat().st_mode)
    assert link.is_symlink()


@posix
def test_pipes_are_written_into(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    run = dln.train(dln.low_rank_recovery(4, 1), dln.orthogonal([4] * 3), learning_rate=0.1, steps=2)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    run.save(pipe)
    reader.join(20)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "copy.npz").write_bytes(got[0])
    np.testing.assert_array_equal(dln.load(tmp_path / "copy.npz").loss, run.loss)


@posix
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors have names on Linux")
def test_open_descriptors_are_written_into(tmp_path):
    with (tmp_path / "log").open("wb", buffering=0) as log:
        log.write(b"before ")
        put(Path(f"/proc/self/fd/{log.fileno()}"), b"content")
        log.seek(0, os.SEEK_END)
        log.write(b" after")
    assert (tmp_path / "log").read_bytes() == b"before content after"


@posix
def test_permissions_of_a_replaced_file_are_kept(tmp_path):
    path = tmp_path / "a"
    before = os.umask(0o027)
    try:
        put(path, b"1")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        put(path, b"2")
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)


@posix
def test_an_error_names_a_folder_or_file_that_may_not_be_written(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    allowed = os.access

    def refuse(refused):  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != refused and allowed(p, mode))

    refuse(tmp_path)
    with pytest.raises(PermissionError, match="the folder cannot be written to") as caught:
        put(path, b"new")
    assert caught.value.filename == str(tmp_path)
    refuse(path)
    with pytest.raises(PermissionError, match="the existing file is read-only") as caught:
        put(path, b"new")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert file_names(tmp_path) == ["a"]


@pytest.mark.parametrize("letter", ["a", "ä", "界"])
def test_file_names_of_the_maximum_length_can_be_saved(letter, tmp_path):
    limit = os.pathconf(tmp_path, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    size = len(letter.encode())
    name = letter * (limit // size) + "x" * (limit % size)
    put(tmp_path / name, b"content")
    assert (tmp_path / name).read_bytes() == b"content"
    assert file_names(tmp_path) == [name]
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the system words it
        put(tmp_path / (name + "x"), b"content")
    assert caught.value.errno == errno.ENAMETOOLONG


@pytest.fixture
def fill(tmp_path):
    """Return a function that replaces the folder a.zarr by one with a file of this name."""

    def replace(name):
        with atomic_path(tmp_path / "a.zarr") as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)

    return replace


def test_a_folder_is_replaced_as_a_whole(fill, tmp_path):
    fill("old")
    fill("new")
    assert file_names(tmp_path / "a.zarr") == ["new"]
    assert file_names(tmp_path) == ["a.zarr"]


@pytest.fixture
def without_exchange(monkeypatch):
    """Run on a system that cannot exchange two names in one step."""
    monkeypatch.setattr("dlnfast._support.files._exchange_names", lambda *_: False)


@pytest.mark.usefixtures("without_exchange")
def test_a_folder_is_replaced_as_a_whole_on_systems_without_an_exchange_of_names(fill, tmp_path):
    fill("old")
    fill("newer")
    assert file_names(tmp_path / "a.zarr") == ["newer"]
    assert file_names(tmp_path) == ["a.zarr"]


@pytest.mark.usefixtures("without_exchange")
def test_a_folder_that_cannot_be_replaced_is_restored(fill, tmp_path, monkeypatch):
    folder = tmp_path / "a.zarr"
    rename = Path.rename

    def fail(self, target):
        if Path(target) == folder and self.name.endswith(".part") and (self / "third").exists():
            raise OSError(errno.EIO, "input/output error")
        return rename(self, target)

    fill("newer")
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="input/output error"):
        fill("third")
    assert file_names(folder) == ["newer"]
    assert file_names(tmp_path) == ["a.zarr"]


def test_a_folder_is_not_written_as_a_file(tmp_path):
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "a", tmp_path / ".."):
        with pytest.raises(IsADirectoryError):
            put(path, b"")
    assert file_names(tmp_path) == ["a"]


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "run.npz").mkdir()
    run = dln.train(dln.low_rank_recovery(6, 1), dln.orthogonal([6] * 3), learning_rate=0.1, steps=3)
    with pytest.raises(IsADirectoryError) as caught:
        run.save(tmp_path / "run.npz")
    assert caught.value.filename == str(tmp_path / "run.npz")
    assert os.listdir(tmp_path) == ["run.npz"]
