# SPDX-License-Identifier: Apache-2.0
"""The emulated GPU: what the CUDA runtime of `cudart/fake_cudart.cpp` asks for.

"Device" addresses are addresses of the host, so that a launch needs no copies. Which of them a
kernel may use is said by `regions`; memory that nobody registered is out of bounds.
"""

import ctypes
import gc
import re
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ptx.compiler import Program, compile_kernel
from ptx.faults import Fault, NotModelled, demangle
from ptx.memory import GlobalMemory, Region
from ptx.parser import Module, parse
from ptx.scheduler import run

__all__ = ["Device"]

Array = np.ndarray[Any, Any]

_SUCCESS, _INVALID_VALUE, _INVALID_CONFIGURATION, _LAUNCH_FAILURE = 0, 1, 9, 719
_NOT_PERMITTED = 800
_WRAPPER_MAGIC, _FAT_MAGIC, _KIND_PTX = 0x466243B1, 0xBA55ED50, 1

# cudaDeviceAttr of an A100, but for the number of processors: a small grid should fill it. On
# Hopper there is more shared memory, on Turing less, and fewer threads.
_PROCESSORS = 4
_SHARED_DEFAULT = 48 << 10
_ATTRIBUTES = {
    1: 1024, 2: 1024, 3: 1024, 4: 64, 5: 2**31 - 1, 6: 65535, 7: 65535,  # blocks and grids
    8: _SHARED_DEFAULT, 10: 32, 12: 65536, 13: 1410000, 16: _PROCESSORS, 39: 2048,
    81: 164 << 10, 82: 65536, 97: 163 << 10, 106: 32, 111: 1 << 10,
}  # fmt: skip
_HOPPER = {81: 228 << 10, 97: 227 << 10}
_TURING = {39: 1024, 81: 64 << 10, 97: 64 << 10, 106: 16, 111: 0}

_TYPES = {
    "in_queue": (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p),
    "on_device": (ctypes.c_int, ctypes.c_char_p, ctypes.c_int),
    "refused": (ctypes.c_int, ctypes.c_char_p),
    "launch": (ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint),
               ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)),
    "attribute": (ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_int)),
    "written": (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t),
    "shared_limit": (ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int),
    "occupancy": (ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_size_t,
                  ctypes.POINTER(ctypes.c_int)),
    "static_shared": (ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int)),
    "variable": (ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p),
    "part": (ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_char_p),
}  # fmt: skip


class _Handlers(ctypes.Structure):
    _fields_ = [(name, ctypes.CFUNCTYPE(*types)) for name, types in _TYPES.items()]


