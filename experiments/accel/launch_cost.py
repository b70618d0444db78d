"""The cost of one instruction of a compiled program: its FLOPs, and bytes read and written.

`program.py` says what counts.
"""

import math
import re

import numpy as np

from dsv3_jax.planning.hlo import CALLS, Instruction, Module, ResultArray

# Operations that name or order arrays, and run nothing.
FREE = {
    "add-dependency", "after-all", "bitcast", "constant", "domain", "get-tuple-element",
    "opt-barrier", "parameter", "partition-id", "replica-id", "tuple",
}  # fmt: skip
_ELEMENTWISE = {"bitcast", "bitcast-convert", "convert", "copy", "negate", "reshape", "transpose"}
# Operations that only move or convert numbers.
_MOVES = _ELEMENTWISE - {"negate"} | {
    "concatenate", "copy-start", "dynamic-slice", "dynamic-update-slice",
    "gather", "pad", "reverse", "slice",
}  # fmt: skip
_SLICES = {"dynamic-slice", "gather", "slice"}
# operation → the operand that it writes into its first
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
# Custom calls for kernels of any name.
_FOREIGN = {
    "tpu_custom_call",
    "mosaic_gpu",
    "mosaic_gpu_v2",
    "triton_kernel_call",
    "__gpu$xla.gpu.triton",
}
_UNNAMED = r"(custom-call|mpmd_map|pallas_call|mosaic_gpu\w*|core_map|run_state|custom_call)"
_GROUPED = re.compile(r"ragged|grouped|gmm", re.IGNORECASE)
_ATTENTION = re.compile(r"attention|flash|splash|mha", re.IGNORECASE)


