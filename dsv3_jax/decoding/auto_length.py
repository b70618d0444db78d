"""`draft_length="auto"`: how many drafts a step makes and verifies, chosen while decoding.

All times are in plain steps. A step that drafts J tokens and verifies k ≤ J of them costs d(J) + C(k), with d(0) = 0
and C(0) ≈ 1. The costs are measured before the loop (`measure_costs`); the compiled program reads no clock. To start
the program of this loop takes s longer than to start that of plain decoding: a small model's request feels it.

    r_b      share of accepted drafts among those that the drafter was b-sure of, b one of BINS classes
    E(k)     1 + Σ_{j≤k} Π_{i≤j} r_{b_i}: tokens that a step over k drafts is expected to add to a sequence
    ρ        tokens that a plain step's time has brought so far, 1 at least
    worth    E(k) − ρ (C(k) + d(J)), against 1 − ρ of a plain step

ρ is the price of time: with it, the largest worth a step is the most tokens a second over many steps.

Guard: a step drafts only if the time spent stays below (1 + SHARE) × the tokens of the slowest sequence, plus SHARE ×
the tokens asked for. The time includes s, and counts as if all drafts of the step were rejected. Plain decoding takes
those tokens' time, so a request takes at most 2 SHARE longer, by the measured costs. Drafts that do not seem to pay are
tried again within the same share. A request falls asleep, so that plain steps decode the rest, for three reasons: even
drafts that are all accepted cost more than they bring, no further trial fits into the share before the end, or the
drafter has not read UNREAD positions.

Why sampled text keeps its law: the number of drafts depends on past steps alone. Whether draft j + 1 is verified
depends on drafts 1 … j, and on the drafter's distribution at j + 1 before it is drawn. It never depends on draft j + 1
itself. So a verified draft has the law q that `accept` assumes. A rule that reads the drawn token's own probability
would bias the text: drafts that it lets pass are likelier than q says.

Source: renewal reward for ρ. Stops by confidence: SpecDec++, arXiv 2405.19715, and `assistant_confidence_threshold` of
transformers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.decoding.decode_config import UNREAD
from dsv3_jax.decoding.drafters import LONGEST_MATCH, Drafts, StepResult
from dsv3_jax.model.mtp import HEADS

BINS = LONGEST_MATCH + 1  # classes of confidence; for look-up, the lengths of a match
PRIOR = 2.0  # observations that a class's own middle is worth at first
MEMORY = 0.98  # weight of what a step before has seen, against this step's
SHARE = 0.01


class Costs(NamedTuple):
    """In plain steps."""

    draft: Float[Array, " options"]  # d; 0 for the option without drafts
    verify: Float[Array, " lengths"]  # C; of length 0, above 1 by the time that the rule takes
    start: Any = np.float32(0.0)  # s


class Control(NamedTuple):
    """The host's instructions to the compiled loop."""

    costs: Costs
    draft: Array  # int32: the option to take; -1 means that the rule chooses
    verify: Array  # int32: an index of `lengths` too
    limit: Array  # int32: steps after which the loop ends


class Tally(NamedTuple):
    """The rule's record of the steps so far."""

    seen: Float[Array, " BINS"]  # verified drafts by class, older ones forgotten
    accepted: Float[Array, " BINS"]
    first: Float[Array, " BINS"]  # classes of first drafts
    spent: Array  # plain steps
    gained: Array  # tokens a sequence, mean
    lost: Array  # plain steps that trials have cost beyond what they brought
    asleep: Array  # bool: no more drafts in this request, so this loop ends
    by_length: Int[Array, " lengths"]  # steps by verified drafts


class Options(NamedTuple):
    """The choices of a step; static."""

    lengths: tuple[int, ...]  # k, from 0
    counts: tuple[int, ...]  # J of each option: 0, some J, and the last: the smallest J after plain steps
    budget: float  # plain steps: SHARE of the tokens asked for
    joint: bool  # several sequences decide together


def make_options(draft: Any, cfg: ModelConfig, batch: int, max_new_tokens: int) -> Options:
    """Make the options of a request.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> make_options("mtp", preset("tiny"), batch=1, max_new_tokens=100)
        Options(lengths=(0, 1, 2, 4), counts=(0, 1, 2, 4, 1), budget=1.0, joint=False)
    """
    lengths, least = {0, 1, 2, 4}, 1
    if draft == "lookup":
        lengths |= {8}
    elif draft == "mtp":
        chained = cfg.head_kind.reads_tokens
        if HEADS[cfg.mtp_kind].remembers:
            least = cfg.mtp_depth  # each head reads every position, or its cache has gaps
        lengths = {0, least, *(k for k in lengths if chained or k <= cfg.mtp_depth)}
    ordered = tuple(sorted(lengths))
    drafting = tuple(k for k in ordered if k >= least)
    return Options(ordered, (0, *drafting, drafting[0]), SHARE * max_new_tokens, batch > 1)


