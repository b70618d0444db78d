"""What is each part worth to the trained model: experts, their choice, the shared one, the context?

Published: shared expert off, one more routed: Pile loss 1.808 → 2.414 (DeepSeekMoE, 2B).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config import replace
from dsv3_jax.model.transformer import abstract
from dsv3_jax.training.loss import score_tokens
from experiments.lab import Claim, Stake, Study, drawing
from experiments.lab.measuring import skip_top
from experiments.lab.tables import markdown_table, mean_spread

TOP_OFF = (1, 2, 4, 8)  # experts with the highest scores that a token may not use
# Most tokens of context; the second half of each window is scored.
WINDOWS = (2, 8, 32, 64)


def variants(base):
    return {"base": base}


def measure(trained):
    """Measure the loss of held-out text without each part, minus that of the whole model."""
    model, batches = trained.model, trained.held_out()
    k = model.cfg.experts_per_token

    def with_experts(model, chosen):
        """Return the model with other experts a token."""
        shapes = abstract(replace(model.cfg, experts_per_token=chosen), trained.run.execution)
        return nnx.merge(nnx.graphdef(shapes), nnx.state(model))

    unshared = without(model, "shared")
    changed = {
        "shared expert off": unshared,
        "shared expert off, one more routed": with_experts(unshared, k + 1),
        "routed experts off": without(model, "experts"),
        "all tokens to the same experts": same_experts(model, trained.numbers["load"]),
        "one routed expert fewer": with_experts(model, k - 1),
        "half as many routed experts": with_experts(model, k // 2),
        **{f"top {off} off": skip_top(model, off) for off in TOP_OFF},
    }
    whole = loss_of(model, batches)
    costs = {name: loss_of(one, batches) - whole for name, one in changed.items()}
    for w in WINDOWS:
        cost_of_cut = loss_of(model, batches, w, cut=True) - loss_of(model, batches, w)
        costs[f"context of {w} tokens at most"] = cost_of_cut
    return {"whole": whole, "cost": costs}


def without(model, part):
    """Return the model with the last matrices of a part at zero, so that the part adds nothing."""
    model = nnx.clone(model)
    last = getattr(model.sparse.moe, part).w_down
    last[...] = jnp.zeros_like(last[...])
    return model


def same_experts(model, load):
    """Return the model with router biases that send all tokens to a layer's K busiest experts."""
    model = nnx.clone(model)
    busiest = np.argsort(load, axis=-1)[:, -model.cfg.experts_per_token :]
    bias = np.zeros(np.shape(load), np.float32)
    np.put_along_axis(bias, busiest, 1e3, axis=-1)
    model.sparse.moe.bias[...] = jnp.asarray(bias)
    return model


def loss_of(model, batches, window=None, *, cut=False):
    """Return the mean nats of the text's tokens.

    Args:
        window: score only targets in the second half of each window of so many tokens; None: all.
        cut: a token sees its own window alone.
    """
    graphdef, state = nnx.split(model)
    score = jax.jit(lambda state, batch: score_tokens(nnx.merge(graphdef, state), batch))
    total = count = 0.0
    for batch in batches:
        inputs = {key: np.asarray(batch[key]) for key in ("tokens", "segment_ids", "positions")}
        place = np.arange(inputs["tokens"].shape[1])
        if cut:
            inputs |= windows_of(inputs, window)
        out = score(state, inputs)
        mask = np.asarray(out.mask)
        if window is not None:
            # A target is scored if it, and the tokens seen in its window, are of one document.
            own = windows_of(batch, window)["segment_ids"]
            same = own[:, 1:] == own[:, :-1]
            mask = mask & same & (place[1:] % window >= window // 2)
        total += float(np.asarray(out.nll, np.float64)[mask].sum())
        count += float(mask.sum())
    return total / count


def windows_of(batch, window):
    """Cut each document of a row at multiples of `window` tokens of the row."""
    tokens = np.asarray(batch["tokens"])
    place = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    old = np.asarray(batch["segment_ids"])
    starts = np.diff(old * (place.max() + 1) + place // window, axis=1, prepend=-1) != 0
    segments = np.where(old > 0, np.cumsum(starts, axis=1), 0).astype(np.int32)
    positions = place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)
    return {"segment_ids": segments, "positions": positions.astype(np.int32)}


def cost(name):
    return lambda numbers: numbers["cost"][name]


def table(results):
    rows = [
        [LABELS.get(name, name), mean_spread(results.values("base", cost(name)), 4, sign=True)]
        for name in results.records("base")[0]["numbers"]["cost"]
    ]
    return markdown_table(["taken away", "cost, nats per token"], rows)


LABELS = {  # of windows, whose second half is scored
    f"context of {w} tokens at most": (
        f"context beyond {w - 1} token{'s' * (w > 2)} (of {max(w // 2, 1)} to {w - 1})"
    )
    for w in WINDOWS
}


MORE = ("top 2 off", "top 4 off", "top 8 off", *LABELS)  # beside what the claims show
ROWS = {LABELS.get(name, name): ("base", cost(name)) for name in MORE}


def claim(text, name, stake="context", **more):
    return Claim(text, "base", 0.0, cost(name), "higher", stake, **more)


NO_CONTEXT = "context of 2 tokens at most"


STUDY = Study(
    variants=variants,
    seeds=10,
    measure=measure,
    table=table,
    draw=drawing.claims_and_variants(ROWS, "cost, nats per token", linear=0.01),
    claims=(
        claim(
            "the shared expert does what one more routed expert cannot",
            "shared expert off, one more routed",
            published=0.606,
        ),
        claim("the shared expert is needed", "shared expert off"),
        claim("the routed experts are needed", "routed experts off"),
        claim("the choice of experts is needed", "all tokens to the same experts"),
        claim("each token's best expert is needed", "top 1 off"),
        claim("one routed expert fewer costs loss", "one routed expert fewer"),
        claim("half as many routed experts cost loss", "half as many routed experts"),
        claim("context beyond one token is needed", NO_CONTEXT, stake=""),
        claim("context beyond 32 tokens is needed", "context of 32 tokens at most"),
    ),
    stakes={
        "context": Stake("no context but the token before", "base", 0.0, cost(NO_CONTEXT)),
    },
    facts={"0.606": "published: 2.414 − 1.808"},
)
