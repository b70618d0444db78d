"""When induction forms: by the optimizer, and with multi-token heads that predict more than the next token."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`

import itertools
import math

import numpy as np
from matplotlib.figure import Figure

from dsv3_jax.config import replace
from experiments.lab import Column, OnTask, Study, drawing, write_figure
from experiments.lab.claims import Claim, Stake
from experiments.lab.measuring import BITS, unknown_bits
from experiments.lab.tasks import Chains, Names

TOKENS = Chains()  # the last token chooses what follows
TWO = Chains(states=3, order=2, tokens=96)  # the last two tokens do
NAMES = Names(names=3, tokens=40, share=1.0)  # a name's first token tells its second one
ADAMW, MUON = "AdamW", "Muon"
MODULE, PARALLEL = "a module", "two parallel heads"
OF_TWO, OF_NAMES = ", order 2", ", names"
NAMES_STEPS = 1200  # names take longer than chains
FACTORS = {", half width": 0.5, "": 1, ", double width": 2}  # of the base recipe's widths
WIDTHS = ("dim", "dense_dim", "kv_latent_dim", "nope_head_dim", "rope_head_dim", "v_head_dim")
RATES = {ADAMW: 6e-3, MUON: 1.2e-2}  # chosen on seed 100, see README.md
WINDOW = 5  # rows of metrics.jsonl, ten steps each, whose mean is the loss at a step


def variants(base):
    def run(optimizer, task=TOKENS, factor=1, **model):
        rate = RATES[optimizer] / factor
        model |= {name: round(getattr(base.model, name) * factor) for name in WIDTHS}
        optim = replace(base.optim, name=optimizer.lower(), learning_rate=rate, final_learning_rate=rate / 20)
        data = replace(base.data, seq_len=task.length)
        steps = {"steps": NAMES_STEPS, "eval_every": NAMES_STEPS, "save_every": NAMES_STEPS} if task is NAMES else {}
        return OnTask(task, replace(base, optim=optim, data=data, model=replace(base.model, **model), **steps))

    module, parallel = {"mtp_depth": 1}, {"mtp_depth": 2, "mtp_kind": "meta"}
    made = {}
    for optimizer in (ADAMW, MUON):
        made |= {
            optimizer: run(optimizer),
            f"{optimizer}, {MODULE}": run(optimizer, **module),
            f"{optimizer}, {PARALLEL}": run(optimizer, **parallel),
        }
    for optimizer, (size, factor) in itertools.product(RATES, FACTORS.items()):
        made[optimizer + size] = run(optimizer, factor=factor)
    return made | {
        MUON + OF_TWO: run(MUON, TWO),
        f"{MUON}, {MODULE}{OF_TWO}": run(MUON, TWO, **module),
        MUON + OF_NAMES: run(MUON, NAMES),
        f"{MUON}, {MODULE}{OF_NAMES}": run(MUON, NAMES, **module),
        f"{MUON}, {PARALLEL}{OF_NAMES}": run(MUON, NAMES, **parallel),
    }


def measure(trained):
    """`formed`: the step at which half of what the order is worth is learnt, by the mean of some rows' training losses.

    The other half is as far from the bits of a model that looks back one token less, or knows no pair of a name. A run
    that never learns it has its own number of steps.
    """
    task = trained.task
    least = task.bits_without_pairs if isinstance(task, Names) else task.bits_of_order(task.order - 1)
    half = (least + task.best_bits) / 2 / BITS
    rows = [(row["step"], row["loss"]) for row in trained.metrics() if "loss" in row]
    means = np.convolve([loss for _, loss in rows], np.ones(WINDOW) / WINDOW, "valid")
    below = np.flatnonzero(means < half)
    formed = rows[below[0] + WINDOW - 1][0] if len(below) else trained.run.steps
    return {"formed": formed, "above": trained.numbers["val_loss"] * BITS - task.best_bits}


def log_formed(numbers):
    """Return ln of the step at which induction has formed."""
    return math.log(numbers["formed"])


def draw(results, path):
    figure = Figure(figsize=(11, 0.9 + 0.36 * len(results.variants)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for key, ax in (("formed", left), ("above", right)):
        for place, name in enumerate(results.variants):
            values = results.values(name, key)
            colour = "C1" if name.startswith(MUON) else "C0"
            ax.plot(values, [place] * len(values), "o", color=colour, alpha=0.45, markersize=5, markeredgewidth=0)
            ax.plot([values.mean()], [place], "|", color=colour, markersize=14, markeredgewidth=2)
    left.set_yticks(range(len(results.variants)), results.variants, fontsize=9)
    left.invert_yaxis()
    means = {name: results.values(name, "formed").mean() for name in results.variants}
    words = f"Induction forms after {means[MUON]:.0f} steps of Muon, {means[ADAMW]:.0f} of AdamW"
    drawing.style_axes(left, words, "step at which half of it is learnt", "")
    drawing.style_axes(right, "What is left at the end", "bits a token above the optimum", "")
    write_figure(figure, path)


def sooner(text, variant, against):
    return Claim(text, variant, against, log_formed, unit="ln steps", digits=2, stake="pairs")


STUDY = Study(
    script=__file__,
    question="When does induction form, and do multi-token heads or Muon bring it forward?",
    published="two-token prediction raises the induction of models up to 30M (arXiv 2404.19737, figure 7)",
    variants=variants,
    base="chains",
    measure=measure,
    columns=(
        Column("step at which half is learnt", "formed", 0),
        Column("bits above the optimum", "above", 3, paired=True, against=(MUON,)),
    ),
    draw=draw,
    claims=(
        *(sooner(f"Muon finds induction sooner than AdamW{size}", MUON + size, ADAMW + size) for size in FACTORS),
        sooner("with AdamW, a module brings it forward", f"{ADAMW}, {MODULE}", ADAMW),
        sooner("with AdamW, two parallel heads bring it forward", f"{ADAMW}, {PARALLEL}", ADAMW),
        sooner("with Muon, a module brings it forward", f"{MUON}, {MODULE}", MUON),
        sooner("with Muon, two parallel heads bring it forward", f"{MUON}, {PARALLEL}", MUON),
        sooner("with Muon, a module brings order 2 forward", f"{MUON}, {MODULE}{OF_TWO}", MUON + OF_TWO),
        sooner("with Muon, a module brings names forward", f"{MUON}, {MODULE}{OF_NAMES}", MUON + OF_NAMES),
        sooner("with Muon, two parallel heads bring names forward", f"{MUON}, {PARALLEL}{OF_NAMES}", MUON + OF_NAMES),
    ),
    stakes={
        "pairs": Stake(
            "counts of tokens alone",
            lambda results: TOKENS.bits_of_order(0) - results.values(MUON, unknown_bits),
            unknown_bits,
            "bits",
            2,
        )
    },
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
