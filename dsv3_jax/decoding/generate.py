"""From prompts to text: what `generate` checks and returns, and how the host leads a request.

Prompts are read once each, longest first, in groups that fill a batch with their samples. The
decoding loop runs in parts. Between two parts, rows that are done make room for texts that wait, so
that the batch stays full.
"""

import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.decoding.auto_length import draft_lengths
from dsv3_jax.decoding.decode_config import DecodeConfig, Generated
from dsv3_jax.decoding.programs import Job, Prefilled, programs, with_slots
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.sharding import constrain
from dsv3_jax.model.cache import pick_dtype, pick_kind
from dsv3_jax.model.counting import bytes_per_token
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.sampling import Sampling

FIRST_SLOTS = 1024  # of a cache whose empty slots are read too: it begins small
GROWTH = 4  # slots after growing over those before; each number of slots is a compilation
QUEUED_PART = 16  # tokens between two looks at which rows are done, while texts wait


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    cache: str | None = None,
    cache_dtype: Any = None,
    draft: "str | Transformer | None" = None,
    draft_length: int | str = 1,
    seed: int = 0,
    samples: int = 1,
    batch_size: int | None = None,
    logprobs: bool = False,
    return_routing: bool = False,
) -> Generated:
    """Continue prompts of any lengths.

    A model on a mesh (`load_model(folder, mesh)`, `hf.load(path, mesh=…)`) decodes there. Rows are
    sharded over "data" and "expert" as far as their number divides, and each row's cache stays with
    its row. The tokens are a single device's up to the order of additions: in bfloat16 two tokens
    about as likely may change places. No token is ever dropped, whatever the model's
    capacity_factor.

    Args:
        model: the model.
        prompts: lists of token ids, each of its own length.
        max_new_tokens: at most so many new tokens a text.
        temperature, top_k, top_p: see `ops.sampling`; temperature 0 takes the likeliest token.
        stop_tokens: a row ends with the first of them.
        cache: "latent" or "expanded", see `model/cache.py`; "none" recomputes all tokens each step,
            without drafts. None means the smallest cache that the model can use.
        cache_dtype: "float32", "bfloat16", "int8" or "float8_e4m3". None means the model's compute
            dtype.
        draft: who drafts: None, "mtp" (the model's own multi-token heads, of any kind), "lookup"
            (the text so far: what followed the same tokens before) or a smaller Transformer with
            the same vocabulary, on the same mesh. Text has the same distribution as without, and is
            the same at temperature 0.
        draft_length: tokens drafted a step. DeepSeek's and EAGLE heads draft beyond their depth.
            "auto" chooses between parts of the text by the tokens a second of the parts before, and
            falls back to plain steps. Heads' or a model's drafts then make sampled text depend on
            these times too; its distribution does not.
        seed: of the random draws. A text depends on seed, prompt and sample alone, whatever else
            the batch holds. Without drafts and with "lookup" it is the same for any draft_length,
            too.
        samples: texts a prompt, for a temperature above 0; `tokens` has them prompt by prompt. Each
            prompt is read once. A prompt that occurs again has the next samples, so its texts
            differ.
        batch_size: rows that decode at once; a row that ends makes room for a text that waits. None
            means all.
        logprobs: return each new token's log-probability, of the distribution it was drawn from and
            at temperature 1.
        return_routing: return the experts that each token went to, as `Transformer` replays them.
    Raises: ValueError for an empty prompt or batch, a token outside the vocabulary, a prompt and
        continuation beyond max_positions, or settings outside their range. Also for a draft with
        another vocabulary or on another mesh, or heads that the model does not have.

    >>> from flax import nnx
    >>> import dsv3_jax as ds
    >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, num_dense_layers=1, mtp_depth=0)
    >>> model = ds.Transformer(cfg, rngs=nnx.Rngs(0))
    >>> result = ds.generate(model, [[1, 2, 3], [4]], 5)
    >>> [len(tokens) for tokens in result.tokens]
    [5, 5]
    """
    config = DecodeConfig(
        max_new_tokens, Sampling(temperature, top_k, top_p), cache, cache_dtype, draft,
        draft_length, stop_tokens, seed, samples=samples, batch_size=batch_size,
        logprobs=logprobs, return_routing=return_routing,
    )  # fmt: skip
    *_, last = generate_in_parts(model, prompts, config, part=None)
    return last


