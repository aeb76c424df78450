# SPDX-License-Identifier: Apache-2.0
"""The noise of the scheduler's kernels: Philox4x32-10, the same bits wherever it is drawn."""

import math
from collections.abc import Callable

import pytest
import torch

from t2p_fast._library import _C
from t2p_fast.ops import scheduler_noise, scheduler_step

# Known answers of Random123 1.14, kat_vectors, philox4x32 10: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    index, offset = (counter[i] | counter[i + 1] << 32 for i in (0, 2))
    assert _C.philox(key[0] | key[1] << 32, offset, index)[0] == words


def _normal(word: int) -> float:
    """The quantile in float64, from a word as normal.h says."""
    above = torch.tensor((word & 0x7FFFFFFF | 1) / 2**32, dtype=torch.float64)
    return -torch.special.ndtri(above).item() * (-1 if word >> 31 else 1)


def test_noise_is_the_quantile_of_philox(device: torch.device) -> None:
    seed, offset, n = 0x123456789ABCDEF, 77, 4096
    noise = scheduler_noise((2, n), seed, offset, device=device).cpu()
    for sample in range(2):
        blocks = [_C.philox(seed, offset, (sample << 32) + i) for i in range(n // 4)]
        exact = torch.tensor([_normal(w) for b in blocks for w in b[0]], dtype=torch.float64)
        assert ((noise[sample].double() - exact).abs() <= 4e-6).all()
        # The scalar code that CUDA shares gives the bits of the vectors.
        assert noise[sample].tolist() == [v for b in blocks for v in b[1]]


def test_quantile_in_every_octave() -> None:
    """Words that noise hardly ever meets: the tails, the middle, and both ends of an octave."""
    words = {w for k in range(31) for w in ((1 << k) - 1, 1 << k, (1 << k) + 1, 3 << k >> 1)}
    words |= {0x7FFFFFFF, 0x7FFFFFC0, 0x7FFFFFBF}
    for word in words:
        z, below = _C.normal_of_word(word), _C.normal_of_word(word | 1 << 31)
        assert abs(z - _normal(word)) <= 4e-6
        assert z > 0
        assert below == -z
    assert 6.2 < _C.normal_of_word(0) < 6.3


def test_noise_is_normal() -> None:
    noise = scheduler_noise((8, 1 << 17), 1).double()
    n = noise.numel()
    moments = [noise.pow(k).mean().item() for k in range(1, 5)]
    # Standard errors of the moments of n normal numbers: 1, 2, 15 and 96 over n, and five of them.
    for moment, expected, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert abs(moment - expected) < 5 * math.sqrt(variance / n)
    # The Kolmogorov distance to the normal law; above 1.95 / sqrt(n) one time in a thousand.
    ordered = noise.flatten().sort().values
    law = torch.special.ndtr(ordered)
    rank = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (law - rank).abs().max() < 1.95 / math.sqrt(n)
    # Neighbours, words of a block, and samples know nothing of each other.
    for other in (noise.roll(1, 1), noise.roll(4, 1), noise.roll(1, 0), noise.roll(64, 1)):
        assert abs((noise * other).mean().item()) < 5 / math.sqrt(n)
    assert noise.abs().max() > 4.5
    assert noise.isfinite().all()


def test_noise_by_seed_offset_and_sample() -> None:
    shape = (3, 1000)
    noise = scheduler_noise(shape, 5)
    assert torch.equal(noise, scheduler_noise(shape, 5))
    others = [scheduler_noise(shape, 6), scheduler_noise(shape, 5, 1), noise.roll(1, 0)]
    assert all((noise != other).float().mean() > 0.99 for other in others)
    # A sample's noise does not depend on the size of the batch, nor on what follows.
    assert torch.equal(noise[:2, :77], scheduler_noise((2, 77), 5))
    # With a seed for each sample it does not depend on the place in the batch either.
    seeds = torch.tensor([7, 8, 7])
    each = scheduler_noise(shape, seeds)
    assert torch.equal(each[0], each[2])
    assert torch.equal(each[1], scheduler_noise((1, 1000), torch.tensor([8]))[0])
    assert torch.equal(each[1], scheduler_noise((1, 1000), 8)[0])


@pytest.mark.parametrize("shape", [(1, 3), (2, 513), (3, 16384), (2, 3, 129, 129)])
@pytest.mark.parametrize("seed", [9, torch.tensor([4, 2, 9])])
def test_step_adds_that_noise(
    shape: tuple[int, ...], seed: int | torch.Tensor, device: torch.device
) -> None:
    """For any shape and number of threads."""
    if isinstance(seed, torch.Tensor):
        seed = seed[: shape[0]].to(device)
    zero, table = torch.zeros(shape, device=device), torch.zeros(1, 16, device=device)
    table[0, 13] = 1
    expected = scheduler_noise(shape, seed, 3, device=device)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            ours = scheduler_step(zero, zero, table, seed=seed, offset=3, return_x0=False)
            assert torch.equal(ours, expected)
    finally:
        torch.set_num_threads(before)


def test_same_noise_on_every_instruction_set(run_python: Callable[..., str]) -> None:
    program = """
import hashlib, torch
from t2p_fast.ops import scheduler_noise
noise = scheduler_noise((3, 5000), 11, 2)
print(hashlib.sha256(noise.numpy().tobytes()).hexdigest())
"""
    isa = _C.build_info()["isa"]
    levels = _C.build_info()["isa_built"]
    usable = levels[: levels.index(isa) + 1]
    assert len({run_python(program, T2P_ISA=level) for level in usable}) == 1


def test_every_instruction_set(run_python: Callable[..., str]) -> None:
    """Results agree to a few units with those of this process."""
    program = """
import torch
from t2p_fast.ops import scheduler_step
torch.manual_seed(0)
x, c, u, g, h = (torch.randn(2, 3, 30, 31) for _ in range(5))
table = torch.randn(4, 16)
table[:, 10:12] *= 0.3
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for bound in ({}, {"clip": 0.5}, {"threshold": (0.95, 3.0)}):
        for learned in (False, True):
            m = torch.cat([c, h], 1) if learned else c
            prev, x0 = scheduler_step(
                x.to(dtype), m.to(dtype), table, torch.tensor([1, 3]), uncond_output=u.to(dtype),
                guidance_scale=3.0, guidance_rescale=0.5, shift=g.to(dtype),
                history=(h.to(dtype), g.to(dtype)), seed=3, learned_variance=learned, **bound,
            )
            weights = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
            print(float((prev.double() * weights).sum()), float((x0.double() * weights).sum()))
"""
    isa = _C.build_info()["isa"]
    levels = _C.build_info()["isa_built"]
    results = [
        torch.tensor([float(v) for v in run_python(program, T2P_ISA=level).split()])
        for level in levels[: levels.index(isa) + 1]
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=2e-3, atol=0.5)
        torch.testing.assert_close(result[:12], results[0][:12], rtol=1e-5, atol=1e-3)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"shape must be \[b, ...\], got \[\]"):
        scheduler_noise((), 1)
    with pytest.raises(ValueError, match=r"seed is \[2\] but shape is \[3, 4\]"):
        scheduler_noise((3, 4), torch.tensor([1, 2]))
