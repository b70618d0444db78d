"""From prompts to text: expanded prefill, then compiled parts of { draft → a step over the drafts → accept by row }.

Plain decoding is that loop without drafts. Each sequence advances by its own count in its own cache rows; none waits.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsv3_jax.config import CacheKind
from dsv3_jax.decoding.auto_length import LengthChoice, draft_lengths
from dsv3_jax.decoding.decode_config import DecodeConfig, Generated
from dsv3_jax.decoding.drafters import READ, Drafter, Drafts, Prompt, Unread, make_drafter, process_by_rows, window
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.sharding import constrain
from dsv3_jax.model.cache import keep_sharded, pick_dtype, pick_kind
from dsv3_jax.model.counting import bytes_per_token
from dsv3_jax.model.transformer import DecodeWeights, Transformer
from dsv3_jax.ops.sampling import Sampling, keys_at, row_keys, sample
from dsv3_jax.ops.verify_drafts import accept


class Loop(NamedTuple):
    """The decoding loop's state. On a mesh, `h`, `text` and caches are sharded by rows; others replicated."""

    cache: Any  # of the tokens before the newest
    drafter: Any  # the drafter's state
    h: Any  # [B, N, D]: what heads read of the trunk at unread positions; None if no head drafts
    unread: Array  # int32 [B]: positions before the newest that the drafter has not read
    keys: Array  # [B, 2]: of each row's draws, and of its drafts'
    done: Array  # bool [B]
    text: Array  # int32 [B, S]: each prompt and its new tokens
    written: Array  # int32 [B]: new tokens of each row
    steps: Array  # int32 []
    rows: Array  # int32 []: steps of rows that were not done
    num_accepted: Array  # int32 [J]: accepted drafts, by position


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["models", "stops"],
    meta_fields=["draft", "lengths", "sampling", "max_new_tokens", "capacity", "kind", "dtype"],
)
@dataclass(frozen=True)
class Job:
    """What the compiled programs of a request read, and the settings that they depend on."""

    models: tuple[tuple[Transformer, DecodeWeights | None], ...]  # the model, and one that drafts
    stops: Any  # int32 [n]
    draft: str | None  # None, "mtp", "lookup" or "model"
    lengths: tuple[int, ...]  # drafts a step: one length, or those of "auto"
    sampling: Sampling
    max_new_tokens: int
    capacity: int
    kind: CacheKind
    dtype: Any

    @property
    def drafter(self) -> Drafter | None:
        return make_drafter(self.draft, *self.models[-1]) if self.draft else None


class Programs:
    """The compiled programs of all requests of one form, and what "auto" has learnt from them.

    They take a Job's leaves: to flatten it each time would take the host as long as a step of a small model.
    """

    def __init__(self, form: Any, lengths: tuple[int, ...], *times_depend_on: Any):
        def compiled(program: Callable, **how: Any) -> Callable:
            @wraps(program)
            def run(leaves, *args, **static):
                return program(jax.tree.unflatten(form, leaves), *args, **static)

            return jax.jit(run, **how)

        self.prefill = compiled(_prefill)
        self.decode = compiled(_decode, static_argnames="length", donate_argnums=1)
        self.read = compiled(_read, donate_argnums=1)
        self.choice = LengthChoice(lengths) if len(lengths) > 1 else None


