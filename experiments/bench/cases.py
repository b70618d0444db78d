"""The benchmarks on the CPU by name.

python experiments/bench/cases.py                              # lists the cases
python experiments/bench/cases.py step sampler                 # measures some, and stores the rows
python experiments/bench/cases.py caches 'cells=["1024x1"]'    # with another setting
python experiments/bench/cases.py --table                      # prints all that is stored

Settings are the arguments of a case's function, in JSON. The sides of a case take turns, after an
uncounted run of each, so that a machine that slows down slows all of them.
"""

import argparse
import inspect
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dsv3_jax as ds
from dsv3_jax.data.manifest import read_manifest
from dsv3_jax.kernels.choose import prepare
from dsv3_jax.runs import checkpoint as saving
from dsv3_jax.training import optim
from dsv3_jax.training.state import Job, abstract_state, init_state, split_trainable
from dsv3_jax.training.step import make_step
from experiments.bench import decode, results, serving, train_step
from experiments.bench.process import ROOT, draw_tokens, in_turns, ratio
from experiments.bench.results import Rows


def seconds(work: Callable[[], Any]) -> float:
    """Return the time until a call's arrays are there."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


CHAIN = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(2.2e-4, 0.9, 0.95, weight_decay=0.1)
)
OPTIMIZERS: dict[str, tuple[dict, optax.GradientTransformation | None]] = {
    "adamw": ({}, None),
    "muon": ({"name": "muon"}, None),
    "optax chain of adamw": ({}, CHAIN),
    "muon, qk_clip 100": ({"name": "muon", "qk_clip": 100.0}, None),
}


class Optimizer:
    """One optimizer: a complete step, and its update alone on gradients that are there."""

    def __init__(self, run: ds.RunConfig, tx: optax.GradientTransformation | None, batch: dict):
        kernels = prepare(run.execution)
        job = Job(run, kernels=kernels, optimizer=tx)
        self.state, self.batch, self.step_fn = init_state(job), batch, make_step(job)
        update = optim.make(run.optim, run.steps, kernels, tx).update
        self.update_fn = jax.jit(update, donate_argnums=(1, 2))
        self.params = jax.tree.map(jnp.copy, split_trainable(run, self.state.params)[0])
        self.opt = jax.tree.map(jnp.copy, self.state.opt)
        self.grads = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), self.params)

    def step(self):
        self.state, metrics = self.step_fn(self.state, self.batch)
        return metrics

    def update(self):
        # QK-clip's own part is in `step` alone: it needs the forward pass.
        args = self.state.step, self.params, self.opt, self.grads, jnp.float32(1), jnp.bool_(True)
        self.params, self.opt = self.update_fn(*args)
        return self.params


def optimizer(name: str = "tiny", rounds: int = 7) -> Rows:
    """How much longer is a step with Muon, QK-clip or an optax chain than with the fused AdamW?"""
    run = ds.recipe(name)
    shape = run.data.batch_size, run.data.seq_len
    tokens = jnp.asarray(draw_tokens(*shape, run.model.vocab_size), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": positions}
    calls = {}
    for side, (changes, tx) in OPTIMIZERS.items():
        one = Optimizer(ds.replace(run, optim=ds.replace(run.optim, **changes)), tx, batch)
        calls[side, "step"] = partial(seconds, one.step)
        calls[side, "update"] = partial(seconds, one.update)
    times = in_turns(calls, rounds)
    for side in OPTIMIZERS:
        step, update = times[side, "step"], times[side, "update"]
        row = {
            "step_s": median(step),
            "step_over_adamw": ratio(step, times["adamw", "step"]),
            "update_ms": 1e3 * median(update),
            "update_over_adamw": ratio(update, times["adamw", "update"]),
        }
        yield side, row


def checkpoint(megabytes: float = 470.0, rounds: int = 5) -> Rows:
    """What do the CRC-32 of a checkpoint's files cost? About so many megabytes are saved."""
    # An embedding and a head of 4,096 tokens, AdamW's two means.
    width = int(megabytes * 1e6 / 12 / (2 * 4096))
    run, rng = ds.recipe("tiny"), np.random.default_rng(0)
    model = ds.replace(run.model, dim=width, vocab_size=4096, num_layers=1, mtp_depth=0)
    run = ds.replace(run, model=model)

    def fill(like):  # random numbers do not compress, as trained weights do not
        if jnp.issubdtype(like.dtype, jnp.floating):
            return jnp.asarray(rng.standard_normal(like.shape, np.float32), like.dtype)
        return jnp.zeros(like.shape, like.dtype)

    state = jax.tree.map(fill, abstract_state(Job(run)))
    megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6

    def save(folder: Path, write_manifest: Callable[..., None]) -> tuple[float, float]:
        """Save into an empty folder. Returns: CPU seconds of all threads, seconds that pass."""
        shutil.rmtree(folder, ignore_errors=True)
        with (
            mock.patch.object(saving, "write_manifest", write_manifest),
            saving.Checkpoints(folder, run) as checkpoints,
        ):
            cpu, wall = time.process_time(), time.perf_counter()
            checkpoints.save(state, {"piece": 0}, wait=True)
            return time.process_time() - cpu, time.perf_counter() - wall

    kinds = {"no checksums": lambda *_: None, "zlib's CRC-32": saving.write_manifest}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "run")
        saves = in_turns(
            {kind: partial(save, folder, write) for kind, write in kinds.items()}, rounds
        )
    for kind, found in saves.items():
        cpu, wall = map(median, zip(*found, strict=True))
        yield kind, {"megabytes": megabytes, "save_cpu_s": cpu, "save_s": wall}


