"""Other checkpoints on the same text: earlier ones of the run, and one of another run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from dsv3_jax.config import replace
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.data.batches import Batch, model_inputs
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.hf.open_model import open_model
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops import balance
from dsv3_jax.stats.compare import agreement, match_experts
from dsv3_jax.stats.decisions import decide
from dsv3_jax.stats.header import bits_per_byte
from dsv3_jax.stats.numbers import as_lists
from dsv3_jax.stats.reading import Reading, open_text
from dsv3_jax.stats.routing_stats import RoutingStats, collect
from dsv3_jax.stats.token_rows import RowsTally, TokenRows, first_rows
from dsv3_jax.training.checkpoint import Loaded, load_run
from dsv3_jax.training.run_folder import RUN_FILE

SATURATION_TOKENS = 16_384  # read by each earlier checkpoint, at most


def read_rows(model: Transformer, batches: Iterable[Batch]) -> TokenRows | None:
    """Return the rows of a model on batches; None for batches without a token."""
    rows = RowsTally(model.cfg.num_experts)
    graphdef, state = nnx.split(model)
    for batch in batches:
        inputs = {key: value for key, value in model_inputs(batch).items() if key != "loss_mask"}
        rows.add(batch, jax.device_get(decide(graphdef, state, inputs)))
    return rows.rows()


def saturation(
    folder: Path, step: int, rows: TokenRows, batches: Sequence[Batch], *, kernels: str | None = None
) -> dict[str, Any] | None:
    """Measure how many of a checkpoint's choices the run's earlier checkpoints made already.

    Args:
        folder: of the run.
        rows: of the checkpoint of `step`.
        batches: what they were read from; SATURATION_TOKENS of them are read again, and at least one batch.
    Returns: "saturation" of `numbers.KEYS`; None if no earlier checkpoint is kept whole, or the folder is no run's.
    """
    names = (path.name for path in (folder / "checkpoints").glob("*")) if (folder / RUN_FILE).is_file() else ()
    earlier = sorted(int(name) for name in names if name.isascii() and name.isdigit() and int(name) < step)
    read: list[Batch] = []
    count = 0
    for batch in batches:
        size = int((batch["segment_ids"] != 0).sum())
        if read and count + size > SATURATION_TOKENS:
            break
        read.append(batch)
        count += size
    steps, shares = [], []
    for one in earlier:
        try:
            model, *_ = load_run(folder, step=one, kernels=kernels)
        except ValueError:  # a damaged checkpoint, or one of another configuration: the others remain
            continue
        found = read_rows(model, read)
        assert found is not None
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
    """Read the same text with another checkpoint, and match its experts to this one's where they can be matched.

    Args:
        own, folder, stats, reading, tokenizer: the checkpoint of the report, and what it has read.
        seed: of the shuffles.
        text: `paths` and `batches` as in `open_text`, to read the text again with another tokenizer.
    Returns: "against" of `numbers.KEYS`.
    """
    model, run, step = other.loaded
    same_ids, cfg, own_cfg = tokenizer.same_ids(other.tokenizer), run.model, own.run.model
    if same_ids:
        batches, domains = reading.batches, reading.domains
    else:
        length = min(own.run.data.seq_len, cfg.max_positions)
        data = replace(own.run.data, tokenizer=run.data.tokenizer, seq_len=length)
        again = open_text(data, folder, other.tokenizer, **text)
        batches, domains = again.batches, again.domains
    found = collect(model, batches, other.tokenizer, domains)
    assert found.rows is not None and stats.rows is not None
    load = jax.numpy.asarray(found.load, jax.numpy.float32)
    result: dict[str, Any] = {
        "run": other.name,
        "step": step,
        "same_text": True,
        **dict.fromkeys(("match", "shared", "by_chance")),
        "layers": list(found.layers),
        "load": found.load.tolist(),
        "max_vio": as_lists(balance.max_vio(load)),
        "loss": as_lists(found.rows.loss),
        "bits_per_byte": as_lists(bits_per_byte(found.rows, other.tokenizer)),
        "note": None,
    }
    common = [name for name in stats.layers if name in found.layers]
    if not same_ids:
        why = "the tokenizers differ, so no token is the same"
    elif cfg.num_experts != own_cfg.num_experts:
        why = f"num_experts={own_cfg.num_experts} here and {cfg.num_experts} there"
    elif not common:
        why = "no layer with experts has the same number in both"
    else:
        here, there = ([names.index(name) for name in common] for names in (stats.layers, found.layers))
        matched = match_experts(_layers(stats.rows, here), _layers(found.rows, there), own_cfg.num_experts, seed=seed)
        for key, values in matched._asdict().items():
            by_name = dict(zip(common, as_lists(values) if key != "match" else values.tolist(), strict=True))
            none = [None] * own_cfg.num_experts if key == "match" else None
            result[key] = [by_name.get(name, none) for name in stats.layers]
        missing = [name for name in stats.layers if name not in common]
        if missing:
            result["note"] = f"{', '.join(missing)} is not in {other.name}, so its experts are not matched"
        return result
    result["note"] = f"experts are not matched: {why}; compare loads, MaxVio and bits a byte"
    return result


def _layers(rows: TokenRows, layers: Sequence[int]) -> TokenRows:
    """The rows of some layers alone."""
    names = ("counted", "expert_ids", "gates", "margin")
    return rows._replace(**{name: getattr(rows, name)[list(layers)] for name in names})
