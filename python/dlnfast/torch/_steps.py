# SPDX-License-Identifier: MIT
"""`StepMonitor`: detection of training steps, independent of the program that calls the optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

__all__ = ["StepMonitor"]

#: Number that PyTorch returns outside of a backward pass.
_NO_PASS = -1


class StepMonitor:
    """Group the calls of ``Optimizer.step`` into training steps, and report these.

    Only optimizers with a parameter of the watched modules count. Several of them may share a training step:
    one for matrices and one for vectors, one for each parameter that steps within the backward pass, a
    wrapper around another optimizer. The next training step begins with the first call of
    ``Optimizer.step`` for which

    * the optimizer has stepped in this training step already, or
    * a watched parameter that was stepped has received a new gradient since, or was replaced.

    Parameters
    ----------
    modules : method
        Returns the modules with the watched parameters. Only weak references to the methods are stored: the
        hooks are removed with the object of the methods.
    on_step : method
        Called once in every training step, after the first optimizer has moved weights.
    on_step_extended : method
        Called whenever one more optimizer has moved weights in the same training step.
    on_step_over : method
        Called when a training step is over, before an optimizer moves weights again.
    optimizer : Optimizer, optional
        Only optimizer whose steps are counted. Other optimizers still delimit steps.

    Raises
    ------
    TypeError, ValueError
        For an optimizer of another type, and for one without a watched parameter.

    Notes
    -----
    Hooks are registered for optimizers and for gradients of leaves, not for modules. So models can be
    compiled, copied and pickled as before, and ``torch.compile`` traces no hook.
    """

    def __init__(
        self,
        modules: Callable[[], Iterable[nn.Module]],
        on_step: Callable[[], None],
        on_step_extended: Callable[[], None],
        on_step_over: Callable[[], None],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self._handles: list[Any] = []
        self._modules = weakref.WeakMethod(modules, lambda _: self.remove())
        self._on_step, self._on_step_extended, self._on_step_over = (
            weakref.WeakMethod(method) for method in (on_step, on_step_extended, on_step_over)
        )
        self._watched: set[int] = set()
        #: Optimizers without a watched parameter, and the ids of their parameters when that was found.
        self._unrelated: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[int]] = (
            weakref.WeakKeyDictionary()
        )
        self._only_optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._seen: list[weakref.ref[torch.optim.Optimizer]] = []
        self._names: list[str] = []
        self._gradient_handles: dict[int, tuple[weakref.ref[torch.Tensor], Any]] = {}
        #: Ids of parameters in the order of their gradients in the first backward pass: the last layer first.
        self.gradient_order: list[int] = []
        self.restart()
        if optimizer is not None:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(f"optimizer is {type(optimizer).__name__}; wanted a torch.optim.Optimizer")
            if not self._has_watched_parameter(optimizer):
                raise ValueError("optimizer holds none of the chosen weights")
            self._only_optimizer = weakref.ref(optimizer)
        self._watch_gradients()
        # PyTorch's compiler does not trace disabled functions.
        disable: Any = torch.compiler.disable
        self._handles = [
            register_optimizer_step_pre_hook(disable(self._before_step)),
            register_optimizer_step_post_hook(disable(self._after_step)),
        ]

    # ------------------------------------------------------------------------------------- state

    @property
    def is_active(self) -> bool:
        """Whether steps are reported."""
        return bool(self._handles)

    @property
    def is_stepping(self) -> bool:
        """Whether an optimizer's step has started and not returned, or has raised."""
        return bool(self._stepping)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Optimizers that have stepped and still exist."""
        return [each for ref in self._seen if (each := ref()) is not None]

    @property
    def optimizer_names(self) -> list[str]:
        """Class names of all optimizers that have stepped, in the order of their first steps."""
        return list(self._names)

    def restart(self) -> None:
        """Forget the current training step: the next call of an optimizer starts a new one."""
        self._stepped: set[int] = set()
        self._stepping: set[int] = set()
        self._stepped_parameters: set[int] = set()
        self._has_new_gradient = False
        self._is_counted = False
        #: Number of the backward pass within which the last optimizer stepped.
        self._pass = _NO_PASS

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for _, handle in self._gradient_handles.values():
            handle.remove()
        self._gradient_handles = {}

    # ------------------------------------------------------------------------------------- hooks

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        if not self._has_watched_parameter(optimizer):
            return
        if id(optimizer) in self._stepped or self._has_new_gradient:
            self.restart()
        if not self._stepped:
            _call_if_alive(self._on_step_over)
            self._watch_gradients()
        self._stepped.add(id(optimizer))
        self._stepping.add(id(optimizer))

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        # The optimizer may have received a watched parameter during the call.
        if not (id(optimizer) in self._stepped or self._has_watched_parameter(optimizer)):
            return
        self._stepping.discard(id(optimizer))
        self._stepped.add(id(optimizer))
        self._stepped_parameters.update(self._list_parameters(optimizer))
        self._pass = _get_backward_pass()
        self._remember_optimizer(optimizer)
        if self._is_counted:
            _call_if_alive(self._on_step_extended)
        elif self._only_optimizer is None or self._only_optimizer() is optimizer:
            self._is_counted = True
            _call_if_alive(self._on_step)

    def _on_gradient(self, parameter: torch.Tensor) -> None:
        number = id(parameter)
        # An optimizer that steps within the backward pass may already have used this gradient.
        is_of_this_pass = self._pass != _NO_PASS and self._pass == _get_backward_pass()
        if number in self._stepped_parameters and not is_of_this_pass:
            if self._stepping:  # the closure of the next step runs before that step moves weights
                stepping = self._stepping
                self.restart()
                self._stepped, self._stepping = set(stepping), stepping
                _call_if_alive(self._on_step_over)
            else:
                self._has_new_gradient = True
        if not self._seen and number not in self.gradient_order:
            self.gradient_order.append(number)

    # ----------------------------------------------------------------------------------- helpers

    def _remember_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        if all(ref() is not optimizer for ref in self._seen):
            self._seen = [ref for ref in self._seen if ref() is not None]
            self._seen.append(weakref.ref(optimizer))
            name = type(optimizer).__name__
            if name not in self._names:
                self._names.append(name)

    def _find_watched_ids(self) -> set[int]:
        # Not cached: an adapter has new parameters after it was compressed.
        return {id(parameter) for parameter in self._watched_parameters()}

    def _watched_parameters(self) -> Iterator[nn.Parameter]:
        modules = self._modules()
        for module in () if modules is None else modules():
            for part in module.modules():  # three times as fast as module.parameters()
                for parameter in part._parameters.values():
                    if parameter is not None:
                        yield parameter

    @staticmethod
    def _list_parameters(optimizer: torch.optim.Optimizer) -> list[int]:
        return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]

    def _has_watched_parameter(self, optimizer: torch.optim.Optimizer) -> bool:
        parameters = self._list_parameters(optimizer)
        if not self._watched.isdisjoint(parameters):
            return True
        if self._unrelated.get(optimizer) == parameters:
            return False
        before, self._watched = self._watched, self._find_watched_ids()
        has_watched = not self._watched.isdisjoint(parameters)
        # A stepped layer has new parameters, whose gradients had no hook: assume that there was a gradient.
        if not self._stepped_parameters.isdisjoint(before - self._watched):
            self._has_new_gradient = True
        if not has_watched:
            self._unrelated[optimizer] = parameters
        return has_watched

    def _watch_gradients(self) -> None:
        """Add hooks to the gradients of watched parameters that have none yet, such as thawed ones."""
        self._watched = set()
        for parameter in self._watched_parameters():
            number = id(parameter)
            self._watched.add(number)
            known = self._gradient_handles.get(number)
            if known is not None and known[0]() is parameter:
                continue
            if parameter.requires_grad and parameter.is_leaf:
                register: Callable[..., Any] = parameter.register_post_accumulate_grad_hook
                handle = register(self._on_gradient)
                self._gradient_handles[number] = (weakref.ref(parameter), handle)


def _get_backward_pass() -> int:
    """Return the number of the current backward pass, `_NO_PASS` outside of one."""
    return int(torch._C._current_graph_task_id())


def _call_if_alive(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    alive = method()
    if alive is not None:
        alive()
