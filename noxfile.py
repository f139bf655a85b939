"""Sessions of checks: ``nox --list``, ``nox -s NAME``. They need Python and g++, nothing else.

``DLNFAST_SIMD`` is the instruction-set level of the builds with sanitizers: native unless it is set.
"""

import os
import subprocess
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
    "tests/test_levels.py::test_the_variable_chooses_the_level": "the wheel holds one level",
    "tests/test_memory.py::test_little_memory": "its limits leave no room for AddressSanitizer's own memory",
    "tests/test_svd_tracker.py::TestInput::test_control_c_ends_a_long_event": "its time limit",
    "tests/test_threads.py::test_large_products_listen_in_between": "its time limit",
    "tests/test_threads.py::test_ctrl_c_ends_a_run_within_half_a_second": "its time limit",
    "tests/test_threads.py::test_a_fork_after_use_does_not_hang": "its time limit",
}


def requirements(*extras: str) -> list[str]:
    """Return what the package and these extras need, without the package."""
    optional = PROJECT["project"]["optional-dependencies"]
    return PROJECT["project"]["dependencies"] + [name for extra in extras for name in optional[extra]]


def sanitizer_environment(**options: str) -> dict[str, str]:
    """Return the variables under which Python runs modules with sanitizers."""
    names = "libasan.so", "libubsan.so"
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
        for name in names
    ]
    asan = {
        # Python keeps what it has until it ends.
        "detect_leaks": "0",
        # Memory that is not there is a MemoryError, as without sanitizers (fuzz/shim.cpp).
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
    """The suite, on the package as it is installed."""
    session.install(*CONSTRAINTS, ".[test]")
    session.run("pytest", "-q", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and types."""
    session.install(*CONSTRAINTS, *requirements("test"))
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
    """The native tests: ``nox -s native -- asan`` for another preset than dev."""
    for preset in session.posargs or ["dev"]:
        run_preset(session, preset)


@nox.session
def tsan(session: nox.Session) -> None:
    """The hammer test of the native threads under ThreadSanitizer, without OpenMP."""
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
    """The suite on modules with AddressSanitizer and UndefinedBehaviorSanitizer."""
    install_sanitized(session, *requirements("test"))
    deselected = [f"--deselect={test}" for test in NOT_UNDER_ASAN]
    # Reports are written to the process's own standard error, which pytest would keep.
    session.run("pytest", "-q", "--capture=sys", *deselected, *session.posargs, env=sanitizer_environment())


@nox.session(requires=["sanitized"])
def fuzz(session: nox.Session) -> None:
    """All bindings with what nobody should pass: ``nox -s fuzz -- --calls 100000 --seed 1``."""
    install_sanitized(session, *requirements(), *requirements("fuzz"))
    environment = sanitizer_environment(max_allocation_size_mb="256")
    session.run("python", "fuzz/bindings.py", *session.posargs, env=environment)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site in build/docs; warnings are errors."""
    session.install(*CONSTRAINTS, ".[docs]")
    session.run("python", "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-n", "docs", "build/docs")
