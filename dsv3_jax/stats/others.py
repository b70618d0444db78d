"""Other checkpoints on the same text: earlier ones of the run, and one of another run."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float64, Int64
from scipy.optimize import linear_sum_assignment

from dsv3_jax.config import DataConfig, replace
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.data.batches import Batch
from dsv3_jax.data.byte_tokenizer import Tokenizer
from dsv3_jax.ops import balance
from dsv3_jax.runs.checkpoint import Loaded, load_run, steps_of
from dsv3_jax.runs.folder import RUN_FILE
from dsv3_jax.runs.open_model import open_model
from dsv3_jax.stats.flow import shared
from dsv3_jax.stats.header import bits_per_byte
from dsv3_jax.stats.reading import Reading, first_batches, open_text
from dsv3_jax.stats.routing_stats import RoutingStats, collect, tokens
from dsv3_jax.stats.tables import as_lists
from dsv3_jax.stats.token_rows import TokenRows, first_rows

SATURATION_TOKENS = 16_384  # read by each earlier checkpoint, at most
SHUFFLES = 5  # of the tokens, which estimate what a match of unrelated experts shares


class Match(NamedTuple):
    """Experts of another model matched to this model's, layer by layer, one to one."""

    match: Int64[np.ndarray, "L E"]  # this model's expert → the other's
    # share of this model's choices whose token the other sends to the matched expert
    shared: Float64[np.ndarray, " L"]
    # the same where the other's tokens are shuffled, and matched again
    by_chance: Float64[np.ndarray, " L"]


def agreement(rows: TokenRows, earlier: TokenRows) -> Float64[np.ndarray, " L"]:
    """Share of choices that an earlier checkpoint made already, for the same tokens.

    Example:
        >>> from dsv3_jax.stats.token_rows import rows_of
        >>> agreement(rows_of(np.array([[[0, 1], [2, 3]]])), rows_of(np.array([[[1, 2], [0, 1]]])))
        array([0.25])
    """
    layers = zip(rows.counted, rows.expert_ids, earlier.expert_ids, strict=True)
    return np.array([shared(ids[c], other[c]) for c, ids, other in layers])


def match_experts(rows: TokenRows, others: TokenRows, num_experts: int, *, seed: int = 0) -> Match:
    """Match experts by the tokens they share: exactly the matching with the most shared choices.

    Args: others: the rows of another model with as many layers and experts, of the same tokens, or
        of the first of them; seed: of the shuffles.

    Example:
        >>> from dsv3_jax.stats.token_rows import rows_of
        >>> rows = rows_of(np.array([[[0], [0], [1]]]))
        >>> others = rows_of(np.array([[[1], [1], [0]]]))
        >>> found = match_experts(rows, others, 2)
        >>> found.match.tolist(), found.shared.tolist()
        ([[1, 0]], [1.0])
    """
    # A model of more layers keeps fewer rows of a long text.
    kept = min(len(rows.token), len(others.token))
    rows, others = first_rows(rows, kept), first_rows(others, kept)

    rng = np.random.default_rng(seed)
    found = []
    for counted, ids, other in zip(rows.counted, rows.expert_ids, others.expert_ids, strict=True):
        here = ids[counted].astype(np.int64)
        there = other[counted].astype(np.int64)
        match, shared = _matched(here, there, num_experts)

        # The best of many matchings shares something by chance: match shuffled tokens, too.
        shuffled = (rng.permutation(there) for _ in range(SHUFFLES))
        chance = [_matched(here, one, num_experts)[1] for one in shuffled]
        found.append((match, shared, np.mean(chance)))
    match, shared, chance = zip(*found, strict=True)
    return Match(np.stack(match), np.array(shared), np.array(chance))


def _matched(here: np.ndarray, there: np.ndarray, num_experts: int) -> tuple[np.ndarray, float]:
    """(The best matching, its share of the choices [n, K] of `here`)."""
    # Tokens that went to expert i here and to j there: [E, E].
    cells = (here[:, :, None] * num_experts + there[:, None]).ravel()
    tokens = np.bincount(cells, minlength=num_experts**2).reshape(num_experts, num_experts)
    experts, match = linear_sum_assignment(tokens, maximize=True)
    return match, float(tokens[experts, match].sum() / max(here.size, 1))


def saturation(
    folder: Path,
    step: int,
    rows: TokenRows,
    batches: Sequence[Batch],
    *,
    kernels: str | None = None,
) -> dict[str, Any] | None:
    """Measure how many of a checkpoint's choices the run's earlier checkpoints made already.

    Args:
        folder: of the run.
        rows: of the checkpoint of `step`.
        batches: what they were read from; SATURATION_TOKENS of them are read again, and at least
            one batch.
    Returns: "saturation" of `numbers.KEYS`; None if no earlier checkpoint is kept whole, or the
        folder is no run's.
    """
    if not (folder / RUN_FILE).is_file():
        return None
    earlier = [one for one in steps_of(folder / "checkpoints") if one < step]
    read = first_batches(batches, SATURATION_TOKENS)
    steps = []
    shares = []
    for one in earlier:
        try:
            model, *_ = load_run(folder, step=one, kernels=kernels)
        except ValueError as error:
            # A damaged checkpoint, or one of another configuration: the others remain.
            print(f"step {one} is left out of the run's earlier choices: {error}", file=sys.stderr)
            continue

        # The same tokens in both, whichever kept fewer rows.
        found = tokens(model, read, ())
        kept = min(len(found.token), len(rows.token))
        steps.append(one)
        shares.append(agreement(first_rows(rows, kept), first_rows(found, kept)))
    if not steps:
        return None
    last = [1.0] * len(rows.counted)
    return {"steps": [*steps, step], "share": [*as_lists(np.stack(shares)), last]}


