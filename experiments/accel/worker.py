"""The worker of `run.py`: it measures parts on JAX's default device.

It prints one line of JSON on the device. Then it measures the part that each line of its input
names: a line of JSON for each thing it says, each figure, and the end.
"""

import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from dsv3_jax.kernels import choose, verdicts
from experiments.accel.measuring import Part, sentence
from experiments.accel.model_parts import decode, drafts, exact, more_decode, step
from experiments.accel.op_parts import (
    attention,
    bounds,
    eight_bits,
    few_rows,
    grouped,
    layer,
    loss,
    more_grouped,
)
from experiments.accel.right import OWN
from experiments.accel.sizes import Sizes, full, toy

DRIVER_FILES = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")
PARTS: dict[str, Callable[[Sizes], Part]] = {
    part.__name__: part
    for part in (bounds, layer, attention, grouped, step, decode, exact,
                 few_rows, more_decode, more_grouped, drafts, loss, eight_bits)
}  # fmt: skip


def card() -> dict[str, Any]:
    """The device, its driver and the versions of the packages."""
    device = jax.devices()[0]
    drivers = [
        Path(name).read_text().split("\n")[0] for name in DRIVER_FILES if Path(name).exists()
    ]
    return {
        "kind": device.device_kind,
        "platform": choose.platform_of(),
        "devices": jax.local_device_count(),
        "memory": (device.memory_stats() or {}).get("bytes_limit"),
        "runtime": " ".join(device.client.platform_version.split()),
        "driver": " ".join(drivers[0].split()) if drivers else None,
        "versions": {"python": platform.python_version(), **verdicts.versions()},
    }


def main() -> int:
    for kernel in OWN:
        kernel.add()
    # Libraries print on descriptor 1 too: the replies get one of their own.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(**reply: Any) -> None:
        print(json.dumps(reply), file=replies, flush=True)

    try:
        info = card()
    except Exception as error:  # no device, or a broken installation
        send(failed=sentence(error))
        return 1
    small = info["platform"] == "cpu"
    sizes = toy() if small else full()
    send(card=info, toy=small)
    for line in sys.stdin:
        try:
            for found in PARTS[line.strip()](sizes):
                send(doing=found) if isinstance(found, str) else send(figure=asdict(found))
        except Exception as error:
            send(failed=f"{type(error).__name__}: {sentence(error)}")
        else:
            send(done=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
