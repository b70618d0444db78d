"""Two processes of `dsv3 train` over the loopback address, for the tests of clusters and their campaign."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from runs import MODEL, SPEND_NO_SECONDS, dsv3, flags, make_run, start, write_text

from dsv3_jax.config import OptimConfig, RunConfig

MESH = "data=2"  # one device in each process, which holds half of the batch


def with_worker(before: str) -> tuple[str, str]:
    """`dsv3` with a worker that first runs `before`."""
    return dsv3(f"from dsv3_jax.cli import train\ntrain.WORKER = {before!r} + train.WORKER")


DSV3 = with_worker(SPEND_NO_SECONDS)


def pair_run(folder: Path) -> RunConfig:
    """With a large eps, AdamW does not turn rounding of gradients near 0 into full steps of either sign."""
    model = replace(MODEL, num_layers=1, mtp_depth=0)
    optim = OptimConfig(learning_rate=1e-2, warmup_steps=0, eps=0.1)
    return make_run(write_text(folder), model=model, optim=optim, steps=24, eval_every=12, save_every=2)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def pair(
    root: Path, out: Path, run: RunConfig, *, mesh=(MESH, MESH), more: Sequence = ((), ()), programs=(DSV3, DSV3)
) -> Iterator[list[subprocess.Popen]]:
    """Start `dsv3 train` twice, as the two processes of a cluster."""
    address = f"127.0.0.1:{free_port()}"
    both = []
    for i in range(2):
        argv = ["--out", str(out), "--mesh", mesh[i], "--cluster", address, "--processes", "2", "--process-id", str(i)]
        both.append(start(["train", "tiny", *argv, *flags(run), *more[i]], root, programs[i]))
    try:
        yield both
    finally:
        for process in both:
            with process:  # closes its pipes
                process.kill()


def ends(process: subprocess.Popen) -> tuple[int, str, list[str]]:
    """Wait for a process: (exit code, stdout, lines of stderr)."""
    output, errors = process.communicate(timeout=100)
    return process.returncode, output, errors.splitlines()


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 100
    while not any(p.name.isdigit() and int(p.name) >= step for p in folder.glob("checkpoints/*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
