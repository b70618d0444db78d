"""Tasks: their rows against the equations, and their source's resume."""

import math

import numpy as np
import pytest
from runs import assert_bitwise

from dsv3_jax.config import DataConfig, replace
from dsv3_jax.data import tokenizer
from dsv3_jax.data.batches import Source
from dsv3_jax.data.source import open_source
from dsv3_jax.presets import recipe
from experiments.lab import sources
from experiments.lab.tasks import (
    TASKS,
    Chains,
    Domains,
    Facts,
    ManyKeys,
    Names,
    Retrieval,
    ShiftingDomains,
    TaskSource,
    TwoHops,
    from_dict,
)

SMALL = [
    Facts(firsts=8, seconds=4, bits=2),
    TwoHops(entities=8, maps=4),
    Retrieval(tokens=24, keys=4, values=4),
    ManyKeys(planted=4, keys=8, values=4),
    Names(names=3, tokens=24),
    Domains(count=2, words=8, pairs=4, noise=0.25),
    Chains(states=3, order=2, tokens=20),
    ShiftingDomains(count=8, words=8, pairs=4, even=3, favoured=2, share=0.75, block=2),
]


def answers_of(task, count=200):
    rows = task.sample(np.random.default_rng(1), count)
    assert rows.tokens.shape == rows.answers.shape == rows.domains.shape == (count, task.length)
    return rows


def test_a_task_is_a_source_that_resumes():
    for task in SMALL:
        source = TaskSource(task, DataConfig(seq_len=task.length, batch_size=4, seed=3))
        assert isinstance(source, Source) and from_dict(task.to_dict()) == task
        assert len(SMALL) == len(TASKS)
        batches = source.train_batches()
        first, position, second = next(batches), batches.get_state(), next(batches)
        again = source.train_batches()
        again.set_state(position)
        np.testing.assert_array_equal(next(again)["tokens"], second["tokens"])
        assert (first["tokens"] != second["tokens"]).any() and first["loss_mask"].any()
        part = next(source.train_batches(rows=[2, 0]))
        np.testing.assert_array_equal(part["tokens"], first["tokens"][[2, 0]])
        assert part["documents"][:, 0].tolist() == [2, 0]
        other = TaskSource(task, replace(source.cfg, seed=4)).train_batches()
        with pytest.raises(ValueError, match="-4' is not the saved one"):
            other.set_state(position)


def test_a_last_held_out_batch_ends_in_padding():
    """A table has no more rows than it has."""
    source = TaskSource(SMALL[0], DataConfig(seq_len=3, batch_size=24))
    whole, last = source.val_batches(9)
    assert whole["segment_ids"].all() and whole["documents"][:, 0].tolist() == [*range(24)]
    assert last["segment_ids"].any(1).tolist() == [True] * 8 + [False] * 16


def test_the_text_is_encoded_once_for_all_seeds(tmp_path):
    for i, text in enumerate(("one text", "another text", "and a third one")):
        (tmp_path / f"{i}.txt").write_text(text * 20)
    run = recipe("tiny")
    data = replace(run.data, paths=(str(tmp_path),), seq_len=16, batch_size=2, val_fraction=0.4)
    sources._remembering.cache_clear()
    for seed in (0, 1):
        run = replace(run, data=replace(data, seed=seed))
        found = sources.source_of(run, None).train_batches()
        want = open_source(run.data, tokenizer.load(run.data.tokenizer)).train_batches()
        for _ in range(9):
            assert_bitwise(next(found), next(want))
    words = sources._remembering(run.data.tokenizer)
    assert words is sources._remembering(run.data.tokenizer)
    first, again = (next(words.encode_arrays(["one text" * 20])) for _ in range(2))
    assert first is again


def test_facts_are_a_fixed_table_and_held_out_rows_are_all_of_it():
    task = SMALL[0]
    rows = answers_of(task)
    a, b, c = rows.tokens.T
    np.testing.assert_array_equal(c - 8, task.table[a, b])
    assert rows.answers.tolist() == [[False, False, True]] * 200
    held = task.held_out(999).tokens
    assert len(held) == 32 and len({tuple(row) for row in held.tolist()}) == 32


def test_fewer_first_tokens_are_the_first_facts_of_the_same_table():
    """Facts of A/2 first tokens are rows of the facts of A, as 31's two phases need it."""
    every, half = Facts(), Facts(firsts=64)
    np.testing.assert_array_equal(half.table, every.table[:64])
    held = {tuple(row) for row in every.held_out(2**14).tokens.tolist()}
    assert {tuple(row) for row in half.held_out(2**14).tokens.tolist()} == {
        row for row in held if row[0] < 64
    }


