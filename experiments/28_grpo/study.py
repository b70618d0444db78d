"""GRPO on sums of two numbers: what it gains, what replay is worth, what it does to the router."""

import json
from functools import partial

import jax
import numpy as np
from flax import nnx

from dsv3_jax.config import Grpo, replace
from dsv3_jax.decoding.generate import generate
from dsv3_jax.ops import balance
from dsv3_jax.runs.checkpoint import load_run
from experiments.lab import (
    FollowUp,
    Study,
    drawing,
    format_number,
    markdown_table,
    mean_spread,
)
from experiments.lab.claims import Claim, Stake, logit, percent_of
from experiments.lab.results import lookup

BEFORE = "before"
# Name → what is not float32 of a run.
KINDS = {"float32": {}, "int8 cache": {"cache_dtype": "int8"}}
# Sums to learn from as text, to answer in GRPO, and to ask.
SIZES = {"text": 4000, "tasks": 4000, "asked": 1000}
STEPS, NEW = 150, 4  # of GRPO; tokens of an answer, at most
EOS = 256
HOW = ("likeliest", "likeliest, carry", "sampled", "sampled, carry")
CARRIES = 444  # questions with a carry


def name_of(kind, replay):
    return f"{kind}, {'replay' if replay else 'free'}"


def variants(base):
    steps = STEPS if base.steps > STEPS else 2  # a few, to check that the study works
    pairs = [(kind, replay) for kind in KINDS for replay in (True, False)]
    return {BEFORE: base} | {
        name_of(*pair): FollowUp((BEFORE,), partial(grpo, base, *pair, steps)) for pair in pairs
    }


def grpo(base, kind, replay, steps, start):
    how = Grpo(group=8, max_new_tokens=NEW, checker="exact", replay=replay, **KINDS[kind])
    data = replace(
        base.data, format="chat", paths=(base.data.paths[0].replace("text", "tasks"),),
        chat_template="plain", prompts="text", seq_len=16, batch_size=128, val_fraction=0.02,
    )  # fmt: skip
    optim = replace(
        base.optim, learning_rate=3e-4, final_learning_rate=3e-5, beta2=0.99, warmup_steps=5,
        weight_decay=0.0, bias_freeze=0.0,
    )  # fmt: skip
    return replace(
        base, start=start, data=data, optim=optim, grpo=how, steps=steps, eval_every=steps,
        save_every=50, log_every=1,
    )  # fmt: skip


def sums(part):
    """Pairs of numbers below 100 for one use, in an order that all runs share: uses share none."""
    order, first = np.random.default_rng(28).permutation(100 * 100), 0
    for name, size in SIZES.items():
        if name == part:
            return [divmod(int(i), 100) for i in order[first : first + size]]
        first += size


def careless(a, b):
    """The sum of two numbers by someone who forgets to carry."""
    return a + b - (10 if a % 10 + b % 10 > 9 else 0)


def prepare(base, root):
    folder = (root / base.data.paths[0]).parent
    folder.mkdir(parents=True, exist_ok=True)
    text = [
        {"text": f"{a}+{b}={add(a, b)}"} for a, b in sums("text") for add in (int.__add__, careless)
    ]
    tasks = [
        {"text": f"{a}+{b}={a + b}", "prompt": f"{a}+{b}=", "answer": str(a + b)}
        for a, b in sums("tasks")
    ]
    for name, rows in (("text", text), ("tasks", tasks)):
        path, lines = folder / f"{name}.jsonl", "\n".join(map(json.dumps, rows)) + "\n"
        if not path.exists() or path.read_text() != lines:
            path.write_text(lines)


def measure(trained):
    model, (max_vio, ids) = trained.model, routed(trained.model)
    numbers = {
        "right": {how: 100 * rate for how, rate in accuracy(model).items()},
        "max_vio": max_vio,
    }
    if BEFORE in trained.needed_folders:
        _, before = routed(load_run(trained.needed_folders[BEFORE]).model)
        kept = (before[..., None] == ids[..., None, :]).any(-1)
        numbers["changed"] = 100 - 100 * float(kept.mean())
        rows = [row for row in trained.metrics() if "mismatch" in row]
        for name in ("mismatch", "max_mismatch", "clipped", "skipped", "reward"):
            numbers[name] = float(np.mean([row[name] for row in rows]))
    return numbers


def accuracy(model):
    """Shares of right answers, of all and with a carry: of the likeliest tokens, and sampled."""
    pairs, found = sums("asked"), {}
    carries = np.array([careless(a, b) != a + b for a, b in pairs])
    prompts = [list(f"{a}+{b}=".encode()) for a, b in pairs]
    for how, temperature in (("likeliest", 0.0), ("sampled", 1.0)):
        made = generate(model, prompts, NEW, temperature=temperature, stop_tokens=(EOS,)).tokens
        right = np.array(
            [new == [*str(a + b).encode(), EOS] for new, (a, b) in zip(made, pairs, strict=True)]
        )
        found |= {how: float(right.mean()), f"{how}, carry": float(right[carries].mean())}
    return found


