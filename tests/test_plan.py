"""A plan's figures against what a mesh really holds; nothing is allocated; what cannot be is refused at once."""

import gc
from dataclasses import replace

import jax
import pytest
from flax import nnx
from runs import MODEL, cheap_compiles, fresh_state, make_run

from dsv3_jax.config import ConfigError, Layout
from dsv3_jax.mesh import sharding
from dsv3_jax.model.cache import empty_cache
from dsv3_jax.planning import cost as costs
from dsv3_jax.planning import devices
from dsv3_jax.planning.cost import Cost, decode_cost, train_cost
from dsv3_jax.planning.devices import DEVICES, parse_bytes
from dsv3_jax.planning.hlo import Collective, Traffic
from dsv3_jax.planning.plan import Plan, describe, in_bytes, in_seconds, plan
from dsv3_jax.presets import recipe

pytestmark = pytest.mark.long

PLAIN = replace(MODEL, num_layers=1, mtp_depth=0, compute_dtype="bfloat16")
RUN = make_run("nowhere", model=PLAIN)
RUN = replace(RUN, data=replace(RUN.data, batch_size=8, seq_len=12))


@pytest.fixture(scope="module", autouse=True)
def _cheap(tmp_path_factory):
    assert jax.device_count() == 8  # from now on no command makes others
    with cheap_compiles(tmp_path_factory.getbasetemp()):
        yield


def held_by_the_first(tree) -> int:
    """Bytes of the shards that the first device has of arrays."""
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)


@pytest.fixture(scope="module")
def trained() -> Cost:
    """Of a mesh of three axes with weights cut along all of them."""
    run = replace(RUN, model=replace(PLAIN, layout=Layout(fsdp=True, exchange="gather")))
    gc.collect()  # what other tests left
    before = len(jax.live_arrays())
    cost = train_cost(run, sharding.make_mesh(2, 2, 2))
    assert len(jax.live_arrays()) <= before  # a plan allocates nothing
    return cost


def test_a_training_step_holds_what_the_mesh_holds(trained):
    state = fresh_state(RUN)
    state = jax.device_put(state, sharding.state_sharding(state, sharding.make_mesh(2, 2, 2), fsdp=True))
    experts, rest = nnx.split_state(state.params, lambda path, _: "experts" in path, ...)
    assert trained.held == {
        "routed experts": held_by_the_first(experts),
        "other parameters": held_by_the_first(rest),
        "router bias": held_by_the_first(state.bias),
        "optimizer": held_by_the_first(state.opt),
        "batch": 3 * 2 * 12 * 4 + 4,  # two of eight rows, and the step's number
    }
    assert trained.made == {"gradients": held_by_the_first(state.params)}
    assert trained.total == sum(trained.held.values()) + trained.temporaries


def test_what_a_training_step_sends(trained):
    """Every weight is gathered along data for use, and its gradient is added up along it."""
    sent = trained.sent.by_axes()
    weights = trained.made["gradients"]  # float32, and as much is with the peer along data: half of it travels, cast
    assert weights / 2 < sent[("data",)] < 2 * weights
    assert {"all-gather", "reduce-scatter"} <= set(trained.sent.by_kind()) and trained.sent.unbounded == 0
    assert any("expert" in axes for axes in sent) and any("tensor" in axes for axes in sent)
    assert trained.flops > 0 and trained.seconds > 0


def test_copies_of_a_model_add_up_their_gradients():
    cost = train_cost(replace(RUN, model=replace(PLAIN, compute_dtype="float32")), sharding.make_mesh(8))
    whole = 2 * 7 / 8 * cost.made["gradients"]
    assert whole <= cost.sent.by_kind()["all-reduce"] < 1.1 * whole  # and some counts


def test_a_decoding_step_holds_what_the_mesh_holds():
    gc.collect()  # what other tests left
    before = len(jax.live_arrays())
    cost = decode_cost(replace(PLAIN, mtp_depth=1), sharding.make_mesh(2, 2), 8, 20, weight_dtype="float32")
    assert len(jax.live_arrays()) <= before
    state = fresh_state(RUN)
    state = jax.device_put(state, sharding.state_sharding(state, sharding.make_mesh(2, 2)))
    cache = empty_cache(PLAIN, 1, 2, 20, "latent", "bfloat16")  # of a device's two of eight sequences
    experts, rest = nnx.split_state(state.params, lambda path, _: "experts" in path, ...)
    assert cost.held == {
        "routed experts": held_by_the_first(experts),
        "other parameters": held_by_the_first(rest),
        "router bias": held_by_the_first(state.bias),
        "cache": cache.nbytes + 2 * 4,
        "batch": 2 * 4,
    }
    assert 0 < cost.reads < cost.total


