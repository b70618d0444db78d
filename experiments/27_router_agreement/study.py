"""Router agreement: how many choices of experts change when a function is computed in another way.

Each pass reads the same held-out tokens, so two passes differ by their arithmetic alone. The ids of
one pass are then replayed in the other one.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from dsv3_jax.config import Balance, Execution, replace
from dsv3_jax.kernels.choose import prepare
from dsv3_jax.model.cache import pick_dtype
from dsv3_jax.model.context import make_context
from dsv3_jax.model.decode import make_cache, prepare_decode
from dsv3_jax.model.moe import NEAR
from dsv3_jax.model.transformer import abstract
from dsv3_jax.ops import routing
from experiments.lab import Study, drawing, markdown_table, mean_spread, write_figure
from experiments.lab.claims import Claim, Stake
from experiments.lab.matching import FACTORS, scaled

STEPS = 180
# As in 21_sizes.
WIDTHS = ("dim", "dense_dim", "num_heads", "q_latent_dim", "kv_latent_dim", "expert_dim")
CHOICES = 60_000  # that a pass makes, at least
ROWS, BATCH = 64, 32  # held-out rows that are read; rows that a pass reads at once
EDGES = 10.0 ** np.arange(-5, 0.1, 0.5)  # of the gap between the K-th and the next score


class Pass(NamedTuple):
    """One way to compute the log-probabilities of a text."""

    compute_dtype: str = "float32"
    precision: str = "none"
    # tokens read at a time through a cache; None means a forward pass over all
    step: int | None = None
    cache: str = "latent"
    cache_dtype: str | None = None
    batch: int = BATCH


FORWARD, FORWARD_16 = Pass(), Pass("bfloat16")
DECODE, DECODE_16 = FORWARD._replace(step=1), FORWARD_16._replace(step=1)
ENGINES, BFLOAT16 = "cached decoding / full forward, bfloat16", "bfloat16 / float32, forward"
BATCHES, INT8, FP8 = "batch 1 / 32, float32", "int8 / float32 cache", "FP8 / float32, forward"
ALL = "bfloat16 decoding, int8 cache / float32 forward"
# (the pass whose experts are replayed, the one that replays them)
PAIRS = {
    "the same pass again, bfloat16": (FORWARD_16, FORWARD_16),
    "cached decoding / full forward, float32": (DECODE, FORWARD),
    BATCHES: (DECODE._replace(batch=1), DECODE),
    "expanded / absorbed, float32": (DECODE._replace(cache="expanded"), DECODE),
    "steps of 3 drafts / plain, float32": (DECODE._replace(step=4), DECODE),
    ENGINES: (DECODE_16, FORWARD_16),
    "batch 1 / 32, bfloat16": (DECODE_16._replace(batch=1), DECODE_16),
    "expanded / absorbed, bfloat16": (DECODE_16._replace(cache="expanded"), DECODE_16),
    "steps of 3 drafts / plain, bfloat16": (DECODE_16._replace(step=4), DECODE_16),
    BFLOAT16: (FORWARD_16, FORWARD),
    INT8: (DECODE._replace(cache_dtype="int8"), DECODE),
    FP8: (FORWARD_16._replace(precision="fp8"), FORWARD),
    ALL: (DECODE_16._replace(cache_dtype="int8"), FORWARD),
}
BASE, SOFTMAX, GROUPS = "base width", "base width, softmax", "base width, 4 of 8 groups"


def variants(base):
    """Three widths with V3's router and bias; at the base width also groups, and softmax."""
    every = min(STEPS, base.steps)
    base = replace(base, steps=every, eval_every=every, save_every=every)
    found = {f"{size} width": scaled(base, factor, WIDTHS) for size, factor in FACTORS.items()}
    routers = {
        GROUPS: dict(num_groups=8, groups_per_token=4),
        SOFTMAX: dict(
            router="softmax", balance=Balance(bias_rate=0.0, sequence_alpha=0.0, switch_alpha=1e-2)
        ),
    }
    return found | {
        name: replace(base, model=replace(base.model, **router)) for name, router in routers.items()
    }


# What is measured