class LaunchCost:
    """The costs of a module's instructions; a fused computation is worked out once."""

    def __init__(self, module: Module):
        self.module = module
        self._flops: dict[str, tuple[float, float]] = {}

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

    def _inside(self, computation: str) -> tuple[float, float]:
        """FLOPs of a fused computation: (all, those in float32 or more)."""
        if computation not in self._flops:
            parts = [
                self.work(computation, i) for i in self.module.computations[computation].values()
            ]
            totals = sum((p[0] for p in parts), 0.0), sum((p[1] for p in parts), 0.0)
            self._flops[computation] = totals
        return self._flops[computation]

    def work(self, computation: str, i: Instruction) -> tuple[float, float, bool]:
        """(FLOPs of an instruction, those in float32 or more, whether they are known)."""
        if i.opcode in CALLS:
            return *self._inside(i.called("calls", "to_apply")[0]), True
        if i.opcode == "custom-call":
            flops = self._kernel_flops(computation, i)
            wide = self._is_wide(computation, i) and call_target(i).startswith("__cublas")
            return flops or 0.0, (flops or 0.0) if wide else 0.0, flops is not None
        flops = 0.0
        if i.opcode == "dot":
            contracted = self._contracted(computation, i, numbers(i, "lhs_contracting_dims"))
            flops = 2.0 * i.arrays[0].size * contracted
        elif i.opcode == "convolution":
            flops = self._convolution_flops(computation, i)
        return flops, flops if self._is_wide(computation, i) else 0.0, True

    def _shape(self, computation: str, i: Instruction, index: int) -> ResultArray:
        operand = self.module.operand(computation, i, index)
        assert operand is not None, f"{i.name} has no operand {index}"
        return operand.arrays[0]

    def _is_wide(self, computation: str, i: Instruction) -> bool:
        operand = self.module.operand(computation, i, 0)
        return (
            operand is not None
            and bool(operand.arrays)
            and operand.arrays[0].nbytes >= 4 * operand.arrays[0].size
        )

    def _contracted(self, computation: str, i: Instruction, axes: tuple[int, ...]) -> int:
        dims = self._shape(computation, i, 0).dims
        return math.prod(dims[axis] for axis in axes)

    def _convolution_flops(self, computation: str, i: Instruction) -> float:
        """A TPU's products are convolutions; batches are windows, mostly of padding."""
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes(i))
        assert labels is not None, f"{i.name} has no dim_labels"
        left, right, out = (
            s.dims
            for s in (self._shape(computation, i, 0), self._shape(computation, i, 1), i.arrays[0])
        )
        where = [{letter: place for place, letter in enumerate(labels[n])} for n in (1, 2, 3)]
        groups = re.search(r"batch_group_count=(\d+)", attributes(i))
        batch = left[where[0]["b"]] // (int(groups[1]) if groups else 1)
        flops = 2.0 * batch * right[where[1]["i"]] * right[where[1]["o"]]
        window = _window(attributes(i))
        for n, letter in enumerate(sorted(x for x in where[0] if x.isdigit())):
            sizes = (left[where[0][letter]], right[where[1][letter]], out[where[2][letter]])
            flops *= _places(*sizes, {name: values[n] for name, values in window.items()})
        return flops

    def _kernel_flops(self, computation: str, i: Instruction) -> float | None:
        """FLOPs of a kernel: by its own estimate, by its operands, or None if neither tells."""
        if match := re.search(
            r"cost_estimate.{0,20}?flops\W*?(?:22)?\W*?:\W*?(\d+)", attributes(i)
        ):
            return float(match[1])
        if call_target(i).startswith("__cublas"):
            axes = re.search(r'lhs_contracting_dimensions"?:\s*\[([^\]]*)\]', attributes(i))
            if axes is None:
                return None
            numbers_of_axes = tuple(int(n) for n in re.findall(r"\d+", axes[1]))
            contracted = self._contracted(computation, i, numbers_of_axes)
            return 2.0 * i.arrays[0].size * contracted
        name = self.kernel_name(i)
        operands = [self.module.computations[computation].get(name) for name in i.operands]
        arrays = [
            o.arrays[0] for o in operands if o is not None and o.arrays and is_float(o.arrays[0])
        ]
        if _GROUPED.search(name):
            return _grouped_flops(arrays, i.arrays)
        if (flops := _scaled_flops(arrays, i.arrays)) is not None:
            return flops
        return _attention_flops(arrays, i.arrays) if _ATTENTION.search(name) else None

    # Bytes

    def traffic(self, computation: str, i: Instruction) -> float:
        """Bytes that a launch reads and writes in memory."""
        if match := re.search(
            r"cost_estimate.{0,200}?bytes_accessed\W*?(?:22)?\W*?:\W*?(\d+)", attributes(i)
        ):
            # What is on the chip needs no memory.
            return min(float(match[1]), self._whole(computation, i))
        # (result, operand, context); a TPU's prefetch has one of them on the chip
        if i.opcode == "copy-start":
            return sum((a.nbytes for a in i.arrays[:2] if not on_chip(a)), 0.0)
        # ((operands), result, context)
        if i.opcode.removesuffix("-start") in _SLICES and i.opcode not in _SLICES:
            part = i.arrays[len(i.operands)]
            return (1 if on_chip(part) else 2) * part.nbytes
        # (operands, results, …), or results alone
        if i.opcode.endswith("-start") and "fusion" not in i.opcode:
            arrays = i.arrays[: 2 * len(i.operands)]
            times = 2 if len(arrays) == len(i.operands) else 1
            return sum((a.nbytes for a in arrays), 0.0) * times
        if i.opcode in _SLICES:
            return 2 * result_bytes(i)
        if i.opcode in _UPDATES:
            return 2 * self._shape(computation, i, _UPDATES[i.opcode]).nbytes
        if i.opcode not in CALLS:
            return self._whole(computation, i)
        inner = i.called("calls")[0]
        inside = self.module.computations[inner].values()
        parameters = {int(p.operands[0]): p for p in inside if p.opcode == "parameter"}
        total = self._written(inner, self.module.root(inner), i)
        for n, name in enumerate(i.operands):
            operand = self.module.computations[computation].get(name)
            if (
                operand is not None
                and n in parameters
                and not (operand.arrays and on_chip(operand.arrays[0]))
            ):
                total += self._read(inner, parameters[n])
        return total

    def _whole(self, computation: str, i: Instruction) -> float:
        operands = (
            self.module.computations[computation].get(name) for name in dict.fromkeys(i.operands)
        )
        arrays = [a for o in operands if o is not None for a in o.arrays]
        return sum((a.nbytes for a in [*arrays, *i.arrays] if not on_chip(a)), 0.0)

    def _read(self, computation: str, i: Instruction) -> float:
        """Bytes that a fused computation reads of an array: a slice's part; in place, none."""
        total = 0.0
        for user in self.module.users(computation).get(i.name, []):
            first = user.operands[0] == i.name
            if user.opcode in _UPDATES and first:
                continue
            sliced = user.opcode in _SLICES and first
            if sliced or user.opcode in _ELEMENTWISE:  # the result may be sliced further
                total += (
                    self._read(computation, user)
                    if not user.root
                    else result_bytes(user if sliced else i)
                )
            elif user.opcode == "fusion":
                inner = user.called("calls")[0]
                for p in self.module.computations[inner].values():
                    if p.opcode == "parameter" and user.operands[int(p.operands[0])] == i.name:
                        total += self._read(inner, p)
            elif user.opcode == "tuple":  # handed on; a slice of it, or what is converted, is read
                total += 0.0 if i.opcode in ("parameter", "bitcast") else result_bytes(i)
            else:
                return result_bytes(i)
        return min(total, result_bytes(i))

    def _written(self, computation: str, i: Instruction, launch: Instruction) -> float:
        """Bytes of a fused computation's result that are written: in place, the update's."""
        if i.opcode == "tuple":
            parts = (self.module.computations[computation].get(name) for name in i.operands)
            return sum((self._written(computation, p, launch) for p in parts if p is not None), 0.0)
        if i.opcode in _UPDATES:
            return self._shape(computation, i, _UPDATES[i.opcode]).nbytes
        if i.opcode == "parameter":
            return 0.0
        if i.opcode == "bitcast":
            operand = self.module.operand(computation, i, 0)
            return (
                self._written(computation, operand, launch)
                if operand is not None
                else result_bytes(i)
            )
        if i.opcode == "fusion":
            inner = i.called("calls")[0]
            return self._written(inner, self.module.root(inner), launch)
        return 0.0 if launch.arrays and all(on_chip(a) for a in launch.arrays) else result_bytes(i)

    def moved(self, computation: str, i: Instruction) -> float:
        """Bytes that a launch writes if it only moves or converts numbers, else 0.

        A TPU's compiler moves arrays into its own memory and back, ahead of their use; this does
        not count.
        """
        if not self._only_moves(i) or any(on_chip(a) for a in i.arrays[:2]):
            return 0.0
        if i.opcode in CALLS:
            inner = i.called("calls", "to_apply")[0]
            return self._written(inner, self.module.root(inner), i)
        return (
            i.arrays[0].nbytes if i.opcode.endswith("-start") else self._written(computation, i, i)
        )

    def _only_moves(self, i: Instruction) -> bool:
        """Say whether a launch, and all that is fused into it, only moves or converts numbers."""
        if i.opcode not in CALLS:
            return i.opcode in _MOVES
        inside = self.module.computations[i.called("calls", "to_apply")[0]].values()
        # Scalars are indices.
        work = [x for x in inside if x.opcode not in FREE and x.arrays and x.arrays[0].dims]
        return bool(work) and all(self._only_moves(x) for x in work)


