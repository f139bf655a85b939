# SPDX-License-Identifier: MIT
"""Initial weights: sampled as arrays or lazily, checks of weights, and the gradients at weights."""
