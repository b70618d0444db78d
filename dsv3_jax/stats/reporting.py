"""`dsv3 stats`: the routing of a run's checkpoint on held-out text, as a folder of numbers, pictures and a page.

The folder is written under a temporary name and then renamed. An existing folder is replaced only if `report` wrote it.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.files import atomic_folder
from dsv3_jax.hf.open_model import open_model
from dsv3_jax.ops import routing
from dsv3_jax.report.run_plots import routing_heatmap
from dsv3_jax.stats import flow, others, plots
from dsv3_jax.stats.header import make_header
from dsv3_jax.stats.knockouts import TOKENS as WORTH_TOKENS
from dsv3_jax.stats.knockouts import worth as measure_worth
from dsv3_jax.stats.load_log import LoadLog, read_load
from dsv3_jax.stats.measures import Specialisation, check_draws, lift, specialisation
from dsv3_jax.stats.numbers import (
    KEYS,
    TEXT_TOKENS,
    TEXTS,
    as_json,
    by_domain,
    information_json,
    merge_small_domains,
    text_of,
    worth_json,
)
from dsv3_jax.stats.others import read_rows
from dsv3_jax.stats.page import render_page
from dsv3_jax.stats.reading import OWN, folder_name, open_text
from dsv3_jax.stats.routing_stats import RoutingStats, collect
from dsv3_jax.stats.token_rows import TokenRows, join_rows, write_parquet

T = TypeVar("T")
NUMBERS, PAGE = "stats.json", "index.html"
PICTURES = ("load.png", "load_over_time.png", "domains.png", "information.png", "coactivation.png", "entropy.png")
Follow = Callable[[Iterable[T], int, str], Iterable[T]]  # shows progress; the number of items, and their name


class Report(NamedTuple):
    """The files that `report` wrote, and its counts."""

    folder: Path
    stats: RoutingStats
    specialisation: Specialisation
    numbers: dict[str, Any]  # of stats.json


def report(
    run: str | Path,
    out: str | Path | None = None,
    *,
    paths: tuple[str, ...] = (),
    text: str | None = None,
    step: int | None = None,
    batches: int | None = None,
    draws: int = 200,
    seed: int = 0,
    devices: int | None = None,
    worth: bool = False,
    worth_tokens: int = WORTH_TOKENS,
    against: str | None = None,
    tokens: str | Path | None = None,
    kernels: str | None = None,
    follow: Follow = lambda items, count, name: items,
) -> Report:
    """Run a checkpoint on held-out text, and write its routing statistics as numbers, pictures and a page.

    Args:
        run: a folder that training or conversion wrote.
        out: the folder to write; an earlier report there is replaced. None means a folder in "stats" of the run's,
            named by the step and by what is read.
        paths: other text, all of it; empty means the run's own validation text.
        text: a sentence, or the path of a file: shown first, token by token, and counted nowhere.
        step: the checkpoint's step; None means the last.
        batches: number of batches of the run's batch size, at most; None means 16 of the run's own text and all of
            `paths`.
        draws: number of shuffles of the domains, see `specialisation`; seed: of the shuffles.
        devices: devices that hold the experts, whose load is added up; None means no such sum.
        worth: measure the loss without each expert too, on up to `worth_tokens` tokens: a forward pass an expert.
        against: another run, "RUN" or "RUN:STEP", that reads the same text; its experts are matched to this one's.
        tokens: a Parquet file to write, a row for each token and layer.
        kernels: as `Execution.kernels`; None means the run's own.
        follow: wraps what takes long, to show progress.
    Raises: ValueError if `run` or `against` holds no run or no such checkpoint, for a model without experts, unreadable
        text, batches, draws, devices, tokens or a seed out of range, and if `out` holds other files.

    Example:
        >>> report("runs/demo", batches=0)
        Traceback (most recent call last):
            ...
        ValueError: batches=0 is below 1
    """
    if batches is not None and batches < 1:
        raise ValueError(f"batches={batches} is below 1")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative")
    check_draws(draws)
    run = Path(run)
    if out is not None:
        _check(Path(out))
    if worth and worth_tokens < 1:
        raise ValueError(f"worth_tokens={worth_tokens} is below 1")
    other = None if against is None else others.open_other(against, kernels=kernels)
    model, config, step = opened = open_model(run, step=step, kernels=kernels)
    out = run / "stats" / folder_name(step, paths, text) if out is None else Path(out)
    _check(out)
    cfg = config.model
    if devices is not None:
        flow.load_by_parts(np.zeros((1, cfg.num_experts)), devices)
    tokenizer = tokenizers.load(config.data.tokenizer)
    reading = open_text(config.data, run, tokenizer, paths=paths, text=text, batches=batches)
    stats = collect(model, follow(reading.batches, len(reading.batches), "batches"), tokenizer, reading.domains)
    own = read_rows(model, reading.own)
    special, log = specialisation(stats, draws=draws, seed=seed), read_load(run)
    header = make_header(run, config, step, reading.data, stats, tokenizer, reading.mix)
    more: dict[str, Any] = {key: header[key] for key in ("run", "step", "data")} | {"header": header}
    if stats.rows is not None:
        more["information"] = information_json(stats.rows, cfg.num_experts, len(stats.domains), seed)
        more["saturation"] = others.saturation(run, step, stats.rows, reading.batches, kernels=kernels)
    if routing.ROUTERS[cfg.router].has_groups and cfg.num_groups > 1:
        more["groups"] = {"load": flow.load_by_parts(stats.load, cfg.num_groups).tolist()}
    if devices is not None:
        more["devices"] = {"count": devices, "load": flow.load_by_parts(stats.load, devices).tolist()}
    if worth:
        found = measure_worth(model, reading.batches, tokens=worth_tokens, seed=seed, follow=follow)
        more["worth"] = worth_json(found, len(stats.layers))
    if other is not None:
        how: dict[str, Any] = {"paths": paths, "batches": batches, "seed": seed}
        more["against"] = others.against(other, opened, run, stats, reading, tokenizer, **how)
    numbers = as_json(stats, special, tokenizer, log, more)
    if own is not None:
        first = text_of(own, (OWN,), tokenizer, 0, min(len(own.token), TEXT_TOKENS))
        numbers["texts"] = [first, *(numbers["texts"] or [])][:TEXTS]
    if tokens is not None:
        _write_tokens(tokens, stats, own, tokenizer)
    drawn = merge_small_domains(stats)
    with atomic_folder(out, overwrite=True) as part:
        _draw(drawn, special, log, part, cfg, numbers["information"])
        (part / NUMBERS).write_text(json.dumps({"keys": KEYS} | numbers, allow_nan=False), encoding="utf-8")
        (part / PAGE).write_text(render_page(numbers | by_domain(drawn)), encoding="utf-8")
    return Report(out, stats, special, numbers)


def _write_tokens(
    path: str | Path, stats: RoutingStats, own: TokenRows | None, tokenizer: tokenizers.Tokenizer
) -> None:
    """Write the rows of all tokens; the user's own text comes first, as document -1 of the domain OWN."""
    rows, domains = stats.rows, stats.domains
    assert rows is not None
    if own is not None:
        last = len(domains)
        own = own._replace(document=np.full_like(own.document, -1), domain=np.full_like(own.domain, last))
        rows = rows._replace(segment=rows.segment + own.segment[-1] + 1)
        rows = join_rows([own, rows])
        domains = (*domains, OWN)
    write_parquet(path, rows, stats.layers, domains, tokenizer)


def _draw(
    stats: RoutingStats,
    special: Specialisation,
    log: LoadLog | None,
    folder: Path,
    cfg: ModelConfig,
    measured: dict[str, Any] | None,
) -> None:
    """Write PICTURES, except those without content: no training log, one domain, or one expert a token."""
    load, over_time, domains, information, coactivation, entropy = (folder / name for name in PICTURES)
    by_domain = stats.load_by_domain
    several_domains = len(stats.domains) > 1
    routing_heatmap(
        stats.load,
        load,
        domain_loads=dict(zip(stats.domains, by_domain, strict=True)) if several_domains else None,
        first_layer=cfg.num_dense_layers,
        mtp_blocks=cfg.num_sparse_heads,
    )
    if log is not None:
        plots.load_over_time(log.steps, log.load, stats.layers, over_time)
    if several_domains:
        plots.domain_lift(by_domain, stats.domains, stats.layers, domains)
        plots.information(special, stats.layers, information, measured)
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
