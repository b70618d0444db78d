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
from dsv3_jax.config import CacheDtype, did_you_mean
from dsv3_jax.host.imports import IMPORTED

OWN_BATCHES = 8  # of a run's own held-out text, as in training


@dataclass
class Eval:
    """Measure a run's last checkpoint on held-out text: loss, bits a byte, MaxVio, MTP acceptance.

    With --tasks or --lm-eval, score it on tasks instead.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """a run's folder, a released folder, or a hub id that is in the local cache"""
    paths: tuple[str, ...] = ()
    """other text to measure on, all of it; empty means the run's own validation text"""
    step: int | None = None
    """step of the checkpoint; None means the last"""
    batches: int | None = None
    """number of batches to read, at most; None means 8 of the run's own text, and all of --paths"""
    cache_dtype: tuple[CacheDtype, ...] = ()
    """read the same text through caches of these dtypes too, and compare them with float32"""
    tasks: Path | None = None
    """folder of tasks in JSON lines, such as DCLM's CORE or the tasks/ of a demo's run"""
    lm_eval: tuple[str, ...] = ()
    """tasks of lm-evaluation-harness by name, such as hellaswag; it must be installed"""
    shots: int | None = None
    """examples before each prompt of a task; None means as the task or core.yaml says, else 0"""
    limit: int | None = None
    """number of rows of each task, at most; None means all"""
    out: Path | None = None
    """JSON file for the scores"""
    kernels: str | None = None
    """kernels to compute with, see `dsv3 info PRESET --kernels`; None means the run's own"""


def run(argv: list[str]) -> int:
    """Print the measures, one a line."""
    args = parse(Eval, argv, "eval")
    if args.batches is not None and args.batches < 1:
        raise ValueError(f"batches={args.batches} is below 1")
    if args.tasks is not None and args.lm_eval:
        raise ValueError(f"tasks={str(args.tasks)!r} and lm_eval={args.lm_eval}: choose one")
    if args.tasks is not None or args.lm_eval:
        for name in ("paths", "batches", "cache_dtype"):
            if (value := getattr(args, name)) != getattr(Eval, name):
                raise ValueError(f"{name}={value!r} is for held-out text, not for tasks")
        return _score(args, argv) if args.tasks is not None else _score_by_harness(args, argv)
    if not args.shots is args.limit is args.out is None:
        raise ValueError("shots, limit and out are for tasks; add --tasks FOLDER or --lm-eval NAME")
    return _measure(args)


def _measure(args: Eval) -> int:
    from dsv3_jax.data import tokenizer
    from dsv3_jax.report.progress import text_console
    from dsv3_jax.runs.evaluate import evaluate
    from dsv3_jax.runs.open_model import open_model
    from dsv3_jax.stats.cache_quality import cache_quality
    from dsv3_jax.stats.reading import open_text

    # The held-out text of the run, or other text that the user names.
    model, run, step = open_model(args.run, step=args.step, kernels=args.kernels)
    text = tokenizer.load(run.data.tokenizer)
    most = OWN_BATCHES if args.batches is None and not args.paths else args.batches
    reading = open_text(run.data, args.run, text, paths=args.paths, batches=most)
    batches = reading.batches
    measures = evaluate(model, batches, text, reading.domains, mix=reading.mix)

    console = text_console()
    console.print(f"step {step}")
    for name, value in measures.items():
        if name != "load" and value != []:  # no heads, no drafts
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
    from dsv3_jax.host.files import check_writable
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

    _write(args, argv, step, dataclasses.asdict(scores))
    return 0


def _score_by_harness(args: Eval, argv: list[str]) -> int:
    import lm_eval  # `guarded` says that it is missing
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from dsv3_jax.host.files import check_writable
    from dsv3_jax.report.progress import text_console
    from dsv3_jax.runs.open_model import load_text, open_model
    from dsv3_jax.scores.harness import harness_model

    # An unknown name is found before the model is loaded.
    manager = TaskManager()
    for name in args.lm_eval:
        if name not in manager.all_tasks:
            near = did_you_mean(name, manager.all_tasks)
            raise ValueError(f"lm_eval={name!r} is no task of lm-evaluation-harness{near}")
    check_writable(args.out)

    model, _, step = open_model(args.run, step=args.step, kernels=args.kernels)
    found = lm_eval.simple_evaluate(
        harness_model(model, load_text(args.run)),
        tasks=list(args.lm_eval),
        num_fewshot=args.shots,
        limit=args.limit,
        task_manager=manager,
    )
    text_console().print(make_table(found))
    _write(args, argv, step, {"lm_eval": found["results"]})
    return 0


def _write(args: Eval, argv: list[str], step: int, scores: dict[str, Any]) -> None:
    """Write scores to --out, with what is needed to repeat them."""
    from dsv3_jax.host.files import write_atomic

    if args.out is None:
        return
    versions = {name: importlib.metadata.version(name) for name in ("dsv3-jax", "jax")}
    imports = [word for name in IMPORTED for word in ("--import", name)]
    facts = {
        "command": shlex.join(["dsv3", "eval", *argv, *imports]),
        "model": str(args.run),
        "step": step,
        "versions": versions,
    }
    write_atomic(args.out, json.dumps(facts | scores, indent=1, default=str) + "\n")


def _format(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:.4f}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(f"{v:.4f}" for v in value)
    return f"{value:.4f}"
