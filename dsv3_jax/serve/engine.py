"""The engine of a server: one thread that runs the model, and requests that come from others.

The thread owns the open samplers. All that others ask of it comes through a queue, so no array is
touched by two threads. An intervention is another model with the same programs: an expert is off
where its w_down is 0, and without the bias the routers' biases are 0.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from dsv3_jax.decoding.decode_config import NotFinite
from dsv3_jax.decoding.likelihood import Read, read_tokens
from dsv3_jax.decoding.programs import NO_TOKEN
from dsv3_jax.decoding.sampler import MOST_PART, Ask, New, OpenSampler
from dsv3_jax.model.counting import bytes_per_token
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.transformer import Transformer

PART_SECONDS = 0.1  # a part of about this length: each one costs a few milliseconds
MOST_CHANGED = 2  # changed models that are kept, beside the one that is served


class Busy(Exception):
    """The queue is full."""


class Changes(NamedTuple):
    """Another model than the one that is served."""

    off: tuple[tuple[int, int], ...] = ()  # (sparse layer, expert) whose output is left out
    bias: bool = True  # False: routers choose without their bias


UNCHANGED = Changes()


class Engine:
    """A model that many may ask at once.

    Args: queue: texts that may wait or decode at once. options: of `OpenSampler`.
    Raises: ValueError as `OpenSampler`.
    """

    def __init__(self, model: Transformer, *, queue: int = 256, **options: Any):
        self.model = model
        self.most = queue
        self.options = options
        self.samplers = {UNCHANGED: OpenSampler(model, **options)}
        self.context = self.samplers[UNCHANGED].context
        self.listeners = dict[tuple[Changes, int], Callable[[Any], None]]()
        self.asked = 0  # texts that wait or decode
        self._calls = SimpleQueue[Callable[[], Any]]()
        self._cold = list(self.samplers[UNCHANGED].sizes)  # sizes that are not compiled
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, with its current part. Texts that have not ended are dropped."""
        self._closed = True
        self._calls.put(lambda: None)
        self._thread.join()

    # what others call, in their asyncio loop

    async def text(self, ask: Ask, changes: Changes = UNCHANGED) -> AsyncGenerator[New, None]:
        """Yield what comes of a text. To leave the iteration frees its row.

        Raises: ValueError as `OpenSampler.add`, or for changes that the model cannot have; Busy;
            NotFinite.
        """
        self._check(changes)
        self.samplers[UNCHANGED].check(ask)
        if self.asked >= self.most:
            raise Busy(f"{self.asked} texts wait or decode; try again later")

        # What comes of the text passes from the engine's thread to this loop by a queue.
        self.asked += 1
        news = asyncio.Queue[Any]()
        loop = asyncio.get_running_loop()

        def tell(new: Any) -> None:
            loop.call_soon_threadsafe(news.put_nowait, new)

        place: list[tuple[Changes, int]] = []  # once the engine has it
        self._calls.put(partial(self._add, ask, changes, tell, place))

        # Whoever leaves the iteration, also by an error, frees the row.
        try:
            ended = False
            while not ended:
                new = await news.get()
                if isinstance(new, Exception):
                    raise new
                if NO_TOKEN in new.tokens:
                    raise NotFinite("the text")
                ended = new.ended
                yield new
        finally:
            self.asked -= 1
            self._calls.put(partial(self._cancel, tell, place))

    async def read(
        self,
        tokens: Sequence[int],
        forced: Sequence[tuple[int, int, int]] = (),
        changes: Changes = UNCHANGED,
    ) -> Read:
        """Read a text in one pass: log p, alternatives, experts and gates of every token.

        Args: forced: (position, sparse layer, expert), see `forced_ids`.
        Raises: ValueError as `read_tokens`, or for changes that the model cannot have.
        """
        self._check(changes, forced, len(tokens))
        return await self._call(partial(self._read, tokens, forced, changes))

    async def forced_ids(
        self,
        tokens: Sequence[int],
        forced: Sequence[tuple[int, int, int]],
        changes: Changes = UNCHANGED,
    ) -> Any:
        """The experts int32 [Lmoe, n, K] that `Ask.given` takes; −1 chooses freely.

        A forced expert takes the place of the chosen one with the least gate. None without any.
        """
        self._check(changes, forced, len(tokens))
        return await self._call(partial(self._forced, tokens, forced, changes))

    async def _call(self, function: Callable[[], Any]) -> Any:
        """What a function returns that the engine's thread calls."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def call() -> None:
            try:
                result = function()
            except Exception as error:
                loop.call_soon_threadsafe(_settle, future, None, error)
            else:
                loop.call_soon_threadsafe(_settle, future, result, None)

        self._calls.put(call)
        return await future

    def _check(self, changes: Changes, forced: Sequence = (), length: int = 0) -> None:
        cfg = self.model.cfg
        layers, experts = cfg.num_sparse_layers, cfg.num_experts
        for layer, expert in (*changes.off, *((layer, expert) for _, layer, expert in forced)):
            if not 0 <= layer < layers or not 0 <= expert < experts:
                raise ValueError(
                    f"layer {layer}, expert {expert} is none of the model's {layers} sparse layers "
                    f"with {experts if layers else 0} experts, which count from 0"
                )

        if not changes.bias and not self._biases():
            raise ValueError("bias=False leaves out the routers' bias, and the model has none")

        for position, *_ in forced:
            if not 0 <= position < length:
                raise ValueError(
                    f"position {position} of a forced expert is none of the {length} tokens"
                )

    def describe(self) -> dict[str, Any]:
        """What the page shows of the model, without its name."""
        cfg = self.model.cfg
        config, batch = self.samplers[UNCHANGED].config, self.samplers[UNCHANGED].batch
        own = config.draft is None or isinstance(config.draft, str)

        return {
            "layers": cfg.num_sparse_layers,
            "layer_names": [
                f"layer {cfg.num_dense_layers + i}" for i in range(cfg.num_sparse_layers)
            ],
            "experts": cfg.num_experts if cfg.num_sparse_layers else 0,
            "per_token": cfg.experts_per_token if cfg.num_sparse_layers else 0,
            "shared": cfg.num_shared_experts,
            "bias": any(np.any(bias) for bias in self._biases()),
            "context": self.context,
            "rows": self.samplers[UNCHANGED].sizes[-1],
            "draft": config.draft if own else "model",
            "draft_length": config.num_drafts,
            "cache": {
                "kind": batch.kind,
                "dtype": str(batch.dtype),
                "bytes_per_token": batch.bytes_per_token,
                "expanded_bytes_per_token": bytes_per_token(cfg, "expanded", batch.dtype),
            },
        }

    def _biases(self) -> list[Any]:
        return jax.tree.leaves(nnx.state(self.model, RouterBias))

    # on the engine's thread

    def _run(self) -> None:
        while not self._closed:
            self._answer_calls()
            for changes, sampler in list(self.samplers.items()):
                if sampler.is_idle or self._closed:
                    continue
                # A part takes a fraction of a second, so new texts and calls need not wait long.
                part = max(1, min(int(PART_SECONDS / sampler.seconds), MOST_PART))
                try:
                    news = sampler.step(part)
                except Exception as error:  # its texts are lost; the server goes on
                    self._lose(changes, error)
                    continue

                for number, new in news.items():
                    self._tell((changes, number), new, new.ended)
                self._answer_calls()

    def _answer_calls(self) -> None:
        """Do what others ask; wait for it where there is nothing else to do.

        At first there is: a batch of each size runs short texts that nobody asked for, so that it
        is compiled.
        """
        idle = all(sampler.is_idle for sampler in self.samplers.values())
        with contextlib.suppress(Empty):
            while not self._closed:
                self._calls.get(block=idle and not self._cold)()
                idle = False

        # Nobody asks, and a size is not compiled yet.
        if idle and self._cold:
            for _ in range(self._cold.pop(0)):
                self.samplers[UNCHANGED].add(Ask((0,), 1 if self.context == 2 else 2))

    def _tell(self, place: tuple[Changes, int], new: Any, last: bool) -> None:
        tell = self.listeners.pop(place, None) if last else self.listeners.get(place)
        if tell is not None:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                tell(new)

    def _add(self, ask: Ask, changes: Changes, tell: Callable, place: list) -> None:
        try:
            number = self._sampler(changes).add(ask)
        except Exception as error:
            tell(error)
            return
        place.append((changes, number))
        self.listeners[changes, number] = tell

    def _cancel(self, tell: Callable, place: list) -> None:
        for changes, number in place:
            # A sampler that took another one's place may have given the number again.
            if self.listeners.get((changes, number)) is tell:
                del self.listeners[changes, number]
                self.samplers[changes].cancel(number)

    def _lose(self, changes: Changes, error: Exception) -> None:
        """Tell a sampler's texts what happened, and replace it."""
        for place in [place for place in self.listeners if place[0] == changes]:
            self._tell(place, error, last=True)
        if changes != UNCHANGED:
            del self.samplers[changes]
            return

        # Others check their texts by the old one meanwhile. Where memory has no room for a new one,
        # the old one stays, without texts, and the next text's error tries again.
        old = self.samplers[UNCHANGED]
        try:
            self.samplers[UNCHANGED] = OpenSampler(self.model, **self.options)
        except Exception:
            old.waiting.clear()
            old.rows.clear()

    def _sampler(self, changes: Changes) -> OpenSampler:
        """The sampler of a changed model; one that is idle makes room for it."""
        if changes not in self.samplers:
            changed = [of for of in self.samplers if of != UNCHANGED]
            idle = [of for of in changed if self.samplers[of].is_idle]
            # Each has a cache of its own.
            if len(changed) >= MOST_CHANGED:
                if not idle:
                    raise Busy(f"{len(changed)} changed models are in use; try again later")
                del self.samplers[idle[0]]
            self.samplers[changes] = OpenSampler(changed_model(self.model, changes), **self.options)
        return self.samplers[changes]

    def _read(self, tokens: Sequence[int], forced: Sequence, changes: Changes) -> Read:
        model = self._sampler(changes).model
        return read_tokens(model, tokens, given=self._forced(tokens, forced, changes))

    def _forced(self, tokens: Sequence[int], forced: Sequence, changes: Changes) -> Any:
        if not forced:
            return None

        # What the routers choose freely says whose place a forced expert takes.
        free = read_tokens(self._sampler(changes).model, tokens)
        assert free.expert_ids is not None and free.gates is not None

        # A token with a forced expert has all of its experts given; the others stay free.
        given = np.full_like(free.expert_ids.swapaxes(0, 1), -1)
        for position, layer, expert in forced:
            ids = given[layer, position]
            if ids[0] < 0:
                ids[:] = free.expert_ids[position, layer]
            if expert not in ids:
                ids[free.gates[position, layer].argmin()] = expert
        return given


def changed_model(model: Transformer, changes: Changes) -> Transformer:
    """The model with some experts' outputs left out, or without the routers' bias.

    All other arrays are shared with the model.
    """
    changed = nnx.merge(*nnx.split(model), copy=True)  # else it shares the variables
    w_down = changed.sparse.moe.experts.w_down

    # An expert whose last matrix is zero adds nothing; its gate stays.
    for layer, expert in changes.off:
        w_down[...] = w_down[...].at[layer, expert].set(0)
    if not changes.bias:
        bias = changed.sparse.moe.bias
        bias[...] = jax.numpy.zeros_like(bias[...])
    return changed


def _settle(future: Any, result: Any, error: Exception | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
