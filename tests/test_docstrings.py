# SPDX-License-Identifier: MIT
"""Docstrings of all that is public: NumPy's sections, complete."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

MODULES = [
    "dlnfast",
    "dlnfast.measures",
    "dlnfast.theory",
    "dlnfast.plots",
    "dlnfast.reference",
    "dlnfast.torch",
    "dlnfast.integrations.lightning",
    "dlnfast.integrations.transformers",
    "dlnfast.integrations.peft",
]
#: Sections in numpydoc's order, the summary first.
ORDER = [
    *(
        "",
        "Parameters",
        "Attributes",
        "Returns",
        "Yields",
        "Raises",
        "Warns",
        "Notes",
        "References",
        "Examples",
    )
]
#: Methods that another program's interface names and describes.
INTERFACES = re.compile(
    r"^(forward|on_\w+|(load_)?state_dict)$"  # torch.nn.Module, Lightning, the Hugging Face Trainer
)
#: Classes that functions make, whose docstrings say which: their constructors are nobody's business.
MADE = ["Batch", "LayerOutputs", "SpectralTracker", "SweepResults"]
#: Helpers that raise on behalf of who calls them.
CHECKS = re.compile(r"\braise \w|\bcheck_\w+\(|\bas_(array|list|matrix|vector)\(|\bper_layer\(")
COST = re.compile(r"[Cc]ost|O\(|flops|[Mm]emory|seconds|times as long")
PAGES = "\n".join(page.read_text() for page in (Path(__file__).parents[1] / "docs" / "api").glob("*.md"))


def public(name):
    """Yield the names and objects of a module; a module without an optional package has none."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return
    names = getattr(module, "__all__", None)
    for entry in names or [n for n, o in vars(module).items() if getattr(o, "__module__", "") == name]:
        try:
            found = getattr(module, entry)
        except ModuleNotFoundError:  # a part that needs an optional package
            continue
        if callable(found) and not entry.startswith("_"):
            yield entry, found


def collected():
    seen = set()
    for module in MODULES:
        for name, found in public(module):
            if id(found) in seen:
                continue
            seen.add(id(found))
            yield pytest.param(found, None, id=f"{module}.{name}")
            if not inspect.isclass(found):
                continue
            for member, value in members_of(found).items():
                function = getattr(value, "__func__", getattr(value, "fget", value))
                if not member.startswith("_") and inspect.isfunction(function):
                    yield pytest.param(function, found, id=f"{module}.{name}.{member}")


def members_of(owner):
    """Return the members of a class, together with those it inherits from other classes of the package."""
    own = [
        vars(base) for base in reversed(owner.__mro__) if base.__module__.startswith("dlnfast._trajectory")
    ]
    return {name: value for each in [*own, vars(owner)] for name, value in each.items()}


def sections(text):
    """Return the sections of a docstring, the summary under ''."""
    parts = re.split(r"^(\w[\w ]*)\n-{3,}\n", inspect.cleandoc(text), flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def names(section):
    entries = re.findall(r"^(\S.*)$", section, re.MULTILINE)
    return {name.strip(" *") for entry in entries for name in entry.split(" : ")[0].split(",")}


def source(found):
    try:
        return inspect.getsource(found)
    except (OSError, TypeError):  # what a decorator of the standard library wrote
        return ""


def commented(found):
    """Return the fields of a class below a comment with a colon, and those that follow them at once."""
    blocks = re.findall(r"#:.*\n((?:\s+\w+: .*\n)+)", source(found))
    return set(re.findall(r"(\w+): ", "".join(blocks)))


@pytest.mark.parametrize(("found", "owner"), list(collected()))
def test_docstring_is_complete(found, owner):
    text = found.__doc__
    assert text, "no docstring"
    if inspect.isclass(found) and (issubclass(found, Exception) or found.__name__ in MADE):
        return
    if owner is not None and (
        INTERFACES.match(found.__name__) or isinstance(members_of(owner).get(found.__name__), property)
    ):
        return
    told = sections(text)
    assert list(told) == sorted(told, key=ORDER.index), "sections out of order"
    parameters = [p for p in inspect.signature(found).parameters if p not in ("self", "cls")]
    described = names(told.get("Parameters", "")) | names(told.get("Attributes", ""))
    described |= commented(found) if inspect.isclass(found) else set()
    missing = [p for p in parameters if p not in described and not is_field_of_another(found, p)]
    assert not missing, f"parameters without a word: {missing}"
    body = source(found.__init__ if inspect.isclass(found) else found)
    if CHECKS.search(body):
        assert "Raises" in told, "it can raise"
    if inspect.isclass(found):
        return
    returned = inspect.signature(found).return_annotation
    if returned not in (None, "None") and parameters:
        assert "Returns" in told or "Yields" in told, f"it returns {returned}"
    if owner is None:
        assert COST.search(text), "what it costs"


def is_field_of_another(found, name):
    """Return whether a parameter is a field that a class takes over from another package's dataclass."""
    if not inspect.isclass(found):
        return False
    bases = [base for base in found.__mro__[1:] if not base.__module__.startswith("dlnfast")]
    return any(name in getattr(base, "__annotations__", {}) or name in init_of(base) for base in bases)


def init_of(base):
    try:
        return inspect.signature(base.__init__).parameters if base is not object else {}
    except ValueError:
        return {}


@pytest.mark.parametrize("module", [name for name in MODULES if "integrations" not in name])
def test_the_reference_shows_all(module):
    for name, _ in public(module):
        assert re.search(rf"^\.\. auto\w+:: {name}$", PAGES, re.MULTILINE), f"no page shows {name}"


def test_what_is_missing_is_seen():
    def silent(matrix: str) -> str:
        """Return it."""
        raise ValueError(matrix)

    wanted = {
        "Parameters\n----------\nmatrix : str": "parameters without a word",
        "Raises\n------\nValueError": "it can raise",
        "Returns\n-------\nstr": "it returns",
        "Notes\n-----\nCost: O(1).": "what it costs",
    }
    for count, message in enumerate(wanted.values()):
        told = sorted(list(wanted)[:count], key=lambda section: ORDER.index(section.split("\n")[0]))
        silent.__doc__ = "\n\n".join(["Return it.", *told])
        with pytest.raises(AssertionError, match=message):
            test_docstring_is_complete(silent, None)
