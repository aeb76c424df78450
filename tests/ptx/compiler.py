# SPDX-License-Identifier: Apache-2.0
"""A kernel of a parsed module to blocks of Python closures.

Calls are inlined. Every pair of a register and a type in which it is used gets a slot; so do
constants and special registers. A closure takes the `Warps` it works on and finds its operands by
their slots, so that one compilation serves all launches.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.batches import Lanewise, batched
from ptx.faults import NotModelled
from ptx.parser import (
    Address,
    Function,
    Immediate,
    Instruction,
    Module,
    Name,
    Operand,
    Pair,
    Variable,
    Vector,
)
from ptx.registers import Registers
from ptx.values import DTYPES

if TYPE_CHECKING:
    from ptx.warps import Warps

__all__ = ["Block", "Compiler", "Control", "Program", "Step", "compile_kernel", "instruction"]

Array = np.ndarray[Any, Any]
Step = Callable[["Warps"], None]


@dataclass(frozen=True)
class Control:
    """An instruction that ends a block, because the scheduler has a say in it.

    Attributes:
        kind: "branch", "exit", "barrier", "warp" (an instruction of several lanes of a warp),
            "warpgroup" (one of 4 warps) or "wait" (which may have to be tried again).
        step: What it does to registers, for barriers when all have arrived.
        labels: Of a branch; several where `index` chooses.
        index: Slot of the index of a branch, of the member mask of a "warp".
        barrier: Slots of the number and of the thread count, and the reduction.
    """

    kind: str
    step: Any = None
    labels: tuple[str, ...] = ()
    index: int | None = None
    barrier: tuple[int, int | None, str] | None = None


@dataclass
class Block:
    """Instructions that run without interruption.

    Attributes:
        steps: Closures, and the instruction that each is of.
        control: What ends it, None where it runs into the next block.
        guard: Slot of the predicate of `control`, and whether it is negated.
    """

    start: int
    steps: list[tuple[Step, Instruction]] = field(default_factory=list)
    control: Control | None = None
    instruction: Instruction | None = None
    guard: tuple[int, bool] | None = None
    targets: tuple[int, ...] = ()
    next: int = 0


@dataclass
class Program:
    """A compiled kernel.

    Attributes:
        blocks: By the number of their first instruction.
        parameters: Offset and size of every parameter.
        shared_symbols: Offsets of shared variables; dynamic shared memory starts at `shared_size`.
        shared_gaps: First and last byte of what lies between shared variables.
        slots: How `allocate` makes the registers of `Warps`.
        accumulators: Registers that wgmma adds up in, which nobody may touch meanwhile.
    """

    name: str
    blocks: dict[int, Block]
    parameters: dict[str, tuple[int, int]]
    shared_symbols: dict[str, int]
    shared_size: int
    shared_gaps: list[tuple[int, int]]
    local_size: int
    rows: dict[int, int]
    slots: list[tuple[str, Any, Any]]
    accumulators: frozenset[str]
    _pool: dict[int, "Registers"] = field(default_factory=dict)  # by the number of lanes

    @functools.cached_property
    def _of_launch(self) -> list[int]:
        """Slots that each launch fills anew."""
        return [i for i, (kind, *_) in enumerate(self.slots) if kind in ("special", "parameter")]

    def allocate(self, warps: "Warps") -> list[Any]:
        """Registers for `warps`: with ones, or what the program's last launch left there."""
        if warps.count not in self._pool:
            while len(self._pool) >= _POOLS:
                del self._pool[next(iter(self._pool))]
            self._pool[warps.count] = Registers(self.rows, self.slots, warps.count)
        result = self._pool[warps.count].take()
        for slot in self._of_launch:
            kind, what, dtype = self.slots[slot]
            if kind == "special":
                result[slot] = np.asarray(warps.special(what)).astype(dtype)
            else:
                size = np.dtype(dtype).itemsize
                result[slot] = np.frombuffer(warps.parameters[what : what + size], dtype)[0]
        return result


_POOLS = 4  # numbers of lanes that a program keeps views of its registers for