def measure(trained):
    """By pair: % of choices, routers (a token in a layer), tokens that change; how far log p moves.

    `gaps`: routers by bin of the gap. "by_gap": those that change. "near": % of these with a gap
    below NEAR.
    """
    model, tokens = trained.model, rows_of(trained)
    cfg = model.cfg
    free = np.full((cfg.num_sparse_layers, *tokens.shape, cfg.experts_per_token), -1, np.int32)
    own = {
        how: read(model, how, tokens, free)
        for how in {replaying for _, replaying in PAIRS.values()}
    }
    exact = own[FORWARD]
    gap, pairs = gaps(model, exact.scores), {}
    for name, (recorded, replaying) in PAIRS.items():
        other = read(model, recorded, tokens, free)
        again = read(model, replaying, tokens, other.expert_ids)
        pairs[name] = compare(own[replaying], again, other, gap)
    shifted = read(model, FORWARD, tokens, np.roll(exact.expert_ids, 1, axis=2))
    return {
        "loss": float(-exact.log_p.mean()),
        "shifted": float(-shifted.log_p.mean()),  # each token has its neighbour's experts
        "gaps": np.histogram(gap, EDGES)[0],
        "pairs": pairs,
    }


def rows_of(trained):
    """Full rows of held-out tokens, int32 [n, T]; each is read as one text."""
    batches = trained.held_out(min(8, trained.run.eval_batches))
    tokens, segment_ids = (
        np.concatenate([batch[name] for batch in batches]) for name in ("tokens", "segment_ids")
    )
    full = tokens[(segment_ids != 0).all(1)]
    return full[: min(ROWS, len(full) // 4 * 4)]


class Read(NamedTuple):
    """The result of a pass over n rows of T tokens."""

    log_p: np.ndarray  # [n, T - 1]: of each next token
    log_all: np.ndarray  # [n, T - 1, V]: of all tokens
    expert_ids: np.ndarray  # [L, n, T, K]
    scores: np.ndarray | None  # [L, n, T, E]: of all experts, of a forward pass


def read(model, how, tokens, given):
    """Do a pass. Experts `given` [L, n, T, K] are replayed; −1 lets the routers choose."""
    execution = Execution(how.compute_dtype, precision=how.precision)
    graphdef = nnx.graphdef(abstract(model.cfg, execution, prepare(execution)))
    count, length = tokens.shape
    batch = min(how.batch, count)
    parts = (
        tokens.reshape(-1, batch, length),
        given.reshape(len(given), -1, batch, *given.shape[2:]).swapaxes(0, 1),
    )
    log_p, log_all, *found = _read(graphdef, nnx.state(model), *parts, how=how)
    found = [
        x if x is None else np.moveaxis(x, 0, 1).reshape(len(given), count, length, -1)
        for x in found
    ]
    return Read(
        np.asarray(log_p).reshape(count, -1),
        np.asarray(log_all).reshape(count, length - 1, -1),
        *found,
    )


@partial(jax.jit, static_argnames=("graphdef", "how"))
def _read(graphdef, state, tokens, given, *, how):
    """Read batches one after the other: tokens [n, B, T], given [n, L, B, T, K]."""
    model = nnx.merge(graphdef, state)
    through = forward if how.step is None else partial(decode, how=how)

    def one(part):
        h, expert_ids, scores = through(model, *part)
        log_all = jax.nn.log_softmax(model.logits(h[:, :-1]))
        log_p = jnp.take_along_axis(log_all, part[0][:, 1:, None], axis=-1)[..., 0]
        return log_p, log_all, expert_ids, scores

    return jax.lax.map(one, (tokens, given))


def forward(model, tokens, given):
    how = model.how(watch=frozenset({"scores"}))
    out = model.forward_hidden(tokens, how=how, expert_ids=(given,))
    return out.h, out.routing.expert_ids, out.routing.scores


def decode(model, tokens, given, *, how):
    """Read `how.step` tokens at a time through a cache, as decoding with accepted drafts does."""
    batch, length = tokens.shape
    weights, dtype = prepare_decode(model), pick_dtype(model.compute_dtype, how.cache_dtype)

    def by_step(x, axis):
        """[…, T, …] → [T / step, …, step, …]."""
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, how.step, *x.shape[axis + 1 :]), axis, 0)

    def step(cache, part):
        tokens, given = part
        ctx = make_context(
            model.cfg,
            cache.positions(how.step),
            how=model.how("decode"),
            tokens=tokens,
            cache=cache,
        )
        trunk = model.run_trunk(tokens, ctx._replace(given=given), weights)
        cache, ids = trunk.cache, trunk.metrics["sparse"]["expert_ids"]
        return cache.at_lengths(cache.lengths + how.step), (model.norm(trunk.x), ids)

    start = make_cache(model, batch, length, how.cache, dtype)
    _, (h, expert_ids) = jax.lax.scan(step, start, (by_step(tokens, 1), by_step(given, 2)))
    h, expert_ids = (jnp.moveaxis(x, 0, axis) for x, axis in ((h, 1), (expert_ids, 2)))
    return h.reshape(batch, length, -1), expert_ids.reshape(given.shape), None


