# SPDX-License-Identifier: MIT
"""Modules import downwards only: `LAYERS`, lowest first. Read from the sources, nothing is run."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import dlnfast

PACKAGE = Path(dlnfast.__file__).parent

# A module imports from the layers above its line, never from its own: so there are no cycles. A name
# stands for the modules below it too, where they have no line of their own. "dlnfast" is what users import.
LAYERS = (
    # Infrastructure without mathematics.
    (
        "_cpu",
        "_core",
        "_core_v3",
        "_core_v4",
        "_errors",
        "_optional",
        "_version",
        "progress",
        "stopping",
    ),
    ("_arrays", "_dispatch", "_locks", "files"),
    ("_pairs", "_stored", "_threads", "checkpoint", "sections"),
    # Data, problems, weights and their properties.
    ("data", "datasets", "initial", "reference"),
    ("statistics", "svd_tracker", "tasks"),
    ("finetuning", "problem"),
    ("implicit", "measures", "spec", "theory"),
    ("closure", "plots"),
    ("factors", "operators"),
    ("completion",),
    # Runs.
    ("curvature", "trajectory"),
    ("compression", "descent", "export", "runs"),
    ("batch", "estimator", "projected"),
    ("_sweep_worker", "compressed"),
    ("sweep",),
    ("dlnfast",),
    # PyTorch models.
    ("torch._names", "torch._reading", "torch._rule", "torch._steps", "torch.operators", "torch.full_batch"),
    ("torch._weight_use", "torch.images", "torch.layers", "torch.sharded"),
    ("torch.initial", "torch.deep_lora.layers", "torch.updates", "torch.balance", "torch.statistics"),
    ("torch.overparameterize", "torch.models._construction", "torch.deep_lora.files"),
    ("torch.deep_lora.gradient", "torch.descent", "torch.models.deep_linear", "torch.models.mlp"),
    ("torch.models.vgg", "torch.models.vit", "torch.probes", "torch.track"),
    ("torch.deep_lora.adapter", "torch.features", "torch.models", "torch.sharded_descent", "torch.trainer"),
    ("torch.deep_lora",),
    ("torch", "torch.finetune"),
    ("integrations._spectra",),
    ("integrations",),
    # Programs.
    ("benchmarks.record",),
    ("benchmarks.adapters", "benchmarks.networks", "benchmarks.peers", "benchmarks.tracking"),
    ("benchmarks.completion", "benchmarks.ratings", "benchmarks.sweeps"),
    ("benchmarks.cases",),
    ("benchmarks.tables", "benchmarks"),
    ("figures", "figures._claims", "figures._images"),
    ("figures.*",),
    ("cli",),
    ("__main__",),
)

# Imports upwards that happen when a function is called: (module, imported) and why they are there.
UPWARDS = {
    (
        "closure",
        "descent",
    ): "closure() takes what train() takes, and refuses it in the same words",
    ("initial", "implicit"): "implicit=True makes a law of weights instead of arrays",
    ("initial", "problem"): "aligned() checks the problem that the weights are aligned with",
    ("statistics", "problem"): "SufficientStatistics.problem() makes the problem that they determine",
    ("trajectory", "descent"): "the limit of a run is seen in its gradients",
    ("trajectory", "export"): "Trajectory.to_xarray() is a method",
    ("descent", "torch.descent"): "device= hands a run to PyTorch",
    ("finetuning", "torch.finetune"): "a file of settings is checked before PyTorch is imported",
}

# Modules that may import optional packages at module level.
OPTIONAL = {
    "torch": {"torch", "numpy"},
    "integrations": {"torch", "numpy", "lightning", "transformers", "peft", "packaging"},
}


def name_of(path: Path) -> str:
    """Return the dotted name below the package; "dlnfast" is the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts) or "dlnfast"


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {*SOURCES, "_core", "_core_v3", "_core_v4", "_cpu"}


def imports(module: str) -> list[tuple[bool, str, int]]:
    """Return what a module imports: whether in a function, the module, the line.

    Names below the package are as in `LAYERS`; of others, the distribution is left, with a colon before it.
    Imports for the type checker do not count.
    """
    path = SOURCES[module]
    package = [] if module == "dlnfast" else module.split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found: list[tuple[bool, str, int]] = []

    def add(names: list[str], inside: bool, line: int) -> None:
        found.extend((inside, name, line) for name in names)

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            children: list[ast.AST] = list(node.orelse)
            if isinstance(node.test, ast.UnaryOp):
                children = list(node.body)
        else:
            children = list(ast.iter_child_nodes(node))
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in children:
            visit(child, inside)
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                add([(rest or "dlnfast") if first == "dlnfast" else f":{first}"], inside, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            target = node.module.split(".") if node.module else []
            if node.level:
                target = package[: len(package) - node.level + 1] + target
            elif target[0] == "dlnfast":
                target = target[1:]
            else:
                return add([f":{target[0]}"], inside, node.lineno)
            names = [".".join([*target, alias.name]) for alias in node.names]
            base = ".".join(target) or "dlnfast"
            add([name if name in MODULES else base for name in names], inside, node.lineno)
        return None

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def layer_of(module: str) -> int:
    """Return the layer with the longest name that stands for a module."""
    lines = {name: layer for layer, names in enumerate(LAYERS) for name in names}
    if module in lines:
        return lines[module]
    parent = module.rpartition(".")[0]
    while parent:
        for name in (f"{parent}.*", parent):
            if name in lines:
                return lines[name]
        parent = parent.rpartition(".")[0]
    raise AssertionError(f"{module} has no layer: write it into LAYERS of {Path(__file__).name}")


def upward_imports(module: str) -> list[tuple[bool, str, int]]:
    return [
        (inside, name, line)
        for inside, name, line in imports(module)
        if not name.startswith(":") and name != module and layer_of(name) >= layer_of(module)
    ]


def test_every_layer_lists_existing_modules():
    named = {name for names in LAYERS for name in names}
    assert len(named) == sum(map(len, LAYERS))
    assert {name.removesuffix(".*") for name in named} <= MODULES
    assert {module for module, _ in UPWARDS} <= MODULES


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down(module):
    found = [f"line {line}: {name}" for inside, name, line in upward_imports(module) if not inside]
    assert not found, f"{module} imports at module level what does not stand below it"


def test_imports_upwards_in_functions_have_a_reason():
    found = {(module, name) for module in SOURCES for inside, name, _ in upward_imports(module) if inside}
    assert found == set(UPWARDS)


@pytest.mark.parametrize("module", SOURCES)
def test_optional_packages_are_imported_where_they_are_needed(module):
    allowed = OPTIONAL.get(module.partition(".")[0], {"numpy"})
    others = {name[1:] for inside, name, _ in imports(module) if name.startswith(":") and not inside}
    assert others - set(sys.stdlib_module_names) <= allowed
