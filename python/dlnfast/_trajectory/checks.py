# SPDX-License-Identifier: MIT
"""Check that the parts of a stored run fit each other."""

from __future__ import annotations

import numpy as np

from .._problem.kinds import AnyProblem
from .._support.arrays import check_count, check_scale
from .._support.errors import ShapeError
from .._support.file_checks import check_array, translate_part_errors
from .packing import check_steps
from .states import Run


def check_run(run: Run, problem: AnyProblem | None) -> None:
    """Raise unless the settings, series, states and problem of a run fit each other.

    Raises
    ------
    ValueError
        The message names the array, its shape or dtype, and the wanted one.
    """
    with translate_part_errors("it"):
        _check_config(run)
        _check_series(run)
        run.states.check(run)
        shapes = run.shapes
        if problem is not None and (problem.dim_out, problem.dim_in) != (shapes[-1][0], shapes[0][1]):
            raise ShapeError(
                f"the problem maps {problem.dim_in} to {problem.dim_out} dimensions, the layers "
                f"{shapes[0][1]} to {shapes[-1][0]}"
            )


def _check_config(run: Run) -> None:
    config = run.config
    if "shapes" in config:
        sizes = [size for shape in config["shapes"] for size in shape]
        if len(config.get("layers", config["shapes"])) != len(config["shapes"]):
            raise ValueError("config.layers has another length than config.shapes")
    else:
        sizes = config["widths"]
        if len(sizes) < 2:
            raise ValueError(f"config.widths is {sizes}; wanted d_0 .. d_L")
    for size in sizes:
        check_count(size, "config.widths" if "widths" in config else "config.shapes")
    check_scale(run.wall_time, "wall_time")
    for name in ("engine", "reason"):
        if not isinstance(getattr(run.certificate, name), str):
            raise ValueError(f"certificate.{name} is {getattr(run.certificate, name)!r}; wanted text")


def _check_series(run: Run) -> None:
    """Check losses, rates, times and steps. Losses that another program reported need not be finite."""
    is_complete = run.states.has_every_loss
    check_array(run.loss, "loss", (None,), finite=is_complete, dtype=np.float64)
    check_array(run.loss_steps, "loss_steps", (len(run.loss),), "i")
    if is_complete:
        check_steps(run.steps, "steps", len(run.loss) - 1)
    else:
        check_steps(run.loss_steps, "loss_steps")
        check_steps(run.steps, "steps")
    if run.rates is not None:
        check_array(run.rates, "rates", (None,), dtype=np.float64)
        if len(run.rates) > len(run.loss):
            raise ShapeError(f"rates has shape {run.rates.shape}; wanted at most {len(run.loss)}")
    if run.times is not None:
        check_array(run.times, "times", (len(run.loss),), dtype=np.float64)
        if np.any(run.times[1:] <= run.times[:-1]):
            raise ValueError("times does not increase")
