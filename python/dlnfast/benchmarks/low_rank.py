# SPDX-License-Identifier: MIT
"""Cases of low-rank training: steps of whole networks, deep products and low ranks."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any, Final

from . import record
from .options import Options

#: Widths of the network, samples of a step, and the low rank.
_WIDTHS: Final = (784, 512, 512, 10)
_QUICK_WIDTHS: Final = (40, 32, 32, 10)
_BATCH: Final = 128
_RANK: Final = 20
_HIDDEN: Final = ("0", "2")
#: Steps of one measurement.
_STEPS: Final = 10


def low_rank_step(options: Options) -> dict[str, Any]:
    """Time training steps of an MLP: whole, with a deep product, with a compressed one, at low rank."""
    rows: list[dict[str, Any]] = []
    if importlib.util.find_spec("torch") is None:
        reason = "torch is not installed: pip install torch"
        print(f"low-rank-step: skipped, {reason}")
        return {"case": "low-rank-step", "rows": rows, "skipped": reason}
    widths = _QUICK_WIDTHS if options.quick else _WIDTHS
    arguments = {"widths": list(widths), "repeats": options.repeats}
    result = record.in_process("low_rank:training_steps", arguments)
    for what, seconds in result["seconds"].items():
        row = {"what": what, "parameters": result["parameters"][what], "seconds": seconds}
        rows.append(row)
        ratio = result["seconds"]["original"]["median"] / seconds["median"]
        print(
            f"{what:<34} {row['parameters']:>9,} parameters  {record.format_seconds(seconds['median']):>8} a "
            f"step, {ratio:.2f} of the original's rate",
            flush=True,
        )
    for what, reason in result["skipped"].items():
        print(f"{what:<34} skipped, {reason}")
    return {"case": "low-rank-step", "rows": rows, "machine": result["machine"]}


def training_steps(widths: list[int], repeats: int) -> dict[str, Any]:
    """Time Adam steps of all networks in turns; return seconds and numbers of parameters."""
    import torch
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(0)
    batch = (
        torch.randn(_BATCH, widths[0], generator=generator),
        torch.randint(widths[-1], (_BATCH,), generator=generator),
    )
    skipped: dict[str, str] = {}
    networks: dict[str, Any] = {}
    for what, build in _NETWORKS.items():
        try:
            networks[what] = build(widths, batch)
        except ModuleNotFoundError as error:
            skipped[what] = f"{error.name} is not installed"

    def steps(model: Any, optimizer: Any) -> Callable[[], None]:
        def run() -> None:
            for _ in range(_STEPS):
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(model(batch[0]), batch[1]))
                optimizer.step()

        return run

    jobs = {what: steps(*pair) for what, pair in networks.items()}
    for job in jobs.values():
        job()
    times = record.time_interleaved(repeats, **jobs)
    return {
        "seconds": {
            what: {key: value / _STEPS for key, value in found.items()} for what, found in times.items()
        },
        "parameters": {what: sum(p.numel() for p in pair[0].parameters()) for what, pair in networks.items()},
        "skipped": skipped,
        "machine": record.machine(),
    }


def _network(widths: list[int]) -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers: list[Any] = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _loss(model: Any, batch: Any) -> Any:
    from torch.nn import functional as F

    return F.cross_entropy(model(batch[0]), batch[1])


def _original(widths: list[int], batch: Any) -> tuple[Any, Any]:
    import torch

    model = _network(widths)
    return model, torch.optim.Adam(model.parameters(), 1e-3)


def _deep_product(widths: list[int], batch: Any) -> tuple[Any, Any]:
    import torch

    from ..torch import overparameterize

    model = overparameterize(_network(widths), 3, layers=_HIDDEN[-1])
    return model, torch.optim.Adam(model.parameters(), 1e-3)


def _formed_product(widths: list[int], batch: Any) -> tuple[Any, Any]:
    """Return the loop that users write: three parameters, whose product is the weight of every step."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class FormedProduct(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            width = layer.out_features
            self.factors = nn.ParameterList(torch.eye(width) for _ in range(2))
            self.first, self.bias = layer.weight, layer.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.factors[1] @ self.factors[0] @ self.first, self.bias)

    model = _network(widths)
    model[2] = FormedProduct(model[2])
    return model, torch.optim.Adam(model.parameters(), 1e-3)


def _factorized(layers: tuple[str, ...], rank: int) -> Callable[[list[int], Any], tuple[Any, Any]]:
    def build(widths: list[int], batch: Any) -> tuple[Any, Any]:
        import torch

        from ..torch import factorize

        model = _network(widths)
        handle = factorize(model, layers, rank=rank, batches=batch, loss=_loss)
        return model, torch.optim.Adam(handle.param_groups(1e-3))

    return build


def _tensorly(widths: list[int], batch: Any) -> tuple[Any, Any]:
    """Return both hidden layers by tensorly-torch, as Tucker decompositions ``left core right``."""
    import tltorch
    import torch

    model = _network(widths)
    for number in map(int, _HIDDEN):
        layer = model[number]
        model[number] = tltorch.FactorizedLinear(
            (layer.in_features,), (layer.out_features,), factorization="tucker", rank=(_RANK, _RANK)
        )
    return model, torch.optim.Adam(model.parameters(), 1e-3)


_NETWORKS: Final[dict[str, Callable[[list[int], Any], tuple[Any, Any]]]] = {
    "original": _original,
    "deep product, full width": _deep_product,
    "deep product, formed at every step": _formed_product,
    "compressed product": _factorized(_HIDDEN[-1:], _RANK),
    f"low rank {_RANK}": _factorized(_HIDDEN, _RANK),
    f"low rank {_RANK}, tensorly-torch": _tensorly,
}
