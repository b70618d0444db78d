"""The shapes that the parts measure: full ones for a GPU or TPU, and toy ones for a CPU."""

from dataclasses import dataclass

from dsv3_jax.config import ModelConfig, replace
from dsv3_jax.presets import preset


@dataclass(frozen=True)
class Sizes:
    """Shapes of all parts. B batch, T length, H heads, K and V widths of a head's keys, values."""

    large: bool  # whether kernels are checked at a model's shapes
    gemm: int  # rows of a square matrix
    copied: int  # numbers of an array in float32
    wide: ModelConfig  # of the MoE layer
    layer_batch: tuple[int, int]  # B, T
    # name → model, tokens; the first one is measured first
    grouped: dict[str, tuple[ModelConfig, int]]
    few_rows: tuple[int, ...]  # tokens, whose experts have few rows; of the model of `decode`
    attention: tuple[int, int, int, int, int]  # B, T, H, K, V
    documents: int  # packed in a row of it
    loss: tuple[int, int, int]  # tokens, width, vocabulary
    eight_bits: tuple[int, int, int]  # tokens, and both widths of a weight
    step: ModelConfig
    step_batch: tuple[int, int]  # B, T
    decode: ModelConfig
    decode_bar: int  # the batch whose bar is held; it is measured first
    decode_batches: tuple[int, ...]  # others
    context: int  # cached tokens of each sequence
    decode_steps: int
    drafts: ModelConfig
    draft_batches: tuple[int, ...]
    draft_prompt: int
    draft_tokens: int
    exact: ModelConfig
    exact_tokens: int
    seconds: float  # that one timing may take, at least one call


def full() -> Sizes:
    """The sizes for a GPU or TPU with 80 GB or more; smaller ones skip what does not fit."""
    v3, lite, mini = preset("v3"), preset("v2_lite"), preset("mini")
    wide = replace(v3, num_layers=1, num_dense_layers=0, num_experts=32, mtp_depth=0)
    return Sizes(
        large=True,
        gemm=8192,
        copied=1 << 28,
        wide=wide,
        layer_batch=(4, 4096),
        grouped={"V3, 32 experts": (wide, 8192), "V2-Lite": (lite, 8192), "mini": (mini, 4096)},
        attention=(2, 4096, 128, 192, 128),
        few_rows=(8, 16, 32, 64),
        documents=4,
        loss=(8192, v3.dim, v3.vocab_size),
        eight_bits=(8192, v3.dim, 2 * v3.expert_dim),
        step=replace(lite, num_layers=4),
        step_batch=(8, 4096),
        decode=lite,
        decode_bar=64,
        decode_batches=(1, 32, 128),
        context=4096,
        decode_steps=32,
        drafts=replace(lite, mtp_depth=1),
        draft_batches=(1, 32),
        draft_prompt=1024,
        draft_tokens=64,
        exact=replace(mini, num_layers=2, mtp_depth=1),
        exact_tokens=64,
        seconds=1.0,
    )


def toy() -> Sizes:
    """Sizes at which a CPU runs every part within a minute: they only show that the parts work."""
    small = dict(
        num_layers=1,
        num_dense_layers=0,
        num_experts=8,
        experts_per_token=2,
        num_groups=2,
        groups_per_token=1,
    )
    headed = replace(preset("tiny"), **small)
    plain = replace(headed, mtp_depth=0)
    return Sizes(
        large=False,
        gemm=128,
        copied=1 << 16,
        wide=plain,
        layer_batch=(2, 64),
        grouped={"tiny": (plain, 64), "tiny, fewer tokens": (plain, 32)},
        few_rows=(4,),
        attention=(1, 64, 2, 24, 16),
        documents=2,
        loss=(64, 32, 100),
        eight_bits=(128, 128, 128),
        step=headed,
        step_batch=(2, 32),
        decode=plain,
        decode_bar=2,
        decode_batches=(1,),
        context=32,
        decode_steps=4,
        drafts=headed,
        draft_batches=(3,),  # it has the programs of `exact`
        draft_prompt=30,
        draft_tokens=12,
        exact=headed,
        exact_tokens=12,
        seconds=0.02,
    )
