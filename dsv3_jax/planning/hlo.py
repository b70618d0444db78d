"""Count the collectives of a compiled program, how often they run, and the bytes that they send.

Reads HLO text: `compiled.as_text()`, or text that the compiler dumped between its passes. A collective in a loop counts
once for each iteration, and nested loops multiply. A conditional counts as the branch that sends most. Bytes on the
wire are those that one device sends by the formulas of ring algorithms, for n devices in a group:

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

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One collective of a program, as one device runs it.

    Example:
        >>> gather = Collective("all-gather", 800, devices=(0, 1, 2, 3), axes=("data",), runs=2, known=True, source="")
        >>> gather.wire  # 2 · 800 · 3/4
        1200.0
    """

    kind: str  # one of COLLECTIVES
    nbytes: int  # of its result
    devices: tuple[int, ...]  # positions in the mesh of the n devices in its first group
    axes: tuple[str, ...]  # mesh axes along which a group extends; empty without a mesh
    runs: int  # times that the program runs it
    known: bool  # False in a loop of unknown length, of which `runs` counts one iteration
    source: str  # the operation of the model, as JAX names it

    @property
    def group(self) -> int:
        """n: the number of devices in a group."""
        return len(self.devices)

    @property
    def wire(self) -> float:
        """Bytes that a device sends in all runs. A ragged all-to-all counts as full, since its load is data."""
        n = self.group
        share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1.0, "collective-permute": 1.0}
        return self.nbytes * self.runs * share.get(self.kind, (n - 1) / n)


class Traffic(NamedTuple):
    """All collectives of a program.

    Example:
        >>> gather = Collective("all-gather", 800, devices=(0, 1, 2, 3), axes=("data",), runs=2, known=True, source="")
        >>> Traffic([gather], unknown_loops=0).by_axes()
        {('data',): 1200.0}
    """

    collectives: list[Collective]
    unknown_loops: int  # loops of unknown length that contain collectives; each counts as one iteration

    def known(self) -> "Traffic":
        """Return the traffic outside loops of unknown length."""
        return Traffic([c for c in self.collectives if c.known], 0)

    @property
    def wire(self) -> float:
        """Bytes that a device sends."""
        return sum((c.wire for c in self.collectives), 0.0)

    def by_kind(self) -> dict[str, float]:
        """Return the bytes that a device sends by each kind of collective."""
        return _sums((c.kind, c.wire) for c in self.collectives)

    def by_axes(self) -> dict[tuple[str, ...], float]:
        """Return the bytes that a device sends along each set of mesh axes."""
        return _sums((c.axes, c.wire) for c in self.collectives)


def traffic(program: jax.stages.Compiled | str, axes: Mapping[str, int] | None = None) -> Traffic:
    """Find the collectives of a compiled program.

    An all-reduce whose result is only sliced counts as a reduce-scatter. Compilers for GPU and TPU make one of it, and
    the CPU's compiler does not.

    Args:
        program: the result of `jax.jit(…).lower(…).compile()`, or HLO text after partitioning.
        axes: sizes of the mesh's axes in order, as `mesh.shape`.
    Raises: ValueError for text that is not HLO, or for groups of devices in an unknown form.

    Example:
        >>> import jax.numpy as jnp
        >>> traffic(jax.jit(jnp.sin).lower(jnp.zeros(4)).compile()).wire
        0.0
    """
    text = program if isinstance(program, str) else program.as_text() or ""
    module = _Module(text, dict(axes or {}))
    if module.entry is None:
        raise ValueError(f"program={text[:40]!r} is not HLO; give the text of a compiled program")
    return module.traffic(module.entry)


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


def _sums(pairs: Iterable[tuple]) -> dict:
    total: dict = {}
    for key, amount in pairs:
        total[key] = total.get(key, 0) + amount
    return total


