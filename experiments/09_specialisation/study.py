"""Specialisation of experts by domain and layer: loss-free balance against an auxiliary loss."""

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from dsv3_jax import stats
from dsv3_jax.config import Balance, replace
from dsv3_jax.data.source import open_source
from experiments.lab import Column, Study, drawing, write_figure
from experiments.lab.claims import Claim, Stake

NONE = Balance(bias_rate=0.0, sequence_alpha=0.0)
METHODS = {  # as in 03_balance, with the same runs
    "Switch loss, α 1e-2": replace(NONE, switch_alpha=1e-2),
    "sequence-wise, α 3e-3": replace(NONE, sequence_alpha=3e-3),
    "loss-free, γ 3e-3": replace(NONE, bias_rate=3e-3),
    "loss-free + sequence-wise": replace(NONE, bias_rate=3e-3, sequence_alpha=1e-4),
    "none": NONE,
}


def variants(base):
    return {
        name: replace(base, model=replace(base.model, balance=balance))
        for name, balance in METHODS.items()
    }


def measure(trained):
    """Measure I(expert; domain) by layer, also with shuffled domains, and each domain's load.

    Also I(expert; token), and I(expert; domain | token): what the domain tells once the token is
    known.
    """
    # The validation set has few English documents, so this reads half of all documents. Training
    # has not read most of them.
    cfg = replace(trained.run.data, val_fraction=0.5, seed=0)
    source = open_source(cfg, trained.tokenizer)
    batches = source.val_batches(trained.run.eval_batches)
    counts = stats.collect(trained.model, batches, source.domains)
    special = stats.specialisation(counts)
    excess = special.bits - special.shuffled_mean
    # Shuffles for chance alone: intervals come from the seeds here.
    found = stats.information(
        counts.rows, trained.run.model.num_experts, len(counts.domains), draws=5, resamples=2
    )
    return {
        "domains": list(counts.domains),
        "load_by_domain": counts.load_by_domain.tolist(),  # [N, L, E]
        "documents": np.bincount(counts.document_domains, minlength=len(counts.domains)).tolist(),
        "bits": special.bits.tolist(),
        "shuffled": special.shuffled_mean.tolist(),
        "shuffled_95": special.shuffled_95.tolist(),
        "excess": excess.tolist(),
        "excess_mean": float(excess.mean()),
        "share": float(special.share.mean()),
        "token": float(found.token.bits.mean()),
        "given": float(found.domain_given_token.bits.mean()),
    }


def layers_of(results):
    return len(results.records(results.variants[0])[0]["numbers"]["bits"])


