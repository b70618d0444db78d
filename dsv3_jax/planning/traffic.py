"""The collectives of a compiled program: how often they run, and the bytes that they send.

A collective in a loop counts once for each iteration, and nested loops multiply. A conditional
counts as the branch that sends most. Bytes on the wire are those that one device sends by the
formulas of ring algorithms, for n devices in a group:

    all-gather, all-to-all   (n-1)/n of the result     all-reduce           2 (n-1)/n of the result
    reduce-scatter           (n-1)/n of the operand    collective-permute   all of the result
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax.planning.hlo import CALLS, SAME_VALUE, Instruction, Module

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute",
)  # fmt: skip


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
    return _Counter(module, dict(axes or {})).traffic(module.entry)


class _Counter:
    """Adds up the traffic of a module's computations, of each once."""

    def __init__(self, module: Module, axes: dict[str, int]):
        self._module = module
        self._axes = axes
        self._known: dict[str, Traffic] = {}

    def traffic(self, computation: str) -> Traffic:
        """Return the traffic of a computation and of those it calls."""
        if computation not in self._known:
            instructions = self._module.computations[computation].values()
            parts = [self._part(computation, i) for i in instructions]
            collectives = [c for part in parts for c in part.collectives]
            unknown = sum(part.unknown_loops for part in parts)
            self._known[computation] = Traffic(collectives, unknown)
        return self._known[computation]

    def _part(self, computation: str, i: Instruction) -> Traffic:
        """Return the traffic of an instruction."""
        if i.opcode.removesuffix("-start") in COLLECTIVES:
            return Traffic([self._collective(computation, i)], 0)
        if i.opcode == "while":
            return self._loop(computation, i)
        if i.opcode == "conditional":
            branches = i.called("branch_computations", "true_computation", "false_computation")
            return max(map(self.traffic, branches), key=lambda branch: branch.wire)
        if i.opcode in CALLS:
            return self.traffic(i.called("calls", "to_apply")[0])
        return Traffic([], 0)

    def _loop(self, computation: str, loop: Instruction) -> Traffic:
        """Return the traffic of all iterations; of one, if their number is unknown."""
        body = self.traffic(loop.called("body")[0])

        # Nested loops multiply: the body's collectives have the runs of the loops inside.
        trips = self._module.trip_count(computation, loop)
        known = trips is not None
        trips = 1 if trips is None else trips
        collectives = [
            replace(c, runs=c.runs * trips, known=c.known and known) for c in body.collectives
        ]
        return Traffic(collectives, body.unknown_loops + (not known and bool(collectives)))

    def _collective(self, computation: str, i: Instruction) -> Collective:
        # An asynchronous one also returns its operands, before the results.
        kind = i.opcode.removesuffix("-start")
        arrays = i.arrays
        if i.opcode != kind and kind != "all-reduce":
            arrays = arrays[len(i.operands) : 2 * len(i.operands)]
        nbytes = math.ceil(sum(a.nbytes for a in arrays))

        group = first_group(i.rest, self._module.num_devices)
        if kind == "all-reduce" and _is_sliced(self._module, computation, i, len(group)):
            kind = "reduce-scatter"
            nbytes = nbytes // len(group)
        return Collective(kind, nbytes, tuple(group), self._along(group), runs=1, known=True)

    def _along(self, group: list[int]) -> tuple[str, ...]:
        """Return the mesh axes along which the devices of a group differ."""
        if not self._axes:
            return ()
        # A device's number in the mesh, as its place along each axis.
        places = np.unravel_index(np.array(group), tuple(self._axes.values()))
        return tuple(
            axis
            for axis, place in zip(self._axes, places, strict=True)
            if len(set(place.tolist())) > 1
        )


def _is_sliced(module: Module, computation: str, all_reduce: Instruction, n: int) -> bool:
    """Say whether an all-reduce's result is used only by a slice to one of n parts."""
    size = sum(a.size for a in all_reduce.arrays)
    current = all_reduce
    while True:
        # Follow the result through copies and reshapes, as long as nobody else reads it.
        users = module.users(computation).get(current.name, [])
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
        >>> first_group("source_target_pairs={{0,0},{1,2},{2,1},{3,3}}", 4)
        [1, 2]
    """
    # Pairs of a sender and a receiver, which may be one device: then nothing is sent.
    if match := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        pairs = [[int(i) for i in pair.split(",")] for pair in re.findall(r"\d+,\d+", match[1])]
        return next((pair for pair in pairs if pair[0] != pair[1]), [0])

    # All groups listed; or all devices in one.
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return [int(i) for i in match[1].split(",")]
    if "replica_groups={}" in attributes or "replica_groups" not in attributes:
        return list(range(num_devices))

    # Device numbers in a shape whose axes are permuted, then cut into groups.
    iota = r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if match := re.search(iota, attributes):
        return _iota(match[2], match[3])[: int(match[1])].tolist()

    # Axes of a mesh by name; along the others a group has place 0.
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
