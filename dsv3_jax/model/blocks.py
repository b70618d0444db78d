"""A layer of the model: attention, then one wide SwiGLU or a mixture of experts."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.config.model import ATTENTION_KINDS
from dsv3_jax.mesh.sharding import constrain
from dsv3_jax.model.attention import GQA, MLA, Attention
from dsv3_jax.model.context import Context, LayerResult
from dsv3_jax.model.layers import RMSNorm, SwiGLU
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.sparse import DSA

# By the configuration's `attention`. MHA and MQA are GQA with H key-value heads, and with 1.
ATTENTION: dict[str, type[Attention]] = {"mla": MLA, "dsa": DSA, "mha": GQA, "gqa": GQA, "mqa": GQA}


def register_attention(name: str, kind: Any) -> None:
    """Add a kind of attention, for `attention=name` of a model's configuration.

    Args: kind: a subclass of `model.attention.Attention`, which says what it must define.
    Raises: ConfigError if the name is taken, or `kind` is no such class or lacks a method.

    Example:
        >>> register_attention("mla", GQA)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        dsv3_jax.config.fields.ConfigError: attention='mla' is taken or no name; the names are ...
    """
    if not (isinstance(kind, type) and issubclass(kind, Attention)):
        raise ConfigError(
            f"attention={name!r}: {kind!r} is no subclass of model.attention.Attention"
        )
    for method in ("make_weights", "project"):
        if getattr(kind, method) is getattr(Attention, method):
            raise ConfigError(f"attention={name!r}: {kind.__name__} does not define {method}")
    ATTENTION_KINDS.add(name, kind.has_latent)
    ATTENTION[name] = kind


class Block(nnx.Module):
    """x ← x + Attention(norm(x));  x ← x + FFN(norm(x)).

    Args: sparse: the FFN is a mixture of experts, whose router's decisions are the metric
        "routing". Else it is one wide SwiGLU.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> cfg = preset("tiny")
        >>> dense = nnx.eval_shape(lambda: Block(cfg, sparse=False, rngs=nnx.Rngs(0)))
        >>> sparse = nnx.eval_shape(lambda: Block(cfg, sparse=True, rngs=nnx.Rngs(0)))
        >>> dense.ffn.w_gate.shape, sparse.moe.experts.w_gate.shape
        ((128, 352), (16, 128, 64))
    """

    def __init__(self, cfg: ModelConfig, *, sparse: bool, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = ATTENTION[cfg.attention](cfg, rngs=rngs)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.sparse = sparse
        if sparse:
            self.moe = MoE(cfg, rngs=rngs)
        else:
            self.ffn = SwiGLU(cfg.dim, cfg.dense_dim, cfg.init_std, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], ctx: Context) -> LayerResult:
        """Run the block: for training, prefill or decoding, by the context.

        Returns: (x, the context for the next layer, metrics).
        """
        # On a mesh, rows alone are sharded between the parts of a block: norms need all of D.
        y, ctx, metrics = self.attn.attend(self.attn_norm(x), ctx)
        x = constrain(x + y, "batch", None, None)

        normed = self.ffn_norm(x)
        if self.sparse:
            routing, of_router = self.moe.route(normed, ctx)
            y, of_experts = self.moe.mix(normed, routing, ctx)
            metrics = {"routing": routing, **of_router, **of_experts, **metrics}
        else:
            y = self.ffn(normed, ctx)
        return constrain(x + y, "batch", None, None), ctx, metrics
