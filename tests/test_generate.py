"""Cached decoding and scores against the teacher-forced forward, and what is refused."""

import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, LIGHT, decode_program, random_model, small, teacher_logits
from runs import on_mesh, unhooked

import dsv3_jax as ds
from dsv3_jax.config import Execution
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


def assert_teacher_forced(model, tokens):
    """The tokens after PROMPTS are the forward pass's best."""
    # a model that repeats one token could not fail
    assert len({token for row in tokens for token in row}) > 5
    for logits, row in zip(teacher_logits(model, PROMPTS, tokens), tokens, strict=True):
        assert logits.argmax(-1).tolist() == row


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, PROMPTS, NEW, stop_tokens=[UNUSED]).tokens


def test_cached_greedy_decoding_equals_the_teacher_forced_forward(model, greedy):
    """And each prompt alone gives the same."""
    assert [len(row) for row in greedy] == [NEW] * 3 and not any(UNUSED in row for row in greedy)
    assert_teacher_forced(model, greedy)
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
    assert_teacher_forced(model, generate(model, PROMPTS, NEW).tokens)


@pytest.mark.rare
def test_layers_are_read_by_xla_and_in_a_loop(model, greedy, monkeypatch):
    """A loop over layers has stacked caches."""
    by_xla = nnx.merge(nnx.graphdef(abstract(CFG, Execution(kernels="xla"))), nnx.state(model))
    assert "cpu" not in by_xla.kernels.chosen().values()
    assert generate(by_xla, PROMPTS, NEW, stop_tokens=[UNUSED]).tokens == greedy
    monkeypatch.setattr(decode, "UNROLLED", 0)
    looped = nnx.merge(nnx.graphdef(abstract(replace(CFG, init_std=0.2))), nnx.state(model))
    parts = jax.eval_shape(lambda: decode.make_cache(looped, 1, 8, "latent", jnp.float32)).parts
    assert decode.prepare_decode(looped) is None and len(parts) == 1
    assert generate(looped, PROMPTS, NEW, stop_tokens=[UNUSED]).tokens == greedy


@pytest.mark.long
def test_decoding_drops_no_token(light):
    """With half of its even share of slots an expert drops tokens that depend on the batch."""
    graphdef = nnx.graphdef(abstract(replace(LIGHT, capacity_factor=0.5), DENSE))
    dropping = nnx.merge(graphdef, nnx.state(light))
    got = generate(dropping, PROMPTS[:2], NEW).tokens
    both = [teacher_logits(model, PROMPTS, got) for model in (light, dropping)]
    kept, dropped = ([x.argmax(-1).tolist() for x in logits] for logits in both)
    assert got == kept != dropped  # as a model without capacity


def test_parts_give_the_tokens_of_generate(model, greedy):
    for cache, part in ((None, 1), (None, 100), ("none", 3)):
        config = DecodeConfig(NEW, stop_tokens=(UNUSED,), cache=cache)
        *_, last = parts = list(generate_in_parts(model, PROMPTS[1:2], config, part=part))
        assert [len(got.tokens[0]) for got in parts] == [*range(1, NEW, part), NEW]
        assert last.tokens == greedy[1:2]


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


DRAWN = dict(temperature=1.5, top_k=30, top_p=0.95)


@pytest.mark.long
def test_the_seed_fixes_the_draws(light):
    """Each by seed, prompt and place in the text: parts and certain drafts do not change them."""
    one, three = (generate(light, [[5], [8, 1]], NEW, seed=seed, **DRAWN).tokens for seed in (0, 1))
    assert one != three and one[0] != one[1]
    assert generate(light, [[5], [8, 1]], NEW, cache="none", **DRAWN).tokens == one
    drafted = generate(light, [[5], [8, 1]], NEW, draft="lookup", draft_length=3, **DRAWN)
    assert drafted.tokens == one
    *_, last = generate_in_parts(light, [[5], [8, 1]], DecodeConfig(NEW, Sampling(**DRAWN)), part=3)
    assert last.tokens == one


