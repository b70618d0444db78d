"""Mini's steps, compiled for devices that are not here, keep to bars.

An H100 trains and decodes. A TPU v6e trains and a v5p decodes: all TPUs run the same kernels.

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

pytestmark = pytest.mark.long

BFLOAT16 = Execution(compute_dtype="bfloat16")
# Without its dense layer, whose attention would be compiled once more: 8 sparse layers in a loop.
CFG = replace(recipe("mini").model, num_dense_layers=0)
RUN = replace(recipe("mini"), model=CFG, execution=BFLOAT16)
ROWS, CONTEXT = 32, 4096
GPU, V6E, V5P = "gpu:h100", "tpu:v6e:2x2", "tpu:v5p:2x2x1"  # the programs are one device's
TRAINED = {GPU: 8, V6E: 1}  # rows of mini's batch that a GPU, or a chip of two hosts of four, trains on
LANES = 128  # of a TPU's vector register
# Launches of a step over the number of layers: embedding, loss and optimizer are in it. A TPU's are instructions of one
# program, which cost less than a GPU's kernels.
MOST_LAUNCHES = {"train": {GPU: 300, V6E: 560}, "decode": {GPU: 60, V5P: 160}}
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


CASES = [(kind, target) for kind, targets in MOST_LAUNCHES.items() for target in targets]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}_{case[1].split(':')[1]}")
def case(request):
    return *request.param, compile_step(*request.param)


def test_the_program_does_the_work_of_the_formula_and_fits(case):
    (kind, target, step), most, padded = case, 1.1, 1.0
    if (kind, target) == ("train", GPU) and tokamax_library.why_not(Target("cuda", chip=tokamax_library.HOPPER)):
        most = 1.12  # attention is XLA's loop then, which computes blocks on the diagonal whole
    if kind == "decode" and target != GPU:  # a TPU's cache has rows of whole lanes; mini's are short: 160 → 256 numbers
        row = CFG.kv_latent_dim + CFG.rope_head_dim
        padded = -(-row // LANES) * LANES / row
    assert step.program.flops <= most * padded * step.cost.flops
    # A GPU multiplies few rows by their experts without a product, which counts as nothing: 17 % of this step's work.
    least = 0.8 if (kind, target) == ("decode", GPU) else 0.9
    if not step.program.unknown_work():
        assert step.program.flops >= least * step.cost.flops
    assert step.program.launches / CFG.num_layers <= MOST_LAUNCHES[kind][target]
    assert step.cost.fits(devices.DEVICES[devices.parse_target(target).kind].memory)


def test_additions_lose_no_bits_and_have_one_order_on_a_gpu(case):
    """Scatters add in no float narrower than float32, neither as asked for nor as compiled.

    With one order two runs of one seed give the same bits.
    """
    _, target, step = case
    found = [a for text in (step.lowered, step.cost.text) for a in additions(text)]
    assert [a for a in found if a.narrow or (target == GPU and not a.unique)] == []


def test_decoding_copies_neither_experts_nor_cache_and_has_no_loop_of_unknown_length(case):
    kind, _, step = case
    if kind == "decode":
        copies = step.program.copies()
        assert [(x.moved, x.runs, x.source) for x in copies if x.moved >= min(LAYER_EXPERTS, LAYER_CACHE)] == []
        assert step.program.unknown_loops == ()
