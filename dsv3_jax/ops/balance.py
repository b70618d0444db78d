"""Load balancing of experts: methods that make the load even, and measures of how even it is.

Methods: the loss-free bias (no gradient), which moves by one of `RULES`, V3's loss for each
sequence, and Switch's loss for the batch. The z-loss keeps logits small. Four measures of a load
[..., E]: MaxVio, entropy, Gini coefficient, and the smallest and largest load.

A new rule is a function and a row of `RULES`, here or in a notebook.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ConfigError, ModelConfig, Table
from dsv3_jax.ops.quantile_balance import quantile_margins, quantile_target, quantile_update
from dsv3_jax.ops.routing import ROUTERS, replay


def load(
    expert_ids: Int[Array, "*n K"], num_experts: int, mask: Bool[Array, "*n"] | None = None
) -> Float[Array, " E"]:
    """Count how many assignments each expert got.

    Args:
        expert_ids: the chosen experts, each in 0 … num_experts - 1.
        num_experts: E.
        mask: tokens where it is False do not count. None means all count.
    Returns: float32 counts.

    Example:
        >>> load(jnp.array([[0, 1], [0, 2], [0, 1]]), 4)
        Array([3., 2., 1., 0.], dtype=float32)
    """
    # Whole numbers: they are exact in any order of additions, and beyond 2^24, where a float32
    # stays the same if 1 is added.
    counts = jnp.ones(expert_ids.shape, jnp.int32)
    if mask is not None:
        counts = jnp.broadcast_to(mask[..., None], expert_ids.shape).astype(jnp.int32)
    summed = jax.ops.segment_sum(
        counts.reshape(-1), expert_ids.reshape(-1), num_segments=num_experts
    )
    return summed.astype(jnp.float32)


def bias_update(
    bias: Float[Array, "*l E"], load: Float[Array, "*l E"], rate: float | Array
) -> Float[Array, "*l E"]:
    """Take one step of loss-free balancing: b_e ← b_e + γ · sign(mean load − load_e).

    Args:
        bias: the router's correction of each expert, for one layer or several.
        load: counts over the step's global batch, on all devices.
        rate: γ.
    Returns: the new bias, in the bias's dtype.

    Example:
        >>> load = jnp.array([3.0, 2.0, 1.0, 2.0])  # the mean is 2
        >>> bias_update(jnp.zeros(4), load, rate=0.5)
        Array([-0.5,  0. ,  0.5,  0. ], dtype=float32)

    Source: arXiv 2408.15664; DeepSeek-V3 report, section 2.1.2.
    """
    return bias + (rate * jnp.sign(load.mean(-1, keepdims=True) - load)).astype(bias.dtype)


def proportional_update(
    bias: Float[Array, "*l E"], load: Float[Array, "*l E"], rate: float | Array
) -> Float[Array, "*l E"]:
    """Move the bias by the load's distance from even: b_e ← b_e + γ · (mean − load_e) / mean.

    Args: as in `bias_update`.
    Returns: the new bias, in the bias's dtype. It does not change if there is no load.

    Example:
        >>> load = jnp.array([4.0, 2.0, 1.0, 1.0])  # the mean is 2
        >>> proportional_update(jnp.zeros(4), load, rate=0.5)
        Array([-0.5 ,  0.  ,  0.25,  0.25], dtype=float32)

    Source: arXiv 2408.15664, section 4.3, where the sign is compared with it; divided by the mean
    here, so that γ does not depend on the number of tokens.
    """
    mean = load.mean(-1, keepdims=True)
    return bias + (rate * (mean - load) / jnp.maximum(mean, 1e-20)).astype(bias.dtype)


class Rule(NamedTuple):
    """A rule by which the bias moves after a step.

    A rule may need more of a batch than its load. A layer then takes two measures: `of_tokens` on
    the device that holds the tokens, and `of_batch` of these over all devices. If the batch is
    split in microbatches, `update` gets the load of all of them, and the mean of their measures.
    """

    # (bias, load, measure or None, γ) → the new bias, all [*l, E]
    update: Callable[[Array, Array, Any, Array], Array]
    # (scores [n, E], bias [E], K) → [n, E]
    of_tokens: Callable[[Array, Array, int], Array] | None = None
    # (those [*n, E], mask [*n], bias, K) → [E]
    of_batch: Callable[[Array, Array, Array, int], Array] | None = None


RULES: Table[Rule] = Table("balance rule", {
    "sign": Rule(lambda bias, load, _, rate: bias_update(bias, load, rate)),
    "proportional": Rule(lambda bias, load, _, rate: proportional_update(bias, load, rate)),
    "quantile": Rule(
        lambda bias, _, target, rate: quantile_update(bias, target, rate),
        quantile_margins,
        quantile_target,
    ),
}, more="--import NAME imports a program that registers more")  # fmt: skip
register_rule = RULES.add


def rule_of(cfg: ModelConfig) -> Rule | None:
    """Return the rule that moves the router's bias; None if the router reads no bias.

    Raises: ConfigError for a rule that does not go with the router or its settings.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> rule_of(preset("tiny")) is RULES["sign"], rule_of(preset("v2")) is None
        (True, True)
    """
    rule = RULES[cfg.balance.rule]
    name = cfg.balance.rule
    if not ROUTERS[cfg.router].reads_bias:
        if name != "sign":
            raise ConfigError(
                f"rule={name!r} moves a bias, which router={cfg.router!r} does not read"
            )
        return None

    # Rule quantile needs each token's (K+1)-th best score among all experts.
    limited = cfg.groups_per_token < cfg.num_groups or cfg.experts_per_token == cfg.num_experts
    if name == "quantile" and limited:
        raise ConfigError(
            "rule='quantile' needs a choice among all experts: "
            f"groups_per_token={cfg.groups_per_token} of num_groups={cfg.num_groups}, "
            f"experts_per_token={cfg.experts_per_token} of num_experts={cfg.num_experts}"
        )
    return rule


def z_loss(
    logits_z: Float[Array, "*n"], mask: Bool[Array, "*n"], count: Float[Array, ""] | None = None
) -> Float[Array, ""]:
    """Compute ST-MoE's z-loss of a batch: mean_t (ln Σ_e exp x_te)² over the tokens that count.

    Its weight is left to the caller.

    Args:
        logits_z: ln Σ_e exp x_te, the log-sum of each token's logits.
        mask: tokens where it is False are left out.
        count: divisor of the sum, for a part of a batch. None means the number of tokens in `mask`.

    Example:
        >>> z_loss(jnp.array([2.0, 4.0, 9.0]), jnp.array([True, True, False]))
        Array(10., dtype=float32)

    Source: arXiv 2202.08906, equation 5.
    """
    weight = mask.astype(logits_z.dtype)
    total = (logits_z * logits_z * weight).sum()
    return total / (jnp.maximum(weight.sum(), 1) if count is None else count)


def sequence_loss(
    scores: Float[Array, "B T E"],
    k: int,
    mask: Bool[Array, "B T"] | None = None,
    given: Int[Array, "B T K"] | None = None,
    over_rows: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, " B"]:
    """Compute V3's complementary balance loss of each sequence: Σ_e f_e P_e.

    f_e = E/(K·T) · #{t : e in topK(s_t)};  P_e = mean_t s_te / Σ_e s_te

    The gradient flows through P alone, because f is a count. The loss is 1 if the routing of a
    sequence is even. Its weight α and the mean over sequences are left to the caller. A row of a
    batch is a sequence, whatever part of the batch it is in and however many documents it holds.

    Args:
        scores: s, the scores of all experts, without bias. The top K are taken from them, without
            groups.
        k: K, experts for each token.
        mask: positions where it is False are left out of both means. None means all count.
        given: experts that are counted in place of the top K, see `routing.replay`. A router's own
            choice is another than the top K if it has a bias or groups.
        over_rows: sums the counts of a sequence over the devices that hold parts of it. Default:
            sequences are complete.
    Returns: one loss for each sequence, in the dtype of `scores`; for a part, its term of it.

    Example:
        >>> from functools import partial
        >>> jax.jit(partial(sequence_loss, k=1))(jnp.eye(4)[None])  # each token has its own expert
        Array([1.], dtype=float32)

    Source: DeepSeek-V3 report, equations 17-20.
    """
    batch, length, num_experts = scores.shape
    weight_BT = jnp.ones((batch, length), scores.dtype)
    if mask is not None:
        weight_BT = mask.astype(scores.dtype)
    tokens_B1 = jnp.maximum(over_rows(weight_BT.sum(-1)), 1)[:, None]

    # f: each expert's share of the sequence's assignments. Counts are whole numbers, as in `load`.
    _, best = jax.lax.top_k(jax.lax.stop_gradient(scores), k)
    chosen_BTK = replay(best, given)
    sequence = jnp.arange(batch)[:, None, None]
    counts_BE = jnp.zeros((batch, num_experts), jnp.int32)
    counts_BE = counts_BE.at[sequence, chosen_BTK].add(weight_BT[..., None].astype(jnp.int32))
    f_BE = over_rows(counts_BE).astype(scores.dtype) * num_experts / (k * tokens_B1)

    # P: each expert's mean share of a token's scores.
    shares_BTE = _shares(scores)
    p_BE = (shares_BTE * weight_BT[..., None]).sum(1) / tokens_B1
    return (f_BE * p_BE).sum(-1)


def switch_loss(
    scores: Float[Array, "*n E"],
    expert_ids: Int[Array, "*n K"],
    mask: Bool[Array, "*n"] | None = None,
    counts: Float[Array, " E"] | None = None,
) -> Float[Array, ""]:
    """Compute Switch Transformer's balance loss of a batch: E · Σ_e f_e P_e.

    f_e is expert e's share of the assignments; P_e is the mean of its score, normalised over
    experts. The loss is 1 if the routing is even and E if one expert has everything. Its weight α
    is left to the caller. It is a product of two means, so it is no sum over the parts of a batch:
    with microbatches, each has its own.

    Args:
        scores: scores of all experts, without bias.
        expert_ids: the chosen experts.
        mask: tokens where it is False are left out. None means all count.
        counts: assignments of each expert, if they are known. None means that they are counted.
    Returns: the loss, in the dtype of `scores`.

    Example:
        >>> expert_ids = jnp.array([[0], [1]])  # two of four experts share all tokens
        >>> switch_loss(jnp.eye(4)[:2], expert_ids)
        Array(2., dtype=float32)

    Source: arXiv 2101.03961, equations 4-6.
    """
    num_experts = scores.shape[-1]
    lead = scores.shape[:-1]
    weight = jnp.ones(lead, scores.dtype) if mask is None else mask.astype(scores.dtype)
    total = jnp.maximum(weight.sum(), 1)

    # f: each expert's share of the assignments.
    counts = load(expert_ids, num_experts, mask) if counts is None else counts
    f_E = counts.astype(scores.dtype) / (total * expert_ids.shape[-1])

    # P: its mean share of a token's scores.
    p_E = (_shares(scores) * weight[..., None]).sum(tuple(range(len(lead)))) / total
    return num_experts * (f_E * p_E).sum()


def _shares(scores: Float[Array, "*n E"]) -> Float[Array, "*n E"]:
    """Divide a token's scores by their sum."""
    # A quotient's gradient squares the sum. 1e-18 squared is not 0 in float32, so the gradient is
    # finite if all sigmoids underflow.
    return scores / jnp.maximum(scores.sum(-1, keepdims=True), 1e-18)


