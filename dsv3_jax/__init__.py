"""dsv3-jax: the readable, exact and fast DeepSeek-V3 in JAX and Flax."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from dsv3_jax.config import (
    Balance,
    ConfigError,
    DataConfig,
    Execution,
    Grpo,
    Layout,
    Lora,
    ModelConfig,
    OptimConfig,
    RunConfig,
    Yarn,
    replace,
)
from dsv3_jax.decoding.decode_config import DecodeConfig
from dsv3_jax.decoding.generate import generate
from dsv3_jax.decoding.likelihood import loglikelihood
from dsv3_jax.model.attention import GQA, MLA
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.sparse import DSA
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.presets import preset, recipe

try:
    __version__ = version("dsv3-jax")
except PackageNotFoundError:  # read from a checkout that is not installed
    __version__ = "0+unknown"

if TYPE_CHECKING:  # so that editors and type checkers know the names of `_LATER`
    from dsv3_jax import data, hf, stats
    from dsv3_jax.data import corpus, tokenizer
    from dsv3_jax.mesh import sharding
    from dsv3_jax.model import counting
    from dsv3_jax.model.blocks import register_attention
    from dsv3_jax.ops.balance import register_rule
    from dsv3_jax.ops.routing import register_router
    from dsv3_jax.report import run_plots as plots
    from dsv3_jax.runs import evaluate
    from dsv3_jax.runs import loop as train
    from dsv3_jax.runs.checkpoint import load_run
    from dsv3_jax.runs.folder import read_run
    from dsv3_jax.runs.open_model import load_model, load_text
    from dsv3_jax.scores.score import score_tasks
    from dsv3_jax.training import router_bias as balance

# Imported when they are first used: they bring files, pictures and checkpoints.
# Name: module, and what of it.
_LATER = {
    "train": ("runs.loop", None),
    "balance": ("training.router_bias", None),
    "register_attention": ("model.blocks", "register_attention"),
    "register_router": ("ops.routing", "register_router"),
    "register_rule": ("ops.balance", "register_rule"),
    "evaluate": ("runs.evaluate", None),
    "hf": ("hf", None),
    "stats": ("stats", None),
    "counting": ("model.counting", None),
    "tokenizer": ("data.tokenizer", None),
    "corpus": ("data.corpus", None),
    "data": ("data", None),
    "sharding": ("mesh.sharding", None),
    "plots": ("report.run_plots", None),
    "load_model": ("runs.open_model", "load_model"),
    "load_text": ("runs.open_model", "load_text"),
    "score_tasks": ("scores.score", "score_tasks"),
    "load_run": ("runs.checkpoint", "load_run"),
    "read_run": ("runs.folder", "read_run"),
}

__all__ = [
    "DSA", "GQA", "MLA", "Balance", "ConfigError", "DataConfig", "DecodeConfig", "Execution",
    "Grpo", "Layout", "Lora", "MoE", "ModelConfig", "OptimConfig", "RunConfig", "Transformer",
    "Yarn", "__version__", "generate", "loglikelihood", "preset", "recipe", "replace",
    "balance", "corpus", "counting", "data", "evaluate", "hf", "load_model", "load_run",
    "load_text", "plots", "read_run", "register_attention", "register_router", "register_rule",
    "score_tasks", "sharding", "stats", "tokenizer", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(
            f"module 'dsv3_jax' has no attribute {name!r}; it has {', '.join(sorted(__all__))}"
        )
    module, attribute = _LATER[name]
    found = importlib.import_module(f"dsv3_jax.{module}")
    return found if attribute is None else getattr(found, attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
