"""Configuration of models and runs: frozen dataclasses, checked when they are made.

A recipe is a diff of another: `replace(preset("tiny"), balance=Balance(switch_alpha=1e-3))`.
"""

from dsv3_jax.config.data import ONLY_FOR, DataConfig
from dsv3_jax.config.execution import CacheDtype, CacheKind, Execution, Layout, Precision
from dsv3_jax.config.fields import (
    ConfigError,
    Table,
    check_inputs,
    check_kind,
    check_shapes,
    did_you_mean,
    first_difference,
    from_dict,
    replace,
    to_dict,
)
from dsv3_jax.config.model import HEAD_KINDS, Balance, HeadKind, ModelConfig, Yarn
from dsv3_jax.config.run import (
    OPTAX,
    OPTIMIZERS,
    Grpo,
    HeadLoss,
    Lora,
    LoraPart,
    OptimConfig,
    RunConfig,
)
