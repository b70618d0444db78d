"""Packed batches contain every document exactly once an epoch, and a run resumes at its position."""

import json
import re
from collections import Counter

import numpy as np
import pytest

from dsv3_jax.config import DataConfig
from dsv3_jax.data import batches as data
from dsv3_jax.data import corpus as corpora
from dsv3_jax.data.tokenizer import ByteTokenizer, FileTokenizer

EOS, PREFIX, SUFFIX, MIDDLE = 256, 257, 258, 259
CFG = DataConfig(seq_len=16, batch_size=4, seed=3)


def make_corpus(train=30, val=12):
    """Make documents of two domains and lengths 1 … 40 that begin with their number."""
    lengths = np.random.default_rng(1).integers(1, 41, size=train + val)
    documents = [
        corpora.Document(f"{i:02d}{'é' if i % 2 else 'xyz' * 20}"[: max(2, n)], "ab"[i % 2])
        for i, n in enumerate(lengths)
    ]
    return corpora.Corpus(tuple(documents[:train]), tuple(documents[train:]), ("a", "b"), "print")


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def documents_of(batches):
    """Split batches into complete documents, each with its eos, and the sets of their domains."""
    stream = np.concatenate([b["tokens"].ravel() for b in batches])
    domains = np.concatenate([b["domains"].ravel() for b in batches])
    ends = np.flatnonzero(stream == EOS) + 1
    return np.split(stream, ends)[:-1], [set(d) for d in np.split(domains, ends)[:-1]]


def test_an_epoch_is_every_document_once_in_a_new_order():
    corpus, tokenizer = make_corpus(), ByteTokenizer()
    expected = Counter((d.text, d.domain) for d in corpus.train)
    documents, domains = documents_of(take(data.train_batches(corpus, tokenizer, CFG), 60))
    decoded = [(tokenizer.decode(t), "ab"[d.pop()]) for t, d in zip(documents, domains, strict=True) if len(d) == 1]
    assert len(decoded) == len(documents) > 60  # no token has another document's domain
    indices = np.concatenate([b["documents"].ravel() for b in take(data.train_batches(corpus, tokenizer, CFG), 60)])
    for document, i in zip(documents, indices[np.cumsum([len(t) for t in documents]) - 1], strict=True):
        assert tokenizer.decode(document) == corpus.train[i].text
    epochs = [decoded[:30], decoded[30:60]]
    assert Counter(epochs[0]) == Counter(epochs[1]) == expected
    texts = list(expected)
    assert texts != epochs[0] != epochs[1]
    other, _ = documents_of(take(data.train_batches(corpus, tokenizer, DataConfig(seq_len=16, batch_size=4)), 30))
    assert [tokenizer.decode(d) for d in other[:30]] != [text for text, _ in epochs[0]]


def test_segments_and_positions_from_the_tokens():
    """A slow version, token by token: a new segment begins at a row's start and after each eos."""
    for batch in take(data.train_batches(make_corpus(), ByteTokenizer(), CFG), 20):
        assert all(a.shape == (4, 16) and a.dtype == np.int32 for a in batch.values())
        for row in range(4):
            segment, position = 1, 0
            for column in range(16):
                assert (batch["segment_ids"][row, column], batch["positions"][row, column]) == (segment, position)
                ends = batch["tokens"][row, column] == EOS
                segment, position = segment + ends, 0 if ends else position + 1


