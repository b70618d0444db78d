"""Prompts from the held-out text of a run."""

import numpy as np

from dsv3_jax.config import DataConfig, replace
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.data.corpus import load_corpus


def held_out_prompts(cfg: DataConfig, batch: int, context: int) -> list[list[int]]:
    """Cut prompts of `context` tokens from held-out text, each from another document if possible.

    A document that is too short continues with the next one. Chats and shards get the default text.

    Raises: ValueError if the held-out text has fewer tokens than one prompt.
    """
    if cfg.format != "text":
        cfg = replace(cfg, paths=(), format="text", chat_template=None, mixture=(), temperature=1.0)
    tokenizer = tokenizers.load(cfg.tokenizer)
    encoded = [
        np.append(tokenizer.encode_array(document.text), np.int32(tokenizer.eos_id))
        for document in load_corpus(cfg).val
    ]
    size = sum(map(len, encoded))
    if size < context:
        raise ValueError(
            f"context={context} is more than the {size} tokens of the held-out text; "
            "use a shorter context"
        )
    firsts = [i * len(encoded) // batch for i in range(batch)]
    return [
        np.concatenate(encoded[first:] + encoded[:first])[:context].tolist() for first in firsts
    ]
