"""PTX text -> the instructions of one kernel (PTX ISA sections 4, "Syntax", 5, "State Spaces, Types, and Variables",
and 6, "Instruction Operands").

Names are resolved here: registers become slots of a register file, labels become positions, so that executing an
instruction looks nothing up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .errors import BadOperand

_WIDTHS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8}
_WIDTHS |= {f"{kind}{bits}": bits for kind in "busf" for bits in (16, 32, 64)}


@dataclass(frozen=True)
class Register:
    slot: int
    width: int  # bits; 1 for a predicate


@dataclass(frozen=True)
class Immediate:
    value: int | float


@dataclass(frozen=True)
class Name:
    """A special register, a variable or a parameter."""

    text: str


@dataclass(frozen=True)
class Vector:
    items: tuple


@dataclass(frozen=True)
class Address:
    """[base + offset], and of tensor copies the coordinates."""

    base: Register | Name | Immediate
    offset: int = 0
    coordinates: Vector | None = None


@dataclass(frozen=True)
class Both:
    """a|b: a value and a predicate, of shfl and elect."""

    value: Register
    predicate: Register


@dataclass(frozen=True)
class Negated:
    predicate: Register


@dataclass
class Instruction:
    opcode: str
    operands: list
    guard: tuple[Register, bool] | None  # the predicate, and the value at which the instruction runs
    line: int
    text: str
    parts: list[str] = field(init=False)  # the opcode at its dots
    target: int = -1  # of a branch
    targets: list[int] = field(default_factory=list)  # of an indexed branch

    def __post_init__(self):
        self.parts = self.opcode.split(".")


@dataclass
class Parameter:
    name: str
    type: str  # "u64", "f32", ...; "b8" of an aggregate
    bytes: int
    align: int


@dataclass
class Program:
    name: str
    parameters: list[Parameter]
    code: list[Instruction]
    threads: int | None  # of a block, where the kernel says so
    widths: list[int]  # of the registers
    shared: dict[str, tuple[int, int]]  # shared variables: (offset, bytes); bytes 0 for the launch's dynamic memory
    static_shared: int
    local: dict[str, int]  # offsets of a thread's local variables
    local_bytes: int


def parse(text: str, kernel: str | None = None) -> Program:
    """The kernel of that name, or the only one."""
    text = re.sub(r"/\*.*?\*/", "", re.sub(r"//[^\n]*", "", text), flags=re.S)
    entries = {m[1]: m.end() for m in re.finditer(r"\.visible\s+\.entry\s+([\w$]+)\s*", text)}
    if kernel is None and len(entries) == 1:
        kernel = next(iter(entries))
    if kernel not in entries:
        raise BadOperand(f"no kernel {kernel!r} among {sorted(entries)}")
    start = entries[kernel]
    close = text.index(")", start)
    body = text.index("{", close)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?", text[close:body])
    shared, static = _shared_variables(text[: entries[kernel]] + text[body:])
    parser = _Body(text, body + 1)
    parser.run()
    return Program(
        kernel,
        _parameters(text[start:close]),
        parser.code,
        int(threads[1]) if threads else None,
        parser.widths,
        shared,
        static,
        parser.local,
        parser.local_bytes,
    )


def _parameters(text: str) -> list[Parameter]:
    parameters = []
    for piece in re.findall(r"\.param\s+([^,)]+)", text):
        align, type_ = re.search(r"\.align\s+(\d+)\s+\.b8", piece), re.search(r"\.([busf]\d+)\b", piece)[1]
        name, count = re.search(r"([\w$]+)\s*(?:\[(\d+)\])?\s*$", piece).groups()
        size = _WIDTHS[type_] // 8 * int(count or 1)
        parameters.append(Parameter(name, type_, size, int(align[1]) if align else size))
    return parameters


def _shared_variables(text: str) -> tuple[dict[str, tuple[int, int]], int]:
    """Static variables one behind the other, then the dynamic ones (extern), which all begin at the same place."""
    found, end, dynamic = {}, 0, []
    for extern, align, type_, name, count in re.findall(
        r"(\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?", text
    ):
        if extern:
            dynamic.append(name)
            continue
        align = int(align or 4)
        end = -(-end // align) * align
        found[name] = (end, _WIDTHS[type_] // 8 * int(count or 1))
        end += found[name][1]
    end = -(-end // 1024) * 1024
    return found | {name: (end, 0) for name in dynamic}, end


class _Body:
    """The statements of a function from the first behind its brace;
    inner braces open a scope, as those of inline assembly.
    """

    def __init__(self, text: str, at: int):
        self.text, self.at = text, at
        self.code: list[Instruction] = []
        self.widths: list[int] = []
        self.local: dict[str, int] = {}
        self.local_bytes = 0
        self.scopes: list[dict[str, Register]] = [{}]
        self.path: tuple[int, ...] = ()
        self.opened = 0
        self.labels: dict[tuple[tuple[int, ...], str], int] = {}
        self.tables: dict[str, list[str]] = {}
        self.jumps: list[tuple[Instruction, tuple[int, ...], str]] = []

    def run(self) -> None:
        pattern = re.compile(
            r"\s*(?:(\{)|(\})|(\.(?:loc|file)\b[^\n]*)|([\w$]+)\s*:(?!:)|([^;{}]*(?:\{[^}]*\}[^;{}]*)*);)"
        )
        while True:
            m = pattern.match(self.text, self.at)
            if m is None:
                raise BadOperand(f"line {self._line()}: cannot read {self.text[self.at : self.at + 80]!r}")
            self.at = m.end()
            opening, closing, _, label, statement = m.groups()
            if opening:
                self.opened += 1
                self.path += (self.opened,)
                self.scopes.append({})
            elif closing:
                if not self.path:
                    break
                self.path = self.path[:-1]
                self.scopes.pop()
            elif label:
                self.labels[self.path, label] = len(self.code)
            elif statement:
                self._statement(statement.strip(), m.start(5))
        for instruction, path, label in self.jumps:
            if label in self.tables:
                instruction.targets = [self._position(path, name) for name in self.tables[label]]
            else:
                instruction.target = self._position(path, label)

    def _line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def _position(self, path: tuple[int, ...], label: str) -> int:
        for depth in range(len(path), -1, -1):
            if (path[:depth], label) in self.labels:
                return self.labels[path[:depth], label]
        raise BadOperand(f"no label {label!r}")

    def _statement(self, statement: str, start: int) -> None:
        if statement.startswith(".reg"):
            return self._registers(statement)
        if statement.startswith(".branchtargets"):
            label = re.search(r"([\w$]+)\s*:\s*$", self.text[:start])[1]
            self.tables[label] = [name.strip() for name in statement.split(None, 1)[1].split(",")]
            return None
        if statement.startswith(".local"):
            align = re.search(r"\.align\s+(\d+)", statement)
            name, count = re.search(r"([\w$]+)\s*\[(\d+)", statement).groups()
            step = int(align[1]) if align else 8
            self.local_bytes = -(-self.local_bytes // step) * step
            self.local[name] = self.local_bytes
            self.local_bytes += int(count)
        elif not statement.startswith("."):
            self._instruction(statement)
        return None

    def _registers(self, statement: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
        width = _WIDTHS[kind]
        for name in names.split(","):
            many = re.match(r"\s*([%\w$]+)<(\d+)>", name)
            each = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
            for register in each:
                self.scopes[-1][register] = Register(len(self.widths), width)
                self.widths.append(width)

    def _instruction(self, statement: str) -> None:
        m = re.match(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", statement, re.S)
        if m is None:
            raise BadOperand(f"line {self._line()}: cannot read {statement!r}")
        negated, guard, opcode, rest = m.groups()
        texts = _split(rest)
        instruction = Instruction(
            opcode,
            [],
            (self._operand(guard), not negated) if guard else None,
            self._line(),
            " ".join(statement.split()),
        )
        if opcode.startswith("bra"):
            self.jumps.append((instruction, self.path, texts[0]))
        elif opcode.startswith("brx"):
            instruction.operands = [self._operand(texts[0])]
            self.jumps.append((instruction, self.path, texts[1]))
        else:
            instruction.operands = [self._operand(text) for text in texts]
        self.code.append(instruction)

    def _operand(self, text: str):
        text = text.strip()
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if text.startswith("{"):
            return Vector(tuple(self._operand(item) for item in _split(text[1:-1])))
        if text.startswith("["):
            parts = _split(text[1:-1])
            coordinates = self._operand(parts[1]) if len(parts) > 1 else None
            base, _, offset = parts[0].partition("+")
            return Address(self._operand(base), int(offset or "0", 0), coordinates)
        if text.startswith("!"):
            return Negated(self._operand(text[1:]))
        if "|" in text:
            return Both(*(self._operand(part) for part in text.split("|")))
        if re.match(r"0[fF][0-9a-fA-F]{8}$", text) or re.match(r"0[dD][0-9a-fA-F]{16}$", text):
            return Immediate(int(text[2:], 16))
        if re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
            return Immediate(int(text.rstrip("U"), 0))
        if re.match(r"-?\d+\.\d*(e[+-]?\d+)?$", text):
            return Immediate(float(text))
        if text.startswith("%") and not re.match(
            r"%(n?(tid|ctaid)\.[xyz]|laneid|warpid|clock|cluster\w+|globaltimer\w*)", text
        ):
            raise BadOperand(f"line {self._line()}: register {text!r} is not declared")
        return Name(text)


def _split(text: str) -> list[str]:
    """At the commas outside braces and brackets."""
    pieces, depth, piece = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            pieces.append(piece.strip())
            piece = ""
        else:
            piece += character
    return [*pieces, piece.strip()] if piece.strip() else pieces
