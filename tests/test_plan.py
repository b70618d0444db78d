"""A plan's figures equal the arrays of a real mesh; nothing is allocated; invalid options are rejected at once."""

import gc
from dataclasses import replace

import jax
import pytest
from flax import nnx
from runs import MODEL, cheap_compiles, fresh_state, make_run

from dsv3_jax.config import ConfigError, Execution, Layout
from dsv3_jax.mesh import sharding
from dsv3_jax.model.counting import bytes_per_token
from dsv3_jax.planning import cost as costs
from dsv3_jax.planning import devices
from dsv3_jax.planning.cost import Cost, decode_cost, train_cost
from dsv3_jax.planning.devices import DEVICES, parse_bytes
from dsv3_jax.planning.hlo import Collective, Traffic
from dsv3_jax.planning.plan import PlanOptions, _job, describe, plan
from dsv3_jax.presets import recipe
from dsv3_jax.report.units import format_bytes, format_seconds

pytestmark = pytest.mark.long

PLAIN = replace(MODEL, num_layers=1, mtp_depth=0)
BFLOAT16 = Execution(compute_dtype="bfloat16")
RUN = make_run("nowhere", model=PLAIN, execution=BFLOAT16)
RUN = replace(RUN, data=replace(RUN.data, batch_size=8, seq_len=12))


@pytest.fixture(scope="module", autouse=True)
def _cheap(tmp_path_factory):
    assert jax.device_count() == 8  # commands cannot change the devices any more
    with cheap_compiles():
        yield


def bytes_on_first_device(tree) -> int:
    """Add up the bytes of the first device's shards."""
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)


@pytest.fixture(scope="module")
def trained() -> Cost:
    """The cost on a mesh of three axes with weights sharded along all of them."""
    run = replace(RUN, execution=replace(BFLOAT16, layout=Layout(fsdp=True, expert_comm="gather")))
    gc.collect()  # arrays of other tests
    before = len(jax.live_arrays())
    cost = train_cost(run, sharding.make_mesh(2, 2, 2))
    assert len(jax.live_arrays()) <= before  # a plan allocates nothing
    return cost


def test_memory_of_a_training_step_equals_the_meshs(trained):
    state = fresh_state(RUN)
    state = jax.device_put(state, sharding.state_sharding(state, sharding.make_mesh(2, 2, 2), fsdp=True))
    experts, rest = nnx.split_state(state.params, lambda path, _: "experts" in path, ...)
    assert trained.persistent == {
        "routed experts": bytes_on_first_device(experts),
        "other parameters": bytes_on_first_device(rest),
        "router bias": bytes_on_first_device(state.bias),
        "optimizer": bytes_on_first_device(state.opt),
        "batch": 3 * 2 * 12 * 4 + 4,  # two of eight rows, and the step's number
    }
    assert trained.transient == {"gradients": bytes_on_first_device(state.params)}
    assert trained.total == sum(trained.persistent.values()) + trained.temporaries


def test_traffic_of_a_training_step(trained):
    """Every weight is gathered along "data" for use, and its gradient is summed along it."""
    sent = trained.sent.by_axes()
    weights = trained.transient["gradients"]  # of float32 shards; the peer along "data" sends its shard as bfloat16
    assert weights / 2 < sent[("data",)] < 2 * weights
    assert {"all-gather", "reduce-scatter"} <= set(trained.sent.by_kind()) and trained.sent.unknown_loops == 0
    assert any("expert" in axes for axes in sent) and any("tensor" in axes for axes in sent)
    assert trained.flops > 0 and trained.seconds > 0


def test_options_of_a_training_step_reach_its_run():
    options = PlanOptions(PLAIN, BFLOAT16, seq_len=32, moments_dtype="bfloat16", microbatches=3)
    *_, cost = _job("train", options, recipe("tiny"), sharding.parse_mesh("data=1"))
    (run, _) = cost.args
    assert (run.model, run.execution, run.data.batch_size) == (PLAIN, BFLOAT16, 3)
    assert (run.optim.moments_dtype, run.optim.microbatches) == ("bfloat16", 3)


def test_replicas_of_a_model_sum_their_gradients():
    cost = train_cost(replace(RUN, execution=Execution()), sharding.make_mesh(8))
    gradients = 2 * 7 / 8 * cost.transient["gradients"]
    assert gradients <= cost.sent.by_kind()["all-reduce"] < 1.1 * gradients  # the rest are counts


