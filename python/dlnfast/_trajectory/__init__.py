# SPDX-License-Identifier: MIT
"""Trajectories: states, files, tables."""
