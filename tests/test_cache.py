"""The caches of decoding: 8-bit rows, attention to stored rows, and each cache against the teacher-forced forward."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from flax import nnx
from models import DENSE, LIGHT, QUICK, forward, random_model, small

from dsv3_jax.decoding.generate import generate
from dsv3_jax.kernels.choose import prepare
from dsv3_jax.kernels.cpu import attention as cpu_attention
from dsv3_jax.kernels.cpu import calls, library
from dsv3_jax.model.attention import GQA
from dsv3_jax.model.cache import bytes_per_token, empty_cache, pick_dtype, pick_kind
from dsv3_jax.model.context import make_context
from dsv3_jax.model.transformer import abstract
from dsv3_jax.ops.cached_attention import Stored, cached_attention, scaled
from dsv3_jax.ops.quantize import dequantize_rows, quantize_rows

pytestmark = pytest.mark.usefixtures("light_compiles")

EIGHT_BITS = (jnp.int8, jnp.float8_e4m3fn)
LARGEST = {jnp.int8: 127.0, jnp.float8_e4m3fn: 448.0}
PARTS = (10, 4)
PLATFORMS = ("cpu", "cuda", "tpu")
quantize = jax.jit(quantize_rows, static_argnums=(1, 2))


def half_step(x, scale, dtype):
    """Half the distance of neighbours among an 8-bit dtype's numbers around x / scale, times scale.

    int8's are 1 apart; those of e4m3 are an eighth of the power of two below, and 2^-9 next to 0.
    """
    if dtype == jnp.int8:
        return scale / 2
    return scale * np.maximum(2.0 ** (np.floor(np.log2(np.maximum(np.abs(x / scale), 1e-9))) - 3), 2.0**-9) / 2


# 8-bit rows


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_rounding_is_within_half_a_step_of_each_parts_own_scale(rng, dtype):
    x = rng.standard_normal((6, 3, 14)).astype(np.float32)
    x[..., :10] *= 10.0 ** np.arange(-3, 3)[:, None, None]  # the latent part huge or tiny beside the rope part
    rows, scales = quantize(jnp.asarray(x), PARTS, dtype)
    assert rows.dtype == dtype and rows.shape == x.shape
    assert scales.dtype == jnp.float32 and scales.shape == (6, 3, 2)
    parts = x[..., :10], x[..., 10:]
    own = np.stack([np.abs(part).max(-1) for part in parts], axis=-1) / LARGEST[dtype]
    np.testing.assert_allclose(scales, own, rtol=1e-6)
    back = np.asarray(dequantize_rows(rows, scales, PARTS, jnp.float32))
    step = half_step(x.astype(np.float64), np.repeat(own, PARTS, axis=-1), dtype)
    assert (np.abs(back - x) <= step * (1 + 1e-5)).all()
    # All of the range is used, on both sides, and never left.
    wide = np.abs(np.asarray(rows.astype(jnp.float32)))
    assert np.isfinite(wide).all()
    for part in (wide[..., :10], wide[..., 10:]):
        np.testing.assert_array_equal(part.max(-1), LARGEST[dtype])


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_numbers_at_the_ends(dtype):
    """Zeros, a part of one number, signs, and numbers so small that a scale would vanish: all finite."""
    tiny = np.finfo(np.float32).tiny
    x = np.array([[0, 0, 0, 5.0], [-3.0, 3.0, 0, 0], [3e38, -3e38, 1.0, -1e-3], [tiny, 0, -tiny, 0]], np.float32)
    rows, scales = quantize(jnp.asarray(x), (3, 1), dtype)
    back = np.asarray(dequantize_rows(rows, scales, (3, 1), jnp.float32))
    assert np.isfinite(back).all() and np.isfinite(scales).all() and (np.asarray(scales) > 0).all()
    np.testing.assert_array_equal(back[0], x[0])
    np.testing.assert_allclose(back[1], x[1], rtol=1e-6)
    np.testing.assert_allclose(back[2], [3e38, -3e38, 0, -1e-3], rtol=1e-6)
    assert np.abs(back[3]).max() <= tiny
    top = LARGEST[dtype]
    assert np.asarray(rows.astype(jnp.float32))[1, :2].tolist() == [-top, top]  # alike on both sides of 0


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_rows_of_other_dtypes(x64, rng, dtype):
    for kind in (ml_dtypes.bfloat16, np.float64):
        x = jnp.asarray(rng.standard_normal((5, 14)).astype(kind))
        rows, scales = quantize(x, PARTS, dtype)
        assert rows.dtype == dtype and scales.dtype == jnp.float32
        back = dequantize_rows(rows, scales, PARTS, x.dtype)
        assert back.dtype == x.dtype
        wide = np.asarray(x, np.float64)
        step = half_step(wide, np.repeat(np.asarray(scales, np.float64), PARTS, axis=-1), dtype)
        # bfloat16 rounds scale and product once more, by 2^-9 each
        slack = 2.0**-8 * np.abs(wide) if kind == ml_dtypes.bfloat16 else 1e-6 * np.abs(wide)
        assert (np.abs(np.asarray(back, np.float64) - wide) <= step + slack).all()
    rows, _ = quantize(jnp.array([[1e-60, 0.0]]), (2,), dtype)  # a scale that float32 does not have
    assert np.asarray(rows.astype(jnp.float32)).tolist() == [[0, 0]]


# Attention to what is stored

SHAPES = {  # heads G, queries, parts, shared
    "latent": (1, 6, (10, 4), True),
    "expanded": (2, 4, (6, 5), False),
    "one head": (1, 3, (6, 5), False),
}
CAPACITY, LAST = 11, np.array([[3, 4], [9, 10], [0, 1]], np.int32)


def plain_attention(q, rows, last, parts, shared, scale):
    """One query at a time over rows [B, G, S, X]."""
    out = np.zeros((*q.shape[:3], parts[0] if shared else parts[1]))
    for b, g, t in np.ndindex(*q.shape[:3]):
        seen = rows[b, g, : last[b, t] + 1]
        keys, values = (seen, seen[:, : parts[0]]) if shared else (seen[:, : parts[0]], seen[:, parts[0] :])
        out[b, g, t] = oracles.softmax_probs(scale * (keys @ q[b, g, t])) @ values
    return out


@pytest.mark.parametrize(
    "kind, dtype", [*((kind, None) for kind in SHAPES), *((k, d) for k in ("latent", "expanded") for d in EIGHT_BITS)]
)
def test_attention_to_the_cache_equals_one_query_at_a_time(x64, rng, kind, dtype):
    groups, queries, parts, shared = SHAPES[kind]
    rows = rng.standard_normal((2, 3, groups, CAPACITY, sum(parts)))
    rows[..., : parts[0]] *= 3
    q = rng.standard_normal((3, groups, queries, sum(parts) if shared else parts[0]))
    last = (
        np.repeat(LAST, queries // 2, axis=1) if queries > 3 else np.array([[3, 4, 4], [9, 10, 2], [0, 1, 1]], np.int32)
    )
    stored = (
        Stored(jnp.asarray(rows), None) if dtype is None else Stored(*quantize_rows(jnp.asarray(rows), parts, dtype))
    )
    if dtype is not None:
        rows = np.asarray(dequantize_rows(*stored, parts, jnp.float64))
    want = plain_attention(q, rows[1], last, parts, shared, 0.3)

    @partial(jax.jit, static_argnames="block")
    def run(stored, block):
        return cached_attention(
            jnp.asarray(q), stored, jnp.ones((), jnp.int32), jnp.asarray(last), parts=parts, shared=shared, scale=0.3,
            block=block,
        )  # fmt: skip

    wider = stored._replace(rows=jnp.pad(stored.rows, [(0, 0)] * 4 + [(0, 3)]))  # rows may end in zeros
    for block in (None, 3):  # all rows at once; blocks that overlap at the end
        np.testing.assert_allclose(run(stored, block), want, atol=1e-9)
        np.testing.assert_allclose(run(wider, block), want, atol=1e-9)
    # Other layers and free slots change nothing at all.
    other = jax.tree.map(lambda x: np.array(x), stored)
    for array in other:
        if array is not None:
            array[0] = array[0, ::-1] + array.dtype.type(1)
            for b, end in enumerate(last.max(1)):
                array[1, b, :, end + 1 :] = array.dtype.type(99)
    np.testing.assert_array_equal(run(jax.tree.map(jnp.asarray, other), 3), run(stored, 3))


def test_the_scale_is_rounded_once():
    """V3's scale, in bfloat16: rounded before the product it would be 0.35 % too small."""
    q, scale = jnp.asarray(np.linspace(1, 2, 64, endpoint=False), jnp.bfloat16), 0.1352337788608801
    want = np.asarray(q, np.float64) * scale
    # Half a step of bfloat16 is 2^-9 of the power of two below: 0.2 to 0.4 % of each number, and on average nothing.
    assert abs(np.mean(np.asarray(scaled(q, scale), np.float64) / want) - 1) < 5e-4
    assert scaled(q, scale).dtype == jnp.bfloat16


