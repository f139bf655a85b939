# SPDX-License-Identifier: MIT
"""Benchmarks: the package and its peers in one process, with a record of the machine and thread pools."""
