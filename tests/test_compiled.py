"""Mini's steps, compiled for devices that are not here, keep to bars.

An H100 and a TPU v6e train; the rare tests decode on an H100 and a v5p. All TPUs run the same kernels.

The compilers come with the extras plan-gpu and plan-tpu (`make compilers`); without them these tests are skipped.
Nothing runs: the bars hold of the programs' texts, as `experiments/accel/program.py` reads them.
"""

import warnings
from dataclasses import dataclass, replace

import jax
import pytest

from dsv3_jax.config import ConfigError, Execution
from dsv3_jax.kernels.choose import Target
from dsv3_jax.kernels.gpu import tokamax_library
from dsv3_jax.planning import devices
from dsv3_jax.planning.cost import Cost, decode_cost, train_cost
from dsv3_jax.presets import recipe
from experiments.accel.program import Program, additions, read_program

BFLOAT16 = Execution(compute_dtype="bfloat16")
# Without its dense layer, whose attention would be compiled once more: 8 sparse layers in a loop.
CFG = replace(recipe("mini").model, num_dense_layers=0)
RUN = replace(recipe("mini"), model=CFG, execution=BFLOAT16)
ROWS, CONTEXT = 32, 4096
GPU, V6E, V5P = "gpu:h100", "tpu:v6e:2x2", "tpu:v5p:2x2x1"  # the programs are one device's
TRAINED = {GPU: 8, V6E: 1}  # rows of mini's batch that a GPU, or a chip of two hosts of four, trains on
LANES = 128  # of a TPU's vector register
LAYER_EXPERTS = CFG.num_experts * CFG.dim * CFG.expert_dim * 2  # bytes of one matrix of a layer's experts, bfloat16
LAYER_CACHE = ROWS * CONTEXT * (CFG.kv_latent_dim + CFG.rope_head_dim) * 2


@dataclass(frozen=True)
class Step:
    cost: Cost
    lowered: str  # the text that the compiler was given
    program: Program  # and the one that it made


def compile_step(kind: str, target: str) -> Step:
    try:
        mesh = devices.target_mesh(target, {"data": 1, "expert": 1, "tensor": 1})
    except ConfigError as error:
        pytest.skip(str(error))
    texts = []

    def record(lowered, *options, compile=jax.stages.Lowered.compile):
        texts.append(lowered.as_text(dialect="hlo"))
        return compile(lowered, *options)

    # Libraries' kernels promote, and warn, as they like; so does a bfloat16 router.
    promote = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), promote[0], promote[1]:
        warnings.simplefilter("ignore")
        patch.setattr(jax.stages.Lowered, "compile", record)
        if kind == "train":
            cost = train_cost(replace(RUN, data=replace(RUN.data, batch_size=TRAINED[target])), mesh, target=target)
        else:
            cost = decode_cost(CFG, BFLOAT16, mesh, ROWS, CONTEXT, target=target)
    assert cost.text, cost.compile_error
    return Step(cost, texts[-1], read_program(cost.text))


def keeps_to_bars(step: Step, target: str, launches: int) -> None:
    """Assert what holds of training and decoding.

    Args:
        launches: of a step over the number of layers, at most: embedding, loss and optimizer are in it. A TPU's are
            instructions of one program, which cost less than a GPU's kernels.
    """
    assert step.program.launches <= launches * CFG.num_layers
    assert step.cost.fits(devices.DEVICES[devices.parse_target(target).kind].memory)
    # Scatters add in no float narrower than float32, neither as asked for nor as compiled. A GPU adds in one order, so
    # two runs of one seed give the same bits.
    added = [*additions(step.lowered), *additions(step.cost.text)]
    assert not [a for a in added if a.narrow or (target == GPU and not a.unique)]


@pytest.mark.long
@pytest.mark.parametrize(
    "target, launches, kernels",
    [
        (GPU, 300, 6 * ['="mosaic_gpu']),  # of the experts
        (V6E, 560, ["gmm", "ragged-dot", "splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"]),
    ],
    ids=["h100", "v6e"],
)
def test_training_keeps_to_its_bars(target, launches, kernels):
    step = compile_step("train", target)
    keeps_to_bars(step, target, launches)
    assert all(step.cost.text.count(name) >= kernels.count(name) for name in kernels)
    # Without tokamax attention is XLA's loop, which computes blocks on the diagonal whole.
    alone = target == GPU and tokamax_library.why_not(Target("cuda", chip=tokamax_library.HOPPER))
    assert step.program.flops <= (1.12 if alone else 1.1) * step.cost.flops
    assert step.program.unknown_work() or step.program.flops >= 0.9 * step.cost.flops


@pytest.mark.rare
@pytest.mark.parametrize("target, launches", [(GPU, 60), (V5P, 160)], ids=["h100", "v5p"])
def test_decoding_keeps_to_its_bars(target, launches):
    step = compile_step("decode", target)
    keeps_to_bars(step, target, launches)
    copies = [x for x in step.program.copies() if x.moved >= min(LAYER_EXPERTS, LAYER_CACHE)]
    assert not copies and step.program.unknown_loops == ()
    row = CFG.kv_latent_dim + CFG.rope_head_dim
    # A TPU's cache has rows of whole lanes; mini's are short: 160 → 256 numbers. A GPU multiplies few rows by their
    # experts without a product, which counts as nothing: 17 % of this step's work.
    padded, least = (1.0, 0.8) if target == GPU else (-(-row // LANES) * LANES / row, 0.9)
    assert step.program.flops <= 1.1 * padded * step.cost.flops
    assert step.program.unknown_work() or step.program.flops >= least * step.cost.flops
