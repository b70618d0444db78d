"""Settings by pairs: how rows are made, and a few of them. `make pairs` does all.

$PAIRS names a folder that remembers the rows that are done, so that the same command resumes.
"""

import hashlib
import os
from collections import defaultdict
from functools import partial
from itertools import chain, product
from operator import attrgetter
from pathlib import Path

import jax
import pytest
from pairs import decoding, settings, training
from pairs.covering import cover, pairs_of, refusal

from dsv3_jax.config import to_dict

DONE = os.environ.get("PAIRS")
AREAS = {"training": (training, settings), "decoding": (decoding, decoding)}


def test_each_two_values_meet_or_are_refused():
    factors = {name: dict.fromkeys(range(3)) for name in "abcdef"}
    bases = [dict.fromkeys("abcdef", 0), dict.fromkeys("abcdef", 1)]

    def refusal(row):
        return "no" if row["a"] == row["b"] == 2 or (row["c"] == 2 and row["d"] != 1) else None

    accepted, refused = cover(factors, bases, refusal)
    assert (accepted, refused) == cover(factors, bases, refusal) and not any(map(refusal, accepted))
    left = pairs_of(map(dict, product(*([(name, x) for x in range(3)] for name in "abcdef"))))
    left -= pairs_of(accepted)
    assert left == {
        frozenset([("a", 2), ("b", 2)]),
        frozenset([("c", 2), ("d", 0)]),
        frozenset([("c", 2), ("d", 2)]),
    }
    assert all(refusal(row) for row in refused) and left <= pairs_of(refused)
    assert len(accepted) < 20  # of 729


def test_each_field_of_the_model_and_each_value_that_a_type_lists_is_tried():
    tried = defaultdict(set)
    for changes in chain.from_iterable(values.values() for values in settings.FACTORS.values()):
        for name, value in changes.items():
            tried[name].add(value)

    for name in leaves(to_dict(settings.RUN)):
        found = tried[name] | {attrgetter(name)(settings.RUN)}
        single = {x for value in found for x in (value if isinstance(value, tuple) else [value])}
        assert single >= {*settings.listed(settings.kind_of(name))}, name
        assert len(found) > 1 or not name.startswith("model."), name


def leaves(values, prefix=""):
    """The names, with dots, of all settings in a configuration."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


# A few rows, by what is not usual in them.
SPARSE = "attention=dsa, shared FP8; batch=2; routing=yes; log p=yes; capacity=1"
ROWS = [
    ("training", "start=FP8; lora=all; microbatches=2; remat=full; positions=YaRN"),
    ("decoding", f"draft=mtp, 2; heads=deepseek; {SPARSE}"),
    ("decoding", "draft=lookup; sampling=p 0.7; samples=3; cache=expanded; stop=half; log p=yes"),
]
REFUSED = [
    ("start=int4", "has weights of 4 bits, which do not train; use lora, or convert it"),
    ("start=run; lora=attention; QK-clip=0.1", "is not supported with optim.qk_clip=0.1"),
    ("start=none; how=GRPO", "name it with start"),
]


def row_of(area, unusual):
    return settings.bases(AREAS[area][1].FACTORS, unusual)[0]


def all_rows():
    """(Area, row, its expected verdict): each two values meet, or are refused."""
    for area, (module, of) in AREAS.items():
        plan = partial(module.Plan, scratch=Path("nowhere"))
        accepted, refused = cover(of.FACTORS, of.BASES, partial(refusal, plan))
        yield from ((area, row, "done") for row in accepted)
        yield from ((area, row, "refused") for row in refused)


def said(value):
    """A row's unusual values, in the name of its test."""
    if not isinstance(value, dict):
        return value
    factors = decoding.FACTORS if "draft" in value else settings.FACTORS
    return "; ".join(f"{k}={v}" for k, v in value.items() if v != next(iter(factors[k])))


@pytest.fixture(scope="module")
def scratch(root):
    training.write_data(root / "pairs")
    return root / "pairs"


@pytest.mark.rare
@pytest.mark.parametrize(
    ("area", "row", "expected"),
    list(all_rows()) if DONE else [(area, row_of(area, text), "done") for area, text in ROWS],
    ids=said,
)
def test_a_row(area, row, expected, scratch):
    done = Path(DONE or scratch, hashlib.sha256(f"{area} {row}".encode()).hexdigest())
    if done.exists():
        pytest.skip("it is done")
    verdict = AREAS[area][0].check_row(row, scratch)
    jax.clear_caches()
    if expected == "done" and verdict.startswith("refused"):
        pytest.xfail(f"{verdict}, later than it was expected")
    assert verdict.startswith(expected)
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(verdict)


@pytest.mark.parametrize(("unusual", "sentence"), REFUSED)
def test_what_cannot_be_is_refused_before_a_run_has_a_folder(unusual, sentence, scratch):
    verdict = training.check_row(row_of("training", unusual), scratch)
    assert verdict.startswith("refused: ") and sentence in verdict
