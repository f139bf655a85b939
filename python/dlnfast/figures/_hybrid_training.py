# SPDX-License-Identifier: MIT
"""One training of a hybrid network on images drawn by its seed, with an early stop on validation images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._support.errors import DivergedError

if TYPE_CHECKING:
    from ..torch import ImageData, Samples


def train_hybrid(run: Mapping[str, Any], data: ImageData) -> dict[str, Any]:
    """Train one network, and go back to the epoch with the best validation accuracy.

    Parameters
    ----------
    run : dict
        All settings of the training: "nonlinear" and "depth" of the network, its "width", "loss",
        "learning_rate", "momentum", "weight_decay", "epochs", "batch_size", the numbers of "images" and of
        "validation" images, the "seed" that draws them, the weights and the order of the images, and its
        "purpose". "rate" measures the validation accuracy alone, and "report" the other results, too.
    data : ImageData
        Images on the device of the training.

    Returns
    -------
    dict
        "validation_accuracy" and "best_epoch"; for a report "test_accuracy" and "compression" (C of every
        hidden layer on the training images) at that epoch, "last_test_accuracy" and "last_compression" after
        the last one, and the "train_accuracy" of the last one. A training that diverges has the validation
        accuracy 0, and no other results.

    Raises
    ------
    ValueError
        If the data set has fewer images.
    """
    from ..torch import HybridMLP, Trainer
    from ..torch._cuda_graphs import capture_passes

    train, validation = _split_images(data.train, run)
    model = HybridMLP(
        train.inputs[0].numel(),
        run["width"],
        data.n_classes,
        n_nonlinear=run["nonlinear"],
        n_linear=run["depth"] - 1 - run["nonlinear"],
        initial="torch",
        seed=run["seed"],
        device=train.inputs.device,
    )
    capture_passes(model, train.inputs[: run["batch_size"]])
    trainer = Trainer(
        model,
        loss=run["loss"],
        optimizer=lambda parameters: _make_sgd(list(parameters), run),
        epochs=run["epochs"],
        batch_size=run["batch_size"],
        seed=run["seed"],
    )
    best = {"validation_accuracy": 0.0, "best_epoch": 0}
    kept: dict[str, Any] = {}

    def after_epoch(done: int) -> None:
        accuracy = trainer.evaluate(*validation).accuracy
        if accuracy > best["validation_accuracy"]:
            best.update(validation_accuracy=accuracy, best_epoch=done)
            kept.update({name: tensor.clone() for name, tensor in model.state_dict().items()})

    try:
        history = trainer.fit(*train, after_epoch=after_epoch)
    except DivergedError:
        return {"validation_accuracy": 0.0, "best_epoch": 0}
    if run["purpose"] != "report":
        return best
    outcome = {
        **best,
        "train_accuracy": history.accuracy[-1],
        "last_test_accuracy": trainer.evaluate(*data.test).accuracy,
        "last_compression": _measure_compression(model, train, data.n_classes),
    }
    model.load_state_dict(kept)
    return {
        **outcome,
        "test_accuracy": trainer.evaluate(*data.test).accuracy,
        "compression": _measure_compression(model, train, data.n_classes),
    }


def _split_images(samples: Samples, run: Mapping[str, Any]) -> tuple[Samples, Samples]:
    """Return training and validation images, drawn without replacement by the seed of a run."""
    from ..torch import Samples

    n_train, n_validation, n = run["images"], run["validation"], len(samples.labels)
    if n_train + n_validation > n:
        raise ValueError(
            f"images ({n_train}) and validation ({n_validation}) are more than the {n} training images of "
            f"{run['dataset']}; wanted at most as many"
        )
    order = np.random.default_rng(run["seed"]).permutation(n)
    parts = order[:n_train], order[n_train : n_train + n_validation]
    train, validation = (Samples(*(tensor[part] for tensor in samples)) for part in parts)
    return train, validation


def _make_sgd(parameters: Sequence[Any], run: Mapping[str, Any]) -> Any:
    """Return SGD in its fastest form: fused, where this version of PyTorch has it for the device."""
    import torch

    options = {"lr": run["learning_rate"], "momentum": run["momentum"], "weight_decay": run["weight_decay"]}
    try:
        return torch.optim.SGD(parameters, **options, fused=True)
    except (RuntimeError, TypeError):
        return torch.optim.SGD(parameters, **options)


def _measure_compression(model: Any, samples: Samples, n_classes: int) -> list[float]:
    """Return C of every hidden layer on the training images, in evaluation mode, in five digits."""
    from ..torch import Batches, measure_layers

    batches = Batches(*samples, 512)
    found = measure_layers(model, batches, model.hidden_layers, n_classes=n_classes, ranks=False, probe=None)
    return [float(f"{layer.compression:.5g}") for layer in found]
