# SPDX-License-Identifier: Apache-2.0
"""`--device emulated`: the ops of the package run their CUDA kernels on CPU tensors.

Nothing of it is in the package. Before `t2p_fast.ops` is imported,

- `_C` becomes a stand-in that hands tensors to `_C_emulated` as if they were on "cuda:1": as
  objects with the attributes that the bindings read where torch has no table of functions for them;
- `define_op` gives the CUDA implementation to the dispatcher for CPU tensors. While that runs,
  `Tensor.is_cuda` is true, and new tensors are known to be empty: reading them before they were
  written to is a fault, and so is a result that was never written to. So is `.item()` and the like,
  but in what may wait for a GPU: that alone keeps a call out of a CUDA graph.
"""

import importlib.machinery
import importlib.util
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from ptx.device import Device
from ptx.faults import Fault
from ptx.memory import Region, host_bytes

__all__ = ["Emulation", "install"]

Array = np.ndarray[Any, Any]

_EMPTY = {torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty,
          torch.Tensor.new_empty_strided}  # fmt: skip
_WAITING = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy,
            torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__,
            torch.Tensor.__index__, torch.Tensor.nonzero, torch.nonzero,
            torch.Tensor.masked_select, torch.masked_select, torch.Tensor.unique, torch.unique,
            torch.equal, torch.Tensor.equal, torch.tensor}  # fmt: skip
# What solvers do depends on which weights are 0; else functions that are there to wait.
_MAY_WAIT = {"t2p_fast.ops.mrf_solvers", "t2p_fast.ops.mrf_gathered.most_unknown"}
_IN_PLACE = re.compile(r"(?!__).*[a-z0-9]_$|__setitem__|__i\w+__")


