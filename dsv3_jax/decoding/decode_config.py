"""A request: how to decode, the checks of what is asked for, and the answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import jax
import numpy as np

from dsv3_jax.config import CacheKind, ModelConfig
from dsv3_jax.model.cache import pick_dtype
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.sampling import GREEDY, Sampling

OWN_DRAFTS = ("mtp", "lookup")  # need no other model
LEAST = 1e-30  # below it a temperature or top_p would not be a normal float32


class NotFinite(ValueError):
    """The model's logits are NaN or infinite, so that no next token can be drawn."""

    def __init__(self, text: str):
        super().__init__(
            f"{text}: the model's logits are NaN or infinite; a weight is not finite, or a product "
            "overflows"
        )


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
        ValueError: max_new_tokens=0 is not an int of 1 or above
    """

    max_new_tokens: int  # a text
    sampling: Sampling = GREEDY
    # "latent", "expanded" or "none", see model/cache.py. None means the smallest there is
    cache: str | None = None
    # "float32", "bfloat16", "int8" or "float8_e4m3". None means the compute dtype
    cache_dtype: Any = None
    # None, "mtp" (own heads), "lookup" (the text), or a model
    draft: "str | Transformer | None" = None
    draft_length: int = 1  # tokens drafted a step
    stop_tokens: Sequence[int] = ()  # a row ends with the first of them
    seed: int = 0
    # prompts are padded to at least so many tokens, with cache slots for them: turns of a chat then
    # share a compilation
    pad_prompts_to: int = 0
    samples: int = 1  # texts a prompt
    batch_size: int | None = None  # rows that decode at once. None means all texts
    logprobs: bool = False  # of each new token
    return_routing: bool = False  # the experts of each token
    alternatives: int = 0  # likeliest tokens that `sampler.OpenSampler` keeps at each place

    def __post_init__(self) -> None:
        temperature, top_k, top_p = self.sampling if isinstance(self.sampling, Sampling) else GREEDY
        least = 0 if self.draft is None else 1
        kinds = get_args(CacheKind)
        rows = self.batch_size
        drafts = self.draft in (None, *OWN_DRAFTS) or isinstance(self.draft, Transformer)
        length = self.draft_length
        new = self.max_new_tokens
        pad_to = self.pad_prompts_to
        is_seed = _is_int(self.seed, 0) and self.seed < 1 << 32
        hot = _is_number(temperature) and (temperature == 0 or temperature >= LEAST)
        is_share = top_p is None or (_is_number(top_p) and LEAST <= top_p <= 1)
        routing = self.return_routing

        # Rows of (is it right, name, value, what it should be); the first wrong one is raised.
        for right, name, value, what in (
            (_is_int(new, 1), "max_new_tokens", new, "an int of 1 or above"),
            (_is_int(length, least), "draft_length", length, f"an int of {least} or above"),
            (_is_int(pad_to, 0), "pad_prompts_to", pad_to, "an int of 0 or above"),
            (is_seed, "seed", self.seed, "an int within [0, 2**32)"),
            # the distribution that tokens are drawn from
            (isinstance(self.sampling, Sampling), "sampling", self.sampling, "a Sampling"),
            (hot, "temperature", temperature, f"0, or a float of {LEAST} or above"),
            (top_k is None or _is_int(top_k, 1), "top_k", top_k, "an int of 1 or above"),
            (is_share, "top_p", top_p, f"a float within [{LEAST}, 1]"),
            # the cache, and who drafts
            (self.cache in (None, *kinds), "cache", self.cache, f"one of {', '.join(kinds)}"),
            (drafts, "draft", self.draft, "None, 'mtp', 'lookup' or a Transformer"),
            # texts: how many at once, what is returned of them, and where they end
            (_is_int(self.samples, 1), "samples", self.samples, "an int of 1 or above"),
            (rows is None or _is_int(rows, 1), "batch_size", rows, "an int of 1 or above"),
            (isinstance(self.logprobs, bool), "logprobs", self.logprobs, "a bool"),
            (isinstance(routing, bool), "return_routing", routing, "a bool"),
            (_is_list(self.stop_tokens), "stop_tokens", self.stop_tokens, "a list of token ids"),
        ):
            if not right:
                raise ValueError(f"{name}={value!r} is not {what}")

        # A dtype that no cache has is refused, and pairs of settings that exclude each other.
        pick_dtype("float32", self.cache_dtype)
        if self.draft is not None and self.cache == "none":
            raise ValueError("cache='none' decodes without drafts; leave out draft, or cache")
        if self.samples > 1 and temperature == 0:
            raise ValueError(
                f"samples={self.samples} would be equal texts at temperature 0; raise temperature"
            )
        object.__setattr__(self, "stop_tokens", tuple(_numbers(self.stop_tokens)))

    @property
    def num_drafts(self) -> int:
        """J: tokens drafted a step; 0 if nobody drafts."""
        return 0 if self.draft is None else self.draft_length

    def check(self, cfg: ModelConfig, prompts: Sequence[Sequence[int]]) -> None:
        """Check that a model can continue prompts this way.

        Raises: ValueError, one sentence with the offending value.
        """
        size = cfg.vocab_size
        depth = cfg.mtp_depth
        other = getattr(self.draft, "cfg", cfg)
        if not _is_list(prompts) or not len(prompts):
            raise ValueError(
                f"prompts={prompts!r} is not a list of prompts; write one prompt as [[1, 2, 3]]"
            )

        # Every id must be in the vocabulary. A prompt has at least one; stop tokens may be none.
        for i, tokens in enumerate((*prompts, self.stop_tokens)):
            is_prompt = i < len(prompts)
            name = f"prompt {i}" if is_prompt else "stop_tokens"
            check_tokens(name, tokens, size, may_be_empty=not is_prompt)

        # A draft is accepted by its p and q, so both models need one vocabulary.
        if other.vocab_size != size:
            raise ValueError(
                f"vocab_size={other.vocab_size} of the draft model is not the model's {size}"
            )
        if self.return_routing and not cfg.num_sparse_layers:
            raise ValueError("return_routing=True needs routed experts, and the model has none")
        if self.draft == "mtp" and not depth:
            raise ValueError("draft='mtp' needs multi-token heads, and the model's mtp_depth is 0")

        # Chained heads draft beyond their depth. A parallel head drafts one token.
        as_long = cfg.head_kind.reads_tokens or self.draft_length <= depth
        if self.draft == "mtp" and not as_long:
            raise ValueError(
                f"draft_length={self.draft_length} is more than mtp_depth={depth}: a "
                f"{cfg.mtp_kind} head drafts one"
            )

        # The prompt, the new tokens and the drafts beyond them need positions in both models.
        reach = min(cfg.max_positions, other.max_positions)
        longest = max(map(len, prompts))
        number = [*map(len, prompts)].index(longest)
        if longest + self.max_new_tokens + self.num_drafts > reach:
            drafts = f" with {self.num_drafts} drafts a step" if self.num_drafts else ""
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens}{drafts} does not fit: prompt {number} has "
                f"{longest}, the most, and max_positions={reach}"
            )


@dataclass
class Generated:
    """What `generate` returns.

    Example:
        >>> result = Generated([[1, 2, 3]], acceptance=[0.5, 0.25], decode_seconds=0.5)
        >>> result.mean_accepted, result.tokens_per_s
        (1.75, 4.0)
    """

    # new tokens only, of each prompt's samples; a stop token is the last of its row
    tokens: list[list[int]]
    # share of steps that accepted the draft at each position
    acceptance: list[float] = field(default_factory=list)
    steps: int = 0  # forward passes of the model after prefill
    prefill_seconds: float = 0.0  # with compilation if these shapes were not run before
    decode_seconds: float = 0.0  # likewise
    cache_bytes: int = 0  # of all slots, free ones too
    cache_bytes_per_token: int = 0
    # of each new token, in nats, if asked for: of the distribution that it was drawn from, which
    # temperature, top_k and top_p change; 0 at temperature 0, where the token is certain
    logprobs: list[list[float]] | None = None
    model_logprobs: list[list[float]] | None = None  # of the model's own, at temperature 1
    # if asked for: int32 [Lmoe, tokens, K] of the prompt's tokens and the new ones; -1 at the last,
    # which nobody read
    expert_ids: list[np.ndarray] | None = None
    # which rows are complete, in the order of their ends
    ended: list[int] = field(default_factory=list)

    @property
    def mean_accepted(self) -> float:
        """Tokens that a step adds to a sequence, before its end: 1 and the accepted drafts."""
        return 1.0 + sum(self.acceptance)

    @property
    def tokens_per_s(self) -> float:
        """New tokens after each row's first, a second of decoding."""
        return sum(max(len(row) - 1, 0) for row in self.tokens) / max(self.decode_seconds, 1e-9)


