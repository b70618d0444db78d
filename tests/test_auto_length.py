"""draft_length="auto": the choice on simulated drafters, and that text is plain decoding's, whatever is chosen."""

from dataclasses import replace
from functools import lru_cache

import jax
import numpy as np
import pytest
from flax import nnx
from models import DENSE, HEADS, LIGHT, random_model, tokens_of

from dsv3_jax.decoding import auto_length
from dsv3_jax.decoding.auto_length import Part, choose
from dsv3_jax.decoding.decode_config import DecodeConfig
from dsv3_jax.decoding.generate import generate, generate_in_parts
from dsv3_jax.mesh import sharding

# The choice, on a clock of our own. A plain step takes 1.

LENGTHS = (0, 1, 2, 4)
READING = 0.5  # plain steps that a drafter takes to read what plain steps have left


def settings(rng, count):
    """[count] drafters: seconds of a step by length, and the share of drafts that are right; many never pay."""
    draft = np.sort(rng.uniform(0, 0.6, (count, 3)), axis=1) * rng.choice([0.05, 1, 3], (count, 1))
    verify = 1 + np.sort(rng.uniform(0, 1, (count, 3)), axis=1) * rng.choice([0.1, 1, 3], (count, 1))
    right = rng.uniform(0, 1, (count, 9)) * rng.choice([0.0, 0.5, 1], (count, 1))
    rates = (np.sort(right, axis=1) * rng.dirichlet(np.ones(9), count)).sum(1)
    return np.concatenate([np.ones((count, 1)), draft + verify], axis=1), rates


def simulate(rng, seconds, rate, tokens, parts):
    """Decode so many tokens; (tokens, seconds), after each part."""
    seconds, done, spent, found = dict(zip(LENGTHS, seconds, strict=True)), 0, 0.0, []
    while done < tokens:
        length, more = choose(parts, LENGTHS)
        spent += READING * bool(length and parts and not parts[-1].length)
        accepted, steps, made = np.zeros(4), 0, 0
        while made < more:
            run = np.cumprod(rng.random(length) < rate)
            accepted[:length] += run
            steps, made = steps + 1, made + 1 + int(run.sum())
        took = steps * seconds[length]
        parts.append(Part(length, steps, steps, accepted, took * rng.normal(1, 0.02)))
        done, spent = done + made, spent + took
        found.append((done, spent))
    return np.array(found)


def best_fixed(seconds, rate):
    """Tokens a second of the best length, known in hindsight."""
    return max(sum(rate**j for j in range(n + 1)) / s for n, s in zip(LENGTHS, seconds, strict=True))


def test_it_is_near_the_best_fixed_length_after_256_tokens(rng):
    count, first, later = 96, [], []
    seconds, rates = settings(rng, count)
    best = np.array([best_fixed(*pair) for pair in zip(seconds, rates, strict=True)])
    for cost, rate, most in zip(seconds, rates, best, strict=True):
        found = simulate(rng, cost, rate, 1280, [])
        at = found[np.searchsorted(found[:, 0], 256)]
        first.append(at[0] / at[1] / most)
        later.append((found[-1, 0] - at[0]) / (found[-1, 1] - at[1]) / most)
    first, later, useless = np.array(first), np.array(later), best == 1
    assert 20 < useless.sum() < count - 20
    for kind in (useless, ~useless):
        assert later[kind].mean() > 0.97
        assert first[kind].mean() > 0.92
    assert later[useless].min() > 0.95 and first[useless].mean() > 0.95  # never much slower than plain
    assert later.min() > 0.88


