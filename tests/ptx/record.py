# SPDX-License-Identifier: Apache-2.0
"""Writes down what a GPU makes of the kernels of `cases.py`: `python -m ptx.record`, in `tests/`.

The PTX goes to the driver as it stands, by way of libcuda; neither nvcc nor torch is needed. The
file is `recorded/<compute capability>.npz`, and is meant to be committed.
"""

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ptx.cases import CASES, AnyCase, runs_on

__all__ = ["FOLDER"]

FOLDER = Path(__file__).parent / "recorded"


class Gpu:
    """The little of the driver's interface that a kernel of one block needs."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self("cuDeviceGet", ctypes.byref(device), 0)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self("cuCtxSetCurrent", context)
        numbers = []
        for attribute in (75, 76):  # the compute capability
            number = ctypes.c_int()
            self("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
            numbers.append(number.value)
        self.capability = 10 * numbers[0] + numbers[1]

    def __call__(self, name: str, *arguments: Any) -> None:
        status = getattr(self.cuda, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} failed with CUresult {status}")

    def run(self, case: AnyCase) -> "np.ndarray[Any, Any]":
        """The output of a case."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self("cuModuleLoadData", ctypes.byref(module), case.text().encode())
        self("cuModuleGetFunction", ctypes.byref(function), module, b"k")
        out = case.empty()
        arrays = [out, *map(np.ascontiguousarray, case.inputs())]
        buffers = [ctypes.c_uint64() for _ in arrays]
        for buffer, array in zip(buffers, arrays, strict=True):
            self("cuMemAlloc_v2", ctypes.byref(buffer), ctypes.c_size_t(array.nbytes))
            self("cuMemcpyHtoD_v2", buffer, ctypes.c_void_p(array.ctypes.data),
                 ctypes.c_size_t(array.nbytes))  # fmt: skip
        pointers = (ctypes.c_void_p * len(buffers))(*(ctypes.addressof(b) for b in buffers))
        self("cuLaunchKernel", function, 1, 1, 1, case.threads, 1, 1, 0, None, pointers, None)
        self("cuMemcpyDtoH_v2", ctypes.c_void_p(out.ctypes.data), buffers[0],
             ctypes.c_size_t(out.nbytes))  # fmt: skip
        for buffer in buffers:
            self("cuMemFree_v2", buffer)
        self("cuModuleUnload", module)
        return out


def main() -> None:
    gpu = Gpu()
    FOLDER.mkdir(exist_ok=True)
    chosen = [case for case in CASES if runs_on(case, gpu.capability)]
    results = {case.name: gpu.run(case) for case in chosen}
    path = FOLDER / f"sm_{gpu.capability}.npz"
    np.savez_compressed(path, **results)
    sys.stdout.write(f"{len(results)} of {len(CASES)} cases: {path}\n")


if __name__ == "__main__":
    main()
