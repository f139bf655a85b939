# SPDX-License-Identifier: MIT
"""Measure the shape of a Python package: modules, import graph, functions, classes and its C++ boundary.

    python tools/measure_tree.py                                  # this package
    python tools/measure_tree.py --package NAME=FOLDER ..  # other packages too, e.g. an unpacked wheel
    python tools/measure_tree.py --package NAME=FOLDER --cpp NAME CORE BINDINGS

The sources are parsed, not imported. Numbers of lines include blank lines and comments.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]

#: Callables whose parameters are counted, by their qualified names.
COUNTED = ("train", "MatrixCompletion.__init__", "Trainer.__init__", "diffeqsolve", "linear_solve")


@dataclass(frozen=True)
class Import:
    """One name that a module imports from its own package."""

    module: str
    line: int
    kind: str  # "module", "function" or "type"


@dataclass
class Package:
    """The sources of a package below one folder."""

    root: Path
    label: str = ""
    sources: dict[str, Path] = field(init=False)
    trees: dict[str, ast.Module] = field(init=False)

    def __post_init__(self) -> None:
        """Parse every module."""
        self.sources = {self._name_of(path): path for path in sorted(self.root.rglob("*.py"))}
        self.trees = {
            name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.sources.items()
        }
        self.label = self.label or self.root.name
        bound = [node for node in ast.walk(self.trees[""]) if isinstance(node, ast.alias)]
        self._names_of_root = {node.asname or node.name for node in bound}

    def _name_of(self, path: Path) -> str:
        """Return the dotted name below the package; "" is the package itself."""
        parts = path.relative_to(self.root).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def entries(self) -> list[str]:
        """Return the names of the modules and sub-packages in the folder of the package."""
        return sorted({name.split(".")[0] for name in self.sources if name})

    def imports(self, module: str) -> list[Import]:
        """Return the imports of a module from its own package, including those in functions and for types."""
        base = module.split(".") if module else []
        if self.sources[module].name != "__init__.py":
            base = base[:-1]
        found: list[Import] = []

        def target(node: ast.ImportFrom) -> list[str] | None:
            names = node.module.split(".") if node.module else []
            if node.level:
                return base[: len(base) - node.level + 1] + names
            return names[1:] if names[:1] == [self.root.name] else None

        def add(dotted: str, line: int, kind: str) -> None:
            if dotted in self.sources and dotted != module:
                found.append(Import(dotted, line, kind))

        def visit(node: ast.AST, kind: str) -> None:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                for child in node.body:
                    visit(child, "type")
                for child in node.orelse:
                    visit(child, kind)
                return
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and kind == "module":
                kind = "function"
            if isinstance(node, ast.ImportFrom) and (parts := target(node)) is not None:
                for alias in node.names:
                    dotted = ".".join([*parts, alias.name])
                    if dotted in self.sources:
                        add(dotted, node.lineno, kind)
                    elif parts or alias.name in self._names_of_root:  # else a compiled module
                        add(".".join(parts), node.lineno, kind)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith(self.root.name + "."):
                        add(alias.name.partition(".")[2], node.lineno, kind)
            for child in ast.iter_child_nodes(node):
                visit(child, kind)

        visit(self.trees[module], "module")
        return found

    def imports_from_outside(self, module: str) -> set[str]:
        """Return the other packages that are imported together with a module."""
        found: set[str] = set()

        def visit(node: ast.AST) -> None:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
                isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            ):
                return
            if isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").partition(".")[0])
            for child in ast.iter_child_nodes(node):
                visit(child)

        visit(self.trees[module])
        return found - {self.root.name}

    def graph(self) -> dict[str, set[str]]:
        """Return the modules that each module imports."""
        return {module: {found.module for found in self.imports(module)} for module in self.sources}

    def functions(self) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        """Yield every function with its qualified name."""

        def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield prefix + child.name, child
                    yield from visit(child, prefix + child.name + ".")
                elif isinstance(child, ast.ClassDef):
                    yield from visit(child, prefix + child.name + ".")
                else:
                    yield from visit(child, prefix)

        for tree in self.trees.values():
            yield from visit(tree, "")

    def class_named(self, name: str) -> tuple[str, ast.ClassDef] | None:
        """Return the module and the definition of a class of the package."""
        for module, tree in self.trees.items():
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and node.name == name:
                    return module, node
        return None


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one module (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in graph[module]:
            if other not in order:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == order[module]:
            start = stack.index(module)
            component = sorted(stack[start:])
            del stack[start:]
            if len(component) > 1:
                found.append(component)

    for module in graph:
        if module not in order:
            visit(module)
    return found


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """Return the longest chain of imports, the importer first; cycles count as one module."""
    member = {module: tuple(component) for component in cycles(graph) for module in component}
    component_of = {module: member.get(module, (module,)) for module in graph}

    @cache
    def below(component: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
        others = {component_of[name] for module in component for name in graph[module]} - {component}
        best = max((below(other) for other in sorted(others)), key=len, default=())
        return (component, *best)

    chains = (below(component) for component in sorted(set(component_of.values())))
    return [" = ".join(component) or "(package)" for component in max(chains, key=len)]


def n_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef, package: Package) -> int:
    """Return the number of parameters, without self; those of ``**kwargs: Unpack[T]`` are the keys of T."""
    arguments = node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    names += [a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None]
    if arguments.kwarg is not None and isinstance(arguments.kwarg.annotation, ast.Subscript):
        located = package.class_named(ast.unparse(arguments.kwarg.annotation.slice))
        keys = located[1].body if located is not None else []
        names[-1:] = [ast.unparse(key.target) for key in keys if isinstance(key, ast.AnnAssign)]
    return len([name for name in names if name not in ("self", "cls")])


def percentile(values: list[int], share: float) -> int:
    """Return the smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def count_lines(folder: Path, *suffixes: str) -> int:
    """Return the number of lines in files with these endings."""
    paths = [path for path in folder.rglob("*") if path.suffix in suffixes]
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def largest_cpp_class(folder: Path) -> tuple[str, int, int]:
    """Return the name, the lines and the data members of the longest class or struct below a folder."""
    best = ("", 0, 0)
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".hpp", ".cpp"):
            continue
        text = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
        for match in re.finditer(r"(?<![<,] )(?<![<,])\b(?:class|struct)\s+([\w:<>]+)[^;{()<>]*\{", text):
            depth, end = 1, match.end()
            while depth and end < len(text):
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                end += 1
            body = text[match.end() : end - 1]
            if (lines := body.count("\n") + 1) > best[1]:
                best = (match[1], lines, _count_members(body))
    return best


