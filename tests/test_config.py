"""Configurations: what is refused, in which words, and the way to JSON and back."""

import importlib.util
import json
import sys
from dataclasses import FrozenInstanceError, fields

import models
import pytest

import dsv3_jax as ds
from dsv3_jax.presets import MODELS, RECIPES


def unhooked():
    """dsv3_jax.config as users have it: the tests' import hook would refuse wrong types first, in other words."""
    spec = importlib.util.spec_from_file_location("unhooked_config", sys.modules["dsv3_jax.config"].__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


config = unhooked()
Balance, ConfigError, DataConfig, OptimConfig = (
    config.Balance,
    config.ConfigError,
    config.DataConfig,
    config.OptimConfig,
)
RunConfig, Yarn, from_dict, replace, to_dict = (
    config.RunConfig,
    config.Yarn,
    config.from_dict,
    config.replace,
    config.to_dict,
)
SMALL = from_dict(config.ModelConfig, to_dict(models.SMALL))


def small(**changes):
    return replace(SMALL, **changes)


def refused(make, sentence, **changes):
    with pytest.raises((ConfigError, ds.ConfigError)) as caught:
        make(**changes)
    assert str(caught.value) == sentence


POSITIVE = (
    "vocab_size", "dim", "num_layers", "dense_dim", "num_heads", "kv_latent_dim", "nope_head_dim", "rope_head_dim",
    "v_head_dim", "num_experts", "experts_per_token", "expert_dim", "num_groups", "groups_per_token", "max_positions",
    "q_latent_dim",
)  # fmt: skip


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, -3])
def test_model_sizes_are_positive(name, value):
    refused(small, f"{name}={value} is not positive", **{name: value})


@pytest.mark.parametrize("name", ["num_dense_layers", "num_shared_experts", "mtp_depth"])
def test_model_counts_are_not_negative(name):
    refused(small, f"{name}=-1 is negative", **{name: -1})


@pytest.mark.parametrize("name", ["capacity_factor", "rope_theta", "norm_eps", "init_std"])
@pytest.mark.parametrize("value", [0.0, -0.5, float("nan")])
def test_model_factors_are_positive(name, value):
    refused(small, f"{name}={value} is not positive", **{name: value})


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(num_dense_layers=4), "num_dense_layers=4 is more than num_layers=3"),
        (dict(experts_per_token=9), "experts_per_token=9 is more than num_experts=8"),
        (dict(num_groups=3), "num_groups=3 does not divide num_experts=8"),
        (dict(groups_per_token=5), "groups_per_token=5 is more than num_groups=4"),
        (
            dict(groups_per_token=1),
            "experts_per_token=3 does not fit in groups_per_token=1 groups of 2 experts",
        ),
        (
            dict(num_groups=8, groups_per_token=3),
            "group_score='top2_sum' needs 2 experts a group, num_groups=8 leaves 1",
        ),
        (
            dict(router="dense"),
            "router='dense' takes every expert: experts_per_token=3 must be num_experts=8",
        ),
        (dict(rope_head_dim=5), "rope_head_dim=5 is odd"),
        (
            dict(yarn=Yarn(factor=2.0, original_max_positions=50)),
            "max_positions=128 is beyond YaRN's reach of 50 x 2",
        ),
        (dict(router="softmoe"), "router='softmoe' is not of type one of 'sigmoid', 'softmax', 'topk', 'dense'"),
        (dict(dim=16.0), "dim=16.0 is not of type int"),
        (dict(dim=True), "dim=True is not of type int"),
        (dict(dim="16"), "dim='16' is not of type int"),
        (dict(q_latent_dim=1.5), "q_latent_dim=1.5 is not of type int | None"),
        (dict(tie_embeddings=1), "tie_embeddings=1 is not of type bool"),
        (dict(balance=None), "balance=None is not of type Balance"),
        (dict(norm_eps="small"), "norm_eps='small' is not of type float"),
    ],
)
def test_models_that_cannot_be(changes, sentence):
    refused(small, sentence, **changes)