# Reads batches of shards as training does. Prints tokens, CPU seconds, and resident megabytes after
# each tenth of the time, without pages of files: the system takes those back when it needs room.
READER = """
import json, sys, time
from dsv3_jax.config import DataConfig
from dsv3_jax.data import tokenizer
from dsv3_jax.data.source import open_source
folder, spec, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000

cfg = DataConfig(paths=(folder,), format="shards", tokenizer=spec, seq_len=512, batch_size=16)
batches = open_source(cfg, tokenizer.load(spec)).train_batches(None)
next(batches)
begin, cpu, tokens, memory = time.monotonic(), time.process_time(), 0, [anonymous()]
while (passed := time.monotonic() - begin) < seconds:
    tokens += next(batches)["tokens"].size
    if passed > len(memory) * seconds / 10:
        memory.append(anonymous())
print(json.dumps({"tokens": tokens, "cpu": time.process_time() - cpu, "memory": memory}))
"""


def write_text(folder: Path, megabytes: float) -> int:
    """Write the standard library's sources over and over, each copy with a number, as JSONL.

    Returns: bytes of text.
    """
    folder.mkdir()
    written = 0
    for copy in itertools.count():
        with (folder / f"{copy:05d}.jsonl").open("w") as file:
            for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
                if "site-packages" in path.parts or path.stat().st_size >= 200_000:
                    continue
                text = f"# copy {copy}\n{path.read_text(encoding='utf-8', errors='replace')}"
                file.write(json.dumps({"text": text, "domain": f"d{len(text) % 4}"}) + "\n")
                written += len(text.encode())
                if written >= megabytes * 1e6:
                    return written
    raise AssertionError("the loop has no end")


