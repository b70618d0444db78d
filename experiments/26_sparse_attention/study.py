"""How few tokens does sparse attention need, and does its indexer need a warm-up?

Published: k 2,048 of up to 128K, a warm-up of 1,000 steps: no substantial loss against V3.1 (V3.2
report).

L is the base's row length. Two tasks share one small model: text in rows of 4L, and one-hop
retrieval that is trained at L and asked at 4L.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config import Yarn, replace
from dsv3_jax.data.batches import model_inputs
from dsv3_jax.model.context import make_context
from dsv3_jax.model.stack import unstack
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.indexer import index_scores
from dsv3_jax.runs.evaluate import evaluate
from experiments.lab import Claim, Column, Number, OnTask, Stake, Study, drawing
from experiments.lab.claims import logit
from experiments.lab.measuring import DEPTHS, QUESTIONS, compiled, keys_found
from experiments.lab.tasks import Retrieval

FACTOR = 4
INDEX = dict(attention="dsa", index_heads=4, index_dim=32)
K = {"text": 16, "keys": 8}  # that a model reads which is not trained to choose
AFTER = {  # (k, warm-up) of the models that are
    "text": ((16, "no"), (16, "short"), (8, "long"), (16, "long"), (32, "long")),
    "keys": (
        (8, "no"),
        (8, "short"),
        (4, "long"),
        (8, "long"),
        (16, "long"),
        (2, "no"),
        (2, "long"),
    ),
}
LEAST = 64  # tokens that a query of text must see to count: a choice of few is no choice
LOOKED_AT = 4  # batches of text


def variants(base):
    length = base.data.seq_len
    model = replace(
        base.model, q_latent_dim=base.model.dim // 2, max_positions=FACTOR * length, yarn=Yarn()
    )
    text = replace(
        base.data,
        seq_len=FACTOR * length,
        batch_size=max(base.data.batch_size // FACTOR, 1),
        max_documents=400,
        val_fraction=0.1,
    )
    on_text = replace(
        base, model=model, data=text, steps=4 * base.steps, eval_batches=2 * base.eval_batches
    )
    on_keys = replace(base, model=model, steps=2 * base.steps)
    return of_task("text", None, on_text, base) | of_task(
        "keys", Retrieval(tokens=length), on_keys, base
    )


def of_task(name, task, first, base):
    """Return the variants of a task. Args: first: the dense run that all others continue."""

    def begun(parent, k=None, **changes):
        model = first.model if k is None else replace(first.model, **INDEX, index_topk=k)
        return OnTask(task, replace(first, model=model, start=parent, **changes))

    dense, many = f"{name}: dense", base.steps
    fast = replace(base.optim, warmup_steps=2)
    slow = replace(fast, learning_rate=fast.learning_rate / 3)
    few = max(many // 2, 2)
    found = {
        dense: OnTask(task, first),
        f"{dense}, more steps": begun(dense, optim=slow, steps=few),
    }
    for kind, steps in {"short": max(many // 16, 2), "long": many}.items():
        found[f"{name}: {kind} warm-up"] = begun(
            dense, K[name], optim=fast, steps=steps, indexer_stage="warm"
        )
    for k, kind in AFTER[name]:
        parent = dense if kind == "no" else f"{name}: {kind} warm-up"
        found[f"{name}: k {k}, {kind} warm-up"] = begun(parent, k, optim=slow, steps=few)

    # What the long warm-up's steps give without it: sparse steps, at either rate.
    if name == "text":
        found[f"{dense}, 240 more steps"] = begun(dense, optim=slow, steps=few + many)
        for words, optim in ((AS_LONG, slow), (AS_LONG_FASTER, fast)):
            found[words] = begun(dense, K[name], optim=optim, steps=few + many)
    return found


AS_LONG = "text: k 16, no warm-up, 240 steps"
AS_LONG_FASTER = f"{AS_LONG} at the warm-up's rate"


# What is measured


def measure(trained):
    """By k, or "all" tokens: `loss` of text, `far`, the share of keys found at 4L; and `recall`.

    A dense model reads K tokens with random indexers. `final` is what claims are judged by.
    """
    run, name = trained.run, "text" if trained.task is None else "keys"
    is_final = bool(run.start) and run.indexer_stage == "sparse"
    ks = [run.model.index_topk]
    if run.model.attention == "mla":
        ks = ["all"] if is_final else ["all", K[name]]
    key, number, scale = ("loss", loss_of, 1) if name == "text" else ("far", found_far, 100)
    found = {key: {k: number(trained, k) for k in ks}}
    if is_final:
        found["final"] = {name: scale * found[key][ks[0]]}
    if name == "text" and ks[-1] != "all":
        found["recall"] = {ks[-1]: recall(trained, ks[-1])}
    return found


def model_of(trained, k, **changes):
    """Return the model with k tokens a query. One without indexers gets random ones."""
    most = trained.run.model.max_positions
    cfg = replace(trained.run.model, **INDEX, index_topk=most if k == "all" else k, **changes)
    model = Transformer(cfg, trained.run.execution, rngs=nnx.Rngs(trained.run.seed))
    nnx.update(model, nnx.state(trained.model))
    return model


def loss_of(trained, k):
    if k == "all" or trained.run.model.attention == "dsa":  # the model's own
        return trained.numbers["val_loss"]
    return evaluate(model_of(trained, k), trained.held_out(), trained.tokenizer)["val_loss"]


def found_far(trained, k):
    """Return the share of keys found in rows of 4L, with YaRN."""
    most = trained.run.model.max_positions
    yarn = Yarn(factor=float(FACTOR), original_max_positions=most // FACTOR)
    return float(np.mean(keys_found(model_of(trained, k, yarn=yarn), trained.task, most)))


def recall(trained, k):
    """Shares of dense attention's mass in the indexer's choice of k tokens, and in the latest k."""
    model, found = model_of(trained, "all"), []
    for batch in trained.held_out()[:LOOKED_AT]:
        inputs = model_inputs(batch)
        rows = (inputs[name] for name in ("tokens", "segment_ids", "positions"))
        weights, scores = (np.asarray(x) for x in look(model, *rows))
        counts = np.isfinite(scores[0]).sum(-1) >= LEAST
        weights, scores = weights[:, counts], scores[:, counts]
        latest = np.where(np.isfinite(scores), np.arange(scores.shape[-1]), -np.inf)
        found.append([(weights * best(x, k)).sum(-1) for x in (scores, latest)])
    mass, of_latest = (float(x.mean()) for x in np.concatenate(found, axis=-1))
    return {"mass": mass, "latest": of_latest}


@compiled
def look(model, tokens, segment_ids, positions):
    """Return dense attention's mean over heads, and the indexers' scores, [L, B, T, S].

    Scores of tokens that a query does not see are -inf.
    """
    x, found, length = model.embedding(tokens), [], tokens.shape[1]
    seen = jnp.tril(jnp.ones((length, length), bool))[None]
    seen &= segment_ids[:, :, None] == segment_ids[:, None]
    ctx = make_context(model.cfg, positions, segment_ids)
    blocks = nnx.graphdef(model.dense)
    for layer in unstack(model.dense):
        block = nnx.merge(blocks, layer)
        q, rows = block.attn.project(block.attn_norm(x), ctx)
        k = block.attn.expand(rows, ctx)["k"]
        products = jnp.einsum("bthk,bshk->bths", q, k) * block.attn.scale
        weights = jax.nn.softmax(jnp.where(seen[:, :, None], products, -jnp.inf)).mean(2)

        one = partial(index_scores, rows=rows["index_key"][:, :, 0])
        scores = jax.vmap(one, 1, 1)(rows["index_query"], rows["index_weight"][:, :, 0])
        found.append((weights, jnp.where(seen, scores, -jnp.inf)))
        x = block(x, ctx)[0]
    return tuple(jnp.stack(of_layers) for of_layers in zip(*found, strict=True))


def best(scores, k):
    """Mark the k largest of the last axis, but none that is unseen."""
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, np.argpartition(-scores, k - 1)[..., :k], True, axis=-1)
    return chosen & np.isfinite(scores)


# The table


def of_choice(numbers, key):
    """Return a number of the model that reads k tokens. Raises: IndexError if none does."""
    return [number for k, number in numbers[key].items() if k != "all"].pop()


def mass(numbers):
    """Return the share of dense attention's mass in the choice of k tokens."""
    return of_choice(numbers, "recall")["mass"]


