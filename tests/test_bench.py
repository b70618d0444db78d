"""The decoding benchmark: the bytes of its bound, counted by hand."""

import itertools
import math

import pytest
from flax import nnx
from models import small

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
    [
        small(mtp_depth=1),
        small(tie_embeddings=True),
        small(num_dense_layers=0),
        small(num_dense_layers=3),
    ],
    ids=["untied", "tied", "all sparse", "all dense"],
)
def test_bytes_of_a_step_are_those_of_the_parameters(cfg):
    """Walk over the parameters: experts by the share read; no untied embedding, no MTP."""
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
        assert decode_bytes(cfg, batch, 10, 7) == pytest.approx(
            4 * total + batch * 10 * 7, abs=4 * 0.5
        )
        assert decode_bytes(cfg, batch, 10, 7, weight_bytes=2) == pytest.approx(
            2 * total + batch * 70, abs=2 * 0.5
        )
