"""When speculative decoding pays: a step's time by its reads and products, and the speed-up.

python experiments/07_speculation/when_it_pays.py    # seconds; map.png and WHEN_IT_PAYS.md's table

A step verifies k drafts of each of B sequences, F = k + 1 tokens each. It has parts that follow one
another. Each part waits for memory or for its products, whichever takes longer:

    dense      attention's, shared experts' and dense layers' weights, and the unembedding, once;
               B F tokens' products
    experts    U(B F) of E routed experts in each layer, and K products a token. U is the number of
               distinct experts
    cache      every sequence's rows, once for all its F tokens; scores and sums of B F tokens

    t(k)       Σ over parts of max(bytes / bandwidth, FLOPs / peak)
    d(J)       J passes of a head, each with the same three parts of one layer, and the unembedding
    E(J)       1 + a + a² + … + a^J tokens, if each draft is accepted with probability a
    speed-up   E(J) t(0) / (t(J) + d(J))

N devices that share all parts evenly divide both times by N, so the speed-up is that of one device.
Left out are communication between devices, launches, and activations.

Source: arXiv 2211.17192, section 3, for E and the speed-up at a constant cost; a part's two limits
are the roofline.
"""

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from dsv3_jax.config import ModelConfig, replace
from dsv3_jax.model.counting import bytes_per_token, distinct_experts, size
from dsv3_jax.planning.devices import ACCELERATORS
from dsv3_jax.planning.flops import decode_attention_flops
from dsv3_jax.presets import preset
from experiments.lab import drawing, write_figure
from experiments.lab.results import replace_block
from experiments.lab.tables import markdown_table

HERE = Path(__file__).parent
# Name: (model, bytes of a weight as released).
MODELS = {
    "V2-Lite": (preset("v2_lite"), 2.0),
    "V3": (preset("v3"), 1.0),
    "Kimi K2": (preset("kimi_k2"), 1.0),
}
CHIPS = {"H100": "h100", "TPU v5p": "v5p"}
BATCHES = tuple(2**i for i in range(13))
LENGTHS = (1, 2, 3, 4, 6, 8)
ACCEPTANCES = np.linspace(0, 1, 101)
SHOWN = (1, 8, 32, 128, 512, 4096)
PUBLISHED = (0.85, 0.90)  # accepted drafts, V3 report, section 5.4.3; its batch is not given


class Setting(NamedTuple):
    """A model's decoding on a device."""

    bandwidth: float  # bytes/s
    peak: float  # FLOP/s
    context: int = 4096  # tokens of each sequence in the cache
    weight_bytes: float = 2.0
    cache_dtype: str = "bfloat16"


class Weights(NamedTuple):
    """The parameters that a pass may read."""

    always: float
    routed: float  # of all E experts
    layers: int

    @classmethod
    def of(cls, cfg: ModelConfig, whole: int, active: int, layers: int) -> "Weights":
        """Tell apart what every token uses, and experts of which it uses K of E."""
        routed = (whole - active) / (1 - cfg.experts_per_token / cfg.num_experts)
        return cls(whole - routed, routed, layers)


def trunk(cfg: ModelConfig) -> Weights:
    """Count the layers and the unembedding; the embedding is looked up."""
    counted = size(cfg)
    looked_up = 0 if cfg.tie_embeddings else cfg.vocab_size * cfg.dim
    return Weights.of(cfg, counted.total - looked_up, counted.active, cfg.num_layers)


def head(cfg: ModelConfig) -> Weights:
    """Count one multi-token head as V3's, and the unembedding."""
    counted = size(replace(cfg, mtp_depth=1))
    return Weights.of(cfg, counted.mtp + cfg.vocab_size * cfg.dim, counted.mtp_active, 1)


def seconds(cfg: ModelConfig, how: Setting, weights: Weights, batch: int, tokens: int = 1) -> float:
    """Return the time of a pass over some tokens of each sequence, with a latent cache."""
    rows, share = batch * tokens, cfg.experts_per_token / cfg.num_experts
    reached = distinct_experts(cfg, rows) / cfg.num_experts
    of_layers = weights.layers / cfg.num_layers
    row_bytes = bytes_per_token(cfg, "latent", how.cache_dtype) * of_layers
    scores = decode_attention_flops(cfg, how.context) * of_layers

    parts = {  # bytes, FLOPs
        "dense": (weights.always * how.weight_bytes, 2.0 * weights.always * rows),
        "experts": (
            weights.routed * reached * how.weight_bytes,
            2.0 * weights.routed * share * rows,
        ),
        "cache": (batch * how.context * row_bytes, scores * rows),
    }
    return sum(max(nbytes / how.bandwidth, flops / how.peak) for nbytes, flops in parts.values())


