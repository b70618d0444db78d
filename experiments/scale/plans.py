"""Plan DeepSeek-V3 on clusters' sizes, and its bytes sent by the number of devices.

python experiments/scale/plans.py                # all cases that plan_results.json lacks
python experiments/scale/plans.py train decode   # some of train, decode, weak; `table`: none

Writes plan_results.json and the tables of README.md. Each case compiles in a process of its own.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from dsv3_jax.config import Layout, replace
from dsv3_jax.host.files import write_atomic
from dsv3_jax.mesh import sharding
from dsv3_jax.planning import cost, devices
from dsv3_jax.presets import recipe
from experiments import apart
from experiments.lab.results import replace_block
from experiments.markdown import markdown_table

HERE = Path(__file__).parent
RESULTS = HERE / "plan_results.json"

# (device, mesh, layout): one sequence of 4,096 tokens for each device of data × expert
TRAIN = [
    ("h800", dict(data=128, expert=16), dict(fsdp=True, expert_comm="gather")),
    ("h800", dict(data=128, expert=16), dict(fsdp=True, expert_comm="all_to_all")),
    ("h800", dict(data=32, expert=64), dict(fsdp=True, expert_comm="all_to_all")),
    ("h800", dict(data=32, expert=64), dict(fsdp=True, expert_nodes=8)),
    ("h800", dict(data=8, expert=64, tensor=4), dict(fsdp=True, expert_comm="all_to_all")),
    ("v5p", dict(data=32, expert=16), dict(fsdp=True, expert_comm="all_to_all")),
    ("v5p", dict(data=8, expert=64), dict(fsdp=True, expert_comm="all_to_all")),
]
# (device, mesh, sequences of 4,096 cached tokens): bfloat16 weights and latent cache
DECODE = [
    ("h800", dict(expert=64), 2048),
    ("h800", dict(expert=256), 8192),
    ("h800", dict(data=2, expert=64, tensor=2), 8192),
    ("v5p", dict(expert=32), 1024),
    ("v5p", dict(expert=64), 4096),
]
# label: (the axis that grows, layout, changes of FEW_LAYERS), with 4,096 tokens per device
FEW_LAYERS = dict(num_layers=3, num_dense_layers=1, mtp_depth=0)
NO_GROUPS = dict(num_groups=1, groups_per_token=1)
WEAK = {
    "expert: gather": ("expert", dict(expert_comm="gather"), {}),
    "expert: all to all": ("expert", dict(expert_comm="all_to_all"), {}),
    "expert: all to all, no node limit": ("expert", dict(expert_comm="all_to_all"), NO_GROUPS),
    "data: replicated": ("data", dict(), {}),
    "data: fsdp": ("data", dict(fsdp=True), {}),
    "tensor": ("tensor", dict(), {}),
}
SIZES = (1, 2, 4, 8, 16, 32, 64)
# The tables: title, and what tells two cases of a mesh apart.
TABLES = {"train": ("Training step", "expert_comm"), "decode": ("Decoding step", "batch")}
HEADER = ["held, GB", "gradients", "temporaries", "total: fits", "sent, GB", "FLOPs, s", "wire, s"]


def case(
    device: str,
    mesh: Mapping[str, int],
    layout: Mapping[str, Any] = {},
    changes: Mapping[str, Any] = {},
    rows: int = 0,
) -> dict:
    """Compile one step of V3 for a mesh, and return its memory, FLOPs and traffic.

    Args:
        layout: settings of Layout.
        changes: of V3's model.
        rows: sequences of a decoding step; 0 means training.
    """
    devices.fake_cpus(math.prod(mesh.values()))
    on, run = sharding.make_mesh(**mesh), recipe("v3")
    run = replace(
        run,
        model=replace(run.model, **changes),
        execution=replace(run.execution, layout=Layout(**layout)),
        data=replace(run.data, batch_size=cost.batch_parts(on)),
    )
    if rows:
        compiled = cost.decode_cost(run.model, run.execution, on, rows, 4096)
    else:
        compiled = cost.train_cost(run, on)
    sheet, known = devices.ACCELERATORS[device], compiled.sent.known()
    return {
        "held": compiled.persistent,
        "made": compiled.transient,
        "temporaries": compiled.temporaries,
        "total": compiled.total,
        "fits": compiled.fits(sheet.memory),
        "memory": sheet.memory,
        "flops": compiled.flops,
        "tokens_a_device": compiled.tokens / on.size,
        "sent": known.wire,
        "sent_by_kind": known.by("kind"),
        "sent_by_axes": {"+".join(axes): amount for axes, amount in known.by("axes").items()},
        "sent_a_further_turn": compiled.sent.wire - known.wire,
        "least_seconds": compiled.least_seconds(sheet),
        "compile_seconds": compiled.seconds,
    }


def cases() -> Iterator[tuple[str, str, dict]]:
    """Yield all cases: (group, key in the results, arguments of `case`)."""

    def named(device: str, mesh: dict, layout: dict, detail: str) -> str:
        axes = "×".join(f"{axis} {size}" for axis, size in mesh.items())
        return f"{device} | {axes}{', fsdp' if layout.get('fsdp') else ''} | {detail}"

    for device, mesh, layout in TRAIN:
        key = named(device, mesh, layout, layout.get("expert_comm", "two hops"))
        yield "train", key, dict(device=device, mesh=mesh, layout=layout)
    for device, mesh, rows in DECODE:
        key = named(device, mesh, {}, f"{rows} sequences of 4096")
        yield "decode", key, dict(device=device, mesh=mesh, rows=rows)
    for label, (axis, layout, changes) in WEAK.items():
        for count in SIZES:
            step = dict(device="h800", mesh={axis: count}, layout=layout)
            yield "weak", f"{label} | {count}", step | {"changes": FEW_LAYERS | changes}


def gb(count: float) -> str:
    """Format bytes in GB."""
    return f"{count / 1e9:,.1f}"


def cells(r: dict) -> list[str]:
    """Return a case's cells of the table."""
    if "failed" in r:
        return [r["failed"], *[""] * 6]
    held, known = sum(r["held"].values()), sum(r["made"].values())
    temporaries = "" if r["temporaries"] is None else gb(max(0, r["temporaries"] - known))
    total, seconds = f"{gb(r['total'])}: {'yes' if r['fits'] else 'no'}", r["least_seconds"]
    times = [f"{seconds['FLOPs'] + 0:.3g}", f"{seconds['wire']:.3g}"]
    return [gb(held), gb(known), temporaries, total, gb(r["sent"]), *times]


