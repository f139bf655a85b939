# SPDX-License-Identifier: MIT
"""Modules import only from packages that come earlier in `ORDER`, without circular imports.

The sources are parsed, not executed. Imports inside functions and imports for the type checker count like
all others.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import dlnfast

TREE = Path(__file__).parents[1]
sys.path.insert(0, str(TREE / "tools"))

from measure_tree import Package, cycles, longest_chain  # noqa: E402

PACKAGE = Package(Path(dlnfast.__file__).parent)
IMPORTS = {module: PACKAGE.imports(module) for module in PACKAGE.sources}
GRAPH = {module: {item.module for item in found} for module, found in IMPORTS.items()}

#: Entries of the package's folder, lowest first; each imports from itself and from those before it. "" is
#: `dlnfast/__init__.py`.
ORDER = (
    "_version",
    "_support",  # errors, arrays, files, threads: no mathematics of networks
    "_datasets",
    "_problem",
    "reference",
    "_noise",
    "measures",
    "theory",
    "optimizers",
    "_weights",
    "_closure",
    "_tracking",
    "_trajectory",
    "_training",
    "_completion",
    "_config",
    "plots",
    "torch",
    "integrations",
    "benchmarks",
    "figures",
    "_commands",
    "",
    "cli",
    "__main__",
)

#: The longest chain of imports that a reader has to follow, in modules. One of them, `_problem.kinds`, only
#: names the union of the kinds of problems.
LONGEST_CHAIN = 15

#: Packages outside the standard library that a module may import at its top level.
OUTSIDE = {
    "torch": {"torch", "numpy"},
    "integrations": {"torch", "numpy", "lightning", "transformers", "peft", "packaging"},
}


def entry_of(module: str) -> str:
    return module.partition(".")[0]


def test_every_entry_of_the_package_is_in_the_order():
    assert set(PACKAGE.entries()) == set(ORDER) - {""}


@pytest.mark.parametrize("module", GRAPH)
def test_modules_import_only_lower_packages(module):
    position = ORDER.index(entry_of(module))
    up = [
        f"line {i.line}: {i.module}"
        for i in PACKAGE.imports(module)
        if ORDER.index(entry_of(i.module)) > position
    ]
    assert not up, f"{module} imports from later entries of ORDER"


def test_there_are_no_circular_imports():
    assert cycles(GRAPH) == []


def test_the_longest_chain_of_imports_is_short():
    assert len(longest_chain(GRAPH)) <= LONGEST_CHAIN


@pytest.mark.parametrize("module", GRAPH)
def test_optional_packages_are_imported_where_they_are_needed(module):
    allowed = OUTSIDE.get(entry_of(module), {"numpy"})
    assert PACKAGE.imports_from_outside(module) - set(sys.stdlib_module_names) <= allowed


def test_circular_imports_are_found_at_any_position(tmp_path):
    package = tmp_path / "sample"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("def f():\n    from . import b\n")
    (package / "c.py").write_text("from .a import f\n")
    (package / "b.py").write_text("from __future__ import annotations\nfrom typing import TYPE_CHECKING\n")
    assert cycles(Package(package).graph()) == []
    with (package / "b.py").open("a") as file:
        file.write("if TYPE_CHECKING:\n    from .a import f\n")
    graph = Package(package).graph()
    assert cycles(graph) == [["a", "b"]]
    assert longest_chain(graph) == ["c", "a = b"]
