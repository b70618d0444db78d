"""Plan DeepSeek-V3 on real clusters' sizes. Writes plan_results.json and plan_table.md.

python experiments/scale/plan_table.py [train|decode|tpu]
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from dsv3_jax.config import Layout, RunConfig, replace
from dsv3_jax.host.files import write_atomic
from dsv3_jax.mesh import sharding
from dsv3_jax.planning import cost, devices
from dsv3_jax.presets import recipe
from experiments import apart
from experiments.lab import markdown_table

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
# (device, mesh, sequences, context): bfloat16 weights and latent cache
DECODE = [
    ("h800", dict(expert=64), 2048, 4096),
    ("h800", dict(expert=256), 8192, 4096),
    ("h800", dict(data=2, expert=64, tensor=2), 8192, 4096),
    ("v5p", dict(expert=32), 1024, 4096),
    ("v5p", dict(expert=64), 4096, 4096),
]
# (device, target, mesh, layout, layers): V3 with few layers, compiled by libtpu; memory is enough
TPU = [
    ("v5p", "tpu:v5p:4x4x4", dict(data=4, expert=16), dict(fsdp=True, expert_comm="all_to_all"), 8)
]
GROUPS = {  # the tables: title, and what tells two cases of a mesh apart
    "train": ("Training step", "expert_comm"),
    "decode": ("Decoding step", "batch"),
    "tpu": ("Compiled for TPU", "layers"),
}
HEADER = ["held, GB", "gradients", "temporaries", "total: fits", "sent, GB", "FLOPs, s", "wire, s"]


def v3_run(changes: dict, layout: dict, rows: int) -> RunConfig:
    """V3's recipe with another model, layout and batch."""
    run = recipe("v3")
    return replace(
        run,
        model=replace(run.model, **changes),
        execution=replace(run.execution, layout=Layout(**layout)),
        data=replace(run.data, batch_size=rows),
    )


def case(device: str, mesh: dict, layout: dict, **more: Any) -> dict:
    """Compile one step of V3 for a mesh, and return its memory, FLOPs and traffic.

    Args: more: of decoding `rows` and `context`; of a TPU `target` and `layers`.
    """
    target, sizes = more.get("target"), dict.fromkeys(sharding.AXES, 1) | mesh
    if target is None:
        devices.fake_cpus(math.prod(mesh.values()))
    on = devices.target_mesh(target, sizes) if target else sharding.make_mesh(**sizes)
    changes = {"num_layers": more["layers"]} if "layers" in more else {}
    run = v3_run(changes, layout, cost.batch_parts(on))
    if "rows" in more:
        compiled = cost.decode_cost(run.model, run.execution, on, more["rows"], more["context"])
    else:
        compiled = cost.train_cost(run, on, target=target)
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
        "refused": compiled.compile_error,
    }


def cases() -> list[tuple[str, str, dict]]:
    """Return all cases: (group, key in the results, arguments of `case`)."""
    train = [("train", lay.get("expert_comm", "two hops"), d, m, lay, {}) for d, m, lay in TRAIN]
    decode = [
        ("decode", f"{rows} sequences of {context}", d, m, {}, dict(rows=rows, context=context))
        for d, m, rows, context in DECODE
    ]
    tpu = [("tpu", f"{n} layers", d, m, lay, dict(target=t, layers=n)) for d, t, m, lay, n in TPU]
    found = []
    for group, detail, device, mesh, layout, more in (*train, *decode, *tpu):
        axes = "×".join(f"{axis} {size}" for axis, size in mesh.items())
        where = axes + (", fsdp" if layout.get("fsdp") else "")
        arguments = dict(device=device, mesh=mesh, layout=layout) | more
        found.append((group, f"{device} | {where} | {detail}", arguments))
    return found


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


def tables(results: dict) -> str:
    """Return Markdown tables of all cases."""
    parts = []
    for group, (title, detail) in GROUPS.items():
        if rows := [[*key.split(" | "), *cells(r)] for key, r in results.get(group, {}).items()]:
            table = markdown_table(["device", "mesh", detail, *HEADER], rows)
            parts.append(f"### {title}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    chosen = sys.argv[1:] or list(GROUPS)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for group, key, arguments in cases():
        if group in chosen:
            results.setdefault(group, {})[key] = r = apart.run_case(__file__, **arguments)
            write_atomic(RESULTS, json.dumps(results, indent=1) + "\n")
            print(
                key, r.get("failed") or f"{gb(r['total'])} GB, {gb(r['sent'])} GB sent", flush=True
            )
    (HERE / "plan_table.md").write_text(tables(results))


if __name__ == "__main__":
    apart.main(case, main)
