# SPDX-License-Identifier: MIT
"""CONTRIBUTING, the pages for developers and the gallery name existing files, commands and figures."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from dlnfast import figures
from dlnfast.benchmarks.cases import CASES
from dlnfast.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "develop").glob("*.md"))]
#: Folders relative to which the pages name files, besides the root.
BASES = (
    *("python", "python/dlnfast", "python/dlnfast/_training", "python/dlnfast/torch"),
    *("cpp/include/dlnfast", "cpp/src", "cpp/bindings", "cpp/tests", "tests", "tools", "docs"),
)
#: Paths that exist only after a build or a run, and folders that source distributions leave out.
GENERATED = re.compile(r"(build|dist|out|runs)\b|results\.json|scaling\.json|timings\.jsonl")
LEFT_OUT = re.compile(r"\.ci\b|\.github\b|contrib\b")
#: Files are named with these endings, folders with a slash.
FILE = re.compile(r"[\w./-]+\.(?:py|pyi|md|toml|txt|yaml|yml|json|jsonl|ipynb|hpp|cpp|cmake|cff)")
FOLDER = re.compile(r"\.?\w[\w.-]*(?:/[\w.-]+)+/?")


def code_spans(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)


def paths(page):
    """Return the paths that the code spans of a page name, without generated ones and placeholders."""
    found = set()
    for word in (word for span in code_spans(page) for word in re.split(r"[\s=]+", span)):
        is_path = FILE.fullmatch(word) or FOLDER.fullmatch(word)
        if is_path and "NAME" not in word and not GENERATED.match(word) and word != "image/png":
            found.add(word)
    return found


def exists(path):
    if LEFT_OUT.match(path) and not (ROOT / Path(path).parts[0]).exists():
        return True
    return any((ROOT / base / path).exists() for base in ("", *BASES))


def words_after(command, text):
    """Return the arguments of a command in code spans, up to the first option or operator."""
    found = set()
    for match in re.finditer(rf"{re.escape(command)} ([^`]*)", text):
        for word in match[1].split():
            if word[0] in "-&|" or not re.fullmatch(r"[\w-]+", word.rstrip(",")):
                break
            found.add(word.rstrip(","))
    return found - {"NAME"}


def text_of_pages():
    return "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_named_files_and_folders_exist(page):
    assert [path for path in sorted(paths(page)) if not exists(path)] == []


def test_paths_are_found():
    contributing, architecture = (paths(page) for page in (PAGES[0], ROOT / "docs/develop/architecture.md"))
    assert {"cpp/tests", "tests/test_options.py", "define.hpp", ".ci/run"} <= contributing
    assert {"_training/registry.py", "cpp/src/reduced_descent.cpp", "tests/test_layers.py"} <= architecture
    assert not exists("docs/no-such-page.md")


def test_the_named_sessions_of_nox_exist():
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    sessions = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and "nox.session" in map(ast.unparse, _callees(node))
    }
    named = words_after("nox -s", text_of_pages())
    assert {"asan", "fuzz", "wheel"} <= named <= sessions


def _callees(function):
    return [each.func if isinstance(each, ast.Call) else each for each in function.decorator_list]


def test_the_named_presets_of_cmake_exist():
    presets = json.loads((ROOT / "CMakePresets.json").read_text(encoding="utf-8"))
    names = {preset["name"] for preset in presets["testPresets"] if not preset.get("hidden")}
    named = set(re.findall(r"--preset (\w+)", text_of_pages()))
    assert {"dev"} <= named <= names


def test_the_named_commands_and_benchmark_cases_exist():
    text = text_of_pages()
    named = set(re.findall(r"`dlnfast ([a-z]+)\b", text))
    assert {"bench", "figure", "info"} <= named <= set(COMMANDS)
    cases = words_after("dlnfast bench --case", text)
    assert {"thin", "scaling", "track-share"} <= cases <= set(CASES)


def test_every_test_module_states_its_subject():
    modules = [*Path(__file__).parent.rglob("*.py"), *(ROOT / "bench").glob("*.py")]
    without = [path.name for path in modules if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert without == []


def test_the_gallery_shows_every_figure():
    text = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    thumbnails = re.findall(r'<img src="images/([\w-]+)\.png"', text)
    assert sorted(thumbnails) == sorted(figures.FIGURES)
    headings = set(re.findall(r"^## (.*)$", text, re.MULTILINE))
    assert set(figures.FIGURES) <= headings
    assert [name for name in thumbnails if not (ROOT / "docs" / "images" / f"{name}.png").exists()] == []


def test_architecture_names_every_module_of_torch():
    text = (ROOT / "docs" / "develop" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("The modules of `torch` by topic")[2].partition("Other folders:")[0]
    named = set(re.findall(r"`(\w+)(?:\.py)?`", table))
    entries = {path.stem for path in Path(figures.__file__).parents[1].joinpath("torch").iterdir()}
    assert {name for name in entries if not name.startswith("_")} <= named
