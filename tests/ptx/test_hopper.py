# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the PTX of the Hopper kernel of vq: what its pipeline must not do is found.

And where there is no code for sm_90a the road through any tensor cores is taken.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ptx import build

ROOT = Path(__file__).parents[2]

# Runs in a process of its own, as test_emulation.py. Of 300 channels there are more chunks than
# stages: the copying warp waits for stages in the middle of a tile of codes.
PROGRAM = """
import torch
from ptx.build import build
from ptx.emulation import install
from ptx.faults import Fault

emulation = install(build())
from t2p_fast import ops

device = emulation.device
device.capability = (9, 0)
generator = torch.Generator().manual_seed(0)
x, codebook = (torch.randn(n, 300, generator=generator) for n in (40, 600))
nearest = torch.cdist(x.double(), codebook.double()).argmin(1)
(number,) = (i for i, texts in enumerate(device._texts) if any("wgmma" in t for *_, t in texts))
texts = device._texts[number]
wait = "wgmma.wait_group.sync.aligned"
one, two = ((1 << 62) | (rows << 32) | (1 << 16) for rows in (1024 >> 4, 512 >> 4))
for name, before, after in (
    ("as it is", wait, wait),
    ("stages let go too early", f"{wait} 1;", f"{wait} 2;"),
    ("scores read too early", f"{wait} 0;", f"{wait} 1;"),
    ("no fence", "wgmma.fence.sync.aligned;", ""),
    ("too few bytes", ", 16384;", ", 16368;"),
    ("another stride", str(one), str(two)),
):
    device._texts[number] = [
        (*of, text.replace(before, after) if "wgmma" in text else text) for *of, text in texts
    ]
    device._modules.clear()
    device._programs.clear()
    assert before == after or device._texts[number] != texts, name
    try:
        found = ops.vq_nearest(x, codebook)
        print(name, "passed" if torch.equal(found, nearest) else "gave another result")
    except Fault as fault:
        print(name, "found:", fault)

device._texts[number] = [text for text in texts if not text[1]]
device._modules.clear()
device._programs.clear()
device.launches.clear()
assert torch.equal(ops.vq_nearest(x, codebook), nearest)
print("without sm_90a:", *device.launches)
"""


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
def test_faults_in_a_pipeline_are_found() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT / "tests", capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = dict(
        re.findall(r"^(.+?) (passed|gave another result|found: .+)$", done.stdout, re.MULTILINE)
    )
    assert found["as it is"] == "passed"
    assert "write of bytes that a product not waited for reads" in found["stages let go too early"]
    assert "read of the accumulator" in found["scores read too early"]
    assert re.search(r"was written to and no wgmma\.fence came since", found["no fence"])
    assert "an mbarrier whose phase never ends" in found["too few bytes"]
    assert found["another stride"] == "gave another result"
    *_, launched = done.stdout.splitlines()
    assert launched.startswith("without sm_90a")
    assert "13coarse_kernel" in launched
    assert "hopper" not in launched
    assert "vq_cuda_hopper.cu:" in found["stages let go too early"]
