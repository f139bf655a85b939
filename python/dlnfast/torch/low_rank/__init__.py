# SPDX-License-Identifier: MIT
"""Layers whose weights are products of factors: training them, and the compression of trained layers."""
