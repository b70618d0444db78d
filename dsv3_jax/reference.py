"""DeepSeek-V3 on one page: the model and its losses, equation by equation.

The page is slow and obvious: attention holds all scores at once, and every expert computes every token. The tests hold
the fast code of this package against it. Not on the page: expert capacity, routing by noise or by hash.

Letters: B batch, T tokens, D width, H heads, N nope dim, R rope dim, V value dim, Q query latent, C key-value latent,
E experts, K experts per token, G groups, F expert width, L layers, W vocabulary, M multi-token heads (MTP).

Parameters `p` are nested dicts, named as in `model.Transformer`:
    model   embed [W,D]; dense and sparse, each stacked along layers; norm; head [D,W] unless tied; M heads mtp
    block   attn_norm, attn, ffn_norm, then ffn (dense) or moe (sparse): w_router [D,E], bias [E], shared and experts
    ffn     w_gate [D,F], w_up [D,F], w_down [F,D], as shared has; those of experts have a leading axis [E]

>>> import jax, numpy as np, flax.nnx as nnx, dsv3_jax as ds
>>> model = ds.Transformer(ds.replace(ds.preset("tiny"), num_layers=2, mtp_depth=0), rngs=nnx.Rngs(0))
>>> p, tokens = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model))), np.array([[3, 1, 4, 1, 5]], np.int32)
>>> ctx = Context(model.cfg, positions=np.arange(5)[None], segment_ids=np.ones((1, 5), int))
>>> bool(np.allclose(transformer(ctx, p, tokens).logits, jax.jit(model)(tokens).logits, atol=1e-4))
True
"""

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
    xp: Any = np  # array module: numpy for values, in float64; jax.numpy for gradients
    chosen: Array | None = None  # bool [B,T,S]: the tokens s that t attends to, by an indexer; None: all that it sees


def rms_norm(x: Float[Array, "B T *n D"], p: dict, eps: float = 1e-6) -> Float[Array, "B T *n D"]:
    """x / √(mean(x²) + eps) · scale"""
    return x / ((x * x).mean(-1, keepdims=True) + eps) ** 0.5 * p["scale"][None, None]


def swiglu(x: Float[Array, "... D"], p: dict, xp) -> Float[Array, "... D"]:
    """(silu(x W_gate) ⊙ (x W_up)) W_down, with silu(z) = z / (1 + e^-z)"""
    gate = x @ p["w_gate"]
    return (gate / (1 + xp.exp(-gate)) * (x @ p["w_up"])) @ p["w_down"]


def softmax(x: Float[Array, "*n E"], xp) -> Float[Array, "*n E"]:
    """e^x / Σ e^x"""
    weights = xp.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def top_k(x: Float[Array, "*n E"], k: int, xp) -> Int[Array, "*n K"]:
    """Indices of the k largest numbers, largest first; the lower index wins a tie."""
    return xp.argsort(-x, axis=-1, stable=True)[..., :k]


