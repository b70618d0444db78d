"""The header of stats.json: which run and checkpoint, and how well it reads the text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import ModelConfig, RunConfig, replace
from dsv3_jax.data.byte_tokenizer import Tokenizer
from dsv3_jax.model.counting import size
from dsv3_jax.ops import routing
from dsv3_jax.presets import MODELS
from dsv3_jax.runs.evaluate import training_mix
from dsv3_jax.runs.folder import RUN_FILE, read_made
from dsv3_jax.stats.routing_stats import RoutingStats
from dsv3_jax.stats.tables import as_lists
from dsv3_jax.stats.token_rows import TokenRows


def make_header(
    folder: Path,
    config: RunConfig,
    step: int,
    data: str,
    stats: RoutingStats,
    tokenizer: Tokenizer,
    mix: Mapping[str, float] | None,
) -> dict[str, Any]:
    """Describe a run's checkpoint and the text that it read; see "header" in `numbers.KEYS`.

    Args: mix: bytes of the training text by domain; None means unknown.
    """
    # A released folder has no steps, and no record of what made it.
    is_run = (folder / RUN_FILE).is_file()
    records = read_made(folder) if is_run else []
    last = next((one for one in reversed(records) if isinstance(one, dict)), {})
    batch_tokens = config.data.batch_size * config.data.seq_len

    sizes = size(config.model)
    return {
        "run": folder.absolute().name,
        "step": step,
        "data": data,
        "preset": preset_of(config.model),
        "parameters": sizes.total,
        "active_parameters": sizes.active,
        "steps": config.steps if is_run else None,
        "tokens_seen": step * batch_tokens if is_run else None,
        "router": config.model.router,
        "balance_rule": describe_balance(config.model),
        "version": last.get("version"),
        "commit": last.get("commit"),
        # How well it reads the text.
        "loss": as_lists(stats.rows.loss),
        "bits_per_byte": as_lists(bits_per_byte(stats.rows, tokenizer)),
        "max_vio_training_mix": _mixed(stats, config.model, tokenizer, mix),
    }


def preset_of(cfg: ModelConfig) -> str | None:
    """The preset that a model is, whatever its vocabulary and balancing; None if it is none.

    Example:
        >>> tiny = MODELS["tiny"]
        >>> preset_of(replace(tiny, vocab_size=1024)), preset_of(replace(tiny, dim=64))
        ('tiny', None)
    """
    own = dict(vocab_size=cfg.vocab_size, balance=cfg.balance)
    return next((name for name, model in MODELS.items() if replace(model, **own) == cfg), None)


def describe_balance(cfg: ModelConfig) -> str:
    """Name the methods that balance the load, with their rates.

    Example:
        >>> describe_balance(MODELS["tiny"])
        'bias by rule sign, rate 0.003; sequence-wise loss, weight 0.0001'
    """
    balance = cfg.balance
    parts = []
    if routing.ROUTERS[cfg.router].reads_bias and balance.bias_rate:
        parts.append(f"bias by rule {balance.rule}, rate {balance.bias_rate:g}")
    for name, weight in (
        ("sequence-wise loss", balance.sequence_alpha),
        ("Switch loss", balance.switch_alpha),
        ("z-loss", balance.z_alpha),
    ):
        if weight:
            parts.append(f"{name}, weight {weight:g}")
    return "; ".join(parts) or "none"


def bits_per_byte(rows: TokenRows, tokenizer: Tokenizer) -> float:
    """Divide the bits of all tokens that have a loss by their bytes; special tokens have none.

    NaN without bytes.


    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> from dsv3_jax.stats.token_rows import rows_of
        >>> nll = np.array([np.nan, np.log(4)], np.float32)
        >>> rows = rows_of(np.zeros((1, 2, 1), int))._replace(nll=nll)
        >>> round(bits_per_byte(rows, ByteTokenizer()), 3)
        2.0
    """
    # Tokens with a loss, and the bytes that they stand for.
    known = ~np.isnan(rows.nll)
    count = tokenizer.byte_lengths[rows.token[known]].sum()
    if not count:
        return float("nan")
    nats = rows.nll[known].astype(np.float64).sum()
    return float(nats / np.log(2) / count)


def _mixed(
    stats: RoutingStats, cfg: ModelConfig, tokenizer: Tokenizer, mix: Mapping[str, float] | None
) -> float | None:
    """MaxVio of the trunk's layers with the domains as they are mixed in training."""
    trunk = stats.load_by_domain[:, : cfg.num_sparse_layers]
    rows = stats.rows
    if mix is None or not cfg.num_sparse_layers or set(mix) != set(stats.domains):
        return None

    # Training mixes domains by bytes, so each domain's load is taken per byte of its text.
    known = ~np.isnan(rows.nll)
    bytes_ = np.bincount(
        rows.domain[known], tokenizer.byte_lengths[rows.token[known]], len(stats.domains)
    )
    read = np.bincount(rows.domain, minlength=len(stats.domains)) * stats.experts_per_token
    found = training_mix(
        trunk.astype(np.float64),
        read / np.maximum(bytes_, 1),
        [mix[name] for name in stats.domains],
    )
    return None if found is None else as_lists(found)
