"""`dsv3 train PRESET`: train a run, in this process or as one process of a cluster."""

import math
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dsv3_jax.cli.common import (
    all_devices,
    fail,
    guarded,
    make_mesh,
    named_preset,
    parse,
    prepare_process,
    prepare_training,
    sentence,
    value_of,
)
from dsv3_jax.cluster import supervisor
from dsv3_jax.config import RunConfig, replace
from dsv3_jax.presets import NEEDS_START, recipe


@dataclass
class Train:
    """Train a preset. Every setting of the run is an option; its default is the preset's recipe.

    With --start, model and data are those of the run whose weights training begins with; it may be a converted run.
    With --trunk, model and data are those of the run whose trunk is frozen; --model.mtp-kind and --model.mtp-depth
    choose the heads.

    To fine-tune a run or a released model on chats: `dsv3 train sft --start MODEL --data.paths chats.jsonl`.

    On a CPU, the devices of --mesh are simulated, and share the cores. With --cluster, every process runs the same
    command, and OUT is a shared folder; HOST:PORT also needs --processes and --process-id.
    """

    out: Path
    """folder of the run: run.json, checkpoints, metrics, pictures"""
    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    step: int | None = None
    """resume from the checkpoint of this step, each time the command runs; later ones are kept as STEP.superseded. None
    means the newest checkpoint that is whole"""
    mesh: str | None = None
    """devices to shard over, as data=N,expert=N,tensor=N; None means all GPUs or TPUs here along data, or one CPU
    device; with --cluster, the devices of all processes along data"""
    cluster: str | None = None
    """train in several processes: HOST:PORT of process 0, or auto on SLURM, Kubernetes, Open MPI and TPU pods"""
    processes: int | None = None
    """number of processes of the cluster"""
    process_id: int | None = None
    """number of this process, from 0"""
    cluster_timeout: int = 60
    """seconds to wait for the other processes at the start"""
    profile: str | None = None
    """steps to trace, as START:STOP; TensorBoard and Perfetto open the trace in the folder's profile/"""
    epochs: float | None = None
    """for sft: passes over the examples, instead of --steps; None means 2 unless --steps is given"""


def run(argv: list[str]) -> int:
    """Train; with --cluster a supervisor in this process watches a worker that trains."""
    args = options(argv)
    cluster = _cluster(args)
    if cluster is not None:
        return supervisor.run(cluster, lambda line, port: [sys.executable, "-c", WORKER, str(line), str(port), *argv])
    prepare_process()
    from dsv3_jax.training.loop import fit
    from dsv3_jax.training.profile import parse_steps

    profile = None if args.profile is None else parse_steps(args.profile)
    mesh = all_devices(args.run) if args.mesh is None else make_mesh(args.mesh)
    prepare_training(mesh)
    fit(args.run, args.out, mesh=mesh, step=args.step, profile=profile)
    return 0


def options(argv: list[str]) -> Train:
    """Parse the arguments; the defaults are the preset's recipe, on another run's model and data with --start or
    --trunk."""
    run, rest = named_preset(argv, "train", recipe)
    if trunk := value_of(rest, "--trunk"):
        from dsv3_jax.training.warm_start import on_trunk

        run = on_trunk(run, trunk, value_of(rest, "--out"))
    elif start := value_of(rest, "--start"):
        from dsv3_jax.training.warm_start import on_weights

        run = on_weights(run, start, value_of(rest, "--out"))
    elif argv and argv[0] in NEEDS_START and not {"-h", "--help"} & set(rest):
        raise ValueError(f"preset {argv[0]!r} fine-tunes a model: name a run or a released model by --start MODEL")
    args = parse(Train, rest, "train PRESET", default=Train(out=tyro.MISSING, run=run))
    if args.epochs is not None and args.run.data.format != "chat":
        raise ValueError(f"epochs={args.epochs} is for chat examples, as in `dsv3 train sft`; use --steps")
    if args.run.data.format == "chat":
        args = replace(args, run=_for_epochs(args, value_of(rest, "--steps")))
    return args


def _for_epochs(args: Train, steps: str | None) -> RunConfig:
    """Set the steps of a run on chats, which a run that has begun knows already."""
    from dsv3_jax.training.chats import EPOCHS, steps_of
    from dsv3_jax.training.run_folder import RUN_FILE, read_run

    if steps is not None:
        if args.epochs is not None:
            raise ValueError(f"epochs={args.epochs} and steps={steps} are both given; choose one")
        return args.run
    if args.epochs is None and (args.out / RUN_FILE).exists():
        return replace(args.run, steps=read_run(args.out).steps)
    return replace(args.run, steps=steps_of(args.run, args.out, EPOCHS if args.epochs is None else args.epochs))


def _cluster(args: Train) -> supervisor.Cluster | None:
    if args.cluster is not None:
        return supervisor.Cluster(args.cluster, args.processes, args.process_id, args.cluster_timeout)
    if args.processes is not None or args.process_id is not None:
        raise ValueError("--processes and --process-id need --cluster, which says where process 0 is")
    return None


# The worker's program. Its arguments: the descriptor of its line to the supervisor, the supervisor's port, `argv`.
WORKER = (
    "import sys; from dsv3_jax.cli import train; sys.exit(train.work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))"
)


def work(line: int, port: int, argv: list[str]) -> int:
    """Run `dsv3 train … --cluster …` as the worker of a supervisor. Returns 0; with another code it ends here."""
    supervisor.end_with_supervisor(line)
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)  # ours alone: Gloo prints its connections on descriptor 1
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        code = guarded(lambda: _train_in_cluster(line, port, argv))
    except Exception:
        traceback.print_exc()
        code = 1
    if code:
        # At once: at the interpreter's exit JAX waits minutes for its peers, while they wait in a collective for this
        # process, and no supervisor notices.
        sys.stdout.flush()
        sys.stderr.flush()
        if code == 2:
            time.sleep(
                1
            )  # process 0 serves JAX's coordination, whose end aborts the others before they give the reason
        os._exit(code)
    return code


def _train_in_cluster(line: int, port: int, argv: list[str]) -> int:
    args = options(argv)
    cluster = _cluster(args)
    assert cluster is not None
    prepare_process()
    from dsv3_jax.cluster import processes
    from dsv3_jax.mesh import sharding
    from dsv3_jax.training.loop import fit
    from dsv3_jax.training.profile import parse_steps

    profile = None if args.profile is None else parse_steps(args.profile)
    sizes = sharding.parse_mesh(args.mesh) if args.mesh else None
    supervisor.report(line, processes.join(cluster, math.prod(sizes.values()) if sizes else None, port))
    try:
        mesh = processes.make_mesh(sizes)
        prepare_training(mesh)
        fit(args.run, args.out, mesh=mesh, step=args.step, profile=profile)
    except Exception as error:
        if processes.is_connection_error(error):
            return fail(f"the processes lost each other: {sentence(error)}", supervisor.LOST)
        raise
    return 0
