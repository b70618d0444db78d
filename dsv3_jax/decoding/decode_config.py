"""A request: how to decode, and the checks of what is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from dsv3_jax.config import CacheKind, ModelConfig
from dsv3_jax.model.cache import pick_dtype
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.sampling import GREEDY, Sampling

OWN_DRAFTS = ("mtp", "lookup")  # need no other model
UNREAD = 32  # draft_length="auto": positions that plain steps may leave unread by the drafter; beyond, drafting ends


@dataclass(frozen=True)
class DecodeConfig:
    """How to decode: made once, checked at creation, passed whole.

    Raises: ValueError, one sentence with the offending value.

    Example:
        >>> DecodeConfig(max_new_tokens=8, draft="mtp", draft_length=2).num_drafts
        2
        >>> DecodeConfig(max_new_tokens=0)
        Traceback (most recent call last):
            ...
        ValueError: max_new_tokens=0 is below 1
    """

    max_new_tokens: int  # a prompt
    sampling: Sampling = GREEDY
    cache: str | None = None  # "latent", "expanded" or "none", see model/cache.py; None: the smallest there is
    cache_dtype: Any = None  # "float32", "bfloat16", "int8" or "float8_e4m3"; None: the compute dtype
    draft: "str | Transformer | None" = None  # None, "mtp" (own heads), "lookup" (the text), or a model
    draft_length: int | str = 1  # tokens drafted a step, or "auto", see `auto_length`
    stop_tokens: Sequence[int] = ()  # a row ends with the first of them
    seed: int = 0
    pad_prompts_to: int = 0  # tokens at least, with cache slots for them: turns of a chat then share a compilation

    def __post_init__(self) -> None:
        if isinstance(self.draft_length, str) and self.draft_length != "auto":
            raise ValueError(f"draft_length={self.draft_length!r} is not an int or 'auto'")
        for name in ("max_new_tokens", "draft_length", "seed", "pad_prompts_to"):
            if not _is_int(getattr(self, name)) and (name, getattr(self, name)) != ("draft_length", "auto"):
                raise ValueError(f"{name}={getattr(self, name)!r} is not an int")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} is below 1")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed={self.seed} is outside [0, 2**32): JAX keeps 32 bits of a seed")
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"sampling={self.sampling!r} is not a Sampling")
        temperature, top_k, top_p = self.sampling
        if not _is_float(temperature) or not temperature >= 0:
            raise ValueError(f"temperature={temperature!r} is not a float of 0 or above")
        if top_k is not None and (not _is_int(top_k) or top_k < 1):
            raise ValueError(f"top_k={top_k!r} is not an int of 1 or above")
        if top_p is not None and (not _is_float(top_p) or not 0 < top_p <= 1):
            raise ValueError(f"top_p={top_p!r} is not a float within (0, 1]")
        if self.cache not in (None, *get_args(CacheKind)):
            raise ValueError(f"cache={self.cache!r} is not one of {', '.join(get_args(CacheKind))}")
        pick_dtype("float32", self.cache_dtype)
        if self.draft is not None and self.num_drafts < 1:
            raise ValueError(f"draft_length={self.draft_length} is below 1")
        if self.draft is not None and self.draft not in OWN_DRAFTS and not isinstance(self.draft, Transformer):
            raise ValueError(f"draft={self.draft!r} is not None, 'mtp', 'lookup' or a Transformer")
        if self.draft is not None and self.cache == "none":
            raise ValueError("cache='none' decodes without drafts; leave out draft, or cache")
        if not _is_list(self.stop_tokens):
            raise ValueError(f"stop_tokens={self.stop_tokens!r} is not a list of token ids")
        object.__setattr__(self, "stop_tokens", tuple(self.stop_tokens))

    @property
    def num_drafts(self) -> int:
        """J: tokens drafted a step, or the positions that "auto" has in reserve; 0 if nobody drafts."""
        if self.draft is None:
            return 0
        return self.draft_length if isinstance(self.draft_length, int) else UNREAD

    def check(self, cfg: ModelConfig, prompts: Sequence[Sequence[int]]) -> None:
        """Check that a model can continue prompts this way.

        Raises: ValueError, one sentence with the offending value.
        """
        _check_tokens(cfg, prompts, self.stop_tokens)
        for i, prompt in enumerate(prompts):
            if len(prompt) + self.max_new_tokens > cfg.max_positions:
                raise ValueError(
                    f"prompt {i} of {len(prompt)} tokens and max_new_tokens={self.max_new_tokens} are more than the "
                    f"model's max_positions={cfg.max_positions}"
                )
        if self.draft is None:
            return
        reach = cfg.max_positions
        if isinstance(self.draft, Transformer):
            if self.draft.cfg.vocab_size != cfg.vocab_size:
                raise ValueError(
                    f"vocab_size={self.draft.cfg.vocab_size} of the draft model is not the model's {cfg.vocab_size}"
                )
            reach = min(reach, self.draft.cfg.max_positions)
        elif self.draft == "lookup":
            pass
        elif not cfg.mtp_depth:
            raise ValueError("draft='mtp' needs multi-token heads, and the model's mtp_depth is 0")
        elif self.draft_length != "auto" and not cfg.head_kind.reads_tokens and self.num_drafts > cfg.mtp_depth:
            raise ValueError(
                f"draft_length={self.draft_length} is more than mtp_depth={cfg.mtp_depth}: each {cfg.mtp_kind} head "
                "drafts one token"
            )
        longest = max(map(len, prompts)) + self.max_new_tokens
        if longest + self.num_drafts > reach:
            raise ValueError(
                f"draft_length={self.draft_length!r} does not fit: prompt and continuation of {longest} tokens leave "
                f"{reach - longest} of max_positions={reach}, and it needs {self.num_drafts}"
            )


def _check_tokens(cfg: ModelConfig, prompts: Sequence[Sequence[int]], stop_tokens: Sequence[int]) -> None:
    if not _is_list(prompts):
        raise ValueError(f"prompts={prompts!r} is not a list of prompts; write one prompt as [[1, 2, 3]]")
    if not len(prompts):
        raise ValueError("prompts is empty; give at least one")
    for i, prompt in enumerate(prompts):
        if not _is_list(prompt):
            raise ValueError(f"prompt {i}={prompt!r} is not a list of token ids; encode text with a tokenizer first")
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; give at least one token")
        for token in prompt:
            _check_token(cfg, f"prompt {i} holds token", token)
    for token in stop_tokens:
        _check_token(cfg, "stop_tokens holds token", token)


def _check_token(cfg: ModelConfig, what: str, token: Any) -> None:
    if not _is_int(token) and not isinstance(token, np.integer):
        raise ValueError(f"{what} {token!r}, which is not a token id")
    if not 0 <= token < cfg.vocab_size:
        raise ValueError(f"{what} {token}, outside the vocabulary of {cfg.vocab_size}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_float(value: Any) -> bool:
    return isinstance(value, float) or _is_int(value)


def _is_list(value: Any) -> bool:
    """A sequence, or an array with at least one axis; text is neither."""
    return getattr(value, "ndim", 0) > 0 or (isinstance(value, Sequence) and not isinstance(value, str | bytes))
