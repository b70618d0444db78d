"""DeepSeek-V3 on one page: the model and its losses, equation by equation.

The page is slow and obvious: attention holds all scores at once, and every expert computes every
token. The tests hold the fast code of this package against it. Not on the page: expert capacity,
routing by hash, and the rounding of indexers (`index_precision`).

Letters: B batch, T tokens that attend, S tokens attended to, D width, H heads, N nope dim,
R rope dim, X = N + R (in `choose`: the width of the indexer), V value dim, Q query latent, C
key-value latent, I index heads, E experts, K experts per token, G groups, F expert width, L layers,
W vocabulary, M multi-token heads (MTP).
Where a shape is not plain from its equation, the name of an array ends with these letters.

Parameters `p` are nested dicts, named as in `model.Transformer`. A `[None, None]` behind one adds
the axes of B and T, because the tests let JAX add none by itself.
    model   embed [W,D]; dense and sparse, each stacked along layers; norm; head [D,W] unless tied;
            M heads mtp
    block   attn_norm, attn, ffn_norm, then ffn (dense) or moe (sparse): w_router [D,E], bias [E],
            shared and experts
    attn    w_dq [D,Q], q_norm, w_uq [Q,H,X] (or w_q [D,H,X]), w_dkv [D,C+R], kv_norm, w_uk [H,N,C],
            w_uv [H,V,C], w_o [H,V,D]; gqa: w_q, and w_k and w_v of kv_heads
    ffn     w_gate [D,F], w_up [D,F], w_down [F,D], as shared has; those of experts have a leading
            axis [E]

>>> import jax, numpy as np, flax.nnx as nnx, dsv3_jax as ds
>>> cfg = ds.replace(ds.preset("tiny"), num_layers=2, mtp_depth=0)
>>> model = ds.Transformer(cfg, rngs=nnx.Rngs(0))
>>> p = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
>>> tokens = np.array([[3, 1, 4, 1, 5]], np.int32)
>>> ctx = Context(cfg, positions=np.arange(5)[None], segment_ids=np.ones((1, 5), int))
>>> bool(np.allclose(transformer(ctx, p, tokens).logits, jax.jit(model)(tokens).logits, atol=1e-4))
True
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dsv3_jax.config import ModelConfig, replace

Array = Any  # numpy.ndarray or jax.Array


class Context(NamedTuple):
    """Everything that a layer needs besides its parameters and its input."""

    cfg: ModelConfig
    positions: Array  # int [B,T]: place of each token in its document, from 0
    segment_ids: Array  # int [B,T]: document of each token, from 1; 0 is padding
    xp: ModuleType = np  # array module: numpy for values, in float64; jax.numpy for gradients
    # bool [B,T,S]: the s that t attends to, by an indexer. None means all that are `visible`
    chosen: Array | None = None


# The functions that every part uses


def rms_norm(x: Float[Array, "B T *n D"], p: dict, eps: float = 1e-6) -> Float[Array, "B T *n D"]:
    """x / √(mean(x²) + eps) · scale"""
    mean_square = (x * x).mean(-1, keepdims=True)
    return x / (mean_square + eps) ** 0.5 * p["scale"][None, None]


def layer_norm(x: Float[Array, "B T D"], p: dict, eps: float = 1e-6) -> Float[Array, "B T D"]:
    """(x - mean(x)) / √(var(x) + eps) · scale + bias"""
    centred = x - x.mean(-1, keepdims=True)
    variance = x.var(-1, keepdims=True)
    return centred / (variance + eps) ** 0.5 * p["scale"] + p["bias"]


def silu(z: Array, xp: ModuleType) -> Array:
    """z / (1 + e^-z)"""
    return z / (1 + xp.exp(-z))


def swiglu(x: Float[Array, "... D"], p: dict, xp: ModuleType) -> Float[Array, "... D"]:
    """(silu(x W_gate) ⊙ (x W_up)) W_down"""
    gate = silu(x @ p["w_gate"], xp)
    up = x @ p["w_up"]
    return (gate * up) @ p["w_down"]


def softmax(x: Float[Array, "*n E"], xp: ModuleType) -> Float[Array, "*n E"]:
    """e^x / Σ e^x"""
    weights = xp.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def log_sum_exp(x: Float[Array, "*n E"], xp: ModuleType) -> Float[Array, "*n"]:
    """ln Σ e^x"""
    largest = x.max(-1, keepdims=True)
    return xp.log(xp.exp(x - largest).sum(-1)) + largest[..., 0]


def top_k(x: Float[Array, "*n E"], k: int, xp: ModuleType) -> Int[Array, "*n K"]:
    """Indices of the k largest numbers, largest first; the lower index wins a tie."""
    return xp.argsort(-x, axis=-1, stable=True)[..., :k]


def one_hot(ids: Int[Array, "*n"], size: int, xp: ModuleType) -> Float[Array, "*n size"]:
    """1 at each id, 0 elsewhere."""
    return xp.eye(size)[ids]


# Attention


def rope_frequencies(cfg: ModelConfig) -> Float[Array, " half"]:
    """Radians per position of the R/2 pairs of features: f_i = θ^(-2i/R).

    YaRN divides the slow ones by its factor: f ← f/factor · ramp + f · (1 - ramp). The ramp rises
    from 0 at pair ⌊j(β_fast)⌋ to 1 at ⌈j(β_slow)⌉, where j(β) = R ln(L0 / 2πβ) / (2 ln θ) is the
    pair that turns β times within the original length L0.
    Source: arXiv 2104.09864 (RoPE), arXiv 2309.00071 (YaRN).
    """
    yarn = cfg.yarn
    theta = cfg.rope_theta
    dim = cfg.rope_head_dim
    pairs = np.arange(dim // 2)

    turns = np.array([yarn.beta_fast, yarn.beta_slow])
    wavelengths = yarn.original_max_positions / (2 * np.pi * turns)
    fast, slow = dim * np.log(wavelengths) / (2 * np.log(theta))
    low, high = np.clip([np.floor(fast), np.ceil(slow)], 0, dim - 1)

    ramp = np.clip((pairs - low) / max(high - low, 1e-3), 0, 1)
    return theta ** (-2 * pairs / dim) * (ramp / yarn.factor + 1 - ramp)


def yarn_scale(cfg: ModelConfig, weight: float) -> float:
    """m(w) = 0.1 · w · ln(factor) + 1, which is 1 without YaRN."""
    return 0.1 * weight * np.log(cfg.yarn.factor) + 1


def rotate(ctx: Context, x: Float[Array, "B T H X"]) -> Float[Array, "B T H X"]:
    """RoPE: turn each pair (a, b) of the last R of X features by the angle position · f_i.

    Pairs are (2i, 2i+1), or (i, i+R/2) if not interleaved. All a come first in the result: scores
    ignore the order. YaRN scales a and b by m(mscale) / m(mscale_all_dim): 1 in released models.
    """
    cfg, xp = ctx.cfg, ctx.xp
    nope, rope = xp.split(x, [x.shape[-1] - cfg.rope_head_dim], axis=-1)
    if cfg.rope_interleaved:
        a = rope[..., 0::2]
        b = rope[..., 1::2]
    else:
        a, b = xp.split(rope, 2, axis=-1)

    angles = ctx.positions[:, :, None, None] * rope_frequencies(cfg)  # [B,T,1,R/2]
    ratio = yarn_scale(cfg, cfg.yarn.mscale) / yarn_scale(cfg, cfg.yarn.mscale_all_dim)
    cos = ratio * np.cos(angles)
    sin = ratio * np.sin(angles)
    return xp.concatenate([nope, a * cos - b * sin, a * sin + b * cos], axis=-1)


def visible(ctx: Context) -> Array:
    """bool [B,T,S]: token s is in t's document, and not after t."""
    documents = ctx.segment_ids
    same = documents[:, :, None] == documents[:, None, :]
    not_after = np.tri(documents.shape[1], dtype=bool)
    return same & not_after


