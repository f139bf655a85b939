# SPDX-License-Identifier: MIT
"""Changes of the records among the keyword arguments of a run."""

from __future__ import annotations

from dataclasses import replace

import dlnfast as dln


def with_record(options, **changes):
    """Return keyword arguments of `train` with some options of their `Record` changed."""
    return {**options, "record": replace(options.get("record", dln.Record()), **changes)}
