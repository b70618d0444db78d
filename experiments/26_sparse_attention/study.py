"""Sparse attention: loss and keys found by k and by the indexer's warm-up, and what it costs.

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
from experiments.lab import FollowUp, OnTask, Study, drawing, markdown_table, mean_spread
from experiments.lab.claims import Claim, Stake, logit
from experiments.lab.tables import format_number
from experiments.lab.tasks import Retrieval

FACTOR = 4
INDEX = dict(attention="dsa", index_heads=4, index_dim=32)
CHOICES = {"text": (8, 16, 32), "keys": (4, 8, 16)}  # k; the middle one has all warm-ups
FEWEST = 2  # k of keys that even a good choice does not find all
WARM_UPS = ("no", "short", "long")
# What is trained with k: (k's place in CHOICES, warm-up).
TRAINED = ((1, "no"), (1, "short"), (0, "long"), (1, "long"), (2, "long"))
LEAST = 64  # tokens that a query of text must see to count: a choice of few is no choice
LOOKED_AT = 4  # batches of text
# Questions for each distance; the key's distances, in rows.
ROWS, DEPTHS = 64, (1 / 8, 3 / 8, 5 / 8, 7 / 8)
COSTS = Path(__file__).parent / "cost.json"  # from cost.py


def variants(base):
    length, rate = base.data.seq_len, base.optim.learning_rate
    model = replace(
        base.model, q_latent_dim=base.model.dim // 2, max_positions=FACTOR * length, yarn=Yarn()
    )
    few = dict(warmup_steps=2, final_learning_rate=base.optim.final_learning_rate)
    indexers = replace(base.optim, **few)
    after = replace(base.optim, learning_rate=rate / 3, **few)
    data = replace(
        base.data, seq_len=FACTOR * length, batch_size=max(base.data.batch_size // FACTOR, 1)
    )
    text = replace(data, max_documents=400, val_fraction=0.1)
    on_text = replace(base, model=model, data=text, steps=4 * base.steps)
    found = {}
    for name, task, first in (
        ("text", None, replace(on_text, eval_batches=2 * base.eval_batches)),
        ("keys", Retrieval(tokens=length), replace(base, model=model, steps=2 * base.steps)),
    ):
        more = replace(first, optim=after, steps=max(base.steps // 2, 2))
        found[dense(name)] = of(task, first)
        found[dense(name, more=True)] = begun(task, dense(name), more)
        for kind, steps in {"short": max(base.steps // 16, 2), "long": base.steps}.items():
            sparse_model = replace(model, **INDEX, index_topk=CHOICES[name][1])
            run = replace(first, model=sparse_model, optim=indexers, steps=steps)
            found[warmed(name, kind)] = begun(task, dense(name), run, indexer_stage="warm")
        for place, kind in TRAINED:
            run = replace(more, model=replace(model, **INDEX, index_topk=CHOICES[name][place]))
            found[sparse(name, place, kind)] = begun(task, warmed(name, kind), run)

        # What the long warm-up's steps give without it: sparse steps, at either rate.
        if name == "text":
            sparse_model = replace(model, **INDEX, index_topk=CHOICES[name][1])
            many = replace(more, steps=more.steps + base.steps)
            found[DENSE_AS_LONG] = begun(task, dense(name), many)
            for words, optim in ((AS_LONG, after), (AS_LONG_FASTER, indexers)):
                run = replace(many, model=sparse_model, optim=optim)
                found[words] = begun(task, dense(name), run)
        else:
            for words, kind in ((FEWEST_NONE, "no"), (FEWEST_LONG, "long")):
                run = replace(more, model=replace(model, **INDEX, index_topk=FEWEST))
                found[words] = begun(task, warmed(name, kind), run)
    return found


DENSE_AS_LONG = "text: dense, 240 more steps"
AS_LONG = "text: k 16, no warm-up, 240 steps"
AS_LONG_FASTER = "text: k 16, no warm-up, 240 steps at the warm-up's rate"
FEWEST_NONE, FEWEST_LONG = "keys: k 2, no warm-up", "keys: k 2, long warm-up"


def dense(name, more=False):
    return f"{name}: dense" + ", more steps" * more


def warmed(name, kind):
    """The variant whose indexers are warmed up; with none, the dense model's random ones."""
    return dense(name) if kind == "no" else f"{name}: {kind} warm-up"


def sparse(name, place, kind):
    return f"{name}: k {CHOICES[name][place]}, {kind} warm-up"


def of(task, run):
    return run if task is None else OnTask(task, run)


def begun(task, other, run, **stage):
    return FollowUp((other,), lambda folder: of(task, replace(run, start=folder, **stage)))


# What is measured


def measure(trained):
    """By k, or "all" tokens: `loss` of text, `far`, the share of keys found at 4L; and `recall`.

    A dense model reads the middle k with random indexers. `final` is what claims are judged by.
    """
    run, name = trained.run, "text" if trained.task is None else "keys"
    is_final = bool(run.start) and run.indexer_stage == "sparse"
    ks = (run.model.index_topk,)
    if run.model.attention == "mla":
        ks = ("all",) if is_final else ("all", CHOICES[name][1])
    key, number = ("loss", loss_of) if name == "text" else ("far", found_far)
    found = {key: {k: number(trained, k) for k in ks}}
    if is_final:
        found["final"] = {name: found[key][ks[0]] * (1 if name == "text" else 100)}
    if name == "text" and ks[-1] != "all":
        found["recall"] = {ks[-1]: recall(trained, ks[-1])}
    return found


