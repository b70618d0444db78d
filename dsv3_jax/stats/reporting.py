"""`dsv3 stats`: a run's routing on held-out text as a folder of numbers, pictures and a page.

The folder is made whole beside its place and then moved there; only a folder that this made before is replaced.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import replace
from dsv3_jax.data import batches as data
from dsv3_jax.data import tokenizer
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.ops import balance
from dsv3_jax.report.metrics import LOAD_FILE, read_rows
from dsv3_jax.report.run_plots import routing_heatmap
from dsv3_jax.stats import plots
from dsv3_jax.stats.collect import RoutingStats, collect
from dsv3_jax.stats.measures import Specialisation, domain_entropy, favourites, lift, specialisation
from dsv3_jax.stats.page import page
from dsv3_jax.stats.tokens import context, readable
from dsv3_jax.training.checkpoint import load_model

NUMBERS, PAGE = "stats.json", "index.html"
PICTURES = ("load.png", "load_over_time.png", "domains.png", "information.png", "coactivation.png", "entropy.png")
CONTEXTS = 8  # of each expert in the report
MIN_COUNT = 20  # occurrences of a token below which its lift is chance's

# What stands in stats.json, and in it under "keys".
KEYS = {
    "run, step, data": "the run's folder, the checkpoint's step, and the text that was read",
    "layers": "names of the L layers with experts: the trunk's sparse ones from layer 0, then multi-token heads",
    "domains, documents": "names of the text's domains, and how many documents of each were read",
    "experts, experts_per_token": "E and K",
    "tokens": "[L] that counted",
    "load": "[L][E] assignments; a token has K",
    "load_by_domain": "domain → [L][E]",
    "max_vio, load_entropy, load_gini": "[L] of the load: (largest − mean) / mean; entropy over ln E, 1 is even; "
    "Gini, 0 is even",
    "gate_entropy": "[L] mean over tokens, entropy of the K chosen gates over ln K",
    "score_entropy": "[L] mean over tokens, entropy of the scores of all experts over ln E",
    "gate_entropy_by_domain, score_entropy_by_domain": "domain → [L]",
    "coactivation": "[L][E][E] tokens that chose both experts; the diagonal is the load",
    "coactivation_lift": "[L][E][E] the same over chance; null on the diagonal",
    "specialisation": "bits: [L] I(expert; domain); share: of H(domain) (domain_entropy, bits); shuffled_mean and "
    "shuffled_95: bits after the documents' domains were shuffled, `draws` times from `seed`; p_value",
    "favourites": f"[L][E] tokens an expert likes best, of those that occur {MIN_COUNT} times: token, text, times (how "
    "often it got them), lift (p(expert | token) / p(expert))",
    "contexts": "[L][E] places of an expert's largest gates: text before, the routed token, text after, gate",
    "over_time": "null, or steps and max_vio [step][L] of training batches; the loads are in the run's load.jsonl",
}


class LoadLog(NamedTuple):
    """Loads of training batches."""

    steps: np.ndarray  # int64 [S], ascending
    load: np.ndarray  # int64 [S, L, E]


def read_load(run: str | Path) -> LoadLog | None:
    """What a run's training left of its load; None for a run that left nothing, as converted ones."""
    rows = read_rows(Path(run) / LOAD_FILE)
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
    follow: Callable[[Iterable[data.Batch], int], Iterable[data.Batch]] = lambda items, count: items,
) -> tuple[Path, RoutingStats, Specialisation]:
    """Read held-out text with a run's checkpoint, and write what its routers did.

    Args:
        run: a folder that training or conversion made.
        out: the folder to write; None is "stats" in the run's. One that this wrote before is replaced.
        paths: other text to read; none is the run's own validation text.
        step: of the checkpoint; None is the last.
        batches: of the run's batch size, at most.
        draws: shuffles of domains for the baseline, from `seed`.
        follow: wraps the batches, to show how far it is; it is told how many there are.
    Returns: (the folder, the counts, what experts say of domains).
    Raises: ValueError for no run, no checkpoint, a model without experts, unreadable text, batches or draws below 1,
        and when `out` holds anything else.
    """
    if batches < 1:
        raise ValueError(f"batches={batches} is below 1")
    run, out = Path(run), Path(run) / "stats" if out is None else Path(out)
    _check(out)
    model, _, config, step = load_model(run, step=step)
    source = replace(config.data, paths=paths) if paths else config.data
    words, corpus = tokenizer.load(source.tokenizer), data.load_corpus(source)
    held_out = data.val_batches(corpus, words, source, batches)
    stats = collect(model, follow(held_out, len(held_out)), words, corpus.domains)
    found, log = specialisation(stats, draws=draws, seed=seed), read_load(run)
    told = ", ".join(map(str, source.paths)) or "text that Python carries"
    about: dict[str, Any] = {"run": run.absolute().name, "step": step, "data": f"held-out part of {told}"}
    with _whole_folder(out) as part:
        numbers = about | as_json(stats, found, words, log)
        _draw(stats, found, log, part, f"{about['run']}, step {step}")
        (part / NUMBERS).write_text(json.dumps({"keys": KEYS} | numbers, allow_nan=False), encoding="utf-8")
        (part / PAGE).write_text(page(numbers, part), encoding="utf-8")
    return out, stats, found


