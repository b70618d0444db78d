"""What a run reads: the batches of its task, or the text, which a process encodes only once."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from dsv3_jax.config import RunConfig
from dsv3_jax.data.batches import Source
from experiments.lab.tasks import Task, TaskSource


def source_of(run: RunConfig, task: Task | None) -> Source | None:
    """Return the source of a run; None where `fit` opens it: of chats, answers and shards."""
    if task is not None:
        return TaskSource(task, run.data)
    if run.data.format != "text" or run.grpo.group or run.data.fim_rate:
        return None

    from dsv3_jax.data.corpus import load_corpus
    from dsv3_jax.data.source import from_corpus

    return from_corpus(load_corpus(run.data), _remembering(run.data.tokenizer), run.data)


@lru_cache(maxsize=1)
def _remembering(name: str):
    """Return a tokenizer that keeps what it has encoded.

    Each seed reads the documents in an order of its own. To encode them again took a tenth of a run
    of 500 steps.
    """
    from dsv3_jax.data import tokenizer

    words = tokenizer.load(name)
    encode, known = words.encode_arrays, dict[str, np.ndarray]()

    def encode_arrays(texts: Sequence[str]) -> Iterator[np.ndarray]:
        new = [text for text in texts if text not in known]
        known.update(zip(new, encode(new), strict=True))
        return (known[text] for text in texts)

    words.encode_arrays = encode_arrays  # type: ignore[method-assign]
    return words
