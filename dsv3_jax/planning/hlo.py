"""What a compiled program of many devices says of itself: which collectives it runs, how often, and what they send.

Reads HLO text: `compiled.as_text()`, or what the compiler wrote down on its way there. A collective inside a loop
counts as often as the loop turns, loops within loops multiply, and of a conditional's branches the one that sends most
counts. Bytes on the wire are those that one device sends, by the formulas of ring algorithms, n devices in a group:

    all-gather, all-to-all   (n-1)/n of the result       all-reduce           2 (n-1)/n of the result
    reduce-scatter           (n-1)/n of the operand      collective-permute   all of the result
"""

import contextlib
import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One collective of a program, as one device sees it."""

    kind: str  # one of KINDS
    nbytes: int  # of its result
    devices: tuple[int, ...]  # n places in the mesh that take part with one another: the first such group
    axes: tuple[str, ...]  # of the mesh, along which they lie; none where no mesh was given
    runs: int  # times that the program runs it
    known: bool  # False in a loop that does not say how often it turns: `runs` is then for one turn
    source: str  # where in the model it comes from, as JAX names it

    @property
    def group(self) -> int:
        """n: how many devices take part with one another."""
        return len(self.devices)

    @property
    def wire(self) -> float:
        """Bytes that a device sends over all runs. A ragged all-to-all is taken as full: what it sends is data."""
        n = self.group
        share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1.0, "collective-permute": 1.0}
        return self.nbytes * self.runs * share.get(self.kind, (n - 1) / n)


class Traffic(NamedTuple):
    """All that a program sends."""

    collectives: list[Collective]
    unbounded: int  # loops with collectives inside that do not say how often they turn: counted as one turn

    def known(self) -> "Traffic":
        """Without what is in loops that do not say how often they turn."""
        return Traffic([c for c in self.collectives if c.known], 0)

    @property
    def wire(self) -> float:
        """Bytes that a device sends."""
        return sum((c.wire for c in self.collectives), 0.0)

    def by_kind(self) -> dict[str, float]:
        """Bytes that a device sends by each kind of collective."""
        return _sums((c.kind, c.wire) for c in self.collectives)

    def by_axes(self) -> dict[tuple[str, ...], float]:
        """Bytes that a device sends along each set of mesh axes."""
        return _sums((c.axes, c.wire) for c in self.collectives)


def traffic(program: jax.stages.Compiled | str, axes: Mapping[str, int] | None = None) -> Traffic:
    """The collectives of a compiled program.

    An all-reduce whose result is only sliced counts as the reduce-scatter that compilers for GPU and TPU make of it;
    the CPU's leaves it as it is.

    Args:
        program: what `jax.jit(…).lower(…).compile()` returns, or HLO text after partitioning.
        axes: the sizes of the mesh's axes, as `mesh.shape` has them, in order.
    Raises: ValueError for text that is not HLO, or groups of devices written in a way that is not known.
    """
    text = program if isinstance(program, str) else program.as_text() or ""
    module = _Module(text, dict(axes or {}))
    if module.entry is None:
        raise ValueError(f"{text[:40]!r} is not a program in HLO")
    return module.of(module.entry)


def compile_in_sight(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """Compile for the CPU, and the program's text as it stood right after it was cut into one device's part.

    That text is what another backend would start from: the CPU's compiler goes on to make float32 of bfloat16, and so
    to double what collectives send. A program of one device is not cut: its text is the compiled one's.
    """
    with tempfile.TemporaryDirectory() as folder, _without_cache():
        options: dict[str, str | bool] = {
            "xla_dump_to": folder,
            "xla_dump_hlo_as_text": True,
            "xla_dump_hlo_pass_re": "spmd-partitioning",
            "xla_disable_hlo_passes": "all-reduce-promotion",  # aborts on bfloat16 sums of part-manual programs
            "xla_backend_optimization_level": "0",  # of machine code, which is not what is looked at
        }
        compiled = lowered.compile(options)
        cut = sorted(Path(folder).glob("*.after_spmd-partitioning.*"))
        return compiled, cut[-1].read_text() if cut else compiled.as_text() or ""


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Compile anew: what comes from a cache of programs writes nothing down."""

    def enable(value: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", value)
        compilation_cache.reset_cache()  # it has looked at the setting once, and would not again

    before = jax.config.values["jax_enable_compilation_cache"]
    enable(False)
    try:
        yield
    finally:
        enable(before)


def _sums(pairs: Iterable[tuple]) -> dict:
    total: dict = {}
    for key, amount in pairs:
        total[key] = total.get(key, 0) + amount
    return total


_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-#]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_PASSED_ON = ("bitcast", "copy", "reshape", "convert")


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes
    root: bool

    @cached_property
    def operands(self) -> list[str]:
        """Names: what stands before the parenthesis that closes the list. A constant's is its value."""
        depth = 1
        for i, letter in enumerate(self.rest):
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                return re.findall(r"(?:^|[ ,%])([\w.\-#]+)(?=,|$)", self.rest[:i])
        return []

    @cached_property
    def arrays(self) -> list[tuple[int, float]]:
        """(numbers, bytes of one) of each array of the result."""
        return [_array(*found) for found in _ARRAY.findall(self.shape)]

    def called(self, attribute: str) -> list[str]:
        """Names of the computations that an attribute holds: one, or a list in braces."""
        found = re.search(attribute + r"=(?:\{([^}]*)\}|%?([\w.\-]+))", self.rest)
        return re.findall(r"[\w.\-]+", found[1] or found[2]) if found else []


class _Module:
    """A program's computations: lists of instructions that call one another."""

    def __init__(self, text: str, axes: dict[str, int]):
        self.axes = axes
        self.computations: dict[str, list[_Instruction]] = {}
        self.entry: str | None = None
        self.found: dict[str, Traffic] = {}
        self.users: dict[str, dict[str, list[_Instruction]]] = {}
        devices = re.search(r"num_partitions=(\d+)", text)
        self.num_devices = int(devices[1]) if devices else 1
        current: list[_Instruction] = []
        for line in text.splitlines():
            if opens := _COMPUTATION.match(line):
                current = self.computations[opens[2]] = []
                if opens[1]:
                    self.entry = opens[2]
            elif found := _INSTRUCTION.match(line):
                current.append(_Instruction(found[2], found[3], found[4], found[5], bool(found[1])))

    def of(self, name: str) -> Traffic:
        """What a computation runs, and those that it calls."""
        if name not in self.found:
            collectives, unbounded = [], 0
            for instruction in self.computations[name]:
                part = self._of_instruction(name, instruction)
                collectives += part.collectives
                unbounded += part.unbounded
            self.found[name] = Traffic(collectives, unbounded)
        return self.found[name]

    def _of_instruction(self, computation: str, own: _Instruction) -> Traffic:
        kind = own.opcode.removesuffix("-start")
        if kind in KINDS:
            return Traffic([self._collective(computation, own, kind)], 0)
        if own.opcode == "while":
            body, turns = self.of(own.called("body")[0]), self._turns(own)
            known, turns = turns is not None, 1 if turns is None else turns
            times = [replace(c, runs=c.runs * turns, known=c.known and known) for c in body.collectives]
            return Traffic(times, body.unbounded + (not known and bool(times)))
        if own.opcode == "conditional":
            spellings = ("branch_computations", "true_computation", "false_computation")
            branches = (self.of(name) for spelling in spellings for name in own.called(spelling))
            return max(branches, key=lambda branch: branch.wire)
        if own.opcode in ("call", "fusion", "async-start"):
            return self.of((own.called("calls") or own.called("to_apply"))[0])
        return Traffic([], 0)

    def _turns(self, loop: _Instruction) -> int | None:
        """How often a loop turns: as the compiler says, or as its condition does, where that is `i < constant`.

        JAX's loops of a known length count from 0 in steps of 1.
        """
        if told := re.search(r'"?known_trip_count"?[:=]\{"?n"?:"?(\d+)', loop.rest):
            return int(told[1])
        condition = {i.name: i for i in self.computations[loop.called("condition")[0]]}
        root = next(i for i in condition.values() if i.root)
        if root.opcode != "compare" or "direction=LT" not in root.rest:
            return None
        limit = condition.get(root.operands[1])
        while limit is not None and limit.opcode in _PASSED_ON:
            limit = condition.get(limit.operands[0])
        return int(limit.operands[0]) if limit is not None and limit.opcode == "constant" else None

    def _collective(self, computation: str, own: _Instruction, kind: str) -> Collective:
        arrays = own.arrays
        if own.opcode != kind and kind != "all-reduce":  # begun, not done: operands stand before the results
            count = len(own.operands)
            arrays = arrays[count : 2 * count]
        nbytes, group = math.ceil(sum(size * width for size, width in arrays)), self._group(own, kind)
        if kind == "all-reduce" and self._is_sliced(computation, own, len(group)):
            kind, nbytes = "reduce-scatter", nbytes // len(group)
        source = re.search(r'op_name="([^"]*)"', own.rest)
        return Collective(kind, nbytes, tuple(group), self._axes_of(group), 1, True, source[1] if source else "")

    def _is_sliced(self, computation: str, own: _Instruction, n: int) -> bool:
        """Whether all that becomes of an all-reduce's result is a slice to one of n parts."""
        size, at = sum(size for size, _ in own.arrays), own
        while True:
            users = self._users(computation).get(at.name, [])
            if len(users) != 1 or at.root:
                return False
            at = users[0]
            if at.opcode == "dynamic-slice":
                return n > 1 and sum(size for size, _ in at.arrays) * n == size
            if at.opcode not in _PASSED_ON:
                return False

    def _users(self, computation: str) -> dict[str, list[_Instruction]]:
        if computation not in self.users:
            index = self.users[computation] = {}
            for instruction in self.computations[computation]:
                for name in set(instruction.operands):
                    index.setdefault(name, []).append(instruction)
        return self.users[computation]

    def _group(self, own: _Instruction, kind: str) -> list[int]:
        """The first group of devices that take part with one another."""
        if kind == "collective-permute":
            pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", own.rest)
            if not pairs:
                return [0]
            return [int(pairs[1]), int(pairs[2])]
        return first_group(own.rest, self.num_devices)

    def _axes_of(self, group: list[int]) -> tuple[str, ...]:
        if not self.axes:
            return ()
        places = np.unravel_index(np.array(group), tuple(self.axes.values()))
        return tuple(axis for axis, place in zip(self.axes, places, strict=True) if len(set(place.tolist())) > 1)


def first_group(attributes: str, num_devices: int) -> list[int]:
    """The first of an instruction's `replica_groups`, in any of the ways that they are written.

    Example:
        >>> first_group("replica_groups={{0,2},{1,3}}", 4)
        [0, 2]
        >>> first_group("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
        [0, 2]
        >>> first_group("replica_groups=mesh['data'=2,'expert'=2] {'data'}", 4)
        [0, 2]
        >>> first_group("replica_groups={}", 4)
        [0, 1, 2, 3]
    """
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return [int(i) for i in found[1].split(",")]
    if re.search(r"replica_groups=\{\}", attributes) or "replica_groups" not in attributes:
        return list(range(num_devices))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return _counted(found[2], found[3])[: int(found[1])].tolist()
    mesh = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
    if found := re.search(mesh, attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        ids = _counted(found[2] or str(math.prod(sizes.values())), found[3]).reshape(tuple(sizes.values()))
        taken = re.findall(r"'(\w+)'", found[4])
        return ids[tuple(slice(None) if name in taken else 0 for name in sizes)].reshape(-1).tolist()
    spelled = attributes[attributes.index("replica_groups") :][:80]
    raise ValueError(f"groups of devices are written in a way that is not known: {spelled}")


def _counted(dims: str, order: str | None) -> np.ndarray:
    """`[2,4]T(1,0)`: numbers from 0 in that shape, its axes put in that order, as a list."""
    shape = [int(i) for i in dims.split(",")]
    axes = [int(i) for i in order.split(",")] if order else list(range(len(shape)))
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes).reshape(-1)


def _array(dtype: str, dims: str) -> tuple[int, float]:
    """Of `bf16[4,8]`: how many numbers, and the bytes of one; 0 of tokens and the like."""
    bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or ["0"])[0])
    return math.prod(int(d.removeprefix("<=")) for d in dims.split(",") if d), bits / 8
