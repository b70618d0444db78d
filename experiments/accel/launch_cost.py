"""The cost of one instruction of a compiled program: its FLOPs, and bytes read and written.

`program.py` says what counts.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from dsv3_jax.planning.hlo import CALLS, Instruction, Module, ResultArray

# Operations that name or order arrays, and run nothing.
FREE = {
    "add-dependency", "after-all", "bitcast", "constant", "domain", "get-tuple-element",
    "opt-barrier", "parameter", "partition-id", "replica-id", "tuple",
}  # fmt: skip
_ELEMENTWISE = {"bitcast", "bitcast-convert", "convert", "copy", "negate", "reshape", "transpose"}
_SLICES = {"dynamic-slice", "gather", "slice"}
# operation → the operand that it writes into its first
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
# Custom calls for kernels of any name, and what such a kernel is called if it has none.
_FOREIGN = {
    "tpu_custom_call", "mosaic_gpu", "mosaic_gpu_v2", "triton_kernel_call", "__gpu$xla.gpu.triton",
}  # fmt: skip
_UNNAMED = r"(custom-call|mpmd_map|pallas_call|mosaic_gpu\w*|core_map|run_state|custom_call)"
_GROUPED = re.compile(r"ragged|grouped|gmm", re.IGNORECASE)
_ATTENTION = re.compile(r"attention|flash|splash|mha", re.IGNORECASE)


class Work(NamedTuple):
    """FLOPs of an instruction."""

    flops: float
    wide: float  # of these, in float32 or more
    known: bool = True


class LaunchCost:
    """The costs of a module's instructions; a fused computation is worked out once."""

    def __init__(self, module: Module):
        self.module = module
        self._inside: dict[str, Work] = {}

    def kernel_name(self, i: Instruction) -> str:
        """The name of a custom call's kernel."""
        target = call_target(i)
        if target not in _FOREIGN:
            return target
        if match := re.search(r'kernel_name\\?"?\s*[:=]\s*\\?"([^"\\]+)', attributes(i)):
            return match[1]
        name = re.sub(r"(\.\w+)*$", "", i.name)
        if re.fullmatch(_UNNAMED, name):
            name = function_of(self.module, i)
        return name or target

    # FLOPs

    def work(self, computation: str, i: Instruction) -> Work:
        """Count an instruction's FLOPs; those of a call are all that it calls."""
        if i.opcode in CALLS:
            inner = i.called("calls", "to_apply")[0]
            if inner not in self._inside:
                parts = [self.work(inner, x) for x in self.module.computations[inner].values()]
                flops, wide = (sum((p[n] for p in parts), 0.0) for n in range(2))
                self._inside[inner] = Work(flops, wide)
            return self._inside[inner]

        flops: float | None = 0.0
        if i.opcode == "dot":
            axes = re.search(r"\blhs_contracting_dims=\{([\d,]*)\}", i.rest)
            flops = self._product_flops(computation, i, axes[1] if axes else "")
        elif i.opcode == "convolution":
            flops = self._convolution_flops(computation, i)
        elif i.opcode == "custom-call":
            flops = self._kernel_flops(computation, i)
        if flops is None:
            return Work(0.0, 0.0, known=False)
        first = self.module.operand(computation, i, 0)
        wide = first is not None and any(a.nbytes >= 4 * a.size for a in first.arrays[:1])
        if i.opcode == "custom-call" and not call_target(i).startswith("__cublas"):
            wide = False
        return Work(flops, flops if wide else 0.0)

    def _operands(self, computation: str, i: Instruction) -> list[Instruction]:
        found = map(self.module.computations[computation].get, i.operands)
        return [operand for operand in found if operand is not None]

    def _shape(self, computation: str, i: Instruction, index: int) -> ResultArray:
        return self._operands(computation, i)[index].arrays[0]

    def _product_flops(self, computation: str, i: Instruction, axes: str) -> float:
        """Args: axes: the contracted ones of the first operand, as the text has them."""
        dims = self._shape(computation, i, 0).dims
        return 2.0 * i.arrays[0].size * math.prod(dims[int(n)] for n in re.findall(r"\d+", axes))

    def _convolution_flops(self, computation: str, i: Instruction) -> float:
        """A TPU's products are convolutions; batches are windows, mostly of padding."""
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes(i))
        assert labels is not None, f"{i.name} has no dim_labels"
        arrays = [self._shape(computation, i, n) for n in range(2)] + i.arrays[:1]
        left, right, out = (
            dict(zip(letters, array.dims, strict=True))
            for letters, array in zip(labels.groups(), arrays, strict=True)
        )
        groups = re.search(r"batch_group_count=(\d+)", attributes(i))
        batch = left["b"] // (int(groups[1]) if groups else 1)
        flops = 2.0 * batch * right["i"] * right["o"]
        text = re.search(r"window=\{([^}]*)\}", attributes(i))
        window = dict(word.split("=") for word in text[1].split()) if text else {}
        for n, axis in enumerate(sorted(filter(str.isdigit, left))):
            flops *= _places(left[axis], right[axis], out[axis], window, n)
        return flops

    def _kernel_flops(self, computation: str, i: Instruction) -> float | None:
        """FLOPs of a kernel: by its own estimate, by its operands, or None if neither tells."""
        text = attributes(i)
        if match := re.search(r"cost_estimate.{0,20}?flops\W*?(?:22)?\W*?:\W*?(\d+)", text):
            return float(match[1])
        if call_target(i).startswith("__cublas"):
            axes = re.search(r'lhs_contracting_dimensions"?:\s*\[([^\]]*)\]', text)
            return self._product_flops(computation, i, axes[1]) if axes else None
        name = self.kernel_name(i)
        firsts = [o.arrays[0] for o in self._operands(computation, i) if o.arrays]
        arrays = [a for a in firsts if is_float(a)]
        if _GROUPED.search(name):
            return _grouped_flops(arrays, i.arrays)
        return _attention_flops(arrays, i.arrays) if _ATTENTION.search(name) else None

    # Bytes

    def traffic(self, computation: str, i: Instruction) -> float:
        """Bytes that a launch reads and writes in memory."""
        estimate = r"cost_estimate.{0,200}?bytes_accessed\W*?(?:22)?\W*?:\W*?(\d+)"
        if match := re.search(estimate, attributes(i)):
            # What is on the chip needs no memory.
            return min(float(match[1]), self._whole(computation, i))
        # (result, operand, context); a TPU's prefetch has one of them on the chip
        if i.opcode == "copy-start":
            return _off_chip(i.arrays[:2])
        # ((operands), result, context)
        if i.opcode.removesuffix("-start") in _SLICES and i.opcode not in _SLICES:
            part = i.arrays[len(i.operands)]
            return (1 if on_chip(part) else 2) * part.nbytes
        # (operands, results, …), or results alone
        if i.opcode.endswith("-start") and "fusion" not in i.opcode:
            arrays = i.arrays[: 2 * len(i.operands)]
            return _bytes_of(arrays) * (2 if len(arrays) == len(i.operands) else 1)
        if i.opcode in _SLICES:
            return 2 * _bytes_of(i.arrays)
        if i.opcode in _UPDATES:
            return 2 * self._shape(computation, i, _UPDATES[i.opcode]).nbytes
        if i.opcode not in CALLS:
            return self._whole(computation, i)

        inner = i.called("calls")[0]
        total = self._written(inner, self.module.root(inner), i)
        parameters = self._parameters(inner)
        for n, operand in enumerate(self._operands(computation, i)):
            if n in parameters and not any(map(on_chip, operand.arrays[:1])):
                total += self._read(inner, parameters[n])
        return total

    def _parameters(self, computation: str) -> dict[int, Instruction]:
        inside = self.module.computations[computation].values()
        return {int(p.operands[0]): p for p in inside if p.opcode == "parameter"}

    def _whole(self, computation: str, i: Instruction) -> float:
        """Bytes of all operands, each once, and of all results."""
        operands = {o.name: o.arrays for o in self._operands(computation, i)}
        return _off_chip([a for arrays in operands.values() for a in arrays] + i.arrays)

    def _read(self, computation: str, i: Instruction) -> float:
        """Bytes that a fused computation reads of an array: a slice's part; in place, none."""
        whole, total = _bytes_of(i.arrays), 0.0
        for user in self.module.users(computation).get(i.name, []):
            first = user.operands[0] == i.name
            sliced = user.opcode in _SLICES and first
            if user.opcode in _UPDATES and first:
                continue
            if sliced or user.opcode in _ELEMENTWISE:  # the result may be sliced further
                if user.root:
                    total += _bytes_of(user.arrays) if sliced else whole
                else:
                    total += self._read(computation, user)
            elif user.opcode == "fusion":
                inner = user.called("calls")[0]
                for n, p in self._parameters(inner).items():
                    total += self._read(inner, p) if user.operands[n] == i.name else 0.0
            elif user.opcode == "tuple":  # handed on; a slice of it, or what is converted, is read
                total += 0.0 if i.opcode in ("parameter", "bitcast") else whole
            else:
                return whole
        return min(total, whole)

    def _written(self, computation: str, i: Instruction, launch: Instruction) -> float:
        """Bytes of a fused computation's result that are written: in place, the update's."""
        if i.opcode in _UPDATES:
            return self._shape(computation, i, _UPDATES[i.opcode]).nbytes
        if i.opcode == "parameter":
            return 0.0
        if i.opcode == "fusion":
            inner = i.called("calls")[0]
            return self._written(inner, self.module.root(inner), launch)
        if i.opcode in ("tuple", "bitcast"):
            parts = self._operands(computation, i)
            found = [self._written(computation, part, launch) for part in parts]
            return sum(found, 0.0) if found or i.opcode == "tuple" else _bytes_of(i.arrays)
        return 0.0 if launch.arrays and all(map(on_chip, launch.arrays)) else _bytes_of(i.arrays)


