"""Read the text of a compiled program: its computations, their instructions, and how often a loop runs.

The text is HLO: `compiled.as_text()`, or what the compiler dumped between its passes. `traffic.py` finds the
collectives in it, and `program.py` the work, the kernels and the copies.
"""

import contextlib
import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache


def compile_with_hlo(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """Compile for the CPU; return the program, and its HLO directly after partitioning into one device's part.

    Another backend would start from that HLO. Later the CPU's compiler turns bfloat16 into float32, which doubles the
    bytes that collectives send. A program of one device is not partitioned: its HLO is the compiled program's.

    Example:
        >>> import jax.numpy as jnp
        >>> compiled, text = compile_with_hlo(jax.jit(jnp.sin).lower(jnp.zeros(4)))
        >>> compiled(jnp.zeros(4)), "sine" in text
        (Array([0., 0., 0., 0.], dtype=float32), True)
    """
    with tempfile.TemporaryDirectory() as folder, _without_cache():
        options: dict[str, str | bool] = {
            "xla_dump_to": folder,
            "xla_dump_hlo_as_text": True,
            "xla_dump_hlo_pass_re": "spmd-partitioning",
            "xla_disable_hlo_passes": "all-reduce-promotion",  # aborts on bfloat16 sums of partly manual programs
            "xla_backend_optimization_level": "0",  # of machine code, which nothing here reads
        }
        compiled = lowered.compile(options)
        dumps = sorted(Path(folder).glob("*.after_spmd-partitioning.*"))
        return compiled, dumps[-1].read_text() if dumps else compiled.as_text() or ""


def compile_for_target(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """Compile for the devices of the program's mesh; return the program and its text."""
    compiled = lowered.compile()
    return compiled, compiled.as_text() or ""


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Disable the cache of compiled programs: a cached program dumps no HLO."""

    def enable(value: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", value)
        compilation_cache.reset_cache()  # it reads the setting only once

    before = jax.config.values["jax_enable_compilation_cache"]
    enable(False)
    try:
        yield
    finally:
        enable(before)


_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-#]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
SAME_VALUE = ("bitcast", "copy", "reshape", "convert")  # operations that keep an array's numbers
CALLS = ("call", "fusion", "async-start", "call-start", "fusion-start")  # operations that run another computation once


class Shape(NamedTuple):
    """One array of an instruction's result."""

    dtype: str  # as HLO names it: bf16, f32, s32, pred
    dims: tuple[int, ...]
    layout: str  # "1,0:T(8,128)S(1)"; memory space 1 of a tiled layout is a TPU's VMEM

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> float:
        """Bytes of all elements; those of a token are 0."""
        bits = 8 if self.dtype == "pred" else int((re.search(r"\d+", self.dtype) or ["0"])[0])
        return self.size * bits / 8

    @property
    def is_float(self) -> bool:
        """Say whether the elements are floating-point numbers."""
        return re.match(r"b?f\d", self.dtype) is not None

    @property
    def on_chip(self) -> bool:
        """Say whether the array is in a TPU's own memory, so that reading it needs no HBM."""
        return "T(" in self.layout and re.search(r"S\([1-9]", self.layout) is not None


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes
    root: bool

    @cached_property
    def _end(self) -> int:
        """Position of the parenthesis that closes the operands."""
        depth = 1
        for match in re.finditer(r"[()]", self.rest):
            depth += 1 if match[0] == "(" else -1
            if depth == 0:
                return match.start()
        return 0

    @cached_property
    def operands(self) -> list[str]:
        """Names of the operands; a constant's operand is its value, a parameter's its number."""
        return re.findall(r"(?:^|[ ,%])([\w.\-#]+)(?=,|$)", self.rest[: self._end])

    @cached_property
    def attributes(self) -> str:
        """Text of the attributes, without kernels' code."""
        return re.sub(r'("(?:body|module)\\?"?\s*[:=]\s*\\?")[^"]{200,}', r"\1", self.rest[self._end :])

    @cached_property
    def arrays(self) -> list[Shape]:
        """The arrays of the result."""
        return [
            Shape(dtype, tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d), layout)
            for dtype, dims, layout in _ARRAY.findall(self.shape)
        ]

    @cached_property
    def nbytes(self) -> float:
        """Bytes of the result."""
        return sum((a.nbytes for a in self.arrays), 0.0)

    @cached_property
    def source(self) -> str:
        """The operation of the model, as JAX names it: "jit(step)/while/body/dot_general"; "" if unknown."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""

    def called(self, attribute: str) -> list[str]:
        """Return the names of the computations in an attribute: one, or a list in braces."""
        match = re.search(r"\b" + attribute + r"=(?:\{([^}]*)\}|%?([\w.\-]+))", self.rest[self._end :])
        return re.findall(r"[\w.\-]+", match[1] or match[2]) if match else []

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """Return the numbers of an attribute such as `lhs_contracting_dims={1,2}`."""
        match = re.search(r"\b" + attribute + r"=\{([\d,]*)\}", self.rest[self._end :])
        return tuple(int(n) for n in match[1].split(",") if n) if match else ()


class Module:
    """The computations of a program: lists of instructions that call each other.

    Raises: ValueError for text that is not HLO.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        entry = None
        devices = re.search(r"num_partitions=(\d+)", text)
        self.num_devices = int(devices[1]) if devices else 1
        current: list[Instruction] = []
        lines = text.split("\n")
        for line in lines:
            if match := _COMPUTATION.match(line):
                current = self.computations[match[2]] = []
                if match[1]:
                    entry = match[2]
            elif match := _INSTRUCTION.match(line):
                current.append(Instruction(match[2], match[3], match[4], match[5], bool(match[1])))
        if entry is None:
            raise ValueError(f"program={text[:40]!r} is not HLO; give the text of a compiled program")
        self.entry = entry
        self._lines = lines
        self._by_name: dict[str, dict[str, Instruction]] = {}
        self._users_of: dict[str, dict[str, list[Instruction]]] = {}

    def find(self, computation: str, name: str) -> Instruction | None:
        """Return an instruction of a computation by its name."""
        if computation not in self._by_name:
            self._by_name[computation] = {i.name: i for i in self.computations[computation]}
        return self._by_name[computation].get(name)

    def operand(self, computation: str, instruction: Instruction, index: int) -> Instruction | None:
        """Return the instruction that makes an operand."""
        names = instruction.operands
        return self.find(computation, names[index]) if index < len(names) else None

    def root(self, computation: str) -> Instruction:
        """Return the instruction that makes a computation's result."""
        return next((i for i in self.computations[computation] if i.root), self.computations[computation][-1])

    def users(self, computation: str) -> dict[str, list[Instruction]]:
        """Return the instructions of a computation by the names of their operands."""
        if computation not in self._users_of:
            users = self._users_of[computation] = {}
            for instruction in self.computations[computation]:
                for name in dict.fromkeys(instruction.operands):
                    users.setdefault(name, []).append(instruction)
        return self._users_of[computation]

    def trip_count(self, computation: str, loop: Instruction) -> int | None:
        """Return a loop's number of iterations: the compiler's, or that of a condition `i < constant`; None if unknown.

        JAX's loops of known length count in steps of 1, and from 0 unless the text says so.
        """
        if match := re.search(r'"?known_trip_count"?[:=]\{"?n"?:"?(\d+)', loop.rest):
            return int(match[1])
        condition = loop.called("condition")[0]
        compare = self.root(condition)
        if compare.opcode != "compare" or "direction=LT" not in compare.rest:
            return None
        counter, limit = (self._known_value(computation, loop, condition, compare, i) for i in (0, 1))
        return None if limit is None else limit - (counter or 0)

    def _known_value(
        self, computation: str, loop: Instruction, condition: str, compare: Instruction, index: int
    ) -> int | None:
        """Return the first value of an operand of a loop's condition; None if it is not a constant."""
        value, where = self.operand(condition, compare, index), condition
        while value is not None and value.opcode != "constant":
            if value.opcode == "get-tuple-element" and where == condition:  # what the loop began with
                place = re.search(r"\bindex=(\d+)", value.rest)
                init = self.operand(computation, loop, 0)
                if place is None or init is None or init.opcode != "tuple":
                    return None
                if index == 1 and not self._is_kept(loop, int(place[1])):
                    return None
                value, where = self.operand(computation, init, int(place[1])), computation
            elif value.opcode in SAME_VALUE:
                value = self.operand(where, value, 0)
            else:
                return None
        return int(value.operands[0]) if value is not None else None

    def _is_kept(self, loop: Instruction, place: int) -> bool:
        """Say whether a loop's body returns an element of its tuple as it was."""
        body = loop.called("body")[0]
        kept = self.operand(body, self.root(body), place)
        while kept is not None and kept.opcode in SAME_VALUE:
            kept = self.operand(body, kept, 0)
        return (
            kept is not None and kept.opcode == "get-tuple-element" and f"index={place}" in re.split(r"[, ]", kept.rest)
        )

    @cached_property
    def _tables(self) -> dict[str, dict[int, str]]:
        """The tables before the first computation, by title: number → line."""
        tables: dict[str, dict[int, str]] = {}
        title = ""
        for line in self._lines:
            if _COMPUTATION.match(line):
                break
            if re.fullmatch(r"[A-Z]\w+", line):
                title = line
            elif match := re.match(r"(\d+) (.*)", line):
                tables.setdefault(title, {})[int(match[1])] = match[2]
        return tables

    def function(self, instruction: Instruction) -> str:
        """Return the name of the Python function that made an instruction; "" if unknown."""
        frame = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        tables = self._tables
        place = (
            re.search(r"file_location_id=(\d+)", tables.get("StackFrames", {}).get(int(frame[1]), ""))
            if frame
            else None
        )
        name = place and re.search(r"function_name_id=(\d+)", tables.get("FileLocations", {}).get(int(place[1]), ""))
        return tables.get("FunctionNames", {}).get(int(name[1]), "").strip('"') if name else ""
