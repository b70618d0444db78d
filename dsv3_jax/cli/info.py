"""`dsv3 info PRESET`: the sizes of a model, and the kernels that would run it, as lines of text."""

from dataclasses import dataclass
from typing import Annotated

import jax.numpy as jnp
import tyro

from dsv3_jax.cli.common import named_preset, parse, prepare_process
from dsv3_jax.config import Execution, ModelConfig
from dsv3_jax.model.cache import pick_kind
from dsv3_jax.model.counting import bytes_per_token, size
from dsv3_jax.presets import recipe_with_model
from dsv3_jax.report.units import format_count


@dataclass
class Info:
    """List a model's parameters, FLOPs and cache bytes, without allocating it.

    Every setting of the model is an option; its default is the preset's.
    """

    model: Annotated[ModelConfig, tyro.conf.arg(name="")]
    execution: Execution
    kernels: bool = False
    """list the kernels of each op instead, and which would run here; this compiles the C++ kernels once"""


def run(argv: list[str]) -> int:
    """Print the list."""
    run, rest = named_preset(argv, "info", recipe_with_model)
    args = parse(Info, rest, "info PRESET", default=Info(run.model, run.execution))
    if args.kernels:
        prepare_process()
        lines = describe_kernels(args.execution)
    else:
        changed = (args.model, args.execution) != (run.model, run.execution)
        name = f"{argv[0]}, changed" if changed else argv[0]
        lines = [f"{what:22s} {amount}" for what, amount in describe(args.model, name, args.execution.compute_dtype)]
    print(*lines, sep="\n")
    return 0


def describe_kernels(execution: Execution) -> list[str]:
    """List each op's implementations in their order, with their platforms, and which would run here on one device.

    Example:
        >>> describe_kernels(Execution(kernels="xla"))[2].split()[:2]
        ['causal_attention', 'xla']
    """
    from dsv3_jax.kernels import choose

    kernels = choose.prepare(execution)
    chosen = kernels.chosen(execution.compute_dtype)
    platform = kernels.target.platform
    lines = [
        f"kernels={execution.kernels!r} on {platform}, {execution.compute_dtype}, one device; "
        "implementations in order of preference",
        f"{'op':18s} {'runs here':13s} implementations",
    ]
    for op, rows in choose.TABLE.items():
        names = (
            f"{row.name} ({'all' if row.platforms == choose.PLATFORMS else ', '.join(row.platforms)}"
            f"{'; only if named' if row.by_name else ''})"
            for row in rows
        )
        lines.append(f"{op:18s} {chosen[op]:13s} {', '.join(names)}")
    lines.append("An implementation that does not serve the arrays' dtypes or shapes leaves them to the next one.")
    rows = {row.name: row for rows in choose.TABLE.values() for row in rows if row.why_not is not None}
    wanted = {row.name for op in choose.TABLE for row in kernels.target.rows(op)}
    for name, row in rows.items():
        if platform not in row.platforms:
            state = f"not used: the device is {platform}"
        elif name not in wanted:
            state = f"not used: kernels={execution.kernels!r} leaves them out"
        elif reason := kernels.why_not(row):
            state = f"not available: {reason}"
        else:
            state = f"ready; they are {row.made_for}"
        lines.append(f"The {'C++ ' if name == 'cpu' else ''}kernels ({name}) are {state}.")
    return lines


def describe(cfg: ModelConfig, name: str, compute_dtype: str = "float32") -> list[tuple[str, str]]:
    """List what `dsv3 info` prints: parameters, FLOPs and cache bytes, without allocating the model.

    Args:
        name: the model's name, for the first line.
        compute_dtype: in which it decodes.
    Returns: pairs (quantity, amount with its unit).

    Example:
        >>> from dsv3_jax.presets import preset
        >>> dict(describe(preset("v3"), "v3"))["total parameters"]
        '671B'
    """
    counts = size(cfg)
    context = min(4096, cfg.max_positions)
    itemsize = jnp.dtype(compute_dtype).itemsize
    kind = pick_kind(cfg, None)
    elements, mha_elements = counts.cache_elements[kind], counts.cache_elements["mha"]
    forward, scores = format_count(2 * counts.active), format_count(counts.attention_flops)
    lines = [
        ("model", name),
        ("total parameters", format_count(counts.total)),
        ("active parameters", f"{format_count(counts.active)} a token ({counts.active / counts.total:.1%})"),
        *((f"  {part}", format_count(count)) for part, count in counts.parts.items()),
    ]
    if cfg.mtp_depth:
        amount = f"{format_count(counts.mtp)} more parameters, {format_count(counts.mtp_active)} active"
        lines.append((cfg.head_kind.title, amount))
    return lines + [
        ("forward", f"{forward}FLOP a token, and {scores}FLOP for {context} tokens back"),
        ("training", f"{format_count(6 * counts.active)}FLOP a token"),
        ("cache", f"{format_count(elements * itemsize)}B a token ({compute_dtype}, {elements} numbers)"),
        ("cache, int8", f"{format_count(bytes_per_token(cfg, kind, 'int8'))}B a token, scales included"),
        (
            "cache, as MHA",
            f"{format_count(mha_elements * itemsize)}B a token, {mha_elements / elements:.1f} times as much",
        ),
    ]
