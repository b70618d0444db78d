"""One source of rows: documents, chats and shards are packed, ordered, split and resumed alike."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from runs import assert_bitwise, write_lines

from dsv3_jax.chat.examples import load_examples
from dsv3_jax.chat.text_settings import plain_settings
from dsv3_jax.cli.tokenize import Tokenize, tokenize
from dsv3_jax.config import DataConfig
from dsv3_jax.data.batches import Batches
from dsv3_jax.data.corpus import Corpus, Document
from dsv3_jax.data.shards import open_shards
from dsv3_jax.data.source import from_corpus
from dsv3_jax.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
EOS, PREFIX, SUFFIX, MIDDLE = 256, 257, 258, 259
CFG = DataConfig(seq_len=16, batch_size=4, seed=3)


def make_corpus(train=30, val=12):
    """Make documents of two domains and lengths 1 … 40 that begin with their number."""
    lengths = np.random.default_rng(1).integers(1, 41, size=train + val)
    documents = [
        Document(f"{i:02d}{'é' if i % 2 else 'xyz' * 20}"[: max(2, n)], "ab"[i % 2])
        for i, n in enumerate(lengths)
    ]
    return Corpus(tuple(documents[:train]), tuple(documents[train:]), ("a", "b"), "print")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    chats = [{"prompt": f"{i}+1=", "completion": "x" * (i % 9)} for i in range(80)]
    texts = [{"text": f"{i}: {'xyz' * (i % 25)}"} for i in range(40)]
    for name, lines in (("chats", chats), ("text", texts)):
        lines = [line | {"domain": "ab"[i % 2]} for i, line in enumerate(lines)]
        write_lines(root / f"{name}.jsonl", lines)
    size = {"row_tokens": 32, "val_fraction": 0.2, "shard_mb": 0.0004}
    tokenize(job := Tokenize((str(root / "text.jsonl"),), root / "shards", "bytes", **size))
    shards = replace(CFG, paths=(str(job.out),), format="shards")
    chats = replace(CFG, paths=(str(root / "chats.jsonl"),), format="chat", val_fraction=0.3)
    return {
        "text": from_corpus(make_corpus(), BYTES, CFG),
        "fim": from_corpus(make_corpus(), BYTES, replace(CFG, fim_rate=0.5)),
        "chats": load_examples(chats, plain_settings()),
        "shards": open_shards(shards, BYTES),
        "mixed": open_shards(replace(shards, mixture=("a=2", "b=1")), BYTES),
    }


KINDS = ("text", "fim", "chats", "shards", "mixed")


def take(batches, count):
    return [next(batches) for _ in range(count)]


def epoch(source, passes=1):
    return take(Batches(source.train_batches()._order, 1), passes * source.rows_per_epoch())


@pytest.mark.parametrize("kind", KINDS)
def test_stop_and_resume_continues_the_same_rows_on_any_number_of_processes(sources, kind):
    source = sources[kind]
    whole = take(source.train_batches(), 12)
    parts = [source.train_batches(rows) for rows in ([0, 3], [1], [2])]
    for n in range(12):
        position = json.dumps(parts[0].get_state())
        assert json.loads(position)["row"] == 4 * n
        assert all(part.get_state() == json.loads(position) for part in parts)
        resumed = source.train_batches()
        take(resumed, n % 3)  # a used iterator resumes as exactly as a new one
        resumed.set_state(json.loads(position))
        assert_bitwise(take(resumed, min(2, 12 - n)), whole[n : n + 2])
        a, b, c = (next(part) for part in parts)
        assert_bitwise([{k: np.stack([a[k][0], b[k][0], c[k][0], a[k][1]]) for k in a}], [whole[n]])
    with pytest.raises(ValueError, match="is not the saved one, 'other'"):
        resumed.set_state({"corpus": "other", "row": 4})
    for wrong in ({}, {"row": "a"}, {"row": -1}, {"row": None}, {"row": 1.5}):
        with pytest.raises(ValueError, match="^row=.* is no position in the data"):
            resumed.set_state({"corpus": "other"} | wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_packing_never_mixes_segments(sources, kind):
    """A slow version, by token: a segment is of one document, from position 0; padding follows."""
    for batch in take(sources[kind].train_batches(), 8) + sources[kind].val_batches(100):
        assert all(a.shape == (4, 16) for a in batch.values())
        for row in range(4):
            segment = 0
            for column in range(16):
                now = batch["segment_ids"][row, column]
                assert now == 0 or now == segment + 1 or (now == segment and column)
                if now == 0:
                    assert not batch["segment_ids"][row, column:].any()
                    assert not batch["tokens"][row, column:].any()
                    assert "loss_mask" not in batch or not batch["loss_mask"][row, column:].any()
                    break
                if now == segment + 1:
                    segment, begin, document = now, column, batch["documents"][row, column]
                assert batch["positions"][row, column] == column - begin
                assert batch["documents"][row, column] == document
                if batch["tokens"][row, column] == EOS and column < 15:
                    assert batch["segment_ids"][row, column + 1] in (0, segment + 1)


def test_rows_are_the_oracles_in_a_new_order_each_pass(sources):
    """The oracle: documents in one long list of tokens, which is cut into rows."""
    source, corpus = sources["text"], make_corpus()
    order = np.random.default_rng(CFG.seed).permutation(len(corpus.train))
    stream = [(t, int(i)) for i in order for t in [*corpus.train[i].text.encode(), EOS]]
    stream += [(0, 0)] * (-len(stream) % 16)
    expected = Counter(tuple(stream[i : i + 16]) for i in range(0, len(stream), 16))

    def rows_of(source):
        pairs = ((x["tokens"][0].tolist(), x["documents"][0].tolist()) for x in epoch(source, 2))
        return [tuple(zip(*pair, strict=True)) for pair in pairs]

    rows, other = rows_of(source), rows_of(from_corpus(corpus, BYTES, replace(CFG, seed=4)))
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert Counter(first) == Counter(second) == expected and first != second
    assert other[0] != first[0]


def test_joined_documents_differ_only_in_segment_ids_and_positions():
    joined = from_corpus(make_corpus(), BYTES, replace(CFG, separate_documents=False))
    for a, b in zip(epoch(from_corpus(make_corpus(), BYTES, CFG)), epoch(joined), strict=True):
        real = a["segment_ids"] > 0
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        np.testing.assert_array_equal(b["segment_ids"], real)
        np.testing.assert_array_equal(b["positions"], np.where(real, np.arange(16), 0))


def unfold(ids):
    """Decode a document and undo its fill-in-the-middle."""
    if ids[0] != PREFIX:
        return bytes(ids[:-1]).decode()
    suffix, middle = ids.index(SUFFIX), ids.index(MIDDLE)
    return bytes(ids[1:suffix] + ids[middle + 1 : -1] + ids[suffix + 1 : middle]).decode()


def test_fill_in_the_middle_keeps_the_text_and_the_rate():
    documents = tuple(Document(f"{i:04d}é" + "x" * (i % 40), "a") for i in range(400))
    corpus = Corpus(documents, (), ("a",), "")
    for rate in (0.3, 1.0):
        source = from_corpus(corpus, BYTES, replace(CFG, seq_len=64, fim_rate=rate))
        order = source.train()[0]
        stream = np.concatenate([order[i]["tokens"] for i in range(len(order))])
        parts = np.split(stream, np.flatnonzero(stream == EOS) + 1)[:-1]
        documents = [part.tolist() for part in parts]
        assert Counter(map(unfold, documents)) == Counter(d.text for d in corpus.train)
        share = np.mean([ids[0] == PREFIX for ids in documents])
        assert abs(share - rate) <= 5 * (rate * (1 - rate) / 400) ** 0.5  # five standard deviations


def test_held_out_rows_are_fixed_and_have_as_much_of_each_domain(sources):
    for source in sources.values():
        everything = source.val_batches(1000)
        assert_bitwise(everything[:1], source.val_batches(1))
        assert everything[0]["domains"][:, 0].tolist() == [0, 1, 0, 1]
    corpus, cfg = make_corpus(), replace(CFG, seq_len=8, batch_size=2, fim_rate=1.0)
    everything = from_corpus(corpus, BYTES, cfg).val_batches(1000)
    assert_bitwise(everything, from_corpus(corpus, BYTES, replace(cfg, seed=9)).val_batches(1000))
    names = ("tokens", "segment_ids", "documents")
    tokens, real, numbers = (np.concatenate([b[name] for b in everything]) for name in names)
    for i, document in enumerate(corpus.val):
        found = tokens[(real > 0) & (numbers == i)].tolist()
        assert sorted(found) == sorted([*document.text.encode(), EOS])
    texts = Corpus((), tuple(Document(x * 100, "a") for x in "abcdef"), ("a",), "")
    source = from_corpus(texts, BYTES, replace(CFG, seq_len=4, batch_size=6))
    assert {chr(c) for c in source.val_batches(1)[0]["tokens"][:, 0]} == set("abcdef")
