# SPDX-License-Identifier: Apache-2.0
"""What a launcher does wrong on the host, planted in `kernels/runtime.cu`, is found and named."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from ptx import build
from ptx.device import Device
from ptx.faults import Fault
from ptx.memory import Region

pytestmark = pytest.mark.skipif(build.nvcc() is None, reason="there is no nvcc on the PATH")

SOURCE = Path(__file__).parent / "kernels" / "runtime.cu"

# Function: kind, part of the detail, and the call; of launches the kernel as well.
FAULTS = {
    "launch_in_default_stream": ("another stream", "0x0, and", "cudaLaunchKernel"),
    "fill_in_default_stream": ("another stream", "0x0, and", "cudaMemsetAsync"),
    "copy_in_another_stream": ("another stream", "0x2, and", "cudaMemcpyAsync"),
    "copy_to_symbol_in_default_stream": ("another stream", "0x0", "cudaMemcpyToSymbolAsync"),
    "launch_without_guard": ("another device", "0 is current", "cudaLaunchKernel"),
    "fill_without_guard": ("another device", "0 is current", "cudaMemsetAsync"),
    "limit_without_guard": ("another device", "0 is asked", "cudaFuncSetAttribute"),
    "attribute_of_the_first": ("another device", "0 is asked", "cudaDeviceGetAttribute"),
    "guard_that_stays": ("another device", "1 is left the current", "cudaSetDevice"),
    "wait_for_device": ("synchronisation", "waits", "cudaDeviceSynchronize"),
    "wait_for_stream": ("synchronisation", "waits", "cudaStreamSynchronize"),
    "memory_of_its_own": ("synchronisation", "may", "cudaMalloc"),
    "memory_in_the_stream": ("synchronisation", "may", "cudaMallocAsync"),
    "copy_that_waits": ("synchronisation", "waits", "cudaMemcpy"),
}


@pytest.fixture(scope="module")
def library() -> Path:
    return build.compile_library(SOURCE)


@pytest.fixture(scope="module")
def device(library: Path) -> Device:
    return Device(library)


def _call(library: Path, device: Device, name: str) -> list[float]:
    x = np.arange(32, dtype=np.float32)
    region = Region("x", x.view(np.uint8), x.ctypes.data, granule=4)
    function = getattr(ctypes.CDLL(str(library)), name)
    with device.regions([region]):
        function(ctypes.c_void_p(x.ctypes.data), device.index, ctypes.c_void_p(device.stream))
    return x.tolist()


def test_what_is_right_passes(library: Path, device: Device) -> None:
    assert _call(library, device, "right") == [0, 4, *(2 * i for i in range(2, 32))]
    assert len(device.launches) == 1


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str, library: Path, device: Device) -> None:
    kind, detail, call = FAULTS[name]
    with pytest.raises(Fault) as caught:
        _call(library, device, name)
    fault = caught.value
    assert fault.kind == kind, fault
    assert detail in fault.detail, fault
    assert fault.instruction == call
    assert (fault.kernel == "twice") == (call == "cudaLaunchKernel"), fault
    assert _call(library, device, "right")[0] == 0  # what was wrong is over


def test_every_fault_is_there() -> None:
    planted = SOURCE.read_text().split('extern "C" {')[1].count("\nvoid ")
    assert planted == len(FAULTS) + 1
