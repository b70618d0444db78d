"""Plan weak scaling: bytes sent in a step, with fixed tokens per device, along each mesh axis.

Writes weak_results.json and weak.png beside itself.

    python experiments/scale/weak.py [AXIS …] [--plot]

Cases that weak_results.json has already are skipped.
"""

import json
import sys
from pathlib import Path

import process

HERE = Path(__file__).parent
RESULTS = HERE / "weak_results.json"
DEVICES = (1, 2, 4, 8, 16, 32, 64)
COARSE_TO_FINE = (1, 64, 8, 2, 16, 4, 32)
NO_GROUPS = dict(num_groups=1, groups_per_token=1)

# label: (the axis that grows, layout, changes of the model)
LINES = {
    "data: replicated": ("data", dict(), {}),
    "data: fsdp": ("data", dict(fsdp=True), {}),
    "expert: gather": ("expert", dict(expert_comm="gather"), {}),
    "expert: all to all": ("expert", dict(expert_comm="all_to_all"), {}),
    "expert: all to all, no node limit": ("expert", dict(expert_comm="all_to_all"), NO_GROUPS),
    "tensor": ("tensor", dict(), {}),
}


def case(axis: str, devices: int, layout: dict, changes: dict) -> dict:
    """Compile V3's widths in one dense and two sparse layers, with 4,096 tokens per device."""
    from dsv3_jax.config import Layout, replace
    from dsv3_jax.mesh import sharding
    from dsv3_jax.planning import cost
    from dsv3_jax.planning.devices import fake_cpus
    from dsv3_jax.presets import recipe

    fake_cpus(devices)
    mesh = sharding.make_mesh(**{axis: devices})
    run = recipe("v3")
    model = replace(run.model, **(dict(num_layers=3, num_dense_layers=1, mtp_depth=0) | changes))
    execution = replace(run.execution, layout=Layout(**layout))
    run = replace(run, model=model, execution=execution, data=replace(run.data, batch_size=devices))
    compiled = cost.train_cost(run, mesh)
    known = compiled.sent.known()
    kinds = known.by("kind")
    return {
        "sent": known.wire,
        "by_kind": kinds,
        "by_axes": {"+".join(axes): amount for axes, amount in known.by("axes").items()},
        # Along "expert" the all-reduces are the gradients of replicated parameters.
        "sent_but_for_all_reduce": known.wire - kinds.get("all-reduce", 0.0),
        "held": sum(compiled.persistent.values()),
    }


def plot(results: dict) -> None:
    """Draw weak.png: a panel per mesh axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for panel, axis in zip(panels, ("data", "expert", "tensor"), strict=True):
        for label, (grows, _, _) in LINES.items():
            if grows == axis:
                sizes = [n for n in DEVICES if "sent" in results.get(label, {}).get(str(n), {})]
                key = "sent_but_for_all_reduce" if axis == "expert" else "sent"
                sent = [results[label][str(n)][key] / 1e9 for n in sizes]
                name = label.partition(": ")[2] or "heads, hidden units and vocabulary sharded"
                panel.plot(sizes, sent, marker="o", label=name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(DEVICES, [str(n) for n in DEVICES])
        panel.set_ylim(bottom=0)
        panel.set_title(
            f"along {axis}" + (": tokens to their experts and back" if axis == "expert" else "")
        )
        panel.set_xlabel("devices")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    panels[0].set_ylabel("GB sent per device and step")
    figure.suptitle("V3's widths, 1 dense and 2 sparse layers, 4,096 tokens per device")
    figure.savefig(HERE / "weak.png", dpi=130)


def main() -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    chosen = [axis for axis in ("data", "expert", "tensor") if axis in sys.argv]
    lines = {} if "--plot" in sys.argv else LINES
    for devices in sorted(DEVICES, key=COARSE_TO_FINE.index):
        for label, (axis, layout, changes) in lines.items():
            if (chosen and axis not in chosen) or str(devices) in results.get(label, {}):
                continue
            result = process.run(
                __file__, axis=axis, devices=devices, layout=layout, changes=changes
            )
            results.setdefault(label, {})[str(devices)] = result
            process.save(RESULTS, results)
            print(
                label, devices, result.get("failed") or f"{result['sent'] / 1e9:.2f} GB", flush=True
            )
    plot(results)


if __name__ == "__main__":
    if not process.work(case):
        main()
