"""The peer of both benchmarks: transformers' DeepseekV3ForCausalLM, float32, on the CPU.

A worker, so that torch and JAX share neither a process nor its threads. The interpreter needs torch
and transformers, but not this project's package.
"""

import statistics
import sys
import time
from collections.abc import Callable

from process import draw_tokens, peak_rss, serve


def prepare(
    config: dict, decoding: bool = False, experts: str = "grouped_mm", threads: int = 2
) -> tuple[dict, Callable[..., dict]]:
    """Build the model with random weights.

    Args:
        config: a released config.json's values, as `hf.config_writing.config_to_dict` has them.
        decoding: answer `_decoder`'s commands, not `_trainer`'s.
        experts: "grouped_mm" (one grouped product over all experts; transformers 5.24 has it by
            default) or "eager" (a Python loop).
        threads: of torch; both sides should have the same cores.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            f"package={error.name!r} is not installed, but the peer needs it: "
            "pip install torch transformers"
        ) from error
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = config | {"num_mtp_layers": 0, "use_cache": decoding}
    net = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **config, attn_implementation="sdpa", experts_implementation=experts
        )
    ).float()
    info = {
        "parameters": sum(p.numel() for p in net.parameters()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return info, _decoder(net.eval()) if decoding else _trainer(net.train())


def _trainer(net) -> Callable[..., dict]:
    """Return what runs training steps as a user of transformers writes them.

    AdamW has the recipe's settings (DeepSeek-V3 report, section 4.2); matrices alone decay.
    """
    import torch

    matrices = [p for p in net.parameters() if p.ndim > 1]
    norms = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2.2e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def step(ids) -> float:
        loss = net(input_ids=ids, labels=ids).loss  # transformers shifts the labels itself
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def handle(steps: int, batch: int = 4, length: int = 512) -> dict:
        ids = torch.from_numpy(draw_tokens(batch, length, net.config.vocab_size))
        seconds, losses = [], []
        for _ in range(steps):
            start = time.perf_counter()
            losses.append(step(ids))
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "loss": losses, "peak_rss_bytes": peak_rss()}

    return handle


def _decoder(net) -> Callable[..., dict]:
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
        return {
            "prefill_seconds": prefilled - start,
            "step_seconds": statistics.mean(steps),
            "cache_bytes": cache_bytes,
            "cache_bytes_per_token": cache_bytes / (batch * cache.get_seq_length()),
            "peak_rss_bytes": peak_rss(),
        }

    return handle


if __name__ == "__main__":
    sys.exit(serve(prepare))
