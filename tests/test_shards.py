"""Shards hold every document once, and batches from them depend on the seed alone."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from runs import unhooked_cli

from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.data.shards import MANIFEST, Record, ShardBatches, open_shards
from dsv3_jax.data.source import open_source
from dsv3_jax.data.tokenize import Tokenize, text_encoder, tokenize
from dsv3_jax.data.tokenizer import ByteTokenizer, train_bpe

T, R = 16, 32
BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """JSONL of three domains; some documents are longer than a record, others much shorter than a row."""
    root = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(3)
    lines = [
        {
            "body": f"{i}: {' '.join(map(str, rng.integers(1000, size=rng.integers(1, 25))))}",
            "domain": ("code", "English", "C")[i % 7 % 3],
        }
        for i in range(60)
    ]
    (root / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def job_of(folder, name="shards", **changes):
    settings = {"row_tokens": R, "val_fraction": 0.2, "text_column": "body", "shard_bytes": 400}
    return Tokenize((str(folder / "text.jsonl"),), folder / name, **settings | changes)


@pytest.fixture(scope="module")
def shards(folder):
    job = job_of(folder)
    tokenize(job, text_encoder)
    return job.out


def config(shards, **changes):
    return DataConfig(**{"paths": (str(shards),), "seq_len": T, "batch_size": 4, "format": "shards"} | changes)


def take(batches, count):
    with_end = [next(batches) for _ in range(count)]
    batches.close()
    return with_end


def rows_of(batches):
    return [{key: batch[key][i] for key in batch} for batch in batches for i in range(len(batch["tokens"]))]


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def texts_of(rows):
    """Document → ids, from rows in any order: pieces of a document differ by their places in it."""
    found = {}
    for row in rows:
        for segment in range(1, row["segment_ids"].max() + 1):
            inside = row["segment_ids"] == segment
            assert row["positions"][inside].tolist() == list(range(inside.sum()))
            assert len(set(row["documents"][inside])) == len(set(row["domains"][row["segment_ids"] > 0])) == 1
            found.setdefault((int(row["documents"][inside][0]), int(row["domains"][inside][0])), []).append(
                row["tokens"][inside].tolist()
            )
    return found


def test_every_document_is_in_an_epoch_once(folder, shards):
    """The oracle: the corpus in memory. Pieces of a document have its tokens, each as often as the text does."""
    source = open_source(config(shards, batch_size=1), BYTES)
    rows = sum(len(found) for found in source.rows("train").values())
    cfg = DataConfig((str(folder / "text.jsonl"),), val_fraction=0.2, text_column="body")
    corpus = load_corpus(cfg)
    numbers = {json.loads(line)["body"]: i for i, line in enumerate((folder / "text.jsonl").read_text().splitlines())}
    expected = {
        side: {numbers[d.text]: (d.domain, [*d.text.encode(), BYTES.eos_id]) for d in documents}
        for side, documents in (("train", corpus.train), ("val", corpus.val))
    }
    batches = source.train_batches()
    epochs = take(batches, 2 * rows)
    assert [b["tokens"].tolist() for b in epochs[:rows]] != [b["tokens"].tolist() for b in epochs[rows:]]
    val = source.val_batches(10_000)
    assert source.val_batches(2)[1]["tokens"].tolist() == val[1]["tokens"].tolist()
    for side, part in (("train", epochs[:rows]), ("train", epochs[rows:]), ("val", val)):
        found = texts_of(rows_of(part))
        assert {document for document, _ in found} == expected[side].keys()
        for (document, domain), pieces in found.items():
            name, ids = expected[side][document]
            assert source.domains[domain] == name and sorted(sum(pieces, [])) == sorted(ids)
            text = bytes(i for i in ids if i < 256)
            assert all(bytes(i for i in piece if i < 256) in text for piece in pieces)
    assert source.describe().startswith(f"shards: {len(source.manifest.files)} files, 60 documents")
    assert sum(batch["segment_ids"].all() for batch in epochs[:rows]) > rows / 2  # little padding


@pytest.mark.parametrize("mixture", [(), ("code=2", "English=1")])
def test_resume_at_any_batch_on_any_number_of_processes(shards, mixture):
    cfg = config(shards, mixture=mixture)
    source = open_shards(cfg, BYTES)
    whole = take(source.train_batches(), 8)
    parts = [source.train_batches(rows) for rows in ([0, 3], [1], [2])]
    split = [take(part, 8) for part in parts]
    for n, batch in enumerate(whole):
        joined = [rows_of([s[n]]) for s in split]
        assert_equal(rows_of([batch]), [joined[0][0], joined[1][0], joined[2][0], joined[0][1]])
    one = source.train_batches([0, 3])
    for n in (0, 1, 5):
        one.set_state(json.loads(json.dumps(source.train_batches().get_state())))
        for _ in range(n):
            next(one)
        resumed = source.train_batches()
        resumed.set_state(json.loads(json.dumps(one.get_state())))
        assert_equal(take(resumed, 8 - n), whole[n:])
    one.close()
    other = open_shards(replace(cfg, seed=1), BYTES).train_batches()
    with pytest.raises(ValueError, match="seed=1 differs from seed=0"):
        other.set_state(whole_state := one.get_state())
    with pytest.raises(ValueError, match="temperature=2.0 differs"):
        open_shards(replace(cfg, temperature=2.0), BYTES).train_batches().set_state(whole_state)


def test_mixture_follows_weights_and_repeats_nothing_within_an_epoch(shards):
    source = open_shards(config(shards, batch_size=1, mixture=("code=8", "English=2", "C=0"), temperature=2.0), BYTES)
    assert source.proportions() == pytest.approx({"code": 2 / 3, "English": 1 / 3})
    rows = rows_of(take(source.train_batches(), 90))
    names = [source.domains[row["domains"][0]] for row in rows]
    assert abs(names.count("code") - 60) <= 1 and names.count("English") + names.count("code") == 90
    for name in ("code", "English"):
        epoch = len(source.rows("train")[name])
        own = [row for row, found in zip(rows, names, strict=True) if found == name][:epoch]
        assert len({(row["tokens"].tobytes(), row["documents"].tobytes()) for row in own}) == min(
            epoch, names.count(name)
        )
    equal = open_shards(config(shards, temperature=1e9), BYTES).proportions()
    assert equal == pytest.approx({"code": 1 / 3, "English": 1 / 3, "C": 1 / 3})


def test_records_survive_bytes():
    ids = np.arange(7, dtype=np.int32)
    record = Record(2, ids[:2] * 3, ids[:2] + 5, ids, ids > 2)
    back = Record.from_bytes(record.to_bytes())
    assert back.domain == 2 and all(np.array_equal(a, b) for a, b in zip(back[1:], record[1:], strict=True))
    pieces, mask = back.part(2, 3)
    assert [(p.tokens.tolist(), p.document) for p in pieces] == [([2], 5), ([3, 4], 6)]
    assert mask.tolist() == [False, True, True]


def test_interrupted_tokenizing_goes_on(folder, shards, monkeypatch):
    """Complete shards are not written again, half a shard is, and the end is the same as without the interruption."""
    job = job_of(folder, "interrupted")
    calls = []

    def failing(limit):
        encoder = text_encoder()

        class Failing:
            tokenizer, whole = encoder.tokenizer, False

            def __call__(self, content, location):
                calls.append(content)
                if len(calls) > limit:
                    raise KeyboardInterrupt
                return encoder(content, location)

        return Failing()

    with pytest.raises(KeyboardInterrupt):
        tokenize(job, partial(failing, 25))
    assert not (job.out / MANIFEST).exists() and not list(job.out.glob(".*"))
    with pytest.raises(ValueError, match="has no manifest.json"):
        open_shards(config(job.out), BYTES)
    complete = {file.name: file.stat().st_mtime_ns for file in job.out.glob("*.array_record")}
    assert complete
    torn = job.out / sorted(complete)[0]
    torn.write_bytes(torn.read_bytes()[:-1])
    calls.clear()
    tokenize(job, partial(failing, 10_000))
    assert 0 < len(calls) < 60
    kept = [name for name, when in complete.items() if (job.out / name).stat().st_mtime_ns == when]
    assert 0 < len(kept) < len(complete) and torn.name not in kept
    for file in shards.glob("*.array_record"):
        assert file.read_bytes() == (job.out / file.name).read_bytes()
    assert (job.out / MANIFEST).read_bytes() == (shards / MANIFEST).read_bytes()
    with pytest.raises(ValueError, match="row_tokens=64 differs from row_tokens=32"):
        tokenize(replace(job, row_tokens=64), text_encoder)
    with pytest.raises(ValueError, match="holds other files"):
        tokenize(replace(job, out=folder), text_encoder)


def test_damaged_shards_are_named_before_training(folder, shards):
    job = job_of(folder, "damaged")
    tokenize(job, text_encoder)
    file = next(job.out.glob("train-*.array_record"))
    data = file.read_bytes()
    open_shards(config(job.out), BYTES)
    file.write_bytes(data[:-10])
    with pytest.raises(ValueError, match=rf"{file.name}' has {len(data) - 10:,} bytes of {len(data):,}"):
        open_shards(config(job.out), BYTES)
    file.write_bytes(bytes(len(data)))
    with pytest.raises(ValueError, match=f"{file.name}' is damaged"):
        open_shards(config(job.out), BYTES)
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name}' is missing"):
        open_shards(config(job.out), BYTES)
    tokenize(job, text_encoder)  # writes only what is absent
    assert file.read_bytes() == data and open_shards(config(job.out), BYTES)
    (job.out / MANIFEST).write_text('{"version": 1}')
    with pytest.raises(ValueError, match="is not a manifest of shards"):
        open_shards(config(job.out), BYTES)


def test_refusals(folder, shards, tmp_path):
    other = train_bpe(["to be or not to be"] * 2, 262, str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="another tokenizer than tokenizer='bytes'"):
        open_shards(config(shards), other)
    with pytest.raises(ValueError, match=f"seq_len=12 does not divide the {R} tokens"):
        open_shards(config(shards, seq_len=12), BYTES)
    with pytest.raises(ValueError, match="names domain 'Code'.* have .*code, .*did you mean 'code'"):
        open_shards(config(shards, mixture=("Code=1",)), BYTES)
    with pytest.raises(ValueError, match=r"rows=\[4\] are not all in the batch"):
        ShardBatches(open_shards(config(shards), BYTES), np.array([4]))
    with pytest.raises(ValueError, match=r'line 1, is not an object with "txt"; it has .*body.*domain'):
        tokenize(job_of(folder, "no column", text_column="txt"), text_encoder)
    with pytest.raises(ValueError, match="val_fraction=1e-09 holds no document out; there are 60"):
        tokenize(job_of(folder, "no split", val_fraction=1e-9), text_encoder)
    for changes, words in (
        ({"mixture": ("code=0", "C=0")}, "weights that sum to 0"),
        ({"mixture": ("code=-1",)}, "'code=-1' is not DOMAIN=WEIGHT"),
        ({"mixture": ("code",)}, "'code' is not DOMAIN=WEIGHT"),
        ({"mixture": ("C=1", "C=2")}, "names domain 'C' twice"),
        ({"mixture": ("C=1",), "format": "text"}, "mixture=.* is for format='shards'"),
        ({"temperature": 0.0}, "temperature=0.0 is not a positive number"),
        ({"temperature": 2.0, "format": "text"}, "temperature=2.0 is for format='shards'"),
        ({"paths": ()}, r"paths=\(\) is not one folder"),
        ({"fim_rate": 0.5}, "fim_rate=0.5 is for format='text'"),
        ({"max_documents": 5}, "max_documents=5 is for text"),
    ):
        with pytest.raises(ConfigError, match=words):
            config(shards, **changes)


def test_command(folder, shards, capsys):
    words = ["--row-tokens", str(R), "--val-fraction", "0.2", "--text-column", "body", "--shard-mb", "0.0004"]
    out = folder / "by command"
    main = unhooked_cli().main
    argv = ["data", "tokenize", str(folder / "text.jsonl"), "--out", str(out), "--workers", "1", *words]
    assert main(argv) == 0
    assert "60 documents" in capsys.readouterr().out
    assert (out / MANIFEST).read_bytes() == (shards / MANIFEST).read_bytes()
    assert main(["data", "check", str(out)]) == 0
    file = next(out.glob("val-*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert main(["data", "check", str(out)]) == 2
    said = capsys.readouterr()
    assert f"{file.name}' has other bytes" in said.out and "1 damaged shards" in said.err
    assert main(["data", "tokenise"]) == 2 and "did you mean 'tokenize'" in capsys.readouterr().err


@pytest.mark.long
def test_workers_write_the_same_shards(folder, shards):
    job = job_of(folder, "by workers", workers=2)
    tokenize(job, text_encoder)
    assert (job.out / MANIFEST).read_bytes() == (shards / MANIFEST).read_bytes()


def test_chat_examples_keep_their_mask_and_are_never_cut(folder, capsys):
    lines = [{"prompt": f"{i}+1=", "completion": "x" * (i % 20), "domain": "ab"[i % 2]} for i in range(40)]
    file = folder / "chats.jsonl"
    file.write_text("\n".join(map(json.dumps, [*lines, {"prompt": "p" * 40, "completion": "too long"}])))
    out, main = folder / "chats", unhooked_cli().main
    argv = ["data", "tokenize", str(file), "--out", str(out), "--workers", "1", "--row-tokens", str(R)]
    argv += ["--val-fraction", "0.2", "--format", "chat"]
    assert main(argv) == 2 and "format='chat' needs a template" in capsys.readouterr().err
    assert main([*argv, "--chat-template", "plain"]) == 0
    assert "40 documents" in capsys.readouterr().out
    source = open_source(config(out, seq_len=R, batch_size=1), BYTES)
    batches = take(source.train_batches(), sum(map(len, source.rows("train").values()))) + source.val_batches(1000)
    seen = []
    for row in rows_of(batches):
        for segment in range(1, row["segment_ids"].max() + 1):
            inside = row["segment_ids"] == segment
            i = int(row["documents"][inside][0])
            seen.append(i)
            record = lines[i]
            assert row["tokens"][inside].tolist() == [*(record["prompt"] + record["completion"]).encode(), BYTES.eos_id]
            assert row["loss_mask"][inside].sum() == len(record["completion"]) + 1
        assert not row["loss_mask"][row["segment_ids"] == 0].any()
    assert sorted(seen) == list(range(40))
    with pytest.raises(ValueError, match=f"seq_len=16 does not equal the {R} tokens"):
        open_source(config(out), BYTES)
    with pytest.raises(ValueError, match="separate_documents=False is for text"):
        open_source(config(out, seq_len=R, separate_documents=False), BYTES)