@pytest.mark.parametrize(
    "kind, changes, sentence",
    [
        (Yarn, dict(factor=0.5), "yarn factor=0.5 is below 1"),
        (Yarn, dict(original_max_positions=0), "yarn original_max_positions=0 is not positive"),
        (Balance, dict(bias_rate=-1e-3), "balance bias_rate=-0.001 is negative"),
        (Balance, dict(sequence_alpha=-1), "balance sequence_alpha=-1.0 is negative"),
        (Balance, dict(switch_alpha=-2.0), "balance switch_alpha=-2.0 is negative"),
        (DataConfig, dict(seq_len=1), "seq_len=1 is below 2"),
        (DataConfig, dict(batch_size=0), "batch_size=0 is not positive"),
        (DataConfig, dict(fim_rate=1.5), "fim_rate=1.5 is outside [0, 1]"),
        (DataConfig, dict(fim_rate=-0.1), "fim_rate=-0.1 is outside [0, 1]"),
        (DataConfig, dict(val_fraction=0.0), "val_fraction=0.0 is outside (0, 1)"),
        (DataConfig, dict(val_fraction=1), "val_fraction=1.0 is outside (0, 1)"),
        (DataConfig, dict(max_documents=0), "max_documents=0 is not positive"),
        (DataConfig, dict(paths=("a", 3)), "paths=('a', 3) is not of type tuple[str, ...]"),
        (DataConfig, dict(paths="a"), "paths='a' is not of type tuple[str, ...]"),
        (OptimConfig, dict(learning_rate=0), "learning_rate=0.0 is not positive"),
        (OptimConfig, dict(eps=0.0), "eps=0.0 is not positive"),
        (OptimConfig, dict(clip_norm=-1.0), "clip_norm=-1.0 is not positive"),
        (OptimConfig, dict(microbatches=0), "microbatches=0 is not positive"),
        (OptimConfig, dict(final_learning_rate=-1.0), "final_learning_rate=-1.0 is negative"),
        (OptimConfig, dict(warmup_steps=-1), "warmup_steps=-1 is negative"),
        (OptimConfig, dict(weight_decay=-0.1), "weight_decay=-0.1 is negative"),
        (OptimConfig, dict(mtp_weight=-0.3), "mtp_weight=-0.3 is negative"),
        (OptimConfig, dict(mtp_final_weight=-0.1), "mtp_final_weight=-0.1 is negative"),
        (OptimConfig, dict(beta1=1.0), "beta1=1.0 is outside [0, 1)"),
        (OptimConfig, dict(beta2=-0.1), "beta2=-0.1 is outside [0, 1)"),
        (
            OptimConfig,
            dict(decay_start=0.9, decay_end=0.8),
            "decay_start=0.9 and decay_end=0.8 are not in order within [0, 1]",
        ),
        (OptimConfig, dict(bias_freeze=1.1), "bias_freeze=1.1 is outside [0, 1]"),
    ],
)
def test_parts_that_cannot_be(kind, changes, sentence):
    refused(kind, sentence, **changes)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        *(
            ({name: 0}, f"{name}=0 is not positive")
            for name in ("steps", "eval_every", "eval_batches", "save_every", "keep", "log_every")
        ),
        (dict(optim=OptimConfig(microbatches=3)), "microbatches=3 does not divide batch_size=16"),
        (dict(data=DataConfig(seq_len=129)), "seq_len=129 is more than the model's max_positions=128"),
        (
            dict(model=small(mtp_depth=2), data=DataConfig(seq_len=3)),
            "seq_len=3 leaves no target for mtp_depth=2",
        ),
    ],
)
def test_runs_that_cannot_be(changes, sentence):
    usual = dict(model=small(), data=DataConfig(seq_len=128))
    RunConfig(**usual)
    refused(RunConfig, sentence, **{**usual, **changes})


def test_edges_are_allowed():
    small(num_dense_layers=0)
    small(num_dense_layers=3)
    small(yarn=Yarn(factor=2.0, original_max_positions=64))
    small(num_shared_experts=0, mtp_depth=0, q_latent_dim=None)
    small(num_groups=8, groups_per_token=3, group_score="max")
    assert RunConfig(small(mtp_depth=2), DataConfig(seq_len=4)).data.seq_len == 4


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
    back = ds.config.from_dict(ds.RunConfig, json.loads(json.dumps(ds.config.to_dict(run))))
    assert back == run
    assert back.data.paths == ("a.txt", "b")


def test_every_field_survives_json():
    """Values that are nobody's default."""
    changed = {
        Yarn: Yarn(2.0, 100, 16.0, 2.0, 0.5, 0.25),
        Balance: Balance(0.5, 0.25, 0.125),
        DataConfig: DataConfig(("x",), "t.json", 9, 3, False, 0.5, 0.5, 7, 5),
        OptimConfig: OptimConfig(1e-3, 1e-5, 7, 0.1, 0.2, 0.3, 0.4, 1e-3, 0.5, 2.0, 0.6, 0.7, 0.8, 3),
    }
    for kind, config in changed.items():
        default = kind()
        assert all(getattr(config, f.name) != getattr(default, f.name) for f in fields(kind))
        assert from_dict(kind, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda d: d.update(width=3), "'width' is not a key of RunConfig"),
        (lambda d: d["model"].update(n_heads=3), "'n_heads' is not a key of ModelConfig"),
        (lambda d: d["model"]["balance"].update(gamma=3), "'gamma' is not a key of Balance"),
        (lambda d: d["model"].update(dim="wide"), "dim='wide' is not of type int"),
        (lambda d: d["model"].update(balance=5), "balance=5 is not of type Balance"),
        (lambda d: d["model"].update(dim=0), "dim=0 is not positive"),
        (lambda d: d.update(steps=2.5), "steps=2.5 is not of type int"),
        (lambda d: d["model"].pop("dim"), "ModelConfig: missing 1 required positional argument: 'dim'"),
    ],
)
def test_from_dict_refuses(change, sentence):
    values = to_dict(RECIPES["tiny"])
    change(values)
    refused(lambda: from_dict(RunConfig, values), sentence)


# presets


def test_presets_by_name():
    assert set(MODELS) == set(RECIPES)
    for name, model in MODELS.items():
        assert ds.preset(name) is model
        assert ds.recipe(name).model is model


@pytest.mark.parametrize("find", [ds.preset, ds.recipe])
def test_unknown_names_are_refused(find):
    refused(find, "preset 'huge' is not one of tiny, lab, mini, v2_lite, v2, v3", name="huge")


def test_config_error_is_a_value_error():
    assert issubclass(ds.ConfigError, ValueError)
