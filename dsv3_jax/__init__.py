"""dsv3-jax: the readable, exact and fast DeepSeek-V3 in JAX and Flax."""

from dsv3_jax.config import Balance, ConfigError, DataConfig, ModelConfig, OptimConfig, RunConfig, Yarn, replace
from dsv3_jax.modules.transformer import Transformer
from dsv3_jax.presets import preset, recipe