def test_memory_of_a_decoding_step_equals_the_meshs():
    gc.collect()  # arrays of other tests
    before = len(jax.live_arrays())
    cost = decode_cost(replace(PLAIN, mtp_depth=1), BFLOAT16, sharding.make_mesh(2, 2), 8, 20, weight_dtype="float32")
    assert len(jax.live_arrays()) <= before
    state = fresh_state(RUN)
    state = jax.device_put(state, sharding.state_sharding(state, sharding.make_mesh(2, 2)))
    experts, rest = nnx.split_state(state.params, lambda path, _: "experts" in path, ...)
    assert cost.persistent == {
        "routed experts": bytes_on_first_device(experts),
        "other parameters": bytes_on_first_device(rest),
        "router bias": bytes_on_first_device(state.bias),
        "cache": 2 * (20 * bytes_per_token(PLAIN, "latent", "bfloat16") + 4),  # a device has two of eight sequences
        "batch": 2 * 4,
    }
    assert 0 < cost.bytes_read < cost.total


def test_programs_of_v3_have_the_same_size_at_any_depth(monkeypatch):
    """A program that grew with depth would compile each layer again. Lowering alone takes seconds."""
    texts = []

    def record_text(lowered):
        texts.append(lowered.as_text())
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: not compiled")

    monkeypatch.setattr(costs, "compile_with_hlo", record_text)
    run, mesh = recipe("v3"), sharding.make_mesh(2, 4)
    for layers in (8, 61):
        model = replace(run.model, num_layers=layers)
        execution = replace(run.execution, layout=Layout(fsdp=True, expert_comm="all_to_all"))
        train_cost(replace(run, model=model, execution=execution, data=replace(run.data, batch_size=8)), mesh)
        decode_cost(model, execution, mesh, 8, 4096, weight_dtype="float32")  # tests allow no silent promotion
    for few, many in zip(texts[:2], texts[2:], strict=True):
        assert "<5x256x7168x2048x" in few and "<58x256x7168x2048x" in many  # all but three layers have experts
        assert abs(len(many) / len(few) - 1) < 0.01  # longer numbers
    assert "all_to_all" in texts[2] and "all_to_all" not in texts[3]  # decoding's few tokens are gathered


def example_cost(**changes) -> Cost:
    members = tuple(range(8))
    sent = Traffic(
        [
            Collective("all-gather", 8 * 10**9, members, ("expert",), 2, True, ""),
            Collective("all-reduce", 10**9, (0, 8), ("data",), 1, True, ""),
            Collective("all-gather", 10**9, members, ("expert",), 1, False, ""),
        ],
        1,
    )
    cost = Cost(
        "training step", {"data": 2, "expert": 8}, 16, {"parameters": 10**9}, {"gradients": 10**9}, 2e12, 0.0,
        3 * 10**9, sent, 1.0,
    )  # fmt: skip
    return replace(cost, **changes)


def test_the_least_time_of_a_step():
    least = example_cost().least_seconds(DEVICES["h800"])
    assert least["FLOPs"] == pytest.approx(2e12 / 989e12)
    # seven eighths of 8 GB, twice, within a node; 1 GB between nodes
    assert least["wire"] == pytest.approx(14e9 / 200e9 + 1e9 / 50e9)
    assert example_cost().least_seconds(DEVICES["v5p"])["wire"] == pytest.approx(15e9 / 600e9)


def test_memory_and_verdict():
    assert example_cost().total == 4 * 10**9 and example_cost().fits(4e9) and not example_cost().fits(3.9e9)
    lines = dict(describe(example_cost(), 16, 1, 3e9, DEVICES["h800"]))
    assert lines["  in all"] == "4 GB: does not fit in 3 GB"
    assert lines["  other temporaries"] == "2 GB"
    assert lines["    all-gather"] == "14 GB along expert"
    assert lines["    and"] == "875 MB in each iteration of loops of unknown length (1)"
    assert lines["  a step takes at least"] == "90 ms: 2.02 ms for FLOPs, 90 ms for wire"


def test_a_compiler_out_of_memory_is_quoted():
    cost = example_cost(temporaries=None, compile_error="It needs 9G.", sent=Traffic([], 0))
    assert cost.total == 2 * 10**9 and not cost.fits(1e12)
    lines = dict(describe(cost, 16, 1, 1e12, DEVICES["h800"]))
    assert lines["  in all"] == "2 GB and more: the compiler ran out of memory. It needs 9G."
    assert "  sent" not in lines and "  a step takes at least" not in lines


