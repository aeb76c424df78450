# SPDX-License-Identifier: Apache-2.0
"""The ops: functions on tensors, differentiable and compilable, each with its own kernels."""

from t2p_fast.ops.kmeans import KMeansResult, kmeans
from t2p_fast.ops.masked_sampling import MaskedSample, mask_counts, masked_sample
from t2p_fast.ops.vq import vq_lookup, vq_nearest, vq_pack, vq_quantize
from t2p_fast.ops.vq_topk import vq_topk

__all__ = [
    "KMeansResult",
    "MaskedSample",
    "kmeans",
    "mask_counts",
    "masked_sample",
    "vq_lookup",
    "vq_nearest",
    "vq_pack",
    "vq_quantize",
    "vq_topk",
]