def _count_members(body: str) -> int:
    """Return the number of data members that a class body declares."""
    flat, depth = [], 0
    for character in body:
        depth -= character == "}"
        if depth == 0:
            flat.append(character)
        depth += character == "{"
    statements = re.sub(r"\b(public|private|protected)\s*:", "", "".join(flat)).split(";")
    members = 0
    for statement in statements:
        words = statement.split("=")[0].strip()
        if (
            not words
            or "(" in words
            or re.match(r"(using|friend|template|typedef|static|enum|struct|class)\b", words)
        ):
            continue
        members += 1 + len(re.findall(r",\s*\w+", re.sub(r"<[^<>]*(<[^<>]*>)?[^<>]*>", "", words)))
    return members


def rows_of(package: Package, cpp: tuple[Path, Path] | None) -> dict[str, str]:
    """Return the measurements of a package as {name of the row: text}."""
    graph = package.graph()
    chain = longest_chain(graph)
    found = [(module, item) for module in graph for item in package.imports(module)]
    in_cycles = {name for component in cycles(graph) for name in component}
    cyclic = [(m, i) for m, i in found if m in in_cycles and i.module in in_cycles]
    lengths = [node.end_lineno - node.lineno + 1 for _, node in package.functions() if node.end_lineno]
    entries = package.entries()
    rows = {
        "entries of the package's folder (public)": f"{len(entries)} "
        f"({sum(not name.startswith('_') for name in entries)})",
        "modules in all": str(len(package.sources)),
        "longest chain of imports": str(len(chain)),
        "import cycles; imports in one": f"{len(cycles(graph))}; {len(cyclic)}",
        "imports inside functions; for types only": f"{sum(i.kind == 'function' for _, i in found)}; "
        f"{sum(i.kind == 'type' for _, i in found)}",
        "lines that 95 % of functions do not exceed": str(percentile(lengths, 0.95)),
    }
    for name, node in package.functions():
        if name in COUNTED:
            rows[f"parameters of {name.removesuffix('.__init__')}"] = str(n_parameters(node, package))
    if (located := package.class_named("Trajectory")) is not None:
        _, node = located
        methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
        n_checks = sum(
            len(re.findall(r"isinstance\([^()]*states|hasattr\(states", path.read_text(encoding="utf-8")))
            for path in package.sources.values()
        )
        rows["Trajectory: lines; methods"] = f"{(node.end_lineno or 0) - node.lineno + 1}; {len(methods)}"
        rows["checks of the type of states"] = str(n_checks)
    if cpp is not None:
        core, bindings = cpp
        parts = [core / name for name in ("include", "src") if (core / name).is_dir()] or [core]
        n_core = sum(count_lines(part, ".hpp", ".cpp", ".h") for part in parts)
        if bindings.is_relative_to(core) and parts == [core]:
            n_core -= count_lines(bindings, ".hpp", ".cpp", ".h")
        n_bindings = (
            count_lines(bindings, ".hpp", ".cpp", ".h")
            if bindings.is_dir()
            else len(bindings.read_text(encoding="utf-8").splitlines())
        )
        if bindings.is_file():
            n_core -= n_bindings
        rows["binding lines / core lines"] = f"{n_bindings} / {n_core} = {100 * n_bindings / n_core:.0f} %"
        name, lines, members = max((largest_cpp_class(part) for part in parts), key=lambda entry: entry[1])
        rows["largest C++ class: lines; members"] = f"{name} {lines}; {members}"
        text = "".join(
            path.read_text(encoding="utf-8")
            for path in (bindings.rglob("*.[ch]pp") if bindings.is_dir() else [bindings])
        )
        keys = set(re.findall(r"\b(?:d|dict|arguments)\[\"(\w+)\"\]", text))
        rows["keys of dictionaries read in the bindings"] = str(len(keys))
    return rows


