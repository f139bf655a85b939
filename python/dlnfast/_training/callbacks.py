# SPDX-License-Identifier: MIT
"""Callbacks of records: `CallbackState`, and the call of a callback with it or with step and loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from .._support.arrays import FloatArray
from .stopping import Plateau

Callback = Callable[[int, float], bool | None]


class RecordedRun(Protocol):
    """The methods of a trajectory that `CallbackState` calls."""

    def all_weights(self, step: int = -1) -> list[FloatArray]: ...

    def end_to_end(self, step: int = -1) -> FloatArray: ...

    def singular_values(self, layer: int | str) -> FloatArray: ...


class CallbackState:
    """The state of a run at a record, for a callback with one parameter.

    Weights and singular values are read when they are asked for, only inside the callback. Copies that the
    callback keeps stay valid.

    Attributes
    ----------
    step : int
        Step of the record.
    loss : float
        Loss at this step.
    is_replayed : bool
        Whether the record is a saved one, of a checkpointed run that resumes. The weights of saved records of
        the dense engines are known only at the snapshots (``Record(weights_every=)``) and at step 0.

    Examples
    --------
    >>> import dlnfast as dln
    >>> problem, weights = dln.low_rank_recovery(dim=30, rank=3), dln.orthogonal([30] * 4)
    >>> def is_learned(state):
    ...     return state.singular_values(1)[0] > 1.5
    >>> record = dln.Record(every=10, callback=is_learned)
    >>> run = dln.train(problem, weights, learning_rate="auto", steps=500, record=record)
    >>> run.outcome
    'stopped'
    """

    def __init__(
        self,
        step: int,
        loss: float,
        losses: Callable[[], npt.NDArray[np.float64]],
        read: Callable[[], tuple[RecordedRun, int]],
        *,
        is_replayed: bool = False,
    ) -> None:
        self.step = step
        self.loss = loss
        self.is_replayed = is_replayed
        self._find_losses = losses
        #: Returns a run and the index of the record in it.
        self._read = read
        self._is_open = True

    @property
    def losses(self) -> npt.NDArray[np.float64]:
        """Losses of all steps so far, shape (step + 1,); a copy.

        Raises
        ------
        RuntimeError
            After the callback has returned.
        """
        self._require_open()
        return np.array(self._find_losses()[: self.step + 1])

    def weights(self) -> list[FloatArray]:
        """Return copies of W_1 .. W_L at this record.

        Returns
        -------
        list of ndarray
            Reduced engine: each costs as much as `Trajectory.weights`.

        Raises
        ------
        ValueError
            For a replayed record whose weights were not saved.
        MemoryError
            For lazily sampled layers of more than 10^8 entries.
        RuntimeError
            After the callback has returned.
        """
        self._require_open()
        return [weight.copy() for weight in self._read()[0].all_weights(self._saved_step())]

    def end_to_end(self) -> FloatArray:
        """Return ``W_{L:1}`` at this record, shape (d_L, d_0).

        Returns
        -------
        ndarray

        Raises
        ------
        ValueError, MemoryError, RuntimeError
            As `weights`.
        """
        self._require_open()
        return self._read()[0].end_to_end(self._saved_step()).copy()

    def singular_values(self, layer: int) -> FloatArray:
        """Return the recorded singular values of W_l at this record, descending, shape (k,).

        Parameters
        ----------
        layer : int
            1 .. L.

        Returns
        -------
        ndarray

        Raises
        ------
        ValueError
            For a layer out of range, or if no singular values are recorded.
        RuntimeError
            After the callback has returned.
        """
        self._require_open()
        run, record = self._read()
        return np.array(run.singular_values(layer)[record])

    def _saved_step(self) -> int:
        """Return the step to ask a run for; -1, the last, for the record of the engine."""
        return self.step if self.is_replayed else -1

    def _require_open(self) -> None:
        if not self._is_open:
            raise RuntimeError(
                f"the state of step {self.step} was read after its callback had returned: read weights, "
                "singular values and losses inside the callback, and keep the copies"
            )

    def _close(self) -> None:
        self._is_open = False


StateCallback = Callable[[CallbackState], bool | None]
RecordCallback = Callback | StateCallback


def takes_state(callback: object) -> bool:
    """Return whether a callback takes a `CallbackState` instead of step and loss.

    Raises
    ------
    TypeError
        If it takes neither.
    """
    if isinstance(callback, Plateau):
        return callback.callback is not None and takes_state(callback.callback)
    try:
        signature = inspect.signature(cast("Callable[..., Any]", callback))
    except (TypeError, ValueError):  # a function without a signature, of a compiled module
        return False
    if _binds(signature, 2):
        return False
    if _binds(signature, 1):
        return True
    raise TypeError(
        f"record.callback takes {signature}; wanted a callable of (step, loss), or of one parameter for a "
        "dlnfast.CallbackState"
    )


def _binds(signature: inspect.Signature, n_arguments: int) -> bool:
    try:
        signature.bind(*[None] * n_arguments)
    except TypeError:
        return False
    return True


def bind_state(callback: RecordCallback, make_state: Callable[[int, float], CallbackState]) -> Callback:
    """Return a callback as a function of step and loss, which makes the state where it takes one."""
    if not takes_state(callback):
        return cast("Callback", callback)
    if isinstance(callback, Plateau):
        assert callback.callback is not None
        rule, inner = callback, bind_state(callback.callback, make_state)

        def call_both(step: int, loss: float) -> bool:
            is_stopped = inner(step, loss) is True
            return rule.add(step, loss) or is_stopped

        return call_both
    function = cast("StateCallback", callback)

    def call_with_state(step: int, loss: float) -> bool | None:
        state = make_state(step, loss)
        try:
            return function(state)
        finally:
            state._close()

    return call_with_state


def refuse_state(callback: RecordCallback | None, caller: str) -> Callback | None:
    """Return the callback of a run that has no state to offer, or raise if it takes one.

    Raises
    ------
    TypeError
        The message names the caller.
    """
    if callback is not None and takes_state(callback):
        raise TypeError(
            f"record.callback takes a state, which {caller} does not offer; wanted a callable of (step, loss)"
        )
    return cast("Callback | None", callback)