def new_tally(options: Options) -> Tally:
    """The tally before the first step."""
    zeros, zero = jnp.zeros((BINS,), jnp.float32), jnp.zeros((), jnp.float32)
    by_length = jnp.zeros((len(options.lengths),), jnp.int32)
    return Tally(zeros, zeros, zeros + 1 / BINS, zero, zero, zero, jnp.zeros((), bool), by_length)


def rates(tally: Tally) -> Float[Array, " BINS"]:
    """r: shares of accepted drafts by class."""
    middles = (jnp.arange(BINS, dtype=jnp.float32) + 0.5) / BINS
    return (tally.accepted + PRIOR * middles) / (tally.seen + PRIOR)


def price(tally: Tally) -> Array:
    """ρ, drawn to 1 while little is known."""
    return jnp.maximum(1.0, (tally.gained + 2 * PRIOR) / (tally.spent + 2 * PRIOR))


def _run(rate: Array, count: int) -> Array:
    """rate + rate² + … + rate^count."""
    return sum((rate**j for j in range(1, count + 1)), jnp.zeros_like(rate))


def choose_draft(
    tally: Tally, costs: Costs, options: Options, written: Int[Array, ""], missed: Bool[Array, ""]
) -> tuple[Int[Array, ""], Bool[Array, ""], Bool[Array, ""]]:
    """Choose how many tokens a step drafts, from past steps alone.

    Args:
        written: tokens of the slowest sequence after its first.
        missed: some positions are not read by the drafter yet, more than a step's: then only the last option drafts.
    Returns: (the option's index; whether it is a trial, which verifies all its drafts; whether this request will draft
    no more). The last holds if drafts do not seem to pay and all trials that its share has room for were made.
    """
    rate, rho = rates(tally), price(tally)
    worth = jnp.stack([1 + _run(rate, k) for k in options.lengths], axis=1) - rho * costs.verify[None]  # [BINS, k]
    share = tally.first / tally.first.sum()
    values, most, hopes = [], [], []
    for i, count in enumerate(options.counts):
        fits = sum(k <= count for k in options.lengths)
        if options.joint:
            value = (share @ worth[:, :fits]).max()
        else:
            value = share @ worth[:, :fits].max(axis=1)
        values.append(value - rho * costs.draft[i])
        most.append(costs.draft[i] + costs.verify[:fits].max())
        hopes.append((count + 1) / (costs.draft[i] + costs.verify[fits - 1]))
    value, cost, hope = jnp.stack(values), jnp.stack(most), jnp.stack(hopes)
    index = jnp.arange(len(options.counts), dtype=jnp.int32)
    last = index == len(options.counts) - 1
    tokens = written.astype(jnp.float32)
    spent = costs.start + tally.spent + cost
    may = (index == 0) | ((last == missed) & (spent <= (1 + SHARE) * (tokens + 1) + options.budget))
    best = jnp.argmax(jnp.where(may, value, -jnp.inf)).astype(jnp.int32)
    hopeful = (hope > 1) & (index > 0)
    loss = costs.start + tally.lost + cost - 1
    trial = may & hopeful & (loss <= SHARE * tokens + options.budget)
    over = (jnp.argmax(value) == 0) & ~(hopeful & (loss <= 2 * options.budget)).any()  # what it will be at the end
    tries = (best == 0) & trial.any()
    tried = jnp.argmax(jnp.where(trial, hope, -jnp.inf)).astype(jnp.int32)
    return jnp.where(tries, tried, best), tries, over


