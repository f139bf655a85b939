# SPDX-License-Identifier: MIT
"""Definitions that several test modules share, one module for each kind of thing."""