def latest(numbers):
    """Return the share of that mass in the latest k tokens."""
    return of_choice(numbers, "recall")["latest"]


def below(results):
    chance = f"Chance finds {100 / Retrieval().values:.1f} % of the keys."
    return f"{chance}\n\n{costs()}"


def costs():
    """Say how much a decoded token's time and bytes fall by context, from cost.py."""
    cost = json.loads((Path(__file__).parent / "cost.json").read_text())
    parts = []
    for context, x in cost["contexts"].items():
        time = np.median(np.divide(x["ms"]["dense"], x["ms"]["sparse"]))
        size = x["bytes"]["dense"] / x["bytes"]["sparse"]
        parts.append(f"{int(context) // 1024}K tokens: {time:.2f} and {size:.2f}")
    return (
        f"A decoded token, dense over sparse, in time and in bytes of the cache. {'; '.join(parts)}"
        f". Medians of {cost['rounds']} rounds in turns, {cost['machine']}. {cost['what']}"
    )


# The claims

MOST, LONG = "text: k 32, long warm-up", "text: k 16, long warm-up"
NONE = "text: k 16, no warm-up"
FAR_KEYS = QUESTIONS * len(DEPTHS)  # questions at 4L of a run
MASSES = 10_000  # tokens whose attention is looked at, at least


