"""Shards hold every document once, are written where absent, and damage is named with its file."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runs import assert_bitwise, by_command, refused, write_lines
from test_data import BYTES, epoch, take
from texts import message

import dsv3_jax as ds
from dsv3_jax.chat.examples import load_examples
from dsv3_jax.chat.text_settings import plain_settings
from dsv3_jax.cli import tokenize as work
from dsv3_jax.cli.tokenize import Tokenize, tokenize
from dsv3_jax.config import DataConfig
from dsv3_jax.data.batches import Batches
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.data.manifest import MANIFEST, read_manifest, read_sealed, sealed
from dsv3_jax.data.packing import Record
from dsv3_jax.data.shards import check_files, open_shards
from dsv3_jax.data.tokenizer import train_bpe
from dsv3_jax.data.tokenizing import LOCK, SETTINGS
from dsv3_jax.host.lock import acquire

T, R = 16, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """JSONL of three domains; some documents exceed a record, others are far below a row."""
    root = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(3)
    lines = []
    for i in range(60):
        words = " ".join(map(str, rng.integers(1000, size=rng.integers(1, 25))))
        lines.append({"body": f"{i}: {words}", "domain": ("code", "English", "C")[i % 7 % 3]})
    write_lines(root / "text.jsonl", lines)
    return root


def job_of(folder, name="shards", **changes):
    settings = {"row_tokens": R, "val_fraction": 0.2, "text_column": "body", "shard_mb": 0.0004}
    return Tokenize((str(folder / "text.jsonl"),), folder / name, **settings | changes)


@pytest.fixture(scope="module")
def shards(folder):
    tokenize(job_of(folder))
    return folder / "shards"


def config(shards, **changes):
    usual = {"paths": (str(shards),), "seq_len": T, "batch_size": 4, "format": "shards"}
    return DataConfig(**usual | changes)


def documents_in(batches):
    for batch in batches:
        for row, segments in enumerate(batch["segment_ids"]):
            for segment in range(1, segments.max() + 1):
                yield {key: array[row][segments == segment] for key, array in batch.items()}


def test_every_document_is_in_a_pass_once(folder, shards):
    source = open_shards(config(shards), BYTES)
    file = folder / "text.jsonl"
    corpus = load_corpus(DataConfig((str(file),), val_fraction=0.2, text_column="body"))
    texts = [json.loads(line)["body"] for line in file.read_text().splitlines()]
    rows = epoch(source, passes=2)
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert [row["tokens"].tolist() for row in first] != [row["tokens"].tolist() for row in second]
    held_out = source.val_batches(10_000)
    for documents, part in ((corpus.train, first), (corpus.train, second), (corpus.val, held_out)):
        found = {texts.index(d.text): [] for d in documents}
        for piece in documents_in(part):
            found[int(piece["documents"][0])].append(piece)
        for document in documents:
            text, pieces = document.text.encode(), found[texts.index(document.text)]
            ids = [piece["tokens"].tolist() for piece in pieces]
            assert sorted(sum(ids, [])) == sorted([*text, BYTES.eos_id])
            assert all(bytes(t for t in piece if t < 256) in text for piece in ids)
            assert {source.domains[piece["domains"][0]] for piece in pieces} == {document.domain}
    assert source.summary.startswith("shards: ") and ", 60 documents" in source.summary


def test_a_mixture_follows_its_weights_and_repeats_nothing_within_a_pass(shards):
    mixture = ("code=8", "English=2", "C=0")
    source = open_shards(config(shards, mixture=mixture, temperature=2.0), BYTES)
    rows = take(Batches(source.train_batches()._order, 1), 90)
    names = [source.domains[row["domains"][0, 0]] for row in rows]
    assert abs(names.count("code") - 60) <= 1 and names.count("English") + names.count("code") == 90
    for name, part in zip(("code", "English"), source.train(), strict=True):
        own = [row for row, found in zip(rows, names, strict=True) if found == name][: len(part)]
        different = {(row["tokens"].tobytes(), row["documents"].tobytes()) for row in own}
        assert len(different) == len(own)
    assert open_shards(config(shards, temperature=1e9), BYTES).weights == pytest.approx([1 / 3] * 3)
    cold = open_shards(config(shards, mixture=mixture, temperature=1e-3), BYTES)  # 4^-1000 is 0
    assert cold.weights == (1.0,) and next(cold.train_batches())["domains"].max() == 0


TEXT = work.encoder_of(Tokenize((), Path("unused")))


def counted(monkeypatch, limit=10_000):
    """A list that grows by each document that is encoded; after some of them comes Ctrl-C."""
    calls = []

    def encode(items):
        for pair in TEXT.encode(items):
            calls.append(pair)
            if len(calls) > limit:
                raise KeyboardInterrupt
            yield pair

    monkeypatch.setattr(work, "encoder_of", lambda job: TEXT._replace(encode=encode))
    return calls


def interrupt(job):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, 50)
        tokenize(job)
    with refused("has no manifest.json"):
        open_shards(config(job.out), BYTES)


def test_interrupted_tokenizing_goes_on(folder, shards, monkeypatch):
    job = job_of(folder, "interrupted")
    job.out.mkdir()
    (job.out / ".settings.json.1.part").touch()  # of a killed process
    interrupt(job)
    assert not list(job.out.glob(".*"))
    torn = min(job.out.glob("*.array_record"))
    torn.write_bytes(torn.read_bytes()[:-1] + b"x")
    sorted(job.out.glob("shard-*.json"))[1].write_text(sealed({}))
    calls = counted(monkeypatch)
    tokenize(job)
    assert 0 < len(calls) < 60
    for file in [*shards.glob("*.array_record"), shards / MANIFEST]:
        assert file.read_bytes() == (job.out / file.name).read_bytes()


def test_changed_text_has_no_manifest_until_all_of_it_is_written(folder, tmp_path, capsys):
    """The old manifest cannot see a new shard of equal size; a shorter text's rest is deleted."""
    file, job = tmp_path / "text.jsonl", job_of(tmp_path)
    lines = (folder / "text.jsonl").read_text().splitlines()
    file.write_text("\n".join(lines))
    tokenize(job)
    lines = [line.replace("1", "2") for line in lines]  # as many bytes
    file.write_text("\n".join(lines))
    interrupt(job)
    file.write_text("\n".join(lines[:30]))
    tokenize(job)
    assert {path.name for path in job.out.glob("*.array_record")} == {*read_manifest(job.out).files}
    assert "deleted " in capsys.readouterr().out and open_shards(config(job.out), BYTES)


