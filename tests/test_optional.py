# SPDX-License-Identifier: MIT
"""Imports of optional packages, and the package without them."""

from __future__ import annotations

BLOCKED = """
import sys
for name in {names!r}:
    sys.modules[name] = None
import dlnfast as dln
problem = dln.low_rank_recovery(dim=20, rank=2)
weights = dln.orthogonal([20] * 3)
for engine in ("reduced", "dense"):
    record = dln.Record(vectors=True)
    run = dln.train(problem, weights, learning_rate=1.0, steps=20, engine=engine, record=record)
    run.angles(1)
run.save(sys.argv[1])
print(len(dln.load(sys.argv[1]).loss))
"""


def test_importing_the_package_imports_numpy_only(run_python):
    program = """
import sys
before = set(sys.modules)
import dlnfast
new = {name.split(".")[0] for name in set(sys.modules) - before}
new = {name for name in new if not name.startswith(("_cython", "cython"))}  # parts of NumPy 1
print(sorted(new - set(sys.stdlib_module_names) - {"numpy", "dlnfast"}))
"""
    assert run_python(program).strip() == "[]"


def test_training_imports_no_other_package(run_python):
    program = """
import sys
import dlnfast as dln
dln.train(dln.low_rank_recovery(8, 1), dln.orthogonal([8] * 3), learning_rate=1.0, steps=3)
print(sorted({"matplotlib", "tqdm", "torch", "scipy"} & set(sys.modules)))
"""
    assert run_python(program).strip() == "[]"


def test_only_plots_need_optional_packages(run_python, tmp_path):
    names = ["matplotlib", "tqdm", "torch", "scipy", "pyarrow", "PIL", "threadpoolctl"]
    assert run_python(BLOCKED.format(names=names), tmp_path / "run.npz").strip() == "21"


def test_help_does_not_import_matplotlib(run_python):
    program = """
import sys
from dlnfast.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
print("matplotlib" in sys.modules)
"""
    assert run_python(program).strip().endswith("False")


def test_the_self_check_passes(run_python):
    program = "import runpy; runpy.run_module('dlnfast', run_name='__main__')"
    assert run_python(program).rstrip().endswith("passed")
