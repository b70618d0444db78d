"""Base recipes that variants change, the package's own and those of the tasks; common changes."""

import json
from collections.abc import Sequence
from pathlib import Path

from dsv3_jax.config import (
    Balance,
    DataConfig,
    OptimConfig,
    RunConfig,
    from_dict,
    replace,
    to_dict,
)
from dsv3_jax.presets import recipe

RUNS_FOLDER = "runs/lab"  # relative to the repository
NO_BALANCE = Balance(bias_rate=0.0, sequence_alpha=0.0)


def at_rate(optim: OptimConfig, rate: float) -> OptimConfig:
    """Return the optimizer with another learning rate, which decays to a twentieth."""
    return replace(optim, learning_rate=rate, final_learning_rate=rate / 20)


def lasting(run: RunConfig, steps: int) -> RunConfig:
    """Return the run with so many steps, evaluated and saved at its end alone."""
    return replace(run, steps=steps, eval_every=steps, save_every=steps)


# Two layers that are too small for the facts that they are asked to store: 16,384 of 6 bits.
# Learning begins after some 250 steps; at twice the rate it begins after 400 to 800, by seed, and
# less is learnt.
_FACTS = RunConfig(
    model=replace(
        recipe("lab").model,
        vocab_size=260, dim=48, num_layers=2, num_dense_layers=0, dense_dim=32, num_heads=2,
        q_latent_dim=None, kv_latent_dim=16, nope_head_dim=12, rope_head_dim=8, v_head_dim=12,
        num_experts=31, experts_per_token=3, num_shared_experts=1, expert_dim=8, max_positions=16,
    ),
    data=DataConfig(seq_len=3, batch_size=512),
    optim=OptimConfig(learning_rate=5e-3, final_learning_rate=2.5e-4, warmup_steps=20),
    steps=2000, eval_every=2000, eval_batches=32, save_every=1000, keep=1,
)  # fmt: skip
# Two dense layers that learn one-hop retrieval within L = 64 in 160 steps.
_RETRIEVAL = RunConfig(
    model=replace(
        recipe("lab").model,
        vocab_size=260, dim=64, num_layers=2, num_dense_layers=2, dense_dim=128, num_heads=4,
        q_latent_dim=None, kv_latent_dim=32, nope_head_dim=16, rope_head_dim=16, v_head_dim=16,
        max_positions=64,
    ),
    data=DataConfig(seq_len=64, batch_size=32),
    optim=OptimConfig(learning_rate=6e-3, final_learning_rate=3e-4, warmup_steps=20),
    steps=160, eval_every=160, eval_batches=8, save_every=160, keep=1,
)  # fmt: skip
# The same model with 16 keys in a row of 48 tokens. Learning begins at a step that differs by run.
_MANY_KEYS = replace(
    _RETRIEVAL, data=DataConfig(seq_len=48, batch_size=32),
    steps=600, eval_every=600, eval_batches=32, save_every=600,
)  # fmt: skip
# One layer that is too small for 16 domains of 224 pairs: 16 experts, one a token, none shared.
_DOMAINS = replace(
    _FACTS,
    model=replace(
        _FACTS.model, dim=32, num_layers=1, num_experts=16, experts_per_token=1,
        num_shared_experts=0, expert_dim=4, normalize_gates=False, max_positions=32,
    ),
    data=DataConfig(seq_len=17, batch_size=128), steps=800, eval_every=800, save_every=800,
)  # fmt: skip
# The same model with a Markov chain a row. AdamW finds the pairs in some 300 steps, Muon in 120.
_CHAINS = replace(
    _RETRIEVAL,
    model=replace(_RETRIEVAL.model, max_positions=96), data=DataConfig(seq_len=64, batch_size=64),
    steps=600, eval_every=600, eval_batches=32, save_every=600, log_every=10,
)  # fmt: skip
# The same model with rows of two-token names. Muon finds the pairs in some 200 to 1,200 steps.
_NAMES = replace(
    _CHAINS,
    data=DataConfig(seq_len=40, batch_size=64), steps=1200, eval_every=1200, save_every=1200,
    optim=at_rate(replace(_CHAINS.optim, name="muon"), 1.2e-2),
)  # fmt: skip
# Two sparse layers that learn some of the sums of two numbers below 100: see 32.
_SUMS = replace(
    _RETRIEVAL,
    model=replace(
        recipe("tiny").model,
        dim=64, num_layers=2, num_dense_layers=0, dense_dim=128, num_heads=4, q_latent_dim=None,
        kv_latent_dim=32, nope_head_dim=16, rope_head_dim=8, v_head_dim=16, num_experts=16,
        experts_per_token=2, expert_dim=48, num_groups=1, groups_per_token=1, max_positions=64,
        mtp_depth=0,
    ),
    data=DataConfig(paths=("runs/lab/sums/text.jsonl",), seq_len=40, batch_size=64),
    steps=600, eval_every=600, eval_batches=8, save_every=600, keep=1,
)  # fmt: skip
OF_TASKS = {
    "facts": _FACTS, "retrieval": _RETRIEVAL, "many_keys": _MANY_KEYS, "domains": _DOMAINS,
    "chains": _CHAINS, "names": _NAMES, "sums": _SUMS,
}  # fmt: skip


