"""What a cache of fewer bits costs: bytes a token against loss, for MLA's latent and for keys and values of heads."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`

from dataclasses import asdict

from matplotlib.figure import Figure

from dsv3_jax.config import replace
from dsv3_jax.model.cache import DTYPES
from dsv3_jax.training.evaluate import cache_quality
from experiments.lab import Study, drawing
from experiments.lab.results import markdown, mean_spread, write_figure

EXACT = DTYPES[0]  # float32
CACHES = {"MLA": ("latent", "expanded"), "MHA": ("expanded",)}
BATCHES = 8


def variants(base):
    mla = replace(base.model, attention="mla")
    return {"MLA": replace(base, model=mla), "MHA": replace(base, model=replace(mla, attention="mha"))}


def measure(trained):
    """Held-out text read through each cache: cache → dtype → val_loss, agreement, bytes_per_token."""
    caches = CACHES["MLA" if trained.run.model.attention == "mla" else "MHA"]
    batches = trained.held_out(min(BATCHES, trained.run.eval_batches))
    found = {kind: cache_quality(trained.model, batches, DTYPES, kind) for kind in caches}
    return {kind: {dtype: asdict(quality) for dtype, quality in by.items()} for kind, by in found.items()}


def cells(results):
    """(variant, cache, dtype, bytes a token, loss − loss of the exact cache [seeds]) of all that was measured."""
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
        "bytes a token",
        "validation loss",
        f"against {EXACT}, paired",
        "change, % of the loss",
    ]
    return markdown([*header, "likeliest token the same, %"], rows)


def draw(results, path):
    figure = Figure(figsize=(11, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = list(cells(results))
    lines = list(dict.fromkeys((variant, kind) for variant, kind, *_ in found))
    dtypes = list(dict.fromkeys(dtype for _, _, dtype, *_ in found))
    marks = dict(zip(dtypes, "osD^", strict=False))
    for i, line in enumerate(lines):
        name = ", ".join(line)
        mine = [cell for cell in found if cell[:2] == line]
        for variant, kind, dtype, size, change in mine:
            loss = results.values(variant, f"{kind}/{dtype}/val_loss").mean()
            left.plot([size], [loss], marks[dtype], color=f"C{i}", markersize=8, fillstyle="none")
            if dtype != EXACT:
                at = dtypes.index(dtype) + 0.2 * (i - (len(lines) - 1) / 2)
                right.plot([at] * len(change), change * 1e3, ".", color=f"C{i}", alpha=0.6)
                right.plot([at - 0.08, at + 0.08], [change.mean() * 1e3] * 2, color=f"C{i}", linewidth=2.5)
        left.plot([], [], color=f"C{i}", label=name)
        right.plot([], [], color=f"C{i}", label=name)
    for dtype in dtypes:
        left.plot([], [], marks[dtype], color="0.4", fillstyle="none", label=dtype)
    drawing.panel(left, "Loss against the cache's size", "cache, bytes a token", "validation loss, nats a token")
    left.set_xscale("log")
    sizes = sorted({size for *_, size, _ in found})
    left.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
    left.minorticks_off()
    title = f"What fewer bits change, against {EXACT}"
    drawing.panel(right, title, "", "10⁻³ nats a token; a dot is a seed")
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
    return f"int8 latent: {change:+.3%} of loss at {sizes['int8']} bytes a token for {sizes[EXACT]}"


STUDY = Study(
    script=__file__,
    question="How many bits does a cached token need, and does MLA's latent need more than keys and values do?",
    published="DeepSeek-V2 is served with 6 bits an element on average; no loss is given",
    variants=variants,
    measure=measure,
    table=table,
    draw=draw,
    ours=ours,
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
