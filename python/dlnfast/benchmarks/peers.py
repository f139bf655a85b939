# SPDX-License-Identifier: MIT
"""One step of gradient descent by NumPy, PyTorch, JAX and dlnfast, each in the best form natural to it.

Where a library has several good forms (one thread or all, blocks of rows, whole runs or single steps), they
are tried at the size in question, and the fastest takes part.

All do the same on the same numbers: ``l = 1/2 ||W_L ... W_1 X - Y||_F^2`` with white inputs, X X^T = I, and
Y = Phi X, so that a program may use the N samples or, where it knows better, Phi alone. All compute the loss
of every step. `check_agreement` compares them before anything is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .._problem.low_rank import LowRank
from .._problem.problem import Problem
from .._support.errors import AssumptionError
from .._training.callbacks import Callback
from .._training.options import Record
from .._training.train import train
from .._trajectory.trajectory import Trajectory
from .._weights.implicit import ImplicitWeights
from .._weights.initial import orthogonal
from . import record
from .record import PAUSE

__all__ = ["LABELS", "ON_SAMPLES", "PEERS", "Peer", "Setting", "build", "check_agreement"]

_Array = npt.NDArray[np.float64]

#: Largest width with weights as arrays. Wider layers are lazily sampled, for the reduced engine only.
_LARGEST_EXPLICIT: Final = 8192
#: Steps whose losses are compared; the last one is reached by two steps at once.
_CHECKED_STEPS: Final = (0, 1, 3)
_TOLERANCE: Final = 1e-9
#: Rows of the update that NumPy computes at a time; 0 for all. The fastest is taken.
_BLOCKS: Final = (0, 16, 32, 64, 256)
_ORDERS: Final[tuple[Literal["C", "F"], ...]] = ("C", "F")
#: Number of repetitions for each form of a program, if they are short.
_TRIES: Final = 5
#: Seconds.
_LONG: Final = 0.3
#: Up to this width a library may be faster on one thread.
_SMALL: Final = 512


@dataclass(frozen=True)
class Setting:
    """Network and problem: L layers of width d with K outputs, on N samples; a target of rank at most r.

    Layers and inputs are products of two random reflections: exactly orthogonal, dense, and O(d^2) to make.
    Times do not depend on their values.
    """

    dim: int
    n_outputs: int
    depth: int = 3
    n_samples: int = 0  # 0: as many as inputs
    rank: int = 10
    scale: float = 0.8
    learning_rate: float = 0.02
    implicit: bool = False  # lazily sampled weights at any width

    def describe(self) -> dict[str, Any]:
        """Return d, K, L, N and r, by name."""
        return {
            "dim": self.dim,
            "n_outputs": self.n_outputs,
            "depth": self.depth,
            "n_samples": self.samples_used,
            "rank": self.target_rank,
        }

    @property
    def samples_used(self) -> int:
        """N."""
        return self.n_samples or self.dim

    @property
    def target_rank(self) -> int:
        """Rank of Phi."""
        return min(self.rank, self.n_outputs, self.dim)

    @property
    def widths(self) -> list[int]:
        """d_0, .., d_L."""
        return [self.dim] * self.depth + [self.n_outputs]

    @property
    def explicit(self) -> bool:
        """Whether layers are arrays."""
        return self.dim <= _LARGEST_EXPLICIT and not self.implicit

    def factors(self) -> LowRank:
        """Return Phi in factors: singular values from 1 to 1/2."""
        rng = np.random.default_rng(1)
        shapes = ((n, self.target_rank) for n in (self.n_outputs, self.dim))
        left, right = (np.linalg.qr(rng.standard_normal(shape))[0] for shape in shapes)
        return LowRank(left, np.linspace(1.0, 0.5, self.target_rank), right)

    @cached_property
    def target(self) -> _Array:
        """Phi, (K, d)."""
        factors = self.factors()
        product: _Array = (factors.U * factors.s) @ factors.V.T
        return product

    def problem(self) -> Problem:
        """Return the problem as a `Problem`."""
        return Problem(self.factors() if not self.explicit else self.target)

    def weights(self) -> list[_Array]:
        """Return new arrays W_1(0), .., W_L(0), the same at every call; the caller may change them."""
        rng = np.random.default_rng(2)
        return [
            _reflections(rng, rows, columns, self.scale)
            for rows, columns in zip(self.widths[1:], self.widths[:-1], strict=True)
        ]

    def samples(self) -> tuple[_Array, _Array]:
        """Return new arrays X, (d, N), with X X^T = I, and Y = Phi X, (K, N)."""
        if self.samples_used < self.dim:
            raise ValueError(
                f"n_samples is {self.n_samples}; wanted at least dim = {self.dim}, for white inputs"
            )
        X = _reflections(np.random.default_rng(3), self.dim, self.samples_used)
        return X, self.target @ X


def _reflections(rng: np.random.Generator, rows: int, columns: int, scale: float = 1.0) -> _Array:
    """Return the first rows or columns of scale (I - 2 u u^T) (I - 2 v v^T)."""
    u, v = (x / np.linalg.norm(x) for x in rng.standard_normal((2, max(rows, columns))))
    left = scale * np.stack([u, v], axis=1)[:rows]
    right = np.stack([4 * (u @ v) * v - 2 * u, -2 * v])[:, :columns]
    matrix: _Array = left @ right
    np.fill_diagonal(matrix, matrix.diagonal() + scale)
    return matrix


@dataclass
class Peer:
    """A program that can take steps.

    Attributes
    ----------
    name : str
        Its key in `PEERS`.
    advance : callable
        ``advance(n)`` takes n steps from the present state, and returns the loss before the last of them.
    note : str
        Name of the chosen form.
    clock : callable, optional
        ``clock(n)`` returns the seconds of n steps, for peers whose `advance` starts anew at every call and
        does more than its steps.
    """

    name: str
    advance: Callable[[int], float]
    note: str = ""
    clock: Callable[[int], float] | None = None
    steps: int = field(default=1, init=False)

    def seconds(self, n: int) -> float:
        """Return the seconds that n steps take."""
        return self.clock(n) if self.clock is not None else record.elapsed(lambda: self.advance(n))

    def calibrate(self, turn: float) -> float:
        """Choose `steps` so that they take about `turn` seconds; return the seconds of one step."""
        n = 1
        while (seconds := self._usual_seconds(n)) < turn / 4 and n < 10**8:
            n = max(4 * n, min(64 * n, int(n * turn / 4 / max(seconds, 1e-9))))
        self.steps = max(1, round(n * turn / seconds))
        return seconds / n

    def _usual_seconds(self, n: int) -> float:
        """Return the median of several times: a single delayed one would end the calibration too early."""
        times = [self.seconds(n)]
        while times[0] < _LONG and len(times) < _TRIES:
            times.append(self.seconds(n))
        return statistics.median(times)


def _repeat_steps(step: Callable[[], float]) -> Callable[[int], float]:
    def advance(n: int) -> float:
        for _ in range(n - 1):
            step()
        return step()

    return advance


# --------------------------------------------------------------------------------------------------
# NumPy
# --------------------------------------------------------------------------------------------------


def numpy_naive(setting: Setting, tune: bool = True) -> Peer:
    """Take the gradients as they are written: ``(W_L .. W_{l+1})^T (W_{L:1} X - Y) (W_{l-1:1} X)^T``."""
    X, Y = setting.samples()
    rate = setting.learning_rate

    def make() -> Callable[[], float]:
        weights = setting.weights()

        def step() -> float:
            features = [X]
            for w in weights:
                features.append(w @ features[-1])
            residual = features.pop() - Y
            loss = 0.5 * float((residual**2).sum())
            gradients: list[_Array] = []
            above: Any = None
            for w, feature in zip(reversed(weights), reversed(features), strict=True):
                if above is None:
                    gradients.append(residual @ feature.T)
                    above = w
                else:
                    gradients.append(above.T @ residual @ feature.T)
                    if len(gradients) < len(weights):
                        above = above @ w
            for w, gradient in zip(weights, reversed(gradients), strict=True):
                w -= rate * gradient
            return loss

        return step

    n_threads = 0
    if tune and setting.dim <= _SMALL and _blas_controller() is not None:
        forms = [lambda n=n: partial(_limit_blas_threads(n, _repeat_steps(make())), 8) for n in (1, 0)]
        n_threads = (1, 0)[_find_fastest(forms)]
    return Peer(
        "numpy-naive", _limit_blas_threads(n_threads, _repeat_steps(make())), "1 thread" if n_threads else ""
    )


def numpy_thin(setting: Setting, tune: bool = True) -> Peer:
    """Multiply from the side of the K outputs, without samples, into preallocated arrays."""
    # Blocks of rows keep the update within the caches, which pays where it is a product of thin matrices.
    is_thin = 4 * setting.n_outputs <= setting.dim
    form = _Form(32 if is_thin and setting.dim > _SMALL else 0, "C", 0)
    if tune:
        counts = (1, 0) if _blas_controller() is not None else (0,)
        forms = [form._replace(order=order, n_threads=n) for n in counts for order in _ORDERS[: 1 + is_thin]]
        form = forms[_find_fastest([partial(_numpy_form, setting, form) for form in forms])]
        if is_thin:
            forms = [form._replace(block=block) for block in _BLOCKS if block < setting.dim]
            form = forms[_find_fastest([partial(_numpy_form, setting, form) for form in forms])]
    parts = [
        f"update in blocks of {form.block} rows" if form.block else "update in one piece",
        *(["thin matrices by columns"] if form.order == "F" else []),
        *(["1 thread"] if form.n_threads else []),
    ]
    return Peer(
        "numpy-thin",
        _limit_blas_threads(form.n_threads, _repeat_steps(_numpy_step(setting, form))),
        ", ".join(parts),
    )


class _Form(NamedTuple):
    """Form of NumPy's thin step; all forms compute the same numbers."""

    block: int  # rows of the update that are computed at a time; 0 for all
    order: Literal["C", "F"]  # of the thin matrices
    n_threads: int  # of BLAS; 0 for its own choice


