"""Plan weak scaling: bytes sent in a step, with fixed tokens per device, along each mesh axis.

Writes weak_results.json and weak.png beside itself.

    python experiments/scale/weak.py [AXIS …] [--plot]

Cases that weak_results.json has already are skipped.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from matplotlib.figure import Figure

from dsv3_jax.host.files import write_atomic
from dsv3_jax.mesh import sharding
from dsv3_jax.planning import cost, devices
from experiments import apart
from experiments.scale.plan_table import v3_run

HERE = Path(__file__).parent
RESULTS = HERE / "weak_results.json"
DEVICES = (1, 2, 4, 8, 16, 32, 64)
COARSE_TO_FINE = (1, 64, 8, 2, 16, 4, 32)
FEW_LAYERS = dict(num_layers=3, num_dense_layers=1, mtp_depth=0)
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


def case(axis: str, count: int, layout: dict, changes: dict) -> dict:
    """Compile V3's widths in one dense and two sparse layers, with 4,096 tokens per device."""
    devices.fake_cpus(count)
    mesh = sharding.make_mesh(**{axis: count})
    compiled = cost.train_cost(v3_run(FEW_LAYERS | changes, layout, count), mesh)
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


def draw(results: dict) -> None:
    """Draw weak.png: a panel per mesh axis."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, axis in zip(panels, ("data", "expert", "tensor"), strict=True):
        for label in (label for label, (grows, *_) in LINES.items() if grows == axis):
            found = results.get(label, {})
            sizes = [n for n in DEVICES if "sent" in found.get(str(n), {})]
            key = "sent_but_for_all_reduce" if axis == "expert" else "sent"
            name = label.partition(": ")[2] or "heads, hidden units and vocabulary sharded"
            panel.plot(sizes, [found[str(n)][key] / 1e9 for n in sizes], marker="o", label=name)
        title = f"along {axis}" + (": tokens to their experts and back" * (axis == "expert"))
        panel.set(title=title, xlabel="devices")
        panel.set_xscale("log", base=2)
        panel.set_xticks(DEVICES, [str(n) for n in DEVICES])
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    panels[0].set_ylabel("GB sent per device and step")
    figure.suptitle("V3's widths, 1 dense and 2 sparse layers, 4,096 tokens per device")
    figure.savefig(HERE / "weak.png", dpi=130)


def main() -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    chosen = [axis for axis in ("data", "expert", "tensor") if axis in sys.argv]
    lines = {} if "--plot" in sys.argv else LINES
    for count in COARSE_TO_FINE:
        for label, (axis, layout, changes) in lines.items():
            if (chosen and axis not in chosen) or str(count) in results.get(label, {}):
                continue
            arguments = dict(axis=axis, count=count, layout=layout, changes=changes)
            results.setdefault(label, {})[str(count)] = r = apart.run_case(__file__, **arguments)
            write_atomic(RESULTS, json.dumps(results, indent=1) + "\n")
            print(label, count, r.get("failed") or f"{r['sent'] / 1e9:.2f} GB", flush=True)
    draw(results)


if __name__ == "__main__":
    apart.main(case, main)
