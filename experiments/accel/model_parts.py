"""The parts that measure a whole model: training, decoding, drafts, numbers that must be equal.

Defaults are the shapes for a device with 80 GB or more.
"""

import operator
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config import DataConfig, Execution, ModelConfig, RunConfig, replace
from dsv3_jax.decoding.generate import generate
from dsv3_jax.model.cache import pick_kind
from dsv3_jax.model.counting import bytes_per_token, train_flops_per_token
from dsv3_jax.model.decode import make_cache, prepare_decode, run_layers
from dsv3_jax.model.transformer import Transformer, abstract
from dsv3_jax.presets import preset, recipe
from dsv3_jax.training.state import Job, init_state
from dsv3_jax.training.step import make_step
from experiments.accel.measuring import (
    BFLOAT16,
    Figure,
    Part,
    kernels_for,
    longest,
    ran,
    seconds_of,
)
from experiments.bench.copying import decode_bytes
from experiments.random_data import batch_of, filled, filled_cache, keys

LITE = preset("v2_lite")
FEW_LAYERS = replace(LITE, num_layers=4)
WITH_HEAD = replace(LITE, mtp_depth=1)
SMALL = replace(preset("mini"), num_layers=2, mtp_depth=1)
BATCH_OF_BAR = 64  # of `decode`, whose bar is held


def train_run(cfg: ModelConfig, rows: int, length: int) -> RunConfig:
    """A run of a model, computed as V2-Lite's recipe says, in bfloat16."""
    execution = replace(recipe("v2_lite").execution, compute_dtype="bfloat16")
    data = DataConfig(seq_len=length, batch_size=rows)
    return RunConfig(model=cfg, execution=execution, data=data)


def step(cfg: ModelConfig = FEW_LAYERS, rows: int = 8, length: int = 4096) -> Part:
    """A training step: time, MFU, memory against the plan, and the bits of two runs."""
    run = train_run(cfg, rows, length)
    shape = (rows, length)
    batch = batch_of(jax.random.randint(jax.random.key(1), shape, 0, cfg.vocab_size, jnp.int32))
    label = f"{cfg.num_layers} layers, {rows}×{length} tokens"
    yield f"{label}: compile"
    state = jax.block_until_ready(init_state(Job(run)))
    held = sum(x.nbytes for x in jax.tree.leaves((state, batch)))
    compiled = make_step(Job(run, kernels=kernels_for())).lower(state, batch).compile()
    planned, chosen = held + compiled.memory_analysis().temp_size_in_bytes, ran()

    def steps(count: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(count):
            state, found = compiled(state, batch)
        if not bool(jax.block_until_ready(found)["finite"]):
            raise ValueError(f"the loss {float(found['loss'])} or a gradient is not finite")
        return (time.perf_counter() - start) / count

    yield f"{label}: run"
    steps(1)
    count = max(1, round(longest() / steps(1) / 2))
    took = statistics.median(steps(count) for _ in range(5))
    note = f"remat {run.execution.remat}"
    yield Figure(f"{label}, a step", took, "s", ran=chosen, note=note)
    yield Figure(f"{label}, speed", rows * length / took, "tokens/s")
    rate = train_flops_per_token(cfg) * rows * length / took
    limits = dict(against="sheet flops", bar="mfu", note="6 FLOPs a token and active parameter")
    yield Figure(f"{label}, useful work", rate, "FLOP/s", **limits)
    limits = dict(bound="planned memory", note="state and the compiler's temporaries")
    yield Figure(f"{label}, planned memory", planned, "B", **limits)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if peak:
        yield Figure(f"{label}, most memory used", peak, "B", against="planned memory")

    yield f"{label}: the same bits twice"
    found = []
    for _ in range(2):
        del state  # there is no room for two
        state = init_state(Job(run))
        steps(3)
        found.append(jax.device_get(sums_of_bits(state)))
    differ = int(sum(map(operator.ne, *map(jax.tree.leaves, found))))
    name = "arrays that differ after 3 steps, same seed"
    yield Figure(name, differ, "arrays", bar="equal", ran=chosen)


@jax.jit
def sums_of_bits(tree: Any) -> Any:
    """A number of each array's bits and their places; -0 is not 0, and NaN is NaN."""

    def of(x):
        width = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, width).reshape(-1)
        weights = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
        return (bits.astype(jnp.uint32) * weights).sum(dtype=jnp.uint32)

    return jax.tree.map(of, tree)


