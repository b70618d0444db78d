"""What programs send, against what was written by hand: every kind of collective, in loops and in branches."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.planning.hlo import compile_in_sight, first_group, traffic

SIZES = {"data": 2, "expert": 4}
ROWS, WIDTH = 8, 4  # of a device's share, float32
SHARE = ROWS * WIDTH * 4
ALL = ("data", "expert")


def sent(local):
    """The traffic of `local`, a function of a device's [ROWS, WIDTH], on the mesh of SIZES."""
    mesh = jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P(ALL)))
    spread = jax.shard_map(local, mesh=mesh, in_specs=P(ALL), out_specs=P(ALL), check_vma=False)
    return traffic(jax.jit(spread).lower(x).compile(), SIZES)


def gather(x):
    return jax.lax.all_gather(x, "expert", axis=0, tiled=True)


def test_each_kind_by_its_formula():
    def local(x):
        x = jax.lax.psum_scatter(gather(x), "expert", scatter_dimension=0, tiled=True)
        x = jax.lax.all_to_all(x, "data", 0, 0, tiled=True)
        x = jax.lax.ppermute(jnp.sin(x), "data", [(0, 1), (1, 0)])
        return jax.lax.psum(x, ALL)

    found = sent(local)
    assert found.by_kind() == {
        "all-gather": 3 * SHARE,  # three peers' shares pass through each device
        "reduce-scatter": 3 * SHARE,
        "all-to-all": SHARE / 2,  # half stays
        "collective-permute": SHARE,
        "all-reduce": 2 * SHARE * 7 / 8,
    }
    assert found.by_axes() == {("expert",): 6 * SHARE, ("data",): 1.5 * SHARE, ALL: 1.75 * SHARE}
    assert found.wire == sum(found.by_kind().values())
    assert {c.kind: (c.nbytes, c.group, c.runs) for c in found.collectives} == {
        "all-gather": (4 * SHARE, 4, 1),
        "reduce-scatter": (SHARE, 4, 1),
        "all-to-all": (SHARE, 2, 1),
        "collective-permute": (SHARE, 2, 1),
        "all-reduce": (SHARE, 8, 1),
    }
    assert all("shard_map" in c.source for c in found.collectives)


def test_loops_multiply():
    def inner(x, _):
        return jax.lax.psum(x, "data") * 0.5, None

    def outer(x, _):
        x = jax.lax.scan(inner, x, None, length=3)[0]
        return jax.lax.psum(x, "expert"), None

    found = sent(lambda x: jax.lax.scan(outer, x, None, length=5)[0])
    assert sorted((c.axes, c.runs) for c in found.collectives) == [(("data",), 15), (("expert",), 5)]
    assert found.by_axes() == {("data",): 15 * SHARE, ("expert",): 5 * 1.5 * SHARE}
    assert found.unbounded == 0


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    def local(x):
        return gather(jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jax.lax.psum(x, "data"), x))[:ROWS]

    found = sent(local)
    assert found.unbounded == 1
    assert found.by_kind() == {"all-reduce": SHARE, "all-gather": 3 * SHARE}
    assert found.known().by_kind() == {"all-gather": 3 * SHARE} and found.known().unbounded == 0

    def silent(x):
        return gather(jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x * 2, x))[:ROWS]

    assert sent(silent).unbounded == 0  # what sends nothing need not be known


def test_of_branches_the_larger_counts():
    def local(x):
        return jax.lax.cond(x.sum() > 0, lambda x: jax.lax.psum(x, "data"), lambda x: jax.lax.psum(x, ALL), x)

    assert sent(local).by_axes() == {ALL: 1.75 * SHARE}


