"""Where a run's text comes from, and how it becomes rows."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from dsv3_jax.config.fields import (
    Positive,
    PositiveReal,
    Seed,
    Share,
    check_fields,
    require,
)

# Settings of `DataConfig` that are for some formats; others leave them at their default.
ONLY_FOR = {
    "mixture": ("shards",),
    "temperature": ("shards",),
    "max_documents": ("text", "chat"),
    "chat_template": ("chat",),
    "template": ("chat",),
    "prompts": ("chat",),
    "bad_records": ("chat",),
    "fim_rate": ("text",),
    "separate_documents": ("text", "shards"),
}


@dataclass(frozen=True)
class DataConfig:
    """The source of the text, and how it becomes [B, T] batches.

    Example:
        >>> DataConfig(paths=("books",), seq_len=512).batch_size
        16
    """

    # files or folders of text, or hf:NAME[:CONFIG][@SPLIT], a dataset of Hugging Face; empty means
    # the text that this Python carries
    paths: tuple[str, ...] = ()
    tokenizer: str = "bytes"  # bytes, or the path of a tokenizer.json or tiktoken.model
    seq_len: Annotated[int, "[2, 2147483648)"] = 256  # number of tokens in a sequence (T)
    batch_size: Positive = 16  # number of sequences in an optimizer step (B)
    # documents in a row do not attend to each other; each has positions from 0
    separate_documents: bool = True
    fim_rate: Share = 0.0  # share of documents that are rearranged for fill-in-the-middle (PSM)
    # share of documents that are held out for validation, chosen by their hash
    val_fraction: Annotated[float, "(0, 1)"] = 0.05
    # number of documents to read, for quick runs; None means all
    max_documents: Positive | None = None
    seed: Seed = 0  # seed of the order of documents
    # what the files hold: text, every token of which is a target; or chat examples, JSON, JSONL or
    # Parquet with messages, prompt and completion, or text, of which the assistant's tokens are
    # targets; or shards, for which `paths` names the folder that `dsv3 data tokenize` wrote, with
    # its own split into training and validation
    format: Literal["text", "chat", "shards"] = "text"
    # for chat: the file of a Jinja template, or plain, which writes the role on a line of its own;
    # None means the template of the model that training starts with
    chat_template: str | None = None
    template: tuple[str, ...] = ()  # for chat: variables of the template, as in ("thinking=true",)
    # for chat: what the prompt of a task is if it is a text: a user's turn of the chat template, or
    # text that the model continues
    prompts: Literal["turn", "text"] = "turn"
    # for chat: leave out records that cannot be learnt from, and count them; or end at the first
    bad_records: Literal["skip", "refuse"] = "skip"
    # key of JSONL and column of Parquet or a dataset that holds the text; for chat, the messages
    text_column: str = "text"
    # for shards: weights of domains, as in ("code=2", "English=1"), other domains are left out;
    # empty means all domains, weighted by their tokens
    mixture: tuple[str, ...] = ()
    # for shards: weights are raised to the power 1 / temperature; above 1 they are more equal
    temperature: PositiveReal = 1.0

    def __post_init__(self) -> None:
        check_fields(self)

        # A setting that is for other formats must keep its default.
        for name, formats in ONLY_FOR.items():
            value = getattr(self, name)
            default = type(self).__dataclass_fields__[name].default
            either = " or ".join(map(repr, formats))
            require(
                value == default or self.format in formats,
                f"{name}={value!r} is for format={either}, not {self.format!r}",
            )
        self.weights()  # refuses a mixture that is none
        require("" not in self.paths, f"paths={self.paths} has an empty path; name the file")
        require(
            self.format != "shards" or len(self.paths) == 1,
            f"paths={self.paths} is not one folder of shards; name what `dsv3 data tokenize` wrote",
        )
        require(
            self.batch_size * self.seq_len <= 2**30,
            f"batch_size={self.batch_size} x seq_len={self.seq_len} is over 2^30 tokens",
        )

    def weights(self) -> dict[str, float]:
        """Return the weights of `mixture` by domain.

        Raises: ConfigError for an entry that is not DOMAIN=WEIGHT, a domain named twice, or weights
            that do not sum to something positive.

        Example:
            >>> DataConfig(("shards",), format="shards", mixture=("code=2", "English=1")).weights()
            {'code': 2.0, 'English': 1.0}
        """
        weights: dict[str, float] = {}
        for entry in self.mixture:
            name, _, number = entry.rpartition("=")
            try:
                weights[name] = float(number)
            except ValueError:
                weights[name] = math.nan
            require(
                bool(name) and 0 <= weights[name] < math.inf,
                f"mixture={entry!r} is not DOMAIN=WEIGHT, a weight from 0 up",
            )

        # Each domain has one weight. Only ratios count, so at least one weight is positive.
        require(len(weights) == len(self.mixture), f"mixture={self.mixture} names a domain twice")
        require(
            not weights or sum(weights.values()) > 0,
            f"mixture={self.mixture} has weights that sum to 0; give a domain a positive weight",
        )
        return weights
