# SPDX-License-Identifier: Apache-2.0
"""The instructions, one file per family; importing this package registers all of them."""

from ptx.instructions import (
    asynchronous,
    atomics,
    comparison,
    control,
    conversion,
    floating,
    half,
    integer,
    matrix,
    memory,
    movement,
    warp,
    warpgroup,
)

__all__ = [
    "asynchronous",
    "atomics",
    "comparison",
    "control",
    "conversion",
    "floating",
    "half",
    "integer",
    "matrix",
    "memory",
    "movement",
    "warp",
    "warpgroup",
]