def generate_in_parts(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    *,
    part: int | None = 8,
    skip: Collection[int] = (),
) -> Iterator[Generated]:
    """Yield the result of `generate` as it grows: after one token, then every `part` tokens.

    A `part` of None is the whole text, but 16 tokens while texts wait for a place in the batch.
    Rows that have not begun have no tokens yet.

    Args: skip: rows of the result that stay empty, since the caller has them; the others are the
        same without.
    Raises: ValueError as `generate`.

    Example:
        >>> import dsv3_jax as ds, jax.numpy as jnp
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract(cfg))  # all are 0
        >>> config = DecodeConfig(max_new_tokens=4)
        >>> parts = generate_in_parts(model, [[1, 2, 3]], config, part=2)
        >>> [result.tokens for result in parts]
        [[[0]], [[0, 0, 0]], [[0, 0, 0, 0]]]
    """
    if not isinstance(model, Transformer):
        raise ValueError(f"model={model!r} is not a Transformer")
    config.check(model.cfg, prompts)
    request = _Request(model, prompts, config, skip)
    yield request.result()
    while request.waiting or not request.seen.done.all():
        request.decode(part or (QUEUED_PART if request.waiting else config.max_new_tokens))
        yield request.result()


class Text(NamedTuple):
    """A text that is asked for."""

    prompt: tuple[int, ...]
    sample: int  # of this prompt
    row: int  # of the result