def sent(label: str, count: int, results: dict) -> str:
    """Return the GB that a device of so many sends, of a line of WEAK."""
    case = results.get(f"{label} | {count}", {})
    if "sent" not in case:
        return case.get("failed", "")
    # Along expert, all-reduces are the gradients of replicated parameters.
    gradients = case["sent_by_kind"].get("all-reduce", 0) if label.startswith("expert") else 0
    return gb(case["sent"] - gradients)


def tables(results: dict) -> str:
    """Return Markdown tables of the plans, and of what a device sends by their number."""
    parts = []
    for group, (title, detail) in TABLES.items():
        rows = [[*key.split(" | "), *cells(r)] for key, r in results.get(group, {}).items()]
        table = markdown_table(["device", "mesh", detail, *HEADER], rows)
        parts.append(f"### {title}\n\n{table}")
    rows = [[label, *(sent(label, n, results.get("weak", {})) for n in SIZES)] for label in WEAK]
    table = markdown_table(["GB sent, by devices", *map(str, SIZES)], rows)
    return "\n\n".join([*parts, f"### Weak scaling\n\n{table}"])


def main() -> None:
    results = json.loads(RESULTS.read_text())
    chosen = sys.argv[1:] or ["train", "decode", "weak"]
    for group, key, arguments in cases():
        if group in chosen and key not in results.setdefault(group, {}):
            results[group][key] = r = apart.run_case(__file__, **arguments)
            write_atomic(RESULTS, json.dumps(results, indent=1) + "\n")
            done = r.get("failed") or f"{gb(r['total'])} GB, {gb(r['sent'])} GB sent"
            print(f"{key}: {done}", flush=True)
    replace_block(HERE / "README.md", tables(results))


if __name__ == "__main__":
    apart.main(case, main)