def max_vio(load: Float[Array, "*l E"]) -> Float[Array, "*l"]:
    """Compute the maximal violation MaxVio = (max load − mean load) / mean load.

    Args: load: counts, float32.
    Returns: 0 if the load is even or there is none, E − 1 if one expert has all of it.

    Example:
        >>> max_vio(jnp.array([6.0, 2.0, 2.0, 2.0]))
        Array(1., dtype=float32)

    Source: arXiv 2408.15664, equation 4.
    """
    mean = jnp.maximum(load.mean(-1), 1e-20)
    return jnp.maximum(load.max(-1) / mean - 1, 0.0)


def entropy(load: Float[Array, "*l E"]) -> Float[Array, "*l"]:
    """Compute the entropy of the experts' shares of the load, divided by ln E.

    Args: load: counts or scores, float32.
    Returns: 1 if the load is even, 0 if one expert has all of it.

    Example:
        >>> entropy(jnp.array([5.0, 5.0, 0.0, 0.0]))  # ln 2 / ln 4
        Array(0.5, dtype=float32)
    """
    shares = load / jnp.maximum(load.sum(-1, keepdims=True), 1e-20)
    nats = -(shares * jnp.log(jnp.maximum(shares, 1e-20))).sum(-1)
    return nats / jnp.log(jnp.asarray(max(load.shape[-1], 2), load.dtype))


