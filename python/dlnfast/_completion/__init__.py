# SPDX-License-Identifier: MIT
"""Low-rank training of matrices known in part: compressed runs, estimator, compression."""
