# SPDX-License-Identifier: MIT
"""Image data sets as tensors: standardised by channel, with mini-batches that need no workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .._arrays import check_choice, check_count
from ..datasets import load_cifar10, load_fashion_mnist

__all__ = ["Batches", "ImageData", "Samples", "load_images"]

#: Images whose pixels are summed at a time.
_CHUNK: Final = 1024

_Loader = Callable[..., tuple[npt.NDArray[Any], npt.NDArray[Any]]]
#: Name -> loader and shape of an image.
DATA_SETS: Final[dict[str, tuple[_Loader, tuple[int, int, int]]]] = {
    "cifar10": (load_cifar10, (3, 32, 32)),
    "fashion-mnist": (load_fashion_mnist, (1, 28, 28)),
}


class Samples(NamedTuple):
    """Inputs, one sample along the first axis, and labels 0 .. K - 1.

    Attributes
    ----------
    inputs : Tensor, shape (N, ..)
    labels : Tensor of int64, shape (N,)
    """

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

    Cost: 614 MB of memory for all training images of CIFAR-10, 188 MB of Fashion-MNIST, and more while they
    are read.
    """
    check_choice(name, "name", DATA_SETS)
    loader, shape = DATA_SETS[name]
    splits = {}
    for split, count in (("train", per_class), ("test", test_per_class)):
        images, labels = loader(path, split, per_class=count)
        splits[split] = images.reshape(-1, *shape), torch.from_numpy(np.ascontiguousarray(labels))
    pixels = splits["train"][0]
    mean, std = _compute_moments(pixels)

    def standardise(images: npt.NDArray[Any]) -> torch.Tensor:
        shifted = images.astype(np.float32)  # whole numbers are exact
        shifted -= mean.astype(np.float32)[:, None, None]
        shifted /= np.maximum(std, 1e-12).astype(np.float32)[:, None, None]
        return torch.from_numpy(shifted)

    train, test = (Samples(standardise(images), labels) for images, labels in splits.values())
    return ImageData(train, test, tuple((mean / 255).tolist()), tuple((std / 255).tolist()))


def _compute_moments(pixels: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return means and standard deviations by channel, of sums that are exact."""
    sums = np.zeros((2, pixels.shape[1]), dtype=np.int64)
    for start in range(0, len(pixels), _CHUNK):
        part = pixels[start : start + _CHUNK].astype(np.int64)
        sums[0] += part.sum(axis=(0, 2, 3))
        sums[1] += np.square(part, out=part).sum(axis=(0, 2, 3))
    n = pixels.size // pixels.shape[1]
    # n squares - sums^2 in whole numbers: nothing cancels.
    variances = [(n * int(square) - int(total) ** 2) / n**2 for total, square in sums.T]
    return sums[0] / n, np.sqrt(variances)


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
    join_single : bool
        Let a last batch of one sample join the batch before, which has one more then: batch normalisation
        has no variance of one sample. Not where all batches are of one sample.

    Attributes
    ----------
    epoch : int
        Number of the next pass.

    Raises
    ------
    TypeError
        For what are no tensors.
    ValueError
        Without samples, for as many labels as there are not samples, and settings out of their range.

    Notes
    -----
    Samples are indexed where they are; only batches travel.

    Examples
    --------
    >>> import torch
    >>> from dlnfast.torch import Batches
    >>> batches = Batches(torch.arange(5), torch.zeros(5, dtype=torch.int64), 2, join_single=True)
    >>> [inputs.tolist() for inputs, labels in batches]
    [[0, 1], [2, 3, 4]]
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
        join_single: bool = False,
    ) -> None:
        for name, value in (("inputs", inputs), ("labels", labels)):
            if not isinstance(value, torch.Tensor) or value.ndim == 0:
                raise TypeError(f"{name} is {type(value).__name__}; wanted a tensor with samples in its rows")
        if len(inputs) != len(labels) or len(inputs) == 0:
            raise ValueError(
                f"inputs has {len(inputs)} samples and labels has {len(labels)}; wanted as many, at least one"
            )
        self.inputs, self.labels = inputs, labels
        self.batch_size = check_count(batch_size, "batch_size")
        self.epoch = 0
        self._shuffle, self._seed = shuffle, check_count(seed, "seed", minimum=0)
        self._device = device
        starts = range(0, len(inputs), self.batch_size)
        joins = join_single and self.batch_size > 1 and len(starts) > 1 and len(inputs) - starts[-1] == 1
        #: Where batches begin, and where the last one ends.
        self._bounds = [*(starts[:-1] if joins else starts), len(inputs)]

    def __len__(self) -> int:
        """Return the number of batches of a pass."""
        return len(self._bounds) - 1

    def __iter__(self) -> Iterator[Samples]:
        """Yield the batches of one pass."""
        order: torch.Tensor | None = None
        if self._shuffle:
            generator = torch.Generator("cpu").manual_seed(derive_pass_seed(self._seed, self.epoch))
            order = torch.randperm(len(self.inputs), generator=generator, device="cpu")
            order = order.to(self.inputs.device)
        self.epoch += 1
        for bounds in pairwise(self._bounds):
            part = slice(*bounds) if order is None else order[slice(*bounds)]
            inputs, labels = self.inputs[part], self.labels[part]
            yield Samples(
                inputs.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)
            )


def derive_pass_seed(seed: int, epoch: int, stream: int = 0) -> int:
    """Return a seed of its own for every pass, and for every use in it."""
    sequence = np.random.SeedSequence([seed, epoch, stream] if stream else [seed, epoch])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)
