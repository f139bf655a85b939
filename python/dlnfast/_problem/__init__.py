# SPDX-License-Identifier: MIT
"""Problems that gradient descent solves: least squares on data, matrix completion and sensing, examples."""
