"""A router's life: when choices settle, what the bias does, how it drifts, what seeds share."""

from itertools import combinations

import numpy as np
from matplotlib.figure import Figure

from dsv3_jax import stats
from dsv3_jax.config import Balance, replace
from experiments.lab import Column, Study, drawing, write_figure
from experiments.lab.claims import Claim, Stake, logit

NONE = Balance(bias_rate=0.0, sequence_alpha=0.0)
BIAS, SWITCH, UNBALANCED = "loss-free, γ 3e-3", "Switch loss, α 1e-2", "none"
METHODS = {  # as in 09_specialisation
    BIAS: replace(NONE, bias_rate=3e-3),
    SWITCH: replace(NONE, switch_alpha=1e-2),
    UNBALANCED: NONE,
}
CHECKPOINTS = 10
TOKENS = 512  # whose choices are kept, to compare seeds
CHOICES = 10_000  # that shares are counted over, at least
EARLY = 0.2  # of training


def variants(base):
    every = max(base.steps // CHECKPOINTS, 1)
    return {
        name: replace(
            base, model=replace(base.model, balance=balance), save_every=every, keep=CHECKPOINTS + 1
        )
        for name, balance in METHODS.items()
    }


def measure(trained):
    """Measure choices and biases by checkpoint, in the mean over layers.

    `settled` is the share of the last checkpoint's choices that are made already. Of runs with a
    bias: `changed`, the share of choices that the bias makes, `max_vio` with and `max_vio_without`
    it on held-out text, and `drift`, the mean change of a bias per step since the checkpoint
    before.
    """
    from dsv3_jax.runs.checkpoint import load_run

    batches = trained.held_out(min(8, trained.run.eval_batches))
    steps = sorted(
        int(p.name) for p in (trained.folder / "checkpoints").iterdir() if p.name.isdigit()
    )
    found = [
        stats.collect(load_run(trained.folder, step=step).model, batches, trained.corpus.domains)
        for step in steps
    ]
    last = found[-1].rows
    numbers = {
        "steps": steps,
        "settled": [float(stats.agreement(last, counts.rows).mean()) for counts in found],
        "choices": last.expert_ids[:, :TOKENS].tolist(),  # [L, n, K]
        "max_vio": [max_vio(counts.load) for counts in found],
    }
    numbers["early"] = float(np.interp(EARLY * steps[-1], steps, numbers["settled"]))
    if trained.run.model.balance.bias_rate:
        values = np.stack([counts.bias.value for counts in found])
        slots = last.expert_ids[0].size
        numbers |= {
            "changed": [float(counts.bias.changed.mean() / slots) for counts in found],
            "max_vio_without": [max_vio(counts.bias.load_without) for counts in found],
            "drift": (np.abs(np.diff(values, axis=0)).mean((1, 2)) / np.diff(steps)).tolist(),
        }
        numbers["changed_last"], numbers["work"] = (
            numbers["changed"][-1],
            np.log(numbers["max_vio_without"][-1] / numbers["max_vio"][-1]),
        )
    return numbers


def max_vio(load):
    return float((load.max(-1) / load.mean(-1) - 1).mean())


def shared_by_seeds(results, variant):
    """Return (share of choices of two seeds' matched experts in common, by chance) by pair."""
    from dsv3_jax.stats.token_rows import rows_of

    rows = []
    for a, b in combinations(results.records(variant), 2):
        here, there = (rows_of(np.array(r["numbers"]["choices"])) for r in (a, b))
        experts = 1 + max(here.expert_ids.max(), there.expert_ids.max())
        match = stats.match_experts(here, there, int(experts))
        rows.append((match.shared.mean(), match.by_chance.mean()))
    return np.array(rows).reshape(-1, 2)


def shared(index):
    def of(results, variant):
        rows = shared_by_seeds(results, variant)
        return rows[:, index] if len(rows) else np.array([np.nan])

    return of


def of_bias(key):
    """Return a number of runs with a bias, else NaN."""

    def of(results, variant):
        if variant == BIAS:
            return results.values(variant, key)
        return np.full(len(results.records(variant)), np.nan)

    return of


def draw(results, path):
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for variant in results.variants:
        steps = results.records(variant)[0]["numbers"]["steps"]
        curves, colour = results.values(variant, "settled"), drawing.colour_of(results, variant)
        left.plot(steps, curves.mean(0), "o-", color=colour, label=variant, markersize=4)
        left.fill_between(
            steps, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0
        )
    early = results.values(BIAS, "early").mean()
    title = f"With the bias {100 * early:.0f} % are made after {100 * EARLY:.0f} % of training"
    drawing.style_axes(left, title, "step", "share of the last choices; shaded: seeds")
    left.set_ylim(0, 1.02)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    steps, colour = results.records(BIAS)[0]["numbers"]["steps"], drawing.colour_of(results, BIAS)
    changed = results.values(BIAS, "changed")
    middle.plot(steps, 100 * changed.mean(0), "o-", color=colour, markersize=4)
    middle.fill_between(
        steps, 100 * changed.min(0), 100 * changed.max(0), color=colour, alpha=0.15, linewidth=0
    )
    title = f"The bias makes {100 * changed[:, -1].mean():.0f} % of the choices at the end"
    drawing.style_axes(middle, title, "step", "% of choices that differ without it")
    middle.set_ylim(bottom=0)
    for key, style, name in (
        ("max_vio_without", "--", "without its bias"),
        ("max_vio", "-", "as it is"),
    ):
        values = results.values(BIAS, key)
        right.plot(steps, values.mean(0), style, color=colour, label=f"{BIAS}, {name}")
        right.fill_between(
            steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0
        )
    for variant in results.variants:
        if variant != BIAS:
            values = results.values(variant, "max_vio")
            right.plot(
                steps, values.mean(0), color=drawing.colour_of(results, variant), label=variant
            )
    with_it, without = (
        results.values(BIAS, key)[:, -1].mean() for key in ("max_vio", "max_vio_without")
    )
    drawing.style_axes(
        right, f"Without its bias: MaxVio {without:.1f}, not {with_it:.1f}", "step", "MaxVio"
    )
    right.set_ylim(0, 1.45 * right.get_ylim()[1])  # space for the legend
    right.legend(frameon=False, fontsize=8, loc="upper right")
    write_figure(figure, path)


def log_vio(numbers):
    return float(np.log(numbers["max_vio"][-1]))


STUDY = Study(
    question="When do a router's choices settle, and what does the bias do?",
    published=(
        "60 % of OLMoE's choices are made after 1 % of training, "
        "80 % after 40 % (arXiv 2409.02060, section 5.1)"
    ),
    variants=variants,
    measure=measure,
    columns=(
        Column("choices made after a fifth of training", "early", 2),
        Column("choices that the bias makes", of_bias("changed_last"), 2),
        Column("ln MaxVio without the bias over with it", of_bias("work"), 2),
        Column("MaxVio", lambda results, variant: results.values(variant, "max_vio")[:, -1], 2),
        Column("two seeds' matched experts share", shared(0), 2),
        Column("by chance", shared(1), 2),
        Column("validation loss", "val_loss", 4, paired=True),
    ),
    draw=draw,
    claims=(
        Claim(
            "half of the choices are made after a fifth of training",
            BIAS,
            0.5,
            "early",
            "higher",
            unit="",
            digits=2,
        ),
        Claim(
            "choices settle later with a bias than with a loss",
            BIAS,
            SWITCH,
            logit("early", CHOICES, 1.0),
            unit="logits",
            digits=2,
        ),
        Claim(
            "choices settle later with a bias than without balance",
            BIAS,
            UNBALANCED,
            logit("early", CHOICES, 1.0),
            unit="logits",
            digits=2,
        ),
        Claim(
            "the bias evens the load",
            BIAS,
            0.0,
            "work",
            "higher",
            unit="ln MaxVio",
            digits=2,
            stake="balance",
        ),
    ),
    stakes={
        "balance": Stake(
            "no balance",
            lambda results: results.paired(UNBALANCED, BIAS, log_vio),
            "ln MaxVio",
            2,
        )
    },
    facts={
        "60 %, 40 %, 80 %, 50,000": "published: 1 % of 5 trillion tokens; here 1 million",
        "3.1": "1.18 * exp(0.96)",
        "0.27": "0.66 - 0.39",
        **{f"{share} %": f"0.{share}" for share in (21, 39, 41, 45, 51, 62, 66)},
        "55 %": lambda results: results.values(BIAS, "changed").mean(0).max(),
        "4.3": lambda results: results.values(BIAS, "max_vio_without").mean(0).max(),
    },
)
