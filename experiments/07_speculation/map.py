"""When speculation pays: the modelled speed-up of released models by batch and acceptance.

python experiments/07_speculation/map.py    # seconds; writes map.png and WHEN_IT_PAYS.md's table
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from model_of_time import Setting, best_length, expected_tokens, step_cost

from dsv3_jax.config import replace
from dsv3_jax.planning.devices import ACCELERATORS
from dsv3_jax.presets import preset
from experiments.lab import markdown_table, write_figure
from experiments.lab.results import replace_block

HERE = Path(__file__).parent
# Name: (model with one multi-token head, bytes of a weight as released).
MODELS = {
    "V2-Lite": (replace(preset("v2_lite"), mtp_depth=1), 2.0),
    "V3": (preset("v3"), 1.0),
    "Kimi K2": (replace(preset("kimi_k2"), mtp_depth=1), 1.0),
}
CHIPS = {"H100": "h100", "TPU v5p": "v5p"}
BATCHES = tuple(2**i for i in range(13))
LENGTHS = (1, 2, 3, 4, 6, 8)
ACCEPTANCES = np.linspace(0, 1, 101)
PATCH = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
SHOWN = (1, 8, 32, 128, 512, 4096)
PUBLISHED = (
    0.85,
    0.90,
    1.8,
)  # V3 report, section 5.4.3: acceptance from, to, and tokens a second; its batch is not given


def setting(chip, weight_bytes):
    device = ACCELERATORS[CHIPS[chip]]
    return Setting(device.memory_bandwidth, device.flops, weight_bytes=weight_bytes)


def speed_ups(cfg, how):
    """Return (the largest speed-up [acceptance, batch]; the draft lengths that give it).

    Plain decoding counts as a speed-up of 1.
    """
    gains = np.ones((len(ACCEPTANCES), len(BATCHES)))
    lengths = np.zeros(gains.shape, int)
    for column, batch in enumerate(BATCHES):
        for length in LENGTHS:
            cost = sum(step_cost(cfg, how, batch, length))
            gain = np.array([expected_tokens(a, length) for a in ACCEPTANCES]) / cost
            better = gain > gains[:, column]
            gains[better, column], lengths[better, column] = gain[better], length
    return gains, lengths


def break_even(lengths):
    """Return the least acceptance with which some draft length pays, by batch; above 1 if none."""
    pays = lengths > 0
    return np.where(pays.any(0), ACCEPTANCES[pays.argmax(0)], np.inf)


def table(maps):
    header = [
        "model",
        "chip",
        "at batch",
        "pays from an acceptance of",
        "cost of a step over 1 draft, of drafting it",
    ]
    header += ["× plain with 1 draft, 85 to 90 % accepted", "best length at 80 %", "× plain"]
    rows = []
    for (name, chip), (_, lengths) in maps.items():
        cfg, weight_bytes = MODELS[name]
        how, least = setting(chip, weight_bytes), break_even(lengths)
        for batch in SHOWN:
            verify, draft = step_cost(cfg, how, batch, 1)
            one = [expected_tokens(a, 1) / (verify + draft) for a in PUBLISHED[:2]]
            length, gain = best_length(cfg, how, batch, 0.8, LENGTHS)
            from_ = least[BATCHES.index(batch)]
            rows.append([
                name, chip, f"{batch:,}", "never" if np.isinf(from_) else f"{from_:.0%}",
                f"{verify:.2f}, {draft:.2f}", f"{one[0]:.2f} to {one[1]:.2f}",
                str(length) if length else "none", f"{gain:.2f}",
            ])  # fmt: skip
    return markdown_table(header, rows)


def headline(maps):
    """State the answer in one line, from the numbers."""
    alone = np.array([break_even(lengths)[0] for _, lengths in maps.values()])
    easiest = [BATCHES[break_even(lengths).argmin()] for _, lengths in maps.values()]
    least = np.array([break_even(lengths).min() for _, lengths in maps.values()])
    return (
        f"Drafts pay most easily at batches of {min(easiest)} to {max(easiest)}, "
        f"which read all experts anyway: from {least.min():.0%} to {least.max():.0%} accepted. "
        f"A single sequence needs {alone.min():.0%} to {alone.max():.0%}"
    )


def draw(maps, path):
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    figure.suptitle(headline(maps), fontsize=12)
    axes = figure.subplots(len(CHIPS), len(MODELS), sharex=True, sharey=True)
    top = max(gains.max() for gains, _ in maps.values())
    for (name, chip), (gains, lengths) in maps.items():
        ax = axes[list(CHIPS).index(chip)][list(MODELS).index(name)]
        ax.set_facecolor("0.85")
        pays = np.where(lengths > 0, gains, np.nan)
        mesh = ax.pcolormesh(
            BATCHES, ACCEPTANCES, pays, norm=LogNorm(1, top), cmap="YlGn", shading="nearest"
        )
        least = break_even(lengths)
        ax.plot(BATCHES, np.where(np.isinf(least), np.nan, least), "k-", linewidth=2)
        for length in LENGTHS[:-1]:
            ax.contour(BATCHES, ACCEPTANCES, lengths, [length + 0.5], colors="0.35", linewidths=0.7)
        for column in (0, 5, 9):
            for row in (60, 80, 95):
                if lengths[row, column]:
                    text = f"{lengths[row, column]}: ×{gains[row, column]:.1f}"
                    ax.text(
                        BATCHES[column],
                        ACCEPTANCES[row],
                        text,
                        fontsize=7,
                        ha="left",
                        va="center",
                        bbox=PATCH,
                    )
        if name == "V3":
            low, high, times = PUBLISHED
            ax.axhspan(
                low, high, facecolor="none", edgecolor="tab:blue", hatch="///", linewidth=0.8
            )
            text = f"V3 report: ×{times} with 1 draft, batch not given"
            ax.text(BATCHES[0], 0.03, f"hatched: {text}", color="tab:blue", fontsize=7, bbox=PATCH)
        ax.set_xscale("log", base=2)
        ax.set_title(f"{name}, {chip}", fontsize=11)
        if chip == list(CHIPS)[-1]:
            ax.set_xlabel("sequences in the batch")
        if name == next(iter(MODELS)):
            ax.set_ylabel("probability that a draft is accepted")
    bar = figure.colorbar(mesh, ax=axes, shrink=0.6)
    bar.set_label("× plain at the best draft length (as written: length: gain)")
    axes[0][0].plot([], [], "k-", linewidth=2, label="above this line drafts pay")
    axes[0][0].plot([], [], "-", color="0.35", linewidth=0.7, label="the best length changes")
    axes[0][0].plot([], [], "s", color="0.85", label="plain decoding is faster")
    axes[0][0].legend(fontsize=7, loc="lower left")
    bar.set_ticks([1, 1.5, 2, 3, 4, 5, 6], labels=["1", "1.5", "2", "3", "4", "5", "6"])
    bar.ax.minorticks_off()
    write_figure(figure, path)


def main():
    maps = {}
    for chip in CHIPS:
        for name, (cfg, weight_bytes) in MODELS.items():
            maps[name, chip] = speed_ups(cfg, setting(chip, weight_bytes))
    draw(maps, HERE / "map.png")
    replace_block(HERE / "WHEN_IT_PAYS.md", f"**{headline(maps)}.**\n\n{table(maps)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
