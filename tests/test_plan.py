"""A plan's figures equal a real mesh's arrays, unallocated; invalid options are rejected."""

import gc
from dataclasses import replace

import jax
import pytest
from flax import nnx
from jax.experimental import topologies
from runs import MODEL, fresh_state, make_run, refused

from dsv3_jax.config import Execution, Layout, Lora
from dsv3_jax.mesh import sharding
from dsv3_jax.model.counting import bytes_per_token
from dsv3_jax.planning import cost as costs
from dsv3_jax.planning import devices
from dsv3_jax.planning.cost import Cost, decode_cost, train_cost
from dsv3_jax.planning.devices import ACCELERATORS
from dsv3_jax.planning.plan import PlanOptions, cost_lines, plan
from dsv3_jax.planning.traffic import Collective, Traffic
from dsv3_jax.presets import recipe

PLAIN = replace(MODEL, num_layers=1, mtp_depth=0)
BFLOAT16 = Execution(compute_dtype="bfloat16")
RUN = make_run("nowhere", model=PLAIN, execution=BFLOAT16)
RUN = replace(RUN, data=replace(RUN.data, batch_size=8, seq_len=12))


def on_first_device(state, *mesh: int, fsdp: bool = False) -> dict[str, int]:
    """Bytes of the first device's shards of a state on a mesh, by kind."""
    shardings = sharding.state_sharding(state, sharding.make_mesh(*mesh), fsdp=fsdp)
    state = jax.device_put(state, shardings)
    experts, rest = nnx.split_state(state.params, lambda path, _: "experts" in path, ...)

    def on_first(tree) -> int:
        shards = [shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])

    parts = {"routed experts": experts, "other parameters": rest}
    parts |= {"router bias": state.bias, "optimizer": state.opt}
    return {name: on_first(tree) for name, tree in parts.items()}


@pytest.mark.long
def test_a_training_step_on_a_mesh_of_three_axes():
    run = replace(RUN, execution=replace(BFLOAT16, layout=Layout(fsdp=True, expert_comm="gather")))
    gc.collect()  # arrays of other tests
    before = len(jax.live_arrays())
    cost = train_cost(run, sharding.make_mesh(2, 2, 2))
    assert len(jax.live_arrays()) <= before  # a plan allocates nothing
    held = on_first_device(fresh_state(RUN), 2, 2, 2, fsdp=True)
    # two of eight rows, and the step's number
    assert cost.persistent == held | {"batch": 3 * 2 * 12 * 4 + 4}
    weights = held["routed experts"] + held["other parameters"]
    assert cost.transient == {"gradients": weights}
    assert cost.total == sum(cost.persistent.values()) + cost.temporaries
    sent = cost.sent.by("axes")
    # of float32 shards; a peer sends its shard as bfloat16
    assert weights / 2 < sent[("data",)] < 2 * weights
    assert {"all-gather", "reduce-scatter"} <= set(cost.sent.by("kind"))
    assert cost.sent.unknown_loops == 0
    assert any("expert" in axes for axes in sent) and any("tensor" in axes for axes in sent)


@pytest.mark.long
def test_memory_of_a_decoding_step_equals_the_meshs():
    cfg, mesh = replace(PLAIN, mtp_depth=1), sharding.make_mesh(2, 2)
    cost = decode_cost(cfg, BFLOAT16, mesh, 8, 20, weight_dtype="float32")
    held = on_first_device(fresh_state(RUN), 2, 2)
    del held["optimizer"]
    # a device has two of eight sequences
    cache = 2 * (20 * bytes_per_token(PLAIN, "latent", "bfloat16") + 4)
    own = cost.persistent.pop("layers' own arrays")  # of all but the experts, see prepare_decode
    assert 0 < own < held["other parameters"]
    assert cost.persistent == held | {"cache": cache, "batch": 2 * 4}
    assert 0 < cost.bytes_read < cost.total


@pytest.mark.rare
def test_programs_of_v3_have_the_same_size_at_any_depth(monkeypatch):
    """A program that grew with depth would compile each layer again. Lowering takes seconds."""
    texts = []

    def record_text(lowered):
        texts.append(lowered.as_text())
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: not compiled")

    monkeypatch.setattr(costs, "compile_with_hlo", record_text)
    run, mesh = recipe("v3"), sharding.make_mesh(2, 4)
    execution = replace(run.execution, layout=Layout(fsdp=True, expert_comm="all_to_all"))
    run = replace(run, execution=execution, data=replace(run.data, batch_size=8))
    for layers in (8, 61):
        model = replace(run.model, num_layers=layers)
        train_cost(replace(run, model=model), mesh)
        # tests allow no silent promotion
        decode_cost(model, execution, mesh, 8, 4096, weight_dtype="float32")
    for few, many in zip(texts[:2], texts[2:], strict=True):
        # all but three layers have experts
        assert "<5x256x7168x2048x" in few and "<58x256x7168x2048x" in many
        assert abs(len(many) / len(few) - 1) < 0.01  # longer numbers
    # decoding's few tokens are gathered
    assert "all_to_all" in texts[2] and "all_to_all" not in texts[3]


