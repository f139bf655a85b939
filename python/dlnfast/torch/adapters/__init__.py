# SPDX-License-Identifier: MIT
"""Adapters in files: spectra, truncation, and extraction from two checkpoints."""