def test_v3s_own_steps_are_programs_of_the_same_size_at_any_depth(monkeypatch):
    """Lowered alone, for seconds; what grows with depth would be compiled for each layer anew."""
    texts = []

    def lowered_alone(lowered):
        texts.append(lowered.as_text())
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: not compiled")

    monkeypatch.setattr(costs, "compile_in_sight", lowered_alone)
    run, mesh = recipe("v3"), sharding.make_mesh(2, 4)
    for layers in (8, 61):
        model = replace(run.model, num_layers=layers, layout=Layout(fsdp=True, exchange="all_to_all"))
        train_cost(replace(run, model=model, data=replace(run.data, batch_size=8)), mesh)
        decode_cost(model, mesh, 8, 4096, weight_dtype="float32")  # tests allow no silent promotion
    for few, many in zip(texts[:2], texts[2:], strict=True):
        assert "<5x256x7168x2048x" in few and "<58x256x7168x2048x" in many  # all but three layers have experts
        assert abs(len(many) / len(few) - 1) < 0.01  # longer numbers
    assert "all_to_all" in texts[2] and "all_to_all" not in texts[3]  # decoding's few tokens are gathered


def made_up(**changes) -> Cost:
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
    least = made_up().least_seconds(DEVICES["h800"])
    assert least["FLOPs"] == pytest.approx(2e12 / 989e12)
    # seven eighths of 8 GB, twice, within a node; 1 GB from node to node
    assert least["wire"] == pytest.approx(14e9 / 200e9 + 1e9 / 50e9)
    assert made_up().least_seconds(DEVICES["v5p"])["wire"] == pytest.approx(15e9 / 600e9)


def test_what_fits():
    assert made_up().total == 4 * 10**9 and made_up().fits(4e9) and not made_up().fits(3.9e9)
    lines = dict(describe(made_up(), 16, 1, 3e9, DEVICES["h800"]))
    assert lines["  in all"] == "4 GB: does not fit in 3 GB"
    assert lines["  other temporaries"] == "2 GB"
    assert lines["    all-gather"] == "14 GB along expert"
    assert lines["    and"] == "875 MB in each turn of loops of unknown length, of which there are 1"
    assert lines["  a step takes at least"] == "90 ms: 2.02 ms for FLOPs, 90 ms for wire"


def test_a_compiler_that_gives_up_is_quoted():
    cost = made_up(temporaries=None, refused="It needs 9G.", sent=Traffic([], 0))
    assert cost.total == 2 * 10**9 and not cost.fits(1e12)
    lines = dict(describe(cost, 16, 1, 1e12, DEVICES["h800"]))
    assert lines["  in all"] == "2 GB and more: the compiler gave up. It needs 9G."
    assert "  sent" not in lines and "  a step takes at least" not in lines


def test_the_command_prints_a_step(capsys):
    args = Plan(PLAIN, mesh="data=2,expert=2", device="h800", memory="1MB", only="decode", context=20)
    args = replace(args, weight_dtype="float32")  # tests allow no silent promotion, as of a bfloat16 router
    assert plan(args, RUN, "plain") == 0
    out = capsys.readouterr().out
    assert out.startswith("model                  plain\ndecoding step          128 sequences of 20 tokens on ")
    assert "on data=2,expert=2 (4 devices)" in out
    for what in ("routed experts", "cache", "along expert", "in 1 MB", "takes at least"):
        assert f" {what}" in out, what


def test_a_training_step_is_described(trained):
    lines = dict(describe(trained, 8, 12, None, None))
    assert lines["training step"].startswith("8 sequences of 12 tokens on data=2,expert=2,tensor=2 (8 devices)")
    assert {"  routed experts", "  optimizer", "  gradients", "  sent", "  note", "  in all"} <= set(lines)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(mesh="rows=2"), "mesh 'rows=2' is not of the form"),
        (dict(mesh="data=3000000000"), "mesh 'data=3000000000' is of more than 65,536 devices"),
        (dict(mesh="data=64"), "needs 64 devices, and there are 8 here"),
        (dict(mesh="data=2", batch=3), "=3 rows are not divisible by mesh data=2"),
        (dict(mesh="expert=3", batch=3), "num_experts=8 is not divisible by mesh"),
        (dict(mesh="data=2", decode_batch=3), "decode_batch=3 is not divisible by the 2 parts of mesh data=2"),
        (dict(mesh="data=2", decode_mesh="expert=3"), "num_experts=8 is not divisible by mesh"),
        (dict(context=65), "context=65 is not within 1 and the model's max_positions=64"),
        (dict(memory="80"), "memory '80' is not of the form 80GB"),
        (dict(target="tpu:v5p"), "target 'tpu:v5p' is not of the form tpu:v5p:8x8x8"),
        (dict(seq_len=65), "seq_len=65 is more than the model's max_positions=64"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(changes, sentence, capsys):
    with pytest.raises(ConfigError, match=sentence):
        plan(Plan(PLAIN, **{"seq_len": 12} | changes), RUN, "plain")
    assert capsys.readouterr().out == ""


def test_a_target_needs_its_compiler(monkeypatch):
    def missing(**_):
        raise RuntimeError("JAX TPU support not installed")

    from jax.experimental import topologies

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(ConfigError, match="pip install 'dsv3-jax.tpu.': JAX TPU support not installed"):
        devices.tpu_mesh("tpu:v5p:2x2x1", {"data": 4, "expert": 1, "tensor": 1})


def test_numbers_are_read_and_written_with_their_units():
    assert parse_bytes("80GB") == 80e9 and parse_bytes("1.5 gib") == 1.5 * 2**30
    assert in_bytes(1234567) == "1.235 MB" and in_bytes(12) == "12 B"
    assert in_seconds(0.0123) == "12.3 ms" and in_seconds(2) == "2 s" and in_seconds(2e-6) == "2 µs"
