# SPDX-License-Identifier: Apache-2.0
"""wgmma against numpy, with every swizzle, and what may go wrong with it (PTX manual 9.7.15)."""

import re
from typing import Any

import numpy as np
import pytest

from ptx.faults import Fault, NotModelled
from ptx.launch import Bench, Empty
from ptx.values import bf16_to_float, float_to_bf16

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


def _descriptor(start: int, swizzle: int, leading: int = LEADING, stride: int | None = None) -> int:
    stride = stride if stride is not None else 8 * swizzle if swizzle else STRIDE
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def _image(a: Array, b: Array, swizzle: int, first: int) -> tuple[Array, int]:
    """Shared memory with both matrices, and where the second one begins. The rest are NaNs."""
    second = 64 * max(swizzle, 32)
    octets = np.full(second + max(len(b), 8) * max(swizzle, 32), 0xFF, np.uint8)
    image = octets.view(np.uint16)
    for start, matrix in ((0, a), (second, b)):
        for row in range(len(matrix)):
            for column in range(COLUMNS):
                at = start + _place(swizzle, row, column, first)
                image[at // 2] = matrix[row, column]
    return image, second


STEPS = ["fence.proxy.async.shared::cta;", "bar.sync 0;", "wgmma.fence.sync.aligned;", "PRODUCT",
         "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]  # fmt: skip


def _ptx(n: int, size: int, kind: str, steps: list[str], scales: str = "1, 1, 0, 0") -> str:
    """A kernel k(out, image, c, a, b, add): out = a b^T, + c if add."""
    count = n // 2
    d = ", ".join(f"%d{i}" for i in range(count))
    product = (f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{d}}}, %a, %b, %add, "
               f"{scales};")  # fmt: skip
    lines = [
        ".version 8.0", ".target sm_90a", ".address_size 64",
        ".visible .entry k(.param .u64 p0, .param .u64 p1, .param .u64 p2, .param .u64 p3, "
        ".param .u64 p4, .param .u32 p5)", "{",
        f".shared .align 1024 .b8 image[{size}];",
        f".reg .b32 %r<9>; .reg .b64 %x<9>; .reg .pred %p<3>; .reg .pred %add; .reg .b64 %a;"
        f".reg .b64 %b; .reg .f32 %d<{count}>;",
        "mov.u32 %r0, %tid.x;", "mov.u32 %r1, image;", "ld.param.u64 %x0, [p0];",
        "ld.param.u64 %x1, [p1];", "ld.param.u64 %x2, [p2];", "ld.param.u64 %a, [p3];",
        "ld.param.u64 %b, [p4];", "ld.param.u32 %r2, [p5];", "setp.ne.u32 %add, %r2, 0;",
        "mov.u32 %r3, %r0;", "copy:", f"setp.ge.u32 %p0, %r3, {size // 4};", "@%p0 bra copied;",
        "mad.wide.u32 %x3, %r3, 4, %x1;", "ld.global.b32 %r4, [%x3];", "shl.b32 %r5, %r3, 2;",
        "add.u32 %r5, %r5, %r1;", "st.shared.b32 [%r5], %r4;", "add.u32 %r3, %r3, 128;",
        "bra copy;", "copied:", f"mad.wide.u32 %x0, %r0, {2 * n}, %x0;",
        f"mad.wide.u32 %x2, %r0, {2 * n}, %x2;",
        *(f"ld.global.f32 %d{i}, [%x2+{4 * i}];" for i in range(count)),
        *(product if step == "PRODUCT" else step for step in steps),
        *(f"st.global.f32 [%x0+{4 * i}], %d{i};" for i in range(count)), "ret;", "}", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _fragments(matrix: Array, n: int) -> Array:
    """`[128, n / 2]`: what every thread holds of a matrix `[64, n]`."""
    result = np.empty((128, n // 2), matrix.dtype)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(n // 2):
            row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
            result[thread, i] = matrix[row, 8 * (i // 4) + lane % 4 * 2 + i % 2]
    return result


def _run(
    n: int = 16, swizzle: int = 128, kind: str = "bf16", *, first: int = 0, add: int = 1,
    steps: list[str] = STEPS, scales: str = "1, 1, 0, 0", change: Any = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """What comes out, a b^T and c, as fragments; `change` of the descriptors of a and b."""
    random = np.random.default_rng(n + swizzle)
    numbers = [random.standard_normal(shape).astype(np.float32)
               for shape in ((ROWS, COLUMNS), (n, COLUMNS), (ROWS, n))]  # fmt: skip
    if kind == "bf16":
        a, b = (float_to_bf16(x) for x in numbers[:2])
        exact = bf16_to_float(a).astype(np.float64) @ bf16_to_float(b).astype(np.float64).T
    else:
        halves = [x.astype(np.float16) for x in numbers[:2]]
        exact = halves[0].astype(np.float64) @ halves[1].astype(np.float64).T
        a, b = (x.view(np.uint16) for x in halves)
    image, second = _image(a, b, swizzle, first)
    descriptors = [_descriptor(start + 2 * first, swizzle) for start in (0, second)]
    if change:
        descriptors = change(*descriptors)
    c, out = _fragments(numbers[2], n), np.zeros((128, n // 2), np.float32)
    Bench(_ptx(n, image.nbytes, kind, steps, scales)).launch(
        "k", [Empty(out), image, c, *(np.uint64(x) for x in descriptors), np.uint32(add)], block=128
    )
    return out, _fragments(exact, n), c


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("n", [8, 24, 128, 256])
def test_product(n: int, swizzle: int, kind: str) -> None:
    out, product, c = _run(n, swizzle, kind)
    exact = product + c
    below = np.abs(exact) - np.abs(out)  # the sum is truncated
    assert (below >= -(2.0**-40)).all()
    assert (below <= 2.0**-23 * np.abs(exact) + 2.0**-40).all()


@pytest.mark.parametrize(("swizzle", "first"), [(64, 16), (128, 16), (128, 32), (128, 48)])
def test_columns_of_a_wider_matrix(swizzle: int, first: int) -> None:
    out, product, c = _run(40, swizzle, first=first)
    np.testing.assert_allclose(out, product + c, rtol=2.0**-23, atol=2.0**-22)


def test_scales() -> None:
    out, product, _ = _run(add=0)
    np.testing.assert_allclose(out, product, rtol=2.0**-23, atol=2.0**-22)
    out, product, c = _run(scales="1, -1, 0, 0")
    np.testing.assert_allclose(out, c - product, rtol=2.0**-23, atol=2.0**-22)


def test_products_that_follow_each_other() -> None:
    twice = [*STEPS[:4], "PRODUCT", "wgmma.commit_group.sync.aligned;", "PRODUCT", *STEPS[4:5],
             "wgmma.wait_group.sync.aligned 1;", *STEPS[5:]]  # fmt: skip
    out, product, c = _run(steps=twice)
    np.testing.assert_allclose(out, c + 3 * product, rtol=2.0**-22, atol=2.0**-20)


def _without(*names: str) -> list[str]:
    return [step for step in STEPS if not step.startswith(names)]


def _after_commit(*more: str) -> list[str]:
    return [*STEPS[:5], *more, *STEPS[5:]]


def _other(**change: int) -> Any:
    """The descriptor of b with another stride or start."""
    return lambda a, _: (a, _descriptor(change.pop("start", 64 * 128), 128, **change))


FAULTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "accumulators read before the wait": (
        "wgmma", "read of the accumulator %d0, whose product", {"steps": _without("wgmma.wait")}),
    "accumulators waited for too little": (
        "wgmma", "read of the accumulator",
        {"steps": [*STEPS[:5], "wgmma.wait_group.sync.aligned 1;"]}),
    "accumulators written to before the wait": (
        "wgmma", "write to the accumulator %d1", {"steps": _after_commit("mov.f32 %d1, %d2;")}),
    "accumulators written to without a fence": (
        "wgmma", r"%d0 was written to and no wgmma\.fence", {"steps": _without("wgmma.fence")}),
    "operands stored without a proxy fence": (
        "wgmma", r"without a fence\.proxy\.async since: image", {"steps": _without("fence.proxy")}),
    "operands stored without a barrier": (
        "race", "read of image", {"steps": _without("bar")}),
    "operands overwritten before the wait": (
        "wgmma", r"write of bytes that a product not waited for reads: image",
        {"steps": _after_commit("bar.sync 0;", "mad.lo.u32 %r5, %r0, 4, %r1;",
                                "st.shared.b32 [%r5], %r0;")}),
    "a stride too large": (
        "out of bounds", "wgmma reads 16 bytes", {"change": _other(stride=4096)}),
    "a start within a pattern": (
        "descriptor", "not in the first row", {"change": _other(start=64 * 128 + 128)}),
    "a start at the end of a row": (
        "descriptor", "over the end of a row", {"change": _other(start=64 * 128 + 112)}),
    "descriptors that differ": (
        "descriptor", "not the same in all threads",
        {"steps": [*STEPS[:3], "cvt.u64.u32 %x4, %r0;", "add.u64 %b, %b, %x4;", *STEPS[3:]]}),
    "a warp that does not come": (
        "warpgroup", "never come here",
        {"steps": [*STEPS[:2], "setp.ge.u32 %p1, %r0, 96;", "@%p1 bra over;", *STEPS[2:],
                   "over:"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str) -> None:
    kind, detail, how = FAULTS[name]
    with pytest.raises(Fault) as caught:
        _run(**how)
    assert caught.value.kind == kind, caught.value
    assert re.search(detail, caught.value.detail), caught.value


def test_kernel_that_ends_too_early_is_found() -> None:
    text = _ptx(8, 4096, "bf16", _without("wgmma.wait"))
    text = re.sub(r"st\.global\.f32 .*\n", "", text)
    image = np.zeros(2048, np.uint16)
    descriptors = [np.uint64(_descriptor(at, 32)) for at in (0, 2048)]
    with pytest.raises(Fault, match="ends while a product"):
        Bench(text).launch(
            "k", [np.zeros(512, np.float32), image, np.zeros((128, 4), np.float32), *descriptors,
                  np.uint32(1)], block=128)  # fmt: skip


def test_another_swizzle_gives_another_result() -> None:
    """Only the numbers tell: within the pattern, every byte belongs to the matrix."""
    out, product, c = _run(64, 128, change=lambda a, b: (a, b & ~(3 << 62)))
    assert not np.allclose(out, product + c, rtol=1e-2)


def test_unknown_forms_are_refused() -> None:
    for opcode in ("m64n12k16.f32.bf16.bf16", "m64n8k8.f32.tf32.tf32", "m64n8k16.f16.f16.f16",
                   "m64n8k16.f32.bf16.f16"):  # fmt: skip
        text = _ptx(8, 4096, "bf16", STEPS).replace("m64n8k16.f32.bf16.bf16", opcode)
        with pytest.raises(NotModelled):
            Bench(text).launch("k", [np.zeros(512, np.float32)] * 3 + [np.uint64(0)] * 2
                               + [np.uint32(0)], block=128)  # fmt: skip
    with pytest.raises(NotModelled):
        _run(scales="1, 1, 1, 0")