def step_cost(cfg: ModelConfig, how: Setting, batch: int, drafts: int) -> tuple[float, float]:
    """Return (t(k) / t(0), d(k) / t(0)): what verifying and making k drafts costs, in plain steps.

    Example:
        >>> how = Setting(3.35e12, 989e12, weight_bytes=1)
        >>> verify, draft = step_cost(preset("v3"), how, batch=1, drafts=1)
        >>> 1.3 < verify < 1.6 and 0.02 < draft < 0.1  # a second token brings up to 8 other experts
        True
    """
    plain = seconds(cfg, how, trunk(cfg), batch)
    verify = seconds(cfg, how, trunk(cfg), batch, drafts + 1)
    return verify / plain, drafts * seconds(cfg, how, head(cfg), batch) / plain


def expected_tokens(acceptance, drafts: int):
    """E(J) = 1 + a + … + a^J.

    Example:
        >>> expected_tokens(0.5, 2), expected_tokens(1.0, 4), expected_tokens(0.0, 4)
        (1.75, 5.0, 1.0)
    """
    return sum(acceptance**j for j in range(drafts + 1))


# The map


def setting(chip, weight_bytes):
    device = ACCELERATORS[CHIPS[chip]]
    return Setting(device.memory_bandwidth, device.flops, weight_bytes=weight_bytes)


def speed_ups(cfg, how):
    """Return (the largest speed-up [acceptance, batch]; the draft lengths that give it).

    Plain decoding counts as a speed-up of 1, and its length is 0.
    """
    gains = np.ones((len(ACCEPTANCES), len(BATCHES)))
    lengths = np.zeros(gains.shape, int)
    for column, batch in enumerate(BATCHES):
        for length in LENGTHS:
            cost = sum(step_cost(cfg, how, batch, length))
            gain = expected_tokens(ACCEPTANCES, length) / cost
            better = gain > gains[:, column]
            gains[better, column] = gain[better]
            lengths[better, column] = length
    return gains, lengths


def break_even(lengths):
    """Return the least acceptance with which some draft length pays, by batch; NaN if none."""
    pays = lengths > 0
    return np.where(pays.any(0), ACCEPTANCES[pays.argmax(0)], np.nan)


def table(maps):
    header = ["model", "chip", "at batch", "pays from an acceptance of"]
    header += ["cost of a step over 1 draft, of drafting it"]
    header += ["× plain with 1 draft, 85 to 90 % accepted", "best length at 80 %", "× plain"]
    rows = []
    for (name, chip), (gains, lengths) in maps.items():
        cfg, weight_bytes = MODELS[name]
        for batch in SHOWN:
            column = BATCHES.index(batch)
            least, at_80 = break_even(lengths)[column], (80, column)
            costs = step_cost(cfg, setting(chip, weight_bytes), batch, 1)
            low, high = (expected_tokens(a, 1) / sum(costs) for a in PUBLISHED)
            row = [name, chip, f"{batch:,}", "never" if np.isnan(least) else f"{least:.0%}"]
            row += ["{:.2f}, {:.2f}".format(*costs), f"{low:.2f} to {high:.2f}"]
            rows.append([*row, str(lengths[at_80] or "none"), f"{gains[at_80]:.2f}"])
    return markdown_table(header, rows)


def draw(maps, path):
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    figure.suptitle("When a draft pays, and what the best number of drafts gains", fontsize=11)
    axes = figure.subplots(len(CHIPS), len(MODELS), sharex=True, sharey=True)
    norm = LogNorm(1, max(gains.max() for gains, _ in maps.values()))
    for ax, ((name, chip), (gains, lengths)) in zip(axes.flat, maps.items(), strict=True):
        pays = np.where(lengths > 0, gains, np.nan)
        mesh = ax.pcolormesh(BATCHES, ACCEPTANCES, pays, norm=norm, cmap="YlGn", shading="nearest")
        ax.plot(BATCHES, break_even(lengths), "k-", linewidth=2)
        ax.set_facecolor("0.85")
        if name == "V3":
            ax.axhspan(*PUBLISHED, facecolor="none", edgecolor="tab:blue", hatch="///")
        drawing.style_axes(ax, f"{name}, {chip}", "", "")
        ax.set_xscale("log", base=2)
    figure.supxlabel("sequences in the batch; grey: plain decoding is faster", fontsize=10)
    figure.supylabel("probability that a draft is accepted; hatched: V3's report", fontsize=10)
    bar = figure.colorbar(mesh, ax=axes, label="× plain at the best draft length")
    bar.set_ticks([1, 1.5, 2, 3, 4, 5, 6], labels=["1", "1.5", "2", "3", "4", "5", "6"])
    bar.ax.minorticks_off()
    write_figure(figure, path)


if __name__ == "__main__":
    maps = {
        (name, chip): speed_ups(cfg, setting(chip, weight_bytes))
        for chip in CHIPS
        for name, (cfg, weight_bytes) in MODELS.items()
    }
    draw(maps, HERE / "map.png")
    replace_block(HERE / "WHEN_IT_PAYS.md", table(maps))
