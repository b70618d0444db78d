"""The cache of decoding: 8-bit rows, attention to them, their places, and no copies."""

import re
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from models import LIGHT, decode_program, needs_cpp, small
from runs import refused

from dsv3_jax.kernels.choose import prepare
from dsv3_jax.kernels.cpu import calls
from dsv3_jax.kernels.xla.cached_blocks import cached_attention_in_blocks
from dsv3_jax.model.cache import empty_cache, pick_kind
from dsv3_jax.model.counting import bytes_per_token, elements_per_token
from dsv3_jax.model.decode import make_cache
from dsv3_jax.model.transformer import abstract
from dsv3_jax.ops.cached_attention import Stored, cached_attention
from dsv3_jax.ops.quantize import dequantize_rows, largest, quantize_rows

EIGHT_BITS = (jnp.int8, jnp.float8_e4m3fn)
DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")


# 8-bit rows


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_rounding_is_within_half_a_step_of_a_rows_own_scale(rng, dtype):
    sizes = 10.0 ** np.arange(-3, 3)[:, None, None]
    x = (rng.standard_normal((6, 3, 14)) * sizes).astype(np.float32)
    tiny = np.finfo(np.float32).tiny
    x[0] = 0
    x[0, 1, :2], x[0, 2, :2] = (tiny, -tiny), (3e38, -3e38)

    @jax.jit
    def there_and_back(x):
        rows, scales = quantize_rows(x, dtype)
        return rows, scales, dequantize_rows(rows, scales, jnp.float32)

    rows, scales, back = map(np.asarray, there_and_back(x))
    assert (rows.dtype, rows.shape) == (dtype, x.shape)
    assert (scales.dtype, scales.shape) == (np.float32, (6, 3, 1))
    assert np.isfinite(back).all() and (scales > 0).all()
    scale = np.abs(np.float64(x)).max(-1, keepdims=True) / largest(dtype)
    normal = scale[..., 0] > 1e-30  # the others' scale is 1
    np.testing.assert_allclose(scales[normal], scale[normal], rtol=1e-6)
    # int8's neighbours are 1 apart; e4m3's an eighth of the power of two below, 2^-9 next to 0.
    half = scale / 2 if dtype == jnp.int8 else np.maximum(np.abs(x) / 16, scale * 2.0**-10)
    error = np.abs(np.float64(back) - x)
    assert (error <= half * (1 + 1e-5) + 1e-6 * np.abs(x))[normal].all()
    assert error[0, :2].max() <= tiny
    # All of the range is used and never left.
    assert (np.abs(rows.astype(np.float32)).max(-1)[normal] == largest(dtype)).all()


# Attention to what is stored: by an op for all rows at once, by one in blocks, and by C++

SHAPES = {  # key-value heads, queries, widths of the keys, of the values (None: the first keys)
    "latent": (1, 6, (10, 4), None),
    "three arrays of keys": (2, 2, (6, 3, 2), 17),
}
RUNS = {  # and slots: in C++, a part is 256 rows
    "at once": (cached_attention, 11),
    # they overlap at the end
    "in blocks": (partial(cached_attention_in_blocks, block=3, take_out=True), 11),
    "cpu": (calls.cached_attention, 700),
}


def stored(rng, shape, last, dtype, garbage):
    """A cached array [3, G, S, X] and its numbers in float64; row 1 holds garbage after `last`."""
    rows = rng.standard_normal(shape)
    scales = None
    if jnp.dtype(dtype).itemsize == 1:
        rows, scales = rows * 40, rng.uniform(0.01, 0.05, (*shape[:3], 1)).astype(np.float32)
    rows = rows.astype(jnp.dtype(dtype))
    numbers = rows.astype(np.float64) * (1 if scales is None else scales)
    rows[1, :, last[1, 0] + 1 :] = garbage
    return Stored(rows, scales), numbers


