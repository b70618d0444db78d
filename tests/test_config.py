"""Configurations: what is refused, with which name and value, and the way to JSON and back."""

import json
import re
from dataclasses import FrozenInstanceError, fields

import models
import pytest
from runs import unhooked

import dsv3_jax as ds
from dsv3_jax.kernels.choose import Target
from dsv3_jax.presets import MODELS, NEEDS_START, RECIPES
from dsv3_jax.training.run_folder import read_run

config = unhooked("dsv3_jax.config")  # the tests' import hook would refuse wrong types first, in other words
Balance, ConfigError, DataConfig, OptimConfig = (
    config.Balance,
    config.ConfigError,
    config.DataConfig,
    config.OptimConfig,
)
Execution, Layout, RunConfig, Yarn = config.Execution, config.Layout, config.RunConfig, config.Yarn
from_dict, replace, run_from_dict, to_dict = config.from_dict, config.replace, config.run_from_dict, config.to_dict
SMALL = from_dict(config.ModelConfig, to_dict(models.SMALL))


def small(**changes):
    return replace(SMALL, **changes)


def refused(make, words, **changes):
    """Whether the error is one sentence with all these words: names and values, and the type that was expected."""
    with pytest.raises((ConfigError, ds.ConfigError)) as caught:
        make(**changes)
    message = str(caught.value)
    assert "\n" not in message
    for word in words.split():
        assert re.search(rf"(?<![\w.]){re.escape(word)}(?!\w)", message), message


POSITIVE = (
    "vocab_size", "dim", "num_layers", "dense_dim", "num_heads", "kv_latent_dim", "nope_head_dim", "rope_head_dim",
    "v_head_dim", "num_experts", "experts_per_token", "expert_dim", "num_groups", "groups_per_token", "max_positions",
    "q_latent_dim",
)  # fmt: skip


def test_whole_numbers_may_stand_for_others():
    """Also where None is possible; a program compiled for 2.0 serves 2."""
    assert all(
        type(small(capacity_factor=2, rope_theta=9).__dict__[n]) is float for n in ("capacity_factor", "rope_theta")
    )


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, -3])
def test_model_sizes_are_positive(name, value):
    refused(small, f"{name}={value}", **{name: value})


@pytest.mark.parametrize("name", ["num_dense_layers", "num_shared_experts", "mtp_depth"])
def test_model_counts_are_not_negative(name):
    refused(small, f"{name}=-1", **{name: -1})


