# SPDX-License-Identifier: Apache-2.0
"""Modules over the ops."""

from t2p_fast.nn.gumbel_quantizer import GumbelQuantizer
from t2p_fast.nn.linear_attention import LinearAttention, MixFFN
from t2p_fast.nn.residual_vq import GroupedResidualVQ, ResidualVQ
from t2p_fast.nn.scalar_quantizers import FSQ, LFQ
from t2p_fast.nn.token_mrf import TokenMRF, TokenMRFConfig
from t2p_fast.nn.vector_quantizer import CodebookUsage, VectorQuantizer, codebook_usage

__all__ = [
    "FSQ",
    "LFQ",
    "CodebookUsage",
    "GroupedResidualVQ",
    "GumbelQuantizer",
    "LinearAttention",
    "MixFFN",
    "ResidualVQ",
    "TokenMRF",
    "TokenMRFConfig",
    "VectorQuantizer",
    "codebook_usage",
]