def attributes(i: Instruction) -> str:
    """Text of an instruction's attributes, without kernels' code."""
    return re.sub(r'("(?:body|module)\\?"?\s*[:=]\s*\\?")[^"]{200,}', r"\1", i.rest)


def numbers(i: Instruction, attribute: str) -> tuple[int, ...]:
    """The numbers of an attribute such as `lhs_contracting_dims={1,2}`."""
    match = re.search(r"\b" + attribute + r"=\{([\d,]*)\}", i.rest)
    return tuple(int(n) for n in match[1].split(",") if n) if match else ()


def result_bytes(i: Instruction) -> float:
    """Bytes of an instruction's result."""
    return sum((a.nbytes for a in i.arrays), 0.0)


def is_float(a: ResultArray) -> bool:
    """Say whether the elements are floating-point numbers."""
    return re.match(r"b?f\d", a.dtype) is not None


def on_chip(a: ResultArray) -> bool:
    """Say whether an array is in a TPU's own memory (space 1 of a tiled layout), not in HBM."""
    return "T(" in a.layout and re.search(r"S\([1-9]", a.layout) is not None


def function_of(module: Module, i: Instruction) -> str:
    """The name of an instruction's Python function, by the program's tables; "" if unknown."""

    def row(title: str, number: str, field: str) -> str:
        table = re.search(rf"^{title}\n((?:\d+ .*\n)*)", module.text, re.MULTILINE)
        line = re.search(rf"^{number} (.*)$", table[1], re.MULTILINE) if table and number else None
        found = re.search(field, line[1]) if line else None
        return found[1] if found else ""

    frame = re.search(r"stack_frame_id=(\d+)", i.rest)
    place = row("StackFrames", frame[1] if frame else "", r"file_location_id=(\d+)")
    return row(
        "FunctionNames", row("FileLocations", place, r"function_name_id=(\d+)"), r'"?([^"]*)"?'
    )