def test_shards_of_other_settings_or_another_process_are_refused(folder):
    job = job_of(folder, "others")
    with refused("/absent' does not exist"):  # which can be mended in the same folder
        tokenize(replace(job, paths=(f"{folder}/absent",)))
    tokenize(job)
    with refused(f"row_tokens=64 is not what .*{SETTINGS} has"):
        tokenize(replace(job, row_tokens=64))
    with acquire(job.out, LOCK), refused("is in use by process"):
        tokenize(job)


def test_damaged_shards_are_named(folder):
    job = job_of(folder, "damaged")
    tokenize(job)
    file = max(job.out.glob("train-*.array_record"), key=lambda path: path.stat().st_size)
    data = file.read_bytes()
    want, refusals = epoch(open_shards(config(job.out), BYTES)), 0
    written = [i for i, byte in enumerate(data) if byte]  # the rest is padding
    places = written[:: len(written) // 8]
    flipped = [data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :] for at in places]
    for content in (data[:-10], bytes(len(data)), *flipped):
        file.write_bytes(content)
        assert any(file.name in x for x in check_files(read_manifest(job.out), wholly=True))
        try:  # nothing may read the byte
            assert_bitwise(epoch(open_shards(config(job.out), BYTES)), want)
        except ValueError as error:
            assert file.name in str(error) and "dsv3 data" in str(error)
            refusals += 1
    assert refusals > 4
    file.unlink()
    with refused(f"{file.name}' is missing"):
        open_shards(config(job.out), BYTES)
    tokenize(job)  # writes only what is absent
    assert file.read_bytes() == data and open_shards(config(job.out), BYTES)


SEALED = {  # a value of the manifest or of its first file → what it may not be; None: absent
    "row_tokens": (None, 0, "x", 64.0),
    "vocab_size": (10**9,),
    "tokenizer": (5,),
    "domains": (5, ["\x1b[2J"]),
    "format": ("tar",),
    "files": (5, {}, {"train-0": {}, "val-0": 5}, {"../train-00000.array_record": {}}),
    "extra": (1,),
    "file.side": ("x", []),
    "file.bytes": (None, -1),
    "file.records": (0, 7),
    "file.hash": (5, "g", "00"),
    "file.domains": (5, [], [[7, 1, 1]], [["a", "b", "c"]], [[0, 1]], [[0, 10**9, 10**12]]),
}


def test_any_change_of_a_manifest_is_one_sentence(shards, tmp_path):
    """Where the seal is wrong, and where a stranger sealed it: then a value is not possible."""
    good = (shards / MANIFEST).read_text()
    texts = ["[]", "null", "{}", "", good[:-9], good.replace("32", "64", 1)]
    for place, wrong in SEALED.items():
        *of_file, key = place.split(".")
        for value in wrong:
            values = read_sealed(shards / MANIFEST)
            facts = next(iter(values["files"].values())) if of_file else values
            facts.pop(key, None) if value is None else facts.update({key: value})
            texts.append(sealed(values))
    for text in texts:
        (tmp_path / MANIFEST).write_text(text)
        with refused(f"{MANIFEST} (is damaged|is not |holds a)|is not that of shards="):
            open_shards(config(tmp_path), BYTES)


