"""Measure compile time of V3 with 8 and 61 layers on a mesh, in turns. Writes compile_results.json.

python experiments/scale/compile_time.py
"""

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from dsv3_jax.host.files import write_atomic
from dsv3_jax.mesh import sharding
from dsv3_jax.planning import cost, devices
from experiments import apart
from experiments.scale.plan_table import v3_run

LAYERS, ROUNDS, MESH = (8, 61), 3, dict(data=4, expert=16)


def case(layers: int) -> dict:
    """Compile V3's training step with this many layers."""
    devices.fake_cpus(MESH["data"] * MESH["expert"])
    mesh = sharding.make_mesh(**MESH)
    run = v3_run(dict(num_layers=layers), dict(fsdp=True), mesh.size)
    start = time.process_time()
    compiled = cost.train_cost(run, mesh)
    return {"seconds": compiled.seconds, "cpu_seconds": time.process_time() - start}


def main() -> None:
    path = Path(__file__).with_name("compile_results.json")
    results: dict[str, list[dict]] = {str(n): [] for n in LAYERS}
    for _ in range(ROUNDS):
        for layers in LAYERS:
            results[str(layers)].append(apart.run_case(__file__, layers=layers))
            write_atomic(path, json.dumps(results, indent=1) + "\n")
            print(layers, results[str(layers)][-1], flush=True)
    few, many = (statistics.median(r["cpu_seconds"] for r in results[str(n)]) for n in LAYERS)
    print(f"{LAYERS[1]} layers take {many / few:.2f} times the CPU seconds of {LAYERS[0]}")


if __name__ == "__main__":
    apart.main(case, main)
