"""The sides of the benchmarks: processes that are asked for measurements, see `harness.start`.

python worker.py SIDE OPTIONS

A side has its own interpreter or package: transformers' may lack JAX, and ours may be of an older
commit. So each function imports what it needs, and takes of the package what older commits have.
"""

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

from experiments import apart

# What a side's first line says, and what answers a question's fields.
Prepared = tuple[dict, Callable[..., dict]]


def draw_tokens(batch: int, length: int, vocab_size: int) -> np.ndarray:
    """Draw uniform random tokens int64 [B, T], the same for all sides of a benchmark."""
    return np.random.default_rng(0).integers(vocab_size, size=(batch, length))


# Training


def timed_steps(step: Callable[[], float], count: int) -> dict:
    """Run training steps. Args: step: returns the loss when all is done."""
    seconds, losses = [], []
    for _ in range(count):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
        # A step's memory is freed shortly after its results; the next step then reuses it.
        time.sleep(0.05)
    return {
        "seconds": seconds,
        "step_seconds": statistics.median(seconds),
        "loss": losses,
        "peak_rss_bytes": apart.peak_memory(),
    }


def train(config: dict, batch: int = 4, length: int = 512, kernels: str = "auto") -> Prepared:
    """Compile our training step.

    Args:
        config: a ModelConfig's fields; those left out have their defaults.
        batch, length: sequences and tokens of a step.
        kernels: as Execution.kernels; "xla" means no hand-written kernels.
    Returns: what is known of the program, and what answers `steps` (run so many) and `gemm` (the
        FLOP/s of a large float32 product).
    """
    from dsv3_jax.kernels.cpu.memory import keep_memory

    keep_memory()
    import jax

    import dsv3_jax as ds
    from dsv3_jax.config import from_dict
    from dsv3_jax.kernels import choose
    from dsv3_jax.report.speed import gemm_flops
    from dsv3_jax.training.state import Job, init_state
    from dsv3_jax.training.step import make_step
    from experiments.random_data import batch_of

    run = ds.RunConfig(
        model=from_dict(ds.ModelConfig, config),
        execution=ds.Execution(kernels=kernels),
        data=ds.DataConfig(seq_len=length, batch_size=batch),
        # as the peer's: a constant learning rate without warm-up
        optim=ds.OptimConfig(warmup_steps=0, decay_start=1.0, decay_end=1.0),
    )
    rows = batch_of(draw_tokens(batch, length, run.model.vocab_size))

    # This compiles the C++ kernels, which is not in compile_seconds.
    job = Job(run, kernels=choose.prepare(run.execution))
    state = jax.block_until_ready(init_state(job))
    start = time.perf_counter()
    compiled = make_step(job).lower(state, rows).compile()
    info = {
        "compile_seconds": time.perf_counter() - start,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
    }

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, rows)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    def handle(steps: int = 0, gemm: bool = False) -> dict:
        return {"flops": gemm_flops(seconds=1.0)} if gemm else timed_steps(step, steps)

    return info, handle


# Decoding


def decoded(prefill: float, step: float, cache: float, cache_per_token: float) -> dict:
    """The reply on a request: seconds of reading prompts and of a step, bytes of the cache."""
    return {
        "prefill_seconds": prefill,
        "step_seconds": step,
        "cache_bytes": cache,
        "cache_bytes_per_token": cache_per_token,
        "peak_rss_bytes": apart.peak_memory(),
    }


@contextlib.contextmanager
def filled_caches() -> Iterator[None]:
    """Fill caches with random rows where a model would read prompts."""
    import jax.numpy as jnp

    from experiments.random_data import filled_cache

    def prefill(model, tokens, lengths, cache, weights=None, given=None):
        chosen = (model.cfg.num_sparse_layers, *tokens.shape, model.cfg.experts_per_token)
        cache = filled_cache(cache).at_lengths(lengths)
        return model.embedding(tokens), cache, jnp.zeros(chosen, jnp.int32)

    with mock.patch("dsv3_jax.decoding.programs.prefill", prefill):
        yield


