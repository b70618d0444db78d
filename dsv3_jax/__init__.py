"""dsv3-jax: the readable, exact and fast DeepSeek-V3 in JAX and Flax."""

import importlib

from dsv3_jax.config import Balance, ConfigError, DataConfig, ModelConfig, OptimConfig, RunConfig, Yarn, replace
from dsv3_jax.generate import generate
from dsv3_jax.modules.transformer import Transformer
from dsv3_jax.presets import preset, recipe


def __getattr__(name: str):
    """`dsv3_jax.train` and its like, imported when they are first used: they bring files, pictures and checkpoints."""
    if name in ("train", "evaluate", "checkpoint", "counting", "tokenizer", "corpus", "data", "plots", "hf", "stats"):
        return importlib.import_module(f"dsv3_jax.{name}")
    raise AttributeError(f"module 'dsv3_jax' has no attribute {name!r}")
