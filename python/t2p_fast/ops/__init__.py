# SPDX-License-Identifier: Apache-2.0
"""The ops: functions on tensors, differentiable and compilable, each with its own kernels."""

from t2p_fast.ops.attention import attention
from t2p_fast.ops.group_norm import group_norm_silu
from t2p_fast.ops.kmeans import KMeansResult, kmeans
from t2p_fast.ops.linear_attention import linear_attention
from t2p_fast.ops.masked_sampling import MaskedSample, mask_counts, masked_sample
from t2p_fast.ops.mrf import mrf_energy, mrf_likeliest, mrf_mean_field, mrf_pack
from t2p_fast.ops.mrf_cuts import mrf_alpha_expansion
from t2p_fast.ops.mrf_graph import GridWeights, LowRank, codebook_labels, grid_neighbours
from t2p_fast.ops.mrf_solvers import mrf_bp, mrf_icm
from t2p_fast.ops.scheduler import scheduler_noise, scheduler_step
from t2p_fast.ops.vq import vq_lookup, vq_nearest, vq_pack, vq_quantize
from t2p_fast.ops.vq_topk import vq_topk

__all__ = [
    "GridWeights",
    "KMeansResult",
    "LowRank",
    "MaskedSample",
    "attention",
    "codebook_labels",
    "grid_neighbours",
    "group_norm_silu",
    "kmeans",
    "linear_attention",
    "mask_counts",
    "masked_sample",
    "mrf_alpha_expansion",
    "mrf_bp",
    "mrf_energy",
    "mrf_icm",
    "mrf_likeliest",
    "mrf_mean_field",
    "mrf_pack",
    "scheduler_noise",
    "scheduler_step",
    "vq_lookup",
    "vq_nearest",
    "vq_pack",
    "vq_quantize",
    "vq_topk",
]