def check_tokens(name: str, tokens: Any, vocab_size: int, may_be_empty: bool = False) -> None:
    """Check a list of token ids.

    Raises: ValueError, one sentence that begins with the name.

    Example:
        >>> check_tokens("prompt 0", [3, 260], 260)
        Traceback (most recent call last):
            ...
        ValueError: prompt 0 holds token 260, which is no id of a vocabulary of 260
    """
    if not _is_list(tokens):
        raise ValueError(
            f"{name}={tokens!r} is not a list of token ids; encode text with a tokenizer first"
        )
    if not len(tokens) and not may_be_empty:
        raise ValueError(f"{name} is empty; give at least one token")
    for token in _numbers(tokens):
        whole = isinstance(token, int | np.integer) and not isinstance(token, bool)
        if not whole or not 0 <= token < vocab_size:
            raise ValueError(
                f"{name} holds token {token!r}, which is no id of a vocabulary of {vocab_size}"
            )


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(tokens: Any) -> Any:
    """Tokens one by one: those of a JAX array would be arrays themselves."""
    return np.asarray(tokens) if isinstance(tokens, jax.Array) else tokens


def _is_list(value: Any) -> bool:
    """A sequence, or an array with at least one axis; text is neither."""
    return getattr(value, "ndim", 0) > 0 or (
        isinstance(value, Sequence) and not isinstance(value, str | bytes)
    )