programs = lru_cache(maxsize=64)(Programs)


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
) -> Generated:
    """Continue prompts of any lengths.

    A model on a mesh (`load_model(folder, mesh)`, `hf.load(path, mesh=…)`) decodes there. Rows are sharded over "data"
    and "expert" as far as their number divides, and each row's cache stays with its row. The tokens are a single
    device's up to the order of additions: in bfloat16 two tokens about as likely may change places. No token is ever
    dropped, whatever the model's capacity_factor.

    Args:
        model: the model.
        prompts: lists of token ids; they decode in one batch, each at its own length.
        max_new_tokens: at most so many new tokens a prompt.
        temperature, top_k, top_p: see `ops.sampling`; temperature 0 takes the likeliest token.
        stop_tokens: a row ends with the first of them.
        cache: "latent" or "expanded", see `model/cache.py`; "none" recomputes all tokens each step, without drafts.
            None means the smallest cache that the model can use.
        cache_dtype: "float32", "bfloat16", "int8" or "float8_e4m3". None means the model's compute dtype.
        draft: who drafts: None, "mtp" (the model's own multi-token heads, of any kind), "lookup" (the text so far: what
            followed the same tokens before) or a smaller Transformer with the same vocabulary, on the same mesh. Text
            has the same distribution as without, and is the same at temperature 0.
        draft_length: tokens drafted a step. DeepSeek's and EAGLE heads draft beyond their depth. "auto" chooses
            between parts of the text by the tokens a second of the parts before, and falls back to plain steps. Heads'
            or a model's drafts then make sampled text depend on these times too; its distribution does not.
        seed: of the random draws. Each depends on the seed, the row and its place in the text, so without drafts and
            with "lookup" a seed's text is the same, whatever the draft_length.
    Raises: ValueError for an empty prompt or batch, a token outside the vocabulary, a prompt and continuation beyond
        max_positions, or settings outside their range. Also for a draft with another vocabulary or on another mesh, or
        heads that the model does not have.

    >>> from flax import nnx
    >>> import dsv3_jax as ds
    >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, num_dense_layers=1, mtp_depth=0)
    >>> model = ds.Transformer(cfg, rngs=nnx.Rngs(0))
    >>> result = ds.generate(model, [[1, 2, 3], [4]], 5)
    >>> [len(tokens) for tokens in result.tokens]
    [5, 5]
    """
    config = DecodeConfig(
        max_new_tokens, Sampling(temperature, top_k, top_p), cache, cache_dtype, draft, draft_length,
        stop_tokens, seed,
    )  # fmt: skip
    *_, last = generate_in_parts(model, prompts, config, part=None)
    return last


def generate_in_parts(
    model: Transformer, prompts: Sequence[Sequence[int]], config: DecodeConfig, *, part: int | None = 8
) -> Iterator[Generated]:
    """Yield the result of `generate` as it grows: after the first token, then every `part` tokens (None: at the end).

    Raises: ValueError as `generate`.

    Example:
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract(cfg))  # all weights are 0
        >>> [result.tokens for result in generate_in_parts(model, [[1, 2, 3]], DecodeConfig(max_new_tokens=4), part=2)]
        [[[0]], [[0, 0, 0]], [[0, 0, 0, 0]]]
    """
    if not isinstance(model, Transformer):
        raise ValueError(f"model={model!r} is not a Transformer")
    config.check(model.cfg, prompts)
    part = part or config.max_new_tokens
    if config.cache == "none":
        yield from _without_cache(model, prompts, config, part)
        return
    request = _Request(model, prompts, config)
    yield request.result()
    while request.behind < config.max_new_tokens:
        request.decode(min(request.behind + part, config.max_new_tokens))
        yield request.result()


