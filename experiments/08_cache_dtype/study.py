"""How many bits does each cached number need, and does MLA's latent need more than keys and values?

Published: DeepSeek-V2 is served with 6 bits per element on average; no loss is given.
"""

from dataclasses import asdict
from unittest import mock

import jax
import jax.numpy as jnp

from dsv3_jax.config import replace
from dsv3_jax.model import cache as cache_file
from dsv3_jax.model.cache import CACHE_DTYPES
from dsv3_jax.stats.cache_quality import cache_quality
from experiments.lab import Claim, Number, Stake, Study, drawing
from experiments.lab.tables import markdown_table, mean_spread

EXACT = CACHE_DTYPES[0]  # float32
CACHES = {"MLA": ("latent", "expanded"), "MHA": ("expanded",)}
BITS = (7, 6, 5, 4, 3, 2)  # below int8: emulated, because no hardware converts them
BATCHES = 8
MARGIN = 0.004  # nats: 0.1 % of the loss


def variants(base):
    mla = replace(base.model, attention="mla")
    # MHA at the better of two rates, see study 01.
    half = replace(base.optim, learning_rate=base.optim.learning_rate / 2)
    return {
        "MLA": replace(base, model=mla),
        "MHA": replace(base, model=replace(mla, attention="mha"), optim=half),
    }


def measure(trained):
    """Evaluate held-out text by cache: cache → dtype → val_loss, agreement, bytes_per_token."""
    caches = CACHES["MLA" if trained.run.model.attention == "mla" else "MHA"]
    batches = trained.held_out(min(BATCHES, trained.run.eval_batches))
    found = {}
    for kind in caches:
        qualities = cache_quality(trained.model, batches, CACHE_DTYPES, kind)
        found[kind] = {dtype: asdict(quality) for dtype, quality in qualities.items()}
        numbers = found[kind][EXACT]["bytes_per_token"] // 4
        scales = found[kind]["int8"]["bytes_per_token"] - numbers
        for bits in BITS:
            loss = loss_at_bits(trained.model, batches, kind, bits)
            found[kind][f"{bits} bits"] = {
                "val_loss": loss,
                "bytes_per_token": numbers * bits / 8 + scales,
            }
    return found


def loss_at_bits(model, batches, kind, bits):
    """Return the loss through a float32 cache whose rows are rounded to so many bits."""
    store = cache_file._as_stored

    def rounded(rows, like):
        return store(round_to_bits(rows, bits), like)

    jax.clear_caches()  # or a program that was compiled without the rounding would run
    with mock.patch.object(cache_file, "_as_stored", rounded):
        quality = cache_quality(model, batches, (EXACT,), kind)[EXACT]
    jax.clear_caches()
    return quality.val_loss


def round_to_bits(rows, bits):
    """Round rows to 2^bits − 1 even steps around 0, with one scale for each row, as int8 does.

    scale = max|row| / (2^(bits−1) − 1);   rounded = scale · round(row / scale)
    """
    scale = jnp.abs(rows).max(axis=-1, keepdims=True) / (2 ** (bits - 1) - 1)
    return jnp.where(scale > 0, jnp.round(rows / jnp.where(scale > 0, scale, 1)) * scale, 0)


def change(kind, dtype, digits=4):
    """Return this cache dtype's loss − the exact one's."""
    return Number(f"{kind}/{dtype}/val_loss", "nats", digits) - f"{kind}/{EXACT}/val_loss"


def table(results):
    rows = []
    for variant in results.variants:
        for kind in CACHES[variant]:
            exact = results.values(variant, f"{kind}/{EXACT}/val_loss")
            for dtype in results.records(variant)[0]["numbers"][kind]:
                size = results.values(variant, f"{kind}/{dtype}/bytes_per_token")[0]
                changed = results.values(variant, change(kind, dtype))
                percent = mean_spread(changed / exact * 100, 3, sign=True)
                changed = mean_spread(changed, 5, sign=True)
                rows.append([variant, kind, dtype, f"{size:,.0f}", changed, percent])
    header = ["model", "cache", "dtype", "bytes per token", f"loss against {EXACT}, paired"]
    return markdown_table([*header, "change, % of the loss"], rows)


ROWS = {
    f"{name}, {dtype}": ("MLA", change(kind, dtype))
    for kind, name in (("latent", "latent"), ("expanded", "keys and values"))
    for dtype in ("int8", *(f"{bits} bits" for bits in BITS[1:]))
}


def keeps(dtype):
    text = f"a latent of {dtype} keeps the loss, within {MARGIN} nats"
    return Claim(text, "MLA", 0.0, change("latent", dtype), "equal", "bits", MARGIN)


def more_than_keys(dtype):
    """Compare the latent with the same model's keys and values."""
    text = f"at {dtype} the latent loses more than keys and values"
    more = change("latent", dtype) - change("expanded", dtype)
    return Claim(text, "MLA", 0.0, more, "higher", "bits")


STUDY = Study(
    variants=variants,
    measure=measure,
    table=table,
    draw=drawing.claims_and_variants(
        ROWS, "MLA's loss against the exact cache, nats per token", linear=0.01
    ),
    claims=(
        keeps("int8"),
        keeps("6 bits"),
        keeps("4 bits"),
        more_than_keys("int8"),
        more_than_keys("3 bits"),
    ),
    stakes={"bits": Stake("2 bits a number", "MLA", 0.0, change("latent", "2 bits", 3))},
    facts={"8 bits": "a format"},
)
