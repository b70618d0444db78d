"""The decoding benchmark: the bytes of its bound by brute count, and the command on a finished run."""

import itertools
import json
from dataclasses import replace

import pytest
from flax import nnx
from models import small
from runs import cheap_compiles, finished, said_by

from dsv3_jax import bench
from dsv3_jax.bench import Cell, Decode
from dsv3_jax.counting import decode_bytes, distinct_experts
from dsv3_jax.generate import Generated
from dsv3_jax.modules.moe import ExpertParam
from dsv3_jax.modules.transformer import abstract
from dsv3_jax.runtime import copy_bandwidth


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_distinct_experts_are_the_mean_over_all_choices(tokens):
    cfg = small(num_experts=4, experts_per_token=2, num_groups=1, groups_per_token=1)
    choices = list(itertools.combinations(range(4), 2))
    unions = [len(set().union(*chosen)) for chosen in itertools.product(choices, repeat=tokens)]
    assert distinct_experts(cfg, tokens) == pytest.approx(sum(unions) / len(unions), rel=1e-12)


@pytest.mark.parametrize(
    "cfg",
    [small(mtp_depth=1), small(tie_embeddings=True), small(num_dense_layers=0), small(num_dense_layers=3)],
    ids=["untied", "tied", "all sparse", "all dense"],
)
def test_bytes_of_a_step_are_those_of_the_parameters(cfg):
    """Walk over the parameters: experts count by the share that is reached, an untied embedding and MTP not at all."""
    model = abstract(cfg)
    share = {1: cfg.experts_per_token / cfg.num_experts}
    share[2] = 1 - (1 - share[1]) ** 2
    for batch in (1, 2):
        total = 0.0
        for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            if path[0] == "mtp" or (path[0] == "embed" and not cfg.tie_embeddings):
                continue
            total += param[...].size * (share[batch] if isinstance(param, ExpertParam) else 1)
        # active is a whole number of parameters, so half of one may be lost
        assert decode_bytes(cfg, batch, 10, 7) == pytest.approx(4 * total + batch * 10 * 7, abs=4 * 0.5)
        assert decode_bytes(cfg, batch, 10, 7, weight_bytes=2) == pytest.approx(2 * total + batch * 70, abs=2 * 0.5)


def test_timings_are_medians_of_what_generate_says():
    model = abstract(small())
    made = [Generated([[1] * 5] * 2, [], 4, prefill, decoding, 0, 28) for prefill, decoding in ((9, 8), (3, 4), (2, 1))]
    found = bench.timing(model, Cell(2, 30, "latent", "float32", "none", 0), made, bandwidth=1000.0)
    assert found.prefill_tokens_per_s == 2 * 30 / 3
    assert found.ms_per_token == 1000 * 4 / 4
    assert found.tokens_per_s == 2 * 4 / 4
    assert found.share_of_bound == decode_bytes(model.cfg, 2, 30 + 2.5, 28) / 1000 / (4 / 4)
    for cell in (Cell(2, 30, "none", "", "none", 0), Cell(2, 30, "latent", "float32", "mtp", 1)):
        assert bench.timing(model, cell, made, bandwidth=1000.0).share_of_bound is None


def test_bandwidth_is_measured():
    assert 1e8 < copy_bandwidth(seconds=0.01, size=1 << 20) < 1e13


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    with cheap_compiles(root):
        yield finished(root)


@pytest.fixture
def options(whole):
    return Decode(whole.folder, batch=(2,), context=(16,), new_tokens=6, rounds=1)


def test_prompts_are_held_out_text(whole):
    prompts = bench.held_out_prompts(whole.run, 3, 16)
    assert [len(p) for p in prompts] == [16] * 3 and len(set(map(tuple, prompts))) == 3
    starts = {tuple(p[:5]) for p in prompts}
    held_out = bench.load_corpus(whole.run.data).val
    assert starts <= {tuple(bench.tokenizer.load("bytes").encode(d.text)[:5]) for d in held_out}


def test_every_combination_is_timed_once(options, tmp_path):
    options = replace(options, cache=("latent", "none"), cache_dtype=("float32", "bfloat16"), json=tmp_path / "o.json")
    code, said = said_by(bench.decode, options)
    report = json.loads(options.json.read_text())
    assert code == 0 and report["step"] == 12 and report["copy_bandwidth"] > 0
    kinds = [(cell["cache"], cell["cache_dtype"]) for cell in report["cells"]]
    assert kinds == [("latent", "float32"), ("latent", "bfloat16"), ("none", "")]  # without a cache no dtype of it
    exact, half, recomputed = report["cells"]
    assert (exact["cache_bytes_per_token"], half["cache_bytes_per_token"]) == (2 * 7 * 4, 2 * 7 * 2)
    assert exact["share_of_bound"] > 0 and recomputed["share_of_bound"] is None
    for cell in report["cells"]:
        assert cell["tokens_per_step"] == 1 and cell["acceptance"] == []
        assert cell["tokens_per_s"] == pytest.approx(2 * 1e3 / cell["ms_per_token"])
        assert f"{cell['cache']} {cell['cache_dtype']}".strip() in said


def test_drafts_are_timed(options, tmp_path):
    options = replace(options, draft=("mtp",), draft_length=(2,), json=tmp_path / "o.json")
    code, said = said_by(bench.decode, options)
    (cell,) = json.loads(options.json.read_text())["cells"]
    assert code == 0 and "mtp 2" in said
    assert len(cell["acceptance"]) == 2 and cell["tokens_per_step"] == pytest.approx(1 + sum(cell["acceptance"]))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"new_tokens": 1}, "new_tokens=1"),
        ({"batch": (1, 0)}, "batch=0 is below 1"),
        ({"rounds": 0}, "rounds=0 is below 1"),
        ({"context": ()}, "context is empty"),
        ({"context": (60,)}, "60 tokens and 6 new ones do not fit"),
        ({"context": (99_999,)}, "context=99999 is more than the"),
        ({"draft": ("nowhere",)}, "nowhere holds no run"),
        ({"draft": ("mtp",), "draft_length": (0,)}, "draft_length=0 is below 1"),
    ],
)
def test_bad_options_are_one_sentence(options, changes, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        bench.decode(replace(options, **changes))
    assert "\n" not in str(raised.value)
