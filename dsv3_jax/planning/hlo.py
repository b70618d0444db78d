"""Read a compiled program (HLO): its collectives, how often they run, and the bytes they send.

A collective in a loop counts once for each iteration, and nested loops multiply. A conditional
counts as the branch that sends most. Bytes on the wire are those that one device sends by the
formulas of ring algorithms, for n devices in a group:

    all-gather, all-to-all   (n-1)/n of the result     all-reduce           2 (n-1)/n of the result
    reduce-scatter           (n-1)/n of the operand    collective-permute   all of the result
"""

import contextlib
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute",
)  # fmt: skip
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


@dataclass(frozen=True)
class Collective:
    """One collective of a program, as one device runs it.

    Example:
        >>> gather = Collective("all-gather", 800, (0, 1, 2, 3), ("data",), runs=2, known=True)
        >>> gather.wire  # 2 · 800 · 3/4
        1200.0
    """

    kind: str  # one of COLLECTIVES
    nbytes: int  # of its result
    devices: tuple[int, ...]  # positions in the mesh of the n devices in its first group
    axes: tuple[str, ...]  # mesh axes along which a group extends; empty without a mesh
    runs: int  # times that the program runs it
    known: bool  # False in a loop of unknown length, of which `runs` counts one iteration

    @property
    def wire(self) -> float:
        """Bytes that a device sends in all runs.

        A ragged all-to-all counts as full, since its load is data.
        """
        n = len(self.devices)
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1.0,
            "collective-permute": 1.0,
        }
        return self.nbytes * self.runs * share.get(self.kind, (n - 1) / n)


class Traffic(NamedTuple):
    """All collectives of a program.

    Example:
        >>> gather = Collective("all-gather", 800, (0, 1, 2, 3), ("data",), runs=2, known=True)
        >>> Traffic([gather], unknown_loops=0).by("axes")
        {('data',): 1200.0}
    """

    collectives: list[Collective]
    # loops of unknown length that contain collectives; each counts as one iteration
    unknown_loops: int

    def known(self) -> "Traffic":
        """Return the traffic outside loops of unknown length."""
        return Traffic([c for c in self.collectives if c.known], 0)

    @property
    def wire(self) -> float:
        """Bytes that a device sends."""
        return sum((c.wire for c in self.collectives), 0.0)

    def by(self, *names: str) -> dict[Any, float]:
        """Return the bytes that a device sends by fields of `Collective`, as "kind" or "axes"."""
        total: dict[Any, float] = defaultdict(float)
        for collective in self.collectives:
            total[attrgetter(*names)(collective)] += collective.wire
        return dict(total)


def traffic(program: jax.stages.Compiled | str, axes: Mapping[str, int] | None = None) -> Traffic:
    """Find the collectives of a compiled program.

    An all-reduce whose result is only sliced counts as a reduce-scatter. Compilers for GPU and TPU
    make one of it, and the CPU's compiler does not.

    Args:
        program: the result of `jax.jit(…).lower(…).compile()`, or HLO text after partitioning.
        axes: sizes of the mesh's axes in order, as `mesh.shape`.
    Raises: ValueError for text that is not HLO, or for groups of devices in an unknown form.

    Example:
        >>> import jax.numpy as jnp
        >>> traffic(jax.jit(jnp.sin).lower(jnp.zeros(4)).compile()).wire
        0.0
    """
    module = Module(program)
    return module.traffic(module.entry, dict(axes or {}))


