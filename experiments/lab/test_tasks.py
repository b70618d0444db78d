"""Tasks: their rows against the equations, and their source's resume."""

import math

import numpy as np
import pytest

from dsv3_jax.config import DataConfig, replace
from dsv3_jax.data.batches import Source
from experiments.lab.tasks import (
    TASKS,
    Chains,
    Domains,
    Facts,
    ManyKeys,
    Names,
    Retrieval,
    TaskSource,
    from_dict,
)

SMALL = [
    Facts(firsts=8, seconds=4, bits=2),
    Retrieval(tokens=24, keys=4, values=4),
    ManyKeys(planted=4, keys=8, values=4),
    Names(names=3, tokens=24),
    Domains(count=2, words=8, pairs=4, noise=0.25),
    Chains(states=3, order=2, tokens=20),
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
        part = source.train_batches(rows=[2, 0])
        np.testing.assert_array_equal(next(part)["tokens"], first["tokens"][[2, 0]])
        other = TaskSource(task, replace(source.cfg, seed=4)).train_batches()
        with pytest.raises(ValueError, match="-4' is not the saved one"):
            other.set_state(position)


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


def test_a_question_repeats_the_planted_value():
    task = SMALL[1]
    for tokens, answers in zip(*answers_of(task)[:2], strict=True):
        for pos in np.flatnonzero(answers):
            pair = (tokens[pos - 1] - 16) * 4 + tokens[pos] - 20
            assert list(tokens[:pos]).count(pair) == 1  # planted once, before it
    rows = task.questions(24, 10, 50).tokens
    np.testing.assert_array_equal(rows[:, 13], (rows[:, -2] - 16) * 4 + rows[:, -1] - 20)


def test_domains_have_maps_of_their_own_and_noise_of_known_entropy():
    task = SMALL[4]
    rows = answers_of(task, 5000)
    domain, x, y = rows.domains[:, :1], rows.tokens[:, 1::2], rows.tokens[:, 2::2]
    assert (rows.tokens[:, :1] == 8 + domain).all() and task.domains == ("domain 0", "domain 1")
    q = 0.75 + 0.25 / 8
    assert (y == task.maps[domain, x]).mean() == pytest.approx(q, abs=0.01)
    # The optimum is the entropy of the distribution that this share says: one right answer, seven
    # even wrong ones.
    assert task.best_bits == pytest.approx(-q * math.log2(q) - (1 - q) * math.log2((1 - q) / 7))
