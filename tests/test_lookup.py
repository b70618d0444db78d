"""Prompt look-up: what it drafts, against a search by hand; and that text with such drafts is the model's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import DENSE, LIGHT, random_model, tokens_of

from dsv3_jax.decoding.drafters import LONGEST_MATCH, LookupDrafter, Prompt, StepResult
from dsv3_jax.decoding.generate import generate
from dsv3_jax.ops.sampling import GREEDY

pytestmark = pytest.mark.usefixtures("light_compiles")


def drafts_by_hand(text, count):
    """The tokens after the longest earlier run of a text's last tokens, the latest of equal ones; then the drafts."""
    best, place = -1, None
    for end in range(len(text) - 1):
        run = 0
        while run < min(LONGEST_MATCH, end + 1) and text[end - run] == text[len(text) - 1 - run]:
            run += 1
        if run >= best:
            best, place = run, end
    longer = list(text)
    for _ in range(count):
        place += 1
        longer.append(longer[place])
    return longer[len(text) :]


def test_drafts_are_those_of_a_search_by_hand(rng):
    """Each step accepts a random number of the text's tokens; slots beyond them hold arbitrary numbers."""
    batch, count, prompt_slots, slots = np.arange(9), 5, 16, 64
    text = rng.integers(3, size=(9, slots)).astype(np.int32)  # three tokens: long runs occur, and ties
    text[0] = np.arange(slots)  # nothing occurs twice
    text[1] = np.tile([4, 5, 6, 7], slots // 4)  # a period
    text[2] = np.tile(np.arange(LONGEST_MATCH + 3), 9)[:slots]  # runs beyond the longest match
    lengths = np.array([1, 2, 16, 5, 1, 9, 16, 3, 12], np.int32)
    drafter = LookupDrafter()

    def noisy_beyond(valid, y):
        return jnp.asarray(np.where(valid, y, rng.integers(3, size=y.shape)).astype(np.int32))

    tokens = noisy_beyond(np.arange(prompt_slots)[None] < lengths[:, None], text[:, :prompt_slots])
    state = drafter.start(Prompt(tokens, jnp.asarray(lengths), None, slots, "latent", None))
    draft = jax.jit(
        lambda state, last: drafter.draft(state, last, jax.random.split(jax.random.key(0), (count, 9)), GREEDY)
    )
    start, num_valid = lengths - 1, np.ones(9, np.int32)  # as prefill leaves them
    while (start + num_valid).max() < slots - 2 * count:
        after = start[:, None] + np.arange(count + 2)
        read = noisy_beyond(np.arange(count + 2)[None] <= num_valid[:, None], text[batch[:, None], after])
        drafts, state = draft(state, StepResult(None, read, *map(jnp.asarray, (num_valid, start))))
        start = start + num_valid
        want = [drafts_by_hand(row[: newest + 1].tolist(), count) for row, newest in zip(text, start, strict=True)]
        assert drafts.tokens.tolist() == want and drafts.q is None
        num_valid = rng.integers(1, count + 2, size=9).astype(np.int32)


@pytest.mark.parametrize("cache", ["latent", pytest.param("expanded", marks=pytest.mark.long)])
def test_greedy_text_is_that_of_plain_decoding(cache):
    """Ragged prompts; some of them, and all texts after a while, repeat themselves."""
    model = random_model(LIGHT, execution=DENSE)
    prompts = [tokens_of(LIGHT, 1, n, seed=n)[0].tolist() for n in (1, 3, 21)] + [[5, 9, 2, 7] * 6]
    how = dict(cache=cache, stop_tokens=[7])
    drafted = generate(model, prompts, 48, draft="lookup", draft_length=4, **how)
    plain = generate(model, prompts, 48, **how)
    assert drafted.tokens == plain.tokens
    assert 0 < drafted.acceptance[3] <= drafted.acceptance[0] < 1 and drafted.steps < plain.steps