def test_an_all_reduce_that_is_only_sliced_is_a_reduce_scatter():
    """Of bfloat16, too, as the program has it, where the CPU sends float32."""
    mesh = jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((16, 8 * ROWS), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, ALL)))

    def product(x, whole):
        y = jax.lax.with_sharding_constraint(x @ x.T, NamedSharding(mesh, P(ALL)))
        return (y, jax.lax.with_sharding_constraint(x @ x.T, NamedSharding(mesh, P()))) if whole else y

    def of(whole):
        compiled, text = compile_in_sight(jax.jit(product, static_argnums=1).lower(x, whole))
        return traffic(compiled).by_kind(), traffic(text).by_kind()

    nbytes = 16 * 16 * 2
    as_cpu, as_written = of(False)
    assert as_written == {"reduce-scatter": nbytes * 7 / 8}
    assert set(as_cpu) == {"all-reduce"} and as_cpu["all-reduce"] == 2 * 2 * nbytes * 7 / 8
    assert of(True)[1]["all-reduce"] == 2 * nbytes * 7 / 8  # the whole is wanted


BEGUN = """
HloModule begun, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%wrapped (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %exchanged = bf16[8,4]{1,0} all-to-all(%p), replica_groups=[2,4]<=[8], dimensions={0}
}

%limit (p: (s32[], f32[4])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  %p = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %m = s32[]{:T(128)} copy(%n)
  ROOT %lt = pred[]{:T(512)} compare(%i, %m), direction=LT
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %x = f32[4]{0:T(128)} get-tuple-element(%p), index=1
  %r = f32[4]{0:T(128)} all-reduce-start(%x), replica_groups=mesh['data'=2,'expert'=4] {'data'}, to_apply=%sum
  %d = f32[4]{0:T(128)} all-reduce-done(%r)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %t = (s32[]{:T(128)}, f32[4]{0:T(128)}) tuple(%i, %d)
}

ENTRY %main (x: bf16[8,4], y: (s32[], f32[4])) -> bf16[32,4] {
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %y = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(1)
  %w = (s32[]{:T(128)}, f32[4]{0:T(128)}) while(%y), condition=%limit, body=%body
  %s = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[]) collective-permute-start(%x), source_target_pairs={{0,4},{4,0}}
  %sd = bf16[8,4]{1,0} collective-permute-done(%s)
  %b = ((bf16[8,4]{1,0}), bf16[8,4]{1,0}, u32[]) async-start(%sd), calls=%wrapped
  %u = ((bf16[8,4]{1,0}), bf16[8,4]{1,0}, u32[]) async-update(%b), calls=%wrapped
  %bd = bf16[8,4]{1,0} async-done(%u), calls=%wrapped
  %two = ((bf16[8,4]{1,0}, /*index=1*/s8[2,4]{1,0}), (bf16[32,4]{1,0}, s8[8,4]{1,0})) all-gather-start(%bd, %z), \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %twod = bf16[32,4]{1,0} all-gather-done(%two)
}
""".replace("\\\n", "")


def test_what_is_begun_and_done_counts_once_in_an_accelerators_spelling():
    found = traffic(BEGUN, SIZES)
    assert [(c.kind, c.nbytes, c.group, c.axes, c.runs) for c in found.collectives] == [
        ("all-reduce", 16, 2, ("data",), 7),  # the compiler leaves the length of its loops to their conditions
        ("collective-permute", 64, 2, ("data",), 1),
        ("all-to-all", 64, 4, ("expert",), 1),
        ("all-gather", 256 + 32, 4, ("expert",), 1),
    ]
    assert found.unbounded == 0


@pytest.mark.parametrize(
    "spelled, group",
    [
        ("{{0,4},{1,5}}", [0, 4]),
        ("[4,2]<=[8]", [0, 1]),
        ("[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("[2,4]<=[2,2,2]T(1,0,2)", [0, 1, 4, 5]),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [0, 1, 4, 5]),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [0, 4]),
    ],
)
def test_groups_of_devices(spelled, group):
    assert first_group(f"channel_id=1, replica_groups={spelled}, dimensions={{0}}", 8) == group


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="'no program' is not a program"):
        traffic("no program")
    with pytest.raises(ValueError, match="replica_groups=here"):
        first_group("replica_groups=here", 8)
