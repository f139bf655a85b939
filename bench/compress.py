# SPDX-License-Identifier: MIT
"""Compression of trained networks: held-out errors with and without data, and times of large layers.

``python bench/compress.py [mlp vgg vit time]``. Fashion-MNIST and CIFAR-10 are read from DLNFAST_DATA.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

import dlnfast as dln
from dlnfast.torch import MLP, VGG, ImageData, OptimizerOptions, Trainer, ViT, compress, load_images

SIZE = 4096


def train(model: nn.Module, images: ImageData, epochs: int, learning_rate: float, optimizer: str) -> float:
    """Train a model, and return its accuracy on the test images."""
    trainer = Trainer(
        model,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=64,
        optimizer=OptimizerOptions(optimizer),
    )
    trainer.fit(*images.train)
    return accuracy(model, images)


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageData) -> float:
    model.eval()
    inputs, labels = images.test
    found = torch.cat([model(part).argmax(1) for part in inputs.split(250)])
    return float((found == labels).double().mean())


def compare(name: str, model: nn.Module, images: ImageData, ranks: list[int], n_data: int) -> None:
    """Compare compression without data, with data in one pass, and layer by layer, on held-out images."""
    full = accuracy(model, images)
    data = [(part,) for part in images.train.inputs[:n_data].split(250)]
    held_out = [(part,) for part in images.test.inputs[:500].split(250)]
    print(f"\n{name}: accuracy {full:.4f}, {n_data} images as data, 500 held out")
    for rank in ranks:
        reports = {}
        for kind, given in (("weights", None), ("one pass", data), ("data", data)):
            small = copy.deepcopy(model)
            start = time.perf_counter()
            report = reports[kind] = compress(
                small, rank=rank, data=given, held_out=held_out, sequential=kind == "data"
            )
            print(
                f"rank {rank:3d} {kind:8s}: error of the model {report.function_error:.4f}, accuracy "
                f"{accuracy(small, images):.4f}, parameters {report.parameters_before} -> "
                f"{report.parameters_after}, forward {1e3 * report.seconds_before:.1f} -> "
                f"{1e3 * report.seconds_after:.1f} ms, took {time.perf_counter() - start:.1f} s"
            )
        layers = {key: (reports["weights"].layers[key], reports["data"].layers[key]) for key in report.layers}
        worse = [key for key, (w, d) in layers.items() if not d.held_out_error < w.held_out_error]
        ratio = statistics.median(d.held_out_error / w.held_out_error for w, d in layers.values())
        print(
            f"         held-out output error of the {len(layers)} layers: median ratio data / weights "
            f"{ratio:.3f}; layers where data does not help: {worse}"
        )


def time_large() -> None:
    """Time 4096 x 4096 layers to rank 64 beside a full singular value decomposition."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(SIZE, SIZE, generator=generator)
    frames = [torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator))[0] for _ in range(2)]
    matrices: dict[str, torch.Tensor] = {"Gaussian": gaussian}
    for power in (0.5, 1.0):
        values = torch.arange(1, SIZE + 1) ** -power
        matrices[f"sigma_i = i^-{power}"] = (frames[0] * values) @ frames[1].T

    def timed(call: Callable[[], object]) -> tuple[float, object]:
        start = time.perf_counter()
        result = call()
        return time.perf_counter() - start, result

    for name, matrix in matrices.items():
        seconds = []
        for _ in range(3):
            model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False))
            model[0].weight.data.copy_(matrix)
            taken, report = timed(lambda model=model: dln.torch.compress(model, rank=64))
            seconds.append(taken)
        full, svd = timed(lambda matrix=matrix: torch.linalg.svd(matrix))
        tail = float((svd[1][64:].double() ** 2).sum() / (svd[1].double() ** 2).sum()) ** 0.5
        error = report.layers["0"].weight_error
        print(
            f"{name}: compress {statistics.median(seconds):.2f} s, torch.linalg.svd {full:.1f} s, ratio "
            f"{full / statistics.median(seconds):.1f}; weight error {error:.6f}, above LAPACK's by "
            f"{error / tail - 1:.1e} relative"
        )


def main() -> None:
    torch.manual_seed(0)
    wanted = sys.argv[1:] or ["mlp", "vgg", "vit", "time"]
    if "mlp" in wanted:
        images = load_images("fashion-mnist", per_class=500, test_per_class=200)
        model = MLP([784, 256, 256, 256, 10], bias=True, seed=0)
        train(model, images, 6, 0.05, "sgd")
        compare("MLP, Fashion-MNIST", model, images, [4, 10, 20, 40], 2000)
    if "vgg" in wanted or "vit" in wanted:
        images = load_images("cifar10", per_class=400, test_per_class=100)
        if "vgg" in wanted:
            vgg = VGG("vgg11", width=0.25, seed=0)
            train(vgg, images, 6, 0.05, "sgd")
            compare("VGG-11 of quarter width, CIFAR-10", vgg, images, [4, 8, 16, 32], 1000)
        if "vit" in wanted:
            vit = ViT(dim=96, depth=4, n_heads=4, seed=0)
            train(vit, images, 6, 1e-3, "adamw")
            compare("ViT of width 96 and depth 4, CIFAR-10", vit, images, [4, 8, 16, 32], 1000)
    if "time" in wanted:
        time_large()


if __name__ == "__main__":
    main()