@pytest.mark.parametrize("name", ["capacity_factor", "rope_theta", "norm_eps", "init_std"])
@pytest.mark.parametrize("value", [0.0, -0.5, float("nan")])
def test_model_factors_are_positive(name, value):
    refused(small, f"{name}={value}", **{name: value})


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(num_dense_layers=4), "num_dense_layers=4 num_layers=3"),
        (dict(experts_per_token=9), "experts_per_token=9 num_experts=8"),
        (dict(num_groups=3), "num_groups=3 num_experts=8"),
        (dict(groups_per_token=5), "groups_per_token=5 num_groups=4"),
        (
            dict(groups_per_token=1),
            "experts_per_token=3 groups_per_token=1",
        ),
        (
            dict(num_groups=8, groups_per_token=3),
            "group_score='top2_sum' num_groups=8",
        ),
        (
            dict(router="dense"),
            "router='dense' experts_per_token=3 num_experts=8",
        ),
        (dict(rope_head_dim=5), "rope_head_dim=5"),
        (
            dict(yarn=Yarn(factor=2.0, original_max_positions=50)),
            "max_positions=128 50",
        ),
        (dict(router="softmoe"), "router='softmoe' 'sigmoid' 'softmax' 'topk' 'dense' 'hash'"),
        (dict(dim=16.0), "dim=16.0 int"),
        (dict(dim=True), "dim=True int"),
        (dict(dim="16"), "dim='16' int"),
        (dict(q_latent_dim=1.5), "q_latent_dim=1.5 int | None"),
        (dict(tie_embeddings=1), "tie_embeddings=1 bool"),
        (dict(balance=None), "balance=None Balance"),
        (dict(norm_eps="small"), "norm_eps='small' float"),
        (dict(qk_norm=True), "qk_norm=True 'mha' 'mla'"),
    ],
)
def test_models_that_are_refused(changes, words):
    refused(small, words, **changes)


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        (Yarn, dict(factor=0.5), "yarn factor=0.5"),
        (Yarn, dict(original_max_positions=0), "yarn original_max_positions=0"),
        (Balance, dict(bias_rate=-1e-3), "balance bias_rate=-0.001"),
        (Balance, dict(sequence_alpha=-1), "balance sequence_alpha=-1.0"),
        (Balance, dict(switch_alpha=-2.0), "balance switch_alpha=-2.0"),
        (Balance, dict(z_alpha=-1e-3), "balance z_alpha=-0.001"),
        (Balance, dict(rule="median"), "rule='median' 'sign' 'proportional' 'quantile'"),
        (Balance, dict(rule="quantile", bias_rate=1.5), "balance bias_rate=1.5 rule='quantile'"),
        (DataConfig, dict(seq_len=1), "seq_len=1"),
        (DataConfig, dict(batch_size=0), "batch_size=0"),
        (DataConfig, dict(fim_rate=1.5), "fim_rate=1.5"),
        (DataConfig, dict(fim_rate=-0.1), "fim_rate=-0.1"),
        (DataConfig, dict(val_fraction=0.0), "val_fraction=0.0"),
        (DataConfig, dict(val_fraction=1), "val_fraction=1.0"),
        (DataConfig, dict(max_documents=0), "max_documents=0"),
        (DataConfig, dict(paths=("a", 3)), "paths=('a', 3) tuple[str, ...]"),
        (DataConfig, dict(paths="a"), "paths='a' tuple[str, ...]"),
        (OptimConfig, dict(learning_rate=0), "learning_rate=0.0"),
        (OptimConfig, dict(eps=0.0), "eps=0.0"),
        (OptimConfig, dict(clip_norm=-1.0), "clip_norm=-1.0"),
        (OptimConfig, dict(microbatches=0), "microbatches=0"),
        (OptimConfig, dict(moments_dtype="float16"), "moments_dtype='float16' 'float32' 'bfloat16'"),
        (
            OptimConfig,
            dict(moments_dtype="bfloat16", beta2=0.999),
            "beta2=0.999 0.99 moments_dtype='bfloat16' 'float32'",
        ),
        (OptimConfig, dict(final_learning_rate=-1.0), "final_learning_rate=-1.0"),
        (OptimConfig, dict(warmup_steps=-1), "warmup_steps=-1"),
        (OptimConfig, dict(weight_decay=-0.1), "weight_decay=-0.1"),
        (OptimConfig, dict(mtp_weight=-0.3), "mtp_weight=-0.3"),
        (OptimConfig, dict(mtp_final_weight=-0.1), "mtp_final_weight=-0.1"),
        (OptimConfig, dict(beta1=1.0), "beta1=1.0"),
        (OptimConfig, dict(beta2=-0.1), "beta2=-0.1"),
        (
            OptimConfig,
            dict(decay_start=0.9, decay_end=0.8),
            "decay_start=0.9 decay_end=0.8",
        ),
        (OptimConfig, dict(bias_freeze=1.1), "bias_freeze=1.1"),
        (Layout, dict(fsdp="yes"), "fsdp='yes' bool"),
        (Layout, dict(capacity_slack=0.5), "layout capacity_slack=0.5"),
        (Layout, dict(expert_comm="broadcast"), "expert_comm='broadcast' 'auto' 'gather' 'all_to_all' 'ragged'"),
        (Execution, dict(compute_dtype="float16"), "compute_dtype='float16' 'float32' 'bfloat16'"),
        (Execution, dict(remat=True), "remat=True 'none' 'dots' 'attention' 'full'"),
        (Execution, dict(xla_flags="some"), "xla_flags='some' 'auto' 'none'"),
        (Execution, dict(precision="fp16"), "precision='fp16' 'none' 'fp8' 'fp8_ue8m0' 'mxfp8'"),
        (Execution, dict(layout=None), "layout=None Layout"),
        (Execution, dict(kernels=None), "kernels=None str"),
        *(
            (Execution, dict(kernels=text), f"kernels={text!r} OP=NAME")
            for text in ("", "auto,", "auto,xla", "optimizer=", "=xla", "optimizer=xla=cpu")
        ),
    ],
)
def test_parts_that_are_refused(kind, changes, words):
    refused(kind, words, **changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        *(
            ({name: 0}, f"{name}=0")
            for name in ("steps", "eval_every", "eval_batches", "save_every", "keep", "log_every")
        ),
        (dict(optim=OptimConfig(microbatches=3)), "microbatches=3 batch_size=16"),
        (dict(data=DataConfig(seq_len=129)), "seq_len=129 max_positions=128"),
        (
            dict(model=small(mtp_depth=2), data=DataConfig(seq_len=3)),
            "seq_len=3 mtp_depth=2",
        ),
        (dict(trunk="there"), "mtp_depth=0 'there'"),
        (dict(model=small(mtp_depth=1), trunk="there", start="here"), "start='here' trunk='there'"),
        (dict(execution=None), "execution=None Execution"),
    ],
)
def test_runs_that_are_refused(changes, words):
    usual = dict(model=small(), data=DataConfig(seq_len=128))
    RunConfig(**usual)
    refused(RunConfig, words, **{**usual, **changes})