def one_at_a_time(q, keys, values, last):
    want = np.zeros((*q[0].shape[:3], values.shape[-1]))
    for b, g, t in np.ndindex(want.shape[:3]):
        seen = slice(0, last[b, t] + 1)
        pairs = zip(q, keys, strict=True)
        scores = sum(x[b, g, seen] @ np.float64(part[b, g, t]) for part, x in pairs)
        want[b, g, t] = oracles.softmax_probs(0.3 * scores) @ values[b, g, seen]
    return want


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("run", ["at once", "in blocks", pytest.param("cpu", marks=needs_cpp)])
def test_attention_to_the_cache_equals_one_query_at_a_time(x64, rng, run, shape):
    """The ops in float64; C++ in float32, of unit roundoff 6e-8. Free slots must not be read."""
    (attend, slots), (groups, queries, widths, value_width) = RUNS[run], SHAPES[shape]
    float_dtype = np.float32 if run == "cpu" else np.float64
    q = [rng.standard_normal((3, groups, queries, n)).astype(float_dtype) for n in widths]
    last = rng.integers(0, slots, (3, queries)).astype(np.int32)
    last[0, :2], last[1] = (0, slots - 1), slots // 5
    cases, wanted = {}, {}
    for dtype in DTYPES:
        garbage = np.nan if run == "cpu" and dtype != "int8" else 99
        made_of = np.float64 if dtype == "float32" and run != "cpu" else dtype
        draw = partial(stored, rng, last=last, dtype=made_of, garbage=garbage)
        rows = [draw((3, groups, slots, n)) for n in widths]
        values, of_values = draw((3, groups, slots, value_width)) if value_width else rows[0]
        wanted[dtype] = one_at_a_time(q, [numbers for _, numbers in rows], of_values, last)
        # Rows may end in zeros, that no query reads.
        ends = [np.pad(x.rows, [(0, 0)] * 3 + [(0, i)]) for i, (x, _) in enumerate(rows)]
        keys = [x._replace(rows=end) for end, (x, _) in zip(ends, rows, strict=True)]
        cases[dtype] = keys, values

    @jax.jit
    def of_all(q, cases, last):
        return {dtype: attend(q, *of, last, scale=0.3) for dtype, of in cases.items()}

    found = of_all(q, cases, last)
    one = of_all([x[:, :, :1] for x in q], cases, last[:, :1]) if run == "cpu" else None
    atol = 2e-6 if run == "cpu" else 1e-9
    for dtype, got in found.items():
        assert got.dtype == float_dtype
        np.testing.assert_allclose(got, wanted[dtype], atol=atol, err_msg=dtype)
        if one is not None:  # bitwise the same without the other queries
            np.testing.assert_array_equal(one[dtype], np.asarray(got)[:, :, :1])


# Where rows go

THREE = {"k": (2, 10), "v": (2, 5), "index_key": (1, 6)}


PLACES = [
    ("cpu", "int8", False), ("cpu", "bfloat16", True),
    ("cuda", "float32", False), ("tpu", "float8_e4m3fn", True),
]  # fmt: skip


