"""FLOPs of a step by formula: training's with recomputed layers, decoding's over the cache."""

from dsv3_jax.config import ModelConfig, RunConfig
from dsv3_jax.model.cache import pick_kind
from dsv3_jax.model.counting import attended, size, train_flops_per_token


def train_flops(run: RunConfig) -> float:
    """Return the FLOPs of a trained token, with attention's scores and recomputed layers."""
    cfg = run.model
    remat = run.execution.remat
    counted = size(cfg, run.data.seq_len)
    # A token sees half of the sequence on average, in the heads' blocks too.
    scores = (counted.attention_flops + counted.mtp_attention_flops) / 2
    total = train_flops_per_token(cfg, adapted=run.lora.on if run.lora.rank else ()) + 3 * scores

    # Recomputed layers run forward twice; the heads' products are kept.
    if remat in ("queries", "attention", "full"):
        head = cfg.vocab_size * cfg.dim
        total += 2 * (counted.active + counted.mtp_active - head * (1 + cfg.mtp_depth))
        total += scores if remat == "full" else 0
    return total


def decode_attention_flops(cfg: ModelConfig, context: int) -> float:
    """Return attention's FLOPs of a token; absorbed, it reads latent rows twice, as k and v."""
    if pick_kind(cfg, None) != "latent":
        return float(size(cfg, context).attention_flops)
    scored = 2.0 * sum(cfg.has_indexer) * cfg.index_heads * cfg.index_dim * context
    a_row = cfg.num_heads * (2 * cfg.kv_latent_dim + cfg.rope_head_dim)
    return 2.0 * cfg.num_layers * a_row * attended(cfg, context) + scored
