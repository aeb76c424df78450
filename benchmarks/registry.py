# SPDX-License-Identifier: Apache-2.0
"""What a benchmark of an op is made of, and how one is found.

A file ``bench_<op>.py`` in this folder defines ``BENCHMARK``, a `Benchmark`. It describes cases,
providers, a correctness gate and a floor; it never looks at a clock. `timing` does all of that.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Benchmark",
    "Case",
    "GateError",
    "Inputs",
    "Provider",
    "Sizes",
    "Workload",
    "load",
    "ops",
]

Sizes = Mapping[str, int]
Inputs = dict[str, Any]


class GateError(Exception):
    """A provider's result is wrong: its speed means nothing."""


@dataclass(frozen=True)
class Case:
    """One problem size; `name` is spelled from the sizes, like ``n4096-k8192-d32``.

    Attributes:
        sizes: The sizes by their one-letter names.
        quick: Whether ``--quick`` keeps the case.
        devices: Where it is worth measuring.
    """

    sizes: Sizes
    quick: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def name(self) -> str:
        return "-".join(f"{letter}{size}" for letter, size in self.sizes.items())


@dataclass(frozen=True)
class Provider:
    """One way of doing the work of a workload.

    Attributes:
        name: What the table and ``--providers`` call it.
        build: Takes the inputs of a case and returns the call to be timed. Everything that a user
            would do once (making a module, moving weights) belongs in `build`.
        ours: Whether it is the op under test. The others are peers.
        yardstick: Whether it does something else that is worth knowing beside, such as a copy: no
            peer, and compared with none.
        module: The Python module it needs, if that is not a dependency of t2p_fast.
        package: What to pip install to get `module`.
        devices: Where it runs.
        flag: The option of `run` without which it is left out, for what is slow to set up.
    """

    name: str
    build: Callable[[Inputs], Callable[[], Any]]
    ours: bool = False
    yardstick: bool = False
    module: str = ""
    package: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    flag: str = ""

    def obstacle(self, device: str, flags: frozenset[str]) -> str:
        """Why the provider cannot take part, or nothing."""
        if device not in self.devices:
            return f"not available on {device}"
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"not installed (pip install {self.package or self.module})"
        if self.flag and self.flag not in flags:
            return f"left out (--{self.flag})"
        return ""


@dataclass(frozen=True)
class Workload:
    """Providers doing the same work on the same cases.

    Attributes:
        name: A word, unique within the benchmark.
        title: One line for the table.
        cases: The problem sizes.
        providers: Ours first.
        inputs: Makes the tensors of a case, `inputs(sizes, device)`, the same at every call.
        gate: Raises `GateError` if a result is wrong, `gate(inputs, result, ours)`. Peers are
            held to what their arithmetic allows, the op under test to what it promises.
        flops: The arithmetic of the plain method in float32. Who prunes, or computes in smaller
            numbers, may need less and pass the floor.
        bytes_moved: Bytes of the inputs and results, each counted once.
        line: The size that varies, for workloads that are drawn as a line.
    """

    name: str
    title: str
    cases: tuple[Case, ...]
    providers: tuple[Provider, ...]
    inputs: Callable[[Sizes, str], Inputs]
    gate: Callable[[Inputs, Any, bool], None]
    flops: Callable[[Sizes], float]
    bytes_moved: Callable[[Sizes], float]
    line: str = ""


@dataclass(frozen=True)
class Benchmark:
    """All that is measured for one op.

    Attributes:
        op: The stem of the op.
        workloads: What is timed.
        gate: The op on awkward data (ragged sizes, ties, data far from the origin), by device;
            raises `GateError`. Runs before anything is timed.
    """

    op: str
    workloads: tuple[Workload, ...]
    gate: Callable[[str], None]

    def provider_names(self) -> list[str]:
        """The names of all providers, in the order in which they first appear."""
        return list(dict.fromkeys(p.name for w in self.workloads for p in w.providers))


def ops() -> list[str]:
    """The ops that have a benchmark."""
    names = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name.removeprefix("bench_") for name in names if name.startswith("bench_"))


def load(op: str) -> Benchmark:
    """The benchmark of `op`.

    Raises:
        ValueError: There is none.
    """
    if op not in ops():
        raise ValueError(f"bench: no benchmark for op {op!r}, there is one for {', '.join(ops())}")
    benchmark: Benchmark = importlib.import_module(f"{__package__}.bench_{op}").BENCHMARK
    return benchmark