def main() -> None:
    """Print one table, a column for each package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--package", action="append", default=[], help="folder of a package, or NAME=FOLDER")
    parser.add_argument(
        "--cpp", action="append", nargs=3, metavar=("NAME", "CORE", "BINDINGS"), default=[],
        help="C++ core and bindings of the package of this name",
    )  # fmt: skip
    parser.add_argument("--chain", action="store_true", help="print the longest chain of imports too")
    arguments = parser.parse_args()
    cpp = {"dlnfast": (HERE / "cpp", HERE / "cpp" / "bindings")}
    cpp |= {name: (Path(core), Path(bindings)) for name, core, bindings in arguments.cpp}
    packages = [Package(HERE / "python" / "dlnfast")]
    for name, mark, path in (text.rpartition("=") for text in arguments.package):
        packages.append(Package(Path(path), name if mark else ""))
    columns = {package.label: rows_of(package, cpp.get(package.label)) for package in packages}
    names = list(dict.fromkeys(name for rows in columns.values() for name in rows))
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in names:
        print(f"| {name} | " + " | ".join(rows.get(name, "") for rows in columns.values()) + " |")
    if arguments.chain:
        for package in packages:
            print(f"\n{package.label}: " + " -> ".join(longest_chain(package.graph())))


if __name__ == "__main__":
    main()
