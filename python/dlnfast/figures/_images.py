# SPDX-License-Identifier: MIT
"""The images that a figure's settings name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..torch import ImageData


class ImageSettings(Protocol):
    """The common settings of figures on images."""

    @property
    def device(self) -> str:
        """Where PyTorch trains."""
        ...

    @property
    def data(self) -> str:
        """Folder of the data sets; empty for the default."""
        ...

    @property
    def per_class(self) -> int:
        """Training images of each class."""
        ...

    @property
    def test_per_class(self) -> int:
        """Test images of each class."""
        ...


def images_for(settings: ImageSettings, name: str) -> ImageData:
    """Return a data set, once the device is known to be there: reading takes seconds."""
    from ..torch import load_images
    from ..torch._devices import find_device

    find_device(settings.device, "float32")
    return load_images(
        name,
        path=settings.data or None,
        per_class=settings.per_class,
        test_per_class=settings.test_per_class,
    )