class _Request:
    """A request on its devices: what the compiled programs read and made so far, and the host's clock."""

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], config: DecodeConfig):
        cfg, draft, lengths, models = model.cfg, config.draft, (config.num_drafts,), [model.in_compute_dtype()]
        kind, dtype = pick_kind(cfg, config.cache), pick_dtype(model.compute_dtype, config.cache_dtype)
        self.mesh = sharding.mesh_of(models)
        if draft and config.draft_length == "auto":
            lengths = draft_lengths(draft, cfg)
        if isinstance(draft, Transformer):
            models.append(draft.in_compute_dtype())
            if sharding.mesh_of(models[1]) != self.mesh:
                raise ValueError("draft is not on the mesh of the model; load both with the same mesh")
            draft = "model"
        # Shapes in steps of 32, so that prompts of nearby lengths share one compilation.
        longest, self.max_new_tokens = max(*map(len, prompts), config.pad_prompts_to), config.max_new_tokens
        capacity = _round_up(longest + config.max_new_tokens + config.num_drafts)
        start = time.perf_counter()
        tokens, self.prompt_lengths = _pad(prompts, min(_round_up(longest), cfg.max_positions))
        with sharding.use_mesh(self.mesh):  # never while a generator waits: the mesh in use is the caller's, too
            job = Job(
                tuple((model, model.prepare_decode()) for model in models), np.asarray(config.stop_tokens, np.int32),
                draft, lengths, config.sampling, config.max_new_tokens, capacity, kind, dtype,
            )  # fmt: skip
            self.leaves, tree = jax.tree.flatten(job)
            self.programs = programs(tree, lengths, len(prompts), self.mesh)
            self.loop = self.programs.prefill(self.leaves, tokens, self.prompt_lengths, np.uint32(config.seed))
        self.seen = self._look()
        self.prefill_seconds, self.decode_seconds = time.perf_counter() - start, 0.0
        self.length, self.choice, self.steps = lengths[0], self.programs.choice, dict.fromkeys(lengths, 0)
        self.bytes_per_token = bytes_per_token(cfg, kind, dtype)
        if self.choice:
            self.choice.begin_text()

    def _look(self) -> Loop:
        """Wait for the last program, and fetch the loop's small arrays."""
        return jax.device_get(self.loop._replace(cache=None, drafter=None, h=None, keys=None, text=None))

    @property
    def behind(self) -> int:
        """Tokens of the shortest row that continues; all if none does, for a row that has ended grows no more."""
        return int(np.where(self.seen.done, self.max_new_tokens, self.seen.written).min())

    def decode(self, until: int) -> None:
        """Run until every row has so many tokens, or is done."""
        while (behind := self.behind) < until:
            if self.choice is None:
                self._run(self.programs.decode, until, length=self.length)
                continue
            length, more = self.choice.next()
            if length and np.where(self.seen.done, 0, self.seen.unread).max() > length + 1:
                self._run(self.programs.read)
            if not self.choice.start[length]:
                self._run(self.programs.decode, 0, length=length)  # it compiles, without a step
            if not self.choice.seconds[length]:
                self.choice.start[length] = self._part(length, behind + 1)[-1]
            part = self._part(length, min(self.behind + more, until))
            if part[0]:
                self.choice.add(length, *part)

    def _part(self, length: int, until: int) -> tuple[int, int, np.ndarray, float]:
        """Run a part. Returns: (steps, steps of rows that were not done, accepted drafts by position, seconds)."""
        before = self.seen
        seconds = self._run(self.programs.decode, until, length=length)
        steps, rows, accepted = (getattr(self.seen, x) - getattr(before, x) for x in ("steps", "rows", "num_accepted"))
        self.steps[length] += int(steps)
        return int(steps), int(rows), accepted, seconds

    def _run(self, program: Callable, *args: int, **static: int) -> float:
        """Run a program on the loop. Returns: its seconds."""
        start = time.perf_counter()
        with sharding.use_mesh(self.mesh):
            self.loop = program(self.leaves, self.loop, *args, **static)
        self.seen = self._look()
        seconds = time.perf_counter() - start
        self.decode_seconds += seconds
        return seconds

    def result(self) -> Generated:
        """The result so far."""
        with sharding.use_mesh(self.mesh):
            text = np.asarray(_gathered(self.loop.text))  # in each of several processes
        seen, ends = self.seen, self.prompt_lengths + self.seen.written
        rows = [row[a:b].tolist() for row, a, b in zip(text, self.prompt_lengths, ends, strict=True)]
        acceptance = (seen.num_accepted / max(int(seen.rows), 1)).tolist()
        times, steps = (self.prefill_seconds, self.decode_seconds), dict(self.steps) if self.choice else {}
        return Generated(rows, acceptance, int(seen.steps), *times, self.loop.cache.nbytes, self.bytes_per_token, steps)


