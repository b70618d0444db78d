"""Speculative decoding against plain decoding."""

import math
from dataclasses import replace
from functools import lru_cache

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from models import DENSE, HEADS, LIGHT, decode_program, forward, random_model, small, tokens_of
from test_generate import until
from test_verify_drafts import within

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
    flat = [
        (path, v.replace(jnp.asarray(change(path, np.array(v[...])))))
        for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def leaning(cfg, share):
    """A random model whose layers add `share` of theirs, so the newest token decides most of it.

    With share 0 it decides all of it, and the heads' drafts are always right: chained heads read
    that token, and for parallel ones the model repeats it. With more they get worse; at 1 it is the
    random model, and chance.
    """
    model = random_model(cfg, execution=DENSE)
    chained = cfg.head_kind.reads_tokens
    embed = np.array(model.embed[...])

    def change(path, x):
        if path[-1] in ("w_o", "w_down", "w"):
            return x * np.float32(share)
        if path[-1] == "w_eh":
            return x * np.float32(share) + np.eye(*x.shape, dtype=np.float32)
        if path == ("head",) and not chained:
            return embed.T / np.linalg.norm(embed, axis=-1)[None]
        return np.ones_like(x) if path[-2:-1] in (("norm",), ("embed_norm",)) else x

    return model if share == 1 else changed(model, change)


def opposed(model):
    """The same model, but its heads draft what they would find least likely."""
    last = {"eagle": "w_eh", "medusa": "w"}.get(model.cfg.mtp_kind, "norm")

    def change(path, x):
        if path[0] != "mtp" or last not in path[2:4]:
            return x
        # Medusa's W = -9: h + silu(-9 h) makes what was below 0 the largest.
        return -9 * np.eye(*x.shape, dtype=np.float32) if last == "w" else -x

    return changed(model, change)


def trunk_of(model):
    """The model without its heads."""
    state = nnx.from_flat_state(
        [(p, v) for p, v in nnx.to_flat_state(nnx.state(model)) if p[0] != "mtp"]
    )
    cfg = replace(model.cfg, mtp_depth=0, mtp_kind="deepseek")
    return nnx.merge(nnx.graphdef(abstract(cfg, model.execution)), state)


def noisy(model, std):
    rng = np.random.default_rng(5)
    return changed(
        model, lambda path, x: x + np.float32(std) * rng.standard_normal(x.shape).astype(np.float32)
    )


@lru_cache
def drafting(scheme):
    """{quality: (the model, what drafts for it)}: of equal graphs, which share a compilation."""
    if scheme == "model":
        target = random_model(LIGHT, execution=DENSE)
        against = changed(target, lambda path, x: -x if path == ("head",) else x)
        return {
            "right": (target, target),
            "partly": (target, noisy(target, 0.02)),
            "random": (target, random_model(LIGHT, seed=1, execution=DENSE)),
            "wrong": (target, against),
        }
    cfg = replace(LIGHT, **HEADS[scheme])
    chained = cfg.head_kind.reads_tokens
    made = {
        "right": leaning(cfg, 0),
        "partly": leaning(cfg, 0.1 if chained else 0.3),
        "random": leaning(cfg, 1),
        "wrong": opposed(leaning(cfg, 0)),
    }
    return {quality: (model, "mtp") for quality, model in made.items()}


@lru_cache
def plain(scheme, quality, cache_dtype):
    """The model's tokens without a draft."""
    model = trunk_of(drafting(scheme)[quality][0])
    return generate(model, PROMPTS, NEW, stop_tokens=[UNUSED], cache_dtype=cache_dtype).tokens


# Greedy: whatever the drafts, the tokens are those of plain decoding.

# scheme, draft length, prompts, cache, dtype: each scheme and length, each cache and dtype
CELLS = [
    ("deepseek of 3", 8, 8, "latent", None),
    ("model", 6, 8, "latent", "int8"),
    # test_drafters has the drafts of these
    pytest.param("deepseek of 1", 7, 1, "latent", "int8", marks=pytest.mark.rare),
    pytest.param("eagle", 5, 8, "expanded", "int8", marks=pytest.mark.rare),
    pytest.param("meta", 3, 8, "latent", None, marks=pytest.mark.rare),
    pytest.param("medusa", 4, 1, "latent", None, marks=pytest.mark.rare),
]


@pytest.mark.parametrize("scheme, length, batch, cache, dtype", CELLS)
def test_greedy_speculation_gives_the_tokens_of_plain_decoding(scheme, length, batch, cache, dtype):
    settings = dict(stop_tokens=[UNUSED], cache=cache, cache_dtype=dtype, draft_length=length)
    rows = slice(0, 8) if batch == 8 else slice(6, 7)
    for quality, (model, draft) in drafting(scheme).items():
        got = generate(model, PROMPTS[rows], NEW, draft=draft, **settings)
        assert got.tokens == plain(scheme, quality, dtype)[rows], quality
        assert len(got.acceptance) == length
        # a draft is accepted only if those before it are
        assert got.acceptance == sorted(got.acceptance, reverse=True)
        if quality == "right":
            assert got.acceptance == [1.0] * length
            assert got.steps == math.ceil((NEW - 1) / (length + 1))
            assert got.mean_accepted == length + 1
        elif quality == "wrong":
            assert got.acceptance == [0.0] * length or scheme == "medusa"
            assert got.steps == NEW - 1 or scheme == "medusa"
        elif batch == 8:
            # a model that repeats one token could not fail
            assert len({t for row in got.tokens for t in row}) > 5
            assert quality == "random" or 0 < got.acceptance[0] < 1


# Accepted runs, and how they end. One compiled shape: runs of up to 9 tokens.

SHAPE = ("deepseek of 3", 8)


def test_a_stop_token_within_a_run_ends_its_row_and_no_other():
    model, _ = drafting(SHAPE[0])["partly"]
    rows = plain(SHAPE[0], "partly", None)
    assert not any(UNUSED in row for row in rows)
    stops = {rows[0][4], rows[3][3], rows[6][8], rows[2][0]}
    for stop in stops:
        drafted = generate(
            model, PROMPTS, NEW, stop_tokens=[stop], draft="mtp", draft_length=SHAPE[1]
        )
        assert drafted.tokens == [until(row, stop) for row in rows]
    cut = [len(until(row, stop)) for stop in stops for row in rows]
    assert len(set(cut)) > 4 and NEW in cut  # at many places within a run, and not at all


# Sampled: the tokens follow the model's distribution.

TINY = small(num_layers=1, num_dense_layers=1, vocab_size=5)
DRAWS = 4096


# a head drafts with probabilities, as a model does, and look-up without
@pytest.mark.parametrize(
    "scheme", ["deepseek of 1", pytest.param("model", marks=pytest.mark.rare), "lookup"]
)
def test_sampled_speculation_follows_the_model(scheme):
    """Three new tokens of rows of one prompt: by prefill, then accepted and rejected drafts."""
    model = random_model(replace(TINY, **HEADS.get(scheme, {})), execution=DENSE)
    draft = {"model": random_model(TINY, seed=1), "lookup": "lookup"}.get(scheme, "mtp")
    how = dict(temperature=2.0, top_k=4, top_p=0.95)  # far from the bare logits
    got = generate(model, [[1, 4]] * DRAWS, 3, draft=draft, draft_length=2, seed=2, **how)
    shares = np.zeros((5, 5, 5))
    np.add.at(shares, tuple(np.array(got.tokens).T), 1 / DRAWS)
    law = three_tokens(model, [1, 4], how)
    assert law.max() < 0.6 and np.count_nonzero(law) > 20
    assert 0.1 < got.acceptance[0] < 0.95  # drafts are accepted and rejected
    assert within(shares, law, DRAWS)
    assert (shares[law == 0] == 0).all()


SAMPLED = dict(draft="mtp", draft_length=2, temperature=1.0, top_k=20, samples=2)


@pytest.mark.rare  # test_generate refills rows without drafts, and test_replay with them
@pytest.mark.parametrize("settings", [SAMPLED, dict(cache="none")], ids=["mtp", "none"])
def test_refilled_rows_give_the_text_of_a_whole_batch(settings):
    """A drafter's state begins anew with each text."""
    model, _ = drafting("deepseek of 1")["partly"]
    settings = dict(stop_tokens=[3, 5, 9]) | settings
    whole = generate(model, PROMPTS, NEW, **settings)
    assert len(set(map(len, whole.tokens))) > 3  # rows end at different steps
    assert generate(model, PROMPTS, NEW, batch_size=3, **settings).tokens == whole.tokens


def three_tokens(model, prompt, how):
    """The probabilities [W, W, W] of three tokens after a prompt, by the logits of every text."""
    texts = [[*prompt, a, b] for a in range(5) for b in range(5)]
    logits = forward(trunk_of(model), jnp.asarray(texts, jnp.int32)).logits
    laws = [[oracles.sampling_probs(row, **how) for row in text[-3:]] for text in logits]
    return np.array(
        [
            [laws[5 * a + b][0][a] * laws[5 * a + b][1][b] * laws[5 * a + b][2] for b in range(5)]
            for a in range(5)
        ]
    )


# Requests


@pytest.mark.rare  # a draft model is one of the cells above
def test_a_draft_model_may_be_of_another_kind_and_shorter():
    """Its positions end before those that the prompts are padded to."""
    model = random_model(small(num_layers=1, num_dense_layers=1))
    draft = random_model(
        small(num_layers=1, num_dense_layers=1, attention="mqa", max_positions=41), seed=1
    )
    prompt = tokens_of(LIGHT, 1, 35, seed=2)[0].tolist()
    want = generate(model, [prompt], 4).tokens
    assert generate(model, [prompt], 4, draft=draft, draft_length=2).tokens == want


def test_drafts_that_do_not_fit_are_refused():
    model, heads = abstract(LIGHT), abstract(replace(LIGHT, mtp_depth=1))
    medusa = abstract(replace(LIGHT, **HEADS["medusa"]))

    def check(model, draft, length):
        config = DecodeConfig(100, draft=draft, draft_length=length)
        config.check(model.cfg, [[1] * 5, [1] * 20])
        return config.num_drafts

    assert check(model, None, 0) == check(model, None, 7) == 0
    assert check(model, model, 8) == check(heads, "mtp", 8) == 8  # up to the last position
    other = abstract(replace(LIGHT, vocab_size=38))
    wrong = [
        (model, other, 1, "vocab_size=38 of the draft model is not the model's 37"),
        (model, "mtp", 1, "draft='mtp' needs multi-token heads, and the model's mtp_depth is 0"),
        (medusa, "mtp", 5, "draft_length=5 is more than mtp_depth=4"),
        (
            heads,
            "mtp",
            9,
            "max_new_tokens=100 with 9 drafts a step does not fit: "
            "prompt 1 has 20, the most, and max_",
        ),
    ]
    for target, draft, length, sentence in wrong:
        with pytest.raises(ValueError, match=f"^{sentence}"):
            check(target, draft, length)


@pytest.mark.parametrize("scheme", [pytest.param("model", marks=pytest.mark.rare), "deepseek"])
def test_speculation_copies_no_cache(whole_compiles, scheme):
    cfg = small(
        num_layers=1, num_dense_layers=1, **(dict(mtp_depth=2) if scheme == "deepseek" else {})
    )
    model, capacity = abstract(cfg), 1 << 15
    made, leaves, loop = decode_program(
        model, "mtp" if scheme == "deepseek" else model, 4, capacity=capacity
    )
    a_layer = 2 * capacity * (cfg.kv_latent_dim + cfg.rope_head_dim) * 4
    # a layer each: the model's, and its two heads' or the draft model's
    caches = 3 if scheme == "deepseek" else 2
    memory = made.decode.lower(leaves, loop, 16).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= caches * a_layer
    assert memory.temp_size_in_bytes < 1.5 * a_layer  # rows may be read out once
