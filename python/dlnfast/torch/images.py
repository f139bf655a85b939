"""Image data sets as tensors: standardised by channel, with mini-batches that need no workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .._arrays import check_count
from ..data import load_cifar10, load_fashion_mnist

__all__ = ["Batches", "ImageData", "Samples", "load_images"]

_Loader = Callable[..., tuple[npt.NDArray[Any], npt.NDArray[Any]]]
#: Name -> loader and shape of an image.
DATA_SETS: Final[dict[str, tuple[_Loader, tuple[int, int, int]]]] = {
    "cifar10": (load_cifar10, (3, 32, 32)),
    "fashion-mnist": (load_fashion_mnist, (1, 28, 28)),
}


class Samples(NamedTuple):
    """Inputs, one sample along the first axis, and labels 0 .. K - 1."""

    inputs: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class ImageData:
    """A data set in memory.

    Attributes
    ----------
    train, test : Samples
        Images (N, channels, rows, columns) in float32, labels (N,) in int64.
    mean, std : tuple of float
        Of each channel over the training images, pixels in [0, 1]: what was subtracted, and divided by.
    n_classes : int
        K.
    """

    train: Samples
    test: Samples
    mean: tuple[float, ...]
    std: tuple[float, ...]
    n_classes: int = 10


def load_images(
    name: str,
    *,
    path: str | os.PathLike[str] | None = None,
    per_class: int | None = None,
    test_per_class: int | None = None,
) -> ImageData:
    """Read CIFAR-10 or Fashion-MNIST from local files as standardised tensors; nothing is downloaded.

    Parameters
    ----------
    name : {"cifar10", "fashion-mnist"}
    path : path, optional
        As for `dlnfast.load_cifar10` and `dlnfast.load_fashion_mnist`.
    per_class, test_per_class : int, optional
        Only the first so many images of every class, of the training and test images.

    Returns
    -------
    ImageData

    Raises
    ------
    FileNotFoundError
        Naming every place that was looked at, and where the files are to be had.
    ValueError
        For another name, a damaged file, or classes with fewer images.

    Notes
    -----
    Every channel is shifted and scaled to mean 0 and variance 1 over the training images that were kept.
    """
    if name not in DATA_SETS:
        raise ValueError(f"name is {name!r}; wanted one of {', '.join(DATA_SETS)}")
    loader, shape = DATA_SETS[name]
    splits = {}
    for split, count in (("train", per_class), ("test", test_per_class)):
        images, labels = loader(path, split, per_class=count)
        splits[split] = images.reshape(-1, *shape), torch.from_numpy(np.ascontiguousarray(labels))
    pixels = splits["train"][0]
    # Sums of squares of bytes are exact in int64.
    n = pixels.size // shape[0]
    sums = [int(np.sum(pixels[:, c], dtype=np.int64)) for c in range(shape[0])]
    squares = [int(np.sum(np.square(pixels[:, c], dtype=np.int64))) for c in range(shape[0])]
    mean = np.array(sums) / n
    std = np.sqrt(np.array(squares) / n - mean**2)

    def standardised(images: npt.NDArray[Any]) -> torch.Tensor:
        shifted = images.astype(np.float32)
        shifted -= mean.astype(np.float32)[:, None, None]
        shifted /= np.maximum(std, 1e-12).astype(np.float32)[:, None, None]
        return torch.from_numpy(shifted)

    train, test = (Samples(standardised(images), labels) for images, labels in splits.values())
    return ImageData(train, test, tuple((mean / 255).tolist()), tuple((std / 255).tolist()))


class Batches:
    """Samples in memory, cut into mini-batches; can be iterated over again and again.

    Parameters
    ----------
    inputs, labels : Tensor
        As many along the first axis.
    batch_size : int
        The last batch of a pass may be smaller.
    shuffle : bool
        A new order in every pass.
    seed : int
        Of the orders: pass number e of a seed is always the same.
    device : device, optional
        Where batches are brought to.

    Attributes
    ----------
    epoch : int
        Number of the next pass.
    """

    def __init__(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        batch_size: int = 128,
        *,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        if len(inputs) != len(labels) or len(inputs) == 0:
            raise ValueError(
                f"inputs has {len(inputs)} samples and labels has {len(labels)}; wanted as many, at least one"
            )
        self.inputs, self.labels = inputs, labels
        self.batch_size = check_count(batch_size, "batch_size")
        self.epoch = 0
        self._shuffle, self._seed = shuffle, check_count(seed, "seed", minimum=0)
        self._device = device

    def __len__(self) -> int:
        """Return the number of batches of a pass."""
        return -(-len(self.inputs) // self.batch_size)

    def __iter__(self) -> Iterator[Samples]:
        """Yield the batches of one pass."""
        order: torch.Tensor | None = None
        if self._shuffle:
            generator = torch.Generator().manual_seed(_mixed(self._seed, self.epoch))
            order = torch.randperm(len(self.inputs), generator=generator).to(self.inputs.device)
        self.epoch += 1
        for start in range(0, len(self.inputs), self.batch_size):
            part = (
                slice(start, start + self.batch_size)
                if order is None
                else order[start : start + self.batch_size]
            )
            inputs, labels = self.inputs[part], self.labels[part]
            yield Samples(
                inputs.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)
            )


def _mixed(seed: int, epoch: int) -> int:
    """Return a seed of its own for every pass."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
