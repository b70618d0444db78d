"""One run of a compiled program: its work, kernels and loops, read off its text.

python experiments/accel/program.py v2_lite --target gpu:h100:8 --mesh data=8 --only train

The options are those of `dsv3 plan`.
A launch is one instruction that the device runs by itself: a fusion, a kernel, a copy, a sort. One
in a loop counts for each iteration, nested loops multiply, and a conditional counts as its longest
branch. The text tells of each launch

    FLOPs    2 for each multiplication in its matrix products. Kernels that the compiler does not
             see into count by their own estimate, or by their operands if their name says grouped
             product or causal attention
    bytes    of operands and results in memory; a slice or a gather reads, and an update in place
             writes, its part alone
    cycles   the TPU compiler's estimate, which it has for most launches

so that a roofline time of the program is a sum over launches. Each adds the longer of FLOPs and
bytes at a device's rates, or its cycles where they are known. The start of a launch takes no time
there, and a GPU's cache holds nothing.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import jax

from dsv3_jax.cli import plan as command
from dsv3_jax.planning.devices import Accelerator
from dsv3_jax.planning.hlo import CALLS, Instruction, Module
from dsv3_jax.planning.plan import cost_lines, device_of, jobs_of, print_row
from dsv3_jax.report.units import format_bytes, format_count, format_seconds
from experiments.accel.launch_cost import FREE, LaunchCost, attributes, call_target, is_float

LAUNCHES_SHOWN = 5  # the longest
# Custom calls that run nothing.
_NO_KERNELS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding"}


@dataclass(frozen=True)
class Launch:
    """One instruction that the device runs by itself. Numbers come from one run."""

    name: str
    kind: str  # a kernel's name for custom calls, else HLO's: "fusion", "copy", "sort", …
    source: str  # the operation of the model, as JAX names it
    runs: int  # times that the program runs it
    known: bool  # False in a loop of unknown length, of which `runs` counts one iteration
    flops: float
    wide_flops: float  # of these, in float32 or more
    nbytes: float  # read and written in memory
    cycles: int  # the TPU compiler's estimate; 0 if it has none
    is_kernel: bool  # a custom call, alone or in a fusion: the compiler does not see into it
    is_estimated: bool  # its FLOPs are counted or estimated, not unknown

    def seconds(self, device: Accelerator, *, use_cycles: bool = True) -> tuple[float, float]:
        """Return the shortest time of a run: (by FLOPs, by bytes); cycles replace the longer."""
        narrow = (self.flops - self.wide_flops) / device.flops
        compute = narrow + self.wide_flops / device.float32_flops
        memory = self.nbytes / device.memory_bandwidth
        if self.cycles and device.clock and use_cycles:
            cycles = self.cycles / device.clock
            return (cycles, memory) if compute >= memory else (compute, cycles)
        return compute, memory


@dataclass(frozen=True)
class Program:
    """The launches of a program; see the file's docstring."""

    all_launches: tuple[Launch, ...]
    # loops of unknown length, by their operation in the model; each counts once
    unknown_loops: tuple[str, ...]

    @property
    def flops(self) -> float:
        """FLOPs of all matrix products and kernels."""
        return sum((launch.flops * launch.runs for launch in self.all_launches), 0.0)

    @property
    def launches(self) -> int:
        """Launches of one run."""
        return sum(launch.runs for launch in self.all_launches)

    @property
    def nbytes(self) -> float:
        """Bytes read and written in memory."""
        return sum((launch.nbytes * launch.runs for launch in self.all_launches), 0.0)

    def kernels(self, estimated: tuple[bool, ...] = (True, False)) -> Counter[str]:
        """Return how often each kernel runs that the compiler does not see into, by name."""
        total: Counter[str] = Counter()
        for launch in self.all_launches:
            if launch.is_kernel and launch.is_estimated in estimated:
                total[launch.kind] += launch.runs
        return total

    def unknown_work(self) -> Counter[str]:
        """Return the kernels among these whose FLOPs are not known, and count as 0."""
        return self.kernels(estimated=(False,))

    def roofline(self, device: Accelerator, *, use_cycles: bool = True) -> tuple[float, float]:
        """Return the least seconds of launches bound by computing, and of those bound by memory.

        Launches run one after the other, so the time of the program is the sum of the two.

        Args: use_cycles: False counts FLOPs and bytes alone, as if a TPU moved and converted
            numbers at full rate.
        """
        total = [0.0, 0.0]
        for launch in self.all_launches:
            compute, memory = launch.seconds(device, use_cycles=use_cycles)
            total[compute < memory] += max(compute, memory) * launch.runs
        return total[0], total[1]