def rope_frequencies(cfg: ModelConfig) -> Float[Array, " half"]:
    """Radians per position of the R/2 pairs of features: f_i = θ^(-2i/R). YaRN divides the slow ones by its factor.

    f ← f/factor · ramp + f · (1 - ramp); the ramp rises from 0 at pair ⌊j(β_fast)⌋ to 1 at ⌈j(β_slow)⌉, where
    j(β) = R ln(L0 / 2πβ) / (2 ln θ) is the pair that turns β times within the original length L0.
    Source: arXiv 2104.09864 (RoPE), arXiv 2309.00071 (YaRN).
    """
    yarn, theta, dim, pairs = cfg.yarn, cfg.rope_theta, cfg.rope_head_dim, np.arange(cfg.rope_head_dim // 2)
    turns = np.array([yarn.beta_fast, yarn.beta_slow])
    fast, slow = dim * np.log(yarn.original_max_positions / (2 * np.pi * turns)) / (2 * np.log(theta))
    low, high = np.clip([np.floor(fast), np.ceil(slow)], 0, dim - 1)
    ramp = np.clip((pairs - low) / max(high - low, 1e-3), 0, 1)
    return theta ** (-2 * pairs / dim) * (ramp / yarn.factor + 1 - ramp)


def rotate(ctx: Context, x: Float[Array, "B T H X"]) -> Float[Array, "B T H X"]:
    """RoPE: turn each pair (a, b) of the last R of X = N + R features by the angle position · f_i.

    Pairs are (2i, 2i+1), or (i, i+R/2) if not interleaved. All a come first in the result: scores ignore the order.
    YaRN scales a and b by m(mscale) / m(mscale_all_dim), m(w) = 0.1 · w · ln(factor) + 1: by 1 in released models.
    """
    cfg, yarn, log_factor = ctx.cfg, ctx.cfg.yarn, np.log(ctx.cfg.yarn.factor)
    nope, rope = ctx.xp.split(x, [x.shape[-1] - cfg.rope_head_dim], axis=-1)
    a, b = (rope[..., 0::2], rope[..., 1::2]) if cfg.rope_interleaved else ctx.xp.split(rope, 2, axis=-1)
    angles = ctx.positions[:, :, None, None] * rope_frequencies(cfg)  # [B,T,1,R/2]
    ratio = (0.1 * yarn.mscale * log_factor + 1) / (0.1 * yarn.mscale_all_dim * log_factor + 1)
    cos, sin = ratio * np.cos(angles), ratio * np.sin(angles)
    return ctx.xp.concatenate([nope, a * cos - b * sin, a * sin + b * cos], axis=-1)


def attend(ctx: Context, q: Array, k: Array, v: Float[Array, "B T H V"]) -> Float[Array, "B T H V"]:
    """softmax(m² (N+R)^-1/2 q · k) v over the keys s ≤ t of one document. q and k [B,T,H,N+R] are rotated first."""
    xp, yarn = ctx.xp, ctx.cfg.yarn
    m = 0.1 * yarn.mscale_all_dim * np.log(yarn.factor) + 1  # from YaRN; else 1
    scores = xp.einsum("bthx,bshx->bhts", rotate(ctx, q), rotate(ctx, k)) * q.shape[-1] ** -0.5 * m**2
    mask = visible(ctx) if ctx.chosen is None else ctx.chosen
    return xp.einsum("bhts,bshv->bthv", softmax(xp.where(mask[:, None], scores, -np.inf), xp), v)


def visible(ctx: Context) -> Array:
    """bool [B,T,S]: token s is in t's document, and not after t."""
    documents = ctx.segment_ids
    return (documents[:, :, None] == documents[:, None, :]) & np.tri(documents.shape[1], dtype=bool)


def choose(ctx: Context, p: dict, x: Float[Array, "B T D"]) -> Array:
    """The k tokens that each token attends to, of sparse attention (DSA): bool [B,T,S].

    q_I = c_q W_iq [I,X];  k_I = LayerNorm(x W_ik) [X];  w = x W_iw [I]
    score_ts = Σ_i w_ti I^-1/2 relu(X^-1/2 q_I,ti · k_I,s);  chosen: the min(k, T) largest that t sees
    The first R of X features are rotated, by `index_interleaved`. Source: DeepSeek-V3.2 report, section 2.1.
    """
    cfg, xp, indexer = ctx.cfg, ctx.xp, p["indexer"]
    q = xp.einsum("btq,qix->btix", rms_norm(x @ p["w_dq"], p["q_norm"]), indexer["w_iq"])
    k, norm = x @ indexer["w_ik"], indexer["k_norm"]
    k = (k - k.mean(-1, keepdims=True)) / (k.var(-1, keepdims=True) + 1e-6) ** 0.5 * norm["scale"] + norm["bias"]
    own = ctx._replace(cfg=replace(cfg, rope_interleaved=cfg.index_interleaved))
    q, k = (rotate(own, xp.roll(y, -cfg.rope_head_dim, axis=-1)) for y in (q, k[:, :, None]))
    scores = xp.maximum(xp.einsum("btix,bsx->btis", q, k[:, :, 0]) * cfg.index_dim**-0.5, 0)
    scores = xp.einsum("bti,btis->bts", x @ indexer["w_iw"] * cfg.index_heads**-0.5, scores)
    best = top_k(xp.where(visible(ctx), scores, -np.inf), cfg.index_topk, xp)
    return (xp.eye(x.shape[1])[best].sum(-2) > 0) & visible(ctx)


def mla(ctx: Context, p: dict, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Multi-head latent attention, expanded: the keys and values of all heads come from one latent c_kv per token.

    c_q = norm(x W_dq) [Q];  q = c_q W_uq [H,N+R]              without query compression: q = x W_q
    [c_kv, k_rope] = x W_dkv [C+R];  c_kv ← norm(c_kv)         a cache keeps these C + R numbers per token
    k = [c_kv W_uk [H,N], k_rope];  v = c_kv W_uv [H,V]        all heads share k_rope
    The latent norms use eps 1e-6, whatever norm_eps is. Source: DeepSeek-V2 report, section 2.1; the released code.
    """
    cfg, xp = ctx.cfg, ctx.xp
    c_q, w_q = (rms_norm(x @ p["w_dq"], p["q_norm"]), p["w_uq"]) if cfg.q_latent_dim else (x, p["w_q"])
    q = xp.einsum("btq,qhx->bthx", c_q, w_q)
    c_kv, k_rope = xp.split(x @ p["w_dkv"], [cfg.kv_latent_dim], axis=-1)
    c_kv, k_rope = rms_norm(c_kv, p["kv_norm"]), xp.repeat(k_rope[:, :, None], cfg.num_heads, axis=2)
    k = xp.concatenate([xp.einsum("btc,hnc->bthn", c_kv, p["w_uk"]), k_rope], axis=-1)
    v = xp.einsum("btc,hvc->bthv", c_kv, p["w_uv"])
    return xp.einsum("bthv,hvd->btd", attend(ctx, q, k, v), p["w_o"])


def gqa(ctx: Context, p: dict, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Grouped-query attention (arXiv 2305.13245): q, k, v = x W_q, x W_k, x W_v. kv_heads is H in MHA, 1 in MQA."""
    q, k, v = (ctx.xp.einsum("btd,dhx->bthx", x, p[w]) for w in ("w_q", "w_k", "w_v"))
    if ctx.cfg.qk_norm:  # in each head, with scales that heads share (arXiv 2302.05442)
        q, k = (rms_norm(y, p[norm], ctx.cfg.norm_eps) for y, norm in ((q, "q_norm"), (k, "k_norm")))
    k, v = (ctx.xp.repeat(y, ctx.cfg.num_heads // ctx.cfg.kv_heads, axis=2) for y in (k, v))
    return ctx.xp.einsum("bthv,hvd->btd", attend(ctx, q, k, v), p["w_o"])


class Routing(NamedTuple):
    """The decisions of one router."""

    expert_ids: Array  # int [B,T,K]
    gates: Array  # [B,T,K]: weights of the chosen experts
    scores: Array  # [B,T,E]: unbiased scores of all experts
    log_sums: Array  # [B,T]: ln Σ_e e^logit, for the z-loss
    counted: Array  # bool [B,T]: tokens that enter the load and the balance losses


def route(ctx: Context, p: dict, x: Float[Array, "B T D"]) -> Routing:
    """Choose K experts per token: the choice c selects them, and their unbiased scores s become gates g.

    sigmoid (V3)   s = sigmoid(x W_router);  c = s + bias in the best groups;  g = scale · s / (Σ_chosen s + 1e-20)
    sqrtsoftplus   the same (V4) with s = √ln(1 + e^(x W_router))
    softmax (V2)   s = softmax(x W_router);  c = s in the best groups;  g = scale · s, or normalised as above
    topk, dense    s = softmax(x W_router);  c = s;  g = s / Σ_chosen s. The dense router has K = E
    A group's value is the sum of its two largest c (V3), or its largest (V2). Source: reports, V3 2.1.2 and V2 2.2.
    """
    cfg, xp, logits = ctx.cfg, ctx.xp, x @ p["w_router"]
    biased, limited = cfg.router in ("sigmoid", "sqrtsoftplus"), cfg.router in ("sigmoid", "sqrtsoftplus", "softmax")
    log_sums = xp.log(xp.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    positive = 1 / (1 + xp.exp(-logits)) if cfg.router == "sigmoid" else xp.logaddexp(logits, 0.0) ** 0.5
    scores = positive if biased else softmax(logits, xp)
    choice = scores + p["bias"][None, None] if biased else scores
    if limited:
        groups = choice.reshape(*choice.shape[:2], cfg.num_groups, -1)  # [B,T,G,E/G]
        value = xp.sort(groups, axis=-1)[..., -2 if cfg.group_score == "top2_sum" else -1 :].sum(-1)
        kept = xp.eye(cfg.num_groups)[top_k(value, cfg.groups_per_token, xp)].sum(-2)  # [B,T,G]
        choice = xp.where(kept[..., None] > 0, groups, -np.inf).reshape(choice.shape)  # not 0: c can be negative
    expert_ids = top_k(choice, cfg.experts_per_token, xp)
    gates = xp.take_along_axis(scores, expert_ids, axis=-1)
    if cfg.normalize_gates or not limited:
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
    return Routing(expert_ids, gates * (cfg.routed_scale if limited else 1), scores, log_sums, ctx.segment_ids != 0)


def moe(ctx: Context, p: dict, x: Float[Array, "B T D"]) -> tuple[Array, Routing]:
    """y = Σ_chosen g_e FFN_e(x) + FFN_shared(x). Source: DeepSeekMoE, arXiv 2401.06066."""
    xp, routing = ctx.xp, route(ctx, p, x)
    gates = (xp.eye(ctx.cfg.num_experts)[routing.expert_ids] * routing.gates[..., None]).sum(-2)  # [B,T,E]
    outputs = swiglu(x[None], {name: w[:, None] for name, w in p["experts"].items()}, xp)  # [E,B,T,D]
    y = xp.einsum("bte,ebtd->btd", gates, outputs)
    return y + swiglu(x, p["shared"], xp) if ctx.cfg.num_shared_experts else y, routing


def block(ctx: Context, p: dict, x: Float[Array, "B T D"], shared: bool = False) -> tuple[Array, Any, Context]:
    """x ← x + Attention(norm(x));  x ← x + FFN(norm(x)). The FFN is MoE or SwiGLU, by its parameters.

    With `attention="dsa"` it chooses tokens first, or attends to those that the last layer chose (`shared`).
    """
    cfg, y = ctx.cfg, rms_norm(x, p["attn_norm"], ctx.cfg.norm_eps)
    if cfg.attention == "dsa" and not shared:
        ctx = ctx._replace(chosen=choose(ctx, p["attn"], y))
    x = x + (mla if cfg.attention in ("mla", "dsa") else gqa)(ctx, p["attn"], y)
    y = rms_norm(x, p["ffn_norm"], cfg.norm_eps)
    y, routing = moe(ctx, p["moe"], y) if "moe" in p else (swiglu(y, p["ffn"], ctx.xp), None)
    return x + y, routing, ctx


def layer_of(stack: Any, layer: int) -> Any:
    """The parameters of one layer of a stack."""
    return {k: layer_of(v, layer) for k, v in stack.items()} if isinstance(stack, dict) else stack[layer]


class Output(NamedTuple):
    """The results of a forward pass."""

    logits: Array  # [B,T,W]: entry i predicts token i+1
    mtp_logits: list[Array]  # head k = 1 … M, [B,T-k,W]: entry i predicts token i+k+1
    hidden: Array  # [B,T,D]: the trunk's output after its final norm
    mtp_hidden: list[Array]  # head k, [B,T-k,D]
    routing: list[Routing]  # of the trunk's sparse layers, then of the heads with experts


def transformer(ctx: Context, p: dict, tokens: Int[Array, "B T"]) -> Output:
    """Embedding, dense blocks, sparse blocks, final norm, unembedding; then the multi-token heads."""
    cfg, routing, x, of_layer = ctx.cfg, [], p["embed"][tokens], ctx
    for layer in range(cfg.num_layers):
        kind, first = ("dense", 0) if layer < cfg.num_dense_layers else ("sparse", cfg.num_dense_layers)
        x, routed, of_layer = block(of_layer, layer_of(p[kind], layer - first), x, not cfg.has_indexer[layer])
        routing += [] if routed is None else [routed]
    h = rms_norm(x, p["norm"], cfg.norm_eps)
    mtp_hidden, mtp_routing = mtp_heads(ctx, p, h if cfg.mtp_input == "normed" else x, tokens)
    unembed = p["embed"].T if cfg.tie_embeddings else p["head"]
    return Output(h @ unembed, [y @ unembed for y in mtp_hidden], h, mtp_hidden, routing + mtp_routing)


def mtp_heads(ctx: Context, p: dict, h: Float[Array, "B T D"], tokens: Int[Array, "B T"]) -> tuple[list, list]:
    """Heads k = 1 … M, of which entry i predicts token i+k+1. Returns hidden states [B,T-k,D] and routing of each.

    deepseek   h^k = norm(Block(W_eh [norm(e), norm(h^{k-1})])): a chain from h^0 = h. e is the embedding of token i+k
    meta       h^k = norm(Block(h)), a sparse block too (arXiv 2404.19737)
    medusa     h^k = h + silu(h W) (arXiv 2401.10774)
    eagle      h^1 = Block(W_eh [e, h]), a dense block; it estimates the trunk's h of token i+1 (arXiv 2401.15077)
    Departs from the paper: e precedes h^{k-1}, as in the released weights. Source: DeepSeek-V3 report, section 2.2.
    """
    cfg, xp, hidden, routing = ctx.cfg, ctx.xp, [], []
    for k in range(1, cfg.mtp_depth + 1):
        head, length = p["mtp"][k - 1], tokens.shape[1] - k
        short = ctx._replace(positions=ctx.positions[:, :length], segment_ids=ctx.segment_ids[:, :length])
        e, x = p["embed"][tokens[:, k:]], h[:, :length]
        if cfg.mtp_kind == "medusa":
            gate = x @ head["w"]
            x = x + gate / (1 + xp.exp(-gate))
        elif cfg.mtp_kind == "eagle":
            x, *_ = block(short, head["block"], xp.concatenate([e, x], axis=-1) @ head["w_eh"])
        else:
            if cfg.mtp_kind == "deepseek":
                e, x = rms_norm(e, head["embed_norm"], cfg.norm_eps), rms_norm(x, head["hidden_norm"], cfg.norm_eps)
                x = xp.concatenate([e, x], axis=-1) @ head["w_eh"]
            x, routed, _ = block(short, head["block"], x)
            x = rms_norm(x, head["norm"], cfg.norm_eps)
            if cfg.mtp_kind == "deepseek":  # the next depth reads x; an e of another document is not counted
                h, routed = x, routed._replace(counted=same_document(ctx, k))
            routing.append(routed)
        hidden.append(x)
    return hidden, routing


def same_document(ctx: Context, ahead: int) -> Array:
    """bool [B,T-ahead]: the token `ahead` places on is in the same document, which is not padding."""
    return (ctx.segment_ids[:, :-ahead] == ctx.segment_ids[:, ahead:]) & (ctx.segment_ids[:, ahead:] != 0)


def cross_entropy(ctx: Context, logits: Array, tokens: Int[Array, "B T"], ahead: int) -> Array:
    """Mean of -ln p(t_{i+ahead}) over the positions i whose target is in the same document."""
    mask = same_document(ctx, ahead)
    probs = softmax(logits[:, : mask.shape[1]], ctx.xp)
    nats = -ctx.xp.log(ctx.xp.take_along_axis(probs, tokens[:, ahead:, None], axis=-1)[..., 0])
    return ctx.xp.where(mask, nats, 0.0).sum() / int(mask.sum())


def balance_loss(r: Routing, xp) -> Float[Array, " B"]:
    """Σ_e f_e P_e of each row, with f_e = E/K · mean_t [e in expert_ids_t] and P_e = mean_t s_te / Σ_e s_te.

    Sequence-wise loss (V3): a row is a sequence, and expert_ids are the top K of the bare scores, without groups.
    Switch loss (arXiv 2101.03961): one row holds the batch, and expert_ids come from the router.
    """
    num_experts, k = r.scores.shape[-1], r.expert_ids.shape[-1]
    mean = (r.counted / np.maximum(r.counted.sum(-1, keepdims=True), 1))[..., None]  # [B,T,1]: weights of a mean over t
    f = num_experts / k * (xp.eye(num_experts)[r.expert_ids].sum(-2) * mean).sum(1)
    return (f * (r.scores / (r.scores.sum(-1, keepdims=True) + 1e-20) * mean).sum(1)).sum(-1)


class Losses(NamedTuple):
    """The loss that training minimises, and its parts: means over the positions that have a target."""

    total: Array  # main + λ · heads + balance; heads is the mean of mtp, for EAGLE feature + 0.1 mtp
    main: Array  # cross-entropy of the next token
    mtp: list[Array]  # cross-entropy of each head
    feature: Array  # EAGLE's SmoothL1 distance from h^1 at token i to the trunk's h at token i+1, a constant
    balance: Array  # over all routers: Σ of α · mean sequence-wise loss + α' · Switch loss + α'' · z-loss (2202.08906)


def losses(ctx: Context, p: dict, tokens: Int[Array, "B T"], mtp_weight: float, stop_gradient=lambda x: x) -> Losses:
    """All losses; λ is mtp_weight. Gradients need JAX's stop_gradient. Source: DeepSeek-V3 report, equations 17-25."""
    cfg, xp, out, balance, feature = ctx.cfg, ctx.xp, transformer(ctx, p, tokens), 0.0, 0.0
    main, *mtp = (cross_entropy(ctx, y, tokens, ahead) for ahead, y in enumerate([out.logits, *out.mtp_logits], 1))
    heads = sum(mtp) / max(len(mtp), 1)
    if cfg.mtp_kind == "eagle" and mtp:
        mask = same_document(ctx, 2)
        d = abs(out.mtp_hidden[0][:, :-1] - stop_gradient(out.hidden[:, 1:-1]))
        feature = xp.where(mask, xp.where(d < 1, d * d / 2, d - 0.5).mean(-1), 0.0).sum() / int(mask.sum())
        heads = feature + 0.1 * heads
    for r in out.routing:
        sequence = balance_loss(r._replace(expert_ids=top_k(r.scores, cfg.experts_per_token, xp)), xp).mean()
        switch = balance_loss(Routing(*(y.reshape(1, -1, *y.shape[2:]) for y in r)), xp)[0]  # the batch is one row
        z = xp.where(r.counted, r.log_sums**2, 0.0).sum() / xp.maximum(xp.where(r.counted, 1.0, 0.0).sum(), 1.0)
        balance += cfg.balance.sequence_alpha * sequence + cfg.balance.switch_alpha * switch + cfg.balance.z_alpha * z
    return Losses(main + mtp_weight * heads + balance, main, mtp, feature, balance)


def updated_bias(bias: Float[Array, " E"], load: Float[Array, " E"], rate: float) -> Float[Array, " E"]:
    """Loss-free balance (arXiv 2408.15664): b_e + γ sign(mean load - load_e), of the whole batch. The rule "sign"."""
    return bias + rate * np.sign(load.mean() - load)