def choose_verify(
    tally: Tally,
    costs: Costs,
    options: Options,
    confidence: Float[Array, "B J"],
    count: Int[Array, ""],
    active: Bool[Array, " B"],
) -> Int[Array, ""]:
    """Choose how many drafts a step verifies: it stops at the first length from which no farther one is worth more.

    Args:
        confidence: the drafter's, of each draft before it is drawn. Only the next draft's is read.
        count: drafts that were made.
    Returns: the index of the length.
    """
    rate, rho, lengths = rates(tally)[_classes(confidence)], price(tally), options.lengths
    alive = _share(active)  # of sequences, times the chance that all drafts so far pass
    index, on = jnp.zeros((), jnp.int32), jnp.ones((), bool)
    for i, k in enumerate(lengths[:-1]):
        ahead = [
            jnp.where(far <= count, (alive * _run(rate[:, k], far - k)).sum() - rho * costs.verify[j], -jnp.inf)
            for j, far in enumerate(lengths[i + 1 :], start=i + 1)
        ]
        on &= jnp.stack(ahead).max() > -rho * costs.verify[i]  # all are E(k) beyond what is expected so far
        index = jnp.where(on, i + 1, index)
        for j in range(k, lengths[i + 1]):
            alive = alive * rate[:, j]
    return index


def observe(
    tally: Tally,
    options: Options,
    costs: Costs,
    choice: Int[Array, ""],
    index: Int[Array, ""],
    trial: Bool[Array, ""],
    confidence: Float[Array, "B J"],
    tokens: Int[Array, " B"],
    active: Bool[Array, " B"],
    ended: Bool[Array, " B"],
) -> Tally:
    """Count a step: its cost, its tokens, and which of its verified drafts were accepted, by class.

    Args: ended: rows whose last tokens may be cut; their drafts are not counted.
    """
    counts, lengths = (jnp.asarray(x, jnp.int32) for x in (options.counts, options.lengths))
    position = jnp.arange(confidence.shape[1], dtype=jnp.int32)[None]
    accepted, goes_on = tokens[:, None] - 1, (active & ~ended)[:, None]
    tested = (position <= accepted) & (position < lengths[index]) & goes_on
    passed = tested & (position < accepted)
    kind = jax.nn.one_hot(_classes(confidence), BINS, dtype=jnp.float32)
    first = kind[:, 0] * (active & (counts[choice] > 0))[:, None].astype(jnp.float32)
    memory = jnp.where(counts[choice] > 0, MEMORY, 1.0).astype(jnp.float32)
    cost = costs.draft[choice] + costs.verify[index]
    mean = (tokens.astype(jnp.float32) * _share(active)).sum()
    return tally._replace(
        seen=memory * tally.seen + (kind * tested[..., None].astype(jnp.float32)).sum((0, 1)),
        accepted=memory * tally.accepted + (kind * passed[..., None].astype(jnp.float32)).sum((0, 1)),
        first=memory * tally.first + first.sum(0),
        spent=tally.spent + cost,
        gained=tally.gained + mean,
        lost=jnp.where(trial, jnp.maximum(tally.lost + cost - mean, 0), tally.lost),
        by_length=tally.by_length.at[index].add(1),
    )


def _share(active: Array) -> Array:
    return active.astype(jnp.float32) / jnp.maximum(active.sum(), 1).astype(jnp.float32)


def _classes(confidence: Array) -> Array:
    return jnp.clip((confidence * BINS).astype(jnp.int32), 0, BINS - 1)


def widen(last: StepResult) -> StepResult:
    """Make room for the positions that a drafter has not read."""
    more = UNREAD - last.tokens.shape[1]
    return last._replace(
        h=jnp.pad(last.h, ((0, 0), (0, more), (0, 0))), tokens=jnp.pad(last.tokens, ((0, 0), (0, more)))
    )


def append(unread: StepResult, last: StepResult, fresh: Bool[Array, " B"]) -> StepResult:
    """Put a step's result behind those that the drafter has not read; alone where `fresh`."""
    offset = jnp.where(fresh, 0, unread.num_valid)
    rows = jnp.arange(offset.size, dtype=jnp.int32)[:, None]
    columns = offset[:, None] + jnp.arange(last.tokens.shape[1], dtype=jnp.int32)[None]
    return StepResult(
        unread.h.at[rows, columns].set(last.h, mode="drop"),
        unread.tokens.at[rows, columns].set(last.tokens, mode="drop"),
        jnp.minimum(offset + last.num_valid, UNREAD),
        jnp.where(fresh, last.start, unread.start),
        jnp.where(fresh, last.previous, unread.previous),
    )


