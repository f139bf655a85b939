# SPDX-License-Identifier: MIT
"""How fast: peers side by side, with the machine and its thread pools on record.

``dlnfast bench`` runs the cases; `peers` holds the programs that are compared, `cases` the sizes, `record`
timing and the machine, `tables` what is printed for a page.
"""

from __future__ import annotations