def gaps(model, scores):
    """How far the K-th score is above the next one in allowed groups, with the bias: [L, n, T]."""
    cfg = model.cfg
    choice = scores + np.asarray(model.sparse.moe.bias[...])[:, None, None]
    flat = jnp.asarray(choice.reshape(-1, choice.shape[-1]))
    ids = routing.choose(
        flat, cfg.experts_per_token + 1, cfg.num_groups, cfg.groups_per_token, cfg.group_score
    )
    two = jnp.take_along_axis(flat, ids[:, -2:], axis=-1)
    return np.asarray(two[:, 0] - two[:, 1]).reshape(choice.shape[:-1])


def compare(own, again, other, gap):
    """Compare two passes: experts as sets, log p of the same next tokens, replayed `again` or not.

    "moved" counts the tokens alone whose experts change in some layer. "kl" is KL(other ‖ own or
    again) of next tokens.
    """
    kept = (own.expert_ids[..., :, None] == other.expert_ids[..., None, :]).any(-1)
    routers = ~kept.all(-1)  # [L, n, T]
    moved = routers.any(0)
    found = {
        "choices": 100 * float(1 - kept.mean()),
        "routers": 100 * float(routers.mean()),
        "tokens": 100 * float(moved.mean()),
        "near": 100 * float((gap[routers] < NEAR).mean()) if moved.any() else None,
        "by_gap": np.histogram(gap[routers], EDGES)[0],
    }
    for name, one in (("", own), ("replayed_", again)):
        away = np.abs(one.log_p - other.log_p)
        of_moved = float(away[moved[:, :-1]].mean()) if moved[:, :-1].any() else None
        found |= {
            f"{name}mean": float(away.mean()),
            f"{name}moved": of_moved,
            f"{name}max": float(away.max()),
        }
        found[f"{name}kl"] = divergence(other.log_all, one.log_all)
    return found


def divergence(log_p, log_q):
    """KL(p ‖ q) in nats, mean over tokens: Σ p ln(p / q) − p + q.

    Its terms are all positive, so rounding is small.
    """
    total = 0.0
    for row_p, row_q in zip(log_p, log_q, strict=True):
        row_p, row_q = row_p.astype(np.float64), row_q.astype(np.float64)
        terms = np.exp(row_p) * (row_p - row_q) - np.exp(row_p) + np.exp(row_q)
        total += float(terms.sum(-1).mean())
    return total / len(log_p)


# The table and the picture


def of(pair, key):
    """Return a function of a run's numbers."""
    return lambda numbers: numbers["pairs"][pair][key]


def short(results, variant, pair, key):
    """The mean over seeds that have the number, in two significant digits; of "max" the largest."""
    numbers = [record["numbers"]["pairs"][pair].get(key) for record in results.records(variant)]
    values = np.array([number for number in numbers if number is not None])
    return f"{values.max() if 'max' in key else values.mean():.2g}" if len(values) else "–"


SHARES = {"choices": "choices, %", "routers": "routers, %", "tokens": "tokens, %"}
DISTANCES = {"mean": "log p moves by", "moved": "at tokens that change", "max": "at most"}


def table(results):
    heads, keys = [*SHARES.values()], []
    for key, text in DISTANCES.items():
        heads += [text, "replayed"]
        keys += [key, f"replayed_{key}"]
    every = [*SHARES, *keys, "kl", "replayed_kl"]  # KL was measured of the base width alone
    rows = [[pair, *(short(results, BASE, pair, key) for key in every)] for pair in PAIRS]
    parts = [markdown_table([f"{BASE}, sigmoid", *heads, "KL, nats", "replayed"], rows)]
    for pair in (ENGINES, BFLOAT16):
        rows = []
        for variant in results.variants:
            shares = [mean_spread(results.values(variant, of(pair, key)), 2) for key in SHARES]
            rows.append([variant, *shares, *(short(results, variant, pair, key) for key in keys)])
        parts.append(markdown_table([pair, *heads], rows))
    shares = {
        "kl": "of the KL",
        "mean": "of the mean",
        "moved": "at tokens that change",
        "max": "of the largest",
    }
    rows = []
    for pair in (ENGINES, BFLOAT16, INT8, FP8):
        left = (results.values(BASE, kept_by_replay(key, pair)) for key in shares)
        rows.append([pair, *(mean_spread(values, 0) for values in left)])
    parts.append(markdown_table([f"{BASE}: left with replay, %", *shares.values()], rows))
    return "\n\n".join([*parts, COLUMNS])