def test_edges_are_accepted():
    small(num_dense_layers=0)
    small(num_dense_layers=3)
    small(yarn=Yarn(factor=2.0, original_max_positions=64))
    small(num_shared_experts=0, mtp_depth=0, q_latent_dim=None)
    small(num_groups=8, groups_per_token=3, group_score="max")
    assert RunConfig(small(mtp_depth=2), data=DataConfig(seq_len=4)).data.seq_len == 4
    for kernels in ("xla", "cpu", "optimizer=xla", "xla,optimizer=cpu", "auto,product=xla,swiglu=cpu"):
        assert Execution(kernels=kernels).kernels == kernels


def test_a_whole_number_is_a_float():
    scale = small(routed_scale=2).routed_scale
    assert scale == 2.0 and type(scale) is float


def test_configurations_do_not_change():
    with pytest.raises(FrozenInstanceError):
        small().dim = 3
    assert hash(small()) == hash(small()) and small() == small() != small(dim=15)


# JSON


@pytest.mark.parametrize("name", RECIPES)
def test_json_round_trip(name):
    run = replace(RECIPES[name], data=replace(RECIPES[name].data, paths=("a.txt", "b")))
    values = json.loads(json.dumps(ds.config.to_dict(run)))
    back = ds.config.from_dict(ds.RunConfig, values)
    assert back == run == ds.config.run_from_dict(values)
    assert back.data.paths == ("a.txt", "b")


def test_every_field_survives_json():
    """Values that differ from every default."""
    changed = {
        Layout: Layout(True, "ragged", 2.0),
        Execution: Execution("bfloat16", "full", "xla", Layout(True), "none", "fp8"),
        Yarn: Yarn(2.0, 100, 16.0, 2.0, 0.5, 0.25),
        Balance: Balance(0.5, 0.25, 0.125, "quantile", 0.0625),
        DataConfig: DataConfig(("x",), "t.json", 9, 3, False, 0.5, 0.5, 7, 5, text_column="body"),
        OptimConfig: OptimConfig(
            "muon", "wsd", 1e-3, 1e-5, 7, 0.1, 0.2, 0.3, 0.4, 0.5, 1e-3, 0.5, 2.0, 90.0, 0.6, 0.7, 0.8, 3, "bfloat16"
        ),
    }
    for kind, config in changed.items():
        default = kind()
        other = [f.name for f in fields(kind) if f.name not in ("format", "chat_template", "mixture", "temperature")]
        assert all(getattr(config, name) != getattr(default, name) for name in other)
        assert from_dict(kind, json.loads(json.dumps(to_dict(config)))) == config
    chats = DataConfig(format="chat", chat_template="plain")
    shards = DataConfig(("x",), format="shards", mixture=("a=1",), temperature=2.0)
    for data in (chats, shards):
        assert from_dict(DataConfig, json.loads(json.dumps(to_dict(data)))) == data


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: d.update(width=3), "'width' RunConfig"),
        (lambda d: d["model"].update(n_heads=3), "'n_heads' ModelConfig"),
        (lambda d: d["model"].update(compute_dtype="float32"), "'compute_dtype' ModelConfig"),  # beside an execution
        (lambda d: d["model"]["balance"].update(gamma=3), "'gamma' Balance"),
        (lambda d: d["execution"]["layout"].update(slack=2.0), "'slack' Layout"),
        (lambda d: d["model"].update(dim="wide"), "dim='wide' int"),
        (lambda d: d["model"].update(balance=5), "balance=5 Balance"),
        (lambda d: d["model"].update(dim=0), "dim=0"),
        (lambda d: d.update(steps=2.5), "steps=2.5 int"),
        (lambda d: d["model"].pop("dim"), "ModelConfig 'dim'"),
        (lambda d: d.pop("model"), "RunConfig 'model'"),
        (lambda d: d.update(model=None), "model=None ModelConfig"),
    ],
)
def test_from_dict_refuses(change, words):
    values = to_dict(RECIPES["tiny"])
    change(values)
    refused(lambda: from_dict(RunConfig, values), words)
    refused(lambda: run_from_dict(values), words)


