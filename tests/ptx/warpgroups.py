# SPDX-License-Identifier: Apache-2.0
"""Programs of one product of a warpgroup, for the table and for faults planted in them.

Both matrices come from shared memory, in rows of 16 columns, with any swizzle (PTX manual 9.7.15).
"""

from typing import Any

import numpy as np

__all__ = ["COLUMNS", "ROWS", "STEPS", "code", "descriptor", "fragments", "image"]

Array = np.ndarray[Any, Any]

ROWS, COLUMNS = 64, 16
LEADING, STRIDE = 128, 256  # without a swizzle: from column 8 on, from row 8 on


def _place(swizzle: int, row: int, column: int, first: int) -> int:
    """Where an element lies, in bytes, as the figures of the manual have it; `first` is the column
    of the pattern at which the matrix begins."""
    if swizzle == 0:  # 8 rows of 16 bytes together
        return row // 8 * STRIDE + column // 8 * LEADING + row % 8 * 16 + column % 8 * 2
    piece, rest = divmod(first + column, 8)
    turned = {128: piece ^ row % 8, 64: piece ^ row % 8 // 2, 32: piece ^ row % 8 // 4}[swizzle]
    return row * swizzle + turned * 16 + rest * 2


def descriptor(start: int, swizzle: int, leading: int = LEADING, stride: int | None = None) -> int:
    """That of a matrix which begins `start` bytes into shared memory."""
    stride = stride if stride is not None else 8 * swizzle if swizzle else STRIDE
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def image(a: Array, b: Array, swizzle: int, first: int) -> tuple[Array, int]:
    """Shared memory with both matrices, and where the second one begins. The rest are NaNs."""
    second = 64 * max(swizzle, 32)
    octets = np.full(second + max(len(b), 8) * max(swizzle, 32), 0xFF, np.uint8)
    words = octets.view(np.uint16)
    for start, matrix in ((0, a), (second, b)):
        for row in range(len(matrix)):
            for column in range(COLUMNS):
                at = start + _place(swizzle, row, column, first)
                words[at // 2] = matrix[row, column]
    return octets.view(np.uint16), second


def fragments(matrix: Array, n: int) -> Array:
    """`[128, n / 2]`: what every thread holds of a matrix `[64, n]`."""
    result = np.empty((128, n // 2), matrix.dtype)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(n // 2):
            row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
            result[thread, i] = matrix[row, 8 * (i // 4) + lane % 4 * 2 + i % 2]
    return result


STEPS = ["fence.proxy.async.shared::cta;", "bar.sync 0;", "wgmma.fence.sync.aligned;", "PRODUCT",
         "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]  # fmt: skip


def code(
    n: int, size: int, kind: str, descriptors: tuple[int, int], *, add: int = 1,
    steps: list[str] = STEPS, scales: str = "1, 1, 0, 0",
) -> str:  # fmt: skip
    """out = a b^T, + c if `add`, of a program whose inputs are an image of `size` bytes and c.

    The matrices are in %a8 and %a9, the accumulators in %d0 and so on.
    """
    count = n // 2
    d = ", ".join(f"%d{i}" for i in range(count))
    product = (f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{d}}}, %a8, %a9, %p7, "
               f"{scales};")  # fmt: skip
    return "\n".join([
        f"setp.ne.u32 %p7, {add}, 0;",
        # The address of shared memory is part of a descriptor.
        "shr.u32 %r0, %tile, 4;", "cvt.u64.u32 %a7, %r0;",
        *(f"add.u64 %a{8 + i}, %a7, {value:#x};" for i, value in enumerate(descriptors)),
        "mov.u32 %r3, %t;", "copy:", f"setp.ge.u32 %p0, %r3, {size // 4};", "@%p0 bra copied;",
        "mad.wide.u32 %a3, %r3, 4, %in0;", "ld.global.b32 %r4, [%a3];",
        "mad.lo.u32 %r5, %r3, 4, %tile;", "st.shared.b32 [%r5], %r4;", "add.u32 %r3, %r3, 128;",
        "bra copy;", "copied:", f"mad.wide.u32 %a0, %t, {2 * n}, %out;",
        f"mad.wide.u32 %a2, %t, {2 * n}, %in1;",
        *(f"ld.global.b32 %d{i}, [%a2+{4 * i}];" for i in range(count)),
        *(product if step == "PRODUCT" else step for step in steps),
        *(f"st.global.b32 [%a0+{4 * i}], %d{i};" for i in range(count)),
    ])  # fmt: skip
