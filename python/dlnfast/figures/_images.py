# SPDX-License-Identifier: MIT
"""The images that a figure's settings name, on the device of the training."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..torch import ImageData


class DataSettings(Protocol):
    """The common settings of figures that read a data set."""

    @property
    def device(self) -> str:
        """Where PyTorch trains."""
        ...

    @property
    def data(self) -> str:
        """Folder of the data sets; empty for the default."""
        ...


class ImageSettings(DataSettings, Protocol):
    """The common settings of figures on as many images of each class."""

    @property
    def per_class(self) -> int:
        """Training images of each class."""
        ...

    @property
    def test_per_class(self) -> int:
        """Test images of each class."""
        ...


def images_for(settings: ImageSettings, name: str) -> ImageData:
    """Return as many images of each class as the settings say; see `read_images`."""
    return read_images(settings, name, per_class=settings.per_class, test_per_class=settings.test_per_class)


def read_images(
    settings: DataSettings, name: str, *, per_class: int | None = None, test_per_class: int | None = None
) -> ImageData:
    """Return a data set on the device, so that no step of a training copies images from the host.

    The device is tested before the data are read, which takes seconds.
    """
    from ..torch import Samples, load_images
    from ..torch._devices import find_device

    device = find_device(settings.device, "float32")
    data = load_images(name, path=settings.data or None, per_class=per_class, test_per_class=test_per_class)
    train, test = (Samples(*(tensor.to(device) for tensor in samples)) for samples in (data.train, data.test))
    return dataclasses.replace(data, train=train, test=test)