COLUMNS = (
    "A router is a token in a layer; it changes if one of its K experts does. "
    "Log p is that of a next token, in nats. "
    "It moves by its absolute difference, in the mean over tokens and seeds; "
    '"at most" is the largest. '
    "KL is that of all next tokens, from the first pass, whose experts are replayed, "
    "to the second one."
)
SHOWN = {ENGINES: "C0", BFLOAT16: "C2", INT8: "C1", FP8: "C3"}
LEAST = 1e-3  # %, where the picture's axis of shares ends


def draw(results, path):
    figure = Figure(figsize=(14, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    draw_shares(axes[0, 0], results)
    draw_gaps(axes[0, 1], results)
    draw_distances(axes[1, 0], results)
    draw_variants(axes[1, 1], results)
    figure.suptitle(drawing.answer(lambda: words(results), results.about["question"]), fontsize=12)
    write_figure(figure, path)


def words(results):
    share, left = (
        results.values(BASE, x).mean() for x in (of(ENGINES, "routers"), kept_by_replay("moved"))
    )
    return (
        f"In bfloat16, decoding and the full forward differ in {share:.2g} % of the routers. "
        f"With replay, {left:.0f} % of the difference is left at these tokens"
    )


def draw_shares(ax, results):
    ax.set_xscale("log")
    for key, marker, colour in (("routers", "o", "C0"), ("tokens", "s", "C1")):
        for row, pair in enumerate(PAIRS):
            values = np.maximum(results.values(BASE, of(pair, key)), LEAST)
            ax.plot(
                values,
                np.full(len(values), row),
                marker,
                color=colour,
                alpha=0.6,
                label=None if row else key,
            )
    for share, colour in ((10, "C0"), (94, "C1")):
        ax.axvline(share, color=colour, linestyle=":", linewidth=1.2)
    ax.plot([], [], ":", color="0.4", label="published: 10 % and 94 %")
    ax.set_yticks(range(len(PAIRS)), PAIRS, fontsize=8)
    ax.set_ylim(len(PAIRS) - 0.5, -0.5)
    drawing.style_axes(
        ax, "Routers, and tokens in any layer, that change", f"%; at {LEAST:g}: that or less", ""
    )
    ax.legend(frameon=False, fontsize=8, loc="lower left")


def draw_gaps(ax, results):
    middles = np.sqrt(EDGES[1:] * EDGES[:-1])
    counts = results.values(BASE, "gaps").sum(0)
    for pair, colour in SHOWN.items():
        share = 100 * results.values(BASE, of(pair, "by_gap")).sum(0) / np.maximum(counts, 1)
        ax.plot(
            middles[counts > 0], share[counts > 0], "o-", color=colour, label=pair, markersize=4
        )
    ax.bar(
        EDGES[:-1],
        100 * counts / counts.sum(),
        np.diff(EDGES),
        align="edge",
        color="0.9",
        label="of all routers",
    )
    ax.axvline(NEAR, color="0.4", linestyle=":", linewidth=1, label=f"gap {NEAR:g}")
    ax.set_xscale("log")
    drawing.style_axes(
        ax, "A router changes where its choice was close", "gap of the K-th to the next score", "%"
    )
    ax.legend(frameon=False, fontsize=8)


def draw_distances(ax, results):
    """Open: routers choose, filled: experts replayed."""
    ax.set_xscale("log")
    for key, colour, label in (
        ("mean", "C0", "mean"),
        ("moved", "C1", "tokens that change"),
        ("max", "C3", "largest"),
    ):
        for name, face in ((key, "none"), (f"replayed_{key}", colour)):
            values = np.array([results.values(BASE, of(pair, name)) for pair in PAIRS], float)
            values[values == 0] = np.nan  # not on this axis
            ax.plot(
                values,
                range(len(PAIRS)),
                "o",
                color=colour,
                markerfacecolor=face,
                markersize=5,
                alpha=0.8,
            )
        ax.plot([], [], "o", color=colour, label=label)
    ax.plot([], [], "o", color="0.4", markerfacecolor="none", label="open: routers choose")
    ax.set_yticks(range(len(PAIRS)), PAIRS, fontsize=8)
    ax.set_ylim(len(PAIRS) - 0.5, -0.5)
    drawing.style_axes(
        ax, "How far log p of the same tokens moves", "nats; filled: with replay", ""
    )
    ax.legend(frameon=False, fontsize=8, loc="lower left")


def draw_variants(ax, results):
    names = results.variants
    for pair, offset in ((ENGINES, -0.12), (BFLOAT16, 0.12)):
        key = of(pair, "choices")
        halves = drawing.half_intervals(results, names, key)
        for row, (name, half) in enumerate(zip(names, halves, strict=True)):
            drawing.plot_row(ax, results.values(name, key), row + offset, half, SHOWN[pair])
        ax.plot([], [], "o-", color=SHOWN[pair], label=pair)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -1.2)  # space for the legend
    ax.set_xlim(left=0)
    drawing.style_axes(
        ax,
        "By size and by router",
        "% of choices that change; dots: seeds, bars: 95 % interval",
        "",
    )
    ax.legend(frameon=False, fontsize=8, loc="upper right")


# The claims


def kept_by_replay(key, pair=ENGINES):
    """% of the two passes' distance that is left with replay."""
    return lambda numbers: 100 * of(pair, f"replayed_{key}")(numbers) / of(pair, key)(numbers)


def taken_by_replay(results, key):
    """% of the two engines' distance that replay takes away, of every run."""
    kept = [results.values(variant, kept_by_replay(key)) for variant in results.variants]
    return 100 - np.concatenate(kept)


def share_claim(text, against, pair, key, expect="higher", **more):
    return Claim(text, BASE, against, of(pair, key), expect, unit="points", **more)


def replay_claim(text, key):
    return Claim(
        text, BASE, 50.0, kept_by_replay(key), "lower", unit="points", digits=1, stake="experts"
    )


def log_choices(numbers):
    return float(np.log(numbers["pairs"][BFLOAT16]["choices"]))


def compared(text, variant, against, expect="higher", **more):
    return Claim(text, variant, against, log_choices, expect, unit="ln choices", digits=2, **more)


STUDY = Study(
    question="How often do routers disagree with themselves, and what does replay give back?",
    published=(
        "10 % of routers, 94 % of tokens in some layer, between two engines; "
        "replay halves the KL (2510.11370)"
    ),
    variants=variants,
    measure=measure,
    table=table,
    draw=draw,
    # Written before any result.
    claims=(
        share_claim(
            "bfloat16 decoding and forward differ in 10 % of routers or more",
            10.0,
            ENGINES,
            "routers",
        ),
        share_claim(
            "bfloat16 changes more than 1 % of float32's choices", 1.0, BFLOAT16, "choices"
        ),
        share_claim(
            "in float32 a batch of 32 changes under 0.01 % of choices",
            0.01,
            BATCHES,
            "choices",
            "lower",
            questions=CHOICES,
        ),
        share_claim(
            f"half of bfloat16's changes have a gap below {NEAR:g}",
            50.0,
            BFLOAT16,
            "near",
            digits=1,
        ),
        replay_claim(
            "replay halves the difference of log p of bfloat16 decoding and forward", "mean"
        ),
        replay_claim("the same at tokens that change", "moved"),
        replay_claim("the same of the largest difference", "max"),
        compared("at double width more choices change than at half", "double width", "half width"),
        compared("with groups more choices change than without", GROUPS, BASE),
        compared(
            "softmax changes as many choices as sigmoid, within 20 %",
            SOFTMAX,
            BASE,
            "equal",
            margin=0.18,
        ),
    ),
    facts={
        "82 %": lambda results: results.values(BASE, of(BFLOAT16, "near")).mean(),
        "56 %": lambda results: results.values(GROUPS, of(BFLOAT16, "near")).mean(),
        "84 %": lambda results: taken_by_replay(results, "moved").min(),
        "9 %": lambda results: taken_by_replay(results, "mean").min(),
        "23 %": lambda results: taken_by_replay(results, "mean").max(),
        "0.0003": "an edge of the bins: 10 to the power of −3.5",
    },
    stakes={
        "experts": Stake(
            "each token with its neighbour's experts",
            lambda results: results.values(
                BASE, lambda numbers: numbers["shifted"] - numbers["loss"]
            ),
        )
    },
)
