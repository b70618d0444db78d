"""`dsv3 train PRESET`: train a run, in this process or as one process of a cluster."""

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dsv3_jax.cli.common import (
    all_devices,
    fail,
    mesh_of_option,
    named_preset,
    parse,
    prepare_training,
    sentence,
    value_of,
    with_variables,
)
from dsv3_jax.cli.options import names_of, spelled
from dsv3_jax.config import RunConfig, replace
from dsv3_jax.presets import NEEDS_START, recipe

Tracker = Literal["wandb", "tensorboard"]  # of cli/trackers.py
LOST = 75  # exit code: another process of the run is lost


@dataclass
class Train:
    """Train a preset. Every setting of the run is an option; its default is the preset's recipe.

    sft (chats) and grpo (answers) --start from a run or released model; --trunk trains its heads.
    """

    out: Path
    """folder of the run: run.json, checkpoints, metrics, pictures"""
    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    config: Path | None = None
    """run whose settings are the defaults, instead of PRESET"""
    step: int | None = None
    """resume here; later checkpoints become STEP.superseded"""
    mesh: str | None = None
    """data=N,expert=N,tensor=N; None: all devices on data"""
    cluster: str | None = None
    """for several processes: HOST:PORT of the first, or auto"""
    processes: int | None = None
    """number of processes of the cluster"""
    process_id: int | None = None
    """number of this process, from 0"""
    profile: str | None = None
    """trace steps START:STOP for TensorBoard in OUT/profile"""
    epochs: float | None = None
    """for sft: passes over the examples; None means 2"""
    report: Annotated[tuple[Tracker, ...], tyro.conf.arg(metavar="NAMES")] = ()
    """wandb sends metrics there, tensorboard says how to look"""
    opened: tyro.conf.Suppress[Any] = None  # the start or trunk
    chats: tyro.conf.Suppress[Any] = None  # what was read to count the steps


def run(argv: list[str]) -> int:
    """Train in this process, which may be one of several."""
    args = options(argv)
    if args.cluster is not None:
        return _train_in_cluster(args)
    if args.processes is not None or args.process_id is not None:
        raise ValueError(
            "--processes and --process-id need --cluster, which says where process 0 is"
        )
    mesh = all_devices(args.run) if args.mesh is None else mesh_of_option(args.mesh)
    return _fit(args, mesh)


def _fit(args: Train, mesh: Any) -> int:
    from dsv3_jax.cli.trackers import trackers
    from dsv3_jax.runs.loop import fit, start_and_chats

    profile = None if args.profile is None else parse_steps(args.profile)
    with trackers(args.report) as callbacks:
        # Before the allocator keeps memory, which would hide what a template takes.
        start, chats = start_and_chats(args.run, args.out, args.opened, args.chats)
        prepare_training(mesh)
        fit(
            args.run, args.out,
            mesh=mesh, step=args.step, profile=profile, start=start, chats=chats,
            callbacks=callbacks,
        )  # fmt: skip
    return 0


