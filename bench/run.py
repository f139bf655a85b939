# SPDX-License-Identifier: MIT
"""Run benchmark cases: ``python -m bench.run [--case NAME] [--out FILE.json]`` is ``dlnfast bench``.

The cases are in the package, `dlnfast.benchmarks`; the native benchmarks in this folder need CMake.
"""

from __future__ import annotations

import sys

from dlnfast.benchmarks.record import restart_without_caps
from dlnfast.cli import main

if __name__ == "__main__":
    restart_without_caps("bench.run")
    sys.exit(main(["bench", *sys.argv[1:]]))
