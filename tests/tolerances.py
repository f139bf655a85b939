# SPDX-License-Identifier: MIT
"""Tolerances of the test suite."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def tolerance(dtype: npt.DTypeLike, inner_size: int, steps: int = 1) -> float:
    """Return the relative error allowed of a result computed in `dtype`.

    ``8 eps sqrt(inner_size steps)``:

    * each rounding has a relative error of at most eps / 2, and an entry of a product over `inner_size`
      terms adds up as many of them, of random signs, hence the square root;
    * `steps` successive updates add their errors in the same way;
    * 8 leaves room for the few such products behind one number, and for the largest of many entries.

    Compare norms, or entries with the norm of their array: an entry that cancels has no relative accuracy.
    A test that multiplies this by a condition number, or takes a looser number, says why.
    """
    return 8 * float(np.finfo(dtype).eps) * math.sqrt(inner_size * steps)
