# SPDX-License-Identifier: Apache-2.0
"""What the emulator reports."""

import subprocess
from dataclasses import dataclass

__all__ = ["Fault", "NotModelled", "Violation", "demangle", "variable_name"]


class NotModelled(NotImplementedError):
    """PTX, or a call of the runtime, that the emulator does not know. Nothing is skipped."""


class Violation(Exception):
    """A broken rule as an instruction sees it; the scheduler adds where it stood, as a `Fault`."""

    def __init__(self, kind: str, detail: str, lane: int | None = None) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail, self.lane = kind, detail, lane


@dataclass(eq=False)
class Fault(Exception):
    """A kernel broke a rule.

    Attributes:
        kind: The class of the fault, such as "race" or "out of bounds".
        detail: What happened; for memory with buffer and offset.
        kernel: The demangled name.
        location: "file.cu:line".
        instruction: The PTX.
        thread, block: Coordinates of one thread at fault; None where it is not one thread's.
    """

    kind: str
    detail: str
    kernel: str
    location: str
    instruction: str
    thread: tuple[int, int, int] | None
    block: tuple[int, int, int] | None

    def __str__(self) -> str:
        who = f", thread {self.thread} of block {self.block}" if self.thread else ""
        return (
            f"{self.kind}: {self.detail}{who}, in {self.kernel} at {self.location}, "
            f"`{self.instruction}`"
        )


def demangle(name: str) -> str:
    """The C++ name of a kernel without its arguments, or `name` itself where c++filt is missing."""
    full = _filt(name).removeprefix("void ")
    depth = 0
    for at in range(len(full) - 1, -1, -1):  # in front of the last parentheses
        depth += (full[at] == ")") - (full[at] == "(")
        if depth == 0:
            return full[:at] if full[at] == "(" else full
    return full


def variable_name(name: str) -> str:
    """The C++ name of a variable without what it stands in."""
    return _filt(name.split("@")[0].split("#")[0]).split("::")[-1]


def _filt(name: str) -> str:
    try:
        done = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return name
    return done.stdout.strip().replace("(anonymous namespace)::", "")
