"""`dsv3 train PRESET`: train a run, in this process or as one process of a cluster."""

import math
import operator
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dsv3_jax.cli.common import (
    HELPS,
    all_devices,
    devices_here,
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
from dsv3_jax.host.mirror import fetched
from dsv3_jax.presets import NEEDS_START, recipe, with_setting

Tracker = Literal["wandb", "tensorboard"]  # of cli/trackers.py
LOST = 75  # exit code: another process of the run is lost
# Settings of a run on chats that are chosen by its examples.
SIZES = (
    "steps", "data.seq_len", "data.batch_size",
    "optim.learning_rate", "optim.final_learning_rate",
)  # fmt: skip


@dataclass
class Train:
    """Train a preset. Every setting of the run is an option; its default is the preset's recipe.

    sft (chats) and grpo (answers) --start from a run or released model; --trunk trains its heads.
    """

    out: Path
    """folder of the run, or gs:// or s3://: metrics, checkpoints …"""
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
    """for sft: passes; None means by the number of examples"""
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
    elif argv[0] in NEEDS_START and not HELPS & set(rest):
        raise ValueError(
            f"preset {argv[0]!r} fine-tunes a model: name a run or a released model by --start "
            "MODEL"
        )
    args = parse(Train, rest, "train PRESET", default=Train(out=tyro.MISSING, run=run))
    args = replace(args, opened=opened, out=fetched(args.out))

    # Chats are read here, since the number of steps depends on them.
    by_epochs = args.run.data.format == "chat" and not args.run.grpo.group
    if args.epochs is not None and not by_epochs:
        raise ValueError(
            f"epochs={args.epochs} is for chat examples, as in `dsv3 train sft`; use --steps"
        )
    if by_epochs:
        options = {name: "--" + name.replace("_", "-") for name in SIZES}
        given = {name for name in SIZES if value_of(rest, options[name])}
        if config is not None:  # it has all; passes over the examples take its steps' place
            given |= {*SIZES} if args.epochs is None else {*SIZES} - {"steps"}
        run, chats = _for_epochs(args, given)
        args = replace(args, run=run, chats=chats)
    return args


def read_recipe(place: str) -> RunConfig:
    """The settings of a run, by its folder or the run.json in it.

    Raises: ValueError if it is none.
    """
    from dsv3_jax.runs.folder import RUN_FILE, check_registered, read_run

    path = fetched(place)
    folder = path.parent if path.name == RUN_FILE else path
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


def _for_epochs(args: Train, given: set[str]) -> tuple[RunConfig, Any]:
    """Set the steps, the rows and the rates of a run on chats, unless its options name them.

    Args: given: names of `SIZES` that the options name.
    Returns: the run, and its chats if they had to be read.
    """
    from dsv3_jax.runs.chats import for_epochs
    from dsv3_jax.runs.folder import RUN_FILE, read_run

    run = args.run
    if "steps" in given and args.epochs is not None:
        raise ValueError(f"epochs={args.epochs} and steps={run.steps} are both given; choose one")
    begun = read_run(args.out) if (args.out / RUN_FILE).exists() else None

    # A run that has begun keeps what was chosen for it, unless the options name something else.
    if begun:
        for name in {*SIZES} - given - {"steps"}:
            run = with_setting(run, name, operator.attrgetter(name)(begun))
        if "steps" in given or args.epochs is None:
            return run if "steps" in given else replace(run, steps=begun.steps), None
        given = {*SIZES} - {"steps"}

    # Several devices divide the batch, which then stays. Given steps need no number of passes.
    fit_rows = "data.seq_len" not in given
    if args.mesh or args.cluster or devices_here() > 1:
        given = given | {"data.batch_size"}
    epochs = 1.0 if "steps" in given else args.epochs
    found, chats = for_epochs(run, args.out, epochs, args.opened, fit_rows=fit_rows, given=given)
    return found if "steps" not in given else replace(found, steps=run.steps), chats


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
