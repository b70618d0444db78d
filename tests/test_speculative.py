"""Speculative decoding against plain decoding."""

import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from models import DENSE, LIGHT, forward, random_model, small, tokens_of
from runs import refused
from test_generate import until
from test_sampling import within

from dsv3_jax.decoding.decode_config import DecodeConfig
from dsv3_jax.decoding.generate import generate
from dsv3_jax.model.transformer import abstract

pytestmark = pytest.mark.long

# 13 after the first: runs of 2 to 9 tokens do not divide it, so right drafts are cut at the end
NEW = 14
LENGTHS = (1, 2, 3, 5, 9, 1, 21, 4)
PROMPTS = [tokens_of(LIGHT, 1, n, seed=i)[0].tolist() for i, n in enumerate(LENGTHS)]
UNUSED = 7  # a stop token that no model below generates: with one, all requests share a compilation


def changed(model, change):
    """A copy whose parameters are `change(path, array)`."""
    graphdef, state = nnx.split(model)
    made = {}
    for path, v in nnx.to_flat_state(state):
        made[path] = v.replace(jnp.asarray(change(path, np.array(v[...]))))
    return nnx.merge(graphdef, nnx.from_flat_state(made))


def leaning(model, share):
    """The same model, but its layers add `share` of theirs, so the newest token decides most.

    With share 0 it decides all, and drafts are always right: heads read that token, too.
    """

    def change(path, x):
        if path[-1] in ("w_o", "w_down"):
            return x * np.float32(share)
        if path[-1] == "w_eh":
            return x * np.float32(share) + np.eye(*x.shape, dtype=np.float32)
        return np.ones_like(x) if path[-2:-1] in (("norm",), ("embed_norm",)) else x

    return changed(model, change)


def drafting(case):
    """(The model, what drafts for it); cases of one graph share a compilation."""
    if case.endswith("heads"):
        model = random_model(replace(LIGHT, mtp_depth=2), execution=DENSE)
        return leaning(model, 0 if case == "right heads" else 0.1), "mtp"
    rng, target = np.random.default_rng(5), random_model(LIGHT, execution=DENSE)
    if case == "wrong model":  # it drafts what the model would find least likely
        return target, changed(target, lambda path, x: -x if path == ("head",) else x)
    near = changed(target, lambda _, x: x + np.float32(0.02 * rng.standard_normal(x.shape)))
    return target, near


# Greedy: whatever the drafts, the tokens are those of plain decoding. test_drafters has all heads.


DRAFTS = [  # tokens drafted a step, the cache's dtype
    ("right heads", 8, None),
    ("partly right heads", 8, None),
    ("partly right model", 6, "int8"),
    ("wrong model", 6, "int8"),
]


@pytest.mark.parametrize("case, length, dtype", DRAFTS)
def test_greedy_speculation_gives_the_tokens_of_plain_decoding(case, length, dtype):
    model, draft = drafting(case)
    how = dict(stop_tokens=[UNUSED], cache_dtype=dtype)
    got = generate(model, PROMPTS, NEW, draft=draft, draft_length=length, **how)
    assert got.tokens == generate(model, PROMPTS, NEW, **how).tokens
    assert len(got.acceptance) == length
    # a draft is accepted only if those before it are
    assert got.acceptance == sorted(got.acceptance, reverse=True)
    if case == "right heads":
        assert got.acceptance == [1.0] * length
        assert got.steps == math.ceil((NEW - 1) / (length + 1))
        assert got.mean_accepted == length + 1
    elif case == "wrong model":
        assert (got.acceptance, got.steps) == ([0.0] * length, NEW - 1)
    else:
        # a model that repeats one token could not fail
        assert len({t for row in got.tokens for t in row}) > 5
        assert 0 < got.acceptance[0] < 1


def test_a_stop_token_within_a_run_ends_its_row_and_no_other():
    model, _ = drafting("partly right heads")
    rows = generate(model, PROMPTS, NEW, stop_tokens=[UNUSED]).tokens
    assert not any(UNUSED in row for row in rows)
    stops = {rows[0][4], rows[3][3], rows[6][8], rows[2][0]}
    cut = set()
    for stop in stops:
        got = generate(model, PROMPTS, NEW, stop_tokens=[stop], draft="mtp", draft_length=8)
        assert got.tokens == [until(row, stop) for row in rows]
        cut |= set(map(len, got.tokens))
    assert len(cut) > 4 and NEW in cut  # at many places within a run, and not at all


# Sampled: the tokens follow the model's distribution.

TINY = small(num_layers=1, num_dense_layers=1, vocab_size=5)
DRAWS = 4096


def test_sampled_speculation_follows_the_model():
    """Three new tokens of rows of one prompt: by prefill, then accepted and rejected drafts.

    test_sampler has look-up's drafts, which are certain and change no text.
    """
    model = random_model(replace(TINY, mtp_depth=1), execution=DENSE)
    how = dict(temperature=2.0, top_k=4, top_p=0.95)  # far from the bare logits
    got = generate(model, [[1, 4]] * DRAWS, 3, draft="mtp", draft_length=2, seed=2, **how)
    shares = np.zeros((5, 5, 5))
    np.add.at(shares, tuple(np.array(got.tokens).T), 1 / DRAWS)
    law = three_tokens(model, [1, 4], how)
    assert law.max() < 0.6 and np.count_nonzero(law) > 20
    assert 0.1 < got.acceptance[0] < 0.95  # drafts are accepted and rejected
    assert within(shares, law, DRAWS)


def three_tokens(model, prompt, how):
    """The probabilities [W, W, W] of three tokens after a prompt, by the logits of every text."""
    texts = [[*prompt, a, b] for a in range(5) for b in range(5)]
    logits = forward(model, jnp.asarray(texts, jnp.int32)).logits
    laws = [[oracles.sampling_probs(row, **how) for row in text[-3:]] for text in logits]
    first, second, third = np.array(laws).reshape(5, 5, 3, 5).transpose(2, 0, 1, 3)
    return first[0, 0][:, None, None] * second[:, 0][:, :, None] * third


# Requests


MODEL = abstract(LIGHT)
OTHER = abstract(replace(LIGHT, vocab_size=38))
WITH_HEAD = abstract(replace(LIGHT, mtp_depth=1))
WITH_MEDUSA = abstract(replace(LIGHT, mtp_kind="medusa", mtp_depth=4))
REFUSED = [
    (MODEL, OTHER, 1, "vocab_size=38 of the draft model is not the model's 37"),
    (MODEL, "mtp", 1, "draft='mtp' needs multi-token heads, and the model's mtp_depth is 0"),
    (WITH_MEDUSA, "mtp", 5, "draft_length=5 is more than mtp_depth=4"),
    (WITH_HEAD, "mtp", 9, "max_new_tokens=100 with 9 drafts a step does not fit: prompt 1 has 20"),
]


def test_drafts_that_do_not_fit_are_refused():
    def check(model, draft, length):
        config = DecodeConfig(100, draft=draft, draft_length=length)
        config.check(model.cfg, [[1] * 5, [1] * 20])

    check(MODEL, MODEL, 8)  # up to the last position
    for model, draft, length, sentence in REFUSED:
        with refused(f"^{sentence}"):
            check(model, draft, length)
