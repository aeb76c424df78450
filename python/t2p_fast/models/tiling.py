# SPDX-License-Identifier: Apache-2.0
"""Pictures of any size through a VQGAN, tile by tile.

Each tile is computed with a margin around it that is then cut away, so that its edges see what is
beyond them. Where the margin covers the receptive field the result is that of the whole picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from t2p_fast.models.vqgan import VQGAN


@torch.no_grad()
def encode_tiled(vqgan: VQGAN, pictures: Tensor, *, tile: int = 32, margin: int = 4) -> Tensor:
    """Pictures ``[b, 3, h, w]`` to tokens ``[b, h / f, w / f]``.

    Args:
        pictures: height and width are multiples of the downsampling factor ``f``.
        tile, margin: in tokens.
    """
    f = vqgan.config.downsampling_factor
    if pictures.ndim != 4 or pictures.shape[2] % f or pictures.shape[3] % f:
        raise ValueError(
            f"encode_tiled: pictures are {list(pictures.shape)}, expected [b, c, h, w] with height "
            f"and width multiples of {f}"
        )
    rows, columns = pictures.shape[2] // f, pictures.shape[3] // f
    tokens = torch.empty(
        pictures.shape[0], rows, columns, dtype=torch.int64, device=pictures.device
    )
    for window, inner, target in _tiles(rows, columns, tile, margin):
        top, bottom, left, right = (f * edge for edge in window)
        made = vqgan.encode_to_indices(pictures[:, :, top:bottom, left:right])
        _place(tokens, target, _cut(made, inner))
    return tokens


@torch.no_grad()
def decode_tiled(
    vqgan: VQGAN,
    tokens: Tensor,
    *,
    tile: int = 32,
    margin: int = 4,
    on_tile: Callable[[], None] | None = None,
) -> Tensor:
    """Tokens ``[b, r, c]`` to pictures ``[b, 3, f r, f c]``; see :func:`encode_tiled`."""
    f = vqgan.config.downsampling_factor
    b, rows, columns = tokens.shape
    channels = vqgan.config.out_channels
    pictures = torch.empty(
        b, channels, f * rows, f * columns, dtype=vqgan.dtype, device=tokens.device
    )
    for window, inner, target in _tiles(rows, columns, tile, margin):
        top, bottom, left, right = window
        made = vqgan.decode_indices(tokens[:, top:bottom, left:right])
        _place(pictures, tuple(f * e for e in target), _cut(made, tuple(f * e for e in inner)))
        if on_tile is not None:
            on_tile()
    return pictures


def count_tiles(rows: int, columns: int, tile: int = 32) -> int:
    """How many tiles a grid of tokens is cut into."""
    return -(-rows // tile) * -(-columns // tile)


# top, bottom, left, right
_Box = tuple[int, ...]


def _tiles(rows: int, columns: int, tile: int, margin: int) -> Iterator[tuple[_Box, _Box, _Box]]:
    """Windows with their margins, what to keep of each, and where that goes."""
    for top in range(0, rows, tile):
        for left in range(0, columns, tile):
            bottom, right = min(top + tile, rows), min(left + tile, columns)
            window = (
                max(0, top - margin),
                min(rows, bottom + margin),
                max(0, left - margin),
                min(columns, right + margin),
            )
            inner = (top - window[0], bottom - window[0], left - window[2], right - window[2])
            yield window, inner, (top, bottom, left, right)


def _cut(x: Tensor, box: _Box) -> Tensor:
    return x[..., box[0] : box[1], box[2] : box[3]]


def _place(x: Tensor, box: _Box, value: Tensor) -> None:
    x[..., box[0] : box[1], box[2] : box[3]] = value
