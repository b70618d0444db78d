"""Cache dtypes: loss by bytes per token, for MLA's latent cache and for per-head keys and values."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`

from dataclasses import asdict

from matplotlib.figure import Figure

from dsv3_jax.config import replace
from dsv3_jax.model.cache import CACHE_DTYPES
from dsv3_jax.training.evaluate import cache_quality
from experiments.lab import Study, drawing, markdown_table, mean_spread, write_figure

EXACT = CACHE_DTYPES[0]  # float32
CACHES = {"MLA": ("latent", "expanded"), "MHA": ("expanded",)}
BATCHES = 8


def variants(base):
    mla = replace(base.model, attention="mla")
    return {"MLA": replace(base, model=mla), "MHA": replace(base, model=replace(mla, attention="mha"))}


def measure(trained):
    """Evaluate held-out text through each cache: cache → dtype → val_loss, agreement, bytes_per_token."""
    caches = CACHES["MLA" if trained.run.model.attention == "mla" else "MHA"]
    batches = trained.held_out(min(BATCHES, trained.run.eval_batches))
    qualities = {kind: cache_quality(trained.model, batches, CACHE_DTYPES, kind) for kind in caches}
    return {kind: {dtype: asdict(quality) for dtype, quality in by.items()} for kind, by in qualities.items()}


def cells(results):
    """Yield (variant, cache, dtype, bytes per token, loss − loss with the exact cache [seeds])."""
    for variant in results.variants:
        for kind in CACHES[variant]:
            exact = results.values(variant, f"{kind}/{EXACT}/val_loss")
            for dtype in results.records(variant)[0]["numbers"][kind]:
                size = results.values(variant, f"{kind}/{dtype}/bytes_per_token")[0]
                yield variant, kind, dtype, int(size), results.values(variant, f"{kind}/{dtype}/val_loss") - exact


def table(results):
    rows = []
    for variant, kind, dtype, size, change in cells(results):
        exact = results.values(variant, f"{kind}/{EXACT}/val_loss")
        loss = results.values(variant, f"{kind}/{dtype}/val_loss")
        agreement = results.values(variant, f"{kind}/{dtype}/agreement") * 100
        rows.append(
            [variant, kind, dtype, f"{size:,}", mean_spread(loss, 4)]
            + [mean_spread(change, 5, sign=True), mean_spread(change / exact * 100, 3, sign=True)]
            + [mean_spread(agreement, 2)]
        )
    header = [
        "model",
        "cache",
        "dtype",
        "bytes per token",
        "validation loss",
        f"against {EXACT}, paired",
        "change, % of the loss",
    ]
    return markdown_table([*header, "same most likely token, %"], rows)


def draw(results, path):
    figure = Figure(figsize=(11, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = list(cells(results))
    lines = list(dict.fromkeys((variant, kind) for variant, kind, *_ in rows))
    dtypes = list(dict.fromkeys(dtype for _, _, dtype, *_ in rows))
    marks = dict(zip(dtypes, "osD^", strict=False))
    for i, line in enumerate(lines):
        name = ", ".join(line)
        for variant, kind, dtype, size, change in (row for row in rows if row[:2] == line):
            loss = results.values(variant, f"{kind}/{dtype}/val_loss").mean()
            left.plot([size], [loss], marks[dtype], color=f"C{i}", markersize=8, fillstyle="none")
            if dtype != EXACT:
                x = dtypes.index(dtype) + 0.2 * (i - (len(lines) - 1) / 2)
                right.plot([x] * len(change), change * 1e3, ".", color=f"C{i}", alpha=0.6)
                right.plot([x - 0.08, x + 0.08], [change.mean() * 1e3] * 2, color=f"C{i}", linewidth=2.5)
        left.plot([], [], color=f"C{i}", label=name)
        right.plot([], [], color=f"C{i}", label=name)
    for dtype in dtypes:
        left.plot([], [], marks[dtype], color="0.4", fillstyle="none", label=dtype)
    drawing.style_axes(left, "Loss by cache size", "cache, bytes per token", "validation loss, nats per token")
    left.set_xscale("log")
    sizes = sorted({size for *_, size, _ in rows})
    left.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
    left.minorticks_off()
    title = f"Change of the loss against {EXACT}"
    drawing.style_axes(right, title, "", "10⁻³ nats per token; a dot is a seed")
    right.axhline(0, color="0.5", linewidth=0.8)
    right.set_xticks(range(1, len(dtypes)), dtypes[1:])
    for ax in (left, right):
        ax.legend(frameon=False, fontsize=8)
    write_figure(figure, path)


def ours(results):
    if "MLA" not in results.variants:
        return ""
    exact = results.values("MLA", f"latent/{EXACT}/val_loss")
    sizes = {d: int(results.values("MLA", f"latent/{d}/bytes_per_token")[0]) for d in (EXACT, "int8")}
    change = (results.values("MLA", "latent/int8/val_loss") / exact - 1).mean()
    return f"int8 latent: {change:+.3%} of loss at {sizes['int8']} bytes per token instead of {sizes[EXACT]}"


STUDY = Study(
    script=__file__,
    question="How many bits does each cached number need, and does MLA's latent need more than keys and values?",
    published="DeepSeek-V2 is served with 6 bits per element on average; no loss is given",
    variants=variants,
    measure=measure,
    table=table,
    draw=draw,
    ours=ours,
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
