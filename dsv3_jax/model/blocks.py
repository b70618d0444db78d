"""The two kinds of layer: attention, then one wide SwiGLU or a mixture of experts."""

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
    Raises: ConfigError if the name is taken, or `kind` is no such class.

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
    ATTENTION_KINDS.add(name, kind.has_latent)
    ATTENTION[name] = kind


class Block(nnx.Module):
    """x ← x + Attention(norm(x));  x ← x + FFN(norm(x)). A kind of block defines `feed_forward`."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = ATTENTION[cfg.attention](cfg, rngs=rngs)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def __call__(self, x: Float[Array, "B T D"], ctx: Context) -> LayerResult:
        """Run the block: for training, prefill or decoding, by the context.

        Returns: (x, the context for the next layer, metrics).
        """
        # On a mesh, rows alone are sharded between the parts of a block: norms need all of D.
        y, ctx, of_attention = self.attn.attend(self.attn_norm(x), ctx)
        x = constrain(x + y, "batch", None, None)
        y, metrics = self.feed_forward(self.ffn_norm(x), ctx)
        return constrain(x + y, "batch", None, None), ctx, metrics | of_attention

    def feed_forward(self, x: Float[Array, "B T D"], ctx: Context) -> tuple[Array, dict[str, Any]]:
        """(What is added to x, metrics)."""
        raise NotImplementedError


class DenseBlock(Block):
    """A block with one wide SwiGLU.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> block = nnx.eval_shape(lambda: DenseBlock(preset("tiny"), rngs=nnx.Rngs(0)))
        >>> block.ffn.w_gate.shape
        (128, 352)
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        self.ffn = SwiGLU(cfg.dim, cfg.dense_dim, cfg.init_std, rngs=rngs)

    def feed_forward(self, x: Float[Array, "B T D"], ctx: Context) -> tuple[Array, dict[str, Any]]:
        return self.ffn(x, ctx), {}


class SparseBlock(Block):
    """A block with a mixture of experts. Its router's decisions are its metric "routing".

    Example:
        >>> from dsv3_jax.presets import preset
        >>> block = nnx.eval_shape(lambda: SparseBlock(preset("tiny"), rngs=nnx.Rngs(0)))
        >>> block.moe.w_router.shape
        (128, 16)
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        self.moe = MoE(cfg, rngs=rngs)

    def feed_forward(self, x: Float[Array, "B T D"], ctx: Context) -> tuple[Array, dict[str, Any]]:
        y, routing, metrics = self.moe.mix(x, ctx)
        return y, {"routing": routing, **metrics}
