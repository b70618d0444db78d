"""Documents get their domain, equal texts the same side, and errors name file and position.

Hugging Face's datasets are read as files of the same rows; without the package: a sentence.
"""

import datetime
import gzip
import sys
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import refused, write_lines

from dsv3_jax.config import DataConfig
from dsv3_jax.data import hub
from dsv3_jax.data.corpus import load_corpus, read_documents
from dsv3_jax.data.text_files import rows_of_path


def read(*paths, **settings):
    settings = {"paths": tuple(map(str, paths)), "val_fraction": 0.5} | settings
    corpus = load_corpus(DataConfig(**settings))
    return corpus, sorted(corpus.train + corpus.val)


def test_a_folder_of_files(tmp_path, monkeypatch, capsys):
    files = {
        "README.md": b"readme",
        "src/a.py": b"a = 1\r\n",
        "src/deep/b.c": b"int b;",
        "notes": b"no suffix",
        ".git/config": b"hidden",
        "src/.hidden": b"hidden",
        "image.png": b"\x89PNG\0",
        "src/empty.py": b"",
        "more.jsonl": b'{"text": "j1", "domain": "web"}\n\n{"text": "j2"}\n',
        "doc/changelog.gz": gzip.compress(b"changes"),
        "packed.jsonl.GZ": gzip.compress(b'{"text": "j3"}\n'),
        "picture.gz": gzip.compress(b"\x89PNG\0"),
        "paper.pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
        "ascii.pdf": b"%PDF-1.4\n",
        "rows.jsonl.zst": b"\x28\xb5\x2f\xfd\x24\x03\x19\x01\x01abc",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    _, documents = read(tmp_path)
    assert documents == sorted([
        ("readme", "md"), ("a = 1\r\n", "src"), ("int b;", "src"), ("no suffix", "text"),
        ("j1", "web"), ("j2", "jsonl"), ("changes", "doc"), ("j3", "jsonl"),
    ])  # fmt: skip
    # A text in UTF-16 looks binary; nobody should miss it in silence.
    assert "passed over 5 binary files (or UTF-16)" in capsys.readouterr().err
    assert len(read(tmp_path, max_documents=2)[1]) == 2

    # A gzip file may hold far more than its size.
    (tmp_path / "large.txt.gz").write_bytes(gzip.compress(b"a" * 10**6))
    monkeypatch.setattr("dsv3_jax.data.text_files._MAX_TEXT_BYTES", 10**5)
    with refused("large.txt.gz has more than 100,000 bytes"):
        read(tmp_path)


def test_bad_files_are_named(tmp_path):
    for name, content, sentence in (
        ("a.txt.gz", gzip.compress(b"a text" * 99)[:-9], "a.txt.gz is no whole gzip file: "),
        ("a.txt.gz", b"a text", "a.txt.gz is no whole gzip file: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"a\xff"), "a.txt.gz is not UTF-8: .*0xff in position 1"),
        ("a.txt", b"", "a.txt' holds no text"),
        ("a.pdf", b"%PDF-1.4\n", "a.pdf is a PDF or packed by zstd"),
        ("a.txt", b"abc\xff", "a.txt is not UTF-8: .*0xff in position 3"),
        ("a.jsonl", b'{"txt": "a"}\n', 'a.jsonl, line 1: no key "text" is among .*txt'),
        ("a.txt", b"one text", "val_fraction=0.5 leaves no text for training: there are 1 in all"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read after row 0: Parquet file size is 4 byt"),
    ):
        (tmp_path / name).write_bytes(content)
        with refused(sentence):
            read(tmp_path / name)
    with refused("path='.*b.txt' does not exist"):
        read(tmp_path / "b.txt")

    # Shards are no text: their JSON would be, all alone.
    (tmp_path / "shards").mkdir()
    for name in ("manifest.json", "train-00000.array_record"):
        (tmp_path / "shards" / name).write_bytes(b"{}")
    with refused("path='.*shards' is a folder of shards; read it by --data.format shards"):
        read(tmp_path / "shards")


NO_UTF8 = pa.array([b"\xff"]).view(pa.string())
PARQUET = [  # columns, the error
    ({"body": ["p1"]}, r"cannot be read .* no column 'text' among \['body'\]"),
    ({"text": ["p1", None]}, r'row 2: "text" is None'),
    ({"text": NO_UTF8}, "cannot be read after row 0: "),
    ({"text": ["a"], "domain": pa.array([datetime.datetime(2026, 1, 2)])}, "cannot be read after"),
    ({"text": pa.array([2**62], pa.timestamp("ms"))}, "cannot be read after row 0: "),
]


def test_parquet(tmp_path, monkeypatch):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["p1", "p2"], "domain": ["web", None], "n": [1, 2]}), file)
    assert read(file)[1] == [("p1", "web"), ("p2", "parquet")]
    for columns, sentence in PARQUET:
        pq.write_table(pa.table(columns), file)
        with refused(f"a.parquet,? {sentence}"):
            read(file)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with refused(r"a\.parquet .* needs pyarrow.*pip install pyarrow"):
        read(file)