@pytest.mark.long
@pytest.mark.parametrize("dtype", calls.CACHE_DTYPES)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("capacity", [11, 700])  # one part of 256 rows, or three
def test_cpp_attention_equals_one_query_at_a_time(rng, kind, capacity, dtype):
    """In float32, whose unit roundoff is 6e-8; the softmax's weights add up to 1, and values are about 1."""
    if why := library.why_not():
        pytest.skip(why)
    groups, queries, parts, shared = SHAPES[kind]
    rows = rng.standard_normal((2, 3, groups, capacity, sum(parts))).astype(np.float32)
    q = rng.standard_normal((3, groups, queries, sum(parts) if shared else parts[0])).astype(np.float32)
    last = rng.integers(0, capacity, (3, queries)).astype(np.int32)
    last[0, :2], last[1] = (0, capacity - 1), capacity // 5  # all of it, and nothing in the later parts
    stored = Stored(jnp.asarray(rows).astype(dtype), None)
    if jnp.dtype(dtype).itemsize == 1:
        stored = Stored(*quantize_rows(jnp.asarray(rows), parts, dtype))
        rows = np.array(dequantize_rows(*stored, parts, jnp.float32))
    else:
        rows = np.array(stored.rows.astype(jnp.float32))
    nothing = jnp.zeros((), dtype) if dtype == "int8" else jnp.array(jnp.nan, dtype)  # another layer, and free slots
    stored = stored._replace(
        rows=stored.rows.at[0].set(nothing).at[1, 1, :, capacity // 5 + 1 :].set(nothing),
        scales=stored.scales if stored.scales is None else stored.scales.at[0].set(jnp.nan),
    )

    @jax.jit
    def run(q, last):
        layer = jnp.ones((), jnp.int32)
        return cpu_attention.cached_attention(q, stored, layer, last, parts=parts, shared=shared, scale=0.3)

    got = run(q, last)
    np.testing.assert_allclose(got, plain_attention(q, rows[1], last, parts, shared, 0.3), atol=2e-6)
    for i in range(queries):  # bitwise the same without the other queries
        one = slice(i, i + 1)
        np.testing.assert_array_equal(run(q[:, :, one], last[:, one]), got[:, :, one])


@pytest.mark.parametrize("kind", SHAPES)
def test_attention_in_blocks_equals_attention_at_once(rng, monkeypatch, kind):
    """In float32; four blocks of 64 rows, the last of which overlaps, against one of 200."""
    monkeypatch.setattr(cpu_attention, "BLOCK_ELEMENTS", 1)
    groups, queries, parts, shared = SHAPES[kind]
    stored = Stored(jnp.asarray(rng.standard_normal((2, 3, groups, 200, sum(parts))), jnp.float32), None)
    q = jnp.asarray(rng.standard_normal((3, groups, queries, sum(parts) if shared else parts[0])), jnp.float32)
    last = jnp.asarray(rng.integers(0, 200, (3, queries)), jnp.int32).at[0, 0].set(199)
    args, how = (q, stored, jnp.ones((), jnp.int32), last), dict(parts=parts, shared=shared, scale=0.3)
    in_blocks = jax.jit(partial(cpu_attention.cached_attention_in_blocks, **how))
    assert "while" in in_blocks.lower(*args).as_text()  # there are blocks
    np.testing.assert_allclose(in_blocks(*args), cached_attention(*args, **how), atol=2e-6)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_cpp_attention_reads_every_8_bit_number(dtype):
    if why := library.why_not():
        pytest.skip(why)
    every = np.arange(256, dtype=np.uint8).view(jnp.dtype(dtype)).reshape(1, 1, 1, 1, 256)  # the only row
    scales = np.array([3.0, 0.5], np.float32).reshape(1, 1, 1, 1, 2)
    got = calls.cached_attention(
        jnp.zeros((1, 1, 1, 1)), jnp.asarray(every), jnp.asarray(scales), jnp.zeros((), jnp.int32),
        jnp.zeros((1, 1), jnp.int32), values=(0, 256), first_part=101,
    )  # fmt: skip
    want = every.astype(np.float32).reshape(256) * np.repeat(scales.reshape(2), (101, 155))
    np.testing.assert_array_equal(np.asarray(got).reshape(256), want)


def test_cpp_attention_refuses_slots_outside_the_cache():
    if why := library.why_not():
        pytest.skip(why)
    rows, q = jnp.ones((2, 1, 1, 8, 4)), jnp.ones((1, 1, 1, 4))
    run = jax.jit(partial(calls.cached_attention, values=(0, 4), first_part=2))
    for layer, last in ((2, 0), (-1, 0), (0, 8), (0, -1)):
        with pytest.raises(Exception, match="outside the cache"):
            jax.block_until_ready(run(q, rows, None, jnp.array(layer, jnp.int32), jnp.array([[last]], jnp.int32)))
    zero = jnp.zeros((), jnp.int32)
    for other, what in ((jnp.int8, "without scales"), (jnp.float16, "not served")):
        with pytest.raises(Exception, match=what):
            jax.block_until_ready(run(q, rows.astype(other), None, zero, zero.reshape(1, 1)))


# Where rows go


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("by_layer", [False, True])
def test_rows_go_to_their_slots_and_nothing_else_changes(rng, dtype, platform, by_layer):
    """By each platform's implementation, which is plain XLA here; bitwise."""
    cfg, lengths, kernels = small(), [6, 2, 1, 13], prepare(platform=platform)
    cache = empty_cache(cfg, 3, 4, 16, "latent", dtype, by_layer=by_layer, row_multiple=1 + 15 * by_layer)
    prompt = rng.standard_normal((3, 4, 1, 6, 14)).astype(np.float32)
    new = rng.standard_normal((4, 1, 3, 14)).astype(np.float32)

    @jax.jit
    def write(cache, prompt, lengths, new):
        for layer in range(3):
            cache = cache.write(prompt[layer], layer, kernels)
        filled = cache.at_lengths(lengths)
        return cache, filled, filled.write(new, 1, kernels)

    prefilled, filled, written = write(cache, jnp.asarray(prompt), jnp.asarray(lengths, jnp.int32), jnp.asarray(new))
    assert cache.is_empty and prefilled.is_empty and not filled.is_empty and not written.is_empty
    assert written.by_layer == by_layer and written.capacity == 16 and written.nbytes == cache.nbytes
    assert filled.lengths.tolist() == written.lengths.tolist() == lengths  # the caller knows how many will count
    assert filled.positions(3).tolist() == [[n, n + 1, n + 2] for n in lengths]
    want = np.zeros((3, 4, 1, 16, 14), np.float32)
    want[:, :, :, :6] = prompt
    for b, length in enumerate(lengths):
        want[1, b, :, length : length + 3] = new[b]
    rows, scales = jnp.asarray(want).astype(dtype), None
    if jnp.dtype(dtype).itemsize == 1:
        rows, scales = quantize(jnp.asarray(want), (10, 4), dtype)
    got = written.stored
    if by_layer:
        got = jax.tree.map(lambda *x: np.concatenate(x), *got)
        assert not np.asarray(got.rows[..., 14:]).astype(np.float32).any()
    np.testing.assert_array_equal(got.rows[..., :14], rows)
    if scales is not None:
        np.testing.assert_array_equal(got.scales, scales)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_rows_of_several_heads_go_to_their_slots(rng, platform):
    stored = Stored(jnp.asarray(rng.standard_normal((2, 3, 2, 9, 5)), jnp.float32), None)
    new, first = Stored(jnp.asarray(rng.standard_normal((3, 2, 2, 5)), jnp.float32), None), [7, 0, 3]
    write = jax.jit(prepare(platform=platform).write_rows)
    got = write(stored, new, jnp.ones((), jnp.int32), jnp.asarray(first, jnp.int32))
    want = np.array(stored.rows)
    for b, slot in enumerate(first):
        want[1, b, :, slot : slot + 2] = new.rows[b]
    np.testing.assert_array_equal(got.rows, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3"])
def test_bytes_a_token_are_those_of_the_arrays(dtype):
    gqa = small(num_heads=6, attention="gqa", num_kv_heads=2)
    for cfg, kind in ((small(), "latent"), (small(), "expanded"), (gqa, "expanded")):
        cache = empty_cache(cfg, cfg.num_layers, 2, 32, kind, pick_dtype("float32", dtype))
        assert cache.capacity == 32
        assert cache.nbytes == 2 * 32 * bytes_per_token(cfg, kind, pick_dtype("float32", dtype))
        assert cache.nbytes == sum(x.nbytes for x in jax.tree.leaves(cache)) - cache.lengths.nbytes
    per_token = bytes_per_token(small(), "latent", pick_dtype("float32", dtype))
    assert per_token == 3 * {"float32": 56, "bfloat16": 28, "int8": 14 + 8, "float8_e4m3": 14 + 8}[dtype]


def test_which_cache():
    mla, mqa = small(), small(attention="mqa")
    assert (pick_kind(mla, None), pick_kind(mqa, None)) == ("latent", "expanded")
    assert [pick_kind(mla, kind) for kind in ("latent", "expanded")] == ["latent", "expanded"]
    with pytest.raises(ValueError, match="^cache='latent' needs attention='mla'.*'mqa'"):
        pick_kind(mqa, "latent")
    with pytest.raises(ValueError, match="^cache='paged' is not one of latent, expanded$"):
        pick_kind(mla, "paged")
    assert [pick_dtype(dtype, None) for dtype in ("float32", jnp.bfloat16)] == [jnp.float32, jnp.bfloat16]
    for name in ("float8_e4m3", jnp.float8_e4m3fn, jnp.dtype(jnp.float8_e4m3fn)):
        assert pick_dtype("float32", name) == jnp.float8_e4m3fn
    for name in ("int8", jnp.int8, np.dtype("int8")):
        assert pick_dtype("float32", name) == np.int8
    for name in ("int4", "nonsense", np.float64):
        with pytest.raises(ValueError, match=r"^cache_dtype=.* is not one of float32, bfloat16, int8, float8_e4m3$"):
            pick_dtype("float32", name)


# Whole models

ATTENTION = {
    "mha": dict(num_heads=4, attention="mha"),
    "gqa": dict(num_heads=4, attention="gqa", num_kv_heads=2),
    "mqa": dict(num_heads=4, attention="mqa"),
}
NEW = 10
PROMPTS = [[5], [8, 1, 30, 2, 2], [3 * i % 37 for i in range(20)]]


def teacher_logits(model, new):
    """Logits [NEW, W] of each row at the positions that chose its new tokens, from one forward pass."""
    rows = np.zeros((3, 32), np.int32)
    for row, prompt, more in zip(rows, PROMPTS, new, strict=True):
        row[: len(prompt) + len(more)] = [*prompt, *more]
    logits = forward(model, jnp.asarray(rows)).logits
    return [logits[b, len(p) - 1 : len(p) - 1 + NEW] for b, p in enumerate(PROMPTS)]


def assert_greedy(model, new):
    for logits, row in zip(teacher_logits(model, new), new, strict=True):
        assert logits.argmax(-1).tolist() == row
    assert len({t for row in new for t in row}) > 5  # a model that repeats one token could not fail


def test_every_cache_of_mla_gives_the_tokens_of_the_forward():
    model = random_model(small(num_layers=2, num_dense_layers=2))
    by_kind = {kind: generate(model, PROMPTS, NEW, cache=kind) for kind in ("latent", "expanded", "none")}
    assert_greedy(model, by_kind["none"].tokens)
    for kind, got in by_kind.items():
        assert got.tokens == by_kind["none"].tokens, kind
        assert got.cache_bytes_per_token == (0 if kind == "none" else bytes_per_token(model.cfg, kind, jnp.float32))
        assert got.cache_bytes == 3 * 32 * got.cache_bytes_per_token and got.steps == NEW - 1


ACCELERATORS = [("cuda", "latent", None), ("tpu", "latent", "int8"), ("tpu", "expanded", "float8_e4m3")]


@pytest.mark.long
@pytest.mark.parametrize("platform, kind, dtype", ACCELERATORS)
def test_accelerators_caches_give_the_same_tokens(platform, kind, dtype):
    """Rows by layer, padded on TPUs, with drafts too: the programs of those platforms, in plain XLA on this host."""
    cfg = replace(small(num_layers=2, num_dense_layers=1), mtp_depth=1)
    model = random_model(cfg, execution=DENSE)
    kernels = prepare(DENSE, platform=platform)
    graphdef, _ = nnx.split(abstract(cfg, DENSE, kernels))
    other = nnx.merge(graphdef, nnx.state(model))
    cache = other.empty_cache(3, 32, kind, pick_dtype("float32", dtype))
    assert cache.by_layer and len(cache.stored) == 2
    assert cache.stored[0].rows.shape[-1] % kernels.cache_row_multiple == 0
    want = generate(model, PROMPTS, NEW, cache=kind, cache_dtype=dtype).tokens
    assert len({t for row in want for t in row}) > 5
    assert generate(other, PROMPTS, NEW, cache=kind, cache_dtype=dtype).tokens == want
    if platform == "tpu":
        assert generate(other, PROMPTS, NEW, cache=kind, cache_dtype=dtype, draft="mtp", draft_length=2).tokens == want


@pytest.mark.parametrize("attention", ATTENTION)
def test_baselines_decode_the_tokens_of_their_forward(attention):
    cfg = replace(LIGHT, **ATTENTION[attention], qk_norm=attention == "mqa")
    model = random_model(cfg, execution=DENSE)
    assert_greedy(model, generate(model, PROMPTS, NEW).tokens)


@pytest.mark.long
@pytest.mark.parametrize("kind, dtype", [("latent", "int8"), ("latent", "float8_e4m3"), ("expanded", "int8")])
def test_8_bits_choose_tokens_about_as_likely(kind, dtype):
    model = random_model(LIGHT, execution=DENSE)
    got = generate(model, PROMPTS, NEW, cache=kind, cache_dtype=dtype)
    lost = [
        (logits.max(-1) - logits[np.arange(NEW), row]) / logits.std(-1)
        for logits, row in zip(teacher_logits(model, got.tokens), got.tokens, strict=True)
    ]
    # How much less likely than the exact cache's best: a step is 1/254 of the largest, and 1/16 of each number.
    assert np.median(lost) < 0.02
    assert np.mean(np.concatenate(lost) == 0) > (0.8 if dtype == "int8" else 0.6)
    assert got.cache_bytes_per_token == bytes_per_token(LIGHT, kind, pick_dtype("float32", dtype))


@pytest.mark.parametrize("attention", ATTENTION)
def test_baseline_attention_equals_the_equations(x64, rng, attention):
    """One head and one query at a time; a group of query heads shares a key and a value."""
    cfg = small(**ATTENTION[attention], rope_interleaved=attention != "gqa")
    shapes = dict(w_q=(16, 4, 10), w_k=(16, cfg.kv_heads, 10), w_v=(16, cfg.kv_heads, 5), w_o=(4, 5, 16))
    w = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    x, positions = rng.standard_normal((2, 7, 16)), np.array([[*range(7)], [*range(4), *range(3)]], np.int32)
    segments = np.array([[1] * 7, [1] * 4 + [2] * 3], np.int32)

    graphdef, state = nnx.split(nnx.eval_shape(lambda: GQA(cfg, rngs=nnx.Rngs(0))))
    assert {path[0]: v.shape for path, v in nnx.to_flat_state(state)} == shapes
    flat = [(path, v.replace(jnp.asarray(w[path[0]]))) for path, v in nnx.to_flat_state(state)]

    @partial(jax.jit, compiler_options=QUICK)
    def run(state, x):
        module, cache = nnx.merge(graphdef, state), empty_cache(cfg, 1, 2, 7, "expanded", x.dtype)
        ctx = make_context(cfg, jnp.asarray(positions), jnp.asarray(segments), cache=cache)
        alone = module(x, segment_ids=jnp.asarray(segments), positions=jnp.asarray(positions))
        same, ctx = module.attend(x, ctx)
        return alone, same, ctx.cache

    out, same, cache = run(nnx.from_flat_state(flat), jnp.asarray(x))
    freqs = np.array([1.0, cfg.rope_theta ** (-2 / 4)])
    want = np.zeros((2, 7, 16))
    for b, t, h in np.ndindex(2, 7, 4):
        g = h // (4 // cfg.kv_heads)
        q = x[b, t] @ w["w_q"][:, h]
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        keys = [x[b, s] @ w["w_k"][:, g] for s in seen]
        scores = [
            q[:6] @ k[:6]
            + oracles.rope_score(
                q[6:], k[6:], positions[b, t], positions[b, s], freqs, interleaved=cfg.rope_interleaved
            )
            for s, k in zip(seen, keys, strict=True)
        ]
        weights = oracles.softmax_probs(np.array(scores) * 10**-0.5)
        value = sum(a * (x[b, s] @ w["w_v"][:, g]) for a, s in zip(weights, seen, strict=True))
        want[b, t] += value @ w["w_o"][h]
    np.testing.assert_allclose(out, want, atol=1e-5)  # angles are float32
    np.testing.assert_array_equal(same, out)
    keys, values = np.split(np.asarray(cache.stored.rows[0]), [10], axis=-1)  # cached: one row a key-value head
    np.testing.assert_allclose(values, np.einsum("btd,dgv->bgtv", x, w["w_v"]), atol=1e-12)
    np.testing.assert_allclose(keys[..., :6], np.einsum("btd,dgk->bgtk", x, w["w_k"][..., :6]), atol=1e-12)
