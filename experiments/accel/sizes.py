"""The shapes that the parts measure: full ones for a GPU or TPU, and toy ones for a CPU."""

from dataclasses import dataclass, field

from dsv3_jax.config import ModelConfig, replace
from dsv3_jax.presets import preset

V3, LITE, MINI = preset("v3"), preset("v2_lite"), preset("mini")
WIDE = replace(V3, num_layers=1, num_dense_layers=0, num_experts=32, mtp_depth=0)


@dataclass(frozen=True)
class Sizes:
    """Shapes of all parts, for a device with 80 GB or more; smaller ones skip what does not fit.

    B batch, T length, H heads, K and V widths of a head's keys and values.
    """

    gemm: int = 8192  # rows of a square matrix
    copied: int = 1 << 28  # numbers of an array in float32
    wide: ModelConfig = WIDE  # of the MoE layer
    layer_batch: tuple[int, int] = (4, 4096)  # B, T
    # name → model, tokens; the first one is measured first
    grouped: dict[str, tuple[ModelConfig, int]] = field(
        default_factory=lambda: {
            "V3, 32 experts": (WIDE, 8192), "V2-Lite": (LITE, 8192), "mini": (MINI, 4096)
        }
    )  # fmt: skip
    few_rows: tuple[int, ...] = (8, 16, 32, 64)  # tokens; of the model of `decode`
    attention: tuple[int, int, int, int, int] = (2, 4096, 128, 192, 128)  # B, T, H, K, V
    documents: int = 4  # packed in a row of it
    loss: tuple[int, int, int] = (8192, V3.dim, V3.vocab_size)  # tokens, width, vocabulary
    # tokens, and both widths of a weight
    eight_bits: tuple[int, int, int] = (8192, V3.dim, 2 * V3.expert_dim)
    step: ModelConfig = replace(LITE, num_layers=4)
    step_batch: tuple[int, int] = (8, 4096)  # B, T
    decode: ModelConfig = LITE
    decode_bar: int = 64  # the batch whose bar is held; it is measured first
    decode_batches: tuple[int, ...] = (1, 32, 128)  # others
    context: int = 4096  # cached tokens of each sequence
    decode_steps: int = 32
    drafts: ModelConfig = replace(LITE, mtp_depth=1)
    draft_batches: tuple[int, ...] = (1, 32)
    draft_prompt: int = 1024
    draft_tokens: int = 64
    exact: ModelConfig = replace(MINI, num_layers=2, mtp_depth=1)
    exact_tokens: int = 64
    seconds: float = 1.0  # that one timing may take, at least one call


_HEADED = replace(
    preset("tiny"), num_layers=1, num_dense_layers=0, num_experts=8, experts_per_token=2,
    num_groups=2, groups_per_token=1,
)  # fmt: skip
_PLAIN = replace(_HEADED, mtp_depth=0)

# A CPU runs every part within a minute: this only shows that the parts work.
TOY = Sizes(
    gemm=128, copied=1 << 16, wide=_PLAIN, layer_batch=(2, 64),
    grouped={"tiny": (_PLAIN, 64), "tiny, fewer tokens": (_PLAIN, 32)}, few_rows=(4,),
    attention=(1, 64, 2, 24, 16), documents=2, loss=(64, 32, 100), eight_bits=(128, 128, 128),
    step=_HEADED, step_batch=(2, 32), decode=_PLAIN, decode_bar=2, decode_batches=(1,),
    context=32, decode_steps=4, drafts=_HEADED, draft_batches=(3,), draft_prompt=30,
    draft_tokens=12, exact=_HEADED, exact_tokens=12, seconds=0.02,
)  # fmt: skip
