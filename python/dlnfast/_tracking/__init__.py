# SPDX-License-Identifier: MIT
"""Singular values of a slowly changing matrix, with error bounds."""
