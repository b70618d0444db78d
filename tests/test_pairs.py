"""Settings by pairs: how rows are made, and a few of them. `make pairs` does all."""

from itertools import combinations

import pytest
from pairs import decoding, training
from pairs.covering import cover, pairs_of


def test_each_two_values_meet_or_are_refused():
    factors = {name: dict.fromkeys(range(3)) for name in "abcdef"}
    bases = [dict.fromkeys("abcdef", 0), dict.fromkeys("abcdef", 1)]

    def refusal(row):
        return "no" if row["a"] == row["b"] == 2 or (row["c"] == 2 and row["d"] != 1) else None

    accepted, refused = cover(factors, bases, refusal)
    assert (accepted, refused) == cover(factors, bases, refusal) and not any(map(refusal, accepted))
    every = {
        frozenset([(a, x), (b, y)])
        for a, b in combinations("abcdef", 2)
        for x in range(3)
        for y in range(3)
    }
    left = every - pairs_of(accepted)
    assert left == {
        frozenset(pair)
        for pair in ([("a", 2), ("b", 2)], [("c", 2), ("d", 0)], [("c", 2), ("d", 2)])
    }
    assert all(refusal(row) for row in refused) and left <= pairs_of(refused)
    assert len(accepted) < 20  # of 729


ROW = {"start": "FP8", "lora": "all", "microbatches": "2", "remat": "full", "positions": "YaRN"}
DECODING = {
    "sparse attention, drafts, routing": {
        "draft": "mtp, 2", "heads": "deepseek", "attention": "dsa, shared FP8", "batch": "2",
        "routing": "yes", "log p": "yes", "capacity": "1",
    },
    "samples, lookup, 8 bits": {
        "draft": "lookup", "sampling": "p 0.7", "samples": "3", "cache": "expanded",
        "stop": "half", "log p": "yes",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def scratch(root):
    training.write_data(root / "pairs")
    return root / "pairs"


@pytest.mark.rare
def test_a_row_trains_resumes_and_decodes(scratch):
    """LoRA on an FP8 folder, with microbatches and recomputation."""
    assert training.check_row(training.BASES[0] | ROW, scratch) == training.DONE


@pytest.mark.rare
@pytest.mark.parametrize("row", DECODING.values(), ids=DECODING)
def test_a_row_decodes(row):
    assert decoding.check_row(decoding.BASES[0] | row) == decoding.DONE


def test_what_cannot_be_is_refused_before_a_run_has_a_folder(scratch):
    for row, sentence in (
        ({"start": "int4"}, "has weights of 4 bits, which do not train; use lora, or convert it"),
        (
            {"start": "run", "lora": "attention", "QK-clip": "0.1"},
            "is not supported with optim.qk_clip=0.1",
        ),
        ({"start": "none", "how": "GRPO"}, "name it with start"),
    ):
        verdict = training.check_row(training.BASES[0] | row, scratch)
        assert verdict.startswith("refused: ") and sentence in verdict
