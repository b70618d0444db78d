"""MLA against MHA, GQA and MQA: validation loss and cache bytes per token, at equal parameters."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`

from dsv3_jax.config import replace
from experiments.lab import Column, Study, drawing
from experiments.lab.claims import Claim
from experiments.lab.matching import matched
from experiments.lab.parts import part


def variants(base):
    mla = base.model
    mha = replace(mla, attention="mha")
    models = {
        "MHA": mha,
        "MHA, QK-norm": matched(replace(mha, qk_norm=True), mha),
        "GQA": matched(replace(mla, attention="gqa", num_kv_heads=mla.num_heads // 2), mha),
        "MQA": matched(replace(mla, attention="mqa"), mha),
        "MLA": matched(mla, mha),
        "MLA, unmatched": mla,
    }
    runs = {name: replace(base, model=model) for name, model in models.items()}
    # The base's learning rate was tuned for MLA. The others use the better of two rates (see README.md).
    half = replace(base.optim, learning_rate=base.optim.learning_rate / 2)
    return runs | {name: replace(runs[name], optim=half) for name in HALF}


HALF = ("MHA", "MHA, QK-norm", "GQA", "MQA")


def cache_bytes(results, variant):
    return results.records(variant)[0]["parameters"]["cache_bytes"]


def draw(results, path):
    title = drawing.answer(lambda: words(results), "Loss by cache size")
    drawing.draw_loss_by_cost(results, path, cache_bytes, "cache, bytes per token", title)


def words(results):
    share = cache_bytes(results, "MLA") / cache_bytes(results, "MHA")
    return f"{drawing.against(results, 'MLA', 'MHA')}, with {100 * share:.0f} % of its cache"


def claim(text, variant, against, expect="lower"):
    return Claim(text, variant, against, expect=expect, stake="context")


STUDY = Study(
    script=__file__,
    question="Does MLA reach the loss of MHA with a cache as small as MQA's?",
    published="15.6K cached numbers per token against MHA's 110.6K, at equal or better quality (DeepSeek-V2 report)",
    variants=variants,
    columns=(
        Column("validation loss", "val_loss", 4, paired=True),
        Column("bits per byte", "val_bits_per_byte", 4),
    ),
    draw=draw,
    claims=(
        claim("MLA has a lower loss than MHA", "MLA", "MHA"),
        claim("MLA has a lower loss than MHA with QK-norm", "MLA", "MHA, QK-norm"),
        claim("QK-norm lowers the loss of MHA", "MHA, QK-norm", "MHA"),
        claim("MLA has a lower loss than GQA", "MLA", "GQA"),
        claim("MLA has a lower loss than MQA", "MLA", "MQA"),
        claim("MLA has a lower loss than MHA with fewer parameters", "MLA, unmatched", "MHA"),
        claim("GQA has a higher loss than MHA", "GQA", "MHA", "higher"),
        claim("MQA has a higher loss than GQA", "MQA", "GQA", "higher"),
    ),
    stakes={"context": part("no context but the token before", "context of 2 tokens at most")},
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
