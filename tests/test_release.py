# SPDX-License-Identifier: MIT
"""The parts of a release agree: pyproject.toml, the recipe of conda-forge, the workflows and the docs."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

import dlnfast

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WHEELS = PROJECT["tool"]["cibuildwheel"]
CLASSIFIERS = PROJECT["project"]["classifiers"]
#: Names of packages that conda-forge calls otherwise.
CONDA_NAMES = {"matplotlib": "matplotlib-base", "cmeel-eigen": "eigen"}
#: {key of [tool.cibuildwheel]: classifier of the operating system}.
SYSTEMS = {
    "linux": "Operating System :: POSIX :: Linux",
    "macos": "Operating System :: MacOS",
    "windows": "Operating System :: Microsoft :: Windows",
}


def load_yaml(*path):
    yaml = pytest.importorskip("yaml", reason="PyYAML reads recipes and workflows")
    file = ROOT.joinpath(*path)
    if not file.exists():
        pytest.skip("source distributions leave the recipe and the workflows out")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.fixture
def recipe():
    return load_yaml("contrib", "conda", "recipe.yaml")


@pytest.fixture
def wheels_workflow():
    return load_yaml(".github", "workflows", "wheels.yml")


def conda_form(requirement):
    """Return a requirement of pip and the system it is for, as the recipe writes them."""
    text, _, marker = requirement.partition(";")
    name, limit = re.fullmatch(r"([\w-]+)(>=[\d.]+)", text.strip()).groups()
    assert marker.strip() in ("", "sys_platform == 'win32'")
    return f"{CONDA_NAMES.get(name, name)} {limit}", "win" if marker else None


def recipe_entries(entries):
    """Return {(requirement, system)} of a list of the recipe."""
    found = set()
    for entry in entries:
        if isinstance(entry, str):
            found.add((entry, None))
        else:
            then = entry["then"]
            found |= {(text, entry["if"]) for text in ([then] if isinstance(then, str) else then)}
    return found


def test_the_recipe_has_the_version_of_the_package(recipe):
    assert recipe["context"]["version"] == dlnfast.__version__
    assert recipe["context"]["name"] == PROJECT["project"]["name"]


def test_the_recipe_requires_the_packages_of_the_project(recipe):
    wanted = {conda_form(requirement) for requirement in PROJECT["project"]["dependencies"]}
    assert recipe_entries(recipe["requirements"]["run"]) == wanted | {("python", None)}


def test_the_recipe_builds_with_the_packages_of_the_project(recipe):
    wanted = {conda_form(requirement) for requirement in PROJECT["build-system"]["requires"]}
    assert wanted <= recipe_entries(recipe["requirements"]["host"])


def test_the_recipe_describes_the_package_as_the_project_does(recipe):
    about = recipe["about"]
    assert about["summary"] == PROJECT["project"]["description"]
    assert about["license"] == PROJECT["project"]["license"]
    assert about["license_file"] == PROJECT["project"]["license-files"]


def test_the_recipe_skips_the_pythons_that_the_project_refuses(recipe):
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert recipe["build"]["skip"] == f'match(python, "<{oldest}")'


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_recipe_and_the_wheels_have_the_same_options(recipe, system):
    environment = recipe["build"]["script"]["env"]
    assert environment["DLNFAST_SIMD"] == WHEELS[system]["environment"]["DLNFAST_SIMD"] == "dispatch"
    if system != "macos":  # packages of conda-forge share one OpenMP runtime there, wheels of PyPI do not
        choice = re.fullmatch(r'\$\{\{ "(\w+)" if win else "(\w+)" }}', environment["DLNFAST_OPENMP"])
        assert choice[1 if system == "windows" else 2] == WHEELS[system]["environment"]["DLNFAST_OPENMP"]


def test_there_is_a_wheel_for_each_python_of_the_classifiers():
    versions = [m[1] for c in CLASSIFIERS if (m := re.fullmatch(r"Programming .* (3\.\d+)", c))]
    assert WHEELS["build"] == [f"cp{version.replace('.', '')}-*" for version in versions]
    assert PROJECT["project"]["requires-python"] == f">={versions[0]}"


def test_there_are_wheels_for_each_system_of_the_classifiers():
    named = {c for c in CLASSIFIERS if c.startswith("Operating System")}
    assert named == set(SYSTEMS.values())
    assert set(SYSTEMS) <= set(WHEELS)


def test_the_workflow_builds_each_architecture_of_each_system(wheels_workflow):
    rows = wheels_workflow["jobs"]["wheels"]["strategy"]["matrix"]["include"]
    wanted = {f"{system}-{arch.lower()}" for system in SYSTEMS for arch in WHEELS[system]["archs"]}
    assert {row["system"] for row in rows} == wanted


def test_only_the_job_that_publishes_may_get_a_token_and_only_for_a_tag(wheels_workflow):
    jobs = wheels_workflow["jobs"]
    assert wheels_workflow["permissions"] == {"contents": "read"}
    assert [name for name, job in jobs.items() if "permissions" in job] == ["publish"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "github.ref_type == 'tag'" in jobs["publish"]["if"]
    assert set(jobs["publish"]["needs"]) == set(jobs) - {"publish"}


def test_the_page_on_versions_states_the_limits_of_the_project():
    page = (ROOT / "docs" / "develop" / "versioning.md").read_text(encoding="utf-8")
    project = PROJECT["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["torch"]]
    limits = dict(text.split(">=") for text in requirements if ";" not in text)
    assert f"| NumPy | {limits['numpy']} or later; on Windows 2.0 or later |" in page
    assert f"| matplotlib, tqdm | {limits['matplotlib']}, {limits['tqdm']} or later |" in page
    assert f"| PyTorch, for `dlnfast.torch` | {limits['torch']} or later |" in page
    newest = WHEELS["build"][-1].removeprefix("cp3").removesuffix("-*")
    assert f"| Python | 3.11 to 3.{newest}, " in page


def test_the_page_on_installation_lists_all_extras():
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    table = page.partition("| extra | for |")[2].partition("\n\n")[0]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`([\w-]+)`", " ".join(first))) == set(PROJECT["project"]["optional-dependencies"])


def test_the_colab_button_opens_the_notebook():
    path = Path("examples", "talk.ipynb")
    book = json.loads((ROOT / path).read_text(encoding="utf-8"))
    (address,) = re.findall(
        r"\]\((https://colab\.research\.google\.com/github/[^)]*)\)", "".join(book["cells"][0]["source"])
    )
    assert address.endswith(f"/blob/main/{path.as_posix()}")


def test_the_native_code_includes_headers_of_one_system_only_where_it_asks_for_the_system():
    posix = re.compile(
        r"^ *# *include <(unistd|windows|malloc|sched|pthread|dlfcn|sys/[\w.]+)\.h>", re.MULTILINE
    )
    folders = ROOT / "cpp", ROOT / "bench"
    sources = [path for folder in folders for path in folder.rglob("*.?pp")]
    assert len(sources) > 100
    found = {path.name for path in sources if posix.search(path.read_text(encoding="utf-8"))}
    assert found == {"cache_size.cpp", "aligned_memory.hpp"}
