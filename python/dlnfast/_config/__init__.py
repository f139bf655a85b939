# SPDX-License-Identifier: MIT
"""TOML files, sweeps and fine-tuning runs."""
