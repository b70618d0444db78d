"""The two kinds of layer: attention, then one wide SwiGLU or a mixture of experts."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.config import Execution, ModelConfig
from dsv3_jax.kernels.choose import Kernels
from dsv3_jax.mesh.sharding import constrain
from dsv3_jax.model.attention import ATTENTION
from dsv3_jax.model.context import Context, LayerResult
from dsv3_jax.model.layers import RMSNorm, SwiGLU
from dsv3_jax.model.moe import MoE


class Block(nnx.Module):
    """x + attention, then + the feed-forward part that a kind of block defines."""

    def __init__(self, cfg: ModelConfig, execution: Execution, *, rngs: nnx.Rngs, kernels: Kernels):
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = ATTENTION[cfg.attention](cfg, rngs=rngs, kernels=kernels)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def __call__(self, x: Float[Array, "B T D"], ctx: Context) -> LayerResult:
        """Train, prefill or decode, by the context. Returns (x, the next context, metrics)."""
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
        >>> from dsv3_jax.kernels.choose import prepare
        >>> from dsv3_jax.presets import preset
        >>> cfg, kernels = preset("tiny"), prepare()
        >>> def make():
        ...     return DenseBlock(cfg, Execution(), rngs=nnx.Rngs(0), kernels=kernels)
        >>> block = nnx.eval_shape(make)
        >>> block.ffn.w_gate.shape
        (128, 352)
    """

    def __init__(self, cfg: ModelConfig, execution: Execution, *, rngs: nnx.Rngs, kernels: Kernels):
        super().__init__(cfg, execution, rngs=rngs, kernels=kernels)
        self.ffn = SwiGLU(cfg.dim, cfg.dense_dim, cfg.init_std, rngs=rngs, kernels=kernels)

    def feed_forward(self, x: Float[Array, "B T D"], ctx: Context) -> tuple[Array, dict[str, Any]]:
        return self.ffn(x), {}


class SparseBlock(Block):
    """A block with a mixture of experts. The router's decisions are its metric "routing".

    Example:
        >>> from dsv3_jax.kernels.choose import prepare
        >>> from dsv3_jax.presets import preset
        >>> cfg, kernels = preset("tiny"), prepare()
        >>> def make():
        ...     return SparseBlock(cfg, Execution(), rngs=nnx.Rngs(0), kernels=kernels)
        >>> block = nnx.eval_shape(make)
        >>> block.moe.w_router.shape
        (128, 16)
    """

    def __init__(self, cfg: ModelConfig, execution: Execution, *, rngs: nnx.Rngs, kernels: Kernels):
        super().__init__(cfg, execution, rngs=rngs, kernels=kernels)
        self.moe = MoE(cfg, execution, rngs=rngs, kernels=kernels)

    def feed_forward(self, x: Float[Array, "B T D"], ctx: Context) -> tuple[Array, dict[str, Any]]:
        y, routing, metrics = self.moe.mix(x, ctx)
        return y, {"routing": routing, **metrics}