class _Request:
    """A request on its devices: what the programs read and made so far, and the host's clock."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        config: DecodeConfig,
        skip: Collection[int],
    ):
        cfg = model.cfg
        draft = config.draft
        lengths = (config.num_drafts,)
        models = [model.in_compute_dtype()]
        kind = "none" if config.cache == "none" else pick_kind(cfg, config.cache)
        dtype = pick_dtype(model.compute_dtype, config.cache_dtype)
        self.mesh = sharding.mesh_of(models)
        if draft and config.draft_length == "auto":
            lengths = draft_lengths(draft, cfg)
        if isinstance(draft, Transformer):
            models.append(draft.in_compute_dtype())
            if sharding.mesh_of(models[1]) != self.mesh:
                raise ValueError(
                    "draft is not on the mesh of the model; load both with the same mesh"
                )
            draft = "model"
        start = time.perf_counter()
        self.waiting = deque(_texts(prompts, config.samples, skip))
        self.unread = deque(dict.fromkeys(text.prompt for text in self.waiting))
        batch = min(config.batch_size or len(self.waiting), len(self.waiting))
        # prompts that are read at once
        self.group = min(-(-batch // config.samples), len(self.unread))
        # Shapes in steps of 32, so that prompts of nearby lengths share one compilation.
        longest = max(*map(len, prompts), config.pad_prompts_to)
        self.width = min(_round_up(longest), cfg.max_positions)
        self.capacity = _round_up(longest + config.max_new_tokens + config.num_drafts)
        grows = kind != "none" and model.kernels.device.reads_all_slots
        self.slots = min(FIRST_SLOTS, self.capacity) if grows else self.capacity
        self._raise_slots(self.width)
        self.config = config
        self.steps = dict.fromkeys(lengths, 0)
        self.loop: Any = None
        self.seen: Any = None  # the loop's small arrays, as NumPy's
        self.read: Prefilled | None = None
        self.places: dict[tuple[int, ...], int] = {}  # of the prompts that `read` holds
        self.prompt_lengths = np.zeros(batch, np.int32)  # of each row
        self.rows: dict[int, int] = {}  # the result's row that each row writes
        self.found = _nothing(len(prompts) * config.samples, config, cfg)
        # never while a generator waits: the mesh in use is the caller's, too
        with sharding.use_mesh(self.mesh):
            form = DecodeConfig(
                config.max_new_tokens, config.sampling, kind, dtype,
                logprobs=config.logprobs, return_routing=config.return_routing,
            )  # fmt: skip
            with_weights = tuple((model, model.prepare_decode()) for model in models)
            stops = np.asarray(config.stop_tokens, np.int32)
            job = Job(with_weights, stops, draft, lengths, form, self.capacity, self.slots)
            self.leaves, tree = jax.tree.flatten(job)
            self.programs = programs(tree, lengths, batch, self.mesh)
        self._admit()
        self.found.prefill_seconds = time.perf_counter() - start
        self.found.cache_bytes_per_token = (
            0 if kind == "none" else bytes_per_token(cfg, kind, dtype)
        )

    def _admit(self) -> None:
        """Let texts that wait begin in rows that are done, at first in all."""
        free = deque(
            range(self.prompt_lengths.size)
            if self.loop is None
            else np.flatnonzero(self.seen.done).tolist()
        )
        while free and self.waiting:
            if self.waiting[0].prompt not in self.places:
                self._read_prompts()
            begins = np.full((3, self.prompt_lengths.size), -1, np.int32)
            while free and self.waiting and self.waiting[0].prompt in self.places:
                row = free.popleft()
                text = self.waiting.popleft()
                self.rows[row], self.prompt_lengths[row] = text.row, len(text.prompt)
                begins[:, row] = self.places[text.prompt], _hash(text.prompt), text.sample
            in_order = self.loop is None and np.array_equal(begins[0], np.arange(self.group))
            args = self.leaves, self.loop, self.read, begins, np.uint32(self.config.seed)
            with sharding.use_mesh(self.mesh):
                self.loop = self.programs.admit(*args, in_order=in_order)
        if not self.waiting:
            self.read = None
        self.seen = self._look()

    def _read_prompts(self) -> None:
        """Read the next prompts, as many at once as before; their width takes few values."""
        prompts = [self.unread.popleft() for _ in range(min(self.group, len(self.unread)))]
        width = (
            self.width
            if self.loop is None
            else min(max(32, 1 << (len(prompts[0]) - 1).bit_length()), self.width)
        )
        self.places = {prompt: place for place, prompt in enumerate(prompts)}
        with sharding.use_mesh(self.mesh):
            self.read = self.programs.prefill(self.leaves, *_pad(prompts, self.group, width))

    def _raise_slots(self, needed: int) -> None:
        while self.slots < min(needed, self.capacity):
            self.slots = min(GROWTH * self.slots, self.capacity)

    def _make_room(self, length: int) -> None:
        """Let the cache grow if a step of so many drafts would pass its end."""
        before = self.slots
        self._raise_slots(int((self.prompt_lengths + self.seen.written).max()) + length)
        if before < self.slots:
            parts = self.loop.cache.parts
            with sharding.use_mesh(self.mesh):
                for i, part in enumerate(parts):  # in the list: the smaller one is freed
                    parts[i] = _grown(part, self.slots)
            if self.programs.choice:
                self.programs.choice.start.clear()  # the next parts compile again

    def _look(self) -> Any:
        """Wait for the last program, and fetch the loop's small arrays, as NumPy's."""
        large = dict.fromkeys(("cache", "drafter", "h", "keys", "text", "logprobs", "expert_ids"))
        return jax.device_get(self.loop._replace(**large))

    def decode(self, part: int) -> None:
        """Let texts that wait begin, then run until every row is `part` tokens further, or done."""
        if self.waiting:
            start = time.perf_counter()
            self._admit()
            self.found.decode_seconds += time.perf_counter() - start
        choice = self.programs.choice
        until = np.minimum(self.seen.written + part, self.config.max_new_tokens)
        while (behind := np.where(self.seen.done, 0, until - self.seen.written)).max() > 0:
            self._make_room(max(self.steps))
            if choice is None:
                self._part(next(iter(self.steps)), until, behind)
                continue
            length, more = choice.next()
            if length and (self.seen.unread > length + 1).any():
                self._run(self.programs.read)
            if length not in choice.start:
                self._run(self.programs.decode, 0 * until, length=length)  # it compiles
                choice.start[length] = self._run(self.programs.decode, 0 * until, length=length)
            choice.add(
                length, *self._part(length, until - max(int(behind.max()) - more, 0), behind)
            )

    def _part(
        self, length: int, until: np.ndarray, behind: np.ndarray
    ) -> tuple[int, int, np.ndarray, float]:
        """Run a part.

        Returns: (steps; steps, and accepted drafts by position, of the rows that were furthest
            behind before it: they decide how long the request takes; seconds).
        """
        before = self.seen
        rows = behind == behind.max()
        seconds = self._run(self.programs.decode, until, length=length)
        steps = self.seen.steps - before.steps
        self.steps[length] += (most := int(steps.max()))
        accepted = (self.seen.num_accepted - before.num_accepted)[rows].sum(0)
        return most, int(steps[rows].sum()), accepted, seconds

    def _run(self, program: Callable, *args: np.ndarray, **static: int) -> float:
        """Run a program on the loop. Returns: its seconds."""
        start = time.perf_counter()
        with sharding.use_mesh(self.mesh):
            self.loop = program(self.leaves, self.loop, *args, **static)
        self.seen = self._look()
        seconds = time.perf_counter() - start
        self.found.decode_seconds += seconds
        return seconds

    def result(self) -> Generated:
        """The result so far."""
        with sharding.use_mesh(self.mesh):
            parts = (self.loop.text, self.loop.logprobs, self.loop.expert_ids)
            made = jax.device_get(_gathered(parts))  # everywhere
        (text, logprobs, expert_ids), found = made, self.found
        for row, index in list(self.rows.items()):
            end = self.prompt_lengths[row] + self.seen.written[row]
            new = row, slice(self.prompt_lengths[row], end)
            found.tokens[index] = text[new].tolist()
            if found.logprobs and found.model_logprobs:
                found.logprobs[index], found.model_logprobs[index] = (
                    of[new].tolist() for of in logprobs
                )
            if found.expert_ids:
                found.expert_ids[index] = _up_to(expert_ids[row], end)
            if self.seen.done[row]:
                found.ended.append(index)
                del self.rows[row]
        found.acceptance = (self.seen.num_accepted.sum(0) / max(self.seen.steps.sum(), 1)).tolist()
        found.steps = sum(self.steps.values())
        found.steps_by_length = dict(self.steps)
        found.cache_bytes = self.loop.cache.nbytes
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


_grown = jax.jit(with_slots, static_argnames="slots")


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
