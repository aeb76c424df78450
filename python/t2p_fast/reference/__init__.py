# SPDX-License-Identifier: Apache-2.0
"""What every op means, in plain PyTorch: the truth for tests and benchmarks. Any floating dtype."""

from t2p_fast.reference.attention import attention
from t2p_fast.reference.group_norm import group_norm_silu
from t2p_fast.reference.linear_attention import linear_attention
from t2p_fast.reference.masked_sampling import MaskedSample, masked_sample
from t2p_fast.reference.mrf import mrf_bp, mrf_energy, mrf_icm, mrf_marginals, mrf_mean_field
from t2p_fast.reference.scheduler import (
    scheduler_add_noise,
    scheduler_ancestral_step,
    scheduler_bound,
    scheduler_ddim_step,
    scheduler_ddpm_step,
    scheduler_dpm_solver_step,
    scheduler_euler_step,
    scheduler_flow_step,
    scheduler_guide,
    scheduler_predict,
    scheduler_step,
    scheduler_velocity,
)
from t2p_fast.reference.vq import KMeansResult, kmeans, vq_lookup, vq_nearest, vq_quantize, vq_topk

__all__ = [
    "KMeansResult",
    "MaskedSample",
    "attention",
    "group_norm_silu",
    "kmeans",
    "linear_attention",
    "masked_sample",
    "mrf_bp",
    "mrf_energy",
    "mrf_icm",
    "mrf_marginals",
    "mrf_mean_field",
    "scheduler_add_noise",
    "scheduler_ancestral_step",
    "scheduler_bound",
    "scheduler_ddim_step",
    "scheduler_ddpm_step",
    "scheduler_dpm_solver_step",
    "scheduler_euler_step",
    "scheduler_flow_step",
    "scheduler_guide",
    "scheduler_predict",
    "scheduler_step",
    "scheduler_velocity",
    "vq_lookup",
    "vq_nearest",
    "vq_quantize",
    "vq_topk",
]
