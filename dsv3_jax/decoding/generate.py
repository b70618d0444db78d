"""From prompts to text: `generate`, at once or in parts."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from dsv3_jax.decoding.decode_config import DecodeConfig, Generated
from dsv3_jax.decoding.request import Request
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.sampling import Sampling

QUEUED_PART = 16  # tokens between two looks at which rows are done, while texts wait


def generate(  # noqa: PLR0913 - the contract
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
    draft_length: int = 1,
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
        another vocabulary or on another mesh, or heads that the model does not have; and for a
        model whose logits are NaN or infinite.

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
        >>> import dsv3_jax as ds, jax, jax.numpy as jnp
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
    request = Request(model, prompts, config, skip)
    yield request.result()
    while not request.ended:
        request.decode(part or (QUEUED_PART if request.waiting else config.max_new_tokens))
        yield request.result()