def trained_mass(numbers):
    """Return the mass in the choice of a model that was trained with it. Raises: KeyError."""
    numbers["final"]["text"]
    return mass(numbers)


LOSS = "final/text"
FOUND = Number("final/keys", "points", 1)
FAR = logit("final/keys", FAR_KEYS)
CHOSEN = logit(trained_mass, MASSES, 1.0)
BEYOND = CHOSEN - logit(latest, MASSES, 1.0)  # more of that mass than in the latest k tokens
RANDOM_LOSS = Number("loss/16", "nats", 3) - "loss/all"
RANDOM_KEYS = Number("far/all", "points", 1, 100) - Number("far/8", "points", 1, 100)
STUDY = Study(
    variants=variants,
    base="retrieval",
    measure=measure,
    columns=(
        Column("nats a byte, all tokens", "loss/all", 4),
        Column("nats a byte, k tokens", Number(partial(of_choice, key="loss"), ""), 4),
        Column("of dense attention's mass: chosen, %", Number(mass, "%", scale=100), 1),
        Column("in the latest k, %", Number(latest, "%", scale=100), 1),
        Column("keys found in rows of 4L, all tokens, %", "far/all", 1, scale=100),
        Column("keys found, k tokens, %", Number(partial(of_choice, key="far"), "%"), 1, scale=100),
    ),
    below=below,
    draw=drawing.claims_and_variants("final/text", "nats a byte of text", linear=1.0),
    claims=(
        Claim(
            "k 32 after a long warm-up has dense attention's loss, within 0.02 nats",
            MOST, "text: dense, more steps", LOSS, "equal", "choice", 0.02,
        ),
        *(
            Claim(
                f"k 16: a long warm-up ends at a lower loss than {words}",
                LONG, other, LOSS, stake="choice",
            )
            for words, other in (
                ("none", NONE),
                ("as many sparse steps", AS_LONG),
                ("as many sparse steps at its rate", AS_LONG_FASTER),
            )
        ),
        Claim(
            "k 16: after a long warm-up more of dense attention's mass is chosen than after none",
            LONG, NONE, CHOSEN, "higher",
        ),
        Claim(
            "k 16: the choice has more of that mass than the latest 16 tokens",
            LONG, 0.0, BEYOND, "higher",
        ),
        Claim(
            "k 8 finds as many keys at 4L as dense attention, within 5 points",
            "keys: k 8, long warm-up", "keys: dense, more steps", FOUND, "equal", "reach", 5.0,
            questions=FAR_KEYS,
        ),
        Claim(
            "a long warm-up finds more keys at 4L than none",
            "keys: k 8, long warm-up", "keys: k 8, no warm-up", FAR, "higher", "reach",
        ),
        Claim(
            "k 2: a long warm-up finds more keys at 4L than none",
            "keys: k 2, long warm-up", "keys: k 2, no warm-up", FAR, "higher", "reach",
        ),
    ),
    stakes={
        "choice": Stake(
            "16 tokens at random, of dense attention's", "text: dense", 0.0, RANDOM_LOSS
        ),
        "reach": Stake("8 tokens at random: keys at 4L", "keys: dense", 0.0, RANDOM_KEYS),
    },
    facts={
        "1,000, 15,000": "published",
        "160 steps, 240 steps": "settings",
        "0.026": "1.9494 - 1.9233",
        "0.010": "1.9336 - 1.9233",
        "0.022": "1.9618 - 1.9396",
        "0.035": "1.8981 - 1.8631",
        "4.8 points": "70.5 - 65.7",
        "768": "64 questions of 4 distances for each of three seeds",
    },
)  # fmt: skip
