"""A request for text: all its prompts are known, and its batch stays full.

Prompts are read once each, longest first, in groups that fill a batch with their samples. Between
two parts of the loop, rows that are done make room for texts that wait.
"""

import time
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.decoding.batch import Batch, Shapes, Start
from dsv3_jax.decoding.decode_config import DecodeConfig, Generated, NotFinite
from dsv3_jax.decoding.loop import Prefilled
from dsv3_jax.decoding.programs import NO_TOKEN
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.sharding import constrain
from dsv3_jax.model.transformer import Transformer


class Text(NamedTuple):
    """A text that is asked for."""

    prompt: tuple[int, ...]
    sample: int  # of this prompt
    row: int  # of the result


class Request:
    """A request on its devices, and the host's clock."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        config: DecodeConfig,
        skip: Collection[int],
    ):
        start = time.perf_counter()
        cfg = model.cfg
        self.config = config

        # the texts that wait, and the prompts that nobody has read
        self.waiting = deque(_texts(prompts, config.samples, skip))
        self.unread = deque(dict.fromkeys(text.prompt for text in self.waiting))
        lengths = [len(prompt) for prompt in prompts]
        texts, distinct = len(self.waiting), len(self.unread)
        shapes = Shapes.of(lengths, texts, distinct, config, cfg.max_positions)
        self.batch = Batch(model, config, shapes)

        self.read: Prefilled | None = None
        self.places: dict[tuple[int, ...], int] = {}  # of the prompts that `read` holds
        self.rows: dict[int, int] = {}  # the result's row that each row writes
        self.found = _nothing(len(prompts) * config.samples, config, cfg)
        self._admit()
        self.found.prefill_seconds = time.perf_counter() - start
        self.found.cache_bytes_per_token = self.batch.bytes_per_token

    @property
    def ended(self) -> bool:
        """Whether all texts are complete."""
        return not self.waiting and bool(self.batch.seen.done.all())

    def _admit(self) -> None:
        """Let texts that wait begin in rows that are done, at first in all."""
        batch = self.batch
        if batch.loop is None:
            free = deque(range(batch.shapes.batch))
        else:
            free = deque(np.flatnonzero(batch.seen.done).tolist())
        while free and self.waiting:
            if self.waiting[0].prompt not in self.places:
                self._read_prompts()

            # All that begin with these prompts, begin at once.
            starts = []
            while free and self.waiting and self.waiting[0].prompt in self.places:
                row = free.popleft()
                text = self.waiting.popleft()
                self.rows[row] = text.row
                place = self.places[text.prompt]
                own = self.config.seed, self.config.max_new_tokens, self.config.sampling
                starts.append(Start(row, place, text.prompt, text.sample, *own))
            assert self.read is not None
            batch.begin(self.read, starts)
        if not self.waiting:
            self.read = None
        batch.look()

    def _read_prompts(self) -> None:
        """Read the next prompts, as many at once as before; their width takes few values."""
        group, width = self.batch.shapes.group, self.batch.shapes.width
        prompts = [self.unread.popleft() for _ in range(min(group, len(self.unread)))]

        # Groups after the first are padded to a power of 2; their longest prompt comes first.
        if self.batch.loop is not None:
            power = 1 << (len(prompts[0]) - 1).bit_length()
            width = min(max(32, power), width)
        self.places = {prompt: place for place, prompt in enumerate(prompts)}
        self.read = self.batch.read(prompts, width)

    def decode(self, part: int) -> None:
        """Let texts that wait begin, then run until every row is `part` tokens further, or done."""
        start = time.perf_counter()
        if self.waiting:
            self._admit()
        self.batch.run(np.minimum(self.batch.seen.written + part, self.config.max_new_tokens))
        self.found.decode_seconds += time.perf_counter() - start

    def result(self) -> Generated:
        """The result so far."""
        loop, seen = self.batch.loop, self.batch.seen
        with sharding.use_mesh(self.batch.mesh):
            parts = (loop.text, loop.logprobs, loop.expert_ids)
            made = jax.device_get(_gathered(parts))  # everywhere
        text, logprobs, expert_ids = made
        found = self.found

        # Each row's new tokens; a row that is done is free for another text.
        for row, index in list(self.rows.items()):
            start = self.batch.prompt_lengths[row]
            end = start + seen.written[row]
            new = row, slice(start, end)
            found.tokens[index] = text[new].tolist()
            if NO_TOKEN in found.tokens[index]:
                raise NotFinite(f"prompt {index // self.config.samples}")
            if found.logprobs and found.model_logprobs:
                drawn, own = logprobs
                found.logprobs[index] = drawn[new].tolist()
                found.model_logprobs[index] = own[new].tolist()
            if found.expert_ids:
                found.expert_ids[index] = _up_to(expert_ids[row], end)
            if seen.done[row]:
                found.ended.append(index)
                del self.rows[row]

        # Shares over all steps of all rows. Later parts change the lists, so they are copied.
        found.acceptance = (seen.num_accepted.sum(0) / max(seen.steps.sum(), 1)).tolist()
        found.steps = self.batch.steps
        found.cache_bytes = loop.cache.nbytes
        copies: dict[str, Any] = {
            name: list(of) for name, of in vars(found).items() if isinstance(of, list)
        }
        return replace(found, **copies)


def _nothing(size: int, config: DecodeConfig, cfg: ModelConfig) -> Generated:
    """The result before the first token."""
    tokens, logprobs, model_logprobs = ([list[Any]() for _ in range(size)] for _ in range(3))
    ids = [np.zeros((cfg.num_sparse_layers, 0, cfg.experts_per_token), np.int32)] * size
    found = Generated(tokens, expert_ids=ids if config.return_routing else None)
    if config.logprobs:
        return replace(found, logprobs=logprobs, model_logprobs=model_logprobs)
    return found


def _up_to(expert_ids: np.ndarray, end: np.integer) -> np.ndarray:
    """A row's expert_ids [S, Lmoe, K] as int32 [Lmoe, tokens, K]; no pass has read the last."""
    ids = expert_ids[:end].copy()
    ids[end - 1 :] = -1
    return np.moveaxis(ids, 1, 0)


@jax.jit
def _gathered(tree: Any) -> Any:
    return jax.tree.map(constrain, tree)


def _texts(prompts: Sequence[Sequence[int]], samples: int, skip: Collection[int]) -> list[Text]:
    """The texts of a request, longest prompts first; equal prompts are always neighbours."""
    found = list[Text]()
    count = Counter[tuple[int, ...]]()
    for i, prompt in enumerate(prompts):
        same = tuple(map(int, prompt))
        found += [Text(same, count[same] + k, i * samples + k) for k in range(samples)]
        count[same] += samples
    return sorted(
        (text for text in found if text.row not in skip), key=lambda text: (-len(text.prompt), text)
    )
