"""The kernels that wait for a Hopper chip equal the op in Pallas' interpreter, and compile."""

import re
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_grouped_product import check, draw, gpu_interpreter
from test_low_precision import by_oracle, close, forward_and_back

from dsv3_jax.config import ConfigError, Execution
from dsv3_jax.kernels import table
from dsv3_jax.kernels.choose import Kernels, Target, prepare
from dsv3_jax.kernels.low_precision import FP8, FP8_UE8M0
from dsv3_jax.planning import devices
from experiments.accel.kernels import hopper_fp8, hopper_products
from experiments.accel.kernels.hopper_fp8 import OnHopper
from experiments.accel.program import read_program

RNG = np.random.default_rng(0)


@pytest.mark.rare
def test_grouped_products_equal_a_loop_over_groups(monkeypatch):
    """Each core takes several tiles in turn; with few rows several steps are in flight."""
    monkeypatch.setattr(hopper_products, "CORES", 2)
    for rows, counts in ((192, [70, 0, 3, 100]), (192, [0, 192, 0, 0]), (128, [0, 9, 1, 110])):
        with gpu_interpreter():
            check(
                hopper_products.HOPPER_PRODUCTS,
                *draw(RNG, rows, 384, 128, 4, jnp.bfloat16),
                counts,
                0.01,
            )


@pytest.mark.rare
@pytest.mark.parametrize("recipe", [FP8, FP8_UE8M0], ids=lambda recipe: recipe.name)
def test_products_of_e4m3_numbers_are_the_recipes(monkeypatch, recipe):
    """Each core takes several tiles of several steps."""
    monkeypatch.setattr(hopper_products, "CORES", 2)
    spread = lambda *shape: RNG.standard_normal(shape) * 2.0 ** RNG.integers(-9, 9, shape)  # noqa: E731
    x, w, dy = (
        a.astype(np.float32) for a in (spread(256, 384), spread(384, 128), spread(256, 128))
    )
    with gpu_interpreter():
        found = forward_and_back(OnHopper(**asdict(recipe)), *map(jnp.asarray, (x, w, dy)))
    for got, want in zip(found, by_oracle(recipe, x, w, dy), strict=True):
        close(got, want)


@pytest.mark.rare
def test_a_linear_layer_on_an_h100_is_three_kernels():
    try:
        mesh = devices.target_mesh("gpu:h100", {"data": 1})
    except ConfigError as error:
        pytest.skip(str(error))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = ((1024, 512), jnp.bfloat16), ((512, 384), jnp.float32), ((1024, 384), jnp.bfloat16)
    arrays = (jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes)
    lowered = forward_and_back.lower(OnHopper(**asdict(FP8)), *arrays)
    dtypes = [a.dtype for a in jax.tree.leaves(lowered.out_info)]
    assert dtypes == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    text = lowered.compile().as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 3
    assert not re.search(r" dot\(|cublas", text)
    assert read_program(text).flops == 3 * 2 * 1024 * 512 * 384


def test_they_enter_the_table_and_run_by_name(monkeypatch):
    monkeypatch.setattr(table, "TABLE", dict(table.TABLE))
    hopper_products.add()
    hopper_fp8.add()
    names = "product=hopper,swiglu=hopper,expand=hopper,grouped_swiglu=mosaic"
    for precision in ("fp8_ue8m0", "none"):
        by_name = Kernels(Target("cuda", "hopper", "9.0", precision)).chosen("bfloat16")
        named = {op for op, name in by_name.items() if name == "hopper"}
        linear = {"grouped_swiglu"} if precision == "none" else {"product", "swiglu", "expand"}
        assert named == linear | {"decode_experts"}  # which has no 8-bit rows
        chosen = Kernels(Target("cuda", "auto", "9.0", precision)).chosen("bfloat16")
        assert "hopper" not in chosen.values()
    kernels = Kernels(Target("cuda", names, "9.0", "fp8_ue8m0"))
    few, many, weight = jnp.ones((100, 128)), jnp.ones((256, 128)), jnp.ones((128, 128))
    assert [kernels.pick("product", x, weight).name for x in (few, many)] == ["fp8_ue8m0", "hopper"]
    assert "hopper" not in kernels.in_compute_dtype.chosen("bfloat16").values()
    with pytest.raises(ConfigError, match="compute capability 9.0"):
        prepare(
            Execution("bfloat16", kernels="product=hopper", precision="fp8"),
            platform="cuda",
            chip="10.0",
        )
