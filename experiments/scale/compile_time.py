"""Measure compile time of V3 with 8 and 61 layers on a mesh, in turns. Writes compile_results.json.

python experiments/scale/compile_time.py
"""

import statistics
from pathlib import Path

import process

RESULTS = Path(__file__).parent / "compile_results.json"
LAYERS, ROUNDS, MESH = (8, 61), 3, dict(data=4, expert=16)


def case(layers: int) -> dict:
    """Compile V3's training step with this many layers."""
    import math
    import time

    from dsv3_jax.config import Layout, replace
    from dsv3_jax.mesh import sharding
    from dsv3_jax.planning import cost, devices
    from dsv3_jax.presets import recipe

    devices.fake_cpus(math.prod(MESH.values()))
    mesh = sharding.make_mesh(**MESH)
    run = recipe("v3")
    model = replace(run.model, num_layers=layers)
    execution = replace(run.execution, layout=Layout(fsdp=True))
    run = replace(
        run, model=model, execution=execution, data=replace(run.data, batch_size=mesh.size)
    )
    start = time.process_time()
    compiled = cost.train_cost(run, mesh)
    return {"seconds": compiled.seconds, "cpu_seconds": time.process_time() - start}


def main() -> None:
    results: dict[str, list[dict]] = {str(n): [] for n in LAYERS}
    for _ in range(ROUNDS):
        for layers in LAYERS:
            results[str(layers)].append(process.run(__file__, layers=layers))
            process.save(RESULTS, results)
            print(layers, results[str(layers)][-1], flush=True)
    few, many = (statistics.median(r["cpu_seconds"] for r in results[str(n)]) for n in LAYERS)
    print(f"{LAYERS[1]} layers take {many / few:.2f} times the CPU seconds of {LAYERS[0]}")


if __name__ == "__main__":
    if not process.work(case):
        main()