def _without_cache(
    model: Transformer, prompts: Sequence[Sequence[int]], config: DecodeConfig, part: int
) -> Iterator[Generated]:
    """As `generate_in_parts`, with the model over all tokens so far at each step: slow and obvious, to compare with."""
    clock, model = [time.perf_counter()], model.in_compute_dtype()
    longest = max(*map(len, prompts), config.pad_prompts_to) + config.max_new_tokens
    tokens, lengths = _pad(prompts, min(_round_up(longest), model.cfg.max_positions))
    prompt, going, steps = lengths.copy(), lengths > 0, 0
    while going.any():
        with sharding.use_mesh(sharding.mesh_of(model)):
            now = tokens, lengths, lengths - prompt, np.uint32(config.seed)
            drawn = np.asarray(_next_tokens(model, *now, sampling=config.sampling))
        tokens[going, lengths[going]] = drawn[going]
        lengths[going] += 1
        going &= (lengths - prompt < config.max_new_tokens) & ~np.isin(drawn, config.stop_tokens)
        clock.append(time.perf_counter())
        if steps % part == 0 or not going.any():
            rows = [row[a:b].tolist() for row, a, b in zip(tokens, prompt, lengths, strict=True)]
            yield Generated(rows, steps=steps, prefill_seconds=clock[1] - clock[0], decode_seconds=clock[-1] - clock[1])
        steps += 1


@partial(jax.jit, static_argnames="sampling")
def _next_tokens(model: Transformer, tokens, lengths, written, seed, *, sampling: Sampling):
    """The token after the first `lengths` of each row, int32 [B]. No token sees those after it."""
    x, _ = model.run_layers(constrain(tokens, "batch", None), None)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    keys = keys_at(row_keys(seed, lengths.size)[:, 0], written[:, None])[:, 0]
    return sample(model.logits(model.norm(last)), keys, **sampling._asdict())


_gathered = jax.jit(constrain)


