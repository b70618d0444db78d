"""Plan DeepSeek-V3 on real clusters' sizes. Writes plan_results.json and plan_table.md.

python experiments/scale/plan_table.py [train|decode|tpu]
"""

import sys
from pathlib import Path

import process

HERE = Path(__file__).parent
RESULTS = HERE / "plan_results.json"

# (device, mesh, layout): one sequence of 4,096 tokens for each device of data × expert
TRAIN = [
    ("h800", dict(data=128, expert=16), dict(fsdp=True, expert_comm="gather")),
    ("h800", dict(data=128, expert=16), dict(fsdp=True, expert_comm="all_to_all")),
    ("h800", dict(data=32, expert=64), dict(fsdp=True, expert_comm="all_to_all")),
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


def case(
    kind: str, device: str, mesh: dict, layout: dict, rows: int = 0, context: int = 4096, **more
) -> dict:
    """Compile one step of V3 for a mesh, and return its memory, FLOPs and traffic."""
    import math

    from dsv3_jax.config import Layout, replace
    from dsv3_jax.mesh import sharding
    from dsv3_jax.planning import cost, devices
    from dsv3_jax.presets import recipe

    target = more.get("target")
    if target is None:
        devices.fake_cpus(math.prod(mesh.values()))
    sizes = dict.fromkeys(sharding.AXES, 1) | mesh
    device_mesh = devices.target_mesh(target, sizes) if target else sharding.make_mesh(**sizes)
    run = recipe("v3")
    model = replace(run.model, num_layers=more.get("layers", run.model.num_layers))
    execution = replace(run.execution, layout=Layout(**layout))
    if kind == "train":
        data = replace(run.data, batch_size=cost.batch_parts(device_mesh))
        run = replace(run, model=model, execution=execution, data=data)
        compiled = cost.train_cost(run, device_mesh, target=target)
    else:
        compiled = cost.decode_cost(model, execution, device_mesh, rows, context, target=target)
    least = compiled.least_seconds(devices.ACCELERATORS[device])
    known = compiled.sent.known()
    return {
        "held": compiled.persistent,
        "made": compiled.transient,
        "temporaries": compiled.temporaries,
        "total": compiled.total,
        "fits": compiled.fits(devices.ACCELERATORS[device].memory),
        "memory": devices.ACCELERATORS[device].memory,
        "flops": compiled.flops,
        "tokens_a_device": compiled.tokens / device_mesh.size,
        "sent": known.wire,
        "sent_by_kind": known.by("kind"),
        "sent_by_axes": {"+".join(axes): amount for axes, amount in known.by("axes").items()},
        "sent_a_further_turn": compiled.sent.wire - known.wire,
        "least_seconds": least,
        "compile_seconds": compiled.seconds,
        "refused": compiled.compile_error,
    }


def format_case(mesh: dict, layout: dict) -> str:
    """Return mesh and layout as text, as in "data 8×expert 64, fsdp"."""
    axes = "×".join(f"{axis} {size}" for axis, size in mesh.items())
    return axes + (", fsdp" if layout.get("fsdp") else "")


def gb(count: float) -> str:
    """Format bytes in GB."""
    return f"{count / 1e9:,.1f}"


def rows_of(results: dict) -> str:
    """Return Markdown tables of all cases."""
    parts = []
    kinds = (
        ("train", "Training step", "expert_comm"),
        ("decode", "Decoding step", "batch"),
        ("tpu", "Compiled for TPU", "layers"),
    )
    for kind, title, detail in kinds:
        rows = []
        for key, r in results.get(kind, {}).items():
            device, where, rest = key.split(" | ")
            if "failed" in r:
                rows.append([device, where, rest, r["failed"], *[""] * 6])
                continue
            held, known = sum(r["held"].values()), sum(r["made"].values())
            temporaries = "" if r["temporaries"] is None else gb(max(0, r["temporaries"] - known))
            fits = "yes" if r["fits"] else "no"
            seconds = r["least_seconds"]
            rows.append(
                [device, where, rest, gb(held), gb(known), temporaries, f"{gb(r['total'])}: {fits}"]
                + [gb(r["sent"]), f"{seconds['FLOPs'] + 0:.3g}", f"{seconds['wire']:.3g}"]
            )
        if rows:
            head = [
                "device",
                "mesh",
                detail,
                "held, GB",
                "gradients",
                "temporaries",
                "total: fits",
                "sent, GB",
            ]
            parts.append(f"### {title}\n\n" + process.table(head + ["FLOPs, s", "wire, s"], rows))
    return "\n\n".join(parts) + "\n"


def main(chosen: list[str]) -> None:
    import json

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    jobs = [("train", d, m, lay, dict(kind="train")) for d, m, lay in TRAIN]
    jobs += [("decode", d, m, {}, dict(kind="decode", rows=r, context=c)) for d, m, r, c in DECODE]
    jobs += [("tpu", d, m, lay, dict(kind="train", target=t, layers=n)) for d, t, m, lay, n in TPU]
    for group, device, mesh, layout, more in jobs:
        if chosen and group not in chosen:
            continue
        rest = {"train": layout.get("expert_comm", ""), "tpu": f"{more.get('layers')} layers"}.get(
            group, f"{more.get('rows')} sequences of {more.get('context')}"
        )
        key = f"{device} | {format_case(mesh, layout)} | {rest}"
        results.setdefault(group, {})[key] = result = process.run(
            __file__, device=device, mesh=mesh, layout=layout, **more
        )
        process.save(RESULTS, results)
        print(
            key,
            result.get("failed") or f"{gb(result['total'])} GB, {gb(result['sent'])} GB sent",
            flush=True,
        )
    (HERE / "plan_table.md").write_text(rows_of(results))


if __name__ == "__main__":
    if not process.work(case):
        main(sys.argv[1:])