def gini(load: Float[Array, "*l E"]) -> Float[Array, "*l"]:
    """Compute the Gini coefficient of the load.

    Args: load: counts, float32.
    Returns: 0 if the load is even, 1 − 1/E if one expert has all of it.

    Example:
        >>> gini(jnp.array([12.0, 0.0, 0.0, 0.0]))
        Array(0.75, dtype=float32)
    """
    num_experts = load.shape[-1]

    # Σ_i (2i − E − 1) load_i / (E Σ_i load_i), for loads in rising order.
    ordered = jnp.sort(load, axis=-1)
    ranks = 2 * jnp.arange(1, num_experts + 1, dtype=load.dtype) - num_experts - 1
    ranks = ranks.reshape((1,) * (load.ndim - 1) + (-1,))
    return (ordered * ranks).sum(-1) / (num_experts * jnp.maximum(load.sum(-1), 1e-20))


def min_max(load: Float[Array, "*l E"]) -> tuple[Float[Array, "*l"], Float[Array, "*l"]]:
    """Compute the smallest and the largest load, as multiples of the mean load.

    Args: load: counts, float32.
    Returns: (smallest, largest).

    Example:
        >>> min_max(jnp.array([6.0, 3.0, 3.0, 0.0]))
        (Array(0., dtype=float32), Array(2., dtype=float32))
    """
    mean = jnp.maximum(load.mean(-1), 1e-20)
    return load.min(-1) / mean, load.max(-1) / mean
