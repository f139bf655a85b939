# SPDX-License-Identifier: MIT
"""VGG networks of Simonyan and Zisserman, with defaults for small images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import torch
from torch import nn

from ..._support.arrays import check_choice, check_count, check_scale
from ..._weights.widths import Scale
from ._construction import Device, check_images, construct, make_hidden_layer

#: Convolutions of each stage; arXiv 1409.1556, table 1, configurations A, B, D, E.
_STAGES: Final = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
_CHANNELS: Final = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """VGG network: five stages of 3 x 3 convolutions with 2 x 2 max pooling, then linear layers.

    Parameters
    ----------
    name : {"vgg11", "vgg13", "vgg16", "vgg19"}
        Configuration of the convolutions.
    n_classes : int
        Number of classes.
    batch_norm : bool
        Whether every convolution is followed by batch normalisation.
    width : float
        Factor of the channels of all stages (64, 128, 256, 512, 512), which are rounded, and at least 1.
    image_size : int
        Height and width of the images, 32 or more. After the last stage there are (image_size // 32)^2
        positions.
    in_channels : int
        Number of channels of the images.
    classifier : sequence of int, optional
        Widths of the hidden linear layers between the convolutions and the head. Default: one layer, as wide
        as the last stage (512 for width 1), so that the penultimate weight is a 512 x 512 matrix for images
        of 32 x 32. (4096, 4096) with images of 224 x 224 is the network of the paper.
    dropout : float
        Dropout probability after every layer of the classifier.
    initial, scale, seed, dtype, device
        Weights, precision and device, as for `MLP`.

    Attributes
    ----------
    features : Sequential
        Convolutional layers ``features.conv1_1`` .., named as in the paper, and ``features.pool1`` ..
        ``pool5``. The outputs of the former are features after the activation, of shape
        (B, channels, height, width). The map of each layer is called ``conv``.
    classifier : Sequential
        Hidden linear layers ``classifier.0`` ..; the map of each is called ``linear``.
    head : Linear
        Last linear map.
    hidden_layers : list of str
        Names of the layers of `features` without the pools, and of `classifier`, for `select_modules`.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For settings out of their range, and images of another shape.

    Notes
    -----
    Simonyan and Zisserman, arXiv 1409.1556. All maps have biases, as in the paper.

    Examples
    --------
    >>> import dlnfast as dln
    >>> model = dln.torch.VGG("vgg11", 10, width=0.25)
    >>> model.hidden_layers[-2:], dln.torch.weight_matrices(model, "penultimate")[0].shape
    (['features.conv5_2', 'classifier.0'], (128, 128))
    """

    def __init__(
        self,
        name: str = "vgg16",
        n_classes: int = 10,
        *,
        batch_norm: bool = True,
        width: float = 1.0,
        image_size: int = 32,
        in_channels: int = 3,
        classifier: Sequence[int] | None = None,
        dropout: float = 0.0,
        initial: str = "torch",
        scale: Scale = 1.0,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: Device = None,
    ) -> None:
        super().__init__()
        check_choice(name, "name", _STAGES)
        check_count(n_classes, "n_classes")
        check_scale(width, "width", strict=True)
        dropout = check_scale(dropout, "dropout", below=1.0)
        self.image_size = check_count(image_size, "image_size", minimum=2 ** len(_CHANNELS))
        self.in_channels = check_count(in_channels, "in_channels")
        channels = [max(1, round(c * width)) for c in _CHANNELS]
        hidden = [channels[-1]] if classifier is None else list(classifier)
        hidden = [check_count(c, f"classifier[{i}]") for i, c in enumerate(hidden)]
        with construct(self, initial, scale, seed, dtype, device):
            parts: OrderedDict[str, nn.Module] = OrderedDict()
            before = self.in_channels
            for stage, (count, after) in enumerate(zip(_STAGES[name], channels, strict=True), start=1):
                for number in range(1, count + 1):
                    conv = nn.Conv2d(before, after, kernel_size=3, padding=1)
                    norm = nn.BatchNorm2d(after) if batch_norm else None
                    parts[f"conv{stage}_{number}"] = make_hidden_layer("conv", conv, norm, "relu")
                    before = after
                parts[f"pool{stage}"] = nn.MaxPool2d(2)
            self.features = nn.Sequential(parts)
            before *= (self.image_size // 2 ** len(_CHANNELS)) ** 2
            self.classifier = nn.Sequential()
            for after in hidden:
                layer = make_hidden_layer("linear", nn.Linear(before, after), activation="relu")
                if dropout:
                    layer.add_module("dropout", nn.Dropout(dropout))
                self.classifier.append(layer)
                before = after
            self.head = nn.Linear(before, n_classes)
        self.hidden_layers = [f"features.{part}" for part in parts if part.startswith("conv")]
        self.hidden_layers += [f"classifier.{i}" for i in range(len(hidden))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the head, shape (B, n_classes), for images (B, channels, size, size)."""
        check_images(x, self.in_channels, self.image_size)
        result: torch.Tensor = self.head(self.classifier(self.features(x).flatten(1)))
        return result
