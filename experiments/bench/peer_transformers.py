"""The peer of the benchmarks: transformers' DeepseekV3ForCausalLM, float32, on the CPU.

As a library: `PeerTrainWorker(cfg, experts="grouped_mm")` starts this file as a worker process and
asks it for steps. So torch and JAX share neither a process nor its threads, and the benchmark can
let the two take turns.

As a worker: `python peer_transformers.py --config model.json --experts grouped_mm` builds the model
and prints one line of JSON. Then it handles one command per line: `step N` (runs N steps, prints
one line of JSON), `quit`.

A step is what a user of transformers writes: forward with labels, backward, gradients clipped to a
norm of 1, AdamW, gradients set to None. Attention is torch's fused one ("sdpa"), and AdamW has
`fused=True`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from process import Worker, peak_rss, serve

EXPERTS = ("grouped_mm", "eager")  # transformers' names; 5.24 uses grouped_mm by default


def draw_tokens(seed: int, batch_size: int, seq_len: int, vocab_size: int) -> np.ndarray:
    """Draw uniform random tokens int64 [B, T], the same for both sides of the benchmark."""
    return np.random.default_rng(seed).integers(vocab_size, size=(batch_size, seq_len))


def hf_config(model: dict) -> dict:
    """Translate a ModelConfig, as `config.to_dict` returns it, to transformers' names.

    Raises: ValueError for a model that DeepseekV3ForCausalLM cannot train: another router, MTP, no
        shared expert.
    """
    needs = {"attention": "mla", "router": "sigmoid", "group_score": "top2_sum", "mtp_depth": 0}
    for key, value in needs.items():
        if model[key] != value:
            raise ValueError(
                f"{key}={model[key]!r} is not supported by this peer: use {key}={value!r}"
            )
    if model["num_shared_experts"] < 1:
        raise ValueError(
            f"num_shared_experts={model['num_shared_experts']} is not supported by this peer: "
            "use at least 1"
        )
    yarn = model["yarn"]
    rope = {"rope_type": "default", "rope_theta": model["rope_theta"]}
    if yarn["factor"] > 1:
        rope |= {
            "rope_type": "yarn",
            "factor": yarn["factor"],
            "original_max_position_embeddings": yarn["original_max_positions"],
            "beta_fast": yarn["beta_fast"],
            "beta_slow": yarn["beta_slow"],
            "mscale": yarn["mscale"],
            "mscale_all_dim": yarn["mscale_all_dim"],
        }
    return {
        "vocab_size": model["vocab_size"],
        "hidden_size": model["dim"],
        "num_hidden_layers": model["num_layers"],
        "first_k_dense_replace": model["num_dense_layers"],
        "intermediate_size": model["dense_dim"],
        "num_attention_heads": model["num_heads"],
        "num_key_value_heads": model["num_heads"],
        "q_lora_rank": model["q_latent_dim"],
        "kv_lora_rank": model["kv_latent_dim"],
        "qk_nope_head_dim": model["nope_head_dim"],
        "qk_rope_head_dim": model["rope_head_dim"],
        "v_head_dim": model["v_head_dim"],
        "n_routed_experts": model["num_experts"],
        "num_experts_per_tok": model["experts_per_token"],
        "n_shared_experts": model["num_shared_experts"],
        "moe_intermediate_size": model["expert_dim"],
        "n_group": model["num_groups"],
        "topk_group": model["groups_per_token"],
        "norm_topk_prob": model["normalize_gates"],
        "routed_scaling_factor": model["routed_scale"],
        "rope_parameters": rope,
        "rope_interleave": model["rope_interleaved"],
        "max_position_embeddings": model["max_positions"],
        "rms_norm_eps": model["norm_eps"],
        "tie_word_embeddings": model["tie_embeddings"],
        "initializer_range": model["init_std"],
        "num_mtp_layers": 0,
        "use_cache": False,
        "bos_token_id": None,  # the released ids may exceed a small vocabulary
        "eos_token_id": None,
    }


def build(model: dict, *, experts: str = "grouped_mm", seed: int = 0):
    """Return DeepseekV3ForCausalLM in float32 with random weights.

    Args:
        model: a ModelConfig as a dict.
        experts: "grouped_mm" (one grouped product over all experts) or "eager" (a Python loop).
        seed: of torch's generator.
    Raises: ValueError if transformers does not support `experts` or `model`, ImportError if it is
        not installed.
    """
    if experts not in EXPERTS:
        raise ValueError(f"experts={experts!r} is not one of {', '.join(EXPERTS)}")
    config = hf_config(model)
    torch, transformers = _import_peer()
    torch.manual_seed(seed)
    config = transformers.DeepseekV3Config(
        **config, attn_implementation="sdpa", experts_implementation=experts
    )
    return transformers.DeepseekV3ForCausalLM(config).float().train()


def make_step(net):
    """Return the training step of `net`: tokens int64 [B, T] → loss in nats, a float.

    AdamW has the recipe's settings (DeepSeek-V3 report, section 4.2); matrices alone decay.
    """
    torch, _ = _import_peer()
    matrices = [p for p in net.parameters() if p.ndim > 1]
    norms = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2.2e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def step(tokens: np.ndarray) -> float:
        ids = torch.from_numpy(tokens)
        loss = net(input_ids=ids, labels=ids).loss  # transformers shifts the labels itself
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _import_peer():
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            f"package={error.name!r} is not installed, but the peer needs it: "
            "pip install torch transformers"
        ) from error
    return torch, transformers


class PeerTrainWorker(Worker):
    """A worker process that trains with transformers; a context manager.

        with PeerTrainWorker(cfg, experts="grouped_mm") as peer:
            peer.step(1)["seconds"]     # the first step allocates memory, so do not count it

    Args:
        cfg: ModelConfig.
        experts, seed: see `build`.
        batch_size, seq_len: the shape of every step's batch, `draw_tokens(seed, …)`.
        threads: of torch; both sides should have the same cores.
        python: an interpreter with torch and transformers (the extra `parity`); None: this one.
        env: added to the worker's environment, as KEEP_MEMORY.
    Raises: see `Worker`.
    """

    def __init__(
        self,
        cfg,
        *,
        experts="grouped_mm",
        batch_size=4,
        seq_len=512,
        threads=2,
        seed=0,
        python=None,
        env=None,
    ):
        # Here, because the worker's interpreter may lack dsv3_jax.
        from dsv3_jax.config import to_dict

        options = {
            "experts": experts,
            "batch": batch_size,
            "length": seq_len,
            "threads": threads,
            "seed": seed,
        }
        command = [python or sys.executable, __file__, "--config", json.dumps(to_dict(cfg))]
        command += [f"--{key}={value}" for key, value in options.items()]
        super().__init__("transformers", command, {"OMP_NUM_THREADS": str(threads)} | (env or {}))

    def step(self, count: int = 1) -> dict:
        """Run `count` steps; return {"seconds": […], "loss": [nats, …], "peak_rss_bytes": int}."""
        return self.ask(f"step {count}")


def prepare(config: str, experts: str, threads: int, seed: int):
    """Return (model, its description {parameters, versions, …}) for a worker's options.

    Args: config: a ModelConfig as JSON, or the path of one.
    """
    model = json.loads(config if config.lstrip().startswith("{") else Path(config).read_text())
    torch, transformers = _import_peer()
    torch.set_num_threads(threads)
    net = build(model, experts=experts, seed=seed)
    return net, {
        "parameters": sum(p.numel() for p in net.parameters()),
        "attention": net.config._attn_implementation,
        "experts": net.config._experts_implementation,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _trainer(args) -> tuple[dict, Callable[[str], dict]]:
    net, info = prepare(args.config, args.experts, args.threads, args.seed)
    step = make_step(net)
    tokens = draw_tokens(args.seed, args.batch, args.length, net.config.vocab_size)

    def handle(line: str) -> dict:
        match line.split():
            case ["step", count] if count.isdecimal():
                seconds, losses = [], []
                for _ in range(int(count)):
                    start = time.perf_counter()
                    losses.append(step(tokens))
                    seconds.append(time.perf_counter() - start)
                return {"seconds": seconds, "loss": losses, "peak_rss_bytes": peak_rss()}
        raise ValueError(f"command={line!r} is unknown: use 'step N' or 'quit'")

    return info, handle


def main() -> int:
    parser = argparse.ArgumentParser(
        description="A worker that trains transformers' DeepseekV3ForCausalLM."
    )
    parser.add_argument("--config", required=True, help="a ModelConfig as JSON, or the path of one")
    parser.add_argument("--experts", default="grouped_mm", help=" or ".join(EXPERTS))
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    return serve(lambda: _trainer(args))


if __name__ == "__main__":
    sys.exit(main())