def options(argv: list[str]) -> Train:
    """Parse the arguments; defaults are those of PRESET or --config, or of --start or --trunk."""
    argv = spelled(with_variables(argv, "--data.template"), names_of(Train))
    if argv.count("--report") > 1:
        raise ValueError("--report is given twice; name all after one: --report wandb tensorboard")
    config = value_of(argv, "--config")
    if config is None:
        run, rest = named_preset(argv, "train", recipe)
    elif argv[0].startswith("-"):
        run, rest = read_recipe(config), argv
    else:
        raise ValueError(f"config={config!r} takes the place of PRESET {argv[0]!r}; leave one out")

    # Defaults are of the model that the run begins with.
    opened = None
    if trunk := value_of(rest, "--trunk"):
        from dsv3_jax.runs.start import on_trunk, open_start

        opened = open_start(trunk, value_of(rest, "--out"))
        run = on_trunk(run, opened)
    elif start := value_of(rest, "--start"):
        from dsv3_jax.runs.start import on_weights, open_start

        opened = open_start(start, value_of(rest, "--out"))
        run = on_weights(run, opened)
    elif argv[0] in NEEDS_START and not {"-h", "--help"} & set(rest):
        raise ValueError(
            f"preset {argv[0]!r} fine-tunes a model: name a run or a released model by --start "
            "MODEL"
        )
    args = parse(Train, rest, "train PRESET", default=Train(out=tyro.MISSING, run=run))
    args = replace(args, opened=opened)

    # Chats are read here, since the number of steps depends on them.
    by_epochs = args.run.data.format == "chat" and not args.run.grpo.group
    if args.epochs is not None and not by_epochs:
        raise ValueError(
            f"epochs={args.epochs} is for chat examples, as in `dsv3 train sft`; use --steps"
        )
    if by_epochs:
        steps, seq_len = value_of(rest, "--steps"), value_of(rest, "--data.seq-len")
        if config is not None:  # it has both; passes over the examples take its steps' place
            steps = str(run.steps) if steps is None and args.epochs is None else steps
            seq_len = seq_len or str(run.data.seq_len)
        run, chats = _for_epochs(args, steps, seq_len)
        args = replace(args, run=run, chats=chats)
    return args


def read_recipe(place: str) -> RunConfig:
    """The settings of a run, by its folder or the run.json in it.

    Raises: ValueError if it is none.
    """
    from dsv3_jax.runs.folder import RUN_FILE, check_registered, read_run

    path = Path(place)
    folder = path.parent if path.name == RUN_FILE else path
    if not folder.is_dir():
        raise ValueError(f"config={place!r} is no run's folder, and no {RUN_FILE} of one")
    run = read_run(folder)
    check_registered(run, folder)
    return run


def parse_steps(text: str) -> tuple[int, int]:
    """Read START:STOP.

    Raises: ValueError when it is none, or no step is between them.

    Example:
        >>> parse_steps("10:13")
        (10, 13)
    """
    match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(
            f"profile={text!r} is not START:STOP, two steps of which the first is smaller, as 10:13"
        )
    return int(match[1]), int(match[2])


def _for_epochs(args: Train, steps: str | None, seq_len: str | None) -> tuple[RunConfig, Any]:
    """Set the steps and the rows of a run on chats, which a run that has begun knows already.

    Returns: the run, and its chats if they had to be read.
    """
    from dsv3_jax.runs.chats import EPOCHS, for_epochs
    from dsv3_jax.runs.folder import RUN_FILE, read_run

    if steps is not None and args.epochs is not None:
        raise ValueError(f"epochs={args.epochs} and steps={steps} are both given; choose one")
    run = args.run
    begun = read_run(args.out) if (args.out / RUN_FILE).exists() else None

    # A run that has begun keeps its rows and steps, unless the options name others.
    if begun and seq_len is None:
        run = replace(run, data=replace(run.data, seq_len=begun.data.seq_len))
    if begun and steps is None and args.epochs is None:
        return replace(run, steps=begun.steps), None
    if steps is not None and (begun or seq_len is not None):
        return run, None

    epochs = EPOCHS if args.epochs is None else args.epochs
    fit_rows = seq_len is None and begun is None
    found, chats = for_epochs(run, args.out, epochs, args.opened, fit_rows=fit_rows)
    return found if steps is None else replace(found, steps=run.steps), chats


def _train_in_cluster(args: Train) -> int:
    from dsv3_jax.mesh import processes
    from dsv3_jax.mesh.shape import parse_mesh

    assert args.cluster is not None
    # The processes find each other before any of them touches a device.
    sizes = parse_mesh(args.mesh) if args.mesh else None
    devices = math.prod(sizes.values()) if sizes else None
    processes.join(args.cluster, args.processes, args.process_id, devices)
    try:
        return _fit(args, processes.make_mesh(sizes))
    except Exception as error:
        if processes.is_connection_error(error):
            return fail(
                f"a process of the run is lost; the same command resumes: {sentence(error)}", LOST
            )
        # every process may have this error, and the end of process 0 would abort the others
        time.sleep(1)
        raise
