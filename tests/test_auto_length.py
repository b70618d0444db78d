"""draft_length="auto": the choice on simulated drafters, and text that is plain decoding's."""

from dataclasses import replace

import numpy as np
import pytest
from models import DENSE, HEADS, LIGHT, random_model, tokens_of

from dsv3_jax.decoding.auto_length import LengthChoice, draft_lengths
from dsv3_jax.decoding.decode_config import DecodeConfig
from dsv3_jax.decoding.generate import generate, generate_in_parts

# The choice, on our own clock. A plain step takes 1; a drafter reads what those left in READING.
LENGTHS, READING = (0, 1, 2, 4), 0.5


def settings(rng, count):
    """[count] drafters: seconds of a step by length, share of right drafts; many never pay."""
    draft = np.sort(rng.uniform(0, 0.6, (count, 3)), axis=1) * rng.choice([0.05, 1, 3], (count, 1))
    more = np.sort(rng.uniform(0, 1, (count, 3)), axis=1)
    verify = 1 + more * rng.choice([0.1, 1, 3], (count, 1))
    right = rng.uniform(0, 1, (count, 9)) * rng.choice([0.0, 0.5, 1], (count, 1))
    rates = (np.sort(right, axis=1) * rng.dirichlet(np.ones(9), count)).sum(1)
    return np.concatenate([np.ones((count, 1)), draft + verify], axis=1), rates


def simulate(rng, seconds, rate, tokens, choice):
    """Decode tokens: ([parts, 3] tokens, seconds, seconds of the best length; steps by length).

    The third counts the tokens that the chosen lengths are worth, without the chance of those that
    were accepted.
    """
    worth = {n: sum(rate**j for j in range(n + 1)) for n in LENGTHS}
    seconds = dict(zip(LENGTHS, seconds, strict=True))
    best, done, spent, least, found = max(worth[n] / seconds[n] for n in LENGTHS), 0, 0.0, 0.0, []
    steps_of, last = dict.fromkeys(LENGTHS, 0), None
    while done < tokens:
        length, more = choice.next()
        spent += READING * bool(length and last == 0)
        accepted, steps, made = np.zeros(4), 0, 0
        while made < more:
            run = np.cumprod(rng.random(length) < rate)
            accepted[:length] += run
            steps, made = steps + 1, made + 1 + int(run.sum())
        choice.add(length, steps, steps, accepted, steps * seconds[length] * rng.normal(1, 0.02))
        done, spent, last = done + made, spent + steps * seconds[length], length
        least += steps * worth[length] / best
        steps_of[length] += steps
        found.append((done, spent, least))
    return np.array(found), steps_of


def test_it_is_near_the_best_fixed_length_after_256_tokens(rng):
    seconds, rates = settings(rng, 64)
    first, later, useless = [], [], []
    for cost, rate in zip(seconds, rates, strict=True):
        found, _ = simulate(rng, cost, rate, 1280, LengthChoice(LENGTHS))
        at = found[np.searchsorted(found[:, 0], 256)]
        first.append(at[2] / at[1])
        later.append((found[-1, 2] - at[2]) / (found[-1, 1] - at[1]))
        useless.append(
            all(sum(rate**j for j in range(n + 1)) <= s for n, s in zip(LENGTHS, cost, strict=True))
        )
    first, later, useless = map(np.array, (first, later, useless))
    assert 10 < useless.sum() < 54
    assert later.mean() > 0.985 and np.mean(later > 0.97) > 0.9 and later.min() > 0.88
    # never much slower than plain
    assert later[useless].min() > 0.95 and first[useless].mean() > 0.95


def test_it_follows_the_text(rng):
    """Drafts that were useless are tried again, and found to pay; and the other way round."""
    choice = LengthChoice(LENGTHS)
    for rate in (0.0, 0.9, 0.0):
        simulate(rng, (1, 1.2, 1.3, 1.5), rate, 3000, choice)
        _, steps = simulate(rng, (1, 1.2, 1.3, 1.5), rate, 500, choice)
        assert max(steps, key=steps.get) == (4 if rate else 0)


def test_the_lengths():
    # heads read all
    assert draft_lengths("mtp", replace(LIGHT, **HEADS["deepseek of 3"])) == (0, 3, 4)
    assert draft_lengths("mtp", replace(LIGHT, **HEADS["meta"])) == (0, 3)
    assert draft_lengths("mtp", replace(LIGHT, mtp_kind="medusa", mtp_depth=3)) == (0, 1, 2)
    assert DecodeConfig(70, draft="lookup", draft_length="auto").num_drafts == 8


# Text, whatever is chosen

PROMPTS = [tokens_of(LIGHT, 1, n, seed=n)[0].tolist() for n in (1, 2, 21)] + [[5, 9, 2, 7] * 6]


@pytest.fixture
def any_length(monkeypatch):
    """Three lengths by chance, in parts of up to 8 tokens, but the second, of 40 plain ones."""
    rng, calls = np.random.default_rng(0), []

    def next_part(choice):
        calls.append(choice)
        return (
            (0, 40)
            if len(calls) == 2
            else (rng.choice(choice.lengths).item(), rng.integers(1, 9).item())
        )

    monkeypatch.setattr(LengthChoice, "next", next_part)
    monkeypatch.setattr(
        "dsv3_jax.decoding.generate.draft_lengths", lambda *of: draft_lengths(*of)[:3]
    )


@pytest.mark.long
@pytest.mark.usefixtures("any_length")
def test_greedy_text_is_that_of_plain_decoding():
    model = random_model(LIGHT, execution=DENSE)
    plain = generate(model, PROMPTS, 80, stop_tokens=[7])
    config = DecodeConfig(80, draft="lookup", draft_length="auto", stop_tokens=[7])
    *_, drafted = generate_in_parts(model, PROMPTS, config, part=57)
    assert drafted.tokens == plain.tokens
    # the slowest row's
    assert drafted.steps == sum(drafted.steps_by_length.values()) <= plain.steps
    assert min(drafted.steps_by_length.values()) > 0 and 0 < drafted.acceptance[0] < 1
