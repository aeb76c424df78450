# SPDX-License-Identifier: Apache-2.0
"""Codebooks packed before they are searched."""

import pytest
import torch

from t2p_fast.ops import vq_nearest, vq_pack


@pytest.mark.parametrize("metric", ["l2", "dot", "cosine"])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (5, 3000, 8), (200, 65, 33), (3, 7, 130)])
def test_pack_changes_nothing_but_the_time(metric: str, n: int, k: int, d: int) -> None:
    x, codebook = torch.randn(n, d), torch.randn(k, d)
    packed = vq_pack(codebook, metric=metric)
    found = vq_nearest(x, codebook, metric=metric, return_distance=True, packed=packed)
    expected = vq_nearest(x, codebook, metric=metric, return_distance=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    opcheck = (torch.ops.t2p_fast.vq_nearest.default, (x, codebook, metric, 1, packed))
    torch.library.opcheck(*opcheck)


def test_pack_errors() -> None:
    x, codebook = torch.randn(30, 8), torch.randn(100, 8)
    packed = vq_pack(codebook)
    for other in (vq_pack(codebook, metric="dot"), vq_pack(torch.randn(101, 8)), packed[:-1]):
        with pytest.raises(ValueError, match="vq_nearest: packed "):
            vq_nearest(x, codebook, packed=other)
    with pytest.raises(ValueError, match=r"vq_nearest: packed must be uint8"):
        vq_nearest(x, codebook, packed=packed.float())
    with pytest.raises(ValueError, match=r"packed must be what vq_pack returned"):
        vq_nearest(x, codebook[None], packed=packed)
    with pytest.raises(ValueError, match=r"vq_pack: codebook must be \[k, d\], got \[3\]"):
        vq_pack(torch.randn(3))
    with pytest.raises(ValueError, match=r"vq_pack: codebook .* no codes"):
        vq_pack(torch.randn(0, 3))