def read_program(program: jax.stages.Compiled | str) -> Program:
    """Read what a compiled program runs.

    Args: program: the result of `jax.jit(…).lower(…).compile()`, or its text.
    Raises: ValueError for text that is not HLO.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((8, 16))
        >>> read_program(jax.jit(lambda x: x @ x.T).lower(x).compile()).flops  # 2 · 8 · 16 · 8
        2048.0
    """
    module = Module(program)
    return _Reader(module).read(module.entry)


class Addition(NamedTuple):
    """A scatter that adds floating-point numbers."""

    source: str  # the operation of the model, as JAX names it
    dtype: str  # as HLO names it
    narrow: bool  # narrower than float32: such a sum loses bits at each addition
    # no two additions meet; if they may, a GPU adds in any order, and a sum's last bits change
    unique: bool


def additions(program: jax.stages.Compiled | str) -> list[Addition]:
    """Find the scatters of a program that add floating-point numbers, each once."""
    module, found = Module(program), []
    scatters = (i for c in module.computations.values() for i in c.values())
    for i in (i for i in scatters if i.opcode == "scatter" and any(map(is_float, i.arrays))):
        combined = module.computations[i.called("to_apply")[0]].values()
        if "add" in {c.opcode for c in combined}:
            narrow = any(is_float(a) and a.nbytes < 4 * a.size for a in i.arrays)
            unique = "unique_indices=true" in attributes(i)
            found.append(Addition(source_of(i) or i.name, i.arrays[0].dtype, narrow, unique))
    return found


def source_of(i: Instruction) -> str:
    """The model's operation, as JAX names it: "jit(step)/while/body/dot_general", or ""."""
    match = re.search(r'op_name="([^"]*)"', i.rest)
    return match[1] if match else ""


class _Reader:
    """Reads the launches of a module's computations, each once."""

    def __init__(self, module: Module):
        self.module = module
        self.cost = LaunchCost(module)
        self._read: dict[str, Program] = {}

    def read(self, computation: str) -> Program:
        """Return what a computation and those that it calls launch."""
        if computation not in self._read:
            instructions = self.module.computations[computation].values()
            parts = [self._part(computation, i) for i in instructions]
            self._read[computation] = Program(
                tuple(x for part in parts for x in part.all_launches),
                tuple(x for part in parts for x in part.unknown_loops),
            )
        return self._read[computation]

    def _part(self, computation: str, i: Instruction) -> Program:
        if i.opcode == "while":
            body, trips = self.read(i.called("body")[0]), self.module.trip_count(computation, i)
            if trips is not None:
                launches = tuple(replace(x, runs=x.runs * trips) for x in body.all_launches)
                return Program(launches, body.unknown_loops)
            # The host or the device decides in each iteration.
            tests = self.read(i.called("condition")[0]).all_launches
            launches = tuple(replace(x, known=False) for x in body.all_launches + tests)
            return Program(launches, (*body.unknown_loops, source_of(i) or i.name))
        if i.opcode == "conditional":
            names = i.called("branch_computations", "true_computation", "false_computation")
            return max(map(self.read, names), key=lambda branch: branch.flops + branch.nbytes)
        if i.opcode in CALLS and "fusion" not in i.opcode:
            return self.read(i.called("calls", "to_apply")[0])
        # a scalar of a TPU, which its scalar unit computes on the way
        scalar = all(not a.dims and "T(" in a.layout for a in i.arrays) and i.opcode not in CALLS
        waits = i.opcode in FREE or i.opcode.endswith(("-done", "-update"))
        if waits or scalar or call_target(i) in _NO_KERNELS:
            return Program((), ())
        return Program((self._launch(computation, i),), ())

    def _kernel(self, computation: str, i: Instruction) -> tuple[str, Instruction] | None:
        """The kernel that a launch is, or has in a fusion, and the computation that calls it."""
        if i.opcode.startswith("custom-call"):
            return None if call_target(i) in _NO_KERNELS else (computation, i)
        inside = i.called("calls", "to_apply") if i.opcode in CALLS else []
        within = ((name, x) for name in inside for x in self.module.computations[name].values())
        return next(filter(None, (self._kernel(*x) for x in within)), None)

    def _launch(self, computation: str, i: Instruction) -> Launch:
        kernel, work = self._kernel(computation, i), self.cost.work(computation, i)
        cycles = re.search(r'"estimated_cycles":"(\d{1,18})"', attributes(i))
        return Launch(
            name=i.name,
            kind=self.cost.kernel_name(kernel[1]) if kernel else i.opcode.removesuffix("-start"),
            source=source_of(i),
            runs=1,
            known=True,
            flops=work.flops,
            wide_flops=work.wide,
            nbytes=self.cost.traffic(computation, i),
            cycles=int(cycles[1]) if cycles else 0,
            is_kernel=kernel is not None,
            is_estimated=(self.cost.work(*kernel) if kernel else work).known,
        )