RECORDS = {
    "text, id 260": lambda r: r._replace(tokens=r.tokens + 4),
    "text, starts": lambda r: r._replace(starts=r.starts + 1),
    "text, another domain": lambda r: r._replace(domains=(r.domains + 1) % 3),
    "text, longer": lambda r: r._replace(tokens=np.resize(r.tokens, len(r.tokens) + R)),
    "text, a mask": lambda r: r._replace(loss_mask=np.ones(len(r.tokens), bool)),
    "chat, no mask": lambda r: r._replace(loss_mask=None),
    "chat, longer": lambda r: r._replace(
        tokens=np.resize(r.tokens, len(r.tokens) + R), loss_mask=np.ones(len(r.tokens) + R) > 0
    ),
    "chat, a mask of 2": lambda r: r._replace(loss_mask=r.loss_mask.view(np.uint8) * 2),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_no_tokenizer_wrote(folder, tmp_path, monkeypatch, name):
    """They are found with a right hash, too: by a sample at opening, and all by the check."""
    job, to_bytes = replace(job_of(folder), out=tmp_path / "shards"), Record.to_bytes
    if name.startswith("chat"):
        chats = [{"prompt": f"{i}?", "completion": str(i % 7)} for i in range(40)]
        of_chats = {"format": "chat", "chat_template": "plain", "text_column": "text"}
        job = replace(job, paths=(write_lines(tmp_path / "chats.jsonl", chats),), **of_chats)
    with monkeypatch.context() as patch:
        patch.setattr(Record, "to_bytes", lambda self: to_bytes(RECORDS[name](self)))
        tokenize(job)
    with refused(r"array_record' is damaged in record 0: .* are not possible"):
        open_shards(config(job.out, seq_len=R), BYTES)
    manifest = read_manifest(job.out)
    assert len(list(check_files(manifest, wholly=True))) == len(manifest.files)


def test_refusals(shards, tmp_path):
    other = train_bpe(["to be or not to be"] * 2, 262, str(tmp_path / "tokenizer.json"))
    with refused("tokenizer='bytes' is not that of shards="):
        open_shards(config(shards), other)
    with refused(f"seq_len=12 does not divide the {R} tokens"):
        open_shards(config(shards, seq_len=12), BYTES)
    with refused("names domain 'Code'.* have .*code, .*did you mean 'code'"):
        open_shards(config(shards, mixture=("Code=1",)), BYTES)


def test_chats_by_command_are_those_in_memory(tmp_path):
    chats = [[message("user", f"{i}?"), message("assistant", f"{i}.")] for i in range(100)]
    lines = [{"id": f"{i}{x}", "messages": chat} for x in "ab" for i, chat in enumerate(chats)]
    lines.append({"prompt": "too long", "completion": "p" * R})
    file, out = write_lines(tmp_path / "chats.jsonl", lines), tmp_path / "shards"
    argv = ["data", "tokenize", file, "--out", out, "--row-tokens", R, "--val-fraction", 0.1]
    argv += ["--format", "chat", "--chat-template", "plain"]
    code, _, err = by_command(*argv, "--template.thinking", "true")
    assert code == 2 and "thinking=True is no variable of the chat template" in err
    code, said, _ = by_command(*argv)
    assert code == 0 and "200 documents" in said and "left out: 1 " in said
    cfg = ds.DataConfig((str(out),), format="shards", seq_len=R, batch_size=1)
    in_memory = replace(cfg, paths=(file,), format="chat", val_fraction=0.1)
    sources = ds.data.open_source(cfg, BYTES), load_examples(in_memory, plain_settings())
    sides = []
    for source in sources:
        both = [documents_in(rows) for rows in (epoch(source), source.val_batches(1000))]
        learnt = [[(x["tokens"].tobytes(), x["loss_mask"].tobytes()) for x in of] for of in both]
        sides.append([*map(sorted, learnt)])
    assert sides[0] == sides[1]
    train, val = sides[0]
    assert len(train) + len(val) == 200 and val and not {*train} & {*val}

    with refused(f"seq_len=16 does not equal the {R} tokens"):
        open_shards(config(out), BYTES)
    assert by_command("data", "check", out)[0] == 0
    file = next(out.glob("val-*"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    code, said, err = by_command("data", "check", out)
    assert code == 2 and f"{file.name}' has other bytes" in said and "has 1 damaged shard;" in err
    values = read_sealed(out / MANIFEST)
    (out / MANIFEST).write_text(sealed(values | {"version": 2}))
    with refused(f"{MANIFEST} is not of version 3; tokenize again"):
        read_manifest(out)