def run_python(*argv: str) -> tuple[str, float, float]:
    """Run a process to its end.

    Returns: (its output, CPU seconds, the largest resident megabytes of any process so far).
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, cpu, after.ru_maxrss / 1000


def pipeline(
    megabytes: Sequence[float] = (100, 1000), tokenizer: str = "bytes", read_s: float = 30.0
) -> Rows:
    """How fast are tokenizing and reading shards, and does memory depend on the size of the text?

    CPU seconds are of all threads, so a busy machine counts less than it does by the clock.

    Args:
        megabytes: ascending sizes of the text.
        tokenizer: "bytes", or "bpe" for 4,096 tokens that are learnt from the text.
        read_s: seconds of reading.
    """
    for size in megabytes:
        with tempfile.TemporaryDirectory(prefix="pipeline-") as name:
            text, shards, spec = Path(name, "text"), Path(name, "shards"), "bytes"
            written = write_text(text, size)
            command = ["-m", "dsv3_jax.cli"]
            if tokenizer == "bpe":
                spec, first = str(Path(name, "tokenizer.json")), str(text / "00000.jsonl")
                run_python(*command, "tokenizer", spec, "--vocab-size", "4096", "--paths", first)
            options = ["--out", str(shards), "--tokenizer", spec, "--row-tokens", "4096"]
            _, cpu, peak = run_python(*command, "data", "tokenize", str(text), *options)
            files = read_manifest(shards).files.values()
            tokens = sum(count for facts in files for _, _, count in facts["domains"])
            out, *_ = run_python("-c", READER, str(shards), spec, str(read_s))
            read = json.loads(out.splitlines()[-1])
        row = {
            "megabytes": written / 1e6,
            "tokens": tokens,
            "tokenized_per_cpu_s": tokens / cpu,
            "peak_memory_mb": peak,
            "read_per_cpu_s": read["tokens"] / read["cpu"],
            "reader_mb_first": read["memory"][0],
            "reader_mb_last": read["memory"][-1],
        }
        yield f"{tokenizer}, {size:g} MB", row


def sampler(
    rounds: int = 5,
    samples: Sequence[int] = (1, 4),
    batch_sizes: Sequence[int] = (8, 16, 32),
    prompts: int = 64,
    new: int = 128,
) -> Rows:
    """How much faster are refilled rows than one row at a time, for prompts of unequal lengths?

    The model is the demo's with random weights, in float32. A text ends with one of 16 of its 1,024
    tokens, so lengths are about geometric with a mean of 64, cut at `new`. Seconds include prefill.
    """
    cfg = ds.replace(ds.preset("tiny"), vocab_size=1024)
    model, rng = ds.Transformer(cfg, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    texts = [rng.integers(cfg.vocab_size, size=n).tolist() for n in rng.integers(4, 65, prompts)]
    stops = rng.choice(cfg.vocab_size, 16, replace=False).tolist()
    one_row = "one row: a call for each prompt"

    def sample(count: int, size: int | None) -> tuple[float, list]:
        """Args: size: rows of a batch; None means a call for each prompt."""
        start, found = time.perf_counter(), []
        for some in [texts] if size else [[text] for text in texts]:
            how = dict(temperature=1.0, stop_tokens=stops, samples=count, batch_size=size or 1)
            found += ds.generate(model, some, new, **how).tokens
        return sum(map(len, found)) / (time.perf_counter() - start), found

    for count in samples:
        sides = {one_row: partial(sample, count, None)}
        sides |= {f"{size} rows": partial(sample, count, size) for size in batch_sizes}
        turns = in_turns(sides, rounds)
        rates = {side: [rate for rate, _ in found] for side, found in turns.items()}
        first = turns[one_row][0][1]
        for side, found in turns.items():
            assert all(sampled == first for _, sampled in found), f"{side}: other texts"
            row = {
                "tokens_per_s": median(rates[side]),
                "least": min(rates[side]),
                "most": max(rates[side]),
                "x": ratio(rates[side], rates[one_row]),
                "tokens": sum(map(len, first)),
                "median_length": median(map(len, first)),
            }
            yield f"samples a prompt: {count}, {side}", row


CASES: dict[str, Callable[..., Rows]] = {
    "step": train_step.against_peer,
    "experts": train_step.experts,
    "length": train_step.length,
    "depth": train_step.depth,
    "caches": decode.caches,
    "commits": decode.commits,
    "optimizer": optimizer,
    "checkpoint": checkpoint,
    "pipeline": pipeline,
    "sampler": sampler,
    "serving": serving.serving,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="NAME | SETTING=JSON")
    parser.add_argument("--table", action="store_true", help="print all that is stored")
    args = parser.parse_args()
    settings = {k: json.loads(v) for k, _, v in (w.partition("=") for w in args.words if "=" in w)}
    names = [word for word in args.words if "=" not in word]
    for name in names:
        if name not in CASES:
            parser.error(f"case={name!r} is not one of {', '.join(CASES)}")
        if unknown := set(settings) - set(inspect.signature(CASES[name]).parameters):
            parser.error(f"{min(unknown)!r} is not a setting of {name}")
    for name in names:
        for row_name, row in CASES[name](**settings):
            print(f"{name}, {row_name}: {row}", flush=True)
            results.save(name, row_name, row)
    stored = results.load()
    for name in stored if args.table else names:
        print(f"\n{name}\n\n{results.table(stored[name])}")
    if not names and not args.table:
        for name, measure in CASES.items():
            question = (measure.__doc__ or "").splitlines()[0]
            defaults = inspect.signature(measure).parameters.values()
            print(f"{name}: {question}")
            print("   ", *(f"{setting.name}={json.dumps(setting.default)}" for setting in defaults))


if __name__ == "__main__":
    main()
