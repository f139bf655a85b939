# SPDX-License-Identifier: MIT
"""Vision transformers."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from ..._support.arrays import check_choice, check_count, check_scale
from ..._weights.widths import Scale
from ._construction import Device, check_images, construct

#: arXiv 2010.11929, table 1, and arXiv 2012.12877, table 1.
_PRESETS: Final = {
    "tiny": {"dim": 192, "depth": 12, "n_heads": 3},
    "small": {"dim": 384, "depth": 12, "n_heads": 6},
    "base": {"dim": 768, "depth": 12, "n_heads": 12},
}
#: Epsilon of the layer norms, as in the code of the paper.
_EPSILON: Final = 1e-6
#: Standard deviation of the initial positions and class token.
_TOKEN_SPREAD: Final = 0.02


class ViT(nn.Module):
    """Vision transformer: patches as tokens, blocks of attention and perceptron, a linear head.

    Parameters
    ----------
    image_size, patch_size : int
        Height and width of the images and of their patches; `patch_size` must divide `image_size`.
    dim : int
        Width of the tokens, a multiple of `n_heads`.
    depth : int
        Number of blocks.
    n_heads : int
        Heads of each attention.
    mlp_ratio : float
        Width of the hidden layer of the perceptrons, in units of `dim`, rounded.
    n_classes, in_channels : int
        Numbers of classes, and of channels of the images.
    dropout : float
        Dropout probability of the embedding, the attention's weights and the outputs of both halves of a
        block; 0 <= p < 1.
    pool : {"cls", "mean"}
        Input of the head: an additional class token, or the mean of all tokens.
    initial, scale, seed, dtype, device
        Weights, precision and device, as for `MLP`. Positions and class token are always Gaussian with
        standard deviation 0.02.

    Attributes
    ----------
    patches : Conv2d
        Linear map of the patches.
    positions : Parameter, shape (1, T, dim)
        Learned position embeddings of the T tokens.
    class_token : Parameter, shape (1, 1, dim), or None
        Class token of ``pool="cls"``.
    blocks : Sequential
        Blocks ``blocks.0`` .., with tokens (B, T, dim) as outputs. Their weights are ``attention.q``, ``.k``,
        ``.v``, ``.out`` and ``mlp.up``, ``.down``.
    norm : LayerNorm
        Last layer norm.
    head : Linear
        Last linear map.
    hidden_layers : list of str
        Names of the blocks, for `select_modules`.

    Raises
    ------
    ShapeError, TypeError, ValueError
        For settings out of their range, and images of another shape.

    Notes
    -----
    Dosovitskiy et al., arXiv 2010.11929: layer norms before each half of a block, GELU, biases everywhere.
    ``preset("base", image_size=224, patch_size=16, n_classes=1000)`` has 86,567,656 parameters.

    Examples
    --------
    >>> import torch
    >>> import dlnfast as dln
    >>> model = dln.torch.ViT(dim=16, depth=2, n_heads=2, patch_size=8)
    >>> model(torch.zeros(5, 3, 32, 32)).shape
    torch.Size([5, 10])
    """

    class_token: nn.Parameter | None

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        n_heads: int,
        image_size: int = 32,
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
        n_classes: int = 10,
        in_channels: int = 3,
        dropout: float = 0.0,
        pool: str = "cls",
        initial: str = "torch",
        scale: Scale = 1.0,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: Device = None,
    ) -> None:
        super().__init__()
        check_count(dim, "dim")
        check_count(depth, "depth")
        check_count(n_classes, "n_classes")
        self.image_size = check_count(image_size, "image_size")
        self.in_channels = check_count(in_channels, "in_channels")
        if self.image_size % check_count(patch_size, "patch_size"):
            raise ValueError(f"patch_size is {patch_size}, which does not divide image_size ({image_size})")
        if dim % check_count(n_heads, "n_heads"):
            raise ValueError(f"n_heads is {n_heads}, which does not divide dim ({dim})")
        hidden = max(1, round(dim * check_scale(mlp_ratio, "mlp_ratio", strict=True)))
        check_choice(pool, "pool", ("cls", "mean"))
        dropout = check_scale(dropout, "dropout", below=1.0)
        self.pool = pool
        n_tokens = (image_size // patch_size) ** 2 + (pool == "cls")
        with construct(self, initial, scale, seed, dtype, device):
            self.patches = nn.Conv2d(self.in_channels, dim, kernel_size=patch_size, stride=patch_size)
            self.positions = nn.Parameter(_TOKEN_SPREAD * torch.randn(1, n_tokens, dim))
            token = nn.Parameter(_TOKEN_SPREAD * torch.randn(1, 1, dim)) if pool == "cls" else None
            self.register_parameter("class_token", token)
            self.dropout = nn.Dropout(dropout)
            self.blocks = nn.Sequential(*(Block(dim, n_heads, hidden, dropout) for _ in range(depth)))
            self.norm = nn.LayerNorm(dim, eps=_EPSILON)
            self.head = nn.Linear(dim, n_classes)
        self.hidden_layers = [f"blocks.{i}" for i in range(depth)]

    @classmethod
    def preset(cls, name: str, **settings: Any) -> ViT:
        """Return a network of a published size.

        Parameters
        ----------
        name : {"tiny", "small", "base"}
            Size: twelve blocks of width 192, 384, 768 with 3, 6, 12 heads.
        **settings
            Further settings of `ViT`, which may also replace those of the size.

        Returns
        -------
        ViT

        Raises
        ------
        ValueError
            For another name.
        """
        check_choice(name, "name", _PRESETS)
        return cls(**{**_PRESETS[name], **settings})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the head, shape (B, n_classes), for images (B, channels, size, size)."""
        check_images(x, self.in_channels, self.image_size)
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], dim=1)
        tokens = self.norm(self.blocks(self.dropout(tokens + self.positions)))
        result: torch.Tensor = self.head(tokens[:, 0] if self.pool == "cls" else tokens.mean(dim=1))
        return result


class Block(nn.Module):
    """Attention, then a perceptron with one hidden layer; both with layer norm before and skip connection."""

    def __init__(self, dim: int, n_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPSILON)
        self.attention = Attention(dim, n_heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=_EPSILON)
        parts: dict[str, nn.Module] = {
            "up": nn.Linear(dim, hidden),
            "activation": nn.GELU(),
            "dropout": nn.Dropout(dropout),
            "down": nn.Linear(hidden, dim),
        }
        self.mlp = nn.Sequential(OrderedDict(parts))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return tokens of shape (B, T, dim) for tokens of the same shape."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        result: torch.Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return result


class Attention(nn.Module):
    """Self-attention with several heads, and separate linear layers for queries, keys and values."""

    def __init__(self, dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return tokens of shape (B, T, dim) for tokens of the same shape."""
        q, k, v = (
            part(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        result: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result
