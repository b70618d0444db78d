"""`dsv3 info --check`: wrong implementations are named, kept by chip and versions, and left out."""

import itertools
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import by_command
from test_grouped_product import gpu_interpreter

from dsv3_jax.config import Execution
from dsv3_jax.kernels import check, check_apart, table, verdicts
from dsv3_jax.kernels.cases import CASES, Draw
from dsv3_jax.kernels.choose import prepare
from dsv3_jax.kernels.table import Implementation
from dsv3_jax.kernels.tpu import attention as tpu_attention
from dsv3_jax.ops import dispatch, products


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(verdicts, "private_folder", lambda: tmp_path)
    return tmp_path


def test_every_op_has_cases():
    assert CASES.keys() == table.TABLE.keys()


def checker(folder, op: str, rows: str) -> list[str]:
    """The command of a process that checks one op: `rows`, in Python, against plain XLA."""
    (folder / "checker.py").write_text(f"""
import os, sys, time
import jax
from dsv3_jax.kernels import check_apart, table
from dsv3_jax.kernels.table import Implementation
from dsv3_jax.ops import dispatch, products

{rows}
reference = [row for row in table.TABLE[{op!r}] if row.name in ("dense", "xla")]
for op in [op for op in table.TABLE if op != {op!r}]:
    del table.TABLE[op]
table.TABLE[{op!r}] = (*ROWS, *reference)
sys.exit(check_apart.main())
""")
    return [sys.executable, str(folder / "checker.py")]


ONE_PERCENT = """
@jax.custom_vjp
def one_percent(w):  # the identity, of which expert 1's gradient is 1 % too large
    return w
one_percent.defvjp(lambda w: (w, None), lambda _, d: (d.at[1].multiply(1.01),))
def wrong(x, ids, gates, w_gate, w_up, w_down):
    return dispatch.grouped_swiglu(x, ids, gates, w_gate, w_up, one_percent(w_down))
ROWS = [Implementation("bad", wrong, fits=lambda *arrays, **settings: True)]
"""


@pytest.mark.long
def test_one_percent_in_one_small_expert_is_found_and_left_out(
    folder, monkeypatch, tmp_path_factory
):
    """Expert 1 has one row in a case. Then "auto" takes the next row, and its line says why."""
    command = checker(tmp_path_factory.mktemp("checker"), "grouped_swiglu", ONE_PERCENT)
    monkeypatch.setattr(check_apart, "COMMAND", command)
    monkeypatch.setattr(check_apart, "SECONDS", 600.0)  # for a machine that is busy
    code, said, _ = by_command("info", "tiny", "--check")
    assert code == 1
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert "WRONG: gradient of w_down[1] is 1.0" in lines.pop("grouped_swiglu=bad")
    bad = Implementation("bad", dispatch.grouped_swiglu, dtypes=("float32",))
    monkeypatch.setitem(table.TABLE, "grouped_swiglu", (bad, *table.TABLE["grouped_swiglu"]))
    kernels = prepare()
    assert kernels.chosen()["grouped_swiglu"] != "bad"
    said = "; not grouped_swiglu=bad, which is wrong here: gradient of w_down[1]"
    assert said in kernels.describe()
    # if it is named
    assert prepare(Execution(kernels="grouped_swiglu=bad")).chosen()["grouped_swiglu"] == "bad"
    (path,) = folder.iterdir()
    kept = json.loads(path.read_text())
    others = (json.dumps(kept | other) for other in ({"versions": {}}, {"wrong": [1]}))
    for text in (path.read_text()[:-9], "[1]", *others):
        path.write_text(text)
        assert prepare().wrong == ()


HANGS = """
def hangs(x, w):
    time.sleep(1000)
def ends(x, w):
    os._exit(3)
def lost(x, w):
    print("a library that prints")
    raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
by_hand = dict(dtypes=("float32",))
like_xla = dict(fits=lambda *arrays, **settings: True)
ROWS = [
    Implementation("ends", ends, **by_hand), Implementation("hangs", hangs, **like_xla),
    Implementation("lost", lost, **like_xla),
    Implementation("good", lambda x, w: products.exact_product(x, w), **like_xla),
]
"""


@pytest.mark.long
def test_a_kernel_that_never_ends_has_a_verdict_and_the_others_are_checked(
    folder, tmp_path_factory
):
    """So has one that ends its process. Each verdict is on disk when the next kernel begins."""
    command = checker(tmp_path_factory.mktemp("checker"), "exact_product", HANGS)
    found, kept = {}, []
    for verdict in check_apart.check_and_keep(Execution(), command=command, seconds=10.0):
        found[verdict.name.removeprefix("exact_product=")] = verdict.wrong
        kept.append(dict(prepare().wrong))
        assert kept[-1].get(verdict.name, "") == verdict.wrong
    assert found.pop("ends") == "it ended with code 3; its last words are above"
    assert found.pop("hangs") == "it did not end in 10 s"
    assert found.pop("lost").startswith("RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS")
    assert "good" in found and not any(found.values())
    assert all(earlier.items() <= later.items() for earlier, later in itertools.pairwise(kept))


def test_a_check_that_is_stopped_leaves_the_kernel_out(folder):
    """Nobody may be there to say that a kernel hangs: it counts as wrong until it ends."""

    def replies(command, seconds):
        if len(command) == len(check_apart.COMMAND) + 1:
            rows = {"product=cpu": True, "product=xla": False}
            yield {"platform": "cpu", "chip": "", "rows": rows}
        else:
            yield {"trying": "product=cpu"}
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(check_apart, "_replies", replies)
        list(check_apart.check_and_keep(Execution()))
    assert dict(prepare().wrong) == {"product=cpu": "its check began and did not end"}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_number_that_is_not_finite_is_wrong(bad):
    op, draw = "exact_product", Draw(jnp.dtype("float32"), np.random.default_rng(0))
    row = Implementation("bad", lambda x, w: products.exact_product(x, w).at[-1, 0].set(bad))
    case, reference = list(CASES[op](draw, False))[1], check.reference_of(op, "none")
    (verdict,) = check._check_case(op, [row], reference, case, draw, "none")
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
}


def marked(name):
    """The one of "mosaic" takes a minute: its interpreter also looks for races of threads."""
    in_ci = name in ("by_product", "one_product", "in_place", "two_rows")
    return pytest.param(name, marks=pytest.mark.long if in_ci else pytest.mark.rare)


@pytest.mark.parametrize("name", [marked(name) for name in KERNELS])
def test_kernels_are_right_where_they_are_interpreted(name):
    platform, op, number, interpreter = KERNELS[name]
    reference = check.reference_of(op, "none")
    row = next(row for row in table.TABLE[op] if row.name == name and platform in row.platforms)
    if name == "splash":
        row = replace(row, run=partial(tpu_attention.causal_attention, interpret=True))
    draw = Draw(jnp.dtype("bfloat16"), np.random.default_rng(0))
    case = list(CASES[op](draw, False))[number]
    # Libraries' kernels promote dtypes as they like.
    with interpreter(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        (verdict,) = check._check_case(op, [row], reference, case, draw, "none")
    assert verdict.name == f"{op}={name}" and not verdict.wrong
