"""A whole model and its loss, slow and obvious: the equations in their order, layer after layer, nothing in blocks.

Written once for two array modules, `xp`: NumPy in float64 for values, jax.numpy for gradients (under `x64`).
Nothing here is shared with the library. Letters as in oracles.py; a parameter is named as the modules name it.
"""

import jax
import numpy as np
from flax import nnx
from oracles import causal_mask, yarn_frequencies, yarn_mscale


def parameters(model) -> dict:
    """All of a model's variables, float64, as nested dicts."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(model)))


def layer_of(stacked: dict, layer: int) -> dict:
    return jax.tree.map(lambda a: a[layer], stacked)


class Oracle:
    """`outputs` of tokens, and the `loss`, with the parameters of one model."""

    def __init__(self, xp, cfg, segment_ids, positions):
        self.xp, self.cfg, self.segment_ids, self.positions = xp, cfg, segment_ids, positions

    # layers

    def norm(self, x, p, eps):
        return x / self.xp.sqrt((x * x).mean(-1)[..., None] + eps) * p["scale"][(None,) * (x.ndim - 1)]

    def swiglu(self, x, w_gate, w_up, w_down):
        gate = x @ w_gate
        return (gate / (1 + self.xp.exp(-gate)) * (x @ w_up)) @ w_down

    def rotate(self, x, positions):
        """x[B,T,H,R], each pair turned by its angle."""
        xp, cfg = self.xp, self.cfg
        yarn = cfg.yarn
        if yarn.factor > 1:
            freqs = yarn_frequencies(
                cfg.rope_head_dim, cfg.rope_theta, yarn.factor, yarn.original_max_positions,
                yarn.beta_fast, yarn.beta_slow,
            )  # fmt: skip
        else:
            freqs = cfg.rope_theta ** (-np.arange(0, cfg.rope_head_dim, 2) / cfg.rope_head_dim)
        ratio = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
        turned = [None] * cfg.rope_head_dim
        for i, f in enumerate(freqs):
            a, b = (2 * i, 2 * i + 1) if cfg.rope_interleaved else (i, i + len(freqs))
            cos, sin = ratio * np.cos(f * positions)[..., None], ratio * np.sin(f * positions)[..., None]
            turned[a] = x[..., a] * cos - x[..., b] * sin
            turned[b] = x[..., a] * sin + x[..., b] * cos
        return xp.stack(turned, axis=-1)

    def attention(self, p, x, short):
        xp, cfg = self.xp, self.cfg
        positions = self.positions[:, :short]
        if cfg.q_latent_dim is None:
            q = xp.einsum("btd,dhk->bthk", x, p["w_q"])
        else:
            q = xp.einsum("btq,qhk->bthk", self.norm(x @ p["w_dq"], p["q_norm"], 1e-6), p["w_uq"])
        q_nope, q_rope = q[..., : cfg.nope_head_dim], self.rotate(q[..., cfg.nope_head_dim :], positions)
        down = x @ p["w_dkv"]
        c_kv = self.norm(down[..., : cfg.kv_latent_dim], p["kv_norm"], 1e-6)
        k_rope = self.rotate(down[:, :, None, cfg.kv_latent_dim :], positions)[:, :, 0]
        k_nope = xp.einsum("bsc,hnc->bshn", c_kv, p["w_uk"])
        scores = xp.einsum("bthn,bshn->bhts", q_nope, k_nope) + xp.einsum("bthr,bsr->bhts", q_rope, k_rope)
        m = yarn_mscale(cfg.yarn.factor, cfg.yarn.mscale_all_dim)
        scores = scores * (cfg.nope_head_dim + cfg.rope_head_dim) ** -0.5 * m**2
        mask = causal_mask(x.shape[0], short, self.segment_ids[:, :short])
        weights = self.softmax(xp.where(mask[:, None], scores, -np.inf))
        out = xp.einsum("bhts,bshv->bthv", weights, xp.einsum("bsc,hvc->bshv", c_kv, p["w_uv"]))
        return xp.einsum("bthv,hvd->btd", out, p["w_o"])

    def softmax(self, x):
        weights = self.xp.exp(x - x.max(-1)[..., None])
        return weights / weights.sum(-1)[..., None]

    def route(self, p, x):
        """(expert_ids, gates, scores) [B,T,…], by the rule that the configuration names."""
        xp, cfg = self.xp, self.cfg
        logits = x @ p["w_router"]
        scores = 1 / (1 + xp.exp(-logits)) if cfg.router == "sigmoid" else self.softmax(logits)
        if cfg.router == "dense":
            return np.broadcast_to(np.arange(cfg.num_experts), scores.shape), scores, scores
        choice = scores + p["bias"][None, None] if cfg.router == "sigmoid" else scores
        if cfg.router in ("sigmoid", "softmax"):
            grouped = choice.reshape(*choice.shape[:2], cfg.num_groups, -1)
            best = xp.sort(grouped, axis=-1)
            value = best[..., -2:].sum(-1) if cfg.group_score == "top2_sum" else best[..., -1]
            kept = xp.argsort(-value, axis=-1)[..., : cfg.groups_per_token]
            allowed = (kept[..., None] == np.arange(cfg.num_groups)[None, None, None]).any(-2)
            choice = xp.where(allowed[..., None], grouped, -np.inf).reshape(choice.shape)
        ids = xp.argsort(-choice, axis=-1)[..., : cfg.experts_per_token]
        gates = xp.take_along_axis(scores, ids, axis=-1)
        if cfg.router == "topk":
            return ids, gates / gates.sum(-1)[..., None], scores  # is the softmax over the chosen logits alone
        if cfg.normalize_gates:
            gates = gates / (gates.sum(-1)[..., None] + 1e-20)
        return ids, gates * cfg.routed_scale, scores

    def dense(self, p, x, short):
        """One dense block."""
        x = x + self.attention(p["attn"], self.norm(x, p["attn_norm"], self.cfg.norm_eps), short)
        y = self.norm(x, p["ffn_norm"], self.cfg.norm_eps)
        return x + self.swiglu(y, *(p["ffn"][w] for w in ("w_gate", "w_up", "w_down")))

    def sparse(self, p, experts, x, short, reads=0):
        """One sparse block; notes what its router did. `reads`: how many places on stands the token that it reads."""
        xp, cfg = self.xp, self.cfg
        x = x + self.attention(p["attn"], self.norm(x, p["attn_norm"], cfg.norm_eps), short)
        y = self.norm(x, p["ffn_norm"], cfg.norm_eps)
        ids, gates, scores = self.route(p["moe"], y)
        out = self.swiglu(y, *(p["moe"]["shared"][w] for w in ("w_gate", "w_up", "w_down")))
        # Every expert computes every token, and a token takes gate times those that it chose.
        chosen = ids[..., None] == np.arange(cfg.num_experts)[None, None, None]
        weight = xp.where(chosen, gates[..., None], 0.0).sum(-2)
        gate = xp.einsum("btd,edf->btef", y, experts["w_gate"])
        hidden = gate / (1 + xp.exp(-gate)) * xp.einsum("btd,edf->btef", y, experts["w_up"])
        out = out + xp.einsum("btef,efd,bte->btd", hidden, experts["w_down"], weight)
        # A position counts while the token that it reads stands in its document.
        here, read = self.segment_ids[:, :short], self.segment_ids[:, reads : reads + short]
        counts = (here != 0) & (here == read)
        self.routing.append((ids, gates, self.balance_loss(ids, scores, counts)))
        return x + out

    # the model

    def outputs(self, p, tokens):
        """(logits [B,T,W], list of MTP logits); `self.routing` then holds (ids, gates, balance loss), MTP's last."""
        cfg, self.routing = self.cfg, []
        length = tokens.shape[1]
        head = p["embed"].T if cfg.tie_embeddings else p["head"]
        x = p["embed"][tokens]
        for layer in range(cfg.num_dense_layers):
            x = self.dense(layer_of(p["dense"], layer), x, length)
        for layer in range(cfg.num_sparse_layers):
            x = self.sparse(layer_of(p["sparse"], layer), layer_of(p["experts"], layer), x, length)
        h = self.norm(x, p["norm"], cfg.norm_eps)
        logits = h @ head
        self.features = h
        made = self.heads(p, h if cfg.mtp_input == "normed" else x, tokens)
        self.drafted = made
        return logits, [h @ head for h in made]

    def heads(self, p, h, tokens):
        """What each multi-token head makes of the trunk's output, for the shared unembedding."""
        xp, cfg = self.xp, self.cfg
        made = []
        for k in range(1, cfg.mtp_depth + 1):
            module, short = p["mtp"][k - 1], tokens.shape[1] - k
            later = p["embed"][tokens[:, k:]]
            if cfg.mtp_kind == "deepseek":
                embedded = self.norm(later, module["embed_norm"], cfg.norm_eps)
                hidden = self.norm(h[:, :short], module["hidden_norm"], cfg.norm_eps)
                x = xp.concatenate([embedded, hidden], axis=-1) @ module["w_eh"]
                x = self.sparse(module["block"], layer_of(module["experts"], 0), x, short, reads=k)
                h = self.norm(x, module["norm"], cfg.norm_eps)  # the next depth goes on from it
                made.append(h)
            elif cfg.mtp_kind == "meta":
                x = self.sparse(module["block"], layer_of(module["experts"], 0), h[:, :short], short)
                made.append(self.norm(x, module["norm"], cfg.norm_eps))
            elif cfg.mtp_kind == "medusa":
                x = h[:, :short] @ module["w"]
                made.append(h[:, :short] + x / (1 + xp.exp(-x)))
            else:
                x = xp.concatenate([later, h[:, :short]], axis=-1) @ module["w_eh"]
                made.append(self.dense(module["block"], x, short))
        return made

    # the loss

    def balance_loss(self, ids, scores, mask):
        xp, cfg = self.xp, self.cfg
        experts = np.arange(cfg.num_experts)[None, None, None]
        weight = mask.astype(np.float64)[..., None]
        shares = scores / scores.sum(-1)[..., None] * weight
        tokens = np.maximum(weight.sum(1), 1)  # [B,1]
        bare = xp.argsort(-scores, axis=-1)[..., : cfg.experts_per_token]
        chosen = xp.where((bare[..., None] == experts).any(-2), weight, 0.0).sum(1)
        f = chosen * cfg.num_experts / (cfg.experts_per_token * tokens)
        sequence = (f * shares.sum(1) / tokens).sum(-1).mean()
        routed = xp.where((ids[..., None] == experts).any(-2), weight, 0.0).sum((0, 1))
        switch = cfg.num_experts * (routed / routed.sum() * shares.sum((0, 1)) / weight.sum()).sum()
        return cfg.balance.sequence_alpha * sequence + cfg.balance.switch_alpha * switch

    def nats(self, logits, tokens, ahead):
        """(nats [B,T-ahead], mask): of the tokens `ahead` places on that stand in the same document."""
        wanted, here, there = tokens[:, ahead:], self.segment_ids[:, :-ahead], self.segment_ids[:, ahead:]
        probs = self.softmax(logits[:, : wanted.shape[1]])
        picked = self.xp.take_along_axis(probs, wanted[..., None], axis=-1)[..., 0]
        return -self.xp.log(picked), (here == there) & (here != 0)

    def regression(self):
        """SmoothL1 between EAGLE's f_{i+1} and the trunk's h_{i+1}, where t_{i+2} stands in the document of t_i."""
        wanted = self.features if self.xp is np else jax.lax.stop_gradient(self.features)
        total, count = 0.0, 0
        for b, i in np.ndindex(wanted.shape[0], wanted.shape[1] - 2):
            if 0 < self.segment_ids[b, i] == self.segment_ids[b, i + 2]:
                d = abs(self.drafted[0][b, i] - wanted[b, i + 1])
                total = total + self.xp.where(d < 1, d * d / 2, d - 0.5).mean()
                count += 1
        return total / count

    def losses(self, p, tokens, mtp_weight):
        """(total, main, list of MTP losses, balance)."""
        logits, mtp_logits = self.outputs(p, tokens)
        means = []
        for ahead, scores in enumerate([logits, *mtp_logits], start=1):
            nats, mask = self.nats(scores, tokens, ahead)
            means.append(self.xp.where(mask, nats, 0.0).sum() / float(mask.sum()))
        balance = sum(b for _, _, b in self.routing)
        total = means[0] + balance
        if means[1:]:
            heads = sum(means[1:]) / len(means[1:])
            if self.cfg.mtp_kind == "eagle":
                heads = 0.1 * heads + self.regression()
            total = total + mtp_weight * heads
        return total, means[0], means[1:], balance