def test_joined_documents_differ_only_in_segment_ids_and_positions():
    apart = take(data.train_batches(make_corpus(), ByteTokenizer(), CFG), 5)
    joined_cfg = DataConfig(seq_len=16, batch_size=4, seed=3, separate_documents=False)
    for a, b in zip(apart, take(data.train_batches(make_corpus(), ByteTokenizer(), joined_cfg), 5), strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        np.testing.assert_array_equal(b["segment_ids"], np.ones((4, 16)))
        np.testing.assert_array_equal(b["positions"], np.tile(np.arange(16), (4, 1)))


@pytest.mark.parametrize("fim_rate", [0.0, 0.5])
def test_resuming_is_bitwise(fim_rate):
    """From any position, through JSON, over an epoch's end; reading the state changes nothing."""
    corpus, cfg = make_corpus(), DataConfig(seq_len=16, batch_size=4, fim_rate=fim_rate)
    expected = take(data.train_batches(corpus, ByteTokenizer(), cfg), 19)
    one = data.train_batches(corpus, ByteTokenizer(), cfg)
    for step in range(16):
        saved = json.dumps(one.get_state())
        assert len(saved) < 200
        two = data.train_batches(corpus, ByteTokenizer(), cfg)
        take(two, step % 3)  # a used iterator resumes as exactly as a new one
        two.set_state(json.loads(saved))
        assert_same(take(two, 3), expected[step : step + 3])
        assert_same([next(one)], [expected[step]])


def test_a_state_of_other_data_is_rejected():
    state = data.train_batches(make_corpus(), ByteTokenizer(), CFG).get_state()
    with pytest.raises(ValueError, match="seed=0 differs from seed=3"):
        data.train_batches(make_corpus(), ByteTokenizer(), DataConfig()).set_state(state)
    with pytest.raises(ValueError, match="corpus='print' differs from corpus='other'"):
        data.train_batches(make_corpus(), ByteTokenizer(), CFG).set_state(state | {"corpus": "other"})


@pytest.mark.parametrize("count", [2, 4])
def test_processes_rows_are_the_global_batch(count):
    corpus = make_corpus()
    global_batches = data.train_batches(corpus, ByteTokenizer(), CFG)
    rows = np.arange(4).reshape(-1, count).T  # a process's rows are not adjacent
    shards = [data.train_batches(corpus, ByteTokenizer(), CFG, process_rows) for process_rows in rows]
    for _ in range(10):
        parts = [next(s) for s in shards]
        assert all(p["tokens"].shape == (4 // count, 16) for p in parts)
        assert_same([{k: np.stack([p[k] for p in parts], 1).reshape(4, 16) for k in parts[0]}], [next(global_batches)])
    assert all(s.get_state() == global_batches.get_state() for s in shards)


def test_rows_outside_the_batch_are_rejected():
    for rows in ([0, 4], [-1]):
        with pytest.raises(ValueError, match=f"rows={re.escape(str(rows))} are not all in the batch"):
            data.train_batches(make_corpus(), ByteTokenizer(), CFG, rows)


def unfold(ids):
    """Decode a document and undo its fill-in-the-middle."""
    ids = ids.tolist()
    if ids[0] != PREFIX:
        return bytes(ids[:-1]).decode()
    suffix, middle = ids.index(SUFFIX), ids.index(MIDDLE)
    return bytes(ids[1:suffix] + ids[middle + 1 : -1] + ids[suffix + 1 : middle]).decode()


def test_fill_in_the_middle_keeps_the_text():
    """Cuts are between characters; the rate is by document; each epoch chooses again."""
    corpus = make_corpus()
    for rate in (0.3, 1.0):
        cfg = DataConfig(seq_len=64, batch_size=8, fim_rate=rate)
        documents, _ = documents_of(take(data.train_batches(corpus, ByteTokenizer(), cfg), 20))
        texts = [unfold(ids) for ids in documents]
        assert Counter(texts[:30]) == Counter(d.text for d in corpus.train)
        share = np.mean([ids[0] == PREFIX for ids in documents])
        # five standard deviations of a mean of as many coin flips
        assert abs(share - rate) <= 5 * (rate * (1 - rate) / len(documents)) ** 0.5
        assert len({ids.tobytes() for ids in documents}) > 60


def test_fim_needs_its_specials(tmp_path):
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="vocab_size=2 has no fill-in-the-middle"):
        data.train_batches(make_corpus(), tokenizer, DataConfig(fim_rate=0.1))
    data.train_batches(make_corpus(), tokenizer, DataConfig())
    with pytest.raises(ValueError, match="vocab_size=1 is below the tokenizer's 2 ids"):
        data.check_vocab(tokenizer, 1)
    data.check_vocab(tokenizer, 2)


def test_validation_is_fixed_balanced_and_without_repetition():
    corpus, cfg = make_corpus(), DataConfig(seq_len=8, batch_size=2, fim_rate=1.0)
    everything = data.val_batches(corpus, ByteTokenizer(), cfg, 1000)
    assert_same(
        everything, data.val_batches(corpus, ByteTokenizer(), DataConfig(seq_len=8, batch_size=2, seed=9), 1000)
    )
    assert_same(everything[:2], data.val_batches(corpus, ByteTokenizer(), cfg, 2))
    for batch in everything[:2]:
        np.testing.assert_array_equal(batch["domains"], [[0] * 8, [1] * 8])
    odd = data.val_batches(corpus, ByteTokenizer(), DataConfig(seq_len=8, batch_size=7), 1000)
    assert len(odd) > 1 and all(a.shape == (7, 8) for batch in odd for a in batch.values())
    # Every token of every document occurs once; the rest is padding at the ends of rows.
    tokens, segments = (np.concatenate([b[k] for b in everything]) for k in ("tokens", "segment_ids"))
    expected = Counter(t for d in corpus.val for t in [*d.text.encode(), EOS])
    assert Counter(tokens[segments > 0].tolist()) == expected
    # Each token has the index of its document.
    indices = np.concatenate([b["documents"] for b in everything])
    for i, document in enumerate(corpus.val):
        assert sorted(tokens[(segments > 0) & (indices == i)].tolist()) == sorted([*document.text.encode(), EOS])
    assert (np.diff((segments > 0).astype(int), axis=1) <= 0).all() and not tokens[segments == 0].any()


def test_validation_begins_with_one_window_of_each_document():
    """A batch of as many rows as there are long documents has a row of each."""
    texts = [f"{chr(97 + i)}" * 100 for i in range(6)]
    corpus = corpora.Corpus(tuple(), tuple(corpora.Document(t, "a") for t in texts), ("a",), "")
    batch, *_ = data.val_batches(corpus, ByteTokenizer(), DataConfig(seq_len=4, batch_size=6), 1)
    assert {chr(c) for c in batch["tokens"][:, 0]} == set("abcdef")
