"""MLA against MHA, GQA and MQA: validation loss and cache bytes a token, at equal parameters."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`


from dsv3_jax.config import ModelConfig, replace
from dsv3_jax.model.counting import size
from experiments.lab import Column, Study, drawing


def matched(cfg: ModelConfig, like: ModelConfig) -> ModelConfig:
    """As many parameters as `like`: the dense layers' width takes up the difference, to half a column."""
    column = 3 * cfg.dim * cfg.num_dense_layers
    missing = size(like).total - size(cfg).total
    made = replace(cfg, dense_dim=cfg.dense_dim + round(missing / column))
    for count in ("total", "active"):
        assert abs(getattr(size(made), count) - getattr(size(like), count)) <= column / 2
    return made


def variants(base):
    mla = base.model
    mha = replace(mla, attention="mha")
    models = {
        "MHA": mha,
        "GQA": matched(replace(mla, attention="gqa", num_kv_heads=mla.num_heads // 2), mha),
        "MQA": matched(replace(mla, attention="mqa"), mha),
        "MLA": matched(mla, mha),
        "MLA, unmatched": mla,
    }
    runs = {name: replace(base, model=model) for name, model in models.items()}
    # Each kind has the better of two learning rates (README.md): the base's was found for MLA.
    half = replace(base.optim, learning_rate=base.optim.learning_rate / 2)
    return runs | {name: replace(runs[name], optim=half) for name in HALF}


HALF = ("MHA", "GQA", "MQA")


def cache_bytes(results, variant):
    return results.records(variant)[0]["parameters"]["cache_bytes"]


def draw(results, path):
    drawing.against(results, path, cache_bytes, "cache, bytes a token", "What a smaller cache costs")


def ours(results):
    if not {"MHA", "MLA"} <= set(results.variants):
        return ""
    words = [
        f"{name} {results.paired(name, 'MHA', 'val_loss').mean():+.3f} nats at "
        f"{cache_bytes(results, name) / cache_bytes(results, 'MHA'):.0%} of the bytes"
        for name in results.variants
        if name != "MHA"
    ]
    return "against MHA: " + "; ".join(words)


STUDY = Study(
    script=__file__,
    question="Does MLA reach the loss of MHA with a cache as small as MQA's?",
    published="15.6K numbers a token against MHA's 110.6K, at equal or better quality (DeepSeek-V2 report)",
    variants=variants,
    columns=(
        Column("validation loss", "val_loss", 4, paired=True),
        Column("bits a byte", "val_bits_per_byte", 4),
    ),
    draw=draw,
    ours=ours,
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
