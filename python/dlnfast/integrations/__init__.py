# SPDX-License-Identifier: MIT
"""Thin adapters to other training programs, each in a module that imports its package."""

from __future__ import annotations