def attend(ctx: Context, q: Array, k: Array, v: Float[Array, "B T H V"]) -> Float[Array, "B T H V"]:
    """softmax(m² (N+R)^-1/2 q · k) v over the keys s ≤ t of one document; m is YaRN's, else 1.

    Args: q, k: [B,T,H,X]. They are rotated first.
    """
    xp = ctx.xp
    q = rotate(ctx, q)
    k = rotate(ctx, k)
    m = yarn_scale(ctx.cfg, ctx.cfg.yarn.mscale_all_dim)
    scores = xp.einsum("bthx,bshx->bhts", q, k) * q.shape[-1] ** -0.5 * m**2

    mask = visible(ctx) if ctx.chosen is None else ctx.chosen
    weights = softmax(xp.where(mask[:, None], scores, -np.inf), xp)
    return xp.einsum("bhts,bshv->bthv", weights, v)


def mla(ctx: Context, p: dict, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Multi-head latent attention, expanded: all heads' keys and values come from one c_kv a token.

    c_q = norm(x W_dq) [Q];  q = c_q W_uq [H,N+R]              without query compression: q = x W_q
    [c_kv, k_rope] = x W_dkv [C+R];  c_kv ← norm(c_kv)         a cache keeps these C + R numbers
    k = [c_kv W_ukᵀ [H,N], k_rope];  v = c_kv W_uvᵀ [H,V]      all heads share k_rope
    The latent norms use eps 1e-6, whatever norm_eps is.
    Source: DeepSeek-V2 report, section 2.1; the released code.
    """
    cfg, xp = ctx.cfg, ctx.xp

    # Queries: equations 6 to 9 of the V3 report. RoPE is left to `attend`.
    if cfg.q_latent_dim:
        c_q = rms_norm(x @ p["w_dq"], p["q_norm"])
        q = xp.einsum("btq,qhx->bthx", c_q, p["w_uq"])
    else:
        q = xp.einsum("btd,dhx->bthx", x, p["w_q"])

    # Keys and values: equations 1 to 5. A cache keeps the results of 1 and 3.
    c_kv, k_rope = xp.split(x @ p["w_dkv"], [cfg.kv_latent_dim], axis=-1)
    c_kv = rms_norm(c_kv, p["kv_norm"])
    k_nope = xp.einsum("btc,hnc->bthn", c_kv, p["w_uk"])
    k_rope = xp.repeat(k_rope[:, :, None], cfg.num_heads, axis=2)
    k = xp.concatenate([k_nope, k_rope], axis=-1)
    v = xp.einsum("btc,hvc->bthv", c_kv, p["w_uv"])

    heads = attend(ctx, q, k, v)
    return xp.einsum("bthv,hvd->btd", heads, p["w_o"])


def choose(ctx: Context, p: dict, x: Float[Array, "B T D"]) -> Array:
    """The k = index_topk tokens that each attends to, of sparse attention (DSA): bool [B,T,S].

    q_I = c_q W_iq [I,X];  k_I = LayerNorm(x W_ik) [X];  w = x W_iw [I]
    score_ts = Σ_i w_ti I^-1/2 relu(X^-1/2 q_I,ti · k_I,s);  chosen: min(k, T) largest that t sees
    The first R of X features are rotated, by `index_interleaved`.
    Source: DeepSeek-V3.2 report, section 2.1.
    """
    cfg = ctx.cfg
    xp = ctx.xp
    indexer = p["indexer"]
    c_q = rms_norm(x @ p["w_dq"], p["q_norm"])
    q = xp.einsum("btq,qix->btix", c_q, indexer["w_iq"])
    k = layer_norm(x @ indexer["w_ik"], indexer["k_norm"])
    w = x @ indexer["w_iw"] * cfg.index_heads**-0.5

    # `rotate` turns the last R features, and the indexer's are the first.
    own = ctx._replace(cfg=replace(cfg, rope_interleaved=cfg.index_interleaved))
    q = rotate(own, xp.roll(q, -cfg.rope_head_dim, axis=-1))
    k = rotate(own, xp.roll(k[:, :, None], -cfg.rope_head_dim, axis=-1))[:, :, 0]

    products = xp.einsum("btix,bsx->btis", q, k) * cfg.index_dim**-0.5
    scores = xp.einsum("bti,btis->bts", w, xp.maximum(products, 0))
    seen = visible(ctx)
    best = top_k(xp.where(seen, scores, -np.inf), cfg.index_topk, xp)  # [B,T,k]
    return (one_hot(best, x.shape[1], xp).sum(-2) > 0) & seen


def gqa(ctx: Context, p: dict, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Grouped-query attention (arXiv 2305.13245): q, k, v = x W_q, x W_k, x W_v.

    kv_heads is H in MHA, 1 in MQA. Norms in each head have scales that heads share (2302.05442).
    """
    cfg, xp = ctx.cfg, ctx.xp
    q = xp.einsum("btd,dhx->bthx", x, p["w_q"])
    k = xp.einsum("btd,dhx->bthx", x, p["w_k"])
    v = xp.einsum("btd,dhx->bthx", x, p["w_v"])
    if cfg.qk_norm:
        q = rms_norm(q, p["q_norm"], cfg.norm_eps)
        k = rms_norm(k, p["k_norm"], cfg.norm_eps)

    heads_a_group = cfg.num_heads // cfg.kv_heads
    k = xp.repeat(k, heads_a_group, axis=2)
    v = xp.repeat(v, heads_a_group, axis=2)
    heads = attend(ctx, q, k, v)
    return xp.einsum("bthv,hvd->btd", heads, p["w_o"])


# Mixture of experts


class Routing(NamedTuple):
    """The decisions of one router."""

    expert_ids: Array  # int [B,T,K]
    gates: Array  # [B,T,K]: weights of the chosen experts
    scores: Array  # [B,T,E]: unbiased scores of all experts
    log_sums: Array  # [B,T]: ln Σ_e e^logit, for the z-loss
    counted: Array  # bool [B,T]: tokens that enter the load and the balance losses


def route(ctx: Context, p: dict, x: Float[Array, "B T D"]) -> Routing:
    """Choose K experts per token: the choice c selects them, and their scores s become gates g.

    sigmoid (V3)   s = sigmoid(x W_router);  c = s + bias in the best groups
                   g = scale · s / (Σ_chosen s + 1e-20)
    sqrtsoftplus   the same (V4) with s = √ln(1 + e^(x W_router))
    softmax (V2)   s = softmax(x W_router);  c = s in the best groups
                   g = scale · s, or normalised as above
    topk, dense    s = softmax(x W_router);  c = s;  g = s / Σ_chosen s. The dense router has K = E
    Source: reports, V3 2.1.2 and V2 2.2.
    """
    cfg, xp = ctx.cfg, ctx.xp
    logits = x @ p["w_router"]
    if cfg.router == "sigmoid":
        scores = 1 / (1 + xp.exp(-logits))
    elif cfg.router == "sqrtsoftplus":
        scores = xp.logaddexp(logits, 0.0) ** 0.5
    elif cfg.router in ("softmax", "topk", "dense"):
        scores = softmax(logits, xp)
    else:
        raise ValueError(f"router={cfg.router!r} has no equations on this page")

    # The bias takes part in the choice alone (equation 16 of the V3 report): gates are of s.
    choice = scores
    if cfg.router in ("sigmoid", "sqrtsoftplus"):
        choice = choice + p["bias"][None, None]
    limited = cfg.router in ("sigmoid", "sqrtsoftplus", "softmax")
    if limited:
        choice = in_best_groups(cfg, choice, xp)
    expert_ids = top_k(choice, cfg.experts_per_token, xp)

    gates = xp.take_along_axis(scores, expert_ids, axis=-1)
    if cfg.normalize_gates or not limited:
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
    if limited:
        gates = gates * cfg.routed_scale
    return Routing(expert_ids, gates, scores, log_sum_exp(logits, xp), ctx.segment_ids != 0)


def in_best_groups(cfg: ModelConfig, choice: Array, xp: ModuleType) -> Float[Array, "B T E"]:
    """The choice where its expert is in one of the token's best groups, else -∞.

    A group's value is the sum of its two largest c (V3), or its largest (V2).
    """
    choice_BTGe = choice.reshape(*choice.shape[:2], cfg.num_groups, -1)  # e: experts of a group
    largest = 2 if cfg.group_score == "top2_sum" else 1
    value_BTG = xp.sort(choice_BTGe, axis=-1)[..., -largest:].sum(-1)

    best = top_k(value_BTG, cfg.groups_per_token, xp)
    kept_BTG = one_hot(best, cfg.num_groups, xp).sum(-2)
    limited = xp.where(kept_BTG[..., None] > 0, choice_BTGe, -np.inf)  # not 0: c can be negative
    return limited.reshape(choice.shape)


def moe(ctx: Context, p: dict, x: Float[Array, "B T D"]) -> tuple[Array, Routing]:
    """y = Σ_chosen g_e FFN_e(x) + FFN_shared(x). Source: DeepSeekMoE, arXiv 2401.06066."""
    cfg, xp = ctx.cfg, ctx.xp
    routing = route(ctx, p, x)
    chosen_BTKE = one_hot(routing.expert_ids, cfg.num_experts, xp)
    gates_BTE = (chosen_BTKE * routing.gates[..., None]).sum(-2)

    experts = {name: w[:, None] for name, w in p["experts"].items()}
    outputs_EBTD = swiglu(x[None], experts, xp)
    y = xp.einsum("bte,ebtd->btd", gates_BTE, outputs_EBTD)
    if cfg.num_shared_experts:
        y = y + swiglu(x, p["shared"], xp)
    return y, routing


# The model


def block(
    ctx: Context, p: dict, x: Float[Array, "B T D"], shared: bool = False
) -> tuple[Array, Any, Context]:
    """x ← x + Attention(norm(x));  x ← x + FFN(norm(x)). The FFN is MoE or SwiGLU, by `p`.

    With `attention="dsa"` it chooses tokens first, or attends to those that the last layer chose
    (`shared`).
    """
    cfg = ctx.cfg
    y = rms_norm(x, p["attn_norm"], cfg.norm_eps)
    if cfg.attention == "dsa" and not shared:
        ctx = ctx._replace(chosen=choose(ctx, p["attn"], y))
    attention = {"mla": mla, "dsa": mla, "mha": gqa, "gqa": gqa, "mqa": gqa}.get(cfg.attention)
    if attention is None:
        raise ValueError(f"attention={cfg.attention!r} has no equations on this page")
    x = x + attention(ctx, p["attn"], y)

    y = rms_norm(x, p["ffn_norm"], cfg.norm_eps)
    if "moe" in p:
        y, routing = moe(ctx, p["moe"], y)
        return x + y, routing, ctx
    return x + swiglu(y, p["ffn"], ctx.xp), None, ctx


def layer_of(stack: Any, layer: int) -> Any:
    """The parameters of one layer of a stack."""
    if isinstance(stack, dict):
        return {name: layer_of(part, layer) for name, part in stack.items()}
    return stack[layer]


class Output(NamedTuple):
    """The results of a forward pass."""

    logits: Array  # [B,T,W]: entry i predicts token i+1
    mtp_logits: list[Array]  # head k = 1 … M, [B,T-k,W]: entry i predicts token i+k+1
    hidden: Array  # [B,T,D]: the trunk's output after its final norm
    mtp_hidden: list[Array]  # head k, [B,T-k,D]
    routing: list[Routing]  # of the trunk's sparse layers, then of the heads with experts


def transformer(ctx: Context, p: dict, tokens: Int[Array, "B T"]) -> Output:
    """Embedding, dense blocks, sparse blocks, final norm, unembedding; then multi-token heads."""
    cfg = ctx.cfg
    x = p["embed"][tokens]
    routing = []
    of_layer = ctx  # a block's choice of tokens reaches the blocks after it
    for layer in range(cfg.num_layers):
        if layer < cfg.num_dense_layers:
            weights = layer_of(p["dense"], layer)
        else:
            weights = layer_of(p["sparse"], layer - cfg.num_dense_layers)
        x, routed, of_layer = block(of_layer, weights, x, shared=not cfg.has_indexer[layer])
        if routed is not None:
            routing.append(routed)

    h = rms_norm(x, p["norm"], cfg.norm_eps)
    below_heads = h if cfg.mtp_input == "normed" else x
    mtp_hidden, mtp_routing = mtp_heads(ctx, p, below_heads, tokens)

    unembed = p["embed"].T if cfg.tie_embeddings else p["head"]
    mtp_logits = [y @ unembed for y in mtp_hidden]
    return Output(h @ unembed, mtp_logits, h, mtp_hidden, routing + mtp_routing)


def mtp_heads(
    ctx: Context, p: dict, h: Float[Array, "B T D"], tokens: Int[Array, "B T"]
) -> tuple[list, list]:
    """Heads k = 1 … M, of which entry i predicts token i+k+1. e is the embedding of token i+k.

    deepseek   h^k = norm(Block(W_eh [norm(e), norm(h^{k-1})])): a chain from h^0 = h
    meta       h^k = norm(Block(h)), a sparse block too (arXiv 2404.19737)
    medusa     h^k = h + silu(h W) (arXiv 2401.10774)
    eagle      h^1 = Block(W_eh [e, h]), a dense block; it estimates the trunk's h of token i+1
               (arXiv 2401.15077)
    Returns: hidden states [B,T-k,D] and routing of each.
    Departs from the paper: e precedes h^{k-1}, as in the released weights.
    Source: DeepSeek-V3 report, section 2.2.
    """
    cfg, xp = ctx.cfg, ctx.xp
    hidden, routing = [], []
    for k in range(1, cfg.mtp_depth + 1):
        head = p["mtp"][k - 1]
        length = tokens.shape[1] - k
        positions = ctx.positions[:, :length]
        short = ctx._replace(positions=positions, segment_ids=ctx.segment_ids[:, :length])
        x = h[:, :length]
        e = p["embed"][tokens[:, k:]]

        if cfg.mtp_kind == "medusa":
            x = x + silu(x @ head["w"], xp)
        elif cfg.mtp_kind == "eagle":
            x = xp.concatenate([e, x], axis=-1) @ head["w_eh"]
            x, *_ = block(short, head["block"], x)
        elif cfg.mtp_kind == "meta":
            x, routed, _ = block(short, head["block"], x)
            x = rms_norm(x, head["norm"], cfg.norm_eps)
            routing.append(routed)
        else:
            # Equations 21 and 22 of the V3 report.
            e = rms_norm(e, head["embed_norm"], cfg.norm_eps)
            x = rms_norm(x, head["hidden_norm"], cfg.norm_eps)
            x = xp.concatenate([e, x], axis=-1) @ head["w_eh"]
            x, routed, _ = block(short, head["block"], x)
            x = h = rms_norm(x, head["norm"], cfg.norm_eps)  # the next depth reads it
            # A token whose e is of another document is not counted.
            routing.append(routed._replace(counted=same_document(ctx, k)))
        hidden.append(x)
    return hidden, routing


# Losses


def same_document(ctx: Context, ahead: int) -> Array:
    """bool [B,T-ahead]: the token `ahead` places on is in the same document, not padding."""
    here = ctx.segment_ids[:, :-ahead]
    there = ctx.segment_ids[:, ahead:]
    return (here == there) & (there != 0)


def mean_over(mask: Array, x: Array, xp: ModuleType) -> Array:
    """The mean of x where the mask is set; 0 where it is set nowhere."""
    return xp.where(mask, x, 0.0).sum() / xp.maximum(xp.where(mask, 1.0, 0.0).sum(), 1.0)


def cross_entropy(ctx: Context, logits: Array, tokens: Int[Array, "B T"], ahead: int) -> Array:
    """Mean of -ln p(t_{i+ahead}) over the positions i whose target is in the same document."""
    xp = ctx.xp
    mask = same_document(ctx, ahead)
    probs = softmax(logits[:, : mask.shape[1]], xp)
    of_target = xp.take_along_axis(probs, tokens[:, ahead:, None], axis=-1)[..., 0]
    return mean_over(mask, -xp.log(of_target), xp)


def balance_loss(r: Routing, xp: ModuleType) -> Float[Array, " B"]:
    """Σ_e f_e P_e of a row, f_e = E/K · mean_t [e in expert_ids_t], P_e = mean_t s_te / Σ_e s_te.

    Sequence-wise loss (V3): a row is a sequence, and expert_ids are the top K of the bare scores,
    without groups. Switch loss (arXiv 2101.03961): one row holds the batch, and expert_ids come
    from the router.
    """
    num_experts = r.scores.shape[-1]
    k = r.expert_ids.shape[-1]
    counted_BT = r.counted / np.maximum(r.counted.sum(-1, keepdims=True), 1)
    mean_over_t = counted_BT[..., None]  # weights of a mean

    # f and P: equations 18 to 20 of the V3 report. f is a count, so only P has a gradient.
    chosen_BTE = one_hot(r.expert_ids, num_experts, xp).sum(-2)
    f = num_experts / k * (chosen_BTE * mean_over_t).sum(1)
    shares_BTE = r.scores / xp.maximum(r.scores.sum(-1, keepdims=True), 1e-18)
    mean_share = (shares_BTE * mean_over_t).sum(1)
    return (f * mean_share).sum(-1)


def balance_of(ctx: Context, r: Routing) -> Array:
    """One router's α · mean sequence-wise loss + α' · Switch loss + α'' · z-loss (2202.08906)."""
    cfg, xp = ctx.cfg, ctx.xp
    bare = r._replace(expert_ids=top_k(r.scores, cfg.experts_per_token, xp))
    sequence = balance_loss(bare, xp).mean()
    batch = Routing(*(y.reshape(1, -1, *y.shape[2:]) for y in r))  # one row
    switch = balance_loss(batch, xp)[0]
    z = mean_over(r.counted, r.log_sums**2, xp)

    alpha = cfg.balance
    return alpha.sequence_alpha * sequence + alpha.switch_alpha * switch + alpha.z_alpha * z


def feature_loss(ctx: Context, out: Output, stop_gradient: Callable[[Array], Array]) -> Array:
    """EAGLE's SmoothL1 distance from h^1 at token i to the trunk's h at token i+1, a constant."""
    xp = ctx.xp
    d = abs(out.mtp_hidden[0][:, :-1] - stop_gradient(out.hidden[:, 1:-1]))
    smooth_l1 = xp.where(d < 1, d * d / 2, d - 0.5).mean(-1)
    return mean_over(same_document(ctx, 2), smooth_l1, xp)


class Losses(NamedTuple):
    """The loss that training minimises, and its parts: means over the positions with a target."""

    # main + λ · heads + balance; heads is the mean of mtp, for EAGLE feature + 0.1 mtp
    total: Array
    main: Array  # cross-entropy of the next token
    mtp: list[Array]  # cross-entropy of each head
    feature: Array  # of EAGLE, see `feature_loss`; else 0
    balance: Array  # of all routers, see `balance_of`


def losses(
    ctx: Context,
    p: dict,
    tokens: Int[Array, "B T"],
    mtp_weight: float,
    stop_gradient: Callable[[Array], Array] = lambda x: x,
) -> Losses:
    """All losses; λ is mtp_weight. Gradients need JAX's stop_gradient.

    Source: DeepSeek-V3 report, equations 17-25.
    """
    out = transformer(ctx, p, tokens)
    main = cross_entropy(ctx, out.logits, tokens, ahead=1)
    mtp = [cross_entropy(ctx, y, tokens, ahead) for ahead, y in enumerate(out.mtp_logits, 2)]

    heads = sum(mtp) / max(len(mtp), 1)
    feature = 0.0
    if ctx.cfg.mtp_kind == "eagle" and mtp:
        feature = feature_loss(ctx, out, stop_gradient)
        heads = feature + 0.1 * heads

    balance = sum(balance_of(ctx, r) for r in out.routing)
    return Losses(main + mtp_weight * heads + balance, main, mtp, feature, balance)


def updated_bias(
    bias: Float[Array, " E"], load: Float[Array, " E"], rate: float
) -> Float[Array, " E"]:
    """Loss-free balance (arXiv 2408.15664), of the whole batch: b_e + γ sign(mean load - load_e).

    The rule "sign".
    """
    return bias + rate * np.sign(load.mean() - load)
