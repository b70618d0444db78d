"""The main job: train a small DeepSeek-V3 on real text, stop it, resume it, measure it, and hear it speak."""

import time
from pathlib import Path

from rich.console import Console

from dsv3_jax.config import RunConfig, replace
from dsv3_jax.data import tokenizer
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.decoding.generate import generate
from dsv3_jax.presets import recipe
from dsv3_jax.training.checkpoint import TOKENIZER_FILE, load_model
from dsv3_jax.training.loop import fit

VOCAB_SIZE = 1024
PROMPTS = ("def ", "class ", "#include ", "The ")


def demo_run(tokenizer_path: Path, short: bool) -> RunConfig:
    """The demo's run; `short` is for seconds: a small part of the text and a few steps.

    A small vocabulary of its own in place of bytes: three times the text for the same minutes.
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


def demo(out: Path, *, short: bool = False) -> int:
    """Run it in folder `out`; returns the exit code."""
    console = Console(highlight=False, soft_wrap=True)
    start = time.perf_counter()
    tokenizer_path = Path(out) / TOKENIZER_FILE
    run = demo_run(tokenizer_path, short)
    if not tokenizer_path.exists():
        console.print(f"training a vocabulary of {VOCAB_SIZE} byte-level tokens")
        tokenizer_path.parent.mkdir(parents=True, exist_ok=True)
        # The default text, every fourth document: enough for so few merges.
        documents = load_corpus(replace(run.data, tokenizer="bytes")).train[:: 1 if short else 4]
        tokenizer.train_bpe((d.text for d in documents), VOCAB_SIZE, str(tokenizer_path))
    half = run.steps // 2 // run.save_every * run.save_every or run.save_every
    # Stop half-way and go on from the checkpoint, as a run that was interrupted would.
    fit(run, out, stop_after=half)
    fitted = fit(run, out)
    model, _, _, _ = load_model(out)
    text = tokenizer.load(run.data.tokenizer)
    made = generate(
        model,
        [text.encode(p) for p in PROMPTS],
        16 if short else 80,
        temperature=0.5,
        top_p=0.95,
        stop_tokens=(text.eos_id,),
    )
    console.print("\nwhat it writes, from the latent cache, at temperature 0.5:")
    for prompt, tokens in zip(PROMPTS, made.tokens, strict=True):
        console.rule(prompt.strip(), style="dim", characters="-")
        console.print(prompt + text.decode(tokens), markup=False)
    console.rule(style="dim", characters="-")
    minutes = (time.perf_counter() - start) / 60
    console.print(f"done in {minutes:.1f} minutes; step {fitted.step}; the run is in {out}")
    return 0
