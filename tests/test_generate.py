"""Cached decoding against the teacher-forced forward, and which requests are refused."""

import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, LIGHT, decode_program, forward, random_model, small
from runs import unhooked

from dsv3_jax.config import Execution
from dsv3_jax.decoding.batch import _pad
from dsv3_jax.decoding.decode_config import DecodeConfig
from dsv3_jax.decoding.generate import generate, generate_in_parts
from dsv3_jax.kernels import table
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


def teacher_logits(model, prompts, new):
    """Logits [len(new), W] of each row where its new tokens were chosen, from one forward pass."""
    rows = np.zeros((3, 64), np.int32)
    for row, prompt, more in zip(rows, prompts, new, strict=False):
        row[: len(prompt) + len(more)] = [*prompt, *more]
    logits = forward(model, jnp.asarray(rows)).logits
    return [
        logits[b, len(p) - 1 : len(p) - 1 + len(n)]
        for b, (p, n) in enumerate(zip(prompts, new, strict=True))
    ]


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
@pytest.mark.parametrize("how", ["xla", "LARGE_WEIGHT", "UNROLLED"])
def test_layers_and_weights_are_read_in_any_way(model, greedy, monkeypatch, how):
    """By XLA; all weights by C++, for one row too; and a scan over layers, with stacked caches."""
    if how != "xla":
        monkeypatch.setattr(table if how == "LARGE_WEIGHT" else decode, how, 0)
    # a separate graph
    cfg = replace(CFG, init_std={"xla": 0.3, "LARGE_WEIGHT": 0.1, "UNROLLED": 0.2}[how])
    execution = Execution(kernels="xla" if how == "xla" else "auto")
    other = nnx.merge(nnx.graphdef(abstract(cfg, execution)), nnx.state(model))
    assert how != "xla" or "cpu" not in other.kernels.chosen().values()
    parts = jax.eval_shape(lambda: decode.make_cache(other, 1, 8, "latent", jnp.float32)).parts
    assert (decode.prepare_decode(other) is None) == (how == "UNROLLED") == (len(parts) == 1)
    assert generate(other, PROMPTS, NEW, stop_tokens=[UNUSED]).tokens == greedy


@pytest.mark.long
def test_decoding_drops_no_token(light):
    """With half of its even share of slots an expert drops tokens that depend on the batch."""
    graphdef = nnx.graphdef(abstract(replace(LIGHT, capacity_factor=0.5), DENSE))
    dropping, prompts = nnx.merge(graphdef, nnx.state(light)), PROMPTS[:2]
    got = generate(dropping, prompts, NEW).tokens
    kept, dropped = (
        [x.argmax(-1).tolist() for x in teacher_logits(m, prompts, got)] for m in (light, dropping)
    )
    assert got == kept != dropped  # as a model without capacity


def test_parts_give_the_tokens_of_generate(model, greedy):
    for cache, part in ((None, 1), (None, 100), ("none", 3)):
        config = DecodeConfig(NEW, stop_tokens=(UNUSED,), cache=cache)
        *_, last = parts = list(generate_in_parts(model, PROMPTS[1:2], config, part=part))
        assert [len(got.tokens[0]) for got in parts] == [
            *range(1, NEW, part),
            NEW,
        ]
        assert last.tokens == greedy[1:2]


@pytest.mark.long
def test_a_cache_that_grows_gives_the_same_tokens(light, monkeypatch):
    """As on a GPU, which reads empty slots: 32, then all."""
    config = DecodeConfig(40, draft="lookup", draft_length=2)
    *_, whole = generate_in_parts(light, PROMPTS[:2], config)
    monkeypatch.setitem(table.DEVICES, "cpu", replace(table.DEVICES["cpu"], reads_all_slots=True))
    monkeypatch.setattr("dsv3_jax.decoding.batch.FIRST_SLOTS", 32)
    first, *_, last = generate_in_parts(light, PROMPTS[:2], config)
    assert last.tokens == whole.tokens and last.steps == whole.steps
    assert 2 * first.cache_bytes <= last.cache_bytes == whole.cache_bytes


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
    monkeypatch.setattr(
        "dsv3_jax.decoding.batch._pad", lambda new, *shape: read.extend(new) or _pad(new, *shape)
    )
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
    config = DecodeConfig(24, Sampling(**DRAWN), **asked)
    *_, rest = generate_in_parts(light, prompts, config, skip={0, 1, 2, 5, 7})
    assert rest.tokens == [
        [] if i in {0, 1, 2, 5, 7} else row for i, row in enumerate(whole.tokens)
    ]


def test_decoding_copies_neither_experts_nor_cache(whole_compiles):
    cfg = small(
        num_layers=4, num_dense_layers=1, dim=32, num_experts=64, expert_dim=64,
        num_groups=1, groups_per_token=1, max_positions=4096,
    )  # fmt: skip
    made, leaves, loop = decode_program(model := abstract(cfg))
    cache_bytes = sum(x.size * 4 for x in jax.tree.leaves(loop.cache))
    memory = made.decode.lower(leaves, loop, 16).compile().memory_analysis()
    one_layers_experts = sum(
        4 * w.size // w.shape[0] for w in jax.tree.leaves(nnx.state(model.sparse.moe.experts))
    )
    assert memory.temp_size_in_bytes < one_layers_experts
    # it is updated and read in place
    assert memory.temp_size_in_bytes < 1.1 * cache_bytes / cfg.num_layers
    assert memory.alias_size_in_bytes >= cache_bytes


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


REQUESTS = [
    ("Hello", "prompts='Hello' is not a list of prompts"),
    ([1, 2, 3], "prompt 0=1 is not a list of token ids; encode text with a tokenizer first"),
    ([[1], []], "prompt 1 is empty; give at least one token"),
    ([[True]], "prompt 0 holds token True, which is no id of a vocabulary of 37"),
    (
        np.array([[1], [37]]),
        "prompt 1 holds token np.int64(37), which is no id of a vocabulary of 37",
    ),
    (
        [[1], [2] * 28],
        "max_new_tokens=101 does not fit: prompt 1 has 28, the most, and max_positions=128",
    ),
]


def test_requests_are_refused(light):
    refused = [
        (partial(plain.generate, light, prompts, 101), sentence) for prompts, sentence in REQUESTS
    ]
    refused += [
        (
            partial(plain.generate, light, [[1]], **dict(max_new_tokens=3) | {name: value}),
            f"{name}={value!r} {what}",
        )
        for name, (values, what) in REFUSED.items()
        for value in values
    ]
    refused += [
        (
            partial(plain.generate, light, [[1]], 3, stop_tokens=[1, 37]),
            "stop_tokens holds token 37, which is no id",
        ),
        (
            partial(plain.DecodeConfig, 3, draft="mtp", cache="none"),
            "cache='none' decodes without drafts",
        ),
        (
            partial(plain.DecodeConfig, 3, samples=8),
            "samples=8 would be equal texts at temperature 0",
        ),
        (
            partial(plain.DecodeConfig, 3, sampling=(0.5, None, None)),
            "sampling=(0.5, None, None) is not a Sampling",
        ),
    ]
    for request, sentence in refused:
        with pytest.raises(ValueError) as caught:
            request()
        assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)
    # arrays, and requests up to the last position, are taken
    config = plain.DecodeConfig(
        100, Sampling(1.0, top_k=1, top_p=1.0), stop_tokens=np.array([UNUSED])
    )
    config.check(CFG, [np.array([1, 2]), (3,), range(4), [1] * 28])
    assert config.stop_tokens == (UNUSED,)
