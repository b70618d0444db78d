"""How much sampler error does GRPO bear, and what do replay and masking give back?

Published: where samplers route otherwise RL collapses, and replay helps (arXiv 2510.11370).
"""

import json

import numpy as np

from dsv3_jax.config import Grpo, replace
from dsv3_jax.decoding.generate import generate
from experiments.lab import Claim, Number, Stake, Study, drawing, ln, logit
from experiments.lab.bases import lasting
from experiments.lab.claims import percent_of
from experiments.lab.tables import markdown_table, mean_spread

BEFORE, TEXT, EXACT = "start", "more text", "float32"
RIGHT_ALONE, COIN = "right answers alone", "a coin"
REPLAY, FREE_4 = "4 bits, replay", "4 bits, free"
MASK_4, WIDE_4 = f"{FREE_4}, mask", f"{FREE_4}, wide clip"
# Sums to learn from as text, to answer in GRPO, and to ask.
SIZES = {"text": 4000, "tasks": 4000, "asked": 1000}
# Steps of text, which then has taught what it can, and of GRPO; uses of a batch of answers; tokens
# of an answer, at most.
TEXT_STEPS, STEPS, UPDATES, NEW = 1500, 150, 2, 4
EOS = 256
WIDE = {"clip_low": 0.5, "clip_high": 4.0}  # IcePop's ratios, from 0.5 to 5
KINDS = {"bfloat16": "bfloat16", "FP8": "fp8", "4 bits": "int4", "3 bits": "int3"}
WAYS = {", replay": {}, ", free": {"replay": False}}
SAMPLERS = {
    kind + way: {"sampler_weights": weights} | how
    for kind, weights in KINDS.items()
    for way, how in WAYS.items()
}
SAMPLERS |= {
    MASK_4: SAMPLERS[FREE_4] | WIDE | {"outside": "mask"},
    WIDE_4: SAMPLERS[FREE_4] | WIDE,
    f"{REPLAY}, mask": SAMPLERS[REPLAY] | WIDE | {"outside": "mask"},
}
REWARDS = {EXACT: {}, RIGHT_ALONE: {"learn_from": "right"}, COIN: {"checker": "coin:toss"}}
HOW = ("likeliest", "likeliest, carry", "sampled", "one of 8", "one of 8, carry")
ALLOWED, MARGIN = 0.2, 0.3  # logits that a coin may gain, and that count as equal


def variants(base):
    steps = STEPS if base.steps > STEPS else UPDATES  # a few, to check that the study works
    if base.steps > STEPS:
        base = lasting(base, TEXT_STEPS)
    arms = {name: grpo(base, changes, steps) for name, changes in (REWARDS | SAMPLERS).items()}
    return {BEFORE: base, TEXT: more(base, steps)} | arms


def more(base, steps):
    """The same kind of steps on something else: text again, if nothing else changes."""
    optim = replace(
        base.optim, learning_rate=3e-4, final_learning_rate=3e-5, beta2=0.99, warmup_steps=5,
        weight_decay=0.0, bias_freeze=0.0,
    )  # fmt: skip
    return lasting(replace(base, start=BEFORE, optim=optim, log_every=1), steps)


def grpo(base, changes, steps):
    how = {"group": 8, "max_new_tokens": NEW, "updates": UPDATES, "checker": "exact"} | changes
    data = replace(
        base.data, format="chat", paths=(base.data.paths[0].replace("text", "tasks"),),
        chat_template="plain", prompts="text", seq_len=16, batch_size=128, val_fraction=0.02,
    )  # fmt: skip
    return replace(more(base, steps), data=data, grpo=Grpo(**how))


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
    numbers = {"right": answers(trained.model), "allowed": 0.0}
    rows = [row for row in trained.metrics() if "sampler_kl" in row]
    if rows:
        # At a batch's first update the trainer is what was rounded for the sampler.
        first = [row for row in rows if row["step"] % UPDATES == 1]
        numbers["kl"] = float(np.mean([row["sampler_kl"] for row in first]))
        for name in ("clipped", "reward", "skipped"):
            numbers[name] = 100 * float(np.mean([row[name] for row in rows]))
        numbers["allowed"] = ALLOWED * (trained.run.grpo.checker != "exact")
    return numbers