def _numpy_form(setting: Setting, form: _Form) -> Callable[[], object]:
    """Return a job of some steps, to compare forms."""
    advance = _limit_blas_threads(form.n_threads, _repeat_steps(_numpy_step(setting, form)))
    return partial(advance, 8 if setting.dim <= _SMALL else 1)


def _numpy_step(setting: Setting, form: _Form) -> Callable[[], float]:
    rate, n_layers = setting.learning_rate, setting.depth
    target = np.array(setting.target, order=form.order)
    weights = setting.weights()
    weights[-1] = np.array(weights[-1], order=form.order)
    # above[l] is W_L .. W_{l+1} in the counting of the mathematics.
    above = [np.empty_like(target) for _ in weights[:-1]] + [weights[-1]]
    error, other = np.empty_like(target), np.empty_like(target)
    size = min(form.block or setting.dim, setting.dim)
    update = np.empty((size, setting.dim))

    def step() -> float:
        nonlocal error, other
        for position in reversed(range(n_layers - 1)):
            np.matmul(above[position + 1], weights[position], out=above[position])
        np.subtract(above[0], target, out=error)
        flat = error.ravel(order="K")
        loss = 0.5 * float(flat @ flat)
        np.multiply(error, rate, out=error)
        for w, a in zip(weights[:-1], above[1:], strict=True):
            np.matmul(error, w.T, out=other)
            for first in range(0, len(w), size):
                rows = w[first : first + size]
                change = np.matmul(a[:, first : first + size].T, error, out=update[: len(rows)])
                np.subtract(rows, change, out=rows)
            error, other = other, error
        np.subtract(weights[-1], error, out=weights[-1])
        return loss

    return step


