# SPDX-License-Identifier: Apache-2.0
"""The ops: functions on tensors, differentiable and compilable, each with its own kernels."""

from t2p_fast.ops.kmeans import KMeansResult, kmeans
from t2p_fast.ops.scheduler import scheduler_noise, scheduler_step
from t2p_fast.ops.vq import vq_lookup, vq_nearest, vq_pack, vq_quantize
from t2p_fast.ops.vq_topk import vq_topk

__all__ = [
    "KMeansResult", "kmeans", "scheduler_noise", "scheduler_step", "vq_lookup", "vq_nearest",
    "vq_pack", "vq_quantize", "vq_topk",
]  # fmt: skip
