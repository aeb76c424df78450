# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the PTX of the Hopper kernels: what their pipelines must not do is found.

And where there is no code for sm_90a the road through any tensor cores is taken.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ptx import build

ROOT = Path(__file__).parents[2]

# Runs in a process of its own, as test_emulation.py.
COMMON = """
import torch
from ptx.build import build
from ptx.emulation import install
from ptx.faults import Fault

emulation = install(build())
from t2p_fast import ops

device = emulation.device
device.capability = (9, 0)
generator = torch.Generator().manual_seed(0)
wait = "wgmma.wait_group.sync.aligned"

def try_faults(kernel, is_right, *faults):
    named = (any(kernel in text for *_, text in texts) for texts in device._texts)
    (number,) = (i for i, it_is in enumerate(named) if it_is)
    texts = device._texts[number]
    for name, before, after in (("as it is", wait, wait), *faults):
        device._texts[number] = [
            (*of, text.replace(before, after) if "wgmma" in text else text) for *of, text in texts
        ]
        device._modules.clear()
        device._programs.clear()
        assert before == after or device._texts[number] != texts, name
        try:
            print(name, "passed" if is_right() else "gave another result")
        except Fault as fault:
            print(name, "found:", fault)
    device._texts[number] = [text for text in texts if not text[1]]
    device._modules.clear()
    device._programs.clear()
    device.launches.clear()
    assert is_right()
    print("without sm_90a:", *device.launches)
"""

# Of 300 channels there are more chunks than stages: the copying warp waits for stages in the middle
# of a tile of codes.
VQ = """
x, codebook = (torch.randn(n, 300, generator=generator) for n in (40, 600))
nearest = torch.cdist(x.double(), codebook.double()).argmin(1)
one, two = ((1 << 62) | (rows << 32) | (1 << 16) for rows in (1024 >> 4, 512 >> 4))
try_faults(
    "coarse_hopper_kernel",
    lambda: torch.equal(ops.vq_nearest(x, codebook), nearest),
    ("stages let go too early", f"{wait} 1;", f"{wait} 2;"),
    ("scores read too early", f"{wait} 0;", f"{wait} 1;"),
    ("no fence", "wgmma.fence.sync.aligned;", ""),
    ("too few bytes", ", 16384;", ", 16368;"),
    ("another stride", str(one), str(two)),
)
"""

# Blocks have 2 or 3 tiles of 9 chunks, more than there are stages.
MRF = """
from t2p_fast.ops.mrf_tensor_cores import LabelStep

r, v = 8, 520
unary, mixed, w_c = (torch.randn(n, v, generator=generator) for n in (r, r, v))
step, mixed = LabelStep(unary, w_c.bfloat16()), mixed.bfloat16()
truth = (mixed.double() @ step.w_c.double().T + unary).softmax(1)

def is_right():
    q = torch.empty(r, v)
    step(mixed, None, 0.0, 1.0, q)
    return bool(((q - truth).abs() < 1e-4).all())

copies = "cp.async.wait_group"
try_faults(
    "logits_hopper_kernel",
    is_right,
    ("stages let go too early", f"{wait} 1;", f"{wait} 2;"),
    ("sums read too early", f"{wait} 0;", f"{wait} 1;"),
    ("no fence", "wgmma.fence.sync.aligned;", ""),
    ("no proxy fence", "fence.proxy.async.shared::cta;", ""),
    ("told too early", f"{copies} 8;", f"{copies} 9;"),
)
"""


def _found(program: str) -> tuple[dict[str, str], str]:
    """What came of each fault, and what was launched without code for sm_90a."""
    done = subprocess.run(
        [sys.executable, "-c", COMMON + program], cwd=ROOT / "tests", capture_output=True,
        text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = dict(
        re.findall(r"^(.+?) (passed|gave another result|found: .+)$", done.stdout, re.MULTILINE)
    )
    assert found["as it is"] == "passed"
    *_, launched = done.stdout.splitlines()
    assert launched.startswith("without sm_90a")
    assert "hopper" not in launched
    return found, launched


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
def test_faults_in_the_pipeline_of_vq_are_found() -> None:
    found, launched = _found(VQ)
    assert "write of bytes that a product not waited for reads" in found["stages let go too early"]
    assert "read of the accumulator" in found["scores read too early"]
    assert re.search(r"was written to and no wgmma\.fence came since", found["no fence"])
    assert "an mbarrier whose phase never ends" in found["too few bytes"]
    assert found["another stride"] == "gave another result"
    assert "13coarse_kernel" in launched
    assert "vq_cuda_hopper.cu:" in found["stages let go too early"]


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
def test_faults_in_the_pipeline_of_mrf_are_found() -> None:
    found, launched = _found(MRF)
    assert "write of bytes that a product not waited for reads" in found["stages let go too early"]
    assert "read of the accumulator" in found["sums read too early"]
    assert re.search(r"was written to and no wgmma\.fence came since", found["no fence"])
    assert "without a fence.proxy.async since" in found["no proxy fence"]
    assert "found" in found["told too early"]
    assert "13logits_kernel" in launched
    assert "mrf_cuda_hopper.cu:" in found["stages let go too early"]
