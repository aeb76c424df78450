# SPDX-License-Identifier: Apache-2.0
"""The compiled module as it is installed: what it links, chooses and survives."""

import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import t2p_fast
from t2p_fast import _C
from t2p_fast.ops import vq_nearest, vq_quantize

RunPython = Callable[..., str]

ISA_LEVELS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
BEST_ISA = ISA_LEVELS.index(t2p_fast.build_info()["isa"])

# Prints a digest of what the ops return: the same for every instruction set and road.
DIGEST = """
import torch
from t2p_fast.ops import kmeans, vq_quantize
generator = torch.Generator().manual_seed(0)
x = torch.randn(3, 20, 9, 7, generator=generator, requires_grad=True)
codebook = torch.randn(300, 20, generator=generator, requires_grad=True)
quantized, indices, loss, counts, sums = vq_quantize(
    x, codebook, channel_dim=1, return_statistics=True)
(quantized.sum() + loss).backward()
print(quantized.double().sum().item(), indices.sum().item(), round(loss.item(), 5),
      counts.square().sum().item(), sums.double().sum().item(),
      codebook.grad.double().norm().item())
"""


def test_build_info() -> None:
    info = t2p_fast.build_info()
    assert info["version"] == t2p_fast.__version__
    assert set(info) == {"version", "cuda", "cuda_archs", "isa_built", "isa", "tensor_road"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_module_needs_neither_torch_nor_cuda() -> None:
    header = subprocess.run(
        ["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", header)
    assert needed
    assert all(re.match(r"lib(stdc\+\+|m|gcc_s|c|pthread|dl|rt)\.so|ld-linux", n) for n in needed)


@pytest.mark.parametrize("isa", ISA_LEVELS[: BEST_ISA + 1])
def test_every_instruction_set_agrees(isa: str, run_python: RunPython) -> None:
    chosen = "import t2p_fast; print(t2p_fast.build_info()['isa'])"
    assert run_python(chosen, T2P_ISA=isa).strip() == isa
    assert run_python(DIGEST, T2P_ISA=isa) == run_python(DIGEST)


# But the one that the other tests run on.
@pytest.mark.slow
@pytest.mark.parametrize("isa", ISA_LEVELS[:BEST_ISA])
def test_vq_passes_on_every_lesser_instruction_set(isa: str, run_python: RunPython) -> None:
    run_python(
        "import sys, pytest; sys.exit(pytest.main(["
        "'-q', '-p', 'no:cacheprovider', 'tests/ops/test_vq.py', '-k', 'nearest or layouts']))",
        T2P_ISA=isa,
    )


def test_unknown_instruction_set_is_an_error(run_python: RunPython) -> None:
    error = run_python("import t2p_fast.ops", fails=True, T2P_ISA="sse9")
    assert "T2P_ISA=sse9 is not one of scalar, avx2, avx512, avx512_vnni, avx512_bf16, amx" in error


def test_road_of_attributes(run_python: RunPython) -> None:
    road = "import t2p_fast; print(t2p_fast.build_info()['tensor_road'])"
    assert run_python(road, T2P_TENSOR_ROAD="attributes").strip() == "attributes"
    assert run_python(DIGEST, T2P_TENSOR_ROAD="attributes") == run_python(DIGEST)
    error = run_python("import t2p_fast.ops", fails=True, T2P_TENSOR_ROAD="sea")
    assert "T2P_TENSOR_ROAD=sea is not one of dlpack, attributes" in error


REFUSED = """
import torch, pytest
from torch._subclasses.fake_tensor import FakeTensorMode
from t2p_fast._library import _C
good = [torch.empty(0), torch.empty(2, dtype=torch.int64), torch.empty(2)]
with FakeTensorMode():
    fake = torch.empty(2, 3, 1)
for bad in (None, 3, [1.0], torch.Tensor, fake, torch.empty(2, 3, 1, device="meta"),
            torch.eye(3).to_sparse()):
    with pytest.raises((TypeError, ValueError)):
        _C.vq_nearest(bad, torch.empty(4, 3), *good, 1)
"""


@pytest.mark.parametrize("road", ["", "attributes"])
def test_what_has_no_memory_is_refused(road: str, run_python: RunPython) -> None:
    run_python(REFUSED, T2P_TENSOR_ROAD=road)


def test_fork_gives_the_child_a_pool(run_python: RunPython) -> None:
    program = """
import os, torch
from t2p_fast.ops import vq_nearest
torch.set_num_threads(3)
x, codebook = torch.randn(5000, 8), torch.randn(400, 8)
before = vq_nearest(x, codebook)
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(vq_nearest(x, codebook), before) else 1)
    assert os.waitpid(child, 0)[1] == 0
assert torch.equal(vq_nearest(x, codebook), before)
"""
    run_python(program)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_pool_obeys_set_num_threads(run_python: RunPython) -> None:
    program = """
import os, torch
from t2p_fast.ops import vq_nearest
x, codebook = torch.randn(3000, 16), torch.randn(300, 16)
before = len(os.listdir("/proc/self/task"))
def more(threads):
    torch.set_num_threads(threads)
    vq_nearest(x, codebook)
    return len(os.listdir("/proc/self/task")) - before
print(more(1), more(4), more(4), more(6))
"""
    # The caller is one of the threads, and workers stay for the next call.
    assert run_python(program).split() == ["0", "3", "3", "5"]


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_threads_are_those_of_torch(run_python: RunPython) -> None:
    program = """
import os, torch
from t2p_fast.ops import vq_nearest
torch.set_num_threads(4)
x, codebook = torch.randn(3000, 16), torch.randn(300, 16)
(torch.randn(400, 400) @ torch.randn(400, 400)).sum()
torch.randn(1 << 20).exp_()
before = len(os.listdir("/proc/self/task"))
vq_nearest(x, codebook)
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert run_python(program).strip() == "0"


def test_gil_is_released(run_python: RunPython) -> None:
    program = """
import threading, time, torch
from t2p_fast.ops import vq_nearest
torch.set_num_threads(1)
x, codebook = torch.randn(20000, 64), torch.randn(8192, 64)
worker = threading.Thread(target=vq_nearest, args=(x, codebook))
worker.start()
turns = 0
while worker.is_alive():
    turns += 1
    time.sleep(1e-4)
print(turns)
"""
    assert int(run_python(program)) > 20


def test_concurrent_callers() -> None:
    x, codebook = torch.randn(4000, 8), torch.randn(500, 8)
    expected = vq_quantize(x, codebook)
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(lambda _: vq_quantize(x, codebook), range(64)):
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_cuda_tensors_are_refused_without_cuda() -> None:
    if t2p_fast.build_info()["cuda"] is not None or not torch.cuda.is_available():
        pytest.skip("needs a GPU and a build without CUDA")
    with pytest.raises(RuntimeError, match="built without CUDA"):
        vq_nearest(torch.ones(1, 1, device="cuda"), torch.ones(1, 1, device="cuda"))