def test_it_follows_the_text(rng):
    """Drafts that were useless are tried again, and found to pay; and the other way round."""
    parts: list[Part] = []
    seconds = 1, 1.2, 1.3, 1.5
    for rate in (0.0, 0.9, 0.0):
        parts_before = len(parts)
        simulate(rng, seconds, rate, 2000, parts)
        steps = dict.fromkeys(LENGTHS, 0)
        for part in parts[(len(parts) + parts_before) // 2 :]:
            steps[part.length] += part.steps
        assert max(steps, key=steps.get) == (4 if rate else 0)


def test_a_delay_of_the_machine_changes_little():
    """One slow part of five is left out, and three are not."""

    def part(length, seconds):
        return Part(length, 4, 4, [4] * length, 4 * seconds)

    usual = [part(1, 1.2), part(0, 1.0)] * 3
    assert choose(usual, (0, 1))[0] == choose([*usual, part(1, 50.0)], (0, 1))[0] == 1
    assert choose([*usual, *[part(1, 50.0)] * 3], (0, 1))[0] == 0


def test_the_lengths():
    assert auto_length.draft_lengths("mtp", replace(LIGHT, **HEADS["deepseek of 3"])) == (0, 3, 4)  # heads read all
    assert auto_length.draft_lengths("mtp", replace(LIGHT, **HEADS["meta"])) == (0, 3)
    assert auto_length.draft_lengths("mtp", replace(LIGHT, mtp_kind="medusa", mtp_depth=3)) == (0, 1, 2)
    assert DecodeConfig(70, draft="lookup", draft_length="auto").num_drafts == 8


# Text, whatever is chosen

PROMPTS = [tokens_of(LIGHT, 1, n, seed=n)[0].tolist() for n in (1, 2, 21)] + [[5, 9, 2, 7] * 6]


@pytest.fixture
def any_length(monkeypatch):
    """Lengths by chance, in short parts. Few positions can be left unread, so drafters read often."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(
        auto_length, "choose", lambda past, lengths: (rng.choice(lengths).item(), rng.integers(1, 9).item())
    )
    monkeypatch.setattr("dsv3_jax.decoding.generate.UNREAD", 24)
    monkeypatch.setattr("dsv3_jax.decoding.generate.MOST_READING", 1e9)


@lru_cache
def pair(scheme, quality):
    """(A model, what drafts for it.)"""
    from test_speculative import drafting

    return (random_model(LIGHT, execution=DENSE), "lookup") if scheme == "lookup" else drafting(scheme)[quality]


@pytest.mark.long
@pytest.mark.usefixtures("light_compiles", "any_length")
@pytest.mark.parametrize("scheme", ["lookup", "deepseek of 3", "meta", "medusa", "eagle", "model"])
def test_greedy_text_is_that_of_plain_decoding(scheme):
    model, draft = pair(scheme, "partly")
    plain = generate(model, PROMPTS, 60, stop_tokens=[7])
    config = DecodeConfig(60, draft=draft, draft_length="auto", stop_tokens=[7])
    *_, drafted = generate_in_parts(model, PROMPTS, config, part=17)
    assert drafted.tokens == plain.tokens
    assert drafted.steps == sum(drafted.steps_by_length.values()) <= plain.steps  # the slowest row's
    assert min(drafted.steps_by_length.values()) > 0 and 0 < drafted.acceptance[0] < 1


@pytest.mark.long
@pytest.mark.usefixtures("light_compiles", "any_length")
@pytest.mark.parametrize("scheme", ["deepseek of 1", "model"])
def test_after_plain_steps_a_perfect_drafter_is_perfect(scheme):
    """It has read all of the text. Each step of n drafts accepts n, but for the last of a row."""
    model, draft = pair(scheme, "right")
    drafted = generate(model, PROMPTS[2:3], 80, draft=draft, draft_length="auto")
    steps = drafted.steps_by_length
    assert steps[0] > 8 and sum(n * (length + 1) for length, n in steps.items()) - 79 <= 4


@pytest.mark.long
@pytest.mark.usefixtures("light_compiles", "any_length")
def test_certain_drafts_leave_a_seeds_text_alone():
    """On a mesh too, where rows are on devices of their own."""
    model, draft = pair("lookup", "")
    how = dict(temperature=0.3, top_p=0.9, seed=3)
    plain = generate(model, PROMPTS, 40, **how)
    drafted = generate(model, PROMPTS, 40, draft=draft, draft_length="auto", **how)
    assert drafted.tokens == plain.tokens and 0.05 < drafted.acceptance[0] < 1
    graphdef, state = nnx.split(model)
    placed = jax.device_put(state, sharding.state_sharding(state, sharding.make_mesh(2, 2, 2)))
    there = nnx.merge(graphdef, placed)
    assert generate(there, PROMPTS, 40, draft=draft, draft_length="auto", **how).tokens == plain.tokens


@pytest.mark.usefixtures("light_compiles")
def test_the_clock_decides(monkeypatch):
    """Without a script: the first parts are of the shortest drafts and of none, and the compilation is not in them."""
    model, draft = pair("lookup", "")
    found = generate(model, PROMPTS[:1], 60, draft=draft, draft_length="auto")
    assert found.tokens == generate(model, PROMPTS[:1], 60).tokens
    assert found.steps_by_length[0] > 0 and found.steps_by_length[1] > 0
