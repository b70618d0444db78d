"""`dsv3 demo`: train a small DeepSeek-V3 on real text, let it write, and draw its experts."""

import time
from dataclasses import dataclass
from pathlib import Path

from dsv3_jax.cli.common import parse, prepare_training
from dsv3_jax.config import RunConfig, replace
from dsv3_jax.presets import recipe

VOCAB_SIZE = 1024


@dataclass
class Demo:
    """Train a small model on this Python's own text, score it, let it write, draw its experts.

    It takes about five minutes on two CPU cores. Ctrl-C stops it, and the same command resumes.
    """

    out: Path = Path("runs/demo")
    """folder of the run"""
    short: bool = False
    """train a few steps of a smaller run only: about a minute"""


def demo_run(tokenizer_path: Path, short: bool) -> RunConfig:
    """The demo's run; `short` takes a small part of the text and a few steps.

    A small vocabulary in place of bytes: three times the text for the same minutes.
    """
    run = recipe("tiny")
    run = replace(
        run,
        model=replace(run.model, vocab_size=VOCAB_SIZE),
        data=replace(run.data, tokenizer=str(tokenizer_path)),
    )
    if not short:
        return run
    return replace(
        run,
        data=replace(run.data, seq_len=64, batch_size=4, max_documents=60, val_fraction=0.2),
        optim=replace(run.optim, warmup_steps=4),
        steps=12, eval_every=6, eval_batches=2, save_every=6, log_every=2,
    )  # fmt: skip


def run(argv: list[str]) -> int:
    """Run the demo."""
    args = parse(Demo, argv, "demo")
    out, short = args.out, args.short
    prepare_training()
    from dsv3_jax.cli import demo_end
    from dsv3_jax.data import tokenizer
    from dsv3_jax.data.corpus import load_corpus
    from dsv3_jax.report.progress import text_console
    from dsv3_jax.runs.checkpoint import load_run
    from dsv3_jax.runs.folder import RUN_FILE, TOKENIZER_FILE, refuse_other_files
    from dsv3_jax.runs.loop import fit
    from dsv3_jax.runs.open_model import load_text
    from dsv3_jax.scores.made import write_tasks
    from dsv3_jax.scores.score import score_tasks

    if not (out / RUN_FILE).exists():
        refuse_other_files(out)

    # The vocabulary is trained on the text that the model learns.
    console = text_console()
    start = time.perf_counter()
    tokenizer_path = out / TOKENIZER_FILE
    tasks = out / "tasks"
    run = demo_run(tokenizer_path, short)
    minutes = "a minute" if short else "five minutes"
    console.print(f"reading this Python's text; on two CPU cores all takes about {minutes} …")
    corpus = load_corpus(run.data)
    if not tokenizer_path.exists():
        console.print(f"training a vocabulary of {VOCAB_SIZE} byte-level tokens …")
        tokenizer_path.parent.mkdir(parents=True, exist_ok=True)
        # Every fourth document of the default text: enough for so few merges.
        documents = corpus.train[:: 1 if short else 4]
        tokenizer.train_bpe((d.text for d in documents), VOCAB_SIZE, str(tokenizer_path))

    console.print("encoding the text …")
    result = fit(run, out, callbacks=[demo_end.Estimate()])
    if not result.finished:  # `fit` has said so
        return 0

    # Tasks of the held-out text, which the model has not seen.
    console.print("scoring the model on tasks of held-out text …")
    if not tasks.exists():
        write_tasks(tasks, [document.text for document in corpus.val], rows=16 if short else 200)
    model = load_run(out).model
    text = load_text(out)
    score_tasks(model, text, tasks, say=console.print)

    console.print("continuing held-out code …")
    found = demo_end.continued(model, text, corpus.val, rows=8 if short else 128)
    demo_end.show(found)
    console.print("counting which experts held-out text is routed to …")
    page = demo_end.write_page(out, short)

    took = (time.perf_counter() - start) / 60
    console.print(f"\ndone in {took:.1f} minutes; step {result.step}; the run is in {out}")
    console.print(f"{demo_end.MEANINGS}\n\nto go on, paste one of these:")
    for command in demo_end.commands(demo_end.program(), out):
        console.print(f"  {command}")
    console.print(f"the page of its experts: {page}")
    return 0
