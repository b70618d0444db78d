"""`dsv3 info --check`: wrong implementations are named, kept by chip and versions, and left out."""

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
from test_dispatch import gpu_interpreter

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


WRONG = """
import sys
import jax
from dsv3_jax.kernels import check_apart, table
from dsv3_jax.kernels.table import Implementation
from dsv3_jax.ops import dispatch

@jax.custom_vjp
def one_percent(w):  # the identity, of which expert 1's gradient is 1 % too large
    return w
one_percent.defvjp(lambda w: (w, None), lambda _, d: (d.at[1].multiply(1.01),))
def bad(x, ids, gates, w_gate, w_up, w_down):
    print("a library that prints")
    return dispatch.grouped_swiglu(x, ids, gates, w_gate, w_up, one_percent(w_down))
def lost(*arrays):
    raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
rows = [Implementation(f.__name__, f, fits=lambda *_, **__: True) for f in (bad, lost)]
(dense,) = [row for row in table.TABLE["grouped_swiglu"] if row.name == "dense"]
table.TABLE.clear()
table.TABLE["grouped_swiglu"] = (*rows, dense)
sys.exit(check_apart.main())
"""


@pytest.mark.long
def test_one_percent_in_one_small_expert_is_found_and_left_out(folder, monkeypatch):
    """Expert 1 has one row in a case. Then "auto" takes the next row, and its line says why."""
    monkeypatch.setattr(check_apart, "COMMAND", [sys.executable, "-c", WRONG])
    monkeypatch.setattr(check_apart, "SECONDS", 600.0)  # for a machine that is busy
    code, said, _ = by_command("info", "tiny", "--check")
    assert code == 1
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert "WRONG: gradient of w_down[1] is 1.0" in lines["grouped_swiglu=bad"]
    assert "WRONG: RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS" in lines["grouped_swiglu=lost"]
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


# Replies as a process that checks gives them.
REPLIES = """
import json, os, sys, time

def say(**reply):
    print(json.dumps(reply), flush=True)

if len(sys.argv) == 2:
    say(platform="cpu", chip="", rows={"op=ends": True, "op=hangs": False, "op=good": False})
else:
    for name in json.loads(sys.argv[2]):
        say(trying=name)
        if name == "op=ends":
            os._exit(3)
        if name == "op=hangs":
            time.sleep(1000)
        say(verdict=[name, 0.0, ""])
say(done=True)
"""


@pytest.mark.long
def test_a_kernel_that_never_ends_has_a_verdict_and_the_others_are_checked(folder):
    """So has one that ends its process. Each verdict is on disk when the next kernel begins."""
    command, found = [sys.executable, "-c", REPLIES], {}
    for verdict in check_apart.check_and_keep(Execution(), command=command, seconds=2.0):
        found[verdict.name] = verdict.wrong
        kept = dict(prepare().wrong)
        assert all(kept.get(name, "") == wrong for name, wrong in found.items())
    assert found == {
        "op=ends": "it ended with code 3; its last words are above",
        "op=hangs": "it did not end in 2 s",
        "op=good": "",
    }


def test_a_check_that_is_stopped_leaves_the_kernel_out(folder, monkeypatch):
    """Nobody may be there to say that a kernel hangs: it counts as wrong until it ends."""

    def replies(command, seconds):
        if len(command) == len(check_apart.COMMAND) + 1:
            rows = {"product=cpu": True, "product=xla": False}
            yield {"platform": "cpu", "chip": "", "rows": rows}
        else:
            yield {"trying": "product=cpu"}
            raise KeyboardInterrupt

    monkeypatch.setattr(check_apart, "_replies", replies)
    with pytest.raises(KeyboardInterrupt):
        list(check_apart.check_and_keep(Execution()))
    assert dict(prepare().wrong) == {"product=cpu": "its check began and did not end"}


def test_one_number_that_is_not_finite_is_wrong():
    op, draw = "exact_product", Draw(jnp.dtype("float32"), np.random.default_rng(0))
    row = Implementation("bad", lambda x, w: products.exact_product(x, w).at[-1, 0].set(np.nan))
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