def attributes(i: Instruction) -> str:
    """Text of an instruction's attributes, without kernels' code."""
    return re.sub(r'("(?:body|module)\\?"?\s*[:=]\s*\\?")[^"]{200,}', r"\1", i.rest)


def call_target(i: Instruction) -> str:
    """The name by which the compiler knows a custom call; "" for other instructions."""
    if not i.opcode.startswith("custom-call"):
        return ""
    match = re.search(r'custom_call_target="([^"]*)"', attributes(i))
    return match[1] if match else ""


def is_float(a: ResultArray) -> bool:
    """Say whether the elements are floating-point numbers."""
    return re.match(r"b?f\d", a.dtype) is not None


def on_chip(a: ResultArray) -> bool:
    """Say whether an array is in a TPU's own memory (space 1 of a tiled layout), not in HBM."""
    return "T(" in a.layout and re.search(r"S\([1-9]", a.layout) is not None


def _bytes_of(arrays: list[ResultArray]) -> float:
    return sum((a.nbytes for a in arrays), 0.0)


def _off_chip(arrays: list[ResultArray]) -> float:
    return _bytes_of([a for a in arrays if not on_chip(a)])


def function_of(module: Module, i: Instruction) -> str:
    """The name of an instruction's Python function, by the program's tables; "" if unknown."""

    def row(title: str, number: str, field: str) -> str:
        table = re.search(rf"^{title}\n((?:\d+ .*\n)*)", module.text, re.MULTILINE)
        line = re.search(rf"^{number} (.*)$", table[1], re.MULTILINE) if table and number else None
        found = re.search(field, line[1]) if line else None
        return found[1] if found else ""

    frame = re.search(r"stack_frame_id=(\d+)", i.rest)
    place = row("StackFrames", frame[1] if frame else "", r"file_location_id=(\d+)")
    function = row("FileLocations", place, r"function_name_id=(\d+)")
    return row("FunctionNames", function, r'"?([^"]*)"?')


