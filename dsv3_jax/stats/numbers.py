"""The numbers of `dsv3 stats` as plain JSON: see `KEYS`.

Tables that grow with the model are cut here.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig, RunConfig, replace
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.model.counting import size
from dsv3_jax.ops import balance, routing
from dsv3_jax.presets import MODELS
from dsv3_jax.runs.evaluate import training_mix
from dsv3_jax.runs.folder import RUN_FILE, read_made
from dsv3_jax.stats import flow
from dsv3_jax.stats.bits import NAMES, Measured, information
from dsv3_jax.stats.knockouts import Worth
from dsv3_jax.stats.measures import Specialisation, domain_entropy, favourites, lift
from dsv3_jax.stats.reading import LoadLog
from dsv3_jax.stats.routing_stats import RoutingStats
from dsv3_jax.stats.token_rows import TokenRows, context, find_contexts, readable

MIN_COUNT = 20  # rarer tokens and pairs have a lift that is mostly chance
CONTEXTS, FAVOURITES, PARTNERS = 8, 12, 6  # for each expert, at most
PAIRS = 64  # of two layers
DOMAINS = 24  # on the page; stats.json has all of them
TEXTS, TEXT_TOKENS = 12, 512  # complete texts, and tokens of each, at most
HISTORY = 60  # steps of the bias
# Most entries of a table, all layers together, so that the page of V3's 59 × 256 experts stays
# below 5 MB.
MOST_PAIRS, MOST_FAVOURITES, MOST_PARTNERS = 150_000, 30_000, 45_000
MOST_CONTEXTS, MOST_LETTERS = 6_000, 450_000
MOST_LOADS, MOST_HISTORY, MOST_CHOICES, MOST_CURVES = 120_000, 60_000, 60_000, 30_000

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
    most = max(4, _budget(MOST_LOADS, stats.load.size, DOMAINS))
    if len(stats.domains) <= most:
        return stats
    by_size = np.argsort(-stats.load_by_domain.sum((1, 2)), kind="stable")
    kept = np.sort(by_size[: most - 1])
    number = np.full(len(stats.domains), len(kept))
    number[kept] = np.arange(len(kept))
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
        **by_domain(stats),
        **_coactivation(stats),
        "specialisation": {
            "domain_entropy": as_lists(domain_entropy(stats.load_by_domain)),
            **{
                name: x if isinstance(x, int) else as_lists(x)
                for name, x in special._asdict().items()
            },
        },
        "favourites": _favourites(stats, tokenizer),
        "contexts": _contexts(stats, tokenizer),
        "over_time": None if log is None else _over_time(log),
        "bias": _bias(stats, log),
        **_flow(stats),
        "texts": texts(stats.rows, stats.domains, tokenizer),
        **dict.fromkeys(
            ("header", "information", "worth", "saturation", "groups", "devices", "against")
        ),
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


def as_lists(values: Any) -> Any:
    """Convert to nested lists of numbers with six significant digits; NaN and infinity become None.

    Example:
        >>> as_lists([[1 / 3, float("nan")]])
        [[0.333333, None]]
    """
    values = np.asarray(values, np.float64)
    if values.ndim > 1:
        return [as_lists(part) for part in values]
    listed = [_rounded(x) for x in values.ravel().tolist()]
    return listed if values.ndim else listed[0]


def _rounded(x: float) -> float | None:
    return float(f"{x:.6g}") if math.isfinite(x) else None


def _max_vio(load: np.ndarray) -> np.ndarray:
    return np.asarray(balance.max_vio(jnp.asarray(load, jnp.float32)))


def _budget(most: int, of_all: int, each: int) -> int:
    """How many of `each` entries fit if there are `of_all` lists; at least 1."""
    return max(1, min(each, most // max(of_all, 1)))


def _coactivation(stats: RoutingStats) -> dict[str, Any]:
    """All pairs of experts, or of a large model each expert's partners alone."""
    small = stats.coactivation.size <= MOST_PAIRS
    lifts = lift(stats.coactivation)
    known = np.where(np.isnan(lifts), -np.inf, lifts)
    most = _budget(MOST_PARTNERS, stats.load.size, PARTNERS)
    order = np.argsort(-known, axis=-1, kind="stable")[..., :most]
    partners = [
        [
            [[int(f), round(row[f].item(), 2)] for f in best if np.isfinite(row[f])]
            for row, best in zip(*of, strict=True)
        ]
        for of in zip(lifts, order, strict=True)
    ]
    return {
        "coactivation": stats.coactivation.tolist() if small else None,
        "coactivation_lift": as_lists(lifts) if small else None,
        "partners": partners,
    }


def _favourites(stats: RoutingStats, tokenizer: Tokenizer) -> list[list[list[list]]]:
    top = _budget(MOST_FAVOURITES, stats.load.size, FAVOURITES)

    @cache
    def shown(token: int) -> str:
        return readable(tokenizer, [token]).replace(" ", "␣")

    return [
        [
            [
                [
                    token,
                    shown(token),
                    count,
                    round(ratio, 4),
                    _rounded(bits),
                    _rounded(round(margin, 4)),
                ]
                for token, count, ratio, bits, margin in of_expert
            ]
            for of_expert in favourites(stats, layer, top=top, min_count=MIN_COUNT)
        ]
        for layer in range(len(stats.layers))
    ]


