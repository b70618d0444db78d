"""`dsv3 info PRESET`: the sizes of a model, and the kernels that would run it, as lines of text."""

from dataclasses import dataclass
from typing import Annotated

import jax.numpy as jnp
import tyro

from dsv3_jax.cli.common import named_preset, parse
from dsv3_jax.config import Execution, ModelConfig
from dsv3_jax.model.cache import pick_kind
from dsv3_jax.model.counting import bytes_per_token, elements_per_token, size
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
    """list each op's kernels instead, and which would run here; compiles the C++ kernels once"""
    check: bool = False
    """compare all kernels with plain XLA here instead; a wrong one is not chosen afterwards"""


def run(argv: list[str]) -> int:
    """Print the list. Raises: ValueError for two lists."""
    run, rest = named_preset(argv, "info", recipe_with_model)
    args = parse(Info, rest, "info PRESET", default=Info(run.model, run.execution))
    if args.kernels and args.check:
        raise ValueError("kernels and check are two lists; choose one")
    if args.kernels:
        print(*describe_kernels(args.execution), sep="\n")
        return 0
    if args.check:
        return check_kernels(args.execution)

    # A preset with other settings is no longer that preset.
    changed = (args.model, args.execution) != (run.model, run.execution)
    name = f"{argv[0]}, changed" if changed else argv[0]
    for what, amount in describe(args.model, name, args.execution.compute_dtype):
        print(f"{what:22s} {amount}")
    return 0


def describe_kernels(execution: Execution) -> list[str]:
    """List each op's implementations here in their order, and which would run on one device.

    Example:
        >>> describe_kernels(Execution(kernels="xla"))[2].split()[:2]
        ['causal_attention', 'xla']
    """
    from dsv3_jax.kernels import choose

    kernels = choose.prepare(execution)
    chosen = kernels.chosen(execution.compute_dtype)
    title = (
        f"kernels={execution.kernels!r} on {kernels.target.platform}, {execution.compute_dtype}, "
        "one device"
    )
    lines = [
        title,
        f"{'op':18s} {'runs here':13s} implementations in order of preference; by name only",
    ]

    # In order of preference; those that run only if they are named come last.
    for op, name in chosen.items():
        free = [row.name for row in kernels.target.rows(op)]
        here = [row.name for row in kernels.target.here(op)]
        named = ", ".join(name for name in dict.fromkeys(here) if name not in free)
        lines.append(f"{op:18s} {name:13s} {', '.join(free)}{named and '; '}{named}")
    lines.append(
        "An implementation that does not serve the arrays' dtypes or shapes leaves them to the "
        "next one."
    )

    # Say of each name what it was made for, or why it is missing here.
    rows = {row.name: row for op in chosen for row in kernels.target.rows(op) if row.dtypes}
    missing = dict(kernels.missing)
    for name, row in rows.items():
        if name in missing:
            state = f"not available: {missing[name]}"
        else:
            state = f"ready; they are {row.made_for}"
        lines.append(f"The {'C++ ' if name == 'cpu' else ''}kernels ({name}) are {state}.")
    return lines


def check_kernels(execution: Execution) -> int:
    """Check the kernels of the default device, and keep what is wrong for `choose.prepare`.

    Returns: the exit code.
    """
    from dsv3_jax.kernels.check_apart import check_and_keep

    count = wrong = 0
    for verdict in check_and_keep(execution, precisions=("none", execution.precision)):
        if verdict.wrong:
            state = f"WRONG: {verdict.wrong}"
        else:
            state = f"right: {verdict.share:.0%} of the bound at most"
        print(f"{verdict.name:32s} {state}", flush=True)
        count += 1
        wrong += bool(verdict.wrong)
    print(f"{count - wrong} of {count} are right")
    return 1 if wrong else 0


def describe(cfg: ModelConfig, name: str, compute_dtype: str = "float32") -> list[tuple[str, str]]:
    """List what `dsv3 info` prints: parameters, FLOPs and cache bytes. No model is allocated.

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
    active = f"{format_count(counts.active)} a token ({counts.active / counts.total:.1%})"
    lines = [
        ("model", name),
        ("total parameters", format_count(counts.total)),
        ("active parameters", active),
        *((f"  {part}", format_count(count)) for part, count in counts.parts.items()),
    ]
    if cfg.mtp_depth:
        amount = (
            f"{format_count(counts.mtp)} more parameters, {format_count(counts.mtp_active)} active"
        )
        lines.append((cfg.head_kind.title, amount))

    # 2 FLOPs for each active parameter and token, 6 with the backward pass; attention's on top.
    context = min(4096, cfg.max_positions)
    forward = format_count(2 * counts.active)
    scores = format_count(counts.attention_flops)
    lines += [
        ("forward", f"{forward} FLOPs a token, and {scores} FLOPs for {context} tokens back"),
        ("training", f"{format_count(6 * counts.active)} FLOPs a token"),
    ]

    # The cache that the model would have, beside that of plain multi-head attention.
    itemsize = jnp.dtype(compute_dtype).itemsize
    kind = pick_kind(cfg, None)
    elements = elements_per_token(cfg)[kind]
    mha_elements = elements_per_token(cfg)["mha"]
    own = format_count(elements * itemsize)
    int8 = format_count(bytes_per_token(cfg, kind, "int8"))
    mha = format_count(mha_elements * itemsize)
    return lines + [
        ("cache", f"{own}B a token ({compute_dtype}, {elements} numbers)"),
        ("cache, int8", f"{int8}B a token, scales included"),
        ("cache, as MHA", f"{mha}B a token, {mha_elements / elements:.1f} times as much"),
    ]
