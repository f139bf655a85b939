# SPDX-License-Identifier: MIT
"""The version: its only definition."""

__version__ = "0.2.0"
