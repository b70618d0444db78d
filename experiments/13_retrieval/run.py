"""YaRN on one-hop retrieval: a model trained at L answers questions up to 16L away. L is the base's row length."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`

from functools import partial

import jax
import numpy as np
from flax import nnx

from dsv3_jax.config import Yarn, replace
from dsv3_jax.model.transformer import Transformer
from experiments.lab import FollowUp, OnTask, Study
from experiments.lab.tasks import Retrieval

FACTOR = 16
CONTEXTS = (1, 2, 4, 8, 16)  # lengths of rows, in units of L
DEPTHS = (1 / 8, 3 / 8, 5 / 8, 7 / 8)  # distance of the key, in units of the row
ROWS = 64  # questions for each length and depth
BATCH_TOKENS = 16384


def variants(base):
    length, lr = base.data.seq_len, base.optim.learning_rate / 3
    model = replace(base.model, max_positions=FACTOR * length, yarn=Yarn())
    extended = replace(model, yarn=yarn_of(length))
    short = replace(base, model=model)
    # A tenth more steps, with as many tokens each.
    long_rows = replace(base.data, seq_len=FACTOR * length, batch_size=max(base.data.batch_size // FACTOR, 1))
    optim = replace(base.optim, learning_rate=lr, final_learning_rate=min(lr, base.optim.final_learning_rate))
    more = replace(short, data=long_rows, steps=max(base.steps // 10, 2), optim=replace(optim, warmup_steps=2))
    long = Retrieval(tokens=FACTOR * length)
    return {
        "L": OnTask(Retrieval(tokens=length), short),
        "L, then 16L": FollowUp(("L",), lambda folder: OnTask(long, replace(more, start=folder))),
        "L, then 16L with YaRN": FollowUp(
            ("L",), lambda folder: OnTask(long, replace(more, model=extended, start=folder))
        ),
        "16L": OnTask(long, replace(short, data=long_rows, steps=short.steps + more.steps)),
    }


def yarn_of(length):
    return Yarn(factor=float(FACTOR), original_max_positions=length)


def measure(trained):
    """Measure the retrieved share [lengths][depths]: own, and of the model trained at L by YaRN without more steps."""
    length = trained.run.model.max_positions // FACTOR
    numbers = {"length": length, "own": retrieved(trained.model, trained.task, length)}
    if trained.run.data.seq_len == length:
        cfg = replace(trained.run.model, yarn=yarn_of(length))
        model = Transformer(cfg, trained.run.execution, rngs=nnx.Rngs(0))
        nnx.update(model, nnx.state(trained.model))
        numbers["yarn"] = retrieved(model, trained.task, length)
    return numbers


def retrieved(model, task, length):
    """Return the share of right answers by length of the row and depth of the key, as lists."""
    return [
        [share(model, task.questions(c * length, max(round(d * c * length), 2), ROWS).tokens) for d in DEPTHS]
        for c in CONTEXTS
    ]


def share(model, tokens):
    graphdef, state = nnx.split(model)
    size = max(BATCH_TOKENS // tokens.shape[1], 1)
    best = [last_choice(graphdef, state, tokens[i : i + size]) for i in range(0, len(tokens), size)]
    return float((np.concatenate(best) == tokens[:, -1]).mean())


@partial(jax.jit, static_argnames="graphdef")
def last_choice(graphdef, state, tokens):
    """Return the likeliest last token of each row."""
    model = nnx.merge(graphdef, state)
    return (model.forward_hidden(tokens).h[:, -2] @ model.head_matrix()).argmax(-1)


STUDY = Study(
    script=__file__,
    question="Does YaRN let a model find keys at up to 16 times its training length?",
    published="4K → 128K in two short phases, every needle found (V3 report, figure 8); 99 % of passkeys (YaRN)",
    variants=variants,
    base="retrieval",
    measure=measure,
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
