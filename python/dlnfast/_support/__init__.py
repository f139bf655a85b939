# SPDX-License-Identifier: MIT
"""Support for all other packages, without any mathematics of networks: arrays, errors, files, threads."""
