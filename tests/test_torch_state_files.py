# SPDX-License-Identifier: MIT
"""Reading files of `torch.save`."""

from __future__ import annotations

import errno

import pytest
from faults import Faults, count

torch = pytest.importorskip("torch")

from dlnfast.torch._state_files import read_state_file  # noqa: E402


def written(tmp_path, content):
    path = tmp_path / "state.pt"
    torch.save(content, path)
    return path


def test_the_content_is_that_of_torch_load(tmp_path):
    path = written(tmp_path, {"weights": [torch.arange(7.0), torch.ones(3, 2)], "step": 4})
    found = read_state_file(path, "a state")
    assert found["step"] == 4
    torch.testing.assert_close(found["weights"], [torch.arange(7.0), torch.ones(3, 2)], rtol=0, atol=0)


def test_every_failed_read_raises_the_error_of_the_disk(tmp_path):
    path = written(tmp_path, {f"weight {i}": torch.randn(40, 50) for i in range(20)})
    operations = count(tmp_path, lambda: read_state_file(path, "a state"))
    reads = [number for number, (name, _) in enumerate(operations) if name == "read"]
    assert len(reads) > 20
    for number in reads:
        with Faults(tmp_path, "EIO", (number,)), pytest.raises(OSError, match="Input/output error") as caught:
            read_state_file(path, "a state")
        assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_incomplete_files_are_named(tmp_path, part):
    path = written(tmp_path, {"weight": torch.ones(30)})
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=r"state\.pt cannot be read as a state: "):
        read_state_file(path, "a state")


def test_other_content_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as a state: it has other content"):
        read_state_file(written(tmp_path, torch.ones(3)), "a state")
    with pytest.raises(ValueError, match="cannot be read as a state: state was changed"):
        read_state_file(written(tmp_path, {"weight": torch.ones(2), "checksum": "0"}), "a state")
