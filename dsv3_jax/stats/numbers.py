"""The numbers of `dsv3 stats` as plain JSON: see `KEYS`.

Tables that grow with the model are cut here.
"""

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsv3_jax.data.byte_tokenizer import Tokenizer
from dsv3_jax.ops import balance
from dsv3_jax.stats import flow
from dsv3_jax.stats.bits import NAMES, Measured, information
from dsv3_jax.stats.knockouts import Worth
from dsv3_jax.stats.measures import (
    Favourite,
    Specialisation,
    domain_entropy,
    favourites,
    lift,
)
from dsv3_jax.stats.reading import LoadLog
from dsv3_jax.stats.routing_stats import RoutingStats
from dsv3_jax.stats.tables import as_lists, budget, evenly, rounded
from dsv3_jax.stats.texts import texts
from dsv3_jax.stats.token_rows import TokenRows, context, find_contexts, readable

MIN_COUNT = 20  # rarer tokens and pairs have a lift that is mostly chance
CONTEXTS, FAVOURITES, PARTNERS = 8, 12, 6  # for each expert, at most
PAIRS = 64  # of two layers
DOMAINS = 24  # on the page; stats.json has all of them
HISTORY = 60  # steps of the bias
# Most entries of a table, all layers together, so that the page of V3's 59 × 256 experts stays
# below 5 MB.
MOST_PAIRS, MOST_FAVOURITES, MOST_PARTNERS = 150_000, 30_000, 45_000
MOST_CONTEXTS, MOST_LETTERS = 6_000, 450_000
MOST_LOADS, MOST_HISTORY, MOST_CURVES = 120_000, 60_000, 30_000

# Keys that need more than the counts.
_MORE = ("header", "information", "worth", "saturation", "groups", "devices", "against")

# The meaning of each key of stats.json, which holds this table too, under "keys".
KEYS: dict[str, str] = json.loads((Path(__file__).parent / "keys.json").read_text(encoding="utf-8"))


def merge_small_domains(stats: RoutingStats) -> RoutingStats:
    """Keep the domains with the most tokens, and join the others, for pictures and the page.

    Example:
        >>> names = [f"site {i}" for i in range(100)]
        >>> stats = RoutingStats.from_loads(np.ones((100, 1, 2), np.int64), np.arange(100), names)
        >>> merge_small_domains(stats).domains[-2:]
        ('site 22', '77 other domains')
    """
    most = max(4, budget(MOST_LOADS, stats.load.size, DOMAINS))
    if len(stats.domains) <= most:
        return stats

    # Domains that stay keep their order; all others become the one after them.
    by_size = np.argsort(-stats.load_by_domain.sum((1, 2)), kind="stable")
    kept = np.sort(by_size[: most - 1])
    number = np.full(len(stats.domains), len(kept))
    number[kept] = np.arange(len(kept))

    # Text from anywhere may have a domain of that name.
    rest = f"{len(stats.domains) - len(kept)} other domains"
    names = tuple(stats.domains[i] for i in kept)
    while rest in names:
        rest += "…"
    return dataclasses.replace(
        stats, domains=(*names, rest), document_domains=number[stats.document_domains]
    )


