# SPDX-License-Identifier: MIT
"""Problems: sufficient statistics of data, observations of a matrix, standard ones."""
