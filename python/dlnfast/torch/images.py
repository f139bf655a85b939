# SPDX-License-Identifier: MIT
"""Image data sets as tensors in memory, standardised by channel, and mini-batches of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .._datasets.cifar10 import load_cifar10
from .._datasets.images import load_fashion_mnist
from .._support.arrays import check_choice, check_count

__all__ = ["Batches", "ImageData", "Samples", "load_images"]

#: Number of images that are summed at a time.
_CHUNK: Final = 1024

_Loader = Callable[..., tuple[npt.NDArray[Any], npt.NDArray[Any]]]
#: Name -> loader and shape of an image.
DATA_SETS: Final[dict[str, tuple[_Loader, tuple[int, int, int]]]] = {
    "cifar10": (load_cifar10, (3, 32, 32)),
    "fashion-mnist": (load_fashion_mnist, (1, 28, 28)),
}


class Samples(NamedTuple):
    """Inputs and labels of N samples.

    Attributes
    ----------
    inputs : Tensor, shape (N, ..)
        Samples along the first axis.
    labels : Tensor of int64, shape (N,)
        Classes 0 .. K - 1.
    """

    inputs: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class ImageData:
    """A standardised image data set in memory.

    Attributes
    ----------
    train, test : Samples
        Images (N, channels, rows, columns) in float32, labels (N,) in int64.
    mean, std : tuple of float
        Mean and standard deviation of each channel over the training images, for pixels in [0, 1]. The mean
        was subtracted from all images, then they were divided by the standard deviation.
    n_classes : int
        Number of classes K.
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
        Data set.
    path : path, optional
        Folder with the files, as for `dlnfast.load_cifar10` and `dlnfast.load_fashion_mnist`.
    per_class, test_per_class : int, optional
        Number of training and test images of each class, the first ones in the files. Default: all.

    Returns
    -------
    ImageData

    Raises
    ------
    FileNotFoundError
        If the files are not found; the message lists all searched folders, and a source of the files.
    ValueError
        For another name, a damaged file, or classes with fewer images.

    Notes
    -----
    Every channel is shifted and scaled to mean 0 and variance 1 over the chosen training images.

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
    """Return means and standard deviations by channel, from exact integer sums."""
    sums = np.zeros((2, pixels.shape[1]), dtype=np.int64)
    for start in range(0, len(pixels), _CHUNK):
        part = pixels[start : start + _CHUNK].astype(np.int64)
        sums[0] += part.sum(axis=(0, 2, 3))
        sums[1] += np.square(part, out=part).sum(axis=(0, 2, 3))
    n = pixels.size // pixels.shape[1]
    # n squares - sums^2 in Python integers, without rounding or overflow.
    variances = [(n * int(square) - int(total) ** 2) / n**2 for total, square in sums.T]
    return sums[0] / n, np.sqrt(variances)


class Batches:
    """Mini-batches of samples in memory; each loop is one pass over the samples.

    Parameters
    ----------
    inputs, labels : Tensor
        Samples and their classes along the first axis, equally many.
    batch_size : int
        Number of samples in a batch; the last batch of a pass may be smaller.
    shuffle : bool
        Whether each pass has a new order.
    seed : int
        Seed of the orders. The order of pass number e depends on the seed and e only.
    device : device, optional
        Device to which batches are copied.
    join_single : bool
        Whether a last batch of one sample is added to the batch before, because batch normalisation has no
        variance of one sample. It has no effect for a `batch_size` of 1.

    Attributes
    ----------
    epoch : int
        Number of the next pass.

    Raises
    ------
    TypeError
        If `inputs` or `labels` is no tensor.
    ValueError
        Without samples, if inputs and labels differ in number, and for settings out of their range.

    Notes
    -----
    Samples are indexed on their own device; only batches are copied.

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
        has_single = self.batch_size > 1 and len(starts) > 1 and len(inputs) - starts[-1] == 1
        #: First index of each batch, and the end of the last one.
        self._bounds = [*(starts[:-1] if join_single and has_single else starts), len(inputs)]

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
    """Derive the seed of a pass, and of each independent stream of random numbers in it."""
    sequence = np.random.SeedSequence([seed, epoch, stream] if stream else [seed, epoch])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)