def as_json(
    stats: RoutingStats,
    special: Specialisation,
    tokenizer: Tokenizer,
    log: LoadLog | None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the numbers of stats.json, see `KEYS`; NaN becomes None.

    Args: more: keys that need more than the counts: header, information, worth, saturation,
        against, … They are None where they are absent.

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> from dsv3_jax.stats.measures import specialisation
        >>> loads = np.array([[[3, 1]], [[0, 4]]])
        >>> stats = RoutingStats.from_loads(loads, np.array([0, 1]), ["code", "prose"])
        >>> numbers = as_json(stats, specialisation(stats, draws=1), ByteTokenizer(), None)
        >>> numbers["load"], numbers["max_vio"]
        ([[3, 5]], [0.25])
    """
    load = jnp.asarray(stats.load, jnp.float32)
    return {
        # The model, and how even its load is.
        "layers": list(stats.layers),
        "experts": stats.load.shape[1],
        "experts_per_token": stats.experts_per_token,
        "tokens": stats.tokens.tolist(),
        "load": stats.load.tolist(),
        "max_vio": as_lists(balance.max_vio(load)),
        "load_entropy": as_lists(balance.entropy(load)),
        "load_gini": as_lists(balance.gini(load)),
        "gate_entropy": as_lists(stats.gate_entropy),
        "score_entropy": as_lists(stats.score_entropy),
        # What experts are for: with whom they are chosen, for which domains, tokens and texts.
        **by_domain(stats),
        **_coactivation(stats),
        "specialisation": _specialisation(stats, special),
        "favourites": _favourites(stats, tokenizer),
        "contexts": _contexts(stats, tokenizer),
        # How choices came about, and how one leads to the next.
        "over_time": None if log is None else _over_time(log),
        "bias": _bias(stats, log),
        **_flow(stats),
        "texts": texts(stats.rows, stats.domains, tokenizer),
        **dict.fromkeys(_MORE),
    } | dict(more or {})


def by_domain(stats: RoutingStats) -> dict[str, Any]:
    """Return the keys that depend on how the documents are divided into domains.

    Example:
        >>> loads = np.array([[[3, 1]], [[0, 4]]])
        >>> stats = RoutingStats.from_loads(loads, np.array([0, 1]), ["code", "prose"])
        >>> by_domain(stats)["documents"]
        {'code': 1, 'prose': 1}
    """
    names, loads = stats.domains, stats.load_by_domain
    gates = stats.mean_by_domain(stats.document_gate_entropy)
    scores = stats.mean_by_domain(stats.document_score_entropy)
    documents = np.bincount(stats.document_domains, minlength=len(names))

    def named(values: Any) -> dict[str, Any]:
        return dict(zip(names, values, strict=True))

    return {
        "domains": list(names),
        "documents": named(documents.tolist()),
        "load_by_domain": named(loads.tolist()),
        "max_vio_by_domain": named(as_lists(_max_vio(loads))),
        "gate_entropy_by_domain": named(as_lists(gates)),
        "score_entropy_by_domain": named(as_lists(scores)),
    }


def _specialisation(stats: RoutingStats, special: Specialisation) -> dict[str, Any]:
    found: dict[str, Any] = {"domain_entropy": as_lists(domain_entropy(stats.load_by_domain))}
    for name, value in special._asdict().items():
        found[name] = value if isinstance(value, int) else as_lists(value)
    return found


def _max_vio(load: np.ndarray) -> np.ndarray:
    return np.asarray(balance.max_vio(jnp.asarray(load, jnp.float32)))


def _coactivation(stats: RoutingStats) -> dict[str, Any]:
    """All pairs of experts, or of a large model each expert's partners alone."""
    lifts_LEE = lift(stats.coactivation)

    # An expert's best partners; a lift that is unknown comes last, and is then left out.
    known_LEE = np.where(np.isnan(lifts_LEE), -np.inf, lifts_LEE)
    most = budget(MOST_PARTNERS, stats.load.size, PARTNERS)
    best_LEP = np.argsort(-known_LEE, axis=-1, kind="stable")[..., :most]
    partners = [
        [_partners(*of_expert) for of_expert in zip(*of_layer, strict=True)]
        for of_layer in zip(lifts_LEE, best_LEP, strict=True)
    ]

    small = stats.coactivation.size <= MOST_PAIRS
    return {
        "coactivation": stats.coactivation.tolist() if small else None,
        "coactivation_lift": as_lists(lifts_LEE) if small else None,
        "partners": partners,
    }


def _partners(lifts: np.ndarray, best: np.ndarray) -> list[list]:
    """List [expert, lift] of the best partners of one expert."""
    return [[int(i), round(lifts[i].item(), 2)] for i in best if np.isfinite(lifts[i])]


def _favourites(stats: RoutingStats, tokenizer: Tokenizer) -> list[list[list[list]]]:
    top = budget(MOST_FAVOURITES, stats.load.size, FAVOURITES)

    @cache
    def shown(token: int) -> str:
        return readable(tokenizer, [token]).replace(" ", "␣")

    def listed(favourite: Favourite) -> list:
        token, count, ratio, bits, margin = favourite
        ratio, margin = round(ratio, 4), round(margin, 4)
        return [token, shown(token), count, ratio, rounded(bits), rounded(margin)]

    return [
        [
            [listed(favourite) for favourite in of_expert]
            for of_expert in favourites(stats, layer, top=top, min_count=MIN_COUNT)
        ]
        for layer in range(len(stats.layers))
    ]


def _contexts(stats: RoutingStats, tokenizer: Tokenizer) -> list[list[list[list]]]:
    """List the contexts of each expert, the largest gate first; of many experts, shorter ones."""
    # Fewer contexts and letters of each where there are many experts.
    top = budget(MOST_CONTEXTS, stats.load.size, CONTEXTS)
    letters = MOST_LETTERS // (3 * top * stats.load.size) + 1
    listed: list[list[list[list]]] = [[[] for _ in of_layer] for of_layer in stats.load]

    found = find_contexts(stats.rows, stats.load.shape[1], top=top)
    for layer, expert, gate, window, margin, document in zip(*found, strict=True):
        # What precedes a token matters most, so it has most of the letters.
        before, token, after = context(tokenizer, window)
        entry = [
            before[-2 * letters :],
            token[: 2 * letters],
            after[:letters],
            round(float(gate), 4),
            rounded(round(float(margin), 4)),
            int(document),
        ]
        listed[layer][expert].append(entry)
    return listed


def _over_time(log: LoadLog) -> dict[str, Any]:
    picked = evenly(len(log.steps), MOST_CURVES // log.load.shape[1])
    return {"steps": log.steps[picked].tolist(), "max_vio": as_lists(_max_vio(log.load[picked]))}


def _bias(stats: RoutingStats, log: LoadLog | None) -> dict[str, Any] | None:
    """The bias, its history at up to HISTORY steps, and what it changes."""
    if stats.bias is None:
        return None
    value, without, changed = stats.bias

    # A run may have no log, or one without biases.
    history = None
    if log is not None and log.bias is not None:
        picked = evenly(len(log.steps), budget(MOST_HISTORY, value.size, HISTORY))
        history = {"steps": log.steps[picked].tolist(), "value": as_lists(log.bias[picked])}
    return {
        "value": as_lists(value),
        "history": history,
        "changed_choices": as_lists(changed / np.maximum(stats.load.sum(-1), 1)),
        "max_vio": as_lists(_max_vio(stats.load)),
        "max_vio_without": as_lists(_max_vio(without)),
        "load_without": without.tolist(),
    }


def _flow(stats: RoutingStats) -> dict[str, Any]:
    """transitions, repeats and heads."""
    rows = stats.rows
    num_experts = stats.load.shape[1]

    # From a layer to the next: none in a model of one layer.
    pairs = flow.transitions(rows, num_experts)
    lifts = flow.transition_lift(pairs)
    transitions = None
    if len(pairs):
        top = [_largest_pairs(*of_layer) for of_layer in zip(pairs, lifts, strict=True)]
        small = lifts.size <= MOST_PAIRS
        transitions = {"lift": as_lists(lifts) if small else None, "top": top}

    # From the trunk's last layer to the heads.
    names = [name for name in stats.layers if name.startswith("MTP")]
    against = flow.heads_against_trunk(rows, num_experts, len(names))
    heads = None if against is None else {"layers": names} | _listed(against)

    # From a token to the next.
    repeats = _listed(flow.repeats(rows, num_experts))
    return {"transitions": transitions, "repeats": repeats, "heads": heads}


def _listed(found: Any) -> dict[str, Any]:
    """Return the fields of a NamedTuple of arrays, as lists."""
    return {name: as_lists(values) for name, values in found._asdict().items()}


def _largest_pairs(pairs: np.ndarray, lifts: np.ndarray) -> list[list]:
    """The PAIRS with the largest lift of those that occur often enough: [from, to, lift]."""
    often = np.where(pairs >= MIN_COUNT, np.nan_to_num(lifts), 0.0)
    best = np.argsort(-often, axis=None, kind="stable")[:PAIRS]
    return [
        [*divmod(int(i), len(pairs)), round(float(often.flat[i]), 2)]
        for i in best
        if often.flat[i] > 0
    ]


def information_json(
    rows: TokenRows, num_experts: int, num_domains: int, seed: int = 0
) -> dict[str, Any]:
    """Measure "information" of `KEYS`; `seed`: of its shuffles and resamples."""
    found = information(rows, num_experts, num_domains, seed=seed)
    numbers: dict[str, Any] = {}
    for name in NAMES:
        measured: Measured = getattr(found, name)
        numbers |= {name: as_lists(measured.bits), f"{name}_chance": as_lists(measured.chance)}
        numbers |= {f"{name}_low": as_lists(measured.low), f"{name}_high": as_lists(measured.high)}
    return numbers | {
        "entropy": as_lists(found.entropy),
        **{key: getattr(found, key) for key in ("tokens", "documents", "draws", "resamples")},
    }


def worth_json(found: Worth, num_layers: int) -> dict[str, Any]:
    """Write "worth" of `KEYS`; multi-token heads, the last of `num_layers`, have no numbers."""
    # Only the trunk's experts were left out, one by one.
    num_experts = found.without.shape[1]
    heads = [[None] * num_experts for _ in range(num_layers - len(found.without))]
    tables = {
        name: [*as_lists(getattr(found, name)), *heads] for name in ("without", "low", "high")
    }
    counts = {key: getattr(found, key) for key in ("tokens", "documents", "resamples")}
    return {"loss": as_lists(found.loss)} | tables | counts