class Device:
    """One emulated GPU with the kernels of one shared library.

    It is the second of two, the first being current, and work on its tensors belongs in a stream
    that is not the default one. Whatever is launched or asked for elsewhere is a fault.

    Attributes:
        index, stream: Which device it is, and where its work belongs.
        memory: The buffers that the next launch may touch.
        launches: Names of the kernels launched so far, which a test may clear.
        failure: The first fault since it was last cleared.
        capability: The compute capability, at first the newest for which all kernels are there. Of
            a kernel's PTX the newest runs that it allows, as on a GPU; that for sm_90a on 9.0 only.
    """

    processors = _PROCESSORS
    index, stream = 1, 0x5EED0

    def __init__(self, library: Path) -> None:
        self.memory = GlobalMemory()
        self.launches: list[str] = []
        self._counts: Counter[tuple[int, str]] = Counter()  # of launches
        self.failure: Exception | None = None
        self._library = ctypes.CDLL(str(library))
        self._texts = [_ptx_of(address) for address in _modules(self._library)]
        self.capability = min(map(_newest, self._texts))
        self._modules: dict[tuple[int, str], tuple[Module, dict[str, int]]] = {}
        self._programs: dict[tuple[str, str], Program] = {}
        self._limits: dict[tuple[int, str], int] = {}
        self._own: dict[int, Region] = {}  # variables, by address
        self._kept: list[Array] = []
        self._handlers = _Handlers(
            **{
                name: ctypes.CFUNCTYPE(*types)(getattr(self, f"_{name}"))
                for name, types in _TYPES.items()
            }
        )
        self._library.t2p_emulator_connect(ctypes.byref(self._handlers))

    @contextmanager
    def regions(self, regions: list[Region]) -> Iterator[None]:
        """Lets kernels use these buffers, and raises what went wrong in the meantime."""
        before = self.memory.regions
        self.memory.set_regions([*regions, *self._own.values()])
        self.failure = None
        try:
            yield
        except RuntimeError:
            if self.failure is None:
                raise
        finally:
            self.memory.set_regions(before)
            self._check_current()
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    # Where things run -----------------------------------------------------------------------------

    def _check_current(self) -> None:
        """What was current before is so again."""
        current = ctypes.c_int()
        self._library.cudaGetDevice(ctypes.byref(current))
        if current.value != 0:
            self._library.cudaSetDevice(0)
            self._fail("another device", f"{current.value} is left the current one, which was 0",
                       "cudaSetDevice")  # fmt: skip

    def _fail(self, kind: str, detail: str, call: str, kernel: str = "") -> int:
        """Notes what the host did wrong; only the first counts."""
        where = (demangle(kernel), "its launch") if kernel else ("the host's code", "a call")
        if self.failure is None:
            self.failure = Fault(kind, detail, *where, call, None, None)
        return _NOT_PERMITTED

    def _in_queue(self, what: bytes, device: int, stream: int | None) -> int:
        name = what.decode()
        call, kernel = (name, "") if name.startswith("cuda") else ("cudaLaunchKernel", name)
        if device != self.index:
            return self._fail("another device", f"{device} is current, and the tensors are on "
                              f"{self.index}", call, kernel)  # fmt: skip
        if (stream or 0) != self.stream:
            return self._fail("another stream", f"{stream or 0:#x}, and the work on the tensors is "
                              f"in {self.stream:#x}", call, kernel)  # fmt: skip
        return _SUCCESS

    def _on_device(self, call: bytes, device: int) -> int:
        if device == self.index:
            return _SUCCESS
        return self._fail("another device", f"{device} is asked, and the tensors are on "
                          f"{self.index}", call.decode())  # fmt: skip

    def _refused(self, call: bytes) -> int:
        return self._fail("synchronisation", "it waits for the GPU or may, which no op does",
                          call.decode())  # fmt: skip

    # Buffers --------------------------------------------------------------------------------------

    def _written(self, address: int, size: int) -> int:
        for region in self.memory.regions:
            low, high = address - region.origin, address + size - region.origin
            if region.low <= low and high <= region.high:
                region.mark_written(low, high)
        return _SUCCESS

    def _part(self, base: int, offset: int, size: int, name: bytes) -> int:
        """A launcher's `Carver` hands out a part of its workspace."""
        for region in self.memory.regions:
            start = base - region.origin
            if region.low <= start and start + offset + size <= region.high:
                region.take_part(start, start + offset, start + offset + size, name.decode())
                return _SUCCESS
        return self._fail("out of bounds", f"{name.decode()}, {size} bytes at {offset}, is not in "
                          "the workspace", "Carver::take")  # fmt: skip

    # Kernels --------------------------------------------------------------------------------------

    def _module(self, number: int) -> tuple[Module, dict[str, int]]:
        """A module, parsed when it is first used, and the addresses of its variables."""
        fitting = [
            (target, specific, text)
            for target, specific, text in self._texts[number]
            if target <= self.capability and (target == self.capability or not specific)
        ]
        if not fitting:
            raise NotModelled(f"a module without PTX for compute capability {self.capability}")
        *_, text = max(fitting)
        key = number, text
        if key not in self._modules:
            with _many_objects():
                module = parse(text)
            addresses = {}
            for variable in module.variables.values():
                if variable.space not in ("global", "const"):
                    continue
                room = np.zeros(max(variable.size, 1) + 256, np.uint8)
                start = -room.ctypes.data % 256
                data = room[start : start + variable.size]
                if variable.data is not None:
                    data[:] = np.frombuffer(variable.data, np.uint8)
                self._kept.append(room)
                address = data.ctypes.data
                addresses[variable.name] = address
                self._own[address] = Region(variable.name, data, address, granule=1)
            self._modules[key] = module, addresses
            self.memory.set_regions([*self.memory.regions, *(
                self._own[a] for a in addresses.values())])  # fmt: skip
        return self._modules[key]

    def program(self, number: int, name: str) -> Program:
        """The compiled kernel of a module."""
        module, addresses = self._module(number)
        key = f"{number} {module.target}", name
        if key not in self._programs:
            with _many_objects():
                self._programs[key] = compile_kernel(module, name, addresses)
        return self._programs[key]

    def kernels(self) -> list[tuple[int, str]]:
        """All kernels: numbers of modules, and names."""
        return [
            (number, name)
            for number in range(len(self._texts))
            for name, function in self._module(number)[0].functions.items()
            if function.entry
        ]

    def never_launched(self) -> list[str]:
        """The kernels that no launch was of, of whatever capability: their C++ names."""
        names = {
            (number, name)
            for number, texts in enumerate(self._texts)
            for *_, text in texts
            for name in re.findall(r"\.entry\s+([\w$]+)", text)
        }
        return sorted(demangle(name) for _, name in names - set(self._counts))

    def _launch(
        self, number: int, name: bytes, grid: Any, block: Any, dynamic: int, arguments: Any
    ) -> int:
        if self.failure is not None:
            return _LAUNCH_FAILURE
        try:
            return self._launch_checked(number, name.decode(), grid, block, dynamic, arguments)
        except (Fault, NotModelled) as error:
            self.failure = error
            return _LAUNCH_FAILURE
        except Exception as error:  # a bug of the emulator: no exception may pass through C
            self.failure = error
            return _LAUNCH_FAILURE

    def _launch_checked(
        self, number: int, name: str, grid: Any, block: Any, dynamic: int, arguments: Any
    ) -> int:
        blocks = (int(grid[0]), int(grid[1]), int(grid[2]))
        shape = (int(block[0]), int(block[1]), int(block[2]))
        program = self.program(number, name)
        bound = self._module(number)[0].functions[name].threads
        threads = shape[0] * shape[1] * shape[2]
        if not all(0 < size <= limit for size, limit in zip(
            (*blocks, *shape), (2**31 - 1, 65535, 65535, 1024, 1024, 64), strict=True)
        ) or threads > min(1024, bound):  # fmt: skip
            return _INVALID_CONFIGURATION
        static = program.shared_size - sum(high - low for low, high in program.shared_gaps)
        if static + dynamic > max(_SHARED_DEFAULT, self._limits.get((number, name), 0) + static):
            return _INVALID_VALUE
        parts = bytearray()
        for i, (offset, size) in enumerate(program.parameters.values()):
            parts += bytes(offset - len(parts))
            parts += ctypes.string_at(arguments[i], size)
        self.launches.append(name)
        self._counts[number, name] += 1
        for region in self.memory.regions:
            if region.shadow:
                region.shadow.reset()
        run(self, program, blocks, shape, bytes(parts), dynamic)
        return _SUCCESS

    def _shared_limit(self, number: int, name: bytes, size: int) -> int:
        program = self.program(number, name.decode())
        static = program.shared_size - sum(high - low for low, high in program.shared_gaps)
        if not 0 <= size <= self._attributes()[97] - static:
            return _INVALID_VALUE
        self._limits[number, name.decode()] = size
        return _SUCCESS

    def _occupancy(self, number: int, name: bytes, threads: int, dynamic: int, blocks: Any) -> int:
        """By threads and shared memory; PTX does not know how many registers there will be."""
        program = self.program(number, name.decode())
        limits = self._attributes()
        shared = program.shared_size + dynamic + limits[111]
        blocks[0] = min(limits[106], limits[39] // max(threads, 1), limits[81] // max(shared, 1))
        return _SUCCESS

    def _static_shared(self, number: int, name: bytes, size: Any) -> int:
        program = self.program(number, name.decode())
        size[0] = program.shared_size - sum(high - low for low, high in program.shared_gaps)
        return _SUCCESS

    def _variable(self, number: int, name: bytes) -> int:
        return self._module(number)[1][name.decode()]

    def _attribute(self, number: int, value: Any) -> int:
        if number in (75, 76):
            value[0] = self.capability[number - 75]
            return _SUCCESS
        if number not in _ATTRIBUTES:
            self.failure = NotModelled(f"cudaDeviceGetAttribute({number})")
            return _INVALID_VALUE
        value[0] = self._attributes()[number]
        return _SUCCESS

    def _attributes(self) -> dict[int, int]:
        if self.capability >= (9, 0):
            return _ATTRIBUTES | _HOPPER
        return _ATTRIBUTES if self.capability >= (8, 0) else _ATTRIBUTES | _TURING


@contextmanager
def _many_objects() -> Iterator[None]:
    """Makes objects that stay: Python's garbage collector need not look at them, now or later."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if before:
            gc.enable()


def _modules(library: ctypes.CDLL) -> list[int]:
    library.t2p_emulator_module.restype = ctypes.c_void_p
    return [library.t2p_emulator_module(i) for i in range(library.t2p_emulator_modules())]


def _newest(texts: list[tuple[tuple[int, int], bool, str]]) -> tuple[int, int]:
    """The newest capability of a module's PTX, but for what is there for one alone."""
    general = [target for target, specific, _ in texts if not specific]
    return max(general or [target for target, *_ in texts])


def _ptx_of(wrapper: int) -> list[tuple[tuple[int, int], bool, str]]:
    """The PTX in a fat binary, which nvcc was told to leave uncompressed: the compute capability,
    whether it is for that one alone, and the text."""
    magic, _, data = struct.unpack("<IIQ", ctypes.string_at(wrapper, 16))
    if magic != _WRAPPER_MAGIC:
        raise NotModelled(f"a fat binary whose wrapper begins with {magic:#x}")
    magic, _, header, size = struct.unpack("<IHHQ", ctypes.string_at(data, 16))
    if magic != _FAT_MAGIC:
        raise NotModelled(f"a fat binary that begins with {magic:#x}")
    at, end = data + header, data + header + size
    texts = []
    while at < end:
        kind, _, header, size = struct.unpack("<HHIQ", ctypes.string_at(at, 16))
        if kind == _KIND_PTX:
            text = ctypes.string_at(at + header, size).rstrip(b"\0")
            if not text.lstrip().startswith((b".version", b"//")):
                raise NotModelled("compressed PTX: build with --no-compress")
            target = re.search(r"^\.target\s+sm_(\d+)(\d)([a-z]?)", text.decode(), re.MULTILINE)
            assert target
            capability = int(target[1]), int(target[2])
            texts.append((capability, bool(target[3]), text.decode()))
        at += header + size
    if texts:
        return texts
    raise NotModelled("a fat binary without PTX: build for a virtual architecture")
