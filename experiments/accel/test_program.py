"""Counts of a compiled program equal counts by hand: FLOPs, launches, copies, loops, bytes."""

import jax
import jax.numpy as jnp
import pytest

from experiments.accel.program import additions, read_program

S = jax.ShapeDtypeStruct
N, D = 16, 32


@pytest.fixture(autouse=True)
def _as_users_compile():
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_loops_multiply_and_unknown_ones_count_once():
    def inner(x, w):
        return jnp.tanh(x @ w), None

    def until(x, w):
        x = jax.lax.scan(inner, x, w)[0]
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jnp.tanh(x @ w[0]), x)

    args = S((N, D), jnp.float32), S((3, D, D), jnp.float32)
    program = read_program(jax.jit(until).lower(*args).compile())
    assert program.flops == 4 * 2 * N * D * D and len(program.unknown_loops) == 1
    assert any(launch.flops and not launch.known for launch in program.all_launches)


# Texts of the forms that compilers for GPU and TPU write, and that the CPU's does not.
HEAD = """HloModule m, is_scheduled=true

FunctionNames
1 "outer"
2 "ragged_dot"

FileLocations
7 {file_name_id=1 function_name_id=2 line=3}

StackFrames
9 {file_location_id=7 parent_frame_id=1}

"""


def text(computations: str) -> str:
    """A program; a backslash joins lines."""
    return HEAD + computations.replace("\\\n", "")


GPU = r"""
%limit (p: (s32[], bf16[6,32,32])) -> pred[] {
  %p = (s32[], bf16[6,32,32]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(6)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%slice (a: bf16[6,32,32], i: s32[]) -> bf16[1,32,32] {
  %a = bf16[6,32,32]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %ds = bf16[1,32,32]{2,1,0} dynamic-slice(%a, %i.1, %z, %z), dynamic_slice_sizes={1,32,32}
}

%put (a: bf16[6,32,32], b: bf16[1,32,32], i: s32[]) -> bf16[6,32,32] {
  %a.1 = bf16[6,32,32]{2,1,0} parameter(0)
  %b = bf16[1,32,32]{2,1,0} parameter(1)
  %i.2 = s32[] parameter(2)
  %z.1 = s32[] constant(0)
  %negated = bf16[1,32,32]{2,1,0} negate(%b)
  ROOT %dus = bf16[6,32,32]{2,1,0} dynamic-update-slice(%a.1, %negated, %i.2, %z.1, %z.1)
}

%body (p: (s32[], bf16[6,32,32])) -> (s32[], bf16[6,32,32]) {
  %p.1 = (s32[], bf16[6,32,32]{2,1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.1), index=0
  %w = bf16[6,32,32]{2,1,0} get-tuple-element(%p.1), index=1
  %start = ((bf16[6,32,32]{2,1,0}, s32[]), bf16[1,32,32]{2,1,0}, u32[]) \
fusion-start(%w, %i.3), kind=kLoop, calls=%slice, metadata={op_name="jit(f)/while/body/take"}
  %done = bf16[1,32,32]{2,1,0} fusion-done(%start)
  %next = bf16[6,32,32]{2,1,0} fusion(%w, %done, %i.3), kind=kLoop, calls=%put
  %one = s32[] constant(1)
  %i.4 = s32[] add(%i.3, %one)
  ROOT %t = (s32[], bf16[6,32,32]{2,1,0}) tuple(%i.4, %next)
}

%sliced (g: s32[6], x: bf16[64,32], w: bf16[6,32,32]) -> bf16[64,32] {
  %g.1 = s32[6]{0} parameter(0)
  %x.1 = bf16[64,32]{1,0} parameter(1)
  %w.3 = bf16[6,32,32]{2,1,0} parameter(2)
  ROOT %mpmd_map.1 = bf16[64,32]{1,0} custom-call(%g.1, %x.1, %w.3), \
custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(f)/mpmd_map" stack_frame_id=9}, backend_config={module = "ML\22"}
}

ENTRY %main (x: bf16[64,32], w: bf16[6,32,32], g: s32[6]) -> bf16[64,32] {
  %x = bf16[64,32]{1,0} parameter(0)
  %w.1 = bf16[6,32,32]{2,1,0} parameter(1)
  %g = s32[6]{0} parameter(2)
  %zero = s32[] constant(2)
  %init = (s32[], bf16[6,32,32]{2,1,0}) tuple(%zero, %w.1)
  %loop = (s32[], bf16[6,32,32]{2,1,0}) while(%init), condition=%limit, body=%body
  %w.2 = bf16[6,32,32]{2,1,0} get-tuple-element(%loop), index=1
  %fused = bf16[64,32]{1,0} fusion(%g, %x, %w.2), kind=kCustom, calls=%sliced
  %mine.2 = bf16[64,32]{1,0} custom-call(%fused), custom_call_target="mosaic_gpu_v2", \
backend_config={cost_estimate_json = \
"{\22flops\22: 123, \22transcendentals\22: 0, \22bytes_accessed\22: 456}"}
  %gemm = (bf16[64,32]{1,0}, s8[1024]{0}) custom-call(%mine.2, %w.2), \
custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  ROOT %out = bf16[64,32]{1,0} get-tuple-element(%gemm), index=0
}
"""


