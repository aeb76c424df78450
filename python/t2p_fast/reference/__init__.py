# SPDX-License-Identifier: Apache-2.0
"""What every op means, in plain PyTorch: the truth for tests and benchmarks. Any floating dtype."""

from t2p_fast.reference.masked_sampling import MaskedSample, masked_sample
from t2p_fast.reference.mrf import mrf_bp, mrf_energy, mrf_icm, mrf_marginals, mrf_mean_field
from t2p_fast.reference.vq import (
    KMeansResult,
    kmeans,
    vq_lookup,
    vq_nearest,
    vq_quantize,
    vq_topk,
)

__all__ = [
    "KMeansResult",
    "MaskedSample",
    "kmeans",
    "masked_sample",
    "mrf_bp",
    "mrf_energy",
    "mrf_icm",
    "mrf_marginals",
    "mrf_mean_field",
    "vq_lookup",
    "vq_nearest",
    "vq_quantize",
    "vq_topk",
]
