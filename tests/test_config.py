"""Configurations: what is refused, with which name and value, and the way to JSON and back."""

import itertools
import json
import re
from dataclasses import FrozenInstanceError
from functools import partial

import models
import pytest
from runs import unhooked_config

import dsv3_jax as ds
from dsv3_jax.presets import MODELS, NEEDS_START, RECIPES

# the tests' import hook would refuse wrong types first, in other words
config = unhooked_config()
ConfigError, DataConfig, Lora = config.ConfigError, config.DataConfig, config.Lora
Execution, OptimConfig, Yarn = config.Execution, config.OptimConfig, config.Yarn
from_dict, replace, to_dict = config.from_dict, config.replace, config.to_dict
SMALL = from_dict(config.ModelConfig, to_dict(models.SMALL))


def model(**changes):
    return replace(SMALL, **changes)


def run(**changes):
    return config.RunConfig(**{"model": SMALL, "data": DataConfig(seq_len=128), **changes})


def refused(make, words, **changes):
    """Whether the error is one sentence with all these words: names, values, the expected type."""
    with pytest.raises((ConfigError, ds.ConfigError)) as caught:
        make(**changes)
    message = str(caught.value)
    assert "\n" not in message
    for word in words.split():
        assert re.search(rf"(?<![\w.]){re.escape(word)}(?!\w)", message), message


# Values at and beyond the intervals' ends, and of other types: the sentence has name and value.
FIELDS = [
    (model, "vocab_size q_latent_dim rope_head_dim", (0, -3, 2**31)),
    (model, "num_dense_layers num_shared_experts mtp_depth", (-1, 1.0, True, "1")),
    (model, "capacity_factor norm_eps init_std", (0.0, float("nan"), float("inf"), "small")),
    (DataConfig, "seq_len", (1,)),
    (DataConfig, "paths", (("a", 3), "a")),
    (DataConfig, "tokenizer", ("a\x1b[2J",)),
    (OptimConfig, "learning_rate qk_clip", (0.0, -1.0)),
    (
        Execution,
        "kernels",
        ("", "auto,", "auto,xla", "optimizer=", "=xla", "optimizer=xla=cpu", None),
    ),
    (run, "steps", (0, 2.5)),
    (run, "seed", (-1, 2**32)),
]


def test_a_field_outside_its_interval_or_of_another_type_is_refused():
    for make, names, values in FIELDS:
        for name, value in itertools.product(names.split(), values):
            refused(
                make, f"{name}=" if isinstance(value, str) else f"{name}={value!r}", **{name: value}
            )


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (model, dict(num_dense_layers=4), "num_dense_layers=4 num_layers=3"),
        (model, dict(experts_per_token=9), "experts_per_token=9 num_experts=8"),
        (model, dict(num_groups=3), "num_groups=3 num_experts=8"),
        (model, dict(num_groups=8, groups_per_token=3), "group_score='top2_sum' num_groups=8"),
        (model, dict(router="dense"), "router='dense' experts_per_token=3 num_experts=8"),
        (model, dict(yarn=Yarn(factor=2.0, original_max_positions=50)), "max_positions=128"),
        (
            model,
            dict(mtp_kind="medusa", mtp_depth=1, mtp_input="raw"),
            "mtp_input='raw' mtp_kind='medusa'",
        ),
        (model, dict(num_expert=3), "'num_expert' 'num_experts'"),
        (DataConfig, dict(paths=("s",), format="shards", mixture=("a=0",)), "mixture=('a=0',)"),
        (
            DataConfig,
            dict(format="shards", paths=("s",), max_documents=3),
            "max_documents=3 'text' 'chat' 'shards'",
        ),
        (
            DataConfig,
            dict(format="chat", separate_documents=False),
            "separate_documents=False 'chat'",
        ),
        (DataConfig, dict(batch_size=2**20, seq_len=2**12), "batch_size=1048576 seq_len=4096"),
        (OptimConfig, dict(name="moun"), "name='moun' adamw muon"),
        (OptimConfig, dict(name="muon", base_width=8), "base_width=8 'adamw' 'muon'"),
        (
            run,
            dict(model=model(tie_embeddings=True), optim=OptimConfig(base_width=8)),
            "optim.base_width=8 tie_embeddings=False True",
        ),
        (
            run,
            dict(lora=Lora(rank=2), start="here", optim=OptimConfig(base_width=8)),
            "optim.base_width=8 rank=0 2",
        ),
        (run, dict(optim=OptimConfig(microbatches=3)), "microbatches=3 batch_size=16"),
        (run, dict(data=DataConfig(seq_len=129)), "seq_len=129 max_positions=128"),
        (run, dict(model=model(mtp_depth=2), data=DataConfig(seq_len=3)), "seq_len=3 mtp_depth=2"),
        (
            run,
            dict(model=model(mtp_depth=1), trunk="there", start="here"),
            "start='here' trunk='there'",
        ),
        (run, dict(lora=Lora(rank=2)), "rank=2 start=None"),
        (
            run,
            dict(model=model(num_dense_layers=0), lora=Lora(2, on=("dense",)), start="here"),
            "on='dense'",
        ),
        (run, dict(execution=None), "execution=None Execution"),
    ],
)
def test_what_does_not_go_together_is_refused(make, changes, words):
    refused(make, words, **changes)


def test_edges_are_accepted():
    model(num_dense_layers=3, yarn=Yarn(factor=2.0, original_max_positions=64))
    model(num_dense_layers=0, num_shared_experts=0, mtp_depth=0, q_latent_dim=None)
    model(num_groups=8, groups_per_token=3, group_score="max")
    assert (
        run(model=model(mtp_depth=2), data=DataConfig(seq_len=4), seed=2**32 - 1).data.seq_len == 4
    )
    assert Execution(kernels="auto,product=xla,swiglu=cpu").kernels == "auto,product=xla,swiglu=cpu"
    made = model(capacity_factor=2, rope_theta=9)  # a program compiled for 2.0 serves 2
    assert (type(made.capacity_factor), type(made.rope_theta)) == (float, float)
    with pytest.raises(FrozenInstanceError):
        made.dim = 3


# JSON


def test_from_dict_refuses():
    for change, words in (
        (lambda d: d.update(width=3), "'width' RunConfig"),
        (lambda d: d["model"].update(dim="wide"), "dim='wide' int"),
        (lambda d: d["model"].update(balance=5), "balance=5 Balance"),
        (lambda d: d["model"].pop("dim"), "ModelConfig 'dim'"),
    ):
        values = to_dict(RECIPES["tiny"])
        change(values)
        refused(partial(from_dict, config.RunConfig, values), words)


# presets


def test_presets_by_name():
    assert set(MODELS) == set(RECIPES) - set(NEEDS_START)
    for name, made in MODELS.items():
        assert ds.preset(name) is made and ds.recipe(name).model is made
        recipe = ds.replace(
            RECIPES[name], data=ds.replace(RECIPES[name].data, paths=("a.txt", "b"))
        )
        assert (
            ds.config.from_dict(ds.RunConfig, json.loads(json.dumps(ds.config.to_dict(recipe))))
            == recipe
        )
    for find in (ds.preset, ds.recipe):
        refused(
            find,
            "'huge' tiny lab mini mini_80gb v2_lite v2_lite_80gb v2_lite_8x80gb v2",
            name="huge",
        )
