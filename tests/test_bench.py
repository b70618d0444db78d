"""The decoding benchmark: the bytes of its bound, counted by hand, and the command on a finished run."""

import itertools
import json
import math
from dataclasses import replace

import pytest
from flax import nnx
from models import small
from runs import said_by

from dsv3_jax.cli import bench
from dsv3_jax.cli.bench import Cell, Decode
from dsv3_jax.decoding.generate import Generated
from dsv3_jax.model.counting import distinct_experts
from dsv3_jax.model.transformer import abstract
from experiments.bench.copying import decode_bytes


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
    """Walk over the parameters: experts count by the share that is read, an untied embedding and MTP not at all."""
    model = abstract(cfg)
    share = {1: cfg.experts_per_token / cfg.num_experts}
    share[2] = 1 - (1 - share[1]) ** 2
    for batch in (1, 2):
        total = 0.0
        for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            if path[0] == "mtp" or (path[0] == "embed" and not cfg.tie_embeddings):
                continue
            total += math.prod(param.shape) * (share[batch] if "experts" in path else 1)
        # `active` is rounded to whole parameters: half of one may be lost
        assert decode_bytes(cfg, batch, 10, 7) == pytest.approx(4 * total + batch * 10 * 7, abs=4 * 0.5)
        assert decode_bytes(cfg, batch, 10, 7, weight_bytes=2) == pytest.approx(2 * total + batch * 70, abs=2 * 0.5)


def test_timings_are_medians_of_the_results_of_generate():
    seconds = (9.0, 8.0), (3.0, 4.0), (2.0, 1.0)  # of prefill, and of decoding
    made = [Generated([[1] * 5] * 2, [], 4, *pair, 0, 28) for pair in seconds]
    found = bench.timing(Cell(2, 30, "latent", "float32", "none", 0), made)
    assert found["prefill_tokens_per_s"] == 2 * 30 / 3
    assert found["ms_per_token"] == 1000 * 4 / 4
    assert found["tokens_per_s"] == 2 * 4 / 4


@pytest.fixture
def options(whole):
    return Decode(whole.folder, batch=(2,), context=(16,), new_tokens=6, rounds=1)


@pytest.mark.long
def test_a_run_is_timed(options, tmp_path):
    options = replace(options, draft=("none", "mtp"), json=tmp_path / "o.json")
    options = replace(options, cache=("latent", "none"))
    code, printed = said_by(bench.decode, options)
    report = json.loads(options.json.read_text())
    assert code == 0 and report["step"] == 12
    cells = [(cell["cache"], cell["draft"], cell["draft_length"]) for cell in report["cells"]]
    cached = [("latent", "none", 0), ("latent", "mtp", 1)]
    assert cells == [*cached, ("none", "none", 0)]  # no lengths without a draft, and no drafts without a cache
    assert "latent float32" in printed and "mtp 1" in printed and "kernels for cpu: " in printed
    plain, drafted, *_ = report["cells"]
    for cell in (plain, drafted):
        assert cell["cache_bytes_per_token"] == 2 * 7 * 4
        assert cell["tokens_per_s"] == pytest.approx(2 * 1e3 / cell["ms_per_token"])
        assert cell["tokens_per_step"] == pytest.approx(1 + sum(cell["acceptance"]))
    assert plain["acceptance"] == [] and len(drafted["acceptance"]) == 1


def test_bad_options_are_refused(options):
    for changes, sentence in (
        ({"rounds": 0}, "rounds=0 is below 1"),
        ({"context": ()}, "context is empty"),
        ({"context": (60,)}, "max_new_tokens=6 does not fit: the longest prompt has 60"),
    ):
        with pytest.raises(ValueError, match=sentence):
            bench.decode(replace(options, **changes))
