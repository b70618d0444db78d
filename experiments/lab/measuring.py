"""Numbers that several studies measure."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.optimize import linear_sum_assignment

from dsv3_jax.config import ModelConfig, replace
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops import routing
from experiments.lab.results import Number, Results
from experiments.lab.tasks import Facts, Retrieval

BITS = 1 / math.log(2)  # bits of a nat


# Bits of an answer of a task that are still unknown.
unknown_bits = Number("val_loss", "bits", scale=BITS)


def late_mean(key: str) -> Callable[[Results, str], np.ndarray]:
    """Return a function (results, variant) → a curve's mean over training's last fifth, by seed."""

    def mean(results: Results, variant: str) -> np.ndarray:
        _, values = results.curve(variant, key)
        return values[:, -max(values.shape[1] // 5, 1) :].mean(1)

    return mean


WINDOW = 5  # rows of metrics.jsonl, whose mean is the training loss at a step


def first_below(trained: Any, bits: float) -> int:
    """Return the first step with a training loss below `bits` a token, or the run's last step.

    Args: trained: what a study's `measure` is given.
    """
    rows = [row for row in trained.metrics() if "loss" in row]
    first = steps_until(np.array([row["loss"] for row in rows]), bits / BITS)
    last = first + WINDOW - 2  # of the window's rows
    return rows[last]["step"] if last < len(rows) else trained.run.steps


def formed(trained: Any) -> int:
    """Return the step at which half of what pairs are worth is learnt, of a chain or of names.

    A run that never learns it has its own number of steps.
    """
    return first_below(trained, (trained.task.bits_without_pairs + trained.task.best_bits) / 2)


def induction(trained: Any) -> dict:
    """Measure when induction formed, and the bits above the optimum at the end."""
    above = unknown_bits(trained.numbers) - trained.task.best_bits
    return {"formed": formed(trained), "above": above}


def alike(model: Transformer) -> float:
    """Return how alike the routed experts are: 1 if all have the same hidden units.

    A hidden unit is its weights in w_gate, w_up and w_down. Units of two experts of a layer are
    matched one to one, so that the sum of their cosines is largest. The result is the mean cosine
    of matched units, over all pairs of experts and all layers.
    """
    experts = model.sparse.moe.experts
    ways = [np.asarray(w[...], np.float64) for w in (experts.w_gate, experts.w_up, experts.w_down)]
    units = np.concatenate([ways[0].swapaxes(2, 3), ways[1].swapaxes(2, 3), ways[2]], axis=-1)
    units /= np.linalg.norm(units, axis=-1, keepdims=True)  # [L, E, F, 3 D]
    found = []
    for layer in units:
        for one, other in combinations(layer, 2):
            cosines = one @ other.T
            found.append(cosines[linear_sum_assignment(cosines, maximize=True)].mean())
    return float(np.mean(found))


def steps_until(values: np.ndarray, bound: float, window: int = WINDOW) -> int:
    """Return the first step, from 1, from which `window` values are at most `bound` in their mean.

    If there is none, return the number of values.

    >>> steps_until(np.array([3.0, 2.0, 1.0, 1.0, 1.0]), bound=1.5, window=2)
    2
    """
    if len(values) < window:
        return len(values)
    means = np.convolve(values, np.ones(window) / window, "valid")
    below = np.flatnonzero(means <= bound)
    return int(below[0]) + 1 if len(below) else len(values)


def overflow(load: np.ndarray, factor: float) -> np.ndarray:
    """Return the share of assignments that experts with a capacity would drop, [...].

    Args:
        load: assignments of a step by expert, [..., E].
        factor: capacity of an expert, over its even share.

    >>> overflow(np.array([[6, 2, 2, 2], [3, 3, 3, 3]]), factor=1.25).round(3).tolist()
    [0.167, 0.0]
    """
    total = load.sum(-1, keepdims=True)
    capacity = np.ceil(factor * total / load.shape[-1])
    return np.maximum(load - capacity, 0).sum(-1) / total[..., 0]


def asked_load(trained: Any) -> np.ndarray:
    """Return the load of the tokens before each answer, by domain, [domains, E].

    It is that of held-out rows, in the first sparse layer, for one expert a token.

    Args: trained: what a study's `measure` is given; its task has domains.
    """
    counts = np.zeros((trained.task.count, trained.run.model.num_experts))
    for batch in trained.held_out():
        asked = batch["loss_mask"][:, 1:]
        chosen = expert_ids(trained.model, batch)[0, :, :-1, 0]
        np.add.at(counts, (batch["domains"][:, :-1][asked], chosen[asked]), 1)
    return counts


def compiled(function: Callable) -> Callable:
    """Compile a function of a model and of arrays."""

    @partial(jax.jit, static_argnums=0)
    def of_parts(graphdef, state, *arrays):
        return function(nnx.merge(graphdef, state), *arrays)

    return lambda model, *arrays: of_parts(*nnx.split(model), *arrays)


def expert_ids(model: Transformer, batch: Mapping[str, Any]) -> np.ndarray:
    """Return the experts of each token, int32 [L, B, T, K] of the sparse layers."""
    rows = (batch[name] for name in ("tokens", "segment_ids", "positions"))
    return np.asarray(_expert_ids(model, *rows))


@compiled
def _expert_ids(model, tokens, segment_ids, positions):
    return model.forward_hidden(tokens, segment_ids, positions).routing.expert_ids


def fact_rows() -> np.ndarray:
    """Return a row of each fact of the task of facts, int32 [facts, 3]."""
    task = Facts()
    return task.held_out(task.firsts * task.seconds).tokens


def fact_bits(model: Transformer) -> np.ndarray:
    """Return the bits of each of `fact_rows` that a model does not know, float64 [facts]."""

    # Compiled for each call: routing may be replaced by another one, as by `skip_top`.
    @compiled
    def bits(model, rows):
        log_p = jax.nn.log_softmax(model(rows).logits[:, 1])
        return -BITS * jnp.take_along_axis(log_p, rows[:, 2:], axis=-1)[:, 0]

    return np.asarray(bits(model, jnp.asarray(fact_rows())), np.float64)


DEPTHS = (1 / 8, 3 / 8, 5 / 8, 7 / 8)  # distances of keys, in rows
QUESTIONS = 64  # for each distance


def keys_found(model: Transformer, task: Retrieval, length: int) -> list[float]:
    """Return the share of keys that a model finds in rows of `length`, by DEPTHS."""
    found = []
    for depth in DEPTHS:
        rows = task.questions(length, max(round(depth * length), 2), QUESTIONS).tokens
        parts = np.split(rows, 4)  # long rows need much memory
        chosen = np.concatenate([_last_choice(model, part) for part in parts])
        found.append(float((chosen == rows[:, -1]).mean()))
    return found


@compiled
def _last_choice(model, tokens):
    return (model.forward_hidden(tokens).h[:, -2] @ model.head_matrix()).argmax(-1)


def skip_top(model: Transformer, off: int) -> Transformer:
    """Return the model with routers that skip the `off` experts with a token's highest scores.

    A token goes to the K experts after these.

    Source: DeepSeekMoE (arXiv 2401.06066), section 4.5, which masks the top routed experts.
    """
    model = nnx.clone(model)
    moe = model.sparse.moe
    whole = moe.router

    def route(x: routing.Inputs, cfg: ModelConfig) -> routing.Routing:
        wider = replace(cfg, experts_per_token=cfg.experts_per_token + off, normalize_gates=False)
        picked = whole.route(x, wider)
        gates = picked.gates[:, off:]
        if cfg.normalize_gates:
            gates = gates / (gates.sum(-1, keepdims=True) + 1e-20) * cfg.routed_scale
        return routing.Routing(picked.expert_ids[:, off:], gates, picked.scores)

    moe.router = whole._replace(route=route)
    return model
