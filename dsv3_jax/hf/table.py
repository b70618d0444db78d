"""The one table between released tensor names and our parameters: loading, saving and checking all read it.

Released linear weights are [out, in]; ours are [in, out], but for w_uk and w_uv, which lie as released. Heads are an
axis of their own, and like layers (and their experts) are stacked along leading axes. Letters as in `config.py`.
Source: the released index files of DeepSeek-V2, V2-Lite and V3, and the reference inference code.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from dsv3_jax.config import ConfigError, ModelConfig

BLOCK = 128  # an FP8 weight has one scale for each 128 × 128 block
SCALE = "_scale_inv"  # … under the weight's name with this at its end

Shape = tuple[int, ...]
Path = tuple[str | int, ...]  # of one of our parameters, as NNX names it


class Place(NamedTuple):
    """Where a released tensor, or a part of it, stands in one of our parameters."""

    path: Path
    at: Shape  # leading indices: (), (layer,) or (layer, expert)


@dataclass(frozen=True)
class Plain:
    """The same numbers in the same order."""

    def split(self, released: np.ndarray) -> list[np.ndarray]:
        """Ours from the released tensor, one array for each place; views where that can be."""
        return [released]

    def join(self, ours: list[np.ndarray]) -> np.ndarray:
        """The inverse of `split`."""
        return ours[0]


@dataclass(frozen=True)
class Transposed(Plain):
    """[out, in] ↔ [in, out]."""

    def split(self, released: np.ndarray) -> list[np.ndarray]:
        return [released.T]

    def join(self, ours: list[np.ndarray]) -> np.ndarray:
        return ours[0].T


@dataclass(frozen=True)
class ToHeads(Plain):
    """[H·a, in] ↔ [in, H, a]."""

    part: int

    def split(self, released: np.ndarray) -> list[np.ndarray]:
        return [released.reshape(-1, self.part, released.shape[1]).transpose(2, 0, 1)]

    def join(self, ours: list[np.ndarray]) -> np.ndarray:
        rows = ours[0].transpose(1, 2, 0)
        return rows.reshape(-1, rows.shape[-1])


@dataclass(frozen=True)
class InHeads(Plain):
    """[H·(a + b + …), in] ↔ [H, a, in], [H, b, in], …: the same rows as they lie."""

    parts: Shape

    def split(self, released: np.ndarray) -> list[np.ndarray]:
        rows = released.reshape(-1, sum(self.parts), released.shape[1])
        return np.split(rows, np.cumsum(self.parts)[:-1], axis=1)

    def join(self, ours: list[np.ndarray]) -> np.ndarray:
        rows = np.concatenate(ours, axis=1)
        return rows.reshape(-1, rows.shape[-1])


@dataclass(frozen=True)
class FromHeads(Plain):
    """[out, H·V] ↔ [H, V, out]."""

    part: int

    def split(self, released: np.ndarray) -> list[np.ndarray]:
        return [released.T.reshape(-1, self.part, released.shape[0])]

    def join(self, ours: list[np.ndarray]) -> np.ndarray:
        return ours[0].reshape(-1, ours[0].shape[-1]).T


PLAIN, TRANSPOSED = Plain(), Transposed()


@dataclass(frozen=True)
class Entry:
    """One released tensor."""

    name: str
    shape: Shape
    places: tuple[Place, ...]  # as many as `layout.split` gives
    layout: Plain = TRANSPOSED
    quantized: bool = False  # FP8 in an FP8 checkpoint
    wide: bool = False  # float32 in every checkpoint
    copy_of: str | None = None  # a duplicate of that tensor: may be absent, must be the same
    mtp: bool = False  # belongs to an MTP layer

    @property
    def scale_shape(self) -> Shape:
        """Shape of the scales beside an FP8 weight; the last blocks may be partial."""
        return tuple(-(-n // BLOCK) for n in self.shape)


def entries(cfg: ModelConfig) -> Iterator[Entry]:
    """Every released tensor of a model, in the order of its layers. Tied embeddings: the head is a copy."""
    embed = Entry("model.embed_tokens.weight", (cfg.vocab_size, cfg.dim), (Place(("embed",), ()),), PLAIN)
    yield embed
    for layer in range(cfg.num_layers):
        dense = layer < cfg.num_dense_layers
        at = layer if dense else layer - cfg.num_dense_layers
        stack = ("dense",) if dense else ("sparse",)
        yield from _block(cfg, f"model.layers.{layer}", stack, (at,), dense, ("experts",), at)
    yield _norm("model.norm", cfg.dim, ("norm",), ())
    head = replace(embed, name="lm_head.weight", copy_of=embed.name)
    if not cfg.tie_embeddings:
        head = replace(head, places=(Place(("head",), ()),), layout=TRANSPOSED, copy_of=None)
    yield head
    for k in range(cfg.mtp_depth):
        for entry in _mtp_layer(cfg, k, embed, head):
            yield replace(entry, mtp=True)


def _mtp_layer(cfg: ModelConfig, k: int, embed: Entry, head: Entry) -> Iterator[Entry]:
    name, own = f"model.layers.{cfg.num_layers + k}", ("mtp", k)
    yield replace(embed, name=f"{name}.embed_tokens.weight", copy_of=embed.name)
    yield _norm(f"{name}.enorm", cfg.dim, (*own, "embed_norm"), ())
    yield _norm(f"{name}.hnorm", cfg.dim, (*own, "hidden_norm"), ())
    # Not quantized in the released FP8 checkpoint, though it is a linear weight.
    yield Entry(f"{name}.eh_proj.weight", (cfg.dim, 2 * cfg.dim), (Place((*own, "w_eh"), ()),))
    yield from _block(cfg, name, (*own, "block"), (), False, (*own, "experts"), 0)
    yield _norm(f"{name}.shared_head.norm", cfg.dim, (*own, "norm"), ())
    source = head.copy_of or head.name  # a tied head is the embedding
    yield replace(head, name=f"{name}.shared_head.head.weight", copy_of=source)


def _block(
    cfg: ModelConfig, name: str, path: Path, index: Shape, dense: bool, experts: Path, sparse_layer: int
) -> Iterator[Entry]:
    """A transformer block: `path` and `index` say where it stands, `experts` and `sparse_layer` where its experts."""
    yield _norm(f"{name}.input_layernorm", cfg.dim, (*path, "attn_norm"), index)
    yield from _attention(cfg, f"{name}.self_attn", (*path, "attn"), index)
    yield _norm(f"{name}.post_attention_layernorm", cfg.dim, (*path, "ffn_norm"), index)
    if dense:
        yield from _swiglu(cfg.dim, cfg.dense_dim, f"{name}.mlp", (*path, "ffn"), index)
        return
    moe: Path = (*path, "moe")
    router = (cfg.num_experts, cfg.dim)
    yield Entry(f"{name}.mlp.gate.weight", router, (Place((*moe, "w_router"), index),))
    if cfg.router == "sigmoid":
        bias = (Place((*moe, "bias"), index),)
        yield Entry(f"{name}.mlp.gate.e_score_correction_bias", (cfg.num_experts,), bias, PLAIN, wide=True)
    for e in range(cfg.num_experts):
        yield from _swiglu(cfg.dim, cfg.expert_dim, f"{name}.mlp.experts.{e}", experts, (sparse_layer, e))
    if cfg.num_shared_experts:
        shared = cfg.num_shared_experts * cfg.expert_dim
        yield from _swiglu(cfg.dim, shared, f"{name}.mlp.shared_experts", (*moe, "shared"), index)


def _attention(cfg: ModelConfig, name: str, path: Path, index: Shape) -> Iterator[Entry]:
    heads, qk = cfg.num_heads, cfg.nope_head_dim + cfg.rope_head_dim

    def linear(part: str, shape: Shape, layout: Plain, *ours: str) -> Entry:
        places = tuple(Place((*path, w), index) for w in ours)
        return Entry(f"{name}.{part}.weight", shape, places, layout, quantized=True)

    if cfg.q_latent_dim is None:
        yield linear("q_proj", (heads * qk, cfg.dim), ToHeads(qk), "w_q")
    else:
        yield linear("q_a_proj", (cfg.q_latent_dim, cfg.dim), TRANSPOSED, "w_dq")
        yield _norm(f"{name}.q_a_layernorm", cfg.q_latent_dim, (*path, "q_norm"), index)
        yield linear("q_b_proj", (heads * qk, cfg.q_latent_dim), ToHeads(qk), "w_uq")
    row = cfg.kv_latent_dim + cfg.rope_head_dim
    yield linear("kv_a_proj_with_mqa", (row, cfg.dim), TRANSPOSED, "w_dkv")
    yield _norm(f"{name}.kv_a_layernorm", cfg.kv_latent_dim, (*path, "kv_norm"), index)
    parts = (cfg.nope_head_dim, cfg.v_head_dim)
    yield linear("kv_b_proj", (heads * sum(parts), cfg.kv_latent_dim), InHeads(parts), "w_uk", "w_uv")
    yield linear("o_proj", (cfg.dim, heads * cfg.v_head_dim), FromHeads(cfg.v_head_dim), "w_o")


def _swiglu(dim: int, hidden: int, name: str, path: Path, index: Shape) -> Iterator[Entry]:
    for part, ours, shape in (
        ("gate_proj", "w_gate", (hidden, dim)),
        ("up_proj", "w_up", (hidden, dim)),
        ("down_proj", "w_down", (dim, hidden)),
    ):
        yield Entry(f"{name}.{part}.weight", shape, (Place((*path, ours), index),), quantized=True)


def _norm(name: str, dim: int, path: Path, index: Shape) -> Entry:
    return Entry(f"{name}.weight", (dim,), (Place((*path, "scale"), index),), PLAIN)


def dtype_of(entry: Entry, dtype: str, fp8: bool) -> str:
    """The dtype that a tensor is written in, where the checkpoint's is `dtype`."""
    if entry.wide:
        return "float32"
    return "float8_e4m3fn" if fp8 and entry.quantized else dtype


