# SPDX-License-Identifier: MIT
"""How fast: peers side by side, in one process, with the machine and its thread pools on record."""
