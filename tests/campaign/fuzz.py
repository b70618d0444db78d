"""JSON that Hypothesis makes: config.json, run.json, metrics.jsonl, load.jsonl and tokenizer.json of any values.

A reader must accept a file or refuse it with a sentence. An accepted file must be usable: a run is written and read
again, rows are drawn, and a tokenizer encodes a text. Hypothesis shrinks a file that falls short, and prints it. The
campaign is left out if Hypothesis is not installed. The readers run in a separate process, because a tokenizer may
crash.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tokenizers

from dsv3_jax.config import RunConfig, to_dict
from dsv3_jax.data import tokenizer
from dsv3_jax.hf.config_json import config_from_dict, config_to_dict
from dsv3_jax.presets import preset, recipe
from dsv3_jax.report.metrics import LOAD_FILE, METRICS_FILE, parse_rows
from dsv3_jax.report.run_plots import PANELS, _curves
from dsv3_jax.stats import read_load
from dsv3_jax.training.run_folder import FORMAT, RUN_FILE, read_run
from tests.campaign.trials import MAX_SENTENCE, Table, report, watch
from tests.campaign.watch import LIMIT_S, ROOT

ROUNDS = 1_000_000  # from the seed of a round to that of the next
ROUND = 200  # files that Hypothesis makes before it begins again with another seed


# Readers: each gets an empty folder and the content of a file


def read_config(folder: Path, values: object) -> None:
    cfg = config_from_dict(values)  # type: ignore[arg-type]
    assert json.dumps(to_dict(cfg)) and cfg.num_layers >= 1


def run_file(run: RunConfig) -> dict:
    return {"format": FORMAT, "run": to_dict(run), "kernels": {}, "made": [], "history": []}


def read_run_file(folder: Path, values: object) -> None:
    (folder / RUN_FILE).write_text(json.dumps(values))
    run = read_run(folder)
    (folder / RUN_FILE).write_text(json.dumps(run_file(run)))
    assert read_run(folder) == run


def read_metrics(folder: Path, rows: list) -> None:
    path = folder / METRICS_FILE
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, bad = parse_rows(path)
    assert len(found) + len(bad) == len(rows)
    for _, _, curves in PANELS:
        for curve in curves:
            list(_curves(found, *curve))


def read_loads(folder: Path, rows: list) -> None:
    (folder / LOAD_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = read_load(folder)
    assert log is None or log.load.ndim == 3 or log.load.size == 0


def read_tokenizer(folder: Path, values: object) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(values))
    found = tokenizer.load(str(folder))
    assert all(0 <= i < found.vocab_size for i in found.encode("to be é"))


def good_tokenizer() -> dict:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "to": 1, "be": 2}, unk_token="be"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<eos>"])
    return json.loads(inner.to_str())


ROW = {"step": 3, "loss": 2.0, "mtp_loss": [2.5], "val_loss": 2.0, "mtp_acceptance": [0.5], "lr": 1e-3,
       "kernels": {"product": "cpu"}, "max_vio": 0.5, "tokens_per_s": 9.0}  # fmt: skip
READERS: dict[str, Callable] = {
    "config.json": read_config, "run.json": read_run_file, "metrics.jsonl": read_metrics, "load.jsonl": read_loads,
    "tokenizer.json": read_tokenizer,
}  # fmt: skip


def files(name: str):
    """Hypothesis' strategy for the content of a file: anything, or a good one with some values changed."""
    from hypothesis import strategies as st

    numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**399, 1e308, 5e-324])
    atoms = st.none() | st.booleans() | numbers | st.text(max_size=8)
    anything = st.recursive(
        atoms, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=8,
    )  # fmt: skip

    def like(good: object):
        """Values like a good one: the same, or changed at some depth, or anything."""
        if isinstance(good, dict):
            inner = st.fixed_dictionaries({}, optional={key: like(value) for key, value in good.items()})
            more = st.dictionaries(st.sampled_from([*good, "", "x"]), anything, max_size=2)
            whole = st.builds(lambda *parts: good | {k: v for part in parts for k, v in part.items()}, inner, more)
            return whole | inner
        same = st.just(good)
        if isinstance(good, list):
            items = like(good[0]) if good else anything
            return same | st.lists(items, max_size=3) | anything
        return same | same | same | anything

    if name == "config.json":
        good = config_to_dict(preset("v3"))
        good["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
        return like(good) | anything
    if name == "run.json":
        return like(run_file(recipe("tiny"))) | anything
    if name == "metrics.jsonl":
        return st.lists(like(ROW) | anything, max_size=5)
    if name == "load.jsonl":
        counts = st.integers(0, 9) | anything
        matrix = st.lists(st.lists(counts, min_size=2, max_size=2) | st.lists(counts, max_size=3), max_size=2)
        tables = {"load": matrix | anything}
        row = st.fixed_dictionaries({"step": st.integers(0, 9)} | tables, optional={"bias": matrix | anything})
        return st.lists(row, max_size=4)
    return like(good_tokenizer()) | anything


def read_files(name: str, seconds: float, seed: int) -> None:
    """Read files of one format for so long, and print how many; an exception where one falls short."""
    import hypothesis

    count, until = 0, time.monotonic() + seconds

    def check(content: object) -> None:
        nonlocal count
        if time.monotonic() > until:
            return
        count += 1
        with tempfile.TemporaryDirectory() as folder:
            try:
                READERS[name](Path(folder), content)
            except ValueError as error:
                assert str(error) and len(str(error)) <= 40 * MAX_SENTENCE, "no sentence"  # the command line cuts it

    while time.monotonic() < until:
        made = hypothesis.given(files(name))(check)
        settings = hypothesis.settings(
            max_examples=ROUND, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        hypothesis.seed(seed)(settings(made))()
        seed += ROUNDS
    print(f"count {count}", file=sys.stderr)


def run(until: float, seed: int, table: Table, least: int) -> None:
    """Read files until a time, an equal time for each kind, each in a separate process."""
    if importlib.util.find_spec("hypothesis") is None:
        print("fuzz: left out: the package hypothesis is not installed")
        return
    for i, name in enumerate(READERS):
        seconds = max((until - time.monotonic()) / (len(READERS) - i), 1.0)
        argv = [sys.executable, "-m", "tests.campaign.fuzz", name, str(seconds), str(seed)]
        process = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        ended = watch(process, 10 * seconds + 4 * LIMIT_S)  # shrinking takes longer
        counted = re.findall(r"^count (\d+)$", ended.err, re.MULTILINE)
        faults = [] if counted else ["hangs" if ended.code is None else "tracebacks"]
        table.add(f"fuzz: {name}", faults, max(1, *map(int, counted)) if counted else 1)
        report("fuzz", seed, 0, name, faults, ended.err)


if __name__ == "__main__":
    read_files(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