def tensor_table(cfg: ModelConfig, fp8: bool = False, *, dtype: str = "bfloat16") -> dict[str, tuple[Shape, str]]:
    """Every tensor of a released checkpoint: its name → (shape, dtype name).

    Args:
        cfg: any configuration of the V2 or V3 family.
        fp8: linear weights as float8_e4m3fn, each with its float32 `weight_scale_inv` of one scale for 128 × 128
            numbers, as DeepSeek-V3 was released.
        dtype: of what is not FP8; the router's correction bias is float32 always.
    Raises: ConfigError for a router or a kind of multi-token head that the released format does not have.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> len(tensor_table(preset("v3"), fp8=True))
        91991
        >>> tensor_table(preset("v3"), fp8=True)["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"]
        ((5, 56), 'float32')
    """
    check_released(cfg)
    table: dict[str, tuple[Shape, str]] = {}
    for entry in entries(cfg):
        if cfg.tie_embeddings and entry.copy_of and not entry.mtp:
            continue  # transformers ties it by itself
        table[entry.name] = (entry.shape, dtype_of(entry, dtype, fp8))
        if fp8 and entry.quantized:
            table[entry.name + SCALE] = (entry.scale_shape, "float32")
    return table


def check_released(cfg: ModelConfig) -> None:
    """Raises: ConfigError for a router or a kind of multi-token head that the released format does not have."""
    if cfg.router not in ("sigmoid", "softmax"):
        raise ConfigError(f"router={cfg.router!r} has no released format: it must be 'sigmoid' or 'softmax'")
    if cfg.mtp_depth and cfg.mtp_kind != "deepseek":
        raise ConfigError(f"mtp_kind={cfg.mtp_kind!r} has no released format: it must be 'deepseek'")
