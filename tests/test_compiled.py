"""A training step of mini and a layer of V3, compiled for H100s and a TPU v6e, keep to bars.

The compilers come with the extras plan-gpu and plan-tpu (`make compilers`); without them these
tests are skipped. Nothing runs: the bars hold of the programs' texts, as
`experiments/accel/program.py` reads them.
"""

import contextlib
import re
import warnings
from dataclasses import replace

import jax
import pytest

from dsv3_jax.config import ConfigError, Execution
from dsv3_jax.kernels import choose, table
from dsv3_jax.kernels.gpu import tokamax_library
from dsv3_jax.ops.cached_attention import Stored
from dsv3_jax.planning import devices
from dsv3_jax.planning.cost import choose_kernels, decode_cost, train_cost
from dsv3_jax.presets import preset, recipe
from experiments.accel.kernels import gpu_latent_attention
from experiments.accel.program import additions, read_program

# Without its dense layer, whose attention would be compiled once more: 8 sparse layers in a loop.
CFG = replace(recipe("mini").model, num_dense_layers=0)
RUN = replace(recipe("mini"), model=CFG, execution=Execution(compute_dtype="bfloat16"))
GPU = "gpu:h100"
GPU8 = "gpu:h100:8"


def mesh_of(target: str, **sizes: int):
    try:
        return devices.target_mesh(target, {"data": 1, "expert": 1, "tensor": 1} | sizes)
    except ConfigError as error:
        pytest.skip(str(error))


@contextlib.contextmanager
def as_libraries_do():
    """Libraries' kernels promote, and warn, as they like; so does a bfloat16 router."""
    promote = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with warnings.catch_warnings(), promote[0], promote[1]:
        warnings.simplefilter("ignore")
        yield


def stop(*_):
    raise InterruptedError


def compile_step(target: str, rows: int, compile=jax.stages.Lowered.compile):
    """(The step's cost, the text given to the compiler); the program is one device's, of `rows`."""
    mesh, texts, cost = mesh_of(target), [], None

    def record(lowered, *options):
        texts.append(lowered.as_text(dialect="hlo"))
        return compile(lowered, *options)

    run = replace(RUN, data=replace(RUN.data, batch_size=rows))
    with pytest.MonkeyPatch.context() as patch, as_libraries_do():
        patch.setattr(jax.stages.Lowered, "compile", record)
        with contextlib.suppress(InterruptedError):
            cost = train_cost(run, mesh, target=target)
    return cost, texts[-1]


SPLASH = ["gmm", "ragged-dot", "splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"]
TRAINING = {  # target: rows of a batch, launches for each layer, kernels in the compiled program
    GPU: (8, 260, 6 * ['="mosaic_gpu']),  # of the experts
    "tpu:v6e:2x2": (1, 470, SPLASH),
}


@pytest.mark.long
def test_training_on_a_tpu_is_lowered_to_its_kernels():
    """Every day, since compiling takes minutes; scatters add in no float narrower than float32."""
    target = "tpu:v6e:2x2"
    _, lowered = compile_step(target, TRAINING[target][0], stop)
    assert additions(lowered) and not [a for a in additions(lowered) if a.narrow]
    # three of attention and two of the experts, whose third product is XLA's own
    assert lowered.count('custom_call_target="tpu_custom_call"') == 5
    assert all(name in lowered for name in ("splash_attention", "gmm", "ragged"))


@pytest.mark.rare
@pytest.mark.parametrize("target", TRAINING, ids=["h100", "v6e"])
def test_training_keeps_to_its_bars(target):
    """`launches`: the most for each layer; a TPU's are of one program, and cost less."""
    rows, launches, kernels = TRAINING[target]
    cost, lowered = compile_step(target, rows)
    assert cost.text, cost.compile_error
    program = read_program(cost.text)
    assert program.launches <= launches * CFG.num_layers
    assert target != GPU or program.nbytes <= 31.9e9
    assert cost.fits(devices.ACCELERATORS[devices.parse_target(target).kind].memory)
    # Scatters add in no float narrower than float32, neither as asked for nor as compiled. A GPU
    # adds in one order, so two runs of one seed give the same bits.
    added = [*additions(lowered), *additions(cost.text)]
    assert not [a for a in added if a.narrow or (target == GPU and not a.unique)]
    assert all(cost.text.count(name) >= kernels.count(name) for name in kernels)
    # Without tokamax attention is XLA's loop, which computes blocks on the diagonal whole.
    hopper = choose.Target("cuda", chip=tokamax_library.HOPPER)
    alone = target == GPU and tokamax_library.why_not(hopper)
    assert program.flops <= (1.12 if alone else 1.1) * cost.flops
    assert program.unknown_work() or program.flops >= 0.9 * cost.flops


