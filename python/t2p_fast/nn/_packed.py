# SPDX-License-Identifier: Apache-2.0
"""Whether what was made of a weight is still of it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["WeightState", "can_be_kept"]


class WeightState(NamedTuple):
    """A weight as it was, by its version counter; a change through ``.data`` does not count."""

    weight: Tensor  # held, so that no other tensor comes to lie where it does
    version: int

    @classmethod
    def of(cls, weight: Tensor) -> "WeightState":
        return cls(weight.detach(), weight._version)

    def is_still(self, weight: Tensor) -> bool:
        """Whether `weight` is that very tensor, and unchanged."""
        same = weight.data_ptr() == self.weight.data_ptr() and weight.shape == self.weight.shape
        return same and weight.dtype == self.weight.dtype and weight._version == self.version


def can_be_kept(module: nn.Module, weight: Tensor) -> bool:
    """Whether what is made of `weight` on a CPU may serve the next call of `module` as well."""
    plain = type(weight) in (Tensor, nn.Parameter) and not weight.is_inference()
    return plain and not (module.training or weight.is_cuda or torch.compiler.is_compiling())