def _grouped_flops(operands: list[ResultArray], results: list[ResultArray]) -> float:
    """FLOPs of a product of rows by groups: [M, K], [G, K, N] → [M, N]; [M, K], [M, N] → [G, K, N].

    G groups, whose rows add up to M.
    """
    rows = [a for a in operands if len(a.dims) == 2]
    if not rows or not is_float(results[0]):
        return 0.0  # a table of groups
    out = results[0].dims
    if len(out) == 2:
        return 2.0 * math.prod(out) * (rows[0].size / out[0])
    return 2.0 * out[-1] * rows[0].size


def _attention_flops(operands: list[ResultArray], results: list[ResultArray]) -> float | None:
    """FLOPs of causal attention over q, k and v, or of its gradient; None for other operands.

    Half of the pairs of positions count. The heads' axis is before or after the positions', and is
    the shorter one.
    """
    matrices = [a for a in operands if len(a.dims) >= 3]
    if len(matrices) < 3 or len({len(a.dims) for a in matrices[:3]}) > 1:
        return None
    q, k, v = matrices[:3]
    key, value = q.dims[-1], v.dims[-1]
    pairs = q.size / key * max(k.dims[-3:-1]) / 2
    if not any(a.dims[:-1] == q.dims[:-1] and a.dims[-1] == value for a in matrices[3:]):
        return 2.0 * pairs * (key + value)  # scores and output
    # Where the output's gradient is there: d_q, d_k and d_v, or all three.
    count = sum(a.dims in [x.dims for x in (q, k, v)] for a in results)
    width = {1: 2 * key + value, 2: 2 * key + 2 * value}.get(count, 3 * key + 2 * value)
    return 2.0 * pairs * width


def _places(left: int, kernel: int, out: int, window: dict[str, str], axis: int) -> int:
    """Count pairs of a result's and a kernel's place along an axis that meet no padding.

    Args: window: a convolution's, as the text has it: `size=8x1 stride=7x1 pad=0_0x0_0`.
    """

    def of(name: str, default: int) -> int:
        return int(window[name].split("x")[axis].split("_")[0]) if name in window else default

    start = np.arange(out, dtype=np.int64) * of("stride", 1) - of("pad", 0)
    step, apart, count = of("lhs_dilate", 1), of("rhs_dilate", 1), 0
    for k in range(kernel):
        place = start + k * apart
        count += int(np.sum((place >= 0) & (place % step == 0) & (place < left * step)))
    return count
