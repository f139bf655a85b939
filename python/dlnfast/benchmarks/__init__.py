# SPDX-License-Identifier: MIT
"""Speed of dlnfast and its peers, with a record of the machine and its thread pools.

``dlnfast bench`` runs the cases; `peers` holds the compared programs, `cases` the sizes, `record` timing
and the machine, `tables` the Markdown tables.
"""

from __future__ import annotations
