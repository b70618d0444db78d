"""Sizes as the reports and the arrays of models give them; nothing is allocated for it."""

import gc

import jax
import numpy as np
import pytest
from flax import nnx
from models import small

from dsv3_jax.config import ModelConfig, replace
from dsv3_jax.model import counting, transformer
from dsv3_jax.planning.flops import train_flops
from dsv3_jax.presets import preset, recipe


@pytest.mark.parametrize(
    ("name", "total", "active", "digit"),
    [
        ("v3", 671e9, 37e9, 1e9),
        ("v2", 236e9, 21e9, 1e9),
        ("v2_lite", 15.7e9, 2.4e9, 1e8),
        ("moonlight", 16e9, 2.6e9, 1e8),
        ("kimi_k2", 1026e9, 32e9, 1e9),
        ("glm47_flash", 30e9, 3.6e9, 1e8),
        ("mini", 196e6, 32e6, 1e6),
    ],
)
def test_sizes_of_the_reports(monkeypatch, name, total, active, digit):
    """No device is started: a study that lists its runs must not take an accelerator's memory."""
    monkeypatch.setattr(transformer, "prepare", lambda *_: 1 / 0)  # the device's kernels
    gc.collect()
    arrays = len(jax.live_arrays())
    found = counting.size(preset(name))
    # 0.6 of the last digit given, for the reports round most numbers but cut V2-Lite's 2.45
    assert abs(found.total - total) < 0.6 * digit
    assert abs(found.active - active) < 0.6 * digit
    assert len(jax.live_arrays()) == arrays  # 671 billion would not have fitted anyway


def in_arrays(cfg: ModelConfig) -> np.ndarray:
    """Numbers in the arrays of (the trunk, the heads), without indexers that share a choice."""
    counts = np.zeros(2, int)
    for path, v in nnx.to_flat_state(nnx.state(transformer.abstract(cfg), nnx.Param)):
        counts[int(path[0] == "mtp")] += v.get_value().size
    i, x, d = cfg.index_heads, cfg.index_dim, cfg.dim
    indexer = cfg.q_latent_dim * i * x + d * x + 2 * x + d * i if cfg.index_types else 0
    counts[0] -= (cfg.index_types or ()).count("shared") * indexer
    return counts


DSA = dict(attention="dsa", index_heads=2, index_dim=9, index_types=("full", "shared", "full"))
SIZES = {
    "two depths": dict(mtp_depth=2),
    "tied": dict(tie_embeddings=True, num_dense_layers=0, num_shared_experts=3),
    "all dense": dict(num_dense_layers=3, q_latent_dim=None),
    "dsa": dict(mtp_depth=1, **DSA),
    "meta": dict(mtp_depth=3, mtp_kind="meta"),
    "medusa": dict(mtp_depth=3, mtp_kind="medusa"),
    "eagle": dict(mtp_depth=1, mtp_kind="eagle"),
}


@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES)
def test_sizes_are_those_of_the_arrays(changes):
    """Active is a model with as many experts as a token has, but a router for all of them."""
    cfg = small(**changes)
    found, (total, of_heads) = counting.size(cfg), in_arrays(cfg)
    assert (found.total, found.mtp) == (total, of_heads) and sum(found.parts.values()) == total
    few = dict(num_experts=cfg.experts_per_token, num_groups=1, groups_per_token=1)
    active, of_heads = in_arrays(small(**changes | few))
    router, table = (cfg.num_experts - cfg.experts_per_token) * cfg.dim, cfg.vocab_size * cfg.dim
    # The embedding is looked up; each head multiplies with the unembedding once more.
    looked_up = 0 if cfg.tie_embeddings else table
    assert found.active == active + cfg.num_sparse_layers * router - looked_up
    assert found.mtp_active == of_heads + cfg.num_sparse_heads * router + cfg.mtp_depth * table


def test_flops():
    mini, tiny = preset("mini"), preset("tiny")
    assert f"{counting.train_flops_per_token(mini) / 1e6:.1f}" == "193.7"
    with_mtp, without = (counting.train_flops_per_token(tiny, with_mtp=w) for w in (True, False))
    assert with_mtp - without == 6 * counting.size(tiny).mtp_active > 0
    # On a frozen trunk: forward through it, and no gradient of the unembedding.
    own = counting.size(tiny).mtp_active
    shared = tiny.vocab_size * tiny.dim
    active = counting.size(tiny).active
    of_heads = 2 * active + 6 * (own - shared) + 4 * shared
    assert counting.train_flops_per_token(tiny, frozen_trunk=True) == of_heads
    # scores and values: 2 FLOPs a product, 8 layers, 8 heads, 64 + 32 and 64 wide, 100 tokens
    assert counting.size(mini, context=100).attention_flops == 2 * 8 * 8 * (96 + 64) * 100


@pytest.mark.parametrize("kind, blocks", [("deepseek", 2), ("medusa", 0)])
def test_a_planned_step_has_the_scores_of_trunk_and_heads(kind, blocks):
    """Scores and values of 4 heads, 32 + 16 and 32 wide; a token sees half of 256 on average."""
    run = recipe("tiny")
    run = replace(run, model=replace(run.model, mtp_depth=2, mtp_kind=kind))
    scores = train_flops(run) - counting.train_flops_per_token(run.model)
    assert scores == 3 * (4 + blocks) * 2 * 4 * (48 + 32) * 256 / 2
