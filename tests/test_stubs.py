# SPDX-License-Identifier: MIT
"""The stubs have the signatures of the compiled modules, which pybind11 writes into docstrings."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import numpy as np
import pytest

import dlnfast
from dlnfast import _cpu

PACKAGE = Path(dlnfast.__file__).parent
_SPEC = importlib.util.spec_from_file_location(
    "write_stub", Path(__file__).parents[1] / "tools" / "write_stub.py"
)
WRITER = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(WRITER)

# Beginning of the annotation in the stub, by the type in pybind11's signature, where they differ. One class
# declares the trackers of both precisions; lists in results are lists, and lists of numbers are arrays.
DECLARED = {
    "npt.NDArray[np.float64]": ("npt.NDArray[np.float64]", "_Array"),
    "npt.NDArray[np.float64] | None": ("_Array | None",),
    "Sequence[float]": ("npt.NDArray[np.float64]", "Sequence[float]"),
    "Sequence[int]": ("npt.NDArray[np.int64]", "Sequence[int]"),
    "Sequence[tuple[Outcome, int, int]]": ("list[tuple[Outcome, int, int]]",),
    "Callable[..., object] | None": ("Callable[",),
    "typing.SupportsInt | typing.SupportsIndex": ("int",),
    "dict": ("TrackerSettings", "dict["),
}


def parse_stub(stem):
    """Return the syntax tree of the part of a stub that is written by hand."""
    text = (PACKAGE / f"{stem}.pyi").read_text(encoding="utf-8")
    if WRITER.BEGIN in text:
        before, _, after = WRITER.split_stub(text)
        text = before + after
    return ast.parse(text)


def is_public(name):
    return name == "__init__" or not name.startswith("_")


def public_members(body):
    """Return {name: node} of what a stub, or a class of it, declares to the outside."""
    found = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign):
            found[node.target.id] = node
    return {name: node for name, node in found.items() if is_public(name)}


def class_members(tree, node):
    """Return the members of a class and of its bases in the stub."""
    classes = {other.name: other for other in tree.body if isinstance(other, ast.ClassDef)}
    found = {}
    for base in node.bases:
        found |= class_members(tree, classes[base.id])
    return found | public_members(node.body)


def present(owner):
    return {name: thing for name, thing in vars(owner).items() if is_public(name)}


def signature_of(thing):
    """Return the signature that pybind11 wrote, as a function of the syntax tree."""
    lines = thing.__doc__.splitlines()
    assert "Overloaded" not in thing.__doc__, "a second signature: the comparison knows one only"
    return ast.parse(f"def {lines[0]}: ...").body[0]


def parameters(function):
    """Return (name, default) of the parameters, without self."""
    arguments = function.args
    others = arguments.vararg, arguments.kwarg, *arguments.kwonlyargs, *arguments.posonlyargs
    assert not any(others)
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults
    listed = zip(arguments.args, defaults, strict=True)
    return [(a.arg, d and ast.literal_eval(d)) for a, d in listed if a.arg != "self"]


def annotations(function):
    listed = {a.arg: ast.unparse(a.annotation) for a in function.args.args if a.arg != "self"}
    return {**listed, "return": ast.unparse(function.returns)}


def assert_same_signature(name, declared, thing):
    written = signature_of(thing)
    assert parameters(declared) == parameters(written), name
    kinds, found = annotations(written), annotations(declared)
    for argument, kind in kinds.items():
        if kind != "object":
            assert found[argument].startswith(DECLARED.get(kind, (kind,))), (name, argument, kind)


def pairs(core):
    """Yield (name, declaration, compiled thing) of all that is called."""
    tree = parse_stub("_core")
    for name, node in public_members(tree.body).items():
        thing = getattr(core, name)
        if isinstance(node, ast.FunctionDef):
            yield name, node, thing
        elif isinstance(node, ast.ClassDef):
            for entry, declaration in class_members(tree, node).items():
                yield f"{name}.{entry}", declaration, vars(thing)[entry]


@pytest.mark.parametrize("stem", ["_core", "_cpu"])
def test_the_stub_has_the_names_of_the_module(stem, core):
    module = core if stem == "_core" else _cpu
    tree = parse_stub(stem)
    declared = public_members(tree.body)
    # `Count` is in the generated part.
    assert set(declared) == set(present(module)) - {"Count"}
    for name, node in declared.items():
        assert isinstance(node, ast.ClassDef) == isinstance(getattr(module, name), type), name
        if isinstance(node, ast.ClassDef):
            assert set(class_members(tree, node)) == set(present(getattr(module, name))), name


def test_the_stub_has_the_signatures_of_the_module(core):
    checked = 0
    for name, declaration, thing in pairs(core):
        is_property = isinstance(thing, property)
        assert is_property == bool(declaration.decorator_list), name
        if is_property:
            assert thing.fset is None, f"{name} can be set; the stub says it cannot"
        else:
            assert_same_signature(name, declaration, thing)
            checked += 1
    assert checked > 30


def test_the_stub_of_the_probe_has_its_signatures():
    for name, declaration in public_members(parse_stub("_cpu").body).items():
        assert_same_signature(name, declaration, getattr(_cpu, name))


def test_the_generated_part_is_what_the_core_describes(core):
    text = (PACKAGE / "_core.pyi").read_text(encoding="utf-8")
    assert WRITER.split_stub(text)[1] == WRITER.generated_part(core)


def test_a_dictionary_has_the_fields_that_the_stub_declares(core):
    """Checks returned dictionaries; test_core_arguments checks that arguments need every field."""
    tables = core.describe_tables()

    def fields(name):
        included, own = tables[name]
        return {*own, *(field for part in included for field in fields(part))}

    tracker = core.SvdTracker64(4, 3, core.TRACKER_DEFAULTS)
    assert set(core.build_info()) == fields("BuildInfo")
    assert set(core.TRACKER_DEFAULTS) == fields("TrackerSettings")
    assert set(tracker.update(np.eye(4, 3), np.inf)) == fields("TrackerRecord")


def test_names_and_counts_of_the_core(core):
    assert core.OUTCOMES == ("finished", "converged", "stopped", "diverged")
    assert [count.name for count in core.Count] == [
        "losses", "records", "snapshots", "rates", "between_steps",
    ]  # fmt: skip
    assert core.TIERS.index("full") == 3
    assert core.COMPLETENESS.index("rigorous") == 2


def test_the_typed_marker_is_installed():
    assert (PACKAGE / "py.typed").exists()
