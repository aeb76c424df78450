# SPDX-License-Identifier: Apache-2.0
"""Modules over the ops."""

from t2p_fast.nn.vector_quantizer import VectorQuantizer

__all__ = ["VectorQuantizer"]