def test_two_hops_follow_from_single_maps_and_held_out_triples_are_not_trained():
    """By dictionaries: they learn single maps from training rows, and follow one, then the other.

    So they answer each held-out triple: the optimum is 0 bits.
    """
    task, blank = SMALL[1], 3 * 8 + 2 * 4
    rows, held = answers_of(task, 4000), task.held_out(999)
    maps, seen = ({}, {}), set()
    for row, asked, kind in zip(
        rows.tokens.tolist(), rows.answers, rows.domains[:, 0], strict=True
    ):
        (place,) = np.flatnonzero(asked)
        if kind < 2:
            assert maps[kind].setdefault(tuple(row[place - 2 : place]), row[place]) == row[place]
            assert row[3 if kind == 0 else 0] == blank
        else:
            assert place == 3
            seen.add(tuple(row[:3]))
    for learnt in maps:  # each is a permutation of 8 entities
        assert len(learnt) == len({(key[1], value) for key, value in learnt.items()}) == 4 * 8

    kinds, tokens = held.domains[:, 0], held.tokens
    assert np.bincount(kinds).tolist() == [250, 250, 250, 249]
    for a, i, j, c in tokens[kinds >= 2].tolist():
        assert maps[1][maps[0][a, i], j] == c
    unseen = {tuple(row[:3]) for row in tokens[kinds == 3].tolist()}
    assert len(unseen) == 128 / 8 and len(seen) == 128 - 128 / 8 and not unseen & seen
    with pytest.raises(ValueError, match="unseen=0 holds 0 of 128 triples out"):
        replace(task, unseen=0)


def test_a_question_repeats_the_planted_value():
    task = SMALL[2]
    for tokens, answers in zip(*answers_of(task)[:2], strict=True):
        for pos in np.flatnonzero(answers):
            pair = (tokens[pos - 1] - 16) * 4 + tokens[pos] - 20
            assert list(tokens[:pos]).count(pair) == 1  # planted once, before it
    rows = task.questions(24, 10, 50).tokens
    np.testing.assert_array_equal(rows[:, 13], (rows[:, -2] - 16) * 4 + rows[:, -1] - 20)


def test_domains_have_maps_of_their_own_and_noise_of_known_entropy():
    task = SMALL[5]
    rows = answers_of(task, 5000)
    domain, x, y = rows.domains[:, :1], rows.tokens[:, 1::2], rows.tokens[:, 2::2]
    assert (rows.tokens[:, :1] == 8 + domain).all() and task.domains == ("domain 0", "domain 1")
    q = 0.75 + 0.25 / 8
    assert (y == task.maps[domain, x]).mean() == pytest.approx(q, abs=0.01)
    # The optimum is the entropy of the distribution that this share says: one right answer, seven
    # even wrong ones.
    assert task.best_bits == pytest.approx(-q * math.log2(q) - (1 - q) * math.log2((1 - q) / 7))


def test_the_mix_of_domains_shifts_at_a_batch_and_again_after_each_block():
    task, count = SMALL[7], 4000
    high, low, even = 0.375, 0.25 / 6, 1 / 8
    wanted = {
        0: [even] * 8,
        2: [even] * 8,
        3: [high, high, low, low, low, low, low, low],
        4: [high, high, low, low, low, low, low, low],
        5: [low, low, high, high, low, low, low, low],
        10: [low, low, low, low, low, low, high, high],
        11: [high, high, low, low, low, low, low, low],
    }
    for batch, shares in wanted.items():
        rows = task.sample_at(batch, np.random.default_rng(batch), count)
        found = np.bincount(rows.domains[:, 0], minlength=8) / count
        np.testing.assert_allclose(found, shares, atol=5 * math.sqrt(high / count))
        x, y = rows.tokens[:, 1::2], rows.tokens[:, 2::2]
        np.testing.assert_array_equal(y, task.maps[rows.domains[:, :1], x])
        assert (rows.tokens[:, 0] == 8 + rows.domains[:, 0]).all()
    still = replace(task, block=None)
    np.testing.assert_array_equal(still.mix(99), task.mix(3))
    held = np.bincount(task.held_out(count).domains[:, 0], minlength=8) / count
    np.testing.assert_allclose(held, even, atol=5 * math.sqrt(even / count))


def test_the_mix_of_a_training_step_is_that_of_its_batch():
    """Where a batch has one domain, its number is that of the block, also after a resume."""
    task = replace(SMALL[7], favoured=1, share=1.0, even=2, block=1)
    batches = TaskSource(task, DataConfig(seq_len=task.length, batch_size=64)).train_batches()
    seen = [set(next(batches)["domains"].ravel().tolist()) for _ in range(5)]
    assert seen[:2] == [set(range(8))] * 2 and seen[2:] == [{0}, {1}, {2}]
    batches.set_state(batches.get_state() | {"row": 64 * 9})
    assert set(next(batches)["domains"].ravel().tolist()) == {7}


def test_a_shift_that_is_none_is_one_sentence():
    for changes, sentence in (
        ({"favoured": 8}, "favoured=8 is not 1 … 7 domains"),
        ({"share": 1.5}, "share=1.5 is not in"),
        ({"block": 0}, "block=0 "),
        ({"even": -1}, "even=-1 "),
        ({"together": True}, "together=True "),
    ):
        with pytest.raises(ValueError, match=sentence):
            replace(SMALL[7], **changes)