@pytest.mark.parametrize("platform, dtype, by_layer", PLACES)
def test_rows_go_to_their_slots_and_nothing_else_changes(rng, platform, dtype, by_layer):
    lengths, kernels = [6, 2, 1, 13], prepare(platform=platform)
    # rows may end in zeros
    wide = {name: (heads, -(-width // 16) * 16) for name, (heads, width) in THREE.items()}

    def draw(*shape):
        return {name: np.float32(rng.standard_normal((*shape, *of))) for name, of in THREE.items()}

    prompt, new = draw(3, 4, 6), draw(4, 3)
    want = {}  # the rows of all layers, in float32
    for name, (heads, width) in THREE.items():
        want[name] = np.zeros((3, 4, heads, 16, width), np.float32)
        want[name][:, :, :, :6] = prompt[name].swapaxes(2, 3)
        for b, length in enumerate(lengths):
            want[name][1, b, :, length : length + 3] = new[name][b].swapaxes(0, 1)

    @jax.jit
    def write(prompt, lengths, new, want):
        cache = empty_cache(wide, [1, 1, 1] if by_layer else [3], 4, 16, dtype)
        filled = cache.fill(prompt, lengths)
        layer = 1 if by_layer else jnp.int32(1)
        written = filled.write(new | {"not cached": new["k"]}, layer, kernels)

        def stored(x):
            narrow = jnp.dtype(dtype).itemsize == 1
            return quantize_rows(x, dtype) if narrow else (x.astype(dtype), None)

        of_want = {name: stored(x) for name, x in want.items()}
        return written, written.positions(2), [written.read(layer) for layer in range(3)], of_want

    written, positions, arrays, want = write(prompt, np.array(lengths, np.int32), new, want)
    assert len(written.parts) == (3 if by_layer else 1) and written.lengths.tolist() == lengths
    assert positions.tolist() == [[n, n + 1] for n in lengths]
    for name, (_, width) in THREE.items():
        rows, scales = want[name]
        for layer, stored in enumerate(arrays):
            got = np.asarray(stored[name].rows)
            assert got.shape[3] == 16 and not got[..., width:].astype(np.float32).any()
            np.testing.assert_array_equal(got[..., :width], np.asarray(rows)[layer])
            if scales is not None:
                np.testing.assert_array_equal(stored[name].scales, np.asarray(scales)[layer])


SPARSE = replace(LIGHT, attention="dsa", index_heads=2, index_dim=16, index_topk=8)


def test_bytes_a_token_are_those_of_the_arrays():
    gqa = small(num_heads=6, attention="gqa", num_kv_heads=2)
    kinds = (small(), "latent"), (small(), "expanded"), (gqa, "expanded"), (SPARSE, "latent")
    for (cfg, kind), dtype in product(kinds, DTYPES):
        cache = jax.eval_shape(partial(make_cache, abstract(cfg), 2, 32, kind, dtype))
        found = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.parts))
        assert found == 2 * 32 * bytes_per_token(cfg, kind, dtype)
    assert bytes_per_token(small(), "latent", "int8") == 3 * (10 + 4 + 2 * 4)
    assert bytes_per_token(SPARSE, "latent", "int8") == 10 + 4 + 16 + 3 * 4
    assert elements_per_token(gqa) == {"expanded": 3 * 2 * 15, "mha": 3 * 6 * 15}


def test_a_latent_cache_needs_a_latent():
    with refused("^cache='latent' needs an attention with a latent.*'mqa'"):
        pick_kind(small(attention="mqa"), "latent")


# The compiled step

INDEX_KEYS = {"fusion", "convert", "dot", "multiply", "broadcast"}  # multiplied in float32
STEPS = [  # the model, the cache, its dtype, batch, draft, what else XLA may do with its arrays
    (LIGHT, "latent", "float8_e4m3", 1, None, set()),
    (LIGHT, "expanded", "float32", 1, None, set()),
    (SPARSE, "latent", "float32", 1, None, INDEX_KEYS),
    (LIGHT, "latent", "float32", 3, "lookup", set()),
    *(
        pytest.param(LIGHT, "latent", "float32", 3, draft, set(), marks=pytest.mark.long)
        for draft in (None, "model", "mtp")
    ),
]


@pytest.mark.parametrize("cfg, kind, dtype, batch, draft, more", STEPS)
@needs_cpp
def test_a_step_on_the_cpu_copies_no_array_of_the_cache(cfg, kind, dtype, batch, draft, more):
    """A copy costs as much as reading the cache: long contexts would be up to twice as slow."""
    slots, length = 1000, 2 if draft else 0
    model = abstract(replace(cfg, mtp_kind="deepseek", mtp_depth=1) if draft == "mtp" else cfg)
    drafter = model if draft == "model" else draft
    how = dict(capacity=slots, dtype=dtype, cache=kind)
    made, leaves, loop = decode_program(model, drafter, length, batch, **how)
    until = jax.ShapeDtypeStruct((batch,), jnp.int32)
    text = made.decode.lower(leaves, loop, until).compile().as_text()
    made_by = Counter(re.findall(rf"\[[\d,]*\b{slots},\d+\]\S* (\S+?)\(", text))
    assert made_by["custom-call"]  # the pattern finds the cache, which a kernel writes
    assert set(made_by) <= {"custom-call", "get-tuple-element", "bitcast", "parameter"} | more
