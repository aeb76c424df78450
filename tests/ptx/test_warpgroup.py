# SPDX-License-Identifier: Apache-2.0
"""wgmma against numpy, with every swizzle, and what may go wrong with it (PTX manual 9.7.15)."""

import re
from typing import Any

import numpy as np
import pytest

from ptx.faults import Fault, NotModelled
from ptx.launch import Bench, Empty
from ptx.programs import Problem, Program
from ptx.values import bf16_to_float, float_to_bf16
from ptx.warpgroups import COLUMNS, ROWS, STEPS, code, descriptor, fragments, image

Array = np.ndarray[Any, Any]


def _program(
    n: int, octets: int, kind: str = "bf16", descriptors: tuple[int, int] | None = None, **how: Any
) -> Program:
    """Of an image of so many bytes."""
    a, b = descriptors or (descriptor(0, 32), descriptor(2048, 32))
    nothing = Problem([np.zeros(octets // 2, np.uint16), np.zeros((128, n // 2), np.float32)],
                      np.zeros((128, n // 2), np.float32))  # fmt: skip
    return Program("wgmma", code(n, octets, kind, (a, b), **how), lambda _: nothing, 128, octets,
                   "sm_90a")  # fmt: skip


def _launch(text: str, inputs: list[Array]) -> Array:
    out = np.zeros_like(inputs[1])
    Bench(text).launch("k", [Empty(out), *inputs], block=128)
    return out


def _run(
    n: int = 16, swizzle: int = 128, kind: str = "bf16", *, first: int = 0, change: Any = None,
    **how: Any,
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
    words, second = image(a, b, swizzle, first)
    descriptors = descriptor(2 * first, swizzle), descriptor(second + 2 * first, swizzle)
    if change:
        descriptors = change(*descriptors)
    c = fragments(numbers[2], n)
    program = _program(n, words.nbytes, kind, descriptors, **how)
    return _launch(program.text(), [words, c]), fragments(exact, n), c


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
    return lambda a, _: (a, descriptor(change.pop("start", 64 * 128), 128, **change))


FAULTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "accumulators read before the wait": (
        "wgmma", "read of the accumulator %d0, whose product", {"steps": _without("wgmma.wait")}),
    "accumulators waited for too little": (
        "wgmma", "read of the accumulator",
        {"steps": [*STEPS[:5], "wgmma.wait_group.sync.aligned 1;"]}),
    "accumulators written to before the wait": (
        "wgmma", "write to the accumulator %d1", {"steps": _after_commit("mov.b32 %d1, %d2;")}),
    "accumulators written to without a fence": (
        "wgmma", r"%d0 was written to and no wgmma\.fence", {"steps": _without("wgmma.fence")}),
    "operands stored without a proxy fence": (
        "wgmma", r"without a fence\.proxy\.async since: tile", {"steps": _without("fence.proxy")}),
    "operands stored without a barrier": (
        "race", "read of tile", {"steps": _without("bar")}),
    "operands overwritten before the wait": (
        "wgmma", r"write of bytes that a product not waited for reads: tile",
        {"steps": _after_commit("bar.sync 0;", "mad.lo.u32 %r5, %t, 4, %tile;",
                                "st.shared.b32 [%r5], %t;")}),
    "a stride too large": (
        "out of bounds", "wgmma reads 16 bytes", {"change": _other(stride=4096)}),
    "a start within a pattern": (
        "descriptor", "not in the first row", {"change": _other(start=64 * 128 + 128)}),
    "a start at the end of a row": (
        "descriptor", "over the end of a row", {"change": _other(start=64 * 128 + 112)}),
    "descriptors that differ": (
        "descriptor", "not the same in all threads",
        {"steps": [*STEPS[:3], "cvt.u64.u32 %a4, %t;", "add.u64 %a9, %a9, %a4;", *STEPS[3:]]}),
    "a warp that does not come": (
        "warpgroup", "never come here",
        {"steps": [*STEPS[:2], "setp.ge.u32 %p1, %t, 96;", "@%p1 bra over;", *STEPS[2:],
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
    program = _program(8, 4096, steps=_without("wgmma.wait"))
    text = re.sub(r"st\.global\.b32 .*\n", "", program.text())
    with pytest.raises(Fault, match="ends while a product"):
        _launch(text, program.inputs())


def test_another_swizzle_gives_another_result() -> None:
    """Only the numbers tell: within the pattern, every byte belongs to the matrix."""
    out, product, c = _run(64, 128, change=lambda a, b: (a, b & ~(3 << 62)))
    assert not np.allclose(out, product + c, rtol=1e-2)


def test_unknown_forms_are_refused() -> None:
    for opcode in ("m64n12k16.f32.bf16.bf16", "m64n8k8.f32.tf32.tf32", "m64n8k16.f16.f16.f16",
                   "m64n8k16.f32.bf16.f16"):  # fmt: skip
        program = _program(8, 4096)
        text = program.text().replace("m64n8k16.f32.bf16.bf16", opcode)
        with pytest.raises(NotModelled):
            _launch(text, program.inputs())
    with pytest.raises(NotModelled):
        _run(scales="1, 1, 1, 0")
