# SPDX-License-Identifier: MIT
"""Integrations with other training libraries, one module for each."""

from __future__ import annotations