@pytest.mark.long
def test_a_text_depends_on_seed_prompt_and_sample_alone(light, monkeypatch):
    """Not on the batch, prompts' order or earlier rows; a prompt is read once for all samples."""
    read = []

    def noting(new, *shape):
        read.extend(new)
        return _pad(new, *shape)

    monkeypatch.setattr("dsv3_jax.decoding.batch._pad", noting)
    how = dict(samples=3, stop_tokens=[4, 9], logprobs=True, return_routing=True, **DRAWN)
    # equal prompts keep their order: the second has samples 3 to 5
    prompts, order = [*PROMPTS, [5]], [2, 0, 1, 3]
    whole = generate(light, prompts, 24, **how)
    queued = generate(light, [prompts[i] for i in order], 24, batch_size=4, **how)
    rows = [3 * i + sample for i in order for sample in range(3)]
    assert queued.tokens == [whole.tokens[row] for row in rows]
    assert len(set(map(tuple, whole.tokens))) > 8 and len(set(map(len, whole.tokens))) > 3
    assert sorted(read) == sorted(2 * [tuple(prompt) for prompt in PROMPTS])
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
    cfg = small(
        num_layers=4, num_dense_layers=1, dim=32, num_experts=64, expert_dim=64,
        num_groups=1, groups_per_token=1, max_positions=4096,
    )  # fmt: skip
    made, leaves, loop = decode_program(model := abstract(cfg))
    cache_bytes = sum(x.size * 4 for x in jax.tree.leaves(loop.cache))
    memory = made.decode.lower(leaves, loop, 16).compile().memory_analysis()
    experts = jax.tree.leaves(nnx.state(model.sparse.moe.experts))
    one_layers_experts = sum(4 * w.size // w.shape[0] for w in experts)
    assert memory.temp_size_in_bytes < one_layers_experts
    # it is updated and read in place
    assert memory.temp_size_in_bytes < 1.1 * cache_bytes / cfg.num_layers
    assert memory.alias_size_in_bytes >= cache_bytes


# scores of continuations are the teacher-forced pass's, whatever else is in the batch


@pytest.mark.long
def test_pairs_of_any_lengths_are_the_teacher_forced_pass():
    """Batches by length keep the pairs' order; nothing is dropped: a score is of its pair."""
    rng, model = np.random.default_rng(0), random_model(LIGHT)
    tight = random_model(ds.replace(LIGHT, capacity_factor=0.5))
    pairs = [
        (rng.integers(37, size=n).tolist(), rng.integers(37, size=m).tolist())
        for n, m in ((40, 3), (1, 1), (9, 30))
    ]
    greedy = ds.generate(model, [pairs[0][0]], 4).tokens[0]
    pairs.append((pairs[0][0], greedy))
    scores = ds.loglikelihood(tight, pairs, batch_size=3)
    contexts, continued = zip(*pairs, strict=True)
    for i, logits in enumerate(teacher_logits(model, contexts, continued)):
        logits, more, (score, is_greedy) = np.float64(logits), continued[i], scores[i]
        logp = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[range(len(more)), more]
        np.testing.assert_allclose(score, logp.sum(), rtol=1e-5)
        assert is_greedy == (logits.argmax(-1) == more).all() == (i == 3)


@pytest.mark.long
def test_a_mesh_gives_the_same_scores():
    model = random_model(replace(LIGHT, capacity_factor=0.5))
    pairs = [([1, 2, 3], [4, 5]), ([6], [7])]
    placed = on_mesh(model, sharding.make_mesh(2, 2))
    want, got = ds.loglikelihood(model, pairs), ds.loglikelihood(placed, pairs)
    np.testing.assert_allclose([s for s, _ in got], [s for s, _ in want], rtol=1e-5)


# requests: what is refused, wrong types too; without the import hook, which would refuse them first

hooked = sys.modules["dsv3_jax.decoding.decode_config"]
# for the next line alone
unhooked("dsv3_jax.decoding.decode_config", "dsv3_jax.decoding.decode_config")
plain = unhooked("dsv3_jax.decoding.generate")
sys.modules["dsv3_jax.decoding.decode_config"] = hooked

REFUSED = {  # setting: (values, sentence)
    "max_new_tokens": ([0, True], "is not an int of 1 or above"),
    "batch_size": ([0, 2.5], "is not an int of 1 or above"),
    "draft_length": ([2.0, -1, "most"], "is not an int of 0 or above"),
    "draft": (["medusa"], "is not None, 'mtp', 'lookup' or a Transformer"),
    "temperature": ([-0.5, float("nan"), None, True], "is not a float of 0 or above"),
    "top_p": ([0.0, 1.5, "all"], "is not a float within (0, 1]"),
    "cache": (["paged", 3], "is not one of latent, expanded, none"),
    "cache_dtype": (["int4", np.float64], "is not one of float32, bfloat16, int8, float8_e4m3"),
    "stop_tokens": ([None, "ab"], "is not a list of token ids"),
}
NO_ID = "which is no id of a vocabulary of 37"
REQUESTS = [
    ("Hello", "prompts='Hello' is not a list of prompts"),
    ([1, 2, 3], "prompt 0=1 is not a list of token ids; encode text with a tokenizer first"),
    ([[1], []], "prompt 1 is empty; give at least one token"),
    ([[True]], f"prompt 0 holds token True, {NO_ID}"),
    (np.array([[1], [37]]), f"prompt 1 holds token np.int64(37), {NO_ID}"),
    ([[1], [2] * 28], "max_new_tokens=101 does not fit: prompt 1 has 28, the most, and max_p"),
]
TOGETHER = [
    (dict(draft="mtp", cache="none"), "cache='none' decodes without drafts"),
    (dict(samples=8), "samples=8 would be equal texts at temperature 0"),
    (dict(sampling=(0.5, None, None)), "sampling=(0.5, None, None) is not a Sampling"),
]


def test_requests_are_refused(light):
    asked = partial(plain.generate, light, [[1]])
    wrong = [(partial(plain.generate, light, prompts, 101), said) for prompts, said in REQUESTS]
    wrong += [(partial(plain.DecodeConfig, 3, **two), said) for two, said in TOGETHER]
    wrong += [(partial(asked, 3, stop_tokens=[1, 37]), "stop_tokens holds token 37, which is no")]
    for name, (values, said) in REFUSED.items():
        wrong += [
            (partial(asked, **{"max_new_tokens": 3, name: value}), f"{name}={value!r} {said}")
            for value in values
        ]
    for request, sentence in wrong:
        with pytest.raises(ValueError) as caught:
            request()
        assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)
    # arrays, and requests up to the last position, are taken
    sampling = Sampling(1.0, top_k=1, top_p=1.0)
    config = plain.DecodeConfig(100, sampling, stop_tokens=np.array([UNUSED]))
    config.check(CFG, [np.array([1, 2]), (3,), range(4), [1] * 28])
    assert config.stop_tokens == (UNUSED,)


def test_bad_pairs_are_refused():
    for pairs, said in (
        ([([1], [])], "the continuation of pair 0 is empty"),
        ([([1], [2]), ([], [2])], "the context of pair 1 is empty"),
        ([([1], [37])], "the continuation of pair 0 holds token 37, which is no id of a voc"),
        ([([1] * 128, [2])], "pair 0 has 129 tokens, over max_positions=128"),
    ):
        with pytest.raises(ValueError, match=said):
            ds.loglikelihood(abstract(small()), pairs)
