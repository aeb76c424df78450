# SPDX-License-Identifier: Apache-2.0
"""Launches single kernels on numpy arrays, without the runtime: for the emulator's own tests."""

from typing import Any

import numpy as np

from ptx.compiler import Program, compile_kernel
from ptx.memory import GlobalMemory, Region, host_bytes
from ptx.parser import Module, parse
from ptx.scheduler import run

__all__ = ["Bench", "Empty"]

Array = np.ndarray[Any, Any]


class Empty:
    """An array that nobody has written to yet."""

    def __init__(self, array: Array) -> None:
        self.array = array


class Bench:
    """The kernels of one PTX text."""

    processors = 4

    def __init__(self, text: str) -> None:
        self.module: Module = parse(text)
        self.memory = GlobalMemory()
        self._programs: dict[str, Program] = {}
        self._variables: list[Region] = []
        self._addresses: dict[str, int] = {}
        for variable in self.module.variables.values():
            if variable.space in ("global", "const"):
                room = np.zeros(max(variable.size, 1) + 256, np.uint8)
                start = -room.ctypes.data % 256
                data = room[start : start + variable.size]
                if variable.data is not None:
                    data[:] = np.frombuffer(variable.data, np.uint8)
                self._addresses[variable.name] = data.ctypes.data
                self._variables.append(Region(variable.name, data, data.ctypes.data, granule=1))

    def find(self, name: str) -> str:
        """The mangled name of the kernel called `name`."""
        (found,) = (
            mangled
            for mangled, function in self.module.functions.items()
            if function.entry and (mangled == name or f"{len(name)}{name}" in mangled)
        )
        return found

    def launch(
        self, name: str, arguments: list[Any], *, grid: int = 1, block: int = 32, dynamic: int = 0
    ) -> None:
        """Runs a kernel; arrays are passed by their address, everything else by its bytes."""
        mangled = self.find(name)
        if mangled not in self._programs:
            self._programs[mangled] = compile_kernel(self.module, mangled, self._addresses)
        program = self._programs[mangled]
        regions, parts = list(self._variables), bytearray()
        for number, ((offset, size), argument) in enumerate(
            zip(program.parameters.values(), arguments, strict=True)
        ):
            array = argument.array if isinstance(argument, Empty) else argument
            parts += bytes(offset - len(parts))
            if isinstance(array, np.ndarray):
                low = array.ctypes.data
                origin = low & ~15
                region = Region(
                    "xyzuvw"[number], host_bytes(origin, low + array.nbytes - origin), origin,
                    low - origin, granule=array.itemsize, written=not isinstance(argument, Empty),
                )  # fmt: skip
                regions.append(region)
                parts += low.to_bytes(8, "little")
            else:
                parts += np.asarray(array).tobytes()[:size]
        self.memory.set_regions(regions)
        run(self, program, (grid, 1, 1), (block, 1, 1), bytes(parts), dynamic)  # type: ignore[arg-type]