def describe_program(
    program: Program, formula: float, device: Accelerator | None
) -> list[tuple[str, str]]:
    """Return the lines of what a target's program runs; `formula`: the FLOPs of the step."""
    times = f"{program.flops / formula:.3g} × the formula"
    work = f"{format_count(program.flops)}FLOP of products and kernels, {times}"
    if unknown := program.unknown_work():
        work += f"; unknown, and counted as 0: {_list_counts(unknown)}"
    kernels = _list_counts(program.kernels()) or "none that the compiler does not see into"
    loops = ", ".join(dict.fromkeys(map(_short, program.unknown_loops)))
    loops = f"{len(program.unknown_loops)}, each counted once: {loops}" if loops else "none"
    lines = [
        ("  the program computes", work),
        ("  moves", f"{format_bytes(program.nbytes)} in memory"),
        ("  launches", f"{program.launches:,} in a step"),
        ("  kernels", kernels),
        ("  loops of unknown length", loops),
    ]
    if device is None:
        return lines
    compute, memory = program.roofline(device)
    bound = "FLOPs" if compute >= memory else "memory"
    parts = f"{format_seconds(compute)} bound by FLOPs, {format_seconds(memory)} by memory"
    total = f"{format_seconds(compute + memory)}, mostly {bound}: {parts}"
    lines.append(("  the program's roofline", total))
    if device.clock:
        least = format_seconds(sum(program.roofline(device, use_cycles=False)))
        lines.append(("    without cycles", f"{least}, by FLOPs and bytes alone"))
    seconds, runs = Counter[str](), Counter[str]()
    for launch in program.all_launches:
        name = f"{launch.kind}: {_short(launch.source) or launch.name}"
        seconds[name] += max(launch.seconds(device)) * launch.runs
        runs[name] += launch.runs
    for name, longest in seconds.most_common(LAUNCHES_SHOWN):
        lines.append(("    of it", f"{format_seconds(longest)} in {runs[name]:,} × {name}"))
    return lines


def _list_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} × {runs:,}" for name, runs in counts.most_common())


def _short(source: str) -> str:
    """Return the last parts of an operation's name, without those that JAX adds."""
    added = r"jit\(.*\)|eval_jaxpr|body|closed_call|while|cond"
    parts = [part for part in source.split("/") if not re.fullmatch(added, part)]
    return "/".join(parts[-2:]) or source


def main(argv: list[str]) -> None:
    """Print the plan of each step, and what its compiled program runs."""
    options, run, name = command.options(argv)
    device, jobs = device_of(options), jobs_of(options, run)
    print_row("model", name)
    for rows, length, compute_cost in jobs:
        cost = compute_cost()
        lines = cost_lines(cost, rows, length, device and device.memory, device)
        if cost.text:
            lines += describe_program(read_program(cost.text), cost.flops, device)
        for label, value in lines:
            print_row(label, value)


if __name__ == "__main__":
    main(sys.argv[1:])