def as_json(stats: RoutingStats, found: Specialisation, words: Tokenizer, log: LoadLog | None) -> dict[str, Any]:
    """The numbers of stats.json, see `KEYS`; NaN becomes None."""
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
        "max_vio": _plain(balance.max_vio(load)),
        "load_entropy": _plain(balance.entropy(load)),
        "load_gini": _plain(balance.gini(load)),
        "gate_entropy": _plain(stats.gate_entropy),
        "score_entropy": _plain(stats.score_entropy),
        "gate_entropy_by_domain": dict(zip(names, _plain(gates), strict=True)),
        "score_entropy_by_domain": dict(zip(names, _plain(scores), strict=True)),
        "coactivation": stats.together.tolist(),
        "coactivation_lift": _plain(lift(stats.together)),
        "specialisation": {
            "domain_entropy": _plain(domain_entropy(by_domain)),
            **{name: x if isinstance(x, int) else _plain(x) for name, x in found._asdict().items()},
        },
        "favourites": [_favourites(stats, layer, words) for layer in range(len(stats.layers))],
        "contexts": [
            [_contexts(stats, layer, expert, words) for expert in range(stats.load.shape[1])]
            for layer in range(len(stats.layers))
        ],
        "over_time": None if log is None else {"steps": log.steps.tolist(), "max_vio": _max_vio(log)},
    }


def _plain(values) -> Any:
    """Nested lists of numbers of six digits; None for NaN."""
    values = np.asarray(values, np.float64)
    if values.ndim:
        return [_plain(part) for part in values]
    return float(f"{values:.6g}") if np.isfinite(values) else None


def _max_vio(log: LoadLog) -> Any:
    return _plain(balance.max_vio(jnp.asarray(log.load, jnp.float32)))


def _favourites(stats: RoutingStats, layer: int, words: Tokenizer) -> list[list[dict]]:
    return [
        [
            one._asdict() | {"text": readable(words, [one.token]).replace(" ", "␣"), "lift": round(one.lift, 4)}
            for one in expert
        ]
        for expert in favourites(stats, layer, min_count=MIN_COUNT)
    ]


def _contexts(stats: RoutingStats, layer: int, expert: int, words: Tokenizer) -> list[dict]:
    """Of one expert, the largest gates first."""
    kept = stats.contexts
    rows = np.flatnonzero((kept.layer == layer) & (kept.expert == expert))[:CONTEXTS]
    return [
        dict(zip(("before", "token", "after"), context(words, kept.tokens[row]), strict=True))
        | {"gate": round(float(kept.gate[row]), 4)}
        for row in rows
    ]


def _draw(stats: RoutingStats, found: Specialisation, log: LoadLog | None, folder: Path, whose: str) -> None:
    """PICTURES, but for those that have nothing to show: no training log, one domain, one expert a token."""
    load, over_time, domains, information, coactivation, entropy = (folder / name for name in PICTURES)
    by_domain, heads = stats.load_by_domain, sum(name.startswith("MTP") for name in stats.layers)
    several = len(stats.domains) > 1
    routing_heatmap(
        stats.load,
        load,
        title=f"{whose}: load of each expert on held-out text, over the layer's mean",
        domain_loads=dict(zip(stats.domains, by_domain, strict=True)) if several else None,
        mtp_blocks=heads,
    )
    if log is not None:
        plots.load_over_time(log.steps, log.load, stats.layers, over_time)
    if several:
        plots.domain_lift(by_domain, stats.domains, stats.layers, domains)
        plots.information(found, stats.layers, information)
    if stats.experts_per_token > 1:
        plots.coactivation(lift(stats.together), stats.layers, coactivation)
    sums = {"Chosen gates": stats.document_gate_entropy, "Scores of all experts": stats.document_score_entropy}
    plots.entropies(
        {"Chosen gates": stats.gate_entropy, "Scores of all experts": stats.score_entropy},
        {title: stats.mean_by_domain(one) for title, one in sums.items()},
        stats.domains,
        stats.layers,
        entropy,
    )


def _check(out: Path) -> None:
    """Raises: ValueError when `out` is there and is not what `report` wrote."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file, not a folder to write statistics into")
    others = sorted(path.name for path in out.iterdir() if path.name not in (NUMBERS, PAGE, *PICTURES))
    if others:
        raise ValueError(f"{out} holds other files than statistics, such as {others[0]}; choose another --out")


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A new folder to fill, which then takes the place of `out`; on failure `out` stays as it was."""
    out = out.resolve()
    part, old = (out.with_name(f".{out.name}.{os.getpid()}.{what}") for what in ("part", "old"))
    part.mkdir(parents=True)
    try:
        yield part
        if out.exists():
            out.rename(old)
        part.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