def _pad(prompts: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(Tokens [B, width], lengths [B].)"""
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(p) for p in prompts], np.int32)


def _round_up(n: int) -> int:
    return -(-n // 32) * 32


def _prefill(job: Job, tokens: Array, lengths: Array, seed: Array) -> Loop:
    """Read the prompts, and draw each row's first token, as if a step had just run over the prompt's last."""
    (model, weights), drafter, longest = job.models[0], job.drafter, job.lengths[-1]
    tokens, batch = constrain(tokens, "batch", None), tokens.shape[0]
    cache = model.empty_cache(batch, job.capacity, job.kind, job.dtype)
    x, cache = model.prefill(tokens, lengths, cache, weights)
    # With room for what a drafter writes beyond the text.
    prompt = Prompt(tokens, lengths, x, job.capacity + max(READ, longest + 1), job.kind, job.dtype)
    rows, zero, h = jnp.zeros((batch,), jnp.int32), jnp.zeros((), jnp.int32), None
    if job.draft == "mtp":  # plain steps may leave all their positions unread
        unread = longest + 1 + (job.max_new_tokens if len(job.lengths) > 1 else 0)
        h = constrain(jnp.zeros((batch, unread, x.shape[2]), x.dtype), "batch", None, None)
    text = jnp.zeros((batch, job.capacity), jnp.int32).at[:, : tokens.shape[1]].set(tokens)
    loop = Loop(
        cache.at_lengths(lengths - 1), drafter and drafter.start(prompt), h, rows, row_keys(seed, batch), rows > 0,
        constrain(text, "batch", None), rows, zero, zero, jnp.zeros((longest,), jnp.int32),
    )  # fmt: skip
    x = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return _advance(job, loop, Drafts(tokens[:, :0], None), x)._replace(rows=zero, steps=zero)


def _decode(job: Job, loop: Loop, until: Array, *, length: int) -> Loop:
    """Run steps of `length` drafts until every row has `until` tokens, or is done."""
    (model, weights), drafter = job.models[0], job.drafter

    def step(loop: Loop) -> Loop:
        newest = jnp.take_along_axis(loop.text, loop.cache.lengths[:, None], axis=1)
        drafts, state = Drafts(newest[:, 1:], None), loop.drafter
        if length:
            assert drafter is not None
            keys = keys_at(loop.keys[:, 1], loop.written[:, None] + jnp.arange(length, dtype=jnp.int32)[None])
            unread = _unread(loop, length + 1, loop.unread)
            drafts, state = drafter.draft(state, unread, keys.swapaxes(0, 1), job.sampling)
        x, cache = model.run_layers(jnp.concatenate([newest, drafts.tokens], axis=1), loop.cache, weights)
        return _advance(job, loop._replace(cache=cache, drafter=state), drafts, x)

    return jax.lax.while_loop(lambda loop: ((loop.written < until) & ~loop.done).any(), step, loop)


def _read(job: Job, loop: Loop) -> Loop:
    """Let the drafter read all that plain steps have left but one position, which its next drafts follow."""
    drafter = job.drafter
    assert drafter is not None

    def some(loop: Loop) -> Loop:
        count = jnp.minimum(loop.unread - 1, READ)
        state, h = drafter.read(loop.drafter, _unread(loop, READ, count)), loop.h
        h = None if h is None else constrain(window(h, count, h.shape[1]), "batch", None, None)
        return loop._replace(drafter=state, h=h, unread=loop.unread - count)

    return jax.lax.while_loop(lambda loop: (loop.unread > 1).any(), some, loop)


def _unread(loop: Loop, width: int, count: Array) -> Unread:
    h = None if loop.h is None else loop.h[:, :width]
    return Unread(h, loop.text, count, loop.cache.lengths - loop.unread)


def _advance(job: Job, loop: Loop, drafts: Drafts, x: Array) -> Loop:
    """Accept or reject drafts, write the tokens, and move each row on by its own count.

    Args: x [B, F, D], the trunk's output at the newest token and at each draft.
    """
    model, width = job.models[0][0], x.shape[1]
    rows, index = (jnp.arange(n, dtype=jnp.int32)[None] for n in x.shape[:2])
    logits, left = process_by_rows(model.logits(model.norm(x)), job.sampling)
    keys = keys_at(loop.keys[:, 0], loop.written[:, None] + index)
    num_accepted, tokens = map(constrain, accept(drafts.tokens, drafts.q, logits, keys, left))
    count = jnp.minimum(num_accepted + 1, job.max_new_tokens - loop.written)
    ends = (tokens[..., None] == job.stops[None, None]).any(-1) & (index < count[:, None])
    ended = ends.any(axis=1)
    count = jnp.where(ended, jnp.argmax(ends, axis=1).astype(jnp.int32) + 1, count)
    count = jnp.where(loop.done, 0, count)  # such a row does not move; its numbers are computed and ignored
    start, written = loop.cache.lengths, loop.written + count
    column = jnp.where(index < count[:, None], start[:, None] + 1 + index, job.capacity)  # past it: dropped
    accepted = (index[:, :-1] < num_accepted[:, None]) & ~loop.done[:, None]
    h, unread = loop.h, jnp.maximum(count, 1) if width > 1 else loop.unread + count
    if h is not None:
        new = constrain(model.read_by_heads(x), "batch", None, None)
        first = jnp.zeros_like(count) if width > 1 else loop.unread
        h = model.kernels("write_rows", h[None, :, None], new[:, None], jnp.zeros((), jnp.int32), first)[0, :, 0]
    return loop._replace(
        cache=keep_sharded(loop.cache.at_lengths(start + count)),
        h=h,
        unread=constrain(unread),
        done=constrain(loop.done | ended | (written == job.max_new_tokens)),
        text=constrain(loop.text.at[rows.T, column].set(tokens, mode="drop"), "batch", None),
        written=constrain(written),
        steps=loop.steps + 1,
        rows=loop.rows + (~loop.done).sum(dtype=jnp.int32),
        num_accepted=loop.num_accepted.at[: width - 1].add(accepted.sum(axis=0, dtype=jnp.int32)),
    )
