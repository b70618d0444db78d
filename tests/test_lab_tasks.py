"""Tasks: their rows against the equations, and their source's resume."""

import math

import numpy as np
import pytest

from dsv3_jax.config import DataConfig, replace
from dsv3_jax.data.batches import Source
from experiments.lab.tasks import TASKS, Chains, Domains, Facts, ManyKeys, Names, Retrieval, TaskSource, from_dict

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
        assert isinstance(source, Source) and from_dict(task.to_dict()) == task and len(SMALL) == len(TASKS)
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
    with pytest.raises(ValueError, match="keys=250, answers=64"):
        Facts(firsts=250)


def test_a_question_repeats_the_planted_value():
    task = SMALL[1]
    rows = answers_of(task)
    assert rows.answers.sum(1).min() >= 2
    for tokens, answers in zip(rows.tokens, rows.answers, strict=True):
        for pos in np.flatnonzero(answers):
            key, value = tokens[pos - 1] - 16, tokens[pos] - 20
            assert 0 <= key < 4 and 0 <= value < 4
            assert list(tokens[:pos]).count(key * 4 + value) == 1  # planted once, before it
    for distance in (2, 10, 23):
        rows = task.questions(24, distance, 50)
        keys = rows.tokens[:, -2] - 16
        np.testing.assert_array_equal(rows.tokens[:, 23 - distance], keys * 4 + rows.tokens[:, -1] - 20)
        for row, key in zip(rows.tokens, keys, strict=True):
            of_key = [i for i, t in enumerate(row) if (t < 16 and t // 4 == key) or t == 16 + key]
            assert of_key == sorted({23 - distance, 22})


def test_many_keys_are_each_asked_once():
    for row in answers_of(SMALL[2]).tokens:
        pairs = {int(t) // 4: int(t) % 4 for t in row[:4]}
        asked = {int(q) - 32: int(v) - 40 for q, v in row[4:].reshape(4, 2)}
        assert asked == pairs and len(pairs) == 4


def test_names_are_pairs_of_their_row_and_the_optimum_follows_from_what_was_said():
    """By loops over rows: the pairs, the shares, and the bits with and without knowledge of pairs."""
    task = Names(names=3, tokens=24, share=0.75)
    best, without = [], []
    for row in task.held_out(2048).tokens.tolist():
        pairs: dict = {}  # of the names that were said
        for t, token in enumerate(row):
            seen, first = list(pairs.values()), row[t - 1] if t else None
            if 8 <= token < 16:  # a second token
                with_pairs = 1.0 if first in pairs else 1 / 8
                evenly = seen.count(token) / len(seen) if first in pairs else 1 / 8
                assert pairs.setdefault(first, token) == token and first < 8
            elif token < 8:
                new = 0.75 * (3 - len(pairs)) / 3 / (8 - len(pairs))
                with_pairs = evenly = 0.75 / 3 if token in pairs else new
                assert t == 23 or 8 <= row[t + 1] < 16
            else:
                with_pairs = evenly = 0.25 / 4
            if t:
                best.append(with_pairs)
                without.append(evenly)
        assert len(pairs) <= 3
    assert task.best_bits == pytest.approx(-np.log2(best).mean())
    assert task.bits_without_pairs == pytest.approx(-np.log2(without).mean())
    assert task.best_bits + 0.3 < task.bits_without_pairs < task.chance_bits - 1


def test_domains_have_maps_of_their_own_and_noise_of_known_entropy():
    task = SMALL[4]
    rows = answers_of(task, 5000)
    domain, x, y = rows.domains[:, :1], rows.tokens[:, 1::2], rows.tokens[:, 2::2]
    assert (rows.tokens[:, :1] == 8 + domain).all() and task.domains == ("domain 0", "domain 1")
    q = 0.75 + 0.25 / 8
    assert (y == task.maps[domain, x]).mean() == pytest.approx(q, abs=0.01)
    # The optimum is the entropy of the distribution that this share says: one right answer, seven even wrong ones.
    assert task.best_bits == pytest.approx(-q * math.log2(q) - (1 - q) * math.log2((1 - q) / 7))
    one = replace(task, together=True)  # a batch of one domain
    batches = [one.sample(np.random.default_rng(seed), 50).domains for seed in range(20)]
    assert all((domains == domains[0, 0]).all() for domains in batches) and len({d[0, 0] for d in batches}) == 2


def test_the_counts_of_a_chain_are_its_optimum():
    """p = (n + α) / (n_c + Sα), by loops over rows."""
    task, bits = SMALL[5], []
    for row in task.held_out(2048).tokens[:300].tolist():
        for t in range(2, 20):
            after = [row[i] for i in range(2, t) if row[i - 2 : i] == row[t - 2 : t]]
            bits.append(-math.log2((after.count(row[t]) + 0.2) / (len(after) + 0.6)))
    assert task.best_bits == pytest.approx(np.mean(bits), abs=0.03)
    assert task.best_bits < task.bits_of_order(1) - 0.1 < task.bits_of_order(0) - 0.2 < task.chance_bits
