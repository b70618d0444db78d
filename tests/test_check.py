"""`dsv3 info --check`: implementations that are wrong are named, kept by chip and versions, and left out of "auto"."""

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_grouped_product import gpu_interpreter, tpu_interpreter

from dsv3_jax.cli import main
from dsv3_jax.config import Execution
from dsv3_jax.kernels import check, choose, verdicts
from dsv3_jax.kernels.cases import CASES, Draw
from dsv3_jax.kernels.choose import Implementation, prepare
from dsv3_jax.kernels.tpu import attention as tpu_attention
from dsv3_jax.ops import dispatch, products
from experiments.accel.kernels import tpu_latent_attention


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(verdicts, "private_folder", lambda: tmp_path)
    return tmp_path


def test_every_op_has_cases():
    assert CASES.keys() == choose.TABLE.keys()


@jax.custom_vjp
def one_percent(w):
    """The identity, of which expert 1's gradient is 1 % too large."""
    return w


one_percent.defvjp(lambda w: (w, None), lambda _, d: (d.at[1].multiply(1.01),))


@pytest.mark.long
def test_one_percent_in_one_small_expert_is_found_and_left_out(folder, monkeypatch, capsys):
    """Expert 1 has a single row in a case. Afterwards "auto" takes the next row, and its line says why."""

    def wrong(x, ids, gates, w_gate, w_up, w_down):
        return dispatch.grouped_swiglu(x, ids, gates, w_gate, w_up, one_percent(w_down))

    rows = choose.TABLE["grouped_swiglu"]
    bad = Implementation("bad", wrong, dtypes=("float32",))
    monkeypatch.setitem(choose.TABLE, "grouped_swiglu", (bad, *rows))
    monkeypatch.setattr(check, "check", partial(check.check, ops=["grouped_swiglu"]))
    assert main.main(["info", "tiny", "--check"]) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "WRONG: gradient of w_down[1] is 1.0" in lines.pop("grouped_swiglu=bad")
    assert all(" right: " in line for name, line in lines.items() if "=" in name)
    kernels = prepare()
    assert kernels.chosen()["grouped_swiglu"] != "bad"
    assert "; not grouped_swiglu=bad, which is wrong here: gradient of w_down[1]" in kernels.describe()
    assert prepare(Execution(kernels="grouped_swiglu=bad")).chosen()["grouped_swiglu"] == "bad"  # if it is named
    (path,) = folder.iterdir()
    kept = json.loads(path.read_text())
    for text in (path.read_text()[:-9], "[1]", json.dumps(kept | {"versions": {}}), json.dumps(kept | {"wrong": [1]})):
        path.write_text(text)
        assert prepare().wrong == ()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_number_that_is_not_finite_is_wrong(bad):
    op, draw = "exact_product", Draw(jnp.dtype("float32"), np.random.default_rng(0))
    row = Implementation("bad", lambda x, w: products.exact_product(x, w).at[-1, 0].set(bad))
    (verdict,) = check._check_case(
        op, [row], check.reference_of(op, "none"), list(CASES[op](draw, False))[1], draw, "none"
    )
    assert "exact_product[2] is inf% off" in verdict.wrong


KERNELS = {  # the platform, the op, and which of its cases Pallas' interpreter runs within seconds
    "mosaic": ("cuda", "grouped_swiglu", 0, gpu_interpreter),
    "by_row": ("cuda", "decode_experts", 1, nullcontext),
    "large_blocks": ("cuda", "causal_attention", 3, nullcontext),
    "splash": ("tpu", "causal_attention", 3, nullcontext),
    "ragged_dot": ("tpu", "grouped_swiglu", 2, nullcontext),
    "select": ("tpu", "write_rows", 1, nullcontext),
    "by_product": ("tpu", "rotate_last", 0, nullcontext),
    "one_product": ("tpu", "expand", 0, nullcontext),
    "in_place": ("cuda", "expand", 0, nullcontext),
    "two_rows": ("cuda", "swiglu", 2, nullcontext),
    "latent": ("tpu", "cached_attention", 1, tpu_interpreter),
}

IN_CI = ("mosaic", "splash", "latent", "by_product", "one_product", "in_place", "two_rows")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in IN_CI else pytest.mark.rare) for name in KERNELS]
)
def test_kernels_are_right_where_they_are_interpreted(monkeypatch, name):
    platform, op, number, interpreter = KERNELS[name]
    monkeypatch.setattr(choose, "TABLE", dict(choose.TABLE))
    tpu_latent_attention.add()
    reference = check.reference_of(op, "none")
    row = next(row for row in choose.TABLE[op] if row.name == name and platform in row.platforms)
    if name == "splash":
        row = replace(row, run=partial(tpu_attention.causal_attention, interpret=True))
    draw = Draw(jnp.dtype("bfloat16"), np.random.default_rng(0))
    case = list(CASES[op](draw, False))[number]
    # Libraries' kernels promote dtypes as they like.
    with interpreter(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        (verdict,) = check._check_case(op, [row], reference, case, draw, "none")
    assert verdict.name == f"{op}={name}" and not verdict.wrong
