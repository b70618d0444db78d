"""`dsv3 stats`: a checkpoint's routing of held-out text, as numbers, a picture and a page.

The folder is written under a temporary name and then renamed. An existing folder is replaced only
if `report` wrote it.
"""

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import tyro

from dsv3_jax.config import ModelConfig
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.host.bucket import url_of
from dsv3_jax.host.files import atomic_folder, check_writable, write_atomic
from dsv3_jax.host.mirror import fetched
from dsv3_jax.ops import routing
from dsv3_jax.report.run_plots import routing_heatmap
from dsv3_jax.runs.open_model import open_model, with_paths
from dsv3_jax.stats import flow, others
from dsv3_jax.stats.header import make_header
from dsv3_jax.stats.knockouts import TOKENS as WORTH_TOKENS
from dsv3_jax.stats.knockouts import worth as measure_worth
from dsv3_jax.stats.measures import specialisation
from dsv3_jax.stats.numbers import (
    KEYS,
    as_json,
    by_domain,
    information_json,
    merge_small_domains,
    worth_json,
)
from dsv3_jax.stats.page import render_page
from dsv3_jax.stats.reading import OWN, folder_name, open_text, read_load
from dsv3_jax.stats.routing_stats import RoutingStats, collect, tokens
from dsv3_jax.stats.texts import TEXTS, text_of, text_size
from dsv3_jax.stats.token_rows import TokenRows, join_rows

T = TypeVar("T")
NUMBERS, PAGE, PICTURE = "stats.json", "index.html", "load.png"
# shows progress; the number of items, and their name
Follow = Callable[[Iterable[T], int, str], Iterable[T]]


@dataclass(frozen=True)
class ReportOptions:
    """Options of a report: its text and its measures."""

    # other text to read, all of it; empty means the run's own validation text
    paths: tuple[str, ...] = ()
    # a sentence, or the path of a file, that is shown first, token by token; it is counted nowhere
    text: str | None = None
    # step of the checkpoint; None means the last
    step: int | None = None
    # number of batches to read, at most; None means 16 of the run's own text, and all of --paths
    batches: int | None = None
    # number of shuffles of the documents' domains, which estimate chance for I(expert; domain)
    draws: int = 200
    # seed of the shuffles
    seed: int = 0
    # number of devices that hold the experts, whose load is added up; None means no such sum
    devices: int | None = None
    # measure the loss without each expert too: one forward pass an expert
    worth: bool = False
    # tokens that --worth reads for each expert, at most
    worth_tokens: int = WORTH_TOKENS
    # another run to read the same text, RUN or RUN:STEP; its experts are matched to this one's
    against: str | None = None
    # .npz file to write too, the arrays of `TokenRows`: experts, gates, margins and nats a token
    tokens: Path | None = None
    # kernels to compute with: auto, xla, or a name from `dsv3 info PRESET --kernels`; None means
    # the run's own
    kernels: str | None = None

    def check(self) -> None:
        """Raise ValueError for a number or seed out of range, and for tokens that are no .npz."""
        for name in ("batches", "draws", "worth_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is below 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is negative")
        if self.tokens is not None and self.tokens.suffix != ".npz":
            raise ValueError(f"tokens={str(self.tokens)!r} does not end in .npz")