_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-#]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_SAME_VALUE = ("bitcast", "copy", "reshape", "convert")  # operations that keep an array's numbers


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes
    root: bool

    @cached_property
    def operands(self) -> list[str]:
        """Names of the operands, up to the parenthesis that closes their list; a constant's operand is its value."""
        depth = 1
        for i, letter in enumerate(self.rest):
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                return re.findall(r"(?:^|[ ,%])([\w.\-#]+)(?=,|$)", self.rest[:i])
        return []

    @cached_property
    def arrays(self) -> list[tuple[int, float]]:
        """(size, bytes of a number) of each array of the result."""
        return [_array(*match) for match in _ARRAY.findall(self.shape)]

    def called(self, attribute: str) -> list[str]:
        """Return the names of the computations in an attribute: one, or a list in braces."""
        match = re.search(attribute + r"=(?:\{([^}]*)\}|%?([\w.\-]+))", self.rest)
        return re.findall(r"[\w.\-]+", match[1] or match[2]) if match else []


class _Module:
    """The computations of a program: lists of instructions that call each other."""

    def __init__(self, text: str, axes: dict[str, int]):
        self.axes = axes
        self.computations: dict[str, list[_Instruction]] = {}
        self.entry: str | None = None
        self._traffic: dict[str, Traffic] = {}
        self._users_of: dict[str, dict[str, list[_Instruction]]] = {}
        devices = re.search(r"num_partitions=(\d+)", text)
        self.num_devices = int(devices[1]) if devices else 1
        current: list[_Instruction] = []
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = self.computations[match[2]] = []
                if match[1]:
                    self.entry = match[2]
            elif match := _INSTRUCTION.match(line):
                current.append(_Instruction(match[2], match[3], match[4], match[5], bool(match[1])))

    def traffic(self, name: str) -> Traffic:
        """Return the traffic of a computation and of those that it calls."""
        if name not in self._traffic:
            collectives, unknown_loops = [], 0
            for instruction in self.computations[name]:
                part = self._instruction_traffic(name, instruction)
                collectives += part.collectives
                unknown_loops += part.unknown_loops
            self._traffic[name] = Traffic(collectives, unknown_loops)
        return self._traffic[name]

    def _instruction_traffic(self, computation: str, instruction: _Instruction) -> Traffic:
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            return Traffic([self._collective(computation, instruction, kind)], 0)
        if instruction.opcode == "while":
            body, trips = self.traffic(instruction.called("body")[0]), self._trip_count(instruction)
            known, trips = trips is not None, 1 if trips is None else trips
            collectives = [replace(c, runs=c.runs * trips, known=c.known and known) for c in body.collectives]
            return Traffic(collectives, body.unknown_loops + (not known and bool(collectives)))
        if instruction.opcode == "conditional":
            attributes = ("branch_computations", "true_computation", "false_computation")
            branches = (self.traffic(name) for attribute in attributes for name in instruction.called(attribute))
            return max(branches, key=lambda branch: branch.wire)
        if instruction.opcode in ("call", "fusion", "async-start"):
            return self.traffic((instruction.called("calls") or instruction.called("to_apply"))[0])
        return Traffic([], 0)

    def _trip_count(self, loop: _Instruction) -> int | None:
        """Return a loop's number of iterations: the compiler's, or that of a condition `i < constant`; None if unknown.

        JAX's loops of known length count from 0 in steps of 1.
        """
        if match := re.search(r'"?known_trip_count"?[:=]\{"?n"?:"?(\d+)', loop.rest):
            return int(match[1])
        condition = {i.name: i for i in self.computations[loop.called("condition")[0]]}
        root = next(i for i in condition.values() if i.root)
        if root.opcode != "compare" or "direction=LT" not in root.rest:
            return None
        limit = condition.get(root.operands[1])
        while limit is not None and limit.opcode in _SAME_VALUE:
            limit = condition.get(limit.operands[0])
        return int(limit.operands[0]) if limit is not None and limit.opcode == "constant" else None

    def _collective(self, computation: str, instruction: _Instruction, kind: str) -> Collective:
        arrays = instruction.arrays
        if instruction.opcode != kind and kind != "all-reduce":  # asynchronous: operands precede the results
            count = len(instruction.operands)
            arrays = arrays[count : 2 * count]
        nbytes, group = math.ceil(sum(size * width for size, width in arrays)), self._group(instruction, kind)
        if kind == "all-reduce" and self._is_sliced(computation, instruction, len(group)):
            kind, nbytes = "reduce-scatter", nbytes // len(group)
        source = re.search(r'op_name="([^"]*)"', instruction.rest)
        return Collective(kind, nbytes, tuple(group), self._axes_of(group), 1, True, source[1] if source else "")

    def _is_sliced(self, computation: str, all_reduce: _Instruction, n: int) -> bool:
        """Say whether an all-reduce's result is used only by a slice to one of n parts."""
        size, current = sum(size for size, _ in all_reduce.arrays), all_reduce
        while True:
            users = self._users(computation).get(current.name, [])
            if len(users) != 1 or current.root:
                return False
            current = users[0]
            if current.opcode == "dynamic-slice":
                return n > 1 and sum(size for size, _ in current.arrays) * n == size
            if current.opcode not in _SAME_VALUE:
                return False

    def _users(self, computation: str) -> dict[str, list[_Instruction]]:
        """Return the instructions of a computation by the names of their operands."""
        if computation not in self._users_of:
            users = self._users_of[computation] = {}
            for instruction in self.computations[computation]:
                for name in set(instruction.operands):
                    users.setdefault(name, []).append(instruction)
        return self._users_of[computation]

    def _group(self, instruction: _Instruction, kind: str) -> list[int]:
        """Return the first group of devices of a collective."""
        if kind == "collective-permute":
            pair = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", instruction.rest)
            if not pair:
                return [0]
            return [int(pair[1]), int(pair[2])]
        return first_group(instruction.rest, self.num_devices)

    def _axes_of(self, group: list[int]) -> tuple[str, ...]:
        """Return the mesh axes along which the devices of a group differ."""
        if not self.axes:
            return ()
        indices = np.unravel_index(np.array(group), tuple(self.axes.values()))
        return tuple(axis for axis, index in zip(self.axes, indices, strict=True) if len(set(index.tolist())) > 1)