@dataclass(frozen=True)
class Other:
    """Another checkpoint, and how it reads text."""

    loaded: Loaded
    tokenizer: Tokenizer
    name: str


def open_other(place: str, *, kernels: str | None = None) -> Other:
    """Open RUN or RUN:STEP.

    Raises: ValueError as `open_model`.
    """
    folder, step = split_step(place)
    loaded = open_model(folder, step=step, kernels=kernels)
    return Other(loaded, tokenizers.load(loaded.run.data.tokenizer), Path(folder).absolute().name)


def check_text(other: Other, tokenizer: Tokenizer, data: DataConfig) -> None:
    """Check that another checkpoint can read the text of a report.

    Args: tokenizer: of the report; data: what it reads.
    Raises: ValueError for chats and shards if the tokenizers differ.
    """
    if data.format != "text" and not tokenizer.same_ids(other.tokenizer):
        raise ValueError(
            f"against={other.name!r} has another tokenizer, and format={data.format!r} is read by "
            "its own alone; name text by --paths"
        )


def split_step(place: str) -> tuple[str, int | None]:
    """Split RUN:STEP; a place without a step, or a folder that has such a name, has none.

    Example:
        >>> split_step("runs/demo:200"), split_step("runs/demo")
        (('runs/demo', 200), ('runs/demo', None))
    """
    folder, colon, step = place.rpartition(":")
    if colon and folder and step.isascii() and step.isdigit() and not Path(place).exists():
        return folder, int(step)
    return place, None


def against(
    other: Other,
    own: Loaded,
    folder: Path,
    stats: RoutingStats,
    reading: Reading,
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
    **text: Any,
) -> dict[str, Any]:
    """Read the same text with another checkpoint, and match its experts to this one's if possible.

    Args:
        own, folder, stats, reading, tokenizer: the checkpoint of the report, and what it has read.
        seed: of the shuffles.
        text: `paths` and `batches` as in `open_text`, to read the text again with another
            tokenizer.
    Returns: "against" of `numbers.KEYS`.
    """
    model, run, step = other.loaded

    # Another tokenizer gives other tokens, so the text is read again.
    same_ids = tokenizer.same_ids(other.tokenizer)
    if not same_ids:
        length = min(own.run.data.seq_len, run.model.max_positions)
        data = replace(own.run.data, tokenizer=run.data.tokenizer, seq_len=length)
        reading = open_text(data, folder, other.tokenizer, **text)
    found = collect(model, reading.batches, reading.domains)

    load = jax.numpy.asarray(found.load, jax.numpy.float32)
    result: dict[str, Any] = {
        "run": other.name,
        "step": step,
        "same_text": True,
        **dict.fromkeys(("match", "shared", "by_chance", "note")),
        "layers": list(found.layers),
        "load": found.load.tolist(),
        "max_vio": as_lists(balance.max_vio(load)),
        "loss": as_lists(found.rows.loss),
        "bits_per_byte": as_lists(bits_per_byte(found.rows, other.tokenizer)),
    }

    # Experts are matched in the layers that both have, by the tokens that they share.
    here = own.run.model.num_experts
    there = run.model.num_experts
    common = [name for name in stats.layers if name in found.layers]
    if why_not := _why_not_matched(same_ids, here, there, common):
        return result | {"note": f"experts are not matched: {why_not}"}
    matched = match_experts(
        _layers(stats.rows, [stats.layers.index(name) for name in common]),
        _layers(found.rows, [found.layers.index(name) for name in common]),
        here,
        seed=seed,
    )

    # All layers of this model are listed; those that the other lacks have no numbers.
    result["match"] = _by_layer(stats.layers, common, matched.match.tolist(), [None] * here)
    result["shared"] = _by_layer(stats.layers, common, as_lists(matched.shared), None)
    result["by_chance"] = _by_layer(stats.layers, common, as_lists(matched.by_chance), None)
    if missing := [name for name in stats.layers if name not in common]:
        result["note"] = (
            f"{', '.join(missing)} is not in {other.name}, so its experts are not matched"
        )
    return result


def _why_not_matched(same_ids: bool, here: int, there: int, common: Sequence[str]) -> str:
    if not same_ids:
        return "the tokenizers differ, so no token is the same"
    if here != there:
        return f"num_experts={here} here and {there} there"
    if not common:
        return "no layer with experts has the same number in both"
    return ""


def _by_layer(layers: Sequence[str], known: Sequence[str], values: list, absent: Any) -> list:
    """Return the values of the known layers at their places among all, and `absent` elsewhere."""
    by_name = dict(zip(known, values, strict=True))
    return [by_name.get(name, absent) for name in layers]


def _layers(rows: TokenRows, layers: Sequence[int]) -> TokenRows:
    """The rows of some layers alone."""
    names = ("counted", "expert_ids", "gates", "margin")
    return rows._replace(**{name: getattr(rows, name)[list(layers)] for name in names})