def draw(results, path):
    """Draw, by variant, heat maps of the first seed's layers and the information of all seeds."""
    names, count = results.variants, layers_of(results)
    shown = sorted({0, count // 2, count - 1})
    figure = Figure(figsize=(4.2 * len(shown) + 3.6, 1.5 * len(names) + 1.2), layout="constrained")
    grid = figure.add_gridspec(
        max(len(names), 2), len(shown) + 1, width_ratios=[*[4.0] * len(shown), 3.4]
    )
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=3.0)
    maps = []
    for row, name in enumerate(names):
        numbers = results.records(name)[0]["numbers"]
        ratio = over_mean(np.array(numbers["load_by_domain"], np.float64))
        for column, layer in enumerate(shown):
            ax = figure.add_subplot(grid[row, column])
            maps.append(ax)
            part = ratio[:, layer]
            image = ax.imshow(part[:, by_favourite(part)], cmap="RdBu_r", norm=norm, aspect="auto")
            ax.set_yticks(range(len(part)), numbers["domains"] if column == 0 else [], fontsize=8)
            ax.set_xticks([])
            ax.set_title(f"{name}: layer {layer}, {numbers['bits'][layer]:.3f} bits", fontsize=9)
            if row == len(names) - 1:
                ax.set_xlabel("expert, sorted by its favourite domain", fontsize=8)
    bar = figure.colorbar(image, ax=maps, location="bottom", shrink=0.5, aspect=50, extend="max")
    bar.set_label("load of an expert within the domain / even load", fontsize=8)
    side = figure.add_subplot(grid[:, len(shown)])
    draw_information(side, results, count)
    figure.legend(
        *side.get_legend_handles_labels(),
        frameon=False,
        fontsize=8,
        ncols=5,
        loc="outside lower center",
    )
    write_figure(figure, path)


def draw_information(ax, results, count):
    halves = [drawing.half_intervals(results, results.variants, f"bits/{i}") for i in range(count)]
    for i, (name, half) in enumerate(zip(results.variants, np.transpose(halves), strict=True)):
        bits, chance = results.values(name, "bits"), results.values(name, "shuffled_95")
        positions = np.arange(count) + 0.12 * (i - (len(results.variants) - 1) / 2)
        how = {"color": drawing.colour_of(results, name)}
        ax.errorbar(
            positions,
            bits.mean(0),
            yerr=half,
            fmt="_",
            markersize=11,
            markeredgewidth=2.5,
            label=name,
            **how,
        )
        ax.plot(np.broadcast_to(positions, bits.shape), bits, ".", alpha=0.6, **how)
        ax.plot(positions, chance.mean(0), "x", markersize=5, **how)
    title = drawing.answer(lambda: words(results), "What an expert tells of the domain")
    label = "sparse layer; bars: 95 % interval\n×: 95 % of shuffled documents"
    drawing.style_axes(ax, title, label, "I(expert; domain), bits")
    ax.set_xticks(range(count))
    ax.set_ylim(bottom=0)


def words(results):
    bias, loss = (results.values(name, "bits").mean() for name in (BIAS, SEQUENCE))
    return f"{bias:.2f} bits of the domain with the bias,\n{loss:.2f} with a sequence-wise loss"


def over_mean(load_by_domain):
    """Divide counts [N, L, E] by the mean over experts: 1 is even load, for domains of any size."""
    return load_by_domain / np.maximum(load_by_domain.mean(-1, keepdims=True), 1e-20)


def by_favourite(ratio):
    """Sort experts, [N, E] → [E]: by favourite domain, then by descending load ratio."""
    return np.lexsort((-ratio.max(0), ratio.argmax(0)))


def layer(index, key):
    return lambda results, variant: results.values(variant, key)[:, index]


def more_bits(text, variant, against, key="excess_mean"):
    return Claim(text, variant, against, key, "higher", unit="bits", digits=3, stake="domains")


def token_against_domain(numbers):
    """Return I(expert; token) − I(expert; domain), bits over chance."""
    return numbers["token"] - numbers["excess_mean"]


BIAS, SEQUENCE = "loss-free, γ 3e-3", "sequence-wise, α 3e-3"

STUDY = Study(
    question="Do experts specialise by domain, and more so without an auxiliary loss?",
    published=(
        "the loss-free model's experts specialise more than the auxiliary-loss model's "
        "(V3 report, figure 9)"
    ),
    variants=variants,
    measure=measure,
    columns=(
        Column(
            "bits over chance, mean of layers", "excess_mean", 4, paired=True, against=(SEQUENCE,)
        ),
        Column("the same, once the token is known", "given", 4, paired=True, against=(SEQUENCE,)),
        Column("I(expert; token)", "token", 3),
        Column("first layer: bits", layer(0, "bits"), 4),
        Column("shuffled", layer(0, "shuffled"), 4),
        Column("95 %", layer(0, "shuffled_95"), 4),
        Column("last layer: bits", layer(-1, "bits"), 4),
        Column("shuffled", layer(-1, "shuffled"), 4),
        Column("95 %", layer(-1, "shuffled_95"), 4),
        Column("share of H(domain), %", "share", 1, scale=100.0),
        Column("MaxVio", "max_vio_global", 2),
        Column("validation loss", "val_loss", 4),
    ),
    draw=draw,
    claims=(
        more_bits(
            "the bias gives more specialised experts than a sequence-wise loss", BIAS, SEQUENCE
        ),
        more_bits(
            "the bias gives more specialised experts than the Switch loss",
            BIAS,
            "Switch loss, α 1e-2",
        ),
        more_bits("the bias gives more specialised experts than no balance", BIAS, "none"),
        more_bits(
            "with the token given, the bias still gives more than a sequence-wise loss",
            BIAS,
            SEQUENCE,
            "given",
        ),
        more_bits(
            "with the token given, the bias still gives more than the Switch loss",
            BIAS,
            "Switch loss, α 1e-2",
            "given",
        ),
        more_bits(
            "an expert tells more about the token than about the domain",
            BIAS,
            0.0,
            token_against_domain,
        ),
    ),
    stakes={
        "domains": Stake(
            "documents' domains shuffled",
            lambda results: results.values(BIAS, "excess_mean"),
            "bits",
        )
    },
    facts={
        "16 times": "1.797 / 0.1126",
        "1e-4": "a weight",
    },
)