def decode(
    cfg: ModelConfig = LITE,
    batches: Sequence[int] = (BATCH_OF_BAR,),
    context: int = 4096,
    count: int = 32,
) -> Part:
    """Plain decoding after a long text: seconds a step, and the bytes that it must read a second.

    The cache is filled with random rows, because the prefill of the largest batch would need more
    memory than is there. Each step reads random tokens: random weights would soon repeat one token,
    and then few experts are read.

    Args:
        context: cached tokens of each sequence.
        count: steps of a program.
    """
    yield "weights"
    graph, state = filled(abstract(cfg, BFLOAT16, kernels_for()), cfg.init_std, "bfloat16")
    weights = jax.jit(lambda state: prepare_decode(nnx.merge(graph, state)))(state)
    kind = pick_kind(cfg, None)

    @partial(jax.jit, donate_argnums=2)
    def steps(state, weights, cache, drawn):
        """(The cache, the last tokens) after a step for each row of tokens `drawn`."""
        model = nnx.merge(graph, state)

        def one(carry, tokens):
            cache, last = carry
            tokens = (tokens + last) % cfg.vocab_size  # each step needs the one before
            x, cache, _ = run_layers(model, tokens[:, None], cache, weights)
            last = jnp.argmax(model.logits(model.norm(x))[:, 0], axis=-1).astype(jnp.int32)
            return (cache.at_lengths(cache.lengths + 1), last), None

        last = jnp.zeros(drawn.shape[1:], jnp.int32)
        return jax.lax.scan(one, (cache.at_lengths(last + context), last), drawn)[0]

    def seconds_of_step(batch: int) -> float:
        model = nnx.merge(graph, state)
        made = partial(make_cache, model, batch, context + count, kind, jnp.bfloat16)
        cache = filled_cache(jax.eval_shape(made))
        drawn = jax.random.randint(next(keys()), (count, batch), 0, cfg.vocab_size, jnp.int32)

        def call():
            nonlocal cache
            cache, last = steps(state, weights, cache, drawn)
            return last

        return seconds_of(call, samples=3) / count

    for batch in batches:
        label = f"{cfg.num_layers} layers, batch {batch}, {context} cached"
        yield label
        ran()
        took = seconds_of_step(batch)
        yield Figure(f"{label}, a step", took, "s", ran=ran(), note=f"{batch / took:,.0f} tokens/s")
        held = bytes_per_token(cfg, kind, "bfloat16")
        must = decode_bytes(cfg, batch, context + count // 2, held, weight_bytes=2)
        limits = dict(against="copy", bar="decode" if batch == BATCH_OF_BAR else "")
        yield Figure(f"{label}, weights and cache read", must / took, "B/s", **limits)


def drafts(
    cfg: ModelConfig = WITH_HEAD,
    batches: Sequence[int] = (1, 32),
    prompt: int = 1024,
    new: int = 64,
) -> Part:
    """Decoding with the model's own MTP head as the draft, and without, by batch.

    At temperature 1: untrained weights give nearly even distributions, of which a large share of
    drafts is accepted. Greedy text of random weights would accept none.
    """
    rng = np.random.default_rng(0)
    yield "weights"
    model = nnx.merge(*filled(abstract(cfg, BFLOAT16, kernels_for()), cfg.init_std, "bfloat16"))
    gains = []
    for batch in batches:
        prompts = rng.integers(0, cfg.vocab_size, (batch, prompt)).tolist()
        rates, steps, accepted = {}, {}, 0.0
        for draft, words in {None: "no drafts", "mtp": "MTP drafts"}.items():
            label, note = f"batch {batch}, {words}", ""
            yield label
            ran()
            _, *timed = (  # the first compiles
                generate(model, prompts, new, temperature=1.0, draft=draft) for _ in range(4)
            )
            rates[draft] = statistics.median(run.tokens_per_s for run in timed)
            steps[draft] = statistics.median(run.decode_seconds / run.steps for run in timed)
            if draft:
                accepted = timed[0].acceptance[0]
                note = f"{accepted:.0%} of the drafts accepted"
            name = f"{cfg.num_layers} layers, {label}"
            yield Figure(name, rates[draft], "tokens/s", ran=ran(), note=note)
        longer = steps["mtp"] / steps[None]
        note = f"batch {batch}: a step takes {longer:.2f} times as long, {accepted:.0%} accepted"
        gains.append((rates["mtp"] / rates[None], note))
    gain, note = max(gains)
    yield Figure("drafts over none, best batch", gain, "times", bar="drafts", note=note)


def exact(cfg: ModelConfig = SMALL, new: int = 64) -> Part:
    """Numbers that must be equal: greedy ids without drafts, and the bits of two runs of a seed."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, cfg.vocab_size, n).tolist() for n in (5, 17, 30)]
    # With less, two tokens about as likely may change places.
    with jax.default_matmul_precision("highest"):
        yield "greedy ids: no drafts"
        model = Transformer(cfg, Execution(), rngs=nnx.Rngs(0), kernels=kernels_for("float32"))
        plain = generate(model, prompts, new).tokens
        # Its untrained head's drafts are mostly rejected; the model's own are accepted.
        for name, draft in {"MTP drafts": "mtp", "the model's own drafts": model}.items():
            yield f"greedy ids: {name}"
            found = generate(model, prompts, new, draft=draft, draft_length=2)
            note = f"{found.mean_accepted:.2f} tokens a step, float32"
            differ = int(np.sum(np.not_equal(plain, found.tokens)))
            label = f"greedy ids that differ with {name}"
            yield Figure(label, differ, "ids", bar="equal", note=note)

    yield "the same ids twice: sampling"
    model = Transformer(cfg, BFLOAT16, rngs=nnx.Rngs(0), kernels=kernels_for())
    first, second = (
        generate(model, prompts, new, temperature=1.0, seed=1).tokens for _ in range(2)
    )
    differ = int(np.sum(np.not_equal(first, second)))
    yield Figure("sampled ids that differ, same seed", differ, "ids", bar="equal", ran=ran())