@cache
def _blas_controller() -> Any:
    """Return the controller of BLAS threads, or None where threadpoolctl is not installed."""
    try:
        import threadpoolctl
    except ModuleNotFoundError:
        return None
    return threadpoolctl.ThreadpoolController().select(user_api="blas")


def _limit_blas_threads(n_threads: int, advance: Callable[[int], float]) -> Callable[[int], float]:
    """Return `advance` with a limit on the threads of BLAS; 0 for no limit."""
    if n_threads == 0:
        return advance

    def advance_limited(n: int) -> float:
        with _blas_controller().limit(limits=n_threads):
            return advance(n)

    return advance_limited


def _find_fastest(makers: Sequence[Callable[[], Callable[[], object]]]) -> int:
    """Return the index of the form with the least median time; forms are made one after the other."""
    medians = []
    for make in makers:
        job = make()
        times = [record.elapsed(job)]  # warm-up
        if times[0] < 10 * _LONG:
            times = [record.elapsed(job)]
        while times[0] < _LONG and len(times) < _TRIES:
            times.append(record.elapsed(job))
        medians.append(statistics.median(times))
    return medians.index(min(medians))


# --------------------------------------------------------------------------------------------------
# PyTorch
# --------------------------------------------------------------------------------------------------


def _torch_peer(name: str, setting: Setting, tune: bool, make: Callable[[], Callable[[], float]]) -> Peer:
    """Return a peer on one thread or on all, whichever is faster here: for small work PyTorch takes all."""
    import torch

    all_threads = torch.get_num_threads()

    def on(n_threads: int) -> Callable[[int], float]:
        advance = _repeat_steps(make())

        def advance_limited(n: int) -> float:
            # OpenMP's setting is that of dlnfast too.
            torch.set_num_threads(n_threads)
            try:
                return advance(n)
            finally:
                torch.set_num_threads(all_threads)

        return advance_limited

    count = all_threads
    if setting.dim <= _SMALL and tune and all_threads > 1:
        n = 8
        count = (1, all_threads)[_find_fastest([lambda c=c: partial(on(c), n) for c in (1, all_threads)])]  # type: ignore[misc]
    return Peer(name, on(count), f"{count} thread{'s' * (count > 1)}")


