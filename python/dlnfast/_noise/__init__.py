# SPDX-License-Identifier: MIT
"""Random matrices as the null hypothesis of measured spectra."""
