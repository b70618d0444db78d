"""A request for text: the shapes of its arrays, its programs, and how the host leads them.

Prompts are read once each, longest first, in groups that fill a batch with their samples. The
decoding loop runs in parts. Between two parts, rows that are done make room for texts that wait, so
that the batch stays full.
"""

import hashlib
import time
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.decoding.decode_config import DecodeConfig, Generated
from dsv3_jax.decoding.programs import Decoder, Prefilled, programs
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.sharding import constrain
from dsv3_jax.model.cache import Cache, pick_dtype, pick_kind
from dsv3_jax.model.counting import bytes_per_token
from dsv3_jax.model.decode import prepare_decode
from dsv3_jax.model.transformer import Transformer

FIRST_SLOTS = 1024  # of a cache whose empty slots are read too: it begins small
GROWTH = 4  # slots after growing over those before; each number of slots is a compilation


class Text(NamedTuple):
    """A text that is asked for."""

    prompt: tuple[int, ...]
    sample: int  # of this prompt
    row: int  # of the result


class Shapes(NamedTuple):
    """The sizes of a request's arrays. Many requests share few, and so their compilations."""

    batch: int  # rows that decode at once
    group: int  # prompts that are read at once: they fill a batch with their samples
    width: int  # tokens of a prompt, with padding
    capacity: int  # tokens of a text, with its prompt
    slots: int  # of the cache after the prompts

    @classmethod
    def of(
        cls, lengths: Collection[int], texts: int, distinct: int, config: DecodeConfig, most: int
    ) -> "Shapes":
        """The shapes of a request; its cache begins with all slots.

        Args:
            lengths: of all prompts.
            texts, distinct: how many texts are to be made, from so many prompts that differ.
            most: tokens that the model can read.

        Example:
            >>> Shapes.of([5, 40], 2, 2, DecodeConfig(max_new_tokens=30), 4096)
            Shapes(batch=2, group=2, width=64, capacity=96, slots=96)
        """
        batch = min(config.batch_size or texts, texts)
        longest = max(*lengths, config.pad_prompts_to)
        capacity = _round_up(longest + config.max_new_tokens + config.num_drafts)
        return cls(
            batch=batch,
            group=min(-(-batch // config.samples), distinct),
            width=min(_round_up(longest), most),
            capacity=capacity,
            slots=capacity,
        )

    def grown(self, needed: int, slots: int) -> int:
        """The slots that a cache of `slots` grows to, so that it holds `needed` tokens."""
        while slots < min(needed, self.capacity):
            slots = min(GROWTH * slots, self.capacity)
        return slots


class Request:
    """A request on its devices: what the programs read and made so far, and the host's clock."""

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
        self.mesh = sharding.mesh_of(model)

        # the texts that wait, and the prompts that nobody has read
        self.waiting = deque(_texts(prompts, config.samples, skip))
        self.unread = deque(dict.fromkeys(text.prompt for text in self.waiting))
        lengths = [len(prompt) for prompt in prompts]
        texts, distinct = len(self.waiting), len(self.unread)
        shapes = Shapes.of(lengths, texts, distinct, config, cfg.max_positions)

        # A device that reads empty slots too begins with few of them.
        kind = "none" if config.cache == "none" else pick_kind(cfg, config.cache)
        dtype = pick_dtype(model.compute_dtype, config.cache_dtype)
        if kind != "none" and model.kernels.device.reads_all_slots:
            first = shapes.grown(shapes.width, min(FIRST_SLOTS, shapes.capacity))
            shapes = shapes._replace(slots=first)
        self.shapes = shapes
        self.slots = shapes.slots  # of the cache, as it grows

        # the loop, as the host sees it
        self.loop: Any = None
        self.seen: Any = None  # the loop's small arrays, as NumPy's
        self.read: Prefilled | None = None
        self.places: dict[tuple[int, ...], int] = {}  # of the prompts that `read` holds
        self.prompt_lengths = np.zeros(shapes.batch, np.int32)  # of each row
        self.rows: dict[int, int] = {}  # the result's row that each row writes
        self.steps = 0
        self.found = _nothing(len(prompts) * config.samples, config, cfg)

        # never while a generator waits: the mesh in use is the caller's, too
        with sharding.use_mesh(self.mesh):
            decoder = _decoder(model, config, kind, dtype, shapes, self.mesh)
            self.leaves, form = jax.tree.flatten(decoder)
            self.programs = programs(form)
        self._admit()
        self.found.prefill_seconds = time.perf_counter() - start
        if kind != "none":
            self.found.cache_bytes_per_token = bytes_per_token(cfg, kind, dtype)

    def _admit(self) -> None:
        """Let texts that wait begin in rows that are done, at first in all."""
        if self.loop is None:
            free = deque(range(self.shapes.batch))
        else:
            free = deque(np.flatnonzero(self.seen.done).tolist())
        while free and self.waiting:
            if self.waiting[0].prompt not in self.places:
                self._read_prompts()

            # Of each row that begins: where its prompt was read, the prompt's hash, and its sample.
            begins = np.full((3, self.shapes.batch), -1, np.int32)
            while free and self.waiting and self.waiting[0].prompt in self.places:
                row = free.popleft()
                text = self.waiting.popleft()
                self.rows[row] = text.row
                self.prompt_lengths[row] = len(text.prompt)
                begins[:, row] = self.places[text.prompt], _hash(text.prompt), text.sample

            first = np.arange(self.shapes.group)
            in_order = self.loop is None and np.array_equal(begins[0], first)
            args = self.leaves, self.loop, self.read, begins, np.uint32(self.config.seed)
            with sharding.use_mesh(self.mesh):
                self.loop = self.programs.admit(*args, in_order=in_order)
        if not self.waiting:
            self.read = None
        self.seen = self._look()

    def _read_prompts(self) -> None:
        """Read the next prompts, as many at once as before; their width takes few values."""
        group, width = self.shapes.group, self.shapes.width
        prompts = [self.unread.popleft() for _ in range(min(group, len(self.unread)))]

        # Groups after the first are padded to a power of 2; their longest prompt comes first.
        if self.loop is not None:
            power = 1 << (len(prompts[0]) - 1).bit_length()
            width = min(max(32, power), width)
        self.places = {prompt: place for place, prompt in enumerate(prompts)}
        with sharding.use_mesh(self.mesh):
            self.read = self.programs.prefill(self.leaves, *_pad(prompts, group, width))

    def decode(self, part: int) -> None:
        """Let texts that wait begin, then run until every row is `part` tokens further, or done."""
        start = time.perf_counter()
        if self.waiting:
            self._admit()

        # A program ends when each row has `until` tokens or is done, or when the cache must grow.
        until = np.minimum(self.seen.written + part, self.config.max_new_tokens)
        while (~self.seen.done & (self.seen.written < until)).any():
            self._make_room()
            before = self.seen.steps
            with sharding.use_mesh(self.mesh):
                self.loop = self.programs.decode(self.leaves, self.loop, until)
            self.seen = self._look()
            self.steps += int((self.seen.steps - before).max())
        self.found.decode_seconds += time.perf_counter() - start

    def _make_room(self) -> None:
        """Let the cache grow if a step would pass its end."""
        texts = int((self.prompt_lengths + self.seen.written).max())
        slots = self.shapes.grown(texts + self.config.num_drafts, self.slots)
        if slots == self.slots:
            return
        self.slots = slots
        parts = self.loop.cache.parts
        with sharding.use_mesh(self.mesh):
            for i, part in enumerate(parts):  # in the list: the smaller one is freed
                parts[i] = _grown(Cache([part], self.loop.cache.lengths), slots).parts[0]

    def _look(self) -> Any:
        """Wait for the last program, and fetch the loop's small arrays, as NumPy's."""
        large = dict.fromkeys(("cache", "drafter", "h", "keys", "text", "logprobs", "expert_ids"))
        return jax.device_get(self.loop._replace(**large))

    def result(self) -> Generated:
        """The result so far."""
        with sharding.use_mesh(self.mesh):
            parts = (self.loop.text, self.loop.logprobs, self.loop.expert_ids)
            made = jax.device_get(_gathered(parts))  # everywhere
        text, logprobs, expert_ids = made
        found = self.found

        # Each row's new tokens; a row that is done is free for another text.
        for row, index in list(self.rows.items()):
            end = self.prompt_lengths[row] + self.seen.written[row]
            new = row, slice(self.prompt_lengths[row], end)
            found.tokens[index] = text[new].tolist()
            if found.logprobs and found.model_logprobs:
                drawn, own = logprobs
                found.logprobs[index] = drawn[new].tolist()
                found.model_logprobs[index] = own[new].tolist()
            if found.expert_ids:
                found.expert_ids[index] = _up_to(expert_ids[row], end)
            if self.seen.done[row]:
                found.ended.append(index)
                del self.rows[row]

        # Shares over all steps of all rows. Later parts change the lists, so they are copied.
        found.acceptance = (self.seen.num_accepted.sum(0) / max(self.seen.steps.sum(), 1)).tolist()
        found.steps = self.steps
        found.cache_bytes = self.loop.cache.nbytes
        copies: dict[str, Any] = {
            name: list(of) for name, of in vars(found).items() if isinstance(of, list)
        }
        return replace(found, **copies)


def _decoder(
    model: Transformer,
    config: DecodeConfig,
    kind: Any,
    dtype: Any,
    shapes: Shapes,
    mesh: Any,
) -> Decoder:
    """What the programs read of a request."""
    models = [model]
    draft = config.draft
    if isinstance(draft, Transformer):
        if sharding.mesh_of(draft) != mesh:
            raise ValueError("draft is not on the mesh of the model; load both with the same mesh")
        models.append(draft)
        draft = "model"

    # Only what programs depend on: requests that differ in the rest share a compilation.
    form = DecodeConfig(
        config.max_new_tokens,
        config.sampling,
        kind,
        dtype,
        logprobs=config.logprobs,
        return_routing=config.return_routing,
    )

    return Decoder(
        models=tuple((model, prepare_decode(model)) for model in models),
        stops=np.asarray(config.stop_tokens, np.int32),
        draft=draft,
        draft_length=config.num_drafts,
        config=form,
        capacity=shapes.capacity,
        slots=shapes.slots,
    )


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


_grown = jax.jit(Cache.with_slots, static_argnames="slots")


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


def _hash(prompt: tuple[int, ...]) -> int:
    """A number of 32 bits that depends on the tokens alone."""
    digest = hashlib.blake2b(np.array(prompt, "<i4").tobytes(), digest_size=4).digest()
    return int.from_bytes(digest, signed=True)


def _pad(prompts: Sequence[Sequence[int]], rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(Tokens [rows, width], lengths [rows]); rows without a prompt have one token."""
    tokens = np.zeros((rows, width), np.int32)
    lengths = np.ones(rows, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)], lengths[i] = prompt, len(prompt)
    return tokens, lengths


def _round_up(n: int) -> int:
    return -(-n // 32) * 32
