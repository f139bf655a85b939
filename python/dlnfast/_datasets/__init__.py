# SPDX-License-Identifier: MIT
"""Loaders of public data sets from files."""
