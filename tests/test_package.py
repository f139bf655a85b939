# SPDX-License-Identifier: MIT
"""The package as installed: names, version, docstrings, examples. Its stubs: test_stubs.py."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import importlib.util
import pkgutil
from pathlib import Path

import pytest

import dlnfast

PACKAGE = Path(dlnfast.__file__).parent
MODULES = sorted(
    m.name for m in pkgutil.walk_packages([str(PACKAGE)], "dlnfast.") if not m.name.endswith("__main__")
)
SOURCES = [m for m in MODULES if not m.split(".")[-1].startswith(("_core", "_cpu"))]


def test_the_version_is_the_same_everywhere(core):
    assert core.build_info()["version"] == dlnfast.__version__
    try:
        installed = importlib.metadata.version("dlnfast")
    except importlib.metadata.PackageNotFoundError:
        return  # run from a source tree
    assert installed == dlnfast.__version__


def test_all_public_names_exist_and_are_sorted():
    assert list(dlnfast.__all__) == sorted(dlnfast.__all__)
    for name in dlnfast.__all__:
        if name == "torch" and importlib.util.find_spec("torch") is None:
            continue
        assert getattr(dlnfast, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = dlnfast.nonsense


SOURCE_KINDS = {
    "*.py": "#",
    "*.pyi": "#",
    "*.cmake": "#",
    "CMakeLists.txt": "#",
    "*.hpp": "//",
    "*.cpp": "//",
}


def test_every_source_file_names_its_licence():
    tree = Path(__file__).parents[1]
    looked_at = 0
    for folder in ("python", "cpp", "cmake", "tests", "bench", "fuzz"):
        for kind, mark in SOURCE_KINDS.items():
            for path in (tree / folder).rglob(kind):
                lines = path.read_text(encoding="utf-8").split("\n")
                first = lines[1] if lines[0].startswith("#!") else lines[0]
                assert first == f"{mark} SPDX-License-Identifier: MIT", path
                looked_at += 1
    assert looked_at > 200


def load(module_name):
    """Return a module, or None where it is for a package that is not installed."""
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        assert not str(error.name).startswith("dlnfast"), error
        return None


@pytest.mark.parametrize("module_name", SOURCES)
def test_examples_in_docstrings_run(module_name):
    module = load(module_name)
    if module is None:
        pytest.skip(f"{module_name} needs a package that is not installed")
    # In an empty namespace, because users paste them from help().
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder().find(module, globs={}):
        runner.run(example)
    assert runner.summarize().failed == 0