def first_group(attributes: str, num_devices: int) -> list[int]:
    """Parse the first group of an instruction's `replica_groups`, in any of HLO's forms.

    Raises: ValueError for an unknown form.

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
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return [int(i) for i in match[1].split(",")]
    if re.search(r"replica_groups=\{\}", attributes) or "replica_groups" not in attributes:
        return list(range(num_devices))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return _iota(match[2], match[3])[: int(match[1])].tolist()
    mesh = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
    if match := re.search(mesh, attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        ids = _iota(match[2] or str(math.prod(sizes.values())), match[3]).reshape(tuple(sizes.values()))
        axes = re.findall(r"'(\w+)'", match[4])
        return ids[tuple(slice(None) if name in axes else 0 for name in sizes)].reshape(-1).tolist()
    groups = attributes[attributes.index("replica_groups") :][:80]
    raise ValueError(f"{groups} has an unknown form of device groups")


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Evaluate `[2,4]T(1,0)`: numbers from 0 in that shape, with axes in that order, flattened."""
    shape = [int(i) for i in dims.split(",")]
    axes = [int(i) for i in order.split(",")] if order else list(range(len(shape)))
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes).reshape(-1)


def _array(dtype: str, dims: str) -> tuple[int, float]:
    """Return (size, bytes of a number) of an array such as `bf16[4,8]`; tokens have 0 bytes."""
    bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or ["0"])[0])
    return math.prod(int(d.removeprefix("<=")) for d in dims.split(",") if d), bits / 8