def _contexts(stats: RoutingStats, tokenizer: Tokenizer) -> list[list[list[list]]]:
    """List the contexts of each expert, the largest gate first; of many experts, shorter ones."""
    top = _budget(MOST_CONTEXTS, stats.load.size, CONTEXTS)
    letters = MOST_LETTERS // (3 * top * stats.load.size) + 1
    listed: list[list[list[list]]] = [[[] for _ in of_layer] for of_layer in stats.load]
    found = find_contexts(stats.rows, stats.load.shape[1], top=top)
    for layer, expert, gate, window, margin, document in zip(*found, strict=True):
        before, token, after = context(tokenizer, window)
        text = before[-2 * letters :], token[: 2 * letters], after[:letters]
        numbers = round(float(gate), 4), _rounded(round(float(margin), 4)), int(document)
        listed[layer][expert].append([*text, *numbers])
    return listed


def _evenly(count: int, most: int) -> np.ndarray:
    """At most so many of `count` indices, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, max(2, most)).round().astype(int))


def _over_time(log: LoadLog) -> dict[str, Any]:
    picked = _evenly(len(log.steps), MOST_CURVES // log.load.shape[1])
    return {"steps": log.steps[picked].tolist(), "max_vio": as_lists(_max_vio(log.load[picked]))}


def _bias(stats: RoutingStats, log: LoadLog | None) -> dict[str, Any] | None:
    """The bias, its history at up to HISTORY steps, and what it changes."""
    if stats.bias is None:
        return None
    value, without, changed = stats.bias
    history = None
    if log is not None and log.bias is not None:
        picked = _evenly(len(log.steps), _budget(MOST_HISTORY, value.size, HISTORY))
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
    pairs = flow.transitions(rows, num_experts)
    repeated = flow.repeats(rows, num_experts)
    lifts = flow.transition_lift(pairs)
    names = [name for name in stats.layers if name.startswith("MTP")]
    heads = flow.heads_against_trunk(rows, num_experts, len(names))
    by_fields = (
        {name: as_lists(values) for name, values in heads._asdict().items()} if heads else None
    )
    return {
        "transitions": {
            "lift": as_lists(lifts) if lifts.size <= MOST_PAIRS else None,
            "top": [_largest_pairs(*of_layer) for of_layer in zip(pairs, lifts, strict=True)],
        }
        if len(pairs)
        else None,
        "repeats": {name: as_lists(values) for name, values in repeated._asdict().items()},
        "heads": None if by_fields is None else {"layers": names} | by_fields,
    }


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
    num_experts = found.without.shape[1]
    heads = [[None] * num_experts for _ in range(num_layers - len(found.without))]
    tables = {
        name: [*as_lists(getattr(found, name)), *heads] for name in ("without", "low", "high")
    }
    counts = {key: getattr(found, key) for key in ("tokens", "documents", "resamples")}
    return {"loss": as_lists(found.loss)} | tables | counts


def texts(rows: TokenRows, domains: Sequence[str], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """List pieces of text with each token's experts: the longest of each domain in turn.

    Each is of another document.


    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> from dsv3_jax.stats.token_rows import rows_of
        >>> [text] = texts(rows_of(np.array([[[3], [1]]])), ["code"], ByteTokenizer())
        >>> text["domain"], text["experts"]
        ('code', [[[3], [1]]])
    """
    count, length = text_size(rows)
    starts = np.flatnonzero(np.diff(rows.segment, prepend=-1))
    sizes = np.minimum(np.append(starts[1:], len(rows.segment)) - starts, length)
    queues: dict[int, list[int]] = {}
    seen: set[int] = set()
    for piece in np.argsort(-sizes, kind="stable").tolist():
        document = int(rows.document[starts[piece]])
        if document not in seen:
            seen.add(document)
            queues.setdefault(int(rows.domain[starts[piece]]), []).append(piece)
    turns = sorted(
        (turn, domain, piece)
        for domain, queue in queues.items()
        for turn, piece in enumerate(queue)
    )
    return [
        text_of(rows, domains, tokenizer, int(starts[i]), int(starts[i] + sizes[i]))
        for *_, i in turns[:count]
    ]


def text_size(rows: TokenRows) -> tuple[int, int]:
    """(number of texts, tokens of each): fewer and shorter ones of many layers."""
    most = MOST_CHOICES // (len(rows.counted) * rows.expert_ids.shape[-1])
    count = int(np.clip(most // 128, 2, TEXTS))
    return count, min(TEXT_TOKENS, max(32, most // count))


def text_of(
    rows: TokenRows, domains: Sequence[str], tokenizer: Tokenizer, start: int, stop: int
) -> dict[str, Any]:
    """One of `texts`: the rows from `start` to `stop`.

    A position of a head without a choice has no experts.
    """
    here = slice(start, stop)
    order = np.argsort(-rows.gates[:, here], axis=-1, kind="stable")
    experts, gates = (
        np.take_along_axis(x[:, here], order, -1) for x in (rows.expert_ids, rows.gates)
    )
    counted = rows.counted[:, here].tolist()
    return {
        "domain": domains[rows.domain[start]],
        "document": int(rows.document[start]),
        "tokens": [readable(tokenizer, [int(i)]) for i in rows.token[here]],
        "nll": [None if np.isnan(x) else round(float(x), 3) for x in rows.nll[here]],
        **{
            key: [
                [x if c else [] for x, c in zip(*of, strict=True)]
                for of in zip(values, counted, strict=True)
            ]
            for key, values in (
                ("experts", experts.tolist()),
                ("gates", np.round(gates.astype(float), 2).tolist()),
            )
        },
    }


def make_header(
    folder: Path,
    config: RunConfig,
    step: int,
    data: str,
    stats: RoutingStats,
    tokenizer: Tokenizer,
    mix: Mapping[str, float] | None,
) -> dict[str, Any]:
    """Describe a run's checkpoint and the text that it read; see "header" in `numbers.KEYS`.

    Args: mix: bytes of the training text by domain; None means unknown.
    """
    is_run = (folder / RUN_FILE).is_file()
    made = [one for one in (read_made(folder) if is_run else []) if isinstance(one, dict)][-1:]
    sizes = size(config.model)
    return {
        "run": folder.absolute().name,
        "step": step,
        "data": data,
        "preset": name_of(config.model),
        "parameters": sizes.total,
        "active_parameters": sizes.active,
        "steps": config.steps if is_run else None,
        "tokens_seen": step * config.data.batch_size * config.data.seq_len if is_run else None,
        "router": config.model.router,
        "balance_rule": describe_balance(config.model),
        "version": made[0].get("version") if made else None,
        "commit": made[0].get("commit") if made else None,
        "loss": as_lists(stats.rows.loss),
        "bits_per_byte": as_lists(bits_per_byte(stats.rows, tokenizer)),
        "max_vio_training_mix": _mixed(stats, config.model, tokenizer, mix),
    }


def name_of(cfg: ModelConfig) -> str | None:
    """The preset that a model is, whatever its vocabulary and balancing; None if it is none.

    Example:
        >>> tiny = MODELS["tiny"]
        >>> name_of(replace(tiny, vocab_size=1024)), name_of(replace(tiny, dim=64))
        ('tiny', None)
    """
    own = dict(vocab_size=cfg.vocab_size, balance=cfg.balance)
    return next((name for name, model in MODELS.items() if replace(model, **own) == cfg), None)


def describe_balance(cfg: ModelConfig) -> str:
    """Name the methods that balance the load, with their rates.

    Example:
        >>> describe_balance(MODELS["tiny"])
        'bias by rule sign, rate 0.003; sequence-wise loss, weight 0.0001'
    """
    balance = cfg.balance
    parts = []
    if routing.ROUTERS[cfg.router].reads_bias and balance.bias_rate:
        parts.append(f"bias by rule {balance.rule}, rate {balance.bias_rate:g}")
    for name, weight in (
        ("sequence-wise loss", balance.sequence_alpha),
        ("Switch loss", balance.switch_alpha),
        ("z-loss", balance.z_alpha),
    ):
        if weight:
            parts.append(f"{name}, weight {weight:g}")
    return "; ".join(parts) or "none"


def bits_per_byte(rows: TokenRows, tokenizer: Tokenizer) -> float:
    """Divide the bits of all tokens that have a loss by their bytes; special tokens have none.

    NaN without bytes.


    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> from dsv3_jax.stats.token_rows import rows_of
        >>> nll = np.array([np.nan, np.log(4)], np.float32)
        >>> rows = rows_of(np.zeros((1, 2, 1), int))._replace(nll=nll)
        >>> round(bits_per_byte(rows, ByteTokenizer()), 3)
        2.0
    """
    known = ~np.isnan(rows.nll)
    count = tokenizer.byte_lengths[rows.token[known]].sum()
    return (
        float(rows.nll[known].astype(np.float64).sum() / np.log(2) / count)
        if count
        else float("nan")
    )


def _mixed(
    stats: RoutingStats, cfg: ModelConfig, tokenizer: Tokenizer, mix: Mapping[str, float] | None
) -> float | None:
    """MaxVio of the trunk's layers with the domains as they are mixed in training."""
    trunk = stats.load_by_domain[:, : cfg.num_sparse_layers]
    rows = stats.rows
    if mix is None or not cfg.num_sparse_layers or set(mix) != set(stats.domains):
        return None
    known = ~np.isnan(rows.nll)
    bytes_ = np.bincount(
        rows.domain[known], tokenizer.byte_lengths[rows.token[known]], len(stats.domains)
    )
    read = np.bincount(rows.domain, minlength=len(stats.domains)) * stats.experts_per_token
    found = training_mix(
        trunk.astype(np.float64),
        read / np.maximum(bytes_, 1),
        [mix[name] for name in stats.domains],
    )
    return None if found is None else as_lists(found)