def torch_autograd(setting: Setting, tune: bool = True) -> Peer:
    """Build the network on its samples, let autograd differentiate, and step by `torch.optim.SGD`."""
    import torch

    X, Y = (torch.from_numpy(array) for array in setting.samples())

    def predict(parameters: list[Any]) -> Any:
        prediction = X
        for w in parameters:
            prediction = w @ prediction
        return prediction

    return _torch_peer("torch-autograd", setting, tune, lambda: _torch_sgd(setting, predict, Y))


def torch_autograd_statistics(setting: Setting, tune: bool = True) -> Peer:
    """Let autograd differentiate ``1/2 ||W_L .. W_1 - Phi||^2``, multiplied from the side of the outputs."""
    import torch

    target = torch.from_numpy(setting.target)

    def predict(parameters: list[Any]) -> Any:
        prediction = parameters[-1]
        for w in reversed(parameters[:-1]):
            prediction = prediction @ w
        return prediction

    return _torch_peer(
        "torch-autograd-statistics", setting, tune, lambda: _torch_sgd(setting, predict, target)
    )


def _torch_sgd(setting: Setting, predict: Callable[[list[Any]], Any], outputs: Any) -> Callable[[], float]:
    import torch

    parameters = [torch.from_numpy(w).requires_grad_() for w in setting.weights()]
    optimizer = torch.optim.SGD(parameters, lr=setting.learning_rate)

    def step() -> float:
        optimizer.zero_grad()
        loss = 0.5 * (predict(parameters) - outputs).square().sum()
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


def torch_thin(setting: Setting, tune: bool = True) -> Peer:
    """Write the thin step by hand: `addmm_` adds the update in place."""
    import torch

    target, rate = torch.from_numpy(setting.target), setting.learning_rate

    def make() -> Callable[[], float]:
        weights = [torch.from_numpy(w) for w in setting.weights()]
        above = [torch.empty_like(target) for _ in weights[:-1]] + [weights[-1]]
        error, other = torch.empty_like(target), torch.empty_like(target)

        def step() -> float:
            nonlocal error, other
            for position in reversed(range(len(weights) - 1)):
                torch.mm(above[position + 1], weights[position], out=above[position])
            torch.sub(above[0], target, out=error)
            loss = 0.5 * float(torch.dot(error.view(-1), error.view(-1)))
            for w, a in zip(weights[:-1], above[1:], strict=True):
                torch.mm(error, w.T, out=other)
                w.addmm_(a.T, error, alpha=-rate)
                error, other = other, error
            weights[-1].sub_(error, alpha=rate)
            return loss

        return step

    return _torch_peer("torch-thin", setting, tune, make)


