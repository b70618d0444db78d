"""The rows that decode at once: their arrays on the devices, and the programs that they run by.

A caller reads prompts (`read`), lets rows begin (`begin`), and runs the loop in parts (`run`).
Between two parts, rows that are done make room for other texts.
"""

import hashlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax.decoding.decode_config import DecodeConfig
from dsv3_jax.decoding.loop import Begins, Decoder, Prefilled
from dsv3_jax.decoding.programs import programs, take_rows
from dsv3_jax.mesh import sharding
from dsv3_jax.model.cache import Cache, pick_dtype, pick_kind
from dsv3_jax.model.counting import bytes_per_token
from dsv3_jax.model.decode import prepare_decode
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.sampling import RowSampling, Sampling

FIRST_SLOTS = 1024  # of a cache whose empty slots are read too: it begins small
GROWTH = 4  # factor by which a cache's slots grow; each number of slots is a compilation
ALL = 2**31 - 1  # top_k of a row that keeps all tokens


class Shapes(NamedTuple):
    """The sizes of a batch's arrays. Many requests share few, and so their compilations."""

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
        capacity = round_up(longest + config.max_new_tokens + config.num_drafts)
        return cls(
            batch=batch,
            group=min(-(-batch // config.samples), distinct),
            width=min(round_up(longest), most),
            capacity=capacity,
            slots=capacity,
        )

    def grown(self, needed: int, slots: int) -> int:
        """The slots that a cache of `slots` grows to, so that it holds `needed` tokens."""
        while slots < min(needed, self.capacity):
            slots = min(GROWTH * slots, self.capacity)
        return slots


class Start(NamedTuple):
    """A text that begins in a row."""

    row: int
    place: int  # of its prompt among those that were read
    prompt: tuple[int, ...]
    sample: int  # of this prompt
    seed: int
    limit: int  # new tokens at most
    sampling: Sampling  # that counts where rows have settings of their own


class Batch:
    """Rows on their devices: what the programs read and made so far."""

    def __init__(self, model: Transformer, config: DecodeConfig, shapes: Shapes):
        cfg = model.cfg
        self.mesh = sharding.mesh_of(model)
        self.num_drafts = config.num_drafts
        kind = "none" if config.cache == "none" else pick_kind(cfg, config.cache)
        dtype = pick_dtype(model.compute_dtype, config.cache_dtype)
        self.kind, self.dtype = kind, dtype
        self.bytes_per_token = 0 if kind == "none" else bytes_per_token(cfg, kind, dtype)

        # A device that reads empty slots too begins with few of them.
        if kind != "none" and model.kernels.device.reads_all_slots:
            first = shapes.grown(shapes.width, min(FIRST_SLOTS, shapes.capacity))
            shapes = shapes._replace(slots=first)
        self.shapes = shapes
        self.slots = shapes.slots  # of the cache, as it grows

        # the loop, as the host sees it
        self.loop: Any = None
        self.seen: Any = None  # the loop's small arrays, as NumPy's
        self.prompt_lengths = np.zeros(shapes.batch, np.int32)  # of each row
        self.steps = 0

        # never while a generator waits: the mesh in use is the caller's, too
        with sharding.use_mesh(self.mesh):
            decoder = _decoder(model, config, kind, dtype, shapes, self.mesh)
            self.leaves, form = jax.tree.flatten(decoder)
            self.programs = programs(form)

    def read(self, prompts: Sequence[Sequence[int]], width: int, given: Any = None) -> Prefilled:
        """Read prompts, at most a group of them, padded to `width` tokens."""
        args = () if given is None else (given,)
        with sharding.use_mesh(self.mesh):
            padded = _pad(prompts, self.shapes.group, width)
            return self.programs.prefill(self.leaves, *padded, *args)

    def begin(
        self, read: Prefilled, starts: Iterable[Start], *, own_sampling: bool = False
    ) -> None:
        """Let texts begin in rows; the first call makes the loop.

        Args: own_sampling: each row has settings of its own; in all calls, or in none.
        """
        # Rows in which no text begins: they have no source, and settings that nobody reads.
        batch = self.shapes.batch
        source, texts, samples, limits = (np.full(batch, n, np.int32) for n in (-1, 0, 0, 0))
        seeds = np.zeros(batch, np.uint32)
        own: Any = None
        if own_sampling:
            kept = np.full(batch, ALL, np.int32)
            settings: Any = np.zeros(batch, np.float32), kept, np.ones(batch, np.float32)
            own = RowSampling(*settings)

        # The rows in which one does.
        for start in starts:
            row = start.row
            source[row], texts[row], samples[row] = start.place, _hash(start.prompt), start.sample
            seeds[row], limits[row] = start.seed, start.limit
            self.prompt_lengths[row] = len(start.prompt)
            if own_sampling:
                temperature, top_k, top_p = start.sampling
                own.temperature[row] = temperature
                own.top_k[row] = min(top_k or ALL, ALL)
                own.top_p[row] = 1.0 if top_p is None else top_p

        arrays: Any = source, texts, samples, seeds, limits, own
        begins = Begins(*arrays)
        first = np.arange(self.shapes.group)
        in_order = self.loop is None and np.array_equal(source, first)
        if self.loop is not None:
            self._make_room(read.tokens.shape[1])
        with sharding.use_mesh(self.mesh):
            self.loop = self.programs.admit(self.leaves, self.loop, read, begins, in_order=in_order)

    def resize(self, kept: Sequence[int], size: int) -> None:
        """Let the batch have another size: first the rows that are kept, then free ones."""
        rows = np.full(size, -1, np.int32)
        rows[: len(kept)] = kept
        with sharding.use_mesh(self.mesh):
            self.loop = take_rows(self.loop, rows)
        self.prompt_lengths = np.where(rows < 0, 0, self.prompt_lengths[rows])
        self.shapes = self.shapes._replace(batch=size)
        self.look()

    def run(self, until: np.ndarray) -> None:
        """Run until every row has `until` [B] tokens, or is done."""
        while (~self.seen.done & (self.seen.written < until)).any():
            texts = int((self.prompt_lengths + self.seen.written).max())
            self._make_room(texts + self.num_drafts)
            before = self.seen.steps
            # The program also ends when the cache must grow.
            with sharding.use_mesh(self.mesh):
                self.loop = self.programs.decode(self.leaves, self.loop, until)
            self.look()
            self.steps += int((self.seen.steps - before).max())

    def _make_room(self, tokens: int) -> None:
        """Let the cache grow if it does not hold so many tokens a row."""
        slots = self.shapes.grown(tokens, self.slots)
        if slots == self.slots:
            return
        self.slots = slots
        parts = self.loop.cache.parts
        with sharding.use_mesh(self.mesh):
            for i, part in enumerate(parts):  # in the list: the smaller one is freed
                parts[i] = _grown(Cache([part], self.loop.cache.lengths), slots).parts[0]

    def look(self) -> None:
        """Wait for the last program, and fetch the loop's small arrays, as NumPy's."""
        large = ("cache", "drafter", "h", "keys", "text", "logprobs", "expert_ids", "watched")
        self.seen = jax.device_get(self.loop._replace(**dict.fromkeys(large)))


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
        1,
        config.sampling,
        kind,
        dtype,
        logprobs=config.logprobs,
        return_routing=config.return_routing,
        alternatives=config.alternatives,
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


_grown = jax.jit(Cache.with_slots, static_argnames="slots")


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


def round_up(n: int) -> int:
    """The next multiple of 32.

    Example:
        >>> round_up(33)
        64
    """
    return -(-n // 32) * 32
