"""Cached decoding and scores against the teacher-forced forward, and what is refused."""

import re
from dataclasses import replace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from models import DENSE, LIGHT, assert_best, decode_program, random_model, small, teacher_logits
from runs import on_mesh, refused

import dsv3_jax as ds
from dsv3_jax.decoding.batch import _pad
from dsv3_jax.decoding.decode_config import DecodeConfig
from dsv3_jax.decoding.generate import generate, generate_in_parts
from dsv3_jax.mesh import sharding
from dsv3_jax.model import decode, transformer
from dsv3_jax.model.counting import bytes_per_token
from dsv3_jax.model.transformer import abstract
from dsv3_jax.ops.sampling import Sampling

CFG = small()  # one dense layer and two sparse ones
NEW = 10
# lengths 1, 5 and 40: over one step of 32
PROMPTS = [[5], [8, 1, 30, 2, 2], [3 * i % 37 for i in range(40)]]
# a stop token that no model below generates: with one, all requests share a compilation
UNUSED = 36


@pytest.fixture(scope="module")
def model():
    return random_model(CFG, seed=2)


@pytest.fixture(scope="module")
def light():
    return random_model(LIGHT, execution=DENSE)


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, PROMPTS, NEW, stop_tokens=[UNUSED]).tokens


def test_cached_greedy_decoding_equals_the_teacher_forced_forward(model, greedy):
    assert [len(row) for row in greedy] == [NEW] * 3 and not any(UNUSED in row for row in greedy)
    assert_best(model, PROMPTS, greedy)
    for prompt, row in zip(PROMPTS[:2], greedy, strict=False):
        assert generate(model, [prompt], NEW, stop_tokens=[UNUSED]).tokens == [row]


@pytest.mark.long
def test_every_cache_gives_the_same_tokens(model, greedy):
    for kind in ("expanded", "none"):
        got = generate(model, PROMPTS, NEW, stop_tokens=[UNUSED], cache=kind)
        assert got.tokens == greedy, kind
        a_token = 0 if kind == "none" else bytes_per_token(CFG, kind, jnp.float32)
        assert (got.cache_bytes_per_token, got.cache_bytes) == (a_token, 3 * 64 * a_token)
        assert got.steps == NEW - 1


def test_a_baseline_decodes_the_tokens_of_its_forward():
    cfg = replace(LIGHT, num_heads=4, attention="gqa", qk_norm=True, num_kv_heads=2)
    model = random_model(cfg, execution=DENSE)
    assert_best(model, PROMPTS, generate(model, PROMPTS, NEW).tokens)


@pytest.mark.rare
def test_layers_may_be_read_in_a_loop(model, greedy, monkeypatch):
    """A model of more layers than UNROLLED has stacked caches."""
    monkeypatch.setattr(decode, "UNROLLED", 0)
    looped = nnx.merge(nnx.graphdef(abstract(replace(CFG, init_std=0.2))), nnx.state(model))
    assert decode.prepare_decode(looped) is None
    assert generate(looped, PROMPTS, NEW, stop_tokens=[UNUSED]).tokens == greedy


@pytest.fixture(scope="module")
def dropping(light):
    """With half of its even share of slots an expert drops tokens that depend on the batch."""
    graphdef = nnx.graphdef(abstract(replace(LIGHT, capacity_factor=0.5), DENSE))
    return nnx.merge(graphdef, nnx.state(light))


@pytest.mark.long
def test_decoding_drops_no_token(light, dropping):
    got = generate(dropping, PROMPTS[:2], NEW).tokens
    assert_best(light, PROMPTS, got)  # as a model without capacity
    assert got != [x.argmax(-1).tolist() for x in teacher_logits(dropping, PROMPTS, got)]


def test_parts_give_the_tokens_of_generate(model, greedy):
    for cache, part in ((None, 1), (None, 100), ("none", 3)):
        config = DecodeConfig(NEW, stop_tokens=(UNUSED,), cache=cache)
        *_, last = parts = list(generate_in_parts(model, PROMPTS, config, part=part))
        assert [len(got.tokens[0]) for got in parts] == [*range(1, NEW, part), NEW]
        assert last.tokens == greedy


def until(row, stop):
    return row[: row.index(stop) + 1] if stop in row else row


