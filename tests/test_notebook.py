# SPDX-License-Identifier: MIT
"""The notebook of the examples: its saved outputs, and its cells run as programs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "talk.ipynb"
BOOK = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
ALL_CODE = [cell for cell in BOOK["cells"] if cell["cell_type"] == "code"]
CODE = [cell for cell in ALL_CODE if "install" not in cell["metadata"].get("tags", [])]
OUTPUTS = [output for cell in CODE for output in cell["outputs"]]
MOST_BYTES = 1_500_000


def cell_source(cell):
    return "".join(cell["source"])


def tagged(cell, tag):
    return tag in cell["metadata"].get("tags", [])


def run_cells(cells, folder, **variables):
    """Run cells as one program, without a notebook around them."""
    program = folder / "cells.py"
    program.write_text("\n\n".join(map(cell_source, cells)), encoding="utf-8")
    environment = {**os.environ, "MPLBACKEND": "agg", **variables}
    done = subprocess.run(
        [sys.executable, program.name],
        cwd=folder,
        env={name: value for name, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_code_cell_was_run_in_order_and_shows_something():
    assert [cell["execution_count"] for cell in ALL_CODE] == list(range(1, len(ALL_CODE) + 1))
    assert all(cell["outputs"] for cell in CODE)


def test_the_first_code_cell_installs_on_colab_and_does_nothing_elsewhere(tmp_path):
    first, *others = ALL_CODE
    assert tagged(first, "install")
    assert others == CODE
    assert first["outputs"] == []
    assert run_cells([first], tmp_path) == ""
    colab = (
        "import subprocess, sys\nsys.modules['google.colab'] = sys\nsubprocess.run = lambda *a, **_: print(a)"
    )
    printed = run_cells([{"source": [colab]}, first], tmp_path)
    assert "'-m', 'pip', 'install', '--quiet', 'dlnfast'" in printed


def test_every_code_cell_has_one_picture():
    for cell in CODE:
        pictures = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
        assert len(pictures) == 1, cell_source(cell)


def test_outputs_are_printed_lines_and_pictures_only():
    for output in OUTPUTS:
        if output["output_type"] == "stream":
            assert output["name"] == "stdout", output
        else:
            assert output["output_type"] == "display_data"
            assert list(output["data"]) == ["image/png"]


def test_the_notebook_is_small():
    assert NOTEBOOK.stat().st_size < MOST_BYTES


def test_outputs_contain_no_paths_or_times():
    assert BOOK["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(set(cell["metadata"]) <= {"tags"} for cell in BOOK["cells"])
    text = "".join(cell_source(cell) for cell in BOOK["cells"])
    text += "".join("".join(output.get("text", "")) for output in OUTPUTS)
    assert not re.search(r"(?<![\w.:/])/(home|root|tmp|Users|usr|work)\b|[A-Z]:\\", text)


def test_links_have_a_target():
    text = "".join(cell_source(cell) for cell in BOOK["cells"] if cell["cell_type"] == "markdown")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", link)]
    assert links
    for link in links:
        assert (NOTEBOOK.parent / link).exists(), link


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_the_cells_pass_ruff(command):
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", NOTEBOOK.name],
        cwd=NOTEBOOK.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_cells_without_torch_run(tmp_path):
    printed = run_cells([cell for cell in CODE if not tagged(cell, "torch")], tmp_path)
    # 2 layers of d = 30 and 10^6, plateaus, features; Gaussian weights, the edge and three completions.
    assert printed.count("reduced engine: the closure holds") == 4
    assert printed.count("dense engine: ") == 5


@pytest.mark.parametrize("data", ["as it is set", "unset"])
def test_the_cells_with_torch_run(tmp_path, data):
    pytest.importorskip("torch", reason="PyTorch is optional")
    cells = [cell for cell in CODE if tagged(cell, "setup") or tagged(cell, "torch")]
    if data == "unset":
        cells = [cell for cell in cells if tagged(cell, "setup") or "DLNFAST_DATA" in cell_source(cell)]
        printed = run_cells(cells, tmp_path, DLNFAST_DATA=None)
        assert "Gaussian classes" in printed
    else:
        printed = run_cells(cells, tmp_path)
        assert "Deep LoRA: error" in printed
    assert "energy of the change" in printed
