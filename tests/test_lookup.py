"""Prompt look-up: its drafts, against a search by hand; and text that is the model's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import DENSE, LIGHT, random_model, tokens_of

from dsv3_jax.decoding.drafters import Unread, make_drafter
from dsv3_jax.decoding.generate import generate
from dsv3_jax.decoding.prompt_lookup import LONGEST_MATCH
from dsv3_jax.model.transformer import abstract
from dsv3_jax.ops.sampling import GREEDY


def drafts_by_hand(text, count):
    """The tokens after the longest earlier run of the last tokens, the latest one; then drafts."""
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
    """Slots beyond the newest token hold arbitrary numbers."""
    count, slots = 5, 64
    # three tokens: long runs occur, and ties
    text = rng.integers(3, size=(9, slots)).astype(np.int32)
    text[0] = np.arange(slots)  # nothing occurs twice
    text[1] = np.tile([4, 5, 6, 7], slots // 4)  # a period
    text[2] = np.tile(np.arange(LONGEST_MATCH + 3), 9)[:slots]  # runs beyond the longest match
    keys = jax.random.split(jax.random.key(0), (count, 9))
    drafter = make_drafter("lookup", abstract(LIGHT), None)
    draft = jax.jit(lambda unread: drafter.draft(None, unread, keys, GREEDY)[0])
    newest = np.array([1, 2, 16, 5, 1, 9, 16, 3, 12], np.int32)
    while newest.max() < slots - 2 * count:
        so_far = np.where(
            np.arange(slots)[None] <= newest[:, None], text, rng.integers(3, size=text.shape)
        )
        one, begin = jnp.ones(9, jnp.int32), jnp.asarray(newest - 1)
        drafts = draft(Unread(None, jnp.asarray(so_far, jnp.int32), one, begin))
        want = [
            drafts_by_hand(row[: n + 1].tolist(), count)
            for row, n in zip(text, newest, strict=True)
        ]
        assert drafts.tokens.tolist() == want and drafts.q is None
        newest += rng.integers(1, count + 2, size=9).astype(np.int32)


@pytest.mark.long
def test_greedy_text_is_that_of_plain_decoding():
    """Ragged prompts; some of them, and all texts after a while, repeat themselves."""
    model = random_model(LIGHT, execution=DENSE)
    prompts = [tokens_of(LIGHT, 1, n, seed=n)[0].tolist() for n in (1, 3, 21)] + [[5, 9, 2, 7] * 6]
    drafted = generate(model, prompts, 48, draft="lookup", draft_length=4, stop_tokens=[7])
    plain = generate(model, prompts, 48, stop_tokens=[7])
    assert drafted.tokens == plain.tokens
    assert 0 < drafted.acceptance[3] <= drafted.acceptance[0] < 1 and drafted.steps < plain.steps

    # A step writes the drafts that it accepts and one token of the model's own. All rows are alike.
    alike = generate(model, prompts[3:] * 4, 48, draft="lookup", draft_length=4, stop_tokens=[0])
    assert len(alike.tokens[0]) == 48 and alike.acceptance[0] > 0.2
    assert 47 <= alike.steps * alike.mean_accepted <= 47 + 4  # the last step's may be cut