def test_a_gpus_program():
    program = read_program(text(GPU))
    product = 2 * 64 * 32 * 32  # of a grouped kernel, each row with one expert, and of cuBLAS
    assert program.flops == product + 123 + product
    assert program.kernels() == {"ragged_dot": 1, "mine": 1, "__cublas$lt$matmul": 1}
    assert program.unknown_work() == {}
    by_name = {x.name: x for x in program.all_launches}
    # The loop begins at 2.
    assert (by_name["start"].runs, by_name["start"].source) == (4, "jit(f)/while/body/take")
    matrix = 32 * 32 * 2
    assert by_name["start"].nbytes == 2 * matrix + 4  # a slice of the stack is read, and its index
    assert by_name["next"].nbytes == 2 * matrix + 4  # in place
    assert by_name["mine.2"].nbytes == 456
    assert program.launches == 4 * 3 + 3


PICKED = r"""
%pick (a: bf16[6,8,32], i: s32[2]) -> f32[2,32] {
  %a = bf16[6,8,32]{2,1,0} parameter(0)
  %i = s32[2]{0} parameter(1)
  %layer = bf16[1,8,32]{2,1,0} slice(%a), slice={[1:2], [0:8], [0:32]}
  %flat = bf16[8,32]{1,0} bitcast(%layer)
  %rows = bf16[2,32]{1,0} gather(%flat, %i), offset_dims={1}, collapsed_slice_dims={0}, \
start_index_map={0}, index_vector_dim=1, slice_sizes={1,32}
  ROOT %wide = f32[2,32]{1,0} convert(%rows)
}

ENTRY %main (a: bf16[6,8,32], i: s32[2]) -> f32[2,32] {
  %a.1 = bf16[6,8,32]{2,1,0} parameter(0)
  %i.1 = s32[2]{0} parameter(1)
  ROOT %picked = f32[2,32]{1,0} fusion(%a.1, %i.1), kind=kLoop, calls=%pick
}
"""
PREFETCH = r"""
ENTRY %main (a: s8[4096]) -> s8[1024] {
  %a = s8[4096]{0:T(1024)(128)(4,1)} parameter(0)
  %begin = ((s8[4096]{0:T(1024)(128)(4,1)}), s8[1024]{0:T(1024)(128)(4,1)S(1)}, s32[]{:S(2)}) \
slice-start(%a), slice={[0:1024]}
  ROOT %end = s8[1024]{0:T(1024)(128)(4,1)S(1)} slice-done(%begin)
}
"""


def test_slices_alone_are_read():
    """Rows of one layer of a stack; of a TPU's prefetch what it writes to its own memory."""
    (launch,) = read_program(text(PICKED)).all_launches
    assert launch.nbytes == 2 * 32 * 2 + 2 * 4 + 2 * 32 * 4  # rows, indices, result
    (launch,) = read_program(text(PREFETCH)).all_launches
    assert launch.nbytes == 1024


def test_additions_are_found_with_their_dtype_and_order():
    def found(dtype, update):
        args = S((N, D), dtype), S((5,), jnp.int32), S((5, D), dtype)
        return [a[1:] for a in additions(jax.jit(update).lower(*args).as_text(dialect="hlo"))]

    narrow = found(jnp.bfloat16, lambda x, ids, rows: x.at[ids].add(rows))
    assert narrow == [("bf16", True, False)]
    unique = found(jnp.float32, lambda x, ids, rows: x.at[ids].add(rows, unique_indices=True))
    assert unique == [("f32", False, True)]
    assert found(jnp.bfloat16, lambda x, ids, rows: x.at[ids].set(rows)) == []