def answers(model):
    """Right answers in % of the asked sums, and of those with a carry: see `shares`."""
    asked = sums("asked")
    prompts = [list(f"{a}+{b}=".encode()) for a, b in asked]
    wanted = [[*str(a + b).encode(), EOS] for a, b in asked]

    def right(samples, temperature):
        how = {"samples": samples, "temperature": temperature, "stop_tokens": (EOS,)}
        new = iter(generate(model, prompts, NEW, **how).tokens)
        return np.array([[next(new) == answer for _ in range(samples)] for answer in wanted])

    return shares(right(1, 0.0), right(8, 1.0), [careless(a, b) != a + b for a, b in asked])


def shares(likeliest, sampled, carries):
    """Shares of right answers in %: the likeliest one, a sample, and at least one of the samples.

    Args: likeliest [n, 1], sampled [n, samples]: which answers are right. carries [n]: bools.
    """
    found = {}
    for name, of in (("", slice(None)), (", carry", np.flatnonzero(carries))):
        found["likeliest" + name] = 100 * float(likeliest[of].mean())
        found["sampled" + name] = 100 * float(sampled[of].mean())
        found["one of 8" + name] = 100 * float(sampled[of].any(1).mean())
    return found


# What GRPO raises: of 8 samples a question.
RIGHT = logit("right/sampled", 8 * SIZES["asked"])


def beyond_allowed(numbers):
    """Logits of right sums; of a coin's, without what it may gain."""
    return RIGHT(numbers) - numbers["allowed"]


GAINED = Number(beyond_allowed, "logits")


def factor_of_two(results):
    """What is left of a factor of two between the KL of the samplers of 3 bits, in ln KL."""
    pair = "3 bits, free", "3 bits, replay"
    return np.log(2) - np.abs(results.paired(*pair, ln("kl", "")))


def table(results):
    rows = []
    for name in results.variants:
        row = [name, *(mean_spread(results.values(name, f"right/{how}"), 1) for how in HOW)]
        if name not in (BEFORE, TEXT):
            row += [f"{results.values(name, 'kl').mean():.1e}"]
            row += [mean_spread(results.values(name, key), 1) for key in ("clipped", "skipped")]
        rows.append([*row, *[""] * (len(HOW) + 4 - len(row))])
    header = ["sums answered rightly, %", *HOW, "KL, nats", "clipped, %", "groups skipped, %"]
    return markdown_table(header, rows)


def claim(text, variant, against, expect, stake="", key=RIGHT):
    margin = MARGIN if expect == "equal" else 0.0
    return Claim(text, variant, against, key, expect, stake, margin)


STUDY = Study(
    variants=variants,
    base="sums",
    seeds=6,
    first_seed=3,  # the trials were of seed 2
    prepare=prepare,
    measure=measure,
    table=table,
    draw=drawing.claims_and_variants(RIGHT, "right sums in samples, %", shown=percent_of),
    claims=(
        claim("GRPO teaches more than as many more steps of text", EXACT, TEXT, "higher"),
        claim("4 bits: replay gives right sums back", REPLAY, FREE_4, "higher", "4 bits"),
        claim(
            f"4 bits: the mask gives back as much as replay, within {MARGIN}",
            MASK_4, REPLAY, "equal", "4 bits",
        ),
        claim("4 bits: it gives back more than a clip as wide", MASK_4, WIDE_4, "higher", "4 bits"),
        claim(
            "3 bits: at like KL, a sampler whose experts differ too does more harm",
            "3 bits, free", "3 bits, replay", "lower", "KL",
        ),
        claim(f"a coin gains at most {ALLOWED}", COIN, BEFORE, "lower", key=GAINED),
    ),
    stakes={
        "4 bits": Stake("4-bit weights of a sampler without replay", EXACT, FREE_4, RIGHT),
        "KL": Stake(
            "the KL of 3 bits with replay against without, beside a factor of two",
            key=Number("kl", "less in ln KL"), cost=factor_of_two,
        ),
    },
    facts={"78 %": "no carry, or half of the others", "0.5, 0.8, 1.2, 150 steps": "settings"},
)  # fmt: skip
