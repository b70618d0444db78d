"""What the compiled programs of decoding read, and the state of their loop."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from dsv3_jax.decoding.decode_config import DecodeConfig
from dsv3_jax.decoding.drafters import make_drafter
from dsv3_jax.model.cache import Cache
from dsv3_jax.model.decode import DecodeWeights
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.sampling import RowSampling

STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoder:
    """The arrays and the settings that the compiled programs of a request read."""

    models: tuple[tuple[Transformer, DecodeWeights | None], ...]  # the model, and one that drafts
    stops: Any  # int32 [n]
    draft: str | None = field(metadata=STATIC)  # None, "mtp", "lookup" or "model"
    draft_length: int = field(metadata=STATIC)  # J: drafts a step
    # with the cache that is used, without what no program depends on
    config: DecodeConfig = field(metadata=STATIC)
    capacity: int = field(metadata=STATIC)
    slots: int = field(metadata=STATIC)  # of the cache after the prompts; it grows to `capacity`

    @property
    def drafter(self) -> Any:
        return make_drafter(self.draft, *self.models[-1]) if self.draft else None


class Prefilled(NamedTuple):
    """What reading P prompts leaves.

    Rows of the loop begin with it, for one prompt as many as it has samples.
    """

    tokens: Array  # int32 [P, T]
    lengths: Array  # int32 [P]
    x: Array  # [P, 1, D]: the trunk's output at each prompt's last token
    cache: Cache  # of T slots
    drafter: Any  # the drafter's state
    expert_ids: Any  # int32 [P, T, Lmoe, K]; None if nobody asked


class Begins(NamedTuple):
    """What each row begins with."""

    source: Array  # int32 [B]: its prompt among those that were read; −1: the row stays as it is
    texts: Array  # int32 [B]: the prompt's hash, see `row_keys`
    samples: Array  # int32 [B]: which of the prompt's samples it is
    seeds: Array  # uint32 [B]
    limits: Array  # int32 [B]: new tokens at most
    sampling: RowSampling | None = None  # None: the request's, for all


class Watched(NamedTuple):
    """What is kept of each new token for people who look on."""

    drafted: Array  # int32 [B, S]: the token that was drafted for this place; −1: none was
    alternatives: Array  # int32 [B, S, n]: the likeliest tokens
    logprobs: Array  # float32 [B, S, n]: theirs, at temperature 1


class Loop(NamedTuple):
    """The decoding loop's state.

    On a mesh, `h`, `text` and caches are sharded by rows; others replicated.
    """

    cache: Any  # of the tokens before the newest
    drafter: Any  # the drafter's state
    # [B, J + 1, D]: what heads read of the trunk at the last step's tokens; None if no head drafts
    h: Any
    unread: Array  # int32 [B]: tokens of the last step, which the drafter has not read
    keys: Array  # [B, 2]: of each row's draws, and of its drafts'
    done: Array  # bool [B]
    text: Array  # int32 [B, S]: each prompt and its new tokens
    written: Array  # int32 [B]: new tokens of each row
    limits: Array  # int32 [B]: of them, at most
    steps: Array  # int32 [B]: of each row while it was not done, for all its texts
    num_accepted: Array  # int32 [B, J]: accepted drafts, by position, for all its texts
    # None in the next three: nobody asked
    logprobs: Any = None  # two of float32 [B, S], of each new token, see `Generated`
    expert_ids: Any = None  # int32 [B, S, Lmoe, K], of each token that was read
    watched: Any = None  # `Watched`
    sampling: RowSampling | None = None  # None means the request's, for all
