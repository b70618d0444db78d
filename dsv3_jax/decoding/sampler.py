"""A sampler that stays open: texts come and go while others decode.

    number = sampler.add(ask)         a text waits for a row
    for number, new in sampler.step():    what a part added to each text
    sampler.cancel(number)            its row is free

Each text is that of `generate` with its seed, whatever shares its batch.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax.decoding.batch import Batch, Shapes, Start, round_up
from dsv3_jax.decoding.decode_config import DecodeConfig
from dsv3_jax.decoding.drafters import window
from dsv3_jax.decoding.loop import Loop, Prefilled
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.sharding import constrain
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.sampling import GREEDY, Sampling

CONTEXT = 4096  # tokens of a text with its prompt, where the model can read more
MOST_PART = 32  # tokens between two looks at the batch, at most
ALTERNATIVES = 5  # likeliest tokens that are kept at each place
PATIENCE = 8  # parts until a batch with too many rows has fewer
SHORT = 32  # tokens of the shortest width that prompts are padded to


class Ask(NamedTuple):
    """A text that is asked for."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    seed: int = 0
    sample: int = 0  # of this prompt: texts of one prompt and seed differ by it
    # int32 [Lmoe, T, K]: experts of the prompt in place of the routers' choices; −1 chooses freely
    given: Any = None


class New(NamedTuple):
    """What a part added to a text."""

    tokens: list[int]  # a stop token is the last, or −1: the logits are NaN or infinite
    logprobs: list[float]  # of each, in nats, the model's own at temperature 1
    # of each, the likeliest tokens and their log p, best first
    alternatives: list[list[tuple[int, float]]]
    # of each, the token that was drafted for its place, −1 if none was; equal means accepted
    drafted: list[int]
    experts_from: int  # position, in prompt and text, of the first row of expert_ids
    # int32 [n, Lmoe, K]: of the positions that were read, the newest is not; None without experts
    expert_ids: np.ndarray | None
    ended: bool


class _Text:
    """A text in a row, or one that waits for a row."""

    def __init__(self, number: int, ask: Ask):
        self.number = number
        self.ask = ask
        self.told = 0  # tokens that `step` has handed out
        # of the prompt, until they are handed out
        self.prompt_ids: np.ndarray | None = None