def test_rows_of_megabytes_are_decoded_one_after_the_other(tmp_path, monkeypatch):
    """A dictionary makes 64 MB, or as well gigabytes, of a file of kilobytes."""
    table = pa.table({"text": ["x" * 2**20] * 64})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    tracemalloc.start()
    assert sum(1 for _ in rows_of_path(str(tmp_path), ["text"])) == 64
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24
    monkeypatch.setattr("dsv3_jax.data.text_files._MAX_LINE_BYTES", 10**6)
    with refused(r"a\.parquet cannot be read after row 0: .* more than 1,000,000"):
        next(rows_of_path(str(tmp_path), ["text"]))


def test_split_is_by_text(tmp_path):
    lines = [{"text": f"text {i % 400}", "domain": str(i // 400)} for i in range(800)]
    corpus, _ = read(write_lines(tmp_path / "a.jsonl", lines), val_fraction=0.2)
    train, val = ({d.text for d in side} for side in (corpus.train, corpus.val))
    assert not train & val and len(corpus.train) + len(corpus.val) == 800
    assert abs(len(val) / 400 - 0.2) < 5 * (0.2 * 0.8 / 400) ** 0.5  # five standard deviations
    fewer, _ = read(write_lines(tmp_path / "b.jsonl", lines[:100]), val_fraction=0.2)
    assert {d.text for d in fewer.val} <= val and fewer.fingerprint != corpus.fingerprint


def test_long_texts_are_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i} of a long text\n" for i in range(40_000))
    (tmp_path / "a.txt").write_text(text + "x" * 300_000)
    _, documents = read(tmp_path / "a.txt", val_fraction=0.05)
    assert all(len(d.text) <= 2**18 for d in documents)
    assert sum(len(d.text) for d in documents) == len(text) + 300_000
    assert sum(d.text.endswith("text\n") for d in documents) >= 3


def test_default_corpus_has_its_domains():
    corpus = load_corpus(DataConfig(max_documents=200))
    assert corpus == load_corpus(DataConfig(max_documents=200))
    assert len(corpus.train) + len(corpus.val) == 200
    assert corpus.domains == ("code", "tests", "C", "English")
    sizes, documents = corpus.sizes(), corpus.train + corpus.val
    assert sum(map(sum, sizes.values())) == sum(len(d.text.encode()) for d in documents)
    assert all(train > 0 for train, _ in sizes.values())


# Hugging Face's datasets


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Rows as JSONL, and as `datasets` saves them: one dataset, and one with two splits."""
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    root = tmp_path_factory.mktemp("hub")
    domains = "web", "code"
    rows = [{"body": f"text {i} " * (1 + i % 5), "domain": domains[i % 2]} for i in range(40)]
    (root / "rows").mkdir()
    write_lines(root / "rows" / "rows.jsonl", rows)
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(str(root / "one"))
    datasets.DatasetDict(train=made, test=made.select(range(3))).save_to_disk(str(root / "splits"))
    return root


def test_a_dataset_has_the_documents_of_its_rows(saved):
    expected = list(read_documents([str(saved / "rows")], "body"))
    for name in ("one", "splits", "rows"):  # "rows" by load_dataset, streamed
        assert list(read_documents([f"hf:{saved / name}"], "body")) == expected
    assert list(read_documents([f"hf:{saved / 'splits'}@test"], "body")) == expected[:3]
    with refused(f"hf:{saved}/splits@dev.*there is no split 'dev' among"):
        list(read_documents([f"hf:{saved}/splits@dev"], "body"))


def test_names(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refused(r"hf:a/b .* needs datasets.*pip install datasets"):
        list(read_documents(["hf:a/b"]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    assert hub.absolute("hf:saved@test") == f"hf:{tmp_path}/saved@test"
