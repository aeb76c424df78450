# SPDX-License-Identifier: Apache-2.0
"""PTX text as nvcc writes it, to kernels, functions and variables.

Strict: a statement, directive or operand that no rule describes raises `NotModelled`. Registers and
variables declared in an inner scope get a name of their own (`%r1@3`), so that later passes need no
scopes.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ptx.faults import NotModelled

__all__ = [
    "Address",
    "Function",
    "Immediate",
    "Instruction",
    "Module",
    "Name",
    "Operand",
    "Pair",
    "Parameter",
    "Variable",
    "Vector",
    "parse",
]


@dataclass(frozen=True, slots=True)
class Name:
    """A register, special register, variable, label or function; `negated` for `!%p`."""

    name: str
    offset: int = 0
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Immediate:
    """A literal: an integer, or a float by its bits."""

    value: int
    float_bits: int = 0  # 32 or 64 for 0f... and 0d..., 0 for an integer


@dataclass(frozen=True, slots=True)
class Address:
    """`[base + offset]`."""

    base: "Name | Immediate"
    offset: int


@dataclass(frozen=True, slots=True)
class Vector:
    """`{a, b, ...}`."""

    items: tuple["Operand", ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """`a|b`, two destinations."""

    first: Name
    second: Name


Operand = Name | Immediate | Address | Vector | Pair


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; `text` and `location` are for reports."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: str | None
    guard_negated: bool
    text: str
    location: str
    # Of a call: where results go, the function, its arguments.
    call: tuple[tuple[str, ...], str, tuple[str, ...]] | None = None


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter or a variable in parameter space."""

    name: str
    size: int
    align: int


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable in shared, local, global or constant memory; of size 0 if dynamic."""

    name: str
    space: str
    size: int
    align: int
    data: bytes | None = None


@dataclass
class Function:
    """A kernel (`entry`) or a device function."""

    name: str
    entry: bool
    parameters: list[Parameter]
    results: list[Parameter] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)  # name: type
    variables: dict[str, Variable] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)  # of brx.idx
    threads: int = 1024  # that __launch_bounds__ allows in a block


@dataclass
class Module:
    """All that one PTX text holds."""

    target: str = ""
    functions: dict[str, Function] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


_SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "b32": 4, "u32": 4,
          "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}  # fmt: skip
_IDENTIFIER = r"[A-Za-z_$%][\w$]*"
_REGISTER_TYPES = {*_SIZES, "pred", "b128"}
_DIRECTIVES_OF_ENTRIES = re.compile(
    r"\s*(?:\.(?:maxntid|reqntid|minnctapersm|maxnctapersm|maxnreg|noreturn)\b[\s\d,]*)*\s*"
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr(?:\s+\.\w+)?(?:\s+\.align\s+\d+)?)?\s+"
    rf"({_IDENTIFIER})(?:\[(\d+)\])?"
)
_VARIABLE = re.compile(
    r"(?:\.(?:visible|weak|extern|common)\s+)*\.(global|const|shared|local)\s+"
    rf"(?:\.align\s+(\d+)\s+)?(\.v[24]\s+)?\.(\w+)\s+({_IDENTIFIER})\s*((?:\[\d*\])*)"
    r"(?:\s*=\s*(.*))?",
    re.DOTALL,
)
_GUARDED = re.compile(rf"(?:@(!?)({_IDENTIFIER})\s+)?([a-z][\w.:]*)(?:\s+(.*))?", re.DOTALL)
_CALL = re.compile(
    rf"(?:\(\s*([^()]*?)\s*\)\s*,\s*)?({_IDENTIFIER})(?:\s*,\s*\(\s*([^()]*?)\s*\))?", re.DOTALL
)
_ADDRESS = re.compile(rf"\[\s*({_IDENTIFIER}|\d+)\s*(?:\+\s*(-?\d+|0x[0-9a-fA-F]+)\s*)?\]")
_LOC = re.compile(
    rf"\.loc (\d+) (\d+) \d+(?:, function_name {_IDENTIFIER}(?: ?\+ ?\d+)?"
    r"(?:, inlined_at (\d+) (\d+) \d+)?)?"
)


def parse(text: str) -> Module:
    """A module from PTX text."""
    return _Parser(text).module


class _Parser:
    def __init__(self, text: str) -> None:
        text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
        text = re.sub(r"//[^\n]*", "", text)
        # Directives that end with their line get the semicolon of all others.
        text = re.sub(
            r"^([ \t]*\.(?:loc|file|version|target|address_size)\b[^\n]*)$",
            r"\1;",
            text,
            flags=re.MULTILINE,
        )
        self.text, self.at = text, 0
        files = re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, flags=re.MULTILINE)
        self.module = Module(files={number: path.rsplit("/", 1)[-1] for number, path in files})
        self.scopes = 0
        while self._skip_space():
            self._top_level()

    # Scanning -------------------------------------------------------------------------------------

    def _skip_space(self) -> bool:
        match = re.compile(r"\s*").match(self.text, self.at)
        assert match
        self.at = match.end()
        return self.at < len(self.text)

    def _until(self, stops: str) -> str:
        """The text up to one of `stops`, which becomes the next character."""
        match = re.compile(f"[^{re.escape(stops)}]*").match(self.text, self.at)
        assert match
        self.at = match.end()
        if self.at == len(self.text):
            raise NotModelled(f"PTX ends within `{match.group()[:80]}`")
        return match.group()

    def _statement(self) -> str:
        statement = self._until(";")
        self.at += 1
        return " ".join(statement.split())

    # Top level ------------------------------------------------------------------------------------

    def _top_level(self) -> None:
        rest = self.text[self.at : self.at + 200]
        if re.match(r"\.(?:version|address_size)\s", rest):
            self._statement()
        elif re.match(r"\.target\s", rest):
            self.module.target = self._statement().split()[1].rstrip(",")
        elif re.match(r"\.file\s", rest):
            self._statement()  # nvcc names files after their use: they were read before
        elif re.match(r"\.section\s+\.debug_\w+", rest):
            self._until("{")
            self._until("}")  # strings for debuggers: numbers only, no nesting
            self.at += 1
        elif re.match(r"(?:\.(?:visible|weak|extern)\s+)*\.(?:entry|func)\b", rest):
            self._function()
        elif re.match(r"(?:\.(?:visible|weak|extern|common)\s+)*\.(?:global|const|shared)\b", rest):
            variable = self._variable(self._statement())
            self.module.variables[variable.name] = variable
        else:
            raise NotModelled(f"`{' '.join(rest.split())[:100]}` at the top level of PTX")

    def _variable(self, statement: str) -> Variable:
        match = _VARIABLE.fullmatch(statement)
        if not match or match[4] not in _SIZES:
            raise NotModelled(f"the declaration `{statement[:120]}`")
        space, align, vector, kind, name, dimensions, initial = match.groups()
        item = _SIZES[kind] * (int(vector.strip()[2:]) if vector else 1)
        size = item
        for dimension in re.findall(r"\[(\d*)\]", dimensions):
            size *= int(dimension or 0)
        data = None
        if initial is not None:
            values = [_literal(v.strip()) for v in initial.strip("{} ").split(",") if v.strip()]
            width = _SIZES[kind]
            data = b"".join(
                (v.value & ((1 << 8 * width) - 1)).to_bytes(width, "little") for v in values
            ).ljust(size, b"\0")
        elif space in ("global", "const"):
            data = bytes(size)
        return Variable(name, space, size, int(align or item), data)

    def _parameters(self, text: str) -> list[Parameter]:
        parameters = []
        for part in (p.strip() for p in text.split(",")):
            if not part:
                continue
            match = _PARAMETER.fullmatch(part)
            if not match or match[2] not in _SIZES:
                raise NotModelled(f"the parameter `{part}`")
            item = _SIZES[match[2]]
            parameters.append(Parameter(match[3], item * int(match[4] or 1), int(match[1] or item)))
        return parameters

    def _function(self) -> None:
        header = self._until("{;")
        match = re.fullmatch(
            r"(?:\.(?:visible|weak|extern)\s+)*\.(entry|func)\s+(?:\(([^()]*)\)\s*)?"
            rf"({_IDENTIFIER})\s*(?:\(([^()]*)\))?(.*)",
            header,
            re.DOTALL,
        )
        if not match or not _DIRECTIVES_OF_ENTRIES.fullmatch(match[5]):
            raise NotModelled(f"the function header `{' '.join(header.split())[:120]}`")
        function = Function(
            name=match[3],
            entry=match[1] == "entry",
            parameters=self._parameters(match[4] or ""),
            results=self._parameters(match[2] or ""),
        )
        if bound := re.search(r"\.(?:maxntid|reqntid)\s+([\d,\s]+)", match[5]):
            function.threads = math.prod(int(size) for size in bound[1].split(","))
        if self.text[self.at] == ";":  # a prototype
            self.at += 1
            return
        self.at += 1
        self._body(function)
        self.module.functions[function.name] = function

    # Bodies ---------------------------------------------------------------------------------------

    def _body(self, function: Function) -> None:
        scopes: list[tuple[str, dict[str, str]]] = [("", {})]
        location = "?"
        label = re.compile(rf"({_IDENTIFIER})\s*:(?!:)\s*(\.branchtargets\s)?")
        while True:
            self._skip_space()
            if self.text[self.at] == "{":
                self.at += 1
                self.scopes += 1
                scopes.append((f"@{self.scopes}", {}))
                continue
            if self.text[self.at] == "}":
                self.at += 1
                scopes.pop()
                if not scopes:
                    return
                continue
            if self.text[self.at] == ";":
                self.at += 1
                continue
            match = label.match(self.text, self.at)
            if match and match[2]:
                self.at = match.end()
                targets = self._statement()
                function.tables[match[1]] = [t.strip() for t in targets.split(",")]
                continue
            if match:
                self.at = match.end()
                name = match[1]
                if scopes[-1][0] and not name.startswith("$L__"):  # of inline assembly
                    scopes[-1][1][name] = name + scopes[-1][0]
                function.labels[_resolve(name, scopes)] = len(function.code)
                continue
            statement = self._statement()
            if statement.startswith(".loc "):
                location = self._location(statement)
            elif statement.startswith("."):
                self._declaration(function, statement, scopes)
            else:
                function.code.append(_instruction(statement, location, scopes))

    def _location(self, statement: str) -> str:
        match = _LOC.fullmatch(statement)
        if not match:
            raise NotModelled(f"`{statement}`")
        file, line = match[1], match[2]
        where = f"{self.module.files.get(file, file)}:{line}"
        if match[3]:
            where += f" (inlined at {self.module.files.get(match[3], match[3])}:{match[4]})"
        return where

    def _declaration(
        self, function: Function, statement: str, scopes: list[tuple[str, dict[str, str]]]
    ) -> None:
        suffix, names = scopes[-1]
        if match := re.fullmatch(r"\.reg \.(\w+) (.+)", statement):
            if match[1] not in _REGISTER_TYPES:
                raise NotModelled(f"registers of type {match[1]}")
            for part in match[2].split(","):
                for name in _declared(part.strip()):
                    names[name] = name + suffix
                    function.registers[name + suffix] = match[1]
        elif statement.startswith((".shared ", ".local ")):
            variable = self._variable(statement)
            names[variable.name] = variable.name + suffix
            function.variables[variable.name + suffix] = Variable(
                variable.name + suffix, variable.space, variable.size, variable.align
            )
        elif match := _PARAMETER.fullmatch(statement):
            names[match[3]] = match[3] + suffix
            size = _SIZES[match[2]] * int(match[4] or 1)
            function.variables[match[3] + suffix] = Variable(
                match[3] + suffix, "param", size, int(match[1] or _SIZES[match[2]])
            )
        elif not re.fullmatch(r'\.pragma "(?:nounroll|used_bytes_mask \d+|enable_smem_spilling)"',
                              statement):  # fmt: skip
            raise NotModelled(f"the directive `{statement}`")


def _declared(part: str) -> Iterator[str]:
    match = re.fullmatch(rf"({_IDENTIFIER})(?:<(\d+)>)?", part)
    if not match:
        raise NotModelled(f"the registers `{part}`")
    if match[2] is None:
        yield match[1]
    else:
        yield from (f"{match[1]}{i}" for i in range(int(match[2])))


def _resolve(name: str, scopes: list[tuple[str, dict[str, str]]]) -> str:
    for _, names in reversed(scopes):
        if name in names:
            return names[name]
    return name


def _literal(text: str) -> Immediate:
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return Immediate(int(match[1], 16), 32)
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return Immediate(int(match[1], 16), 64)
    if match := re.fullmatch(r"(-?)(?:0[xX]([0-9a-fA-F]+)|(0[0-7]*|[1-9]\d*))U?", text):
        value = int(match[2], 16) if match[2] else int(match[3], 8 if match[3][0] == "0" else 10)
        return Immediate(-value if match[1] else value)
    if text == "WARP_SZ":
        return Immediate(32)
    raise NotModelled(f"the operand `{text}`")


def _split(text: str) -> Iterator[str]:
    """Operands: what commas outside of brackets separate."""
    depth, start = 0, 0
    for i, character in enumerate(text):
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    if text.strip():
        yield text[start:].strip()


def _operand(text: str, scopes: list[tuple[str, dict[str, str]]]) -> Operand:
    if match := re.fullmatch(rf"(!?)({_IDENTIFIER}(?:\.[xyz])?)(?:\s*\+\s*(\d+))?", text):
        if text == "WARP_SZ":
            return Immediate(32)
        return Name(_resolve(match[2], scopes), int(match[3] or 0), bool(match[1]))
    if match := _ADDRESS.fullmatch(text):
        base: Name | Immediate = (
            Immediate(int(match[1])) if match[1].isdigit() else Name(_resolve(match[1], scopes))
        )
        return Address(base, int(match[2] or "0", 0))
    if text.startswith("{") and text.endswith("}"):
        return Vector(tuple(_operand(part, scopes) for part in _split(text[1:-1])))
    if match := re.fullmatch(rf"({_IDENTIFIER})\s*\|\s*({_IDENTIFIER})", text):
        return Pair(Name(_resolve(match[1], scopes)), Name(_resolve(match[2], scopes)))
    return _literal(text)


def _instruction(
    statement: str, location: str, scopes: list[tuple[str, dict[str, str]]]
) -> Instruction:
    match = _GUARDED.fullmatch(statement)
    if not match:
        raise NotModelled(f"`{statement}`")
    negated, guard, opcode, rest = match.groups()
    guard = _resolve(guard, scopes) if guard else None
    if opcode in ("call", "call.uni"):
        called = _CALL.fullmatch(rest or "")
        if not called:
            raise NotModelled(f"the call `{statement}`")
        results, arguments = (
            tuple(_resolve(a.strip(), scopes) for a in (part or "").split(",") if a.strip())
            for part in (called[1], called[3])
        )
        call = (results, called[2], arguments)
        return Instruction(opcode, (), guard, bool(negated), statement, location, call)
    operands = tuple(_operand(part, scopes) for part in _split(rest or ""))
    return Instruction(opcode, operands, guard, bool(negated), statement, location)