def torch_compiled(setting: Setting, tune: bool = True) -> Peer:
    """Compile the thin step with `torch.compile`."""
    import torch

    target, rate = torch.from_numpy(setting.target), setting.learning_rate

    def thin(weights: list[Any]) -> Any:
        above = [weights[-1]]
        for w in reversed(weights[:-1]):
            above.append(above[-1] @ w)
        above.reverse()
        error = above[0] - target
        loss = 0.5 * error.square().sum()
        for w, a in zip(weights[:-1], above[1:], strict=True):
            below = error @ w.T
            w.addmm_(a.T, error, alpha=-rate)
            error = below
        weights[-1].sub_(error, alpha=rate)
        return loss

    torch.compiler.reset()  # every setting is compiled for its own sizes

    def make() -> Callable[[], float]:
        weights = [torch.from_numpy(w) for w in setting.weights()]
        compiled = torch.compile(thin, dynamic=False)

        def step() -> float:
            with torch.no_grad():
                return float(compiled(weights).item())

        return step

    return _torch_peer("torch-compile", setting, tune, make)


# --------------------------------------------------------------------------------------------------
# JAX
# --------------------------------------------------------------------------------------------------


def jax_autodiff(setting: Setting, tune: bool = True) -> Peer:
    """Compile a step of `jax.value_and_grad` on the samples."""
    import jax

    def step(weights: tuple[Any, ...], X: Any, Y: Any) -> tuple[tuple[Any, ...], Any]:
        def loss(layers: tuple[Any, ...]) -> Any:
            prediction = X
            for w in layers:
                prediction = w @ prediction
            return 0.5 * ((prediction - Y) ** 2).sum()

        value, gradients = jax.value_and_grad(loss)(weights)
        moved = tuple(w - setting.learning_rate * g for w, g in zip(weights, gradients, strict=True))
        return moved, value

    return _jax_peer("jax-autodiff", setting, tune, step, setting.samples())


def jax_thin(setting: Setting, tune: bool = True) -> Peer:
    """Compile the thin step, written by hand."""

    def step(weights: tuple[Any, ...], target: Any) -> tuple[tuple[Any, ...], Any]:
        above = [weights[-1]]
        for w in reversed(weights[:-1]):
            above.append(above[-1] @ w)
        above.reverse()
        error = above[0] - target
        loss = 0.5 * (error**2).sum()
        moved = []
        for w, a in zip(weights[:-1], above[1:], strict=True):
            moved.append(w - setting.learning_rate * (a.T @ error))
            error = error @ w.T
        return (*moved, weights[-1] - setting.learning_rate * error), loss

    return _jax_peer("jax-thin", setting, tune, step, (setting.target,))


def _jax_peer(
    name: str, setting: Setting, tune: bool, step: Callable[..., tuple[Any, Any]], data: tuple[_Array, ...]
) -> Peer:
    """Compile single steps and whole runs, both with donated weights, and take the faster one."""
    import jax

    def take_steps(weights: Any, n: Any, *constants: Any) -> Any:
        def body(_: Any, state: Any) -> Any:
            return step(state[0], *constants)

        zero = jax.numpy.zeros((), dtype=jax.numpy.float64)
        return jax.lax.fori_loop(0, n, body, (weights, zero))

    with jax.enable_x64(True):
        constants = tuple(jax.numpy.asarray(array) for array in data)
        single = jax.jit(step, donate_argnums=0)
        whole = jax.jit(take_steps, donate_argnums=0)
    state: dict[str, Any] = {}

    def restart() -> None:
        with jax.enable_x64(True):
            state["weights"] = tuple(jax.numpy.asarray(w) for w in setting.weights())

    def advance_by_steps(n: int) -> float:
        loss = float("nan")
        with jax.enable_x64(True):
            for _ in range(n):
                state["weights"], loss = single(state["weights"], *constants)
            jax.block_until_ready(state["weights"])
            return float(loss)

    def advance_at_once(n: int) -> float:
        with jax.enable_x64(True):
            state["weights"], loss = whole(state["weights"], n, *constants)
            jax.block_until_ready(state["weights"])
            return float(loss)

    restart()
    position = 1
    if tune:
        n = 8 if setting.dim <= _SMALL else 1
        position = _find_fastest([lambda: partial(advance_by_steps, n), lambda: partial(advance_at_once, n)])
        restart()
    return Peer(
        name,
        (advance_by_steps, advance_at_once)[position],
        ("single steps compiled", "whole runs compiled")[position],
    )