def base_run(name: str, changes: Sequence[str] = ()) -> RunConfig:
    """Return a base recipe with changes.

    A vocabulary that is larger than the byte tokenizer's gets a tokenizer file in RUNS_FOLDER.

    Args:
        name: of the recipe: a key of OF_TASKS, or a preset's.
        changes: as `model.dim=128`; values are JSON or plain strings.
    Raises: ConfigError for an unknown recipe or an invalid value, ValueError for an unknown key.
    """
    values = to_dict(OF_TASKS[name] if name in OF_TASKS else recipe(name))
    for change in changes:
        key, _, value = change.partition("=")
        *path, last = key.split(".")
        inner = values
        for part in path:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or last not in inner:
            raise ValueError(
                f"--set={change!r} changes {key!r}, which is not a key of a run; "
                "write KEY=VALUE as steps=5000"
            )
        try:
            inner[last] = json.loads(value)
        except json.JSONDecodeError:
            inner[last] = value
    run = from_dict(RunConfig, values)
    if run.data.tokenizer == "bytes" and run.model.vocab_size > 512:
        tokenizer = f"{RUNS_FOLDER}/tokenizer-{run.model.vocab_size}.json"
        run = replace(run, data=replace(run.data, tokenizer=tokenizer))
    return run


def short_run(name: str = "lab") -> RunConfig:
    """Return a base recipe with a few tiny steps, to check that a study works."""
    if name in OF_TASKS:
        run = OF_TASKS[name]
        data = replace(run.data, batch_size=16)
    else:
        run = recipe("lab")
        data = replace(run.data, seq_len=64, batch_size=4, max_documents=60, val_fraction=0.2)
    return replace(
        run, data=data, optim=replace(run.optim, warmup_steps=2),
        steps=4, eval_every=2, eval_batches=2, save_every=4, log_every=1,
    )  # fmt: skip


def text_beside(base: RunConfig) -> RunConfig:
    """Return the recipe of text for a study of tasks that has text too; short if its base is."""
    is_short = base.steps == short_run("facts").steps
    return short_run() if is_short else base_run("lab")


def make_tokenizer(run: RunConfig, root: Path) -> None:
    """Train the tokenizer that all runs share, if its file is missing."""
    path = root / run.data.tokenizer
    if run.data.tokenizer == "bytes" or path.exists():
        return
    from dsv3_jax.data import tokenizer
    from dsv3_jax.data.corpus import load_corpus

    print(f"training a byte-level tokenizer with a vocabulary of {run.model.vocab_size}")
    # A quarter of the documents is enough for so few merges.
    documents = load_corpus(replace(run.data, tokenizer="bytes", seed=0)).train[::4]
    tokenizer.train_bpe((d.text for d in documents), run.model.vocab_size, str(path))