# Run folders from before `Execution`


def old_values(dispatch="auto", layout=None, **model):
    """The recipe `tiny` as older versions wrote it: what is now the execution was part of the model."""
    values = to_dict(RECIPES["tiny"])
    del values["execution"]
    layout = layout or {"fsdp": True, "exchange": "all_to_all", "slack": 2.0}
    old = {"compute_dtype": "bfloat16", "remat": "dots", "dispatch": dispatch, "capacity_factor": 1.5, "layout": layout}
    values["model"] |= old | model
    return values


@pytest.mark.parametrize(
    "dispatch, kernels, capacity_factor",
    [
        ("auto", "auto", None),
        ("blocks", "auto,grouped_swiglu=blocks", None),
        ("ragged_dot", "auto,grouped_swiglu=ragged_dot", None),
        ("dense", "auto,grouped_swiglu=dense", None),
        ("capacity", "auto", 1.5),
    ],
)
def test_a_run_of_an_older_version_is_read(tmp_path, dispatch, kernels, capacity_factor):
    values = old_values(dispatch)
    run = run_from_dict(values)
    tiny = from_dict(RunConfig, to_dict(RECIPES["tiny"]))
    execution = Execution("bfloat16", "dots", kernels, Layout(True, "all_to_all", 2.0))
    assert run == replace(tiny, model=replace(tiny.model, capacity_factor=capacity_factor), execution=execution)
    assert values == old_values(dispatch)  # left as it was
    Target("cpu", kernels)  # is not refused
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert to_dict(read_run(tmp_path)) == to_dict(run)


def test_an_older_run_with_defaults_is_read():
    """Keys that an old file does not have are at their old defaults."""
    values = old_values()
    for key in ("compute_dtype", "remat", "dispatch", "capacity_factor", "layout"):
        del values["model"][key]
    assert run_from_dict(values) == from_dict(RunConfig, to_dict(RECIPES["tiny"]))
    values["model"]["dispatch"] = "capacity"
    assert run_from_dict(values).model.capacity_factor == 1.25


@pytest.mark.parametrize(
    "values, words",
    [
        (old_values(remat="some"), "remat='some' 'none' 'dots' 'full'"),
        (old_values(compute_dtype="float64"), "compute_dtype='float64'"),
        (old_values(layout={"exchange": "broadcast"}), "expert_comm='broadcast'"),
        (old_values(layout={"slacks": 2.0}), "'slacks' Layout"),
        (old_values(layout=5), "layout=5 Layout"),
        (old_values(width=3), "'width' ModelConfig"),
        ({}, "RunConfig 'model'"),
    ],
)
def test_older_runs_that_are_refused(values, words):
    refused(lambda: run_from_dict(values), words)


# presets


def test_presets_by_name():
    assert set(MODELS) == set(RECIPES) - set(NEEDS_START)
    for name, model in MODELS.items():
        assert ds.preset(name) is model
        assert ds.recipe(name).model is model


@pytest.mark.parametrize("find", [ds.preset, ds.recipe])
def test_unknown_names_are_refused(find):
    refused(find, "'huge' tiny lab mini mini_80gb v2_lite v2_lite_80gb v2 v3", name="huge")


def test_config_error_is_a_value_error():
    assert issubclass(ds.ConfigError, ValueError)
