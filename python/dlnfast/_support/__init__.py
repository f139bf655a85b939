# SPDX-License-Identifier: MIT
"""Ground that knows no mathematics of networks: arrays, errors, files, threads, products."""