def test_the_command_prints_a_step(capsys):
    args = PlanOptions(PLAIN, BFLOAT16, mesh="data=2,expert=2", device="h800", memory="1MB", only="decode", context=20)
    args = replace(args, weight_dtype="float32")  # tests allow no silent promotion, here of a bfloat16 router
    assert plan(args, RUN, "plain") == 0
    out = capsys.readouterr().out
    assert out.startswith("model                  plain\ndecoding step          128 sequences of 20 tokens on ")
    assert "on data=2,expert=2 (4 devices)" in out
    for part in ("routed experts", "cache", "along expert", "in 1 MB", "takes at least"):
        assert f" {part}" in out, part


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(mesh="rows=2"), "mesh='rows=2'"),
        (dict(mesh="data=3000000000"), "mesh='data=3000000000' .* 65,536 devices"),
        (dict(mesh="data=2", batch=3), "=3 rows are not divisible by mesh data=2"),
        (dict(mesh="expert=3", batch=3), "num_experts=8 is not divisible by mesh"),
        (dict(mesh="data=2", decode_batch=3), "decode_batch=3 is not divisible by the 2 parts of mesh=data=2"),
        (dict(mesh="data=2", decode_mesh="expert=3"), "num_experts=8 is not divisible by mesh"),
        (dict(context=65), "context=65 is not between 1 and the model's max_positions=64"),
        (dict(memory="80"), "memory='80'"),
        (dict(target="tpu:v5p"), "target='tpu:v5p'"),
        (dict(target="gpu:b200"), "target='gpu:b200': 'b200' is not one of h100"),
        (dict(target="tpu:h100:2x2"), "'h100' is not one of v5p, v5e, v6e"),
        (dict(seq_len=65), "seq_len=65 is more than the model's max_positions=64"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_invalid_options_are_rejected_before_compiling(changes, sentence, capsys):
    with pytest.raises(ConfigError, match=sentence):
        plan(PlanOptions(PLAIN, BFLOAT16, **{"seq_len": 12} | changes), RUN, "plain")
    assert capsys.readouterr().out == ""


ONE = {"data": 1, "expert": 1, "tensor": 1}


def test_a_target_needs_its_compiler(monkeypatch):
    from jax.experimental import topologies

    def missing(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(ConfigError, match="'gpu:h100' needs JAX's CUDA plugin .* pip install .*plan-gpu.* for cuda"):
        devices.target_mesh("gpu:h100", ONE)
    with pytest.raises(ConfigError, match="target='tpu:v5p:2x2x1' needs libtpu .* pip install .*plan-tpu"):
        devices.target_mesh("tpu:v5p:2x2x1", ONE)


def fake_topology(monkeypatch, count):
    from jax.experimental import topologies

    class Topology:
        devices = jax.devices()[:count]

    asked = []
    monkeypatch.setattr(topologies, "get_topology_desc", lambda **options: asked.append(options) or Topology)
    return asked


def test_a_mesh_takes_the_first_devices_of_its_target(monkeypatch):
    asked = fake_topology(monkeypatch, 4)
    assert devices.target_mesh("tpu:v6e:2x2", ONE).devices.flat[0] == jax.devices()[0]
    assert asked[-1] == {"platform": "tpu", "topology_name": "v6e:2x2"}
    mesh = devices.target_mesh("gpu:h100:4", {"data": 2, "expert": 2, "tensor": 1})
    assert mesh.shape == {"data": 2, "expert": 2, "tensor": 1} and asked[-1]["topology"] == "1x1x4"
    with pytest.raises(ConfigError, match="mesh=data=8 needs 8 devices, but target='gpu:h100:4' has 4"):
        devices.target_mesh("gpu:h100:4", {"data": 8})
    devices.target_mesh("gpu:h100:16", ONE)
    assert asked[-1]["topology"] == "1x2x8"  # two nodes


def test_units_are_read_and_written():
    assert parse_bytes("80GB") == 80e9 and parse_bytes("1.5 gib") == 1.5 * 2**30
    assert format_bytes(1234567) == "1.235 MB" and format_bytes(12) == "12 B"
    assert format_seconds(0.0123) == "12.3 ms" and format_seconds(2) == "2 s" and format_seconds(2e-6) == "2 µs"