# --------------------------------------------------------------------------------------------------
# dlnfast
# --------------------------------------------------------------------------------------------------


def dlnfast_dense(setting: Setting, tune: bool = True) -> Peer:
    """Run the dense engine."""
    return _engine("dense", setting)


def dlnfast_reduced(setting: Setting, tune: bool = True) -> Peer:
    """Run the reduced engine, on lazily sampled weights from some width on."""
    return _engine("reduced", setting)


def dlnfast_torch(setting: Setting, tune: bool = True) -> Peer:
    """Run the torch engine on the host."""
    import torch

    if not tune or setting.dim > _SMALL or torch.get_num_threads() == 1:
        return _engine("torch", setting)
    counts = (1, torch.get_num_threads())
    jobs = [partial(_engine("torch", setting, count).seconds, 8) for count in counts]
    return _engine("torch", setting, counts[_find_fastest([partial(_same, job) for job in jobs])])


def _same(job: Callable[[], object]) -> Callable[[], object]:
    return job


def _engine(engine: str, setting: Setting, n_threads: int = 0) -> Peer:
    problem = setting.problem()
    weights: list[_Array] | ImplicitWeights
    if setting.explicit:
        weights = setting.weights()
    else:
        weights = orthogonal(setting.widths, setting.scale, implicit=True)

    def run(steps: int, n: int, callback: Callback | None = None) -> Trajectory:
        return train(
            problem,
            weights,
            learning_rate=setting.learning_rate,
            steps=steps,
            engine=engine,
            record=Record(every=n, singular_values=None, callback=callback),
            n_threads=n_threads,
        )

    def advance(n: int) -> float:
        return float(run(n, n).loss[n - 1])

    def clock(n: int) -> float:
        # Every run starts anew: the n steps after the first n, between two records.
        times: list[float] = []
        run(2 * n, n, lambda step, loss: times.append(time.perf_counter()))
        return times[2] - times[1]

    if engine == "reduced":
        advance(1)  # raises where no closure holds
    note = f"{n_threads} thread{'s' * (n_threads > 1)}" if n_threads else ""
    return Peer(f"dlnfast-{engine}", advance, note, clock=clock)


# --------------------------------------------------------------------------------------------------
# All of them
# --------------------------------------------------------------------------------------------------

#: Name -> constructor. Peers that send the N samples through the network cost O(N) per step.
PEERS: Final[dict[str, Callable[[Setting, bool], Peer]]] = {
    "dlnfast-reduced": dlnfast_reduced,
    "dlnfast-dense": dlnfast_dense,
    "numpy-thin": numpy_thin,
    "torch-thin": torch_thin,
    "torch-compile": torch_compiled,
    "jax-thin": jax_thin,
    "torch-autograd-statistics": torch_autograd_statistics,
    "torch-autograd": torch_autograd,
    "jax-autodiff": jax_autodiff,
    "numpy-naive": numpy_naive,
}
#: Who takes part in a case of its own alone.
FURTHER: Final[dict[str, Callable[[Setting, bool], Peer]]] = {"dlnfast-torch": dlnfast_torch}
#: As tables and figures call them.
LABELS: Final = {
    "dlnfast-reduced": "dlnfast reduced",
    "dlnfast-dense": "dlnfast dense",
    "dlnfast-torch": "dlnfast, torch engine",
    "numpy-thin": "NumPy thin",
    "torch-thin": "PyTorch thin",
    "torch-compile": "PyTorch compiled thin",
    "jax-thin": "JAX thin",
    "torch-autograd-statistics": "PyTorch autograd, no samples",
    "torch-autograd": "PyTorch autograd",
    "jax-autodiff": "JAX autodiff",
    "numpy-naive": "NumPy naive",
}
#: Peers that send the samples through the network.
ON_SAMPLES: Final = ("torch-autograd", "jax-autodiff", "numpy-naive")
_INSTALL: Final = {"torch": "pip install torch", "jax": "pip install jax"}
#: Peers whose code comes from a compiler, which may fail.
_COMPILED: Final = ("torch-compile", "jax-thin", "jax-autodiff")