class CudaView:
    """A CPU tensor as the bindings see one on a GPU."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype
        self.device = torch.device("cuda", Device.index)
        self.is_cpu = False
        self._strides, self._address = tensor.stride(), tensor.data_ptr()

    def stride(self) -> tuple[int, ...]:
        return self._strides

    def data_ptr(self) -> int:
        return self._address


class Emulation:
    """The stand-in for `_C`, and which memory has not been written to yet.

    Attributes:
        may_wait: Whether what may wait for a GPU may do so now.
    """

    may_wait = True

    def __init__(self, library: Path) -> None:
        # The name within is that of the package's module; the file is another.
        loader = importlib.machinery.ExtensionFileLoader("_C", str(library))
        spec = importlib.util.spec_from_loader("_C", loader)
        assert spec
        self.module = importlib.util.module_from_spec(spec)
        loader.exec_module(self.module)
        self.device = Device(library)
        streams = {Device.index: types.SimpleNamespace(cuda_stream=Device.stream)}
        seen: Any = types.ModuleType("torch_emulated")
        seen.__dict__.update({n: t for n, t in vars(torch).items() if isinstance(t, torch.dtype)})
        seen.Tensor = CudaView
        seen.cuda = types.SimpleNamespace(current_stream=streams.__getitem__)
        self.module.init(seen)
        self._functions: dict[str, Callable[..., Any]] = {}
        self.empties: dict[int, Array] = {}  # by address of the storage: which bytes are written

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.module, name)
        if name in ("build_info", "init") or not callable(function):
            return function
        if name not in self._functions:
            self._functions[name] = self._wrapped(function)
        return self._functions[name]

    def _wrapped(self, function: Any) -> Callable[..., Any]:
        names = re.findall(r"(\w+): ", (function.__doc__ or "").split("->")[0])

        def call(*arguments: Any, **named: Any) -> Any:
            with torch.no_grad():
                tensors = {
                    name: value
                    for name, value in [*zip(names, arguments, strict=False), *named.items()]
                    if isinstance(value, torch.Tensor)
                }
                regions = self._regions(tensors)
                with self.device.regions([region for region, *_ in regions]):
                    result = function(
                        *(_view(value) for value in arguments),
                        **{name: _view(value) for name, value in named.items()},
                    )
                self._note_written(regions)
            return result

        return call

    def _regions(self, tensors: dict[str, torch.Tensor]) -> list[tuple[Region, int, int]]:
        """Buffers for tensors, those that overlap as one; and address and size of each."""
        spans = []
        for name, tensor in tensors.items():
            if tensor.numel() == 0:
                continue
            item = tensor.element_size()
            reach = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in reach)
            low = tensor.data_ptr()
            spans.append((low, low + (last + 1) * item, name, tensor))
        spans.sort(key=lambda span: span[0])
        groups: list[list[Any]] = []
        for span in spans:
            if groups and span[0] < groups[-1][1]:
                groups[-1][1] = max(groups[-1][1], span[1])
                groups[-1][2].append(span)
            else:
                groups.append([span[0], span[1], [span]])
        result = []
        for low, high, members in groups:
            item = min(tensor.element_size() for *_, tensor in members)
            origin = low & ~15
            region = Region(
                "/".join(name for _, _, name, _ in members), host_bytes(origin, high - origin),
                origin, low - origin, granule=min(item, 8),
            )  # fmt: skip
            count = -(-(high - origin) // (1 << region.shift))
            if (state := self._state(members[0][3])) is not None:
                storage = members[0][3].untyped_storage().data_ptr()
                octets = np.ones(count << region.shift, bool)
                octets[low - origin : high - origin] = state[low - storage : high - storage]
                region.written = octets.reshape(count, -1).all(1)
            tensor = members[0][3]
            if len(members) == 1 and tensor.numel() * item < high - low and item <= 8:
                holes = np.zeros(count, bool)
                holes[(low - origin) // item :] = True
                elements = np.lib.stride_tricks.as_strided(
                    holes[(low - origin) // item :], tensor.shape, tensor.stride()
                )
                elements[...] = False
                region.holes = holes
            result.append((region, low, high))
        return result

    def _state(self, tensor: torch.Tensor) -> Array | None:
        return self.empties.get(tensor.untyped_storage().data_ptr())

    def _note_written(self, regions: list[tuple[Region, int, int]]) -> None:
        for region, low, high in regions:
            if region.written is None:
                continue
            octets = np.repeat(region.written, 1 << region.shift)
            for storage, state in self.empties.items():
                if storage <= low < storage + len(state):
                    state[low - storage : high - storage] |= octets[
                        low - region.origin : high - region.origin
                    ]

    def on_cuda(self, implementation: Callable[..., Any]) -> Callable[..., Any]:
        """An op's CUDA implementation as one for CPU tensors."""

        def run(*arguments: Any) -> Any:
            before, self.empties = self.empties, {}
            mode = _LikeCuda(self)
            try:
                with mode:
                    result = implementation(*arguments)
                results = result if isinstance(result, tuple) else (result,)
                for number, tensor in enumerate(results if result is not None else ()):
                    self._check_result(implementation.__name__, number, tensor)
                return result
            finally:
                self.empties = before

        return run

    def _check_result(self, op: str, number: int, tensor: torch.Tensor) -> None:
        state = self._state(tensor)
        if state is None or tensor.numel() == 0:
            return
        item = tensor.element_size()
        start = tensor.storage_offset() * item
        written = state[start:][: len(state) // item * item]
        written = written[: len(written) // item * item].reshape(-1, item).all(1)
        elements = np.lib.stride_tricks.as_strided(
            written, tensor.shape, tensor.stride() if tensor.ndim else ()
        )
        if not elements.all():
            where = tuple(int(i) for i in np.argwhere(~elements)[0])
            raise Fault("unwritten result", f"element {where} of result {number}", op, "its end",
                        "return", None, None)  # fmt: skip


class _LikeCuda(TorchFunctionMode):
    """Tensors say that they are on a GPU, and empty ones are remembered."""

    def __init__(self, emulation: Emulation) -> None:
        super().__init__()
        self.emulation = emulation
        self.alive: list[torch.Tensor] = []  # so that no address is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.is_cuda.__get__:
            return True
        if _waits(func, args, kwargs) and not (self.emulation.may_wait and _one_may_wait()):
            raise Fault("synchronisation", "the host would wait for the GPU", "an op's Python",
                        "a call", func.__name__, None, None)  # fmt: skip
        result = func(*args, **kwargs)
        if func in _EMPTY:
            storage = result.untyped_storage()
            self.alive.append(result)
            self.emulation.empties[storage.data_ptr()] = np.zeros(storage.nbytes(), bool)
        else:
            written = [kwargs.get("out")]
            if _IN_PLACE.fullmatch(getattr(func, "__name__", "")):
                written.append(args[0])
            for tensor in written:
                if isinstance(tensor, torch.Tensor):
                    self.emulation.empties.pop(tensor.untyped_storage().data_ptr(), None)
        return result


def _waits(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether torch has to know numbers that are on the GPU, or to copy some to it."""
    if func in (torch.repeat_interleave, torch.Tensor.repeat_interleave):
        return isinstance(args[-1], torch.Tensor) and kwargs.get("output_size") is None
    if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        masks = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in index)
        return masks and (len(args) == 2 or isinstance(args[2], torch.Tensor))
    return func in _WAITING


def _one_may_wait() -> bool:
    """Whether one of the functions that are running may."""
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        module = frame.f_globals.get("__name__", "")
        if module in _MAY_WAIT or f"{module}.{frame.f_code.co_name}" in _MAY_WAIT:
            return True
    return False


def _view(value: Any) -> Any:
    return CudaView(value) if isinstance(value, torch.Tensor) else value


def install(library: Path) -> Emulation:
    """Puts the emulated device under the package; before its ops are imported."""
    from t2p_fast import _checks, _library

    if "t2p_fast.ops" in sys.modules:
        raise RuntimeError("t2p_fast.ops was imported before the emulated device was there")
    emulation = Emulation(library)
    original = _library.define_op

    def define_op(schema: str, *, cpu: Any, cuda: Any = None, **rest: Any) -> Any:
        return original(schema, cpu=emulation.on_cuda(cuda or cpu), **rest)

    _library.define_op = define_op
    # A plain call would go past the dispatcher, which is where tensors come to be on a GPU.
    _checks.is_plain = lambda *_: False
    _library._C = emulation  # type: ignore[assignment]
    return emulation