def model_of(trained, k, **changes):
    """The model with k tokens for each query. One without indexers gets random ones."""
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
    """The share of keys found in rows of 4L, with YaRN."""
    most = trained.run.model.max_positions
    yarn = Yarn(factor=float(FACTOR), original_max_positions=most // FACTOR)
    graphdef, state = nnx.split(model_of(trained, k, yarn=yarn))
    asked = [trained.task.questions(most, round(x * most), ROWS).tokens for x in DEPTHS]
    return float(
        np.mean([last_choice(graphdef, state, tokens) == tokens[:, -1] for tokens in asked])
    )


@partial(jax.jit, static_argnames="graphdef")
def last_choice(graphdef, state, tokens):
    model = nnx.merge(graphdef, state)
    return (model.forward_hidden(tokens).h[:, -2] @ model.head_matrix()).argmax(-1)


def recall(trained, k):
    """Shares of dense attention's mass in the indexer's choice of k tokens, and in the latest k."""
    graphdef, state = nnx.split(model_of(trained, "all"))
    shares = []
    for batch in trained.held_out()[:LOOKED_AT]:
        inputs = model_inputs(batch)
        rows = (inputs[name] for name in ("tokens", "segment_ids", "positions"))
        p, s = (np.asarray(x) for x in look(graphdef, state, *rows))
        counts = np.isfinite(s[0]).sum(-1) >= LEAST
        p, s = p[:, counts], s[:, counts]
        latest = np.where(np.isfinite(s), np.arange(s.shape[-1]), -np.inf)
        shares.append([(p * best(scores, k)).sum(-1) for scores in (s, latest)])
    mass, of_latest = (float(x.mean()) for x in np.concatenate(shares, axis=-1))
    return {"mass": mass, "latest": of_latest}


@partial(jax.jit, static_argnames="graphdef")
def look(graphdef, state, tokens, segment_ids, positions):
    """(Dense attention's mean over heads; the indexers' scores, -inf if unseen), [L, B, T, S]."""
    model = nnx.merge(graphdef, state)
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
        p = jax.nn.softmax(jnp.where(seen[:, :, None], products, -jnp.inf)).mean(2)
        one = partial(index_scores, rows=rows["index_key"][:, :, 0])
        s = jax.vmap(one, 1, 1)(rows["index_query"], rows["index_weight"][:, :, 0])
        found.append((p, jnp.where(seen, s, -jnp.inf)))
        x = block(x, ctx)[0]
    return tuple(jnp.stack(of_layers) for of_layers in zip(*found, strict=True))


def best(scores, k):
    """bool of the same shape: the k largest of the last axis."""
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, np.argpartition(-scores, k - 1)[..., :k], True, axis=-1)
    return chosen & np.isfinite(scores)


# The table and the picture


def lines():
    """Yield (words, place of k or None for all tokens, task → variant) of the table's rows."""
    yield "dense", None, dense
    yield "dense, more steps", None, partial(dense, more=True)
    for kind in WARM_UPS:
        yield f"{kind} warm-up, not trained further", 1, partial(warmed, kind=kind)
    for place, kind in TRAINED:
        words = f"{kind} warm-up, then more steps"
        yield words, place, partial(sparse, place=place, kind=kind)


def table(results):
    header = ["indexer", "text: k", "nats a byte", "of dense attention's mass: chosen, %"]
    header += ["in the latest k, %", "keys: k", "found in rows of 4L, %"]
    rows = []
    for words, place, of_task in lines():
        text, keys = of_task("text"), of_task("keys")
        k, few = ("all" if place is None else CHOICES[name][place] for name in ("text", "keys"))
        row = [words, str(k), mean_spread(results.values(text, f"loss/{k}"), 4)]
        for key in ("mass", "latest"):
            shares = [] if k == "all" else 100 * results.values(text, f"recall/{k}/{key}")
            row.append(mean_spread(shares, 1) if len(shares) else "")
        rows.append([*row, str(few), mean_spread(100 * results.values(keys, f"far/{few}"), 1)])
    chance = f"Chance finds {100 / Retrieval().values:.1f} % of the keys."
    return f"{markdown_table(header, rows)}\n\n{arms(results)}\n\n{chance}\n\n{costs()}"


def arms(results):
    """The runs that the other table has no place for, by what claims judge."""
    digits = dict.fromkeys((DENSE_AS_LONG, AS_LONG, AS_LONG_FASTER), 4)
    digits |= dict.fromkeys((FEWEST_NONE, FEWEST_LONG), 1)
    rows = [
        [name, mean_spread(results.values(name, f"final/{name[:4]}"), digits[name])]
        for name in digits
        if name in results.runs
    ]
    return markdown_table(["further runs", "nats a byte, or % of keys found in rows of 4L"], rows)


