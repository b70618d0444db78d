"""What is MLA's rotated part worth, and must it be joined to the other one?

Published: RoPE on keys that come from the latent forbids absorption, so DeepSeek-V2 joins a rotated
key that all heads share; no loss is given for other ways.
"""

import jax.numpy as jnp

import dsv3_jax as ds
from dsv3_jax.config import replace
from dsv3_jax.config.model import ATTENTION_KINDS
from dsv3_jax.model.attention import LATENT_NORM_EPS, MLA
from dsv3_jax.model.layers import RMSNorm
from dsv3_jax.model.parameters import param
from experiments.lab import Claim, Column, Stake, Study

JOINED, NOTHING, EVERYTHING = "joined, 24 and 8", "nothing rotated", "all 32 rotated"
ADDED, ADDED_WIDE = "added, 16 and 16", "added, 32 and 32"


class Unrotated(MLA):
    """MLA without RoPE: only the causal mask tells one position from another."""

    def rotate(self, x, ctx):
        return x


class Rotated(MLA):
    """Each head's keys, up-projected from the latent, are rotated whole: R is their width.

    The latent alone is not enough to score: W_uk cannot be absorbed, as a rotation stands between
    it and the query.
    """

    has_latent = False

    @classmethod
    def cache_rows(cls, cfg, kind):
        return {"k": (cfg.num_heads, cfg.rope_head_dim), "v": (cfg.num_heads, cfg.v_head_dim)}

    def make_weights(self, cfg, rngs):
        dim, heads, std, width = cfg.dim, cfg.num_heads, cfg.init_std, cfg.rope_head_dim
        self.w_dq = param(rngs, (dim, cfg.q_latent_dim), ("dim", None), std)
        self.q_norm = RMSNorm(cfg.q_latent_dim, LATENT_NORM_EPS)
        self.w_uq = param(rngs, (cfg.q_latent_dim, heads, width), ("latent", "heads", None), std)
        self.w_dkv = param(rngs, (dim, cfg.kv_latent_dim), ("dim", None), std)
        self.kv_norm = RMSNorm(cfg.kv_latent_dim, LATENT_NORM_EPS)
        up = ("heads", None, "latent")
        self.w_uk = param(rngs, (heads, width, cfg.kv_latent_dim), up, std)
        self.w_uv = param(rngs, (heads, cfg.v_head_dim, cfg.kv_latent_dim), up, std)

    def project(self, x, ctx):
        c_q = self.q_norm(ctx.run("product", x, self.w_dq[...]))
        q = self.rotate(ctx.run("product", c_q, self.w_uq[...]), ctx)
        c_kv = self.kv_norm(ctx.run("product", x, self.w_dkv[...]))
        k, v = (jnp.einsum("btc,hnc->bthn", c_kv, w[...]) for w in (self.w_uk, self.w_uv))
        return q, {"k": self.rotate(k, ctx), "v": v}

    def expand(self, rows, ctx):
        return {}


class Added(MLA):
    """The rotated part is added to the other one, in queries and in keys; R = N is the width."""

    has_latent = False

    @classmethod
    def cache_rows(cls, cfg, kind):
        return {"k": (cfg.num_heads, cfg.rope_head_dim), "v": (cfg.num_heads, cfg.v_head_dim)}

    def project(self, x, ctx):
        q, rows = super().project(x, ctx)
        return sum(jnp.split(q, 2, axis=-1)), rows

    def expand(self, rows, ctx):
        found = super().expand(rows, ctx)
        return {"k": sum(jnp.split(found["k"], 2, axis=-1)), "v": found["v"]}


for name, kind in (("unrotated", Unrotated), ("rotated", Rotated), ("added", Added)):
    if name not in ATTENTION_KINDS:
        ds.register_attention(name, kind)


def variants(base):
    mla = base.model
    width = mla.nope_head_dim + mla.rope_head_dim
    half = width // 2
    return {
        JOINED: mla,
        NOTHING: replace(mla, attention="unrotated"),
        EVERYTHING: replace(mla, attention="rotated", rope_head_dim=width),
        ADDED: replace(mla, attention="added", nope_head_dim=half, rope_head_dim=half),
        ADDED_WIDE: replace(mla, attention="added", nope_head_dim=width, rope_head_dim=width),
    }


def claim(text, variant, expect="none"):
    return Claim(text, variant, JOINED, expect=expect, stake="positions")


STUDY = Study(
    variants=variants,
    seeds=5,
    columns=(
        Column("validation loss", "val_loss", 4, paired=True),
        Column("bits per byte", "val_bits_per_byte", 4),
    ),
    claims=(
        Claim(
            "a model without rotated numbers has a higher loss", NOTHING, JOINED, expect="higher"
        ),
        claim("all 32 rotated have a lower loss than 8 of 32", EVERYTHING),
        claim("added has a lower loss than joined, with as many parameters", ADDED),
        claim("added has a lower loss than joined, with keys as wide", ADDED_WIDE),
    ),
    stakes={"positions": Stake("positions: nothing rotated", NOTHING, JOINED)},
)
