# SPDX-License-Identifier: MIT
"""Changes of the records among the keyword arguments of a run."""

from __future__ import annotations

from dataclasses import fields, replace

import dlnfast as dln


def with_record(options, **changes):
    """Return keyword arguments of `train` with some options of their `Record` changed."""
    return {**options, "record": replace(options.get("record", dln.Record()), **changes)}


def merge_options(*parts):
    """Return keyword arguments of `train` from several parts; later ones win, also within `Record`."""
    options, record = {}, {}
    for part in parts:
        options |= part
        changes = part.get("record", dln.Record())
        for field in fields(changes):
            if getattr(changes, field.name) != field.default:
                record[field.name] = getattr(changes, field.name)
    return options | {"record": dln.Record(**record)}
