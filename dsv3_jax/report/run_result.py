"""An order-2 model of the same text to compare a finished run with, and the run's two pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.batches import Batch, Source
from dsv3_jax.data.byte_tokenizer import Tokenizer
from dsv3_jax.report.ngram import Order2


def order2_of(source: Source, tokenizer: Tokenizer, held_out: Sequence[Batch]) -> float | None:
    """Bits a byte of an order-2 byte model, fitted on training text, on the validation rows.

    None for chat examples, which it would have to answer without a context.
    """
    if source.corpus is None:
        return None
    rows = [
        tokenizer.bytes_of(row[real].tolist())
        for batch in held_out
        for row, real in zip(batch["tokens"], batch["segment_ids"] > 0, strict=True)
    ]
    bits, size = Order2(d.text.encode() for d in source.corpus.train).bits(rows)
    return bits / max(size, 1)


def draw(
    out: Path, evaluation: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], cfg: ModelConfig
) -> list[Path]:
    """Draw the routing, if there is any, and the curves of training. Returns the pictures."""
    # Matplotlib takes a sixth of the time in which a run starts, and only its end draws.
    from dsv3_jax.report.run_plots import routing_heatmap, training_curves

    load = np.asarray(evaluation["load"])
    routing = out / "routing.png"
    training = out / "training.png"
    training_curves(rows, training)
    if not load.size:
        return [training]
    routing_heatmap(
        load, routing, first_layer=cfg.num_dense_layers, mtp_blocks=cfg.num_sparse_heads
    )
    return [routing, training]
