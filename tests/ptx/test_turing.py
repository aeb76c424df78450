# SPDX-License-Identifier: Apache-2.0
"""Compute capability 7.5, for which other code is compiled: each op once, and by which kernels.

There are no tensor cores for bfloat16, and no instructions for its conversions, which are done by
hand.
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from ptx import build

ROOT = Path(__file__).parents[2]

# Runs in a process of its own, as test_emulation.py. Shapes are ragged; what would be on tensor
# cores is large enough for them.
PROGRAM = """
import re

import torch
from ptx.build import build
from ptx.emulation import install

emulation = install(build())
from t2p_fast import ops, reference

device = emulation.device
device.capability = (7, 5)
generator = torch.Generator().manual_seed(0)
rounding = {torch.float32: 0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator).to(dtype)

def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

def report(name, dtype, *pairs, more=2.0**-18):
    # Results are rounded once to their dtype, and to nearest.
    for ours, truth in pairs:
        ours, truth = ours.detach(), truth.detach().double()
        error, size = (ours.double() - truth).abs(), truth.abs()
        allowed = rounding.get(ours.dtype, 0) * size + more * size.max()
        assert (error <= allowed).all(), (name, dtype, float((error - allowed).max()))
    kernels = re.findall(r"([a-z][a-z_]+_kernel)", " ".join(device.launches))
    print(name, str(dtype).removeprefix("torch."), *kernels)
    device.launches.clear()

def gradients(function, leaves, call):
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = call(function, *leaves)
    out = out[0] if isinstance(out, tuple) else out
    seed = torch.cos(torch.arange(out.numel())).view_as(out).bfloat16().to(out.dtype)
    return out, *torch.autograd.grad(out, leaves, seed)

for dtype in rounding:
    x, weight, bias = normal(2, 6, 37, dtype=dtype), normal(6), normal(6)
    norm = lambda function, *given: function(given[0], 3, *given[1:])
    found = gradients(ops.group_norm_silu, (x, weight, bias), norm)
    truth = gradients(reference.group_norm_silu, map(double, (x, weight, bias)), norm)
    report("group_norm", dtype, *zip(found, truth))

    leaves = [normal(1, 2, 70, 40, dtype=dtype) for _ in range(3)]
    for causal in (False, True):
        attend = lambda function, q, k, v: function(q, k, v, causal=causal)
        found = gradients(ops.linear_attention, leaves, attend)
        truth = gradients(reference.linear_attention, map(double, leaves), attend)
        report("linear_attention", dtype, *zip(found, truth))

    sample, output, other, noise = (normal(2, 3, 7, 5, dtype=dtype) for _ in range(4))
    table = normal(3, 16).abs()
    options = {"guidance_scale": 3.0, "clip": 1.0}
    found = ops.scheduler_step(
        sample, output, table, 1, uncond_output=other, noise=noise, return_x0=True, **options)
    truth = reference.scheduler_step(
        double(sample), double(output), double(table[1:2].expand(2, -1)),
        uncond_output=double(other), noise=double(noise), **options)
    report("scheduler", dtype, *zip(found, truth))

    logits, tokens = normal(2, 11, 77, dtype=dtype), torch.full((2, 11), 77)
    seed, count = torch.tensor([3, 5]), torch.tensor([4, 9])
    found = ops.masked_sample(logits, tokens, mask_count=count, seed=seed)
    truth = reference.masked_sample(logits.double(), tokens, mask_count=count, seeds=seed)
    report("masked_sampling", dtype, (found.tokens, truth.tokens))

    x, codes = normal(45, 50, dtype=dtype), normal(260, 50, dtype=dtype)
    few, fewer = normal(45, 5, dtype=dtype), normal(70, 5, dtype=dtype)
    for rows, book in ((x, codes), (few, fewer)):
        nearest, distance = ops.vq_nearest(rows, book, return_distance=True)
        truth = torch.cdist(rows.double(), book.double()).square().min(1)
        report("vq", dtype, (nearest, truth.indices), (distance, truth.values))
    book = codes.float()
    quantized, nearest, loss = ops.vq_quantize(x, book)
    truth = reference.vq_quantize(x.double(), book.double())
    report("vq", dtype, (quantized, truth[0]), (nearest, truth[1]), (loss, truth[2]))

    n = torch.arange(42)
    apart = (n[:, None] // 7 - n // 7).abs() + (n[:, None] % 7 - n % 7).abs()
    known = torch.where(torch.rand(2, 42, generator=generator) < 0.5, 3, -1)
    unary, labels = normal(2, 42, 24, dtype=dtype), (normal(24, 24) / 4).to(dtype)
    window, dense = 0.3 * (apart == 1).double(), normal(42, 42) / 6
    for w_s, matrix in ((ops.grid_neighbours(6, 7, weight=0.3), window), (dense, dense.double())):
        found = ops.mrf_mean_field(unary, w_s, labels, known=known, iterations=2)
        truth = reference.mrf_mean_field(
            unary.double(), matrix, labels.double(), known=known, iterations=2)
        # With label weights in bfloat16 so is q, from iteration to iteration.
        more = 2.0**-8 if labels.dtype == torch.bfloat16 else 2.0**-18
        report("mrf", dtype, (found, truth), more=more)

print("targets", *{module.target for module, _ in device._modules.values()})
"""


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
def test_ops_on_turing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT / "tests", capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    launched: dict[tuple[str, str], str] = defaultdict(str)
    for op, dtype, kernels in re.findall(r"^(\w+) (\w+16|float32) (.+)$", done.stdout, re.M):
        launched[op, dtype] += kernels
    ops = ("group_norm", "linear_attention", "scheduler", "masked_sampling", "vq", "mrf")
    assert launched.keys() == {
        (op, dtype) for op in ops for dtype in ("float32", "bfloat16", "float16")
    }
    for kernels in launched.values():
        assert not re.search("mma|hopper|coarse|logits", kernels)
    for dtype in ("float32", "bfloat16", "float16"):
        assert "scan_kernel" in launched["vq", dtype]
        assert "small_kernel" in launched["vq", dtype]
        assert "message_kernel" in launched["mrf", dtype]
    assert done.stdout.splitlines()[-1] == "targets sm_75"
