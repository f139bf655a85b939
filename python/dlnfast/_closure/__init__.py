# SPDX-License-Identifier: MIT
"""The exact reduced model: invariant subspaces of gradient descent, their conditions, the certificate."""