def routed(model):
    """(MaxVio, mean over layers; experts [L, n, K]) of the questions with their right answers."""
    texts = [f"{a}+{b}={a + b}".encode() for a, b in sums("asked")]
    tokens, mask = np.zeros((2, len(texts), max(map(len, texts))), np.int32)
    for i, text in enumerate(texts):
        tokens[i, : len(text)], mask[i, : len(text)] = list(text), 1
    graph, state = nnx.split(model)
    route = jax.jit(lambda state: nnx.merge(graph, state)(tokens, mask).routing)
    found = jax.device_get(route(state))
    return float(np.mean(balance.max_vio(found.load))), found.expert_ids[:, mask == 1]


def table(results):
    header = ["sums answered rightly, %", *HOW, "MaxVio", "choices changed, %"]
    header += ["mismatch, nats", "largest in a step", "clipped, %", "groups skipped, %"]
    rows = []
    for name in results.variants:
        row = [name, *(mean_spread(results.values(name, f"right/{how}"), 1) for how in HOW)]
        row.append(mean_spread(results.values(name, "max_vio"), 2))
        if name == BEFORE:
            rows.append([*row, "", "", "", "", ""])
            continue
        small = (f"{results.values(name, key).mean():.1e}" for key in ("mismatch", "max_mismatch"))
        clipped, skipped = (
            mean_spread(100 * results.values(name, key), n)
            for key, n in (("clipped", 3), ("skipped", 0))
        )
        rows.append(
            [*row, mean_spread(results.values(name, "changed"), 1), *small, clipped, skipped]
        )
    return f"{markdown_table(header, rows)}\n\n{by_seed(results)}"


def by_seed(results):
    """Each seed's right answers before and after, as their starts differ the most."""
    rows = []
    for seed in results.common_seeds(FIRST, BEFORE):
        row = [seed]
        for key in ("right/likeliest", CARRY):
            before, after = (
                lookup(results.runs[name][seed]["numbers"], key) for name in (BEFORE, FIRST)
            )
            row += [f"{before:.1f}", f"{after:.1f}", format_number(after - before, 1, sign=True)]
        rows.append(row)
    header = ["seed", "all sums: before, %", "after, %", "difference"]
    return markdown_table([*header, "with a carry: before, %", "after, %", "difference"], rows)


def words(results):
    gain = results.difference(FIRST, BEFORE, "right/likeliest")
    return f"GRPO: {format_number(gain, 0, sign=True)} points of right sums"


def gain(text, key, questions):
    return Claim(text, FIRST, BEFORE, logit(key, questions), "higher", unit="logits", digits=2)


def log_mismatch(numbers):
    """Its noise is alike in all kinds, whose mismatches differ by orders of magnitude."""
    return float(np.log10(numbers["mismatch"]))


def replay_claims(kind):
    replay, free = name_of(kind, True), name_of(kind, False)
    return (
        Claim(
            f"{kind}: with replay as many are right as without, within 5 points",
            replay,
            free,
            "right/likeliest",
            "equal",
            margin=5.0,
            unit="points",
            digits=1,
            stake="gain",
            questions=SIZES["asked"],
        ),
        Claim(
            f"{kind}: replay lowers the mismatch",
            replay,
            free,
            log_mismatch,
            "lower",
            0.0,
            "powers of ten",
            2,
        ),
    )


FIRST, CARRY = name_of("float32", True), "right/likeliest, carry"
STUDY = Study(
    question=(
        "Does GRPO teach a small mixture to add, "
        "what is replay worth to it, and does it move the router?"
    ),
    published=(
        "RL of large mixtures collapses where the engine that samples routes otherwise "
        "(R3, arXiv 2510.11370)"
    ),
    variants=variants,
    base="sums",
    prepare=prepare,
    measure=measure,
    table=table,
    draw=drawing.claims_and_variants(
        logit("right/likeliest", SIZES["asked"]),
        "right sums, likeliest answer, %",
        words,
        shown=percent_of,
    ),
    claims=(
        gain("more sums are right after GRPO than before", "right/likeliest", SIZES["asked"]),
        gain("more sums with a carry are right after GRPO than before", CARRY, CARRIES),
        *(claim for kind in KINDS for claim in replay_claims(kind)),
        Claim(
            "GRPO leaves MaxVio as it was, within 0.2",
            FIRST,
            BEFORE,
            "max_vio",
            "equal",
            0.2,
            "",
            2,
        ),
    ),
    stakes={
        "gain": Stake(
            "no GRPO at all, of sums with a carry",
            lambda results: results.paired(FIRST, BEFORE, logit(CARRY, CARRIES)),
            "logits",
            2,
        )
    },
    facts={
        "1e-4": "a weight",
        "600 steps": "a setting",
        "92 %, 34 %": "measured once on seed 0 trained again, see README.md",
    },
)