@dataclass(frozen=True, kw_only=True)
class Stats(ReportOptions):
    """Count how a checkpoint routes held-out text; write stats.json, load.png, index.html."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """a folder that `dsv3 train` or `dsv3 convert` wrote"""
    out: Path | None = None
    """folder to write; an earlier report there is replaced. None means a folder in the run's
    "stats", named by the step and by what is read"""


class Report(NamedTuple):
    """The folder that `report` wrote, and its numbers."""

    folder: Path
    numbers: dict[str, Any]  # of stats.json


def report(
    run: str | Path,
    out: str | Path | None = None,
    options: ReportOptions | None = None,
    *,
    follow: Follow = lambda items, count, name: items,
) -> Report:
    """Run a checkpoint on held-out text; write its routing as numbers, a picture and a page.

    Args:
        run: a folder that training or conversion wrote.
        out: the folder to write; an earlier report there is replaced. None means a folder in
            "stats" of the run's, named by the step and by what is read.
        options: None means the default of each.
        follow: wraps what takes long, to show progress.
    Raises: ValueError if `run` or `against` holds no run or no such checkpoint, for a model without
        experts, unreadable text, devices or tokens out of range, if `out` holds other files, and
        as `others.check_text`.

    Example:
        >>> report("runs/demo", options=ReportOptions(batches=0))
        Traceback (most recent call last):
            ...
        ValueError: batches=0 is below 1
    """
    options = options or ReportOptions()
    options.check()
    paths = options.paths
    seed = options.seed
    kernels = options.kernels

    # Wrong targets and runs are refused before the text is read.
    if out is None and (url := url_of(run)):
        raise ValueError(f"run={url!r} is in a bucket, and its report is not; name a folder as out")
    run = fetched(run)
    check_writable(run / "stats" if out is None else out, folders=True)
    check_writable(options.tokens)
    if out is not None:
        _check(Path(out))
    other = None if options.against is None else others.open_other(options.against, kernels=kernels)
    model, config, step = opened = open_model(run, step=options.step, kernels=kernels)
    out = run / "stats" / folder_name(step, paths, options.text) if out is None else Path(out)
    _check(out)
    cfg = config.model
    if options.devices is not None:
        flow.load_by_parts(np.zeros((1, cfg.num_experts)), options.devices)  # refuses

    # One pass over the text counts everything; the user's own text is read apart.
    tokenizer = tokenizers.load(config.data.tokenizer)
    data = with_paths(config.data, paths) if paths else config.data
    if other is not None:
        others.check_text(other, tokenizer, data)
    reading = open_text(
        config.data, run, tokenizer, paths=paths, text=options.text, batches=options.batches
    )
    followed = follow(reading.batches, len(reading.batches), "batches")
    stats = collect(model, followed, reading.domains)
    own = tokens(model, reading.own, (OWN,)) if reading.own else None

    # Further numbers need more than the counts.
    header = make_header(run, config, step, reading.data, stats, tokenizer, reading.mix)
    more: dict[str, Any] = {key: header[key] for key in ("run", "step", "data")}
    more["header"] = header
    more["information"] = information_json(stats.rows, cfg.num_experts, len(stats.domains), seed)
    more["saturation"] = others.saturation(run, step, stats.rows, reading.batches, kernels=kernels)

    # The load of groups of experts, and of the devices that hold them.
    if routing.ROUTERS[cfg.router].has_groups and cfg.num_groups > 1:
        more["groups"] = {"load": flow.load_by_parts(stats.load, cfg.num_groups).tolist()}
    if options.devices is not None:
        load = flow.load_by_parts(stats.load, options.devices)
        more["devices"] = {"count": options.devices, "load": load.tolist()}

    # The slowest measures are options: a pass for each expert, and another model.
    if options.worth:
        found = measure_worth(
            model, reading.batches, tokens=options.worth_tokens, seed=seed, follow=follow
        )
        more["worth"] = worth_json(found, len(stats.layers))
    if other is not None:
        text: dict[str, Any] = {"paths": paths, "batches": options.batches}
        more["against"] = others.against(
            other, opened, run, stats, reading, tokenizer, seed=seed, **text
        )

    special = specialisation(stats, draws=options.draws, seed=seed)
    numbers = as_json(stats, special, tokenizer, read_load(run), more)
    if own is not None:
        first = text_of(own, (OWN,), tokenizer, 0, min(len(own.token), text_size(own)[1]))
        numbers["texts"] = [first, *numbers["texts"]][:TEXTS]
    if options.tokens is not None:
        _write_tokens(options.tokens, stats, own)
    _write(out, numbers, stats, cfg)
    return Report(out, numbers)


def _write(out: Path, numbers: dict[str, Any], stats: RoutingStats, cfg: ModelConfig) -> None:
    """Write the folder of a report: numbers, picture and page, all of them or none."""
    # stats.json has all domains; the picture and the page have as many as they can show.
    shown = merge_small_domains(stats)
    domain_loads = None
    if len(shown.domains) > 1:
        domain_loads = dict(zip(shown.domains, shown.load_by_domain, strict=True))

    with atomic_folder(out, overwrite=True) as part:
        routing_heatmap(
            stats.load,
            part / PICTURE,
            domain_loads=domain_loads,
            first_layer=cfg.num_dense_layers,
            mtp_blocks=cfg.num_sparse_heads,
        )
        text = json.dumps({"keys": KEYS} | numbers, allow_nan=False, separators=(",", ":"))
        (part / NUMBERS).write_text(text, encoding="utf-8")
        (part / PAGE).write_text(render_page(numbers | by_domain(shown)), encoding="utf-8")


def _write_tokens(path: Path, stats: RoutingStats, own: TokenRows | None) -> None:
    """Write the rows of all tokens as arrays, with the names of layers and domains.

    The user's own text comes first, as document -1 of the domain OWN.
    """
    rows = stats.rows
    domains = stats.domains
    if own is not None:
        last = len(domains)
        own = own._replace(
            document=np.full_like(own.document, -1), domain=np.full_like(own.domain, last)
        )
        rows = join_rows([own, rows])
        domains = (*domains, OWN)
    file = io.BytesIO()
    np.savez(file, layers=stats.layers, domains=domains, **rows._asdict())
    write_atomic(path, file.getvalue())


def _check(out: Path) -> None:
    """Raise ValueError if `out` exists and holds anything that `report` did not write."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"out={str(out)!r} is a file; choose a folder for the statistics")
    others = sorted(
        path.name for path in out.iterdir() if path.name not in (NUMBERS, PAGE, PICTURE)
    )
    if others:
        raise ValueError(
            f"out={str(out)!r} holds other files than statistics, such as {others[0]}; choose "
            "another"
        )