def costs():
    """Say how much a decoded token's time and bytes fall by context, from cost.py."""
    cost, parts = json.loads(COSTS.read_text()), []
    for context, x in cost["contexts"].items():
        time = np.median(np.divide(x["ms"]["dense"], x["ms"]["sparse"]))
        size = x["bytes"]["dense"] / x["bytes"]["sparse"]
        parts.append(f"{int(context) // 1024}K tokens: {time:.2f} and {size:.2f}")
    return (
        f"A decoded token, dense over sparse, in time and in bytes of the cache. {'; '.join(parts)}"
        f". Medians of {cost['rounds']} rounds in turns, {cost['machine']}. {cost['what']}"
    )


def words(results):
    cost = results.difference(sparse("text", 2, "long"), dense("text", more=True), "final/text")
    found = results.values(sparse("keys", 1, "long"), "final/keys").mean()
    return (
        f"{MOST} of up to 256 bytes cost {format_number(cost, 3, sign=True)} nats; "
        f"{CHOICES['keys'][1]} tokens find {found:.0f} % of the keys at 4L"
    )


# The claims

K, MOST = CHOICES["text"][1:]
FAR_KEYS = ROWS * len(DEPTHS)  # questions at 4L of a run
MASSES = 10_000  # tokens whose attention is looked at, at least


def chosen_mass(numbers):
    """Dense attention's mass in the choice, in %, of a model that was trained with it."""
    numbers["final"]["text"]
    ((_, shares),) = numbers["recall"].items()
    return 100 * shares["mass"]


def beyond_latest(numbers):
    """How much more of that mass it is than in the latest k tokens, in logits."""
    chosen, ((_, shares),) = logit(chosen_mass, MASSES)(numbers), numbers["recall"].items()
    return chosen - logit("latest", MASSES, 1.0)(shares)


def cost_of(name, key, scale):
    """What a random choice of the middle k costs the dense model, by seed."""
    middle, variant = CHOICES[name][1], dense(name)
    return lambda results: (
        scale * (results.values(variant, f"{key}/{middle}") - results.values(variant, f"{key}/all"))
    )


LONG, NONE = sparse("text", 1, "long"), sparse("text", 1, "no")
KEYS_LONG, FEW = sparse("keys", 1, "long"), CHOICES["keys"][1]
LOGITS = dict(expect="higher", unit="logits", digits=2)
WITHIN_5 = dict(expect="equal", margin=5.0, unit="points", digits=1, questions=FAR_KEYS)
STUDY = Study(
    question="How few tokens does sparse attention need, and does its indexer need a warm-up?",
    published=(
        "k 2,048 of up to 128K, a warm-up of 1,000 steps: "
        "no substantial loss against V3.1 (V3.2 report)"
    ),
    variants=variants,
    base="retrieval",
    measure=measure,
    table=table,
    draw=drawing.claims_and_variants("final/text", "nats a byte of text", words, linear=1.0),
    claims=(
        Claim(
            f"k {MOST} after a long warm-up has dense attention's loss, within 0.02 nats",
            sparse("text", 2, "long"),
            dense("text", more=True),
            "final/text",
            "equal",
            margin=0.02,
            stake="choice",
        ),
        Claim(
            f"k {K}: a long warm-up ends at a lower loss than none",
            LONG,
            NONE,
            "final/text",
            stake="choice",
        ),
        Claim(
            f"k {K}: a long warm-up ends at a lower loss than as many sparse steps",
            LONG,
            AS_LONG,
            "final/text",
            stake="choice",
        ),
        Claim(
            f"k {K}: a long warm-up ends at a lower loss than as many sparse steps at its rate",
            LONG,
            AS_LONG_FASTER,
            "final/text",
            stake="choice",
        ),
        Claim(
            f"k {K}: after a long warm-up more of dense attention's mass is chosen than after none",
            LONG,
            NONE,
            logit(chosen_mass, MASSES),
            **LOGITS,
        ),
        Claim(
            f"k {K}: the choice has more of that mass than the latest {K} tokens",
            LONG,
            0.0,
            beyond_latest,
            **LOGITS,
        ),
        Claim(
            f"k {FEW} finds as many keys at 4L as dense attention, within 5 points",
            KEYS_LONG,
            dense("keys", more=True),
            "final/keys",
            **WITHIN_5,
            stake="reach",
        ),
        Claim(
            "a long warm-up finds more keys at 4L than none",
            KEYS_LONG,
            sparse("keys", 1, "no"),
            logit("final/keys", FAR_KEYS),
            **LOGITS,
            stake="reach",
        ),
        Claim(
            f"k {FEWEST}: a long warm-up finds more keys at 4L than none",
            FEWEST_LONG,
            FEWEST_NONE,
            logit("final/keys", FAR_KEYS),
            **LOGITS,
            stake="reach",
        ),
    ),
    stakes={
        "choice": Stake(
            f"{K} tokens at random, of dense attention's", cost_of("text", "loss", 1.0)
        ),
        "reach": Stake(
            f"{FEW} tokens at random: keys at 4L", cost_of("keys", "far", -100.0), "points", 1
        ),
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
)
