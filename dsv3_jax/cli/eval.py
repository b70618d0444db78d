"""`dsv3 eval RUN`: held-out measures of a run's last checkpoint, or its scores on tasks."""

import dataclasses
import importlib.metadata
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dsv3_jax.cli.common import parse
from dsv3_jax.config import CacheDtype
from dsv3_jax.host.imports import IMPORTED


@dataclass
class Eval:
    """Measure a run's last checkpoint on held-out text: loss, bits a byte, MaxVio, MTP acceptance.

    With --tasks, score it on tasks instead.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """a run's folder, a released folder, or a hub id that is in the local cache"""
    paths: tuple[str, ...] = ()
    """other text to measure on; empty means the run's own validation text"""
    step: int | None = None
    """step of the checkpoint; None means the last"""
    batches: int = 8
    """number of batches to read, at most"""
    cache_dtype: tuple[CacheDtype, ...] = ()
    """read the same text through caches of these dtypes too, and compare them with float32"""
    tasks: Path | None = None
    """folder of tasks in JSON lines, such as DCLM's CORE or the tasks/ of a demo's run"""
    shots: int | None = None
    """examples before each prompt of a task; None means as the folder's core.yaml says, else 0"""
    limit: int | None = None
    """number of rows of each task, at most; None means all"""
    out: Path | None = None
    """JSON file for the scores"""
    kernels: str | None = None
    """kernels to compute with, see `dsv3 info PRESET --kernels`; None means the run's own"""


def run(argv: list[str]) -> int:
    """Print the measures, one a line."""
    args = parse(Eval, argv, "eval")
    if args.batches < 1:
        raise ValueError(f"batches={args.batches} is below 1")
    if args.tasks is not None:
        return _score(args, argv)
    if not args.shots is args.limit is args.out is None:
        raise ValueError("shots, limit and out are for tasks; add --tasks FOLDER")
    return _measure(args)


def _measure(args: Eval) -> int:
    from dsv3_jax.data import tokenizer
    from dsv3_jax.report.progress import text_console
    from dsv3_jax.runs.evaluate import evaluate
    from dsv3_jax.runs.open_model import measured_on, open_model
    from dsv3_jax.stats.cache_quality import cache_quality

    # The held-out text of the run, or other text that the user names.
    model, run, step = open_model(args.run, step=args.step, kernels=args.kernels)
    source = measured_on(run.data, args.run, args.paths)
    text = tokenizer.load(run.data.tokenizer)
    batches = source.val_batches(args.batches)
    mix = None if args.paths else source.training_bytes
    measures = evaluate(model, batches, text, source.domains, mix=mix)

    console = text_console()
    console.print(f"step {step}")
    for name, value in measures.items():
        if name != "load":
            console.print(f"{name:25s} {_format(value)}")

    # The same text once more for each dtype of a cache.
    if not args.cache_dtype:
        return 0
    if run.data.separate_documents:
        console.print(
            "Below, each row is read as one text: its documents attend to one another. So these "
            "losses differ from val_loss above; compare them with one another."
        )

    by_dtype = cache_quality(model, batches, ("float32", *args.cache_dtype))
    exact = by_dtype["float32"].val_loss
    for name, quality in by_dtype.items():
        console.print(
            f"{f'through {name} cache':25s} {quality.val_loss:.4f} "
            f"({quality.val_loss / exact - 1:+.3%}), greedy tokens the same "
            f"{quality.agreement:.2%}, {quality.bytes_per_token} bytes a token"
        )
    return 0


def _score(args: Eval, argv: list[str]) -> int:
    from dsv3_jax.host.files import check_writable, write_atomic
    from dsv3_jax.report.progress import text_console
    from dsv3_jax.runs.open_model import load_text, open_model
    from dsv3_jax.scores.score import score_tasks
    from dsv3_jax.scores.tasks import read_tasks

    assert args.tasks is not None
    read_tasks(args.tasks, args.shots)  # a broken line is found before the model is loaded
    check_writable(args.out)

    model, _, step = open_model(args.run, step=args.step, kernels=args.kernels)
    scores = score_tasks(
        model,
        load_text(args.run),
        args.tasks,
        shots=args.shots,
        limit=args.limit,
        say=text_console().print,
    )

    # With what is needed to repeat it.
    if args.out is not None:
        versions = {name: importlib.metadata.version(name) for name in ("dsv3-jax", "jax")}
        imports = [word for name in IMPORTED for word in ("--import", name)]
        facts = {
            "command": shlex.join(["dsv3", "eval", *argv, *imports]),
            "model": str(args.run),
            "step": step,
        }
        result = facts | {"versions": versions} | dataclasses.asdict(scores)
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    return 0


def _format(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:.4f}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(f"{v:.4f}" for v in value)
    return f"{value:.4f}"