def example_cost(**changes) -> Cost:
    members = tuple(range(8))
    collectives = [
        Collective("all-gather", 8 * 10**9, members, ("expert",), 2, True),
        Collective("all-reduce", 10**9, (0, 8), ("data",), 1, True),
        Collective("all-gather", 10**9, members, ("expert",), 1, False),
    ]
    cost = Cost(
        "training step", {"data": 2, "expert": 8}, 16, {"parameters": 10**9}, {"gradients": 10**9},
        2e12, 0.0, 3 * 10**9, Traffic(collectives, 1), 1.0,
    )  # fmt: skip
    return replace(cost, **changes)


def test_the_least_time_of_a_step():
    least = example_cost().least_seconds(ACCELERATORS["h800"])
    assert least["FLOPs"] == pytest.approx(2e12 / 989e12)
    # seven eighths of 8 GB, twice, within a node; 1 GB between nodes
    assert least["wire"] == pytest.approx(14e9 / 200e9 + 1e9 / 50e9)
    assert example_cost().least_seconds(ACCELERATORS["v5p"])["wire"] == pytest.approx(15e9 / 600e9)


def test_memory_and_verdict():
    assert example_cost().total == 4 * 10**9
    assert example_cost().fits(4e9)
    assert not example_cost().fits(3.9e9)
    lines = dict(cost_lines(example_cost(), 16, 1, 3e9, ACCELERATORS["h800"]))
    assert lines["  in all"] == "4 GB: does not fit in 3 GB"
    assert lines["    all-gather"] == "14 GB along expert"
    assert lines["    and"] == "875 MB in each iteration of loops of unknown length (1)"
    other = example_cost(temporaries=None, compile_error="It needs 9G.", sent=Traffic([], 0))
    assert not other.fits(1e12)
    lines = dict(cost_lines(other, 16, 1, 1e12, ACCELERATORS["h800"]))
    assert lines["  in all"] == "2 GB and more: the compiler ran out of memory. It needs 9G."


def test_invalid_options_are_rejected_before_compiling(capsys):
    for changes, sentence in (
        (dict(mesh="rows=2"), "mesh='rows=2'"),
        (dict(mesh="data=2", batch=3), "=3 rows are not divisible by mesh data=2"),
        (dict(mesh="data=2", decode_batch=3), "decode_batch=3 is not divisible by the 2 parts of"),
        (dict(context=65), "context=65 is not between 1 and the model's max_positions=64"),
        (dict(weight_dtype="fp8"), "weight_dtype='fp8' is for weights that LoRA freezes"),
        (dict(weight_dtype="int4", only="decode", lora=Lora(2)), "weight_dtype='int4' is for wei"),
        (dict(target="gpu:b200"), "target='gpu:b200': 'b200' is not one of h100"),
    ):
        with refused(sentence):
            plan(PlanOptions(PLAIN, BFLOAT16, **{"seq_len": 12} | changes), RUN, "plain")
    assert capsys.readouterr().out == ""


ONE = {"data": 1, "expert": 1, "tensor": 1}


def test_a_mesh_takes_the_first_devices_of_its_target_which_needs_its_compiler(monkeypatch):
    class Topology:
        devices = jax.devices()[:4]

    def missing(**_):
        raise NotImplementedError("topology not implemented for cuda")

    asked = []
    found = lambda **options: asked.append(options) or Topology  # noqa: E731
    monkeypatch.setattr(topologies, "get_topology_desc", found)
    assert devices.target_mesh("tpu:v6e:2x2", ONE).devices.flat[0] == jax.devices()[0]
    assert asked[-1] == {"platform": "tpu", "topology_name": "v6e:2x2"}
    with refused("mesh=data=8 needs 8 devices, but target='gpu:h100:4' has 4"):
        devices.target_mesh("gpu:h100:4", {"data": 8})
    devices.target_mesh("gpu:h100:16", ONE)
    assert asked[-1]["topology"] == "1x2x8"  # two nodes
    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with refused("'gpu:h100' needs JAX's CUDA plugin .*cuda13-local.* for cuda"):
        devices.target_mesh("gpu:h100", ONE)
