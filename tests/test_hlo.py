"""The traffic of programs equals counts by hand: every collective, in loops and in branches."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from released import GOLDEN
from runs import refused

from dsv3_jax.planning.hlo import compile_with_hlo
from dsv3_jax.planning.traffic import first_group, traffic

SIZES = {"data": 2, "expert": 4}
ROWS, WIDTH = 8, 4  # of a device's shard, float32
SHARE = ROWS * WIDTH * 4
ALL = ("data", "expert")


def make_mesh():
    return jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), axis_types=(AxisType.Auto,) * 2)


def sent(local):
    """Count the traffic of `local`, a function of a device's [ROWS, WIDTH], on a mesh of SIZES."""
    mesh = make_mesh()
    x = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P(ALL)))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=P(ALL), out_specs=P(ALL), check_vma=False)
    return traffic(jax.jit(sharded).lower(x).compile(), SIZES)


def gather(x):
    return jax.lax.all_gather(x, "expert", axis=0, tiled=True)


def test_each_kind_by_its_formula():
    def local(x):
        x = jax.lax.psum_scatter(gather(x), "expert", scatter_dimension=0, tiled=True)
        x = jax.lax.all_to_all(x, "data", 0, 0, tiled=True)
        x = jax.lax.ppermute(jnp.sin(x), "data", [(0, 1), (1, 0)])
        return jax.lax.psum(x, ALL)

    counted = sent(local)
    assert counted.by("kind") == {
        "all-gather": 3 * SHARE,  # each device forwards three other shards
        "reduce-scatter": 3 * SHARE,
        "all-to-all": SHARE / 2,  # half stays
        "collective-permute": SHARE,
        "all-reduce": 2 * SHARE * 7 / 8,
    }
    assert counted.by("axes") == {("expert",): 6 * SHARE, ("data",): 1.5 * SHARE, ALL: 1.75 * SHARE}


def test_loops_multiply_and_one_of_unknown_length_counts_once():
    over_data, over_all = (lambda x, axes=axes: jax.lax.psum(x, axes) for axes in ("data", ALL))

    def inner(x, _):
        return over_data(x) * 0.5, None

    def outer(x, _):
        x = jax.lax.scan(inner, x, None, length=3)[0]
        return jax.lax.psum(x, "expert"), None

    def local(x):
        x = jax.lax.scan(outer, x, None, length=5)[0]
        x = jax.lax.cond(x.sum() > 0, over_data, over_all, x)
        x = jax.lax.while_loop(lambda x: x.sum() < 9, over_data, x)
        x = jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x * 2, x)
        return gather(x)[:ROWS]

    counted = sent(local)
    known = {("data",): 15 * SHARE, ("expert",): (5 * 1.5 + 3) * SHARE, ALL: 1.75 * SHARE}
    assert counted.known().by("axes") == known
    assert counted.by("axes") == known | {("data",): 16 * SHARE}
    assert counted.unknown_loops == 1


def test_an_all_reduce_that_is_only_sliced_is_a_reduce_scatter():
    """Also in the program's bfloat16, although the CPU sends float32."""
    mesh = make_mesh()
    columns, rows, whole = (NamedSharding(mesh, spec) for spec in (P(None, ALL), P(ALL), P()))
    x = jax.ShapeDtypeStruct((16, 8 * ROWS), jnp.bfloat16, sharding=columns)

    def by_kind(*results):
        def product(x):
            return [jax.lax.with_sharding_constraint(x @ x.T, where) for where in results]

        compiled, text = compile_with_hlo(jax.jit(product).lower(x))
        return traffic(compiled).by("kind"), traffic(text).by("kind")

    nbytes = 16 * 16 * 2
    on_cpu, in_hlo = by_kind(rows)
    assert in_hlo == {"reduce-scatter": nbytes * 7 / 8}
    assert on_cpu == {"all-reduce": 2 * 2 * nbytes * 7 / 8}
    # the unsliced result is used too
    assert by_kind(rows, whole)[1]["all-reduce"] == 2 * nbytes * 7 / 8


def test_an_asynchronous_collective_counts_once_in_an_accelerators_hlo():
    counted = traffic((GOLDEN / "asynchronous.hlo").read_text(), SIZES)
    assert [(c.kind, c.nbytes, len(c.devices), c.axes, c.runs) for c in counted.collectives] == [
        ("all-reduce", 16, 2, ("data",), 7),  # the loop's length is only in its condition
        ("collective-permute", 64, 2, ("data",), 1),
        ("all-to-all", 64, 4, ("expert",), 1),
        ("all-gather", 256 + 32, 4, ("expert",), 1),
    ]
    assert counted.unknown_loops == 0


GROUPS = {
    "[2,4]<=[2,2,2]T(1,0,2)": [0, 1, 4, 5],
    "mesh['a'=2,'b'=2,'c'=2] {'a','c'}": [0, 1, 4, 5],
    "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}": [0, 4],
}


def test_groups_of_devices_and_text_that_is_not_hlo():
    for text, first in GROUPS.items():
        assert first_group(f"channel_id=1, replica_groups={text}, dimensions={{0}}", 8) == first
    with refused("program='no program'"):
        traffic("no program")
    with refused("replica_groups=here"):
        first_group("replica_groups=here", 8)