class OpenSampler:
    """Rows that decode whatever is asked for, in parts.

    Args:
        model: the model; on a mesh it decodes there.
        rows: texts that decode at once, at most.
        context: tokens of a text with its prompt. None means the model's max_positions, at most
            4,096.
        stop_tokens, draft, draft_length, cache, cache_dtype: as `generate`.
    Raises: ValueError as `generate`.

    Example:
        >>> import dsv3_jax as ds, jax.numpy as jnp
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract(cfg))  # all are 0
        >>> sampler = OpenSampler(model, rows=2, context=64)
        >>> number = sampler.add(Ask((1, 2, 3), 4))
        >>> [new.tokens for _ in range(2) for new in sampler.step(part=8).values()]
        [[0], [0, 0, 0]]
    """

    def __init__(
        self,
        model: Transformer,
        *,
        rows: int = 16,
        context: int | None = None,
        stop_tokens: Sequence[int] = (),
        draft: "str | Transformer | None" = None,
        draft_length: int = 1,
        cache: str | None = None,
        cache_dtype: Any = None,
    ):
        cfg = model.cfg
        for name, value, least in (("rows", rows, 1), ("context", context, 2)):
            if value is not None and value < least:
                raise ValueError(f"{name}={value} is not an int of {least} or above")

        # What the loop measures of each token is decided once for all texts.
        self.config = config = DecodeConfig(
            max_new_tokens=1,
            cache=cache,
            cache_dtype=cache_dtype,
            draft=draft,
            draft_length=draft_length,
            stop_tokens=stop_tokens,
            batch_size=rows,
            logprobs=True,
            return_routing=cfg.num_sparse_layers > 0,
            alternatives=min(ALTERNATIVES, cfg.vocab_size),
        )
        reach = min(cfg.max_positions, getattr(draft, "cfg", cfg).max_positions) - config.num_drafts
        if context is not None and context > reach:
            less = f" less {config.num_drafts} drafts" if config.num_drafts else ""
            raise ValueError(f"context={context} is above {reach}, the model's max_positions{less}")
        self.context = min(context or CONTEXT, reach)
        self.model = model
        config.check(cfg, [[0]])

        # The rows of the batch, first as few as there may be.
        capacity = round_up(self.context + config.num_drafts)
        self.sizes = _sizes(rows)
        self.batch = Batch(model, config, Shapes(self.sizes[0], 1, SHORT, capacity, capacity))

        # The texts, and what decides when one is read and when the batch grows or shrinks.
        self.waiting = deque[_Text]()
        self.rows = dict[int, _Text]()  # of the rows that decode
        self.prompt: Any = None  # what was read last, with the experts that were given
        self.read: Prefilled | None = None
        self.count = 0  # of all texts so far
        self.began = False  # texts, in the last step: the next one runs
        self.spare = 0  # parts since the batch was as full as its size needs
        self.seconds = 1.0  # of a part, for each of its tokens, as last measured

        # The loop begins with no text.
        self.batch.begin(self.batch.read([[0]], SHORT), (), own_sampling=True)
        self.batch.look()

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.rows

    def check(self, ask: Ask) -> None:
        """Check what is asked for.

        Raises: ValueError as `generate`, and for a text that does not fit the context.
        """
        config = DecodeConfig(ask.max_new_tokens, ask.sampling, seed=ask.seed)
        config.check(self.model.cfg, [ask.prompt])
        if ask.given is not None and self.config.cache == "none":
            raise ValueError(
                "cache='none' reads the prompt again for each token, where its experts are not "
                "given; a forced expert needs a cache"
            )
        if len(ask.prompt) + ask.max_new_tokens > self.context:
            raise ValueError(
                f"max_new_tokens={ask.max_new_tokens} does not fit: the prompt has "
                f"{len(ask.prompt)} tokens, and the context is {self.context}"
            )

    def add(self, ask: Ask) -> int:
        """Let a text wait for a row, and return its number.

        Raises: ValueError as `check`.
        """
        self.check(ask)
        self.count += 1
        self.waiting.append(_Text(self.count, ask))
        return self.count

    def cancel(self, number: int) -> None:
        """Drop a text. Its row is free for the next one; a number that has ended does nothing."""
        self.waiting = deque(text for text in self.waiting if text.number != number)
        for row, text in list(self.rows.items()):
            if text.number == number:
                del self.rows[row]
                stopped = np.arange(self.batch.shapes.batch) == row
                with sharding.use_mesh(self.batch.mesh):
                    done = _either(self.batch.loop.done, stopped)
                self.batch.loop = self.batch.loop._replace(done=done)
                self.batch.look()

    def step(self, part: int = 8) -> dict[int, New]:
        """Let texts that wait begin in free rows, else run all rows `part` tokens further.

        A text that begins has its first token at once.

        Returns: what was added to each text that has more; nothing if all have ended.
        """
        self._fit()
        free = deque(sorted(set(range(self.batch.shapes.batch)) - set(self.rows)))
        if self.waiting and free and not self.began:
            self.began = True
            return self._news(self._begin(free), 1)
        self.began = False
        part = min(part, MOST_PART)
        if self.rows:
            start = time.perf_counter()
            self.batch.run(self.batch.seen.written + part)
            self.seconds = (time.perf_counter() - start) / part
        return self._news(list(self.rows), MOST_PART)

    def _fit(self) -> None:
        """Let the batch have as many rows as there are texts; it takes few sizes.

        A row without a text costs as much as another one, and each size is a compilation.
        """
        texts = min(len(self.rows) + len(self.waiting), self.sizes[-1])
        size = next(size for size in self.sizes if size >= texts)
        now = self.batch.shapes.batch
        self.spare = self.spare + 1 if size < now else 0
        if size > now or self.spare > PATIENCE or (size < now and not self.rows):
            kept = sorted(self.rows)
            self.batch.resize(kept, size)
            self.rows = {i: self.rows[row] for i, row in enumerate(kept)}
            self.spare = 0

    def _begin(self, free: deque[int]) -> list[int]:
        """Let texts begin, and return their rows. Equal prompts are read once."""
        rows = []
        while free and self.waiting:
            ask = self.waiting[0].ask
            prompt = (ask.prompt, None if ask.given is None else ask.given.tobytes())
            if prompt != self.prompt:
                self._read(ask)
                self.prompt = prompt
            assert self.read is not None

            row = free.popleft()
            text = self.waiting.popleft()
            if self.read.expert_ids is not None:
                text.prompt_ids = np.asarray(self.read.expert_ids[0, : len(ask.prompt) - 1])
            limit = ask.max_new_tokens
            start = Start(row, 0, ask.prompt, ask.sample, ask.seed, limit, ask.sampling)
            self.batch.begin(self.read, [start], own_sampling=True)
            self.rows[row] = text
            rows.append(row)
        self.batch.look()
        return rows

    def _read(self, ask: Ask) -> None:
        """Read a prompt, padded to a power of 2 so that few widths are compiled."""
        width = max(SHORT, 1 << (len(ask.prompt) - 1).bit_length())
        width = min(width, self.batch.shapes.capacity, self.model.cfg.max_positions)
        given = ask.given
        if given is not None:
            padding = [(0, 0), (0, width - len(ask.prompt)), (0, 0)]
            given = np.pad(given, padding, constant_values=-1)[:, None]
        self.read = self.batch.read([ask.prompt], width, given)

    def _news(self, rows: Sequence[int], part: int) -> dict[int, New]:
        """What was added to the texts of some rows. Rows whose text has ended are free."""
        # One window of each row, from one position before its new tokens: experts are new there,
        # too.
        seen = self.batch.seen
        first = np.zeros(self.batch.shapes.batch, np.int32)
        for row in rows:
            first[row] = self.batch.prompt_lengths[row] + self.rows[row].told - 1
        width = part * (self.config.num_drafts + 1) + 1
        with sharding.use_mesh(self.batch.mesh):
            made = jax.device_get(_from(self.batch.loop, first, width=width))
        text, logprobs, expert_ids, watched = made

        news = dict[int, New]()
        for row in rows:
            of = self.rows[row]
            count = int(seen.written[row]) - of.told
            new = slice(1, count + 1)
            ended = bool(seen.done[row])
            if not count and not ended:
                continue

            # Experts: of the prompt, too, with the first news.
            experts_from = int(first[row])
            ids = None
            if expert_ids is not None:
                ids = expert_ids[row, :count]
                if of.prompt_ids is not None:
                    ids = np.concatenate([of.prompt_ids, ids])
                    experts_from = 0
                    of.prompt_ids = None

            likeliest = zip(watched.alternatives[row, new], watched.logprobs[row, new], strict=True)
            news[of.number] = New(
                tokens=text[row, new].tolist(),
                logprobs=logprobs[row, new].tolist(),
                alternatives=[
                    [*zip(five.tolist(), nats.tolist(), strict=True)] for five, nats in likeliest
                ],
                drafted=watched.drafted[row, new].tolist(),
                experts_from=experts_from,
                expert_ids=ids,
                ended=ended,
            )

            of.told += count
            if ended:
                del self.rows[row]
        return news


def _sizes(rows: int) -> list[int]:
    """The numbers of rows that a batch may have.

    Example:
        >>> _sizes(16), _sizes(6)
        ([1, 4, 16], [1, 6])
    """
    sizes = [rows]
    while sizes[0] > 1:
        sizes.insert(0, sizes[0] // 4 or 1)
    return sizes


@jax.jit
def _either(done: jax.Array, stopped: jax.Array) -> jax.Array:
    return constrain(done | stopped)


def _window(loop: Loop, first: jax.Array, *, width: int) -> Any:
    """Of each row what it made from its own position on, everywhere."""
    _, own = loop.logprobs
    kept = (loop.text, own, loop.expert_ids, loop.watched)
    return jax.tree.map(lambda x: constrain(window(x, first, width)), kept)


_from = jax.jit(_window, static_argnames="width")