@pytest.mark.long
@pytest.mark.parametrize("target", ["tpu:v5p:2x2x1", "tpu:v5e:2x2", "tpu:v6e:2x2"])
def test_a_chips_memory_is_what_its_compiler_allows(target):
    """libtpu names its limit where a program needs more."""
    mesh = mesh_of(target)
    placed = jax.NamedSharding(mesh, jax.P())
    too_large = jax.ShapeDtypeStruct((30 * 10**9,), "float32", sharding=placed)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as error:
        jax.jit(jax.numpy.negative).lower(too_large).compile()
    limit = float(re.findall(r"([\d.]+)G\)", str(error.value))[-1]) * 2**30
    memory = devices.ACCELERATORS[devices.parse_target(target).kind].memory
    assert memory == pytest.approx(limit, rel=2e-3)


LATENT = "cached_attention=latent"
DECODING = [  # target, model, sequences, blocks, most of what must be read, launches, kernels
    (GPU, "v2_lite", 1, 1, 1.13, 36, "auto"),
    (GPU, "v2_lite", 32, 1, 1.27, 33, "auto"),  # 1.22 with all 27 layers: w_down is padded in one
    (GPU, "v2_lite", 128, 1, 1.11, 30, LATENT),
    # on a mesh of 8; XLA reads latents twice, once for scores and once for sums
    (GPU8, "v2_lite", 256, 1, 1.67, 41, "auto"),
    (GPU8, "v2_lite", 256, 1, 1.3, 40, LATENT),
]


@pytest.mark.long
@pytest.mark.parametrize(
    "target, name, batch, blocks, most, launches, kernels",
    [("tpu:v6e:1x1", "mini", 32, 8, 1.1, 140, "auto")]
    + [pytest.param(*case, marks=pytest.mark.rare) for case in DECODING],
)
def test_a_decoding_step_reads_what_it_must(
    monkeypatch, target, name, batch, blocks, most, launches, kernels
):
    """Sequences of 4,096 tokens, by 3 layers; a TPU's cache has 8 blocks. "latent" waits."""
    mesh = mesh_of(target, expert=8 if target == GPU8 else 1)
    monkeypatch.setattr(table, "TABLE", dict(table.TABLE))
    gpu_latent_attention.add()
    cfg = replace(preset(name), num_layers=3)
    execution = Execution(compute_dtype="bfloat16", kernels=kernels)
    with as_libraries_do():
        cost = decode_cost(cfg, execution, mesh, batch, 4096, target=target)
    program = read_program(cost.text)
    read = sum(x.nbytes * x.runs * (1 if x.known else blocks) for x in program.all_launches)
    assert read <= most * cost.bytes_read
    assert program.launches <= launches * cfg.num_layers
    assert len(program.unknown_loops) == (blocks > 1) * cfg.num_layers


@pytest.mark.long
def test_sparse_decoding_reads_no_whole_cache():
    """V3's heads, V3.2's indexer, 8 sequences of 64K tokens; index keys are most of what moves."""
    mesh = mesh_of(GPU)
    kernels = choose_kernels(Execution(compute_dtype="bfloat16"), mesh)
    batch, slots, k = 8, 65536, 2048

    def array(*shape, dtype="bfloat16"):
        placed = jax.NamedSharding(mesh, jax.P())
        return jax.ShapeDtypeStruct((batch, 1, *shape), dtype, sharding=placed)

    def attend(q, w, keys, last, queries, rows):
        ids = kernels("index_choose", q, w, keys, last, k=k)
        return kernels("sparse_attention", queries, rows, rows[0], ids, scale=1.0)

    key, *rows = (Stored(array(slots, width), None) for width in (128, 512, 64))
    queries = [array(1, 128, width) for width in (512, 64)]
    with jax.set_mesh(mesh):
        args = array(64, 128), array(64), key, array(dtype="int32"), queries, rows
        program = read_program(jax.jit(attend).lower(*args).compile())
    assert program.nbytes <= 3.7 * 2 * batch * (slots * 128 + k * 576) and program.launches <= 16
