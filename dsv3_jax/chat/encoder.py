"""The encoder of chat examples for shards, see `data.tokenizing`."""

from collections.abc import Iterator, Sequence

import numpy as np

from dsv3_jax.chat.examples import contents, read_example
from dsv3_jax.chat.text_settings import TextSettings
from dsv3_jax.data.tokenizing import Encoder, Item


def chat_encoder(text: TextSettings, template: tuple[str, ...], prompts: str) -> Encoder:
    """Return the encoder of chat examples.

    Args:
        text: tokenizer, special tokens and template of the model that will train on them.
        template: variables of the template, as `text` has them, each NAME=VALUE.
        prompts: as `DataConfig.prompts`.

    Example:
        >>> from dsv3_jax.chat.text_settings import plain_settings
        >>> encoder = chat_encoder(plain_settings(), (), "turn")
        >>> item = encoder.read(Item({"prompt": "1+1=", "completion": "2"}, 0, 0, "here"))
        >>> [(ids.tolist(), mask.tolist()) for ids, mask in encoder.encode([item])]
        [([49, 43, 49, 61, 50, 256], [False, False, False, False, True, True])]
    """

    def read(item: Item) -> Item:
        example = read_example(item.content, text, item.location, prompts)
        return item._replace(content=example)

    def chats(items: Sequence[Item]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return ((item.content.ids, item.content.targets) for item in items)

    source = "\n".join([text.chat.source, *template, prompts])
    return Encoder(text.tokenizer, source, contents, read, chats)
