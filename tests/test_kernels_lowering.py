"""The programs of a training step and of decoding, lowered on this host for platforms, and read.

Programs for accelerators hold only plain XLA; those for the CPU call the C++. Two runs of one seed
give the same bits on a GPU: no float is added to in any order. A scatter that adds floats is
ordered only if its indices are unique. The router's products are exact. The backward pass
recomputes attention once.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from models import decode_program, needs_cpp, small
from runs import make_run

from dsv3_jax.config import Execution, replace
from dsv3_jax.kernels.choose import Kernels, prepare
from dsv3_jax.kernels.xla.in_order import look_up_in_order
from dsv3_jax.model.transformer import abstract
from dsv3_jax.ops import embedding
from dsv3_jax.training.state import Job, abstract_state
from dsv3_jax.training.step import make_step

BATCH, LENGTH = 2, 16
CFG = small(num_layers=2, mtp_depth=1)
DENSE = "grouped_swiglu=dense"
CPP = "@dsv3_"  # of every call of the C++ kernels, see kernels/cpu/library.py
# of a loop in a jaxpr whose length depends on data: blocks of rows, drafts, visits to experts
LOOP = "while["
SCATTER = re.compile(
    r'"stablehlo\.scatter"\(.*?unique_indices = (true|false)\}> \(\{(.*?)\}\) : ', re.DOTALL
)
FLOAT_ADD = re.compile(r"stablehlo\.add .* : tensor<b?f\d+>")


def train_step(execution: Execution, platform: str, cfg=CFG, microbatches: int = 1):
    """A step, traced with a platform's kernels."""
    run = make_run("nowhere", model=cfg, execution=execution)
    run = replace(run, optim=replace(run.optim, microbatches=microbatches))
    ids = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    batch = dict.fromkeys(("tokens", "segment_ids", "positions"), ids)
    step = make_step(Job(run, kernels=prepare(execution, platform=platform)))
    return step.trace(abstract_state(Job(run)), batch)


def decode_loop(execution: Execution, platform: str):
    """All of a request after the prompt, with the model's own heads as drafters."""
    model = abstract(CFG, execution, prepare(execution, platform=platform))
    sizes = BATCH, 5, 32, execution.compute_dtype
    made, leaves, loop = decode_program(model, "mtp", 2, *sizes)
    return made.decode.trace(leaves, loop, jax.ShapeDtypeStruct((), jnp.int32))


def text_of(traced, platform: str) -> str:
    return traced.lower(lowering_platforms=(platform,)).as_text()


# which implementations


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


@pytest.mark.long
@pytest.mark.parametrize("program", [train_step, decode_loop])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_run_plain_xla(rows, program, platform):
    execution = Execution("bfloat16", "full") if platform == "tpu" else Execution()
    traced = program(execution, platform)
    text, picked = text_of(traced, platform), {op: name for op, name, _ in rows}
    assert CPP not in text
    assert all(platform in platforms for _, _, platforms in rows)
    if program is train_step:
        expected = {"tpu": "ragged_dot", "cuda": "row_blocks"}[platform]
        assert picked["grouped_swiglu"] == expected
        assert ("ragged_dot" in text) == (platform == "tpu")
        assert LOOP not in str(traced.jaxpr)  # no loop over blocks of rows, wherever from
    else:
        assert picked["cached_attention"] == "xla"
        # a token and its drafts are several rows
        experts = {name for op, name, _ in rows if op == "decode_experts"}
        assert (
            experts
            and experts <= {"tpu": {"ragged_dot"}, "cuda": {"by_row", "row_blocks"}}[platform]
        )


IN_TRAINING = ("causal_attention_gradients", "experts_swiglu_gradients")
IN_DECODING = ("cached_attention", "decode_experts", "small_batch_matmul", "small_batch_by_head")


@pytest.mark.long
@needs_cpp
@pytest.mark.parametrize("program, names", [(train_step, IN_TRAINING), (decode_loop, IN_DECODING)])
def test_the_cpu_calls_cpp(program, names):
    text = text_of(program(Execution(), "cpu"), "cpu")
    assert not [name for name in names if CPP + name not in text]


# the order of additions, and what is exact


def unordered_adds(text: str) -> list[str]:
    """The scatters that add floats at indices that may repeat."""
    scatters = SCATTER.findall(text)
    assert len(scatters) == text.count('"stablehlo.scatter"')
    return [body for unique, body in scatters if unique == "false" and FLOAT_ADD.search(body)]


@pytest.mark.long
def test_a_training_step_adds_floats_in_one_order():
    gqa = {"attention": "gqa", "num_kv_heads": 1, "tie_embeddings": True, "mtp_kind": "meta"}
    execution = Execution("bfloat16", "full", DENSE)
    traced = train_step(execution, "cuda", replace(CFG, **gqa), microbatches=2)
    assert unordered_adds(text_of(traced, "cuda")) == []


@pytest.mark.parametrize(("look_up", "adds"), [(embedding.look_up, 1), (look_up_in_order, 0)])
def test_what_the_test_above_looks_for_is_there_to_be_found(look_up, adds):
    table = jax.ShapeDtypeStruct((11, 4), jnp.float32)
    tokens = jax.ShapeDtypeStruct((5,), jnp.int32)
    traced = jax.jit(jax.grad(lambda t, i: look_up(t, i).sum())).trace(table, tokens)
    assert len(unordered_adds(text_of(traced, "cuda"))) == adds


@pytest.mark.long
def test_the_routers_product_is_exact():
    """Forward and both of its gradients, in the training step.

    Nothing else is but the sums of the embedding's gradient on a GPU, two products.
    """
    cfg = replace(CFG, mtp_depth=0)
    text = text_of(train_step(Execution("bfloat16", kernels=DENSE), "cuda", cfg), "cuda")
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    exact = [line for line in dots if "HIGHEST" in line]
    tokens, dim, experts = BATCH * LENGTH, cfg.dim, cfg.num_experts
    results = [sorted(map(int, re.findall(r"\d+(?=x)", line.split("->")[1]))) for line in exact]
    for shape in (tokens, experts), (tokens, dim), (dim, experts):
        assert results.count(sorted(shape)) == 1
    assert len(exact) == 5 and len(dots) > 2 * len(exact)


# a scan over dense layers, one over sparse layers, and a head: each calls attention once
BLOCKS = 3


@pytest.mark.long
@needs_cpp
def test_attention_runs_forward_once():
    """On a GPU counted by the division [B, H, T, V] that ends it. A head has 15 positions."""
    cfg = replace(CFG, num_layers=5)  # two scans: remat unrolls none
    gpu, cpu = (Execution(remat="attention", kernels=f"{of},{DENSE}") for of in ("xla", "auto"))
    shape = rf"2x{cfg.num_heads}x1[56]x{cfg.v_head_dim}xf32"
    text = text_of(train_step(gpu, "cuda", cfg), "cuda")
    assert len(re.findall(rf"stablehlo\.divide .* : tensor<{shape}>", text)) == BLOCKS
    text = text_of(train_step(cpu, "cpu", cfg), "cpu")
    assert text.count("@dsv3_causal_attention_gradients(") == BLOCKS
    assert text.count("@dsv3_causal_attention(") == BLOCKS