def auto_step(
    loop: Any,
    control: Control,
    options: Options,
    draft: Callable[[Any, StepResult, int, Array], tuple[Drafts, Any]],
    verify: Callable[[Any, Drafts, Array], Any],
    vocab_size: int,
    has_q: bool,
) -> Any:
    """Run one step of the decoding loop, of the length that the rule chooses.

    Args:
        loop: `generate.Loop`; its `last` is wide, see `widen`.
        draft: (drafter's state, what to read, J, key) → (drafts, state).
        verify: (loop, drafts, newest token) → the loop after a step over them.
        has_q: the drafter has distributions.
    """
    lengths, tally, costs = options.lengths, loop.tally, control.costs
    top, batch = lengths[-1], loop.done.shape[0]
    unread, active = loop.last, ~loop.done
    newest = jnp.take_along_axis(unread.tokens, unread.num_valid[:, None] - 1, axis=1)
    slowest = jnp.where(active, loop.written, jnp.iinfo(jnp.int32).max).min() - 1
    missed = jnp.where(active, unread.num_valid, 0).max() > top + 1
    choice, trial, over = choose_draft(tally, costs, options, slowest, missed)
    choice = jnp.where(control.draft >= 0, control.draft, choice)
    key, draw = jax.random.split(loop.key)

    def nothing(state, unread, draw):
        # Tokens to time a step over them; while decoding they are not verified.
        tokens = (newest + 7919 * jnp.arange(1, top + 1, dtype=jnp.int32)[None]) % vocab_size
        q = jnp.zeros((batch, top, vocab_size), jnp.float32) if has_q else None
        return Drafts(tokens, q, jnp.zeros((batch, top), jnp.float32)), state

    def some(count: int, width: int, state, unread, draw):
        short = unread._replace(
            h=unread.h[:, :width], tokens=unread.tokens[:, :width], num_valid=jnp.minimum(unread.num_valid, width)
        )
        drafts, state = draft(state, short, count, draw)
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, top - count), *[(0, 0)] * (x.ndim - 2))), drafts), state

    branches = [nothing]
    for count, width in zip(options.counts[1:], [top + 1] * (len(options.counts) - 2) + [UNREAD], strict=True):
        branches.append(lambda *args, count=count, width=width: some(count, width, *args))
    drafts, state = jax.lax.switch(choice, branches, loop.drafter, unread, draw)
    count = jnp.asarray(options.counts, jnp.int32)[choice]
    index = choose_verify(tally, costs, options, drafts.confidence, count, active)
    index = jnp.where(trial, jnp.searchsorted(jnp.asarray(lengths, jnp.int32), count).astype(jnp.int32), index)
    index = jnp.where(control.verify >= 0, control.verify, index)
    before = loop._replace(drafter=state, key=key, drafted=loop.drafted + active.sum(dtype=jnp.int32))

    def step(k: int, loop, drafts):
        kept = Drafts(drafts.tokens[:, :k], None if drafts.q is None or not k else drafts.q[:, :k])
        return verify(loop, kept, newest)

    after = jax.lax.switch(index, [lambda *a, k=k: step(k, *a) for k in lengths], before, drafts)
    tokens = after.written - loop.written
    tally = observe(
        tally, options, costs, choice, index, trial, drafts.confidence, tokens, active, after.done
    )  # fmt: skip
    last = append(unread, after.last, (choice > 0) | loop.done)
    full = jnp.where(active, last.num_valid, 0).max() + top + 1 > UNREAD
    tokens = slowest.astype(jnp.float32) + 1
    broke = (choice == 0) & (costs.start + tally.spent > (1 + SHARE) * tokens + options.budget)
    return after._replace(last=last, tally=tally._replace(asleep=full | broke | over))


def to_plain(loop: Any) -> Any:
    """Turn a loop into one of the plain program, which nobody drafts for."""
    last, ones = loop.last, jnp.ones_like(loop.last.num_valid)
    newest = jnp.take_along_axis(last.tokens, last.num_valid[:, None] - 1, axis=1)
    start = last.start + last.num_valid - 1
    result = StepResult(last.h[:, :1], newest, ones, start, last.previous)
    return loop._replace(drafter=None, last=result, num_accepted=loop.num_accepted[:0], tally=None)


def from_plain(plain: Any, loop: Any) -> Any:
    """Turn what the plain steps after `to_plain` made of a loop into a loop of its kind: a step adds a token a row."""
    steps, tokens = plain.steps - loop.steps, (plain.written - loop.written).sum(dtype=jnp.int32)
    tally = loop.tally._replace(by_length=loop.tally.by_length.at[0].add(steps))
    return plain._replace(
        drafter=loop.drafter,
        last=jax.tree.map(lambda new, old: jnp.where(steps > 0, new, old), widen(plain.last), loop.last),
        num_accepted=loop.num_accepted,
        drafted=loop.drafted + tokens,
        tally=tally,
    )


