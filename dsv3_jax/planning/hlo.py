"""A compiled program as text (HLO): its computations, which call each other, and their loops."""

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

SAME_VALUE = ("bitcast", "copy", "reshape", "convert")  # operations that keep an array's numbers
# operations that run another computation once
CALLS = ("call", "fusion", "async-start", "call-start", "fusion-start")


def compile_with_hlo(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """Compile for the CPU; return the program, and its HLO right after partitioning by device.

    Another backend would start from that HLO. Later the CPU's compiler turns bfloat16 into float32,
    which doubles the bytes that collectives send. A program of one device is not partitioned: its
    HLO is the compiled program's.

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
            # aborts on bfloat16 sums of partly manual programs
            "xla_disable_hlo_passes": "all-reduce-promotion",
            "xla_backend_optimization_level": "0",  # of machine code, which nothing here reads
        }
        compiled = lowered.compile(options)
        dumps = sorted(Path(folder).glob("*.after_spmd-partitioning.*"))
        return compiled, dumps[-1].read_text() if dumps else compiled.as_text() or ""


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


class ResultArray(NamedTuple):
    """One array of an instruction's result."""

    dtype: str  # as HLO names it: bf16, f32, s32, pred
    dims: tuple[int, ...]
    layout: str  # "1,0:T(8,128)S(1)"

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> float:
        """Bytes of all elements; a token has none."""
        bits = 8 if self.dtype == "pred" else int((re.search(r"\d+", self.dtype) or ["0"])[0])
        return self.size * bits / 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes
    root: bool

    @cached_property
    def operands(self) -> list[str]:
        """Names of the operands; a constant's operand is its value, a parameter's its number."""
        depth = 1
        for match in re.finditer(r"[()]", self.rest):
            depth += 1 if match[0] == "(" else -1
            if depth == 0:
                return re.findall(r"(?:^|[ ,%])([\w.\-#]+)(?=,|$)", self.rest[: match.start()])
        return []

    @cached_property
    def arrays(self) -> list[ResultArray]:
        """The arrays of the result."""
        return [
            ResultArray(
                dtype, tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d), layout
            )
            for dtype, dims, layout in re.findall(
                r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?", self.shape
            )
        ]

    def called(self, *attributes: str) -> list[str]:
        """Return the computations that these attributes name: one each, or a list in braces."""
        found = re.findall(
            rf"\b(?:{'|'.join(attributes)})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.rest
        )
        return [name for several, one in found for name in re.findall(r"[\w.\-]+", several or one)]


class Module:
    """The computations of a program: instructions by name, which call each other.

    Raises: ValueError for text that is not HLO.
    """

    def __init__(self, program: jax.stages.Compiled | str):
        self.text = program if isinstance(program, str) else program.as_text() or ""
        self.computations: dict[str, dict[str, Instruction]] = {}
        devices = re.search(r"num_partitions=(\d+)", self.text)
        self.num_devices = int(devices[1]) if devices else 1

        # A computation's first line names it, and each further line is an instruction.
        self.entry = ""
        current = {}
        for line in self.text.split("\n"):
            if match := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$", line):
                current = self.computations[match[2]] = {}
                self.entry = match[2] if match[1] else self.entry
            elif match := re.match(r"\s+(ROOT )?%?([\w.\-#]+) = (.+?) ([a-z][\w\-]*)\((.*)$", line):
                root, name, shape, opcode, rest = match.groups()
                current[name] = Instruction(name, shape, opcode, rest, bool(root))

        if not self.entry:
            raise ValueError(
                f"program={self.text[:40]!r} is not HLO; give the text of a compiled program"
            )
        self._users_of: dict[str, dict[str, list[Instruction]]] = {}

    def operand(self, computation: str, instruction: Instruction, index: int) -> Instruction | None:
        """Return the instruction that makes an operand."""
        names = instruction.operands
        return self.computations[computation].get(names[index]) if index < len(names) else None

    def root(self, computation: str) -> Instruction:
        """Return the instruction that makes a computation's result."""
        instructions = list(self.computations[computation].values())
        return next((i for i in instructions if i.root), instructions[-1])

    def users(self, computation: str) -> dict[str, list[Instruction]]:
        """Return the instructions of a computation by the names of their operands."""
        if computation not in self._users_of:
            users = self._users_of[computation] = {}
            for instruction in self.computations[computation].values():
                for name in dict.fromkeys(instruction.operands):
                    users.setdefault(name, []).append(instruction)
        return self._users_of[computation]

    def trip_count(self, computation: str, loop: Instruction) -> int | None:
        """Return a loop's iterations: the compiler's, or from `i < constant`; None if unknown.

        JAX's loops of known length count in steps of 1, and from 0 unless the text says so.
        """
        if match := re.search(r'"?known_trip_count"?[:=]\{"?n"?:"?(\d+)', loop.rest):
            return int(match[1])

        # `counter < limit`, both of them arguments of the loop or constants.
        condition = loop.called("condition")[0]
        compare = self.root(condition)
        if compare.opcode != "compare" or "direction=LT" not in compare.rest:
            return None
        counter = self._first_value(computation, loop, condition, compare, 0)
        limit = self._first_value(computation, loop, condition, compare, 1)
        return None if limit is None else limit - (counter or 0)

    def _first_value(
        self, computation: str, loop: Instruction, condition: str, compare: Instruction, index: int
    ) -> int | None:
        """Return the first value of a loop condition's operand; None if it is not a constant."""
        value = self._source(condition, self.operand(condition, compare, index))
        where = condition

        # An argument of the loop: its value is what the loop began with.
        if value is not None and value.opcode == "get-tuple-element":
            place = re.search(r"\bindex=(\d+)", value.rest)
            init = self.operand(computation, loop, 0)
            if place is None or init is None or init.opcode != "tuple":
                return None
            if index == 1 and not self._is_kept(loop, place):
                return None
            value = self.operand(computation, init, int(place[1]))
            where = computation

        value = self._source(where, value)
        if value is None or value.opcode != "constant":
            return None
        return int(value.operands[0])

    def _is_kept(self, loop: Instruction, place: re.Match[str]) -> bool:
        """Say whether a loop's body hands on an argument, the limit, as it was."""
        body = loop.called("body")[0]
        kept = self._source(body, self.operand(body, self.root(body), int(place[1])))
        if kept is None or kept.opcode != "get-tuple-element":
            return False
        return re.search(rf"\b{place[0]}\b", kept.rest) is not None

    def _source(self, computation: str, value: Instruction | None) -> Instruction | None:
        """Return the instruction that made a value's numbers."""
        while value is not None and value.opcode in SAME_VALUE:
            value = self.operand(computation, value, 0)
        return value
