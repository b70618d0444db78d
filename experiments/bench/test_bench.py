"""The benchmarks on the CPU: every case at a toy size, and the bytes of a decoding step by hand."""

import itertools
import json
import math

import pytest
from flax import nnx
from models import LIGHT, small

import dsv3_jax as ds
from dsv3_jax.model.counting import distinct_experts
from dsv3_jax.model.transformer import abstract
from experiments.apart import Failed
from experiments.bench import cases, commits, decode, harness, train_step
from experiments.bench.copying import decode_bytes
from experiments.scale import plans

TOY_CASES = {
    "commits": dict(against=[], cells=["16x2", "step"], rounds=2),
    "step": dict(rounds=2),
    "caches": dict(cells=["16x2", "8x1"], rounds=1),
}


class Peer:
    """In place of transformers: a training step takes a second, a decoding step 50 of them."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, steps=0, batch=1, context=1, **_):
        if steps:
            return {"seconds": [1.0] * steps, "loss": [3.0] * steps, "peak_rss_bytes": 1}
        sizes = {"cache_bytes": 1, "cache_bytes_per_token": 1, "peak_rss_bytes": 1}
        return {"prefill_seconds": float(context * batch), "step_seconds": 50.0} | sizes


@pytest.fixture
def toy(monkeypatch, tmp_path):
    cfg = ds.replace(LIGHT, max_positions=512)
    monkeypatch.setattr(ds, "preset", lambda name: cfg)
    monkeypatch.setattr(train_step, "MINI", cfg)
    monkeypatch.setattr(decode, "MINI", cfg)
    monkeypatch.setattr(commits, "MINI", cfg)
    monkeypatch.setattr(decode, "TOGETHER", 8)
    monkeypatch.setattr(decode, "copy_bandwidth", lambda: 1e9)
    monkeypatch.delitem(decode.SIDES, "expanded")
    monkeypatch.setattr(harness, "start_peer", lambda *_, **__: Peer())
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results.json")
    harness.RESULTS.write_text("{}")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.rare] * (c != "commits")) for c in TOY_CASES]
)
@pytest.mark.long
def test_cases_measure_and_store_rows(case, toy, monkeypatch):
    words = [f"{key}={json.dumps(value)}" for key, value in TOY_CASES[case].items()]
    monkeypatch.setattr("sys.argv", ["cases.py", case, *words])
    cases.main()
    rows = harness.load()[case]
    assert all("machine" in row for row in rows.values())
    numbers = [n for row in rows.values() for n in row.values() if isinstance(n, int | float)]
    assert all(math.isfinite(n) and n >= 0 for n in numbers)
    if case == "step":
        assert rows["transformers, grouped_mm"]["tokens_per_s"] == train_step.TOKENS
        peers = [row["against_best_peer"] for name, row in rows.items() if "transf" in name]
        assert peers == [1, 1, 1]
    if case == "caches":
        assert rows["16x2, transformers"]["prefill_tokens_per_s"] == 1
        assert rows["16x2, transformers"]["step_over_peer"] == 1
    if case == "commits":
        assert [rows[f"{cell}, this tree"]["step_over"] for cell in ("16x2", "step")] == [1, 1]


def test_unknown_names_are_errors(monkeypatch, capsys):
    for words, message in {
        ("stp",): "case='stp' is not one of step, ",
        ("step", "runs=1"): "'runs' is not a setting of step",
    }.items():
        monkeypatch.setattr("sys.argv", ["cases.py", *words])
        with pytest.raises(SystemExit):
            cases.main()
        assert message in capsys.readouterr().err


def test_sides_change_their_order_and_ratios_are_of_one_turn():
    calls = []
    sides = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert harness.in_turns(sides, 2) == {"a": [3, 6], "b": [4, 5]}  # after an uncounted round
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert harness.ratio([1, 2, 9], [2, 4, 3]) == 0.5


def test_the_page_of_plans_has_the_tables_of_its_results():
    results = json.loads(plans.RESULTS.read_text())
    assert plans.tables(results) in (plans.HERE / "README.md").read_text()
    stored = {(group, key) for group, rows in results.items() for key in rows}
    assert {(group, key) for group, key, _ in plans.cases()} == stored


@pytest.mark.long
def test_a_worker_reports_its_error():
    with pytest.raises(Failed, match="seq_len=512 is"):
        train_step.start_ours(LIGHT)


@pytest.mark.parity
def test_the_peer_trains_and_decodes():
    cfg = ds.replace(ds.preset("mini"), num_layers=2, dim=64, dense_dim=64, vocab_size=64)
    with harness.start_peer(cfg, None, batch=1, length=8) as peer:
        first, *_ = peer.ask(steps=1)["loss"]
    assert first == pytest.approx(math.log(64), rel=0.1)
    with harness.start_peer(cfg, None, decoding=True) as peer:
        reply = peer.ask(batch=2, context=8, new_tokens=3, prefill_chunk=4)
    assert reply["cache_bytes"] == 2 * 10 * reply["cache_bytes_per_token"]


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_distinct_experts_are_the_mean_over_all_choices(tokens):
    cfg = small(num_experts=4, experts_per_token=2, num_groups=1, groups_per_token=1)
    choices = list(itertools.combinations(range(4), 2))
    unions = [len(set().union(*chosen)) for chosen in itertools.product(choices, repeat=tokens)]
    assert distinct_experts(cfg, tokens) == pytest.approx(sum(unions) / len(unions), rel=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        dict(mtp_depth=1),
        dict(tie_embeddings=True),
        dict(num_dense_layers=0),
        dict(num_dense_layers=3),
    ],
    ids=str,
)
def test_bytes_of_a_step_are_those_of_the_parameters(changes):
    """Walk over the parameters: experts by the share read; no untied embedding, no MTP."""
    cfg = small(**changes)
    one = cfg.experts_per_token / cfg.num_experts
    for batch, share in {1: one, 2: 1 - (1 - one) ** 2}.items():
        total = 0.0
        for path, param in nnx.to_flat_state(nnx.state(abstract(cfg), nnx.Param)):
            if path[0] == "mtp" or (path[0] == "embed" and not cfg.tie_embeddings):
                continue
            total += math.prod(param.shape) * (share if "experts" in path else 1)
        for weight in (4, 2):
            # `active` is rounded to whole parameters: half of one may be lost
            assert decode_bytes(cfg, batch, 10, 7, weight_bytes=weight) == pytest.approx(
                weight * total + batch * 70, abs=weight * 0.5
            )
