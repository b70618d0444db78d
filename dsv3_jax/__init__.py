"""dsv3-jax: the readable, exact and fast DeepSeek-V3 in JAX and Flax."""

import importlib

from dsv3_jax.config import Balance, ConfigError, DataConfig, ModelConfig, OptimConfig, RunConfig, Yarn, replace
from dsv3_jax.decoding.generate import generate
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.presets import preset, recipe

# Imported when they are first used: they bring files, pictures and checkpoints.
_LATER = {
    "train": "training.loop",
    "evaluate": "training.evaluate",
    "checkpoint": "training.checkpoint",
    "counting": "model.counting",
    "tokenizer": "data.tokenizer",
    "corpus": "data.corpus",
    "plots": "report.run_plots",
    "hf": "hf",
    "stats": "stats",
}


def __getattr__(name: str):
    if name in _LATER:
        return importlib.import_module(f"dsv3_jax.{_LATER[name]}")
    raise AttributeError(f"module 'dsv3_jax' has no attribute {name!r}")