def test_a_stop_token_ends_its_row_and_no_other(model, greedy):
    shared = next(t for t in greedy[0] if sum(t in row for row in greedy) < 3)
    for stop in (greedy[1][3], greedy[2][0], shared):
        got = generate(model, PROMPTS, NEW, stop_tokens=[stop])
        assert got.tokens == [until(row, stop) for row in greedy]
        assert got.steps == max(map(len, got.tokens)) - 1  # the first token is prefill's
    assert any(len(until(row, shared)) == NEW for row in greedy)


def test_one_compilation_a_shape(model, greedy, monkeypatch):
    """Other prompts, seeds, stop tokens and chunks compile nothing: all would need the logits."""
    generate(model, [PROMPTS[1]], NEW, stop_tokens=[UNUSED])
    monkeypatch.setattr(transformer.Transformer, "logits", None)
    generate(model, [[7] * 22], NEW, stop_tokens=[1], seed=4)
    generate(random_model(CFG, seed=3), [[9]], NEW, stop_tokens=[2])
    list(generate_in_parts(model, [[1, 2, 3]], DecodeConfig(NEW, stop_tokens=(UNUSED,)), part=4))
    generate(model, [[1], [2], [7] * 50], NEW, stop_tokens=[3])


SIZES = (20, 1, 9, 5), (3, 1, 20, 1)  # of contexts, and of what follows
DRAWN = dict(temperature=1.5, top_k=30, top_p=0.95)


@pytest.mark.long
def test_a_text_depends_on_seed_prompt_and_sample_alone(light, monkeypatch):
    reads = Mock(wraps=_pad)
    monkeypatch.setattr("dsv3_jax.decoding.batch._pad", reads)
    how = dict(samples=3, stop_tokens=[4, 9], logprobs=True, return_routing=True, **DRAWN)
    # equal prompts keep their order: the second has samples 3 to 5
    prompts, order = [*PROMPTS, [5]], [2, 0, 1, 3]
    whole = generate(light, prompts, 24, **how)
    queued = generate(light, [prompts[i] for i in order], 24, batch_size=4, **how)
    rows = [3 * i + sample for i in order for sample in range(3)]
    assert queued.tokens == [whole.tokens[row] for row in rows]
    assert len(set(map(tuple, whole.tokens))) > 8 and len(set(map(len, whole.tokens))) > 3
    read = [prompt for call in reads.call_args_list for prompt in call.args[0]]
    assert sorted(read) == sorted(2 * [tuple(prompt) for prompt in PROMPTS])
    assert generate(light, prompts, 24, seed=1, **how).tokens != whole.tokens
    assert sorted(queued.ended) == [*range(12)] and queued.steps > whole.steps
    for name in ("logprobs", "model_logprobs", "expert_ids"):
        for got, row in zip(getattr(queued, name), rows, strict=True):
            np.testing.assert_allclose(got, getattr(whole, name)[row], rtol=0, atol=1e-5)
    # as asked above, so it compiles nothing
    asked = dict(samples=3, batch_size=4, stop_tokens=(4, 9), logprobs=True, return_routing=True)
    config, skip = DecodeConfig(24, Sampling(**DRAWN), **asked), {0, 1, 2, 5, 7}
    *_, rest = generate_in_parts(light, prompts, config, skip=skip)
    assert rest.tokens == [[] if i in skip else row for i, row in enumerate(whole.tokens)]


