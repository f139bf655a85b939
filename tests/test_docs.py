# SPDX-License-Identifier: MIT
"""The examples of README and docs run, page by page, each as one program.

Examples that need a cluster are marked as ``py``, not ``python``, and are not run.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Packages that the examples of a page need.
NEEDED = {
    "README": ["torch"],
    "adapters": ["torch", "safetensors"],
    "checkpoints": ["torch", "matplotlib"],
    "completion": ["pandas"],
    "data": ["dask"],
    "deep_lora": ["torch", "peft", "safetensors"],
    "live": ["torch"],
    "losses": ["torch"],
    "low-rank-training": ["torch"],
    "networks": ["torch"],
    "pytorch": ["torch"],
    "runs": ["xarray", "zarr", "h5netcdf"],
    "sharded": ["torch"],
    "shrink": ["torch"],
    "sweeps": ["pandas", "distributed"],
    "threads": ["torch"],
}


def examples(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page, tmp_path):
    for package in NEEDED.get(page.stem, []):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    program = tmp_path / f"{page.stem}.py"
    program.write_text("\n".join(examples(page)), encoding="utf-8")
    variables = os.environ | {"MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, program.name]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def links(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", link)]


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.stem
)
def test_links_have_a_target(page):
    for link in links(page):
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            known = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in known, link