Handler = Callable[["Compiler", Instruction, "re.Match[str]"], Step | Control]
_HANDLERS: dict[str, list[tuple["re.Pattern[str]", Handler]]] = {}


def instruction(pattern: str) -> Callable[[Handler], Handler]:
    """Registers a handler for the opcodes that `pattern` matches as a whole.

    The text up to the first dot must be plain, or plain words in `(a|b)`. Named groups are what the
    handler sees of the modifiers.
    """
    head = re.match(r"\(([a-z0-9|]+)\)|([a-z0-9]+)", pattern)
    assert head, pattern
    compiled = re.compile(pattern)

    def register(handler: Handler) -> Handler:
        for word in (head[1] or head[2]).split("|"):
            _HANDLERS.setdefault(word, []).append((compiled, handler))
        return handler

    return register


def handler_of(opcode: str) -> tuple[Handler, "re.Match[str]"]:
    """The handler of an opcode; NotModelled if there is none."""
    for pattern, handler in _HANDLERS.get(opcode.split(".")[0], ()):
        if match := pattern.fullmatch(opcode):
            return handler, match
    raise NotModelled(f"the instruction {opcode}")


def compile_kernel(module: Module, name: str, addresses: dict[str, int], gap: int = 64) -> Program:
    """The kernel `name` as a program.

    Args:
        addresses: Of the module's variables in global and constant memory.
        gap: Bytes left between shared variables, so that running over the end of one shows.
    """
    return Compiler(module, name, addresses, gap).program()