def decode(config: dict) -> Prepared:
    """Make our model. Args: config: as of `train`."""
    from dsv3_jax.kernels.cpu.memory import keep_memory

    keep_memory()
    import jax.numpy as jnp
    from flax import nnx

    from dsv3_jax.config import ModelConfig, from_dict
    from dsv3_jax.decoding.generate import generate
    from dsv3_jax.model.transformer import abstract
    from experiments.random_data import filled

    # One array by the other: the initialiser would add its temporary memory to the measured peak.
    rng = np.random.default_rng(0)

    def draw(key: Any, shape: tuple[int, ...], dtype: str, std: float) -> Any:
        value = rng.standard_normal(shape, np.float32)
        value *= std
        return jnp.asarray(value, dtype)

    cfg = from_dict(ModelConfig, config)
    model = nnx.merge(*filled(abstract(cfg), cfg.init_std, "float32", draw))

    def handle(batch: int, context: int, new_tokens: int, filled: bool = False, **settings) -> dict:
        """Time a request.

        Args:
            filled: no prompt is read, as a step's time does not depend on the cache's rows.
            settings: of `generate`.
        """
        prompts = draw_tokens(batch, context, cfg.vocab_size).tolist()
        with filled_caches() if filled else contextlib.nullcontext():
            out = generate(model, prompts, new_tokens, **settings)
        step = out.decode_seconds / out.steps
        return decoded(out.prefill_seconds, step, out.cache_bytes, out.cache_bytes_per_token)

    return {}, handle


# The peer


def peer(
    config: dict,
    batch: int = 4,
    length: int = 512,
    decoding: bool = False,
    experts: str = "grouped_mm",
    threads: int = 2,
) -> Prepared:
    """Build transformers' DeepseekV3ForCausalLM with random weights, in float32 on the CPU.

    Args:
        config: a released config.json's values, as `hf.config_writing.config_to_dict` has them.
        batch, length: sequences and tokens of a training step.
        decoding: answer `_peer_decodes`' questions, not `_peer_trains`'.
        experts: "grouped_mm" (one grouped product over all experts; transformers 5.24 has it by
            default) or "eager" (a Python loop).
        threads: of torch; both sides should have the same cores.
    """
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = config | {"num_mtp_layers": 0, "use_cache": decoding}
    net = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **config, attn_implementation="sdpa", experts_implementation=experts
        )
    ).float()
    if decoding:
        return {}, _peer_decodes(net.eval())
    return {}, _peer_trains(net.train(), draw_tokens(batch, length, net.config.vocab_size))


def _peer_trains(net: Any, tokens: np.ndarray) -> Callable[..., dict]:
    """Return what runs training steps as a user of transformers writes them.

    AdamW has the recipe's settings (DeepSeek-V3 report, section 4.2); matrices alone decay.
    """
    import torch

    ids = torch.from_numpy(tokens)
    matrices = [p for p in net.parameters() if p.ndim > 1]
    norms = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2.2e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def step() -> float:
        loss = net(input_ids=ids, labels=ids).loss  # transformers shifts the labels itself
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return lambda steps: timed_steps(step, steps)


def _peer_decodes(net: Any) -> Callable[..., dict]:
    """Return what reads random prompts and then decodes greedily with the model's DynamicCache.

    The loop does what `generate` does (logits of the last token only, `past_key_values` passed on),
    without its code for stopping and for processors.
    """
    import torch

    def forward(tokens, cache):
        out = net(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    def handle(batch: int, context: int, new_tokens: int, prefill_chunk: int = 0) -> dict:
        """Args: prefill_chunk: prompt tokens per forward pass; 0 means all."""
        ids = torch.from_numpy(draw_tokens(batch, context, net.config.vocab_size))
        with torch.inference_mode():
            start, cache = time.perf_counter(), None
            for piece in ids.split(prefill_chunk or context, dim=1):
                token, cache = forward(piece, cache)
            prefilled = time.perf_counter()
            steps = []
            for _ in range(new_tokens - 1):  # prefill makes the first
                before = time.perf_counter()
                token, cache = forward(token, cache)
                steps.append(time.perf_counter() - before)
        cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        per_token = cache_bytes / (batch * cache.get_seq_length())
        return decoded(prefilled - start, statistics.mean(steps), cache_bytes, per_token)

    return handle


def said(side: str, options: str) -> Iterator[dict]:
    """Prepare a side, and yield its lines."""
    prepare = {"train": train, "decode": decode, "peer": peer}[side]
    yield from apart.serve(*prepare(**json.loads(options)))


if __name__ == "__main__":
    sys.exit(apart.answer(said(*sys.argv[1:])))
