# SPDX-License-Identifier: Apache-2.0
"""Mean field with dense bfloat16 label weights on CUDA: message and update in one call."""

import torch
from torch import Tensor

from t2p_fast._library import _C

__all__ = ["LabelStep"]


class LabelStep:
    """Label weights, and what their products need, for all iterations of one field.

    Attributes:
        fits: whether there is a kernel for them: on compute capability 8.0 or newer, for `v` a
            multiple of 8 and arrays on 16-byte boundaries.
    """

    def __init__(self, unary: Tensor, w_c: Tensor) -> None:
        self.unary, self.w_c = unary, w_c.contiguous()
        parts = _C.mrf_label_parts(unary, self.w_c)
        self.fits = parts > 0
        if self.fits:
            self.logits = torch.empty_like(unary)
            self.sums = unary.new_empty(len(unary), parts, 2, dtype=torch.float32)

    def __call__(
        self, mixed: Tensor, previous: Tensor | None, damping: float, temperature: float, to: Tensor
    ) -> None:
        """``to = (1 - damping) softmax((mixed w_c^T + unary) / temperature) + damping previous``"""
        _C.mrf_label_step(
            mixed, self.w_c, self.unary, previous, damping, temperature, self.logits, self.sums, to
        )
