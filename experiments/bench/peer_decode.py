"""The peer of the decoding benchmark: a worker with transformers' DeepseekV3ForCausalLM.

The model reads and writes its DynamicCache. `PeerDecodeWorker(cfg)` starts this file, which prints
one line of JSON when it is ready. Then it answers JSON objects, one per line, {"batch", "context",
"new_tokens", "prefill_chunk"}: prefill of random prompts, then greedy decoding.

The loop here does what `generate` does (logits of the last token only, `past_key_values` passed
on), without its code for stopping and for processors. `"through": "generate"` times `generate`
itself. The two differ by less than repeated runs.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

from peer_transformers import EXPERTS, draw_tokens, prepare
from process import Worker, limit_memory, peak_rss, serve


class PeerDecodeWorker(Worker):
    """A worker that decodes with transformers; see `PeerTrainWorker` for the arguments."""

    def __init__(self, cfg, *, experts="grouped_mm", threads=2, seed=0, python=None, env=None):
        # Here, because the worker's interpreter may lack dsv3_jax.
        from dsv3_jax.config import to_dict

        command = [python or sys.executable, __file__, "--config", json.dumps(to_dict(cfg))]
        command += [f"--experts={experts}", f"--threads={threads}", f"--seed={seed}"]
        super().__init__("transformers", command, {"OMP_NUM_THREADS": str(threads)} | (env or {}))

    def decode(self, batch: int, context: int, new_tokens: int, prefill_chunk: int = 0) -> dict:
        """Measure the seconds of a prefill and of a step, the cache's bytes, and the peak memory.

        Args: prefill_chunk: prompt tokens per forward pass; 0 means all.
        """
        cell = {
            "batch": batch,
            "context": context,
            "new_tokens": new_tokens,
            "prefill_chunk": prefill_chunk,
        }
        return self.ask(json.dumps(cell))


def decode(net, ids, new_tokens: int, prefill_chunk: int) -> dict:
    """Prefill ids int64 [B, T], then decode greedily with the model's own cache."""
    import torch

    def forward(tokens, cache):
        out = net(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    with torch.inference_mode():
        start, cache = time.perf_counter(), None
        for piece in ids.split(prefill_chunk or ids.shape[1], dim=1):
            token, cache = forward(piece, cache)
        prefilled = time.perf_counter()
        steps = []
        for _ in range(new_tokens - 1):
            before = time.perf_counter()
            token, cache = forward(token, cache)
            steps.append(time.perf_counter() - before)
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {
        "prefill_seconds": prefilled - start,
        "step_seconds": statistics.mean(steps),
        "cache_bytes": cache_bytes,
        "cache_bytes_per_token": cache_bytes / (ids.shape[0] * cache.get_seq_length()),
        "peak_rss_bytes": peak_rss(),
    }


def generate(net, ids, new_tokens: int) -> dict:
    """The same by the library's own `generate`: the time of one token is taken off that of all."""
    import torch

    seconds = []
    for count in (1, new_tokens):
        start = time.perf_counter()
        with torch.inference_mode():
            net.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                min_new_tokens=count, do_sample=False, use_cache=True, pad_token_id=0,
            )  # fmt: skip
        seconds.append(time.perf_counter() - start)
    return {
        "prefill_seconds": seconds[0],
        "step_seconds": (seconds[1] - seconds[0]) / (new_tokens - 1),
        "peak_rss_bytes": peak_rss(),
    }


def _decoder(args) -> tuple[dict, Callable[[str], dict]]:
    limit_memory()
    net, info = prepare(args.config, args.experts, args.threads, args.seed)
    net.eval()
    net.config.use_cache = True  # the training settings disable it
    import torch

    def handle(line: str) -> dict:
        cell = json.loads(line)
        if cell["new_tokens"] < 2:
            raise ValueError(
                f"new_tokens={cell['new_tokens']} is too small: "
                "prefill makes the first; use at least 2"
            )
        ids = torch.from_numpy(
            draw_tokens(args.seed, cell["batch"], cell["context"], net.config.vocab_size)
        )
        if cell.get("through") == "generate":
            return generate(net, ids, cell["new_tokens"])
        return decode(net, ids, cell["new_tokens"], cell.get("prefill_chunk", 0))

    return info, handle


def main() -> int:
    parser = argparse.ArgumentParser(
        description="A worker that decodes with transformers' DeepseekV3ForCausalLM."
    )
    parser.add_argument("--config", required=True, help="a ModelConfig as JSON, or the path of one")
    parser.add_argument("--experts", default="grouped_mm", help=" or ".join(EXPERTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    return serve(lambda: _decoder(args))


if __name__ == "__main__":
    sys.exit(main())