def test_decoding_copies_neither_experts_nor_cache(whole_compiles):
    many = dict(num_experts=64, expert_dim=64, num_groups=1, groups_per_token=1)
    cfg = small(num_layers=4, dim=32, max_positions=4096, **many)
    made, leaves, loop = decode_program(model := abstract(cfg))
    memory = made.decode.lower(leaves, loop, 16).compile().memory_analysis()
    cache_bytes = sum(x.size * 4 for x in jax.tree.leaves(loop.cache))
    experts = jax.tree.leaves(nnx.state(model.sparse.moe.experts))
    assert memory.temp_size_in_bytes < sum(4 * w.size // w.shape[0] for w in experts)  # a layer's
    # the cache is updated and read in place
    assert memory.temp_size_in_bytes < 1.1 * cache_bytes / cfg.num_layers
    assert memory.alias_size_in_bytes >= cache_bytes


@pytest.mark.long
def test_scores_of_pairs_are_the_teacher_forced_pass_also_on_a_mesh(light, dropping):
    rng = np.random.default_rng(0)
    contexts, texts = ([rng.integers(37, size=n).tolist() for n in of] for of in SIZES)
    texts[3] = [teacher_logits(light, contexts, texts)[3][0].argmax().item()]
    pairs = [*zip(contexts, texts, strict=True)]
    scores = ds.loglikelihood(dropping, pairs, batch_size=2)
    for i, logits in enumerate(teacher_logits(light, contexts, texts)):
        places = range(len(texts[i])), texts[i]
        logp = np.log([oracles.softmax_probs(row) for row in np.float64(logits)])
        np.testing.assert_allclose(scores[i][0], logp[places].sum(), rtol=1e-5)
        assert scores[i][1] == (logits.argmax(-1) == texts[i]).all() == (i == 3)
    there = ds.loglikelihood(on_mesh(dropping, sharding.make_mesh(2, 2)), pairs, batch_size=2)
    np.testing.assert_allclose(there, scores, rtol=1e-5)


# requests: what is refused, wrong types too

REFUSED = [  # what is asked for beside one prompt and three tokens, how the sentence begins
    (dict(prompts="Hello"), "prompts='Hello' is not a list of prompts"),
    (dict(prompts=[1, 2, 3]), "prompt 0=1 is not a list of token ids"),
    (dict(prompts=[[1], []]), "prompt 1 is empty"),
    (dict(prompts=[[True]]), "prompt 0 holds token True"),
    (dict(prompts=np.array([[1], [37]])), "prompt 1 holds token np.int64(37)"),
    (dict(stop_tokens=[1, 37]), "stop_tokens holds token 37"),
    (dict(stop_tokens="ab"), "stop_tokens='ab' is not a list"),
    (dict(prompts=[[1], [2] * 28], max_new_tokens=101), "max_new_tokens=101 does not fit"),
    (dict(max_new_tokens=True), "max_new_tokens=True is not an int"),
    (dict(batch_size=2.5), "batch_size=2.5 is not an int"),
    (dict(draft_length="most"), "draft_length='most' is not an int"),
    (dict(draft="medusa"), "draft='medusa' is not None, 'mtp', 'lookup'"),
    (dict(draft="mtp", cache="none"), "cache='none' decodes without drafts"),
    (dict(temperature=float("nan")), "temperature=nan is not 0, or a float"),
    (dict(top_p=1.5), "top_p=1.5 is not a float within [1e-30, 1]"),
    (dict(temperature=1e-40), "temperature=1e-40 is not 0, or a float of 1e-30 or above"),
    (dict(samples=8), "samples=8 would be equal texts"),
    (dict(seed=-1), "seed=-1 is not an int within"),
    (dict(cache="paged"), "cache='paged' is not one of latent"),
    (dict(cache_dtype=np.float64), "cache_dtype=<class 'numpy.float64'> is not one of float32"),
]


@pytest.mark.parametrize("asked, sentence", REFUSED)
def test_a_request_is_refused(light, asked, sentence):
    with refused(f"^{re.escape(sentence)}.*$"):
        generate(light, **{"prompts": [[1]], "max_new_tokens": 3} | asked)


@pytest.mark.parametrize("factor", [np.nan, np.inf])
@pytest.mark.parametrize("how", [{}, {"temperature": 1.0}, {"draft": "lookup"}], ids=str)
def test_logits_that_are_not_finite_are_refused(light, factor, how):
    """The largest of NaN is the first: the text would be token 0 again and again."""
    broken = nnx.merge(*nnx.split(light), copy=True)
    broken.head[...] *= factor
    with refused("prompt [01]: the model's logits are NaN or infinite"):
        generate(broken, [[1], [2]], 3, **how)
    with refused("pair [01]: the model's logits are NaN or infinite"):
        ds.loglikelihood(broken, [([1], [2]), ([3], [4])])


def test_arrays_and_requests_up_to_the_last_position_are_taken():
    config = DecodeConfig(100, stop_tokens=np.array([UNUSED]))
    config.check(CFG, [np.array([1, 2]), (3,), range(4), [1] * 28])
    replace(config, stop_tokens=jnp.array([UNUSED])).check(CFG, jnp.array([[1, 2], [3, 4]]))
    assert config.stop_tokens == (UNUSED,)


@pytest.mark.parametrize(
    "pair, sentence",
    [
        (([1], []), "the continuation of pair 0 is empty"),
        (([1], [37]), "the continuation of pair 0 holds token 37"),
        (([1] * 128, [2]), "pair 0 has 129 tokens, over max_positions=128"),
    ],
)
def test_a_bad_pair_is_refused(pair, sentence):
    with refused(sentence):
        ds.loglikelihood(abstract(CFG), [pair])
