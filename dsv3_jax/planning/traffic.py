"""Count the collectives of a compiled program, how often they run, and the bytes that they send.

A collective in a loop counts once for each iteration, and nested loops multiply. A conditional counts as the branch
that sends most. Bytes on the wire are those that one device sends by the formulas of ring algorithms, for n devices in
a group:

    all-gather, all-to-all   (n-1)/n of the result       all-reduce           2 (n-1)/n of the result
    reduce-scatter           (n-1)/n of the operand      collective-permute   all of the result
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import numpy as np

from dsv3_jax.planning.hlo import CALLS, SAME_VALUE, Instruction, Module

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
    module = Module(text)
    return _Counter(module, dict(axes or {})).traffic(module.entry)


def _sums(pairs: Iterable[tuple]) -> dict:
    total: dict = {}
    for key, amount in pairs:
        total[key] = total.get(key, 0) + amount
    return total


class _Counter:
    """Counts the traffic of a module's computations, each once."""

    def __init__(self, module: Module, axes: dict[str, int]):
        self.module, self.axes = module, axes
        self._traffic: dict[str, Traffic] = {}

    def traffic(self, name: str) -> Traffic:
        """Return the traffic of a computation and of those that it calls."""
        if name not in self._traffic:
            collectives, unknown_loops = [], 0
            for instruction in self.module.computations[name]:
                part = self._instruction_traffic(name, instruction)
                collectives += part.collectives
                unknown_loops += part.unknown_loops
            self._traffic[name] = Traffic(collectives, unknown_loops)
        return self._traffic[name]

    def _instruction_traffic(self, computation: str, instruction: Instruction) -> Traffic:
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            return Traffic([self._collective(computation, instruction, kind)], 0)
        if instruction.opcode == "while":
            body, trips = self.traffic(instruction.called("body")[0]), self.module.trip_count(computation, instruction)
            known, trips = trips is not None, 1 if trips is None else trips
            collectives = [replace(c, runs=c.runs * trips, known=c.known and known) for c in body.collectives]
            return Traffic(collectives, body.unknown_loops + (not known and bool(collectives)))
        if instruction.opcode == "conditional":
            attributes = ("branch_computations", "true_computation", "false_computation")
            branches = (self.traffic(name) for attribute in attributes for name in instruction.called(attribute))
            return max(branches, key=lambda branch: branch.wire)
        if instruction.opcode in CALLS:
            return self.traffic((instruction.called("calls") or instruction.called("to_apply"))[0])
        return Traffic([], 0)

    def _collective(self, computation: str, instruction: Instruction, kind: str) -> Collective:
        arrays = instruction.arrays
        if instruction.opcode != kind and kind != "all-reduce":  # asynchronous: operands precede the results
            count = len(instruction.operands)
            arrays = arrays[count : 2 * count]
        nbytes, group = math.ceil(sum(a.nbytes for a in arrays)), self._group(instruction, kind)
        if kind == "all-reduce" and self._is_sliced(computation, instruction, len(group)):
            kind, nbytes = "reduce-scatter", nbytes // len(group)
        return Collective(kind, nbytes, tuple(group), self._axes_of(group), 1, True, instruction.source)

    def _is_sliced(self, computation: str, all_reduce: Instruction, n: int) -> bool:
        """Say whether an all-reduce's result is used only by a slice to one of n parts."""
        size, current = sum(a.size for a in all_reduce.arrays), all_reduce
        while True:
            users = self.module.users(computation).get(current.name, [])
            if len(users) != 1 or current.root:
                return False
            current = users[0]
            if current.opcode == "dynamic-slice":
                return n > 1 and sum(a.size for a in current.arrays) * n == size
            if current.opcode not in SAME_VALUE:
                return False

    def _group(self, instruction: Instruction, kind: str) -> list[int]:
        """Return the first group of devices of a collective."""
        if kind == "collective-permute":
            pair = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", instruction.rest)
            if not pair:
                return [0]
            return [int(pair[1]), int(pair[2])]
        return first_group(instruction.rest, self.module.num_devices)

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