class Shape(NamedTuple):
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
    def arrays(self) -> list[Shape]:
        """The arrays of the result."""
        return [
            Shape(dtype, tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d), layout)
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
        self.entry = ""
        current = {}
        for line in self.text.split("\n"):
            if match := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$", line):
                current = self.computations[match[2]] = {}
                self.entry = match[2] if match[1] else self.entry
            elif match := re.match(r"\s+(ROOT )?%?([\w.\-#]+) = (.+?) ([a-z][\w\-]*)\((.*)$", line):
                current[match[2]] = Instruction(
                    match[2], match[3], match[4], match[5], bool(match[1])
                )
        if not self.entry:
            raise ValueError(
                f"program={self.text[:40]!r} is not HLO; give the text of a compiled program"
            )
        self._users_of: dict[str, dict[str, list[Instruction]]] = {}
        self._traffic: dict[str, Traffic] = {}

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
        condition = loop.called("condition")[0]
        compare = self.root(condition)
        if compare.opcode != "compare" or "direction=LT" not in compare.rest:
            return None
        counter, limit = (
            self._first_value(computation, loop, condition, compare, i) for i in (0, 1)
        )
        return None if limit is None else limit - (counter or 0)

    def _first_value(
        self, computation: str, loop: Instruction, condition: str, compare: Instruction, index: int
    ) -> int | None:
        """Return the first value of a loop condition's operand; None if it is not a constant."""
        value = self._source(condition, self.operand(condition, compare, index))
        where = condition
        if value is not None and value.opcode == "get-tuple-element":  # what the loop began with
            place = re.search(r"\bindex=(\d+)", value.rest)
            init = self.operand(computation, loop, 0)
            if place is None or init is None or init.opcode != "tuple":
                return None
            if index == 1:  # the limit must stay the same
                body = loop.called("body")[0]
                kept = self._source(body, self.operand(body, self.root(body), int(place[1])))
                if (
                    kept is None
                    or kept.opcode != "get-tuple-element"
                    or not re.search(rf"\b{place[0]}\b", kept.rest)
                ):
                    return None
            value = self.operand(computation, init, int(place[1]))
            where = computation
        value = self._source(where, value)
        return int(value.operands[0]) if value is not None and value.opcode == "constant" else None

    def _source(self, computation: str, value: Instruction | None) -> Instruction | None:
        """Return the instruction that made a value's numbers."""
        while value is not None and value.opcode in SAME_VALUE:
            value = self.operand(computation, value, 0)
        return value

    def traffic(self, computation: str, axes: dict[str, int]) -> Traffic:
        """Return the traffic of a computation and of those it calls, on a mesh of these axes."""
        if computation not in self._traffic:
            parts = [
                self._part(computation, i, axes) for i in self.computations[computation].values()
            ]
            self._traffic[computation] = Traffic(
                [c for part in parts for c in part.collectives],
                sum(part.unknown_loops for part in parts),
            )
        return self._traffic[computation]

    def _part(self, computation: str, i: Instruction, axes: dict[str, int]) -> Traffic:
        if i.opcode.removesuffix("-start") in COLLECTIVES:
            return Traffic([self._collective(computation, i, axes)], 0)
        if i.opcode == "while":
            body = self.traffic(i.called("body")[0], axes)
            trips = self.trip_count(computation, i)
            known = trips is not None
            trips = 1 if trips is None else trips
            collectives = [
                replace(c, runs=c.runs * trips, known=c.known and known) for c in body.collectives
            ]
            return Traffic(collectives, body.unknown_loops + (not known and bool(collectives)))
        if i.opcode == "conditional":
            branches = i.called("branch_computations", "true_computation", "false_computation")
            return max(
                (self.traffic(name, axes) for name in branches), key=lambda branch: branch.wire
            )
        if i.opcode in CALLS:
            return self.traffic(i.called("calls", "to_apply")[0], axes)
        return Traffic([], 0)

    def _collective(self, computation: str, i: Instruction, axes: dict[str, int]) -> Collective:
        kind = i.opcode.removesuffix("-start")
        arrays = i.arrays
        if i.opcode != kind and kind != "all-reduce":  # asynchronous: operands precede the results
            arrays = arrays[len(i.operands) : 2 * len(i.operands)]
        group = first_group(i.rest, self.num_devices)
        nbytes = math.ceil(sum(a.nbytes for a in arrays))
        if kind == "all-reduce" and self._is_sliced(computation, i, len(group)):
            kind = "reduce-scatter"
            nbytes = nbytes // len(group)
        along: tuple[str, ...] = ()
        if axes:  # those along which the devices of the group differ
            places = np.unravel_index(np.array(group), tuple(axes.values()))
            along = tuple(
                axis
                for axis, place in zip(axes, places, strict=True)
                if len(set(place.tolist())) > 1
            )
        return Collective(kind, nbytes, tuple(group), along, 1, True)

    def _is_sliced(self, computation: str, all_reduce: Instruction, n: int) -> bool:
        """Say whether an all-reduce's result is used only by a slice to one of n parts."""
        size = sum(a.size for a in all_reduce.arrays)
        current = all_reduce
        while True:
            users = self.users(computation).get(current.name, [])
            if len(users) != 1 or current.root:
                return False
            current = users[0]
            if current.opcode == "dynamic-slice":
                return n > 1 and sum(a.size for a in current.arrays) * n == size
            if current.opcode not in SAME_VALUE:
                return False


def first_group(attributes: str, num_devices: int) -> list[int]:
    """Parse the first group of a collective's devices, in any of HLO's forms.

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
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", attributes):
        return [int(i) for i in match[1].split(",")]
    if "source_target_pairs={}" in attributes:
        return [0]
    if "replica_groups={}" in attributes or "replica_groups" not in attributes:
        return list(range(num_devices))
    iota = r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if match := re.search(iota, attributes):
        return _iota(match[2], match[3])[: int(match[1])].tolist()
    mesh = (
        r"replica_groups=mesh\[([^\]]*)\]"
        r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
    )
    if match := re.search(mesh, attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        shape = tuple(sizes.values())
        ids = _iota(match[2] or str(math.prod(shape)), match[3]).reshape(shape)
        axes = re.findall(r"'(\w+)'", match[4])
        return ids[tuple(slice(None) if name in axes else 0 for name in sizes)].reshape(-1).tolist()
    groups = attributes[attributes.index("replica_groups") :][:80]
    raise ValueError(f"{groups} has an unknown form of device groups")


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Evaluate `[2,4]T(1,0)`: numbers from 0 in that shape, with axes in that order, flattened."""
    shape = [int(i) for i in dims.split(",")]
    axes = [int(i) for i in order.split(",")] if order else list(range(len(shape)))
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes).reshape(-1)
