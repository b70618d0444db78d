"""When speculative decoding pays: a step's time by its reads and products, and the speed-up.

A step verifies k drafts of each of B sequences, F = k + 1 tokens each. It has parts that follow one
another. Each part waits for memory or for its products, whichever takes longer:

    dense      attention's, shared experts' and dense layers' weights, and the unembedding, once;
               B F tokens' products
    experts    U(B F) of E routed experts in each layer, and K products a token. U is the number of
               distinct experts
    cache      every sequence's rows, once for all its F tokens; scores and sums of B F tokens

    t(k)       Σ over parts of max(bytes / bandwidth, FLOPs / peak)
    d(J)       J passes of a head, each with the same three parts of one layer, and the unembedding
    E(J)       1 + a + a² + … + a^J tokens, if each draft is accepted with probability a
    speed-up   E(J) t(0) / (t(J) + d(J))

N devices that share all parts evenly divide both times by N, so the speed-up is that of one device.
Left out are communication between devices, launches, and activations.

Source: arXiv 2211.17192, section 3, for E and the speed-up at a constant cost; a part's two limits
are the roofline.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dsv3_jax.config import ModelConfig, replace
from dsv3_jax.model.cache import pick_kind
from dsv3_jax.model.counting import bytes_per_token, distinct_experts, size

Union = Callable[[ModelConfig, int], float]  # (model, tokens) → distinct experts of a layer


_size = lru_cache(size)  # a map asks for the same models again and again


class Part(NamedTuple):
    """A part of a step: bytes that it reads, and its FLOPs."""

    bytes: float
    flops: float

    def seconds(self, bandwidth: float, peak: float) -> float:
        """The longer of both times."""
        return max(self.bytes / bandwidth, self.flops / peak)


class Setting(NamedTuple):
    """A model's decoding on a device."""

    bandwidth: float  # bytes/s
    peak: float  # FLOP/s
    context: int = 4096  # tokens of each sequence in the cache
    weight_bytes: float = 2.0
    cache_dtype: str = "bfloat16"
    union: Union = distinct_experts


def verify_parts(cfg: ModelConfig, setting: Setting, batch: int, tokens: int) -> dict[str, Part]:
    """Count a step of the trunk over some tokens of each sequence.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> cfg = preset("tiny")
        >>> setting = Setting(1.0, 1.0, context=100, weight_bytes=4)
        >>> parts = verify_parts(cfg, setting, batch=1, tokens=1)
        >>> read = parts["dense"].bytes + parts["experts"].bytes
        >>> read == 4 * size(cfg).active  # as `decode_bytes`
        True
    """
    counted = _size(cfg)
    routed = counted.parts.get("routed experts", 0)
    always = counted.active - routed * cfg.experts_per_token / cfg.num_experts
    return _parts(cfg, setting, batch, tokens, always, float(routed), cfg.num_layers)


def draft_parts(cfg: ModelConfig, setting: Setting, batch: int) -> dict[str, Part]:
    """Count a pass of one multi-token head, and the unembedding, over a token of each sequence.

    0 without heads.
    """
    if not cfg.mtp_depth:
        return _parts(cfg, setting, batch, 1, 0.0, 0.0, 0)
    cfg = replace(cfg, mtp_depth=1)
    counted, head = _size(cfg), cfg.vocab_size * cfg.dim
    share = cfg.experts_per_token / cfg.num_experts
    # `mtp_active` counts K of E
    routed = (counted.mtp + head - counted.mtp_active) / (1 - share) if share < 1 else 0.0
    return _parts(cfg, setting, batch, 1, counted.mtp_active - routed * share, routed, 1)


def _parts(
    cfg: ModelConfig,
    setting: Setting,
    batch: int,
    tokens: int,
    always: float,
    routed: float,
    layers: int,
) -> dict[str, Part]:
    rows, share = batch * tokens, cfg.experts_per_token / cfg.num_experts
    reached = setting.union(cfg, rows) / cfg.num_experts
    kind = pick_kind(cfg, None)
    per_token = bytes_per_token(cfg, kind, setting.cache_dtype) * layers / cfg.num_layers
    if kind == "latent":  # absorbed: a latent row is read as key and as value
        scores = 2.0 * cfg.num_heads * (2 * cfg.kv_latent_dim + cfg.rope_head_dim)
    else:
        scores = 2.0 * cfg.num_heads * (cfg.nope_head_dim + cfg.rope_head_dim + cfg.v_head_dim)
    return {
        "dense": Part(always * setting.weight_bytes, 2.0 * always * rows),
        "experts": Part(routed * reached * setting.weight_bytes, 2.0 * routed * share * rows),
        "cache": Part(
            batch * setting.context * per_token, scores * layers * setting.context * rows
        ),
    }


def seconds(parts: dict[str, Part], setting: Setting) -> float:
    """Add up the parts' times."""
    return sum(part.seconds(setting.bandwidth, setting.peak) for part in parts.values())


def step_cost(cfg: ModelConfig, setting: Setting, batch: int, drafts: int) -> tuple[float, float]:
    """Return (t(k) / t(0), d(k) / t(0)): what verifying and making k drafts costs, in plain steps.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> setting = Setting(3.35e12, 989e12, weight_bytes=1)
        >>> verify, draft = step_cost(preset("v3"), setting, batch=1, drafts=1)
        >>> 1.3 < verify < 1.6 and 0.02 < draft < 0.1  # a second token brings up to 8 other experts
        True
    """
    plain = seconds(verify_parts(cfg, setting, batch, 1), setting)
    verify = seconds(verify_parts(cfg, setting, batch, drafts + 1), setting)
    return verify / plain, drafts * seconds(draft_parts(cfg, setting, batch), setting) / plain


def expected_tokens(acceptance: float, drafts: int) -> float:
    """E(J) = 1 + a + … + a^J.

    Example:
        >>> expected_tokens(0.5, 2), expected_tokens(1.0, 4), expected_tokens(0.0, 4)
        (1.75, 5.0, 1.0)
    """
    return math.fsum(acceptance**j for j in range(drafts + 1))


def speed_up(
    cfg: ModelConfig, setting: Setting, batch: int, drafts: int, acceptance: float
) -> float:
    """Return tokens a second relative to plain decoding; 1 without drafts."""
    return expected_tokens(acceptance, drafts) / sum(step_cost(cfg, setting, batch, drafts))


def best_length(
    cfg: ModelConfig, setting: Setting, batch: int, acceptance: float, lengths: tuple[int, ...]
) -> tuple[int, float]:
    """Return (the draft length with the largest speed-up, that speed-up); 0 is plain decoding.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> best_length(preset("v3"), Setting(3.35e12, 989e12, weight_bytes=1), 1, 0.0, (1, 2))
        (0, 1.0)
    """
    found = [(1.0, 0), *((speed_up(cfg, setting, batch, j, acceptance), -j) for j in lengths)]
    gain, length = max(found)
    return -length, gain


def measured_union(expert_ids: np.ndarray, tokens: int) -> float:
    """Return the mean number of distinct experts that so many neighbouring tokens reach in a layer.

    Args: expert_ids: int [L, T, K], of one text.

    Example:
        >>> ids = np.array([[[0, 1], [1, 2], [2, 3], [0, 1]]])
        >>> measured_union(ids, tokens=2)  # 3, 3 and 4 of them
        3.3333333333333335
    """
    _layers, length, _ = expert_ids.shape
    counts = [
        len(np.unique(layer[i : i + tokens]))
        for layer in expert_ids
        for i in range(length - tokens + 1)
    ]
    return float(np.mean(counts)) if counts else math.nan
