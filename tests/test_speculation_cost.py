"""The cost model of speculative decoding: its limits."""

import sys

import pytest
from runs import HERE

from dsv3_jax.config import replace
from dsv3_jax.model.counting import decode_bytes
from dsv3_jax.presets import preset

sys.path.insert(0, str(HERE / "experiments" / "07_speculation"))
from model_of_time import Setting, best_length, speed_up, step_cost, verify_parts

V3 = preset("v3")
MEMORY = Setting(bandwidth=1.0, peak=1e30, weight_bytes=1)  # only reading takes time
PRODUCTS = Setting(bandwidth=1e30, peak=1.0, weight_bytes=1)  # only products do
DENSE = replace(V3, num_dense_layers=V3.num_layers, num_layers=V3.num_layers, mtp_kind="eagle")


def test_a_plain_step_reads_what_decode_bytes_counts():
    for batch in (1, 7):
        parts = verify_parts(V3, MEMORY._replace(context=50), batch, 1)
        per_token = 61 * 576 * 2
        assert sum(p.bytes for p in parts.values()) == pytest.approx(
            decode_bytes(V3, batch, 50, per_token, weight_bytes=1), rel=1e-9
        )


def test_a_dense_trunk_that_waits_for_memory_verifies_for_nothing():
    assert step_cost(DENSE, MEMORY, 1, 4)[0] == pytest.approx(1, abs=1e-12)
    assert speed_up(replace(DENSE, mtp_depth=0), MEMORY, 1, 4, 1.0) == pytest.approx(5)


def test_where_products_take_the_time_every_draft_costs_a_token():
    """The limit of large batches, in which even drafts that are all accepted do not pay."""
    for batch in (1, 10**6):
        verify, draft = step_cost(V3, PRODUCTS, batch, 3)
        assert verify == pytest.approx(4, rel=1e-6) and draft > 0
        assert speed_up(V3, PRODUCTS, batch, 3, 1.0) < 1
        assert best_length(V3, PRODUCTS, batch, 1.0, (1, 2, 4)) == (0, 1.0)


def test_experts_of_a_first_draft_cost_most_between_one_token_and_all():
    """At batch 1 a second token brings new experts; at batches that reach all of them it brings none."""
    few, some, many = (step_cost(V3, MEMORY, batch, 1)[0] for batch in (1, 16, 4096))
    assert some > few > many and many == pytest.approx(1, abs=1e-6)