def build(
    setting: Setting, names: Iterable[str], tune: bool = True, pause: float = PAUSE
) -> tuple[dict[str, Peer], dict[str, str]]:
    """Return the peers that can run here, and for each other one the reason why it cannot.

    Parameters
    ----------
    setting : Setting
    names : iterable of str
        Keys of `PEERS` or `FURTHER`.
    tune : bool
        Take the fastest of several forms of a peer, which costs time and memory; else the one that is
        fastest where layers are large.
    pause : float
        Seconds before each peer.

    Returns
    -------
    peers : dict of str to Peer
        Peers in the order of the names, before their first step.
    skipped : dict of str to str

    Raises
    ------
    ModuleNotFoundError
        For a module that is not an optional peer.
    """
    peers: dict[str, Peer] = {}
    skipped: dict[str, str] = {}
    for name in names:
        if name != "dlnfast-reduced" and not setting.explicit:
            skipped[name] = (
                f"{setting.depth - 1} layers of {setting.dim} x {setting.dim} do not fit the memory"
            )
            continue
        try:
            time.sleep(pause)  # forms are timed
            peers[name] = (PEERS | FURTHER)[name](setting, tune)
        except ModuleNotFoundError as error:
            if error.name not in _INSTALL:
                raise
            skipped[name] = f"{error.name} is not installed: {_INSTALL[error.name]}"
        except AssumptionError as error:
            skipped[name] = _first_line(error)
        except Exception as error:
            if name not in _COMPILED:
                raise
            skipped[name] = f"{type(error).__name__}: {_first_line(error)}"
    return peers, skipped


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def check_agreement(peers: dict[str, Peer], skipped: dict[str, str]) -> dict[str, Any]:
    """Compare the losses of all peers over several steps; a peer that fails to compile moves to `skipped`.

    Parameters
    ----------
    peers : dict of str to Peer
        As `build` returned them, none of which has taken a step.
    skipped : dict of str to str

    Returns
    -------
    dict
        ``losses`` at the steps compared, and the ``largest_relative_difference`` from them.

    Raises
    ------
    RuntimeError
        For a peer whose losses differ by more than 1e-9 of them.
    """
    found: dict[str, _Array] = {}
    for name in list(peers):
        try:
            found[name] = _losses(peers[name])
        except Exception as error:
            if name not in _COMPILED:
                raise
            skipped[name] = f"{type(error).__name__}: {_first_line(error)}"
            del peers[name]
    if not found:
        return {"steps": [], "losses": [], "largest_relative_difference": 0.0}
    reference = found.get("numpy-thin", next(iter(found.values())))
    worst = 0.0
    for name, losses in found.items():
        difference = float(np.max(np.abs(losses - reference) / np.abs(reference)))
        if not difference <= _TOLERANCE:
            raise RuntimeError(f"{name} has losses {losses}; wanted {reference}, {difference:.1e} apart")
        worst = max(worst, difference)
    steps = list(_CHECKED_STEPS)
    return {"steps": steps, "losses": reference.tolist(), "largest_relative_difference": worst}


def _losses(peer: Peer) -> _Array:
    """Return the losses at the steps to check, from the start."""
    if peer.clock is not None:
        return np.array([peer.advance(step + 1) for step in _CHECKED_STEPS])
    return np.array([peer.advance(n) for n in np.diff([-1, *_CHECKED_STEPS]).tolist()])
