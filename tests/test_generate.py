"""Cached decoding against the teacher-forced forward, and what a request may not ask."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import LIGHT, forward, random_model, small

from dsv3_jax.decoding.drafters import Fresh
from dsv3_jax.decoding.generate import Loop, _decode, _prefill, _Static, check_request, generate, stream
from dsv3_jax.kernels.cpu import calls
from dsv3_jax.model import transformer
from dsv3_jax.model.cache import bytes_per_token, elements_per_token, empty_cache
from dsv3_jax.ops import products
from dsv3_jax.ops.sampling import GREEDY, Sampling

pytestmark = pytest.mark.usefixtures("light_compiles")

CFG = small()  # one dense layer and two sparse ones
NEW = 10
PROMPTS = [[5], [8, 1, 30, 2, 2], [3 * i % 37 for i in range(40)]]  # lengths 1, 5 and 40: over one step of 32
UNSAID = 36  # a stop token that nothing below produces, so that requests with and without a stop share a compilation


@pytest.fixture(scope="module")
def model():
    return random_model(CFG)


@pytest.fixture(scope="module")
def light():
    return random_model(LIGHT)


def teacher_logits(model, prompts, new):
    """Logits [len(new), W] of each row at the places that chose its new tokens: the whole row in one forward pass."""
    rows = np.zeros((3, 64), np.int32)
    for row, prompt, more in zip(rows, prompts, new, strict=False):
        row[: len(prompt) + len(more)] = [*prompt, *more]
    logits = forward(model, jnp.asarray(rows)).logits
    return [logits[b, len(p) - 1 : len(p) - 1 + len(n)] for b, (p, n) in enumerate(zip(prompts, new, strict=True))]


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, PROMPTS, NEW, stop_tokens=[UNSAID]).tokens


def test_cached_greedy_decoding_equals_the_teacher_forced_forward(model, greedy):
    assert not any(UNSAID in row for row in greedy)
    assert [len(row) for row in greedy] == [NEW] * 3
    assert len({*greedy[0], *greedy[1], *greedy[2]}) > 5  # a model that says one thing could not fail
    for logits, row in zip(teacher_logits(model, PROMPTS, greedy), greedy, strict=True):
        assert logits.argmax(-1).tolist() == row


def test_each_prompt_alone_says_the_same(model, greedy):
    for prompt, row in zip(PROMPTS[:2], greedy, strict=False):
        assert generate(model, [prompt], NEW, stop_tokens=[UNSAID]).tokens == [row]


@pytest.mark.parametrize("how", ["native", "side by side", "visited one by one"])
def test_experts_are_read_in_any_way(model, greedy, monkeypatch, how):
    """By the native kernel, as one wide product, or in a loop over those that were chosen; other weights likewise."""
    if how == "native":
        if why := calls.why_not():
            pytest.skip(why)
        monkeypatch.setattr(products, "LARGE", 0)
    else:
        monkeypatch.setattr(calls, "why_not", lambda: "the test says so")
    if how == "visited one by one":
        monkeypatch.setattr(transformer, "SMALL_EXPERTS", 0)
    graphdef = nnx.graphdef(
        random_model(replace(CFG, init_std=0.1 + len(how) / 100))
    )  # of its own, to be compiled anew
    other = nnx.merge(graphdef, nnx.state(model))
    ready = other.ready()
    assert (ready is None) == (how == "visited one by one")
    if ready is not None:
        assert all((experts is None) == (how == "native") for experts in ready.experts)
    assert generate(other, PROMPTS, NEW, stop_tokens=[UNSAID]).tokens == greedy


def test_stream_gives_the_tokens_of_generate(model, greedy):
    for chunk in (1, 3, 100):
        got = stream(model, PROMPTS[1], NEW, stop_tokens=[UNSAID], part=chunk)
        assert next(got) == greedy[1][0]
        assert list(got) == greedy[1][1:]
    stop = greedy[1][4]
    assert list(stream(model, PROMPTS[1], NEW, stop_tokens=[stop], part=3)) == until(greedy[1], stop)


def until(row, stop):
    return row[: row.index(stop) + 1] if stop in row else row


def test_a_stop_token_ends_its_row_and_no_other(model, greedy):
    shared = [t for t in greedy[0] if sum(t in row for row in greedy) < 3][0]
    for stop in (greedy[1][3], greedy[2][0], shared):
        got = generate(model, PROMPTS, NEW, stop_tokens=[stop])
        assert got.tokens == [until(row, stop) for row in greedy]
        assert (
            got.steps == max(map(len, got.tokens)) - 1
        )  # the first token is prefill's; the loop ends with the last row
    assert any(len(until(row, shared)) == NEW for row in greedy)


def test_one_compilation_a_shape(model, greedy):
    """Other prompts of nearby lengths, seeds, stop tokens and chunks compile nothing."""
    generate(model, [PROMPTS[1]], NEW, stop_tokens=[UNSAID])
    before = _prefill._cache_size(), _decode._cache_size()
    generate(model, [[7] * 22], NEW, stop_tokens=[1], seed=4)
    generate(random_model(CFG, seed=3), [[9]], NEW, stop_tokens=[2])
    list(stream(model, [1, 2, 3], NEW, stop_tokens=[UNSAID], part=4))
    generate(model, [[1], [2], [7] * 50], NEW, stop_tokens=[3])
    assert (_prefill._cache_size(), _decode._cache_size()) == before


# dtypes


@pytest.mark.parametrize("changes, cache_dtype", [({}, "bfloat16"), (dict(compute_dtype="bfloat16"), None)])
def test_bfloat16_chooses_tokens_about_as_likely(light, changes, cache_dtype):
    got = generate(random_model(replace(LIGHT, **changes)), PROMPTS, NEW, cache_dtype=cache_dtype).tokens
    # How much less likely than the float32 model's best. 8 bits of mantissa lose a few percent of a logit's spread;
    # a flipped expert can cost one token more, so the middle is held.
    lost = [
        (logits.max(-1) - logits[np.arange(NEW), row]) / logits.std(-1)
        for logits, row in zip(teacher_logits(light, PROMPTS, got), got, strict=True)
    ]
    assert np.median(lost) < 0.05
    assert np.mean(np.concatenate(lost) == 0) > 0.6


def test_the_cache_holds_rows_of_its_dtype():
    for dtype, scales in ((jnp.float32, None), (jnp.bfloat16, None), (jnp.int8, (3, 2, 1, 32, 2))):
        cache = empty_cache(CFG, 3, 2, 32, "latent", dtype)
        assert cache.stored.rows.dtype == dtype
        assert cache.stored.rows.shape == (3, 2, 1, 32, 10 + 4) and cache.capacity == 32
        assert (cache.stored.scales is None) if scales is None else (cache.stored.scales.shape == scales)
        assert cache.lengths.tolist() == [0, 0]
        assert cache.nbytes == 2 * 32 * bytes_per_token(CFG, "latent", dtype)
    assert empty_cache(CFG, 3, 2, 32, "expanded", jnp.float32).stored.rows.shape == (3, 2, 3, 32, 10 + 5)
    assert elements_per_token(CFG) == {"latent": 3 * (10 + 4), "expanded": 3 * 3 * 15, "mha": 3 * 3 * (6 + 4 + 5)}
    v3 = elements_per_token(replace(CFG, **V3_HEADS))
    assert (v3["latent"], v3["mha"]) == (576, 40960)  # a layer's, as published
    gqa = replace(CFG, num_heads=6, attention="gqa", num_kv_heads=2)
    assert elements_per_token(gqa) == {"expanded": 3 * 2 * 15, "mha": 3 * 6 * 15}


V3_HEADS = dict(
    num_layers=1, num_dense_layers=0, num_heads=128, kv_latent_dim=512, nope_head_dim=128, rope_head_dim=64,
    v_head_dim=128,
)  # fmt: skip


# sampling


def test_top_k_1_is_greedy(light):
    got = generate(light, [[5]], NEW, temperature=0.7, top_k=1, seed=5).tokens
    assert teacher_logits(light, [[5]], got)[0].argmax(-1).tolist() == got[0]


DRAWN = dict(temperature=1.5, top_k=30, top_p=0.95)


def test_the_seed_decides_what_is_drawn(light):
    one, two, three = (generate(light, [[5]], NEW, seed=seed, **DRAWN).tokens for seed in (0, 0, 1))
    assert one == two != three
    assert list(stream(light, [5], NEW, sampling=Sampling(**DRAWN), seed=0, part=3)) == one[0]


def test_draws_stay_in_the_nucleus(light):
    rows = [generate(light, [[5]], NEW, seed=seed, **DRAWN).tokens[0] for seed in range(24)]
    logits = teacher_logits(light, [[5]] * 3, rows[:3])[0][0] / 1.5  # of the first new token
    order = np.argsort(-logits)[:30]
    probs = np.exp(logits[order]) / np.exp(logits[order]).sum()
    nucleus = order[: int((np.cumsum(probs) < 0.95).sum()) + 1]
    drawn = {row[0] for row in rows}
    assert drawn <= set(nucleus.tolist())
    assert len(drawn) > 3


# memory


def test_decoding_copies_neither_experts_nor_cache(whole_compiles):
    cfg = small(
        num_layers=4, num_dense_layers=1, dim=32, num_experts=64, expert_dim=64, num_groups=1, groups_per_token=1,
        max_positions=4096,
    )  # fmt: skip
    model, batch = random_model(cfg), 2
    cache = empty_cache(cfg, 4, batch, 4096, "latent", jnp.float32)
    none, zero = jnp.zeros(batch, jnp.int32), jnp.zeros((), jnp.int32)
    fresh = Fresh(jnp.zeros((batch, 1, cfg.dim)), none[:, None], none + 1, none, none)
    loop = Loop(
        cache, None, fresh, none > 0, jax.random.key(0), jnp.zeros((batch, 16), jnp.int32), none, zero, none[:0], zero
    )
    stops, until = jnp.zeros(1, jnp.int32), jnp.asarray(16, jnp.int32)
    lowered = _decode.lower(*nnx.split(model), None, (None, None), loop, stops, until, static=_Static(GREEDY, 0, None))
    memory = lowered.compile().memory_analysis()
    one_layers_experts = sum(w[0].nbytes for w in model.experts.arrays())
    assert memory.temp_size_in_bytes < one_layers_experts
    # A layer's rows may be read out once (and its scores formed); the whole cache is updated where it lies.
    assert memory.temp_size_in_bytes < cache.nbytes
    assert memory.alias_size_in_bytes >= cache.nbytes


# requests


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(prompts=[]), "prompts is empty: give at least one"),
        (dict(prompts=[[1], []]), "prompt 1 is empty: give at least one token"),
        (dict(prompts=[[1], [2, 37]]), "prompt 1 holds token 37, outside the vocabulary of 37"),
        (dict(prompts=[[-1]]), "prompt 0 holds token -1, outside the vocabulary of 37"),
        (dict(max_new_tokens=0), "max_new_tokens=0 is below 1"),
        (
            dict(prompts=[[1], [2] * 28], max_new_tokens=101),
            "prompt 1 of 28 tokens and 101 new ones do not fit in the cache: the model's max_positions is 128",
        ),
        (dict(stop_tokens=[1, 37]), "stop token 37 is outside the vocabulary of 37"),
        (dict(stop_tokens=[-2]), "stop token -2 is outside the vocabulary of 37"),
        (dict(sampling=Sampling(temperature=-0.5)), "temperature=-0.5 is not 0 or above"),
        (dict(sampling=Sampling(temperature=float("nan"))), "temperature=nan is not 0 or above"),
        (dict(sampling=Sampling(1.0, top_k=0)), "top_k=0 is below 1"),
        (dict(sampling=Sampling(1.0, top_p=0.0)), "top_p=0.0 is outside (0, 1]"),
        (dict(sampling=Sampling(1.0, top_p=1.5)), "top_p=1.5 is outside (0, 1]"),
    ],
)
def test_requests_that_cannot_be_met(changes, sentence):
    usual = dict(prompts=[[1, 36]], max_new_tokens=100, sampling=Sampling(), stop_tokens=[0, 36])
    check_request(CFG, **usual)
    with pytest.raises(ValueError) as caught:
        check_request(CFG, **{**usual, **changes})
    assert str(caught.value) == sentence


def test_generate_and_stream_check_first(light):
    with pytest.raises(ValueError, match="^prompts is empty"):
        generate(light, [], 3)
    with pytest.raises(ValueError, match="^top_k=0 is below 1$"):
        generate(light, [[1]], 3, temperature=1.0, top_k=0)
    with pytest.raises(ValueError, match="^prompt 0 is empty"):
        next(stream(light, [], 3))


def test_a_request_may_fill_the_model_to_its_last_position():
    check_request(CFG, [[1] * 28], 100, Sampling(1.0, top_k=1, top_p=1.0))


@pytest.mark.parametrize("dtype", ["int4", "nonsense", np.float64])
def test_a_cache_of_another_dtype_is_refused(model, dtype):
    with pytest.raises(ValueError, match=r"cache_dtype=.* is not one of float32, bfloat16, int8, float8_e4m3$"):
        generate(model, [[1]], 1, cache_dtype=dtype)