def call_target(i: Instruction) -> str:
    """The name by which the compiler knows a custom call."""
    if not i.opcode.startswith("custom-call"):
        return ""
    match = re.search(r'custom_call_target="([^"]*)"', attributes(i))
    return match[1] if match else ""


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


def _scaled_flops(operands: list[ResultArray], results: list[ResultArray]) -> float | None:
    """FLOPs of a product of scaled 8-bit matrices, [M, K], [N, K] → [M, N]; None for others."""
    matrices = [a.dims for a in operands if a.nbytes == a.size]
    if (
        len(matrices) != 2
        or any(len(dims) != 2 for dims in matrices)
        or matrices[0][1] != matrices[1][1]
    ):
        return None
    (m, k), (n, _) = matrices
    return 2.0 * m * n * k if results[0].dims == (m, n) else None


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
    sizes = [q.dims, k.dims, v.dims]
    # Where the output's gradient is there: d_q, d_k and d_v, or all three.
    count = sum(a.dims in sizes for a in results)
    width = {1: 2 * key + value, 2: 2 * key + 2 * value}.get(count, 3 * key + 2 * value)
    return 2.0 * pairs * width


def _window(attributes: str) -> dict[str, list[int]]:
    """Read a convolution's window: `size=8 stride=7 pad=0_0 lhs_dilate=8`, one for each axis."""
    text = re.search(r"window=\{([^}]*)\}", attributes)
    words = dict(word.split("=") for word in text[1].split()) if text else {}
    axes = len(words["size"].split("x")) if "size" in words else 0
    window = {}
    for name, default in (
        ("stride", "1"),
        ("lhs_dilate", "1"),
        ("rhs_dilate", "1"),
        ("pad", "0_0"),
    ):
        values = words.get(name, "x".join([default] * axes)).split("x") if axes else []
        window[name] = [int(v.split("_")[0]) for v in values]
    return window


def _places(left: int, kernel: int, out: int, window: dict[str, int]) -> int:
    """Count pairs of a result's and a kernel's place along an axis that meet no padding."""
    start = np.arange(out, dtype=np.int64) * window["stride"] - window["pad"]
    count = 0
    for k in range(kernel):
        place = start + k * window["rhs_dilate"]
        step = window["lhs_dilate"]
        count += int(np.sum((place >= 0) & (place % step == 0) & (place < left * step)))
    return count