class Compiler:
    """What handlers need: slots for their operands, and the common shapes of closures."""

    def __init__(self, module: Module, name: str, addresses: dict[str, int], gap: int) -> None:
        import ptx.instructions  # noqa: F401  (registers the handlers)

        self.function = _inlined(module, module.functions[name])
        self.addresses = addresses
        self.known = _constant_registers(self.function)
        self.parameters: dict[str, tuple[int, int]] = {}
        offset = 0
        for parameter in self.function.parameters:
            offset = -(-offset // parameter.align) * parameter.align
            self.parameters[parameter.name] = (offset, parameter.size)
            offset += parameter.size
        used = set(re.findall(r"[A-Za-z_$%][\w$]*", " ".join(i.text for i in self.function.code)))
        shared = [
            v
            for v in [*module.variables.values(), *self.function.variables.values()]
            if v.space == "shared" and v.name.split("@")[0].split("#")[0] in used
        ]
        self.shared, self.shared_size = _layout([v for v in shared if v.size], gap)
        align = max([v.align for v in shared if not v.size], default=16)
        self.shared_size = -(-self.shared_size // align) * align
        starts = [*sorted(self.shared[v.name] for v in shared if v.size), self.shared_size]
        ends = sorted(self.shared[v.name] + v.size for v in shared if v.size)
        self.shared_gaps = [(e, s) for e, s in zip(ends, starts[1:], strict=True) if s > e]
        self.shared.update({v.name: self.shared_size for v in shared if not v.size})
        self.local, self.local_size = _layout(
            [v for v in self.function.variables.values() if v.space in ("local", "param")], 0
        )
        self.rows: dict[int, int] = {}
        self._row: dict[str, tuple[int, int]] = {}
        self.slots: list[tuple[str, Any, Any]] = []
        self._slot: dict[Any, int] = {}
        self._lanewise: dict[Step, Lanewise] = {}

    # Slots ----------------------------------------------------------------------------------------

    def _register(self, name: str) -> tuple[int, int]:
        """Width (0 for a predicate) and row."""
        if name not in self._row:
            kind = self.function.registers[name]
            width = 0 if kind == "pred" else np.dtype(DTYPES[kind]).itemsize
            self._row[name] = (width, self.rows.get(width, 0))
            self.rows[width] = self.rows.get(width, 0) + 1
        return self._row[name]

    def is_register(self, operand: Operand) -> bool:
        return isinstance(operand, Name) and operand.name in self.function.registers

    def width(self, operand: Operand) -> int:
        """Bytes of a register."""
        assert isinstance(operand, Name)
        return self._register(operand.name)[0]

    def _new(self, kind: str, what: Any, dtype: Any) -> int:
        key = (kind, what, dtype) if kind != "constant" else (kind, what.tobytes(), dtype)
        if key not in self._slot:
            self._slot[key] = len(self.slots)
            self.slots.append((kind, what, dtype))
        return self._slot[key]

    def constant(self, value: int, dtype: Any) -> int:
        """The slot of an integer constant."""
        if dtype is np.bool_:
            return self._new("constant", np.bool_(value != 0), dtype)
        size = np.dtype(dtype).itemsize
        raw = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        return self._new("constant", np.frombuffer(raw, dtype)[0], dtype)

    def source(self, operand: Operand, dtype: Any) -> int:
        """The slot from which to read `operand` as `dtype`; of a wider register the low part."""
        if isinstance(operand, Immediate):
            if np.dtype(dtype).kind == "f" and not operand.float_bits:
                raise NotModelled(f"the integer {operand.value} as a float")
            if operand.float_bits == 32 and dtype is np.float64:
                value = np.array(operand.value, np.uint32).view(np.float32)
                return self._new("constant", np.float64(value), dtype)
            if operand.float_bits == 64 and dtype is np.float32:
                value = np.array(operand.value, np.uint64).view(np.float64)
                return self._new("constant", np.float32(value), dtype)
            return self.constant(operand.value, dtype)
        if not isinstance(operand, Name):
            raise NotModelled(f"the operand {operand}")
        name = operand.name
        if name in self.known:
            return self.constant(self.known[name].value, dtype)
        if name in self.function.registers:
            if operand.negated:
                raise NotModelled(f"!{name} here")
            width, row = self._register(name)
            if (dtype is np.bool_) != (width == 0):
                raise NotModelled(f"{name} as {np.dtype(dtype).name}")
            if dtype is np.bool_:
                return self._new("register", row, dtype)
            if np.dtype(dtype).itemsize > width:
                raise NotModelled(f"{name} of {width} bytes as {np.dtype(dtype).name}")
            return self._new("register", (width, row), dtype)
        if name.startswith("%"):
            return self._new("special", name, dtype)
        for table in (self.shared, self.local, self.addresses):
            if name in table:
                return self.constant(table[name] + operand.offset, dtype)
        if name in self.parameters:
            return self.constant(self.parameters[name][0] + operand.offset, dtype)
        raise NotModelled(f"the name {name}")

    def target(self, operand: Operand, dtype: Any) -> int | None:
        """The slot to write to, of the width of the register; None for the sink `_`."""
        if isinstance(operand, Name) and operand.name == "_":
            return None
        if not self.is_register(operand):
            raise NotModelled(f"a result in {operand}")
        assert isinstance(operand, Name)
        width, row = self._register(operand.name)
        if (dtype is np.bool_) != (width == 0):
            raise NotModelled(f"a result of {np.dtype(dtype).name} in {operand.name}")
        if dtype is np.bool_:
            return self._new("register", row, dtype)
        kind = np.dtype(dtype)
        if kind.itemsize > width or (kind.itemsize < width and kind.kind == "f"):
            raise NotModelled(f"a result of {kind.name} in {operand.name} of {width} bytes")
        if kind.itemsize < width:  # extended by its sign or by zeros
            dtype = np.dtype(f"{kind.kind}{width}").type
        return self._new("register", (width, row), dtype)

    # Closures -------------------------------------------------------------------------------------

    def compute(
        self, function: Callable[..., Any], target: Operand, dtype: Any,
        *sources: tuple[Operand, Any],
    ) -> Step:  # fmt: skip
        """target = function(sources), lane by lane; `function` gives arrays of `dtype`."""
        to = self.target(target, dtype)
        slots = [self.source(operand, kind) for operand, kind in sources]
        if to is None:
            raise NotModelled("an arithmetic result in _")
        direct = isinstance(function, np.ufunc) and self.width(target) in (
            0, np.dtype(dtype).itemsize
        )  # fmt: skip

        if direct and len(slots) == 2:
            first, second = slots

            def binary(w: "Warps") -> None:
                r = w.registers
                if w.mask is None:
                    function(r[first], r[second], out=r[to])
                else:
                    w.put(to, function, slots)

            return binary

        if direct and len(slots) == 1:
            (only,) = slots

            def unary(w: "Warps") -> None:
                r = w.registers
                if w.mask is None:
                    function(r[only], out=r[to])
                else:
                    w.put(to, function, slots)

            return unary

        def step(w: "Warps") -> None:
            r = w.registers
            if w.mask is None:
                r[to][...] = function(*[r[slot] for slot in slots])
            else:
                w.put(to, function, slots)

        self._lanewise[step] = Lanewise(function, to, tuple(slots))
        return step

    def predicate(self, operand: Operand) -> tuple[int, bool]:
        """The slot of a predicate, and whether it is negated."""
        if isinstance(operand, Name) and operand.negated:
            return self.source(Name(operand.name), np.bool_), True
        return self.source(operand, np.bool_), False

    def guarded(self, step: Step, guard: tuple[int, bool]) -> Step:
        """`step` for the lanes whose predicate holds."""
        slot, negated = guard

        def run(w: "Warps") -> None:
            chosen = w.registers[slot]
            chosen = w.active & ~chosen if negated else w.active & chosen
            number = np.count_nonzero(chosen)
            if number == w.number:
                step(w)
            elif number:
                before = w.activity()
                w.activate(chosen)
                try:
                    step(w)
                finally:
                    w.restore(before)

        return run

    # The whole ------------------------------------------------------------------------------------

    def program(self) -> Program:
        code, labels = self.function.code, self.function.labels
        starts = {0, *labels.values()}
        accumulators = frozenset(
            name
            for each in code
            if each.opcode.startswith("wgmma.mma_async")
            for name in _registers_of(each.operands[:1])
        )
        compiled: list[Step | Control] = []
        for i, each in enumerate(code):
            handler, match = handler_of(each.opcode)
            try:
                compiled.append(handler(self, each, match))
            except NotModelled as error:
                raise NotModelled(f"{error}, in `{each.text}` at {each.location}") from None
            if isinstance(compiled[-1], Control):
                starts.add(i + 1)
        blocks: dict[int, Block] = {}
        ends = sorted(starts | {len(code)})
        for start, end in itertools.pairwise(ends):
            block = Block(start, next=end)
            for each, made in zip(code[start:end], compiled[start:end], strict=True):
                guard = None
                if each.guard:
                    guard = self.predicate(Name(each.guard))[0], each.guard_negated
                if accumulators and not isinstance(made, Control):
                    made = _watched(made, each, accumulators)
                if isinstance(made, Control):
                    block.control, block.instruction, block.guard = made, each, guard
                    block.targets = tuple(labels[label] for label in made.labels)
                else:
                    step = self.guarded(made, guard) if guard else made
                    block.steps.append((step, each))
            block.steps = batched(block.steps, self._lanewise, self.slots)
            blocks[start] = block
        return Program(
            self.function.name, blocks, self.parameters, self.shared, self.shared_size,
            self.shared_gaps, self.local_size, self.rows, self.slots, accumulators,
        )  # fmt: skip


def _registers_of(operands: tuple[Operand, ...]) -> Iterator[str]:
    """Names in operands, those of addresses too."""
    for operand in operands:
        match operand:
            case Name():
                yield operand.name
            case Address():
                yield from _registers_of((operand.base,))
            case Vector():
                yield from _registers_of(operand.items)
            case Pair():
                yield from (operand.first.name, operand.second.name)


def _watched(step: Step, ins: Instruction, accumulators: frozenset[str]) -> Step:
    """`step`, after a look at the accumulators that it uses."""
    names = tuple(name for name in _registers_of(ins.operands) if name in accumulators)
    if not names:
        return step
    stores = ins.opcode.split(".")[0] in ("st", "red")
    written = frozenset(() if stores else _registers_of(ins.operands[:1])) & accumulators

    def run(w: "Warps") -> None:
        w.products.touch(w, names, written)
        step(w)

    return run


def _layout(variables: list[Variable], gap: int) -> tuple[dict[str, int], int]:
    offsets, at = {}, 0
    for variable in variables:
        at = -(-at // variable.align) * variable.align
        offsets[variable.name] = at
        at += variable.size + gap
    return offsets, at


def _constant_registers(function: Function) -> dict[str, Immediate]:
    """Registers that are written to once, with a constant: nvcc moves many there."""
    writes: dict[str, int] = {}
    values: dict[str, Immediate] = {}
    for each in function.code:
        first = each.operands[0] if each.operands else None
        targets = (
            first.items if isinstance(first, Vector)
            else (first.first, first.second) if isinstance(first, Pair) else (first,)
        )  # fmt: skip
        for target in targets:
            if isinstance(target, Name):
                writes[target.name] = writes.get(target.name, 0) + 1
        if re.fullmatch(r"mov\.[busf](16|32|64)", each.opcode) and not each.guard:
            target, value = each.operands
            bits = int(each.opcode[-2:])
            if (
                isinstance(target, Name)
                and isinstance(value, Immediate)
                and value.float_bits in (0, bits)
            ):
                values[target.name] = value
    return {name: value for name, value in values.items() if writes[name] == 1}


# Inlining -----------------------------------------------------------------------------------------


def _inlined(module: Module, kernel: Function) -> Function:
    """`kernel` with the bodies of the functions that it calls in place of the calls."""
    result = Function(kernel.name, True, kernel.parameters)
    count = 0

    def add(function: Function, names: dict[str, str], suffix: str, stack: tuple[str, ...]) -> None:
        nonlocal count

        def rename(name: str) -> str:
            if name in names:
                return names[name]
            own = (
                name in function.registers
                or name in function.variables
                or name in function.labels
                or name in function.tables
            )
            return name + suffix if own else name

        for name, kind in function.registers.items():
            result.registers[name + suffix] = kind
        for name, variable in function.variables.items():
            result.variables[name + suffix] = replace(variable, name=name + suffix)
        for name, targets in function.tables.items():
            result.tables[name + suffix] = [t + suffix for t in targets]
        positions = {position: [] for position in function.labels.values()}  # type: dict[int, list[str]]
        for label, position in function.labels.items():
            positions[position].append(label)
        for i in range(len(function.code) + 1):
            for label in positions.get(i, ()):
                result.labels[label + suffix] = len(result.code)
            if i == len(function.code):
                break
            each = function.code[i]
            guard = rename(each.guard) if each.guard else None
            if each.call:
                results, callee, arguments = each.call
                if each.guard:
                    raise NotModelled(f"the guarded call `{each.text}`")
                body = module.functions.get(callee)
                if body is None and callee == "__assertfail":
                    result.code.append(replace(each, opcode="trap", call=None))
                    continue
                if body is None:
                    raise NotModelled(f"the call of {callee}, which has no body")
                if callee in stack:
                    raise NotModelled(f"the recursive function {callee}")
                count += 1
                inner = {
                    p.name: rename(a)
                    for p, a in zip(
                        [*body.results, *body.parameters], [*results, *arguments], strict=True
                    )
                }
                add(body, inner, f"#{count}", (*stack, callee))
                continue
            if each.opcode in ("ret", "ret.uni") and stack:
                end = f"return{suffix}"
                result.code.append(replace(each, opcode="bra", operands=(Name(end),), guard=guard))
                continue
            operands = tuple(_renamed(operand, rename) for operand in each.operands)
            result.code.append(replace(each, operands=operands, guard=guard))
        if stack:
            result.labels[f"return{suffix}"] = len(result.code)

    add(kernel, {}, "", ())
    return result


def _renamed(operand: Operand, rename: Callable[[str], str]) -> Operand:
    if isinstance(operand, Name):
        return replace(operand, name=rename(operand.name))
    if isinstance(operand, Address):
        if isinstance(operand.base, Name):
            return Address(replace(operand.base, name=rename(operand.base.name)), operand.offset)
        return operand
    if isinstance(operand, Vector):
        return Vector(tuple(_renamed(item, rename) for item in operand.items))
    if isinstance(operand, Pair):
        first, second = (replace(n, name=rename(n.name)) for n in (operand.first, operand.second))
        return Pair(first, second)
    return operand
