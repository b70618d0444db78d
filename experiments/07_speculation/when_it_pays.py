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

import math
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from dsv3_jax.config import ModelConfig, replace
from dsv3_jax.model.cache import pick_kind
from dsv3_jax.model.counting import bytes_per_token, distinct_experts, size
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
SHOWN = (1, 8, 32, 128, 512, 4096)
# V3 report, section 5.4.3: acceptance from, to, and × plain; its batch is not given
PUBLISHED = (0.85, 0.90, 1.8)
PATCH = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}

_size = lru_cache(size)  # a map asks for the same models again and again


# The model of time


class Part(NamedTuple):
    """A part of a step: bytes that it reads, and its FLOPs."""

    bytes: float
    flops: float

    def seconds(self, bandwidth: float, peak: float) -> float:
        """The longer of both times."""
        return max(self.bytes / bandwidth, self.flops / peak)


class Setting(NamedTuple):
    """A model's decoding on a device."""

    bandwidth: float  # bytes/s
    peak: float  # FLOP/s
    context: int = 4096  # tokens of each sequence in the cache
    weight_bytes: float = 2.0
    cache_dtype: str = "bfloat16"


def verify_parts(cfg: ModelConfig, setting: Setting, batch: int, tokens: int) -> dict[str, Part]:
    """Count a step of the trunk over some tokens of each sequence.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> cfg = preset("tiny")
        >>> setting = Setting(1.0, 1.0, context=100, weight_bytes=4)
        >>> parts = verify_parts(cfg, setting, batch=1, tokens=1)
        >>> read = parts["dense"].bytes + parts["experts"].bytes
        >>> read == 4 * size(cfg).active  # as `decode_bytes`
        True
    """
    counted = _size(cfg)
    routed = counted.parts.get("routed experts", 0)
    always = counted.active - routed * cfg.experts_per_token / cfg.num_experts
    return _parts(cfg, setting, batch, tokens, always, float(routed), cfg.num_layers)


def draft_parts(cfg: ModelConfig, setting: Setting, batch: int) -> dict[str, Part]:
    """Count a pass of one multi-token head, and the unembedding, over a token of each sequence.

    0 without heads.
    """
    if not cfg.mtp_depth:
        return _parts(cfg, setting, batch, 1, 0.0, 0.0, 0)
    cfg = replace(cfg, mtp_depth=1)
    counted, head = _size(cfg), cfg.vocab_size * cfg.dim
    share = cfg.experts_per_token / cfg.num_experts
    # `mtp_active` counts K of E
    routed = (counted.mtp + head - counted.mtp_active) / (1 - share) if share < 1 else 0.0
    return _parts(cfg, setting, batch, 1, counted.mtp_active - routed * share, routed, 1)


def _parts(
    cfg: ModelConfig,
    setting: Setting,
    batch: int,
    tokens: int,
    always: float,
    routed: float,
    layers: int,
) -> dict[str, Part]:
    rows, share = batch * tokens, cfg.experts_per_token / cfg.num_experts
    reached = distinct_experts(cfg, rows) / cfg.num_experts
    kind = pick_kind(cfg, None)
    per_token = bytes_per_token(cfg, kind, setting.cache_dtype) * layers / cfg.num_layers
    if kind == "latent":  # absorbed: a latent row is read as key and as value
        scores = 2.0 * cfg.num_heads * (2 * cfg.kv_latent_dim + cfg.rope_head_dim)
    else:
        scores = 2.0 * cfg.num_heads * (cfg.nope_head_dim + cfg.rope_head_dim + cfg.v_head_dim)
    return {
        "dense": Part(always * setting.weight_bytes, 2.0 * always * rows),
        "experts": Part(routed * reached * setting.weight_bytes, 2.0 * routed * share * rows),
        "cache": Part(
            batch * setting.context * per_token, scores * layers * setting.context * rows
        ),
    }


def seconds(parts: dict[str, Part], setting: Setting) -> float:
    """Add up the parts' times."""
    return sum(part.seconds(setting.bandwidth, setting.peak) for part in parts.values())


def step_cost(cfg: ModelConfig, setting: Setting, batch: int, drafts: int) -> tuple[float, float]:
    """Return (t(k) / t(0), d(k) / t(0)): what verifying and making k drafts costs, in plain steps.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> setting = Setting(3.35e12, 989e12, weight_bytes=1)
        >>> verify, draft = step_cost(preset("v3"), setting, batch=1, drafts=1)
        >>> 1.3 < verify < 1.6 and 0.02 < draft < 0.1  # a second token brings up to 8 other experts
        True
    """
    plain = seconds(verify_parts(cfg, setting, batch, 1), setting)
    verify = seconds(verify_parts(cfg, setting, batch, drafts + 1), setting)
    return verify / plain, drafts * seconds(draft_parts(cfg, setting, batch), setting) / plain


def expected_tokens(acceptance: float, drafts: int) -> float:
    """E(J) = 1 + a + … + a^J.

    Example:
        >>> expected_tokens(0.5, 2), expected_tokens(1.0, 4), expected_tokens(0.0, 4)
        (1.75, 5.0, 1.0)
    """
    return math.fsum(acceptance**j for j in range(drafts + 1))


def speed_up(
    cfg: ModelConfig, setting: Setting, batch: int, drafts: int, acceptance: float
) -> float:
    """Return tokens a second relative to plain decoding; 1 without drafts."""
    return expected_tokens(acceptance, drafts) / sum(step_cost(cfg, setting, batch, drafts))


def best_length(
    cfg: ModelConfig, setting: Setting, batch: int, acceptance: float, lengths: tuple[int, ...]
) -> tuple[int, float]:
    """Return (the draft length with the largest speed-up, that speed-up); 0 is plain decoding.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> best_length(preset("v3"), Setting(3.35e12, 989e12, weight_bytes=1), 1, 0.0, (1, 2))
        (0, 1.0)
    """
    found = [(1.0, 0), *((speed_up(cfg, setting, batch, j, acceptance), -j) for j in lengths)]
    gain, length = max(found)
    return -length, gain


# The map


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
    header = ["model", "chip", "at batch", "pays from an acceptance of"]
    header += ["cost of a step over 1 draft, of drafting it"]
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
                if length := lengths[row, column]:
                    text = f"{length}: ×{gains[row, column]:.1f}"
                    place = BATCHES[column], ACCEPTANCES[row]
                    ax.text(*place, text, fontsize=7, ha="left", va="center", bbox=PATCH)
        if name == "V3":
            low, high, times = PUBLISHED
            hatched = dict(facecolor="none", edgecolor="tab:blue", hatch="///", linewidth=0.8)
            ax.axhspan(low, high, **hatched)
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


if __name__ == "__main__":
    main()
