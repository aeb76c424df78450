# SPDX-License-Identifier: Apache-2.0
"""The ops: functions on tensors, differentiable and compilable, each with its own kernels."""

from t2p_fast.ops.vq import KMeansResult, kmeans, vq_lookup, vq_nearest, vq_quantize

__all__ = ["KMeansResult", "kmeans", "vq_lookup", "vq_nearest", "vq_quantize"]
