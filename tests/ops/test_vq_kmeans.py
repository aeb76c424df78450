# SPDX-License-Identifier: Apache-2.0
"""k-means against the float64 reference."""

import pytest
import torch
from torch import Tensor

from t2p_fast import reference
from t2p_fast.ops import kmeans, vq_nearest

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def _case(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)


@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_kmeans_finds_separated_clusters(init: str, device: torch.device) -> None:
    torch.manual_seed(0)
    centers = 100 * torch.randn(8, 5, device=device)
    x = centers.repeat_interleave(50, 0) + torch.randn(400, 5, device=device)
    generator = torch.Generator().manual_seed(1)
    result = kmeans(x, 8, iterations=20, init=init, generator=generator)
    assert result.inertia < 400 * 5 * 1.5 if init == "kmeans++" else result.inertia.isfinite()
    assert torch.equal(result.indices, vq_nearest(x, result.centroids))


def test_kmeans_follows_the_reference(device: torch.device) -> None:
    x, start = (t.to(device) for t in _case(500, 20, 6))
    start[5] = start[4]  # an empty cluster at the first step
    ours = kmeans(x, 20, init=start, iterations=5)
    truth = reference.kmeans(x.double(), start.double(), iterations=5)
    torch.testing.assert_close(ours.centroids.double(), truth.centroids, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.inertia.double(), truth.inertia, rtol=1e-5, atol=0)


def test_kmeans_errors(device: torch.device) -> None:
    x = torch.randn(4, 3, device=device)
    with pytest.raises(ValueError, match=r"kmeans: x must be \[n >= 1, d\], got \[0, 3\]"):
        kmeans(x[:0], 2)
    with pytest.raises(ValueError, match="init='best' is not supported"):
        kmeans(x, 2, init="best")
    with pytest.raises(ValueError, match=r"init must be \[2, 3\], got \[4, 3\]"):
        kmeans(x, 2, init=x)
    assert kmeans(x, 9).centroids.shape == (9, 3)


def test_kmeans_compiles() -> None:
    x, start = _case(300, 12, 5)
    start[3] = start[2]  # an empty cluster
    compiled = torch.compile(kmeans, fullgraph=True, backend="aot_eager")
    ours, truth = (op(x, 12, init=start, iterations=3) for op in (compiled, kmeans))
    torch.testing.assert_close(ours.centroids, truth.centroids)
    assert torch.equal(ours.indices, truth.indices)
