"""`dsv3 stats`: the routing of a run's checkpoint on held-out text, as a folder of numbers, pictures and a page.

The folder is written under a temporary name and then renamed. An existing folder is replaced only if `report` wrote it.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.data.batches import Batch
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.files import atomic_folder
from dsv3_jax.hf.open_model import open_model
from dsv3_jax.ops import balance
from dsv3_jax.report.metrics import LOAD_FILE, read_rows
from dsv3_jax.report.run_plots import routing_heatmap
from dsv3_jax.stats import plots
from dsv3_jax.stats.measures import Specialisation, check_draws, domain_entropy, favourites, lift, specialisation
from dsv3_jax.stats.page import render_page
from dsv3_jax.stats.routing_stats import RoutingStats, collect
from dsv3_jax.stats.tokens import context, readable
from dsv3_jax.training.chats import measured_on

NUMBERS, PAGE = "stats.json", "index.html"
PICTURES = ("load.png", "load_over_time.png", "domains.png", "information.png", "coactivation.png", "entropy.png")
MOST_DOMAINS = 24  # in pictures and on the page; stats.json has all of them
CONTEXTS = 8  # in the report, for each expert
MIN_COUNT = 20  # rarer tokens have a lift that is mostly chance

# The keys of stats.json, which holds this table too, under "keys".
KEYS = {
    "run, step, data": "the run's folder, the checkpoint's step, and the text",
    "layers": "names of the L layers with experts: the trunk's sparse layers from layer 0, then multi-token heads",
    "domains, documents": "names of the text's domains; domain → number of documents",
    "experts, experts_per_token": "E and K",
    "tokens": "[L] number of tokens counted",
    "load": "[L][E] assignments; a token has K",
    "load_by_domain": "domain → [L][E]",
    "max_vio, load_entropy, load_gini": "[L] of the load: (largest − mean) / mean; entropy over ln E, 1 is even; "
    "Gini, 0 is even",
    "gate_entropy": "[L] mean over tokens: entropy of the K chosen gates over ln K",
    "score_entropy": "[L] mean over tokens: entropy of the scores of all experts over ln E",
    "gate_entropy_by_domain, score_entropy_by_domain": "domain → [L]",
    "coactivation": "[L][E][E] tokens that chose both experts; the diagonal is the load",
    "coactivation_lift": "[L][E][E] coactivation over chance; null on the diagonal",
    "specialisation": "bits: [L] I(expert; domain); share: bits over H(domain) (domain_entropy, bits); shuffled_mean, "
    "shuffled_95: bits after the domains were shuffled among the documents, `draws` times from `seed`; p_value",
    "favourites": f"[L][E] tokens with the largest lift, of those that occur {MIN_COUNT} times or more: token (its "
    "id), text, num_routed (occurrences that were routed to the expert), lift (p(expert | token) / p(expert))",
    "contexts": "[L][E] positions of the expert's largest gates: text before, the routed token, text after, gate",
    "max_vio_by_domain": "[L] of each domain's load alone; max_vio mixes the domains as the held-out rows do",
    "over_time": "null, or steps and max_vio [step][L] of training batches; the run's load.jsonl holds the loads",
}


class LoadLog(NamedTuple):
    """Loads of training batches."""

    steps: np.ndarray  # int64 [S], ascending
    load: np.ndarray  # int64 [S, L, E], assignments


def read_load(run: str | Path) -> LoadLog | None:
    """Read the loads that training wrote to a run's folder; None for a run without them, such as a converted one.

    Example:
        >>> read_load("no/such/run") is None
        True
    """
    rows = [row for row in read_rows(Path(run) / LOAD_FILE) if "load" in row]
    if not rows:
        return None
    return LoadLog(np.array([row["step"] for row in rows]), np.array([row["load"] for row in rows]))


def report(
    run: str | Path,
    out: str | Path | None = None,
    *,
    paths: tuple[str, ...] = (),
    step: int | None = None,
    batches: int = 16,
    draws: int = 200,
    seed: int = 0,
    kernels: str | None = None,
    follow: Callable[[Iterable[Batch], int], Iterable[Batch]] = lambda items, count: items,
) -> tuple[Path, RoutingStats, Specialisation]:
    """Run a checkpoint on held-out text, and write its routing statistics as numbers, pictures and a page.

    Args:
        run: a folder that training or conversion wrote.
        out: the folder to write; None means "stats" in the run's folder. An earlier report there is replaced.
        paths: other text; empty means the run's own validation text.
        step: the checkpoint's step; None means the last.
        batches: number of batches of the run's batch size, at most.
        draws: number of shuffles of the domains, see `specialisation`; seed: of the shuffles.
        kernels: as `Execution.kernels`; None means the run's own.
        follow: wraps the batches to show progress; its second argument is their number.
    Returns: (the folder, the counts, the information about domains).
    Raises: ValueError if `run` holds no run or no such checkpoint, for a model without experts, unreadable text,
        batches, draws or a seed out of range, and if `out` holds other files.

    Example:
        >>> report("runs/demo", batches=0)
        Traceback (most recent call last):
            ...
        ValueError: batches=0 is below 1
    """
    if batches < 1:
        raise ValueError(f"batches={batches} is below 1")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative")
    check_draws(draws)
    run, out = Path(run), Path(run) / "stats" if out is None else Path(out)
    _check(out)
    model, config, step = open_model(run, step=step, kernels=kernels)
    tokenizer, source = tokenizers.load(config.data.tokenizer), measured_on(config.data, run, paths)
    held_out = source.val_batches(batches)
    stats = collect(model, follow(held_out, len(held_out)), tokenizer, source.domains)
    special, log = specialisation(stats, draws=draws, seed=seed), read_load(run)
    text = ", ".join(map(str, paths or config.data.paths)) or "the text that comes with Python"
    header: dict[str, Any] = {"run": run.absolute().name, "step": step, "data": f"held-out part of {text}"}
    numbers = shown = header | as_json(stats, special, tokenizer, log)
    drawn = merge_small_domains(stats)
    if drawn is not stats:
        shown = header | as_json(drawn, special, tokenizer, log) | {"specialisation": numbers["specialisation"]}
    with atomic_folder(out, overwrite=True) as part:
        _draw(drawn, special, log, part, f"{header['run']}, step {step}")
        (part / NUMBERS).write_text(json.dumps({"keys": KEYS} | numbers, allow_nan=False), encoding="utf-8")
        (part / PAGE).write_text(render_page(shown), encoding="utf-8")
    return out, stats, special


def merge_small_domains(stats: RoutingStats) -> RoutingStats:
    """Keep the domains with the most tokens, and take the others together, for pictures and the page.

    Returns: `stats` itself where there are at most MOST_DOMAINS.

    Example:
        >>> names = [f"site {i}" for i in range(100)]
        >>> stats = RoutingStats.from_loads(np.ones((100, 1, 2), np.int64), np.arange(100), names)
        >>> merge_small_domains(stats).domains[-2:]
        ('site 22', '77 other domains')
    """
    if len(stats.domains) <= MOST_DOMAINS:
        return stats
    by_size = np.argsort(-stats.load_by_domain.sum((1, 2)), kind="stable")
    kept = np.sort(by_size[: MOST_DOMAINS - 1])
    number = np.full(len(stats.domains), len(kept))
    number[kept] = np.arange(len(kept))
    rest = f"{len(stats.domains) - len(kept)} other domains"
    names = tuple(stats.domains[i] for i in kept)
    while rest in names:
        rest += "…"
    return dataclasses.replace(stats, domains=(*names, rest), document_domains=number[stats.document_domains])


def as_json(stats: RoutingStats, special: Specialisation, tokenizer: Tokenizer, log: LoadLog | None) -> dict[str, Any]:
    """Return the numbers of stats.json, see `KEYS`; NaN becomes None.

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> stats = RoutingStats.from_loads(np.array([[[3, 1]], [[0, 4]]]), np.array([0, 1]), ["code", "prose"])
        >>> numbers = as_json(stats, specialisation(stats, draws=1), ByteTokenizer(), None)
        >>> numbers["load"], numbers["max_vio"]
        ([[3, 5]], [0.25])
    """
    load = jnp.asarray(stats.load, jnp.float32)
    names, by_domain = stats.domains, stats.load_by_domain
    gates = stats.mean_by_domain(stats.document_gate_entropy)
    scores = stats.mean_by_domain(stats.document_score_entropy)
    documents = np.bincount(stats.document_domains, minlength=len(names))
    return {
        "layers": list(stats.layers),
        "domains": list(names),
        "documents": dict(zip(names, documents.tolist(), strict=True)),
        "experts": stats.load.shape[1],
        "experts_per_token": stats.experts_per_token,
        "tokens": stats.tokens.tolist(),
        "load": stats.load.tolist(),
        "load_by_domain": dict(zip(names, by_domain.tolist(), strict=True)),
        "max_vio": _as_lists(balance.max_vio(load)),
        "max_vio_by_domain": dict(
            zip(names, _as_lists(balance.max_vio(jnp.asarray(by_domain, jnp.float32))), strict=True)
        ),
        "load_entropy": _as_lists(balance.entropy(load)),
        "load_gini": _as_lists(balance.gini(load)),
        "gate_entropy": _as_lists(stats.gate_entropy),
        "score_entropy": _as_lists(stats.score_entropy),
        "gate_entropy_by_domain": dict(zip(names, _as_lists(gates), strict=True)),
        "score_entropy_by_domain": dict(zip(names, _as_lists(scores), strict=True)),
        "coactivation": stats.coactivation.tolist(),
        "coactivation_lift": _as_lists(lift(stats.coactivation)),
        "specialisation": {
            "domain_entropy": _as_lists(domain_entropy(by_domain)),
            **{name: x if isinstance(x, int) else _as_lists(x) for name, x in special._asdict().items()},
        },
        "favourites": [_favourites(stats, layer, tokenizer) for layer in range(len(stats.layers))],
        "contexts": [
            [_contexts(stats, layer, expert, tokenizer) for expert in range(stats.load.shape[1])]
            for layer in range(len(stats.layers))
        ],
        "over_time": None if log is None else {"steps": log.steps.tolist(), "max_vio": _max_vio(log)},
    }


def _as_lists(values) -> Any:
    """Convert to nested lists of numbers with six significant digits; NaN becomes None."""
    values = np.asarray(values, np.float64)
    if values.ndim:
        return [_as_lists(part) for part in values]
    return float(f"{values:.6g}") if np.isfinite(values) else None


def _max_vio(log: LoadLog) -> Any:
    return _as_lists(balance.max_vio(jnp.asarray(log.load, jnp.float32)))


def _favourites(stats: RoutingStats, layer: int, tokenizer: Tokenizer) -> list[list[dict]]:
    return [
        [
            favourite._asdict()
            | {
                "text": readable(tokenizer, [favourite.token]).replace(" ", "␣"),
                "lift": round(favourite.lift, 4),
            }
            for favourite in of_expert
        ]
        for of_expert in favourites(stats, layer, min_count=MIN_COUNT)
    ]


def _contexts(stats: RoutingStats, layer: int, expert: int, tokenizer: Tokenizer) -> list[dict]:
    """List the contexts of one expert, the largest gate first."""
    contexts = stats.contexts
    rows = np.flatnonzero((contexts.layer == layer) & (contexts.expert == expert))[:CONTEXTS]
    return [
        dict(zip(("before", "token", "after"), context(tokenizer, contexts.tokens[row]), strict=True))
        | {"gate": round(float(contexts.gate[row]), 4)}
        for row in rows
    ]


def _draw(stats: RoutingStats, special: Specialisation, log: LoadLog | None, folder: Path, title: str) -> None:
    """Write PICTURES, except those without content: no training log, one domain, or one expert a token."""
    load, over_time, domains, information, coactivation, entropy = (folder / name for name in PICTURES)
    by_domain, num_heads = stats.load_by_domain, sum(name.startswith("MTP") for name in stats.layers)
    several_domains = len(stats.domains) > 1
    routing_heatmap(
        stats.load,
        load,
        title=f"{title}: load of each expert on held-out text, over the layer's mean",
        domain_loads=dict(zip(stats.domains, by_domain, strict=True)) if several_domains else None,
        mtp_blocks=num_heads,
    )
    if log is not None:
        plots.load_over_time(log.steps, log.load, stats.layers, over_time)
    if several_domains:
        plots.domain_lift(by_domain, stats.domains, stats.layers, domains)
        plots.information(special, stats.layers, information)
    if stats.experts_per_token > 1:
        plots.coactivation(lift(stats.coactivation), stats.layers, coactivation)
    sums = {"Chosen gates": stats.document_gate_entropy, "Scores of all experts": stats.document_score_entropy}
    plots.entropies(
        {"Chosen gates": stats.gate_entropy, "Scores of all experts": stats.score_entropy},
        {name: stats.mean_by_domain(document_sums) for name, document_sums in sums.items()},
        stats.domains,
        stats.layers,
        entropy,
    )


def _check(out: Path) -> None:
    """Raise ValueError if `out` exists and holds anything that `report` did not write."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"out={str(out)!r} is a file; choose a folder for the statistics")
    others = sorted(path.name for path in out.iterdir() if path.name not in (NUMBERS, PAGE, *PICTURES))
    if others:
        raise ValueError(f"out={str(out)!r} holds other files than statistics, such as {others[0]}; choose another")
