# SPDX-License-Identifier: MIT
"""Initial weights: drawn as arrays, lazily sampled, checked."""
