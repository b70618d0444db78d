"""Programs for accelerators, lowered here, hold only plain XLA; those for the CPU call the C++."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from models import decode_program, small
from runs import make_run

from dsv3_jax.config import Execution
from dsv3_jax.kernels.choose import Kernels, prepare
from dsv3_jax.model.transformer import abstract
from dsv3_jax.training.state import Job, abstract_state
from dsv3_jax.training.step import make_step

pytestmark = pytest.mark.long

BATCH, LENGTH = 2, 16
CFG = small(num_layers=2, mtp_depth=1)
RUN = make_run("nowhere", model=CFG)
CPP = "@dsv3_"  # of every call of the C++ kernels, see kernels/cpu/library.py
# of a loop in a jaxpr whose length depends on data: blocks of rows, drafts, visits to experts
LOOP = "while["


@pytest.fixture
def rows(monkeypatch) -> set[tuple[str, str, tuple[str, ...]]]:
    """(op, implementation, its platforms) of all that were picked."""
    picked, pick = set(), Kernels.pick

    def spy(self, op, *arrays, **settings):
        row = pick(self, op, *arrays, **settings)
        picked.add((op, row.name, row.platforms))
        return row

    monkeypatch.setattr(Kernels, "pick", spy)
    return picked


def train_step(execution: Execution, kernels: Kernels):
    run = replace(RUN, execution=execution)
    batch = dict.fromkeys(
        ("tokens", "segment_ids", "positions"), jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    )
    return make_step(Job(run, kernels=kernels)).trace(abstract_state(Job(run)), batch)


def decode_loop(execution: Execution, kernels: Kernels):
    """All of a request after the prompt, with the model's own heads as drafters."""
    model = abstract(CFG, execution, kernels)
    made, leaves, loop = decode_program(
        model, "mtp", 2, BATCH, LENGTH, 5, 32, execution.compute_dtype
    )
    return made.decode.trace(leaves, loop, jax.ShapeDtypeStruct((), jnp.int32))


PROGRAMS = {"training step": train_step, "decoding loop": decode_loop}


def lowered(program: str, platform: str, execution: Execution) -> tuple[str, str]:
    """(The jaxpr, the program's text)."""
    kernels = prepare(execution, platform=platform)
    if platform == "cpu" and execution.kernels == "auto" and kernels.missing:
        pytest.skip(kernels.missing[0][1])
    traced = PROGRAMS[program](execution, kernels)
    return str(traced.jaxpr), traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_run_plain_xla(rows, program, platform):
    execution = (
        Execution(compute_dtype="bfloat16", remat="full") if platform == "tpu" else Execution()
    )
    jaxpr, text = lowered(program, platform, execution)
    assert CPP not in text
    assert {platforms for _, _, platforms in rows if platform not in platforms} == set()
    picked = {op: name for op, name, _ in rows}
    if program == "training step":
        expected = {"tpu": "ragged_dot", "cuda": "row_blocks"}[platform]
        assert picked["grouped_swiglu"] == expected
        assert ("ragged_dot" in text) == (platform == "tpu")
        assert LOOP not in jaxpr  # no loop over blocks of rows, wherever it may come from
    else:
        assert picked["cached_attention"] == "xla"
        # a token and its drafts are several rows
        experts = {name for op, name, _ in rows if op == "decode_experts"}
        assert experts
        assert experts <= {"tpu": {"ragged_dot"}, "cuda": {"by_row", "row_blocks"}}[platform]


@pytest.mark.parametrize(
    "program, names",
    [
        ("training step", ("causal_attention_gradients", "experts_swiglu_gradients")),
        (
            "decoding loop",
            ("cached_attention", "decode_experts", "small_batch_matmul", "small_batch_by_head"),
        ),
    ],
)
def test_the_cpu_calls_cpp(program, names):
    _, text = lowered(program, "cpu", Execution())
    for name in names:
        assert CPP + name in text, name


def test_the_cpu_without_cpp_loops_over_blocks(rows):
    """So the test of accelerators can see such loops."""
    jaxpr, text = lowered("training step", "cpu", Execution(kernels="xla"))
    assert CPP not in text and LOOP in jaxpr
    assert ("grouped_swiglu", "blocks", ("cpu",)) in rows
