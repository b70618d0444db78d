"""Configurations: what is refused, with which name and value, and the way to JSON and back."""

import itertools
import json
import re
from dataclasses import FrozenInstanceError
from functools import partial

import models
import pytest

import dsv3_jax as ds
from dsv3_jax.config import (
    ConfigError,
    DataConfig,
    Execution,
    Grpo,
    Lora,
    OptimConfig,
    RunConfig,
    Yarn,
    from_dict,
    replace,
    to_dict,
)
from dsv3_jax.presets import MODELS, NEEDS_START, RECIPES


def model(**changes):
    return replace(models.SMALL, **changes)


def run(**changes):
    return RunConfig(**{"model": models.SMALL, "data": DataConfig(seq_len=128), **changes})


def refused(make, words, **changes):
    """Whether the error is one sentence with all these words: names, values, the expected type."""
    with pytest.raises(ConfigError) as caught:
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
    (DataConfig, "paths", (("a", 3), "a", ("a", ""))),
    (DataConfig, "tokenizer", ("a\x1b[2J",)),
    (OptimConfig, "learning_rate qk_clip", (0.0, -1.0)),
    (OptimConfig, "beta1 beta2", (0.99999999,)),  # 1 in float32
    (Execution, "kernels", ("", "auto,", "auto,xla", "=xla", "optimizer=", "optimizer=xla=cpu")),
    (run, "steps", (0, 2.5)),
    (run, "seed", (-1, 2**32)),
]


def test_a_field_outside_its_interval_or_of_another_type_is_refused():
    for make, names, values in FIELDS:
        for name, value in itertools.product(names.split(), values):
            shown = "" if isinstance(value, str) else repr(value)
            refused(make, f"{name}={shown}", **{name: value})


MUP = OptimConfig(base_width=8)
CHATS = DataConfig(paths=("nowhere",), seq_len=16, batch_size=4, format="chat")
TWO_HEADS, DENSE_ADAPTERS = model(mtp_depth=2), Lora(2, on=("dense",))
TOGETHER = [  # what makes a configuration, the words of the error, the changes
    (model, "num_dense_layers=4 num_layers=3", dict(num_dense_layers=4)),
    (model, "experts_per_token=9 num_experts=8", dict(experts_per_token=9)),
    (model, "num_groups=3 num_experts=8", dict(num_groups=3)),
    (model, "group_score='top2_sum' num_groups=8", dict(num_groups=8, groups_per_token=3)),
    (model, "router='dense' experts_per_token=3 num_experts=8", dict(router="dense")),
    (model, "max_positions=128", dict(yarn=Yarn(factor=2.0, original_max_positions=50))),
    (model, "mtp_input='raw' 'medusa'", dict(mtp_kind="medusa", mtp_depth=1, mtp_input="raw")),
    (model, "'num_expert' 'num_experts'", dict(num_expert=3)),
    (DataConfig, "mixture=('a=0',)", dict(paths=("s",), format="shards", mixture=("a=0",))),
    (DataConfig, "max_documents=3 'text'", dict(format="shards", paths=("s",), max_documents=3)),
    (DataConfig, "separate_documents=False", dict(format="chat", separate_documents=False)),
    (DataConfig, "batch_size=1048576 seq_len=4096", dict(batch_size=2**20, seq_len=2**12)),
    (OptimConfig, "name='moun' adamw muon", dict(name="moun")),
    (OptimConfig, "base_width=8 'adamw' 'muon'", dict(name="muon", base_width=8)),
    (run, "optim.base_width=8 True", dict(model=model(tie_embeddings=True), optim=MUP)),
    (run, "optim.base_width=8 rank=0 2", dict(lora=Lora(rank=2), start="here", optim=MUP)),
    (run, "microbatches=3 batch_size=16", dict(optim=OptimConfig(microbatches=3))),
    (run, "seq_len=129 max_positions=128", dict(data=DataConfig(seq_len=129))),
    (run, "seq_len=3 mtp_depth=2", dict(model=TWO_HEADS, data=DataConfig(seq_len=3))),
    (run, "start='here' trunk='there'", dict(model=TWO_HEADS, trunk="there", start="here")),
    (run, "rank=2 start=None", dict(lora=Lora(rank=2))),
    (run, "on='dense'", dict(model=model(num_dense_layers=0), lora=DENSE_ADAPTERS, start="here")),
    (run, "execution=None Execution", dict(execution=None)),
    (run, "updates=3 steps=4", dict(data=CHATS, steps=4, grpo=Grpo(group=2, updates=3))),
    (
        run,
        "model.capacity_factor=1.5 group=2",  # sampling would have other experts than training
        dict(data=CHATS, model=model(capacity_factor=1.5), grpo=Grpo(group=2)),
    ),
]


@pytest.mark.parametrize(("make", "words", "changes"), TOGETHER)
def test_what_does_not_go_together_is_refused(make, words, changes):
    refused(make, words, **changes)


def test_edges_are_accepted():
    model(num_dense_layers=3, yarn=Yarn(factor=2.0, original_max_positions=64))
    model(num_dense_layers=0, num_shared_experts=0, mtp_depth=0, q_latent_dim=None)
    model(num_groups=8, groups_per_token=3, group_score="max")
    run(model=TWO_HEADS, data=DataConfig(seq_len=4), seed=2**32 - 1)
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
        refused(partial(from_dict, RunConfig, values), words)


# presets


def test_presets_by_name():
    assert set(MODELS) == set(RECIPES) - set(NEEDS_START)
    for name, made in MODELS.items():
        assert ds.preset(name) is made and ds.recipe(name).model is made
        recipe = RECIPES[name]
        recipe = ds.replace(recipe, data=ds.replace(recipe.data, paths=("a.txt", "b")))
        values = json.loads(json.dumps(to_dict(recipe)))
        assert from_dict(RunConfig, values) == recipe
    for find in (ds.preset, ds.recipe):
        refused(find, "'huge' tiny lab mini mini_80gb v2_lite v2_lite_80gb v2", name="huge")
