# SPDX-License-Identifier: MIT
"""Invariant subspaces of gradient descent, and the certificate of a run."""
