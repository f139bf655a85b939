# SPDX-License-Identifier: MIT
"""Trajectories: records of runs, weights, files and tables."""