def measure_costs(
    run: Callable[[Control | None, int], tuple[float, int]], options: Options, *, most: int, rounds: int = 3
) -> Costs:
    """Measure what each option and length costs, in steps of the plain program.

    A cell's time is that of many steps less that of one: to start a program takes as long as many a small model's step.

    Args:
        run: (control, steps) → (seconds, steps made). Runs a copy of the request: this loop as the control says, or the
            plain program without one.
        most: steps of the plain program.
        rounds: all are run in turns so often, and the least times count.
    """
    drafts, longer = range(1, len(options.counts)), range(1, len(options.lengths))
    cells = [None, (0, 0), *((i, 0) for i in drafts), *((0, i) for i in longer)]
    unknown = Costs(jnp.zeros((len(options.counts),), jnp.float32), jnp.ones((len(options.lengths),), jnp.float32))

    def seconds(cell: tuple[int, int] | None, steps: int) -> tuple[float, int]:
        if cell is None:
            return run(None, steps)
        return run(Control(unknown, *(jnp.asarray(x, jnp.int32) for x in (*cell, steps))), steps)

    for cell in cells[:2]:
        seconds(cell, 1)  # compiles
    once = seconds(None, 1)
    steps = max(1, min(256, most, round(0.03 / _of_a_step(once, seconds(None, min(most, 16))))))
    once_of, many_of = ([(math.inf, 1)] * len(cells) for _ in range(2))
    for _ in range(rounds):
        for i, cell in enumerate(cells):
            once_of[i] = min(once_of[i], seconds(cell, 1))
            many_of[i] = min(many_of[i], seconds(cell, steps))
    for _ in range(3 * rounds):  # their difference is small
        for i, cell in enumerate(cells[:2]):
            once_of[i] = min(once_of[i], seconds(cell, 1))
    each = list(map(_of_a_step, once_of, many_of))
    plain, ours = (once - steps * a_step for (once, steps), a_step in zip(once_of, each[:2], strict=False))
    return costs_of(each, options, ours - plain)


def _of_a_step(once: tuple[float, int], many: tuple[float, int]) -> float:
    """Seconds, from (seconds, steps) of a short and of a long run; of the long one alone if they do not differ."""
    (less, few), (more, steps) = once, many
    return (more - less) / (steps - few) if steps > few and more > less else more / max(steps, 1)


def costs_of(seconds: Sequence[float], options: Options, start: float = 0.0) -> Costs:
    """Turn times of a step into costs: the plain program's, then those of `measure_costs`'s cells.

    A shorter draft or step costs no more than a longer one: what seems to is noise.

    Args: start: seconds that the loop's program takes longer to start.

    Example:
        >>> options = Options((0, 1), (0, 1, 1), 1.0, False)
        >>> [x.tolist() for x in costs_of([2.0, 2.0, 2.5, 3.0, 4.0], options, start=1.0)]
        [[0.0, 0.25, 0.5], [1.0, 2.0], 0.5]
    """
    plain, short, *rest = seconds
    drafts = len(options.counts) - 1
    *narrow, wide = (max(t - short, 0.0) / plain for t in rest[:drafts])
    verify = [max(t / plain, 1.0) for t in (short, *rest[drafts:])]
    draft = [0.0, *_least_of_later(narrow), max(wide, narrow[0])]
    values = draft, _least_of_later(verify), max(start, 0.0) / plain
    return Costs(*(jnp.asarray(x, jnp.float32) for x in values))


def _least_of_later(values: Sequence[float]) -> list[float]:
    return [min(values[i:]) for i in range(len(values))]


def may_pay(costs: Costs, options: Options) -> bool:
    """Say whether some drafts, all accepted, bring more than they cost, and a trial of them fits into the share.

    Example:
        >>> options = Options((0, 1), (0, 1, 1), 1.0, False)
        >>> may_pay(Costs(jnp.array([0.0, 0.5, 0.5]), jnp.array([1.0, 1.2])), options)
        True
    """
    verify = dict(zip(options.lengths, costs.verify.tolist(), strict=True))
    pairs = list(zip(options.counts, costs.draft.tolist(), strict=True))[1:-1]
    room = 1 + 2 * options.budget - float(costs.start)
    steps = ((k, draft + verify[k]) for count, draft in pairs for k in options.lengths[1:] if k <= count)
    return any(cost < k + 1 and cost <= room for k, cost in steps)
