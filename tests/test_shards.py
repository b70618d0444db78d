"""Shards hold every document once, are written again only where they are absent, and damage is named with its file."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from runs import unhooked_cli

from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.data.batches import Batches
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.data.shards import MANIFEST, open_shards
from dsv3_jax.data.tokenize import LOCK, Encoder, Tokenize, text_encoder, tokenize
from dsv3_jax.data.tokenizer import ByteTokenizer, train_bpe
from dsv3_jax.lock import acquire

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


def rows_of(source, count):
    order = Batches(source.train_batches()._order, 1)
    return [{key: array[0] for key, array in next(order).items()} for _ in range(count)]


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def texts_of(rows):
    """(document, domain) → ids, from rows in any order."""
    found = {}
    for row in rows:
        for segment in range(1, row["segment_ids"].max() + 1):
            inside = row["segment_ids"] == segment
            key = int(row["documents"][inside][0]), int(row["domains"][inside][0])
            found.setdefault(key, []).append(row["tokens"][inside].tolist())
    return found


def test_every_document_is_in_a_pass_once(folder, shards):
    """The oracle: the corpus in memory. Pieces of a document have its tokens, each as often as the text does."""
    source = open_shards(config(shards, batch_size=1), BYTES)
    corpus = load_corpus(DataConfig((str(folder / "text.jsonl"),), val_fraction=0.2, text_column="body"))
    numbers = {json.loads(line)["body"]: i for i, line in enumerate((folder / "text.jsonl").read_text().splitlines())}
    rows = rows_of(source, 2 * source.rows_per_epoch())
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert [row["tokens"].tolist() for row in first] != [row["tokens"].tolist() for row in second]
    val = [{key: array[0] for key, array in batch.items()} for batch in source.val_batches(10_000)]
    for documents, part in ((corpus.train, first), (corpus.train, second), (corpus.val, val)):
        expected = {numbers[d.text]: (d.domain, [*d.text.encode(), BYTES.eos_id]) for d in documents}
        found = texts_of(part)
        assert {document for document, _ in found} == expected.keys()
        for (document, domain), pieces in found.items():
            name, ids = expected[document]
            assert source.domains[domain] == name and sorted(sum(pieces, [])) == sorted(ids)
            text = bytes(i for i in ids if i < 256)
            assert all(bytes(i for i in piece if i < 256) in text for piece in pieces)
    assert source.summary.startswith("shards: ") and ", 60 documents" in source.summary


def test_a_mixture_follows_its_weights_and_repeats_nothing_within_a_pass(shards):
    source = open_shards(config(shards, batch_size=1, mixture=("code=8", "English=2", "C=0"), temperature=2.0), BYTES)
    rows = rows_of(source, 90)
    names = [source.domains[row["domains"][0]] for row in rows]
    assert abs(names.count("code") - 60) <= 1 and names.count("English") + names.count("code") == 90
    for name, part in zip(("code", "English"), source.train(), strict=True):
        own = [row for row, found in zip(rows, names, strict=True) if found == name][: len(part)]
        assert len({(row["tokens"].tobytes(), row["documents"].tobytes()) for row in own}) == len(own)
    assert open_shards(config(shards, temperature=1e9), BYTES).weights == pytest.approx([1 / 3] * 3)


class Failing:
    """Makes an encoder that is interrupted after some documents."""

    def __init__(self, limit):
        self.limit, self.calls = limit, 0

    def encode(self, content, location):
        self.calls += 1
        if self.calls > self.limit:
            raise KeyboardInterrupt
        return text_encoder().encode(content, location)

    def __call__(self):
        return Encoder(BYTES, self.encode)


def test_interrupted_tokenizing_goes_on(folder, shards):
    """Complete shards are not written again, a torn one or one with a damaged mark is, and the end is the same."""
    job = job_of(folder, "interrupted")
    with pytest.raises(KeyboardInterrupt):
        tokenize(job, Failing(50))
    assert not (job.out / MANIFEST).exists() and not list(job.out.glob(".*"))
    with pytest.raises(ValueError, match="has no manifest.json"):
        open_shards(config(job.out), BYTES)
    complete = {file.name: file.stat().st_mtime_ns for file in sorted(job.out.glob("*.array_record"))}
    torn = job.out / next(iter(complete))
    torn.write_bytes(torn.read_bytes()[:-1])
    marks = sorted(job.out.glob("shard-*.json"))
    for mark, damage in zip(marks[1:3], ("{}", ""), strict=True):
        mark.write_text(damage)
    again = Failing(10_000)
    tokenize(job, again)
    assert 0 < again.calls < 60
    kept = [name for name, when in complete.items() if (job.out / name).stat().st_mtime_ns == when]
    assert len(kept) < len(complete) and torn.name not in kept
    for file in [*shards.glob("*.array_record"), shards / MANIFEST]:
        assert file.read_bytes() == (job.out / file.name).read_bytes()
    with pytest.raises(ValueError, match="row_tokens=64 differs from row_tokens=32"):
        tokenize(replace(job, row_tokens=64), text_encoder)
    with pytest.raises(ValueError, match="holds other files"):
        tokenize(replace(job, out=folder), text_encoder)
    with acquire(job.out, LOCK), pytest.raises(ValueError, match="is in use by process"):
        tokenize(job, text_encoder)


def test_damaged_shards_are_named(folder):
    job = job_of(folder, "damaged")
    tokenize(job, text_encoder)
    file = max(job.out.glob("train-*.array_record"), key=lambda path: path.stat().st_size)
    data = file.read_bytes()
    for content, sentence in (
        (data[:-10], rf"{file.name}' has {len(data) - 10:,} bytes of {len(data):,}"),
        (bytes(len(data)), f"{file.name}' is damaged"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            open_shards(config(job.out), BYTES)
    file.write_bytes(data)
    source = open_shards(config(job.out), BYTES)
    want, sentences = rows_of(source, source.rows_per_epoch()), []
    written = [i for i, byte in enumerate(data) if byte]  # the rest is padding
    for at in written[:: len(written) // 40]:
        file.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        try:
            assert_same(rows_of(open_shards(config(job.out), BYTES), len(want)), want)  # nothing reads the byte
        except ValueError as error:
            sentences.append(str(error))
    assert all(f"{file.name}' is damaged" in sentence for sentence in sentences)
    assert any("see dsv3 data check" in sentence for sentence in sentences)
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name}' is missing"):
        open_shards(config(job.out), BYTES)
    tokenize(job, text_encoder)  # writes only what is absent
    assert file.read_bytes() == data and open_shards(config(job.out), BYTES)


def test_a_damaged_manifest_is_one_sentence(folder, shards, tmp_path):
    good = json.loads((shards / MANIFEST).read_text())
    name = next(iter(good["files"]))
    facts = good["files"][name]
    for change in (
        [], None, {"version": 2}, {"format": "x"}, {"row_tokens": 0}, {"row_tokens": 64.0}, {"row_tokens": 2**70},
        {"tokenizer": None}, {"documents": "x"}, {"domains": ["a", "a", "b"]}, {"domains": ["\x1b[2J"]}, {"files": {}},
        {"files": {name: facts}}, {"files": good["files"] | {"../x": facts}}, {"files": good["files"] | {name: None}},
        *({"files": good["files"] | {name: facts | {key: value}}} for key, value in (
            ("records", -5), ("bytes", "x"), ("hash", ""), ("side", "x"), ("domains", [[77, 1, 1]]), ("tokens", None),
        )),
    ):  # fmt: skip
        (tmp_path / MANIFEST).write_text(json.dumps(good | change if isinstance(change, dict) else change))
        with pytest.raises(ValueError, match=f"{MANIFEST} (is damaged: .* is missing or wrong|has version)"):
            open_shards(config(tmp_path), BYTES)
    (tmp_path / MANIFEST).write_text(json.dumps(good | {"vocab_size": 100}))  # ids that the records exceed
    for file in shards.glob("*.array_record"):
        (tmp_path / file.name).symlink_to(file)
    with pytest.raises(ValueError, match="is damaged in record .* are not possible"):
        rows_of(open_shards(config(tmp_path), BYTES), 40)


def test_refusals(folder, shards, tmp_path):
    other = train_bpe(["to be or not to be"] * 2, 262, str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="another tokenizer than tokenizer='bytes'"):
        open_shards(config(shards), other)
    with pytest.raises(ValueError, match=f"seq_len=12 does not divide the {R} tokens"):
        open_shards(config(shards, seq_len=12), BYTES)
    with pytest.raises(ValueError, match="names domain 'Code'.* have .*code, .*did you mean 'code'"):
        open_shards(config(shards, mixture=("Code=1",)), BYTES)
    with pytest.raises(ValueError, match=r'line 1, is not an object with "txt"; it has .*body.*domain'):
        tokenize(job_of(folder, "no column", text_column="txt"), text_encoder)
    with pytest.raises(ValueError, match="val_fraction=1e-09 holds no document out; there are 60"):
        tokenize(job_of(folder, "no split", val_fraction=1e-9), text_encoder)
    with pytest.raises(ConfigError, match="weights that sum to 0"):
        config(shards, mixture=("code=0", "C=0"))


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


def test_chats_keep_their_mask_and_are_never_cut(folder, capsys):
    lines = [{"prompt": f"{i}+1=", "completion": "x" * (i % 20), "domain": "ab"[i % 2]} for i in range(40)]
    file = folder / "chats.jsonl"
    file.write_text("\n".join(map(json.dumps, [*lines, {"prompt": "p" * 40, "completion": "too long"}])))
    out, main = folder / "chats", unhooked_cli().main
    argv = ["data", "tokenize", str(file), "--out", str(out), "--workers", "1", "--row-tokens", str(R)]
    argv += ["--val-fraction", "0.2", "--format", "chat"]
    assert main(argv) == 2 and "format='chat' needs a template" in capsys.readouterr().err
    assert main([*argv, "--chat-template", "plain"]) == 0
    assert "40 documents" in capsys.readouterr().out
    source = open_shards(config(out, seq_len=R, batch_size=1), BYTES)
    rows, seen = rows_of(source, source.rows_per_epoch()), []
    rows += [{key: array[0] for key, array in batch.items()} for batch in source.val_batches(1000)]
    for row in rows:
        for segment in range(1, row["segment_ids"].max() + 1):
            inside = row["segment_ids"] == segment
            seen.append(int(row["documents"][inside][0]))
            record = lines[seen[-1]]
            assert row["tokens"][inside].tolist() == [*(record["prompt"] + record["completion"]).encode(), BYTES.eos_id]
            assert row["loss_mask"][inside].sum() == len(record["completion"]) + 1
    assert sorted(seen) == list(range(40))
    with pytest.raises(ValueError, match=f"seq_len=16 does not equal the {R} tokens"):
        open_shards(config(out), BYTES)
    with pytest.raises(ValueError, match="separate_documents=False is for text"):
        open_shards(config(out, seq_len=R, separate_documents=False), BYTES)


@pytest.mark.long
def test_workers_write_the_same_shards_and_end_with_their_parent(folder, shards, tmp_path):
    job = job_of(folder, "by workers", workers=2)
    tokenize(job, text_encoder)
    assert (job.out / MANIFEST).read_bytes() == (shards / MANIFEST).read_bytes()
    (tmp_path / "slow.py").write_text(
        "import multiprocessing, os, sys, time\n"
        "from pathlib import Path\n"
        "from dsv3_jax.data.tokenize import Tokenize, text_encoder, tokenize\n"
        "def encoder():\n"
        "    if multiprocessing.parent_process() is None:\n"
        "        return text_encoder()\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    tokenize(Tokenize((sys.argv[1],), Path(sys.argv[2]), workers=2, text_column='body'), encoder)\n"
    )
    argv = [sys.executable, str(tmp_path / "slow.py"), str(folder / "text.jsonl"), str(tmp_path / "out")]
    parent = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 20
    while time.monotonic() < until and os.path.exists(f"/proc/{worker}"):
        time.sleep(0.2)
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
