"""The table between released tensor names and our parameters.

Loading, saving and checking all read it. Released linear weights are [out, in] and ours are
[in, out]; w_uk and w_uv keep the released order. Our heads have their own axis. Layers and their
experts are stacked along leading axes. Letters as in `config/model.py`.
Source: the released index files of DeepSeek-V2, V2-Lite and V3, and the reference inference code.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.config import ConfigError, ModelConfig, check_kind

BLOCK = 128  # an FP8 weight has one scale for each 128 × 128 block
SCALE_SUFFIX = "_scale_inv"  # of the name of an FP8 weight's scales

Shape = tuple[int, ...]
Path = tuple[str | int, ...]  # of one of our parameters, as NNX names it


class ParamSlice(NamedTuple):
    """The part of one of our parameters that a released tensor fills, alone or with others."""

    path: Path
    indices: Shape  # leading ones: (), (layer,) or (layer, expert)


@dataclass(frozen=True)
class Entry:
    """One released tensor, and how ours are made of it: reshape, transpose, split along axis 1.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> entry = next(entry for entry in entries(preset("v3")) if entry.quantized)
        >>> entry.name, entry.shape, entry.scale_shape
        ('model.layers.0.self_attn.q_a_proj.weight', (1536, 7168), (12, 56))
    """

    name: str
    shape: Shape
    slices: tuple[ParamSlice, ...]  # one for each of our arrays
    order: Shape = (1, 0)  # our order of the axes: [out, in] becomes [in, out]
    heads: Shape = ()  # the shape with an axis of heads; empty if it has none
    parts: Shape = ()  # rows of a head in each of our arrays; empty for one array
    quantized: bool = False  # FP8 in an FP8 checkpoint
    always_float32: bool = False  # in every checkpoint
    # name of the tensor that this one repeats; it may be absent but must not differ
    copy_of: str | None = None
    mtp: bool = False  # belongs to an MTP layer

    @property
    def scale_shape(self) -> Shape:
        """Shape of an FP8 weight's scales; the last blocks may be partial."""
        return tuple(-(-n // BLOCK) for n in self.shape)

    def split(self, released: np.ndarray) -> list[np.ndarray]:
        """Convert the released tensor to ours, one array for each slice; views where possible.

        Example:
            >>> two_heads = Entry("kv", (4, 1), (), order=(0, 1, 2), heads=(2, 2, 1), parts=(1, 1))
            >>> [part.tolist() for part in two_heads.split(np.array([[1], [2], [3], [4]]))]
            [[[[1]], [[3]]], [[[2]], [[4]]]]
        """
        ours = released.reshape(self.heads or self.shape).transpose(self.order)
        return np.split(ours, np.cumsum(self.parts)[:-1], axis=1) if self.parts else [ours]

    def join(self, ours: list[np.ndarray]) -> np.ndarray:
        """Convert our arrays to the released tensor; the inverse of `split`."""
        whole = np.concatenate(ours, axis=1) if self.parts else ours[0]
        return whole.transpose(np.argsort(self.order)).reshape(self.shape)


def entries(cfg: ModelConfig) -> Iterator[Entry]:
    """List every released tensor of a model in layer order.

    With tied embeddings the head is a copy.


    Example:
        >>> from dsv3_jax.presets import preset
        >>> [entry.name for entry in entries(preset("tiny"))][:2]
        ['model.embed_tokens.weight', 'model.layers.0.input_layernorm.weight']
    """
    embed = _same("model.embed_tokens.weight", (cfg.vocab_size, cfg.dim), ("embed",), ())
    yield embed

    # Dense layers and sparse ones are two stacks of ours, numbered each from 0.
    for layer in range(cfg.num_layers):
        dense = layer < cfg.num_dense_layers
        index = layer if dense else layer - cfg.num_dense_layers
        stack = ("dense",) if dense else ("sparse",)
        indexer = cfg.has_indexer[layer]
        yield from _block(cfg, f"model.layers.{layer}", stack, (index,), dense, indexer)
    yield _norm("model.norm", cfg.dim, ("norm",), ())
    head = replace(embed, name="lm_head.weight", copy_of=embed.name)
    if not cfg.tie_embeddings:
        head = replace(head, slices=(ParamSlice(("head",), ()),), order=(1, 0), copy_of=None)
    yield head

    for k in range(cfg.mtp_depth):
        for entry in _mtp_layer(cfg, k, embed, head):
            yield replace(entry, mtp=True)


def _mtp_layer(cfg: ModelConfig, k: int, embed: Entry, head: Entry) -> Iterator[Entry]:
    name = f"model.layers.{cfg.num_layers + k}"
    path = ("mtp", k)

    # Released heads repeat the embedding. They join the normed hidden state with its token.
    yield replace(embed, name=f"{name}.embed_tokens.weight", copy_of=embed.name)
    yield _norm(f"{name}.enorm", cfg.dim, (*path, "embed_norm"), ())
    yield _norm(f"{name}.hnorm", cfg.dim, (*path, "hidden_norm"), ())
    # A linear weight that the released FP8 checkpoint does not quantize.
    yield Entry(
        f"{name}.eh_proj.weight", (cfg.dim, 2 * cfg.dim), (ParamSlice((*path, "w_eh"), ()),)
    )

    yield from _block(cfg, name, (*path, "block"), (), dense=False, indexer=cfg.attention == "dsa")
    yield _norm(f"{name}.shared_head.norm", cfg.dim, (*path, "norm"), ())
    source = head.copy_of or head.name  # a tied head is the embedding
    yield replace(head, name=f"{name}.shared_head.head.weight", copy_of=source)


def _block(
    cfg: ModelConfig, name: str, path: Path, index: Shape, dense: bool, indexer: bool
) -> Iterator[Entry]:
    """List a transformer block's tensors.

    Args:
        name: prefix of the released names.
        path, index: our parameters of the block.
        dense: it has no experts.
        indexer: its attention has an indexer; a layer that reuses an earlier one's choice has none.
    """
    yield _norm(f"{name}.input_layernorm", cfg.dim, (*path, "attn_norm"), index)
    yield from _attention(cfg, f"{name}.self_attn", (*path, "attn"), index)
    if indexer:
        yield from _indexer(cfg, f"{name}.self_attn.indexer", (*path, "attn", "indexer"), index)
    yield _norm(f"{name}.post_attention_layernorm", cfg.dim, (*path, "ffn_norm"), index)
    if dense:
        yield from _swiglu(cfg.dim, cfg.dense_dim, f"{name}.mlp", (*path, "ffn"), index)
        return

    # The router, then the routed experts one by one, then the shared ones as a single SwiGLU.
    moe: Path = (*path, "moe")
    router = (cfg.num_experts, cfg.dim)
    yield Entry(f"{name}.mlp.gate.weight", router, (ParamSlice((*moe, "w_router"), index),))
    if cfg.router == "sigmoid":
        bias = _same(
            f"{name}.mlp.gate.e_score_correction_bias", (cfg.num_experts,), (*moe, "bias"), index
        )
        yield replace(bias, always_float32=True)
    for e in range(cfg.num_experts):
        yield from _swiglu(
            cfg.dim, cfg.expert_dim, f"{name}.mlp.experts.{e}", (*moe, "experts"), (*index, e)
        )
    if cfg.num_shared_experts:
        shared = cfg.num_shared_experts * cfg.expert_dim
        yield from _swiglu(cfg.dim, shared, f"{name}.mlp.shared_experts", (*moe, "shared"), index)


def _attention(cfg: ModelConfig, name: str, path: Path, index: Shape) -> Iterator[Entry]:
    h = cfg.num_heads
    qk = cfg.nope_head_dim + cfg.rope_head_dim
    v = cfg.v_head_dim

    def linear(part: str, shape: Shape, *ours: str, **layout: Any) -> Entry:
        slices = tuple(ParamSlice((*path, w), index) for w in ours)
        return Entry(f"{name}.{part}.weight", shape, slices, quantized=True, **layout)

    def queries(part: str, width: int, ours: str) -> Entry:
        return linear(part, (h * qk, width), ours, order=(2, 0, 1), heads=(h, qk, width))

    # Queries: of the residual stream, or of a latent that comes before them.
    if cfg.q_latent_dim is None:
        yield queries("q_proj", cfg.dim, "w_q")
    else:
        yield linear("q_a_proj", (cfg.q_latent_dim, cfg.dim), "w_dq")
        yield _norm(f"{name}.q_a_layernorm", cfg.q_latent_dim, (*path, "q_norm"), index)
        yield queries("q_b_proj", cfg.q_latent_dim, "w_uq")

    # One matrix gives the latent and the rotary key; a second one a head's keys and values.
    latent = cfg.kv_latent_dim
    parts = (cfg.nope_head_dim, v)
    yield linear("kv_a_proj_with_mqa", (latent + cfg.rope_head_dim, cfg.dim), "w_dkv")
    yield _norm(f"{name}.kv_a_layernorm", latent, (*path, "kv_norm"), index)
    both = (h * sum(parts), latent)
    heads = (h, sum(parts), latent)
    yield linear("kv_b_proj", both, "w_uk", "w_uv", order=(0, 1, 2), heads=heads, parts=parts)
    yield linear("o_proj", (cfg.dim, h * v), "w_o", order=(1, 2, 0), heads=(cfg.dim, h, v))


def _indexer(cfg: ModelConfig, name: str, path: Path, index: Shape) -> Iterator[Entry]:
    heads = cfg.index_heads
    width = cfg.index_dim
    latent = cfg.q_latent_dim or 0  # it has one
    w_iq, w_ik, w_iw = ((ParamSlice((*path, ours), index),) for ours in ("w_iq", "w_ik", "w_iw"))
    queries = Entry(f"{name}.wq_b.weight", (heads * width, latent), w_iq, quantized=True)
    yield replace(queries, order=(2, 0, 1), heads=(heads, width, latent))
    yield Entry(f"{name}.wk.weight", (width, cfg.dim), w_ik, quantized=True)
    yield _norm(f"{name}.k_norm", width, (*path, "k_norm"), index)
    yield _same(f"{name}.k_norm.bias", (width,), (*path, "k_norm", "bias"), index)
    # A linear weight that the released FP8 checkpoint does not quantize.
    yield Entry(f"{name}.weights_proj.weight", (heads, cfg.dim), w_iw)


def _swiglu(dim: int, hidden: int, name: str, path: Path, index: Shape) -> Iterator[Entry]:
    for part, ours, shape in (
        ("gate_proj", "w_gate", (hidden, dim)),
        ("up_proj", "w_up", (hidden, dim)),
        ("down_proj", "w_down", (dim, hidden)),
    ):
        yield Entry(
            f"{name}.{part}.weight", shape, (ParamSlice((*path, ours), index),), quantized=True
        )


def _norm(name: str, dim: int, path: Path, index: Shape) -> Entry:
    return _same(f"{name}.weight", (dim,), (*path, "scale"), index)


def _same(name: str, shape: Shape, path: Path, index: Shape) -> Entry:
    """A tensor whose layout is ours."""
    return Entry(name, shape, (ParamSlice(path, index),), order=tuple(range(len(shape))))


def tensor_table(
    cfg: ModelConfig, fp8: bool = False, *, dtype: str = "bfloat16"
) -> dict[str, tuple[Shape, str]]:
    """List every tensor of a released checkpoint: name → (shape, dtype name).

    Args:
        cfg: any configuration of the V2 or V3 family.
        fp8: linear weights are float8_e4m3fn, as DeepSeek-V3 was released. Each has a float32
            `weight_scale_inv` with one scale for each 128 × 128 block.
        dtype: name of the other tensors' dtype. The router's correction bias is always float32.
    Raises: ConfigError for a router, an attention or a kind of multi-token head that the released
        format does not have.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> table = tensor_table(preset("v3"), fp8=True)
        >>> len(table)
        91991
        >>> table["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
        ((576, 7168), 'float8_e4m3fn')
        >>> table["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"]
        ((5, 56), 'float32')
    """
    check_kind("cfg", cfg, ModelConfig)
    check_released(cfg)
    table: dict[str, tuple[Shape, str]] = {}
    for entry in entries(cfg):
        if cfg.tie_embeddings and entry.copy_of and not entry.mtp:
            continue  # transformers ties the head without a tensor
        if fp8 and entry.quantized:
            table[entry.name] = (entry.shape, "float8_e4m3fn")
            table[entry.name + SCALE_SUFFIX] = (entry.scale_shape, "float32")
        else:
            table[entry.name] = (entry.shape, "float32" if entry.always_float32 else dtype)
    return table


def check_released(cfg: ModelConfig) -> None:
    """Check that the released format has the model's router, attention and multi-token heads.

    Raises: ConfigError when it does not.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> check_released(replace(preset("tiny"), router="topk"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        dsv3_jax.config.fields.ConfigError: router='topk' has no released format; ...
    """
    if cfg.router not in ("sigmoid", "softmax"):
        raise ConfigError(
            f"router={cfg.router!r} has no released format; use 'sigmoid' or 'softmax'"
        )
    if cfg.attention not in ("mla", "dsa"):
        raise ConfigError(f"attention={cfg.attention!r} has no released format; use 'mla' or 'dsa'")
    if cfg.mtp_depth and cfg.mtp_kind != "deepseek":
        raise ConfigError(
            f"mtp_kind={cfg.mtp_kind!r} has no released format; use 'deepseek' or mtp_depth=0"
        )
